"""Derivatives through the optimum.

At a minimum the gradient with respect to the free coordinates vanishes, ``g(x, data) = 0``, so by the implicit function
theorem ``dx = -H^{-1} (dg / d data) d data``. Nothing is unrolled: the cost is one Hessian and one mixed derivative,
whatever the search took. The rule is built from differentiable functions of the minimum itself, so it can be
differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def as_minimum(fun: Callable[[Array, Any], Array], x: Array, free: Array, exists: Array, data: Any) -> Array:
    """``x``, known to minimise ``fun(., data)`` over its free coordinates, with the derivatives that this implies.

    Args:
        fun: ``(x (k,), data) -> ()``, twice differentiable.
        x: ``(k,)`` the minimum, found by any means; its own derivatives are not looked at.
        free: ``(k,)`` bools; the others are fixed and have derivative zero.
        exists: ``()`` False where there is no derivative; it is NaN then.
        data: pytree.
    """
    return x


@as_minimum.defjvp
def _as_minimum_jvp(
    fun: Callable[[Array, Any], Array], primals: tuple[Any, ...], tangents: tuple[Any, ...]
) -> tuple[Array, Array]:
    x, free, exists, data = primals
    x = as_minimum(fun, x, free, exists, data)
    _, dg = jax.jvp(lambda d: jax.grad(fun)(x, d), (data,), (tangents[3],))
    H = jax.hessian(fun)(x, data)
    H = jnp.where(free[:, None] & free[None], H, jnp.eye(x.shape[0], dtype=x.dtype))
    dx = -jnp.linalg.solve(H, jnp.where(free, dg, 0.0))
    return x, jnp.where(exists, dx, jnp.nan)
