"""Kenward & Roger (1997, Biometrics 53, 983-997): adjusted covariance of the fixed effects, and degrees of freedom.

``V = sigma^2 H``, ``H = W^{-1} + Z D Z'``, is linear in sigma^2 and the entries of the covariances, along matrices G_i.
All that is needed are ``P_i = -X'V^{-1} G_i V^{-1} X``, ``Q_ij = X'V^{-1} G_i V^{-1} G_j V^{-1} X`` and
``tr(V^{-1} G_i V^{-1} G_j)``, and these follow from ``N = Z'H^{-1}Z`` and ``T = Z'H^{-1}X``, so from the
cross-products: level by level with one grouping factor, else for all random effects at once. Nothing changes when the
G_i are replaced by others of the same span: H itself stands for the one of sigma^2.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.design import AnyArray
from mixjax.likelihood.criterion import in_bases
from mixjax.likelihood.statistics import CrossProducts

# Random effects of all levels together, where they do not fall apart by level: one matrix of that size is inverted.
MOST_EFFECTS = 4000


class Adjusted(NamedTuple):
    """What inference needs of one REML fit.

    Attributes:
        vcov: ``(p, p)`` covariance of beta, theta taken as known. adjusted: ``(p, p)`` for the uncertainty of theta.
        P: ``(J, p, p)`` derivatives ``vcov P_j vcov`` of vcov along the covariance parameters, up to sign.
        W: ``(J, J)`` asymptotic covariance of those, from the expected information.
    """

    vcov: Array
    adjusted: Array
    P: Array
    W: Array


def refusal(stats: CrossProducts) -> str | None:
    """Why there are no Kenward-Roger degrees of freedom for a model; None where there are."""
    if any(structure.directions() is None for structure in stats.layout.structures):
        return "a random term's covariance is not linear in its parameters"
    if np.ndim(stats.sum_log_weights) == 0 and bool(stats.sum_log_weights != 0):
        return "the fit has weights"
    effects = sum(f.ZZ.shape[-3] * f.ZZ.shape[-1] for f in stats.factors)
    if len(stats.factors) > 1 and effects > MOST_EFFECTS:
        return (
            f"{effects} random effects of several grouping factors are too many (a matrix of that size is inverted; "
            f"the limit is {MOST_EFFECTS})"
        )
    return None


def adjust(theta: AnyArray, sigma: AnyArray, stats: CrossProducts) -> Adjusted:
    """Adjusted covariance at REML estimates ``theta (k,)``, ``sigma ()``.

    Kenward & Roger (1997), section 2, with the R_ij zero since V is linear in its parameters.
    """
    lambdas = in_bases(cov.lambdas_of_theta(jnp.asarray(theta, stats.XX.dtype), stats.layout.qs), stats)
    A, B, places = _blocks(stats)
    N, T, DT = _eliminated(A, B, _block_diagonal(lambdas, stats, places, A.shape[1]))
    M = stats.XX - jnp.einsum("gsp,gsq->pq", B, DT)
    C = linalg.inverse_small(M)

    # Everything relative to sigma^2. E T of every direction, then H itself as the last direction.
    directions = _directions(stats)
    ET = [_apply(E, f, start, T, places) for E, f, start in directions]
    NET = [N @ x for x in ET]
    TET = [jnp.einsum("gsp,gsq->pq", T, x) for x in ET]
    TETET = [[jnp.einsum("gsp,gsq->pq", x, y) for y in NET] for x in ET]
    traces = [[_trace(d, e, N, places) for e in directions] for d in directions]
    single = [_single_trace(d, N, places) for d in directions]
    J = len(directions)
    P = jnp.stack([*TET, M])
    Q = jnp.stack([*(jnp.stack([*row, P[j]]) for j, row in enumerate(TETET)), jnp.concatenate([P[:J], M[None]])])
    K = jnp.block(
        [[jnp.array(traces), jnp.array(single)[:, None]], [jnp.array(single)[None], jnp.reshape(stats.n, (1, 1))]]
    )
    CP = C @ P
    information = K - 2.0 * jnp.einsum("pq,ijqp->ij", C, Q) + jnp.einsum("ipq,jqp->ij", CP, CP)
    information = 0.5 * (information + information.T)
    W = 2.0 * linalg.inverse_small(information)
    U = jnp.einsum("ij,ijpq->pq", W, Q) - jnp.einsum("ij,ipq,jqr->pr", W, P, CP)
    R_inv = jnp.asarray(stats.X_basis.R_inv)

    def own(X):
        return R_inv @ X @ R_inv.T

    vcov = sigma**2 * own(C)
    adjusted = vcov + 2.0 * sigma**2 * own(C @ (0.5 * (U + U.T)) @ C)
    return Adjusted(vcov, adjusted, sigma**2 * own(CP @ C), W)


def f_scaling(L: Array, fit: Adjusted) -> tuple[Array, Array]:
    """Denominator degrees of freedom of the joint test of the rows of ``L (r, p)``, of full row rank, and the factor of
    the F statistic; Kenward & Roger (1997), section 3, with the limits taken where a denominator vanishes.
    """
    r = L.shape[0]
    inverse = linalg.inverse_small(L @ fit.vcov @ L.T)
    Theta = L.T @ inverse @ L
    TP = Theta @ fit.P
    first = jnp.einsum("jpp->j", TP)
    A1 = first @ fit.W @ first
    A2 = jnp.einsum("ij,ipq,jqp->", fit.W, TP, TP)
    B = (A1 + 6.0 * A2) / (2.0 * r)
    g = ((r + 1) * A1 - (r + 4) * A2) / ((r + 2) * A2)
    below = 3 * r + 2 * (1 - g)
    c1, c2, c3 = g / below, (r - g) / below, (r + 2 - g) / below
    V0, V1, V2 = 1.0 + c1 * B, 1.0 - c2 * B, 1.0 - c3 * B
    V0 = jnp.where(jnp.abs(V0) < 1e-10, 0.0, V0)
    over = jnp.where(jnp.abs(V1) < 1e-14, 1.0, (1.0 - A2 / r) / V1)
    rho = over**2 * V0 / (r * V2)
    df = 4.0 + (r + 2) / (r * rho - 1.0)
    return df, jnp.where(jnp.abs(df - 2.0) < 1e-2, 1.0, df * (1.0 - A2 / r) / (df - 2.0))


# --- cross-products as blocks --------------------------------------------------------------------------------------


def _blocks(stats: CrossProducts) -> tuple[Array, Array, dict[int, tuple[int, int, int]]]:
    """``Z'Z (g, s, s)`` and ``Z'Q (g, s, p)``, a block per level or one of all effects, and per factor where in a block
    its effects stand: start, number of effects, levels."""
    if len(stats.factors) == 1:
        products = stats.factors[0]
        A = jnp.moveaxis(jnp.asarray(products.ZZ), -1, 0)
        return A, jnp.moveaxis(jnp.asarray(products.ZX), -1, 0), {0: (0, A.shape[1], 1)}
    places, size = {}, 0
    for f, products in enumerate(stats.factors):
        q, _, m = products.ZZ.shape
        places[f] = (size, q, m)
        size += q * m
    A = jnp.zeros((size, size), stats.XX.dtype)
    B = []
    for f, (start, q, m) in places.items():
        at = start + jnp.arange(q)[:, None] * m + jnp.arange(m)[None]
        A = A.at[at[:, None], at[None]].set(jnp.asarray(stats.factors[f].ZZ))
        B.append(jnp.moveaxis(jnp.asarray(stats.factors[f].ZX), 1, -1).reshape(q * m, -1))
    for (s, t), pair in zip(stats.layout.pairs, stats.pairs, strict=True):
        (start_s, q_s, m_s), (start_t, q_t, m_t) = places[s], places[t]
        at_s = start_s + jnp.arange(q_s)[:, None] * m_s + jnp.asarray(pair.rows)[None]
        at_t = start_t + jnp.arange(q_t)[:, None] * m_t + jnp.asarray(pair.cols)[None]
        ZZ = jnp.asarray(pair.ZZ)
        A = A.at[at_s[:, None], at_t[None]].add(ZZ, mode="drop")
        A = A.at[at_t[:, None], at_s[None]].add(jnp.swapaxes(ZZ, 0, 1), mode="drop")
    return A[None], jnp.concatenate(B)[None], places


def _eliminated(A: Array, B: Array, Lambda: Array) -> tuple[Array, Array, Array]:
    """``N = (I + A D)^{-1} A``, ``T = (I + A D)^{-1} B`` and ``D T``, a block each; ``Lambda (s, s)`` is common."""
    K = jnp.moveaxis(linalg.gain(Lambda, jnp.moveaxis(A, 0, -1))[0], -1, 0)
    AK = A @ K
    N = A - AK @ A
    return 0.5 * (N + jnp.swapaxes(N, 1, 2)), B - AK @ B, K @ B


def _block_diagonal(lambdas: list[Array], stats: CrossProducts, places: dict, size: int) -> Array:
    total = jnp.zeros((size, size), stats.XX.dtype)
    for Lambda, place in zip(lambdas, stats.layout.terms, strict=True):
        start, _, m = places[place.factor]
        at = start + (place.start + jnp.arange(place.q))[:, None] * m + jnp.arange(m)[None]
        total = total.at[at[:, None], at[None]].set(Lambda[:, :, None])
    return total


def _directions(stats: CrossProducts) -> list[tuple[np.ndarray, int, int]]:
    """Symmetric matrices that span the covariances: ``(q, q)`` of a term, its factor, its first effect there."""
    found = []
    for place in stats.layout.terms:
        units = place.structure.directions()
        found += [] if units is None else [(E, place.factor, place.start) for E in units]
    return found


def _apply(E: np.ndarray, f: int, first: int, T: Array, places: dict) -> Array:
    """``E T`` for one direction: ``(g, s, p)``."""
    start, _, m = places[f]
    own = slice(start + first * m, start + (first + len(E)) * m)
    part = T[:, own].reshape(T.shape[0], len(E), m, -1)
    return jnp.zeros_like(T).at[:, own].set(jnp.einsum("ab,gbmp->gamp", E, part).reshape(T.shape[0], -1, T.shape[2]))


def _between(N: Array, d: tuple, e: tuple, places: dict) -> Array:
    """N among the effects of two directions: ``(g, q, m, q', m')``."""
    (E, f, first), (E2, f2, first2) = d, e
    (start, _, m), (start2, _, m2) = places[f], places[f2]
    rows = slice(start + first * m, start + (first + len(E)) * m)
    columns = slice(start2 + first2 * m2, start2 + (first2 + len(E2)) * m2)
    return N[:, rows, columns].reshape(N.shape[0], len(E), m, len(E2), m2)


def _trace(d: tuple, e: tuple, N: Array, places: dict) -> Array:
    """``tr(E N E' N)``."""
    part = _between(N, d, e, places)
    moved = jnp.einsum("ab,cd,gbicj->gaidj", d[0], e[0], part)
    return (moved * part).sum()


def _single_trace(d: tuple, N: Array, places: dict) -> Array:
    """``tr(E N)``."""
    part = _between(N, d, d, places)
    return jnp.einsum("ab,gbiai->", d[0], part)
