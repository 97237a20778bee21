"""From a design to sums over its rows. After this step nothing costs O(n)."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.design import Design, refuse_padding, refuse_residual_side, refuse_trials
from mixjax.machine import is_concrete
from mixjax.products.responses import Responses
from mixjax.products.rows import rows_of
from mixjax.products.sums import CrossProducts


def cross_products(design: Design, y: Any = None) -> CrossProducts:
    """Sums over rows of a design; the step after which the number of rows does not matter.

    Args:
        design: arrays of the model. Concrete arrays are summed by numpy in float64; inside a JAX transformation the
            same sums are JAX operations, differentiable with respect to y, X, Z, weights and offset.
        y: ``(n,)`` another response for the same design, ``(B, n)`` many, or None for ``design.y``. Missing values in
            one of many give that one the result code ``NOT_FINITE``.

    Returns:
        :class:`CrossProducts`; its floating dtype is that of the inputs. Many responses share what does not depend on
        y; theirs has a leading axis.

    Raises:
        ValueError: shapes or values do not make a model; the design has numbers of trials.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> term = mj.RandomTerm(Z=np.ones((12, 1)), group=np.repeat(np.arange(4), 3), n_groups=4)
        >>> design = mj.Design(y=np.arange(12.0), X=np.ones((12, 1)), terms=(term,))
        >>> float(mj.cross_products(design).n)
        12.0
    """
    refuse_trials(design)
    refuse_residual_side(design, "sums of its rows")
    if y is not None and np.ndim(y) == 2:
        stats = _of_many(design, y)
    else:
        design = design if y is None else replace(design, y=y)
        stats = rows_of(design).stats
    dtype = _floating_dtype(design if y is None else replace(design, y=y))
    found: CrossProducts = jax.tree.map(partial(_astype, dtype=dtype), stats)
    return found


def _of_many(design: Design, Y: Any) -> CrossProducts:
    refuse_padding(design, "one of many responses")
    B, n = np.shape(Y)
    if n != np.shape(design.X)[0]:
        raise ValueError(f"y has shape {(B, n)}, but X has {np.shape(design.X)[0]} rows; many responses are (B, n)")
    if not all(map(is_concrete, jax.tree.leaves((design, Y)))):
        return jax.vmap(lambda y: cross_products(design, y))(Y)
    return Responses(rows_of(replace(design, y=np.zeros(n)))).products(np.asarray(Y))


def _floating_dtype(design: Design) -> np.dtype:
    """The widest floating dtype among the arrays; integers count as float64."""
    arrays = [design.y, design.X, *(term.Z for term in design.terms), design.weights, design.offset]
    traced = any(not is_concrete(x) for x in arrays if x is not None)
    dtypes = [x.dtype if hasattr(x, "dtype") else np.asarray(x).dtype for x in arrays if x is not None]
    widest = np.result_type(*([d for d in dtypes if jnp.issubdtype(d, jnp.floating)] or [np.float64]))
    return jax.dtypes.canonicalize_dtype(widest) if traced else widest


def _astype(leaf: Any, dtype: Any) -> Any:
    if not is_concrete(leaf):
        return leaf if jnp.issubdtype(leaf.dtype, jnp.integer) else leaf.astype(dtype)
    leaf = np.asarray(leaf)
    return leaf if leaf.dtype.kind in "iu" else leaf.astype(dtype, copy=False)
