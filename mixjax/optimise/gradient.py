"""First-order minimisers from optax."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array


@partial(jax.jit, static_argnames=("fun", "optimizer", "max_steps"))
def minimise_with(
    optimizer: optax.GradientTransformation,
    fun: Callable[..., Array],
    x0: Array,
    data: Any,
    max_steps: int = 5000,
    tolerance: float = 1e-9,
) -> tuple[Array, Array]:
    """Run an optax optimiser until the gradient is small.

    Args:
        optimizer: any optax GradientTransformation; those with a line search get value and gradient as they need.
        fun: ``(x (k,), data) -> ()``.
        x0: ``(k,)``.
        data: pytree passed on to ``fun``.
        max_steps: limit.
        tolerance: stop when no entry of the gradient is larger.

    Returns:
        x ``(k,)`` and the number of steps taken.
    """
    full = optax.with_extra_args_support(optimizer)
    objective = partial(fun, data=data)

    def step(state: Any) -> Any:
        x, opt_state, _, count = state
        value, gradient = jax.value_and_grad(objective)(x)
        updates, opt_state = full.update(gradient, opt_state, x, value=value, grad=gradient, value_fn=objective)
        # Adam's first step is as long for a gradient that is nothing but rounding as for any other.
        updates = jax.tree.map(lambda u: jnp.where(is_small(gradient), 0.0, u), updates)
        return optax.apply_updates(x, updates), opt_state, gradient, count + 1

    def is_small(gradient: Array) -> Array:
        return jnp.abs(gradient).max() <= tolerance

    def goes_on(state: Any) -> Any:
        _, _, gradient, count = state
        return (count < max_steps) & ~is_small(gradient) & ~jnp.isnan(gradient).any()

    start = (x0, full.init(x0), jnp.full_like(x0, jnp.inf), jnp.array(0))
    x, _, _, count = jax.lax.while_loop(goes_on, step, start)
    return x, count
