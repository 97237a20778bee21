"""Predictions of generalised linear mixed models: means of old and new rows on the scale of the response or of the
linear predictor, averaged over random effects or not, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pandas as pd
from scipy.special import expit

from mixjax.checks import InferenceWarning, check_level, warn
from mixjax.distributions import normal_quantile
from mixjax.engine.coordinates import coordinates_in
from mixjax.engine.equations import covariances_with_slopes
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.fitted.parameters import is_covariance
from mixjax.prediction.asked import Asked, Interval, check_asked, effects_included, on_rows, rows_asked
from mixjax.prediction.mixture import Mixture
from mixjax.prediction.targets import Targets, effect_rows

Scale = Literal["response", "link"]
SCALES = ("response", "link")


def predict(
    fitted: GeneralizedFitted,
    newdata: Any = None,
    random: bool | str | Sequence[str] | None = None,
    scale: Scale = "response",
    integrate: bool = False,
    allow_new_levels: bool = False,
    interval: Interval | None = None,
    level: float = 0.95,
    size: Any = None,
) -> pd.Series | pd.DataFrame:
    """Means of the rows of the fit or of a new table, and intervals for them.

    A nonlinear mean has two population values, and they differ: that of the median subject, whose random effects are
    zero (``random=False``), and the average over subjects (``integrate=True``).

    Args:
        fitted, newdata, allow_new_levels: as of :func:`mixjax.prediction.predict.predict`. Weights of new rows are not
            read.
        random: True for all random effects of a row's own levels (conditional mean); False for none: the median
            subject, where the link is monotone; or the terms that count, as there. None: True, or False with
            ``integrate=True``.
        scale: ``"response"``: means, of a binomial response proportions; ``"link"``: the linear predictor.
        integrate: average the mean over the random effects that ``random`` leaves out, and over those of new levels
            where ``allow_new_levels``: ``E mean(eta + z'b)`` with ``z'b ~ N(0, sum_t z_t'Sigma_t z_t)``, one
            integral whatever the number of terms, exact to 1e-10
            (:meth:`~mixjax.families.family.Family.integrated_mean`). Effects of known levels that ``random``
            includes stay at their modes.
        interval: None; ``"confidence"`` for the mean itself; ``"prediction"`` for a new response given that the fit is
            right: quantiles of the family's distribution mixed over the normal distribution of the linear predictor,
            whose variance has the errors of the estimates and of the modes, new levels' effects and those of terms that
            ``random`` leaves out; parameters of the family are taken as known. Whole counts, of a binomial response
            proportions ``k / size``.
        level: of the intervals. A prediction interval of counts covers at least so much.
        size: number or ``(rows,)`` of trials of the new binomial responses; None for those of the fit's rows, for the
            column that the fit had as ``size=``, for the columns of ``cbind()``; otherwise responses are single trials.

    The error of a predictor has the modes' conditional variance, and by the delta method that of all estimates
    together, covariances of the random effects and parameters of the family among them, which move the modes too:
    ``z'K z + g'V g``, as TMB's. On the scale of the link intervals are normal; a mean's are transformed from there, and
    its standard error is by the delta method. An integrated mean's variance is by the delta method over fixed effects
    and covariances, its interval symmetric on the link's scale.

    Returns:
        Series ``fitted`` with the index of newdata, NaN where a row has missing values or cannot be estimated; with an
        interval a DataFrame ``estimate``, ``std_error``, ``lower``, ``upper``. Of a prediction interval ``std_error``
        is the root mean square of the response about the estimate, on the scale of the means.

    Raises:
        DataError: newdata lack a column, or hold what the fit does not know. ValueError: an argument makes no sense;
        the family cannot do it, as one given by its density alone has no quantiles.

    Warns:
        DataWarning: rows of newdata have missing values. InferenceWarning: rows cannot be estimated; there are no
        standard errors; numbers of trials are not known.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.prediction.generalized import predict
        >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
        >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
        >>> predict(fit.record, {"Days": [9, 9]}, random=False).round(3).tolist()
        [0.888, 0.888]
        >>> predict(fit.record, {"Days": [9]}, integrate=True, interval="confidence").round(3)
           estimate  std_error  lower  upper
        0     0.801       0.07  0.631  0.905
    """
    random = _checked(fitted, random, scale, integrate, allow_new_levels, interval, level)
    new_response = interval == "prediction"
    if size is not None and not (new_response and fitted.family.support == "trials"):
        raise ValueError("size= are numbers of trials of new binomial responses, interval='prediction'")
    what = "interval of a new response" if new_response else "average over new levels" if integrate else None
    effects = effects_included(fitted.labels, random)
    trials = new_response and fitted.family.support == "trials"
    needed = [new_response or (name == "zero_inflation" and scale == "response") for name in fitted.family.psi_names]
    asked = rows_asked(fitted, newdata, effects, allow_new_levels, what, trials and size is None, needed)
    at = _predictors(fitted, asked.targets)
    psi = fitted.rows.psi_of_columns(fitted.estimates.psi, asked.psi)
    if scale == "link":
        estimate = at.eta
    elif integrate:
        estimate = np.asarray(fitted.family.response_mean(fitted.family.integrated_mean(at.eta, at.fresh), psi))
    else:
        estimate = np.asarray(fitted.family.response_mean(fitted.family.mean(at.eta), psi))
    if interval is None:
        return pd.Series(on_rows(asked.index, asked.complete, estimate), index=asked.index, name="fitted")
    errors = _errors(fitted, asked.targets, at)
    if new_response:
        n = trials_of(fitted, asked, size, newdata, trials)
        found = _of_responses(fitted, at, errors, psi, estimate, level, n)
    elif scale == "response" and fitted.family.plain is not fitted.family:
        found = _with_zeros(fitted, asked, at, errors, psi, estimate, integrate, level)
    elif integrate:
        found = _of_averages(fitted, asked.targets, at, errors, estimate, level)
    else:
        found = _of_means(fitted, at, errors, scale, level)
    columns = dict(zip(("std_error", "lower", "upper"), found, strict=True))
    table = {"estimate": estimate, **columns}
    return pd.DataFrame(
        {name: on_rows(asked.index, asked.complete, values) for name, values in table.items()}, index=asked.index
    )


def _checked(
    fitted: GeneralizedFitted, random: Any, scale: Any, integrate: Any, allow_new_levels: Any, interval: Any, level: Any
) -> Any:
    """``random`` as a value, after all arguments are checked."""
    check_asked(allow_new_levels, interval)
    if interval is not None:
        check_level(level)
    if not isinstance(scale, str) or scale not in SCALES:
        raise ValueError(f"scale must be 'response' or 'link', got {scale!r}")
    if not isinstance(integrate, bool | np.bool_):
        raise ValueError(f"integrate must be True or False, got {integrate!r}")
    if scale == "link" and integrate:
        raise ValueError("integrate=True averages means over random effects, which scale='link' has none of")
    if scale == "link" and interval == "prediction":
        raise ValueError("interval='prediction' is of new responses, which scale='link' has none of")
    if random is None:
        return not integrate
    if integrate and not allow_new_levels and all(own.all() for own in effects_included(fitted.labels, random)):
        raise ValueError(
            "integrate=True averages over random effects, and random= takes those of every row's own levels: one or "
            "the other. random=False is the population's average; with allow_new_levels=True that of new levels"
        )
    return random


# --- predictors and their errors -----------------------------------------------------------------------------------


class _Predictors(NamedTuple):
    """``(m,)`` linear predictors at the modes, and the variance of the new effects in each row."""

    eta: np.ndarray
    fresh: np.ndarray


class _Errors(NamedTuple):
    """Of the predictors at the modes.

    Attributes:
        conditional: ``(m,)`` variance of ``z'b`` given all parameters. slopes: ``(m, T)`` derivatives by these.
        covariance: ``(T, T)`` of their estimates; NaN where there is none.
    """

    conditional: np.ndarray
    slopes: np.ndarray
    covariance: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        """``(m,)`` with all parameters estimated."""
        found: np.ndarray = self.conditional + quadratic(self.slopes, self.covariance)
        return found


def quadratic(slopes: np.ndarray, covariance: np.ndarray) -> np.ndarray:
    """``g'V g`` of every row ``(m, T)``."""
    found: np.ndarray = np.einsum("mi,ij,mj->m", slopes, covariance, slopes, optimize=True)
    return found


def _predictors(fitted: GeneralizedFitted, targets: Targets) -> _Predictors:
    est = fitted.estimates
    return _Predictors(targets.mean(est.beta, est.b), targets.fresh_variance(est.Sigma))


def _errors(fitted: GeneralizedFitted, targets: Targets, at: _Predictors) -> _Errors:
    covariance = joint_covariance(fitted)
    slopes = np.zeros((len(at.eta), len(covariance)))
    slopes[:, : targets.X.shape[1]] = targets.X
    for Z, level, own in zip(targets.Z, targets.level, fitted.mode_slopes, strict=True):
        if Z is not None and level is not None:
            known = np.flatnonzero(level >= 0)
            slopes[known] += np.einsum("mq,tmq->mt", Z[known], own[:, level[known]])
    conditional = fitted.equations.conditional_variance(effect_rows(targets, fitted.working))
    return _Errors(np.maximum(conditional, 0.0), slopes, covariance)


def joint_covariance(fitted: GeneralizedFitted) -> np.ndarray:
    """``(T, T)`` of beta, psi and the coordinates of the covariances; those on the boundary are taken as known.

    Warns:
        InferenceWarning: there is none, because the Hessian is not positive definite: NaN.
    """
    covariance = np.asarray(fitted.estimates.vcov_all)
    if is_covariance(covariance):
        return covariance
    warn(
        "the Hessian is not positive definite at these estimates, so there are no standard errors: "
        f"{fitted.optimizer.message}",
        InferenceWarning,
    )
    return np.full_like(covariance, np.nan)


def variance_slopes(fitted: GeneralizedFitted, Z: Sequence[np.ndarray | None]) -> np.ndarray:
    """``(m, k)`` derivatives of ``sum_t z_t'Sigma_t z_t`` by the coordinates of the covariances.

    Args:
        Z: per random term ``(m, q)``, or None for one that does not count.
    """
    rows = fitted.rows
    x, _ = coordinates_in(fitted.estimates.theta, rows.layout, [basis.R for basis in rows.Z_bases])
    _, _, _, moved = covariances_with_slopes(x, rows)
    m = max((len(own) for own in Z if own is not None), default=0)
    found = np.zeros((m, len(x)))
    for own, slopes in zip(Z, moved, strict=True):
        if own is not None:
            found += np.einsum("ma,kab,mb->mk", own, slopes, own, optimize=True)
    return found


# --- intervals -----------------------------------------------------------------------------------------------------


def _of_means(
    fitted: GeneralizedFitted, at: _Predictors, errors: _Errors, scale: str, level: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Standard errors, lower and upper ends; effects of new levels vary."""
    se = np.sqrt(errors.variance + at.fresh)
    width = normal_quantile(0.5 + level / 2) * se
    if scale == "link":
        return se, at.eta - width, at.eta + width
    slope = np.abs(np.asarray(fitted.family.mean_slope(at.eta)))
    return (slope * se, *fitted.family.mean_between(at.eta - width, at.eta + width))


def _of_averages(
    fitted: GeneralizedFitted, targets: Targets, at: _Predictors, errors: _Errors, mean: np.ndarray, level: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    by_eta, slopes = _average_slopes(fitted, targets, at, errors)
    se = np.sqrt(by_eta**2 * errors.conditional + quadratic(slopes, errors.covariance))
    return (se, *fitted.family.mean_interval(mean, se, normal_quantile(0.5 + level / 2)))


def _average_slopes(
    fitted: GeneralizedFitted, targets: Targets, at: _Predictors, errors: _Errors
) -> tuple[np.ndarray, np.ndarray]:
    """Derivatives of integrated means, by eta ``(m,)`` and by all parameters ``(m, T)``."""
    by_eta, by_variance = map(np.asarray, fitted.family.integrated_slopes(at.eta, at.fresh))
    slopes = by_eta[:, None] * errors.slopes
    moved = variance_slopes(fitted, targets.fresh())
    if len(moved):
        slopes[:, slopes.shape[1] - moved.shape[1] :] += by_variance[:, None] * moved
    return by_eta, slopes


def _with_zeros(
    fitted: GeneralizedFitted,
    asked: Asked,
    at: _Predictors,
    errors: _Errors,
    psi: Sequence[Any],
    estimate: np.ndarray,
    integrate: bool,
    level: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of means of which extra zeros are a part, ``(1 - pi) m``: by the delta method over both parts, the interval by
    way of the link."""
    if integrate:
        by_eta, slopes = _average_slopes(fitted, asked.targets, at, errors)
        fresh: Any = 0.0  # effects of new levels are averaged over
    else:
        by_eta, fresh = np.asarray(fitted.family.mean_slope(at.eta)), at.fresh
        slopes = by_eta[:, None] * errors.slopes
    pi = expit(psi[-1])
    slopes = (1.0 - pi)[..., None] * slopes
    width = fitted.rows.psi_widths[-1]
    end = len(fitted.estimates.beta) + fitted.rows.n_psi
    columns = asked.psi[-1] if asked.psi and asked.psi[-1] is not None else np.ones((len(at.eta), 1))
    slopes[:, end - width : end] += -(pi * estimate)[:, None] * columns
    se = np.sqrt(((1.0 - pi) * by_eta) ** 2 * (errors.conditional + fresh) + quadratic(slopes, errors.covariance))
    return (se, *fitted.family.mean_interval(estimate, se, normal_quantile(0.5 + level / 2)))


def _of_responses(
    fitted: GeneralizedFitted,
    at: _Predictors,
    errors: _Errors,
    psi: Sequence[Any],
    estimate: np.ndarray,
    level: float,
    size: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    mixture = Mixture(fitted.family, at.eta, errors.variance + at.fresh, size, psi)
    lower, upper = (mixture.quantiles(p) for p in (0.5 - level / 2, 0.5 + level / 2))
    if np.isnan(lower[np.isfinite(mixture.variance)]).any():
        warn(
            f"no interval of responses where the linear predictor may well have no mean with link "
            f"{fitted.family.link!r}: NaN there",
            InferenceWarning,
        )
    if size is not None:
        lower, upper = lower / size, upper / size
    return np.sqrt(mixture.mean_square(estimate)), lower, upper


def trials_of(fitted: GeneralizedFitted, asked: Asked, size: Any, newdata: Any, trials: bool) -> np.ndarray | None:
    """Numbers of trials of the predicted rows, None for one each."""
    if size is None:
        if trials and asked.size is None and newdata is not None and fitted.design.size is not None:
            warn(
                "the fit had numbers of trials, but those of newdata are not known: intervals are for single trials; "
                "give size=",
                InferenceWarning,
            )
        return asked.size if trials else None
    try:
        n: np.ndarray = np.broadcast_to(np.asarray(size, np.float64), (len(asked.index),))[asked.complete]
    except ValueError:
        raise ValueError(f"size= must be a number of trials or ({len(asked.index)},) of them, got {size!r}") from None
    if not ((n > 0) & (n == np.round(n))).all():
        raise ValueError(f"size= must be whole numbers of trials above 0, got {size!r}")
    return n
