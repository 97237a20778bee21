"""Value, gradient and Hessian of the criterion in closed form, for many fits at once.

A *lane* is one fit; lanes stand in the last axis of every array. The first factor of the elimination is worked off by
:class:`~mixjax.engine.moments.Moments`: its levels of one and the same ``A_i = Z_i'Z_i`` form a class and share
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

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.covariance import pairs_of
from mixjax.engine import scalar_lanes
from mixjax.engine.crossed import AnyMoments, CrossedMoments
from mixjax.engine.dense_block import (
    LEAST_RATIO,
    Rest,
    blocks_times,
    dense_directions,
    effects_of,
    finish,
    pad_rows,
    traces_of_products,
)
from mixjax.engine.first_factor import (
    First,
    Lambdas,
    Spot,
    directions_of,
    eliminate_first,
    of_levels,
    orders_of,
    sum_of,
    weights_of,
)
from mixjax.engine.moments import Moments
from mixjax.engine.profiled import Profiled
from mixjax.machine import Array, as_laid_out, cond, namespace, set_at, stack
from mixjax.products.sums import Layout


def profile_lanes(x: Array, moments: AnyMoments, reml: Array) -> Profiled:
    """The criterion alone, with what it is made of.

    Args:
        x: ``(k, B)`` coordinates of the covariances in the bases of the products.
        moments: of B lanes, or with a last axis of 1 where lanes share it.
        reml: scalar bool, may be traced.
    """
    lambdas = lambdas_at(x, moments)
    if scalar_lanes.serves(moments):
        return scalar_lanes.profiled(_ratio(lambdas, moments), moments, reml)
    first = eliminate_first(lambdas[moments.layout.chain[0]], moments)
    UU, Uy, yy = moments.contract(weights_of(first))
    return finish((UU[:, :, 0], Uy[:, 0], yy[0]), first, lambdas, moments, reml, with_W=False).lanes


def _ratio(lambdas: Lambdas, moments: AnyMoments) -> Array:
    """The variance ratio ``(B,)`` of one effect."""
    of_lanes: Array = lambdas[moments.layout.chain[0]][0][0] ** 2
    return of_lanes


def profile_and_modes(
    x: Array, moments: AnyMoments, reml: Array | bool, levels: Moments | None = None
) -> tuple[Profiled, dict[int, Array]]:
    """The profiled likelihood, and the predicted effects at its fixed effects: per factor ``(q, m, B)``, in the bases
    of the products. Beside moments by class, ``levels`` are the same of every level.

    Those of the dense factors solve the mixed-model equations; a level of the first factor has ``K_i Z_i'(y - U u - X
    beta)`` (Bates et al. 2015, J. Stat. Softw. 67(1), section 3.1).
    """
    lambdas = lambdas_at(x, moments)
    f1 = moments.layout.chain[0]
    first = eliminate_first(lambdas[f1], moments)
    UU, Uy, yy = moments.contract(weights_of(first))
    rest = finish((UU[:, :, 0], Uy[:, 0], yy[0]), first, lambdas, moments, reml, with_W=False)
    if levels is not None:
        first = eliminate_first(lambdas[f1], levels)
    left, q = (levels or moments).rows_times(rest.c), len(lambdas[f1])
    modes = {f1: stack([sum_of(first.K[a, b] * left[b] for b in range(q)) for a in range(q)])}
    start = 0
    for f, q, m in moments.dense:
        modes[f] = -rest.c[start : start + q * m].reshape(q, m, -1)
        start += q * m
    return rest.lanes, modes


def value_gradient_hessian(x: Array, moments: AnyMoments, reml: Array) -> tuple[Array, Array, Array]:
    """``f (B,)``, ``g (k, B)``, ``H (k, k, B)`` of the criterion with respect to ``x (k, B)``.

    Args as in :func:`profile_lanes`. Not for differentiation: derivatives of estimates come from the implicit function
    theorem, which differentiates the criterion itself.
    """
    lambdas = lambdas_at(x, moments)
    found: Any
    if scalar_lanes.serves(moments):
        found = scalar_lanes.by_ratio(_ratio(lambdas, moments), moments, reml)
        spots: list[Spot] = [(moments.layout.chain[0], (0, 0))]
    else:
        found = _by_covariance(lambdas, moments, reml)
        spots = found.spots
    jacobian, curvature = chain_to_coordinates(x, found.gradient, spots, moments.layout)
    back = linalg.transpose(jacobian)
    gradient = linalg.matmul(back, found.gradient[:, None])[:, 0]
    return found.lanes.criterion, gradient, linalg.matmul(back, linalg.matmul(found.Hessian, jacobian)) + curvature


class Slopes(NamedTuple):
    """How the fixed effects' covariance and the residual sum of squares move with the coordinates; last axis: lanes.

    Attributes:
        lanes: the profiled likelihood. Hessian: ``(k, k, B)`` of the criterion.
        XX_inverse: ``(k, p, p, B)``, derivatives of ``lanes.XX_inverse``. log_rss: ``(k, B)``.
    """

    lanes: Profiled
    Hessian: Array
    XX_inverse: Array
    log_rss: Array


def slopes_of(x: Array, moments: AnyMoments, reml: Array | bool) -> Slopes:
    """Args as in :func:`profile_lanes`.

    With C the inverse of the reduced products of X's basis, ``dC/dE_j = C T_X'J_j T_X C`` in the first factor's
    directions, and ``C P_X'E_j P_X C`` in those of the others (:class:`~mixjax.engine.dense_block.Rest`).
    """
    xp = namespace(x, moments.UU)
    lambdas = lambdas_at(x, moments)
    found = _by_covariance(lambdas, moments, reml)
    lanes, rest = found.lanes, found.rest
    p = lanes.delta.shape[0]
    falls = [linalg.matmul(linalg.matmul(linalg.transpose(rest.T_X)[:, :, None], found.J.UU), rest.T_X[:, :, None])]
    at = effects_of(moments)
    for f, pair in found.spots[len(found.J.own) :]:
        part = sum_of(
            linalg.matmul(linalg.transpose(rest.P2[at[f, a], :p]), rest.P2[at[f, b], :p]) for a, b in orders_of(*pair)
        )
        falls.append(part[:, :, None])
    C = lanes.XX_inverse[:, :, None]
    moves = linalg.matmul(linalg.matmul(C, xp.concatenate(falls, axis=2)), C)  # (p, p, J, B)
    jacobian, curvature = chain_to_coordinates(x, found.gradient, found.spots, moments.layout)
    back = linalg.transpose(jacobian)
    H = linalg.matmul(back, linalg.matmul(found.Hessian, jacobian)) + curvature
    of_C = (moves[None] * back[:, None, None]).sum(3)
    return Slopes(lanes, H, of_C, -linalg.matmul(back, found.falls[:, None])[:, 0] / lanes.rss)


def minque_equations(moments: Moments) -> tuple[Array, Array, list[Spot]]:
    """``tr(P V_j P V_l) (J, J, L)`` and ``tr(P V_j) (J, L)`` at ``V = sigma^2 W^{-1}``, and what every j stands for.

    ``V_j = Z E_j Z'`` for the J free entries (factor, (a, b)) of the covariances, P the projection that takes the fixed
    effects out. They do not depend on y.
    """
    xp = namespace(moments.UU)
    moments = moments.without_response()
    nothing = xp.zeros((moments.layout.k, moments.UU.shape[-1]), moments.UU.dtype)
    found = _by_covariance(lambdas_at(nothing, moments), moments, True, lambda _: 0.0)
    return -found.Hessian, found.gradient, found.spots


class AtSigma(NamedTuple):
    """The ML deviance with sigma given, and its derivatives by the J entries of D and by ``log sigma^2``.

    Attributes:
        value: ``(B,)``. gradient: ``(J + 1, B)``. Hessian: ``(J + 1, J + 1, B)``.
    """

    value: Array
    gradient: Array
    Hessian: Array


def deviance_at_sigma(factors: list[Array], moments: AnyMoments, variance: Callable[[Array], Array]) -> AtSigma:
    """The ML deviance as a function of relative covariances and sigma; fixed effects profiled out.

    Args:
        factors: per term ``(q, q, B)``, any factor of its relative covariance D in the bases of the products.
        moments: of B lanes, or with a last axis of 1.
        variance: ``sigma^2 (B,)``, given what it is where it is profiled out, ``(B,)``.

    Returns:
        :class:`AtSigma`; the entries of D stand term by term, pairs a <= b row by row.
    """
    xp = namespace(moments.UU, *factors)
    lambdas = _lambdas_of_factors([[list(row) for row in F] for F in factors], moments)
    found = _by_covariance(lambdas, moments, False, lambda at: 1.0 / variance(at.rss / moments.n))
    lanes = found.lanes
    sigma2 = variance(lanes.rss / moments.n)
    g, H, falls = found.gradient, found.Hessian, found.falls
    at = {spot: j for j, spot in enumerate(found.spots)}
    order = np.array([at[t.factor, (t.start + a, t.start + b)] for t in moments.layout.terms for a, b in pairs_of(t.q)])
    g, H, falls = g[order], H[order[:, None], order], falls[order]
    ratio = lanes.rss / sigma2
    value = lanes.criterion + moments.n * (xp.log(sigma2 * moments.n / lanes.rss) - 1.0) + ratio
    mixed = falls / sigma2
    upper, lower = xp.concatenate([H, mixed[:, None]], 1), xp.concatenate([mixed, ratio[None]])
    return AtSigma(value, xp.concatenate([g, (moments.n - ratio)[None]]), xp.concatenate([upper, lower[None]]))


class Directions(NamedTuple):
    """J of the first factor's directions ``own``, those along the axis before the last: ``UU (u, u, J, B)``,
    ``Uy (u, J, B)``, ``yy (J, B)``."""

    own: list[tuple[int, int]]
    UU: Array
    Uy: Array
    yy: Array


class _ByCovariance(NamedTuple):
    """Derivatives with respect to the J free entries of the covariances D of all factors.

    Attributes:
        lanes, rest: the profiled likelihood, and what it is made of.
        gradient: ``(J, B)``. Hessian: ``(J, J, B)``. falls: ``(J, B)``, the residual sum of squares' own gradient, sign
            changed. spots: what each entry is. J: of the first factor's directions.
    """

    lanes: Profiled
    rest: Rest
    gradient: Array
    Hessian: Array
    falls: Array
    spots: list[Spot]
    J: Directions


def _by_covariance(
    lambdas: Lambdas,
    moments: AnyMoments,
    reml: Array | bool,
    precision: Callable[[Profiled], Array | float] | None = None,
) -> _ByCovariance:
    """Args: precision: ``1 / sigma^2``, given what it is where sigma is profiled out; None for that. 0 leaves the
    residual sum of squares out."""
    layout = moments.layout
    f1 = layout.chain[0]
    own = directions_of(layout, f1)
    first = eliminate_first(lambdas[f1], moments)
    xp = namespace(first.logdet, reml)
    # J of every direction along axis 2, behind what the elimination itself takes away.
    UU, Uy, yy = moments.contract(weights_of(first, own))
    rest = finish((UU[:, :, 0], Uy[:, 0], yy[0]), first, lambdas, moments, reml)
    J = Directions(own, UU[:, :, 1:], Uy[:, 1:], yy[1:])
    df = moments.n - xp.where(reml, moments.UU.shape[0] - rest.W.shape[0], 0)
    s = df / rest.lanes.rss if precision is None else precision(rest.lanes) + xp.zeros_like(rest.lanes.rss)
    curve = s / rest.lanes.rss if precision is None else xp.zeros_like(s)
    spots = [(f1, pair) for pair in own] + [(f, pair) for f, *_ in moments.dense for pair in directions_of(layout, f)]
    rest_of = (first, rest, J, s, curve, reml)
    if isinstance(moments, CrossedMoments) and all(q == 1 for _, q, _ in moments.dense):
        crossed = moments
        ratios = xp.stack([lambdas[f][0][0] for f, *_ in crossed.dense])
        g, H, falls = cond(
            (xp.abs(ratios) > LEAST_RATIO).all(),
            lambda: _scalar_derivatives(lambdas, crossed, *rest_of),
            lambda: derivatives_of(lambdas, crossed, *rest_of),
        )
    else:
        g, H, falls = derivatives_of(lambdas, moments, *rest_of)
    return _ByCovariance(rest.lanes, rest, g, H, falls, spots, J)


def derivatives_of(
    lambdas: Lambdas,
    moments: AnyMoments,
    first: First,
    rest: Rest,
    J: Directions,
    s: Array,
    curve: Array,
    reml: Array | bool,
    by_level: Callable[[Array, Array, Array], tuple[Array, Array]] | None = None,
) -> tuple[Array, Array, Array]:
    """Gradient ``(J, B)``, Hessian ``(J, J, B)``, fall of the residual sum of squares ``(J, B)``: the first factor's
    directions, then those of the dense ones.

    Args:
        by_level: what Psi gives along all of J, where these are more than the first factor's own directions; see
            :func:`~mixjax.engine.first_factor.of_levels`.
    """
    xp = namespace(rest.W)
    lanes, c, T_X = rest.lanes, rest.c, rest.T_X
    u, p, d = c.shape[0], lanes.delta.shape[0], rest.W.shape[0]
    K2 = rest.W
    if d:
        half = blocks_times(lambdas, moments, rest.W)
        K2 = blocks_times(lambdas, moments, linalg.transpose(half))
    # C, the inverse of the mixed-model equations of U: for the determinant, where the fixed effects may be left out.
    C_log = pad_rows(linalg.transpose(pad_rows(K2, u)), u)
    half = linalg.matmul(T_X, lanes.XX_inverse) if p else T_X
    if p:
        C_log = C_log + xp.where(reml, linalg.matmul(half, linalg.transpose(T_X)), 0.0)
    Jc = linalg.matmul(J.UU, c[:, None, None])[:, 0] + J.Uy
    cJc = (c[:, None] * (Jc + J.Uy)).sum(0) + J.yy
    # In two parts: a product whose sides are the padded sizes of the blocks is twice as fast.
    parts = [linalg.matmul(K2[:, :, None], part) for part in (J.UU[:d, :d], J.UU[:d, d:])] if d else [J.UU[:d]]
    KJ = xp.concatenate(parts, axis=1)
    CJ, TJ = pad_rows(KJ, u), None
    if p:
        TJ = linalg.matmul(linalg.transpose(T_X)[:, :, None], J.UU)
        CJ = CJ + xp.where(reml, linalg.matmul(half[:, :, None], TJ), 0.0)
    CJc = pad_rows(linalg.matmul(K2, Jc[:d]), u)  # C for rss always has the fixed effects
    if p:
        CJc = CJc + linalg.matmul(half, linalg.matmul(linalg.transpose(T_X), Jc))

    # Psi = C + s c c' over (U, y), pulled back to the classes.
    Psi = C_log + s * c[:, None] * c[None], s * c, s
    if by_level is None:
        g, moved = of_levels(moments.pull_back(*Psi), first, moments, J.own)
    else:
        g, moved = by_level(*Psi)
    H = (
        moved
        - traces_of_products(CJ)
        - 2.0 * s * (Jc[:, :, None] * CJc[:, None]).sum(0)
        - curve * cJc[:, None] * cJc[None]
    )
    if not d:
        return g, H, cJc
    dense = dense_directions(lambdas, moments, rest, K2, s, curve, reml, (J.UU, Jc, cJc, KJ, TJ))
    return _join(g, H, cJc, *dense)


def _join(
    g: Array, H: Array, falls: Array, g2: Array, among: Array, mixed: Array, falls2: Array
) -> tuple[Array, Array, Array]:
    xp = namespace(g)
    upper, lower = xp.concatenate([H, mixed], 1), xp.concatenate([linalg.transpose(mixed), among], 1)
    return xp.concatenate([g, g2]), xp.concatenate([upper, lower]), xp.concatenate([falls, falls2])


def _scalar_derivatives(
    lambdas: Lambdas,
    moments: CrossedMoments,
    first: First,
    rest: Rest,
    J: Directions,
    s: Array,
    curve: Array,
    reml: Array | bool,
) -> tuple[Array, Array, Array]:
    """As :func:`_derivatives`, for one lane whose dense factors have one effect a level and clear variances.

    With ``l`` the standard deviation ratio of every dense effect, ``K2 = l W l``, ``F = l^{-1} W l`` and ``Omega =
    l^{-1} (I - W) l^{-1}``: all traces follow from W and ``V = W l J l`` by sums of squares and products that are thin.
    """
    lanes, W, p, d = rest.lanes, rest.W[..., 0], rest.lanes.delta.shape[0], rest.W.shape[0]
    xp, sizes = namespace(W, s, lambdas[moments.layout.chain[0]][0][0]), [m for *_, m in moments.dense]
    l = xp.concatenate([xp.broadcast_to(lambdas[f][0][0], (m,)) for f, _, m in moments.dense])  # noqa: E741
    c, T, A, s, curve = rest.c[:, 0], rest.T_X[..., 0], lanes.XX_inverse[..., 0], s[0], curve[0]
    J_UU, J_Uy, J_yy = J.UU[..., 0], J.Uy[..., 0], J.yy[:, 0]
    with_X = xp.where(reml, 1.0, 0.0)

    def K_times(V: Array) -> Array:
        return _rows(l, _product(W, _rows(l, V)))

    def by_factor(x: Array) -> Array:
        return xp.stack([part.sum(0) for part in xp.split(x, np.cumsum(sizes)[:-1])])

    Jc = xp.einsum("uvj,v->uj", J_UU, c) + J_Uy
    cJc = c @ (Jc + J_Uy) + J_yy
    JT = xp.einsum("uvj,vp->upj", J_UU, T)
    TJT, TJc = xp.einsum("up,uqj->pqj", T, JT), T.T @ Jc
    KJT = K_times(JT[:d])
    V = _rough_product(W, l[:, None, None] * J_UU[:d, :d] * l[None, :, None])  # (d, d, J)
    ATJT = xp.einsum("pq,qrj->prj", A, TJT)
    Vs = [V[:, :, j] for j in range(V.shape[2])]
    transposed = [as_laid_out(v.T).reshape(-1) for v in Vs]  # read along rows
    CJCJ = xp.stack([xp.stack([xp.einsum("i,i->", v.reshape(-1), t) for t in transposed]) for v in Vs])
    CJCJ = CJCJ + with_X * (2.0 * xp.einsum("pq,dqj,dpl->jl", A, JT[:d], KJT) + xp.einsum("pqj,qpl->jl", ATJT, ATJT))
    JcCJc = Jc[:d].T @ K_times(Jc[:d]) + TJc.T @ A @ TJc

    T_d, c_d, TA = T[:d], c[:d], T[:d] @ A
    Psi = l[:, None] * W * l + linalg.product(
        xp.concatenate([with_X * TA, s * c_d[:, None]], 1), xp.column_stack([T_d, c_d]).T
    )
    side = xp.column_stack([with_X * TA + s * xp.outer(c_d, c[d:]), s * c_d])
    last = xp.append(c[d:], 1.0)
    corner = s * xp.outer(last, last) + with_X * xp.pad(A, ((0, 1), (0, 1)))
    g, moved = of_levels(moments.pull_back_parts(Psi, side, corner), first, moments, J.own)
    H = moved[..., 0] - CJCJ - 2.0 * s * JcCJc - curve * xp.outer(cJc, cJc)

    # The dense factors' own directions.
    P, e = rest.P2[:, :p, 0], rest.P2[:, p, 0]
    e = e - P @ lanes.delta[:, 0]
    half = P @ A
    f_of = np.repeat(np.arange(len(sizes)), sizes)
    mask = xp.asarray(f_of[:, None] == np.arange(len(sizes)), W.dtype)  # (d, f)

    def Omega_times(X: Array) -> Array:
        X = _rows(1.0 / l, X)
        return _rows(1.0 / l, X - _product(W, X))

    eEe = by_factor(e * e)
    squares = by_factor(xp.diagonal(W))
    trace = by_factor((1.0 - xp.diagonal(W)) / l**2) - with_X * by_factor((half * P).sum(1))
    Ee = mask * e[:, None]
    Omega_Ee = Omega_times(Ee) - half @ (P.T @ Ee)
    # Sums of squares of I - W by blocks: those of W, and its diagonal.
    ratio = xp.stack([lambdas[f][0][0][0] for f, *_ in moments.dense])
    within = by_factor(by_factor(W * W).T).T + xp.diag(xp.asarray(sizes, W.dtype) - 2.0 * squares)
    within = within / ratio[:, None] ** 2 / ratio**2
    P_of = mask[:, None] * P[:, :, None]  # (d, p, f)
    crossing = by_factor(xp.einsum("dp,dpf->df", half, Omega_times(P_of)))
    PP = xp.einsum("dp,dqf->pqf", P, P_of)
    APP = xp.einsum("pq,qrf->prf", A, PP)
    low = xp.einsum("pqf,qpg->fg", APP, APP)
    products = within - with_X * (2.0 * crossing - low)
    among = 2.0 * s * Ee.T @ Omega_Ee - curve * xp.outer(eEe, eEe) - products
    FJT = _rows(1.0 / l**2, KJT)
    FJF = xp.einsum("dej,de->dj", V, W) / l[:, None] ** 2
    spread = xp.einsum("dpj,dp->dj", FJT, half), xp.einsum("dp,pqj,dq->dj", half, TJT, half)
    mixed = by_factor(FJF - with_X * (2.0 * spread[0] - spread[1])).T  # (j, f)
    LJc = _rows(1.0 / l**2, K_times(Jc[:d])) - half @ TJc
    between = 2.0 * s * LJc.T @ Ee - curve * xp.outer(cJc, eEe) - mixed
    g, H, falls = _join(g[:, 0], H, cJc, trace - s * eEe, among, between, eEe)
    return g[:, None], H[..., None], falls[:, None]


def _product(A: Array, B: Array) -> Array:
    """``(i, j)`` times ``(j, ...)``."""
    return linalg.product(A, B.reshape(len(B), -1)).reshape(len(A), *B.shape[1:])


# From so many dense effects on, the large product that only the Hessian needs is formed in single precision.
ROUGH = 512


def _rough_product(A: Array, B: Array) -> Array:
    """The product of matrices to six digits or more: a Newton step needs no more of its Hessian."""
    if A.shape[0] < ROUGH:
        return _product(A, B)
    rough = A.astype(np.float32), B.astype(np.float32)
    if namespace(A, B) is np:
        return _product(*rough).astype(A.dtype)
    return jnp.tensordot(*rough, 1, precision="highest").astype(A.dtype)


def _rows(scale: Array, B: Array) -> Array:
    """Rows of ``B (d, ...)`` times ``scale (d,)``."""
    return scale.reshape(-1, *(1,) * (B.ndim - 1)) * B


def lambdas_at(x: Array, moments: AnyMoments) -> Lambdas:
    parts = cov.cut(x, moments.layout.structures)
    return _lambdas_of_factors([s.entries(p) for s, p in zip(moments.layout.structures, parts, strict=True)], moments)


def _lambdas_of_factors(entries: list[Any], moments: AnyMoments) -> Lambdas:
    """Per factor, entries ``Lambda[a][b] (B,)`` of the block-diagonal Lambda of its terms; None stands for zero."""
    lambdas: Lambdas = {}
    for f, q in enumerate(moments.layout.widths):
        lambdas[f] = [[None] * q for _ in range(q)]
    for place, of_term in zip(moments.layout.terms, entries, strict=True):
        own = slice(place.start, place.start + place.q)
        for row, values in zip(lambdas[place.factor][own], of_term, strict=True):
            row[own] = values
    if moments.layout.is_led_by_none:
        lambdas[moments.layout.chain[0]] = [[0.0 * entries[0][0][0]]]
    return lambdas


# --- from covariances to coordinates --------------------------------------------------------------------------------


def chain_to_coordinates(x: Array, g: Array, spots: list[Spot], layout: Layout) -> tuple[Array, Array]:
    """From the entries of the covariances D to the coordinates x: ``dD / dx (J, k, B)``, and what the curvature of D
    adds to the Hessian of a function of gradient g, ``(k, k, B)``."""
    xp = namespace(x, g)
    k, lanes = layout.k, g.shape[1:]
    at = {spot: j for j, spot in enumerate(spots)}
    parts = zip(layout.terms, cov.cut(x, layout.structures), strict=True)
    if len(layout.terms) == 1:
        ((place, part),) = parts
        own = [at[place.factor, (place.start + a, place.start + b)] for a, b in pairs_of(place.q)]
        if own == list(range(len(spots))):
            return place.structure.jacobian(part), place.structure.curvature(part, g)
    jacobian = xp.zeros((len(spots), k, *lanes), g.dtype)
    curvature = xp.zeros((k, k, *lanes), g.dtype)
    start = 0
    for place, part in zip(layout.terms, cov.cut(x, layout.structures), strict=True):
        s = place.structure
        rows = np.array([at[place.factor, (place.start + a, place.start + b)] for a, b in pairs_of(place.q)])
        columns = np.arange(start, start + s.k)
        jacobian = set_at(jacobian, (rows[:, None], columns), s.jacobian(part))
        curvature = set_at(curvature, (columns[:, None], columns), s.curvature(part, g[rows]))
        start += s.k
    return jacobian, curvature
