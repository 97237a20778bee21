"""The objective of a fit: ML deviance or REML criterion with beta and sigma profiled out."""

from __future__ import annotations

import warnings

import jax
import jax.numpy as jnp
import numpy as np

from mixjax import linalg
from mixjax.covariance import lambdas_of_theta
from mixjax.engine.elimination import Arranged, arrange, eliminate
from mixjax.engine.profiled import Profiled
from mixjax.forks import refuse_forked
from mixjax.machine import Array, is_concrete, jit
from mixjax.products.sums import CrossProducts, check_products


def profile_out(lambdas: list[Array], blocks: Arranged, stats: CrossProducts, reml: Array | bool) -> Profiled:
    """Profile beta and sigma out (Bates et al. 2015, eqs. 34-35 for ML, 41-42 for REML).

    Args:
        lambdas: per term ``(q, q)``, any factor of its relative covariance, in the bases of the products.
        blocks: ``arrange(stats)``.
        stats: cross-products.
        reml: restricted maximum likelihood. May be traced: one program then serves both criteria.
    """
    reduced = eliminate(lambdas, blocks)
    p = reduced.Xy.shape[0]
    if p:
        XX_inverse, logdet_XX = linalg.inverse_logdet(reduced.XX)
        delta = linalg.solve_spd(reduced.XX, reduced.Xy[:, None])[:, 0]
        rss = reduced.yy - linalg.quadratic_form(reduced.XX, reduced.Xy[:, None])[0, 0]
    else:
        XX_inverse, logdet_XX, delta, rss = reduced.XX, jnp.zeros(()), reduced.Xy, reduced.yy
    df = stats.n - jnp.where(reml, p, 0)
    criterion = reduced.logdet + df * (1.0 + jnp.log(2.0 * np.pi * rss / df)) - stats.sum_log_weights
    criterion = criterion + jnp.where(reml, logdet_XX + 2.0 * stats.X_basis.logdet, 0.0)
    return Profiled(criterion, delta, XX_inverse, rss, jnp.sqrt(rss / df))


def criterion(theta: Array, stats: CrossProducts, reml: bool = True) -> Array:
    """ML deviance (-2 log-likelihood) or REML criterion, with beta and sigma profiled out.

    A pure function: ``jit``, ``grad``, ``hessian`` and ``vmap`` work. Equal to lme4's ``deviance`` (ML fit) or
    ``REMLcrit``, all constants kept.

    Args:
        theta: ``(k,)`` relative Cholesky factors, the lower triangle column by column, term by term; any signs. Any
            covariance of a term is allowed, whatever its structure, so that at the estimates the gradient vanishes for
            unstructured covariances only.
        stats: cross-products of the data.
        reml: the REML criterion if true, else the ML deviance.

    Returns:
        scalar.

    Warns:
        UserWarning: it is computed in float32.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> term = mj.RandomTerm(Z=np.ones((12, 1)), group=np.repeat(np.arange(4), 3), n_groups=4)
        >>> design = mj.Design(y=np.arange(12.0), X=np.ones((12, 1)), terms=(term,))
        >>> bool(mj.criterion(np.array([1.0]), mj.cross_products(design)) > 0)
        True
    """
    refuse_forked()
    check_products(stats)
    warn_of_float32(stats.XX)
    return _criterion(theta, stats, reml)


def warn_of_float32(leaf: Array) -> None:
    """Warn, at the place that called the caller, where an array of the data is or becomes single precision."""
    single = np.dtype(leaf.dtype).itemsize < 8 or not jax.config.read("jax_enable_x64")
    if single and is_concrete(leaf):
        warnings.warn(
            "computing in float32: the criterion is good to about six digits. For float64 call inside "
            "`with jax.enable_x64():` with float64 arrays, or use mixjax.lmm, which does so itself",
            stacklevel=3,
        )


@jit
def _criterion(theta: Array, stats: CrossProducts, reml: Array) -> Array:
    lambdas = lambdas_of_theta(theta, stats.layout.qs)
    return profile_out(in_bases(lambdas, stats), arrange(stats), stats, reml).criterion


def in_bases(lambdas: list[Array], stats: CrossProducts) -> list[Array]:
    """Factors of the covariances of effects of Z's own columns -> of Z's basis."""
    return [basis.R @ Lambda for basis, Lambda in zip(stats.Z_bases, lambdas, strict=True)]
