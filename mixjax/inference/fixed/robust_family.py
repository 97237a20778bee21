"""Cluster-robust (sandwich) covariance of the estimates of a generalised linear mixed model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pandas as pd

from mixjax.checks import check_level
from mixjax.design import refuse_smooths
from mixjax.distributions import normal_quantile
from mixjax.estimation.glmm_scores import cluster_scores
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.inference.fixed import hypotheses
from mixjax.inference.fixed.clusters import clusters_of
from mixjax.markup import Report, Reported
from mixjax.tables import frame_report

KINDS = ("CR1", "CR0")


@dataclass(frozen=True, repr=False)
class FamilyRobust(Reported):
    """Cluster-robust inference about the fixed effects of a generalised model; made by :func:`robust_family`.

    Attributes:
        fitted: the fit, with the robust covariance in the place of its own. kind: ``"CR1"`` or ``"CR0"``. cluster: what
            the clusters are. n_clusters: m.
    """

    fitted: GeneralizedFitted
    kind: str
    cluster: str
    n_clusters: int

    @property
    def vcov(self) -> pd.DataFrame:
        """``(p, p)`` covariance of the fixed effects."""
        names = list(self.fitted.labels.fixed)
        return pd.DataFrame(self.fitted.estimates.vcov, index=names, columns=names)

    def to_frame(self) -> pd.DataFrame:
        """One row per fixed effect: ``estimate``, ``std_error``, ``statistic`` (z), ``p_value`` (two-sided)."""
        terms = list(self.fitted.labels.fixed)
        found = hypotheses.test(self.fitted, np.eye(len(terms)), "wald", joint=False)
        own: pd.DataFrame = found.set_axis(terms)[["estimate", "std_error", "statistic", "p_value"]]
        return own.rename_axis(index="term")

    def confint(self, level: float = 0.95) -> pd.DataFrame:
        """Normal intervals: columns ``lower``, ``upper``."""
        check_level(level)
        table = self.to_frame()
        reach = float(normal_quantile((1 + level) / 2)) * table["std_error"]
        return pd.DataFrame({"lower": table["estimate"] - reach, "upper": table["estimate"] + reach})

    def test(self, L: Any, joint: bool | None = None, adjust: str = "none", level: float = 0.95) -> pd.DataFrame:
        """Hypotheses about the fixed effects, as :meth:`mixjax.GLMMFit.test`; a joint test of as many hypotheses as
        there are clusters, or more, does not exist.

        Raises:
            ValueError: so many hypotheses.
        """
        q = np.linalg.matrix_rank(hypotheses.contrast_matrix(self.fitted, L).L)
        if joint is not False and q > 1 and q >= self.n_clusters:
            raise ValueError(f"{q} hypotheses together and {self.n_clusters} clusters: their covariance is singular")
        return hypotheses.test(self.fitted, L, "wald", joint, adjust, level)

    def _report(self) -> Report:
        note = f"{self.kind} covariance of {self.n_clusters} clusters, {self.cluster}; z tests, for many clusters"
        return frame_report(self.to_frame(), ["Cluster-robust tests of the fixed effects"], [note])

    def __repr__(self) -> str:
        return f"<FamilyRobust {self.kind}, {self.n_clusters} clusters: {self.cluster}>\n{self.to_frame()}"


def robust_family(fitted: GeneralizedFitted, cluster: Any = None, kind: str = "CR1") -> FamilyRobust:
    """Cluster-robust covariance of the estimates: ``V (sum_j s_j s_j') V``, with V the inverse of the joint Hessian of
    all parameters and ``s_j`` the score of cluster j (White 1982, Econometrica 50, 1; Freedman 2006, Am. Stat. 60, 299,
    on what it is an error of where the model is wrong).

    Args:
        fitted: by Laplace's approximation or quadrature.
        cluster: name of a grouping factor or column of the model, or ``(nobs,)`` labels of the used rows; None: the
            grouping factor in which all others are nested.
        kind: ``"CR0"``: as above. ``"CR1"``: times ``m / (m - 1)``, as Stata's ``vce(cluster)``.

    Returns:
        :class:`FamilyRobust`.

    Raises:
        ValueError: no such kind; clusters that share random effects; a restricted fit, one with ``nagq=0``, or one that
            did not converge.

    Example:
        >>> import mixjax as mj
        >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
        >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
        >>> fit.robust().to_frame()["std_error"].round(3).to_dict()
        {'Intercept': 0.897, 'Days': 0.132}
    """
    refuse_smooths(
        fitted.labels, "robust errors", "rows of all clusters share its curve; bs(x, df=4) is a fixed effect"
    )
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if fitted.reml or fitted.nagq == 0:
        own = "reml=True: use fit.refit(reml=False)" if fitted.reml else "nagq=0: fit it with nagq=1"
        raise ValueError(f"scores are those of maximum likelihood, and this fit has {own}")
    if not fitted.estimates.converged:
        raise ValueError("the fit did not converge: its scores are not zero together")
    name, codes = clusters_of(fitted, cluster)
    scores = cluster_scores(fitted.rows, fitted.estimates, codes, fitted.curvature, fitted.nagq)
    m, p = len(scores), len(fitted.estimates.beta)
    half = fitted.estimates.vcov_all @ scores.T
    covariance = half @ half.T * (m / (m - 1) if kind == "CR1" else 1.0)
    estimates = fitted.estimates._replace(vcov=covariance[:p, :p], vcov_all=covariance)
    return FamilyRobust(replace(fitted, estimates=estimates), kind, name, m)
