"""Conditional minima of a generalised linear mixed model's criterion: one parameter held, all others free.

Each is the fit of a smaller model, by Laplace's approximation: a fixed effect that is held is an offset, and its column
leaves X; a parameter of the family makes a family with one less; a standard deviation or a correlation makes a
covariance structure with one coordinate less (:mod:`mixjax.covariance.held`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mixjax import covariance as cov
from mixjax.covariance import diagonal_positions, sections
from mixjax.covariance.held import Held, with_correlation, with_deviation
from mixjax.covariance.sections import TIMES
from mixjax.engine.laplace_fit import INNER_LAST, MIDDLE_LAST, MOST_PSI, evaluate, nothing_known
from mixjax.engine.laplace_model import Model
from mixjax.engine.level_effects import OneFactor, filled
from mixjax.estimation import search
from mixjax.estimation.glmm import GLMMEstimates, model_of
from mixjax.estimation.glmm_start import FAR, MOST_ITERATIONS
from mixjax.families.held import HeldFamily
from mixjax.machine import Array, silently
from mixjax.optimise import newton
from mixjax.optimise.results import Result
from mixjax.products.family_rows import FamilyRows, places_of

# Twice what the last steps of modes and fixed effects may promise where a value counts.
SURE = 1e-6


class Parameter(NamedTuple):
    """What is held: ``"sd"`` of effect i of a term, ``"cor"`` of effects i and j, ``"real"``, coordinate i of a
    structure of the user's own, ``"psi"`` i of the family (as it is estimated, a logarithm), ``"fixed"`` effect i."""

    kind: str
    term: int = -1
    i: int = -1
    j: int = -1


class ConditionalFit(NamedTuple):
    """A conditional minimum, on the scale of the user's columns.

    Attributes:
        criterion: -2 log-likelihood. converged: the search did.
        beta: ``(p,)``. psi: ``(s,)``. factors: per term ``(q, q)`` of its covariance, any.
        v: modes of the random effects in the model's order, as ``b = D v``; None where they are not known.
    """

    criterion: float
    converged: bool
    beta: np.ndarray
    psi: np.ndarray
    factors: tuple[np.ndarray, ...]
    v: np.ndarray | None = None


def unconditional(est: GLMMEstimates, qs: tuple[int, ...]) -> ConditionalFit:
    """The fit itself."""
    lambdas = cov.lambdas_of_theta(np.asarray(est.theta), qs)
    return ConditionalFit(float(est.criterion), True, est.beta, est.psi, tuple(lambdas))


class HeldSearch:
    """Conditional minima of one data set, by NumPy."""

    def __init__(self, rows: FamilyRows, curvature: str):
        self.rows = rows
        with silently():
            self._model = model_of(rows, curvature)
            self._without: dict[int, tuple[np.ndarray, np.ndarray, Model]] = {}
            self._curvature = curvature

    def minimise(self, what: Parameter, value: float, near: ConditionalFit) -> ConditionalFit:
        """The least criterion with a parameter at a value.

        A second search comes down from larger variances where the first ends near a boundary, or fails.

        Args:
            near: where the search begins.
        """
        with silently():
            found = self._searched(what, value, near)
            shapes = [len(own) for own in near.factors]
            inside = [Z.R @ own for Z, own in zip(self.rows.Z_bases, found.factors, strict=True)]
            small = [
                not np.isfinite(own).all() or np.linalg.svd(own, compute_uv=False).min() < search.NEAR_ZERO
                for own in inside
            ]
            only = what.kind == "sd" and shapes == [1]
            if only or (found.converged and not any(small)):
                return found
            far = [Z.R_inv * FAR for Z in self.rows.Z_bases]
            other = self._searched(what, value, near._replace(factors=tuple(far), v=None))
            better = other.criterion < found.criterion or not found.converged
            return other if other.converged and better else found

    def _searched(self, what: Parameter, value: float, near: ConditionalFit) -> ConditionalFit:
        for _ in range(TIMES):
            near, goes_on = self._search(what, value, near)
            if not goes_on:
                break
        return near

    def _search(self, what: Parameter, value: float, near: ConditionalFit) -> tuple[ConditionalFit, bool]:
        """Where a search ends; whether it is to go on from there."""
        rows, p = self.rows, self.rows.p
        model, beta, psi = self._model, near.beta, near.psi
        back = np.eye(p)
        if what.kind == "fixed":
            back, to_basis, model = self._column_out(what.i)
            held = _placed(model, rows.Q @ rows.X_basis.R[:, what.i] * value)
            offset = held if model.data.offset is None else model.data.offset + held
            model = replace(model, data=model.data._replace(offset=offset))
            delta = to_basis @ np.delete(beta, what.i)
        else:
            delta = rows.X_basis.R @ beta
        psi_back: Callable[[np.ndarray], np.ndarray] = rows.psi_of_bases
        if what.kind == "psi" and rows.psi_columns:
            model, psi, psi_back = self._coefficient_out(model, what.i, value, psi)
        elif what.kind == "psi":
            psi = np.delete(psi, what.i)
            model = replace(model, family=HeldFamily(rows.family.link, rows.family, what.i, value))
        else:
            psi = rows.fixed_in_bases(beta, psi)[p:]
        found = [self._chart(t, what, value, near.factors[t]) for t in range(len(near.factors))]
        charts = [own for own in found if own is not None]
        if len(charts) < len(found):  # the structure has no such covariance
            return near._replace(criterion=np.inf, converged=False), False
        structures = tuple(own.structure for own in charts)
        places = zip(rows.layout.terms, structures, strict=True)
        layout = replace(rows.layout, terms=tuple(place._replace(structure=own) for place, own in places))
        model = replace(model, effects=replace(model.effects, layout=layout))  # type: ignore[type-var]
        numbers = psi if rows.psi_columns else np.clip(psi, -MOST_PSI, MOST_PSI)
        fixed = np.concatenate([delta, numbers])[:, None]
        is_bent = any(isinstance(own, sections.Section) and own.is_bent for own in structures)
        end = _least(model, fixed, near.v, charts, sections.ON_ONE if is_bent else MOST_ITERATIONS)
        at = end.fixed[:, 0]
        if what.kind == "fixed":
            beta = np.insert(back @ at[: p - 1], what.i, value)
            psi = psi_back(at[p - 1 :])
        else:
            beta = rows.X_basis.R_inv @ at[:p]
            held_number = what.kind == "psi" and not rows.psi_columns
            psi = np.insert(at[p:], what.i, value) if held_number else psi_back(at[p:])
        factors = [Z.R_inv @ own for Z, own in zip(rows.Z_bases, end.factors, strict=True)]
        goes_on = is_bent and not end.converged and bool(np.isfinite(end.value))
        return ConditionalFit(end.value, end.converged, beta, psi, tuple(factors), end.v), goes_on

    def _column_out(self, j: int) -> tuple[np.ndarray, np.ndarray, Model]:
        """The model without a column of X: from its basis to the other fixed effects, the way back, and the model."""
        if j not in self._without:
            rows = self.rows
            U, T = np.linalg.qr(np.delete(rows.X_basis.R, j, 1))
            model = model_of(replace(rows, Q=rows.Q @ U), self._curvature)
            self._without[j] = np.linalg.inv(T), T, model
        return self._without[j]

    def _coefficient_out(
        self, model: Model, i: int, value: float, psi: np.ndarray
    ) -> tuple[Model, np.ndarray, Callable[[np.ndarray], np.ndarray]]:
        """The model with coefficient i of the family's parameters held: its part is known, and its column leaves the
        others. With the coefficients ``(s - 1,)`` in the bases, and the way back from these to all of the user's."""
        rows = self.rows
        places = places_of(rows.psi_widths)
        (j,) = [j for j, place in enumerate(places) if place.start <= i < place.stop]
        own, own_columns, start = rows.psi_columns[j], list(model.data.psi), places[j].start
        keep = np.delete(np.arange(places[j].stop - start), i - start)
        if own is None:
            U, T, offset = np.zeros((rows.n, 0)), np.zeros((0, 0)), np.full(rows.n, value)
        else:
            R = np.asarray(rows.psi_bases[j].R)  # type: ignore[union-attr]
            V, T = np.linalg.qr(R[:, keep])
            U, offset = own @ V, own @ R[:, i - start] * value
        shape = _placed(model, offset).shape
        own_columns[j] = np.stack([_placed(model, column) for column in U.T]) if len(keep) else np.zeros((0, *shape))
        known: list[Any] = [None] * len(own_columns)
        known[j] = _placed(model, offset)
        data = model.data._replace(psi=tuple(own_columns), psi_offset=tuple(known))
        others = rows.fixed_in_bases(np.zeros(rows.p), psi)[rows.p :]
        free = np.concatenate([others[:start], T @ psi[start + keep], others[places[j].stop :]])

        def back(at: np.ndarray) -> np.ndarray:
            inside = slice(start, start + len(keep))
            whole = np.concatenate([at[:start], np.zeros(len(keep) + 1), at[inside.stop :]])
            found: np.ndarray = np.array(rows.psi_of_bases(whole))
            found[start + keep] = np.linalg.solve(T, at[inside])
            found[i] = value
            return found

        return replace(model, data=data), free, back

    def _chart(self, t: int, what: Parameter, value: float, factor: np.ndarray) -> Held | None:
        """A term's covariance for a search from a factor of it; of other terms than the one with the parameter all
        coordinates are free."""
        structure, basis = self.rows.layout.terms[t].structure, self.rows.Z_bases[t]
        R, R_inv, start = np.asarray(basis.R), np.asarray(basis.R_inv), factor[None]
        if what.term != t:
            return sections.free(structure, R, factor)
        if not structure.has_charts:
            parameter = structure.parameter(what.kind, what.i, what.j)
            if what.kind == "sd" and value == 0:
                return sections.without(structure, parameter, R, factor)
            return sections.at_value(structure, parameter, value, R, factor)
        if what.kind == "sd":
            return with_deviation(structure.chart(R, start, [what.i]), R_inv, what.i, value)
        chart = structure.chart(R, start, [what.j, what.i], np.array([value]))
        first, second = diagonal_positions(structure.q)[:2]
        return with_correlation(chart, (int(first), int(second)))


def _placed(model: Model, values: np.ndarray) -> np.ndarray:
    """Values ``(n,)`` of the rows where the model has them: ``(*rows, 1)``."""
    index = filled(np.asarray(model.effects.index)) if isinstance(model.effects, OneFactor) else np.arange(len(values))
    return np.asarray(values[index][..., None])


class _End(NamedTuple):
    value: float
    converged: bool
    fixed: np.ndarray
    factors: list[np.ndarray]
    v: np.ndarray


def _least(model: Model, fixed: np.ndarray, v: np.ndarray | None, charts: list[Held], most: int) -> _End:
    """The minimum of a model's criterion over its coordinates, by the trust region."""
    structures, memory = model.layout.structures, nothing_known(model, fixed)
    if v is not None:
        memory = memory._replace(v=v)
    start = np.concatenate([own.start for own in charts])[:, None]
    positive = np.concatenate([own.positive for own in charts])

    def by_x(x: Array) -> tuple[Array, Array, Array]:
        nonlocal memory
        if (x[positive] <= 0).any():
            return np.full(1, np.inf), np.zeros_like(x), np.eye(len(x))[..., None]
        found = evaluate(model, x, memory)
        if all(np.isfinite(part).all() for part in found.memory):
            memory = found.memory
        return found.value, found.gradient, found.Hessian

    x, converged = start, True
    if len(start):
        radius = search.REGION * max(float(np.sqrt((start**2).sum())), 0.2)
        solution = newton.minimise(by_x, start, None, most, radius)
        x, converged = solution.x, int(solution.result[0]) == Result.CONVERGED
    last = evaluate(model, x, memory, INNER_LAST, MIDDLE_LAST)
    value: Any = last.value[0]
    # Where modes run away, what stands for a value is none.
    found = max(float(last.modes.decrement[0]), float(last.decrement[0])) <= SURE
    factors = [F[..., 0] for F in cov.factors_of(x, structures)]
    return _End(float(value), converged and found and bool(np.isfinite(value)), last.fixed, factors, last.modes.v)
