"""Estimates <-> unconstrained parameters of the marginal likelihood."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from mixjax import covariance as cov
from mixjax import decompositions
from mixjax.design import Design, refuse_residual_side
from mixjax.engine.marginal import MarginalParams, structures_of
from mixjax.estimation.estimate import Estimates
from mixjax.forks import refuse_forked
from mixjax.products.sums import CrossProducts


class Parameters(NamedTuple):
    """The parameters of a linear mixed model on their natural scales.

    Attributes:
        theta: ``(k,)`` relative Cholesky factors. beta: ``(p,)``. sigma: ``()``. Sigma: per term ``(q, q)``, absolute.
    """

    theta: Array
    beta: Array
    sigma: Array
    Sigma: tuple[Array, ...]


def to_params(est: Estimates, design: Design | CrossProducts | None = None) -> MarginalParams:
    """Unconstrained parameters at the estimates; a singular Sigma has ``-inf`` among them.

    Args:
        est: the estimates.
        design: the model, or its cross-products. Needed where a covariance has a structure (``diag``, ``ar1``); None
            stands for terms without.

    Raises:
        ValueError: residuals have a dispersion or a correlation, whose parameters :class:`MarginalParams` has no room
            for.

    Example:
        >>> import mixjax as mj
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"), reml=False)
        >>> p = mj.to_params(fit.estimates)
        >>> [chol.shape for chol in p.chol]
        [(3,)]
        >>> fit = mj.lmm("Reaction ~ Days + diag(Days | Subject)", mj.datasets.load("sleepstudy"), reml=False)
        >>> [chol.shape for chol in mj.to_params(fit.estimates, fit.design).chol]
        [(2,)]
    """
    refuse_forked()
    _refuse_residuals(est, design)
    qs = [Sigma.shape[-1] for Sigma in est.Sigma]
    structures = _structures(design, qs)
    parts = cov.split_theta(jnp.asarray(est.theta), tuple(qs))
    chol = [s.logarithms(s.of_theta(est.sigma * part)) for s, part in zip(structures, parts, strict=True)]
    return MarginalParams(jnp.asarray(est.beta), jnp.log(est.sigma), tuple(chol))


def _refuse_residuals(est: Estimates, design: Design | CrossProducts | None) -> None:
    """Raise ValueError for parameters of the residuals beside sigma, which would be dropped."""
    if isinstance(design, Design):
        refuse_residual_side(design, "mixjax.MarginalParams")
    if est.kernels is not None:
        raise ValueError(
            "these estimates have parameters of correlations by distance (estimates.kernels), which "
            "mixjax.MarginalParams cannot have: read them from fit.variance_parameters()"
        )
    if est.residual is not None and np.shape(est.residual)[-1]:
        raise ValueError(
            "these estimates have parameters of the residuals beside sigma (estimates.residual), which "
            "mixjax.MarginalParams cannot have: read them from fit.variance_parameters()"
        )


def from_params(p: MarginalParams, design: Design | CrossProducts | None = None) -> Parameters:
    """Natural parameters from unconstrained ones; differentiable. The inverse of :func:`to_params`.

    Args:
        p: unconstrained parameters. design: as in :func:`to_params`.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> p = mj.MarginalParams(beta=np.zeros(1), log_sigma=np.array(0.0), chol=(np.array([0.0]),))
        >>> float(mj.from_params(p).sigma)
        1.0
    """
    refuse_forked()
    sigma = jnp.exp(p.log_sigma)
    structures = _structures(design, [cov.n_effects(len(chol)) for chol in p.chol] if design is None else None)
    factors = [s.factor(s.exponentials(jnp.asarray(chol))) for s, chol in zip(structures, p.chol, strict=True)]
    lower = [_lower(s, F) for s, F in zip(structures, factors, strict=True)]
    theta = cov.theta_of_lambdas(lower) / sigma
    return Parameters(theta, jnp.asarray(p.beta), sigma, tuple(F @ F.T for F in factors))


def _structures(design: Design | CrossProducts | None, qs: Sequence[int] | None) -> tuple[cov.Structure, ...]:
    if design is not None:
        return structures_of(design)
    return tuple(map(cov.Unstructured, qs or ()))


def _lower(structure: cov.Structure, F: Array) -> Array:
    if structure.is_lower:
        return F
    lower: Array = decompositions.lower_factor(F, cov.rank_tolerance(F.dtype))
    return lower
