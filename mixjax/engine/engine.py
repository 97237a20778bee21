"""The one thing to ask of a model: the criterion of its data and all that follows from it, whoever computes it.

What serves which model is decided here: NumPy at once (:class:`AtOnce`), closed forms that XLA compiles, or derivatives
of the elimination. Coordinates x are the optimiser's, in the bases of the products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from mixjax import covariance as cov
from mixjax.engine import average_information, curvature
from mixjax.engine.case_slopes import CaseSlopes, case_slopes
from mixjax.engine.coordinates import coordinates_of
from mixjax.engine.criterion import in_bases, profile_out
from mixjax.engine.crossed import AnyMoments, crossed_moments
from mixjax.engine.curvature import Slopes
from mixjax.engine.elimination import arrange
from mixjax.engine.incidence import Incidence, incidence
from mixjax.engine.modes import conditional_modes
from mixjax.engine.moments import Moments, moments_of
from mixjax.engine.profiled import Profiled
from mixjax.engine.quadratic_forms import Expected, expected_of
from mixjax.engine.whole import Whole, whole
from mixjax.machine import Array, compiled, float64, memory_kept, namespace, silently
from mixjax.optimise.newton import by_differentiation
from mixjax.products.rows import Rows
from mixjax.products.sizes import has_closed_form, has_many_directions, is_small
from mixjax.products.sums import CrossProducts, pad
from mixjax.waiting import Waiting

T = TypeVar("T")


@dataclass(frozen=True)
class Engine:
    """The criterion of one data set, by JAX. A JAX pytree.

    Attributes:
        stats: cross-products of one response. reml: may be traced.
        where: what :func:`~mixjax.engine.incidence.incidence` found in a large crossed design, else None.
    """

    stats: CrossProducts
    reml: Array | bool
    where: Incidence | None = None

    @property
    def is_vast(self) -> bool:
        """The variance parameters are so many that the Hessian is by average information."""
        return False

    def run(self, fun: Callable[..., T], *args: Any) -> T:
        """``fun(engine, *args)`` in double precision, NumPy's arrays out; by a program that is compiled once per
        structure. ``fun`` is a function of a module, the same for all models."""
        what = f"{fun.__name__} of {int(self.stats.n)} rows; the first time, a program is compiled for their structure"
        with Waiting(what), float64():
            found: T = jax.tree.map(np.asarray, compiled(fun)(self, *args))
            return found

    def evaluate(self, x: Array) -> tuple[Array, Array, Array]:
        """Value ``(1,)``, gradient ``(k, 1)`` and Hessian ``(k, k, 1)`` at ``x (k, 1)``; not for differentiation."""
        if self.moments is not None:
            return curvature.value_gradient_hessian(x, self.moments, jnp.asarray(self.reml))
        return by_differentiation(lambda x: self.profiled(x).criterion)(x)

    def derivatives(self, x: Array) -> tuple[Array, Array, Array]:
        """Value, gradient ``(k,)`` and Hessian ``(k, k)`` at ``x (k,)``."""
        value, gradient, H = self.evaluate(x[:, None])
        return value[0], gradient[:, 0], H[:, :, 0]

    def profiled(self, x: Array) -> Profiled:
        """The profiled likelihood at ``x (k,)``; differentiable to any order, by the products too."""
        if self.where is not None:
            return curvature.profile_lanes(x[:, None], self.moments, jnp.asarray(self.reml)).lane()
        return profile_out(self._factors(x), self._blocks, self.stats, self.reml)

    def solution(self, x: Array) -> tuple[Profiled, list[Array]]:
        """The profiled likelihood at ``x (k,)``, and per term the modes ``(q, m)`` of its effects in the basis of Z."""
        if self.where is not None:
            return self._closed_solution(x)
        return self.profiled(x), conditional_modes(self._factors(x), self.stats)

    def slopes(self, x: Array) -> Slopes:
        """How the fixed effects' covariance and the residual sum of squares move with ``x (k,)``."""

        def parts(x: Array) -> tuple[tuple[Array, Array], Profiled]:
            at = self.profiled(x)
            return (at.XX_inverse, jnp.log(at.rss)), at

        (moves, log_rss), at = jax.jacfwd(parts, has_aux=True)(x)
        return Slopes(at, self.derivatives(x)[2], jnp.moveaxis(moves, -1, 0), log_rss)

    def coordinates(self, theta: Array) -> tuple[Array, Array]:
        """``x (k,)`` of estimates ``theta``, and which of them are free there, ``(k,)``."""
        return coordinates_of(theta, self.stats)

    def whole(self, theta: Array) -> Whole:
        """``Z'H^{-1}Z`` and ``Z'H^{-1}X`` of all effects."""
        stats = self.stats
        theta = namespace(theta, stats.XX, stats.yy).asarray(theta, stats.XX.dtype)
        return whole(in_bases(cov.lambdas_of_theta(theta, stats.layout.qs), stats), stats)

    @cached_property
    def moments(self) -> Any:
        """Moments of the data for the closed form; None where there is none."""
        if self.where is not None:
            return crossed_moments(self.stats, self.where)
        return moments_of(self.stats) if has_closed_form(self.stats) else None

    @cached_property
    def expected(self) -> Expected:
        """What quadratic forms of the design expect; no response changes it."""
        return expected_of(self.stats)

    def _closed_solution(self, x: Array) -> tuple[Profiled, list[Array]]:
        lanes, by_factor = curvature.profile_and_modes(x[:, None], self.moments, self.reml)
        places = self.stats.layout.terms
        return lanes.lane(), [by_factor[p.factor][p.start : p.start + p.q, :, 0] for p in places]

    def _factors(self, x: Array) -> list[Array]:
        return cov.factors_of(x, self.stats.layout.structures)

    @cached_property
    def _blocks(self) -> Any:
        return arrange(self.stats)


@dataclass(frozen=True)
class AtOnce(Engine):
    """The same by NumPy, all in closed form: nothing is compiled, and nothing padded. Of NumPy's arrays, in double
    precision, and models that :func:`~mixjax.products.sizes.is_small` says yes to, or that have an incidence."""

    def run(self, fun: Callable[..., T], *args: Any) -> T:
        with silently(), memory_kept() if self.where is not None else nullcontext():
            return fun(self, *args)

    def evaluate(self, x: Array) -> tuple[Array, Array, Array]:
        if self.is_vast:
            return average_information.evaluate(x, self._small, bool(self.reml))
        return curvature.value_gradient_hessian(x, self.moments, self.reml)

    def profiled(self, x: Array) -> Profiled:
        return curvature.profile_lanes(x[:, None], self.moments, self.reml).lane()

    def solution(self, x: Array) -> tuple[Profiled, list[Array]]:
        return self._closed_solution(x)

    def slopes(self, x: Array) -> Slopes:
        if self.is_vast:
            found = average_information.slopes(x[:, None], self._small, bool(self.reml))
        else:
            found = curvature.slopes_of(x[:, None], self.moments, self.reml)
        lanes, H, moves, log_rss = found
        return Slopes(lanes.lane(), H[..., 0], moves[..., 0], log_rss[..., 0])

    def case_slopes(self, x: Array, rows: Rows) -> CaseSlopes:
        """Derivatives at ``x (k,)`` by the case weight of every row; not of large crossed designs."""
        return case_slopes(x, self._small, bool(self.reml), rows)

    @cached_property
    def is_vast(self) -> bool:
        return self.where is None and has_many_directions(self.stats)

    @property
    def _small(self) -> Moments:
        assert isinstance(self.moments, Moments)
        return self.moments

    @cached_property
    def moments(self) -> AnyMoments:
        return moments_of(self.stats) if self.where is None else crossed_moments(self.stats, self.where)


for kind in (Engine, AtOnce):
    jax.tree_util.register_dataclass(kind, data_fields=["stats", "reml", "where"], meta_fields=[])


def engine_of(stats: CrossProducts, reml: bool, at_once: bool = True) -> Engine:
    """The engine of a data set, of numbers: NumPy where the model is small or its rows are sparse, else JAX, on padded
    products.

    Args:
        stats: of one response. at_once: False for JAX whatever the size.
    """
    stats = stats if stats.classes is None else replace(stats, classes=None)
    numpys = at_once and namespace(*jax.tree.leaves(stats)) is np and np.asarray(stats.yy).dtype == np.float64
    if numpys and is_small(stats):
        return AtOnce(stats, bool(reml))
    stats = pad(stats)
    where = incidence(stats, at_once=numpys)
    if numpys and where is not None and where.mesh is None:
        return AtOnce(stats, bool(reml), where)
    return Engine(stats, np.bool_(reml), where)


def engines_of(stats: CrossProducts, axes: CrossProducts, reml: bool) -> Iterator[Engine]:
    """One engine by JAX for each of B data sets; what meets in them is looked up once where that is the same.

    Args:
        axes: 0 where an array has the data sets in front, -1 where they share it.
    """
    where, pairs = None, None
    for i in range(len(stats.yy)):
        one = jax.tree.map(lambda a, axis, i=i: np.asarray(a)[i] if axis == 0 else a, stats, axes)
        # Levels keep their places, and those that no longer meet have products of zero there.
        if pairs is None or any((a.cols != b.cols).any() for a, b in zip(pairs, one.pairs, strict=True)):
            where, pairs = incidence(one), one.pairs
        yield Engine(one, np.bool_(reml), where)
