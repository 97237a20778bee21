"""The frozen record of one fit, which answers for itself, and the chain of steps that makes one from a Design."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any, Literal

import jax
import numpy as np
import scipy.linalg

from mixjax.bases import in_span
from mixjax.checks import check_start
from mixjax.covariance import lambdas_of_theta
from mixjax.design import Design, Labels, refuse_kernels, refuse_trials
from mixjax.engine.engine import Engine, engine_of
from mixjax.engine.equations import Equations, factors_in_bases
from mixjax.estimation.choice import EngineName
from mixjax.estimation.estimate import Estimates, estimate_with, fit
from mixjax.estimation.many import estimate_many
from mixjax.fitted.information import Information, information
from mixjax.fitted.names import names_apart
from mixjax.fitted.parameters import AllParameters, VarianceParameters, variance_parameters
from mixjax.fitted.search_end import FitStatistics, OptimizerInfo, warn_of_convergence
from mixjax.formula.checks import check_noise, check_varies
from mixjax.machine import float64
from mixjax.optimise.results import Result
from mixjax.products.responses import Responses
from mixjax.products.rows import Rows, rows_of
from mixjax.products.sums import CrossProducts, Layout, pad
from mixjax.simulation import simulate_responses, with_curves


@dataclass(frozen=True)
class Fitted(FitStatistics):
    """One fitted mixed model. Inference and diagnostics are functions of it; what it can say of itself is kept.

    Attributes:
        labels: names. stats: cross-products of the design.
        estimates: numpy float64.
        reml: criterion is the REML criterion, not the ML deviance.
        optimizer: how the search ended.
        kept: the design, or None where rows came in chunks and were not kept; see :attr:`design`.
        search: the optax transformation that searched, or None for Newton; refits use it too.
    """

    labels: Labels
    stats: CrossProducts
    estimates: Estimates
    reml: bool
    optimizer: OptimizerInfo
    kept: Design | None = None
    search: Any = None

    def __getstate__(self) -> dict[str, Any]:
        # Optax transformations are closures and cannot be pickled; what can be computed again is not written.
        return {field.name: getattr(self, field.name) for field in fields(self)} | {"search": None}

    has_df = True

    # --- the data ---------------------------------------------------------------------------------------------------

    @property
    def design(self) -> Design:
        """The design, or an error that says why there is none."""
        if self.kept is None:
            raise ValueError(
                "this fit was made from chunks of rows, which were not kept: there are no residuals, fitted values or "
                "whatever else needs the rows; fit the whole table, or compute them chunk by chunk from fixef and "
                "ranef()"
            )
        return self.kept

    @property
    def given(self) -> Design:
        """The design as it was given, whose weights are the prior ones."""
        return self.design

    @cached_property
    def rows(self) -> Rows:
        """The design in its bases."""
        return rows_of(self.design)

    @property
    def given_rows(self) -> Rows:
        """The design as it was given, in its bases."""
        return self.rows

    @property
    def given_stats(self) -> CrossProducts:
        """Cross-products of the rows as they were given."""
        return self.stats

    @property
    def nobs(self) -> int:
        """Number of rows."""
        return int(self.stats.n)

    @property
    def layout(self) -> Layout:
        """Structure of the random effects."""
        return self.stats.layout

    # --- the fit as a whole -----------------------------------------------------------------------------------------

    @property
    def npar(self) -> int:
        """Fixed effects, covariance parameters and sigma."""
        return len(self.estimates.beta) + self.stats.layout.k + 1

    # --- at the estimates -------------------------------------------------------------------------------------------

    @cached_property
    def engine(self) -> Engine:
        """The engine of these data: likelihood, derivatives, equations."""
        return engine_of(self.stats, self.reml)

    @cached_property
    def information(self) -> Information:
        """Covariance of the variance parameters, and how that of beta moves with them; numpy arrays."""
        return self.engine.run(information, self.estimates.theta, self.estimates.sigma)

    @property
    def log_sigma_variance(self) -> float:
        """Asymptotic variance of the logarithm of sigma."""
        return float(self.information.covariance[-1, -1])

    @cached_property
    def variance_parameters(self) -> VarianceParameters:
        """Standard deviations, correlations and sigma by name, with their asymptotic covariance."""
        return variance_parameters(self.labels, self.stats, self.information, float(self.estimates.sigma))

    def covariance_of_all(self) -> AllParameters:
        """Variance parameters and fixed effects together; in a linear mixed model their estimates are asymptotically
        independent."""
        variance, est = self.variance_parameters, self.estimates
        return AllParameters(
            (*variance.names, *names_apart(self.labels.fixed, variance.names)),
            np.concatenate([variance.estimate, est.beta]),
            scipy.linalg.block_diag(variance.covariance, est.vcov),
            np.concatenate([variance.free, np.ones(len(est.beta), bool)]),
        )

    @cached_property
    def equations(self) -> Equations:
        """The mixed-model equations (Henderson's) at the estimates."""
        return Equations(self.stats, factors_in_bases(self.relative_factors, self.stats))

    @property
    def relative_factors(self) -> list[np.ndarray]:
        """Per term Lambda ``(q, q)``: ``Sigma = sigma^2 Lambda Lambda'``."""
        return lambdas_of_theta(np.asarray(self.estimates.theta), self.stats.layout.qs)

    # --- residuals --------------------------------------------------------------------------------------------------

    def whitened(self, residuals: np.ndarray) -> np.ndarray:
        """Residuals ``(n,)`` over their standard deviations, and made uncorrelated within their groups."""
        weights = self.design.weights
        own: np.ndarray = residuals if weights is None else residuals * np.sqrt(np.asarray(weights))
        return own / float(self.estimates.sigma)

    def residual_covariance(self, rows: np.ndarray) -> np.ndarray:
        """Covariance ``(r, r)`` of the residuals of some rows."""
        weights = np.ones(self.nobs) if self.design.weights is None else np.asarray(self.design.weights)
        return np.diag(float(self.estimates.sigma) ** 2 / weights[rows])

    @property
    def mean_residual_variance(self) -> float:
        """Variance of the residual of a row of unit weight, on average over the rows."""
        return float(self.estimates.sigma) ** 2

    def noise(self, weights: np.ndarray | None, dispersion: np.ndarray | None, m: int) -> np.ndarray:
        """``(m,)`` residual variances of new rows, relative to sigma^2, from weights and columns of the dispersion."""
        return np.ones(m) if weights is None else 1.0 / weights

    def in_parts(self, newdata: Any) -> list[Any] | None:
        """The rows of a new table in parts, where they are too many to be known at once; else None."""
        return None

    def knowing(self, newdata: Any) -> Fitted:
        """The same fit with levels of a new table that follow from where they are; itself where there are none."""
        return self

    # --- again ------------------------------------------------------------------------------------------------------

    def simulate(self, key: Any, n: int, first: int = 0, random: Literal["new", "fitted"] = "new") -> np.ndarray:
        """Responses ``(n, nobs)`` drawn from the fit; see :func:`~mixjax.simulation.simulate_responses`. Curves of
        smooths are part of the mean, and stay."""
        est = self.estimates
        if random == "fitted":
            return simulate_responses(
                self.design, est.beta, est.sigma, est.Sigma, key, n, first, random=random, b=est.b
            )
        design, Sigma = with_curves(self.design, self.labels, est.Sigma, est.b)
        return simulate_responses(design, est.beta, est.sigma, Sigma, key, n, first, random=random)

    def refitted(self, reml: bool) -> Fitted:
        """The same data fitted by this criterion; itself where that is its own."""
        if reml == self.reml:
            return self
        return fit_products(self.stats, self.labels, reml, None, self.search, self.kept)

    def refit(self, y: np.ndarray, reml: bool | None = None) -> Fitted:
        """The same model fitted to another response ``(nobs,)``.

        Raises:
            DataError: the response does not vary, or the fixed effects reproduce it.
        """
        design, labels = self.design, self.labels
        check_varies(y, labels.response)
        rows = self.rows.with_response(np.asarray(y, np.float64))
        own = y if design.offset is None else y - design.offset
        check_noise(own, np.asarray(design.X), rows.Q, design.weights, labels.response)
        if labels.response in labels.frame:
            labels = replace(labels, frame=labels.frame.assign(**{labels.response: y}))
        return fit_rows(rows, labels, self.reml if reml is None else reml, None, self.search, self.engine)

    def with_design(self, design: Design, labels: Labels) -> Fitted:
        """Another model of the same response, fitted by the same criterion."""
        return fit_rows(rows_of(design), labels, self.reml, None, self.search)

    def fit_many(
        self,
        Y: np.ndarray,
        keep: tuple[str, ...],
        reml: bool | None = None,
        engine: EngineName = "auto",
        chunk: int | None = None,
    ) -> Estimates:
        """The same model fitted to many responses ``(B, nobs)``; see :func:`mixjax.estimate_many`.

        A response that the fixed effects reproduce has the result ``NO_NOISE``.
        """
        design, rows = self.design, self.rows
        reml = self.reml if reml is None else reml
        est = estimate_many(Responses(rows).products(Y), reml, chunk=chunk, keep=keep, engine=engine)
        own = Y if design.offset is None else Y - design.offset
        exact = in_span(own, np.asarray(design.X), rows.Q, rows.sqrt_w)
        if exact.any():
            result = np.where(exact, Result.NO_NOISE, est.result)
            est = est._replace(result=result, converged=est.converged & ~exact)
        return est


def record_of(fit: Any) -> Fitted:
    """The record of a fit: of a Fitted itself, or of an object that carries one as ``record``, as LMMFit does."""
    record = getattr(fit, "record", fit)
    if hasattr(record, "family"):
        raise TypeError(
            f"this is for linear mixed models, as mixjax.lmm fits them; the fit is of a generalised one "
            f"({record.family.name})"
        )
    if not isinstance(record, Fitted) and hasattr(record, "visits"):
        raise TypeError(
            "this is for linear mixed models, as mixjax.lmm fits them; the fit is of repeated measures without random "
            "effects (mixjax.mmrm)"
        )
    if not isinstance(record, Fitted):
        raise TypeError(f"a fit is needed, as mixjax.lmm returns it; got {type(fit).__name__}")
    return record


def fit_design(design: Design, labels: Labels, reml: bool = True, start: Any = None, optimizer: Any = None) -> Fitted:
    """Cross-products, estimates and names of one design, in float64 whatever JAX's default is.

    Args:
        design, labels: the model.
        reml: restricted maximum likelihood.
        start: ``(k,)`` theta, or None.
        optimizer: None for trust-region Newton, or an optax GradientTransformation, which then searches over the
            log-Cholesky parameters.

    Warns:
        ConvergenceWarning: says why and what to try.
    """
    return fit_rows(rows_of(design), labels, reml, start, optimizer)


def fit_rows(
    rows: Rows, labels: Labels, reml: bool, start: Any, optimizer: Any, before: Engine | None = None
) -> Fitted:
    """As :func:`fit_design`, of rows in their bases. ``before``: the engine of another response of theirs."""
    refuse_trials(rows.design)
    refuse_kernels(rows.design, "mixjax.fit_design")
    return fit_products(rows.stats, labels, reml, start, optimizer, rows.design, before)


def fit_products(
    stats: CrossProducts,
    labels: Labels,
    reml: bool,
    start: Any,
    optimizer: Any,
    design: Design | None = None,
    before: Engine | None = None,
) -> Fitted:
    """As :func:`fit_design`, from the cross-products on. ``before``: as for :func:`fit_rows`."""
    start = check_start(start)
    if optimizer is None:
        engine = engine_of(stats, reml)
        if before is not None and "expected" in vars(before):
            vars(engine)["expected"] = before.expected
        est = engine.run(fit, start)
    else:
        with float64():
            est = jax.device_get(estimate_with(optimizer, pad(stats), reml, start))
    est = jax.tree.map(np.asarray, est)
    sizes = [stats.n_levels(place.factor) for place in stats.layout.terms]
    est = est._replace(b=tuple(b[:m] for b, m in zip(est.b, sizes, strict=True)))
    result = Result(int(est.result))
    info = OptimizerInfo(
        "trust-region Newton" if optimizer is None else "optax",
        int(est.iterations),
        float(est.grad_norm),
        result.message,
    )
    if not est.converged:
        warn_of_convergence(labels.formula, info)
    record = Fitted(labels, stats, est, reml, info, design, optimizer)
    if optimizer is None:
        vars(record)["engine"] = engine  # what was looked up of a large crossed design is not lost
    return record
