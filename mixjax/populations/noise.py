"""Distributions of errors and random effects, as JAX functions of a key."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.families.sampling import log_gamma, standard_normal, standard_uniform


@dataclass(frozen=True, eq=False)
class Noise:
    """A distribution around 0.

    Attributes:
        title: as it is shown. sampler: ``(key, shape, *numbers)`` -> array. numbers: its parameters.
    """

    title: str
    sampler: Callable[..., Any]
    numbers: tuple[float, ...] = ()

    @property
    def static(self) -> Hashable:
        """The static part of compiled programs."""
        return self.sampler

    def __repr__(self) -> str:
        return self.title


def student_t(df: float, standardize: bool = True) -> Noise:
    """Student's t distribution, for random effects and errors with heavy tails.

    Several effects of one level are multivariate t: normal effects divided by one common chi variable, so that a level
    that is far out is so in all of its effects, and each of them has a t distribution.

    Args:
        df: degrees of freedom, above 0; above 2 where standardised.
        standardize: scaled to variance 1, so that ``sd`` and ``error_scale`` are standard deviations, as with normal
            noise. False: not scaled, as R's ``rt``; the variance is then ``df / (df - 2)`` times the squared scale.

    Raises:
        ValueError: df is none, or has no variance to scale.

    Example:
        >>> from mixjax.populations.noise import student_t
        >>> student_t(3), student_t(3, standardize=False)
        (student_t(3), student_t(3, standardize=False))
    """
    df = _positive("student_t", "df", df)
    if standardize and df <= 2:
        raise ValueError(
            f"student_t: {df:g} degrees of freedom have no variance; write student_t({df:g}, standardize=False), and "
            "sd or error_scale is then a scale, no standard deviation"
        )
    scale = float(np.sqrt((df - 2) / df)) if standardize else 1.0
    return Noise(f"student_t({df:g}{'' if standardize else ', standardize=False'})", _student_t, (df, scale))


def skew_normal(shape: float) -> Noise:
    """The skew normal distribution (Azzalini 1985, Scand. J. Statist. 12, 171) with mean 0 and variance 1.

    Args:
        shape: 0 is normal; the sign is that of the skewness, which approaches 0.995 for large ones.

    Example:
        >>> from mixjax.populations.noise import skew_normal
        >>> skew_normal(-5)
        skew_normal(-5)
    """
    if not np.isfinite(shape):
        raise ValueError(f"skew_normal: shape must be finite, got {shape}")
    return Noise(f"skew_normal({float(shape):g})", _skew_normal, (float(shape),))


def shifted_gamma(shape: float) -> Noise:
    """A gamma distribution with mean 0 and variance 1: skewness ``2 / sqrt(shape)``; shape 1 is exponential.

    Args:
        shape: above 0.

    Example:
        >>> from mixjax.populations.noise import shifted_gamma
        >>> shifted_gamma(1)
        shifted_gamma(1)
    """
    shape = _positive("shifted_gamma", "shape", shape)
    return Noise(f"shifted_gamma({shape:g})", _shifted_gamma, (shape,))


def contaminated_normal(share: float, ratio: float) -> Noise:
    """Normal, but a share of the draws has a larger spread: outliers. Mean 0, variance 1.

    Args:
        share: of outliers, between 0 and 1. ratio: standard deviation of an outlier over that of the others. Several
            effects of one level are outliers together.

    Example:
        >>> from mixjax.populations.noise import contaminated_normal
        >>> contaminated_normal(0.05, 5)
        contaminated_normal(0.05, 5)
    """
    if not 0 <= share <= 1:
        raise ValueError(f"contaminated_normal: share must be between 0 and 1, got {share}")
    ratio = _positive("contaminated_normal", "ratio", ratio)
    return Noise(f"contaminated_normal({share:g}, {ratio:g})", _contaminated, (float(share), ratio))


def as_noise(value: Any, where: str) -> Noise:
    """``"normal"``, a :class:`Noise`, or a user's function ``(key, shape) -> array``; else ValueError."""
    if isinstance(value, Noise):
        return value
    if isinstance(value, str) and value == "normal":
        return Noise("normal", standard_normal)
    if callable(value):
        return Noise(getattr(value, "__name__", "function"), _Users(value))
    raise ValueError(
        f"{where} must be 'normal', student_t(df), skew_normal(shape), shifted_gamma(shape), "
        f"contaminated_normal(share, ratio) or a function (key, shape) -> array, got {value!r}"
    )


@dataclass(frozen=True)
class _Users:
    """A user's function in the place of a sampler; equal where the function is."""

    function: Callable[..., Any]

    def __call__(self, key: Any, shape: tuple[int, ...]) -> Any:
        drawn = jnp.asarray(self.function(key, shape), jnp.float64)
        if drawn.shape != shape:
            name = getattr(self.function, "__name__", "function")
            raise ValueError(f"{name}(key, {shape}) returned an array of shape {drawn.shape}; {shape} is needed")
        return drawn


def _positive(where: str, name: str, value: float) -> float:
    if not (np.isfinite(value) and value > 0):
        raise ValueError(f"{where}: {name} must be above 0, got {value}")
    return float(value)


def _common(shape: tuple[int, ...]) -> tuple[int, ...]:
    """One number for all effects of a level."""
    return shape if len(shape) == 1 else (*shape[:-1], 1)


def _student_t(key: Any, shape: tuple[int, ...], df: Any, scale: Any) -> Any:
    z, chi = jax.random.split(key)
    chi_square = 2.0 * jnp.exp(log_gamma(chi, df / 2, _common(shape)))
    return scale * standard_normal(z, shape) / jnp.sqrt(chi_square / df)


def _skew_normal(key: Any, shape: tuple[int, ...], alpha: Any) -> Any:
    half, other = jax.random.split(key)
    delta = alpha / jnp.sqrt(1 + alpha**2)
    raw = delta * jnp.abs(standard_normal(half, shape)) + jnp.sqrt(1 - delta**2) * standard_normal(other, shape)
    return (raw - delta * jnp.sqrt(2 / jnp.pi)) / jnp.sqrt(1 - 2 * delta**2 / jnp.pi)


def _shifted_gamma(key: Any, shape: tuple[int, ...], alpha: Any) -> Any:
    return (jnp.exp(log_gamma(key, alpha, shape)) - alpha) / jnp.sqrt(alpha)


def _contaminated(key: Any, shape: tuple[int, ...], share: Any, ratio: Any) -> Any:
    z, which = jax.random.split(key)
    outlying = standard_uniform(which, _common(shape)) < share
    return jnp.where(outlying, ratio, 1.0) * standard_normal(z, shape) / jnp.sqrt(1 - share + share * ratio**2)
