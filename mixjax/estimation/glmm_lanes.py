"""Many fits of one generalised linear mixed model: responses of one design in lanes.

As for linear models, direct Newton steps come first, tile by tile, over all parameters at once, with one inner step for
the modes each: the modes of the next point are foretold. Most replicates need no more than five. Those that do, for a
boundary, a saddle or a hard start, queue for the full search.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixjax import covariance as cov
from mixjax import decompositions, linalg
from mixjax.engine.effects import free_entries
from mixjax.engine.laplace_curvature import ClosedForm, closed_form, moved
from mixjax.engine.laplace_fit import (
    chain,
    covariances,
    cut,
    joint_Hessian,
    linalg_sum,
    newton_step,
    reduced,
)
from mixjax.engine.laplace_model import Model
from mixjax.engine.level_moments import LONGEST, moment_form, step_of_modes
from mixjax.estimation import search
from mixjax.estimation.glmm_start import covariance_start, far_of, fixed_start
from mixjax.machine import Array, lanes_of, namespace, while_loop
from mixjax.optimise.newton import (
    Solution,
    curvature_tolerance,
    foretold_distance,
    foretold_tolerance,
    gradient_tolerance,
    where,
)

# Steps of a tile at most, and the longest of them, relative to the coordinates of the covariances.
DIRECT_STEPS = 12
# A lane with a standard deviation below this, in the basis of Z, leaves the direct steps for the full search.
INSIDE = 0.05
# Where the inner step promised more than this, it is repeated before anything else moves.
EARLY = 1.0
# Twice what the inner step may still promise where a search ends: modes are then good to its square.
INNER = 1e-9


class Direct(NamedTuple):
    """Where direct searches stand; see :class:`mixjax.optimise.newton.Direct`.

    Attributes:
        x: ``(k, L)``. fixed: ``(p + s, L)``. v: ``(*effects, L)``, all of the next point. value, predicted, before,
        distance, iterations, going, converged: ``(L,)``. step: ``(p + s + k, L)`` Newton's last, of fixed and x, and
        Hessian: ``(p + s + k, p + s + k, L)`` by them, both at the last evaluation.
    """

    x: Array
    fixed: Array
    v: Array
    value: Array
    predicted: Array
    before: Array
    distance: Array
    iterations: Array
    going: Array
    converged: Array
    step: Array
    Hessian: Array


def begin(model: Model, lanes: int) -> Direct:
    """From the model without random effects, and moments of its scores."""
    xp = namespace(model.data.y)
    fixed = fixed_start(model, lanes)
    x = covariance_start(model, fixed)
    zero = xp.zeros(lanes, fixed.dtype)
    no = xp.zeros(lanes, bool)
    v = xp.zeros((*model.effects.effect_shape, lanes), fixed.dtype)
    size = len(fixed) + len(x)
    step, H = xp.zeros((size, lanes), fixed.dtype), xp.zeros((size, size, lanes), fixed.dtype)
    return Direct(x, fixed, v, zero + xp.inf, zero, zero, zero + xp.inf, xp.zeros(lanes, int), ~no, no, step, H)


def at_modes(
    model: Model, lambdas: list[Array], fixed: Array, v: Array, longest: Any
) -> tuple[Array, Array, Array, Any]:
    """One Newton step of the modes from ``b = D v``: v, b, twice what it promised ``(L,)``, and the row functions
    there, by their own derivatives: the densities are evaluated once."""
    effects, psi = model.effects, fixed[model.p :]
    b = effects.times_D(lambdas, v)
    at = model.derivatives(model.predictor(fixed, b), psi)
    gain = effects.gain(lambdas, effects.normal(at.by_eta[2]))
    g = -effects.effects(at.by_eta[1])
    new_v, new, inner = step_of_modes(effects, gain, g, b, v, longest)
    return new_v, new, inner, moved(at, effects.rows(new - b))


def _by_rows(model: Model, lambdas: list[Array], fixed: Array, v: Array, longest: Any) -> tuple[Any, ...]:
    """As :func:`~mixjax.engine.level_moments.moment_form`, by passing over the rows again and again."""
    v, b, inner, at = at_modes(model, lambdas, fixed, v, longest)
    expected = model.expected_curvature(model.predictor(fixed, b), fixed[model.p :]) if model.expected else None
    form = closed_form(model.effects, lambdas, model.data, at, expected, model.effects.unit_dots(v, b).sum(0))
    return v, inner, form


def probe(model: Model, x: Array, fixed: Array, v: Array, longest: Any = LONGEST) -> tuple[Array, Array, ClosedForm]:
    """One Newton step of the modes from ``b = D v``, and the closed form there: v, twice what the step promised, the
    form."""
    lambdas = cov.factors_of(x, model.layout.structures)
    if model.columns is None or model.expected:
        return _by_rows(model, lambdas, fixed, v, longest)
    v, _, inner, form = moment_form(model, lambdas, fixed, v, longest)
    return v, inner, form


def advance(model: Model, state: Direct, exact: bool = False) -> Direct:
    """One evaluation and Newton's step over all parameters; ``exact``: the last evaluation is at the minimum, not one
    step before. A lane gives up where that is not enough: see
    :func:`mixjax.optimise.newton.advance_directly`."""
    xp, n = namespace(state.x), model.n_fixed
    layout, dtype = model.layout, state.x.dtype
    x, fixed, v = state.x, state.fixed, state.v
    v, inner, form = probe(model, x, fixed, v)
    jacobian, curvature = chain(x, form.gradient[n:], layout)
    back = linalg.transpose(jacobian)
    g = xp.concatenate([form.gradient[:n], linalg.matmul(back, form.gradient[n:, None])[:, 0]])
    H_xx = linalg.matmul(back, linalg.matmul(form.Hessian[n:, n:], jacobian)) + curvature
    H_fx = linalg.matmul(form.Hessian[:n, n:], jacobian)
    H = xp.concatenate([
        xp.concatenate([form.Hessian[:n, :n], H_fx], 1), xp.concatenate([linalg.transpose(H_fx), H_xx], 1)
    ])  # fmt: skip
    f = form.value
    least = xp.sqrt(curvature_tolerance(dtype)) * xp.stack([H[i, i] for i in range(len(H))])
    definite = decompositions.is_positive(H - linalg.eye(len(H), H) * least)
    step = -linalg.matmul(linalg.inverse_logdet(H)[0], g[:, None])[:, 0]
    decrement = -(g * step).sum(0)
    distance = xp.sqrt(xp.maximum(decrement, 0.0))
    length = xp.sqrt((step[n:] ** 2).sum(0))
    part = xp.minimum(1.0, search.REGION * xp.maximum(xp.sqrt((x * x).sum(0)), 0.2) / length)
    if n:
        part = xp.minimum(part, cut(model, step[:n]))
    noise = 100 * np.finfo(dtype).eps * xp.maximum(1.0, xp.abs(f))
    # A value at modes that are not found yet is no value.
    sure = inner <= 1e-4
    fell = (state.value - f + noise > 1e-3 * (state.predicted + noise)) | ~sure
    early = inner > EARLY
    part = xp.where(early, 0.0, part)
    sound = definite & fell & xp.isfinite(f) & xp.isfinite(step).all(0)
    sound = xp.where(early, (inner < 1e3) & xp.isfinite(v).all(tuple(range(v.ndim - 1))), sound)
    step = xp.where(early, 0.0, step)
    next_x, next_fixed = x + part * step[n:], fixed + part * step[:n]
    D, next_D = (free_entries(covariances(own, layout)) for own in (x, next_x))
    change = xp.concatenate([part * step[:n], next_D - D])
    next_v = xp.where(early, v, v + linalg_sum(change, form.scores))
    plain = search.is_plain(next_x, layout.structures, least=INSIDE)
    foretold = xp.where(inner <= INNER, foretold_distance(distance, state.before), xp.inf)
    reached = (distance <= gradient_tolerance(dtype)) & (inner <= INNER)
    converged = reached if exact else reached | (foretold <= foretold_tolerance(dtype))
    converged = sound & plain & converged
    new = Direct(
        x=next_x, fixed=next_fixed, v=next_v,
        value=xp.where(converged & ~reached, f - 0.5 * decrement, xp.where(sure, f, xp.inf)),
        predicted=xp.where(sure, (part - 0.5 * part**2) * decrement, 0.0),
        before=xp.where((part < 1.0) | (inner > 1e-6), 0.0, distance),
        distance=xp.where(converged & ~reached, foretold, distance),
        iterations=state.iterations, going=sound & plain & ~converged, converged=converged, step=step, Hessian=H,
    )  # fmt: skip
    back_to = state._replace(going=xp.zeros_like(state.going))
    new = where(sound, new, back_to)._replace(iterations=state.iterations + 1)
    return where(state.going, new, state)


def directly(model: Model, lanes: int, exact: bool = False) -> Direct:
    """Direct steps until no lane of a tile goes on."""
    xp = namespace(model.data.y)

    def goes_on(carry: tuple[Any, Direct]) -> Array:
        return (carry[0] < DIRECT_STEPS) & carry[1].going.any()

    def step(carry: tuple[Any, Direct]) -> tuple[Any, Direct]:
        return carry[0] + 1, advance(model, carry[1], exact)

    start = (0 if xp is np else jnp.int32(0), begin(model, lanes))
    return while_loop(goes_on, step, start, xp)[1]  # type: ignore[no-any-return]


# --- the full search -------------------------------------------------------------------------------------------------


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


# Evaluations of a lane for one point of the outer search, beyond which it is lost; of all at most.
MOST_REFINED, MOST_TICKS = 30, 300
# Twice what the inner and the middle step promise where a point counts as evaluated, and at the end.
ENOUGH, ENOUGH_LAST = (1e-7, 1e-6), (1e-9, 1e-9)
# A lane whose modes overflow although their steps are shorter than this is lost.
LEAST_LONGEST = 0.1
# The middle search of a lane is in trouble where the value has risen by this much.
RISEN = 0.1

Prober = Callable[[Array, Array, Array, Array, np.ndarray], tuple[Array, Array, ClosedForm]]


class _Lane(NamedTuple):
    """What is carried beside the outer search, lane by lane.

    Attributes:
        fixed, v: where to evaluate next, at ``x (k, L)``. refined: ``(L,)`` evaluations of x so far. value, inner: the
            last ones. longest: step of the modes, halved where they swing.
        last: ``(L,)`` the outer search is done, and x is its end.
    """

    x: Array
    fixed: Array
    v: Array
    refined: Array
    value: Array
    longest: Array
    inner: Array
    last: Array


def search_lanes(model: Model, x: np.ndarray, fixed: np.ndarray, iterations: np.ndarray, prober: Prober) -> Ends:
    """The search of :func:`mixjax.estimation.search.advance` in lanes that do not wait for each other: in every round
    a lane either goes on at its point, until modes and fixed effects are found there, or takes a step of the outer
    search. By NumPy, but for ``prober(x, fixed, v, longest, lanes)``, which is :func:`probe` of some lanes.
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
    zeros = np.zeros(L)
    lane = _Lane(
        outer.state.trial,
        fixed,
        np.zeros((*shape, L)),
        zeros.astype(int),
        zeros + np.inf,
        zeros + LONGEST,
        zeros + np.inf,
        zeros > 0,
    )
    for _ in range(MOST_TICKS):
        v, inner, form = prober(lane.x, lane.fixed, lane.v, lane.longest, at)
        step, decrement = newton_step(model, form) if n else (lane.fixed, np.zeros(len(at)))
        finite = np.isfinite(form.value) & np.isfinite(form.gradient).all(0) & np.isfinite(decrement)
        finite = finite & np.isfinite(form.Hessian).all((0, 1)) & np.isfinite(v).all(tuple(range(v.ndim - 1)))
        enough = [np.where(lane.last, b, a) for a, b in zip(ENOUGH, ENOUGH_LAST, strict=True)]
        ready = finite & (inner <= enough[0]) & (decrement <= enough[1])
        risen = (lane.refined > 5) & (form.value > lane.value + RISEN) & (np.maximum(inner, lane.inner) < 1e-3)
        # Far from the modes the closed form says nothing, and need not be finite.
        near = inner < EARLY
        astray = ~np.isfinite(v).all(tuple(range(v.ndim - 1))) | ~np.isfinite(inner)
        hopeless = (near & ~finite) | (astray & (lane.longest < LEAST_LONGEST))
        lost = ~ready & (hopeless | risen | (lane.refined >= MOST_REFINED))

        # Lanes that stay at their point.
        move = np.where(near, cut(model, step) * step, 0.0) if n else step
        next_v = np.where(near, v + linalg_sum(move, form.scores[:n]), v) if n else v
        # Where densities overflow modes are sought from zero again, in shorter steps.
        next_v = np.where(astray, 0.0, next_v)
        swings = astray | ((inner > EARLY) & (inner > 0.7 * lane.inner))
        longest = np.where(swings, 0.5 * lane.longest, lane.longest)
        stay = _Lane(lane.x, lane.fixed + move, next_v, lane.refined + 1, form.value, longest, inner, lane.last)

        # Lanes that are evaluated.
        g, H, slopes = reduced(model, form, step)
        jacobian, curvature = chain(lane.x, g, model.layout)
        back = linalg.transpose(jacobian)
        evaluated = (
            form.value - 0.5 * decrement,
            linalg.matmul(back, g[:, None])[:, 0],
            linalg.matmul(back, linalg.matmul(H, jacobian)) + curvature,
        )
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
        )  # fmt: skip
        ended = (ready & lane.last) | lost
        if ended.any():
            joint = joint_Hessian(model, lane.x, form)
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


def _known(evaluated: tuple[Array, Array, Array], _: Array) -> tuple[Array, Array, Array]:
    """What the outer search would evaluate."""
    return evaluated


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
