"""Cross-products by independent clusters of rows, to put data sets together from some of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from mixjax.products.rows import Rows
from mixjax.products.sums import CrossProducts, FactorProducts, PairProducts, bucket, sum_by_group

# Fixed effects of a drawn data set that are this close to dependent, in the basis of all data, cannot be estimated.
DEPENDENT = 1e-11


@dataclass(frozen=True)
class ClusterProducts:
    """Cross-products of a design by independent clusters of rows, to put together anew.

    Attributes:
        stats: of all rows; every product stays in its bases.
        totals: ``(M, p p + p + 3)`` sums over the rows of every cluster: XX, Xy, yy, n, sum of log weights.
        levels: per grouping factor ``(M, w)``: the levels within every cluster; the number of levels stands for none.
        entries: likewise the entries of every pair of factors.
        places: per grouping factor: where within its cluster's row of ``levels`` a level stands.
    """

    stats: CrossProducts
    totals: np.ndarray
    levels: tuple[np.ndarray, ...]
    entries: tuple[np.ndarray, ...]
    places: tuple[np.ndarray, ...]

    @property
    def M(self) -> int:
        """Number of clusters."""
        return len(self.totals)

    def numbers(self, S: int) -> int:
        """How many numbers a data set of S clusters takes, about."""
        sizes = [
            self._size(f, S) * sum(a[..., 0].size for a in products) for f, products in enumerate(self.stats.factors)
        ]
        pairs = [S * e.shape[1] * pair.ZZ[..., 0].size for e, pair in zip(self.entries, self.stats.pairs, strict=True)]
        numbers: int = S * self.totals.shape[1] + sum(sizes) + sum(pairs)
        return numbers

    def _size(self, f: int, S: int) -> int:
        """Levels of a factor in a data set of S clusters, padded to a few sizes so that data sets share programs."""
        return bucket(S * self.levels[f].shape[1], dense=f in self.stats.layout.dense)

    def gather(self, index: np.ndarray) -> CrossProducts:
        """Products of data sets made of clusters ``index (B, S)``, a cluster drawn twice counting as two.

        A data set whose fixed effects cannot be estimated gets NaN, so that its fit fails.
        """
        stats, (B, S) = self.stats, index.shape
        p = stats.XX.shape[0]
        sums = self.totals[index].sum(axis=1)
        XX, Xy, yy = sums[:, : p * p].reshape(B, p, p), sums[:, p * p : -3], sums[:, -3]
        if p:
            values = np.linalg.eigvalsh(XX)
            lost = values[:, 0] <= DEPENDENT * values[:, -1]
            Xy[lost], yy[lost] = np.nan, np.nan

        def repeat(leaf: Any) -> np.ndarray:
            return np.broadcast_to(leaf, (B, *np.shape(leaf)))

        factors = []
        for f, products in enumerate(stats.factors):
            at = _padded(self.levels[f][index], self._size(f, S), len(self.places[f]) - 1)
            factors.append(FactorProducts(*(_take(a, at) for a in products)))
        return replace(
            stats,
            factors=tuple(factors),
            pairs=tuple(self._pair(i, index) for i in range(len(stats.pairs))),
            XX=XX,
            Xy=Xy,
            yy=yy,
            n=sums[:, -2],
            sum_log_weights=sums[:, -1],
            beta0=repeat(stats.beta0),
            X_basis=jax.tree.map(repeat, stats.X_basis),
            Z_bases=jax.tree.map(repeat, stats.Z_bases),
            classes=None,
        )

    def _pair(self, i: int, index: np.ndarray) -> PairProducts:
        (s, t), pair = self.stats.layout.pairs[i], self.stats.pairs[i]
        S = index.shape[1]
        nested = s in self.stats.layout.chain and t in self.stats.layout.chain
        size = self._size(s, S) if nested else bucket(S * self.entries[i].shape[1])
        entries = self.entries[i][index]

        def renumbered(f: int, old: Any) -> np.ndarray:
            none = self._size(f, S)
            places = np.append(self.places[f][old], 0)[entries] + self.levels[f].shape[1] * np.arange(S)[:, None]
            return _padded(np.where(entries < len(old), places, none), size, none).astype(np.int32)

        rows, cols = renumbered(s, pair.rows), renumbered(t, pair.cols)
        if nested:  # one entry for every level of s, in order
            rows = np.broadcast_to(np.arange(size, dtype=np.int32), rows.shape)
        return PairProducts(rows, cols, _take(pair.ZZ, _padded(entries, size, len(pair.rows))))


def _padded(table: np.ndarray, size: int, none: int) -> np.ndarray:
    """``(B, S, w)`` -> ``(B, size)``, filled up."""
    B = len(table)
    return np.concatenate([table.reshape(B, -1), np.full((B, size - table[0].size), none)], axis=1)


def _take(a: np.ndarray, at: np.ndarray) -> np.ndarray:
    """Entries ``at (B, k)`` of the last axis, replicates first; zero one behind the end."""
    padded = np.concatenate([a, np.zeros((*a.shape[:-1], 1))], axis=-1)
    return np.moveaxis(padded[..., at], -2, 0)


def by_cluster(rows: Rows, cluster: np.ndarray, M: int) -> ClusterProducts:
    """The cross-products by cluster.

    Args:
        cluster: ``(n,)`` codes ``0 .. M - 1``; all levels of a factor that rows of one cluster have are its own.
    """
    stats, Q, residual = rows.stats, rows.Q, rows.residual
    n, p = Q.shape
    squares = (Q[:, :, None] * Q[:, None]).reshape(n, p * p)
    columns = np.column_stack([squares, Q * residual[:, None], residual**2, np.ones(n), rows.log_w])
    levels, places, owners = [], [], []
    for group, products in zip(rows.groups, stats.factors, strict=True):
        owner = np.full(products.ZZ.shape[2], -1)
        owner[group] = cluster
        table, place = _by_owner(owner, M)
        levels.append(table)
        # Levels without rows are asked for by their number or by one more; nothing is found there.
        places.append(np.append(place, 0))
        owners.append(owner)
    entries = []
    for (s, t), pair in zip(stats.layout.pairs, stats.pairs, strict=True):
        nested = s in stats.layout.chain and t in stats.layout.chain
        entries.append(levels[s] if nested else _by_owner(owners[s][pair.rows], M)[0])
    return ClusterProducts(stats, sum_by_group(columns.T, cluster, M).T, tuple(levels), tuple(entries), tuple(places))


def _by_owner(owner: np.ndarray, M: int) -> tuple[np.ndarray, np.ndarray]:
    """``(M, w)``: what every owner owns, in order, filled up with ``len(owner)``; and where in its row each stands."""
    owned = np.flatnonzero(owner >= 0)
    order = owned[np.argsort(owner[owned], kind="stable")]
    counts = np.bincount(owner[owned], minlength=M)
    rank = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    table = np.full((M, counts.max(initial=1)), len(owner))
    table[owner[order], rank] = order
    place = np.zeros(len(owner), np.int64)
    place[order] = rank
    return table, place
