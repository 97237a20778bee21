"""Cluster-robust (sandwich) covariance of the fixed effects, with degrees of freedom for few clusters.

:mod:`mixjax.inference.fixed.clusters` has the notation, and what every cluster leaves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mixjax.checks import InferenceWarning, warn
from mixjax.design import refuse_smooths
from mixjax.distributions import f_tail, t_quantile, t_tail
from mixjax.fitted.record import Fitted, record_of
from mixjax.inference.fixed.clusters import NOTHING, Moments, clusters_of, moments_of
from mixjax.inference.fixed.hypotheses import Hypotheses, contrast_matrix
from mixjax.markup import Report, Reported
from mixjax.tables import frame_report

KINDS = ("CR2", "CR1", "CR0")


@dataclass(frozen=True, repr=False)
class Robust(Reported):
    """Cluster-robust inference about the fixed effects; made by :func:`robust`.

    Attributes:
        fitted: the fit. kind: ``"CR2"``, ``"CR1"`` or ``"CR0"``. cluster: what the clusters are. n_clusters: m.
        vcov: DataFrame ``(p, p)``, absolute covariance of the fixed effects.
        shown: what :meth:`to_frame` and :meth:`confint` show.
        moments: what the clusters left.
    """

    fitted: Fitted
    kind: str
    cluster: str
    n_clusters: int
    vcov: pd.DataFrame
    shown: Hypotheses
    moments: Moments

    def to_frame(self) -> pd.DataFrame:
        """One row per fixed effect, or per hypothesis where ``L`` was given.

        Columns ``estimate``, ``std_error``, ``df`` (Satterthwaite), ``statistic``, ``p_value`` (two-sided).
        """
        return self._rows(self.shown).rename_axis(index="term")

    def confint(self, level: float = 0.95) -> pd.DataFrame:
        """Intervals from t distributions: columns ``lower``, ``upper``; rows as :meth:`to_frame`."""
        if not 0 < level < 1:
            raise ValueError(f"level must lie between 0 and 1, got {level!r}")
        table = self.to_frame()
        reach = t_quantile((1 + level) / 2, table["df"]) * table["std_error"]
        return pd.DataFrame({"lower": table["estimate"] - reach, "upper": table["estimate"] + reach})

    def test(self, L: Any, joint: bool | None = None) -> pd.DataFrame:
        """Test hypotheses about the fixed effects.

        One: t test with Satterthwaite's df. Several: one joint Wald test, its statistic Q referred to Hotelling's T^2
        with eta degrees of freedom, ``(eta - q + 1) / (eta q) Q ~ F(q, eta - q + 1)``, eta such that a Wishart matrix
        has the total variance that the estimator has under the working model (Pustejovsky & Tipton 2018: AHT;
        clubSandwich's ``"HTZ"``). Rows that others determine are left out of a joint test.

        Args:
            L: whatever :func:`~mixjax.inference.fixed.hypotheses.contrast_matrix` reads: ``"Days = 10"``, an array
                ``(p,)`` or ``(r, p)``, a list of strings, ...
            joint: True for one F test of all, False for a t test of each; None: joint where there are several.

        Returns:
            DataFrame. t tests: columns as :meth:`to_frame`. Joint: one row of ``num_df``, ``den_df``, ``statistic``
            (F), ``p_value``.

        Warns:
            InferenceWarning: too few clusters for so many hypotheses; the p value is then NaN.
        """
        hypotheses = contrast_matrix(self.fitted, L)
        if joint if joint is not None else len(hypotheses.L) > 1:
            return self._jointly(hypotheses)
        return self._rows(hypotheses)

    def _report(self) -> Report:
        note = f"{self.kind} covariance of {self.n_clusters} clusters, {self.cluster}; Satterthwaite degrees of freedom"
        return frame_report(self.to_frame(), ["Cluster-robust tests of the fixed effects"], [note])

    def __repr__(self) -> str:
        return f"<Robust {self.kind}, {self.n_clusters} clusters: {self.cluster}>\n{self.to_frame()}"

    def _rows(self, hypotheses: Hypotheses) -> pd.DataFrame:
        L, rhs, names = hypotheses
        C = L @ self.moments.half
        df, exists = satterthwaite(C, self.moments)
        if not exists.all():
            lost = [name for name, there in zip(names, exists, strict=True) if not there]
            warn(
                f"no robust standard error of {', '.join(map(repr, lost))}: a single cluster determines it in part, "
                "as with a column that is zero in all others, and there is nothing to compare that with",
                InferenceWarning,
            )
        estimate = L @ self.fitted.estimates.beta
        se = np.where(exists, np.linalg.norm(C @ self.moments.scores.T, axis=1), np.nan)
        statistic = (estimate - rhs) / se
        p_value = 2 * t_tail(np.abs(statistic), df)
        columns = {"estimate": estimate, "std_error": se, "df": df, "statistic": statistic, "p_value": p_value}
        return pd.DataFrame(columns, index=names)

    def _jointly(self, hypotheses: Hypotheses) -> pd.DataFrame:
        L, rhs, names = hypotheses
        C = L @ self.moments.half
        length = np.linalg.norm(C, axis=1)
        U, sizes, C = np.linalg.svd(C / length[:, None], full_matrices=False)
        q = int((sizes > 1e-9 * sizes[0]).sum())
        values = U.T @ ((L @ self.fitted.estimates.beta - rhs) / length)
        if np.abs(values[q:]).max(initial=0.0) > 1e-6 * np.abs(values).max():
            raise ValueError("the hypotheses contradict each other: no coefficients satisfy all of them")
        C, values = C[:q], values[:q] / sizes[:q]
        eta, half = hotelling(C, self.moments), C @ self.moments.scores.T
        spread = np.linalg.eigvalsh(half @ half.T)
        den_df, statistic, p_value = eta - q + 1, np.nan, np.nan
        if den_df > 0 and spread[0] > NOTHING * spread[-1]:
            statistic = den_df / (eta * q) * (values @ np.linalg.solve(half @ half.T, values))
            p_value = f_tail(statistic, q, den_df)
        else:
            warn(
                f"no joint robust test of {q} hypotheses: {self.n_clusters} clusters are too few, or a single one "
                "determines a part of them; test fewer together",
                InferenceWarning,
            )
        columns = {"num_df": q, "den_df": den_df, "statistic": statistic, "p_value": p_value}
        return pd.DataFrame(columns, index=[", ".join(names)])


def robust(fitted: Any, cluster: Any = None, kind: str = "CR2", L: Any = None) -> Robust:
    """Cluster-robust covariance of the fixed effects: right for any covariance within clusters, if those are many.

    The working covariance V is the model's marginal covariance, taken as known, and the weights are its inverse, as
    clubSandwich does for lme4's fits. ``"CR0"``: no correction. ``"CR1"``: times ``m / (m - 1)``. ``"CR2"``: unbiased
    if V is right (bias-reduced linearisation, Bell & McCaffrey 2002, Surv. Methodol. 28, 169), with ``A_j = D_j'
    B_j^{+1/2} D_j``, ``D_j' D_j = V_j``, ``B_j = D_j (V_j - X_j M X_j') D_j'``, and ``^{+1/2}`` the root of the
    pseudo-inverse (Pustejovsky & Tipton 2018, J. Bus. Econ. Stat. 36, 672). Degrees of freedom are those that make a
    chi-square variable as variable as the estimated variance is if V is right, ``2 E^2 / Var``, from the same sources.
    Precision weights and offset are those of the fit.

    Args:
        fitted: fit with rows, as :func:`mixjax.lmm` returns it.
        cluster: name of a grouping factor or column of the model, or ``(nobs,)`` labels of the used rows. A pandas
            Series is lined up by its index. None: the grouping factor in which all others are nested.
        kind: ``"CR2"``, ``"CR1"`` or ``"CR0"``.
        L: combinations to show instead of single fixed effects, as in :meth:`Robust.test`.

    Returns:
        :class:`Robust`.

    Raises:
        ValueError: some random effect is shared by several clusters, which then are not independent; or there is one
            cluster only.

    Warns:
        InferenceWarning: a combination has no robust standard error (NaN).

    Example:
        >>> import mixjax as mj
        >>> from mixjax.inference.fixed.robust import robust
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> robust(fit).to_frame().round(3)
                   estimate  std_error    df  statistic  p_value
        term
        Intercept   251.405      6.825  17.0     36.838      0.0
        Days         10.467      1.546  17.0      6.771      0.0
    """
    fitted = record_of(fitted)
    fitted.check_can("cluster-robust covariances")
    refuse_smooths(
        fitted.labels, "robust errors", "rows of all clusters share its curve; bs(x, df=4) is a fixed effect"
    )
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    terms = list(fitted.labels.fixed)
    if not terms:
        raise ValueError("the model has no fixed effects: there is no covariance of them")
    shown = Hypotheses(np.eye(len(terms)), np.zeros(len(terms)), terms) if L is None else contrast_matrix(fitted, L)
    name, codes = clusters_of(fitted, cluster)
    moments = moments_of(fitted, codes, kind)
    half = moments.half @ moments.scores.T
    vcov = pd.DataFrame(half @ half.T, index=terms, columns=terms)
    return Robust(fitted, kind, name, len(moments.scores), vcov, shown, moments)


# --- degrees of freedom ----------------------------------------------------------------------------------------------


def satterthwaite(C: np.ndarray, moments: Moments) -> tuple[np.ndarray, np.ndarray]:
    """Degrees of freedom ``(r,)`` of combinations ``C gamma``, NaN where there is no variance, and where there is one.

    The estimated variance of a row c is ``sum_j (p_j' y)^2``. Under the working model ``p_i' V p_j = [i = j] c' own_j c
    - (pull_i c)' (pull_j c)`` =: P_ij, the mean is tr P and the variance ``2 sum_ij P_ij^2`` (Bell & McCaffrey 2002).
    """
    d = np.einsum("rp,jpq,rq->rj", C, moments.own, C)
    h = np.einsum("jpq,rq->rjp", moments.pull, C)
    hh = (h * h).sum(2)
    mean = (d - hh).sum(1)
    G = np.einsum("rjp,rjq->rpq", h, h)
    squares = (d * d - 2 * d * hh).sum(1) + (G * G).sum((1, 2))
    exists = moments.are_seen(C) & (mean > NOTHING * (C * C).sum(1))
    return np.divide(mean**2, squares, out=np.full(len(C), np.nan), where=exists), exists


def hotelling(C: np.ndarray, moments: Moments) -> float:
    """Degrees of freedom eta of the covariance of several combinations ``C gamma (q, p)`` as a Wishart matrix.

    ``eta = q (q + 1) / sum_st Var(D_st)`` for the estimator D scaled to mean I under the working model. NaN where
    there is no variance in some direction.
    """
    d = np.einsum("sp,jpq,tq->stj", C, moments.own, C)
    h = np.einsum("jpq,sq->sjp", moments.pull, C)
    sizes, vectors = np.linalg.eigh(d.sum(2) - np.einsum("sjp,tjp->st", h, h))
    if sizes[0] <= NOTHING or not moments.are_seen(C).all():
        return float("nan")
    scale = (vectors / np.sqrt(sizes)) @ vectors.T
    d, h = np.einsum("sa,abj,bt->stj", scale, d, scale), np.einsum("sa,ajp->sjp", scale, h)
    # P_st,ij = [i = j] d_st,j - h_s,i' h_t,j; Var(D_st) = tr(P_st P_st) + tr(P_ss P_tt).
    hh = np.einsum("sjp,tjp->stj", h, h)
    G = np.einsum("sjp,tjq->stpq", h, h)
    crossed = (d * d - 2 * d * hh).sum() + np.einsum("stpq,stqp->", G, G)
    d, h2 = np.einsum("ssj->sj", d), np.einsum("ssj->sj", hh)
    straight = (d.sum(0) ** 2 - 2 * d.sum(0) * h2.sum(0)).sum() + (G * G).sum()
    q = len(C)
    return float(q * (q + 1) / (crossed + straight))
