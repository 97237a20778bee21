"""Fixed effects found together with the random effects, where both minimise the penalised deviance ``2 sum_j c_j(eta_j)
+ b'D^{-1}b``: the inner problem of lme4's ``nAGQ = 0``, and of Laplace's approximation over both. By NumPy, one lane.

A Newton step eliminates the random effects: with ``h = Z'WX``, K of :mod:`mixjax.engine.effects` and the step ``db``
that the modes would take alone, ``(X'WX - h'K h) ddelta = -(X'c' + h'db)``, and the modes move by ``db - K h ddelta``.
There is no inverse of D.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mixjax import decompositions
from mixjax.engine.effects import dots
from mixjax.engine.laplace_fit import INNER, MOST_HALVINGS, MOST_INNER, NEAR, Modes, cut, find_modes, linalg_sum
from mixjax.engine.laplace_model import Model
from mixjax.machine import Array


class JointModes(NamedTuple):
    """Where the penalised deviance is least.

    Attributes:
        fixed: ``(p + s, 1)``, of which psi is as it was. modes: of the random effects. step: ``(p, 1)`` the last one.
    """

    fixed: Array
    modes: Modes
    step: Array


class _Step(NamedTuple):
    """Newton's step of delta, b and v, and twice what it promises."""

    delta: Array
    b: Array
    v: Array
    decrement: float


def find_joint_modes(
    model: Model, lambdas: list[Array], fixed: Array, v: Array, tolerance: float = INNER
) -> JointModes:
    """Minimum of the penalised deviance over fixed effects and ``b = D v``, by Newton's steps that are halved where it
    would rise.

    Args:
        fixed: ``(p + s, 1)``; psi stays. v: ``(*effects, 1)``, where modes are looked for from.
        tolerance: the last step promises no more than half of it.
    """
    effects, p = model.effects, model.p
    delta, psi = fixed[:p], fixed[p:]
    if not p:
        return JointModes(fixed, find_modes(model, lambdas, fixed, v, tolerance), delta)

    def deviance(delta: Array, b: Array, v: Array) -> float:
        density = model.density(model.data.predictor(delta, effects.rows(b)), psi)
        return float(2.0 * density.sum() + effects.unit_dots(v, b).sum())

    b, step = effects.times_D(lambdas, v), np.zeros_like(delta)
    P = deviance(delta, b, v)
    nothing = np.zeros_like(v)
    at_zero = deviance(delta, nothing, nothing)
    if not at_zero >= P:  # also where that is not finite
        b, v, P = nothing, nothing, at_zero
    decrement = np.inf
    before = delta, b, v
    for _ in range(MOST_INNER):
        found = _newton(model, lambdas, delta, psi, b, v)
        if not np.isfinite(found.decrement):
            # Along a direction in which the likelihood grows for ever the information vanishes: the point before is the
            # last that has a step, by which the end is recognised.
            delta, b, v = before
            break
        step, decrement = found.delta, found.decrement
        part = float(cut(model, step)[0])
        for _ in range(MOST_HALVINGS):
            new = delta + part * found.delta, b + part * found.b, v + part * found.v
            value = deviance(*new)
            if value <= P + 1e-12 * (1.0 + abs(P)) or (part == 1.0 and decrement < NEAR and np.isfinite(value)):
                break
            part *= 0.5
        else:  # rounding, or densities that are not finite, are in the way
            break
        before, (delta, b, v), P = (delta, b, v), new, value
        if part == 1.0 and decrement <= tolerance:
            break
    modes = Modes(v, b, effects.unit_dots(v, b).sum(0), np.array([decrement]))
    return JointModes(np.concatenate([delta, psi]), modes, step)


def eliminated(model: Model, gain: Any, weights: Array) -> tuple[Array, Array, Array]:
    """``h = Z'WX (p, *effects, 1)``, ``K h``, and ``S = X'WX - h'K h (p, p, 1)``, of gain by the same weights.

    S is written as ``t'Wt + h'R'K h`` with ``t = X - Z K h``, for that keeps digits where variances are large.
    """
    effects, X = model.effects, model.data.X
    push = weights * X
    h = effects.effects(push)
    Kh = gain.solve(h)
    t = X - effects.rows(Kh)
    S = dots(weights * t, t, effects.row_axes) + dots(h - gain.times_A(Kh), Kh, len(effects.effect_shape))
    return h, Kh, 0.5 * (S + np.swapaxes(S, 0, 1))


def is_information(S: Array) -> bool:
    """Whether a matrix ``(p, p, 1)`` is positive definite by more than rounding."""
    least = 1e-12 * np.diag(np.abs(S[..., 0].diagonal()))
    return bool(np.isfinite(S).all() and decompositions.is_positive(S - least[..., None])[0])


def _newton(model: Model, lambdas: list[Array], delta: Array, psi: Array, b: Array, v: Array) -> _Step:
    effects, X = model.effects, model.data.X
    own, rows = len(effects.effect_shape), effects.row_axes
    at = model.derivatives(model.data.predictor(delta, effects.rows(b)), psi)
    c1, c2 = at.by_eta[1], at.by_eta[2]
    for weights in (c2, np.maximum(c2, 0.0)):  # the second where densities are not log-concave
        gain = effects.gain(lambdas, effects.normal(weights))
        h, Kh, S = eliminated(model, gain, weights)
        if np.isfinite(gain.logdet).all() and is_information(S):
            break
    else:
        nothing = np.full_like(b, np.nan)
        return _Step(np.full_like(delta, np.nan), nothing, nothing, np.nan)
    g = -effects.effects(c1)
    r = gain.times_A(b) + g
    alone = gain.solve(r) - b
    score = (c1 * X).sum(tuple(range(1, 1 + rows)))
    step = -np.linalg.solve(S[..., 0], score + dots(h, alone[None], own)[:, 0])
    db = alone - linalg_sum(step, Kh)
    dv = r - linalg_sum(step, h) - gain.times_A(b + db) - v
    decrement = float(effects.unit_dots(g - v, db).sum() - (score * step).sum())
    return _Step(step, db, dv, decrement)
