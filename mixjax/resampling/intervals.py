"""Bootstrap intervals: functions of replicates and estimates, column by column; and the jackknife that BCa needs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from scipy.special import ndtr, ndtri

from mixjax.design import refuse_smooths
from mixjax.fitted.either import AnyFitted
from mixjax.optimise.results import failed
from mixjax.resampling.kinds import cluster_products, outermost_term
from mixjax.resampling.replicates import Data, chunk_size

KINDS = ("percentile", "basic", "normal", "bca")


def quantiles(x: np.ndarray, q: np.ndarray) -> np.ndarray:
    """Quantiles q ``(...)`` of the values of x that are no NaN: linear between order statistics at ``i / (N + 1)``.

    That is the rank ``(N + 1) q`` of Davison & Hinkley (1997), so that with N = 999 the limits of 95 % are
    replicates themselves; beyond the first and the last order statistic it stays there. NaN of no values.
    """
    x = x[~np.isnan(x)]
    if not len(x) or np.isnan(q).any():
        return np.full(np.shape(q), np.nan)
    found: np.ndarray = np.quantile(x, q, method="weibull")
    return found


def percentile(replicates: np.ndarray, level: float) -> np.ndarray:
    """Quantiles of the replicates: ``(N, k)`` -> lower and upper ``(k, 2)``."""
    tails = np.array([(1 - level) / 2, (1 + level) / 2])
    return np.stack([quantiles(x, tails) for x in replicates.T])


def basic(replicates: np.ndarray, estimate: np.ndarray, level: float) -> np.ndarray:
    """Percentile limits turned round: ``2 estimate - upper .. 2 estimate - lower``."""
    limits: np.ndarray = 2 * estimate[:, None] - percentile(replicates, level)[:, ::-1]
    return limits


def normal(bias: np.ndarray, std_error: np.ndarray, estimate: np.ndarray, level: float) -> np.ndarray:
    """``estimate - bias -+ z std_error``."""
    centre, width = estimate - bias, ndtri((1 + level) / 2) * std_error
    return np.stack([centre - width, centre + width], axis=1)


def bca(replicates: np.ndarray, estimate: np.ndarray, acceleration: np.ndarray, level: float) -> np.ndarray:
    """Bias-corrected and accelerated limits (Efron 1987, J. Amer. Statist. Assoc. 82, 171).

    Quantiles at ``Phi(z0 + (z0 + z) / (1 - a (z0 + z)))``, where z0 is the normal quantile of the share of replicates
    below the estimate; those equal to it, as estimates of zero variance are, count half.

    Args:
        replicates: ``(N, k)``, NaN where there is none. estimate: ``(k,)``. acceleration: ``(k,)``, a.

    Returns:
        ``(k, 2)``; NaN where all replicates lie on one side of the estimate, or a is NaN.
    """
    z = ndtri([(1 - level) / 2, (1 + level) / 2])
    limits = np.full((len(estimate), 2), np.nan)
    for j, (x, t, a) in enumerate(zip(replicates.T, estimate, acceleration, strict=True)):
        x = x[~np.isnan(x)]
        if not len(x) or np.isnan(t) or np.isnan(a):
            continue
        share = ((x < t).sum() + 0.5 * (x == t).sum()) / len(x)
        if 0 < share < 1:
            moved = ndtri(share) + z
            if (a * moved < 1).all():  # beyond that the map turns round and there is no limit
                limits[j] = quantiles(x, ndtr(ndtri(share) + moved / (1 - a * moved)))
    return limits


def acceleration(jackknife: np.ndarray) -> np.ndarray:
    """``sum d^3 / (6 (sum d^2)^{3/2})``, d the mean of the jackknife ``(M, k)`` less its values; 0 where all agree."""
    d = jackknife.mean(axis=0) - jackknife
    # In units of the largest, so that cubes of tiny numbers do not vanish.
    largest = np.abs(d).max(axis=0)
    d = d / np.where(largest > 0, largest, 1.0)
    squares = (d**2).sum(axis=0)
    skewness: np.ndarray = (d**3).sum(axis=0) / (6 * np.where(squares > 0, squares, 1.0) ** 1.5)
    return skewness


def jackknife(fitted: AnyFitted, refit: Callable[[Data, int], tuple[Any, Any, Any]]) -> np.ndarray:
    """A statistic without each level of the outermost grouping factor, one level after the other: ``(levels, k)``.

    Args:
        refit: B data sets, of so many in all -> values ``(B, k)``, anything, and codes of ``mixjax.Result``
            ``(B,)``.

    Raises:
        ValueError: factors are crossed; there are fewer than three levels; the model cannot be fitted without some
            level.
    """
    fitted.check_can("resampling of residuals or cases")
    refuse_smooths(fitted.labels, "kind='bca'", "no level can be left out as independent; use kind='percentile'")
    clusters, term = cluster_products(fitted), outermost_term(fitted)
    M, name = clusters.M, fitted.labels.terms[term].group
    if M < 3:
        raise ValueError(f"{name!r} has {M} levels: BCa intervals leave out one at a time and need three at least")
    chunk = chunk_size(clusters.numbers(M - 1))
    values, codes = [], []
    for first in range(0, M, chunk):
        left_out = np.arange(first, min(M, first + chunk))[:, None]
        others = np.arange(M - 1)[None]
        part, _, result = refit(clusters.gather(others + (others >= left_out)), M)
        values.append(part)
        codes.append(result)
    lost = np.flatnonzero(failed(np.concatenate(codes)))
    if len(lost):
        present = np.unique(fitted.design.terms[term].group)
        levels = ", ".join(repr(fitted.labels.terms[term].levels[present[i]]) for i in lost[:5])
        raise ValueError(
            f"BCa intervals need the fit without each level of {name!r}, but without {levels}"
            f"{', ...' if len(lost) > 5 else ''} it fails, as where fixed effects depend on one level; use "
            "kind='percentile' or 'basic'"
        )
    return np.concatenate(values)
