"""A new table -> rows of a fitted model: columns of X and of every Z, levels, offset, weights.

What the formula learnt from the data (contrasts, categories, knots, centring) comes from the fit, never from the new
table: a row means the same alone, in another order, or among others.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from formulaic.errors import DataMismatchWarning, FormulaicError
from formulaic.parser.types import Factor

from mixjax.design import Design, Labels
from mixjax.formula.build import caller_context, expression, model_matrix, usable
from mixjax.formula.errors import DataError, warn
from mixjax.formula.parse import Group, names_in, parse, quote_columns
from mixjax.formula.table import (
    check_finite,
    column_names,
    factor_codes,
    level_name,
    refuse_unknown,
    to_pandas,
)

# So many names stand in a message.
SHOWN = 10
# What the columns left out of the fit add beyond those in it, relative to their size, that is rounding.
ROUNDING = 1e-8


@dataclass(frozen=True)
class NewRows:
    """Rows of a new table as arrays. Only its m complete rows; ``complete`` says which these are.

    Attributes:
        X: ``(m, p)`` fixed-effects columns that are in the fit. estimable: ``(m,)`` False where columns left out of
            the fit would matter.
        Z: per random term ``(m, q)``, or None where it was not asked for. level: per random term ``(m,)`` numbers of
            the fit's levels, -1 for a new one, or None.
        offset: ``(m,)``. weights: ``(m,)`` precision weights, or None where they are not known.
        index: labels of all rows of the table. complete: ``(rows,)``.
    """

    X: np.ndarray
    estimable: np.ndarray
    Z: tuple[np.ndarray | None, ...]
    level: tuple[np.ndarray | None, ...]
    offset: np.ndarray
    weights: np.ndarray | None
    index: pd.Index
    complete: np.ndarray


class NewTable:
    """The formula of a fit as a function of new tables.

    Args:
        design: of the fit, or None where its rows were not kept.
        labels: of the fit.
        kept: ``(f,)`` which columns of the fixed-effects formula are in the fit.
        context: names that the formula uses beside columns; by default those visible to the caller. Names that the fit
            remembers (``labels.specs["context"]``) go first.
    """

    def __init__(
        self, design: Design | None, labels: Labels, kept: np.ndarray, context: Mapping[str, Any] | None = None
    ):
        self.design, self.labels, self.kept = design, labels, kept
        self.frame: pd.DataFrame | None = labels.frame
        context = caller_context() if context is None else context
        self.context = {**usable(context), **labels.specs.get("context", {})}
        self.fixed = labels.specs["fixed"]
        # Effects of the same names are the same columns, whichever term they stand in.
        by_names = {tuple(spec.column_names): spec for spec in labels.specs["random"]}
        self.random = [by_names[term.effects] for term in labels.terms]
        parsed = parse(labels.formula)
        known = [name for spec in (self.fixed, *self.random) for name in _data(spec)]
        self.parsed = quote_columns(parsed, known if self.frame is None else list(map(str, self.frame.columns)))
        self.groups = {part.group.name: part.group for part in parsed.random}

    def rows(
        self,
        newdata: Any,
        effects: Sequence[bool],
        levels: Sequence[bool],
        allow_new_levels: bool = False,
        weights: bool = False,
    ) -> NewRows:
        """The rows of a table.

        Args:
            newdata: pandas, polars or pyarrow table, or a dict of arrays, where a single value holds for all rows. The
                response need not be there.
            effects: per random term, whether its columns are needed. levels: whether its levels are.
            allow_new_levels: levels that the fit does not know, and missing ones, are -1; otherwise they are refused,
                and rows with missing ones are not complete.
            weights: whether precision weights are needed.

        Raises:
            DataError: a column is missing or of the wrong kind; a category, or a level that is not allowed, is unknown;
                the formula cannot be evaluated.

        Warns:
            DataWarning: rows have missing values.
        """
        terms = self.labels.terms
        specs = [self.fixed, *(s for s, wanted in zip(self.random, effects, strict=True) if wanted)]
        groups = {term.group: self.groups[term.group] for term, wanted in zip(terms, levels, strict=True) if wanted}
        table, read = self._table(newdata, specs, groups, weights)
        missing = table.isna()
        if allow_new_levels:
            columns = dict.fromkeys(name for group in groups.values() for name in group.columns)
            levels_only = [name for name in columns if name not in read]
            without = missing[levels_only].any(axis=1)
            if without.any():
                counts = ", ".join(f"{name} {int(k)}" for name, k in missing[levels_only].sum().items() if k)
                warn(
                    f"{int(without.sum())} of {len(table)} rows of newdata have missing levels of grouping factors "
                    f"({counts}): taken as new levels"
                )
            missing[levels_only] = False
        complete = ~missing.any(axis=1).to_numpy()
        if not complete.all():
            counts = ", ".join(f"{name} {int(k)}" for name, k in missing.sum().items() if k)
            warn(f"{int((~complete).sum())} of {len(table)} rows of newdata have missing values ({counts}): NaN there")
        index, table = table.index, table[complete]
        check_finite(table)
        table = self._as_in_the_fit(table, specs, read)
        codes = self._codes(table, groups, allow_new_levels)
        X, estimable = self._fixed_columns(table)
        return NewRows(
            X,
            estimable,
            tuple(self._columns(s, table) if wanted else None for s, wanted in zip(self.random, effects, strict=True)),
            tuple(codes[term.group] if wanted else None for term, wanted in zip(terms, levels, strict=True)),
            self._offset(table),
            self._weights(table) if weights else None,
            index,
            complete,
        )

    # --- the table ---------------------------------------------------------------------------------------------------

    def _table(
        self, newdata: Any, specs: list[Any], groups: Mapping[str, Group], weights: bool
    ) -> tuple[pd.DataFrame, list[str]]:
        """The columns needed, and which of them the formula reads as numbers or categories."""
        available = column_names(newdata)
        read: dict[str, str] = {}  # column -> where it is needed
        for spec in specs:
            for factor in spec.factors:
                read |= {name: f"in '{factor.expr}'" for name in _data(spec) if name in names_in(factor.expr)}
            read |= {name: "in the formula" for name in _data(spec) if name not in read}
        for text in self.parsed.offsets:
            read |= {name: f"in 'offset({text})'" for name in names_in(text) if self._is_column(name)}
        others = {name: f"grouping factor '{g.name}'" for g in groups.values() for name in g.columns}
        for what, wanted in (("offset", True), ("weights", weights)):
            name = self.labels.specs.get(what)
            if wanted and isinstance(name, str):
                others[name] = f"the fit had {what}={name!r}"
        for name, where in {**others, **read}.items():
            if name not in available:
                refuse_unknown(name, available, f"needed in newdata: {where}", newdata)
        return to_pandas(newdata, [*read, *others]), list(read)

    def _is_column(self, name: str) -> bool:
        if self.frame is not None:
            return name in self.frame
        value = self.context.get(name)
        return value is None or not (callable(value) or hasattr(value, "__file__") or hasattr(value, "__path__"))

    def _as_in_the_fit(self, table: pd.DataFrame, specs: list[Any], read: list[str]) -> pd.DataFrame:
        """Columns of the kind that the formula was fitted with; unknown categories are refused."""
        categories = self._categories(specs)
        kinds = {expr.strip("`"): kind for spec in specs for expr, (kind, _) in spec.encoder_state.items()}
        for name in read:
            column, own = table[name], None if self.frame is None else self.frame[name]
            if name in categories:
                table[name] = _as_categories(column, categories[name], own)
            elif own is not None:
                table[name] = _as_column(column, own)
            elif kinds.get(name) is _NUMERICAL and not _is_number(column.dtype):
                raise DataError(f"column '{name}' of newdata holds {_kind(column.dtype)}; the fit had numbers")
        return table

    def _categories(self, specs: list[Any]) -> dict[str, list[Any]]:
        """Columns that are read as categories, alone or inside ``C(...)``, and their categories in the fit."""
        found: dict[str, list[Any]] = {}
        for spec in specs:
            data = _data(spec)
            for factor in spec.factors:
                kind, state = spec.encoder_state.get(factor.expr, _CONSTANT)
                inside = factor.expr.removeprefix("C(").split(",")[0].removesuffix(")").strip().strip("`")
                if kind is _CATEGORICAL and inside in data and "categories" in state:
                    found[inside] = list(state["categories"])
        return found

    # --- columns -----------------------------------------------------------------------------------------------------

    def _columns(self, spec: Any, table: pd.DataFrame) -> np.ndarray:
        """What a part of the formula makes of the rows."""
        width = len(spec.column_names)
        if not len(table) or not width:
            return np.zeros((len(table), width))
        try:
            with np.errstate(all="ignore"), warnings.catch_warnings():  # what is not finite is reported below
                warnings.simplefilter("error", DataMismatchWarning)
                columns = np.asarray(spec.get_model_matrix(table, context=self.context), float)
        except (FormulaicError, ValueError, DataMismatchWarning) as error:
            why = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DataError(f"the formula cannot be evaluated for newdata: {why}") from error
        columns = columns.reshape(len(table), width)
        bad = ~np.isfinite(columns)
        if bad.any():
            i, j = np.argwhere(bad)[0]
            raise DataError(
                f"'{spec.column_names[j]}' is not finite in {int(bad[:, j].sum())} rows of newdata (first: row "
                f"{table.index[i]})"
            )
        return columns

    def _fixed_columns(self, table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:
        columns = self._columns(self.fixed, table)
        own, left = columns[:, self.kept], columns[:, ~self.kept]
        if self.kept.all() or self._dependent is None:
            return own, np.ones(len(table), bool)
        size = np.abs(left) + np.abs(own) @ np.abs(self._dependent)
        return own, (np.abs(left - own @ self._dependent) <= ROUNDING * size).all(axis=1)

    @cached_property
    def _dependent(self) -> np.ndarray | None:
        """``(p, f - p)``: how the columns in the fit make those that were left out; None where no row tells."""
        if self.frame is None:
            warn(
                f"columns were left out of the fit ({', '.join(self.labels.dropped_columns)}) and its rows were not "
                "kept: where newdata break the dependence between columns, predictions are not unique"
            )
            return None
        X = self._columns(self.fixed, self.frame)
        lengths = np.maximum(np.linalg.norm(X, axis=0), np.finfo(float).tiny)
        X = X / lengths
        C = np.linalg.lstsq(X[:, self.kept], X[:, ~self.kept], rcond=None)[0]
        return C / lengths[self.kept, None] * lengths[~self.kept]

    def _offset(self, table: pd.DataFrame) -> np.ndarray:
        name = self.labels.specs.get("offset")
        if name is None and self._had_offset_array:
            raise DataError(
                "the fit had offset= as an array, which says nothing of new rows: make a column of it, fit with its "
                "name (or offset(name) in the formula), and give newdata that column"
            )
        total = np.zeros(len(table)) if name is None else expression(f"`{name}`", table, self.context, "offset")
        for text in self.parsed.offsets:
            total = total + self._offset_of(text, table)
        return total

    def _offset_of(self, text: str, table: pd.DataFrame) -> np.ndarray:
        if text.strip("`") in table or not len(table):
            return expression(text, table, self.context, "offset") if len(table) else np.zeros(0)
        # Fitted anew to the fit's own rows, so that centring and the like are theirs.
        spec = model_matrix(f"0 + I({text})", table if self.frame is None else self.frame, self.context)[2]
        if self.frame is None and any(dict(spec.transform_state).values()):
            raise DataError(f"'offset({text})' depends on the rows of the fit, which were not kept")
        return self._columns(spec, table)[:, 0]

    @cached_property
    def _had_offset_array(self) -> bool:
        """Whether the fit's offset is more than the formula's."""
        if self.design is None or self.design.offset is None or self.frame is None:
            return False
        formulas = sum((self._offset_of(text, self.frame) for text in self.parsed.offsets), np.zeros(len(self.frame)))
        total = np.asarray(self.design.offset)
        return bool(np.abs(total - formulas).max() > ROUNDING * np.abs(total).max())

    def _weights(self, table: pd.DataFrame) -> np.ndarray | None:
        name = self.labels.specs.get("weights")
        if not isinstance(name, str):
            return None
        w = expression(f"`{name}`", table, self.context, "weights")
        if not (w > 0).all():
            raise DataError(f"weights must be positive, but {int((w <= 0).sum())} of newdata's '{name}' are not")
        return w

    # --- levels ------------------------------------------------------------------------------------------------------

    def _codes(self, table: pd.DataFrame, groups: Mapping[str, Group], allow_new: bool) -> dict[str, np.ndarray]:
        codes, unknown = {}, []
        for name, group in groups.items():
            codes[name], new = self._level_codes(group, table)
            if new:
                unknown.append(f"{_listed(new)} of grouping factor '{name}'")
        if unknown and not allow_new:
            raise DataError(
                f"newdata has levels that the fit does not know: {'; '.join(unknown)}; allow_new_levels=True predicts "
                "them by the population, random=False all rows"
            )
        return codes

    def _level_codes(self, group: Group, table: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
        """The fit's level of every row, -1 for a new one; and the new levels' names."""
        known = self._known_levels(group)
        codes = np.zeros(len(table), np.int64)
        old = np.zeros(known.shape[1], np.int64)
        names = []
        for column, values in zip(group.columns, known, strict=True):
            own, uniques = pd.factorize(table[column])
            own_names = np.array([level_name(value) for value in uniques], object)
            distinct = pd.Index(values).unique()
            at = distinct.get_indexer(own_names) if len(own_names) else np.zeros(0, np.int64)
            row = np.where(own < 0, -1, at[own]) if len(at) else np.full(len(own), -1)
            codes = np.where((codes < 0) | (row < 0), -1, codes * len(distinct) + row)
            old = old * len(distinct) + distinct.get_indexer(values)
            names.append(np.append(own_names, "missing")[own])
        if len(np.unique(old)) < len(old):
            raise DataError(f"two levels of grouping factor '{group.name}' have the same name; rename one")
        order = np.argsort(old)
        place = np.minimum(np.searchsorted(old, codes, sorter=order), len(old) - 1)
        found = (codes >= 0) & (old[order[place]] == codes)
        new = ~found
        joined = dict.fromkeys(":".join(parts) for parts in zip(*(name[new] for name in names), strict=True))
        return np.where(found, order[place], -1), list(joined)

    def _known_levels(self, group: Group) -> np.ndarray:
        """``(columns, levels)`` names of the values that make every level of the fit."""
        levels = next(term.levels for term in self.labels.terms if term.group == group.name)
        if len(group.columns) == 1:
            return np.array([levels], object)
        if self.frame is not None:
            codes, _ = factor_codes(self.frame, group.columns)
            first = np.zeros(len(levels), np.int64)
            first[codes[::-1]] = np.arange(len(codes))[::-1]
            values = [self.frame[name].to_numpy()[first] for name in group.columns]
            return np.array([[level_name(value) for value in column] for column in values], object)
        parts = [level.split(":") for level in levels]
        if any(len(part) != len(group.columns) for part in parts):
            raise DataError(
                f"levels of '{group.name}' have ':' in their names, and the rows of the fit, which would tell its "
                "columns apart, were not kept; use other names"
            )
        return np.array(parts, object).T


# --- kinds of columns ----------------------------------------------------------------------------------------------

_NUMERICAL, _CATEGORICAL = Factor.Kind.NUMERICAL, Factor.Kind.CATEGORICAL
_CONSTANT: tuple[Any, dict] = (Factor.Kind.CONSTANT, {})


def _data(spec: Any) -> list[str]:
    """Columns of the table that a part of the formula reads."""
    return [str(name) for name in spec.variables_by_source.get("data", ())]


def _is_number(dtype: Any) -> bool:
    return pd.api.types.is_numeric_dtype(dtype) or pd.api.types.is_bool_dtype(dtype)


def _as_categories(column: pd.Series, known: list[Any], own: pd.Series | None) -> pd.Series:
    """Values among the known categories, in the fit's own type."""
    values = pd.Index(known)
    given = pd.Index(list(column.dropna().unique()))
    numbers = _is_number(values.dtype)
    if len(given) and _is_number(given.dtype) != numbers:
        holds = "numbers" if _is_number(given.dtype) else _kind(given.dtype)
        raise DataError(f"column '{column.name}' of newdata holds {holds}; the fit had the categories {_listed(known)}")
    new = given[values.get_indexer(given) < 0]
    if len(new):
        raise DataError(
            f"column '{column.name}' of newdata has {_listed(new)}, not among the categories of the fit: "
            f"{_listed(known)}"
        )
    if own is not None and isinstance(own.dtype, pd.CategoricalDtype):
        return pd.Series(pd.Categorical(column, dtype=own.dtype), index=column.index, name=column.name)
    return column if numbers else column.astype(object)


def _as_column(column: pd.Series, own: pd.Series) -> pd.Series:
    """A column inside an expression, in the fit's own type where that loses nothing."""
    if not len(column):
        return column.astype(own.dtype)
    if _is_number(own.dtype) != _is_number(column.dtype):
        holds, had = ("numbers", "text") if _is_number(column.dtype) else (_kind(column.dtype), "numbers")
        raise DataError(f"column '{column.name}' of newdata holds {holds}; the fit had {had}")
    if not _is_number(own.dtype):
        return column
    try:
        converted = column.astype(own.dtype)
    except (TypeError, ValueError):
        return column.astype(float)
    return converted if (converted == column).all() else column.astype(float)


def _kind(dtype: Any) -> str:
    is_text = pd.api.types.is_object_dtype(dtype) or pd.api.types.is_string_dtype(dtype)
    return "text" if is_text or isinstance(dtype, pd.CategoricalDtype) else f"{dtype} values"


def _listed(values: Any) -> str:
    values = list(values)
    more = f" and {len(values) - SHOWN} more" if len(values) > SHOWN else ""
    return ", ".join(repr(level_name(value)) for value in values[:SHOWN]) + more
