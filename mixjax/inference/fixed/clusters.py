"""Clusters of rows, and what each leaves for a robust covariance of the fixed effects.

Notation. Clusters ``j = 1 .. m`` with rows ``X_j``, residuals ``e_j = y_j - X_j beta`` and working covariance ``V_j``,
the model's own, relative to sigma^2; ``M = (sum_j X_j' V_j^{-1} X_j)^{-1}``. With ``g_j = A_j V_j^{-1} X_j``,

    vcov = M (sum_j g_j' e_j e_j' g_j) M.

Columns of X are turned once so that ``M = I``: each cluster then leaves its scores ``g_j' e_j`` and two ``(p, p)``
matrices, and nothing of the size of a cluster is kept.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mixjax.bases import orthonormal_columns
from mixjax.checks import DataError
from mixjax.covariance import split_theta, triangle
from mixjax.design import refuse_known
from mixjax.fitted.either import AnyFitted
from mixjax.fitted.names import values_of_rows
from mixjax.fitted.record import Fitted

# Parts of a variance below this count as rounding: leverages this near 1, expectations this near 0.
NOTHING = 1e-10
# Numbers in one stack of clusters: 32 MB.
STACK = 4_000_000


class Moments(NamedTuple):
    """Sums by cluster, in coordinates gamma of the fixed effects with ``M = I``.

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
        seen: np.ndarray = ((C @ self.alone.T) ** 2).sum(1) <= NOTHING * (C * C).sum(1)
        return seen


# --- clusters --------------------------------------------------------------------------------------------------------


def clusters_of(fitted: AnyFitted, cluster: Any = None) -> tuple[str, np.ndarray]:
    """Name of the clusters and codes ``(n,)`` of every row, ``0 .. m - 1``; see :func:`robust`.

    Raises:
        ValueError: the clusters are not independent under the model, or there is one only.
    """
    refuse_known(
        fitted.design, "a sandwich covariance of clusters", "clusters that hold related levels are dependent, which "
        "the sandwich would miss; use the covariance of the model, fit.vcov, or bootstrap(kind='parametric')"
    )  # fmt: skip
    groups = {
        label.group: np.asarray(term.group)
        for label, term in zip(fitted.labels.terms, fitted.design.terms, strict=True)
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


def _labels_of(fitted: AnyFitted, cluster: Any, groups: dict[str, np.ndarray]) -> tuple[str, np.ndarray]:
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
        labels = values_of_rows(fitted.labels, name, cluster, numbers=False)
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
    design = fitted.design
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
    weights = fitted.design.weights
    noise = np.ones(len(e)) if weights is None else 1.0 / np.asarray(weights, dtype=np.float64)
    order, size = np.argsort(codes, kind="stable"), np.bincount(codes)
    start = np.cumsum(size) - size
    shape, effects = [size], []
    thetas = split_theta(fitted.estimates.theta, fitted.stats.layout.qs)
    for term, theta, q in zip(fitted.design.terms, thetas, fitted.stats.layout.qs, strict=True):
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
