"""Covariances that are scales times a shape: ``D = S R S``, S diagonal; and those whose shape is made of angles.

Coordinates are chosen so that every real vector is allowed and bounds are ordinary stationary points, reached exactly:

* a correlation is the sine of an angle: +1 and -1 lie at quarter turns, where it is stationary, and ``sqrt(1 - rho^2)``
  is the cosine, so that factors are analytic everywhere;
* standard deviations of one's own are squares: D is then even in each of their roots. With signed ones a change of sign
  would be another correlation. One that all effects share keeps its sign.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import jax
import numpy as np

from mixjax.covariance.jets import Jet, Ring, constant, jet
from mixjax.covariance.structures import NaturalParameter, Structure
from mixjax.covariance.theta import lambda_of_theta, pairs_of, rank_tolerance
from mixjax.machine import Array, namespace

QUARTER = np.pi / 2.0


def sine_cosine(t: Array) -> tuple[Array, Array]:
    """Exactly 0 at the quarter turns that floating-point numbers only come near to; derivatives are the usual ones."""
    xp = namespace(t)
    least = 8.0 * np.finfo(t.dtype).eps
    s, c = xp.sin(t), xp.cos(t)
    rest = xp.where(abs(s) < least, s, 0.0), xp.where(abs(c) < least, c, 0.0)
    if xp is not np:
        rest = jax.lax.stop_gradient(rest)
    return s - rest[0], c - rest[1]


@dataclass(frozen=True)
class Scaled(Structure):
    """``D_ab = s_a s_b R_ab``: coordinates of scales, then :attr:`n_shapes` others on which the shape R depends."""

    # All effects have one standard deviation s, a coordinate itself; else s_a is the square of a coordinate.
    homogeneous: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.q < 2:
            raise ValueError(f"{type(self).__name__} is a structure of two effects or more, got {self.q}")

    @property
    def n_scales(self) -> int:
        return 1 if self.homogeneous else self.q

    @property
    @abstractmethod
    def n_shapes(self) -> int:
        """How many coordinates the shape has, one or more."""

    @property
    def k(self) -> int:
        return self.n_scales + self.n_shapes

    @property
    def deviations(self) -> tuple[int, ...]:
        return tuple(range(self.n_scales))

    @abstractmethod
    def root(self, x: Array) -> list[list[Array | None]]:
        """A factor of R, entry by entry, None for 0."""

    @abstractmethod
    def root_slopes(self, x: Array) -> tuple[Array, Array]:
        """The same ``(q, q, ...)``, and its slopes ``(n_shapes, q, q, ...)``."""

    @abstractmethod
    def shape(self, x: Array) -> tuple[Array, Array, Array]:
        """R_ab, a <= b, row by row ``(pairs, B)``, its slopes ``(pairs, n, B)`` and curvatures ``(pairs, n, n, B)`` by
        the coordinates of the shape."""

    # Of the shape: its coordinates at the nearest bounds, and how far they are from these, as the length of what is
    # independent there. By default there are none.

    def _snapped(self, shapes: Array) -> Array:
        return shapes

    def _distance(self, shapes: Array) -> Array:
        return namespace(shapes).ones_like(shapes)

    # Unconstrained forms of its coordinates, and back.

    def _transformed(self, shapes: Array) -> Array:
        return shapes

    def _shapes_of(self, z: Array) -> Array:
        return z

    # --- values

    def _sds(self, x: Array) -> Array:
        """``(q, ...)``, of a shared one with its sign."""
        if self.homogeneous:
            return namespace(x).broadcast_to(x[:1], (self.q, *x.shape[1:]))
        return x[: self.q] ** 2

    def entries(self, x: Array) -> list[list[Array | None]]:
        return [
            [None if entry is None else sd * entry for entry in row]
            for sd, row in zip(self._sds(x), self.root(x), strict=True)
        ]

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
        C, moved = self.root_slopes(x)
        by_shape = self._sds(x)[:, None] * moved
        if self.homogeneous:
            return xp.concatenate([C[None], by_shape])
        unit = np.eye(self.q).reshape(self.q, self.q, 1, *(1,) * (x.ndim - 1))
        return xp.concatenate([unit * (2.0 * x[: self.q])[:, None, None] * C[None], by_shape])

    def jacobian(self, x: Array) -> Array:
        xp = namespace(x)
        R, dR, _ = self.shape(x)
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
        R, dR, d2R = self.shape(x)
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
        return xp.concatenate([scales, self._shapes_of(x[n:])])

    # --- natural parameters

    @property
    def natural(self) -> tuple[NaturalParameter, ...]:
        sds = [NaturalParameter("sd", i, shared=self.homogeneous) for i in range(self.n_scales)]
        return (*sds, *self._natural_shapes())

    @abstractmethod
    def _natural_shapes(self) -> list[NaturalParameter]:
        """One for every coordinate of the shape."""


@dataclass(frozen=True)
class Angular(Scaled):
    """Correlations that are made of sines and cosines of angles, the coordinates of the shape.

    Subclasses write :meth:`rows` and :meth:`correlations` as sums and products, of arrays or of jets.
    """

    # The structure is one of effects in an order, as levels of a factor are.
    ordered: ClassVar[bool] = True

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

    def _parts(self, x: Array) -> tuple[list[Array], list[Array]]:
        pairs = [sine_cosine(x[self.n_scales + j]) for j in range(self.n_shapes)]
        return [s for s, _ in pairs], [c for _, c in pairs]

    def _jets(self, x: Array) -> tuple[list[Jet], list[Jet], Jet]:
        n = self.n_shapes
        s, c = self._parts(x)
        both = list(enumerate(zip(s, c, strict=True)))
        one = constant(namespace(x).ones_like(x[0]), n)
        return [jet(a, b, -a, j, n) for j, (a, b) in both], [jet(b, -a, -b, j, n) for j, (a, b) in both], one

    def root(self, x: Array) -> list[list[Array | None]]:
        return self.rows(*self._parts(x), namespace(x).ones_like(x[0]))

    def root_slopes(self, x: Array) -> tuple[Array, Array]:
        xp, n, q = namespace(x), self.n_shapes, self.q
        zero = constant(0.0 * x[0], n)
        flat = [zero if entry is None else entry for row in self.rows(*self._jets(x)) for entry in row]
        C = xp.stack([entry.value for entry in flat]).reshape(q, q, *x.shape[1:])
        return C, xp.stack([entry.slope for entry in flat], 1).reshape(n, q, q, *x.shape[1:])

    def shape(self, x: Array) -> tuple[Array, Array, Array]:
        xp = namespace(x)
        found = self.correlations(*self._jets(x))
        return (
            xp.stack([entry.value for entry in found]),
            xp.stack([entry.slope for entry in found]),
            xp.stack([entry.curve for entry in found]),
        )

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

    def _snapped(self, angles: Array) -> Array:
        """The nearest bound of every angle, ``(n_angles, ...)``."""
        xp = namespace(angles)
        return xp.where(angles < 0, -QUARTER, QUARTER) + 2.0 * QUARTER * xp.trunc(angles / (2.0 * QUARTER))

    def _distance(self, angles: Array) -> Array:
        """How far each is from its bound, as the length of what is independent there."""
        return abs(namespace(angles).stack([sine_cosine(angle)[1] for angle in angles]))

    def _transformed(self, angles: Array) -> Array:
        xp = namespace(angles)
        return xp.arctanh(xp.sin(angles))

    def _shapes_of(self, z: Array) -> Array:
        xp = namespace(z)
        return 2.0 * xp.arctan(xp.tanh(0.5 * z))

    def _natural_shapes(self) -> list[NaturalParameter]:
        """One for every angle."""
        return [NaturalParameter("cor", lag, 0, shared=True, lag=True) for lag in range(1, self.n_shapes + 1)]
