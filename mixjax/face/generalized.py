"""``glmm()``: formula, table and family in, fit out. A thin face over the rooms below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from mixjax.checks import DataError, check_start
from mixjax.design import Design, Labels
from mixjax.estimation.glmm import GLMMEstimates
from mixjax.estimation.glmm_one import check_likelihood
from mixjax.estimation.laplace_check import LaplaceCheck
from mixjax.face.generalized_diagnostics import GeneralizedDiagnosing
from mixjax.face.generalized_inference import GeneralizedInferring
from mixjax.face.generalized_predictions import GeneralizedPredicting
from mixjax.face.generalized_summary import (
    GeneralizedSummary,
    GeneralizedVarCorr,
    dispersion,
    generalized_glance,
    generalized_summary,
    generalized_tidy,
    own_coefficients,
)
from mixjax.families import Family, family_of, zero_inflated
from mixjax.fitted.batch import with_fixed
from mixjax.fitted.generalized import GeneralizedFitted, fit_family_rows
from mixjax.fitted.names import modes_by_group, term_names, values_of_fit
from mixjax.fitted.search_end import OptimizerInfo
from mixjax.formula.build import build
from mixjax.formula.checks import check_identifiable as refuse_unidentified
from mixjax.formula.chunks import is_stream
from mixjax.formula.context import caller_context
from mixjax.formula.own_formulas import refuse_without_parameter
from mixjax.formula.parse import check_text
from mixjax.products.family_rows import rows_in


def glmm(
    formula: str,
    data: Any,
    family: Any,
    link: str | None = None,
    size: Any = None,
    weights: Any = None,
    offset: Any = None,
    subset: Any = None,
    contrasts: Mapping[str, str] | None = None,
    start: Any = None,
    curvature: str = "observed",
    nagq: int = 1,
    reml: bool = False,
    check_identifiable: bool = True,
    trusted: bool | None = None,
    ziformula: str | None = None,
    dispformula: str | None = None,
) -> GLMMFit:
    """Fit a generalised linear mixed model by maximum likelihood, as ``lme4::glmer`` does. Always in float64.

    The likelihood is Laplace's approximation, over fixed effects, covariances and parameters of the family together;
    all constants are kept.

    Args:
        formula: as of :func:`mixjax.lmm`. A binomial response is 0 and 1, truth values, or two levels, of which the
            second is success; counts or proportions with ``size``; or ``cbind(successes, failures)``.
        data: pandas, polars or pyarrow table, or a dict of arrays.
        family: name, ``"binomial"``, ``"poisson"``, ``"nbinom"``, ``"gamma"``, ``"inverse_gaussian"``, ``"beta"``, also
            as other programs spell it; or what :mod:`mixjax.families` makes, one of your own included.
        link: name, None for the family's own or default.
        size: column name or ``(n,)``, numbers of trials of a binomial response.
        weights: column name or ``(n,)``: they multiply the log density of a row, as if there were so many of it. As in
            R, of a binomial response in one column without ``size`` the numbers of trials.
        offset: column name or ``(n,)``, a known part of the linear predictor.
        subset: rows to use: booleans, or an expression such as ``"Days > 1"``.
        contrasts: column -> ``"sum"``, ``"helmert"``, ...; treatment contrasts otherwise.
        start: theta to start from, Cholesky factors of absolute covariances.
        curvature: of rows in the approximation's determinant: ``"observed"``, as glmmTMB, or ``"expected"``, as lme4;
            they are the same for canonical links.
        nagq: nodes of adaptive Gauss-Hermite quadrature for each random effect of a level, of models with one grouping
            factor and up to three effects; 1 is Laplace's approximation. See :meth:`GLMMFit.laplace_check`.
            0, as in lme4: fixed effects minimise the penalised deviance together with the random effects, and only
            covariances and parameters of the family the criterion; standard errors of the fixed effects take the others
            as known. Laplace's approximation costs about the same here and is nearer to maximum likelihood.
        reml: by the restricted likelihood, as glmmTMB's ``REML = TRUE``: Laplace's approximation of the integral over
            the random and the fixed effects, of these with a flat prior; variances of few levels are less biased.
        check_identifiable: refuse random effects that the data cannot tell.
        trusted: False where the formula comes from a stranger; see :func:`mixjax.build_design`.
        ziformula: ``"~ x"``, as in glmmTMB: the logit of the probability that a count is 0 for certain, whatever the
            rest of the model says. Of families ``"poisson"``, ``"nbinom"``, and ``"binomial"`` with several trials.
            ``"~ 1"`` is one probability for all rows, None for none. See :attr:`GLMMFit.zi`.
        dispformula: ``"~ x"``: the logarithm of the family's parameter (size of nbinom, dispersion of gamma and inverse
            Gaussian, precision of beta, sigma of gaussian) depends on columns. See :attr:`GLMMFit.disp`.

    Returns:
        GLMMFit.

    Raises:
        FormulaError, DataError: both ValueErrors, naming the culprit. ValueError: options that are none.

    Warns:
        DataWarning: rows or columns were left out, or are hardly what was meant. ConvergenceWarning: the fit did not
        converge, with the columns that the fixed effects separate.

    Example:
        >>> import mixjax as mj
        >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
        >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
        >>> fit.fixef.round(3).to_dict()
        {'Intercept': -3.195, 'Days': 0.585}
    """
    own = family_of(family, link)
    if own.plain is not own and ziformula is None:
        ziformula = "~ 1"
    inflated, own = own, own.plain
    formulas = {"dispformula": dispformula, "ziformula": ziformula}
    refuse_without_parameter(formulas, own)
    if ziformula is not None:
        inflated = zero_inflated(own)
    check_likelihood(curvature, nagq, reml)
    theta = check_start(start)
    check_text(formula)
    if is_stream(data):
        raise DataError(
            "a generalised linear mixed model needs its rows again and again, and data in chunks are read once: pass a "
            "whole table"
        )
    given = {option: text for option, text in formulas.items() if text is not None}
    built = build(formula, data, weights, offset, subset, contrasts, caller_context(), trusted, own, size, given)
    if check_identifiable:
        refuse_unidentified(*built, own)
    if len(built.design.psi_columns) > own.n_psi:
        own = inflated
        own.check(built.design.y, built.design.size, built.labels.response)
    rows = rows_in(built.design, own, built.design.y, built.basis)
    return GLMMFit(fit_family_rows(rows, built.design, built.labels, theta, curvature, nagq, reml))


class GLMMFit(GeneralizedInferring, GeneralizedPredicting, GeneralizedDiagnosing):
    """A fitted generalised linear mixed model. Attributes and methods read a frozen record; nothing here changes it.

    Everything about random effects is on the scale of the linear predictor and absolute, ``theta`` too: no residual
    standard deviation multiplies it. Names are those of :class:`mixjax.LMMFit` where the meaning is the same, except
    that standard errors take account of the covariances being estimated.
    """

    def __init__(self, fitted: GeneralizedFitted):
        self._fitted = fitted

    # --- the record ---------------------------------------------------------------------------------------------------

    @property
    def record(self) -> GeneralizedFitted:  # type: ignore[override]
        """The frozen record of the fit."""
        return self._fitted

    @property
    def design(self) -> Design:
        """Arrays of the model; of a binomial response ``y`` are counts of successes."""
        return self._fitted.design

    @property
    def labels(self) -> Labels:
        """Names of columns, effects and levels, and what counts as success."""
        return self._fitted.labels

    @property
    def estimates(self) -> GLMMEstimates:
        """Estimates as plain arrays."""
        return self._fitted.estimates

    @property
    def family(self) -> Family:
        """Distribution of the response given its linear predictor."""
        return self._fitted.family

    @property
    def link(self) -> str:
        """How the mean depends on the linear predictor."""
        return self._fitted.family.link

    @property
    def nagq(self) -> int:
        """Quadrature nodes an effect: 1 is Laplace's approximation, 0 that with fixed effects found with the random
        ones."""
        return self._fitted.nagq

    @property
    def reml(self) -> bool:
        """By the restricted likelihood."""
        return self._fitted.reml

    @property
    def curvature(self) -> str:
        """``"observed"`` or ``"expected"``, of rows in the approximation's determinant."""
        return self._fitted.curvature

    @property
    def optimizer(self) -> OptimizerInfo:
        """Name, iterations, gradient norm and message of the search."""
        return self._fitted.optimizer

    @property
    def converged(self) -> bool:
        """Gradient vanished, Hessian positive semidefinite, and no estimate runs to infinity."""
        return bool(self.estimates.converged)

    @property
    def is_singular(self) -> bool:
        """Some covariance of random effects has less than full rank."""
        return bool(self.estimates.singular)

    # --- fixed effects ------------------------------------------------------------------------------------------------

    @property
    def fixef(self) -> pd.Series:
        """Fixed effects beta (p,)."""
        return self._fixed_series(self.estimates.beta, "fixef")

    params = fixef

    @property
    def se(self) -> pd.Series:
        """Standard errors of the fixed effects (p,), from the Hessian of all parameters; NaN where that is not positive
        definite, as where a response is separated."""
        with np.errstate(invalid="ignore"):
            return self._fixed_series(np.sqrt(np.diag(self.estimates.vcov)), "se")

    bse = se

    @property
    def vcov(self) -> pd.DataFrame:
        """Covariance of the fixed effects (p, p), the other parameters estimated: part of the inverse of the exact
        Hessian of all of them. (That of :class:`mixjax.LMMFit` takes theta as known.) After ``nagq=0`` that given the
        others, as in lme4; after ``reml=True`` as glmmTMB's: that given the others, and what theirs adds."""
        names = list(self.labels.fixed)
        return pd.DataFrame(self.estimates.vcov, index=names, columns=names)

    @property
    def vcov_all(self) -> pd.DataFrame:
        """Covariance of all estimates: standard deviations and correlations of random effects (``sd_Days|Subject``),
        parameters of the family, fixed effects; by the delta method. NaN where one is on its boundary."""
        found = self._fitted.parameters
        return pd.DataFrame(found.covariance, index=list(found.names), columns=list(found.names))

    def _fixed_series(self, values: np.ndarray, name: str) -> pd.Series:
        return pd.Series(values, index=list(self.labels.fixed), name=name)

    # --- variance parameters ------------------------------------------------------------------------------------------

    @property
    def theta(self) -> np.ndarray:
        """Cholesky factors of the absolute covariances (k,): lower triangle column by column, term by term, diagonal >=
        0."""
        theta: np.ndarray = self.estimates.theta
        return theta

    @property
    def Sigma(self) -> dict[str, np.ndarray]:
        """Dict group -> covariance (q, q) of a term's random effects. A second term on the same group is called
        ``Subject.1``, as in lme4."""
        return dict(zip(term_names(self.labels), self.estimates.Sigma, strict=True))

    @property
    def varcorr(self) -> GeneralizedVarCorr:
        """Standard deviations and correlations: ``str()`` for lme4's table, ``.to_frame()`` for data."""
        return GeneralizedVarCorr(self._fitted)

    @property
    def dispersion(self) -> pd.Series:
        """The family's own parameters, such as the ``size`` of a negative binomial one; empty where it has none, or
        where they depend on columns: see :attr:`disp` and :attr:`zi`."""
        return pd.Series(dispersion(self._fitted), dtype=np.float64, name="dispersion")

    @property
    def zi(self) -> pd.Series:
        """Coefficients of ``ziformula``, of the logit of the probability of an extra zero; empty without one.

        Example:
            >>> import mixjax as mj
            >>> ticks = mj.datasets.load("grouseticks")
            >>> fit = mj.glmm("TICKS ~ YEAR + (1 | LOCATION)", ticks, family="poisson", ziformula="~ YEAR")
            >>> fit.zi.round(2).to_dict()
            {'Intercept': -1.42, 'YEAR[T.96]': -2.23, 'YEAR[T.97]': -2.73}
        """
        return self._of_component("zi")

    @property
    def disp(self) -> pd.Series:
        """Coefficients of ``dispformula``, of the logarithm of the family's parameter that :attr:`dispersion` has in a
        model without; empty where it is one number."""
        return self._of_component("disp")

    def _of_component(self, name: str) -> pd.Series:
        found = own_coefficients(self._fitted).get(name)
        return pd.Series(dtype=np.float64, name=name) if found is None else found["estimate"].rename(name)

    # --- random effects -----------------------------------------------------------------------------------------------

    def ranef(self, *, condvar: bool = False) -> Any:
        """Conditional modes of the random effects.

        Args:
            condvar: also their conditional covariances, given all parameters: the inverse of the observed curvature at
                the modes.

        Returns:
            dict group -> DataFrame (levels x effects); with ``condvar=True`` a pair of that and dict group ->
            ``(levels, q, q)``. Terms on one group stand side by side.
        """
        frames = modes_by_group(self.labels, self.estimates.b)
        if not condvar:
            return frames
        return frames, self._fitted.conditional_covariances()

    def coef(self) -> dict[str, pd.DataFrame]:
        """Coefficients per level: fixed effects plus the random effects of the same name."""
        return {group: with_fixed(frame, self.fixef.to_dict()) for group, frame in self.ranef().items()}

    # --- the fit as a whole -------------------------------------------------------------------------------------------

    @property
    def criterion(self) -> float:
        """-2 log-likelihood, by Laplace's approximation or quadrature, restricted after ``reml=True``, which the fit
        minimised; all constants kept."""
        return float(self.estimates.criterion)

    @property
    def loglik(self) -> float:
        """Log-likelihood by Laplace's approximation or quadrature, restricted after ``reml=True``: then of fits with
        other fixed effects not comparable."""
        return self._fitted.loglik

    @property
    def aic(self) -> float:
        """Akaike's criterion."""
        return self._fitted.aic

    @property
    def bic(self) -> float:
        """Schwarz's criterion, with log(nobs)."""
        return self._fitted.bic

    @property
    def deviance(self) -> float:
        """Sum of the squared deviance residuals, the random effects at their modes, as lme4's ``deviance()``; for
        -2 log-likelihood see :attr:`criterion`."""
        return float(self._fitted.unit_deviances.sum())

    @property
    def nobs(self) -> int:
        """Rows used; a row of many trials is one."""
        return self._fitted.nobs

    @property
    def npar(self) -> int:
        """Fixed effects, parameters of the family and of the covariances."""
        return self._fitted.npar

    def summary(self) -> GeneralizedSummary:
        """Tables to read, with z tests: ``print(fit.summary())``; HTML in notebooks."""
        return generalized_summary(self._fitted)

    def tidy(self, exponentiate: bool = False, conf_int: bool = False, level: float = 0.95) -> pd.DataFrame:
        """Estimates in rows, as broom.mixed's ``tidy()``: effect, group, term, estimate, std_error, statistic, df,
        p_value.

        Args:
            exponentiate: fixed effects as ratios, of odds (logit), of rates (log) or of hazards (cloglog), with
                delta-method standard errors; statistics and p values stay those of the coefficients.
            conf_int: also Wald intervals of the fixed effects, ``lower`` and ``upper``, exponentiated like these; of
                other rows see :meth:`confint`. level: their coverage.

        Example:
            >>> import mixjax as mj
            >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
            >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
            >>> fit.tidy(exponentiate=True, conf_int=True).loc[1, ["term", "estimate", "lower", "upper"]].tolist()[0]
            'Days'
        """
        return generalized_tidy(self._fitted, exponentiate, level if conf_int else None)

    def glance(self) -> pd.DataFrame:
        """One row: nobs, npar, family, link, loglik, aic, bic, criterion, deviance, ..."""
        return generalized_glance(self._fitted)

    def __repr__(self) -> str:
        notes = ["singular"] * self.is_singular + ["NOT CONVERGED"] * (not self.converged)
        kind = f"{self.family.name} ({self.link}), {'restricted ' * self.reml}-2 log-likelihood {self.criterion:.4f}"
        return f"<GLMMFit {self.labels.formula!r}: {kind}{''.join(', ' + n for n in notes)}>"

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    # --- rows ---------------------------------------------------------------------------------------------------------

    @property
    def fitted(self) -> pd.Series:
        """Means given the random effects (n,); of a binomial response proportions."""
        return self._row_series(self._fitted.mean, "fitted")

    @property
    def linear_predictor(self) -> pd.Series:
        """``eta = offset + X beta + Z b`` (n,)."""
        return self._row_series(self.estimates.eta, "linear_predictor")

    def residuals(self, kind: str = "deviance") -> pd.Series:
        """Residuals at the conditional means, of R's kinds.

        Args:
            kind: ``"response"``: observed less :attr:`fitted`, of a binomial response as proportions.
                ``"pearson"``: that by the root of R's variance function, the standard deviation of the row without the
                dispersion of a gamma family, or sigma, that all rows share.
                ``"deviance"``: signed roots of what the row adds to :attr:`deviance`.
                ``"working"``: the first by the slope of the mean, on the scale of the linear predictor.
                ``"quantile"``: where the response stands among 250 simulated ones, as standard normal quantiles: the
                only kind whose distribution is known, normal where the model is right, of counts and outcomes too.
                See :meth:`quantile_residuals` for the same as numbers between 0 and 1, with tests, another key, or the
                random effects as they are predicted.
        """
        if kind == "quantile":
            return self.quantile_residuals().normal.rename("residuals")
        return self._row_series(self._fitted.residuals(kind), "residuals")

    def _row_series(self, values: np.ndarray, name: str) -> pd.Series:
        return pd.Series(values, index=self.labels.frame.index, name=name)

    # --- the approximation --------------------------------------------------------------------------------------------

    def laplace_check(self, key: int = 0, nagq: int | None = None, n: int | None = None) -> LaplaceCheck:
        """How wrong Laplace's approximation is at this fit: by quadrature where there is one grouping factor with up to
        three effects, else by importance sampling (Skaug & Fournier 2006, Comput. Stat. Data Anal. 51, section 3).

        Args:
            key: of the draws. nagq: nodes of the quadrature, None for 25. n: draws, an even number; given, importance
                sampling is used in any case.

        Returns:
            :class:`~mixjax.estimation.laplace_check.LaplaceCheck`: the difference of log-likelihoods with its error,
            and by how many standard errors each estimate would move; ``str()`` says what to do.

        Raises:
            ValueError: the fit is by another likelihood than Laplace's approximation with the observed curvature; nagq
                or n are impossible.

        Example:
            >>> import mixjax as mj
            >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: 1.0 * (d["Reaction"] > 300))
            >>> check = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial").laplace_check()
            >>> check.method, round(check.difference, 3)
            ('quadrature', 0.171)
        """
        return self._fitted.laplace_check(key, nagq, n)

    # --- again --------------------------------------------------------------------------------------------------------

    def refit(self, y: Any = None, reml: bool | None = None) -> GLMMFit:
        """The same model fitted to another response, or by the other likelihood.

        Args:
            y: ``(nobs,)`` for the used rows, or as long as the table of the fit, of which the rows are taken that are
                in the fit. A Series is lined up by its index. Of a binomial response 0 and 1, or counts of successes;
                the numbers of trials stay. None for the same.
            reml: None for the same.

        Raises:
            DataError: y has another length, missing values in rows of the fit, labels that are not the fit's, or values
                that are none of the family's.

        Example:
            >>> import mixjax as mj
            >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: 1.0 * (d["Reaction"] > 300))
            >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
            >>> fit.refit(1 - data["slow"]).fixef.round(3).to_dict()
            {'Intercept': 3.195, 'Days': -0.585}
        """
        own = self.design.y if y is None else values_of_fit(self.labels, "y", y)
        return GLMMFit(self._fitted.refit(own, reml))

    def without(self, term: str) -> GLMMFit:
        """The same data fitted without a term, by the same likelihood.

        Args:
            term: as :meth:`ranova` and :meth:`drop1` name it: ``"Days in (Days | Subject)"``, ``"(1 | Subject)"``,
                ``"recipe"``; or a whole random term as the formula has it.

        Raises:
            ValueError: there is no such term, another contains it, or it is the only random one.

        Example:
            >>> import mixjax as mj
            >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
            >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
            >>> fit.without("Days").fixef.round(2).to_dict()
            {'Intercept': -0.34}
        """
        from mixjax.inference.random.ranova import without

        return GLMMFit(without(self._fitted, term))
