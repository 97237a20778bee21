"""Terms of the fixed effects, and the contrasts that tests of type I, II and III make of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mixjax.design import Labels
from mixjax.fitted import Fitted

TYPES = {"I": 1, "II": 2, "III": 3, "1": 1, "2": 2, "3": 3}
# Singular values and coefficients below this, relative to the largest, are zeros: columns have unit length there.
TINY = 1e-10


class Term(NamedTuple):
    """One term of the fixed effects.

    Attributes:
        name: as the formula has it. columns: its columns among those of X.
        categories, numbers: its factors of either kind.
        factors: all of them, in order.
    """

    name: str
    columns: list[int]
    categories: frozenset[str]
    numbers: frozenset[str]
    factors: tuple[str, ...]

    def is_contained_in(self, other: Term) -> bool:
        """The other has the same numeric factors, all of this one's categorical factors, and more of them."""
        return self.numbers == other.numbers and self.categories < other.categories


def terms_of(labels: Labels) -> list[Term]:
    """Terms of the fixed effects in the order of the columns, with the intercept."""
    fixed = labels.state.fixed
    categorical = {e.shown for e in fixed.effects.expressions if fixed.categories(e) is not None}
    place = {name: j for j, name in enumerate(labels.fixed)}
    terms = []
    for part, factors in zip(fixed.spec.structure, fixed.effects.terms, strict=True):
        columns = [place[name] for name in part.columns if name in place]
        categories = frozenset(factors) & categorical
        terms.append(Term(":".join(factors) or "1", columns, categories, frozenset(factors) - categories, factors))
    return terms


def type_contrasts(fitted: Fitted, type: str = "III") -> dict[str, np.ndarray]:
    """What the tests of an analysis of variance test, term by term, as lmerTest and SAS define it.

    A term is contained in another that has the same numeric factors, all its categorical factors, and more.

    Args:
        fitted: the fit.
        type: ``"I"``: each term after those before it. ``"II"``: each after all that do not contain it. ``"III"``:
            averages over the levels of the other factors with equal weights; the rows involve the term and those that
            contain it only, and are orthogonal to those of the latter (SAS/STAT, "The Four Types of Estimable
            Functions"). With all cells filled these are the hypotheses of sum-to-zero coding, whatever the coding of
            the fit; with empty cells SAS's. A covariate in an interaction is held at zero, so centre it. Types I and
            II depend on how many rows the cells have; weights are not used.

    Returns:
        dict term -> L ``(r, p)`` of full row rank, without the intercept, and without terms that others determine.

    Raises:
        ValueError: unknown type, or rows that were not kept.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.inference.hypotheses import type_contrasts
        >>> fit = mj.lmm("angle ~ recipe + temp + (1 | recipe:replicate)", mj.datasets.load("cake"))
        >>> type_contrasts(fit.record)["recipe"]
        array([[0., 1., 0., 0.],
               [0., 0., 1., 0.]])
    """
    number = TYPES.get(str(type).upper())
    if number is None:
        raise ValueError(f"type must be 'I', 'II' or 'III', got {type!r}")
    terms = terms_of(fitted.labels)
    X = np.asarray(fitted.rows.X)
    lengths = np.linalg.norm(X, axis=0)
    X = X / lengths
    tested = [term for term in terms if term.factors and term.columns]
    if number < 3:
        found = {term.name: _after_others(X, term, terms, number) for term in tested}
    else:
        found = _orthogonal(X, terms, tested, fitted.labels)
    return {term.name: _readable(found[term.name], term, lengths) for term in tested if len(found[term.name])}


def _after_others(X: np.ndarray, term: Term, terms: list[Term], number: int) -> np.ndarray:
    """The term's rows of the triangular factor of X: what it adds to the columns that come before it."""
    before, after = [], []
    earlier = True
    for other in terms:
        if other is term:
            earlier = False
        elif earlier if number == 1 else not term.is_contained_in(other):
            before += other.columns
        else:
            after += other.columns
    order = [*before, *term.columns, *after]
    R = np.linalg.qr(X[:, order], mode="r")
    L = np.zeros((len(term.columns), len(order)))
    L[:, order] = R[len(before) : len(before) + len(term.columns)]
    return L


def _orthogonal(X: np.ndarray, terms: list[Term], tested: list[Term], labels: Labels) -> dict[str, np.ndarray]:
    """Type III. The columns of all levels are ``Q M``, so that ``k' Q'X beta`` has the coefficients ``M'k`` there."""
    Q, R = np.linalg.qr(X)
    full = _columns_of_all_levels(terms, labels)
    M = {term.name: Q.T @ full[term.name] / np.sqrt(len(X)) for term in terms}
    found = {}
    for term in tested:
        containing = [M[other.name] for other in terms if term.is_contained_in(other)]
        rest = [M[other.name] for other in terms if other is not term and not term.is_contained_in(other)]
        A = _null_space(np.hstack([np.zeros((X.shape[1], 1)), *rest]).T)
        within = A.T @ np.hstack([M[term.name], *containing])
        of_containing_only = _null_space(M[term.name].T @ A)
        K = A @ _null_space(of_containing_only.T @ within @ within.T)
        found[term.name] = K.T @ R
    return found


def _columns_of_all_levels(terms: list[Term], labels: Labels) -> dict[str, np.ndarray]:
    """Per term: a column for every combination of levels, times the products of its numeric columns."""
    own = labels.state.fixed.levels_of(labels.frame)
    full = {}
    for term in terms:
        numbers = np.ones((len(labels.frame), 1))
        for name in sorted(term.numbers):
            numbers = _products(numbers, own[name])
        # One scale for a product of numeric columns, in whichever term it stands; levels keep theirs.
        numbers = numbers / np.maximum(np.linalg.norm(numbers, axis=0) / np.sqrt(len(numbers)), np.finfo(float).tiny)
        for name in sorted(term.categories):
            numbers = _products(numbers, own[name])
        full[term.name] = numbers
    return full


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a[:, :, None] * b[:, None, :]).reshape(len(a), -1)


def _null_space(A: np.ndarray) -> np.ndarray:
    """Orthonormal columns that A maps to zero."""
    _, values, Vt = np.linalg.svd(A, full_matrices=True)
    rank = int((values > TINY * max(1.0, values.max(initial=0.0))).sum())
    return Vt[rank:].T


def _readable(L: np.ndarray, term: Term, lengths: np.ndarray) -> np.ndarray:
    """The same hypotheses about columns of their own length, with the identity in the term's columns if that can be."""
    own = L[:, term.columns]
    identity = own.shape[0] == own.shape[1] and np.linalg.cond(own) < 1e6
    L = np.linalg.solve(own, L) if identity else L
    L = np.where(np.abs(L) > TINY * np.abs(L).max(axis=1, keepdims=True), L, 0.0) * lengths
    return L / lengths[term.columns, None] if identity else L
