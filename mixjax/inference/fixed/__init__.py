"""Tests, means and contrasts of the fixed effects."""
