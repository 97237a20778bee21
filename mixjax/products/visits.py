"""Rows of repeated measures by subject and visit: subjects with the same visits, of the same arm, are a *pattern*.

All that a fit asks of the rows are sums over the subjects of a pattern, so that nothing but these sums grows with the
number of subjects: of second moments between visits where many responses share a design, of the rows themselves where
there is one response.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from mixjax import linalg
from mixjax.bases import ROUNDING, Basis, Orthonormal, change_basis
from mixjax.covariance import Structure, structure_of
from mixjax.design import RepeatedDesign, check_repeated_design


@dataclass(frozen=True)
class Patterns:
    """Which visits subjects may have.

    Attributes:
        seen: ``(C, T)`` the visits of a pattern. arm: ``(C,)`` its arm, ascending. n_arms: static.
    """

    seen: np.ndarray
    arm: np.ndarray
    n_arms: int

    @cached_property
    def of_arms(self) -> list[slice]:
        """Where the patterns of every arm stand."""
        ends = np.searchsorted(self.arm, np.arange(self.n_arms + 1))
        return [slice(int(first), int(last)) for first, last in pairwise(ends)]


@dataclass(frozen=True)
class VisitRows:
    """The rows of a design, times the roots of their weights, X in an orthonormal basis.

    Attributes:
        design: the arrays. sqrt_w: ``(n,)`` or None.
        Q: ``(n, p)`` basis of X. X_basis: the change to it.
        order: ``(S,)`` subjects with rows, by arm and pattern. place: ``(n,)`` the place of a row's subject among them.
        pattern: ``(S,)`` the pattern of each, ascending. patterns: what these are.
    """

    design: RepeatedDesign
    sqrt_w: np.ndarray | None
    Q: np.ndarray
    X_basis: Basis
    order: np.ndarray
    place: np.ndarray
    pattern: np.ndarray
    patterns: Patterns

    @property
    def n(self) -> int:
        """Number of rows."""
        return len(self.Q)

    @property
    def p(self) -> int:
        """Number of fixed effects."""
        p: int = self.Q.shape[1]
        return p

    @property
    def n_visits(self) -> int:
        """Number of visits."""
        return self.design.n_visits

    @property
    def structures(self) -> tuple[Structure, ...]:
        """The covariance structure of every arm."""
        return (structure_of(self.design.structure, self.design.n_visits),) * self.design.n_arms

    @property
    def sum_log_weights(self) -> float:
        """``sum log w``."""
        return 0.0 if self.sqrt_w is None else 2.0 * float(np.log(self.sqrt_w).sum())

    @cached_property
    def count(self) -> np.ndarray:
        """``(C,)`` subjects of every pattern."""
        return np.bincount(self.pattern, minlength=len(self.patterns.seen))

    @cached_property
    def starts(self) -> np.ndarray:
        """``(C,)`` the place of every pattern's first subject."""
        return np.concatenate([[0], np.cumsum(self.count)[:-1]])

    @cached_property
    def subjects_of_arms(self) -> list[slice]:
        """Where the subjects of every arm stand."""
        ends = np.append(self.starts, len(self.order))
        return [slice(int(ends[own.start]), int(ends[own.stop])) for own in self.patterns.of_arms]

    @cached_property
    def X_by_visit(self) -> np.ndarray:
        """``(S, T, p)`` the basis of X by subject and visit, zero where there is no row."""
        return self.by_visit(self.Q)

    def by_visit(self, columns: np.ndarray) -> np.ndarray:
        """``(n, ...)`` to ``(S, T, ...)``, zero where a subject has no row."""
        found = np.zeros((len(self.order), self.n_visits, *columns.shape[1:]))
        found[self.place, np.asarray(self.design.visit)] = columns
        return found

    def residuals(self, Y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Least-squares residuals ``(..., n)`` of responses on X, times the roots of the weights, and coefficients
        ``(..., p)`` of X's own columns."""
        own = Y if self.design.offset is None else Y - np.asarray(self.design.offset)
        if self.sqrt_w is not None:
            own = own * self.sqrt_w
        rest, delta = own, np.zeros((*np.shape(Y)[:-1], self.p))
        for _ in range(2):
            more = rest @ self.Q
            rest, delta = rest - more @ self.Q.T, delta + more
        return rest, delta @ self.X_basis.R_inv.T

    @cached_property
    def moments(self) -> np.ndarray:
        """``(pairs, C, t)``: sums over the subjects of a pattern of products of two columns of X's basis, the upper
        ones, at visits a and b, and at b and a."""
        return np.stack([self.sum_by_pattern(products) for products in self.products_of_visits()])

    def products_of_visits(self) -> Iterator[np.ndarray]:
        """Of every subject ``(S, t)``, what :attr:`moments` sums, for each two visits a <= b."""
        X = self.X_by_visit
        r, s = np.triu_indices(self.p)
        for a, b in zip(*np.triu_indices(self.n_visits), strict=True):
            products = X[:, a][:, r] * X[:, b][:, s]
            yield products if a == b else products + X[:, b][:, r] * X[:, a][:, s]

    def sum_by_pattern(self, values: np.ndarray) -> np.ndarray:
        """``(S, ...)`` of the subjects to ``(C, ...)``."""
        return np.add.reduceat(values, self.starts, axis=0)

    def with_response(self, y: np.ndarray) -> VisitRows:
        """The same rows of another response."""
        return replace(self, design=replace(self.design, y=y))


@dataclass(frozen=True)
class Trials:
    """Many responses of one design whose subjects miss visits of their own.

    Attributes:
        rows: of the design. patterns: all that there are. members: ``(B, C, S)`` 1.0 where a subject has the pattern.
        there: ``(B, n)`` which rows have a response. n: ``(B,)`` how many. sum_log_weights: ``(B,)`` of these.
    """

    rows: VisitRows
    patterns: Patterns
    members: np.ndarray
    there: np.ndarray
    n: np.ndarray
    sum_log_weights: np.ndarray

    @staticmethod
    def of(rows: VisitRows, there: np.ndarray) -> Trials:
        """Of ``there (B, n)``."""
        design, (B, S, T) = rows.design, (len(there), len(rows.order), rows.n_visits)
        seen = rows.by_visit(there.T) != 0  # (S, T, B)
        arm = rows.patterns.arm[rows.pattern]
        # A pattern is a number, that of its arm and then of its visits, so many at a time as a number has room for.
        code = np.repeat(arm[None].astype(np.int64), B, axis=0)  # (B, S)
        for first in range(0, T, MOST_BITS):
            some = seen[:, first : first + MOST_BITS]
            weights = 2 ** np.arange(some.shape[1], dtype=np.int64)
            code = code * 2 ** some.shape[1] + np.tensordot(weights, some, (0, 1)).T
            _, place, code = np.unique(code, return_index=True, return_inverse=True)
            code = code.reshape(B, S)
        members = np.zeros((B, len(place), S))
        np.put_along_axis(members, code[:, None], 1.0, axis=1)
        lane, subject = np.divmod(place, S)
        patterns = Patterns(seen[subject, :, lane], arm[subject], design.n_arms)
        log_w = np.zeros(len(there[0])) if rows.sqrt_w is None else 2.0 * np.log(rows.sqrt_w)
        return Trials(rows, patterns, members, there, there.sum(1), there @ log_w)

    def residuals(self, Y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Least-squares residuals ``(B, n)`` of the responses that are there, times the roots of the weights, zero
        elsewhere; coefficients ``(B, p)`` of X's own columns; and ``(B,)`` whether X has full rank on these rows."""
        rows, there = self.rows, self.there
        own = np.where(there, Y if rows.design.offset is None else Y - np.asarray(rows.design.offset), 0.0)
        if rows.sqrt_w is not None:
            own = own * rows.sqrt_w
        p = rows.p
        r, s = np.triu_indices(p)
        upper = (there * 1.0) @ (rows.Q[:, r] * rows.Q[:, s])
        XX = np.empty((len(Y), p, p))
        XX[:, r, s] = XX[:, s, r] = upper
        inverse, _ = linalg.inverse_logdet(np.ascontiguousarray(np.moveaxis(XX, 0, -1)))
        inverse = np.moveaxis(inverse, -1, 0)
        rest, delta = own, np.zeros((len(Y), p))
        for _ in range(2):
            more = (inverse @ (rest @ rows.Q)[:, :, None])[..., 0]
            rest, delta = np.where(there, rest - more @ rows.Q.T, 0.0), delta + more
        noise = np.linalg.norm(rest, axis=1) > ROUNDING * np.linalg.norm(own, axis=1)
        rest = rest * noise[:, None]
        full_rank = (
            np.isfinite(inverse).all((1, 2)) & (np.linalg.cond(XX) < MOST_CONDITION) if p else np.ones(len(Y), bool)
        )
        return rest, delta @ rows.X_basis.R_inv.T, full_rank


# Visits whose presence is one number.
MOST_BITS = 30
# Of the products of X's basis on the rows that are there; beyond it columns depend on each other.
MOST_CONDITION = 1e12


def visit_rows(design: RepeatedDesign, known: Orthonormal | None = None) -> VisitRows:
    """A design's rows by subject, pattern and visit.

    Args:
        known: the basis of X, times the roots of the weights, where it was found before.
    """
    check_repeated_design(design)
    sqrt_w = None if design.weights is None else np.sqrt(np.asarray(design.weights, np.float64))
    Q, X_basis = change_basis(np.asarray(design.X, np.float64), sqrt_w, full_rank=True, known=known)
    subject, visit = np.asarray(design.subject), np.asarray(design.visit)
    there = np.zeros((design.n_subjects, design.n_visits), bool)
    there[subject, visit] = True
    arm = np.zeros(design.n_subjects, int) if design.arm is None else np.asarray(design.arm)
    keys, pattern = np.unique(np.column_stack([arm, ~there]), axis=0, return_inverse=True)
    pattern = pattern.reshape(-1)
    order = np.argsort(pattern, kind="stable")
    order = order[there[order].any(1)]
    place = np.empty(design.n_subjects, int)
    place[order] = np.arange(len(order))
    used, pattern = np.unique(pattern[order], return_inverse=True)
    patterns = Patterns(keys[used, 1:] == 0, keys[used, 0], design.n_arms)
    return VisitRows(design, sqrt_w, Q, X_basis, order, place[subject], pattern.reshape(-1), patterns)
