"""The closed form of many data sets, in lanes, last axis: :mod:`mixjax.engine.engine` is that of one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import jax

from mixjax.bases import Basis
from mixjax.design import AnyArray
from mixjax.engine import curvature
from mixjax.engine.coordinates import coordinates_in
from mixjax.engine.curvature import AtSigma, Slopes
from mixjax.engine.moments import Moments
from mixjax.engine.profiled import Profiled
from mixjax.engine.turned import turned
from mixjax.machine import Array
from mixjax.products.sums import Layout


class Bases(NamedTuple):
    """Back-transformation to the user's columns, lanes last or 1: X's ``R_inv``, ``beta0``, each Z's basis."""

    X_R_inv: AnyArray
    beta0: AnyArray
    Z: tuple[Basis, ...]


@dataclass(frozen=True)
class Lanes:
    """The criterion of B data sets of one structure. A JAX pytree; NumPy's arrays are worked on by NumPy.

    Attributes:
        moments, bases: of the lanes, or with a last axis of 1 where they share. reml: one for all; may be traced.
    """

    moments: Moments
    bases: Bases
    reml: Array | bool

    @property
    def layout(self) -> Layout:
        """The structure."""
        return self.moments.layout

    @property
    def n_fixed(self) -> int:
        """Number of fixed effects."""
        n: int = self.moments.UU.shape[0] - sum(q * m for _, q, m in self.moments.dense)
        return n

    def evaluate(self, x: Array) -> tuple[Array, Array, Array]:
        """Value ``(B,)``, gradient ``(k, B)`` and Hessian ``(k, k, B)`` at ``x (k, B)``; not for differentiation."""
        return curvature.value_gradient_hessian(x, self.moments, self.reml)

    def profiled(self, x: Array) -> Profiled:
        """The profiled likelihood at ``x (k, B)``."""
        return curvature.profile_lanes(x, self.moments, self.reml)

    def modes(self, x: Array) -> tuple[Array, ...]:
        """Per term the conditional modes ``(q, m, B)`` of its effects in the basis of Z, at ``x (k, B)`` and the
        profiled fixed effects; not of moments by class."""
        _, by_factor = curvature.profile_and_modes(x, self.moments, self.reml)
        return tuple(by_factor[place.factor][place.start : place.start + place.q] for place in self.layout.terms)

    def slopes(self, x: Array) -> Slopes:
        """How the fixed effects' covariance and the residual sum of squares move with ``x (k, B)``."""
        return curvature.slopes_of(x, self.moments, self.reml)

    def deviance_at_sigma(self, factors: list[Array], variance: Callable[[Array], Array]) -> AtSigma:
        """The ML deviance with sigma given; see :func:`~mixjax.engine.curvature.deviance_at_sigma`."""
        return curvature.deviance_at_sigma(factors, self.moments, variance)

    def coordinates(self, theta: Array) -> tuple[Array, Array]:
        """``x (k, B)`` of estimates ``theta``, and which of them are free there."""
        return coordinates_in(theta, self.layout, [basis.R for basis in self.bases.Z])

    def turned(self, v: Array, s: Array) -> Lanes:
        """With the basis Q of X replaced by ``Q (I - v v')`` and y by ``y + s Q v``: ``v (p, B)``, ``s (B,)``."""
        return replace(self, moments=turned(self.moments, v, s)) if len(v) else self


jax.tree_util.register_dataclass(Lanes, data_fields=["moments", "bases", "reml"], meta_fields=[])
