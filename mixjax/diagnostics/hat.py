"""The pieces of the hat matrix by row, without the matrix.

Rows are multiplied by the roots of their weights. With ``U = Z Lambda``, ``H = I + U U'``, ``G = H^{-1} = I - U S^{-1}
U'``, ``S = I + U'U`` and ``M = (X'GX)^{-1}``, fitted values are ``(H1 + H2) y``: ``H1 = X M X'G`` of the fixed effects,
``H2 = U U' G (I - H1)`` of the random effects. S is inverted by eliminating one grouping factor after the other.

Of a generalised linear mixed model rows are those of the linear one that it is at its modes: weights are the curvatures
of the rows' log densities by the linear predictor, and sigma is 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse

from mixjax.bases import orthonormal_columns
from mixjax.covariance import lambdas_of_theta
from mixjax.fitted.either import AnyFitted
from mixjax.fitted.generalized import GeneralizedFitted

# A variance below this part of the one that it is left of is rounding.
NOTHING = 1e-10
# Numbers in one dense stack of rows: 32 MB.
STACK = 2**22


class Effects(NamedTuple):
    """The random effects of one grouping factor.

    Attributes:
        U: ``(n, q)`` rows of ``Z Lambda``. codes: ``(n,)`` levels. n_levels: how many.
        Lambda: ``(q, q)`` relative factor, block by block of the terms. terms: their places among the model's.
        levels: ``(n_levels, n_levels)`` factor L of the known covariance of the levels, or None. U is as if there were
            none.
    """

    U: np.ndarray
    codes: np.ndarray
    n_levels: int
    Lambda: np.ndarray
    terms: tuple[int, ...]
    levels: np.ndarray | None = None

    @property
    def of_levels(self) -> Any:
        """``(n_levels, n_levels)`` a factor of the covariance of the levels, sparse where it is the identity."""
        return scipy.sparse.eye_array(self.n_levels) if self.levels is None else self.levels

    def variance_of_levels(self) -> np.ndarray:
        """``(n_levels,)`` the diagonal of that covariance."""
        return np.ones(self.n_levels) if self.levels is None else (self.levels**2).sum(1)

    def covariance_of(self, level: np.ndarray) -> np.ndarray:
        """Of the levels ``(c, k)`` of rows, pair by pair: ``(c, k, k)``."""
        if self.levels is None:
            alike: np.ndarray = level[:, :, None] == level[:, None]
            return alike
        L = self.levels[level]
        covariance: np.ndarray = L @ L.swapaxes(1, 2)
        return covariance


class Whitened(NamedTuple):
    """The rows of a fit times the roots of their weights.

    Attributes:
        root_w: ``(n,)``. Q: ``(n, p)`` orthonormal basis of X. effects: per grouping factor.
    """

    root_w: np.ndarray
    Q: np.ndarray
    effects: list[Effects]

    @property
    def random_variance(self) -> np.ndarray:
        """``w_i z_i' Sigma z_i / sigma^2``, ``(n,)``; sigma is 1 in generalised models."""
        parts = ((factor.U**2).sum(1) * factor.variance_of_levels()[factor.codes] for factor in self.effects)
        return sum(parts, np.zeros(len(self.root_w)))


class HatDiagonals(NamedTuple):
    """Off-diagonal hat matrices; of rows ``u`` of U, or of other combinations ``u`` of spherical random effects.

    Attributes:
        taken: ``(k,)`` ``u S^{-1} u'``: conditional variance of ``u`` given y and beta, over sigma^2.
        pull: ``(k, p)`` ``u S^{-1} U'Q``.
        GQ: ``(n, p)``. M: ``(p, p)``.
    """

    taken: np.ndarray
    pull: np.ndarray
    GQ: np.ndarray
    M: np.ndarray

    def along(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """``left_i M right_i'``, ``(k,)``."""
        products: np.ndarray = ((left @ self.M) * right).sum(1)
        return products

    def predicted(self, prior: np.ndarray) -> np.ndarray:
        """Variance of the predictions of ``u``, over sigma^2, where ``u u'`` is ``prior (k,)``: see :func:`parts_of`.

        ``u (U'GU - U'GQ M Q'GU) u'``, and ``U'GU = I - S^{-1}``.
        """
        variances: np.ndarray = prior - self.taken - self.along(self.pull, self.pull)
        return variances


def whiten(fitted: AnyFitted) -> Whitened:
    """The fit's rows as the hat matrix needs them."""
    fitted.check_can("leverages")
    design, layout = fitted.design, fitted.layout
    if isinstance(fitted, GeneralizedFitted):
        root_w = np.sqrt(working_weights(fitted))
        Q = orthonormal_columns(np.asarray(design.X), root_w).Q
        lambdas = lambdas_of_theta(np.asarray(fitted.estimates.theta), layout.qs)
    else:
        root_w = np.ones(fitted.nobs) if fitted.rows.sqrt_w is None else fitted.rows.sqrt_w
        Q, lambdas = fitted.rows.Q, fitted.relative_factors
    effects = []
    for f in range(1 + max((place.factor for place in layout.terms), default=-1)):
        ts = tuple(t for t, place in enumerate(layout.terms) if place.factor == f)
        Lambda = scipy.linalg.block_diag(*(lambdas[t] for t in ts))
        Z = np.hstack([np.asarray(design.terms[t].Z, np.float64) for t in ts])
        term = design.terms[ts[0]]
        L = None if term.levels is None else np.asarray(term.levels, np.float64)
        effects.append(Effects(root_w[:, None] * (Z @ Lambda), np.asarray(term.group), term.n_groups, Lambda, ts, L))
    return Whitened(root_w, Q, effects)


def working_weights(fitted: GeneralizedFitted) -> np.ndarray:
    """``(n,)`` curvature of the rows' minus log densities by the linear predictor at the modes, times case weights: the
    observed one, or the expected one where some row's is negative, as happens to families that are not log-concave."""
    family, est, rows = fitted.family, fitted.estimates, fitted.rows
    psi = fitted.psi_by_row
    found = np.asarray(family.derivatives(est.eta, rows.y, rows.size, psi).by_eta[2])
    if (found < 0).any():
        if not family.has_expected:
            raise ValueError(
                f"the log density of family {family.name} is not concave at {int((found < 0).sum())} of the rows, so "
                "that the fit has no linear model with positive weights at its modes, which leverages are those of: "
                "see fit.quantile_residuals()"
            )
        found = np.asarray(family.expected(est.eta, rows.size, psi).w)
    weights: np.ndarray = found if rows.weights is None else found * np.asarray(rows.weights)
    return weights


def parts_of(Q: np.ndarray, effects: list[Effects], of: int | None = None) -> HatDiagonals:
    """Eliminate the random effects; of the rows, or of every level's own effects ``b = Lambda u`` of factor ``of``.

    Levels run slowest: ``k = n_levels q``. Complex where U is.
    """
    n = len(Q)
    if not effects:
        return HatDiagonals(np.zeros(n), np.zeros_like(Q), Q, np.linalg.inv(Q.T @ Q))
    rows = _rows(effects)
    if of is None:
        asked = slice(0, n)
        V = rows
    else:
        before = sum(f.n_levels * f.U.shape[1] for f in effects[:of])
        own = scipy.sparse.kron(effects[of].of_levels, effects[of].Lambda, format="csr")
        after = rows.shape[1] - before - own.shape[1]
        padding = [scipy.sparse.csr_array((own.shape[0], width)) for width in (before, after)]
        probes = scipy.sparse.hstack([padding[0], own, padding[1]], format="csr")
        asked = slice(n, n + own.shape[0])
        V = scipy.sparse.vstack([rows, probes], format="csr")
    count = asked.stop - asked.start
    taken: Any = np.zeros(count)
    pull: Any = np.zeros((count, Q.shape[1]))
    GQ: Any = Q
    S = (scipy.sparse.eye_array(rows.shape[1]) + rows.T @ rows).tocsr()
    for V_own, inverse in _eliminated(V, S, effects):
        mine, weighted = V_own[asked], inverse @ (V_own[:n].T @ Q)
        taken = taken + _quadratic(mine, inverse)
        pull = pull + mine @ weighted
        GQ = GQ - V_own[:n] @ weighted
    return HatDiagonals(taken, pull, GQ, np.linalg.inv(Q.T @ GQ))


def _rows(effects: list[Effects]) -> Any:
    """U, sparse: ``(n, sum of levels x effects)``."""
    blocks = []
    for factor in effects:
        n, q = factor.U.shape
        at = factor.codes.astype(np.int64)[:, None] * q + np.arange(q)
        own = scipy.sparse.csr_array((factor.U.ravel(), at.ravel(), np.arange(n + 1) * q), (n, factor.n_levels * q))
        if factor.levels is not None:
            own = (own @ scipy.sparse.kron(factor.levels, scipy.sparse.eye_array(q), format="csr")).tocsr()
        blocks.append(own)
    rows = scipy.sparse.hstack(blocks, format="csr")
    rows.eliminate_zeros()
    return rows


def _eliminated(V: Any, S: Any, effects: list[Effects]) -> Iterator[tuple[Any, Any]]:
    """Pairs V ``(k, m)``, C ``(m, m)`` with ``V S^{-1} V' = sum V C V'``.

    A factor whose levels have nothing to do with each other leaves level by level; as in
    :mod:`mixjax.engine.elimination`. What crosses is one dense block, as large as that of the fit itself.
    """
    widths = [factor.n_levels * factor.U.shape[1] for factor in effects]
    # Of every column that is left: its factor, and its level there.
    factor_of = np.repeat(np.arange(len(effects)), widths)
    level_of = np.concatenate([np.arange(k) // f.U.shape[1] for f, k in zip(effects, widths, strict=True)])
    while S.shape[0]:
        chosen = _separate(S, factor_of, level_of)
        if chosen is None:
            yield V, scipy.linalg.inv(S.toarray(), overwrite_a=True, check_finite=False)
            return
        own, rest = np.flatnonzero(factor_of == chosen), np.flatnonzero(factor_of != chosen)
        inverse = _inverse(S[own][:, own], effects[chosen].n_levels, effects[chosen].U.shape[1])
        V_own, across = V[:, own], S[own][:, rest]
        yield V_own, inverse
        if not len(rest):
            return
        gain = inverse @ across
        V = (V[:, rest] - V_own @ gain).tocsr()
        S = (S[rest][:, rest] - across.T @ gain).tocsr()
        factor_of, level_of = factor_of[rest], level_of[rest]


def _separate(S: Any, factor_of: np.ndarray, level_of: np.ndarray) -> int | None:
    """The factor with most columns of those whose levels have nothing to do with each other, or None."""
    entries = S.tocoo()
    rows, cols = entries.coords
    meet = (factor_of[rows] == factor_of[cols]) & (level_of[rows] != level_of[cols]) & (entries.data != 0)
    left = np.setdiff1d(factor_of, factor_of[rows[meet]])
    return int(left[np.argmax(np.bincount(factor_of)[left])]) if len(left) else None


def _inverse(S: Any, m: int, q: int) -> Any:
    """Of a sparse matrix with m blocks ``(q, q)`` on its diagonal and nothing beside them."""
    entries = S.tocoo()
    rows, cols = entries.coords
    own = rows // q == cols // q
    blocks = np.zeros((m, q, q), entries.data.dtype)
    blocks[rows[own] // q, rows[own] % q, cols[own] % q] = entries.data[own]
    inverse = 1.0 / blocks if q == 1 else np.linalg.inv(blocks)
    return scipy.sparse.bsr_array((inverse, np.arange(m), np.arange(m + 1)), shape=(m * q, m * q)).tocsr()


def _quadratic(V: Any, inverse: Any) -> np.ndarray:
    """``v C v'`` of every row v, ``(k,)``."""
    if scipy.sparse.issparse(inverse):
        return np.asarray((V @ inverse).multiply(V).sum(axis=1)).reshape(-1)
    k, width = V.shape
    result = np.zeros(k, np.result_type(V.dtype, inverse.dtype))
    step = max(1, STACK // width)
    for first in range(0, k, step):
        rows = V[first : first + step]
        result[first : first + step] = np.asarray(rows.multiply(rows @ inverse).sum(axis=1)).reshape(-1)
    return result
