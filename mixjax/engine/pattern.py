"""Which dense effects the levels of the first factor meet, and sums over these pairs, by sparse matrices where they are
few. By NumPy; see :mod:`mixjax.engine.block_effects`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy import sparse

from mixjax.machine import Array

# Levels of the first factor meet few of the other effects: products are sparse up to this part of all pairs.
MOST_FULL = 0.2
# Matrices of no more numbers than this are full always: to make a sparse one takes as long as to multiply them.
LEAST_SPARSE = 10_000
# The longest list of pairs that meet at a level, 20 bytes each.
MOST_NEAR = 2**25


@dataclass(frozen=True, eq=False)
class Pattern:
    """Which of the d dense effects each of m levels of the first factor meets.

    Attributes:
        rows, cols: ``(k,)`` the pairs, level by level. m, d: how many there are.
    """

    rows: Array
    cols: Array
    m: int
    d: int

    @cached_property
    def is_sparse(self) -> bool:
        pairs = self.m * self.d
        return pairs > LEAST_SPARSE and len(self.rows) < MOST_FULL * pairs

    @cached_property
    def _starts(self) -> Array:
        return np.searchsorted(self.rows, np.arange(self.m + 1))

    def matrix(self, values: Array) -> Any:
        """``(m, d)``, sparse or not, of numbers ``(k,)`` of the pairs."""
        if self.is_sparse:
            return sparse.csr_array((values, self.cols, self._starts), shape=(self.m, self.d))
        full = np.zeros((self.m, self.d))
        full[self.rows, self.cols] = values
        return full

    def gram(self, left: Array, right: Array) -> Array:
        """``sum_a U_a'V_a (d, d)`` of matrices by their numbers ``(q, k)``."""
        found: Any = sum(self.matrix(u).T @ self.matrix(v) for u, v in zip(left, right, strict=True))
        return np.asarray(found.toarray() if self.is_sparse else found)

    @cached_property
    def _near(self) -> tuple[Array, Array, Array] | None:
        """Of every pair those of its level, as a sparse matrix ``(k, k)`` has them: where its rows start, its columns,
        and places in ``(d, d)``. None where they are many."""
        count = np.bincount(self.rows, minlength=self.m)
        near = int((count.astype(np.int64) ** 2).sum())
        if not self.is_sparse or near > min(MOST_NEAR, MOST_FULL * len(self.rows) * self.d):
            return None
        of_pair = count[self.rows]
        start = np.append(0, np.cumsum(of_pair))
        others = np.arange(near) + np.repeat(self._starts[self.rows] - start[:-1], of_pair)
        places = np.repeat(self.cols * self.d, of_pair) + self.cols[others]
        return start.astype(np.int32), others.astype(np.int32), places

    def times(self, full: Array) -> Callable[[Array], Array]:
        """Products of matrices, by their numbers ``(r, k)``, with one symmetric ``full (d, d)``: their numbers at the
        pairs."""
        if self._near is None:
            return lambda values: np.stack([(self.matrix(own) @ full)[self.rows, self.cols] for own in values])
        start, others, places = self._near
        near = sparse.csr_array((full.reshape(-1)[places], others, start), shape=(len(self.rows),) * 2)
        return lambda values: np.stack([near @ own for own in values])

    def by_level(self, values: Array) -> Array:
        """Sums over the pairs of every level."""
        return np.bincount(self.rows, values, self.m)
