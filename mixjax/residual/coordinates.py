"""The coordinates of residuals as the search sees them: beside those of random effects, with bounds of their own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from mixjax.covariance import Structure
from mixjax.residual.transform import Transform


@dataclass(frozen=True)
class Coordinates(Structure):
    """k coordinates that belong to no random effect, so q is 0. A correlation of 0 is tried where it is a bound.

    Attributes:
        transform: whose coordinates they are.
    """

    transform: Transform = field(repr=False)

    @property
    def k(self) -> int:
        return self.transform.k

    @property
    def deviations(self) -> tuple[int, ...]:
        return ()

    @property
    def n_reductions(self) -> int:
        correlation = self.transform.correlation
        return int(correlation is not None and correlation.near_bound(0.0) is not None)

    def entries(self, x: Any) -> list[list[Any]]:
        return []

    def near(self, F: Any) -> Any:
        return self.transform.start()

    def sizes(self, x: Any) -> Any:
        if not self.n_reductions:
            return np.zeros((0, x.shape[1]))
        # The correlation at the shortest distance is the square of the sine.
        return np.sin(x[-1:]) ** 2

    def reduced(self, x: Any, c: Any) -> tuple[Any, Any]:
        x = np.array(x)
        if self.n_reductions:
            x[-1] = np.where(c == 0, 0.0, x[-1])
        free = np.ones(x.shape, bool)
        if self.n_reductions:
            free[-1] = x[-1] != 0
        return x, free
