"""Criteria of which the fixed effects are no argument, because they minimise the penalised deviance ``P = min_b [2 sum
c + b'D^{-1}b]``, in closed form by psi and D: lme4's with ``nAGQ = 0``, and the restricted one.

The first is Laplace's approximation F at ``delta(psi, D)``, where ``P_delta = 0``. The second, Laplace's approximation
of an integral over delta as well, adds ``E = log det S - p log(2 pi)`` with ``S = P_delta,delta / 2``; of a linear
mixed model it is REML's criterion. With a direction's move of delta taken along, ``tau = (d delta, d psi, dD)``, their
gradient is ``F_tau + E_tau`` and their Hessian

    ``(F + E)_tau,tau' + P_lambda,tau,tau'`` with ``lambda = -P_delta,delta^{-1} (F + E)_delta``,

for ``P_delta,delta delta'' = -P_delta,tau,tau'`` where delta'' are second derivatives. In the letters of
:mod:`mixjax.engine.laplace_curvature`, moves t of the predictor and dg of the scores, third derivatives of P are

    ``P_abc = 2 sum[c3 t_a t_b t_c + a_c2 t_b t_c + a_b_c1 t_c + ...] - 2 (dg_b aD dg_c + ...)``,

each in turn with the part of its own direction; second derivatives of the modes are not needed. So with q the columns
of a root of ``S^{-1}``, ``w = c3 t + d_c2``, ``m = sum t_q^2``, ``e = Z'(m c3)``, ``kappa_j = z_j'K e``, ``y_q =
Z'(w t_q)`` and ``G_q = dD dg_q``:

    ``M_qr = sum w t_q t_r - dg_q dD dg_r``, the move of S, and ``E_d = tr M``
    ``E_de = sum m [c4 t t^e + d_c3 t^e + e_c3 t + d_e_c2] - sum kappa [c3 t t^e + d_c2 t^e + e_c2 t + d_e_c1]
    + (R e)'(dD dg^e + eD dg) - tr(M M^e) + 2 sum_q [y G^e + G y^e + G A G^e - (y + A G)'K (y^e + A G^e)]``

The tests hold them against differences of values. By NumPy, one lane.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mixjax.engine.effects import dots
from mixjax.engine.joint_modes import eliminated, is_information
from mixjax.engine.laplace_fit import Modes, form_at
from mixjax.engine.laplace_model import Model
from mixjax.families import Derivatives
from mixjax.linalg import over_first
from mixjax.machine import Array


class JointForm(NamedTuple):
    """A criterion at the joint modes, by psi (s) and free entries of D (J).

    Attributes:
        value: number. gradient: ``(s + J,)``. Hessian: ``(s + J, s + J)``.
        slopes: ``(p, s + J)`` of the fixed effects.
        score, information: of the penalised deviance by the fixed effects, ``(p,)`` and ``(p, p)``.
        scores: ``(p + s + J, *effects, 1)`` how g moves, fixed effects held.
    """

    value: float
    gradient: np.ndarray
    Hessian: np.ndarray
    slopes: np.ndarray
    score: np.ndarray
    information: np.ndarray
    scores: np.ndarray

    @property
    def along(self) -> np.ndarray:
        """``(p + s + J, s + J)``: the directions with the moves of the fixed effects."""
        return np.concatenate([self.slopes, np.eye(self.slopes.shape[1])])


class _Moves(NamedTuple):
    """Row functions at the joint modes, and how predictors and scores move: of the p fixed effects themselves, ``t``
    and ``dg``, and of the Z = s + J directions that take them along, ``t_z`` and ``dg_z``."""

    at: Derivatives
    t: Array
    dg: Array
    t_z: Array
    dg_z: Array


def joint_form(model: Model, lambdas: list[Array], fixed: Array, modes: Modes, restricted: bool) -> JointForm:
    """All NaN where the information of the fixed effects is not positive definite.

    Args:
        lambdas: per term ``(q, q, 1)``, any factor of its covariance.
        fixed: ``(p + s, 1)``, of which the fixed effects and ``modes`` are joint modes.
        restricted: with the determinant of the fixed effects.
    """
    effects, X, p, n = model.effects, model.data.X, model.p, model.n_fixed
    form = form_at(model, lambdas, fixed, modes)
    value, F, F2, scores = float(form.value[0]), form.gradient[:, 0], form.Hessian[..., 0], np.asarray(form.scores)
    if not p:
        return JointForm(value, F, F2, np.zeros((0, len(F))), F[:0], F2[:0, :0], scores)
    own, rows = len(effects.effect_shape), effects.row_axes
    at = model.derivatives(model.predictor(fixed, modes.b), fixed[p:])
    moved = effects.moved(modes.v)
    db = effects.times_D(lambdas, scores)
    t = effects.rows(np.concatenate([db[:n], db[n:] + moved]))
    t = np.concatenate([t[:p] + X, t[p:]])
    # As S is in :func:`eliminated`.
    information = dots(at.by_eta[2] * t[:p], t[:p], rows)[..., 0] + dots(scores[:p], db[:p], own)[..., 0]
    information = information + information.T
    mixed = np.concatenate([form.fisher[:p, p:, 0], -2.0 * dots(scores[:p], moved, own)[..., 0]], 1)
    if not is_information(information[..., None]):
        nothing = np.full_like(mixed, np.nan)
        score, Z = np.full(p, np.nan), np.full((mixed.shape[1],) * 2, np.nan)
        return JointForm(np.nan, Z[0], Z, nothing, score, information, scores)
    slopes = -np.linalg.solve(information, mixed)
    along = np.concatenate([slopes, np.eye(slopes.shape[1])])
    moves = _Moves(at, t[:p], scores[:p], over_first(along, t), over_first(along, scores))
    gradient, Hessian, by_fixed = along.T @ F, along.T @ F2 @ along, F[:p]
    if restricted:
        value += float(np.linalg.slogdet(0.5 * information)[1]) - p * float(np.log(2.0 * np.pi))
        gain = effects.gain(lambdas, effects.normal(at.by_eta[2]))
        extra, extra_gradient, extra_Hessian = _of_determinant(model, gain, moves, information)
        by_fixed, gradient, Hessian = by_fixed + extra, gradient + extra_gradient, Hessian + extra_Hessian
    bent = _third(model, moves, -np.linalg.solve(information, by_fixed))
    score = 2.0 * (at.by_eta[1] * X).sum(tuple(range(1, 1 + rows)))[:, 0]
    return JointForm(value, gradient, Hessian + bent, slopes, score, information, scores)


def expected_information(model: Model, lambdas: list[Array], fixed: Array, modes: Modes) -> np.ndarray:
    """``(p, p)``: as :attr:`JointForm.information`, with the expected curvature of rows."""
    w = model.expected_curvature(model.predictor(fixed, modes.b), fixed[model.p :]).w
    gain = model.effects.gain(lambdas, model.effects.normal(w))
    return np.asarray(2.0 * eliminated(model, gain, w)[2][..., 0])


def _third(model: Model, moves: _Moves, direction: np.ndarray) -> np.ndarray:
    """Third derivatives ``(Z, Z)`` of the penalised deviance, once in a direction ``(p,)`` of the fixed effects."""
    at, effects = moves.at, model.effects
    own, rows, s = len(effects.effect_shape), effects.row_axes, len(at.by_psi)
    t, dg = over_first(direction[:, None], moves.t)[0], over_first(direction[:, None], moves.dg)[0]
    found = dots(at.by_eta[3] * t * moves.t_z, moves.t_z, rows)[..., 0]
    side = np.zeros_like(found)
    for i, part in enumerate(at.by_psi):
        side[i] = dots((part[2] * t)[None], moves.t_z, rows)[0, :, 0]
        for j in range(s):
            found[i, j] += (t * at.by_psi_twice[i][j][1]).sum()
    side[s:] = -dots(effects.moved(dg), moves.dg_z, own)[..., 0]
    return np.asarray(2.0 * (found + side + side.T))


def _of_determinant(
    model: Model, gain: Any, moves: _Moves, information: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Derivatives of ``log det S``: by the fixed effects ``(p,)``, the rest held; and along the Z directions, gradient
    ``(Z,)`` and Hessian ``(Z, Z)``."""
    effects, at = model.effects, moves.at
    own, rows, s, p, Z = len(effects.effect_shape), effects.row_axes, len(at.by_psi), len(information), len(moves.t_z)
    c3, c4 = at.by_eta[3:]
    root = np.linalg.inv(np.linalg.cholesky(0.5 * information))
    t_q, dg_q = over_first(root.T, moves.t), over_first(root.T, moves.dg)
    m = (t_q**2).sum(0)
    e = effects.effects(m * c3)
    Ke = gain.solve(e)
    kappa = effects.rows(Ke)
    # How S moves, and with it the columns of its root.
    w = c3 * moves.t_z
    for i, part in enumerate(at.by_psi):
        w[i] += part[2]
    y, G = np.stack([effects.effects(own_w * t_q) for own_w in w]), np.zeros((Z, *dg_q.shape))
    for a in range(p):
        G[s:, a] = effects.moved(dg_q[a])
    M = np.stack([dots(own_w * t_q, t_q, rows)[..., 0] for own_w in w])
    M -= np.stack([dots(own_G, dg_q, own)[..., 0] for own_G in G])
    AG = np.concatenate([np.zeros_like(G[:s]), gain.times_A(G[s:])])
    both = y + AG

    def inner(a: Array, b: Array) -> np.ndarray:
        return np.asarray(a.reshape(Z, -1) @ b.reshape(Z, -1).T)

    yG = inner(y, G)
    Hessian = 2.0 * (yG + yG.T + inner(G, AG) - inner(both, gain.solve(both))) - inner(M, M)
    Hessian += dots((m * c4 - kappa * c3) * moves.t_z, moves.t_z, rows)[..., 0]
    side = np.zeros((Z, Z))
    for i, part in enumerate(at.by_psi):
        side[i] = dots((m * part[3] - kappa * part[2])[None], moves.t_z, rows)[0, :, 0]
        for j in range(s):
            twice = at.by_psi_twice[i][j]
            Hessian[i, j] += (m * twice[2] - kappa * twice[1]).sum()
    side[s:] = dots(effects.moved(e - gain.times_A(Ke)), moves.dg_z, own)[..., 0]
    by_fixed = (m * c3 * moves.t).sum(tuple(range(1, 1 + rows)))[:, 0]
    return by_fixed, np.trace(M, axis1=1, axis2=2), Hessian + side + side.T
