"""The curve of one parameter's profile: points, and where to look for others."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from scipy.interpolate import PchipInterpolator

from mixjax.covariance.sections import range_of
from mixjax.fitted.names import VarianceParameter
from mixjax.inference.random.held_parameter import Held

# A bracket of this relative width, beyond which searches fail, is not made narrower.
NARROW = 1e-3


def curve_of(parameter: VarianceParameter, estimate: float, se: float, unit: float) -> Curve:
    """The curve of a parameter of a random term.

    Args:
        se: NaN where it is not known. unit: a standard deviation that would be one in the basis of the term.
    """
    natural, structure, known = parameter.natural, parameter.structure, np.isfinite(se)
    low, high = ends = range_of(natural, structure)
    step = se if known else 0.1 * unit
    sds = [other for other in structure.natural if other.kind == "sd"]
    own: tuple[int, ...] = ()
    if natural.kind != "sd" and len(sds) == 1:  # all effects share it
        own = (sds[0].i,)
    elif natural.kind == "cor":
        estimate = float(np.clip(estimate, low, high))
        own = (natural.i, natural.j) if structure.has_charts else ()
    looks = natural.kind == "cor" and structure.has_charts
    held = Held(natural.kind, parameter.term, natural.i, natural.j)
    return Curve(parameter.name, held, estimate, low, high, step, own, ends, looks)


@dataclass(eq=False)
class Curve:
    """The curve of one parameter: values, ascending, and zeta there.

    Attributes:
        held: the parameter. low, high: its bounds, or where nobody looks any further. step: a first distance from the
            estimate, about one standard error.
        conditional: the estimates of all parameters at every value.
        without_meaning: effects of its term, without whose variance, of any of them, the parameter may be anything.
        ends: of the parameter's range itself. looks_at_ends: these are worth a search before there is need of them, and
            searches do not fail.
    """

    name: str
    held: Held
    estimate: float
    low: float
    high: float
    step: float
    without_meaning: tuple[int, ...] = ()
    ends: tuple[float, float] = (-np.inf, np.inf)
    looks_at_ends: bool = False
    values: list[float] = field(default_factory=list)
    zetas: list[float] = field(default_factory=list)
    conditional: list[np.ndarray] = field(default_factory=list)
    # Per target: how near the last guess came, and whether it was a halving.
    _before: dict[float, tuple[float, bool]] = field(default_factory=dict)

    def add(self, value: float, zeta: float, conditional: np.ndarray) -> None:
        at = int(np.searchsorted(self.values, value))
        if at < len(self.values) and self.values[at] == value:
            return
        self.values.insert(at, value)
        self.zetas.insert(at, zeta)
        self.conditional.insert(at, conditional)

    def guess(self, target: float) -> float | None:
        """Where zeta may be ``target``; None where the parameter's range ends before that."""
        v, z = np.array(self.values), np.array(self.zetas)
        side = 1.0 if target > 0 else -1.0
        beyond = np.flatnonzero(side * (z - target) >= 0)
        if not len(beyond):
            last = v[-1] if side > 0 else v[0]
            bound = self.high if side > 0 else self.low
            if last == bound:
                return None
            return float(np.clip(self._further(last, side), self.low, self.high))
        hi = beyond[0] if side > 0 else beyond[-1]
        lo = hi - 1 if side > 0 else hi + 1
        a, b = v[lo], v[hi]
        near = slice(max(0, min(lo, hi) - 1), max(lo, hi) + 2)
        middle = 0.5 * (a + b)
        if not np.isfinite(z[hi]) and abs(b - a) <= NARROW * max(abs(a), abs(b)):
            return None  # beyond here nothing was found
        # Where zeta is almost level, as beside the end of a correlation's range, interpolation creeps up from one end
        # of the bracket: halve it whenever a step has not paid, and interpolate again after that.
        error = self.error(target)
        last, halved = self._before.get(target, (np.inf, False))
        halves = error > 0.25 * last and not halved
        inside = None
        if not halves and np.isfinite(z[near]).all() and (np.diff(z[near]) > 0).all():
            inside = float(PchipInterpolator(z[near], v[near])(target))
            if not min(a, b) < inside < max(a, b):
                inside = None
        self._before[target] = (error, inside is None)
        return middle if inside is None else inside

    def _further(self, last: float, side: float) -> float:
        if self.held.kind in ("sd", "sigma", "positive") and self.estimate > 0:
            ratio = max(1.3, min(3.0, 1.0 + 2.5 * self.step / self.estimate))
            return last * ratio if side > 0 else last / ratio
        distance = max(abs(last - self.estimate), self.step)
        return last + side * distance * 1.5

    def error(self, target: float) -> float:
        return min(abs(z - target) for z in self.zetas)

    def at(self, target: float) -> float:
        return self.values[int(np.argmin([abs(z - target) for z in self.zetas]))]
