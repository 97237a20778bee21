"""Predictions of a fit: means of old and new rows, with intervals."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from mixjax.checks import FormulaError, InferenceWarning, check_count, check_level, warn
from mixjax.design import Labels, TermLabels
from mixjax.distributions import normal_quantile, t_quantile
from mixjax.fitted.names import interaction_key, term_names
from mixjax.fitted.record import Fitted
from mixjax.formula.algebra import Effects
from mixjax.formula.coding import scoped_terms
from mixjax.formula.evaluate import Columns
from mixjax.formula.parse import parse
from mixjax.formula.state import FormulaState, new_rows
from mixjax.formula.syntax import read
from mixjax.prediction.bootstrap import bootstrap_errors, quantile_of_size
from mixjax.prediction.second_order import second_order
from mixjax.prediction.targets import Targets, effect_rows

Interval = Literal["confidence", "prediction"]
Method = Literal["henderson", "second-order", "bootstrap"]
INTERVALS, METHODS = ("confidence", "prediction"), ("henderson", "second-order", "bootstrap")
# Degrees of freedom below this one say only that nothing is known of the variance; t's quantiles would be astronomic.
LEAST_DF = 1.0


def predict(
    fitted: Fitted,
    newdata: Any = None,
    random: bool | str | Sequence[str] = True,
    allow_new_levels: bool = False,
    interval: Interval | None = None,
    level: float = 0.95,
    method: Method = "henderson",
    key: Any = None,
    n: int = 1000,
) -> pd.Series | pd.DataFrame:
    """Means of the rows of the fit or of a new table, with or without the random effects, and intervals for them.

    Offsets are included. In a new table, contrasts, categories, knots and centring are those of the fit, so that a row
    means the same in any company.

    Args:
        fitted: the fit.
        newdata: pandas, polars or pyarrow table, or a dict of arrays, with the columns that the formula reads (not the
            response, and of the random terms only what ``random`` asks for); None for the rows of the fit. An
            ``offset=`` or ``weights=`` that the fit had by the name of a column is read from newdata too.
        random: True for all random effects of a row's own levels (conditional mean), False for none (population), or
            those of some terms: a grouping factor (``"Subject"``: all its terms), a term as ``varcorr`` calls it
            (``"Subject.1"``) or as formulas write it (``"0 + Days | Subject"``), or a list of these. A formula may name
            some effects of a larger term, as lme4's ``re.form``: ``"1 | Subject"`` of ``(Days | Subject)``; and several
            terms, ``"~ (1 | Subject) + (1 | Item)"``.
        allow_new_levels: a level that the fit does not know has random effects 0, and their variance counts in
            intervals; so has one that is missing. Otherwise both are errors, as in lme4.
        interval: None; ``"confidence"`` for the mean itself, fixed effects and the random effects that ``random``
            includes; ``"prediction"`` for a new response, which adds ``sigma^2 / weight`` and, for the terms that
            ``random`` leaves out, the variance of new levels' effects. The weight is 1 where it is not known.
        level: of the intervals.
        method: of the intervals.

            * ``"henderson"``: theta taken as known, the fixed and random effects estimated jointly (Henderson's
              mixed-model equations); normal quantiles. Too short when there are few levels.
            * ``"second-order"``: the estimated mean squared error ``g1 + g2 + 2 g3`` of Kackar & Harville (1984) and
              Prasad & Rao (1990), with t quantiles on Satterthwaite's degrees of freedom (at least 1); REML fits.
            * ``"bootstrap"``: errors of the predictions of n data sets drawn from the fit and refitted, each in units
              of its own Henderson standard error (Chatterjee, Lahiri & Li 2008, Ann. Statist. 36, 1221).
        key: int or JAX key of the bootstrap. n: number of its replicates.

    Returns:
        Series ``fitted`` with the index of newdata, NaN where a row has missing values or cannot be estimated; with an
        interval a DataFrame ``estimate``, ``std_error`` (of the prediction error: with ``"bootstrap"`` the root mean
        square of the replicates), ``lower``, ``upper``.

    Raises:
        DataError: newdata lack a column, or hold what the fit does not know; see :mod:`mixjax.formula.state`.
        ValueError: an argument makes no sense, or the method cannot do it.

    Warns:
        DataWarning: rows of newdata have missing values. InferenceWarning: rows cannot be estimated because columns of
        X were left out of the fit; intervals are not quite what was asked for.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.prediction.predict import predict
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> new = {"Days": [0, 10], "Subject": ["308", "nobody"]}
        >>> predict(fit.record, new, allow_new_levels=True, interval="prediction").round(1)
           estimate  std_error  lower  upper
        0     253.7       28.4  198.1  309.3
        1     356.1       72.3  214.4  497.7
    """
    _check_arguments(allow_new_levels, interval, level, method, key, n)
    included = _included(fitted, random)
    targets, index, complete = _targets(fitted, newdata, included, allow_new_levels, interval)
    fitted_mean = targets.mean(np.asarray(fitted.estimates.beta), fitted.estimates.b)
    estimate = _on(index, complete, fitted_mean)
    if interval is None:
        return pd.Series(estimate, index=index, name="fitted")
    se, width = errors_of(fitted, targets, level, method, key, n)
    columns = {"estimate": fitted_mean, "std_error": se, "lower": fitted_mean - width, "upper": fitted_mean + width}
    return pd.DataFrame({name: _on(index, complete, values) for name, values in columns.items()}, index=index)


def _on(index: pd.Index, complete: np.ndarray, values: np.ndarray) -> np.ndarray:
    out = np.full(len(index), np.nan)
    out[complete] = values
    return out


def _check_arguments(allow_new_levels: Any, interval: Any, level: float, method: Any, key: Any, n: Any) -> None:
    if not isinstance(allow_new_levels, bool | np.bool_):
        raise ValueError(f"allow_new_levels must be True or False, got {allow_new_levels!r}")
    if interval is not None and interval not in INTERVALS:
        raise ValueError(f"interval must be None or one of {', '.join(map(repr, INTERVALS))}, got {interval!r}")
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if interval is None:
        return
    check_level(level)
    if method == "bootstrap":
        check_count("n", n, 2)
        if key is None:
            raise ValueError("method='bootstrap' draws random numbers: pass key=, an int or a JAX key")


# --- which random effects ------------------------------------------------------------------------------------------


def _included(fitted: Fitted, random: Any) -> list[np.ndarray]:
    """Per random term ``(q,)``, which of its effects ``random`` asks for."""
    terms = fitted.labels.terms
    if isinstance(random, bool | np.bool_):
        return [np.full(len(term.effects), bool(random)) for term in terms]
    names = [random] if isinstance(random, str) else random
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"random must be True, False, or names of grouping factors or terms, got {random!r}")
    own = term_names(fitted.labels)
    wanted = [np.zeros(len(term.effects), bool) for term in terms]
    for name in names:
        matches = [t for t, term in enumerate(terms) if term.group == name]
        matches = matches or [t for t, one in enumerate(own) if one == name]
        found = {t: np.ones(len(terms[t].effects), bool) for t in matches} or _effects_written(name, fitted.labels)
        if not found:
            texts = [f"{one!r} ({' + '.join(t.effects)} | {t.group})" for one, t in zip(own, terms, strict=True)]
            raise ValueError(f"there is no random term {name!r}; there are {', '.join(texts)}")
        for t, which in found.items():
            wanted[t] |= which
    return wanted


def _effects_written(name: str, labels: Labels) -> dict[int, np.ndarray]:
    """Terms, and which of their effects, that ``(0 + Days | Subject)`` or ``Days | Subject`` stands for; none where the
    fit does not have all of them."""
    return _columns_written(name, labels.terms) or _terms_written(name, labels)


def _columns_written(name: str, terms: Sequence[TermLabels]) -> dict[int, np.ndarray]:
    """Effects by the names of their columns. A factor stands for its columns where the term is asked for as a whole."""
    text = re.sub(r"\s", "", name)
    written = re.fullmatch(r"(?:\w*\((.*)\)|(.*))", text)
    effects, bar, group = (written[1] or written[2] or "").partition("|") if written else ("", "", "")
    parts = effects.split("+")
    if not bar:
        return {}
    parts = parts[1:] if parts[0] in ("0", "-1") else ["Intercept", *(p for p in parts if p not in ("1", "Intercept"))]
    keys = {interaction_key(part) for part in parts}
    of_group = [t for t, term in enumerate(terms) if term.group.replace(" ", "") == group.lstrip("|")]
    for t in of_group:
        factors = [re.sub(r"\[[^\[\]]*\]", "", effect.replace(" ", "")) for effect in terms[t].effects]
        if set(map(interaction_key, factors)) == keys:
            return {t: np.ones(len(factors), bool)}
    own = {t: [interaction_key(effect.replace(" ", "")) for effect in terms[t].effects] for t in of_group}
    if not keys <= {key for every in own.values() for key in every}:
        return {}
    found = {t: np.array([key in keys for key in every]) for t, every in own.items()}
    return {t: which for t, which in found.items() if which.any()}


def _terms_written(name: str, labels: Labels) -> dict[int, np.ndarray]:
    """Effects by the terms of a formula, one or a sum of random terms, factors coded as the fit has them."""
    state: FormulaState | None = labels.state
    text = name.strip().removeprefix("~").strip()
    if state is None or "|" not in text:
        return {}
    try:
        text = f"({text})" if read(text).outer("|", "||") else text
        asked = parse(f"y ~ {text}", [*state.kinds, *(c for part in state.parsed.random for c in part.group.columns)])
    except FormulaError:
        return {}
    columns_of = {part.group.name: frozenset(part.group.columns) for part in state.parsed.random}
    found: dict[int, np.ndarray] = {}
    for part in asked.random:
        of_group = [t for t, own in enumerate(labels.terms) if columns_of[own.group] == frozenset(part.group.columns)]
        for effects in part.blocks():
            places = [place for t in of_group for place in _coded_alike(effects, state.random[t], t)]
            if len(places) != len(effects.terms):
                return {}
            for t, at in places:
                which = found.setdefault(t, np.zeros(len(labels.terms[t].effects), bool))
                which[at] = True
    return found


def _coded_alike(effects: Effects, own: Columns, t: int) -> list[tuple[int, slice]]:
    """The terms that a random term of the fit has with the same columns: its number and where they stand."""
    if not {e.shown for e in effects.expressions} <= set(own.spec.coders):
        return []
    spans = {name: coder.spans_intercept for name, coder in own.spec.coders.items()}
    asked = dict(zip(map(frozenset, effects.terms), scoped_terms(effects.terms, spans), strict=True))
    found, at = [], 0
    for term, part in zip(own.effects.terms, own.spec.structure, strict=True):
        scoped = asked.get(frozenset(term))
        if scoped is not None and set(map(frozenset, scoped)) == set(map(frozenset, part.scoped)):
            found.append((t, slice(at, at + len(part.columns))))
        at += len(part.columns)
    return found


# --- the rows ------------------------------------------------------------------------------------------------------


def _targets(
    fitted: Fitted, newdata: Any, effects: list[np.ndarray], allow_new_levels: bool, interval: str | None
) -> tuple[Targets, pd.Index, np.ndarray]:
    """The targets; the index of all rows, and which of them are predicted."""
    whole = interval == "prediction"
    included = [bool(which.any()) for which in effects]
    if whole and any(which.any() and not which.all() for which in effects):
        raise ValueError(
            "random= asks for some effects of a term: the others of the same level are correlated with these, so that "
            "there is no interval of a new response; name whole terms, or take interval='confidence'"
        )
    if newdata is None:
        design = fitted.design
        m = len(np.asarray(design.X))
        offset = np.zeros(m) if design.offset is None else np.asarray(design.offset)
        weights = np.ones(m) if design.weights is None else np.asarray(design.weights)
        Z = tuple(np.asarray(t.Z) if own or whole else None for t, own in zip(design.terms, included, strict=True))
        level = tuple(np.asarray(t.group) if own else None for t, own in zip(design.terms, included, strict=True))
        targets = Targets(np.asarray(design.X), offset, Z, level, 1.0 / weights if whole else np.zeros(m))
        targets = targets.with_effects(effects)
        return targets, fitted.labels.frame.index, np.ones(m, bool)

    labels = fitted.labels
    rows = new_rows(labels, newdata, [own or whole for own in included], included, allow_new_levels, weights=whole)
    weighted = np.asarray(fitted.stats.sum_log_weights) != 0
    if whole and rows.weights is None and weighted:
        warn(
            "the fit had weights, but the weights of newdata are not known: intervals are for responses of weight 1",
            InferenceWarning,
        )
    m = len(rows.X)
    noise = np.zeros(m) if not whole else np.ones(m) if rows.weights is None else 1.0 / rows.weights
    targets = Targets(rows.X, rows.offset, rows.Z, rows.level, noise).with_effects(effects)
    complete = rows.complete.copy()
    if not rows.estimable.all():
        bad = int((~rows.estimable).sum())
        warn(
            f"{bad} rows of newdata cannot be estimated, because they need columns that were left out of the fit "
            f"({', '.join(labels.dropped_columns)}): NaN there",
            InferenceWarning,
        )
        complete[np.flatnonzero(complete)[~rows.estimable]] = False
        targets = targets.take(rows.estimable)
    return targets, rows.index, complete


# --- their errors --------------------------------------------------------------------------------------------------


def errors_of(
    fitted: Fitted, targets: Targets, level: float, method: str, key: Any, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors ``(m,)`` of the prediction errors and half the widths of the intervals."""
    stats, est = fitted.stats, fitted.estimates
    sigma = np.asarray(est.sigma, float)
    if method == "second-order":
        return _second_order(fitted, targets, level)
    lambdas = fitted.relative_factors
    D = tuple(Lambda @ Lambda.T for Lambda in lambdas)
    variance = fitted.equations.variance(effect_rows(targets, stats)) + targets.fresh_variance(D)
    se = sigma * np.sqrt(np.maximum(variance, 0.0))
    if method == "henderson":
        return se, normal_quantile(0.5 + level / 2) * se
    errors = bootstrap_errors(fitted, targets, key, n)
    return np.sqrt(np.mean(errors.error**2, axis=0)), quantile_of_size(errors, level) * se


def _second_order(fitted: Fitted, targets: Targets, level: float) -> tuple[np.ndarray, np.ndarray]:
    if not fitted.reml:
        raise ValueError(
            "method='second-order' rests on REML estimates of the variances, which are nearly unbiased: fit with "
            "reml=True, or use method='bootstrap'"
        )
    info = fitted.information
    if not info.regular:
        warn(
            "the Hessian of the criterion is not positive definite at these estimates: there are no second-order "
            "standard errors; use method='bootstrap' or a simpler random part",
            InferenceWarning,
        )
        return np.full(len(targets.X), np.nan), np.full(len(targets.X), np.nan)
    if not info.free.all():
        warn(
            "singular fit: the variances that are zero, and the correlations at their bounds, are taken as known, and "
            "intervals are too short; method='bootstrap' draws from the same singular fit",
            InferenceWarning,
        )
    done = second_order(fitted.stats, targets, info.x, np.asarray(fitted.estimates.sigma, float), info.covariance)
    se = np.sqrt(np.maximum(done.variance, 0.0))
    df = np.where(np.isnan(done.df), np.inf, np.maximum(done.df, LEAST_DF))  # 0 / 0: nothing varies
    return se, t_quantile(0.5 + level / 2, df) * se
