"""Products of large crossed designs: what the closed-form derivatives need, without anything of rows x levels.

:class:`CrossedMoments` answers the same two questions as :class:`~mixjax.engine.moments.Moments`, for one fit whose
dense block is large: sums over the levels of the first factor, ``sum_i B_i'W_i B_i``, and their transpose, ``B_i Psi
B_i'`` of every level, whose rows ``B_i`` are sparse (:mod:`mixjax.engine.incidence`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import scipy.sparse
from jax.sharding import PartitionSpec

from mixjax import linalg
from mixjax.covariance import pairs_of
from mixjax.design import AnyArray
from mixjax.engine.incidence import Incidence, LevelBlocks, PairList
from mixjax.engine.moments import Moments
from mixjax.machine import Array, add_at, as_laid_out, namespace, scan, segment_sum, take_or_zero
from mixjax.products.sums import CrossProducts, Layout

T = TypeVar("T")


@dataclass(frozen=True)
class CrossedMoments:
    """Products of one fit, with a last axis of 1 where :class:`~mixjax.engine.moments.Moments` has lanes.

    Attributes:
        A: ``(q, q, C, 1)`` of the C levels. count: ``(C, 1)`` ones.
        value: ``(q, E)`` of the entries. right: ``(q, p + 1, C)`` products with the basis of X and y.
        where: which effects meet where.
        products: of the list, per pair a <= b of effects ``(R, 8)``: ``x_a y_b + x_b y_a``, or ``x_a y_a``.
        pair_level: ``(R, 8)`` their levels. None of NumPy's, which has both in ``by_target``.
        UU, Uy, yy, n, sum_log_weights, X_logdet, dense, layout: as in Moments.
    """

    A: AnyArray
    count: AnyArray
    value: AnyArray
    right: AnyArray
    where: Incidence
    products: tuple[AnyArray, ...] | None
    pair_level: AnyArray | None
    UU: AnyArray
    Uy: AnyArray
    yy: AnyArray
    n: AnyArray
    sum_log_weights: AnyArray
    X_logdet: AnyArray
    dense: tuple[tuple[int, int, int], ...]
    layout: Layout

    @cached_property
    def by_target(self) -> _ByTarget:
        """NumPy's list of pairs as sparse matrices, of targets and levels: ten times as fast as sums of runs."""
        assert self.where.pairs is not None
        return _by_target(self.value, self.where, self.where.pairs, self.A.shape[2], self.n_dense)

    @property
    def n_dense(self) -> int:
        """Number of dense effects."""
        return sum(q * m for _, q, m in self.dense)

    def contract(self, weights: Any) -> tuple[Array, Array, Array]:
        """As :meth:`mixjax.engine.moments.Moments.contract`: ``sum_i [U_i z_i]' W_i [U_i z_i]``, j matrices W."""
        # One at a time: slices of what is stacked last cost nothing, strided ones a copy of the dense block each.
        matrices = [[w[:, k, 0] for w in weights] for k in range(weights[0].shape[1])]
        xp, u = namespace(self.UU, weights[0]), len(self.UU)
        if xp is np:  # each where it belongs, so that no copy of a dense block is made
            UU = np.empty((len(matrices), u, u), self.UU.dtype)
            found = [self._contract(W, out) for W, out in zip(matrices, UU, strict=True)]
        else:
            found = [self._contract(W) for W in matrices]
            UU = xp.stack([found_UU for found_UU, _, _ in found])
        _, Uy, yy = zip(*found, strict=True)
        return xp.moveaxis(UU, 0, 2)[..., None], xp.stack(Uy, axis=1)[..., None], xp.stack(yy)[:, None]

    def _contract(self, W: list[Array], out: np.ndarray | None = None) -> tuple[Array, Array, Array]:
        """For one matrix, by its entries ``(C,)`` per pair of effects; NumPy's into ``out``."""
        q, d = self.value.shape[0], self.n_dense
        xp = namespace(self.value, W[0])
        full = xp.stack(W)[_position(q)]  # (q, q, C)
        right = (full[:, :, None] * self.right[None]).sum(1)  # (q, p + 1, C)
        corner = xp.einsum("arc,asc->rs", right, self.right)
        at_entries = take_or_zero(right, self.where.level, axis=2)  # (q, p + 1, E)
        side = _sum_flat((self.value[:, None] * at_entries).sum(0), self.where.column, d).T  # (d, p + 1)
        if out is None:
            parts = [self._list_sums(self.where.pairs, W)] if self.where.pairs is not None else []
            if self.where.blocks is not None:
                parts.append(self._block_sums(self.where.blocks, full))
            among = sum(parts[1:], parts[0]) if parts else xp.zeros((d, d), full.dtype)
        else:
            among = out[:d, :d]
            self._put_among(W, full, among)
        UU = _bordered(among, side[:, :-1], corner[:-1, :-1], out)
        return UU, xp.concatenate([side[:, -1], corner[:-1, -1]]), corner[-1, -1]

    def _put_among(self, W: list[np.ndarray], full: np.ndarray, among: np.ndarray) -> None:
        """NumPy's sums among the dense effects; the lower triangle first."""
        if self.where.blocks is None:
            among[:] = 0.0
        else:
            edges = _edges(self.n_dense)
            for i, block in enumerate(map(LevelBlocks._make, zip(*self.where.blocks, strict=True))):
                B, WB = self._weighted_block(block, self.value, full)
                for a, b in pairwise(edges):
                    part = linalg.product(B[:, a:b].T, WB[:, :b])
                    among[a:b, :b] = part if i == 0 else among[a:b, :b] + part
        if self.where.pairs is not None:
            left, right, products = self.by_target
            among[left, right] += sum(x @ w for x, w in zip(products, W, strict=True))
        linalg.mirrored(among)

    def pull_back(self, UU: Array, Uy: Array, yy: Array) -> Any:
        """As :meth:`mixjax.engine.moments.Moments.pull_back`: ``[U_i z_i] Psi [U_i z_i]'`` of every level."""
        d, xp = self.n_dense, namespace(UU, Uy)
        side = xp.concatenate([UU[:d, d:, 0], Uy[:d]], axis=1)
        corner = xp.concatenate([xp.concatenate([UU[d:, d:, 0], Uy[d:]], 1), xp.append(Uy[d:, 0], yy)[None]])
        return self.pull_back_parts(UU[:d, :d, 0], side, corner)

    def pull_back_parts(self, Psi: Array, side: Array, corner: Array) -> Any:
        """The same from the parts of Psi: ``(d, d)`` of the dense effects, ``(d, p + 1)``, ``(p + 1, p + 1)``."""
        q, xp = self.value.shape[0], namespace(self.value, Psi)
        half = xp.einsum("rs,asc->arc", corner, self.right) + 2.0 * self._times(side)  # (q, p + 1, C)
        mixed = xp.einsum("arc,brc->abc", half, self.right)
        Q = [mixed[a, a] if a == b else mixed[a, b] + mixed[b, a] for a, b in pairs_of(q)]
        if self.where.pairs is not None:
            Q = [x + y for x, y in zip(Q, self._list_traces(self.where.pairs, Psi), strict=True)]
        if self.where.blocks is not None:
            Q = [x + y for x, y in zip(Q, self._block_traces(self.where.blocks, Psi), strict=True)]
        return np.stack(Q)[..., None] if xp is np else [x[:, None] for x in Q]

    def rows_times(self, c: Array) -> Array:
        """``Z_i'(y + U c)`` of every level of the first factor: ``(q, C, 1)`` from ``c (u, 1)``."""
        d, xp = self.n_dense, namespace(self.value, c)
        of_right = xp.einsum("arc,r->ac", self.right, xp.append(c[d:], 1.0))
        return (self._times(c[:d])[:, 0] + of_right)[..., None]

    def _times(self, columns: Array) -> Array:
        """``B_i columns`` of the dense effects: ``(d, r) -> (q, r, C)``."""
        level, column = self.where.level, self.where.column
        at_entries = take_or_zero(columns, column)  # (E, r)
        moved = self.value[:, None] * at_entries.T[None]  # (q, r, E)
        return _sum_flat(moved.reshape(-1, len(level)), level, self.A.shape[2]).reshape(*moved.shape[:2], -1)

    # --- sums by the list of pairs

    def _list_sums(self, pairs: PairList, W: list[Array]) -> Array:
        d = self.n_dense

        def sums(products: tuple[Array, ...], level: Array, target: Array, W: list[Array]) -> Array:
            of_runs = sum((x * w[level]).sum(1) for x, w in zip(products, W, strict=True))
            return segment_sum(of_runs, target, d * d, is_sorted=True)

        lower = self._add_up(sums, (*self._runs(pairs), pairs.target), W).reshape(d, d)
        return lower + namespace(lower).tril(lower, -1).T

    def _list_traces(self, pairs: PairList, Psi: Array) -> list[Array]:
        C = self.A.shape[2]
        if namespace(self.value, Psi) is np:
            left, right = self.by_target.left, self.by_target.right
            weight = Psi[left, right] * np.where(left == right, 1.0, 2.0)
            return [x.T @ weight for x in self.by_target.products]

        def traces(products: tuple[Array, ...], level: Array, pairs: PairList, Psi: Array) -> list[Array]:
            twice = namespace(Psi).where(pairs.left == pairs.right, 1.0, 2.0)
            at_target = as_laid_out(take_or_zero(Psi.reshape(-1), pairs.target))  # gathered once for all of a run
            weight = at_target[:, None] * twice
            return [segment_sum((x * weight).reshape(-1), level.reshape(-1), C) for x in products]

        return self._add_up(traces, (*self._runs(pairs), pairs), Psi)

    def _runs(self, pairs: PairList) -> tuple[tuple[Array, ...], Array]:
        if self.products is not None and self.pair_level is not None:
            return self.products, self.pair_level
        return _products(self.value, pairs), _level_of(self.where, pairs, self.A.shape[2])

    def _add_up(self, sums: Callable[..., T], parts: tuple[Any, ...], whole: Any) -> T:
        """``sums(*parts, whole)``; where devices share the parts, each works off its own, and the results add up."""
        mesh = self.where.mesh
        if mesh is None:
            return sums(*parts, whole)
        split, everywhere = PartitionSpec(mesh.axis_names), PartitionSpec()
        total: T = jax.shard_map(
            lambda parts, whole: jax.lax.psum(sums(*parts, whole), mesh.axis_names),
            mesh=mesh, in_specs=(split, everywhere), out_specs=everywhere, check_vma=False,
        )(parts, whole)  # fmt: skip
        return total

    # --- sums by blocks of levels

    def _dense_block(self, block: LevelBlocks, value: Array) -> Array:
        """``(q, c, d)`` of one block."""
        q, c, d = value.shape[0], block.levels.shape[0], self.n_dense
        value = take_or_zero(value, block.entry, axis=1)
        if isinstance(value, np.ndarray):
            rows, there = np.zeros((q, c * d), value.dtype), block.place < c * d
            rows[:, block.place[there]] = value[:, there]
            return rows.reshape(q, c, d)
        return jnp.zeros((q, c * d), value.dtype).at[:, block.place].set(value, mode="drop").reshape(q, c, d)

    def _weighted_block(self, block: LevelBlocks, value: Array, full: Array) -> tuple[Array, Array]:
        """Rows of one block ``(q c, d)``, and the same times the levels' matrices ``full (q, q, C)``."""
        d = self.n_dense
        B = self._dense_block(block, value)
        at_levels = take_or_zero(full, block.levels, axis=2)  # (q, q, c)
        WB = (at_levels[..., None] * B[None]).sum(1).reshape(-1, d)
        return B.reshape(-1, d), WB

    def _block_sums(self, blocks: LevelBlocks, full: Array) -> Array:
        d = self.n_dense
        edges = _edges(d)

        def sums(blocks: LevelBlocks, whole: tuple[Array, Array]) -> list[Array]:
            value, full = whole

            def add(lower: list[Array], block: LevelBlocks) -> tuple[list[Array], None]:
                B, WB = self._weighted_block(block, value, full)
                products = (linalg.product(B[:, a:b].T, WB[:, :b]) for a, b in pairwise(edges))
                return [row + product for row, product in zip(lower, products, strict=True)], None

            start = [namespace(value).zeros((b - a, b), value.dtype) for a, b in pairwise(edges)]
            lower: list[Array] = scan(add, start, blocks)[0]
            return lower

        rows = self._add_up(sums, (blocks,), (self.value, full))
        xp = namespace(rows[0])
        lower = xp.concatenate([xp.pad(row, ((0, 0), (0, d - row.shape[1]))) for row in rows])
        return xp.tril(lower) + xp.tril(lower, -1).T

    def _block_traces(self, blocks: LevelBlocks, Psi: Array) -> list[Array]:
        q, d, C = self.value.shape[0], self.n_dense, self.A.shape[2]

        def all_traces(blocks: LevelBlocks, whole: tuple[Array, Array]) -> list[Array]:
            value, Psi = whole

            def traces(_: None, block: LevelBlocks) -> tuple[None, Array]:
                B = self._dense_block(block, value)
                BPsi = linalg.product(B.reshape(-1, d), Psi).reshape(B.shape)
                of_pairs = [(BPsi[a] * B[b]).sum(1) * (1.0 if a == b else 2.0) for a, b in pairs_of(q)]
                return None, namespace(value).stack(of_pairs)

            _, parts = scan(traces, None, blocks)  # (k, pairs, c)
            levels = blocks.levels.reshape(-1)
            return [segment_sum(parts[:, v].reshape(-1), levels, C) for v in range(parts.shape[1])]

        return self._add_up(all_traces, (blocks,), (self.value, Psi))


jax.tree_util.register_dataclass(
    CrossedMoments,
    data_fields=[
        "A", "count", "value", "right", "where", "products", "pair_level", "UU", "Uy", "yy", "n", "sum_log_weights",
        "X_logdet",
    ],
    meta_fields=["dense", "layout"],
)  # fmt: skip


AnyMoments = Moments | CrossedMoments


def crossed_moments(stats: CrossProducts, where: Incidence) -> CrossedMoments:
    """Products laid out for the closed-form derivatives; differentiable in the products."""
    layout = stats.layout
    first, *others = layout.chain + layout.dense
    factors = stats.factors
    dense = tuple((f, *factors[f].ZZ.shape[1:]) for f in others)
    starts, d = {}, 0
    for f, q, m in dense:
        starts[f] = d
        d += q * m
    dtype = stats.XX.dtype

    xp = namespace(*jax.tree.leaves(stats))

    def spots(f: int, levels: Array) -> Array:
        q, m = factors[f].ZZ.shape[1:]
        return starts[f] + xp.arange(q)[:, None] * m + levels[None]

    G = xp.zeros((d, d), dtype)
    for f, _, m in dense:
        at = spots(f, xp.arange(m))
        G = add_at(G, (at[:, None], at[None]), factors[f].ZZ)
    values = []
    for (s, t), pair in zip(layout.pairs, stats.pairs, strict=True):
        if s == first:
            values.append(xp.asarray(pair.ZZ).reshape(pair.ZZ.shape[0], -1))
            continue
        # Padding has places behind the end, and products of zero.
        rows, cols = xp.asarray(pair.rows), xp.asarray(pair.cols)
        present = (cols < factors[t].ZZ.shape[2]) & (rows < factors[s].ZZ.shape[2])
        at_s, at_t = spots(s, xp.where(present, rows, 0)), spots(t, xp.where(present, cols, 0))
        ZZ = xp.where(present, pair.ZZ, 0.0)
        G = add_at(G, (at_s[:, None], at_t[None]), ZZ)
        G = add_at(G, (at_t[:, None], at_s[None]), xp.swapaxes(ZZ, 0, 1))
    p = stats.XX.shape[0]
    borders = [xp.concatenate([factors[f].ZX, factors[f].Zy[:, None]], axis=1) for f, _, _ in dense]
    side = xp.concatenate([xp.moveaxis(border, 1, -1).reshape(-1, p + 1) for border in borders])
    UU = _bordered(G, side[:, :-1], xp.asarray(stats.XX))
    value = xp.concatenate(values, axis=1)[:, where.source]
    value = xp.where(where.column < d, value, 0.0)
    A = xp.asarray(factors[first].ZZ)
    return CrossedMoments(
        A=A[..., None],
        count=xp.ones((A.shape[2], 1), dtype),
        value=value,
        right=xp.concatenate([factors[first].ZX, factors[first].Zy[:, None]], axis=1),
        where=where,
        products=None if where.pairs is None or xp is np else _products(value, where.pairs),
        pair_level=None if where.pairs is None or xp is np else _level_of(where, where.pairs, A.shape[2]),
        UU=UU[..., None],
        Uy=xp.concatenate([side[:, -1], xp.asarray(stats.Xy)])[:, None],
        yy=xp.asarray(stats.yy)[None],
        n=xp.asarray(stats.n)[None],
        sum_log_weights=xp.asarray(stats.sum_log_weights)[None],
        X_logdet=xp.asarray(stats.X_basis.logdet)[None],
        dense=dense,
        layout=replace(layout, chain=(first,), dense=tuple(others)),
    )


def _edges(d: int) -> list[int]:
    """Of blocks of columns: what lies above the diagonal is mirrored."""
    return [round(d * i / 4) for i in range(5)]


def _bordered(among: Array, side: Array, corner: Array, out: np.ndarray | None = None) -> Array:
    """The symmetric matrix of its blocks ``(d, d)``, ``(d, p)`` and ``(p, p)``; ``out`` has the first one already."""
    xp, d = namespace(among, side, corner), len(among)
    if out is not None:
        out[:d, d:], out[d:, :d], out[d:, d:] = side, side.T, corner
        return out
    return xp.concatenate([xp.concatenate([among, side], axis=1), xp.concatenate([side.T, corner], axis=1)])


def _sum_flat(values: Array, index: AnyArray, size: int) -> Array:
    """Sums of ``(r, E)`` over the entries of equal index: ``(r, size)``. Scattering single numbers is ten times as fast
    as scattering columns of r."""
    xp = namespace(values)
    rows = xp.arange(values.shape[0], dtype=index.dtype)[:, None] * size
    flat = xp.where(index < size, rows + index, values.shape[0] * size)
    return segment_sum(values.reshape(-1), flat.reshape(-1), values.shape[0] * size).reshape(-1, size)


class _ByTarget(NamedTuple):
    """The list of pairs: targets ``left >= right (T,)``, and per pair of effects the products ``(T, C)``, sparse."""

    left: np.ndarray
    right: np.ndarray
    products: list[scipy.sparse.csr_array]


def _by_target(value: np.ndarray, where: Incidence, pairs: PairList, C: int, d: int) -> _ByTarget:
    left, right, target = pairs
    first = np.append(0, np.flatnonzero(target[1:] != target[:-1]) + 1)  # of every distinct target
    start = np.append(first, len(target)).astype(np.int32)
    products = [
        scipy.sparse.csr_array((x, where.level[left], start), shape=(len(first), C))
        for x in _products_of(value[:, left], value[:, right])
    ]
    return _ByTarget(target[first] // d, target[first] % d, products)


def _level_of(where: Incidence, pairs: PairList, m: int) -> Array:
    """The level of every pair; of padding, whose products are zero, any."""
    xp = namespace(where.level, pairs.left)
    entry = xp.minimum(pairs.left, len(where.level) - 1)
    return xp.minimum(xp.asarray(where.level)[entry], m - 1)


def _products(value: Array, pairs: PairList) -> tuple[Array, ...]:
    return _products_of(*(take_or_zero(value, side, axis=1) for side in (pairs.left, pairs.right)))


def _products_of(left: Array, right: Array) -> tuple[Array, ...]:
    return tuple(
        left[a] * right[a] if a == b else left[a] * right[b] + left[b] * right[a] for a, b in pairs_of(len(left))
    )


def _position(q: int) -> np.ndarray:
    """Where entry (a, b) of a symmetric matrix stands among its upper entries, row by row."""
    position = np.zeros((q, q), np.int32)
    for v, (a, b) in enumerate(pairs_of(q)):
        position[a, b] = position[b, a] = v
    return position
