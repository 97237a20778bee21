"""Products through the inverse marginal covariance: ``Z'H^{-1}Z`` and ``Z'H^{-1}X``, ``H = W^{-1} + Z D Z'``.

Level by level with one grouping factor, else for all random effects at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mixjax import linalg
from mixjax.machine import Array, add_at, namespace, set_at
from mixjax.products.sums import CrossProducts, PairProducts


class Whole(NamedTuple):
    """In blocks: g of them, s effects each, relative to sigma^2 and in the bases of the products.

    Attributes:
        N: ``(g, s, s)``. T: ``(g, s, p)``. M: ``(p, p)``, ``X'H^{-1}X``. places: where every term's effects stand.
    """

    N: Array
    T: Array
    M: Array
    places: list[Place]


class Place(NamedTuple):
    """Where the effects of a term stand in a block, effect after effect: at ``own``, q effects of m levels each.

    ``units (j, q, q)`` are symmetric matrices that span the term's covariances.
    """

    own: slice
    q: int
    m: int
    units: np.ndarray


def whole(lambdas: list[Array], stats: CrossProducts) -> Whole:
    """At the terms' factors ``(q, q)``, in the bases of the products."""
    xp = namespace(stats.XX, stats.yy, *lambdas)
    A, B, places = _blocks(stats, xp)
    N, T, DT = _eliminated(A, B, lambdas, places)
    M = stats.XX - B.reshape(-1, B.shape[2]).T @ DT.reshape(-1, DT.shape[2])
    return Whole(N, T, M, places)


def _blocks(stats: CrossProducts, xp: Any) -> tuple[Array, Array, list[Place]]:
    """``Z'Z (g, s, s)`` and ``Z'Q (g, s, p)``, a block per level or one of all effects, and the place of every term."""
    starts, size = {}, 0
    alone = len(stats.factors) == 1
    held = [f for f in range(len(stats.factors)) if any(term.factor == f for term in stats.layout.terms)]
    for f in held:  # all but the empty factor
        q, _, m = stats.factors[f].ZZ.shape
        starts[f] = (size, 1 if alone else m)
        size += q * m
    places = []
    for term in stats.layout.terms:
        start, m = starts[term.factor]
        first, units = start + term.start * m, term.structure.directions()
        units = np.zeros((0, term.q, term.q)) if units is None else units
        places.append(Place(slice(first, first + term.q * m), term.q, m, units))
    if alone:
        products = stats.factors[0]
        return xp.moveaxis(xp.asarray(products.ZZ), -1, 0), xp.moveaxis(xp.asarray(products.ZX), -1, 0), places
    A = xp.zeros((size, size), stats.XX.dtype)
    B = []
    for f, (start, m) in starts.items():
        products = stats.factors[f]
        at = start + np.arange(len(products.ZZ), dtype=np.int32)[:, None] * m + np.arange(m, dtype=np.int32)
        A = set_at(A, (at[:, None], at[None]), xp.asarray(products.ZZ))
        B.append(xp.moveaxis(xp.asarray(products.ZX), 1, -1).reshape(at.size, -1))
    for (s, t), pair in zip(stats.layout.pairs, stats.pairs, strict=True):
        A = _add_pair(A, pair, starts[s], starts[t], xp)
    return A[None], xp.concatenate(B)[None], places


def _add_pair(A: Array, pair: PairProducts, s: tuple[int, int], t: tuple[int, int], xp: Any) -> Array:
    """Products of factors that start at ``s[0]`` and have ``s[1]`` levels; a pair with a level out of range is none."""
    q_s, q_t, _ = pair.ZZ.shape
    there = (pair.rows < s[1]) & (pair.cols < t[1])
    ZZ = xp.where(there, pair.ZZ, 0.0)
    rows, cols = xp.minimum(pair.rows, s[1] - 1), xp.minimum(pair.cols, t[1] - 1)
    at_s = s[0] + np.arange(q_s, dtype=np.int32)[:, None] * s[1] + rows[None]
    at_t = t[0] + np.arange(q_t, dtype=np.int32)[:, None] * t[1] + cols[None]
    A = add_at(A, (at_s[:, None], at_t[None]), ZZ)
    return add_at(A, (at_t[:, None], at_s[None]), xp.swapaxes(ZZ, 0, 1))


def _eliminated(A: Array, B: Array, lambdas: list[Array], places: list[Place]) -> tuple[Array, Array, Array]:
    """``N = (I + A D)^{-1} A``, ``T = (I + A D)^{-1} B`` and ``D T``, a block each, with ``D = Lambda Lambda'``.

    Products with ``W = (I + Lambda'A Lambda)^{-1}``, as in :func:`mixjax.linalg.gain`; Lambda itself is never laid out.
    """
    xp = namespace(A, *lambdas)
    right = _times(A, lambdas, places)  # A Lambda
    left = xp.swapaxes(right, 1, 2)
    M = xp.eye(A.shape[1], dtype=A.dtype) + _times(left, lambdas, places)
    W = xp.moveaxis(linalg.inverse_logdet(xp.moveaxis(M, 0, -1))[0], -1, 0)
    half = right @ W
    N = A - half @ left
    rows = xp.swapaxes(_times(xp.swapaxes(B, 1, 2), lambdas, places), 1, 2)  # Lambda'B
    turned = [xp.swapaxes(Lambda, 0, 1) for Lambda in lambdas]
    DT = xp.swapaxes(_times(xp.swapaxes(W @ rows, 1, 2), turned, places), 1, 2)
    return 0.5 * (N + xp.swapaxes(N, 1, 2)), B - half @ rows, DT


def _times(X: Array, lambdas: list[Array], places: list[Place]) -> Array:
    """``X Lambda`` for ``X (g, r, s)`` and the ``(q, q)`` of every term, which all of its levels share."""
    xp = namespace(X, *lambdas)
    at = np.argsort([place.own.start for place in places])
    parts = []
    for t in at:
        part = X[:, :, places[t].own].reshape(*X.shape[:2], places[t].q, places[t].m)
        parts.append(xp.einsum("graj,ab->grbj", part, lambdas[t]).reshape(*X.shape[:2], -1))
    return parts[0] if len(parts) == 1 else xp.concatenate(parts, axis=2)
