"""Correlations of the residuals of one group by the distance of their places: a kernel, without a nugget.

Unlike the others (:mod:`mixjax.residual.correlation`) these are dense in a group: rows are whitened by the inverse of a
Cholesky factor, and products of rows come from the inverse ``M`` of the correlations ``K``, whose derivatives are
``-M dK M`` and ``2 M dK M dK M - M d2K M``; no factor is differentiated.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import ClassVar, NamedTuple

import numpy as np

from mixjax.kernels import Bounds, Kernel, distances, extremes
from mixjax.residual.correlation import Correlation, Series, Whitening

# Where searches begin: between the least and the largest distance, on the scale of logarithms.
STARTS = (0.25, 0.75)


class _Blocks(NamedTuple):
    """Groups of one size, c of m rows: their rows ``(c, m)`` and the distances of these ``(c, m, m)``."""

    rows: np.ndarray
    apart: np.ndarray


class _Inverses(NamedTuple):
    """Of every size of groups: ``L`` with ``L L' = K``, ``M = K^{-1}``, and the derivatives of K by the angle."""

    L: list[np.ndarray]
    M: list[np.ndarray]
    slopes: list[np.ndarray]
    curves: list[np.ndarray]


@dataclass(frozen=True, eq=False)
class ByDistance(Correlation):
    """A kernel of one parameter, its range, between bounds (:class:`mixjax.kernels.Bounds`).

    Attributes:
        kernel: whose smoothness is held. group: ``(n,)``. coordinates: ``(n, d)``, no two alike in a group.
    """

    label: ClassVar[str] = "range"
    kind: ClassVar[str] = "positive"

    kernel: Kernel
    group: np.ndarray
    coordinates: np.ndarray

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.kernel.name

    @cached_property
    def _log_extremes(self) -> tuple[float, float]:
        least, largest = extremes(self.coordinates, self.group)
        return float(np.log(least)), float(np.log(largest))

    @cached_property
    def _bounds(self) -> Bounds:
        least, largest = np.exp(self._log_extremes)
        return Bounds.of(self.kernel, float(least), float(largest))

    @cached_property
    def _blocks(self) -> list[_Blocks]:
        order = np.argsort(self.group, kind="stable")
        counts = np.bincount(self.group)
        starts = np.cumsum(counts) - counts
        found = []
        for m in np.unique(counts[counts > 0]):
            rows = order[starts[counts == m][:, None] + np.arange(m)]
            at = self.coordinates[rows]
            found.append(_Blocks(rows, distances(at, at)))
        return found

    @cached_property
    def _at(self):  # type: ignore[no-untyped-def]
        @lru_cache(maxsize=2)  # of one angle much is asked
        def at(angle: float) -> _Inverses:
            (range_,), (first,), (second,) = self._bounds.at(np.array([angle]))
            found = _Inverses([], [], [], [])
            for block in self._blocks:
                value, slopes, curves = self.kernel.curves(block.apart, [range_])
                L = np.linalg.cholesky(value)
                inverse = np.linalg.inv(L)
                found.L.append(L)
                found.M.append(inverse.swapaxes(1, 2) @ inverse)
                found.slopes.append(first * slopes[0])
                found.curves.append(first**2 * curves[0, 0] + second * slopes[0])
            return found

        return at

    def solve(self, angle: float, rows: np.ndarray) -> np.ndarray:
        """``K^{-1} rows``, of ``(n, c)``."""
        return self._times(self._at(angle).M, rows)

    def moved(self, angle: float, order: int, rows: np.ndarray) -> np.ndarray:
        """Derivative of K by the angle, the first or the second, times ``rows (n, c)``."""
        at = self._at(angle)
        return self._times(at.slopes if order == 1 else at.curves, rows)

    def whiten(self, angle: float, rows: np.ndarray) -> np.ndarray:
        """``L^{-1} rows``."""
        out = np.empty(rows.shape)
        for block, L in zip(self._blocks, self._at(angle).L, strict=True):
            out[block.rows] = np.linalg.solve(L, rows[block.rows])
        return out

    def _times(self, matrices: list[np.ndarray], rows: np.ndarray) -> np.ndarray:
        out = np.empty(rows.shape)
        for block, matrix in zip(self._blocks, matrices, strict=True):
            out[block.rows] = matrix @ rows[block.rows]
        return out

    def logdet(self, angle: float) -> Series:
        """``log |K^{-1/2}|`` with its derivatives by the angle."""
        at = self._at(angle)
        value = slope = curve = 0.0
        for L, M, K1, K2 in zip(*at, strict=True):
            MK = M @ K1
            value -= float(np.log(np.diagonal(L, axis1=1, axis2=2)).sum())
            slope -= 0.5 * float(np.einsum("caa->", MK))
            curve -= 0.5 * float(np.einsum("cab,cab->", M, K2) - np.einsum("cab,cba->", MK, MK))
        return Series(value, slope, curve)

    # --- what a correlation is asked

    def whitening(self, angle: float) -> Whitening:
        raise TypeError("correlations by distance are not whitened by a row and its neighbour")

    def neighbours(self, rows: np.ndarray) -> np.ndarray:
        raise TypeError("correlations by distance are not whitened by a row and its neighbour")

    def rho(self, angle: float) -> tuple[float, float]:
        value, first, _ = self._bounds.at(np.array([angle]))
        return float(value[0]), float(value[0] * first[0])

    def angle(self, rho: float) -> float:
        return float(self._bounds.angles(np.array([rho]))[0])

    def starts(self) -> list[float]:
        low, high = self._log_extremes
        return [self.angle(float(np.exp(low + part * (high - low)))) for part in STARTS]

    @property
    def least(self) -> float | None:
        return None

    def matrix(self, rho: float, rows: np.ndarray) -> np.ndarray:
        at, group = self.coordinates[rows], self.group[rows]
        return np.where(group[:, None] == group, self.kernel(distances(at, at), [rho]), 0.0)

    def colour(self, rho: float, draws: np.ndarray) -> np.ndarray:
        out = np.empty(draws.shape)
        for block in self._blocks:
            out[block.rows] = np.linalg.cholesky(self.kernel(block.apart, [rho])) @ draws[block.rows]
        return out
