"""A family of the user's: one function of a row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.families.family import Derivatives, Expected, Family, as_array, check_numbers, over_normal
from mixjax.families.special import as_floats
from mixjax.machine import Array, float64, jit, namespace

# Of the mean over a normal linear predictor: as many as the least smooth of the named links has.
NODES = 360


@dataclass(frozen=True, eq=False)
class Custom(Family):
    """A family given by its log density; the same only as itself.

    Attributes:
        loglik: ``(y, eta, size, psi)`` -> log density of one row, all numbers, psi ``(n_psi,)``, in JAX.
        mean_of: eta -> mean. drawing: ``(key, mean, size, psi)`` -> responses, or None.
        parameters: names of psi. start: psi to start from.
    """

    loglik: Callable[..., Any]
    mean_of: Callable[[Any], Any]
    drawing: Callable[..., Any] | None
    parameters: tuple[str, ...]
    start: tuple[float, ...]
    title: str

    links = ("custom",)
    has_expected = False
    # Not those of the base, which compares links.
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.title

    @property
    def psi_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.parameters

    @property
    def log_concave(self) -> bool:
        return False

    @cached_property
    def _programs(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The density of rows, and all derivatives of rows, each compiled once per type and number of rows."""

        def row(eta: Any, psi: Any, y: Any, size: Any) -> Any:
            return -self.loglik(y, eta, size, psi)

        by_eta = [row]
        for _ in range(4):
            by_eta.append(jax.grad(by_eta[-1]))

        def everything(*row_of: Any) -> Any:
            found = [slope(*row_of) for slope in by_eta]
            if not self.parameters:
                return found, [], []
            once = [jax.grad(slope, 1)(*row_of) for slope in by_eta[:4]]
            return found, once, [jax.hessian(slope, 1)(*row_of) for slope in by_eta[:3]]

        return jit(jax.vmap(row)), jit(jax.vmap(everything))

    def _rows(self, which: int, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Any:
        """A program on all rows as one axis, and its results in the rows' shape."""
        at_once = namespace(eta, y, size, *psi) is np
        _, eta, y, size, *psi = as_floats(eta, y, 1 if size is None else size, *psi)
        with float64(eta.dtype == np.float64) if at_once else nullcontext():
            eta, y, size, *psi = jnp.broadcast_arrays(*map(jnp.asarray, (eta, y, size, *psi)))
            shape = eta.shape
            stacked = jnp.stack([one.reshape(-1) for one in psi], -1) if psi else jnp.zeros((eta.size, 0), eta.dtype)
            found = self._programs[which](eta.reshape(-1), stacked, y.reshape(-1), size.reshape(-1))
            found = jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:]), found)
        return jax.tree.map(np.asarray, found) if at_once else found

    def density(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        return self._rows(0, eta, y, size, psi)

    def derivatives(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Derivatives:
        by_eta, once, twice = self._rows(1, eta, y, size, psi)
        every = range(self.n_psi)
        return Derivatives(
            tuple(by_eta),
            tuple(tuple(a[..., i] for a in once) for i in every),
            tuple(tuple(tuple(a[..., i, j] for a in twice) for j in every) for i in every),
        )

    def _unknown(self, what: str, cure: str) -> NoReturn:
        raise ValueError(f"family {self.name!r} is given by its log density alone, which does not say {what}: {cure}")

    def expected(self, eta: Array, size: Array | None, psi: Sequence[Array]) -> Expected:
        self._unknown("the expected curvature", "use curvature='observed'")

    def mean(self, eta: Array) -> Array:
        eta = as_array(eta)
        if namespace(eta) is not np:
            return self.mean_of(eta)
        with float64(eta.dtype == np.float64):
            return np.asarray(self.mean_of(jnp.asarray(eta)))

    def mean_slope(self, eta: Array) -> Array:
        return self._mean_derivative(1, eta)

    def mean_interval(self, mean: np.ndarray, error: np.ndarray, z: float) -> tuple[np.ndarray, np.ndarray]:
        """As far to each side, the link being unknown."""
        return mean - z * error, mean + z * error

    def _mean_derivative(self, order: int, eta: Array) -> Array:
        fun = self.mean_of
        for _ in range(order):
            fun = _slope_of(fun)
        eta = as_array(eta)
        if namespace(eta) is not np:
            return fun(eta)
        with float64(eta.dtype == np.float64):
            return np.asarray(fun(jnp.asarray(eta)))

    def variance(self, mu: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        self._unknown("the variance", "use quantile residuals, which need draws only")

    def eta_start(self, y: Array, size: Array | None = None) -> Array:
        """0: the link is unknown."""
        return 0 * as_array(y)

    def _mean_start(self, y: Array, size: Array | None) -> Array:
        return y

    def psi_start(self, y: Array, mu: Array, size: Array | None = None) -> Array:
        y = as_array(y)
        xp = namespace(y, mu)
        start = xp.asarray(self.start, dtype=y.dtype).reshape(-1, *(1,) * (y.ndim - 1))
        return start + xp.zeros((self.n_psi, *y.shape[1:]), y.dtype)

    def deviance(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        """Minus twice the log density: there is no saturated model to compare with."""
        return 2 * self.density(eta, y, size, psi)

    def draw(self, key: Any, eta: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        if self.drawing is None:
            self._unknown("how to draw", "give draw=, a function (key, mean, size, psi) -> responses, to custom()")
        return self.drawing(key, self.mean(jnp.asarray(eta)), size, psi)

    def sample(
        self, rng: np.random.Generator, eta: np.ndarray, size: np.ndarray | None, psi: Sequence[Any]
    ) -> np.ndarray:
        with float64():
            key = jax.random.key(int(rng.integers(2**63)))
            return np.asarray(self.draw(key, jnp.asarray(eta), size, psi), np.float64)

    def check(self, y: np.ndarray, size: np.ndarray | None, name: str) -> None:
        check_numbers(y, name)

    def natural(self, psi: Sequence[Array]) -> Array:
        """psi as it is: the names are those of unconstrained parameters."""
        return as_array(psi)

    def unconstrained(self, values: Sequence[float]) -> np.ndarray:
        psi = np.asarray(values, np.float64)
        if not np.isfinite(psi).all():
            raise ValueError(f"parameters of family {self.name!r} must be finite numbers, got {psi.tolist()}")
        return psi

    def natural_slope(self, psi: Sequence[Array]) -> Array:
        psi = as_array(psi)
        return namespace(psi).ones_like(psi)

    def integrated_mean(self, eta: Array, variance: Array) -> Array:
        """``E mean(eta + N(0, variance))`` by a trapezoidal rule over 8 standard deviations to each side."""
        xp = namespace(eta, variance)
        return over_normal(self.mean, xp.asarray(eta), xp.asarray(variance), NODES)

    def integrated_slopes(self, eta: Array, variance: Array) -> tuple[Array, Array]:
        xp = namespace(eta, variance)
        eta, variance = xp.asarray(eta), xp.asarray(variance)
        by_eta, bend = (over_normal(partial(self._mean_derivative, i), eta, variance, NODES) for i in (1, 2))
        return by_eta, 0.5 * bend


def _slope_of(fun: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """The derivative of an elementwise function."""
    return lambda x: jax.jvp(fun, (x,), (jnp.ones_like(x),))[1]
