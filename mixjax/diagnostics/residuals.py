"""What the model says of the rows it was fitted to, and what it leaves over."""

from __future__ import annotations

import numpy as np

from mixjax.fitted import Fitted


def fixed_part(fitted: Fitted) -> np.ndarray:
    """``offset + X beta``: the mean over the population, ``(n,)``."""
    mean = np.asarray(fitted.rows.X) @ fitted.estimates.beta
    return mean if fitted.rows.offset is None else mean + fitted.rows.offset


def conditional_mean(fitted: Fitted) -> np.ndarray:
    """``offset + X beta + Z b``: the mean given the random effects of a row's own levels, ``(n,)``."""
    mean = fixed_part(fitted)
    for term, b in zip(fitted.rows.terms, fitted.estimates.b, strict=True):
        mean = mean + (np.asarray(term.Z) * b[term.group]).sum(axis=1)
    return mean


def conditional_residuals(fitted: Fitted, scale: str = "raw") -> np.ndarray:
    """``y`` minus the conditional mean; ``scale="pearson"`` times ``sqrt(weights)``."""
    return _scaled(fitted, np.asarray(fitted.rows.y) - conditional_mean(fitted), scale)


def marginal_residuals(fitted: Fitted, scale: str = "raw") -> np.ndarray:
    """``y`` minus the population mean; ``scale="pearson"`` times ``sqrt(weights)``."""
    return _scaled(fitted, np.asarray(fitted.rows.y) - fixed_part(fitted), scale)


def _scaled(fitted: Fitted, residuals: np.ndarray, scale: str) -> np.ndarray:
    if scale not in ("raw", "pearson"):
        raise ValueError(f"scale must be 'raw' or 'pearson', got {scale!r}")
    if scale == "raw" or fitted.rows.weights is None:
        return residuals
    return residuals * np.sqrt(fitted.rows.weights)
