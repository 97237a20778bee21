"""Derivatives of models with very many variance parameters: the Hessian by average information.

The exact Hessian (:mod:`mixjax.engine.curvature`) needs traces of products of matrices for every pair of free entries
of the covariances. Their sum with the quadratic forms that go with them has the same expectation as half of those forms
alone (Gilmour, Thompson & Cullis 1995, Biometrics 51, 1440):

    ``d2f/dE_j dE_l  ~  s y'P V_j P V_l P y - s / rss (y'P V_j P y)(y'P V_l P y)``,  ``V_j = Z E_j Z'``

and these need a solution of the mixed-model equations for every entry: with 16 effects a level of two factors, 300
times less work and memory. Value, gradient and what follows from the chain to the coordinates stay exact, so that the
search ends where it would with the exact Hessian, only with more steps. For NumPy, one fit; the notation is that of
:mod:`mixjax.engine.curvature`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mixjax import linalg
from mixjax.engine.curvature import Slopes, chain_to_coordinates, lambdas_at
from mixjax.engine.dense_block import Rest, blocks_times, effects_of, finish, pad_rows
from mixjax.engine.first_factor import Spot, directions_of, eliminate_first, of_levels, orders_of, weights_of
from mixjax.engine.moments import Moments, RowSums


class _ByEntries(NamedTuple):
    """Derivatives by the J free entries of the covariances, of one fit.

    Attributes:
        rest: the profiled likelihood, and what it is made of. gradient: ``(J,)``. information: ``(J, J)``.
        falls: ``(J,)``, the residual sum of squares' own gradient, sign changed. spots: what each entry is.
        FT: ``(C, q, p)``, ``F_i B_i T_X`` of the levels of the first factor.
    """

    rest: Rest
    gradient: np.ndarray
    information: np.ndarray
    falls: np.ndarray
    spots: list[Spot]
    FT: np.ndarray


def evaluate(x: np.ndarray, moments: Moments, reml: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Value ``(1,)``, gradient ``(k, 1)``, and the Hessian ``(k, k, 1)`` by average information, at ``x (k, 1)``."""
    found = _by_entries(x, moments, reml)
    jacobian, curvature = chain_to_coordinates(x, found.gradient[:, None], found.spots, moments.layout)
    J = jacobian[..., 0]
    H = J.T @ found.information @ J + curvature[..., 0]
    return found.rest.lanes.criterion, (J.T @ found.gradient)[:, None], H[..., None]


def slopes(x: np.ndarray, moments: Moments, reml: bool) -> Slopes:
    """As :func:`mixjax.engine.curvature.slopes_of`, the Hessian by average information, all else exact."""
    found = _by_entries(x, moments, reml)
    rest, p = found.rest, found.rest.lanes.delta.shape[0]
    at, f1 = effects_of(moments), moments.layout.chain[0]
    P = rest.P2[:, :p, 0]
    falls = []
    for f, pair in found.spots:
        sides = (found.FT[:, a] if f == f1 else P[at[f, a]] for a in pair)
        left, right = sides
        product = left.T @ right
        falls.append(product if pair[0] == pair[1] else product + product.T)
    C = rest.lanes.XX_inverse[..., 0]
    moves = C @ np.reshape(falls, (-1, p, p)) @ C
    jacobian, curvature = chain_to_coordinates(x, found.gradient[:, None], found.spots, moments.layout)
    J = jacobian[..., 0]
    H = J.T @ found.information @ J + curvature[..., 0]
    of_C = np.tensordot(J.T, moves, 1)
    log_rss = -(J.T @ found.falls) / rest.lanes.rss[0]
    return Slopes(rest.lanes, H[..., None], of_C[..., None], log_rss[:, None])


def _by_entries(x: np.ndarray, moments: Moments, reml: bool) -> _ByEntries:
    assert isinstance(moments.sums, RowSums)
    layout, lambdas = moments.layout, lambdas_at(x, moments)
    f1 = layout.chain[0]
    own = directions_of(layout, f1)
    first = eliminate_first(lambdas[f1], moments)
    UU, Uy, yy = moments.contract(weights_of(first))
    rest = finish((UU[:, :, 0], Uy[:, 0], yy[0]), first, lambdas, moments, reml)
    lanes, c, T = rest.lanes, rest.c[:, 0], rest.T_X[..., 0]
    d, u, p = rest.W.shape[0], len(rest.c), lanes.delta.shape[0]
    s = (moments.n - (p if reml else 0)) / lanes.rss
    K2 = rest.W
    if d:
        half = blocks_times(lambdas, moments, rest.W)
        K2 = blocks_times(lambdas, moments, linalg.transpose(half))
    A_inverse = lanes.XX_inverse[..., 0]
    by_X = T @ A_inverse @ T.T
    C_log = pad_rows(linalg.transpose(pad_rows(K2, u)), u) + (by_X[..., None] if reml else 0.0)
    Q = moments.pull_back(C_log + s * rest.c[:, None] * rest.c[None], s * rest.c, s)
    g1 = of_levels(Q, first, moments, own)[0][:, 0]

    # Z'P y of all effects: those of the first factor by level, (C, q), and the dense ones.
    V = moments.sums.V[..., 0]
    n_levels, q = V.shape[:2]
    F, K, A = (np.moveaxis(part[..., 0], -1, 0) for part in (first.F, first.K, moments.A))
    U = V[..., :u].reshape(n_levels * q, u)
    e1 = np.einsum("cab,cb->ca", F, V @ np.append(c, 1.0))
    P2 = rest.P2[..., 0]
    e2 = P2[:, p] - P2[:, :p] @ lanes.delta[:, 0] if d else np.zeros(0)

    # E_j Z'P y, a column each: of the first factor's entries (C, q, J1), of the others (d, J2).
    at = effects_of(moments)
    spots: list[Spot] = [(f1, pair) for pair in own]
    others: list[Spot] = [(f, pair) for f, *_ in moments.dense for pair in directions_of(layout, f)]
    W1 = np.zeros((n_levels, q, len(own)))
    for j, pair in enumerate(own):
        for a, b in orders_of(*pair):
            W1[:, a, j] = e1[:, b]
    W2 = np.zeros((d, len(others)))
    for j, (f, pair) in enumerate(others):
        for a, b in orders_of(*pair):
            W2[at[f, a], j] = e2[at[f, b]]

    # Z'P Z of these: eliminate the first factor, solve for the others, put back.
    flat = W1.reshape(n_levels * q, -1)
    t = np.concatenate([A @ W1, (U[:, :d] @ W2).reshape(n_levels, q, -1)], axis=2)
    rhs = np.concatenate([U.T @ flat, moments.UU[:, :d, 0] @ W2], axis=1)
    rhs -= U.T @ (K @ t).reshape(n_levels * q, -1)
    solved = by_X @ rhs
    if d:
        solved[:d] += K2[..., 0] @ rhs[:d]
    O1 = F @ (t - (U @ solved).reshape(t.shape))
    O2 = rhs[:d] - (moments.UU[:d, :, 0] - UU[:d, :, 0, 0]) @ solved
    quadratic = np.concatenate([flat.T @ O1.reshape(n_levels * q, -1), W2.T @ O2])
    falls = np.concatenate([np.einsum("cqj,cq->j", W1, e1), W2.T @ e2])
    information = s * quadratic - s / lanes.rss * falls[:, None] * falls

    g2 = _dense_traces(rest, K2, moments, others, A_inverse if reml else None) - s * falls[len(own) :]
    return _ByEntries(
        rest, np.concatenate([g1, g2]), 0.5 * (information + information.T), falls, spots + others,
        F @ (U @ T).reshape(n_levels, q, p),
    )  # fmt: skip


def _dense_traces(
    rest: Rest, K2: np.ndarray, moments: Moments, spots: list[Spot], A_inverse: np.ndarray | None
) -> np.ndarray:
    """``tr(Omega E_j)`` of the dense factors' entries; of the restricted likelihood with the inverse of X's block."""
    if not spots:
        return np.zeros(0)
    G = rest.G_dd[..., 0]
    Omega = G - G @ K2[..., 0] @ G
    if A_inverse is not None:
        P = rest.P2[:, :-1, 0]
        Omega -= P @ A_inverse @ P.T
    at = effects_of(moments)
    return np.array([sum(np.trace(Omega[at[f, b], at[f, a]]) for a, b in orders_of(*pair)) for f, pair in spots])
