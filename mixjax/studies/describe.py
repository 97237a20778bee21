"""The description of a study as plain JSON: two descriptions are equal where the numbers are.

A description is the same in every process: it has no address, no place in a file, and no order of a set. A library
(Python's own, an installed package, mixjax) is described by the names that are used of it, and what the user wrote by
what it does: a function by its code, its defaults, what it closes over, and the globals and helpers that it reads.
"""

from __future__ import annotations

import builtins
import copyreg
import dis
import functools
import hashlib
import importlib
import importlib.util
import json
import logging
import sys
from collections.abc import Mapping, Set
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import jax
import numpy as np
import pandas as pd

# Numbers of an array that are shown; of a larger one its digest.
SHOWN = 16
# Functions by which code can reach what its text does not name.
DYNAMIC = {"eval", "exec", "globals", "__import__", "open", "import_module"}
# Of a class, what says nothing of what it does.
NOT_OF_A_CLASS = {
    "__dict__", "__weakref__", "__module__", "__qualname__", "__doc__", "__firstlineno__", "__static_attributes__",
    "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__abstractmethods__", "_abc_impl",
    "__dataclass_fields__", "__dataclass_params__", "__match_args__", "__parameters__", "__orig_bases__",
    "__slotnames__",
}  # fmt: skip
_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD"}
_PLAIN = (bool, int, float, str, type(None))


def describe(value: Any, unseen: list[str] | None = None) -> Any:
    """Plain JSON of numbers, text, arrays, tables, objects and functions; of large ones a digest.

    Args:
        value: anything. unseen: is given a line for each thing that the numbers may depend on and that cannot be seen.
    """
    unseen = [] if unseen is None else unseen
    try:
        return _Describer(unseen).of(value, "it")
    except RecursionError:
        unseen.append(f"{type(value).__name__} is nested too deeply to be seen")
        return type(value).__qualname__


class _Describer:
    """One description. ``where`` says of a value how it was reached."""

    def __init__(self, unseen: list[str]):
        self.unseen = unseen
        # Objects that are being described, and functions, classes and modules that were, by their address; these are
        # kept, so that no other object gets it.
        self.open: dict[int, Any] = {}
        self.known: dict[int, tuple[Any, Any]] = {}

    def of(self, value: Any, where: str) -> Any:
        if value is None or isinstance(value, bool | int | str):
            return value
        if isinstance(value, float):
            return value if np.isfinite(value) else repr(value)
        if isinstance(value, np.generic) and not isinstance(value, np.void):
            return self.of(value.item(), where)
        if isinstance(value, bytes | bytearray | memoryview):
            return {"bytes": _digest(bytes(value))}
        if id(value) in self.known:
            return self.known[id(value)][1]
        if id(value) in self.open:
            return {"again": type(value).__name__}
        self.open[id(value)] = value
        try:
            found = self._composed(value, where)
        finally:
            del self.open[id(value)]
        if isinstance(value, FunctionType | type | ModuleType):
            # Helpers that many functions use are written out once; elsewhere a digest says whether they changed.
            short = {"name": found.get("name"), "sha256": _digest(_json(found))} if isinstance(found, dict) else found
            self.known[id(value)] = (value, short)
        return found

    def _composed(self, value: Any, where: str) -> Any:
        if isinstance(value, pd.DataFrame):
            columns = {str(name): self._column(value[name], f"the column {name} of {where}") for name in value}
            return {"rows": len(value), "columns": columns}
        # Of a class of the user's, what it does matters beside what it holds.
        plain = _is_library(type(value).__module__)
        if isinstance(value, Mapping) and plain:
            items = {str(name): self.of(item, f"{name} of {where}") for name, item in value.items()}
            if len(items) == len(value):
                return items
            return [[self.of(name, where), self.of(item, f"{name} of {where}")] for name, item in value.items()]
        if isinstance(value, list | tuple) and plain:
            return [self.of(item, f"{i} of {where}") for i, item in enumerate(value)]
        if isinstance(value, Set) and plain:
            return {"set": sorted(_json(self.of(item, where)) for item in value)}
        if isinstance(value, range):
            return {"range": [value.start, value.stop, value.step]}
        if hasattr(value, "__array__") and not is_dataclass(value) and not isinstance(value, type):
            return self._array(_numpy(value), where)
        if isinstance(value, ModuleType):
            return self._module(value, where)
        if (name := _library_name(value)) is not None:
            return name
        if isinstance(value, CodeType):
            return {"code": _digest(_code(value))}
        if isinstance(value, FunctionType):
            return self._function(value, where)
        if isinstance(value, MethodType):
            return {"method": self.of(value.__func__, where), "self": self.of(value.__self__, f"the object of {where}")}
        if isinstance(value, type):
            return self._class(value, where)
        if isinstance(value, functools.partial):
            parts = {"function": value.func, "args": value.args, "keywords": value.keywords}
            return {name: self.of(part, f"{name} of {where}") for name, part in parts.items()}
        if isinstance(value, property):
            return [self.of(part, where) for part in (value.fget, value.fset, value.fdel)]
        if isinstance(value, staticmethod | classmethod | functools.cached_property):
            inner = value.func if isinstance(value, functools.cached_property) else value.__func__
            return {"kind": type(value).__name__, "function": self.of(inner, where)}
        if callable(value) and hasattr(value, "__wrapped__"):  # jax.jit, jax.custom_jvp, functools.lru_cache
            own = getattr(value, "__dict__", {}).items()
            rest = {name: item for name, item in own if callable(item) and not name.startswith("_")}
            kind = {"kind": type(value).__name__, "function": self.of(value.__wrapped__, where)}
            return kind | {name: self.of(item, f"{name} of {where}") for name, item in rest.items()}
        if isinstance(value, logging.Logger):  # says something, and changes no number
            return {"kind": "Logger", "name": value.name}
        return self._object(value, where)

    # --- data ---

    def _column(self, column: Any, where: str) -> Any:
        found = self.of(np.asarray(column.astype(object)), where)
        if isinstance(getattr(column, "dtype", None), pd.CategoricalDtype):  # their order makes contrasts
            return {"values": found, "categories": self.of(list(column.cat.categories), where)}
        return found

    def _array(self, a: np.ndarray, where: str) -> Any:
        if a.size <= SHOWN and a.dtype.kind in "biufUS":
            return self.of(a.tolist(), where)
        if a.dtype.kind in "OUS":
            flat = a.ravel().tolist()
            data = "\0".join(repr(x) if type(x) in _PLAIN else _json(self.of(x, where)) for x in flat).encode()
        else:
            data = np.ascontiguousarray(a).tobytes()
        return {"shape": list(a.shape), "dtype": str(a.dtype), "sha256": _digest(data)}

    def _object(self, value: Any, where: str) -> Any:
        kind = type(value)
        own = (
            {"kind": kind.__name__}
            if _is_library(kind.__module__)
            else {"kind": self.of(kind, f"the class of {where}")}
        )
        # What a cached property has computed is there or not, and follows from the rest.
        state = {
            name: item
            for name, item in getattr(value, "__dict__", {}).items()
            if not isinstance(getattr(kind, name, None), functools.cached_property)
        }
        state |= {slot: getattr(value, slot) for base in kind.__mro__ for slot in _slots(base) if hasattr(value, slot)}
        for container, plain in ((Mapping, dict), (Set, frozenset), (list | tuple, list)):
            if isinstance(value, container):
                state["items"] = plain(value)
        if is_dataclass(value):
            state = {f.name: getattr(value, f.name) for f in fields(value) if f.compare}
        elif not state:  # or it is kept where Python has no name for it
            try:
                reduced = (
                    copyreg.dispatch_table[kind](value) if kind in copyreg.dispatch_table else value.__reduce_ex__(4)
                )
                state = {"parts": [_listed(part) for part in _listed(reduced)]}
            except Exception:
                self.unseen.append(f"what is in {where} ({kind.__module__}.{kind.__qualname__}) cannot be seen")
                return own
        return own | {name: self.of(item, f"{name} of {where}") for name, item in state.items()}

    # --- code ---

    def _function(self, function: FunctionType, where: str) -> Any:
        where = f"{function.__name__}()"
        code = function.__code__
        cells = {}
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
            try:
                cells[name] = cell.cell_contents
            except ValueError:  # not bound yet
                self.unseen.append(f"{name} of {where} has no value yet")
        found = {
            "name": function.__name__,
            "defaults": self.of(function.__defaults__, f"a default of {where}"),
            "keyword_defaults": self.of(function.__kwdefaults__, f"a default of {where}"),
        }
        # Of a wrapper that a library made, such as jax.vmap's, what it wraps is in its closure.
        if _is_library(function.__globals__.get("__name__", "")):
            found["library"] = f"{function.__globals__.get('__name__')}.{code.co_name}"
            return found | {"closure": {name: self.of(value, f"{name} of {where}") for name, value in cells.items()}}
        read = self._reads(code, function.__globals__, cells, where)
        # A module that is closed over is described by what is used of it.
        closure = {
            name: self.of(value, f"{name} of {where}")
            for name, value in cells.items()
            if not isinstance(value, ModuleType)
        }
        return found | {"code": _digest(_code(code).encode()), "closure": closure, "reads": read}

    def _reads(self, code: CodeType, names: Mapping[str, Any], cells: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Names that code, and the code within it, reads beside its arguments: dotted name -> description."""
        found: dict[str, Any] = {}
        instructions = [i for i in dis.get_instructions(code) if i.opname not in ("PUSH_NULL", "CACHE")]
        for at, instruction in enumerate(instructions):
            name = instruction.argval
            if instruction.opname in _GLOBAL:
                if name in names:
                    value = names[name]
                elif hasattr(builtins, name):
                    value = getattr(builtins, name)
                else:
                    if instruction.opname == "LOAD_GLOBAL":
                        self.unseen.append(f"the global {name} of {where} has no value yet")
                    continue
            elif instruction.opname in ("LOAD_DEREF", "LOAD_CLASSDEREF") and isinstance(cells.get(name), ModuleType):
                value = cells[name]
            elif instruction.opname == "IMPORT_NAME":
                level, listed = instructions[at - 2].argval, instructions[at - 1].argval
                for own, value in self._imported(name, level, listed, names, where).items():
                    found[own] = self.of(value, f"{own} in {where}")
                continue
            else:
                continue
            for follower in instructions[at + 1 :]:
                if not isinstance(value, ModuleType) or follower.opname not in _ATTRIBUTE:
                    break
                name, value = f"{name}.{follower.argval}", getattr(value, follower.argval, None)
            if name.rpartition(".")[2] in DYNAMIC and _library_name(value) is not None:
                self.unseen.append(f"{where} calls {name}, and what that reads cannot be seen")
            found[name] = self.of(value, f"{name} in {where}")
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                for name, own in self._reads(constant, names, cells, where).items():
                    found.setdefault(name, own)
        return found

    def _imported(
        self, name: str, level: int, listed: tuple[str, ...] | None, names: Mapping[str, Any], where: str
    ) -> dict[str, Any]:
        """Objects of an import within a function: the names listed after ``from``, or the module and its package."""
        try:
            if level:
                name = importlib.util.resolve_name("." * level + name, str(names.get("__package__")))
            module = importlib.import_module(name)
            if not listed:
                return {own: importlib.import_module(own) for own in (name.partition(".")[0], name)}
            for own in listed:
                if not hasattr(module, own):
                    importlib.import_module(f"{name}.{own}")
            return {f"{name}.{own}": getattr(module, own) for own in listed}
        except Exception as error:
            self.unseen.append(f"{where} imports {name}, which cannot be imported ({error})")
            return {}

    def _module(self, module: ModuleType, where: str) -> Any:
        """A library by its name; a module of the user's that is used as a whole by all that is in it."""
        if _is_library(module.__name__):
            return module.__name__
        own = {
            name: value for name, value in vars(module).items() if not (name.startswith("__") and name.endswith("__"))
        }
        parts = {name: self.of(own[name], f"{name} of {module.__name__}") for name in sorted(own)}
        return {"name": module.__name__, "parts": parts}

    def _class(self, kind: type, where: str) -> Any:
        own = {name: value for name, value in vars(kind).items() if name not in NOT_OF_A_CLASS and not _is_slot(value)}
        parts = {name: self.of(own[name], f"{name} of {kind.__name__}") for name in sorted(own)}
        bases = [self.of(base, f"a base of {kind.__name__}") for base in kind.__bases__]
        return {"name": kind.__name__, "bases": bases, "parts": parts}


# --- helpers ---------------------------------------------------------------------------------------------------------


def _code(code: CodeType) -> str:
    """The instructions of code: without file names, line numbers, addresses, and the order of sets."""
    places = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
    names = (code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)
    constants = [_constant(constant) for constant in code.co_consts]
    return repr((code.co_code.hex(), code.co_exceptiontable.hex(), constants, names, places))


def _constant(constant: Any) -> str:
    if isinstance(constant, CodeType):
        return _code(constant)
    if isinstance(constant, frozenset):
        return f"frozenset({sorted(map(_constant, constant))})"
    if isinstance(constant, tuple):
        return f"({', '.join(map(_constant, constant))})"
    return repr(constant)


@functools.cache
def _is_library(name: str) -> bool:
    """Whether a module is Python's, of an installed package, or of mixjax, and not written by the user."""
    root = name.partition(".")[0]
    if root == "mixjax" or root in sys.stdlib_module_names - {"__main__"}:
        return True
    if root == "__main__":
        return False
    try:
        found = sys.modules.get(root)
        path = getattr(found, "__file__", None) or next(iter(getattr(found, "__path__", [])), None)
    except Exception:
        return False
    return path is not None and not {"site-packages", "dist-packages"}.isdisjoint(Path(path).parts)


def _library_name(value: Any) -> str | None:
    """Where in a library something is found under its own name; None where it is not, or is no library's."""
    owner = getattr(value, "__self__", None)
    module = getattr(value, "__module__", None) or (owner.__name__ if isinstance(owner, ModuleType) else None)
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if not isinstance(module, str) or not isinstance(name, str) or not _is_library(module):
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is value or (isinstance(value, type) and module in sys.modules):
        return f"{module}.{name}"
    return None


def _is_slot(value: Any) -> bool:
    return type(value).__name__ in ("member_descriptor", "getset_descriptor")


def _slots(kind: type) -> list[str]:
    own = vars(kind) if "__slots__" in vars(kind) else {}
    return sorted(name for name, value in own.items() if type(value).__name__ == "member_descriptor")


def _listed(value: Any) -> Any:
    """The items of an iterator, as reductions have them for those of a container."""
    return list(value) if hasattr(value, "__next__") or isinstance(value, tuple) else value


def _numpy(value: Any) -> np.ndarray:
    if isinstance(value, jax.Array) and jax.numpy.issubdtype(value.dtype, jax.dtypes.prng_key):
        value = jax.random.key_data(value)
    return np.asarray(value)


def _json(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def _digest(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()[:16]
