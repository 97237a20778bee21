"""The fixed part of a fit as a function of new rows, and the grid of rows that marginal means average over."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from formulaic.errors import FormulaicError

from mixjax.fitted import Fitted
from mixjax.formula.build import caller_context, expression, usable
from mixjax.formula.errors import DataError
from mixjax.formula.parse import names_in, parse, quote_columns
from mixjax.formula.table import level_name, refuse_unknown
from mixjax.inference.terms import short_names

MOST_ROWS = 100_000


# --- rows of the model matrix -------------------------------------------------------------------------------------


class Rows(NamedTuple):
    """What the fixed effects make of rows of a table.

    Attributes:
        X: ``(g, f)``, all columns of the formula, also those left out of the fit. offset: ``(g,)``.
    """

    X: np.ndarray
    offset: np.ndarray


class FixedPart:
    """The fixed part of a fit as a function of new rows; knots, centring, contrasts and levels are those of the fit."""

    def __init__(self, fitted: Fitted):
        self.labels = fitted.labels
        self.frame: pd.DataFrame = self.labels.frame
        if self.frame is None:
            raise DataError(
                "this fit kept no rows, and means need them (levels, means of covariates); fit the whole table"
            )
        self.spec = self.labels.specs["fixed"]
        self.context = usable(caller_context())
        self.parsed = quote_columns(parse(self.labels.formula), list(self.frame.columns))
        names = {*map(str, self.spec.required_variables), *(n for text in self.parsed.offsets for n in names_in(text))}
        self.variables = [name for name in self.frame.columns if name in names]
        # emmeans' default as well: a covariate of two values is averaged over both.
        self.factors = {
            name: self._levels(name)
            for name in self.variables
            if not self.is_number(name) or self.frame[name].nunique() <= 2
        }
        # Of an offset= only the sum with those of the formula is known. It counts with its mean, as in emmeans.
        total = None if fitted.design is None else fitted.design.offset
        self.mean_offset = 0.0 if total is None else float(np.mean(np.asarray(total) - self._offset(self.frame)))
        shorten = short_names(self.labels)
        self.kept = np.array([shorten(name) in self.labels.fixed for name in self.spec.column_names], bool)
        self.dependent = self._dependent()

    def is_number(self, name: str) -> bool:
        """Any number makes sense to the formula."""
        dtype = self.frame[name].dtype
        if not pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_bool_dtype(dtype):
            return False
        inside_C = re.compile(rf"C\(\s*`?{re.escape(name)}`?\s*[,)]")
        return not any(inside_C.match(factor.expr) for factor in self.spec.factors)

    def _levels(self, name: str) -> list[Any]:
        column = self.frame[name]
        if isinstance(column.dtype, pd.CategoricalDtype):
            return list(column.cat.categories)
        return sorted(column.unique().tolist())

    def rows(self, grid: pd.DataFrame) -> Rows:
        """Rows of the model matrix. Factors of the grid hold levels, other columns numbers."""
        table = pd.DataFrame(index=pd.RangeIndex(len(grid)))
        for name in self.variables:
            number = self.is_number(name)
            table[name] = (
                grid[name].to_numpy(float) if number else pd.Series(list(grid[name]), dtype=self.frame[name].dtype)
            )
        try:
            with np.errstate(all="ignore"):  # what is not finite is reported below
                X = np.asarray(self.spec.get_model_matrix(table, context=self.context), float).reshape(len(table), -1)
        except (FormulaicError, ValueError) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(
                f"the formula cannot be evaluated at {described(grid)} (change it with at=): {why}"
            ) from error
        bad = np.flatnonzero(~np.isfinite(X).all(axis=0))
        if len(bad):
            name = self.spec.column_names[bad[0]]
            raise DataError(f"'{name}' is not finite at {described(grid)}; change it with at=")
        return Rows(X, self._offset(table) + self.mean_offset)

    def _offset(self, table: pd.DataFrame) -> np.ndarray:
        texts = self.parsed.offsets
        return sum((expression(text, table, self.context, "offset") for text in texts), np.zeros(len(table)))

    def _dependent(self) -> np.ndarray:
        """``(p, d)``: how the columns in the fit make those that were left out."""
        if self.kept.all():
            return np.zeros((int(self.kept.sum()), 0))
        X = self.rows(self.frame).X
        lengths = np.maximum(np.linalg.norm(X, axis=0), np.finfo(float).tiny)
        X = X / lengths
        C = np.linalg.lstsq(X[:, self.kept], X[:, ~self.kept], rcond=None)[0]
        return C / lengths[self.kept, None] * lengths[~self.kept]

    def weights(self, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Averaged rows ``(k, f)`` -> weights ``(k, p)`` of the fixed effects, and what those leave open ``(k, d)``.

        The latter is zero where the columns left out depend on the others as they do in the data: there the mean is the
        same whichever columns are left out.
        """
        own, left = X[:, self.kept], X[:, ~self.kept]
        size = np.abs(left) + np.abs(own) @ np.abs(self.dependent)
        left = left - own @ self.dependent
        return own, np.where(np.abs(left) > 1e-8 * size, left, 0.0)


def described(grid: pd.DataFrame) -> str:
    parts = []
    for name in grid.columns:
        values = list(dict.fromkeys(map(as_text, grid[name])))
        parts.append(f"{name} = {', '.join(values[:6])}{', ...' if len(values) > 6 else ''}")
    return "; ".join(parts)


def as_text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else level_name(value)


# --- the reference grid -------------------------------------------------------------------------------------------


def names_of(value: Any, what: str) -> list[str]:
    if value is None or value in ("1", ""):
        return []
    names = [value] if isinstance(value, str) else list(value)
    if not all(isinstance(name, str) for name in names) or len(set(names)) < len(names):
        raise ValueError(f"{what} must be a name or a list of different names, got {value!r}")
    return names


def check_names(model: FixedPart, names: Sequence[str], where: str) -> None:
    groups = {name for part in model.parsed.random for name in part.group.columns}
    for name in names:
        if name in model.variables:
            continue
        if name in (model.labels.response, *names_in(model.parsed.response)):
            raise DataError(f"'{name}' ({where}) is the response; name variables of the fixed effects")
        if name in groups:
            raise DataError(
                f"'{name}' ({where}) is a grouping factor of the random effects, not among the fixed effects"
            )
        refuse_unknown(name, model.variables, where)


def _values(model: FixedPart, name: str, at: Mapping[str, Any]) -> list[Any]:
    """The values of one variable in the grid."""
    if name not in at:
        return model.factors[name] if name in model.factors else [float(np.mean(model.frame[name].to_numpy(float)))]
    given = [at[name]] if np.isscalar(at[name]) else list(dict.fromkeys(at[name]))
    if not given:
        raise DataError(f"at= has no value for '{name}'")
    if name in model.factors and not model.is_number(name):
        by_name = {level_name(level): level for level in model.factors[name]}
        for value in given:
            if level_name(value) not in by_name:
                raise DataError(f"'{name}' has no level {value!r} (at=); levels: {', '.join(by_name)}")
        return [by_name[level_name(value)] for value in given]
    try:
        values = [float(value) for value in given]
    except (TypeError, ValueError):
        raise DataError(f"at= for '{name}' must be numbers, got {at[name]!r}") from None
    if not np.isfinite(values).all():
        raise DataError(f"at= for '{name}' must be finite, got {at[name]!r}")
    return values


class Grid(NamedTuple):
    """Cells of the named variables, each with its rows over the others."""

    cells: pd.DataFrame
    table: pd.DataFrame
    others: str


def reference_grid(model: FixedPart, shown: list[str], at: Mapping[str, Any]) -> Grid:
    averaged = [name for name in model.variables if name not in shown]
    for name in shown:
        if name not in model.factors and name not in at:
            raise DataError(
                f"'{name}' is numeric: give its values, at={{'{name}': [...]}}, or take its slope with emtrends"
            )
    values = {name: _values(model, name, at) for name in (*shown, *averaged)}
    size = int(np.prod([float(len(v)) for v in values.values()]))
    if size > MOST_ROWS:
        raise DataError(f"the reference grid has {size} rows (limit {MOST_ROWS}): fix some variables with at=")
    cells = _crossed({name: values[name] for name in shown})
    for name in shown:
        if not model.is_number(name):
            cells[name] = pd.Series(list(cells[name]), dtype=model.frame[name].dtype)
    over = [name for name in averaged if len(values[name]) > 1]
    fixed = [f"{name} = {as_text(values[name][0])}" for name in averaged if len(values[name]) == 1]
    others = "; ".join(filter(None, (f"averaged over {', '.join(over)}" if over else "", ", ".join(fixed))))
    return Grid(cells, _crossed(values), others)


def _crossed(values: Mapping[str, list[Any]]) -> pd.DataFrame:
    """All combinations, the last name varying fastest; of no names, one row."""
    rows = list(itertools.product(*values.values()))
    return pd.DataFrame(
        {name: [row[j] for row in rows] for j, name in enumerate(values)}, index=pd.RangeIndex(len(rows))
    )
