"""Names that a formula may read beside columns: known functions, the caller's own; fewer where it is untrusted."""

from __future__ import annotations

import ast
import builtins
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd

from mixjax.checks import DataError, FormulaError, listed
from mixjax.formula.coding import Contrasts
from mixjax.formula.smooths import FUNCTIONS as SMOOTHS
from mixjax.formula.syntax import Expression


def log(x: Any, base: float | None = None) -> Any:
    """R's logarithm, whose base may follow."""
    return np.log(x) if base is None else np.log(x) / np.log(base)


def C(data: Any, contrasts: Any = None, *, levels: Any = None, spans_intercept: bool = True) -> Any:
    """formulaic's ``C``; whole numbers have names without decimals, and no level is left out in silence."""
    from formulaic import FactorValues

    values = pd.Series(data.__wrapped__ if isinstance(data, FactorValues) else data).reset_index(drop=True)
    category = isinstance(values.dtype, pd.CategoricalDtype)
    named: Any = values.cat.categories if category else values
    if named.dtype.kind == "f" and (named == np.floor(named)).all():
        whole = named.astype(np.int64)
        values = values.cat.rename_categories(whole) if category else whole
    if isinstance(contrasts, str):
        raise DataError(f"a coding is written contr.{contrasts.removeprefix('contr.')}, without quotes")
    if levels is not None:
        left = [value for value in pd.unique(values.dropna()) if value not in list(levels)]
        if left:
            raise DataError(f"levels={list(levels)} leaves out {listed(left)}, which the column holds")
    coding: Any = Contrasts(contrasts, levels)
    return FactorValues(values, kind="categorical", spans_intercept=spans_intercept, encoder=coding)


# What formulas may call beside formulaic's own: R's names without a prefix.
FUNCTIONS: dict[str, Any] = {
    **{name: getattr(np, name) for name in ("sqrt", "abs", "sin", "cos", "tan", "log1p", "expm1", "round")},
    "log": log,
    "C": C,
}


@cache
def known() -> dict[str, Any]:
    """All that formulas may call. formulaic is imported by the first one that calls anything."""
    from formulaic.transforms import TRANSFORMS

    return {**TRANSFORMS, **FUNCTIONS}


@cache
def by_row() -> tuple[Any, ...]:
    """Elementwise functions, so that nobody need look whether a row's value depends on the others."""
    return (log, C, np.round, np.where, np.clip, known()["I"], known()["exp10"])


# What R users write and nobody here understands.
CURES = {
    "s": "a smooth s(x) is a summand of the model's own formula, by itself; one for each level of f is s(x, by = f)",
    "ns": "use cr(x, df=...) or bs(x, df=...)",
    "cut": "make a column with pandas.cut first",
    "relevel": "order the categories of the column; the first is the base",
    "ifelse": "use np.where(...)",
    "cbind": "fit one response at a time",
    "as.numeric": "as.numeric() is not understood: columns of numbers are numbers; of text use pandas.to_numeric first",
    "as.integer": "as.integer() is not understood: columns of numbers are numbers",
    "as.character": "as.character() is not understood: factor(x) makes names of numbers",
    "T": "write True",
    "F": "write False",
}
# What a formula that is not trusted may call.
# fmt: off
SAFE = (
    "log", "log2", "log10", "log1p", "exp", "exp2", "expm1", "sqrt", "abs", "sin", "cos", "tan", "round", "I", "C",
    "poly", "bs", "cr", "cs", "cc", "center", "scale",
)
# fmt: on


# --- what formulas may read beside columns ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Context:
    """The caller's names that a formula reads, with the values that they had then.

    Attributes:
        own: name -> number, function or module. trusted: whether formulas may be code at all.
    """

    own: Mapping[str, Any] = field(default_factory=dict)
    trusted: bool = True

    def environment(self) -> dict[str, Any]:
        """The names that an expression sees beside columns."""
        names = known() if self.trusted else [name for name in (*SAFE, "contr") if name in known()]
        functions = {name: known()[name] for name in names} | SMOOTHS
        return {"__builtins__": builtins.__dict__ if self.trusted else {}, **functions, **self.own}

    def __getstate__(self) -> dict[str, Any]:
        # Modules and a caller's lambdas cannot be pickled; the former are found again by name.
        own = {}
        for name, value in self.own.items():
            try:
                own[name] = _Module(value.__name__) if isinstance(value, ModuleType) else value
                pickle.dumps(own[name])
            except Exception:
                own[name] = _Lost(name)
        return {"own": own, "trusted": self.trusted}

    def __setstate__(self, state: dict[str, Any]) -> None:
        own = {name: v.module() if isinstance(v, _Module) else v for name, v in state["own"].items()}
        object.__setattr__(self, "own", own)
        object.__setattr__(self, "trusted", state["trusted"])


@dataclass(frozen=True)
class _Module:
    name: str

    def module(self) -> ModuleType:
        return import_module(self.name)


@dataclass(frozen=True)
class _Lost:
    """A function that could not be pickled with the fit."""

    name: str

    def __call__(self, *_args: Any, **_keywords: Any) -> Any:
        raise FormulaError(f"the function '{self.name}' was not stored with the fit: define it in a module")


def caller_context() -> dict[str, Any]:
    """Names visible where mixjax was called from."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "mixjax":
        frame = frame.f_back
    return {**frame.f_globals, **frame.f_locals}


def is_trusted(trusted: bool | None) -> bool:
    """The choice of the call, or that of ``MIXJAX_UNTRUSTED`` for the process."""
    return os.environ.get("MIXJAX_UNTRUSTED", "") in ("", "0") if trusted is None else bool(trusted)


def resolve(
    expressions: Iterable[Expression], caller: Mapping[str, Any], trusted: bool, unknown: Callable[[str, str], Any]
) -> Context:
    """The names that expressions read and that are no columns.

    As in R, a variable called ``scale`` does not get in the way of ``scale(x)``.

    Args:
        expressions: of a formula. caller: names of the caller's. trusted: False refuses whatever could be code.
        unknown: raises for a name that is nowhere, given the expression.
    """
    own: dict[str, Any] = {}
    for e in expressions:
        if not trusted:
            for name in e.names:
                if name not in ("contr", *SAFE):
                    unknown(name, e.shown)
            refuse_code(e)
        for name in (*e.names, *e.functions):
            builtin = (
                trusted and (name in ("int", "float", "str", "bool") or name in e.functions) and hasattr(builtins, name)
            )
            if trusted and name in caller and (callable(caller[name]) or not (name in known() or builtin)):
                own[name] = caller[name]
            elif name not in known() and not builtin:
                cure = next((cure for r, cure in CURES.items() if r.split(".")[0] == name and r in e.shown), None)
                if cure is not None or name in e.functions:
                    raise FormulaError(f"'{e}': {cure or f'there is no function {name!r}'}")
                unknown(name, e.shown)
    return Context(own, trusted)


def refuse_code(e: Expression) -> None:
    """Raise FormulaError for anything but columns, numbers, operators and the functions in ``SAFE``."""
    bad = next((node for node in ast.walk(e.tree) if not _is_safe(node, e.aliases)), None)
    if bad is not None:
        text = ast.unparse(bad)
        for alias, name in e.aliases.items():
            text = text.replace(alias, name)
        raise FormulaError(
            f"'{e}': {text!r} is not allowed in a formula that is not trusted, which is made of columns, numbers, "
            f"+ - * / **, comparisons and {', '.join(SAFE)}"
        )


def _is_safe(node: ast.AST, aliases: Mapping[str, str]) -> bool:
    """Whether a node of a syntax tree can do nothing but arithmetic, as far as it is concerned itself."""
    match node:
        case ast.Name(id=name):
            return name in aliases or name in ("contr", *SAFE)
        case ast.Constant(value=value):
            return isinstance(value, str | bool | int | float) or value is None
        case ast.Call(func=function, args=args, keywords=keywords):
            given = [arg for arg in [*args, *(k.value for k in keywords)] if isinstance(arg, ast.Constant)]
            # A degree or a number of knots, and so of columns.
            large = any(isinstance(arg.value, int | float) and abs(arg.value) > 100 for arg in given)
            return not large and (isinstance(function, ast.Attribute) or getattr(function, "id", "") in SAFE)
        case ast.Attribute(value=ast.Name(id="contr"), attr=name):
            return not name.startswith("_")
        case ast.BinOp(op=op, left=left, right=right):
            texts = [s for s in (left, right) if isinstance(s, ast.List | ast.Tuple | ast.Dict) or _is_text(s)]
            return isinstance(op, ast.Add | ast.Sub | ast.Mult | ast.Div | ast.Pow) and not texts
        case ast.UnaryOp(op=op):
            return isinstance(op, ast.USub | ast.UAdd)
    plain = ast.Compare | ast.List | ast.Tuple | ast.keyword | ast.operator | ast.unaryop | ast.cmpop | ast.expr_context
    return isinstance(node, plain)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and not isinstance(node.value, int | float)
