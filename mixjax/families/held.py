"""A family with one of its parameters at a given value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mixjax.families.family import Derivatives, Expected, Family
from mixjax.machine import Array


@dataclass(frozen=True)
class HeldFamily(Family):
    """Another family with its parameter ``which`` at ``value``, a logarithm: it has one parameter less.

    Attributes:
        family: the other one; :attr:`link` is its link.
    """

    family: Family
    which: int
    value: float

    @property
    def name(self) -> str:  # type: ignore[override]
        return self.family.name

    @property
    def links(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.family.links

    @property
    def psi_names(self) -> tuple[str, ...]:  # type: ignore[override]
        names = self.family.psi_names
        return names[: self.which] + names[self.which + 1 :]

    @property
    def has_expected(self) -> bool:  # type: ignore[override]
        return self.family.has_expected

    @property
    def log_concave(self) -> bool:
        return self.family.log_concave

    def whole(self, psi: Sequence[Array]) -> list[Array]:
        """All parameters of the other family."""
        found = list(psi)
        found.insert(self.which, np.full(np.shape(found[0]) if found else (), self.value))
        return found

    def density(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        return self.family.density(eta, y, size, self.whole(psi))

    def derivatives(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Derivatives:
        found = self.family.derivatives(eta, y, size, self.whole(psi))
        return Derivatives(
            found.by_eta, self._others(found.by_psi), tuple(map(self._others, self._others(found.by_psi_twice)))
        )

    def expected(self, eta: Array, size: Array | None, psi: Sequence[Array]) -> Expected:
        found = self.family.expected(eta, size, self.whole(psi))
        twice = tuple(map(self._others, self._others(found.by_psi_twice)))
        return Expected(found.w, found.by_eta, self._others(found.by_psi), twice)

    def _others(self, parts: tuple) -> tuple:  # type: ignore[type-arg]
        return (*parts[: self.which], *parts[self.which + 1 :])

    def natural(self, psi: Sequence[Array]) -> Array:
        return np.delete(self.family.natural(self.whole(psi)), self.which, axis=0)

    def natural_slope(self, psi: Sequence[Array]) -> Array:
        return np.delete(self.family.natural_slope(self.whole(psi)), self.which, axis=0)

    def mean(self, eta: Array) -> Array:
        return self.family.mean(eta)

    def variance(self, mu: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        return self.family.variance(mu, size, self.whole(psi))

    def eta_start(self, y: Array, size: Array | None = None) -> Array:
        return self.family.eta_start(y, size)

    def _mean_start(self, y: Array, size: Array | None) -> Array:
        return self.family._mean_start(y, size)

    def psi_start(self, y: Array, mu: Array, size: Array | None = None) -> Array:
        found = self.family.psi_start(y, mu, size)
        return np.delete(found, self.which, axis=0)

    def deviance(self, eta: Array, y: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        return self.family.deviance(eta, y, size, self.whole(psi))

    def draw(self, key: object, eta: Array, size: Array | None, psi: Sequence[Array]) -> Array:
        return self.family.draw(key, eta, size, self.whole(psi))

    def sample(
        self, rng: np.random.Generator, eta: np.ndarray, size: np.ndarray | None, psi: Sequence[Array]
    ) -> np.ndarray:
        return self.family.sample(rng, eta, size, self.whole(psi))

    def check(self, y: np.ndarray, size: np.ndarray | None, name: str) -> None:
        self.family.check(y, size, name)
