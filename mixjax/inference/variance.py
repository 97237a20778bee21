"""How much of the variance lies where."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mixjax.fitted import Fitted


def icc(fitted: Fitted) -> pd.Series:
    """Intraclass correlation: the share of variance that lies between groups.

    The variance of a random term is its mean over the rows, ``mean_i z_i' Sigma z_i`` (Johnson 2014, Methods Ecol.
    Evol. 5, 944, eq. 10); for random intercepts that is the intercept variance itself.

    Returns:
        Series with ``adjusted``: random / (random + residual), and ``unadjusted``: the variance of the fixed effects'
        predictions (Nakagawa, Johnson & Schielzeth 2017, J. R. Soc. Interface 14, eq. 2.5) added to the denominator.
    """
    random, residual = _random_variances(fitted).sum(), float(fitted.estimates.sigma) ** 2
    X = np.asarray(fitted.rows.X)
    fixed = float(np.var(X @ fitted.estimates.beta, ddof=1)) if X.shape[1] else 0.0
    return pd.Series(
        {"adjusted": random / (random + residual), "unadjusted": random / (random + residual + fixed)}, name="icc"
    )


def _random_variances(fitted: Fitted) -> np.ndarray:
    """Mean variance of each random term over the rows."""
    return np.array(
        [
            np.einsum("na,ab,nb->n", term.Z, Sigma, term.Z).mean()
            for term, Sigma in zip(fitted.rows.terms, fitted.estimates.Sigma, strict=True)
        ]
    )
