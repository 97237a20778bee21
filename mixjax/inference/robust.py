"""Cluster-robust (sandwich) covariance of the fixed effects, with degrees of freedom for few clusters.

Notation. Clusters ``j = 1 .. m`` with rows ``X_j``, residuals ``e_j = y_j - X_j beta`` and working covariance ``V_j``,
the model's own, relative to sigma^2; ``M = (sum_j X_j' V_j^{-1} X_j)^{-1}``. With ``g_j = A_j V_j^{-1} X_j``,

    vcov = M (sum_j g_j' e_j e_j' g_j) M.

Columns of X are turned once so that ``M = I``: each cluster then leaves its scores ``g_j' e_j`` and two ``(p, p)``
matrices, and nothing of the size of a cluster is kept.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats

from mixjax.bases import orthonormal_columns
from mixjax.covariance import split_theta, triangle
from mixjax.fitted import Fitted, InferenceWarning, record_of
from mixjax.formula.errors import DataError
from mixjax.formula.table import row_values
from mixjax.inference.hypotheses import Hypotheses, contrast_matrix

KINDS = ("CR2", "CR1", "CR0")
# Parts of a variance below this count as rounding: leverages this near 1, expectations this near 0.
NOTHING = 1e-10
# Numbers in one stack of clusters: 32 MB.
STACK = 4_000_000


class Moments(NamedTuple):
    """What the clusters leave, in coordinates gamma of the fixed effects with ``M = I``.

    Attributes:
        half: ``(p, p)``, ``beta = half gamma``, so that ``half half'`` is the model's covariance over ``sigma^2``.
        scores: ``(m, p)`` ``g_j' e_j``. own: ``(m, p, p)`` ``g_j' V_j g_j``. pull: ``(m, p, p)`` ``X_j' g_j``.
        alone: ``(l, p)`` unit vectors that only one cluster says anything about, whose residuals then are zero there.
    """

    half: np.ndarray
    scores: np.ndarray
    own: np.ndarray
    pull: np.ndarray
    alone: np.ndarray

    def are_seen(self, C: np.ndarray) -> np.ndarray:
        """Which combinations ``C gamma (r, p)`` more than one cluster speaks of, in all their parts."""
        return ((C @ self.alone.T) ** 2).sum(1) <= NOTHING * (C * C).sum(1)


@dataclass(frozen=True, repr=False)
class Robust:
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
        reach = scipy.stats.t.ppf((1 + level) / 2, table["df"]) * table["std_error"]
        return pd.DataFrame({"lower": table["estimate"] - reach, "upper": table["estimate"] + reach})

    def test(self, L: Any, joint: bool | None = None) -> pd.DataFrame:
        """Test hypotheses about the fixed effects.

        One: t test with Satterthwaite's df. Several: one joint Wald test, its statistic Q referred to Hotelling's T^2
        with eta degrees of freedom, ``(eta - q + 1) / (eta q) Q ~ F(q, eta - q + 1)``, eta such that a Wishart matrix
        has the total variance that the estimator has under the working model (Pustejovsky & Tipton 2018: AHT;
        clubSandwich's ``"HTZ"``). Rows that others determine are left out of a joint test.

        Args:
            L: whatever :func:`~mixjax.inference.hypotheses.contrast_matrix` reads: ``"Days = 10"``, an array ``(p,)``
                or ``(r, p)``, a list of strings, ...
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

    def __repr__(self) -> str:
        return f"<Robust {self.kind}, {self.n_clusters} clusters: {self.cluster}>\n{self.to_frame()}"

    def _rows(self, hypotheses: Hypotheses) -> pd.DataFrame:
        L, rhs, names = hypotheses
        C = L @ self.moments.half
        df, exists = satterthwaite(C, self.moments)
        if not exists.all():
            lost = [name for name, there in zip(names, exists, strict=True) if not there]
            warnings.warn(
                f"no robust standard error of {', '.join(map(repr, lost))}: a single cluster determines it in part, "
                "as with a column that is zero in all others, and there is nothing to compare that with",
                InferenceWarning,
                stacklevel=3,
            )
        estimate = L @ self.fitted.estimates.beta
        se = np.where(exists, np.linalg.norm(C @ self.moments.scores.T, axis=1), np.nan)
        statistic = (estimate - rhs) / se
        p_value = 2 * scipy.stats.t.sf(np.abs(statistic), df)
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
            p_value = scipy.stats.f.sf(statistic, q, den_df)
        else:
            warnings.warn(
                f"no joint robust test of {q} hypotheses: {self.n_clusters} clusters are too few, or a single one "
                "determines a part of them; test fewer together",
                InferenceWarning,
                stacklevel=3,
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
        >>> from mixjax.inference.robust import robust
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> robust(fit).to_frame().round(3)
                   estimate  std_error    df  statistic  p_value
        term
        Intercept   251.405      6.825  17.0     36.838      0.0
        Days         10.467      1.546  17.0      6.771      0.0
    """
    fitted = record_of(fitted)
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


# --- clusters --------------------------------------------------------------------------------------------------------


def clusters_of(fitted: Fitted, cluster: Any = None) -> tuple[str, np.ndarray]:
    """Name of the clusters and codes ``(n,)`` of every row, ``0 .. m - 1``; see :func:`robust`.

    Raises:
        ValueError: the clusters are not independent under the model, or there is one only.
    """
    groups = {
        label.group: np.asarray(term.group) for label, term in zip(fitted.labels.terms, fitted.rows.terms, strict=True)
    }
    if cluster is None:
        by_size = sorted(groups, key=lambda name: len(np.unique(groups[name])))
        outer = by_size[0]
        crossed = [name for name in by_size if not _nested(groups[name], groups[outer])]
        if crossed:
            raise ValueError(
                f"the grouping factors {', '.join(map(repr, groups))} cross: no rows are independent of the others, so "
                "there are no clusters; pass cluster= if each of their levels lies in one cluster of something larger"
            )
        name, codes = outer, groups[outer]
    else:
        name, codes = _labels_of(fitted, cluster, groups)
        for group, levels in groups.items():
            if not _nested(levels, codes):
                raise ValueError(
                    f"levels of '{group}' have rows in several clusters of '{name}': their random effects make these "
                    "clusters dependent, and the sandwich would miss it; choose clusters that hold whole levels of "
                    f"{', '.join(map(repr, groups))}"
                )
    present, codes = np.unique(codes, return_inverse=True)
    if len(present) < 2:
        raise ValueError(f"'{name}' has one cluster: robust covariances need several, better twenty and more")
    return name, codes.reshape(-1)


def _labels_of(fitted: Fitted, cluster: Any, groups: dict[str, np.ndarray]) -> tuple[str, np.ndarray]:
    frame = fitted.labels.frame
    if isinstance(cluster, str):
        if cluster in groups:
            return cluster, groups[cluster]
        if cluster not in frame:
            close = difflib.get_close_matches(cluster, known := list(dict.fromkeys([*groups, *frame.columns])), n=1)
            raise DataError(
                f"the model uses no column '{cluster}'; pass the labels themselves, as cluster=data['{cluster}'], or "
                f"{'did you mean ' + repr(close[0]) + '?' if close else 'one of ' + ', '.join(known)}"
            )
        name, labels = cluster, frame[cluster].to_numpy()
    else:
        name = str(getattr(cluster, "name", None) or "cluster")
        if isinstance(cluster, pd.Series) and len(cluster) > fitted.nobs and cluster.index.is_unique:
            # Labels of the whole table, of which the fit used some rows.
            cluster = cluster.loc[frame.index] if frame.index.isin(cluster.index).all() else cluster
        labels = row_values(name, cluster, frame.index, fitted.nobs, numbers=False)
    codes = pd.factorize(labels)[0]
    if (codes < 0).any():
        raise DataError(f"the clusters '{name}' are missing in {int((codes < 0).sum())} of the used rows")
    return name, codes


def _nested(inner: np.ndarray, outer: np.ndarray) -> bool:
    """Each level of ``inner`` has rows in one level of ``outer`` only."""
    parent = np.zeros(inner.max() + 1, outer.dtype)
    parent[inner] = outer
    return bool((parent[inner] == outer).all())


# --- what the clusters leave -----------------------------------------------------------------------------------------


class Stack(NamedTuple):
    """Clusters of one shape: c of them, k coordinates each, in which ``V = diag(noise) + U U'``.

    Attributes:
        clusters: ``(c,)``. X: ``(c, k, p)``. e: ``(c, k)`` residuals. U: ``(c, k, r)``. noise: ``(c, k)``.
    """

    clusters: np.ndarray
    X: np.ndarray
    e: np.ndarray
    U: np.ndarray
    noise: np.ndarray

    def root(self) -> np.ndarray:
        """Lower Cholesky factors of V, ``(c, k, k)``."""
        V = self.U @ _t(self.U)
        diagonal = np.arange(V.shape[1])
        V[:, diagonal, diagonal] += self.noise
        return np.linalg.cholesky(V)


def moments_of(fitted: Fitted, codes: np.ndarray, kind: str) -> Moments:
    """Pass over the clusters twice: for M, and with the columns that make it I."""
    design = fitted.rows
    weights = None if design.weights is None else np.asarray(design.weights, dtype=np.float64)
    X = np.asarray(design.X, dtype=np.float64)
    offset = 0.0 if design.offset is None else np.asarray(design.offset)
    e = np.asarray(design.y, dtype=np.float64) - offset - X @ fitted.estimates.beta
    Q, R, _ = orthonormal_columns(X, None if weights is None else np.sqrt(weights))
    X = Q if weights is None else Q / np.sqrt(weights)[:, None]
    information = np.zeros((X.shape[1],) * 2)
    for stack in _stacks(fitted, codes, X, e):
        half = np.linalg.solve(stack.root(), stack.X)
        information += (_t(half) @ half).sum(0)
    turn = np.linalg.inv(np.linalg.cholesky(information)).T
    m, p = codes.max() + 1, X.shape[1]
    scores, own, pull = np.zeros((m, p)), np.zeros((m, p, p)), np.zeros((m, p, p))
    found = []
    for stack in _stacks(fitted, codes, X @ turn, e):
        g, alone = _weighted(stack, kind)
        found.append(alone)
        if kind == "CR1":
            g = g * np.sqrt(m / (m - 1))
        Ug = _t(stack.U) @ g
        scores[stack.clusters] = (_t(g) @ stack.e[:, :, None])[:, :, 0]
        own[stack.clusters] = _t(g) @ (stack.noise[:, :, None] * g) + _t(Ug) @ Ug
        pull[stack.clusters] = _t(stack.X) @ g
    return Moments(np.linalg.solve(R, turn), scores, own, pull, np.concatenate(found))


def _weighted(stack: Stack, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """``g = A V^{-1} X (c, k, p)`` where ``M = I``, less the factor of CR1; and what these clusters alone determine.

    With ``V = L L'`` and ``D = L'``: ``g = L B^{+1/2} L^{-1} X`` and ``B = L' (V - X X') L = F' F``, where ``F =
    (I - H)^{1/2} L'L`` and ``H = L^{-1} X X' L^{-1}'``. Singular values of F range as V does, eigenvalues of B as its
    square. B loses a dimension for each combination of fixed effects that the cluster alone determines, an eigenvalue
    1 of H; counting those needs no threshold for the singular values of F.
    """
    L = stack.root()
    half = np.linalg.solve(L, stack.X)
    P, s, directions = np.linalg.svd(half, full_matrices=False)
    full = s * s > 1 - NOTHING
    alone = directions[full]
    if kind != "CR2":
        return np.linalg.solve(_t(L), half), alone
    F = _t(L) @ L
    F = F - P @ ((1 - np.where(full, 0.0, np.sqrt(np.abs(1 - s * s))))[:, :, None] * (_t(P) @ F))
    _, sizes, axes = np.linalg.svd(F)
    kept = np.arange(sizes.shape[1]) < sizes.shape[1] - full.sum(1)[:, None]
    inverse = np.where(kept, 1 / np.where(kept, sizes, 1.0), 0.0)
    return L @ (_t(axes) @ (inverse[:, :, None] * (axes @ half))), alone


def _stacks(fitted: Fitted, codes: np.ndarray, X: np.ndarray, e: np.ndarray) -> Iterator[Stack]:
    """The clusters, those with equal numbers of rows and of levels together.

    Without weights V is the identity outside the span of X and U; where that is smaller than the cluster, coordinates
    in an orthonormal basis of it say all.
    """
    weights = fitted.rows.weights
    noise = np.ones(len(e)) if weights is None else 1.0 / np.asarray(weights, dtype=np.float64)
    order, size = np.argsort(codes, kind="stable"), np.bincount(codes)
    start = np.cumsum(size) - size
    shape, effects = [size], []
    thetas = split_theta(fitted.estimates.theta, fitted.stats.layout.qs)
    for term, theta, q in zip(fitted.rows.terms, thetas, fitted.stats.layout.qs, strict=True):
        Lambda = np.zeros((q, q))
        Lambda[triangle(q)] = theta
        place, n_levels = _places(np.asarray(term.group), codes)
        effects.append((np.asarray(term.Z, dtype=np.float64) @ Lambda, place))
        shape.append(n_levels)
    shapes, which = np.unique(np.stack(shape, axis=1), axis=0, return_inverse=True)
    for s, (n, *levels) in enumerate(shapes.tolist()):
        k = X.shape[1] + sum(m * ZL.shape[1] for m, (ZL, _) in zip(levels, effects, strict=True))
        alike = np.flatnonzero(which.reshape(-1) == s)
        for some in np.array_split(alike, min(len(alike), 1 + len(alike) * n * (n + k) // STACK)):
            rows = order[start[some][:, None] + np.arange(n)]
            U = [
                (ZL[rows][:, :, None] * (place[rows][..., None] == np.arange(m))[..., None]).reshape(*rows.shape, -1)
                for m, (ZL, place) in zip(levels, effects, strict=True)
            ]
            stack = Stack(some, X[rows], e[rows], np.concatenate(U, axis=2), noise[rows])
            if weights is None and k < n:
                Qt = _t(np.linalg.qr(np.concatenate([stack.X, stack.U], axis=2))[0])
                stack = Stack(
                    some, Qt @ stack.X, np.einsum("ckn,cn->ck", Qt, stack.e), Qt @ stack.U, noise[rows[:, :k]]
                )
            yield stack


def _places(group: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Number ``(n,)`` of every row's level within its cluster, and of levels per cluster ``(m,)``."""
    levels, first, level = np.unique(group, return_index=True, return_inverse=True)
    cluster = codes[first]
    n_levels = np.bincount(cluster, minlength=codes.max() + 1)
    place = np.empty(len(levels), np.int64)
    place[np.argsort(cluster, kind="stable")] = np.arange(len(levels)) - np.repeat(
        np.cumsum(n_levels) - n_levels, n_levels
    )
    return place[level.reshape(-1)], n_levels


def _t(A: np.ndarray) -> np.ndarray:
    return np.swapaxes(A, -1, -2)
