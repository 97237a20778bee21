"""Variances: shares, likelihood ratios, profiles, exact tests."""
