"""Residuals with parameters of their own: the criterion as a function of these too, in closed form.

The optimiser's vector is ``(x, phi)``: coordinates of the random effects' covariances, then those of the residuals
(:mod:`mixjax.residual.transform`). At any phi rows are transformed, and what is left is a model with independent errors
of one variance, ``log |T(phi)|`` aside. So the likelihood depends on phi through the products of the transformed rows
alone, and their derivatives are other sums of the same rows.

Notation of :mod:`mixjax.engine.curvature`, dots for derivatives by phi. With ``Y = dB - dA K B`` per level

    ``dS = dG - sum_i (Y'K B + B'K dB)``
    ``d2S_jl = d2G - sum_i (Y_jl'K B + B'K d2B_jl + Y_j'K Y_l + Y_l'K Y_j)``,  ``Y_jl = d2B_jl - d2A_jl K B``
    ``d logdet = sum_i tr(K dA)``,  ``d2 logdet = sum_i tr(K d2A_jl) - tr(K dA_j K dA_l)``

and with a direction E of the first factor's covariance ``-sum_i (F Y)'E F B`` transposed and not, and
``sum_i tr(F dA F'E)``. All else, the dense factors' directions included, follows from ``dS`` as it does from ``-J``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import scipy.sparse

from mixjax import linalg
from mixjax.engine.curvature import (
    Directions,
    Slopes,
    chain_to_coordinates,
    derivatives_of,
    lambdas_at,
    profile_and_modes,
)
from mixjax.engine.dense_block import Rest, effects_of, finish
from mixjax.engine.elimination import arrange
from mixjax.engine.first_factor import First, directions_of, eliminate_first, of_levels, orders_of, sum_of, weights_of
from mixjax.engine.moments import Moments, moments_of
from mixjax.engine.profiled import Profiled
from mixjax.machine import silently
from mixjax.products.rows import Rows
from mixjax.products.sums import CrossProducts, FactorProducts, Layout, PairProducts
from mixjax.residual.transform import Factors, Transform, pairs

T = TypeVar("T")


class _Parts(NamedTuple):
    """Everything at one point. Directions: the first factor's own, then those of phi, then the dense factors'."""

    lanes: Profiled
    rest: Rest
    J: Directions
    gradient: np.ndarray
    Hessian: np.ndarray
    falls: np.ndarray
    moments: Moments


@dataclass(frozen=True, eq=False)
class ResidualEngine:
    """The criterion of one data set whose residuals have parameters, by NumPy.

    Attributes:
        rows: of the design in fixed bases, with prior weights and nothing else. transform: of the rows.
        reml: restricted maximum likelihood.
    """

    rows: Rows
    transform: Transform
    reml: bool

    def run(self, fun: Callable[..., T], *args: Any) -> T:
        """``fun(engine, *args)``."""
        with silently():
            return fun(self, *args)

    @property
    def layout(self) -> Layout:
        """Structure of the random effects."""
        return self.rows.layout

    @property
    def k(self) -> int:
        """Coordinates of the random effects."""
        return self.layout.k

    @cached_property
    def _columns(self) -> np.ndarray:
        rows = self.rows
        return np.concatenate([*rows.Z, rows.Q, rows.residual[:, None]], axis=1)

    @cached_property
    def _of_level(self) -> list[Any]:
        """Sparse ``(m, n)`` per factor, and per pair of factors: sums over the rows of a level, or of a pair."""
        n, rows = self.rows.n, self.rows
        codes = list(zip(rows.groups, rows.levels, strict=True))
        codes += [(meeting.entry, len(meeting.rows)) for meeting in rows.meetings]
        return [scipy.sparse.csr_array((np.ones(n), (code, np.arange(n))), shape=(m, n)) for code, m in codes]

    def stats_at(self, phi: np.ndarray) -> CrossProducts:
        """The cross-products of the rows transformed at ``phi``, in the fixed bases."""
        stats = self._sums([[(T, T)] for T in [self.transform.rows(phi, self._columns)]])
        return replace(
            stats,
            factors=tuple(FactorProducts(*(a[..., 0] for a in f)) for f in stats.factors),
            pairs=tuple(p._replace(ZZ=p.ZZ[..., 0]) for p in stats.pairs),
            XX=stats.XX[..., 0],
            Xy=stats.Xy[..., 0],
            yy=stats.yy[0],
            sum_log_weights=self._sum_log_weights(phi),
        )

    def _sum_log_weights(self, phi: np.ndarray) -> float:
        return float(self.rows.log_w.sum()) + 2.0 * self.transform.logdet(phi).value

    def _sums(self, products: list[Factors]) -> CrossProducts:
        """Sums by level of ``L'R``, one of every item of the list in the last axis."""
        rows, D = self.rows, len(products)
        widths, p = self.layout.widths, rows.Q.shape[1]
        starts = np.cumsum([0, *widths])
        end = int(starts[-1])
        factors, met = [], []
        for f, q in enumerate(widths):
            own, r = slice(starts[f], starts[f + 1]), q + p + 1
            at = np.r_[own, end : end + p + 1]
            flat = np.concatenate([_by_row(pieces, own, at) for pieces in products], axis=1)
            sums = (self._of_level[f] @ flat).reshape(-1, D, q, r).transpose(2, 3, 0, 1)
            factors.append(FactorProducts(sums[:, :q], sums[:, q : q + p], sums[:, -1]))
        for i, ((s, t), meeting) in enumerate(zip(self.layout.pairs, rows.meetings, strict=True)):
            left, right = slice(starts[s], starts[s + 1]), np.arange(starts[t], starts[t + 1])
            flat = np.concatenate([_by_row(pieces, left, right) for pieces in products], axis=1)
            sums = (self._of_level[len(widths) + i] @ flat).reshape(-1, D, widths[s], widths[t])
            met.append(PairProducts(meeting.rows, meeting.cols, sums.transpose(2, 3, 0, 1)))
        G = np.stack([sum_of(L[:, end:].T @ R[:, end:] for L, R in pieces) for pieces in products], axis=-1)
        return CrossProducts(
            factors=tuple(factors),
            pairs=tuple(met),
            XX=G[:-1, :-1],
            Xy=G[:-1, -1],
            yy=G[-1, -1],
            n=np.float64(rows.n),
            sum_log_weights=0.0,
            beta0=rows.beta0,
            X_basis=rows.X_basis,
            Z_bases=rows.Z_bases,
            layout=self.layout,
        )

    def moments_at(self, phi: np.ndarray) -> Moments:
        """Moments of the transformed rows."""
        stats = self.stats_at(phi)
        return moments_of(stats) if self.layout.chain else _without_effects(stats)

    # --- what an engine is asked -------------------------------------------------------------------------------------

    def evaluate(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Value ``(1,)``, gradient ``(k, 1)`` and Hessian ``(k, k, 1)`` at ``x (k, 1)``, phi included."""
        with silently():
            parts = self._parts(x)
            jacobian, curvature = self._chain(x, parts)
            back = linalg.transpose(jacobian)
            gradient = linalg.matmul(back, parts.gradient[:, None])[:, 0]
            return (
                parts.lanes.criterion,
                gradient,
                linalg.matmul(back, linalg.matmul(parts.Hessian, jacobian)) + curvature,
            )

    def slopes(self, x: np.ndarray) -> Slopes:
        """How the fixed effects' covariance and the residual sum of squares move with ``x (k,)``, phi included."""
        if not x.size:  # ordinary regression
            lanes, _ = self.solution(x)
            return Slopes(lanes, np.zeros((0, 0)), np.zeros((0, *lanes.XX_inverse.shape)), np.zeros(0))
        x = x[:, None]
        parts = self._parts(x)
        rest, J, lanes = parts.rest, parts.J, parts.lanes
        p = lanes.delta.shape[0]
        falls = [linalg.matmul(linalg.matmul(linalg.transpose(rest.T_X)[:, :, None], J.UU), rest.T_X[:, :, None])]
        at = effects_of(parts.moments)
        for f, _, _ in parts.moments.dense:
            for pair in directions_of(self.layout, f):
                part = sum_of(
                    linalg.matmul(linalg.transpose(rest.P2[at[f, a], :p]), rest.P2[at[f, b], :p])
                    for a, b in orders_of(*pair)
                )
                falls.append(part[:, :, None])
        C = lanes.XX_inverse[:, :, None]
        moves = linalg.matmul(linalg.matmul(C, np.concatenate(falls, axis=2)), C)
        jacobian, curvature = self._chain(x, parts)
        back = linalg.transpose(jacobian)
        H = linalg.matmul(back, linalg.matmul(parts.Hessian, jacobian)) + curvature
        of_C = (moves[None] * back[:, None, None]).sum(3)
        log_rss = -linalg.matmul(back, parts.falls[:, None])[:, 0] / lanes.rss
        return Slopes(lanes.lane(), H[..., 0], of_C[..., 0], log_rss[..., 0])

    def solution(self, x: np.ndarray) -> tuple[Profiled, list[np.ndarray]]:
        """The profiled likelihood at ``x (k,)``, and per term the modes ``(q, m)`` of its effects."""
        moments = self.moments_at(x[self.k :])
        if not self.layout.chain:
            rest = finish(_nothing(moments), _no_level(), {}, moments, self.reml, with_W=False)
            return rest.lanes.lane(), []
        lanes, by_factor = profile_and_modes(x[: self.k, None], moments, self.reml)
        return lanes.lane(), [by_factor[p.factor][p.start : p.start + p.q, :, 0] for p in self.layout.terms]

    # --- derivatives -------------------------------------------------------------------------------------------------

    def _parts(self, x: np.ndarray) -> _Parts:
        phi, k_R = x[self.k :, 0], self.transform.k
        sums = self._sums(self.transform.products(phi, self._columns))
        logdet = self.transform.logdet(phi)
        level = replace(_lane(sums, 0), sum_log_weights=float(self.rows.log_w.sum()) + 2.0 * logdet.value)
        own: list[tuple[int, int]] = []
        if self.layout.chain:
            moments, f1 = moments_of(level), self.layout.chain[0]
            lambdas = lambdas_at(x[: self.k], moments)
            first, own = eliminate_first(lambdas[f1], moments), directions_of(self.layout, f1)
            UU, Uy, yy = moments.contract(weights_of(first, own))
        else:
            moments, lambdas, first = _without_effects(level), {}, _no_level()
            zero = _nothing(moments)
            UU, Uy, yy = zero[0][:, :, None], zero[1][:, None], zero[2][None]
        moved = _Moved.of(sums, moments, first, own, k_R)
        rest = finish((UU[:, :, 0], Uy[:, 0], yy[0]), first, lambdas, moments, self.reml)
        dS = np.moveaxis(moved.dS, 0, -1)[..., None]  # (r, r, k_R, 1)
        J = Directions(
            own,
            np.concatenate([UU[:, :, 1:], -dS[:-1, :-1]], axis=2),
            np.concatenate([Uy[:, 1:], -dS[:-1, -1]], axis=1),
            np.concatenate([yy[1:], -dS[-1, -1]]),
        )
        df = moments.n - (moments.UU.shape[0] - rest.W.shape[0] if self.reml else 0)
        s = df / rest.lanes.rss
        curve = s / rest.lanes.rss

        def by_level(UU: np.ndarray, Uy: np.ndarray, yy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            g, H = np.zeros((0, 1)), np.zeros((0, 0, 1))
            if own:
                g, H = of_levels(moments.pull_back(UU, Uy, yy), first, moments, own)
            return moved.joined(g, H, UU[..., 0], Uy[..., 0], yy[0])

        g, H, falls = derivatives_of(lambdas, moments, first, rest, J, s, curve, self.reml, by_level)
        at = slice(len(own), len(own) + k_R)
        g, H = g.copy(), H.copy()
        g[at, 0] -= 2.0 * logdet.gradient
        H[at, at, 0] -= 2.0 * logdet.Hessian
        return _Parts(rest.lanes, rest, J, g, H, falls, moments)

    def _chain(self, x: np.ndarray, parts: _Parts) -> tuple[np.ndarray, np.ndarray]:
        """``d(directions) / d(x, phi) (J, k, 1)``, and what the curvature of the covariances adds ``(k, k, 1)``."""
        n_own, k_R, k = len(parts.J.own), self.transform.k, self.k
        J = len(parts.gradient)
        jacobian, curvature = np.zeros((J, k + k_R, 1)), np.zeros((k + k_R, k + k_R, 1))
        jacobian[n_own : n_own + k_R, k:, 0] = np.eye(k_R)
        if self.layout.terms:
            of_effects = np.r_[:n_own, n_own + k_R : J]
            spots = [(self.layout.chain[0], pair) for pair in parts.J.own]
            spots += [(f, pair) for f, *_ in parts.moments.dense for pair in directions_of(self.layout, f)]
            own, curve = chain_to_coordinates(x[:k], parts.gradient[of_effects], spots, self.layout)
            jacobian[of_effects, :k], curvature[:k, :k] = own, curve
        return jacobian, curvature


class _Moved(NamedTuple):
    """What moves with phi, level by level: C levels, k directions, P pairs of them.

    Attributes:
        dS: ``(k, r, r)``, d2S: ``(P, r, r)``: of what the first factor leaves. logdet: ``(k,)``, logdet2: ``(k, k)``.
        FAF: ``(k, q, q)``, sums of ``F dA F'``; None without random effects. FY, FB: ``(k, C, q, r)``, ``(C, q, r)``.
        own: the first factor's directions.
    """

    dS: np.ndarray
    d2S: np.ndarray
    logdet: np.ndarray
    logdet2: np.ndarray
    FAF: np.ndarray | None
    FY: np.ndarray
    FB: np.ndarray
    own: list[tuple[int, int]]

    @staticmethod
    def of(sums: CrossProducts, moments: Moments, first: First, own: list[tuple[int, int]], k: int) -> _Moved:
        if not sums.layout.chain:
            G = np.moveaxis(_corner(sums), -1, 0)
            return _Moved(G[1 : 1 + k], G[1 + k :], np.zeros(k), np.zeros((k, k)), None, G, G, own)
        f1 = sums.layout.chain[0]
        layout = moments.layout
        blocks = arrange(replace(sums, layout=layout, yy=np.asarray(sums.yy)))
        A = blocks.A[f1].transpose(3, 2, 0, 1)  # (D, C, q, q)
        B, G = blocks.B[f1].transpose(3, 2, 0, 1), np.moveaxis(blocks.G, -1, 0)
        K, F = (np.moveaxis(M[..., 0], -1, 0) for M in (first.K, first.F))  # (C, q, q)
        C, q, r = B.shape[1:]
        KB = K @ B[0]
        flat_KB = KB.reshape(C * q, r)
        Y = B[1:] - A[1:] @ KB
        half = Y.reshape(-1, C * q, r).swapaxes(1, 2) @ flat_KB + flat_KB.T @ B[1:].reshape(-1, C * q, r)
        S = G[1:] - half
        Y1 = Y[:k]
        KY = K @ Y1
        KA = K @ A[1:]
        logdets = np.einsum("dcaa->d", KA)
        logdet2 = np.zeros((k, k))
        for number, (i, j) in enumerate(pairs(k)):
            cross = KY[i].reshape(C * q, r).T @ Y1[j].reshape(C * q, r)
            S[k + number] -= cross + cross.T
            logdet2[i, j] = logdet2[j, i] = logdets[k + number] - np.einsum("cab,cba->", KA[i], KA[j])
        FAF = (F @ A[1 : 1 + k] @ F.swapaxes(1, 2)).sum(1)
        return _Moved(S[:k], S[k:], logdets[:k], logdet2, FAF, F @ Y1, F @ B[0], own)

    def joined(
        self, g: np.ndarray, H: np.ndarray, UU: np.ndarray, Uy: np.ndarray, yy: float
    ) -> tuple[np.ndarray, np.ndarray]:
        """Behind gradient and curvature of the first factor's directions, those of phi, from the parts of Psi."""
        k, r = len(self.logdet), UU.shape[0] + 1
        Psi = np.empty((r, r))
        Psi[:-1, :-1], Psi[:-1, -1], Psi[-1, :-1], Psi[-1, -1] = UU, Uy, Uy, yy
        slopes = self.logdet + np.einsum("kab,ab->k", self.dS, Psi)
        J = len(g)
        moved = np.zeros((J + k, J + k, 1))
        moved[:J, :J] = H
        curves = np.einsum("kab,ab->k", self.d2S, Psi)
        for number, (i, j) in enumerate(pairs(k)):
            moved[J + i, J + j, 0] = moved[J + j, J + i, 0] = self.logdet2[i, j] + curves[number]
        if self.FAF is not None:
            M = self.FAF - 2.0 * np.einsum("cax,kcbx->kab", self.FB @ Psi, self.FY, optimize=True)
            for i, (a, b) in enumerate(self.own):
                moved[i, J:, 0] = moved[J:, i, 0] = M[:, a, b] + (M[:, b, a] if a != b else 0.0)
        return np.concatenate([g, slopes[:, None]]), moved


def _by_row(pieces: Factors, left: slice, right: np.ndarray) -> np.ndarray:
    """``(n, a b)`` products of columns of every row."""
    total: np.ndarray = sum_of(L[:, left, None] * R[:, None, right] for L, R in pieces)
    return total.reshape(len(total), -1)


def _lane(sums: CrossProducts, d: int) -> CrossProducts:
    return replace(
        sums,
        factors=tuple(FactorProducts(*(a[..., d] for a in f)) for f in sums.factors),
        pairs=tuple(pair._replace(ZZ=pair.ZZ[..., d]) for pair in sums.pairs),
        XX=sums.XX[..., d],
        Xy=sums.Xy[..., d],
        yy=sums.yy[d],
    )


def _corner(sums: CrossProducts) -> np.ndarray:
    """``[X y]'[X y]``."""
    side = np.concatenate([sums.Xy, np.asarray(sums.yy)[None]])
    G: np.ndarray = np.concatenate([np.concatenate([sums.XX, sums.Xy[:, None]], 1), side[None]])
    return G


# --- models without random effects -----------------------------------------------------------------------------------


def _without_effects(stats: CrossProducts) -> Moments:
    one = np.ones((1, 1))
    return Moments(
        A=None,
        count=one,
        pair_UU=None,
        sums=None,  # type: ignore[arg-type]
        UU=stats.XX[..., None],
        Uy=stats.Xy[..., None],
        yy=np.asarray(stats.yy)[None],
        n=np.asarray(stats.n)[None],
        sum_log_weights=np.asarray(stats.sum_log_weights)[None],
        X_logdet=np.asarray(stats.X_basis.logdet)[None],
        dense=(),
        layout=stats.layout,
    )


def _no_level() -> First:
    return First(None, None, None, np.zeros((1, 1)))


def _nothing(moments: Moments) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return np.zeros_like(moments.UU), np.zeros_like(moments.Uy), np.zeros_like(moments.yy)
