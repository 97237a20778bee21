"""The sums over rows that the likelihood needs, as a structure: what they are, adding, padding, stacking.

All products are formed in the orthonormal bases of :mod:`mixjax.bases`, with y replaced by its least-squares residual.
They are additive over rows: ``a + b`` holds the rows of both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.bases import Basis
from mixjax.covariance import Structure
from mixjax.design import AnyArray
from mixjax.machine import is_concrete


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


class ClassProducts(NamedTuple):
    """Second moments of the levels of the first factor that have the same ``Z'Z``: C classes.

    U holds the effects of all other factors, factor by factor in the order of elimination, then the basis of X. A pair
    of effects a <= b stands for the sum of both orders.

    Attributes:
        ZZ: ``(q, q, C)`` of one level of every class. count: ``(C,)`` of its levels.
        UU: ``(pairs, C, t)`` sums of ``Z'U (x) Z'U`` over a class, upper entries row by row.
        Uy: ``(B, pairs, C, u)`` of ``Z'U (x) Z'y``. yy: ``(B, pairs, C)`` of ``Z'y (x) Z'y``.
    """

    ZZ: AnyArray
    count: AnyArray
    UU: AnyArray
    Uy: AnyArray
    yy: AnyArray


class TermPlace(NamedTuple):
    """Where a random term lives: its q effects are effects ``start .. start + q - 1`` of grouping factor ``factor``."""

    structure: Structure
    factor: int
    start: int

    @property
    def q(self) -> int:
        """Number of effects."""
        return self.structure.q


@dataclass(frozen=True)
class Layout:
    """The structure of a model: all that is static when a program is compiled.

    Attributes:
        terms: place of every random term, in the order of the Design.
        chain: factors eliminated group by group, each nested in the next. Where the levels of all factors have known
            covariances, the empty factor: the last one, one level of one effect that no row has and no term is of.
        dense: the other factors; what crosses the chain becomes one dense block.
        pairs: the pairs of factors that have :class:`PairProducts`, the one eliminated first in front. Levels of one
            factor meet each other, ``(f, f)``, where their effects come of a known covariance.
    """

    terms: tuple[TermPlace, ...]
    chain: tuple[int, ...]
    dense: tuple[int, ...]
    pairs: tuple[tuple[int, int], ...]

    @property
    def qs(self) -> tuple[int, ...]:
        """Number of effects of every term."""
        return tuple(place.q for place in self.terms)

    @property
    def structures(self) -> tuple[Structure, ...]:
        """Covariance structure of every term."""
        return tuple(place.structure for place in self.terms)

    @property
    def widths(self) -> list[int]:
        """Number of effects of every factor."""
        n_factors = len(self.chain) + len(self.dense)
        widths = [sum(place.q for place in self.terms if place.factor == f) for f in range(n_factors)]
        return [width or 1 for width in widths]  # the empty factor has a column of zeros

    @property
    def is_led_by_none(self) -> bool:
        """The first factor is the empty one."""
        return bool(self.chain) and all(place.factor != self.chain[0] for place in self.terms)

    @property
    def k(self) -> int:
        """Number of covariance parameters of all terms, which is that of the optimiser's coordinates."""
        return sum(structure.k for structure in self.structures)


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
        classes: of many responses, where levels share their ``Z'Z``; else None.
        known: per factor ``T (levels, r)`` where its levels have a known covariance K, else None; ``()`` where none
            has. Its products are then those of r independent effects u, and the levels' own are ``b = T u``, ``T T' =
            K`` as far as rows see it (:mod:`mixjax.products.known`).
        names: of the columns of X and of the levels of every term, where they were read from tables, so that sums of
            other levels are not added; lost by whatever JAX does with the arrays.

    Many responses of one design stand in a leading axis of Zy, Xy, yy, beta0 and the classes; many designs in one of
    every leaf (:func:`stack`).
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
    classes: ClassProducts | None = None
    known: tuple[AnyArray | None, ...] = ()
    names: tuple[tuple[str, ...], ...] | None = field(default=None, compare=False, repr=False)

    def transform_of(self, f: int) -> AnyArray | None:
        """T of a factor, or None where its levels are independent."""
        return self.known[f] if self.known else None

    def n_levels(self, f: int) -> int:
        """Levels of a factor as the design has them."""
        T = self.transform_of(f)
        return int(np.shape(self.factors[f].Zy)[-1] if T is None else np.shape(T)[-2])

    def at_levels(self, f: int, effects: AnyArray) -> AnyArray:
        """Effects ``(q, r)`` of a factor as the products have them -> those of its levels ``(q, levels)``."""
        T = self.transform_of(f)
        return effects if T is None else effects @ T.T

    def in_basis(self) -> CrossProducts:
        """The same, their fixed effects to be those of the basis of X, beyond the least-squares coefficients."""
        eye = np.broadcast_to(np.eye(self.XX.shape[-1]), self.XX.shape)
        basis = Basis(eye, eye, self.X_basis.logdet)
        return replace(self, X_basis=basis, beta0=np.zeros_like(np.asarray(self.beta0)))

    def __add__(self, other: CrossProducts) -> CrossProducts:
        return add(self, other)

    def __radd__(self, other: int) -> CrossProducts:
        """So that ``sum()`` works: it starts from 0."""
        return self if other == 0 else NotImplemented


jax.tree_util.register_dataclass(
    CrossProducts,
    data_fields=[
        "factors",
        "pairs",
        "XX",
        "Xy",
        "yy",
        "n",
        "sum_log_weights",
        "beta0",
        "X_basis",
        "Z_bases",
        "classes",
        "known",
    ],
    meta_fields=["layout"],
    drop_fields=["names"],
)


def check_products(stats: CrossProducts) -> None:
    """Raise TypeError for anything but cross-products, above all a Design."""
    if not isinstance(stats, CrossProducts):
        raise TypeError(f"cross-products are needed, got {type(stats).__name__}: pass mixjax.cross_products(design)")


def add(a: CrossProducts, b: CrossProducts) -> CrossProducts:
    """The cross-products of the rows of a and b together, in the bases of a.

    Both must describe the same columns and the same levels (equal ``n_groups``). Not for use inside ``jit``: whether
    one factor is nested in another is looked up in the data.
    """
    if not all(map(is_concrete, jax.tree.leaves((a, b)))):
        raise TypeError("cross-products are added outside jit: which levels occur together is looked up in the data")
    if [f.ZZ.shape for f in a.factors] != [f.ZZ.shape for f in b.factors] or a.layout.terms != b.layout.terms:
        raise ValueError("cross-products of different structure cannot be added: same terms and same levels are needed")
    if a.names and b.names and a.names != b.names:
        here, there = next((x, y) for x, y in zip(a.names, b.names, strict=True) if x != y)
        apart = [name for name in dict.fromkeys((*here, *there)) if (name in here) != (name in there)]
        what = f"{', '.join(apart[:5])} in one of them only" if apart else "in another order"
        raise ValueError(
            f"cross-products of other columns or levels cannot be added ({what}): give both the same, also those that "
            "no row of a part has, by cross_products_from(..., categories={'g': [...]}), or read all chunks in one call"
        )
    if a.known or b.known:
        raise ValueError(
            "cross-products of levels with a known covariance cannot be added: they are those of its eigenvectors, "
            "which depend on all rows; make them of all rows together"
        )
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
    pairs, layout = lay_out(merged, [f.ZZ.shape[2] for f in factors], a.layout.terms)
    return replace(
        a,
        factors=factors,
        pairs=pairs,
        **{name: getattr(a, name) + getattr(b, name) for name in ("XX", "Xy", "yy", "n", "sum_log_weights")},
        layout=layout,
    )


def lay_out(
    merged: dict[tuple[int, int], PairProducts], sizes: list[int], terms: tuple[TermPlace, ...]
) -> tuple[tuple[PairProducts, ...], Layout]:
    """Products of all pairs of factors in the order of elimination, which is looked up in them.

    Args:
        merged: per pair of factors its pairs of levels, each once. sizes: numbers of levels of the factors.
    """
    chain, dense = order_by_levels(sizes, lambda s, t: _is_nested(merged, s, t, sizes))
    order, pairs, keys = chain + dense, [], []
    for i, s in enumerate(order):
        for t in order[i + 1 :]:
            pair = merged[(s, t)] if (s, t) in merged else _swap(merged[(t, s)])
            pairs.append(_spread(pair, sizes[s], sizes[t]) if s in chain and t in chain else pair)
            keys.append((s, t))
    return tuple(pairs), Layout(terms, tuple(chain), tuple(dense), tuple(keys))


def pad(stats: CrossProducts) -> CrossProducts:
    """Add empty levels so that data sets of one structure share a few shapes, and with them compiled programs.

    An empty level has zero products and contributes nothing to the likelihood.
    """
    layout = stats.layout
    sizes = [bucket(f.ZZ.shape[2], dense=i in layout.dense) for i, f in enumerate(stats.factors)]
    factors = tuple(FactorProducts(*(grow(x, size) for x in f)) for f, size in zip(stats.factors, sizes, strict=True))
    pairs = []
    for (s, t), pair in zip(layout.pairs, stats.pairs, strict=True):
        nested = s in layout.chain and t in layout.chain
        size = sizes[s] if nested else bucket(pair.rows.shape[0])
        rows = np.arange(size, dtype=np.int32) if nested else grow(pair.rows, size)
        pairs.append(PairProducts(rows, grow(pair.cols, size), grow(pair.ZZ, size)))
    known = tuple(None if T is None else grow(T, size) for T, size in zip(stats.known, sizes, strict=False))
    return replace(stats, factors=factors, pairs=tuple(pairs), known=known)


def stack(all_stats: Sequence[CrossProducts]) -> CrossProducts:
    """A batch of different designs of one structure for :func:`mixjax.estimate_many`.

    Same terms and the same number of fixed-effects columns are needed; rows, values, weights and the levels may differ.
    Levels that a design lacks are empty, and empty levels contribute nothing.

    Args:
        all_stats: cross-products, one per data set.

    Returns:
        :class:`CrossProducts` with a leading axis on every leaf.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> def design(sizes):
        ...     group = np.repeat(np.arange(len(sizes)), sizes)
        ...     term = mj.RandomTerm(Z=np.ones((len(group), 1)), group=group, n_groups=len(sizes))
        ...     return mj.Design(y=np.sin(np.arange(len(group))), X=np.ones((len(group), 1)), terms=(term,))
        >>> batch = mj.stack([mj.cross_products(design([3, 4, 5])), mj.cross_products(design([6, 2]))])
        >>> mj.estimate_many(batch).result
        array([0, 0])
    """
    all_stats = list(all_stats)
    if not all_stats:
        raise ValueError("stack() needs at least one data set")
    first = all_stats[0]
    for i, stats in enumerate(all_stats):
        if np.ndim(stats.yy):
            raise ValueError(f"data set {i} is already a batch; stack() takes cross-products of one response each")
        if stats.known:
            raise ValueError(
                f"data set {i} has levels with a known covariance, whose eigenvectors differ from design to design: "
                "fit one after the other; many responses of one design are a batch (mixjax.cross_products(design, Y))"
            )
        if stats.layout.terms != first.layout.terms or stats.XX.shape != first.XX.shape:
            raise ValueError(
                f"data set {i} has another structure than data set 0: the same random terms and the same number of "
                "fixed-effects columns are needed"
            )
    sizes = [max(stats.factors[f].ZZ.shape[2] for stats in all_stats) for f in range(len(first.factors))]
    layout = first.layout
    if any(stats.layout != layout for stats in all_stats):  # nested in some, crossed in others: crossed
        order = sorted(range(len(sizes)), key=lambda f: -sizes[f])
        keys = tuple((s, t) for i, s in enumerate(order) for t in order[i + 1 :])
        layout = Layout(layout.terms, (order[0],), tuple(order[1:]), keys)
    reshaped = [_reshape(stats, sizes, layout) for stats in all_stats]
    n_pairs = [max(stats.pairs[i].rows.shape[0] for stats in reshaped) for i in range(len(layout.pairs))]
    padded = [
        replace(
            stats,
            pairs=tuple(
                PairProducts(*(grow(x, k) for x in pair)) for pair, k in zip(stats.pairs, n_pairs, strict=True)
            ),
        )
        for stats in reshaped
    ]
    stacked: CrossProducts = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *padded)
    return stacked


def _reshape(stats: CrossProducts, sizes: list[int], layout: Layout) -> CrossProducts:
    """The same sums with more levels and in another order of elimination."""
    by_key = {}
    for (s, t), pair in zip(stats.layout.pairs, stats.pairs, strict=True):
        keep = _present(pair, stats.factors[s].ZZ.shape[2], stats.factors[t].ZZ.shape[2])
        pair = PairProducts(*(np.asarray(x)[..., keep] for x in pair))
        by_key[s, t], by_key[t, s] = pair, _swap(pair)
    pairs = []
    for s, t in layout.pairs:
        nested = s in layout.chain and t in layout.chain
        pairs.append(_spread(by_key[s, t], sizes[s], sizes[t]) if nested else by_key[s, t])
    factors = tuple(FactorProducts(*(grow(x, size) for x in f)) for f, size in zip(stats.factors, sizes, strict=True))
    return replace(stats, factors=factors, pairs=tuple(pairs), layout=layout)


def grow(x: AnyArray, size: int) -> np.ndarray:
    """Zeros behind the last axis."""
    x = np.asarray(x)
    return np.concatenate([x, np.zeros((*x.shape[:-1], size - x.shape[-1]), x.dtype)], axis=-1)


def bucket(m: int, dense: bool = False) -> int:
    """The padded number of levels: 32, 128, 512, 2048, then powers of two. Where cost grows with its cube: 16, 32, 64,
    then multiples of 64."""
    if dense:
        return next((b for b in (16, 32, 64) if m <= b), -(-m // 64) * 64)
    return next((b for b in (32, 128, 512, 2048) if m <= b), 1 << (m - 1).bit_length())


def sum_by_group(values: Any, group: Any, m: int) -> Any:
    """Sum ``(..., n)`` over the rows of every level: ``(..., m)``."""
    if is_concrete(values) and is_concrete(group):
        flat = np.asarray(values).reshape(-1, values.shape[-1])
        group = np.asarray(group)
        sums = np.stack([np.bincount(group, weights=row, minlength=m) for row in flat]) if len(flat) else flat[:, :m]
        return sums.reshape((*values.shape[:-1], m))
    moved = jnp.moveaxis(jnp.asarray(values), -1, 0)
    return jnp.moveaxis(jax.ops.segment_sum(moved, jnp.asarray(group), m), 0, -1)


def order_by_levels(sizes: list[int], nested: Callable[[int, int], bool]) -> tuple[list[int], list[int]]:
    """The factor with most levels is eliminated first; then those that it is nested in, from the finest up.

    Eliminating a factor that is nested in the next leaves the next block diagonal. All others end in the dense block
    (Bates, Alday & Kokandakar 2025, arXiv 2505.11674, section 4).
    """
    chain: list[int] = []
    dense: list[int] = []
    for f in sorted(range(len(sizes)), key=lambda f: -sizes[f]):
        (chain if not chain or nested(chain[-1], f) else dense).append(f)
    return chain, dense


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
    ZZ = sum_by_group(np.concatenate([a.ZZ, b.ZZ], axis=-1), inverse.reshape(-1), len(code))
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
