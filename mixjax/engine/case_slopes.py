"""Derivatives of the estimates with respect to case weights: one row more or less of everything.

The notation is that of :mod:`mixjax.engine.curvature`. With a row less what the first factor takes of it,
``r = (z_2, x, y) - B_i'K_i z_1``, ``t = T_X'r``, e the residual of the row and ``S^{-1}`` the inverse of the reduced
products of X, the derivative of the criterion by the weight of the row is

    ``z_1'K z_1 + r'K_2 r + t'S^{-1}t + df e^2 / rss + log(2 pi rss / df)``, without ``t'S^{-1}t`` for ML,

less the log of its precision. That differentiated along a direction E of the covariances gives the mixed derivatives:
of the first factor through ``dK = F'E F`` and ``dG = -J``, of the others through ``dK_2 = (I - K_2 G) E (I - G K_2)``.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mixjax import linalg
from mixjax.engine.curvature import _by_covariance, _ByCovariance, chain_to_coordinates, lambdas_at
from mixjax.engine.dense_block import blocks_times, effects_of
from mixjax.engine.first_factor import Lambdas, eliminate_first, orders_of
from mixjax.engine.moments import Moments, RowSums
from mixjax.products.rows import Rows

# Numbers of the rows worked on at the same time.
CHUNK = 2**21


class ProductRows(NamedTuple):
    """Rows in the bases of the products, times the roots of their weights.

    Attributes:
        first: ``(n, q)`` effects of the first factor. level: ``(n,)`` its levels.
        others: ``(n, u + 1)`` the columns of U, then y.
    """

    first: np.ndarray
    level: np.ndarray
    others: np.ndarray


class CaseSlopes(NamedTuple):
    """Derivatives at coordinates x of a minimum.

    Attributes:
        Hessian: ``(k, k)`` of the criterion. mixed: ``(n, k)`` of its gradient by the weight of every row.
        sigma, delta: ``(n,)``, ``(n, p)`` of the residual standard deviation and the coefficients of X's basis by the
            weights, x held. sigma_by_x, delta_by_x: ``(k,)``, ``(p, k)``.
    """

    Hessian: np.ndarray
    mixed: np.ndarray
    sigma: np.ndarray
    delta: np.ndarray
    sigma_by_x: np.ndarray
    delta_by_x: np.ndarray


def case_slopes(x: np.ndarray, moments: Moments, reml: bool, rows: Rows) -> CaseSlopes:
    """Args: x: ``(k,)``. moments: of one fit, by NumPy. rows: of the same."""
    lambdas = lambdas_at(x[:, None], moments)
    found = _by_covariance(lambdas, moments, reml)
    jacobian, curvature = (
        part[..., 0] for part in chain_to_coordinates(x[:, None], found.gradient, found.spots, moments.layout)
    )
    H = jacobian.T @ found.Hessian[..., 0] @ jacobian + curvature
    at = _Point(found, lambdas, moments, reml)
    q, u = moments.A.shape[0], moments.UU.shape[0]
    step = max(1, CHUNK // (q * (u + 1) * (1 + len(at.own))))
    parts = [at.of_rows(_product_rows(rows, moments, slice(i, i + step))) for i in range(0, rows.n, step)]
    mixed, sigma, delta = (np.concatenate(part) for part in zip(*parts, strict=True))
    return CaseSlopes(H, mixed @ jacobian, sigma, delta, at.sigma_by_D @ jacobian, at.delta_by_D @ jacobian)


def _product_rows(rows: Rows, moments: Moments, at: slice) -> ProductRows:
    """Some rows, with the effects of all factors but the first, dense, as columns of U."""
    first, Q, columns = moments.layout.chain[0], rows.Q[at], []
    for f, q, m in moments.dense:
        dense = np.zeros((len(Q), q * m))
        if rows.known and (L := rows.known[f]) is not None:
            shares = rows.Z[f][at][:, :, None] * np.asarray(L)[rows.groups[f][at]][:, None]
            columns.append(shares.reshape(dense.shape))
            continue
        dense[np.arange(len(Q))[:, None], rows.groups[f][at][:, None] + m * np.arange(q)] = rows.Z[f][at]
        columns.append(dense)
    others = np.concatenate([*columns, Q, rows.residual[at][:, None]], axis=1)
    if first == len(rows.Z):  # the empty factor
        return ProductRows(np.zeros((len(Q), 1)), np.zeros(len(Q), np.intp), others)
    return ProductRows(rows.Z[first][at], rows.groups[first][at], others)


class _Point:
    """Everything at one x that does not depend on the rows; arrays without the axis of lanes."""

    def __init__(self, found: _ByCovariance, lambdas: Lambdas, moments: Moments, reml: bool):
        first, rest, lanes = eliminate_first(lambdas[moments.layout.chain[0]], moments), found.rest, found.lanes
        self.reml, self.own = reml, found.J.own
        self.K, self.F = (np.moveaxis(np.asarray(part)[..., 0], -1, 0) for part in (first.K, first.F))
        assert isinstance(moments.sums, RowSums)
        self.V = moments.sums.V[..., 0]
        self.FV = self.F @ self.V
        self.J_UU, self.J_Uy = found.J.UU[..., 0], found.J.Uy[..., 0]  # (u, u, J), (u, J)
        self.falls = found.falls[:, 0]
        self.T, self.c, self.G, self.P = rest.T_X[..., 0], rest.c[:, 0], rest.G_dd[..., 0], rest.P2[..., 0]
        self.S_inverse, self.delta = lanes.XX_inverse[..., 0], lanes.delta[:, 0]
        self.rss, self.sigma = lanes.rss[0], lanes.sigma[0]
        self.d, self.p = rest.W.shape[0], len(self.delta)
        self.df = float(np.asarray(moments.n).reshape(-1)[0]) - (self.p if reml else 0)
        self.K2 = rest.W[..., 0]
        if self.d:
            half = blocks_times(lambdas, moments, rest.W)
            self.K2 = blocks_times(lambdas, moments, linalg.transpose(half))[..., 0]
        self.P_X = self.P[:, : self.p]
        self.e_P = self.P[:, self.p] - self.P_X @ self.delta if self.d else np.zeros(0)
        places = effects_of(moments)
        self.others = [
            [(places[f, a], places[f, b]) for a, b in orders_of(*pair)] for f, pair in found.spots[len(self.own) :]
        ]
        self.Jc = np.einsum("uvj,v->uj", self.J_UU, self.c) + self.J_Uy
        self.JT = np.einsum("uvj,vp->upj", self.J_UU, self.T)
        self.dc = self.T @ (self.S_inverse @ (self.T.T @ self.Jc))
        self.dc[: self.d] += self.K2 @ self.Jc[: self.d]
        moves = [-self.S_inverse @ (self.T.T @ self.Jc)]
        for orders in self.others:
            moved = sum(self.P_X[a].T @ self.e_P[b] for a, b in orders)
            moves.append(-(self.S_inverse @ moved)[:, None])
        self.delta_by_D = np.concatenate(moves, axis=1)
        self.sigma_by_D = -0.5 * self.sigma * self.falls / self.rss

    def of_rows(self, rows: ProductRows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mixed derivatives by the entries of D, ``(n, J)``, and those of sigma and delta with x held."""
        z, level, d = rows.first, rows.level, self.d
        h = np.einsum("nab,nb->na", self.K[level], z)
        r = rows.others - np.einsum("na,nar->nr", h, self.V[level])
        phi = np.einsum("nab,nb->na", self.F[level], z)
        FV = self.FV[level]
        t, e = r[:, :-1] @ self.T, r[:, :-1] @ self.c + r[:, -1]
        St, K2r = t @ self.S_inverse, r[:, :d] @ self.K2
        columns = []
        for j, pair in enumerate(self.own):
            E_phi = np.zeros_like(phi)
            for a, b in orders_of(*pair):
                E_phi[:, a] += phi[:, b]
            dr = -np.einsum("na,nar->nr", E_phi, FV)
            total = (phi * E_phi).sum(1) + 2.0 * (dr[:, :d] * K2r).sum(1)
            total = total + ((K2r @ self.J_UU[:d, :d, j]) * K2r).sum(1)
            dt = dr[:, :-1] @ self.T + K2r @ self.JT[:d, :, j]
            de = dr[:, :-1] @ self.c + dr[:, -1] + r[:, :-1] @ self.dc[:, j]
            columns.append(total + self._of_fixed(j, dt, de, St, e, self.T.T @ self.JT[:, :, j]))
        if self.others:
            psi = r[:, :d] - K2r @ self.G
            left = psi - St @ self.P_X.T
        for j, orders in enumerate(self.others, len(self.own)):
            total = sum((psi[:, a] * psi[:, b]).sum(1) for a, b in orders)
            dt = -sum(psi[:, b] @ self.P_X[a] for a, b in orders)
            de = -sum(left[:, a] @ self.e_P[b] for a, b in orders)
            PEP = sum(self.P_X[a].T @ self.P_X[b] for a, b in orders)
            columns.append(total + self._of_fixed(j, dt, de, St, e, PEP))
        sigma = 0.5 * self.sigma * (e * e / self.rss - 1.0 / self.df)
        return np.stack(columns, axis=1), sigma, St * e[:, None]

    def _of_fixed(
        self, j: int, dt: np.ndarray, de: np.ndarray, St: np.ndarray, e: np.ndarray, fall: np.ndarray
    ) -> np.ndarray:
        """The part of fixed effects and residuals. Args: fall: ``(p, p)``, the loss of S in the direction."""
        ratio = self.falls[j] / self.rss
        total: np.ndarray = self.df / self.rss * (2.0 * e * de + ratio * e * e) - ratio
        if self.reml:
            total = total + 2.0 * (dt * St).sum(1) + ((St @ fall) * St).sum(1)
        return total
