"""The closed form of one grouping factor from moments by level: rows are passed over once.

With s the distinct columns of X and Z, everything that :mod:`mixjax.engine.laplace_curvature` sums over the rows of a
level is linear in sums of ``c1 s``, ``c2 s s``, ``c3 z s s`` and ``c4 z z s s``: the leverages ``k = z'Kz`` and all
moves of the predictor, ``t = x dx + z'db``, have coefficients that belong to the level. So have the rows' functions at
the next Newton step of the modes, by Taylor's series. What follows the sums costs nothing that grows with the rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from mixjax.covariance import pairs_of, stack_of
from mixjax.engine.effects import Effects
from mixjax.engine.laplace_curvature import ClosedForm
from mixjax.engine.laplace_model import Columns, Key, Model
from mixjax.engine.level_effects import OneFactor
from mixjax.families import Derivatives
from mixjax.machine import Array, as_laid_out, namespace

Sums = dict[Key, Array]


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
    """Sums by level of row functions ``c1, c2, ...`` times products of columns: ``sums[i][key] (m, L)``."""

    def __init__(self, effects: OneFactor, columns: Columns, functions: tuple[Array, ...], first: int):
        """``functions`` are the derivatives number ``first``, ``first + 1``, ... by eta."""
        reach: dict[int, list[Key]] = {0: [()], 1: columns.keys(0, 1), 2: columns.keys(0, 2)}
        reach |= {3: columns.keys(1, 2), 4: columns.keys(2, 2)}
        self.columns = columns
        self.sums: list[Sums] = []
        for order, own in enumerate(functions, first):
            found = {}
            for key in reach[order]:
                product = columns.products[key] if key else None
                found[key] = effects.by_level(own if product is None else own * product)
            self.sums.append(found)

    def __call__(self, i: int, *columns: int) -> Array:
        return self.sums[i][self.columns.key(*columns)]

    def moved(self, taylor: Taylor) -> None:
        """At predictors moved by ``z'delta``, as far as the sums reach."""
        self.sums = [{key: self.foretold(i, key, taylor) for key in own} for i, own in enumerate(self.sums)]

    def foretold(self, i: int, key: Key, taylor: Taylor) -> Array:
        """One of the sums where predictors have moved."""
        z, total = self.columns.z, self.sums[i][key]
        for step in range(1, len(self.sums) - i):
            for places, factor in taylor[step].items():
                more = self.columns.key(*key, *(z[a] for a in places))
                if more not in self.sums[i + step]:
                    return total
                total = total + self.sums[i + step][more] * factor
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
    at: Derivatives = model.derivatives(model.predictor(fixed, start), psi)
    at = _laid_out(at)
    xp, q, p, s = namespace(start), len(columns.z), len(columns.x), len(at.by_psi)
    z, x = columns.z, columns.x
    S = _Moments(effects, columns, at.by_eta, 0)
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
    K = gain.K
    both_ways = {(a, c): K[a, c] if a == c else 2.0 * K[a, c] for a, c in pairs_of(q)}
    g = -xp.stack([S(1, a) for a in z])

    def with_K(M: _Moments, i: int, *more: int) -> Array:
        """``sum K_ab sums[z_a z_b more]``."""
        return sum(own * M(i, z[a], z[c], *more) for (a, c), own in both_ways.items())

    e = xp.stack([with_K(S, 3, a) for a in z])
    Ke = gain.solve(e)
    f = effects.moved(e - gain.times_A(Ke))
    Eg = effects.moved(g)
    db_D = Eg - gain.solve(gain.times_A(Eg))
    dg_D = -gain.times_A(db_D)
    n, J = p + s, len(Eg)
    pushes = [xp.stack([S(2, a, i) for a in z]) for i in x] + [xp.stack([M(1, a) for a in z]) for M in P]
    if pushes:
        h = xp.stack(pushes)  # (p + s, q, m, L)
        db = xp.concatenate([-gain.solve(h), db_D])
        scores = xp.concatenate([-(h + gain.times_A(db[:n])), dg_D])
    else:
        db, scores = db_D, dg_D
    T = n + J

    def total(values: Array) -> Array:
        """Over levels."""
        return values.sum(-2)

    # Changes of A, and what moves beside them.
    dA = []
    by_z = [matrix(S, 3, z[c]) for c in range(q)]
    for d in range(T):
        parts = [S3 * db[d, c] for c, S3 in enumerate(by_z)]
        change = sum(parts[1:], parts[0])
        if d < p:
            change = change + matrix(S, 3, x[d])
        elif d < n:
            change = change + matrix(P[d - p], 2)
        dA.append(change)
    KdA = [(K * change).sum((0, 1, 2)) for change in dA]
    explicit = [2.0 * total(S(1, i)) for i in x] + [2.0 * total(M(0)) for M in P]
    of_D = effects.traces_of_N(gain) - (Eg * g).sum((1, 2))
    gradient = [KdA[d] + (explicit[d] if d < n else of_D[d - n]) for d in range(T)]

    # Second derivatives. Symmetric: entries d <= e.
    traces = effects.traces_of(gain, xp.stack(dA, 2))
    omega: dict[Key, Array] = {}
    for u, w in {columns.key(u, w) for u in columns.s for w in columns.s}:
        omega[u, w] = with_K(S, 4, u, w) - sum(Ke[a] * S(3, z[a], u, w) for a in range(q))
    omega_zz = _symmetric(q, lambda a, b: omega[columns.key(z[a], z[b])])
    along = [(omega_zz * db[d][None]).sum(1) for d in range(T)]  # omega_zz db (q, m, L)

    def quadratic(d: int, e: int) -> Array:
        """``sum omega t^d t^e``."""
        found = (db[e] * along[d]).sum(0)
        if d < p:
            found = found + sum(omega[columns.key(x[d], z[a])] * db[e, a] for a in range(q))
        if e < p:
            found = found + sum(omega[columns.key(x[e], z[a])] * db[d, a] for a in range(q))
        if d < p and e < p:
            found = found + omega[columns.key(x[d], x[e])]
        return total(found)

    def with_psi(i: int, e: int) -> Array:
        """``sum (k c3_psi - kappa c2_psi) t^e``."""
        M = P[i]

        def own(u: int) -> Array:
            return with_K(M, 3, u) - sum(Ke[a] * M(2, z[a], u) for a in range(q))

        found = sum(own(z[a]) * db[e, a] for a in range(q))
        return total(found + own(x[e]) if e < p else found)

    H: dict[tuple[int, int], Array] = {}
    fisher: dict[tuple[int, int], Array] = {}
    for d in range(T):
        for e_ in range(d, T):
            if d < n:
                first = 2.0 * total((h[d] * db[e_]).sum(0))
                if d < p and e_ < p:
                    first = first + 2.0 * total(S(2, x[d], x[e_]))
                elif d < p and e_ < n:
                    first = first + 2.0 * total(P[e_ - p](1, x[d]))
                elif e_ < n:
                    first = first + 2.0 * total(effects.by_level(at.by_psi_twice[d - p][e_ - p][0]))
            else:
                first = -2.0 * (Eg[d - n] * scores[e_]).sum((0, 1))
            if e_ < n:
                fisher[d, e_] = first
            entry = first - traces.KK[d, e_] + quadratic(d, e_)
            if e_ >= n:
                entry = entry + traces.RR[d, e_ - n] + (f[e_ - n] * scores[d]).sum((0, 1))
            if d >= n:
                entry = entry + traces.RR[e_, d - n] + (f[d - n] * scores[e_]).sum((0, 1)) - traces.NN[d - n, e_ - n]
            if p <= d < n:
                entry = entry + with_psi(d - p, e_)
            if p <= e_ < n:
                entry = entry + with_psi(e_ - p, d)
            if p <= d < n and p <= e_ < n:
                second = at.by_psi_twice[d - p][e_ - p]
                weights = [effects.by_level(second[2] * effects.Z[a] * effects.Z[c]) for a, c in _square(q)]
                entry = entry + total(sum(K[a, c] * w for (a, c), w in zip(_square(q), weights, strict=True)))
                entry = entry - total(sum(Ke[a] * effects.by_level(second[1] * effects.Z[a]) for a in range(q)))
            H[d, e_] = entry

    def symmetric(entries: dict[tuple[int, int], Array], size: int) -> Array:
        rows = [xp.stack([entries[min(i, j), max(i, j)] for j in range(size)]) for i in range(size)]
        return xp.stack(rows)

    value = 2.0 * total(S(0)) + effects.unit_dots(new_v, b).sum(0) + gain.logdet
    none = xp.zeros((0, 0, *value.shape), value.dtype)
    form = ClosedForm(
        value, xp.stack(gradient), symmetric(H, T), symmetric(fisher, n) if n else none, scores
    )  # fmt: skip
    return new_v, b, inner, form


def _symmetric(q: int, entry: Callable[[int, int], Array]) -> Array:
    """``(q, q, ...)`` from the entries a <= b."""
    own = {(a, b): entry(a, b) for a, b in pairs_of(q)}
    return stack_of([[own[min(a, b), max(a, b)] for b in range(q)] for a in range(q)])


def _square(q: int) -> list[tuple[int, int]]:
    return [(a, c) for a in range(q) for c in range(q)]


def _laid_out(at: Derivatives) -> Derivatives:
    """Row functions in memory, each once: XLA would compute them anew for every sum."""
    if namespace(at.by_eta[1]) is np:
        return at
    found: Derivatives = jax.tree.map(as_laid_out, at)
    return found
