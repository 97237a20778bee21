"""The methods of a generalised linear mixed model that test, estimate intervals and resample: a thin face."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import pandas as pd

from mixjax.fitted import parameters
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.inference.fixed import hypotheses
from mixjax.inference.wald import wald_intervals

if TYPE_CHECKING:
    from mixjax.inference.fixed.marginal_means import MarginalMeans


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
        level: float = 0.95,
    ) -> MarginalMeans:
        """Marginal means of factors, as R's ``emmeans``: of a grid of all levels, with covariates at their means and
        random effects zero, or averaged over these; see :func:`mixjax.inference.fixed.generalized_means.emmeans`.

        Args:
            spec: a factor, a list of factors, ``"arm * visit"`` for the cells of both, ``"arm | visit"`` for arms
                within the levels of visit, ``"1"`` for the overall mean. What is not named is averaged over.
            by: factors within whose levels contrasts are made, as behind the bar.
            at: variable -> value or values to use instead of the mean, or of all levels.
            scale: ``"link"``: of the linear predictor. ``"response"``: means of the median subject; contrasts are odds
                ratios (logit), ratios (log) or differences. None: the first, or the second with ``integrate=True``.
            integrate: average means over the random effects: the population's means; contrasts are differences.
            level: coverage of the intervals.

        Returns:
            MarginalMeans: ``.to_frame()``, ``.contrasts()``, ``.letters()``, ``str()``.

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

        return emmeans(self.record, spec, by, at, scale, integrate, level)

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

    # --- intervals and resampling -------------------------------------------------------------------------------------

    def confint(self, parm: Any = None, level: float = 0.95, method: Literal["wald"] = "wald") -> pd.DataFrame:
        """Confidence intervals of all parameters.

        Args:
            parm: names of rows, also as in lme4 (``.sig01``, ``(Intercept)``), ``"theta_"`` or ``"beta_"``; None for
                all.
            level: coverage.
            method: ``"wald"``: fixed effects on the scale of the linear predictor; standard deviations and parameters
                of the family on the log scale, correlations on Fisher's.

        Returns:
            DataFrame with columns ``lower``, ``upper``; rows ``sd_Intercept|Subject``, ...,
            ``cor_Days.Intercept|Subject``, parameters of the family, then the fixed effects.

        Warns:
            InferenceWarning: there is no interval, because a parameter is on its boundary.

        Example:
            >>> import mixjax as mj
            >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
            >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
            >>> fit.confint("Days").round(2).loc["Days"].tolist()
            [0.39, 0.78]
        """
        if method != "wald":
            raise ValueError(f"method must be 'wald', got {method!r}")
        frame = wald_intervals(self.record, level)
        return frame.loc[parameters.select(parm, list(frame.index), len(self.record.labels.fixed))]

    def simulate(self, key: Any, n: int, random: Literal["new", "fitted"] = "new") -> np.ndarray:
        """Responses ``(n, nobs)`` drawn from the fit, of a binomial family counts of successes.

        Args:
            key: int or JAX key; response i depends on it and on i alone.
            n: how many.
            random: random effects drawn anew for every response, or those predicted for these data.
        """
        return self.record.simulate(key, n, random=random)

    def variance_parameters(self) -> pd.DataFrame:
        """Standard deviations and correlations on the scale of the linear predictor, and parameters of the family, with
        delta-method standard errors: ``estimate``, ``std_error``. NaN on the boundary."""
        found = self.record.variance_parameters
        columns = {"estimate": found.estimate, "std_error": found.std_error}
        return pd.DataFrame(columns, index=pd.Index(found.names, name="parameter"))
