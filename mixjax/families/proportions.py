"""Continuous proportions between 0 and 1: beta."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import special

from mixjax.checks import DataError
from mixjax.families import sampling
from mixjax.families.family import Derivatives, Expected, Family, as_array, check_numbers, clipped_log
from mixjax.families.links import chained, mean_derivatives, minus_logs, minus_logs_derivatives
from mixjax.families.special import as_floats, factorial_derivatives, factorial_error
from mixjax.machine import Array, namespace


class Beta(Family):
    """Beta with mean mu and precision ``k = exp(psi)``: ``a = mu k``, ``b = (1 - mu) k``, variance
    ``mu (1 - mu) / (1 + k)`` (Ferrari & Cribari-Neto 2004, J. Appl. Statist. 31, 799).

    With ``A = -log mu`` and ``B = -log(1 - mu)``, the functions of the link that a binomial response has, ``log
    Gamma(a) = log a! - log a = log a! + A - psi``: so nothing has a pole as a or b goes to 0. And with ``e(x) =
    log x! - x log x + x``, which is bounded by the logarithm of x, nothing cancels as k grows::

        c = e(a) + e(b) - e(k) - a (A + log y) - b (B + log(1 - y)) + log y + log(1 - y) + A + B - psi
    """

    name = "beta"
    links = ("logit", "probit", "cloglog", "cauchit")
    psi_names = ("precision",)
    support = "unit"

    @property
    def log_concave(self) -> bool:
        return False

    def density(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        xp, eta, y, log_k = as_floats(eta, y, psi[0])
        k = xp.exp(log_k)
        A, B = minus_logs(self.link, eta)
        a, b = k * xp.exp(-A), k * xp.exp(-B)
        log_y, log_rest = xp.log(y), xp.log1p(-y)
        errors = factorial_error(a) + factorial_error(b) - factorial_error(k)
        return errors - a * (A + log_y) - b * (B + log_rest) + log_y + log_rest + A + B - log_k

    def derivatives(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Derivatives:
        xp, eta, y, log_k = as_floats(eta, y, psi[0])
        k = xp.exp(log_k)
        A, B = minus_logs_derivatives(self.link, eta)
        a, b = k * xp.exp(-A[0]), k * xp.exp(-B[0])
        log_y, log_rest = xp.log(y), xp.log1p(-y)
        (e_a, p1, p2, p3, p4), f_a = factorial_derivatives(a)
        (e_b, q1, q2, q3, q4), f_b = factorial_derivatives(b)
        (e_k, *_), f_k = factorial_derivatives(k)
        match = -a * (A[0] + log_y) - b * (B[0] + log_rest)
        value = e_a + e_b - e_k + match + log_y + log_rest - log_k
        # Derivatives by mu of log a! + log b! - a log y - b log(1 - y).
        C1 = k * (p1 - q1 - log_y + log_rest)
        C2, C3, C4 = k**2 * (p2 + q2), k**3 * (p3 - q3), k**4 * (p4 + q4)
        # Those by psi, with k d/dk a = a: x f_1 and x^2 f_2 of each argument have lost x log x.
        first = a * f_a[0] + b * f_b[0] - k * f_k[0]
        second = a * a * f_a[1] + b * b * f_b[1] - k * k * f_k[1]
        slope = k * (a * p2 - b * q2)
        bend = k * k * (a * p3 + b * q3)
        C1_psi, C2_psi = C1 + slope, 2 * C2 + bend
        C1_twice = C1_psi + 2 * slope + k * (a * a * p3 - b * b * q3)
        C2_twice = 2 * C2_psi + 3 * bend + k * k * (a * a * p4 + b * b * q4)
        C3_psi = 3 * C3 + k**3 * (a * p4 - b * q4)
        t = mean_derivatives(self.link, eta)
        by_eta = chained((value, C1, C2, C3, C4), t)
        by_eta = tuple(one + u + v for one, u, v in zip(by_eta, A, B, strict=True))
        by_psi = chained((first + match - 1, C1_psi, C2_psi, C3_psi), t)
        twice = chained((first + second + match, C1_twice, C2_twice), t)
        return Derivatives(by_eta, (by_psi,), ((twice,),))

    def expected(self, eta: Array, size: Array | None, psi: Sequence[Array]) -> Expected:
        xp, eta, log_k = as_floats(eta, psi[0])
        k = xp.exp(log_k)
        A, B = minus_logs_derivatives(self.link, eta)
        a, b = k * xp.exp(-A[0]), k * xp.exp(-B[0])
        (_, _, p2, p3, p4), _ = factorial_derivatives(a)
        (_, _, q2, q3, q4), _ = factorial_derivatives(b)
        t1, t2, t3, _ = mean_derivatives(self.link, eta)
        # Curvature by mu without the poles 1/a^2 and 1/b^2, which are A'^2 and B'^2.
        C2, C3, C4 = k**2 * (p2 + q2), k**3 * (p3 - q3), k**4 * (p4 + q4)
        bend = k * k * (a * p3 + b * q3)
        C2_psi, C3_psi = 2 * C2 + bend, 3 * C3 + k**3 * (a * p4 - b * q4)
        C2_twice = 2 * C2_psi + 3 * bend + k * k * (a * a * p4 + b * b * q4)
        w = t1**2 * C2 + A[1] ** 2 + B[1] ** 2
        w1 = 2 * t1 * t2 * C2 + t1**3 * C3 + 2 * (A[1] * A[2] + B[1] * B[2])
        w2 = 2 * (t2**2 + t1 * t3) * C2 + 5 * t1**2 * t2 * C3 + t1**4 * C4
        w2 = w2 + 2 * (A[2] ** 2 + A[1] * A[3] + B[2] ** 2 + B[1] * B[3])
        by_psi = (t1**2 * C2_psi, 2 * t1 * t2 * C2_psi + t1**3 * C3_psi)
        return Expected(w, (w1, w2), (by_psi,), ((t1**2 * C2_twice,),))

    def variance(self, mu: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        return mu * (1 - mu) / (1 + namespace(mu, psi[0]).exp(psi[0]))

    def _mean_start(self, y: Array, size: Array | None) -> Array:
        return namespace(y).clip(y, 1e-6, 1 - 1e-6)

    def psi_start(self, y: Array, mu: Array, size: Array | None = None) -> Array:
        y = as_array(y)
        share = ((y - mu) ** 2 / (mu * (1 - mu))).mean(0)
        return -clipped_log(share / namespace(share).maximum(1 - share, 1e-3))

    def deviance(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        """Twice the distance of the log density to that with mean y, as in R's betareg; no row is fitted better than
        by its own best mean, so that the distance has no sign."""
        xp, eta, y = as_floats(eta, y)
        logit = Beta("logit")
        own = xp.log(y) - xp.log1p(-y)
        return 2 * xp.abs(self.density(eta, y, None, psi) - logit.density(own, y, None, psi))

    def draw(self, key: Any, eta: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        A, B = minus_logs(self.link, jnp.asarray(eta))
        A, B, k = jnp.broadcast_arrays(A, B, jnp.exp(jnp.asarray(psi[0])))
        one, other = jax.random.split(key)
        odds = sampling.log_gamma(one, k * jnp.exp(-A), A.shape) - sampling.log_gamma(other, k * jnp.exp(-B), A.shape)
        return jnp.clip(jax.nn.sigmoid(odds), 1e-300, 1 - 2.0**-53)

    def sample(
        self, rng: np.random.Generator, eta: np.ndarray, size: np.ndarray | None, psi: Sequence[Any]
    ) -> np.ndarray:
        A, B = minus_logs(self.link, np.asarray(eta))
        k = np.exp(psi[0])
        a, b = (np.maximum(k * np.exp(-own), 1e-300) for own in (A, B))
        drawn: np.ndarray = np.clip(rng.beta(a, b), 1e-300, 1 - 2.0**-53)
        return drawn

    def cdf(self, y: np.ndarray, eta: np.ndarray, size: np.ndarray | None, psi: Sequence[Any]) -> np.ndarray:
        A, B = minus_logs(self.link, np.asarray(eta))
        a, b = (np.maximum(np.exp(psi[0] - own), 1e-300) for own in (A, B))
        found: np.ndarray = special.betainc(a, b, np.clip(y, 0.0, 1.0))
        return found

    def check(self, y: np.ndarray, size: np.ndarray | None, name: str) -> None:
        values = check_numbers(y, name)
        if ((values < 0) | (values > 1)).any():
            wrong = values[(values < 0) | (values > 1)][0]
            raise DataError(
                f"{name}: a beta response lies between 0 and 1, got {wrong:g}; divide percentages by 100, and give "
                "counts to the binomial family"
            )
        if np.isin(values, (0, 1)).any():
            raise DataError(
                f"{name}: {int(np.isin(values, (0, 1)).sum())} responses are exactly 0 or 1, which a beta response "
                "never is; zero-one inflated models are not here. Counts of trials belong to the binomial family"
            )
