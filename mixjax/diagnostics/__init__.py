"""Residuals, leverage, influence, shrinkage."""
