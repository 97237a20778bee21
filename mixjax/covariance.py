"""From the parameters of a random term to the factor of its covariance, and back.

A term with q effects has relative covariance ``D = Lambda Lambda'`` (relative to sigma^2; absolute: ``Sigma = sigma^2
D``). Three ways of writing it down are in use:

* ``theta``: the q (q + 1) / 2 entries of the lower triangle of Lambda, column by column, as in lme4. Reported with a
  non-negative diagonal; the optimiser lets the signs run free ("signed chart"), because the criterion is even in every
  column of Lambda and a zero variance is then an ordinary stationary point.
* log-Cholesky: the same triangle with the logarithm of the diagonal. Unconstrained, good for priors and samplers; a
  singular covariance lies at minus infinity.
* ``D`` itself.
"""

from __future__ import annotations

from functools import cache

import jax.numpy as jnp
import numpy as np
from jax import Array


def n_theta(q: int) -> int:
    """Number of parameters of an unstructured covariance of q effects."""
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


def lambda_of_theta(theta: Array, q: int) -> Array:
    """``Lambda (q, q, ...)``, lower triangular, from ``theta (q (q + 1) / 2, ...)``."""
    at = {(int(row), int(column)): i for i, (row, column) in enumerate(zip(*triangle(q), strict=True))}
    zero = jnp.zeros_like(theta[0])
    rows = [[theta[at[a, b]] if (a, b) in at else zero for b in range(q)] for a in range(q)]
    return jnp.stack([jnp.stack(row) for row in rows])


def theta_of_lambda(Lambda: Array, q: int) -> Array:
    """``theta (q (q + 1) / 2, ...)`` from a lower-triangular ``Lambda (q, q, ...)``; numpy in, numpy out."""
    rows, columns = triangle(q)
    if isinstance(Lambda, np.ndarray):
        return Lambda[rows, columns]
    return jnp.stack([Lambda[int(row), int(column)] for row, column in zip(rows, columns, strict=True)])


def split(theta: Array, qs: tuple[int, ...]) -> list[Array]:
    """Cut a parameter vector into the pieces of the terms."""
    ends = np.cumsum([n_theta(q) for q in qs])
    if theta.shape[:1] != (int(ends[-1]),):
        raise ValueError(f"theta has shape {theta.shape}; terms with {qs} effects need ({int(ends[-1])},)")
    return [theta[end - n_theta(q) : end] for q, end in zip(qs, ends, strict=True)]


def lambdas_of_theta(theta: Array, qs: tuple[int, ...]) -> list[Array]:
    """``Lambda`` of every term, from the parameters of all."""
    return [lambda_of_theta(part, q) for part, q in zip(split(theta, qs), qs, strict=True)]


def log_diagonal(chol: Array, q: int) -> Array:
    """Lower triangle -> log-Cholesky; a zero on the diagonal becomes ``-inf``."""
    at = diagonal_positions(q)
    return chol.at[at].set(jnp.log(chol[at]))


def exp_diagonal(chol: Array, q: int) -> Array:
    """Log-Cholesky -> lower triangle."""
    at = diagonal_positions(q)
    return chol.at[at].set(jnp.exp(chol[at]))


def n_effects(k: int) -> int:
    """Number of effects of an unstructured covariance with k parameters."""
    q = int((np.sqrt(8 * k + 1) - 1) / 2)
    if n_theta(q) != k:
        raise ValueError(f"{k} parameters are no lower triangle: 1, 3, 6, 10, ... are")
    return q
