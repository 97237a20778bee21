"""The transform of rows after which residuals are independent and of one variance: scaled, then whitened.

A residual has standard deviation ``sigma exp(W_i gamma)`` and, within its group, the correlations of a
:class:`~mixjax.residual.correlation.Correlation`. Coordinates ``phi`` are coefficients of a basis of W, whose columns
have mean zero and are orthogonal with mean square 1, then the angle: no units, and sigma is that of a middling row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mixjax.residual.by_distance import ByDistance
from mixjax.residual.correlation import Correlation, Whitening

Factors = list[tuple[np.ndarray, np.ndarray]]


class LogDeterminant(NamedTuple):
    """``log |T|`` with gradient ``(k,)`` and Hessian ``(k, k)``."""

    value: float
    gradient: np.ndarray
    Hessian: np.ndarray


class Natural(NamedTuple):
    """Parameters as they are reported: coefficients gamma of W's own columns, then the correlation.

    Attributes:
        values: ``(k,)``. slopes: ``(k, k)`` by phi. log_sigma: what is to be added to the logarithm of sigma, so that
            it belongs to rows with ``W gamma = 0``; by_phi: ``(k,)`` its derivatives.
    """

    values: np.ndarray
    slopes: np.ndarray
    log_sigma: float
    by_phi: np.ndarray


@dataclass(frozen=True, eq=False)
class Transform:
    """The transform ``T(phi)`` of n rows.

    Attributes:
        W: ``(n, d)`` columns of the dispersion formula, none of them constant; d may be 0.
        correlation: within groups, or None.
    """

    W: np.ndarray
    correlation: Correlation | None

    @property
    def d(self) -> int:
        """Coefficients of the dispersion."""
        return int(self.W.shape[1])

    @property
    def k(self) -> int:
        """Number of coordinates."""
        return self.d + (self.correlation is not None)

    @cached_property
    def _basis(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Columns ``B (n, d)`` of mean zero, ``R_inv (d, d)`` with ``B = (W - mean) R_inv``, and the means."""
        mean = self.W.mean(0)
        if not self.d:
            return self.W, np.zeros((0, 0)), mean
        Q, R = np.linalg.qr(self.W - mean)
        root = np.sqrt(len(self.W))
        return Q * root, np.linalg.inv(R) * root, mean

    def start(self) -> np.ndarray:
        """Where a search begins: equal standard deviations, and a small correlation."""
        return np.array([0.0] * self.d + ([] if self.correlation is None else self.correlation.starts()[:1]))

    def natural(self, phi: np.ndarray) -> Natural:
        """The reported parameters at ``phi``."""
        _, R_inv, mean = self._basis
        gamma = R_inv @ phi[: self.d]
        values, slopes = np.zeros(self.k), np.zeros((self.k, self.k))
        values[: self.d], slopes[: self.d, : self.d] = gamma, R_inv
        if self.correlation is not None:
            values[-1], slopes[-1, -1] = self.correlation.rho(float(phi[-1]))
        by_phi = np.zeros(self.k)
        by_phi[: self.d] = -mean @ R_inv
        return Natural(values, slopes, float(-mean @ gamma), by_phi)

    def phi_of(self, values: np.ndarray) -> np.ndarray:
        """The coordinates of reported parameters ``(k,)``."""
        _, R_inv, _ = self._basis
        phi = np.zeros(self.k)
        if self.d:
            phi[: self.d] = np.linalg.solve(R_inv, values[: self.d])
        if self.correlation is not None:
            phi[-1] = self.correlation.angle(float(values[-1]))
        return phi

    def deviations(self, phi: np.ndarray) -> np.ndarray:
        """``(n,)`` standard deviations relative to sigma of a middling row."""
        sd: np.ndarray = np.exp(self._basis[0] @ phi[: self.d])
        return sd

    # --- rows --------------------------------------------------------------------------------------------------------

    def rows(self, phi: np.ndarray, A: np.ndarray) -> np.ndarray:
        """``T A (n, c)``."""
        scaled: np.ndarray = A / self.deviations(phi)[:, None]
        if isinstance(self.correlation, ByDistance):
            return self.correlation.whiten(float(phi[-1]), scaled)
        return scaled if self.correlation is None else self._apply(self._at(phi), 0, scaled)

    def products(self, phi: np.ndarray, A: np.ndarray) -> list[Factors]:
        """Pairs of matrices whose products ``L'R`` add up to ``A'T'T A`` and its derivatives.

        Args:
            A: ``(n, c)``.

        Returns:
            Of the product itself, of its k first derivatives, and of the second ones, of :func:`pairs`.
        """
        B, d, k = self._basis[0], self.d, self.k
        Y = A / self.deviations(phi)[:, None]
        if self.correlation is None:
            slopes = [(-2.0 * B[:, i : i + 1] * Y, Y) for i in range(d)]
            curves = [(4.0 * B[:, i : i + 1] * B[:, j : j + 1] * Y, Y) for i, j in pairs(d)]
            return [[one] for one in [(Y, Y), *slopes, *curves]]
        if isinstance(self.correlation, ByDistance):
            return self._products_by_distance(self.correlation, float(phi[-1]), Y)
        at = self._at(phi)
        scaled = [-B[:, i : i + 1] * Y for i in range(d)]
        T = self._apply(at, 0, Y)
        first = [*(self._apply(at, 0, own) for own in scaled), self._apply(at, 1, Y)]

        def second(i: int, j: int) -> np.ndarray:
            if j < d:
                return self._apply(at, 0, -B[:, j : j + 1] * scaled[i])
            return self._apply(at, 1, scaled[i]) if i < d else self._apply(at, 2, Y)

        found: list[Factors] = [[(T, T)], *([(own, T), (T, own)] for own in first)]
        for i, j in pairs(k):
            own = second(i, j)
            found.append([(own, T), (T, own), (first[i], first[j]), (first[j], first[i])])
        return found

    def _products_by_distance(self, own: ByDistance, angle: float, Y: np.ndarray) -> list[Factors]:
        """The same of ``Y'M Y``, from M and the derivatives of its inverse; rows of a group count together."""
        B, d = self._basis[0], self.d
        S = own.solve(angle, Y)
        P, P2 = own.moved(angle, 1, S), own.moved(angle, 2, S)
        scaled = [-B[:, i : i + 1] * Y for i in range(d)]
        solved = [own.solve(angle, part) for part in scaled]
        found: list[Factors] = [[(Y, S)], *([(part, S), (S, part)] for part in scaled), [(-S, P)]]
        for i, j in pairs(self.k):
            if j < d:
                twice = -B[:, j : j + 1] * scaled[i]
                found.append([(twice, S), (S, twice), (scaled[i], solved[j]), (scaled[j], solved[i])])
            elif i < d:
                found.append([(-solved[i], P), (-P, solved[i])])
            else:
                found.append([(2.0 * P, own.solve(angle, P)), (-S, P2)])
        return found

    def _at(self, phi: np.ndarray) -> Whitening:
        assert self.correlation is not None
        return self.correlation.whitening(float(phi[-1]))

    def _apply(self, whitening: Whitening, order: int, rows: np.ndarray) -> np.ndarray:
        assert self.correlation is not None
        own, other = np.asarray(whitening.own[order]), np.asarray(whitening.other[order])
        found: np.ndarray = own[..., None] * rows + other[:, None] * self.correlation.neighbours(rows)
        return found

    def logdet(self, phi: np.ndarray) -> LogDeterminant:
        """``log |T|``. Columns of the dispersion's basis have mean zero, and do not change it."""
        gradient, Hessian = np.zeros(self.k), np.zeros((self.k, self.k))
        if self.correlation is None:
            return LogDeterminant(0.0, gradient, Hessian)
        own = self.correlation
        found = own.logdet(float(phi[-1])) if isinstance(own, ByDistance) else self._at(phi).logdet
        value, gradient[-1], Hessian[-1, -1] = found
        return LogDeterminant(value, gradient, Hessian)


def pairs(k: int) -> Sequence[tuple[int, int]]:
    """``(i, j)``, i <= j, row by row."""
    return [(i, j) for i in range(k) for j in range(i, k)]
