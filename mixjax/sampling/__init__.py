"""Bayesian linear mixed models: priors, the log posterior with random effects integrated out, and draws from it."""
