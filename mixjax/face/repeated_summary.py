"""A fit of repeated measures as tables."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from mixjax.face.summary import Summary, VarCorr, coefficient_table, likelihood_statistics, tidy_table, with_intervals
from mixjax.fitted.repeated import RepeatedFitted
from mixjax.tables import NotedTable


@dataclass(frozen=True, repr=False)
class VisitCovariances(VarCorr):
    """Standard deviations, variances and correlations of the visits. ``str()`` gives a table."""

    fitted: RepeatedFitted  # type: ignore[assignment]

    def _residual(self) -> list[float]:
        return []


@dataclass(frozen=True, repr=False)
class RepeatedSummary(Summary):
    """Everything one wants to read first about a fit.

    Example:
        >>> import mixjax as mj
        >>> fit = mj.mmrm("distance ~ Sex * age + homcs(age | Subject)", mj.datasets.load("Orthodont"))
        >>> print("\\n".join(str(fit.summary()).splitlines()[:4]))
        Mixed model for repeated measures fit by REML
        Formula: distance ~ Sex * age + homcs(age | Subject)
        Covariance: homcs, 2 parameters
        <BLANKLINE>
    """

    fitted: RepeatedFitted  # type: ignore[assignment]

    covariances = "Covariance of visits"

    def _varcorr(self) -> VarCorr:
        return VisitCovariances(self.fitted)

    def _head(self) -> list[str]:
        method = "REML" if self.fitted.reml else "maximum likelihood"
        written = self.fitted.labels.repetition.written
        k, arms = self.fitted.structures[0].k, len(self.fitted.structures)
        each = f" in each of {arms} arms" if arms > 1 else ""
        return [
            f"Mixed model for repeated measures fit by {method}",
            f"Formula: {self.fitted.labels.formula}",
            f"Covariance: {written.split('(')[0]}, {k} parameter{'s' * (k > 1)}{each}",
        ]

    def _fit_statistics(self) -> dict[str, str]:
        if self.fitted.reml:
            return {"REML criterion at convergence:": f"{float(self.fitted.estimates.criterion):.1f}"}
        return likelihood_statistics(self.fitted)

    def _scaled(self) -> np.ndarray:
        return self.fitted.residuals("normalized")

    def _counts(self) -> str:
        rows, repetition = self.fitted.rows, self.fitted.labels.repetition
        visits = f"{rows.n_visits} of {repetition.visit}"
        return f"Number of obs: {rows.n}, {repetition.subject.name}: {len(rows.order)}, visits: {visits}"


def repeated_tidy(fitted: RepeatedFitted, tests: pd.DataFrame, level: float | None = None) -> pd.DataFrame:
    """Estimates in rows, as broom's ``tidy()``: fixed effects, standard deviations and correlations of visits.
    ``level``: of intervals of the fixed effects, or None for none."""
    notes = tests.attrs.get("notes", ())
    table = tidy_table(coefficient_table(fitted, tests), VisitCovariances(fitted), notes)
    return table if level is None else with_intervals(table, level)


def repeated_glance(fitted: RepeatedFitted) -> pd.DataFrame:
    """One row that describes the fit as a whole."""
    row = {
        "nobs": fitted.nobs,
        "subjects": len(fitted.rows.order),
        "npar": fitted.npar,
        "loglik": fitted.loglik,
        "aic": fitted.aic,
        "bic": fitted.bic,
        "criterion": float(fitted.estimates.criterion),
        "reml": fitted.reml,
        "df_residual": fitted.nobs - fitted.npar,
        "converged": bool(fitted.estimates.converged),
    }
    return NotedTable(pd.DataFrame([row]), ())
