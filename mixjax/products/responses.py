"""Sums over the rows of many responses of one design: what does not depend on y is formed once and shared."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import local
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse

from mixjax.bases import constant_column
from mixjax.machine import n_cores
from mixjax.products.rows import Rows
from mixjax.products.sizes import has_closed_form
from mixjax.products.sums import ClassProducts, CrossProducts

# Numbers that one block of responses may hold, so that a few passes over it stay in the cache, and how many responses.
BLOCK, MOST = 2**20, 4096
# BLAS rounds the last columns of a product in another way than the others: responses that come in parts of so many have
# the same place in a product as when all come at once, whatever the size of blocks above it.
SAME_PLACE = 1024
# Multiplications of a product that OpenBLAS does without waking threads of its own, which ours would wait for.
ONE_THREAD = 2**18


class Responses:
    """Cross-products of many responses of one design.

    Args:
        rows: of numbers. Their own response is not looked at.
    """

    def __init__(self, rows: Rows):
        self._rows, self._shared = rows, rows.seen()
        self._Z_sums = [
            _sparse_transpose(Z, group, m) for Z, group, m in zip(rows.Z, rows.groups, rows.levels, strict=True)
        ]
        self._classes = _classes(self._shared)
        # Of a known covariance: from sums by level to those of the effects that the products are of.
        turned = rows.turned
        self._forth = (
            [turned.forth] if turned is not None else [None if L is None else np.asarray(L).T for L in rows.known]
        )

    def products(self, Y: np.ndarray) -> CrossProducts:
        """Products of responses ``Y (B, n)``: y's own in a leading axis, all others shared.

        Missing values spoil their own response only. A response's numbers do not depend on the others.
        """
        rows, shared, classes = self._rows, self._shared, self._classes
        B, n = Y.shape
        p = rows.Q.shape[1]
        # Allocated with the responses last, as they are computed, and shown with the responses first.
        Zy = [np.zeros((*f.Zy.shape, B)) for f in shared.factors]
        Xy, yy, beta0 = np.zeros((p, B)), np.empty(B), np.empty((p, B))
        if classes is not None:
            class_Uy, class_yy = np.empty((*classes.Uy_shape, B)), np.empty((*classes.yy_shape, B))

        # A thread's own, once: new memory costs as much as a pass over it.
        kept_memory = local()

        def work(start: int) -> None:
            at = slice(start, start + size)
            some = Y[at]
            kept = slice(0, len(some))
            if not hasattr(kept_memory, "of"):
                kept_memory.of = np.empty((n, size)), np.empty(ONE_THREAD)
            with np.errstate(invalid="ignore"):
                residual, coefficients = _least_squares_of_many(rows, some, kept_memory.of)
                yy[at] = np.einsum("ib,ib->b", residual, residual)[kept]
            beta0[:, at] = coefficients[:, kept]
            for f, (total, sums, m) in enumerate(zip(Zy, self._Z_sums, rows.levels, strict=False)):
                by_level = (sums @ residual).reshape(total.shape[0], m, size)
                forth = self._forth[f] if self._forth else None
                total[..., at] = (by_level if forth is None else forth @ by_level)[..., kept]
            if classes is not None:
                Uy, squares = classes.of(Zy[shared.layout.chain[0]][..., at])
                class_Uy[..., at], class_yy[..., at] = Uy, squares

        workers = 1 if rows.known else n_cores()  # with known covariances, large products have threads of their own
        most = min(MOST, _power_of_two(BLOCK // n))
        size = min(most, max(SAME_PLACE, _power_of_two(B // (2 * workers))))
        if size >= B:
            work(0)
        else:
            with ThreadPoolExecutor(workers) as pool:
                list(pool.map(work, range(0, B, size)))

        def first(a: np.ndarray) -> np.ndarray:
            return np.moveaxis(a, -1, 0)

        return replace(
            shared,
            factors=tuple(f._replace(Zy=first(z)) for f, z in zip(shared.factors, Zy, strict=True)),
            Xy=first(Xy),
            yy=yy,
            beta0=first(beta0),
            classes=None if classes is None else classes.shared._replace(Uy=first(class_Uy), yy=first(class_yy)),
        )


def _power_of_two(number: int) -> int:
    """The largest one up to a number, at least 1."""
    return 1 << max(0, number.bit_length() - 1)


def _sparse_transpose(Z: np.ndarray, group: Any, m: int) -> scipy.sparse.csr_matrix:
    """``(q m, n)``: its product with y is Z'y, effect by effect and level by level."""
    n, q = Z.shape
    rows = (np.arange(q) * m + np.asarray(group)[:, None]).ravel()
    columns = np.repeat(np.arange(n), q)
    return scipy.sparse.csr_matrix((Z.ravel(), (rows, columns)), shape=(q * m, n))


def _least_squares_of_many(
    rows: Rows, Y: np.ndarray, memory: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Residuals ``(n, size)`` of responses ``(b, n)`` on X, and the coefficients taken out ``(p, size)``.

    As for one response, but X is taken out once: what is left of it is of the order of rounding y itself, and
    counts as zero. Blocks have one size, b or more, so that the last bits do not depend on how many responses there
    are.

    Args:
        memory: ``(n, size)``, to write the residuals to, and numbers for fitted values.
    """
    y, fitted = memory
    size = y.shape[1]
    Q, sqrt_w, X = rows.Q, rows.sqrt_w, np.asarray(rows.design.X)
    if rows.design.offset is not None:
        Y = Y - np.asarray(rows.design.offset)
    b, n = Y.shape
    constant = constant_column(X)
    level = np.zeros(size)
    if constant is not None:
        level[:b] = Y.mean(axis=1)
    y[:, b:] = 0.0
    np.subtract(Y.T, level[:b], out=y[:, :b])
    if sqrt_w is not None:
        y *= sqrt_w[:, None]
    p = Q.shape[1]
    taken, beta0 = np.zeros((p, size)), np.empty((p, size))
    wide = min(size, SAME_PLACE)
    high = max(1, ONE_THREAD // (wide * max(1, p)))
    for at in (slice(left, left + wide) for left in range(0, size, wide)):
        for top in range(0, n, high):
            taken[:, at] += Q[top : top + high].T @ y[top : top + high, at]
        for top in range(0, n, high):
            part = y[top : top + high, at]
            part -= np.matmul(Q[top : top + high], taken[:, at], out=fitted[: part.size].reshape(part.shape))
        for top in range(0, p, high):
            beta0[top : top + high, at] = rows.X_basis.R_inv[top : top + high] @ taken[:, at]
    if constant is not None:
        beta0[constant] += level / X[0, constant]
    return y, beta0


class _Classes(NamedTuple):
    """How the class moments of a response follow from its ``z = Z'y (q, m)`` of the first factor.

    Attributes:
        shared: what does not depend on y. sums: ``(C, m)`` indicator. linear: ``(pairs C u, q m)``.
    """

    shared: ClassProducts
    sums: scipy.sparse.csr_matrix
    linear: scipy.sparse.csr_matrix
    Uy_shape: tuple[int, int, int]

    @property
    def yy_shape(self) -> tuple[int, int]:
        return self.Uy_shape[:2]

    def of(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """``(pairs, C, u, B)`` and ``(pairs, C, B)`` from ``(q, m, B)``."""
        q, m, B = z.shape
        Uy = (self.linear @ z.reshape(q * m, B)).reshape(*self.Uy_shape, B)
        squares = [self.sums @ (z[a] * z[b]) * (1.0 if a == b else 2.0) for a in range(q) for b in range(a, q)]
        return Uy, np.stack(squares)


# Levels whose Z'Z agree to this many digits of its largest entry form a class.
SAME_DIGITS = 11


def _classes(stats: CrossProducts) -> _Classes | None:
    """The classes of the first factor's levels, where they are few enough to be worth their moments."""
    first, *others = stats.layout.chain + stats.layout.dense
    ZZ = np.asarray(stats.factors[first].ZZ)
    q, _, m = ZZ.shape
    rounded = np.round(ZZ.reshape(q * q, m) / max(np.abs(ZZ).max(), np.finfo(float).tiny), SAME_DIGITS)
    _, of_level = np.unique(rounded, axis=1, return_inverse=True)
    of_level = of_level.reshape(-1)
    C = int(of_level.max()) + 1
    sizes = [stats.factors[f].ZZ.shape[1:] for f in others]
    d = sum(width * levels for width, levels in sizes)
    u = d + stats.XX.shape[0]
    if C * q * u > m or not has_closed_form(stats):
        return None
    rows, values, columns = [], [], []
    U = _columns_of_first(stats, first, others, d)  # per effect: level, column, value
    pairs = [(a, b) for a in range(q) for b in range(a, q)]
    for v, (a, b) in enumerate(pairs):
        for x, y in {(a, b), (b, a)}:
            level, column, value = U[x]
            rows.append((v * C + of_level[level]) * u + column)
            columns.append(y * m + level)
            values.append(value)
    linear = scipy.sparse.csr_matrix(
        (np.concatenate(values), (np.concatenate(rows), np.concatenate(columns))), shape=(len(pairs) * C * u, q * m)
    )
    sums = scipy.sparse.csr_matrix((np.ones(m), (of_level, np.arange(m))), shape=(C, m))
    dense = np.zeros((q, m, u))
    for a, (level, column, value) in enumerate(U):
        dense[a, level, column] = value
    by_class = np.argsort(of_level, kind="stable")
    count = np.bincount(of_level)
    first_of = np.cumsum(count) - count
    r, c = np.triu_indices(u)

    def moment(a: int, b: int) -> np.ndarray:
        one = dense[a][:, r] * dense[b][:, c]
        one = one if a == b else one + dense[b][:, r] * dense[a][:, c]
        return np.add.reduceat(one[by_class], first_of, axis=0)

    UU = np.stack([moment(a, b) for a, b in pairs])
    shared = ClassProducts(ZZ[:, :, by_class[first_of]], count.astype(np.float64), UU, None, None)
    return _Classes(shared, sums, linear, (len(pairs), C, u))


def _columns_of_first(shared: CrossProducts, first: int, others: list[int], d: int) -> list[tuple[np.ndarray, ...]]:
    """Products of the first factor's effects with U, sparse: per effect arrays of levels, columns of U and values."""
    ZX = np.asarray(shared.factors[first].ZX)
    q, p, m = ZX.shape
    starts, at = {}, 0
    for f in others:
        starts[f] = at
        at += shared.factors[f].ZZ.shape[1] * shared.factors[f].ZZ.shape[2]
    entries = []
    for a in range(q):
        parts = [(np.tile(np.arange(m), p), np.repeat(d + np.arange(p), m), ZX[a].ravel())]
        for (s, t), pair in zip(shared.layout.pairs, shared.pairs, strict=True):
            if s != first:
                continue
            m_t = shared.factors[t].ZZ.shape[2]
            present = np.asarray(pair.cols) < m_t
            for effect in range(pair.ZZ.shape[1]):
                column = starts[t] + effect * m_t + pair.cols[present]
                parts.append((pair.rows[present], column, pair.ZZ[a, effect][present]))
        entries.append(tuple(np.concatenate(part) for part in zip(*parts, strict=True)))
    return entries
