"""Structures of correlations beside standard deviations: compound symmetry, autoregression, Toeplitz, ante-dependence.

``D = S R S``, S diagonal. Coordinates are chosen so that every real vector is allowed and bounds are ordinary
stationary points, reached exactly:

* a correlation is the sine of an angle: +1 and -1 lie at quarter turns, where it is stationary, and ``sqrt(1 - rho^2)``
  is the cosine, so that factors are analytic everywhere;
* standard deviations of one's own are squares: D is then even in each of their roots. With signed ones a change of sign
  would be another correlation. One that all effects share keeps its sign.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, ClassVar

import jax
import numpy as np

from mixjax.covariance.jets import Jet, Ring, constant, jet
from mixjax.covariance.structures import NaturalParameter, Structure
from mixjax.covariance.theta import lambda_of_theta, pairs_of, rank_tolerance
from mixjax.machine import Array, namespace

QUARTER = np.pi / 2.0


def _sine_cosine(t: Array) -> tuple[Array, Array]:
    """Exactly 0 at the quarter turns that floating-point numbers only come near to; derivatives are the usual ones."""
    xp = namespace(t)
    least = 8.0 * np.finfo(t.dtype).eps
    s, c = xp.sin(t), xp.cos(t)
    rest = xp.where(abs(s) < least, s, 0.0), xp.where(abs(c) < least, c, 0.0)
    if xp is not np:
        rest = jax.lax.stop_gradient(rest)
    return s - rest[0], c - rest[1]


def _one(x: Array) -> Array:
    return namespace(x).ones_like(x)


@dataclass(frozen=True)
class Scaled(Structure):
    """``D_ab = s_a s_b R_ab``: scales, then :attr:`n_angles` angles from which :meth:`rows` makes a root of R.

    Subclasses write :meth:`rows` and :meth:`correlations` as sums and products of sines and cosines, which are arrays
    or jets.
    """

    # All effects have one standard deviation s, a coordinate itself; else s_a is the square of a coordinate.
    homogeneous: ClassVar[bool] = False
    # The structure is one of effects in an order, as levels of a factor are.
    ordered: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.q < 2:
            raise ValueError(f"{type(self).__name__} is a structure of two effects or more, got {self.q}")

    @property
    def n_scales(self) -> int:
        return 1 if self.homogeneous else self.q

    @property
    @abstractmethod
    def n_angles(self) -> int:
        """How many angles there are, one or more."""

    @property
    def k(self) -> int:
        return self.n_scales + self.n_angles

    @property
    def deviations(self) -> tuple[int, ...]:
        return tuple(range(self.n_scales))

    @abstractmethod
    def rows(self, s: list[Ring], c: list[Ring], one: Ring) -> list[list[Ring | None]]:
        """A factor of R, entry by entry, from sines and cosines of the angles; rows of length one."""

    @abstractmethod
    def correlations(self, s: list[Ring], c: list[Ring], one: Ring) -> list[Ring]:
        """R_ab, a <= b, row by row."""

    @abstractmethod
    def angles_near(self, u: Array, seen: Array) -> list[Array]:
        """Angles ``(...)`` near rows ``u (q, r, ...)`` of length one; of effects that are not ``seen (q, ...)``, which
        have no variance, rows are zero and nothing is known. The same correlations where u has this structure."""

    # --- values

    def _sds(self, x: Array) -> Array:
        """``(q, ...)``, of a shared one with its sign."""
        if self.homogeneous:
            return namespace(x).broadcast_to(x[:1], (self.q, *x.shape[1:]))
        return x[: self.q] ** 2

    def _parts(self, x: Array) -> tuple[list[Array], list[Array]]:
        pairs = [_sine_cosine(x[self.n_scales + j]) for j in range(self.n_angles)]
        return [s for s, _ in pairs], [c for _, c in pairs]

    def _jets(self, x: Array) -> tuple[list[Jet], list[Jet], Jet]:
        n = self.n_angles
        s, c = self._parts(x)
        both = list(enumerate(zip(s, c, strict=True)))
        one = constant(_one(x[0]), n)
        return [jet(a, b, -a, j, n) for j, (a, b) in both], [jet(b, -a, -b, j, n) for j, (a, b) in both], one

    def entries(self, x: Array) -> list[list[Array | None]]:
        s, c = self._parts(x)
        rows = self.rows(s, c, _one(x[0]))
        return [
            [None if entry is None else sd * entry for entry in row] for sd, row in zip(self._sds(x), rows, strict=True)
        ]

    def near(self, F: Array) -> Array:
        xp = namespace(F)
        squares = (F * F).sum(1)
        sd = xp.sqrt(squares)
        # Of a row that is nothing but rounding the direction says nothing.
        seen = sd > rank_tolerance(F.dtype) * sd.max(0)
        u = xp.where(seen[:, None], F / xp.where(seen, sd, 1.0)[:, None], 0.0)
        scales = xp.sqrt(squares.mean(0))[None] if self.homogeneous else xp.sqrt(sd)
        angles = xp.stack(self.angles_near(u, seen))
        return xp.concatenate([scales, angles])

    def of_theta(self, theta: Array) -> Array:
        return self.settled(self.near(lambda_of_theta(theta, self.q)))

    def settled(self, x: Array) -> Array:
        xp, tolerance = namespace(x), rank_tolerance(x.dtype)
        sd = abs(self._sds(x))
        n = self.n_scales
        zero = sd[:n] <= tolerance * sd.max(0)
        scales = xp.where(zero, 0.0, x[:n])
        angles = x[n:]
        snapped = self._snapped(angles)
        return xp.concatenate([scales, xp.where(self._distance(angles) <= tolerance, snapped, angles)])

    # --- derivatives

    def slopes(self, x: Array) -> Array:
        xp = namespace(x)
        rows = self.rows(*self._jets(x))
        zero = constant(0.0 * x[0], self.n_angles)
        flat = [zero if entry is None else entry for row in rows for entry in row]
        shape = (self.q, self.q)
        C = xp.stack([entry.value for entry in flat]).reshape(*shape, *x.shape[1:])
        moved = xp.stack([entry.slope for entry in flat], 1).reshape(self.n_angles, *shape, *x.shape[1:])
        by_angles = self._sds(x)[:, None] * moved
        if self.homogeneous:
            return xp.concatenate([C[None], by_angles])
        unit = np.eye(self.q).reshape(self.q, self.q, 1, *(1,) * (x.ndim - 1))
        return xp.concatenate([unit * (2.0 * x[: self.q])[:, None, None] * C[None], by_angles])

    def _R(self, x: Array) -> tuple[Array, Array, Array]:
        """R ``(pairs, B)``, its slopes ``(pairs, n, B)`` and curvatures ``(pairs, n, n, B)`` by the angles."""
        xp = namespace(x)
        found = self.correlations(*self._jets(x))
        return (
            xp.stack([entry.value for entry in found]),
            xp.stack([entry.slope for entry in found]),
            xp.stack([entry.curve for entry in found]),
        )

    def jacobian(self, x: Array) -> Array:
        xp = namespace(x)
        R, dR, _ = self._R(x)
        a, b = np.array(pairs_of(self.q)).T
        w = self._sds(x)
        by_angles = (w[a] * w[b])[:, None] * dR
        if self.homogeneous:
            return xp.concatenate([(2.0 * x[0] * R)[:, None], by_angles], 1)
        first, second = np.eye(self.q)[a][..., None], np.eye(self.q)[b][..., None]
        by_scales = (first * w[b][:, None] + second * w[a][:, None]) * (2.0 * x[: self.q])[None] * R[:, None]
        return xp.concatenate([by_scales, by_angles], 1)

    def curvature(self, x: Array, g: Array) -> Array:
        xp, q = namespace(x, g), self.q
        R, dR, d2R = self._R(x)
        a, b = np.array(pairs_of(q)).T
        w = self._sds(x)
        weight = g * w[a] * w[b]
        of_angles = (weight[:, None, None] * d2R).sum(0)
        if self.homogeneous:
            # s^2 sum_ab g_ab R_ab, its first part without s^2 at s = 0 too.
            own = 2.0 * (g * R).sum(0)
            cross = 2.0 * x[0] * (g[:, None] * dR).sum(0)
            top = xp.concatenate([own[None, None], cross[None]], 1)
            return xp.concatenate([top, xp.concatenate([cross[:, None], of_angles], 1)])
        at = np.empty((q, q), int)
        at[a, b] = at[b, a] = np.arange(len(a))
        twice = (1.0 + np.eye(q))[..., None]
        r = x[:q]
        of_pairs = twice * (g * R)[at]  # (q, q, B)
        of_scales = 4.0 * r[:, None] * r[None] * of_pairs
        diagonal = 2.0 * (of_pairs * w[None]).sum(1)
        of_scales = of_scales + np.eye(q)[..., None] * diagonal[None]
        moved = twice[:, :, None] * (g[:, None] * dR)[at]  # (q, q, n, B)
        cross = 2.0 * r[:, None] * (moved * w[None, :, None]).sum(1)  # (q, n, B)
        top = xp.concatenate([of_scales, cross], 1)
        return xp.concatenate([top, xp.concatenate([xp.swapaxes(cross, 0, 1), of_angles], 1)])

    # --- lower ranks: standard deviations of zero, then angles at a bound

    def _snapped(self, angles: Array) -> Array:
        """The nearest bound of every angle, ``(n_angles, ...)``."""
        xp = namespace(angles)
        return xp.where(angles < 0, -QUARTER, QUARTER) + 2.0 * QUARTER * xp.trunc(angles / (2.0 * QUARTER))

    def _distance(self, angles: Array) -> Array:
        """How far each is from its bound, as the length of what is independent there."""
        return abs(namespace(angles).stack([_sine_cosine(angle)[1] for angle in angles]))

    @property
    def n_reductions(self) -> int:
        return self.k

    def sizes(self, x: Array) -> Array:
        xp, n = namespace(x), self.n_scales
        sd = abs(self._sds(x))
        return xp.concatenate([sd[:n], self._distance(x[n:]) * sd.max(0)])

    def reduced(self, x: Array, c: Array) -> tuple[Array, Array]:
        xp, n = namespace(x, c), self.n_scales
        at = np.arange(self.k).reshape(-1, *(1,) * (x.ndim - 1))
        goal = xp.concatenate([xp.zeros_like(x[:n]), self._snapped(x[n:])])
        x = self._joined(xp.where(at == c, goal, x))
        return x, xp.concatenate([x[:n] != 0, self._distance(x[n:]) > 0])

    def _joined(self, x: Array) -> Array:
        """Coordinates of the same covariance whose angles say what is known; for effects without variance."""
        return x

    def moving(self, x: Array) -> Array:
        there = self.jacobian(x[:, None] if x.ndim == 1 else x)
        moves: Array = (there != 0).any(0)
        return moves[:, 0] if x.ndim == 1 else moves

    # --- unconstrained: logarithms of standard deviations, correlations by Fisher's z

    def logarithms(self, x: Array) -> Array:
        xp, n = namespace(x), self.n_scales
        return xp.concatenate([xp.log(abs(self._sds(x)[:n])), self._transformed(x[n:])])

    def exponentials(self, x: Array) -> Array:
        xp, n = namespace(x), self.n_scales
        scales = xp.exp(x[:n] if self.homogeneous else 0.5 * x[:n])
        return xp.concatenate([scales, self._angles_of(x[n:])])

    def _transformed(self, angles: Array) -> Array:
        xp = namespace(angles)
        return xp.arctanh(xp.sin(angles))

    def _angles_of(self, z: Array) -> Array:
        xp = namespace(z)
        return 2.0 * xp.arctan(xp.tanh(0.5 * z))

    # --- natural parameters

    @property
    def natural(self) -> tuple[NaturalParameter, ...]:
        sds = [NaturalParameter("sd", i, shared=self.homogeneous) for i in range(self.n_scales)]
        return (*sds, *self._natural_correlations())

    def _natural_correlations(self) -> list[NaturalParameter]:
        """One for every angle."""
        return [NaturalParameter("cor", lag, 0, shared=True, lag=True) for lag in range(1, self.n_angles + 1)]


def _sum_where(values: list[Array], there: list[Array]) -> tuple[Array, Array]:
    """Sum ``(...)`` of the values that are there, and how many are."""
    xp = namespace(*values)
    count = reduce(add, [one * 1.0 for one in there])
    return reduce(add, [xp.where(one, value, 0.0) for value, one in zip(values, there, strict=True)]), count


def _between(a: Array, b: Array) -> tuple[Array, Array]:
    """Sine and cosine of :class:`Scaled` for rows ``(r, ...)`` of length one: their product, and the length of what b
    has beside a, which keeps its digits where they are nearly alike."""
    xp = namespace(a, b)
    product = (a * b).sum(0)
    beside = b - product * a
    return product, xp.sqrt((beside * beside).sum(0))


class CompoundSymmetry(Scaled):
    """A standard deviation for each effect and one correlation of all, from ``-1 / (q - 1)`` to 1.

    Roots of the two eigenvalues of R are ``sqrt(q) cos t`` and ``sqrt(q / (q - 1)) sin t``: both bounds of the
    correlation are quarter turns.
    """

    scaling = "each"
    ordered = False

    @property
    def n_angles(self) -> int:
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
        s, c = _sine_cosine(angles[0])
        lengths = float(np.sqrt(self.q)) * abs(c), float(np.sqrt(self.q / (self.q - 1.0))) * abs(s)
        return xp.minimum(*lengths)[None]

    def _transformed(self, angles: Array) -> Array:
        # The logit of (1 + (q - 1) rho) / q, which runs from 0 to 1.
        xp = namespace(angles)
        s, c = _sine_cosine(angles)
        return 2.0 * (xp.log(abs(c)) - xp.log(abs(s)))

    def _angles_of(self, z: Array) -> Array:
        xp = namespace(z)
        # t = arctan(exp(-z / 2)); smooth at both ends, which lie at infinity.
        return 0.5 * (QUARTER - 2.0 * xp.arctan(xp.tanh(0.25 * z)))

    def _natural_correlations(self) -> list[NaturalParameter]:
        return [NaturalParameter("cor", 1, 0, shared=True)]


class _Autoregressive(Scaled):
    """Correlations ``rho^|a - b|`` of effects in their order, rho from -1 to 1."""

    @property
    def apart_from_noise(self) -> bool:
        return self.q > 2

    @property
    def n_angles(self) -> int:
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


class _Toeplitz(Scaled):
    """A correlation for every distance. Angles are those of the partial autocorrelations, which may be any numbers from
    -1 to 1 (Barndorff-Nielsen & Schou 1973, J. Multivariate Anal. 3, 408)."""

    @property
    def n_angles(self) -> int:
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


class AnteDependence(Scaled):
    """A standard deviation for each effect, a correlation for each two neighbours; others are the products of those
    between them (Gabriel 1962, Ann. Math. Stat. 33, 201, of first order)."""

    scaling = "each"

    @property
    def apart_from_noise(self) -> bool:
        return self.q > 2

    @property
    def n_angles(self) -> int:
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
            at_bound = _sine_cosine(angles[i - 1])[1] == 0
            move = (r[i] == 0) & ~at_bound
            angles[i] = xp.where(move, product, angles[i])
            angles[i - 1] = xp.where(move, QUARTER, angles[i - 1])
        return xp.concatenate([r, xp.stack(angles)])

    def _natural_correlations(self) -> list[NaturalParameter]:
        return [NaturalParameter("cor", i, i - 1) for i in range(1, self.q)]
