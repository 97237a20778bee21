"""Rows of repeated measures by subject and visit: subjects with the same visits, of the same arm, are a *pattern*.

All that a fit asks of the rows are sums over the subjects of a pattern, so that nothing but these sums grows with the
number of subjects: of second moments between visits where many responses share a design, of the rows themselves where
there is one response.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from mixjax.bases import Basis, Orthonormal, change_basis
from mixjax.covariance import Structure, structure_of
from mixjax.design import RepeatedDesign


@dataclass(frozen=True)
class VisitRows:
    """The rows of a design, times the roots of their weights, X in an orthonormal basis.

    Attributes:
        design: the arrays. sqrt_w: ``(n,)`` or None.
        Q: ``(n, p)`` basis of X. X_basis: the change to it.
        order: ``(S,)`` subjects with rows, by arm and pattern. place: ``(n,)`` the place of a row's subject among them.
        pattern: ``(S,)`` the pattern of each, ascending. seen: ``(C, T)`` the visits of a pattern. arm: ``(C,)`` its
            arm, ascending.
    """

    design: RepeatedDesign
    sqrt_w: np.ndarray | None
    Q: np.ndarray
    X_basis: Basis
    order: np.ndarray
    place: np.ndarray
    pattern: np.ndarray
    seen: np.ndarray
    arm: np.ndarray

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
        return np.bincount(self.pattern, minlength=len(self.seen))

    @cached_property
    def starts(self) -> np.ndarray:
        """``(C,)`` the place of every pattern's first subject."""
        return np.concatenate([[0], np.cumsum(self.count)[:-1]])

    @cached_property
    def patterns_of_arms(self) -> list[slice]:
        """Where the patterns of every arm stand."""
        ends = np.searchsorted(self.arm, np.arange(self.design.n_arms + 1))
        return [slice(int(first), int(last)) for first, last in pairwise(ends)]

    @cached_property
    def subjects_of_arms(self) -> list[slice]:
        """Where the subjects of every arm stand."""
        ends = np.append(self.starts, len(self.order))
        return [slice(int(ends[own.start]), int(ends[own.stop])) for own in self.patterns_of_arms]

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
        X, T = self.X_by_visit, self.n_visits
        r, s = np.triu_indices(self.p)
        found = np.empty((T * (T + 1) // 2, len(self.seen), len(r)))
        for v, (a, b) in enumerate(zip(*np.triu_indices(T), strict=True)):
            products = X[:, a][:, r] * X[:, b][:, s]
            if a != b:
                products = products + X[:, b][:, r] * X[:, a][:, s]
            found[v] = self.sum_by_pattern(products)
        return found

    def sum_by_pattern(self, values: np.ndarray) -> np.ndarray:
        """``(S, ...)`` of the subjects to ``(C, ...)``."""
        return np.add.reduceat(values, self.starts, axis=0)

    def with_response(self, y: np.ndarray) -> VisitRows:
        """The same rows of another response."""
        return replace(self, design=replace(self.design, y=y))


def visit_rows(design: RepeatedDesign, known: Orthonormal | None = None) -> VisitRows:
    """A design's rows by subject, pattern and visit.

    Args:
        known: the basis of X, times the roots of the weights, where it was found before.
    """
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
    seen = keys[used, 1:] == 0
    return VisitRows(design, sqrt_w, Q, X_basis, order, place[subject], pattern.reshape(-1), seen, keys[used, 0])
