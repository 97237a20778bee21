"""One of many fits of a crossed or nested model, by gradients: the Hessian is asked for twice or three times.

Of several grouping factors the Hessian in closed form costs four to six times as much as the gradient. Between two of
them steps go along chords: with the last Hessian, and what the gradients since have told of it by symmetric updates of
rank one. It ends with the exact Hessian, as any fit does. Who comes near a boundary, or does not converge soon, is left
to the search of a single fit.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mixjax import covariance as cov
from mixjax import decompositions
from mixjax.engine.coordinates import coordinates_in
from mixjax.engine.effects import free_entries
from mixjax.engine.laplace_curvature import Slope, slope_at
from mixjax.engine.laplace_fit import (
    INNER_LAST,
    Modes,
    chain,
    covariances,
    cut,
    find_modes,
    form_at,
    joint_Hessian,
    linalg_sum,
)
from mixjax.engine.laplace_model import Model
from mixjax.estimation import search
from mixjax.estimation.glmm import End, GLMMEstimates, estimates_of
from mixjax.estimation.glmm_lanes import INSIDE, Secant
from mixjax.estimation.glmm_start import fixed_start
from mixjax.optimise.newton import Solution, curvature_tolerance, gradient_tolerance
from mixjax.optimise.results import Result
from mixjax.products.family_rows import FamilyRows

# Evaluations at most, and the part of its distance that a step has to leave behind, else the Hessian is asked again.
MOST, POOR = 25, 0.3


class Reference(NamedTuple):
    """Where searches begin, by the fit of another response: x ``(k, 1)``; ``moved (p + s, 1)``, how far fixed ended
    from the model without random effects; the Hessian ``(T, T)`` by fixed and x."""

    x: np.ndarray
    moved: np.ndarray
    Hessian: np.ndarray


def reference_of(rows: FamilyRows, model: Model, est: GLMMEstimates) -> Reference | None:
    """None unless the fit, of rows and model, is a regular minimum."""
    if est.result != Result.CONVERGED or est.singular:
        return None
    n = len(est.beta) + len(est.psi)
    x, free = coordinates_in(est.theta, rows.layout, [np.asarray(Z.R) for Z in rows.Z_bases])
    to_basis = np.eye(n + len(x))
    to_basis[:n, :n] = np.linalg.inv(rows.fixed_change)
    covariance = to_basis @ est.vcov_all @ to_basis.T
    if not free.all() or not np.isfinite(covariance).all():
        return None
    fixed = rows.fixed_in_bases(est.beta, est.psi)[:, None]
    return Reference(x[:, None], fixed - fixed_start(model, 1), 2.0 * np.linalg.inv(covariance))


class _At(NamedTuple):
    """An evaluation: ``Hessian (T, T)`` or None, ``scores`` as of :class:`Slope`."""

    value: float
    gradient: np.ndarray
    Hessian: np.ndarray | None
    modes: Modes
    scores: Any


def _evaluate(model: Model, fixed: np.ndarray, x: np.ndarray, v: np.ndarray, exact: bool) -> _At:
    n, lambdas = model.n_fixed, cov.factors_of(x, model.layout.structures)
    modes = find_modes(model, lambdas, fixed, v, INNER_LAST)
    H = None
    if exact:
        form = form_at(model, lambdas, fixed, modes)
        value, slope, H = form.value, form.gradient, joint_Hessian(model, x, form)[..., 0]
        scores: Any = partial(linalg_sum, stack=form.scores)
    else:
        eta, psi = model.predictor(fixed, modes.b), fixed[model.p :]
        expected = model.expected_curvature(eta, psi) if model.expected else None
        found: Slope = slope_at(
            model.effects, lambdas, model.data, model.derivatives(eta, psi), expected, modes.penalty
        )
        value, slope, scores = found.value, found.gradient, found.scores
    jacobian, _ = chain(x, slope[n:], model.layout)
    gradient = np.concatenate([slope[:n, 0], jacobian[..., 0].T @ slope[n:, 0]])
    return _At(float(value[0]), gradient, H, modes, scores)


def _is_definite(H: np.ndarray) -> bool:
    least: np.ndarray = float(np.sqrt(curvature_tolerance(H.dtype))) * H.diagonal()
    return bool(np.isfinite(H).all()) and bool(decompositions.is_positive((H - np.diag(least))[..., None])[0])


def fit_by_chords(rows: FamilyRows, model: Model, reference: Reference) -> GLMMEstimates | None:
    """The estimates by Laplace's approximation, or None where that takes another search.

    Args:
        rows: of one response. model: its objective, one lane.
    """
    n, layout = model.n_fixed, model.layout
    fixed, x = fixed_start(model, 1) + reference.moved, reference.x
    v: np.ndarray = np.zeros((*model.effects.effect_shape, 1))
    H, secant = reference.Hessian, None
    before, promised, last, exact, damped = np.inf, np.inf, np.inf, False, 1.0
    stood = False
    best: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None
    for i in range(MOST):
        at = _evaluate(model, fixed, x, v, exact)
        if not (np.isfinite(at.value) and np.isfinite(at.gradient).all()):
            return None
        point = np.concatenate([fixed, x])
        if at.Hessian is not None:
            H = at.Hessian
            secant = None
        if secant is None:
            T = len(point)
            secant = Secant(point, at.gradient[:, None], np.zeros((T, T, 1)), np.ones(1, bool))
        else:
            scale = np.sqrt(np.abs(H.diagonal()))[:, None]
            about = H @ (point - secant.at)[:, 0]
            secant = secant.updated(point, at.gradient[:, None], scale, np.ones(1, bool), about[:, None])
        B = H + secant.Hessian[..., 0]
        if not _is_definite(B):
            if exact:
                return None
            exact = True
            continue
        step = -np.linalg.solve(B, at.gradient)[:, None]
        distance = math.sqrt(max(-float(at.gradient @ step[:, 0]), 0.0))
        noise = 100 * np.finfo(float).eps * max(1.0, abs(at.value))
        if best is not None and at.value > last - 1e-3 * promised + noise:
            # Back to the point before, by its own Hessian, and if it was its own by a shorter step.
            damped = 0.3 * damped if stood else damped
            fixed, x, v = best
            exact, last, promised, before = True, np.inf, 0.0, np.inf
            continue
        if last < np.inf:
            damped = 1.0
        if exact and distance <= gradient_tolerance(float):
            return _finished(rows, model, at, fixed, x, distance, i + 1)
        length = float(np.sqrt((step[n:] ** 2).sum()))
        part = min(damped, search.REGION * max(float(np.sqrt((x * x).sum())), 0.2) / max(length, 1e-300))
        if n:
            part = min(part, float(cut(model, step[:n])[0]))
        near = part == 1.0 and distance < 1e-3 and distance * min(distance / before, 1.0) <= gradient_tolerance(float)
        poor = part == 1.0 and distance > POOR * before
        best, stood = (fixed, x, at.modes.v), exact
        exact = near or poor
        next_x, next_fixed = x + part * step[n:], fixed + part * step[:n]
        if not search.is_plain(next_x, layout.structures, least=INSIDE)[0]:
            return None
        D, next_D = (free_entries(covariances(own, layout)) for own in (x, next_x))
        v = at.modes.v + at.scores(np.concatenate([part * step[:n], next_D - D]))
        promised, last = (part - 0.5 * part**2) * distance**2, at.value
        before = distance if part == 1.0 else np.inf
        x, fixed = next_x, next_fixed
    return None


def _finished(
    rows: FamilyRows, model: Model, at: _At, fixed: np.ndarray, x: np.ndarray, distance: float, evaluations: int
) -> GLMMEstimates:
    one = np.ones(1)
    assert at.Hessian is not None
    solution = Solution(
        x=x, value=at.value * one, free=np.ones(x.shape, bool), kink=np.zeros(1, bool),
        scaled_gradient=distance * one, iterations=np.array([evaluations]),
        result=np.array([int(Result.CONVERGED)]),
    )  # fmt: skip
    end = End(at.value * one, at.gradient[:, None], at.Hessian[..., None], fixed, at.modes)
    return estimates_of(rows, model, solution, end)
