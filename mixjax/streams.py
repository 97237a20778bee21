"""Models of tables that come in chunks: cross-products without the rows ever being in memory at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np

from mixjax.checks import DataError, warn
from mixjax.design import Labels
from mixjax.formula.chunks import INTERCEPT, ChunkReader, can_repeat, find_categories, tables
from mixjax.formula.context import caller_context, is_trusted
from mixjax.products.accumulate import Accumulator, Dependent
from mixjax.products.sums import CrossProducts
from mixjax.waiting import Waiting


def cross_products_from(
    batches: Any,
    formula: str,
    weights: str | None = None,
    offset: str | None = None,
    categories: Mapping[str, Iterable[Any]] | None = None,
    contrasts: Mapping[str, str] | None = None,
    progress: bool | None = None,
    context: Mapping[str, Any] | None = None,
    trusted: bool | None = None,
) -> tuple[CrossProducts, Labels]:
    """Cross-products of a table that is read in chunks; memory grows with the levels, not with the rows.

    Args:
        batches: an iterable of tables (pandas, polars, pyarrow or dicts of arrays), the path of a parquet file or of a
            folder of them (extra ``parquet``), a pyarrow dataset, or a dask data frame.
        formula: as for :func:`mixjax.lmm`. Expressions must be functions of one row: ``log(x)``, not ``center(x)``.
        weights, offset: names of columns.
        categories: all categories of columns that the effects read as categories, and all levels of grouping factors,
            also those that no row has: parts with the same ones can be added. Otherwise a source that can be read
            twice is, and of one that cannot the first chunk must show them all. Levels of grouping factors may first
            appear in any chunk.
        contrasts: as for :func:`mixjax.lmm`.
        progress: whether to show it; None for :func:`mixjax.show_progress`'s choice.
        context, trusted: as for :func:`mixjax.build_design`.

    Returns:
        :class:`~mixjax.CrossProducts`, for :func:`mixjax.estimate`; and the names of what is in them. ``labels.frame``
        is None: rows are not kept. ``mixjax.lmm(formula, batches)`` chains both.

    Raises:
        FormulaError, DataError: with the name of the culprit.

    Example:
        >>> import mixjax as mj
        >>> data = mj.datasets.load("sleepstudy")
        >>> chunks = (data[i : i + 50] for i in range(0, 180, 50))
        >>> stats, labels = mj.cross_products_from(chunks, "Reaction ~ Days + (Days | Subject)")
        >>> int(stats.n), labels.fixed
        (180, ('Intercept', 'Days'))
    """
    caller = caller_context() if context is None else context
    again = can_repeat(batches)
    source = tables(batches)
    first = next(source, None)
    if first is None:
        raise DataError("there are no chunks to read")
    reader = ChunkReader(formula, first, weights, offset, contrasts or {}, caller, is_trusted(trusted))
    used = reader.used
    known = {name: list(values) for name, values in (categories or {}).items() if name in used}
    unknown = [name for name in reader.categorical_columns(first) if name not in known]
    if unknown:
        known |= find_categories(tables(batches, used) if again else [first], unknown)
    reader.begin(first, known)
    fixed = [reader.names.index(name) for name in reader.fixed.names]
    intercept = reader.names.index(INTERCEPT) if INTERCEPT in reader.fixed.names else None
    sums = Accumulator(fixed, intercept, reader.terms())
    with Waiting("reading chunks of rows", show=progress, unit="chunk") as waiting:
        for table in tables(batches, used) if again else chain([first], source):
            rows = reader.rows(table)
            sums.add(rows, [levels.n for levels in reader.groups.values()])
            waiting.update(1)
    reader.report()
    if not sums.n:
        raise DataError("no chunk has a complete row")
    terms = reader.labels()
    try:
        stats, kept = sums.finish([levels.order() for levels in reader.groups.values()])
    except Dependent as error:
        term = terms[error.term]
        raise DataError(
            f"random effects of '{term.group}' cannot be told apart: other effects of the term determine "
            f"{term.effects[error.column]}; leave it out of the term"
        ) from None
    names = tuple(name for name, keep in zip(reader.fixed.names, kept, strict=True) if keep)
    dropped = tuple(name for name, keep in zip(reader.fixed.names, kept, strict=True) if not keep)
    if dropped:
        warn(f"fixed-effects columns left out because other columns determine them: {', '.join(dropped)}")
    if len(names) >= sums.n:
        raise DataError(f"{len(names)} fixed-effects columns for {sums.n} rows leave nothing to estimate sigma from")
    if not stats.yy > 1e-20 * max(1.0, float(np.abs(sums.level)) ** 2) * sums.n:
        raise DataError(f"the fixed effects reproduce the response '{reader.parsed.response}' exactly")
    order = sorted(range(len(terms)), key=lambda t: -len(terms[t].levels))
    named = (names, *(terms[t].levels for t in order))
    stats = replace(_in_order(stats, order), names=named)
    labels = Labels(
        formula=formula,
        response=reader.parsed.response.shown,
        fixed=names,
        terms=tuple(terms[t] for t in order),
        frame=None,
        dropped_columns=dropped,
        n_missing=reader.n_missing,
        state=reader.state(kept, order),
    )
    return stats, labels


def _in_order(stats: CrossProducts, order: list[int]) -> CrossProducts:
    """Terms by decreasing number of levels, ties as written, as :func:`mixjax.build_design` has them."""
    layout = replace(stats.layout, terms=tuple(stats.layout.terms[t] for t in order))
    return replace(stats, Z_bases=tuple(stats.Z_bases[t] for t in order), layout=layout)
