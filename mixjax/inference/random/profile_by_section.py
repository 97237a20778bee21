"""The ML deviance minimised with one parameter held, of models with covariance structures that have no charts.

One problem after the other, by NumPy: a standard deviation is held through sigma, as in
:mod:`mixjax.inference.random.held_parameter`; other parameters of such a structure make it a section of itself
(:mod:`mixjax.covariance.sections`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import jax
import numpy as np

from mixjax import covariance as cov
from mixjax.covariance import Unstructured, diagonal_positions, sections
from mixjax.covariance.held import Held as HeldTerm
from mixjax.covariance.held import with_correlation, with_deviation
from mixjax.covariance.sections import ON_ONE, TIMES, Section
from mixjax.estimation.batch import one_lane
from mixjax.estimation.search import NEAR_ZERO
from mixjax.inference.random.held_parameter import Chart, Held, Start, taken_out
from mixjax.inference.random.profile_search import (
    LONG,
    Conditional,
    at_entries,
    by_coordinates,
    conditional_of,
    estimates_start,
    far_start,
    found_of,
    region_of,
)
from mixjax.machine import Array, silently
from mixjax.optimise import newton
from mixjax.optimise.results import Result
from mixjax.products.sums import CrossProducts


class OneByOne:
    """Least deviances of one data set: searched from the nearest that is known; from far away too where that fails, or
    ends near a boundary."""

    def __init__(self, stats: CrossProducts, theta: np.ndarray, sigma: np.ndarray):
        """Args: theta ``(k,)``, sigma ``()``, the ML estimates."""
        self.stats, self._structures = stats, stats.layout.structures
        # The likelihood asks for the factors of covariances only, however they came to be.
        places = tuple(place._replace(structure=Unstructured(place.q)) for place in stats.layout.terms)
        self._lanes = one_lane(replace(stats, layout=replace(stats.layout, terms=places)), False)
        sigma = np.asarray(sigma, np.float64)[None]
        self._estimates = estimates_start(np.asarray(theta)[None], sigma, stats.layout.qs)
        self._far = far_start(stats, sigma)
        self._known: dict[Held, list[tuple[float, Start]]] = {}

    def minimise(self, problems: Sequence[tuple[Held, float]]) -> Conditional:
        """The better of the searches for every parameter and value."""
        with silently():
            found = [self._least(held, value) for held, value in problems]
        joined: Conditional = jax.tree.map(lambda *leaves: np.concatenate(leaves), *found)
        return joined

    def _least(self, held: Held, value: float) -> Conditional:
        known = self._known.setdefault(held, [])
        near = min(known, key=lambda pair: abs(pair[0] - value), default=(0.0, self._estimates))[1]
        best = self._searched(held, value, near)
        if not best.converged[0] or self._is_near_zero(best):
            best = min(
                best, self._searched(held, value, self._far), key=lambda one: (not one.converged[0], one.deviance[0])
            )
        if best.converged[0]:
            known.append((value, best.start()))
        return best

    def _is_near_zero(self, found: Conditional) -> bool:
        """There may be another minimum away from the boundary."""
        inside = [basis.R @ own[0] for basis, own in zip(self.stats.Z_bases, found.factors, strict=True)]
        return bool(min(np.linalg.svd(own, compute_uv=False).min() for own in inside) < NEAR_ZERO)

    def _searched(self, held: Held, value: float, start: Start) -> Conditional:
        for _ in range(TIMES):
            found, is_bent = self._search(held, value, start)
            if not is_bent or found.converged[0] or not np.isfinite(found.deviance[0]):
                break
            start = found.start()
        return found

    def _search(self, held: Held, value: float, start: Start) -> tuple[Conditional, bool]:
        """Where a search from a start ends, and whether it was on a bent section."""
        terms = [self._term(t, held, value, start) for t in range(len(self._structures))]
        known = [term for term in terms if term is not None]
        if len(known) < len(terms):
            return _nothing(start, len(self.stats.beta0)), False
        log_variance = np.full(1, np.nan)
        if held.kind == "sigma" or (held.kind == "sd" and value > 0):
            log_variance = np.full(1, 2 * np.log(value))
        rows = [np.zeros((basis.R_inv.shape[-1], 1)) for basis in self.stats.Z_bases]
        if held.kind == "sd" and value > 0:
            rows[held.term][:, 0] = self.stats.Z_bases[held.term].R_inv[held.i]
        v, s = taken_out(self.stats, held, np.full(1, value))
        x0 = np.concatenate([term.start for term in known])[:, None]
        positive = np.concatenate([term.positive for term in known])[:, None]
        chart = Chart((), np.ones(x0.shape, bool), positive, x0, tuple(rows), log_variance, v.T, s)
        lanes, structures = self._lanes.turned(chart.v, chart.s), tuple(term.structure for term in known)

        def evaluate(x: Array) -> tuple[Array, Array, Array]:
            at = at_entries(cov.factors_of(x, structures), lanes, chart)
            k = len(x)
            jacobian, curvature = np.zeros((len(at.gradient), k, 1)), np.zeros((k, k, 1))
            entry, column = 0, 0
            for structure, part in zip(structures, cov.cut(x, structures), strict=True):
                own = slice(entry, entry + structure.q * (structure.q + 1) // 2)
                here = slice(column, column + structure.k)
                jacobian[own, here] = structure.jacobian(part)
                curvature[here, here] = structure.curvature(part, at.gradient[own])
                entry, column = own.stop, here.stop
            outside = (positive & (x <= 0)).any(0)
            return np.where(outside, np.inf, at.value), *by_coordinates(at, jacobian, curvature)

        is_bent = any(isinstance(own, Section) and own.is_bent for own in structures)
        if len(x0):
            solution = newton.minimise(evaluate, x0, None, ON_ONE if is_bent else LONG, region_of(chart))
        else:
            at = at_entries(cov.factors_of(x0, structures), lanes, chart)
            zero = np.zeros(1)
            solution = newton.Solution(x0, at.value, x0 > 0, zero > 0, zero, zero, np.full(1, int(Result.CONVERGED)))
        factors = cov.factors_of(solution.x, structures)
        return conditional_of(self.stats, chart, found_of(solution, factors, lanes, chart)), is_bent

    def _term(self, t: int, held: Held, value: float, start: Start) -> HeldTerm | None:
        """A term's covariance for a search from where another ended."""
        structure, basis = self._structures[t], self.stats.Z_bases[t]
        R, R_inv, factor = np.asarray(basis.R), np.asarray(basis.R_inv), np.array(start.factors[t][0])
        if held.term != t:
            return sections.free(structure, R, factor)
        parameter = structure.parameter(held.kind, held.i, held.j)
        if held.kind == "sd" and value > 0:
            moved = slice(None) if parameter.shared else slice(held.i, held.i + 1)
            length = np.sqrt((factor[held.i] ** 2).sum())
            factor[moved] *= value / start.sigma[0] / length if length > 0 else 1.0
            return sections.free(structure, R, factor)
        if structure.has_charts and held.kind == "sd":
            return with_deviation(structure.chart(R, factor[None], [held.i]), R_inv, held.i, 0.0)
        if structure.has_charts:
            chart = structure.chart(R, factor[None], [held.j, held.i], np.array([value]))
            first, second = diagonal_positions(structure.q)[:2]
            return with_correlation(chart, (int(first), int(second)))
        if held.kind == "sd":
            return sections.without(structure, parameter, R, factor)
        return sections.at_value(structure, parameter, value, R, factor)


def _nothing(start: Start, p: int) -> Conditional:
    """Where no covariance of the structure has the value."""
    nan = np.full(1, np.nan)
    return Conditional(np.full(1, np.inf), np.zeros(1, bool), start.factors, nan, np.full((1, p), np.nan))
