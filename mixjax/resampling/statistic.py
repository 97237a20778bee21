"""What a user's statistic of the estimates gives: a number, an array, or a dict of those."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


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
