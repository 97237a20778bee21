"""Where a fit starts: variances from a few moments of the data."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jax import Array

from mixjax.likelihood.cross_products import CrossProducts

# Limits of the standard deviation ratios that a start may have, in the basis of Z. Zero would be a stationary point.
LOWEST, HIGHEST = 0.1, 100.0


def moment_start(stats: CrossProducts) -> list[Array]:
    """Per term a diagonal ``Lambda (q, q)`` in the basis of Z: MINQUE(0) of the least-squares residuals.

    With uncorrelated effects of variance d_j, the sums of squares ``s_i = |Z_i' r|^2`` and ``|r|^2`` have expectations
    linear in sigma^2 and the d_j: ``E s_i = sigma^2 tr(Z_i'Z_i) + sum_j d_j |Z_i'Z_j|_F^2`` (Searle, Casella &
    McCulloch 1992, Variance Components, section 11.3, the loss of p degrees of freedom left out). Solved, and clipped
    to reasonable ratios.
    """
    layout = stats.layout
    first, k = [], 0
    for products in stats.factors:
        first.append(k)
        k += products.ZZ.shape[0]
    dtype = stats.XX.dtype
    # Unknowns: the k variances, then sigma^2. Equations: one per effect, then the total sum of squares.
    lhs = jnp.zeros((k + 1, k + 1), dtype).at[k, k].set(stats.n)
    rhs = jnp.zeros(k + 1, dtype).at[k].set(stats.yy)

    def frobenius(ZZ):
        return (ZZ**2).sum(-1)

    for start, products in zip(first, stats.factors, strict=True):
        own = start + np.arange(products.ZZ.shape[0])
        lhs = lhs.at[own[:, None], own[None]].set(frobenius(products.ZZ))
        traces = jnp.diagonal(products.ZZ.sum(-1))
        lhs = lhs.at[own, k].set(traces).at[k, own].set(traces)
        rhs = rhs.at[own].set((products.Zy**2).sum(-1))
    for (s, t), pair in zip(layout.pairs, stats.pairs, strict=True):
        at_s, at_t = first[s] + np.arange(pair.ZZ.shape[0]), first[t] + np.arange(pair.ZZ.shape[1])
        block = frobenius(pair.ZZ)
        lhs = lhs.at[at_s[:, None], at_t[None]].set(block).at[at_t[:, None], at_s[None]].set(block.T)
    # Equations of very different size: scale the unknowns, and keep an unsolvable system from failing.
    scale = jnp.sqrt(jnp.maximum(jnp.diagonal(lhs), jnp.finfo(dtype).tiny))
    scaled = lhs / scale[:, None] / scale[None] + 1e-8 * jnp.eye(k + 1, dtype=dtype)
    solution = jnp.linalg.solve(scaled, rhs / scale) / scale
    floor = 1e-3 * stats.yy / stats.n
    ratio = jnp.sqrt(jnp.maximum(solution[:k], 0.0) / jnp.maximum(solution[k], floor))
    ratio = jnp.clip(jnp.where(jnp.isfinite(ratio), ratio, 1.0), LOWEST, HIGHEST)
    starts = [first[place.factor] + place.start for place in layout.terms]
    return [jnp.diag(ratio[at : at + place.q]) for at, place in zip(starts, layout.terms, strict=True)]
