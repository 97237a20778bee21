"""Expressions and terms on rows: their values, columns of a model matrix, and what they learnt from the rows of a fit.

What an expression computes of a whole column (a mean, knots, the largest value) is remembered, so that a new row means
the same by it.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, TypeVar

import numpy as np
import pandas as pd

from mixjax.checks import DataError, FormulaError, listed, some_of
from mixjax.formula.algebra import Effects
from mixjax.formula.coding import Contrasts, Factor, Levels, Spec, code_terms, metadata_of
from mixjax.formula.context import CURES, Context, by_row
from mixjax.formula.syntax import Expression
from mixjax.formula.table import TextColumn, content, is_text

MOST_COLUMNS = 20_000
# Relative size of what may differ where a row is computed among others: vector instructions round in their own way.
ROUNDING = 1e-9
Made = TypeVar("Made")


# --- values of expressions -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Learnt:
    """Statistics and levels that an expression took from the rows of the fit.

    Attributes:
        state: call -> state of a stateful transform, or a statistic of whole columns.
        alone: False where the value of a row depends on its company all the same (a cumulative sum, ranks).
    """

    state: dict[str, Any]
    alone: bool = True


class _Program(ast.NodeTransformer):
    """Code in which transforms find their state and statistics are remembered."""

    def __init__(self, aliases: Mapping[str, str], environment: Mapping[str, Any]):
        self.aliases, self.environment = aliases, environment
        self.by_row = True  # as far as one can tell without trying

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        self.by_row = False
        return node

    visit_ListComp = visit_GeneratorExp = visit_SetComp = visit_DictComp = visit_Lambda  # type: ignore[assignment]

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        self.by_row = False
        return self.generic_visit(node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        self.by_row &= not self._reads(node)  # x.index, x.array
        return self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> ast.AST:
        key = ast.Constant(ast.unparse(node))
        reads = self._reads(node)
        self.generic_visit(node)
        function = self.function(node.func)
        if getattr(function, "__is_stateful_transform__", False):
            state = ast.Call(ast.Name("__state__", ast.Load()), [key], [])
            node.keywords.append(ast.keyword("_state", state))
            return node
        if not reads:
            return node
        if isinstance(function, np.ufunc) or function in by_row():
            return node
        self.by_row = False
        none = ast.arguments(posonlyargs=[], args=[], kwonlyargs=[], kw_defaults=[], defaults=[])
        return ast.Call(ast.Name("__keep__", ast.Load()), [key, ast.Lambda(none, node)], [])

    def _reads(self, node: ast.AST) -> bool:
        return any(isinstance(part, ast.Name) and part.id in self.aliases for part in ast.walk(node))

    def function(self, node: ast.expr) -> Any:
        """The function that is called, where that is known without evaluating anything."""
        match node:
            case ast.Name(id=name):
                return self.environment.get(name)
            case ast.Attribute(value=value, attr=name):
                home = self.function(value)
                return getattr(home, name, None) if isinstance(home, ModuleType | type) else None
        return None


def _is_statistic(value: Any, n: int) -> bool:
    """Of the whole table and not of its rows."""
    if isinstance(value, np.ndarray | pd.Series | pd.Index | list | tuple):
        return np.ndim(value) == 0 or len(value) != n
    return isinstance(value, int | float | complex | str | np.generic | pd.Timestamp | pd.Timedelta)


def _run(
    e: Expression, frame: pd.DataFrame, context: Context, state: dict[str, Any], learning: bool
) -> tuple[Any, bool]:
    """The value of an expression, and whether it surely goes row by row."""
    if e.column is not None:
        return frame[e.column], True
    frame = frame.reset_index(drop=True)
    environment = context.environment()
    program = _Program(e.aliases, environment)
    tree = ast.fix_missing_locations(program.visit(ast.Expression(e.tree)))

    def keep(key: str, value: Callable[[], Any]) -> Any:
        if key in state:
            return state[key]
        found = value()
        if learning and _is_statistic(found, len(frame)):
            state[key] = found
        return found

    environment |= {alias: frame[name] for alias, name in e.aliases.items()}
    environment |= {"__state__": lambda key: state.setdefault(key, {}), "__keep__": keep}
    with np.errstate(all="ignore"):  # what is not finite is reported by name
        return eval(compile(tree, "<formula>", "eval"), environment), program.by_row


def evaluate(e: Expression, frame: pd.DataFrame, context: Context, learnt: Learnt | None = None) -> tuple[Any, Learnt]:
    """The values of an expression on the rows of a frame.

    Args:
        e: the expression. frame: its columns. context: other names.
        learnt: from the rows of the fit; None on these themselves.

    Returns:
        An array ``(n,)`` or ``(n, k)`` of floats, a Factor, or formulaic's values; and what was learnt.

    Raises:
        FormulaError, DataError: the expression, and why it has no value.
    """
    state = {} if learnt is None else learnt.state
    try:
        value, by_row = _run(e, frame, context, state, learnt is None)
        value = as_values(value, len(frame), e)
        if learnt is None:
            by_row = by_row and bool(e.columns)
            learnt = Learnt(state, by_row or _goes_by_row(e, frame, context, state, value))
    except (DataError, FormulaError) as error:
        raise type(error)(str(error) if e.shown in str(error) else f"'{e}': {error}") from None
    except Exception as error:
        raise FormulaError("; ".join([f"'{e}' cannot be evaluated: {_plain(error)}", *_cures(e, frame)])) from error
    return value, learnt


def _goes_by_row(e: Expression, frame: pd.DataFrame, context: Context, state: dict[str, Any], value: Any) -> bool:
    """Whether rows have the values that they have among all: every second one, backwards, the others, some alone."""
    n = len(frame)
    parts = [np.arange(n)[::-2], np.arange(n - 1)[::-2], *([row] for row in {0, n // 3, n // 2, n - 1})]
    return bool(e.columns) and all(_same_there(e, frame, np.array(rows), context, state, value) for rows in parts)


def _same_there(
    e: Expression, frame: pd.DataFrame, rows: np.ndarray, context: Context, state: dict[str, Any], value: Any
) -> bool:
    try:
        part, _ = _run(e, frame.iloc[rows], context, {**state}, False)
        part = as_values(part, len(rows), e)
    except Exception:
        return False
    here, there = (np.asarray(_bare(v)) for v in (value, part))
    here = here[rows]
    if here.shape != there.shape or here.dtype.kind != "f" or there.dtype.kind != "f":
        return here.shape == there.shape and bool((here == there).all())
    size = np.abs(here[np.isfinite(here)]).max(initial=0.0)
    return bool(np.allclose(here, there, rtol=ROUNDING, atol=ROUNDING * size, equal_nan=True))


def _bare(value: Any) -> Any:
    value = value if metadata_of(value) is None else value.__wrapped__
    if isinstance(value, dict):
        return np.column_stack([np.asarray(v) for k, v in value.items() if not str(k).startswith("__")])
    return value


def as_values(value: Any, n: int, e: Expression) -> Any:
    """The value of an expression as numbers or a factor: truth values and text are factors."""
    metadata, bare = metadata_of(value), _bare(value)
    if metadata is not None and (metadata.kind.value == "categorical" or np.ndim(bare) == 2):
        if len(bare) != n:
            raise FormulaError(f"'{e}' gives {len(bare)} values for {n} rows")
        own = metadata.encoder or Contrasts(None, None)
        if metadata.kind.value != "categorical" or not isinstance(own, Contrasts):
            return value
        factor = Factor.of(pd.Series(bare), own.levels)
        spans = metadata.spans_intercept
        return replace(factor, contrasts=own.contrasts, spans_intercept=spans, declared=True)
    value = bare
    if value is None:
        raise FormulaError(f"'{e}' gives None, and no values")
    if isinstance(value, pd.DataFrame):
        from formulaic import FactorValues

        return FactorValues({str(k): as_values(v, n, e) for k, v in value.items()}, kind="numerical")
    if not isinstance(value, pd.Series):
        array = np.asarray(value)
        if array.ndim == 0:
            raise FormulaError(f"'{e}' gives one value ({value!r}), not one for every row")
        if array.ndim == 2 and array.dtype.kind in "iufb" and len(array) == n:
            return array.astype(float)
        if array.ndim != 1:
            raise FormulaError(f"'{e}' gives an array of shape {array.shape} for {n} rows")
        value = pd.Series(array)
    if len(value) != n:
        raise FormulaError(f"'{e}' gives {len(value)} values for {n} rows")
    if isinstance(value.dtype, pd.CategoricalDtype):
        return Factor.of(value)
    if pd.api.types.is_bool_dtype(value.dtype) or is_text(value):
        return Factor.of(value.astype(object))
    if pd.api.types.is_complex_dtype(value.dtype) or not pd.api.types.is_numeric_dtype(value.dtype):
        raise DataError(f"'{e}' gives {value.dtype} values; make numbers of them, for example days or seconds")
    return value.to_numpy(float)


def _plain(error: Exception) -> str:
    text = str(error).replace("\n", " ") or type(error).__name__
    return text if isinstance(error, ValueError) else f"{type(error).__name__}: {text}"


def _cures(e: Expression, frame: pd.DataFrame) -> list[str]:
    called = {ast.unparse(node.func) for node in ast.walk(e.tree) if isinstance(node, ast.Call)}
    cures = [cure for name, cure in CURES.items() if name in called or name in e.names]
    texts = {name: TextColumn(frame[name]) for name in e.columns if is_text(frame[name])}
    return cures + [f"column '{name}' holds {own.content()}" for name, own in texts.items() if own.mostly_numbers()]


def numbers(
    e: Expression, frame: pd.DataFrame, context: Context, what: str, learnt: Learnt | None = None, where: str = ""
) -> tuple[np.ndarray, Learnt]:
    """One numeric column; truth values count as 0 and 1."""
    if e.column is not None:
        column = frame[e.column]
        column = column.infer_objects() if column.dtype == object else column  # truth values among missing ones
        if not (pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)):
            raise DataError(f"the {what} '{e}' is not numeric: it holds {content(frame[e.column])}")
        return column.to_numpy(float), Learnt({})
    value, learnt = evaluate(e, frame, context, learnt)
    if isinstance(value, Factor) and not value.declared and set(value.levels) <= {False, True}:
        value = np.asarray(value, float)
    if not isinstance(value, np.ndarray) or value.size != len(frame):
        raise DataError(f"the {what} '{e}' is not one numeric column")
    _check_finite(value.reshape(-1, 1), [e.shown], frame.index, where)
    return value.reshape(-1), learnt


def _check_finite(columns: np.ndarray, names: Sequence[str], index: pd.Index, where: str = "") -> None:
    if np.isfinite(columns).all():
        return
    for j, name in enumerate(names):
        bad = ~np.isfinite(columns[:, j])
        if bad.any():
            raise DataError(
                f"'{name}' is not finite in {int(bad.sum())} rows{where} (first: row {index[np.flatnonzero(bad)[0]]}); "
                "leave them out with subset=, or change the expression"
            )


# --- columns of terms ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """A part of a formula as a function of rows: always these columns, by what the rows of the fit had.

    Attributes:
        effects: the terms. names: of the columns, as formulaic names them. spec: how terms become columns.
        learnt: expression -> what it took from the rows of the fit. context: other names that it reads.
    """

    effects: Effects
    names: tuple[str, ...]
    spec: Spec
    learnt: Mapping[str, Learnt]
    context: Context

    def of(self, frame: pd.DataFrame, where: str = " of newdata") -> np.ndarray:
        """``(m, columns)`` of other rows.

        Raises:
            DataError: an expression depends on the other rows, a category is unknown, or a value is not finite.
        """
        if not len(frame) or not self.names:
            return np.zeros((len(frame), len(self.names)))
        self.refuse_company()
        values = {}
        for e in self.effects.expressions:
            values[e.shown], _ = evaluate(e, frame, self.context, self.learnt[e.shown])
            self._check_categories(e, values[e.shown], where)
        columns = _coded(values, lambda: self.spec.matrix(values, len(frame)))
        _check_finite(columns, self.names, frame.index, where)
        return columns

    def levels_of(self, frame: pd.DataFrame) -> dict[str, np.ndarray]:
        """Expression -> its columns ``(m, k)`` on rows, of a factor one for every level."""
        found = {}
        for e in self.effects.expressions:
            value, _ = evaluate(e, frame, self.context, self.learnt[e.shown])
            found[e.shown] = self.spec.coders[e.shown].block(value, False)[1]
        return found

    def refuse_company(self) -> None:
        """Raise DataError where the value of a row depends on the other rows of the table."""
        for e in self.effects.expressions:
            refuse_company(e, self.learnt[e.shown])

    def categories(self, e: Expression) -> list[Any] | None:
        """The categories of an expression in the fit; None of numbers."""
        return self.spec.coders[e.shown].levels

    def _check_categories(self, e: Expression, value: Any, where: str) -> None:
        coder = self.spec.coders[e.shown]
        if isinstance(coder, Levels) != isinstance(value, Factor):
            known = self.categories(e)
            holds, had = ("text", "numbers") if known is None else ("numbers", f"the categories {listed(known)}")
            raise DataError(f"'{e}' gives {holds}{where}; the fit had {had}")
        if isinstance(coder, Levels) and (new := coder.unknown(value)):
            own = listed(coder.levels)
            raise DataError(f"'{e}' has {listed(new)}{where}, not among the categories of the fit: {own}")


def refuse_company(e: Expression, learnt: Learnt) -> None:
    """Raise DataError where the value of a row depends on the other rows of the table."""
    if not learnt.alone:
        raise DataError(
            f"'{e}' gives a row another value when the other rows are missing or stand in another order, so it says "
            "nothing of new rows: make a column of it before fitting, and name the column in the formula"
        )


def _levels(value: Any, alone: bool = False) -> list[Any] | None:
    """The levels of a factor, also those without rows in this chunk; None of numbers.

    Args:
        alone: without levels that ``C(..., levels=)`` adds to those of the rows.
    """
    if isinstance(value, Factor):
        added = alone and value.declared
        return [value.levels[k] for k in np.unique(value.codes) if k >= 0] if added else value.levels
    metadata = metadata_of(value)
    return list(pd.unique(_bare(value))) if metadata is not None and metadata.kind.value == "categorical" else None


def columns_of(
    effects: Effects, frame: pd.DataFrame, context: Context, several: bool = True
) -> tuple[np.ndarray, Columns]:
    """The columns ``(n, p)`` that terms have on the rows of a fit, and the same as a function of other rows.

    Args:
        effects: the terms. frame: complete rows. context: names beside columns.
        several: whether a factor must have more than one level.

    Raises:
        FormulaError, DataError: an expression cannot be evaluated, a factor has one level, a value is not finite.
    """
    values, learnt = {}, {}
    for e in effects.expressions:
        if e.column == "Intercept":
            raise DataError("a column called 'Intercept' has the name of the constant column: rename it")
        values[e.shown], learnt[e.shown] = evaluate(e, frame, context)
        levels = _levels(values[e.shown], alone=True)
        if several and levels is not None and len(levels) < 2:
            raise DataError(
                f"the factor '{e}' has one level in the rows used ({listed(levels)}): there is "
                "nothing to compare; leave it out, or look at subset= and at missing values"
            )
    _check_size(effects, values)
    columns, spec = _coded(values, lambda: code_terms(effects.terms, values, len(frame)))
    names = [name for term in spec.structure for name in term.columns]
    twice = {name for name in names if names.count(name) > 1} if len(set(names)) < len(names) else ()
    if twice:
        raise DataError(f"two columns of '{effects}' would be named {some_of(sorted(twice))}: rename a column")
    _check_finite(columns, names, frame.index)
    return columns, Columns(effects, tuple(names), spec, learnt, context)


def _check_size(effects: Effects, values: Mapping[str, Any]) -> None:
    wide = {}
    for name, value in values.items():
        levels = _levels(value)
        wide[name] = (*np.shape(_bare(value)), 1)[1] if levels is None else len(levels)
    widths = {":".join(term): math.prod(wide[name] for name in term) for term in effects.terms}
    if sum(widths.values()) > MOST_COLUMNS:
        widest = max(widths, key=lambda name: widths[name])
        raise DataError(
            f"'{widest}' has {widths[widest]} columns, and all terms {sum(widths.values())} (limit {MOST_COLUMNS}): a "
            "factor of so many levels is better a random effect, (1 | g)"
        )


def _coded(values: Mapping[str, Any], code: Callable[[], Made]) -> Made:
    try:
        return code()
    except (ValueError, TypeError, KeyError, IndexError) as error:
        raise FormulaError(f"'{', '.join(values)}' cannot be coded: {_plain(error)}") from error
