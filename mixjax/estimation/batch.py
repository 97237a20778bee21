"""Many data sets of one structure as the lanes of the closed form; what they share is prepared once."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import numpy as np

from mixjax.bases import Basis
from mixjax.covariance import Unstructured
from mixjax.engine.lanes import Bases, Lanes
from mixjax.engine.moments import ClassSums, LevelSums, Moments, moments_of
from mixjax.machine import jit
from mixjax.products.sums import ClassProducts, CrossProducts, FactorProducts, PairProducts


class Batch:
    """B responses of one design, or B designs, as lanes.

    Args:
        stats: their cross-products. at_once: for NumPy, where products of matrices are cheaper than moments.
    """

    def __init__(self, stats: CrossProducts, at_once: bool = False):
        self.stats, self.at_once = stats, at_once
        self.B = len(stats.yy)
        self.stacked = np.ndim(stats.XX) == 3
        self._axes = batch_axes(stats)
        self.one_minimum = np.bool_(_has_one_minimum(stats))
        if not self.stacked:
            single = replace(replicates(stats, self._axes, 0), classes=None)
            if stats.classes is not None:
                single = _without_levels(single)
            shared = moments_of(single, alone=False)
            if stats.classes is not None:
                ZZ, count, UU = (np.asarray(a)[..., None] for a in stats.classes[:3])
                shared = replace(shared, A=ZZ, count=count, pair_UU=UU)
            self._shared = shared

    @property
    def shapes(self) -> Moments:
        """Moments of one lane, for their shapes."""
        return moments_of(replicates(self.stats, self._axes, 0), alone=False) if self.stacked else self._shared

    def lanes(self, at: slice | np.ndarray, reml: bool | np.bool_) -> Lanes:
        """Some of the data sets."""
        part = replicates(self.stats, self._axes, at)
        if not self.stacked:
            bases = Bases(
                np.asarray(part.X_basis.R_inv)[..., None],
                last(part.beta0),
                tuple(Basis(*(np.asarray(a)[..., None] for a in basis)) for basis in part.Z_bases),
            )
            return Lanes(self._with_responses(part), bases, reml)
        if self.at_once:
            moments = _stacked_at_once(part)
        else:
            moments = jax.tree.map(lambda a: np.asarray(a)[..., 0, :], _stacked(part))
        bases = Bases(last(part.X_basis.R_inv), last(part.beta0), jax.tree.map(last, part.Z_bases))
        return Lanes(moments, bases, reml)

    def levels(self, at: slice | np.ndarray) -> Moments | None:
        """The moments level by level of data sets whose :meth:`lanes` have them by class; None of others."""
        if self.stats.classes is None:
            return None
        whole = moments_of(replace(replicates(self.stats, self._axes, 0), classes=None), alone=False)
        z = last(replicates(self.stats, self._axes, at).factors[whole.layout.chain[0]].Zy)
        return replace(whole, sums=LevelSums(whole.sums.U, z))  # type: ignore[union-attr]

    def _with_responses(self, part: CrossProducts) -> Moments:
        shared, layout = self._shared, self._shared.layout
        dense = [last(part.factors[f].Zy).reshape(q * m, -1) for f, q, m in shared.dense]
        if part.classes is not None:
            sums: Any = ClassSums(last(part.classes.Uy), last(part.classes.yy))
        else:
            sums = LevelSums(shared.sums.U, last(part.factors[layout.chain[0]].Zy))  # type: ignore[union-attr]
        return replace(shared, sums=sums, Uy=np.concatenate([*dense, last(part.Xy)]), yy=np.asarray(part.yy))


def one_lane(stats: CrossProducts, reml: bool) -> Lanes:
    """One data set, for lanes that share it."""
    R_inv, beta0 = stats.X_basis.R_inv, stats.beta0
    bases = jax.tree.map(lambda a: np.asarray(a)[..., None], Bases(R_inv, beta0, stats.Z_bases))
    return Lanes(moments_of(stats, alone=False), bases, reml)


@jit
def _stacked(stats: CrossProducts) -> Moments:
    return jax.vmap(moments_of, out_axes=-1)(stats)


def _stacked_at_once(stats: CrossProducts) -> Moments:
    """All together where the same levels meet in all, else one after the other."""
    if all((np.asarray(a) == np.asarray(a)[:1]).all() for pair in stats.pairs for a in (pair.rows, pair.cols)):
        lanes = jax.tree.map(lambda a: np.moveaxis(np.asarray(a), 0, -1), stats)
        pairs = tuple(pair._replace(rows=pair.rows[..., 0], cols=pair.cols[..., 0]) for pair in lanes.pairs)
        return moments_of(replace(lanes, pairs=pairs))
    parts = [moments_of(jax.tree.map(lambda a, i=i: a[i], stats)) for i in range(len(stats.yy))]
    stacked: Moments = jax.tree.map(lambda *a: np.moveaxis(np.stack([part[..., 0] for part in a]), 0, -1), *parts)
    return stacked


def last(a: Any) -> np.ndarray:
    """The first axis moved behind all others: replicates in front -> lanes last."""
    return np.ascontiguousarray(np.moveaxis(np.asarray(a), 0, -1))


def batch_axes(stats: CrossProducts) -> CrossProducts:
    """0 for leaves with a leading axis of replicates, -1 for shared ones, in the shape of ``stats``."""
    if np.ndim(stats.XX) == 3:
        every: CrossProducts = jax.tree.map(lambda _: 0, stats)
        return every
    none: CrossProducts = jax.tree.map(lambda _: -1, stats)
    return replace(
        none,
        factors=tuple(f._replace(Zy=0) for f in none.factors),
        Xy=0,
        yy=0,
        beta0=0,
        classes=None if stats.classes is None else ClassProducts(-1, -1, -1, 0, 0),
    )


def replicates(stats: CrossProducts, axes: CrossProducts, at: Any) -> CrossProducts:
    """Some replicates, or one; ``axes`` are those of :func:`batch_axes`."""
    chosen: CrossProducts = jax.tree.map(lambda a, axis: np.asarray(a)[at] if axis == 0 else a, stats, axes)
    return chosen


def _without_levels(stats: CrossProducts) -> CrossProducts:
    """The same without the levels of the first factor, whose moments are known by class."""
    first = stats.layout.chain[0]
    factors = list(stats.factors)
    factors[first] = FactorProducts(*(a[..., :0] for a in factors[first]))
    pairs = [
        PairProducts(*(a[..., :0] for a in pair)) if s == first else pair
        for (s, _), pair in zip(stats.layout.pairs, stats.pairs, strict=True)
    ]
    return replace(stats, factors=tuple(factors), pairs=tuple(pairs))


def _has_one_minimum(stats: CrossProducts) -> bool:
    """Whether the criterion of any response has a single minimum, so that a singular end needs no second search.

    So it is where one term of any covariance has levels of equal ``A = Z_i'Z_i`` and ``B = Z_i'X_i``, B of full row
    rank, and X has p - q directions within levels. Then the estimates of the fixed effects do not depend on the
    covariances, and with ``P = (D + A^{-1})^{-1} / sigma^2`` and ``t = 1 / sigma^2`` the criterion is ``-a log det P +
    tr(P S) - b log t + c t`` with positive a, b, c and S fixed by the data: convex, over the convex set ``0 < P <= t
    A``. A minimum over Cholesky factors is one over their products (Burer & Monteiro 2005, Math. Program. 103, square
    factors).
    """
    structures = stats.layout.structures  # convex over all covariances, not over those of some structure
    if stats.classes is None or structures != (Unstructured(structures[0].q),) or len(stats.classes.count) > 1:
        return False
    products = stats.factors[0]
    A, B = np.asarray(products.ZZ)[:, :, 0], np.asarray(products.ZX)
    q, p, m = B.shape
    if np.ptp(B, axis=2).max(initial=0.0) > 1e-9 * np.abs(B).max(initial=1.0):
        return False
    B = B[:, :, 0]
    if np.linalg.matrix_rank(A) < q or np.linalg.matrix_rank(B) < q or stats.n - m * q <= p - q:
        return False
    within = np.asarray(stats.XX) - m * B.T @ np.linalg.solve(A, B)  # X is in a basis: its own products are ones
    return bool(np.linalg.matrix_rank(within, tol=1e-8) == p - q)
