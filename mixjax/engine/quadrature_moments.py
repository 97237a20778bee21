"""What adaptive quadrature adds, from moments by level: a node costs a slope and its sums, and nothing is kept by row.

As :mod:`mixjax.engine.level_moments` to the closed form, so is this to :func:`mixjax.engine.quadrature.correction`:
with s the distinct columns of X and Z, all that is summed over the rows of a level is linear in sums of ``c1 s``, ``c2
z s`` and ``c3 z z s`` at the mode, and of ``c`` and ``c1 s`` at every node.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.covariance import stack_of
from mixjax.engine.effects import factor_of
from mixjax.engine.laplace_fit import chain
from mixjax.engine.laplace_model import Key, Model
from mixjax.engine.quadrature import (
    Correction,
    Rule,
    correction,
    lower_root_slopes,
    of_covariances,
    scales,
    without_middle,
)
from mixjax.machine import Array, as_laid_out, fori_loop, namespace


def moment_correction(
    model: Model, rule: Rule, lambdas: list[Array], Lambda: Array, fixed: Array, b: Array
) -> Correction:
    """:func:`~mixjax.engine.quadrature.correction` of a model with columns, whose family has no parameters."""
    effects: Any = model.effects
    columns, xp, q = model.columns, namespace(fixed, b), len(Lambda)
    assert columns is not None
    z, x, psi = columns.z, columns.x, fixed[model.p :]
    eta = model.predictor(fixed, b)

    def sums(values: Array, keys: list[Key]) -> dict[Key, Array]:
        products = [columns.products[key] for key in keys]
        return {
            key: effects.by_level(values if product is None else values * product)
            for key, product in zip(keys, products, strict=True)
        }

    _, c1, c2, c3, _ = model.derivatives(eta, psi).by_eta
    c1, c2, c3 = _in_memory((c1, c2, c3))
    one, two, three = sums(c1, columns.keys(0, 1)), sums(c2, columns.keys(1, 1)), sums(c3, columns.keys(2, 1))
    A = stack_of([[two[columns.key(u, w)] for w in z] for u in z])
    g = -xp.stack([one[(u,)] for u in z])
    scaled = scales(Lambda, A)
    C = scaled.C
    gC = linalg.matmul(g[None], C)[0]
    AC = linalg.matmul(A, C)
    CAC = linalg.matmul(linalg.transpose(C), AC)
    own = [columns.products[(u,)] for u in z]

    def at_node(eta: Array) -> tuple[Array, Array]:
        """Densities summed by level, and slopes."""
        factored = model.factored(eta, psi) if effects.has_few_rows else None
        if factored is None:
            c, slope = _in_memory(model.kernel(eta, psi))
            return effects.by_level(c), slope
        *rows, trials = factored
        value, factor, slope = _in_memory(tuple(rows))
        return effects.by_level(value) + trials * xp.log(factor.prod(-2)), slope

    begin = at_node(eta)[0]
    weight, *others = without_middle(rule)
    nodes, logs = map(xp.asarray, others)

    def add(k: Any, state: tuple[Any, ...]) -> tuple[Any, ...]:
        total, plain, by_node, first, second = state
        zeta = [nodes[k, a] for a in range(q)]
        shift = [sum(C[a, e] * zeta[e] for e in range(q)) for a in range(q)]
        moved = eta
        for a, column in enumerate(own):
            at_rows = effects.at_rows(shift[a])
            moved = moved + (at_rows if column is None else column * at_rows)
        c, slope = at_node(moved)
        taken = sum(zeta[a] * gC[a] for a in range(q))
        taken = taken - 0.5 * sum(zeta[a] * zeta[e] * CAC[a, e] for a in range(q) for e in range(q))
        part = xp.exp(logs[k] + begin - taken - c)
        counts = part > 0.0
        if not (xp is np and counts.all()):  # densities of nodes that count for nothing need not be finite
            slope = xp.where(effects.at_rows(counts), slope, 0.0)
        pulled = sums(slope, columns.keys(0, 1))
        plain = {key: old + part * pulled[key] for key, old in plain.items()}
        by_node = [[old + zeta[e] * part * pulled[(z[a],)] for e, old in enumerate(row)]
                   for a, row in enumerate(by_node)]  # fmt: skip
        first = [old + zeta[a] * part for a, old in enumerate(first)]
        second = {(a, e): old + zeta[a] * zeta[e] * part for (a, e), old in second.items()}
        return total + part, plain, by_node, first, second

    none = xp.zeros_like(begin)
    start = (
        none + weight, {key: weight * old for key, old in one.items()}, [[none] * q for _ in range(q)], [none] * q,
        {(a, e): none for a in range(q) for e in range(a, q)},
    )  # fmt: skip
    total, plain, by_node, first, second = fori_loop(len(nodes), add, start, xp)
    inverse = 1.0 / total
    first = xp.stack([old * inverse for old in first])
    moments = stack_of([[second[min(a, e), max(a, e)] * inverse for e in range(q)] for a in range(q)])
    M = stack_of([[old * inverse for old in row] for row in by_node])
    M = M + g[:, None] * first[None] - linalg.matmul(AC, moments)
    MC = linalg.matmul(linalg.transpose(M), C)
    V = stack_of([[MC[max(a, e), min(a, e)] for e in range(q)] for a in range(q)])
    to_mean = (C * first[None]).sum(1)  # C times the mean of the nodes
    back = linalg.transpose(C)
    # Of c3: what Taylor's formula takes away, and the predictors' change with their scale.
    spread = linalg.matmul(linalg.matmul(C, moments + V), back)

    def omega(s: int) -> Array:
        """``sum_j (2 P_j - kappa_j c3_j) s_j``."""
        found = plain[(s,)] * inverse - one[(s,)]
        for a in range(q):
            found = found - two[columns.key(z[a], s)] * to_mean[a]
        found = 2.0 * found
        for a in range(q):
            for e in range(q):
                found = found - three[columns.key(z[a], z[e], s)] * spread[a, e]
        return found

    gain = effects.gain(lambdas, A)
    h = xp.stack([omega(s) for s in z])
    moved = gain.solve(h)
    f = h - gain.times_A(moved)
    by_fixed = [
        (omega(s) - sum(moved[a] * two[columns.key(z[a], s)] for a in range(q))).sum(0) for s in x
    ]  # fmt: skip
    by_D, by_factor = of_covariances(effects, Lambda, scaled, A, g, f, M, V)
    fixed_ = xp.stack(by_fixed) if by_fixed else xp.zeros((0, begin.shape[-1]), begin.dtype)
    return Correction(-2.0 * xp.log(total).sum(0), fixed_, by_D, by_factor)


def _in_memory(values: tuple[Array, ...]) -> tuple[Array, ...]:
    """Row functions, each once: XLA would compute them anew for every sum."""
    return values if namespace(values[0]) is np else tuple(as_laid_out(own) for own in values)


def added(model: Model, rule: Rule, fixed: Array, x: Array, b: Array) -> tuple[Array, Array]:
    """What quadrature adds at the modes b: value ``(L,)`` and gradient ``(p + s + k, L)`` by fixed and x."""
    layout, xp = model.layout, namespace(fixed, x, b)
    lambdas = cov.factors_of(x, layout.structures)
    lower, slopes = [], []
    for structure, Lambda, part in zip(layout.structures, lambdas, cov.cut(x, layout.structures), strict=True):
        own, own_slopes = Lambda, structure.slopes(part)
        if not structure.is_lower:
            own, own_slopes = lower_root_slopes(own, own_slopes)
        lower.append(own)
        slopes.append(own_slopes)
    by_moments = model.columns is not None and not model.family.n_psi
    of = moment_correction if by_moments else correction
    found = of(model, rule, lambdas, factor_of(lower, layout, 0), fixed, b)
    jacobian, _ = chain(x, xp.zeros_like(found.by_D), layout)
    by_scale = []
    for place, own in zip(layout.terms, slopes, strict=True):
        block = found.by_factor[place.start : place.start + place.q, place.start : place.start + place.q]
        by_scale.append((own * block[None]).sum((1, 2)))
    by_x = (jacobian * found.by_D[:, None]).sum(0) + xp.concatenate(by_scale)
    return found.value, xp.concatenate([found.by_fixed, by_x])
