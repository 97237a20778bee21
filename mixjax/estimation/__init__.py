"""One fit: estimates, and predicted random effects."""
