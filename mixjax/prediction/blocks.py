"""The mixed-model equations of many values of theta at once, block by block, and how they move with theta.

Levels that rows bring together, directly or through others, form a block; effects of different blocks meet only in the
fixed effects. With one grouping factor, blocks are its levels; with nested factors those of the outermost; crossed
factors make one block. Everything is relative to sigma^2, in the bases of the cross-products.

Notation: ``J = Z'WZ``, ``U = Z'WX``, D the effects' covariance, ``H = W^{-1} + Z D Z'``, ``K = (D^{-1} + J)^{-1}``,
``E = I - J K = (I + J D)^{-1}``. Then ``Z'H^{-1}Z = E J``, ``Z'H^{-1}X = E U``, and the error of a predictor
``x'beta_hat + z'b_hat = c'y`` is known through ``a = z - Z'c``: its covariance with b is ``sigma^2 D a``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import scipy.sparse as sp
from scipy.sparse.csgraph import connected_components

from mixjax.engine.equations import EffectRows
from mixjax.products.sums import CrossProducts

# Blocks of up to so many effects are looked up row by row; larger ones are multiplied one after the other.
SMALL = 32
# Numbers that the matrices of all blocks may hold.
MOST = 2**25
# Numbers of the targets worked on at the same time.
CHUNK = 2**22


class TooLarge(ValueError):
    """The blocks of a design are too large to be held as dense matrices."""


class ErrorSlopes(NamedTuple):
    """Of every target, relative to sigma^2; values of theta in front.

    Attributes:
        variance: ``(..., m)`` of the error of the best predictor, theta known.
        slopes: ``(..., m, k)`` derivatives of it with respect to the parameters of D. They are those with the
            predictor held fixed, because it is the best one.
        moves: ``(..., m, k, k)`` covariances of the derivatives of the predictor itself.
    """

    variance: np.ndarray
    slopes: np.ndarray
    moves: np.ndarray


class DependentEffects:
    """Products of one design by block, and targets in their places.

    Args:
        stats: cross-products of the fit; one response. rows: the targets.

    Raises:
        TooLarge: a block has too many effects.
    """

    def __init__(self, stats: CrossProducts, rows: EffectRows):
        widths = np.array(stats.layout.widths)
        counts = np.array([np.shape(f.Zy)[-1] for f in stats.factors])
        starts = np.cumsum([0, *counts])
        factor = np.repeat(np.arange(len(counts)), counts)
        used = [np.abs(z).max(axis=1, initial=0.0) > 0 for z in rows.Z]
        none = np.zeros(0, int)
        edges = [(none, none)]
        edges += [
            (starts[s] + np.asarray(pair.rows), starts[t] + np.asarray(pair.cols))
            for (s, t), pair in zip(stats.layout.pairs, stats.pairs, strict=True)
        ]
        self._known = [stats.transform_of(f) for f in range(len(counts))]
        for s, T in enumerate(self._known):  # a level has a share in all effects
            if T is not None:
                edges.append((np.full(counts[s], starts[s]), starts[s] + np.arange(counts[s])))
        places = zip(rows.level, self._known, strict=True)
        meets = [
            level if T is None else np.zeros_like(level) for level, T in places
        ]  # one of its effects stands for all
        for s in range(len(counts)):  # what a target brings together belongs together
            for t in range(s + 1, len(counts)):
                both = used[s] & used[t]
                edges.append((starts[s] + meets[s][both], starts[t] + meets[t][both]))
        a, b = (np.concatenate(part) for part in zip(*edges, strict=True))
        graph = sp.coo_array((np.ones(len(a)), (a, b)), shape=(starts[-1],) * 2)
        n_blocks, block = connected_components(graph, directed=False)

        size = np.bincount(block, widths[factor], n_blocks).astype(int)
        self.size, self.n_blocks = int(size.max()), n_blocks
        if n_blocks * self.size**2 > MOST:
            raise TooLarge(
                f"{self.size} random effects depend on each other, in {n_blocks} blocks: too many for the "
                "dense matrices of method='second-order'; use method='henderson' or 'bootstrap'"
            )
        order = np.lexsort([np.arange(len(block)), block])
        before = np.cumsum(widths[factor[order]]) - widths[factor[order]]
        first = np.concatenate([[0], np.cumsum(size)])[:-1]
        place = np.empty(len(block), int)
        place[order] = before - first[block[order]]

        self._XX = np.asarray(stats.XX)
        self._J = np.zeros((n_blocks, self.size, self.size))
        self._U = np.zeros((n_blocks, self.size, len(self._XX)))
        self._at = []  # per factor: block (levels,), places (levels, w)
        for f, products in enumerate(stats.factors):
            own = slice(starts[f], starts[f + 1])
            b, i = block[own], place[own, None] + np.arange(widths[f])
            self._at.append((b, i))
            self._J[b[:, None, None], i[:, :, None], i[:, None]] = np.moveaxis(np.asarray(products.ZZ), 2, 0)
            self._U[b[:, None], i] = np.moveaxis(np.asarray(products.ZX), 2, 0)
        for (s, t), pair in zip(stats.layout.pairs, stats.pairs, strict=True):
            r, c, ZZ = np.asarray(pair.rows), np.asarray(pair.cols), np.moveaxis(np.asarray(pair.ZZ), 2, 0)
            i, j, b = self._at[s][1][r][:, :, None], self._at[t][1][c][:, None], self._at[s][0][r][:, None, None]
            np.add.at(self._J, (b, i, j), ZZ)
            np.add.at(self._J, (b, j, i), ZZ)

        self._rows, self._used = rows, used

    def _targets(self, numbers: int) -> Iterator[_Some]:
        """The targets in their blocks, some at a time, where each has so many numbers."""
        rows, m = self._rows, len(self._rows.X)
        step = max(1, CHUNK // numbers)
        for i in range(0, max(m, 1), step):
            at = slice(i, i + step)
            x = rows.X[at]
            block, z = np.zeros(len(x), int), np.zeros((len(x), self.size))
            for f, own in enumerate(rows.Z):
                blocks, places = self._at[f]
                here = np.flatnonzero(self._used[f][at])
                level = rows.level[f][at][here]
                if (T := self._known[f]) is not None:
                    block[here] = blocks[0]
                    shares = T[level][:, :, None] * own[at][here][:, None]
                    z[here[:, None], places.reshape(-1)] = shares.reshape(len(here), -1)
                    continue
                block[here] = blocks[level]
                z[here[:, None], places[level]] = own[at][here]
            yield _Some(x, z, block)

    def spread(self, factors: list[np.ndarray]) -> np.ndarray:
        """Per grouping factor ``(..., w, w)`` -> ``(..., n_blocks, size, size)``, one for every level."""
        leading = np.shape(factors[0])[:-2]
        out = np.zeros((*leading, self.n_blocks, self.size, self.size))
        for (own, places), factor in zip(self._at, factors, strict=True):
            out[..., own[:, None, None], places[:, :, None], places[:, None]] = factor[..., None, :, :]
        return out

    def variance(self, factors: list[np.ndarray]) -> np.ndarray:
        """``(..., m)`` variances of prediction errors, as :class:`~mixjax.engine.equations.Equations` has them.

        Args:
            factors: per grouping factor ``F (..., w, w)``, covariance ``F F'``.
        """
        state = self._solve(factors)
        width = self.size if self.size <= SMALL else 1
        leading = int(np.prod(np.shape(factors[0])[:-2]))
        parts = [self._errors(state, some)[0] for some in self._targets(leading * self.size * width)]
        return np.concatenate(parts, axis=-1)

    def _solve(self, factors: list[np.ndarray]) -> _Solved:
        F = self.spread(factors)
        Ft = np.swapaxes(F, -1, -2)
        K = F @ np.linalg.inv(np.eye(self.size) + Ft @ self._J @ F) @ Ft
        S = self._XX - np.einsum("csp,...csq->...pq", self._U, K @ self._U)
        return _Solved(K, np.linalg.inv(S))

    def _errors(self, state: _Solved, some: _Some) -> tuple[np.ndarray, np.ndarray]:
        """Variances ``(..., m)``, and ``S^{-1} d (..., m, p)``."""
        Kz = self._of_rows(state.K, some.z, some.block)
        d = some.x - np.einsum("msp,...ms->...mp", self._U[some.block], Kz)
        eta = np.einsum("...pq,...mq->...mp", state.S_inverse, d)
        return np.einsum("ms,...ms->...m", some.z, Kz) + np.einsum("...mp,...mp->...m", d, eta), eta

    def parts(self, factors: list[np.ndarray], slopes: list[np.ndarray]) -> ErrorSlopes:
        """Variances, and how they and the predictors move with the parameters of D.

        Args:
            factors: as in :meth:`variance`. slopes: per grouping factor ``(..., k, w, w)``, derivatives of its effects'
                covariance with respect to all k parameters.
        """
        state = self._solve(factors)
        E = np.eye(self.size) - self._J @ state.K
        Y, UH = E @ self._J, E @ self._U
        moved = self.spread(slopes)  # (..., k, blocks, s, s)
        MU = moved @ UH[..., None, :, :, :]  # D_k Z'H^{-1}X
        P = np.einsum("...csp,...kcsq->...kpq", UH, MU)
        R = np.einsum("...kcsp,...cst,...lctq->...klpq", MU, Y, MU, optimize=True)
        at = _Slopes(state, E, Y, UH, moved, MU, P, R)
        width = max(self.size if self.size <= SMALL else 1, len(self._XX))
        done = [self._parts(at, some) for some in self._targets(moved[..., 0, 0, 0].size * self.size * width)]
        variance, slope, moves = zip(*done, strict=True)
        return ErrorSlopes(np.concatenate(variance, -1), np.concatenate(slope, -2), np.concatenate(moves, -3))

    def _parts(self, at: _Slopes, some: _Some) -> ErrorSlopes:
        state, E, Y, UH, moved, MU, P, R = at
        variance, eta = self._errors(state, some)
        # a is alpha in the row's own block, less E U eta in all.
        alpha = self._of_rows(E, some.z, some.block)
        beta = self._of_rows(moved, alpha[..., None, :, :], some.block)  # (..., k, m, s)
        gamma = np.einsum("...kmsp,...mp->...kms", MU[..., some.block, :, :], eta)
        slope = np.einsum("...ms,...kms->...mk", alpha, beta - 2.0 * gamma)
        slope = slope + np.einsum("...mp,...kpq,...mq->...mk", eta, P, eta, optimize=True)
        rest, every = beta - gamma, Y[..., None, :, :, :]
        Y_rest, Y_gamma = self._of_rows(every, rest, some.block), self._of_rows(every, gamma, some.block)
        f = np.einsum("...msp,...kms->...mkp", UH[..., some.block, :, :], beta)
        f = f - np.einsum("...kpq,...mq->...mkp", P, eta)
        moves = (
            np.einsum("...kms,...lms->...mkl", rest, Y_rest)
            - np.einsum("...kms,...lms->...mkl", gamma, Y_gamma)
            + np.einsum("...mp,...klpq,...mq->...mkl", eta, R, eta, optimize=True)
            - np.einsum("...mkp,...pq,...mlq->...mkl", f, state.S_inverse, f, optimize=True)
        )
        return ErrorSlopes(variance, slope, moves)

    def _of_rows(self, matrices: np.ndarray, v: np.ndarray, block: np.ndarray) -> np.ndarray:
        """Every row's vector ``(..., m, s)`` times the matrix of its block, of ``(..., n_blocks, s, s)``."""
        if self.size <= SMALL and self.n_blocks > 1:
            products: np.ndarray = np.einsum("...mst,...mt->...ms", matrices[..., block, :, :], v)
            return products
        leading = np.broadcast_shapes(matrices.shape[:-3], v.shape[:-2])
        out = np.zeros((*leading, *v.shape[-2:]))
        for c in np.unique(block):
            at = np.flatnonzero(block == c)
            out[..., at, :] = v[..., at, :] @ np.swapaxes(matrices[..., c, :, :], -1, -2)
        return out


class _Some(NamedTuple):
    """Targets: ``x (m, p)``, effects in the places of their block ``z (m, size)``, and which ``block (m,)`` it is."""

    x: np.ndarray
    z: np.ndarray
    block: np.ndarray


class _Solved(NamedTuple):
    """``K (..., blocks, s, s)`` and ``S_inverse (..., p, p)`` at values of theta."""

    K: np.ndarray
    S_inverse: np.ndarray


class _Slopes(NamedTuple):
    """Matrices that all targets share, at one state: ``E = I - J K``, ``Y = E J``, ``UH = Z'H^{-1}X``; ``moved``, the
    derivatives D_k of the effects' covariance; ``MU = D_k UH``, ``P = UH' MU``, ``R = MU' Y MU``."""

    state: _Solved
    E: np.ndarray
    Y: np.ndarray
    UH: np.ndarray
    moved: np.ndarray
    MU: np.ndarray
    P: np.ndarray
    R: np.ndarray
