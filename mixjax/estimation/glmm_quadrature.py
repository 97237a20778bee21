"""The fit of one generalised linear mixed model by adaptive Gauss-Hermite quadrature, by NumPy.

The gradient is exact (:mod:`mixjax.engine.quadrature`). The Hessian is that of Laplace's approximation, in closed form,
and central differences of the gradient of what quadrature adds to it: all displaced points are lanes of one evaluation.
So the steps are Newton's, and standard errors are good to the square of the displacement, times what quadrature adds.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mixjax import covariance as cov
from mixjax import decompositions
from mixjax.engine.effects import free_entries
from mixjax.engine.laplace_curvature import ClosedForm
from mixjax.engine.laplace_fit import (
    INNER_LAST,
    MIDDLE,
    MIDDLE_LAST,
    MOST_MIDDLE,
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
from mixjax.engine.quadrature import Rule, check_nodes, product_rule
from mixjax.engine.quadrature_moments import added
from mixjax.estimation import search
from mixjax.estimation.glmm import End, GLMMEstimates, estimates_of, fit_rows, model_of
from mixjax.estimation.glmm_start import far_of
from mixjax.machine import silently
from mixjax.optimise.newton import Solution
from mixjax.products.family_rows import FamilyRows
from mixjax.products.sums import Layout

# Displacement of the differences, in standard errors: its square is the relative error, the rounding of the gradient
# (1e-12 of a standard error's) over it the absolute one.
DISPLACED = 1e-4
# Numbers of rows times lanes of one evaluation of displaced points.
MOST_NUMBERS = 2_000_000
# A standard deviation that Laplace's approximation puts to zero is begun with here, in the basis of Z: zero would be
# stationary.
LEAST_START = 0.1


class Joint(NamedTuple):
    """The objective at one point by fixed and x.

    Attributes:
        value: number. gradient: ``(T,)``. Hessian: ``(T, T)``. fixed: ``(p + s, 1)``, x: ``(k, 1)``, modes, form: of
            Laplace's approximation there.
    """

    value: float
    gradient: np.ndarray
    Hessian: np.ndarray
    fixed: np.ndarray
    x: np.ndarray
    modes: Modes
    form: ClosedForm


class Laplace(NamedTuple):
    """Laplace's approximation at one point: gradient ``(T,)`` and Hessian ``(T, T)`` by fixed and x."""

    modes: Modes
    form: ClosedForm
    gradient: np.ndarray
    Hessian: np.ndarray


def laplace_at(model: Model, fixed: np.ndarray, x: np.ndarray, v: np.ndarray) -> Laplace:
    """Args: fixed: ``(p + s, 1)``. x: ``(k, 1)``. v: where modes are looked for from."""
    n = model.n_fixed
    lambdas = cov.factors_of(x, model.layout.structures)
    modes = find_modes(model, lambdas, fixed, v, INNER_LAST)
    form = form_at(model, lambdas, fixed, modes)
    jacobian, _ = chain(x, form.gradient[n:], model.layout)
    gradient = np.concatenate([form.gradient[:n, 0], jacobian[..., 0].T @ form.gradient[n:, 0]])
    return Laplace(modes, form, gradient, joint_Hessian(model, x, form)[..., 0])


def joint_at(model: Model, rule: Rule, fixed: np.ndarray, x: np.ndarray, v: np.ndarray) -> Joint:
    """Value, exact gradient and Hessian at one point; modes are looked for from ``v``."""
    n, layout = model.n_fixed, model.layout
    modes, form, gradient, H = laplace_at(model, fixed, x, v)
    T = len(gradient)
    curvature = np.abs(H.diagonal())
    usable = np.isfinite(curvature) & (curvature > 1e-12 * np.max(curvature, initial=1e-300))
    lengths = DISPLACED * np.where(usable, np.sqrt(2.0 / np.where(usable, curvature, 1.0)), 1.0)
    lengths = np.minimum(lengths, DISPLACED * np.maximum(1.0, np.abs(np.concatenate([fixed, x])[:, 0])) * 10.0)
    moves = np.concatenate([np.zeros((T, 1)), np.diag(lengths), -np.diag(lengths)], axis=1)
    rows = int(np.prod(model.data.y.shape))
    step = max(1, MOST_NUMBERS // rows)
    values, slopes = [], []
    for first in range(0, 2 * T + 1, step):
        own = moves[:, first : first + step]
        at_fixed, at_x = fixed + own[:n], x + own[n:]
        changed = np.concatenate(
            [own[:n], free_entries(covariances(at_x, layout)) - free_entries(covariances(x, layout))]
        )
        there = find_modes(model, cov.factors_of(at_x, layout.structures), at_fixed,
                           modes.v + linalg_sum(changed, form.scores), INNER_LAST)  # fmt: skip
        value, slope = added(model, rule, at_fixed, at_x, there.b)
        values.append(value)
        slopes.append(slope)
    by = np.concatenate(slopes, axis=1)
    extra = (by[:, 1 : T + 1] - by[:, T + 1 :]) / (2.0 * lengths)
    gradient, H = gradient + by[:, 0], H + 0.5 * (extra + extra.T)
    even = np.concatenate([np.zeros(n, bool), zero_roots(x, layout)[:, 0]])
    gradient[even] = 0.0
    H[np.ix_(even, ~even)] = H[np.ix_(~even, even)] = 0.0
    return Joint(float(form.value[0] + values[0][0]), gradient, H, fixed, x, modes, form)


def zero_roots(x: np.ndarray, layout: Layout) -> np.ndarray:
    """``(k, L)`` coordinates of zero columns of a factor, or at a bound, as roots that are zero: the criterion is even
    there, so that their slopes are zero, whatever rounding says."""
    found = []
    for structure, part in zip(layout.structures, cov.cut(x, layout.structures), strict=True):
        if structure.is_lower:
            zero = ~(structure.factor(part) != 0).any(0)  # (q, L)
            found.append(np.stack([zero[structure.factor(unit).any(0)].all(0) for unit in np.eye(structure.k)]))
        else:
            found.append(~structure.reduced(part, np.full(part.shape[1], -1))[1])
    return np.concatenate(found)


def _step(model: Model, at: Joint) -> np.ndarray:
    """Newton's step ``(p + s, 1)`` of fixed; where the Hessian is not positive definite, by scoring; NaN where modes
    are so far away that this has no full rank either."""
    n, p = model.n_fixed, model.p
    H = at.Hessian[:n, :n]
    if n and not decompositions.is_positive(H[..., None])[0]:
        H = np.zeros((n, n))
        H[:p, :p] = at.form.fisher[:p, :p, 0]
        own = np.arange(p, n)
        H[own, own] = np.abs(at.Hessian[own, own]) + 1.0
    try:
        return -np.linalg.solve(H, at.gradient[:n, None])
    except np.linalg.LinAlgError:
        return np.full((n, 1), np.nan)


def profile(model: Model, rule: Rule, fixed: np.ndarray, x: np.ndarray, v: np.ndarray, tolerance: float) -> Joint:
    """The objective where a Newton step of fixed promises no more than half the tolerance."""
    n = model.n_fixed
    at = joint_at(model, rule, fixed, x, v)
    for _ in range(MOST_MIDDLE):
        if not n or not np.isfinite(at.value):
            break
        step = _step(model, at)
        decrement = -float(at.gradient[:n] @ step[:, 0])
        if decrement <= tolerance:
            break
        part = float(cut(model, step)[0])
        while part > 1e-9:
            moved = linalg_sum(part * step, at.form.scores[:n])
            new = joint_at(model, rule, at.fixed + part * step, x, at.modes.v + moved)
            if new.value <= at.value - 1e-4 * part * decrement + 1e-11 * (1.0 + abs(at.value)):
                break
            part /= 3.0
        else:
            break
        at = new
    return at


class Memory(NamedTuple):
    """The last point, from which the next one is foretold: there, how fixed moves with x, and its own step."""

    at: Joint
    slopes: np.ndarray
    step: np.ndarray

    def foretell(self, model: Model, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``fixed`` and ``v`` at x."""
        layout = model.layout
        change = self.slopes @ (x - self.at.x) + self.step
        if len(change):
            change = cut(model, change) * change
        moved = free_entries(covariances(x, layout)) - free_entries(covariances(self.at.x, layout))
        v = self.at.modes.v + linalg_sum(np.concatenate([change, moved]), self.at.form.scores)
        return self.at.fixed + change, v


def fit_rows_by_quadrature(rows: FamilyRows, nagq: int, start: np.ndarray | None = None) -> GLMMEstimates:
    """Estimates by adaptive Gauss-Hermite quadrature, by NumPy, from those by Laplace's approximation.

    Args:
        rows: of one response, one grouping factor. nagq: nodes an effect. start: ``(k,)`` theta for the search by
            Laplace's approximation, or None.

    Raises:
        ValueError: there is no quadrature of so many nodes for the model.
    """
    check_nodes(nagq, rows)
    with silently():
        begin = fit_rows(rows, start)
        if nagq == 1:
            return begin
        model = model_of(rows)
        rule = product_rule(int(nagq), rows.Z[0].shape[1])
        structures, n = rows.layout.structures, model.n_fixed
        lambdas = cov.lambdas_of_theta(np.asarray(begin.theta), rows.layout.qs)
        x0 = cov.near([(Z.R @ own)[..., None] for Z, own in zip(rows.Z_bases, lambdas, strict=True)], structures)
        deviations = np.concatenate([np.isin(np.arange(s.k), s.deviations) for s in structures])[:, None]
        x0 = np.where(deviations & (np.abs(x0) < LEAST_START), LEAST_START, x0)
        fixed = rows.fixed_in_bases(begin.beta, begin.psi)[:, None]
        nowhere = np.zeros((*model.effects.effect_shape, 1))
        memory: Memory | None = None

        def by_x(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
            nonlocal memory
            before = (fixed, nowhere) if memory is None else memory.foretell(model, x)
            at = profile(model, rule, before[0], x, before[1], MIDDLE)
            g, H = at.gradient, at.Hessian
            if not (np.isfinite(at.value) and np.isfinite(g).all() and np.isfinite(H).all()):
                return np.array([np.nan]), g[n:, None], H[n:, n:, None]
            step = _step(model, at)
            if not np.isfinite(step).all():
                return np.array([np.nan]), g[n:, None], H[n:, n:, None]
            slopes = -np.linalg.solve(H[:n, :n], H[:n, n:])
            memory = Memory(at, slopes, step)
            value = at.value + 0.5 * float(g[:n] @ step[:, 0])
            gradient = g[n:] + H[n:, :n] @ step[:, 0]
            return np.array([value]), gradient[:, None], (H[n:, n:] + H[n:, :n] @ slopes)[..., None]

        solution: Solution = search.run(by_x, x0, structures, far_of(model))
        before = (fixed, nowhere) if memory is None else memory.foretell(model, solution.x)
        last = profile(model, rule, before[0], solution.x, before[1], MIDDLE_LAST)
        end = End(np.array([last.value]), last.gradient[:, None], last.Hessian[..., None], last.fixed, last.modes)
        return estimates_of(rows, model, solution, end)
