"""Covariances that a few dimensions make: loadings of effects on latent ones, with specific variances or without.

``D = L L'`` (:class:`ReducedRank`) or ``D = L L' + diag(r^2)`` (:class:`FactorAnalytic`), L ``(q, d)``. Any rotation of
L is the same covariance, so that L is lower trapezoidal, zero above its diagonal, with a positive first entry in every
column. Coordinates are the loadings, column by column, then the roots r of the specific variances: D is even in each
column and in each r, zero is a stationary point, and a specific variance of zero (a Heywood case) is reached exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from mixjax import decompositions, linalg
from mixjax.covariance.structures import NaturalParameter, Structure
from mixjax.covariance.theta import pairs_of, rank_tolerance
from mixjax.machine import Array, fori_loop, namespace

# Steps by which loadings are found from correlations; what counts as rounding in these; specific variances, as a part
# of the whole, that a start has at least; loadings of a start from nothing.
STEPS, EXACT, LEAST, FIRST = 60, 1e-12, 0.05, 0.5
# Searches for loadings that go on where the one from principal factors did not end at the correlations themselves.
MORE = {True: 40, False: 8}  # by NumPy, which searches only where it is needed; by JAX


@cache
def places_of(q: int, d: int) -> tuple[np.ndarray, np.ndarray]:
    """Effect and dimension of every loading, column by column."""
    cells = [(i, j) for j in range(d) for i in range(j, q)]
    return np.array([i for i, _ in cells]), np.array([j for _, j in cells])


@dataclass(frozen=True)
class Loadings(Structure):
    """What both have in common; d dimensions."""

    d: int = 1

    scaling = "each"
    has_sections = False

    @property
    def n_loadings(self) -> int:
        """Free loadings."""
        return self.q * self.d - self.d * (self.d - 1) // 2

    def loadings(self, x: Array) -> Array:
        """``L (q, d, ...)`` at ``x (k, ...)``."""
        return namespace(x).stack([_column(x, self.q, j) for j in range(self.d)], axis=1)

    def n_zeros(self, made: np.ndarray) -> int:
        """A dimension less is a bound in all the directions in which it could have pointed."""
        others, lost = (int(np.count_nonzero(part)) for part in np.split(made, [len(made) - self.d]))
        return others + (lost and lost + self.q - self.d)

    def _singular_values(self, x: Array) -> Array:
        """Of the loadings, ``(d, B)``, ascending."""
        return decompositions.orthogonal_columns(_square(self.loadings(x)))[1][: self.d][::-1]

    def _of_lower_rank(self, x: Array, c: Array) -> Array:
        """Loadings ``(n_loadings, B)`` with c + 1 dimensions less; as they are where c is none of 0 .. d - 1."""
        xp, q, d = namespace(x, c), self.q, self.d
        columns, _ = decompositions.orthogonal_columns(_square(self.loadings(x)))
        kept = xp.where(np.arange(q)[:, None] < d - 1 - c, columns, 0.0)
        return xp.where((c >= 0) & (c < d), _trapezoid(kept, d), x[: self.n_loadings])

    def _nonzero(self, x: Array) -> Array:
        """Which loadings stand in a column that is not zero, ``(n_loadings, ...)``."""
        return (self.loadings(x) != 0).any(0)[places_of(self.q, self.d)[1]]

    def jacobian(self, x: Array) -> Array:
        xp, q = namespace(x), self.q
        a, b = np.array(pairs_of(q)).T
        L = self.loadings(x)
        rows, columns = places_of(q, self.d)
        shape = (-1, *(1,) * (x.ndim - 1))
        of = [
            (a == i).reshape(shape) * L[b, j] + (b == i).reshape(shape) * L[a, j]
            for i, j in zip(rows, columns, strict=True)
        ]
        return xp.stack(of, axis=1)

    def curvature(self, x: Array, g: Array) -> Array:
        xp, q = namespace(x, g), self.q
        rows, columns = places_of(q, self.d)
        at = np.empty((q, q), int)
        a, b = np.array(pairs_of(q)).T
        at[a, b] = at[b, a] = np.arange(len(a))
        same = (columns[:, None] == columns) * (1.0 + (rows[:, None] == rows))
        return xp.asarray(g)[at[rows[:, None], rows]] * same.reshape(*same.shape, *(1,) * (g.ndim - 1))

    @property
    def natural(self) -> tuple[NaturalParameter, ...]:
        return tuple(
            NaturalParameter("loading", int(i), int(j)) for i, j in zip(*places_of(self.q, self.d), strict=True)
        )


@dataclass(frozen=True)
class ReducedRank(Loadings):
    """``D = L L'``: q effects by d dimensions, of rank d by construction.

    glmmTMB's ``rr(d = )``; McGillycuddy et al. (2025, J. Stat. Softw. 112(1)).
    """

    d: int = 2

    def __post_init__(self) -> None:
        if not 1 <= self.d <= self.q:
            raise ValueError(f"rr(d = {self.d}) of {self.q} effects: the dimensions are 1 to {self.q}, one per effect")

    @property
    def k(self) -> int:
        return self.n_loadings

    @property
    def rank(self) -> int:
        return self.d

    @property
    def apart_from_noise(self) -> bool:
        """Noise is all that there is in the other directions."""
        return self.d < self.q

    @property
    def deviations(self) -> tuple[int, ...]:
        rows, columns = places_of(self.q, self.d)
        return tuple(map(int, np.flatnonzero(rows == columns)))

    def entries(self, x: Array) -> list[list[Array | None]]:
        # No column is None all over: sums over one would have no terms.
        zero = 0.0 * x[0]
        found: list[list[Array | None]] = [[zero if j <= i else None for j in range(self.q)] for i in range(self.q)]
        for value, i, j in zip(x, *places_of(self.q, self.d), strict=True):
            found[i][j] = value
        return found

    def near(self, F: Array) -> Array:
        lanes = F if F.ndim > 2 else F[..., None]
        columns, _ = decompositions.orthogonal_columns(lanes)
        x = _trapezoid(namespace(F).where(np.arange(self.q)[:, None] < self.d, columns, 0.0), self.d)
        return x if F.ndim > 2 else x[..., 0]

    def is_inside(self, x: Array, least: float) -> Array:
        L = self.loadings(x)
        one = linalg.eye(self.d, L)
        return decompositions.is_positive(linalg.matmul(linalg.transpose(L), L) - least**2 * one)

    @property
    def n_reductions(self) -> int:
        return self.d

    def sizes(self, x: Array) -> Array:
        return self._singular_values(x)

    def reduced(self, x: Array, c: Array) -> tuple[Array, Array]:
        x = self._of_lower_rank(x, c)
        return x, self._nonzero(x)


@dataclass(frozen=True)
class FactorAnalytic(Loadings):
    """``D = L L' + diag(r^2)``: d common dimensions and a specific variance of every effect."""

    def __post_init__(self) -> None:
        q, d, most = self.q, self.d, self.q * (self.q + 1) // 2
        if d < 1:
            raise ValueError(f"fa(d = {d}): one dimension or more is needed")
        if self.k > most or (d > 1 and self.k == most):
            raise ValueError(
                f"fa(d = {d}) of {q} effects has {self.k} parameters, and covariances of {q} effects no more than "
                f"{most}: it is not identified. One dimension needs three effects or more, two need five, three seven; "
                f"use fewer dimensions, 'rr', or 'us'"
            )

    @property
    def k(self) -> int:
        return self.n_loadings + self.q

    @property
    def deviations(self) -> tuple[int, ...]:
        rows, columns = places_of(self.q, self.d)
        diagonal = np.flatnonzero(rows == columns)
        return tuple(map(int, [*diagonal, *range(self.n_loadings, self.k)]))

    def _wide(self, x: Array) -> Array:
        """``[L  diag(r)]``, ``(q, d + q, ...)``."""
        xp, q = namespace(x), self.q
        r = x[self.n_loadings :]
        one = np.eye(q).reshape(q, q, *(1,) * (x.ndim - 1))
        return xp.concatenate([self.loadings(x), xp.asarray(one, x.dtype) * r[None]], axis=1)

    def entries(self, x: Array) -> list[list[Array | None]]:
        C = decompositions.lower_factor(self._wide(x), rank_tolerance(x.dtype))
        return [[C[i, j] if j <= i else None for j in range(self.q)] for i in range(self.q)]

    def slopes(self, x: Array) -> Array:
        """Zero along what has no variance: there the factor loses a column for good."""
        xp, q, n = namespace(x), self.q, self.n_loadings
        W = self._wide(x)
        moved = np.zeros((self.k, q, self.d + q))
        rows, columns = places_of(q, self.d)
        moved[np.arange(n), rows, columns] = 1.0
        moved[n + np.arange(q), np.arange(q), self.d + np.arange(q)] = 1.0
        lanes = (1,) * (x.ndim - 1)
        rest, rests = W, xp.asarray(moved.reshape(*moved.shape, *lanes), x.dtype) + 0.0 * W[None]
        found, tolerance = [], rank_tolerance(x.dtype)
        for j in range(q):
            row, d_row = rest[j], rests[:, j]
            square = (row * row).sum(0)
            there = square > tolerance**2 * (W[j] * W[j]).sum(0)
            length = xp.sqrt(xp.where(there, square, 1.0))
            unit = xp.where(there, row / length, 0.0)
            along = (d_row * unit[None]).sum(1)
            d_unit = xp.where(there, (d_row - along[:, None] * unit[None]) / length, 0.0)
            column = (rest * unit).sum(1)
            d_column = (rests * unit[None, None]).sum(2) + (rest[None] * d_unit[:, None]).sum(2)
            below = (np.arange(q) >= j).reshape(q, *lanes)
            found.append(xp.where(below, d_column, 0.0))
            rests = rests - d_column[:, :, None] * unit[None, None] - column[None, :, None] * d_unit[:, None]
            rest = rest - column[:, None] * unit
        return xp.stack(found, axis=2)

    def jacobian(self, x: Array) -> Array:
        xp, q = namespace(x), self.q
        a, b = np.array(pairs_of(q)).T
        own = ((a == b)[:, None] & (a[:, None] == np.arange(q))).reshape(len(a), q, *(1,) * (x.ndim - 1))
        return xp.concatenate([super().jacobian(x), 2.0 * own * x[self.n_loadings :][None]], 1)

    def curvature(self, x: Array, g: Array) -> Array:
        xp, q, n = namespace(x, g), self.q, self.n_loadings
        among = super().curvature(x, g)
        a, b = np.array(pairs_of(q)).T
        own = 2.0 * xp.asarray(g)[np.flatnonzero(a == b)]
        corner = np.eye(q).reshape(q, q, *(1,) * (g.ndim - 1)) * own[None]
        across = xp.zeros((n, q, *g.shape[1:]), g.dtype)
        left = xp.concatenate([among, xp.swapaxes(across, 0, 1)])
        return xp.concatenate([left, xp.concatenate([across, corner])], 1)

    def near(self, F: Array) -> Array:
        lanes = F if F.ndim > 2 else F[..., None]
        x = self._near(lanes.reshape(*lanes.shape[:2], -1)).reshape(self.k, *lanes.shape[2:])
        return x if F.ndim > 2 else x[..., 0]

    def _near(self, F: Array) -> Array:
        """Of the least dimensions that reproduce the covariances between effects, where there are such, and of all d by
        least squares where there are none."""
        xp, q, d = namespace(F), self.q, self.d
        squares = (F * F).sum(1)
        sd = xp.sqrt(squares)
        seen = sd > rank_tolerance(F.dtype) * sd.max(0)
        u = xp.where(seen[:, None], F / xp.where(seen, sd, 1.0)[:, None], 0.0)
        R = linalg.matmul(u, linalg.transpose(u))
        off = (1.0 - np.eye(q))[..., None]
        R = xp.where(xp.isfinite(R).all((0, 1)), R, xp.asarray(np.eye(q), F.dtype)[..., None])
        least = EXACT if np.finfo(F.dtype).bits == 64 else 1e-5
        L, exact = xp.zeros((q, d, F.shape[-1]), F.dtype), abs(R * off).max((0, 1)) <= least
        for dimensions in range(1, d + 1):
            found = _loadings(R, dimensions, dimensions < d, least)
            found = xp.concatenate([found, xp.zeros((q, d - dimensions, F.shape[-1]), F.dtype)], 1)
            fits = _misfit(found, R) <= least
            L = xp.where(exact, L, found)
            exact = exact | fits
        specific = xp.where(seen, 1.0 - (L * L).sum(1), 0.0)
        # Of a start no effect is without a variance of its own.
        common = (L * L).sum(1)
        shrink = xp.where(common > 1.0 - LEAST, xp.sqrt((1.0 - LEAST) / xp.where(common > 0, common, 1.0)), 1.0)
        L = xp.where(exact, L, L * shrink[:, None])
        started = xp.maximum(specific, LEAST) * seen
        rounding = xp.where(specific > 100 * least, specific, 0.0)
        r = xp.sqrt(xp.where(exact, rounding, started)) * sd
        return xp.concatenate([_trapezoid(L * sd[:, None], d), r])

    def exactly(self, F: Array) -> Array:
        xp = namespace(F)
        x = super().exactly(F)
        G = self.factor(x)
        D, found = (linalg.matmul(A, linalg.transpose(A)) for A in (F, G))
        same = abs(found - D).max((0, 1)) <= np.sqrt(EXACT) * abs(D).max((0, 1))
        return xp.where(same, x, xp.nan)

    def wide_start(self, scale: float, like: Array) -> Array:
        """Not without loadings, where the criterion has no slope in them."""
        xp = namespace(like)
        x = np.zeros(self.k)
        rows, columns = places_of(self.q, self.d)
        x[: self.n_loadings] = FIRST * scale * np.where(rows == columns, 1.0, 0.3)
        x[self.n_loadings :] = scale
        return xp.asarray(x, like.dtype)

    def is_inside(self, x: Array, least: float) -> Array:
        xp, L = namespace(x), self.loadings(x)
        one = linalg.eye(self.d, L)
        common = decompositions.is_positive(linalg.matmul(linalg.transpose(L), L) - least**2 * one)
        return common & (xp.abs(x[self.n_loadings :]) > least).all(0)

    @property
    def n_reductions(self) -> int:
        return self.q + self.d

    def sizes(self, x: Array) -> Array:
        return namespace(x).concatenate([abs(x[self.n_loadings :]), self._singular_values(x)])

    def reduced(self, x: Array, c: Array) -> tuple[Array, Array]:
        xp, q, n = namespace(x, c), self.q, self.n_loadings
        r = xp.where(np.arange(q)[:, None] == c, 0.0, x[n:])
        x = xp.concatenate([self._of_lower_rank(x, c - q), r])
        return x, xp.concatenate([self._nonzero(x), r != 0])

    @property
    def natural(self) -> tuple[NaturalParameter, ...]:
        return (*super().natural, *(NaturalParameter("specific", i) for i in range(self.q)))


def _column(x: Array, q: int, j: int) -> Array:
    xp = namespace(x)
    start = q * j - j * (j - 1) // 2
    return xp.concatenate([xp.zeros((j, *x.shape[1:]), x.dtype), x[start : start + q - j]])


def _square(L: Array) -> Array:
    """``(q, d, ...)`` with columns of zeros, ``(q, q, ...)``."""
    xp = namespace(L)
    q, d = L.shape[:2]
    return L if d == q else xp.concatenate([L, xp.zeros((q, q - d, *L.shape[2:]), L.dtype)], 1)


def _trapezoid(L: Array, d: int) -> Array:
    """The loadings, column by column, of ``L (q, r, B)`` of rank d or less; zero columns stand last."""
    xp = namespace(L)
    q = L.shape[0]
    lower = decompositions.lower_factor(L, rank_tolerance(L.dtype))
    zero = ~(lower != 0).any(0)
    order = xp.argsort(zero, axis=0, kind="stable") if xp is np else xp.argsort(zero, axis=0, stable=True)
    lower = xp.take_along_axis(lower, order[None], 1)
    rows, columns = places_of(q, d)
    return xp.stack([lower[int(i), int(j)] for i, j in zip(rows, columns, strict=True)])


def _misfit(L: Array, R: Array) -> Array:
    """``(B,)`` how far loadings are from correlations, and from leaving specific variances that are not negative."""
    xp = namespace(L, R)
    LL = linalg.matmul(L, linalg.transpose(L))
    off = (1.0 - np.eye(len(R)))[..., None]
    return xp.maximum(abs(off * (LL - R)).max((0, 1)), 0.1 * ((L * L).sum(1).max(0) - 1.0))


def _loadings(R: Array, d: int, once: bool, least: float) -> Array:
    """Loadings ``(q, d, B)`` whose products are the correlations ``R (q, q, B)``, or near them."""
    xp, B = namespace(R), R.shape[-1]
    found = _least_squares(R, d, _principal(R, d))
    left = _misfit(found, R)
    if once or (xp is np and (left <= least).all()):
        return found
    at = np.flatnonzero(left > least) if xp is np else np.arange(B)
    more = MORE[xp is np]
    own = xp.repeat(R[..., at], more, axis=-1)
    starts = np.random.default_rng(0).uniform(-1.0, 1.0, (len(R), d, more)) / np.sqrt(d)
    starts = _trapezoid(xp.tile(xp.asarray(starts, R.dtype), (1, 1, len(at))), d)
    others = _least_squares(own, d, starts)
    misfits = _misfit(others, own).reshape(len(at), more)
    best = xp.argmin(misfits, axis=1)
    others = others.reshape(len(R), d, len(at), more)
    chosen = xp.take_along_axis(others, best[None, None, :, None], 3)[..., 0]
    better = misfits.min(1) <= least
    chosen = xp.where(better, chosen, found[..., at])
    if xp is not np:
        return xp.where(left > least, chosen, found)
    found[..., at] = chosen
    return found


def _principal(R: Array, d: int) -> Array:
    """Loadings on principal factors, ``(n_loadings, B)``."""
    xp, q = namespace(R), R.shape[0]
    off = (1.0 - np.eye(q))[..., None]
    highest = abs(R * off).max(1)
    shifted = R * off + np.eye(q)[..., None] * highest[:, None]
    values, vectors = decompositions.eigh(shifted)
    roots = xp.sqrt(xp.maximum(values[::-1][:d], 1e-3))
    return _trapezoid(vectors[:, ::-1][:, :d] * roots[None], d)


def _least_squares(R: Array, d: int, x: Array) -> Array:
    """The loadings whose products are nearest to the correlations, those of effects with themselves left out (Harman &
    Jones 1966, Psychometrika 31), by Levenberg's and Marquardt's steps from ``x (n_loadings, B)``."""
    xp, q = namespace(R), R.shape[0]
    own = ReducedRank(q, d)
    pairs = np.array([j for j, (a, b) in enumerate(pairs_of(q)) if a < b])
    a, b = np.array(pairs_of(q)).T[:, pairs]

    def left(x: Array) -> Array:
        L = own.loadings(x)
        return (L[a] * L[b]).sum(1) - R[a, b]

    def step(_: Any, state: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        x, value, damping = state
        r, J = left(x), own.jacobian(x)[pairs]
        JJ = linalg.matmul(linalg.transpose(J), J)
        size = (JJ * np.eye(own.k)[..., None]).sum(0).max(0) + 1e-300
        M = JJ + (damping * size + 1e-15 * size) * np.eye(own.k)[..., None]
        trial = x - _solved(M, (J * r[:, None]).sum(0))
        new = (left(trial) ** 2).sum(0)
        better = new < value
        return xp.where(better, trial, x), xp.where(better, new, value), xp.where(better, 0.1, 4.0) * damping

    state = (x, (left(x) ** 2).sum(0), 1e-3 + 0.0 * x[0])
    if xp is np:
        for count in range(STEPS):
            before = state[1]
            state = step(count, state)
            if (before <= 1e-30).all():
                break
    else:
        state = fori_loop(STEPS, step, state, xp)
    return own.loadings(state[0])


def _solved(M: Array, r: Array) -> Array:
    """Equations ``(k, k, B)``, right-hand sides ``(k, B)``."""
    if namespace(M) is not np:
        return linalg.matmul(linalg.inverse_small(M), r[:, None])[:, 0]
    finite = np.isfinite(M).all((0, 1)) & np.isfinite(r).all(0)
    M = np.where(finite, M, np.eye(len(M))[..., None])
    found: np.ndarray = np.linalg.solve(np.moveaxis(M, -1, 0), r.T[..., None])[..., 0].T
    return found
