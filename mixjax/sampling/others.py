"""Parameters beside covariances, sigma and fixed effects: of residuals, and of the family of a generalised model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betainc
from scipy.special import betainc as betainc_of_numbers
from scipy.special import betaincinv

from mixjax.machine import Array, namespace
from mixjax.sampling.prior import LKJ, Normal, Prior, log_of_logistic

# Coordinates of a correlation that a search starts from at most.
MOST_Z = 2.0


@dataclass(frozen=True)
class Other:
    """One parameter with its prior, and its coordinate without bounds. A JAX pytree.

    Attributes:
        prior: of the value. kind: static. ``"real"``: the coordinate is ``scale`` times the value. ``"logit"``: the
            value itself, the logit of the probability that is reported. ``"positive"``: the logarithm.
            ``"correlation"``: of residuals at the shortest distance in time, from ``low`` to 1; Fisher's z of where it
            lies between.
        root: of a correlation: what is reported is its power, so that it belongs to a distance of 1.
    """

    prior: Prior
    kind: str
    scale: Any = 1.0
    low: Any = -1.0
    root: Any = 1.0

    def value(self, z: Array) -> Array:
        """The parameter that the prior is of."""
        if self.kind in ("real", "logit"):
            return z / self.scale
        if self.kind == "positive":
            return namespace(z).exp(z)
        return self.low + (1.0 - self.low) * 0.5 * (1.0 + namespace(z).tanh(z))

    def reported(self, z: np.ndarray) -> np.ndarray:
        """The parameter as fits report it."""
        value: np.ndarray = self.value(z)
        if self.kind == "logit":
            return 0.5 * (1.0 + np.tanh(0.5 * value))
        return np.sign(value) * np.abs(value) ** self.root if self.kind == "correlation" else value

    def start(self, reported: float) -> float:
        """The coordinate of a parameter as fits report it, well inside."""
        if self.kind == "correlation":
            return self.near(float(np.sign(reported) * abs(reported) ** (1.0 / self.root)))
        return self.near(reported)

    def near(self, value: float) -> float:
        """The coordinate of a value, well inside."""
        if self.kind in ("real", "logit"):
            return float(value * self.scale)
        if self.kind == "positive":
            return float(np.log(value))
        u = np.clip((value - self.low) / (1.0 - self.low), 1e-9, 1.0 - 1e-9)
        return float(np.clip(0.5 * np.log(u / (1.0 - u)), -MOST_Z, MOST_Z))

    def log_density(self, z: Array) -> Array:
        """Of the coordinate."""
        if self.kind in ("real", "logit"):
            return self.prior.log_prob(z / self.scale) - jnp.log(self.scale)
        if self.kind == "positive":
            return self.prior.log_prob(jnp.exp(z)) + z
        width = 1.0 - jnp.asarray(self.low)
        # d value / d z = width u (1 - u) 2, u of logit 2 z.
        log_slope = jnp.log(2.0 * width) - jnp.logaddexp(0.0, 2.0 * z) - jnp.logaddexp(0.0, -2.0 * z)
        value = self.value(z)
        if isinstance(self.prior, Normal):
            return self.prior.log_prob(value) - self.prior.log_between(self.low, 1.0) + log_slope
        assert isinstance(self.prior, LKJ)
        eta = jnp.asarray(self.prior.eta)
        below = betainc(eta, eta, 0.5 * (1.0 + self.low))
        # (1 + value) / 2 is Beta(eta, eta), cut to what the correlation may be.
        logit = jnp.log1p(value) - jnp.log(width) + jnp.logaddexp(0.0, 2.0 * z)
        inside = log_of_logistic(logit, eta, eta) + jnp.logaddexp(0.0, logit) + jnp.logaddexp(0.0, -logit)
        return inside - jnp.log(2.0) - jnp.log1p(-below) + log_slope

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Coordinates ``(n,)`` drawn from the prior."""
        if self.kind != "correlation":
            drawn = self.prior.sample(rng, n)
            coordinates: np.ndarray = np.log(drawn) if self.kind == "positive" else drawn * self.scale
            return coordinates
        if isinstance(self.prior, Normal):
            value = self.prior.sample_between(rng, n, self.low, 1.0)
        else:
            assert isinstance(self.prior, LKJ)
            eta = float(self.prior.eta)
            below = betainc_of_numbers(eta, eta, 0.5 * (1.0 + self.low))
            value = 2.0 * betaincinv(eta, eta, below + (1.0 - below) * rng.random(n)) - 1.0
        u = np.clip((value - self.low) / (1.0 - self.low), np.finfo(float).tiny, 1.0 - 1e-16)
        found: np.ndarray = 0.5 * (np.log(u) - np.log1p(-u))
        return found


jax.tree_util.register_dataclass(Other, data_fields=["prior", "scale", "low", "root"], meta_fields=["kind"])
