"""The largest of several t statistics: multivariate t and studentized range, their tails and quantiles.

All t statistics of a family share one estimate of the standard deviation, so each distribution is that of normal
variables, mixed over the standard deviation. Tails are integrated as tails, without a difference from one, so that
small probabilities keep their digits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import NamedTuple

import numpy as np
from scipy.special import fdtrc, gammaincinv, log_ndtr, ndtr, ndtri

from mixjax.distributions import chi2_tail, t_quantile, t_tail

# Correlations that miss a structure by no more than this have it: probabilities then change by less than that.
SAME = 1e-9
# Loadings beyond this make a step of the integrand, which the trapezoidal rule would not see.
LARGEST_LOADING = 0.999
# Quasi-Monte Carlo: randomly shifted lattices, and the points of each; of large families fewer, which take as long.
SHIFTS, POINTS, FEWER, LARGE, SEED = 12, 8192, 2048, 64, 19990101
# Degrees of freedom at which quantiles are sought where a family has more; fewer where their inverses differ by less
# than NARROW, over which a quantile is a parabola to 1e-5.
NODES, FEWER_NODES, NARROW = 5, 3, 0.02


class Probability(NamedTuple):
    """Probabilities ``(n,)`` and their error: three standard errors of a quasi-Monte Carlo mean, else 0."""

    value: np.ndarray
    error: float


class LargestT:
    """``max |T_i|`` of t statistics with correlations ``R = B B'``.

    Of one or two dimensions, and where ``R_ij = l_i l_j`` off the diagonal (Dunnett's comparisons of uncorrelated or
    exchangeable means; Dunnett 1955, J. Am. Stat. Assoc. 50, 1096): by integrals, to about 1e-10. Any other: variables
    one after the other given those before, over randomly shifted lattices with a fixed seed (Genz & Bretz 1999,
    J. Stat. Comput. Simul. 63, 361; for singular R Genz & Kwong 2000, same journal 68, 1), to 1e-4, or 1e-3 in
    large families.

    Args:
        B: ``(m, d)`` with rows of unit length.
    """

    def __init__(self, B: np.ndarray):
        _, sizes, Vt = np.linalg.svd(B, full_matrices=False)
        rank = int((sizes > 1e-7 * sizes[0]).sum())
        self.B = _different(B @ Vt[:rank].T)
        self.rank = rank
        self.loadings = _loadings(self.B @ self.B.T) if rank > 2 else None
        self._scales: dict[float, np.ndarray] = {}
        self._tests = 0.7 * len(self.B)  # independent ones that the family is worth, as far as is known

    @property
    def is_exact(self) -> bool:
        """No quasi-Monte Carlo."""
        return self.rank <= 2 or self.loadings is not None

    def tail(self, t: np.ndarray, df: np.ndarray) -> Probability:
        """``P(max |T_i| > t)``, ``(n,)``, every value with its own degrees of freedom."""
        t, df = np.broadcast_arrays(np.abs(np.asarray(t, float)), np.asarray(df, float))
        found = [self._tail(float(a), float(b)) for a, b in zip(t, df, strict=True)]
        return Probability(np.array([p for p, _ in found]), max((error for _, error in found), default=0.0))

    def quantiles(self, level: float, df: np.ndarray) -> np.ndarray:
        """Quantiles ``(n,)``. Of many different df by lattices: a polynomial in 1 / df through some of them, which is
        off by much less than the lattices are."""
        df = np.asarray(df, float)
        different = {f"{d:.11g}": float(d) for d in df}  # roundings apart they are the same
        low, high = (1.0 / df).min(), (1.0 / df).max()
        n = FEWER_NODES if high - low < NARROW else NODES
        if self.is_exact or len(different) <= n:
            found = {key: self.quantile(level, d) for key, d in different.items()}
            return np.array([found[f"{d:.11g}"] for d in df])
        x = np.cos(np.pi * np.arange(n) / (n - 1))
        nodes = (low + high) / 2.0 + (high - low) / 2.0 * x
        c = [self.quantile(level, 1.0 / node if node > 0 else np.inf) for node in np.maximum(nodes, 0.0)]
        return np.polyval(np.polyfit(x, c, n - 1), (2.0 / df - low - high) / (high - low))

    def quantile(self, level: float, df: float) -> float:
        """c with ``P(max |T_i| <= c) = level``."""
        if self.is_exact or not df > 0:
            return _root(lambda c: self._tail(c, df)[0], level, df, len(self.B))
        found = self._by_number_of_tests(level, df)
        return _root(lambda c: self._tail(c, df)[0], level, df, len(self.B), 1e-6) if found is None else found

    def _by_number_of_tests(self, level: float, df: float) -> float | None:
        """The quantile, in three or four evaluations of the tail, because a lattice takes long.

        A family is worth m independent tests, ``1 - (1 - p)^m`` being its tail and p that of one. Where the tail is
        known at c, so is m, which hardly depends on c: m gives a better c, and so on. None if that does not settle.
        """
        c = self._of_tests(self._tests, level, df)
        before = np.inf
        for _ in range(12):
            one, family = 2.0 * float(t_tail(c, df)), self._tail(c, df)[0]
            if not 0.0 < one <= family < 1.0:
                return None
            self._tests = np.log1p(-family) / np.log1p(-one)
            better = self._of_tests(self._tests, level, df)
            step = better - c
            if abs(step) <= 1e-5 * better:
                return better
            ratio = step / before  # of a geometric series, whose sum is taken
            c, before = c + step / (1.0 - ratio) if abs(ratio) < 0.9 else better, step
        return None

    def _of_tests(self, m: float, level: float, df: float) -> float:
        """What the largest of m independent t statistics exceeds with probability ``1 - level``."""
        return float(t_quantile(1.0 + np.expm1(np.log(level) / m) / 2.0, df))

    def _tail(self, t: float, df: float) -> tuple[float, float]:
        if not np.isfinite(t) or not df > 0:
            return (0.0 if np.isinf(t) and df > 0 else np.nan), 0.0
        one = 2.0 * float(t_tail(t, df))
        if self.rank == 1 or t == 0.0:
            return one, 0.0
        if self.rank == 2:
            p, error = self._by_angles(t, df), 0.0
        elif self.loadings is not None:
            loadings = self.loadings
            p, error = mixed(lambda x: one_factor_tail(x, loadings), t, df), 0.0
        else:
            p, error = self._by_lattices(t, df)
        return float(np.clip(p, one, min(1.0, len(self.B) * one))), error

    def _by_angles(self, t: float, df: float) -> float:
        """Two dimensions: the largest is ``r cos`` of the angle to the nearest line of the ``B_i``."""
        angle = np.sort(np.arctan2(self.B[:, 1], self.B[:, 0]) % np.pi)
        gap = np.diff(angle, append=angle[0] + np.pi) / 2.0
        nodes, weights = np.polynomial.legendre.leggauss(60)
        phi = gap[:, None] * (nodes + 1.0) / 2.0
        inside = _radius_tail(t / np.cos(phi), 2, df) * weights
        return float((gap / 2.0 * inside.sum(axis=1)).sum() * 2.0 / np.pi)

    def _by_lattices(self, t: float, df: float) -> tuple[float, float]:
        """``1 - E prod_j (1 - q_j)``, q_j the probability that a variable leaves its interval, given those before."""
        u, C, d = self._lattices, self._triangle, self.rank
        if df not in self._scales:
            chi = np.sqrt(2.0 / df * gammaincinv(df / 2.0, u[0])) if np.isfinite(df) else np.ones(u.shape[1])
            self._scales = {df: chi}  # of one df at a time, because they are many numbers
        x = t * self._scales[df]
        last = d - 1 - np.argmax(C[:, ::-1] != 0.0, axis=1)
        z = np.zeros((d - 1, u.shape[1]))
        inside = np.zeros(u.shape[1])
        for j in range(d):
            low, high = np.full_like(x, -np.inf), np.full_like(x, np.inf)
            for row in C[last == j]:
                centre, half = -(row[:j] @ z[:j]) / row[j], x / abs(row[j])
                low, high = np.maximum(low, centre - half), np.minimum(high, centre + half)
            below = ndtr(low)
            leaves = np.minimum(below + ndtr(-high), 1.0)
            with np.errstate(divide="ignore"):
                inside += np.log1p(-leaves)
            if j < d - 1:
                z[j] = ndtri(np.clip(below + u[j + 1] * (1.0 - leaves), 1e-300, 1.0 - 1e-16))
        means = -np.expm1(inside).reshape(SHIFTS, -1).mean(axis=1)
        return float(means.mean()), float(3.0 * means.std(ddof=1) / np.sqrt(SHIFTS))

    @cached_property
    def _triangle(self) -> np.ndarray:
        """``(m, d)`` lower trapezoid C, ``C C' = R``, rows in the order of pivots."""
        order: list[int] = []
        rest = self.B.copy()
        directions = []
        for _ in range(self.rank):
            order.append(int(np.argmax((rest**2).sum(axis=1))))
            directions.append(rest[order[-1]] / np.linalg.norm(rest[order[-1]]))
            rest = rest - np.outer(rest @ directions[-1], directions[-1])
        C = self.B @ np.array(directions).T
        return np.where(np.abs(C) < 1e-9, 0.0, C)

    @cached_property
    def _lattices(self) -> np.ndarray:
        """``(d, shifts * points)`` in the unit cube."""
        shifts = np.random.default_rng(SEED).random((SHIFTS, 1, self.rank))
        points = FEWER if self.B.size > LARGE else POINTS
        lattice = np.arange(1, points + 1)[:, None] * np.sqrt(_primes(self.rank))
        u = np.abs(2.0 * ((lattice + shifts) % 1.0) - 1.0)  # the tent makes the integrand periodic
        return np.ascontiguousarray(u.reshape(-1, self.rank).T)


def one_factor_tail(x: np.ndarray, loadings: np.ndarray) -> np.ndarray:
    """``P(max |Z_i| > x)``, ``(n,)``, for normal variables with correlations ``l_i l_j``."""
    rest = np.sqrt(1.0 - loadings**2)
    h = 0.2 / np.sqrt(1.0 + np.max((loadings / rest) ** 2))
    u = np.arange(-12.0, 12.0 + h, h)
    density = np.exp(-(u**2) / 2.0) * (h / np.sqrt(2.0 * np.pi))
    shifted = loadings[:, None] * u
    none = np.zeros((len(x), len(u)))
    for one, scale in zip(shifted, rest, strict=True):
        beyond = ndtr(-(x[:, None] - one) / scale) + ndtr(-(x[:, None] + one) / scale)
        with np.errstate(divide="ignore"):
            none += np.log1p(-np.minimum(beyond, 1.0))
    tail: np.ndarray = -np.expm1(none) @ density
    return tail


def range_tail(x: np.ndarray, k: int) -> np.ndarray:
    """``P(range > x)``, ``(n,)``, of k independent standard normal variables."""
    h = 0.1
    z = np.arange(-9.0, 24.0, h)  # the largest of them
    density = np.exp(-(z**2) / 2.0 + (k - 1) * log_ndtr(z)) * (k * h / np.sqrt(2.0 * np.pi))
    with np.errstate(divide="ignore"):
        all_near = (k - 1) * np.log1p(-np.exp(np.minimum(log_ndtr(z - x[:, None]) - log_ndtr(z), 0.0)))
    tail: np.ndarray = -np.expm1(all_near) @ density
    return tail


def studentized_range_tail(q: np.ndarray, k: int, df: np.ndarray) -> np.ndarray:
    """``P(Q > q)``, ``(n,)``, of the studentized range of k means."""
    q, df = np.broadcast_arrays(np.asarray(q, float), np.asarray(df, float))
    found = [_range_of(float(a) / np.sqrt(2.0), k, float(b)) for a, b in zip(q, df, strict=True)]
    return np.array(found)


def studentized_range_quantile(level: float, k: int, df: float) -> float:
    """q with ``P(Q <= q) = level``."""
    q: float = np.sqrt(2.0) * _root(lambda t: _range_of(t, k, df), level, df, k * (k - 1) // 2)
    return q


def _range_of(t: float, k: int, df: float) -> float:
    """Of the largest of all pairwise t statistics."""
    if not np.isfinite(t) or not df > 0:
        return 0.0 if np.isinf(t) and df > 0 else np.nan
    one = 2.0 * float(t_tail(t, df))
    if k == 2:
        return one
    p = mixed(lambda x: range_tail(np.sqrt(2.0) * x, k), t, df)
    return float(np.clip(p, one, min(1.0, k * (k - 1) / 2 * one)))


def mixed(normal_tail: Callable[[np.ndarray], np.ndarray], t: float, df: float) -> float:
    """``E tail(t s)`` over ``s = chi_df / sqrt(df)``, by the trapezoidal rule in log s, which has no edges there."""
    if np.isinf(df):
        return float(normal_tail(np.array([t]))[0])
    h = min(0.15, 0.35 / np.sqrt(df))
    w = np.arange(-40.0 / df - 9.0 / np.sqrt(df), min(9.0 / np.sqrt(df), 1.6) + h, h)
    log_density = df * w - df * np.expm1(2.0 * w) / 2.0
    weight = np.exp(log_density)
    keep = weight > 1e-19
    return float(weight[keep] @ normal_tail(t * np.exp(w[keep])) / weight.sum())


# --- parts -------------------------------------------------------------------------------------------------------


def _radius_tail(r: np.ndarray, d: int, df: float) -> np.ndarray:
    """``P(|z| / s > r)`` of d normal variables."""
    return np.asarray(chi2_tail(r**2, d) if np.isinf(df) else fdtrc(d, df, r**2 / d))


def _different(B: np.ndarray) -> np.ndarray:
    """Rows that are not each other, nor each other's negatives."""
    kept: list[np.ndarray] = []
    for row in B:
        if not any(1.0 - abs(row @ other) < SAME for other in kept):
            kept.append(row)
    return np.array(kept)


def _loadings(R: np.ndarray) -> np.ndarray | None:
    """``(m,)`` l with ``R_ij = l_i l_j`` off the diagonal, or None."""
    off = R - np.diag(np.diag(R))
    loadings = np.zeros(len(R))
    some = np.flatnonzero(np.abs(off).max(axis=1) > SAME)
    if len(some) == 2:
        i, j = some
        loadings[[i, j]] = np.sqrt(abs(off[i, j])) * np.array([1.0, np.sign(off[i, j])])
    elif len(some) > 2:
        i, j = np.unravel_index(np.argmax(np.abs(off)), off.shape)
        k = max((k for k in some if k not in (i, j)), key=lambda k: abs(off[i, k] * off[j, k]))
        if abs(off[j, k]) <= SAME:
            return None
        loadings[i] = np.sqrt(abs(off[i, j] * off[i, k] / off[j, k]))
        if loadings[i] <= SAME:
            return None
        others = np.arange(len(R)) != i
        loadings[others] = off[i, others] / loadings[i]
    product = np.outer(loadings, loadings)
    np.fill_diagonal(product, 0.0)
    return loadings if np.abs(product - off).max() < SAME and np.abs(loadings).max() < LARGEST_LOADING else None


def _root(tail: Callable[[float], float], level: float, df: float, m: int, tolerance: float = 1e-13) -> float:
    """Between the quantile of one t statistic and Bonferroni's of m."""
    if not df > 0:
        return np.nan
    from scipy.optimize import brentq

    alpha = 1.0 - level
    low, high = float(t_quantile(1.0 - alpha / 2.0, df)), float(t_quantile(1.0 - alpha / (2.0 * m), df))
    if high - low <= 1e-12 * high or tail(low) <= alpha:
        return low
    if tail(high) >= alpha:
        return high
    return float(brentq(lambda c: np.log(tail(c) / alpha), low, high, xtol=tolerance * high, rtol=1e-13))


def _primes(n: int) -> np.ndarray:
    found: list[int] = []
    candidate = 2
    while len(found) < n:
        if all(candidate % p for p in found):
            found.append(candidate)
        candidate += 1
    return np.array(found, float)
