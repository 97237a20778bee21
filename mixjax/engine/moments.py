"""Second moments of the first factor's products: all that the closed-form derivatives need of the data.

The first factor of the elimination has products ``A_i = Z_i'Z_i`` and ``B_i = Z_i'[U y]`` per level i, where U holds
the effects of all other factors and the basis of X. The likelihood depends on them only through sums over levels of
``B_i' W(A_i) B_i``, where the matrix W depends on the level through A_i alone. Levels of equal A_i form a class, and of
a class only ``sum_i B_i (x) B_i`` matters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, NamedTuple

import jax
import numpy as np

from mixjax.covariance import pairs_of
from mixjax.design import AnyArray
from mixjax.engine.elimination import arrange
from mixjax.linalg import over_first
from mixjax.machine import Array, namespace
from mixjax.products.sums import CrossProducts, Layout


class ClassSums(NamedTuple):
    """Sums over the levels of C classes, per pair (a, b) of effects: ``S_ab + S_ba``, or ``S_aa`` on the diagonal.

    Attributes:
        Uy: ``(pairs, C, u, L)`` of ``U_i (x) z_i``. yy: ``(pairs, C, L)`` of ``z_i (x) z_i``.
    """

    Uy: AnyArray
    yy: AnyArray


class LevelSums(NamedTuple):
    """Where every level is a class of its own the products themselves are shorter than their moments.

    Attributes:
        U: ``(q, u, C, L)``. z: ``(q, C, L)``, ``Z_i'y``.
    """

    U: AnyArray
    z: AnyArray


class RowSums(NamedTuple):
    """Under NumPy, where products of matrices are cheaper than moments.

    Attributes:
        V: ``(C, q, u + 1, L)``, ``Z_i'[U y]``; in memory lanes run slowest.
    """

    V: AnyArray


@dataclass(frozen=True)
class Moments:
    """Products of B fits, lanes last. An axis L has length B, or 1 for what all lanes share. A JAX pytree.

    Attributes:
        A: ``(q, q, C, L)`` of the C classes. count: ``(C, L)`` how many levels each has.
        pair_UU: ``(pairs, C, t, L)`` moments among the u columns of U, by pair of effects and pair of columns; None
            beside :class:`RowSums`.
        sums: moments with y.
        UU, Uy, yy: ``(u, u, L), (u, L), (L,)`` products of U's columns and of y.
        n, sum_log_weights, X_logdet: ``(L,)``.
        dense: ``(factor, q, m)`` of the factors whose effects stand first in U.
        layout: the structure.
    """

    A: AnyArray
    count: AnyArray
    pair_UU: AnyArray
    sums: ClassSums | LevelSums | RowSums
    UU: AnyArray
    Uy: AnyArray
    yy: AnyArray
    n: AnyArray
    sum_log_weights: AnyArray
    X_logdet: AnyArray
    dense: tuple[tuple[int, int, int], ...]
    layout: Layout

    def without_response(self) -> Moments:
        """The same with y = 0, so that lanes of one design are one lane."""

        def zero(a: Array) -> Array:
            return namespace(a).zeros((*a.shape[:-1], self.UU.shape[-1]), a.dtype)

        if isinstance(self.sums, RowSums):
            V = self.sums.V.copy()
            V[:, :, -1] = 0.0
            return replace(self, sums=RowSums(V), Uy=zero(self.Uy), yy=zero(self.yy))
        part = {name: getattr(self.sums, name) for name in self.sums._fields if name != "U"}
        sums = self.sums._replace(**{name: zero(a) for name, a in part.items()})
        return replace(self, sums=sums, Uy=zero(self.Uy), yy=zero(self.yy))

    def contract(self, weights: Any) -> tuple[Array, Array, Array]:
        """``sum_i [U_i z_i]' W(A_i) [U_i z_i]`` for j symmetric matrices W at once.

        Args:
            weights: per pair a <= b of effects ``(C, j, B)``, the entry of every W.

        Returns:
            ``(u, u, j, B), (u, j, B), (j, B)``.
        """
        xp = namespace(self.UU, weights[0])
        if isinstance(self.sums, RowSums):
            return _contract_rows(self.sums.V, np.asarray(weights))
        if self.pair_UU.shape[-1] == 1:
            upper = _sum_over_classes(self.pair_UU[..., 0], xp.stack(weights))
        else:
            upper = sum((S[:, :, None] * w[:, None]).sum(0) for S, w in zip(self.pair_UU, weights, strict=True))
        UU = upper[_position(self.Uy.shape[0])]
        if isinstance(self.sums, ClassSums):
            pairs = list(zip(weights, self.sums.Uy, self.sums.yy, strict=True))
            Uy = sum((S[:, :, None] * w[:, None]).sum(0) for w, S, _ in pairs)
            return UU, Uy, sum((S[:, None] * w).sum(0) for w, _, S in pairs)
        U, z = self.sums
        q = len(z)
        at = {pair: v for v, pair in enumerate(pairs_of(q))}
        Wz = [sum(weights[at[min(a, b), max(a, b)]] * z[b][:, None] for b in range(q)) for a in range(q)]
        if U.shape[-1] == 1:
            Uy = _sum_over_classes(xp.swapaxes(U[..., 0], 1, 2), xp.stack(Wz))
        else:
            Uy = sum((U[a][:, :, None] * Wz[a][None]).sum(1) for a in range(q))
        return UU, Uy, sum((z[a][:, None] * Wz[a]).sum(0) for a in range(q))

    def rows_times(self, c: Array) -> Array:
        """``Z_i'(y + U c)`` of every level of the first factor: ``(q, C, B)`` from ``c (u, B)``."""
        if isinstance(self.sums, RowSums):
            V, full = _lanes_first(self.sums.V), np.concatenate([c, np.ones((1, *c.shape[1:]))]).T
            return np.moveaxis((V @ full[:, None, :, None])[..., 0], (0, 1), (2, 1))
        U, z = self.sums
        if U.shape[-1] > 1:
            return z + (U * c[:, None]).sum(1)
        return z + over_rows(U, c)

    def pull_back(self, UU: Array, Uy: Array, yy: Array) -> Any:
        """``Q_i = [U_i z_i] Psi [U_i z_i]'`` summed over the levels of every class, for a symmetric Psi.

        Args:
            UU, Uy, yy: ``(u, u, B), (u, B), (B,)``, the parts of Psi.

        Returns:
            Per pair a <= b of effects ``(C, B)``: ``Q_aa``, or ``Q_ab + Q_ba``.
        """
        xp = namespace(self.UU, UU)
        if isinstance(self.sums, RowSums):
            return _pull_back_rows(self.sums.V, UU, Uy, yy)
        rows, columns = np.triu_indices(Uy.shape[0])
        twice = xp.asarray(np.where(rows == columns, 1.0, 2.0), UU.dtype)
        upper = UU[rows.astype(np.int32), columns.astype(np.int32)] * twice[:, None]
        if self.pair_UU.shape[-1] == 1:
            pairs, C, t, _ = self.pair_UU.shape
            Q = list(over_first(self.pair_UU.reshape(pairs * C, t).T, upper).reshape(pairs, C, upper.shape[1]))
        else:
            Q = [(S * upper).sum(1) for S in self.pair_UU]
        if isinstance(self.sums, ClassSums):
            pairs = zip(Q, self.sums.Uy, self.sums.yy, strict=True)
            return _as_array([x + 2.0 * (S * Uy).sum(1) + yy * s for x, S, s in pairs])
        U, z = self.sums
        shared = U.shape[-1] == 1
        w = over_rows(U, Uy) if shared else (U * Uy[:, None]).sum(1)
        w = w + (0.5 * yy) * z
        return _as_array(
            [
                x + (2.0 * w[a] * z[a] if a == b else 2.0 * (w[a] * z[b] + w[b] * z[a]))
                for x, (a, b) in zip(Q, pairs_of(len(z)), strict=True)
            ]
        )


def _lanes_first(V: np.ndarray) -> np.ndarray:
    return V.transpose(3, 0, 1, 2)


# Numbers of the products of all rows with several matrices at once.
MOST_AT_ONCE = 2**20


def _contract_rows(V: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    V = _lanes_first(V)
    L, C, q, r = V.shape
    flat = V.reshape(L, C * q, r)
    W = weights[_position(q)]  # (q, q, C, j, B)
    j, B = W.shape[3:]
    W = W.transpose(4, 2, 0, 3, 1)  # (B, C, q, j, q)
    step = max(1, MOST_AT_ONCE // (B * C * q * r))  # of the j at a time
    parts = []
    for k in range(0, j, step):
        some = W[:, :, :, k : k + step]
        n = some.shape[3]
        WV = some[:, :, 0] * V if q == 1 else some.reshape(B, C, q * n, q) @ V
        parts.append((flat.swapaxes(1, 2) @ WV.reshape(B, C * q, n * r)).reshape(B, r, n, r))
    G = np.concatenate(parts, axis=2).transpose(1, 3, 2, 0)  # (r, r, j, B)
    return G[:-1, :-1], G[:-1, -1], G[-1, -1]


def _pull_back_rows(V: np.ndarray, UU: np.ndarray, Uy: np.ndarray, yy: np.ndarray) -> np.ndarray:
    V = _lanes_first(V)
    L, C, q, r = V.shape
    Psi = np.empty((yy.shape[0], r, r), V.dtype)
    Psi[:, :-1, :-1], Psi[:, -1, -1] = UU.transpose(2, 0, 1), yy
    Psi[:, :-1, -1] = Psi[:, -1, :-1] = Uy.T
    half = (V.reshape(L, C * q, r) @ Psi).reshape(-1, C, q, r)
    if q == 1:
        squares: np.ndarray = (half * V).sum(3).T
        return squares
    Q = half @ V.swapaxes(2, 3)
    return np.stack([Q[:, :, a, b].T * (1.0 if a == b else 2.0) for a, b in pairs_of(q)])


def over_rows(U: Any, c: Any) -> Any:
    """``U_i c``: ``(q, u, C, 1), (u, B) -> (q, C, B)``."""
    q, u, C, _ = U.shape
    return over_first(U[..., 0].swapaxes(0, 1).reshape(u, q * C), c).reshape(q, C, c.shape[1])


def _as_array(Q: list[Array]) -> Any:
    """Of NumPy's arrays one; XLA has them one by one."""
    return np.stack(Q) if namespace(*Q) is np else Q


def _sum_over_classes(S: Array, w: Array) -> Array:
    """``(pairs, C, t), (pairs, C, j, B) -> (t, j, B)``."""
    xp = namespace(S, w)
    if namespace(S, w) is np:
        n = S.shape[0] * S.shape[1]
        return over_first(S.reshape(n, S.shape[2]), w.reshape(n, *w.shape[2:]))
    if w.shape[-1] > FEW_LANES:
        return xp.tensordot(S, w, ((0, 1), (0, 1)))
    return xp.moveaxis(xp.tensordot(w, S, ((0, 1), (0, 1))), -1, 0)


# Up to so many lanes a product that reads S along its rows is five times as fast as one along its columns.
FEW_LANES = 8

jax.tree_util.register_dataclass(
    Moments,
    data_fields=[
        "A", "count", "pair_UU", "sums", "UU", "Uy", "yy", "n", "sum_log_weights", "X_logdet",
    ],
    meta_fields=["dense", "layout"],
)  # fmt: skip


def moments_of(stats: CrossProducts, alone: bool = True) -> Moments:
    """Moments of one fit, with a last axis of 1; every level a class. Factors nested in the first's parents are dense.

    ``alone``: no other fits share them, so that NumPy has :class:`RowSums`.

    Inside ``vmap`` over fits with ``out_axes=-1`` drop that axis. Under NumPy also of many data sets that have their
    levels in common, in the last axis of all their arrays.
    """
    xp = namespace(stats.XX, stats.yy)
    layout = stats.layout
    first, rest = layout.chain[:1], layout.chain[1:] + layout.dense
    layout = Layout(layout.terms, first, rest, layout.pairs)
    blocks = arrange(replace(stats, layout=layout))
    A, B = blocks.A[first[0]], blocks.B[first[0]]
    U, z = B[:, :-1], B[:, -1]
    rows = alone and xp is np
    moments = Moments(
        A=A,
        count=xp.ones(A.shape[2], A.dtype),
        pair_UU=None if rows else pair_moments(U),
        sums=_row_sums(B) if rows else LevelSums(U, z),
        UU=blocks.G[:-1, :-1],
        Uy=blocks.G[:-1, -1],
        yy=blocks.G[-1, -1],
        n=xp.asarray(stats.n),
        sum_log_weights=xp.asarray(stats.sum_log_weights),
        X_logdet=xp.asarray(stats.X_basis.logdet),
        dense=blocks.dense,
        layout=layout,
    )
    if np.ndim(stats.yy):
        return replace(moments, count=moments.count[:, None])
    with_lanes: Moments = jax.tree.map(lambda x: x[..., None], moments)
    return with_lanes


def _row_sums(B: np.ndarray) -> RowSums:
    """From ``(q, r, C)``, or with lanes behind."""
    axes = (2, 0, 1) if B.ndim == 3 else (3, 2, 0, 1)
    V = np.ascontiguousarray(B.transpose(axes))
    return RowSums(V if B.ndim == 3 else np.moveaxis(V, 0, -1))


def pair_moments(U: Array) -> Array:
    """``S_ab + S_ba`` of ``S_ab = U_a (x) U_b``, upper entries only: ``(q, u, m) -> (pairs, m, t)``."""
    xp = namespace(U)
    rows, columns = (i.astype(np.int32) for i in np.triu_indices(U.shape[1]))
    U = xp.swapaxes(U, 1, 2)  # before the products, or the search keeps them the other way round and reads them slowly

    def moment(a: int, b: int) -> Array:
        one = U[a][:, rows] * U[b][:, columns]
        return one if a == b else one + U[b][:, rows] * U[a][:, columns]

    return xp.stack([moment(a, b) for a, b in pairs_of(U.shape[0])])


@cache
def _position(u: int) -> np.ndarray:
    """Where entry (r, s) of a symmetric matrix stands among its upper entries, row by row."""
    position = np.zeros((u, u), np.int32)
    position[np.triu_indices(u)] = np.arange(u * (u + 1) // 2)
    return np.maximum(position, position.T)
