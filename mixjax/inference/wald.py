"""Wald intervals of all parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from mixjax.checks import InferenceWarning, check_level, warn
from mixjax.covariance.custom import Written
from mixjax.distributions import normal_quantile, t_quantile
from mixjax.fitted.names import names_apart, names_of_variances
from mixjax.inference.fixed.contrasts import FixedEffects

if TYPE_CHECKING:
    from mixjax.fitted.either import AnyRecord


def wald_intervals(fitted: AnyRecord, level: float = 0.95, ddf: str = "wald") -> pd.DataFrame:
    """Wald intervals of all parameters.

    Of the fixed effects: estimate -+ quantile times standard error. Of standard deviations, sigma among them, and of
    parameters of a family on the scale of their logarithms, of correlations on that of Fisher's z, of what a structure
    of the user's own reports (``natural=``) on that of its parameters where each is reported by itself, with
    delta-method standard errors.

    Args:
        level: coverage.
        ddf: ``"wald"`` for normal quantiles, or the degrees of freedom of t quantiles; of the fixed effects.

    Returns:
        DataFrame with columns ``lower``, ``upper``; see :class:`VarianceParameters` for the rows, then the fixed
        effects. NaN for parameters on the boundary.
    """
    check_level(level)
    variance = fitted.variance_parameters
    z = normal_quantile(0.5 + level / 2)
    estimate, se = variance.estimate, variance.std_error
    kinds = np.array(variance.kinds, str)
    with np.errstate(invalid="ignore", divide="ignore"):
        on_log = np.exp(np.log(estimate) + np.outer([-z, z], se / estimate))
        on_z = np.tanh(np.arctanh(estimate) + np.outer([-z, z], se / (1 - estimate**2)))
        as_it_is = estimate + np.outer([-z, z], se)
    ends = np.where(kinds == "cor", on_z, np.where(kinds == "real", as_it_is, on_log))
    for places, own in _reported(fitted, estimate, se, float(z)):
        ends[:, places] = own
    if np.isnan(ends).any():
        missing = [name for name, row in zip(variance.names, ends.T, strict=True) if np.isnan(row).any()]
        warn(
            f"no Wald interval for {', '.join(missing)}: the estimate lies on the boundary, or the Hessian is not "
            "positive definite; use method='bootstrap'",
            InferenceWarning,
        )
    fixed = FixedEffects.of(fitted, ddf)
    p = len(fixed.beta)
    df = fixed.df(np.eye(p))
    quantile = t_quantile(0.5 + level / 2, df)
    width = quantile * np.sqrt(np.diag(fixed.vcov))
    lower = np.concatenate([ends[0], fixed.beta - width])
    upper = np.concatenate([ends[1], fixed.beta + width])
    index = [*variance.names, *names_apart(fitted.labels.fixed, variance.names)]
    return pd.DataFrame({"lower": lower, "upper": upper}, index=index)


def _reported(
    fitted: AnyRecord, estimate: np.ndarray, se: np.ndarray, z: float
) -> Iterator[tuple[list[int], np.ndarray]]:
    """Ends ``(2, k)`` of what structures of the user's own report of their parameters, and where these stand."""
    structures = fitted.layout.structures if hasattr(fitted, "layout") else ()
    parameters = names_of_variances(fitted.labels, structures) if structures else ()
    for t, structure in enumerate(structures):
        if not isinstance(structure, Written) or structure.own.natural is None:
            continue
        places = [i for i, own in enumerate(parameters) if own.term == t and own.natural.kind == "real"]
        if not np.isfinite(se[places]).all():
            continue
        try:
            p = structure.parameters_of(estimate[places], np.full(len(places), 0.1))
        except ValueError:  # by rounding they lie beyond a limit, which no parameters reach
            continue
        start = np.ones(structure.n_scales)
        slopes = np.asarray(structure.reported(np.concatenate([start, p]))[1])
        if (slopes == np.diag(slopes.diagonal())).all():
            moved = p + np.outer([-z, z], se[places] / np.abs(slopes.diagonal()))
            ends = [np.asarray(structure.reported(np.concatenate([start, row]))[0]) for row in moved]
            yield places, np.sort(ends, 0)
