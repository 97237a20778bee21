"""Linear hypotheses about the fixed effects: estimates, standard errors, degrees of freedom, t and F tests.

The array forms (:func:`wald`, :func:`satterthwaite`, :func:`kenward_roger`) are functions of estimates and
cross-products; :func:`t_tests` and :func:`f_test` are what a fit with names calls.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import scipy.special
from jax.scipy.special import betainc, erfc

from mixjax.checks import InferenceWarning, check_level, warn
from mixjax.design import AnyArray
from mixjax.distributions import f_tail
from mixjax.engine.engine import AtOnce, Engine, engine_of
from mixjax.estimation.batch import batch_axes
from mixjax.estimation.estimate import Estimates
from mixjax.fitted.information import information
from mixjax.fitted.record import Fitted
from mixjax.fitted.repeated import RepeatedFitted
from mixjax.inference.fixed import kenward_roger as kr
from mixjax.inference.fixed.families import Combinations, adjustment_named, family_tests
from mixjax.inference.fixed.kenward_roger_visits import adjust_visits
from mixjax.inference.fixed.many import errors_of_many, in_lanes
from mixjax.machine import Array, compiled, float64, is_concrete, jit, namespace, silently
from mixjax.products.sums import CrossProducts, check_products

if TYPE_CHECKING:
    from mixjax.fitted.either import AnyRecord

METHODS = ("satterthwaite", "kenward-roger", "wald")
# Kenward and Roger's without second derivatives of the covariance.
LINEAR = "kenward-roger-linear"
KR = "ddf='kenward-roger'"


class Contrast(NamedTuple):
    """Linear combinations ``L beta``, one per row of L; replicates in front.

    Attributes:
        estimate, se, df, statistic, p: ``(r,)``. ``statistic = estimate / se``; df is infinite for Wald's z tests;
            ``p`` is two-sided.
    """

    estimate: AnyArray
    se: AnyArray
    df: AnyArray
    statistic: AnyArray
    p: AnyArray


# --- array forms -----------------------------------------------------------------------------------------------------


def wald(est: Estimates, stats: CrossProducts, L: AnyArray) -> Contrast:
    """z tests of linear combinations of the fixed effects, theta taken as known.

    Pure and differentiable: ``jit`` and ``vmap`` work. Estimates and cross-products of many responses, as
    :func:`mixjax.estimate_many` takes and gives them, give arrays with a leading axis.

    Args:
        est: estimates; theta, beta and sigma are looked at.
        stats: cross-products they come from.
        L: ``(r, p)`` combinations, or ``(p,)`` one.

    Returns:
        :class:`Contrast`.

    Example:
        >>> import mixjax as mj
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> [round(float(z), 3) for z in mj.wald(fit.estimates, fit.stats, [0.0, 1.0]).statistic]
        [6.771]
    """
    return _of_one_or_many(_wald, est, stats, L)


def satterthwaite(est: Estimates, stats: CrossProducts, L: AnyArray, reml: bool = True) -> Contrast:
    """t tests with Satterthwaite's degrees of freedom, as lmerTest defines them.

    ``df = 2 v^2 / (g' A g)`` for the variance ``v = l' vcov l`` of each combination, its gradient g with respect to all
    variance parameters, sigma among them, and their asymptotic covariance A, twice the inverse Hessian of the criterion
    (Kuznetsova, Brockhoff & Christensen 2017, J. Stat. Softw. 82(13), section 2.2). Derivatives are exact. At a
    singular fit the zeros of theta are taken as known. NaN where the Hessian is not positive definite.

    Args:
        est, stats, L: as in :func:`mixjax.wald`.
        reml: the criterion that was minimised.

    Returns:
        :class:`Contrast`.

    Example:
        >>> import mixjax as mj
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> [round(float(df), 2) for df in mj.satterthwaite(fit.estimates, fit.stats, [0.0, 1.0]).df]
        [17.0]
    """
    return _of_one_or_many(_satterthwaite, est, stats, L, reml)


def kenward_roger(est: Estimates, stats: CrossProducts, L: AnyArray) -> Contrast:
    """t tests with the adjusted covariance and degrees of freedom of Kenward & Roger (1997, Biometrics 53, 983).

    As pbkrtest; for one row at a time the F statistic needs no scaling. See
    :mod:`mixjax.inference.fixed.kenward_roger`.

    Args:
        est: REML estimates. stats, L: as in :func:`mixjax.wald`.

    Returns:
        :class:`Contrast`.

    Raises:
        ValueError: weights, or too many crossed effects; inside JAX's transformations a covariance structure that is
            not linear in its parameters.

    Example:
        >>> import mixjax as mj
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> [round(float(df), 2) for df in mj.kenward_roger(fit.estimates, fit.stats, [0.0, 1.0]).df]
        [17.0]
    """
    check_products(stats)
    refuse_kenward_roger(stats)
    if not kr.is_linear(stats):
        return _one_by_one(est, stats, L)
    return _of_one_or_many(_kenward_roger, est, stats, L)


def _one_by_one(est: Estimates, stats: CrossProducts, L: AnyArray) -> Contrast:
    """Of covariances that are not linear in their parameters: by NumPy, fit by fit."""
    if not all(map(is_concrete, jax.tree.leaves((est, stats, L)))):
        raise ValueError(
            "Kenward-Roger's degrees of freedom of a covariance that is not linear in its parameters are computed by "
            "NumPy, not inside JAX's transformations; use mixjax.satterthwaite there"
        )
    rows = np.atleast_2d(np.asarray(L, np.float64))
    values = [np.asarray(part, np.float64) for part in (est.theta, est.beta, est.sigma)]
    if np.ndim(stats.yy) == 0:
        alone = jax.tree.map(np.asarray, stats)
        contrast: Contrast = AtOnce(alone, True).run(_kenward_roger, *values, rows)
        return contrast
    axes, found = batch_axes(stats), []
    for i in range(len(values[0])):
        one = jax.tree.map(lambda a, axis, i=i: np.asarray(a)[i] if axis == 0 else np.asarray(a), stats, axes)
        found.append(AtOnce(one, True).run(_kenward_roger, *(value[i] for value in values), rows))
    return Contrast(*(np.stack(parts) for parts in zip(*found, strict=True)))


def _wald(engine: Engine, theta: Array, beta: Array, sigma: Array, L: Array) -> Contrast:
    inverse = engine.profiled(engine.coordinates(theta)[0]).XX_inverse
    half = namespace(inverse).asarray(engine.stats.X_basis.R_inv)
    vcov = sigma**2 * half @ inverse @ half.T
    return _contrast(L, beta, vcov, namespace(vcov).full(L.shape[0], np.inf, vcov.dtype))


def _satterthwaite(engine: Engine, theta: Array, beta: Array, sigma: Array, L: Array) -> Contrast:
    info = information(engine, theta, sigma)
    return _contrast(L, beta, info.vcov, satterthwaite_df(L, info))


def _kenward_roger(engine: Engine, theta: Array, beta: Array, sigma: Array, L: Array) -> Contrast:
    if not L.shape[1]:
        return _wald(engine, theta, beta, sigma, L)
    fit = kr.adjust(engine, theta, sigma)
    return _contrast(L, beta, fit.adjusted, kr.df_of_rows(L, fit))


def satterthwaite_df(L: Array, info: Any) -> Array:
    """Degrees of freedom of every row of ``L (r, p)``; see :func:`satterthwaite`."""
    xp = namespace(L, *info)
    variance = xp.einsum("rp,pq,rq->r", L, info.vcov, L)
    gradient = xp.einsum("rp,kpq,rq->rk", L, info.slopes, L)
    df = 2.0 * variance**2 / xp.einsum("rk,kl,rl->r", gradient, info.covariance, gradient)
    return xp.where(info.regular, df, xp.nan)


def _contrast(L: Array, beta: Array, vcov: Array, df: Array) -> Contrast:
    xp = namespace(L, vcov)
    estimate = L @ beta
    se = xp.sqrt(xp.einsum("rp,pq,rq->r", L, vcov, L))
    if xp is np:
        return contrast_of(estimate, se, df)
    t = estimate / se
    finite = jnp.where(jnp.isfinite(df), df, 1.0)
    p = jnp.where(jnp.isinf(df), erfc(jnp.abs(t) / math.sqrt(2.0)), betainc(finite / 2, 0.5, finite / (finite + t * t)))
    return Contrast(estimate, se, df, t, jnp.where(jnp.isnan(df), jnp.nan, p))


def contrast_of(estimate: np.ndarray, se: np.ndarray, df: np.ndarray) -> Contrast:
    """Two-sided tests that combinations are zero, in numpy."""
    with np.errstate(invalid="ignore", divide="ignore"):
        t = estimate / se
    return Contrast(estimate, se, df, t, two_sided(t, df))


def two_sided(t: np.ndarray, df: np.ndarray) -> np.ndarray:
    """p values of t statistics; of normal ones where df is infinite."""
    size = -np.abs(t)
    p: np.ndarray = 2.0 * np.where(np.isinf(df), scipy.special.ndtr(size), scipy.special.stdtr(df, size))
    return p


def _of_one_or_many(
    fun: Callable[..., Contrast], est: Estimates, stats: CrossProducts, L: AnyArray, reml: bool = True
) -> Contrast:
    check_products(stats)
    p = np.shape(stats.beta0)[-1]
    if np.ndim(L) not in (1, 2) or np.shape(L)[-1] != p:
        raise ValueError(f"L has shape {np.shape(L)}; combinations of {p} fixed effects are (r, {p}) or ({p},)")
    many = np.ndim(stats.yy) == 1
    concrete = all(map(is_concrete, jax.tree.leaves((est, stats, L))))
    double = concrete and np.asarray(stats.yy).dtype == np.float64
    ddf = {_wald: "wald", _satterthwaite: "satterthwaite"}.get(fun, "")
    if many and double and in_lanes(ddf, stats):
        each = np.atleast_2d(np.asarray(L, np.float64))
        with float64():
            return contrast_of(np.asarray(est.beta) @ each.T, *errors_of_many(ddf, est, stats, each, reml))
    if not many and double and namespace(*jax.tree.leaves((est, stats))) is np:
        each = np.atleast_2d(np.asarray(L, np.float64))
        contrast: Contrast = engine_of(stats, reml).run(fun, est.theta, est.beta, est.sigma, each)
        return contrast
    engine = Engine(replace(stats, classes=None), jnp.asarray(reml))
    run = _of_many(fun, tuple(jax.tree.leaves(batch_axes(engine.stats)))) if many else compiled(fun)
    with float64(double or jax.config.read("jax_enable_x64")):
        rows = jnp.atleast_2d(jnp.asarray(L, stats.XX.dtype))
        result: Contrast = run(engine, est.theta, est.beta, est.sigma, rows)
        found: Contrast = jax.tree.map(np.asarray, result) if double else result
        return found


@cache
def _of_many(fun: Callable[..., Contrast], axes: tuple[int, ...]) -> Callable[..., Contrast]:
    """``fun`` of many fits whose cross-products have replicates in front where ``axes`` is not -1."""

    def many(engine: Engine, theta: Array, beta: Array, sigma: Array, L: Array) -> Contrast:
        tree = jax.tree.unflatten(jax.tree.structure(engine.stats), [None if axis < 0 else 0 for axis in axes])
        over: Callable[..., Contrast] = jax.vmap(
            lambda stats, *est: fun(replace(engine, stats=stats), *est, L), in_axes=(tree, 0, 0, 0)
        )
        return over(engine.stats, theta, beta, sigma)

    return jit(many)


# --- with names ------------------------------------------------------------------------------------------------------


class FTest(NamedTuple):
    """Joint test of several linear combinations: F statistic, degrees of freedom, p value.

    ``scale`` is Kenward-Roger's factor, which the statistic contains.
    """

    statistic: float
    num_df: float
    den_df: float
    p_value: float
    scale: float = 1.0


def t_tests(
    fitted: AnyRecord,
    L: AnyArray,
    ddf: str = "satterthwaite",
    rhs: AnyArray = 0.0,
    names: Sequence[str] | None = None,
    level: float = 0.95,
    adjust: str = "none",
) -> pd.DataFrame:
    """A t test for every row of a contrast matrix.

    Args:
        L: ``(r, p)``. rhs: ``(r,)`` or scalar, the values under the hypotheses.
        ddf: ``"satterthwaite"``, ``"kenward-roger"`` (which also adjusts the standard errors; an ML fit is refitted by
            REML), or ``"wald"``: z tests.
        names: of the rows.
        level: coverage of the intervals. adjust: of p values and intervals, all rows one family, see
            :func:`mixjax.inference.fixed.families.family_tests`.

    Returns:
        DataFrame with columns ``estimate``, ``std_error``, ``df``, ``lower``, ``upper``, ``statistic``, ``p_value``.
    """
    check_level(level)
    table = family_tests(combinations(fitted, L, ddf), adjustment_named(adjust), level, rhs).table
    return table if names is None else table.set_axis(list(names), axis=0)


def combinations(fitted: AnyRecord, L: AnyArray, ddf: str) -> Combinations:
    """Linear combinations ``(r, p)`` of the fixed effects under one method."""
    L = _checked(fitted, L)
    method = FixedEffects.of(fitted, ddf)
    sizes, vectors = np.linalg.eigh(np.where(np.isfinite(method.vcov), method.vcov, 0.0))
    root = L @ (vectors * np.sqrt(np.maximum(sizes, 0.0)))
    se = np.sqrt(np.einsum("rp,pq,rq->r", L, method.vcov, L))
    return Combinations(L @ method.beta, se, method.df(L), root)


def f_test(
    fitted: AnyRecord,
    L: AnyArray,
    ddf: str = "satterthwaite",
    rhs: AnyArray = 0.0,
    method: FixedEffects | None = None,
) -> FTest:
    """Joint test that ``L beta = rhs``; rows may depend on each other.

    Satterthwaite: the rows are rotated to be uncorrelated, and the denominator's df chosen so that the F distribution
    has the mean of the statistic (Fai & Cornelius 1996). These df, and only they, depend on how the hypothesis is
    written: on L itself, as in SAS and lmerTest, not on its row space alone. Kenward-Roger: with the scaled statistic.
    Wald: chi-square divided by its df, with infinite denominator df. Of no rows, NaN with ``num_df`` 0.

    Args:
        method: what ``FixedEffects.of(fitted, ddf)`` gave, where several tests share it.
    """
    L = _checked(fitted, L)
    if not len(L):
        return FTest(math.nan, 0.0, math.nan, math.nan)
    rhs = np.broadcast_to(np.asarray(rhs, dtype=np.float64), len(L))
    basis, values = basis_of_rows(L, rhs)
    method = method or FixedEffects.of(fitted, ddf)
    r = len(basis)
    covariance = basis @ method.vcov @ basis.T
    difference = basis @ method.beta - values
    statistic = float(difference @ np.linalg.solve(covariance, difference)) / r
    den_df, scale = method.joint(L, basis)
    statistic *= scale
    p = f_tail(statistic, r, den_df)
    return FTest(statistic, float(r), den_df, float(p), scale)


class FixedEffects(NamedTuple):
    """Fixed effects under one method: covariance, and degrees of freedom of combinations.

    Attributes:
        beta: ``(p,)``. vcov: ``(p, p)``, adjusted by Kenward-Roger. df: ``L (r, p) -> (r,)``.
        joint: ``L (s, p)``, basis ``(r, p)`` of its rows -> denominator df, factor of F.
    """

    beta: np.ndarray
    vcov: np.ndarray
    df: Callable[[np.ndarray], np.ndarray]
    joint: Callable[[np.ndarray, np.ndarray], tuple[float, float]]

    @staticmethod
    def of(fitted: AnyRecord, ddf: str) -> FixedEffects:
        check_ddf(ddf)
        if isinstance(fitted, RepeatedFitted):
            return _of_repeated(fitted, ddf)
        if not isinstance(fitted, Fitted):
            if ddf != "wald":
                raise ValueError(
                    f"ddf={ddf!r} is for linear mixed models; of a generalised one there are tests by the normal and "
                    "the chi-square distribution, ddf='wald'"
                )
            if not np.isfinite(fitted.estimates.vcov).all():
                warn(
                    "the Hessian is not positive definite at these estimates, so there are no standard errors: "
                    f"{fitted.optimizer.message}",
                    InferenceWarning,
                )
        if ddf == "wald" or not isinstance(fitted, Fitted) or not fitted.labels.fixed:
            return _by_wald(fitted)
        return _by_satterthwaite(fitted) if ddf == "satterthwaite" else _by_kenward_roger(fitted, ddf == LINEAR)


def ddf_note(ddf: str) -> str:
    """The note on degrees of freedom of a table."""
    return "wald tests, without degrees of freedom" if ddf == "wald" else f"{ddf} degrees of freedom"


def check_ddf(ddf: Any) -> None:
    """Raise ValueError for a method that is none."""
    if ddf not in (*METHODS, LINEAR):
        raise ValueError(f"ddf must be one of {', '.join(map(repr, (*METHODS, LINEAR)))}, got {ddf!r}")


def _by_wald(fitted: AnyRecord) -> FixedEffects:
    beta, vcov = np.asarray(fitted.estimates.beta), np.asarray(fitted.estimates.vcov)
    return FixedEffects(beta, vcov, lambda L: np.full(len(L), np.inf), lambda *_: (math.inf, 1.0))


def _of_repeated(fitted: RepeatedFitted, ddf: str) -> FixedEffects:
    if ddf == "wald" or not fitted.labels.fixed:
        return _by_wald(fitted)
    if ddf == "satterthwaite":
        return _by_satterthwaite(fitted)
    if not fitted.reml:
        warn("Kenward-Roger needs REML estimates: the ML fit was refitted by REML for these tests", InferenceWarning)
        fitted = fitted.refitted(True)
    with silently():
        own = adjust_visits(fitted.visits, fitted.estimates.x[:, None], ddf == LINEAR)
    scale = float(fitted.estimates.scale) ** 2
    # Derivatives by the covariances of the response divided by its scale, and W is of these too.
    fit = kr.Adjusted(scale * own.vcov[0], scale * own.adjusted[0], scale * own.P[0], own.W[0])
    return _adjusted(np.asarray(fitted.estimates.beta), fit)


def _by_satterthwaite(fitted: Fitted | RepeatedFitted) -> FixedEffects:
    info = fitted.information
    own_residuals = isinstance(fitted, Fitted) and fitted.kept is not None and fitted.given.has_residual_side
    # Kenward-Roger's needs the same Hessian where rows depend on each other without random effects.
    plain = None if own_residuals or isinstance(fitted, RepeatedFitted) else f"{KR} or "
    smaller = "a simpler random part"
    if isinstance(fitted, RepeatedFitted):
        smaller = "a structure with fewer parameters, such as ar1h, toeph or homcs"
    if not info.regular:
        warn(
            "the Hessian of the criterion is not positive definite at these estimates: there are no Satterthwaite "
            f"degrees of freedom; use {'' if plain is None else plain}{smaller}",
            InferenceWarning,
        )
    elif not info.free.all():
        warn(
            "singular fit: Satterthwaite's degrees of freedom take the variances that are zero, and the correlations "
            f"at their bounds, as known{'' if plain is None else '; ' + KR + ' does not'}",
            InferenceWarning,
        )

    def df(L: np.ndarray) -> np.ndarray:
        with silently():
            values: np.ndarray = satterthwaite_df(L, info)
            return values

    def joint(L: np.ndarray, basis: np.ndarray) -> tuple[float, float]:
        return pooled_df(df(uncorrelated_rows(L, info.vcov, len(basis)))), 1.0

    return FixedEffects(np.asarray(fitted.estimates.beta), np.asarray(info.vcov), df, joint)


def uncorrelated_rows(L: np.ndarray, vcov: np.ndarray, r: int) -> np.ndarray:
    """``(r, p)`` combinations of the rows of L, of rank r, whose estimates are uncorrelated."""
    _, vectors = np.linalg.eigh(L @ vcov @ L.T)
    rows: np.ndarray = vectors[:, -r:].T @ L
    return rows


def pooled_df(dfs: np.ndarray) -> float:
    """Denominator df of a mean of squared independent t variables: ``2 E / (E - r)``, ``E = sum df / (df - 2)``."""
    if not np.isfinite(dfs).all():
        return float("nan")
    if np.ptp(dfs) < 1e-8 * np.abs(dfs).max():
        return float(dfs.mean())
    if (dfs <= 2).any():
        return 2.0
    E = (dfs / (dfs - 2)).sum()
    return float(2 * E / (E - len(dfs)))


def _by_kenward_roger(fitted: Fitted, linear: bool = False) -> FixedEffects:
    fitted.check_can("Kenward-Roger degrees of freedom")
    refuse_kenward_roger(fitted.stats)
    if not fitted.reml:
        warn("Kenward-Roger needs REML estimates: the ML fit was refitted by REML for these tests", InferenceWarning)
        fitted = fitted.refitted(True)
    fit = AtOnce(fitted.stats, True).run(kr.adjust, fitted.estimates.theta, fitted.estimates.sigma, linear)
    if not kr.is_linear(fitted.stats) and not np.isfinite(fit.adjusted).all():
        raise ValueError(
            "no Kenward-Roger degrees of freedom: a parameter of a covariance that is not linear in its parameters is "
            "at its bound; use ddf='satterthwaite', or a smaller model"
        )
    return _adjusted(np.asarray(fitted.estimates.beta), fit)


def _adjusted(beta: np.ndarray, fit: kr.Adjusted) -> FixedEffects:
    def joint(_: np.ndarray, basis: np.ndarray) -> tuple[float, float]:
        with silently():
            df, scale = kr.f_scaling(basis, fit)
        return float(df), float(scale)

    def df(L: np.ndarray) -> np.ndarray:
        with silently():
            values: np.ndarray = kr.df_of_rows(L, fit)
            return values

    return FixedEffects(beta, fit.adjusted, df, joint)


def refuse_kenward_roger(stats: CrossProducts) -> None:
    """Raise ValueError, with the reason, where there are no Kenward-Roger degrees of freedom."""
    reason = kr.refusal(stats)
    if reason:
        raise ValueError(f"no Kenward-Roger degrees of freedom: {reason}; use ddf='satterthwaite'")


def _checked(fitted: AnyRecord, L: AnyArray) -> np.ndarray:
    L = np.atleast_2d(np.asarray(L, dtype=np.float64))
    p = len(fitted.labels.fixed)
    if L.ndim != 2 or L.shape[1] != p:
        raise ValueError(f"L has shape {L.shape}; contrasts of the fixed effects {list(fitted.labels.fixed)} have {p} "
                         "columns")  # fmt: skip
    if not np.isfinite(L).all():
        raise ValueError("L has missing or infinite values")
    rows: np.ndarray = L
    return rows


def basis_of_rows(L: np.ndarray, rhs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An orthonormal basis of the rows, with the values under the hypothesis.

    Raises:
        ValueError: the rows are all zero, or contradict each other.
    """
    U, sizes, Vt = np.linalg.svd(L, full_matrices=False)
    rank = int((sizes > 1e-9 * max(sizes.max(), 1e-300)).sum()) if sizes.max() > 0 else 0
    if rank == 0:
        raise ValueError("L has only zeros: there is no hypothesis")
    values = (U.T @ rhs)[:rank] / sizes[:rank]
    if np.abs(L @ (Vt[:rank].T @ values) - rhs).max() > 1e-8 * (1.0 + np.abs(rhs).max()):
        raise ValueError("the hypotheses contradict each other: no coefficients satisfy all rows of L")
    return Vt[:rank], values
