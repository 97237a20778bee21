"""Variances of prediction errors from Henderson's mixed-model equations, with theta taken as known.

``Var(x'(beta_hat - beta) + z'(b_hat - b)) = sigma^2 (z'K z + d'S^{-1}d)`` with ``K = (D^{-1} + Z'WZ)^{-1}``, the
conditional covariance of the effects given beta, ``d = x - X'WZ K z``, and ``S = X'WX - X'WZ K Z'WX`` (Henderson 1975,
Biometrics 31, 423). D may be singular: with ``D = F F'``, ``K = F (I + F'Z'WZ F)^{-1} F'``.

The grouping factor with most levels is eliminated level by level; what is left of the others is one symmetric matrix,
inverted as it is while it is small, else factorised as a sparse one.
"""

from __future__ import annotations

import numpy as np
import scipy.linalg
import scipy.sparse as sp
from scipy.sparse.linalg import splu

from mixjax.likelihood.statistics import CrossProducts
from mixjax.prediction.targets import EffectRows

# Effects beside the first factor's up to which their matrix is inverted; more are factorised.
MOST_DENSE = 4096
# Numbers worked on at the same time.
CHUNK = 2**22


class Henderson:
    """The mixed-model equations of one fit, solved; everything in the bases of the products, relative to sigma^2.

    Args:
        stats: cross-products of the fit. factors: per grouping factor ``F (w, w)``, its effects' covariance ``F F'``.
        most_dense: as :data:`MOST_DENSE`.
    """

    def __init__(self, stats: CrossProducts, factors: list[np.ndarray], most_dense: int = MOST_DENSE):
        layout = stats.layout
        self._first = first = layout.chain[0]
        self._others = [f for f in range(len(stats.factors)) if f != first]
        sizes = [np.shape(p.Zy)[0] * np.shape(p.Zy)[-1] for p in stats.factors]
        self._starts = dict(zip(self._others, np.cumsum([0, *(sizes[f] for f in self._others)]), strict=False))
        self._levels = [np.shape(p.Zy)[-1] for p in stats.factors]
        self._r = sum(sizes[f] for f in self._others)

        J, U = _by_level(stats, first)
        F = factors[first]
        self._K = F @ np.linalg.inv(np.eye(len(F)) + F.T @ J @ F) @ F.T  # (m, w, w)
        KU = self._K @ U
        S = np.asarray(stats.XX) - np.einsum("map,maq->pq", U, KU)
        if self._r:
            cross = self._cross(stats)
            K = _block_diagonal(self._K)
            self._KB = (K @ cross).tocsr()
            U_rest = np.concatenate([_by_level(stats, f)[1].reshape(sizes[f], -1) for f in self._others])
            U_rest = U_rest - cross.T @ KU.reshape(-1, KU.shape[-1])
            left = (self._rest(stats) - cross.T @ self._KB).tocsr()
            blocks = [sp.kron(sp.eye_array(np.shape(stats.factors[f].Zy)[-1]), factors[f]) for f in self._others]
            self._invert(left, sp.csr_array(sp.block_diag(blocks)), most_dense)
            self._KU_rest = self._solve(U_rest)
            S = S - U_rest.T @ self._KU_rest
            KU = KU - (self._KB @ self._KU_rest).reshape(KU.shape)
        self._KU = KU
        self._S_inverse = np.linalg.inv((S + S.T) / 2)

    def variance(self, rows: EffectRows) -> np.ndarray:
        """``(m,)`` variance of the error of ``x'beta_hat + z'b_hat``, relative to sigma^2."""
        step = max(1, CHUNK // max(self._r, 64))
        parts = [self._variance(rows, slice(i, i + step)) for i in range(0, len(rows.X), step)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def _variance(self, rows: EffectRows, at: slice) -> np.ndarray:
        x, z, level = rows.X[at], rows.Z[self._first][at], rows.level[self._first][at]
        Kz = np.einsum("mab,mb->ma", self._K[level], z)
        total = np.einsum("ma,ma->m", z, Kz)
        d = x - np.einsum("ma,map->mp", z, self._KU[level])
        if self._r:
            own = _selector(z, level, self._levels[self._first])
            rest = sp.hstack(
                [_selector(rows.Z[f][at], rows.level[f][at], self._levels[f]) for f in self._others],
                format="csr",
            )
            g = (rest - own @ self._KB).tocsr()
            total = total + self._quadratic(g)
            d = d - rest @ self._KU_rest
        return total + np.einsum("mp,pq,mq->m", d, self._S_inverse, d)

    # --- the other factors -------------------------------------------------------------------------------------------

    def _cross(self, stats: CrossProducts) -> sp.csr_array:
        """``Z'WZ`` of the first factor's effects with all others'."""
        shape = (self._K.shape[0] * self._K.shape[1], self._r)
        entries = [
            _entries(pair, 0, self._starts[t])
            for (s, t), pair in zip(stats.layout.pairs, stats.pairs, strict=True)
            if s == self._first
        ]
        return _coo(entries, shape).tocsr()

    def _rest(self, stats: CrossProducts) -> sp.csr_array:
        """``Z'WZ`` of the others."""
        entries = [
            _entries(pair, self._starts[s], self._starts[t])
            for (s, t), pair in zip(stats.layout.pairs, stats.pairs, strict=True)
            if s != self._first
        ]
        upper = _coo(entries, (self._r, self._r)).tocsr()
        own = sp.block_diag([_block_diagonal(_by_level(stats, f)[0]) for f in self._others])
        return sp.csr_array(upper + upper.T + own)

    def _invert(self, left: sp.csr_array, F: sp.csr_array, most_dense: int) -> None:
        matrix = F.T @ left @ F + sp.eye_array(self._r)
        self._F, self._lu, self._dense = F, None, None
        if self._r <= most_dense:
            triangle = scipy.linalg.cholesky(matrix.toarray(), lower=True, overwrite_a=True, check_finite=False)
            half = scipy.linalg.solve_triangular(triangle, F.T.toarray(), lower=True, check_finite=False)
            self._dense = half.T @ half
        else:
            self._lu = splu(
                sp.csc_array(matrix),
                permc_spec="MMD_AT_PLUS_A",
                diag_pivot_thresh=0.0,
                options={"SymmetricMode": True},
            )

    def _solve(self, rhs: np.ndarray) -> np.ndarray:
        """K of the others times ``rhs (r, k)``."""
        if self._dense is not None:
            return self._dense @ rhs
        return self._F @ self._lu.solve(np.ascontiguousarray(self._F.T @ rhs))  # type: ignore[union-attr]

    def _quadratic(self, g: sp.csr_array) -> np.ndarray:
        """``g_i' K g_i`` of the rows of g."""
        if self._dense is not None:
            products = g @ self._dense
            return np.asarray(g.multiply(products).sum(axis=1)).ravel()
        half = (g @ self._F).toarray()
        return np.einsum("mr,rm->m", half, self._lu.solve(np.ascontiguousarray(half.T)))  # type: ignore[union-attr]


def _by_level(stats: CrossProducts, f: int) -> tuple[np.ndarray, np.ndarray]:
    """``Z'WZ (m, w, w)`` and ``Z'WX (m, w, p)`` of a factor."""
    products = stats.factors[f]
    return np.moveaxis(np.asarray(products.ZZ), 2, 0), np.moveaxis(np.asarray(products.ZX), 2, 0)


def _entries(pair, row: int, column: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Effects and products of the pairs of levels, from these first effects on."""
    ZZ = np.moveaxis(np.asarray(pair.ZZ), 2, 0)
    _, a, b = ZZ.shape
    rows = row + np.asarray(pair.rows)[:, None, None] * a + np.arange(a)[None, :, None]
    columns = column + np.asarray(pair.cols)[:, None, None] * b + np.arange(b)[None, None]
    return np.broadcast_to(rows, ZZ.shape).ravel(), np.broadcast_to(columns, ZZ.shape).ravel(), ZZ.ravel()


def _coo(entries: list, shape: tuple[int, int]) -> sp.coo_array:
    if not entries:
        return sp.coo_array(shape)
    rows, columns, values = (np.concatenate(parts) for parts in zip(*entries, strict=True))
    return sp.coo_array((values, (rows, columns)), shape=shape)


def _block_diagonal(blocks: np.ndarray) -> sp.bsr_array:
    m, w, _ = blocks.shape
    return sp.bsr_array((np.ascontiguousarray(blocks), np.arange(m), np.arange(m + 1)), shape=(m * w, m * w))


def _selector(z: np.ndarray, level: np.ndarray, levels: int) -> sp.csr_array:
    """``(m, levels w)`` with z in the place of each row's level."""
    m, w = z.shape
    columns = level[:, None] * w + np.arange(w)
    matrix = sp.csr_array((z.ravel(), columns.ravel(), np.arange(m + 1) * w), shape=(m, levels * w))
    matrix.eliminate_zeros()
    return matrix
