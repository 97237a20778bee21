"""Tables of any make -> pandas columns, each of the type that says what it means."""

from __future__ import annotations

import datetime
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NoReturn

import numpy as np
import pandas as pd

from mixjax.checks import DataError

EXACT = 2**53  # floats tell all integers up to here apart

# --- tables --------------------------------------------------------------------------------------------------------


def column_names(data: Any) -> list[str]:
    """Column names of a pandas, polars or pyarrow table, a mapping of arrays, or a structured array."""
    if isinstance(data, pd.DataFrame) and data.columns.nlevels > 1:
        first = data.columns[0]
        raise DataError(
            f"the table's columns have names of {data.columns.nlevels} levels, such as {first}: make one of them, "
            "data.columns = ['_'.join(map(str, name)) for name in data.columns]"
        )
    if isinstance(data, Mapping):
        names: Any = data
    elif isinstance(data, np.ndarray) and data.dtype.names and data.ndim == 1:
        names = data.dtype.names
    elif hasattr(data, "collect_schema"):  # polars
        names = data.collect_schema().names()
    else:
        names = getattr(data, "column_names", None)  # pyarrow
        names = getattr(data, "columns", None) if names is None else names
    if names is None or callable(names):
        _refuse_table(data)
    return [str(name) for name in names]


def _refuse_table(data: Any) -> NoReturn:
    raise DataError(
        "data must be a pandas, polars or pyarrow table, a dict of arrays or a structured array, got "
        f"{type(data).__name__}"
    )


def to_pandas(data: Any, columns: Iterable[str]) -> pd.DataFrame:
    """The named columns of any table, each of the type that says what it means (:func:`as_column`).

    Args:
        data: pandas, polars or pyarrow table (any that hands out Arrow data), structured array, or dict of arrays,
            where a single value holds for all rows.
        columns: names; other columns are not looked at.

    Raises:
        DataError: names the column that is none, is there twice, or holds what no model can use.

    Example:
        >>> to_pandas({"dose": np.array([1, 2], "int8"), "ward": ["a", None]}, ["dose", "ward"]).dtypes.to_dict()
        {'dose': dtype('int64'), 'ward': dtype('O')}
    """
    series, index = read_columns(data, columns)
    return pd.DataFrame(series, index=index, copy=True)


def read_columns(data: Any, columns: Iterable[str]) -> tuple[dict[str, pd.Series], pd.Index]:
    """The same column by column, which may share the memory of the table's; and the labels of the rows."""
    columns, names = list(dict.fromkeys(columns)), column_names(data)
    twice = sorted(name for name in columns if names.count(name) > 1)
    if twice:
        raise DataError(f"the table has more than one column named {', '.join(map(repr, twice))}")
    index = data.index if isinstance(data, pd.DataFrame) else None
    if isinstance(data, Mapping):
        read, n = _of_equal_length({str(name): values for name, values in data.items()}, columns)
    else:
        data = data if isinstance(data, pd.DataFrame | np.ndarray) else _eager(data, columns or names[:1])
        plain = index is None or all(name in data.columns for name in columns)
        read = {name: data[name] if plain else data.iloc[:, names.index(name)] for name in columns}
        n = len(data)
    index = pd.RangeIndex(n) if index is None else index
    return {name: as_column(f"column '{name}'", values, index) for name, values in read.items()}, index


def _eager(data: Any, columns: list[str]) -> Any:
    """A polars or pyarrow table."""
    data = data.to_native() if hasattr(data, "to_native") else data  # narwhals
    if hasattr(data, "collect_schema"):  # polars
        data = data.select(columns)
        return data.collect() if hasattr(data, "collect") else data
    if hasattr(data, "column_names"):
        return data
    if not hasattr(data, "__arrow_c_stream__"):
        _refuse_table(data)
    import pyarrow

    return pyarrow.table(data)


def _of_equal_length(data: dict[str, Any], columns: list[str]) -> tuple[dict[str, Any], int]:
    """The columns and their length; single values stand in all rows, in one where all are single."""
    read = {
        name: np.asarray(data[name])[()] if getattr(data[name], "shape", None) == () else data[name] for name in columns
    }
    single = [name for name in columns if pd.api.types.is_scalar(read[name])]
    read |= {name: as_column(f"column '{name}'", read[name]) for name in columns if name not in single}
    # Columns that are not asked for, such as a grouping factor in a prediction without it, count rows as well.
    counted = [name for name in columns if name not in single] or [
        name for name, values in data.items()
        if name not in columns and hasattr(values, "__len__") and not isinstance(values, str | bytes)
        and getattr(values, "shape", None) != ()
    ]  # fmt: skip
    rows = {name: len(read.get(name, data[name])) for name in counted}
    if len(set(rows.values())) > 1:
        each = ", ".join(f"'{name}' ({rows[name]},)" for name in sorted(rows))
        raise DataError(f"the columns of the table have different lengths: {each}")
    n = next(iter(rows.values()), 1)
    return {name: [read[name]] * n if name in single else read[name] for name in columns}, n


# --- types ---------------------------------------------------------------------------------------------------------


def as_column(what: str, values: Any, index: pd.Index | None = None) -> pd.Series:
    """Values of any make as a column of the type that says what they mean.

    * ``bool``: truth values; with missing ones ``object`` of True, False and None (:func:`settle`).
    * ``int64``, or ``uint64`` where that is too small; with missing ones ``float64``.
    * ``float64``: all other numbers: floats of any width, decimals, fractions, complex numbers that are real.
    * ``object``: text; missing is None.
    * ``category``: categories and their order, their values of the types above. Intervals are ordered categories.
    * dates, times, durations, periods: pandas' own type, or ``object`` where it has none.

    Args:
        what: for messages, such as ``"column 'x'"``. values: ``(n,)``, of numpy (masked arrays too), pandas, polars,
            pyarrow, or a list. index: labels of the rows; by default 0, 1, ...

    Raises:
        DataError: says what the values are, where, and what to do.
    """
    if isinstance(values, pd.Series) and index is not None and values.index.is_(index):
        own = _as_it_is(values)
        if own is not None:
            return own
    present, missing = _present(what, values)
    if present.ndim != 1 or missing.ndim != 1:
        raise DataError(f"{what} has shape {np.shape(values)}; it must be one-dimensional")
    index = pd.RangeIndex(len(missing)) if index is None else index
    some = bool(missing.any())
    plain = _plain(what, present, index[~missing] if some else index)
    if some and plain.dtype.kind in "iu":
        if len(plain) and max(-int(plain.min()), int(plain.max())) > EXACT:
            raise DataError(
                f"{what} holds integers beyond 2^53 and missing values, and a float, which can be missing, would round "
                "the integers: leave such rows out, or make text of the integers"
            )
        plain = plain.astype(float)
    if not some:
        column = pd.Series(plain, dtype=plain.dtype)
    elif plain.dtype.kind in "bO" and isinstance(plain, np.ndarray):
        filled = np.full(len(missing), None, object)
        filled[~missing] = plain
        column = pd.Series(filled, dtype=object)
    else:
        at = np.where(missing, -1, np.cumsum(~missing) - 1)
        column = pd.Series(plain, dtype=plain.dtype).reindex(at)
    labelled: pd.Series = column.set_axis(index)
    return labelled


def _as_it_is(column: pd.Series) -> pd.Series | None:
    """A column of pandas' that clearly has one of these types, as most have; None of others."""
    if isinstance(column.dtype, np.dtype):
        return column if column.dtype in (np.float64, np.int64, np.bool_) else None
    categories = column.dtype.categories if isinstance(column.dtype, pd.CategoricalDtype) else None
    if categories is None or pd.api.types.infer_dtype(categories, skipna=False) != "string":
        return None
    if categories.dtype == object:
        return column
    own: Any = column.array
    return pd.Series(own.rename_categories(categories.astype(object)), index=column.index, copy=False)


def _present(what: str, values: Any) -> tuple[Any, np.ndarray]:
    """The values that are there, of whichever type says what they are; and which ``(n,)`` are missing."""
    present: Any
    if isinstance(values, pd.Index | pd.api.extensions.ExtensionArray):
        values = pd.Series(values, dtype=values.dtype)
    if isinstance(values, pd.Series):
        if isinstance(values.dtype, pd.ArrowDtype):
            return _present(what, values.array.__arrow_array__())  # type: ignore[attr-defined]
        if values.dtype.kind == "V":  # of which pandas cannot say what is missing
            return values.to_numpy(), np.zeros(len(values), bool)
        missing = values.isna().to_numpy()
        present = values[~missing] if missing.any() else values
        if isinstance(values.dtype, pd.CategoricalDtype | pd.DatetimeTZDtype | pd.PeriodDtype):
            return present.array, missing
        return present.array if isinstance(values.dtype, pd.IntervalDtype) else present.to_numpy(), missing
    if hasattr(values, "to_physical"):  # polars
        return _present_of_polars(what, values)
    if hasattr(values, "drop_null"):  # pyarrow
        kind = str(values.type)
        values = values.cast(kind.removesuffix("_view")) if kind.endswith("_view") else values
        if kind.startswith("run_end_encoded"):  # which has its nulls inside runs
            import pyarrow.compute

            return _present(what, pyarrow.compute.run_end_decode(values))
        if kind.startswith("dictionary"):
            return _present(what, values.to_pandas())
        present, own = _present(what, values.drop_null().to_pandas(date_as_object=False))
        return present, _with(np.asarray(values.is_null()), own)
    if isinstance(values, np.ma.MaskedArray) and values.ndim == 1:
        present, missing = np.asarray(values.compressed()), np.ma.getmaskarray(values)
        own = pd.isna(present)
        return present[~own], _with(missing, own)
    if isinstance(values, list | tuple):
        # numpy would make text of numbers beside text; list(masked array) holds the mask as values
        values = np.fromiter((None if v is np.ma.masked else v for v in values), object, len(values))
    array = np.asarray(values)
    array = array.astype(object) if array.dtype.kind == "T" else array
    missing = pd.isna(array) if array.dtype.kind in "OfcmM" else np.zeros(array.shape, bool)
    return array[~missing] if missing.any() and array.ndim == 1 else array, missing


def _present_of_polars(what: str, series: Any) -> tuple[Any, np.ndarray]:
    dtype, missing, present = series.dtype, series.is_null().to_numpy(), series.drop_nulls()
    kind = type(dtype).__name__
    if dtype.is_nested():
        raise DataError(f"{what} holds {dtype} values; a model needs numbers, truth values, text or categories")
    if kind == "Enum":
        categories = pd.Index(list(dtype.categories), dtype=object)
        return pd.Categorical.from_codes(present.to_physical().to_numpy(), categories), missing
    if kind == "Categorical":  # without an order of its own: polars numbers the values of all its columns together
        return pd.Categorical(present.to_list()), missing
    values = np.array(present.to_list(), object) if kind in ("Int128", "UInt128") else present.to_numpy()
    if getattr(dtype, "time_zone", None):
        return pd.DatetimeIndex(values).tz_localize("UTC").tz_convert(dtype.time_zone).array, missing
    present, own = _present(what, values)
    return present, _with(missing, own)


def _with(missing: np.ndarray, own: np.ndarray) -> np.ndarray:
    """Rows without a value, and those whose value is none: a table may have both nulls and NaN."""
    missing = missing.copy()
    missing[~missing] = own
    return missing


def _plain(what: str, values: Any, rows: pd.Index) -> Any:
    """Values without missing ones -> an array of one of the types of :func:`as_column`. rows: their labels."""
    if isinstance(values, pd.Categorical):
        return values.rename_categories(_plain_categories(what, values.categories))
    if not isinstance(values, np.ndarray):  # time zones, periods; intervals are ordered
        return pd.Categorical(values, ordered=True) if isinstance(values.dtype, pd.IntervalDtype) else values
    kind = values.dtype.kind
    if kind == "O":
        return _plain_objects(what, values, rows)
    if kind == "u":
        return values.astype(np.uint64 if len(values) and values.max() > np.iinfo(np.int64).max else np.int64)
    if kind == "c":
        unreal = np.flatnonzero(values.imag)
        if len(unreal):
            first = f"row {rows[unreal[0]]}: {values[unreal[0]]}"
            raise DataError(f"{what} holds complex numbers (first: {first}); take their real part, size or angle")
        return values.real.astype(float)
    if kind not in "bifmMU":
        raise _refused(what, "bytes" if kind == "S" else f"{values.dtype} values", values, rows)
    if kind in "mM":
        try:
            return pd.Series(values.astype(values.dtype.newbyteorder("="))).to_numpy()  # in a unit that pandas has
        except (TypeError, ValueError):
            raise DataError(f"{what} holds {values.dtype} values without a unit; make days of them, for one") from None
    return values.astype({"b": bool, "i": np.int64, "f": np.float64, "U": object}[kind], copy=False)


def _plain_categories(what: str, categories: pd.Index) -> Any:
    """Values of categories. Those of several kinds are names, as whoever made a category of them has said."""
    if isinstance(categories, pd.IntervalIndex):
        return categories
    if categories.dtype == object and pd.api.types.infer_dtype(categories, skipna=False) in ("mixed", "mixed-integer"):
        names = [str(value) for value in categories]
        if len(set(names)) < len(names):
            raise DataError(f"{what} has two categories of the same name: {', '.join(map(repr, categories))}")
        return pd.Index(names, dtype=object)
    plain = as_column(f"a category of {what}", categories)
    return pd.Index(plain.array, dtype=plain.dtype)


def _plain_objects(what: str, values: np.ndarray, rows: pd.Index) -> Any:
    kind = pd.api.types.infer_dtype(values, skipna=False)
    if kind == "boolean":
        return values.astype(bool)
    if kind == "integer":
        for dtype in (np.int64, np.uint64):
            try:
                return values.astype(dtype)
            except OverflowError:
                continue
        raise DataError(f"{what} holds integers beyond 2^64; make floats of them, or text if they are names")
    if kind in ("floating", "mixed-integer-float", "decimal"):
        return values.astype(float)
    convert: dict[str, Callable[[Any], Any]] = {
        "datetime": pd.to_datetime, "datetime64": pd.to_datetime, "date": pd.to_datetime, "period": pd.PeriodIndex,
        "timedelta": pd.to_timedelta, "timedelta64": pd.to_timedelta,
    }  # fmt: skip
    if kind in convert:
        try:
            index = convert[kind](values)
        except (ValueError, TypeError, OverflowError):  # several time zones or frequencies, or the year 9999
            return values
        return index.to_numpy() if isinstance(index.dtype, np.dtype) else index.array
    if kind == "interval":
        return pd.Categorical(values, ordered=True)
    return values if kind in ("string", "empty", "time") else _plain_mixture(what, values, rows)


def _plain_mixture(what: str, values: np.ndarray, rows: pd.Index) -> np.ndarray:
    """Objects of several kinds, or of one that pandas has no word for: numbers, dates, or refused."""
    kinds, first, counts = np.unique([_kind(value) for value in values], return_index=True, return_counts=True)
    if list(kinds) == ["numbers"]:
        numbers: np.ndarray = _plain(what, np.array([complex(value) for value in values]), rows)
        return numbers
    if list(kinds) == ["dates or times"]:
        return values
    if {"text", "numbers"} <= set(kinds):
        at = first[list(kinds).index("text")]
        raise DataError(
            f"{what} holds text among numbers (first: row {rows[at]}: {values[at]!r}); use pandas.to_numeric(..., "
            "errors='coerce') to make such cells missing, or make text of all values if they are names"
        )
    odd = int(np.argmin(counts))
    others = " and ".join(kind for kind in kinds if kind != kinds[odd])
    raise _refused(what, kinds[odd] + (f" among {others}" if others else ""), values, rows, int(first[odd]))


def _kind(value: Any) -> str:
    if isinstance(value, bool | np.bool_):
        return "truth values"
    if value is np.ma.masked:  # would pass for 0
        return "masked values"
    if isinstance(
        value, datetime.date | datetime.time | datetime.timedelta | np.datetime64 | np.timedelta64 | pd.Period
    ):
        return "dates or times"
    scalar = value.item() if getattr(value, "shape", None) == () and hasattr(value, "item") else value
    if isinstance(scalar, numbers.Number):
        return "numbers"
    kinds = {str: "text", bytes: "bytes"}
    return next((kind for own, kind in kinds.items() if isinstance(value, own)), f"{type(value).__name__} objects")


def _refused(what: str, holds: str, values: np.ndarray, rows: pd.Index, at: int = 0) -> DataError:
    first = f" (first: row {rows[at]}: {str(values[at])[:40]})" if len(values) else ""
    cure = (
        "decode them, for example with .str.decode('utf-8')"
        if holds == "bytes"
        else ("a column must be all numbers, all truth values, all text, or a category")
    )
    return DataError(f"{what} holds {holds}{first}; {cure}")
