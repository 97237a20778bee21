"""Replicates: data sets are drawn, refitted, and what is wanted of the fits is kept and counted. The one loop of that.

Replicates are numbered, and each has a random stream of its own: chunks do not change a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from mixjax.estimation.choice import EngineName, chosen_engine
from mixjax.estimation.estimate import Estimates
from mixjax.estimation.many import estimate_many
from mixjax.products.sums import CrossProducts
from mixjax.waiting import Waiting

# Numbers that the data sets of one chunk may hold together, and how many data sets there are at most.
NUMBERS = 2**23
MOST = 2**14


class Drawn(NamedTuple):
    """Some replicates.

    Attributes:
        products: cross-products of their data, for every model that is fitted. beside: what else was drawn.
    """

    products: tuple[CrossProducts, ...]
    beside: Any = None


class Source(NamedTuple):
    """How replicates are made.

    Attributes:
        draw: ``(first, count)`` -> replicates ``first .. first + count - 1``.
        numbers: how many numbers one replicate takes, about.
    """

    draw: Callable[[int, int], Drawn]
    numbers: int


def chunk_size(numbers: int) -> int:
    """How many data sets of so many numbers are worked on at the same time."""
    return 1 << max(0, min(MOST, NUMBERS // numbers).bit_length() - 1)


def refits(
    source: Source,
    n: int,
    keep: Sequence[str],
    reml: bool,
    engine: EngineName = "auto",
    chunk: int | None = None,
    progress: bool | None = None,
    what: str = "refitting",
) -> Iterator[tuple[Drawn, tuple[Estimates, ...]]]:
    """The replicates ``0 .. n - 1``, chunk by chunk, with the fits of each model to them.

    Args:
        keep: fields of :class:`~mixjax.Estimates`. reml, engine: of the fits. chunk: data sets at the same time.
    """
    size = chunk_size(source.numbers) if chunk is None else chunk
    with Waiting(f"{what} {n} data sets", n, progress, "fit") as waiting:
        for first in range(0, n, size):
            drawn = source.draw(first, min(size, n - first))
            yield drawn, tuple(fit_drawn(products, n, keep, reml, engine) for products in drawn.products)
            waiting.update(min(size, n - first))


def fit_drawn(
    products: CrossProducts, n: int, keep: Sequence[str], reml: bool, engine: EngineName = "auto", mesh: Any = None
) -> Estimates:
    """The fits of some of n data sets, by the engine that suits all n: what a replicate gives does not depend on
    chunks."""
    return estimate_many(products, reml, mesh=mesh, keep=keep, engine=chosen_engine(products, n, engine, mesh))
