"""The methods of a fit that test, estimate intervals and resample: a thin face over ``mixjax.inference``.

What a first look at a fit does not need is loaded by the method that does: to import all takes half as long again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from mixjax.checks import InferenceWarning, warn
from mixjax.estimation.estimate import Estimates
from mixjax.fitted import parameters
from mixjax.fitted.options import BOOTSTRAPS, DROP1, INTERVALS, RATIOS, ddf_of, option
from mixjax.fitted.record import Fitted
from mixjax.inference.fixed import hypotheses
from mixjax.inference.random import variance
from mixjax.inference.wald import wald_intervals
from mixjax.resampling.bootstrap import Bootstrap
from mixjax.resampling.bootstrap import bootstrap as run_bootstrap

if TYPE_CHECKING:
    from mixjax.inference.fixed.marginal_means import MarginalMeans
    from mixjax.inference.fixed.robust import Robust
    from mixjax.inference.random.profile import Profile


class Inferring:
    """Methods of an object with a ``record``."""

    record: Fitted

    # --- hypotheses about the fixed effects ---------------------------------------------------------------------------

    def test(
        self,
        L: Any,
        ddf: str = "satterthwaite",
        joint: bool | None = None,
        adjust: str = "none",
        level: float = 0.95,
    ) -> pd.DataFrame:
        """Test linear hypotheses about the fixed effects.

        Args:
            L: ``"Days = 10"``, ``"recipe[T.B] = recipe[T.C]"``, a list of such, a dict column -> weight, or an array
                ``(p,)`` or ``(r, p)`` whose combinations are zero under the hypothesis. lme4's names are understood.
            ddf: ``"satterthwaite"``, ``"kenward-roger"`` (of REML estimates) or ``"wald"``.
            joint: True for one F test of all rows, False for a t test of each; None: F of several, t of one, and t
                tests wherever they are adjusted.
            adjust: of several t tests: ``"mvt"`` (multivariate t), ``"sidak"``, ``"scheffe"``, ``"bonferroni"``,
                ``"holm"``, ``"fdr"`` or ``"none"``. level: of the intervals.

        Returns:
            DataFrame; t tests: estimate, std_error, df, lower, upper, statistic, p_value. F test: sum_sq, mean_sq,
            num_df, den_df, statistic, p_value.

        Example:
            >>> import mixjax as mj
            >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
            >>> fit.test("Days = 10")["p_value"].round(3).tolist()
            [0.766]
        """
        return hypotheses.test(self.record, L, ddf_of(ddf), joint, adjust, level)

    def anova(self, type: str = "III", ddf: str = "satterthwaite") -> pd.DataFrame:
        """F tests of the terms of the fixed effects, as ``lmerTest::anova``.

        Args:
            type: ``"I"`` sequential, ``"II"`` adjusted for all terms that do not contain it, ``"III"`` for all.
            ddf: ``"satterthwaite"``, ``"kenward-roger"`` (of REML estimates) or ``"wald"``.

        Returns:
            DataFrame: sum_sq, mean_sq, num_df, den_df, statistic, p_value; one row per term. A term that others
            determine has num_df 0 and no numbers.
        """
        return hypotheses.anova(self.record, type, ddf_of(ddf))

    def drop1(self, test: Literal["F", "lrt"] = "F", ddf: str = "satterthwaite") -> pd.DataFrame:
        """Test the terms of the fixed effects that no other term contains, each left out by itself; see
        :func:`mixjax.inference.fixed.drop1.drop1`.

        Args:
            test: ``"F"``, as ``lmerTest``'s ``drop1``; ``"lrt"``: likelihood ratios of maximum likelihood fits, as
                ``lme4``'s with ``test = "Chisq"``.
            ddf: of F tests, as of :meth:`anova`.

        Returns:
            DataFrame: sum_sq, mean_sq, num_df, den_df, statistic, p_value; or npar, loglik, aic, lrt, df, p_value.
        """
        from mixjax.inference.fixed.drop1 import drop1

        return drop1(self.record, option(test, DROP1), ddf_of(ddf))

    def ranova(
        self,
        method: Literal["mixture", "chi2", "bootstrap"] = "mixture",
        reduce: bool = True,
        key: Any = 0,
        n: int = 1000,
    ) -> pd.DataFrame:
        """Likelihood ratio tests of the random effects, each left out by itself, as ``lmerTest::ranova``; see
        :func:`mixjax.inference.random.ranova.ranova`.

        Args:
            method: ``"chi2"``: p-values as lmerTest's. ``"mixture"``: also of the mixture of chi-squares that holds
                where one variance is 0. ``"bootstrap"``: also by simulation.
            reduce: ``(x | g)`` becomes ``(1 | g)``; False: whole terms are left out.
            key, n: of the bootstrap.

        Returns:
            DataFrame: npar, loglik, aic, lrt, df, p_value, p_mixture, ...; ``<none>`` and one row per smaller model,
            which :meth:`without` fits.

        Example:
            >>> import mixjax as mj
            >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
            >>> fit.ranova()["lrt"].round(2).to_dict()
            {'<none>': nan, 'Days in (Days | Subject)': 42.84}
        """
        from mixjax.inference.random.ranova import ranova

        return ranova(self.record, option(method, RATIOS), reduce, key, n)

    def joint_tests(self, by: Any = None, ddf: str = "satterthwaite") -> pd.DataFrame:
        """F tests of every factor and interaction by its marginal means, also within the levels of others, as
        ``emmeans::joint_tests``; see :func:`mixjax.inference.fixed.joint_tests.joint_tests`.

        Args:
            by: a factor or a list of factors within whose levels to test.
            ddf: ``"satterthwaite"``, ``"kenward-roger"`` (of REML estimates) or ``"wald"``.

        Returns:
            DataFrame: the columns of ``by``, term, num_df, den_df, statistic, p_value.
        """
        from mixjax.inference.fixed.joint_tests import joint_tests

        return joint_tests(self.record, by, ddf_of(ddf))

    def emmeans(
        self,
        spec: Any,
        by: Any = None,
        at: Mapping[str, Any] | None = None,
        ddf: str = "satterthwaite",
        level: float = 0.95,
    ) -> MarginalMeans:
        """Marginal means of factors, as R's ``emmeans``: of a grid of all levels, with covariates at their means.

        Args:
            spec: a factor, a list of factors, ``"arm * visit"`` for the cells of both, ``"arm | visit"`` for arms
                within the levels of visit, ``"1"`` for the overall mean. What is not named is averaged over.
            by: factors within whose levels contrasts are made, as behind the bar.
            at: variable -> value or values to use instead of the mean, or of all levels. Offsets count with their
                mean over the rows, those of the formula unless a variable that they read is given.
            ddf: ``"satterthwaite"``, ``"kenward-roger"`` (of REML estimates) or ``"wald"``; contrasts have the same.
            level: coverage of the intervals.

        Returns:
            MarginalMeans: ``.to_frame()``, ``.contrasts()``, ``.letters()``, ``.eff_size()``, ``str()``.

        Raises:
            DataError: unknown variables or levels, the response, a covariate without values.

        Example:
            >>> import mixjax as mj
            >>> fit = mj.lmm("angle ~ recipe + (1 | recipe:replicate)", mj.datasets.load("cake"))
            >>> print(fit.emmeans("recipe"))
            marginal means of recipe
            recipe  estimate  std_error  df  lower  upper
                 A    33.122     1.7368  42 29.617 36.627
                 B    31.644     1.7368  42 28.139  35.15
                 C      31.6     1.7368  42 28.095 35.105
            satterthwaite degrees of freedom, 95 % intervals
        """
        from mixjax.inference.fixed.means import emmeans

        return emmeans(self.record, spec, by, at, ddf_of(ddf), level)

    def emtrends(
        self,
        spec: Any,
        var: str,
        by: Any = None,
        at: Mapping[str, Any] | None = None,
        ddf: str = "satterthwaite",
        level: float = 0.95,
    ) -> MarginalMeans:
        """Slopes of the mean in a covariate, by factors, as R's ``emtrends``.

        Args:
            spec, by, at, ddf, level: as of :meth:`emmeans`.
            var: the covariate; slopes are taken at its mean, or at the values of ``at``.

        Returns:
            MarginalMeans; estimates are changes of the response per unit of ``var``.

        Example:
            >>> import mixjax as mj
            >>> fit = mj.lmm("distance ~ age * Sex + (age | Subject)", mj.datasets.load("Orthodont"))
            >>> fit.emtrends("Sex", "age").contrasts()[["contrast", "estimate", "p_value"]].round(3)
                    contrast  estimate  p_value
            0  Male - Female     0.305    0.033
        """
        from mixjax.inference.fixed.means import emtrends

        return emtrends(self.record, spec, var, by, at, ddf_of(ddf), level)

    def robust(self, cluster: Any = None, kind: str = "CR2", L: Any = None) -> Robust:
        """Cluster-robust covariance of the fixed effects, with Satterthwaite df; see
        :func:`mixjax.inference.fixed.robust.robust`.

        Args:
            cluster: grouping factor, column or labels; None for the outermost grouping factor.
            kind: ``"CR2"``, ``"CR1"`` or ``"CR0"``.
            L: combinations to show instead of single fixed effects.
        """
        from mixjax.inference.fixed.robust import robust

        return robust(self.record, cluster, kind, L)

    # --- intervals and resampling -------------------------------------------------------------------------------------

    def confint(
        self,
        parm: Any = None,
        level: float = 0.95,
        method: Literal["profile", "wald", "bootstrap"] = "profile",
        ddf: str = "wald",
        key: Any = 0,
        n: int = 1000,
        kind: Literal["percentile", "basic", "normal", "bca"] = "percentile",
    ) -> pd.DataFrame:
        """Confidence intervals of all parameters.

        Args:
            parm: names of rows, also as in lme4 (``.sig01``, ``(Intercept)``), ``"theta_"`` or ``"beta_"``; None for
                all.
            level: coverage.
            method: ``"profile"``: all values that a likelihood ratio test does not reject, see :meth:`profile`; of a
                REML fit those of its ML refit, and a warning says so. ``"wald"``: standard deviations on the log scale,
                correlations on Fisher's. ``"bootstrap"``: parametric; for other kinds, statistics or many intervals
                from one sample see :meth:`bootstrap`.
            ddf: of the fixed effects' Wald intervals.
            key, n, kind: of the bootstrap: random key, replicates, how its interval is made.

        Returns:
            DataFrame with columns ``lower``, ``upper``; rows ``sd_Intercept|Subject``,
            ``cor_Days.Intercept|Subject``, ..., ``sigma``, then the fixed effects, ``beta_sigma`` of a predictor that
            is called sigma. ``attrs["notes"]`` of profile intervals says what there is to say.

        Warns:
            InferenceWarning: an interval ends on the boundary, or there is none.

        Example:
            >>> import mixjax as mj
            >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
            >>> fit.confint("Days", method="wald").round(2).loc["Days"].tolist()
            [7.44, 13.5]
        """
        method = option(method, INTERVALS)
        if method == "profile":
            found = self.profile(parm).confint(level)
            for note in found.attrs["notes"]:
                warn(note, InferenceWarning)
            return found
        if method == "wald":
            frame = wald_intervals(self.record, level, ddf_of(ddf))
        elif method == "bootstrap":
            frame = run_bootstrap(self.record, key, n).confint(level, option(kind, BOOTSTRAPS))
        else:
            raise ValueError(f"method must be 'profile', 'wald' or 'bootstrap', got {method!r}")
        return frame.loc[parameters.select(parm, list(frame.index), len(self.record.labels.fixed))]

    def profile(self, parm: Any = None) -> Profile:
        """Profile the ML deviance along parameters; see :class:`mixjax.inference.random.profile.Profile`.

        Args:
            parm: names, also as in lme4; None for all.

        Returns:
            Profile: ``.confint(level)``, ``.to_frame()`` (parameter, value, zeta), ``.zeta(name, values)``.

        Raises:
            ValueError: ``rr`` or ``fa``; more than 32 random effects beside those of the largest grouping factor (64
                with up to 3 effects a level of that, 128 with other structures than ``us`` and ``diag``).

        Example:
            >>> import mixjax as mj
            >>> fit = mj.lmm("Yield ~ 1 + (1 | Batch)", mj.datasets.load("Dyestuff"), reml=False)
            >>> fit.profile().confint().round(2).loc["sd_Intercept|Batch"].tolist()
            [12.2, 84.06]
        """
        from mixjax.inference.random.profile import profile  # splines of scipy.interpolate, which takes long to load

        return profile(self.record, parm)

    def bootstrap(
        self,
        key: Any,
        n: int,
        kind: Literal["parametric", "residual", "cases", "wild"] = "parametric",
        statistic: Callable[[Estimates], Any] | None = None,
        chunk: int | None = None,
        progress: bool | None = None,
        weights: Literal["mammen", "rademacher"] = "mammen",
        modes: bool = False,
        engine: Literal["auto", "numpy", "jax"] = "auto",
    ) -> Bootstrap:
        """Draw n data sets from the fit and refit each; see :func:`mixjax.resampling.bootstrap.bootstrap`.

        Returns:
            Bootstrap: ``.replicates``, ``.std_error``, ``.bias``, ``.confint(level, method)``, ``.counts``.

        Example:
            >>> import mixjax as mj
            >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
            >>> fit.bootstrap(key=1, n=200).replicates.shape
            (200, 6)
        """
        return run_bootstrap(self.record, key, n, kind, statistic, chunk, progress, weights, modes, engine)

    def simulate(self, key: Any, n: int, random: Literal["new", "fitted"] = "new") -> np.ndarray:
        """Responses ``(n, nobs)`` drawn from the fit.

        Args:
            key: int or JAX key; response i depends on it and on i alone.
            n: how many.
            random: random effects drawn anew for every response, or those predicted for these data.
        """
        return self.record.simulate(key, n, random=random)

    # --- where the variance lies --------------------------------------------------------------------------------------

    def icc(self, by_group: bool = False) -> pd.Series:
        """Intraclass correlation, ``adjusted`` and ``unadjusted``, or one for every grouping factor."""
        return variance.icc(self.record, by_group)

    def r2(self) -> pd.Series:
        """Shares of explained variance: ``marginal``, by the fixed effects, and ``conditional``, by random ones too."""
        return variance.r2(self.record)

    def variance_shares(self) -> pd.DataFrame:
        """Variance and its share by component: columns ``component`` (``"random"``, ``"residual"``, ``"fixed"``),
        group, effects, variance, share; see :func:`mixjax.inference.random.variance.shares`."""
        return variance.shares(self.record)

    def variance_parameters(self) -> pd.DataFrame:
        """Standard deviations, correlations and sigma with delta-method standard errors: ``estimate``, ``std_error``.

        NaN on the boundary.
        """
        found = self.record.variance_parameters
        columns = {"estimate": found.estimate, "std_error": found.std_error}
        return pd.DataFrame(columns, index=pd.Index(found.names, name="parameter"))

    def pca(self) -> dict[str, pd.DataFrame]:
        """Principal components of the random effects' covariances: how many dimensions they need, as lme4's ``rePCA``.

        Returns:
            dict grouping factor -> DataFrame, one row per component: ``std_dev`` relative to sigma, ``share`` of the
            variance and ``cumulative``, which depend on the units of the columns; ``row_...``, the same of what the
            effects do to the rows, which do not; ``needed``, False where a component is zero. See
            :func:`mixjax.inference.random.variance.principal_components`.

        Example:
            >>> import mixjax as mj
            >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
            >>> fit.pca()["Subject"][["share", "row_share", "needed"]].round(3)
                 share  row_share  needed
            PC1  0.946      0.935    True
            PC2  0.054      0.065    True
        """
        return variance.principal_components(self.record)
