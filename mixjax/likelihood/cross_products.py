"""The sums over rows that the likelihood needs. After this step nothing costs O(n).

All products are formed in the orthonormal bases of :mod:`mixjax.bases`, with y replaced by its
least-squares residual. They are additive over rows: ``a + b`` holds the rows of both.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.bases import Basis, change_basis, constant_column
from mixjax.design import AnyArray, Design, check_design, is_concrete


class FactorProducts(NamedTuple):
    """Products by level of one grouping factor with m levels and q effects (all its terms side by side).

    Attributes:
        ZZ: ``(q, q, m)``. ZX: ``(q, p, m)``. Zy: ``(q, m)``.
    """

    ZZ: AnyArray
    ZX: AnyArray
    Zy: AnyArray


class PairProducts(NamedTuple):
    """``Z_s' Z_t`` of two grouping factors, by pair of levels that occur together.

    Attributes:
        rows: ``(k,)`` levels of s. cols: ``(k,)`` levels of t. ZZ: ``(q_s, q_t, k)``. Repeated pairs add up. When s is
        nested in t, k is the number of levels of s and ``rows`` is ``0 .. k - 1``.
    """

    rows: AnyArray
    cols: AnyArray
    ZZ: AnyArray


class TermPlace(NamedTuple):
    """Where a random term lives: its q effects are effects ``start .. start + q - 1`` of grouping factor ``factor``."""

    q: int
    factor: int
    start: int


@dataclass(frozen=True)
class Layout:
    """The structure of a model: all that is static when a program is compiled.

    Attributes:
        terms: place of every random term, in the order of the Design.
        chain: factors eliminated group by group, each nested in the next.
        dense: the other factors; what crosses the chain becomes one dense block.
        pairs: the pairs of factors that have :class:`PairProducts`, the one eliminated first in front.
    """

    terms: tuple[TermPlace, ...]
    chain: tuple[int, ...]
    dense: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class CrossProducts:
    """Everything the likelihood needs to know of the data. A JAX pytree.

    ``a + b`` adds the rows of b to those of a, outside ``jit``; see :func:`add`.

    Attributes:
        factors: products by level, one per grouping factor.
        pairs: products by pair of levels, in the order of ``layout.pairs``.
        XX, Xy, yy: ``(p, p), (p,), ()`` products of the basis of X and of y's least-squares residual.
        n: ``()`` number of rows. sum_log_weights: ``()``.
        beta0: ``(p,)`` the least-squares coefficients taken out of y.
        X_basis: basis of X's columns. Z_bases: one per random term.
        layout: static structure.
    """

    factors: tuple[FactorProducts, ...]
    pairs: tuple[PairProducts, ...]
    XX: AnyArray
    Xy: AnyArray
    yy: AnyArray
    n: AnyArray
    sum_log_weights: AnyArray
    beta0: AnyArray
    X_basis: Basis
    Z_bases: tuple[Basis, ...]
    layout: Layout

    def __add__(self, other: CrossProducts) -> CrossProducts:
        return add(self, other)

    def __radd__(self, other: int) -> CrossProducts:
        """So that ``sum()`` works: it starts from 0."""
        return self if other == 0 else NotImplemented


jax.tree_util.register_dataclass(
    CrossProducts,
    data_fields=["factors", "pairs", "XX", "Xy", "yy", "n", "sum_log_weights", "beta0", "X_basis", "Z_bases"],
    meta_fields=["layout"],
)


def cross_products(design: Design, y: Any = None) -> CrossProducts:
    """Sums over rows of a design; the step after which the number of rows does not matter.

    Args:
        design: arrays of the model. Concrete arrays are summed by numpy in float64; inside a JAX transformation the
            same sums are JAX operations, differentiable with respect to y, X, Z, weights and offset.
        y: ``(n,)`` another response for the same design, or None for ``design.y``.

    Returns:
        :class:`CrossProducts`; its floating dtype is that of the inputs.

    Raises:
        ValueError: shapes or values do not make a model.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> term = mj.RandomTerm(Z=np.ones((12, 1)), group=np.repeat(np.arange(4), 3), n_groups=4)
        >>> design = mj.Design(y=np.arange(12.0), X=np.ones((12, 1)), terms=(term,))
        >>> float(mj.cross_products(design).n)
        12.0
    """
    if y is not None:
        design = replace(design, y=y)
    check_design(design)
    dtype = _floating_dtype(design)
    sqrt_w = None if design.weights is None else _sqrt(design.weights)
    Q, X_basis = change_basis(design.X, sqrt_w, full_rank=True)
    residual, beta0 = _least_squares(design, Q, X_basis, sqrt_w)

    n = np.shape(design.X)[0]
    scale = float(np.sqrt(n))
    Zs, Z_bases = zip(*(change_basis(term.Z, sqrt_w, scale) for term in design.terms), strict=True)
    groups, places = _grouping_factors(design)
    Z_of_factor = [
        _concatenate([Zs[t] for t, place in enumerate(places) if place.factor == f]) for f in range(len(groups))
    ]

    factors = []
    for (group, m), Z in zip(groups, Z_of_factor, strict=True):
        sums = _sum_by_group(_products(Z, _concatenate([Z, Q, residual[:, None]])), group, m)
        q = Z.shape[1]
        factors.append(FactorProducts(sums[:, :q], sums[:, q:-1], sums[:, -1]))

    chain, dense = _elimination_order(groups)
    pairs, keys = [], []
    order = chain + dense
    for i, s in enumerate(order):
        for t in order[i + 1 :]:
            nested = s in chain and t in chain
            pairs.append(_pair_products(Z_of_factor[s], Z_of_factor[t], groups[s], groups[t], nested))
            keys.append((s, t))

    log_w = 0.0 if design.weights is None else 2.0 * _log(sqrt_w).sum()
    stats = CrossProducts(
        factors=tuple(factors),
        pairs=tuple(pairs),
        XX=Q.T @ Q,
        Xy=Q.T @ residual,
        yy=residual @ residual,
        n=np.float64(n),
        sum_log_weights=log_w,
        beta0=beta0,
        X_basis=X_basis,
        Z_bases=tuple(Z_bases),
        layout=Layout(places, tuple(chain), tuple(dense), tuple(keys)),
    )
    return jax.tree.map(lambda leaf: _astype(leaf, dtype), stats)


def add(a: CrossProducts, b: CrossProducts) -> CrossProducts:
    """The cross-products of the rows of a and b together, in the bases of a.

    Both must describe the same columns and the same levels (equal ``n_groups``). Not for use inside ``jit``: whether
    one factor is nested in another is looked up in the data.
    """
    if not all(map(is_concrete, jax.tree.leaves((a, b)))):
        raise TypeError("cross-products are added outside jit: which levels occur together is looked up in the data")
    if [f.ZZ.shape for f in a.factors] != [f.ZZ.shape for f in b.factors] or a.layout.terms != b.layout.terms:
        raise ValueError("cross-products of different structure cannot be added: same terms and same levels are needed")
    if a.XX.shape != b.XX.shape:
        raise ValueError(f"cross-products with {a.XX.shape[0]} and {b.XX.shape[0]} fixed-effects columns cannot add")
    b = _in_bases_of(a, b)
    factors = tuple(
        FactorProducts(*(np.asarray(u) + np.asarray(v) for u, v in zip(fa, fb, strict=True)))
        for fa, fb in zip(a.factors, b.factors, strict=True)
    )
    merged: dict[tuple[int, int], PairProducts] = {}
    for stats in (a, b):
        for key, pair in zip(stats.layout.pairs, stats.pairs, strict=True):
            key, pair = _ascending(key, pair)
            merged[key] = _merge(merged[key], pair) if key in merged else pair
    sizes = [f.ZZ.shape[2] for f in factors]
    chain, dense = _order_by_levels(sizes, lambda s, t: _is_nested(merged, s, t, sizes))
    order, pairs, keys = chain + dense, [], []
    for i, s in enumerate(order):
        for t in order[i + 1 :]:
            pair = merged[(s, t)] if (s, t) in merged else _swap(merged[(t, s)])
            pairs.append(_spread(pair, sizes[s], sizes[t]) if s in chain and t in chain else pair)
            keys.append((s, t))
    return replace(
        a,
        factors=factors,
        pairs=tuple(pairs),
        **{name: getattr(a, name) + getattr(b, name) for name in ("XX", "Xy", "yy", "n", "sum_log_weights")},
        layout=Layout(a.layout.terms, tuple(chain), tuple(dense), tuple(keys)),
    )


def pad(stats: CrossProducts) -> CrossProducts:
    """Add empty levels so that data sets of one structure share a few shapes, and with them compiled programs.

    An empty level has zero products and contributes nothing to the likelihood.
    """

    def grow(x, size):
        x = np.asarray(x)
        return np.concatenate([x, np.zeros((*x.shape[:-1], size - x.shape[-1]), x.dtype)], axis=-1)

    layout = stats.layout
    sizes = [bucket(f.ZZ.shape[2], dense=i in layout.dense) for i, f in enumerate(stats.factors)]
    factors = tuple(FactorProducts(*(grow(x, size) for x in f)) for f, size in zip(stats.factors, sizes, strict=True))
    pairs = []
    for (s, t), pair in zip(layout.pairs, stats.pairs, strict=True):
        nested = s in layout.chain and t in layout.chain
        size = sizes[s] if nested else bucket(pair.rows.shape[0])
        rows = np.arange(size, dtype=np.int32) if nested else grow(pair.rows, size)
        pairs.append(PairProducts(rows, grow(pair.cols, size), grow(pair.ZZ, size)))
    return replace(stats, factors=factors, pairs=tuple(pairs))


def bucket(m: int, dense: bool = False) -> int:
    """The padded number of levels: 32, 128, 512, 2048, then powers of two. Where cost grows with its cube: 16, 32, 64,
    then multiples of 64."""
    if dense:
        return next((b for b in (16, 32, 64) if m <= b), -(-m // 64) * 64)
    return next((b for b in (32, 128, 512, 2048) if m <= b), 1 << (m - 1).bit_length())


# --- least squares and grouping ------------------------------------------------------------------------------------


def _least_squares(design: Design, Q: Any, X_basis: Basis, sqrt_w: Any) -> tuple[Any, Any]:
    """Residual of y (weighted) on X, and the coefficients taken out."""
    y = design.y if design.offset is None else _sub(design.y, design.offset)
    concrete = is_concrete(y) and is_concrete(Q) and is_concrete(sqrt_w)
    if not concrete:
        y = y if sqrt_w is None else y * sqrt_w
        hold = jax.lax.stop_gradient
        coefficients = hold(jnp.linalg.solve(Q.T @ Q, Q.T @ y)) if Q.shape[1] else jnp.zeros((0,), Q.dtype)
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
        places.append(TermPlace(q, f, width[f]))
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

    return _order_by_levels([m for _, m in groups], nested)


def _order_by_levels(sizes: list[int], nested) -> tuple[list[int], list[int]]:
    """The factor with most levels is eliminated first; then those that it is nested in, from the finest up.

    Eliminating a factor that is nested in the next leaves the next block diagonal. All others end in the dense block
    (Bates, Alday & Kokandakar 2025, arXiv 2505.11674, section 4).
    """
    chain: list[int] = []
    dense: list[int] = []
    for f in sorted(range(len(sizes)), key=lambda f: -sizes[f]):
        (chain if not chain or nested(chain[-1], f) else dense).append(f)
    return chain, dense


# --- sums over rows ------------------------------------------------------------------------------------------------


def _products(A: Any, B: Any) -> Any:
    """Row-wise outer products: ``(n, i), (n, j) -> (i, j, n)``."""
    return A.T[:, None] * B.T[None]


def _sum_by_group(values: Any, group: Any, m: int) -> Any:
    """Sum ``(..., n)`` over the rows of every level: ``(..., m)``."""
    if is_concrete(values) and is_concrete(group):
        flat = np.asarray(values).reshape(-1, values.shape[-1])
        group = np.asarray(group)
        sums = np.stack([np.bincount(group, weights=row, minlength=m) for row in flat]) if len(flat) else flat[:, :m]
        return sums.reshape((*values.shape[:-1], m))
    moved = jnp.moveaxis(jnp.asarray(values), -1, 0)
    return jnp.moveaxis(jax.ops.segment_sum(moved, jnp.asarray(group), m), 0, -1)


def _pair_products(Z_s: Any, Z_t: Any, s: tuple[Any, int], t: tuple[Any, int], nested: bool) -> PairProducts:
    (group_s, m_s), (group_t, m_t) = s, t
    products = _products(Z_s, Z_t)
    if not (is_concrete(group_s) and is_concrete(group_t)):
        return PairProducts(group_s, group_t, products)  # one "pair" per row: repeated pairs add up
    group_s, group_t = np.asarray(group_s), np.asarray(group_t)
    if nested:
        parent = np.full(m_s, m_t, np.int32)  # a level without rows has no parent: out of range
        parent[group_s] = group_t
        return PairProducts(np.arange(m_s, dtype=np.int32), parent, _sum_by_group(products, group_s, m_s))
    code, inverse = np.unique(group_s.astype(np.int64) * m_t + group_t, return_inverse=True)
    rows, cols = np.divmod(code, m_t)
    return PairProducts(
        rows.astype(np.int32), cols.astype(np.int32), _sum_by_group(products, inverse.reshape(-1), len(code))
    )


# --- adding --------------------------------------------------------------------------------------------------------


def _in_bases_of(a: CrossProducts, b: CrossProducts) -> CrossProducts:
    """b's products expressed in a's bases, with a's least-squares fit taken out of y."""
    G = np.asarray(b.X_basis.R) @ np.asarray(a.X_basis.R_inv)  # Q_a = Q_b G
    shift = np.asarray(b.X_basis.R) @ (np.asarray(b.beta0) - np.asarray(a.beta0))  # y_a = y_b + Q_b shift
    H = [np.asarray(vb.R) @ np.asarray(va.R_inv) for va, vb in zip(a.Z_bases, b.Z_bases, strict=True)]
    H_of_factor = []
    for f, products in enumerate(b.factors):
        H_f = np.zeros((products.ZZ.shape[0],) * 2)
        for place, block in zip(b.layout.terms, H, strict=True):
            if place.factor == f:
                H_f[place.start : place.start + place.q, place.start : place.start + place.q] = block
        H_of_factor.append(H_f)
    factors = tuple(
        FactorProducts(
            np.einsum("ai,abm,bj->ijm", H_f, f.ZZ, H_f),
            np.einsum("ai,apm,pr->irm", H_f, f.ZX, G),
            np.einsum("ai,am->im", H_f, f.Zy + np.einsum("apm,p->am", f.ZX, shift)),
        )
        for f, H_f in zip(b.factors, H_of_factor, strict=True)
    )
    pairs = tuple(
        PairProducts(pair.rows, pair.cols, np.einsum("ai,abk,bj->ijk", H_of_factor[s], pair.ZZ, H_of_factor[t]))
        for (s, t), pair in zip(b.layout.pairs, b.pairs, strict=True)
    )
    return replace(
        b,
        factors=factors,
        pairs=pairs,
        XX=G.T @ b.XX @ G,
        Xy=G.T @ (b.Xy + b.XX @ shift),
        yy=b.yy + 2 * shift @ b.Xy + shift @ b.XX @ shift,
    )


def _swap(pair: PairProducts) -> PairProducts:
    return PairProducts(pair.cols, pair.rows, np.swapaxes(pair.ZZ, 0, 1))


def _ascending(key: tuple[int, int], pair: PairProducts) -> tuple[tuple[int, int], PairProducts]:
    return (key, pair) if key[0] < key[1] else (key[::-1], _swap(pair))


def _merge(a: PairProducts, b: PairProducts) -> PairProducts:
    rows, cols = np.concatenate([a.rows, b.rows]), np.concatenate([a.cols, b.cols])
    width = int(cols.max()) + 1
    code, inverse = np.unique(rows.astype(np.int64) * width + cols, return_inverse=True)
    ZZ = _sum_by_group(np.concatenate([a.ZZ, b.ZZ], axis=-1), inverse.reshape(-1), len(code))
    new_rows, new_cols = np.divmod(code, width)
    return PairProducts(new_rows.astype(np.int32), new_cols.astype(np.int32), ZZ)


def _present(pair: PairProducts, m_s: int, m_t: int) -> np.ndarray:
    """Entries that stand for rows; levels without rows point out of range."""
    return (np.asarray(pair.rows) < m_s) & (np.asarray(pair.cols) < m_t)


def _is_nested(merged: dict[tuple[int, int], PairProducts], s: int, t: int, sizes: list[int]) -> bool:
    pair = merged[(s, t)] if (s, t) in merged else _swap(merged[(t, s)])
    rows = np.asarray(pair.rows)[_present(pair, sizes[s], sizes[t])]
    return len(np.unique(rows)) == len(rows)


def _spread(pair: PairProducts, m_s: int, m_t: int) -> PairProducts:
    """One entry per level of s, in order."""
    keep = _present(pair, m_s, m_t)
    parent = np.full(m_s, m_t, np.int32)
    ZZ = np.zeros((*pair.ZZ.shape[:2], m_s), pair.ZZ.dtype)
    parent[pair.rows[keep]] = pair.cols[keep]
    ZZ[:, :, pair.rows[keep]] = pair.ZZ[:, :, keep]
    return PairProducts(np.arange(m_s, dtype=np.int32), parent, ZZ)


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
