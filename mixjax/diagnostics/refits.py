"""Estimates without each unit: every one refitted, or one Newton step from the fit of all rows."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mixjax import covariance as cov
from mixjax.diagnostics.deletion import batches
from mixjax.engine.engine import engine_of
from mixjax.estimation.choice import chosen_engine
from mixjax.estimation.estimate import Estimates
from mixjax.estimation.many import KEEP, estimate_many
from mixjax.estimation.steps import newton_steps
from mixjax.fitted.either import AnyFitted
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.fitted.record import Fitted
from mixjax.optimise.results import Result
from mixjax.products.rows import Rows
from mixjax.products.sums import CrossProducts

# Codes beside those of mixjax.Result.
RANK_DEFICIENT, NO_STEP, COMPUTED = "RANK_DEFICIENT", "NO_STEP", "COMPUTED"
SOLUTIONS = (COMPUTED, *(code.name for code in Result if code.is_solution))


class Without(NamedTuple):
    """Estimates without each of U units; NaN where there are none.

    Attributes:
        change: ``(U, p)`` fixed effects less those of all rows; covariance: ``(U, p, p)`` of the fixed effects. Both in
            the basis of X: that of raw columns, as calendar years, has lost digits that the measures need.
        sigma: ``(U,)``. theta: ``(U, k)``. Sigma: per term ``(U, q, q)``. psi: ``(U, s)`` parameters of a family, their
            logarithms; generalised models have these and no sigma (NaN).
        singular: ``(U,)`` some Sigma has less than full rank.
        result: ``(U,)`` names: of :class:`mixjax.Result`; ``COMPUTED`` where nothing was searched; ``RANK_DEFICIENT``
            where X lost rank; ``NO_STEP`` where the Hessian was not positive definite.
    """

    change: np.ndarray
    covariance: np.ndarray
    sigma: np.ndarray
    theta: np.ndarray
    Sigma: tuple[np.ndarray, ...]
    psi: np.ndarray
    singular: np.ndarray
    result: np.ndarray

    @property
    def found(self) -> np.ndarray:
        """``(U,)`` there are estimates."""
        return np.isin(self.result, SOLUTIONS)


def nowhere(fitted: AnyFitted, U: int) -> Without:
    """NaN for all units, as if each left X without full rank."""
    est, p = fitted.estimates, len(fitted.labels.fixed)
    n_psi = fitted.rows.n_psi if isinstance(fitted, GeneralizedFitted) else 0

    def nan(*shape: int) -> np.ndarray:
        return np.full(shape, np.nan)

    Sigma = tuple(nan(U, q, q) for q in fitted.layout.qs)
    result = np.full(U, RANK_DEFICIENT, dtype=object)
    return Without(
        nan(U, p), nan(U, p, p), nan(U), nan(U, len(est.theta)), Sigma, nan(U, n_psi), np.zeros(U, bool), result
    )


def refit_without(fitted: Fitted, rows: Rows, unit: np.ndarray, delta: np.ndarray) -> Without:
    """The fit's own criterion minimised anew without each unit, all of them as a batch.

    Args:
        unit: ``(n,)`` codes ``0 .. U - 1``. delta: ``(p,)`` coefficients of all rows in the basis of X.
    """
    out = nowhere(fitted, int(unit.max()) + 1)
    engine = chosen_engine(rows.stats, len(out.result))
    rows = rows if engine == "numpy" else rows.padded()
    # From moment estimates, as a fit of the other rows would start: as quick as from the theta of all rows, and where
    # there are several minima the choice among them does not depend on the rows that are left out. But fits of a large
    # crossed design take long.
    is_large = engine_of(rows.stats, fitted.reml).where is not None and not fitted.estimates.singular
    start = fitted.estimates.theta if is_large else None
    for deleted, stats in batches(rows, unit):
        est = estimate_many(stats.in_basis(), fitted.reml, start, keep=(*KEEP, "Sigma", "vcov"), engine=engine)
        _put(out, deleted, _to_basis_of(rows, est, stats), delta, _names_of(est.result))
    return out


def step_without(fitted: Fitted, rows: Rows, unit: np.ndarray, delta: np.ndarray) -> Without:
    """One Newton step of every criterion without a unit, from the estimates of all rows.

    The step is taken in the optimiser's coordinates, with the exact gradient and Hessian of the criterion without the
    unit, and among the coordinates that are free at the fit: a variance of zero stays zero. It is no longer than half
    the length of the coordinates, the optimiser's own first region. What follows from theta, as beta, sigma and their
    covariance, is exact at the end of the step. Arguments as in :func:`refit_without`.
    """
    out = nowhere(fitted, int(unit.max()) + 1)
    engine = chosen_engine(rows.stats, len(out.result))
    rows = rows if engine == "numpy" else rows.padded()
    for deleted, stats in batches(rows, unit):
        est, sound = newton_steps(stats.in_basis(), fitted.estimates.theta, fitted.reml, engine)
        result = np.where(sound, COMPUTED, NO_STEP).astype(object)
        _put(out, deleted, _to_basis_of(rows, est, stats), delta, result)
    return out


def _names_of(codes: np.ndarray) -> np.ndarray:
    return np.array([Result(code).name for code in codes], dtype=object)


def _to_basis_of(rows: Rows, est: Estimates, stats: CrossProducts) -> Estimates:
    """Fixed effects and their covariance in the basis of all rows, where products have one of their own."""
    all_rows = rows.stats
    if (stats.X_basis.R_inv == all_rows.X_basis.R_inv).all():
        return est
    G = all_rows.X_basis.R @ stats.X_basis.R_inv
    shift = (stats.beta0 - all_rows.beta0) @ all_rows.X_basis.R.T
    return est._replace(beta=(G @ est.beta[:, :, None])[:, :, 0] + shift, vcov=G @ est.vcov @ np.swapaxes(G, 1, 2))


def _put(out: Without, units: np.ndarray, est: Estimates, delta: np.ndarray, result: np.ndarray) -> None:
    """Write the estimates of some units, where there are any, into those of all."""
    found = np.isin(result, SOLUTIONS)
    at = units[found]
    out.change[at], out.covariance[at] = est.beta[found] - delta, est.vcov[found]
    for name in ("sigma", "theta", "singular"):
        getattr(out, name)[at] = getattr(est, name)[found]
    for whole, part in zip(out.Sigma, est.Sigma, strict=True):
        whole[at] = part[found]
    out.result[units] = result


def entry_names(fitted: AnyFitted, names: list[str], diagonal: str, below: str) -> tuple[list[str], np.ndarray]:
    """Names of the entries of all terms' lower triangles, column by column, such as ``var_Days|Subject`` and
    ``cov_Days.Intercept|Subject``; and which of them a structure does not hold at zero.

    Args:
        names: of the terms. diagonal, below: what the names begin with.
    """
    entries, varies = [], []
    for group, term, structure in zip(names, fitted.labels.terms, fitted.layout.structures, strict=True):
        for row, column in zip(*cov.triangle(structure.q), strict=True):
            own = row == column
            pair = term.effects[row] if own else f"{term.effects[row]}.{term.effects[column]}"
            entries.append(f"{diagonal if own else below}_{pair}|{group}")
            varies.append(own or structure.correlated)
    return entries, np.array(varies)
