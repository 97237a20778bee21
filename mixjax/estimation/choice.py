"""Who fits a batch: NumPy, or a program that XLA compiles."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from jax.sharding import Mesh

from mixjax.products.sizes import in_blocks, is_small, pays_to_compile
from mixjax.products.sums import CrossProducts

EngineName = Literal["auto", "numpy", "jax"]


def check_engine(engine: Any) -> None:
    """Raise ValueError for what is none."""
    if engine not in ("auto", "numpy", "jax"):
        raise ValueError(f"engine must be 'auto', 'numpy' or 'jax', got {engine!r}")


def chosen_engine(
    stats: CrossProducts, fits: int, engine: EngineName = "auto", mesh: Mesh | None = None
) -> Literal["numpy", "jax"]:
    """The engine of a batch: as asked for, or by the sizes of the model and the number of fits alone.

    Who works on a batch in several calls asks once, with the number of all fits.

    Raises:
        ValueError: NumPy was asked for and does not serve these fits.
    """
    double = np.asarray(stats.yy).dtype == np.float64
    served = double and mesh is None and is_small(stats)
    if engine == "numpy" and not served:
        why = "a mesh is JAX's" if mesh is not None else "the dense block is too large" if double else "not in float64"
        raise ValueError(f"engine='numpy' does not serve these fits ({why}); use engine='auto'")
    if engine != "auto":
        return engine
    at_once = served and (not in_blocks(stats) or not pays_to_compile(fits, stats))
    return "numpy" if at_once else "jax"
