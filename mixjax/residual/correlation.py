"""Correlations of the residuals of one group, by one parameter: AR(1), CAR(1), compound symmetry.

A correlation is a function of an angle's sine: every real angle is allowed, and a bound is a stationary
point at a finite place. A structure knows how rows are whitened. Row i becomes ``u_i y_i - v_i y_(i-1)``: of AR(1) and
CAR(1) with c the correlation of neighbours ``u = 1 / sqrt(1 - c^2)`` and ``v = c u``, and ``u = 1``, ``v = 0`` for the
first of a group; or ``a y_i + b sum(y)`` of compound symmetry, where every power of the correlation matrix has this
form.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import numpy as np
import scipy.sparse

# Where searches begin: correlations of the nearest rows. Random effects can stand for a large one, so there are two.
STARTS = (0.2, 0.8)


class Series(NamedTuple):
    """A function of the angle with its first two derivatives."""

    value: Any
    slope: Any
    curve: Any


class Whitening(NamedTuple):
    """What whitens the rows, at an angle.

    Attributes:
        own: ``(n,)`` or ``()``, the factor of a row itself. other: ``(n,)``, of the row before, or of the group's sum.
        logdet: ``()``, of the whole transform.
    """

    own: Series
    other: Series
    logdet: Series


class Correlation(ABC):
    """Correlation of the residuals within groups, as a function of one angle.

    Args:
        group: ``(n,)`` codes ``0 .. m - 1``. time: ``(n,)`` of the rows, all different within a group; None where the
            order does not matter.
    """

    name: ClassVar[str]
    # Kinds of the parameter: see VarianceParameters.
    label: ClassVar[str] = "rho"
    kind: ClassVar[str] = "cor"

    @abstractmethod
    def whitening(self, angle: float) -> Whitening:
        """The transform and its derivatives by the angle."""

    @abstractmethod
    def neighbours(self, rows: np.ndarray) -> np.ndarray:
        """``(n, c) -> (n, c)``: the row before, zero for the first of a group; or the sum of the group."""

    @abstractmethod
    def rho(self, angle: float) -> tuple[float, float]:
        """The parameter as it is reported, and its derivative by the angle."""

    @abstractmethod
    def angle(self, rho: float) -> float:
        """The angle of a parameter, between its bounds."""

    @abstractmethod
    def matrix(self, rho: float, rows: np.ndarray) -> np.ndarray:
        """Correlations ``(r, r)`` of some rows."""

    def starts(self) -> list[float]:
        """Angles where searches begin. Never a correlation per unit of time: of times in days that are a year apart it
        would be zero at every distance, with no slope to leave it by."""
        return [self.angle(rho) for rho in STARTS]

    @property
    def shortest(self) -> float:
        """The shortest distance of two rows of a group in time; 1 where there is no time."""
        return 1.0

    @property
    @abstractmethod
    def least(self) -> float | None:
        """Bound from below of the correlation at the shortest distance, which says all others; None where a negative
        one is a branch of its own."""

    def near_bound(self, angle: float) -> float | None:
        """The angle at which the parameter has a bound that a fit may end on, if ``angle`` is near; or None."""
        return None

    def colour(self, rho: float, draws: np.ndarray) -> np.ndarray:
        """Independent ``(n, c)`` -> correlated: the inverse of the whitening."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class _Serial(Correlation):
    """Correlations that fall with distance in time: ``c_i`` of neighbours, products of these of others.

    Attributes:
        group: ``(n,)``. time: ``(n,)`` floats. before: ``(n,)`` the row before in the group, or -1. gap: ``(n,)`` the
            distance to it, 1 where there is none.
    """

    group: np.ndarray
    time: np.ndarray
    before: np.ndarray
    gap: np.ndarray

    @classmethod
    def of(cls, group: np.ndarray, time: np.ndarray) -> _Serial:
        """From the group and the time of every row."""
        order = np.lexsort((time, group))
        same = group[order[1:]] == group[order[:-1]]
        before, gap = np.full(len(group), -1), np.ones(len(group))
        before[order[1:][same]] = order[:-1][same]
        gap[order[1:][same]] = (time[order[1:]] - time[order[:-1]])[same]
        return cls(group, np.asarray(time, np.float64), before, gap)

    @abstractmethod
    def _correlations(self, angle: float) -> Series:
        """Of every row with the one before, ``(n,)``; and ``1 - c^2`` by :meth:`_left`."""

    @abstractmethod
    def _left(self, angle: float) -> np.ndarray:
        """``1 - c^2 (n,)``, with its digits near a bound."""

    def whitening(self, angle: float) -> Whitening:
        c, dc, d2c = self._correlations(angle)
        later = self.before >= 0
        with np.errstate(all="ignore"):
            u = 1.0 / np.sqrt(self._left(angle))
            u1, u2 = c * u**3, u**3 + 3.0 * c * c * u**5  # by c
            v1, v2 = u**3, 3.0 * c * u**5
            own = Series(u, u1 * dc, u2 * dc * dc + u1 * d2c)
            other = Series(-c * u, -v1 * dc, -(v2 * dc * dc + v1 * d2c))
            logs = np.log(u), own.slope / u, own.curve / u - (own.slope / u) ** 2
        own = Series(*(np.where(later, part, first) for part, first in zip(own, (1.0, 0.0, 0.0), strict=True)))
        other = Series(*(np.where(later, part, 0.0) for part in other))
        return Whitening(own, other, Series(*(float(part[later].sum()) for part in logs)))

    def neighbours(self, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = rows[np.maximum(self.before, 0)]
        return found

    @cached_property
    def _shortest(self) -> float:
        return float(self.gap[self.before >= 0].min(initial=np.inf))

    @property
    def shortest(self) -> float:
        return self._shortest

    def _by_shortest(self, angle: float) -> Series:
        """Correlations of which that at the shortest distance is the square of the sine."""
        s, cos, g = abs(np.sin(angle)), np.cos(angle) * np.sign(np.sin(angle)), 2.0 * self.gap / self._shortest
        c = s**g
        with np.errstate(divide="ignore", invalid="ignore"):
            low = np.where(g > 2.0, g * (g - 1.0) * s ** np.maximum(g - 2.0, 0.0), g * (g - 1.0))
        # g is 2 or more where there is a row before.
        return Series(c, g * s ** np.maximum(g - 1.0, 0.0) * cos, low * np.cos(angle) ** 2 - g * c)

    def _power(self, rho: float, distance: np.ndarray) -> np.ndarray:
        raise NotImplementedError

    def matrix(self, rho: float, rows: np.ndarray) -> np.ndarray:
        time, group = self.time[rows], self.group[rows]
        found: np.ndarray = np.where(group[:, None] == group, self._power(rho, np.abs(time[:, None] - time)), 0.0)
        return found

    def colour(self, rho: float, draws: np.ndarray) -> np.ndarray:
        c = np.where(self.before >= 0, self._power(rho, self.gap), 0.0)
        root, out = np.sqrt(np.maximum(1.0 - c * c, 0.0)), np.array(draws)
        # One step of all groups at a time: as many steps as the longest group has rows.
        depth = np.zeros(len(c), int)
        for i in np.lexsort((self.time, self.group)):
            depth[i] = 0 if self.before[i] < 0 else depth[self.before[i]] + 1
        for d in range(1, depth.max(initial=0) + 1):
            at = np.flatnonzero(depth == d)
            out[at] = c[at, None] * out[self.before[at]] + root[at, None] * draws[at]
        return out


@dataclass(frozen=True, eq=False)
class AR1(_Serial):
    """``rho ** distance`` in whole steps of time, ``-1 < rho < 1``.

    The sine of the angle is the correlation at the shortest distance, so that a unit of time that is a thousand times
    smaller changes nothing. That can have either sign, and all others are whole powers of it, where the shortest
    distance divides all others and is odd. Elsewhere no correlation is a stationary point: even distances make all
    correlations positive, or, as with distances 2 and 3, a negative rho is a branch of its own. Then the correlation at
    the shortest distance is the square of the sine, as in :class:`CAR1`, and the sign of the sine that of rho.
    """

    name = "ar1"

    @cached_property
    def _unit(self) -> int:
        """What divides all distances."""
        return int(np.gcd.reduce(np.round(self.gap[self.before >= 0]).astype(np.int64), initial=0)) or 1

    @cached_property
    def _steps(self) -> np.ndarray:
        steps: np.ndarray = np.where(self.before >= 0, np.round(self.gap).astype(np.int64) // self._unit, 1)
        return steps

    @property
    def _has_signs(self) -> bool:
        """A negative rho is another model than its absolute value."""
        return self._unit % 2 == 1

    @property
    def _is_power(self) -> bool:
        """All correlations are whole powers of the one at the shortest distance, which may be negative."""
        return self._has_signs and self._shortest <= self._unit

    @property
    def least(self) -> float | None:
        return -1.0 if self._is_power else None if self._has_signs else 0.0

    def _correlations(self, angle: float) -> Series:
        s, cos, g = np.sin(angle), np.cos(angle), self._steps
        if not self._is_power:
            own = self._by_shortest(angle)
            return Series(*(np.where(g % 2 == 1, -part, part) for part in own)) if self._has_signs and s < 0 else own
        low = np.where(g >= 2, g * (g - 1) * np.power(s, np.maximum(g - 2, 0)), 0.0)
        c = np.power(s, g)
        return Series(c, g * np.power(s, g - 1) * cos, low * cos * cos - g * c)

    def _left(self, angle: float) -> np.ndarray:
        power = self._steps if self._is_power else 2.0 * self.gap / self._shortest
        with np.errstate(divide="ignore"):
            left: np.ndarray = -np.expm1(power * np.log1p(-(np.cos(angle) ** 2)))
        return left

    @property
    def _root(self) -> float:
        """rho is the sine to this power."""
        return 1.0 / self._unit if self._is_power else 2.0 / self._shortest

    def rho(self, angle: float) -> tuple[float, float]:
        s, power = float(np.sin(angle)), self._root
        if self._is_power and power == 1.0:
            return s, float(np.cos(angle))
        if s == 0:
            return 0.0, 0.0
        sign = np.sign(s) if self._has_signs else 1.0
        slope = power * abs(s) ** (power - 1.0) * np.cos(angle) * np.sign(s)
        return float(sign * abs(s) ** power), float(sign * slope)

    def angle(self, rho: float) -> float:
        sign = np.sign(rho) if self._has_signs else 1.0
        return float(sign * np.arcsin(abs(rho) ** (1.0 / self._root)))

    def starts(self) -> list[float]:
        if self._is_power:
            return [float(np.arcsin(c)) for c in STARTS]
        angles = [float(np.arcsin(np.sqrt(c))) for c in STARTS]
        return angles + [-angle for angle in angles if self._has_signs]

    def near_bound(self, angle: float) -> float | None:
        return None if self._is_power or abs(np.sin(angle)) >= 0.1 else 0.0

    def _power(self, rho: float, distance: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.power(rho, np.round(distance).astype(np.int64))
        return found


@dataclass(frozen=True, eq=False)
class CAR1(_Serial):
    """``rho ** distance`` at any times, ``0 <= rho < 1``. The correlation at the shortest distance is the square of the
    sine of the angle, so that ``rho = 0``, no correlation, is a stationary point."""

    name = "car1"

    @property
    def least(self) -> float | None:
        return 0.0

    def _correlations(self, angle: float) -> Series:
        return self._by_shortest(angle)

    def _left(self, angle: float) -> np.ndarray:
        with np.errstate(divide="ignore"):
            left: np.ndarray = -np.expm1(2.0 * self.gap / self._shortest * np.log1p(-(np.cos(angle) ** 2)))
        return left

    def rho(self, angle: float) -> tuple[float, float]:
        power, s = 2.0 / self._shortest, abs(float(np.sin(angle)))
        if s == 0:
            return 0.0, 0.0
        slope = power * s ** (power - 1.0) * np.cos(angle) * np.sign(np.sin(angle))
        return s**power, float(slope)

    def angle(self, rho: float) -> float:
        return float(np.arcsin(rho ** (self._shortest / 2.0)))

    def starts(self) -> list[float]:
        return [float(np.arcsin(np.sqrt(c))) for c in STARTS]

    def near_bound(self, angle: float) -> float | None:
        return 0.0 if abs(np.sin(angle)) < 0.1 else None

    def _power(self, rho: float, distance: np.ndarray) -> np.ndarray:
        found: np.ndarray = np.power(rho, distance)
        return found


@dataclass(frozen=True, eq=False)
class CompoundSymmetry(Correlation):
    """One correlation of all rows of a group, above ``-1 / (m - 1)`` with m the rows of the largest.

    Attributes:
        group: ``(n,)``. counts: ``(groups,)`` rows of each. sums: sparse ``(groups, n)``.
    """

    name = "cs"

    group: np.ndarray
    counts: np.ndarray
    sums: Any

    @classmethod
    def of(cls, group: np.ndarray) -> CompoundSymmetry:
        """From the group of every row."""
        counts = np.bincount(group)
        ones = np.ones(len(group))
        sums = scipy.sparse.csr_array((ones, (group, np.arange(len(group)))), shape=(len(counts), len(group)))
        return cls(group, counts, sums)

    @property
    def least(self) -> float | None:
        return float(-1.0 / (self.counts.max() - 1.0))

    @property
    def _range(self) -> tuple[float, float]:
        """Middle and half the length of the interval."""
        least = -1.0 / (self.counts.max() - 1.0)
        return (1.0 + least) / 2.0, (1.0 - least) / 2.0

    def whitening(self, angle: float) -> Whitening:
        rho, slope = self.rho(angle)
        curve = -self._range[1] * np.sin(angle)
        m = self.counts - 1.0
        with np.errstate(all="ignore"):
            # Roots of the inverse eigenvalues: of differences within a group, and of its sum.
            a, s = np.float64(1.0 - rho), 1.0 + m * rho
            within = _by_angle(a**-0.5, 0.5 * a**-1.5, 0.75 * a**-2.5, slope, curve)
            whole = _by_angle(s**-0.5, -0.5 * m * s**-1.5, 0.75 * m * m * s**-2.5, slope, curve)
            logs = (
                Series(-0.5 * np.log(a), 0.5 / a, 0.5 / a**2),
                Series(-0.5 * np.log(s), -0.5 * m / s, 0.5 * (m / s) ** 2),
            )
            total = [float((m * w + x).sum()) for w, x in zip(*logs, strict=True)]
        other = Series(*(((x - w) / self.counts)[self.group] for w, x in zip(within, whole, strict=True)))
        return Whitening(within, other, _by_angle(total[0], total[1], total[2], slope, curve))

    def neighbours(self, rows: np.ndarray) -> np.ndarray:
        found: np.ndarray = (self.sums @ rows)[self.group]
        return found

    def rho(self, angle: float) -> tuple[float, float]:
        middle, half = self._range
        return float(middle + half * np.sin(angle)), float(half * np.cos(angle))

    def angle(self, rho: float) -> float:
        middle, half = self._range
        return float(np.arcsin((rho - middle) / half))

    def matrix(self, rho: float, rows: np.ndarray) -> np.ndarray:
        group = self.group[rows]
        found: np.ndarray = np.where(group[:, None] == group, rho, 0.0)
        found[np.arange(len(rows)), np.arange(len(rows))] = 1.0
        return found

    def colour(self, rho: float, draws: np.ndarray) -> np.ndarray:
        a, s = np.sqrt(1.0 - rho), np.sqrt(np.maximum(1.0 + (self.counts - 1.0) * rho, 0.0))
        found: np.ndarray = a * draws + ((s - a) / self.counts)[self.group][:, None] * self.neighbours(draws)
        return found


def _by_angle(value: Any, first: Any, second: Any, slope: Any, curve: Any) -> Series:
    """From derivatives by the correlation to those by the angle."""
    return Series(value, first * slope, second * slope * slope + first * curve)
