"""Counts: Poisson and negative binomial."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from mixjax.checks import DataError, warn
from mixjax.families import sampling
from mixjax.families.family import Derivatives, Expected, Family, as_array, check_numbers, clipped_log
from mixjax.families.links import chained, mean_derivatives
from mixjax.families.special import (
    as_floats,
    bounded_exp,
    gammaln,
    log1p_minus_share,
    log_factorial,
    log_rising,
    log_rising_by_log,
    of_counts,
    xlogy,
)
from mixjax.machine import Array, namespace


class Counts(Family):
    """Counts without an upper bound; a base of families."""

    links = ("log", "sqrt")
    support = "counts"

    def check(self, y: np.ndarray, size: np.ndarray | None, name: str) -> None:
        values = check_numbers(y, name)
        if (values < 0).any():
            raise DataError(f"{name}: counts cannot be negative, got {values.min():g}")
        if values.size and not values.any():
            raise DataError(f"{name}: every count is 0: no finite intercept makes that most likely")
        if (values != np.round(values)).any():
            warn(f"{name}: some counts are not whole; the {self.name} likelihood is continued by gamma functions. "
                 "Rates are counts with an offset: offset=log(exposure)")  # fmt: skip
        if (values > 2**53).any():
            warn(f"{name}: counts beyond 2^53 are not exact numbers")

    def _log_mean(self, eta: Array, y: Array) -> tuple[Array, Array]:
        """The mean, and ``y log mu`` (0 where y is 0)."""
        xp = namespace(eta, y)
        if self.link == "log":
            return bounded_exp(eta), y * eta
        # eta itself may be 0, where a mean of 0 gives counts of 0 for certain; no logarithm is taken there.
        nothing = eta == 0
        logs = 2 * xp.log(xp.abs(xp.where(nothing, 1.0, eta)))
        return eta * eta, xp.where(nothing, xp.where(y > 0, -xp.inf, 0 * y), y * logs)


class Poisson(Counts):
    """Poisson counts: variance mu. With link sqrt the mean is ``eta^2``, whatever eta's sign."""

    name = "poisson"

    @property
    def log_concave(self) -> bool:
        return True

    def density(self, eta: Array, y: Array, size: Array | None = None, psi: Sequence[Array] = ()) -> Array:
        _, eta, y = as_floats(eta, y)
        mu, product = self._log_mean(eta, y)
        return mu - product + (self.constant(y, size) if self.normalised else 0.0)

    def constant(self, y: Array, size: Array | None = None) -> Array:
        return log_factorial(y)

    def kernel(self, eta: Array, y: Array, size: Array | None = None, psi: Sequence[Array] = ()) -> tuple[Array, Array]:
        if self.link != "log":
            return super().kernel(eta, y, size, psi)
        _, eta, y = as_floats(eta, y)
        mu = bounded_exp(eta)
        return mu - y * eta, mu - y

    def derivatives(self, eta: Array, y: Array, size: Array | None = None, psi: Sequence[Array] = ()) -> Derivatives:
        xp, eta, y = as_floats(eta, y)
        c = self.density(eta, y)
        if self.link == "log":
            mu = bounded_exp(eta)
            curved = mu + 0 * y
            return Derivatives((c, mu - y, curved, curved, curved))
        nothing = eta == 0
        inverse = xp.where(nothing, 0.0, 1 / xp.where(nothing, 1.0, eta))
        share = y * inverse**2
        return Derivatives((c, 2 * eta - 2 * y * inverse, 2 + 2 * share, -4 * share * inverse, 12 * share * inverse**2))

    def expected(self, eta: Array, size: Array | None = None, psi: Sequence[Array] = ()) -> Expected:
        xp, eta = as_floats(eta)
        if self.link == "log":
            mu = bounded_exp(eta)
            return Expected(mu, (mu, mu))
        zero = xp.zeros_like(eta)
        return Expected(zero + 4, (zero, zero))

    def variance(self, mu: Array, size: Array | None = None, psi: Sequence[Array] = ()) -> Array:
        return mu

    def _mean_start(self, y: Array, size: Array | None) -> Array:
        return y + 0.1

    def deviance(self, eta: Array, y: Array, size: Array | None = None, psi: Sequence[Array] = ()) -> Array:
        _, eta, y = as_floats(eta, y)
        mu, product = self._log_mean(eta, y)
        return 2 * (xlogy(y, y) - product - (y - mu))

    def draw(self, key: Any, eta: Array, size: Array | None = None, psi: Sequence[Array] = ()) -> Array:
        return sampling.poisson(key, self.mean(jnp.asarray(eta)))

    def sample(
        self, rng: np.random.Generator, eta: np.ndarray, size: np.ndarray | None = None, psi: Sequence[Any] = ()
    ) -> np.ndarray:
        return sampling.poisson_at_once(rng, np.asarray(self.mean(eta)))

    def cdf(self, y: np.ndarray, eta: np.ndarray, size: np.ndarray | None, psi: Sequence[Any] = ()) -> np.ndarray:
        k, mu = np.floor(y), np.asarray(self.mean(eta))
        return np.where(k < 0, 0.0, special.gammaincc(np.maximum(k, 0.0) + 1.0, mu))


def _log_ways(y: Array, k: Array) -> tuple[Array]:
    return (gammaln(y + 1) - log_rising(y, k),)


def _log_ways_by_log(y: Array, k: Array) -> tuple[Array, Array, Array]:
    return (*_log_ways(y, k), *log_rising_by_log(y, k))


class NegativeBinomial(Counts):
    """Negative binomial counts with quadratic variance, NB2: ``mu + mu^2 / k``, size ``k = exp(psi)``.

    A Poisson count whose mean is multiplied by a gamma variable with mean 1 and variance ``1 / k``. With u = y / k and
    w = mu / k, ``c = (y + k) log(1 + w) - y log mu + log y! - log_rising(y, k)``: no term of it grows with k, so that
    a large size is the Poisson likelihood and its derivatives to rounding.
    """

    name = "nbinom"
    psi_names = ("size",)

    @property
    def log_concave(self) -> bool:
        return self.link == "log"

    def density(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        xp, eta, y, log_k = as_floats(eta, y, psi[0])
        k = xp.exp(log_k)
        (of_y,) = of_counts(_log_ways, y, k)
        mu, product = self._log_mean(eta, y)
        return (y + k) * xp.log1p(mu / k) - product + of_y

    def derivatives(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Derivatives:
        xp, eta, y, log_k = as_floats(eta, y, psi[0])
        k = xp.exp(log_k)
        of_y, rising1, rising2 = of_counts(_log_ways_by_log, y, k)
        mu, product = self._log_mean(eta, y)
        w, excess, A = mu / k, mu - y, y + k
        # s = mu / (mu + k), r = 1 - s, v = s r
        r = 1 / (1 + w)
        s = w * r
        v, share = r * s, log1p_minus_share(w)
        c = A * (share + s) - product + of_y
        bent, excess_v = k * share, excess * v
        c_psi = bent - y * s - rising1
        c_psi_psi = bent - excess_v - rising2
        if self.link == "log":
            v1, v2 = v * (r - s), v * (1 - 6 * v)
            mu_v, mu_v1, excess_v1, excess_v2 = mu * v, mu * v1, excess * v1, excess * v2
            by_eta = (c, excess * r, A * v, A * v1, A * v2)
            by_psi = (c_psi, excess_v, mu_v + excess_v1, mu_v + 2 * mu_v1 + excess_v2)
            twice = (c_psi_psi, -excess_v1, -(mu_v1 + excess_v2))
            return Derivatives(by_eta, (by_psi,), ((twice,),))
        nothing = mu == 0
        inverse = xp.where(nothing, 0.0, 1 / xp.where(nothing, 1.0, mu))
        q = 1 / (k + mu)
        A, y_mu = (y + k) * q * q, y * inverse * inverse
        means = (
            c,
            r * (1 - y * inverse),
            y_mu - A,
            2 * A * q - 2 * y_mu * inverse,
            6 * y_mu * inverse**2 - 6 * A * q * q,
        )
        f = r * q  # k / (k + mu)^2
        mean_psi = (c_psi, f * excess, f * (1 - 2 * excess * q), f * q * (6 * excess * q - 4))
        turn = (mu - k) * q
        mean_twice = (c_psi_psi, f * excess * turn, f * (turn + excess * q - 3 * excess * q * turn))
        t = mean_derivatives("sqrt", eta)
        return Derivatives(
            chained(means, t),
            (chained(mean_psi, t),),
            ((chained(mean_twice, t),),),
        )

    def expected(self, eta: Array, size: Array | None, psi: Sequence[Array]) -> Expected:
        xp, eta, log_k = as_floats(eta, psi[0])
        k = xp.exp(log_k)
        if self.link == "log":
            mu = bounded_exp(eta)
            r, s = 1 / (1 + mu / k), mu / (k + mu)
            v = r * s
            v1 = v * (r - s)
            return Expected(mu * r, (k * v, k * v1), ((mu * v, mu * (v + v1)),), ((-mu * v1,),))
        r = 1 / (1 + eta * eta / k)
        r1 = -2 * eta * r * r / k
        r2 = -2 * r * r / k + 2 * r1 * r1 / r
        by_psi = 4 * r * (1 - r)
        return Expected(4 * r, (4 * r1, 4 * r2), ((by_psi, 4 * r1 * (1 - 2 * r)),), ((by_psi * (1 - 2 * r),),))

    def variance(self, mu: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        xp = namespace(mu, psi[0])
        return mu + mu**2 * xp.exp(-psi[0])

    def _mean_start(self, y: Array, size: Array | None) -> Array:
        return y + (y == 0) / 6

    def psi_start(self, y: Array, mu: Array, size: Array | None = None) -> Array:
        y = as_array(y)
        return -clipped_log((((y - mu) ** 2 - mu) / mu**2).mean(0))

    def deviance(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        xp, eta, y, log_k = as_floats(eta, y, psi[0])
        k = xp.exp(log_k)
        mu, product = self._log_mean(eta, y)
        return 2 * (xlogy(y, y) - product - (y + k) * xp.log1p((y - mu) / (mu + k)))

    def draw(self, key: Any, eta: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        mu, k = jnp.broadcast_arrays(self.mean(jnp.asarray(eta)), jnp.exp(jnp.asarray(psi[0])))
        mixing, counts = jax.random.split(key)
        return sampling.poisson(counts, mu * jnp.exp(sampling.log_gamma(mixing, k, mu.shape) - jnp.log(k)))

    def sample(
        self, rng: np.random.Generator, eta: np.ndarray, size: np.ndarray | None, psi: Sequence[Any]
    ) -> np.ndarray:
        k = np.exp(psi[0])
        mu = np.asarray(self.mean(eta))
        return sampling.poisson_at_once(rng, mu * (rng.standard_gamma(k, mu.shape) / k))

    def cdf(self, y: np.ndarray, eta: np.ndarray, size: np.ndarray | None, psi: Sequence[Any]) -> np.ndarray:
        k, mu, own = np.floor(y), np.asarray(self.mean(eta)), np.exp(psi[0])
        return np.where(k < 0, 0.0, special.betainc(own, np.maximum(k, 0.0) + 1.0, 1.0 / (1.0 + mu / own)))
