"""Distributions of new responses whose linear predictor is normal: a family's, mixed over the predictor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import special

from mixjax.families import Family
from mixjax.machine import silently

# Trapezoidal nodes reach so many standard deviations to each side.
REACH = 8.0
# They stand as close as the distribution function is wide in eta, one over the root of the information on eta: there
# the rule is exact to 1e-9. Never fewer than the first number, never more than the second.
LEAST, MOST = 64, 4096
# Where the information is looked at, in standard deviations of the predictor.
WHERE = (-3.0, -1.5, 0.0, 1.5, 3.0)
# Numbers worked on at the same time.
CHUNK = 2**20
# Cumulative probabilities are equal up to this.
ROUNDING = 1e-11
# Logarithms of numbers end here.
FARTHEST = 700.0
# Share of predictors without a mean from which on there is no distribution.
LOST = 1e-3


class Mixture(NamedTuple):
    """Responses of m targets.

    Attributes:
        family: of a response given eta. eta, variance: ``(m,)`` of the normal predictor. size: ``(m,)`` trials, or
            None. psi: the family's parameters, each a number or ``(m,)``.
    """

    family: Family
    eta: np.ndarray
    variance: np.ndarray
    size: np.ndarray | None
    psi: Sequence[Any]

    def quantiles(self, p: float) -> np.ndarray:
        """``(m,)`` smallest responses whose cumulative probability is p; counts of families of counts. NaN where
        predictors without a mean are likely."""
        with silently():
            return self._joined([part._quantiles(p, nodes) for part, nodes in self._parts()])

    def mean_square(self, about: np.ndarray) -> np.ndarray:
        """``(m,)`` of responses about these values; of a binomial family of proportions."""
        with silently():
            found = []
            start = 0
            for part, nodes in self._parts():
                own = about[start : start + len(part.eta)]
                start += len(part.eta)
                of_family = self.family.mean(nodes.eta)
                mean = np.asarray(self.family.response_mean(of_family, part.psi))
                size = None if part.size is None else part.size[:, None]
                variance = np.asarray(self.family.variance(of_family, size, part.psi))
                variance = variance if size is None else variance / size**2
                squares = np.where(nodes.weights > 0, variance + (mean - own[:, None]) ** 2, 0.0)
                found.append((nodes.weights * squares).sum(1))
            return self._joined(found)

    # --- nodes --------------------------------------------------------------------------------------------------------

    def _parts(self) -> Iterator[tuple[Mixture, Nodes]]:
        """Some targets at a time, with as many nodes as the sharpest of all asks for."""
        n = int(np.clip(np.ceil(2.0 * REACH * self._sharpness()), LEAST, MOST))
        z = np.linspace(-REACH, REACH, n + 1)
        weights = np.exp(-0.5 * z**2)
        weights /= weights.sum()
        step = max(1, CHUNK // (n + 1))
        for i in range(0, len(self.eta), step):
            at = slice(i, i + step)
            size = None if self.size is None else self.size[at]
            psi = [own if np.ndim(own) == 0 else own[at, None] for own in self.psi]
            part = self._replace(eta=self.eta[at], variance=self.variance[at], size=size, psi=psi)
            eta = part.eta[:, None] + np.sqrt(np.maximum(part.variance, 0.0))[:, None] * z
            own = np.broadcast_to(weights, eta.shape)
            if self.family.support == "positive":
                own = np.where(np.asarray(self.family.mean(eta)) > 0, own, 0.0)
            total = own.sum(1, keepdims=True)
            yield part, Nodes(eta, np.where(total > 1.0 - LOST, own / total, np.nan))

    def _sharpness(self) -> float:
        """The standard deviation of predictors in widths of the distribution function, where it is largest."""
        family = self.family.plain
        psi = self.psi[: family.n_psi]
        if not family.has_expected:
            return 0.0
        deviation = np.sqrt(np.maximum(self.variance, 0.0))
        found = 0.0
        for z in WHERE:
            information = np.asarray(family.expected(self.eta + z * deviation, self.size, psi).w)
            found = max(found, float(np.nanmax(deviation * np.sqrt(information), initial=0.0)))
        return found

    @staticmethod
    def _joined(parts: list[np.ndarray]) -> np.ndarray:
        return np.concatenate(parts) if parts else np.zeros(0)

    # --- quantiles ----------------------------------------------------------------------------------------------------

    def _quantiles(self, p: float, nodes: Nodes) -> np.ndarray:
        size = None if self.size is None else self.size[:, None]

        def excess(y: np.ndarray) -> np.ndarray:
            below = np.asarray(self.family.cdf(y[:, None], nodes.eta, size, self.psi))
            total: np.ndarray = (nodes.weights * np.where(nodes.weights > 0, below, 0.0)).sum(1)
            return total - p

        center = np.asarray(self.family.mean(self.eta))
        if self.family.support == "trials":
            found = _whole(excess, np.ones_like(self.eta) if self.size is None else np.ceil(self.size))
        elif self.family.support == "counts":
            found = _whole(excess, _far_enough(excess, np.ceil(center) + 1.0))
        else:
            scale, back = SCALES[self.family.support]
            found = back(_root(lambda t: excess(back(t)), scale(center)))
        known = np.isfinite(nodes.weights).all(1) & np.isfinite(self.eta + self.variance)
        return np.where(known, found, np.nan)


class Nodes(NamedTuple):
    """``(m, n)`` predictors and their weights, NaN where there is no distribution."""

    eta: np.ndarray
    weights: np.ndarray


# Support -> where quantiles are searched for, and the way back.
SCALES: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any]]] = {
    "real": (lambda y: y, lambda t: t),
    "positive": (np.log, np.exp),
    "unit": (special.logit, special.expit),
}


def _far_enough(excess: Callable[[np.ndarray], np.ndarray], high: np.ndarray) -> np.ndarray:
    """Counts that are not below the quantile."""
    high = np.where(np.isfinite(high), high, 1.0)
    for _ in range(1000):
        short = excess(high) < -ROUNDING
        if not short.any():
            break
        high = np.where(short, 2.0 * high, high)
    return high


def _whole(excess: Callable[[np.ndarray], np.ndarray], high: np.ndarray) -> np.ndarray:
    """Smallest whole numbers up to ``high`` where the distribution function has reached p."""
    low = np.full_like(high, -1.0)
    for _ in range(1100):  # as many halvings as numbers have powers of two
        if not (high - low > 1.0).any():
            break
        middle = np.where(high - low > 1.0, np.floor(low + (high - low) / 2.0), high)
        reached = excess(middle) >= -ROUNDING
        low, high = np.where(reached, low, middle), np.where(reached, middle, high)
    return high


def _root(excess: Callable[[np.ndarray], np.ndarray], center: np.ndarray) -> np.ndarray:
    """Where an increasing function crosses zero, by Chandrupatla's method (1997, Adv. Eng. Softw. 28, 145)."""
    center = np.clip(np.where(np.isfinite(center), center, 0.0), -FARTHEST, FARTHEST)
    ends = []
    for sign in (-1.0, 1.0):
        width, end = 1e-2 * (1.0 + np.abs(center)), center.copy()
        for _ in range(2000):
            inside = sign * excess(end) < 0
            inside &= np.abs(end) < 1e300
            if not inside.any():
                break
            end = np.where(inside, end + sign * width, end)
            width = 2.0 * width
        ends.append(end)
    (b, a), t = ends, np.full_like(center, 0.5)
    fa, fb = excess(a), excess(b)
    best = a
    for _ in range(100):
        x = a + t * (b - a)
        f = excess(x)
        same = np.sign(f) == np.sign(fa)
        c, fc = np.where(same, a, b), np.where(same, fa, fb)
        b, fb = np.where(same, b, a), np.where(same, fb, fa)
        a, fa = x, f
        best = np.where(np.abs(fa) < np.abs(fb), a, b)
        tolerance = 1e-13 * (1.0 + np.abs(best))
        least = tolerance / np.maximum(np.abs(b - a), 1e-300)
        if ((least > 0.5) | (np.abs(f) < 1e-15) | ~np.isfinite(f)).all():
            break
        xi, phi = (a - b) / (c - b), (fa - fb) / (fc - fb)
        curved = (phi**2 < xi) & ((1.0 - phi) ** 2 < 1.0 - xi)
        inverse = fa / (fb - fa) * fc / (fb - fc) + (c - a) / (b - a) * fa / (fc - fa) * fb / (fc - fb)
        least = np.minimum(least, 0.5)
        t = np.clip(np.where(curved & np.isfinite(inverse), inverse, 0.5), least, 1.0 - least)
    return best
