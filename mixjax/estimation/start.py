"""Where a fit starts: variances from a few moments of the data."""

from __future__ import annotations

import numpy as np

from mixjax import covariance as cov
from mixjax import decompositions, linalg
from mixjax.covariance import HIGHEST, LOWEST, pairs_of
from mixjax.engine.curvature import minque_equations
from mixjax.engine.first_factor import Spot
from mixjax.engine.moments import Moments
from mixjax.machine import Array, broadcast_to, is_nowhere, namespace, set_at, stack
from mixjax.products.sums import CrossProducts


def minque_start(moments: Moments, of_design: tuple[Array, Array, list[Spot]] | None = None) -> Array:
    """MINQUE(0) of all variances and covariances: coordinates ``(k, B)`` in the bases of the products.

    The quadratic forms ``y'M V_j M y``, M the projection that takes the fixed effects out, have expectations linear in
    the covariances (Searle, Casella & McCulloch 1992, Variance Components, section 11.3). Solved, and clipped to
    reasonable ratios. In balanced designs this is the REML estimate itself, wherever that is not singular.

    Args:
        of_design: what :func:`~mixjax.engine.curvature.minque_equations` gives, where it is known.
    """
    xp = namespace(moments.UU)
    equations, traces, spots = of_design or minque_equations(moments)
    d = sum(q * m for _, q, m in moments.dense)
    XX, XdX = moments.UU[d:, d:], moments.UU[:d, d:]
    p = XX.shape[0]
    Xy, e, rss = moments.Uy[d:], moments.Uy[:d], moments.yy
    c = xp.zeros_like(moments.Uy)
    if p:
        delta = linalg.matmul(linalg.inverse_logdet(XX)[0], Xy[:, None])[:, 0]
        e = e - linalg.matmul(XdX, delta[:, None])[:, 0]
        rss = rss - (Xy * delta).sum(0)
        c = xp.concatenate([c[:d], -delta])
    squares = moments.pull_back(c[:, None] * c[None], c, xp.ones_like(rss))
    forms = {
        (moments.layout.chain[0], pair): x.sum(0) for pair, x in zip(pairs_of(moments.A.shape[0]), squares, strict=True)
    }
    at = 0
    for f, q, m in moments.dense:
        effects = e[at : at + q * m].reshape(q, m, -1)
        at += q * m
        forms |= {(f, (a, b)): (effects[a] * effects[b]).sum(0) * (1.0 if a == b else 2.0) for a, b in pairs_of(q)}
    rhs = stack([*(forms[spot] for spot in spots), rss])
    df = broadcast_to(moments.n - p, traces.shape[1:])
    lhs = xp.concatenate(
        [
            xp.concatenate([equations, traces[:, None]], axis=1),
            xp.concatenate([traces, df[None]])[None],
        ]
    )
    solution = _solve_scaled(lhs, rhs)
    sigma2 = xp.maximum(solution[-1], 1e-3 * rss / moments.n)
    values = {spot: solution[j] / sigma2 for j, spot in enumerate(spots)}
    parts = []
    for place in moments.layout.terms:
        D = [
            [values[place.factor, (place.start + min(a, b), place.start + max(a, b))] for b in range(place.q)]
            for a in range(place.q)
        ]
        squared, vectors = decompositions.eigh(cov.stack_of(D))
        root = xp.sqrt(xp.clip(squared, LOWEST**2, HIGHEST**2))
        parts.append(vectors * root[None])
    structures = moments.layout.structures
    x = cov.near(parts, structures)
    finite = xp.isfinite(x).all(0)
    if is_nowhere(~finite):
        return x
    return xp.where(finite, x, cov.wide_start(1.0, structures, x)[:, None])


def _solve_scaled(lhs: Array, rhs: Array) -> Array:
    """Equations ``(k, k, L)`` of very different size, solved for ``rhs (k, B)``; an unsolvable system does not fail."""
    xp = namespace(lhs)
    k = lhs.shape[0]
    diagonal = lhs[np.arange(k), np.arange(k)]
    scale = xp.sqrt(xp.maximum(diagonal, np.finfo(lhs.dtype).tiny))
    scaled = lhs / scale[:, None] / scale[None]
    ridge = 1e4 * np.finfo(lhs.dtype).eps * linalg.eye(k, lhs)
    inverse = linalg.inverse_logdet(scaled + ridge)[0]
    return linalg.matmul(inverse, (rhs / scale)[:, None])[:, 0] / scale


def moment_start(stats: CrossProducts) -> list[Array]:
    """Per term a diagonal ``Lambda (q, q)`` in the basis of Z: MINQUE(0) of the least-squares residuals.

    With uncorrelated effects of variance d_j, the sums of squares ``s_i = |Z_i' r|^2`` and ``|r|^2`` have expectations
    linear in sigma^2 and the d_j: ``E s_i = sigma^2 tr(Z_i'Z_i) + sum_j d_j |Z_i'Z_j|_F^2`` (Searle, Casella &
    McCulloch 1992, Variance Components, section 11.3, the loss of p degrees of freedom left out). Solved, and clipped
    to reasonable ratios.
    """
    xp = namespace(stats.XX, stats.yy)
    layout = stats.layout
    first, k = [], 0
    for products in stats.factors:
        first.append(k)
        k += products.ZZ.shape[0]
    dtype = stats.XX.dtype
    # Unknowns: the k variances, then sigma^2. Equations: one per effect, then the total sum of squares.
    lhs = set_at(xp.zeros((k + 1, k + 1), dtype), (k, k), stats.n)
    rhs = set_at(xp.zeros(k + 1, dtype), k, stats.yy)

    def frobenius(ZZ: Array) -> Array:
        return (ZZ**2).sum(-1)

    for start, products in zip(first, stats.factors, strict=True):
        own = start + np.arange(products.ZZ.shape[0])
        lhs = set_at(lhs, (own[:, None], own[None]), frobenius(products.ZZ))
        traces = xp.diagonal(products.ZZ.sum(-1))
        lhs = set_at(set_at(lhs, (own, k), traces), (k, own), traces)
        rhs = set_at(rhs, own, (products.Zy**2).sum(-1))
    for (s, t), pair in zip(layout.pairs, stats.pairs, strict=True):
        at_s, at_t = first[s] + np.arange(pair.ZZ.shape[0]), first[t] + np.arange(pair.ZZ.shape[1])
        block = frobenius(pair.ZZ)
        lhs = set_at(set_at(lhs, (at_s[:, None], at_t[None]), block), (at_t[:, None], at_s[None]), block.T)
    # Equations of very different size: scale the unknowns, and keep an unsolvable system from failing.
    scale = xp.sqrt(xp.maximum(xp.diagonal(lhs), np.finfo(dtype).tiny))
    scaled = lhs / scale[:, None] / scale[None] + 1e-8 * xp.eye(k + 1, dtype=dtype)
    solution = xp.linalg.solve(scaled, rhs / scale) / scale
    floor = 1e-3 * stats.yy / stats.n
    ratio = xp.sqrt(xp.maximum(solution[:k], 0.0) / xp.maximum(solution[k], floor))
    ratio = xp.clip(xp.where(xp.isfinite(ratio), ratio, 1.0), LOWEST, HIGHEST)
    starts = [first[place.factor] + place.start for place in layout.terms]
    return [xp.diag(ratio[at : at + place.q]) for at, place in zip(starts, layout.terms, strict=True)]
