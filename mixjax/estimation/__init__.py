"""One fit and many: estimates, and predicted random effects."""
