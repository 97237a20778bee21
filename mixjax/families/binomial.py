"""Binomial responses: counts of successes in trials, and single 0/1 outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from scipy import special

from mixjax.checks import DataError, warn
from mixjax.families import sampling
from mixjax.families.family import Derivatives, Expected, Family, check_numbers
from mixjax.families.links import logit_failure, minus_logs, minus_logs_derivatives
from mixjax.families.special import as_floats, gammaln, log_factorial, xlogy
from mixjax.machine import Array


class Binomial(Family):
    """Successes in ``size`` trials (None: one) with probability ``F(eta)``.

    ``c = y a(eta) + (size - y) b(eta) - log choose(size, y)`` with ``a = -log F`` and ``b = -log(1 - F)``. Counts need
    not be whole: the binomial coefficient is that of gamma functions. With size None it is left out, being 1, so that
    the derivative by y, as a real number, is ``a - b``.
    """

    name = "binomial"
    links = ("logit", "probit", "cloglog", "cauchit")
    support = "trials"

    @property
    def log_concave(self) -> bool:
        return self.link != "cauchit"

    def density(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array] = ()) -> Array:
        _, eta, y, size = as_floats(eta, y, size)
        a, b = minus_logs(self.link, eta)
        return y * a + _failures(y, size) * b + self._constant(y, size)

    def derivatives(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array] = ()) -> Derivatives:
        _, eta, y, size = as_floats(eta, y, size)
        a, b = minus_logs_derivatives(self.link, eta)
        if self.link == "logit":  # a - b is -eta: one product a derivative less
            n = 1.0 if size is None else size
            c = n * b[0] - y * eta + self._constant(y, size)
            return Derivatives((c, n * b[1] - y, n * b[2], n * b[3], n * b[4]))
        failures = _failures(y, size)
        c, *others = (y * one + failures * other for one, other in zip(a, b, strict=True))
        return Derivatives((c + self._constant(y, size), *others))

    def constant(self, y: Array, size: Array | None) -> Array | float:
        if size is None:
            return 0.0
        return log_factorial(y) + log_factorial(size - y) - gammaln(size + 1)

    def _constant(self, y: Array, size: Array | None) -> Array | float:
        return self.constant(y, size) if self.normalised else 0.0

    def kernel(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array] = ()) -> tuple[Array, Array]:
        _, eta, y, size = as_floats(eta, y, size)
        if self.link != "logit":
            a, b = minus_logs_derivatives(self.link, eta)
            failures = _failures(y, size)
            return y * a[0] + failures * b[0], y * a[1] + failures * b[1]
        value, slope = logit_failure(eta)
        n = 1.0 if size is None else size
        return n * value - y * eta, n * slope - y

    def factored(
        self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array] = ()
    ) -> tuple[Array, Array, Array] | None:
        if self.link != "logit":
            return None
        xp, eta, y, size = as_floats(eta, y, size)
        n = 1.0 if size is None else size
        e = xp.exp(-xp.abs(eta))
        large = 1.0 / (1.0 + e)
        return n * xp.maximum(eta, 0.0) - y * eta, 1.0 + e, n * xp.where(eta >= 0, large, e * large) - y

    def expected(self, eta: Array, size: Array | None, psi: Sequence[Array] = ()) -> Expected:
        _, eta, size = as_floats(eta, size)
        (_, a1, a2, a3, _), (_, b1, b2, b3, _) = minus_logs_derivatives(self.link, eta)
        n = 1.0 if size is None else size
        # f / F = -a1 and f / (1 - F) = b1
        return Expected(-n * a1 * b1, (-n * (a2 * b1 + a1 * b2), -n * (a3 * b1 + 2 * a2 * b2 + a1 * b3)))

    def variance(self, mu: Array, size: Array | None, psi: Sequence[Array] = ()) -> Array:
        return (1.0 if size is None else size) * mu * (1 - mu)

    def _mean_start(self, y: Array, size: Array | None) -> Array:
        n = 1.0 if size is None else size
        return (y + 0.5) / (n + 1)

    def deviance(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array] = ()) -> Array:
        _, eta, y, size = as_floats(eta, y, size)
        a, b = minus_logs(self.link, eta)
        n, failures = 1.0 if size is None else size, _failures(y, size)
        return 2 * (xlogy(y, y / n) + xlogy(failures, failures / n) + y * a + failures * b)

    def draw(self, key: Any, eta: Array, size: Array | None, psi: Sequence[Array] = ()) -> Array:
        p = self.mean(jnp.asarray(eta))
        if size is None:
            return sampling.bernoulli(key, p)
        p, size = jnp.broadcast_arrays(p, jnp.asarray(size, p.dtype))
        return sampling.binomial(key, size, p)

    def sample(
        self, rng: np.random.Generator, eta: np.ndarray, size: np.ndarray | None, psi: Sequence[Any] = ()
    ) -> np.ndarray:
        p = np.asarray(self.mean(eta))
        if size is None:
            return (rng.random(p.shape) < p).astype(np.float64)
        return rng.binomial(np.asarray(size).astype(np.int64), p).astype(np.float64)

    def cdf(self, y: np.ndarray, eta: np.ndarray, size: np.ndarray | None, psi: Sequence[Any] = ()) -> np.ndarray:
        _, eta, y, n = as_floats(eta, y, 1.0 if size is None else size)
        k = np.floor(y)
        within = (k >= 0) & (k < n)
        inside = np.where(within, k, 0.0)
        q = np.exp(-minus_logs(self.link, eta)[1])
        found = special.betainc(np.where(within, n - inside, 1.0), inside + 1.0, q)
        return np.where(within, found, np.where(k < 0, 0.0, 1.0))

    def check(self, y: np.ndarray, size: np.ndarray | None, name: str) -> None:
        values = check_numbers(y, name)
        if size is None:
            if ((values > 0) & (values < 1)).any() and (values <= 1).all() and (values >= 0).all():
                raise DataError(
                    f"{name}: proportions say nothing without the numbers of trials: give size= (or weights=), the "
                    "trials of each row"
                )
            if not np.isin(values, (0, 1)).all():
                wrong = values[~np.isin(values, (0, 1))][0]
                raise DataError(
                    f"{name}: a binomial response of single trials is 0 or 1, got {wrong:g}; for counts of successes "
                    "give size=, the trials of each row, or write cbind(successes, failures)"
                )
            size = np.ones_like(values)
        size = check_numbers(np.broadcast_to(size, values.shape), f"{name}: size")
        if (size <= 0).any():
            raise DataError(
                f"{name}: {int((size <= 0).sum())} rows have no trials (size 0 or less); leave these rows out"
            )
        if (values < 0).any():
            raise DataError(f"{name}: counts of successes cannot be negative, got {values.min():g}")
        if (values > size).any():
            row = int(np.argmax(values > size))
            raise DataError(
                f"{name}: more successes than trials in {int((values > size).sum())} rows, first {values.flat[row]:g} "
                f"of {size.flat[row]:g} in row {row + 1}; size is the number of trials, not of failures"
            )
        for what, numbers in (("successes", values), ("trials", size)):
            # proportions times sizes are whole up to rounding
            if (np.abs(numbers - np.round(numbers)) > 1e-7 * np.maximum(1, np.abs(numbers))).any():
                warn(f"{name}: some numbers of {what} are not whole; the binomial likelihood is continued by gamma "
                     "functions")  # fmt: skip
        for what, none in (("0", values.any()), ("a success", (values < size).any())):
            if values.size and not none:
                raise DataError(f"{name}: every response is {what}: no finite intercept makes that most likely")


def _failures(y: Array, size: Array | None) -> Array:
    return (1.0 if size is None else size) - y
