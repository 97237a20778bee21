"""A design in the bases that sums over its rows are formed in: X orthonormal, each Z in a basis of its own, y less its
least-squares fit. All sums over rows start here: of all rows, of weighted ones, without some.

Numbers are worked on by numpy; inside a JAX transformation the same steps are JAX operations.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.bases import Basis, Orthonormal, change_basis, change_scale, constant_column
from mixjax.covariance import structure_of
from mixjax.design import Design, check_design, refuse_known
from mixjax.machine import is_concrete
from mixjax.products.known import Turned, in_eigenvectors, in_independent_effects, turned
from mixjax.products.sums import (
    CrossProducts,
    FactorProducts,
    Layout,
    PairProducts,
    TermPlace,
    order_by_levels,
    pad,
    sum_by_group,
)


class Meeting(NamedTuple):
    """Which levels of two grouping factors meet.

    Attributes:
        rows, cols: ``(k,)`` the levels of the pairs, as in :class:`~mixjax.products.sums.PairProducts`.
        entry: ``(n,)`` the pair of every row; None where groups are traced, and nothing is known of them: every row has
            a pair of its own.
    """

    rows: Any
    cols: Any
    entry: Any


@dataclass(frozen=True)
class Rows:
    """The rows of a design, each in the bases of its cross-products and times the root of its weight.

    Attributes:
        design: the arrays. sqrt_w: ``(n,)`` or None; 0 for rows that are not there.
        Q: ``(n, p)`` orthonormal basis of X. X_basis: the change to it.
        residual: ``(n,)`` of y on Q. beta0: ``(p,)`` the coefficients of X taken out of it.
        Z: per grouping factor ``(n, q)``, its terms side by side. Z_bases: one per term.
        groups: per grouping factor ``(n,)`` its levels. levels: how many.
        meetings: per pair of factors, in the order of ``layout.pairs``.
        layout: the structure.
        known: per grouping factor L, a factor of the known covariance of its levels, or None; ``()`` where none is
            known. Rows, groups and meetings are those of the levels themselves.
        of_design: what with_response() leaves as it is, found once.
    """

    design: Design
    sqrt_w: Any
    Q: Any
    X_basis: Basis
    residual: Any
    beta0: Any
    Z: tuple[Any, ...]
    Z_bases: tuple[Basis, ...]
    groups: tuple[Any, ...]
    levels: tuple[int, ...]
    meetings: tuple[Meeting, ...]
    layout: Layout
    known: tuple[Any, ...] = ()
    of_design: dict[str, Any] = field(default_factory=dict, repr=False, compare=False)

    @property
    def n(self) -> int:
        """Number of rows."""
        n: int = self.Q.shape[0]
        return n

    def with_response(self, y: Any) -> Rows:
        """The same rows with another response ``(n,)``; X and Z stay as they are."""
        residual, beta0 = _least_squares(replace(self.design, y=y), self.Q, self.X_basis, self.sqrt_w)
        return replace(self, design=replace(self.design, y=y), residual=residual, beta0=beta0)

    def padded(self) -> Rows:
        """With empty levels, as compiled programs share them; see :func:`~mixjax.products.sums.pad`."""
        if self.known:
            return self  # products of effects that no row has for itself
        stats = pad(self.stats)
        pairs = zip(self.meetings, stats.pairs, strict=True)
        return replace(
            self,
            levels=tuple(products.Zy.shape[-1] for products in stats.factors),
            meetings=tuple(meeting._replace(rows=pair.rows, cols=pair.cols) for meeting, pair in pairs),
        )

    @cached_property
    def log_w(self) -> Any:
        """``(n,)`` logarithms of the weights; 0 for rows that are not there."""
        if self.sqrt_w is None:
            return np.zeros(self.n)
        xp, present = np if is_concrete(self.sqrt_w) else jnp, self.design.present
        return 2.0 * xp.log(self.sqrt_w if present is None else xp.where(present, self.sqrt_w, 1.0))

    @cached_property
    def counts(self) -> Any:
        """``(n,)`` 1.0, or 0.0 for rows that are not there."""
        present = self.design.present
        return np.ones(self.n) if present is None else _numbers(present, self.residual)

    # --- sums --------------------------------------------------------------------------------------------------------

    def sums(self, weights: np.ndarray | None = None) -> CrossProducts:
        """The cross-products; with every row counted so many times where ``weights (n,)`` are given.

        These are case weights, real, not negative. Rows count, so n is their sum; the precision of a row is what it
        was.
        """
        sums = self._by_level(weights)
        return in_independent_effects(sums, self.known) if self.known else sums

    def _by_level(self, weights: np.ndarray | None = None) -> CrossProducts:
        """The sums of every level, whatever is known of their covariance."""
        c, Q, residual = weights, self.Q, self.residual
        p = Q.shape[1]

        def of(rows: Any, group: Any, m: int) -> Any:
            return sum_by_group(rows if c is None else rows * c, group, m)

        factors = []
        for f, (group, m) in enumerate(zip(self.groups, self.levels, strict=True)):
            sums = of(self.of_factor(f), group, m)
            q = sums.shape[0]
            factors.append(FactorProducts(sums[:, :q], sums[:, q : q + p], sums[:, -1]))
        pairs = []
        for i, (rows, cols, entry) in enumerate(self.meetings):
            products = self.of_pair(i)
            pairs.append(PairProducts(rows, cols, products if entry is None else of(products, entry, len(rows))))
        own = Q if c is None else c[:, None] * Q
        return CrossProducts(
            factors=tuple(factors),
            pairs=tuple(pairs),
            XX=Q.T @ own,
            Xy=own.T @ residual,
            yy=residual @ (residual if c is None else c * residual),
            n=self._n_of(c),
            sum_log_weights=self._sum_log_weights(c),
            beta0=self.beta0,
            X_basis=self.X_basis,
            Z_bases=self.Z_bases,
            layout=self.layout,
        )

    def _n_of(self, c: np.ndarray | None) -> Any:
        if self.design.present is not None:
            return self.counts.sum() if c is None else c @ self.counts
        return np.float64(self.n) if c is None else c.sum()

    def _sum_log_weights(self, c: np.ndarray | None) -> Any:
        if self.sqrt_w is None:
            return 0.0
        return self.log_w.sum() if c is None else c @ self.log_w

    @cached_property
    def stats(self) -> CrossProducts:
        """:meth:`sums` of all rows; of a known covariance that is alone those of its eigenvectors."""
        return self.sums() if self.turned is None else in_eigenvectors(self._by_level(), self.turned)

    def seen(self) -> CrossProducts:
        """:attr:`stats` without effects that no row has."""
        return self.stats if self.turned is None else in_eigenvectors(self._by_level(), self.turned.seen())

    @property
    def turned(self) -> Turned | None:
        """The eigenvectors of a known covariance that is alone, with one effect a level; None of other models, and
        where arrays are traced."""
        if len(self.known) != 1 or self.layout.widths[0] != 1:
            return None
        if not all(map(is_concrete, (self.known[0], self.Z[0], self.groups[0]))):
            return None
        if "turned" not in self.of_design:
            squares = sum_by_group(np.asarray(self.Z[0]).T ** 2, self.groups[0], self.levels[0])[0]
            self.of_design["turned"] = turned(squares, np.asarray(self.known[0], np.float64))
        found: Turned = self.of_design["turned"]
        return found

    def of_factor(self, f: int, at: Any = slice(None)) -> Any:
        """``Z' [Z X y]`` of single rows: ``(q, q + p + 1, n)``."""
        Z = self.Z[f][at]
        others = _concatenate([Z, self.Q[at], self.residual[at][:, None]])
        return Z.T[:, None] * others.T[None]

    def of_pair(self, i: int, at: Any = slice(None)) -> Any:
        """``Z_s' Z_t`` of single rows: ``(q_s, q_t, n)``."""
        s, t = self.layout.pairs[i]
        return self.Z[s][at].T[:, None] * self.Z[t][at].T[None]

    # --- without some ------------------------------------------------------------------------------------------------

    @cached_property
    def _level_counts(self) -> list[np.ndarray]:
        return [np.bincount(group, minlength=m) for group, m in zip(self.groups, self.levels, strict=True)]

    def without(self, unit: np.ndarray, deleted: np.ndarray) -> CrossProducts:
        """The cross-products without each of some units: a batch of ``len(deleted)``.

        Sums are taken away, which costs the digits that the unit carries. A level that loses all of its rows stays,
        empty: it contributes nothing.

        Args:
            unit: ``(n,)`` code of every row's unit. deleted: ``(B,)`` the units to leave out, one at a time.
        """
        stats, p, B = self._by_level() if self.known else self.stats, self.Q.shape[1], len(deleted)
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
        for i, (pair, meeting) in enumerate(zip(stats.pairs, self.meetings, strict=True)):
            entry = np.asarray(meeting.entry)
            size = np.bincount(entry, minlength=pair.ZZ.shape[2])
            left = _subtract(np.asarray(pair.ZZ), self.of_pair(i, at), lane, entry[at], B, size)
            pairs.append(PairProducts(repeated(pair.rows, B), repeated(pair.cols, B), left))
        found = replace(
            stats,
            factors=tuple(factors),
            pairs=tuple(pairs),
            XX=stats.XX - by_lane(Q[:, :, None] * Q[:, None]),
            Xy=stats.Xy - by_lane(Q * residual[:, None]),
            yy=stats.yy - by_lane(residual**2),
            n=stats.n - by_lane(np.ones(len(at))),
            sum_log_weights=stats.sum_log_weights - by_lane(self.log_w[at]),
            beta0=repeated(stats.beta0, B),
            X_basis=jax.tree.map(lambda a: repeated(a, B), stats.X_basis),
            Z_bases=jax.tree.map(lambda a: repeated(a, B), stats.Z_bases),
        )
        return in_independent_effects(found, self.known) if self.known else found


def rows_of(design: Design, basis: Orthonormal | None = None) -> Rows:
    """The rows of a design in their bases.

    Args:
        design: arrays of the model.
        basis: of the columns of X times the roots of the weights, where it is known.

    Raises:
        ValueError: shapes or values do not make a model.
    """
    check_design(design)
    sqrt_w = None if design.weights is None else _sqrt(design.weights)
    if design.present is not None:
        there = _numbers(design.present, design.y)
        sqrt_w = there if sqrt_w is None else there * sqrt_w
    Q, X_basis = change_basis(design.X, sqrt_w, full_rank=True, known=basis)
    factors, places, known = _grouping_factors(design)
    effects = [
        _effects(term.Z, sqrt_w, place.structure.scaling) for term, place in zip(design.terms, places, strict=True)
    ]
    Zs, Z_bases = [own for own, _ in effects], [basis for _, basis in effects]
    Z = [_concatenate([Zs[t] for t, place in enumerate(places) if place.factor == f]) for f in range(len(factors))]
    groups, levels = tuple(group for group, _ in factors), tuple(m for _, m in factors)
    if design.nested is None:
        chain, dense = _elimination_order(factors, known)
    else:
        chain, dense = _said_chain(design, places, factors), []
    order, meetings, keys = chain + dense, [], []
    order = [f for f in order if f < len(factors)]  # without the empty factor
    for i, s in enumerate(order):
        for t in order[i + 1 :]:
            meetings.append(_meeting(factors[s], factors[t], s in chain and t in chain))
            keys.append((s, t))
    layout = Layout(places, tuple(chain), tuple(dense), tuple(keys))
    residual, beta0 = _least_squares(design, Q, X_basis, sqrt_w)
    return Rows(
        design, sqrt_w, Q, X_basis, residual, beta0, tuple(Z), tuple(Z_bases), groups, levels, tuple(meetings), layout,
        tuple(known) if any(L is not None for L in known) else (),
    )  # fmt: skip


def repeated(leaf: Any, B: int) -> np.ndarray:
    """The same B times, in a leading axis."""
    return np.broadcast_to(leaf, (B, *np.shape(leaf)))


# --- bases and least squares -----------------------------------------------------------------------------------------


def _effects(Z: Any, sqrt_w: Any, scaling: str) -> tuple[Any, Basis]:
    """Columns of a random term in the basis that its structure allows, their mean squares 1."""
    scale = float(np.sqrt(np.shape(Z)[0]))
    return change_basis(Z, sqrt_w, scale) if scaling == "any" else change_scale(Z, sqrt_w, scale, scaling == "each")


def _least_squares(design: Design, Q: Any, X_basis: Basis, sqrt_w: Any) -> tuple[Any, Any]:
    """Residual of y (weighted) on X, and the coefficients taken out."""
    y = design.y if design.offset is None else _sub(design.y, design.offset)
    concrete = is_concrete(y) and is_concrete(Q) and is_concrete(sqrt_w)
    if not concrete:
        y = y if sqrt_w is None else y * sqrt_w
        hold = jax.lax.stop_gradient
        coefficients = hold(jnp.linalg.solve(Q.T @ Q, Q.T @ y)) if Q.shape[1] else jnp.zeros(0, jnp.asarray(y).dtype)
        return y - Q @ coefficients, X_basis.R_inv @ coefficients
    y = np.asarray(y, np.float64)
    X = np.asarray(design.X)
    constant = constant_column(X)
    # Centred first, and twice, so that a large mean costs no digits.
    level = 0.0 if constant is None else y.mean()
    residual = (y - level) * (1.0 if sqrt_w is None else sqrt_w)
    coefficients = np.zeros(Q.shape[1])
    for _ in range(2):
        step = Q.T @ residual
        residual = residual - Q @ step
        coefficients += step
    beta0 = X_basis.R_inv @ coefficients
    if constant is not None:
        beta0[constant] += level / X[0, constant]
    return residual, beta0


# --- grouping --------------------------------------------------------------------------------------------------------


def _grouping_factors(design: Design) -> tuple[list[tuple[Any, int]], tuple[TermPlace, ...], list[Any]]:
    """The distinct grouping factors ``(group, m)``, the place of every term, and per factor L or None."""
    groups: list[tuple[Any, int]] = []
    known: list[Any] = []
    width: list[int] = []
    places = []
    said: list[int | None] = [None] * len(design.terms) if design.nested is None else [*design.nested]
    if len(said) != len(design.terms):
        raise ValueError(f"nested has {len(said)} numbers for {len(design.terms)} terms: one each")
    numbers: list[int | None] = []
    for number, term in zip(said, design.terms, strict=True):
        q = np.shape(term.Z)[1]
        if number is None:
            alike = (f for f, (group, m) in enumerate(groups) if m == term.n_groups and _same(group, term.group))
            f = next((f for f in alike if _same(known[f], term.levels)), None)
        else:
            f = numbers.index(number) if number in numbers else None
        if f is None:
            known.append(term.levels)
            f = len(groups)
            groups.append((np.asarray(term.group) if is_concrete(term.group) else term.group, term.n_groups))
            width.append(0)
            numbers.append(number)
        places.append(TermPlace(structure_of(term.structure, q), f, width[f]))
        width[f] += q
    return groups, tuple(places), known


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return a is b or (is_concrete(a) and is_concrete(b) and np.array_equal(a, b))


def _elimination_order(groups: list[tuple[Any, int]], known: list[Any]) -> tuple[list[int], list[int]]:
    """Chain and dense factors; those with a known covariance are dense, behind the empty factor where all are."""
    free = [f for f, L in enumerate(known) if L is None]
    if len(free) < len(groups):
        chain, dense = (
            _elimination_order([groups[f] for f in free], [None] * len(free)) if free else ([len(groups)], [])
        )
        own = sorted((f for f, L in enumerate(known) if L is not None), key=lambda f: -groups[f][1])
        return ([free[f] for f in chain], [free[f] for f in dense] + own) if free else (chain, own)

    def nested(s: int, t: int) -> bool:
        return is_concrete(groups[s][0]) and is_concrete(groups[t][0]) and _is_nested(groups[s], groups[t][0])

    return order_by_levels([m for _, m in groups], nested)


def _is_nested(inner: tuple[np.ndarray, int], outer: np.ndarray) -> bool:
    group, m = inner
    parent = np.zeros(m, outer.dtype)
    parent[group] = outer
    return bool((parent[group] == outer).all())


def _said_chain(design: Design, places: tuple[TermPlace, ...], groups: list[tuple[Any, int]]) -> list[int]:
    """The factors in the order that ``design.nested`` says; of those that hold numbers, whether it is so."""
    refuse_known(design, "nested=", "it is said of grouping factors whose levels are independent; leave it out")
    said = dict(zip(design.nested or (), places, strict=True))
    chain = [said[number].factor for number in sorted(said)]
    for place, term in zip(places, design.terms, strict=True):
        group, m = groups[place.factor]
        both = is_concrete(group) and is_concrete(term.group)
        if m != term.n_groups or (both and not np.array_equal(group, term.group)):
            raise ValueError("terms of one number in nested must have one and the same group and n_groups")
    for s, t in pairwise(chain):
        (inner, m), (outer, _) = groups[s], groups[t]
        if is_concrete(inner) and is_concrete(outer) and not _is_nested((inner, m), outer):
            raise ValueError(
                f"nested={design.nested}: levels of grouping factor {s} lie in several levels of factor {t}"
            )
    return chain


def _meeting(s: tuple[Any, int], t: tuple[Any, int], nested: bool) -> Meeting:
    (group_s, m_s), (group_t, m_t) = s, t
    if not (is_concrete(group_s) and is_concrete(group_t)):
        if nested:
            of_level = jnp.full(m_s, m_t, np.int32).at[group_s].set(jnp.asarray(group_t, np.int32))
            return Meeting(np.arange(m_s, dtype=np.int32), of_level, group_s)
        return Meeting(group_s, group_t, None)
    if nested:
        parent = np.full(m_s, m_t, np.int32)  # a level without rows has no parent: out of range
        parent[group_s] = group_t
        return Meeting(np.arange(m_s, dtype=np.int32), parent, group_s)
    code, entry = np.unique(group_s.astype(np.int64) * m_t + group_t, return_inverse=True)
    rows, cols = np.divmod(code, m_t)
    return Meeting(rows.astype(np.int32), cols.astype(np.int32), entry.reshape(-1))


# --- numpy for numbers, JAX inside transformations -------------------------------------------------------------------


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


def _numbers(present: Any, like: Any) -> Any:
    """Booleans as 1.0 and 0.0, as wide as a traced ``like`` is."""
    if is_concrete(present):
        return np.asarray(present, np.float64)
    dtype = like.dtype if jnp.issubdtype(getattr(like, "dtype", np.int64), jnp.floating) else float
    return present.astype(dtype)


def _sqrt(x: Any) -> Any:
    return np.sqrt(np.asarray(x, np.float64)) if is_concrete(x) else jnp.sqrt(x)


def _sub(a: Any, b: Any) -> Any:
    return np.asarray(a, np.float64) - np.asarray(b) if is_concrete(a) and is_concrete(b) else jnp.asarray(a) - b


def _concatenate(columns: list[Any]) -> Any:
    if len(columns) == 1:
        return columns[0]
    concrete = all(is_concrete(c) for c in columns)
    return (np if concrete else jnp).concatenate(columns, axis=1)
