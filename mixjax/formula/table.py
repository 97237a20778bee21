"""Tables of any make -> the pandas columns that a model uses, complete rows only."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from functools import cached_property
from typing import Any, NoReturn

import numpy as np
import pandas as pd

from mixjax.formula.errors import DataError, warn

# Text with more distinct values than MANY is hardly a factor where a share MOSTLY of them are numbers.
MANY, MOSTLY = 20, 0.8
DECIMAL_COMMA = re.compile(r"\s*[+-]?(?:\d{1,3}(?:\.\d{3})+|\d*),\d+(?:[eE][+-]?\d+)?\s*")
THOUSANDS = re.compile(r"\s*[+-]?[1-9]\d{0,2}(?:,\d{3})+(?:\.\d*)?\s*")


def column_names(data: Any) -> list[str]:
    """Column names of a pandas, polars or pyarrow table or a mapping of arrays."""
    if isinstance(data, Mapping):
        return [str(name) for name in data]
    if hasattr(data, "collect_schema"):  # polars
        return list(data.collect_schema().names())
    names = getattr(data, "column_names", None)  # pyarrow
    if names is None:
        names = getattr(data, "columns", None)
    if names is None:
        raise DataError(
            f"data must be a pandas, polars or pyarrow table or a dict of arrays, got {type(data).__name__}"
        )
    return [str(name) for name in names]


def to_pandas(data: Any, columns: Iterable[str]) -> pd.DataFrame:
    """The named columns as pandas; categories and their order are kept. A single value in a dict holds for all rows."""
    columns = list(dict.fromkeys(columns))
    if isinstance(data, pd.DataFrame):
        frame = data.set_axis(data.columns.map(str), axis=1).loc[:, columns].copy()
        if frame.columns.has_duplicates:
            twice = sorted(set(frame.columns[frame.columns.duplicated()]))
            raise DataError(f"the table has more than one column named {', '.join(map(repr, twice))}")
        return _numbers_as_numbers(frame)
    if isinstance(data, Mapping):
        data = _single_values_in_all_rows(data, columns)
        lengths = {name: np.shape(data[name]) for name in columns}
        if len({shape[:1] for shape in lengths.values()}) > 1:
            raise DataError(f"columns of different length: {', '.join(f'{k} {lengths[k]}' for k in sorted(lengths))}")
        return _numbers_as_numbers(pd.DataFrame({name: _one_dimensional(data[name], name) for name in columns}))
    if hasattr(data, "collect") and hasattr(data, "collect_schema"):  # polars LazyFrame
        data = data.select(columns).collect()
    series = {}
    for name in columns:
        column = data[name]
        series[name] = _from_polars(column) if hasattr(column, "to_physical") else column.to_pandas()
    return _numbers_as_numbers(pd.DataFrame(series))


def _numbers_as_numbers(frame: pd.DataFrame) -> pd.DataFrame:
    """Columns of Python objects that are all numbers (or missing) are numeric, whatever made them objects."""
    for name in frame.columns:
        if frame[name].dtype == object:
            kind = pd.api.types.infer_dtype(frame[name], skipna=True)
            if kind in ("integer", "floating", "mixed-integer-float", "decimal"):
                frame[name] = frame[name].astype(float)
    return frame


def _single_values_in_all_rows(data: Mapping, columns: list[str]) -> dict[str, Any]:
    """The columns, with single strings and numbers repeated as often as there are rows: once where all are single."""
    single = {}
    for name in columns:
        value = data[name]
        if pd.api.types.is_scalar(value):
            single[name] = value
        elif getattr(value, "shape", None) == () and hasattr(value, "item"):  # an array of no dimension
            single[name] = value.item()
    if not single:
        return {name: data[name] for name in columns}
    # Columns that are not asked for, such as a grouping factor in a prediction without it, count rows as well.
    others = [name for name in columns if name not in single] or [name for name in data if name not in columns]
    rows = {np.shape(data[name])[0] for name in others if np.ndim(data[name])}
    if len(rows) > 1:
        raise DataError(f"columns of different length: {', '.join(f'{k} {np.shape(data[k])}' for k in sorted(others))}")
    n = rows.pop() if rows else 1
    return {name: [single[name]] * n if name in single else data[name] for name in columns}


def _one_dimensional(values: Any, name: str) -> Any:
    if isinstance(values, pd.Series | pd.Categorical):
        return values.reset_index(drop=True) if isinstance(values, pd.Series) else values
    array = np.asarray(values)
    if array.ndim != 1:
        raise DataError(f"column '{name}' has shape {array.shape}; it must be one-dimensional")
    if array.dtype.kind == "U" and not isinstance(values, np.ndarray):
        missing = pd.isna(np.asarray(values, object))  # numpy makes the text 'nan' of a NaN among strings
        if missing.any():
            array = array.astype(object)
            array[missing] = None
    return array


def _from_polars(column: Any) -> Any:
    categories = getattr(column.dtype, "categories", None)
    if type(column.dtype).__name__ == "Enum" and categories is not None:
        return pd.Categorical(column.to_list(), categories=list(categories))
    if column.null_count() or type(column.dtype).__name__ == "Categorical":
        return pd.Series(column.to_list())
    return column.to_numpy()


def refuse_unknown(name: str, available: list[str], where: str, data: Any = None) -> NoReturn:
    """Raise DataError for a name that is no column, with the nearest ones that are."""
    if isinstance(data, pd.DataFrame) and name in data.index.names:
        raise DataError(f"'{name}' ({where}) is a level of the index, not a column: pass data.reset_index()")
    # Another case is the likeliest slip, and to difflib 'RT' and 'rt' have nothing in common.
    close = [column for column in available if column.casefold() == name.casefold()]
    if not close:
        folded = list(dict.fromkeys(column.casefold() for column in available))
        nearest = difflib.get_close_matches(name.casefold(), folded, n=3, cutoff=0.5)
        close = [column for near in nearest for column in available if column.casefold() == near]
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"columns: {', '.join(available)}"
    raise DataError(f"there is no column '{name}' ({where}); {hint}")


def row_values(name: str, values: Any, index: pd.Index | None, n: int, numbers: bool = True) -> Any:
    """A column given beside the table, as an array ``(n,)``.

    A pandas Series whose index holds the table's labels in another order is lined up with it; other labels are
    refused, for nobody can tell whether position or label was meant.

    Args:
        name: for messages. values: array, list or Series. index: of the table, or None where it has none.
        n: rows of the table. numbers: turn into floats.
    """
    if isinstance(values, pd.Series) and index is not None and not values.index.equals(index):
        same = len(values) == n and values.index.is_unique and index.is_unique and index.isin(values.index).all()
        if len(values) == n and not same:
            raise DataError(f"the index of {name} differs from the table's; pass its .to_numpy() to go by position")
        values = values.reindex(index) if same else values
    try:
        array = np.asarray(values, dtype=float if numbers else None)
    except (TypeError, ValueError):
        raise DataError(f"{name} must be numbers") from None
    if array.shape != (n,):
        raise DataError(f"{name} has shape {array.shape}, but the table has {n} rows")
    return array


def refuse_dates(frame: pd.DataFrame, names: list[str]) -> None:
    """Dates have no zero and no unit: a model needs numbers, and only the user knows which."""
    for name in names:
        if frame[name].dtype.kind in "mM" or isinstance(frame[name].dtype, pd.DatetimeTZDtype | pd.PeriodDtype):
            raise DataError(
                f"column '{name}' holds {frame[name].dtype} values; make numbers of them first, for example days: "
                f"(data['{name}'] - data['{name}'].min()) / pandas.Timedelta(days=1)"
            )


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
        text = column if isinstance(column.dtype, pd.StringDtype) else column.map(str, na_action="ignore")
        self._codes, values = pd.factorize(text)
        self.values = np.asarray(values, object)

    @cached_property
    def _numbers(self) -> np.ndarray:
        return ~np.isnan(np.asarray(pd.to_numeric(self.values, errors="coerce"), float))

    @cached_property
    def _commas(self) -> np.ndarray:
        """Values that are numbers but for a comma."""
        return ~self._numbers & self._each(lambda value: DECIMAL_COMMA.fullmatch(value) or THOUSANDS.fullmatch(value))

    def _each(self, holds: Callable[[str], Any]) -> np.ndarray:
        return np.array([bool(holds(value)) for value in self.values], bool)

    def only_numbers(self) -> bool:
        """Whether every value is a number."""
        return bool(self._numbers.all())

    def mostly_numbers(self) -> bool:
        """Whether most values are numbers, with commas or without."""
        return len(self.values) > 0 and float((self._numbers | self._commas).mean()) >= MOSTLY

    def content(self) -> str:
        """What the column holds, as the end of a sentence: where it is no number, and how to make it one."""
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


def refuse_numbers_among_text(frame: pd.DataFrame, names: Iterable[str]) -> None:
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


def warn_of_numeric_factors(frame: pd.DataFrame, names: Iterable[str]) -> None:
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


def complete_rows(frame: pd.DataFrame) -> pd.Series:
    """Which rows have a value in every column; warns with counts when some do not."""
    missing = frame.isna()
    complete = ~missing.any(axis=1)
    n_missing = int((~complete).sum())
    if n_missing == len(frame) and len(frame):
        worst = [name for name in frame.columns if missing[name].all()]
        columns = f"'{', '.join(map(str, worst))}' is missing everywhere" if worst else "no row is complete"
        raise DataError(f"all {len(frame)} rows have missing values: {columns}")
    if n_missing:
        counts = ", ".join(f"{name} {int(k)}" for name, k in missing.sum().items() if k)
        warn(f"{n_missing} of {len(frame)} rows left out because of missing values ({counts})")
    return complete


def check_finite(frame: pd.DataFrame) -> None:
    """Raise DataError naming a numeric column with infinite values."""
    for name in frame.columns:
        column = frame[name]
        if pd.api.types.is_float_dtype(column) and np.isinf(column.to_numpy(float)).any():
            rows = np.flatnonzero(np.isinf(column.to_numpy(float)))
            raise DataError(
                f"column '{name}' has {len(rows)} infinite values (first in row {column.index[rows[0]]}); "
                "replace them, or make them missing to leave the rows out"
            )


def drop_unused_categories(frame: pd.DataFrame) -> pd.DataFrame:
    """Categories without rows would give columns of zeros; R drops them too."""
    for name in frame.columns:
        if isinstance(frame[name].dtype, pd.CategoricalDtype):
            frame[name] = frame[name].cat.remove_unused_categories()
    return frame


def factor_codes(frame: pd.DataFrame, columns: tuple[str, ...]) -> tuple[np.ndarray, list[str]]:
    """Levels of a grouping factor: codes ``(n,)`` and names.

    Order as in R: the categories' own order, else sorted; of an interaction, the first column varies slowest.
    """
    codes = np.zeros(len(frame), np.int64)
    parts = []
    for name in columns:
        column = frame[name]
        if isinstance(column.dtype, pd.CategoricalDtype):
            own, levels = column.cat.codes.to_numpy(), column.cat.categories
        else:
            own, levels = pd.factorize(column, sort=True)
        parts.append([level_name(level) for level in levels])
        codes = codes * len(levels) + own
    present, codes = np.unique(codes, return_inverse=True)
    names = [""] * len(present)
    for i in reversed(range(len(parts))):
        present, which = np.divmod(present, len(parts[i]))
        names = [parts[i][w] + (f":{name}" if name else "") for w, name in zip(which, names, strict=True)]
    return codes.reshape(-1).astype(np.int32), names


def level_name(level: Any) -> str:
    """A level's name: whole numbers without decimals."""
    return str(int(level)) if isinstance(level, float) and level.is_integer() else str(level)
