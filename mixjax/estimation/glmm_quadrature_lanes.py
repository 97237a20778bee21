"""What many fits by quadrature need beside direct steps: the Hessian at their ends, and what a singular end means.

With one effect a level the correction of quadrature is of the fourth order in the standard deviation: at zero it and
its first three derivatives vanish, and a minimum of Laplace's approximation at zero is one of any number of nodes. What
is left to know is whether the objective has another minimum away from zero.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.engine.effects import free_entries
from mixjax.engine.laplace_fit import chain, covariances, cut, joint_Hessian, linalg_sum, newton_step
from mixjax.engine.laplace_model import Model
from mixjax.engine.level_moments import LONGEST
from mixjax.engine.quadrature import product_rule
from mixjax.engine.quadrature_moments import added
from mixjax.estimation.glmm_lanes import at_modes, probe
from mixjax.estimation.glmm_quadrature import DISPLACED
from mixjax.estimation.glmm_start import far_of
from mixjax.machine import Array, fori_loop, namespace, set_at

# Where the profiled objective's slope is looked at, coming down: parts of the standard deviation from which a second
# search begins; evaluations at each, and twice what the last steps of modes and fixed effects may promise there.
DOWN, AT_EACH, CLOSE = (1.0, 0.5, 0.25, 0.13, 0.07, 0.033), 4, 1e-3


def joint_of(model: Model, fixed: Array, x: Array, v: Array, nagq: int) -> tuple[Array, Array]:
    """Gradient ``(p + s + k, L)`` and Hessian ``(p + s + k, p + s + k, L)`` by fixed and x where a search has ended:
    Laplace's in closed form, and central differences of the gradient of what quadrature adds, as
    :func:`mixjax.estimation.glmm_quadrature.joint_at` has."""
    xp, layout = namespace(fixed, x), model.layout
    rule = product_rule(nagq, model.effects.effect_shape[0])
    n, T = len(fixed), len(fixed) + len(x)
    v, _, form = probe(model, x, fixed, v)
    H = joint_Hessian(model, x, form)
    curvature = xp.abs(xp.stack([H[i, i] for i in range(T)]))
    usable = xp.isfinite(curvature) & (curvature > 1e-12 * curvature.max(0))
    lengths = DISPLACED * xp.where(usable, xp.sqrt(2.0 / xp.where(usable, curvature, 1.0)), 1.0)
    D = free_entries(covariances(x, layout))
    units = xp.asarray(np.concatenate([np.eye(T), -np.eye(T)]))

    def displaced(i: Any, slopes: Array) -> Array:
        own = units[i][:, None] * lengths
        at_fixed, at_x = fixed + own[:n], x + own[n:]
        changed = xp.concatenate([own[:n], free_entries(covariances(at_x, layout)) - D])
        lambdas = cov.factors_of(at_x, layout.structures)
        _, b, _, _ = at_modes(model, lambdas, at_fixed, v + linalg_sum(changed, form.scores), LONGEST)
        return set_at(slopes, i, added(model, rule, at_fixed, at_x, b)[1])

    slopes = fori_loop(2 * T, displaced, xp.zeros((2 * T, T, x.shape[-1]), x.dtype), xp)
    extra = (slopes[:T] - slopes[T:]) / (2.0 * lengths[:, None])
    jacobian, _ = chain(x, form.gradient[n:], layout)
    by_x = linalg.matmul(linalg.transpose(jacobian), form.gradient[n:, None])[:, 0]
    b = model.effects.times_D(cov.factors_of(x, layout.structures), v)
    gradient = xp.concatenate([form.gradient[:n], by_x]) + added(model, rule, fixed, x, b)[1]
    return gradient, H + 0.5 * (extra + linalg.transpose(extra))


def falls_to_zero(model: Model, fixed: Array, nagq: int) -> Array:
    """``(L,)`` of models with one effect a level: coming down from a large standard deviation, with everything else
    profiled out, the objective falls all the way. False also where that was not seen clearly."""
    xp, n, L = namespace(fixed, model.data.y), model.n_fixed, fixed.shape[-1]
    rule = product_rule(nagq, 1)
    heights = xp.asarray(far_of(model) * np.array(DOWN))

    def at(height: Any, state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
        fixed, v, *_ = state
        x = xp.zeros((1, L), fixed.dtype) + height
        v, inner, form = probe(model, x, fixed, v)
        b = model.effects.times_D(cov.factors_of(x, model.layout.structures), v)
        _, slope = added(model, rule, fixed, x, b)
        jacobian, _ = chain(x, form.gradient[n:], model.layout)
        by_x = (jacobian * form.gradient[n:, None]).sum(0)[0] + slope[n]
        if n:
            # Laplace's Hessian: the slope is then that of the profiled objective up to what steps still promise.
            form = form._replace(gradient=form.gradient + xp.concatenate([slope[:n], xp.zeros_like(form.gradient[n:])]))
            step, decrement = newton_step(model, form)
            side = (form.Hessian[:n, n:] * jacobian[None, :, 0]).sum(1)
            by_x = by_x + (side * step).sum(0)
            move = xp.where(inner <= 1.0, cut(model, step) * step, 0.0)
            fixed, v = fixed + move, v + linalg_sum(move, form.scores[:n])
        else:
            decrement = xp.zeros_like(inner)
        clear = (inner <= CLOSE) & (decrement <= CLOSE)
        return fixed, v, by_x, clear

    def down(i: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
        """From zero, modes take the first round to come near."""
        fixed, v, falls = state
        start = (fixed, v, xp.zeros(L, fixed.dtype), falls)
        height = heights[xp.maximum(i - 1, 0)]
        fixed, v, by_x, clear = fori_loop(AT_EACH, lambda _, own: at(height, own), start, xp)
        return fixed, v, falls & ((clear & (by_x > 0)) | (i == 0))

    v = xp.zeros((*model.effects.effect_shape, L), fixed.dtype)
    _, _, falls = fori_loop(1 + len(DOWN), down, (fixed, v, xp.ones(L, bool)), xp)
    found: Array = falls
    return found
