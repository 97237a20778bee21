"""Replicates: data sets are drawn, refitted, and what is wanted of the fits is kept and counted. The one loop of that.

Replicates are numbered, and each has a random stream of its own: chunks do not change a number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, TypeAlias, overload

import numpy as np

from mixjax.estimation.choice import EngineName, chosen_engine
from mixjax.estimation.estimate import Estimates
from mixjax.estimation.glmm import GLMMEstimates
from mixjax.estimation.many import estimate_many
from mixjax.fitted.either import AnyFitted
from mixjax.fitted.further import FurtherFitted
from mixjax.fitted.record import Fitted
from mixjax.products.responses import Responses
from mixjax.products.sums import CrossProducts
from mixjax.resampling.family_data import FamilyResponses, FamilySamples
from mixjax.resampling.further_data import FurtherResponses
from mixjax.waiting import Waiting

# Numbers that the data sets of one chunk may hold together, and how many data sets there are at most.
NUMBERS = 2**23
MOST = 2**14

# Many data sets that one model is fitted to.
Data: TypeAlias = CrossProducts | FamilyResponses | FamilySamples | FurtherResponses


class Drawn(NamedTuple):
    """Some replicates.

    Attributes:
        data: for every model that is fitted what it needs of them: cross-products, or rows of a generalised model.
        beside: what else was drawn.
    """

    data: tuple[Data, ...]
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
) -> Iterator[tuple[Drawn, tuple[Any, ...]]]:
    """The replicates ``0 .. n - 1``, chunk by chunk, with the fits of each model to them.

    Args:
        keep: fields of :class:`~mixjax.Estimates`, or of :class:`~mixjax.GLMMEstimates`. reml: of linear models; others
            know theirs.
        engine: of the fits. chunk: data sets at the same time.
    """
    size = chunk_size(source.numbers) if chunk is None else chunk
    with Waiting(f"{what} {n} data sets", n, progress, "fit") as waiting:
        for first in range(0, n, size):
            drawn = source.draw(first, min(size, n - first))
            yield drawn, tuple(fit_drawn(data, n, keep, reml, engine) for data in drawn.data)
            waiting.update(min(size, n - first))


@overload
def fit_drawn(
    data: CrossProducts, n: int, keep: Sequence[str], reml: bool, engine: EngineName = "auto", mesh: Any = None
) -> Estimates: ...
@overload
def fit_drawn(
    data: FurtherResponses, n: int, keep: Sequence[str], reml: bool, engine: EngineName = "auto", mesh: Any = None
) -> Estimates: ...
@overload
def fit_drawn(
    data: FamilyResponses | FamilySamples, n: int, keep: Sequence[str], reml: bool, engine: EngineName = "auto",
    mesh: Any = None,
) -> GLMMEstimates: ...  # fmt: skip
def fit_drawn(
    data: Data, n: int, keep: Sequence[str], reml: bool, engine: EngineName = "auto", mesh: Any = None
) -> Estimates | GLMMEstimates:
    """The fits of some of n data sets, by the engine that suits all n: what a replicate gives does not depend on
    chunks."""
    if not isinstance(data, CrossProducts):
        return data.fits(n, keep, engine)
    return estimate_many(data, reml, mesh=mesh, keep=keep, engine=chosen_engine(data, n, engine, mesh))


def data_of_responses(fitted: AnyFitted) -> Callable[[np.ndarray], Data]:
    """Responses ``(B, nobs)`` of the rows of a fit -> data sets of its model."""
    if isinstance(fitted, FurtherFitted):
        return partial(FurtherResponses, fitted)
    return Responses(fitted.rows).products if isinstance(fitted, Fitted) else partial(FamilyResponses, fitted)
