"""Every level's own regression, by least squares: residuals without random effects, and level-2 residuals."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mixjax.bases import orthonormal_columns
from mixjax.checks import DataError
from mixjax.design import refuse_smooths
from mixjax.diagnostics.modes import conditional_covariances_by_group
from mixjax.fitted.names import by_effect, terms_of_group
from mixjax.fitted.record import Fitted, record_of


class LeastSquares(NamedTuple):
    """Regressions of the levels of one grouping factor.

    Attributes:
        columns: names of the coefficients: fixed effects that vary within levels, the intercept among them.
        coefficients: ``(levels, columns)``; NaN where a level's rows do not determine one.
        fitted: ``(n,)`` offset included. leverage: ``(n,)``. sigma: ``(levels,)`` residual standard deviations; NaN
            without degrees of freedom.
    """

    columns: tuple[str, ...]
    coefficients: np.ndarray
    fitted: np.ndarray
    leverage: np.ndarray
    sigma: np.ndarray


def least_squares(fitted: Any, group: str | None = None) -> LeastSquares:
    """Regress the response on the fixed effects within every level of a grouping factor.

    Columns that are constant within all levels (a treatment between subjects) are left to the intercept, as in HLMdiag.

    Args:
        fitted: fit with rows.
        group: grouping factor; None for the first.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.diagnostics.least_squares import least_squares
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> least_squares(fit).coefficients[0].round(2).tolist()
        [244.19, 21.76]
    """
    fitted = record_of(fitted)
    fitted.check_can("regressions of single levels")
    design = fitted.design
    _, codes, m = group_of(fitted, group)
    X, n = np.asarray(design.X, float), len(codes)
    offset = np.zeros(n) if design.offset is None else np.asarray(design.offset, float)
    root_w = np.ones(n) if design.weights is None else np.sqrt(np.asarray(design.weights, float))
    columns = _within(X, codes, m)
    own = np.column_stack([np.ones(n) if j is None else X[:, j] for j in columns])
    names = tuple("Intercept" if j is None else fitted.labels.fixed[j] for j in columns)
    coefficients = np.full((m, len(names)), np.nan)
    mean, leverage, sigma = offset.copy(), np.empty(n), np.full(m, np.nan)
    y = np.asarray(design.y, float) - offset
    order, count = np.argsort(codes, kind="stable"), np.bincount(codes, minlength=m)
    for level, rows in enumerate(np.split(order, np.cumsum(count)[:-1])):
        if not len(rows):
            continue
        A, r, w = own[rows] * root_w[rows, None], y[rows] * root_w[rows], root_w[rows]
        Q, _, independent = orthonormal_columns(A, None)
        part = Q @ (Q.T @ r)
        mean[rows] += part / w
        leverage[rows] = (Q**2).sum(1)
        df = len(rows) - int(independent.sum())
        if df > 0:
            sigma[level] = np.sqrt(((r - part) ** 2).sum() / df)
        if independent.all():
            coefficients[level] = np.linalg.lstsq(A, r, rcond=None)[0]
    return LeastSquares(names, coefficients, mean, leverage, sigma)


def level2(fitted: Any, group: str | None = None, scale: str = "raw") -> pd.DataFrame:
    """Level-2 residuals: what each level's coefficients differ by from the population's.

    Two kinds (Hilden-Minton 1995; Loy & Hofmann 2014, J. Stat. Softw. 56(5)): predicted random effects, shrunken
    towards zero and confounded with the errors, columns ``ranef_...``; and the level's own least-squares coefficients
    less the population's, which are not shrunken, but as noisy as the level has few rows, columns ``ls_...``. Check
    normality and outlying levels with the first, the mean and covariates that are missing with the second.

    Args:
        fitted: fit with rows.
        group: grouping factor; None for the first.
        scale: ``"raw"``; or ``"standardized"``: random effects over their conditional standard deviations, least
            squares over the standard deviation of all levels.

    Returns:
        DataFrame, levels x columns; least squares NaN where a level's rows do not determine a coefficient.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.diagnostics.least_squares import level2
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> level2(fit).iloc[:1].round(2).to_dict("records")
        [{'ranef_Intercept': 2.26, 'ranef_Days': 9.2, 'ls_Intercept': -7.21, 'ls_Days': 11.3}]
    """
    if scale not in ("raw", "standardized"):
        raise ValueError(f"scale must be 'raw' or 'standardized', got {scale!r}")
    fitted = record_of(fitted)
    name, _, _ = group_of(fitted, group)
    terms = terms_of_group(fitted.labels)[name]
    effects = [effect for t in terms for effect in fitted.labels.terms[t].effects]
    b = np.hstack([fitted.estimates.b[t] for t in terms])
    own = least_squares(fitted, name)
    population = dict(zip(fitted.labels.fixed, fitted.estimates.beta, strict=True))
    effect_of = by_effect({effect: effect for effect in effects})
    names = {j: effect_of(column, None) for j, column in enumerate(own.columns)}
    shared = [j for j, name in names.items() if name is not None]
    ls = own.coefficients[:, shared] - [population.get(own.columns[j], 0.0) for j in shared]
    if scale == "standardized":
        variance = np.diagonal(conditional_covariances_by_group(fitted)[name], axis1=1, axis2=2)
        with np.errstate(invalid="ignore", divide="ignore"):
            b = np.where(variance > 0, b / np.sqrt(variance), np.nan)
            ls = ls / np.nanstd(ls, axis=0, ddof=1)
    columns = {f"ranef_{effect}": b[:, j] for j, effect in enumerate(effects)}
    columns |= {f"ls_{names[j]}": ls[:, i] for i, j in enumerate(shared)}
    return pd.DataFrame(columns, index=pd.Index(fitted.labels.terms[terms[0]].levels, name=name))


def group_of(fitted: Fitted, group: str | None) -> tuple[str, np.ndarray, int]:
    """Name, codes ``(n,)`` and number of levels of a grouping factor; None: of the first.

    Raises:
        DataError: there is no such factor.
    """
    refuse_smooths(fitted.labels, "levels by themselves", "their rows share its curve with all others")
    names = [term.group for term in fitted.labels.terms]
    if group is None:
        group = names[0]
    if group not in names:
        raise DataError(f"there is no grouping factor {group!r}; there are {', '.join(dict.fromkeys(names))}")
    t = names.index(group)
    return group, np.asarray(fitted.design.terms[t].group), fitted.design.terms[t].n_groups


def _within(X: np.ndarray, codes: np.ndarray, m: int) -> list[int | None]:
    """The intercept (None) and the columns of X that vary within some level."""
    columns: list[int | None] = [None]
    for j in range(X.shape[1]):
        low, high = np.full(m, np.inf), np.full(m, -np.inf)
        np.minimum.at(low, codes, X[:, j])
        np.maximum.at(high, codes, X[:, j])
        if (high > low).any():
            columns.append(j)
    return columns
