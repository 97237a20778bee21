"""Cross-products from chunks of rows, of which only sums are kept.

Columns are shifted by their mean and scaled by their standard deviation in the first chunk, and y by the first chunk's
least-squares fit, so that sums of squares do not cancel; all chunks use the same shifts. At the end the sums are turned
to orthonormal bases, as :func:`mixjax.cross_products` does with the columns themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mixjax.bases import Basis, scale_basis
from mixjax.covariance import Covariance, structure_of
from mixjax.design import Chunk
from mixjax.products.sums import (
    CrossProducts,
    FactorProducts,
    PairProducts,
    TermPlace,
    lay_out,
    sum_by_group,
)

# A column depends on those before it when they leave less than this part of its squared length: what is left of the
# sixteen digits of a sum of squares.
DEPENDENT = 1e-12


class Dependent(ValueError):
    """Columns of a random term that others of the term determine: ``term`` and ``column`` within it."""

    def __init__(self, term: int, column: int):
        super().__init__(f"column {column} of random term {term} depends on the others")
        self.term, self.column = term, column


class Accumulator:
    """Sums over rows of one model.

    Args:
        fixed: which columns make X. intercept: the column of ones among them, or None.
        terms: per random term the columns that make Z, its grouping factor, and the name of its covariance structure.
    """

    def __init__(
        self, fixed: Sequence[int], intercept: int | None, terms: Sequence[tuple[Sequence[int], int, str | Covariance]]
    ):
        self.fixed, self.intercept, self.terms = list(fixed), intercept, [(list(c), f) for c, f, _ in terms]
        self.structures = [structure_of(name, len(c)) for c, _, name in terms]
        self.n, self.sum_log_weights = 0, 0.0
        self.own: list[list[int]] = []  # columns of every factor
        for f in range(1 + max(f for _, f in self.terms)):
            own = {c for columns, of in self.terms if of == f for c in columns}
            self.own.append(sorted(own | ({intercept} if intercept is not None else set())))
        self.sums: list[np.ndarray] = []
        self.merged: dict[tuple[int, int], tuple[np.ndarray, np.ndarray]] = {}
        self.shift: np.ndarray | None = None

    def add(self, rows: Chunk, sizes: Sequence[int]) -> None:
        """Add a chunk; ``sizes`` are the numbers of levels of every factor seen so far."""
        if not len(rows.y):
            return
        if self.shift is None:
            self._begin(rows)
        V, r = self._shifted(rows)
        if rows.sqrt_w is not None:
            self.sum_log_weights += 2.0 * float(np.log(rows.sqrt_w).sum())
        VX = V[:, self.fixed]
        self.n += len(r)
        self.XX += VX.T @ VX
        self.Xy += VX.T @ r
        self.yy += float(r @ r)
        for f, code in enumerate(rows.codes):
            self._add_factor(f, V, r, code, sizes[f], rows.sqrt_w is None)
        for s in range(len(rows.codes)):
            for t in range(s + 1, len(rows.codes)):
                self._add_pair(s, t, V, rows.codes)

    # --- shifts and scales

    def _begin(self, rows: Chunk) -> None:
        c = rows.columns.shape[1]
        self.shift, self.scale, self.level = np.zeros(c), np.ones(c), 0.0
        if self.intercept is not None:
            self.shift = rows.columns.mean(axis=0)
            self.shift[self.intercept] = 0.0
            self.level = float(rows.y.mean())
        spread = np.sqrt(((rows.columns - self.shift) ** 2).mean(axis=0))
        self.scale = np.where(spread > 1e-12 * np.abs(rows.columns).max(axis=0), spread, 1.0)
        p = len(self.fixed)
        self.coefficients = np.zeros(p)
        V, r = self._shifted(rows)
        self.coefficients = np.linalg.lstsq(V[:, self.fixed], r, rcond=1e-10)[0] if p else self.coefficients
        self.XX, self.Xy, self.yy = np.zeros((p, p)), np.zeros(p), 0.0
        self.sums = [np.zeros((len(self._products(f)), 0)) for f in range(len(self.own))]

    def _shifted(self, rows: Chunk) -> tuple[np.ndarray, np.ndarray]:
        """Columns and y with shifts taken out, times the square roots of the weights."""
        V = np.asfortranarray((rows.columns - self.shift) / self.scale)
        r = rows.y - self.level - V[:, self.fixed] @ self.coefficients
        return (V, r) if rows.sqrt_w is None else (V * rows.sqrt_w[:, None], r * rows.sqrt_w)

    def _from_shifted(self) -> np.ndarray:
        """``B`` with ``columns = V B``."""
        B = np.diag(self.scale)
        if self.intercept is not None:
            B[self.intercept] += self.shift
        return B

    # --- sums

    def _products(self, f: int) -> list[tuple[int, int]]:
        """Products of factor f that are summed: its columns with one another, with X's, and with y (column -1)."""
        own = self.own[f]
        with_own = [(a, b) for i, a in enumerate(own) for b in own[i:]]
        return with_own + [(a, b) for a in own for b in [*self.fixed, -1] if b not in own]

    def _add_factor(self, f: int, V: np.ndarray, r: np.ndarray, code: np.ndarray, m: int, unweighted: bool) -> None:
        if m > self.sums[f].shape[1]:
            grown = np.zeros((len(self.sums[f]), m if not self.sums[f].size else max(m, 2 * self.sums[f].shape[1])))
            grown[:, : self.sums[f].shape[1]] = self.sums[f]
            self.sums[f] = grown
        for row, (a, b) in zip(self.sums[f], self._products(f), strict=True):
            if a == b == self.intercept and unweighted:
                row[:m] += np.bincount(code, minlength=m)
                continue
            other = r if b < 0 else V[:, b]
            product = other if a == self.intercept and unweighted else V[:, a] * other
            row[:m] += np.bincount(code, weights=product, minlength=m)

    def _add_pair(self, s: int, t: int, V: np.ndarray, codes: list[np.ndarray]) -> None:
        both = codes[s].astype(np.int64) << 32 | codes[t].astype(np.int64)
        new, inverse = np.unique(both, return_inverse=True)
        products = np.stack([V[:, a] * V[:, b] for a in self.own[s] for b in self.own[t]])
        sums = sum_by_group(products, inverse.reshape(-1), len(new))
        if (s, t) in self.merged:
            old, old_sums = self.merged[s, t]
            new, inverse = np.unique(np.concatenate([old, new]), return_inverse=True)
            sums = sum_by_group(np.concatenate([old_sums, sums], axis=1), inverse.reshape(-1), len(new))
        self.merged[s, t] = new, sums

    # --- the end

    def finish(self, orders: Sequence[np.ndarray]) -> tuple[CrossProducts, np.ndarray]:
        """The cross-products, and which columns of X are independent and were kept.

        Args:
            orders: per factor ``(m,)``, the levels, as they were numbered, in their final order.

        Raises:
            Dependent: a random term's column depends on others.
        """
        B = self._from_shifted()
        fixed, kept, X_basis, to_Q = self._basis_of_X(B)
        gram = self.XX[np.ix_(kept, kept)]
        moved = np.linalg.solve(gram, self.XX[np.ix_(kept, ~kept)]) @ self.coefficients[~kept]
        coefficients = self.coefficients[kept] + moved
        delta = to_Q.T @ self.Xy[kept]
        beta0 = X_basis.R_inv @ (delta + np.linalg.solve(to_Q, coefficients) if len(fixed) else delta)
        if self.intercept is not None:
            beta0[fixed.index(self.intercept)] += self.level
        factors, to_Z, bases = [], [], []
        places, width = [], [0] * len(self.own)
        for (columns, f), structure in zip(self.terms, self.structures, strict=True):
            places.append(TermPlace(structure, f, width[f]))
            width[f] += len(columns)
        blocks = [self._blocks(f, orders[f], fixed) for f in range(len(self.own))]
        for f, (VV, VX, Vy) in enumerate(blocks):
            M = np.zeros((len(self.own[f]), width[f]))
            for t, place in enumerate(places):
                if place.factor == f:
                    basis, M[:, place.start : place.start + place.q] = self._basis_of_Z(t, VV.sum(-1), B)
                    bases.append((t, basis))
            to_Z.append(M)
            ZX = np.einsum("vi,vxm,xr->irm", M, VX, to_Q, optimize=True)
            Zy = np.einsum("vi,vm->im", M, Vy) - np.einsum("irm,r->im", ZX, delta)
            factors.append(FactorProducts(np.einsum("vi,vwm,wj->ijm", M, VV, M, optimize=True), ZX, Zy))
        rank = [np.argsort(order) for order in orders]
        merged = {}
        for (s, t), (code, sums) in self.merged.items():
            ZZ = sums.reshape(len(self.own[s]), len(self.own[t]), -1)
            ZZ = np.einsum("vi,vwk,wj->ijk", to_Z[s], ZZ, to_Z[t], optimize=True)
            rows, cols = rank[s][code >> 32], rank[t][code & 0xFFFFFFFF]
            order = np.lexsort((cols, rows))
            merged[s, t] = PairProducts(rows[order].astype(np.int32), cols[order].astype(np.int32), ZZ[..., order])
        pairs, layout = lay_out(merged, [f.ZZ.shape[2] for f in factors], tuple(places))
        p = len(fixed)
        stats = CrossProducts(
            factors=tuple(factors), pairs=pairs, XX=np.eye(p), Xy=np.zeros(p), yy=np.float64(self.yy - delta @ delta),
            n=np.float64(self.n), sum_log_weights=self.sum_log_weights, beta0=beta0, X_basis=X_basis,
            Z_bases=tuple(basis for _, basis in sorted(bases, key=lambda pair: pair[0])), layout=layout,
        )  # fmt: skip
        return jax.tree.map(_as_array, stats), kept

    def _basis_of_X(self, B: np.ndarray) -> tuple[list[int], np.ndarray, Basis, np.ndarray]:
        """Columns kept, which they are, their basis, and ``to_Q`` with ``Q = V_kept to_Q``."""
        p = len(self.fixed)
        order = sorted(range(p), key=lambda j: self.fixed[j] != self.intercept)
        kept = np.zeros(p, bool)
        for j in order:
            done = np.flatnonzero(kept)
            explained = self.XX[j, done] @ np.linalg.solve(self.XX[np.ix_(done, done)], self.XX[done, j])
            kept[j] = self.XX[j, j] - explained > DEPENDENT * self.XX[j, j]
        fixed = [column for column, keep in zip(self.fixed, kept, strict=True) if keep]
        L = np.linalg.cholesky(self.XX[np.ix_(kept, kept)])
        to_Q = np.linalg.inv(L).T
        # X = V B among the kept columns: the intercept, which the shifts need, is always one of them.
        own = B[np.ix_(fixed, fixed)]
        R, R_inv = L.T @ own, np.linalg.inv(own) @ to_Q
        return fixed, kept, Basis(R, R_inv, np.linalg.slogdet(R)[1]), to_Q

    def _blocks(self, f: int, order: np.ndarray, fixed: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """``V'V (v, v, m)``, ``V'X (v, p, m)``, ``V'y (v, m)`` by level, in the final order."""
        own = self.own[f]
        sums = self.sums[f][:, order]
        at: dict[tuple[int, int], np.ndarray] = {pair: sums[i] for i, pair in enumerate(self._products(f))}

        def product(a: int, b: int) -> np.ndarray:
            return at[a, b] if (a, b) in at else at[b, a]

        VV = np.stack([np.stack([product(a, b) for b in own]) for a in own])
        empty = np.zeros((len(own), 0, len(order)))
        VX = np.stack([np.stack([product(a, b) for b in fixed]) for a in own]) if fixed else empty
        return VV, VX, np.stack([at[a, -1] for a in own])

    def _basis_of_Z(self, t: int, VV: np.ndarray, B: np.ndarray) -> tuple[Basis, np.ndarray]:
        """Basis of term t, and ``M (v, q)`` with ``Z in its basis = V M``."""
        columns, f = self.terms[t]
        own = self.own[f]
        scaling = self.structures[t].scaling
        if scaling != "any":
            to_Z = B[np.ix_(own, columns)]
            gram = to_Z.T @ VV @ to_Z / self.n
            _cholesky(gram, t)
            basis = scale_basis(np.diagonal(gram), scaling == "each")
            return basis, to_Z @ basis.R_inv
        if set(columns) == set(own):  # the same span: well conditioned, however far the columns are from zero
            inside = [own.index(c) for c in columns]
            L = _cholesky(VV[np.ix_(inside, inside)] / self.n, t)
            to_V = B[np.ix_(columns, columns)]
            R, R_inv = L.T @ to_V, np.linalg.inv(to_V) @ np.linalg.inv(L).T
            M = np.zeros((len(own), len(columns)))
            M[inside] = np.linalg.inv(L).T
            return Basis(R, R_inv, np.linalg.slogdet(R)[1]), M
        to_Z = B[np.ix_(own, columns)]
        L = _cholesky(to_Z.T @ VV @ to_Z / self.n, t)
        R, R_inv = L.T, np.linalg.inv(L).T
        return Basis(R, R_inv, np.linalg.slogdet(R)[1]), to_Z @ R_inv


def _as_array(leaf: Any) -> np.ndarray:
    leaf = np.asarray(leaf)
    array: np.ndarray = leaf if leaf.dtype.kind in "iu" else leaf.astype(np.float64)
    return array


def _cholesky(gram: np.ndarray, term: int) -> np.ndarray:
    for j in range(len(gram)):
        before = gram[:j, :j]
        explained = gram[j, :j] @ np.linalg.solve(before, gram[:j, j]) if j else 0.0
        if not gram[j, j] - explained > DEPENDENT * gram[j, j]:
            raise Dependent(term, j)
    return np.linalg.cholesky(gram)
