"""Residuals of unequal standard deviations, and correlated within groups."""
