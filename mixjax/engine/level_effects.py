"""Random effects of one grouping factor: everything is a tiny matrix a level, in lanes; see
:mod:`mixjax.engine.effects`."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixjax import linalg
from mixjax.covariance import pairs_of, stack_of
from mixjax.engine.effects import Traces, directions_of, dots, factor_of, orders_of
from mixjax.machine import Array, namespace, stack
from mixjax.products.family_rows import FamilyRows
from mixjax.products.sums import Layout

# Rows in a rectangle (levels, rows of a level) where empty places are not more than this part of the rows.
MOST_EMPTY = 0.5
# Rows of a level at most, the logarithms of whose factors up to 2 are summed as one of their product.
MOST_FACTORS = 1000


def _moves(values: Array, pairs: list[tuple[int, int]]) -> Array:
    """``E v`` of every direction: ``v (q, ...) -> (J, q, ...)``."""
    if len(values) == 1:
        return values[None]
    zero = namespace(values).zeros_like(values[0])
    q, found = len(values), []
    for a, b in pairs:
        column = [zero] * q
        column[a] = values[b]
        if a != b:
            column[b] = values[a]
        found.append(stack(column))
    return stack(found)


def _of_direction(M: Array, pairs: list[tuple[int, int]]) -> Array:
    """``tr(M E)`` of symmetric ``M (q, q, ...) -> (J, ...)``."""
    return stack([M[a, b] if a == b else M[a, b] + M[b, a] for a, b in pairs])


class LevelGain(NamedTuple):
    """Of :class:`OneFactor`: ``A, K, R, N (q, q, m, L)`` and ``logdet (L,)``."""

    A: Array
    K: Array
    R: Array
    N: Array
    logdet: Array

    def solve(self, r: Array) -> Array:
        """``K r`` of effects ``(..., q, m, L)``."""
        return _times(self.K, r)

    def times_A(self, b: Array) -> Array:
        return _times(self.A, b)


def _times(M: Array, v: Array) -> Array:
    """``M (q, q, m, L)`` times vectors ``(..., q, m, L)``."""
    if len(M) == 1:
        return M[0, 0] * v
    return namespace(M, v).stack(
        [sum(M[a, b] * v[..., b, :, :] for b in range(len(M))) for a in range(len(M))], axis=-3
    )


def _gain_of_two(L: Array, A: Array) -> LevelGain:
    """Of two effects a level, with ``D = L L'``: inverses written out, without a difference of what is nearly alike."""
    xp = namespace(L, A)
    D = linalg.matmul(L, linalg.transpose(L))
    det_D, det_A = (L[0, 0] * L[1, 1] - L[0, 1] * L[1, 0]) ** 2, A[0, 0] * A[1, 1] - A[0, 1] * A[0, 1]
    P = linalg.matmul(A, D)
    M = 1.0 + P[0, 0] + P[1, 1] + det_D * det_A  # |I + A D|
    over = 1.0 / M

    def symmetric(a: Array, b: Array, c: Array) -> Array:
        return stack([stack([a, b]), stack([b, c])])

    K = symmetric(
        (D[0, 0] + det_D * A[1, 1]) * over, (D[0, 1] - det_D * A[0, 1]) * over, (D[1, 1] + det_D * A[0, 0]) * over
    )
    N = symmetric(
        (A[0, 0] + det_A * D[1, 1]) * over, (A[0, 1] - det_A * D[0, 1]) * over, (A[1, 1] + det_A * D[0, 0]) * over
    )
    R = stack([
        stack([(1.0 + P[1, 1]) * over, -P[0, 1] * over]), stack([-P[1, 0] * over, (1.0 + P[0, 0]) * over])
    ])  # fmt: skip
    # Two negative eigenvalues have a positive product.
    return LevelGain(A, K, R, N, xp.log(xp.where(2.0 + P[0, 0] + P[1, 1] > 0, M, -1.0)).sum(0))


def _of_two(gain: LevelGain, dA: Array, pairs: list[tuple[int, int]]) -> tuple[Array, Array]:
    """``RR`` and ``NN`` of :class:`Traces` of two effects a level: of symmetric matrices three entries say all."""
    xp, R, N = namespace(dA), gain.R, gain.N
    changes = xp.stack([dA[0, 0], dA[0, 1], dA[1, 1]], 1)  # (T, 3, m, L)
    twice = {(a, b): 1.0 if a == b else 2.0 for a, b in pairs}
    weights = stack([
        twice[a, b] * stack([R[a, 0] * R[b, 0], R[a, 0] * R[b, 1] + R[a, 1] * R[b, 0], R[a, 1] * R[b, 1]])
        for a, b in pairs
    ])  # fmt: skip
    entries = stack([N[0, 0], N[0, 1], N[1, 1]])
    products = dots(entries, entries, 1, symmetric=True)
    place = {(0, 0): 0, (0, 1): 1, (1, 0): 1, (1, 1): 2}
    NN = [
        [twice[c, d] * sum(products[place[c, u], place[v, d]] for u, v in orders_of(a, b)) for c, d in pairs]
        for a, b in pairs
    ]
    return dots(changes, weights, 2), stack([stack(row) for row in NN])


@dataclass(frozen=True)
class OneFactor:
    """All effects belong to levels of one factor: everything is a matrix ``(q, q)`` a level. A JAX pytree.

    Attributes:
        Z: ``(q, *rows, 1)``. rows are ``(m, r)``, a rectangle with places that may be empty, or ``(n,)`` by level.
        index: ``(m, r)`` or ``(n,)`` which row of the data stands where. starts: ``(m,)`` where a level begins among
            ``(n,)``, None of a rectangle. level: ``(n,)`` the level of every row, None of a rectangle.
        layout: static.
    """

    Z: Array
    index: Array
    starts: Array | None
    level: Array | None
    m: int
    layout: Layout

    @property
    def row_axes(self) -> int:
        return np.ndim(self.index)

    @property
    def effect_shape(self) -> tuple[int, ...]:
        return (len(self.Z), self.m)

    @property
    def has_few_rows(self) -> bool:
        """The product of a row function up to 2 over a level is a number."""
        return self.starts is None and np.shape(self.index)[1] <= MOST_FACTORS

    @cached_property
    def pairs(self) -> list[tuple[int, int]]:
        return [pair for _, pair in directions_of(self.layout)]

    @property
    def _ZZ(self) -> dict[tuple[int, int], Array]:
        # Kept of numbers only: what one part of a program has traced, such as a loop, no other can use.
        return self._kept_ZZ if isinstance(self.Z, np.ndarray) else self._products_of_Z()

    @cached_property
    def _kept_ZZ(self) -> dict[tuple[int, int], Array]:
        return self._products_of_Z()

    def _products_of_Z(self) -> dict[tuple[int, int], Array]:
        return {(a, b): self.Z[a] * self.Z[b] for a, b in pairs_of(len(self.Z))}

    # --- rows <-> effects

    def by_level(self, w: Array) -> Array:
        """Sums ``(..., m, L)`` over the rows of every level."""
        if self.starts is None:
            return w.sum(-2)
        if isinstance(w, np.ndarray):
            if w.shape[-1] == 1:
                return np.add.reduceat(w[..., 0], self.starts, axis=-1)[..., None]
            return np.add.reduceat(w, self.starts, axis=-2)
        moved = jnp.moveaxis(w, -2, 0)
        return jnp.moveaxis(jax.ops.segment_sum(moved, jnp.asarray(self.level), self.m, indices_are_sorted=True), 0, -2)

    def at_rows(self, values: Array) -> Array:
        """``(..., m, L) ->`` every row's level's."""
        if self.starts is None:
            return values[..., None, :]
        return namespace(values).take(values, self.level, axis=-2)

    def rows(self, b: Array) -> Array:
        """``z_j'b``."""
        at = [self.Z[a] * self.at_rows(b[..., a, :, :]) for a in range(len(self.Z))]
        return sum(at[1:], at[0])

    def effects(self, w: Array) -> Array:
        """``Z'w``."""
        if len(self.Z) == 1:
            return self.by_level(w * self.Z[0])[..., None, :, :]
        return namespace(w, self.Z).stack([self.by_level(w * self.Z[a]) for a in range(len(self.Z))], axis=-3)

    def normal(self, w: Array) -> Array:
        """``Z' diag(w) Z (q, q, ..., m, L)``."""
        sums = {pair: self.by_level(w * ZZ) for pair, ZZ in self._ZZ.items()}
        q = len(self.Z)
        return stack_of([[sums[min(a, b), max(a, b)] for b in range(q)] for a in range(q)])

    # --- units: what an inner step is judged by

    def units(self, w: Array) -> Array:
        """Sums of rows over each unit, ``(m, L)``."""
        return self.by_level(w)

    def unit_dots(self, a: Array, b: Array) -> Array:
        """``a'b`` within each unit."""
        return (a * b).sum(-3)

    def of_units(self, values: Array) -> Array:
        """A number per unit, for its effects."""
        return values

    # --- equations

    def times_D(self, lambdas: list[Array], v: Array) -> Array:
        L = factor_of(lambdas, self.layout, 0)[:, :, None]
        return _times(L, _times(linalg.transpose(L), v))

    def gain(self, lambdas: list[Array], A: Array) -> LevelGain:
        L = factor_of(lambdas, self.layout, 0)[:, :, None]
        if len(L) == 2:
            return _gain_of_two(L, A)
        one = linalg.eye(len(L), A)
        if len(L) == 1:
            D = L * L
            M = 1.0 + D * A
            K, R, logdet = D / M, 1.0 / M, namespace(M).log(M[0, 0])
            return LevelGain(A, K, R, R * A, logdet.sum(0))
        inverse, logdet = linalg.inverse_logdet(one + linalg.matmul(linalg.matmul(linalg.transpose(L), A), L))
        K = linalg.matmul(linalg.matmul(L, inverse), linalg.transpose(L))
        R = one - linalg.matmul(A, K)
        return LevelGain(A, K, R, linalg.matmul(R, A), logdet.sum(0))

    def leverages(self, gain: LevelGain) -> Array:
        """``z_j'K z_j``."""
        K = gain.K
        parts = [ZZ * self.at_rows(K[a, b] if a == b else 2.0 * K[a, b]) for (a, b), ZZ in self._ZZ.items()]
        return sum(parts[1:], parts[0])

    def covariances(self, gain: LevelGain) -> dict[int, Array]:
        """Factor -> ``(q, q, m)`` blocks of K of its levels, in the first lane."""
        return {0: gain.K[..., 0]}

    def moved(self, v: Array) -> Array:
        """``E v`` of every direction."""
        return _moves(v, self.pairs)

    def traces_of_N(self, gain: LevelGain) -> Array:
        """``tr(N E) (J, L)``."""
        return _of_direction(gain.N.sum(2), self.pairs)

    def traces(self, gain: LevelGain, dW: Array) -> Traces:
        """Args: dW: ``(T, *rows, L)``, of which ``dA = Z' diag(dW) Z``."""
        dA = self.normal(dW)  # (q, q, T, m, L)
        q = len(self.Z)
        K, R = gain.K[:, :, None], gain.R[:, :, None]
        if q == 1:
            KdA = K[0, 0] * dA[0, 0]
            RR = (R[0, 0] ** 2 * dA[0, 0]).sum(-2)[:, None]
            return Traces(dots(KdA, KdA, 1, symmetric=True), RR, (gain.N[0, 0] ** 2).sum(0)[None, None])
        KdA = linalg.matmul(K, dA)
        flat = [KdA[a, b] for a in range(q) for b in range(q)]
        turned = [KdA[b, a] for a in range(q) for b in range(q)]
        xp = namespace(KdA)
        KK = dots(xp.stack(flat, 1), xp.stack(turned, 1), 2, symmetric=True)
        if q == 2:
            return Traces(KK, *_of_two(gain, dA, self.pairs))
        RdAR = linalg.matmul(linalg.matmul(R, dA), linalg.transpose(R)).sum(-2)
        RR = xp.moveaxis(_of_direction(RdAR, self.pairs), 0, 1)
        NN = []
        for a, b in self.pairs:
            NEN = sum(gain.N[:, u][:, None] * gain.N[v][None] for u, v in orders_of(a, b)).sum(2)
            NN.append(_of_direction(NEN, self.pairs))
        return Traces(KK, RR, stack(NN))


jax.tree_util.register_dataclass(OneFactor, data_fields=["Z", "index", "starts", "level"], meta_fields=["m", "layout"])


def one_factor(rows: FamilyRows) -> OneFactor:
    """The rows of a model with one grouping factor by level; of NumPy's groups."""
    group, m = np.asarray(rows.groups[0]), rows.levels[0]
    order = np.argsort(group, kind="stable")
    count = np.bincount(group, minlength=m)
    n, r = len(group), int(count.max())
    Z = rows.Z[0]
    if m * r <= (1.0 + MOST_EMPTY) * n or (count == 0).any():
        starts = np.cumsum(count) - count
        within = np.arange(n) - np.repeat(starts, count)
        index = np.full((m, r), -1)
        index[group[order], within] = order
        return OneFactor(_columns(Z, index), index, None, None, m, rows.layout)
    starts = np.cumsum(count) - count
    return OneFactor(_columns(Z, order), order, starts, group[order].astype(np.int32), m, rows.layout)


def _columns(columns: Array, index: np.ndarray) -> Array:
    """``(n, c) -> (c, *rows, 1)``."""
    return namespace(columns).moveaxis(columns[filled(index)], -1, 0)[..., None]


def filled(index: np.ndarray) -> np.ndarray:
    """Which row of the data stands where; at empty places one of the same level, of a level without rows the first of
    all. It has no weight, but a predictor that its family takes, where zero may have no mean."""
    if index.ndim == 1:
        return index
    found: np.ndarray = np.maximum(np.where(index < 0, index[:, :1], index), 0)
    return found
