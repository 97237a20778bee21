"""Where a fit starts: variances from a few moments of the data."""

from __future__ import annotations

import numpy as np

from mixjax import covariance as cov
from mixjax import decompositions, linalg
from mixjax.covariance import HIGHEST, LOWEST, pairs_of
from mixjax.engine.curvature import minque_equations
from mixjax.engine.first_factor import Spot
from mixjax.engine.moments import Moments
from mixjax.engine.quadratic_forms import Expected, expected_of
from mixjax.machine import Array, broadcast_to, is_nowhere, namespace, stack
from mixjax.products.sums import CrossProducts, Layout


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
    return _solved(equations, traces, stack([forms[spot] for spot in spots]), rss, moments.n, p, spots, moments.layout)


def start_of_products(stats: CrossProducts, expected: Expected | None = None) -> Array:
    """The same of one data set, ``(k, 1)``, from its products alone, also where there are no moments.

    Args:
        expected: what :func:`~mixjax.engine.quadratic_forms.expected_of` gives, where it is known.
    """
    at = expected or expected_of(stats)
    xp = namespace(stats.XX, stats.yy)
    delta = at.XX_inverse @ stats.Xy
    forms = []
    for f, E in at.directions.items():
        e = xp.asarray(stats.factors[f].Zy) - xp.swapaxes(stats.factors[f].ZX, 1, 2) @ delta
        forms.append(xp.einsum("jab,ab->j", E, e @ e.T))
    rss = xp.asarray(stats.yy - stats.Xy @ delta)[None]
    n, p = xp.asarray(stats.n)[None], len(delta)
    equations, traces = at.equations[..., None], at.traces[:, None]
    return _solved(equations, traces, xp.concatenate(forms)[:, None], rss, n, p, at.spots(stats.layout), stats.layout)


def _solved(
    equations: Array, traces: Array, forms: Array, rss: Array, n: Array, p: int, spots: list[Spot], layout: Layout
) -> Array:
    """Coordinates ``(k, B)`` from ``tr(P V_j P V_l) (J, J, L)``, ``tr(P V_j) (J, L)``, ``y'P V_j P y (J, B)`` and
    ``y'P y (B,)``."""
    xp = namespace(equations, forms)
    rhs = xp.concatenate([forms, rss[None]])
    df = broadcast_to(n - p, traces.shape[1:])
    lhs = xp.concatenate(
        [
            xp.concatenate([equations, traces[:, None]], axis=1),
            xp.concatenate([traces, df[None]])[None],
        ]
    )
    solution = _solve_scaled(lhs, rhs)
    sigma2 = xp.maximum(solution[-1], 1e-3 * rss / n)
    values = {spot: solution[j] / sigma2 for j, spot in enumerate(spots)}
    parts = []
    for place in layout.terms:
        D = [
            [values[place.factor, (place.start + min(a, b), place.start + max(a, b))] for b in range(place.q)]
            for a in range(place.q)
        ]
        squared, vectors = decompositions.eigh(cov.stack_of(D))
        root = xp.sqrt(xp.clip(squared, LOWEST**2, HIGHEST**2))
        parts.append(vectors * root[None])
    structures = layout.structures
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
