"""A generalised linear mixed model without each of some rows: the fit of all rows with their case weights put to zero.

Fits without one unit each stand in lanes beside each other. They begin at the estimates of all rows, so that most of
them need three evaluations: direct Newton steps over all parameters, as of many responses
(:mod:`mixjax.estimation.glmm_lanes`). What meets a boundary goes to the full search, and what that loses is fitted
alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mixjax import covariance as cov
from mixjax import decompositions, linalg
from mixjax.engine.component_effects import in_lanes
from mixjax.engine.coordinates import coordinates_in
from mixjax.engine.effects import free_entries
from mixjax.engine.laplace_curvature import ClosedForm
from mixjax.engine.laplace_fit import (
    INNER,
    INNER_LAST,
    chain,
    covariances,
    cut,
    find_modes,
    joint_Hessian,
    linalg_sum,
)
from mixjax.engine.laplace_model import Model, columns_of
from mixjax.engine.level_effects import OneFactor, filled
from mixjax.engine.quadrature import Rule, product_rule
from mixjax.estimation import search
from mixjax.estimation.glmm import GLMMEstimates, model_of
from mixjax.estimation.glmm_lanes import probe
from mixjax.estimation.glmm_quadrature import Joint, joint_at
from mixjax.estimation.glmm_search import SOLUTIONS, endless, search_lanes, solve_free
from mixjax.estimation.search import own_factors, result_code
from mixjax.machine import lanes_of, silently
from mixjax.optimise.newton import curvature_tolerance, gradient_tolerance
from mixjax.optimise.results import Result
from mixjax.products.family_rows import FamilyRows

# Numbers of a row function of a tile of lanes: it should stay in the cache.
TILE_NUMBERS, LEAST_LANES, MOST_LANES = 2**15, 8, 256
# Evaluations of direct Newton steps at most. What an inner step may promise where the value is one, and how much that
# may rise.
DIRECT_STEPS, SURE, RISEN = 12, 1e-4, 1e-7
# Longest one step of the coordinates of the covariances, relative to their length and at least.
REGION, LEAST_LENGTH = 0.5, 0.2


class Deleted(NamedTuple):
    """Estimates without each of U units; NaN where there are none.

    Attributes:
        fixed: ``(U, p)`` fixed effects, covariance: ``(U, p, p)`` of them, both in the basis of X of all rows.
        psi: ``(U, s)``. theta: ``(U, k)``. Sigma: per term ``(U, q, q)``. criterion: ``(U,)``, of one step the value
            where it begins. singular: ``(U,)``. iterations: ``(U,)`` evaluations.
        result: ``(U,)`` codes of :class:`mixjax.Result`; of one step ``CONVERGED``, or ``STALLED`` where there is none.
    """

    fixed: np.ndarray
    covariance: np.ndarray
    psi: np.ndarray
    theta: np.ndarray
    Sigma: tuple[np.ndarray, ...]
    criterion: np.ndarray
    singular: np.ndarray
    iterations: np.ndarray
    result: np.ndarray


Refit = Callable[[FamilyRows], GLMMEstimates]


def fits_without(
    rows: FamilyRows,
    est: GLMMEstimates,
    unit: np.ndarray,
    deleted: np.ndarray,
    curvature: str,
    nagq: int,
    refit: Refit | None,
) -> Deleted:
    """The fit's own criterion minimised anew without each unit, from the estimates of all rows.

    Args:
        rows: of one response. est: of all rows.
        unit: ``(n,)`` the unit of every row. deleted: ``(U,)`` units to leave out, one at a time.
        curvature: ``"observed"`` or ``"expected"``. nagq: nodes an effect; 0: ``refit`` does it all, unit by unit,
            which is for criteria that are neither Laplace's approximation nor quadrature.
        refit: fits rows with other case weights alone. None: one Newton step instead, over all parameters at once, the
            standard deviations that are zero held there.
    """
    with silently():
        work = _Deletions(rows, est, unit, deleted, curvature)
        if nagq == 0 and refit is not None:
            for u in range(len(deleted)):
                work.alone(u, refit)
        elif nagq > 1:
            work.by_quadrature(nagq, refit)
        elif refit is None:
            work.one_step()
        else:
            work.exactly(refit)
        return work.found


class _Deletions:
    """The deletions of one call, filled part by part."""

    def __init__(
        self, rows: FamilyRows, est: GLMMEstimates, unit: np.ndarray, deleted: np.ndarray, curvature: str
    ) -> None:
        self.rows, self.unit, self.deleted, self.U = rows, unit, deleted, len(deleted)
        model, lanes = model_of(rows, curvature), True
        if isinstance(model.effects, OneFactor):
            index = filled(np.asarray(model.effects.index))
            if not model.expected:
                model = replace(model, columns=columns_of(model.effects, model.data))
        else:
            index = np.arange(rows.n)
            beside = in_lanes(rows)
            lanes = beside is not None
            if beside is not None:
                model = replace(model, effects=beside)
        self.worthwhile = search.rank_reductions(rows.layout.structures).worthwhile
        self.model, self.code = model, unit[index][..., None]
        wide = max(LEAST_LANES, min(MOST_LANES, TILE_NUMBERS // index.size))
        self.lanes = wide if lanes else 1
        # Where all rows end: coordinates, which of them are free, fixed effects and psi, modes.
        x, self.free = coordinates_in(est.theta, rows.layout, [Z.R for Z in rows.Z_bases])
        self.x, self.fixed = x[:, None], rows.fixed_in_bases(est.beta, est.psi)[:, None]
        nowhere = np.zeros((*model.effects.effect_shape, 1))
        lambdas = cov.factors_of(self.x, rows.layout.structures)
        self.v = find_modes(model, lambdas, self.fixed, nowhere, INNER_LAST).v
        self.found = self._nothing(est)

    def _nothing(self, est: GLMMEstimates) -> Deleted:
        def nan(*shape: int) -> np.ndarray:
            return np.full((self.U, *shape), np.nan)

        p, count = self.rows.p, np.zeros(self.U, int)
        Sigma = tuple(nan(q, q) for q in self.rows.layout.qs)
        none = np.full(self.U, int(Result.STALLED))
        psi = nan(self.rows.n_psi)
        return Deleted(nan(p), nan(p, p), psi, nan(len(est.theta)), Sigma, nan(), count > 0, count.copy(), none)

    def without(self, at: np.ndarray) -> Model:
        """The model without each of units ``deleted[at]``, in lanes."""
        base = self.model.data.weights
        weights = np.where(self.code == self.deleted[at], 0.0, 1.0 if base is None else base)
        return replace(self.model, data=self.model.data._replace(weights=weights))

    def weighted(self, u: int) -> FamilyRows:
        own = np.ones(self.rows.n) if self.rows.weights is None else np.asarray(self.rows.weights, np.float64)
        return replace(self.rows, weights=np.where(self.unit == self.deleted[u], 0.0, own))

    def tiles(self) -> list[np.ndarray]:
        return [np.arange(first, min(first + self.lanes, self.U)) for first in range(0, self.U, self.lanes)]

    def _wide(self, values: np.ndarray, lanes: int) -> np.ndarray:
        return np.repeat(values, lanes, axis=-1)

    # --- one step

    def one_step(self) -> None:
        n = self.model.n_fixed
        for at in self.tiles():
            model, L = self.without(at), len(at)
            x, fixed, v = (self._wide(own, L) for own in (self.x, self.fixed, self.v))
            # Modes first: those of all rows are far for whoever loses most of a level.
            lambdas = cov.factors_of(x, model.layout.structures)
            v = find_modes(model, lambdas, fixed, v, INNER_LAST).v
            _, _, form = probe(model, x, fixed, v)
            gradient, H = by_x(model, x, form)
            self._put_step(at, gradient, H, form.value, n)

    def _put_step(self, at: np.ndarray, gradient: np.ndarray, H: np.ndarray, value: np.ndarray, n: int) -> None:
        L = len(at)
        free = np.repeat(self.free[:, None], L, axis=1)
        x, fixed = self._wide(self.x, L), self._wide(self.fixed, L)
        step = -solve_free(H, gradient[:, None], free, n)[:, 0]
        step = step * np.minimum(1.0, shortest(self.model, x, step))
        sound = is_convex(H, free, n) & np.isfinite(step).all(0)
        code = np.where(sound, int(Result.CONVERGED), int(Result.STALLED))
        self._put(at, x + step[n:], fixed + step[:n], value, np.ones(L, int), code, H, free)

    # --- all the way

    def exactly(self, refit: Refit) -> None:
        left = np.concatenate([self._directly(at) for at in self.tiles()])
        for first in range(0, len(left), self.lanes):
            self._search(left[first : first + self.lanes], refit)

    def _directly(self, at: np.ndarray) -> np.ndarray:
        """Newton's steps over all parameters but standard deviations that are zero in the fit of all rows, where that
        is enough; which units are left."""
        n, layout, everyone = self.model.n_fixed, self.model.layout, at
        done = np.zeros(len(at), bool)
        model, place = self.without(at), np.arange(len(at))
        x, fixed, v = (self._wide(own, len(at)) for own in (self.x, self.fixed, self.v))
        before = np.full(len(at), np.inf)
        for count in range(1, DIRECT_STEPS + 1):
            free = np.repeat(self.free[:, None], len(place), axis=1)
            v, inner, form = probe(model, x, fixed, v)
            gradient, H = by_x(model, x, form)
            step = -solve_free(H, gradient[:, None], free, n)[:, 0]
            decrement = -(gradient * step).sum(0)
            value = np.where(inner <= SURE, form.value, np.inf)
            sound = is_convex(H, free, n) & np.isfinite(step).all(0) & np.isfinite(v).all(tuple(range(v.ndim - 1)))
            sound &= (form.value <= before + RISEN) & ~self.worthwhile(x).any(0)
            reached = sound & (decrement <= gradient_tolerance(x.dtype) ** 2) & (inner <= INNER)
            if reached.any():
                ends = (x + step[n:], fixed + step[:n], form.value, H, free, step, v)
                new_x, new_fixed, values, own_H, own_free, last, _ = lanes_of(ends, np.flatnonzero(reached))
                # A minimum, where coordinates that are held at zero have curvature too.
                fine = is_convex(own_H, np.ones_like(own_free), n)
                code = endless(
                    self.model, self.rows.Q, last, new_x, own_free, np.full(len(fine), int(Result.CONVERGED)), own_H
                )
                kept, counts = np.flatnonzero(fine), np.full(int(fine.sum()), count)
                if len(kept):
                    parts = lanes_of((new_x, new_fixed, values, own_H, own_free), kept)
                    units = everyone[place[reached][fine]]
                    self._put(units, parts[0], parts[1], parts[2], counts, code[fine], parts[3], parts[4])
                done[place[reached][fine]] = True
            goes = np.flatnonzero(sound & ~reached)
            if not len(goes):
                break
            part = shortest(model, x, step)
            next_x, next_fixed = x + part * step[n:], fixed + part * step[:n]
            D, next_D = (free_entries(covariances(own, layout)) for own in (x, next_x))
            v = v + linalg_sum(np.concatenate([part * step[:n], next_D - D]), form.scores)
            x, fixed, v, before, place = lanes_of((next_x, next_fixed, v, value, place), goes)
            if len(goes) < len(sound):
                model = self.without(everyone[place])
        return everyone[~done]

    def _search(self, at: np.ndarray, refit: Refit) -> None:
        def prober(x: Any, fixed: Any, v: Any, longest: Any, lanes: np.ndarray) -> Any:
            return probe(self.without(at[lanes]), x, fixed, v, longest)

        x, fixed = self._wide(self.x, len(at)), self._wide(self.fixed, len(at))
        # A search that begins at zero finds a stationary point there.
        x = np.where(np.abs(x) < search.NEAR_ZERO, search.NEAR_ZERO, x)
        nothing = np.zeros((*self.model.effects.effect_shape, len(at)))
        ends = search_lanes(self.model, x, fixed, nothing, np.zeros(len(at), int), prober)
        fine = np.flatnonzero(~ends.lost)
        if len(fine):
            own = lanes_of(ends, fine)
            solution = own.solution
            factors = own_factors(solution.x, _wide_bases(self.rows), self.rows.layout)
            code = np.asarray(result_code(solution, factors))
            code = endless(self.model, self.rows.Q, own.step, solution.x, solution.free, code, own.Hessian)
            self._put(at[fine], solution.x, own.fixed, own.value, solution.iterations, code, own.Hessian, solution.free)
        for u in at[ends.lost]:
            self.alone(int(u), refit)

    # --- by quadrature, one after the other

    def by_quadrature(self, nagq: int, refit: Refit | None) -> None:
        n, model = self.model.n_fixed, replace(self.model, columns=None)
        rule = product_rule(nagq, self.rows.Z[0].shape[1])
        for u in range(self.U):
            own = replace(model, data=self.without(np.array([u])).data)
            at = joint_at(own, rule, self.fixed, self.x, self.v)
            if refit is None:
                self._put_step(np.array([u]), at.gradient[:, None], at.Hessian[..., None], np.array([at.value]), n)
            elif not self._newton(u, own, rule, at):
                self.alone(u, refit)

    def _newton(self, u: int, model: Model, rule: Rule, at: Joint) -> bool:
        """Newton's steps over all parameters, to the end; False where that is not enough."""
        n, structures = model.n_fixed, model.layout.structures
        for count in range(1, DIRECT_STEPS):
            gradient, H = at.gradient[:, None], at.Hessian[..., None]
            free = np.ones(at.x.shape, bool)
            if not (np.isfinite(H).all() and is_convex(H, free, n)[0] and search.is_plain(at.x, structures)[0]):
                return False
            step = -solve_free(H, gradient[:, None], free, n)[:, 0]
            if np.sqrt(max(-float((gradient * step).sum()), 0.0)) <= gradient_tolerance(H.dtype):
                value, code = np.array([at.value]), np.array([int(Result.CONVERGED)])
                code = endless(self.model, self.rows.Q, step, at.x, free, code, H)
                self._put(np.array([u]), at.x + step[n:], at.fixed + step[:n], value, np.array([count]), code, H, free)
                return True
            step = step * shortest(model, at.x, step)
            new = joint_at(model, rule, at.fixed + step[:n], at.x + step[n:], at.modes.v)
            if not new.value < at.value + 1e-9:
                return False
            at = new
        return False

    # --- what is kept

    def alone(self, u: int, refit: Refit) -> None:
        """A unit that lanes do not serve, by the search of a single fit."""
        est, found, R = refit(self.weighted(u)), self.found, self.rows.X_basis.R
        found.result[u], found.iterations[u] = int(est.result), int(est.iterations)
        if int(est.result) not in SOLUTIONS:
            return
        found.fixed[u], found.covariance[u] = R @ est.beta, R @ est.vcov @ R.T
        found.psi[u], found.theta[u], found.criterion[u] = est.psi, est.theta, est.criterion
        found.singular[u] = bool(est.singular)
        for whole, part in zip(found.Sigma, est.Sigma, strict=True):
            whole[u] = part

    def _put(
        self, at: np.ndarray, x: np.ndarray, fixed: np.ndarray, value: np.ndarray, iterations: np.ndarray,
        code: np.ndarray, H: np.ndarray, free: np.ndarray,
    ) -> None:  # fmt: skip
        found, p, n = self.found, self.model.p, self.model.n_fixed
        found.result[at], found.iterations[at] = code, iterations
        fine = np.flatnonzero(np.isin(code, SOLUTIONS))
        if not len(fine):
            return
        at = at[fine]
        x, fixed, value, H, free = (lanes_of(part, fine) for part in (x, fixed, value, H, free))
        own = own_factors(x, _wide_bases(self.rows), self.rows.layout)
        inverse = solve_free(H, np.broadcast_to(np.eye(len(H))[..., None], H.shape), free, n)
        found.fixed[at], found.psi[at] = fixed[:p].T, self.rows.psi_of_bases(fixed[p:]).T
        found.covariance[at] = np.moveaxis(2.0 * inverse[:p, :p], -1, 0)
        found.theta[at], found.criterion[at] = cov.theta_of_lambdas(own.lambdas).T, value
        found.singular[at] = own.deficient
        for whole, L in zip(found.Sigma, own.lambdas, strict=True):
            whole[at] = np.moveaxis(linalg.matmul(L, linalg.transpose(L)), -1, 0)


def by_x(model: Model, x: np.ndarray, form: ClosedForm) -> tuple[np.ndarray, np.ndarray]:
    """Gradient and Hessian by fixed and x, ``(T, L)`` and ``(T, T, L)``."""
    n = model.n_fixed
    jacobian, _ = chain(x, form.gradient[n:], model.layout)
    own = linalg.matmul(linalg.transpose(jacobian), form.gradient[n:, None])[:, 0]
    return np.concatenate([form.gradient[:n], own]), joint_Hessian(model, x, form)


def shortest(model: Model, x: np.ndarray, step: np.ndarray) -> np.ndarray:
    """The part ``(L,)`` of a step of fixed and x that is not too long, as the search has it."""
    n = model.n_fixed
    length = np.sqrt((step[n:] ** 2).sum(0))
    most = REGION * np.maximum(np.sqrt((x * x).sum(0)), LEAST_LENGTH)
    part = most / np.maximum(length, most)
    shorter: np.ndarray = np.minimum(part, cut(model, step[:n])) if n else part
    return shorter


def is_convex(H: np.ndarray, free: np.ndarray, n: int) -> np.ndarray:
    """``(L,)`` the Hessian is positive definite among fixed and the coordinates that are free."""
    among = np.concatenate([np.ones((n, free.shape[1]), bool), free])
    H = np.where(among[:, None] & among[None], H, linalg.eye(len(H), H))
    least = np.sqrt(curvature_tolerance(H.dtype)) * np.stack([H[i, i] for i in range(len(H))])
    positive: np.ndarray = decompositions.is_positive(H - linalg.eye(len(H), H) * least)
    return positive


def _wide_bases(rows: FamilyRows) -> tuple[Any, ...]:
    """With an axis for lanes that share them."""
    return tuple(type(basis)(*(np.asarray(part)[..., None] for part in basis)) for basis in rows.Z_bases)
