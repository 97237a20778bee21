"""A user's statistic of the estimates, a number, an array or a dict of those, computed of many fits."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.estimation.estimate import Estimates
from mixjax.estimation.glmm import GLMMEstimates
from mixjax.machine import float64
from mixjax.resampling.replicates import NUMBERS

# A statistic is computed for so many fits at a time, or for fewer where each has many numbers.
BLOCK = 2**10


class Statistic:
    """A JAX function of one :class:`~mixjax.Estimates`, or :class:`~mixjax.GLMMEstimates`.

    Attributes:
        names: of its numbers. estimate: ``(k,)`` at ``own``.

    Args:
        function: the user's. own: one fit, arrays of numbers, None where estimates of many will have nothing.
    """

    def __init__(self, function: Callable[[Any], Any], own: Estimates | GLMMEstimates):
        self._function = function
        with float64():
            own = jax.tree.map(jnp.asarray, own)
            leaves = named(function, function(own))
            self.names = tuple(name for name, leaf in leaves for name in entries(name, leaf))
            self.estimate = np.concatenate([np.ravel(leaf) for _, leaf in leaves]).astype(np.float64)
            jax.eval_shape(self._flat, own)  # a function that JAX cannot trace fails here, before any refit

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_many"}  # programs cannot be pickled

    def of_many(self, est: Any) -> np.ndarray:
        """``(B, k)`` of B fits, by blocks of one size: the function is compiled once, and its last bits do not depend
        on how many fits there are."""
        leaves, B = jax.tree.leaves(est), len(est.result)
        numbers = sum(int(np.prod(leaf.shape[1:])) for leaf in leaves)
        size = max(1, min(BLOCK, NUMBERS // max(1, numbers)))
        values = np.empty((B, len(self.names)))
        with float64():
            for first in range(0, B, size):
                at = np.minimum(np.arange(first, first + size), B - 1)
                block = np.asarray(self._many(jax.tree.map(lambda leaf, at=at: leaf[at], est)))
                values[first : first + size] = block[: B - first]
        return values

    @cached_property
    def _many(self) -> Any:
        return jax.jit(jax.vmap(self._flat))

    def _flat(self, est: Any) -> jax.Array:
        leaves = named(self._function, self._function(est))
        return jnp.concatenate([jnp.ravel(leaf).astype(jnp.float64) for _, leaf in leaves])


def named(function: Any, value: Any) -> list[tuple[str, Any]]:
    """The parts of a statistic's value, with names."""
    if not isinstance(value, dict):
        value = {getattr(function, "__name__", "statistic").replace("<lambda>", "statistic"): value}
    for name, leaf in value.items():
        if not isinstance(leaf, jax.Array | np.ndarray | np.generic | float | int) or not jnp.isrealobj(leaf):
            raise ValueError(
                f"the statistic must be a real number, an array or a dict of those; {name!r} is {type(leaf).__name__}"
            )
    return [(str(name), jnp.asarray(leaf)) for name, leaf in value.items()]


def entries(name: str, leaf: Any) -> list[str]:
    """Names of the numbers in one part."""
    if not np.ndim(leaf):
        return [name]
    return [f"{name}[{','.join(map(str, index))}]" for index in np.ndindex(np.shape(leaf))]
