"""Linear algebra of many tiny matrices, with derivative rules of its own.

Stacks of small matrices keep the matrix axes in front, ``(q, q, m)``: each entry is one long vector over the ``m``
levels of a grouping factor, so the arithmetic is a few vector operations instead of ``m`` calls of LAPACK. A plain
matrix ``(n, n)`` goes to LAPACK.

The derivative rules say what calculus says (Petersen & Pedersen 2012, The Matrix Cookbook, eqs. 43, 59), so automatic
differentiation never works through a factorisation. They are written with differentiable functions and can be
differentiated again.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero


def transpose(A: Array) -> Array:
    """Swap the two matrix axes of ``(i, j, ...)``."""
    return jnp.swapaxes(A, 0, 1)


def matmul(A: Array, B: Array) -> Array:
    """Product of ``(i, j, ...)`` and ``(j, k, ...)``; trailing axes broadcast.

    Stacks are multiplied as a sum of broadcast products: batched products of tiny matrices are 10-50 times slower.
    """
    if A.ndim == 2 and B.ndim == 2:
        return A @ B
    A, B = _align(A, B)
    return sum((A[:, None, j] * B[None, j] for j in range(1, A.shape[1])), A[:, None, 0] * B[None, 0])


def _align(A: Array, B: Array) -> tuple[Array, Array]:
    """Give a plain matrix the trailing axes of the stack that it meets."""
    ndim = max(A.ndim, B.ndim)
    A = A.reshape(A.shape + (1,) * (ndim - A.ndim))
    B = B.reshape(B.shape + (1,) * (ndim - B.ndim))
    return A, B


def trace_of_product(A: Array, B: Array) -> Array:
    """``tr(A B)`` of ``(i, j, ...)`` and ``(j, i, ...)``."""
    A, B = _align(A, transpose(B))
    return (A * B).sum((0, 1))


@jax.custom_jvp
def inverse_logdet(M: Array) -> tuple[Array, Array]:
    """Inverse and log-determinant of symmetric positive definite matrices.

    Args:
        M: ``(n, n)`` or ``(q, q, m)``.

    Returns:
        ``(n, n), ()`` or ``(q, q, m), (m,)``. Not positive definite gives NaN.
    """
    if M.ndim == 2:
        factor = jnp.linalg.cholesky(M)
        inverse = jax.scipy.linalg.cho_solve((factor, True), jnp.eye(M.shape[0], dtype=M.dtype))
        return inverse, 2.0 * jnp.log(jnp.diagonal(factor)).sum()
    # Gauss-Jordan elimination in place. The pivots of a positive definite matrix need no exchange of rows.
    logdet = jnp.zeros(M.shape[2:], M.dtype)
    for k in range(M.shape[0]):
        pivot = M[k, k]
        logdet = logdet + jnp.log(pivot)
        row = M[k] / pivot
        column = M[:, k]
        M = M - column[:, None] * row[None]
        M = M.at[k].set(row).at[:, k].set(-column / pivot).at[k, k].set(1.0 / pivot)
    return M, logdet


@inverse_logdet.defjvp
def _inverse_logdet_jvp(primals, tangents):
    (M,), (dM,) = primals, tangents
    inverse, logdet = inverse_logdet(M)
    return (inverse, logdet), (-matmul(matmul(inverse, dM), inverse), trace_of_product(inverse, dM))


@jax.custom_jvp
def solve_spd(M: Array, R: Array) -> Array:
    """``M^{-1} R`` for one symmetric positive definite ``M`` (n, n) and ``R`` (n, r)."""
    return inverse_logdet(M)[0] @ R


@solve_spd.defjvp
def _solve_spd_jvp(primals, tangents):
    (M, R), (dM, dR) = primals, tangents
    X = solve_spd(M, R)
    return X, inverse_logdet(M)[0] @ (dR - dM @ X)


@jax.custom_jvp
def quadratic_form(M: Array, R: Array) -> Array:
    """``R' M^{-1} R`` for one symmetric positive definite ``M`` (n, n) and ``R`` (n, r).

    Its derivative needs only ``X = M^{-1} R``: ``dR' X + X' dR - X' dM X``.
    """
    return R.T @ solve_spd(M, R)


@quadratic_form.defjvp
def _quadratic_form_jvp(primals, tangents):
    (M, R), (dM, dR) = primals, tangents
    X = solve_spd(M, R)
    mixed = dR.T @ X
    return R.T @ X, mixed + mixed.T - X.T @ dM @ X


def gain(Lambda: Array, A: Array) -> tuple[Array, Array]:
    """What eliminating the random effects of every level of one factor takes.

    With ``D = Lambda Lambda'`` (relative covariance of a level's effects) and ``A_i = Z_i' W Z_i``,

        ``K_i = D (I + A_i D)^{-1} = Lambda (I + Lambda' A_i Lambda)^{-1} Lambda'``

    is the relative conditional covariance of level i's effects, and ``C - B_i' K_i B_i`` is what remains of any other
    cross-product ``C``. At a singular Lambda nothing special happens.

    Args:
        Lambda: ``(q, q)``, any factor of D.
        A: ``(q, q, m)``.

    Returns:
        ``K (q, q, m)`` and ``log det(I + A_i D) (m,)``.

    Derivatives: ``dK = F' dD F - K dA K`` and ``d log det = tr(N dD) + tr(K dA)`` with ``F = I - A K``,
    ``N = A - A K A``.
    """
    return _gain(Lambda, A)


@jax.custom_jvp
def _gain(Lambda, A):
    L = Lambda[..., None]
    if Lambda.shape[0] == 1:
        M = 1.0 + L * A * L
        return L * L / M, jnp.log(M[0, 0])
    M = jnp.eye(Lambda.shape[0], dtype=A.dtype)[..., None] + matmul(matmul(transpose(L), A), L)
    inverse, logdet = inverse_logdet(M)
    return matmul(matmul(L, inverse), transpose(L)), logdet


def _gain_jvp(primals, tangents):
    (Lambda, A), (dLambda, dA) = primals, tangents
    K, logdet = _gain(Lambda, A)
    dK, dlogdet = jnp.zeros_like(K), jnp.zeros_like(logdet)
    AK = matmul(A, K)
    if not isinstance(dLambda, SymbolicZero):
        half = dLambda @ Lambda.T
        dD = half + half.T
        F = jnp.eye(Lambda.shape[0], dtype=A.dtype)[..., None] - AK
        dK = dK + matmul(matmul(transpose(F), dD), F)
        dlogdet = dlogdet + trace_of_product(A - matmul(AK, A), dD)
    if not isinstance(dA, SymbolicZero):
        dK = dK - matmul(matmul(K, dA), K)
        dlogdet = dlogdet + trace_of_product(K, dA)
    return (K, logdet), (dK, dlogdet)


_gain.defjvp(_gain_jvp, symbolic_zeros=True)


def lower_factor(F: Array, rtol: Array | float) -> Array:
    """The lower-triangular ``L`` with non-negative diagonal and ``L L' = F F'``, for F of any rank.

    Row j of F that lies, up to ``rtol`` times its length, in the span of the rows above it gives a zero column j:
    the semidefinite Cholesky factor, zero columns where the rank ends.

    Args:
        F: ``(q, r)``.

    Returns:
        ``(q, q)``.
    """
    columns = []
    rest = F
    for j in range(F.shape[0]):
        row = rest[j]
        square = row @ row
        independent = square > rtol**2 * (F[j] @ F[j])
        length = jnp.sqrt(jnp.where(independent, square, 1.0))
        unit = jnp.where(independent, row / length, 0.0)
        column = rest @ unit
        columns.append(jnp.where(jnp.arange(F.shape[0]) >= j, column, 0.0))
        rest = rest - jnp.outer(column, unit)
    return jnp.stack(columns, axis=1)
