"""Zero inflation: a count that is 0 for certain with some probability, and else has another family's distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.checks import DataError
from mixjax.families.family import Derivatives, Expected, Family, as_array
from mixjax.families.links import LINEAR
from mixjax.families.special import as_floats, expit
from mixjax.machine import Array, namespace

# Limits of the probability with which a search begins.
LEAST, MOST = 0.05, 0.9
# Where the minus log density of a 0 is larger the exponential of it is as good as nothing, in single precision too.
FAR = 80.0
# What may be differentiated twice by parameters: eta, or one of them by its number.
ETA = -1

Block = tuple[int, ...]


@dataclass(frozen=True)
class ZeroInflated(Family):
    """Extra zeros with probability pi, the logistic function of the last psi; the others are the base's.

    With c the base's minus log density and ``z`` the logit of pi, a row with a 0 has ``C = -log(pi + (1 - pi)
    exp(-c))``, any other ``c - log(1 - pi)``. As functions of (c, z) the first is ``c + s(z) - s(z + c)``, the second
    ``c + s(z)``, s being ``log(1 + exp)``: derivatives by eta and psi are those of compositions (Faa di Bruno).
    ``mean`` and everything made of it is the base's: that of counts that are no extra zeros.
    """

    base: Family

    has_expected = False

    def __post_init__(self) -> None:
        if self.link != self.base.link:
            raise ValueError(f"link {self.link!r} is not that of the base, {self.base.link!r}")

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"zero-inflated {self.base.name}"

    @property
    def links(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.base.links

    @property
    def support(self) -> str:  # type: ignore[override]
        return self.base.support

    @property
    def psi_names(self) -> tuple[str, ...]:  # type: ignore[override]
        return (*self.base.psi_names, "zero_inflation")

    @property
    def plain(self) -> Family:
        return self.base

    @property
    def log_concave(self) -> bool:
        return False

    def density(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        xp, c, y, z = as_floats(self.base.density(eta, y, size, psi[:-1]), y, psi[-1])
        return _value(xp, c, z, y == 0)

    def derivatives(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Derivatives:
        base = self.base.derivatives(eta, y, size, psi[:-1])
        xp, c, y, z = as_floats(base.by_eta[0], y, psi[-1])
        zero, s = y == 0, len(base.by_psi)
        u = z + c
        # Of a 0 that cannot be the base's nothing moves the base, however fast it moves.
        alive = ~(zero & (u > FAR))
        t, r = expit(u), expit(-u)
        v = t * r
        bends = (t, v, v * (r - t), v * (1.0 - 6.0 * v))  # derivatives of log(1 + exp(u))
        # by c, and by z the more: of log(1 + exp(z + c)), where there is a 0; that by c alone is 1 more.
        curves = [xp.where(zero & alive, -own, 0.0) for own in bends]
        by_c = xp.where(zero, xp.where(alive, r, 0.0), 1.0)
        pi, q = expit(z), expit(-z)
        by_z = xp.where(zero, xp.where(z > 0, r - q, pi - t), pi) + 0 * c
        by_z_twice = xp.where(zero, pi * q - v, pi * q) + 0 * c

        def part(block: Block) -> Array:
            """The base's derivative by eta and its own psi; 0 where it does not matter."""
            parameters = [one for one in block if one != ETA]
            order = len(block) - len(parameters)
            if not parameters:
                own = base.by_eta[order]
            elif len(parameters) == 1:
                own = base.by_psi[parameters[0]][order]
            else:
                own = base.by_psi_twice[parameters[0]][parameters[1]][order]
            return xp.where(alive, own, 0.0)

        known: dict[Block, Array] = {}

        def composed(*index: int) -> Array:
            """Derivative of C by eta, psi of the base (their numbers) and z (number s)."""
            of_base = tuple(sorted(one for one in index if one != s))
            of_z = len(index) - len(of_base)
            if not of_base:
                return (by_z, by_z_twice)[of_z - 1]
            total: Any = 0.0
            for blocks, times in _partitions(of_base):
                k = len(blocks)
                outer = by_c if k == 1 and not of_z else curves[k + of_z - 1]
                for block in blocks:
                    if block not in known:
                        known[block] = part(block)
                    outer = outer * known[block]
                total = total + (times * outer if times > 1 else outer)
            return total

        every = range(s + 1)
        by_eta: Any = (_value(xp, c, z, zero), *(composed(*(ETA,) * k) for k in range(1, 5)))
        by_psi: Any = tuple(tuple(composed(i, *(ETA,) * k) for k in range(4)) for i in every)
        twice: dict[tuple[int, int], Any] = {
            (i, j): tuple(composed(i, j, *(ETA,) * k) for k in range(3)) for i in every for j in range(i, s + 1)
        }
        by_psi_twice = tuple(tuple(twice[min(i, j), max(i, j)] for j in every) for i in every)
        return Derivatives(by_eta, by_psi, by_psi_twice)

    def expected(self, eta: Array, size: Array | None, psi: Sequence[Array]) -> Expected:
        raise ValueError(f"the expected curvature of a {self.name} response is not here: use curvature='observed'")

    def response_mean(self, mu: Array, psi: Sequence[Array]) -> Array:
        """``(1 - pi) mu``."""
        return mu * expit(-as_array(psi[-1]))

    def variance(self, mu: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        """``(1 - pi) (V + pi m^2)``, V and m the base's variance and mean; mu is the base's mean, of ``y / size``."""
        pi, m = expit(as_array(psi[-1])), mu if size is None else mu * size
        return (1 - pi) * (self.base.variance(mu, size, psi[:-1]) + pi * m**2)

    def eta_start(self, y: Array, size: Array | None = None) -> Array:
        return self.base.eta_start(y, size)

    def _mean_start(self, y: Array, size: Array | None) -> Array:
        return self.base._mean_start(y, size)

    def psi_start(self, y: Array, mu: Array, size: Array | None = None) -> Array:
        """The base's as if there were no extra zeros, and the share of zeros that it then does not have."""
        own = self.base.psi_start(y, mu, size)
        y = as_array(y)
        xp = namespace(y, mu)
        none = xp.exp(-self.base.density(LINEAR[self.link](mu), xp.zeros_like(y), size, list(own)))
        expected, found = none.mean(0), (y == 0).mean(0)
        share = (found - expected) / xp.maximum(1.0 - expected, 1e-3)
        share = xp.clip(xp.where(xp.isfinite(share), share, LEAST), LEAST, MOST)
        return xp.concatenate([own, (xp.log(share) - xp.log1p(-share))[None]])

    def deviance(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        """``2 (C - C_s)`` with the same psi, C_s of the mean that makes the response most likely: of a 0 that is 0."""
        xp, C, y = as_floats(self.density(eta, y, size, psi), y)
        return xp.where(y == 0, 2 * C, self.base.deviance(eta, y, size, psi[:-1]))

    def cdf(self, y: np.ndarray, eta: np.ndarray, size: np.ndarray | None, psi: Sequence[Any]) -> np.ndarray:
        pi = np.asarray(expit(as_array(psi[-1])))
        return np.where(np.floor(y) < 0, 0.0, pi + (1 - pi) * self.base.cdf(y, eta, size, psi[:-1]))

    def draw(self, key: Any, eta: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        own, extra = jax.random.split(key)
        drawn = self.base.draw(own, eta, size, psi[:-1])
        return jnp.where(jax.random.uniform(extra, drawn.shape) < expit(jnp.asarray(psi[-1])), 0.0, drawn)

    def sample(
        self, rng: np.random.Generator, eta: np.ndarray, size: np.ndarray | None, psi: Sequence[Any]
    ) -> np.ndarray:
        drawn = self.base.sample(rng, eta, size, psi[:-1])
        return np.where(rng.random(drawn.shape) < expit(as_array(psi[-1])), 0.0 * drawn, drawn)

    def check(self, y: np.ndarray, size: np.ndarray | None, name: str) -> None:
        self.base.check(y, size, name)
        single = 1.0 if size is None and self.support == "trials" else size
        check_zeros(np.asarray(y), single, name)

    def natural(self, psi: Sequence[Array]) -> Array:
        """Those of the base, and the probability of an extra zero."""
        z = as_array(psi)[-1:]
        return namespace(z).concatenate([as_array(self.base.natural(psi[:-1])), expit(z)])

    def unconstrained(self, values: Sequence[float]) -> np.ndarray:
        *own, pi = values
        if not 0 < pi < 1:
            raise ValueError(f"zero_inflation is a probability above 0 and below 1, got {pi!r}")
        return np.append(self.base.unconstrained(own), np.log(pi) - np.log1p(-pi))

    def natural_slope(self, psi: Sequence[Array]) -> Array:
        z = as_array(psi)[-1:]
        own = as_array(self.base.natural_slope(psi[:-1]))
        return namespace(z).concatenate([own, expit(z) * expit(-z)])


def check_zeros(y: np.ndarray, size: np.ndarray | float | None, name: str) -> None:
    """Raise DataError where extra zeros cannot be told."""
    if size is not None and (np.asarray(size) == 1).all():
        raise DataError(f"{name}: extra zeros of single trials cannot be told from failures; leave ziformula= out")
    if y.size and not (y == 0).any():
        raise DataError(f"{name}: no response is 0, so that there are no extra zeros: leave ziformula= out")


def _value(xp: Any, c: Array, z: Array, zero: Array) -> Array:
    """C without cancellation: differences are of what is small."""
    high = z > 0
    z_high, z_low = xp.where(high, z, 0.0), xp.where(high, 0.0, z)
    of_zero = xp.where(
        high,
        xp.log1p(xp.exp(-z_high)) - xp.log1p(xp.exp(-z_high - c)),
        xp.log1p(xp.exp(z_low)) - xp.logaddexp(z_low, -c),
    )
    return xp.where(zero, of_zero, c + xp.logaddexp(z, 0.0 * z))


@cache
def _partitions(index: tuple[int, ...]) -> tuple[tuple[tuple[Block, ...], int], ...]:
    """The partitions of indices into blocks, with how often each is met."""

    def all_of(count: int) -> list[list[list[int]]]:
        if not count:
            return [[]]
        found = []
        for smaller in all_of(count - 1):
            for i in range(len(smaller)):
                found.append([*smaller[:i], [*smaller[i], count - 1], *smaller[i + 1 :]])
            found.append([*smaller, [count - 1]])
        return found

    met = Counter(
        tuple(sorted(tuple(sorted(index[i] for i in block)) for block in blocks)) for blocks in all_of(len(index))
    )
    return tuple(sorted(met.items()))
