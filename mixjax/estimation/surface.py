"""The criterion of one data set as a function of the optimiser's coordinates, in the form that suits its structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.covariance import rank_tolerance
from mixjax.design import AnyArray
from mixjax.engine.criterion import Profiled, profile
from mixjax.engine.crossed import crossed_moments
from mixjax.engine.curvature import profile_lanes, value_gradient_hessian
from mixjax.engine.elimination import arrange
from mixjax.engine.incidence import Incidence
from mixjax.engine.moments import moments_of
from mixjax.machine import Array, namespace, set_at
from mixjax.optimise.newton import Evaluate, by_differentiation
from mixjax.products.sizes import has_closed_form
from mixjax.products.sums import CrossProducts, Layout


def profiled_of(
    stats: CrossProducts, reml: Array | bool, where: Incidence | None = None
) -> Callable[[Array], Profiled]:
    """``x (k,)`` -> the profiled likelihood there; differentiable to any order.

    Args:
        stats: cross-products of one response.
        reml: may be traced.
        where: what :func:`~mixjax.engine.incidence.incidence` found in a large crossed design, else None.
    """
    if where is not None:
        moments = crossed_moments(stats, where)

        def crossed(x: Array) -> Profiled:
            return Profiled(*(a[..., 0] for a in profile_lanes(x[:, None], moments, jnp.asarray(reml))))

        return crossed
    blocks = arrange(stats)
    return lambda x: profile(cov.factors_of(x, stats.layout.structures), blocks, stats, reml)


def evaluate_of(stats: CrossProducts, reml: Array | bool, where: Incidence | None = None) -> Evaluate:
    """Value, gradient and Hessian of the criterion in one lane: in closed form where there is one."""
    if where is not None or has_closed_form(stats):
        moments = moments_of(stats) if where is None else crossed_moments(stats, where)
        return lambda x: value_gradient_hessian(x, moments, jnp.asarray(reml))
    return by_differentiation(criterion_of(stats, reml))


def criterion_of(stats: CrossProducts, reml: Array | bool) -> Callable[[Array], Array]:
    """``x (k,)`` -> the criterion; differentiable to any order."""
    profiled = profiled_of(stats, reml)
    return lambda x: profiled(x).criterion


def coordinates_of(theta: AnyArray, stats: CrossProducts) -> tuple[Array, Array]:
    """The optimiser's coordinates ``x (k,)`` of estimates ``theta``, and which of them are free there ``(k,)``.

    At a singular fit the standard deviations that are zero, and in an unstructured covariance all of their columns, are
    not.
    """
    bases = [basis.R for basis in stats.Z_bases]
    theta = namespace(theta, *bases).asarray(theta, stats.XX.dtype)
    return coordinates_in(theta, stats.layout, bases)


def coordinates_in(theta: Array, layout: Layout, bases: Sequence[AnyArray]) -> tuple[Array, Array]:
    """The same from the structure of the model and each Z's ``R (q, q)``; or ``(k, B)`` of lanes ``theta (k, B)`` from
    ``R (q, q, B)`` or ``(q, q, 1)``."""
    xp = namespace(theta, *bases)
    if theta.ndim == 1:
        x, free = coordinates_in(theta[:, None], layout, [xp.asarray(R)[:, :, None] for R in bases])
        return x[:, 0], free[:, 0]
    parts, free = [], []
    lambdas = cov.lambdas_of_theta(theta, layout.qs)
    for structure, Lambda, R in zip(layout.structures, lambdas, bases, strict=True):
        x = structure.near(linalg.matmul(xp.asarray(R), Lambda))
        at = np.array(structure.deviations, np.int32)
        x = set_at(x, at, xp.where(abs(x[at]) <= rank_tolerance(x.dtype) * abs(x).max(0), 0.0, x[at]))
        x, own = structure.reduced(x, xp.full(x.shape[1], -1))
        parts.append(x)
        free.append(own)
    return xp.concatenate(parts), xp.concatenate(free)


def solve_where(free: Array, H: Array, rhs: Array) -> Array:
    """``H^{-1} rhs`` among the free coordinates, zero in the others: ``H (k, k)``, ``rhs (k, r)``."""
    among = free[:, None] & free[None]
    inverse = linalg.inverse_small(namespace(H, free).where(among, H, linalg.eye(H.shape[0], H)))
    return (inverse @ (rhs * free[:, None])) * free[:, None]


def is_regular(free: Array, H: Array) -> Array:
    """Whether the Hessian is positive definite among the free coordinates."""
    xp = namespace(H, free)
    one = linalg.eye(H.shape[0], H)
    scaled = xp.where(free[:, None] & free[None], H, one)
    d = xp.sqrt(abs(xp.diagonal(scaled)))
    least = float(np.sqrt(np.finfo(H.dtype).eps)) * one
    return linalg.is_positive((scaled / xp.outer(d, d) - least)[..., None])[0]
