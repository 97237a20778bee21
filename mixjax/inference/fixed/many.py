"""Tests of the fixed effects of many fits at once, over the moments that the fits themselves were made from.

The cost of a fit's test does not depend on the number of levels of a balanced design. Lanes, one per fit, stand in the
last axis of every array.
"""

from __future__ import annotations

import numpy as np

from mixjax import decompositions, linalg
from mixjax.design import AnyArray
from mixjax.engine.lanes import Lanes
from mixjax.estimation.blocks import has_lanes, over_lanes
from mixjax.estimation.choice import EngineName
from mixjax.estimation.estimate import Estimates
from mixjax.machine import Array, namespace
from mixjax.products.sums import CrossProducts


def in_lanes(ddf: str, stats: CrossProducts, engine: EngineName = "auto") -> bool:
    """Whether :func:`errors_of_many` serves these tests."""
    return ddf in ("wald", "satterthwaite") and has_lanes(stats, engine)


def errors_of_many(
    ddf: str, est: Estimates, stats: CrossProducts, L: np.ndarray, reml: bool, engine: EngineName = "auto"
) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors and degrees of freedom ``(B, r)`` of ``L beta``, L ``(r, p)``; infinite for Wald's.

    Args:
        est, stats: of B fits, arrays of numbers, double precision. A fit's numbers do not depend on the others.
    """
    fun = _wald if ddf == "wald" else _satterthwaite
    se, df = over_lanes(fun, stats, reml, (np.asarray(est.theta), np.asarray(est.sigma)), (L,), engine)
    return se, df


def _wald(lanes: Lanes, theta: Array, sigma: Array, L: Array) -> tuple[Array, Array]:
    """Standard errors and infinite degrees of freedom ``(r, B)``."""
    x, _ = lanes.coordinates(theta)
    xp = namespace(x, lanes.bases.X_R_inv)
    unscaled = _quadratic(_rows(L, lanes), lanes.profiled(x).XX_inverse)
    return sigma * xp.sqrt(unscaled), xp.full(unscaled.shape, xp.inf, unscaled.dtype)


def _satterthwaite(lanes: Lanes, theta: Array, sigma: Array, L: Array) -> tuple[Array, Array]:
    """Standard errors and degrees of freedom ``(r, B)``; see :func:`mixjax.satterthwaite` for the definition.

    With sigma profiled out ``f(x) = min_s F(x, s)``, ``s = log sigma``: see
    :func:`~mixjax.inference.information.information`, which this is written out for lanes.
    """
    x, free = lanes.coordinates(theta)
    xp = namespace(x, lanes.bases.X_R_inv)
    rows, found = _rows(L, lanes), lanes.slopes(x)
    unscaled, H = _quadratic(rows, found.lanes.XX_inverse), found.Hessian
    slopes = xp.stack([_quadratic(rows, C) for C in found.XX_inverse])  # (k, r, B)
    log_sigma = xp.where(free, 0.5 * found.log_rss, 0.0)
    among = free[:, None] & free[None]
    H = xp.where(among, H, xp.eye(len(x), dtype=H.dtype)[..., None])
    inverse = xp.where(among, linalg.inverse_logdet(H)[0], 0.0)
    mixed = linalg.matmul(inverse, log_sigma[:, None])[:, 0]
    df = lanes.moments.n - xp.where(lanes.reml, lanes.n_fixed, 0)
    of_sigma = 0.25 / df + (log_sigma * mixed).sum(0)
    # g'A g / 2 for the gradient (slopes, 2 unscaled) by the coordinates and log sigma, all over sigma^2.
    spread = (slopes * linalg.matmul(inverse, slopes)).sum(0)
    spread += 4.0 * unscaled * (slopes * mixed[:, None]).sum(0) + 4.0 * unscaled**2 * of_sigma
    return sigma * xp.sqrt(unscaled), xp.where(_is_regular(H), unscaled**2 / spread, xp.nan)


def _rows(L: Array, lanes: Lanes) -> Array:
    """The combinations in the basis of X."""
    R_inv = lanes.bases.X_R_inv
    return linalg.matmul(L[..., None], namespace(L, R_inv).asarray(R_inv))


def _quadratic(rows: Array, C: Array) -> Array:
    """``r'C r`` for every row: ``(r, p, B), (p, p, B) -> (r, B)``."""
    return (linalg.matmul(rows, C) * rows).sum(1)


def _is_regular(H: AnyArray) -> Array:
    """``(B,)``: positive definite, judged free of scales; see :func:`~mixjax.engine.coordinates.is_regular`."""
    xp = namespace(H)
    d = xp.sqrt(xp.abs(xp.stack([H[i, i] for i in range(len(H))])))
    least = xp.sqrt(xp.finfo(H.dtype).eps) * xp.eye(len(H), dtype=H.dtype)[..., None]
    return decompositions.is_positive(H / (d[:, None] * d) - least)
