"""Data sets for models with parameters beside covariances and sigma: as replicates are drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixjax.estimation.choice import EngineName
from mixjax.estimation.estimate import Estimates
from mixjax.fitted.further import FurtherFitted


@dataclass(frozen=True)
class FurtherResponses:
    """Many responses ``Y (B, nobs)`` of the rows of a fit."""

    fitted: FurtherFitted
    Y: np.ndarray

    def fits(self, n: int, keep: Sequence[str], engine: EngineName) -> Estimates:
        """Estimates of all, by the criterion of the fit."""
        return self.fitted.fit_many(self.Y, tuple(keep), None, engine)
