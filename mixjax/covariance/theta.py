"""theta: the lower triangle of the relative Cholesky factor of a term, column by column, as in lme4.

``D = Lambda Lambda'`` is relative to sigma^2, ``Sigma = sigma^2 D`` absolute. Users see theta with a non-negative
diagonal, whatever the structure of D.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import numpy as np
from numpy.typing import DTypeLike

from mixjax.machine import Array, namespace, stack

# Limits of the standard deviation ratios that a start may have, in the basis of Z. Zero would be a stationary point.
LOWEST, HIGHEST = 0.1, 100.0


def rank_tolerance(dtype: DTypeLike) -> float:
    """A row of a factor of the covariance that lies in the span of the rows above it up to this part of its length
    counts as dependent: 1e-8 in float64, 1e-4 in float32. The correlation is then 1 to twice as many digits."""
    return 1e-8 if np.finfo(dtype).bits == 64 else 1e-4


def n_theta(q: int) -> int:
    """Length of theta for one term of q effects."""
    return q * (q + 1) // 2


@cache
def triangle(q: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every entry of theta: the lower triangle, column by column."""
    # 32-bit: with 64-bit indices JAX's indexing fails outside the float64 scope.
    columns, rows = np.triu_indices(q)
    return rows.astype(np.int32), columns.astype(np.int32)


@cache
def diagonal_positions(q: int) -> np.ndarray:
    """Where in theta the diagonal of Lambda stands."""
    rows, columns = triangle(q)
    return np.flatnonzero(rows == columns).astype(np.int32)


def entries_of_theta(theta: Array, q: int) -> list[list[Array | None]]:
    """The entries of ``Lambda (q, q)``, None above the diagonal."""
    entries: list[list[Array | None]] = [[None] * q for _ in range(q)]
    for i, (row, column) in enumerate(zip(*triangle(q), strict=True)):
        entries[row][column] = theta[i]
    return entries


def lambda_of_theta(theta: Array, q: int) -> Array:
    """``Lambda (q, q, ...)``, lower triangular, from ``theta (q (q + 1) / 2, ...)``."""
    return stack_of(entries_of_theta(theta, q))


def theta_of_lambda(Lambda: Array, q: int) -> Array:
    """``theta (q (q + 1) / 2, ...)`` from a lower-triangular ``Lambda (q, q, ...)``; numpy in, numpy out."""
    rows, columns = triangle(q)
    if isinstance(Lambda, np.ndarray):
        return Lambda[rows, columns]
    xp = namespace(Lambda)
    return xp.stack([Lambda[int(row), int(column)] for row, column in zip(rows, columns, strict=True)])


def theta_of_lambdas(lambdas: list[Array]) -> Array:
    """theta of all terms from the lower-triangular Lambda of each."""
    return namespace(*lambdas).concatenate([theta_of_lambda(Lambda, Lambda.shape[0]) for Lambda in lambdas])


def split_theta(theta: Array, qs: tuple[int, ...]) -> list[Array]:
    """theta of every term, from theta of all; the terms have ``qs`` effects."""
    return cut_by_sizes(
        theta, [n_theta(q) for q in qs], lambda: f"theta has shape {np.shape(theta)}; terms with {qs} effects need"
    )


def lambdas_of_theta(theta: Array, qs: tuple[int, ...]) -> list[Array]:
    """``Lambda`` of every term, from theta of all."""
    return [lambda_of_theta(part, q) for part, q in zip(split_theta(theta, qs), qs, strict=True)]


def n_effects(k: int) -> int:
    """Number of effects whose theta has k entries."""
    q = int((np.sqrt(8 * k + 1) - 1) / 2)
    if n_theta(q) != k:
        raise ValueError(f"{k} parameters are no lower triangle: 1, 3, 6, 10, ... are")
    return q


def cut_by_sizes(x: Array, sizes: list[int], wrong: Callable[[], str]) -> list[Array]:
    """The pieces of a vector; ``wrong()`` begins the message for one of another length."""
    ends = list(itertools.accumulate(sizes))
    if np.shape(x)[:1] != (sum(sizes),):
        raise ValueError(f"{wrong()} ({sum(sizes)},)")
    return [x[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def stack_of(entries: list[list[Array | None]]) -> Array:
    """A matrix ``(q, q, ...)`` from its entries ``(...)``, None for zero."""
    some = next(entry for row in entries for entry in row if entry is not None)
    if len(entries) == 1:
        return some[None, None]
    zero = namespace(some).zeros_like(some)
    flat = stack([zero if entry is None else entry for row in entries for entry in row])
    return flat.reshape(len(entries), len(entries), *flat.shape[1:])


@cache
def pairs_of(q: int) -> tuple[tuple[int, int], ...]:
    """Pairs a <= b of q effects, row by row: the order in which entries of symmetric matrices stand."""
    return tuple((a, b) for a in range(q) for b in range(a, q))
