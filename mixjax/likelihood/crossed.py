"""Products of large crossed designs: what the closed-form derivatives need, without anything of rows x levels.

:class:`CrossedMoments` answers the same two questions as :class:`~mixjax.likelihood.moments.Moments`, for one fit whose
dense block is large: sums over the levels of the first factor, ``sum_i B_i'W_i B_i``, and their transpose, ``B_i Psi
B_i'`` of every level. A level meets few of the dense effects, so its row ``B_i`` is sparse. Which effects meet at which
level is looked up once, by numpy, in concrete arrays (:func:`incidence`). The sums then take a list of all pairs of
effects that meet at a level, where the level has few, and otherwise blocks of levels made dense one after another and
multiplied: the list grows with the sum of squared numbers of effects.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mixjax.design import AnyArray, is_concrete
from mixjax.likelihood.moments import MOST_DENSE, Moments, pairs_of
from mixjax.likelihood.statistics import CrossProducts, Layout

# The longest list of pairs, some 40 bytes each while sums are formed.
MOST_PAIRS = 2**24
# A pair of the list costs as much as so many multiplications of a dense product (measured: 7 ns against 2 x 7 ps).
PAIR_COST = 500
# Pairs of one target that are summed side by side.
RUN = 8
# Effects of a level of the first factor that are written out entry by entry.
MOST_EFFECTS = 5


class PairList(NamedTuple):
    """All pairs of entries at one level, in runs of up to eight with one target.

    Runs are summed by vector operations; only their sums are scattered, which costs ten times as much each.

    Attributes:
        left, right: ``(R, 8)`` entries, columns of left >= right; E where a run is shorter.
        target: ``(R,)`` column of left x d + column of right, ascending; d x d behind the end.
    """

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
        pairs: of levels with few entries, or None. blocks: of levels with many, or None.
    """

    source: AnyArray
    level: AnyArray
    column: AnyArray
    pairs: PairList | None
    blocks: LevelBlocks | None


def incidence(stats: CrossProducts) -> Incidence | None:
    """The incidence of a crossed design whose dense block is large, or None where another way is better.

    None also where the indices are traced: then there is nothing to look up.

    Raises:
        MemoryError: the dense block does not fit into memory.
    """
    layout = stats.layout
    if not layout.dense or np.ndim(stats.yy):
        return None
    _check_memory(stats)
    first, *others = layout.chain + layout.dense
    q, _, m = np.shape(stats.factors[first].ZZ)
    shapes = {f: np.shape(stats.factors[f].ZZ)[1:] for f in others}
    d = sum(width * levels for width, levels in shapes.values())
    in_chain = sum(shapes[f][0] * shapes[f][1] for f in layout.chain[1:])
    # A parent factor in the chain stays block diagonal in the elimination; made dense it must not matter.
    # Places in the dense block are 32-bit numbers.
    if d <= MOST_DENSE or d * d >= 2**31 or q > MOST_EFFECTS or in_chain > max(MOST_DENSE, d // 4):
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
    short = _worth_a_list(per_level, q * d**2)
    listed = short[level]
    pairs = _pair_list(np.flatnonzero(listed), level, column, d) if listed.any() else None
    blocks = _level_blocks(np.flatnonzero(~listed), level, column, d, q) if not listed.all() else None
    size = _bucket(len(level))
    return Incidence(_pad(source, size, 0), _pad(level, size, m), _pad(column, size, d), pairs, blocks)


# Copies of the dense block that one evaluation with its derivatives holds at its peak (measured: 5 GB at 3 700 effects,
# the list of pairs included).
COPIES = 24


def _check_memory(stats: CrossProducts) -> None:
    """Raise MemoryError where the block of the crossed factors is too large, before it is made."""
    sizes = [np.shape(stats.factors[f].ZZ)[1:] for f in stats.layout.dense]
    d = sum(q * m for q, m in sizes) + np.shape(stats.XX)[-1]
    needed, there = 8 * d**2 * COPIES, _memory()
    if needed > there:
        levels = " and ".join(f"{q} x {m:,}" if q > 1 else f"{m:,}" for q, m in sizes)
        raise MemoryError(
            f"the random effects that cross those of the largest factor ({levels} levels) and the fixed effects make a "
            f"dense block of {d:,} x {d:,}: {8e-9 * d**2:,.1f} GB, of which about {COPIES} copies are needed, "
            f"and there are {1e-9 * there:,.1f} GB of memory. Take a random term of that factor as fixed or leave it "
            "out, pool rare levels, or use software with iterative solvers for crossed effects, such as gpboost"
        )


def _memory() -> float:
    """Bytes of memory of the default device."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit", np.inf)
    names = {"SC_PHYS_PAGES", "SC_PAGE_SIZE"}
    there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if names <= set(os.sysconf_names) else np.inf
    with suppress(OSError, ValueError):  # a container may have less
        there = min(there, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return there


def _worth_a_list(per_level: np.ndarray, dense_cost: int) -> np.ndarray:
    """Levels whose pairs cost less than their row made dense; the shortest, as long as the list is not too long."""
    n_pairs = per_level * (per_level + 1) // 2
    order = np.argsort(n_pairs, kind="stable")
    worth = (n_pairs[order] * PAIR_COST <= dense_cost) & (np.cumsum(n_pairs[order]) <= MOST_PAIRS)
    return np.isin(np.arange(len(per_level)), order[worth])


def _bucket(n: int) -> int:
    """n rounded up to one of eight sizes between powers of two: few shapes, little waste."""
    step = max(1, 1 << (max(n, 1).bit_length() - 4))
    return -(-max(n, 1) // step) * step


def _pad(x: np.ndarray, size: int, value: int) -> np.ndarray:
    return np.concatenate([x, np.full(size - len(x), value)]).astype(np.int32)


def _pair_list(chosen: np.ndarray, level: np.ndarray, column: np.ndarray, d: int) -> PairList:
    """Of the chosen entries, which are sorted by level and column."""
    own, chosen, column = level[chosen], chosen.astype(np.int32), column.astype(np.int32)
    begin = np.searchsorted(own, own)  # of every entry's level
    partners = np.arange(len(own)) - begin + 1
    n_pairs = int(partners.sum())
    left = np.repeat(chosen, partners)
    right = chosen[np.arange(n_pairs) - np.repeat(np.cumsum(partners) - partners - begin, partners)]
    # By target: numpy sorts short integers in linear time, so one column after the other.
    short = np.uint16 if d <= 2**16 else np.int64
    order = np.argsort(column[right].astype(short), kind="stable")
    order = order[np.argsort(column[left[order]].astype(short), kind="stable")]
    left, right = left[order], right[order]
    target = column[left] * d + column[right]
    first = np.flatnonzero(np.diff(target, prepend=-1))  # of every distinct target
    count = np.diff(first, append=n_pairs)
    distinct = target[first]
    runs = -(-count // RUN)  # of every target
    within = np.arange(n_pairs) - np.repeat(first, count)
    slot = np.repeat(np.cumsum(runs) - runs, count) * RUN + within
    size = _bucket(int(runs.sum()))
    entries = np.full((2, size * RUN), _bucket(len(level)), np.int32)
    entries[0, slot], entries[1, slot] = left, right
    both = entries.reshape(2, size, RUN)
    return PairList(both[0], both[1], _pad(np.repeat(distinct, runs), size, d * d))


def _level_blocks(chosen: np.ndarray, level: np.ndarray, column: np.ndarray, d: int, q: int) -> LevelBlocks:
    """Of the chosen entries; a block is no larger than the dense block itself."""
    names, own, count = np.unique(level[chosen], return_inverse=True, return_counts=True)
    k = -(-len(names) // max(1, d // q))
    c = _bucket(-(-len(names) // k))
    # Levels dealt out by their size, so that all blocks have about as many entries.
    rank = np.empty(len(names), np.int64)
    rank[np.argsort(-count, kind="stable")] = np.arange(len(names))
    block, place = rank % k, rank // k
    levels = np.full((k, c), np.iinfo(np.int32).max, np.int32)
    levels[block, place] = names
    by_block = np.argsort(block[own], kind="stable")
    counts = np.bincount(block[own], minlength=k)
    size = _bucket(int(counts.max()))
    within = np.arange(len(own)) - np.repeat(np.cumsum(counts) - counts, counts)
    row = block[own][by_block]
    entry = np.full((k, size), _bucket(len(level)), np.int32)
    places = np.full((k, size), c * d, np.int32)
    entry[row, within] = chosen[by_block]
    places[row, within] = place[own][by_block] * d + column[chosen][by_block]
    return LevelBlocks(levels, entry, places)


@dataclass(frozen=True)
class CrossedMoments:
    """Products of one fit, with a last axis of 1 where :class:`~mixjax.likelihood.moments.Moments` has lanes.

    Attributes:
        A: ``(q, q, C, 1)`` of the C levels. count: ``(C, 1)`` ones.
        value: ``(q, E)`` of the entries. right: ``(q, p + 1, C)`` products with the basis of X and y.
        where: which effects meet where.
        products: ``(pairs, R, 8)`` of the list, per pair a <= b of effects: ``x_a y_b + x_b y_a``, or ``x_a y_a``.
        pair_level: ``(R, 8)`` their levels.
        UU, Uy, yy, n, sum_log_weights, X_logdet, dense, layout: as in Moments.
    """

    A: AnyArray
    count: AnyArray
    value: AnyArray
    right: AnyArray
    where: Incidence
    products: AnyArray  # or None
    pair_level: AnyArray  # or None
    UU: AnyArray
    Uy: AnyArray
    yy: AnyArray
    n: AnyArray
    sum_log_weights: AnyArray
    X_logdet: AnyArray
    dense: tuple[tuple[int, int, int], ...]
    layout: Layout

    @property
    def n_dense(self) -> int:
        """Number of dense effects."""
        return sum(q * m for _, q, m in self.dense)

    def contract(self, weights: list) -> tuple:
        """As :meth:`mixjax.likelihood.moments.Moments.contract`: ``sum_i [U_i z_i]' W_i [U_i z_i]``, j matrices W."""
        # One at a time: slices of what is stacked last cost nothing, strided ones a copy of the dense block each.
        UU, Uy, yy = zip(
            *(self._contract([w[:, k, 0] for w in weights]) for k in range(weights[0].shape[1])), strict=True
        )
        return jnp.stack(UU, axis=2)[..., None], jnp.stack(Uy, axis=1)[..., None], jnp.stack(yy)[:, None]

    def _contract(self, W: list[Array]) -> tuple[Array, Array, Array]:
        """For one matrix, by its entries ``(C,)`` per pair of effects."""
        q, d = self.value.shape[0], self.n_dense
        full = jnp.stack(W)[_position(q)]  # (q, q, C)
        right = (full[:, :, None] * self.right[None]).sum(1)  # (q, p + 1, C)
        corner = jnp.einsum("arc,asc->rs", right, self.right)
        at_entries = right.at[:, :, self.where.level].get(mode="fill", fill_value=0)  # (q, p + 1, E)
        side = _sum_flat((self.value[:, None] * at_entries).sum(0), self.where.column, d).T  # (d, p + 1)
        among = jnp.zeros((d, d), full.dtype)
        if self.where.pairs is not None:
            among = among + self._list_sums(self.where.pairs, W)
        if self.where.blocks is not None:
            among = among + self._block_sums(self.where.blocks, full)
        UU = jnp.concatenate(
            [
                jnp.concatenate([among, side[:, :-1]], axis=1),
                jnp.concatenate([side[:, :-1].T, corner[:-1, :-1]], axis=1),
            ]
        )
        return UU, jnp.concatenate([side[:, -1], corner[:-1, -1]]), corner[-1, -1]

    def pull_back(self, UU, Uy, yy) -> list:
        """As :meth:`mixjax.likelihood.moments.Moments.pull_back`: ``[U_i z_i] Psi [U_i z_i]'`` of every level."""
        d = self.n_dense
        side = jnp.concatenate([UU[:d, d:, 0], Uy[:d]], axis=1)
        corner = jnp.concatenate([jnp.concatenate([UU[d:, d:, 0], Uy[d:]], 1), jnp.append(Uy[d:, 0], yy)[None]])
        return self.pull_back_parts(UU[:d, :d, 0], side, corner)

    def pull_back_parts(self, Psi: Array, side: Array, corner: Array) -> list:
        """The same from the parts of Psi: ``(d, d)`` of the dense effects, ``(d, p + 1)``, ``(p + 1, p + 1)``."""
        q = self.value.shape[0]
        half = jnp.einsum("rs,asc->arc", corner, self.right) + 2.0 * self._times(side)  # (q, p + 1, C)
        mixed = jnp.einsum("arc,brc->abc", half, self.right)
        Q = [mixed[a, a] if a == b else mixed[a, b] + mixed[b, a] for a, b in pairs_of(q)]
        if self.where.pairs is not None:
            Q = [x + y for x, y in zip(Q, self._list_traces(self.where.pairs, Psi), strict=True)]
        if self.where.blocks is not None:
            Q = [x + y for x, y in zip(Q, self._block_traces(self.where.blocks, Psi), strict=True)]
        return [x[:, None] for x in Q]

    def rows_times(self, c: Array) -> Array:
        """``Z_i'(y + U c)`` of every level of the first factor: ``(q, C, 1)`` from ``c (u, 1)``."""
        d = self.n_dense
        return (
            self._times(c[:d])[:, 0, :, None] + jnp.einsum("arc,r->ac", self.right, jnp.append(c[d:], 1.0))[..., None]
        )

    def _times(self, columns: Array) -> Array:
        """``B_i columns`` of the dense effects: ``(d, r) -> (q, r, C)``."""
        level, column = self.where.level, self.where.column
        at_entries = columns.at[column].get(mode="fill", fill_value=0)  # (E, r)
        moved = self.value[:, None] * at_entries.T[None]  # (q, r, E)
        return _sum_flat(moved.reshape(-1, len(level)), level, self.A.shape[2]).reshape(*moved.shape[:2], -1)

    # --- sums by the list of pairs

    def _list_sums(self, pairs: PairList, W: list[Array]) -> Array:
        d, level = self.n_dense, self.pair_level
        sums = sum((x * w[level]).sum(1) for x, w in zip(self.products, W, strict=True))
        lower = jax.ops.segment_sum(sums, pairs.target, d * d, indices_are_sorted=True).reshape(d, d)
        return lower + jnp.tril(lower, -1).T

    def _list_traces(self, pairs: PairList, Psi: Array) -> list[Array]:
        twice = jnp.where(pairs.left == pairs.right, 1.0, 2.0)
        at_target = Psi.reshape(-1).at[pairs.target].get(mode="fill", fill_value=0, indices_are_sorted=True)
        weight = jax.lax.optimization_barrier(at_target)[:, None] * twice  # gathered once, not once for each of a run
        level, C = self.pair_level, self.A.shape[2]
        return [jax.ops.segment_sum((x * weight).reshape(-1), level.reshape(-1), C) for x in self.products]

    # --- sums by blocks of levels

    def _dense_block(self, block: LevelBlocks) -> Array:
        """``(q, c, d)`` of one block."""
        q, c, d = self.value.shape[0], block.levels.shape[0], self.n_dense
        value = self.value.at[:, block.entry].get(mode="fill", fill_value=0)
        return jnp.zeros((q, c * d), value.dtype).at[:, block.place].set(value, mode="drop").reshape(q, c, d)

    def _block_sums(self, blocks: LevelBlocks, full: Array) -> Array:
        d = self.n_dense
        edges = [round(d * i / 4) for i in range(5)]  # of column blocks: what lies above the diagonal is mirrored

        def add(lower, block):
            B = self._dense_block(block)
            at_levels = full.at[:, :, block.levels].get(mode="fill", fill_value=0)  # (q, q, c)
            WB = (at_levels[..., None] * B[None]).sum(1).reshape(-1, d)
            B = B.reshape(-1, d)
            return [row + B[:, a:b].T @ WB[:, :b] for row, (a, b) in zip(lower, pairwise(edges), strict=True)], None

        start = [jnp.zeros((b - a, b), self.value.dtype) for a, b in pairwise(edges)]
        rows, _ = jax.lax.scan(add, start, blocks)
        lower = jnp.concatenate([jnp.pad(row, ((0, 0), (0, d - row.shape[1]))) for row in rows])
        return jnp.tril(lower) + jnp.tril(lower, -1).T

    def _block_traces(self, blocks: LevelBlocks, Psi: Array) -> list[Array]:
        q, d, C = self.value.shape[0], self.n_dense, self.A.shape[2]

        def traces(_, block):
            B = self._dense_block(block)
            BPsi = (B.reshape(-1, d) @ Psi).reshape(B.shape)
            return None, jnp.stack([(BPsi[a] * B[b]).sum(1) * (1.0 if a == b else 2.0) for a, b in pairs_of(q)])

        _, parts = jax.lax.scan(traces, None, blocks)  # (k, pairs, c)
        flat = jnp.swapaxes(parts, 1, 2).reshape(-1, parts.shape[1])
        out = jnp.zeros((C, parts.shape[1]), flat.dtype).at[blocks.levels.reshape(-1)].set(flat, mode="drop")
        return list(out.T)


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
    p = stats.XX.shape[0]
    borders = [jnp.concatenate([factors[f].ZX, factors[f].Zy[:, None]], axis=1) for f, _, _ in dense]
    side = jnp.concatenate([jnp.moveaxis(border, 1, -1).reshape(-1, p + 1) for border in borders])
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
        products=None if where.pairs is None else _products(value, where.pairs),
        pair_level=None if where.pairs is None else jnp.asarray(where.level).at[where.pairs.left].get(mode="clip"),
        UU=UU[..., None],
        Uy=jnp.concatenate([side[:, -1], jnp.asarray(stats.Xy)])[:, None],
        yy=jnp.asarray(stats.yy)[None],
        n=jnp.asarray(stats.n)[None],
        sum_log_weights=jnp.asarray(stats.sum_log_weights)[None],
        X_logdet=jnp.asarray(stats.X_basis.logdet)[None],
        dense=dense,
        layout=replace(layout, chain=(first,), dense=tuple(others)),
    )


def _sum_flat(values: Array, index: AnyArray, size: int) -> Array:
    """Sums of ``(r, E)`` over the entries of equal index: ``(r, size)``. Scattering single numbers is ten times as fast
    as scattering columns of r."""
    rows = jnp.arange(values.shape[0], dtype=index.dtype)[:, None] * size
    flat = jnp.where(index < size, rows + index, values.shape[0] * size)
    sums = jax.ops.segment_sum(values.reshape(-1), flat.reshape(-1), values.shape[0] * size)
    return sums.reshape(-1, size)


def _products(value: Array, pairs: PairList) -> Array:
    left, right = (value.at[:, side].get(mode="fill", fill_value=0) for side in (pairs.left, pairs.right))
    return jnp.stack(
        [left[a] * right[a] if a == b else left[a] * right[b] + left[b] * right[a] for a, b in pairs_of(len(value))]
    )


def _position(q: int) -> np.ndarray:
    """Where entry (a, b) of a symmetric matrix stands among its upper entries, row by row."""
    position = np.zeros((q, q), np.int32)
    for v, (a, b) in enumerate(pairs_of(q)):
        position[a, b] = position[b, a] = v
    return position
