"""A term's covariance with one of its parameters held at a value, as a structure with fewer coordinates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mixjax.covariance.charts import TermChart
from mixjax.covariance.structures import Structure
from mixjax.covariance.theta import pairs_of
from mixjax.machine import Array


@dataclass(frozen=True, eq=False)
class HeldStructure(Structure):
    """Covariances ``F F'`` whose factor is affine in the coordinates, ``F = constant + sum_j x_j maps_j``. By NumPy; it
    compares by identity, and no rank is lowered.

    Attributes:
        constant: ``(q, q)``. maps: ``(k, q, q)``.
    """

    constant: np.ndarray
    maps: np.ndarray

    @property
    def k(self) -> int:
        return len(self.maps)

    @property
    def deviations(self) -> tuple[int, ...]:
        return ()

    def factor(self, x: Array) -> Array:
        lanes = (None,) * (np.ndim(x) - 1)
        F: Array = self.constant[(..., *lanes)] + np.tensordot(self.maps, x, (0, 0))
        return F

    def entries(self, x: Array) -> list[list[Array | None]]:
        return [list(row) for row in self.factor(x)]

    def near(self, F: Array) -> Array:
        raise NotImplementedError("a held structure has coordinates of a chart, which know where they start")

    def jacobian(self, x: Array) -> Array:
        F = self.factor(x)
        slopes = [np.tensordot(self.maps[:, a], F[b], (1, 0)) + np.tensordot(self.maps[:, b], F[a], (1, 0))
                  for a, b in pairs_of(self.q)]  # fmt: skip
        return np.stack(slopes)

    def curvature(self, x: Array, g: Array) -> Array:
        products = np.einsum("iac,jbc->abij", self.maps, self.maps)
        forms = np.stack([products[a, b] + products[a, b].T for a, b in pairs_of(self.q)])
        return np.tensordot(forms, g, (0, 0))


class Held(NamedTuple):
    """A structure, where its search starts ``(k,)``, and which of its coordinates ``(k,)`` must stay positive."""

    structure: Structure
    start: np.ndarray
    positive: np.ndarray


def with_deviation(chart: TermChart, R_inv: np.ndarray, effect: int, value: float) -> Held:
    """One effect's standard deviation at a value, of a chart in which it stands first.

    Args:
        chart: of one problem. R_inv: ``(q, q)`` from the basis of the chart to the user's effects.
    """
    M, z, free = chart.maps[0], chart.start[0], chart.free[0].copy()
    length = np.sqrt(((R_inv[effect] @ M[..., chart.held]) ** 2).sum())
    free[chart.held] = False
    if value == 0:
        free &= ~chart.vanishing
    return _held(M[..., chart.held] * (value / length), M, z, free, np.zeros(len(z), bool))


def with_correlation(chart: TermChart, positions: tuple[int, int]) -> Held:
    """Of a chart that has the correlation of its first two effects in its maps.

    Args:
        positions: of the coordinates that would change its sign by changing theirs.
    """
    M, z = chart.maps[0], chart.start[0]
    return _held(np.zeros(M.shape[:2]), M, z, chart.free[0], np.isin(np.arange(len(z)), positions))


def _held(constant: np.ndarray, M: np.ndarray, z: np.ndarray, free: np.ndarray, positive: np.ndarray) -> Held:
    structure = HeldStructure(len(constant), constant, np.moveaxis(M[..., free], -1, 0))
    return Held(structure, z[free], positive[free])
