"""Columns, groups and effects of a fit by name, for plots."""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pandas as pd

from mixjax.checks import DataError
from mixjax.design import Labels
from mixjax.fitted.either import AnyFitted, any_record_of
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.fitted.names import Spellings, values_of_rows
from mixjax.fitted.record import Fitted, record_of
from mixjax.formula.table import factor_codes

# Signs that the name of a response may have in the title of an axis.
LONGEST = 24


class Column(NamedTuple):
    """A variable by rows.

    Attributes:
        name: for labels. values: ``(n,)`` numbers; of categories their codes. levels: names of categories, or None.
    """

    name: str
    values: np.ndarray
    levels: list[str] | None


def response_name(labels: Labels) -> str:
    """The response for titles of axes: ``cbind(s, n - s)`` is a proportion of its first part."""
    pair = () if labels.state is None else labels.state.parsed.pair
    if not pair:
        return labels.response
    return f"proportion of {pair[0]}" if len(str(pair[0])) <= LONGEST else "proportion of successes"


def known(fit: Any) -> AnyFitted:
    """The record of a fit that has methods too."""
    record = any_record_of(fit)
    if record is fit:
        raise TypeError("plots need a fit as mixjax.lmm or mixjax.glmm returns it, not its record")
    return record


def linear(fit: Any, plot: str, instead: str) -> Fitted:
    """The record of a fit of a linear mixed model; of a generalised one an error that says what to use."""
    record = known(fit)
    if isinstance(record, GeneralizedFitted):
        raise TypeError(f"plots.{plot} is of linear mixed models; of a generalised one use {instead}")
    return record_of(record)


def rows_of(fit: Any) -> AnyFitted:
    """The record of a fit whose rows were kept."""
    record = known(fit)
    _ = record.design  # the error says why there are none
    return record


def residuals_of(
    fit: Any, record: AnyFitted, kind: str | None, scale: str | None, usual: str
) -> tuple[np.ndarray, str]:
    """Residuals of a fit of either kind ``(n,)``, and what to call them.

    Args:
        kind, scale: as of ``fit.residuals``; None for conditional ones on the scale ``usual``, of generalised models
            for quantile residuals.
    """
    response = response_name(record.labels)
    if isinstance(record, GeneralizedFitted):
        if scale is not None:
            raise ValueError(f"residuals of a generalised model have kinds and no scales; got scale={scale!r}")
        kind = "quantile" if kind is None else kind
        return np.asarray(fit.residuals(kind), np.float64), f"{kind} residual of {response}"
    kind, scale = kind or "conditional", scale or usual
    shown = "raw" if scale == "pearson" and record.design.weights is None else scale
    return np.asarray(fit.residuals(kind, scale), np.float64), f"{kind} residual of {response} ({shown})"


def column(record: AnyFitted, x: Any, where: str) -> Column:
    """A column of the table by name, a grouping factor by name, or values for the rows.

    Args:
        x: name, or ``(n,)`` values; a Series is lined up by its index.
        where: for messages.
    """
    frame = record.labels.frame
    if not isinstance(x, str):
        name = str(getattr(x, "name", None) or "x")
        values: Any = values_of_rows(record.labels, "x", x, numbers=False)
        if isinstance(x, pd.Series) and isinstance(x.dtype, pd.CategoricalDtype):
            values = pd.Categorical(values, categories=x.cat.categories)
        return _as_column(name, pd.Series(values, index=frame.index), where)
    if x in frame.columns:
        return _as_column(x, frame[x], where)
    for term, labels in zip(record.design.terms, record.labels.terms, strict=True):
        if labels.group == x:
            return Column(x, np.asarray(term.group), list(labels.levels))
    names = list(frame.columns)
    close = difflib.get_close_matches(x, names, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"columns: {', '.join(names)}"
    raise DataError(
        f"the fit has no column '{x}' ({where}); {hint}. A column that the formula does not use can be passed as "
        f"values: data['{x}']"
    )


def _as_column(name: str, series: pd.Series, where: str) -> Column:
    if series.isna().any():
        raise DataError(f"{where}: '{name}' has {int(series.isna().sum())} missing values; fill them in first")
    if pd.api.types.is_bool_dtype(series) or not pd.api.types.is_numeric_dtype(series):
        if series.dtype.kind in "mM":
            raise DataError(f"{where}: '{name}' holds {series.dtype} values; make numbers of them first")
        codes, levels = factor_codes(pd.DataFrame({name: series}), (name,))
        return Column(name, codes, levels)
    return Column(name, series.to_numpy(np.float64), None)


def groups_of(labels: Labels) -> list[str]:
    """Grouping factors, in the order of the terms."""
    return list(dict.fromkeys(term.group for term in labels.terms))


def group_name(labels: Labels, group: str | None, where: str) -> str:
    """The named grouping factor, or the first."""
    groups = groups_of(labels)
    if not groups:
        raise DataError(f"{where}: a fit without random terms has no grouping factor")
    if group is None:
        return groups[0]
    if group not in groups:
        refuse("grouping factor", group, groups, where)
    return group


def effect_names(available: list[str], effects: Any, group: str, where: str) -> list[str]:
    """The named effects of a group, or all."""
    if effects is None:
        return available
    chosen = [effects] if isinstance(effects, str) else list(effects)
    if not chosen:
        raise ValueError(f"{where}: no effects are named; {group} has {', '.join(available)}")
    spellings = Spellings(available)
    for name in chosen:
        if name not in spellings:
            refuse(f"effect of {group}", name, available, where)
    return [available[spellings[name]] for name in chosen]


def level_names(available: list[str], levels: Any, group: str, where: str) -> list[str]:
    """The named levels of a group."""
    chosen = [str(level) for level in ([levels] if isinstance(levels, str) else levels)]
    if not chosen:
        raise ValueError(f"{where}: levels is empty")
    for name in chosen:
        if name not in available:
            refuse(f"level of {group}", name, available, where)
    return chosen


def refuse(what: str, name: Any, available: list[str], where: str) -> NoReturn:
    """Raise DataError for a name that there is not."""
    close = difflib.get_close_matches(str(name), available, n=3, cutoff=0.5)
    some = ", ".join(available[:12]) + (", ..." if len(available) > 12 else "")
    hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"there are: {some}"
    raise DataError(f"there is no {what} '{name}' ({where}); {hint}")


def effect_label(record: AnyFitted, effect: str) -> str:
    """An effect and its units: those of the response, per unit of a covariate; of a generalised model those of the
    linear predictor."""
    response, frame = response_name(record.labels), record.labels.frame
    if isinstance(record, GeneralizedFitted):
        response = f"{record.family.link} scale"
    numeric = frame is not None and effect in frame.columns and pd.api.types.is_numeric_dtype(frame[effect])
    return f"{effect} ({response} per unit of {effect})" if numeric else f"{effect} ({response})"
