"""The one elimination: random effects out, log-determinant and fixed-effects equations left.

For relative factors Lambda the penalised least-squares equations of Bates et al. (2015, J. Stat. Softw. 67(1), eqs.
17-21) are reduced block by block. With ``K = D (I + A D)^{-1}`` (see :func:`mixjax.linalg.gain`) eliminating the
effects of one level turns every cross-product ``C`` into ``C - B' K B``. Factors of the chain go level by level, the
finest first, and leave the next one block diagonal; what crosses them is one dense block, reduced last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixjax import linalg
from mixjax.machine import Array, add_at, namespace, set_at
from mixjax.products.sums import CrossProducts, Layout


@dataclass(frozen=True)
class Arranged:
    """Cross-products arranged for the elimination. The border has ``r`` columns: dense effects, basis of X, residual y.

    Attributes:
        A: per chain factor ``(q, q, m)``.
        C: per pair of chain factors (s, t), s nested in t: parents ``(m_s,)`` and products ``(q_s, q_t, m_s)``.
        B: per chain factor ``(q, r, m)``.
        G: ``(r, r)`` products among the border's columns.
        dense: ``(factor, q, m)`` of the dense factors, as their effects stand in the border.
        layout: the structure.
    """

    A: dict[int, Array]
    C: dict[tuple[int, int], tuple[Array, Array]]
    B: dict[int, Array]
    G: Array
    dense: tuple[tuple[int, int, int], ...]
    layout: Layout


class Reduced(NamedTuple):
    """The Schur complement that remains when all random effects are eliminated.

    Attributes:
        logdet: ``log det(I + Z D Z' W)``, one number.
        XX, Xy, yy: ``Q' H^{-1} Q (p, p)``, ``Q' H^{-1} r (p,)``, ``r' H^{-1} r`` with ``H = W^{-1} + Z D Z'``, Q the
            basis of X and r the least-squares residual of y.
    """

    logdet: Array
    XX: Array
    Xy: Array
    yy: Array


def arrange(stats: CrossProducts) -> Arranged:
    """Lay the products out for :func:`eliminate`; linear in the products and independent of theta.

    Products of many data sets that have their levels in common may stand in a last axis of every array.
    """
    layout = stats.layout
    dense = tuple((f, stats.factors[f].ZZ.shape[1], stats.factors[f].ZZ.shape[2]) for f in layout.dense)
    starts, n_dense = {}, 0
    for f, q, m in dense:
        starts[f] = n_dense
        n_dense += q * m
    p = stats.Xy.shape[0]
    r = n_dense + p + 1
    dtype, lanes = stats.XX.dtype, stats.yy.shape
    xp = namespace(*(leaf for leaf in jax.tree.leaves(stats)))

    def border(f: int) -> Array:
        products = stats.factors[f]
        return xp.concatenate([products.ZX, products.Zy[:, None]], axis=1)  # (q, p + 1, m)

    def dense_columns(t: int, q_t: int, levels: Array) -> Array:
        """Border columns of effects 0 .. q_t - 1 of dense factor t at the given levels: (q_t, k)."""
        m = stats.factors[t].ZZ.shape[2]
        levels = xp.minimum(levels, m - 1)  # a level without rows has no parent, and no products with one
        return starts[t] + np.arange(q_t, dtype=np.int32)[:, None] * m + levels[None]

    G = xp.zeros((r, r, *lanes), dtype)
    last = xp.concatenate([stats.Xy, xp.asarray(stats.yy)[None]])
    corner = xp.concatenate([xp.concatenate([stats.XX, stats.Xy[:, None]], 1), last[None]], axis=0)
    G = set_at(G, (slice(n_dense, None), slice(n_dense, None)), corner)
    for t, q, m in dense:
        at = dense_columns(t, q, np.arange(m, dtype=np.int32))  # (q, m)
        G = add_at(G, (at[:, None], at[None]), stats.factors[t].ZZ)
        side = border(t)
        index = n_dense + np.arange(p + 1, dtype=np.int32)
        G = set_at(G, (at[:, None], index[None, :, None]), side)
        G = set_at(G, (index[:, None, None], at[None]), side.swapaxes(0, 1))
    B = {}
    for f in layout.chain:
        q, _, m = stats.factors[f].ZZ.shape[:3]
        B[f] = xp.concatenate([xp.zeros((q, n_dense, m, *lanes), dtype), border(f)], axis=1)
    C = {}
    for (s, t), pair in zip(layout.pairs, stats.pairs, strict=True):
        q_s, q_t = pair.ZZ.shape[:2]
        if s in layout.chain and t in layout.chain:
            C[s, t] = (pair.cols, pair.ZZ)
        elif s in layout.chain:
            at = dense_columns(t, q_t, pair.cols)
            effect = np.arange(q_s, dtype=np.int32)[:, None, None]
            B[s] = add_at(B[s], (effect, at[None], pair.rows[None, None]), pair.ZZ)
        else:
            at_s = dense_columns(s, q_s, pair.rows)
            at_t = dense_columns(t, q_t, pair.cols)
            G = add_at(G, (at_s[:, None], at_t[None]), pair.ZZ)
            G = add_at(G, (at_t[:, None], at_s[None]), pair.ZZ.swapaxes(0, 1))
    return Arranged({f: stats.factors[f].ZZ for f in layout.chain}, C, B, G, dense, layout)


def eliminate(lambdas: list[Array], blocks: Arranged) -> Reduced:
    """Eliminate all random effects.

    Args:
        lambdas: per random term ``(q, q)``, any factor of its relative covariance, in the bases of the products.
        blocks: arranged products.
    """
    layout = blocks.layout
    A, C, B, G = dict(blocks.A), dict(blocks.C), dict(blocks.B), blocks.G
    logdet = jnp.zeros((), G.dtype)
    for i, f in enumerate(layout.chain):
        K, logdets = linalg.gain(factor_lambda(lambdas, layout, f), A[f])
        logdet = logdet + logdets.sum()
        KB = linalg.matmul(K, B[f])
        above = layout.chain[i + 1 :]
        for j, s in enumerate(above):
            parent, C_fs = C[f, s]
            C_sf_K = linalg.matmul(linalg.transpose(C_fs), K)
            m = A[s].shape[2]
            A[s] = A[s] - sum_children(linalg.matmul(C_sf_K, C_fs), parent, m)
            B[s] = B[s] - sum_children(linalg.matmul(C_sf_K, B[f]), parent, m)
            for t in above[j + 1 :]:
                of_s, C_st = C[s, t]
                C[s, t] = (of_s, C_st - sum_children(linalg.matmul(C_sf_K, C[f, t][1]), parent, m))
        G = G - jnp.einsum("arm,asm->rs", B[f], KB)

    n_dense = sum(q * m for _, q, m in blocks.dense)
    if n_dense:
        scaled = _times_dense_lambda(lambdas, blocks, G[:n_dense])
        M = jnp.eye(n_dense, dtype=G.dtype) + _times_dense_lambda(lambdas, blocks, scaled[:, :n_dense].T)
        logdet = logdet + linalg.inverse_logdet(M)[1]
        G = G[n_dense:, n_dense:] - linalg.quadratic_form(M, scaled[:, n_dense:])
    return Reduced(logdet, G[:-1, :-1], G[:-1, -1], G[-1, -1])


def factor_lambda(lambdas: list[Array], layout: Layout, f: int) -> Array:
    """Block diagonal Lambda of all terms on one grouping factor."""
    own = [Lambda for Lambda, place in zip(lambdas, layout.terms, strict=True) if place.factor == f]
    if not own:  # the empty factor
        return jnp.zeros((1, 1), lambdas[0].dtype)
    return own[0] if len(own) == 1 else jax.scipy.linalg.block_diag(*own)


def sum_children(x: Array, parent: Array, m: int) -> Array:
    """Sum ``(..., m_s)`` over the levels of each parent: ``(..., m)``."""
    return jnp.moveaxis(jax.ops.segment_sum(jnp.moveaxis(x, -1, 0), parent, m), 0, -1)


def _times_dense_lambda(lambdas: list[Array], blocks: Arranged, rows: Array) -> Array:
    """``Lambda' rows`` for the block of all dense effects: ``(n_dense, r) -> (n_dense, r)``."""
    parts, start = [], 0
    for f, q, m in blocks.dense:
        Lambda = factor_lambda(lambdas, blocks.layout, f)
        part = rows[start : start + q * m].reshape(q, m, rows.shape[1])
        parts.append(linalg.matmul(Lambda.T, part.reshape(q, 1, -1)).reshape(q * m, -1))
        start += q * m
    return jnp.concatenate(parts)
