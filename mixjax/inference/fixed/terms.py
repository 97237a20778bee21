"""Terms of the fixed effects, and the contrasts that tests of type I, II and III make of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mixjax.design import Labels
from mixjax.fitted.options import DDF, ddf_of

if TYPE_CHECKING:
    from mixjax.fitted.either import AnyRecord

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


def type_contrasts(fitted: AnyRecord, type: str = "III") -> dict[str, np.ndarray]:
    """Hypotheses of an analysis of variance, term by term, as SAS defines them.

    A term is contained in another that has the same numeric factors, all its categorical factors, and more. Terms stand
    for all columns that their levels make, whichever of them the fit has: ``0 + a * b`` is the model of ``a * b``, and
    where types II and III adjust for ``b`` they adjust for the mean as well.

    Args:
        fitted: the fit.
        type: ``"I"``: each term after those before it. ``"II"``: each after all that do not contain it. ``"III"``:
            averages over the levels of the other factors with equal weights; the rows involve the term and those that
            contain it only, and are orthogonal to those of the latter (SAS/STAT, "The Four Types of Estimable
            Functions"). With all cells filled these are the hypotheses of sum-to-zero coding, whatever the coding of
            the fit; with empty cells SAS's. A covariate in an interaction is held at zero, so centre it. Types I and
            II depend on how many rows the cells have; weights are not used.

    Returns:
        dict term -> L ``(r, p)`` of full row rank, without the intercept; r is 0 for a term that others determine. The
        rows are those of lmerTest under treatment coding, whatever the coding of the fit: of types I and II those of
        the Doolittle factorisation of X'X, of type III one for every level but the first.

    Raises:
        ValueError: unknown type, or rows that were not kept.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.inference.fixed.hypotheses import type_contrasts
        >>> fit = mj.lmm("angle ~ recipe + temp + (1 | recipe:replicate)", mj.datasets.load("cake"))
        >>> type_contrasts(fit.record)["recipe"]
        array([[0., 1., 0., 0.],
               [0., 0., 1., 0.]])
    """
    number = TYPES.get(str(type).upper())
    if number is None:
        hint = f"; degrees of freedom are ddf={type!r}" if ddf_of(type) in DDF.values() else ""
        raise ValueError(f"type must be 'I', 'II' or 'III', got {type!r}{hint}")
    terms = terms_of(fitted.labels)
    X = np.asarray(fitted.design.X)
    if not X.shape[1]:
        return {}
    lengths = np.linalg.norm(X, axis=0)
    Q, R = np.linalg.qr(X / lengths)
    levels = _columns_of_all_levels(terms, fitted.labels)
    # The columns of all levels are Q M, so that k'Q'X beta has the coefficients M'k there.
    M = {name: Q.T @ own.columns / np.sqrt(len(X)) for name, own in levels.items()}
    found = {}
    for i, term in enumerate(terms):
        if not term.factors:
            continue
        if number == 3:
            K = _orthogonal(M, terms, term)
        else:
            others = terms[:i] if number == 1 else [t for t in terms if t is not term and not term.is_contained_in(t)]
            K = _added(M[term.name], [M[other.name] for other in others])
        own = levels[term.name]
        K = _with_rows_of(K, M[term.name] * own.scale, own.base, identity=number == 3)
        L = K.T @ R
        L = np.where(np.abs(L) > TINY * np.abs(L).max(axis=1, keepdims=True, initial=0.0), L, 0.0)
        found[term.name] = L * lengths / np.sqrt(len(X))
    return found


def _added(own: np.ndarray, before: list[np.ndarray]) -> np.ndarray:
    """Orthonormal ``(p, r)``: what columns add to the span of those that come before."""
    A = _null_space(np.hstack([np.zeros((len(own), 1)), *before]).T)
    directions: np.ndarray = A @ _range(A.T @ own)
    return directions


def _orthogonal(M: dict[str, np.ndarray], terms: list[Term], term: Term) -> np.ndarray:
    """Orthonormal ``(p, r)``, type III."""
    containing = [M[other.name] for other in terms if term.is_contained_in(other)]
    rest = [M[other.name] for other in terms if other is not term and not term.is_contained_in(other)]
    A = _null_space(np.hstack([np.zeros((len(M[term.name]), 1)), *rest]).T)
    within = A.T @ np.hstack([M[term.name], *containing])
    of_containing_only = _null_space(M[term.name].T @ A)
    directions: np.ndarray = A @ _null_space(of_containing_only.T @ within @ within.T)
    return directions


def _with_rows_of(K: np.ndarray, columns: np.ndarray, base: np.ndarray, identity: bool) -> np.ndarray:
    """The span of ``K (p, r)`` by other vectors: r of the term's own columns get an identity, or else a unit upper
    triangle of orthogonal rows; columns of few base levels are chosen first, as treatment coding does."""
    G = K.T @ columns
    chosen: list[int] = []
    Q = np.zeros((len(G), 0))
    least = 1e-8 * np.linalg.norm(G, axis=0).max(initial=0.0)
    for j in np.argsort(base, kind="stable"):
        if len(chosen) == len(G):
            break
        left = G[:, j] - Q @ (Q.T @ G[:, j])
        left = left - Q @ (Q.T @ left)
        if np.linalg.norm(left) > least:
            chosen.append(j)
            Q = np.column_stack([Q, left / np.linalg.norm(left)])
    if len(chosen) < len(G):
        return K
    G = G[:, sorted(chosen)]
    if identity:
        return K @ np.linalg.inv(G).T
    Q, U = np.linalg.qr(G)
    return K @ Q / np.diag(U)


class _Levels(NamedTuple):
    """All columns of one term, those of the first factor's levels varying fastest.

    Attributes:
        columns: ``(n, c)``, products of numeric columns of mean square 1. scale: ``(c,)``, their own size.
        base: ``(c,)``, how many of the levels are the first of their factor.
    """

    columns: np.ndarray
    scale: np.ndarray
    base: np.ndarray


def _columns_of_all_levels(terms: list[Term], labels: Labels) -> dict[str, _Levels]:
    """Per term: a column for every combination of levels, times the products of its numeric columns."""
    n = len(labels.frame)
    own = labels.state.fixed.levels_of(labels.frame)
    full = {}
    for term in terms:
        columns = np.ones((n, 1))
        for name in sorted(term.numbers):
            columns = _products(columns, own[name])
        # One scale for a product of numeric columns, in whichever term it stands; levels keep theirs.
        scale = np.maximum(np.linalg.norm(columns, axis=0) / np.sqrt(n), np.finfo(float).tiny)
        columns, base = columns / scale, np.zeros(len(scale), int)
        for name in (name for name in term.factors if name in term.categories):
            m = own[name].shape[1]
            columns = _products(own[name], columns)
            scale, base = np.tile(scale, m), (np.eye(1, m, dtype=int).T + base).ravel()
        full[term.name] = _Levels(columns, scale, base)
    return full


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """All products of two columns, the second's varying fastest."""
    products: np.ndarray = (a[:, :, None] * b[:, None, :]).reshape(len(a), -1)
    return products


def _null_space(A: np.ndarray) -> np.ndarray:
    """Orthonormal columns that A maps to zero."""
    _, values, Vt = np.linalg.svd(A, full_matrices=True)
    return Vt[_rank(values) :].T


def _range(A: np.ndarray) -> np.ndarray:
    """Orthonormal columns that span those of A."""
    U, values, _ = np.linalg.svd(A, full_matrices=False)
    return U[:, : _rank(values)]


def _rank(values: np.ndarray) -> int:
    return int((values > TINY * max(1.0, values.max(initial=0.0))).sum())
