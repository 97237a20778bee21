"""Random effects of nested factors in lanes: rows fall into components that share no effect, and everything is a matrix
over the rows of each; see :mod:`mixjax.engine.effects`. By NumPy.

With ``V = Z D Z'`` of the rows of a component and ``M = (I + W V)^{-1}``: ``Z K Z' = V M``, ``R Z' = Z' M``,
``Omega = M W = (V + W^{-1})^{-1}``, ``N = Z' Omega Z``, ``K = D - D Z' Omega Z D``, ``det(I + A D) = det(I + W V)``. A
direction E of D is ``S = Z E Z'`` among rows. An effect of every row costs no more than any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse
from scipy.sparse import csgraph

from mixjax.engine.dense_effects import MOST_TOGETHER, Together, times_each, together
from mixjax.engine.effects import Traces, directions_of, free_entries
from mixjax.machine import Array
from mixjax.products.family_rows import FamilyRows

# Components of up to so many rows stand in one stack, and rows of a component at most.
SIZES = (4, 8, 16, 32, 64)


@dataclass(frozen=True, eq=False)
class Stack:
    """Components of about the same size.

    Attributes:
        index: ``(C, r)`` rows, -1 at empty places. S: ``(J, C, r, r)`` of every direction.
    """

    index: Array
    S: Array

    def take(self, w: Array) -> Array:
        """Row functions ``(..., n, L) -> (L, C, ..., r)``, zero at empty places."""
        taken = np.where((self.index >= 0)[..., None], w[..., np.maximum(self.index, 0), :], 0.0)
        return np.moveaxis(np.moveaxis(taken, -1, 0), -2, 1)

    def put(self, values: Array, into: Array) -> None:
        """``(L, C, r)`` to their rows in ``(n, L)``."""
        there = self.index >= 0
        into[self.index[there]] = values[:, there].T


@dataclass(frozen=True, eq=False)
class ComponentGain:
    """What follows from D and A, of :class:`Components`; per stack ``V, M (L, C, r, r)``. ``A`` are the rows' weights
    ``(n, L)``."""

    effects: Components
    lambdas: list[Array]
    A: Array
    V: list[Array]
    M: list[Array]
    logdet: Array

    @cached_property
    def K(self) -> list[Array]:
        """``Z K Z'``."""
        return [V @ M for V, M in zip(self.V, self.M, strict=True)]

    @cached_property
    def Omega(self) -> list[Array]:
        stacks = self.effects.stacks
        return [M * stack.take(self.A)[:, :, None] for M, stack in zip(self.M, stacks, strict=True)]

    def solve(self, r: Array) -> Array:
        """``K r`` of effects ``(..., N, L)``."""
        effects = self.effects
        Dr = effects.times_D(self.lambdas, r)
        at_rows = effects.rows(Dr)
        flat = at_rows.reshape(-1, *at_rows.shape[-2:])
        found = np.zeros_like(flat)
        for Omega, stack in zip(self.Omega, effects.stacks, strict=True):
            own = stack.take(flat) @ np.swapaxes(Omega, -1, -2)  # (L, C, s, r)
            for i in range(len(flat)):
                stack.put(own[:, :, i], found[i])
        back = effects.effects(found.reshape(at_rows.shape))
        solved: Array = Dr - effects.times_D(self.lambdas, back)
        return solved

    def times_A(self, b: Array) -> Array:
        return self.effects.effects(self.A * self.effects.rows(b))


@dataclass(frozen=True, eq=False)
class Components(Together):
    """All effects of all factors, whose rows fall into ``stacks`` of components; ``of_rows (components, n)`` and
    ``of_effects (components, N)`` are sparse, one where they belong together."""

    stacks: tuple[Stack, ...] = ()
    of_rows: Any = None
    of_effects: Any = None

    # --- units: components move by themselves

    def units(self, w: Array) -> Array:
        found: Array = self.of_rows @ w
        return found

    def unit_dots(self, a: Array, b: Array) -> Array:
        return times_each(self.of_effects, a * b)

    def of_units(self, values: Array) -> Array:
        found: Array = values[self.of_effects.tocsc().indices]
        return found

    def normal(self, w: Array) -> Array:
        """A is known by its weights."""
        return w

    def gain(self, lambdas: list[Array], A: Array) -> ComponentGain:  # type: ignore[override]
        D = free_entries([np.einsum("acl,bcl->abl", F, F) for F in lambdas])  # (J, L)
        V, M, logdet = [], [], np.zeros(D.shape[1])
        for stack in self.stacks:
            J, C, r, _ = stack.S.shape
            own = (D.T @ stack.S.reshape(J, -1)).reshape(-1, C, r, r)
            T = stack.take(A)[..., None] * own
            T[..., np.arange(r), np.arange(r)] += 1.0
            with np.errstate(invalid="ignore"):
                sign, logs = np.linalg.slogdet(T)
                fine = ((sign > 0) & np.isfinite(logs)).all(1)
                M.append(np.linalg.inv(np.where(fine[:, None, None, None], T, np.eye(r))))
            V.append(own)
            logdet = logdet + np.where(fine, np.where(fine[:, None], logs, 0.0).sum(1), np.nan)
        return ComponentGain(self, lambdas, A, V, M, logdet)

    def leverages(self, gain: ComponentGain) -> Array:  # type: ignore[override]
        found = np.zeros(gain.A.shape)
        for stack, K in zip(self.stacks, gain.K, strict=True):
            stack.put(np.diagonal(K, axis1=-2, axis2=-1), found)
        return found

    def traces_of_N(self, gain: ComponentGain) -> Array:  # type: ignore[override]
        return sum(
            (np.einsum("lcij,kcji->kl", Omega, stack.S) for stack, Omega in zip(self.stacks, gain.Omega, strict=True)),
            np.zeros(()),
        )

    def traces(self, gain: ComponentGain, dW: Array) -> Traces:  # type: ignore[override]
        T, J, L = len(dW), len(directions_of(self.layout)), dW.shape[-1]
        KK, RR, NN = np.zeros((L, T, T)), np.zeros((L, T, J)), np.zeros((L, J, J))
        for stack, K, M, Omega in zip(self.stacks, gain.K, gain.M, gain.Omega, strict=True):
            own = stack.take(dW)  # (L, C, T, r)
            KK += (own @ (K * K) @ np.swapaxes(own, -1, -2)).sum(1)
            OS = []
            for j, S in enumerate(stack.S):
                RR[:, :, j] += (own @ ((S @ M) * M).sum(-2)[..., None])[..., 0].sum(1)
                OS.append(Omega @ S)
            for i in range(J):
                for j in range(i, J):
                    NN[:, i, j] += (OS[i] * np.swapaxes(OS[j], -1, -2)).sum((1, 2, 3))
        upper = np.triu(np.ones((J, J), bool), 1)
        NN = NN + np.swapaxes(np.where(upper, NN, 0.0), 1, 2)
        return Traces(np.moveaxis(KK, 0, -1), np.moveaxis(RR, 0, -1), np.moveaxis(NN, 0, -1))


def in_lanes(rows: FamilyRows) -> Together | None:
    """The effects of a model with several grouping factors in lanes: by components, or all together, whichever is less
    work; None where both are more than eliminating the levels of one factor. Of families that are log-concave."""
    if not rows.family.log_concave:
        return None
    whole = together(rows)
    _, component = csgraph.connected_components(whole.Z.T @ whole.Z, directed=False)
    of_row = component[whole.Z.indices[whole.Z.indptr[:-1]]]
    sizes = np.bincount(of_row, minlength=component.max() + 1)
    if sizes.max() <= SIZES[-1] and (sizes.astype(float) ** 3).sum() < float(min(whole.N, MOST_TOGETHER)) ** 3:
        members = (_membership(own, len(sizes)) for own in (of_row, component))
        return Components(whole.Z, whole.blocks, whole.layout, _stacks(rows, of_row, sizes), *members)
    return whole if whole.N <= MOST_TOGETHER else None


def _membership(component: np.ndarray, count: int) -> Any:
    """``(count, k)``, sparse."""
    k = len(component)
    return sparse.csr_array((np.ones(k), (component, np.arange(k))), shape=(count, k))


def _stacks(rows: FamilyRows, of_row: np.ndarray, sizes: np.ndarray) -> tuple[Stack, ...]:
    order = np.argsort(of_row, kind="stable")
    starts = np.cumsum(sizes) - sizes
    stacks, least = [], 0
    for most in SIZES:
        own = np.flatnonzero((sizes > least) & (sizes <= most))
        least = most
        if not len(own):
            continue
        r = int(sizes[own].max())
        place = np.arange(r)
        index = np.where(place < sizes[own, None], order[np.minimum(starts[own, None] + place, len(order) - 1)], -1)
        S = []
        for f, (a, b) in directions_of(rows.layout):
            left, right = (np.where(index >= 0, np.asarray(rows.Z[f])[index, column], 0.0) for column in (a, b))
            level = np.asarray(rows.groups[f])[index]
            same = level[:, :, None] == level[:, None, :]
            one = same * left[:, :, None] * right[:, None, :]
            S.append(one if a == b else one + np.swapaxes(one, 1, 2))
        stacks.append(Stack(index, np.stack(S)))
    return tuple(stacks)
