"""The marginal likelihood with every parameter free, over unconstrained parameters."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from mixjax.covariance import Structure
from mixjax.design import AnyArray, Design
from mixjax.engine.criterion import in_bases
from mixjax.engine.elimination import arrange, eliminate
from mixjax.forks import refuse_forked
from mixjax.machine import jit
from mixjax.products.cross_products import cross_products
from mixjax.products.sums import CrossProducts


class MarginalParams(NamedTuple):
    """Unconstrained parameters of ``N(X beta + offset, sigma^2 W^{-1} + Z Sigma Z')``.

    Attributes:
        beta: ``(p,)``.
        log_sigma: ``()`` log of the residual standard deviation.
        chol: per term ``(q (q + 1) / 2,)``: Cholesky factor of the absolute covariance Sigma, columns of the lower
            triangle, its diagonal as logarithms. Of a term whose covariance has a structure, ``(k,)``: its own
            coordinates as logarithms, of ``diag`` the standard deviations, of ``homcs`` the roots of the eigenvalues
            ``v (1 + (q - 1) rho)`` and ``v (1 - rho)``; of structures with correlations beside standard deviations
            (``ar1``) logarithms of these, then Fisher's z of those, of ``toep`` of partial autocorrelations, of ``cs``
            the logit of ``(1 + (q - 1) rho) / q``. A singular Sigma has infinite ones.
    """

    beta: AnyArray
    log_sigma: AnyArray
    chol: tuple[AnyArray, ...]


def marginal_loglik(params: MarginalParams, design: Design | CrossProducts) -> Array:
    """Log-density of y under ``N(X beta + offset, sigma^2 W^{-1} + Z Sigma Z')``, all constants kept.

    A pure function of unconstrained parameters: ``jit``, ``grad``, ``hessian`` and ``vmap`` work, with respect to
    ``params`` and to the design's floating arrays. ``-2`` times its value at the ML estimates is the criterion.

    Args:
        params: see :class:`MarginalParams`.
        design: arrays, or their cross-products when the same data are used many times.

    Returns:
        scalar.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> term = mj.RandomTerm(Z=np.ones((12, 1)), group=np.repeat(np.arange(4), 3), n_groups=4)
        >>> design = mj.Design(y=np.arange(12.0), X=np.ones((12, 1)), terms=(term,))
        >>> p = mj.MarginalParams(beta=np.array([5.5]), log_sigma=np.array(0.0), chol=(np.array([1.0]),))
        >>> bool(mj.marginal_loglik(p, design) < 0)
        True
    """
    refuse_forked()
    stats = design if isinstance(design, CrossProducts) else cross_products(design)
    check_shapes(params, stats)
    return _loglik(params, stats)


def check_shapes(params: MarginalParams, stats: CrossProducts) -> None:
    """Raise ValueError for parameters that would broadcast to something else than the model's."""
    wanted = MarginalParams(stats.beta0.shape, (), tuple((s.k,) for s in stats.layout.structures))
    found = MarginalParams(np.shape(params.beta), np.shape(params.log_sigma), tuple(map(np.shape, params.chol)))
    for name, a, b in zip(MarginalParams._fields, found, wanted, strict=True):
        if a != b:
            hint = " (terms with a covariance structure have its coordinates: mixjax.to_params(est, design))"
            raise ValueError(f"{name} has shape {a}; this model needs {b}{hint if name == 'chol' else ''}")


def structures_of(design: Design | CrossProducts) -> tuple[Structure, ...]:
    """The covariance structure of every random term."""
    return design.layout.structures if isinstance(design, CrossProducts) else design.structures


@jit
def _loglik(params: MarginalParams, stats: CrossProducts) -> Array:
    sigma = jnp.exp(params.log_sigma)
    lambdas = [
        structure.factor(structure.exponentials(jnp.asarray(chol))) / sigma
        for chol, structure in zip(params.chol, stats.layout.structures, strict=True)
    ]
    reduced = eliminate(in_bases(lambdas, stats), arrange(stats))
    delta = stats.X_basis.R @ (params.beta - stats.beta0)
    rss = reduced.yy - 2.0 * delta @ reduced.Xy + delta @ reduced.XX @ delta
    constant = stats.n * (math.log(2.0 * math.pi) + 2.0 * params.log_sigma) - stats.sum_log_weights
    loglik: Array = -0.5 * (constant + reduced.logdet + rss / sigma**2)
    return loglik
