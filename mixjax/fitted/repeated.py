"""The frozen record of one fit of repeated measures without random effects, which answers for itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import scipy.linalg

from mixjax import linalg
from mixjax.bases import Basis
from mixjax.checks import DataError
from mixjax.covariance import Structure
from mixjax.design import RepeatedDesign
from mixjax.engine.visits import Visits
from mixjax.estimation.repeated import RepeatedEstimates, fit_repeated, fit_repeated_many, visits_of
from mixjax.fitted.information import Information
from mixjax.fitted.names import names_apart, names_of_variances
from mixjax.fitted.parameters import AllParameters, VarianceParameters, inside, is_covariance, natural_with_slopes
from mixjax.fitted.search_end import FitStatistics, OptimizerInfo, warn_of_convergence
from mixjax.formula.checks import check_noise, check_varies
from mixjax.formula.repeated import RepeatedLabels
from mixjax.machine import silently
from mixjax.optimise.results import Result
from mixjax.products.visits import VisitRows, visit_rows
from mixjax.simulation import simulate_visits

RESIDUALS = ("response", "pearson", "normalized")
MESSAGES = {
    Result.NOT_FINITE: (
        "the criterion has no finite minimum: a covariance runs to one without full rank, as of too few subjects for "
        "so many visits; take a structure with fewer parameters, such as ar1h, toeph or homcs"
    ),
    Result.STALLED: (
        "no step lowers the criterion although its gradient has not vanished: the data hardly tell the covariance; "
        "take a structure with fewer parameters, such as ar1h, toeph or homcs"
    ),
    Result.MAX_ITERATIONS: (
        "the iteration limit was reached before the gradient vanished: the data hardly tell the covariance; take a "
        "structure with fewer parameters, such as ar1h, toeph or homcs"
    ),
}


@dataclass(frozen=True)
class RepeatedFitted(FitStatistics):
    """One fitted model of repeated measures.

    Attributes:
        labels: names; ``terms`` has one for every arm, its effects the visits, its levels the subjects.
        rows: of the design, by subject and visit. estimates: NumPy's arrays.
        reml: by the restricted likelihood. optimizer: how the search ended.
    """

    labels: RepeatedLabels
    rows: VisitRows
    estimates: RepeatedEstimates
    reml: bool
    optimizer: OptimizerInfo

    has_df = True

    # --- the data ---------------------------------------------------------------------------------------------------

    @property
    def design(self) -> RepeatedDesign:
        """The arrays of the model."""
        return self.rows.design

    @property
    def kept(self) -> RepeatedDesign:
        """The design: its rows are always there."""
        return self.rows.design

    @property
    def structures(self) -> tuple[Structure, ...]:
        """The covariance structure of every arm."""
        return self.rows.structures

    @property
    def nobs(self) -> int:
        """Number of rows."""
        return self.rows.n

    @property
    def npar(self) -> int:
        """Fixed effects and covariance parameters."""
        return self.rows.p + sum(structure.k for structure in self.structures)

    # --- at the estimates -------------------------------------------------------------------------------------------

    @cached_property
    def visits(self) -> Visits:
        """The likelihood of the response, divided by its residual standard deviation."""
        return visits_of(self.rows, self.reml)

    @cached_property
    def information(self) -> Information:
        """Covariance of the variance parameters, and how that of beta moves with them; numpy arrays."""
        est, visits = self.estimates, self.visits
        x = est.x[:, None]
        with silently():
            at = visits.at(visits.covariances(x))
            _, H, jacobian = visits.by_coordinates(x, at)
            regular = is_covariance(H[..., 0])
            covariance = 2.0 * linalg.inverse_small(H[..., 0])
            R_inv = float(est.scale) * np.asarray(self.rows.X_basis.R_inv)
            slopes = R_inv @ visits.slopes_of_inverse(at, jacobian)[0] @ R_inv.T
        return Information(est.x, np.ones(len(est.x), bool), covariance, np.bool_(regular), est.vcov, slopes)

    @cached_property
    def variance_parameters(self) -> VarianceParameters:
        """Standard deviations and correlations of the visits by name, with their asymptotic covariance."""
        info, scale = self.information, float(self.estimates.scale)
        parameters = names_of_variances(self.labels, self.structures)
        kinds = tuple(parameter.kind for parameter in parameters)
        one = np.eye(self.rows.n_visits)
        unit = Basis(one, one, 0.0)
        with silently():
            values, slopes = natural_with_slopes(info.x, self.structures, (unit,) * len(self.structures))
            units = np.where([parameter.is_scaled for parameter in parameters], scale, 1.0)
            values, slopes = units * values, units[:, None] * slopes
            covariance = slopes @ info.covariance @ slopes.T
        free = inside(kinds, values, covariance)
        covariance = np.where(free & free[:, None] & info.regular, covariance, np.nan)
        return VarianceParameters(tuple(parameter.name for parameter in parameters), kinds, values, covariance, free)

    def covariance_of_all(self) -> AllParameters:
        """Variance parameters and fixed effects together; their estimates are asymptotically independent."""
        variance, est = self.variance_parameters, self.estimates
        return AllParameters(
            (*variance.names, *names_apart(self.labels.fixed, variance.names)),
            np.concatenate([variance.estimate, est.beta]),
            scipy.linalg.block_diag(variance.covariance, est.vcov),
            np.concatenate([variance.free, np.ones(len(est.beta), bool)]),
        )

    # --- rows -------------------------------------------------------------------------------------------------------

    @cached_property
    def mean(self) -> np.ndarray:
        """``(n,)`` X beta and the offset."""
        design = self.design
        mean: np.ndarray = np.asarray(design.X) @ self.estimates.beta
        return mean if design.offset is None else mean + np.asarray(design.offset)

    @cached_property
    def deviations(self) -> np.ndarray:
        """``(n,)`` standard deviations of the errors."""
        design = self.design
        arm = np.zeros(self.nobs, int) if design.arm is None else np.asarray(design.arm)[np.asarray(design.subject)]
        sd: np.ndarray = np.sqrt(np.stack([np.diagonal(S) for S in self.estimates.Sigma]))[arm, design.visit]
        return sd if self.rows.sqrt_w is None else sd / self.rows.sqrt_w

    def residuals(self, kind: str = "response") -> np.ndarray:
        """``(n,)``: ``"response"``; ``"pearson"``, divided by their standard deviations; ``"normalized"``, made
        independent within subjects too, visit after visit, by the inverse of the Cholesky factor of V."""
        if kind not in RESIDUALS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, RESIDUALS))}, got {kind!r}")
        raw: np.ndarray = np.asarray(self.design.y) - self.mean
        if kind == "response":
            return raw
        if kind == "pearson":
            scaled: np.ndarray = raw / self.deviations
            return scaled
        rows = self.rows
        e = rows.by_visit(raw if rows.sqrt_w is None else raw * rows.sqrt_w)  # (S, T)
        found = np.zeros_like(e)
        patterns = rows.patterns
        for first, count, seen, arm in zip(rows.starts, rows.count, patterns.seen, patterns.arm, strict=True):
            own = slice(first, first + count)
            L = np.linalg.cholesky(self.estimates.Sigma[arm][np.ix_(seen, seen)])
            found[own, seen] = scipy.linalg.solve_triangular(L, e[own][:, seen].T, lower=True).T
        normalized: np.ndarray = found[rows.place, np.asarray(self.design.visit)]
        return normalized

    # --- again ------------------------------------------------------------------------------------------------------

    def simulate(self, key: Any, n: int, first: int = 0) -> np.ndarray:
        """Responses ``(n, nobs)`` drawn from the fit; see :func:`~mixjax.simulation.simulate_visits`."""
        return simulate_visits(self.design, self.estimates.beta, self.estimates.Sigma, key, n, first)

    def refitted(self, reml: bool) -> RepeatedFitted:
        """The same data fitted by this criterion; itself where that is its own."""
        return self if reml == self.reml else fit_visit_rows(self.rows, self.labels, reml)

    def refit(self, y: np.ndarray, reml: bool | None = None) -> RepeatedFitted:
        """The same model fitted to another response ``(nobs,)``.

        Raises:
            DataError: the response does not vary, or the fixed effects reproduce it.
        """
        labels, design = self.labels, self.design
        y = np.asarray(y, np.float64)
        check_varies(y, labels.response)
        own = y if design.offset is None else y - np.asarray(design.offset)
        check_noise(own, np.asarray(design.X), self.rows.Q, design.weights, labels.response)
        if labels.response in labels.frame:
            labels = replace(labels, frame=labels.frame.assign(**{labels.response: y}))
        return fit_visit_rows(self.rows.with_response(y), labels, self.reml if reml is None else reml)

    def fit_many(self, Y: np.ndarray, reml: bool | None = None) -> RepeatedEstimates:
        """The same model fitted to many responses ``(B, nobs)``."""
        return fit_repeated_many(self.rows, Y, self.reml if reml is None else reml)

    def with_design(self, design: RepeatedDesign, labels: RepeatedLabels) -> RepeatedFitted:
        """Another model of the same response, fitted by the same criterion."""
        return fit_visit_rows(visit_rows(design), labels, self.reml)


def fit_visit_rows(rows: VisitRows, labels: RepeatedLabels, reml: bool) -> RepeatedFitted:
    """Estimates and names of one model.

    Raises:
        DataError: the residuals are zero.

    Warns:
        ConvergenceWarning: says why and what to try.
    """
    est = fit_repeated(rows, reml)
    if not est.scale > 0:
        raise DataError(f"the fixed effects reproduce '{labels.response}' exactly: no variance is left")
    result = Result(int(est.result))
    info = OptimizerInfo(
        "trust-region Newton", int(est.iterations), float(est.grad_norm), MESSAGES.get(result, result.message)
    )
    if not est.converged:
        warn_of_convergence(labels.formula, info)
    return RepeatedFitted(labels, rows, est, reml, info)
