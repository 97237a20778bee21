"""The frozen record of one fit of a generalised linear mixed model, which answers for itself."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np

from mixjax.covariance import lambdas_of_theta
from mixjax.design import Design, Labels
from mixjax.engine.equations import Equations, factors_in_bases
from mixjax.estimation.choice import EngineName
from mixjax.estimation.glmm import GLMMEstimates, conditional_covariances, mode_slopes
from mixjax.estimation.glmm_each import fit_each
from mixjax.estimation.glmm_many import glmm_estimate_many
from mixjax.estimation.glmm_one import fit_one
from mixjax.estimation.laplace_check import LaplaceCheck, laplace_check
from mixjax.families import Family
from mixjax.families.links import LINKS, mean_derivatives
from mixjax.fitted.names import terms_of_group
from mixjax.fitted.parameters import (
    AllParameters,
    VarianceParameters,
    coefficient_names,
    generalized_parameters,
    of_variances,
)
from mixjax.fitted.search_end import FitStatistics, OptimizerInfo, warn_of_convergence
from mixjax.fitted.working import working_products
from mixjax.formula.response import Response, check_values
from mixjax.formula.separation import separation_of
from mixjax.optimise.results import Result
from mixjax.products.family_rows import FamilyRows, rows_in
from mixjax.products.sums import CrossProducts, Layout
from mixjax.simulation import simulate_family, with_curves

# Parameters of families that multiply the variance of every row alike, which R's Pearson residuals leave out.
SCALES = ("dispersion", "sigma")
# The logarithm of a parameter, and the logit of extra zeros, beyond which they are on the way to infinity, and what to
# try then, of those with a formula.
ENDLESS = 12.0, 8.0
CURES = {
    "ziformula": "a probability of extra zeros runs to 0 or 1: there is no zero inflation beyond what the family has, "
    "at least in some level of a factor of ziformula=: take ziformula='~ 1', or leave it out",
    "dispformula": "the dispersion of some rows runs to its bound: look for levels of a factor of dispformula= whose "
    "rows vary no more than the family without it, or not at all",
}
# The same where any other search beside extra zeros fails.
BESIDE_ZEROS = (
    "with ziformula= a level of zeros alone is explained by its random effects or by extra zeros, and where the one "
    "explanation turns into the other Laplace's approximation breaks: try fewer random effects, ziformula='~ 1', or "
    "start= with small standard deviations"
)
POISSON = (
    "the size of the negative binomial family runs to infinity: the counts vary no more than Poisson ones do, so take "
    "family='poisson'"
)
RESIDUALS = ("response", "pearson", "deviance", "working")


@dataclass(frozen=True)
class GeneralizedFitted(FitStatistics):
    """One fitted generalised linear mixed model.

    Attributes:
        labels: names. rows: of the design, X and Z in their bases, with the family.
        estimates: NumPy's arrays.
        curvature: of the rows in the approximation's determinant, ``"observed"`` or ``"expected"``.
        optimizer: how the search ended.
        kept: the design.
        nagq: nodes an effect; 1 is Laplace's approximation, 0 the same with fixed effects found with the random ones.
        reml: by the restricted likelihood.
    """

    labels: Labels
    rows: FamilyRows
    estimates: GLMMEstimates
    curvature: str
    optimizer: OptimizerInfo
    kept: Design
    nagq: int = 1
    reml: bool = False

    # --- the data ---------------------------------------------------------------------------------------------------

    @property
    def design(self) -> Design:
        """The arrays of the model."""
        return self.kept

    @property
    def given(self) -> Design:
        """The same: what takes either kind of record asks for this."""
        return self.kept

    @property
    def family(self) -> Family:
        """The distribution of the response."""
        return self.rows.family

    @property
    def layout(self) -> Layout:
        """Structure of the random effects."""
        return self.rows.layout

    @property
    def nobs(self) -> int:
        """Number of rows, as in lme4 also of counts of trials."""
        return self.rows.n

    @property
    def npar(self) -> int:
        """Fixed effects, parameters of the family and of the covariances."""
        return self.rows.p + self.rows.n_psi + self.rows.layout.k

    # --- at the estimates -------------------------------------------------------------------------------------------

    @cached_property
    def parameters(self) -> AllParameters:
        """All parameters by name with the joint covariance of their estimates."""
        return generalized_parameters(self.labels, self.rows, self.estimates)

    @cached_property
    def variance_parameters(self) -> VarianceParameters:
        """Standard deviations and correlations by name, then parameters of the family."""
        return of_variances(self.parameters, self.labels, self.rows)

    def covariance_of_all(self) -> AllParameters:
        """Variance parameters, those of the family, and fixed effects together."""
        return self.parameters

    @cached_property
    def mean(self) -> np.ndarray:
        """``(n,)`` means given the random effects, of a binomial response of the proportion; extra zeros count."""
        return np.asarray(self.family.response_mean(self._mean_of_family, self.psi_by_row))

    @property
    def _mean_of_family(self) -> np.ndarray:
        return np.asarray(self.family.mean(self.estimates.eta))

    @property
    def own_formulas(self) -> dict[str, str]:
        """``"zi"``, ``"disp"`` -> the formula, of those that the fit has."""
        state = self.labels.state
        own = dict(state.parsed.own) if state is not None else {}
        options = {"zi": "ziformula", "disp": "dispformula"}
        return {name: f"~ {own[option].shown}" for name, option in options.items() if option in own}

    @cached_property
    def psi_by_row(self) -> list[Any]:
        """The family's parameters, each a number or ``(n,)``."""
        return self.rows.psi_by_row(self.estimates.psi)

    def refuse_extra_zeros(self, what: str, cure: str) -> None:
        """Raise ValueError where means of the response have extra zeros, which ``what`` does not know."""
        if self.family.plain is not self.family:
            raise ValueError(f"{what} is not there yet for a model with ziformula=: {cure}")

    @property
    def observed(self) -> np.ndarray:
        """``(n,)`` the response on the scale of :attr:`mean`."""
        y = np.asarray(self.rows.y)
        return y if self.rows.size is None else y / np.asarray(self.rows.size)

    @cached_property
    def unit_deviances(self) -> np.ndarray:
        """``(n,)`` R's unit deviances at the conditional means, times weights."""
        rows, est = self.rows, self.estimates
        own = np.asarray(self.family.deviance(est.eta, rows.y, rows.size, self.psi_by_row))
        weighted: np.ndarray = own if rows.weights is None else own * np.asarray(rows.weights)
        return weighted

    def residuals(self, kind: str) -> np.ndarray:
        """``(n,)`` of R's kinds at the conditional means; see :meth:`mixjax.GLMMFit.residuals`."""
        if kind not in RESIDUALS:
            raise ValueError(f"kind must be one of {', '.join(map(repr, RESIDUALS))} or 'quantile', got {kind!r}")
        raw: np.ndarray = self.observed - self.mean
        if kind == "response":
            return raw
        if kind == "deviance":
            roots: np.ndarray = np.sign(raw) * np.sqrt(np.maximum(self.unit_deviances, 0.0))
            return roots
        if kind == "working":
            if self.family.link not in LINKS:
                raise ValueError(f"link {self.family.link!r} has no known derivative, which working residuals need")
            if self.family.plain is not self.family:
                raise ValueError("working residuals are of means without extra zeros: ziformula= has none")
            working: np.ndarray = raw / np.asarray(mean_derivatives(self.family.link, self.estimates.eta)[0])
            return working
        pearson: np.ndarray = raw / self._deviations(of_family=False)
        return pearson

    @property
    def scaled_residuals(self) -> np.ndarray:
        """``(n,)`` response residuals by the standard deviation that the fit gives them, which lme4's summary shows."""
        scaled: np.ndarray = (self.observed - self.mean) / self._deviations(of_family=True)
        return scaled

    def _deviations(self, of_family: bool) -> np.ndarray:
        """``(n,)`` of :attr:`observed` given the random effects; without the family's scale R's variance function."""
        size, psi = self.rows.size, self.psi_by_row
        if not of_family:
            psi = [0.0 if name in SCALES else own for name, own in zip(self.family.psi_names, psi, strict=True)]
        variance = np.asarray(self.family.variance(self._mean_of_family, size, psi))
        if size is not None:
            variance = variance / np.asarray(size) ** 2  # of a proportion
        if self.rows.weights is not None:
            variance = variance / np.asarray(self.rows.weights)
        deviations: np.ndarray = np.sqrt(variance)
        return deviations

    @cached_property
    def working(self) -> CrossProducts:
        """Cross-products of the linear mixed model, sigma = 1, that this one is at its modes; see
        :func:`~mixjax.fitted.working.working_products`."""
        return working_products(self.design, self.rows, self.estimates)

    @cached_property
    def equations(self) -> Equations:
        """The mixed-model equations at the modes, absolute: conditional covariances of the random effects."""
        lambdas = lambdas_of_theta(np.asarray(self.estimates.theta), self.rows.layout.qs)
        return Equations(self.working, factors_in_bases(lambdas, self.working))

    @cached_property
    def mode_slopes(self) -> tuple[np.ndarray, ...]:
        """Per term ``(p + s + k, n_groups, q)``: how the modes move with the parameters of ``vcov_all``."""
        return mode_slopes(self.rows, self.estimates)

    def conditional_covariances(self) -> dict[str, np.ndarray]:
        """Grouping factor -> ``(levels, q, q)``, given all parameters, all terms of the factor side by side."""
        blocks = conditional_covariances(self.rows, self.estimates)
        result = {}
        for group, ts in terms_of_group(self.labels).items():
            places = [self.rows.layout.terms[t] for t in ts]
            own = np.concatenate([np.arange(place.start, place.start + place.q) for place in places])
            result[group] = blocks[places[0].factor][:, own[:, None], own]
        return result

    # --- the approximation ------------------------------------------------------------------------------------------

    def laplace_check(self, key: int, nagq: int | None, n: int | None) -> LaplaceCheck:
        """See :meth:`mixjax.GLMMFit.laplace_check`."""
        other = {
            "by the restricted likelihood: look at fit.refit(reml=False)": self.reml,
            "with nagq = 0: look at the fit with nagq=1": self.nagq == 0,
            f"by quadrature, nagq = {self.nagq}": self.nagq > 1,
            "by the expected curvature": self.curvature != "observed",
        }
        if any(other.values()):
            kind = next(kind for kind, own in other.items() if own)
            raise ValueError(f"what is checked is a fit by Laplace's approximation; this one is {kind}")
        found = laplace_check(self.rows, self.estimates, key, nagq, n)
        names = [*self.labels.fixed, *coefficient_names(self.labels, self.family)]
        for term, place in zip(self.labels.terms, self.rows.layout.terms, strict=True):
            natural = [parameter.name(term.effects, term.group) for parameter in place.structure.natural]
            several = [f"coordinate {j + 1} of the covariance|{term.group}" for j in range(place.structure.k)]
            names += natural if place.structure.k == 1 else several
        return found.named(names)

    # --- again ------------------------------------------------------------------------------------------------------

    def simulate(self, key: Any, n: int, first: int = 0, random: Literal["new", "fitted"] = "new") -> np.ndarray:
        """Responses ``(n, nobs)`` drawn from the fit, of a binomial family counts of successes; see
        :func:`~mixjax.simulation.simulate_family`."""
        est = self.estimates
        b = est.b if random == "fitted" else None
        design, Sigma = (self.design, est.Sigma) if b else with_curves(self.design, self.labels, est.Sigma, est.b)
        return simulate_family(design, self.family, est.beta, Sigma, self.psi_by_row, key, n, first, random=random, b=b)

    def fit_many(
        self, Y: np.ndarray, keep: tuple[str, ...], engine: EngineName = "auto", fits: int | None = None
    ) -> GLMMEstimates:
        """The same model fitted to many responses ``(B, nobs)``; see :func:`mixjax.glmm_estimate_many`. Fits by
        the restricted likelihood and with ``nagq=0`` are made one after another.

        Args:
            fits: how many there are in all, where these are some of them: one engine serves them all.
        """
        if self.reml or self.nagq == 0:
            return fit_each((self.rows.with_response(y) for y in Y), self.estimates_of, keep, self.estimates)
        return glmm_estimate_many(self.rows.with_response(Y), self.curvature, keep, engine, fits, self.nagq)

    def estimates_of(self, rows: FamilyRows) -> GLMMEstimates:
        """Of other rows by the same likelihood."""
        return fit_one(rows, None, self.curvature, self.nagq, self.reml)

    def refitted(self, reml: bool) -> GeneralizedFitted:
        """The same data fitted by the restricted likelihood or not; itself where that is its own."""
        if reml == self.reml:
            return self
        return fit_family_rows(self.rows, self.design, self.labels, None, self.curvature, self.nagq, reml)

    def with_design(self, design: Design, labels: Labels) -> GeneralizedFitted:
        """Another model of the same response, fitted by the same likelihood."""
        rows = rows_in(design, self.family, design.y)
        return fit_family_rows(rows, design, labels, None, self.curvature, self.nagq, self.reml)

    def refit(self, y: np.ndarray, reml: bool | None = None) -> GeneralizedFitted:
        """The same model fitted to another response ``(nobs,)``, counts of successes where it has trials; by the
        restricted likelihood or not, None for the same.

        Raises:
            DataError: the response is none of the family's, or leaves no finite estimate.
        """
        design, labels = self.kept, self.labels
        y = np.asarray(y, np.float64)
        check_values(Response(y, design.size, design.weights, labels.success, None), labels.response, design.offset,
                     self.family.plain, labels.frame.index)  # fmt: skip
        if self.family.plain is not self.family:
            self.family.check(y, design.size, labels.response)
        column = labels.frame.get(labels.response)
        if column is not None and column.dtype.kind in "iuf" and np.array_equal(column, design.y):
            labels = replace(labels, frame=labels.frame.assign(**{labels.response: y}))
        design = replace(design, y=y)
        reml = self.reml if reml is None else reml
        return fit_family_rows(self.rows.with_response(y), design, labels, None, self.curvature, self.nagq, reml)


def fit_family_rows(
    rows: FamilyRows,
    design: Design,
    labels: Labels,
    start: np.ndarray | None,
    curvature: str,
    nagq: int = 1,
    reml: bool = False,
) -> GeneralizedFitted:
    """Estimates and names of one model, in float64 whatever JAX's default is.

    Args:
        rows: of the design, in their bases. design, labels: the model.
        start: ``(k,)`` theta, or None. curvature, nagq, reml: which likelihood, as of :func:`mixjax.glmm`.

    Raises:
        ValueError: options that are none, or do not go together.

    Warns:
        ConvergenceWarning: says why and what to try.
    """
    est = fit_one(rows, start, curvature, nagq, reml)
    info = OptimizerInfo(
        "trust-region Newton", int(est.iterations), float(est.grad_norm),
        _message(est, rows, design, labels),
    )  # fmt: skip
    if not est.converged:
        warn_of_convergence(labels.formula, info)
    return GeneralizedFitted(labels, rows, est, curvature, info, design, nagq, reml)


def _message(est: GLMMEstimates, rows: FamilyRows, design: Design, labels: Labels) -> str:
    """How a search ended; after a failure with the columns that the fixed effects separate.

    Separation is looked for only then: a likelihood that is separated has no maximum, so a fit that converged has
    nothing to find, and an ordinary fit does not pay for the search.
    """
    result, family = Result(int(est.result)), rows.family
    if result.is_solution:
        return result.message
    if result == Result.UNBOUNDED:
        parts = zip(family.psi_names, labels.psi, rows.psi_by_row(est.psi), strict=False)
        options = dict.fromkeys(
            "ziformula" if name == "zero_inflation" else "dispformula"
            for name, own, values in parts
            if own and np.abs(values).max() > ENDLESS[name == "zero_inflation"]
        )
        if options:
            return "; and ".join(CURES[option] for option in options)
        if family.plain.name == "nbinom" and float(np.min(rows.psi_by_row(est.psi)[0])) > ENDLESS[0]:
            return POISSON
    if result != Result.UNBOUNDED and family.plain is not family:
        return f"{result.message}; {BESIDE_ZEROS}"
    found = separation_of(design, labels, family.name)
    if found is None:
        return result.message
    return found.sentence if result == Result.SEPARATED else f"{result.message}; {found.sentence}"
