"""The covariances of a structure at which one natural parameter has a value, as a structure with fewer coordinates.

For structures whose parameters have no charts of their own (:mod:`mixjax.covariance.charts`). Where the value is that
of a smooth function of the coordinates, the others are steps y across its slope at an origin, and the step t along the
slope is what brings the value: ``x(y) = origin + across y + along t(y)``. First and second derivatives follow from the
implicit function theorem.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

import numpy as np

from mixjax.covariance.custom import Written
from mixjax.covariance.held import Held, with_correlation
from mixjax.covariance.natural import natural_derivatives
from mixjax.covariance.scaled import QUARTER, Angular
from mixjax.covariance.structures import HomogeneousCompoundSymmetry, NaturalParameter, Structure
from mixjax.covariance.theta import LOWEST
from mixjax.machine import Array, silently

# Fisher's z, or what else has no bounds, of a correlation where a search begins, at most.
MOST_TURNED = 5.0
# Steps by which a value is found, at first and from nearby, and how near to it they must lead; how near to the end of a
# correlation's range, where it has no slope, is looked; and from how near no start needs to be looked for.
STEPS, INNER, EXACT, BESIDE, NEAR = 60, 12, 1e-13, 1e-6, 1e-3
# Evaluations on one bent section, after which a search goes on with another through where it stands; and how often.
ON_ONE, TIMES = 6, 30
# Parameters of a structure of the user's own at which it is seen what is reported of them at last.
FAR, FARTHER = 1e3, 1e6
# Angles, by Fisher's z of their sines up to the last, none of them zero; and parts that are left of the others, among
# which a start with a given correlation is looked for.
ANGLES, LAST, PARTS = 400, 12.0, (1.0, 0.7, 0.4, 0.0)


class _Point(NamedTuple):
    """Coordinates of the whole structure ``(k, B)``, their slopes ``(k, m, B)`` by those of the section, and second
    derivatives, which have one direction: ``along (k,)`` times ``bend (m, m, B)``."""

    x: np.ndarray
    slopes: np.ndarray
    along: np.ndarray
    bend: np.ndarray


@dataclass(frozen=True, eq=False)
class Section(Structure):
    """Those covariances of a structure at which a natural parameter has a value; or with some coordinates as they are.

    By NumPy; it compares by identity, and no rank is lowered. Where it is bent, it is one near its origin only, and NaN
    elsewhere: a search goes on with another one from where it ends.

    Attributes:
        whole: the structure. origin: ``(k,)``. across: ``(k, m)``, along: ``(k,)``.
        place: the parameter's number among ``whole.natural``; None: there is no value, and nothing goes along.
        value: a standard deviation's is its square.
    """

    whole: Structure
    origin: np.ndarray
    across: np.ndarray
    along: np.ndarray
    place: int | None = None
    value: float = 0.0
    _last: list[tuple[bytes, _Point]] = field(default_factory=list, repr=False)

    @property
    def k(self) -> int:
        return int(self.across.shape[1])

    @property
    def is_bent(self) -> bool:
        return self.place is not None

    @property
    def deviations(self) -> tuple[int, ...]:
        return ()

    def factor(self, x: Array) -> Array:
        lanes = x[:, None] if x.ndim == 1 else x
        F: Array = self.whole.factor(self._at(lanes).x)
        return F[..., 0] if x.ndim == 1 else F

    def entries(self, x: Array) -> list[list[Array | None]]:
        return [list(row) for row in self.factor(x)]

    def near(self, F: Array) -> Array:
        raise NotImplementedError("a section's coordinates begin at its origin, at zero")

    def jacobian(self, x: Array) -> Array:
        at = self._at(x)
        return np.einsum("pkb,kmb->pmb", self.whole.jacobian(at.x), at.slopes)

    def curvature(self, x: Array, g: Array) -> Array:
        at = self._at(x)
        inner = np.einsum("kmb,klb,lnb->mnb", at.slopes, self.whole.curvature(at.x, g), at.slopes)
        slope = np.einsum("pb,pkb,k->b", g, self.whole.jacobian(at.x), at.along)
        curved: Array = inner + slope * at.bend
        return curved

    def _at(self, y: np.ndarray) -> _Point:
        key = y.tobytes()
        if not self._last or self._last[0][0] != key:
            self._last[:] = [(key, self._found(y))]
        return self._last[0][1]

    def _found(self, y: np.ndarray) -> _Point:
        m, B = y.shape
        x = self.origin[:, None] + self.across @ y
        if self.place is None:
            return _Point(x, np.repeat(self.across[:, :, None], B, 2), self.along, np.zeros((m, m, B)))
        with silently():
            t = self._step(x)
            x = x + self.along[:, None] * np.where(abs(t) <= np.sqrt((y * y).sum(0)), t, np.nan)
            _, first, second = natural_derivatives(self.whole, x)
            assert second is not None
            slope, curve = first[:, self.place], second[:, self.place]
            down = slope @ self.along
            tilt = -(slope @ self.across) / down[:, None]  # (B, m)
            slopes = self.across[..., None] + self.along[:, None, None] * tilt.T
            bend = -np.einsum("kmb,bkl,lnb->mnb", slopes, curve, slopes) / down
        return _Point(x, slopes, self.along, bend)

    def _step(self, x: np.ndarray) -> np.ndarray:
        """How far along the value is ``(B,)``."""
        t = np.zeros(x.shape[1])
        scale = max(1.0, abs(self.value))
        for _ in range(INNER):
            values, first, _ = natural_derivatives(self.whole, x + self.along[:, None] * t, 1)
            left = self.value - values[:, self.place]
            step = left / (first[:, self.place] @ self.along)
            if not (abs(left) > EXACT * scale).any() or not np.isfinite(step).any():
                break
            t = t + np.clip(step, -1.0, 1.0)
        return np.where(abs(left) <= 1e2 * EXACT * scale, t, np.nan)


def free(structure: Structure, R: np.ndarray, factor: np.ndarray) -> Held:
    """A term's covariance with all parameters free, for a search from a factor of it.

    Args:
        R: ``(q, q)`` from the user's effects to the basis of the products. factor: ``(q, q)``, of the user's effects.
    """
    if structure.has_charts:
        return with_correlation(structure.chart(R, factor[None], []), (-1, -1))
    return Held(structure, _begin(structure, R @ factor), np.zeros(structure.k, bool))


def without(structure: Structure, parameter: NaturalParameter, R: np.ndarray, factor: np.ndarray) -> Held:
    """The same with a standard deviation of zero; what that leaves without a meaning is held as it is."""
    x = _begin(structure, R @ factor)
    zero = list(structure.deviations) if parameter.shared else [structure.deviations[parameter.i]]
    x[zero] = 0.0
    free = np.asarray(structure.moving(x)) & ~np.isin(np.arange(structure.k), zero)
    section = Section(structure.q, structure, x, np.eye(structure.k)[:, free], np.zeros(structure.k))
    return Held(section, np.zeros(section.k), np.zeros(section.k, bool))


def at_value(
    structure: Structure, parameter: NaturalParameter, value: float, R: np.ndarray, factor: np.ndarray
) -> Held | None:
    """The same with a natural parameter at a value: a standard deviation above zero, relative to sigma, a correlation
    inside its range or at its ends, or what a structure of the user's own reports. None where no covariance of the
    structure is found that has it."""
    place, k = structure.natural.index(parameter), structure.k
    with silently():
        x = _begin(structure, R @ factor)
        if parameter.kind == "cor" and isinstance(structure, HomogeneousCompoundSymmetry):
            return _of_one_ratio(x, value, structure)
        if parameter.kind == "sd":
            value = float((R[parameter.i, parameter.i] * value) ** 2)
        others = np.arange(k) != place
        if parameter.kind != "real" and _has_its_own(structure, place):
            # As many scales as there are standard deviations stand in front of coordinates and of parameters.
            coordinate = np.sqrt(value)
            if parameter.kind == "cor":
                coordinate = _angle(structure, place, value, x)
            elif getattr(structure, "homogeneous", True):
                coordinate = x[place] * np.sqrt(value / natural_derivatives(structure, x[:, None], 1)[0][0, place])
            else:
                coordinate = np.sqrt(np.sqrt(value))
            x[place] = coordinate
            moving = others & np.asarray(structure.moving(x))
            section = Section(structure.q, structure, np.where(moving, 0.0, x), np.eye(k)[:, moving], np.zeros(k))
            return Held(section, x[moving], np.zeros(section.k, bool))
        return _across(structure, parameter, value, x)


@cache
def _has_its_own(structure: Structure, place: int) -> bool:
    """Whether a natural parameter depends on one coordinate only, that with its number."""
    x = structure.exponentials(0.4 * np.random.default_rng(1).standard_normal((structure.k, 1)))
    slope = natural_derivatives(structure, x, 1)[1][0, place]
    return bool((abs(np.delete(slope, place)) <= 1e-12 * abs(slope[place])).all())


def _across(structure: Structure, parameter: NaturalParameter, value: float, x: np.ndarray) -> Held | None:
    """The section through the nearest point to ``x`` that has the value, as is found by steps along slopes."""
    place = structure.natural.index(parameter)
    low, high = range_of(parameter, structure)
    value = float(np.clip(value, low + BESIDE, high - BESIDE))
    start: np.ndarray | None = x
    if abs(natural_derivatives(structure, x[:, None], 1)[0][0, place] - value) <= NEAR * max(1.0, abs(value)):
        pass  # as where a search goes on
    elif parameter.kind == "real":
        assert isinstance(structure, Written)
        start = _reporting(structure, parameter, value, x)
    elif parameter.kind == "cor":
        start = _correlated(structure, place, value, x)
    if start is None:
        return None
    for _ in range(STEPS):
        values, first, _ = natural_derivatives(structure, start[:, None], 1)
        slope = first[0, place]
        left = value - values[0, place]
        if abs(left) <= EXACT * max(1.0, abs(value)):
            break
        step = left * slope / (slope @ slope)
        start = start + step * min(1.0, 1.0 / np.sqrt(step @ step))
    if not abs(left) <= 1e3 * EXACT * max(1.0, abs(value)):
        return None
    across = np.linalg.qr(np.column_stack([slope, np.eye(structure.k)]))[0][:, 1:]
    along = slope / np.sqrt(slope @ slope)
    section = Section(structure.q, structure, start, across, along, place, value)
    return Held(section, np.zeros(section.k), np.zeros(section.k, bool))


def _of_one_ratio(x: np.ndarray, value: float, structure: Structure) -> Held:
    """The correlation is the ratio of both coordinates."""
    ray = np.sqrt(np.maximum([1.0 + (structure.q - 1) * value, 1.0 - value], 0.0))
    section = Section(structure.q, structure, np.zeros(2), ray[:, None], np.zeros(2))
    return Held(section, np.array([(ray @ x) / (ray @ ray)]), np.zeros(1, bool))


def range_of(parameter: NaturalParameter, structure: Structure) -> tuple[float, float]:
    """Between which ends a natural parameter lies."""
    if parameter.kind == "sd":
        return 0.0, np.inf
    if parameter.kind == "cor":
        of_all = parameter.shared and not parameter.lag
        return (-1.0 / (structure.q - 1) if of_all else -1.0), 1.0
    if not isinstance(structure, Written) or structure.own.natural is None:
        return -np.inf, np.inf
    # Where what is reported goes as the parameter itself runs away.
    x = np.zeros((structure.k, 4))
    x[parameter.i] = -FARTHER, -FAR, FAR, FARTHER
    with silently():
        ends = np.asarray(structure.reported(x)[0])[parameter.i - structure.n_scales]
        settled = [abs(ends[0] - ends[1]) < BESIDE, abs(ends[3] - ends[2]) < BESIDE]
    found = sorted([(float(ends[0]), settled[0]), (float(ends[3]), settled[1])])
    (low, ends_low), (high, ends_high) = found
    return (low if ends_low else -np.inf), (high if ends_high else np.inf)


def _begin(structure: Structure, F: np.ndarray) -> np.ndarray:
    """Coordinates ``(k,)`` near a covariance ``F F'`` at which a search may begin: no bound, which is stationary."""
    with silently():
        x = np.array(structure.near(F))
        z = np.array(structure.logarithms(x))
    at = np.isin(np.arange(structure.k), structure.deviations)
    z[at] = np.maximum(z[at], np.log(LOWEST))
    if isinstance(structure, Angular):
        z[~at] = np.clip(z[~at], -MOST_TURNED, MOST_TURNED)
    moved: np.ndarray = np.array(structure.exponentials(z))
    return moved


def _angle(structure: Structure, place: int, value: float, x: np.ndarray) -> float:
    """The angle on which alone a correlation depends, at the value; at the ends of its range a quarter turn or none."""
    angles = np.concatenate([[-QUARTER, 0.0, QUARTER], np.arcsin(np.tanh(np.linspace(-LAST, LAST, ANGLES)))])
    lanes = np.repeat(x[:, None], len(angles), 1)
    lanes[place] = angles
    away = abs(natural_derivatives(structure, lanes, 1)[0][:, place] - value)
    if away[:3].min() <= 4 * np.finfo(float).eps:
        return float(angles[:3][away[:3].argmin()])
    x = lanes[:, [int(away.argmin())]]
    for _ in range(STEPS):
        values, first, _ = natural_derivatives(structure, x, 1)
        step = (value - values[0, place]) / first[0, place, place]
        x[place] += step
        if abs(step) <= 4 * np.finfo(float).eps:
            break
    return float(x[place, 0])


def _correlated(structure: Structure, place: int, value: float, x: np.ndarray) -> np.ndarray | None:
    """Coordinates with nearly that correlation, others as they are, or nearer to zero where that cannot be."""
    assert isinstance(structure, Angular)
    for part in PARTS:
        lanes = np.repeat(x[:, None], ANGLES, 1)
        lanes[structure.n_scales :] *= part
        lanes[place] = np.arcsin(np.tanh(np.linspace(-LAST, LAST, ANGLES)))
        values = natural_derivatives(structure, lanes, 1)[0][:, place]
        if values.min() <= value <= values.max():
            return lanes[:, int(abs(values - value).argmin())]
    return None


def _reporting(structure: Written, parameter: NaturalParameter, value: float, x: np.ndarray) -> np.ndarray | None:
    own = slice(structure.n_scales, structure.k)
    reported = np.array(structure.reported(x)[0])
    reported[parameter.i - structure.n_scales] = value
    try:
        p = structure.parameters_of(reported, x[own])
    except ValueError:
        return None
    return np.concatenate([x[: structure.n_scales], p])
