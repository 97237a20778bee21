"""The fit of one generalised linear mixed model whose fixed effects are found together with its random effects, by
NumPy: lme4's ``nAGQ = 0``, and by the restricted likelihood.

Three searches stand in each other, as in :mod:`mixjax.engine.laplace_fit`: inside, Newton's steps for fixed and random
effects; in the middle, for the family's parameters psi; outside, the optimiser over the coordinates of the covariances.
All derivatives are exact (:mod:`mixjax.engine.joint_form`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mixjax import covariance as cov
from mixjax import decompositions, linalg
from mixjax.engine.effects import free_entries
from mixjax.engine.joint_form import JointForm, expected_information, joint_form
from mixjax.engine.joint_modes import JointModes, find_joint_modes
from mixjax.engine.laplace_fit import (
    INNER,
    INNER_LAST,
    LONGEST_PSI,
    MIDDLE,
    MIDDLE_LAST,
    MOST_MIDDLE,
    MOST_PSI,
    Memory,
    chain,
    covariances,
    foretold,
    linalg_sum,
    nothing_known,
)
from mixjax.engine.laplace_model import Model
from mixjax.estimation import search
from mixjax.estimation.glmm import ENDLESS, SURELY, End, GLMMEstimates, estimates_of, model_of, start_of
from mixjax.estimation.glmm_start import MOST_ITERATIONS, far_of
from mixjax.machine import silently
from mixjax.optimise.results import Result
from mixjax.products.family_rows import FamilyRows


class Profiled(NamedTuple):
    """The criterion where psi is found.

    Attributes:
        found: fixed and random effects. form: there, by psi and D. step: ``(s,)`` Newton's, of psi, and decrement:
            twice what it promises.
    """

    found: JointModes
    form: JointForm
    step: np.ndarray
    decrement: float


def _step(form: JointForm, s: int) -> np.ndarray:
    """Newton's step ``(s,)`` of psi; where the Hessian is not positive definite, by its diagonal in absolute value."""
    H = form.Hessian[:s, :s]
    if s and not decompositions.is_positive(H[..., None])[0]:
        H = np.diag(np.abs(H.diagonal()) + 1.0)
    step: np.ndarray = -linalg.inverse_small(H) @ form.gradient[:s]
    return step


def profile(
    model: Model, x: np.ndarray, fixed: np.ndarray, v: np.ndarray, restricted: bool, inner: float, middle: float
) -> Profiled:
    """The criterion's minimum over psi, up to a last Newton step that promises no more than half of ``middle``."""
    p, s = model.p, model.n_fixed - model.p
    lambdas = cov.factors_of(x, model.layout.structures)

    def at(fixed: np.ndarray, v: np.ndarray) -> Profiled:
        found = find_joint_modes(model, lambdas, fixed, v, inner)
        form = joint_form(model, lambdas, found.fixed, found.modes, restricted)
        step = _step(form, s)
        return Profiled(found, form, step, -float(form.gradient[:s] @ step))

    best = at(fixed, v)
    for _ in range(MOST_MIDDLE):
        if not s or not np.isfinite(best.decrement) or best.decrement <= middle:
            break
        if np.abs(best.found.step).max(initial=0.0) > 10.0 * ENDLESS * model.unit:  # fixed effects run to infinity
            break
        part = min(1.0, LONGEST_PSI / np.abs(best.step).max())
        while part > 1e-4:
            move = best.form.along[: p + s, :s] @ (part * best.step)
            new = at(
                # A parameter that runs to infinity ends here, before its numbers are rounding.
                np.concatenate([best.found.fixed[:p] + move[:p, None],
                                np.clip(best.found.fixed[p:] + move[p:, None], -MOST_PSI, MOST_PSI)]),
                best.found.modes.v + linalg_sum(move[:, None], best.form.scores[: p + s]),
            )  # fmt: skip
            noise = 1e-11 * (1.0 + abs(best.form.value))
            if new.form.value <= best.form.value - 1e-4 * part * best.decrement + noise:
                break
            part /= 3.0
        else:
            break
        best = new
    return best


class Evaluated(NamedTuple):
    """The criterion at x, psi profiled out: ``value``, ``gradient (k,)``, ``Hessian (k, k)``; and ``joint``, the
    Hessian by psi and x. ``at``: what was found. memory: for the next point."""

    value: float
    gradient: np.ndarray
    Hessian: np.ndarray
    joint: np.ndarray
    joint_gradient: np.ndarray
    slopes: np.ndarray
    at: Profiled
    memory: Memory


def evaluate(
    model: Model, x: np.ndarray, memory: Memory, restricted: bool, inner: float = INNER, middle: float = MIDDLE
) -> Evaluated:
    """Args:
    x: ``(k, 1)``. memory: of the point before.
    """
    s, layout = model.n_fixed - model.p, model.layout
    D = free_entries(covariances(x, layout))
    at = profile(model, x, *foretold(model, memory, D), restricted, inner, middle)
    form = at.form
    # How psi and with it the fixed effects move with D.
    H = form.Hessian
    psi_slopes = -linalg.inverse_small(H[:s, :s]) @ H[:s, s:]
    by_D = np.concatenate([form.slopes[:, s:] + form.slopes[:, :s] @ psi_slopes, psi_slopes])
    jacobian, bend = chain(x, form.gradient[s:, None], layout)
    to_x = np.zeros((len(H), s + len(x)))
    to_x[:s, :s] = np.eye(s)
    to_x[s:, s:] = jacobian[..., 0]
    gradient, joint = to_x.T @ form.gradient, to_x.T @ H @ to_x
    joint[s:, s:] += bend[..., 0]
    own = psi_slopes @ jacobian[..., 0]
    value = form.value - 0.5 * at.decrement
    by_x, Hessian = gradient[s:] + joint[s:, :s] @ at.step, joint[s:, s:] + joint[s:, :s] @ own
    step = np.concatenate([form.slopes[:, :s] @ at.step, at.step])[:, None]
    new = Memory(D, at.found.fixed, at.found.modes.v, step, by_D[..., None], form.scores)
    return Evaluated(value, by_x, Hessian, joint, gradient, form.slopes @ to_x, at, new)


def _reason(model: Model, x: np.ndarray, fixed: np.ndarray, code: int) -> int:
    """Why a search has failed: ``SEPARATED`` where fixed effects have no minimum of the penalised deviance, of whatever
    covariances; where they have, they follow covariances that run to infinity."""
    found = find_joint_modes(
        model, cov.factors_of(x, model.layout.structures), fixed, np.zeros((*model.effects.effect_shape, 1))
    )
    eta = sum((column * own for column, own in zip(model.data.X, found.step, strict=True)), np.zeros(1))
    if np.abs(eta).max(initial=0.0) > ENDLESS * model.unit:
        return Result.SEPARATED
    return Result.UNBOUNDED if code == Result.SEPARATED else code


def fit_rows_jointly(
    rows: FamilyRows, restricted: bool, start: np.ndarray | None = None, curvature: str = "observed"
) -> GLMMEstimates:
    """Estimates whose fixed effects minimise the penalised deviance, by NumPy.

    ``vcov_all`` is after a restricted fit the inverse of the Hessian of the joint log-likelihood of fixed effects, psi
    and covariances, of which the latter's Schur complement is the restricted one's, as TMB's joint precision: the
    fixed effects' uncertainty given the others, and what theirs adds. Else the fixed effects' is that given the
    others, by the curvature of rows that the determinant has, and they are uncorrelated with them, as in lme4.

    Args:
        rows: of one response. restricted: by the restricted likelihood, else as lme4's ``nAGQ = 0``.
        start: ``(k,)`` theta, or None. curvature: in the determinant of the random effects.
    """
    with silently():
        model = model_of(rows, curvature)
        structures = rows.layout.structures
        fixed, x0 = start_of(rows, model, start)
        unknown = nothing_known(model, fixed)
        memory, endless = unknown, 0

        def at(x: np.ndarray, inner: float, middle: float) -> Evaluated:
            found = evaluate(model, x, memory, restricted, inner, middle)
            if not np.isfinite(found.value) and memory is not unknown:
                return evaluate(model, x, unknown, restricted, inner, middle)
            return found

        def by_x(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            nonlocal memory, endless
            k = len(x)
            if endless > SURELY:
                return np.array([np.nan]), np.full((k, 1), np.nan), np.full((k, k, 1), np.nan)
            found = at(x, INNER, MIDDLE)
            if all(np.isfinite(part).all() for part in found.memory):
                memory = found.memory
            steps = np.concatenate([found.at.found.step[:, 0] / model.unit, found.at.step])
            longest = np.abs(steps).max(initial=0.0)
            endless = endless + 1 if longest > 10.0 * ENDLESS or not np.isfinite(longest) else 0
            return np.array([found.value]), found.gradient[:, None], found.Hessian[..., None]

        solution = search.run(by_x, x0, structures, far_of(model), MOST_ITERATIONS)
        last = at(solution.x, INNER_LAST, MIDDLE_LAST)
        if endless > SURELY and np.isfinite(last.value):  # where it stands says why it does not end
            solution = solution._replace(result=np.array([int(Result.CONVERGED)]))
        form, found = last.at.form, last.at.found
        information, side = form.information, np.zeros_like(last.slopes)
        if restricted:
            side = -information @ last.slopes
        elif model.expected and model.p:
            lambdas = cov.factors_of(solution.x, structures)
            information = expected_information(model, lambdas, found.fixed, found.modes)
        H = np.block([[information, side], [side.T, last.joint - side.T @ last.slopes]])
        gradient = np.concatenate([form.score, last.joint_gradient])[:, None]
        end = End(np.array([last.value]), gradient, H[..., None], found.fixed, found.modes)
        estimates = estimates_of(rows, model, solution, end)
        if not estimates.converged:
            estimates = estimates._replace(result=np.int64(_reason(model, x0, fixed, int(estimates.result))))
        if restricted:  # in the user's columns
            criterion = last.value + 2.0 * float(np.linalg.slogdet(rows.X_basis.R)[1])
            estimates = estimates._replace(criterion=np.float64(criterion))
        return estimates
