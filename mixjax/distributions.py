"""Tails and quantiles, by ``scipy.special``: ``scipy.stats`` takes a fifth of the time in which a process prints its
first summary."""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy import special


def normal_quantile(p: Any) -> Any:
    """Quantiles of the standard normal distribution."""
    return special.ndtri(p)


def t_quantile(p: Any, df: Any) -> Any:
    """Quantiles of Student's t; of the normal distribution where df is infinite, NaN where it is not positive."""
    df = np.asarray(df, np.float64)
    infinite = np.isinf(df)
    quantile = special.stdtrit(np.where(infinite | ~(df > 0), 1.0, df), p)
    return np.where(infinite, special.ndtri(p), np.where(df > 0, quantile, np.nan))[()]


def t_tail(x: Any, df: Any) -> Any:
    """``P(X > x)``."""
    df = np.asarray(df, np.float64)
    infinite = np.isinf(df)
    tail = special.stdtr(np.where(infinite | ~(df > 0), 1.0, df), -np.asarray(x))
    return np.where(infinite, special.ndtr(-np.asarray(x)), np.where(df > 0, tail, np.nan))[()]


def chi2_tail(x: Any, df: Any) -> Any:
    """``P(X > x)``; 1 below zero."""
    return special.chdtrc(df, np.maximum(x, 0.0))


def f_tail(x: Any, df: Any, den_df: Any) -> Any:
    """``P(X > x)``; 1 below zero, and that of a chi-square over df where ``den_df`` is infinite."""
    den_df, x = np.asarray(den_df, np.float64), np.maximum(x, 0.0)
    infinite = np.isinf(den_df)
    tail = special.fdtrc(df, np.where(infinite, 1.0, den_df), x)
    return np.where(infinite, special.chdtrc(df, np.multiply(x, df)), tail)[()]
