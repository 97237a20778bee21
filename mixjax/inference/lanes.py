"""Tests of the fixed effects of many fits at once, over the moments that the fits themselves were made from.

The cost of a fit's test does not depend on the number of levels of a balanced design. Lanes, one per fit, stand in the
last axis of every array.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixjax import linalg
from mixjax.design import AnyArray
from mixjax.engine.coordinates import coordinates_in
from mixjax.engine.curvature import profile_lanes, slopes_of
from mixjax.engine.moments import Moments
from mixjax.estimation.estimate import Estimates
from mixjax.estimation.lanes import Bases, Sizes, padded_lanes, put, slice_of, tile_of
from mixjax.estimation.many import Batch, EngineName, chosen_engine, for_blocks, last
from mixjax.machine import LANES, Array, jit, lanes_of, namespace, silently
from mixjax.products.sizes import in_blocks, in_lanes_at_once, is_small
from mixjax.products.sums import CrossProducts


def in_lanes(ddf: str, stats: CrossProducts, engine: EngineName = "auto") -> bool:
    """Whether :func:`errors_of_many` serves these tests."""
    served = in_blocks(stats) or (engine != "jax" and is_small(stats) and in_lanes_at_once(stats))
    return ddf in ("wald", "satterthwaite") and served


def errors_of_many(
    ddf: str, est: Estimates, stats: CrossProducts, L: np.ndarray, reml: bool, engine: EngineName = "auto"
) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors and degrees of freedom ``(B, r)`` of ``L beta``, L ``(r, p)``; infinite for Wald's.

    Args:
        est, stats: of B fits, arrays of numbers, double precision. A fit's numbers do not depend on the others.
    """
    at_once = chosen_engine(stats, len(stats.yy), engine) == "numpy"
    batch = Batch(stats, None, "cpu" if at_once else jax.default_backend(), at_once)
    se, df = np.empty((2, batch.B, len(L)))

    def work(block: int) -> None:
        moments, bases, _ = batch.inputs(block)
        index, count = batch.index(block), batch.count(block)
        theta, sigma = last(np.asarray(est.theta)[index]), np.asarray(est.sigma)[index]
        if at_once:
            found = _errors_at_once(ddf, L, (theta, sigma, moments, bases), reml, batch.sizes.block, count)
        else:
            found = _errors(ddf, L, theta, sigma, moments, bases, np.bool_(reml), batch.sizes)
        for whole, part in zip((se, df), found, strict=True):
            whole[index[0] : index[0] + count] = np.asarray(part).T[:count]

    if at_once:
        for block in range(batch.n_blocks):
            work(block)
    else:
        for_blocks(batch, work, batch.workers)
    return se, df


def _errors_at_once(
    ddf: str, L: np.ndarray, lanes: tuple, reml: bool, N: int, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """By NumPy, of the first ``count`` lanes."""
    size, parts = tile_of(lanes[2]), []
    with silently():
        for first in range(0, count, size):
            at = padded_lanes(np.arange(first, min(first + size, count)))
            theta, sigma, moments, bases = lanes_of(lanes, at, N)
            parts.append(_errors_in_lanes(ddf, L, theta, sigma, moments, bases, reml))
    se, df = (np.concatenate(part, -1) for part in zip(*[(a[:, :size], b[:, :size]) for a, b in parts], strict=True))
    return se, df


@partial(jit, compiler_options=LANES, static_argnames=("ddf", "sizes"))
def _errors(
    ddf: str, L: Array, theta: Array, sigma: Array, moments: Moments, bases: Bases, reml: Array, sizes: Sizes
) -> tuple[Array, Array]:
    """Tile by tile, so that arrays over lanes stay in the cache."""
    N, size = sizes.block, sizes.lanes

    def tile(i: Array, found: Any) -> Any:
        own_theta, own_sigma, own, own_bases = slice_of((theta, sigma, moments, bases), i * size, size, N)
        return put(found, _errors_in_lanes(ddf, jnp.asarray(L), own_theta, own_sigma, own, own_bases, reml), i * size)

    empty = jnp.zeros((len(L), N), sigma.dtype)
    return jax.lax.fori_loop(0, N // size, tile, (empty, empty))


def _errors_in_lanes(
    ddf: str, L: Array, theta: Array, sigma: Array, moments: Moments, bases: Bases, reml: Array | bool
) -> tuple[Array, Array]:
    """Standard errors and degrees of freedom ``(r, B)``; see :func:`mixjax.satterthwaite` for the definition.

    With sigma profiled out ``f(x) = min_s F(x, s)``, ``s = log sigma``: see
    :func:`~mixjax.inference.information.information`, which this is written out for lanes.
    """
    x, free = coordinates_in(theta, moments.layout, [basis.R for basis in bases.Z])
    xp = namespace(x, bases.X_R_inv)
    rows = linalg.matmul(L[..., None], xp.asarray(bases.X_R_inv))

    if ddf == "wald":
        unscaled = _quadratic(rows, profile_lanes(x, moments, reml).XX_inverse)
        return sigma * xp.sqrt(unscaled), xp.full(unscaled.shape, xp.inf, unscaled.dtype)
    found = slopes_of(x, moments, reml)
    unscaled, H = _quadratic(rows, found.lanes.XX_inverse), found.Hessian
    slopes = xp.stack([_quadratic(rows, C) for C in found.XX_inverse])  # (k, r, B)
    log_sigma = xp.where(free, 0.5 * found.log_rss, 0.0)
    among = free[:, None] & free[None]
    H = xp.where(among, H, xp.eye(len(x), dtype=H.dtype)[..., None])
    inverse = xp.where(among, linalg.inverse_logdet(H)[0], 0.0)
    mixed = linalg.matmul(inverse, log_sigma[:, None])[:, 0]
    df = moments.n - xp.where(reml, moments.UU.shape[0] - sum(q * m for _, q, m in moments.dense), 0)
    of_sigma = 0.25 / df + (log_sigma * mixed).sum(0)
    # g'A g / 2 for the gradient (slopes, 2 unscaled) by the coordinates and log sigma, all over sigma^2.
    spread = (slopes * linalg.matmul(inverse, slopes)).sum(0)
    spread += 4.0 * unscaled * (slopes * mixed[:, None]).sum(0) + 4.0 * unscaled**2 * of_sigma
    return sigma * xp.sqrt(unscaled), xp.where(_is_regular(H), unscaled**2 / spread, xp.nan)


def _quadratic(rows: Array, C: Array) -> Array:
    """``r'C r`` for every row: ``(r, p, B), (p, p, B) -> (r, B)``."""
    return (linalg.matmul(rows, C) * rows).sum(1)


def _is_regular(H: AnyArray) -> Array:
    """``(B,)``: positive definite, judged free of scales; see :func:`~mixjax.estimation.surface.is_regular`."""
    xp = namespace(H)
    d = xp.sqrt(xp.abs(xp.stack([H[i, i] for i in range(len(H))])))
    least = xp.sqrt(xp.finfo(H.dtype).eps) * xp.eye(len(H), dtype=H.dtype)[..., None]
    return linalg.is_positive(H / (d[:, None] * d) - least)
