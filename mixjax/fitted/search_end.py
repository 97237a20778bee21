"""How a search ended and what follows from its criterion: what records of linear and of generalised models share."""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple

from mixjax.checks import ConvergenceWarning, warn


class OptimizerInfo(NamedTuple):
    """How the search ended.

    Attributes:
        name: what searched. iterations: evaluations (Newton) or steps (optax).
        gradient_norm: scaled gradient at the end, in standard errors. message: how it ended, and what to try.
    """

    name: str
    iterations: int
    gradient_norm: float
    message: str


def warn_of_convergence(formula: str, info: OptimizerInfo) -> None:
    """Warn that a fit did not converge."""
    warn(
        f"the fit of {formula!r} did not converge after {info.iterations} iterations (scaled gradient "
        f"{info.gradient_norm:.1e}): {info.message}",
        ConvergenceWarning,
    )


class FitStatistics:
    """What follows from the criterion, the number of parameters and the number of rows of a record."""

    estimates: Any
    # Tests of fixed effects have degrees of freedom.
    has_df: ClassVar[bool] = False

    def check_can(self, what: str) -> None:
        """Raise ValueError where the model cannot do ``what``, with the reason and what to do instead."""

    @property
    def npar(self) -> int:
        """Number of parameters."""
        raise NotImplementedError

    @property
    def nobs(self) -> int:
        """Number of rows."""
        raise NotImplementedError

    @property
    def loglik(self) -> float:
        """Log-likelihood, restricted after a REML fit, as in lme4."""
        return -float(self.estimates.criterion) / 2

    @property
    def aic(self) -> float:
        """Akaike's criterion."""
        return 2 * self.npar - 2 * self.loglik

    @property
    def bic(self) -> float:
        """Schwarz's criterion, with log(nobs)."""
        return math.log(self.nobs) * self.npar - 2 * self.loglik
