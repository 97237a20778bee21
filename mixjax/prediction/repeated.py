"""Means of repeated measures: of rows of the fit or a new table, also given what else is known of a subject."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from mixjax.checks import DataError, check_level
from mixjax.distributions import t_quantile
from mixjax.fitted.repeated import RepeatedFitted
from mixjax.formula.reading import read_columns
from mixjax.formula.repeated import Repetition
from mixjax.formula.state import new_rows
from mixjax.formula.table import level_name
from mixjax.inference.fixed.contrasts import FixedEffects


def predict(
    fitted: RepeatedFitted,
    newdata: Any = None,
    conditional: bool = False,
    interval: Literal["confidence", "prediction"] | None = None,
    level: float = 0.95,
    ddf: str = "satterthwaite",
) -> Any:
    """Means of rows, and intervals.

    Args:
        newdata: table with the columns of the formula; None for the rows of the fit.
        conditional: given the responses of the subject that are in the fit: the mean of the normal distribution of the
            row's response given those, which is that response itself where it is one of them. Needs the columns of
            visit and subject; subjects that the fit does not have get the mean of all.
        interval: ``"confidence"`` of the mean, ``"prediction"`` of a response of the row; None for means alone.
            Covariances are taken as known, but for the degrees of freedom.
        level: coverage. ddf: of the quantiles: ``"satterthwaite"``, ``"kenward-roger"`` or ``"wald"``; of predictions
            and conditional means normal quantiles.

    Returns:
        Series ``fitted``; with an interval a DataFrame ``estimate``, ``std_error``, ``lower``, ``upper``.

    Raises:
        DataError: a column is missing, a visit is none of the fit's.

    Example:
        >>> import mixjax as mj
        >>> data = mj.datasets.load("Orthodont")
        >>> fit = mj.mmrm("distance ~ Sex * age + us(age | Subject)", data)
        >>> fit.predict({"Sex": ["Male"], "age": [14.0], "Subject": ["M01"]}, conditional=True).round(2).tolist()
        [31.0]
    """
    if interval not in (None, "confidence", "prediction"):
        raise ValueError(f"interval must be 'confidence', 'prediction' or None, got {interval!r}")
    check_level(level)
    labels = fitted.labels
    if newdata is None:
        index, complete = labels.frame.index, np.ones(fitted.nobs, bool)
        X, mean, estimable = np.asarray(fitted.design.X), fitted.mean, np.ones(fitted.nobs, bool)
        weights = fitted.design.weights
    else:
        whole = interval == "prediction" and labels.state.weights is not None
        rows = new_rows(replace(labels, terms=()), newdata, (), (), weights=whole)
        index, complete, X, estimable = rows.index, rows.complete, rows.X, rows.estimable
        mean, weights = rows.X @ fitted.estimates.beta + rows.offset, rows.weights
    places = None
    if conditional or interval == "prediction":
        places = _places(fitted, newdata, complete)
    if conditional:
        assert places is not None
        estimate, error, rest = _given_subjects(fitted, X, mean, places, weights)
        method, df = None, np.full(len(mean), np.inf)
    else:
        estimate, rest = mean, np.zeros(len(mean))
        method = FixedEffects.of(fitted, ddf) if interval else None
        error = np.zeros(len(mean)) if method is None else np.einsum("rp,pq,rq->r", X, method.vcov, X)
        df = np.full(len(mean), np.inf) if method is None else method.df(X)
        if interval == "prediction":
            assert places is not None
            rest, df = _variances(fitted, places, weights), np.full(len(mean), np.inf)
    estimate = np.where(estimable, estimate, np.nan)
    if interval is None:
        return pd.Series(_on_all(estimate, complete), index, name="fitted")
    se = np.sqrt(np.maximum(error, 0.0) + (rest if interval == "prediction" else 0.0))
    width = t_quantile(0.5 + level / 2, df) * se
    columns = {"estimate": estimate, "std_error": se, "lower": estimate - width, "upper": estimate + width}
    return pd.DataFrame({name: _on_all(value, complete) for name, value in columns.items()}, index)


def _on_all(values: np.ndarray, complete: np.ndarray) -> np.ndarray:
    found = np.full(len(complete), np.nan)
    found[complete] = values
    return found


class Places:
    """Of rows: ``subject (m,)``, -1 for new ones, ``visit (m,)``, ``arm (m,)``."""

    def __init__(self, subject: np.ndarray, visit: np.ndarray, arm: np.ndarray):
        self.subject, self.visit, self.arm = subject, visit, arm


def _places(fitted: RepeatedFitted, newdata: Any, complete: np.ndarray) -> Places:
    design, labels = fitted.design, fitted.labels
    of_subject = np.zeros(design.n_subjects, int) if design.arm is None else np.asarray(design.arm)
    if newdata is None:
        subject = np.asarray(design.subject)
        return Places(subject, np.asarray(design.visit), of_subject[subject])
    repetition: Repetition = labels.repetition
    needed = [repetition.visit, *repetition.subject.columns, *(repetition.arm.columns if repetition.arm else ())]
    table, _ = read_columns(newdata, needed)
    visit = _codes(table, (repetition.visit,), labels.terms[0].effects, complete)
    if (visit < 0).any():
        wrong = table[repetition.visit][complete].iloc[int(np.flatnonzero(visit < 0)[0])]
        raise DataError(f"newdata has {repetition.visit} '{wrong}', which is no visit of the fit: "
                        f"{', '.join(labels.terms[0].effects)}")  # fmt: skip
    subject = _codes(table, repetition.subject.columns, labels.terms[0].levels, complete)
    if repetition.arm is None:
        return Places(subject, visit, np.zeros(len(visit), int))
    own = _codes(table, repetition.arm.columns, labels.arms, complete)
    if (own < 0).any():
        wrong = table[repetition.arm.columns[0]][complete].iloc[int(np.flatnonzero(own < 0)[0])]
        raise DataError(f"newdata has {repetition.arm.name} '{wrong}', which the fit has no covariance of")
    return Places(subject, visit, own)


def _codes(
    table: Mapping[str, pd.Series], columns: tuple[str, ...], levels: tuple[str, ...], complete: np.ndarray
) -> np.ndarray:
    places = {level: i for i, level in enumerate(levels)}
    values = [[level_name(value) for value in table[name][complete]] for name in columns]
    return np.array([places.get(":".join(own), -1) for own in zip(*values, strict=True)], int)


def _variances(fitted: RepeatedFitted, places: Places, weights: Any) -> np.ndarray:
    sd2: np.ndarray = np.stack([np.diagonal(S) for S in fitted.estimates.Sigma])[places.arm, places.visit]
    return sd2 if weights is None else sd2 / np.asarray(weights)


def _given_subjects(
    fitted: RepeatedFitted, X: np.ndarray, mean: np.ndarray, places: Places, weights: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Conditional means, their variances by those of beta, and the variances that are left."""
    design, est = fitted.design, fitted.estimates
    own_X, raw = np.asarray(design.X), fitted.residuals("response")
    root_w = np.ones(fitted.nobs) if fitted.rows.sqrt_w is None else fitted.rows.sqrt_w
    by_subject: dict[int, np.ndarray] = {}
    order = np.argsort(np.asarray(design.subject), kind="stable")
    for own in np.split(order, np.flatnonzero(np.diff(np.asarray(design.subject)[order])) + 1):
        by_subject[int(np.asarray(design.subject)[own[0]])] = own
    estimate, moved, rest = mean.copy(), X.copy(), _variances(fitted, places, weights)
    for i, (s, v, a) in enumerate(zip(places.subject, places.visit, places.arm, strict=True)):
        if s < 0:
            continue
        own, S = by_subject[int(s)], est.Sigma[a]
        visits, w = np.asarray(design.visit)[own], root_w[own]
        # The row's own weight makes no difference where its response is known.
        here = 1.0 if weights is None else float(np.sqrt(np.asarray(weights)[i]))
        if v in visits:
            here = float(w[visits == v][0])
        V = S[np.ix_(visits, visits)] / np.outer(w, w)
        share = np.linalg.solve(V, S[visits, v] / (w * here))
        estimate[i] += share @ raw[own]
        moved[i] -= share @ own_X[own]
        rest[i] = max(0.0, S[v, v] / here**2 - share @ (S[visits, v] / (w * here)))
    error = np.einsum("rp,pq,rq->r", moved, est.vcov, moved)
    return estimate, error, rest
