"""Random effects of several grouping factors: the first one's levels are eliminated one by one, all others are one
dense block; see :mod:`mixjax.engine.effects`. By NumPy, one lane."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg

from mixjax import linalg
from mixjax.covariance import pairs_of
from mixjax.engine.effects import Traces, directions_of, factor_of, orders_of
from mixjax.engine.pattern import Pattern
from mixjax.machine import Array
from mixjax.products.family_rows import FamilyRows
from mixjax.products.sums import Layout


class BlockMatrix(NamedTuple):
    """Symmetric matrices over all effects: ``first (..., q, q, m)`` by level of the first factor, ``side (..., q, k)``
    of the pairs of the pattern, ``dense (..., d, d)``."""

    first: Array
    side: Array
    dense: Array


@dataclass(frozen=True, eq=False)
class BlockGain:
    """What follows from D and A, of :class:`Crossed`; see there for the letters.

    Attributes:
        A: the matrix. K1, F1: ``(q, q, m)``. H: ``(q, k)``. S: ``(d, d)``. times_root: ``Lambda V`` or, if the second
            argument is true, ``Lambda'V`` of dense effects. factor: Cholesky's, of ``I + Lambda'S Lambda``. logdet:
            ``(1,)``.
    """

    A: BlockMatrix
    pattern: Pattern
    K1: Array
    F1: Array
    H: Array
    S: Array
    times_root: Callable[[Array, bool], Array]
    factor: Array
    logdet: Array

    @cached_property
    def Kd(self) -> Array:
        """``Lambda (I + Lambda'S Lambda)^{-1} Lambda'``."""
        inverse = linalg.inverse_of_factor(self.factor.copy(order="F"))
        return self.times_root(self.times_root(inverse, False).T, False)

    def Kd_times(self, V: Array) -> Array:
        """``Kd V``, ``V (d, c)``; without the inverse where that is not there yet."""
        if "Kd" in vars(self):
            return linalg.product(self.Kd, V)
        solved = scipy.linalg.cho_solve((self.factor, True), self.times_root(V, True), check_finite=False)
        return self.times_root(solved, False)

    @cached_property
    def SK(self) -> Array:
        return linalg.product(self.S, self.Kd)

    @cached_property
    def Fd(self) -> Array:
        F = -self.SK
        F[np.diag_indices(len(F))] += 1.0
        return F

    @cached_property
    def N22(self) -> Array:
        return self.S - linalg.product(self.SK, self.S)

    @cached_property
    def times_Kd(self) -> Callable[[Array], Array]:
        return self.pattern.times(self.Kd)

    @cached_property
    def T(self) -> Array:
        """``F1 A12 (q, k)``."""
        return self.levels_times(self.F1, self.A.side)

    @cached_property
    def TK(self) -> Array:
        """``F1 A12 Kd (q, k)``."""
        return self.times_Kd(self.T)

    @cached_property
    def TKT(self) -> Array:
        """``(q, q, m)``."""
        return self.products(self.TK, self.T)

    @cached_property
    def HK(self) -> Array:
        return self.times_Kd(self.H)

    def levels_times(self, M: Array, values: Array) -> Array:
        """``M_i V_i`` level by level, ``M (q, q, m)``, V by its numbers ``(q, k)``."""
        rows = self.pattern.rows
        return np.stack([sum(M[a, b, rows] * values[b] for b in range(len(values))) for a in range(len(M))])

    def products(self, left: Array, right: Array) -> Array:
        """``U_i V_i'`` level by level ``(q, q, m)``."""
        return np.stack([np.stack([self.pattern.by_level(u * v) for v in right]) for u in left])

    def times_A(self, b: Array) -> Array:
        """Effects ``(..., N, 1)``."""
        A, (q, m) = self.A, (len(self.H), self.pattern.m)
        first, rest = b[..., : q * m, 0].reshape(-1, q, m), b[..., q * m :, 0].reshape(-1, self.pattern.d)
        side = [self.pattern.matrix(own) for own in A.side]
        top = np.stack([(A.first[a] * first).sum(1) + (side[a] @ rest.T).T for a in range(q)], 1)
        low = sum(first[:, a] @ side[a] for a in range(q)) + rest @ A.dense
        return np.concatenate([top.reshape(-1, q * m), low], axis=1).reshape(*b.shape)

    def solve(self, r: Array) -> Array:
        """``K r`` of effects ``(..., N, 1)``."""
        q, m = len(self.H), self.pattern.m
        first, rest = r[..., : q * m, 0].reshape(-1, q, m), r[..., q * m :, 0].reshape(-1, self.pattern.d)
        H = [self.pattern.matrix(own) for own in self.H]
        low = self.Kd_times((rest - sum(first[:, a] @ H[a] for a in range(q))).T).T
        top = np.stack([(self.K1[a] * first).sum(1) - (H[a] @ low.T).T for a in range(q)], 1)
        return np.concatenate([top.reshape(-1, q * m), low], axis=1).reshape(*r.shape)


@dataclass(frozen=True)
class Crossed:
    """Effects of several factors: the first one's levels are eliminated one by one, all others are one dense block of d
    effects. By NumPy, one lane.

    With ``K1, F1, N1`` of the first factor's levels by themselves, ``H = K1 A12``, ``S = A22 - A21 H`` and ``Kd =
    (Dd^-1 + S)^-1``: ``K = K1 + V Kd V'`` with ``V' = (-H', I)``, and rows of R are ``F1 e_i' - F1 A12 Kd V'`` and ``(I
    - S Kd) V'``.

    Attributes:
        Z1: ``(q, n)``. level: ``(n,)``. order, starts: rows by level. m: levels.
        Zd: ``(c, n)`` all columns of the other factors. at: ``(c, n)`` where in the dense block each of them stands.
        blocks: per dense factor (factor, q, m, start). layout: as in the rows.
    """

    Z1: Array
    level: Array
    m: int
    Zd: Array
    at: Array
    blocks: tuple[tuple[int, int, int, int], ...]
    layout: Layout
    row_axes = 1

    @property
    def effect_shape(self) -> tuple[int, ...]:
        return (self.n_effects,)

    @property
    def d(self) -> int:
        return sum(q * m for _, q, m, _ in self.blocks)

    @property
    def n_effects(self) -> int:
        return len(self.Z1) * self.m + self.d

    @property
    def first(self) -> int:
        return (self.layout.chain + self.layout.dense)[0]

    @cached_property
    def pairs(self) -> list[tuple[int, tuple[int, int]]]:
        return directions_of(self.layout)

    # --- rows <-> effects

    def rows(self, b: Array) -> Array:
        q, m = len(self.Z1), self.m
        flat = b[..., 0]
        first = flat[..., : q * m].reshape(*flat.shape[:-1], q, m)
        found = sum(self.Z1[a] * first[..., a, self.level] for a in range(q))
        rest = flat[..., q * m :]
        for column, at in zip(self.Zd, self.at, strict=True):
            found = found + column * rest[..., at]
        return np.asarray(found)[..., None]

    def effects(self, w: Array) -> Array:
        flat = w[..., 0].reshape(-1, w.shape[-2])
        q, m, d = len(self.Z1), self.m, self.d
        found = np.empty((len(flat), q * m + d))
        for i, own in enumerate(flat):
            for a in range(q):
                found[i, a * m : (a + 1) * m] = np.bincount(self.level, own * self.Z1[a], m)
            found[i, q * m :] = np.bincount(self.at.reshape(-1), (own * self.Zd).reshape(-1), d)
        return found.reshape(*w.shape[:-2], q * m + d, 1)

    def normal(self, w: Array) -> BlockMatrix:
        flat = w[..., 0].reshape(-1, w.shape[-2])
        q, m, d, k, T = len(self.Z1), self.m, self.d, len(self.pattern.rows), len(flat)
        first, side, dense = np.empty((T, q, q, m)), np.empty((T, q, k)), np.zeros((T, d, d))
        for i, own in enumerate(flat):
            for a, b in pairs_of(q):
                first[i, a, b] = first[i, b, a] = np.bincount(self.level, own * self.Z1[a] * self.Z1[b], m)
            for a in range(q):
                side[i, a] = np.bincount(self._side_index, (own * self.Z1[a] * self.Zd).reshape(-1), k)
            values = np.concatenate([own * self.Zd[c] * self.Zd[e] for c, e in pairs_of(len(self.Zd))])
            low, high, index = self._dense_pairs
            dense[i, low, high] = dense[i, high, low] = np.bincount(index, values, len(low))
        shape = w.shape[:-2]
        return BlockMatrix(first.reshape(*shape, q, q, m), side.reshape(*shape, q, k), dense.reshape(*shape, d, d))

    @cached_property
    def _pairs(self) -> tuple[Array, Array]:
        """Pairs of levels and dense effects that meet, and which of them each column of every row is."""
        pairs, index = np.unique((self.level * self.d + self.at).reshape(-1), return_inverse=True)
        return pairs, index.reshape(-1)

    @cached_property
    def pattern(self) -> Pattern:
        rows, cols = np.divmod(self._pairs[0], self.d)
        return Pattern(rows, cols, self.m, self.d)

    @property
    def _side_index(self) -> Array:
        return self._pairs[1]

    @cached_property
    def _dense_pairs(self) -> tuple[Array, Array, Array]:
        """Pairs of dense effects that meet, and which of them pairs c <= e of every row's columns are."""
        low = np.concatenate([np.minimum(self.at[c], self.at[e]) for c, e in pairs_of(len(self.at))])
        high = np.concatenate([np.maximum(self.at[c], self.at[e]) for c, e in pairs_of(len(self.at))])
        places, index = np.unique(low * self.d + high, return_inverse=True)
        return places // self.d, places % self.d, index.reshape(-1)

    # --- units: all effects move together

    def units(self, w: Array) -> Array:
        return w.sum(0)[None]

    def unit_dots(self, a: Array, b: Array) -> Array:
        return (a * b).sum(-2)[None]

    def of_units(self, values: Array) -> Array:
        return values

    # --- equations

    def _times_dense(self, lambdas: list[Array], V: Array, transpose: bool = False) -> Array:
        """``Lambda V`` or ``Lambda' V`` of the dense effects, ``V (d, c)``."""
        found = np.empty((self.d, V.shape[1]))
        for f, q, m, start in self.blocks:
            Lambda = factor_of(lambdas, self.layout, f)[..., 0]
            own, into = V[start : start + q * m], found[start : start + q * m]
            if q == 1:
                np.multiply(own, Lambda[0, 0], out=into)
            else:
                into[:] = ((Lambda.T if transpose else Lambda) @ own.reshape(q, -1)).reshape(into.shape)
        return found

    def times_D(self, lambdas: list[Array], v: Array) -> Array:
        q, m = len(self.Z1), self.m
        L1 = factor_of(lambdas, self.layout, self.first)[..., 0]
        flat = v.reshape(-1, self.n_effects)
        top = np.einsum("ab,tbm->tam", L1 @ L1.T, flat[:, : q * m].reshape(-1, q, m)).reshape(-1, q * m)
        low = self._times_dense(lambdas, self._times_dense(lambdas, flat[:, q * m :].T, transpose=True)).T
        return np.concatenate([top, low], axis=1).reshape(*v.shape)

    def gain(self, lambdas: list[Array], A: BlockMatrix) -> BlockGain:
        q, d = len(self.Z1), self.d
        L1 = factor_of(lambdas, self.layout, self.first)[..., 0]
        K1, logdets = linalg.gain(L1, A.first)
        F1 = linalg.eye(q, K1) - linalg.matmul(A.first, K1)
        rows = self.pattern.rows
        H = np.stack([sum(K1[a, b, rows] * A.side[b] for b in range(q)) for a in range(q)])
        half = A.dense - self.pattern.gram(A.side, H)
        S = half + half.T
        S *= 0.5

        def times_root(V: Array, transpose: bool) -> Array:
            return self._times_dense(lambdas, V, transpose)

        M = times_root(times_root(S, True).T, True)
        M[np.diag_indices(d)] += 1.0
        factor, failed = scipy.linalg.lapack.dpotrf(M.T, lower=1, clean=1, overwrite_a=1)
        if failed or not np.isfinite(factor[-1, -1]):
            factor = np.full_like(M, np.nan)
        logdet = np.array([logdets.sum() + 2.0 * np.log(factor.diagonal()).sum()])
        return BlockGain(A, self.pattern, K1, F1, H, S, times_root, factor, logdet)

    def leverages(self, gain: BlockGain) -> Array:
        q = len(self.Z1)
        W = gain.K1 + gain.products(gain.HK, gain.H)
        found = np.zeros(len(self.level))
        for a, b in pairs_of(q):
            found += (1.0 if a == b else 2.0) * self.Z1[a] * self.Z1[b] * W[a, b, self.level]
        for c, pair in zip(self.Zd, self._side_index.reshape(self.at.shape), strict=True):
            for a in range(q):
                found -= 2.0 * self.Z1[a] * c * gain.HK[a, pair]
        for c, e in pairs_of(len(self.Zd)):
            found += (1.0 if c == e else 2.0) * self.Zd[c] * self.Zd[e] * gain.Kd[self.at[c], self.at[e]]
        return found[:, None]

    def covariances(self, gain: BlockGain) -> dict[int, Array]:
        """Factor -> ``(q, q, m)`` blocks of K of its levels."""
        found = {self.first: gain.K1 + gain.products(gain.HK, gain.H)}
        for f, q, m, start in self.blocks:
            own = gain.Kd[start : start + q * m, start : start + q * m].reshape(q, m, q, m)
            found[f] = np.moveaxis(own.diagonal(axis1=1, axis2=3), -1, 2)
        return found

    def moved(self, v: Array) -> Array:
        flat = v[:, 0]
        found = np.zeros((len(self.pairs), len(flat), 1))
        for j, (f, (a, b)) in enumerate(self.pairs):
            start, size = self.place_of(f)
            for u, w in orders_of(a, b):
                into = start + u * size + np.arange(size)
                found[j, into, 0] = flat[start + w * size : start + (w + 1) * size]
        return found

    def place_of(self, f: int) -> tuple[int, int]:
        """Where factor f's effects begin among all, and its levels."""
        if f == self.first:
            return 0, self.m
        m, start = next((m, start) for g, _, m, start in self.blocks if g == f)
        return len(self.Z1) * self.m + start, m

    def _dense_at(self, f: int) -> list[Array]:
        """Per effect of a dense factor, where its levels stand in the dense block."""
        q, m, start = next((q, m, start) for g, q, m, start in self.blocks if g == f)
        return [start + a * m + np.arange(m) for a in range(q)]

    def _spots(self) -> list[tuple[bool, list[tuple[Any, Any]]]]:
        """Of every direction: whether it is the first factor's, and the orders of its effects, of a dense factor as
        places in the dense block."""
        found: list[tuple[bool, list[tuple[Any, Any]]]] = []
        for f, (a, b) in self.pairs:
            if f == self.first:
                found.append((True, list(orders_of(a, b))))
            else:
                at = self._dense_at(f)
                found.append((False, [(at[u], at[v]) for u, v in orders_of(a, b)]))
        return found

    def traces_of_N(self, gain: BlockGain) -> Array:
        N11 = linalg.matmul(gain.F1, gain.A.first) - gain.TKT
        found = [
            sum(N11[u, v].sum() if first else gain.N22[u, v].sum() for u, v in spot) for first, spot in self._spots()
        ]
        return np.array(found)[:, None]

    def traces(self, gain: BlockGain, dW: Array) -> Traces:
        pattern, spots = gain.pattern, self._spots()
        n_T, J = len(dW), len(spots)
        K1, F1, Kd = gain.K1, gain.F1, gain.Kd
        # tr(R'E R dA) of a change of the dense block alone is its inner product with these.
        grams = {
            j: sum(pattern.gram(gain.T[u][None], gain.T[v][None]) for u, v in spot)
            for j, (first, spot) in enumerate(spots)
            if first
        }
        KJ = {j: linalg.product(Kd, own) for j, own in grams.items()}
        sides = [
            linalg.product(KJ[j], Kd) if first else sum(linalg.product(gain.Fd[u].T, gain.Fd[v]) for u, v in spot)
            for j, (first, spot) in enumerate(spots)
        ]
        RR, KS, flat_K, turned, P, KP = np.empty((n_T, J)), np.empty((n_T, self.d, self.d)), [], [], [], []
        for i in range(n_T):
            dA = self.normal(dW[i])
            moved = gain.levels_times(dA.first, gain.H)
            own = dA.side - moved  # (V'dA)_1 by level, transposed
            half = pattern.gram(gain.H, dA.side - 0.5 * moved)
            s = dA.dense
            s -= half
            s -= half.T
            K1dA = linalg.matmul(K1, dA.first)
            flat_K.append(K1dA.reshape(-1))
            turned.append(K1dA.swapaxes(0, 1).reshape(-1))
            P.append(gain.times_Kd(own).reshape(-1))
            KP.append(gain.levels_times(K1, own).reshape(-1))
            KS[i] = linalg.product(Kd, s)
            RAR = linalg.matmul(linalg.matmul(F1, dA.first), linalg.transpose(F1)).sum(-1)
            Fown = gain.levels_times(F1, own)
            for j, (first, spot) in enumerate(spots):
                RR[i, j] = _inner(s, sides[j])
                if first:
                    RR[i, j] += sum(RAR[u, v] - 2.0 * (Fown[u] * gain.TK[v]).sum() for u, v in spot)
        KK = np.stack(flat_K) @ np.stack(turned).T + 2.0 * np.stack(P) @ np.stack(KP).T + _traces_of_products(KS)
        return Traces(KK[..., None], RR[..., None], self._NN(gain, grams, KJ, sides)[..., None])

    def _NN(self, gain: BlockGain, grams: dict[int, Array], KJ: dict[int, Array], sides: list[Array]) -> Array:
        """``tr(N E N E')``; all but gain as in :meth:`traces`."""
        spots = self._spots()
        J = len(spots)
        N1 = linalg.matmul(gain.F1, gain.A.first)
        found = np.zeros((J, J))
        for i, (first, spot) in enumerate(spots):
            for j, (other, other_spot) in enumerate(spots):
                if first and other:
                    by_level = sum(
                        (N1[b, c] * N1[e, a] - 2.0 * N1[b, c] * gain.TKT[e, a]).sum()
                        for a, b in spot
                        for c, e in other_spot
                    )
                    found[i, j] = by_level + _inner(KJ[i], KJ[j].T)
                elif first:
                    found[i, j] = found[j, i] = _inner(grams[i], sides[j])
        self._fill_dense(found, gain.N22)
        return found

    def _fill_dense(self, found: Array, N22: Array) -> None:
        """The entries of dense factors among each other: sums of products of blocks, of all effects of two factors at
        once."""
        of_factor: dict[int, list[tuple[int, tuple[int, int]]]] = {}
        for i, (f, pair) in enumerate(self.pairs):
            if f != self.first:
                of_factor.setdefault(f, []).append((i, pair))
        at = {f: np.stack(self._dense_at(f)) for f in of_factor}  # (q, m)
        for f, own in of_factor.items():
            for g, others in of_factor.items():
                block = N22[at[g].ravel()[:, None], at[f].ravel()].reshape(*at[g].shape, *at[f].shape)
                sums = np.einsum("bxuy,axvy->bauv", block, block, optimize=True)
                for i, (u, v) in own:
                    for j, (a, b) in others:
                        found[i, j] = sum(sums[d, c, s, t] for s, t in orders_of(u, v) for c, d in orders_of(a, b))


def _inner(A: Array, B: Array) -> Array:
    return np.einsum("ij,ij->", A, B)


# Rows of a piece of matrices that stays in the cache.
PIECE = 64


def _traces_of_products(A: Array) -> Array:
    """``tr(A_i A_j) (T, T)`` of ``(T, d, d)``."""
    found = np.zeros((len(A), len(A)))
    for start in range(0, A.shape[1], PIECE):
        rows, columns = A[:, start : start + PIECE], A[:, :, start : start + PIECE].swapaxes(1, 2)
        found += linalg.product(rows.reshape(len(A), -1), columns.reshape(len(A), -1).T)
    return found


def crossed(rows: FamilyRows) -> Crossed:
    """The rows of a model with several grouping factors; of NumPy's arrays."""
    layout = rows.layout
    first, *others = layout.chain + layout.dense
    Zd, at, blocks, start = [], [], [], 0
    for f in others:
        q, m = rows.Z[f].shape[1], rows.levels[f]
        for a in range(q):
            Zd.append(rows.Z[f][:, a])
            at.append(start + a * m + rows.groups[f])
        blocks.append((f, q, m, start))
        start += q * m
    return Crossed(
        np.ascontiguousarray(rows.Z[first].T), np.asarray(rows.groups[first]), rows.levels[first],
        np.stack(Zd), np.stack(at).astype(np.int64), tuple(blocks), layout,
    )  # fmt: skip
