"""Estimates of a generalised linear mixed model without each unit: every one refitted, or one Newton step."""

from __future__ import annotations

import numpy as np

from mixjax.diagnostics.deletion import dominant_in, is_of_full_rank
from mixjax.diagnostics.refits import COMPUTED, NO_STEP, Without, nowhere
from mixjax.estimation.glmm import GLMMEstimates
from mixjax.estimation.glmm_deletion import fits_without
from mixjax.estimation.glmm_one import fit_one
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.optimise.results import Result
from mixjax.products.family_rows import FamilyRows


def generalized_without(fitted: GeneralizedFitted, unit: np.ndarray, method: str) -> tuple[Without, np.ndarray]:
    """The fit's own criterion minimised anew without each unit, or one Newton step of it over all parameters at once
    from the estimates of all rows.

    Args:
        unit: ``(n,)`` codes ``0 .. U - 1``. method: ``"exact"`` or ``"one-step"``.

    Returns:
        The estimates; and ``(p, p)`` T with ``T'T`` the inverse of the covariance of all rows, in the basis of X.

    Raises:
        ValueError: another method; the fit of all rows has no estimates.
    """
    if method not in ("exact", "one-step"):
        raise ValueError(
            f"method={method!r} is a closed form of linear mixed models; of a generalised one method='one-step' is the "
            "quick way"
        )
    if method == "one-step" and (fitted.reml or fitted.nagq == 0):
        own = "reml=True" if fitted.reml else "nagq=0"
        raise ValueError(f"one step is of the likelihood of all parameters together, this fit has {own}: use 'exact'")
    R, vcov = fitted.rows.X_basis.R, fitted.estimates.vcov
    if not (fitted.estimates.converged and np.isfinite(vcov).all()):
        message = fitted.optimizer.message.rstrip(".")
        raise ValueError(f"the fit of all rows has no finite estimates that could change: {message}")
    root = np.linalg.inv(np.linalg.cholesky(R @ vcov @ R.T))
    return _without(fitted, unit, method == "exact"), root


def _columns(fitted: GeneralizedFitted) -> list[tuple[np.ndarray, np.ndarray]]:
    """Columns of the fixed effects, and of each of the family's parameters that has some: as they are, and an
    orthonormal basis of them."""
    rows, design = fitted.rows, fitted.design
    pairs = [(design.X, rows.Q), *zip(design.psi_columns, rows.psi_columns, strict=True)]
    return [
        (np.asarray(X), np.asarray(Q) / np.linalg.norm(Q, axis=0)) for X, Q in pairs if X is not None and Q is not None
    ]


def _without(fitted: GeneralizedFitted, unit: np.ndarray, exact: bool) -> Without:
    rows, est = fitted.rows, fitted.estimates
    nagq = 0 if fitted.reml else fitted.nagq
    U = int(unit.max()) + 1
    out = nowhere(fitted, U)
    lost = [u for X, Q in _columns(fitted) for u in dominant_in(Q, unit) if not is_of_full_rank(X[unit != u])]
    deleted = np.setdiff1d(np.arange(U), lost)

    def refit(weighted: FamilyRows) -> GLMMEstimates:
        return fit_one(weighted, est.theta, fitted.curvature, fitted.nagq, fitted.reml)

    if not len(deleted):
        return out
    found = fits_without(rows, est, unit, deleted, fitted.curvature, nagq, refit if exact else None)
    delta = rows.X_basis.R @ est.beta
    out.change[deleted], out.covariance[deleted] = found.fixed - delta, found.covariance
    for name in ("theta", "psi", "singular"):
        getattr(out, name)[deleted] = getattr(found, name)
    for whole, part in zip(out.Sigma, found.Sigma, strict=True):
        whole[deleted] = part
    names = [Result(code).name for code in found.result]
    if not exact:
        names = [COMPUTED if code == Result.CONVERGED else NO_STEP for code in found.result]
    out.result[deleted] = names
    return out
