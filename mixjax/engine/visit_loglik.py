"""The log-likelihood of repeated measures as a pure function of its parameters."""

from __future__ import annotations

import math
from typing import Any

import jax
import numpy as np

from mixjax import linalg
from mixjax.design import AnyArray, RepeatedDesign, check_repeated_design
from mixjax.machine import Array, namespace, set_at


def repeated_loglik(beta: AnyArray, Sigma: AnyArray, design: RepeatedDesign) -> Array:
    """``log N(y; offset + X beta, V)``, the errors of a subject's visits with covariance Sigma of its arm.

    A pure function: ``jit``, ``grad``, ``hessian`` and ``vmap`` work, by everything but integers. Every subject costs
    an inverse of ``(T, T)``.

    Args:
        beta: ``(p,)`` fixed effects. Sigma: ``(n_arms, T, T)``, or ``(T, T)`` for all arms: absolute covariances,
            positive definite.
        design: arrays of NumPy or JAX.

    Returns:
        scalar; NaN where a covariance is not positive definite.

    Raises:
        ValueError: shapes do not fit, or numbers of subjects, visits or arms are out of range (where not traced).

    Example:
        >>> import jax, mixjax as mj, numpy as np
        >>> design = mj.RepeatedDesign(
        ...     y=np.arange(12.0) % 5, X=np.ones((12, 1)), subject=np.repeat(np.arange(4), 3), visit=np.arange(12) % 3,
        ...     n_subjects=4, n_visits=3,
        ... )
        >>> with jax.enable_x64():
        ...     slope = jax.grad(mj.repeated_loglik)(np.array([2.0]), np.eye(3), design)
        >>> slope.round(6).tolist()
        [-3.0]
    """
    check_repeated_design(design)
    if np.shape(Sigma) not in ((design.n_visits,) * 2, (design.n_arms, *(design.n_visits,) * 2)):
        raise ValueError(
            f"Sigma has shape {np.shape(Sigma)}; this model needs ({design.n_arms}, {design.n_visits}, "
            f"{design.n_visits}), or one ({design.n_visits}, {design.n_visits}) for all arms"
        )
    if np.shape(beta) != np.shape(design.X)[1:]:
        raise ValueError(f"beta has shape {np.shape(beta)}; this model needs {np.shape(design.X)[1:]}")
    xp = namespace(*jax.tree.leaves((beta, Sigma, design)))
    T, S = design.n_visits, design.n_subjects
    y, X = xp.asarray(design.y), xp.asarray(design.X)
    e = y - X @ xp.asarray(beta)
    if design.offset is not None:
        e = e - design.offset
    sum_log_weights: Any = 0.0
    if design.weights is not None:
        w = xp.asarray(design.weights)
        e, sum_log_weights = e * xp.sqrt(w), xp.log(w).sum()
    # Visits without a row are independent of all others, with variance 1 and residual 0: they add nothing.
    cell = xp.asarray(design.subject) * T + xp.asarray(design.visit)
    empty = xp.zeros(S * T, e.dtype)
    by_visit, seen = set_at(empty, cell, e).reshape(S, T), set_at(empty, cell, 1.0).reshape(S, T)
    Sigma = xp.asarray(Sigma)
    own = Sigma[None] if Sigma.ndim == 2 else Sigma
    own = own[xp.zeros(S, int) if design.arm is None or len(own) == 1 else xp.asarray(design.arm)]
    V = own * seen[:, :, None] * seen[:, None] + xp.eye(T, dtype=e.dtype) * (1.0 - seen)[:, :, None]
    W, logdet = linalg.inverse_logdet(xp.moveaxis(V, 0, -1))
    rss = (xp.moveaxis(W, -1, 0) * by_visit[:, :, None] * by_visit[:, None]).sum()
    n = len(y)
    return -0.5 * (logdet.sum() + rss + n * math.log(2.0 * math.pi) - sum_log_weights)
