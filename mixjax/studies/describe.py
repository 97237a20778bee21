"""What determines the numbers of a study, as plain JSON: two descriptions are equal where the numbers are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from types import CodeType
from typing import Any

import numpy as np
import pandas as pd

# Numbers of an array that are shown; of a larger one its digest.
SHOWN = 16


def describe(value: Any) -> Any:
    """Plain JSON of numbers, text, arrays, tables, dataclasses and functions; of large ones a digest.

    A function is described by its code, defaults and what it closes over, not by its name alone.
    """
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else repr(value)
    if isinstance(value, np.generic):
        return describe(value.item())
    if isinstance(value, pd.DataFrame):
        columns = {str(name): describe(np.asarray(value[name].astype(object))) for name in value}
        return {"rows": len(value), "columns": columns}
    if isinstance(value, Mapping):
        return {str(name): describe(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [describe(item) for item in value]
    if isinstance(value, range):
        return [*value]
    if hasattr(value, "__array__") and not is_dataclass(value):
        return _array(np.asarray(value))
    if is_dataclass(value) and not isinstance(value, type):
        return {
            "kind": type(value).__name__,
            **{f.name: describe(getattr(value, f.name)) for f in fields(value) if f.compare},
        }
    if hasattr(value, "__code__"):
        return _function(value)
    if isinstance(value, type):
        return f"{value.__module__}.{value.__qualname__}"
    if hasattr(value, "func") and hasattr(value, "args"):  # functools.partial
        return {"function": describe(value.func), "args": describe(value.args), "keywords": describe(value.keywords)}
    if hasattr(value, "__dict__"):
        return {"kind": type(value).__qualname__, **{name: describe(item) for name, item in vars(value).items()}}
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _array(a: np.ndarray) -> Any:
    if a.size <= SHOWN and a.dtype.kind in "biufUS":
        return describe(a.tolist())
    data = (
        "\0".join(map(repr, a.ravel().tolist())).encode()
        if a.dtype.kind in "OUS"
        else np.ascontiguousarray(a).tobytes()
    )
    return {"shape": list(a.shape), "dtype": str(a.dtype), "sha256": _digest(data)}


def _function(function: Any) -> dict[str, Any]:
    cells = function.__closure__ or ()
    names = function.__code__.co_freevars
    return {
        "function": function.__qualname__,
        "code": _digest(_code(function.__code__).encode()),
        "defaults": describe(function.__defaults__),
        "closure": {name: describe(cell.cell_contents) for name, cell in zip(names, cells, strict=True)},
    }


def _code(code: CodeType) -> str:
    """Instructions and constants, without file names and line numbers."""
    constants = [_code(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return repr((code.co_code.hex(), constants, code.co_names, code.co_varnames))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
