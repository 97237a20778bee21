"""From cross-products to estimates of one fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixjax import covariance as cov
from mixjax.covariance import LOWEST
from mixjax.design import AnyArray
from mixjax.engine.criterion import in_bases, warn_of_float32
from mixjax.engine.engine import AtOnce, Engine
from mixjax.engine.incidence import incidence
from mixjax.estimation import search
from mixjax.estimation.implicit import as_minimum
from mixjax.estimation.search import OwnFactors, own_factors, result_code
from mixjax.estimation.start import start_of_products
from mixjax.machine import Array, compiled, namespace
from mixjax.optimise.newton import Solution, judge
from mixjax.optimise.results import Result
from mixjax.products.sums import CrossProducts, check_products


class Estimates(NamedTuple):
    """Estimates of one linear mixed model. A JAX pytree.

    Attributes:
        theta: ``(k,)`` relative Cholesky factors, lower triangle column by column, term by term, diagonal >= 0.
        beta: ``(p,)`` fixed effects.
        sigma: ``()`` residual standard deviation.
        Sigma: per term ``(q, q)``, absolute covariance of its random effects.
        vcov: ``(p, p)`` covariance of beta, theta taken as known.
        b: per term ``(n_groups, q)``, conditional modes (BLUPs).
        criterion: ``()`` ML deviance or REML criterion.
        converged: ``()`` bool. singular: ``()`` bool, some Sigma has less than full rank.
        iterations: ``()`` evaluations of criterion, gradient and Hessian.
        grad_norm: ``()`` scaled gradient ``sqrt(g' H^{-1} g)`` at the last evaluation, or at the end where the last
            steps foretell it.
        result: ``()`` code, see ``mixjax.Result``.
        residual: ``(r,)`` parameters of the residuals beside sigma, coefficients of a dispersion, then a correlation;
            None where there are none.
        kernels: ``(r,)`` parameters of correlations by distance, term by term: range, then smoothness where it is
            estimated; None where there are none.
    """

    theta: AnyArray
    beta: AnyArray
    sigma: AnyArray
    Sigma: tuple[AnyArray, ...]
    vcov: AnyArray
    b: tuple[AnyArray, ...]
    criterion: AnyArray
    converged: AnyArray
    singular: AnyArray
    iterations: AnyArray
    grad_norm: AnyArray
    result: AnyArray
    residual: AnyArray | None = None
    kernels: AnyArray | None = None


def estimate(stats: CrossProducts, reml: bool = True, start: Array | None = None) -> Estimates:
    """Fit one model by maximum likelihood or restricted maximum likelihood.

    Trust-region Newton on exact derivatives, over standard deviations with free signs (of an unstructured covariance:
    over its signed Cholesky factor in the basis of Z), where a zero variance is an ordinary stationary point. A
    covariance that is singular at the optimum is returned as exactly singular, with zero columns in its Cholesky
    factor; because a search can fall into such a corner on its way, a second one then comes down from larger variances,
    and the better end is taken.

    Args:
        stats: cross-products of the data. float64 is needed for REML differences and Hessians; with float32 arrays
            the criterion is good to about six digits.
        reml: restricted maximum likelihood if true. Both criteria share one compiled program.
        start: ``(k,)`` theta to start from, or None for moment estimates.

    Returns:
        :class:`Estimates`. Look at ``converged`` or ``result``: nothing is raised for a fit that fails.

    Derivatives of any order with respect to the products, and so to y, X, Z, weights and offset, in forward and
    reverse mode, follow from the implicit function theorem (:mod:`mixjax.estimation.implicit`). At a singular fit the
    entries of theta that are zero have derivative zero and everything else moves. On the very edge between a singular
    and a regular fit, and where a zero column of Lambda stands in front of one that is not zero, there are no
    derivatives: ``result`` is ``NONDIFFERENTIABLE`` and they are NaN.

    Example:
        >>> import jax, mixjax as mj, numpy as np
        >>> term = mj.RandomTerm(Z=np.ones((12, 1)), group=np.repeat(np.arange(4), 3), n_groups=4)
        >>> design = mj.Design(y=np.arange(12.0), X=np.ones((12, 1)), terms=(term,))
        >>> with jax.enable_x64():
        ...     est = mj.estimate(mj.cross_products(design))
        >>> bool(est.converged), round(float(est.beta[0]), 6)
        (True, 5.5)
    """
    check_products(stats)
    warn_of_float32(stats.XX)
    estimates: Estimates = compiled(fit)(Engine(stats, reml, incidence(stats)), start)
    return estimates


def fit(engine: Engine, start: Array | None = None) -> Estimates:
    """:func:`estimate`, by whoever serves the model.

    Args:
        engine: of the data. start: ``(k,)`` theta, or None.
    """
    # The search itself is not differentiated: what its end depends on is known without it.
    at_once = isinstance(engine, AtOnce)
    data, start = (engine, start) if at_once else jax.lax.stop_gradient((engine, start))
    stats, structures = data.stats, data.stats.layout.structures
    x0 = start_of_products(stats, data.expected) if start is None else start_in_bases(stats, start)[:, None]
    solution = Solution(*(a[..., 0] for a in search.run(data.evaluate, x0, structures)))
    own = own_factors(solution.x, stats.Z_bases, stats.layout)
    solution = solution._replace(result=result_code(solution, own))
    if at_once:
        return assemble(engine, solution, own)
    exists = solution.result != int(Result.NONDIFFERENTIABLE)
    x = as_minimum(_criterion_of_x, jax.lax.stop_gradient(solution.x), solution.free, exists, engine)
    est = assemble(engine, solution._replace(x=x))
    # Where there are no derivatives, the zeros of theta, which are constants, have none either.
    return est._replace(theta=est.theta + 0.0 * x.sum())


def _criterion_of_x(x: Array, engine: Engine) -> Array:
    return engine.profiled(x).criterion


def estimate_with(optimizer: Any, stats: CrossProducts, reml: bool = True, start: Array | None = None) -> Estimates:
    """Fit with a first-order optimiser from optax over the log-Cholesky parameters of the relative covariances.

    Slower than :func:`estimate`, and a singular covariance lies at minus infinity in these parameters; it is set to
    exactly singular afterwards where that does not raise the criterion. Not for use inside ``jit``.

    Args:
        optimizer: optax GradientTransformation, for example ``optax.lbfgs()``.
        stats, reml, start: as in :func:`estimate`.

    Returns:
        :class:`Estimates`; ``iterations`` counts the optimiser's steps.
    """
    from mixjax.optimise.gradient import minimise_with  # optax is loaded only by those who ask for it

    structures = stats.layout.structures
    stats = jax.tree.map(jnp.asarray, stats)
    at = np.concatenate([np.isin(np.arange(s.k), s.deviations) for s in structures])
    x0 = start_in_bases(stats, start)
    lowest = jnp.where(at, jnp.maximum(x0, LOWEST), x0)
    x, steps = minimise_with(
        optimizer, _logarithmic_objective(structures), jnp.where(at, jnp.log(lowest), x0), (stats, jnp.asarray(reml))
    )
    x = jnp.where(at, jnp.exp(x), x)
    engine = Engine(stats, jnp.asarray(reml))
    solution = compiled(_settle)(engine, x)
    estimates: Estimates = compiled(assemble)(engine, solution._replace(iterations=steps))
    return estimates


@cache
def _logarithmic_objective(structures: tuple[cov.Structure, ...]) -> Callable[[Array, Any], Array]:
    """A function of its own for every structure, so that each has one program."""
    at = np.concatenate([np.isin(np.arange(s.k), s.deviations) for s in structures])

    def objective(x: Array, data: Any) -> Array:
        stats, reml = data
        x = jnp.where(at, jnp.exp(jnp.where(at, x, 0.0)), x)
        return Engine(stats, reml).profiled(x).criterion

    return objective


def _settle(engine: Engine, x: Array) -> Solution:
    """Judge a point found elsewhere: reductions of rank, then the one definition of convergence; no Newton steps."""
    solution = judge(engine.evaluate, x[:, None], search.rank_reductions(engine.stats.layout.structures))
    alone: Solution = jax.tree.map(lambda a: a[..., 0], solution)
    return alone


def start_in_bases(stats: CrossProducts, start: Array | None) -> Array:
    """The optimiser's coordinates of a start given as theta, or by MINQUE(0)."""
    layout = stats.layout
    if start is None:
        return start_of_products(stats)[:, 0]
    start = namespace(start, stats.XX).asarray(start, stats.XX.dtype)
    return cov.near(in_bases(cov.lambdas_of_theta(start, layout.qs), stats), layout.structures)


def assemble(engine: Engine, solution: Solution, own: OwnFactors | None = None) -> Estimates:
    """Everything that follows from the relative covariances, on the scale of the original columns.

    Args:
        own: the covariances' factors there, where they are known.
    """
    stats = engine.stats
    profiled, modes = engine.solution(solution.x)
    own = own or own_factors(solution.x, stats.Z_bases, stats.layout)
    R_inv = stats.X_basis.R_inv
    return Estimates(
        theta=cov.theta_of_lambdas(own.lambdas),
        beta=stats.beta0 + R_inv @ profiled.delta,
        sigma=profiled.sigma,
        Sigma=tuple(profiled.sigma**2 * (L @ L.T) for L in own.lambdas),
        vcov=profiled.sigma**2 * (R_inv @ profiled.XX_inverse @ R_inv.T),
        b=tuple(
            stats.at_levels(place.factor, basis.R_inv @ b).T
            for place, basis, b in zip(stats.layout.terms, stats.Z_bases, modes, strict=True)
        ),
        criterion=profiled.criterion,
        converged=(solution.result == int(Result.CONVERGED)) | (solution.result == int(Result.NONDIFFERENTIABLE)),
        singular=own.deficient,
        iterations=solution.iterations,
        grad_norm=solution.scaled_gradient,
        result=solution.result,
    )
