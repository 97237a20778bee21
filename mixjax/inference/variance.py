"""How much of the variance lies where."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import pandas as pd

from mixjax.fitted import Fitted


class Components(NamedTuple):
    """Variances of the linear predictor's parts, absolute.

    Attributes:
        fixed: of the fixed effects' predictions over the rows. random: per random term its mean over the rows.
        residual: ``sigma^2``.
    """

    fixed: float
    random: np.ndarray
    residual: float


def components(fitted: Fitted) -> Components:
    """Where the variance lies.

    That of a random term is its mean over the rows, ``mean_i z_i' Sigma z_i`` (Johnson 2014, Methods Ecol. Evol. 5,
    944, eq. 10); for random intercepts that is the intercept variance itself. That of the fixed effects is the variance
    of their predictions (Nakagawa, Johnson & Schielzeth 2017, J. R. Soc. Interface 14, eq. 2.5).
    """
    X = np.asarray(fitted.rows.X)
    random = [
        np.einsum("na,ab,nb->n", term.Z, Sigma, term.Z).mean()
        for term, Sigma in zip(fitted.rows.terms, fitted.estimates.Sigma, strict=True)
    ]
    fixed = float(np.var(X @ fitted.estimates.beta, ddof=1)) if X.shape[1] else 0.0
    return Components(fixed, np.array(random), float(fitted.estimates.sigma) ** 2)


def icc(fitted: Fitted, by_group: bool = False) -> pd.Series:
    """Intraclass correlation: the share of variance that lies between groups, see :func:`components`.

    Args:
        by_group: one for every grouping factor: the variance of its terms / (random + residual).

    Returns:
        Series with ``adjusted``: random / (random + residual), and ``unadjusted``: with the variance of the fixed
        effects in the denominator. By group: a Series over grouping factors, which add up to ``adjusted``.
    """
    fixed, random, residual = components(fitted)
    total = random.sum() + residual
    if by_group:
        groups = [term.group for term in fitted.labels.terms]
        return (pd.Series(random, index=groups).groupby(level=0, sort=False).sum() / total).rename("icc")
    return pd.Series({"adjusted": random.sum() / total, "unadjusted": random.sum() / (total + fixed)}, name="icc")


def r2(fitted: Fitted) -> pd.Series:
    """Shares of explained variance (Nakagawa & Schielzeth 2013, Methods Ecol. Evol. 4, 133, eqs. 26, 30).

    Returns:
        Series with ``marginal``: fixed / (fixed + random + residual), and ``conditional``: (fixed + random) / the same;
        see :func:`components`.
    """
    fixed, random, residual = components(fitted)
    total = fixed + random.sum() + residual
    return pd.Series({"marginal": fixed / total, "conditional": (fixed + random.sum()) / total}, name="r2")
