"""Derivatives of the estimates with respect to case weights: what a little more or less of every row would do.

The estimates depend on a row through its products only, and on case weights linearly before the fit: ``products = sum_i
c_i products_i``. By the implicit function theorem, with f the criterion, x the coordinates of its minimum and H its
Hessian, an estimate ``t(x, products)`` changes by

    ``dt = t_products d products - t_x' H^{-1} f_x,products d products``.

So one reverse-mode derivative per estimate, of ``t + lambda'f_x`` with ``lambda = -H^{-1} t_x``, gives a coefficient
for every product, and contracted with the products of every row the derivatives with respect to all n weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array

from mixjax import covariance as cov
from mixjax.checks import InferenceWarning, warn
from mixjax.diagnostics.refits import entry_names
from mixjax.engine.coordinates import is_regular, solve_where
from mixjax.engine.engine import AtOnce, Engine, engine_of
from mixjax.engine.equations import covariances_with_slopes
from mixjax.estimation.search import own_factors
from mixjax.fitted.names import names_apart, term_names
from mixjax.fitted.record import Fitted, record_of
from mixjax.optimise.results import Result
from mixjax.products.rows import Rows
from mixjax.products.sums import CrossProducts

Scale = Literal["sdcor", "vcov", "theta"]
PREFIXES = {"sdcor": ("sd", "cor", "sigma"), "vcov": ("var", "cov", "sigma2"), "theta": ("theta", "theta", "sigma")}


def sensitivity(fitted: Fitted, scale: Scale = "sdcor") -> pd.DataFrame:
    """Derivatives of all estimates with respect to the case weight of every row, at weight 1.

    A case weight counts rows: with weight 2 a row stands in the table twice, in the same levels, and with weight 0 it
    is left out. (The weights of a model are precisions and something else.) So minus a derivative is about the change
    that leaving the row out makes; leaving out a whole group is no small change, and for that see
    :func:`~mixjax.diagnostics.influence.influence`. The variance parameters are estimated anew all the while: the
    derivatives go through the fit. They are exact, and take one pass over the rows.

    Args:
        fitted: the fit, with its rows.
        scale: how variances are expressed. ``"sdcor"``: standard deviations and correlations of the random effects,
            and sigma. ``"vcov"``: variances and covariances, and ``sigma2``. ``"theta"``: relative Cholesky factors,
            and sigma.

    Returns:
        DataFrame, rows of the data x parameters: those of the random effects, then sigma, then the fixed effects. Named
        as in ``fit.confint()`` with ``"sdcor"``, else ``var_Days|Subject``, ``cov_Days.Intercept|Subject``,
        ``theta_Days|Subject``. At a singular fit parameters on the boundary have derivative 0; a correlation with an
        effect of zero variance is NaN.

    Raises:
        ValueError: the scale is unknown; the fit kept no rows.

    Warns:
        InferenceWarning: the fit has no derivatives, because it did not converge or lies on the edge between singular
            and regular: all NaN.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.diagnostics.sensitivity import sensitivity
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> slopes = sensitivity(fit.record)
        >>> slopes.shape
        (180, 6)
        >>> int(slopes["Days"].abs().idxmax())
        59
    """
    fitted = record_of(fitted)
    fitted.check_can("sensitivities")
    if scale not in PREFIXES:
        raise ValueError(f"scale must be one of {', '.join(map(repr, PREFIXES))}, got {scale!r}")
    rows = fitted.rows
    diagonal, below, residual = PREFIXES[scale]
    entries, varies = entry_names(fitted, term_names(fitted.labels), diagonal, below)
    names = [*(name for name, own in zip(entries, varies, strict=True) if own), residual]
    names += names_apart(fitted.labels.fixed, names)
    est, p = fitted.estimates, len(fitted.labels.fixed)
    code = Result(int(est.result))
    values = np.full((rows.n, len(names)), np.nan)
    why = code.message
    if code is Result.CONVERGED:
        x, regular, own = _of_rows(fitted, rows)
        why = "" if regular else "the Hessian of the criterion is not positive definite"
    if why:
        warn(f"the estimates have no derivatives, all are NaN: {why}", InferenceWarning)
    else:
        J = _jacobian(x, float(est.sigma), fitted.stats, scale)
        kept = np.append(varies, True)
        values = np.concatenate([own[:, : own.shape[1] - p] @ J[kept].T, own[:, own.shape[1] - p :]], axis=1)
    return pd.DataFrame(values, index=fitted.labels.frame.index, columns=names)


def _of_rows(fitted: Fitted, rows: Rows) -> tuple[np.ndarray, bool, np.ndarray]:
    """The coordinates x ``(k,)`` of the fit; whether there are derivatives; those of x, sigma and beta by the weight of
    every row, ``(n, k + 1 + p)``."""
    # Of a known covariance the products of the rows' own effects, not those of its eigenvectors, which rows move.
    engine, theta = engine_of(rows.sums() if rows.known else rows.stats, fitted.reml), fitted.estimates.theta
    if isinstance(engine, AtOnce) and engine.where is None:
        return engine.run(_at_once, theta, rows)
    x, regular, slopes = engine_of(rows.stats, fitted.reml, at_once=False).run(_slopes, theta)
    return x, bool(regular), _contract(rows.padded(), slopes)


def _at_once(engine: AtOnce, theta: np.ndarray, rows: Rows) -> tuple[np.ndarray, bool, np.ndarray]:
    """In closed form."""
    x, free = engine.coordinates(theta)
    R_inv, found = engine.stats.X_basis.R_inv, engine.case_slopes(x, rows)
    by_x = np.concatenate([np.eye(len(x)), found.sigma_by_x[None], R_inv @ found.delta_by_x])
    multipliers = solve_where(free, found.Hessian, np.where(free, by_x, 0.0).T)
    own = -found.mixed @ multipliers
    own[:, len(x)] += found.sigma
    own[:, len(x) + 1 :] += found.delta @ R_inv.T
    return x, bool(is_regular(free, found.Hessian)), own


Sums = dict[str, Any]


def _sums(stats: CrossProducts) -> Sums:
    """Sums over rows: all that changes with case weights."""
    names = ("factors", "XX", "Xy", "yy", "n")
    return {"pairs": tuple(pair.ZZ for pair in stats.pairs), **{name: getattr(stats, name) for name in names}}


def _with_sums(stats: CrossProducts, sums: Sums) -> CrossProducts:
    pairs = tuple(pair._replace(ZZ=ZZ) for pair, ZZ in zip(stats.pairs, sums["pairs"], strict=True))
    return replace(stats, **{**sums, "pairs": pairs})


def _slopes(engine: Engine, theta: Any) -> tuple[Any, Any, Sums]:
    """By differentiation: coordinates x ``(k,)``; whether there are derivatives; those of x, sigma and beta by every
    product, estimates first."""
    stats = engine.stats
    x, free = engine.coordinates(theta)
    H = engine.derivatives(x)[2]
    sums, k = _sums(stats), x.shape[0]

    def profiled(x: Array, sums: Sums) -> Any:
        return replace(engine, stats=_with_sums(stats, sums)).profiled(x)

    def explicit(x: Array, sums: Sums) -> Array:
        at = profiled(x, sums)
        return jnp.concatenate([at.sigma[None], stats.beta0 + stats.X_basis.R_inv @ at.delta])

    by_x = jnp.concatenate([jnp.eye(k, dtype=x.dtype), jax.jacfwd(explicit)(x, sums)])
    multipliers = -solve_where(free, H, jnp.where(free, by_x, 0.0).T).T

    def slope(of: tuple[Array, Array]) -> Sums:
        pick, multiplier = of

        def total(sums: Sums) -> Array:
            moved = jax.jvp(lambda x: profiled(x, sums).criterion, (x,), (multiplier,))[1]
            value: Array = (pick * explicit(x, sums)).sum() + moved
            return value

        gradient: Sums = jax.grad(total)(sums)
        return gradient

    picks = jnp.eye(len(by_x), dtype=x.dtype)[:, k:]
    return x, is_regular(free, H), jax.lax.map(slope, (picks, multipliers))


def _jacobian(x: np.ndarray, sigma: float, stats: CrossProducts, scale: str) -> np.ndarray:
    """Derivatives by the coordinates x and sigma, ``(parameters, k + 1)``, of the parameters of the random effects on a
    scale, entries that a structure holds at 0 among them, then of sigma's own."""
    _, _, D, moves = covariances_with_slopes(x, stats)
    lambdas = own_factors(x, stats.Z_bases, stats.layout).lambdas
    parts = [_of_term(scale, sigma, *term) for term in zip(D, moves, lambdas, strict=True)]
    of_sigma = np.zeros((1, len(x) + 1))
    of_sigma[0, -1] = 2.0 * sigma if scale == "vcov" else 1.0
    return np.concatenate([*parts, of_sigma])


def _of_term(scale: str, sigma: float, D: np.ndarray, moves: np.ndarray, Lambda: np.ndarray) -> np.ndarray:
    """One term's rows of :func:`_jacobian`: its D ``(q, q)``, the derivatives ``(k, q, q)`` of that, its Lambda."""
    rows, columns = cov.triangle(len(D))
    if scale == "theta":
        slopes = _factors_slopes(Lambda, moves)[:, rows, columns]
        return np.concatenate([slopes, np.zeros((1, len(rows)))]).T
    if scale == "vcov":
        return np.concatenate([sigma**2 * moves[:, rows, columns], 2.0 * sigma * D[None, rows, columns]]).T
    # A standard deviation of zero stays zero: its root has no derivative, and needs none.
    variances = D.diagonal()
    sd = np.sqrt(np.where(variances > 0, variances, np.nan))
    of_sd = moves.diagonal(axis1=1, axis2=2) / (2.0 * sd)
    relative = of_sd / sd
    cor = D[rows, columns] / (sd[rows] * sd[columns])
    of_cor = moves[:, rows, columns] / (sd[rows] * sd[columns]) - cor * (relative[:, rows] + relative[:, columns])
    is_sd = rows == columns
    slopes = np.where(is_sd, np.nan_to_num(sigma * of_sd[:, rows]), of_cor)
    last = np.where(is_sd, np.nan_to_num(sd[rows]), np.where(np.isnan(cor), np.nan, 0.0))
    return np.concatenate([slopes, last[None]]).T


def _factors_slopes(L: np.ndarray, moves: np.ndarray) -> np.ndarray:
    """Derivatives ``(k, q, q)`` of the lower-triangular L with ``L L' = D``, from those of D. Columns of zeros stay."""
    slopes = np.zeros_like(moves)
    for j in range(len(L)):
        if L[j, j] > 0:
            column = L[:, j]
            slopes[:, j, j] = moves[:, j, j] / (2.0 * L[j, j])
            slopes[:, j + 1 :, j] = (moves[:, j + 1 :, j] - slopes[:, j, j, None] * column[j + 1 :]) / L[j, j]
            outer = slopes[:, :, j, None] * column
            moves = moves - outer - outer.swapaxes(1, 2)
    return slopes


def _contract(rows: Rows, slopes: Sums) -> np.ndarray:
    """``(n, estimates)``: the slopes of the products times the products of every row."""
    Q, r = rows.Q, rows.residual
    total = slopes["n"][:, None] + slopes["yy"][:, None] * r**2 + slopes["Xy"] @ (Q * r[:, None]).T
    total = total + np.einsum("epq,np,nq->en", slopes["XX"], Q, Q, optimize=True)
    for Z, group, by_factor in zip(rows.Z, rows.groups, slopes["factors"], strict=True):
        ZZ, ZX, Zy = (part[..., group] for part in by_factor)
        total += np.einsum("eabn,na,nb->en", ZZ, Z, Z, optimize=True)
        total += np.einsum("eapn,na,np->en", ZX, Z, Q, optimize=True)
        total += np.einsum("ean,na,n->en", Zy, Z, r, optimize=True)
    for (s, t), meeting, ZZ in zip(rows.layout.pairs, rows.meetings, slopes["pairs"], strict=True):
        total += np.einsum("eabn,na,nb->en", ZZ[..., meeting.entry], rows.Z[s], rows.Z[t], optimize=True)
    of_rows: np.ndarray = total.T
    return of_rows
