"""Random effects of several grouping factors: the first one's levels are eliminated one by one, all others are one
dense block; see :mod:`mixjax.engine.effects`. By NumPy, one lane."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from mixjax import linalg
from mixjax.covariance import pairs_of
from mixjax.engine.effects import Traces, directions_of, factor_of, orders_of
from mixjax.machine import Array
from mixjax.products.family_rows import FamilyRows
from mixjax.products.sums import Layout


class BlockMatrix(NamedTuple):
    """Symmetric matrices over all effects: ``first (..., q, q, m)`` by level of the first factor, ``side (..., q, m,
    d)``, ``dense (..., d, d)``."""

    first: Array
    side: Array
    dense: Array


class BlockGain(NamedTuple):
    """Of :class:`Crossed`; see there for the letters."""

    A: BlockMatrix
    K1: Array  # (q, q, m)
    F1: Array
    H: Array  # (q, m, d): K1 A12
    S: Array  # (d, d)
    Kd: Array
    logdet: Array  # (1,)

    def times_A(self, b: Array) -> Array:
        """Effects ``(..., N, 1)``."""
        A, (q, m, d) = self.A, self.A.side.shape
        first, rest = b[..., : q * m, 0].reshape(-1, q, m), b[..., q * m :, 0].reshape(-1, d)
        side = A.side.reshape(q * m, d)
        top = np.einsum("abm,tbm->tam", A.first, first).reshape(len(first), q * m) + rest @ side.T
        low = first.reshape(-1, q * m) @ side + rest @ A.dense
        return np.concatenate([top, low], axis=1).reshape(*b.shape)

    def solve(self, r: Array) -> Array:
        """``K r`` of effects ``(..., N, 1)``."""
        q, m, d = self.A.side.shape
        first, rest = r[..., : q * m, 0].reshape(-1, q, m), r[..., q * m :, 0].reshape(-1, d)
        H = self.H.reshape(q * m, d)
        low = (rest - first.reshape(-1, q * m) @ H) @ self.Kd
        top = np.einsum("abm,tbm->tam", self.K1, first).reshape(len(first), q * m) - low @ H.T
        return np.concatenate([top, low], axis=1).reshape(*r.shape)


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
        q, m, d, T = len(self.Z1), self.m, self.d, len(flat)
        first, side, dense = np.empty((T, q, q, m)), np.empty((T, q, m, d)), np.empty((T, d, d))
        for i, own in enumerate(flat):
            for a, b in pairs_of(q):
                first[i, a, b] = first[i, b, a] = np.bincount(self.level, own * self.Z1[a] * self.Z1[b], m)
            for a in range(q):
                values = (own * self.Z1[a] * self.Zd).reshape(-1)
                side[i, a] = np.bincount(self._side_index, values, m * d).reshape(m, d)
            values = np.concatenate([own * self.Zd[c] * self.Zd[e] for c, e in pairs_of(len(self.Zd))])
            half = np.bincount(self._dense_index, values, d * d).reshape(d, d)
            dense[i] = half + half.T
            dense[i][np.diag_indices(d)] = half.diagonal()
        shape = w.shape[:-2]
        return BlockMatrix(first.reshape(*shape, q, q, m), side.reshape(*shape, q, m, d), dense.reshape(*shape, d, d))

    @cached_property
    def _side_index(self) -> Array:
        return (self.level * self.d + self.at).reshape(-1)

    @cached_property
    def _dense_index(self) -> Array:
        """Of pairs c <= e: in the upper triangle, so that each pair of effects is counted once."""
        low = [np.minimum(self.at[c], self.at[e]) for c, e in pairs_of(len(self.at))]
        high = [np.maximum(self.at[c], self.at[e]) for c, e in pairs_of(len(self.at))]
        return np.concatenate(low) * self.d + np.concatenate(high)

    # --- units: all effects move together

    def units(self, w: Array) -> Array:
        return w.sum(0)[None]

    def unit_dots(self, a: Array, b: Array) -> Array:
        return (a * b).sum(-2)[None]

    def of_units(self, values: Array) -> Array:
        return values

    # --- equations

    def _dense_factor(self, lambdas: list[Array]) -> Array:
        """``(d, d)``: of the dense effects, block by block ``Lambda (x) I``."""
        found = np.zeros((self.d, self.d))
        for f, q, m, start in self.blocks:
            Lambda = factor_of(lambdas, self.layout, f)[..., 0]
            for a in range(q):
                for b in range(q):
                    rows, cols = start + a * m + np.arange(m), start + b * m + np.arange(m)
                    found[rows, cols] = Lambda[a, b]
        return found

    def _times_dense(self, lambdas: list[Array], V: Array, transpose: bool = False) -> Array:
        """``Lambda V`` or ``Lambda' V`` of the dense effects, ``V (d, c)``."""
        parts = []
        for f, q, m, start in self.blocks:
            Lambda = factor_of(lambdas, self.layout, f)[..., 0]
            own = V[start : start + q * m].reshape(q, -1)
            parts.append(((Lambda.T if transpose else Lambda) @ own).reshape(q * m, V.shape[1]))
        return np.concatenate(parts)

    def times_D(self, lambdas: list[Array], v: Array) -> Array:
        q, m = len(self.Z1), self.m
        L1 = factor_of(lambdas, self.layout, self.first)[..., 0]
        flat = v.reshape(-1, self.n_effects)
        top = np.einsum("ab,tbm->tam", L1 @ L1.T, flat[:, : q * m].reshape(-1, q, m)).reshape(-1, q * m)
        low = self._times_dense(lambdas, self._times_dense(lambdas, flat[:, q * m :].T, transpose=True)).T
        return np.concatenate([top, low], axis=1).reshape(*v.shape)

    def gain(self, lambdas: list[Array], A: BlockMatrix) -> BlockGain:
        q, m, d = A.side.shape
        L1 = factor_of(lambdas, self.layout, self.first)[..., 0]
        K1, logdets = linalg.gain(L1, A.first)
        F1 = linalg.eye(q, K1) - linalg.matmul(A.first, K1)
        H = _levels_times(K1, A.side)
        S = A.dense - A.side.reshape(q * m, d).T @ H.reshape(q * m, d)
        S = 0.5 * (S + S.T)
        M = np.eye(d) + self._times_dense(lambdas, self._times_dense(lambdas, S, True).T, True)
        inverse, logdet = linalg.inverse_logdet(0.5 * (M + M.T))
        Kd = self._times_dense(lambdas, self._times_dense(lambdas, inverse).T)
        return BlockGain(A, K1, F1, H, S, 0.5 * (Kd + Kd.T), np.array([logdets.sum() + logdet]))

    def leverages(self, gain: BlockGain) -> Array:
        q, m, d = gain.H.shape
        HK = (gain.H.reshape(q * m, d) @ gain.Kd).reshape(q, m, d)
        found = np.zeros(len(self.level))
        for a, b in pairs_of(q):
            W = gain.K1[a, b] + np.einsum("md,md->m", HK[a], gain.H[b])
            found += (1.0 if a == b else 2.0) * self.Z1[a] * self.Z1[b] * W[self.level]
        for c, at in zip(self.Zd, self.at, strict=True):
            for a in range(q):
                found -= 2.0 * self.Z1[a] * c * HK[a, self.level, at]
        for c, e in pairs_of(len(self.Zd)):
            found += (1.0 if c == e else 2.0) * self.Zd[c] * self.Zd[e] * gain.Kd[self.at[c], self.at[e]]
        return found[:, None]

    def covariances(self, gain: BlockGain) -> dict[int, Array]:
        """Factor -> ``(q, q, m)`` blocks of K of its levels."""
        q, m, d = gain.H.shape
        HK = (gain.H.reshape(q * m, d) @ gain.Kd).reshape(q, m, d)
        found = {self.first: gain.K1 + _levels_product(HK, gain.H)}
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

    def _by_direction(self, M1: Array, Md: Array) -> Array:
        """``tr(M E) (J, ...)`` from the diagonal blocks ``(..., q, q, m)`` and ``(..., d, d)`` of a symmetric M."""
        found = []
        for f, (a, b) in self.pairs:
            if f == self.first:
                total = M1[..., a, b, :].sum(-1)
            else:
                start, m = self.place_of(f)
                start -= len(self.Z1) * self.m
                rows, cols = start + a * m + np.arange(m), start + b * m + np.arange(m)
                total = Md[..., rows, cols].sum(-1)
            found.append(total if a == b else 2.0 * total)
        return np.stack(found)

    def _T(self, gain: BlockGain) -> Array:
        """``F1 A12 (q, m, d)``."""
        return _levels_times(gain.F1, gain.A.side)

    def traces_of_N(self, gain: BlockGain) -> Array:
        q, m, d = gain.H.shape
        T = self._T(gain)
        TK = (T.reshape(q * m, d) @ gain.Kd).reshape(q, m, d)
        N11 = linalg.matmul(gain.F1, gain.A.first) - _levels_product(TK, T)
        return self._by_direction(N11, gain.S - gain.S @ gain.Kd @ gain.S)[:, None]

    def traces(self, gain: BlockGain, dW: Array) -> Traces:
        q, m, d = gain.H.shape
        n_T = len(dW)
        H, Kd, K1, F1 = gain.H.reshape(q * m, d), gain.Kd, gain.K1, gain.F1
        T = self._T(gain).reshape(q * m, d)
        G = (T @ Kd).reshape(q, m, d)
        Fd = np.eye(d) - gain.S @ Kd
        KdA1, P, KP, Sd, R1, Rd = [], [], [], [], [], []
        for i in range(n_T):
            dA = self.normal(dW[i])
            own = dA.side - _levels_times(dA.first, gain.H)  # (V'dA)_1 by level, transposed
            flat = own.reshape(q * m, d)
            s = dA.dense - dA.side.reshape(q * m, d).T @ H - H.T @ flat
            s = 0.5 * (s + s.T)
            P.append(flat @ Kd)
            KP.append(_levels_times(K1, own).reshape(-1))
            KdA1.append(linalg.matmul(K1, dA.first))
            Sd.append(s)
            cross = _levels_product(_levels_times(F1, own), G)
            SG = (G.reshape(q * m, d) @ s).reshape(q, m, d)
            RAR = linalg.matmul(linalg.matmul(F1, dA.first), linalg.transpose(F1))
            R1.append(RAR - cross - cross.swapaxes(0, 1) + _levels_product(SG, G))
            Rd.append(Fd @ s @ Fd.T)
        flat_K = np.stack(KdA1).reshape(n_T, -1)
        turned = np.stack(KdA1).swapaxes(1, 2).reshape(n_T, -1)
        KS = [Kd @ s for s in Sd]
        KK = flat_K @ turned.T + 2.0 * np.stack([p.reshape(-1) for p in P]) @ np.stack(KP).T
        KK = KK + np.stack([k.reshape(-1) for k in KS]) @ np.stack([k.T.reshape(-1) for k in KS]).T
        RR = self._by_direction(np.stack(R1), np.stack(Rd)).T
        return Traces(KK[..., None], RR[..., None], self._NN(gain, T, Fd)[..., None])

    def _NN(self, gain: BlockGain, T: Array, Fd: Array) -> Array:
        q, m, d = gain.H.shape
        N1 = linalg.matmul(gain.F1, gain.A.first)
        T3 = T.reshape(q, m, d)
        TKT = _levels_product((T @ gain.Kd).reshape(q, m, d), T3)
        N22 = gain.S - gain.S @ gain.Kd @ gain.S
        J = len(self.pairs)
        own = [j for j, (f, _) in enumerate(self.pairs) if f == self.first]
        spots = {j: orders_of(*self.pairs[j][1]) for j in range(J)}
        J_E = {j: sum(T3[u].T @ T3[v] for u, v in spots[j]) for j in own}
        KJ = {j: gain.Kd @ J_E[j] for j in own}
        nothing = np.zeros((q, q, m))
        found = np.zeros((J, J))
        for i in range(J):
            if i in J_E:
                found[i] = self._by_direction(nothing, Fd @ J_E[i] @ Fd.T)
                for j in own:
                    by_level = sum(
                        (N1[b, c] * N1[e, a] - 2.0 * N1[b, c] * TKT[e, a]).sum()
                        for a, b in spots[i]
                        for c, e in spots[j]
                    )
                    found[i, j] = by_level + (KJ[i] * KJ[j].T).sum()
            else:
                start, size = self.place_of(self.pairs[i][0])
                start -= q * m
                NEN = np.zeros((d, d))
                for u, v in spots[i]:
                    left, right = start + u * size, start + v * size
                    NEN += N22[:, left : left + size] @ N22[right : right + size]
                found[i] = self._by_direction(nothing, NEN)
                for j in own:
                    found[i, j] = self._by_direction(nothing, Fd @ J_E[j] @ Fd.T)[i]
        return found


def _levels_product(U: Array, V: Array) -> Array:
    """``U_i V_i'`` level by level: ``(q, m, d) -> (q, q, m)``."""
    return np.stack([np.stack([np.einsum("md,md->m", u, v) for v in V]) for u in U])


def _levels_times(M: Array, V: Array) -> Array:
    """``M_i V_i`` level by level: ``(q, q, m), (q, m, d) -> (q, m, d)``."""
    return np.stack([sum(M[a, b][:, None] * V[b] for b in range(len(V))) for a in range(len(M))])


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
