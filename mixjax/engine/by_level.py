"""The marginal likelihood, split over the levels of the outermost grouping factor."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mixjax import linalg
from mixjax.design import Design, check_design, check_is_design, refuse_beyond, refuse_trials
from mixjax.engine.criterion import in_bases
from mixjax.engine.elimination import arrange, factor_lambda, sum_children
from mixjax.engine.marginal import MarginalParams, check_shapes
from mixjax.forks import refuse_forked
from mixjax.machine import Array, is_concrete, jit
from mixjax.products.rows import rows_of
from mixjax.products.sums import CrossProducts, sum_by_group


class LevelProducts(NamedTuple):
    """Cross-products, and what of them belongs to each of the m levels of the outermost factor.

    Attributes:
        stats: of all rows.
        XX, Xy, yy: ``(p, p, m), (p, m), (m,)``. n: ``(m,)`` rows. log_weights: ``(m,)`` sums.
    """

    stats: CrossProducts
    XX: Any
    Xy: Any
    yy: Any
    n: Any
    log_weights: Any


def marginal_loglik_by_level(params: MarginalParams, design: Design, factor: int | None = None) -> Array:
    """Log-density of the rows of every level of the outermost grouping factor; they add up to
    :func:`mixjax.marginal_loglik`.

    Rows of different levels are independent given ``params``, where all grouping factors are nested in one. So this
    gives exact losses of some of the levels, scores by level (``jax.jacobian``), and what leaving one level out
    changes. A pure function, as :func:`mixjax.marginal_loglik` is.

    Fixed effects need not be estimable from the design: X may have fewer rows than columns, as in one of
    :func:`mixjax.group_batches`, where X itself is traced or rows are padded.

    Args:
        params: see :class:`~mixjax.MarginalParams`.
        design: arrays; rows that are not there (``present``) add nothing.
        factor: number of the grouping factor whose levels are meant, factors counted in the order of the terms; None
            for the outermost.

    Returns:
        ``(m,)``; 0 for a level without rows.

    Raises:
        ValueError: grouping factors cross each other, so that the density does not split; or the factor is one whose
            levels share effects with other levels.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> term = mj.RandomTerm(Z=np.ones((12, 1)), group=np.repeat(np.arange(4), 3), n_groups=4)
        >>> design = mj.Design(y=np.arange(12.0), X=np.ones((12, 1)), terms=(term,))
        >>> p = mj.MarginalParams(beta=np.array([5.5]), log_sigma=np.array(0.0), chol=(np.array([1.0]),))
        >>> mj.marginal_loglik_by_level(p, design).shape
        (4,)
    """
    refuse_forked()
    check_is_design(design)
    if design.present is not None or not is_concrete(design.X):
        params, design = without_fixed(params, design)
    products = level_products(design, factor)
    check_shapes(params, products.stats)
    return loglik_by_level(params, products)


def without_fixed(params: MarginalParams, design: Design) -> tuple[MarginalParams, Design]:
    """The same density with ``X beta`` as part of the offset: no basis of X is needed, which few rows may not have."""
    check_design(design)
    xp = np if is_concrete(design.X) and is_concrete(params.beta) else jnp
    X, beta = xp.asarray(design.X), xp.asarray(params.beta)
    if beta.shape != X.shape[1:]:
        raise ValueError(f"beta has shape {beta.shape}; this model needs {X.shape[1:]}")
    offset = X @ beta
    if design.offset is not None:
        offset = offset + (design.offset if is_concrete(design.offset) else jnp.asarray(design.offset))
    return params._replace(beta=beta[:0]), replace(design, X=X[:, :0], offset=offset)


def level_products(design: Design, factor: int | None = None) -> LevelProducts:
    """The sums that :func:`marginal_loglik_by_level` needs; it raises what that raises."""
    refuse_trials(design)
    refuse_beyond(design, "mixjax.marginal_loglik_by_level", padded=True)
    rows = rows_of(design)
    layout = rows.layout
    if layout.dense:
        raise ValueError(
            "the grouping factors of this design cross each other: a row shares effects with rows of all levels, and "
            "the density does not split over levels; with one factor, or factors nested in each other, it does"
        )
    outer = layout.chain[-1]
    if factor is not None and factor != outer:
        if factor not in layout.chain:
            raise ValueError(f"factor must be one of 0 .. {len(layout.chain) - 1}, got {factor!r}")
        raise ValueError(
            f"grouping factor {factor} is nested in factor {outer}: its levels share that one's effects, and the "
            f"density does not split over them; take factor={outer}, or None"
        )
    group, m, Q, residual = rows.groups[outer], rows.levels[outer], rows.Q, rows.residual
    return LevelProducts(
        rows.stats,
        sum_by_group(Q.T[:, None] * Q.T[None], group, m),
        sum_by_group(Q.T * residual, group, m),
        sum_by_group(residual * residual, group, m),
        sum_by_group(rows.counts, group, m),
        sum_by_group(rows.log_w, group, m),
    )


@jit
def loglik_by_level(params: MarginalParams, products: LevelProducts) -> Array:
    """As :func:`marginal_loglik_by_level`, from sums."""
    stats = products.stats
    layout, sigma = stats.layout, jnp.exp(params.log_sigma)
    lambdas = in_bases(
        [
            structure.factor(structure.exponentials(jnp.asarray(chol))) / sigma
            for chol, structure in zip(params.chol, layout.structures, strict=True)
        ],
        stats,
    )
    return split(lambdas, params.log_sigma, stats.X_basis.R @ (params.beta - stats.beta0), products)


def split(lambdas: list[Array], log_sigma: Array, delta: Array, products: LevelProducts) -> Array:
    """``(m,)`` log-densities by level.

    Args:
        lambdas: per term ``(q, q)``, relative, in the bases of the products. delta: ``(p,)`` of the basis of X, on top
            of least squares.
    """
    layout, blocks = products.stats.layout, arrange(products.stats)
    sigma2 = jnp.exp(2.0 * log_sigma)
    outer = layout.chain[-1]
    m = products.yy.shape[0]
    A = dict(blocks.A)
    # Z'(y - X beta) of every factor: the border's last column less its others.
    b = {f: B[:, -1] - jnp.einsum("apm,p->am", B[:, :-1], delta) for f, B in blocks.B.items()}
    rss = products.yy - 2.0 * jnp.einsum("p,pm->m", delta, products.Xy)
    rss = rss + jnp.einsum("p,pqm,q->m", delta, products.XX, delta)
    found = products.n * (math.log(2.0 * math.pi) + 2.0 * log_sigma) - products.log_weights + rss / sigma2
    C = dict(blocks.C)
    for i, f in enumerate(layout.chain):
        K, logdets = linalg.gain(factor_lambda(lambdas, layout, f), A[f])
        Kb = linalg.matmul(K, b[f][:, None])[:, 0]
        own = logdets - (b[f] * Kb).sum(0) / sigma2
        found = found + (own if f == outer else sum_children(own, C[f, outer][0], m))
        above = layout.chain[i + 1 :]
        for j, s in enumerate(above):
            parent, C_fs = C[f, s]
            C_sf_K = linalg.matmul(linalg.transpose(C_fs), K)
            levels = A[s].shape[2]
            A[s] = A[s] - sum_children(linalg.matmul(C_sf_K, C_fs), parent, levels)
            b[s] = b[s] - sum_children(linalg.matmul(C_sf_K, b[f][:, None])[:, 0], parent, levels)
            for t in above[j + 1 :]:
                of_s, C_st = C[s, t]
                C[s, t] = (of_s, C_st - sum_children(linalg.matmul(C_sf_K, C[f, t][1]), parent, levels))
    return -0.5 * found
