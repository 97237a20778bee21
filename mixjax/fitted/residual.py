"""The record of a fit whose residuals have a dispersion formula or a correlation: the plain record of its transformed
rows, and beside it what the parameters of the residuals add."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from mixjax.checks import check_start
from mixjax.design import Design, Labels, refuse_trials
from mixjax.engine.equations import EffectRows, Equations
from mixjax.engine.residual import ResidualEngine
from mixjax.estimation.estimate import Estimates
from mixjax.estimation.residual import fit_residual, residual_engine, start_at, transformed_rows
from mixjax.fitted.further import CANNOT, FurtherFitted, variance_parameters_with
from mixjax.fitted.information import Information, information_at
from mixjax.fitted.names import names_of_residuals
from mixjax.fitted.parameters import VarianceParameters
from mixjax.fitted.record import Fitted
from mixjax.fitted.search_end import OptimizerInfo, warn_of_convergence
from mixjax.machine import silently
from mixjax.optimise.results import Result
from mixjax.products.rows import Rows, rows_of
from mixjax.products.sums import CrossProducts
from mixjax.simulation import simulate_responses, with_curves

# What fits with correlated residuals, and those without random terms, do not have besides.
CANNOT_CORRELATED = {
    "refits without units": "fit the table without the rows in question",
    "influence": "fit the table without the rows in question",
    "sensitivities": "fit the table without the rows in question",
    "leverages": "use residuals(scale='pearson') or residuals(scale='normalized')",
    "cluster-robust covariances": "use test(..., ddf='satterthwaite')",
    "regressions of single levels": "fit the levels by themselves",
}
CANNOT_WITHOUT_TERMS = {
    "influence": "fit the table without the rows in question",
    "cluster-robust covariances": "add a random term, or use statsmodels' gee",
    "regressions of single levels": "fit the levels by themselves",
    "shrinkage": "add a random term",
    "random effects to draw": "use mixjax.plots.residuals(fit), qq(fit) and scale_location(fit)",
}


class FixedEquations:
    """The equations of a model without random effects: ``X'X`` alone."""

    def __init__(self, stats: CrossProducts):
        self._inverse = np.linalg.inv(np.asarray(stats.XX))

    def variance(self, rows: EffectRows) -> np.ndarray:
        """``(m,)`` variance of ``x'beta_hat``, relative to sigma^2."""
        found: np.ndarray = np.einsum("mp,pq,mq->m", rows.X, self._inverse, rows.X)
        return found

    def covariances(self) -> list[np.ndarray]:
        """There are no random effects."""
        return []


@dataclass(frozen=True)
class ResidualFitted(FurtherFitted):
    """One fit whose residuals have parameters beside sigma.

    ``stats`` and ``rows`` are those of the rows scaled and whitened at the estimates, so that what takes the variance
    parameters as known is that of the plain record. ``design`` has the precisions of the rows at the estimates as its
    weights; ``kept`` and ``given`` are the design as it was.
    """

    # --- the data ---------------------------------------------------------------------------------------------------

    @cached_property
    def residual_engine(self) -> ResidualEngine:
        """The engine of these data, parameters of the residuals included."""
        return residual_engine(rows_of(self.given), self.reml)

    @property
    def phi(self) -> np.ndarray:
        """Coordinates of the residuals at the estimates."""
        return self.x[self.residual_engine.k :]

    @cached_property
    def design(self) -> Design:
        """The design with the precisions of the rows at the estimates as weights."""
        transform, given = self.residual_engine.transform, self.given
        sd = transform.deviations(self.phi) * np.exp(-transform.natural(self.phi).log_sigma)
        prior = 1.0 if given.weights is None else np.asarray(given.weights)
        return replace(given, weights=np.asarray(prior / sd**2))

    @cached_property
    def rows(self) -> Rows:
        return _rows_at(self.residual_engine, self.phi, self.design)

    @property
    def given_rows(self) -> Rows:
        return self.residual_engine.rows

    @property
    def given_stats(self) -> CrossProducts:
        return self.residual_engine.rows.stats

    @property
    def is_correlated(self) -> bool:
        """Residuals are correlated within groups."""
        return self.given.residual is not None

    # --- the fit as a whole -----------------------------------------------------------------------------------------

    @property
    def npar(self) -> int:
        """Fixed effects, covariance parameters, those of the residuals and sigma."""
        return super().npar + self.residual_engine.transform.k

    def check_can(self, what: str) -> None:
        lacking = CANNOT | (CANNOT_CORRELATED if self.is_correlated else {})
        if what in lacking:
            parts = [f"{name}={text!r}" for name, text in self.own_formulas.items()]
            # A dispersion of the intercept alone has no columns, and is sigma.
            own = f"with {' and '.join(parts)}" if parts else "with dispersion='~ 1' or without random effects"
            raise ValueError(f"a fit {own} has no {what}: {lacking[what]}")
        if not self.labels.terms and what in CANNOT_WITHOUT_TERMS:
            raise ValueError(f"a fit without random terms has no {what}: {CANNOT_WITHOUT_TERMS[what]}")

    @property
    def own_formulas(self) -> dict[str, str]:
        """What the model says of its residuals, by the name of the option."""
        found = {"dispersion": f"~ {self.labels.state.dispersion[0].effects}"} if self.labels.dispersion else {}
        return found | ({"residual": self.labels.residual} if self.labels.residual else {})

    # --- at the estimates -------------------------------------------------------------------------------------------

    @cached_property
    def information(self) -> Information:
        """Of the optimiser's coordinates, those of the residuals included, and the logarithm of sigma of a middling
        row."""
        engine = self.residual_engine
        df = np.float64(self.nobs - (engine.rows.Q.shape[1] if self.reml else 0))
        with silently():
            sigma = float(self.estimates.sigma) / np.exp(engine.transform.natural(self.phi).log_sigma)
            R_inv = np.asarray(engine.rows.X_basis.R_inv)
            return information_at(self.x, self.free, engine.slopes(self.x), df, sigma, R_inv)

    @property
    def log_sigma_variance(self) -> float:
        by_phi = self.residual_engine.transform.natural(self.phi).by_phi
        slopes = np.concatenate([np.zeros(self.residual_engine.k), by_phi, [1.0]])
        return float(slopes @ self.information.covariance @ slopes)

    @cached_property
    def variance_parameters(self) -> VarianceParameters:
        engine = self.residual_engine
        transform = engine.transform
        kinds = ["real"] * transform.d + ([] if transform.correlation is None else [transform.correlation.kind])
        natural, names = transform.natural(self.phi), names_of_residuals(self.labels)
        return variance_parameters_with(self, engine.layout.structures, engine.rows.Z_bases, natural, names, kinds)

    @cached_property
    def equations(self) -> Equations:
        if self.layout.terms:
            return super().equations
        return FixedEquations(self.stats)  # type: ignore[return-value]

    # --- residuals --------------------------------------------------------------------------------------------------

    def whitened(self, residuals: np.ndarray) -> np.ndarray:
        engine = self.residual_engine
        root = 1.0 if engine.rows.sqrt_w is None else engine.rows.sqrt_w
        shift = np.exp(engine.transform.natural(self.phi).log_sigma)
        own: np.ndarray = engine.transform.rows(self.phi, (root * residuals)[:, None])[:, 0] * shift
        return own / float(self.estimates.sigma)

    def residual_covariance(self, rows: np.ndarray) -> np.ndarray:
        sd = float(self.estimates.sigma) / np.sqrt(np.asarray(self.design.weights)[rows])
        correlation = self.residual_engine.transform.correlation
        if correlation is None:
            return np.diag(sd**2)
        own: np.ndarray = sd[:, None] * correlation.matrix(float(self._residual[-1]), rows) * sd
        return own

    @property
    def mean_residual_variance(self) -> float:
        ones = np.zeros((self.nobs, 0)) if self.given.dispersion is None else np.asarray(self.given.dispersion)
        return float(self.estimates.sigma) ** 2 * float(self.noise(None, ones, self.nobs).mean())

    def noise(self, weights: np.ndarray | None, dispersion: np.ndarray | None, m: int) -> np.ndarray:
        own = super().noise(weights, None, m)
        gamma = self._residual[: len(self.labels.dispersion)]
        return own if dispersion is None else own * np.exp(2.0 * dispersion @ gamma)

    @property
    def _residual(self) -> np.ndarray:
        return np.asarray(self.estimates.residual)

    # --- again ------------------------------------------------------------------------------------------------------

    def simulate(self, key: Any, n: int, first: int = 0, random: Literal["new", "fitted"] = "new") -> np.ndarray:
        est, correlation = self.estimates, self.residual_engine.transform.correlation

        def colour(draws: np.ndarray) -> np.ndarray:
            assert correlation is not None
            return correlation.colour(float(self._residual[-1]), np.ascontiguousarray(draws.T)).T

        b = est.b if random == "fitted" else None
        design, Sigma = (self.design, est.Sigma) if b else with_curves(self.design, self.labels, est.Sigma, est.b)
        return simulate_responses(
            design, est.beta, est.sigma, Sigma, key, n, first, random=random, b=b,
            colour=None if correlation is None else colour,
        )  # fmt: skip

    what = "a dispersion or a correlation of residuals"
    extra = "residual"

    def fit_of(self, rows: Rows, labels: Labels, reml: bool) -> Fitted:
        return fit_residual_rows(rows, labels, reml)

    def estimates_of(self, y: np.ndarray, reml: bool) -> Estimates:
        engine = self.residual_engine
        return fit_residual(ResidualEngine(engine.rows.with_response(y), engine.transform, reml), self.x).estimates


def _rows_at(engine: ResidualEngine, phi: np.ndarray, weighted: Design) -> Rows:
    """The rows transformed at ``phi``. Without a correlation these are weighted rows."""
    if engine.transform.correlation is None:
        return rows_of(replace(weighted, dispersion=None) if weighted.terms else weighted)
    moved = transformed_rows(engine, phi)
    rows = rows_of(moved if moved.terms else replace(moved, residual=weighted.residual))
    return replace(rows, beta0=rows.beta0 + engine.rows.beta0)


def fit_residual_rows(rows: Rows, labels: Labels, reml: bool, start: Any = None) -> ResidualFitted:
    """Fit a model whose residuals have parameters beside sigma, from rows in their bases.

    Args:
        start: ``(k,)`` theta, or None.

    Warns:
        ConvergenceWarning: says why and what to try.
    """
    refuse_trials(rows.design)
    engine = residual_engine(rows, reml)
    start = check_start(start)
    found = fit_residual(engine, None if start is None else start_at(engine, start))
    est = found.estimates
    result = Result(int(est.result))
    info = OptimizerInfo("trust-region Newton", int(est.iterations), float(est.grad_norm), result.message)
    if not np.isfinite(found.x).all() or not np.isfinite([*np.asarray(est.residual), est.sigma]).all():
        # Rows that cannot be transformed would be refused as if the table had missing values.
        raise ValueError(f"the fit of {labels.formula!r} has no estimates: {result.message}")
    if not est.converged:
        warn_of_convergence(labels.formula, info)
    # The record is made of what its own rows say, which are those of the estimates.
    record = ResidualFitted(labels, rows.stats, est, reml, info, rows.design, None, found.x, found.free)
    vars(record)["residual_engine"] = engine
    stats = record.rows.stats
    if record.is_correlated:
        stats = replace(stats, sum_log_weights=_log_weights(engine, record.phi))
    own = ResidualFitted(labels, stats, est, reml, info, rows.design, None, found.x, found.free)
    vars(own).update({name: vars(record)[name] for name in ("residual_engine", "design", "rows")})
    return own


def _log_weights(engine: ResidualEngine, phi: np.ndarray) -> float:
    transform = engine.transform
    own = 2.0 * transform.logdet(phi).value + 2.0 * len(engine.rows.Q) * transform.natural(phi).log_sigma
    return own + float(engine.rows.log_w.sum())
