"""Correlations beside standard deviations: compound symmetry, autoregression, Toeplitz, ante-dependence."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import Any

import numpy as np

from mixjax.covariance.jets import Ring
from mixjax.covariance.scaled import QUARTER, Angular, sine_cosine
from mixjax.covariance.structures import NaturalParameter
from mixjax.covariance.theta import pairs_of, rank_tolerance
from mixjax.machine import Array, namespace


def _sum_where(values: list[Array], there: list[Array]) -> tuple[Array, Array]:
    """Sum ``(...)`` of the values that are there, and how many are."""
    xp = namespace(*values)
    count = reduce(add, [one * 1.0 for one in there])
    return reduce(add, [xp.where(one, value, 0.0) for value, one in zip(values, there, strict=True)]), count


def _between(a: Array, b: Array) -> tuple[Array, Array]:
    """Sine and cosine of :class:`Angular` for rows ``(r, ...)`` of length one: their product, and the length of what b
    has beside a, which keeps its digits where they are nearly alike."""
    xp = namespace(a, b)
    product = (a * b).sum(0)
    beside = b - product * a
    return product, xp.sqrt((beside * beside).sum(0))


class CompoundSymmetry(Angular):
    """A standard deviation for each effect and one correlation of all, from ``-1 / (q - 1)`` to 1.

    Roots of the two eigenvalues of R are ``sqrt(q) cos t`` and ``sqrt(q / (q - 1)) sin t``: both bounds of the
    correlation are quarter turns.
    """

    scaling = "each"
    ordered = False

    @property
    def n_shapes(self) -> int:
        return 1

    def rows(self, s: list[Ring], c: list[Ring], one: Ring) -> list[list[Ring | None]]:
        q = self.q
        of_differences = float(np.sqrt(q / (q - 1.0))) * s[0]
        between = (1.0 / q) * (float(np.sqrt(q)) * c[0] - of_differences)
        return [[of_differences + between if a == b else between for b in range(q)] for a in range(q)]

    def correlations(self, s: list[Ring], c: list[Ring], one: Ring) -> list[Ring]:
        rho = one - (self.q / (self.q - 1.0)) * (s[0] * s[0])
        return [one if a == b else rho for a, b in pairs_of(self.q)]

    def angles_near(self, u: Array, seen: Array) -> list[Array]:
        xp, q = namespace(u), self.q
        m = (seen * 1.0).sum(0)
        mean = u.sum(0) / xp.maximum(m, 1.0)
        beside = xp.where(seen, ((u - mean) ** 2).sum(1), 0.0).sum(0) / xp.maximum(m, 1.0)
        # 1 - rho from what of the effects with variance differs from their mean.
        apart = xp.where(m > 1, beside * m / xp.maximum(m - 1.0, 1.0), 1.0)
        sine = xp.sqrt(apart * (q - 1.0) / q)
        whole = xp.sqrt((mean * mean).sum(0))
        cosine = xp.where(m == q, whole, xp.sqrt(xp.maximum(0.0, 1.0 - apart * (q - 1.0) / q)))
        return [xp.arctan2(sine, cosine)]

    def _snapped(self, angles: Array) -> Array:
        return QUARTER * namespace(angles).round(angles / QUARTER)

    def _distance(self, angles: Array) -> Array:
        xp = namespace(angles)
        s, c = sine_cosine(angles[0])
        lengths = float(np.sqrt(self.q)) * abs(c), float(np.sqrt(self.q / (self.q - 1.0))) * abs(s)
        return xp.minimum(*lengths)[None]

    def _transformed(self, angles: Array) -> Array:
        # The logit of (1 + (q - 1) rho) / q, which runs from 0 to 1.
        xp = namespace(angles)
        s, c = sine_cosine(angles)
        return 2.0 * (xp.log(abs(c)) - xp.log(abs(s)))

    def _shapes_of(self, z: Array) -> Array:
        xp = namespace(z)
        # t = arctan(exp(-z / 2)); smooth at both ends, which lie at infinity.
        return 0.5 * (QUARTER - 2.0 * xp.arctan(xp.tanh(0.25 * z)))

    def _natural_shapes(self) -> list[NaturalParameter]:
        return [NaturalParameter("cor", 1, 0, shared=True)]


class _Autoregressive(Angular):
    """Correlations ``rho^|a - b|`` of effects in their order, rho from -1 to 1."""

    @property
    def apart_from_noise(self) -> bool:
        return self.q > 2

    @property
    def n_shapes(self) -> int:
        return 1

    def rows(self, s: list[Ring], c: list[Ring], one: Ring) -> list[list[Ring | None]]:
        q, powers = self.q, _powers(s[0], one, self.q)
        beside = [c[0] if j == 0 else power * c[0] for j, power in enumerate(powers)]
        return [[powers[a] if b == 0 else beside[a - b] if b <= a else None for b in range(q)] for a in range(q)]

    def correlations(self, s: list[Ring], c: list[Ring], one: Ring) -> list[Ring]:
        powers = _powers(s[0], one, self.q)
        return [powers[b - a] for a, b in pairs_of(self.q)]

    def completed(self, cor: np.ndarray) -> np.ndarray:
        powers: np.ndarray = cor[1, 0] ** abs(np.arange(self.q)[:, None] - np.arange(self.q))
        return powers

    def angles_near(self, u: Array, seen: Array) -> list[Array]:
        xp, q = namespace(u), self.q
        pairs = [_between(u[i], u[i + 1]) for i in range(q - 1)]
        there = [seen[i] & seen[i + 1] for i in range(q - 1)]
        sine, count = _sum_where([s for s, _ in pairs], there)
        cosine, _ = _sum_where([c for _, c in pairs], there)
        angle = xp.arctan2(sine, cosine)
        if self.homogeneous or q == 2:
            return [angle]
        # No two neighbours have a variance: the nearest that do, of which an even distance hides the sign.
        for lag in range(2, q):
            there = [seen[i] & seen[i + lag] for i in range(q - lag)]
            total, own = _sum_where([(u[i] * u[i + lag]).sum(0) for i in range(q - lag)], there)
            rho = xp.clip(total / xp.maximum(own, 1.0), -1.0, 1.0)
            root = xp.where(rho < 0, -1.0, 1.0) * abs(rho) ** (1.0 / lag)
            angle = xp.where((count == 0) & (own > 0), xp.arcsin(root), angle)
            count = count + own
        return [angle]


def _powers(s: Ring, one: Ring, q: int) -> list[Ring]:
    powers = [one]
    for _ in range(q - 1):
        powers.append(powers[-1] * s)
    return powers


class Autoregressive(_Autoregressive):
    """One standard deviation, correlations ``rho^|a - b|``."""

    homogeneous = True


class HeterogeneousAutoregressive(_Autoregressive):
    """A standard deviation for each effect, correlations ``rho^|a - b|``."""

    scaling = "each"


class _Toeplitz(Angular):
    """A correlation for every distance. Angles are those of the partial autocorrelations, which may be any numbers from
    -1 to 1 (Barndorff-Nielsen & Schou 1973, J. Multivariate Anal. 3, 408)."""

    @property
    def n_shapes(self) -> int:
        return self.q - 1

    def rows(self, s: list[Ring], c: list[Ring], one: Ring) -> list[list[Ring | None]]:
        # The normalised lattice filter run backwards: rotations only, so that it is analytic at the bounds too.
        q = self.q
        rows: list[list[Ring | None]] = []
        backward: list[list[Ring | None]] = []  # of the effect before, order by order
        for t in range(q):
            forward: list[Ring | None] = [one if j == t else None for j in range(q)]
            own: list[list[Ring | None]] = []
            for k in range(t - 1, -1, -1):
                past = backward[k]
                own.append([_turned(c[k], past[j], -1.0, s[k], forward[j]) for j in range(q)])
                forward = [_turned(c[k], forward[j], 1.0, s[k], past[j]) for j in range(q)]
            rows.append(forward)
            backward = [forward, *reversed(own)]
        return rows

    def correlations(self, s: list[Ring], c: list[Ring], one: Ring) -> list[Ring]:
        # The same, of what all have of the first effect.
        lags: list[Ring] = [one]
        backward: list[Ring | None] = [one]
        for t in range(1, self.q):
            forward: Ring | None = None
            own: list[Ring | None] = []
            for k in range(t - 1, -1, -1):
                past = backward[k]
                own.append(_turned(c[k], past, -1.0, s[k], forward))
                forward = _turned(c[k], forward, 1.0, s[k], past)
            assert forward is not None
            lags.append(forward)
            backward = [forward, *reversed(own)]
        return [lags[b - a] for a, b in pairs_of(self.q)]

    def angles_near(self, u: Array, seen: Array) -> list[Array]:
        xp, q = namespace(u), self.q
        least = rank_tolerance(u.dtype)
        forward, backward = list(u), list(u)
        angles = []
        for k in range(q - 1):
            pairs = [_between(backward[t - 1], forward[t]) for t in range(k + 1, q)]
            sine, cosine = reduce(add, [s for s, _ in pairs]), reduce(add, [c for _, c in pairs])
            angles.append(xp.arctan2(sine, cosine))
            ahead, behind = list(forward), list(backward)
            for (s, c), t in zip(pairs, range(k + 1, q), strict=True):
                over = xp.where(c > least, 1.0 / xp.where(c > least, c, 1.0), 0.0)
                ahead[t] = (forward[t] - s * backward[t - 1]) * over
                behind[t] = (backward[t - 1] - s * forward[t]) * over
            forward, backward = ahead, behind
        if self.homogeneous:
            return angles
        # Where an effect has no variance: partial autocorrelations of the correlations at every distance that is left.
        all_seen = seen.all(0)
        if xp is np and all_seen.all():
            return angles
        lags = []
        for lag in range(1, q):
            there = [seen[i] & seen[i + lag] for i in range(q - lag)]
            total, count = _sum_where([(u[i] * u[i + lag]).sum(0) for i in range(q - lag)], there)
            lags.append((total / xp.maximum(count, 1.0), count > 0))
        return [xp.where(all_seen, angle, xp.arcsin(own)) for angle, own in zip(angles, _partial(lags), strict=True)]


class Toeplitz(_Toeplitz):
    """A standard deviation for each effect, a correlation for every distance."""

    scaling = "each"


class HomogeneousToeplitz(_Toeplitz):
    """One standard deviation, a correlation for every distance."""

    homogeneous = True

    def directions(self) -> np.ndarray:
        apart = abs(np.arange(self.q)[:, None] - np.arange(self.q))
        return np.stack([(apart == lag) * 1.0 for lag in range(self.q)])


def _turned(c: Any, a: Any, sign: float, s: Any, b: Any) -> Any:
    """``c a + sign s b``, None for zero."""
    if a is None:
        return None if b is None else sign * (s * b)
    return c * a if b is None else c * a + sign * (s * b)


def _partial(lags: list[tuple[Array, Array]]) -> list[Array]:
    """Partial autocorrelations from correlations at distances 1, 2, ... by the recursion of Durbin and Levinson; zero
    where nothing is known, and between -1 and 1."""
    xp = namespace(lags[0][0])
    found: list[Array] = []
    before: list[Array] = []
    r = [lag for lag, _ in lags]
    for k, (lag, known) in enumerate(lags):
        foretold = reduce(add, [p * r[k - 1 - j] for j, p in enumerate(before)], 0.0 * lag)
        left = 1.0 - reduce(add, [p * r[j] for j, p in enumerate(before)], 0.0 * lag)
        usable = known & (left > 1e-12)
        own = xp.where(usable, xp.clip((lag - foretold) / xp.where(usable, left, 1.0), -1.0, 1.0), 0.0)
        r[k] = xp.where(known, lag, foretold)
        before = [*(p - own * before[k - 1 - j] for j, p in enumerate(before)), own]
        found.append(own)
    return found


class AnteDependence(Angular):
    """A standard deviation for each effect, a correlation for each two neighbours; others are the products of those
    between them (Gabriel 1962, Ann. Math. Stat. 33, 201, of first order)."""

    scaling = "each"

    @property
    def apart_from_noise(self) -> bool:
        return self.q > 2

    @property
    def n_shapes(self) -> int:
        return self.q - 1

    def rows(self, s: list[Ring], c: list[Ring], one: Ring) -> list[list[Ring | None]]:
        row: list[Ring | None] = [one, *[None] * (self.q - 1)]
        rows = [row]
        for i in range(1, self.q):
            row = [None if entry is None else entry * s[i - 1] for entry in row]
            row[i] = c[i - 1]
            rows.append(row)
        return rows

    def correlations(self, s: list[Ring], c: list[Ring], one: Ring) -> list[Ring]:
        found = []
        for a in range(self.q):
            product = one
            for b in range(a, self.q):
                product = product if b == a else product * s[b - 1]
                found.append(product)
        return found

    def angles_near(self, u: Array, seen: Array) -> list[Array]:
        xp, q = namespace(u), self.q
        rows = list(u)
        # An effect without variance stands for the one before it, so that products of correlations are kept.
        for i in range(1, q):
            rows[i] = xp.where(seen[i], rows[i], rows[i - 1])
        known = list(seen)
        for i in range(1, q):
            known[i] = known[i] | known[i - 1]
        angles = []
        for i in range(q - 1):
            s, c = _between(rows[i], rows[i + 1])
            angles.append(xp.where(known[i], xp.arctan2(s, c), 0.0))
        return angles

    def completed(self, cor: np.ndarray) -> np.ndarray:
        own = np.ones((self.q, self.q))
        for a, b in pairs_of(self.q):
            own[a, b] = own[b, a] = np.prod([cor[i, i + 1] for i in range(a, b)])
        return own

    def _joined(self, x: Array) -> Array:
        xp, q = namespace(x), self.q
        r, angles = x[:q], list(x[q:])
        for i in range(1, q - 1):
            product = xp.arcsin(xp.sin(angles[i - 1]) * xp.sin(angles[i]))
            at_bound = sine_cosine(angles[i - 1])[1] == 0
            move = (r[i] == 0) & ~at_bound
            angles[i] = xp.where(move, product, angles[i])
            angles[i - 1] = xp.where(move, QUARTER, angles[i - 1])
        return xp.concatenate([r, xp.stack(angles)])

    def _natural_shapes(self) -> list[NaturalParameter]:
        return [NaturalParameter("cor", i, i - 1) for i in range(1, self.q)]
