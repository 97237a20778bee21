"""Estimates of a linear mixed model whose residuals have parameters beside sigma."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mixjax import covariance as cov
from mixjax.design import Design
from mixjax.engine.coordinates import coordinates_in
from mixjax.engine.residual import ResidualEngine
from mixjax.estimation import search
from mixjax.estimation.estimate import Estimates
from mixjax.estimation.search import own_factors, result_code
from mixjax.estimation.start import minque_start
from mixjax.kernels import KERNELS, Kernel
from mixjax.machine import silently
from mixjax.optimise import newton
from mixjax.optimise.newton import Solution
from mixjax.optimise.results import Result
from mixjax.products.rows import Rows
from mixjax.residual.by_distance import ByDistance
from mixjax.residual.coordinates import Coordinates
from mixjax.residual.correlation import AR1, CAR1, CompoundSymmetry, Correlation
from mixjax.residual.transform import Transform


class ResidualFit(NamedTuple):
    """Attributes:
    estimates: relative to sigma, that of rows with ``W gamma = 0``; ``residual`` are the parameters.
    x: ``(k,)`` the optimiser's coordinates, those of the residuals last. free: ``(k,)``.
    """

    estimates: Estimates
    x: np.ndarray
    free: np.ndarray


def transform_of(design: Design) -> Transform:
    """The transform that a design's dispersion and residual term ask for."""
    n = np.shape(design.X)[0]
    W = np.zeros((n, 0)) if design.dispersion is None else np.asarray(design.dispersion, np.float64)
    return Transform(W, correlation_of(design))


def correlation_of(design: Design) -> Correlation | None:
    """The correlation of a design's residuals, or None."""
    term = design.residual
    if term is None:
        return None
    group = np.unique(np.asarray(term.group), return_inverse=True)[1].reshape(-1)
    if term.structure == "cs":
        return CompoundSymmetry.of(group)
    time = np.asarray(term.time, np.float64)
    if term.structure in KERNELS:
        return ByDistance(Kernel(term.structure, term.smoothness), group, time)
    return AR1.of(group, time) if term.structure == "ar1" else CAR1.of(group, time)


def residual_engine(rows: Rows, reml: bool) -> ResidualEngine:
    """The engine of rows in their bases, whose design has the residuals' columns."""
    return ResidualEngine(rows, transform_of(rows.design), reml)


def fit_residual(engine: ResidualEngine, x0: np.ndarray | None = None) -> ResidualFit:
    """Fit by trust-region Newton on exact derivatives, over the coordinates of random effects and residuals together.

    Args:
        x0: ``(k,)`` coordinates to start from, or None for moment estimates, and, where residuals are correlated, a
            second search from a large correlation, because random effects can stand for one.
    """
    with silently():
        structures = (*engine.layout.structures, Coordinates(0, engine.transform))
        # Without bounds there is nothing to simplify, and no second search comes down from larger variances.
        bounded = any(structure.n_reductions for structure in structures)
        starts = _starts(engine) if x0 is None else [_off_zero(engine, x0)]
        if not starts[0].size:  # ordinary regression
            return _assembled(engine, _nothing_to_search())
        found = [
            search.run(engine.evaluate, x[:, None], structures)
            if bounded
            else newton.minimise(engine.evaluate, x[:, None])
            for x in starts
        ]
        return _assembled(engine, Solution(*(a[..., 0] for a in search.best_of(found))))


def _nothing_to_search() -> Solution:
    none, zero = np.zeros(0), np.zeros(())
    return Solution(none, zero, none > 0, zero > 0, zero, np.zeros((), int), np.asarray(int(Result.CONVERGED)))


def start_at(engine: ResidualEngine, theta: np.ndarray) -> np.ndarray:
    """Coordinates where random effects have ``theta (k,)`` and residuals are alike."""
    bases = [basis.R for basis in engine.rows.Z_bases]
    x, _ = coordinates_in(np.asarray(theta, np.float64), engine.layout, bases)
    return np.concatenate([x, engine.transform.start()])


def _off_zero(engine: ResidualEngine, x: np.ndarray) -> np.ndarray:
    """A zero is a stationary point, which no search leaves."""
    at_bound = engine.transform.correlation is not None and x[-1] == 0
    moved = np.where(x == 0, 1e-2, x)
    moved[engine.k :] = x[engine.k :]
    if at_bound:
        moved[-1] = engine.transform.start()[-1]
    return moved


def _starts(engine: ResidualEngine) -> list[np.ndarray]:
    starts = [engine.transform.start()]
    correlation = engine.transform.correlation
    if correlation is not None:
        for angle in correlation.starts()[1:]:
            other = starts[0].copy()
            other[-1] = angle
            starts.append(other)
    if not engine.layout.chain:
        return starts
    return [np.concatenate([minque_start(engine.moments_at(own))[:, 0], own]) for own in starts]


# How near the bound of a correlation, in the square of a cosine, and how large a coefficient of a dispersion, in
# logarithms of standard deviations, a search that did not converge has run away.
NEAR, FAR = 1e-8, 10.0


def _runs_away(engine: ResidualEngine, phi: np.ndarray) -> bool:
    d = engine.transform.d
    at_bound = engine.transform.correlation is not None and np.cos(phi[-1]) ** 2 < NEAR
    return bool(at_bound or (np.abs(phi[:d]) > FAR).any())


def _assembled(engine: ResidualEngine, solution: Solution) -> ResidualFit:
    rows, layout, k = engine.rows, engine.layout, engine.k
    x, phi = solution.x[:k], solution.x[k:]
    natural = engine.transform.natural(phi)
    shift = np.exp(natural.log_sigma)
    profiled, modes = engine.solution(solution.x)
    result, singular, lambdas = solution.result, np.bool_(False), []
    if layout.terms:
        own = own_factors(x, rows.Z_bases, layout)
        result, singular, lambdas = result_code(solution, own), own.deficient, own.lambdas
    if not Result(int(result)).is_solution and _runs_away(engine, phi):
        result = np.asarray(int(Result.UNBOUNDED))
    R_inv = rows.X_basis.R_inv
    sigma = profiled.sigma
    est = Estimates(
        theta=cov.theta_of_lambdas(lambdas) / shift if lambdas else np.zeros(0),
        beta=rows.beta0 + R_inv @ profiled.delta,
        sigma=sigma * shift,
        Sigma=tuple(sigma**2 * (L @ L.T) for L in lambdas),
        vcov=sigma**2 * (R_inv @ profiled.XX_inverse @ R_inv.T),
        b=tuple((basis.R_inv @ b).T for basis, b in zip(rows.Z_bases, modes, strict=True)),
        criterion=profiled.criterion,
        converged=(result == int(Result.CONVERGED)) | (result == int(Result.NONDIFFERENTIABLE)),
        singular=singular,
        iterations=solution.iterations,
        grad_norm=solution.scaled_gradient,
        result=np.asarray(result),
        residual=natural.values,
    )
    return ResidualFit(est, solution.x, solution.free)


def transformed_rows(engine: ResidualEngine, phi: np.ndarray) -> Design:
    """The design of the transformed rows, of unit weight, on the scale of sigma of rows with ``W gamma = 0``; its y is
    what the least-squares fit of the rows as they are leaves."""
    design, T = engine.rows.design, engine.transform
    scale = np.exp(T.natural(phi).log_sigma)
    root = 1.0 if engine.rows.sqrt_w is None else engine.rows.sqrt_w[:, None]

    def moved(columns: np.ndarray) -> np.ndarray:
        own: np.ndarray = scale * T.rows(phi, root * np.asarray(columns, np.float64))
        return own

    y = scale * T.rows(phi, engine.rows.residual[:, None])[:, 0]
    terms = tuple(replace(term, Z=moved(term.Z)) for term in design.terms)
    return Design(y=y, X=moved(design.X), terms=terms)
