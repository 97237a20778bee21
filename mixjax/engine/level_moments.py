"""The closed form of one grouping factor from moments by level: rows are passed over once.

With s the distinct columns of X and Z, everything that :mod:`mixjax.engine.laplace_curvature` sums over the rows of a
level is linear in sums of ``c1 s``, ``c2 s s``, ``c3 z s s`` and ``c4 z z s s``: the leverages ``k = z'Kz`` and all
moves of the predictor, ``t = x dx + z'db``, have coefficients that belong to the level. So have the rows' functions at
the next Newton step of the modes, by Taylor's series. What follows the sums costs nothing that grows with the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial, reduce
from operator import add
from typing import Any

import jax
import numpy as np

from mixjax.covariance import pairs_of, stack_of
from mixjax.engine.effects import Effects, orders_of
from mixjax.engine.laplace_curvature import ClosedForm
from mixjax.engine.laplace_model import Columns, Key, Model
from mixjax.engine.level_effects import OneFactor
from mixjax.families import Derivatives
from mixjax.machine import Array, as_laid_out, in_memory, namespace, once

Sums = dict[Key, Array]

# Sums of a row function for which XLA may compute it anew.
FEW_SUMS = 8


# Longest step of a level's modes, in root mean squares of the predictor: full ones can overshoot for ever.
LONGEST = 2.0


def shortened(effects: Effects, step: Array, longest: Array | float) -> Array:
    """The part ``(units, L)`` of a step of the modes that is not too long."""
    length = namespace(step).sqrt(effects.unit_dots(step, step))
    return longest / namespace(step).maximum(length, longest)


def step_of_modes(
    effects: Effects, gain: Any, g: Array, b: Array, v: Array, longest: Any
) -> tuple[Array, Array, Array]:
    """Newton's step of the modes from ``b = D v``, with scores g: v, b, and twice what it promised ``(L,)``."""
    r = gain.times_A(b) + g
    new = gain.solve(r)
    new_v = r - gain.times_A(new)
    inner = effects.unit_dots(g - v, new - b).sum(0)
    part = effects.of_units(shortened(effects, new - b, longest))
    return v + part * (new_v - v), b + part * (new - b), inner


class _Moments:
    """Sums by level of row functions ``c1, c2, ...`` times products of columns: ``sums[i][key] (m, L)``, by keys of
    columns that are not constant within levels."""

    def __init__(self, effects: OneFactor, columns: Columns, functions: tuple[Array, ...], first: int):
        """``functions`` are the derivatives number ``first``, ``first + 1``, ... by eta."""
        reach: dict[int, list[Key]] = {0: [()], 1: columns.keys(0, 1), 2: columns.keys(0, 2)}
        reach |= {3: columns.keys(1, 2), 4: columns.keys(2, 2)}
        self.columns = columns
        self.sums: list[Sums] = []
        for order, own in enumerate(functions, first):
            found = {}
            keys = sorted({columns.split(key)[1] for key in reach[order]})
            if len(keys) > FEW_SUMS:
                own = once(own)
            for key in keys:
                product = columns.products[key] if key else None
                found[key] = effects.by_level(own if product is None else own * product)
            self.sums.append(found)

    def __call__(self, i: int, *columns: int) -> Array:
        constant, key = self.columns.split(self.columns.key(*columns))
        return self._times(constant, self.sums[i][key])

    def _times(self, constant: Key, total: Array) -> Array:
        factor = self.columns.levels[constant]
        return total if factor is None else total * factor

    def moved(self, taylor: Taylor) -> None:
        """At predictors moved by ``z'delta``, as far as the sums reach."""
        self.sums = [{key: self._foretold(i, key, taylor) for key in own} for i, own in enumerate(self.sums)]

    def foretold(self, i: int, columns: Key, taylor: Taylor) -> Array:
        """One of the sums where predictors have moved."""
        constant, key = self.columns.split(columns)
        return self._times(constant, self._foretold(i, key, taylor))

    def _foretold(self, i: int, key: Key, taylor: Taylor) -> Array:
        z, total = self.columns.z, self.sums[i][key]
        for step in range(1, len(self.sums) - i):
            for places, factor in taylor[step].items():
                constant, more = self.columns.split(self.columns.key(*key, *(z[a] for a in places)))
                if more not in self.sums[i + step]:
                    return total
                total = total + self._times(constant, self.sums[i + step][more]) * factor
        return total


# Per order and effects, in ascending order: the product of their moves over the factorials of how often each is there.
Taylor = list[dict[tuple[int, ...], Array]]


def taylor_of(delta: Array, order: int) -> Taylor:
    """Of moves ``delta (q, m, L)`` of a level's effects, up to an order."""
    found: Taylor = [{}, {(a,): own for a, own in enumerate(delta)}]
    for _ in range(1, order):
        found.append({
            (*places, a): before * delta[a] * (1.0 / (places.count(a) + 1))
            for places, before in found[-1].items()
            for a in range(places[-1], len(delta))
        })  # fmt: skip
    return found


def moment_form(
    model: Model, lambdas: list[Array], fixed: Array, v: Array, longest: Any = LONGEST
) -> tuple[Array, Array, Array, ClosedForm]:
    """Newton's step of the modes from ``b = D v``, a second one by Taylor's series, and the closed form there: v, b,
    twice what the second step promised ``(L,)``, and the form; of the observed curvature."""
    effects, columns = model.effects, model.columns
    assert isinstance(effects, OneFactor)
    assert columns is not None
    psi = fixed[model.p :]
    start = effects.times_D(lambdas, v)
    eta = model.predictor(fixed, start)
    at: Derivatives = _laid_out(model.derivatives(eta, psi))
    xp, q, p, s = namespace(start), len(columns.z), len(columns.x), len(at.by_psi)
    z, x = columns.z, columns.x
    S = _Moments(effects, columns, at.by_eta, 0)
    # One logarithm a level; XLA leaves out those of rows, NumPy has them already.
    factored = model.factored(eta, psi) if xp is not np and effects.has_few_rows else None
    if factored is not None:
        value, factor, _, trials = factored
        S.sums[0][()] = effects.by_level(value) + trials * xp.log(factor.prod(-2))
    P = [_Moments(effects, columns, own, 0) for own in at.by_psi]

    def matrix(M: _Moments, i: int, *more: int) -> Array:
        return _symmetric(q, lambda a, b: M(i, z[a], z[b], *more))

    # The modes.
    gain = effects.gain(lambdas, matrix(S, 2))
    g = -xp.stack([S(1, a) for a in z])
    new_v, b, inner = step_of_modes(effects, gain, g, start, v, longest)
    # The sums are known there too, so that a second step takes no row.
    step = b - start
    taylor = taylor_of(step, 3)
    A = _symmetric(q, lambda a, b: S.foretold(2, columns.key(z[a], z[b]), taylor))
    slope = -xp.stack([S.foretold(1, (a,), taylor) for a in z])
    again_v, again, left = step_of_modes(effects, effects.gain(lambdas, A), slope, b, new_v, longest)
    small = inner < 1.0
    # Taylor's series leaves the fourth power of the first step.
    left = xp.where(small, left + inner * inner, inner)
    new_v, again = xp.where(small, again_v, new_v), xp.where(small, again, b)
    taylor = taylor_of(again - start, 4)
    for M in (S, *P):
        M.moved(taylor)
    b, inner = again, left

    gain = effects.gain(lambdas, matrix(S, 2))
    n, J = p + s, len(effects.pairs)
    T, every = n + J, range(q)
    K, R, N = _entries(gain.K), _entries(gain.R), _entries(gain.N)
    both_ways = {(a, c): K[a, c] if a == c else 2.0 * K[a, c] for a, c in pairs_of(q)}
    g = [-S(1, a) for a in z]

    def with_K(M: _Moments, i: int, *more: int) -> Array:
        """``sum K_ab sums[z_a z_b more]``."""
        return _sum(own * M(i, z[a], z[c], *more) for (a, c), own in both_ways.items())

    e = [with_K(S, 3, a) for a in z]
    Ke, Re = _dot(K, e), _dot(R, e)
    h = [[S(2, a, i) for a in z] for i in x] + [[M(1, a) for a in z] for M in P]
    moves = [_moved_by(pair, g) for pair in effects.pairs]
    # R'E g and -N E g; -K h and -R h.
    db = [[-own for own in _dot(K, h_d)] for h_d in h] + [_dot(R, move, turned=True) for move in moves]
    scores = [[-own for own in _dot(R, h_d)] for h_d in h] + [[-own for own in _dot(N, move)] for move in moves]

    # Changes of A, and what moves beside them.
    dA, KdA, RdAR = [], [], []
    for d in range(T):
        change = {(a, c): _sum(S(3, z[a], z[c], z[u]) * db[d][u] for u in every) for a, c in pairs_of(q)}
        if d < n:
            beside = partial(S, 3, x[d]) if d < p else partial(P[d - p], 2)
            change = {(a, c): own + beside(z[a], z[c]) for (a, c), own in change.items()}
        dA.append({(a, c): change[min(a, c), max(a, c)] for a in every for c in every})
    for change in dA:
        KdA.append(_product(K, change))
        RdA = _product(R, change)
        RdAR.append({(a, c): _sum(RdA[a, u] * R[c, u] for u in every) for a, c in pairs_of(q)})

    omega: dict[Key, Array] = {}
    for u, w in {columns.key(u, w) for u in columns.s for w in columns.s}:
        omega[u, w] = with_K(S, 4, u, w) - _sum(Ke[a] * S(3, z[a], u, w) for a in every)
    # omega t, by the columns of Z.
    pulls = []
    for d in range(T):
        pull = [_sum(omega[columns.key(z[a], z[c])] * db[d][c] for c in every) for a in every]
        pulls.append([own + omega[columns.key(z[a], x[d])] for a, own in enumerate(pull)] if d < p else pull)

    def beside_psi(i: int, e: int) -> Array:
        """``sum (k c3_psi - kappa c2_psi) t^e``."""
        M = P[i]

        def own(u: int) -> Array:
            return with_K(M, 3, u) - _sum(Ke[a] * M(2, z[a], u) for a in every)

        found = _sum(own(z[a]) * db[e][a] for a in every)
        return found + own(x[e]) if e < p else found

    def of_direction(M: dict[tuple[int, int], Array], pair: tuple[int, int]) -> Array:
        """``tr(M E)`` of a symmetric matrix."""
        return M[pair] if pair[0] == pair[1] else 2.0 * M[pair]

    # Everything by level, summed over levels at the end. Second derivatives are symmetric: entries d <= e.
    slopes = []
    for d in range(T):
        slope = _sum(KdA[d][a, a] for a in every)
        if d < n:
            slopes.append(slope + 2.0 * (S(1, x[d]) if d < p else P[d - p](0)))
        else:
            pair = effects.pairs[d - n]
            slopes.append(slope + of_direction(N, pair) - _inner(moves[d - n], g))
    bends: dict[tuple[int, int], Array] = {}
    fisher: dict[tuple[int, int], Array] = {}
    for d in range(T):
        for e_ in range(d, T):
            # In place where NumPy can.
            entry = _inner(pulls[d], db[e_])
            for a in every:
                for c in every:
                    entry -= KdA[d][a, c] * KdA[e_][c, a]
            if e_ < p:
                for a in every:
                    entry += omega[columns.key(x[e_], z[a])] * db[d][a]
                entry += omega[columns.key(x[d], x[e_])]
            if d < n:
                first = _inner(h[d], db[e_])
                if d < p and e_ < p:
                    first += S(2, x[d], x[e_])
                elif d < p and e_ < n:
                    first += P[e_ - p](1, x[d])
                elif e_ < n:
                    first += effects.by_level(at.by_psi_twice[d - p][e_ - p][0])
                first *= 2.0
                if e_ < n:
                    fisher[d, e_] = first
                entry += first
            if e_ >= n:
                pair = effects.pairs[e_ - n]
                entry += of_direction(RdAR[d], pair) + _inner(_moved_by(pair, Re), scores[d])
            if d >= n:
                pair = effects.pairs[d - n]
                rest = [own - 2.0 * score for own, score in zip(Re, g, strict=True)]
                entry += of_direction(RdAR[e_], pair) + _inner(_moved_by(pair, rest), scores[e_])
                entry -= _trace_of_moves(N, pair, effects.pairs[e_ - n])
            if p <= d < n:
                entry += beside_psi(d - p, e_)
            if p <= e_ < n:
                entry += beside_psi(e_ - p, d)
            if p <= d < n and p <= e_ < n:
                second = at.by_psi_twice[d - p][e_ - p]
                entry += _sum(
                    own * effects.by_level(second[2] * effects.Z[a] * effects.Z[c]) for (a, c), own in both_ways.items()
                )
                entry -= _sum(Ke[a] * effects.by_level(second[1] * effects.Z[a]) for a in every)
            bends[d, e_] = entry

    totals = _over_levels([*slopes, *bends.values(), 2.0 * S(0) + effects.unit_dots(new_v, b)])
    H = dict(zip(bends, totals[T:], strict=False))
    fisher = dict(zip(fisher, _over_levels(list(fisher.values())), strict=True))
    value = totals[-1] + gain.logdet

    def symmetric(entries: dict[tuple[int, int], Array], size: int) -> Array:
        rows = [xp.stack([entries[min(i, j), max(i, j)] for j in range(size)]) for i in range(size)]
        return xp.stack(rows)

    none = xp.zeros((0, 0, *value.shape), value.dtype)
    form = ClosedForm(
        value, xp.stack(totals[:T]), symmetric(H, T), symmetric(fisher, n) if n else none,
        in_memory([own for move in scores for own in move]).reshape(T, *v.shape),
    )  # fmt: skip
    return new_v, b, inner, form


# A matrix or vector of a level by its entries, each ``(m, L)``: XLA makes one loop of what is done to them, and of
# arrays that they are stacked in it makes many.
Entries = dict[tuple[int, int], Array]


def _entries(M: Array) -> Entries:
    return {(a, c): M[a, c] for a in range(len(M)) for c in range(len(M))}


def _dot(M: Entries, v: list[Array | None], turned: bool = False) -> list[Array]:
    """``M v``, or ``M'v``; None is zero."""
    known = [c for c, own in enumerate(v) if own is not None]
    return [_sum((M[c, a] if turned else M[a, c]) * v[c] for c in known) for a in range(len(v))]


def _product(M: Entries, W: Entries) -> Entries:
    q = max(M)[0] + 1
    return {(a, c): _sum(M[a, u] * W[u, c] for u in range(q)) for a in range(q) for c in range(q)}


def _sum(parts: Iterable[Array]) -> Array:
    """Without the zero that Python's own begins with, one more pass for NumPy."""
    return reduce(add, parts)


def _inner(v: list[Array | None], w: list[Array]) -> Array:
    return _sum(a * c for a, c in zip(v, w, strict=True) if a is not None)


def _moved_by(pair: tuple[int, int], v: list[Array]) -> list[Array | None]:
    """``E v`` of a direction."""
    a, c = pair
    found: list[Array | None] = [None] * len(v)
    found[a], found[c] = v[c], v[a]
    return found


def _trace_of_moves(N: Entries, one: tuple[int, int], other: tuple[int, int]) -> Array:
    """``tr(N E N E')`` of two directions."""
    return _sum(N[d, a] * N[b, c] for a, b in orders_of(*one) for c, d in orders_of(*other))


def _over_levels(parts: list[Array]) -> list[Array]:
    """Sums of each over its levels ``(m, L)``."""
    if not parts or namespace(parts[0]) is np:
        return [part.sum(-2) for part in parts]
    return list(in_memory(parts).sum(-2))


def _symmetric(q: int, entry: Callable[[int, int], Array]) -> Array:
    """``(q, q, ...)`` from the entries a <= b."""
    own = {(a, b): entry(a, b) for a, b in pairs_of(q)}
    return stack_of([[own[min(a, b), max(a, b)] for b in range(q)] for a in range(q)])


def _laid_out(at: Derivatives) -> Derivatives:
    """Row functions in memory, each once: XLA would compute them anew for every sum."""
    if namespace(at.by_eta[1]) is np:
        return at
    found: Derivatives = jax.tree.map(as_laid_out, at)
    return found
