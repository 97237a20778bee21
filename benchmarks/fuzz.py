"""Claim: whatever goes in, the model that was meant comes out, or an error that says what was wrong.

Four kinds of input, a quarter each, drawn at random by seed and index:

* tables: columns of every type of numpy, pandas, polars and pyarrow in every container, whole or in chunks, with
  missing values and hostile names, now and then one that no model can use. Reference: the model on float64, str.
* formulas: of the language's grammar, and half of them broken by one to three random edits. Reference: a parser of R's
  algebra in this file; expressions go to Python with numpy; the columns of X are all products of levels, and the rank
  sorts out which are needed.
* arguments: of fits' methods, good ones and bad ones; and new data: the rows of the fit permuted, or one alone.
* commands: ``mixjax fit`` and ``mixjax power`` in this process, on files that are written for it.

Models are compared by the ML deviance at one fixed theta, by dense matrices in this file (it does not depend on how
factors are coded), by rank, and by names of levels; chunks by ``mj.criterion`` at that theta; about one table in twenty
by REML fits as well, and their fitted values, and those of some formulas, by predictions for the table. Every input has
one verdict:

* right: equal to the reference, or as it must be. refused: an error of mixjax that names the culprit.
* needless: such an error where the reference has a model. unjudged: accepted, but the reference cannot read it.
* WRONG: another model, or something accepted that must not be.
* UNCLEAR: an exception that is no ValueError, was raised by another package, or names nothing that the user wrote.
* SLOW, LARGE: more than 10 s, less what JAX says it compiled, or more than 1 GB beyond what the process had.

    python benchmarks/fuzz.py --inputs 3000 --seed 1
    python benchmarks/fuzz.py --inputs 3000 --seed 1 --only 1234    # one of them, with all that is known of it
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import decimal
import fractions
import io
import itertools
import json
import multiprocessing
import multiprocessing.connection
import re
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa

import mixjax as mj

KINDS = ("tables", "formulas", "arguments", "commands")
VERDICTS = ("right", "refused", "needless", "unjudged", "WRONG", "UNCLEAR", "SLOW", "LARGE")
BAD = VERDICTS[4:]
SECONDS, MEGABYTES, GIVEN_UP = 10.0, 1000, 120.0
CLOSE = 1e-7
N = 48
HOME = Path(mj.__file__).parent
Rng = np.random.Generator


class Verdict(Exception):
    """Ends the judgement of an input; args: one of VERDICTS, and why."""


class Model(NamedTuple):
    """Arrays of a model; a term is ``(Z, level of every row, structure)``."""

    y: np.ndarray
    X: np.ndarray
    terms: list[tuple[np.ndarray, np.ndarray, str]]
    weights: np.ndarray | None = None
    offset: np.ndarray | None = None


# --- judging -------------------------------------------------------------------------------------------------------


def attempt(call: Callable[[], Any], words: list[str]) -> Any:
    """What a call gives; ends with refused or UNCLEAR where it raises. ``words``: one must be in the message."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return call()
    except Exception as error:
        raise of_error(error, words) from error


def of_error(error: Exception, words: list[str]) -> Verdict:
    """Ours is a ValueError that was raised in mixjax and names something that the user wrote."""
    last = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error)
    said = f"{type(error).__name__}: {text[:300]}"
    if not isinstance(error, ValueError):
        return Verdict("UNCLEAR", f"{said} [{Path(last.filename).name}:{last.lineno}]")
    if not Path(last.filename).is_relative_to(HOME):
        return Verdict("UNCLEAR", f"raised in {Path(last.filename).name}:{last.lineno}: {said}")
    if not any(re.search(rf"(?<!\w){re.escape(w)}(?!\w)" if w.isidentifier() else re.escape(w), text) for w in words):
        return Verdict("UNCLEAR", f"names nothing of {words[:6]}: {said}")
    return Verdict("refused", said)


def root(q: int, structure: str) -> np.ndarray:
    """The relative Cholesky factor that models are compared at: no two effects alike."""
    if structure == "homcs":
        return np.linalg.cholesky(0.5 * np.eye(q) + 0.2)
    L = np.diag(0.7 + 0.2 * np.arange(q))
    return L if structure == "diag" else L + np.tril(0.1 + 0.05 * np.add.outer(np.arange(q), np.arange(q)), -1)


def basis(X: np.ndarray) -> np.ndarray:
    """An orthonormal basis of the columns' span."""
    lengths = np.linalg.norm(X, axis=0)
    X = X[:, lengths > 0] / lengths[lengths > 0]
    if not X.shape[1]:
        return np.zeros((len(X), 0))
    U, s, _ = np.linalg.svd(X, full_matrices=False)
    return U[:, s > 1e-9 * s[0]]


def deviance(model: Model) -> float:
    """ML deviance with beta and sigma profiled out, by dense matrices."""
    n = len(model.y)
    V = np.diag(np.ones(n) if model.weights is None else 1.0 / model.weights)
    for Z, group, structure in model.terms:
        ZL = Z @ root(Z.shape[1], structure)
        V = V + (ZL @ ZL.T) * (group[:, None] == group[None])
    C = np.linalg.cholesky(V)
    Q = basis(np.linalg.solve(C, basis(model.X)))
    y = np.linalg.solve(C, model.y if model.offset is None else model.y - model.offset)
    y = y - Q @ (Q.T @ y)
    return float(2 * np.log(np.diag(C)).sum() + n * (1 + np.log(2 * np.pi * (y @ y) / n)))


def as_model(design: mj.Design) -> Model:
    terms = [(np.asarray(t.Z), np.asarray(t.group), t.structure) for t in design.terms]
    return Model(design.y, design.X, terms, design.weights, design.offset)


def same(found: Model, reference: Model) -> None:
    """Ends with WRONG where two models differ."""
    if len(found.y) != len(reference.y):
        raise Verdict("WRONG", f"{len(found.y)} rows, reference {len(reference.y)}")
    rank = basis(reference.X).shape[1]
    if found.X.shape[1] > N / 2:
        s = np.linalg.svd(found.X / np.linalg.norm(found.X, axis=0), compute_uv=False)
        if s[-1] < 1e-6 * s[0]:  # high products of columns that are much alike
            raise Verdict("unjudged", "the rank is a matter of rounding")
    if found.X.shape[1] != rank:
        raise Verdict("WRONG", f"X has {found.X.shape[1]} columns, reference {rank}")
    shapes = [sorted(Z.shape[1] for Z, _, _ in m.terms) for m in (found, reference)]
    if shapes[0] != shapes[1]:
        raise Verdict("WRONG", f"effects {shapes[0]}, reference {shapes[1]}")
    try:
        expected = deviance(reference)
    except np.linalg.LinAlgError:  # effects of such size that the identity beside them is lost
        raise Verdict("unjudged", "the reference's own covariance matrix is singular by rounding") from None
    close("deviance", deviance(found), expected)


def close(what: str, found: Any, reference: Any, tolerance: float = CLOSE) -> None:
    found, reference = np.asarray(found, float), np.asarray(reference, float)
    if found.shape != reference.shape or not np.allclose(found, reference, rtol=tolerance, atol=tolerance):
        raise Verdict("WRONG", f"{what} {np.ravel(found)[:3]}, reference {np.ravel(reference)[:3]}")


def base(rng: Rng) -> dict[str, np.ndarray]:
    """Columns of small whole numbers that every type can hold, and names."""
    g, h = np.repeat(np.arange(8), 6), np.tile(np.arange(6), 8)
    x, z = rng.integers(1, 8, N), rng.integers(1, 10, N)
    y = 40 + 2 * x + z + 3 * rng.integers(-3, 4, 8)[g] + 2 * rng.integers(-2, 3, 6)[h] + rng.integers(-6, 7, N)
    f = rng.permutation(np.arange(N) % 3)
    columns = {"y": y, "x": x, "z": z, "w": 2.0 ** rng.integers(0, 3, N), "o": rng.integers(0, 4, N)}
    names = {"f": np.array(list("ABC"))[f], "g": np.array(list("rqponmlk"))[g], "h": np.array(list("uvwxyz"))[h]}
    return {k: v.astype(float) for k, v in columns.items()} | {"b": rng.permutation(np.arange(N) % 2 == 1)} | names


def pick(rng: Rng, values: Any) -> Any:
    values = list(values)
    return values[rng.integers(len(values))]


# --- tables --------------------------------------------------------------------------------------------------------

Encoder = Callable[[list], Any]  # values, None where missing -> column


def _numpy(kind: str, masked: bool = False) -> Encoder:
    def encode(values: list) -> Any:
        missing = np.array([v is None for v in values])
        filled = [0 if v is None else v for v in values]
        if masked:
            return np.ma.MaskedArray(np.array(filled).astype(kind), missing)
        array = np.array(filled).astype(kind)
        if missing.any():
            if array.dtype.kind not in "fc":
                raise TypeError
            array[missing] = np.nan
        return array

    return encode


def _objects(make: Callable, missing: Any = None) -> Encoder:
    def encode(values: list) -> Any:
        array = np.empty(len(values), object)
        array[:] = [missing if v is None else make(v) for v in values]
        return array

    return encode


def _series(dtype: Any) -> Encoder:
    return lambda values: pd.Series([None if v is None else v for v in values], dtype="object").astype(dtype)


def _polars(dtype: Any) -> Encoder:
    return lambda values: pl.Series(values, strict=False).cast(dtype)


def _arrow(dtype: Any) -> Encoder:
    def encode(values: list) -> Any:
        whole = pa.types.is_integer(dtype)
        values = [v if v is None else int(v) if whole else decimal.Decimal(int(v)) if pa.types.is_decimal(dtype) else v
                  for v in values]  # fmt: skip
        return pa.array(values, pa.float64()).cast(dtype) if pa.types.is_float16(dtype) else pa.array(values, dtype)

    return encode


def _mixed_numbers(v: float) -> Any:
    kinds = (int, float, np.float32, fractions.Fraction, decimal.Decimal, np.int8)
    return kinds[int(v) % len(kinds)](v)


WIDTHS = ("f2", "f4", "f8", "g", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", ">f8", ">f4", ">i2", ">i4", ">u4",
          "c8",
          "c16", ">c16")  # fmt: skip
NULLABLE = ("Int8", "Int16", "Int32", "Int64", "UInt8", "UInt16", "UInt32", "UInt64", "Float32", "Float64")
ARROW = ("int8", "int32", "int64", "uint8", "uint64", "float", "double")
NUMBERS: dict[str, dict[str, Encoder]] = {
    "numpy": {
        **{kind: _numpy(kind) for kind in WIDTHS},
        **{f"masked {kind}": _numpy(kind, True) for kind in ("f4", "f8", "i1", "i8", "u2", ">i4")},
        "objects int": _objects(int), "objects float": _objects(float, np.nan),
        "objects mixed": _objects(_mixed_numbers),
        "Decimal": _objects(lambda v: decimal.Decimal(int(v))), "Fraction": _objects(fractions.Fraction),
        "objects complex": _objects(complex), "objects NA": _objects(float, pd.NA), "list": lambda v: list(v),
        "objects numpy": _objects(np.float16), "zero-dim": _objects(np.array),
    },
    "pandas": {
        **{k: _series(k) for k in NULLABLE},
        **{f"{k}[pyarrow]": _series(f"{k}[pyarrow]") for k in ARROW},
        "decimal[pyarrow]": lambda v: pd.Series(_objects(lambda x: decimal.Decimal(int(x)))(v)).astype(
            pd.ArrowDtype(pa.decimal128(12, 3))),
        "sparse": lambda v: pd.Series(pd.arrays.SparseArray([np.nan if x is None else float(x) for x in v])),
        "index": lambda v: pd.Index([np.nan if x is None else x for x in v]),
    },
    "polars": {str(t): _polars(t) for t in (pl.Int8, pl.Int16, pl.Int32, pl.Int64, pl.UInt8, pl.UInt16, pl.UInt32,
               pl.UInt64, pl.Float32, pl.Float64, pl.Int128, pl.Decimal(12, 2))},
    "pyarrow": {str(t): _arrow(t) for t in (pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(),
                pa.uint32(), pa.uint64(), pa.float16(), pa.float32(), pa.float64(), pa.decimal128(9, 2),
                pa.decimal256(12, 3), pa.decimal32(7, 1), pa.decimal64(9, 1))},
}  # fmt: skip


def _nan_or(missing: Any, make: Callable[[list], Any]) -> Encoder:
    """Every second missing value NaN, the others what the package has for it."""
    return lambda values: make([(np.nan if i % 2 else missing) if v is None else v for i, v in enumerate(values)])


NUMBERS["numpy"]["NaN and None"] = _nan_or(None, lambda v: v)
NUMBERS["pandas"]["NaN and NA"] = _nan_or(pd.NA, lambda v: pd.Series(v, dtype=object))
NUMBERS["pandas"]["NaN and null[pyarrow]"] = _nan_or(
    None, lambda v: pd.Series(pa.array(v), dtype=pd.ArrowDtype(pa.float64()))
)
NUMBERS["polars"]["NaN and null"] = _nan_or(None, lambda v: pl.Series(v, dtype=pl.Float64, strict=False))
NUMBERS["pyarrow"]["NaN and null"] = _nan_or(None, lambda v: pa.array(v, pa.float64()))
_TRUE = {
    "numpy": {"bool": lambda v: np.array(v, bool) if None not in v else _objects(bool)(v), "objects": _objects(bool),
              "masked": _numpy("?", True), "objects np.bool_": _objects(np.bool_)},
    "pandas": {"boolean": _series("boolean"), "bool[pyarrow]": _series("bool[pyarrow]")},
    "polars": {"Boolean": _polars(pl.Boolean)}, "pyarrow": {"bool": lambda v: pa.array(v, pa.bool_())},
}  # fmt: skip


def _category(ordered: bool = False, unused: bool = False) -> Encoder:
    def encode(values: list) -> Any:
        own = sorted({v for v in values if v is not None})
        return pd.Categorical(values, own[::-1] + ["unused"] * unused, ordered=ordered)

    return encode


def _run_ends(values: list) -> Any:
    import pyarrow.compute as pc

    return pc.run_end_encode(pa.array(values))


TEXT: dict[str, dict[str, Encoder]] = {
    "numpy": {"objects": _objects(str), "U": lambda v: np.array(v, "U") if None not in v else _objects(str)(v),
              ">U": lambda v: np.array(v, ">U3") if None not in v else _objects(str)(v), "list": lambda v: list(v),
              "np.str_": _objects(np.str_, np.nan), "masked U": lambda v: np.ma.MaskedArray(
                  ["" if x is None else x for x in v], [x is None for x in v]),
              "StringDType": lambda v: np.array(v, np.dtypes.StringDType(na_object=None))},
    "pandas": {"string": _series("string"), "string[pyarrow]": _series("string[pyarrow]"), "str": _series("str"),
               "large_string": _series(pd.ArrowDtype(pa.large_string())), "category": _series("category"),
               "ordered": lambda v: pd.Series(_category(True)(v)),
               "unused": lambda v: pd.Series(_category(unused=True)(v)),
               "Categorical": _category(), "dictionary": _series(pd.ArrowDtype(pa.dictionary(pa.int8(), pa.string())))},
    "polars": {"String": _polars(pl.String), "Categorical": _polars(pl.Categorical),
               "Enum": lambda v: pl.Series(v, dtype=pl.Enum([*sorted({x for x in v if x}, reverse=True), "unused"]))},
    "pyarrow": {"string": lambda v: pa.array(v, pa.string()), "large": lambda v: pa.array(v, pa.large_string()),
                "view": lambda v: pa.array(v, pa.string_view()),
                "dictionary": lambda v: pa.array(v).dictionary_encode(),
                "run ends": _run_ends},
}  # fmt: skip
DAY = datetime.date(2024, 1, 1)
# Names of levels by other kinds of values: the values, and what mixjax calls them.
LEVELS: dict[str, tuple[Callable[[int], Any], Callable[[int], str]]] = {
    "ints": (lambda k: k * 5, lambda k: str(k * 5)),
    "floats": (lambda k: k * 5.0, lambda k: str(k * 5)),
    "halves": (lambda k: k + 0.5, lambda k: str(k + 0.5)),
    "dates": (lambda k: DAY + datetime.timedelta(k), lambda k: str(DAY + datetime.timedelta(k))),
    "large ints": (lambda k: 2**60 + k, lambda k: str(2**60 + k)),
}


def _whole(kind: str) -> Encoder:
    return lambda values: np.array(values).astype(kind)


# What no model can use as a number.
USELESS: dict[str, Callable[[Rng, list], Any]] = {
    "datetime": lambda r, v: pd.Series(pd.date_range("2024-01-01", periods=N)),
    "datetime tz": lambda r, v: pd.Series(pd.date_range("2024-01-01", periods=N, tz="Europe/Berlin")),
    "datetime[D]": lambda r, v: np.arange(N).astype("M8[D]"),
    "timedelta": lambda r, v: np.arange(N).astype("m8[s]"),
    "timedelta generic": lambda r, v: np.arange(N).astype("m8"),
    "date objects": lambda r, v: _objects(lambda k: DAY + datetime.timedelta(int(k)))(v),
    "time objects": lambda r, v: _objects(lambda k: datetime.time(int(k) % 24))(v),
    "period": lambda r, v: pd.Series(pd.period_range("2024-01", periods=N, freq="M")),
    "year 9999": lambda r, v: _objects(lambda k: datetime.datetime(9000 + int(k), 1, 1))(v),
    "complex": lambda r, v: np.array(v) + 1j,
    "infinite": lambda r, v: np.where(np.arange(N) == 7, np.inf, np.array(v)),
    "infinite decimal": lambda r, v: _objects(decimal.Decimal)([*map(int, v[1:]), "inf"]),
    "bytes": lambda r, v: np.array([str(int(k)) for k in v], "S"),
    "bytes objects": lambda r, v: _objects(lambda k: str(int(k)).encode())(v),
    "mixed text": lambda r, v: np.array([k if i > 2 else "low" for i, k in enumerate(v)], object),
    "mixed bool": lambda r, v: np.array([k if i > 2 else True for i, k in enumerate(v)], object),
    "lists": lambda r, v: _objects(lambda k: [k])(v),
    "dicts": lambda r, v: _objects(lambda k: {"a": k})(v),
    "sets": lambda r, v: _objects(lambda k: {k})(v),
    "tuples": lambda r, v: _objects(lambda k: (k, k))(v),
    "classes": lambda r, v: _objects(lambda k: int)(v),
    "all missing": lambda r, v: np.full(N, np.nan),
    "all None": lambda r, v: np.full(N, None, object),
    "all NaT": lambda r, v: np.full(N, np.datetime64("NaT", "s")),
    "huge ints": lambda r, v: _objects(lambda k: 2**53 + int(k))(v),
    "huger ints": lambda r, v: _objects(lambda k: 2**70 + int(k))(v),
    "two-dim": lambda r, v: np.ones((N, 2)),
    "three-dim": lambda r, v: np.ones((N, 1, 1)),
    "short": lambda r, v: np.ones(N - 1),
    "void": lambda r, v: np.zeros(N, "V4"),
    "record": lambda r, v: np.zeros(N, [("a", "f8")]),
    "text numbers": lambda r, v: np.array([f"{k + i / 100}" if i else "n/a" for i, k in enumerate(v)], object),
    "one level": lambda r, v: np.full(N, "only", object),
    "one category": lambda r, v: pd.Series(pd.Categorical(["only"] * N, ["only", "other"])),
    "polars date": lambda r, v: pl.Series([DAY + datetime.timedelta(int(k)) for k in v]),
    "polars duration": lambda r, v: pl.Series([datetime.timedelta(int(k)) for k in v]),
    "polars list": lambda r, v: pl.Series([[k] for k in v]),
    "polars struct": lambda r, v: pl.Series([{"a": k} for k in v]),
    "polars binary": lambda r, v: pl.Series([b"a"] * N),
    "polars null": lambda r, v: pl.Series([None] * N),
    "polars object": lambda r, v: pl.Series([object()] * N, dtype=pl.Object),
    "arrow date": lambda r, v: pa.array([DAY + datetime.timedelta(int(k)) for k in v]),
    "arrow time": lambda r, v: pa.array([datetime.time(int(k) % 24) for k in v]),
    "arrow timestamp": lambda r, v: pa.array([1] * N, pa.timestamp("ns", "UTC")),
    "arrow duration": lambda r, v: pa.array([int(k) for k in v], pa.duration("s")),
    "arrow list": lambda r, v: pa.array([[k] for k in v]),
    "arrow struct": lambda r, v: pa.array([{"a": k} for k in v]),
    "arrow map": lambda r, v: pa.array([[("a", k)] for k in v], pa.map_(pa.string(), pa.float64())),
    "arrow null": lambda r, v: pa.nulls(N),
    "arrow binary": lambda r, v: pa.array([b"a"] * N),
    "arrow interval": lambda r, v: pa.array([(1, 1, 1)] * N, pa.month_day_nano_interval()),
}
HOSTILE = (
    "reaction time", "a.b", "x.y.z", ".hidden", "class", "lambda", "None", "True", "in", "not", "is", "if", "for",
    "import",
    "a+b", "a:b", "a*b", "a|b", "(1|g)", "~", "a~b", "^", "-", "%in%", "x[0]", "f(x)", "C(f)", "log(x)", "np", "log",
    "C", "I",
    "poly", "Q", "contr", "offset", "\u00b5", "\u03bcg/l", "Gr\u00f6\u00dfe", "\u540d\u524d", "\ufb01", "\u212b",
    "e\u0301",
    "Intercept", "(Intercept)", "sigma", "(weights)", "((weights))", "(offset)", "1", "0", "-1", "2.5", "1e3", "__c0__",
    "__c1__", "__builtins__", "__state__", "__keep__", "__name__", "it's", 'say "x"', "'", '"', "a\\b", "a\nb", "a\tb",
    " x ",
    "", " ", "#", "x#y", "a,b", "a=b", "{x}", "{", "%s", "{0}", "$x", "@x", "\U0001f600", "_", "__", "index", "size",
    "shape",
    "values", "T", "abs", "sum", "print", "x" * 300, "theta_", "beta_", ".sig01", "a;b", "a?b", "a!b", "\\", "NaN",
    "nan",
)  # fmt: skip
TABLE_FORMULAS = ("{y} ~ {x} + {z} + {f} + (1 | {g})", "{y} ~ {x} + {b} + ({x} | {g})",
                  "{y} ~ {x} * {f} + (1 | {g}) + (1 | {h})", "{y} ~ {z} + offset({x}) + (1 | {g}:{h})",
                  "{y} ~ {f}:{x} + {b} + ({x} + {z} || {g})",
                  "log({y}) ~ I({x}^2) + {f} + (0 + {z} | {h})")  # fmt: skip


def table_reference(formula: int, t: pd.DataFrame, weights: bool, offset: bool) -> Model:
    """Complete rows of float64 and str -> arrays."""
    one, y, x, z = np.ones(len(t)), *(t[k].to_numpy(float) for k in "yxz")
    f = np.column_stack([t["f"] == k for k in sorted(set(t["f"]))]).astype(float)
    b = t["b"].to_numpy(float)
    g, h = (pd.factorize(t[k])[0] for k in "gh")
    column, o = (lambda v: v[:, None]), np.zeros(len(t))
    terms: list[Any]
    if formula == 0:
        X, terms = np.column_stack([one, x, z, f]), [(column(one), g, "us")]
    elif formula == 1:
        X, terms = np.column_stack([one, x, b]), [(np.column_stack([one, x]), g, "us")]
    elif formula == 2:
        X, terms = np.column_stack([one, x, f, f * x[:, None]]), [(column(one), g, "us"), (column(one), h, "us")]
    elif formula == 3:
        X, terms, o = np.column_stack([one, z]), [(column(one), g * 100 + h, "us")], x
    elif formula == 4:
        X, terms = np.column_stack([one, b, f * x[:, None]]), [(column(v), g, "us") for v in (one, x, z)]
    else:
        X, terms, y = np.column_stack([one, x**2, f]), [(column(z), h, "us")], np.log(y)
    o = o + (t["o"].to_numpy(float) if offset else 0.0)
    return Model(y, X, terms, t["w"].to_numpy(float) if weights else None, o if offset or formula == 3 else None)


class Given(NamedTuple):
    """A table as it goes in."""

    data: Any
    columns: dict[str, Any]
    notes: list[str]


def assemble(rng: Rng, container: str, columns: dict[str, Any], notes: list[str]) -> Any:
    """Columns in a container; raises where that cannot hold them."""
    if container == "dict":
        return columns
    if container == "polars":
        return pl.DataFrame(columns) if rng.random() < 0.7 else pl.DataFrame(columns).lazy()
    if container == "pyarrow":
        table = pa.table(list(columns.values()), names=list(columns))
        halves = pa.concat_tables([table.slice(0, 20), table.slice(20)])
        return pick(rng, [table, halves])
    if container == "records":
        arrays = {k: np.asarray(v) for k, v in columns.items()}
        made = np.zeros(N, [(k, v.dtype) for k, v in arrays.items()])
        for k, v in arrays.items():
            made[k] = v
        return made if rng.random() < 0.5 else made.view(np.recarray)
    frame = pd.DataFrame({k: pd.Series(v) if not isinstance(v, pd.Series) else v for k, v in columns.items()})
    how = pick(rng, ["range", "shuffled", "text", "repeated", "multi", "dates"])
    notes.append(f"index {how}")
    frame.index = {
        "range": pd.RangeIndex(N), "shuffled": pd.Index(rng.permutation(N)),
        "text": pd.Index([f"r{i}" for i in range(N)]),
        "repeated": pd.Index([0] * N), "multi": pd.MultiIndex.from_arrays([np.arange(N) // 2, np.arange(N) % 2]),
        "dates": pd.date_range("2024", periods=N),
    }[how]  # fmt: skip
    return frame


def table(rng: Rng) -> None:
    t = pd.DataFrame(base(rng))
    container = pick(rng, ["pandas", "pandas", "polars", "pyarrow", "dict", "dict", "records", "chunks", "chunks"])
    inner = pick(rng, ["pandas", "polars", "pyarrow", "dict"]) if container == "chunks" else container
    number = int(rng.integers(len(TABLE_FORMULAS)))
    weights, offset = rng.random() < 0.3, rng.random() < 0.3
    template = TABLE_FORMULAS[number]
    read = [k for k in t if f"{{{k}}}" in template] + ["w"] * weights + ["o"] * offset
    names = {k: k for k in t}
    if rng.random() < 0.5:
        for k in rng.permutation(list(t))[: rng.integers(1, 4)]:
            new = pick(rng, HOSTILE)
            names |= {k: new} if new not in names.values() else {}
    missing = {k: rng.random(N) < 0.06 for k in read} if rng.random() < 0.3 else {}
    sources = {"polars": ["polars", "numpy"], "pyarrow": ["pyarrow"], "records": ["numpy"],
               "pandas": ["pandas", "numpy"],
               "dict": ["numpy", "pandas", "polars", "pyarrow"]}[inner]  # fmt: skip
    bad = pick(rng, sorted(USELESS)) if rng.random() < 0.2 else None
    # What is another table by the time that the container has it: integers, and missing values.
    converted = {"polars": ("period",), "pyarrow": ("period",), "pandas": ("short",)}
    bad = None if bad in converted.get(inner, ()) else bad
    culprit = pick(rng, [k for k in read if k in "yxzwo"]) if bad else ""
    for k in missing if bad else ():
        missing[k][[7, N - 1]] = False  # infinite values stand there, and nobody looks at rows that are left out
    columns, notes, expected = {}, [f"{container}/{inner}"], {}
    for k in rng.permutation(list(t)):
        values: list[Any] = list(t[k])
        for i in np.flatnonzero(missing.get(k, [])):
            values[i] = None
        if k == culprit:
            columns[k] = USELESS[str(bad)](rng, list(t[k]))
            notes.append(f"{k}: {bad}")
            continue
        for _ in range(8):  # an encoder that can hold these values
            source = pick(rng, sources)
            if k in "gh" and rng.random() < 0.25 and not missing.get(k, np.zeros(1)).any():
                kind = pick(rng, LEVELS)
                own = {name: i for i, name in enumerate(sorted(set(t[k])))}
                raw = [LEVELS[kind][0](own[v]) for v in values]
                column: Any = {"polars": pl.Series, "pyarrow": pa.array, "pandas": pd.Series}.get(source, list)(raw)
                column = np.array(raw) if source == "numpy" else column
                expected[k] = {LEVELS[kind][1](i) for i in own.values()}
                columns[k], encoding = column, kind
                break
            kinds = NUMBERS if k in "yxzwo" else _TRUE if k == "b" else TEXT
            encoding = pick(rng, kinds[source])
            if inner == "records" and (encoding == "StringDType" or "masked" in encoding):
                continue
            try:
                columns[k] = kinds[source][encoding](values)
                break
            except (TypeError, ValueError, pa.ArrowException, pl.exceptions.PolarsError):
                continue
        else:
            columns[k] = _objects(lambda v: v)(values)
            encoding = "objects"
        notes.append(f"{k}: {encoding}")
    columns = {names[k]: v for k, v in columns.items()}
    if rng.random() < 0.2 and inner != "records":
        columns["unused"] = pick(rng, [np.arange(N).astype("m8"), [object()] * N, [[1]] * N, np.full(N, None, object)])
    try:
        data = assemble(rng, inner if container == "chunks" else container, columns, notes)
    except Exception as error:
        raise Verdict("right", f"not a table: {type(error).__name__}") from None  # the container refuses it, not mixjax
    if container == "chunks":
        data = in_chunks(rng, data, inner)
    if rng.random() < 0.04 and inner == "pandas" and container != "chunks":
        culprit = pick(rng, read)
        data = pd.concat([data, data[[names[culprit]]]], axis=1)
        notes.append("twice")
        bad = "twice"
    formula = template.format(**{k: f"`{v}`" if v != k or rng.random() < 0.1 else v for k, v in names.items()})
    beside: dict[str, Any] = {"weights": names["w"] if weights else None, "offset": names["o"] if offset else None}
    say(formula=formula, **{k: v for k, v in beside.items() if v}, notes="; ".join(notes), missing=sorted(missing))
    words = [v for k, v in names.items() if k in read and v.strip()] if not bad else [names[culprit]]
    words += ["weights" if k == "w" else "offset" for k in "wo" if k == culprit or not bad]
    words = words if all(w.strip() for w in words) else [*words, "name"]
    if bad in ("short",) or any(w in ("", " ") for w in names.values()):
        words = [*words, "length", "without letters", "rows"]

    keep = ~np.any([missing.get(k, np.zeros(N, bool)) for k in read], axis=0)
    reference = table_reference(number, t[keep], weights, offset)
    if container == "chunks":
        stats, labels = attempt(lambda: mj.cross_products_from(data, formula, **beside, context={}), words)
    else:
        design, labels = attempt(lambda: mj.build_design(formula, data, **beside, context={}), words)
    if bad == "two-dim" and inner == "pandas":
        raise Verdict("right")
    if bad in ("one level", "one category") and culprit in "xz":
        raise Verdict("WRONG", f"a factor of one level was accepted: {bad}")
    if bad:
        raise Verdict("WRONG", f"accepted: {culprit} as {bad}")
    for term in labels.terms:
        own = next((k for k in "gh" if names[k] == term.group), None)
        if own and set(term.levels) != expected.get(own, set(t[own][keep])):
            raise Verdict("WRONG", f"levels {term.levels}, reference {sorted(expected.get(own, set(t[own])))}")
    if container == "chunks":
        if int(stats.n) != keep.sum():
            raise Verdict("WRONG", f"{int(stats.n)} rows, reference {keep.sum()}")
        theta = np.concatenate([root(q, "us")[np.triu_indices(q)[::-1]] for q in stats.layout.qs])
        with x64():
            found = float(criterion()(theta, stats))
        close("criterion of chunks", found, deviance(reference), 1e-6)
        return
    same(as_model(design), reference)
    if number in (0, 1) and keep.all() and rng.random() < 0.3:
        fit = attempt(lambda: mj.lmm(formula, data, **beside), words)
        plain = mj.lmm(template.format(**{k: k for k in t}), t, weights="w" if weights else None,
                       offset="o" if offset else None)  # fmt: skip
        close("REML criterion", fit.criterion, plain.criterion, 1e-6)
        if not isinstance(data, pl.LazyFrame):
            close("prediction", attempt(lambda: fit.predict(data), words), plain.fitted, 1e-6)


def in_chunks(rng: Rng, data: Any, inner: str) -> list[Any]:
    cuts = [0, *sorted(rng.choice(np.arange(1, N), 2, replace=False).tolist()), N]
    if inner == "dict":
        return [{k: v[a:b] for k, v in data.items()} for a, b in itertools.pairwise(cuts)]
    cut = (lambda a, b: data.iloc[a:b]) if inner == "pandas" else (lambda a, b: data.slice(a, b - a))
    return [cut(a, b) for a, b in itertools.pairwise(cuts)]


@contextlib.contextmanager
def x64() -> Any:
    import jax

    with jax.enable_x64(True):
        yield


@cache
def criterion() -> Callable:
    import jax

    return jax.jit(lambda theta, stats: mj.criterion(theta, stats, reml=False))


# --- formulas: the reference reading -------------------------------------------------------------------------------


class Unreadable(Exception):
    """Not of R's language, or nothing that the reference knows."""


TOKEN = re.compile(
    r"""\s*(?:(?P<quoted>`[^`]+`)|(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)|(?P<string>'[^'\\]*'|"[^"\\]*")
    |(?P<name>[A-Za-z_]\w*(?:\.\w+)*)|(?P<sign>%in%|\*\*|\|\||<=|>=|==|!=|//|[-+*/^:~|<>&%=,()\[\]]))""",
    re.VERBOSE,
)


def orthogonal(x: np.ndarray, degree: int = 1) -> np.ndarray:
    return np.linalg.qr(np.vander(x - x.mean(), degree + 1, increasing=True))[0][:, 1:]


def levels(v: np.ndarray) -> np.ndarray:
    return np.column_stack([v == k for k in pd.unique(v)]).astype(float)


# Spans only: of poly(), orthogonal to the constant, and C() any basis does.
CALLS: dict[str, Any] = {
    **{k: getattr(np, k) for k in ("log2", "log10", "log1p", "exp", "sqrt", "abs", "sin", "cos")},
    "log": lambda x, base=None: np.log(x) if base is None else np.log(x) / np.log(base), "I": lambda v: v,
    "center": lambda v: v - v.mean(), "scale": lambda v: (v - v.mean()) / v.std(ddof=1), "poly": orthogonal, "np": np,
    "C": levels,
}  # fmt: skip


def few(terms: list) -> list:
    """The limits of the reference are above those of mixjax."""
    if len(terms) > 2_500:
        raise Unreadable("too many terms")
    return terms


class Reading:
    """R's grammar by precedence climbing; terms are frozensets of the texts of their factors."""

    def __init__(self, text: str, columns: dict[str, np.ndarray]):
        self.columns, self.tokens, at = columns, [], 0
        while at < len(text.rstrip()):
            found = TOKEN.match(text, at)
            if found is None:
                raise Unreadable(f"sign {text[at : at + 5]!r}")
            at = found.end()
            self.tokens.append((found.lastgroup, found[str(found.lastgroup)]))
        self.at = 0
        self.values: dict[str, np.ndarray] = {}

    def model(self) -> Model:
        tilde = [i for i, (kind, text) in enumerate(self.tokens) if text == "~" and kind == "sign"]
        if len(tilde) != 1:
            raise Unreadable("not one ~")
        response, self.tokens = self.tokens[: tilde[0]], self.tokens[tilde[0] + 1 :]
        y = self.evaluate(response)
        self.random: list[tuple[list[frozenset], list[tuple[str, ...]], str]] = []
        self.offset: np.ndarray | None = None
        fixed = self.sum(top=True)
        if self.at != len(self.tokens):
            raise Unreadable(f"left over: {self.tokens[self.at :][:3]}")
        if not self.random:
            raise Unreadable("no random term")
        X = np.column_stack([np.zeros(N), *(self.product(term) for term in fixed)])
        terms = []
        for effects, groups, structure in self.random:
            blocks = [effects] if structure != "||" else [[term] for term in effects]
            for group, block in itertools.product(groups, blocks):
                Z = self.coded(block)
                codes = pd.factorize(pd.Series(list(zip(*(self.columns[k] for k in group), strict=True))))[0]
                terms.append((Z, codes, "us" if structure == "||" else structure))
        return Model(y, X, terms, None, self.offset)

    # Tokens.
    def peek(self) -> str:
        return self.tokens[self.at][1] if self.at < len(self.tokens) and self.tokens[self.at][0] == "sign" else ""

    def take(self, *signs: str) -> str:
        sign = self.peek()
        if sign in signs and sign:
            self.at += 1
            return sign
        return ""

    # The algebra, from loose to tight: + -, * /, %in%, :, ^.
    def sum(self, top: bool = False) -> list[frozenset]:
        terms: dict[frozenset, None] = {frozenset(): None} if top else {}
        sign = self.take("+", "-") or "+"
        while True:
            if self.peek() in ("+", "-"):
                raise Unreadable("two signs")
            start = self.at
            own = self.slash(top)
            zero = self.tokens[start : self.at] == [("number", "0")]
            if not top and (zero or frozenset() in own):
                raise Unreadable("a constant in brackets, which R and formulaic take for different things")
            for term in [frozenset()] if zero else own:
                if (sign == "-") != zero:
                    terms.pop(term, None)
                else:
                    terms[term] = None
            if own is NOTHING and sign == "-":
                raise Unreadable("a random term is subtracted")
            sign = self.take("+", "-")
            if not sign:
                return list(terms)

    def slash(self, top: bool) -> list[frozenset]:
        left = self.within(top)
        while sign := self.take("*", "/"):
            right = self.within(False)
            if not left or not right or frozenset() in [*left, *right]:
                raise Unreadable("a random term, or a constant, in a product")
            crossed = [a | b for a in (left if sign == "*" else [frozenset().union(*left)]) for b in right]
            left = few(list(dict.fromkeys([*left, *(right if sign == "*" else []), *crossed])))
        return left

    def within(self, top: bool) -> list[frozenset]:
        left = self.colon(top)
        while self.take("%in%"):
            right = self.colon(False)
            left = list(dict.fromkeys(a | frozenset().union(*right) for a in left))
        return left

    def colon(self, top: bool) -> list[frozenset]:
        left = self.power(top)
        while self.take(":"):
            right = self.power(False)
            if not left or not right or frozenset() in [*left, *right]:
                raise Unreadable("a random term, or a constant, in a product")
            left = few(list(dict.fromkeys(a | b for a in left for b in right)))
        return left

    def power(self, top: bool) -> list[frozenset]:
        left = self.atom(top)
        if self.take("^", "**"):
            kind, text = self.tokens[self.at] if self.at < len(self.tokens) else ("", "")
            if kind != "number" or not text.isdigit() or not 1 <= int(text) < 1_000 or left is NOTHING:
                raise Unreadable("not a power")
            self.at += 1
            once = left
            for _ in range(min(int(text), 12) - 1):
                left = few(list(dict.fromkeys([*left, *(a | b for a in left for b in once)])))
            if self.peek() in ("^", "**"):
                raise Unreadable("a power of a power")
        return left

    def atom(self, top: bool) -> list[frozenset]:
        if self.at == len(self.tokens):
            raise Unreadable("a term is missing")
        kind, text = self.tokens[self.at]
        if text == "(" and kind == "sign":
            end = self.closing(self.at)
            inside = self.tokens[self.at + 1 : end]
            if self.bar(inside):
                if not top:
                    raise Unreadable("a random term inside")
                self.at = end + 1
                return self.random_term(inside, "us")
            self.at += 1
            terms = self.sum()
            if not self.take(")"):
                raise Unreadable("not closed")
            return terms
        if kind == "number":
            self.at += 1
            if text in ("0", "1"):
                return [frozenset()] if text == "1" else []
            raise Unreadable("a number")
        if kind not in ("name", "quoted"):
            raise Unreadable(f"{text} where a term is due")
        start, self.at = self.at, self.at + 1
        if kind == "name" and self.peek() == "(":
            end = self.closing(self.at)
            inside, self.at = self.tokens[self.at + 1 : end], end + 1
            if text in ("us", "diag", "homcs", "cs") and self.bar(inside) and ("sign", "||") not in inside:
                return self.structured(text, inside, top)
            if text == "offset":
                if not top or self.tokens[start - 1 : start] == [("sign", "-")]:
                    raise Unreadable("an offset inside")
                own = self.evaluate(inside)
                self.offset = own if self.offset is None else self.offset + own
                return NOTHING
        return [frozenset([self.factor(self.tokens[start : self.at])])]

    def closing(self, at: int) -> int:
        depth = 0
        for i in range(at, len(self.tokens)):
            depth += {"(": 1, ")": -1}.get(self.tokens[i][1], 0) if self.tokens[i][0] == "sign" else 0
            if depth == 0:
                return i
        raise Unreadable("not closed")

    @staticmethod
    def bar(tokens: list) -> int:
        """1 + where a bar stands outside all brackets, else 0."""
        depth = 0
        for i, (kind, text) in enumerate(tokens):
            depth += {"(": 1, ")": -1}.get(text, 0) if kind == "sign" else 0
            if depth == 0 and kind == "sign" and text in ("|", "||"):
                return i + 1
        return 0

    # Random terms.
    def structured(self, name: str, inside: list, top: bool) -> list[frozenset]:
        tail = [text for _, text in inside[-4:]]
        if name == "cs":
            if tail not in ([",", "hom", "=", "TRUE"], [",", "hom", "=", "True"]):
                raise Unreadable("cs")
            name, inside = "homcs", inside[:-4]
        if not top:
            raise Unreadable("a random term inside")
        return self.random_term(inside, name)

    def random_term(self, inside: list, structure: str) -> list[frozenset]:
        bar = self.bar(inside)
        left, right = inside[: bar - 1], inside[bar:]
        if inside[bar - 1][1] == "||":
            if structure != "us":
                raise Unreadable("a structure and ||")
            structure = "||"
        tokens, at = self.tokens, self.at
        self.tokens, self.at = left, 0
        effects = sorted({frozenset(): None} | dict.fromkeys([]), key=len)
        if not left:
            raise Unreadable("no effects")
        effects = self.top_sum()
        if self.at != len(left) or not effects:
            raise Unreadable("effects")
        self.tokens, self.at = right, 0
        groups = self.group_sum()
        if self.at != len(right):
            raise Unreadable("group")
        self.tokens, self.at = tokens, at
        self.random.append((effects, groups, structure))
        return NOTHING

    def top_sum(self) -> list[frozenset]:
        """With an intercept unless taken away; without random terms in it."""
        terms: dict[frozenset, None] = {frozenset(): None}
        sign = self.take("+", "-") or "+"
        while True:
            start = self.at
            own = self.slash(False)
            zero = self.tokens[start : self.at] == [("number", "0")]
            for term in [frozenset()] if zero else own:
                if (sign == "-") != zero:
                    terms.pop(term, None)
                else:
                    terms[term] = None
            sign = self.take("+", "-")
            if not sign:
                return sorted(terms, key=len)

    def group_sum(self) -> list[tuple[str, ...]]:
        left = self.group_colon()
        while sign := self.take("/", "*", "+"):
            right = self.group_colon()
            if sign == "/":
                if len(left) > 1 and len(right) > 1:
                    raise Unreadable("nested groups")
                everything = tuple(dict.fromkeys(k for g in left for k in g))
                left = [*(everything + b for b in right), *left]
            else:
                left = few([*left, *right, *([a + b for a in left for b in right] if sign == "*" else [])])
        return left

    def group_colon(self) -> list[tuple[str, ...]]:
        left = self.group_atom()
        while self.take(":"):
            left = [a + b for a in left for b in self.group_atom()]
        return left

    def group_atom(self) -> list[tuple[str, ...]]:
        if self.take("("):
            groups = self.group_sum()
            if not self.take(")"):
                raise Unreadable("group not closed")
            return groups
        kind, text = self.tokens[self.at] if self.at < len(self.tokens) else ("", "")
        self.at += 1
        if kind == "name" and text in ("factor", "C") and self.peek() == "(":
            return self.group_atom()
        if kind not in ("name", "quoted") or text.strip("`") not in self.columns:
            raise Unreadable(f"group {text!r}")
        return [(text.strip("`"),)]

    # Values.
    def factor(self, tokens: list) -> str:
        value = self.evaluate(tokens, response=False)
        text = (
            re.sub(r"\s+", "", "".join(t for _, t in tokens))
            .replace("^", "**")
            .replace("`", "")
            .replace("as.factor(", "C(")
            .replace("factor(", "C(")
        )
        self.values[text] = value
        return text

    def evaluate(self, tokens: list, response: bool = True) -> np.ndarray:
        """By Python with numpy; what is neither a number nor a factor is unreadable."""
        code, used = [], {}
        for i, (kind, text) in enumerate(tokens):
            name = text.strip("`")
            called = i + 1 < len(tokens) and tokens[i + 1] == ("sign", "(")
            keyword = i + 1 < len(tokens) and tokens[i + 1] == ("sign", "=")
            if kind == "quoted" or (kind == "name" and name in self.columns and not called and not keyword):
                if name not in self.columns:
                    raise Unreadable(f"no column {name}")
                used[f"_{len(used)}_"] = self.columns[name]
                code.append(list(used)[-1])
            elif kind == "name" and name in ("factor", "as.factor"):
                code.append("C")
            elif kind == "name" and (
                name.split(".")[0] in CALLS or name in ("TRUE", "True", "False", "FALSE", "degree")
            ):
                code.append({"TRUE": "True", "FALSE": "False"}.get(name, name))
            elif kind == "name":
                raise Unreadable(f"name {name}")
            elif text == "%in%":
                raise Unreadable("%in% in an expression")
            elif kind == "number" and text.isdigit() and i and tokens[i - 1][1] in ("^", "**"):
                code.append(f"{text}.0")  # whole ones would be computed to the last of 10^8 digits
            else:
                code.append("**" if text == "^" else text)
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                value = eval(" ".join(code), {"__builtins__": {}, **CALLS, **used})
        except Exception as error:
            raise Unreadable(f"{' '.join(code)}: {type(error).__name__} {error}") from None
        value = np.asarray(value)
        if value.ndim not in (1, 2) or len(value) != N or value.dtype.kind not in "biufU" + "O":
            raise Unreadable(f"{' '.join(code)} has shape {value.shape}")
        if response or value.dtype.kind in "iuf":
            try:
                value = value.astype(float)
            except ValueError:
                raise Unreadable("not numeric") from None
            if not np.isfinite(value).all() or (response and value.ndim != 1):
                raise Unreadable("not finite or not one column")
        return value

    def is_factor(self, name: str) -> bool:
        return self.values[name].dtype.kind not in "f" or name.startswith("C(")

    def product(self, term: frozenset) -> np.ndarray:
        """All columns of a term, factors by all their levels."""
        columns = np.ones((N, 1))
        for name in sorted(term):
            own = self.values[name]
            own = levels(own) if own.dtype.kind != "f" else own.reshape(N, -1)
            columns = (columns[:, :, None] * own[:, None, :]).reshape(N, -1)
        return columns

    def coded(self, block: list[frozenset]) -> np.ndarray:
        """The effects of a random term; of factors only those that stand alone have one order."""
        columns = []
        for term in block:
            own = [name for name in sorted(term) if self.is_factor(name) or self.values[name].ndim == 2]
            if (own and len(term) > 1) or any(self.values[k].ndim == 2 and not k.startswith("C(") for k in own):
                raise Unreadable("effects whose coding is a matter of choice")
            if not own:
                columns.append(self.product(term))
                continue
            v = self.values[own[0]]
            if v.ndim == 2:
                raise Unreadable("a factor by C() in a random term")
            dummies = np.column_stack([v == k for k in sorted(set(v))]).astype(float)
            first = not any(len(t) == 0 for t in block) and not columns_have_factor(self, block, term)
            columns.append(dummies if first else dummies[:, 1:])
        return np.column_stack(columns)


def columns_have_factor(reading: Reading, block: list[frozenset], term: frozenset) -> bool:
    """Whether a factor stands before a term."""
    before = block[: block.index(term)]
    return any(reading.is_factor(name) for t in before for name in t)


NOTHING: list[frozenset] = []

# --- formulas: making and breaking them ----------------------------------------------------------------------------


def arithmetic(rng: Rng, depth: int = 0) -> str:
    """A number for every row, inside a call."""
    k = rng.integers(9 if depth < 2 else 3)
    a = (lambda: arithmetic(rng, depth + 1)) if depth < 2 else (lambda: pick(rng, "xz"))
    if k < 3:
        return pick(rng, ["x", "z", "`x`", "w", "o"])
    return [
        lambda: f"{a()} + {a()}", lambda: f"{a()} * {a()}", lambda: f"{a()} / (1 + {a()})",
        lambda: f"({a()}){pick(rng, ['^', '**'])}2",
        lambda: f"{pick(rng, ['log', 'np.log', 'log1p', 'sqrt', 'np.sqrt', 'abs'])}(1 + {a()})",
        lambda: f"2 * {a()} - 1",
    ][k - 3]()  # fmt: skip


def atom(rng: Rng) -> str:
    k = rng.integers(16)
    if k < 8:
        return pick(rng, ["x", "z", "f", "b", "x", "f", "w", "`z`"])
    return [
        lambda: f"I({arithmetic(rng)})",
        lambda: f"{pick(rng, ['log', 'np.log', 'log2', 'log10', 'sqrt', 'exp', 'np.sqrt'])}(x)",
        lambda: pick(rng, ["factor(o)", "C(o)", "C(f)", "as.factor(o)", "factor(b)"]),
        lambda: f"poly({pick(rng, 'xz')}, {rng.integers(1, 4)})",
        lambda: f"{pick(rng, ['center', 'scale'])}({pick(rng, 'xz')})",
        lambda: f"I({arithmetic(rng)} {pick(rng, '<>')} {rng.integers(2, 7)})",
        lambda: f"np.where(x > {rng.integers(2, 6)}, x, z)",
        lambda: f"log({arithmetic(rng)} + 1, {rng.integers(2, 11)})",
    ][k - 8]()  # fmt: skip


def algebra(rng: Rng, depth: int = 0, leaf: Callable[[Rng], str] = atom) -> str:
    k = rng.integers(10)
    if depth > 2 or k < 4:
        return leaf(rng)
    a, b = (algebra(rng, depth + 1, leaf) for _ in range(2))
    return {4: f"{a}:{b}", 5: f"{a} * {b}", 6: f"({a} + {b})", 7: f"({a} + {b} + {leaf(rng)})^{rng.integers(1, 4)}",
            8: f"{a} / {b}" if rng.random() < 0.5 else f"({b}) %in% ({a})",
            9: f"({a} - {leaf(rng)})"}[int(k)]  # fmt: skip


def random_term(rng: Rng) -> str:
    group = pick(rng, ["g", "h", "g:h", "g/h", "g*h", "g + h", "(g:h)", "`g`", "factor(g)", "g:b", "f", "g/b", "h:f"])
    simple = lambda rng: pick(rng, ["x", "z", "I(x^2)", "log(z)", "x:z", "w"])  # noqa: E731
    effects = pick(rng, ["1", "1", "x", "1 + x", "0 + x", "x + z", "x - 1", "0 + f", "f", "b", "-1 + z", "x*z", "x + f",
                         algebra(rng, 2, simple), f"{simple(rng)} + {simple(rng)}", f"0 + {simple(rng)}"])  # fmt: skip
    k = rng.integers(8)
    if k == 0:
        return f"({effects} || {group})"
    if k == 1:
        return pick(rng, ["us({} | {})", "diag({} | {})", "homcs({} | {})", "cs({} | {}, hom = TRUE)"]).format(
            effects, group
        )
    return f"({effects} | {group})"


def a_formula(rng: Rng) -> str:
    response = pick(
        rng,
        ["y"] * 5 + ["log(y)", "sqrt(y)", "I(y - x)", "y / 2", "log(y) - log(x)", "np.log(y) + sqrt(z)", "y^2", "-y"],
    )
    parts = [algebra(rng) for _ in range(rng.integers(0, 4))]
    parts += (
        [pick(rng, ["offset(o)", "offset(log(x))", "offset(x - 2*z)", "offset(o/2)"])] if rng.random() < 0.15 else []
    )
    parts += [random_term(rng) for _ in range(1 if rng.random() < 0.7 else 2)]
    parts += [pick(rng, ["0", "1", "-1"])] if rng.random() < 0.25 else []
    rng.shuffle(parts)
    text = parts[0]
    for part in parts[1:]:
        sign = "-" if rng.random() < 0.1 and "|" not in part and "offset" not in part else "+"
        text += f" {sign} {part}" if part != "-1" else " - 1"
    return f"{response} ~ {text}"


SIGNS = [*"+-*/^:~|()[]{}`'\"\\,.;=<>!&%$@#?_ \n\t0179xzyfgb", "**", "||", "%in%", "%%", "//", "==", "<-", "->", ":=",
         "...",
         "\u00b5", "\u2212", "\u00d7", "\u200b", "\x00", "\ufeff", "\u00e9", "\U0001f600", "\uff5e", "log(", "I(",
         "(1 | g)", "offset(",
         "0", "1", "-1", "99999999999999999999", "1e400", "nan", "None", "True", "lambda", "if", "for", "not", "is",
         "in", "and",
         "y", "__c0__", "__import__", "nothing", "g:h", "poly(x, 40)", "x.mean()", "C(", "np.", "'text'", "f'{x}'",
         "x[0]", "x[::-1]",
         "(x | g)", "1 |", "| g", "|| g", "*2", "^0", "^-1", "^1.5", "^x", ":=", "yield", "await", "import",
         "factor(g)", "y ~ "]  # fmt: skip
EXTREMES = (
    "y ~ " + "x + " * 25_000 + "(1 | g)", "y ~ " + "x" * 100_000 + " + (1 | g)",
    "y ~ " + "(" * 2_000 + "x" + ")" * 2_000 + " + (1 | g)",
    "y ~ (x + z)^999999999 + (1 | g)", "y ~ " + "*".join(f"log(x + {i})" for i in range(20)) + " + (1 | g)",
    "y ~ I(9**9**9) * x + (1 | g)", "y ~ I(x * 9**9**9) + (1 | g)", "y ~ I(x * 10**1000) + (1 | g)",
    "y ~ I(2**x**x**x) + (1 | g)",
    "y ~ I(x << 10**10) + (1 | g)", "y ~ I(x * (1 << 10**10)) + (1 | g)",
    "y ~ C(x):C(z):C(w):C(o):f:g:h + (1 | g)", "y ~ " + "-" * 5_000 + "x + (1 | g)",
    "y ~ " + "+" * 5_000 + "x + (1 | g)",
    "y ~ I(" + "-" * 5_000 + "x) + (1 | g)", "y ~ I(" + "+".join(["x"] * 8_000) + ") + (1 | g)",
    "y ~ x + (1 | " + "/".join(["g"] * 300) + ")",
    "y ~ x + (1 | " + "*".join("gh" * 20) + ")", "y ~ x + " + " + ".join(["(1 | g)"] * 200), "~", "", " ", "\n", "y",
    "y ~", "~ x", "y ~ x",
    "y ~ (1 | g", "y ~ 1 | g", "y ~ x | g", "y ~ x + 1 | g", "y ~ (1 | g) ~ x", "y ~ . + (1 | g)",
    "y ~ x + (1 | g) # comment",
    "y ~ x + (1 | g)\n+ z", "y ~ x + \\\n z + (1 | g)", "y ~ I(x := z) + (1 | g)", "y ~ (lambda: x)() + (1 | g)",
    "`y` ~ `x` + (1 | `g`)",
    "y ~ x + (1 | g) + (1 | g)", "y ~ y + (1 | g)", "y ~ x + (1 | y)", "y ~ g + (1 | g)", "y ~ x + (g | g)",
    "y ~ x + (0 | g)",
    "y ~ 0 + (1 | g)", "y ~ 0 + 0 + (1 | g)", "y ~ 1 + 1 + (1 | g)", "y ~ -1 - 1 + (1 | g)", "y ~ x - x + (1 | g)",
    "y ~ x:x + (1 | g)",
    "y ~ x^2 + (1 | g)", "y ~ (x) + (1 | g)", "y ~ ((x + z)) + ((1 | g))", "y ~ x + +z + (1 | g)",
    "y ~ x + -z + (1 | g)", "y ~ x - -z + (1 | g)",
    "y ~ x + (1 | g:g)", "y ~ x + (1 | g/g)", "y ~ x + (1 + 1 | g)", "y ~ x + (x + x | g)", "y ~ x*1 + (1 | g)",
    "y ~ x:1 + (1 | g)",
    "y ~ 1:x + (1 | g)", "y ~ 1/x + (1 | g)", "y ~ x/1 + (1 | g)", "y ~ 0:x + (1 | g)", "y ~ x*0 + (1 | g)",
    "y ~ x/0 + (1 | g)",
    "y ~ (x + 0) + (1 | g)", "y ~ (x - 1) + (1 | g)", "y ~ (0 + x):f + (1 | g)", "y ~ (1 + x):f + (1 | g)",
    "y ~ (1 + x)^2 + (1 | g)",
    "y ~ x - 0 + (1 | g)", "y ~ x + (1 | g) - 1", "y ~ x + ((1 | g) + z)", "y ~ x + (z + (1 | g))",
    "y ~ x + (1 | (g))", "y ~ x + (1 | 1)",
    "y ~ x + (1 | x + g)", "y ~ x + (1 | g) * z", "y ~ x + (1 | g | h)", "y ~ x + (1 | g):z",
    "log(y) + 1 ~ x + (1 | g)", "y + x ~ z + (1 | g)",
    "0 ~ x + (1 | g)", "1 ~ x + (1 | g)", "f ~ x + (1 | g)", "b ~ x + (1 | g)", "(y) ~ x + (1 | g)",
    "y:x ~ z + (1 | g)", "y ~ offset(x) + (1 | g)",
    "y ~ offset(x, z) + (1 | g)", "y ~ offset(f) + (1 | g)", "y ~ offset() + (1 | g)", "y ~ x * offset(o) + (1 | g)",
    "y ~ (offset(o)) + (1 | g)",
    "y ~ x + (offset(o) | g)", "y ~ log() + (1 | g)", "y ~ I() + (1 | g)", "y ~ I(x, z) + (1 | g)",
    "y ~ log(x, ) + (1 | g)", "y ~ log(x)(z) + (1 | g)",
    "y ~ x.log() + (1 | g)", "y ~ f.str + (1 | g)", "y ~ I(f) + (1 | g)", "y ~ log(f) + (1 | g)",
    "y ~ I(f + f) + (1 | g)", "y ~ I(f == 'A') + (1 | g)",
    "y ~ I(x > 3):z + (1 | g)", "y ~ I(x) + x + (1 | g)", "y ~ `x y` + (1 | g)", "y ~ `` + (1 | g)",
    "y ~ C(f, contr.sum) + (1 | g)", "y ~ sum(x) + (1 | g)",
    "y ~ x + (1 | g) + diag(1 | h)", "y ~ x + ar1(x | g)", "y ~ x + cs(x | g)", "y ~ x + us(x || g)",
    "y ~ x + diag(x | g, hom = 1)", "y ~ s(x) + (1 | g)",
    "y ~ C(x, levels=[1]) + (1 | g)", "y ~ C(f, contr.poly) + (1 | g)", "y ~ C(f, 'sum') + (1 | g)",
    "y ~ C(f, foo) + (1 | g)",
    "y ~ C() + (1 | g)", "y ~ hashed(f, levels=3) + (1 | g)", "y ~ lag(x) + (1 | g)", "y ~ x.cumsum() + (1 | g)",
    "y ~ np.random.normal(size=48) + (1 | g)",
)  # fmt: skip
# Code that asks for more than there is, which only a formula that is not trusted has to refuse.
GREEDY = ("I('a' * 10**10)", "I([x] * 10**9)", "poly(x, 10**9)", "bs(x, df=10**9)", "cr(x, df=10**9)",
          "np.zeros(10**12)", "[v for v in range(10**12)]",
          "__import__('os').getcwd()", "x.__class__", "open('nofile')", "eval('x')", "(lambda: x)()",
          "x.to_csv('nofile')", "I(x, y=().__class__)",
          "np.load('nofile')", "poly(x, 999)", "C(x, contr.__class__)", "bs(x, knots=[1] * 10**9)", "I(f'{x}')",
          "I(x if 1 else x)")  # fmt: skip


def broken(rng: Rng, text: str) -> str:
    for _ in range(rng.integers(1, 4)):
        tokens = re.findall(r"\s+|\w+|\W", text) or [""]
        i, k = int(rng.integers(len(tokens))), int(rng.integers(7))
        if k == 0:
            del tokens[i]
        elif k == 1:
            tokens.insert(i, tokens[i])
        elif k in (2, 3):
            tokens.insert(i, pick(rng, SIGNS))
        elif k == 4:
            tokens[i] = pick(rng, SIGNS)
        elif k == 5:
            j = int(rng.integers(len(tokens)))
            tokens[i], tokens[j] = tokens[j], tokens[i]
        elif rng.random() < 0.3:
            tokens = tokens[:i]
        text = "".join(tokens)
    return text


def formula(rng: Rng) -> None:
    columns = base(rng)
    t = pd.DataFrame(columns)
    k = rng.random()
    greedy = f"y ~ {pick(rng, GREEDY)} + (1 | g)"
    if k < 0.83:
        text = a_formula(rng) if k < 0.4 else broken(rng, a_formula(rng))
    else:
        text = greedy if k < 0.86 else pick(rng, EXTREMES)
    say(formula=text if len(text) < 2_000 else f"{text[:60]}... ({len(text)} characters)")
    try:
        reading = Reading(text, columns)
        reference: Any = reading.model() if len(text) < 5_000 and text != greedy else Unreadable("long")
    except (Unreadable, RecursionError) as error:
        reference = error
    words = [*(w for w in re.findall(r"[^\W\d]\w*|\d+|\W", text) if w.strip()), "empty", "response", "formula", "term"]
    trusted = False if text == greedy or rng.random() < 0.1 else None
    try:
        design, _ = attempt(lambda: mj.build_design(text, t, context={"np": np}, trusted=trusted), words)
    except Verdict as verdict:
        if (
            verdict.args[0] == "refused"
            and isinstance(reference, Model)
            and trusted is None
            and not foreseen(reference, reading)
        ):
            raise Verdict("needless", verdict.args[1]) from None
        raise
    if text == greedy:
        raise Verdict("WRONG", "accepted though it is not trusted")
    if not isinstance(reference, Model):
        raise Verdict("unjudged", f"{type(reference).__name__}: {reference}")
    same(as_model(design), reference)
    if (
        rng.random() < 0.1
        and basis(reference.X).shape[1] <= 3
        and [t[0].shape[1] for t in reference.terms] in ([1], [2])
    ):
        fit = attempt(lambda: mj.lmm(text, t, trusted=trusted, check_identifiable=False), words)
        close("prediction", fit.predict(t), fit.fitted, 1e-6)


def foreseen(model: Model, reading: Reading) -> bool:
    """Whether a model cannot be fitted: no noise, effects that cannot be told apart, a factor of one level."""
    if any(v.dtype.kind != "f" and len(set(v)) < 2 for v in reading.values.values()):
        return True
    seen: list[tuple[bytes, np.ndarray]] = []
    for Z, group, _ in model.terms:
        if basis(Z).shape[1] < Z.shape[1] or len(set(group)) < 2:
            return True
        for j in range(Z.shape[1]):
            seen.append((Z[:, j].tobytes(), group))
    if any(a[0] == b[0] and len(set(zip(a[1], b[1], strict=True))) == len(set(a[1])) == len(set(b[1]))
           for a, b in itertools.combinations(seen, 2)):  # fmt: skip
        return True
    Q = basis(model.X)
    y = model.y if model.offset is None else model.y - model.offset
    left = np.linalg.norm(y - Q @ (Q.T @ y))
    return bool(Q.shape[1] >= N - 4 or left <= 1e-8 * np.linalg.norm(y) or np.ptp(model.y) == 0)


# --- arguments -----------------------------------------------------------------------------------------------------


@cache
def own_table() -> pd.DataFrame:
    return pd.DataFrame(base(np.random.default_rng(0)))


@cache
def own_fit(k: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if k == 0:
            return mj.lmm("y ~ x + f + (1 | g)", own_table())
        return mj.lmm("y ~ x * f + (x | g)", own_table(), weights="w", offset="o", reml=False)


class Odd:
    """An object of nobody's."""

    def __repr__(self) -> str:
        return "Odd()"


NAN, INF, ONE = np.nan, np.inf, np.ones(N)
BAD_LEVELS = [0, 1, 2, -0.5, NAN, INF, "a", None, [0.9], True, 95, 1 + 1j, Odd()]
BAD_COUNTS = [-1, 0, 1.5, "a", None, NAN, INF, [2], Odd(), -(10**12)]
BAD_KEYS = ["a", 1.5, NAN, [1.5], Odd(), "", b"a", {"a": 1}]
BAD_DDF = ["foo", 3, None, "", ["wald"], Odd(), NAN, "Walds"]
BAD_NAMES = ["nothing", 3, Odd(), NAN, ["f", "nothing"], {"f"}, b"f", "f ", "f + x"]
BAD_ROWS = ["nothing", 3, [1, 2], np.ones(N + 1), np.ones((N, 1)), np.full(N, "a"), np.full(N, INF), ONE + 1j,
            {"w": 1}, Odd(),
            np.arange(N).astype("M8[D]"), "f", "", True, np.full(N, 2**60), pd.Series(ONE, range(1, N + 1)), [[1]] * N,
            b"w"]  # fmt: skip
DESIGN_FORMULA = "y ~ x + f + (1 | g)"


def designed(**given: Any) -> Any:
    return mj.build_design(**({"formula": DESIGN_FORMULA, "data": own_table(), "context": {}} | given))


def fitted(**given: Any) -> Any:
    return mj.lmm(**({"formula": DESIGN_FORMULA, "data": own_table()} | given))


def newdata(**changes: Any) -> pd.DataFrame:
    return own_table().head(5).assign(**changes)


def table_values(good: bool) -> list[Any]:
    t = own_table()
    if good:
        return [t, pl.from_pandas(t), pa.Table.from_pandas(t), t.to_dict("list"), t.to_records(),
                t.to_records(index=False),
                {k: tuple(v) for k, v in t.items()}, t.set_index("x", drop=False), t[list(t)[::-1]]]  # fmt: skip
    return [None, 3, "nofile", [], {}, [1, 2], np.ones((4, 3)), pd.DataFrame(), t["x"], t.head(0), t.head(1), t.T,
            Odd(), t.groupby("g"),
            {"y": 1.0}, t.drop(columns="x"), {"y": [1], "x": [1, 2], "g": ["a"], "f": "b"}, t.to_csv(), iter([]),
            {1, 2}, t.to_numpy(),
            t.assign(y=1.0), t.assign(g="a"), t.assign(f="A"), t.assign(y=t["x"]), t.assign(x=NAN), t.set_index("x"),
            t.to_dict("records"),
            {k: list(v)[: 40 + len(k) * (k == "y")] for k, v in t.items()}, pd.concat([t, t], axis=1), type,
            lambda: t]  # fmt: skip


# (what, call with a value, the argument's name and other words for it, good values, bad values)
def argument_cases() -> list[tuple[str, Callable[[Any, Any], Any], list[str], list[Any], list[Any]]]:
    t = own_table()
    y = t["y"].to_numpy()
    Y = np.stack([y, y[::-1]])
    return [
        ("build_design weights", lambda f, v: designed(weights=v), ["weights"],
         ["w", t["w"], t["w"].to_numpy(), list(t["w"]), pl.Series(t["w"]), pa.array(t["w"]), None,
          1 + (np.arange(N) % 2 == 0)],
         [*BAD_ROWS, -ONE, 0 * ONE, np.where(np.arange(N) == 3, 0, ONE), "g", np.full(N, NAN)]),
        ("build_design offset", lambda f, v: designed(offset=v), ["offset"],
         ["o", t["o"], -t["o"].to_numpy(), 0 * ONE, list(t["o"]), None, t["b"].to_numpy()],
         [*BAD_ROWS, "g", np.full(N, NAN)]),
        ("build_design subset", lambda f, v: designed(subset=v), ["subset"],
         ["x > 2", t["x"] > 2, (t["x"] > 2).to_numpy(), list(t["x"] > 2), None, "x > 2 and z < 9",
          pl.Series(t["x"] > 2)],
         ["nothing > 2", "x >", "x", 3, np.arange(10), ONE, np.full(N, False), np.ones(N + 1, bool),
          np.ones((N, 1), bool), "", "f",
          ["a"] * N, Odd(), {"x": 2}, "x.nothing()", "import os", "x > 1000", np.eye(N, dtype=bool)[0], True,
          slice(0, 5)]),
        ("build_design contrasts", lambda f, v: designed(contrasts=v), ["contrasts", "coded", "contr"],
         [{"f": k} for k in ("treatment", "SAS", "sum", "helmert", "diff", "poly", "contr.sum",
                             "contr.treatment(base='B')")] + [None, {}],
         [{"x": "sum"}, {"nothing": "sum"}, {"f": "foo"}, {"f": 3}, "sum", ["f"], {"f": None}, {3: "sum"},
          {"g": "sum"}, {"y": "sum"},
          {"f": "contr.treatment(base='Q')"}, {"f": "sum("}, {"f": "sum)"}, {"f": "poly(scores=[1])"}, {"f": ["sum"]},
          {"f": ""}, 3, Odd(),
          {"f": "contr."}, {"f": "sum; 1"}, {"f": np.eye(3)}, {("f",): "sum"}]),
        ("build_design formula", lambda f, v: designed(formula=v), ["formula", "y ~", "term", "'~'"],
         [DESIGN_FORMULA, "y ~ x + f + (1|g)"],
         [None, 3, b"y ~ x + (1 | g)", ["y ~ x"], "", "y", NAN, Odd(), ("y", "x"), "y ~ x", {"y": 1}, mj]),
        ("build_design data", lambda f, v: designed(data=v), ["data", "table", "column", "'y'", "'x'", "'f'", "'g'",
            "rows", "names"], table_values(True), table_values(False)),
        ("lmm reml", lambda f, v: fitted(reml=v), ["reml"], [True, False],
         ["yes", None, NAN, 3, [True], Odd(), "ML", 0.5]),
        ("lmm start", lambda f, v: fitted(start=v), ["start", "theta"],
         [[1.0], np.array([0.5]), None, (2,), [0.0], [100.0]],
         [[1, 2, 3], "a", [NAN], [INF], [[1.0], [2.0]], [1j], Odd(), {"g": 1}, [None], [], -INF, ["a"]]),
        ("lmm optimizer", lambda f, v: fitted(optimizer=v), ["optimizer"], [None],
         ["newton", 3, Odd(), lambda x: x, [], {"a": 1}, True, NAN]),
        ("lmm chunks", lambda f, v: mj.cross_products_from(v, DESIGN_FORMULA, context={}),
         ["data", "table", "chunk", "chunks", "column", "'x'", "rows", "nofile", "batches", "source"],
         [[t.head(20), t.tail(28)], iter([t.head(24), t.tail(24)]), (k for k in [t]), [t, t.head(0)],
          [pl.from_pandas(t)], [t.to_dict("list")]],
         [[], [3], "nofile.parquet", [t, 3], [t, t.drop(columns="x")], 3, None, iter([]), [t.head(0)], Odd(), [[t]],
          [None], "", [t, t.assign(x="a")],
          [t, t.assign(y=INF)], Path("nofile"), {"a": 1}, [t.assign(y=1.0)],
          [t, "x"]]),
        ("predict newdata", lambda f, v: f.predict(v), ["newdata", "data", "column", "'x'", "'f'", "'g'", "levels",
                                                        "names"],
         [t, t.head(3), t.iloc[[5]], newdata().to_dict("list"), pl.from_pandas(t), None, t.iloc[0].to_dict(),
          t.head(0), newdata(y="a")],
         [3, "x", {}, t.drop(columns="x"), newdata(x="a"), newdata(f="Q"), newdata(g="new"), newdata(x=INF),
          newdata(f=1.0), [], Odd(), np.ones(3),
          newdata(x=pd.Timestamp("2024")), newdata(x=1j), newdata(g=1.0), newdata(x=[[1]] * 5), newdata(f=True),
          t["x"], t.head(2).T,
          newdata(f=b"A"), newdata(x=b"1"), newdata(x="1"), {"x": 1.0, "f": "A"}, [{"x": 1}]]),
        ("predict random", lambda f, v: f.predict(newdata(), random=v), ["random", "term", "effects"],
         [True, False, "g", ["g"], "1 | g", [], ("g",)],
         [3, "nothing", ["g", "nothing"], "1 | h", "(", None, NAN, Odd(), "", "x + | g", [3], {"g": 1}, "z | g",
          "g | g", b"g", "1 | g | g", INF]),
        ("predict interval", lambda f, v: f.predict(newdata(), interval=v), ["interval"],
         [None, "confidence", "prediction"],
         ["foo", 3, True, "", ["confidence"], NAN, Odd(), "Confidence"]),
        ("predict level", lambda f, v: f.predict(newdata(), interval="confidence", level=v), ["level"],
         [0.5, 0.95, 0.999, np.float32(0.9)], BAD_LEVELS),
        ("predict method", lambda f, v: f.predict(newdata(), interval="confidence", method=v), ["method"],
         ["henderson"],
         ["foo", 3, None, "", NAN, Odd(), ["henderson"]]),
        ("predict n", lambda f, v: f.predict(newdata(), interval="prediction", method="bootstrap", key=1, n=v),
         ["n ", "n=", "replicates", "number"], [], BAD_COUNTS),
        ("predict key", lambda f, v: f.predict(newdata(), interval="prediction", method="bootstrap", key=v, n=8),
         ["key"], [], [*BAD_KEYS, None]),
        ("emmeans spec", lambda f, v: f.emmeans(v).to_frame(), ["spec", "nothing", "variable", "factor", "named"],
         ["f", ["f"], "1", ("f",)],
         [*BAD_NAMES, "g", "y", "x", ["f", "f"], "", None, "1 + f"]),
        ("emmeans by", lambda f, v: f.emmeans("f", by=v).to_frame(), ["by", "nothing", "variable", "factor", "named"],
         [None], [*BAD_NAMES, "g", "y", "x", ""]),
        ("emmeans at", lambda f, v: f.emmeans("f", at=v).to_frame(), ["at", "nothing", "levels", "'x'", "'f'"],
         [{"x": 1.0}, {"x": [1, 2]}, {"f": ["A", "B"]}, None, {}, {"x": np.array(2.0)}],
         [{"nothing": 1}, {"f": "Q"}, {"x": "a"}, {"x": NAN}, {"x": INF}, {"x": []}, 3, "x", {"y": 1}, {"g": "k"},
          {3: 1}, {"x": None}, {"x": 1j},
          {"x": [[1]]}, ["x"], Odd(), {"f": []}, {"f": 1}, {"x": Odd()}, {"f": None}, {"x": pd.Timestamp("2024")}]),
        ("emmeans ddf", lambda f, v: f.emmeans("f", ddf=v).to_frame(), ["ddf"], ["satterthwaite", "wald"], BAD_DDF),
        ("emmeans level", lambda f, v: f.emmeans("f", level=v).to_frame(), ["level"], [0.9], BAD_LEVELS),
        ("emtrends var", lambda f, v: f.emtrends("f", v).to_frame(), ["var", "nothing", "covariate", "variable"], ["x"],
         [*BAD_NAMES, "f", "g", "y", None, [], ["x"], "", "log(x)"]),
        ("contrasts method", lambda f, v: f.emmeans("f").contrasts(v), ["method", "contrast"], ["pairwise"],
         ["foo", 3, None, "", NAN, Odd(), {}, [1, 2]]),
        ("contrasts adjust", lambda f, v: f.emmeans("f").contrasts("pairwise", v), ["adjust"],
         ["tukey", "none", "holm"], ["foo", 3, "", NAN, Odd(), ["tukey"]]),
        ("anova type", lambda f, v: f.anova(type=v), ["type"], ["I", "II", "III"],
         ["IV", 5, None, "", NAN, Odd(), ["I"], "iv", 2.5]),
        ("anova ddf", lambda f, v: f.anova(ddf=v), ["ddf"], ["satterthwaite", "wald", "Kenward-Roger"], BAD_DDF),
        ("test L", lambda f, v: f.test(v), ["L ", "L=", "hypothes", "nothing", "coefficient", "effects", "weights",
                                            "column"],
         ["x = 0", "x", {"x": 1}, "f[T.B] = f[T.C]", ["x = 0", "f[T.B] = 0"], "x = 1e3", "2 * x = 1", "x - 3",
          "(Intercept)", "-x"],
         ["nothing = 1", "x = = 1", "", [], None, 3, [NAN] * 9, [1, 2], {"nothing": 1}, {"x": NAN}, {"x": "a"},
          "x = inf", "x = a", "x = nan",
          "x = 9**9**9", {}, {"x": 0}, "0 = 0", "x = x", "1", Odd(), "x * x", "x / 0", "log(x)", "x = 'a'", [["x"]],
          {"x": INF}, "x = 1; 2",
          np.ones((2, 2, 2)), "__import__('os')", "x[0]", "x.real", ["x = 0", 3], "x = 1 = 2", "f", "x ~ 1",
          {"x": None}, {"x": [1, 2]}, [0] * 9]),
        ("test joint", lambda f, v: f.test(["x = 0", "f[T.B] = 0"], joint=v), ["joint"], [True, False, None],
         ["yes", 3, NAN, [True], Odd()]),
        ("test ddf", lambda f, v: f.test("x", ddf=v), ["ddf"], ["satterthwaite", "wald"], BAD_DDF),
        ("drop1 test", lambda f, v: f.drop1(v), ["test"], ["F", "lrt", "Chisq"],
         ["foo", 3, None, "", NAN, Odd(), ["F"]]),
        ("drop1 ddf", lambda f, v: f.drop1(ddf=v), ["ddf"], ["satterthwaite", "wald"], BAD_DDF),
        ("ranova method", lambda f, v: f.ranova(v), ["method"], ["chi2", "mixture"],
         ["foo", 3, None, "", NAN, Odd(), ["chi2"]]),
        ("ranova reduce", lambda f, v: f.ranova(reduce=v), ["reduce"], [True, False], ["yes", 3, None, NAN, Odd()]),
        ("without term", lambda f, v: f.without(v), ["term", "left"], ["x | g", "(x|g)"],
         ["foo", 3, None, "", NAN, Odd(), ["x"], "(1 | nothing)", "f[T.B]", "1", "Intercept"]),
        ("confint parm", lambda f, v: f.confint(v, method="wald"), ["parm", "nothing", "parameter"],
         [None, "x", ["x", "sigma"], "theta_", "beta_", "(Intercept)", ".sig01"],
         ["nothing", 3.5, ["x", "nothing"], NAN, Odd(), "", {"x": 1.5, "y": 2}, b"x", 10**9, [NAN], ".sig99"]),
        ("confint level", lambda f, v: f.confint(level=v, method="wald"), ["level"], [0.9, 0.5], BAD_LEVELS),
        ("confint method", lambda f, v: f.confint(method=v), ["method"], ["wald"],
         ["foo", 3, None, "", NAN, Odd(), ["wald"]]),
        ("confint ddf", lambda f, v: f.confint(method="wald", ddf=v), ["ddf"], ["satterthwaite", "wald"], BAD_DDF),
        ("confint n", lambda f, v: f.confint(method="bootstrap", n=v), ["n ", "n=", "replicates", "number"], [],
         BAD_COUNTS),
        ("confint key", lambda f, v: f.confint(method="bootstrap", n=16, key=v), ["key"], [], BAD_KEYS),
        ("confint kind", lambda f, v: f.confint(method="bootstrap", n=16, kind=v), ["kind", "method"], [],
         ["foo", 3, None, "", NAN, Odd()]),
        ("refit y", lambda f, v: f.refit(v), ["y ", "y=", "'y'", "response", "rows", "values"],
         [None, y * 2, y[::-1], list(y), pd.Series(y), pl.Series(y), pa.array(y), y.astype(int), pd.Series(y)[::-1]],
         ["a", 3, y[:5], np.full(N, NAN), np.where(np.arange(N) == 3, INF, y), np.stack([y, y]), t["f"], y + 1j, ONE,
          t["x"], Odd(), {"y": y}, [],
          t["y"].set_axis(range(100, 100 + N)), np.arange(N).astype("M8[D]"), "y", np.where(np.arange(N) == 3, NAN, y),
          y.astype("S3"), 0 * ONE, True]),
        ("refit reml", lambda f, v: f.refit(reml=v), ["reml"], [True, False, None], ["yes", NAN, 3, Odd(), [True]]),
        ("refit_many Y", lambda f, v: f.refit_many(v), ["Y ", "Y=", "response", "values", "rows"], [],
         [y, "a", 3, Y[:, :5], t["f"], Y + 1j, Odd(), [], None, np.full((2, N), "a"), np.ones((2, 2, N)), {"y": y},
          [[1, 2], [3]], np.zeros((0, N))]),
        ("simulate n", lambda f, v: f.simulate(1, v), ["n ", "n=", "number", "responses", "many", "memory"],
         [1, 2, np.int32(2)], [-1, 1.5, "a", None, NAN, INF, [2], Odd(), 10**13, "2"]),
        ("simulate key", lambda f, v: f.simulate(v, 2), ["key"], [1, 0, 2**31, np.int64(3)], [*BAD_KEYS, None]),
        ("simulate random", lambda f, v: f.simulate(1, 2, v), ["random"], ["new", "fitted"],
         ["foo", 3, None, "", True, NAN, Odd(), ["new"]]),
        ("summary ddf", lambda f, v: str(f.summary(v)), ["ddf"], [None, "satterthwaite"],
         [k for k in BAD_DDF if k is not None]),
        ("residuals kind", lambda f, v: f.residuals(v), ["kind"], ["conditional", "marginal"],
         ["foo", 3, None, "", NAN, Odd()]),
        ("residuals scale", lambda f, v: f.residuals(scale=v), ["scale"], ["raw"], ["foo", 3, None, "", NAN, Odd()]),
    ]  # fmt: skip


# Two columns each, so that one program fits all. The second list depends on the company that a row keeps, or on chance.
ALONE = ("log(x) + z", "center(x) + scale(z)", "poly(x, 2)", "scale(x) + I(z^2)", "I(x - x.mean()) + z",
         "I(x - np.mean(x)) + I(z / z.max())",
         "I(x > np.median(x)) + z", "np.where(x > x.mean(), 1, 0) + z", "x:z + np.clip(x, 2, 5)",
         "x.clip(upper=x.quantile(0.5)) + z",
         "C(np.digitize(x, [3, 5]))", "f", "C(f, contr.sum)", "C(f, levels=['C', 'A', 'B'])",
         "I((x - np.min(x)) / (np.max(x) - np.min(x))) + b",
         "I(x * z.std()) + I(f == 'A')", "I(x ** 2 / np.sum(x)) + z", "scale(log(x)) + center(I(z^2))",
         "bs(x, df=2, degree=2)",
         "I(x - max(x)) + z", "x.sub(x.min()) + z", "np.maximum(x, 3) + np.minimum(z, 5)",
         "I(np.percentile(x, 30) < x) + z",
         "I(x % 2) + I(z // 3)", "I(x.astype(int)) + z", "I(x.isin([1, 2, 3])) + z",
         "x.map({k: k**2 for k in range(20)}) + z", "I(-x) + I(+z)")  # fmt: skip
COMPANY = ("x.rank() + z", "x.cumsum() + z", "np.cumsum(x) + z", "x.shift(1).fillna(0) + z", "np.sort(x) + z",
           "I(np.sort(x)) + z",
           "np.array(x)[::-1] + z", "np.gradient(x) + z", "x.diff().fillna(0) + z",
           "x.sample(frac=1, random_state=1) + z",
           "np.array([v - max(x) for v in x]) + z", "I(x.groupby(f).transform('mean')) + z",
           "x.rolling(3, 1).mean() + z", "x.duplicated() + z",
           "np.random.default_rng(1).normal(size=len(x)) + z", "np.arange(len(x)) % 7 + z", "x.expanding().max() + z",
           "np.argsort(x) + z",
           "I(x - x.iloc[0]) + z", "np.roll(x, 1) + z", "I(x.value_counts()[x].to_numpy()) + z",
           "np.linspace(0, 1, 48) + z",
           "I(x.index % 5) + z", "I(x - np.mean(x[z > 3])) + z")  # fmt: skip


COMMON = ["response", "responses", "fixed effect", "weight of"]


def argument(rng: Rng) -> None:
    if rng.random() < 0.35:
        rows_of_the_fit(rng)
        return
    what, call, words, good, bad = pick(rng, argument_cases())
    is_bad = not good or rng.random() < 0.75
    value = pick(rng, bad if is_bad else good)
    k = 0 if what.split()[0] in ("test", "emmeans", "confint", "refit", "refit_many") else int(rng.integers(2))
    shown = re.sub(r"\s+", " ", repr(value))[:100]
    say(call=what, value=shown, fit=k, good=not is_bad)
    names = [f"'{name}'" for name in re.findall(r"\w+", value)] if isinstance(value, str) else []
    try:
        found = attempt(
            lambda: call(own_fit(k), value),
            [*words, *COMMON, str(value)[:30] or "''", *names],
        )
    except Verdict as verdict:
        if not is_bad and verdict.args[0] == "refused":
            raise Verdict("needless", verdict.args[1]) from None
        raise
    if is_bad:
        raise Verdict("WRONG", f"accepted: {what} {shown} gave {re.sub(chr(10), ' ', repr(found))[:100]}")
    numbers = found.select_dtypes("number").to_numpy() if isinstance(found, pd.DataFrame) else found
    if isinstance(numbers, np.ndarray | pd.Series) and np.isnan(np.asarray(numbers, float)).all() and np.size(numbers):
        raise Verdict("WRONG", f"nothing but NaN: {found}")


def rows_of_the_fit(rng: Rng) -> None:
    """Rows of the fit in other company are predicted as in the fit, or refused."""
    t = own_table()
    alone = rng.random() < 0.65
    text = f"y ~ {pick(rng, ALONE if alone else COMPANY)} + (1 | g)"
    how = pick(rng, ["permuted", "one", "one as scalars", "half", "repeated", "polars", "category"])
    say(formula=text, rows=how)
    words = [*re.findall(r"\w+", text.split("~")[1])]
    try:
        fit = attempt(lambda: mj.lmm(text, t), words)
    except Verdict as verdict:
        raise Verdict(
            "needless" if alone and verdict.args[0] == "refused" else verdict.args[0], verdict.args[1]
        ) from None
    rows = {"permuted": rng.permutation(N), "polars": rng.permutation(N), "half": rng.permutation(N)[: N // 2],
            "category": np.arange(N),
            "repeated": rng.integers(0, N, 60)}.get(how, rng.integers(0, N, 1))  # fmt: skip
    part: Any = t.iloc[rows]
    if how == "one as scalars":
        part = part.iloc[0].to_dict()
    elif how == "polars":
        part = pl.from_pandas(part)
    elif how == "category":
        part = part.assign(f=pd.Categorical(part["f"], list("CBA")), g=part["g"].astype("category"))
    try:
        found = attempt(lambda: fit.predict(part), words)
    except Verdict as verdict:
        raise Verdict(
            "needless" if alone and verdict.args[0] == "refused" else verdict.args[0], verdict.args[1]
        ) from None
    close("prediction", found, fit.fitted.to_numpy()[rows], 1e-8)


# --- commands ------------------------------------------------------------------------------------------------------

FOREIGN = re.compile(r"could not convert|has no attribute|NoneType|unsupported operand|invalid literal|broadcast|"
                     r"Traceback|_numbers|_sizes|codec can't|object is not|shape mismatch|Error tokenizing|"
                     r"not supported between|__\w+__")  # fmt: skip


def written(rng: Rng, t: pd.DataFrame, folder: Path) -> tuple[Path, list[str], str]:
    """A file, the options to read it, and what is wrong with it if anything is."""
    kind = pick(rng, ["plain"] * 6 + ["semicolon", "tab", "pipe", "bom", "crlf", "quoted", "parquet", "index",
                                      "missing", "upper", "bool words",
                      "wrong sep", "empty", "header", "ragged", "junk", "latin", "open quote", "twice",
                      "decimal comma", "folder", "none", "json",
                      "text in x", "infinite", "one row", "dates", "bad parquet", "long sep", "empty sep"])  # fmt: skip
    path = folder / pick(rng, ["data.csv", "da ta.csv", "d\u00e4ta.txt", "data"])
    options: list[str] = []
    wrong = ""
    separators = {"semicolon": ";", "tab": "\t", "pipe": "|"}
    if kind in separators:
        t.to_csv(path, sep=separators[kind], index=False)
        options = ["--sep", pick(rng, ["\t", r"\t"]) if kind == "tab" else separators[kind]]
    elif kind == "bom":
        t.to_csv(path, index=False, encoding="utf-8-sig")
    elif kind == "crlf":
        t.to_csv(path, index=False, lineterminator="\r\n")
    elif kind == "quoted":
        t.to_csv(path, index=False, quoting=1)
    elif kind == "parquet":
        path = folder / "data.parquet"
        t.to_parquet(path)
    elif kind == "index":
        t.to_csv(path)
    elif kind == "missing":
        t.assign(z=[None, "NA", *t["z"][2:]]).to_csv(path, index=False)
    elif kind == "upper":
        path = folder / "DATA.CSV"
        t.to_csv(path, index=False)
    elif kind == "bool words":
        t.assign(b=np.where(t["b"], "TRUE", "FALSE")).to_csv(path, index=False)
    else:
        wrong = kind if kind != "plain" else ""
        t.to_csv(path, index=False)
        text = path.read_text()
        if kind == "wrong sep":
            options = ["--sep", ";"]
        elif kind in ("long sep", "empty sep"):
            options = ["--sep", "ab" if kind == "long sep" else ""]
        elif kind == "decimal comma":
            t.assign(x=t["x"] + 0.5, y=t["y"] + 0.5).to_csv(path, index=False, sep=";", decimal=",")
            options = ["--sep", ";"]
        elif kind == "folder":
            path = folder
        elif kind == "none":
            path = folder / pick(rng, ["nofile.csv", "sleepstud", "", "nofile.parquet", "a" * 300])
        elif kind == "bad parquet":
            path = folder / "bad.parquet"
            path.write_bytes(b"PAR1 nothing")
        elif kind in ("text in x", "infinite", "one row", "dates"):
            own = {"text in x": t.assign(x=["n/a?" if i == 5 else i for i in range(N)]), "one row": t.head(1),
                   "infinite": t.assign(x=np.where(np.arange(N) == 4, INF, t["x"])),
                   "dates": t.assign(x=INF)}[kind]  # fmt: skip
            own.to_csv(path, index=False)
        elif kind == "json":
            t.to_json(path)
        elif kind != "plain":
            path.write_bytes({
                "empty": b"", "header": text.splitlines()[0].encode() + b"\n",
                "ragged": (text + "1,2,3,4,5,6,7,8,9,10,11,12\n").encode(),
                "junk": rng.bytes(2_000), "latin": text.replace("A", "\u00e4").encode("latin-1"),
                "open quote": (text + '1,"2').encode(),
                "twice": text.replace("x", "y", 1).encode(),
            }[kind])  # fmt: skip
    say(file=kind)
    return path, options, wrong


def command(rng: Rng) -> None:
    t = pd.DataFrame(base(rng))
    with tempfile.TemporaryDirectory() as folder:
        if rng.random() < 0.65:
            argv, good = fit_command(rng, t, Path(folder))
        else:
            argv, good = power_command(rng, Path(folder))
        say(argv=argv[1:], good=good)
        out, err = io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                status: Any = main_of_mixjax([*argv, "--no-cache"])
        except SystemExit as error:
            status = error.code
        except Exception as error:
            raise Verdict("UNCLEAR", of_error(error, [""]).args[1]) from error
    message = err.getvalue()
    if status not in (0, 1, 2):
        raise Verdict("WRONG", f"exit status {status!r}")
    if status == 2:
        if FOREIGN.search(message) or not message.strip():
            raise Verdict("UNCLEAR", f"stderr: {message[-300:]}")
        raise Verdict("needless" if good else "refused", message[-300:])
    if not good:
        raise Verdict("WRONG", f"exit status {status}: {out.getvalue()[:200]}")
    if not out.getvalue().strip():
        raise Verdict("WRONG", "nothing printed")
    if "--json" in argv:
        found = json.loads(out.getvalue())
        beside = {k: argv[argv.index(f"--{k}") + 1] if f"--{k}" in argv else None for k in ("weights", "offset")}
        plain = mj.lmm(argv[1], t if NOTES["file"] != "missing" else t[2:], reml="--ml" not in argv, **beside)
        close("criterion", found["criterion"], plain.criterion, 1e-6)


def main_of_mixjax(argv: list[str]) -> int:
    from mixjax.cli import main as run

    return run(argv)


def fit_command(rng: Rng, t: pd.DataFrame, folder: Path) -> tuple[list[str], bool]:
    path, options, wrong = written(rng, t, folder)
    formula, bad = "y ~ x + z + (1 | g)", bool(wrong)
    for option, good_values, bad_values in (
        ("--weights", ["w"], ["nothing", "f", "", "g", "3"]), ("--offset", ["o"], ["nothing", "f", "", "g"]),
        ("--ddf", ["satterthwaite", "Wald"], ["foo", "", "Walds"]), ("--confint", ["wald"], ["foo", ""]),
    ):  # fmt: skip
        if rng.random() < 0.2:
            is_bad = rng.random() < 0.3
            options += [option, pick(rng, bad_values if is_bad else good_values)]
            bad |= is_bad
    options += [flag for flag in ("--json", "--ml") if rng.random() < 0.4]
    if rng.random() < 0.25:
        formula = pick(rng, ["", "y", "y ~ x", "y ~ nothing + (1 | g)", "y ~ x + (1 | nothing)", "y ~ x + (1 | g",
                             "Y ~ x + (1 | g)", "y ~ f + (1 | f) ~",
                             "y ~ log(x - 3) + (1 | g)", "f ~ x + (1 | g)",
                             "y ~ np.log(z, x, w, o, 3) + (1 | g)", "\u00b5 ~ x + (1 | g)",
                             "y ~ x + (x | g) + (x | g)", "y ~ ns(x) + (1 | g)", "y ~ open('nofile') + (1 | g)",
                             "y ~ x[99] + (1 | g)"])  # fmt: skip
        bad = True
    if rng.random() < 0.06:
        options += pick(rng, [["--nothing"], ["--ddf"], ["extra"], ["--json=3"], ["--level", "3"]])
        bad = True
    return ["fit", formula, str(path), *options], not bad


def power_command(rng: Rng, folder: Path) -> tuple[list[str], bool]:
    pools: dict[str, tuple[list[str], list[str]]] = {
        "formula": (["y ~ x + (1 | g)"], ["", "y ~ x", "y ~ x + (1 | g) + (1 | h)", "y ~ x + (1 |",
                                          "y ~ log(x, 2, 3) + (1 | g)", "y ~ C(x) + (1 | g)"]),
        "--beta": (["0,0.5", "1,0"], ["0", "0,a", "", "0,0.5,1", "nan,1", "inf,0", "0;1", ","]),
        "--sd": (["1", "0"], ["a", "1,2", "-1", "nan", "inf", ""]),
        "--sigma": (["1", "2.5"], ["0", "-1", "a", "nan", "inf", ""]),
        "--groups": (["10,20"], ["a", "", "0", "1", "-3", "10:5", "10:20:0", "10:20:-5", "1:2:3:4", "10,", "1e3",
                                 "10.5", "10,10", "99999999999999"]),
        "--per-group": (["4"], ["0", "-1", "a", "", "1.5", "999999999999"]),
        "--x": (["between", "within", "normal", "x=between"],
                ["foo", "q=between", "", "x=", "=between", "x=foo", "x=x=between"]),
        "--test": (["x"], ["nothing", "", "x = a", "g"]),
        "--ddf": (["wald", "Wald"], ["foo", "", "Walds"]),
        "--replicates": (["200"], ["0", "-5", "a", "", "1.5"]),
        "--alpha": (["0.05", "0.1"], ["0", "1", "-1", "2", "a", "nan"]),
        "--key": (["0", "7"], ["a", "1.5", ""]),
        "--cor": (["0"], ["a", "0.5", "nan", "2"]),
        "--target": ([], ["0", "1", "2", "-1", "nan", "a"]),
        "--plot": ([], [str(folder / "no" / "a.png"), str(folder / "a.foo"), str(folder)]),
    }  # fmt: skip
    broken_ones = set(rng.choice(list(pools), rng.integers(0, 3), replace=False)) if rng.random() < 0.85 else set()
    argv, bad = ["power"], False
    for name, (good_values, bad_values) in pools.items():
        is_bad = name in broken_ones
        required = name in (
            "formula",
            "--beta",
            "--sd",
            "--groups",
            "--per-group",
            "--test",
            "--x",
            "--replicates",
            "--ddf",
        )
        if not is_bad and (not good_values or (not required and rng.random() < 0.7)):
            continue
        bad |= is_bad
        value = pick(rng, bad_values if is_bad else good_values)
        argv += [value] if name == "formula" else [f"{name}={value}"]
    if rng.random() < 0.05:
        argv, bad = argv[: rng.integers(1, 4)], True
    return argv, not bad


# --- running -------------------------------------------------------------------------------------------------------

NOTES: dict[str, Any] = {}
COMPILED: list[float] = []
JUDGES = {"tables": table, "formulas": formula, "arguments": argument, "commands": command}


def say(**notes: Any) -> None:
    """What is known of the input that is being judged."""
    NOTES.update(notes)


def kind_of(index: int) -> str:
    return KINDS[index % len(KINDS)]


def listen() -> None:
    """Count the seconds that JAX traces and compiles."""
    import jax

    def heard(event: str, seconds: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile"):
            COMPILED.append(seconds)

    jax.monitoring.register_event_duration_secs_listener(heard)


def judge(seed: int, index: int) -> dict[str, Any]:
    NOTES.clear()
    rng = np.random.default_rng([seed, index])
    before, begin, busy, compiled = _memory("VmRSS"), time.perf_counter(), time.process_time(), sum(COMPILED)
    _reset_peak()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            JUDGES[kind_of(index)](rng)
        verdict, why = "right", ""
    except Verdict as error:
        verdict, why = error.args[0], "".join(error.args[1:])
    except Exception as error:  # a fault of this file, or of the reference
        verdict, why = "UNCLEAR", "in the fuzzer: " + "".join(traceback.format_exception(error))[-1500:]
    # Other work on the machine costs time on the clock, and threads cost more of the processors' than of it.
    seconds = min(time.perf_counter() - begin, time.process_time() - busy) - (sum(COMPILED) - compiled)
    more = _memory("VmHWM") - before
    if verdict not in ("WRONG", "UNCLEAR"):
        if more > MEGABYTES:
            verdict, why = "LARGE", f"{more:.0f} MB more; {verdict} {why}"
        elif seconds > SECONDS:
            verdict, why = "SLOW", f"{seconds:.1f} s; {verdict} {why}"
    return {"index": index, "verdict": verdict, "why": why, "seconds": max(seconds, 0.0), "notes": dict(NOTES)}


def _memory(what: str) -> float:
    """MB of this process: VmRSS now, VmHWM at most; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        found = re.search(rf"{what}:\s+(\d+)", Path("/proc/self/status").read_text())
        return int(found[1]) / 1024 if found else 0.0
    return 0.0


def _reset_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def work(pipe: Any, seed: int, indices: list[int]) -> None:
    """Judge inputs one by one, telling before which it is."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # what takes all memory must not take the machine
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (16 * 2**30, resource.getrlimit(resource.RLIMIT_AS)[1]))
    mj.enable_compilation_cache()
    listen()
    own_fit(0), own_fit(1)
    for index in indices:
        pipe.send(index)
        pipe.send(judge(seed, index))
    pipe.send(None)


class Worker:
    """A process that judges a share of the inputs; it is replaced where one of them does not end."""

    def __init__(self, seed: int, indices: list[int]):
        self.seed, self.indices = seed, indices
        self.start()

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=work, args=(other, self.seed, self.indices), daemon=True)
        self.process.start()
        other.close()
        self.died, self.current, self.since = False, -1, time.perf_counter()

    def given_up(self) -> dict[str, Any] | None:
        """The verdict of an input that took too long, or took the process with it."""
        late = self.current >= 0 and time.perf_counter() - self.since > GIVEN_UP
        if not (self.died or late):
            return None
        self.process.kill()
        self.process.join()
        found = {"index": self.current, "verdict": "UNCLEAR" if self.died else "SLOW",
                 "seconds": time.perf_counter() - self.since,
                 "why": f"not done in {GIVEN_UP:.0f} s" if late else f"the process died ({self.process.exitcode})",
                 "notes": {}}  # fmt: skip
        self.indices = self.indices[self.indices.index(self.current) + 1 :] if self.current >= 0 else []
        self.start()
        return found


def run(seed: int, inputs: int, workers: int) -> Iterator[dict[str, Any]]:
    """Verdicts as they come."""
    running = [Worker(seed, share) for share in _shares(inputs, workers) if share]
    while running:
        multiprocessing.connection.wait([w.pipe for w in running], timeout=1.0)
        for worker in list(running):
            try:
                while worker.pipe.poll():
                    message = worker.pipe.recv()
                    if message is None:
                        running.remove(worker)
                        break
                    if isinstance(message, int):
                        worker.current, worker.since = message, time.perf_counter()
                    else:
                        yield message
            except EOFError:
                worker.died = True
            late = worker.given_up() if worker in running else None
            if late is not None:
                yield late


def _shares(inputs: int, workers: int) -> list[list[int]]:
    """Every worker has some of all kinds."""
    return [[i for i in range(inputs) if i // len(KINDS) % workers == k] for k in range(workers)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=3_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, metavar="INDEX", help="judge one input and show all that is known of it")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--show", default=",".join(BAD), help="verdicts of which every input is shown, by commas")
    arguments = parser.parse_args()
    if arguments.only is not None:
        print(json.dumps(judge(arguments.seed, arguments.only), indent=2, ensure_ascii=False))
        return
    begin = time.perf_counter()
    results = []
    for result in run(arguments.seed, arguments.inputs, arguments.workers):
        results.append(result)
        if result["verdict"] in arguments.show.split(","):
            again = f"--seed {arguments.seed} --only {result['index']}"
            print(f"{result['verdict']} {kind_of(result['index'])} {again}: {result['why']}")
            print(f"    {json.dumps(result['notes'], ensure_ascii=False)}", flush=True)
    print(f"\n{'kind':<12}{'inputs':>9}" + "".join(f"{name:>10}" for name in VERDICTS) + f"{'longest s':>12}")
    for kind in (*KINDS, "all"):
        own = [r for r in results if kind in (kind_of(r["index"]), "all")]
        counts = Counter(r["verdict"] for r in own)
        print(f"{kind:<12}{len(own):>9,}" + "".join(f"{counts[name]:>10,}" for name in VERDICTS)
              + f"{max((r['seconds'] for r in own), default=0.0):>12.1f}")  # fmt: skip
    print(f"\n{len(results):,} inputs in {time.perf_counter() - begin:.0f} s")
    sys.exit(any(r["verdict"] in BAD for r in results))


if __name__ == "__main__":
    main()
