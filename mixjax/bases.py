"""Well-conditioned columns: every block of columns is replaced by an orthonormal basis of its span.

Sums of squares of raw columns cancel: with 10^7 added to y, or a slope on calendar years, most digits are gone before
the likelihood sees them. An orthonormal basis loses nothing, and results are transformed back at the end.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.design import AnyArray
from mixjax.machine import is_concrete

# A column counts as dependent when what the columns before it leave of it is smaller than RANK_TOL of its centred
# length, or than what rounding of its entries alone could leave (ROUNDING of its raw length).
RANK_TOL = 1e-10
ROUNDING = 100 * np.finfo(np.float64).eps
ROUNDING_OF = {8: ROUNDING, 4: 100 * float(np.finfo(np.float32).eps)}


class Basis(NamedTuple):
    """``sqrt(w) X = Q R``: the change from X's columns to Q's, and back.

    Attributes:
        R: ``(p, p)``.
        R_inv: ``(p, p)``, so that coefficients of X are ``R_inv`` times coefficients of Q.
        logdet: ``log |det R|``.
    """

    R: AnyArray
    R_inv: AnyArray
    logdet: AnyArray


def _length(x: np.ndarray) -> float:
    """On one thread: waking those of BLAS takes longer than the sum."""
    return float(np.sqrt(np.einsum("i,i->", x, x)))


class Orthonormal(NamedTuple):
    """An orthonormal basis, of :func:`orthonormal_columns`: ``sqrt(w) X = Q R``.

    Attributes:
        Q: ``(n, p)``, zero columns where a column depends on earlier ones. R: ``(p, p)``. independent: ``(p,)``.
    """

    Q: np.ndarray
    R: np.ndarray
    independent: np.ndarray

    def of(self, kept: np.ndarray) -> Orthonormal:
        """Of the columns ``kept (p,)`` alone, among them all that are independent."""
        return self if kept.all() else Orthonormal(self.Q[:, kept], self.R[np.ix_(kept, kept)], self.independent[kept])


def orthonormal_columns(X: np.ndarray, sqrt_w: np.ndarray | None) -> Orthonormal:
    """Gram-Schmidt, twice, in the order of the columns, after exact centring when there is a constant column.

    Centring first keeps a raw cubic in calendar years: subtracting one and the same number from every row is exact, so
    the digits lost are those of the centred columns.

    Args:
        X: ``(n, p)``.
        sqrt_w: ``(n,)`` or None for ones.

    Returns:
        :class:`Orthonormal`.
    """
    X = np.asarray(X, dtype=np.float64)
    n, p = X.shape
    constant = constant_column(X)
    order = list(range(p))
    if constant is not None:
        order.remove(constant)
        order.insert(0, constant)
    found = np.empty((n, p), order="F")  # the basis, in the order in which columns are taken
    R = np.zeros((p, p))
    independent = np.zeros(p, dtype=bool)
    done: list[int] = []
    for j in order:
        column = X[:, j]
        raw_length = _length(column if sqrt_w is None else column * sqrt_w)
        if constant is not None and j != constant:
            mean = column.mean()
            column = column - mean
            R[constant, j] = mean / X[0, constant] * R[constant, constant]
        rest = column * sqrt_w if sqrt_w is not None else column.copy()
        length = _length(rest)
        basis = found[:, : len(done)]
        for _ in range(2):
            coefficients = basis.T @ rest
            rest -= basis @ coefficients
            R[done, j] += coefficients
        remainder = _length(rest)
        independent[j] = remainder > max(RANK_TOL * length, ROUNDING * raw_length)
        if independent[j]:
            R[j, j] = remainder
            found[:, len(done)] = rest / remainder
            done.append(j)
        else:
            R[j, j] = length if length > 0 else 1.0
    if done == list(range(p)):
        return Orthonormal(found, R, independent)
    Q = np.zeros((n, p), order="F")
    Q[:, done] = found[:, : len(done)]
    return Orthonormal(Q, R, independent)


def in_span(y: np.ndarray, X: np.ndarray, Q: np.ndarray, sqrt_w: np.ndarray | None) -> np.ndarray:
    """Whether each of the responses ``y (..., n)`` depends on the columns of ``X (n, p)``, as those on each other.

    Args:
        Q: ``(n, p)``, the basis of X that :func:`orthonormal_columns` gives.
    """
    w = 1.0 if sqrt_w is None else sqrt_w
    rest = y if constant_column(X) is None else y - y.mean(axis=-1, keepdims=True)
    rest = rest * w
    lengths = np.linalg.norm(rest, axis=-1), np.linalg.norm(y * w, axis=-1)
    for _ in range(2):
        rest = rest - (rest @ Q) @ Q.T
    inside: np.ndarray = np.linalg.norm(rest, axis=-1) <= np.maximum(RANK_TOL * lengths[0], ROUNDING * lengths[1])
    return inside


def constant_column(X: np.ndarray) -> int | None:
    """Index of the first column with one and the same non-zero value in every row, or None."""
    for j in range(X.shape[1]):
        if X[0, j] != 0 and (X[:, j] == X[0, j]).all():
            return j
    return None


def change_basis(
    X: Any, sqrt_w: Any, scale: float = 1.0, full_rank: bool = False, known: Orthonormal | None = None
) -> tuple[Any, Basis]:
    """``Q (n, p)`` and the :class:`Basis` with ``sqrt(w) X = Q R``; columns of Q have length ``scale``.

    Under a JAX transformation R is held constant (``stop_gradient``): any R gives the same likelihood, so derivatives
    with respect to X flow through Q alone. Columns that earlier ones determine become zero columns of Q; where
    ``full_rank`` is demanded, NaN, so that nothing computed from them looks like a result. ``known``: what
    :func:`orthonormal_columns` found of them before.
    """
    if is_concrete(X) and is_concrete(sqrt_w):
        Q, R, independent = known or orthonormal_columns(
            np.asarray(X), None if sqrt_w is None else np.asarray(sqrt_w, np.float64)
        )
        if full_rank and not independent.all():
            Q = np.full_like(Q, np.nan)
        return Q if scale == 1.0 else Q * scale, _basis(R / scale)
    weighted = X if sqrt_w is None else X * sqrt_w[:, None]
    triangle = jnp.linalg.qr(jax.lax.stop_gradient(weighted), mode="r") / scale
    diagonal = jnp.diagonal(triangle)
    tiny = jnp.abs(diagonal) <= ROUNDING_OF[triangle.dtype.itemsize] * jnp.linalg.norm(triangle, axis=0)
    triangle = triangle + jnp.diag(jnp.where(tiny, jnp.nan if full_rank else 1.0, 0.0).astype(triangle.dtype))
    inverse = jnp.linalg.inv(triangle)
    return weighted @ inverse, Basis(triangle, inverse, jnp.log(jnp.abs(jnp.diagonal(triangle))).sum())


def change_scale(Z: Any, sqrt_w: Any, scale: float, each: bool) -> tuple[Any, Basis]:
    """As :func:`change_basis`, but columns keep their directions: each gets length ``scale``, or all do on average.

    For covariances of a structure that other columns of the same span would not have.
    """
    concrete = is_concrete(Z) and is_concrete(sqrt_w)
    xp = np if concrete else jnp
    Z = xp.asarray(Z, np.float64) if concrete else Z
    weighted = Z if sqrt_w is None else Z * sqrt_w[:, None]
    squares = (weighted * weighted).sum(0) / scale**2
    basis = scale_basis(squares if concrete else jax.lax.stop_gradient(squares), each)
    return weighted / xp.diagonal(basis.R), basis


def scale_basis(squares: Any, each: bool) -> Basis:
    """Columns of these squared lengths ``(q,)`` brought to length 1, each or on average."""
    xp = np if is_concrete(squares) else jnp
    squares = squares if each else xp.broadcast_to(squares.mean(), squares.shape)
    lengths = xp.sqrt(xp.where(squares > 0, squares, 1.0))
    return Basis(xp.diag(lengths), xp.diag(1.0 / lengths), xp.log(lengths).sum())


def _basis(R: np.ndarray) -> Basis:
    return Basis(R, np.linalg.inv(R), np.linalg.slogdet(R)[1])
