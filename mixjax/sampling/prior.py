"""Prior distributions: densities by JAX, draws by NumPy. Their numbers are leaves of pytrees, their kinds are static,
so that one compiled program serves all numbers."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betaln, gammaln, log_ndtr
from scipy.special import ndtr, ndtri

from mixjax.machine import Array

LOG_2PI = math.log(2.0 * math.pi)


@dataclass(frozen=True)
class Prior:
    """A distribution of one parameter, or of the correlations of a term."""

    # What it is a distribution of: "real" numbers, "positive" ones, a "correlation" matrix.
    support: ClassVar[str] = "real"
    name: ClassVar[str] = ""
    proper: ClassVar[bool] = True

    def log_prob(self, x: Array) -> Array:
        """Log density at ``x``, on the parameter's natural scale."""
        raise NotImplementedError

    def sample(self, rng: np.random.Generator, size: int) -> np.ndarray:
        """Independent draws ``(size,)``."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"{self.name}({', '.join(f'{getattr(self, field.name):g}' for field in fields(self))})"


def _registered(kind: type[Prior]) -> type[Prior]:
    jax.tree_util.register_dataclass(kind, data_fields=[field.name for field in fields(kind)], meta_fields=[])
    return kind


@_registered
@dataclass(frozen=True, repr=False)
class Flat(Prior):
    """Density 1 everywhere: improper."""

    name = "flat"
    proper = False

    def log_prob(self, x: Array) -> Array:
        return 0.0 * x

    def sample(self, rng: np.random.Generator, size: int) -> np.ndarray:
        raise ValueError("flat() is improper: there are no draws from it")


@_registered
@dataclass(frozen=True, repr=False)
class Normal(Prior):
    """Normal."""

    loc: float
    scale: float
    name = "normal"

    def log_prob(self, x: Array) -> Array:
        return -0.5 * ((x - self.loc) / self.scale) ** 2 - jnp.log(self.scale) - 0.5 * LOG_2PI

    def sample(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return rng.normal(self.loc, self.scale, size)

    def log_between(self, low: float, high: float) -> Array:
        """Log probability of an interval."""
        a: Array = (low - self.loc) / self.scale
        b: Array = (high - self.loc) / self.scale
        # From the side of the nearer tail, which keeps its digits.
        flip = a + b > 0
        a, b = jnp.where(flip, -b, a), jnp.where(flip, -a, b)
        return log_ndtr(b) + jnp.log1p(-jnp.exp(log_ndtr(a) - log_ndtr(b)))

    def sample_between(self, rng: np.random.Generator, size: int, low: float, high: float) -> np.ndarray:
        """Draws ``(size,)`` cut to an interval, by the distribution function."""
        a, b = ndtr((low - self.loc) / self.scale), ndtr((high - self.loc) / self.scale)
        drawn: np.ndarray = np.clip(self.loc + self.scale * ndtri(a + (b - a) * rng.random(size)), low, high)
        return drawn


@_registered
@dataclass(frozen=True, repr=False)
class StudentT(Prior):
    """Student's t."""

    df: float
    loc: float
    scale: float
    name = "student_t"

    def log_prob(self, x: Array) -> Array:
        return _log_t((x - self.loc) / self.scale, self.df) - jnp.log(self.scale)

    def sample(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return self.loc + self.scale * rng.standard_t(self.df, size)


def _log_t(u: Array, df: Any) -> Array:
    return (
        gammaln(0.5 * (df + 1.0))
        - gammaln(0.5 * df)
        - 0.5 * jnp.log(df * math.pi)
        - 0.5 * (df + 1.0) * jnp.log1p(u * u / df)
    )


@_registered
@dataclass(frozen=True, repr=False)
class HalfNormal(Prior):
    """The absolute value of a normal of mean 0."""

    scale: float
    support = "positive"
    name = "half_normal"

    def log_prob(self, x: Array) -> Array:
        return math.log(2.0) - 0.5 * (x / self.scale) ** 2 - jnp.log(self.scale) - 0.5 * LOG_2PI

    def sample(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return np.abs(rng.normal(0.0, self.scale, size))


@_registered
@dataclass(frozen=True, repr=False)
class HalfStudentT(Prior):
    """The absolute value of a Student's t of location 0."""

    df: float
    scale: float
    support = "positive"
    name = "half_student_t"

    def log_prob(self, x: Array) -> Array:
        return math.log(2.0) + _log_t(x / self.scale, self.df) - jnp.log(self.scale)

    def sample(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return np.abs(self.scale * rng.standard_t(self.df, size))


@_registered
@dataclass(frozen=True, repr=False)
class Exponential(Prior):
    """Exponential."""

    rate: float
    support = "positive"
    name = "exponential"

    def log_prob(self, x: Array) -> Array:
        return jnp.log(self.rate) - self.rate * x

    def sample(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return rng.exponential(1.0 / self.rate, size)


@_registered
@dataclass(frozen=True, repr=False)
class LogNormal(Prior):
    """The exponential of a normal."""

    loc: float
    scale: float
    support = "positive"
    name = "log_normal"

    def log_prob(self, x: Array) -> Array:
        log = jnp.log(x)
        return -0.5 * ((log - self.loc) / self.scale) ** 2 - jnp.log(self.scale) - 0.5 * LOG_2PI - log

    def sample(self, rng: np.random.Generator, size: int) -> np.ndarray:
        return np.exp(rng.normal(self.loc, self.scale, size))


@_registered
@dataclass(frozen=True, repr=False)
class LKJ(Prior):
    """Density proportional to ``det(R)^(eta - 1)`` over the correlation matrices R of a term's structure."""

    eta: float
    support = "correlation"
    name = "lkj"


def log_of_logistic(w: Array, a: Any, b: Any) -> Array:
    """Log density of the logit ``w`` of a Beta(a, b) variable."""
    return -a * jnp.logaddexp(0.0, -w) - b * jnp.logaddexp(0.0, w) - betaln(a, b)


class prior:
    """Prior distributions, for :func:`mixjax.priors`. All on natural scales: standard deviations, not variances,
    absolute, not relative to sigma.

    Example:
        >>> import mixjax as mj
        >>> mj.prior.half_student_t(3, 59.3)
        half_student_t(3, 59.3)
    """

    @staticmethod
    def flat() -> Prior:
        """Density 1 everywhere, of fixed effects; improper. Standard deviations may not have it."""
        return Flat()

    @staticmethod
    def normal(loc: float = 0.0, scale: float = 1.0) -> Prior:
        """Normal, of mean ``loc`` and standard deviation ``scale``. Of a correlation: cut to its range."""
        return Normal(_number("loc", loc), _positive("scale", scale))

    @staticmethod
    def student_t(df: float, loc: float = 0.0, scale: float = 1.0) -> Prior:
        """Student's t with ``df`` degrees of freedom."""
        return StudentT(_positive("df", df), _number("loc", loc), _positive("scale", scale))

    @staticmethod
    def half_normal(scale: float = 1.0) -> Prior:
        """Of a standard deviation: the absolute value of ``normal(0, scale)``."""
        return HalfNormal(_positive("scale", scale))

    @staticmethod
    def half_student_t(df: float, scale: float = 1.0) -> Prior:
        """Of a standard deviation: the absolute value of ``student_t(df, 0, scale)``; ``df=1`` is half-Cauchy."""
        return HalfStudentT(_positive("df", df), _positive("scale", scale))

    @staticmethod
    def exponential(rate: float = 1.0) -> Prior:
        """Of a standard deviation: mean ``1 / rate``."""
        return Exponential(_positive("rate", rate))

    @staticmethod
    def log_normal(loc: float = 0.0, scale: float = 1.0) -> Prior:
        """Of a positive parameter: its logarithm is ``normal(loc, scale)``."""
        return LogNormal(_number("loc", loc), _positive("scale", scale))

    @staticmethod
    def lkj(eta: float = 1.0) -> Prior:
        """Of all correlations of a term: density proportional to ``det(R)^(eta - 1)`` (Lewandowski, Kurowicka & Joe
        2009, J. Multivariate Anal. 100, 1989). ``eta=1`` is uniform over the correlations that the structure has."""
        return LKJ(_positive("eta", eta))


def _number(name: str, value: Any) -> float:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float | np.integer | np.floating)
        or not np.isfinite(value)
    ):
        raise ValueError(f"{name} must be a number, got {value!r}")
    return float(value)


def _positive(name: str, value: Any) -> float:
    if _number(name, value) <= 0:
        raise ValueError(f"{name} must be positive, got {value!r}")
    return float(value)
