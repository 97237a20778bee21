"""Which effects of the other factors each level of the first factor meets, looked up once by numpy.

A level meets few of the dense effects, so its row of products with them is sparse. Sums over levels then take a list of
all pairs of effects that meet at a level, where the level has few, and otherwise blocks of levels made dense one after
another and multiplied: the list grows with the sum of squared numbers of effects. What is found here are integers;
:mod:`mixjax.engine.crossed` puts the numbers in.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import scipy.sparse
from jax.sharding import Mesh

from mixjax.design import AnyArray
from mixjax.machine import is_concrete
from mixjax.products.sharding import mesh_of, split_first_axis
from mixjax.products.sizes import MOST_DENSE
from mixjax.products.sums import CrossProducts

# The longest list of pairs, some 40 bytes each while sums are formed.
MOST_PAIRS = 2**24
# A pair of the list costs as much as so many multiplications of a dense product, and so does a number of a dense row
# (measured, for an evaluation with its derivatives: 18 ns, 60 ns and 35 ps).
PAIR_COST, NUMBER_COST = 500, 1700
# Pairs of one target that are summed side by side.
RUN = 8
# A small dense block goes without incidence, so that data sets share a program, until products of all levels with all
# of it become so many numbers: then what the sparse sums save is more.
FEW_PRODUCTS = 2**20
# The cube of the dense block costs as much as the elimination with dense rows, by automatic differentiation, where that
# has a part of so many of its multiplications (measured: 0.2 ns and 3 ns).
PARENT_COST = 15
# Effects of a level of the first factor that are written out entry by entry.
MOST_EFFECTS = 5


class PairList(NamedTuple):
    """All pairs of entries at one level: NumPy's one by one, ``(R,)``, XLA's in runs of up to eight with one target.

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


@dataclass(frozen=True)
class Incidence:
    """Which dense effects each level of the first factor meets. Integers only. A JAX pytree.

    Attributes:
        source: ``(E,)`` place of every entry among the products of pairs of levels, effect by effect.
        level, column: ``(E,)`` of the first factor, and of the d dense effects; m and d behind the end.
        pairs: of levels with few entries, or None. blocks: of levels with many, or None.
        mesh: the devices that share runs of pairs and blocks among them, or None; static.
    """

    source: AnyArray
    level: AnyArray
    column: AnyArray
    pairs: PairList | None
    blocks: LevelBlocks | None
    mesh: Mesh | None = None


jax.tree_util.register_dataclass(
    Incidence, data_fields=["source", "level", "column", "pairs", "blocks"], meta_fields=["mesh"]
)


def incidence(stats: CrossProducts, at_once: bool = False) -> Incidence | None:
    """The incidence of a crossed design whose dense block is large, or small beside very many levels; else None.

    ``at_once``: for NumPy, where no devices share the data.

    None also where the indices are traced, for then there is nothing to look up, and where a parent of the first factor
    would make the dense block too large.

    Raises:
        MemoryError: the dense block does not fit into memory.
    """
    layout = stats.layout
    if not layout.dense or np.ndim(stats.yy) or stats.known:  # of a known covariance all levels meet
        return None
    _check_memory(stats)
    first, *others = layout.chain + layout.dense
    q, _, m = np.shape(stats.factors[first].ZZ)
    shapes = {f: np.shape(stats.factors[f].ZZ)[1:] for f in others}
    d = sum(width * levels for width, levels in shapes.values())
    products = q * (q + 1) // 2 * m * _triangle(d + np.shape(stats.XX)[-1])
    if d <= MOST_DENSE and products <= FEW_PRODUCTS:
        return None
    if d * d >= 2**31 or q > MOST_EFFECTS:  # places in the dense block are 32-bit numbers
        return None
    # A parent factor in the chain, block diagonal in the elimination, becomes a part of the dense block here.
    crossed = sum(shapes[f][0] * shapes[f][1] for f in layout.dense)
    if d > crossed and (d**3 > PARENT_COST * q * m * crossed**2 or 8 * d**2 * COPIES > _memory()):
        return None
    used = [(t, pair) for (s, t), pair in zip(layout.pairs, stats.pairs, strict=True) if s == first]
    if not all(is_concrete(pair.rows) and is_concrete(pair.cols) for _, pair in used):
        return None
    mesh = mesh_of(stats)
    n_devices = 1 if mesh is None else mesh.size
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
    short = _worth_a_list(per_level, q * d**2 + NUMBER_COST * q * d)
    listed = short[level]
    pairs = _pair_list(np.flatnonzero(listed), level, column, d) if listed.any() else None
    if pairs is not None and not (at_once and mesh is None):
        pairs = _in_runs(pairs, _bucket(len(level)), d, n_devices)
    blocks = _level_blocks(np.flatnonzero(~listed), level, column, d, q, n_devices) if not listed.all() else None
    if mesh is not None:
        pairs, blocks = split_first_axis((pairs, blocks), mesh)
    size = _bucket(len(level))
    return Incidence(_pad(source, size, 0), _pad(level, size, m), _pad(column, size, d), pairs, blocks, mesh)


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
        limit: float = (device.memory_stats() or {}).get("bytes_limit", np.inf)
        return limit
    there = np.inf
    with suppress(AttributeError, OSError, ValueError):  # Windows has no such call
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError):  # a container may have less
        there = min(there, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return there


def _worth_a_list(per_level: np.ndarray, dense_cost: int) -> np.ndarray:
    """Levels whose pairs cost less than their row made dense; the shortest, as long as the list is not too long."""
    n_pairs = _triangle(per_level)
    order = np.argsort(n_pairs, kind="stable")
    worth = (n_pairs[order] * PAIR_COST <= dense_cost) & (np.cumsum(n_pairs[order]) <= MOST_PAIRS)
    return np.isin(np.arange(len(per_level)), order[worth])


def _triangle(n: Any) -> Any:
    return n * (n + 1) // 2


def _multiple(n: int, of: int) -> int:
    return -(-n // of) * of


def _bucket(n: int) -> int:
    """n rounded up to one of eight sizes between powers of two: few shapes, little waste."""
    n = max(n, 8)
    return _multiple(n, 1 << (n.bit_length() - 4))


def _pad(x: np.ndarray, size: int, value: int) -> np.ndarray:
    return np.concatenate([x, np.full(size - len(x), value)]).astype(np.int32)


def _pair_list(chosen: np.ndarray, level: np.ndarray, column: np.ndarray, d: int) -> PairList:
    """Of the chosen entries, which are sorted by level and column; one after the other."""
    own, column, n = level[chosen], column[chosen], len(chosen)
    # Entries on the right by column; beside each, those of its level from itself on. Grouped by the column of the left
    # one, in the order they come in, they are then sorted by target, by counting: seven times as fast as to sort keys.
    right = np.argsort(column, kind="stable").astype(np.int32)
    partners = (np.searchsorted(own, own, side="right") - np.arange(n))[right]
    first = np.cumsum(partners) - partners
    left = np.arange(partners.sum(), dtype=np.int32)
    left -= np.repeat((first - right).astype(np.int32), partners)
    places = column.astype(np.int32)[left], np.repeat(np.arange(n, dtype=np.int32), partners)
    pairs = scipy.sparse.coo_array((left, places), shape=(d, n))
    pairs.has_canonical_format = True
    grouped = pairs.tocsr()
    left, right = grouped.data, right[grouped.indices]
    target = np.repeat(np.arange(d, dtype=np.int32) * np.int32(d), np.diff(grouped.indptr))
    target += column.astype(np.int32)[right]
    chosen = chosen.astype(np.int32)
    return PairList(chosen[left], chosen[right], target)


def _in_runs(pairs: PairList, nowhere: int, d: int, n_devices: int) -> PairList:
    """``nowhere``: what stands for no entry."""
    target = pairs.target
    first = np.append(0, np.flatnonzero(target[1:] != target[:-1]) + 1)  # of every distinct target
    count = np.diff(first, append=len(target))
    runs = -(-count // RUN)  # of every target
    slot = np.arange(len(target), dtype=np.int32)
    slot += np.repeat(((np.cumsum(runs) - runs) * RUN - first).astype(np.int32), count)
    size = _multiple(_bucket(int(runs.sum())), n_devices)
    entries = np.full((2, size * RUN), nowhere, np.int32)
    entries[0, slot], entries[1, slot] = pairs.left, pairs.right
    both = entries.reshape(2, size, RUN)
    return PairList(both[0], both[1], _pad(np.repeat(target[first], runs), size, d * d))


def _level_blocks(
    chosen: np.ndarray, level: np.ndarray, column: np.ndarray, d: int, q: int, n_devices: int
) -> LevelBlocks:
    """Of the chosen entries; a block is no larger than the dense block itself, or than 2 MB."""
    names, own, count = np.unique(level[chosen], return_inverse=True, return_counts=True)
    k = _multiple(-(-len(names) // max(1, d // q, 2**18 // (d * q))), n_devices)
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
