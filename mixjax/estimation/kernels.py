"""Estimates of a linear mixed model with random effects that are correlated by distance."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from mixjax.covariance import Structure
from mixjax.design import Design
from mixjax.engine.components import places_of
from mixjax.engine.coordinates import coordinates_in
from mixjax.engine.engine import engine_of
from mixjax.engine.kernels import KernelEngine
from mixjax.estimation import search
from mixjax.estimation.estimate import Estimates, assemble
from mixjax.estimation.search import own_factors, result_code
from mixjax.kernels import Places, factor_of
from mixjax.machine import silently
from mixjax.optimise.newton import Solution
from mixjax.optimise.results import Result
from mixjax.products.rows import Rows, rows_of

# Where searches may begin: ranges, between the least and the largest distance on the scale of logarithms; standard
# deviations over that of the residuals; smoothness.
DEVIATIONS, SMOOTHNESSES = (0.5, 2.0, 8.0, 50.0), (0.5, 1.5)
# Numbers of places up to which so many ranges are tried for the start; with more, and of several kernels, the last,
# because an evaluation takes the cube of the places.
RANGES = ((300, 9), (1000, 5))
FEW = 2
# What no criterion tells apart.
TOLD = 1e-6
# A cosine of an angle below this is at the bound.
AT_BOUND = 1e-4


class KernelFit(NamedTuple):
    """Attributes:
    estimates: of the model whose levels have the covariances that the kernels give at their parameters; ``kernels``
    are these. x: ``(k,)`` the optimiser's coordinates, the kernels' last. free: ``(k,)``. rows: of that model.
    """

    estimates: Estimates
    x: np.ndarray
    free: np.ndarray
    rows: Rows


@dataclass(frozen=True)
class _Angles(Structure):
    """Coordinates that belong to no effect, so q is 0."""

    start: tuple[float, ...] = field(default=())

    @property
    def k(self) -> int:
        return len(self.start)

    @property
    def deviations(self) -> tuple[int, ...]:
        return ()

    @property
    def n_reductions(self) -> int:
        return 0

    def entries(self, x: Any) -> list[list[Any]]:
        return []

    def near(self, F: Any) -> Any:
        return np.array(self.start)

    def sizes(self, x: Any) -> Any:
        return np.zeros((0, x.shape[1]))

    def reduced(self, x: Any, c: Any) -> tuple[Any, Any]:
        return x, np.ones(x.shape, bool)

    def moving(self, x: Any) -> Any:
        return np.ones(np.shape(x), bool)


def kernel_engine(rows: Rows, reml: bool, places: dict[int, Places] | None = None) -> KernelEngine:
    """The engine of rows in their bases, whose design has kernels."""
    return KernelEngine(rows, places_of(rows.design) if places is None else places, reml)


def fit_kernels(engine: KernelEngine, x0: np.ndarray | None = None) -> KernelFit:
    """Fit by trust-region Newton on exact derivatives, over covariances and kernels' parameters together.

    Args:
        x0: ``(k,)`` coordinates to start from, or None for what :func:`_starts` finds.
    """
    with silently():
        starts = _starts(engine) if x0 is None else [_off_bounds(engine, x0)]
        found = []
        for start in starts:
            angles = _Angles(0, tuple(float(a) for a in start[engine.k :]))
            found.append(search.run(engine.evaluate, start[:, None], (*engine.layout.structures, angles)))
        best = search.best_of(found)
        return _assembled(engine, _at_bounds(engine, Solution(*(a[..., 0] for a in best))))


def _off_bounds(engine: KernelEngine, x: np.ndarray) -> np.ndarray:
    """A zero, and an angle at its bound, are stationary points, which no search leaves."""
    moved = np.where(x == 0, 1e-2, x)
    angles = moved[engine.k :]
    moved[engine.k :] = np.where(np.abs(np.cos(angles)) > AT_BOUND, angles, 0.8 * angles)
    return moved


def start_at(engine: KernelEngine, theta: np.ndarray) -> np.ndarray:
    """Coordinates where random effects have ``theta (k,)``, at the best of a few ranges."""
    x, _ = coordinates_in(np.asarray(theta, np.float64), engine.layout, [basis.R for basis in engine.rows.Z_bases])
    with silently():
        angles = [np.concatenate(own) for own in product(*(_angles(p, RANGES[1][1]) for p in engine.places.values()))]
        return min((np.concatenate([x, own]) for own in angles), key=engine.value)


def _starts(engine: KernelEngine) -> list[np.ndarray]:
    """Points where searches begin: by the range the criterion often has two minima, a short and a long one, so all that
    are minima among those tried."""
    largest = max(len(own.within) for own in engine.places.values())
    count = next((n for most, n in RANGES if largest <= most and len(engine.places) == 1), FEW)
    deviations = DEVIATIONS if count > FEW else DEVIATIONS[:2]
    best = []
    for angles in product(*(_angles(places, count) for places in engine.places.values())):
        points = [
            np.concatenate([*(s.near(sd * np.eye(s.q)) for s in engine.layout.structures), *angles])
            for sd in deviations
        ]
        values = [engine.value(x) for x in points]
        best.append((min(values), points[int(np.argmin(values))]))
    if count == FEW:
        return [min(best, key=lambda pair: pair[0])[1]]
    step = len(best) // count  # of every range the smoothnesses side by side
    tried = [min(best[i : i + step], key=lambda pair: pair[0]) for i in range(0, len(best), step)]
    values = [np.inf, *(value for value, _ in tried), np.inf]
    return [x for i, (value, x) in enumerate(tried) if value <= min(values[i], values[i + 2])]


def _angles(places: Places, count: int) -> list[np.ndarray]:
    """Angles of some ranges, of each with some smoothnesses."""
    kernel, bounds = places.kernel, places.bounds
    log_least, log_largest = places.extremes
    found = []
    for part in (np.arange(count) + 0.5) / count:
        at = np.exp(log_least + part * (log_largest - log_least))
        for nu in SMOOTHNESSES if kernel.k == 2 else (1.0,):
            found.append(bounds.angles(np.array([at, nu])[: kernel.k]))
    return found


def _at_bounds(engine: KernelEngine, solution: Solution) -> Solution:
    """Parameters of kernels at a bound, where the criterion does not tell them from it."""
    x, value = np.array(solution.x), float(solution.value)
    for i in range(engine.k, len(x)):
        for angle in (-np.pi / 2, np.pi / 2):
            other = x.copy()
            other[i] = angle
            if engine.value(other) <= value + TOLD:
                x = other
                break
    return solution._replace(x=x)


def design_at(design: Design, places: dict[int, Places], angles: dict[int, np.ndarray]) -> Design:
    """The design whose levels have the covariances that the kernels give."""
    terms = list(design.terms)
    for t, own in places.items():
        L = factor_of(own.correlation(angles[t]))
        terms[t] = replace(terms[t], levels=L, kernel=None, coordinates=None, within=None)
    return replace(design, terms=tuple(terms))


def parameters_at(engine: KernelEngine, x: np.ndarray) -> np.ndarray:
    """The kernels' parameters ``(r,)``, as they are reported, at coordinates ``(k,)``."""
    own = [engine.places[t].bounds.at(angles)[0] for t, angles in engine.angles(x).items()]
    return np.concatenate(own)


def fit_at(engine: KernelEngine, x: np.ndarray, free: np.ndarray) -> KernelFit:
    """What follows from coordinates ``x (k,)`` that are estimates already."""
    none = np.zeros(())
    code = np.asarray(int(Result.CONVERGED))
    return _assembled(engine, Solution(x, none, free, none > 0, none, np.zeros((), int), code))._replace(free=free)


def _assembled(engine: KernelEngine, solution: Solution) -> KernelFit:
    x, k = solution.x, engine.k
    free = _free(engine, solution)
    rows = rows_of(design_at(engine.rows.design, engine.places, engine.angles(x)))
    plain = solution._replace(x=x[:k], free=solution.free[:k])
    own = own_factors(plain.x, rows.Z_bases, rows.layout)
    plain = plain._replace(result=result_code(plain, own))
    est = engine_of(rows.stats, engine.reml).run(assemble, plain, own)
    est = est._replace(
        kernels=parameters_at(engine, x), result=np.asarray(plain.result), iterations=solution.iterations
    )
    return KernelFit(est, x, free, rows)


def _free(engine: KernelEngine, solution: Solution) -> np.ndarray:
    """Coordinates that are not at a bound; a kernel's are none beside a variance of zero."""
    free, start = np.array(solution.free), engine.k
    positions = np.cumsum([0, *(s.k for s in engine.layout.structures)])
    for t, places in engine.places.items():
        own = slice(start, start + places.kernel.k)
        free[own] &= (solution.x[positions[t]] != 0) & (np.abs(np.cos(solution.x[own])) > AT_BOUND)
        start = own.stop
    return free
