"""A curve through a cloud of points."""

from __future__ import annotations

import numpy as np

# Longer data are first averaged over runs of neighbours: the curve does not see the difference.
MOST = 2_000
POINTS = 80


def local_linear(
    x: np.ndarray, y: np.ndarray, span: float = 2 / 3, iterations: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """Robust local linear regression, Cleveland's lowess (1979, J. Am. Stat. Assoc. 74, 829).

    At each place a line is fitted to the nearest points, weighted by the tricube of their distance; points far from the
    curve then lose weight (bisquare of the residual over six times the median absolute one) and it is fitted again.

    Args:
        x, y: ``(n,)`` finite numbers.
        span: share of the points that each line rests on.
        iterations: how often points are weighted anew; 0 is not robust.

    Returns:
        Places, ascending, and the curve there: at most 80 of both, at least 2; both empty where x has fewer than four
        distinct values.
    """
    order = np.argsort(x, kind="stable")
    x, y = np.asarray(x, np.float64)[order], np.asarray(y, np.float64)[order]
    if len(np.unique(x)) < 4:
        return np.empty(0), np.empty(0)
    counts = np.ones(len(x))
    if len(x) > MOST:
        first = np.linspace(0, len(x), MOST + 1).astype(int)[:-1]
        counts = np.diff([*first, len(x)]).astype(float)
        x, y = np.add.reduceat(x, first) / counts, np.add.reduceat(y, first) / counts
    places = np.unique(x)
    if len(places) > POINTS:
        places = np.linspace(x[0], x[-1], POINTS)
    distance = np.abs(places[:, None] - x)
    k = min(len(x), max(2, int(np.ceil(span * len(x)))))
    reach = np.partition(distance, k - 1, axis=1)[:, k - 1]
    # Ties may fill the neighbourhood with one value of x: widen it to the next, so that there is a line to fit.
    beyond = np.where(distance > 0, distance, np.inf).min(axis=1)
    reach = 1.0001 * np.maximum(reach, beyond)
    near = counts * np.clip(1 - (distance / reach[:, None]) ** 3, 0, None) ** 3
    robust = np.ones(len(x))
    for left in range(iterations, -1, -1):
        curve = _lines(places, x, y, near * robust)
        if not left:
            break
        residual = np.abs(y - np.interp(x, places, curve))
        scale = 6 * np.median(residual)
        if scale <= 1e-12 * np.abs(y).max(initial=0.0):
            break
        robust = np.clip(1 - (residual / scale) ** 2, 0, None) ** 2
    return places, curve


def _lines(places: np.ndarray, x: np.ndarray, y: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Values at the places of weighted least-squares lines ``(places,)``; weights ``(places, n)``."""
    total = weights.sum(axis=1)
    total = np.where(total > 0, total, 1.0)
    mean_x, mean_y = weights @ x / total, weights @ y / total
    spread = x - mean_x[:, None]
    sxx = (weights * spread**2).sum(axis=1)
    sxy = (weights * spread * (y - mean_y[:, None])).sum(axis=1)
    flat = sxx <= 1e-12 * total * (x[-1] - x[0]) ** 2
    slope = np.where(flat, 0.0, sxy / np.where(flat, 1.0, sxx))
    line: np.ndarray = mean_y + slope * (places - mean_x)
    return line
