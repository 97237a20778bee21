"""Estimates of a linear mixed model without each unit, by the method that is asked for."""

from __future__ import annotations

from typing import Any

import numpy as np

from mixjax.diagnostics.fixed_theta import delete_at_theta, fixed_part
from mixjax.diagnostics.refits import COMPUTED, RANK_DEFICIENT, Without, refit_without, step_without
from mixjax.fitted.record import Fitted


def linear_without(fitted: Fitted, unit: np.ndarray, method: str, leverages: np.ndarray) -> tuple[Without, np.ndarray]:
    """Estimates without each unit, and ``(p, p)`` T with ``T'T = C^{-1}`` of all rows, in the basis of X."""
    rows, sigma = fitted.rows, float(fitted.estimates.sigma)
    fixed = fixed_part(fitted, rows)
    if method == "exact":
        without = refit_without(fitted, rows, unit, fixed.delta)
    elif method == "one-step":
        without = step_without(fitted, rows, unit, fixed.delta)
    else:
        change, covariance = delete_at_theta(rows, unit, fixed, leverages)
        without = _at_theta(fitted, change, sigma**2 * covariance)
    return without, np.linalg.cholesky(fixed.information).T / sigma


def _at_theta(fitted: Fitted, change: np.ndarray, covariance: np.ndarray) -> Without:
    """The variances of all rows for every unit without which there are fixed effects."""
    est, found = fitted.estimates, ~np.isnan(covariance).any(axis=(1, 2))

    def same(value: Any) -> np.ndarray:
        value = np.asarray(value)
        return np.where(found.reshape(-1, *[1] * value.ndim), value, np.nan)

    return Without(
        change,
        covariance,
        sigma=same(est.sigma),
        theta=same(est.theta),
        Sigma=tuple(map(same, est.Sigma)),
        psi=np.zeros((len(found), 0)),
        singular=found & bool(est.singular),
        result=np.where(found, COMPUTED, RANK_DEFICIENT).astype(object),
    )
