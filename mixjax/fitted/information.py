"""Information on the variance parameters: their joint covariance, and how that of beta moves with them."""

from __future__ import annotations

from typing import NamedTuple

from mixjax import linalg
from mixjax.design import AnyArray
from mixjax.engine.coordinates import is_regular, solve_where
from mixjax.engine.curvature import Slopes
from mixjax.engine.engine import Engine
from mixjax.machine import Array, namespace


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


def information(engine: Engine, theta: AnyArray, sigma: AnyArray) -> Information:
    """Covariance of the variance parameters, and the derivatives of that of beta, all exact.

    With sigma profiled out ``f(x) = min_s F(x, s)``, ``s = log sigma``, ``F = ... + 2 df s + rss(x) exp(-2 s)``. So
    the joint Hessian follows from that of f: ``ds / dx = rss_x / (2 rss)`` and ``F_ss = 4 df``.

    Args:
        engine: of the data. theta: ``(k,)``, sigma: ``()``: estimates by its criterion.
    """
    stats = engine.stats
    xp = namespace(theta, sigma, stats.XX, stats.yy)
    x, free = engine.coordinates(theta)
    df = stats.n - xp.where(engine.reml, stats.XX.shape[0], 0)
    return information_at(x, free, engine.slopes(x), df, sigma, xp.asarray(stats.X_basis.R_inv))


def information_at(x: Array, free: Array, found: Slopes, df: Array, sigma: AnyArray, R_inv: Array) -> Information:
    """:func:`information` from what moves with the coordinates ``x (k,)``.

    Args:
        free: ``(k,)``. df: rows less, by REML, fixed effects. R_inv: ``(p, p)``, from the basis of X.
    """
    xp = namespace(x, found.Hessian)
    C, H = found.lanes.XX_inverse, found.Hessian
    if not x.shape[0]:  # sigma alone
        vcov = sigma**2 * (R_inv @ C @ R_inv.T)
        return Information(x, free, xp.reshape(0.5 / df, (1, 1)), xp.asarray(True), vcov, 2.0 * vcov[None])
    among = solve_where(free, H, linalg.eye(x.shape[0], H))
    s_slopes = xp.where(free, 0.5 * found.log_rss, 0.0)
    mixed = among @ s_slopes
    last = 1.0 / (4.0 * df) + s_slopes @ mixed
    covariance = 2.0 * xp.block([[among, mixed[:, None]], [mixed[None], last[None, None]]])

    def own(C: Array) -> Array:
        return sigma**2 * (R_inv @ C @ R_inv.T)

    vcov = own(C)
    slopes = xp.concatenate([own(found.XX_inverse), 2.0 * vcov[None]])
    return Information(x, free, covariance, is_regular(free, H), vcov, slopes)
