"""The log posterior density with random effects, and fixed effects where that is exact, integrated out."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.design import Design, RepeatedDesign
from mixjax.engine.criterion import warn_of_float32
from mixjax.engine.family_draws import FamilyTarget, Place
from mixjax.engine.integrated import Integrated, integrate_fixed, integrated
from mixjax.engine.laplace import family_loglik
from mixjax.engine.residual_rows import ResidualRows
from mixjax.engine.visit_sums import VisitSums
from mixjax.estimation.residual import transform_of
from mixjax.forks import refuse_forked
from mixjax.machine import Array, is_concrete, jit
from mixjax.products.family_rows import FamilyRows
from mixjax.products.rows import rows_of
from mixjax.products.sums import CrossProducts, check_products
from mixjax.products.visits import visit_rows
from mixjax.sampling.charts import Chart
from mixjax.sampling.model_priors import ModelPriors, TermPriors
from mixjax.sampling.prior import LKJ, Normal, log_of_logistic
from mixjax.sampling.priors import Priors

# What the density may be of: cross-products; rows whose residuals have parameters; repeated measures; rows of a family.
Data = CrossProducts | ResidualRows | VisitSums | FamilyTarget


def log_posterior(z: Array, stats: Any, priors: ModelPriors) -> Array:
    """Log posterior density of the unconstrained parameters, up to a constant: the entry for samplers of any kind.

    A pure function: ``jit``, ``grad``, ``hessian`` and ``vmap`` work. Random effects are integrated out, and fixed
    effects with flat or normal priors too; the Jacobians of the coordinates are included. Of cross-products no row
    enters: what an evaluation costs depends on the numbers of levels and effects.

    Args:
        z: ``(priors.dim,)`` per random term the logarithms of its standard deviations, then its correlations without
            bounds (:mod:`mixjax.sampling.charts`); log sigma; parameters of the residuals or of the family
            (:mod:`mixjax.sampling.others`); the fixed effects that are not integrated out.
        stats: cross-products of the data; :func:`mixjax.rows` of a generalised linear mixed model, whose random effects
            are integrated out by Laplace's approximation; a design with a dispersion or a correlation of residuals; a
            :class:`mixjax.RepeatedDesign`.
        priors: of this model: ``mj.priors(...).resolve(design)``. The response may be another one, X and Z may not.

    Returns:
        scalar.

    Raises:
        TypeError: ``priors`` were not resolved for a model. ValueError: z has another length.

    Warns:
        UserWarning: it is computed in float32.

    Example:
        >>> import jax, mixjax as mj, numpy as np
        >>> design, labels = mj.build_design("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> stats, priors = mj.cross_products(design), mj.priors(intercept=mj.prior.flat()).resolve(design, labels)
        >>> with jax.enable_x64():
        ...     z = np.log([25.0, 6.0, np.exp(0.1), 26.0])  # two sds, Fisher's z of the correlation, sigma
        ...     print(mj.log_posterior(z, stats, priors).round(3), jax.grad(mj.log_posterior)(z, stats, priors).shape)
        -877.714 (4,)
    """
    refuse_forked()
    data = _data_of(stats)
    if not isinstance(priors, ModelPriors):
        own = ".resolve(design, labels)" if isinstance(priors, Priors) else ""
        raise TypeError(f"the priors of a model are needed: mixjax.priors(...){own or '.resolve(design)'}")
    if np.shape(z) != (priors.dim,):
        raise ValueError(f"z has shape {np.shape(z)}; this model has {priors.dim} coordinates: ({priors.dim},)")
    _check_fits(data, priors)
    warn_of_float32(data.rows.Q if isinstance(data, FamilyTarget) else data.beta0)
    return _log_posterior(z, data, priors)


def _data_of(stats: Any) -> Data:
    if isinstance(stats, RepeatedDesign) or (isinstance(stats, Design) and stats.has_residual_side):
        if not all(map(is_concrete, jax.tree.leaves(stats))):
            raise TypeError("a design that is traced has no log posterior: pass its cross-products, or keep it outside")
        if isinstance(stats, RepeatedDesign):
            return VisitSums.of(visit_rows(stats))
        return ResidualRows.of(rows_of(stats), transform_of(stats))
    if isinstance(stats, FamilyRows):
        return FamilyTarget(stats)
    if isinstance(stats, ResidualRows | VisitSums | FamilyTarget):
        return stats
    check_products(stats)
    found: CrossProducts = stats
    return found


def _check_fits(data: Data, priors: ModelPriors) -> None:
    """Raise ValueError where priors are those of a model of another kind, of which parameters would be left aside."""
    others = len(priors.others)
    if isinstance(data, FamilyTarget):
        fits = priors.sigma is None and others == data.rows.n_psi and not priors.parts.Q.shape[1]
    elif isinstance(data, VisitSums):
        fits = priors.sigma is None and not others
    elif isinstance(data, ResidualRows):
        fits = len(priors.means) == data.W.shape[1] and others == data.W.shape[1] + bool(data.kind)
    else:
        fits = not others
    if not fits:
        raise ValueError(
            "the priors are of another model than the data: pass what priors.resolve() was given, with its dispersion, "
            "its correlation of residuals or its family"
        )


@jit
def _log_posterior(z: Array, stats: Data, priors: ModelPriors) -> Array:
    return density(jnp.asarray(z), stats, priors)


class Parts(NamedTuple):
    """Of the log posterior: its likelihood with what is integrated, and the priors with their Jacobians."""

    likelihood: Integrated
    log_prior: Array


def density(z: Array, stats: Data, priors: ModelPriors) -> Array:
    """As :func:`log_posterior`, inside programs."""
    parts = parts_of(z, stats, priors)
    total: Array = parts.likelihood.loglik + parts.log_prior
    return total


def parts_of(z: Array, stats: Data, priors: ModelPriors) -> Parts:
    """The log posterior with what it is made of."""
    return Parts(likelihood_of(z, stats, priors), log_prior(z, priors))


def likelihood_of(z: Array, stats: Data, priors: ModelPriors) -> Integrated:
    """The likelihood, with what is integrated out."""
    terms, log_sigma, given = priors.cut(z)
    if isinstance(stats, FamilyTarget):
        at = place_of(z, priors)
        loglik = family_loglik(at.factors, at.beta, at.psi, stats.rows, stats.nagq)
        return Integrated(loglik, jnp.zeros(0), jnp.zeros((0, 0)), jnp.zeros((0, 0)))
    factors = [chart.factor(part) for chart, part in zip(priors.charts, terms, strict=True)]
    if isinstance(stats, VisitSums):
        reduced = stats.reduced(factors)
        return integrate_fixed(reduced, log_sigma, given, stats.beta0, stats.n, stats.sum_log_weights, priors.parts)
    if isinstance(stats, ResidualRows):
        stats = stats.products(stats.whitener(*residual_parameters(z, priors)))
    return integrated(factors, log_sigma, given, stats, priors.parts)


def residual_parameters(z: Array, priors: ModelPriors) -> tuple[Array, Array | None]:
    """Coefficients of the dispersion ``(d,)``, and the correlation of residuals at the shortest distance."""
    gamma, c = priors.residual_of(z)
    return jnp.stack(gamma) if gamma else jnp.zeros(0), c


def place_of(z: Array, priors: ModelPriors) -> Place:
    """Of a generalised model: factors of covariances, fixed effects, coefficients of the family's parameters."""
    terms, _, given = priors.cut(z)
    factors = [chart.factor(part) for chart, part in zip(priors.charts, terms, strict=True)]
    beta: Array = jnp.asarray(priors.to_beta) @ given
    psi = [
        own if one.kind == "positive" else one.value(own)
        for one, own in zip(priors.others, priors.others_of(z), strict=True)
    ]
    return Place(factors, beta, jnp.stack(psi) if psi else jnp.zeros(0))


def log_prior(z: Array, priors: ModelPriors) -> Array:
    """Log density of the coordinates under the priors; of fixed effects only those that are sampled."""
    terms, log_sigma, given = priors.cut(z)
    total = jnp.zeros(())
    if priors.sigma is not None:
        shift: Array = 0.0
        if len(priors.means):
            shift = (jnp.asarray(priors.prior_at) - priors.means) @ residual_parameters(z, priors)[0]
        total = priors.sigma.log_prob(jnp.exp(log_sigma + shift)) + log_sigma + shift
    for chart, own, part in zip(priors.charts, priors.terms, terms, strict=True):
        total = total + _of_term(part, chart, own)
    for other, part in zip(priors.others, priors.others_of(z), strict=True):
        total = total + other.log_density(part)
    for i, one in enumerate(priors.fixed):
        total = total + one.log_prob(given[i])
    return total


def _of_term(z: Array, chart: Chart, own: TermPriors) -> Array:
    total = jnp.zeros(())
    for i, one in enumerate(own.scales):
        total = total + one.log_prob(jnp.exp(z[i])) + z[i]
    if not chart.n_shapes:
        return total
    shapes = z[chart.n_scales :]
    if chart.is_written:
        assert isinstance(own.shapes, tuple)
        return total + sum(one.log_prob(shapes[i]) for i, one in enumerate(own.shapes))
    if isinstance(own.shapes, LKJ):
        a, b = chart.beta_of(own.shapes.eta)
        return total + (log_of_logistic(chart.slope * shapes, a, b) + np.log(chart.slope)).sum()
    assert isinstance(own.shapes, tuple)
    rho, log_slope = chart.correlations(z), chart.log_slope(z)
    for i, one in enumerate(own.shapes):
        if isinstance(one, Normal):
            total = total + one.log_prob(rho[i]) - one.log_between(chart.low, 1.0) + log_slope[i]
        else:
            assert isinstance(one, LKJ)
            a, b = chart.beta_of(one.eta)
            total = total + log_of_logistic(chart.slope * shapes[i], a[i], b[i]) + np.log(chart.slope)
    return total


# --- programs -------------------------------------------------------------------------------------------------------


class Looked(NamedTuple):
    """At many points: the log posterior ``(N,)``, the integrated fixed effects' mean ``(N, r)`` and the root ``(N, r,
    r)`` of their covariance."""

    value: Array
    mean: Array
    root: Array


@jit
def look(z: Array, stats: Data, priors: ModelPriors) -> Looked:
    """At ``z (N, dim)``."""

    def one(z: Array) -> Looked:
        parts = parts_of(z, stats, priors)
        likelihood = parts.likelihood
        sigma = jnp.exp(priors.cut(z)[1])
        root = sigma * likelihood.turn @ _root(likelihood.inverse)
        return Looked(likelihood.loglik + parts.log_prior, likelihood.mean, root)

    return jax.vmap(one)(z)


def _root(M: Array) -> Array:
    """Cholesky factor, written out: small matrices, and no LAPACK inside ``vmap``."""
    n = M.shape[0]
    L = jnp.zeros_like(M)
    for j in range(n):
        column = M[:, j] - L @ L[j]
        L = L.at[:, j].set(jnp.where(jnp.arange(n) >= j, column / jnp.sqrt(column[j]), 0.0))
    return L


@jit
def value_gradient_hessian(z: Array, stats: Data, priors: ModelPriors) -> tuple[Array, Array, Array]:
    """Of the log posterior at ``z (dim,)``."""

    def with_gradient(z: Array) -> tuple[Array, tuple[Array, Array]]:
        value, gradient = jax.value_and_grad(density)(z, stats, priors)
        return gradient, (value, gradient)

    H, (value, gradient) = jax.jacfwd(with_gradient, has_aux=True)(z)
    return value, gradient, H
