"""What the data say of the variance parameters: their joint covariance, and how that of beta moves with them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixjax import linalg
from mixjax.design import AnyArray
from mixjax.engine.curvature import slopes_of
from mixjax.engine.incidence import Incidence
from mixjax.engine.moments import moments_of
from mixjax.estimation.surface import coordinates_of, evaluate_of, is_regular, profiled_of, solve_where
from mixjax.machine import Array, jit, namespace
from mixjax.products.sums import CrossProducts


class Information(NamedTuple):
    """At estimates of one model. The k + 1 variance parameters are the optimiser's coordinates x, then log sigma.

    Attributes:
        x: ``(k,)`` coordinates of the relative covariances in the bases of the products.
        free: ``(k,)`` False where a singular fit holds a coordinate at zero.
        covariance: ``(k + 1, k + 1)`` asymptotic covariance of the variance parameters: twice the inverse Hessian of
            the criterion with sigma free; zero rows where they are not free.
        regular: ``()`` the Hessian is positive definite among the free ones.
        vcov: ``(p, p)`` covariance of beta. slopes: ``(k + 1, p, p)`` its derivatives.
    """

    x: Array
    free: Array
    covariance: Array
    regular: Array
    vcov: Array
    slopes: Array


def information(
    theta: AnyArray, sigma: AnyArray, stats: CrossProducts, reml: Array | bool, where: Incidence | None = None
) -> Information:
    """Covariance of the variance parameters, and the derivatives of that of beta, all exact.

    With sigma profiled out ``f(x) = min_s F(x, s)``, ``s = log sigma``, ``F = ... + 2 df s + rss(x) exp(-2 s)``. So
    the joint Hessian follows from that of f: ``ds / dx = rss_x / (2 rss)`` and ``F_ss = 4 df``.

    Args:
        theta: ``(k,)``, sigma: ``()``: estimates by the criterion ``reml`` names.
        stats: cross-products of one response.
        where: as in :func:`~mixjax.estimation.surface.profiled_of`.
    """
    xp = namespace(theta, sigma, stats.XX, stats.yy)
    x, free = coordinates_of(theta, stats)
    C, H, C_slopes, log_rss_slopes = (_at_once if xp is np else _by_differentiation)(x, stats, reml, where)
    df = stats.n - xp.where(reml, stats.XX.shape[0], 0)
    among = solve_where(free, H, linalg.eye(x.shape[0], H))
    s_slopes = xp.where(free, 0.5 * log_rss_slopes, 0.0)
    mixed = among @ s_slopes
    last = 1.0 / (4.0 * df) + s_slopes @ mixed
    covariance = 2.0 * xp.block([[among, mixed[:, None]], [mixed[None], last[None, None]]])
    R_inv = xp.asarray(stats.X_basis.R_inv)

    def own(C):
        return sigma**2 * (R_inv @ C @ R_inv.T)

    vcov = own(C)
    slopes = xp.concatenate([own(C_slopes), 2.0 * vcov[None]])
    return Information(x, free, covariance, is_regular(free, H), vcov, slopes)


def _at_once(x: np.ndarray, stats: CrossProducts, reml: bool, _: Any) -> tuple[Array, Array, Array, Array]:
    """``XX_inverse (p, p)``, the Hessian ``(k, k)``, and derivatives of the inverse ``(k, p, p)`` and of log rss."""
    found = slopes_of(x[:, None], moments_of(stats), reml)
    return found.lanes.XX_inverse[..., 0], found.Hessian[..., 0], found.XX_inverse[..., 0], found.log_rss[..., 0]


def _by_differentiation(
    x: Array, stats: CrossProducts, reml: Array | bool, where: Incidence | None
) -> tuple[Array, Array, Array, Array]:
    profiled = profiled_of(stats, reml, where)

    def parts(x):
        at = profiled(x)
        return (at.XX_inverse, jnp.log(at.rss)), at.XX_inverse

    (C_slopes, log_rss_slopes), C = jax.jacfwd(parts, has_aux=True)(x)
    H = evaluate_of(stats, reml, where)(x[:, None])[2][..., 0]
    return C, H, jnp.moveaxis(C_slopes, -1, 0), log_rss_slopes


information_of = jit(information)
