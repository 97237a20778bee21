"""Tables that come in chunks: rows and names of each, with levels, categories and columns that all chunks share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from numbers import Number
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_numeric_dtype

from mixjax.checks import DataError, FormulaError, some_of, warn
from mixjax.covariance import Covariance
from mixjax.design import Chunk, TermLabels
from mixjax.formula.build import columns_read, computed_with, hardly_factors, read_formula, with_contrasts
from mixjax.formula.checks import check_structure
from mixjax.formula.evaluate import Learnt, columns_of, numbers
from mixjax.formula.parse import Group
from mixjax.formula.reading import column_names, to_pandas
from mixjax.formula.state import FormulaState, kinds_of
from mixjax.formula.syntax import Expression
from mixjax.formula.syntax import column as column_of
from mixjax.formula.table import (
    TextColumn,
    as_numbers,
    check_finite,
    is_text,
    level_name,
    refuse_dates,
    refuse_numbers_among_levels,
    refuse_numbers_among_text,
    refuse_unknown,
)

INTERCEPT = "Intercept"


def is_stream(data: Any) -> bool:
    """Whether ``data`` is a source of tables and not one table.

    Raises:
        DataError: a list of what is no table: records, numbers, texts.
    """
    if isinstance(data, str | Path) or _is_dask(data) or _is_dataset(data):
        return True
    if isinstance(data, list | tuple) and any(_is_no_table(part) for part in data):
        raise DataError(
            f"a {type(data).__name__} of {type(next(filter(_is_no_table, data))).__name__} is no table: "
            "pandas.DataFrame(rows) makes one of records; of chunks each must be a table"
        )
    return isinstance(data, list | tuple | Iterator) or (
        isinstance(data, Iterable) and not isinstance(data, Mapping) and not hasattr(data, "columns")
        and not hasattr(data, "column_names") and not hasattr(data, "dtype")
    )  # fmt: skip


def _is_no_table(part: Any) -> bool:
    """A number, a text, or a record: a mapping whose values are those of one row."""
    if isinstance(part, Mapping):
        return bool(part) and all(np.ndim(value) == 0 for value in part.values())
    return part is None or isinstance(part, str | bytes | Number | np.generic)


def can_repeat(source: Any) -> bool:
    """Whether a source of tables can be read twice."""
    return not isinstance(source, Iterator)


def tables(source: Any, columns: list[str] | None = None) -> Iterator[Any]:
    """The tables of a source: an iterable of tables, a parquet file or folder, a pyarrow dataset, a dask data frame.

    Args:
        columns: what is needed, for sources that can read less; None for all.
    """
    if isinstance(source, str | Path):
        try:
            import pyarrow.dataset
        except ImportError as error:
            raise ImportError("reading parquet files needs pyarrow: pip install 'mixjax[parquet]'") from error
        if not str(source) or not Path(source).exists():
            raise DataError(f"there is no file or folder '{source}'")
        try:
            source = pyarrow.dataset.dataset(source)
        except pyarrow.ArrowInvalid as error:
            raise DataError(
                f"'{source}' is no parquet file, and files of other kinds are not read here: read it first, such as by "
                f"pandas.read_csv({str(source)!r})"
            ) from error
    if _is_dataset(source):
        import pyarrow

        names = None if columns is None else [name for name in columns if name in source.schema.names]
        yield from (pyarrow.Table.from_batches([batch]) for batch in source.to_batches(columns=names))
    elif _is_dask(source):
        if columns is not None:
            source = source[[name for name in columns if name in source.columns]]
        yield from (source.get_partition(i).compute() for i in range(source.npartitions))
    elif isinstance(source, Iterable):
        yield from source
    else:
        raise DataError(f"rows come in chunks from an iterable of tables or a file, not from {type(source).__name__}")


def _is_dask(source: Any) -> bool:
    return hasattr(source, "get_partition") and hasattr(source, "npartitions")


def _is_dataset(source: Any) -> bool:
    return hasattr(source, "to_batches") and hasattr(source, "schema") and not hasattr(source, "column_names")


class ChunkReader:
    """Reads chunk after chunk in the terms of one formula.

    What a chunk cannot know of the others is settled before: the columns by the first chunk, the categories by what is
    given, a first pass, or the first chunk. Levels of grouping factors may appear in any chunk.

    Args:
        formula: as text. first: the first table. weights, offset: names of columns, or None.
        contrasts, caller, trusted: as in :func:`mixjax.build_design`, ``context``.
    """

    def __init__(
        self,
        formula: str,
        first: Any,
        weights: str | None,
        offset: str | None,
        contrasts: Mapping[str, str],
        caller: Mapping[str, Any],
        trusted: bool,
    ):
        available = column_names(first)
        self.parsed, self.context = read_formula(formula, available, caller, trusted, first)
        if any(part.kernel for part in self.parsed.random):
            raise FormulaError("correlations by distance need the rows themselves, a whole table: chunks are summed up")
        if any(part.known for part in self.parsed.random):
            raise FormulaError(
                f"{formula!r} has levels with a known covariance (propto), whose eigenvectors all rows together give: "
                "read the table as a whole"
            )
        if self.parsed.smooths:
            raise FormulaError(
                f"{formula!r} has a smooth, whose knots all rows together give: read the table as a whole, or write "
                "bs(x, knots = [...])"
            )
        if not self.parsed.random:
            raise FormulaError(f"{formula!r} has no random term such as (1 | g)")
        self.weights, self.offset, self.contrasts = weights, offset, contrasts
        self.used, arrays = columns_read(self.parsed, available, caller, first)
        if arrays:
            refuse_unknown(arrays[0], available, "the rows come in chunks, and arrays beside them do not")
        self.computed = computed_with(self.parsed)
        for extra, what in ((weights, "weights="), (offset, "offset=")):
            if extra is None:
                continue
            if not isinstance(extra, str):
                raise DataError(f"{what} must be the name of a column when the rows come in chunks")
            if extra not in available:
                refuse_unknown(extra, available, what)
            self.used, self.computed = [*self.used, extra], [*self.computed, extra]
        self.numeric = [*dict.fromkeys(n for e in self.parsed.predictors for n in e.columns), *self.computed]
        self.effects = list(dict.fromkeys(name for e in self.parsed.effects for name in e.columns))
        self.categories: dict[str, list[Any]] = {}
        self.n_rows, self.n_missing = 0, 0
        self.missing: dict[str, int] = {}
        self.truths: dict[str, bool] = {}
        self.groups = {part.group.name: Levels(part.group) for part in self.parsed.random}

    def categorical_columns(self, table: Any) -> list[str]:
        """Columns that the effects read as categories: text, categories, truth values, or numbers inside ``C(...)``."""
        made = {e.factor_of for e in self.parsed.effects}
        frame = to_pandas(table, self.effects)
        refuse_numbers_among_text(frame, [name for name in hardly_factors(self.parsed, {}) if name in frame])
        refuse_dates(frame, self.effects)
        return [n for n in self.effects if n in made or frame[n].dtype == bool or not is_numeric_dtype(frame[n])]

    def begin(self, first: Any, categories: Mapping[str, list[Any]]) -> None:
        """Settle the columns by the first table and the categories of all tables."""
        self.categories = dict(categories)
        own = to_pandas(first, [name for name in hardly_factors(self.parsed, {}) if name in self.categories])
        for name in own:
            if is_text(own[name]):
                refuse_numbers_among_levels(str(name), self.categories[str(name)])
        for levels in self.groups.values():
            levels.take(self.categories)
        frame = self.frame(first, count=False)
        if not len(frame):
            missing = to_pandas(first, self.used).isna().sum()
            counts = some_of([f"{name} {missing[name]}" for name in self.used if missing[name]])
            raise DataError(f"the first chunk has no complete row (missing: {counts}): put another one first")
        self.parsed = with_contrasts(self.parsed, frame, self.contrasts, self.context)
        self.fixed = columns_of(self.parsed.fixed, frame, self.context, several=False)[1]
        self.parts = [
            (part, columns_of(block, frame, self.context, several=False)[1])
            for part in self.parsed.random
            for block in part.blocks()
        ]
        for part, columns in self.parts:
            check_structure(part.structure, columns, f"{columns.effects} | {part.group.name}")
        for columns in (self.fixed, *(columns for _, columns in self.parts)):
            for e in columns.effects.expressions:
                self._refuse_state(e, columns.learnt[e.shown])
        for e in (self.parsed.response, *self.parsed.offsets):
            self._refuse_state(e, numbers(e, frame, self.context, "response")[1])
        # Columns of one name are one column, whichever part of the formula asks for it.
        self.names = list(dict.fromkeys([*self.fixed.names, *(n for _, columns in self.parts for n in columns.names)]))
        self.kinds = kinds_of(frame, self.parsed)
        self.plain = all(name == INTERCEPT or self.kinds.get(name) == np.float64 for name in self.names)

    def _refuse_state(self, e: Expression, learnt: Learnt) -> None:
        if any(not isinstance(state, dict) or state for state in learnt.state.values()) or not learnt.alone:
            raise FormulaError(
                f"'{e}' depends on all rows (means, knots), which chunks do not show; compute such columns beforehand"
            )

    def frame(self, table: Any, count: bool = True) -> pd.DataFrame:
        """The used columns of a chunk, complete rows only."""
        available = column_names(table)
        for name in self.used:
            if name not in available:
                refuse_unknown(name, available, "in one of the chunks")
        frame = to_pandas(table, self.used)
        refuse_dates(frame, self.numeric)
        missing = frame.isna()
        if missing.to_numpy().any():
            complete = ~missing.any(axis=1)
            frame = frame[complete]
            if count:
                self.n_missing += int((~complete).sum())
                for column, k in missing.sum().items():
                    self.missing[str(column)] = self.missing.get(str(column), 0) + int(k)
        if count:
            self.n_rows += len(missing)
        self._refuse_truths_among_numbers(frame)
        frame = as_numbers(frame, self.computed)
        check_finite(frame)
        for name in self.effects if len(frame) else ():
            # Readers of csv files decide chunk by chunk: one cell makes text of what was numbers in the first chunk.
            if name not in self.categories and is_text(frame[name]):
                raise DataError(f"in one of the chunks, column '{name}' holds {TextColumn(frame[name]).content()}")
        for name, values in self.categories.items():
            codes = pd.Index(values).get_indexer(pd.Index(frame[name]))
            if (codes < 0).any():
                new = frame[name][codes < 0].iloc[0]
                raise DataError(
                    f"column '{name}' has the value {new!r}, which is not among its {len(values)} categories; pass "
                    f"categories={{'{name}': [...]}} with all of them, or a source that can be read twice"
                )
            frame = frame.assign(**{name: pd.Categorical.from_codes(codes, categories=pd.Index(values))})
        return frame

    def _refuse_truths_among_numbers(self, frame: pd.DataFrame) -> None:
        for name in self.used if len(frame) else ():
            true = pd.api.types.is_bool_dtype(frame[name].infer_objects())
            if self.truths.setdefault(name, true) != true:
                raise DataError(
                    f"column '{name}' holds truth values in one chunk and others in another: make numbers, or truth "
                    "values, of all of them"
                )

    def rows(self, table: Any) -> Chunk:
        """One chunk as arrays."""
        frame = self.frame(table)
        if not len(frame):
            return Chunk(np.zeros((0, len(self.names))), np.zeros(0), None, [])
        y = self._numbers(self.parsed.response, frame, "response")
        for e in (*self.parsed.offsets, *([] if self.offset is None else [column_of(self.offset)])):
            y = y - self._numbers(e, frame, "offset")
        sqrt_w = None
        if self.weights is not None:
            w = self._numbers(column_of(self.weights), frame, "weights")
            if not (w > 0).all():
                raise DataError(f"weights must be positive, but {int((w <= 0).sum())} of a chunk's are not")
            sqrt_w = np.sqrt(w)
        return Chunk(self._columns(frame), y, sqrt_w, [levels.codes(frame) for levels in self.groups.values()])

    def _numbers(self, e: Expression, frame: pd.DataFrame, what: str) -> np.ndarray:
        return numbers(e, frame, self.context, what)[0]

    def _columns(self, frame: pd.DataFrame) -> np.ndarray:
        columns = np.empty((len(frame), len(self.names)), order="F")
        if self.plain:
            for j, name in enumerate(self.names):
                columns[:, j] = 1.0 if name == INTERCEPT else frame[name].to_numpy(float)
            return columns
        have: dict[str, np.ndarray] = {}
        for part in (self.fixed, *(columns for _, columns in self.parts)):
            if not set(part.names) <= set(have):
                have |= dict(zip(part.names, part.of(frame, " of one of the chunks").T, strict=True))
        for j, name in enumerate(self.names):
            columns[:, j] = have[name]
        return columns

    def terms(self) -> list[tuple[list[int], int, str | Covariance]]:
        """Per random term its columns among ``names``, its grouping factor, and its covariance structure."""
        factors = list(self.groups)
        return [
            ([self.names.index(n) for n in columns.names], factors.index(part.group.name), part.structure)
            for part, columns in self.parts
        ]

    def labels(self) -> list[TermLabels]:
        """Names of the random terms; levels in their final order."""
        levels = {name: tuple(group.names()) for name, group in self.groups.items()}
        for name, own in levels.items():
            if len(own) < 2:
                raise DataError(f"grouping factor '{name}' has one level; a variance between levels needs two or more")
        return [TermLabels(part.group.name, columns.names, levels[part.group.name]) for part, columns in self.parts]

    def state(self, kept: np.ndarray, order: list[int]) -> FormulaState:
        """The formula as a function of new rows.

        Args:
            kept: which columns of the fixed effects are in the fit. order: of the random terms.
        """
        return FormulaState(
            parsed=self.parsed,
            fixed=self.fixed,
            kept=np.asarray(kept, bool),
            random=tuple(self.parts[t][1] for t in order),
            offsets=tuple((e, Learnt({})) for e in self.parsed.offsets),
            weights=self.weights,
            offset=self.offset,
            offset_beside=False,
            contrasts=dict(self.contrasts),
            context=self.context,
            kinds=self.kinds,
            levels={name: group.parts() for name, group in self.groups.items()},
        )

    def report(self) -> None:
        """Checks of all chunks together: rows that were left out, and factors of one level, which are refused."""
        for name, values in self.categories.items():
            if len(values) < 2:
                raise DataError(f"the factor '{name}' has one level ({values[0]!r}): leave it out of the formula")
        if self.n_missing:
            counts = ", ".join(f"{name} {k}" for name, k in self.missing.items() if k)
            warn(f"{self.n_missing} of {self.n_rows} rows left out because of missing values ({counts})")


def find_categories(source: Iterable[Any], columns: list[str]) -> dict[str, list[Any]]:
    """All categories of the columns over all tables: in the order of a categorical column, else sorted."""
    ordered: dict[str, list[Any]] = {name: [] for name in columns}
    found: dict[str, set[Any]] = {name: set() for name in columns}
    for table in source:
        available = column_names(table)
        for name in columns:
            if name not in available:
                refuse_unknown(name, available, "in one of the chunks")
        frame = to_pandas(table, columns)
        for name in columns:
            column = frame[name]
            if isinstance(column.dtype, pd.CategoricalDtype):
                ordered[name] += [value for value in column.cat.categories if value not in ordered[name]]
            found[name] |= set(column.dropna().unique())
    return {
        name: [v for v in ordered[name] if v in found[name]] + sorted(v for v in found[name] if v not in ordered[name])
        for name in columns
    }


class Levels:
    """Levels of one grouping factor, numbered in the order in which chunks show them."""

    def __init__(self, group: Group):
        self.group = group
        self.values = [pd.Index([]) for _ in group.columns]  # of every column
        # Categories, where a column has an order of its own.
        self.ordered: list[list[Any]] = [[] for _ in group.columns]
        self.combinations = [pd.Index([], dtype=np.int64) for _ in group.columns[1:]]

    @property
    def n(self) -> int:
        """Number of levels so far."""
        return len(self.combinations[-1] if self.combinations else self.values[0])

    def take(self, categories: Mapping[str, list[Any]]) -> None:
        """All levels of a factor of one column where they are said, also those that no row will show."""
        (column, *others) = self.group.columns
        if column in categories and not others:
            self.values[0], self.ordered[0] = pd.Index(categories[column]), list(categories[column])

    def codes(self, frame: pd.DataFrame) -> np.ndarray:
        """The level of every row; new ones get the next numbers."""
        codes = self._codes_of(0, frame)
        for k in range(1, len(self.values)):
            both = codes.astype(np.int64) << 32 | self._codes_of(k, frame)
            own, values = pd.factorize(both)
            codes, self.combinations[k - 1] = _number(own, values, self.combinations[k - 1])
        return codes

    def _codes_of(self, k: int, frame: pd.DataFrame) -> np.ndarray:
        column = frame[self.group.columns[k]]
        if isinstance(column.dtype, pd.CategoricalDtype):
            categories = column.cat.categories
            self.ordered[k] += [value for value in categories if value not in set(self.ordered[k])]
            own, used = pd.factorize(column.cat.codes)
            codes, self.values[k] = _number(own, np.asarray(categories, object)[used], self.values[k])
        else:
            own, values = pd.factorize(column)
            known = self.values[k]
            if len(known) and len(values) and isinstance(values[0], str) != isinstance(known[0], str):
                text = values[0] if isinstance(values[0], str) else known[0]
                raise DataError(
                    f"column '{self.group.columns[k]}' holds text in one chunk ({text!r}) and numbers in another: read "
                    "it as one of the two in all chunks"
                )
            codes, self.values[k] = _number(own, values, known)
        return codes

    def order(self) -> np.ndarray:
        """Numbers of the levels in their final order: that of the categories, else sorted; the first column slowest."""
        ranks = []
        for values, ordered in zip(self.values, self.ordered, strict=True):
            position = {value: i for i, value in enumerate(ordered)}
            if position:
                ranks.append(np.array([position.get(value, len(position)) for value in values]))
            else:
                rank = np.empty(len(values), np.int64)
                rank[values.argsort()] = np.arange(len(values))
                ranks.append(rank)
        return np.lexsort([rank[own] for rank, own in zip(ranks, self._columns(), strict=True)][::-1])

    def names(self) -> list[str]:
        """Names of the levels in their final order."""
        return [":".join(names) for names in self.parts()]

    def parts(self) -> np.ndarray:
        """``(m, columns)`` names of the values that make each level, in their final order."""
        columns = [values[own] for values, own in zip(self.values, self._columns(), strict=True)]
        order = self.order()
        return np.array([[level_name(value) for value in column[order]] for column in columns], object).T

    def _columns(self) -> list[np.ndarray]:
        """Per column the number of the value that every level has there."""
        columns: list[np.ndarray] = []
        own = np.arange(self.n)
        for combination in reversed(self.combinations):
            both = combination.to_numpy()[own]
            columns.append(both & 0xFFFFFFFF)
            own = both >> 32
        return [own, *reversed(columns)]


def _number(own: np.ndarray, values: Any, known: pd.Index) -> tuple[np.ndarray, pd.Index]:
    """Codes among the known values, to which new ones are added."""
    values = pd.Index(values)
    if not len(known):
        return own.astype(np.int32), values
    at = known.get_indexer(values)
    new = at < 0
    if new.any():
        at[new] = len(known) + np.arange(new.sum())
        known = known.append(values[new])
    return at[own].astype(np.int32), known
