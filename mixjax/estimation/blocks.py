"""Replicates part by part: what is asked of all of them, by NumPy or by one program on all cores."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.engine.lanes import Lanes
from mixjax.estimation.at_once import padded_lanes, tile_of
from mixjax.estimation.batch import Batch, last
from mixjax.estimation.choice import EngineName, chosen_engine
from mixjax.estimation.lane_program import Sizes, put, sizes_for, slice_of
from mixjax.machine import LANES, Array, float64, jit, lanes_of, n_cores, silently
from mixjax.products.sizes import in_blocks, in_lanes_at_once, is_small
from mixjax.products.sums import CrossProducts

T = TypeVar("T")

# Replicates of one design that NumPy has in memory as lanes, and their numbers: 128 MB.
AT_ONCE, NUMBERS = 4096, 2**24


class Blocks:
    """The replicates of one call in blocks of N, at fixed places, as compiled programs work them off.

    For models that :func:`~mixjax.products.sizes.in_blocks` says yes to.
    """

    def __init__(self, stats: CrossProducts, platform: str):
        self.batch, self.platform = Batch(stats), platform
        self.B, self.one_minimum = self.batch.B, self.batch.one_minimum
        self.sizes: Sizes = sizes_for(self.batch.shapes, platform)

    @property
    def workers(self) -> int:
        """Threads that blocks are worked on by."""
        return n_cores() if self.platform == "cpu" else 1

    @property
    def n_blocks(self) -> int:
        return -(-self.B // self.sizes.block)

    def count(self, block: int) -> int:
        return max(0, min(self.sizes.block, self.B - block * self.sizes.block))

    def at(self, block: int) -> slice:
        """Where the block's replicates stand among all."""
        first = block * self.sizes.block
        return slice(first, first + self.count(block))

    def index(self, block: int) -> np.ndarray:
        """Numbers of the block's replicates, padded by repeating the last one to N."""
        N = self.sizes.block
        return np.minimum(np.arange(block * N, (block + 1) * N), self.B - 1)

    def lanes(self, block: int, reml: bool) -> Lanes:
        """The block's replicates, N in the last axis where they do not share."""
        N, index = self.sizes.block, self.index(block)
        whole = index[-1] - index[0] == N - 1
        return self.batch.lanes(slice(index[0], index[0] + N) if whole else index, np.bool_(reml))


def lanes_at_once(batch: Batch, at: slice, reml: bool) -> Lanes:
    """Replicates ``at`` for NumPy. Of one design in a multiple of lanes, the last one repeated: what they share has one
    lane, and they must have more."""
    if batch.stacked:
        return batch.lanes(at, reml)
    return batch.lanes(padded_lanes(np.arange(at.start, at.stop)), reml)


def parts_of(batch: Batch) -> Iterator[slice]:
    """The replicates in parts, as NumPy works them off."""
    own = sum(np.size(products.Zy) for products in batch.stats.factors) // batch.B
    size = max(1, min(AT_ONCE, NUMBERS // own)) if not batch.stacked else tile_of(batch.lanes(slice(0, 1), True))
    for first in range(0, batch.B, size):
        yield slice(first, min(first + size, batch.B))


def for_blocks(blocks: Blocks, begin: Callable[[int], T], end: Callable[[int, T], None], workers: int) -> None:
    """Begin every block's program, and fetch what it gives when it is done.

    By a pool of threads on a CPU: XLA lets go of Python's lock, and one program runs on one core at a time; the first
    block is done before all others: it compiles, and makes room for results. A device needs no threads: it works on the
    next block while the last one is fetched.
    """
    if workers == 1:
        last: T | None = None
        for block in range(blocks.n_blocks):
            found = begin(block)
            if last is not None:
                end(block - 1, last)
            last = found
        end(blocks.n_blocks - 1, last)  # type: ignore[arg-type]
        return
    x64 = jax.config.read("jax_enable_x64")

    def scoped(block: int) -> None:
        with float64(x64):  # the scope is each thread's own
            end(block, begin(block))

    scoped(0)
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(scoped, range(1, blocks.n_blocks)))


# --- a function of every replicate -----------------------------------------------------------------------------------


def has_lanes(stats: CrossProducts, engine: EngineName = "auto") -> bool:
    """Whether :func:`over_lanes` serves these data sets."""
    return in_blocks(stats) or (engine != "jax" and is_small(stats) and in_lanes_at_once(stats))


def over_lanes(
    fun: Callable[..., tuple[Array, ...]],
    stats: CrossProducts,
    reml: bool,
    of_each: Sequence[np.ndarray],
    of_all: Sequence[np.ndarray],
    engine: EngineName = "auto",
) -> tuple[np.ndarray, ...]:
    """The values of a function of lanes for each of B data sets, replicates in front.

    Args:
        fun: ``(lanes, *of_each, *of_all)`` -> arrays, lanes last; a function of a module. What it gives for one lane
            does not depend on the others.
        of_each: arrays with B in front. of_all: arrays that all share.
    """
    if chosen_engine(stats, len(stats.yy), engine) == "numpy":
        batch, found = Batch(stats, at_once=True), []
        for at in parts_of(batch):
            lanes, count = lanes_at_once(batch, at, reml), at.stop - at.start
            N, size = lanes.moments.yy.shape[-1], tile_of(lanes)
            own = [last(a[np.minimum(np.arange(at.start, at.start + N), at.stop - 1)]) for a in of_each]
            with silently():
                for first in range(0, count, size):
                    part = np.arange(first, min(first + size, count))
                    values = fun(*lanes_of((lanes, *own), padded_lanes(part), N), *of_all)
                    found.append([value[..., : len(part)] for value in values])
        return tuple(np.moveaxis(np.concatenate(parts, -1), -1, 0) for parts in zip(*found, strict=True))
    blocks = Blocks(stats, jax.default_backend())
    results: list[Any] = [None] * blocks.n_blocks

    def begin(block: int) -> tuple[Array, ...]:
        own = tuple(last(a[blocks.index(block)]) for a in of_each)
        values: tuple[Array, ...] = _in_tiles(fun, blocks.lanes(block, reml), own, tuple(of_all), blocks.sizes)
        return values

    def end(block: int, values: tuple[Array, ...]) -> None:
        results[block] = [np.asarray(value)[..., : blocks.count(block)] for value in values]

    for_blocks(blocks, begin, end, blocks.workers)
    return tuple(np.moveaxis(np.concatenate(parts, -1), -1, 0) for parts in zip(*results, strict=True))


@partial(jit, compiler_options=LANES, static_argnames=("fun", "sizes"))
def _in_tiles(
    fun: Callable[..., tuple[Array, ...]],
    lanes: Lanes,
    of_each: tuple[Array, ...],
    of_all: tuple[Array, ...],
    sizes: Sizes,
) -> tuple[Array, ...]:
    """Tile by tile, so that arrays over lanes stay in the cache."""
    N, size = sizes.block, sizes.lanes
    of_all = jax.tree.map(jnp.asarray, of_all)

    def of_tile(i: Any) -> tuple[Array, ...]:
        return fun(*slice_of((lanes, *of_each), i * size, size, N), *of_all)

    shapes = jax.eval_shape(lambda: of_tile(0))
    empty = jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape[:-1], N), leaf.dtype), shapes)
    values: tuple[Array, ...] = jax.lax.fori_loop(
        0, N // size, lambda i, found: put(found, of_tile(i), i * size), empty
    )
    return values
