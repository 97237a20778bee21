"""Scores of a generalised linear mixed model by cluster: what the rows of each add to the gradient of the
log-likelihood."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mixjax.engine.coordinates import coordinates_in
from mixjax.engine.quadrature import product_rule
from mixjax.estimation.glmm import GLMMEstimates, model_of
from mixjax.estimation.glmm_quadrature import joint_at, laplace_at
from mixjax.machine import silently
from mixjax.products.family_rows import FamilyRows


def cluster_scores(
    rows: FamilyRows, est: GLMMEstimates, codes: np.ndarray, curvature: str = "observed", nagq: int = 1
) -> np.ndarray:
    """``(m, p + s + k)`` derivatives of each cluster's log-likelihood at the estimates, by beta, psi and coordinates of
    the covariances, in the order of ``est.vcov_all``.

    Args:
        codes: ``(n,)`` the cluster ``0 .. m - 1`` of every row; no level of a factor has rows in two of them.
        curvature, nagq: of the likelihood.
    """
    found = []
    with silently():
        x, _ = coordinates_in(est.theta, rows.layout, [Z.R for Z in rows.Z_bases])
        fixed = rows.fixed_in_bases(est.beta, est.psi)[:, None]
        back, n = np.linalg.inv(rows.fixed_change).T, len(fixed)
        order = np.argsort(codes, kind="stable")
        for at in np.split(order, np.cumsum(np.bincount(codes))[:-1]):
            model = model_of(_some(rows, at), curvature)
            v = np.zeros((*model.effects.effect_shape, 1))
            if nagq == 1:
                gradient = laplace_at(model, fixed, x[:, None], v).gradient
            else:
                gradient = joint_at(model, product_rule(nagq, rows.Z[0].shape[1]), fixed, x[:, None], v).gradient
            found.append(-0.5 * np.concatenate([back @ gradient[:n], gradient[n:]]))
    return np.stack(found)


def _some(rows: FamilyRows, at: np.ndarray) -> FamilyRows:
    """Some rows, with their own levels, in the bases of all."""

    def take(values: np.ndarray | None) -> np.ndarray | None:
        return None if values is None else np.asarray(values)[at]

    levels = [np.unique(np.asarray(group)[at], return_inverse=True) for group in rows.groups]
    return replace(
        rows,
        y=take(rows.y),
        size=take(rows.size),
        weights=take(rows.weights),
        offset=take(rows.offset),
        Q=take(rows.Q),
        psi_columns=tuple(take(own) for own in rows.psi_columns),
        Z=tuple(take(Z) for Z in rows.Z),
        groups=tuple(group.reshape(-1) for _, group in levels),
        levels=tuple(len(own) for own, _ in levels),
    )
