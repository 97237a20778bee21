"""All effects of a model side by side, in components that share no row and no distance: their products."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import scipy.sparse

from mixjax.design import Design
from mixjax.kernels import FAR_AWAY, Places, distances
from mixjax.products.sums import CrossProducts, Layout


def places_of(design: Design) -> dict[int, Places]:
    """Of every term with a kernel, by its number."""
    return {
        t: Places.of(term.kernel, np.asarray(term.coordinates, np.float64), np.asarray(term.within))
        for t, term in enumerate(design.terms)
        if term.kernel is not None
    }


class Component(NamedTuple):
    """c components of one shape, s effects each.

    Attributes:
        R: ``(c, s, s)`` with ``R'R = Z'Z``. Y: ``(c, s, p + 1)`` with ``R'Y = Z'[X y]``.
        own: per term and effect the places of its levels among the s. apart: per term with a kernel the distances
            ``(c, m, m)``. is_diagonal: so is R, as where a row has one effect.
    """

    R: np.ndarray
    Y: np.ndarray
    own: list[list[np.ndarray]]
    apart: dict[int, np.ndarray]
    is_diagonal: bool


class _Index(NamedTuple):
    """Components of one shape: per factor the levels ``(c, m_f)``, and where they and their effects stand.

    Attributes:
        members: per factor ``(c, m_f)``. starts: per factor its first effect, effect after effect, level by level;
            then the number of effects.
    """

    members: list[np.ndarray]
    starts: list[int]

    def effects(self, f: int, a: int) -> np.ndarray:
        """``(m_f,)`` where effect a of the levels of a factor stand."""
        m = self.members[f].shape[1]
        found: np.ndarray = self.starts[f] + a * m + np.arange(m)
        return found

    def where(self, f: int, levels: int) -> np.ndarray:
        """``(2, levels)``: the component of every level of a factor, -1 where it is in none of these, and its place."""
        own = self.members[f]
        found = np.full((2, levels), -1)
        found[0, own], found[1, own] = np.arange(len(own))[:, None], np.arange(own.shape[1])
        return found


def components_of(stats: CrossProducts, layout: Layout, places: dict[int, Places]) -> list[tuple[_Index, Component]]:
    """Components by shape, with the products of the design, and no response yet.

    Args:
        stats: sums by level. places: of terms with kernels, by their number.
    """
    widths = [products.ZZ.shape[0] for products in stats.factors]
    found = []
    for members in _shapes(stats, layout, places):
        sizes = [w * own.shape[1] for w, own in zip(widths, members, strict=True)]
        index = _Index(members, [int(start) for start in np.cumsum([0, *sizes])])
        A = _squares(index, stats, layout)
        plain = np.count_nonzero(A) == np.count_nonzero(np.diagonal(A, axis1=1, axis2=2))
        own = [[index.effects(p.factor, p.start + a) for a in range(p.q)] for p in layout.terms]
        apart = {t: _apart(term, members[layout.terms[t].factor]) for t, term in places.items()}
        found.append((index, Component(_root(A, plain), A[:, :, :0], own, apart, plain)))
    return found


def _shapes(stats: CrossProducts, layout: Layout, places: dict[int, Places]) -> list[list[np.ndarray]]:
    """Components with as many levels of every factor, together: per factor their levels ``(c, m_f)``."""
    sizes = [products.ZZ.shape[2] for products in stats.factors]
    offsets = np.cumsum([0, *sizes])
    n = int(offsets[-1])
    edges = [(np.zeros(0, np.int64), np.zeros(0, np.int64))]
    for (s, t), pair in zip(layout.pairs, stats.pairs, strict=True):
        there = np.asarray(pair.cols) < sizes[t]
        edges.append((offsets[s] + np.asarray(pair.rows)[there], offsets[t] + np.asarray(pair.cols)[there]))
    for t, own in places.items():
        order = np.argsort(own.within, kind="stable")
        same = own.within[order][1:] == own.within[order][:-1]
        start = offsets[layout.terms[t].factor]
        edges.append((start + order[:-1][same], start + order[1:][same]))
    rows, cols = (np.concatenate(side) for side in zip(*edges, strict=True))
    graph = scipy.sparse.coo_array((np.ones(len(rows)), (rows, cols)), shape=(n, n))
    count, label = scipy.sparse.csgraph.connected_components(graph, directed=False)
    levels = [label[offsets[f] : offsets[f + 1]] for f in range(len(sizes))]
    counts = np.stack([np.bincount(own, minlength=count) for own in levels], axis=1)
    shapes = []
    for shape in np.unique(counts, axis=0):
        which = np.flatnonzero((counts == shape).all(1))
        members = []
        for own, m in zip(levels, shape, strict=True):
            inside = np.flatnonzero(np.isin(own, which))
            members.append(inside[np.argsort(own[inside], kind="stable")].reshape(len(which), m))
        shapes.append(members)
    return shapes


def _squares(index: _Index, stats: CrossProducts, layout: Layout) -> np.ndarray:
    """``Z'Z (c, s, s)``."""
    A = np.zeros((len(index.members[0]), index.starts[-1], index.starts[-1]))
    for f, (own, products) in enumerate(zip(index.members, stats.factors, strict=True)):
        ZZ = np.asarray(products.ZZ)
        for a in range(len(ZZ)):
            for b in range(len(ZZ)):
                A[:, index.effects(f, a), index.effects(f, b)] += ZZ[a, b][own]
    for (f, g), pair in zip(layout.pairs, stats.pairs, strict=True):
        of_f, of_g = (index.where(h, stats.factors[h].ZZ.shape[2]) for h in (f, g))
        rows, cols = np.asarray(pair.rows), np.asarray(pair.cols)
        there = cols < of_g.shape[1]
        there[there] &= of_f[0, rows[there]] >= 0
        rows, cols, ZZ = rows[there], cols[there], np.asarray(pair.ZZ)[:, :, there]
        for a in range(len(ZZ)):
            for b in range(ZZ.shape[1]):
                i, j = index.effects(f, a)[of_f[1, rows]], index.effects(g, b)[of_g[1, cols]]
                np.add.at(A, (of_f[0, rows], i, j), ZZ[a, b])
                np.add.at(A, (of_f[0, rows], j, i), ZZ[a, b])
    return A


def _apart(places: Places, members: np.ndarray) -> np.ndarray:
    """Distances ``(c, m, m)``; of levels that do not see each other so far that they are independent at any range, and
    no infinity, of which 0 times it would not be a number."""
    at, within = places.coordinates[members], places.within[members]
    apart = distances(at, at)
    return np.where(within[:, :, None] == within[:, None], apart, FAR_AWAY * (1.0 + np.ptp(at)))


def _root(A: np.ndarray, is_diagonal: bool) -> np.ndarray:
    """``R`` with ``R'R = A``, ``(c, s, s)``, rows orthogonal; zero rows where A has less than full rank."""
    if is_diagonal:
        roots: np.ndarray = np.sqrt(np.diagonal(A, axis1=1, axis2=2))[:, :, None] * np.eye(A.shape[1])
        return roots
    values, vectors = np.linalg.eigh(A)
    values = np.where(values > A.shape[1] * np.finfo(float).eps * values[:, -1:], values, 0.0)
    turned: np.ndarray = np.sqrt(values)[:, :, None] * vectors.swapaxes(1, 2)
    return turned


def with_products(made: list[tuple[_Index, Component]], stats: CrossProducts) -> list[Component]:
    """With the products of a response: ``Y`` of ``R'Y = Z'[X y]``."""
    found = []
    for index, part in made:
        columns = []
        for own, products in zip(index.members, stats.factors, strict=True):
            both = np.concatenate([np.asarray(products.ZX), np.asarray(products.Zy)[:, None]], axis=1)  # (q, p + 1, m)
            columns.append(both[:, :, own].transpose(2, 0, 3, 1).reshape(len(own), -1, both.shape[1]))
        squares = (part.R**2).sum(2)[:, :, None]
        RB = part.R @ np.concatenate(columns, axis=1)
        found.append(part._replace(Y=np.where(squares > 0, RB / np.where(squares > 0, squares, 1.0), 0.0)))
    return found
