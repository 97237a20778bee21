"""Levels with a known covariance: the same products, of effects that are independent.

Effects b of levels with covariance ``K (x) D``, ``K = L L'``, are ``b = L u`` with u independent from level to level,
so that ``Z b = (Z L) u``: every row has a share in all u. Their products follow from those by level, without another
pass over the rows: ``L'(Z'Z)L``, ``L'Z'X``, ``L'Z'y``. All pairs of levels then meet, in the factor and between it and
others, and what the likelihood makes of the products is what it always makes.

Where such a factor is alone, with one effect a level, the u may be turned to the eigenvectors of ``Z K Z' = U S U'``:
products of different u vanish, and what is left is a model with one grouping factor whose levels are the eigenvectors
(Lippert et al. 2011, Nat. Methods 8, 833, turn the rows instead). ``Z'Z`` is diagonal there, A by level, so the matrix
that is decomposed has as many rows as there are levels with rows: ``A^{1/2} K A^{1/2}``.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from mixjax.machine import add_at, namespace
from mixjax.products.sums import CrossProducts, FactorProducts, PairProducts

# An eigenvalue of Z K Z' this many roundings below the largest is zero.
NOTHING = 8 * np.finfo(float).eps
# Numbers of the products of all pairs of levels.
MOST_NUMBERS = 2**29


class Turned(NamedTuple):
    """The eigenvectors of ``Z K Z'``, r of them.

    Attributes:
        values: ``(r,)`` its eigenvalues. forth: ``(r, m)``, from sums over the rows of every level, such as ``Z'y``, to
            those of the eigenvectors' effects. back: ``(m, r)`` from their effects to those of the levels.
        unseen: ``(m, k)`` the same of effects that no row has, because levels have no rows or are alike in those that
            have: ``back back' + unseen unseen' = K``.
    """

    values: np.ndarray
    forth: np.ndarray
    back: np.ndarray
    unseen: np.ndarray

    def seen(self) -> Turned:
        """Without those, as the fits of many responses need no more."""
        return self._replace(unseen=self.unseen[:, :0])


def turned(squares: np.ndarray, L: np.ndarray) -> Turned:
    """Args: squares: ``(m,)`` ``Z'Z`` of every level. L: ``(m, m)`` factor of K."""
    present = np.flatnonzero(squares > 0)
    root = np.sqrt(squares[present])
    half = root[:, None] * L[present]
    values, U = np.linalg.eigh(half @ half.T)
    kept = values > NOTHING * len(values) * values[-1]
    values, U = values[kept], U[:, kept]
    sd = np.sqrt(values)
    forth = np.zeros((len(values), len(squares)))
    forth[:, present] = sd[:, None] * U.T / root
    V = half.T @ (U / sd)  # (m, r), orthonormal
    return Turned(values, forth, L @ V, _rest(L, V))


def _rest(L: np.ndarray, V: np.ndarray) -> np.ndarray:
    """``E (m, k)`` with ``E E' = L (I - V V') L'``."""
    m, r = V.shape
    if r == m:
        return np.zeros((m, 0))
    others = np.linalg.qr(V, mode="complete")[0][:, r:]
    rest: np.ndarray = L @ others
    return rest[:, np.linalg.norm(rest, axis=0) > np.sqrt(NOTHING) * np.linalg.norm(L)]


def in_eigenvectors(stats: CrossProducts, by: Turned) -> CrossProducts:
    """Products by level of one factor with one effect -> of its eigenvectors, then of what no row has."""
    (products,) = stats.factors
    more = by.unseen.shape[1]
    parts = (by.values[None, None], products.ZX @ by.forth.T, products.Zy @ by.forth.T)
    alone = replace(stats.layout, chain=(0,), dense=())
    factor = FactorProducts(*(_with_zeros(part, more) for part in parts))
    return replace(stats, factors=(factor,), layout=alone, known=(np.hstack([by.back, by.unseen]),))


def _with_zeros(a: Any, more: int) -> Any:
    xp = namespace(a)
    return xp.concatenate([a, xp.zeros((*a.shape[:-1], more), a.dtype)], axis=-1) if more else a


def in_independent_effects(stats: CrossProducts, factors: tuple[Any, ...]) -> CrossProducts:
    """Products by level -> of independent effects.

    Args:
        stats: of one response; or of many data sets, in front of every array, in which the same levels meet.
        factors: per grouping factor L or None.
    """
    xp = namespace(stats.XX, stats.yy, *(L for L in factors if L is not None))
    layout, many = stats.layout, np.ndim(stats.XX) == 3
    made, pairs, keys = [], [], []
    for f, (products, L) in enumerate(zip(stats.factors, factors, strict=True)):
        if L is None:
            made.append(products)
            continue
        ZZ, L = xp.asarray(products.ZZ), xp.asarray(L)
        r = L.shape[1]
        _check_numbers(ZZ.shape[-2] ** 2 * r**2, f"{r} levels")
        full = xp.swapaxes(ZZ[..., None] * L, -1, -2) @ L  # (..., q, q, r, r)
        i, j = (a.astype(np.int32) for a in np.triu_indices(r, 1))
        made.append(FactorProducts(xp.diagonal(full, axis1=-2, axis2=-1), products.ZX @ L, products.Zy @ L))
        rows, cols = _in_front(many, stats, i, j)
        pairs.append(PairProducts(rows, cols, full[..., i, j]))
        keys.append((f, f))
    if layout.chain[0] == len(made):
        empty = (xp.zeros(shape, stats.XX.dtype) for shape in ((1, 1, 1), (1, stats.XX.shape[-1], 1), (1, 1)))
        made.append(FactorProducts(*(xp.broadcast_to(a, (*stats.yy.shape, *a.shape)) if many else a for a in empty)))
    for (s, t), pair in zip(layout.pairs, stats.pairs, strict=True):
        left, right = factors[s], factors[t]
        if left is not None or right is not None:
            sizes = (stats.factors[s].ZZ.shape[-1], stats.factors[t].ZZ.shape[-1])
            pair = _pair(stats, pair, sizes, left, right, xp, many)
        pairs.append(pair)
        keys.append((s, t))
    known = tuple(None if L is None else xp.asarray(L) for L in factors)
    known = (*known, *[None] * (len(made) - len(known)))
    if many:
        known = tuple(None if T is None else xp.broadcast_to(T, (*stats.yy.shape, *T.shape)) for T in known)
    return replace(
        stats, factors=tuple(made), pairs=tuple(pairs), layout=replace(layout, pairs=tuple(keys)), known=known
    )


def _pair(
    stats: CrossProducts, pair: PairProducts, sizes: tuple[int, int], left: Any, right: Any, xp: Any, many: bool
) -> PairProducts:
    """Products of two factors at least one of which has a known covariance: of all pairs of their effects."""
    m, k = sizes
    _check_numbers(pair.ZZ.shape[-3] * pair.ZZ.shape[-2] * m * k, f"{m} x {k} levels")
    rows, cols = (a[0] if many else a for a in (pair.rows, pair.cols))
    full = xp.zeros((*pair.ZZ.shape[:-1], m, k), pair.ZZ.dtype)
    full = add_at(full, (..., rows, cols), pair.ZZ)
    if left is not None:
        full = xp.swapaxes(xp.asarray(left), 0, 1) @ full
    if right is not None:
        full = full @ xp.asarray(right)
    i, j = np.divmod(np.arange(m * k, dtype=np.int32), np.int32(k))
    rows, cols = _in_front(many, stats, i, j)
    return PairProducts(rows, cols, full.reshape(*full.shape[:-2], m * k))


def _in_front(many: bool, stats: CrossProducts, *index: np.ndarray) -> list[Any]:
    return [np.broadcast_to(a, (*stats.yy.shape, len(a))) if many else a for a in index]


def _check_numbers(count: int, what: str) -> None:
    if count > MOST_NUMBERS:
        raise MemoryError(
            f"random effects whose levels have a known covariance meet all others: {what} make {8e-9 * count:.1f} GB "
            "of products; leave out levels that no row needs, or take the larger factor out of the model"
        )
