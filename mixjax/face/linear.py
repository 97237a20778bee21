"""``lmm()``: formula and table in, fit out. A thin face over the rooms below."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd
from scipy import sparse

from mixjax.checks import DataError, check_options
from mixjax.covariance import lambdas_of_theta
from mixjax.design import Design, Labels
from mixjax.diagnostics.modes import conditional_covariances_by_group, tidy_modes
from mixjax.estimation.estimate import Estimates
from mixjax.estimation.many import KEEP
from mixjax.face.summary import Summary, VarCorr, glance, tidy
from mixjax.face.with_diagnostics import Diagnosing
from mixjax.face.with_inference import Inferring
from mixjax.fitted.batch import with_fixed
from mixjax.fitted.kernels import fit_kernel_rows
from mixjax.fitted.names import modes_by_group, responses_of_rows, term_names, values_of_fit
from mixjax.fitted.options import ddf_of
from mixjax.fitted.record import Fitted, fit_products, fit_rows
from mixjax.fitted.residual import fit_residual_rows
from mixjax.fitted.search_end import OptimizerInfo
from mixjax.formula.build import build
from mixjax.formula.checks import check_identifiable as refuse_unidentified
from mixjax.formula.checks import check_number_of_effects
from mixjax.formula.chunks import is_stream
from mixjax.formula.context import caller_context
from mixjax.formula.parse import check_text
from mixjax.inference.fixed.contrasts import ddf_note, t_tests
from mixjax.products.rows import rows_of
from mixjax.products.sums import CrossProducts
from mixjax.streams import cross_products_from

if TYPE_CHECKING:
    from mixjax.face.batches import ModelBatch


def lmm(
    formula: str,
    data: Any,
    reml: bool = True,
    weights: Any = None,
    offset: Any = None,
    subset: Any = None,
    contrasts: Mapping[str, str] | None = None,
    start: Any = None,
    optimizer: Any = None,
    check_identifiable: bool = True,
    trusted: bool | None = None,
    dispersion: str | None = None,
    residual: str | None = None,
) -> LMMFit:
    """Fit a linear mixed model, as ``lme4::lmer`` does. Always computes in float64.

    Args:
        formula: ``"y ~ x + (x | g)"``. Fixed effects in formulaic's language; random terms in lme4's: ``(1 | g)``,
            ``(x | g)``, ``(0 + x | g)``, ``(x || g)``, ``(1 | a/b)``, ``(1 | a:b)``, ``(1 | a*b)``;
            ``propto(1 | g, K)`` where the covariance of the levels is known but for its scale: K, a
            :class:`mixjax.Relationship` or a data frame labelled on both axes, is found by its name where the formula
            is written.
        data: pandas, polars or pyarrow table, or a dict of arrays. Also what comes in chunks: an iterable of tables,
            the path of a parquet file, a pyarrow dataset, a dask data frame; see
            :func:`mixjax.cross_products_from`. The rows of chunks are not kept, so neither are residuals.
        reml: restricted maximum likelihood (default) or maximum likelihood.
        weights: column name or ``(n,)``; the residual variance of a row is ``sigma^2 / weight``.
        offset: column name or ``(n,)``, a known part of the mean.
        subset: rows to use: booleans, or an expression such as ``"Days > 1"``.
        contrasts: column -> ``"sum"``, ``"helmert"``, ...; treatment contrasts otherwise. Of the factor in the fixed
            effects and in random terms alike.
        start: theta to start from.
        optimizer: None for trust-region Newton, or an optax GradientTransformation.
        check_identifiable: refuse terms with as many random effects as rows.
        trusted: a formula is code: a call in it is called. False where it comes from a stranger; see
            :func:`mixjax.build_design`.
        dispersion: formula of the residual standard deviations on the log scale, ``"~ Sex"`` or ``"~ log(age)"``:
            ``log sd_i = log sigma + W_i gamma``, sigma being that where ``W gamma = 0``; nlme's varIdent, varExp,
            varPower. With ``weights`` as well, variances are ``sd_i^2 / weight``. ``"~ 1"`` without a random term is
            ordinary regression, the null of a comparison.
        residual: correlation of the residuals within groups, ``"ar1(Days | Subject)"`` (whole steps of time, or the
            levels of a category; ``1`` for the order of the rows), ``"car1(time | Subject)"`` (times of any kind,
            correlations not negative), ``"cs(1 | Subject)"`` (one correlation), ``"exp(u + v | Subject)"``, ``"gau"``,
            ``"mat(..., nu = 1.5)"`` (by distance). Grouping factors of random terms must be constant within its groups.
            With either the formula needs no random term. See docs/structures.md.

    Returns:
        LMMFit.

    Raises:
        FormulaError, DataError: both ValueErrors, naming the culprit.

    Warns:
        DataWarning: rows or columns were left out. ConvergenceWarning: the fit did not converge.

    Example:
        >>> import mixjax as mj
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> round(fit.criterion, 4)
        1743.6283
        >>> ar1 = mj.lmm("Reaction ~ Days", mj.datasets.load("sleepstudy"), residual="ar1(Days | Subject)")
        >>> ar1.variance_parameters()["estimate"].round(2).to_dict()
        {'rho|Subject': 0.8, 'sigma': 49.51}
    """
    check_options(reml, optimizer)
    if dispersion is not None or residual is not None:
        refuse_beside_residuals(data, optimizer)
    check_text(formula)
    if is_stream(data):
        if subset is not None:
            raise DataError("subset= needs a whole table; select the rows of every chunk yourself")
        stats, labels = cross_products_from(data, formula, weights, offset, contrasts=contrasts, trusted=trusted)
        if check_identifiable:
            check_number_of_effects(int(stats.n), labels, structures=stats.layout.structures)
        return LMMFit(fit_products(stats, labels, reml, start, optimizer))
    own = None if dispersion is None else {"dispersion": dispersion}
    caller = caller_context()
    built = build(formula, data, weights, offset, subset, contrasts, caller, trusted, None, None, own, residual)
    if not built.design.terms and not built.design.has_residual_side:  # dispersion="~ 1": ordinary regression
        built = built._replace(design=replace(built.design, dispersion=np.zeros((len(built.design.y), 0))))
    if check_identifiable:
        refuse_unidentified(*built)
    rows = rows_of(built.design, built.basis)
    if built.design.has_residual_side:
        return LMMFit(fit_residual_rows(rows, built.labels, reml, start))
    if built.design.has_kernels:
        return LMMFit(fit_kernel_rows(rows, built.labels, reml, start))
    return LMMFit(fit_rows(rows, built.labels, reml, start, optimizer))


def refuse_beside_residuals(data: Any, optimizer: Any) -> None:
    """Raise for what parameters of residuals cannot be fitted with."""
    if is_stream(data):
        raise DataError("dispersion= and residual= need the rows themselves, a whole table: chunks are summed up")
    if optimizer is not None:
        raise ValueError("dispersion= and residual= are fitted by trust-region Newton: leave optimizer= out")


class LMMFit(Inferring, Diagnosing):
    """A fitted linear mixed model. Attributes and methods read a frozen record; nothing here changes it.

    Standard deviations and covariances are absolute unless a name says relative (``theta``, ``Lambda``).
    """

    def __init__(self, fitted: Fitted):
        self._fitted = fitted

    # --- the record ---------------------------------------------------------------------------------------------------

    @property
    def record(self) -> Fitted:  # type: ignore[override]
        """The frozen record of the fit, which inference and diagnostics are functions of."""
        return self._fitted

    @property
    def design(self) -> Design:
        """Arrays of the model."""
        return self._fitted.design

    @property
    def labels(self) -> Labels:
        """Names of columns, effects and levels."""
        return self._fitted.labels

    @property
    def stats(self) -> CrossProducts:
        """Cross-products of the design."""
        return self._fitted.stats

    @property
    def estimates(self) -> Estimates:
        """Estimates as plain arrays."""
        return self._fitted.estimates

    @property
    def reml(self) -> bool:
        """Fitted by REML, not ML."""
        return self._fitted.reml

    @property
    def optimizer(self) -> OptimizerInfo:
        """Name, iterations, gradient norm and message of the search."""
        return self._fitted.optimizer

    @property
    def converged(self) -> bool:
        """Gradient vanished and Hessian positive semidefinite."""
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
        """Standard errors of the fixed effects (p,)."""
        return self._fixed_series(np.sqrt(np.diag(self.estimates.vcov)), "se")

    bse = se

    @property
    def vcov(self) -> pd.DataFrame:
        """Covariance of the fixed effects (p, p), theta taken as known."""
        names = list(self.labels.fixed)
        return pd.DataFrame(self.estimates.vcov, index=names, columns=names)

    def _fixed_series(self, values: np.ndarray, name: str) -> pd.Series:
        return pd.Series(values, index=list(self.labels.fixed), name=name)

    # --- variance parameters ------------------------------------------------------------------------------------------

    @property
    def sigma(self) -> float:
        """Residual standard deviation."""
        return float(self.estimates.sigma)

    @property
    def theta(self) -> np.ndarray:
        """Relative Cholesky factors (k,): lower triangle column by column, term by term, diagonal >= 0."""
        theta: np.ndarray = self.estimates.theta
        return theta

    @property
    def Lambda(self) -> dict[str, np.ndarray]:
        """Dict group -> relative Cholesky factor (q, q), lower triangular: ``Sigma = sigma^2 Lambda Lambda'``.

        A second term on the same group is called ``Subject.1``, as in lme4.
        """
        return dict(zip(term_names(self.labels), lambdas_of_theta(self.theta, self._qs), strict=True))

    @property
    def Sigma(self) -> dict[str, np.ndarray]:
        """Dict group -> covariance (q, q) of a term's random effects, absolute; keys as in :attr:`Lambda`."""
        return dict(zip(term_names(self.labels), self.estimates.Sigma, strict=True))

    @property
    def varcorr(self) -> VarCorr:
        """Standard deviations and correlations: ``str()`` for lme4's table, ``.to_frame()`` for data."""
        return VarCorr(self._fitted)

    @property
    def _qs(self) -> tuple[int, ...]:
        return tuple(len(term.effects) for term in self.labels.terms)

    # --- random effects -----------------------------------------------------------------------------------------------

    def ranef(self, *, condvar: bool = False) -> Any:
        """Conditional modes (BLUPs) of the random effects.

        Args:
            condvar: also their conditional covariances, given theta and beta. For their standard deviations in a
                table see :meth:`ranef_frame`.

        Returns:
            dict group -> DataFrame (levels x effects); with ``condvar=True`` a pair of that and dict group ->
            ``(levels, q, q)``. Terms on one group stand side by side, uncorrelated parts with zeros between them
            unless the data correlate them.
        """
        frames = modes_by_group(self.labels, self.estimates.b)
        if not condvar:
            return frames
        return frames, conditional_covariances_by_group(self._fitted)

    def ranef_frame(self) -> pd.DataFrame:
        """Conditional modes with their conditional standard deviations in rows, for pictures of levels.

        Returns:
            DataFrame as R's ``as.data.frame(ranef(m, condVar = TRUE))``: ``grpvar``, ``term`` (the effect), ``grp``
            (the level), ``condval``, ``condsd``; effect by effect, levels in their order.

        Example:
            >>> import mixjax as mj
            >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
            >>> fit.ranef_frame().head(2).round(2)
                grpvar       term  grp  condval  condsd
            0  Subject  Intercept  308     2.26   12.07
            1  Subject  Intercept  309   -40.40   12.07
        """
        return tidy_modes(self._fitted)

    def coef(self) -> dict[str, pd.DataFrame]:
        """Coefficients per level: fixed effects plus the random effects of the same name."""
        return {group: with_fixed(frame, self.fixef.to_dict()) for group, frame in self.ranef().items()}

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
        """Akaike's criterion."""
        return self._fitted.aic

    @property
    def bic(self) -> float:
        """Schwarz's criterion, with log(nobs)."""
        return self._fitted.bic

    @property
    def nobs(self) -> int:
        """Rows used."""
        return self._fitted.nobs

    @property
    def npar(self) -> int:
        """Fixed effects, covariance parameters and sigma."""
        return self._fitted.npar

    def summary(self, ddf: str | None = None) -> Summary:
        """Tables to read: ``print(fit.summary())``; HTML in notebooks.

        Args:
            ddf: ``"satterthwaite"``, ``"kenward-roger"`` or ``"wald"`` adds degrees of freedom and p values.
        """
        return Summary(self._fitted, self._tests(ddf), ddf)

    def tidy(self, ddf: str | None = None, conf_int: bool = False, level: float = 0.95) -> pd.DataFrame:
        """Estimates in rows, as broom.mixed's ``tidy()``: effect, group, term, estimate, std_error, statistic, df,
        p_value.

        Args:
            ddf: as for :meth:`summary`. conf_int: also Wald intervals of the fixed effects, ``lower`` and ``upper``, by
                the degrees of freedom of ``ddf``, normal without it. level: their coverage.

        Example:
            >>> import mixjax as mj
            >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
            >>> fit.tidy(ddf="satterthwaite", conf_int=True).loc[1, ["lower", "upper"]].astype(float).round(2).tolist()
            [7.21, 13.73]
        """
        return tidy(self._fitted, self._tests(ddf), level if conf_int else None)

    def _tests(self, ddf: str | None) -> pd.DataFrame | None:
        names = self.labels.fixed
        if ddf is None:
            return None
        tests = t_tests(self._fitted, np.eye(len(names)), ddf_of(ddf), names=names)
        tests = tests.drop(columns=["lower", "upper"])
        tests.attrs["notes"] = (ddf_note(ddf_of(ddf)),)
        return tests

    @property
    def pvalues(self) -> pd.Series:
        """p values of the fixed effects with Satterthwaite's degrees of freedom."""
        tests = self._tests("satterthwaite")
        assert tests is not None
        return tests["p_value"].rename("pvalues")

    def conf_int(self, alpha: float = 0.05) -> pd.DataFrame:
        """statsmodels' name for Wald intervals of the fixed effects; ``alpha`` is 1 - level."""
        return self.confint("beta_", 1 - alpha, method="wald")

    def glance(self) -> pd.DataFrame:
        """One row: nobs, npar, sigma, loglik, aic, bic, criterion, ..."""
        return glance(self._fitted)

    def __repr__(self) -> str:
        kind = "REML criterion" if self.reml else "deviance"
        notes = ["singular"] * self.is_singular + ["NOT CONVERGED"] * (not self.converged)
        return f"<LMMFit {self.labels.formula!r}: {kind} {self.criterion:.4f}{''.join(', ' + n for n in notes)}>"

    def _repr_html_(self) -> str:
        return self.summary()._repr_html_()

    # --- rows ---------------------------------------------------------------------------------------------------------

    @property
    def X(self) -> np.ndarray:
        """Fixed-effects columns (n, p)."""
        return np.asarray(self.design.X)

    @property
    def Z(self) -> sparse.csc_array:
        """Random-effects columns, sparse (n, sum of levels x q): term by term, level by level, effect by effect."""
        blocks = []
        for term in self.design.terms:
            n, q = np.shape(term.Z)
            columns = np.asarray(term.group)[:, None] * q + np.arange(q)
            rows = np.repeat(np.arange(n), q)
            shape = (n, term.n_groups * q)
            blocks.append(sparse.csc_array((np.asarray(term.Z).ravel(), (rows, columns.ravel())), shape=shape))
        return sparse.hstack(blocks, format="csc") if blocks else sparse.csc_array((self.nobs, 0))

    def marginal_cov(self, rows: Any = None) -> np.ndarray:
        """Covariance ``V = sigma^2 W^{-1} + Z Sigma Z'`` of the responses of some rows, dense; that of the residuals
        in place of the first part where these have parameters of their own.

        Args:
            rows: positions (integers, slice or booleans) among the used rows; None for all, up to 10 000.
        """
        if rows is None and self.nobs > 10_000:
            raise ValueError(f"V of all {self.nobs} rows is too large to be dense; name the rows")
        rows = np.atleast_1d(np.arange(self.nobs)[slice(None) if rows is None else rows])
        V = self._fitted.residual_covariance(rows)
        for term, Sigma in zip(self.design.terms, self.estimates.Sigma, strict=True):
            Z, group = np.asarray(term.Z)[rows], np.asarray(term.group)[rows]
            alike = group[:, None] == group[None] if term.levels is None else term.levels[group] @ term.levels[group].T
            V += (Z @ Sigma @ Z.T) * alike
        return V

    # --- again --------------------------------------------------------------------------------------------------------

    def refit(self, y: Any = None, reml: bool | None = None) -> LMMFit:
        """The same model fitted to another response, or by the other criterion.

        Args:
            y: response, or None for the same: ``(nobs,)`` for the used rows, or as long as the table of the fit, of
                which the rows are taken that are in the fit. A Series is lined up by its index.
            reml: None for the same.

        Raises:
            DataError: y has another length, missing values in rows of the fit, or labels that are not the fit's; the
                fixed effects reproduce it exactly.

        Example:
            >>> import mixjax as mj
            >>> data = mj.datasets.load("sleepstudy")
            >>> fit = mj.lmm("Reaction ~ Days + (1 | Subject)", data, subset="Days > 1")
            >>> round(float(fit.refit(data["Reaction"] / 1000).fixef["Days"]), 4)
            0.0114
        """
        reml = self.reml if reml is None else reml
        check_options(reml, None)
        if y is None:
            return LMMFit(self._fitted.refitted(reml))
        return LMMFit(self._fitted.refit(values_of_fit(self.labels, "y", y), reml))

    def without(self, term: str) -> LMMFit:
        """The same data fitted without a term, by the same criterion.

        Args:
            term: as :meth:`ranova` and :meth:`drop1` name it: ``"Days in (Days | Subject)"``, ``"(1 | Subject)"``,
                ``"recipe"``; or a whole random term as the formula has it.

        Raises:
            ValueError: there is no such term, another contains it, or it is the only random one.

        Example:
            >>> import mixjax as mj
            >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
            >>> fit.without("Days in (Days | Subject)")
            <LMMFit 'Reaction ~ Days + (1 | Subject)': REML criterion 1786.4651>
        """
        from mixjax.inference.random.ranova import without

        return LMMFit(without(self._fitted, term))

    def refit_many(
        self,
        Y: Any,
        reml: bool | None = None,
        chunk: int | None = None,
        ranef: bool = False,
        engine: Literal["auto", "numpy", "jax"] = "auto",
    ) -> ModelBatch:
        """The same model fitted to many responses, for example simulated ones; see :func:`mixjax.estimate_many`.

        Args:
            Y: ``(B, nobs)``, one response per row, in the order of the used rows, or as many columns as the table of
                the fit has rows; columns of a data frame that are the table's labels are lined up. Or a list of
                responses as :meth:`refit` takes them. Missing values make that one fit fail, and no other, and so does
                a response that the fixed effects reproduce exactly (``NO_NOISE``).
            reml: None for the same criterion.
            chunk: how many replicates are worked on at the same time, about; None for all cores.
            ranef: keep the random effects of all fits, for the result's ``ranef()`` and ``coef()``.
            engine: ``"numpy"`` or ``"jax"``; ``"auto"`` compiles a program where that pays.

        Returns:
            :class:`~mixjax.face.batches.ModelBatch`: frames with one row per response, counts of what went wrong, and
            ``.test(L, ddf)``.
        """
        Y = responses_of_rows(self.labels, Y)
        check_options(self.reml if reml is None else reml, None)
        est = self._fitted.fit_many(Y, (*KEEP, "Sigma", "vcov", *["b"] * ranef), reml, engine, chunk)
        reml = self.reml if reml is None else reml
        from mixjax.face.batches import ModelBatch

        return ModelBatch(est, self.labels, self.stats.layout.structures, None, self, Y, reml)
