"""Many fits of one generalised linear mixed model: responses of one design in lanes.

As for linear models, direct Newton steps come first, tile by tile, over all parameters at once, with one inner step for
the modes each: the modes of the next point are foretold. Most replicates need no more than five. Those that do, for a
boundary, a saddle or a hard start, queue for the full search.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mixjax import covariance as cov
from mixjax import decompositions, linalg
from mixjax.engine.effects import free_entries
from mixjax.engine.laplace_curvature import closed_form, moved
from mixjax.engine.laplace_fit import (
    chain,
    covariances,
    cut,
    linalg_sum,
)
from mixjax.engine.laplace_model import Model
from mixjax.engine.level_moments import moment_form
from mixjax.estimation import search
from mixjax.estimation.glmm_start import covariance_start, fixed_start
from mixjax.machine import Array, namespace, while_loop
from mixjax.optimise.newton import (
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


def at_modes(model: Model, lambdas: list[Array], fixed: Array, v: Array) -> tuple[Array, Array, Array, Any]:
    """One Newton step of the modes from ``b = D v``: v, b, twice what it promised ``(L,)``, and the row functions
    there, by their own derivatives: the densities are evaluated once."""
    effects, psi = model.effects, fixed[model.p :]
    b = effects.times_D(lambdas, v)
    at = model.derivatives(model.predictor(fixed, b), psi)
    gain = effects.gain(lambdas, effects.normal(at.by_eta[2]))
    g = -effects.effects(at.by_eta[1])
    r = gain.times_A(b) + g
    new = gain.solve(r)
    new_v = r - gain.times_A(new)
    return new_v, new, effects.unit_dots(g - v, new - b).sum(0), moved(at, effects.rows(new - b))


def _by_rows(model: Model, lambdas: list[Array], fixed: Array, v: Array) -> tuple[Any, ...]:
    """As :func:`~mixjax.engine.level_moments.moment_form`, by passing over the rows again and again."""
    v, b, inner, at = at_modes(model, lambdas, fixed, v)
    expected = model.expected_curvature(model.predictor(fixed, b), fixed[model.p :]) if model.expected else None
    form = closed_form(model.effects, lambdas, model.data, at, expected, model.effects.unit_dots(v, b).sum(0))
    return v, inner, form


def advance(model: Model, state: Direct, exact: bool = False) -> Direct:
    """One evaluation and Newton's step over all parameters; ``exact``: the last evaluation is at the minimum, not one
    step before. A lane gives up where that is not enough: see
    :func:`mixjax.optimise.newton.advance_directly`."""
    xp, n = namespace(state.x), model.n_fixed
    layout, dtype = model.layout, state.x.dtype
    x, fixed, v = state.x, state.fixed, state.v
    lambdas = cov.factors_of(x, layout.structures)
    if model.columns is not None and not model.expected:
        v, _, inner, form = moment_form(model, lambdas, fixed, v)
    else:
        v, inner, form = _by_rows(model, lambdas, fixed, v)
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
    sound = (definite | early) & fell & xp.isfinite(f) & xp.isfinite(step).all(0) & (inner < 1e3)
    next_x, next_fixed = x + part * step[n:], fixed + part * step[:n]
    D, next_D = (free_entries(covariances(own, layout)) for own in (x, next_x))
    change = xp.concatenate([part * step[:n], next_D - D])
    next_v = v + linalg_sum(change, form.scores)
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
