"""The methods of a generalised linear mixed model that test, estimate intervals and resample: a thin face."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from mixjax.checks import InferenceWarning, warn
from mixjax.estimation.glmm_many import KEEP
from mixjax.face.generalized_summary import check_ratios
from mixjax.fitted import parameters
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.fitted.names import names_apart, responses_of_rows
from mixjax.fitted.options import BOOTSTRAPS, DROP1, INTERVALS, RATIOS, option
from mixjax.formula.response import check_many
from mixjax.inference.fixed import hypotheses
from mixjax.inference.random import variance
from mixjax.inference.random.variance import Approximation
from mixjax.inference.wald import wald_intervals
from mixjax.resampling.bootstrap import Bootstrap
from mixjax.resampling.bootstrap import bootstrap as run_bootstrap

if TYPE_CHECKING:
    from mixjax.face.batches import ModelBatch
    from mixjax.inference.fixed.marginal_means import MarginalMeans
    from mixjax.inference.fixed.robust_family import FamilyRobust
    from mixjax.inference.random.profile import Profile


class GeneralizedInferring:
    """Methods of an object with a ``record``. Tests and intervals are by the normal and the chi-square distribution,
    with standard errors that take account of the covariances being estimated."""

    record: GeneralizedFitted

    # --- hypotheses about the fixed effects ---------------------------------------------------------------------------

    def test(self, L: Any, joint: bool | None = None, adjust: str = "none", level: float = 0.95) -> pd.DataFrame:
        """Test linear hypotheses about the fixed effects, on the scale of the linear predictor.

        Args:
            L: ``"Days = 0.5"``, ``"recipe[T.B] = recipe[T.C]"``, a list of such, a dict column -> weight, or an array
                ``(p,)`` or ``(r, p)`` whose combinations are zero under the hypothesis. lme4's names are understood.
            joint: True for one chi-square test of all rows, False for a z test of each; None: chi-square of several, z
                of one, and z tests wherever they are adjusted.
            adjust: of several z tests: ``"mvt"`` (multivariate normal), ``"sidak"``, ``"scheffe"``, ``"bonferroni"``,
                ``"holm"``, ``"fdr"`` or ``"none"``. level: of the intervals.

        Returns:
            DataFrame; z tests: estimate, std_error, df (infinite), lower, upper, statistic, p_value. Chi-square test:
            statistic, df, p_value.

        Example:
            >>> import mixjax as mj
            >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
            >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
            >>> fit.test("Days = 0.5")["p_value"].round(3).tolist()
            [0.385]
        """
        return hypotheses.test(self.record, L, "wald", joint, adjust, level)

    def anova(self, type: str = "III") -> pd.DataFrame:
        """Wald chi-square tests of the terms of the fixed effects, as ``car::Anova``.

        Args:
            type: ``"I"`` sequential, ``"II"`` adjusted for all terms that do not contain it, ``"III"`` for all.

        Returns:
            DataFrame: statistic (chi-square), df, p_value; one row per term. A term that others determine has df 0 and
            no numbers.

        Example:
            >>> import mixjax as mj
            >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
            >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
            >>> fit.anova().round(2)
                  statistic  df  p_value
            Days      35.62   1      0.0
        """
        return hypotheses.anova(self.record, type, "wald")

    def drop1(self, test: Literal["lrt"] = "lrt") -> pd.DataFrame:
        """Test the terms of the fixed effects that no other term contains, each left out by itself, as ``lme4``'s
        ``drop1(test = "Chisq")``; see :func:`mixjax.inference.fixed.drop1.drop1`.

        Args:
            test: ``"lrt"``, also called ``"chisq"``: likelihood ratios.

        Returns:
            DataFrame: npar, loglik, aic, lrt, df, p_value; ``<none>`` and one row per term.

        Example:
            >>> import mixjax as mj
            >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
            >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
            >>> fit.drop1()["lrt"].round(2).to_dict()
            {'<none>': nan, 'Days': 60.27}
        """
        from mixjax.inference.fixed.drop1 import drop1

        return drop1(self.record, option(test, DROP1))

    def ranova(
        self,
        method: Literal["mixture", "chi2", "bootstrap"] = "mixture",
        reduce: bool = True,
        key: Any = 0,
        n: int = 1000,
    ) -> pd.DataFrame:
        """Likelihood ratio tests of the random effects, each left out by itself, the last one against a generalised
        linear model; see :func:`mixjax.inference.random.ranova.ranova`.

        Args:
            method: ``"chi2"``: chi-square p-values. ``"mixture"``: also of the mixture of chi-squares that holds where
                one variance is 0. ``"bootstrap"``: also by simulation.
            reduce: ``(x | g)`` becomes ``(1 | g)``; False: whole terms are left out.
            key, n: of the bootstrap.

        Returns:
            DataFrame: npar, loglik, aic, lrt, df, p_value, p_mixture, ...; ``<none>`` and one row per smaller model,
            which :meth:`without` fits.

        Example:
            >>> import mixjax as mj
            >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
            >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
            >>> fit.ranova()["lrt"].round(2).to_dict()
            {'<none>': nan, '(1 | Subject)': 25.46}
        """
        from mixjax.inference.random.ranova import ranova

        return ranova(self.record, option(method, RATIOS), reduce, key, n)

    def joint_tests(self, by: Any = None) -> pd.DataFrame:
        """Tests of every factor and interaction by its marginal means on the scale of the linear predictor, also within
        the levels of others, as ``emmeans::joint_tests``; see :func:`mixjax.inference.fixed.joint_tests.joint_tests`.

        Args:
            by: a factor or a list of factors within whose levels to test.

        Returns:
            DataFrame: the columns of ``by``, term, num_df, den_df (infinite), statistic (chi-square over num_df),
            p_value.
        """
        from mixjax.inference.fixed.joint_tests import joint_tests

        return joint_tests(self.record, by, "wald")

    def emmeans(
        self,
        spec: Any,
        by: Any = None,
        at: Mapping[str, Any] | None = None,
        scale: Literal["link", "response"] | None = None,
        integrate: bool = False,
        component: Literal["cond", "response"] | None = None,
        level: float = 0.95,
    ) -> MarginalMeans:
        """Marginal means of factors, as R's ``emmeans``: of a grid of all levels, with covariates at their means and
        random effects zero, or averaged over these; see :func:`mixjax.inference.fixed.generalized_means.emmeans`.

        Args:
            spec: a factor, a list of factors, ``"arm * visit"`` for the cells of both, ``"arm | visit"`` for arms
                within the levels of visit, ``"1"`` for the overall mean. What is not named is averaged over.
            by: factors within whose levels contrasts are made, as behind the bar.
            at: variable -> value or values to use instead of the mean, or of all levels. Offsets count with their
                mean over the rows, those of the formula unless a variable that they read is given.
            scale: ``"link"``: of the linear predictor. ``"response"``: means of the median subject; contrasts are odds
                ratios (logit), ratios (log) or differences. None: the first, or the second with ``integrate=True``.
            integrate: average means over the random effects: the population's means; contrasts are differences.
            component: with ``ziformula=``, on the scale of the response: ``"cond"``, of counts that are no extra zeros,
                or of the ``"response"``, extra zeros among them, with differences. None: the latter.
            level: coverage of the intervals.

        Returns:
            MarginalMeans: ``.to_frame()``, ``.contrasts()``, ``.letters()``, ``str()``; of means of the response also
            ``.regrid("log")`` and ``.regrid("logit")``, whose contrasts are ratios of means and of odds.

        Raises:
            DataError: unknown variables or levels, the response, a covariate without values.

        Example:
            >>> import mixjax as mj
            >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
            >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
            >>> means = fit.emmeans("Days", at={"Days": [1, 0]}, scale="response")
            >>> means.contrasts()[["contrast", "odds_ratio", "lower", "upper"]].round(2)
              contrast  odds_ratio  lower  upper
            0    1 / 0         1.8   1.48   2.18
        """
        from mixjax.inference.fixed.generalized_means import emmeans

        return emmeans(self.record, spec, by, at, scale, integrate, component, level)

    def emtrends(
        self, spec: Any, var: str, by: Any = None, at: Mapping[str, Any] | None = None, level: float = 0.95
    ) -> MarginalMeans:
        """Slopes of the linear predictor in a covariate, by factors, as R's ``emtrends``.

        Args:
            spec, by, at, level: as of :meth:`emmeans`.
            var: the covariate; slopes are taken at its mean, or at the values of ``at``.

        Returns:
            MarginalMeans; estimates are changes of the linear predictor per unit of ``var``.
        """
        from mixjax.inference.fixed.means import emtrends

        return emtrends(self.record, spec, var, by, at, "wald", level)

    def robust(self, cluster: Any = None, kind: Literal["CR1", "CR0"] = "CR1") -> FamilyRobust:
        """Cluster-robust covariance of the fixed effects, for many clusters; see
        :func:`mixjax.inference.fixed.robust_family.robust_family`.

        Args:
            cluster: grouping factor, column or labels; None for the outermost grouping factor.
            kind: ``"CR1"`` or ``"CR0"``.

        Returns:
            FamilyRobust: ``.to_frame()``, ``.confint()``, ``.test(L)``, ``.vcov``.
        """
        from mixjax.inference.fixed.robust_family import robust_family

        return robust_family(self.record, cluster, kind)

    # --- intervals and resampling -------------------------------------------------------------------------------------

    def confint(
        self,
        parm: Any = None,
        level: float = 0.95,
        method: Literal["profile", "wald", "bootstrap"] = "profile",
        key: Any = 0,
        n: int = 1000,
        kind: Literal["percentile", "basic", "normal", "bca"] = "percentile",
        exponentiate: bool = False,
    ) -> pd.DataFrame:
        """Confidence intervals of all parameters.

        Args:
            parm: names of rows, also as in lme4 (``.sig01``, ``(Intercept)``), ``"theta_"`` or ``"beta_"``; None for
                all.
            level: coverage.
            method: ``"profile"``: all values that a likelihood ratio test does not reject, see :meth:`profile`; of a
                fit by the restricted likelihood those of its ML refit, and a warning says so. ``"wald"``: standard
                deviations and parameters of the family on the log scale, correlations on Fisher's. ``"bootstrap"``:
                parametric; for cases, statistics or many intervals from one sample see :meth:`bootstrap`. Fixed effects
                are on the scale of the linear predictor.
            key, n, kind: of the bootstrap: random key, replicates, how its interval is made.
            exponentiate: intervals of the fixed effects as ratios, of odds (logit), of means (log), of hazards
                (cloglog): exponentials of the ends. The other rows stay.

        Returns:
            DataFrame with columns ``lower``, ``upper``; rows ``sd_Intercept|Subject``, ...,
            ``cor_Days.Intercept|Subject``, parameters of the family, then the fixed effects. ``attrs["notes"]`` of
            profile intervals says what there is to say.

        Raises:
            ValueError: no such method or parameter; there are no profiles of the model.

        Warns:
            InferenceWarning: an interval ends on the boundary, or there is none; refits failed.

        Example:
            >>> import mixjax as mj
            >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
            >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
            >>> fit.confint("Days").round(2).loc["Days"].tolist()
            [0.41, 0.8]
            >>> fit.confint("Days", method="wald").round(2).loc["Days"].tolist()
            [0.39, 0.78]
        """
        method = option(method, INTERVALS)
        if exponentiate:
            check_ratios(self.record.family.link)
        if method == "profile":
            frame = self.profile(parm).confint(level)
            for note in frame.attrs["notes"]:
                warn(note, InferenceWarning)
        elif method == "wald":
            frame = wald_intervals(self.record, level)
        elif method == "bootstrap":
            frame = run_bootstrap(self.record, key, n).confint(level, option(kind, BOOTSTRAPS))
        else:
            raise ValueError(f"method must be 'profile', 'wald' or 'bootstrap', got {method!r}")
        if method != "profile":
            frame = frame.loc[parameters.select(parm, list(frame.index), len(self.record.labels.fixed))]
        if not exponentiate:
            return frame
        fixed = names_apart(self.record.labels.fixed, self.record.variance_parameters.names)
        ratios = frame.copy()
        ratios.loc[frame.index.isin(fixed)] = np.exp(frame[frame.index.isin(fixed)])
        return ratios

    def profile(self, parm: Any = None) -> Profile:
        """Profile the -2 log-likelihood along parameters; see :class:`mixjax.inference.random.profile.Profile`.

        Args:
            parm: names, also as in lme4; None for all: standard deviations, correlations, parameters of the family,
                fixed effects.

        Returns:
            Profile: ``.confint(level)``, ``.to_frame()`` (parameter, value, zeta), ``.zeta(name, values)``.

        Raises:
            ValueError: a fit by quadrature with several random effects a level, with ``nagq=0``, or one that did not
                converge; ``rr`` or ``fa``.

        Example:
            >>> import mixjax as mj
            >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
            >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
            >>> fit.profile().confint().round(2).loc["sd_Intercept|Subject"].tolist()
            [0.98, 3.03]
        """
        from mixjax.inference.random.profile import profile  # splines of scipy.interpolate, which takes long to load

        return profile(self.record, parm)

    def bootstrap(
        self,
        key: Any,
        n: int,
        kind: Literal["parametric", "cases"] = "parametric",
        statistic: Callable[[Any], Any] | None = None,
        chunk: int | None = None,
        progress: bool | None = None,
        modes: bool = False,
        engine: Literal["auto", "numpy", "jax"] = "auto",
    ) -> Bootstrap:
        """Draw n data sets from the fit and refit each; see :func:`mixjax.resampling.bootstrap.bootstrap`.

        Args:
            key, n, kind, chunk, progress, modes, engine: as there; of the ``statistic``, a function of one
                :class:`~mixjax.GLMMEstimates`.

        Returns:
            Bootstrap: ``.replicates``, ``.std_error``, ``.bias``, ``.confint(level, kind)``, ``.counts``, in which
            separated replicates and those with an unbounded estimate stand by name.

        Example:
            >>> import mixjax as mj
            >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
            >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
            >>> fit.bootstrap(key=1, n=50).replicates.shape
            (50, 3)
        """
        return run_bootstrap(self.record, key, n, kind, statistic, chunk, progress, modes=modes, engine=engine)

    def refit_many(self, Y: Any, ranef: bool = False, engine: Literal["auto", "numpy", "jax"] = "auto") -> ModelBatch:
        """The same model fitted to many responses, for example simulated ones; see :func:`mixjax.glmm_estimate_many`.

        Args:
            Y: ``(B, nobs)``, one response per row, in the order of the used rows, or as many columns as the table of
                the fit has rows; columns of a data frame that are the table's labels are lined up. Of a binomial
                response 0 and 1, or counts of successes; the numbers of trials stay. Missing values make that one fit
                fail, and no other; so does a response without finite estimates (``SEPARATED``, ``UNBOUNDED``).
            ranef: keep the random effects of all fits, for the result's ``ranef()`` and ``coef()``.
            engine: ``"numpy"`` or ``"jax"``; ``"auto"`` compiles a program where that pays.

        Returns:
            :class:`~mixjax.face.batches.ModelBatch`: frames with one row per response, counts of what went wrong, and
            ``.test(L)``.

        Raises:
            DataError: another shape, or values that are none of the family's.

        Example:
            >>> import mixjax as mj
            >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
            >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
            >>> fit.refit_many(fit.simulate(key=0, n=3)).fixef.shape
            (3, 2)
        """
        labels, record = self.record.labels, self.record
        Y = responses_of_rows(labels, Y)
        check_many(Y, record.design.size, labels.response, record.family)
        est = record.fit_many(Y, (*KEEP, "Sigma", "vcov", *["b"] * ranef), engine)
        from mixjax.face.batches import ModelBatch

        return ModelBatch(est, labels, record.layout.structures, record.family, self, Y)

    def simulate(self, key: Any, n: int, random: Literal["new", "fitted"] = "new") -> np.ndarray:
        """Responses ``(n, nobs)`` drawn from the fit, of a binomial family counts of successes.

        Args:
            key: int or JAX key; response i depends on it and on i alone.
            n: how many.
            random: random effects drawn anew for every response, or those predicted for these data.
        """
        return self.record.simulate(key, n, random=random)

    # --- where the variance lies --------------------------------------------------------------------------------------

    def icc(self, by_group: bool = False, approximation: Approximation | None = None) -> pd.Series:
        """Intraclass correlation on the scale of the linear predictor, ``adjusted`` and ``unadjusted``, or one for
        every grouping factor; see :func:`mixjax.inference.random.variance.icc`.

        Args:
            by_group: one for every grouping factor.
            approximation: how the variance of a row on that scale is got (Nakagawa, Johnson & Schielzeth 2017): None
                for pi^2/3, 1 or pi^2/6 of binomial responses with link logit, probit or cloglog, the trigamma function
                of counts and gamma responses with link log, the delta method of others; ``"trigamma"``,
                ``"lognormal"``, ``"delta"``. With ``dispformula=`` the mean over the rows; with ``ziformula=`` there is
                none.

        Example:
            >>> import mixjax as mj
            >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
            >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
            >>> fit.icc().round(2).to_dict()
            {'adjusted': 0.48, 'unadjusted': 0.33}
        """
        return variance.icc(self.record, by_group, approximation)

    def r2(self, approximation: Approximation | None = None) -> pd.Series:
        """Shares of explained variance on the scale of the linear predictor: ``marginal``, by the fixed effects, and
        ``conditional``, by random ones too. ``approximation`` as of :meth:`icc`."""
        return variance.r2(self.record, approximation)

    def variance_shares(self, approximation: Approximation | None = None) -> pd.DataFrame:
        """Variance and its share by component, on the scale of the linear predictor: columns ``component``
        (``"random"``, ``"residual"``, ``"fixed"``), group, effects, variance, share; ``approximation`` as of
        :meth:`icc`."""
        return variance.shares(self.record, approximation)

    def variance_parameters(self) -> pd.DataFrame:
        """Standard deviations and correlations on the scale of the linear predictor, and parameters of the family, with
        delta-method standard errors: ``estimate``, ``std_error``. NaN on the boundary."""
        found = self.record.variance_parameters
        columns = {"estimate": found.estimate, "std_error": found.std_error}
        return pd.DataFrame(columns, index=pd.Index(found.names, name="parameter"))
