"""The Schur complement of the first factor: dense effects, fixed effects and residual; the dense effects' directions.

The notation is that of :mod:`mixjax.engine.curvature`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mixjax import decompositions, linalg
from mixjax.covariance import stack_of
from mixjax.engine.crossed import AnyMoments
from mixjax.engine.first_factor import First, Lambdas, Spot, directions_of, dot, orders_of, sum_of
from mixjax.engine.profiled import Profiled
from mixjax.machine import Array, as_laid_out, broadcast_to, cond, namespace, set_at
from mixjax.products.sizes import MOST_DENSE

# Smallest standard deviation ratio in a basis of Z down to which the inverse of D is used.
LEAST_RATIO = 1e-3


class Rest(NamedTuple):
    """Inverse and solutions when U and y are left, with ``W = (I + Lambda'G_dd Lambda)^{-1} (d, d, B)`` of the d dense
    effects.

    W: ``(0, 0, B)`` where it was not asked for. ``G_dd``: their products.
    ``K2 = Lambda W Lambda'``. ``P2 = (I - G_dd K2) G_d,(X y) (d, p + 1, B)``.
    ``T_X = (-K2 G_dX; I) (u, p, B)``.
    ``c = (-u; -beta) (u, B)``, the coefficients that leave the residual when y has coefficient 1.
    """

    lanes: Profiled
    G_dd: Array
    W: Array
    P2: Array
    T_X: Array
    c: Array


def finish(
    contracted: tuple[Array, Array, Array],
    first: First,
    lambdas: Lambdas,
    moments: AnyMoments,
    reml: Array | bool,
    with_W: bool = True,
) -> Rest:
    """Eliminate the dense effects and the fixed effects from what the first factor leaves.

    Args:
        with_W: False where only the solution is needed, which takes less than the inverse of a large block.
    """
    xp = namespace(moments.UU, first.logdet)
    UU, Uy, yy = moments.UU - contracted[0], moments.Uy - contracted[1], moments.yy - contracted[2]
    u = Uy.shape[0]
    d = sum(q * m for _, q, m in moments.dense)
    p = u - d
    logdet = (moments.count * first.logdet).sum(0)
    G_dd, G_dX, G_dy = UU[:d, :d], UU[:d, d:], Uy[:d]
    XX, Xy = UU[d:, d:], Uy[d:]
    W = G_dd
    P2 = T_X = G_dX
    c = G_dy
    if d:
        M = _plus_one(on_both_sides(lambdas, moments, G_dd))
        B2 = xp.concatenate([G_dX, G_dy[:, None]], axis=1)
        half = blocks_times(lambdas, moments, B2, transpose=True)
        if with_W or d <= MOST_DENSE or M.shape[2] > 1:
            W, logdet_M = linalg.inverse_logdet(M)
            T = linalg.matmul(W, half)
        else:
            T, logdet_M = (x[..., None] for x in linalg.solve_logdet(M[..., 0], half[..., 0]))
            W = M[:0, :0]
        logdet = logdet + logdet_M
        T = -blocks_times(lambdas, moments, T)
        P2 = B2 + linalg.matmul(G_dd, T)
        T_X, c = T[:, :p], T[:, p]
        if p:
            XX = XX + linalg.matmul(linalg.transpose(G_dX), T_X)
            Xy = Xy + (T_X * G_dy[:, None]).sum(0)
        yy = yy + (G_dy * c).sum(0)
    if p:
        XX_inverse, logdet_XX = linalg.inverse_logdet(XX)
        delta = linalg.matmul(XX_inverse, Xy[:, None])[:, 0]
        rss = yy - (Xy * delta).sum(0)
        T_X = xp.concatenate([T_X, broadcast_to(linalg.eye(p, XX), XX.shape)])
        c = pad_rows(c, u) - linalg.matmul(T_X, delta[:, None])[:, 0]
    else:
        XX_inverse, logdet_XX, delta, rss = XX, xp.zeros_like(yy), Xy, yy
    df = moments.n - xp.where(reml, p, 0)
    criterion = logdet + df * (1.0 + xp.log(2.0 * np.pi * rss / df)) - moments.sum_log_weights
    criterion = criterion + xp.where(reml, logdet_XX + 2.0 * moments.X_logdet, 0.0)
    lanes = Profiled(criterion, delta, XX_inverse, rss, xp.sqrt(rss / df))
    return Rest(lanes, G_dd, W, P2, T_X, c)


def on_both_sides(lambdas: Lambdas, moments: AnyMoments, G: Array) -> Array:
    """``Lambda' G Lambda`` of a symmetric ``G (d, d, B)``."""
    if all(q == 1 for _, q, _ in moments.dense):
        diagonal = _diagonal(lambdas, moments, G.shape[2:])
        return diagonal[:, None] * G * diagonal
    half = blocks_times(lambdas, moments, G, transpose=True)
    return blocks_times(lambdas, moments, linalg.transpose(half), transpose=True)


def _diagonal(lambdas: Lambdas, moments: AnyMoments, lanes: tuple[int, ...]) -> Array:
    """Lambda ``(d, B)`` where every dense factor has one effect a level."""
    xp = namespace(lambdas[moments.dense[0][0]][0][0])
    return xp.concatenate([xp.broadcast_to(lambdas[f][0][0], (m, *lanes)) for f, _, m in moments.dense])


def blocks_times(lambdas: Lambdas, moments: AnyMoments, rows: Array, transpose: bool = False) -> Array:
    """``Lambda rows`` (or ``Lambda' rows``) for all dense effects, ``(d, r, B)``; Lambda by its entries."""
    xp = namespace(rows)
    if all(q == 1 for _, q, _ in moments.dense):
        return _diagonal(lambdas, moments, rows.shape[2:])[:, None] * rows
    parts, start = [], 0
    for f, q, m in moments.dense:
        Lambda = lambdas[f]
        part = rows[start : start + q * m].reshape(q, m, *rows.shape[1:])
        for a in range(q):
            parts.append(dot((part[b], Lambda[b][a] if transpose else Lambda[a][b]) for b in range(q)))
        start += q * m
    return xp.concatenate(parts)


def dense_directions(
    lambdas: Lambdas,
    moments: AnyMoments,
    rest: Rest,
    K2: Array,
    s: Array,
    curve: Array,
    reml: Array | bool,
    first: tuple[Array, Array, Array, Array, Array | None],
) -> tuple[Array, Array, Array, Array]:
    """Directions of the dense factors' covariances.

    Args:
        first: J, J c, c'J c, K2 J and T_X'J of the first factor's directions, those along the axis before the last.

    Returns:
        The gradient; the Hessian among them; and with the first factor's directions; the fall of the residual sum of
        squares.
    """
    xp = namespace(K2)
    J_UU, Jc, cJc, KJ, TJ = first
    lanes, p = rest.lanes, rest.lanes.delta.shape[0]
    d, u = K2.shape[0], rest.c.shape[0]
    P_X = rest.P2[:, :p]
    F, LJ, Omega = _dense_products(lambdas, moments, rest, K2, J_UU[:d], KJ)
    L_log = linalg.transpose(pad_rows(linalg.transpose(F), u))
    LJc = Jc[:d] - linalg.matmul(rest.G_dd, linalg.matmul(K2, Jc[:d]))
    e = rest.P2[:, p]
    if p:
        half = linalg.matmul(P_X, lanes.XX_inverse)
        T_X = linalg.transpose(rest.T_X)
        L_log = L_log - xp.where(reml, linalg.matmul(half, T_X), 0.0)
        LJ = LJ - xp.where(reml, linalg.matmul(half[:, :, None], TJ), 0.0)
        LJc = LJc - linalg.matmul(half, linalg.matmul(T_X, Jc))
        e = e - linalg.matmul(P_X, lanes.delta[:, None])[:, 0]

    at = effects_of(moments)
    spots = [(f, pair) for f, _, _ in moments.dense for pair in directions_of(moments.layout, f)]

    def unit_times(f: int, pair: tuple[int, int]) -> Array:
        """E e for the unit symmetric matrix E of a direction."""
        moved = xp.zeros_like(e)
        for a, b in orders_of(*pair):
            moved = set_at(moved, at[f, a], e[at[f, b]])
        return moved

    Ee = xp.stack([unit_times(*spot) for spot in spots], axis=1)  # (d, J, B)
    eEe = (e[:, None] * Ee).sum(0)
    Omega_Ee, Omega_log = linalg.matmul(Omega, Ee), Omega
    if p:
        Omega_Ee = Omega_Ee - linalg.matmul(half, linalg.matmul(linalg.transpose(P_X), Ee))
        Omega_log = Omega - xp.where(reml, linalg.matmul(half, linalg.transpose(P_X)), 0.0)
    traces = [sum_of(_trace(Omega_log[at[f, b], at[f, a]]) for a, b in orders_of(*pair)) for f, pair in spots]
    products = (_products_at_once if xp is np else _products)(Omega_log, LJ, L_log, moments, spots)
    g = xp.stack(traces) - s * eEe
    among = 2.0 * s * (Ee[:, :, None] * Omega_Ee[:, None]).sum(0) - curve * eEe[:, None] * eEe - products[0]
    between = 2.0 * s * (LJc[:, :, None] * Ee[:, None]).sum(0) - curve * cJc[:, None] * eEe
    return g, among, between - products[1], eEe


def _products(Omega: Array, LJ: Array, L: Array, moments: AnyMoments, spots: list[Spot]) -> tuple[Array, Array]:
    """``tr(Omega E_j Omega E_l) (J, J, B)`` of the dense directions, and ``sum (E_l L) LJ_i (I, J, B)`` with the first
    factor's."""
    xp, at = namespace(Omega), effects_of(moments)

    def inner(f: int, f2: int, left: tuple[int, int], right: tuple[int, int]) -> Array:
        return (Omega[at[f, left[0]], at[f2, left[1]]] * Omega[at[f, right[0]], at[f2, right[1]]]).sum((0, 1))

    among, mixed = [], []
    for f, pair in spots:
        orders = orders_of(*pair)
        row = [
            sum_of(inner(f, f2, (b, a2), (a, b2)) for a, b in orders for a2, b2 in orders_of(*pair2))
            for f2, pair2 in spots
        ]
        among.append(xp.stack(row))
        mixed.append(sum_of((LJ[at[f, b]] * L[at[f, a]][:, :, None]).sum((0, 1)) for a, b in orders))
    return xp.stack(among), xp.stack(mixed, axis=1)


def _products_at_once(
    Omega: np.ndarray, LJ: np.ndarray, L: np.ndarray, moments: AnyMoments, spots: list[Spot]
) -> tuple[np.ndarray, np.ndarray]:
    """The same by NumPy: all pairs of effects of two factors are one product of matrices a lane."""
    Omega, LJ, L = (np.moveaxis(x, -1, 0) for x in (Omega, LJ, L))
    B, J = len(Omega), LJ.shape[3]
    among, mixed = np.empty((B, len(spots), len(spots))), np.empty((B, J, len(spots)))
    places, start = {}, 0
    for f, q, m in moments.dense:
        chosen = [j for j, (g, _) in enumerate(spots) if g == f]
        pairs = np.array([spots[j][1] for j in chosen]).reshape(-1, 2)
        places[f] = slice(start, start + q * m), q, m, np.array(chosen, int), pairs[:, 0], pairs[:, 1]
        start += q * m
    for rows, q, m, own, a, b in places.values():
        M = L[:, rows].reshape(B, 1, q, -1) @ LJ[:, rows].reshape(B, q, -1, J)
        mixed[:, :, own] = np.moveaxis(M[:, b, a] + np.where((a != b)[:, None], M[:, a, b], 0.0), 1, 2)
        a, b, off = a[:, None], b[:, None], (a != b)[:, None]
        for columns, q2, m2, own2, a2, b2 in places.values():
            blocks = Omega[:, rows, columns].reshape(B, q, m, q2, m2).swapaxes(2, 3).reshape(B, q * q2, m * m2)
            G = (blocks @ blocks.swapaxes(1, 2)).reshape(B, q, q2, q, q2)
            total = G[:, b, a2, a, b2] + np.where(off, G[:, a, a2, b, b2], 0.0)
            total += np.where(a2 != b2, G[:, b, b2, a, a2] + np.where(off, G[:, a, b2, b, a2], 0.0), 0.0)
            among[:, own[:, None], own2] = total
    return np.moveaxis(among, 0, -1), np.moveaxis(mixed, 0, -1)


def effects_of(moments: AnyMoments) -> dict[tuple[int, int], slice]:
    """Where the effects (factor, a) of the dense factors stand."""
    at, start = {}, 0
    for f, q, m in moments.dense:
        at.update({(f, a): slice(start + a * m, start + (a + 1) * m) for a in range(q)})
        start += q * m
    return at


def _dense_products(
    lambdas: Lambdas, moments: AnyMoments, rest: Rest, K2: Array, J: Array, KJ: Array
) -> tuple[Array, Array, Array]:
    """``F = I - G K2``, ``F J`` and ``Omega = F G`` of the dense effects.

    With D of full rank ``F = D^{-1} K2`` and ``Omega = D^{-1} - D^{-1} K2 D^{-1}``: no products of large matrices.
    """
    xp = namespace(K2)
    d, lanes = K2.shape[0], K2.shape[2]
    G = rest.G_dd

    def by_products() -> tuple[Array, Array, Array]:
        F = _plus_one(-linalg.matmul(G, K2))
        return F, J - linalg.matmul(G[:, :, None], KJ), linalg.matmul(F, G)

    if lanes > 1 or d <= MOST_DENSE:
        return by_products()
    inverses, least = {}, []
    for f, _, _ in moments.dense:
        zero = xp.zeros_like(rest.c[0])
        Lambda = stack_of([[zero if x is None else x for x in row] for row in lambdas[f]])
        D = linalg.matmul(Lambda, linalg.transpose(Lambda))
        one = linalg.eye(len(D), D)
        least.append(decompositions.is_positive(D - LEAST_RATIO**2 * one))
        inverse = linalg.inverse_logdet(xp.where(least[-1], D, one))[0]
        inverses[f] = [list(row) for row in inverse]

    def by_scaling() -> tuple[Array, Array, Array]:
        F = blocks_times(inverses, moments, K2)
        back = linalg.transpose(blocks_times(inverses, moments, linalg.transpose(_plus_one(-F))))
        return F, blocks_times(inverses, moments, KJ), 0.5 * (back + linalg.transpose(back))

    products: tuple[Array, Array, Array] = cond(xp.stack(least).all(), by_scaling, by_products)
    return products


def _plus_one(A: Array) -> Array:
    """``I + A`` of ``(d, d, B)``; a large identity takes longer to make than to add."""
    d = A.shape[0]
    if d <= MOST_DENSE:
        return A + linalg.eye(d, A)
    if namespace(A) is np:
        A = A.copy()
        A[np.arange(d), np.arange(d)] += 1.0
        return A
    at = namespace(A).arange(d)
    return A.at[at, at].add(1.0, unique_indices=True, indices_are_sorted=True)


def traces_of_products(A: Array) -> Array:
    """``tr(A_j A_l) (J, J, B)`` of ``A (u, u, J, B)``."""
    transposed = linalg.transpose(A)
    if A.shape[0] > MOST_DENSE:  # read along rows; reading along columns takes three times as long
        transposed = as_laid_out(transposed)
    if namespace(A) is np and A.shape[3] == 1:
        J = A.shape[2]
        return (A.reshape(-1, J).T @ transposed.reshape(-1, J))[..., None]
    return (A[:, :, :, None] * transposed[:, :, None]).sum((0, 1))


def _trace(A: Array) -> Array:
    """``(B,)`` of ``(m, m, B)``."""
    return namespace(A).einsum("iiB->B", A)


def pad_rows(rows: Array, u: int) -> Array:
    if rows.shape[0] == u:
        return rows
    xp = namespace(rows)
    return xp.concatenate([rows, xp.zeros((u - rows.shape[0], *rows.shape[1:]), rows.dtype)])
