"""Columns of a model: that they are there, complete rows, numbers that are numbers; levels."""

from __future__ import annotations

import datetime
import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NoReturn, TypeVar

import numpy as np
import pandas as pd

from mixjax.checks import DataError, warn
from mixjax.formula.reading import EXACT, as_column

# Text with more distinct values than MANY is hardly a factor where a share MOSTLY of them are numbers.
MANY, MOSTLY = 20, 0.8
# Columns by name, each a Series, all with the same index.
Table = TypeVar("Table", pd.DataFrame, dict[str, pd.Series])
DECIMAL_COMMA = re.compile(r"\s*[+-]?(?:\d{1,3}(?:\.\d{3})+|\d*),\d+(?:[eE][+-]?\d+)?\s*")
THOUSANDS = re.compile(r"\s*[+-]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?\s*")


def refuse_unknown(
    name: str, available: list[str], where: str, data: Any = None, lacking: str = "there is no column"
) -> NoReturn:
    """Raise DataError for a name that is no column, with the nearest ones that are."""
    name = str(name)
    if isinstance(data, pd.DataFrame) and name in data.index.names:
        raise DataError(f"'{name}' ({where}) is a level of the index, not a column: pass data.reset_index()")
    # Another case is the likeliest slip, and to difflib 'RT' and 'rt' have nothing in common.
    close = [column for column in available if column.casefold() == name.casefold()]
    if not close:
        folded = list(dict.fromkeys(column.casefold() for column in available))
        nearest = difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)
        close = [column for near in nearest for column in available if column.casefold() == near]
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"columns: {', '.join(available)}"
    raise DataError(f"{lacking} '{name}' ({where}); {hint}")


def row_column(name: str, values: Any, index: pd.Index | None, n: int) -> pd.Series:
    """Values given beside the table, of any make, as a column of the types of a table's, row by row.

    A pandas Series whose index holds the table's labels in another order is lined up with it; other labels are
    refused, for nobody can tell whether position or label was meant.

    Args:
        name: for messages. values: array, list or Series. index: of the table, or None where it has none.
        n: rows of the table.
    """
    if isinstance(values, pd.Series) and index is not None and not values.index.equals(index):
        same = len(values) == n and values.index.is_unique and index.is_unique and index.isin(values.index).all()
        if len(values) == n and not same:
            raise DataError(f"the index of {name} differs from the table's; pass its .to_numpy() to go by position")
        values = values.reindex(index) if same else values
    column = as_column(name, values)
    if len(column) != n:
        raise DataError(f"{name} has shape ({len(column)},), but the table has {n} rows")
    return column if index is None else column.set_axis(index)


def row_values(name: str, values: Any, index: pd.Index | None, n: int, numbers: bool = True) -> Any:
    """The same as an array ``(n,)``; ``numbers`` says that it must be one of floats: truth values are 0 and 1."""
    if isinstance(values, str):
        raise DataError(f"{name} must be numbers, one for each of the {n} rows, got {values!r}")
    if type(values) is np.ndarray and values.dtype == np.float64 and values.shape == (n,):
        return values.copy()  # what all else becomes
    column = row_column(name, values, index, n)
    if not numbers:
        return column.to_numpy()
    first = _first(column)
    if column.dtype == object and (first is None or isinstance(first, bool)):
        column = column.astype(float)  # missing truth values
    if column.dtype.kind not in "biuf":
        raise DataError(f"{name} must be numbers, but holds {content(column)}")
    return _floats(name, column).to_numpy()


DAYS = "make numbers of them first, for example days: "
CURES = {
    "M": DAYS + "t = pandas.to_datetime(data['{0}']); (t - t.min()) / pandas.Timedelta(days=1)",
    "m": DAYS + "pandas.to_timedelta(data['{0}']) / pandas.Timedelta(days=1)",
    "period": "make numbers of them first, for example data['{0}'].dt.year",
    "time": "make numbers of them first, for example hours: data['{0}'].map(lambda t: t.hour + t.minute / 60)",
}


def refuse_dates(frame: Table, names: Iterable[str]) -> None:
    """Dates have no zero and no unit: a model needs numbers, and only the user knows which."""
    for name in names:
        if kind := _kind_of_date(frame[name]):
            raise DataError(f"column '{name}' holds {content(frame[name])}; {CURES[kind].format(name)}")


def _kind_of_date(column: pd.Series) -> str | None:
    """M: a moment, m: a duration, period, time of day; None for any other column."""
    if isinstance(column.dtype, pd.PeriodDtype):
        return "period"
    if column.dtype.kind in "mM":
        return column.dtype.kind
    first = _first(column) if column.dtype == object else None
    kinds: dict[str, Any] = {
        "M": datetime.date | np.datetime64,
        "m": datetime.timedelta | np.timedelta64,
        "period": pd.Period,
        "time": datetime.time,
    }
    return next((kind for kind, types in kinds.items() if isinstance(first, types)), None)


def content(column: pd.Series) -> str:
    """The contents of a column that is no number, as the end of a sentence."""
    if is_text(column) and _kind_of_date(column) is None:
        return TextColumn(column).content()
    return f"{type(_first(column)).__name__ if column.dtype == object else column.dtype} values"


def is_text(column: pd.Series) -> bool:
    """Strings, or Python objects of any kind; not categories, which somebody has declared to be names."""
    return pd.api.types.is_object_dtype(column.dtype) or pd.api.types.is_string_dtype(column.dtype)


class TextColumn:
    """A column of text that may have been meant as numbers.

    One cell that is no number makes text of a whole column, and formulaic takes text for a factor. Values are judged
    once each, rows are counted.
    """

    def __init__(self, column: pd.Series):
        self.column = column
        self._codes, values = pd.factorize(column)
        self.values = np.array([str(value) for value in values], object)

    @cached_property
    def _numbers(self) -> np.ndarray:
        numbers: np.ndarray = ~np.isnan(np.asarray(pd.to_numeric(self.values, errors="coerce"), float))
        return numbers

    @cached_property
    def _commas(self) -> np.ndarray:
        """Values that are numbers but for a comma."""
        commas: np.ndarray = ~self._numbers & self._each(
            lambda value: DECIMAL_COMMA.fullmatch(value) or THOUSANDS.fullmatch(value)
        )
        return commas

    def _each(self, holds: Callable[[str], Any]) -> np.ndarray:
        return np.array([bool(holds(value)) for value in self.values], bool)

    def only_numbers(self) -> bool:
        """Whether every value is a number."""
        return bool(self._numbers.all())

    def mostly_numbers(self) -> bool:
        """Whether most values are numbers, with commas or without."""
        return len(self.values) > 0 and float((self._numbers | self._commas).mean()) >= MOSTLY

    def content(self) -> str:
        """The contents of the column, as the end of a sentence: where it is no number, and how to make it one."""
        points = self._numbers & self._each(lambda value: "." in value)
        if self._commas.sum() > points.sum():
            first = self._first(self._commas)
            if all(THOUSANDS.fullmatch(value) for value in self.values[self._commas]):  # 1,234 may be either
                return (
                    f"numbers with commas (first: {first}): read the file with pandas.read_csv(..., thousands=',') if "
                    "they separate thousands, decimal=',' if they are decimal commas"
                )
            return f"numbers with decimal commas (first: {first}): read the file with pandas.read_csv(..., decimal=',')"
        if self.only_numbers():
            return f"numbers as text (first: {self._first(self._numbers)}): use pandas.to_numeric(...)"
        if not self._numbers.any():
            return f"text (first: {self._first(~self._numbers)}): make numbers of it first"
        text = ~self._numbers
        rows = int(text[self._codes[self._codes >= 0]].sum())
        others = "numbers or missing" if (self._codes < 0).any() else "numbers"
        return (
            f"text in {rows} of {len(self.column)} rows (first: {self._first(text)}), all others are {others}: mend "
            "the table, or use pandas.to_numeric(..., errors='coerce') to make such cells missing"
        )

    def _first(self, which: np.ndarray) -> str:
        """The first row with one of the values."""
        at = int(np.flatnonzero((self._codes >= 0) & which[self._codes])[0])
        return f"row {self.column.index[at]}: {self.values[self._codes[at]]!r}"


def refuse_numbers_among_text(frame: Table, names: Iterable[str]) -> None:
    """A cell that cannot be read as a number would make a factor of hundreds of levels of a numeric predictor."""
    for name in names:
        if not is_text(frame[name]):
            continue
        text = TextColumn(frame[name])
        if len(text.values) > MANY and text.mostly_numbers() and not text.only_numbers():
            raise DataError(
                f"column '{name}' holds {text.content()}; if its values are names, make it a category (in the formula: "
                "C(...))"
            )


def refuse_numbers_among_levels(name: str, levels: Sequence[Any]) -> None:
    """The same of a column that comes in chunks, by the values of all of them."""
    names = [level for level in levels if isinstance(level, str)]
    text = TextColumn(pd.Series(names, dtype=object))
    if len(names) == len(levels) and len(names) > MANY and text.mostly_numbers() and not text.only_numbers():
        odd = next(level for level in names if not TextColumn(pd.Series([level], dtype=object)).only_numbers())
        raise DataError(
            f"column '{name}' holds text in some chunk (as {odd!r}), all others are numbers: mend the table, or use "
            "pandas.to_numeric(..., errors='coerce') to make such cells missing; if its values are names, make it a "
            "category (in the formula: C(...))"
        )


def warn_of_numeric_factors(frame: Table, names: Iterable[str]) -> None:
    """Text that is all numbers is a factor, as its few levels may well be codes; with many it is hardly meant so."""
    for name in names:
        if not is_text(frame[name]):
            continue
        text = TextColumn(frame[name])
        if len(text.values) > MANY and text.only_numbers():
            warn(
                f"column '{name}' holds numbers as text and is treated as a factor with {len(text.values)} levels; if "
                f"it is a number, use pandas.to_numeric(data['{name}']); if it is a factor, make it a category (in the "
                "formula: C(...))"
            )


def missing_in(frame: Table) -> dict[str, np.ndarray]:
    """Which rows of each column have no value."""
    return {str(name): _missing(frame[name]) for name in frame}


def _missing(column: pd.Series) -> np.ndarray:
    if column.dtype.kind == "f":
        missing: np.ndarray = np.isnan(column.to_numpy())
        return missing
    return np.zeros(len(column), bool) if column.dtype.kind in "biu" else column.isna().to_numpy()


def complete_rows(frame: Table) -> np.ndarray:
    """Which rows have a value in every column; warns with counts when some do not."""
    missing: Mapping[str, np.ndarray] = missing_in(frame)
    complete: np.ndarray = ~np.logical_or.reduce([*missing.values()])
    n, n_missing = len(complete), int((~complete).sum())
    if n_missing == n and n:
        worst = [name for name, rows in missing.items() if rows.all()]
        columns = f"'{', '.join(worst)}' is missing everywhere" if worst else "no row is complete"
        raise DataError(f"all {n} rows have missing values: {columns}")
    if n_missing:
        warn(f"{n_missing} of {n} rows left out because of missing values ({counts_of(missing)})")
    return complete


def counts_of(missing: Mapping[str, np.ndarray]) -> str:
    """How many rows of which columns have no value, for messages."""
    return ", ".join(f"{name} {int(rows.sum())}" for name, rows in missing.items() if rows.any())


def selected(frame: Mapping[str, pd.Series], rows: np.ndarray) -> dict[str, pd.Series]:
    """These rows of columns."""
    return dict(frame) if rows.all() else {name: column[rows] for name, column in frame.items()}


def check_finite(frame: Table) -> None:
    """Raise DataError naming a numeric column with infinite values."""
    for name in frame:
        column = frame[name]
        if column.dtype.kind == "f" and np.isinf(column.to_numpy()).any():
            rows = np.flatnonzero(np.isinf(column.to_numpy()))
            raise DataError(
                f"column '{name}' has {len(rows)} infinite values (first in row {column.index[rows[0]]}); "
                "replace them, or make them missing to leave the rows out"
            )


def as_numbers(frame: Table, names: Iterable[str]) -> Table:
    """The columns that expressions compute with, integers as floats: products of integers overflow without a word.

    Raises:
        DataError: names a column with integers that floats would round.
    """
    whole = [name for name in dict.fromkeys(names) if frame[name].dtype.kind in "iu"]
    return _with(frame, {name: _floats(f"column '{name}'", frame[name]) for name in whole})


def _with(frame: Table, changed: Mapping[str, pd.Series]) -> Table:
    return frame.assign(**changed) if isinstance(frame, pd.DataFrame) else {**frame, **changed}


def _floats(what: str, column: pd.Series) -> pd.Series:
    if column.dtype.kind in "iu":
        values = column.to_numpy()
        large = np.flatnonzero((values > EXACT) | (values < -EXACT))
        if len(large):
            first = f"row {column.index[large[0]]}: {values[large[0]]}"
            raise DataError(
                f"{what} holds integers beyond 2^53 (first: {first}), which a model's floats would round: rescale it, "
                "or make a category of it if they are names"
            )
    return column.astype(float)


def settle(frame: Table) -> Table:
    """Complete rows: truth values are ``bool``, and categories without rows, which make columns of zeros, are gone."""
    settled: dict[str, Any] = {}
    for name in map(str, frame):
        column = frame[name]
        if isinstance(column.dtype, pd.CategoricalDtype):
            codes = column.array.codes
            if not np.bincount(codes[codes >= 0], minlength=len(column.dtype.categories)).all():
                settled[name] = column.cat.remove_unused_categories()
        elif column.dtype == object and isinstance(_first(column), bool):
            settled[name] = column.astype(bool)
    return _with(frame, settled)


def _first(column: pd.Series) -> Any:
    """The first value that is not missing; all of a column of objects are of its kind."""
    at = column.notna().to_numpy().argmax() if len(column) else None
    return None if at is None else column.iloc[at]


def factor_codes(frame: pd.DataFrame, columns: tuple[str, ...]) -> tuple[np.ndarray, list[str]]:
    """Levels of a grouping factor: codes ``(n,)`` and names.

    Order as in R: the categories' own order, else sorted; of an interaction, the first column varies slowest.
    """
    codes, parts = combinations(frame, columns)
    return codes, [":".join(names) for names in parts]


def levels_of(frame: pd.DataFrame, columns: tuple[str, ...]) -> np.ndarray:
    """``(k, m)`` names of the values in m columns that make each of the k levels of :func:`factor_codes`."""
    return combinations(frame, columns)[1]


def combinations(frame: pd.DataFrame, columns: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The codes of :func:`factor_codes` and the names of :func:`levels_of`."""
    codes = np.zeros(len(frame), np.int64)
    names: list[np.ndarray] = []
    for name in columns:
        own, levels = level_names(frame[name])
        names.append(np.array(levels, object))
        codes = codes * len(levels) + own
    possible = math.prod(len(levels) for levels in names)
    if possible <= 4 * len(codes) + 1000:  # counting takes less than sorting
        there = np.bincount(codes, minlength=possible) > 0
        present, codes = np.flatnonzero(there), (np.cumsum(there) - 1)[codes]
    else:
        present, codes = np.unique(codes, return_inverse=True)
    parts = np.empty((len(present), len(columns)), object)
    for j in reversed(range(len(columns))):
        present, which = np.divmod(present, len(names[j]))
        parts[:, j] = names[j][which]
    return codes.reshape(-1).astype(np.int32), parts


def level_names(column: pd.Series) -> tuple[np.ndarray, list[str]]:
    """The values of one column: codes ``(n,)``, -1 for a missing one, and names in order."""
    if isinstance(column.dtype, pd.CategoricalDtype):
        codes, levels = column.array.codes, column.dtype.categories
    else:
        codes, levels = pd.factorize(column, sort=True)
    return codes, [level_name(level) for level in levels]


def level_name(level: Any) -> str:
    """A level's name, one for all types that a value can have: whole numbers without decimals, days without a time."""
    if isinstance(level, str):
        return str(level)
    if isinstance(level, np.datetime64 | datetime.datetime):
        moment = pd.Timestamp(level)
        return str(moment.date()) if moment.tz is None and moment == moment.normalize() else str(moment)
    if isinstance(level, np.timedelta64 | datetime.timedelta):
        return str(pd.Timedelta(level))
    level = level.item() if isinstance(level, np.generic) else level
    return str(int(level)) if isinstance(level, float) and level.is_integer() else str(level)
