"""Estimates <-> unconstrained parameters of the marginal likelihood."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from mixjax import covariance as cov
from mixjax.estimation.estimate import Estimates
from mixjax.forks import refuse_forked
from mixjax.likelihood.marginal import MarginalParams


class Parameters(NamedTuple):
    """The parameters of a linear mixed model on their natural scales.

    Attributes:
        theta: ``(k,)`` relative Cholesky factors. beta: ``(p,)``. sigma: ``()``. Sigma: per term ``(q, q)``, absolute.
    """

    theta: Array
    beta: Array
    sigma: Array
    Sigma: tuple[Array, ...]


def to_params(est: Estimates) -> MarginalParams:
    """Unconstrained parameters at the estimates; a singular Sigma has ``-inf`` among its diagonals.

    Example:
        >>> import mixjax as mj
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"), reml=False)
        >>> p = mj.to_params(fit.estimates)
        >>> [chol.shape for chol in p.chol]
        [(3,)]
    """
    refuse_forked()
    qs = tuple(Sigma.shape[0] for Sigma in est.Sigma)
    parts = cov.split_theta(jnp.asarray(est.theta), qs)
    chol = [cov.log_diagonal(est.sigma * part, q) for part, q in zip(parts, qs, strict=True)]
    return MarginalParams(jnp.asarray(est.beta), jnp.log(est.sigma), tuple(chol))


def from_params(p: MarginalParams) -> Parameters:
    """Natural parameters from unconstrained ones; differentiable.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> p = mj.MarginalParams(beta=np.zeros(1), log_sigma=np.array(0.0), chol=(np.array([0.0]),))
        >>> float(mj.from_params(p).sigma)
        1.0
    """
    refuse_forked()
    sigma = jnp.exp(p.log_sigma)
    qs = [cov.n_effects(len(chol)) for chol in p.chol]
    triangles = [cov.exp_diagonal(jnp.asarray(chol), q) for chol, q in zip(p.chol, qs, strict=True)]
    lambdas = [cov.lambda_of_theta(part, q) for part, q in zip(triangles, qs, strict=True)]
    theta = jnp.concatenate(triangles) / sigma
    return Parameters(theta, jnp.asarray(p.beta), sigma, tuple(L @ L.T for L in lambdas))
