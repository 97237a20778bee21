"""Deletion with the variance parameters held: closed forms in what a unit's own rows are.

Columns and y are multiplied by the roots of the weights. With ``U = Z Lambda``, ``H = I + U U'`` and ``S = I + U'U``,
so that ``H^{-1} = I - U S^{-1} U'``, leaving out the rows E of a unit is adding a coefficient for each of them. That
changes ``X'H^{-1}X`` and the score by

    ``-(H^{-1}X)_E' A^{-1} (H^{-1}X)_E``  and  ``-(H^{-1}X)_E' A^{-1} e_E``,  ``A = (H^{-1})_EE = I - U_E S^{-1} U_E'``,

where ``e = H^{-1}(y - X beta)`` are the conditional residuals (Haslett 1999, J. R. Statist. Soc. B 61, 603; Demidenko &
Stukel 2005, Statist. Med. 24, 893). Of a single row ``A = 1 - h + x'M x`` with h its leverage. A needs ``S^{-1}`` only
among the random effects that the unit meets.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.sparse.csgraph
import scipy.sparse.linalg

from mixjax.covariance import split_theta, triangle
from mixjax.diagnostics.deletion import dominant, estimable
from mixjax.fitted.record import Fitted
from mixjax.products.rows import Rows

# The inverse of S is made as a whole where that is less work, up to so many random effects (512 MB).
MOST_DENSE = 8000
# Numbers in one block of right-hand sides: 64 MB.
BLOCK = 2**23


class Fixed(NamedTuple):
    """Generalised least squares of all rows at the theta of the fit, in the basis of X.

    Attributes:
        U: ``(n, K)`` sparse, the effects' columns times Lambda. S: ``I + U'U``. factor: solves with S.
        X, e: ``H^{-1} X (n, p)`` and ``H^{-1} (y - X delta) (n,)``.
        information: ``(p, p)`` ``X'H^{-1}X``. delta: ``(p,)`` coefficients, beyond those of ordinary least squares.
    """

    U: scipy.sparse.csr_array
    S: scipy.sparse.csc_array
    factor: scipy.sparse.linalg.SuperLU
    X: np.ndarray
    e: np.ndarray
    information: np.ndarray
    delta: np.ndarray


def fixed_part(fitted: Fitted, rows: Rows) -> Fixed:
    """Fixed effects of all rows, to all digits that the basis of X gives."""
    U, p = effects(fitted, rows), rows.Q.shape[1]
    S = (scipy.sparse.eye_array(U.shape[1]) + U.T @ U).tocsc()
    factor = scipy.sparse.linalg.splu(S, permc_spec="MMD_AT_PLUS_A", diag_pivot_thresh=0.0)
    both = np.column_stack([rows.Q, rows.residual])
    both = both - U @ factor.solve(np.ascontiguousarray(U.T @ both))
    information = rows.Q.T @ both[:, :p]
    information = 0.5 * (information + information.T)
    delta = np.linalg.solve(information, rows.Q.T @ both[:, p])
    return Fixed(U, S, factor, both[:, :p], both[:, p] - both[:, :p] @ delta, information, delta)


def delete_at_theta(rows: Rows, unit: np.ndarray, fixed: Fixed, leverages: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Generalised least squares without each unit, in the basis of X; NaN where X loses rank.

    Args:
        unit: ``(n,)`` codes ``0 .. U - 1``. leverages: ``(n,)`` overall, used where every unit is one row.

    Returns:
        ``(U, p)`` change of the coefficients, ``(U, p, p)`` their covariance over ``sigma^2``.
    """
    X, p = fixed.X, rows.Q.shape[1]
    both = np.column_stack([X, fixed.e])
    if len(unit) == unit.max() + 1:
        order = np.argsort(unit)
        A = 1.0 - leverages + np.einsum("ni,ni->n", X, np.linalg.solve(fixed.information, X.T).T)
        loss = (both[:, :p, None] * both[:, None] / A[:, None, None])[order]
    else:
        loss = _losses(unit, fixed, both)
    lost = [u for u in dominant(rows, unit) if not estimable(rows.design, unit, u)]
    left = fixed.information - loss[:, :, :p]
    left[lost] = np.eye(p)
    covariance = np.linalg.inv(left)
    change = -(covariance @ loss[:, :, p:])[:, :, 0]
    change[lost], covariance[lost] = np.nan, np.nan
    return change, covariance


def effects(fitted: Fitted, rows: Rows) -> scipy.sparse.csr_array:
    """``U = Z Lambda`` in the rows' bases, ``(n, sum of levels x effects)``."""
    stats, blocks = fitted.stats, []
    thetas = split_theta(fitted.estimates.theta, stats.layout.qs)
    for place, basis, theta in zip(stats.layout.terms, stats.Z_bases, thetas, strict=True):
        q, m = place.q, rows.levels[place.factor]
        Lambda = np.zeros((q, q))
        Lambda[triangle(q)] = theta
        Z = rows.Z[place.factor][:, place.start : place.start + q] @ (np.asarray(basis.R) @ Lambda)
        columns = rows.groups[place.factor].astype(np.int64)[:, None] * q + np.arange(q)
        start = np.arange(rows.n + 1) * q
        if rows.known and (L := rows.known[place.factor]) is not None:
            shares = (np.asarray(L)[rows.groups[place.factor]][:, :, None] * Z[:, None]).reshape(rows.n, m * q)
            every = np.tile(np.arange(m * q), rows.n)  # zeros too: all rows have as many entries
            blocks.append(scipy.sparse.csr_array((shares.ravel(), every, np.arange(rows.n + 1) * m * q), shares.shape))
            continue
        blocks.append(scipy.sparse.csr_array((Z.ravel(), columns.ravel(), start), shape=(rows.n, m * q)))
    return scipy.sparse.hstack(blocks, format="csr")


def _losses(unit: np.ndarray, fixed: Fixed, both: np.ndarray) -> np.ndarray:
    """``X_E' A^{-1} [X_E e_E]`` of every unit, ``(units, p, p + 1)``, where ``both = [X e] (n, p + 1)``."""
    order, count, p = np.argsort(unit, kind="stable"), np.bincount(unit), both.shape[1] - 1
    ends = np.cumsum(count)
    among = _inverse_among(unit, fixed)
    loss = np.empty((len(count), p, p + 1))
    for u, (end, n_own) in enumerate(zip(ends, count, strict=True)):
        own = order[end - n_own : end]
        touched, inverse = among[u]
        here = both[own]
        U_own = _columns(fixed.U, own, touched)
        if len(touched) < n_own:
            gram = U_own.T @ U_own
            F = np.linalg.solve(np.eye(len(touched)) - inverse @ gram, inverse)
            V = U_own.T @ here
            loss[u] = here[:, :p].T @ here + V[:, :p].T @ (F @ V)
        else:
            loss[u] = here[:, :p].T @ np.linalg.solve(np.eye(n_own) - U_own @ inverse @ U_own.T, here)
    return loss


def _columns(U: scipy.sparse.csr_array, own: np.ndarray, touched: np.ndarray) -> np.ndarray:
    """Dense rows ``own`` of U, of its columns ``touched`` only."""
    width = U.indptr[1] - U.indptr[0]
    at = U.indptr[own][:, None] + np.arange(width)
    dense = np.zeros((len(own), len(touched)))
    dense[np.arange(len(own))[:, None], np.searchsorted(touched, U.indices[at])] = U.data[at]
    return dense


def _inverse_among(unit: np.ndarray, fixed: Fixed) -> list[tuple[np.ndarray, np.ndarray]]:
    """Per unit the random effects that it meets, ascending, and ``S^{-1}`` among them.

    S falls into blocks that have nothing to do with each other, as subjects have not; one right-hand side then asks for
    a column of the inverse in every block at once. What a unit meets within one block is a cell.
    """
    U, S = fixed.U, fixed.S
    K, n_units = S.shape[0], int(unit.max()) + 1
    width = U.indptr[1] - U.indptr[0]
    met = np.unique(np.repeat(unit, width).astype(np.int64) * K + U.indices)
    of_unit, effect = np.divmod(met, K)
    _, block = scipy.sparse.csgraph.connected_components(S, directed=False)
    n_blocks = int(block.max()) + 1
    cells, cell = np.unique(of_unit * n_blocks + block[effect], return_inverse=True)
    cell = cell.reshape(-1)
    # Cells of one block take turns, and the effects of a cell stand side by side.
    turn, place = _count_within(cells % n_blocks), _count_within(cell)
    widths = np.zeros(turn.max() + 1, np.int64)
    np.maximum.at(widths, turn[cell], place + 1)
    first = np.cumsum(widths) - widths
    starts = np.searchsorted(of_unit, np.arange(n_units + 1))
    if widths.sum() > K and K <= MOST_DENSE:
        inverse = scipy.linalg.inv(S.toarray(), overwrite_a=True, check_finite=False)
        parts = [effect[a:b] for a, b in pairwise(starts)]
        return [(part, inverse[np.ix_(part, part)]) for part in parts]
    column = first[turn[cell]] + place
    cells_of = _Cells(of_unit, effect, cell, place, starts)
    found = [np.zeros((b - a, b - a)) for a, b in pairwise(starts)]
    by_turn = np.argsort(turn[cell], kind="stable")
    ends = np.searchsorted(turn[cell][by_turn], np.arange(len(widths)), side="right")
    begin = 0
    while begin < len(widths):
        end = begin + 1
        while end < len(widths) and (first[end] + widths[end] - first[begin]) * K <= BLOCK:
            end += 1
        at = by_turn[(ends[begin - 1] if begin else 0) : ends[end - 1]]
        rhs = np.zeros((K, first[end - 1] + widths[end - 1] - first[begin]))
        rhs[effect[at], column[at] - first[begin]] = 1.0
        solved = fixed.factor.solve(rhs)
        cells_of.fill(found, solved, at, column - place - first[begin])
        begin = end
    return [(effect[a:b], inverse) for a, b, inverse in zip(starts[:-1], starts[1:], found, strict=True)]


class _Cells(NamedTuple):
    """Random effects that every unit meets, entry by entry: ``(E,)`` its unit, the effect, the cell, the place in the
    cell; and where each unit's entries begin, ``(units + 1,)``."""

    of_unit: np.ndarray
    effect: np.ndarray
    cell: np.ndarray
    place: np.ndarray
    starts: np.ndarray

    def fill(self, found: list[np.ndarray], solved: np.ndarray, at: np.ndarray, first: np.ndarray) -> None:
        """Put the solved columns of the cells of entries ``at`` to their places in every unit's inverse.

        Args:
            first: ``(E,)`` the first column of an entry's cell.
        """
        at = at[np.argsort(self.cell[at], kind="stable")]
        bounds = np.flatnonzero(np.diff(self.cell[at])) + 1
        for own in np.split(at, bounds):
            u, c = self.of_unit[own[0]], first[own[0]]
            rows = own - self.starts[u]
            found[u][np.ix_(rows, rows)] = solved[np.ix_(self.effect[own], c + self.place[own])]


def _count_within(groups: np.ndarray) -> np.ndarray:
    """How many entries of the same group stand before each."""
    order = np.argsort(groups, kind="stable")
    count = np.bincount(groups)
    rank = np.empty(len(groups), np.int64)
    rank[order] = np.arange(len(groups)) - np.repeat(np.cumsum(count) - count, count)
    return rank
