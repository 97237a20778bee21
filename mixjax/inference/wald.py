"""Wald intervals of all parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from mixjax.checks import InferenceWarning, check_level, warn
from mixjax.distributions import normal_quantile, t_quantile
from mixjax.fitted.names import names_apart
from mixjax.inference.fixed.contrasts import FixedEffects

if TYPE_CHECKING:
    from mixjax.fitted.either import AnyRecord


def wald_intervals(fitted: AnyRecord, level: float = 0.95, ddf: str = "wald") -> pd.DataFrame:
    """Wald intervals of all parameters.

    Of the fixed effects: estimate -+ quantile times standard error. Of standard deviations, sigma among them, and of
    parameters of a family on the scale of their logarithms, of correlations on that of Fisher's z, with delta-method
    standard errors.

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
