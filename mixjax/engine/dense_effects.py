"""Random effects of several grouping factors in lanes: all of them are one dense block; see
:mod:`mixjax.engine.effects`. By NumPy, for models with few effects, of which many fits are wanted."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse

from mixjax.engine.effects import Traces, directions_of, factor_of
from mixjax.machine import Array
from mixjax.products.family_rows import FamilyRows
from mixjax.products.sums import Layout

# Random effects in all up to which a dense matrix a lane is less work than eliminating the levels of one factor.
MOST_TOGETHER = 96


@dataclass(frozen=True, eq=False)
class TogetherGain:
    """What follows from D and A, of :class:`Together`: ``A, K (L, N, N)`` and ``logdet (L,)``, NaN where ``I + A D`` is
    not positive."""

    A: Array
    K: Array
    logdet: Array

    @cached_property
    def R(self) -> Array:
        """``I - A K (L, N, N)``."""
        R: Array = -(self.A @ self.K)
        R[:, np.arange(R.shape[1]), np.arange(R.shape[1])] += 1.0
        return R

    @cached_property
    def N(self) -> Array:
        """``R A (L, N, N)``."""
        N: Array = self.R @ self.A
        return N

    def solve(self, r: Array) -> Array:
        """``K r`` of effects ``(..., N, L)``."""
        return _times(self.K, r)

    def times_A(self, b: Array) -> Array:
        return _times(self.A, b)


def _times(M: Array, v: Array) -> Array:
    """``M (L, N, N)`` times vectors ``(..., N, L)``."""
    flat = v.reshape(-1, *v.shape[-2:])
    found = M @ np.ascontiguousarray(flat.transpose(2, 1, 0))
    return np.ascontiguousarray(found.transpose(2, 1, 0)).reshape(*v.shape[:-2], M.shape[1], len(M))


@dataclass(frozen=True, eq=False)
class Together:
    """All effects of all factors side by side, N of them: factor by factor, in each effect by effect, in each level by
    level.

    Attributes:
        Z: ``(n, N)`` sparse. blocks: per factor (q, levels, start). layout: as in the rows.
    """

    Z: Any
    blocks: tuple[tuple[int, int, int], ...]
    layout: Layout
    row_axes = 1

    @property
    def N(self) -> int:
        return int(self.Z.shape[1])

    @property
    def effect_shape(self) -> tuple[int, ...]:
        return (self.N,)

    @cached_property
    def _spots(self) -> list[list[tuple[Array, Array]]]:
        """Of every direction, where its ones stand, order by order."""
        found = []
        for f, (a, b) in directions_of(self.layout):
            _, m, start = self.blocks[f]
            at = [start + u * m + np.arange(m) for u in (a, b)]
            found.append([(at[0], at[1])] if a == b else [(at[0], at[1]), (at[1], at[0])])
        return found

    @cached_property
    def _ZT(self) -> Any:
        return self.Z.T.tocsr()

    @cached_property
    def _ZZ(self) -> Any:
        """``(N^2, n)``: the products of any two columns."""
        return self._products.T.tocsr()

    @cached_property
    def _products(self) -> Any:
        """``(n, N^2)``."""
        Z, n = self.Z, self.Z.shape[0]
        width = np.diff(Z.indptr)
        each = [np.arange(a, a + w) for a, w in zip(Z.indptr[:-1], width, strict=True)]
        left = np.concatenate([np.repeat(at, len(at)) for at in each])
        right = np.concatenate([np.tile(at, len(at)) for at in each])
        columns = Z.indices[left].astype(np.int64) * self.N + Z.indices[right]
        starts = np.concatenate([[0], np.cumsum(width**2)])
        return sparse.csr_array((Z.data[left] * Z.data[right], columns, starts), shape=(n, self.N**2))

    # --- rows <-> effects

    def rows(self, b: Array) -> Array:
        return times_each(self.Z, b)

    def effects(self, w: Array) -> Array:
        return times_each(self._ZT, w)

    def normal(self, w: Array) -> Array:
        """``A (..., L, N, N)``."""
        found = [(self._ZZ @ own).T for own in w.reshape(-1, *w.shape[-2:])]
        return np.stack(found).reshape(*w.shape[:-2], w.shape[-1], self.N, self.N)

    # --- units: all effects move together

    def units(self, w: Array) -> Array:
        return w.sum(-2)[None]

    def unit_dots(self, a: Array, b: Array) -> Array:
        return (a * b).sum(-2)[None]

    def of_units(self, values: Array) -> Array:
        return values

    # --- equations

    def _root(self, lambdas: list[Array]) -> Array:
        """``Lambda (L, N, N)``, or ``(L, N)`` of a diagonal."""
        L = np.shape(lambdas[0])[-1]
        factors = [factor_of(lambdas, self.layout, f) for f in range(len(self.blocks))]
        if all(len(F) == 1 for F in factors):
            parts = zip(factors, self.blocks, strict=True)
            return np.concatenate([np.broadcast_to(F[0, 0][:, None], (L, m)) for F, (_, m, _) in parts], axis=1)
        root = np.zeros((L, self.N, self.N))
        for F, (q, m, start) in zip(factors, self.blocks, strict=True):
            level = np.arange(m)
            for a in range(q):
                for b in range(q):
                    root[:, start + a * m + level, start + b * m + level] = F[a, b][:, None]
        return root

    def times_D(self, lambdas: list[Array], v: Array) -> Array:
        parts = []
        for f, (q, m, start) in enumerate(self.blocks):
            F = factor_of(lambdas, self.layout, f)
            own = v[..., start : start + q * m, :].reshape(*v.shape[:-2], q, m, v.shape[-1])
            D = np.einsum("acl,bcl->abl", F, F)
            parts.append(np.einsum("abl,...bml->...aml", D, own).reshape(*v.shape[:-2], q * m, v.shape[-1]))
        return np.concatenate(parts, axis=-2)

    def gain(self, lambdas: list[Array], A: Array) -> TogetherGain:
        root = self._root(lambdas)
        flat = root.ndim == 2
        M = root[:, :, None] * A * root[:, None, :] if flat else np.swapaxes(root, 1, 2) @ A @ root
        M[:, np.arange(self.N), np.arange(self.N)] += 1.0
        with np.errstate(invalid="ignore"):
            sign, logdet = np.linalg.slogdet(M)
            fine = (sign > 0) & np.isfinite(logdet)
            inverse = np.linalg.inv(np.where(fine[:, None, None], M, np.eye(self.N)))
        K = root[:, :, None] * inverse * root[:, None, :] if flat else root @ inverse @ np.swapaxes(root, 1, 2)
        K[~fine] = np.nan
        return TogetherGain(A, K, np.where(fine, logdet, np.nan))

    def leverages(self, gain: TogetherGain) -> Array:
        found: Array = self._products @ np.ascontiguousarray(gain.K.reshape(len(gain.K), -1).T)
        return found

    def moved(self, v: Array) -> Array:
        found = np.zeros((len(self._spots), *v.shape))
        for own, spot in zip(found, self._spots, strict=True):
            for u, w in spot:
                own[u] = v[w]
        return found

    def traces_of_N(self, gain: TogetherGain) -> Array:
        return np.stack([sum(gain.N[:, u, w].sum(1) for u, w in spot) for spot in self._spots])

    def traces(self, gain: TogetherGain, dW: Array) -> Traces:
        dA = self.normal(dW)  # (T, L, N, N)
        T, L = dA.shape[:2]
        KdA = np.swapaxes(gain.K @ dA, 0, 1)  # (L, T, N, N)
        KK = KdA.reshape(L, T, -1) @ np.swapaxes(np.swapaxes(KdA, 2, 3).reshape(L, T, -1), 1, 2)
        R, N = gain.R, gain.N
        turned = np.swapaxes(R, 1, 2)
        RER = np.stack([sum(turned[:, :, u] @ R[:, w] for u, w in spot) for spot in self._spots], 1)
        RR = np.swapaxes(dA, 0, 1).reshape(L, T, -1) @ np.swapaxes(RER.reshape(L, len(self._spots), -1), 1, 2)
        NN = [
            [
                sum((N[:, b][:, :, u] * N[:, a][:, :, v]).sum((1, 2)) for u, v in spot for a, b in other)
                for other in self._spots
            ]
            for spot in self._spots
        ]
        return Traces(np.moveaxis(KK, 0, -1), np.moveaxis(RR, 0, -1), np.array(NN))


def times_each(M: Any, values: Array) -> Array:
    """``M (r, c)`` sparse, times ``(..., c, L)``."""
    if values.ndim == 2:
        found: Array = M @ values
        return found
    flat = values.reshape(-1, *values.shape[-2:])
    return np.stack([M @ own for own in flat]).reshape(*values.shape[:-2], M.shape[0], values.shape[-1])


def together(rows: FamilyRows) -> Together:
    """The rows of a model with any grouping factors; of NumPy's arrays."""
    blocks, columns, numbers, start = [], [], [], 0
    for Z, group, m in zip(rows.Z, rows.groups, rows.levels, strict=True):
        q = Z.shape[1]
        blocks.append((q, m, start))
        for a in range(q):
            columns.append(start + a * m + np.asarray(group, np.int64))
            numbers.append(np.asarray(Z[:, a], np.float64))
        start += q * m
    at, values = np.stack(columns, 1), np.stack(numbers, 1)
    starts = np.arange(rows.n + 1) * at.shape[1]
    matrix = sparse.csr_array((values.reshape(-1), at.reshape(-1), starts), shape=(rows.n, start))
    return Together(matrix, tuple(blocks), rows.layout)
