"""Predictions of old and new rows, with standard errors and intervals."""
