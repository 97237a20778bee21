"""Fits by NumPy: they compile nothing, and another engine finds them than the compiled programs under test."""

from mixjax.engine.engine import AtOnce
from mixjax.estimation.estimate import Estimates, fit
from mixjax.products.sums import CrossProducts


def fit_at_once(stats: CrossProducts, start, reml: bool) -> Estimates:
    """The estimates of products that are NumPy's arrays."""
    return AtOnce(stats, reml).run(fit, start)
