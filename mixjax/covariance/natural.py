"""Derivatives of covariances by variances and correlations, or by loadings and specific variances, which
Kenward-Roger's adjustment is stated in."""

from __future__ import annotations

import numpy as np

from mixjax import linalg
from mixjax.covariance.custom import Written
from mixjax.covariance.structures import Structure
from mixjax.covariance.theta import pairs_of


def by_natural(s: Structure, x: np.ndarray, linear: bool) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Derivatives of the entries of Sigma by parameters in which KR is stated: ``(B, J, k)``; second ones ``(B, J, k,
    k)``, None where they are zero or left out; and of these parameters by the coordinates ``(B, k, k)``.

    Args:
        x: ``(k, B)`` coordinates.
    """
    a, b = np.array(pairs_of(s.q)).T
    B = x.shape[1]
    units = s.directions()
    by_x = np.moveaxis(s.jacobian(x), -1, 0)  # (B, J, k)
    if units is not None:
        entries = units[:, a, b].T
        return np.broadcast_to(entries, (B, *entries.shape)), None, np.linalg.pinv(entries) @ by_x
    if linear:
        return by_x, None, np.broadcast_to(np.eye(s.k), (B, s.k, s.k))
    J, k = len(a), s.k
    bends = np.empty((B, J, k, k))
    for j in range(J):
        unit = np.zeros((J, B))
        unit[j] = 1.0
        bends[:, j] = np.moveaxis(s.curvature(x, unit), -1, 0)
    F = s.factor(x)
    D = np.moveaxis(linalg.matmul(F, linalg.transpose(F)), -1, 0)
    at = np.empty((s.q, s.q), int)
    at[a, b] = at[b, a] = np.arange(J)
    first, second = np.zeros((B, k, k)), np.zeros((B, k, k, k))
    if isinstance(s, Written):
        own = slice(s.n_scales, k)
        _, slopes, curves = s.reported(x)
        first[:, own, own], second[:, own, own, own] = np.moveaxis(slopes, -1, 0), np.moveaxis(curves, -1, 0)
    for m, parameter in enumerate(s.natural):
        if parameter.kind == "real":
            continue
        i, j = parameter.i, parameter.j
        if parameter.kind == "loading":
            first[:, m, m] = 1.0
            continue
        if parameter.kind == "specific":  # as a variance
            first[:, m, m], second[:, m, m, m] = 2.0 * x[m], 2.0
            continue
        if parameter.kind == "sd":
            first[:, m], second[:, m] = by_x[:, at[i, i]], bends[:, at[i, i]]
            continue
        # D_ij / sqrt(D_ii D_jj): a product of powers of three entries.
        scale = np.sqrt(D[:, i, i] * D[:, j, j])[:, None]
        g, h = by_x[:, at[i, j]] / scale, bends[:, at[i, j]] / scale[..., None]
        rho = D[:, i, j][:, None] / scale
        parts = [(by_x[:, at[e, e]] / D[:, e, e, None], bends[:, at[e, e]] / D[:, e, e, None, None]) for e in (i, j)]
        log = 0.5 * sum(d for d, _ in parts)
        log2 = 0.5 * sum(d2 - d[:, :, None] * d[:, None] for d, d2 in parts)
        first[:, m] = g - rho * log
        mixed = g[:, :, None] * log[:, None]
        square = log[:, :, None] * log[:, None] - log2
        second[:, m] = h - mixed - mixed.swapaxes(1, 2) + rho[..., None] * square
    X = np.linalg.inv(first)  # derivatives of the coordinates by the parameters
    by_parameter = by_x @ X
    rest = bends - (by_parameter @ second.reshape(B, k, k * k)).reshape(B, J, k, k)
    return by_parameter, X.swapaxes(1, 2)[:, None] @ rest @ X[:, None], first
