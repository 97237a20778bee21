"""How well the residual standard deviation is known, for effects in its units."""

from __future__ import annotations

from mixjax.fitted.record import Fitted


def degrees_of_sigma(fitted: Fitted) -> float:
    """``1 / (2 Var(log sigma))``: n for the sigma of n independent normal variables.

    A chi-square variable over its degrees of freedom nu has variance 2 / nu, and sigma^2 is one (Satterthwaite).

    Raises:
        ValueError: the Hessian of the criterion is not positive definite.
    """
    info = fitted.information
    variance = float(info.covariance[-1, -1])
    if not info.regular or not variance > 0:
        raise ValueError(
            "the Hessian of the criterion is not positive definite at these estimates: nothing says how well sigma is "
            "known; give edf=, its degrees of freedom"
        )
    return 1.0 / (2.0 * variance)
