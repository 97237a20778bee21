"""Linear algebra of many tiny matrices, with derivative rules of its own.

Stacks of small matrices keep the matrix axes in front, ``(q, q, m)``: each entry is one long vector over the ``m``
levels of a grouping factor, so the arithmetic is a few vector operations instead of ``m`` calls of LAPACK. A plain
matrix ``(n, n)`` goes to LAPACK.

The derivative rules say what calculus says (Petersen & Pedersen 2012, The Matrix Cookbook, eqs. 43, 59), so automatic
differentiation never works through a factorisation. They are written with differentiable functions and can be
differentiated again.

NumPy's arrays are worked on by NumPy and LAPACK, JAX's by JAX (:mod:`mixjax.machine`).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from jax.custom_derivatives import SymbolicZero

from mixjax.machine import Array, namespace, set_at

# How one symmetric matrix is inverted: up to the first size by elimination that is written out, up to the second by a
# loop, up to the third by LAPACK, beyond it by halves. LAPACK takes a third of the time for one matrix of 100 rows, but
# programs that vmap makes of several calls of it wait for each other, some for ever.
UNROLLED, BY_ELIMINATION, BY_HALVES = 4, 128, 1024
# Matrices of many lanes up to this size are eliminated in a program that is written out; its compile time grows with
# the square of the size.
WRITTEN_OUT_LANES = 12
# Longest sum over lanes that is written out term by term.
WRITTEN_OUT = 128
# NumPy's stacks of matrices up to this size are worked on entry by entry, larger ones matrix by matrix.
STACKED_UP_TO = 6
# Stacks up to this size are inverted by elimination over lanes, larger ones by LAPACK, one by one.
STACK_ELIMINATED_UP_TO = 12
# Matrices from this size on are inverted where they stand, since new memory, and the threads that a product wakes, cost
# more than the work they save; rows of a piece of them that stays in the cache.
IN_PLACE, PIECE = 96, 128
# Multiplications of a product from which BLAS uses threads.
OWN_THREADS = 2**13


def transpose(A: Array) -> Array:
    """Swap the two matrix axes of ``(i, j, ...)``."""
    return A.swapaxes(0, 1)


def eye(q: int, like: Array) -> Array:
    """The identity ``(q, q, 1, ...)``, with as many axes and of the kind of a stack ``(q, q, ...)``."""
    xp = namespace(like)
    one = _numpys_eye(q, like.dtype) if xp is np else xp.eye(q, dtype=like.dtype)
    return one.reshape(q, q, *(1,) * (like.ndim - 2))


@cache
def _numpys_eye(q: int, dtype: np.dtype[Any]) -> np.ndarray:
    one = np.eye(q, dtype=dtype)
    one.flags.writeable = False
    return one


def matmul(A: Array, B: Array) -> Array:
    """Product of ``(i, j, ...)`` and ``(j, k, ...)``; trailing axes broadcast.

    Stacks are multiplied as a sum of broadcast products: batched products of tiny matrices are 10-50 times slower.
    """
    if A.ndim == 2 and B.ndim == 2:
        return A @ B
    if A.ndim != B.ndim:
        A, B = _align(A, B)
    inner = A.shape[1]
    xp = namespace(A, B)
    if not (A.size and B.size):
        return xp.zeros((A.shape[0], B.shape[1], *np.broadcast_shapes(A.shape[2:], B.shape[2:])), A.dtype)
    if xp is np:
        return _numpys_matmul(A, B)
    # One stack that stands alone is a plain matrix; beyond small sizes written-out sums would be long programs.
    if (inner > WRITTEN_OUT or B.shape[-1] == 1) and math.prod(A.shape[2:]) == 1:
        return (A.reshape(A.shape[:2]) @ B.reshape(inner, -1)).reshape(A.shape[0], *B.shape[1:])
    if inner > WRITTEN_OUT and math.prod(B.shape[2:]) == 1:
        return jnp.moveaxis(jnp.tensordot(A, B.reshape(B.shape[:2]), ((1,), (0,))), -1, 1)
    return _sum_of_products(A, B)


def _sum_of_products(A: Array, B: Array) -> Array:
    return sum((A[:, None, j] * B[None, j] for j in range(1, A.shape[1])), A[:, None, 0] * B[None, 0])


def product(A: Array, B: Array) -> Array:
    """``A @ B`` of plain matrices.

    NumPy's large ones by the BLAS of SciPy's LAPACK: NumPy has one of its own, and the threads of the one that waits
    take the cores from the other.
    """
    if namespace(A, B) is not np or A.size * B.shape[1] < OWN_THREADS or A.dtype != B.dtype or A.dtype.char not in "fd":
        return A @ B
    # B'A' in LAPACK's order of memory.
    sides, turned = zip(*((x, 1) if x.flags.f_contiguous else (x.T, 0) for x in (B, A)), strict=True)
    found: Array = _gemm(A.dtype.char)(1.0, *sides, trans_a=turned[0], trans_b=turned[1]).T
    return found


@cache
def _gemm(char: str) -> Any:
    return scipy.linalg.get_blas_funcs("gemm", dtype=np.dtype(char))


def _numpys_matmul(A: np.ndarray, B: np.ndarray) -> Array:
    """BLAS sees matrices only, no lanes: what it makes of a column depends on how many there are."""
    (a, i), (b, k) = A.shape[:2], B.shape[:2]
    alone_A, alone_B = A.size == a * i, B.size == b * k
    if alone_A and (alone_B or B.shape[-1] == 1):
        return product(A.reshape(a, i), B.reshape(b, -1)).reshape(a, *B.shape[1:])
    if alone_B and A.shape[-1] == 1:
        return np.matmul(B.reshape(i, k).T, A.reshape(a, i, -1)).reshape(a, k, *A.shape[2:])
    if alone_A:
        return over_first(A.reshape(A.shape[:2]).T, B)
    if A.shape[1] <= STACKED_UP_TO or alone_B:
        return _sum_of_products(A, B)
    return of_matrices(np.matmul(matrices(A), matrices(B)))


def over_first(A: Array, B: Array) -> Array:
    """``sum_k A_kt B_k...``: ``(k, t), (k, ..., lanes) -> (t, ..., lanes)``; no lane's bits depend on another."""
    if namespace(A, B) is not np:
        return jnp.tensordot(A, B, ((0,), (0,)))
    if B.shape[-1] == 1:
        return (A.T @ B.reshape(len(B), math.prod(B.shape[1:]))).reshape(A.shape[1], *B.shape[1:])
    return np.einsum("kt,kx->tx", A, B.reshape(len(B), math.prod(B.shape[1:]))).reshape(A.shape[1], *B.shape[1:])


def matrices(A: np.ndarray) -> np.ndarray:
    """``(i, j, ...) -> (..., i, j)``, each matrix in one piece."""
    return np.ascontiguousarray(A.transpose(*range(2, A.ndim), 0, 1))


def of_matrices(A: np.ndarray) -> np.ndarray:
    return A.transpose(A.ndim - 2, A.ndim - 1, *range(A.ndim - 2))


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


def _numpys_inverse_logdet(M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    n = M.shape[0]
    if math.prod(M.shape[2:]) == 1 and n > 1:
        inverse, logdet = _by_lapack(M.reshape(n, n))
        return inverse.reshape(M.shape), logdet.reshape(M.shape[2:])
    if n <= STACKED_UP_TO:
        return _written_out(M)
    if n <= STACK_ELIMINATED_UP_TO:
        return _eliminate_at_once(M)
    flat = M.reshape(n, n, -1)
    try:
        half = np.linalg.inv(np.linalg.cholesky(matrices(flat)))
        inverse, logdet = half.swapaxes(1, 2) @ half, -2.0 * np.log(np.einsum("bii->bi", half)).sum(1)
        return of_matrices(inverse).reshape(M.shape), logdet.reshape(M.shape[2:])
    except np.linalg.LinAlgError:  # at least one of them is not positive definite
        pass
    inverse, logdet = np.empty_like(flat), np.empty(flat.shape[2:], M.dtype)
    for i in range(flat.shape[2]):
        inverse[:, :, i], logdet[i] = _by_lapack(flat[:, :, i])
    return inverse.reshape(M.shape), logdet.reshape(M.shape[2:])


def _by_lapack(M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    factor, failed = _lapack(M.dtype.char)[0](M.T, lower=True)  # in LAPACK's order of memory
    if failed or not np.isfinite(factor[-1, -1]):
        return np.full_like(M, np.nan), np.full((), np.nan, M.dtype)
    logdet = 2.0 * np.log(factor.diagonal()).sum()
    return inverse_of_factor(factor), logdet


def inverse_of_factor(factor: np.ndarray) -> np.ndarray:
    """The inverse of a symmetric matrix from NumPy's lower Cholesky factor of it, which is lost."""
    _, invert, square = _lapack(factor.dtype.char)
    half = invert(factor, lower=True, overwrite_c=True)[0]
    if len(half) < IN_PLACE:
        # Not potri, which wakes the threads of BLAS for matrices of eight rows and waits longer for them than it works.
        inverse: np.ndarray = half.T @ half
        return inverse
    return mirrored(square(half, lower=True, overwrite_c=True)[0]).T


def mirrored(lower: np.ndarray) -> np.ndarray:
    """The symmetric matrix of its lower triangle, in place, piece by piece: each stays in the cache."""
    starts = range(0, len(lower), PIECE)
    for i in starts:
        for j in range(0, i, PIECE):
            lower[j : j + PIECE, i : i + PIECE] = lower[i : i + PIECE, j : j + PIECE].T
        corner = np.tril(lower[i : i + PIECE, i : i + PIECE])
        lower[i : i + PIECE, i : i + PIECE] = corner + np.tril(corner, -1).T
    return lower


def is_factored(M: np.ndarray) -> bool:
    """Whether LAPACK finds NumPy's symmetric ``M (n, n)`` positive definite."""
    factor, failed = _lapack(M.dtype.char)[0](M, lower=True)
    return not failed and bool(np.isfinite(factor[-1, -1]))


def _eliminate_at_once(M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As :func:`_eliminate`, in place."""
    diagonal = np.einsum("ii...->i...", M)
    scale = 1.0 / np.sqrt(diagonal)
    M = M * scale[:, None] * scale[None]
    logdet, least = np.log(diagonal).sum(0), np.inf
    for k in range(len(M)):
        pivot = M[k, k].copy()
        row, column = M[k] / pivot, M[:, k].copy()
        M -= column[:, None] * row[None]
        M[k], M[:, k], M[k, k] = row, -column / pivot, 1.0 / pivot
        logdet, least = logdet + np.log(pivot), np.minimum(least, pivot)
    inverse = 0.5 * (M + transpose(M)) * scale[:, None] * scale[None]
    positive = least > 0
    return np.where(positive, inverse, np.nan), np.where(positive, logdet, np.nan)


@cache
def _lapack(char: str) -> tuple[Any, Any, Any]:
    found: tuple[Any, Any, Any] = scipy.linalg.get_lapack_funcs(("potrf", "trtri", "lauum"), dtype=np.dtype(char))
    return found


def _written_out(M: Array) -> tuple[Array, Array]:
    """Gauss-Jordan elimination in place. The pivots of a positive definite matrix need no exchange of rows."""
    if isinstance(M, np.ndarray) and len(M) == 2:
        a, b, d = M[0, 0], M[0, 1], M[1, 1]
        pivot = d - b * (b / a)
        inverse = np.empty(M.shape, M.dtype)  # in that order of memory, or lanes would be summed in others
        inverse[1, 1] = 1.0 / pivot
        inverse[0, 1] = inverse[1, 0] = -(b / a) / pivot
        inverse[0, 0] = (d / a) / pivot
        return inverse, np.log(a) + np.log(pivot)
    logdet = namespace(M).zeros(M.shape[2:], M.dtype)
    for k in range(M.shape[0]):
        pivot = M[k, k]
        logdet = logdet + namespace(M).log(pivot)
        row = M[k] / pivot
        column = M[:, k]
        M = M - column[:, None] * row[None]
        M = set_at(set_at(set_at(M, k, row), (slice(None), k), -column / pivot), (k, k), 1.0 / pivot)
    return M, logdet


def symmetric_of(upper: np.ndarray, n: int) -> np.ndarray:
    """``(B, pairs)`` upper entries row by row, to symmetric ``(B, n, n)``."""
    found = np.empty((len(upper), n, n))
    a, b = np.triu_indices(n)
    found[:, a, b] = found[:, b, a] = upper
    return found


def inverse_logdet(M: Array) -> tuple[Array, Array]:
    """Inverse and log-determinant of symmetric positive definite matrices.

    Args:
        M: ``(n, n)`` or ``(q, q, m)``.

    Returns:
        ``(n, n), ()`` or ``(q, q, m), (m,)``. Not positive definite gives NaN.
    """
    return _numpys_inverse_logdet(M) if namespace(M) is np else _inverse_logdet(M)


@jax.custom_jvp
def _inverse_logdet(M: Array) -> tuple[Array, Array]:
    if M.ndim == 2 and M.shape[0] > BY_HALVES:
        return _inverse_by_halves(M)
    if M.ndim == 2 and M.shape[0] > BY_ELIMINATION:
        factor = jnp.linalg.cholesky(M)
        inverse = jax.scipy.linalg.cho_solve((factor, True), jnp.eye(M.shape[0], dtype=M.dtype))
        return inverse, 2.0 * jnp.log(jnp.diagonal(factor)).sum()
    if M.ndim == 2 and M.shape[0] > UNROLLED:
        inverse, logdet, positive = _eliminate(M)
        return jnp.where(positive, inverse, jnp.nan), jnp.where(positive, logdet, jnp.nan)
    if M.ndim == 2:
        inverse, logdet = inverse_logdet(M[..., None])
        return inverse[..., 0], logdet[0]
    if M.shape[2:] == (1,) and M.shape[0] > UNROLLED:
        inverse, logdet = inverse_logdet(M[..., 0])
        return inverse[..., None], logdet[None]
    if M.shape[0] > WRITTEN_OUT_LANES:
        inverse, logdet, positive = _eliminate(M)
        return jnp.where(positive, inverse, jnp.nan), jnp.where(positive, logdet, jnp.nan)
    return _written_out(M)


def _eliminate(M: Array) -> tuple[Array, Array, Array]:
    """Inverse, log-determinant, and whether all pivots are positive, of symmetric ``M (n, n)`` or ``(n, n, m)``.

    Gauss-Jordan elimination of the matrix scaled to a unit diagonal, one pivot after the other, in a small program.
    """
    n = M.shape[0]
    diagonal = M[jnp.arange(n), jnp.arange(n)]
    scale = jax.lax.rsqrt(diagonal)

    def step(k: Array, carried: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        M, logdet, least = carried
        pivot = M[k, k]
        row, column = M[k] / pivot, M[:, k]
        M = M - column[:, None] * row[None]
        M = M.at[k].set(row).at[:, k].set(-column / pivot).at[k, k].set(1.0 / pivot)
        return M, logdet + jnp.log(pivot), jnp.minimum(least, pivot)

    start = (M * scale[:, None] * scale[None], jnp.log(diagonal).sum(0), jnp.full_like(diagonal[0], jnp.inf))
    inverse, logdet, least = jax.lax.fori_loop(0, n, step, start)
    return 0.5 * (inverse + transpose(inverse)) * scale[:, None] * scale[None], logdet, least > 0


def inverse_small(M: Array) -> Array:
    """As the inverse of :func:`inverse_logdet`, but where a small matrix is not positive definite it gives what it
    gives: look at :func:`is_positive` first. Not for reverse-mode differentiation."""
    if namespace(M) is np:
        try:
            return np.linalg.inv(M)
        except np.linalg.LinAlgError:
            return np.full_like(M, np.nan)
    return _eliminate(M)[0] if M.shape[0] <= BY_ELIMINATION else inverse_logdet(M)[0]


def _inverse_by_halves(M: Array) -> tuple[Array, Array]:
    """Of a large matrix: the inverse of one half, and of the Schur complement of the other.

    Half as many operations as by a Cholesky factor, and all of them products of matrices.
    """
    h = M.shape[0] // 2
    P, Q, R = M[:h, :h], M[h:, :h], M[h:, h:]
    P_inverse, logdet_P = inverse_logdet(P)
    T = Q @ P_inverse
    S_inverse, logdet_S = inverse_logdet(R - T @ Q.T)
    lower = -S_inverse @ T
    inverse = jnp.concatenate(
        [jnp.concatenate([P_inverse - T.T @ lower, lower.T], axis=1), jnp.concatenate([lower, S_inverse], axis=1)]
    )
    return inverse, logdet_P + logdet_S


@_inverse_logdet.defjvp
def _inverse_logdet_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Any, Any]:
    (M,), (dM,) = primals, tangents
    inverse, logdet = inverse_logdet(M)
    return (inverse, logdet), (-matmul(matmul(inverse, dM), inverse), trace_of_product(inverse, dM))


def _numpys_solve_logdet(M: np.ndarray, R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    factor, failed = _lapack(M.dtype.char)[0](M, lower=True)
    if failed:
        return np.full_like(R, np.nan), M.dtype.type(np.nan)
    return scipy.linalg.cho_solve((factor, True), R, check_finite=False), 2.0 * np.log(factor.diagonal()).sum()


def solve_logdet(M: Array, R: Array) -> tuple[Array, Array]:
    """``M^{-1} R`` and the log-determinant of one large symmetric positive definite ``M (n, n)``, ``R (n, r)``.

    A third of the cost of the inverse, which only derivatives need. Not positive definite gives NaN.
    """
    return (_numpys_solve_logdet if namespace(M, R) is np else _solve_logdet)(M, R)


@jax.custom_jvp
def _solve_logdet(M: Array, R: Array) -> tuple[Array, Array]:
    factor = jnp.linalg.cholesky(M)
    return jax.scipy.linalg.cho_solve((factor, True), R), 2.0 * jnp.log(jnp.diagonal(factor)).sum()


@_solve_logdet.defjvp
def _solve_logdet_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Any, Any]:
    (M, R), (dM, dR) = primals, tangents
    inverse, logdet = inverse_logdet(M)
    X = inverse @ R
    return (X, logdet), (inverse @ (dR - dM @ X), trace_of_product(inverse, dM))


def solve_spd(M: Array, R: Array) -> Array:
    """``M^{-1} R`` for one symmetric positive definite ``M`` (n, n) and ``R`` (n, r)."""
    return solve_logdet(M, R)[0] if namespace(M, R) is np else _solve_spd(M, R)


@jax.custom_jvp
def _solve_spd(M: Array, R: Array) -> Array:
    return inverse_logdet(M)[0] @ R


@_solve_spd.defjvp
def _solve_spd_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Any, Any]:
    (M, R), (dM, dR) = primals, tangents
    X = solve_spd(M, R)
    return X, inverse_logdet(M)[0] @ (dR - dM @ X)


def quadratic_form(M: Array, R: Array) -> Array:
    """``R' M^{-1} R`` for one symmetric positive definite ``M`` (n, n) and ``R`` (n, r).

    Its derivative needs only ``X = M^{-1} R``: ``dR' X + X' dR - X' dM X``.
    """
    return R.T @ solve_spd(M, R) if namespace(M, R) is np else _quadratic_form(M, R)


@jax.custom_jvp
def _quadratic_form(M: Array, R: Array) -> Array:
    return R.T @ solve_spd(M, R)


@_quadratic_form.defjvp
def _quadratic_form_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Any, Any]:
    (M, R), (dM, dR) = primals, tangents
    X = solve_spd(M, R)
    mixed = dR.T @ X
    return R.T @ X, mixed + mixed.T - X.T @ dM @ X


def gain(Lambda: Array, A: Array) -> tuple[Array, Array]:
    """Gain and log-determinant of eliminating the random effects of every level of one factor.

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
    found: tuple[Array, Array] = (_gain_of if namespace(Lambda, A) is np else _gain)(Lambda, A)
    return found


def _gain_of(Lambda: Array, A: Array) -> tuple[Array, Array]:
    L = Lambda[..., None]
    if Lambda.shape[0] == 1:
        M = 1.0 + L * A * L
        return L * L / M, namespace(M).log(M[0, 0])
    M = eye(Lambda.shape[0], A) + matmul(matmul(transpose(L), A), L)
    inverse, logdet = inverse_logdet(M)
    return matmul(matmul(L, inverse), transpose(L)), logdet


_gain = jax.custom_jvp(_gain_of)


def _gain_jvp(primals: tuple[Array, ...], tangents: tuple[Array, ...]) -> tuple[Any, Any]:
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
