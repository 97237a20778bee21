"""Data sets for models whose residuals have parameters beside sigma: as replicates are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixjax.estimation.choice import EngineName
from mixjax.estimation.estimate import Estimates
from mixjax.fitted.residual import ResidualFitted


@dataclass(frozen=True)
class ResidualResponses:
    """Many responses ``Y (B, nobs)`` of the rows of a fit."""

    fitted: ResidualFitted
    Y: np.ndarray

    def fits(self, n: int, keep: Sequence[str], engine: EngineName) -> Estimates:
        """Estimates of all, by the criterion of the fit."""
        return self.fitted.fit_many(self.Y, tuple(keep), None, engine)
