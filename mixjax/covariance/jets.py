"""Values with their first and second derivatives, for a few variables and many lanes, of NumPy or JAX.

A structure that is not linear in its coordinates is written once, as sums and products, and run over numbers or over
jets: no derivative is written by hand. A jet is a Taylor polynomial of second order (Griewank & Walther 2008,
Evaluating Derivatives, chapter 13).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from mixjax.machine import Array, namespace

# What sums and products are written for: arrays, or jets.
Ring: TypeAlias = Any


@dataclass(frozen=True, slots=True)
class Jet:
    """A function of n variables at a point: ``value (...)``, ``slope (n, ...)``, ``curve (n, n, ...)``."""

    value: Array
    slope: Array
    curve: Array

    def __add__(self, other: Any) -> Jet:
        if not isinstance(other, Jet):
            return Jet(self.value + other, self.slope, self.curve)
        return Jet(self.value + other.value, self.slope + other.slope, self.curve + other.curve)

    def __sub__(self, other: Any) -> Jet:
        return self.__add__(other * -1.0)

    def __mul__(self, other: Any) -> Jet:
        if not isinstance(other, Jet):
            return Jet(self.value * other, self.slope * other, self.curve * other)
        a, b = self, other
        cross = a.slope[:, None] * b.slope[None]
        curve = a.value * b.curve + b.value * a.curve + cross + namespace(cross).swapaxes(cross, 0, 1)
        return Jet(a.value * b.value, a.value * b.slope + b.value * a.slope, curve)

    def __rmul__(self, other: Any) -> Jet:
        return self.__mul__(other)

    def __radd__(self, other: Any) -> Jet:
        return self.__add__(other)


def jet(value: Array, slope: Array, curve: Array, j: int, n: int) -> Jet:
    """A function of variable j of n, by its value and its derivatives, all ``(...)``."""
    unit = np.zeros((n, *(1,) * np.ndim(value)))
    unit[j] = 1.0
    return Jet(value, unit * slope, unit[:, None] * unit[None] * curve)


def constant(value: Array, n: int) -> Jet:
    """A number, ``(...)``, that no variable moves."""
    return jet(value, 0.0 * value, 0.0 * value, 0, n)
