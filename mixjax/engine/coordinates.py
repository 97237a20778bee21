"""The optimiser's coordinates of a model's relative covariances, and linear algebra among those that are free."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from mixjax import covariance as cov
from mixjax import decompositions, linalg
from mixjax.design import AnyArray
from mixjax.machine import Array, namespace
from mixjax.products.sums import CrossProducts, Layout


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
        x = structure.exactly(linalg.matmul(xp.asarray(R), Lambda))
        x, own = structure.reduced(x, xp.full(x.shape[1], -1))
        parts.append(x)
        free.append(own & structure.moving(x))
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
    return decompositions.is_positive((scaled / xp.outer(d, d) - least)[..., None])[0]
