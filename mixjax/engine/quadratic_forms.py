"""What the quadratic forms ``y'P V_j P y`` of a design expect, P the projection that takes the fixed effects out.

Their expectations are linear in the covariances, with ``tr(P V_j P V_l)`` as coefficients (Searle, Casella & McCulloch
1992, Variance Components, section 11.3): what MINQUE(0) solves. ``V_j = Z E_j Z'`` for a free entry j of a covariance.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mixjax import linalg
from mixjax.engine.first_factor import Spot, directions_of
from mixjax.machine import Array, fori_loop, namespace, take_or_zero
from mixjax.products.sums import CrossProducts, Layout


class Expected(NamedTuple):
    """What no response changes.

    Attributes:
        XX_inverse: ``(p, p)``. directions: per factor its symmetric ``E_j (J, q, q)``.
        equations: ``tr(P V_j P V_l)``, of all factors' directions one after another. traces: ``tr(P V_j)``.
    """

    XX_inverse: Array
    directions: dict[int, np.ndarray]
    equations: Array
    traces: Array

    def spots(self, layout: Layout) -> list[Spot]:
        """What every direction stands for."""
        return [(f, pair) for f in self.directions for pair in directions_of(layout, f)]


def expected_of(stats: CrossProducts) -> Expected:
    """From the products of one data set.

    With ``Z_i'P Z_l = N_il - Q_il``, products of two levels less what the fixed effects take out, ``tr(P V_j P V_l)``
    is a sum over pairs of levels: of N N and N Q over those that occur together, of Q Q by way of X.
    """
    xp = namespace(stats.XX)
    layout, XX = stats.layout, xp.asarray(stats.XX)
    p = XX.shape[0]
    C = linalg.inverse_logdet(XX[..., None])[0][..., 0] if p else XX
    widths = [np.shape(products.ZZ)[0] for products in stats.factors]
    E = {f: _symmetric(directions_of(layout, f), q, XX.dtype) for f, q in enumerate(widths)}
    half, by_X, traces = [], [], []
    S: dict[tuple[int, int], Array] = {}
    for f, (ZZ, ZX) in enumerate((xp.asarray(products.ZZ), xp.asarray(products.ZX)) for products in stats.factors):
        q, _, m = ZX.shape
        half.append(xp.swapaxes(xp.swapaxes(ZX, 1, 2) @ C, 1, 2))
        Q = _by_way_of_X(half[f], ZX, ZZ)
        S[f, f] = _traces(E[f], ZZ, ZZ - 2.0 * Q, E[f])
        across = (half[f].reshape(-1, m) @ ZX.reshape(-1, m).T).reshape(q, p, q, p)
        by_X.append(xp.einsum("jab,apbr->jpr", E[f], across))
        traces.append(xp.einsum("jab,ab->j", E[f], (ZZ - Q).sum(-1)))
    for (s, t), (rows, cols, N) in zip(layout.pairs, stats.pairs, strict=True):
        N, left, right = xp.asarray(N), half[s], xp.asarray(stats.factors[t].ZX)
        part = _traces(E[s], N, N - 2.0 * _by_way_of_X(left, right, N, rows, cols), E[t])
        S[s, t] = S[s, t] + part + part.T if s == t else part  # pairs of one factor's levels stand once
        S[t, s] = S[s, t].T
    rows_of = []
    for f in E:
        among = [xp.einsum("jpr,lrp->jl", by_X[f], by_X[g]) for g in E]
        rows_of.append(xp.concatenate([S[f, g] + part if (f, g) in S else part for g, part in enumerate(among)], 1))
    return Expected(C, E, xp.concatenate(rows_of), xp.concatenate(traces))


def _symmetric(pairs: list[tuple[int, int]], q: int, dtype: Any) -> np.ndarray:
    """A matrix with ones at (a, b) and (b, a) for every pair: ``(J, q, q)``."""
    E = np.zeros((len(pairs), q, q), dtype)
    for j, (a, b) in enumerate(pairs):
        E[j, a, b] = E[j, b, a] = 1.0
    return E


def _by_way_of_X(left: Array, right: Array, like: Array, rows: Any = None, cols: Any = None) -> Array:
    """``(q_s, q_t, pairs)``: products of ``left (q_s, p, m_s)`` and ``right (q_t, p, m_t)`` summed over X's p columns,
    one after the other, so that no array has columns and pairs of levels both."""

    def side(of: Array, r: Any, at: Any) -> Array:
        return of[:, r] if at is None else take_or_zero(of[:, r], at, 1)

    def add(r: Any, Q: Array) -> Array:
        return Q + side(left, r, rows)[:, None] * side(right, r, cols)[None]

    xp = namespace(like)
    Q: Array = fori_loop(left.shape[1], add, xp.zeros_like(like), xp)
    return Q


def _traces(E: np.ndarray, N: Array, M: Array, F: np.ndarray) -> Array:
    """``(J, L)``: the sum of ``tr(E_j N_i F_l M_i')`` over the pairs i of levels."""
    K = N.shape[-1]
    both = (N.reshape(-1, K) @ M.reshape(-1, K).T).reshape(*N.shape[:2], *M.shape[:2])
    return namespace(N, M).einsum("jab,lcd,bcad->jl", E, F, both)
