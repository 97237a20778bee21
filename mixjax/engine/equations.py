"""The mixed-model equations of one fit, solved once: what is known of its random and fixed effects, theta being known.

With ``K = (D^{-1} + Z'WZ)^{-1}`` and ``S = X'WX - X'WZ K Z'WX`` (Henderson 1975, Biometrics 31, 423): K is the
conditional covariance of the effects given y and beta, and ``Var(x'(beta_hat - beta) + z'(b_hat - b)) = sigma^2 (z'K z
+ d'S^{-1}d)`` with ``d = x - X'WZ K z``. D may be singular: with ``D = F F'``, ``K = F (I + F'Z'WZ F)^{-1} F'``.

The grouping factor with most levels is eliminated level by level. With ``K_i`` of its level i alone, ``B_i`` the
products of that with the effects of the other factors, and ``K_2`` the inverse that is left of those, K has the blocks
``K_i + K_i B_i K_2 B_i'K_i``, and ``K_2`` itself. What crosses is held as dense matrices while these are small, else as
sparse ones; so there is no limit of size, and nothing is compiled.

Where the levels of a factor have a known covariance, its effects here are the independent u of ``b = T u``
(:mod:`mixjax.products.known`), and an effect z of one level has a share ``T'z`` in all of them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.sparse.linalg import splu

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.products.family_rows import FamilyRows
from mixjax.products.sums import CrossProducts, Layout, PairProducts

# Effects beside the first factor's up to which their matrix is inverted; more are factorised.
MOST_DENSE = 4096
# Numbers of the products of the first factor with the others up to which they are held with their zeros.
MOST_CROSSED = 2**20
# Numbers worked on at the same time.
CHUNK = 2**22


class EffectRows(NamedTuple):
    """Combinations of effects in the bases of the cross-products.

    Attributes:
        X: ``(m, p)``. Z: per grouping factor ``(m, w)``, zero where a row has no known level of it or its terms are
            left out. level: per grouping factor ``(m,)``, 0 there.
    """

    X: np.ndarray
    Z: list[np.ndarray]
    level: list[np.ndarray]


class Equations:
    """The mixed-model equations of one fit; everything in the bases of the products, relative to sigma^2.

    Args:
        stats: cross-products of the fit. factors: per grouping factor ``F (w, w)``, its effects' covariance ``F F'``.
        most_dense, most_crossed: as :data:`MOST_DENSE`, :data:`MOST_CROSSED`.
    """

    def __init__(
        self,
        stats: CrossProducts,
        factors: list[np.ndarray],
        most_dense: int = MOST_DENSE,
        most_crossed: int = MOST_CROSSED,
    ):
        first = stats.layout.chain[0]
        self._first, self._others = first, [f for f in range(len(stats.factors)) if f != first]
        self._widths = [np.shape(p.Zy)[0] for p in stats.factors]
        self._levels = [np.shape(p.Zy)[-1] for p in stats.factors]
        sizes = [w * m for w, m in zip(self._widths, self._levels, strict=True)]
        ends = np.cumsum([0, *(sizes[f] for f in self._others)])
        self._starts = dict(zip(self._others, map(int, ends), strict=False))
        self._r = int(ends[-1])
        self._known = [stats.transform_of(f) for f in range(len(stats.factors))]
        known = any(T is not None for T in self._known)
        if known:
            most_dense = max(most_dense, self._r)
        self._is_sparse = not known and (sizes[first] * self._r > most_crossed or self._r > most_dense)

        J, U = _by_level(stats, first)
        p = U.shape[2]
        F = factors[first]
        self._K = F @ np.linalg.inv(np.eye(len(F)) + F.T @ J @ F) @ F.T  # (m, w, w)
        KU = self._K @ U
        S = np.asarray(stats.XX) - np.einsum("map,maq->pq", U, KU)
        if self._r:
            cross = self._cross(stats)
            self._KB: Any = self._times_K(cross)
            U_rest = np.concatenate([_by_level(stats, f)[1].reshape(sizes[f], p) for f in self._others])
            U_rest = U_rest - cross.T @ KU.reshape(sizes[first], p)
            left = self._rest(stats) - cross.T @ self._KB
            self._invert(left, [factors[f] for f in self._others], most_dense)
            KU_rest = self._solve(U_rest)
            S = S - U_rest.T @ KU_rest
            KU = KU - (self._KB @ KU_rest).reshape(KU.shape)
            self._KU_rest = KU_rest
        self._KU = KU
        self._S_inverse = np.linalg.inv((S + S.T) / 2)

    # --- what they say -----------------------------------------------------------------------------------------------

    def variance(self, rows: EffectRows) -> np.ndarray:
        """``(m,)`` variance of the error of ``x'beta_hat + z'b_hat``, relative to sigma^2."""
        return self._in_chunks(rows, True)

    def conditional_variance(self, rows: EffectRows) -> np.ndarray:
        """``(m,)`` variance ``z'K z`` of ``z'b`` given y and beta, relative to sigma^2."""
        return self._in_chunks(rows, False)

    def _in_chunks(self, rows: EffectRows, fixed: bool) -> np.ndarray:
        step = max(1, CHUNK // max(self._r * self._widths[self._first], 64))
        parts = [self._variance(rows, slice(i, i + step), fixed) for i in range(0, len(rows.X), step)]
        return np.concatenate(parts) if parts else np.zeros(0)

    def covariances(self) -> list[np.ndarray]:
        """Per grouping factor ``(m, w, w)``: conditional covariance of every level's effects given y and beta."""
        found = {self._first: self._K}
        if (T := self._known[self._first]) is not None:
            found[self._first] = np.einsum("lr,rab,lr->lab", T, self._K, T, optimize=True)
        if self._r:
            m, w = self._levels[self._first], self._widths[self._first]
            step = max(1, CHUNK // (self._r * w))
            parts = [self._inner(self._KB[i * w : (i + step) * w], w) for i in range(0, m, step)]
            found[self._first] = self._K + np.concatenate(parts)
            found |= {f: self._own_blocks(f) for f in self._others}
        return [found[f] for f in range(len(found))]

    def _variance(self, rows: EffectRows, at: slice, fixed: bool) -> np.ndarray:
        x, z, level = rows.X[at], rows.Z[self._first][at], rows.level[self._first][at]
        if (T := self._known[self._first]) is not None:  # alone, one effect a level
            u = T[level] * z
            own: np.ndarray = (u * u) @ self._K[:, 0, 0]
            d = x - u @ self._KU[:, 0]
            return own + np.einsum("mp,pq,mq->m", d, self._S_inverse, d) if fixed else own
        Kz = np.einsum("mab,mb->ma", self._K[level], z)
        total = np.einsum("ma,ma->m", z, Kz)
        d = x - np.einsum("ma,map->mp", z, self._KU[level])
        if self._r:
            g, rest = self._of_others(rows, at)
            total = total + self._inner(g, 1)[:, 0, 0]
            d = d - rest @ self._KU_rest
        variances: np.ndarray = total
        if fixed:
            variances = total + np.einsum("mp,pq,mq->m", d, self._S_inverse, d)
        return variances

    def _of_others(self, rows: EffectRows, at: slice) -> tuple[Any, Any]:
        """The other factors' effects in the rows, ``(m, r)``, less what goes through the first, and as they are."""
        f1 = self._first
        parts = [(rows.Z[f][at], rows.level[f][at], self._levels[f]) for f in self._others]
        if self._is_sparse:
            rest: Any = sp.hstack([_selector(*part) for part in parts], format="csr")
            own = _selector(rows.Z[f1][at], rows.level[f1][at], self._levels[f1]) @ self._KB
            return (rest - own).tocsr(), rest
        z, level = rows.Z[f1][at], rows.level[f1][at]
        rest = np.zeros((len(z), self._r))
        for f, (own, levels, _) in zip(self._others, parts, strict=True):
            w, T = self._widths[f], self._known[f]
            if T is not None:
                shares = T[levels][:, :, None] * own[:, None]
                rest[:, self._starts[f] : self._starts[f] + shares[0].size] = shares.reshape(len(z), -1)
                continue
            rest[np.arange(len(z))[:, None], self._starts[f] + levels[:, None] * w + np.arange(w)] = own
        KB = self._KB.reshape(self._levels[f1], self._widths[f1], self._r)
        return rest - (z[:, None] @ KB[level])[:, 0], rest

    # --- the other factors -------------------------------------------------------------------------------------------

    def _cross(self, stats: CrossProducts) -> Any:
        """``Z'WZ`` of the first factor's effects with all others'."""
        entries = [
            _entries(pair, 0, self._starts[t])
            for (s, t), pair in zip(stats.layout.pairs, stats.pairs, strict=True)
            if s == self._first
        ]
        return self._matrix(entries, self._K.shape[0] * self._K.shape[1])

    def _rest(self, stats: CrossProducts) -> Any:
        """``Z'WZ`` of the others."""
        entries = [
            _entries(pair, self._starts[s], self._starts[t])
            for (s, t), pair in zip(stats.layout.pairs, stats.pairs, strict=True)
            if s != self._first
        ]
        entries += [(columns, rows, values) for rows, columns, values in entries]
        for f in self._others:
            blocks, levels = stats.factors[f].ZZ, np.arange(self._levels[f])
            entries.append(_entries(PairProducts(levels, levels, blocks), self._starts[f], self._starts[f]))
        return self._matrix(entries, self._r)

    def _matrix(self, entries: list[tuple[np.ndarray, np.ndarray, np.ndarray]], height: int) -> Any:
        """``(height, r)`` of entries that add up, each ``rows, columns, values``."""
        shape = (height, self._r)
        rows, columns, values = (
            (np.concatenate(parts) for parts in zip(*entries, strict=True)) if entries else np.zeros((3, 0), int)
        )
        if self._is_sparse:
            return sp.coo_array((values, (rows, columns)), shape=shape).tocsr()
        at = rows * self._r + columns
        return np.bincount(at, values, height * self._r).reshape(shape)

    def _times_K(self, cross: Any) -> Any:
        m, w, _ = self._K.shape
        if not self._is_sparse:
            return (self._K @ cross.reshape(m, w, self._r)).reshape(cross.shape)
        blocks = sp.bsr_array((np.ascontiguousarray(self._K), np.arange(m), np.arange(m + 1)), shape=(m * w, m * w))
        return (blocks @ cross).tocsr()

    def _invert(self, left: Any, factors: list[np.ndarray], most_dense: int) -> None:
        """K_2 where ``D_2^{-1} + left`` is its inverse: itself, or what solves with it."""
        self._lu, self._dense = None, None
        if self._r <= most_dense:
            left = left.toarray() if self._is_sparse else left
            half = self._each(factors, left, transpose=True)
            matrix = self._each(factors, half.T, transpose=True)
            matrix[np.diag_indices(self._r)] += 1.0
            half = self._each(factors, linalg.inverse_logdet(matrix)[0])
            self._dense = self._each(factors, half.T)
            return
        blocks = [sp.kron(sp.eye_array(self._levels[f]), F) for f, F in zip(self._others, factors, strict=True)]
        self._F = sp.csr_array(sp.block_diag(blocks))
        self._lu = splu(
            sp.csc_array(self._F.T @ left @ self._F + sp.eye_array(self._r)),
            permc_spec="MMD_AT_PLUS_A",
            diag_pivot_thresh=0.0,
            options={"SymmetricMode": True},
        )

    def _each(self, factors: list[np.ndarray], rows: np.ndarray, transpose: bool = False) -> np.ndarray:
        """``F rows``, or ``F'rows``, for all effects of the others: ``(r, k)``."""
        parts = []
        for f, F in zip(self._others, factors, strict=True):
            own = rows[self._starts[f] : self._starts[f] + self._levels[f] * len(F)]
            blocks = (F.T if transpose else F) @ own.reshape(self._levels[f], len(F), -1)
            parts.append(blocks.reshape(own.shape))
        return np.concatenate(parts)

    def _solve(self, rhs: np.ndarray) -> np.ndarray:
        """``K_2 rhs`` of ``(r, k)``."""
        if self._dense is not None:
            solution: np.ndarray = self._dense @ rhs
        else:
            solution = self._F @ self._lu.solve(np.ascontiguousarray(self._F.T @ rhs))  # type: ignore[union-attr]
        return solution

    def _inner(self, g: Any, w: int) -> np.ndarray:
        """``g_i K_2 g_i'`` of every w rows of ``g (k w, r)``: ``(k, w, w)``."""
        if self._dense is None:
            half = (g @ self._F).toarray()
            solved = self._lu.solve(np.ascontiguousarray(half.T)).T  # type: ignore[union-attr]
        elif w == 1 and self._is_sparse:
            return np.asarray(g.multiply(g @ self._dense).sum(axis=1)).reshape(-1, 1, 1)
        else:
            half = g.toarray() if self._is_sparse else g
            solved = half @ self._dense
        half, solved = half.reshape(-1, w, self._r), solved.reshape(-1, w, self._r)
        inner: np.ndarray = (
            np.einsum("kar,kar->k", half, solved)[:, None, None] if w == 1 else solved @ half.swapaxes(1, 2)
        )
        return inner

    def _own_blocks(self, f: int) -> np.ndarray:
        """Diagonal blocks of ``K_2``, ``(m, w, w)``."""
        m, w, start = self._levels[f], self._widths[f], self._starts[f]
        if (T := self._known[f]) is not None:
            assert self._dense is not None
            own = self._dense[start : start + m * w, start : start + m * w].reshape(m, w, m, w)
            found = np.empty((len(T), w, w))
            for a in range(w):
                for b in range(w):
                    found[:, a, b] = ((T @ own[:, a, :, b]) * T).sum(1)
            return found
        if self._dense is not None:
            at = start + np.arange(m * w).reshape(m, w)
            blocks: np.ndarray = self._dense[at[:, :, None], at[:, None]]
            return blocks
        step = max(1, CHUNK // (self._r * w))
        parts = []
        for i in range(0, m, step):
            at = start + np.arange(i * w, min(i + step, m) * w)
            probes = sp.csr_array((np.ones(len(at)), at, np.arange(len(at) + 1)), shape=(len(at), self._r))
            parts.append(self._inner(probes, w))
        return np.concatenate(parts)


def by_factor(lambdas: list[np.ndarray], layout: Layout) -> list[np.ndarray]:
    """Per grouping factor the block-diagonal factor ``(..., w, w)`` of its terms' Lambda ``(..., q, q)``."""
    leading = np.shape(lambdas[0])[:-2]
    factors = [np.zeros((*leading, width, width)) for width in layout.widths]
    for place, Lambda in zip(layout.terms, lambdas, strict=True):
        own = slice(place.start, place.start + place.q)
        factors[place.factor][..., own, own] = Lambda
    return factors


def factors_in_bases(lambdas: list[np.ndarray], stats: CrossProducts) -> list[np.ndarray]:
    """Per grouping factor ``F (..., w, w)``: the covariance of its effects in the bases of the products is ``F F'``."""
    own = [np.asarray(basis.R) @ Lambda for basis, Lambda in zip(stats.Z_bases, lambdas, strict=True)]
    return by_factor(own, stats.layout)


def covariances_with_slopes(
    x: np.ndarray, stats: CrossProducts | FamilyRows
) -> tuple[list[np.ndarray], list[np.ndarray], tuple[np.ndarray, ...], tuple[np.ndarray, ...]]:
    """Covariances at coordinates ``x (..., k)``, and their derivatives by these.

    Returns:
        Per grouping factor F ``(..., w, w)`` and the derivatives ``(..., k, w, w)`` of ``F F'``, in the bases; per
        term D ``(..., q, q)`` and its own ``(..., k, q, q)``, in its columns.
    """
    layout = stats.layout
    leading, k = np.shape(x)[:-1], np.shape(x)[-1]
    factors = [np.zeros((*leading, w, w)) for w in layout.widths]
    slopes = [np.zeros((*leading, k, w, w)) for w in layout.widths]
    D, D_slopes, start = [], [], 0
    for place, basis in zip(layout.terms, stats.Z_bases, strict=True):
        structure, q, R_inv = place.structure, place.q, np.asarray(basis.R_inv)
        own = slice(place.start, place.start + q)
        lanes = np.reshape(x, (-1, k)).T[start : start + structure.k]
        F, jacobian = structure.factor(lanes), structure.jacobian(lanes)
        F = np.moveaxis(F, -1, 0).reshape(*leading, q, q)
        moved = np.zeros((*leading, k, q, q))
        for pair, (a, b) in enumerate(cov.pairs_of(q)):
            entry = np.moveaxis(jacobian[pair], -1, 0).reshape(*leading, structure.k)
            moved[..., start : start + structure.k, a, b] = moved[..., start : start + structure.k, b, a] = entry
        factors[place.factor][..., own, own] = F
        slopes[place.factor][..., own, own] = moved
        D.append(R_inv @ F @ np.swapaxes(F, -1, -2) @ R_inv.T)
        D_slopes.append(R_inv @ moved @ R_inv.T)
        start += structure.k
    return factors, slopes, tuple(D), tuple(D_slopes)


def _by_level(stats: CrossProducts, f: int) -> tuple[np.ndarray, np.ndarray]:
    """``Z'WZ (m, w, w)`` and ``Z'WX (m, w, p)`` of a factor."""
    products = stats.factors[f]
    return np.moveaxis(np.asarray(products.ZZ), 2, 0), np.moveaxis(np.asarray(products.ZX), 2, 0)


def _entries(pair: PairProducts, row: int, column: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Effects and products of the pairs of levels, from these first effects on."""
    ZZ = np.moveaxis(np.asarray(pair.ZZ), 2, 0)
    _, a, b = ZZ.shape
    rows = row + np.asarray(pair.rows)[:, None, None] * a + np.arange(a)[None, :, None]
    columns = column + np.asarray(pair.cols)[:, None, None] * b + np.arange(b)[None, None]
    return np.broadcast_to(rows, ZZ.shape).ravel(), np.broadcast_to(columns, ZZ.shape).ravel(), ZZ.ravel()


def _selector(z: np.ndarray, level: np.ndarray, levels: int) -> sp.csr_array:
    """``(m, levels w)`` with z in the place of each row's level."""
    m, w = z.shape
    columns = level[:, None] * w + np.arange(w)
    matrix = sp.csr_array((z.ravel(), columns.ravel(), np.arange(m + 1) * w), shape=(m, levels * w))
    matrix.eliminate_zeros()
    return matrix
