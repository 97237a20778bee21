"""Estimates without each unit: every one refitted, or one Newton step from the fit of all rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mixjax import covariance as cov
from mixjax.bases import Basis
from mixjax.diagnostics.deletion import batches
from mixjax.engine.coordinates import is_regular, solve_where
from mixjax.engine.engine import Engine
from mixjax.engine.incidence import incidence
from mixjax.estimation.choice import chosen_engine
from mixjax.estimation.estimate import Estimates, assemble, fit
from mixjax.estimation.many import KEEP, estimate_many, steps_at_once
from mixjax.estimation.search import REGION
from mixjax.fitted import Fitted
from mixjax.machine import LANES, compiled, float64, jit
from mixjax.optimise.newton import Solution
from mixjax.optimise.results import Result
from mixjax.products.rows import Rows
from mixjax.products.sums import CrossProducts

# Codes beside those of mixjax.Result.
RANK_DEFICIENT, NO_STEP, COMPUTED = "RANK_DEFICIENT", "NO_STEP", "COMPUTED"
SOLUTIONS = (COMPUTED, *(code.name for code in Result if code.is_solution))
# What is taken from the refits.
FIELDS = ("theta", "beta", "sigma", "Sigma", "vcov", "singular", "result")
# Deletions that take their Newton step in one call.
TOGETHER = 64


class Without(NamedTuple):
    """Estimates without each of U units; NaN where there are none.

    Attributes:
        change: ``(U, p)`` fixed effects less those of all rows; covariance: ``(U, p, p)`` of the fixed effects. Both in
            the basis of X: that of raw columns, as calendar years, has lost digits that the measures need.
        sigma: ``(U,)``. theta: ``(U, k)``. Sigma: per term ``(U, q, q)``.
        singular: ``(U,)`` some Sigma has less than full rank.
        result: ``(U,)`` names: of :class:`mixjax.Result`; ``COMPUTED`` where nothing was searched; ``RANK_DEFICIENT``
            where X lost rank; ``NO_STEP`` where the Hessian was not positive definite.
    """

    change: np.ndarray
    covariance: np.ndarray
    sigma: np.ndarray
    theta: np.ndarray
    Sigma: tuple[np.ndarray, ...]
    singular: np.ndarray
    result: np.ndarray

    @property
    def found(self) -> np.ndarray:
        """``(U,)`` there are estimates."""
        return np.isin(self.result, SOLUTIONS)


def nowhere(fitted: Fitted, U: int) -> Without:
    """NaN for all units, as if each left X without full rank."""
    est, p = fitted.estimates, len(fitted.labels.fixed)

    def nan(*shape: int) -> np.ndarray:
        return np.full(shape, np.nan)

    Sigma = tuple(nan(U, q, q) for q in fitted.stats.layout.qs)
    result = np.full(U, RANK_DEFICIENT, dtype=object)
    return Without(nan(U, p), nan(U, p, p), nan(U), nan(U, len(est.theta)), Sigma, np.zeros(U, bool), result)


def refit_without(fitted: Fitted, rows: Rows, unit: np.ndarray, delta: np.ndarray) -> Without:
    """The fit's own criterion minimised anew without each unit, all of them as a batch.

    Args:
        unit: ``(n,)`` codes ``0 .. U - 1``. delta: ``(p,)`` coefficients of all rows in the basis of X.
    """
    out = nowhere(fitted, int(unit.max()) + 1)
    is_large = incidence(rows.stats) is not None
    engine = chosen_engine(rows.stats, len(out.result))
    rows = rows if engine == "numpy" else rows.padded()
    # Fits of a large crossed design go one after another, over sparse rows, from the theta of all rows.
    start = None if fitted.estimates.singular else fitted.estimates.theta
    for deleted, stats in batches(rows, unit):
        if is_large:
            with float64():
                est = _one_by_one(stats, fitted.reml, lambda engine: _kept(compiled(fit)(engine, start)))
        else:
            # From moment estimates, as a fit of the other rows would start: as quick as from the theta of all rows, and
            # where there are several minima the choice among them does not depend on the rows that are left out.
            est = estimate_many(_in_basis(stats), fitted.reml, keep=(*KEEP, "Sigma", "vcov"), engine=engine)
        _put(out, deleted, _to_basis_of(rows, est, stats), delta, _names_of(est.result))
    return out


def step_without(fitted: Fitted, rows: Rows, unit: np.ndarray, delta: np.ndarray) -> Without:
    """One Newton step of every criterion without a unit, from the estimates of all rows.

    The step is taken in the optimiser's coordinates, with the exact gradient and Hessian of the criterion without the
    unit, and among the coordinates that are free at the fit: a variance of zero stays zero. It is no longer than half
    the length of the coordinates, the optimiser's own first region. What follows from theta, as beta, sigma and their
    covariance, is exact at the end of the step. Arguments as in :func:`refit_without`.
    """
    out = nowhere(fitted, int(unit.max()) + 1)
    theta, reml = fitted.estimates.theta, np.bool_(fitted.reml)
    is_large = incidence(rows.stats) is not None
    if not is_large and chosen_engine(rows.stats, len(out.result)) == "numpy":
        for deleted, stats in batches(rows, unit):
            est, sound = steps_at_once(_in_basis(stats), theta, fitted.reml)
            result = np.where(sound, COMPUTED, NO_STEP).astype(object)
            _put(out, deleted, _to_basis_of(rows, est, stats), delta, result)
        return out
    rows = rows.padded()
    with float64():
        for deleted, stats in batches(rows, unit):
            if is_large:
                est, sound = _one_by_one(stats, fitted.reml, lambda engine: compiled(_step)(engine, theta))
            else:
                est, sound = _in_blocks(stats, lambda some: _steps(some, theta, reml))
            result = np.where(sound, COMPUTED, NO_STEP).astype(object)
            _put(out, deleted, _to_basis_of(rows, est, stats), delta, result)
    return out


def _names_of(codes: np.ndarray) -> np.ndarray:
    return np.array([Result(code).name for code in codes], dtype=object)


def _one_by_one(stats: CrossProducts, reml: bool, call: Callable[[Engine], Any]) -> Any:
    """A function of each of B data sets."""
    parts, where, pairs = [], None, None
    for i in range(len(stats.yy)):
        one = jax.tree.map(lambda leaf, i=i: leaf[i], _in_basis(stats))
        # Levels keep their places, and those that no longer meet have products of zero there.
        if pairs is None or any((a.cols != b.cols).any() for a, b in zip(pairs, one.pairs, strict=True)):
            where, pairs = incidence(one), one.pairs
        parts.append(jax.device_get(call(Engine(one, np.bool_(reml), where))))
    return jax.tree.map(lambda *leaves: np.stack(leaves), *parts)


def _in_blocks(stats: CrossProducts, call: Callable[[CrossProducts], Any]) -> Any:
    """A function of products of TOGETHER data sets, in as many calls as B of them need."""
    parts, B = [], len(stats.yy)
    for first in range(0, B, TOGETHER):
        # One shape for all calls: the last lane stands for those that are none.
        at = np.minimum(np.arange(first, first + TOGETHER), B - 1)
        parts.append(jax.device_get(call(jax.tree.map(lambda leaf, at=at: leaf[at], _in_basis(stats)))))
    return jax.tree.map(lambda *leaves: np.concatenate(leaves)[:B], *parts)


def _step(engine: Engine, theta: Array) -> tuple[Estimates, Array]:
    x, free = engine.coordinates(theta)
    value, gradient, H = engine.derivatives(x)
    step = -solve_where(free, H, gradient[:, None])[:, 0]
    longest, length = REGION * jnp.sqrt((x * x).sum()), jnp.sqrt((step * step).sum())
    x = x + step * jnp.where(length > longest, longest / jnp.where(length > 0, length, 1.0), 1.0)
    nothing = jnp.zeros(())
    at = Solution(x, value, free, nothing > 0, nothing, jnp.zeros((), int), jnp.zeros((), int))
    est = assemble(engine, at)
    return _kept(est), is_regular(free, H) & jnp.isfinite(est.sigma)


def _kept(est: Estimates) -> Estimates:
    return Estimates._make(getattr(est, name) if name in FIELDS else None for name in Estimates._fields)


def _steps_of(stats: CrossProducts, theta: Array, reml: Array) -> tuple[Estimates, Array]:
    return jax.vmap(lambda one: _step(Engine(one, reml), theta))(stats)


_steps = jit(_steps_of, compiler_options=LANES)


def _in_basis(stats: CrossProducts) -> CrossProducts:
    """The same products of B data sets, their fixed effects to be those of the basis of X and nothing taken out."""
    eye = np.broadcast_to(np.eye(stats.XX.shape[-1]), stats.XX.shape)
    return replace(stats, X_basis=Basis(eye, eye, stats.X_basis.logdet), beta0=np.zeros_like(stats.beta0))


def _to_basis_of(rows: Rows, est: Estimates, stats: CrossProducts) -> Estimates:
    """Fixed effects and their covariance in the basis of all rows, where products have one of their own."""
    all_rows = rows.stats
    if (stats.X_basis.R_inv == all_rows.X_basis.R_inv).all():
        return est
    G = all_rows.X_basis.R @ stats.X_basis.R_inv
    shift = (stats.beta0 - all_rows.beta0) @ all_rows.X_basis.R.T
    return est._replace(beta=(G @ est.beta[:, :, None])[:, :, 0] + shift, vcov=G @ est.vcov @ np.swapaxes(G, 1, 2))


def _put(out: Without, units: np.ndarray, est: Estimates, delta: np.ndarray, result: np.ndarray) -> None:
    """Write the estimates of some units, where there are any, into those of all."""
    found = np.isin(result, SOLUTIONS)
    at = units[found]
    out.change[at], out.covariance[at] = est.beta[found] - delta, est.vcov[found]
    for name in ("sigma", "theta", "singular"):
        getattr(out, name)[at] = getattr(est, name)[found]
    for whole, part in zip(out.Sigma, est.Sigma, strict=True):
        whole[at] = part[found]
    out.result[units] = result


def entry_names(fitted: Fitted, names: list[str], diagonal: str, below: str) -> tuple[list[str], np.ndarray]:
    """Names of the entries of all terms' lower triangles, column by column, such as ``var_Days|Subject`` and
    ``cov_Days.Intercept|Subject``; and which of them a structure does not hold at zero.

    Args:
        names: of the terms. diagonal, below: what the names begin with.
    """
    entries, varies = [], []
    for group, term, structure in zip(names, fitted.labels.terms, fitted.stats.layout.structures, strict=True):
        for row, column in zip(*cov.triangle(structure.q), strict=True):
            own = row == column
            pair = term.effects[row] if own else f"{term.effects[row]}.{term.effects[column]}"
            entries.append(f"{diagonal if own else below}_{pair}|{group}")
            varies.append(own or not isinstance(structure, cov.Diagonal))
    return entries, np.array(varies)
