"""Value, gradient and Hessian of the criterion in closed form, for many fits at once.

A *lane* is one fit; lanes stand in the last axis of every array. The first factor of the elimination is worked off by
:class:`~mixjax.likelihood.moments.Moments`: its levels of one and the same ``A_i = Z_i'Z_i`` form a class and share
inverse and log-determinant, and only sums over the class of second moments of ``B_i = Z_i'[U y]`` matter. ``U`` holds
the effects of all other factors and the basis of X. So the cost does not grow with the number of levels of a balanced
design.

Notation, with ``D = Lambda Lambda'`` and Lambda any factor: ``K = (D^{-1} + A)^{-1} = D (I + A D)^{-1}``,
``F = I - A K``, ``N = F A``. In the direction of a symmetric E of D

    ``dK = F'E F``,  ``d logdet(I + A D) = tr(N E)``,  ``dF = -A F'E F``,  ``dN = -N E N``

which follow from differentiating ``(I + A D) F = I``. What remains after the first factor, ``G = [U y]'[U y] -
sum_i B_i'K_i B_i``, changes by ``-J`` with ``J = sum_i B_i'F_i'E F_i B_i``. With C the inverse of the mixed-model
equations of U, c the coefficients ``(-u, -beta, 1)`` that leave the residual, ``rss = c'G c`` and ``s = df / rss``:

    ``df/dE_j = sum_i tr(N_i E_j) - tr(C J_j) - s c'J_j c``
    ``d2f/dE_j dE_l = sum_i tr(N_i E_j (2 F_i B_i (C + s c c') B_i'F_i' - N_i) E_l)
                      - tr(C J_j C J_l) - 2 s (J_j c)'C (J_l c) - s / rss (c'J_j c)(c'J_l c)``

where the first two C are those of the determinant: for ML without the fixed effects. The other factors' own
directions follow from ``Omega = Z'P Z`` and ``e = Z'P y`` of their effects, as in average-information REML (Gilmour,
Thompson & Cullis 1995, Biometrics 51). All of it is held against automatic differentiation in the tests.
"""

from __future__ import annotations

from functools import cache, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.likelihood.crossed import AnyMoments, CrossedMoments
from mixjax.likelihood.moments import MOST_DENSE, Moments, pairs_of
from mixjax.likelihood.statistics import Layout

Entries = dict[tuple[int, int], Array]  # of tiny matrices, each entry a vector over classes and lanes
Spot = tuple[int, tuple[int, int]]  # a free entry of the covariances: factor and pair of effects


class Lanes(NamedTuple):
    """The profiled likelihood of many fits. Last axis: lanes.

    Attributes:
        criterion: ``(B,)``. delta: ``(p, B)`` coefficients of the basis of X. XX_inverse: ``(p, p, B)``.
        rss, sigma: ``(B,)``.
    """

    criterion: Array
    delta: Array
    XX_inverse: Array
    rss: Array
    sigma: Array


class _First(NamedTuple):
    """The first factor eliminated. Entries are vectors ``(C, B)`` over classes and lanes."""

    K: Entries
    F: Entries
    N: Entries
    logdet: Array


class _Rest(NamedTuple):
    """What follows when U and y are left, with ``W = (I + Lambda'G_dd Lambda)^{-1} (d, d, B)`` of the d dense effects.

    ``G_dd``: their products. ``K2 = Lambda W Lambda'``. ``P2 = (I - G_dd K2) G_d,(X y) (d, p + 1, B)``.
    ``T_X = (-K2 G_dX; I) (u, p, B)``.
    ``c = (-u; -beta) (u, B)``, the coefficients that leave the residual when y has coefficient 1.
    """

    lanes: Lanes
    G_dd: Array
    W: Array
    P2: Array
    T_X: Array
    c: Array


def profile_lanes(x: Array, moments: AnyMoments, reml: Array) -> Lanes:
    """The criterion alone, with what it is made of.

    Args:
        x: ``(k, B)`` signed Cholesky entries in the bases of the products.
        moments: of B lanes, or with a last axis of 1 where lanes share it.
        reml: scalar bool, may be traced.
    """
    lambdas = _lambdas(x, moments)
    first = _eliminate_first(lambdas[moments.layout.chain[0]], moments)
    UU, Uy, yy = moments.contract(_weights([first.K]))
    return _finish((UU[:, :, 0], Uy[:, 0], yy[0]), first, lambdas, moments, reml).lanes


def modes_of_factors(x: Array, moments: CrossedMoments, reml: Array) -> dict[int, Array]:
    """Predicted effects in the bases of the products at the profiled fixed effects: per factor ``(q, m)``.

    Those of the dense factors solve the mixed-model equations; a level of the first factor has ``K_i Z_i'(y - U u - X
    beta)`` (Bates et al. 2015, J. Stat. Softw. 67(1), section 3.1). One lane.
    """
    lambdas = _lambdas(x, moments)
    f1 = moments.layout.chain[0]
    first = _eliminate_first(lambdas[f1], moments)
    UU, Uy, yy = moments.contract(_weights([first.K]))
    c = _finish((UU[:, :, 0], Uy[:, 0], yy[0]), first, lambdas, moments, reml).c
    left, q = moments.rows_times(c), len(lambdas[f1])
    modes = {f1: jnp.stack([_dot((first.K[_ordered(a, b)], left[b]) for b in range(q)) for a in range(q)])[..., 0]}
    start = 0
    for f, q, m in moments.dense:
        modes[f] = -c[start : start + q * m, 0].reshape(q, m)
        start += q * m
    return modes


def value_gradient_hessian(x: Array, moments: AnyMoments, reml: Array) -> tuple[Array, Array, Array]:
    """``f (B,)``, ``g (k, B)``, ``H (k, k, B)`` of the criterion with respect to ``x (k, B)``.

    Args as in :func:`profile_lanes`. Not for differentiation: derivatives of estimates come from the implicit function
    theorem, which differentiates the criterion itself.
    """
    lambdas = _lambdas(x, moments)
    lanes, g, H, spots = _by_covariance(lambdas, moments, reml)
    return (lanes.criterion, *_to_cholesky(g, H, spots, lambdas, moments.layout))


def minque_equations(moments: Moments) -> tuple[Array, Array, list[Spot]]:
    """``tr(P V_j P V_l) (J, J, L)`` and ``tr(P V_j) (J, L)`` at ``V = sigma^2 W^{-1}``, and what every j stands for.

    ``V_j = Z E_j Z'`` for the J free entries (factor, (a, b)) of the covariances, P the projection that takes the fixed
    effects out. They do not depend on y.
    """
    moments = moments.without_response()
    nothing = jnp.zeros((moments.layout.n_theta, moments.UU.shape[-1]), moments.UU.dtype)
    _, g, H, spots = _by_covariance(_lambdas(nothing, moments), moments, True, with_residuals=False)
    return -H, g, spots


def _by_covariance(lambdas: dict, moments: AnyMoments, reml: Array | bool, with_residuals: bool = True):
    """Derivatives with respect to the J free entries of the covariances D of all factors.

    Args:
        with_residuals: False leaves the residual sum of squares out of the derivatives.

    Returns:
        Lanes; gradient ``(J, B)``; Hessian ``(J, J, B)``; and for each entry its spot (factor, (a, b)).
    """
    layout = moments.layout
    f1 = layout.chain[0]
    own = directions_of(layout, f1)
    first = _eliminate_first(lambdas[f1], moments)
    # J of every direction along axis 2, behind what the elimination itself takes away.
    UU, Uy, yy = moments.contract(_weights([first.K, *(_congruence(first.F, pair) for pair in own)]))
    rest = _finish((UU[:, :, 0], Uy[:, 0], yy[0]), first, lambdas, moments, reml)
    J = _Directions(own, UU[:, :, 1:], Uy[:, 1:], yy[1:])
    df = moments.n - jnp.where(reml, moments.UU.shape[0] - rest.W.shape[0], 0)
    s = df / rest.lanes.rss if with_residuals else jnp.zeros_like(rest.lanes.rss)
    curve = s / rest.lanes.rss if with_residuals else s
    spots = [(f1, pair) for pair in own] + [(f, pair) for f, *_ in moments.dense for pair in directions_of(layout, f)]
    rest_of = (first, rest, J, s, curve, reml)
    if isinstance(moments, CrossedMoments) and all(q == 1 for _, q, _ in moments.dense):
        crossed = moments
        ratios = jnp.stack([lambdas[f][0][0] for f, *_ in crossed.dense])
        g, H = jax.lax.cond(
            (jnp.abs(ratios) > LEAST_RATIO).all(),
            lambda: _scalar_derivatives(lambdas, crossed, *rest_of),
            lambda: _derivatives(lambdas, crossed, *rest_of),
        )
    else:
        g, H = _derivatives(lambdas, moments, *rest_of)
    return rest.lanes, g, H, spots


class _Directions(NamedTuple):
    """J of the first factor's directions ``own``, those along the axis before the last: ``UU (u, u, J, B)``,
    ``Uy (u, J, B)``, ``yy (J, B)``."""

    own: list[tuple[int, int]]
    UU: Array
    Uy: Array
    yy: Array


def _derivatives(lambdas: dict, moments: AnyMoments, first: _First, rest: _Rest, J: _Directions, s, curve, reml):
    """Gradient ``(J, B)`` and Hessian ``(J, J, B)``: the first factor's directions, then those of the dense ones."""
    lanes, c, T_X = rest.lanes, rest.c, rest.T_X
    u, p, d = c.shape[0], lanes.delta.shape[0], rest.W.shape[0]
    K2 = rest.W
    if d:
        half = _blocks_times(lambdas, moments, rest.W)
        K2 = _blocks_times(lambdas, moments, linalg.transpose(half))
    # C, the inverse of the mixed-model equations of U: for the determinant, where the fixed effects may be left out.
    C_log = jnp.pad(K2, ((0, u - d), (0, u - d), (0, 0)))
    half = linalg.matmul(T_X, lanes.XX_inverse) if p else T_X
    if p:
        C_log = C_log + jnp.where(reml, linalg.matmul(half, linalg.transpose(T_X)), 0.0)
    Jc = linalg.matmul(J.UU, c[:, None, None])[:, 0] + J.Uy
    cJc = (c[:, None] * (Jc + J.Uy)).sum(0) + J.yy
    # In two parts: a product whose sides are the padded sizes of the blocks is twice as fast.
    parts = [linalg.matmul(K2[:, :, None], part) for part in (J.UU[:d, :d], J.UU[:d, d:])] if d else [J.UU[:d]]
    KJ = jnp.concatenate(parts, axis=1)
    CJ, TJ = _pad_rows(KJ, u), None
    if p:
        TJ = linalg.matmul(linalg.transpose(T_X)[:, :, None], J.UU)
        CJ = CJ + jnp.where(reml, linalg.matmul(half[:, :, None], TJ), 0.0)
    CJc = _pad_rows(linalg.matmul(K2, Jc[:d]), u)  # C for rss always has the fixed effects
    if p:
        CJc = CJc + linalg.matmul(half, linalg.matmul(linalg.transpose(T_X), Jc))

    # Psi = C + s c c' over (U, y), pulled back to the classes.
    Q = moments.pull_back(C_log + s * c[:, None] * c[None], s * c, s)
    g, moved = _of_levels(Q, first, moments, J.own)
    H = moved - _traces(CJ) - 2.0 * s * (Jc[:, :, None] * CJc[:, None]).sum(0) - curve * cJc[:, None] * cJc[None]
    if not d:
        return g, H
    dense = _dense_directions(lambdas, moments, rest, K2, s, curve, reml, (J.UU, Jc, cJc, KJ, TJ))
    return _join(g, H, *dense)


def _of_levels(pulled: list[Array], first: _First, moments: AnyMoments, own: list) -> tuple[Array, Array]:
    """What ``B_i Psi B_i'`` gives: gradient ``(J, B)``, and ``sum_i tr(N E_j (2 F Q F' - N) E_l) (J, J, B)``."""
    sandwich, count = _sandwich(first.F, _pairs_to_matrix(pulled)), moments.count
    FQF, N = (jnp.stack([entries[pair] for pair in first.N]) for entries in (sandwich, first.N))
    N_and_Y = (N[:, None] * (2.0 * FQF - count * N)).sum(2)
    at, twice, products = _first_directions(tuple(own), tuple(first.N))
    moved = _sum(N_and_Y[row, column] * jnp.asarray(weight, N.dtype)[..., None] for row, column, weight in products)
    return twice[:, None] * (count * N - FQF).sum(1)[at], moved


def _join(g: Array, H: Array, g2: Array, among: Array, mixed: Array) -> tuple[Array, Array]:
    upper, lower = jnp.concatenate([H, mixed], 1), jnp.concatenate([linalg.transpose(mixed), among], 1)
    return jnp.concatenate([g, g2]), jnp.concatenate([upper, lower])


def _scalar_derivatives(
    lambdas: dict, moments: CrossedMoments, first: _First, rest: _Rest, J: _Directions, s, curve, reml
):
    """As :func:`_derivatives`, for one lane whose dense factors have one effect a level and clear variances.

    With ``l`` the standard deviation ratio of every dense effect, ``K2 = l W l``, ``F = l^{-1} W l`` and ``Omega =
    l^{-1} (I - W) l^{-1}``: all traces follow from W and ``V = W l J l`` by sums of squares and products that are thin.
    """
    lanes, W, p, d = rest.lanes, rest.W[..., 0], rest.lanes.delta.shape[0], rest.W.shape[0]
    sizes = [m for *_, m in moments.dense]
    l = jnp.concatenate([jnp.broadcast_to(lambdas[f][0][0], (m,)) for f, _, m in moments.dense])  # noqa: E741
    c, T, A, s, curve = rest.c[:, 0], rest.T_X[..., 0], lanes.XX_inverse[..., 0], s[0], curve[0]
    J_UU, J_Uy, J_yy = J.UU[..., 0], J.Uy[..., 0], J.yy[:, 0]
    with_X = jnp.where(reml, 1.0, 0.0)

    def K_times(V):
        return _rows(l, _product(W, _rows(l, V)))

    def by_factor(x):
        return jnp.stack([part.sum(0) for part in jnp.split(x, np.cumsum(sizes)[:-1])])

    Jc = jnp.einsum("uvj,v->uj", J_UU, c) + J_Uy
    cJc = c @ (Jc + J_Uy) + J_yy
    JT = jnp.einsum("uvj,vp->upj", J_UU, T)
    TJT, TJc = jnp.einsum("up,uqj->pqj", T, JT), T.T @ Jc
    KJT = K_times(JT[:d])
    V = _product(W, l[:, None, None] * J_UU[:d, :d] * l[None, :, None])  # (d, d, J)
    ATJT = jnp.einsum("pq,qrj->prj", A, TJT)
    CJCJ = _traces(V[..., None])[..., 0]
    CJCJ = CJCJ + with_X * (2.0 * jnp.einsum("pq,dqj,dpl->jl", A, JT[:d], KJT) + jnp.einsum("pqj,qpl->jl", ATJT, ATJT))
    JcCJc = Jc[:d].T @ K_times(Jc[:d]) + TJc.T @ A @ TJc

    T_d, c_d, TA = T[:d], c[:d], T[:d] @ A
    Psi = l[:, None] * W * l + jnp.concatenate([with_X * TA, s * c_d[:, None]], 1) @ jnp.column_stack([T_d, c_d]).T
    side = jnp.column_stack([with_X * TA + s * jnp.outer(c_d, c[d:]), s * c_d])
    last = jnp.append(c[d:], 1.0)
    corner = s * jnp.outer(last, last) + with_X * jnp.pad(A, ((0, 1), (0, 1)))
    g, moved = _of_levels(moments.pull_back_parts(Psi, side, corner), first, moments, J.own)
    H = moved[..., 0] - CJCJ - 2.0 * s * JcCJc - curve * jnp.outer(cJc, cJc)

    # The dense factors' own directions.
    P, e = rest.P2[:, :p, 0], rest.P2[:, p, 0]
    e = e - P @ lanes.delta[:, 0]
    half = P @ A
    f_of = np.repeat(np.arange(len(sizes)), sizes)
    mask = jnp.asarray(f_of[:, None] == np.arange(len(sizes)), W.dtype)  # (d, f)

    def Omega_times(X):
        X = _rows(1.0 / l, X)
        return _rows(1.0 / l, X - _product(W, X))

    eEe = by_factor(e * e)
    squares = by_factor(jnp.diagonal(W))
    trace = by_factor((1.0 - jnp.diagonal(W)) / l**2) - with_X * by_factor((half * P).sum(1))
    Ee = mask * e[:, None]
    Omega_Ee = Omega_times(Ee) - half @ (P.T @ Ee)
    # Sums of squares of I - W by blocks: those of W, and its diagonal.
    ratio = jnp.stack([lambdas[f][0][0][0] for f, *_ in moments.dense])
    within = by_factor(by_factor(W * W).T).T + jnp.diag(jnp.asarray(sizes, W.dtype) - 2.0 * squares)
    within = within / ratio[:, None] ** 2 / ratio**2
    P_of = mask[:, None] * P[:, :, None]  # (d, p, f)
    crossing = by_factor(jnp.einsum("dp,dpf->df", half, Omega_times(P_of)))
    PP = jnp.einsum("dp,dqf->pqf", P, P_of)
    APP = jnp.einsum("pq,qrf->prf", A, PP)
    low = jnp.einsum("pqf,qpg->fg", APP, APP)
    products = within - with_X * (2.0 * crossing - low)
    among = 2.0 * s * Ee.T @ Omega_Ee - curve * jnp.outer(eEe, eEe) - products
    FJT = _rows(1.0 / l**2, KJT)
    FJF = (V * W[:, :, None]).sum(1) / l[:, None] ** 2
    spread = jnp.einsum("dpj,dp->dj", FJT, half), jnp.einsum("dp,pqj,dq->dj", half, TJT, half)
    mixed = by_factor(FJF - with_X * (2.0 * spread[0] - spread[1])).T  # (j, f)
    LJc = _rows(1.0 / l**2, K_times(Jc[:d])) - half @ TJc
    between = 2.0 * s * LJc.T @ Ee - curve * jnp.outer(cJc, eEe) - mixed
    g, H = _join(g[:, 0], H, trace - s * eEe, among, between)
    return g[:, None], H[..., None]


def _product(A: Array, B: Array) -> Array:
    return jnp.tensordot(A, B, 1)


def _rows(scale: Array, B: Array) -> Array:
    """Rows of ``B (d, ...)`` times ``scale (d,)``."""
    return scale.reshape(-1, *(1,) * (B.ndim - 1)) * B


# --- the first factor ----------------------------------------------------------------------------------------------


def directions_of(layout: Layout, f: int) -> list[tuple[int, int]]:
    """Pairs (a, b), a <= b, of effects of factor f whose covariance is a parameter: those within one term."""
    return [
        (place.start + a, place.start + b) for place in layout.terms if place.factor == f for a, b in pairs_of(place.q)
    ]


def _lambdas(x: Array, moments: AnyMoments) -> dict[int, list[list[Array | None]]]:
    """Per factor, entries ``Lambda[a][b] (B,)`` of the block-diagonal Lambda of its terms; None stands for zero."""
    lambdas: dict[int, list[list[Array | None]]] = {}
    for f, q in enumerate(moments.layout.widths):
        lambdas[f] = [[None] * q for _ in range(q)]
    at = 0
    for place in moments.layout.terms:
        for row, column in zip(*cov.triangle(place.q), strict=True):
            lambdas[place.factor][place.start + int(row)][place.start + int(column)] = x[at]
            at += 1
    return lambdas


def _eliminate_first(Lambda: list[list[Array | None]], moments: AnyMoments) -> _First:
    A = {(a, b): moments.A[a, b] for a, b in _square(len(Lambda))}
    q = len(Lambda)
    if q == 1:
        D = _dot([(Lambda[0][0], Lambda[0][0])])
        pivot = 1.0 + D * A[0, 0]
        inverse = 1.0 / pivot
        return _First({(0, 0): D * inverse}, {(0, 0): inverse}, {(0, 0): A[0, 0] * inverse}, jnp.log(pivot))
    AL = {(a, c): _dot((A[a, b], Lambda[b][c]) for b in range(q)) for a, c in _square(q)}
    M = {}
    for a, b in pairs_of(q):
        M[a, b] = _dot((Lambda[c][a], AL[c, b]) for c in range(q)) + (1.0 if a == b else 0.0)
    inverse, logdet = _inverse_of_entries(M, q)
    LM = {(a, c): _dot((Lambda[a][b], inverse[_ordered(b, c)]) for b in range(q)) for a, c in _square(q)}
    K = {(a, b): _dot((LM[a, c], Lambda[b][c]) for c in range(q)) for a, b in pairs_of(q)}
    F = {(a, b): (1.0 if a == b else 0.0) - _dot((A[a, c], K[_ordered(c, b)]) for c in range(q)) for a, b in _square(q)}
    N = {(a, b): _dot((F[a, c], A[c, b]) for c in range(q)) for a, b in pairs_of(q)}
    return _First(K, F, N, logdet)


def _inverse_of_entries(M: Entries, q: int) -> tuple[Entries, Array]:
    """Gauss-Jordan elimination of a symmetric positive definite matrix given by its upper entries."""
    M = {(a, b): M[_ordered(a, b)] for a, b in _square(q)}
    product = M[0, 0]
    for k in range(q):
        product = product * M[k, k] if k else product
        inverse = 1.0 / M[k, k]
        new = {(k, k): inverse}
        for a, b in _square(q):
            if a != k and b != k:
                new[a, b] = M[a, b] - M[a, k] * M[k, b] * inverse
            elif b != k:
                new[a, b] = M[a, b] * inverse
            elif a != k:
                new[a, b] = -M[a, b] * inverse
        M = new
    return {pair: M[pair] for pair in pairs_of(q)}, jnp.log(product)


def _congruence(F: Entries, pair: tuple[int, int]) -> Entries:
    """``F'E F`` for the unit symmetric matrix E of a pair."""
    q = 1 + max(a for a, _ in F)
    a, b = pair
    if a == b:
        return {(c, d): F[a, c] * F[a, d] for c, d in pairs_of(q)}
    return {(c, d): F[a, c] * F[b, d] + F[b, c] * F[a, d] for c, d in pairs_of(q)}


def _sandwich(F: Entries, Q: Entries) -> Entries:
    """``F Q F'`` of symmetric Q."""
    q = 1 + max(a for a, _ in F)
    FQ = {(a, c): _dot((F[a, b], Q[_ordered(b, c)]) for b in range(q)) for a, c in _square(q)}
    return {(a, b): _dot((FQ[a, c], F[b, c]) for c in range(q)) for a, b in pairs_of(q)}


def _weights(matrices: list[Entries]) -> list[Array]:
    """Per pair of effects ``(C, j, B)``: entry of matrix j."""
    q = 1 + max(b for _, b in matrices[0])
    return [jnp.stack([matrix[pair] for matrix in matrices], axis=1) for pair in pairs_of(q)]


def _pairs_to_matrix(pulled: list[Array]) -> Entries:
    q = int((np.sqrt(8 * len(pulled) + 1) - 1) / 2)
    return {(a, b): x if a == b else 0.5 * x for (a, b), x in zip(pairs_of(q), pulled, strict=True)}


@cache
def _first_directions(own: tuple, pairs: tuple) -> tuple[np.ndarray, np.ndarray, list]:
    """For directions j = (a, b): their places among the pairs; 1, or 2 for off-diagonal ones; and the products ``N Y``
    of entries that make up ``tr(N E_j Y E_l)``: index arrays ``(J, J)`` and a weight, up to four times."""
    at = np.array([pairs.index(pair) for pair in own], np.int32)
    twice = np.array([1.0 if a == b else 2.0 for a, b in own])
    products = []
    for flip in (False, True):
        for flip2 in (False, True):
            index = np.zeros((2, len(own), len(own)), np.int32)
            weight = np.zeros((len(own), len(own)))
            for j, (a, b) in enumerate(own):
                for i, (a2, b2) in enumerate(own):
                    (x, y), (x2, y2) = (b, a) if flip else (a, b), (b2, a2) if flip2 else (a2, b2)
                    index[:, i, j] = pairs.index(_ordered(y, x2)), pairs.index(_ordered(x, y2))
                    weight[i, j] = not ((flip and a == b) or (flip2 and a2 == b2))
            if weight.any():
                products.append((index[0], index[1], weight))
    return at, twice, products


# --- all other factors, fixed effects, residual --------------------------------------------------------------------


def _finish(contracted: tuple, first: _First, lambdas: dict, moments: AnyMoments, reml: Array | bool) -> _Rest:
    """Eliminate the dense effects and the fixed effects from what the first factor leaves."""
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
        half = _blocks_times(lambdas, moments, G_dd, transpose=True)
        M = _plus_one(_blocks_times(lambdas, moments, linalg.transpose(half), transpose=True))
        W, logdet_M = linalg.inverse_logdet(M)
        logdet = logdet + logdet_M
        B2 = jnp.concatenate([G_dX, G_dy[:, None]], axis=1)
        T = linalg.matmul(W, _blocks_times(lambdas, moments, B2, transpose=True))
        T = -_blocks_times(lambdas, moments, T)
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
        eye = jnp.broadcast_to(jnp.eye(p, dtype=yy.dtype)[..., None], XX.shape)
        T_X = jnp.concatenate([T_X, eye])
        c = jnp.pad(c, ((0, p), (0, 0))) - linalg.matmul(T_X, delta[:, None])[:, 0]
    else:
        XX_inverse, logdet_XX, delta, rss = XX, jnp.zeros_like(yy), Xy, yy
    df = moments.n - jnp.where(reml, p, 0)
    criterion = logdet + df * (1.0 + jnp.log(2.0 * np.pi * rss / df)) - moments.sum_log_weights
    criterion = criterion + jnp.where(reml, logdet_XX + 2.0 * moments.X_logdet, 0.0)
    lanes = Lanes(criterion, delta, XX_inverse, rss, jnp.sqrt(rss / df))
    return _Rest(lanes, G_dd, W, P2, T_X, c)


def _blocks_times(lambdas: dict, moments: AnyMoments, rows: Array, transpose: bool = False) -> Array:
    """``Lambda rows`` (or ``Lambda' rows``) for all dense effects, ``(d, r, B)``; Lambda by its entries."""
    if all(q == 1 for _, q, _ in moments.dense):
        diagonal = [jnp.broadcast_to(lambdas[f][0][0], (m, *rows.shape[2:])) for f, _, m in moments.dense]
        return jnp.concatenate(diagonal)[:, None] * rows
    parts, start = [], 0
    for f, q, m in moments.dense:
        Lambda = lambdas[f]
        part = rows[start : start + q * m].reshape(q, m, *rows.shape[1:])
        for a in range(q):
            parts.append(_dot((part[b], Lambda[b][a] if transpose else Lambda[a][b]) for b in range(q)))
        start += q * m
    return jnp.concatenate(parts)


def _dense_directions(
    lambdas: dict,
    moments: AnyMoments,
    rest: _Rest,
    K2: Array,
    s: Array,
    curve: Array,
    reml: Array | bool,
    first: tuple,
):
    """Directions of the dense factors' covariances.

    Args:
        first: J, J c, c'J c, K2 J and T_X'J of the first factor's directions, those along the axis before the last.

    Returns:
        The gradient; the Hessian among them; and with the first factor's directions.
    """
    J_UU, Jc, cJc, KJ, TJ = first
    lanes, p = rest.lanes, rest.lanes.delta.shape[0]
    d, u = K2.shape[0], rest.c.shape[0]
    P_X = rest.P2[:, :p]
    F, LJ, Omega = _dense_products(lambdas, moments, rest, K2, J_UU[:d], KJ)
    L_log = jnp.pad(F, ((0, 0), (0, u - d), (0, 0)))
    LJc = Jc[:d] - linalg.matmul(rest.G_dd, linalg.matmul(K2, Jc[:d]))
    e = rest.P2[:, p]
    if p:
        half = linalg.matmul(P_X, lanes.XX_inverse)
        T_X = linalg.transpose(rest.T_X)
        L_log = L_log - jnp.where(reml, linalg.matmul(half, T_X), 0.0)
        LJ = LJ - jnp.where(reml, linalg.matmul(half[:, :, None], TJ), 0.0)
        LJc = LJc - linalg.matmul(half, linalg.matmul(T_X, Jc))
        e = e - linalg.matmul(P_X, lanes.delta[:, None])[:, 0]

    at = {}  # where the effects (factor, a) stand
    start = 0
    for f, q, m in moments.dense:
        at.update({(f, a): slice(start + a * m, start + (a + 1) * m) for a in range(q)})
        start += q * m
    spots = [(f, pair) for f, _, _ in moments.dense for pair in directions_of(moments.layout, f)]

    def unit_times(f, pair):
        """E e for the unit symmetric matrix E of a direction."""
        moved = jnp.zeros_like(e)
        for a, b in _orders(*pair):
            moved = moved.at[at[f, a]].set(e[at[f, b]])
        return moved

    Ee = jnp.stack([unit_times(*spot) for spot in spots], axis=1)  # (d, J, B)
    eEe = (e[:, None] * Ee).sum(0)
    Omega_Ee, Omega_log = linalg.matmul(Omega, Ee), Omega
    if p:
        Omega_Ee = Omega_Ee - linalg.matmul(half, linalg.matmul(linalg.transpose(P_X), Ee))
        Omega_log = Omega - jnp.where(reml, linalg.matmul(half, linalg.transpose(P_X)), 0.0)
    traces, products, mixed = [], [], []
    for f, pair in spots:
        orders = _orders(*pair)
        traces.append(_sum(jnp.einsum("iiB->B", Omega_log[at[f, b], at[f, a]]) for a, b in orders))
        products.append(
            [
                _sum(
                    (Omega_log[at[f, b], at[f2, a2]] * Omega_log[at[f, a], at[f2, b2]]).sum((0, 1))
                    for a, b in orders
                    for a2, b2 in _orders(*pair2)
                )
                for f2, pair2 in spots
            ]
        )
        mixed.append(_sum((LJ[at[f, b]] * L_log[at[f, a]][:, :, None]).sum((0, 1)) for a, b in orders))
    g = jnp.stack(traces) - s * eEe
    among = 2.0 * s * (Ee[:, :, None] * Omega_Ee[:, None]).sum(0) - curve * eEe[:, None] * eEe
    among = among - jnp.stack([jnp.stack(row) for row in products])
    between = 2.0 * s * (LJc[:, :, None] * Ee[:, None]).sum(0) - curve * cJc[:, None] * eEe
    return g, among, between - jnp.stack(mixed, axis=1)


# Smallest standard deviation ratio in a basis of Z down to which the inverse of D is used.
LEAST_RATIO = 1e-3


def _dense_products(lambdas: dict, moments: AnyMoments, rest: _Rest, K2: Array, J: Array, KJ: Array):
    """``F = I - G K2``, ``F J`` and ``Omega = F G`` of the dense effects.

    With D of full rank ``F = D^{-1} K2`` and ``Omega = D^{-1} - D^{-1} K2 D^{-1}``: no products of large matrices.
    """
    d, lanes = K2.shape[0], K2.shape[2]
    G = rest.G_dd

    def by_products():
        F = _plus_one(-linalg.matmul(G, K2))
        return F, J - linalg.matmul(G[:, :, None], KJ), linalg.matmul(F, G)

    if lanes > 1 or d <= MOST_DENSE:
        return by_products()
    inverses, least = {}, []
    for f, _, _ in moments.dense:
        zero = jnp.zeros_like(rest.c[0])
        Lambda = jnp.stack([jnp.stack([zero if x is None else x for x in row]) for row in lambdas[f]])
        D = linalg.matmul(Lambda, linalg.transpose(Lambda))
        floor = LEAST_RATIO**2 * jnp.eye(D.shape[0], dtype=D.dtype)[..., None]
        least.append(linalg.is_positive(D - floor))
        inverse = linalg.inverse_logdet(jnp.where(least[-1], D, jnp.eye(D.shape[0], dtype=D.dtype)[..., None]))[0]
        inverses[f] = [list(row) for row in inverse]

    def by_scaling():
        F = _blocks_times(inverses, moments, K2)
        back = linalg.transpose(_blocks_times(inverses, moments, linalg.transpose(_plus_one(-F))))
        return F, _blocks_times(inverses, moments, KJ), 0.5 * (back + linalg.transpose(back))

    return jax.lax.cond(jnp.stack(least).all(), by_scaling, by_products)


# --- from covariances to Cholesky entries --------------------------------------------------------------------------


def _to_cholesky(g: Array, H: Array, spots: list[Spot], lambdas: dict, layout: Layout) -> tuple[Array, Array]:
    """Chain rule ``D = Lambda Lambda'``: gradient and Hessian with respect to the entries of Lambda."""
    entries = [
        (place.factor, place.start + int(row), place.start + int(column))
        for place in layout.terms
        for row, column in zip(*cov.triangle(place.q), strict=True)
    ]
    zero = jnp.zeros_like(g[0])

    def move(spot: Spot, entry: tuple[int, int, int]) -> Array:
        """``dD_ab / dLambda_ic``."""
        (f, (a, b)), (f2, i, c) = spot, entry
        if f != f2 or i not in (a, b):
            return zero
        other = lambdas[f][b if i == a else a][c]
        if other is None:
            return zero
        return 2.0 * other if a == b else other

    jacobian = jnp.stack([jnp.stack([move(spot, entry) for entry in entries]) for spot in spots])  # (J, k, B)
    # d2 D_ab / dLambda_ic dLambda_lc, (a, b) = (i, l): 1, or 2 on the diagonal.
    second = np.zeros((len(entries), len(entries), len(spots)))
    for x, (f, i, c) in enumerate(entries):
        for y, (f2, i2, c2) in enumerate(entries):
            spot = (f, _ordered(i, i2))
            if f == f2 and c == c2 and spot in spots:
                second[x, y, spots.index(spot)] = 2.0 if i == i2 else 1.0
    back = linalg.transpose(jacobian)
    gradient = linalg.matmul(back, g[:, None])[:, 0]
    return gradient, linalg.matmul(back, linalg.matmul(H, jacobian)) + jnp.tensordot(second.astype(g.dtype), g, 1)


# --- entries -------------------------------------------------------------------------------------------------------


@cache
def _square(q: int) -> tuple[tuple[int, int], ...]:
    return tuple((a, b) for a in range(q) for b in range(q))


def _ordered(a: int, b: int) -> tuple[int, int]:
    return (a, b) if a <= b else (b, a)


def _orders(a: int, b: int) -> tuple[tuple[int, int], ...]:
    return ((a, b),) if a == b else ((a, b), (b, a))


def _plus_one(A: Array) -> Array:
    """``I + A`` of ``(d, d, B)``; a large identity takes longer to make than to add."""
    d = A.shape[0]
    if d <= MOST_DENSE:
        return A + jnp.eye(d, dtype=A.dtype)[..., None]
    at = jnp.arange(d)
    return A.at[at, at].add(1.0, unique_indices=True, indices_are_sorted=True)


def _traces(A: Array) -> Array:
    """``tr(A_j A_l) (J, J, B)`` of ``A (u, u, J, B)``."""
    transposed = linalg.transpose(A)
    if A.shape[0] > MOST_DENSE:  # read along rows; reading along columns takes three times as long
        transposed = jax.lax.optimization_barrier(transposed)
    return (A[:, :, :, None] * transposed[:, :, None]).sum((0, 1))


def _pad_rows(rows: Array, u: int) -> Array:
    return jnp.pad(rows, ((0, u - rows.shape[0]), *((0, 0),) * (rows.ndim - 1)))


def _sum(terms) -> Array:
    return reduce(lambda x, y: x + y, terms)


def _dot(products) -> Array:
    """Sum of products, leaving out the entries that are known to be zero."""
    return _sum(a * b for a, b in products if a is not None and b is not None)
