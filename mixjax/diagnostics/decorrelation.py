"""Marginal residuals made uncorrelated, one independent block of rows after the other."""

from __future__ import annotations

import numpy as np
import scipy.sparse
import scipy.sparse.csgraph

from mixjax.diagnostics.hat import STACK, Effects, Whitened

# Rows of one block, whose covariance is made as a matrix (200 MB).
MOST_ROWS = 5000


def blocks_of(effects: list[Effects], n: int) -> np.ndarray:
    """Codes ``(n,)`` of blocks of rows that share no random effect with rows of another block.

    One factor: its levels. Nested factors: those of the outermost. Crossed factors: whatever they tie together.
    Effects without variance tie nothing; levels with a known covariance are one block.
    """
    tied = [factor for factor in effects if factor.Lambda.any()]
    if not tied:
        return np.arange(n)
    starts = np.cumsum([n, *(factor.n_levels for factor in tied)])
    row = np.tile(np.arange(n), len(tied))
    codes = [factor.codes if factor.levels is None else np.zeros_like(factor.codes) for factor in tied]
    level = np.concatenate([start + own for start, own in zip(starts[:-1], codes, strict=True)])
    size = int(starts[-1])
    graph = scipy.sparse.coo_array((np.ones(len(row), np.int8), (row, level)), shape=(size, size))
    _, block = scipy.sparse.csgraph.connected_components(graph, directed=False)
    return np.unique(block[:n], return_inverse=True)[1].reshape(-1)


def largest_block(whitened: Whitened) -> int:
    """Rows of the largest block."""
    return int(np.bincount(blocks_of(whitened.effects, len(whitened.root_w))).max())


def decorrelated(whitened: Whitened, residuals: np.ndarray) -> np.ndarray:
    """``L^{-1} r`` where ``I + U U' = L L'`` with rows in their order, ``(n,)``.

    Args:
        residuals: ``(n,)`` times the roots of the weights, over sigma.

    Raises:
        ValueError: a block has more than ``MOST_ROWS`` rows.
    """
    n = len(residuals)
    block = blocks_of(whitened.effects, n)
    order, size = np.argsort(block, kind="stable"), np.bincount(block)
    if size.max() > MOST_ROWS:
        raise ValueError(
            f"Cholesky residuals need the covariance of {size.max()} rows at once, since their random effects tie them "
            f"together; up to {MOST_ROWS} are possible: use scale='studentized', whose variances are right while their "
            "correlations stay"
        )
    start, result = np.cumsum(size) - size, np.empty(n)
    for k in np.unique(size):
        alike = np.flatnonzero(size == k)
        for some in np.array_split(alike, 1 + len(alike) * int(k) ** 2 // STACK):
            if len(some):
                rows = order[start[some][:, None] + np.arange(k)]
                result[rows] = _forward(whitened.effects, rows, residuals[rows])
    return result


def _forward(effects: list[Effects], rows: np.ndarray, r: np.ndarray) -> np.ndarray:
    """``L^{-1} r`` of blocks of equal size: ``(c, k)``."""
    c, k = rows.shape
    bordered = np.zeros((c, k + 1, k + 1))
    V = bordered[:, :k, :k]
    V[:, np.arange(k), np.arange(k)] = 1.0
    for factor in effects:
        if factor.Lambda.any():
            U, level = factor.U[rows], factor.codes[rows]
            V += (U @ U.swapaxes(1, 2)) * factor.covariance_of(level)
    # Bordered by r, the factor's last row is L^{-1} r. Its corner has to exceed r'V^{-1}r, which r'r does not.
    bordered[:, k, :k] = r
    bordered[:, k, k] = 1.0 + 2.0 * (r * r).sum(1)
    return np.linalg.cholesky(bordered)[:, k, :k]
