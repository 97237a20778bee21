"""How programs are compiled, and the scope that they run in."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp

from mixjax.design import is_concrete
from mixjax.forks import refuse_forked

# XLA's newer CPU code generator doubles the time that programs of many small vector operations take to compile, and
# their run time is the same within 10 %.
QUICK = {"xla_cpu_use_fusion_emitters": False}
# For programs over lanes, of which each core runs its own. Wide vectors are worth a quarter of the run time where the
# processor has them (docs/performance.md).
LANES = {**QUICK, "xla_cpu_prefer_vector_width": 512, "xla_cpu_multi_thread_eigen": False}


def jit(fun: Callable, compiler_options: dict[str, Any] = QUICK, **options: Any) -> Callable:
    """``jax.jit`` with compiler options that suit small programs on CPUs, where they can be had.

    JAX takes compiler options only outside its transformations, and XLA only those that it knows: in all other cases
    this is ``jax.jit``.
    """
    plain = jax.jit(fun, **options)
    quick = jax.jit(fun, **options, compiler_options=compiler_options)
    known = True

    @wraps(fun)
    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal known
        refuse_forked()
        # Inside jit even a constant is traced.
        outside = all(map(is_concrete, jax.tree.leaves((args, kwargs)))) and is_concrete(jnp.zeros(()))
        if known and outside and jax.default_backend() == "cpu":
            try:
                return quick(*args, **kwargs)
            except jax.errors.JaxRuntimeError as error:
                if "No such compile option" not in str(error):
                    raise
                known = False
        return plain(*args, **kwargs)

    call._cache_size = lambda: plain._cache_size() + quick._cache_size()  # type: ignore[attr-defined]
    return call


def float64(on: bool = True) -> AbstractContextManager[None]:
    """JAX's scope of 64 bits, which every call enters that takes or gives names; refused in a forked process."""
    refuse_forked()
    return jax.enable_x64(on)
