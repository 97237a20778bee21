"""Minimisers of smooth functions. Nothing in here knows what a mixed model is."""
