"""``mmrm()``: formula and table in, fit of repeated measures out. A thin face over the rooms below."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from mixjax.checks import check_level, check_options
from mixjax.design import RepeatedDesign
from mixjax.estimation.repeated import RepeatedEstimates
from mixjax.face.repeated_summary import RepeatedSummary, VisitCovariances, repeated_glance, repeated_tidy
from mixjax.fitted import parameters
from mixjax.fitted.names import responses_of_rows, values_of_fit
from mixjax.fitted.options import INTERVALS, ddf_of, option
from mixjax.fitted.repeated import RepeatedFitted, fit_visit_rows
from mixjax.fitted.search_end import OptimizerInfo
from mixjax.formula.context import caller_context
from mixjax.formula.repeated import RepeatedLabels, build_repeated
from mixjax.inference.fixed import hypotheses
from mixjax.inference.fixed.contrasts import check_ddf, ddf_note, t_tests
from mixjax.inference.wald import wald_intervals
from mixjax.prediction.repeated import predict
from mixjax.products.visits import visit_rows
from mixjax.resampling.repeated import bootstrap_visits

if TYPE_CHECKING:
    from mixjax.face.batches import RepeatedBatch
    from mixjax.inference.fixed.marginal_means import MarginalMeans


def mmrm(
    formula: str,
    data: Any,
    reml: bool = True,
    ddf: str = "satterthwaite",
    weights: Any = None,
    offset: Any = None,
    subset: Any = None,
    contrasts: Mapping[str, str] | None = None,
    trusted: bool | None = None,
) -> MMRMFit:
    """Fit a mixed model for repeated measures: fixed effects, and a covariance between the visits of a subject.

    There are no random effects: how the responses of a subject depend on each other is the covariance itself, of a
    structure that the formula names. Visits that a subject misses are left out, which is right where they are missing
    at random. What R's package mmrm and SAS's PROC MIXED with a REPEATED statement fit.

    Args:
        formula: ``"y ~ arm * visit + us(visit | subject)"``; ``us(visit | arm / subject)`` for a covariance in every
            arm. Structures: ``us`` any covariance; ``homcs`` one variance, one correlation, ``csh`` a variance for each
            visit; ``ar1``, ``ar1h`` correlations fall with the distance in visits; ``homtoep``, ``toeph`` one for every
            distance; ``adh`` ante-dependence; ``homdiag``, ``diag`` none; or one's own (:class:`mixjax.Covariance`).
            ``cs`` and ``toep`` are refused, because they mean different things in different packages.
        data: table, one row per subject and visit.
        reml: restricted maximum likelihood (default) or maximum likelihood.
        ddf: degrees of freedom of all tests that are not asked for others: ``"satterthwaite"``, ``"kenward-roger"``
            (SAS's ``ddfm=kr``), ``"kenward-roger-linear"`` (SAS's ``ddfm=kr(linear)``: without second derivatives of
            the covariance; both are one for ``us``, ``homcs``, ``homtoep``) or ``"wald"``.
        weights: column name or ``(n,)``; the standard deviation of a row is divided by the root of its weight.
        offset, subset, contrasts, trusted: as of :func:`mixjax.lmm`.

    Returns:
        MMRMFit.

    Raises:
        FormulaError, DataError: both ValueErrors, naming the culprit: a subject with two rows at a visit, a visit that
            nobody has, visits that nobody has both of.

    Warns:
        DataWarning: rows or columns were left out. ConvergenceWarning: the fit did not converge.

    Example:
        >>> import mixjax as mj
        >>> data = mj.datasets.load("Orthodont")
        >>> fit = mj.mmrm("distance ~ Sex * age + us(age | Subject)", data)
        >>> round(fit.criterion, 4)
        424.5468
    """
    check_options(reml, None)
    ddf = _checked_ddf(ddf)
    built = build_repeated(formula, data, weights, offset, subset, contrasts, caller_context(), trusted)
    return MMRMFit(fit_visit_rows(visit_rows(built.design, built.basis), built.labels, reml), ddf)


def _checked_ddf(ddf: Any) -> str:
    found = ddf_of(ddf)
    check_ddf(found)
    return str(found)


class MMRMFit:
    """A fitted model for repeated measures. Attributes and methods read a frozen record; nothing here changes it.

    Standard deviations and covariances are absolute. ``ddf`` of methods is None for the fit's own.
    """

    def __init__(self, fitted: RepeatedFitted, ddf: str = "satterthwaite"):
        self._fitted, self._ddf = fitted, ddf

    # --- the record ---------------------------------------------------------------------------------------------------

    @property
    def record(self) -> RepeatedFitted:
        """The frozen record of the fit, which inference is a function of."""
        return self._fitted

    @property
    def design(self) -> RepeatedDesign:
        """Arrays of the model."""
        return self._fitted.design

    @property
    def labels(self) -> RepeatedLabels:
        """Names of columns, visits and subjects."""
        return self._fitted.labels

    @property
    def estimates(self) -> RepeatedEstimates:
        """Estimates as plain arrays."""
        return self._fitted.estimates

    @property
    def reml(self) -> bool:
        """Fitted by REML, not ML."""
        return self._fitted.reml

    @property
    def ddf(self) -> str:
        """Degrees of freedom of tests that are not asked for others."""
        return self._ddf

    @property
    def optimizer(self) -> OptimizerInfo:
        """Name, iterations, gradient norm and message of the search."""
        return self._fitted.optimizer

    @property
    def converged(self) -> bool:
        """Gradient vanished and Hessian positive semidefinite."""
        return bool(self.estimates.converged)

    # --- fixed effects ------------------------------------------------------------------------------------------------

    @property
    def fixef(self) -> pd.Series:
        """Fixed effects beta (p,)."""
        return pd.Series(self.estimates.beta, index=list(self.labels.fixed), name="fixef")

    params = fixef

    @property
    def se(self) -> pd.Series:
        """Standard errors of the fixed effects (p,), the covariance of visits taken as known."""
        return pd.Series(np.sqrt(np.diag(self.estimates.vcov)), index=list(self.labels.fixed), name="se")

    bse = se

    @property
    def vcov(self) -> pd.DataFrame:
        """Covariance of the fixed effects (p, p), the covariance of visits taken as known."""
        names = list(self.labels.fixed)
        return pd.DataFrame(self.estimates.vcov, index=names, columns=names)

    @property
    def pvalues(self) -> pd.Series:
        """p values of the fixed effects."""
        return self._tests(None)["p_value"].rename("pvalues")

    # --- covariance of visits -----------------------------------------------------------------------------------------

    @property
    def Sigma(self) -> dict[str, pd.DataFrame]:
        """Dict group -> covariance (visits x visits) of a subject's responses; a group for every arm, or one."""
        return {
            term.group: pd.DataFrame(S, index=list(term.effects), columns=list(term.effects))
            for term, S in zip(self.labels.terms, self.estimates.Sigma, strict=True)
        }

    @property
    def residual_sd(self) -> Any:
        """Standard deviations by visit: a Series, or a DataFrame with a column for every arm."""
        sds = {group: np.sqrt(np.diag(S)) for group, S in self.Sigma.items()}
        frame = pd.DataFrame(sds, index=list(self.labels.terms[0].effects))
        return frame if self.labels.arms else frame.iloc[:, 0].rename("residual_sd")

    @property
    def sigma(self) -> float:
        """Not there: visits have standard deviations of their own.

        Raises:
            AttributeError: always; it says where they are.
        """
        raise AttributeError("repeated measures have no single sigma: see residual_sd and Sigma")

    @property
    def varcorr(self) -> VisitCovariances:
        """Standard deviations and correlations of the visits: ``str()`` for a table, ``.to_frame()`` for data."""
        return VisitCovariances(self._fitted)

    def variance_parameters(self) -> pd.DataFrame:
        """The structure's own parameters with delta-method standard errors: ``estimate``, ``std_error``."""
        found = self._fitted.variance_parameters
        columns = {"estimate": found.estimate, "std_error": found.std_error}
        return pd.DataFrame(columns, index=pd.Index(found.names, name="parameter"))

    # --- the fit as a whole -------------------------------------------------------------------------------------------

    @property
    def criterion(self) -> float:
        """REML criterion or ML deviance (-2 log-likelihood), which the fit minimised; all constants kept."""
        return float(self.estimates.criterion)

    @property
    def loglik(self) -> float:
        """Log-likelihood (restricted after a REML fit)."""
        return self._fitted.loglik

    @property
    def aic(self) -> float:
        """Akaike's criterion, fixed effects counted too, also after REML (R's mmrm and SAS leave them out there)."""
        return self._fitted.aic

    @property
    def bic(self) -> float:
        """Schwarz's criterion, with log(nobs) (R's mmrm and SAS have the number of subjects)."""
        return self._fitted.bic

    @property
    def nobs(self) -> int:
        """Rows used."""
        return self._fitted.nobs

    @property
    def npar(self) -> int:
        """Fixed effects and covariance parameters."""
        return self._fitted.npar

    def summary(self, ddf: str | None = None) -> RepeatedSummary:
        """Tables to read: ``print(fit.summary())``; HTML in notebooks."""
        return RepeatedSummary(self._fitted, self._tests(ddf), self._method(ddf))

    def tidy(self, ddf: str | None = None, conf_int: bool = False, level: float = 0.95) -> pd.DataFrame:
        """Estimates in rows: effect, group, term, estimate, std_error, statistic, df, p_value.

        Args:
            conf_int: also intervals of the fixed effects, ``lower`` and ``upper``, by ``df``. level: their coverage.
        """
        return repeated_tidy(self._fitted, self._tests(ddf), level if conf_int else None)

    def glance(self) -> pd.DataFrame:
        """One row: nobs, npar, loglik, aic, bic, criterion, ..."""
        return repeated_glance(self._fitted)

    def _method(self, ddf: str | None) -> str:
        return self._ddf if ddf is None else _checked_ddf(ddf)

    def _tests(self, ddf: str | None) -> pd.DataFrame:
        names, method = self.labels.fixed, self._method(ddf)
        tests = t_tests(self._fitted, np.eye(len(names)), method, names=names).drop(columns=["lower", "upper"])
        tests.attrs["notes"] = (ddf_note(method),)
        return tests

    def __repr__(self) -> str:
        kind = "REML criterion" if self.reml else "deviance"
        bad = "" if self.converged else ", NOT CONVERGED"
        return f"<MMRMFit {self.labels.formula!r}: {kind} {self.criterion:.4f}{bad}>"

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    # --- hypotheses ---------------------------------------------------------------------------------------------------

    def test(
        self, L: Any, ddf: str | None = None, joint: bool | None = None, adjust: str = "none", level: float = 0.95
    ) -> pd.DataFrame:
        """Test linear hypotheses about the fixed effects; args as of :meth:`mixjax.LMMFit.test`.

        Example:
            >>> import mixjax as mj
            >>> fit = mj.mmrm("distance ~ Sex * age + us(age | Subject)", mj.datasets.load("Orthodont"))
            >>> fit.test("age = 1", ddf="kenward-roger")["df"].round(1).tolist()
            [25.0]
        """
        return hypotheses.test(self._fitted, L, self._method(ddf), joint, adjust, level)

    def anova(self, type: str = "III", ddf: str | None = None) -> pd.DataFrame:
        """F tests of the terms of the fixed effects: num_df, den_df, statistic, p_value; one row per term.

        Args:
            type: ``"I"`` sequential, ``"II"`` adjusted for all terms that do not contain it, ``"III"`` for all.
        """
        return hypotheses.anova(self._fitted, type, self._method(ddf))

    def joint_tests(self, by: Any = None, ddf: str | None = None) -> pd.DataFrame:
        """F tests of every factor and interaction by its marginal means, also within the levels of others; see
        :func:`mixjax.inference.fixed.joint_tests.joint_tests`."""
        from mixjax.inference.fixed.joint_tests import joint_tests

        return joint_tests(self._fitted, by, self._method(ddf))

    def emmeans(
        self,
        spec: Any,
        by: Any = None,
        at: Mapping[str, Any] | None = None,
        ddf: str | None = None,
        level: float = 0.95,
    ) -> MarginalMeans:
        """Marginal means of factors, such as of arms within visits, ``"arm | visit"``; args as of
        :meth:`mixjax.LMMFit.emmeans`. Their ``.contrasts()`` are the differences of a trial.

        Example:
            >>> import mixjax as mj
            >>> data = mj.datasets.load("Orthodont").assign(visit=lambda d: d["age"].astype(int).astype(str))
            >>> fit = mj.mmrm("distance ~ Sex * visit + us(visit | Subject)", data)
            >>> fit.emmeans("Sex | visit").contrasts().round(2)[["contrast", "visit", "estimate", "p_value"]].tail(1)
                    contrast visit  estimate  p_value
            3  Male - Female     8      1.69     0.08
        """
        from mixjax.inference.fixed.means import emmeans

        return emmeans(self._fitted, spec, by, at, self._method(ddf), level)

    def emtrends(
        self,
        spec: Any,
        var: str,
        by: Any = None,
        at: Mapping[str, Any] | None = None,
        ddf: str | None = None,
        level: float = 0.95,
    ) -> MarginalMeans:
        """Slopes of the mean in a covariate, by factors; args as of :meth:`mixjax.LMMFit.emtrends`."""
        from mixjax.inference.fixed.means import emtrends

        return emtrends(self._fitted, spec, var, by, at, self._method(ddf), level)

    def confint(
        self,
        parm: Any = None,
        level: float = 0.95,
        method: Literal["wald", "bootstrap"] = "wald",
        ddf: str | None = None,
        key: Any = 0,
        n: int = 1000,
    ) -> pd.DataFrame:
        """Confidence intervals of all parameters.

        Args:
            parm: names of rows; ``"theta_"`` for the covariance's, ``"beta_"`` for fixed effects; None for all.
            level: coverage.
            method: ``"wald"``: of the fixed effects with t quantiles by ``ddf``, of standard deviations on the log
                scale, of correlations on Fisher's. ``"bootstrap"``: parametric, percentiles.
            key, n: of the bootstrap.

        Returns:
            DataFrame with columns ``lower``, ``upper``.
        """
        found: str = option(method, INTERVALS)
        if found == "profile":
            raise ValueError("there are no profiles of repeated measures: take method='wald' or 'bootstrap'")
        if found == "wald":
            frame = wald_intervals(self._fitted, level, self._method(ddf))
        elif found == "bootstrap":
            check_level(level)
            replicates = self.bootstrap(key, n)
            ends = replicates.quantile([0.5 - level / 2, 0.5 + level / 2])
            frame = pd.DataFrame(
                {"lower": ends.iloc[0].to_numpy(), "upper": ends.iloc[1].to_numpy()}, index=list(replicates)
            )
        else:
            raise ValueError(f"method must be 'wald' or 'bootstrap', got {method!r}")
        return frame.loc[parameters.select(parm, list(frame.index), len(self.labels.fixed))]

    def conf_int(self, alpha: float = 0.05) -> pd.DataFrame:
        """statsmodels' name for intervals of the fixed effects; ``alpha`` is 1 - level."""
        return self.confint("beta_", 1 - alpha)

    # --- rows ---------------------------------------------------------------------------------------------------------

    @property
    def X(self) -> np.ndarray:
        """Fixed-effects columns (n, p)."""
        return np.asarray(self.design.X)

    @property
    def fitted(self) -> pd.Series:
        """Means of the rows (n,)."""
        return pd.Series(self._fitted.mean, index=self.labels.frame.index, name="fitted")

    def residuals(self, kind: Literal["response", "pearson", "normalized"] = "response") -> pd.Series:
        """Residuals (n,): ``"response"``; ``"pearson"``, divided by the standard deviation of their visit;
        ``"normalized"``, made independent within subjects too."""
        return pd.Series(self._fitted.residuals(kind), index=self.labels.frame.index, name="residual")

    resid = residuals

    def predict(
        self,
        newdata: Any = None,
        conditional: bool = False,
        interval: Literal["confidence", "prediction"] | None = None,
        level: float = 0.95,
        ddf: str | None = None,
    ) -> Any:
        """Means of the rows of the fit or of a new table, also given the other responses of the subject, and intervals;
        see :func:`mixjax.prediction.repeated.predict`."""
        return predict(self._fitted, newdata, conditional, interval, level, self._method(ddf))

    def augment(self) -> pd.DataFrame:
        """The used rows and columns with fitted values and residuals beside them, in columns that begin with a dot."""
        columns = {".fitted": self._fitted.mean, ".resid": self._fitted.residuals("response")}
        columns |= {".pearson": self._fitted.residuals("pearson"), ".normalized": self._fitted.residuals("normalized")}
        frame: pd.DataFrame = self.labels.frame.assign(**columns)
        return frame

    # --- again --------------------------------------------------------------------------------------------------------

    def simulate(self, key: Any, n: int) -> np.ndarray:
        """Responses ``(n, nobs)`` drawn from the fit; response i depends on the key and on i alone."""
        return self._fitted.simulate(key, n)

    def refit(self, y: Any = None, reml: bool | None = None) -> MMRMFit:
        """The same model fitted to another response, or by the other criterion; args as of
        :meth:`mixjax.LMMFit.refit`."""
        reml = self.reml if reml is None else reml
        check_options(reml, None)
        if y is None:
            return MMRMFit(self._fitted.refitted(reml), self._ddf)
        return MMRMFit(self._fitted.refit(values_of_fit(self.labels, "y", y), reml), self._ddf)

    def refit_many(self, Y: Any) -> RepeatedBatch:
        """The same model fitted to many responses, such as those of simulated trials, thousands a second.

        Args:
            Y: ``(B, nobs)``, one response per row, in the order of the used rows, or as many columns as the table of
                the fit has rows. Missing values are visits that a subject misses in that response, such as after it
                drops out of a simulated trial. A response in which the fixed effects then depend on each other fails
                (``NOT_FINITE``), and no other.

        Returns:
            RepeatedBatch: frames with one row per response, counts of what went wrong, and ``.test(L, ddf)``.

        Example:
            >>> import mixjax as mj
            >>> fit = mj.mmrm("distance ~ Sex * age + us(age | Subject)", mj.datasets.load("Orthodont"))
            >>> fit.refit_many(fit.simulate(key=0, n=20)).test("Sex[T.Female]:age = 0")["p_value"].shape
            (20,)
        """
        Y = responses_of_rows(self.labels, Y)
        est = self._fitted.fit_many(Y)
        from mixjax.face.batches import RepeatedBatch

        return RepeatedBatch(est, self.labels, self._fitted.structures, None, self, Y)  # type: ignore[arg-type]

    def bootstrap(self, key: Any, n: int) -> pd.DataFrame:
        """Parametric bootstrap: all parameters of n refits to responses drawn from the fit, one row each; refits that
        failed are left out, with a warning."""
        return bootstrap_visits(self._fitted, key, n)
