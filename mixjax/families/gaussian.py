"""Normal responses, for links other than the identity; with that they are for tests against linear mixed models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import special

from mixjax.families import sampling
from mixjax.families.family import Derivatives, Expected, Family, as_array, check_numbers, clipped_log
from mixjax.families.links import chained, mean_derivatives
from mixjax.families.special import HALF_LOG_2PI, as_floats, bounded_exp
from mixjax.machine import Array, namespace


class Gaussian(Family):
    """Normal with standard deviation ``sigma = exp(psi)``."""

    name = "gaussian"
    links = ("identity", "log", "inverse")
    psi_names = ("sigma",)

    @property
    def log_concave(self) -> bool:
        return self.link == "identity"

    def _mean(self, eta: Array) -> Array:
        xp = namespace(eta)
        if self.link == "identity":
            return eta
        if self.link == "log":
            return bounded_exp(eta)
        return 1 / xp.where(eta == 0, 1.0, eta)

    def _without_mean(self, eta: Array, c: Array) -> Array:
        """c, infinite where eta has no mean."""
        xp = namespace(eta)
        return xp.where(eta == 0, xp.inf, c) if self.link == "inverse" else c

    def density(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        xp, eta, y, log_sigma = as_floats(eta, y, psi[0])
        c = HALF_LOG_2PI + log_sigma + 0.5 * ((y - self._mean(eta)) * xp.exp(-log_sigma)) ** 2
        return self._without_mean(eta, c)

    def derivatives(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Derivatives:
        xp, eta, y, log_sigma = as_floats(eta, y, psi[0])
        p = xp.exp(-2 * log_sigma)
        error = y - self._mean(eta)
        half, slope, bend = 0.5 * p * error**2, -p * error, p + 0 * error
        t, zero = mean_derivatives(self.link, eta), 0 * bend
        d, d1, d2, d3, d4 = chained((half, slope, bend, zero, zero), t)
        by_psi = (1 - 2 * d, -2 * d1, -2 * d2, -2 * d3)
        c = self._without_mean(eta, HALF_LOG_2PI + log_sigma + d)
        return Derivatives((c, d1, d2, d3, d4), (by_psi,), (((4 * d, 4 * d1, 4 * d2),),))

    def expected(self, eta: Array, size: Array | None, psi: Sequence[Array]) -> Expected:
        xp, eta, log_sigma = as_floats(eta, psi[0])
        p = xp.exp(-2 * log_sigma)
        t1, t2, t3, _ = mean_derivatives(self.link, eta)
        w, w1 = p * t1**2, 2 * p * t1 * t2
        return Expected(w, (w1, 2 * p * (t2**2 + t1 * t3)), ((-2 * w, -2 * w1),), ((4 * w,),))

    def variance(self, mu: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        return namespace(mu, psi[0]).exp(2 * as_array(psi[0])) + 0 * mu

    def _mean_start(self, y: Array, size: Array | None) -> Array:
        xp = namespace(y)
        if self.link == "identity":
            return y
        # R starts from y and refuses what the link cannot take; here that starts a tenth of the usual size above zero.
        least = 0.1 * xp.abs(y).mean(0) + 1e-8
        return xp.maximum(y, least) if self.link == "log" else xp.where(xp.abs(y) < least, least, y)

    def psi_start(self, y: Array, mu: Array, size: Array | None = None) -> Array:
        return 0.5 * clipped_log(((as_array(y) - mu) ** 2).mean(0))

    def deviance(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        _, eta, y = as_floats(eta, y)
        return self._without_mean(eta, (y - self._mean(eta)) ** 2)

    def draw(self, key: Any, eta: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        mu, sigma = jnp.broadcast_arrays(self.mean(jnp.asarray(eta)), jnp.exp(jnp.asarray(psi[0])))
        return mu + sigma * sampling.standard_normal(key, mu.shape)

    def sample(
        self, rng: np.random.Generator, eta: np.ndarray, size: np.ndarray | None, psi: Sequence[Any]
    ) -> np.ndarray:
        mu = np.asarray(self.mean(eta))
        drawn: np.ndarray = mu + np.exp(psi[0]) * rng.standard_normal(mu.shape)
        return drawn

    def cdf(self, y: np.ndarray, eta: np.ndarray, size: np.ndarray | None, psi: Sequence[Any]) -> np.ndarray:
        found: np.ndarray = special.ndtr((y - np.asarray(self.mean(eta))) * np.exp(-psi[0]))
        return found

    def check(self, y: np.ndarray, size: np.ndarray | None, name: str) -> None:
        check_numbers(y, name)
