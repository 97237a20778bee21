"""Products of large crossed designs: what the closed-form derivatives need, without anything of rows x levels.

:class:`CrossedMoments` answers the same two questions as :class:`~mixjax.likelihood.moments.Moments`, for one fit whose
dense block is large: sums over the levels of the first factor, ``sum_i B_i'W_i B_i``, and their transpose, ``B_i Psi
B_i'`` of every level. A level meets few of the dense effects, so its row ``B_i`` is sparse. Which effects meet at which
level is looked up once, by numpy, in concrete arrays (:func:`incidence`). The sums then take either a list of all pairs
of effects that meet at a level, or blocks of levels made dense one after another and multiplied: lists are cheap where
levels have few rows, but grow with the sum of squared numbers of rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mixjax.design import AnyArray, is_concrete
from mixjax.likelihood.moments import MOST_DENSE, pairs_of
from mixjax.likelihood.statistics import CrossProducts, Layout

# The longest list of pairs, about 60 bytes each while sums are formed.
MOST_PAIRS = 2**24
# A pair of the list costs as much as so many multiplications of a dense product (measured: 8 ns against 2 x 7 ps).
PAIR_COST = 500
# Numbers of a block of levels made dense.
BLOCK = 2**22
# Effects of a level of the first factor that are written out entry by entry.
MOST_EFFECTS = 5


class PairList(NamedTuple):
    """All pairs of entries at one level, sorted by target: entries ``left`` and ``right (P,)``, and ``target = column
    of left x d + column of right``, columns of left >= right. Behind the end: target d x d."""

    left: AnyArray
    right: AnyArray
    target: AnyArray


class LevelBlocks(NamedTuple):
    """Levels in blocks: ``levels (k, c)``, m behind the end; entries of each block ``entry (k, e)``, E behind the end,
    at ``place (k, e) = level in block x d + column``."""

    levels: AnyArray
    entry: AnyArray
    place: AnyArray


class Incidence(NamedTuple):
    """Which dense effects each level of the first factor meets. Integers only.

    Attributes:
        source: ``(E,)`` place of every entry among the products of pairs of levels, effect by effect.
        level, column: ``(E,)`` of the first factor, and of the d dense effects; m and d behind the end.
        sums: how sums over levels are formed.
    """

    source: AnyArray
    level: AnyArray
    column: AnyArray
    sums: PairList | LevelBlocks


def incidence(stats: CrossProducts) -> Incidence | None:
    """The incidence of a crossed design whose dense block is large, or None where another way is better.

    None also where the indices are traced: then there is nothing to look up.

    Raises:
        MemoryError: the dense block does not fit into memory.
    """
    layout = stats.layout
    if not layout.dense or np.ndim(stats.yy):
        return None
    first, *others = layout.chain + layout.dense
    q, _, m = np.shape(stats.factors[first].ZZ)
    shapes = {f: np.shape(stats.factors[f].ZZ)[1:] for f in others}
    d = sum(width * levels for width, levels in shapes.values())
    in_chain = sum(shapes[f][0] * shapes[f][1] for f in layout.chain[1:])
    # A parent factor in the chain stays block diagonal in the elimination; made dense it must not matter.
    if d <= MOST_DENSE or q > MOST_EFFECTS or in_chain > max(MOST_DENSE, d // 4):
        return None
    used = [(t, pair) for (s, t), pair in zip(layout.pairs, stats.pairs, strict=True) if s == first]
    if not all(is_concrete(pair.rows) and is_concrete(pair.cols) for _, pair in used):
        return None
    starts, at = {}, 0
    for f in others:
        starts[f] = at
        at += shapes[f][0] * shapes[f][1]
    sources, levels, columns = [], [], []
    at = 0
    for t, pair in used:
        q_t, m_t = shapes[t]
        rows, cols = np.asarray(pair.rows, np.int64), np.asarray(pair.cols, np.int64)
        # Padding repeats the pair (0, 0); levels without rows point out of range.
        _, once = np.unique(rows * (m_t + 1) + cols, return_index=True)
        once = once[(rows[once] < m) & (cols[once] < m_t)]
        for effect in range(q_t):
            sources.append(at + effect * len(rows) + once)
            levels.append(rows[once])
            columns.append(starts[t] + effect * m_t + cols[once])
        at += q_t * len(rows)
    source, level, column = (np.concatenate(parts) for parts in (sources, levels, columns))
    order = np.lexsort((column, level))
    source, level, column = source[order], level[order], column[order]
    per_level = np.bincount(level, minlength=m)
    n_pairs = int((per_level * (per_level + 1) // 2).sum())
    E = len(level)
    if n_pairs <= MOST_PAIRS and n_pairs * PAIR_COST <= q * m * d**2:
        sums: PairList | LevelBlocks = _pair_list(level, column, per_level, n_pairs, d)
    else:
        sums = _level_blocks(level, column, per_level, d, q)
    size = _bucket(E)
    return Incidence(_pad(source, size, 0), _pad(level, size, m), _pad(column, size, d), sums)


def _bucket(n: int) -> int:
    """n rounded up to one of eight sizes between powers of two: few shapes, little waste."""
    step = max(1, 1 << (max(n, 1).bit_length() - 4))
    return -(-max(n, 1) // step) * step


def _pad(x: np.ndarray, size: int, value: int) -> np.ndarray:
    return np.concatenate([x, np.full(size - len(x), value)]).astype(np.int32)


def _pair_list(level: np.ndarray, column: np.ndarray, per_level: np.ndarray, n_pairs: int, d: int) -> PairList:
    begin = (np.cumsum(per_level) - per_level)[level]  # of every entry's level
    partners = np.arange(len(level)) - begin + 1
    left = np.repeat(np.arange(len(level)), partners)
    right = np.arange(n_pairs) - np.repeat(np.cumsum(partners) - partners - begin, partners)
    target = column[left] * d + column[right]
    order = np.argsort(target, kind="stable")
    size = _bucket(n_pairs)
    return PairList(_pad(left[order], size, 0), _pad(right[order], size, 0), _pad(target[order], size, d * d))


def _level_blocks(level: np.ndarray, column: np.ndarray, per_level: np.ndarray, d: int, q: int) -> LevelBlocks:
    m = len(per_level)
    c = max(1, min(m, BLOCK // (q * d)))
    k = -(-m // c)
    # Levels dealt out by their size, so that all blocks have about as many entries.
    rank = np.empty(m, np.int64)
    rank[np.argsort(-per_level, kind="stable")] = np.arange(m)
    block, place = rank % k, rank // k
    levels = np.full((k, c), m, np.int32)
    levels[block, place] = np.arange(m)
    by_block = np.argsort(block[level], kind="stable")
    counts = np.bincount(block[level], minlength=k)
    size = _bucket(int(counts.max(initial=1)))
    within = np.arange(len(level)) - np.repeat(np.cumsum(counts) - counts, counts)
    entry = np.full((k, size), _bucket(len(level)), np.int32)
    places = np.full((k, size), c * d, np.int32)
    row = block[level][by_block]
    entry[row, within] = by_block
    places[row, within] = place[level][by_block] * d + column[by_block]
    return LevelBlocks(levels, entry, places)


@dataclass(frozen=True)
class CrossedMoments:
    """Products of one fit, with a last axis of 1 where :class:`~mixjax.likelihood.moments.Moments` has lanes.

    Attributes:
        A: ``(q, q, C, 1)`` of the C levels. count: ``(C, 1)`` ones.
        value: ``(q, E)`` of the entries. right: ``(q, p + 1, C)`` products with the basis of X and y.
        where: which effects meet where.
        UU, Uy, yy, n, sum_log_weights, X_logdet, dense, layout: as in Moments.
    """

    A: AnyArray
    count: AnyArray
    value: AnyArray
    right: AnyArray
    where: Incidence
    UU: AnyArray
    Uy: AnyArray
    yy: AnyArray
    n: AnyArray
    sum_log_weights: AnyArray
    X_logdet: AnyArray
    dense: tuple[tuple[int, int, int], ...]
    layout: Layout

    @property
    def widths(self) -> list[int]:
        """Number of effects of every factor."""
        n_factors = 1 + max(place.factor for place in self.layout.terms)
        return [sum(place.q for place in self.layout.terms if place.factor == f) for f in range(n_factors)]

    @property
    def n_dense(self) -> int:
        """Number of dense effects."""
        return sum(q * m for _, q, m in self.dense)

    def contract(self, weights: list) -> tuple:
        """As :meth:`mixjax.likelihood.moments.Moments.contract`: ``sum_i [U_i z_i]' W_i [U_i z_i]``, j matrices W."""
        q, d = self.value.shape[0], self.n_dense
        W = jnp.stack(weights)[..., 0]  # (pairs, C, j)
        full = W[_position(q)]  # (q, q, C, j)
        right = (full[:, :, None] * self.right[None, ..., None]).sum(1)  # (q, p + 1, C, j)
        corner = jnp.einsum("arcj,asc->rsj", right, self.right)
        level, column = self.where.level, self.where.column
        at_entries = right.at[:, :, level].get(mode="fill", fill_value=0)  # (q, p + 1, E, j)
        side = (self.value[:, None, :, None] * at_entries).sum(0)
        side = jax.ops.segment_sum(jnp.moveaxis(side, 1, 0), column, d)  # (d, p + 1, j)
        among = self._list_sums(W) if isinstance(self.where.sums, PairList) else self._block_sums(full)
        UU = jnp.concatenate(
            [
                jnp.concatenate([among, side[:, :-1]], axis=1),
                jnp.concatenate([jnp.swapaxes(side[:, :-1], 0, 1), corner[:-1, :-1]], axis=1),
            ]
        )
        Uy = jnp.concatenate([side[:, -1], corner[:-1, -1]])
        return UU[..., None], Uy[..., None], corner[-1, -1][..., None]

    def pull_back(self, UU, Uy, yy) -> list:
        """As :meth:`mixjax.likelihood.moments.Moments.pull_back`: ``[U_i z_i] Psi [U_i z_i]'`` of every level."""
        q, d = self.value.shape[0], self.n_dense
        Psi, side = UU[:d, :d, 0], jnp.concatenate([UU[:d, d:, 0], Uy[:d]], axis=1)
        corner = jnp.concatenate([jnp.concatenate([UU[d:, d:, 0], Uy[d:]], 1), jnp.append(Uy[d:, 0], yy)[None]])
        half = jnp.einsum("rs,asc->arc", corner, self.right) + 2.0 * self._times(side)  # (q, p + 1, C)
        mixed = jnp.einsum("arc,brc->abc", half, self.right)
        among = self._list_traces(Psi) if isinstance(self.where.sums, PairList) else self._block_traces(Psi)
        Q = [x + (mixed[a, a] if a == b else mixed[a, b] + mixed[b, a])
             for x, (a, b) in zip(among, pairs_of(q), strict=True)]  # fmt: skip
        return [x[:, None] for x in Q]

    def rows_times(self, c: Array) -> Array:
        """``Z_i'(y + U c)`` of every level of the first factor: ``(q, C, 1)`` from ``c (u, 1)``."""
        d = self.n_dense
        return self._times(c[:d])[:, 0, :, None] + jnp.einsum("arc,r->ac", self.right, jnp.append(c[d:], 1.0))[..., None]

    def _times(self, columns: Array) -> Array:
        """``B_i columns`` of the dense effects: ``(d, r) -> (q, r, C)``."""
        level, column = self.where.level, self.where.column
        at_entries = columns.at[column].get(mode="fill", fill_value=0)  # (E, r)
        moved = self.value[:, :, None] * at_entries
        sums = jax.ops.segment_sum(jnp.swapaxes(moved, 0, 1), level, self.A.shape[2], indices_are_sorted=True)
        return jnp.moveaxis(sums, 0, -1)

    # --- sums by the list of pairs

    def _products_of_pairs(self) -> Array:
        """Per pair a <= b of effects ``(pairs, P)``: ``x_a y_b + x_b y_a``, or ``x_a y_a``."""
        left, right = self.value[:, self.where.sums.left], self.value[:, self.where.sums.right]
        return jnp.stack(
            [
                left[a] * right[a] if a == b else left[a] * right[b] + left[b] * right[a]
                for a, b in pairs_of(len(left))
            ]
        )

    def _list_sums(self, W: Array) -> Array:
        d, pairs = self.n_dense, self.where.sums
        at_level = W[:, self.where.level[pairs.left]]  # (pairs, P, j)
        moved = (self._products_of_pairs()[..., None] * at_level).sum(0)
        lower = jax.ops.segment_sum(moved, pairs.target, d * d, indices_are_sorted=True).reshape(d, d, -1)
        return lower + jnp.swapaxes(jnp.where(jnp.eye(d, dtype=bool)[..., None], 0.0, lower), 0, 1)

    def _list_traces(self, Psi: Array) -> list[Array]:
        pairs = self.where.sums
        twice = jnp.where(pairs.left == pairs.right, 1.0, 2.0)
        at_target = Psi.reshape(-1).at[pairs.target].get(mode="fill", fill_value=0, indices_are_sorted=True) * twice
        level, C = self.where.level[pairs.left], self.A.shape[2]
        return [jax.ops.segment_sum(x * at_target, level, C) for x in self._products_of_pairs()]

    # --- sums by blocks of levels

    def _dense_block(self, block: LevelBlocks) -> Array:
        """``(q, c, d)`` of one block."""
        q, c, d = self.value.shape[0], block.levels.shape[0], self.n_dense
        value = self.value.at[:, block.entry].get(mode="fill", fill_value=0)
        return jnp.zeros((q, c * d), value.dtype).at[:, block.place].set(value, mode="drop").reshape(q, c, d)

    def _block_sums(self, full: Array) -> Array:
        q, d, j = self.value.shape[0], self.n_dense, full.shape[-1]
        edges = [round(d * i / 4) for i in range(5)]  # of column blocks: the upper ones are mirrored

        def add(total, block):
            B = self._dense_block(block)
            c = B.shape[1]
            at_levels = full.at[:, :, block.levels].get(mode="fill", fill_value=0)  # (q, q, c, j)
            new = []
            for k in range(j):
                WB = (at_levels[:, :, :, k, None] * B[None]).sum(1).reshape(q * c, d)
                rows = [B.reshape(q * c, d)[:, a:b].T @ WB[:, :b] for a, b in zip(edges, edges[1:], strict=False)]
                new.append(jnp.concatenate([jnp.pad(row, ((0, 0), (0, d - row.shape[1]))) for row in rows]))
            return total + jnp.stack(new), None

        lower, _ = jax.lax.scan(add, jnp.zeros((j, d, d), self.value.dtype), self.where.sums)
        lower = jnp.tril(lower)
        return jnp.moveaxis(lower + jnp.swapaxes(jnp.tril(lower, -1), 1, 2), 0, -1)

    def _block_traces(self, Psi: Array) -> list[Array]:
        q, d, C = self.value.shape[0], self.n_dense, self.A.shape[2]

        def traces(_, block):
            B = self._dense_block(block)
            BPsi = (B.reshape(-1, d) @ Psi).reshape(B.shape)
            return None, jnp.stack([(BPsi[a] * B[b]).sum(1) * (1.0 if a == b else 2.0) for a, b in pairs_of(q)])

        _, parts = jax.lax.scan(traces, None, self.where.sums)  # (k, pairs, c)
        flat = jnp.swapaxes(parts, 1, 2).reshape(-1, parts.shape[1])
        out = jnp.zeros((C, parts.shape[1]), flat.dtype).at[self.where.sums.levels.reshape(-1)].set(flat, mode="drop")
        return list(out.T)


jax.tree_util.register_dataclass(
    CrossedMoments,
    data_fields=[
        "A", "count", "value", "right", "where", "UU", "Uy", "yy", "n", "sum_log_weights", "X_logdet",
    ],
    meta_fields=["dense", "layout"],
)  # fmt: skip


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

    def spots(f, levels):
        q, m = factors[f].ZZ.shape[1:]
        return starts[f] + jnp.arange(q)[:, None] * m + levels[None]

    G = jnp.zeros((d, d), dtype)
    for f, _, m in dense:
        at = spots(f, jnp.arange(m))
        G = G.at[at[:, None], at[None]].add(factors[f].ZZ)
    values = []
    for (s, t), pair in zip(layout.pairs, stats.pairs, strict=True):
        if s == first:
            values.append(jnp.asarray(pair.ZZ).reshape(pair.ZZ.shape[0], -1))
            continue
        at_s, at_t = spots(s, jnp.asarray(pair.rows)), spots(t, jnp.asarray(pair.cols))
        present = jnp.asarray(pair.cols) < factors[t].ZZ.shape[2]
        ZZ = jnp.where(present, pair.ZZ, 0.0)
        G = G.at[at_s[:, None], at_t[None]].add(ZZ, mode="drop")
        G = G.at[at_t[:, None], at_s[None]].add(jnp.swapaxes(ZZ, 0, 1), mode="drop")
    side = jnp.concatenate(
        [jnp.moveaxis(jnp.concatenate([factors[f].ZX, factors[f].Zy[:, None]], 1), 1, -1).reshape(-1, stats.XX.shape[0] + 1)
         for f, _, _ in dense])  # fmt: skip
    UU = jnp.concatenate(
        [
            jnp.concatenate([G, side[:, :-1]], axis=1),
            jnp.concatenate([side[:, :-1].T, jnp.asarray(stats.XX)], axis=1),
        ]
    )
    value = jnp.concatenate(values, axis=1)[:, where.source]
    value = jnp.where(where.column < d, value, 0.0)
    A = jnp.asarray(factors[first].ZZ)
    return CrossedMoments(
        A=A[..., None],
        count=jnp.ones((A.shape[2], 1), dtype),
        value=value,
        right=jnp.concatenate([factors[first].ZX, factors[first].Zy[:, None]], axis=1),
        where=where,
        UU=UU[..., None],
        Uy=jnp.concatenate([side[:, -1], jnp.asarray(stats.Xy)])[:, None],
        yy=jnp.asarray(stats.yy)[None],
        n=jnp.asarray(stats.n)[None],
        sum_log_weights=jnp.asarray(stats.sum_log_weights)[None],
        X_logdet=jnp.asarray(stats.X_basis.logdet)[None],
        dense=dense,
        layout=replace(layout, chain=(first,), dense=tuple(others)),
    )


def _position(q: int) -> np.ndarray:
    """Where entry (a, b) of a symmetric matrix stands among its upper entries, row by row."""
    position = np.zeros((q, q), np.int32)
    for v, (a, b) in enumerate(pairs_of(q)):
        position[a, b] = position[b, a] = v
    return position
