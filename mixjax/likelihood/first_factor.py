"""The first factor of the closed-form derivatives, level by level.

The matrices of a level are tiny, so they are written out: each entry is one vector over classes of levels and lanes.
The notation is that of :mod:`mixjax.likelihood.curvature`.
"""

from __future__ import annotations

from functools import cache, reduce
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from mixjax.covariance import pairs_of
from mixjax.likelihood.crossed import AnyMoments
from mixjax.likelihood.statistics import Layout

Entries = dict[tuple[int, int], Array]  # of tiny matrices, each entry a vector over classes and lanes


class First(NamedTuple):
    """The first factor eliminated. Entries are vectors ``(C, B)`` over classes and lanes."""

    K: Entries
    F: Entries
    N: Entries
    logdet: Array


def directions_of(layout: Layout, f: int) -> list[tuple[int, int]]:
    """Pairs (a, b), a <= b, of effects of factor f whose covariance is a parameter: those within one term."""
    return [
        (place.start + a, place.start + b) for place in layout.terms if place.factor == f for a, b in pairs_of(place.q)
    ]


def eliminate_first(Lambda: list[list[Array | None]], moments: AnyMoments) -> First:
    A = {(a, b): moments.A[a, b] for a, b in _square(len(Lambda))}
    q = len(Lambda)
    if q == 1:
        D = dot([(Lambda[0][0], Lambda[0][0])])
        pivot = 1.0 + D * A[0, 0]
        inverse = 1.0 / pivot
        return First({(0, 0): D * inverse}, {(0, 0): inverse}, {(0, 0): A[0, 0] * inverse}, jnp.log(pivot))
    AL = {(a, c): dot((A[a, b], Lambda[b][c]) for b in range(q)) for a, c in _square(q)}
    M = {}
    for a, b in pairs_of(q):
        M[a, b] = dot((Lambda[c][a], AL[c, b]) for c in range(q)) + (1.0 if a == b else 0.0)
    inverse, logdet = _inverse_of_entries(M, q)
    LM = {(a, c): dot((Lambda[a][b], inverse[ordered(b, c)]) for b in range(q)) for a, c in _square(q)}
    K = {(a, b): dot((LM[a, c], Lambda[b][c]) for c in range(q)) for a, b in pairs_of(q)}
    F = {(a, b): (1.0 if a == b else 0.0) - dot((A[a, c], K[ordered(c, b)]) for c in range(q)) for a, b in _square(q)}
    N = {(a, b): dot((F[a, c], A[c, b]) for c in range(q)) for a, b in pairs_of(q)}
    return First(K, F, N, logdet)


def _inverse_of_entries(M: Entries, q: int) -> tuple[Entries, Array]:
    """Gauss-Jordan elimination of a symmetric positive definite matrix given by its upper entries."""
    M = {(a, b): M[ordered(a, b)] for a, b in _square(q)}
    product = M[0, 0]
    for k in range(q):
        product = product * M[k, k] if k else product
        inverse = 1.0 / M[k, k]
        new = {(k, k): inverse}
        for a, b in _square(q):
            if a != k and b != k:
                new[a, b] = M[a, b] - M[a, k] * M[k, b] * inverse
            elif b != k:
                new[a, b] = M[a, b] * inverse
            elif a != k:
                new[a, b] = -M[a, b] * inverse
        M = new
    return {pair: M[pair] for pair in pairs_of(q)}, jnp.log(product)


def congruence(F: Entries, pair: tuple[int, int]) -> Entries:
    """``F'E F`` for the unit symmetric matrix E of a pair."""
    q = 1 + max(a for a, _ in F)
    a, b = pair
    if a == b:
        return {(c, d): F[a, c] * F[a, d] for c, d in pairs_of(q)}
    return {(c, d): F[a, c] * F[b, d] + F[b, c] * F[a, d] for c, d in pairs_of(q)}


def _sandwich(F: Entries, Q: Entries) -> Entries:
    """``F Q F'`` of symmetric Q."""
    q = 1 + max(a for a, _ in F)
    FQ = {(a, c): dot((F[a, b], Q[ordered(b, c)]) for b in range(q)) for a, c in _square(q)}
    return {(a, b): dot((FQ[a, c], F[b, c]) for c in range(q)) for a, b in pairs_of(q)}


def weights_of(matrices: list[Entries]) -> list[Array]:
    """Per pair of effects ``(C, j, B)``: entry of matrix j."""
    q = 1 + max(b for _, b in matrices[0])
    return [jnp.stack([matrix[pair] for matrix in matrices], axis=1) for pair in pairs_of(q)]


def _pairs_to_matrix(pulled: list[Array]) -> Entries:
    q = int((np.sqrt(8 * len(pulled) + 1) - 1) / 2)
    return {(a, b): x if a == b else 0.5 * x for (a, b), x in zip(pairs_of(q), pulled, strict=True)}


@cache
def _first_directions(own: tuple, pairs: tuple) -> tuple[np.ndarray, np.ndarray, list]:
    """For directions j = (a, b): their places among the pairs; 1, or 2 for off-diagonal ones; and the products ``N Y``
    of entries that make up ``tr(N E_j Y E_l)``: index arrays ``(J, J)`` and a weight, up to four times."""
    at = np.array([pairs.index(pair) for pair in own], np.int32)
    twice = np.array([1.0 if a == b else 2.0 for a, b in own])
    products = []
    for flip in (False, True):
        for flip2 in (False, True):
            index = np.zeros((2, len(own), len(own)), np.int32)
            weight = np.zeros((len(own), len(own)))
            for j, (a, b) in enumerate(own):
                for i, (a2, b2) in enumerate(own):
                    (x, y), (x2, y2) = (b, a) if flip else (a, b), (b2, a2) if flip2 else (a2, b2)
                    index[:, i, j] = pairs.index(ordered(y, x2)), pairs.index(ordered(x, y2))
                    weight[i, j] = not ((flip and a == b) or (flip2 and a2 == b2))
            if weight.any():
                products.append((index[0], index[1], weight))
    return at, twice, products


def of_levels(pulled: list[Array], first: First, moments: AnyMoments, own: list) -> tuple[Array, Array]:
    """What ``B_i Psi B_i'`` gives: gradient ``(J, B)``, and ``sum_i tr(N E_j (2 F Q F' - N) E_l) (J, J, B)``."""
    sandwich, count = _sandwich(first.F, _pairs_to_matrix(pulled)), moments.count
    FQF, N = (jnp.stack([entries[pair] for pair in first.N]) for entries in (sandwich, first.N))
    N_and_Y = (N[:, None] * (2.0 * FQF - count * N)).sum(2)
    at, twice, products = _first_directions(tuple(own), tuple(first.N))
    moved = sum_of(N_and_Y[row, column] * jnp.asarray(weight, N.dtype)[..., None] for row, column, weight in products)
    return twice[:, None] * (count * N - FQF).sum(1)[at], moved


# --- entries --------------------------------------------------------------------------------------------------------


@cache
def _square(q: int) -> tuple[tuple[int, int], ...]:
    return tuple((a, b) for a in range(q) for b in range(q))


def ordered(a: int, b: int) -> tuple[int, int]:
    return (a, b) if a <= b else (b, a)


def orders_of(a: int, b: int) -> tuple[tuple[int, int], ...]:
    return ((a, b),) if a == b else ((a, b), (b, a))


def sum_of(terms) -> Array:
    return reduce(lambda x, y: x + y, terms)


def dot(products) -> Array:
    """Sum of products, leaving out the entries that are known to be zero."""
    return sum_of(a * b for a, b in products if a is not None and b is not None)
