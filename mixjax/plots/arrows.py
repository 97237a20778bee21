"""Lengths of comparison arrows: two overlap where their means are not significantly different."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np

# A pair keeps at least this share of the distance between its difference and what would be significant.
MARGIN = 0.3


class Arrows(NamedTuple):
    """Lengths ``(k,)`` to either side, and how many pairs they show wrongly."""

    left: np.ndarray
    right: np.ndarray
    wrong: int


def comparison_arrows(estimate: np.ndarray, least: np.ndarray) -> Arrows:
    """Arrows of k means; one to the right and one to the left meet where a difference is not significant.

    The right arrow of the lower mean and the left arrow of the higher one should together be as long as the least
    significant difference of the two. With more than two means and unequal standard errors that is more than the 2 k
    lengths can do: a linear program keeps every pair on its right side if it can, and is as close as it can.

    Args:
        estimate: ``(k,)``. least: ``(k, k)`` least significant differences, NaN where two are not compared.
    """
    from scipy.optimize import linprog
    from scipy.sparse import coo_array

    order = np.argsort(estimate, kind="stable")
    pairs = [(i, j) for i, j in itertools.combinations(order, 2) if np.isfinite(least[i, j]) and least[i, j] > 0]
    k, m = len(estimate), len(pairs)
    if not m:
        return Arrows(np.zeros(k), np.zeros(k), 0)
    reach = np.array([least[pair] for pair in pairs])
    d = np.array([estimate[j] - estimate[i] for i, j in pairs])
    scale = reach.mean()
    reach, d = reach / scale, d / scale
    side = np.where(d < reach, 1.0, -1.0)
    # Unknown: right (k), left (k), then what is not met: lengths of pairs (m), sides (m), lengths of arrows (2 k).
    ends = np.array([(i, k + j) for i, j in pairs])
    row = np.repeat(np.arange(m), 2)
    lengths = coo_array((np.ones(2 * m), (row, ends.ravel())), shape=(m, 2 * k)).toarray()
    eye, none, own = np.eye(m), np.zeros((m, m)), np.eye(2 * k)
    zeros, wide = np.zeros((m, 2 * k)), np.zeros((2 * k, m))
    A = np.vstack(
        [
            np.hstack([lengths, -eye, none, zeros]),
            np.hstack([-lengths, -eye, none, zeros]),
            np.hstack([-side[:, None] * lengths, none, -eye, zeros]),
            np.hstack([own, wide, wide, -own]),
            np.hstack([-own, wide, wide, -own]),
        ]
    )
    half = np.full(2 * k, 0.5)
    b = np.concatenate([reach, -reach, -side * d - MARGIN * np.abs(reach - d), half, -half])
    cost = np.concatenate([np.zeros(2 * k), np.ones(m), np.full(m, 1e3), np.full(2 * k, 1e-3)])
    found = linprog(cost, A_ub=A, b_ub=b).x
    overlap = lengths @ found[: 2 * k] > d
    right, left = found[:k] * scale, found[k : 2 * k] * scale
    return Arrows(left, right, int((overlap != (side > 0)).sum()))
