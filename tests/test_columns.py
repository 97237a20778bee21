"""Columns of every make and type mean the same: one dtype, the same values, the same missing ones, the same levels."""

import datetime
import decimal
import fractions
import string

import jax.numpy as jnp
import narwhals as nw
import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mixjax as mj
from mixjax.formula.reading import as_column, column_names, to_pandas
from mixjax.formula.table import (
    as_numbers,
    complete_rows,
    factor_codes,
    level_name,
    level_names,
    levels_of,
    refuse_dates,
    row_column,
    row_values,
    settle,
)

DAY = datetime.date(2024, 5, 1)


def column(data, name="x"):
    return to_pandas(data, [name])[name]


def same(got, expected, dtype):
    """Whether a column has the values, None where they are missing, and the dtype."""
    assert got.dtype == dtype
    assert [None if pd.isna(value) else value for value in got] == expected
    if got.dtype == object:
        assert all(value is None for value in got[got.isna()])


# --- types in containers -----------------------------------------------------------------------------------------

# The types under each container's own names.
INTEGERS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)]
POLARS = {name: getattr(pl, name.replace("uint", "UInt").replace("int", "Int", 1)) for name in INTEGERS}
POLARS |= {"float32": pl.Float32, "float64": pl.Float64, "bool": pl.Boolean, "str": pl.String}
ARROW = {name: pa.type_for_alias(name) for name in [*INTEGERS, "float32", "float64", "bool"]} | {"str": pa.string()}
NULLABLE = {name: name.replace("uint", "UInt").replace("int", "Int", 1) for name in INTEGERS}
NULLABLE |= {"float32": "Float32", "float64": "Float64", "bool": "boolean", "str": "string"}


def masked(values, kind, order="="):
    """A masked array; what lies under the mask is not to be read."""
    mask = np.array([value is None for value in values], bool)
    fill = {"bool": True, "str": "hidden"}.get(kind, 1)
    dtype = np.dtype("U30" if kind == "str" else kind).newbyteorder(order)
    return np.ma.array(np.array([fill if value is None else value for value in values], dtype), mask=mask)


CONTAINERS = {
    "objects": lambda v, kind: pd.DataFrame({"x": pd.Series(v, dtype=object)}),
    "nullable": lambda v, kind: pd.DataFrame({"x": pd.array(v, dtype=NULLABLE[kind])}),
    "arrow-backed": lambda v, kind: pd.DataFrame({"x": pd.Series(v, dtype=pd.ArrowDtype(ARROW[kind]))}),
    "polars": lambda v, kind: pl.DataFrame({"x": pl.Series(v, dtype=POLARS[kind])}),
    "polars lazy": lambda v, kind: pl.LazyFrame({"x": pl.Series(v, dtype=POLARS[kind])}),
    "polars in a dict": lambda v, kind: {"x": pl.Series(v, dtype=POLARS[kind])},
    "pyarrow": lambda v, kind: pa.table({"x": pa.chunked_array([v[:1], v[1:]], ARROW[kind])}),
    "record batch": lambda v, kind: pa.RecordBatch.from_pydict({"x": pa.array(v, ARROW[kind])}),
    "narwhals": lambda v, kind: nw.from_native(pa.table({"x": pa.array(v, ARROW[kind])})),
    "narwhals lazy": lambda v, kind: nw.from_native(pl.LazyFrame({"x": pl.Series(v, dtype=POLARS[kind])})),
    "Arrow stream": lambda v, kind: Stream(pa.table({"x": pa.array(v, ARROW[kind])})),
    "list": lambda v, kind: {"x": list(v)},
    "tuple": lambda v, kind: {"x": tuple(v)},
    "masked": lambda v, kind: {"x": masked(v, kind)},
    "masked, other byte order": lambda v, kind: {"x": masked(v, kind, ">")},
    "masked records": lambda v, kind: np.ma.array(
        [(value,) for value in masked(v, kind).data], dtype=[("x", masked(v, kind).dtype)],
        mask=[(m,) for m in masked(v, kind).mask],
    ),
}  # fmt: skip
WHOLE = {  # no missing values but those that floats and text have
    "numpy": lambda v: {"x": v},
    "pandas": lambda v: pd.DataFrame({"x": v}),
    "pandas, other labels": lambda v: pd.DataFrame({"x": v}, index=np.arange(len(v)) // 2),
    "index": lambda v: {"x": pd.Index(v)},
    "other byte order": lambda v: {"x": v.astype(v.dtype.newbyteorder(">"))},
    "records": lambda v: np.rec.fromarrays([v], names=["x"]),
    "structured": lambda v: np.array([(value,) for value in v], dtype=[("x", v.dtype)]),
    "strided": lambda v: {"x": np.repeat(v, 2)[::2]},
}


class Stream:
    """A table of an unknown make that hands out Arrow data."""

    def __init__(self, table):
        self.columns, self.table = list(table.column_names), table

    def __arrow_c_stream__(self, requested_schema=None):
        return self.table.__arrow_c_stream__(requested_schema)


def values_of(kind):
    if kind == "bool":
        return st.booleans()
    if kind == "str":
        return st.text(string.printable, max_size=5)
    if kind.startswith("float"):
        return st.floats(allow_nan=False, width=32)
    info = np.iinfo(kind)
    return st.integers(int(info.min), int(info.max))


KINDS = st.sampled_from([*INTEGERS, "float32", "float64", "bool", "str"])


@settings(max_examples=250, deadline=None)
@given(data=st.data(), kind=KINDS, container=st.sampled_from(list(CONTAINERS)), missing=st.booleans())
def test_types_of_every_container(data, kind, container, missing):
    own = values_of(kind)
    values = data.draw(st.lists(own | st.none() if missing else own, min_size=2, max_size=8))
    there = [value for value in values if value is not None]
    if not there:
        values, there = [own_example(kind), *values], [own_example(kind)]
    gaps = None in values
    large = "int" in kind and max(map(abs, there)) > 2**53
    table = CONTAINERS[container](values, kind)
    assert column_names(table) == ["x"]
    if gaps and large:
        with pytest.raises(mj.DataError, match=r"column 'x' holds integers beyond 2\^53 and missing values"):
            to_pandas(table, ["x"])
        return
    dtype = {"s": object, "b": object if gaps else bool, "f": float}.get(kind[0])
    if dtype is None:
        dtype = float if gaps else np.uint64 if max(there) >= 2**63 else np.int64
    got = column(table)
    same(got, values, dtype)
    if dtype is object:
        assert {type(value) for value in got.dropna()} == {bool if kind == "bool" else str}


def own_example(kind):
    return {"b": True, "s": "a"}.get(kind[0], 1)


@settings(max_examples=150, deadline=None)
@given(data=st.data(), kind=KINDS, container=st.sampled_from(list(WHOLE)))
def test_types_of_numpy_and_plain_pandas(data, kind, container):
    values = data.draw(st.lists(values_of(kind), min_size=1, max_size=8))
    values = [value.rstrip("\0") if kind == "str" else value for value in values]
    table = WHOLE[container](np.array(values, "U5" if kind == "str" else kind))
    dtype = {"s": object, "b": bool, "f": float}.get(kind[0])
    if dtype is None:
        dtype = np.uint64 if max(values) >= 2**63 else np.int64
    same(column(table), values, dtype)


OTHER = {
    "float16": (np.array([0.5, np.nan], "float16"), [0.5, None], float),
    "long double": (np.array([0.5, 2], np.longdouble), [0.5, 2.0], float),
    "NaN under no mask": (np.ma.array([1.0, np.nan, 3.0], mask=[True, False, False]), [None, None, 3.0], float),
    "list of a masked array": (list(np.ma.array([1.0, 2.0], mask=[True, False])), [None, 2.0], float),
    "NaN in arrow floats": (pa.array([1.0, float("nan"), None]), [1.0, None, None], float),
    "NaN in polars floats": (pl.Series([1.0, float("nan"), None]), [1.0, None, None], float),
    "sparse": (pd.arrays.SparseArray([0.0, 2.0, np.nan]), [0.0, 2.0, None], float),
    "sparse integers": (pd.arrays.SparseArray([0, 2]), [0, 2], np.int64),
    "integers and floats": ([1, 2.5, None], [1.0, 2.5, None], float),
    "decimals": ([decimal.Decimal("1.5"), None], [1.5, None], float),
    "decimals of arrow": (pa.array([decimal.Decimal("1.5"), None]), [1.5, None], float),
    "decimals of polars": (pl.Series([decimal.Decimal("1.5"), None]), [1.5, None], float),
    "fractions": ([fractions.Fraction(1, 2), None, 3], [0.5, None, 3.0], float),
    "numbers of jax": ([jnp.float32(0.5), 1], [0.5, 1.0], float),
    # polars has them since 1.18
    **({"128 bits of polars": (pl.Series([1, 2], dtype=pl.Int128), [1, 2], np.int64)} if hasattr(pl, "Int128") else {}),
    "real complex numbers": (np.array([1 + 0j, np.nan]), [1.0, None], float),
    "real complex objects": ([1 + 0j, 2, None], [1.0, 2.0, None], float),
    "array of jax": (jnp.arange(2), [0, 1], np.int64),
    "range": (range(2), [0, 1], np.int64),
    "truth values of numpy": ([np.bool_(True), None, False], [True, None, False], object),
    "text beside NaN": (["a", float("nan"), pd.NA], ["a", None, None], object),
    "text of numpy": ([np.str_("a"), "b"], ["a", "b"], object),
    "large strings": (pa.array(["a", None], pa.large_string()), ["a", None], object),
    "string views": (pa.array(["a", None], pa.string_view()), ["a", None], object),
    "string[python]": (pd.array(["a", None], pd.StringDtype("python")), ["a", None], object),
    "string[pyarrow]": (pd.array(["a", None], pd.StringDtype("pyarrow")), ["a", None], object),
    "str of pandas": (pd.Series(["a", None]), ["a", None], object),
    "variable width strings": (np.array(["a", "b"], np.dtypes.StringDType()), ["a", "b"], object),
    "nothing": ([None, None], [None, None], object),
    "no rows": ([], [], object),
}


@pytest.mark.parametrize(("values", "expected", "dtype"), OTHER.values(), ids=OTHER.keys())
def test_other_types(values, expected, dtype):
    same(column({"x": values}), expected, dtype)


def test_dates_become_dates():
    stamp, moment = pd.Timestamp("2024-05-01 12:00"), datetime.datetime(2024, 5, 1, 12)
    for values in ([DAY, None], pa.array([DAY, None]), pa.array([DAY, None], pa.date64()), pl.Series([DAY, None]),
                   [np.datetime64("2024-05-01"), None], np.array(["2024-05-01", "NaT"], "M8[D]"),
                   np.array(["2024-05-01", "NaT"], ">M8[s]"),
                   pd.Series([DAY, None], dtype=pd.ArrowDtype(pa.date32()))):  # fmt: skip
        got = column({"x": values})
        assert got.dtype.kind == "M"
        assert got[0] == pd.Timestamp(DAY)
        assert pd.isna(got[1])
    for values in ([stamp, None], [moment, None], pa.array([moment, None]), pl.Series([moment, None])):
        got = column({"x": values})
        assert got.dtype.kind == "M"
        assert got[0] == stamp
    for values in ([datetime.timedelta(1), None], [pd.Timedelta(days=1), None], pa.array([datetime.timedelta(1), None]),
                   pl.Series([datetime.timedelta(1), None]), np.array([1, "NaT"], "m8[D]")):  # fmt: skip
        got = column({"x": values})
        assert got.dtype.kind == "m"
        assert got[0] == pd.Timedelta(days=1)
    noon = datetime.time(12)
    for values in ([noon, None], pa.array([noon, None]), pl.Series([noon, None])):
        same(column({"x": values}), [noon, None], object)


def test_time_zones_and_periods_stay():
    moments = pd.Series(pd.to_datetime(["2024-05-01", None])).dt.tz_localize("Europe/Berlin")
    of_polars = pl.Series([moments[0].to_pydatetime(), None]).dt.convert_time_zone("Europe/Berlin")
    for values in (moments, moments.astype(object), pa.array(moments), of_polars):
        got = column({"x": values})
        assert isinstance(got.dtype, pd.DatetimeTZDtype)
        assert str(got.dtype.tz) == "Europe/Berlin"
        assert got[0] == moments[0]
        assert pd.isna(got[1])
    months = pd.Series(pd.PeriodIndex(["2024-05", None], freq="M"))
    for values in (months, months.astype(object)):
        assert column({"x": values}).dtype == months.dtype


@pytest.mark.parametrize("values", [
    [DAY, None], [pd.Timestamp(DAY), None], pa.array([DAY]), pl.Series([datetime.time(1)]), [datetime.time(1)],
    [datetime.timedelta(1)], pd.period_range("2024", periods=2, freq="M"), [None, datetime.date(9999, 12, 31)],
    [pd.Timestamp("2024-05-01", tz="UTC"), pd.Timestamp("2024-05-01", tz="Asia/Tokyo")], [DAY, datetime.time(1)],
    [pd.Period("2024", "Y"), pd.Period("2024-05", "M")],
])  # fmt: skip
def test_dates_are_no_numbers(values):
    frame = to_pandas({"when": values}, ["when"])
    with pytest.raises(mj.DataError, match=r"column 'when' holds .* values; make numbers of them first"):
        refuse_dates(frame, ["when"])
    for name in ("weights", "offset"):
        with pytest.raises(mj.DataError, match=f"{name} must be numbers, but holds .* values"):
            row_values(name, values, None, len(frame))


def test_the_cures_for_dates_work():
    data = pd.DataFrame({"d": [DAY, DAY + datetime.timedelta(2)], "t": [datetime.time(6, 30)] * 2,
                         "s": [datetime.timedelta(2)] * 2,
                         "p": pd.period_range("2024", periods=2, freq="Y")})  # fmt: skip
    t = pd.to_datetime(data["d"])
    expected = {"d": "pandas.to_datetime(data['d']); (t - t.min()) / pandas.Timedelta(days=1)",
                "p": "data['p'].dt.year",
                "s": "pandas.to_timedelta(data['s']) / pandas.Timedelta(days=1)",
                "t": "data['t'].map(lambda t: t.hour + t.minute / 60)"}  # fmt: skip
    frame = to_pandas(data, list(data))
    for name, cure in expected.items():
        with pytest.raises(mj.DataError) as caught:
            refuse_dates(frame, [name])
        assert str(caught.value).endswith(cure)
    values = {name: eval(cure.split("; ")[-1], {"pandas": pd, "data": data, "t": t}) for name, cure in expected.items()}
    assert {name: list(value) for name, value in values.items()} == {
        "d": [0, 2], "t": [6.5, 6.5], "s": [2, 2], "p": [2024, 2025]
    }  # fmt: skip


# --- categories --------------------------------------------------------------------------------------------------

CATEGORIES = {
    "pandas": (pd.Categorical(["b", None], ["c", "b", "a"]), ["c", "b", "a"], object),
    "pandas, of strings": (pd.Categorical(["b", None], pd.array(["c", "b"], "string")), ["c", "b"], object),
    "ordered": (pd.Categorical(["b", None], ["c", "b", "a"], ordered=True), ["c", "b", "a"], object),
    "index": (pd.CategoricalIndex(["b", None], ["c", "b"]), ["c", "b"], object),
    "arrow": (pa.DictionaryArray.from_arrays(pa.array([1, None]), pa.array(["c", "b"])), ["c", "b"], object),
    "arrow in chunks": (pa.chunked_array([pa.array(own).dictionary_encode() for own in (["b"], [None, "a"])]),
                        ["b", "a"], object),
    "arrow in pandas": (pd.Series(pd.arrays.ArrowExtensionArray(
        pa.DictionaryArray.from_arrays(pa.array([1, None]), pa.array(["c", "b"])))), ["c", "b"], object),
    "polars Enum": (pl.Series(["b", None], dtype=pl.Enum(["c", "b", "a"])), ["c", "b", "a"], object),
    "polars Categorical": (pl.Series(["b", None, "a"], dtype=pl.Categorical), ["a", "b"], object),
    "small integers": (pd.Categorical(pd.Series([2, None, 1], dtype="Int8")), [1, 2], np.int64),
    "integers of arrow": (pa.array([7, None], pa.int16()).dictionary_encode(), [7], np.int64),
    "truth values": (pd.Categorical([True, None]), [True], bool),
    "decimals": (pd.Categorical([decimal.Decimal("0.5")]), [0.5], float),
    "dates": (pd.Categorical([DAY]), [pd.Timestamp(DAY)], "datetime"),
    "several kinds": (pd.Categorical([1, "a"], [1, "a"]), ["1", "a"], object),
}  # fmt: skip


@pytest.mark.parametrize(("values", "categories", "dtype"), CATEGORIES.values(), ids=CATEGORIES.keys())
def test_categories_keep_their_order(values, categories, dtype):
    got = column({"x": values})
    assert isinstance(got.dtype, pd.CategoricalDtype)
    assert list(got.cat.categories) == categories
    assert got.cat.categories.dtype == dtype if dtype != "datetime" else got.cat.categories.dtype.kind == "M"
    assert got.cat.ordered == bool(getattr(values, "ordered", False))
    expected = pd.Series(values.to_pylist() if hasattr(values, "to_pylist") else list(values))
    assert list(got.isna()) == list(expected.isna())
    assert [level_name(v) for v in got.dropna()] == [level_name(v) for v in expected.dropna()]


def test_intervals_are_ordered():
    cut = pd.cut(pd.Series([9.0, 1.0, np.nan, 5.0]), [0, 4, 8, 10])
    assert column({"x": cut}).dtype == cut.dtype
    for values in (cut.astype(object), cut.astype("interval[float64, right]")):
        got = column({"x": values})
        assert list(got.cat.categories) == list(cut.cat.categories)
        assert list(got.cat.codes) == list(cut.cat.codes)


# --- refusals ----------------------------------------------------------------------------------------------------

REFUSED = {
    "text among numbers": ([1, 2.0, "n/a"], r"text among numbers \(first: row 2: 'n/a'\); use pandas.to_numeric"),
    "numbers among text": (["a", None, "b", 3], r"text among numbers \(first: row 0: 'a'\)"),
    "text among truth values": ([True, False, "yes"], r"text among truth values \(first: row 2: yes\)"),
    "truth values among numbers": ([1, 2, True], r"truth values among numbers \(first: row 2: True\)"),
    "dates among text": (["a", "b", DAY], r"dates or times among text \(first: row 2: 2024-05-01\)"),
    "bytes": ([None, b"a"], r"bytes \(first: row 1: b'a'\); decode them"),
    "bytes of numpy": (np.array([b"a"]), r"bytes \(first: row 0: b'a'\); decode them"),
    "bytes of arrow": (pa.array([None, b"a"]), r"bytes \(first: row 1: b'a'\)"),
    "bytes in views": (pa.array([None, b"a"], pa.binary_view()), r"bytes \(first: row 1: b'a'\)"),
    "bytes of polars": (pl.Series([None, b"a"]), r"bytes \(first: row 1: b'a'\)"),
    "complex": (np.array([1, 1j]), r"complex numbers \(first: row 1: 1j\); take their real part"),
    "complex objects": ([None, 2, 1j], r"complex numbers \(first: row 2: 1j\)"),
    "lists": ([[1], [2, 3]], r"list objects \(first: row 0: \[1\]\); a column must be all numbers"),
    "lists of arrow": (pa.array([[1], [2, 3]]), "ndarray objects"),
    "lists of polars": (pl.Series([[1], [2, 3]]), r"List\(Int64\) values"),
    "structs of arrow": (pa.array([{"a": 1}]), r"dict objects \(first: row 0: {'a': 1}\)"),
    "structs of polars": (pl.Series([{"a": 1}]), "Struct.* values"),
    "dicts": ([{"a": 1}], "dict objects"),
    "sets": ([{1}], "set objects"),
    "records": (np.zeros(1, [("a", int), ("b", int)]), r"\[\('a', .* values"),
    "huge integers": ([2**70, None], r"integers beyond 2\^64"),
    "integers of both signs": ([2**63, -1], r"integers beyond 2\^64"),
    "masked values": (np.array([2.0, np.ma.masked, 1.0], object), r"masked values among numbers \(first: row 1: --\)"),
    "no unit": (np.array([1], "m8"), "timedelta64 values without a unit"),
    "categories of bytes": (pd.Categorical([b"a"]), "holds bytes"),
    "categories of one name": (pd.Categorical([1, "1"], [1, "1"]), "two categories of the same name: 1, '1'"),
}


@pytest.mark.parametrize(("values", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_what_no_model_can_use_is_named(values, message):
    with pytest.raises(mj.DataError, match=f"column 'dose' .*{message}|column 'dose' holds {message}"):
        to_pandas({"ok": np.zeros(len(values)), "dose": values}, ["ok", "dose"])
    to_pandas({"ok": np.zeros(len(values)), "dose": values}, ["ok"])  # nobody asked for it


def test_refusals_name_the_label_of_the_row():
    frame = pd.DataFrame({"x": pd.Series([None, 1, "n/a"], dtype=object)}).set_axis(["first", "second", "third"])
    with pytest.raises(mj.DataError, match=r"first: row third: 'n/a'"):
        to_pandas(frame, ["x"])


def test_tables_that_are_none():
    class Lazy:
        columns = ("x",)

    for data, name in ((3, "int"), (np.zeros((2, 2)), "ndarray"), ([1.0], "list"), (Lazy(), "Lazy")):
        with pytest.raises(mj.DataError, match=f"data must be a pandas, polars or pyarrow table.*got {name}"):
            to_pandas(data, ["x"])


def test_names_of_columns():
    assert list(to_pandas(pd.DataFrame({1: [1.0], "b": [2.0]}), ["1"])) == ["1"]
    assert list(to_pandas({1: [1.0], "b": [2.0]}, ["b", "1", "b"])) == ["b", "1"]
    levels = pd.DataFrame(np.zeros((2, 2)), columns=pd.MultiIndex.from_product([["a"], ["x", "y"]]))
    with pytest.raises(mj.DataError, match=r"names of 2 levels, such as \('a', 'x'\)"):
        column_names(levels)
    twice = pa.table([pa.array([1]), pa.array([2]), pa.array([3])], names=["x", "x", "y"])
    for table in (twice, twice.to_pandas()):
        assert column(table, "y").tolist() == [3]
        with pytest.raises(mj.DataError, match="more than one column named 'x'"):
            to_pandas(table, ["y", "x"])
    with pytest.raises(mj.DataError, match="more than one column named '1'"):
        to_pandas({1: [1], "1": [2]}, ["1"])


def test_labels_and_memory_are_the_tables_own():
    frame = pd.DataFrame({"x": [1.0, 2.0], "f": pd.Categorical(["a", "b"])}, index=pd.Index(["r", "r"], name="rows"))
    got = to_pandas(frame, ["x", "f"])
    assert got.index.equals(frame.index)
    assert got.index.name == "rows"
    arrays = {"x": np.array([1.0, 2.0])}
    copied = to_pandas(arrays, ["x"])
    arrays["x"][0] = 9.0
    frame.iloc[0, 0] = 9.0
    assert copied["x"].tolist() == got["x"].tolist() == [1.0, 2.0]


def test_single_values_stand_in_all_rows():
    data = {"g": np.array("a"), "x": np.float32(0.5), "n": jnp.asarray(3), "day": np.datetime64("2024-05-01", "ns"),
            "ok": True, "y": [1.0, 2.0], "other": {1, 2}}  # fmt: skip
    got = to_pandas(data, ["g", "x", "n", "day", "ok", "y"])
    assert got.to_dict("list") == {"g": ["a"] * 2, "x": [0.5] * 2, "n": [3] * 2, "day": [pd.Timestamp(DAY)] * 2,
                                   "ok": [True] * 2, "y": [1.0, 2.0]}  # fmt: skip
    assert len(to_pandas(data, ["g"])) == 2  # others count the rows
    assert len(to_pandas({"g": "a"}, ["g"])) == 1
    with pytest.raises(mj.DataError, match=r"different lengths: 'x' \(2,\), 'y' \(3,\)"):
        to_pandas({"x": [1, 2], "y": pl.Series([1, 2, 3])}, ["x", "y"])


def test_tables_of_no_column_have_rows():
    frame = pd.DataFrame({"x": [1.0, 2.0]})
    for table in (frame, pl.from_pandas(frame), pl.from_pandas(frame).lazy(), pa.Table.from_pandas(frame), dict(frame),
                  frame.to_records(index=False)):  # fmt: skip
        assert to_pandas(table, []).shape == (2, 0)


# --- what a model asks of columns --------------------------------------------------------------------------------


def test_integers_are_floats_in_expressions():
    frame = to_pandas({"n": np.array([100], "int8"), "u": np.array([2**63], "uint64"), "f": pd.Categorical([2**60]),
                       "b": [True], "t": ["a"]}, ["n", "u", "f", "b", "t"])  # fmt: skip
    got = as_numbers(frame, ["n", "f", "b", "t"])
    assert list(got.dtypes.astype(str)) == ["float64", "uint64", "category", "bool", "object"]
    assert frame["n"].dtype == np.int64
    with pytest.raises(
        mj.DataError, match=r"column 'u' holds integers beyond 2\^53 \(first: row 0: 9223372036854775808"
    ):
        as_numbers(frame, ["n", "u"])
    with pytest.raises(mj.DataError, match=r"column 'm' holds integers beyond 2\^53 \(first: row 1: -9007199254740993"):
        as_numbers(to_pandas({"m": [1, -(2**53) - 1]}, ["m"]), ["m"])
    assert as_numbers(to_pandas({"m": [2**53]}, ["m"]), ["m"])["m"].tolist() == [2.0**53]


def test_complete_rows_settle():
    frame = to_pandas(
        {"b": [True, None, False], "t": ["a", "b", None], "f": pd.Categorical(["x", "y", "y"])}, list("btf")
    )
    assert [str(dtype) for dtype in frame.dtypes] == ["object", "object", "category"]
    with pytest.warns(mj.DataWarning, match=r"2 of 3 rows left out because of missing values \(b 1, t 1\)"):
        rows = complete_rows(frame)
    got = settle(frame[rows])
    assert [str(dtype) for dtype in got.dtypes] == ["bool", "object", "category"]
    assert list(got["f"].cat.categories) == ["x"]
    assert list(frame["f"].cat.categories) == ["x", "y"]
    assert settle(frame[:0]).shape == (0, 3)


def test_values_beside_the_table():
    for values in ([1, 0], [True, False], np.array([1, 0], ">i2"), pl.Series([1, 0]), pa.array([1.0, 0.0]),
                   np.ma.array([1, 0]), pd.array([True, False], "boolean"),
                   [decimal.Decimal(1), fractions.Fraction(0)]):  # fmt: skip
        got = row_values("weights", values, None, 2)
        assert got.dtype == float
        assert got.tolist() == [1.0, 0.0]
    for values in (
        [True, None],
        pd.array([1, None], "Int8"),
        pl.Series([1, None]),
        np.ma.array([1, 2], mask=[False, True]),
    ):
        assert np.array_equal(row_values("weights", values, None, 2), [1.0, np.nan], equal_nan=True)
    assert np.isnan(row_values("offset", [None, None], None, 2)).all()
    for values, holds in ((["a", "b"], r"text \(first: row 0: 'a'\)"), (["1", "2"], "numbers as text"),
                          (pd.Categorical([1, 2]), "category values")):  # fmt: skip
        with pytest.raises(mj.DataError, match=f"offset must be numbers, but holds {holds}"):
            row_values("offset", values, None, 2)
    for values, message in ((1.0, r"has shape \(\)"), (np.ones((2, 1)), r"has shape \(2, 1\)"), (np.ones(3), r"\(3,\)"),
                            (["a", 1], "holds text among numbers"), ([2**60, 1], r"beyond 2\^53")):  # fmt: skip
        with pytest.raises(mj.DataError, match=f"^weights .*{message}"):
            row_values("weights", values, None, 2)
    assert row_values("subset", pd.array([True, False], "boolean"), None, 2, numbers=False).dtype == bool
    lined_up = row_column("'f'", pd.Series(pd.Categorical(["a", "b"]), index=[1, 0]), pd.Index([0, 1]), 2)
    assert lined_up.tolist() == ["b", "a"]
    assert isinstance(lined_up.dtype, pd.CategoricalDtype)


# --- levels ------------------------------------------------------------------------------------------------------

LEVELS = {
    "dates": (["2024-05-01", "2024-05-02"], [
        pd.to_datetime(["2024-05-01", "2024-05-02"]), np.array(["2024-05-01", "2024-05-02"], "M8[D]"),
        np.array(["2024-05-01", "2024-05-02"], "M8[ns]"), [DAY, datetime.date(2024, 5, 2)],
        pd.Categorical(pd.to_datetime(["2024-05-01", "2024-05-02"])), pa.array([DAY, datetime.date(2024, 5, 2)]),
        pl.Series([DAY, datetime.date(2024, 5, 2)]), ["2024-05-01", "2024-05-02"]]),
    "moments": (["2024-05-01 12:00:00.500000", "2024-05-02"], [
        pd.to_datetime(["2024-05-01 12:00:00.5", "2024-05-02"], format="ISO8601"),
        np.array(["2024-05-01T12:00:00.5", "2024-05-02"], "M8[ms]"),
        [datetime.datetime(2024, 5, 1, 12, 0, 0, 500000), datetime.datetime(2024, 5, 2)]]),
    "durations": (["1 days 00:00:00", "2 days 00:00:00"], [
        [datetime.timedelta(1), datetime.timedelta(2)], np.array([1, 2], "m8[D]"), pd.to_timedelta([1, 2], unit="D"),
        pl.Series([datetime.timedelta(1), datetime.timedelta(2)])]),
    "whole numbers": (["1", "2"], [
        [1, 2], [1.0, 2.0], np.array([1, 2], "uint8"), np.array([1, 2], ">f4"), pd.array([1, 2], "Int16"),
        [decimal.Decimal("1.0"), 2], ["1", "2"], pd.Categorical([1.0, 2.0]), pl.Series([1, 2])]),
    "float32": (["0.10000000149011612", "0.5"], [
        np.array([0.1, 0.5], "float32"), pd.array([0.1, 0.5], "Float32"), pa.array([0.1, 0.5], pa.float32()),
        pl.Series([0.1, 0.5], dtype=pl.Float32), [np.float32(0.1), np.float32(0.5)]]),
    "truth values": (["False", "True"], [
        [False, True], np.array([0, 1], bool), pd.array([False, True], "boolean"), pa.array([False, True])]),
    "periods": (["2024-05", "2024-06"], [pd.period_range("2024-05", periods=2, freq="M")]),
    "far away": (["2024-05-01", "9999-12-31"], [[DAY, datetime.date(9999, 12, 31)]]),
}  # fmt: skip


@pytest.mark.parametrize(("names", "makes"), LEVELS.values(), ids=LEVELS.keys())
def test_levels_have_one_name_whatever_the_type(names, makes):
    for values in makes:
        frame = to_pandas({"x": values, "b": ["u", "v"]}, ["x", "b"]).iloc[[1, 0, 1]]
        codes, found = level_names(frame["x"])
        assert (codes.tolist(), found) == ([1, 0, 1], names)
        # The values may come as scalars of pandas, of numpy or of Python.
        column = frame["x"]
        for scalars in (column, column.to_numpy(), column.array, column.tolist(), column.astype(object).to_numpy()):
            assert [level_name(value) for value in scalars] == [names[1], names[0], names[1]]
        codes, found = factor_codes(frame, ("x", "b"))
        assert (codes.tolist(), found) == ([1, 0, 1], [f"{names[0]}:u", f"{names[1]}:v"])
        assert levels_of(frame, ("x", "b")).tolist() == [[names[0], "u"], [names[1], "v"]]


@pytest.mark.parametrize("levels", [3, 60])
def test_levels_of_interactions_are_those_of_a_sort(levels):
    """Few combinations are counted, many are sorted."""
    rng = np.random.default_rng(levels)
    frame = pd.DataFrame({name: rng.integers(0, levels, 200).astype(float) for name in "abc"})
    codes, names = factor_codes(frame, ("a", "b", "c"))
    assert codes.tolist() == frame.groupby(["a", "b", "c"]).ngroup().tolist()
    unique = np.unique(frame.to_numpy(int), axis=0)
    assert names == [":".join(map(str, row)) for row in unique]


def test_columns_of_hundreds_of_thousands_of_rows_are_not_read_value_by_value(monkeypatch):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"x": rng.normal(size=1000).astype("float32"), "n": rng.integers(0, 9, 1000, "int8"),
                          "f": pd.Categorical(rng.choice(list("abc"), 1000)), "b": rng.random(1000) < 0.5})  # fmt: skip

    def fail(*args, **kwargs):
        raise AssertionError("looked into plain columns")

    monkeypatch.setattr(pd.api.types, "infer_dtype", fail)
    monkeypatch.setattr("mixjax.formula.reading._plain_objects", fail)
    numbers = to_pandas(frame, ["x", "n", "b"])
    assert list(numbers.dtypes.astype(str)) == ["float64", "int64", "bool"]


def test_as_column_says_what_it_was_given():
    with pytest.raises(mj.DataError, match=r"^weights has shape \(2, 2\); it must be one-dimensional"):
        as_column("weights", np.ones((2, 2)))


@pytest.mark.parametrize(
    "make",
    [
        lambda v, null: pa.array(v, mask=null),
        lambda v, null: pc.run_end_encode(pa.array(v, mask=null)),
        lambda v, null: pa.chunked_array([pa.array(v[:4], mask=null[:4]), pa.array(v[4:], mask=null[4:])]),
        lambda v, null: pd.Series(pd.arrays.ArrowExtensionArray(pa.array(v, mask=null))),
        lambda v, null: pl.Series(
            pl.Series([None if n else x for x, n in zip(v, null, strict=True)], dtype=pl.Float64)
        ),
        lambda v, null: np.ma.MaskedArray(v, null),
        lambda v, null: [None if n else x for x, n in zip(v, null, strict=True)],
    ],
    ids=["pyarrow", "run ends", "chunked", "pandas with arrow", "polars", "masked", "list"],
)
@pytest.mark.parametrize("everywhere", [False, True])
def test_nulls_and_nan_in_one_column_are_missing_each_in_its_row(make, everywhere):
    values = np.full(9, np.nan) if everywhere else np.array([0.0, np.nan, 2, 3, np.nan, 5, 6, 7, 8])
    null = np.arange(9) % 4 == 2
    column = to_pandas({"x": make(values, null)}, ["x"])["x"]
    np.testing.assert_array_equal(column.to_numpy(float), np.where(null, np.nan, values))


@pytest.mark.parametrize("at", [3, 60])
def test_text_among_numbers_is_seen_across_chunks(at):
    """A first chunk of few rows alone would make a factor of all; names that somebody declared stay names."""
    rng = np.random.default_rng(0)
    z = [f"{i % 9}.{i:02d}" if i else "n/a" for i in range(120)]
    table = pd.DataFrame({"y": rng.normal(size=120), "x": rng.normal(size=120), "z": z, "g": np.arange(120) % 8})
    with pytest.raises(mj.DataError, match=r"column 'z' holds text in .*'n/a'.*pandas.to_numeric"):
        mj.lmm("y ~ x + z + (1 | g)", [table[:at], table[at:]])
    few = table.assign(z=pd.Categorical(np.where(np.arange(120) % 12, (np.arange(120) % 12).astype(str), "n/a")))
    assert len(mj.lmm("y ~ x + z + (1 | g)", [few[:at], few[at:]]).fixef) == 13


@pytest.mark.parametrize("role", ["y", "x", "g", "w"])
def test_truth_values_among_numbers_are_seen_across_chunks(role):
    """As in one table: True is no number among numbers, whichever chunk has it."""
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"y": rng.normal(size=60), "x": rng.normal(size=60), "g": np.arange(60) % 6})
    table = table.assign(w=1.0).astype({role: object})
    table.loc[:19, role] = [bool(i % 2) or role == "w" for i in range(20)]
    for chunks in ([table[:20], table[20:]], [table[20:], table[:20]], [table]):
        with pytest.raises(mj.DataError, match=f"'{role}'.*truth values"):
            mj.lmm("y ~ x + (1 | g)", chunks, weights="w")
