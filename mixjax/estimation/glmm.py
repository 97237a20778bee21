"""From rows to the estimates of one generalised linear mixed model."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mixjax import covariance as cov
from mixjax.design import AnyArray
from mixjax.engine.block_effects import Crossed, crossed
from mixjax.engine.coordinates import coordinates_in, solve_where
from mixjax.engine.effects import directions_of
from mixjax.engine.laplace_curvature import Data
from mixjax.engine.laplace_fit import (
    INNER_LAST,
    MIDDLE_LAST,
    Evaluated,
    Modes,
    chain,
    evaluate,
    joint_Hessian,
    nothing_known,
)
from mixjax.engine.laplace_model import Model
from mixjax.engine.level_effects import OneFactor, filled, one_factor
from mixjax.estimation import search
from mixjax.estimation.glmm_start import MOST_ITERATIONS, covariance_start, far_of, fixed_start
from mixjax.estimation.search import own_factors, result_code
from mixjax.machine import Array, silently
from mixjax.optimise.newton import Solution
from mixjax.optimise.results import Result
from mixjax.products.family_rows import FamilyRows

# Change of a row's predictor, of psi, or of a standard deviation, by the last Newton step, from which on it goes on for
# ever although it promises nothing.
ENDLESS = 1e-3
# Standard error of a fixed effect, in the basis of X, that no data with an estimate have, and the links of which that
# is true.
FLAT = 100.0
RELATIVE = ("logit", "probit", "cloglog", "cauchit", "log")
# Evaluations one after the other where that is so, after which the search is given up.
SURELY = 6


class GLMMEstimates(NamedTuple):
    """Estimates of one generalised linear mixed model. A JAX pytree.

    Attributes:
        theta: ``(k,)`` Cholesky factors of the *absolute* covariances, lower triangle column by column, term by term.
        beta: ``(p,)`` fixed effects. psi: ``(s,)`` the family's parameters, logarithms; of one that has a linear
            predictor the coefficients of its columns.
        Sigma: per term ``(q, q)``, covariance of its random effects.
        vcov: ``(p, p)`` covariance of beta, from the Hessian of all parameters: those of the covariances are estimated;
            with ``nagq=0`` given the others.
        vcov_all: ``(p + s + k, p + s + k)`` of beta, psi and the coordinates of the covariances in the bases of the
            rows (those that :func:`mixjax.engine.coordinates.coordinates_in` gives of theta); zero where a coordinate
            is fixed at zero.
        b: per term ``(n_groups, q)``, conditional modes. eta: ``(n,)`` linear predictor at them.
        criterion: ``()`` -2 log-likelihood by Laplace's approximation or quadrature, restricted with ``reml=True``, all
            constants kept.
        converged, singular, iterations, grad_norm, result: as in :class:`mixjax.Estimates`.
        mode_error: ``()`` how far the modes are from where one more step would take them, at most.
    """

    theta: AnyArray
    beta: AnyArray
    psi: AnyArray
    Sigma: tuple[AnyArray, ...]
    vcov: AnyArray
    vcov_all: AnyArray
    b: tuple[AnyArray, ...]
    eta: AnyArray
    criterion: AnyArray
    converged: AnyArray
    singular: AnyArray
    iterations: AnyArray
    grad_norm: AnyArray
    mode_error: AnyArray
    result: AnyArray


def model_of(rows: FamilyRows, curvature: str = "observed") -> Model:
    """The objective of rows of numbers, for NumPy: one lane."""
    effects = one_factor(rows) if len(rows.levels) == 1 else crossed(rows)
    empty = _index(effects, rows.n) < 0

    def at(values: Any, columns: bool = False) -> Any:
        if values is None:
            return None
        taken = _placed(effects, np.asarray(values, np.float64))
        return np.moveaxis(taken, -1, 0)[..., None] if columns else taken[..., None]

    weights = at(rows.weights)
    if empty.any():
        weights = np.where(empty[..., None], 0.0, 1.0 if weights is None else weights)
    psi = tuple(at(own, columns=True) for own in rows.psi_columns)
    data = Data(at(rows.y), at(rows.size), weights, at(rows.offset), at(rows.Q, columns=True), psi)
    trials = 0.0 if rows.size is None or np.ptp(rows.size) > 0 else float(np.max(rows.size))
    return Model(effects, data, rows.family, curvature == "expected", unit=rows.unit, trials=trials)


def _index(effects: OneFactor | Crossed, n: int) -> np.ndarray:
    """Which row of the data stands where; -1 at empty places."""
    return np.asarray(effects.index) if isinstance(effects, OneFactor) else np.arange(n)


def _placed(effects: OneFactor | Crossed, values: np.ndarray) -> np.ndarray:
    """Values ``(n, ...)`` in the order of the data -> ``(*rows, ...)``; see :func:`filled` for empty places."""
    placed: np.ndarray = values[filled(_index(effects, len(values)))]
    return placed


def check_curvature(curvature: Any) -> None:
    """Raise ValueError unless it is ``"observed"`` or ``"expected"``."""
    if not isinstance(curvature, str) or curvature not in ("observed", "expected"):
        raise ValueError(f"curvature must be 'observed' or 'expected', got {curvature!r}")


def fit_rows(rows: FamilyRows, start: np.ndarray | None = None, curvature: str = "observed") -> GLMMEstimates:
    """Estimates by Laplace's approximation, by NumPy.

    Args:
        rows: of one response. start: ``(k,)`` theta, or None.
    """
    with silently():
        model = model_of(rows, curvature)
        structures = rows.layout.structures
        fixed, x0 = start_of(rows, model, start)
        memory, endless = nothing_known(model, fixed), 0
        units = np.where(np.arange(model.n_fixed) < model.p, model.unit, 1.0)

        def by_x(x: Array) -> tuple[Array, Array, Array]:
            nonlocal memory, endless
            if endless > SURELY:
                return tuple(np.full(shape, np.nan) for shape in ((1,), (len(x), 1), (len(x), len(x), 1)))  # type: ignore
            found = evaluate(model, x, memory)
            if all(np.isfinite(part).all() for part in found.memory):
                memory = found.memory
            longest = (np.abs(found.step[:, 0]) / units).max(initial=0.0)
            endless = endless + 1 if longest > 10.0 * ENDLESS or not np.isfinite(longest) else 0
            return found.value, found.gradient, found.Hessian

        solution = search.run(by_x, x0, structures, far_of(model), MOST_ITERATIONS)
        last = evaluate(model, solution.x, memory, INNER_LAST, MIDDLE_LAST)
        if endless > SURELY and np.isfinite(last.value).all():  # where it stands says why it does not end
            solution = solution._replace(result=np.array([int(Result.CONVERGED)]))
        return assemble(rows, model, solution, last)


def start_of(rows: FamilyRows, model: Model, start: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Where a search begins, ``fixed (p + s, 1)`` and coordinates ``(k, 1)``: at theta ``(k,)`` or, of None, by the
    data."""
    fixed = fixed_start(model, 1)
    if start is None:
        x0, fixed = covariance_start(model, fixed)
        return fixed, x0
    lambdas = cov.lambdas_of_theta(np.asarray(start, np.float64), rows.layout.qs)
    inside = [(Z.R @ own)[..., None] for Z, own in zip(rows.Z_bases, lambdas, strict=True)]
    x0 = cov.near(inside, rows.layout.structures)
    return fixed, np.where(np.abs(x0) < 1e-3, 1e-3, x0)


def assemble(rows: FamilyRows, model: Model, solution: Solution, last: Evaluated) -> GLMMEstimates:
    """All that follows from the coordinates, on the scale of the original columns."""
    gradient = np.concatenate([last.form.gradient[: model.n_fixed], last.gradient])
    H = joint_Hessian(model, solution.x, last.form)
    return estimates_of(rows, model, solution, End(last.value, gradient, H, last.fixed, last.modes))


class End(NamedTuple):
    """The last evaluation of a fit.

    Attributes:
        value: ``(1,)``. gradient, Hessian: by fixed and x: ``(p + s + k, 1)``, ``(p + s + k, p + s + k, 1)``.
        fixed: ``(p + s, 1)``. modes: of the random effects.
    """

    value: Array
    gradient: Array
    Hessian: Array
    fixed: Array
    modes: Modes


def estimates_of(rows: FamilyRows, model: Model, solution: Solution, last: End) -> GLMMEstimates:
    """All that follows from the end of a search, on the scale of the original columns."""
    n, p, x = model.n_fixed, model.p, solution.x
    H, free = last.Hessian[..., 0], np.concatenate([np.ones(n, bool), solution.free[:, 0]])
    own = own_factors(x[:, 0], rows.Z_bases, rows.layout)
    theta = cov.theta_of_lambdas(own.lambdas)
    gradient = last.gradient[:, 0]
    inverse = solve_where(free, H, np.eye(len(H)))
    # Signs of the search's coordinates are free, so the covariance is that of those which theta has.
    own_x, own_free = coordinates_in(theta, rows.layout, [Z.R for Z in rows.Z_bases])
    signs = np.concatenate([np.ones(n), np.where(own_x * x[:, 0] < 0.0, -1.0, 1.0)])
    own_H = signs[:, None] * H * signs
    own_inverse = solve_where(np.concatenate([np.ones(n, bool), own_free]), own_H, np.eye(len(H)))
    to_user = np.eye(len(H))
    to_user[:n, :n] = rows.fixed_change
    covariance = to_user @ (2.0 * own_inverse) @ to_user.T
    code = int(result_code(Solution(*(part[..., 0] for part in solution)), own))
    if code in (Result.CONVERGED, Result.NONDIFFERENTIABLE):
        code = _endless(model, -inverse @ gradient, x[:, 0], code)
        if code in (Result.CONVERGED, Result.NONDIFFERENTIABLE) and is_flat(model, inverse[..., None])[0]:
            code = Result.SEPARATED
    eta = model.predictor(last.fixed, last.modes.b)
    return GLMMEstimates(
        theta=theta,
        beta=rows.X_basis.R_inv @ last.fixed[:p, 0],
        psi=rows.psi_of_bases(last.fixed[p:, 0]),
        Sigma=tuple(L @ L.T for L in own.lambdas),
        vcov=covariance[:p, :p],
        vcov_all=covariance,
        b=modes_by_term(rows, model, last.modes.b),
        eta=in_order(model, eta, rows.n),
        criterion=np.float64(last.value[0]),
        converged=np.bool_(Result(code).is_solution),
        singular=own.deficient,
        iterations=solution.iterations[0],
        grad_norm=solution.scaled_gradient[0],
        mode_error=np.sqrt(np.maximum(last.modes.decrement[0], 0.0)),
        result=np.int64(code),
    )


def is_flat(model: Model, inverse: np.ndarray) -> np.ndarray:
    """``(L,)``: a combination of the fixed effects, of root mean square 1 in the predictor, has a standard error of
    more than :data:`FLAT`: the search has run so far along a separating direction that its steps are rounding.

    Args:
        inverse: ``(T, T, L)`` of the joint Hessian. Of links whose scale is that of the response nothing is said.
    """
    if model.family.link not in RELATIVE:
        return np.zeros(inverse.shape[-1], bool)
    variances = 2.0 * np.stack([inverse[i, i] for i in range(model.p)] or [np.zeros(inverse.shape[-1])])
    fine = np.asarray(((variances >= 0.0) & (variances < FLAT**2)).all(axis=0))
    return ~fine


def _endless(model: Model, step: np.ndarray, x: np.ndarray, code: int) -> int:
    """``SEPARATED`` or ``UNBOUNDED`` where Newton's step stays long although it promises nothing: along a direction in
    which the likelihood grows for ever it approaches its bound like ``exp(-t)``."""
    n, p = model.n_fixed, model.p
    eta = sum((column * own for column, own in zip(model.data.X, step[:p], strict=True)), np.zeros(1))
    if np.abs(eta).max(initial=0.0) > ENDLESS * model.unit:
        return Result.SEPARATED
    if np.abs(step[p:n]).max(initial=0.0) > ENDLESS or (np.abs(step[n:]) > ENDLESS * np.maximum(1.0, np.abs(x))).any():
        return Result.UNBOUNDED
    return code


def conditional_covariances(rows: FamilyRows, est: GLMMEstimates) -> list[np.ndarray]:
    """Covariances ``(levels, q, q)`` of the random effects given the data and all parameters, of every grouping factor:
    the inverse of the observed curvature at the modes, all terms of a factor side by side."""
    with silently():
        model = model_of(rows)
        effects: Any = model.effects
        eta = _placed(effects, est.eta)[..., None]
        psi = rows.fixed_in_bases(est.beta, est.psi)[rows.p :, None]
        lambdas = cov.lambdas_of_theta(est.theta, rows.layout.qs)
        inside = [(Z.R @ own)[..., None] for Z, own in zip(rows.Z_bases, lambdas, strict=True)]
        curvature = model.derivatives(eta, psi).by_eta[2]
        blocks = effects.covariances(effects.gain(inside, effects.normal(curvature)))
    found = []
    for f in range(len(rows.levels)):
        own = [t for t, place in enumerate(rows.layout.terms) if place.factor == f]
        to_user = np.zeros(blocks[f].shape[:2])
        for t in own:
            at = slice(rows.layout.terms[t].start, rows.layout.terms[t].start + rows.layout.terms[t].q)
            to_user[at, at] = rows.Z_bases[t].R_inv
        found.append(np.einsum("ab,bcm,dc->mad", to_user, blocks[f], to_user))
    return found


def mode_slopes(rows: FamilyRows, est: GLMMEstimates) -> tuple[np.ndarray, ...]:
    """Per term ``(p + s + k, n_groups, q)``: derivatives of the conditional modes by beta, psi and the coordinates of
    the covariances, those of ``vcov_all``.

    With ``b = -D Z'c'`` at the modes, ``A = Z' diag(c'') Z``, ``K = D (I + A D)^{-1}``: by a fixed effect ``-K Z'(c''
    x)``, by psi ``-K Z'(dc'/dpsi)``, by a covariance ``(I - K A) dD g``, ``g = -Z'c'``. D may be singular.
    """
    with silently():
        model = model_of(rows)
        effects: Any = model.effects
        fixed = rows.fixed_in_bases(est.beta, est.psi)[:, None]
        at = model.derivatives(_placed(effects, est.eta)[..., None], fixed[rows.p :])
        lambdas = cov.lambdas_of_theta(est.theta, rows.layout.qs)
        inside = [(Z.R @ own)[..., None] for Z, own in zip(rows.Z_bases, lambdas, strict=True)]
        _, c1, c2, *_ = at.by_eta
        gain = effects.gain(inside, effects.normal(c2))
        pushes = [c2 * column for column in np.asarray(model.data.X)]
        pushes += [np.broadcast_to(own[1], c1.shape) for own in at.by_psi]
        if pushes:  # of the original columns
            pushes = list(np.einsum("a...,ab->b...", np.stack(pushes), np.linalg.inv(rows.fixed_change)))
        x, _ = coordinates_in(est.theta, rows.layout, [Z.R for Z in rows.Z_bases])
        jacobian = chain(x[:, None], np.zeros((len(directions_of(rows.layout)), 1)), rows.layout)[0][..., 0]
        moved = effects.moved(-effects.effects(c1))
        by_x = np.einsum("j...,jk->k...", moved - gain.solve(gain.times_A(moved)), jacobian)
        parts = [by_x] if not pushes else [-gain.solve(effects.effects(np.stack(pushes))), by_x]
        found = [modes_by_term(rows, model, own) for own in np.concatenate(parts)]
    return tuple(np.stack(term) for term in zip(*found, strict=True))


def modes_by_term(rows: FamilyRows, model: Model, b: np.ndarray) -> tuple[np.ndarray, ...]:
    """Per term ``(n_groups, q)``, for the user's columns."""
    found = []
    for place, basis in zip(rows.layout.terms, rows.Z_bases, strict=True):
        if isinstance(model.effects, OneFactor):
            own = b[place.start : place.start + place.q, :, 0]
        else:
            effects, m = model.effects, rows.levels[place.factor]
            assert isinstance(effects, Crossed)
            begin = effects.place_of(place.factor)[0]
            own = b[begin + place.start * m : begin + (place.start + place.q) * m, 0].reshape(place.q, m)
        found.append((basis.R_inv @ own).T)
    return tuple(found)


def in_order(model: Model, values: np.ndarray, n: int) -> np.ndarray:
    """Row functions ``(*rows, 1)`` in the order of the data."""
    if not isinstance(model.effects, OneFactor):
        return values[:, 0]
    index = model.effects.index.reshape(-1)
    found = np.empty(n)
    found[index[index >= 0]] = values.reshape(-1)[index >= 0]
    return found
