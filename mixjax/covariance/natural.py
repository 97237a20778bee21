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
    _, first, second = natural_derivatives(s, x)
    assert second is not None
    J, k = len(a), s.k
    X = np.linalg.inv(first)  # derivatives of the coordinates by the parameters
    by_parameter = by_x @ X
    bends = _bends(s, x)
    rest = bends - (by_parameter @ second.reshape(B, k, k * k)).reshape(B, J, k, k)
    return by_parameter, X.swapaxes(1, 2)[:, None] @ rest @ X[:, None], first


def natural_derivatives(
    s: Structure, x: np.ndarray, order: int = 2
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """The natural parameters ``(B, k)``, standard deviations as variances, with first and second derivatives by the
    coordinates ``(B, k, k)``, ``(B, k, k, k)``; of order 1 without the second ones.

    Args:
        x: ``(k, B)`` coordinates.
    """
    a, b = np.array(pairs_of(s.q)).T
    B, k = x.shape[1], s.k
    by_x = np.moveaxis(s.jacobian(x), -1, 0)
    bends = _bends(s, x) if order > 1 else None
    F = s.factor(x)
    D = np.moveaxis(linalg.matmul(F, linalg.transpose(F)), -1, 0)
    at = np.empty((s.q, s.q), int)
    at[a, b] = at[b, a] = np.arange(len(a))
    values, first, second = np.zeros((B, k)), np.zeros((B, k, k)), np.zeros((B, k, k, k))
    if isinstance(s, Written):
        own = slice(s.n_scales, k)
        reported, slopes, curves = s.reported(x)
        values[:, own] = reported.T
        first[:, own, own], second[:, own, own, own] = np.moveaxis(slopes, -1, 0), np.moveaxis(curves, -1, 0)
    for m, parameter in enumerate(s.natural):
        if parameter.kind == "real":
            continue
        i, j = parameter.i, parameter.j
        if parameter.kind == "loading":
            values[:, m], first[:, m, m] = x[m], 1.0
            continue
        if parameter.kind == "specific":  # as a variance
            values[:, m], first[:, m, m], second[:, m, m, m] = x[m] ** 2, 2.0 * x[m], 2.0
            continue
        if parameter.kind == "sd":
            values[:, m], first[:, m] = D[:, i, i], by_x[:, at[i, i]]
            if bends is not None:
                second[:, m] = bends[:, at[i, i]]
            continue
        # D_ij / sqrt(D_ii D_jj): a product of powers of three entries.
        scale = np.sqrt(D[:, i, i] * D[:, j, j])[:, None]
        g = by_x[:, at[i, j]] / scale
        rho = D[:, i, j][:, None] / scale
        each = [by_x[:, at[e, e]] / D[:, e, e, None] for e in (i, j)]
        log = 0.5 * sum(each)
        values[:, m], first[:, m] = rho[:, 0], g - rho * log
        if bends is not None:
            h = bends[:, at[i, j]] / scale[..., None]
            bent = [bends[:, at[e, e]] / D[:, e, e, None, None] for e in (i, j)]
            log2 = 0.5 * sum(d2 - d[:, :, None] * d[:, None] for d, d2 in zip(each, bent, strict=True))
            mixed = g[:, :, None] * log[:, None]
            square = log[:, :, None] * log[:, None] - log2
            second[:, m] = h - mixed - mixed.swapaxes(1, 2) + rho[..., None] * square
    return values, first, second if order > 1 else None


def _bends(s: Structure, x: np.ndarray) -> np.ndarray:
    """Second derivatives of the entries of D by the coordinates, ``(B, J, k, k)``."""
    J, B = s.q * (s.q + 1) // 2, x.shape[1]
    # All entries at once, each a lane of its own.
    unit = np.repeat(np.eye(J), B, axis=1)
    bends: np.ndarray = s.curvature(np.tile(x, J), unit).reshape(s.k, s.k, J, B).transpose(3, 2, 0, 1)
    return bends
