"""Means of repeated measures: of rows of the fit or a new table, also given what else is known of a subject."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd

from mixjax.checks import DataError, check_level
from mixjax.distributions import t_quantile
from mixjax.fitted.repeated import RepeatedFitted
from mixjax.formula.evaluate import numbers
from mixjax.formula.reading import column_names, read_columns
from mixjax.formula.repeated import Repetition
from mixjax.formula.state import new_rows
from mixjax.formula.table import as_numbers, combinations, level_name, refuse_unknown
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
        conditional: given the responses of the subject: the mean of the normal distribution of the row's response
            given those, which is that response itself where it is one of them. They are those of the fit, and those of
            newdata where it has the columns of the response, which go first; subjects without any get the mean of all.
            Needs the columns of visit and subject, and of weights.
        interval: ``"confidence"`` of the mean, ``"prediction"`` of a response of the row; None for means alone.
            Covariances are taken as known, but for the degrees of freedom: of 20 subjects with four visits and an
            unstructured covariance, prediction intervals given the other visits cover 86 % instead of 95, of 60 93 %.
        level: coverage. ddf: of the quantiles: ``"satterthwaite"``, ``"kenward-roger"`` or ``"wald"``; of predictions
            and conditional means normal quantiles.

    Returns:
        Series ``fitted``; with an interval a DataFrame ``estimate``, ``std_error``, ``lower``, ``upper``.

    Raises:
        DataError: a column is missing, a visit is none of the fit's, a subject has two responses at one visit, or is in
            another arm than in the fit.

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
        weights, y = fitted.design.weights, None
    else:
        y = _responses(fitted, newdata) if conditional else None
        whole = (interval == "prediction" or conditional) and labels.state.weights is not None
        rows = new_rows(replace(labels, terms=()), newdata, (), (), weights=whole)
        index, complete, X, estimable = rows.index, rows.complete, rows.X, rows.estimable
        mean, weights = rows.X @ fitted.estimates.beta + rows.offset, rows.weights
        y = None if y is None else y[complete]
    places = None
    if conditional or interval == "prediction":
        places = _places(fitted, newdata, complete, conditional)
    if conditional:
        assert places is not None
        known = _Known.of(fitted, X, mean, places, weights, y)
        estimate, error, rest = _given_subjects(fitted, X, mean, places, weights, known)
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


class NewPlaces(NamedTuple):
    """Rows with their visits, for predictions over a posterior.

    Attributes:
        X: ``(m, p)``. offset: ``(m,)``. estimable: ``(m,)``. labels: of all rows, an index. complete:
            which of them are the m.
        visit, arm: ``(m,)``, zero where they were not asked for. weights: ``(m,)`` or None.
    """

    X: np.ndarray
    offset: np.ndarray
    estimable: np.ndarray
    labels: pd.Index
    complete: np.ndarray
    visit: np.ndarray
    arm: np.ndarray
    weights: np.ndarray | None


def new_places(fitted: RepeatedFitted, newdata: Any, with_visits: bool) -> NewPlaces:
    """The rows of the fit, or of a new table, with their visits and arms where these are needed."""
    design, labels = fitted.design, fitted.labels
    if newdata is None:
        n, offset = fitted.nobs, design.offset
        places = _places(fitted, None, np.ones(n, bool), False)
        return NewPlaces(
            np.asarray(design.X), np.zeros(n) if offset is None else np.asarray(offset), np.ones(n, bool),
            labels.frame.index, np.ones(n, bool), places.visit, places.arm, design.weights,
        )  # fmt: skip
    weighted = with_visits and labels.state.weights is not None
    rows = new_rows(replace(labels, terms=()), newdata, (), (), weights=weighted)
    zero = np.zeros(len(rows.X), int)
    places = _places(fitted, newdata, rows.complete, False) if with_visits else Places(zero, zero, zero)
    return NewPlaces(
        rows.X, rows.offset, rows.estimable, rows.index, rows.complete, places.visit, places.arm,
        rows.weights if with_visits else None,
    )  # fmt: skip


def _on_all(values: np.ndarray, complete: np.ndarray) -> np.ndarray:
    found = np.full(len(complete), np.nan)
    found[complete] = values
    return found


def _responses(fitted: RepeatedFitted, newdata: Any) -> np.ndarray | None:
    """``(rows,)`` responses in a new table, NaN where there is none; None where a column of the response is missing."""
    state = fitted.labels.state
    response = state.parsed.response
    if not set(response.columns) <= set(column_names(newdata)):
        return None
    table, index = read_columns(newdata, response.columns)
    frame = pd.DataFrame(as_numbers(table, response.columns), index=index)
    there = frame.notna().all(axis=1).to_numpy()
    y = np.full(len(frame), np.nan)
    if there.any():
        y[there] = numbers(response, frame[there], state.context, "response")[0]
    return y


class Places(NamedTuple):
    """Of rows: ``subject (m,)``, those that are not in the fit counted on, ``visit (m,)``, ``arm (m,)``."""

    subject: np.ndarray
    visit: np.ndarray
    arm: np.ndarray


def _places(fitted: RepeatedFitted, newdata: Any, complete: np.ndarray, of_subjects: bool) -> Places:
    """Args: of_subjects: subjects are needed too."""
    design, labels = fitted.design, fitted.labels
    of_subject = np.zeros(design.n_subjects, int) if design.arm is None else np.asarray(design.arm)
    if newdata is None:
        subject = np.asarray(design.subject)
        return Places(subject, np.asarray(design.visit), of_subject[subject])
    repetition: Repetition = labels.repetition
    who = repetition.subject.columns if of_subjects else ()
    arms = repetition.arm.columns if repetition.arm else ()
    available = column_names(newdata)
    for name in (repetition.visit, *who, *arms):
        if name not in available:
            refuse_unknown(name, available, f"needed in newdata: '{repetition.written}'", newdata)
    table, _ = read_columns(newdata, [repetition.visit, *who, *arms])
    visit = _codes(table, (repetition.visit,), labels.frame, complete)
    if (visit < 0).any():
        wrong = table[repetition.visit][complete].iloc[int(np.flatnonzero(visit < 0)[0])]
        raise DataError(f"newdata has {repetition.visit} '{wrong}', which is no visit of the fit: "
                        f"{', '.join(labels.terms[0].effects)}")  # fmt: skip
    subject = np.zeros(len(visit), int)
    if of_subjects:
        missing = np.any([table[name][complete].isna() for name in who], axis=0)
        if missing.any():
            raise DataError(
                f"newdata has {int(missing.sum())} rows without {repetition.subject.name}, given whose responses "
                "nothing is known: conditional=False predicts their means"
            )
        subject = _codes(table, who, labels.frame, complete, count_on=True)
    if repetition.arm is None:
        return Places(subject, visit, np.zeros(len(visit), int))
    own = _codes(table, arms, labels.frame, complete)
    if (own < 0).any():
        wrong = table[arms[0]][complete].iloc[int(np.flatnonzero(own < 0)[0])]
        raise DataError(f"newdata has {repetition.arm.name} '{wrong}', which the fit has no covariance of")
    if of_subjects:
        known = np.flatnonzero(subject < len(of_subject))
        moved = known[of_subject[subject[known]] != own[known]]
        if len(moved):
            s = subject[moved[0]]
            here, there = labels.arms[own[moved[0]]], labels.arms[of_subject[s]]
            raise DataError(
                f"newdata has {repetition.subject.name} '{labels.terms[0].levels[s]}' in {repetition.arm.name} "
                f"'{here}', and the fit in '{there}': responses of one arm say nothing of the other; name the subject "
                "otherwise, or predict with conditional=False"
            )
    return Places(subject, visit, own)


def _codes(
    table: Mapping[str, pd.Series],
    columns: tuple[str, ...],
    frame: pd.DataFrame,
    complete: np.ndarray,
    count_on: bool = False,
) -> np.ndarray:
    """Numbers of the levels of rows in the fit, whose table is ``frame``; of those that are none of them -1, or numbers
    of their own."""
    places = {tuple(level): i for i, level in enumerate(combinations(frame, columns)[1])}
    values = [[level_name(value) for value in table[name][complete]] for name in columns]
    names = list(zip(*values, strict=True))
    if count_on:
        for name in names:
            places.setdefault(name, len(places))
    return np.array([places.get(name, -1) for name in names], int)


def _variances(fitted: RepeatedFitted, places: Places, weights: Any) -> np.ndarray:
    sd2: np.ndarray = np.stack([np.diagonal(S) for S in fitted.estimates.Sigma])[places.arm, places.visit]
    return sd2 if weights is None else sd2 / np.asarray(weights)


class _Known(NamedTuple):
    """Rows whose responses are known: ``subject, visit, root_w, raw (k,)``, the last their residuals, ``X (k, p)``."""

    subject: np.ndarray
    visit: np.ndarray
    root_w: np.ndarray
    raw: np.ndarray
    X: np.ndarray

    @staticmethod
    def of(
        fitted: RepeatedFitted, X: np.ndarray, mean: np.ndarray, places: Places, weights: Any, y: np.ndarray | None
    ) -> _Known:
        """Those of the fit, and of new rows with responses y in their place.

        Raises:
            DataError: a subject has two new responses at one visit.
        """
        design = fitted.design
        root_w = np.ones(fitted.nobs) if fitted.rows.sqrt_w is None else fitted.rows.sqrt_w
        subject, visit = np.asarray(design.subject), np.asarray(design.visit)
        own = _Known(subject, visit, root_w, fitted.residuals("response"), np.asarray(design.X))
        new = np.zeros(len(mean), bool) if y is None else np.isfinite(y)
        if y is None or not new.any():
            return own
        cell = places.subject[new] * design.n_visits + places.visit[new]
        found, counts = np.unique(cell, return_counts=True)
        if (counts > 1).any():
            row = np.flatnonzero(new)[np.flatnonzero(cell == found[counts > 1][0])[0]]
            raise DataError(
                f"newdata has {int(counts.max())} responses of one {fitted.labels.repetition.subject.name} at "
                f"{fitted.labels.repetition.visit} '{fitted.labels.terms[0].effects[places.visit[row]]}': a subject "
                "has one a visit"
            )
        left = ~np.isin(subject * design.n_visits + visit, cell)
        w = np.ones(len(mean)) if weights is None else np.sqrt(np.asarray(weights))
        theirs = (places.subject[new], places.visit[new], w[new], (y - mean)[new], X[new])
        return _Known(*(np.concatenate([a[left], b]) for a, b in zip(own, theirs, strict=True)))


def _given_subjects(
    fitted: RepeatedFitted, X: np.ndarray, mean: np.ndarray, places: Places, weights: Any, known: _Known
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Conditional means, their variances by those of beta, and the variances that are left."""
    est = fitted.estimates
    order = np.argsort(known.subject, kind="stable")
    parts = np.split(order, np.flatnonzero(np.diff(known.subject[order])) + 1)
    by_subject = {int(known.subject[own[0]]): own for own in parts}
    estimate, moved, rest = mean.copy(), X.copy(), _variances(fitted, places, weights)
    for i, (s, v, a) in enumerate(zip(places.subject, places.visit, places.arm, strict=True)):
        if int(s) not in by_subject:
            continue
        own, S = by_subject[int(s)], est.Sigma[a]
        visits, w = known.visit[own], known.root_w[own]
        # The row's own weight makes no difference where its response is known.
        here = 1.0 if weights is None else float(np.sqrt(np.asarray(weights)[i]))
        if v in visits:
            here = float(w[visits == v][0])
        V = S[np.ix_(visits, visits)] / np.outer(w, w)
        share = np.linalg.solve(V, S[visits, v] / (w * here))
        estimate[i] += share @ known.raw[own]
        moved[i] -= share @ known.X[own]
        rest[i] = max(0.0, S[v, v] / here**2 - share @ (S[visits, v] / (w * here)))
    error = np.einsum("rp,pq,rq->r", moved, est.vcov, moved)
    return estimate, error, rest
