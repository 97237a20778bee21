"""The full search of many fits of one generalised linear mixed model, in lanes that do not wait for each other."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from mixjax import linalg
from mixjax.engine.effects import free_entries
from mixjax.engine.laplace_curvature import ClosedForm
from mixjax.engine.laplace_fit import (
    chain,
    covariances,
    cut,
    inverse_among_fixed,
    joint_Hessian,
    linalg_sum,
    newton_step,
    reduced,
)
from mixjax.engine.laplace_model import Model
from mixjax.engine.level_moments import LONGEST
from mixjax.estimation import search
from mixjax.estimation.glmm import ENDLESS, is_flat
from mixjax.estimation.glmm_lanes import Secant, early_of
from mixjax.estimation.glmm_quadrature import zero_roots
from mixjax.estimation.glmm_start import far_of
from mixjax.machine import Array, lanes_of
from mixjax.optimise.newton import Solution, where
from mixjax.optimise.results import Result


class Ends(NamedTuple):
    """Where full searches ended: the solutions, and at them ``fixed``, ``v``, the value ``(L,)``, the joint Hessian,
    the last Newton step of fixed and x, and ``lost (L,)``: a lane that needs a search with more care."""

    solution: Solution
    fixed: Array
    v: Array
    value: Array
    Hessian: Array
    step: Array
    lost: Array


SOLUTIONS = tuple(int(code) for code in Result if code.is_solution)
# Evaluations of a lane for one point of the outer search, beyond which it is lost; of all at most.
MOST_REFINED, MOST_TICKS = 30, 300
# Twice what the inner and the middle step promise where a point counts as evaluated: near the end, far away where the
# outer search gains 1 or more, and at the end itself.
ENOUGH, ENOUGH_FAR, ENOUGH_LAST = (1e-7, 1e-6), (1e-3, 1e-2), (1e-9, 1e-9)
# A lane whose modes overflow although their steps are shorter than this is lost.
LEAST_LONGEST = 0.1
# The middle search of a lane is in trouble where the value has risen by this much.
RISEN = 0.1
# Modes that were foretold for a point and promise more than this there are sought from zero; and fixed effects go back
# to those of the point before where so many evaluations have not brought the modes near.
WILD, PATIENCE = 100.0, 10

Prober = Callable[[Array, Array, Array, Array, np.ndarray], tuple[Any, ...]]


class _Lane(NamedTuple):
    """What is carried beside the outer search, lane by lane.

    Attributes:
        fixed, v: where to evaluate next, at ``x (k, L)``. refined: ``(L,)`` evaluations of x so far. value, inner: the
            last ones. longest: step of the modes, halved where they swing.
        last: ``(L,)`` the outer search is done, and x is its end. secant: of quadrature, else None. safe: ``fixed`` at
            the point before.
    """

    x: Array
    fixed: Array
    v: Array
    refined: Array
    value: Array
    longest: Array
    inner: Array
    last: Array
    safe: Array
    secant: Secant | None = None


class _Quadrature(NamedTuple):
    """Laplace's form with what quadrature adds by fixed, and the profiled objective by x: as
    :func:`mixjax.engine.laplace_fit.reduced` and the chain to x give it without."""

    form: ClosedForm
    joint: Array
    slope: Array
    secant: Secant

    def profiled(self, model: Model, step: Array) -> tuple[Array, Array]:
        """Gradient ``(k, L)`` and Hessian ``(k, k, L)`` by x, fixed profiled out by Newton's step."""
        n, H = model.n_fixed, self.joint
        if not n:
            return self.slope, H
        slopes = -linalg.matmul(inverse_among_fixed(model, self.form), H[:n, n:])
        gradient = self.slope[n:] + linalg.matmul(H[n:, :n], step[:, None])[:, 0]
        return gradient, H[n:, n:] + linalg.matmul(H[n:, :n], slopes)


def _with_quadrature(
    model: Model, lane: _Lane, form: ClosedForm, inner: Array, value: Array, slope: Array
) -> _Quadrature:
    """Args: value, slope: what quadrature adds, ``(L,)`` and ``(p + s + k, L)``."""
    n, secant = model.n_fixed, lane.secant
    assert secant is not None
    even = np.concatenate([np.zeros((n, len(inner)), bool), zero_roots(lane.x, model.layout)])
    slope = np.where(even, 0.0, slope)
    H = joint_Hessian(model, lane.x, form)
    scale = np.sqrt(np.abs(np.stack([H[i, i] for i in range(len(H))])))
    sure = (inner <= 1e-4) & np.isfinite(slope).all(0) & np.isfinite(H).all((0, 1))
    secant = secant.updated(np.concatenate([lane.fixed, lane.x]), slope, scale, sure)
    E = np.where(even[:, None] != even[None], 0.0, secant.Hessian)
    jacobian, _ = chain(lane.x, form.gradient[n:], model.layout)
    by_x = linalg.matmul(linalg.transpose(jacobian), form.gradient[n:, None])[:, 0]
    within = np.array(form.Hessian)
    within[:n, :n] += E[:n, :n]
    gradient = np.concatenate([form.gradient[:n] + slope[:n], form.gradient[n:]])
    new = form._replace(value=form.value + value, gradient=gradient, Hessian=within)
    return _Quadrature(new, H + E, np.concatenate([gradient[:n], by_x + slope[n:]]), secant)


def search_lanes(
    model: Model, x: np.ndarray, fixed: np.ndarray, v: np.ndarray, iterations: np.ndarray, prober: Prober,
    by_quadrature: bool = False,
) -> Ends:  # fmt: skip
    """The search of :func:`mixjax.estimation.search.advance` in lanes that do not wait for each other: in every round
    a lane either goes on at its point, until modes and fixed effects are found there, or takes a step of the outer
    search. By NumPy, but for ``prober(x, fixed, v, longest, lanes)``, which is :func:`probe` of some lanes, or
    :func:`probe_by_quadrature`.
    """
    structures, n, L = model.layout.structures, model.n_fixed, x.shape[1]
    shape = model.effects.effect_shape
    empty = Ends(
        search.begin(np.zeros_like(x), structures).best, np.zeros_like(fixed), np.zeros((*shape, L)), np.zeros(L),
        np.zeros((n + len(x), n + len(x), L)), np.zeros((n + len(x), L)), np.ones(L, bool),
    )  # fmt: skip
    found: Ends = jax.tree.map(lambda a: np.array(a, order="C"), empty)
    at = np.arange(L)
    outer = search.begin(x, structures, iterations)
    zeros, early = np.zeros(L), early_of(model)
    lane = _Lane(
        outer.state.trial,
        fixed,
        v,
        zeros.astype(int),
        zeros + np.inf,
        zeros + LONGEST,
        zeros + np.inf,
        zeros > 0,
        fixed,
        _no_secant(n + len(x), L) if by_quadrature else None,
    )
    for _ in range(MOST_TICKS):
        v, inner, form, *extra = prober(lane.x, lane.fixed, lane.v, lane.longest, at)
        quadrature = _with_quadrature(model, lane, form, inner, *extra) if by_quadrature else None
        secant = None
        if quadrature is not None:
            form, secant = quadrature.form, quadrature.secant
        step, decrement = newton_step(model, form) if n else (lane.fixed, np.zeros(len(at)))
        finite = np.isfinite(form.value) & np.isfinite(form.gradient).all(0) & np.isfinite(decrement)
        finite = finite & np.isfinite(form.Hessian).all((0, 1)) & np.isfinite(v).all(tuple(range(v.ndim - 1)))
        enough = _enough(outer, lane.last)
        ready = finite & (inner <= enough[0]) & (decrement <= enough[1])
        risen = (lane.refined > 5) & (form.value > lane.value + RISEN) & (np.maximum(inner, lane.inner) < 1e-3)
        # Far from the modes the closed form says nothing, and need not be finite.
        near = inner < early
        astray = ~np.isfinite(v).all(tuple(range(v.ndim - 1))) | ~np.isfinite(inner)
        hopeless = (near & ~finite) | (astray & (lane.longest < LEAST_LONGEST))
        lost = ~ready & (hopeless | risen | (lane.refined >= MOST_REFINED))

        # Lanes that stay at their point.
        move = np.where(near, cut(model, step) * step, 0.0) if n else step
        next_v = np.where(near, v + linalg_sum(move, form.scores[:n]), v) if n else v
        # Where densities overflow modes are sought from zero again, in shorter steps.
        back = (lane.refined == PATIENCE) & ~near
        wild = back | ((lane.refined == 0) & (inner > WILD))
        next_v = np.where(astray | wild, 0.0, next_v)
        swings = astray | ((inner > early) & (inner > 0.7 * lane.inner))
        longest = np.where(wild, LONGEST, np.where(swings, 0.5 * lane.longest, lane.longest))
        stay = _Lane(lane.x, np.where(back, lane.safe, lane.fixed + move), next_v, lane.refined + 1, form.value,
                     longest, inner, lane.last, lane.safe, secant)  # fmt: skip

        # Lanes that are evaluated.
        g, H, slopes = reduced(model, form, step)
        jacobian, curvature = chain(lane.x, g, model.layout)
        back = linalg.transpose(jacobian)
        if quadrature is None:
            by_x = linalg.matmul(back, g[:, None])[:, 0], linalg.matmul(back, linalg.matmul(H, jacobian)) + curvature
        else:
            by_x = quadrature.profiled(model, step)
        evaluated = (form.value - 0.5 * decrement, *by_x)
        again = outer.again
        outer = where(
            ready & ~lane.last, search.advance(outer, partial(_known, evaluated), structures, far=far_of(model)), outer
        )
        restarted = outer.again & ~again
        next_x = np.where(outer.done, outer.best.x, outer.state.trial)
        D, next_D = (free_entries(covariances(own, model.layout)) for own in (lane.x, next_x))
        change = next_D - D
        moved_ = step + (slopes * change[None]).sum(1)
        if n:
            moved_ = cut(model, moved_) * moved_
        new_v = v + linalg_sum(np.concatenate([moved_, change]), form.scores)
        far = restarted | (np.abs(change).max(0) > 2.0)
        goes = _Lane(
            next_x, lane.fixed + np.where(far, step, moved_), np.where(far, 0.0, new_v), np.zeros(len(at), int),
            np.full(len(at), np.inf), np.full(len(at), LONGEST), np.full(len(at), np.inf), outer.done,
            lane.fixed + step,
            None if secant is None else where(restarted, _no_secant(len(secant.at), len(at)), secant),
        )  # fmt: skip
        ended = (ready & lane.last) | lost
        if ended.any():
            joint = joint_Hessian(model, lane.x, form) if quadrature is None else quadrature.joint
            gradient = np.concatenate([form.gradient[:n], evaluated[1]])
            last = -solve_free(joint, gradient[:, None], outer.best.free, n)[:, 0]
            own = Ends(outer.best, lane.fixed + step, v, evaluated[0], joint, last, lost)
            for whole, part in zip(jax.tree.leaves(found), jax.tree.leaves(own), strict=True):
                whole[..., at[ended]] = part[..., ended]
        lane = where(ready, goes, stay)
        still = np.flatnonzero(~ended)
        if not len(still):
            break
        if len(still) < len(at):
            at, outer, lane = at[still], lanes_of(outer, still, len(at)), lanes_of(lane, still, len(at))
    return found


def _enough(outer: search.Search, last: np.ndarray) -> list[np.ndarray]:
    """See :data:`ENOUGH`, lane by lane: a step of the outer search that promises much, and its first point, need no
    more digits than what they promise has; candidates and ends need all."""
    state = outer.state
    promised = np.where(state.iterations == 0, 1.0, np.where(state.candidate < 0, state.predicted, 0.0))
    part = np.clip(promised, 0.0, 1.0) ** 2
    return [
        np.where(last, end, np.maximum(least, most * part))
        for least, most, end in zip(ENOUGH, ENOUGH_FAR, ENOUGH_LAST, strict=True)
    ]


def _no_secant(size: int, lanes: int) -> Secant:
    zero = np.zeros((size, lanes))
    return Secant(zero, zero, np.zeros((size, size, lanes)), np.zeros(lanes, bool))


def _known(evaluated: tuple[Array, Array, Array], _: Array) -> tuple[Array, Array, Array]:
    """What the outer search would evaluate."""
    return evaluated


def endless(
    model: Model, Q: np.ndarray, step: np.ndarray, x: np.ndarray, free: np.ndarray, code: np.ndarray, H: np.ndarray
) -> np.ndarray:
    """Codes ``(L,)`` of ends, some of which run to infinity: see :func:`mixjax.estimation.glmm._endless`.

    Args:
        Q: ``(n, p)`` columns of X. step: ``(p + s + k, L)`` Newton's last. x, free: ``(k, L)``. code: ``(L,)``.
        H: ``(p + s + k, p + s + k, L)``.
    """
    n, p = model.n_fixed, model.p
    eta = np.abs(Q @ step[:p]).max(0, initial=0.0)
    psi = np.abs(step[p:n]).max(0, initial=0.0)
    far = ((np.abs(step[n:]) > ENDLESS * np.maximum(1.0, np.abs(x))) & free).any(0)
    solved = np.isin(code, SOLUTIONS)
    code = np.where(solved & ((psi > ENDLESS) | far), int(Result.UNBOUNDED), code)
    inverse = solve_free(H, np.broadcast_to(np.eye(len(H))[..., None], H.shape), free, n)
    separated = (eta > ENDLESS * model.unit) | is_flat(model, inverse)
    return np.asarray(np.where(solved & separated, int(Result.SEPARATED), code))


def solve_free(H: np.ndarray, rhs: np.ndarray, free: np.ndarray, n: int) -> np.ndarray:
    """``H^{-1} rhs (T, r, L)`` among fixed and the coordinates that are free; NaN where H is singular."""
    among = np.concatenate([np.ones((n, free.shape[1]), bool), free])
    H = np.where(among[:, None] & among[None], H, linalg.eye(len(H), H))
    try:
        found = np.linalg.solve(np.moveaxis(H, -1, 0), np.moveaxis(rhs * among[:, None], -1, 0))
    except np.linalg.LinAlgError:
        found = np.full((H.shape[-1], *rhs.shape[:2]), np.nan)
    solved: np.ndarray = np.moveaxis(found, 0, -1) * among[:, None]
    return solved
