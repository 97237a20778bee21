"""What a fit needs to know of the distribution of a response.

A row has a linear predictor eta, a response y and, where responses are counts of trials, a size. Its minus log density
``c`` is a function of eta, and of the family's own parameters psi, which are logarithms and therefore unconstrained.
Estimation needs ``c`` with four derivatives by eta and those of them by psi; a :class:`Family` has them in closed form.

All of it is elementwise: arrays broadcast against each other, rows ``(n,)`` or rows with lanes behind them ``(n, L)``,
psi a sequence of numbers, of arrays ``(L,)`` or of arrays like the rows'. NumPy's arrays in, NumPy's out; JAX's or
tracers in, JAX's out. The type of eta is kept. Weights are not the family's: whoever sums rows multiplies everything by
them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import numpy as np

from mixjax.checks import DataError
from mixjax.families.links import LINEAR, LINKS, mean_derivatives
from mixjax.families.special import HALF_LOG_2PI, ndtr
from mixjax.machine import Array, fori_loop, namespace


class Derivatives(NamedTuple):
    """Minus the log density of every row, and its derivatives.

    Attributes:
        by_eta: ``(c, c1, c2, c3, c4)``: minus log density with all constants, first to fourth derivative by eta.
        by_psi: for each psi the derivatives of ``(c, c1, c2, c3)`` by it.
        by_psi_twice: ``[i][j]`` second derivatives of ``(c, c1, c2)`` by psi i and psi j, all pairs.
    """

    by_eta: tuple[Array, Array, Array, Array, Array]
    by_psi: tuple[tuple[Array, Array, Array, Array], ...] = ()
    by_psi_twice: tuple[tuple[tuple[Array, Array, Array], ...], ...] = ()


class Expected(NamedTuple):
    """Expected curvature ``w = E[c2]`` of every row (Fisher's information on eta), and its derivatives.

    Attributes:
        w: the curvature. by_eta: ``(w', w'')``. by_psi: for each psi the derivatives of ``(w, w')`` by it.
        by_psi_twice: ``[i][j]`` second derivatives of w.
    """

    w: Array
    by_eta: tuple[Array, Array]
    by_psi: tuple[tuple[Array, Array], ...] = ()
    by_psi_twice: tuple[tuple[Array, ...], ...] = ()


# Bounds of psi where moments of a response give none.
LEAST, MOST = -19.0, 19.0
# Trapezoidal nodes of the mean over a normal linear predictor reach so many standard deviations to each side.
REACH = 8.0
# Their number. The rule's error is exp(-2 pi d / h) for a function without singularities within d of the real line, in
# standard deviations: pi / sd for the logistic function, pi / 2 / sd for the complementary log-log, 1 / sd for the
# Cauchy. With sd 5 these are 1e-13, 1e-13 and 1e-12.
NODES = {"logit": 128, "cloglog": 256, "cauchit": 360}


@dataclass(frozen=True)
class Family(ABC):
    """The distribution of a response given its linear predictor. Static, hashable, comparable.

    Attributes:
        link: how the mean depends on eta, one of :attr:`links`.
        normalised: False leaves :meth:`constant` out of densities.
        name: of the family. links: those it has, the default first. psi_names: its own parameters as users see them;
            psi is the logarithm of each.

    Example:
        >>> import numpy as np, mixjax as mj
        >>> family = mj.families.poisson()
        >>> c, slope, *_ = family.derivatives(np.zeros(2), np.array([1.0, 2.0]), None, ()).by_eta
        >>> print(c.round(4), slope)
        [1.     1.6931] [ 0. -1.]
    """

    link: str
    normalised: bool = field(default=True, kw_only=True, repr=False)

    name: ClassVar[str]
    links: ClassVar[tuple[str, ...]]
    psi_names: ClassVar[tuple[str, ...]] = ()
    # Whether :meth:`expected` is known.
    has_expected: ClassVar[bool] = True
    # Where responses lie: ``"real"``, ``"positive"``, ``"unit"``, or whole numbers: ``"counts"``, ``"trials"``.
    support: ClassVar[str] = "real"

    def __post_init__(self) -> None:
        if self.link not in self.links:
            raise ValueError(f"{self.name} has no link {self.link!r}: {link_list(self.links)}")

    @property
    def n_psi(self) -> int:
        """Number of the family's own parameters."""
        return len(self.psi_names)

    @property
    def plain(self) -> Family:
        """The family without extra zeros: of what responses are like, and where a search starts."""
        return self

    @property
    @abstractmethod
    def log_concave(self) -> bool:
        """Whether ``c2 >= 0`` for every eta and every possible y."""

    @abstractmethod
    def density(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        """Minus the log density ``c`` of every row, with all constants.

        JAX differentiates it to any order by eta, psi and y, taken as a real number. Infinite where eta gives no mean.

        Args:
            eta: linear predictors. y: responses; of a binomial family counts of successes. size: trials, None for 1
                and for families without trials. psi: the family's parameters, each a logarithm.
        """

    @abstractmethod
    def derivatives(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Derivatives:
        """``c`` and its derivatives in closed form; arguments as in :meth:`density`."""

    def constant(self, y: Array, size: Array | None) -> Array | float:
        """The terms of ``c`` that depend on the response alone, where they take time; 0 elsewhere. Many evaluations
        with the same responses need them once."""
        return 0.0

    def kernel(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> tuple[Array, Array]:
        """``c`` but for what eta does not change, and its slope by eta: what quadrature asks at every node."""
        c, slope, *_ = self.derivatives(eta, y, size, psi).by_eta
        return c, slope

    def factored(
        self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]
    ) -> tuple[Array, Array, Array] | None:
        """:meth:`kernel` as ``value + n log factor`` of n trials, with a factor from 1 to 2, and the slope, where a sum
        over rows is so had with one logarithm of their product; else None."""
        return None

    @abstractmethod
    def expected(self, eta: Array, size: Array | None, psi: Sequence[Array]) -> Expected:
        """Expected curvature and its derivatives."""

    def mean(self, eta: Array) -> Array:
        """Mean of y, of a binomial family of ``y / size``."""
        return LINKS[self.link](as_array(eta))

    def response_mean(self, mu: Array, psi: Sequence[Array]) -> Array:
        """Mean of a response of which :meth:`mean` is ``mu``; another number only where there are extra zeros."""
        return mu

    def mean_slope(self, eta: Array) -> Array:
        """Derivative of :meth:`mean`."""
        return mean_derivatives(self.link, as_array(eta))[0]

    def mean_between(self, lower: np.ndarray, upper: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The smallest and the largest mean of predictors between ``lower`` and ``upper``."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            ends = np.sort([np.asarray(self.mean(lower)), np.asarray(self.mean(upper))], axis=0)
        if self.link == "sqrt":
            ends[0] = np.where((lower < 0) & (upper > 0), 0.0, ends[0])
        if self.link in ("inverse", "1/mu^2"):  # the mean grows without bound as eta goes to 0
            ends = np.where(
                (lower <= 0) & (upper > 0), [np.asarray(self.mean(upper)), np.full_like(upper, np.inf)], ends
            )
        return ends[0], ends[1]

    def mean_interval(self, mean: np.ndarray, error: np.ndarray, z: float) -> tuple[np.ndarray, np.ndarray]:
        """Ends of an interval for a mean with standard error ``error``: ``z`` of it to each side on the scale of the
        link, which keeps to the possible means."""
        with np.errstate(divide="ignore", invalid="ignore"):
            eta = np.asarray(LINEAR[self.link](as_array(mean)))
            width = z * error / np.abs(np.asarray(self.mean_slope(eta)))
        return self.mean_between(eta - width, eta + width)

    @abstractmethod
    def variance(self, mu: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        """Variance of y, of a binomial family of the counts, where the mean is ``mu``."""

    def eta_start(self, y: Array, size: Array | None = None) -> Array:
        """Linear predictors near the responses, finite: those of R's ``mustart``."""
        return LINEAR[self.link](self._mean_start(as_array(y), size))

    @abstractmethod
    def _mean_start(self, y: Array, size: Array | None) -> Array:
        """Means near the responses that every link can take."""

    def psi_start(self, y: Array, mu: Array, size: Array | None = None) -> Array:
        """Parameters ``(n_psi,)``, with lanes ``(n_psi, L)``, from moments about the means; finite always."""
        y = as_array(y)
        xp = namespace(y, mu)
        return xp.zeros((0, *y.shape[1:]))

    @abstractmethod
    def deviance(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        """R's unit deviance of every row (``dev.resids``), times size for a binomial family."""

    def cdf(self, y: np.ndarray, eta: np.ndarray, size: np.ndarray | None, psi: Sequence[Any]) -> np.ndarray:
        """Probability of a response up to ``y``, of a binomial family of a count; by NumPy only.

        Raises:
            ValueError: the family does not know it.
        """
        raise ValueError(
            f"family {self.name!r} has no distribution function, which intervals of new responses need; use "
            "interval='confidence', or quantiles of simulate()"
        )

    @abstractmethod
    def draw(self, key: Any, eta: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        """Responses drawn by a JAX key, float64 in the scope of 64 bits."""

    @abstractmethod
    def sample(
        self, rng: np.random.Generator, eta: np.ndarray, size: np.ndarray | None, psi: Sequence[Any]
    ) -> np.ndarray:
        """Responses drawn by a generator of NumPy's, which compiles nothing; as many as there are ``eta``."""

    @abstractmethod
    def check(self, y: np.ndarray, size: np.ndarray | None, name: str) -> None:
        """Raise :class:`mixjax.DataError`, with the column's name and a cure, where y cannot be such a response."""

    def natural(self, psi: Sequence[Array]) -> Array:
        """The parameters as users see them, :attr:`psi_names`: ``exp(psi)``."""
        psi = as_array(psi)
        return namespace(psi).exp(psi)

    def unconstrained(self, values: Sequence[float]) -> np.ndarray:
        """psi of parameters as users see them.

        Raises:
            ValueError: a value that the parameter cannot have.
        """
        for name, value in zip(self.psi_names, values, strict=True):
            if not (np.isfinite(value) and value > 0):
                raise ValueError(f"{name} of the {self.name} family must be a positive number, got {value!r}")
        psi: np.ndarray = np.log(np.asarray(values, np.float64))
        return psi

    def natural_slope(self, psi: Sequence[Array]) -> Array:
        """Derivatives of :meth:`natural` by psi, one for each."""
        return self.natural(psi)

    def integrated_mean(self, eta: Array, variance: Array) -> Array:
        """``E mean(eta + N(0, variance))``: the mean over random effects with that variance on the link's scale.

        Exact for identity, log, sqrt and probit. Others by a trapezoidal rule, to 1e-10 up to a standard deviation of
        5.

        Raises:
            ValueError: for links ``1/eta``, whose mean over normal numbers does not exist.
        """
        xp = namespace(eta, variance)
        eta, variance = xp.asarray(eta), xp.asarray(variance)
        if self.link == "identity":
            return eta + 0 * variance
        if self.link == "log":
            return xp.exp(eta + variance / 2)
        if self.link == "sqrt":
            return eta**2 + variance
        if self.link == "probit":
            return ndtr(eta / xp.sqrt(1 + variance))
        if self.link in ("inverse", "1/mu^2"):
            raise ValueError(
                f"the mean of a response with link {self.link!r} over normal random effects does not exist: it is "
                "infinite where the linear predictor passes 0. Use link 'log'"
            )
        return over_normal(self.mean, eta, variance, NODES[self.link])

    def integrated_slopes(self, eta: Array, variance: Array) -> tuple[Array, Array]:
        """Derivatives of :meth:`integrated_mean` by eta, ``E mean'``, and by the variance, ``E mean'' / 2``: under the
        integral, as a normal density's derivative by its variance is half its second one by its mean."""
        xp = namespace(eta, variance)
        eta, variance = xp.asarray(eta), xp.asarray(variance)
        mean = self.integrated_mean(eta, variance)
        if self.link == "identity":
            return xp.ones_like(mean), xp.zeros_like(mean)
        if self.link == "log":
            return mean, mean / 2
        if self.link == "sqrt":
            return 2 * eta + 0 * variance, xp.ones_like(mean)
        if self.link == "probit":
            spread = xp.sqrt(1 + variance)
            slope = xp.exp(-0.5 * (eta / spread) ** 2 - HALF_LOG_2PI) / spread
            return slope, -0.5 * eta * slope / (1 + variance)

        def derivative(order: int) -> Array:
            return over_normal(lambda x: mean_derivatives(self.link, x)[order], eta, variance, NODES[self.link])

        return derivative(0), 0.5 * derivative(1)


def link_list(links: Sequence[str]) -> str:
    """``its links are 'logit', 'probit'``."""
    return f"its {'links are' if len(links) > 1 else 'link is'} {', '.join(map(repr, links))}"


def over_normal(mean: Callable[[Array], Array], eta: Array, variance: Array, nodes: int) -> Array:
    """``E mean(eta + N(0, variance))`` by the trapezoidal rule."""
    xp = namespace(eta, variance)
    deviation = xp.sqrt(variance)
    z = np.linspace(-REACH, REACH, nodes + 1)
    weights = np.exp(-0.5 * z**2)
    z, weights = xp.asarray(z), xp.asarray(weights / weights.sum())

    def step(i: Any, total: Array) -> Array:
        return total + (weights[i] * mean(eta + deviation * z[i])).astype(total.dtype)

    start = 0.0 * (eta + deviation)
    return fori_loop(nodes + 1, step, start, xp)


def clipped_log(moment: Array) -> Array:
    """Logarithm of a moment as ``(1, ...)``, within bounds; of one that is no positive number the lower bound."""
    xp = namespace(moment)
    possible = xp.isfinite(moment) & (moment > 0)
    found = xp.where(possible, xp.clip(xp.log(xp.where(possible, moment, 1.0)), LEAST, MOST), LEAST)
    return found[None]


def check_numbers(y: np.ndarray, name: str) -> np.ndarray:
    """The response as float64, or DataError where it is missing or infinite in some rows."""
    try:
        values = np.asarray(y, np.float64)
    except (TypeError, ValueError):
        raise DataError(f"{name}: the response must be numbers, got {np.asarray(y).dtype}") from None
    wrong = ~np.isfinite(values)
    if wrong.any():
        raise DataError(
            f"{name}: {int(wrong.sum())} of {values.size} responses are missing or infinite; leave these rows out"
        )
    return values


def as_array(x: Any) -> Array:
    """x, or a sequence of numbers or lanes, as an array of floats of its namespace."""
    if isinstance(x, tuple | list):
        xp = namespace(*x)
        x = xp.stack([xp.asarray(one) for one in x]) if x else xp.zeros(0)
    xp = namespace(x)
    x = xp.asarray(x)
    return x if xp.issubdtype(x.dtype, xp.floating) else x.astype(xp.result_type(float))
