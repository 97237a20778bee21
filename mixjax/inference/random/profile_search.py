"""The ML deviance minimised with one parameter held, for many values, parameters and data sets in one batch of lanes.

Every problem is a lane with its own chart of the covariances (:mod:`mixjax.inference.random.held_parameter`), so that
one program serves all parameters. Products that data sets share, all but those with y, stay shared.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.covariance import Structure, pairs_of
from mixjax.covariance.names import name_of
from mixjax.decompositions import ROTATIONS_UP_TO
from mixjax.design import AnyArray
from mixjax.engine.lanes import Lanes
from mixjax.estimation.batch import Batch, one_lane
from mixjax.estimation.choice import chosen_engine
from mixjax.inference.random.held_parameter import Chart, Held, Start, charts_of
from mixjax.machine import LANES, Array, float64, jit, lanes_of, n_workers, namespace, silently
from mixjax.optimise import newton
from mixjax.optimise.results import Result
from mixjax.products.sizes import has_closed_form, in_lanes_held, is_small_held, most_dense_held
from mixjax.products.sums import CrossProducts, Layout, pad

# Lanes of one call: of one data set, where each problem has two, and of many data sets.
WIDTH, WIDE = 64, 256
# Numbers that the products of all lanes of a call may have together.
MOST_NUMBERS = 2**25
# Evaluations after which searches that go on are gathered in fewer calls.
SHORT, LONG = 16, 200


class Conditional(NamedTuple):
    """Conditional minima: of searches over all parameters but one, B times.

    Attributes:
        deviance: ``(B,)`` the least. converged: ``(B,)``.
        factors: per term ``(B, q, q)``, a factor of its relative covariance. sigma: ``(B,)``. beta: ``(B, p)``.
    """

    deviance: np.ndarray
    converged: np.ndarray
    factors: tuple[np.ndarray, ...]
    sigma: np.ndarray
    beta: np.ndarray

    def start(self) -> Start:
        """To begin other searches here."""
        return Start(self.factors, self.sigma)


def refusal(stats: CrossProducts, together: bool = False) -> str | None:
    """Why a model's deviance cannot be minimised here; None where it can.

    Args:
        together: many data sets at once, which needs charts of all covariance structures.
    """
    structures = stats.layout.structures
    for s in structures:
        if not s.has_charts and (together or not s.has_sections):
            return f"none are written for the covariance structure {name_of(s)!r}"
    if all(s.has_charts for s in structures):
        fits, most = has_closed_form(stats) or in_lanes_held(stats), most_dense_held(stats)
    else:
        fits, most = is_small_held(stats), most_dense_held(stats, one_by_one=True)
    return None if fits else f"more than {most} effects beside those of the largest factor"


def padded(stats: CrossProducts) -> CrossProducts:
    """One data set's products with a few shapes only, all but the largest factor in one dense block."""
    layout = stats.layout
    flat = Layout(layout.terms, layout.chain[:1], layout.chain[1:] + layout.dense, layout.pairs)
    return pad(replace(stats, layout=flat))


def estimates_start(theta: np.ndarray, sigma: np.ndarray, qs: tuple[int, ...]) -> Start:
    """The start at estimates ``theta (B, k)``, ``sigma (B,)``."""
    parts = np.split(np.asarray(theta), np.cumsum([cov.n_theta(q) for q in qs])[:-1], axis=1)
    factors = []
    for part, q in zip(parts, qs, strict=True):
        Lambda = np.zeros((len(part), q, q))
        Lambda[(slice(None), *cov.triangle(q))] = part
        factors.append(Lambda)
    return Start(tuple(factors), np.asarray(sigma, np.float64))


def far_start(stats: CrossProducts, sigma: np.ndarray) -> Start:
    """A start far from the estimates: uncorrelated effects of the bases, as variable as the residuals."""
    shapes = [(len(sigma), *np.shape(basis.R_inv)[-2:]) for basis in stats.Z_bases]
    factors = [np.broadcast_to(np.asarray(b.R_inv), shape) for b, shape in zip(stats.Z_bases, shapes, strict=True)]
    return Start(tuple(factors), sigma)


class OneDataSet:
    """Least deviances of one data set, each searched from the estimates and from far away."""

    def __init__(self, stats: CrossProducts, theta: np.ndarray, sigma: np.ndarray):
        """Args: theta ``(k,)``, sigma ``()``, the ML estimates."""
        self.stats = stats if in_lanes_held(stats) else padded(stats)
        sigma = np.asarray(sigma, np.float64)[None]
        self._starts = estimates_start(np.asarray(theta)[None], sigma, stats.layout.qs), far_start(stats, sigma)
        self._lanes = one_lane(self.stats, False)

    def minimise(self, problems: Sequence[tuple[Held, float]]) -> Conditional:
        """The better of the two searches for every parameter and value."""
        charts, order = [], []
        for held in dict.fromkeys(held for held, _ in problems):
            own = [n for n, problem in enumerate(problems) if problem[0] == held]
            start = jax.tree.map(lambda *leaves: np.concatenate(leaves * len(own)), *self._starts)  # noqa: B023
            charts.append(charts_of(self.stats, held, np.repeat([problems[n][1] for n in own], 2), start))
            order += own
        chart = jax.tree.map(lambda *leaves: np.concatenate(leaves, -1), *charts)
        found = _least(self.stats, self._lanes, chart, WIDTH, in_lanes_held(self.stats))
        best = 2 * np.arange(len(order)) + found.deviance.reshape(-1, 2).argmin(1)
        chosen: Conditional = jax.tree.map(lambda x: x[best[np.argsort(order)]], found)
        return chosen


def minimise_many(
    stats: CrossProducts, theta: np.ndarray, sigma: np.ndarray, held: Held, value: np.ndarray | float
) -> Conditional:
    """One parameter held in B data sets, each searched from its estimates and from far away.

    Args:
        stats: of B responses of one design, or of B data sets. theta, sigma: ``(B, k)``, ``(B,)``, estimates.
        value: ``(B,)`` or one value.
    """
    B = len(sigma)
    starts = (estimates_start(theta, sigma, stats.layout.qs), far_start(stats, np.asarray(sigma)))
    at_once = chosen_engine(stats, B) == "numpy"
    with float64():
        lanes = Batch(stats, at_once).lanes(slice(None), False)
    found = []
    for start in starts:
        chart = charts_of(stats, held, np.broadcast_to(np.asarray(value, np.float64), B), start)
        found.append(_least(stats, lanes, chart, WIDE, at_once))
    second = found[1].deviance < found[0].deviance

    def better(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.where(second.reshape(-1, *(1,) * (a.ndim - 1)), b, a)

    best: Conditional = jax.tree.map(better, *found)
    return best


# --- calls ----------------------------------------------------------------------------------------------------------


def _least(stats: CrossProducts, lanes: Lanes, chart: Chart, width: int, at_once: bool) -> Conditional:
    """Search every lane, in calls of at most ``width`` lanes."""
    if at_once:
        return conditional_of(stats, chart, _minimise_at_once(lanes, chart, LONG))
    B = chart.start.shape[-1]
    own = sum(a.size // B for a in jax.tree.leaves(lanes) if B > 1 and np.shape(a)[-1:] == (B,))
    width = int(max(2, min(width, 2 ** int(np.log2(max(2, MOST_NUMBERS // max(1, own)))))))

    def call(at: np.ndarray, limit: int) -> Found:
        index = np.append(at, np.repeat(at[-1], width - len(at)))
        with float64():  # the scope is each thread's own
            part = jax.tree.map(lambda a: a[..., index] if B > 1 and np.shape(a)[-1:] == (B,) else a, lanes)
            found = _minimise(part, jax.tree.map(lambda a: a[..., index], chart), limit)
            first: Found = jax.tree.map(lambda a: np.asarray(a)[..., : len(at)], found)
            return first

    def search(at: np.ndarray, limit: int) -> Found:
        calls = [at[i : i + width] for i in range(0, len(at), width)]
        # LAPACK's calls wait for the threads that they themselves occupy.
        workers = 1 if len(chart.start) > ROTATIONS_UP_TO else min(n_workers(), len(calls))
        if workers == 1:
            parts = [call(part, limit) for part in calls]
        else:
            with ThreadPoolExecutor(workers) as pool:
                parts = list(pool.map(lambda part: call(part, limit), calls))
        joined: Found = jax.tree.map(lambda *leaves: np.concatenate(leaves, -1), *parts)
        return joined

    several = width < B
    found = search(np.arange(B), SHORT if several else LONG)
    left = np.flatnonzero(found.result == int(Result.MAX_ITERATIONS))
    if several and len(left):
        chart = chart._replace(start=chart.start.copy())
        chart.start[:, left] = found.z[:, left]
        for whole, part in zip(jax.tree.leaves(found), jax.tree.leaves(search(left, LONG)), strict=True):
            whole[..., left] = part
    return conditional_of(stats, chart, found)


def conditional_of(stats: CrossProducts, chart: Chart, found: Found) -> Conditional:
    """On the scale of the user's columns."""
    finite = (found.result != int(Result.NOT_FINITE)) & np.isfinite(found.value)
    deviance = np.where(finite, found.value, np.inf)
    factors = [
        np.asarray(basis.R_inv) @ np.moveaxis(F, -1, 0) for basis, F in zip(stats.Z_bases, found.factors, strict=True)
    ]
    v, delta = chart.v.T, found.delta.T
    inside = delta - v * ((v * delta).sum(1) + chart.s)[:, None]
    beta = np.asarray(stats.beta0) + (np.asarray(stats.X_basis.R_inv) @ inside[..., None])[..., 0]
    return Conditional(deviance, found.result == int(Result.CONVERGED), tuple(factors), found.sigma, beta)


# --- the program ----------------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """Results with lanes last, in the bases of the products."""

    value: AnyArray
    result: AnyArray
    z: AnyArray
    factors: tuple[AnyArray, ...]
    sigma: AnyArray
    delta: AnyArray


@partial(jit, compiler_options=LANES)
def _minimise(lanes: Lanes, chart: Chart, limit: AnyArray) -> Found:
    chart = jax.tree.map(jnp.asarray, chart)
    lanes = jax.tree.map(jnp.asarray, lanes).turned(chart.v, chart.s)
    evaluate = partial(_evaluate, lanes=lanes, chart=chart)
    return _found(newton.minimise(evaluate, chart.start, None, limit, region_of(chart)), lanes, chart)


def _minimise_at_once(lanes: Lanes, chart: Chart, limit: int) -> Found:
    """By NumPy; lanes that are done are dropped where they are many."""
    B = chart.start.shape[-1]
    with silently():
        state = newton.begin(chart.start, region_of(chart))
        found = newton.Solution(*(np.array(a) for a in newton.solution_of(state)))
        at, own = np.arange(B), (lanes.turned(chart.v, chart.s), chart)
        while len(at):
            evaluate = partial(_evaluate, lanes=own[0], chart=own[1])
            state = newton.advance(state, evaluate, None, limit)
            left = np.flatnonzero(~state.done)
            if len(left) > 0.75 * len(at):
                continue
            for whole, part in zip(found, newton.solution_of(state), strict=True):
                whole[..., at] = part
            at = at[left]
            state = lanes_of(state, left)
            some, charts = lanes_of((lanes, chart), at, B) if B > 1 else (lanes, chart)
            own = some.turned(charts.v, charts.s), charts
        return _found(found, lanes.turned(chart.v, chart.s), chart)


def region_of(chart: Chart) -> Array:
    """The first trust regions ``(B,)``."""
    xp = namespace(chart.start)
    return 0.5 * xp.maximum(xp.sqrt((chart.start**2).sum(0)), 0.2)


def _found(solution: newton.Solution, lanes: Lanes, chart: Chart) -> Found:
    return found_of(solution, _factors(solution.x, chart, lanes.layout.structures), lanes, chart)


def found_of(solution: newton.Solution, factors: list[Array], lanes: Lanes, chart: Chart) -> Found:
    """What belongs to the minimum, of whose covariances these are ``factors``."""
    xp = namespace(chart.start)
    at = lanes.profiled(cov.near(factors, lanes.layout.structures))
    given = ~xp.isnan(chart.log_variance)
    variance = xp.exp(xp.where(given, chart.log_variance, 0.0)) / _held_variance(factors, chart)
    sigma = xp.sqrt(xp.where(given, variance, at.rss / lanes.moments.n))
    return Found(solution.value, solution.result, solution.x, tuple(factors), sigma, at.delta)


def _factors(z: Array, chart: Chart, structures: tuple[Structure, ...]) -> list[Array]:
    return [(M * part).sum(2) for M, part in zip(chart.maps, cov.cut(z, structures), strict=True)]


def _held_variance(factors: list[Array], chart: Chart) -> Array:
    """D_ii of the effect whose sd is held; 1 where it is none."""
    xp = namespace(*factors)
    d = sum(((F * row[:, None]).sum(0) ** 2).sum(0) for F, row in zip(factors, chart.row, strict=True))
    has_sd = sum((row**2).sum(0) for row in chart.row) > 0
    return xp.where(has_sd, d, 1.0)


def _evaluate(z: Array, lanes: Lanes, chart: Chart) -> tuple[Array, Array, Array]:
    xp = namespace(z, chart.start)
    factors = _factors(z, chart, lanes.layout.structures)
    at = at_entries(factors, lanes, chart)
    jacobian, curvature, start, k = [], [], 0, z.shape[0]
    column = 0
    for M, F in zip(chart.maps, factors, strict=True):
        q, own = len(F), M.shape[2]
        slopes = xp.stack(
            [(M[a] * F[b][:, None] + F[a][:, None] * M[b]).sum(0) for a, b in pairs_of(q)]
        )  # (pairs, k_t, B)
        jacobian.append(_amid(slopes, column, k, 1))
        along = [
            at.gradient[start + n] * ((M[a][:, :, None] * M[b][:, None] + M[b][:, :, None] * M[a][:, None]).sum(0))
            for n, (a, b) in enumerate(pairs_of(q))
        ]
        curvature.append(_amid(_amid(sum(along), column, k, 0), column, k, 1))
        start += q * (q + 1) // 2
        column += own
    g_z, H_z = by_coordinates(at, xp.concatenate(jacobian), sum(curvature))
    alive = chart.alive
    H_z = xp.where(alive[:, None] & alive, H_z, xp.eye(k, dtype=z.dtype)[..., None])
    outside = (chart.positive & (z <= 0)).any(0)
    return xp.where(outside, xp.inf, at.value), xp.where(alive, g_z, 0.0), H_z


class AtEntries(NamedTuple):
    """Value ``(B,)``, gradient ``(J, B)`` and Hessian ``(J, J, B)`` by the entries of D, sigma eliminated."""

    value: Array
    gradient: Array
    Hessian: Array


def at_entries(factors: list[Array], lanes: Lanes, chart: Chart) -> AtEntries:
    xp = namespace(*factors, chart.start)
    given = ~xp.isnan(chart.log_variance)
    # D_ii and its derivatives by the entries of D.
    d = _held_variance(factors, chart)
    d_D = xp.stack([row[a] * row[b] * (1.0 if a == b else 2.0) for row in chart.row for a, b in pairs_of(len(row))])
    fixed_variance = xp.exp(xp.where(given, chart.log_variance, 0.0)) / d
    at = lanes.deviance_at_sigma(factors, lambda profiled: xp.where(given, fixed_variance, profiled))
    g, H = at.gradient, at.Hessian
    g_D, g_s, H_DD, H_Ds, H_ss = g[:-1], g[-1], H[:-1, :-1], H[:-1, -1], H[-1, -1]
    s_D = xp.where(given, -d_D / d, -H_Ds / H_ss)  # how log sigma^2 moves with D
    s_DD = xp.where(given, d_D[:, None] * d_D / d**2, 0.0)
    gradient = g_D + xp.where(given, g_s, 0.0) * s_D
    Hessian = H_DD + H_Ds[:, None] * s_D + s_D[:, None] * H_Ds + H_ss * s_D[:, None] * s_D + g_s * s_DD
    return AtEntries(at.value, gradient, Hessian)


def by_coordinates(at: AtEntries, J: Array, curvature: Array) -> tuple[Array, Array]:
    """Gradient and Hessian by coordinates of which the entries of D have derivatives ``J (J, k, B)``, and ``curvature
    (k, k, B)`` along the gradient."""
    back = linalg.transpose(J)
    gradient = linalg.matmul(back, at.gradient[:, None])[:, 0]
    return gradient, linalg.matmul(back, linalg.matmul(at.Hessian, J)) + curvature


def _amid(x: Array, first: int, size: int, axis: int) -> Array:
    """Zeros around x along an axis, so that x begins at ``first`` of ``size``."""
    if x.shape[axis] == size:
        return x
    xp, own = namespace(x), x.shape[axis]
    before, after = (xp.zeros((*x.shape[:axis], w, *x.shape[axis + 1 :]), x.dtype) for w in (first, size - first - own))
    return xp.concatenate([before, x, after], axis)
