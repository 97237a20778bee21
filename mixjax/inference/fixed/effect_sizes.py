"""How well the residual standard deviation is known, for effects in its units."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mixjax.fitted.record import Fitted
from mixjax.fitted.repeated import RepeatedFitted
from mixjax.fitted.residual import ResidualFitted

if TYPE_CHECKING:
    from mixjax.fitted.either import AnyRecord


def residual_deviation(fitted: AnyRecord, with_degrees: bool) -> tuple[float, float]:
    """Sigma of a fit, and the degrees of freedom that it is estimated with, or NaN.

    Raises:
        ValueError: the model has no sigma, or its sigma is that of some rows only.
    """
    if isinstance(fitted, RepeatedFitted):
        raise ValueError(
            "repeated measures have a standard deviation for every visit: give the one to measure differences by as "
            "sigma=, such as fit.residual_sd['VIS4'], and edf="
        )
    if not isinstance(fitted, Fitted):
        raise ValueError(
            "a generalised linear mixed model has no residual standard deviation to measure differences by: give "
            "sigma=, or read contrasts() on the scale of the linear predictor"
        )
    if isinstance(fitted, ResidualFitted) and fitted.labels.dispersion:
        # Sigma is that of rows where the dispersion's columns are zero: of a reference level, which is a choice.
        raise ValueError(
            f"with dispersion={fitted.own_formulas['dispersion']!r} standard deviations differ between rows, and sigma "
            f"({float(fitted.estimates.sigma):.4g}) is that of rows where its columns are zero: give the one to "
            "measure differences by as sigma=, and edf="
        )
    return float(fitted.estimates.sigma), degrees_of_sigma(fitted) if with_degrees else float("nan")


def degrees_of_sigma(fitted: Fitted) -> float:
    """``1 / (2 Var(log sigma))``: n for the sigma of n independent normal variables.

    A chi-square variable over its degrees of freedom nu has variance 2 / nu, and sigma^2 is one (Satterthwaite).

    Raises:
        ValueError: the Hessian of the criterion is not positive definite.
    """
    info = fitted.information
    variance = fitted.log_sigma_variance
    if not info.regular or not variance > 0:
        raise ValueError(
            "the Hessian of the criterion is not positive definite at these estimates: nothing says how well sigma is "
            "known; give edf=, its degrees of freedom"
        )
    return 1.0 / (2.0 * variance)
