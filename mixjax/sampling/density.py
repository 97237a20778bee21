"""The log posterior density with random effects, and fixed effects where that is exact, integrated out."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.engine.criterion import warn_of_float32
from mixjax.engine.integrated import Integrated, integrated
from mixjax.forks import refuse_forked
from mixjax.machine import Array, jit
from mixjax.products.sums import CrossProducts, check_products
from mixjax.sampling.charts import Chart
from mixjax.sampling.prior import LKJ, Normal, log_of_logistic
from mixjax.sampling.priors import ModelPriors, Priors, TermPriors


def log_posterior(z: Array, stats: CrossProducts, priors: ModelPriors) -> Array:
    """Log posterior density of the unconstrained parameters, up to a constant: the entry for samplers of any kind.

    A pure function: ``jit``, ``grad``, ``hessian`` and ``vmap`` work. Random effects are integrated out, and fixed
    effects with flat or normal priors too; the Jacobians of the coordinates are included. Rows do not enter: what an
    evaluation costs depends on the numbers of levels and effects.

    Args:
        z: ``(priors.dim,)`` per random term the logarithms of its standard deviations, then its correlations without
            bounds (:mod:`mixjax.sampling.charts`); log sigma; the fixed effects that are not integrated out.
        stats: cross-products of the data.
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
    check_products(stats)
    if not isinstance(priors, ModelPriors):
        own = ".resolve(design, labels)" if isinstance(priors, Priors) else ""
        raise TypeError(f"the priors of a model are needed: mixjax.priors(...){own or '.resolve(design)'}")
    if np.shape(z) != (priors.dim,):
        raise ValueError(f"z has shape {np.shape(z)}; this model has {priors.dim} coordinates: ({priors.dim},)")
    warn_of_float32(stats)
    return _log_posterior(z, stats, priors)


@jit
def _log_posterior(z: Array, stats: CrossProducts, priors: ModelPriors) -> Array:
    return density(jnp.asarray(z), stats, priors)


class Parts(NamedTuple):
    """Of the log posterior: its likelihood with what is integrated, and the priors with their Jacobians."""

    likelihood: Integrated
    log_prior: Array


def density(z: Array, stats: CrossProducts, priors: ModelPriors) -> Array:
    """As :func:`log_posterior`, inside programs."""
    parts = parts_of(z, stats, priors)
    total: Array = parts.likelihood.loglik + parts.log_prior
    return total


def parts_of(z: Array, stats: CrossProducts, priors: ModelPriors) -> Parts:
    """The log posterior with what it is made of."""
    terms, log_sigma, given = priors.cut(z)
    factors = [chart.factor(part) for chart, part in zip(priors.charts, terms, strict=True)]
    return Parts(integrated(factors, log_sigma, given, stats, priors.parts), log_prior(z, priors))


def log_prior(z: Array, priors: ModelPriors) -> Array:
    """Log density of the coordinates under the priors; of fixed effects only those that are sampled."""
    terms, log_sigma, given = priors.cut(z)
    total = priors.sigma.log_prob(jnp.exp(log_sigma)) + log_sigma
    for chart, own, part in zip(priors.charts, priors.terms, terms, strict=True):
        total = total + _of_term(part, chart, own)
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
def look(z: Array, stats: CrossProducts, priors: ModelPriors) -> Looked:
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
def value_gradient_hessian(z: Array, stats: CrossProducts, priors: ModelPriors) -> tuple[Array, Array, Array]:
    """Of the log posterior at ``z (dim,)``."""

    def with_gradient(z: Array) -> tuple[Array, tuple[Array, Array]]:
        value, gradient = jax.value_and_grad(density)(z, stats, priors)
        return gradient, (value, gradient)

    H, (value, gradient) = jax.jacfwd(with_gradient, has_aux=True)(z)
    return value, gradient, H
