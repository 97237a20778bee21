"""From rows to sums over rows. After this step nothing costs O(n).

Concrete arrays are summed by numpy; inside a JAX transformation the same sums are JAX operations.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse

from mixjax.bases import Basis, change_basis, change_scale, constant_column
from mixjax.covariance import structure_of
from mixjax.design import Design, check_design
from mixjax.machine import is_concrete
from mixjax.products.sizes import has_closed_form
from mixjax.products.sums import (
    ClassProducts,
    CrossProducts,
    FactorProducts,
    Layout,
    PairProducts,
    TermPlace,
    order_by_levels,
    sum_by_group,
)


def cross_products(design: Design, y: Any = None) -> CrossProducts:
    """Sums over rows of a design; the step after which the number of rows does not matter.

    Args:
        design: arrays of the model. Concrete arrays are summed by numpy in float64; inside a JAX transformation the
            same sums are JAX operations, differentiable with respect to y, X, Z, weights and offset.
        y: ``(n,)`` another response for the same design, ``(B, n)`` many, or None for ``design.y``. Missing values in
            one of many give that one the result code ``NOT_FINITE``.

    Returns:
        :class:`CrossProducts`; its floating dtype is that of the inputs. Many responses share what does not depend on
        y; theirs has a leading axis.

    Raises:
        ValueError: shapes or values do not make a model.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> term = mj.RandomTerm(Z=np.ones((12, 1)), group=np.repeat(np.arange(4), 3), n_groups=4)
        >>> design = mj.Design(y=np.arange(12.0), X=np.ones((12, 1)), terms=(term,))
        >>> float(mj.cross_products(design).n)
        12.0
    """
    if y is not None and np.ndim(y) == 2:
        return _of_many(design, y)
    if y is not None:
        design = replace(design, y=y)
    check_design(design)
    columns = _columns(design)
    residual, beta0 = _least_squares(design, columns.Q, columns.X_basis, columns.sqrt_w)
    stats = _products_of(design, columns, residual, beta0)
    return jax.tree.map(partial(_astype, dtype=_floating_dtype(design)), stats)


class _Columns(NamedTuple):
    """Columns in their bases: Q of X, one block of columns per grouping factor."""

    Q: Any
    X_basis: Basis
    Z: list[Any]
    Z_bases: tuple[Basis, ...]
    groups: list[tuple[Any, int]]
    places: tuple[TermPlace, ...]
    sqrt_w: Any


def _columns(design: Design) -> _Columns:
    sqrt_w = None if design.weights is None else _sqrt(design.weights)
    Q, X_basis = change_basis(design.X, sqrt_w, full_rank=True)
    groups, places = _grouping_factors(design)
    Zs, Z_bases = zip(
        *(_effects(term.Z, sqrt_w, place.structure.scaling) for term, place in zip(design.terms, places, strict=True)),
        strict=True,
    )
    Z = [_concatenate([Zs[t] for t, place in enumerate(places) if place.factor == f]) for f in range(len(groups))]
    return _Columns(Q, X_basis, Z, tuple(Z_bases), groups, places, sqrt_w)


def _effects(Z: Any, sqrt_w: Any, scaling: str) -> tuple[Any, Basis]:
    """Columns of a random term in the basis that its structure allows, their mean squares 1."""
    scale = float(np.sqrt(np.shape(Z)[0]))
    return change_basis(Z, sqrt_w, scale) if scaling == "any" else change_scale(Z, sqrt_w, scale, scaling == "each")


def _products_of(design: Design, columns: _Columns, residual: Any, beta0: Any) -> CrossProducts:
    Q, groups = columns.Q, columns.groups
    factors = []
    for (group, m), Z in zip(groups, columns.Z, strict=True):
        sums = sum_by_group(_products(Z, _concatenate([Z, Q, residual[:, None]])), group, m)
        q = Z.shape[1]
        factors.append(FactorProducts(sums[:, :q], sums[:, q:-1], sums[:, -1]))

    chain, dense = _elimination_order(groups)
    pairs, keys = [], []
    order = chain + dense
    for i, s in enumerate(order):
        for t in order[i + 1 :]:
            nested = s in chain and t in chain
            pairs.append(_pair_products(columns.Z[s], columns.Z[t], groups[s], groups[t], nested))
            keys.append((s, t))

    return CrossProducts(
        factors=tuple(factors),
        pairs=tuple(pairs),
        XX=Q.T @ Q,
        Xy=Q.T @ residual,
        yy=residual @ residual,
        n=np.float64(np.shape(design.X)[0]),
        sum_log_weights=0.0 if columns.sqrt_w is None else 2.0 * _log(columns.sqrt_w).sum(),
        beta0=beta0,
        X_basis=columns.X_basis,
        Z_bases=columns.Z_bases,
        layout=Layout(columns.places, tuple(chain), tuple(dense), tuple(keys)),
    )


# --- many responses ------------------------------------------------------------------------------------------------

# Numbers that one block of responses may hold, so that a few passes over it stay in the cache.
BLOCK = 2**19
# Multiplications of a product that OpenBLAS does without waking threads of its own, which ours would wait for.
ONE_THREAD = 2**18


def _of_many(design: Design, Y: Any) -> CrossProducts:
    """Products of responses ``Y (B, n)`` with one design: y's own in a leading axis, all others shared."""
    B, n = np.shape(Y)
    if n != np.shape(design.X)[0]:
        raise ValueError(f"y has shape {(B, n)}, but X has {np.shape(design.X)[0]} rows; many responses are (B, n)")
    if not all(map(is_concrete, jax.tree.leaves((design, Y)))):
        return jax.vmap(lambda y: cross_products(design, y))(Y)
    Y = np.asarray(Y)
    design = replace(design, y=np.zeros(n))
    check_design(design)
    columns = _columns(design)
    shared = _products_of(design, columns, np.zeros(n), np.zeros(columns.Q.shape[1]))
    Z_sums = [_sparse_transpose(Z, group, m) for Z, (group, m) in zip(columns.Z, columns.groups, strict=True)]
    classes = _classes(shared)
    p = columns.Q.shape[1]
    # Allocated with the responses last, as they are computed, and shown with the responses first.
    Zy = [np.empty((*f.Zy.shape, B)) for f in shared.factors]
    Xy, yy, beta0 = np.zeros((p, B)), np.empty(B), np.empty((p, B))
    if classes is not None:
        class_Uy, class_yy = np.empty((*classes.Uy_shape, B)), np.empty((*classes.yy_shape, B))

    def work(start: int) -> None:
        at = slice(start, start + size)
        rows = Y[at]
        kept = slice(0, len(rows))
        with np.errstate(invalid="ignore"):  # missing values spoil their own response only
            residual, coefficients = _least_squares_of_many(design, columns, rows, size)
            yy[at] = np.einsum("ib,ib->b", residual, residual)[kept]
        beta0[:, at] = coefficients[:, kept]
        for total, sums in zip(Zy, Z_sums, strict=True):
            total[..., at] = (sums @ residual).reshape(*total.shape[:2], size)[..., kept]
        if classes is not None:
            Uy, squares = classes.of(Zy[shared.layout.chain[0]][..., at])
            class_Uy[..., at], class_yy[..., at] = Uy, squares

    size = max(1, min(2048, 1 << max(0, (BLOCK // n).bit_length() - 1)))
    with ThreadPoolExecutor(n_cores()) as pool:
        list(pool.map(work, range(0, B, size)))
    dtype = _floating_dtype(replace(design, y=Y))

    def first(a):
        return np.moveaxis(a, -1, 0)

    stats = replace(
        shared,
        factors=tuple(f._replace(Zy=first(z)) for f, z in zip(shared.factors, Zy, strict=True)),
        Xy=first(Xy),
        yy=yy,
        beta0=first(beta0),
        classes=None if classes is None else classes.shared._replace(Uy=first(class_Uy), yy=first(class_yy)),
    )
    return jax.tree.map(partial(_astype, dtype=dtype), stats)


def n_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _sparse_transpose(Z: np.ndarray, group: Any, m: int) -> scipy.sparse.csr_matrix:
    """``(q m, n)``: its product with y is Z'y, effect by effect and level by level."""
    n, q = Z.shape
    rows = (np.arange(q) * m + np.asarray(group)[:, None]).ravel()
    columns = np.repeat(np.arange(n), q)
    return scipy.sparse.csr_matrix((Z.ravel(), (rows, columns)), shape=(q * m, n))


def _least_squares_of_many(
    design: Design, columns: _Columns, rows: np.ndarray, size: int
) -> tuple[np.ndarray, np.ndarray]:
    """Residuals ``(n, size)`` of responses ``(b, n)`` on X, and the coefficients taken out ``(p, size)``.

    As :func:`_least_squares`, but X is taken out once: what is left of it is of the order of rounding y itself, and
    counts as zero. Blocks have one size, b or more, so that the last bits do not depend on how many responses there
    are.
    """
    Q, sqrt_w, X = columns.Q, columns.sqrt_w, np.asarray(design.X)
    if design.offset is not None:
        rows = rows - np.asarray(design.offset)
    b, n = rows.shape
    constant = constant_column(X)
    level = np.zeros(size)
    if constant is not None:
        level[:b] = rows.mean(axis=1)
    y = np.empty((n, size))
    y[:, b:] = 0.0
    np.subtract(rows.T, level[:b], out=y[:, :b])
    if sqrt_w is not None:
        y *= sqrt_w[:, None]
    p = Q.shape[1]
    coefficients = np.empty((p, size))
    beta0 = np.empty((p, size))
    # A power of two, so that a response has the same place in a product whichever block of 1024 it comes with: BLAS
    # rounds the last columns of a product in another way than the others.
    step = 1 << max(0, (ONE_THREAD // max(1, n * p)).bit_length() - 1)
    for at in range(0, size, step):
        part, taken = y[:, at : at + step], coefficients[:, at : at + step]
        np.matmul(Q.T, part, out=taken)
        part -= Q @ taken
        np.matmul(columns.X_basis.R_inv, taken, out=beta0[:, at : at + step])
    if constant is not None:
        beta0[constant] += level / X[0, constant]
    return y, beta0


class _Classes(NamedTuple):
    """How the class moments of a response follow from its ``z = Z'y (q, m)`` of the first factor.

    Attributes:
        shared: what does not depend on y. sums: ``(C, m)`` indicator. linear: ``(pairs C u, q m)``.
    """

    shared: ClassProducts
    sums: scipy.sparse.csr_matrix
    linear: scipy.sparse.csr_matrix
    Uy_shape: tuple[int, int, int]

    @property
    def yy_shape(self) -> tuple[int, int]:
        return self.Uy_shape[:2]

    def of(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(pairs, C, u, B)`` and ``(pairs, C, B)`` from ``(q, m, B)``."""
        q, m, B = z.shape
        Uy = (self.linear @ z.reshape(q * m, B)).reshape(*self.Uy_shape, B)
        squares = [self.sums @ (z[a] * z[b]) * (1.0 if a == b else 2.0) for a in range(q) for b in range(a, q)]
        return Uy, np.stack(squares)


# Levels whose Z'Z agree to this many digits of its largest entry form a class.
SAME_DIGITS = 11


def _classes(stats: CrossProducts) -> _Classes | None:
    """The classes of the first factor's levels, where they are few enough to be worth their moments."""
    first, *others = stats.layout.chain + stats.layout.dense
    ZZ = np.asarray(stats.factors[first].ZZ)
    q, _, m = ZZ.shape
    rounded = np.round(ZZ.reshape(q * q, m) / max(np.abs(ZZ).max(), np.finfo(float).tiny), SAME_DIGITS)
    _, of_level = np.unique(rounded, axis=1, return_inverse=True)
    of_level = of_level.reshape(-1)
    C = int(of_level.max()) + 1
    sizes = [stats.factors[f].ZZ.shape[1:] for f in others]
    d = sum(width * levels for width, levels in sizes)
    u = d + stats.XX.shape[0]
    if C * q * u > m or not has_closed_form(stats):
        return None
    rows, values, columns = [], [], []
    U = _columns_of_first(stats, first, others, d)  # per effect: level, column, value
    pairs = [(a, b) for a in range(q) for b in range(a, q)]
    for v, (a, b) in enumerate(pairs):
        for x, y in {(a, b), (b, a)}:
            level, column, value = U[x]
            rows.append((v * C + of_level[level]) * u + column)
            columns.append(y * m + level)
            values.append(value)
    linear = scipy.sparse.csr_matrix(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(len(pairs) * C * u, q * m)
    )
    sums = scipy.sparse.csr_matrix((np.ones(m), (of_level, np.arange(m))), shape=(C, m))
    dense = np.zeros((q, m, u))
    for a, (level, column, value) in enumerate(U):
        dense[a, level, column] = value
    by_class = np.argsort(of_level, kind="stable")
    count = np.bincount(of_level)
    first_of = np.cumsum(count) - count
    r, c = np.triu_indices(u)

    def moment(a: int, b: int) -> np.ndarray:
        one = dense[a][:, r] * dense[b][:, c]
        one = one if a == b else one + dense[b][:, r] * dense[a][:, c]
        return np.add.reduceat(one[by_class], first_of, axis=0)

    UU = np.stack([moment(a, b) for a, b in pairs])
    shared = ClassProducts(ZZ[:, :, by_class[first_of]], count.astype(np.float64), UU, None, None)
    return _Classes(shared, sums, linear, (len(pairs), C, u))


def _columns_of_first(shared: CrossProducts, first: int, others: list[int], d: int) -> list[tuple[np.ndarray, ...]]:
    """Products of the first factor's effects with U, sparse: per effect arrays of levels, columns of U and values."""
    ZX = np.asarray(shared.factors[first].ZX)
    q, p, m = ZX.shape
    starts, at = {}, 0
    for f in others:
        starts[f] = at
        at += shared.factors[f].ZZ.shape[1] * shared.factors[f].ZZ.shape[2]
    entries = []
    for a in range(q):
        parts = [(np.tile(np.arange(m), p), np.repeat(d + np.arange(p), m), ZX[a].ravel())]
        for (s, t), pair in zip(shared.layout.pairs, shared.pairs, strict=True):
            if s != first:
                continue
            m_t = shared.factors[t].ZZ.shape[2]
            present = np.asarray(pair.cols) < m_t
            for effect in range(pair.ZZ.shape[1]):
                column = starts[t] + effect * m_t + pair.cols[present]
                parts.append((pair.rows[present], column, pair.ZZ[a, effect][present]))
        entries.append(tuple(np.concatenate(part) for part in zip(*parts, strict=True)))
    return entries


# --- least squares and grouping ------------------------------------------------------------------------------------


def _least_squares(design: Design, Q: Any, X_basis: Basis, sqrt_w: Any) -> tuple[Any, Any]:
    """Residual of y (weighted) on X, and the coefficients taken out."""
    y = design.y if design.offset is None else _sub(design.y, design.offset)
    concrete = is_concrete(y) and is_concrete(Q) and is_concrete(sqrt_w)
    if not concrete:
        y = y if sqrt_w is None else y * sqrt_w
        hold = jax.lax.stop_gradient
        coefficients = hold(jnp.linalg.solve(Q.T @ Q, Q.T @ y)) if Q.shape[1] else jnp.zeros(0, jnp.asarray(y).dtype)
        return y - Q @ coefficients, X_basis.R_inv @ coefficients
    y = np.asarray(y, np.float64)
    X = np.asarray(design.X)
    constant = constant_column(X)
    level = 0.0 if constant is None else y.mean()
    residual = (y - level) * (1.0 if sqrt_w is None else sqrt_w)
    coefficients = np.zeros(Q.shape[1])
    for _ in range(2):
        step = Q.T @ residual
        residual = residual - Q @ step
        coefficients += step
    beta0 = X_basis.R_inv @ coefficients
    if constant is not None:
        beta0[constant] += level / X[0, constant]
    return residual, beta0


def _grouping_factors(design: Design) -> tuple[list[tuple[Any, int]], tuple[TermPlace, ...]]:
    """The distinct grouping factors ``(group, m)`` and the place of every term."""
    groups: list[tuple[Any, int]] = []
    width: list[int] = []
    places = []
    for term in design.terms:
        q = np.shape(term.Z)[1]
        f = next((f for f, (group, m) in enumerate(groups) if m == term.n_groups and _same(group, term.group)), None)
        if f is None:
            f = len(groups)
            groups.append((term.group, term.n_groups))
            width.append(0)
        places.append(TermPlace(structure_of(term.structure, q), f, width[f]))
        width[f] += q
    return groups, tuple(places)


def _same(a: Any, b: Any) -> bool:
    return a is b or (is_concrete(a) and is_concrete(b) and np.array_equal(a, b))


def _elimination_order(groups: list[tuple[Any, int]]) -> tuple[list[int], list[int]]:
    def nested(s, t):
        (inner, m), (outer, _) = groups[s], groups[t]
        if not (is_concrete(inner) and is_concrete(outer)):
            return False
        inner, outer = np.asarray(inner), np.asarray(outer)
        parent = np.zeros(m, outer.dtype)
        parent[inner] = outer
        return bool((parent[inner] == outer).all())

    return order_by_levels([m for _, m in groups], nested)


# --- sums over rows ------------------------------------------------------------------------------------------------


def _products(A: Any, B: Any) -> Any:
    """Row-wise outer products: ``(n, i), (n, j) -> (i, j, n)``."""
    return A.T[:, None] * B.T[None]


def _pair_products(Z_s: Any, Z_t: Any, s: tuple[Any, int], t: tuple[Any, int], nested: bool) -> PairProducts:
    (group_s, m_s), (group_t, m_t) = s, t
    products = _products(Z_s, Z_t)
    if not (is_concrete(group_s) and is_concrete(group_t)):
        return PairProducts(group_s, group_t, products)  # one "pair" per row: repeated pairs add up
    group_s, group_t = np.asarray(group_s), np.asarray(group_t)
    if nested:
        parent = np.full(m_s, m_t, np.int32)  # a level without rows has no parent: out of range
        parent[group_s] = group_t
        return PairProducts(np.arange(m_s, dtype=np.int32), parent, sum_by_group(products, group_s, m_s))
    code, inverse = np.unique(group_s.astype(np.int64) * m_t + group_t, return_inverse=True)
    rows, cols = np.divmod(code, m_t)
    return PairProducts(
        rows.astype(np.int32), cols.astype(np.int32), sum_by_group(products, inverse.reshape(-1), len(code))
    )


# --- numpy for numbers, JAX inside transformations -----------------------------------------------------------------


def _floating_dtype(design: Design) -> np.dtype:
    """The widest floating dtype among the arrays; integers count as float64."""
    arrays = [design.y, design.X, *(term.Z for term in design.terms), design.weights, design.offset]
    traced = any(not is_concrete(x) for x in arrays if x is not None)
    dtypes = [x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype for x in arrays if x is not None]
    widest = np.result_type(*([d for d in dtypes if jnp.issubdtype(d, jnp.floating)] or [np.float64]))
    return jax.dtypes.canonicalize_dtype(widest) if traced else widest


def _sqrt(x: Any) -> Any:
    return np.sqrt(np.asarray(x, np.float64)) if is_concrete(x) else jnp.sqrt(x)


def _log(x: Any) -> Any:
    return np.log(x) if is_concrete(x) else jnp.log(x)


def _sub(a: Any, b: Any) -> Any:
    return np.asarray(a, np.float64) - np.asarray(b) if is_concrete(a) and is_concrete(b) else jnp.asarray(a) - b


def _concatenate(columns: list[Any]) -> Any:
    concrete = all(is_concrete(c) for c in columns)
    return (np if concrete else jnp).concatenate(columns, axis=1)


def _astype(leaf: Any, dtype: Any) -> Any:
    if not is_concrete(leaf):
        return leaf if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf.astype(dtype)
    leaf = np.asarray(leaf)
    return leaf if leaf.dtype.kind in "iu" else leaf.astype(dtype)
