"""Replicates: drawn, refitted, counted; bootstrap and its intervals."""
