"""Factors, eigenvalues and singular values of stacks of tiny matrices ``(q, q, m)``; see :mod:`mixjax.linalg`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.linalg import is_factored, matrices, of_matrices
from mixjax.machine import Array, fori_loop, namespace, set_at, stack

# Matrices by their entries (i, j), each a vector over the stack.
_Entries = dict[tuple[int, int], Array]

# Up to this size matrices are diagonalised by rotations on whole vectors, beyond it one by one by LAPACK. Programs that
# run in several threads must stay below: XLA's LAPACK calls wait for the pool of threads that they themselves occupy.
ROTATIONS_UP_TO = 6


def lower_factor(F: Array, rtol: Array | float) -> Array:
    """The lower-triangular ``L`` with non-negative diagonal and ``L L' = F F'``, for F of any rank.

    Row j of F that lies, up to ``rtol`` times its length, in the span of the rows above it gives a zero column j:
    the semidefinite Cholesky factor, zero columns where the rank ends.

    Args:
        F: ``(q, r, ...)``. rtol: a number, or one for each of the trailing axes.

    Returns:
        ``(q, q, ...)``.
    """
    xp = namespace(F, rtol)
    q = F.shape[0]
    columns = []
    rest = F
    lengths = (F * F).sum(1)
    for j in range(q):
        row = rest[j]
        square = (row * row).sum(0)
        independent = square > rtol**2 * lengths[j]
        length = xp.sqrt(xp.where(independent, square, 1.0))
        unit = xp.where(independent, row / length, 0.0)
        column = (rest * unit).sum(1)
        columns.append(set_at(column, slice(j), 0.0))
        if j + 1 < q:
            rest = rest - column[:, None] * unit
    return stack(columns).swapaxes(0, 1)


def eigh(H: Array) -> tuple[Array, Array]:
    """Eigenvalues ``(k, m)``, ascending, and eigenvectors ``(k, k, m)`` of symmetric ``H (k, k, m)``.

    Cyclic Jacobi rotations (Golub & Van Loan 2013, Matrix Computations, section 8.5) for k <= 6. NaN where H is not
    finite. Not for differentiation.
    """
    k = H.shape[0]
    if k == 1:
        return H[0], namespace(H).ones_like(H)
    if namespace(H) is np:
        return _numpys_eigh(H)
    if k > ROTATIONS_UP_TO:
        finite = jnp.isfinite(H).all((0, 1))
        values, vectors = jnp.linalg.eigh(jnp.moveaxis(jnp.where(finite, H, jnp.eye(k)[..., None]), -1, 0))
        values, vectors = jnp.moveaxis(values, 0, -1), jnp.moveaxis(vectors, 0, -1)
        return jnp.where(finite, values, jnp.nan), jnp.where(finite, vectors, jnp.nan)

    def sweep(_: Any, entries: tuple[_Entries, _Entries]) -> tuple[_Entries, _Entries]:
        H, V = entries
        for i in range(k):
            for j in range(i + 1, k):
                H, V = _rotate(H, V, i, j)
        return H, V

    upper = {(i, j): H[i, j] for i in range(k) for j in range(i, k)}
    zero, one = jnp.zeros_like(H[0, 0]), jnp.ones_like(H[0, 0])
    V = {(i, j): one if i == j else zero for i in range(k) for j in range(k)}
    upper, V = sweep(0, (upper, V)) if k == 2 else jax.lax.fori_loop(0, 5 if k == 3 else 7, sweep, (upper, V))
    values = [upper[i, i] for i in range(k)]
    vectors = [[V[i, j] for i in range(k)] for j in range(k)]
    for end in range(k - 1, 0, -1):  # a sorting network
        for j in range(end):
            swap = values[j] > values[j + 1]
            values[j], values[j + 1] = _exchange(swap, values[j], values[j + 1])
            pairs = [_exchange(swap, a, b) for a, b in zip(vectors[j], vectors[j + 1], strict=True)]
            vectors[j], vectors[j + 1] = ([pair[side] for pair in pairs] for side in (0, 1))
    return jnp.stack(values), jnp.stack([jnp.stack(column) for column in vectors], axis=1)


def _numpys_eigh(H: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    finite = np.isfinite(H.sum((0, 1)))
    values, vectors = np.linalg.eigh(matrices(H if finite.all() else np.where(finite, H, 0.0)))
    values, vectors = values.transpose(values.ndim - 1, *range(values.ndim - 1)), of_matrices(vectors)
    if finite.all():
        return values, vectors
    return np.where(finite, values, np.nan), np.where(finite, vectors, np.nan)


def _rotate(H: _Entries, V: _Entries, i: int, j: int) -> tuple[_Entries, _Entries]:
    """One Jacobi rotation that zeroes entry (i, j) of H, given by its upper entries; V collects the rotations."""
    k = 1 + max(a for a, _ in H)
    zero = H[i, j] == 0
    cot = 0.5 * (H[j, j] - H[i, i]) / jnp.where(zero, 1.0, H[i, j])
    t = jnp.where(zero, 0.0, jnp.where(cot < 0, -1.0, 1.0) / (jnp.abs(cot) + jnp.sqrt(1.0 + cot * cot)))
    c = jax.lax.rsqrt(1.0 + t * t)
    s = t * c
    new = dict(H)
    new[i, i] = H[i, i] - t * H[i, j]
    new[j, j] = H[j, j] + t * H[i, j]
    new[i, j] = jnp.zeros_like(H[i, j])
    for r in range(k):
        if r not in (i, j):
            ri, rj = (min(r, i), max(r, i)), (min(r, j), max(r, j))
            new[ri], new[rj] = c * H[ri] - s * H[rj], s * H[ri] + c * H[rj]
    turned = dict(V)
    for r in range(k):
        turned[r, i], turned[r, j] = c * V[r, i] - s * V[r, j], s * V[r, i] + c * V[r, j]
    return new, turned


def _exchange(swap: Array, a: Array, b: Array) -> tuple[Array, Array]:
    xp = namespace(swap)
    if xp is np and not swap.any():
        return a, b
    return xp.where(swap, b, a), xp.where(swap, a, b)


def is_positive(H: Array) -> Array:
    """Which of the symmetric ``H (k, k, m)`` are positive definite: ``(m,)``, by the pivots of Gaussian elimination."""
    xp = namespace(H)
    if xp is np and len(H) > 1 and H.shape[2:] == (1,):
        return np.array([is_factored(H[:, :, 0])])
    positive = xp.ones(H.shape[2:], bool)
    while H.shape[0]:
        pivot = H[0, 0]
        positive = positive & (pivot > 0)
        H = H[1:, 1:] - H[1:, :1] * (H[:1, 1:] / xp.where(pivot > 0, pivot, 1.0))
    return positive


def orthogonal_columns(F: Array) -> tuple[Array, Array]:
    """``F V = U S`` for the orthogonal V of the singular value decomposition, and the singular values, descending.

    One-sided Jacobi rotations, which keep small singular values to their own relative accuracy (Golub & Van Loan 2013,
    section 8.6), up to q = 6.

    Args:
        F: ``(q, q, m)``.

    Returns:
        ``(q, q, m)`` and ``(q, m)``.
    """
    q, xp = F.shape[0], namespace(F)
    if q > ROTATIONS_UP_TO and xp is not np:
        finite = jnp.isfinite(F).all((0, 1))
        U, S, _ = jnp.linalg.svd(jnp.moveaxis(jnp.where(finite, F, 0.0), -1, 0))
        return jnp.moveaxis(U * S[:, None], 0, -1), jnp.moveaxis(S, 0, -1)

    def sweep(_: Any, columns: Sequence[Array]) -> tuple[Array, ...]:
        columns = list(columns)
        for i in range(q):
            for j in range(i + 1, q):
                a, b = columns[i], columns[j]
                inner, aa, bb = (a * b).sum(0), (a * a).sum(0), (b * b).sum(0)
                if xp is np and (abs(inner) <= np.finfo(F.dtype).eps * np.sqrt(aa * bb)).all():
                    continue
                zero = inner == 0
                cot = 0.5 * (bb - aa) / xp.where(zero, 1.0, inner)
                t = xp.where(zero, 0.0, xp.where(cot < 0, -1.0, 1.0) / (abs(cot) + xp.sqrt(1.0 + cot * cot)))
                c = 1.0 / xp.sqrt(1.0 + t * t)
                columns[i], columns[j] = c * a - t * c * b, t * c * a + c * b
        return tuple(columns)

    start = tuple(F[:, j] for j in range(q))
    sweeps = min(q - 1, 1) if q < 3 else 6 if q == 3 else 8 if q <= ROTATIONS_UP_TO else 12
    columns = list(sweep(0, start) if sweeps == 1 else fori_loop(sweeps, sweep, start, xp))
    values = [xp.sqrt((column * column).sum(0)) for column in columns]
    for end in range(q - 1, 0, -1):
        for j in range(end):
            swap = values[j] < values[j + 1]
            values[j], values[j + 1] = _exchange(swap, values[j], values[j + 1])
            columns[j], columns[j + 1] = _exchange(swap, columns[j], columns[j + 1])
    return xp.stack(columns, axis=1), xp.stack(values)
