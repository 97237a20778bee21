"""Random effects whose correlation depends on distance, by parameters: the criterion as a function of these too.

The optimiser's vector is ``(x, phi)``: coordinates of all covariances, among them one standard deviation of every term
with a kernel, then the angles of the kernels' parameters (:mod:`mixjax.kernels`). All effects stand side by side, in
*components* that share no row and no distance, so that D, the covariance of all of them, is dense in a component and
zero beside it. With ``A = Z'Z = R'R``, ``V = I + R D R'``, ``N = R'V^{-1}R`` and ``T = R'V^{-1}R^{-T}Z'[X y]``

    ``d log det(I + A D) = tr(N dD)``,  ``d2 = tr(N d2D) - tr(N dD_i N dD_j)``
    ``M = [X y]'H^{-1}[X y]``,  ``dM_i = -T'dD_i T``,  ``d2M = -T'd2D T + T'dD_i N dD_j T + its transpose``

and the rest follows from M, of one size for all components. Nothing asks for a factor of D: a kernel whose matrix is
singular to rounding, as a smooth one is, is as good as any.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import scipy.linalg

from mixjax import covariance as cov
from mixjax.covariance import pairs_of
from mixjax.engine.components import Component, components_of, with_products
from mixjax.engine.curvature import Slopes, chain_to_coordinates
from mixjax.engine.profiled import Profiled
from mixjax.kernels import Places
from mixjax.machine import silently
from mixjax.products.rows import Rows
from mixjax.products.sums import CrossProducts, Layout

# Effects of a component from which one matrix at a time is worked on by LAPACK's triangular routines.
LARGE = 128


class _Sums(NamedTuple):
    """Summed over components; J directions.

    Attributes:
        logdet: of ``I + A D``. trace: ``(J,)``, trace2: ``(J, J)`` its derivatives. M: ``(p + 1, p + 1)``, dM, d2M:
            ``(J, ...)``, ``(J, J, ...)``.
    """

    logdet: float
    trace: np.ndarray
    trace2: np.ndarray
    M: np.ndarray
    dM: np.ndarray
    d2M: np.ndarray


@dataclass(frozen=True, eq=False)
class KernelEngine:
    """The criterion of one data set with kernels, by NumPy.

    Attributes:
        rows: of the design in its bases, levels taken for independent. places: of the terms with kernels.
        reml: restricted maximum likelihood.
    """

    rows: Rows
    places: dict[int, Places]
    reml: bool

    @property
    def layout(self) -> Layout:
        """Structure of the random effects."""
        return self.rows.layout

    @property
    def k(self) -> int:
        """Coordinates of the covariances, without the kernels' parameters."""
        return self.layout.k

    @cached_property
    def stats(self) -> CrossProducts:
        """Sums by level."""
        return self.rows.sums()

    @property
    def df(self) -> float:
        """Rows less, by REML, fixed effects."""
        return float(self.rows.n - (self.rows.Q.shape[1] if self.reml else 0))

    def angles(self, x: np.ndarray) -> dict[int, np.ndarray]:
        """The kernels' angles among all coordinates ``(k,)``, by term."""
        found, start = {}, self.k
        for t, places in self.places.items():
            found[t] = x[start : start + places.kernel.k]
            start += places.kernel.k
        return found

    def with_response(self, y: np.ndarray) -> KernelEngine:
        """The same with another response ``(n,)``: what belongs to the design alone is not made again."""
        other = KernelEngine(self.rows.with_response(y), self.places, self.reml)
        vars(other)["_of_design"] = self._of_design
        return other

    # --- what an engine is asked -------------------------------------------------------------------------------------

    def value(self, x: np.ndarray) -> float:
        """The criterion at ``x (k,)``."""
        with silently():
            sums = self._sums(x, derivatives=False)
            return float(_profiled(sums, self).criterion)

    def evaluate(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Value ``(1,)``, gradient ``(k, 1)`` and Hessian ``(k, k, 1)`` at ``x (k, 1)``, the angles included."""
        with silently():
            sums = self._sums(x[:, 0])
            lanes = _profiled(sums, self)
            g, H, _ = self._derivatives(sums, lanes)
            jacobian, curvature = self._chain(x[:, 0], g)
            H = jacobian.T @ H @ jacobian + curvature
            return np.asarray(lanes.criterion)[None], (jacobian.T @ g)[:, None], H[..., None]

    def slopes(self, x: np.ndarray) -> Slopes:
        """How the fixed effects' covariance and the residual sum of squares move with ``x (k,)``."""
        sums = self._sums(x)
        lanes = _profiled(sums, self)
        g, H, rss = self._derivatives(sums, lanes)
        jacobian, curvature = self._chain(x, g)
        C, p = lanes.XX_inverse, len(lanes.delta)
        of_C = -np.einsum("ab,jbc,cd->jad", C, sums.dM[:, :p, :p], C)
        H = jacobian.T @ H @ jacobian + curvature
        return Slopes(lanes, H, np.einsum("jab,jk->kab", of_C, jacobian), jacobian.T @ rss / lanes.rss)

    # --- one point ---------------------------------------------------------------------------------------------------

    def _derivatives(self, sums: _Sums, lanes: Profiled) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Gradient ``(J,)``, Hessian ``(J, J)`` and the slopes of the residual sum of squares, by direction."""
        C, p = lanes.XX_inverse, len(lanes.delta)
        c = np.append(-lanes.delta, 1.0)
        s = self.df / lanes.rss
        left = sums.dM @ c  # (J, p + 1)
        rss = left @ c
        rss2 = np.einsum("a,ijab,b->ij", c, sums.d2M, c) - 2.0 * left[:, :p] @ C @ left[:, :p].T
        g = sums.trace + s * rss
        H = sums.trace2 + s * rss2 - s / lanes.rss * np.outer(rss, rss)
        if self.reml and p:
            moved = np.einsum("ab,jbc->jac", C, sums.dM[:, :p, :p])
            g = g + np.einsum("jaa->j", moved)
            H = H + np.einsum("ab,ijba->ij", C, sums.d2M[:, :, :p, :p]) - np.einsum("iab,jba->ij", moved, moved)
        return g, H, rss

    @cached_property
    def _spots(self) -> list[tuple[int, tuple[int, int]]]:
        """Directions of the covariances' entries: term, then effects."""
        return [(t, pair) for t, place in enumerate(self.layout.terms) for pair in pairs_of(place.q)]

    def _chain(self, x: np.ndarray, g: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``d(directions) / dx (J, k)``, and what curvature of the charts adds to the Hessian ``(k, k)``.

        Directions are entries of the covariances, then logarithms of the kernels' parameters."""
        layout, n = self.layout, len(self._spots)
        alone = replace(layout, terms=tuple(p._replace(factor=t, start=0) for t, p in enumerate(layout.terms)))
        own, curve = chain_to_coordinates(x[: self.k, None], g[:n, None], self._spots, alone)
        J = len(g)
        jacobian, curvature = np.zeros((J, len(x))), np.zeros((len(x), len(x)))
        jacobian[:n, : self.k], curvature[: self.k, : self.k] = own[..., 0], curve[..., 0]
        column, row = self.k, n
        for t, angles in self.angles(x).items():
            _, first, second = self.places[t].bounds.at(angles)
            for i in range(len(angles)):
                jacobian[row + i, column + i] = first[i]
                curvature[column + i, column + i] = g[row + i] * second[i]
            row, column = row + len(angles), column + len(angles)
        return jacobian, curvature

    def _sums(self, x: np.ndarray, derivatives: bool = True) -> _Sums:
        stats = self.stats
        D = [F @ F.T for F in cov.factors_of(x[: self.k], self.layout.structures)]
        G = np.block([[stats.XX, stats.Xy[:, None]], [stats.Xy[None], np.asarray(stats.yy)[None, None]]])
        J = len(self._spots) + sum(p.kernel.k for p in self.places.values())
        width = len(G)
        total = _Sums(
            0.0, np.zeros(J), np.zeros((J, J)), G, np.zeros((J, width, width)), np.zeros((J, J, width, width))
        )
        for component in self._components:
            total = self._add(total, component, D, self.angles(x), derivatives)
        return total

    def _add(
        self, total: _Sums, part: Component, D: list[np.ndarray], angles: dict[int, np.ndarray], derivatives: bool
    ) -> _Sums:
        R, Y = part.R, part.Y
        c, s = R.shape[:2]
        whole, curves = np.zeros((c, s, s)), {}
        for t, place in enumerate(self.layout.terms):
            if t in self.places:
                places = self.places[t]
                curves[t] = places.kernel.curves(part.apart[t], list(places.bounds.at(angles[t])[0]))
                at = part.own[t][0]
                whole[:, at[:, None], at] += D[t][0, 0] * curves[t].value
                continue
            for a in range(place.q):
                for b in range(place.q):
                    whole[:, part.own[t][a], part.own[t][b]] += D[t][a, b]
        diagonal = np.diagonal(R, axis1=1, axis2=2)
        V = diagonal[:, :, None] * whole * diagonal[:, None] if part.is_diagonal else R @ whole @ R.swapaxes(1, 2)
        V[:, np.arange(s), np.arange(s)] += 1.0
        L, W, half = _halves(V, R, Y)
        logdet = 2.0 * float(np.log(L[:, np.arange(s), np.arange(s)]).sum())
        fall = Y.swapaxes(1, 2) @ Y - half.swapaxes(1, 2) @ half
        total = total._replace(logdet=total.logdet + logdet, M=total.M - fall.sum(0))
        if not derivatives:
            return total
        N, T = W.swapaxes(1, 2) @ W, W.swapaxes(1, 2) @ half
        return _with_derivatives(total, self._directions(part, D, curves), N, T)

    def _directions(self, part: Component, D: list[np.ndarray], curves: dict[int, Any]) -> _Directions:
        """First and second derivatives of the covariance of all effects, by the block that they fill."""
        first: list[tuple[np.ndarray, np.ndarray]] = []
        second: dict[tuple[int, int], np.ndarray] = {}
        entry: dict[int, int] = {}
        for j, (t, (a, b)) in enumerate(self._spots):
            if t in self.places:
                entry[t] = j
                first.append((part.own[t][0], curves[t].value))
                continue
            left, right = part.own[t][a], part.own[t][b]
            first.append((left, left) if a == b else (np.append(left, right), np.append(right, left)))
        for t, places in self.places.items():
            at, start = part.own[t][0], len(first)
            for i in range(places.kernel.k):
                first.append((at, D[t][0, 0] * curves[t].slopes[i]))
                second[entry[t], start + i] = curves[t].slopes[i]
                for j in range(i + 1):
                    second[start + j, start + i] = D[t][0, 0] * curves[t].curves[j, i]
        return _Directions(first, second)

    @cached_property
    def _of_design(self) -> list[Any]:
        return components_of(self.stats, self.layout, self.places)

    @cached_property
    def _components(self) -> list[Component]:
        return with_products(self._of_design, self.stats)


class _Directions(NamedTuple):
    """Attributes:
    first: per direction the effects ``(r,)`` that it moves and by what: a matrix ``(c, r, r)``, or one with a 1 in
    every row, at these effects ``(r,)``.
    second: by pair of directions, of the same effects as the later one.
    """

    first: list[tuple[np.ndarray, np.ndarray]]
    second: dict[tuple[int, int], np.ndarray]


def _with_derivatives(total: _Sums, directions: _Directions, N: np.ndarray, T: np.ndarray) -> _Sums:
    """With what one shape of components adds to the derivatives."""
    trace, trace2, dM, d2M = total.trace.copy(), total.trace2.copy(), total.dM.copy(), total.d2M.copy()
    first = directions.first
    # N dD, the columns that are not zero, and the rows of dD T that are not.
    moved = [N[:, :, E] if E.ndim == 1 else N[:, :, at] @ E for at, E in first]
    ET = [T[:, E] if E.ndim == 1 else E @ T[:, at] for at, E in first]
    NET = [N[:, :, at] @ own for (at, _), own in zip(first, ET, strict=True)]
    for i, (at, _) in enumerate(first):
        trace[i] += np.einsum("caa->", moved[i][:, at])
        dM[i] -= (T[:, at].swapaxes(1, 2) @ ET[i]).sum(0)
        for j in range(i, len(first)):
            other = first[j][0]
            trace2[i, j] -= np.einsum("cab,cba->", moved[i][:, other], moved[j][:, at])
            cross = (ET[i].swapaxes(1, 2) @ NET[j][:, at]).sum(0)
            d2M[i, j] += cross + cross.T
    for (i, j), E in directions.second.items():
        at = first[j][0]
        trace2[i, j] += np.einsum("cab,cba->", N[:, at[:, None], at], np.broadcast_to(E, (len(N), *E.shape[1:])))
        d2M[i, j] -= (T[:, at].swapaxes(1, 2) @ E @ T[:, at]).sum(0)
    for i in range(len(first)):
        for j in range(i):
            trace2[i, j], d2M[i, j] = trace2[j, i], d2M[j, i]
    return total._replace(trace=trace, trace2=trace2, dM=dM, d2M=d2M)


def _halves(V: np.ndarray, R: np.ndarray, Y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """``L`` of ``V = L L'``, ``L^{-1}R`` and ``L^{-1}Y``."""
    L = np.linalg.cholesky(V)
    if L.shape[1] < LARGE:
        both = np.linalg.solve(L, np.concatenate([R, Y], axis=2))
    else:
        both = np.stack(
            [
                scipy.linalg.solve_triangular(own, np.concatenate([r, y], axis=1), lower=True, check_finite=False)
                for own, r, y in zip(L, R, Y, strict=True)
            ]
        )
    return L, both[:, :, : R.shape[2]], both[:, :, R.shape[2] :]


def _profiled(sums: _Sums, engine: KernelEngine) -> Profiled:
    """Fixed effects and sigma profiled out of M."""
    stats, df = engine.stats, engine.df
    p = len(sums.M) - 1
    XX, Xy, yy = sums.M[:p, :p], sums.M[:p, p], sums.M[p, p]
    C, logdet_XX = np.zeros((0, 0)), 0.0
    if p:
        C, logdet_XX = np.linalg.inv(XX), float(np.linalg.slogdet(XX)[1])
    delta = C @ Xy
    rss = yy - Xy @ delta
    criterion = sums.logdet + df * (1.0 + np.log(2.0 * np.pi * rss / df)) - float(stats.sum_log_weights)
    if engine.reml:
        criterion += logdet_XX + 2.0 * float(stats.X_basis.logdet)
    return Profiled(criterion, delta, C, rss, np.sqrt(rss / df))
