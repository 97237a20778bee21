"""Responses above zero: gamma and inverse Gaussian."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from mixjax.checks import DataError
from mixjax.families import sampling
from mixjax.families.family import Derivatives, Expected, Family, as_array, check_numbers, clipped_log
from mixjax.families.special import HALF_LOG_2PI, as_floats, bounded_exp, stirling_error
from mixjax.machine import Array, namespace

# A draw that is smaller than any number is the smallest of them: responses of these families are above zero.
TINY = 1e-300


class Positive(Family):
    """A response above zero with a dispersion ``phi = exp(psi)``; a base of families.

    ``c = (unit deviance) / (2 phi)`` and what does not depend on eta, so that all derivatives by eta are proportional
    to the precision ``1 / phi``.
    """

    psi_names = ("dispersion",)
    support = "positive"

    @abstractmethod
    def _unit(self, eta: Array, y: Array) -> tuple[Array, ...]:
        """Half the unit deviance and four derivatives by eta; infinite, with finite derivatives, where eta has no
        mean."""

    @abstractmethod
    def _unit_expected(self, eta: Array) -> tuple[Array, Array, Array]:
        """Expected second derivative of that, and two derivatives."""

    @abstractmethod
    def _constant(self, y: Array, log_phi: Array) -> tuple[Array, Array, Array]:
        """What does not depend on eta, and two derivatives by psi."""

    def density(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        xp, eta, y, log_phi = as_floats(eta, y, psi[0])
        return self._unit(eta, y)[0] * xp.exp(-log_phi) + self._constant(y, log_phi)[0]

    def derivatives(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Derivatives:
        xp, eta, y, log_phi = as_floats(eta, y, psi[0])
        alpha = xp.exp(-log_phi)
        d, d1, d2, d3, d4 = (alpha * one for one in self._unit(eta, y))
        constant, slope, bend = self._constant(y, log_phi)
        return Derivatives((d + constant, d1, d2, d3, d4), ((slope - d, -d1, -d2, -d3),), (((bend + d, d1, d2),),))

    def expected(self, eta: Array, size: Array | None, psi: Sequence[Array]) -> Expected:
        xp, eta, log_phi = as_floats(eta, psi[0])
        w, w1, w2 = (xp.exp(-log_phi) * one for one in self._unit_expected(eta))
        return Expected(w, (w1, w2), ((-w, -w1),), ((w,),))

    def _mean_start(self, y: Array, size: Array | None) -> Array:
        return y

    def psi_start(self, y: Array, mu: Array, size: Array | None = None) -> Array:
        y = as_array(y)
        return clipped_log(((y - mu) ** 2 / self.variance(mu, None, (0.0,))).mean(0))

    def deviance(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        _, eta, y = as_floats(eta, y)
        return 2 * self._unit(eta, y)[0]

    def check(self, y: np.ndarray, size: np.ndarray | None, name: str) -> None:
        values = check_numbers(y, name)
        if (values <= 0).any():
            raise DataError(
                f"{name}: {int((values <= 0).sum())} of {values.size} responses are zero or negative, and those of "
                f"family {self.name!r} are above zero; leave these rows out, or model zeros by themselves (binomial)"
            )


class Gamma(Positive):
    """Gamma: mean mu, variance ``phi mu^2``; the shape is ``1 / phi``.

    With ``t = log y - log mu`` half the unit deviance is ``exp(t) - 1 - t``, and ``log Gamma(shape) - shape log shape +
    shape`` is Stirling's remainder: no term grows beyond ``1 / phi`` times the deviance, as phi goes to 0.
    """

    name = "gamma"
    links = ("log", "inverse")

    @property
    def log_concave(self) -> bool:
        return True

    def _unit(self, eta: Array, y: Array) -> tuple[Array, ...]:
        xp = namespace(eta, y)
        if self.link == "log":
            t = xp.log(y) - eta
            ratio = bounded_exp(t)
            return _exp_remainder(t), 1 - ratio, ratio, -ratio, ratio
        inside = eta > 0
        m = xp.where(inside, eta, 1.0)
        inverse = 1 / m
        value = xp.where(inside, _exp_remainder(xp.log(y) + xp.log(m)), xp.inf)
        square = inverse * inverse + 0 * y
        return value, y - inverse, square, -2 * square * inverse, 6 * square * inverse * inverse

    def _unit_expected(self, eta: Array) -> tuple[Array, Array, Array]:
        xp = namespace(eta)
        if self.link == "log":
            one = xp.ones_like(eta)
            return one, 0 * one, 0 * one
        inverse = 1 / xp.where(eta > 0, eta, 1.0)
        return inverse**2, -2 * inverse**3, 6 * inverse**4

    def _constant(self, y: Array, log_phi: Array) -> tuple[Array, Array, Array]:
        xp = namespace(y, log_phi)
        alpha = xp.exp(-log_phi)
        first = alpha * stirling_error(alpha, 1)
        value = xp.log(y) + HALF_LOG_2PI + 0.5 * log_phi + stirling_error(alpha)
        return value, 0.5 - first, first + alpha * alpha * stirling_error(alpha, 2)

    def variance(self, mu: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        return namespace(mu, psi[0]).exp(psi[0]) * mu**2

    def draw(self, key: Any, eta: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        mu, phi = jnp.broadcast_arrays(self.mean(jnp.asarray(eta)), jnp.exp(jnp.asarray(psi[0])))
        return jnp.maximum(mu * jnp.exp(sampling.log_gamma(key, 1 / phi, mu.shape) + jnp.log(phi)), TINY)

    def sample(
        self, rng: np.random.Generator, eta: np.ndarray, size: np.ndarray | None, psi: Sequence[Any]
    ) -> np.ndarray:
        mu, phi = np.asarray(self.mean(eta)), np.exp(psi[0])
        drawn: np.ndarray = np.maximum(mu * phi * rng.standard_gamma(1.0 / phi, mu.shape), TINY)
        return np.where(mu > 0, drawn, np.nan)

    def cdf(self, y: np.ndarray, eta: np.ndarray, size: np.ndarray | None, psi: Sequence[Any]) -> np.ndarray:
        mu, shape = np.asarray(self.mean(eta)), np.exp(-psi[0])
        return np.where(mu > 0, special.gammainc(shape, shape * np.maximum(y, 0.0) / np.abs(mu)), np.nan)


class InverseGaussian(Positive):
    """Inverse Gaussian: mean mu, variance ``phi mu^3``. With ``m = 1 / mu`` half the unit deviance is
    ``y (m - 1/y)^2 / 2``."""

    name = "inverse_gaussian"
    links = ("log", "inverse", "1/mu^2")

    @property
    def log_concave(self) -> bool:
        return self.link != "log"

    def _unit(self, eta: Array, y: Array) -> tuple[Array, ...]:
        xp = namespace(eta, y)
        if self.link == "log":
            m = bounded_exp(-eta)
            square = y * m * m
            return 0.5 * (m * y - 1) ** 2 / y, m - square, 2 * square - m, m - 4 * square, 8 * square - m
        inside = eta > 0
        safe = xp.where(inside, eta, 1.0)
        if self.link == "inverse":
            value, zero = 0.5 * (safe * y - 1) ** 2 / y, 0 * (safe + y)
            return xp.where(inside, value, xp.inf), y * safe - 1, y + zero, zero, zero
        m = xp.sqrt(safe)
        value, power = 0.5 * (m * y - 1) ** 2 / y, 1 / m
        second = 0.25 * power**3 + 0 * y
        third = -1.5 * second / safe
        return xp.where(inside, value, xp.inf), 0.5 * (y - power), second, third, -2.5 * third / safe

    def _unit_expected(self, eta: Array) -> tuple[Array, Array, Array]:
        xp = namespace(eta)
        if self.link == "log":
            m = bounded_exp(-eta)
            return m, -m, m
        inverse = 1 / xp.where(eta > 0, eta, 1.0)
        if self.link == "inverse":
            return inverse, -(inverse**2), 2 * inverse**3
        w = 0.25 * inverse**1.5
        return w, -1.5 * w * inverse, 3.75 * w * inverse**2

    def _constant(self, y: Array, log_phi: Array) -> tuple[Array, Array, Array]:
        xp = namespace(y, log_phi)
        value = HALF_LOG_2PI + 1.5 * xp.log(y) + 0.5 * log_phi
        return value, 0.5 + 0 * value, 0 * value

    def variance(self, mu: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        return namespace(mu, psi[0]).exp(psi[0]) * mu**3

    def draw(self, key: Any, eta: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        """By Michael, Schucany & Haas (1976, The American Statistician 30, 88), with a root that does not cancel."""
        mu, phi = jnp.broadcast_arrays(self.mean(jnp.asarray(eta)), jnp.exp(jnp.asarray(psi[0])))
        normal, which = jax.random.split(key)
        q = 0.5 * mu * phi * sampling.standard_normal(normal, mu.shape) ** 2
        ratio = 1 + q + jnp.sqrt(q * (2 + q))  # mu over the smaller root
        smaller = sampling.standard_uniform(which, mu.shape) * (1 + 1 / ratio) <= 1
        return jnp.maximum(mu * jnp.where(smaller, 1 / ratio, ratio), TINY)

    def sample(
        self, rng: np.random.Generator, eta: np.ndarray, size: np.ndarray | None, psi: Sequence[Any]
    ) -> np.ndarray:
        mu = np.asarray(self.mean(eta))
        drawn: np.ndarray = np.maximum(rng.wald(np.where(mu > 0, mu, 1.0), np.exp(-psi[0])), TINY)
        return np.where(mu > 0, drawn, np.nan)

    def cdf(self, y: np.ndarray, eta: np.ndarray, size: np.ndarray | None, psi: Sequence[Any]) -> np.ndarray:
        """Schrodinger's, with ``exp(2 / (phi mu))`` in the scaled error function: nothing overflows."""
        mu = np.asarray(self.mean(eta))
        y = np.maximum(y, TINY)
        root = np.exp(-0.5 * psi[0]) / np.sqrt(y)
        below, above = root * (y / mu - 1.0), root * (y / mu + 1.0)
        found = special.ndtr(below) + 0.5 * np.exp(-0.5 * below**2) * special.erfcx(above / np.sqrt(2.0))
        return np.where(mu > 0, found, np.nan)


def _exp_remainder(t: Array) -> Array:
    """``exp(t) - 1 - t``."""
    xp = namespace(t)
    most = float(np.log(np.finfo(t.dtype).max)) - 1.0
    return xp.expm1(xp.minimum(t, most)) - t
