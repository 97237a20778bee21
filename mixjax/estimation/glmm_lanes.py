"""Many fits of one generalised linear mixed model: responses of one design in lanes.

As for linear models, direct Newton steps come first, tile by tile, over all parameters at once, with one inner step for
the modes each: the modes of the next point are foretold. Most replicates need no more than five. Those whose
covariances lose rank go on among covariances of less (:mod:`mixjax.estimation.glmm_edges`); what is left then queues
for the full search (:mod:`mixjax.estimation.glmm_search`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

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
    linalg_sum,
)
from mixjax.engine.laplace_model import Model
from mixjax.engine.level_moments import LONGEST, moment_form, step_of_modes
from mixjax.engine.quadrature import Rule, product_rule
from mixjax.engine.quadrature_moments import added
from mixjax.estimation import search
from mixjax.estimation.glmm_start import covariance_start, fixed_start
from mixjax.machine import Array, cond, namespace, once, while_loop
from mixjax.optimise.newton import (
    curvature_tolerance,
    foretold_distance,
    foretold_tolerance,
    gradient_tolerance,
    where,
)

# Steps of a tile, after which lanes that go on are gathered from all tiles into new ones.
ROUNDS = (4, 2, 2, 4, 8)
# A lane with a standard deviation below this, in the basis of Z, leaves the direct steps for the full search.
INSIDE = 0.05
# Where the inner step promised more than this a level, or 1, it is repeated before anything else moves.
EARLY = 0.1
# Twice what the inner step may still promise where a search ends: modes are then good to its square.
INNER = 1e-9
# Of quadrature: an update counts where residual and step have at least this cosine.
LEAST_ALONG = 1e-3


class Secant(NamedTuple):
    """What steps have told of the Hessian of what quadrature adds to Laplace's approximation.

    Attributes:
        at, gradient: ``(p + s + k, L)`` the last evaluation. Hessian: ``(p + s + k, p + s + k, L)``, from zero.
        known: ``(L,)`` there was an evaluation.
    """

    at: Array
    gradient: Array
    Hessian: Array
    known: Array

    def updated(self, at: Array, gradient: Array, scale: Array, sure: Array, known: Array | float = 0.0) -> Secant:
        """With an evaluation that is ``sure (L,)``, by the symmetric update of rank one (Conn, Gould & Toint 1991,
        Math. Program. 50): what is added is small and smooth, and the update needs no positive definite matrix.

        Args:
            scale: ``(p + s + k, L)`` square roots of the curvatures: updates along steps that say little are left out.
            known: ``(p + s + k, L)`` what a Hessian that is held beside this one says of the change of the gradient.
        """
        xp = namespace(at)
        s = at - self.at
        r = gradient - self.gradient - known - (self.Hessian * s[None]).sum(1)
        along = (r * s).sum(0)
        sizes = ((r / scale) ** 2).sum(0) * ((s * scale) ** 2).sum(0)
        use = sure & self.known & (along**2 > LEAST_ALONG**2 * sizes)
        update = r[:, None] * r[None] / xp.where(use, along, 1.0)
        Hessian = self.Hessian + xp.where(use, update, 0.0)
        moved = Secant(at, gradient, Hessian, self.known | sure)
        return where(sure, moved, self)


class Direct(NamedTuple):
    """Where direct searches stand; see :class:`mixjax.optimise.newton.Direct`.

    Attributes:
        x: ``(k, L)``. fixed: ``(p + s, L)``. v: ``(*effects, L)``, all of the next point. value, predicted, before,
        distance, iterations, going, converged: ``(L,)``. step: ``(p + s + k, L)`` Newton's last, of fixed and x, and
        Hessian: ``(p + s + k, p + s + k, L)`` by them, both at the last evaluation.
        free: ``(k, L)`` coordinates that move; the others are zero. secant: of quadrature, else None.
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
    free: Array
    secant: Secant | None = None


def early_of(model: Model) -> float:
    """See :data:`EARLY`."""
    return max(1.0, EARLY * model.effects.effect_shape[-1])


def begin(model: Model, lanes: int, rule: Rule | None = None, start: tuple[Array, Array] | None = None) -> Direct:
    """From x and fixed, or from the model without random effects, and moments of its scores."""
    xp = namespace(model.data.y)
    if start is None:
        x, fixed = covariance_start(model, fixed_start(model, lanes))
    else:
        x, fixed = start
    zero = xp.zeros(lanes, fixed.dtype)
    no = xp.zeros(lanes, bool)
    v = first_modes(model, x, fixed)
    size = len(fixed) + len(x)
    step, H = xp.zeros((size, lanes), fixed.dtype), xp.zeros((size, size, lanes), fixed.dtype)
    secant = None if rule is None else Secant(xp.zeros_like(step), xp.zeros_like(step), xp.zeros_like(H), no)
    return Direct(x, fixed, v, zero + xp.inf, zero, zero, zero + xp.inf, xp.zeros(lanes, int), ~no, no, step, H,
                  xp.ones(x.shape, bool), secant)  # fmt: skip


def first_modes(model: Model, x: Array, fixed: Array) -> Array:
    """``v`` after a Newton step of the modes from zero, which costs a pass over the rows and not a closed form."""
    xp, effects = namespace(x, fixed), model.effects
    nothing = xp.zeros((*effects.effect_shape, x.shape[-1]), fixed.dtype)
    at = model.derivatives(model.predictor(fixed, nothing), fixed[model.p :]).by_eta
    gain = effects.gain(cov.factors_of(x, model.layout.structures), effects.normal(at[2]))
    return step_of_modes(effects, gain, -effects.effects(at[1]), nothing, nothing, LONGEST)[0]


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


def advance(
    model: Model, state: Direct, exact: bool = False, rule: Rule | None = None, least: float = INSIDE
) -> Direct:
    """One evaluation and Newton's step over all parameters; ``exact``: the last evaluation is at the minimum, not one
    step before. A lane gives up where that is not enough: see
    :func:`mixjax.optimise.newton.advance_directly`.

    With a rule by quadrature: its gradient is exact, and the Hessian that of Laplace's approximation and a secant's.
    """
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
    f, secant = form.value, state.secant
    # A value at modes that are not found yet is no value.
    sure = inner <= 1e-4
    if rule is not None and secant is not None:
        value, slope = _added(model, rule, fixed, x, v, inner)
        scale = xp.sqrt(xp.abs(xp.stack([H[i, i] for i in range(len(H))])))
        secant = secant.updated(xp.concatenate([fixed, x]), slope, scale, sure)
        f, g, H = f + value, g + slope, H + secant.Hessian
    among = xp.concatenate([xp.ones((n, *state.free.shape[1:]), bool), state.free])
    g = xp.where(among, g, 0.0)
    H_free = xp.where(among[:, None] & among[None], H, linalg.eye(len(H), H))
    flat = xp.sqrt(curvature_tolerance(dtype)) * xp.stack([H_free[i, i] for i in range(len(H))])
    definite = decompositions.is_positive(H_free - linalg.eye(len(H), H) * flat)
    # Else steps are shorter where the curvature is not that of a minimum: by Gershgorin's bound of the eigenvalues.
    size = xp.abs(H_free)
    beside = size.sum(1) - xp.stack([size[i, i] for i in range(len(H))])
    own = xp.stack([H_free[i, i] for i in range(len(H))])
    shift = xp.where(definite | (xp.arange(len(H)) < model.p)[:, None], 0.0, xp.maximum(1.01 * beside - own, 0.0))
    step = -linalg.matmul(linalg.inverse_logdet(H_free + linalg.eye(len(H), H) * shift)[0], g[:, None])[:, 0]
    decrement = -(g * step).sum(0)
    distance = xp.sqrt(xp.maximum(decrement, 0.0))
    length = xp.sqrt((step[n:] ** 2).sum(0))
    part = xp.minimum(1.0, search.REGION * xp.maximum(xp.sqrt((x * x).sum(0)), 0.2) / length)
    if n:
        part = xp.minimum(part, cut(model, step[:n]))
    noise = 100 * np.finfo(dtype).eps * xp.maximum(1.0, xp.abs(f))
    fell = (state.value - f + noise > 1e-3 * (state.predicted + noise)) | ~sure
    early = inner > early_of(model)
    part = xp.where(early, 0.0, part)
    sound = fell & xp.isfinite(f) & xp.isfinite(step).all(0)
    sound = xp.where(early, (inner < 1e3) & xp.isfinite(v).all(tuple(range(v.ndim - 1))), sound)
    step = xp.where(early, 0.0, step)
    next_x, next_fixed = x + part * step[n:], fixed + part * step[:n]
    D, next_D = (free_entries(covariances(own, layout)) for own in (x, next_x))
    change = once(xp.concatenate([part * step[:n], next_D - D]))
    next_v = xp.where(early, v, v + linalg_sum(change, form.scores))
    plain = search.is_plain(next_x, layout.structures, least=least) | ~state.free.all(0)
    if rule is None:
        foretold, enough = foretold_distance(distance, state.before), foretold_tolerance(dtype)
    else:
        near = (state.before > 0) & (state.before < 0.5) & (distance <= 1e-3)
        # Secants converge faster than linearly, but do not square errors.
        foretold = xp.where(near, distance**2 / xp.where(near, state.before, 1.0), xp.inf)
        enough = gradient_tolerance(dtype)
    foretold = xp.where(inner <= INNER, foretold, xp.inf)
    reached = (distance <= gradient_tolerance(dtype)) & (inner <= INNER)
    converged = reached if exact else reached | (foretold <= enough)
    converged = sound & definite & plain & converged
    new = Direct(
        x=next_x, fixed=next_fixed, v=next_v,
        value=xp.where(converged & ~reached, f - 0.5 * decrement, xp.where(sure, f, xp.inf)),
        predicted=xp.where(sure, (part - 0.5 * part**2) * decrement, 0.0),
        before=xp.where((part < 1.0) | (inner > 1e-6) | ~definite, 0.0, distance),
        distance=xp.where(converged & ~reached, foretold, distance),
        iterations=state.iterations, going=sound & plain & ~converged, converged=converged, step=step, Hessian=H,
        free=state.free, secant=secant,
    )  # fmt: skip
    back_to = state._replace(going=xp.zeros_like(state.going))
    new = where(sound, new, back_to)._replace(iterations=state.iterations + 1)
    return where(state.going, new, state)


def probe_by_quadrature(
    model: Model, x: Array, fixed: Array, v: Array, longest: Any, nagq: int
) -> tuple[Array, Array, ClosedForm, Array, Array]:
    """:func:`probe`, and what quadrature adds there with its slope by fixed and x."""
    v, inner, form = probe(model, x, fixed, v, longest)
    rule = product_rule(nagq, model.effects.effect_shape[0])
    return v, inner, form, *_added(model, rule, fixed, x, v, inner)


def _added(model: Model, rule: Rule, fixed: Array, x: Array, v: Array, inner: Array) -> tuple[Array, Array]:
    """What quadrature adds, and its slope; zero of all lanes while modes are far, where it says nothing."""
    xp = namespace(fixed, x)
    b = model.effects.times_D(cov.factors_of(x, model.layout.structures), v)

    def nothing() -> tuple[Array, Array]:
        return xp.zeros_like(inner), xp.zeros((len(fixed) + len(x), len(inner)), inner.dtype)

    near = inner <= early_of(model)
    value, slope = cond(near.any(), lambda: added(model, rule, fixed, x, b), nothing)
    return xp.where(near, value, 0.0), xp.where(near, slope, 0.0)


def begin_directly(model: Model, lanes: int, nagq: int = 1, start: tuple[Array, Array] | None = None) -> Direct:
    """See :func:`begin`. ``nagq``: nodes an effect; 1 is Laplace's approximation. ``start``: x and fixed."""
    return begin(model, lanes, _rule(model, nagq), start)


def go_on(model: Model, state: Direct, steps: Any, exact: bool = False, nagq: int = 1, least: float = INSIDE) -> Direct:
    """Direct steps, so many, or until no lane of a tile goes on. ``least``: see :data:`INSIDE`."""
    xp, rule = namespace(model.data.y), _rule(model, nagq)

    def goes_on(carry: tuple[Any, Direct]) -> Array:
        return (carry[0] < steps) & carry[1].going.any()

    def step(carry: tuple[Any, Direct]) -> tuple[Any, Direct]:
        return carry[0] + 1, advance(model, carry[1], exact, rule, least)

    first = (0 if xp is np else jnp.int32(0), state)
    return while_loop(goes_on, step, first, xp)[1]  # type: ignore[no-any-return]


def _rule(model: Model, nagq: int) -> Rule | None:
    return product_rule(nagq, model.effects.effect_shape[0]) if nagq > 1 else None
