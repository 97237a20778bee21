"""The formula of a fit as a function of rows: columns of X and of every Z, levels, offset, weights.

What the formula took from the fit's table (contrasts, categories, knots, means) and from its surroundings (a number
called ``shift``) stays as it was: a row means the same alone, in another order, among others, and tomorrow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mixjax.checks import DataError, some_of, warn
from mixjax.design import Labels
from mixjax.formula.context import Context
from mixjax.formula.evaluate import Columns, Learnt, numbers, refuse_company
from mixjax.formula.parse import ParsedFormula
from mixjax.formula.reading import column_names, read_columns
from mixjax.formula.syntax import Expression, column
from mixjax.formula.table import (
    as_numbers,
    check_finite,
    combinations,
    counts_of,
    level_name,
    missing_in,
    refuse_unknown,
    selected,
    settle,
)

# What the columns left out of the fit add beyond those in it, relative to their size, that is rounding.
ROUNDING = 1e-8


@dataclass(frozen=True)
class FormulaState:
    """All that a fit's formula is, once it has met its table.

    Attributes:
        parsed: the formula. fixed, random: its parts as functions of rows; random in the order of the labels.
        kept: ``(f,)`` which columns of the fixed effects are in the fit; others determine the rest.
        offsets: expressions of ``offset(...)`` with what they learnt.
        weights, offset: names of columns that were given beside the formula. offset_beside: an offset was given as
            numbers, which say nothing of new rows.
        size: name of the column of numbers of trials, or None. New rows need it only where responses are drawn.
        contrasts: as given. context: names beside columns, with their values then.
        kinds: column that expressions read -> dtype in the fit.
        levels: grouping factor -> ``(m, columns)`` names of the values that make every level.
        psi: of each of the family's parameters its formula as a function of rows, and which of its columns are in the
            fit, or None; ``()`` where none has one.
        dispersion: the formula of the residuals' standard deviations, and which of its columns these depend on.
    """

    parsed: ParsedFormula
    fixed: Columns
    kept: np.ndarray
    random: tuple[Columns, ...]
    offsets: tuple[tuple[Expression, Learnt], ...]
    weights: str | None
    offset: str | None
    offset_beside: bool
    contrasts: Mapping[str, str]
    context: Context
    kinds: Mapping[str, Any]
    levels: Mapping[str, np.ndarray]
    size: str | None = None
    psi: tuple[tuple[Columns, np.ndarray] | None, ...] = ()
    dispersion: tuple[Columns, np.ndarray] | None = None

    @property
    def predictors(self) -> tuple[str, ...]:
        """Columns that fixed effects and offsets read."""
        return tuple(dict.fromkeys([*self.fixed.effects.columns, *(n for e, _ in self.offsets for n in e.columns)]))

    def offset_of(self, frame: pd.DataFrame, where: str = "") -> np.ndarray:
        """The sum of the formula's offsets, ``(m,)``."""
        total = np.zeros(len(frame))
        for e, learnt in self.offsets if len(frame) else ():
            refuse_company(e, learnt)
            total = total + numbers(e, frame, self.context, "offset", learnt, where)[0]
        return total

    def dependence(self, frame: pd.DataFrame) -> np.ndarray:
        """``(p, d)``: how the columns in the fit make those that were left out, on the rows of the fit."""
        if self.kept.all():
            return np.zeros((int(self.kept.sum()), 0))
        X = self.fixed.of(frame, "")
        lengths = np.maximum(np.linalg.norm(X, axis=0), np.finfo(float).tiny)
        X = X / lengths
        C = np.linalg.lstsq(X[:, self.kept], X[:, ~self.kept], rcond=None)[0]
        # Rounding of one column must not count where another is all there is.
        C = np.where(np.abs(C) > ROUNDING * np.abs(C).max(axis=0), C, 0.0)
        relative: np.ndarray = C / lengths[self.kept, None] * lengths[~self.kept]
        return relative

    def split(self, X: np.ndarray, dependence: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """All columns ``(m, f)`` -> those in the fit ``(m, p)``, and what they leave open ``(m, d)``.

        The latter is zero where the columns left out depend on the others as they do in the rows of the fit: there a
        mean is the same whichever columns are left out. Without rows nobody knows, and it is zero.
        """
        own, left = X[:, self.kept], X[:, ~self.kept]
        if dependence is None:
            return own, np.zeros_like(left)
        size = np.abs(left) + np.abs(own) @ np.abs(dependence)
        left = left - own @ dependence
        return own, np.where(np.abs(left) > ROUNDING * size, left, 0.0)


def kinds_of(frame: pd.DataFrame, parsed: ParsedFormula) -> dict[str, Any]:
    """The dtypes of the columns that predictors read."""
    return {name: frame[name].dtype for name in dict.fromkeys(n for e in parsed.predictors for n in e.columns)}


# --- new tables ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class NewRows:
    """Rows of a new table as arrays. Only its m complete rows; ``complete`` says which these are.

    Attributes:
        X: ``(m, p)`` fixed-effects columns that are in the fit. estimable: ``(m,)`` False where columns left out of
            the fit would matter.
        Z: per random term ``(m, q)``, or None where it was not asked for. level: per random term ``(m,)`` numbers of
            the fit's levels, -1 for a new one, or None.
        offset: ``(m,)``. weights: ``(m,)`` precision weights, or None where they are not known. size: ``(m,)`` numbers
            of trials, or None where they are not known or there are none.
        index: labels of all rows of the table. complete: ``(rows,)``.
        psi: per parameter of the family ``(m, r)`` its columns that are in the fit, or None; ``()`` where they are not
            needed.
        dispersion: ``(m, d)`` columns of the dispersion formula, or None where there is none or it is not needed.
    """

    X: np.ndarray
    estimable: np.ndarray
    Z: tuple[np.ndarray | None, ...]
    level: tuple[np.ndarray | None, ...]
    offset: np.ndarray
    weights: np.ndarray | None
    index: pd.Index
    complete: np.ndarray
    size: np.ndarray | None = None
    psi: tuple[np.ndarray | None, ...] = ()
    dispersion: np.ndarray | None = None


def new_rows(
    labels: Labels,
    newdata: Any,
    effects: Sequence[bool],
    levels: Sequence[bool],
    allow_new_levels: bool = False,
    weights: bool = False,
    trials: bool = False,
    psi: Sequence[bool] = (),
) -> NewRows:
    """The rows of a new table in the terms of a fit.

    Args:
        labels: of the fit.
        newdata: pandas, polars or pyarrow table, or a dict of arrays, where a single value holds for all rows. The
            response need not be there.
        effects: per random term, whether its columns are needed. levels: whether its levels are.
        allow_new_levels: levels that the fit does not know, and missing ones, are -1; otherwise they are refused. A row
            without a value that the effects read too is not complete.
        weights: whether precision weights are needed, and columns of a dispersion.
        trials: whether numbers of trials are: the column that the fit had as ``size=``; those of ``cbind()`` where
            newdata have them. psi: per parameter of the family whether the columns of its formula are.

    Raises:
        DataError: a column is missing or of the wrong kind; a category, or a level that is not allowed, is unknown;
            the formula cannot be evaluated.

    Warns:
        DataWarning: rows have missing values, or missing levels that are allowed.
    """
    state: FormulaState = labels.state
    random = [columns for columns, wanted in zip(state.random, effects, strict=True) if wanted]
    groups = {t.group: None for t, wanted in zip(labels.terms, levels, strict=True) if wanted}
    of_psi = [part if wanted else None for part, wanted in zip(state.psi, psi, strict=False)]
    own = [part[0] for part in of_psi if part is not None]
    disp = state.dispersion if weights else None
    own += [disp[0]] if disp is not None else []
    table, index = _table(state, newdata, [state.fixed, *random, *own], list(groups), weights, trials)
    missing = missing_in(table)
    columns_of = {part.group.name: part.group.columns for part in state.parsed.random}
    read = {name for part in (state.fixed, *random, *own) for name in part.effects.columns}
    levels_only = dict.fromkeys(name for group in groups for name in columns_of[group])
    only = {n: missing.pop(n) for n in levels_only if n in missing and n not in {*read, *state.predictors}}
    without = _any(only, len(index))
    if without.any():
        found = f"{int(without.sum())} of {len(index)} rows of newdata have missing levels of grouping factors"
        if not allow_new_levels:
            raise DataError(
                f"{found} ({counts_of(only)}): allow_new_levels=True takes them as new levels, predicted by the "
                "population; random=False predicts all rows so"
            )
        warn(f"{found} ({counts_of(only)}): taken as new levels")
    complete = ~_any(missing, len(index))
    if not complete.all():
        n_missing = int((~complete).sum())
        warn(f"{n_missing} of {len(index)} rows of newdata have missing values ({counts_of(missing)}): NaN there")
    table = selected(table, complete)
    check_finite(table)
    rows = index if complete.all() else index[complete]
    frame = pd.DataFrame(_as_in_the_fit(table, state), index=rows, copy=False)
    codes = _codes(state, frame, list(groups), allow_new_levels)
    X, left = state.split(state.fixed.of(frame), _dependence(labels))
    return NewRows(
        X,
        np.asarray(~left.any(axis=1)),
        tuple(columns.of(frame) if wanted else None for columns, wanted in zip(state.random, effects, strict=True)),
        tuple(codes[t.group] if wanted else None for t, wanted in zip(labels.terms, levels, strict=True)),
        _offset(state, frame),
        _weights(state, frame) if weights else None,
        index,
        complete,
        _trials(state, frame) if trials else None,
        tuple(None if part is None else part[0].of(frame)[:, part[1]] for part in of_psi),
        None if disp is None else disp[0].of(frame)[:, disp[1]],
    )


def _any(missing: Mapping[str, np.ndarray], n: int) -> np.ndarray:
    """Rows without a value in any of the columns."""
    anywhere: np.ndarray = np.logical_or.reduce([np.zeros(n, bool), *missing.values()])
    return anywhere


def _dependence(labels: Labels) -> np.ndarray | None:
    state: FormulaState = labels.state
    if labels.frame is not None or state.kept.all():
        return state.dependence(labels.frame)
    warn(
        f"columns were left out of the fit ({', '.join(labels.dropped_columns)}) and its rows were not "
        "kept: where newdata break the dependence between columns, predictions are not unique"
    )
    return None


def _table(
    state: FormulaState, newdata: Any, parts: Sequence[Columns], groups: Sequence[str], weights: bool, trials: bool
) -> tuple[dict[str, pd.Series], pd.Index]:
    """The columns needed, as in the fit numbers or not; and the labels of the rows."""
    available = column_names(newdata)
    read = [(e, f"in '{e}'") for part in parts for e in part.effects.expressions]
    read += [(e, f"in 'offset({e})'") for e, _ in state.offsets]
    needed: dict[str, str] = {}
    for e, where in read:
        needed |= dict.fromkeys([name for name in e.columns if name not in needed], where)
    computed = {name for e, _ in read for name in e.columns if name != e.factor_of}
    columns_of = {part.group.name: part.group.columns for part in state.parsed.random}
    for group in groups:
        own = [name for name in columns_of[group] if name not in needed]
        needed |= dict.fromkeys(own, f"grouping factor '{group}'")
    beside = (("offset", state.offset, True), ("weights", state.weights, weights), ("size", state.size, trials))
    for what, name, wanted in beside:
        if wanted and name is not None:
            needed.setdefault(name, f"the fit had {what}={name!r}")
            computed.add(name)
    pair = _pair_columns(state) if trials else []
    if all(name in available for name in pair):
        needed = dict.fromkeys(pair, f"the response is '{state.parsed.response}'") | needed
        computed |= set(pair)
    for name, where in needed.items():
        if name not in available:
            refuse_unknown(name, available, f"needed in newdata: {where}", newdata)
    table, index = read_columns(newdata, needed)
    return as_numbers(table, [name for name in needed if name in computed]), index


def _as_in_the_fit(table: dict[str, pd.Series], state: FormulaState) -> dict[str, pd.Series]:
    """Columns of the kind that the formula was fitted with; unknown categories are refused."""
    known: dict[str, list[Any]] = {}
    own = (*state.psi, state.dispersion)
    for part in (state.fixed, *state.random, *(part[0] for part in own if part is not None)):
        for e in part.effects.expressions:
            name, categories = e.column or e.factor_of, part.categories(e)
            if name is not None and categories is not None:
                known[name] = categories
    kinds = state.kinds
    return {
        name: _as_kind(name, values, kinds[name], known.get(name)) if name in kinds else values
        for name, values in settle(table).items()
    }


def _as_kind(name: str, values: pd.Series, own: Any, categories: list[Any] | None) -> pd.Series:
    """One column in the fit's type."""
    if values.dtype.kind == "f" and own == np.float64:
        return values
    category = isinstance(own, pd.CategoricalDtype)
    if not len(values):
        return values.astype(own)
    # Text may stand for text and numbers for numbers; what a category is shows in its names.
    numeric = _is_number((own.categories if category else own) if category else own)
    given = values.cat.categories if isinstance(values.dtype, pd.CategoricalDtype) else values
    if _is_number(given) != numeric:
        holds = "numbers" if _is_number(given) else _kind(given.dtype)
        had = f"the categories {_listed(categories)}" if categories is not None else "numbers" if numeric else "text"
        raise DataError(f"column '{name}' of newdata holds {holds}; the fit had {had}")
    if categories is not None and not set(given) <= set(own.categories if category else categories):
        present = pd.Index(values.dropna().unique())
        new = present[~present.isin(list(own.categories) if category else categories)]
        if len(new):
            raise DataError(
                f"column '{name}' of newdata has {_listed(new)}, not among the categories of the fit: "
                f"{_listed(categories)}"
            )
    if category:
        return pd.Series(pd.Categorical(values, dtype=own), index=values.index)
    if own == np.bool_ and not values.isin([0, 1]).all():
        raise DataError(f"column '{name}' of newdata holds numbers; the fit had True and False")
    return values.astype(own) if numeric else values.astype(object)


def _is_number(values: Any) -> bool:
    return pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values)


def _kind(dtype: Any) -> str:
    text = pd.api.types.is_object_dtype(dtype) or pd.api.types.is_string_dtype(dtype)
    return "text" if text else f"{dtype} values"


def _offset(state: FormulaState, table: pd.DataFrame) -> np.ndarray:
    if state.offset_beside:
        raise DataError(
            "the fit had offset= as an array, which says nothing of new rows: make a column of it, fit with its "
            "name (or offset(name) in the formula), and give newdata that column"
        )
    total = state.offset_of(table, " of newdata")
    return total if state.offset is None else total + numbers(column(state.offset), table, state.context, "offset")[0]


def _weights(state: FormulaState, table: pd.DataFrame) -> np.ndarray | None:
    if state.weights is None:
        return None
    w = numbers(column(state.weights), table, state.context, "weights")[0]
    if not (w > 0).all():
        raise DataError(f"weights must be positive, but {int((w <= 0).sum())} of newdata's '{state.weights}' are not")
    return w


def _pair_columns(state: FormulaState) -> list[str]:
    """The columns of ``cbind(successes, failures)``."""
    return list(dict.fromkeys(name for e in state.parsed.pair for name in e.columns))


def _trials(state: FormulaState, table: pd.DataFrame) -> np.ndarray | None:
    if state.size is not None:
        n, name = numbers(column(state.size), table, state.context, "size")[0], f"'{state.size}'"
    elif state.parsed.pair and all(one in table for one in _pair_columns(state)):
        n = np.sum([numbers(e, table, state.context, "response")[0] for e in state.parsed.pair], axis=0)
        name = f"the sum of {' and '.join(repr(str(e)) for e in state.parsed.pair)}"
    else:
        return None
    bad = ~((n > 0) & (n == np.round(n)))
    if bad.any():
        raise DataError(
            f"numbers of trials are whole and above 0, but {name} of newdata is not in {int(bad.sum())} rows"
        )
    return n


# --- levels ----------------------------------------------------------------------------------------------------------


def _codes(state: FormulaState, table: pd.DataFrame, groups: Sequence[str], allow_new: bool) -> dict[str, np.ndarray]:
    columns_of = {part.group.name: part.group.columns for part in state.parsed.random}
    relationships = {part.group.name: part.known for part in state.parsed.random if part.known}
    codes, unknown = {}, []
    for group in groups:
        codes[group], new = _level_codes(table, columns_of[group], state.levels[group], group)
        if group in relationships and (codes[group] < 0).any():
            what = _listed(new) if new else "missing values"
            raise DataError(
                f"newdata has {what} of grouping factor '{group}', not among the levels of '{relationships[group]}': "
                "what such a level shares with the others is not known. Fit with a covariance that has it (levels "
                "without rows are predicted from their relatives), or predict with random=False"
            )
        if new:
            unknown.append(f"{_listed(new)} of grouping factor '{group}'")
    if unknown and not allow_new:
        raise DataError(
            f"newdata has levels that the fit does not know: {'; '.join(unknown)}; allow_new_levels=True predicts "
            "them with random effects of zero, random=False all rows"
        )
    return codes


def _level_codes(
    table: pd.DataFrame, columns: Sequence[str], known: np.ndarray, group: str
) -> tuple[np.ndarray, list[str]]:
    """The fit's level of every row, -1 for a new one; and the new levels' names."""
    there = ~_any({name: table[name].isna().to_numpy() for name in columns}, len(table))
    own = np.full(len(table), -1)
    own[there], given = combinations(table if there.all() else table[there], tuple(columns))
    place = {tuple(parts): k for k, parts in enumerate(known)}
    if len(place) < len(known):
        raise DataError(f"two levels of grouping factor '{group}' have the same name; rename one")
    at = np.array([place.get(tuple(parts), -1) for parts in given], np.int64)
    codes = np.where(there, at[own], -1) if len(at) else own
    new = dict.fromkeys(own[there & (codes < 0)].tolist())  # in the order of the rows
    return codes, [":".join(given[k]) for k in new]


def _listed(values: Any) -> str:
    return some_of([repr(level_name(value)) for value in values], most=10)
