"""One Newton step of the criterion of each of many data sets, from one and the same theta."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.engine.coordinates import is_regular, solve_where
from mixjax.engine.engine import Engine, engines_of
from mixjax.engine.incidence import incidence
from mixjax.estimation.at_once import step_lanes
from mixjax.estimation.batch import Batch, batch_axes
from mixjax.estimation.blocks import parts_of
from mixjax.estimation.choice import EngineName, chosen_engine
from mixjax.estimation.estimate import Estimates, assemble
from mixjax.estimation.results import Results
from mixjax.estimation.search import REGION
from mixjax.machine import LANES, Array, compiled, float64, jit
from mixjax.optimise.newton import Solution
from mixjax.products.sums import CrossProducts

# What is kept of a step.
FIELDS = ("theta", "beta", "sigma", "Sigma", "vcov", "singular", "result")
# Data sets that take their step in one call.
TOGETHER = 64


def newton_steps(
    stats: CrossProducts, theta: np.ndarray, reml: bool, engine: EngineName = "auto"
) -> tuple[Estimates, np.ndarray]:
    """Where one Newton step leads, in the optimiser's coordinates, among those that are free at ``theta``.

    It is no longer than a search's first. What follows from the coordinates is exact at the end of the step.

    Args:
        stats: of B data sets, in a leading axis. theta: ``(k,)``.

    Returns:
        ``theta, beta, sigma, Sigma, vcov, singular`` with a leading axis B, and ``(B,)`` whether the Hessian allows
        for it.
    """
    if chosen_engine(stats, len(stats.yy), engine) == "numpy":
        batch = Batch(stats, at_once=True)
        results, sound = Results(batch, FIELDS), np.zeros(batch.B, bool)
        for at in parts_of(batch):
            fits, sound[at] = step_lanes(batch.lanes(at, reml), theta)
            results.put(at, fits)
        return results.estimates(), sound
    with float64():
        if incidence(jax.tree.map(lambda a: np.asarray(a)[0], stats)) is not None:
            parts = [jax.device_get(compiled(_step)(e, theta)) for e in engines_of(stats, batch_axes(stats), reml)]
            found: tuple[Estimates, np.ndarray] = jax.tree.map(lambda *leaves: np.stack(leaves), *parts)
        else:
            found = _in_blocks(stats, lambda some: _steps(some, theta, np.bool_(reml)))
        return found


def _in_blocks(stats: CrossProducts, call: Callable[[CrossProducts], Any]) -> Any:
    """A function of products of TOGETHER data sets, in as many calls as B of them need."""
    parts, B = [], len(stats.yy)
    for first in range(0, B, TOGETHER):
        # One shape for all calls: the last lane stands for those that are none.
        at = np.minimum(np.arange(first, first + TOGETHER), B - 1)
        parts.append(jax.device_get(call(jax.tree.map(lambda leaf, at=at: leaf[at], stats))))
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
