"""The first factor of the closed-form derivatives, level by level.

The matrices of a level are tiny. XLA has them written out: each entry is one vector over classes of levels and lanes.
NumPy has them in stacks ``(q, q, C, B)``, because there every operation costs the same up to some thousand numbers. The
formulas are the same: what differs is :func:`times` and its like. The notation is that of
:mod:`mixjax.engine.curvature`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import cache, reduce
from typing import Any, NamedTuple

import numpy as np

from mixjax import linalg
from mixjax.covariance import pairs_of, stack_of
from mixjax.engine.crossed import AnyMoments
from mixjax.machine import Array, namespace
from mixjax.products.sums import Layout


class Entries(dict[tuple[int, int], Array]):
    """Tiny matrices, each entry ``(a, b)`` a vector over classes and lanes; None for zero. Of a symmetric one the upper
    entries are enough."""

    def __missing__(self, key: tuple[int, int]) -> Array:
        return self[key[::-1]] if key[0] > key[1] else super().__missing__(key)  # type: ignore[misc]


Tiny = Any  # Entries, or a stack (q, q, C, B)

# Per factor the entries ``Lambda[a][b] (B,)``; None for zero.
Lambdas = dict[int, list[list[Any]]]

Spot = tuple[int, tuple[int, int]]  # a free entry of the covariances: factor and pair of effects


class First(NamedTuple):
    """The first factor eliminated. Entries are vectors ``(C, B)`` over classes and lanes."""

    K: Tiny
    F: Tiny
    N: Tiny
    logdet: Array


def directions_of(layout: Layout, f: int) -> list[tuple[int, int]]:
    """Pairs (a, b), a <= b, of effects of factor f whose covariance is a parameter: those within one term. Of the empty
    factor its one effect, by which nothing changes."""
    own = [place for place in layout.terms if place.factor == f]
    return [(place.start + a, place.start + b) for place in own for a, b in pairs_of(place.q)] or [(0, 0)]


def eliminate_first(Lambda: list[list[Array | None]], moments: AnyMoments) -> First:
    """Args: Lambda: entries ``(B,)``, None for zero."""
    q = len(Lambda)
    A: Any = moments.A
    L: Any
    Lt: Any
    if q == 1:
        D = dot([(Lambda[0][0], Lambda[0][0])])
        pivot = 1.0 + D * A[0, 0]
        inverse = 1.0 / pivot
        K, F, N = (_alone(part) for part in (D * inverse, inverse, A[0, 0] * inverse))
        return First(K, F, N, namespace(pivot).log(pivot))
    if namespace(A, *Lambda[0], Lambda[-1][-1]) is np:
        L = stack_of(Lambda)[:, :, None]
        Lt = linalg.transpose(L)
    else:
        A = Entries({(a, b): A[a, b] for a, b in _square(q)})
        L, Lt = (Entries({(a, b): (Lambda[b][a] if t else Lambda[a][b]) for a, b in _square(q)}) for t in (0, 1))
    M = _one_plus(times(Lt, times(A, L), True))
    inverse, logdet = _inverse(M)
    K = times(times(L, inverse), Lt, True)
    F = _one_plus(times(A, K), -1.0)
    return First(K, F, times(F, A, True), logdet)


def _alone(entry: Array) -> Tiny:
    return entry[None, None] if namespace(entry) is np else Entries({(0, 0): entry})


def size_of(A: Tiny) -> int:
    return len(A) if isinstance(A, np.ndarray) else 1 + max(b for _, b in A)


def times(A: Tiny, B: Tiny, symmetric: bool = False) -> Tiny:
    """The product of tiny matrices; upper entries only where it is known to be symmetric."""
    if isinstance(A, np.ndarray):
        return linalg.matmul(A, B)
    q = size_of(A)
    where = pairs_of(q) if symmetric else _square(q)
    return Entries({(a, b): dot((A[a, c], B[c, b]) for c in range(q)) for a, b in where})


def _one_plus(A: Tiny, sign: float = 1.0) -> Tiny:
    """``I + sign A``."""
    if isinstance(A, np.ndarray):
        return linalg.eye(len(A), A) + sign * A
    return Entries({(a, b): (1.0 if a == b else 0.0) + sign * x for (a, b), x in A.items()})


def _inverse(M: Tiny) -> tuple[Tiny, Array]:
    """Of a symmetric positive definite matrix, and its log-determinant: Gauss-Jordan elimination."""
    if isinstance(M, np.ndarray):
        return linalg.inverse_logdet(M)
    q = size_of(M)
    M = Entries({(a, b): M[a, b] for a, b in _square(q)})
    product = M[0, 0]
    for k in range(q):
        product = product * M[k, k] if k else product
        inverse = 1.0 / M[k, k]
        new = Entries({(k, k): inverse})
        for a, b in _square(q):
            if a != k and b != k:
                new[a, b] = M[a, b] - M[a, k] * M[k, b] * inverse
            elif b != k:
                new[a, b] = M[a, b] * inverse
            elif a != k:
                new[a, b] = -M[a, b] * inverse
        M = new
    return Entries({pair: M[pair] for pair in pairs_of(q)}), namespace(product).log(product)


def weights_of(first: First, own: list[tuple[int, int]] | None = None) -> list[Array] | np.ndarray:
    """Per pair of effects the entries ``(C, j, B)`` of K, and behind it of ``F'E F`` for the unit symmetric matrices E
    of the pairs ``own``."""
    own = own or []
    pairs = pairs_of(size_of(first.K))
    if isinstance(first.K, np.ndarray):
        rows, columns = _rows_columns(len(first.K))
        K: np.ndarray = first.K[rows, columns][:, :, None]
        if not own:
            return K
        a, b, off = _both(tuple(own))
        Fa, Fb = first.F[a], first.F[b]
        E = Fa[:, rows] * Fb[:, columns]  # (J, pairs, C, B)
        if off is not None:
            E = E + off * (Fb[:, rows] * Fa[:, columns])
        return np.concatenate([K, E.transpose(1, 2, 0, 3)], axis=2)
    matrices = [first.K, *(_congruence(first.F, pair) for pair in own)]
    xp = namespace(first.K[0, 0])
    return [xp.stack([matrix[pair] for matrix in matrices], axis=1) for pair in pairs]


@cache
def _both(own: tuple[tuple[int, int], ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """First and second effects of directions ``(J,)``, and 1 where they differ, ``(J, 1, 1, 1)``; None: nowhere."""
    a, b = np.array(own).T
    return a, b, (a != b)[:, None, None, None] * 1.0 if (a != b).any() else None


def _congruence(F: Entries, pair: tuple[int, int]) -> Entries:
    """``F'E F`` for the unit symmetric matrix E of a pair."""
    (a, b), pairs = pair, pairs_of(size_of(F))
    if a == b:
        return Entries({(c, d): F[a, c] * F[a, d] for c, d in pairs})
    return Entries({(c, d): F[a, c] * F[b, d] + F[b, c] * F[a, d] for c, d in pairs})


def _symmetric(pulled: list[Array] | np.ndarray) -> Tiny:
    """The matrices whose sums ``S_ab + S_ba`` are given by pair."""
    q = (math.isqrt(8 * len(pulled) + 1) - 1) // 2
    if isinstance(pulled, np.ndarray):
        return (_halves(q).astype(pulled.dtype, copy=False) * pulled)[position(q)]
    return Entries({(a, b): x if a == b else 0.5 * x for (a, b), x in zip(pairs_of(q), pulled, strict=True)})


@cache
def _halves(q: int) -> np.ndarray:
    return np.array([1.0 if a == b else 0.5 for a, b in pairs_of(q)])[:, None, None]


def upper(A: Tiny) -> Array:
    """The upper entries ``(pairs, C, B)`` of symmetric matrices, row by row."""
    if isinstance(A, np.ndarray):
        return A[_rows_columns(len(A))]
    return namespace(A[0, 0]).stack([A[pair] for pair in pairs_of(size_of(A))])


@cache
def _rows_columns(q: int) -> tuple[np.ndarray, np.ndarray]:
    rows, columns = zip(*pairs_of(q), strict=True)
    return np.array(rows), np.array(columns)


@cache
def position(q: int) -> np.ndarray:
    """Where entry (a, b) of a symmetric matrix stands among its upper entries, row by row."""
    places = np.zeros((q, q), np.int32)
    for v, (a, b) in enumerate(pairs_of(q)):
        places[a, b] = places[b, a] = v
    return places


@cache
def _first_directions(
    own: tuple[tuple[int, int], ...], pairs: tuple[tuple[int, int], ...]
) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """For directions j = (a, b): their places among the pairs; 1, or 2 for off-diagonal ones; and the products ``N Y``
    of entries that make up ``tr(N E_j Y E_l)``: index arrays ``(J, J)`` and a weight, up to four times."""
    places = np.zeros((1 + max(map(max, pairs)),) * 2, np.int32)
    for v, (row, column) in enumerate(pairs):
        places[row, column] = places[column, row] = v
    a, b = np.array(own, np.int32).reshape(-1, 2).T
    single = a == b
    products = []
    for flip in (False, True):
        for flip2 in (False, True):
            (x, y), (x2, y2) = (b, a) if flip else (a, b), (b, a) if flip2 else (a, b)
            weight = ~((flip & single)[None] | (flip2 & single)[:, None]) * 1.0
            if weight.any():
                products.append((places[y[None], x2[:, None]], places[x[None], y2[:, None]], weight))
    return places[a, b], np.where(single, 1.0, 2.0), products


def directions_and_places(
    pairs: tuple[tuple[int, int], ...],
) -> tuple[np.ndarray, np.ndarray, list[tuple[np.ndarray, np.ndarray, np.ndarray]]]:
    """:func:`_first_directions` where every pair is a direction."""
    return _first_directions(pairs, pairs)


def of_levels(
    pulled: list[Array], first: First, moments: AnyMoments, own: list[tuple[int, int]]
) -> tuple[Array, Array]:
    """Derivatives from ``B_i Psi B_i'``: gradient ``(J, B)``, and ``sum_i tr(N E_j (2 F Q F' - N) E_l) (J, J, B)``."""
    F, count = first.F, moments.count
    Ft = linalg.transpose(F) if isinstance(F, np.ndarray) else Entries({(b, a): x for (a, b), x in F.items()})
    FQF, N = upper(times(times(F, _symmetric(pulled)), Ft, True)), upper(first.N)
    N_and_Y = _sums_of_products(N, 2.0 * FQF - count * N)
    at, twice, products = _first_directions(tuple(own), pairs_of(size_of(first.N)))
    moved = sum_of(
        N_and_Y[row, column] * weight.astype(N.dtype, copy=False)[..., None] for row, column, weight in products
    )
    return twice.astype(N.dtype, copy=False)[:, None] * (count * N - FQF).sum(1)[at], moved


def _sums_of_products(X: Array, Y: Array) -> Array:
    """``sum_c X_ac Y_bc``: ``(a, C, B), (b, C, B) -> (a, b, B)``."""
    if namespace(X, Y) is np:
        return np.einsum("acl,bcl->abl", X, Y) if Y.shape[2] > 1 else (X[..., 0] @ Y[..., 0].T)[..., None]
    return (X[:, None] * Y).sum(2)


# --- entries --------------------------------------------------------------------------------------------------------


@cache
def _square(q: int) -> tuple[tuple[int, int], ...]:
    return tuple((a, b) for a in range(q) for b in range(q))


def orders_of(a: int, b: int) -> tuple[tuple[int, int], ...]:
    return ((a, b),) if a == b else ((a, b), (b, a))


def sum_of(terms: Iterable[Array]) -> Array:
    return reduce(lambda x, y: x + y, terms)


def dot(products: Iterable[tuple[Array | None, Array | None]]) -> Array:
    """Sum of products, leaving out the entries that are known to be zero."""
    return sum_of(a * b for a, b in products if a is not None and b is not None)
