"""Models of tables that come in chunks: cross-products without the rows ever being in memory at once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

import numpy as np

from mixjax.design import Labels
from mixjax.formula.build import caller_context
from mixjax.formula.chunks import (
    INTERCEPT,
    ChunkReader,
    can_repeat,
    categorical_columns,
    find_categories,
    tables,
    used_columns,
)
from mixjax.formula.errors import DataError, FormulaError, warn
from mixjax.formula.parse import parse, quote_columns
from mixjax.formula.table import column_names
from mixjax.likelihood.accumulate import Accumulator, Dependent
from mixjax.likelihood.statistics import CrossProducts


def cross_products_from(
    batches: Any,
    formula: str,
    weights: str | None = None,
    offset: str | None = None,
    categories: Mapping[str, Iterable] | None = None,
    contrasts: Mapping[str, str] | None = None,
    progress: bool = False,
    context: Mapping[str, Any] | None = None,
) -> tuple[CrossProducts, Labels]:
    """Cross-products of a table that is read in chunks; memory grows with the levels, not with the rows.

    Args:
        batches: an iterable of tables (pandas, polars, pyarrow or dicts of arrays), the path of a parquet file or of a
            folder of them (extra ``parquet``), a pyarrow dataset, or a dask data frame.
        formula: as for :func:`mixjax.lmm`. Expressions must be functions of one row: ``log(x)``, not ``center(x)``.
        weights, offset: names of columns.
        categories: all categories of columns that the effects read as categories. Otherwise a source that can be read
            twice is, and of one that cannot the first chunk must show them all. Levels of grouping factors may first
            appear in any chunk.
        contrasts: as for :func:`mixjax.lmm`.
        progress: show a bar over chunks (extra ``progress``).
        context: names that the formula may use beside columns; by default those visible to the caller.

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
    parsed = parse(formula)
    if not parsed.random:
        raise FormulaError(f"{formula!r} has no random term such as (1 | g)")
    context = caller_context() if context is None else context
    contrasts = contrasts or {}
    again = can_repeat(batches)
    source = tables(batches)
    first = next(source, None)
    if first is None:
        raise DataError("there are no chunks to read")
    parsed = quote_columns(parsed, column_names(first))
    used, numeric = used_columns(parsed, first, weights, offset, context)
    known = {name: list(values) for name, values in (categories or {}).items() if name in used}
    unknown = [name for name in categorical_columns(parsed, first, numeric) if name not in known]
    if unknown:
        known |= find_categories(tables(batches, used) if again else [first], unknown)
    reader = ChunkReader(parsed, first, known, weights, offset, contrasts, context)
    fixed = [reader.names.index(name) for name in reader.fixed]
    intercept = reader.names.index(INTERCEPT) if INTERCEPT in reader.fixed else None
    sums = Accumulator(fixed, intercept, reader.terms())
    for table in _bar(tables(batches, used) if again else chain([first], source), progress):
        rows = reader.rows(table)
        sums.add(rows, [levels.n for levels in reader.groups.values()])
    reader.report_missing()
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
    names = tuple(name for name, keep in zip(reader.fixed, kept, strict=True) if keep)
    dropped = tuple(name for name, keep in zip(reader.fixed, kept, strict=True) if not keep)
    if dropped:
        warn(f"fixed-effects columns left out because other columns determine them: {', '.join(dropped)}")
    if len(names) >= sums.n:
        raise DataError(f"{len(names)} fixed-effects columns for {sums.n} rows leave nothing to estimate sigma from")
    if not stats.yy > 1e-20 * max(1.0, float(np.abs(sums.level)) ** 2) * sums.n:
        raise DataError(f"the fixed effects reproduce the response '{parsed.response}' exactly")
    stats, terms = _by_levels(stats, terms)
    labels = Labels(
        formula=formula,
        response=parsed.response.strip("`"),
        fixed=names,
        terms=tuple(terms),
        frame=None,
        dropped_columns=dropped,
        n_missing=reader.n_missing,
        specs=reader.specs | {"random": [spec for *_, spec in reader.parts], "weights": weights, "offset": offset},
    )
    return stats, labels


def _by_levels(stats: CrossProducts, terms: list) -> tuple[CrossProducts, list]:
    """Terms by decreasing number of levels, ties as written, as :func:`mixjax.build_design` has them."""
    order = sorted(range(len(terms)), key=lambda t: -len(terms[t].levels))
    layout = replace(stats.layout, terms=tuple(stats.layout.terms[t] for t in order))
    bases = tuple(stats.Z_bases[t] for t in order)
    return replace(stats, Z_bases=bases, layout=layout), [terms[t] for t in order]


def _bar(source: Iterator[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return source
    try:
        from tqdm.auto import tqdm
    except ImportError as error:
        raise ImportError("a progress bar needs tqdm: pip install 'mixjax[progress]'") from error
    return tqdm(source, unit="chunk")
