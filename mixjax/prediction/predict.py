"""Predictions of a fit: means of old and new rows, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pandas as pd

from mixjax.checks import InferenceWarning, check_count, check_level, warn
from mixjax.distributions import normal_quantile, t_quantile
from mixjax.fitted.record import Fitted
from mixjax.prediction.asked import Interval, check_asked, effects_included, on_rows, rows_asked
from mixjax.prediction.bootstrap import bootstrap_errors, quantile_of_size
from mixjax.prediction.second_order import second_order
from mixjax.prediction.targets import Targets, effect_rows

Method = Literal["henderson", "second-order", "bootstrap"]
METHODS = ("henderson", "second-order", "bootstrap")
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
    if newdata is not None:
        parts = fitted.in_parts(newdata)
        if parts is not None:
            found = [predict(fitted, p, random, allow_new_levels, interval, level, method, key, n) for p in parts]
            return pd.concat(found)
        fitted = fitted.knowing(newdata)
    included = effects_included(fitted.labels, random)
    whole = "interval of a new response" if interval == "prediction" else None
    asked = rows_asked(fitted, newdata, included, allow_new_levels, whole)
    targets, index, complete = asked.targets, asked.index, asked.complete
    fitted_mean = targets.mean(np.asarray(fitted.estimates.beta), fitted.estimates.b)
    estimate = on_rows(index, complete, fitted_mean)
    if interval is None:
        return pd.Series(estimate, index=index, name="fitted")
    se, width = errors_of(fitted, targets, level, method, key, n)
    columns = {"estimate": fitted_mean, "std_error": se, "lower": fitted_mean - width, "upper": fitted_mean + width}
    return pd.DataFrame({name: on_rows(index, complete, values) for name, values in columns.items()}, index=index)


def _check_arguments(allow_new_levels: Any, interval: Any, level: float, method: Any, key: Any, n: Any) -> None:
    check_asked(allow_new_levels, interval)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(map(repr, METHODS))}, got {method!r}")
    if interval is None:
        return
    check_level(level)
    if method == "bootstrap":
        check_count("n", n, 2)
        if key is None:
            raise ValueError("method='bootstrap' draws random numbers: pass key=, an int or a JAX key")


# --- their errors --------------------------------------------------------------------------------------------------


def errors_of(
    fitted: Fitted, targets: Targets, level: float, method: str, key: Any, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors ``(m,)`` of the prediction errors and half the widths of the intervals."""
    stats, est = fitted.stats, fitted.estimates
    sigma = np.asarray(est.sigma, float)
    if method != "henderson":
        fitted.check_can("second-order or bootstrap prediction errors")
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
