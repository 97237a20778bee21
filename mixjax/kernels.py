"""Kernels: correlations of random effects by the distance between their places.

``u = distance / range``. ``exp``: ``exp(-u)``, in one dimension the Ornstein-Uhlenbeck process ``ou``. ``gau``:
``exp(-u^2)``. ``mat``: Matern's ``2^(1 - nu) / Gamma(nu) u^nu K_nu(u)`` with smoothness nu (Stein 1999, Interpolation
of Spatial Data, section 2.7; the scale is that of glmmTMB: no ``sqrt(2 nu)`` beside u), 0.5 of which is ``exp``.

A search moves over angles, whose sine is the logarithm of a parameter between bounds: of the range from a fraction of
the least distance, where different places are independent, to many times the largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import scipy.special

# Of the range: parts of the least distance, and multiples of the largest.
LEAST_RANGE, MOST_RANGE = 1.0 / 40.0, 1e3
# Of a smoothness: below, the correlation falls at once; above, the kernel is ``gau`` but for the scale.
SMOOTHNESS = (0.02, 20.0)
# A distance, in units of the map, at which effects are independent whatever the range is.
FAR_AWAY = 1e9 * MOST_RANGE
# Numbers that are made at once.
AT_ONCE = 2**21


class Curves(NamedTuple):
    """Correlations ``(...)``, their derivatives ``(k, ...)`` by the logarithms of the parameters, and second ones,
    ``(k, k, ...)``."""

    value: np.ndarray
    slopes: np.ndarray
    curves: np.ndarray


@dataclass(frozen=True)
class Kernel:
    """A correlation by distance.

    Attributes:
        name: ``"exp"``, ``"ou"``, ``"gau"`` or ``"mat"``.
        smoothness: of ``mat``, where it is held at a number from 0.02 to 20; None: estimated.

    Raises:
        ValueError: another name, or a smoothness out of its bounds.

    Example:
        >>> import mixjax as mj
        >>> mj.Kernel("mat", 1.5)([0.0, 1.0, 4.0], [2.0]).round(4).tolist()
        [1.0, 0.9098, 0.406]
    """

    name: str
    smoothness: float | None = None

    def __post_init__(self) -> None:
        if self.name not in KERNELS:
            raise ValueError(f"there is no kernel {self.name!r}; there are {', '.join(map(repr, KERNELS))}")
        if self.smoothness is not None and self.name != "mat":
            raise ValueError(f"kernel {self.name!r} has no smoothness; 'mat' has")
        if self.smoothness is not None and not SMOOTHNESS[0] <= self.smoothness <= SMOOTHNESS[1]:
            raise ValueError(
                f"the smoothness of 'mat' must lie between {SMOOTHNESS[0]:g} and {SMOOTHNESS[1]:g}, got "
                f"{self.smoothness:g}; smoother than that is 'gau'"
            )

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of what is estimated beside the standard deviation."""
        return ("range", "smoothness") if self.name == "mat" and self.smoothness is None else ("range",)

    @property
    def k(self) -> int:
        """How many these are."""
        return len(self.parameters)

    def is_case_of(self, other: Kernel) -> bool:
        """Whether the other has all of its correlations."""
        a, b = (Kernel("mat", 0.5) if own.name in ("exp", "ou") else own for own in (self, other))
        return a == b or (a.name == b.name == "mat" and b.smoothness is None)

    def __call__(self, distances: Any, parameters: Sequence[float]) -> np.ndarray:
        """Correlations at distances ``(...)``.

        Args:
            parameters: range, and smoothness where it is estimated.
        """
        return self.curves(distances, parameters).value

    def curves(self, distances: Any, parameters: Sequence[float]) -> Curves:
        """Correlations, and how they move with the logarithms of the parameters."""
        u = np.asarray(distances, np.float64) / parameters[0]
        if self.name == "gau":
            return _by_range(np.exp(-(u**2)), 2 * u**2, 4 * u**4 - 4 * u**2)
        nu = self.smoothness if self.smoothness is not None else parameters[1] if self.name == "mat" else 0.5
        if self.k == 2:
            return _matern(u, nu)
        value = np.exp(-u)
        if nu == 0.5:
            return _by_range(value, u, u**2 - u)
        if nu == 1.5:
            return _by_range(value, u**2, u**3 - 2 * u**2, 1 + u)
        if nu == 2.5:
            return _by_range(value, u**2 * (1 + u) / 3, (u**4 - 2 * u**3 - 2 * u**2) / 3, 1 + u + u**2 / 3)
        found = _matern(u, nu)
        return Curves(found.value, found.slopes[:1], found.curves[:1, :1])


KERNELS = ("exp", "gau", "mat", "ou")


def _by_range(decay: np.ndarray, slope: np.ndarray, curve: np.ndarray, rise: np.ndarray | float = 1.0) -> Curves:
    return Curves(rise * decay, (slope * decay)[None], (curve * decay)[None, None])


def _matern(u: np.ndarray, nu: float) -> Curves:
    """Matern's correlation and its derivatives by the logarithms of range and smoothness.

    From ``K_nu(u) = int_0^oo exp(-u cosh t) cosh(nu t) dt`` (Abramowitz & Stegun 9.6.24), which is differentiated under
    the integral; the trapezoidal rule has an error of ``exp(-pi^2 / step)`` (Trefethen & Weideman 2014, SIAM Rev. 56,
    385). All terms of the integral itself are positive, so that no digits are lost.
    """
    distinct, where = np.unique(u, return_inverse=True)
    found = np.zeros((6, len(distinct)))
    apart = distinct > 0
    some = distinct[apart]
    rows = AT_ONCE // 256
    parts = [_integrals(some[i : i + rows], nu) for i in range(0, len(some), rows)]
    found[:, apart] = np.concatenate(parts, axis=1) if parts else np.zeros((6, 0))
    found[0, ~apart] = 1.0
    value, r, n, rr, rn, nn = (part[where].reshape(u.shape) for part in found)
    return Curves(value, np.stack([r, n]), np.stack([np.stack([rr, rn]), np.stack([rn, nn])]))


def _integrals(u: np.ndarray, nu: float) -> np.ndarray:
    """``(6, m)``: the correlation at ``u (m,)``, its slopes by log range and log nu, and second derivatives."""
    # Beyond the end of t the integrand is below 1e-40 of what counts.
    end = np.arccosh(1.0 + (100.0 + nu * 40.0) / u.min())
    step = 0.5 / np.sqrt(6.0 + nu)  # its peak has a width of 1 / sqrt(nu)
    t = np.arange(0.0, end + step, step)
    weight = np.where(t == 0, 0.5, 1.0) * step
    cosh = np.cosh(t)
    log_c = (1.0 - nu) * np.log(2.0) - scipy.special.gammaln(nu)
    # cosh(nu t) and sinh(nu t), less exp(nu t), which may overflow.
    decay = np.exp(log_c + nu * np.log(u)[:, None] + nu * t - u[:, None] * cosh) * weight
    even, odd = 0.5 * (1.0 + np.exp(-2.0 * nu * t)), 0.5 * (1.0 - np.exp(-2.0 * nu * t))
    integrals = decay @ np.stack([even, t * odd, t**2 * even, cosh * even, cosh * t * odd, cosh**2 * even], axis=1)
    M, M_n, M_nn, C, C_n, C2 = integrals.T
    # By log u, of c u^nu exp(-u cosh t): the factor nu - u cosh t.
    D = nu * M - u * C
    DD = nu * D - u * (nu * C + C - u * C2)
    # By nu: through c u^nu the factor g, then through cosh(nu t).
    g = np.log(u) - np.log(2.0) - scipy.special.digamma(nu)
    by_nu = g * M + M_n
    by_nu2 = (g * g - scipy.special.polygamma(1, nu)) * M + 2.0 * g * M_n + M_nn
    D_by_nu = g * D + M + (nu * M_n - u * C_n)
    return np.stack([M, -D, nu * by_nu, DD, -nu * D_by_nu, nu * by_nu + nu * nu * by_nu2])


# --- places ----------------------------------------------------------------------------------------------------------


def distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Euclidean distances ``(..., m, k)`` between places ``(..., m, d)`` and ``(..., k, d)``."""
    apart: np.ndarray = np.sqrt(((a[..., :, None, :] - b[..., None, :, :]) ** 2).sum(-1))
    return apart


@dataclass(frozen=True)
class Bounds:
    """Chart of a kernel's parameters: ``log p = middle + half sin(angle)``, one angle each.

    Attributes:
        middle, half: ``(k,)``.
    """

    middle: np.ndarray
    half: np.ndarray

    @staticmethod
    def of(kernel: Kernel, least: float, largest: float) -> Bounds:
        """Args: least, largest: distance between different places that see each other."""
        low = np.log([LEAST_RANGE * least, SMOOTHNESS[0]])[: kernel.k]
        high = np.log([MOST_RANGE * largest, SMOOTHNESS[1]])[: kernel.k]
        return Bounds(0.5 * (low + high), 0.5 * (high - low))

    def at(self, angles: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Parameters ``(k,)``, and first and second derivatives of their logarithms by the angles."""
        sine, cosine = np.sin(angles), np.cos(angles)
        return np.exp(self.middle + self.half * sine), self.half * cosine, -self.half * sine

    def angles(self, parameters: np.ndarray) -> np.ndarray:
        """The angles of parameters between the bounds."""
        found: np.ndarray = np.arcsin(np.clip((np.log(parameters) - self.middle) / self.half, -1.0, 1.0))
        return found


class Places(NamedTuple):
    """The places of one term's levels.

    Attributes:
        kernel, bounds: of its parameters. extremes: logarithms of the least and the largest distance between different
            places that see each other. coordinates: ``(m, d)``. within: ``(m,)`` codes: levels of different ones are
            independent.
    """

    kernel: Kernel
    bounds: Bounds
    extremes: tuple[float, float]
    coordinates: np.ndarray
    within: np.ndarray

    @staticmethod
    def of(kernel: Kernel, coordinates: np.ndarray, within: np.ndarray) -> Places:
        """With bounds by the distances between places that see each other; other places may be added later."""
        least, largest = extremes(coordinates, within)
        logs = (float(np.log(least)), float(np.log(largest)))
        return Places(kernel, Bounds.of(kernel, least, largest), logs, coordinates, within)

    def correlation(self, angles: np.ndarray) -> np.ndarray:
        """``K (m, m)``."""
        K: np.ndarray = self.kernel(distances(self.coordinates, self.coordinates), list(self.bounds.at(angles)[0]))
        return np.where(self.within[:, None] == self.within, K, 0.0)


def extremes(coordinates: np.ndarray, within: np.ndarray) -> tuple[float, float]:
    """The least and the largest distance between different places that see each other."""
    least, largest = np.inf, 0.0
    order = np.argsort(within, kind="stable")
    for own in np.split(order, np.flatnonzero(np.diff(within[order])) + 1):
        apart = distances(coordinates[own], coordinates[own])[np.triu_indices(len(own), 1)]
        apart = apart[apart > 0]
        if apart.size:
            least, largest = min(least, float(apart.min())), max(largest, float(apart.max()))
    return least, largest


def factor_of(K: np.ndarray) -> np.ndarray:
    """``L`` with ``L L' = K``, which may be singular to rounding."""
    try:
        L: np.ndarray = np.linalg.cholesky(K)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(K)
        L = vectors * np.sqrt(np.maximum(values, 0.0))
    return L
