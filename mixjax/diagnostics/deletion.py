"""Cross-products without some of the rows, or with rows counted by case weights: subtraction, not another pass.

All sums stay in the bases of the fit, so that the deletions of many units are one batch for
:func:`mixjax.estimate_many`. Subtracting costs the digits that the unit carries; where it carries nearly everything in
some direction, the products are formed anew from the rows that stay.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import jax
import numpy as np

from mixjax.bases import change_basis, change_scale, constant_column, orthonormal_columns
from mixjax.design import Design
from mixjax.fitted import Fitted
from mixjax.inference.resample import chunk_size
from mixjax.products.cross_products import cross_products
from mixjax.products.sums import CrossProducts, FactorProducts, PairProducts, pad, stack, sum_by_group

# A unit with more than this part of the squares along some direction dominates it: taking its products away would cost
# six digits there.
DOMINANT = 1 - 1e-6
# Eigenvalues of Z'Z below this part of the largest one are directions that Z does not have.
RANK = 1e-12


@dataclass(frozen=True)
class Rows:
    """The rows of a fit, each in the bases of the fit's cross-products and times the root of its weight.

    Attributes:
        design: the arrays. stats: the cross-products of all rows.
        Q: ``(n, p)``. residual: ``(n,)`` of y on Q. log_w: ``(n,)``.
        Z: per grouping factor ``(n, q)``. groups: ``(n,)`` its levels.
        entries: per pair of factors ``(n,)``: where its products of this row's levels stand.
    """

    design: Design
    stats: CrossProducts
    Q: np.ndarray
    residual: np.ndarray
    log_w: np.ndarray
    Z: tuple[np.ndarray, ...]
    groups: tuple[np.ndarray, ...]
    entries: tuple[np.ndarray, ...]

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.residual)

    def padded(self) -> Rows:
        """With empty levels, as compiled programs share them."""
        return replace(self, stats=pad(self.stats))

    def of_factor(self, f: int, at: Any = slice(None)) -> np.ndarray:
        """``Z' [Z X y]`` of single rows: ``(q, q + p + 1, n)``."""
        Z = self.Z[f][at]
        others = np.concatenate([Z, self.Q[at], self.residual[at][:, None]], axis=1)
        return Z.T[:, None] * others.T[None]

    def of_pair(self, i: int, at: Any = slice(None)) -> np.ndarray:
        """``Z_s' Z_t`` of single rows: ``(q_s, q_t, n)``."""
        s, t = self.stats.layout.pairs[i]
        return self.Z[s][at].T[:, None] * self.Z[t][at].T[None]

    def weighted(self, weights: np.ndarray) -> CrossProducts:
        """The cross-products with every row counted so many times: ``weights (n,)``, real, not negative.

        These are case weights. Rows count, so n is their sum; the precision of a row is what it was.
        """
        c, stats, p = weights, self.stats, self.Q.shape[1]
        factors = []
        for f, products in enumerate(stats.factors):
            sums = sum_by_group(self.of_factor(f) * c, self.groups[f], products.ZZ.shape[2])
            q = len(sums)
            factors.append(FactorProducts(sums[:, :q], sums[:, q : q + p], sums[:, -1]))
        pairs = [
            pair._replace(ZZ=sum_by_group(self.of_pair(i) * c, self.entries[i], pair.ZZ.shape[2]))
            for i, pair in enumerate(stats.pairs)
        ]
        return replace(
            stats,
            factors=tuple(factors),
            pairs=tuple(pairs),
            XX=self.Q.T @ (c[:, None] * self.Q),
            Xy=self.Q.T @ (c * self.residual),
            yy=self.residual @ (c * self.residual),
            n=c.sum(),
            sum_log_weights=c @ self.log_w,
        )

    @cached_property
    def _level_counts(self) -> list[np.ndarray]:
        sizes = [products.ZZ.shape[2] for products in self.stats.factors]
        return [np.bincount(group, minlength=m) for group, m in zip(self.groups, sizes, strict=True)]

    def without(self, unit: np.ndarray, deleted: np.ndarray) -> CrossProducts:
        """The cross-products without each of some units: a batch of ``len(deleted)``.

        A level that loses all of its rows stays, empty: it contributes nothing.

        Args:
            unit: ``(n,)`` code of every row's unit. deleted: ``(B,)`` the units to leave out, one at a time.
        """
        stats, p, B = self.stats, self.Q.shape[1], len(deleted)
        place = np.full(unit.max() + 1, -1)
        place[deleted] = np.arange(B)
        at = np.flatnonzero(place[unit] >= 0)
        lane = place[unit[at]]

        def by_lane(rows: np.ndarray) -> np.ndarray:
            """Sums ``(B, ...)`` over the rows of every unit."""
            return np.moveaxis(sum_by_group(np.moveaxis(rows, 0, -1), lane, B), -1, 0)

        Q, residual = self.Q[at], self.residual[at]
        factors = []
        for f, products in enumerate(stats.factors):
            total = np.concatenate([products.ZZ, products.ZX, products.Zy[:, None]], axis=1)
            size = self._level_counts[f]
            left = _subtract(total, self.of_factor(f, at), lane, self.groups[f][at], B, size)
            q = left.shape[1]
            factors.append(FactorProducts(left[:, :, :q], left[:, :, q : q + p], left[:, :, -1]))
        pairs = []
        for i, pair in enumerate(stats.pairs):
            entries = self.entries[i]
            size = np.bincount(entries, minlength=pair.ZZ.shape[2])
            left = _subtract(np.asarray(pair.ZZ), self.of_pair(i, at), lane, entries[at], B, size)
            pairs.append(PairProducts(_repeat(pair.rows, B), _repeat(pair.cols, B), left))
        return replace(
            stats,
            factors=tuple(factors),
            pairs=tuple(pairs),
            XX=stats.XX - by_lane(Q[:, :, None] * Q[:, None]),
            Xy=stats.Xy - by_lane(Q * residual[:, None]),
            yy=stats.yy - by_lane(residual**2),
            n=stats.n - by_lane(np.ones(len(at))),
            sum_log_weights=stats.sum_log_weights - by_lane(self.log_w[at]),
            beta0=_repeat(stats.beta0, B),
            X_basis=jax.tree.map(lambda a: _repeat(a, B), stats.X_basis),
            Z_bases=jax.tree.map(lambda a: _repeat(a, B), stats.Z_bases),
        )

    def numbers(self) -> int:
        """How many numbers the products of one deletion are."""
        return sum(np.size(leaf) for leaf in jax.tree.leaves(self.stats))

    def dominant(self, unit: np.ndarray) -> np.ndarray:
        """Codes of the units that carry nearly all there is of some direction of X, of a term's Z, or of y."""
        squares = self.residual @ self.residual
        blocks = [np.column_stack([self.Q, self.residual / np.sqrt(squares)]) if squares > 0 else self.Q]
        for Z in self.Z:
            values, vectors = np.linalg.eigh(Z.T @ Z)
            kept = values > RANK * values[-1]
            blocks.append(Z @ (vectors[:, kept] / np.sqrt(values[kept])))
        found: set[int] = set()
        for block in blocks:
            # A unit's share of a direction is at most the sum of its shares of all: few have to be looked at.
            shares = np.bincount(unit, weights=(block * block).sum(1))
            for u in np.flatnonzero(shares > DOMINANT):
                own = block[unit == u]
                if np.linalg.eigvalsh(own.T @ own)[-1] > DOMINANT:
                    found.add(int(u))
        return np.array(sorted(found), np.intp)

    def estimable(self, unit: np.ndarray, u: int) -> bool:
        """X keeps its rank without unit u, by the rule that a fit of the other rows goes by."""
        left = unit != u
        X, weights = np.asarray(self.design.X)[left], self.design.weights
        return bool(orthonormal_columns(X, None if weights is None else np.sqrt(np.asarray(weights)[left]))[2].all())


def _repeat(leaf: Any, B: int) -> np.ndarray:
    return np.broadcast_to(leaf, (B, *np.shape(leaf)))


def _subtract(
    total: np.ndarray, rows: np.ndarray, lane: np.ndarray, group: np.ndarray, B: int, size: np.ndarray
) -> np.ndarray:
    """``total (i, j, m)`` less the rows ``(i, j, n)`` of every lane: ``(B, i, j, m)``.

    Args:
        lane, group: ``(n,)`` of every row. size: ``(m,)`` how many rows there are; where all go, zero is left exactly.
    """
    left = np.repeat(total[None], B, axis=0)
    cells, cell, count = np.unique(lane * total.shape[2] + group, return_inverse=True, return_counts=True)
    b, level = np.divmod(cells, total.shape[2])
    taken = np.moveaxis(sum_by_group(rows, cell.reshape(-1), len(cells)), -1, 0)
    left[b, :, :, level] = np.where((count == size[level])[:, None, None], 0.0, left[b, :, :, level] - taken)
    return left


def rows_of(fitted: Fitted) -> Rows:
    """The rows of a fit in the bases of its cross-products.

    Raises:
        ValueError: the fit did not keep its rows.
    """
    design = fitted.rows
    unpadded = fitted.stats if fitted.stats.classes is None else replace(fitted.stats, classes=None)
    layout, X = unpadded.layout, np.asarray(design.X)
    n = len(X)
    sqrt_w = None if design.weights is None else np.sqrt(np.asarray(design.weights, np.float64))
    Q, _ = change_basis(X, sqrt_w)
    y = np.asarray(design.y, np.float64) - (0.0 if design.offset is None else np.asarray(design.offset))
    # Centred first, and twice, so that a large mean costs no digits.
    residual = y - (0.0 if constant_column(X) is None else y.mean())
    residual = residual if sqrt_w is None else residual * sqrt_w
    for _ in range(2):
        residual = residual - Q @ (Q.T @ residual)
    Z: list[list[np.ndarray]] = [[] for _ in unpadded.factors]
    groups: list[Any] = [None] * len(unpadded.factors)
    for term, place in zip(design.terms, layout.terms, strict=True):
        scaling, scale = place.structure.scaling, float(np.sqrt(n))
        columns = np.asarray(term.Z, np.float64)
        if scaling == "any":
            columns, _ = change_basis(columns, sqrt_w, scale)
        else:
            columns, _ = change_scale(columns, sqrt_w, scale, scaling == "each")
        Z[place.factor].append(columns)
        groups[place.factor] = np.asarray(term.group)
    entries = []
    for (s, t), pair in zip(layout.pairs, unpadded.pairs, strict=True):
        m_t = unpadded.factors[t].ZZ.shape[2]
        codes = np.asarray(pair.rows, np.int64) * (m_t + 1) + pair.cols
        order = np.argsort(codes)
        own = groups[s].astype(np.int64) * (m_t + 1) + groups[t]
        entries.append(order[np.searchsorted(codes[order], own)])
    return Rows(
        design,
        unpadded,
        Q,
        residual,
        np.zeros(n) if sqrt_w is None else 2.0 * np.log(sqrt_w),
        tuple(np.concatenate(columns, axis=1) for columns in Z),
        tuple(groups),
        tuple(entries),
    )


def batches(rows: Rows, unit: np.ndarray, most: int | None = None) -> Iterator[tuple[np.ndarray, CrossProducts]]:
    """Units and the cross-products without each of them, in batches that fit into memory.

    Units without which X loses rank are left out.

    Args:
        unit: ``(n,)`` codes ``0 .. U - 1``, each with rows. most: units of a batch.
    """
    U = int(unit.max()) + 1
    dominant = rows.dominant(unit)
    plain = np.setdiff1d(np.arange(U), dominant)
    chunk = chunk_size(rows.numbers()) if most is None else min(most, chunk_size(rows.numbers()))
    for first in range(0, len(plain), chunk):
        deleted = plain[first : first + chunk]
        yield deleted, rows.without(unit, deleted)
    plain = np.array([u for u in dominant if rows.estimable(unit, u)], np.intp)
    for first in range(0, len(plain), chunk):
        deleted = plain[first : first + chunk]
        yield deleted, stack([pad(cross_products(_subset(rows.design, unit != u))) for u in deleted])


def _subset(design: Design, keep: np.ndarray) -> Design:
    """Some rows; all levels stay."""

    def some(a: Any) -> Any:
        return None if a is None else np.asarray(a)[keep]

    terms = tuple(replace(term, Z=some(term.Z), group=some(term.group)) for term in design.terms)
    return Design(some(design.y), some(design.X), terms, some(design.weights), some(design.offset))
