"""Rows, or groups of rows, by name: what is left out at a time."""

from __future__ import annotations

import difflib
from typing import Any, NamedTuple, NoReturn

import numpy as np
import pandas as pd

from mixjax.checks import DataError
from mixjax.fitted.either import AnyFitted
from mixjax.fitted.names import values_of_rows
from mixjax.formula.table import factor_codes, level_name


class Units(NamedTuple):
    """``code (n,)`` of every row's unit, ``0 .. U - 1`` in the order in which units appear; ``names``."""

    code: np.ndarray
    names: pd.Index


def units_of(fitted: AnyFitted, by: Any) -> Units:
    """The units that ``by`` stands for; see :func:`~mixjax.diagnostics.influence.influence`.

    Raises:
        DataError: ``by`` names no column, or its labels do not fit the rows. ValueError: there is one unit only.
    """
    frame, n = fitted.labels.frame, fitted.nobs
    if by is None:
        if n < 2:
            raise ValueError("the fit has one row: nothing can be left out")
        return Units(np.arange(n), frame.index.rename("row") if frame.index.name is None else frame.index)
    groups = dict(zip([term.group for term in fitted.labels.terms], range(len(fitted.labels.terms)), strict=True))
    if isinstance(by, str) and by in groups:
        t = groups[by]
        name, code, levels = by, np.asarray(fitted.design.terms[t].group), list(fitted.labels.terms[t].levels)
    elif isinstance(by, str) or (isinstance(by, list | tuple) and len(by) and all(isinstance(b, str) for b in by)):
        columns = (by,) if isinstance(by, str) else tuple(by)
        if isinstance(by, str) and by not in frame and all(part in frame for part in by.split(":")):
            columns = tuple(by.split(":"))
        if not (isinstance(by, str) or all(column in frame for column in columns)) and len(columns) == n:
            name, code, levels = _labels_given("by", np.asarray(columns), fitted)
        else:
            for column in columns:
                if column not in frame:
                    _refuse(column, [*groups, *frame.columns])
            code, levels = factor_codes(frame, columns)
            name = ":".join(columns)
    else:
        name, code, levels = _labels_given(str(getattr(by, "name", None) or "by"), by, fitted)
    order, code = pd.unique(code), pd.factorize(code)[0]
    if len(order) < 2:
        raise ValueError(f"'{name}' has one level: without it no rows are left")
    return Units(code, pd.Index([levels[level] for level in order], name=name))


def _labels_given(name: str, labels: Any, fitted: AnyFitted) -> tuple[str, np.ndarray, list[str]]:
    code, levels = pd.factorize(values_of_rows(fitted.labels, name, labels, numbers=False))
    if (code < 0).any():
        raise DataError(f"the labels '{name}' are missing in {int((code < 0).sum())} of the used rows")
    return name, code, [level_name(level) for level in levels]


def _refuse(column: str, known: list[str]) -> NoReturn:
    known = list(dict.fromkeys(known))
    close = difflib.get_close_matches(column, known, n=1)
    raise DataError(
        f"the model uses no column '{column}'; pass the labels themselves, as by=data['{column}'], or "
        f"{'did you mean ' + repr(close[0]) + '?' if close else 'one of ' + ', '.join(known)}"
    )
