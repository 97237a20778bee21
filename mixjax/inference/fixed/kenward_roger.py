"""Kenward & Roger (1997, Biometrics 53, 983-997): adjusted covariance of the fixed effects, and degrees of freedom.

``V = sigma^2 H``, ``H = W^{-1} + Z D Z'``, is linear in sigma^2 and the entries of the covariances, along matrices G_i.
All that is needed are ``P_i = -X'V^{-1} G_i V^{-1} X``, ``Q_ij = X'V^{-1} G_i V^{-1} G_j V^{-1} X`` and
``tr(V^{-1} G_i V^{-1} G_j)``, and these follow from ``N = Z'H^{-1}Z`` and ``T = Z'H^{-1}X``, so from the
cross-products: level by level with one grouping factor, else for all random effects at once. Nothing changes when the
G_i are replaced by others of the same span: H itself stands for the one of sigma^2.

A structure whose covariances are not linear in their parameters has the derivatives by variances and correlations at
the estimates in place of the G_i, and second ones, ``R_ij = X'V^{-1} (d2V / dt_i dt_j) V^{-1} X``, which SAS has too.
They depend on what the parameters are; without them, in the *linear* form, nothing does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mixjax import linalg
from mixjax.covariance import NaturalParameter, by_natural
from mixjax.design import AnyArray
from mixjax.engine.engine import Engine
from mixjax.engine.whole import Place
from mixjax.machine import Array, namespace
from mixjax.products.sums import CrossProducts

# Random effects of all levels together, where they do not fall apart by level: one matrix of that size is inverted.
MOST_EFFECTS = 4000


class Adjusted(NamedTuple):
    """The adjusted covariance of one REML fit, and what its degrees of freedom follow from.

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
    if np.ndim(stats.sum_log_weights) == 0 and bool(stats.sum_log_weights != 0):
        return "the fit has weights"
    effects = sum(f.ZZ.shape[-3] * f.ZZ.shape[-1] for f in stats.factors)
    if len(stats.factors) > 1 and effects > MOST_EFFECTS:
        return (
            f"{effects} random effects of several grouping factors are too many (a matrix of that size is inverted; "
            f"the limit is {MOST_EFFECTS})"
        )
    return None


def is_linear(stats: CrossProducts) -> bool:
    """All covariances of random effects are linear in their parameters."""
    return all(structure.directions() is not None for structure in stats.layout.structures)


class _Bends(NamedTuple):
    """Second derivatives of a term's covariance by its parameters.

    Attributes:
        first: the place of its first parameter among all. scale: ``(k,)`` of which D is the sum of ``scale_j dD/dt_j``.
        second: ``(k, k, q, q)``.
    """

    first: int
    scale: np.ndarray
    second: np.ndarray


def _at_estimates(
    engine: Engine, theta: AnyArray, places: list[Place], linear: bool
) -> tuple[list[Place], list[_Bends]]:
    """Places with derivatives as units where a structure is not linear; NaN where a parameter is at its bound."""
    x, free = (np.asarray(part) for part in engine.coordinates(theta))
    found, bends, at, first = [], [], 0, 0
    for structure, place in zip(engine.stats.layout.structures, places, strict=True):
        own, at = slice(at, at + structure.k), at + structure.k
        if structure.directions() is None:
            units = np.full((structure.k, structure.q, structure.q), np.nan)
            if free[own].all():
                by_entry, second, _ = by_natural(structure, x[own, None], linear)
                units = linalg.symmetric_of(by_entry[0].T, structure.q)
                if second is not None:
                    F = structure.factor(x[own])
                    variances = [_share(p, F, value) for p, value in zip(structure.natural, x[own], strict=True)]
                    k = structure.k
                    full = linalg.symmetric_of(np.moveaxis(second[0], 0, -1).reshape(k * k, -1), structure.q)
                    bends.append(_Bends(first, np.array(variances), full.reshape(k, k, structure.q, structure.q)))
            place = place._replace(units=units)
        found.append(place)
        first += len(place.units)
    return found, bends


def _share(parameter: NaturalParameter, F: np.ndarray, x: float) -> float:
    """What a covariance is the sum of derivatives times, each by one parameter of it."""
    if parameter.kind == "sd":
        return float((F[parameter.i] ** 2).sum())
    return {"loading": 0.5 * x, "specific": x * x}.get(parameter.kind, 0.0)


def adjust(engine: Engine, theta: AnyArray, sigma: AnyArray, linear: bool = False) -> Adjusted:
    """Adjusted covariance at REML estimates ``theta (k,)``, ``sigma ()``.

    Kenward & Roger (1997), section 2. Covariances that are not linear in their parameters are NumPy's.

    Args:
        linear: without second derivatives.
    """
    stats = engine.stats
    xp = namespace(theta, sigma, stats.XX, stats.yy)
    N, T, M, places = engine.whole(theta)
    C = linalg.inverse_small(M)
    bends: list[_Bends] = []
    if not is_linear(stats):
        places, bends = _at_estimates(engine, theta, places, linear)

    # Everything relative to sigma^2, direction after direction, H itself as the last.
    directions = [place.units for place in places]
    J, p = sum(map(len, directions)), T.shape[2]
    parts = [T[:, place.own].reshape(len(T), place.q, place.m, p) for place in places]
    ET = [xp.einsum("jab,gbmp->gamjp", E, part) for E, part in zip(directions, parts, strict=True)]
    ET = [x.reshape(len(T), -1, x.shape[3] * p) for x in ET]  # (g, q m, j p)
    TET = [_inner(T[:, place.own], x).reshape(p, -1, p) for x, place in zip(ET, places, strict=True)]
    NET = xp.concatenate([N[:, :, place.own] @ x for x, place in zip(ET, places, strict=True)], axis=2)
    TETET = xp.concatenate([_inner(x, NET[:, place.own]) for x, place in zip(ET, places, strict=True)])
    traces = [[_traces(a, b, N) for b in places] for a in places]
    single = xp.concatenate([_single_traces(place, N) for place in places])
    P = xp.concatenate([xp.swapaxes(xp.concatenate(TET, axis=1), 0, 1), M[None]])
    Q = xp.swapaxes(TETET.reshape(J, p, J, p), 1, 2)
    Q = xp.concatenate([xp.concatenate([Q, P[:J, None]], axis=1), P[None]])
    K = xp.block([[xp.block(traces), single[:, None]], [single[None], xp.reshape(stats.n, (1, 1))]])
    CP = C @ P
    flat = CP.reshape(J + 1, -1)
    information = K - 2.0 * xp.einsum("pq,ijqp->ij", C, Q) + flat @ xp.swapaxes(CP, 1, 2).reshape(J + 1, -1).T
    information = 0.5 * (information + information.T)
    W = 2.0 * linalg.inverse_small(information)
    WP = xp.tensordot(W, P, 1)
    U = xp.tensordot(W, Q, 2) - (WP @ CP).sum(0)
    if bends:
        U = U - 0.25 * _bent(bends, W, T, places)
    R_inv = xp.asarray(stats.X_basis.R_inv)

    def own(X: Array) -> Array:
        return R_inv @ X @ R_inv.T

    vcov = sigma**2 * own(C)
    adjusted = vcov + 2.0 * sigma**2 * own(C @ (0.5 * (U + U.T)) @ C)
    return Adjusted(vcov, adjusted, sigma**2 * own(CP @ C), W)


def _bent(bends: list[_Bends], W: np.ndarray, T: np.ndarray, places: list[Place]) -> np.ndarray:
    """``sum_ij W_ij R_ij (p, p)``. W is that of parameters beside H as the direction of sigma^2; beside the identity
    those of a term move with sigma^2 by its scale."""
    found = np.zeros((T.shape[2],) * 2)
    firsts = np.cumsum([0, *(len(place.units) for place in places)])
    for own in bends:
        t = int(np.searchsorted(firsts, own.first, "right")) - 1
        place, k = places[t], len(own.scale)
        here = slice(own.first, own.first + k)
        both = np.concatenate([np.eye(k), own.scale[:, None]], axis=1)
        at = np.r_[np.arange(len(W))[here], len(W) - 1]
        of_parameters = both @ W[np.ix_(at, at)] @ both.T
        E = np.tensordot(of_parameters, own.second, 2)
        part = T[:, place.own].reshape(len(T), place.q, place.m, -1)
        moved = np.einsum("ab,gbmp->gamp", E, part).reshape(len(T), place.q * place.m, -1)
        found += _inner(T[:, place.own], moved)
    return found


def df_of_rows(L: Array, fit: Adjusted) -> Array:
    """Denominator degrees of freedom of every row of ``L (r, p)`` alone, whose F statistic needs no scaling.

    For one row :func:`f_scaling` comes to ``2 v^2 / (g'W g)`` for its variance v and the derivatives g of that.
    """
    xp = namespace(L, fit.vcov)
    variance = xp.einsum("rp,pq,rq->r", L, fit.vcov, L)
    slopes = xp.einsum("rp,jpq,rq->rj", L, fit.P, L)
    return 2.0 * variance**2 / xp.einsum("rj,jk,rk->r", slopes, fit.W, slopes)


def f_scaling(L: Array, fit: Adjusted) -> tuple[Array, Array]:
    """Denominator degrees of freedom of the joint test of the rows of ``L (r, p)``, of full row rank, and the factor of
    the F statistic; Kenward & Roger (1997), section 3, with the limits taken where a denominator vanishes.
    """
    xp = namespace(L, fit.vcov)
    r = L.shape[0]
    inverse = linalg.inverse_small(L @ fit.vcov @ L.T)
    TP = (L.T @ inverse @ L) @ fit.P
    first = xp.trace(TP, axis1=1, axis2=2)
    A1 = first @ fit.W @ first
    TWP = xp.tensordot(fit.W, TP, 1)
    A2 = (TWP * xp.swapaxes(TP, 1, 2)).sum()
    B = (A1 + 6.0 * A2) / (2.0 * r)
    g = ((r + 1) * A1 - (r + 4) * A2) / ((r + 2) * A2)
    below = 3 * r + 2 * (1 - g)
    c1, c2, c3 = g / below, (r - g) / below, (r + 2 - g) / below
    V0, V1, V2 = 1.0 + c1 * B, 1.0 - c2 * B, 1.0 - c3 * B
    V0 = xp.where(abs(V0) < 1e-10, 0.0, V0)
    over = xp.where(abs(V1) < 1e-14, 1.0, (1.0 - A2 / r) / V1)
    rho = over**2 * V0 / (r * V2)
    df = 4.0 + (r + 2) / (r * rho - 1.0)
    return df, xp.where(abs(df - 2.0) < 1e-2, 1.0, df * (1.0 - A2 / r) / (df - 2.0))


def _inner(X: Array, Y: Array) -> Array:
    """``sum_g X_g' Y_g`` of ``(g, s, r)`` and ``(g, s, c)``."""
    return X.reshape(-1, X.shape[2]).T @ Y.reshape(-1, Y.shape[2])


def _traces(a: Any, b: Any, N: Array) -> Array:
    """``tr(E N F N)`` of all directions E of one term and F of another, ``(j, l)``."""
    xp = namespace(N)
    part = N[:, a.own, b.own].reshape(len(N), a.q, a.m, b.q, b.m)
    flat = xp.moveaxis(part, (1, 3), (0, 1)).reshape(a.q * b.q, -1)
    squares = (flat @ flat.T).reshape(a.q, b.q, a.q, b.q)  # of the parts of effects (b, c) and (a, d)
    return xp.einsum("jab,lcd,bcad->jl", a.units, b.units, squares)


def _single_traces(place: Any, N: Array) -> Array:
    """``tr(E N)`` of all directions of a term."""
    xp = namespace(N)
    part = N[:, place.own, place.own].reshape(len(N), place.q, place.m, place.q, place.m)
    return xp.einsum("jab,gbiai->j", place.units, part)
