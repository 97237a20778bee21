"""Conditional means of the rows of a design."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.design import AnyArray, Design
from mixjax.forks import refuse_forked
from mixjax.machine import is_concrete


def predict(est: Any, design: Design) -> AnyArray:
    """Conditional means ``offset + X beta + sum_t Z_t b_t`` of the rows of a design.

    A pure function: ``jit``, ``grad`` and ``vmap`` work. numpy arrays give numpy, in their own precision; anything else
    is JAX's, float64 inside ``with jax.enable_x64():``.

    Args:
        est: :class:`~mixjax.Estimates`, of which ``beta (p,)`` and ``b`` (per term ``(n_groups, q)``) are read. Many
            fits: ``jax.vmap(mj.predict, in_axes=(0, None))``.
        design: rows in the columns and levels of the fit; its y and weights are not looked at.

    Returns:
        ``(n,)`` means.

    Raises:
        ValueError: columns, levels or effects of the design are not those of the estimates. Where groups are traced,
            rows of a level that there is not are NaN.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> from mixjax.estimation.blup import predict
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> predict(fit.estimates, fit.design)[:3].round(2)
        array([253.66, 273.33, 293.  ])
    """
    if np.shape(design.X)[1:] != np.shape(est.beta) or len(est.b) != len(design.terms):
        raise ValueError(
            f"estimates of {np.shape(est.beta)[0]} fixed effects and {len(est.b)} random terms do not fit a design "
            f"with {np.shape(design.X)[1]} columns of X and {len(design.terms)} terms"
        )
    for t, (term, b) in enumerate(zip(design.terms, est.b, strict=True)):
        if np.shape(b) != (term.n_groups, np.shape(term.Z)[1]):
            raise ValueError(
                f"est.b[{t}] has shape {np.shape(b)}, but terms[{t}] has {term.n_groups} levels of "
                f"{np.shape(term.Z)[1]} effects"
            )
    read = (design.X, design.offset, est.beta, est.b, design.terms)
    xp = np if all(isinstance(a, np.ndarray | np.generic) for a in jax.tree.leaves(read)) else jnp
    if xp is jnp:
        refuse_forked()
    mean = xp.asarray(design.X) @ xp.asarray(est.beta)
    if design.offset is not None:
        mean = mean + xp.asarray(design.offset)
    for t, (term, b) in enumerate(zip(design.terms, est.b, strict=True)):
        group = xp.asarray(term.group)
        there = (group >= 0) & (group < term.n_groups)
        if is_concrete(term.group) and not np.asarray(there).all():
            bad = int(np.asarray(group)[~np.asarray(there)][0])
            raise ValueError(
                f"terms[{t}].group has level {bad}, and the estimates have 0 .. {term.n_groups - 1}: a new level has "
                "random effects of zero, so give its rows Z = 0 and any level"
            )
        effects = xp.where(there[..., None], xp.asarray(b)[xp.clip(group, 0, term.n_groups - 1)], xp.nan)
        mean = mean + (xp.asarray(term.Z) * effects).sum(axis=-1)
    return mean
