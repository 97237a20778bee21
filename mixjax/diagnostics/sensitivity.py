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
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import Array

from mixjax import covariance as cov
from mixjax.diagnostics.deletion import Rows, rows_of
from mixjax.diagnostics.refits import entry_names
from mixjax.estimation.search import own_factors
from mixjax.estimation.surface import coordinates_of, evaluate_of, is_regular, profiled_of, solve_where
from mixjax.fitted import Fitted, InferenceWarning, names_apart, record_of, term_names
from mixjax.formula.errors import warn
from mixjax.likelihood.criterion import Profiled
from mixjax.likelihood.incidence import Incidence, incidence
from mixjax.likelihood.statistics import CrossProducts
from mixjax.machine import float64, jit
from mixjax.optimise.results import Result

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
    if scale not in PREFIXES:
        raise ValueError(f"scale must be one of {', '.join(map(repr, PREFIXES))}, got {scale!r}")
    rows = rows_of(fitted)
    diagonal, below, residual = PREFIXES[scale]
    entries, varies = entry_names(fitted, term_names(fitted.labels), diagonal, below)
    names = [*(name for name, own in zip(entries, varies, strict=True) if own), residual]
    names += names_apart(fitted.labels.fixed, names)
    est, p = fitted.estimates, len(fitted.labels.fixed)
    code = Result(int(est.result))
    values = np.full((rows.n, len(names)), np.nan)
    why = code.message
    if code is Result.CONVERGED:
        with float64():
            x, regular, slopes = jax.device_get(
                _slopes_of_products(rows.stats, est.theta, np.bool_(fitted.reml), incidence(rows.stats))
            )
            J = np.asarray(_jacobian(np.append(x, est.sigma), rows.stats, scale=scale))
        why = "" if regular else "the Hessian of the criterion is not positive definite"
    if why:
        warn(f"the estimates have no derivatives, all are NaN: {why}", InferenceWarning)
    else:
        own = _contract(rows, slopes)
        kept = np.append(varies, True)
        values = np.concatenate([own[:, : own.shape[1] - p] @ J[kept].T, own[:, own.shape[1] - p :]], axis=1)
    return pd.DataFrame(values, index=fitted.labels.frame.index, columns=names)


Sums = dict[str, Any]


def _sums(stats: CrossProducts) -> Sums:
    """What is a sum over rows: all that changes with case weights."""
    names = ("factors", "XX", "Xy", "yy", "n")
    return {"pairs": tuple(pair.ZZ for pair in stats.pairs), **{name: getattr(stats, name) for name in names}}


def _with_sums(stats: CrossProducts, sums: Sums) -> CrossProducts:
    pairs = tuple(pair._replace(ZZ=ZZ) for pair, ZZ in zip(stats.pairs, sums["pairs"], strict=True))
    return replace(stats, **{**sums, "pairs": pairs})


def _slopes(stats: CrossProducts, theta: Array, reml: Array, where: Incidence | None) -> tuple[Array, Array, Sums]:
    """Coordinates x ``(k,)``; whether there are derivatives; those of x, sigma and beta by every product, estimates
    first."""
    stats, where = jax.tree.map(jnp.asarray, (stats, where))
    x, free = coordinates_of(theta, stats)
    H = evaluate_of(stats, reml, where)(x[:, None])[2][..., 0]
    sums, k = _sums(stats), x.shape[0]

    def profiled(x: Array, sums: Sums) -> Profiled:
        return profiled_of(_with_sums(stats, sums), reml, where)(x)

    def explicit(x: Array, sums: Sums) -> Array:
        at = profiled(x, sums)
        return jnp.concatenate([at.sigma[None], stats.beta0 + stats.X_basis.R_inv @ at.delta])

    by_x = jnp.concatenate([jnp.eye(k, dtype=x.dtype), jax.jacfwd(explicit)(x, sums)])
    multipliers = -solve_where(free, H, jnp.where(free, by_x, 0.0).T).T

    def slope(of: tuple[Array, Array]) -> Sums:
        pick, multiplier = of

        def total(sums: Sums) -> Array:
            moved = jax.jvp(lambda x: profiled(x, sums).criterion, (x,), (multiplier,))[1]
            return (pick * explicit(x, sums)).sum() + moved

        return jax.grad(total)(sums)

    picks = jnp.eye(len(by_x), dtype=x.dtype)[:, k:]
    return x, is_regular(free, H), jax.lax.map(slope, (picks, multipliers))


_slopes_of_products = jit(_slopes)


def _variances(at: Array, stats: CrossProducts, scale: str) -> Array:
    """Parameters of the random effects on a scale, entries that a structure holds at 0 among them, then sigma; from
    the coordinates x and sigma."""
    x, sigma, values = at[:-1], at[-1], []
    if scale == "theta":
        return jnp.append(cov.theta_of_lambdas(own_factors(x, stats.Z_bases, stats.layout).lambdas), sigma)
    for basis, F in zip(stats.Z_bases, cov.factors_of(x, stats.layout.structures), strict=True):
        own = jnp.asarray(basis.R_inv) @ F
        D = own @ own.T
        rows, columns = cov.triangle(D.shape[0])
        if scale == "vcov":
            values.append(sigma**2 * D[rows, columns])
            continue
        # A standard deviation of zero stays zero: its root has no derivative, and needs none.
        positive = jnp.diagonal(D) > 0
        sd = jnp.where(positive, jnp.sqrt(jnp.where(positive, jnp.diagonal(D), 1.0)), 0.0)
        safe = jnp.where(positive, sd, jnp.nan)
        values.append(jnp.where(rows == columns, sigma * sd[rows], D[rows, columns] / (safe[rows] * safe[columns])))
    return jnp.concatenate([*values, (sigma**2 if scale == "vcov" else sigma)[None]])


@partial(jit, static_argnames="scale")
def _jacobian(at: Array, stats: CrossProducts, scale: str) -> Array:
    at, stats = jax.tree.map(jnp.asarray, (at, stats))
    return jax.jacfwd(partial(_variances, stats=stats, scale=scale))(at)


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
    for (s, t), entry, ZZ in zip(rows.stats.layout.pairs, rows.entries, slopes["pairs"], strict=True):
        total += np.einsum("eabn,na,nb->en", ZZ[..., entry], rows.Z[s], rows.Z[t], optimize=True)
    return total.T
