"""The fixed part of a fit as a function of new rows, and the grid of rows that marginal means average over."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from mixjax.checks import DataError, FormulaError
from mixjax.design import refuse_smooths
from mixjax.formula.evaluate import Columns, evaluate
from mixjax.formula.state import FormulaState
from mixjax.formula.syntax import Expression
from mixjax.formula.table import level_name, refuse_unknown

if TYPE_CHECKING:
    from mixjax.fitted.either import AnyRecord

MOST_ROWS = 100_000


# --- rows of the model matrix -------------------------------------------------------------------------------------


class ModelRows(NamedTuple):
    """Model-matrix rows of a table.

    Attributes:
        X: ``(g, f)``, all columns of the formula, also those left out of the fit. offset: ``(g,)``.
    """

    X: np.ndarray
    offset: np.ndarray


class FixedPart:
    """The fixed part of a fit as a function of rows of a grid.

    Args:
        beside: other formulas, whose variables are in the grid too.

    Attributes:
        variables: columns that fixed effects and offsets read. factors: those with levels -> their values in a grid.
        frame: the rows of the fit. dependence: see :meth:`FormulaState.dependence`.
    """

    def __init__(self, fitted: AnyRecord, beside: Sequence[Columns] = ()):
        self.labels = fitted.labels
        refuse_smooths(
            self.labels,
            "means over a grid",
            "they would leave its curve out; fit.test() tests differences, fit.predict(rows, random=False) gives means",
        )
        self.state: FormulaState = self.labels.state
        if self.labels.frame is None:
            raise DataError(
                "this fit kept no rows, and means need them (levels, means of covariates); fit the whole table"
            )
        if not self.labels.fixed:
            raise DataError(f"{self.labels.formula!r} has no fixed effects, so there are no means to estimate")
        self.frame: pd.DataFrame = self.labels.frame
        self.parts = (self.state.fixed, *beside)
        read = {*self.state.predictors, *(name for part in beside for name in part.effects.columns)}
        self.variables = [str(name) for name in self.frame.columns if name in read]
        self.made: dict[str, str] = {}  # variable -> the factor that the formula makes of several of its values
        self.factors: dict[str, list[Any]] = {}
        for name in self.variables:
            levels = self._levels(name)
            # emmeans' default as well: a covariate of two values is averaged over both.
            if levels is not None or self.frame[name].nunique() <= 2:
                self.factors[name] = sorted(self.frame[name].unique().tolist()) if levels is None else levels
        # Of an offset= only the sum with those of the formula is known.
        total = None if fitted.kept is None else fitted.design.offset
        own = self.state.offset_of(self.frame)
        self._given_offset = 0.0 if total is None else float(np.mean(np.asarray(total) - own))
        self.choose(())
        self.dependence = self.state.dependence(self.frame)

    def choose(self, names: Sequence[str]) -> None:
        """Variables that have values of their own in a grid: offsets of the formula that read one are evaluated there.
        Others, and an ``offset=``, count with their mean over the rows, as in emmeans: of ``offset(log(exposure))``
        that is the mean of the logarithms."""
        moving = tuple(one for one in self.state.offsets if not set(names).isdisjoint(one[0].columns))
        held = tuple(one for one in self.state.offsets if set(names).isdisjoint(one[0].columns))
        self.moving = replace(self.state, offsets=moving)
        self.mean_offset = self._given_offset
        if held:
            self.mean_offset += float(np.mean(replace(self.state, offsets=held).offset_of(self.frame)))
        self.has_mean_offset = bool(held) or self._given_offset != 0.0
        read = {name for part in self.parts for name in part.effects.columns}
        read |= {name for e, _ in moving for name in e.columns}
        # Nothing but offsets that count with their mean reads these.
        self.idle = {name for name in self.variables if name not in read}

    def is_number(self, name: str) -> bool:
        """Any number makes sense to the formula, which makes no factor of it."""
        dtype = self.frame[name].dtype
        return pd.api.types.is_numeric_dtype(dtype) and dtype != np.bool_ and not self._factors_of(name)

    def _reading(self, name: str) -> dict[str, tuple[Expression, Columns]]:
        """What is written of a variable -> the expression and the first formula that has it."""
        found: dict[str, tuple[Expression, Columns]] = {}
        for part in self.parts:
            for e in part.effects.expressions:
                if name in e.columns:
                    found.setdefault(e.shown, (e, part))
        return found

    def _factors_of(self, name: str) -> list[Expression]:
        return [e for e, part in self._reading(name).values() if part.categories(e) is not None]

    def _levels(self, name: str) -> list[Any] | None:
        """Values of a factor, one for each level that the formula makes of them; None for a number."""
        if self.is_number(name):
            return None
        column, made = self.frame[name], self._factors_of(name)
        if isinstance(column.dtype, pd.CategoricalDtype):
            values = list(column.cat.categories)
        else:
            values = sorted(column.unique().tolist())
        if not made or any(name in (e.column, e.factor_of) for e in made):
            return values
        several = [e.shown for e in made if e.columns != (name,)]
        if several:
            self.made[name] = several[0]
            return values
        table = pd.DataFrame({name: pd.Series(values, dtype=column.dtype)})
        codes = []
        for e in made:
            learnt = self._reading(name)[e.shown][1].learnt[e.shown]
            value = evaluate(e, table, self.state.context, learnt)[0]
            codes.append(pd.factorize(np.asarray(value))[0])
        level = pd.MultiIndex.from_arrays(codes)
        if level.is_unique:
            return values
        self.made[name] = made[0].shown
        return [value for value, again in zip(values, level.duplicated(), strict=True) if not again]

    def refuse_made(self, name: str, shown: bool) -> None:
        """Raise DataError where values of a variable do not stand for levels of the factor made of it."""
        if name not in self.made:
            return
        made, reading = self._factors_of(name), self._reading(name)
        if shown or len(made) < len(reading) or made[0].columns != (name,):
            raise DataError(
                f"the formula makes the factor '{self.made[name]}' of '{name}': make a column of the factor before "
                "fitting, to average over its levels or to compare them"
            )

    def rows(self, grid: pd.DataFrame) -> ModelRows:
        """Rows of the model matrix. Factors of the grid hold levels, other columns numbers."""
        table = self._table(grid)
        try:
            return ModelRows(self.state.fixed.of(table, ""), self.moving.offset_of(table) + self.mean_offset)
        except (FormulaError, DataError) as error:
            raise DataError(
                f"the formula cannot be evaluated at {described(grid)} (change it with at=): {error}"
            ) from error

    def rows_of(self, part: Columns, kept: np.ndarray, grid: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        """Columns of another formula in the rows of a grid: ``(g, r)`` those in the fit, ``kept`` of all, and what
        these leave open ``(g, d)``."""
        other = replace(self.state, fixed=part, kept=kept)
        try:
            return other.split(part.of(self._table(grid), ""), other.dependence(self.frame))
        except (FormulaError, DataError) as error:
            raise DataError(
                f"the formula cannot be evaluated at {described(grid)} (change it with at=): {error}"
            ) from error

    def _table(self, grid: pd.DataFrame) -> pd.DataFrame:
        table = pd.DataFrame(index=pd.RangeIndex(len(grid)))
        for name in self.variables:
            dtype = float if self.is_number(name) else self.frame[name].dtype
            table[name] = pd.Series(list(grid[name]), dtype=dtype)
        return table

    def effects(self, grid: pd.DataFrame) -> list[np.ndarray]:
        """Columns ``(g, q)`` of every random term in the rows of a grid; numbers that only these read are held at their
        means.

        Raises:
            DataError: they read a factor that is not among the fixed effects.
        """
        table = pd.DataFrame(index=pd.RangeIndex(len(grid)))
        for name in dict.fromkeys(name for part in self.state.random for name in part.effects.columns):
            column = self.frame[name]
            if name in self.variables:
                dtype: Any = float if self.is_number(name) else column.dtype
                table[name] = pd.Series(list(grid[name]), dtype=dtype)
            elif pd.api.types.is_numeric_dtype(column.dtype) and column.dtype != np.bool_:
                table[name] = float(column.mean())
            else:
                raise DataError(
                    f"the random effects read '{name}', a factor that is not among the fixed effects, so a mean over "
                    "them has no value of it; add it to the fixed effects, or use predict(integrate=True)"
                )
        try:
            return [part.of(table) for part in self.state.random]
        except (FormulaError, DataError) as error:
            raise DataError(
                f"the random effects cannot be evaluated at {described(grid)} (change it with at=): {error}"
            ) from error

    def weights(self, X: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Averaged rows ``(k, f)`` -> weights ``(k, p)`` of the fixed effects, and what those leave open ``(k, d)``."""
        return self.state.split(X, self.dependence)


def described(grid: pd.DataFrame) -> str:
    parts = []
    for name in grid.columns:
        values = list(dict.fromkeys(map(as_text, grid[name])))
        parts.append(f"{name} = {', '.join(values[:6])}{', ...' if len(values) > 6 else ''}")
    return "; ".join(parts)


def as_text(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else level_name(value)


# --- the reference grid -------------------------------------------------------------------------------------------


def check_names(model: FixedPart, names: Sequence[str], where: str) -> None:
    parsed = model.state.parsed
    groups = {name for part in parsed.random for name in part.group.columns}
    for name in names:
        if name in model.variables:
            continue
        if name in (model.labels.response, *parsed.response.columns):
            raise DataError(f"'{name}' ({where}) is the response; name variables of the fixed effects")
        if name in groups:
            raise DataError(
                f"'{name}' ({where}) is a grouping factor of the random effects, not among the fixed effects"
            )
        refuse_unknown(name, model.variables, where, lacking="the fixed effects have no column")


def _values(model: FixedPart, name: str, at: Mapping[str, Any]) -> list[Any]:
    """The values of one variable in the grid."""
    if name not in at:
        model.refuse_made(name, False)
        return model.factors[name] if name in model.factors else [float(np.mean(model.frame[name].to_numpy(float)))]
    one = at[name] is None or isinstance(at[name], str) or np.ndim(at[name]) == 0
    alone = at[name].item() if one and isinstance(at[name], np.ndarray) else at[name]
    given = np.asarray([alone] if one else at[name], object).tolist() if one or np.ndim(at[name]) == 1 else None
    if given is None or any(isinstance(value, list | tuple | dict | set) for value in given):
        raise DataError(f"at= for '{name}' must be a value or a list of values, got {at[name]!r}")
    given = list(dict.fromkeys(given))
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
    """Cells of the named variables, each with its rows over the others.

    Attributes:
        others: what a title says of the variables that are not named. averaged: those of several values.
    """

    cells: pd.DataFrame
    table: pd.DataFrame
    others: str
    averaged: list[str]


def reference_grid(model: FixedPart, shown: list[str], at: Mapping[str, Any]) -> Grid:
    averaged = [name for name in model.variables if name not in shown and name not in model.idle]
    for name in shown:
        model.refuse_made(name, True)
        if name not in model.factors and name not in at:
            raise DataError(
                f"'{name}' is numeric: give its values, at={{'{name}': [...]}}, or take its slope with emtrends"
            )
    values = {name: _values(model, name, at) for name in (*shown, *averaged)}
    values |= {name: _values(model, name, at)[:1] for name in model.idle}
    size = int(np.prod([float(len(v)) for v in values.values()]))
    if size > MOST_ROWS:
        raise DataError(f"the reference grid has {size} rows (limit {MOST_ROWS}): fix some variables with at=")
    cells = _crossed({name: values[name] for name in shown})
    for name in shown:
        if not model.is_number(name):
            cells[name] = pd.Series(list(cells[name]), dtype=model.frame[name].dtype)
    over = [name for name in averaged if len(values[name]) > 1]
    fixed = [f"{name} = {as_text(values[name][0])}" for name in averaged if len(values[name]) == 1]
    fixed += [f"offset = {as_text(model.mean_offset)}"] if model.has_mean_offset else []
    others = "; ".join(filter(None, (f"averaged over {', '.join(over)}" if over else "", ", ".join(fixed))))
    return Grid(cells, _crossed(values), others, over)


def _crossed(values: Mapping[str, list[Any]]) -> pd.DataFrame:
    """All combinations, the last name varying fastest; of no names, one row."""
    rows = list(itertools.product(*values.values()))
    return pd.DataFrame(
        {name: [row[j] for row in rows] for j, name in enumerate(values)}, index=pd.RangeIndex(len(rows))
    )
