"""Adaptive Gauss-Hermite quadrature of the random effects of one grouping factor, as a correction of Laplace's
approximation.

The effects of a level are integrated by a product rule of nodes ``zeta_k`` and weights ``w_k`` for ``N(0, I)``, moved
to the mode b and scaled by ``C = Lambda L^{-T}``, where ``L L' = I + Lambda'A Lambda`` and so ``C C' = K`` (Liu &
Pierce 1994, Biometrika 81; Pinheiro & Bates 1995, J. Comput. Graph. Stat. 4). With ``t_jk = z_j'C zeta_k`` and ``b = D
g`` at the mode, the prior's density at a node against that at the mode and the node's own normal density leave
``sum_j (c1_j t_jk + c2_j t_jk^2 / 2)``, so that

    ``F = F_Laplace - 2 sum_i log sum_k w_k exp(-r_ik)``,
    ``r_ik = sum_j [c_j(eta_j + t_jk) - c_j - c1_j t_jk - c2_j t_jk^2 / 2]``:

what Taylor's formula leaves. One node is Laplace's approximation, and no inverse of D is met.

With p_ik, a level's nodes as parts of its sum, ``P_j = sum_k p_ik (c1(eta_j + t_jk) - c1 - c2 t_jk - c3 t_jk^2 / 2)``,
``M_i = sum_jk p_ik (c1(eta_j + t_jk) - c1 - c2 t_jk) z_j zeta_k'``, and V the symmetric matrix with the lower triangle
of ``M'C``, the correction moves by

    ``sum_j (2 P_j - kappa_j c3_j) t_j + sum_i 2 tr[S (M' - V S'Lambda'A) dLambda]`` and what psi changes explicitly,

``S = L^{-T}``, ``kappa_j = z_j'C V C'z_j``, and t_j the predictor's change with its mode, as in
:mod:`mixjax.engine.laplace_curvature`: nodes move with the modes and with their scale. It follows from ``dS = -S U``, U
the upper triangle of ``S'dH S`` with half its diagonal.

Of several effects the value depends on the square root C, by the error of the quadrature. Lambda is the lower
triangular factor in the basis of Z, effects in the order of the terms: so the value depends on covariances alone, and
of an unstructured one neither on the scale of a slope nor on where it has its zero.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any, NamedTuple

import jax
import numpy as np

from mixjax import decompositions, linalg
from mixjax.covariance import rank_tolerance, stack_of
from mixjax.engine.laplace_model import Model
from mixjax.families import Derivatives
from mixjax.machine import Array, as_laid_out, fori_loop, namespace
from mixjax.products.family_rows import FamilyRows

MOST_NODES, MOST_EFFECTS, MOST_PRODUCTS = 100, 3, 15625
# Nodes of product rules with less than this part of the largest weight are left out. Posteriors have longer tails than
# the normal density by which the weights fall: with 1e-12 eight levels of 0/1 outcomes lose 3e-6, with 1e-20 2e-9.
PRUNED = 1e-20


class Rule(NamedTuple):
    """Nodes ``(K, q)`` and logarithms of weights ``(K,)`` for the density of ``N(0, I)``."""

    nodes: np.ndarray
    log_weights: np.ndarray


@cache
def product_rule(nagq: int, q: int) -> Rule:
    """The product of q Gauss-Hermite rules of nagq nodes."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(nagq)
    logs = np.log(weights / np.sqrt(2.0 * np.pi))
    points = np.array(list(product(nodes, repeat=q)))
    sums = np.array([sum(own) for own in product(logs, repeat=q)])
    kept = sums >= (sums.max() + np.log(PRUNED) if q > 1 else -np.inf)
    return Rule(points[kept], sums[kept])


def check_nodes(nagq: int, rows: FamilyRows) -> None:
    """Raise ValueError where there is no quadrature of so many nodes for the model."""
    if isinstance(nagq, bool) or not isinstance(nagq, int | np.integer) or not 1 <= nagq <= MOST_NODES:
        raise ValueError(f"nagq must be a whole number from 1 (Laplace) to {MOST_NODES}, got {nagq!r}")
    if nagq == 1:
        return
    if len(rows.levels) > 1:
        raise ValueError(
            f"quadrature (nagq = {nagq}) is for one grouping factor; this model has {len(rows.levels)}: use nagq = 1"
        )
    q = rows.Z[0].shape[1]
    if q > MOST_EFFECTS:
        raise ValueError(f"quadrature is for up to {MOST_EFFECTS} effects a level; this model has {q}: use nagq = 1")
    if nagq**q > MOST_PRODUCTS:
        raise ValueError(
            f"nagq = {nagq} with {q} effects a level needs {nagq}^{q} = {nagq**q} nodes, more than {MOST_PRODUCTS}: "
            f"use nagq = {int(MOST_PRODUCTS ** (1 / q) + 1e-9)} or fewer"
        )


def lower_root(Lambda: Array) -> Array:
    """The lower triangular factor ``(q, q, ...)`` of the same covariance; of one effect Lambda itself."""
    return Lambda if len(Lambda) == 1 else decompositions.lower_factor(Lambda, rank_tolerance(Lambda.dtype))


def lower_root_slopes(F: Array, dF: Array) -> tuple[Array, Array]:
    """:func:`lower_root` of ``F (q, q, ...)``, and its derivatives where F moves by ``dF (T, q, q, ...)``.

    A zero column has none; what is even in it needs none.
    """
    xp, q, rtol = namespace(F, dF), len(F), rank_tolerance(F.dtype)
    rest, moved, columns, slopes = F, dF, [], []
    for j in range(q):
        row, d_row = rest[j], moved[:, j]
        square = (row * row).sum(0)
        independent = square > rtol**2 * (F[j] * F[j]).sum(0)
        length = xp.sqrt(xp.where(independent, square, 1.0))
        unit = xp.where(independent, row / length, 0.0)
        d_unit = xp.where(independent, (d_row - unit * (unit * d_row).sum(1)[:, None]) / length, 0.0)
        below = (np.arange(q) >= j).reshape(q, *(1,) * (F.ndim - 2))
        column = xp.where(below, (rest * unit).sum(1), 0.0)
        d_column = xp.where(below, (moved * unit).sum(2) + (rest * d_unit[:, None]).sum(2), 0.0)
        columns.append(column)
        slopes.append(d_column)
        rest = rest - column[:, None] * unit
        moved = moved - d_column[:, :, None] * unit - column[:, None] * d_unit[:, None]
    return xp.stack(columns, 1), xp.stack(slopes, 2)


def inverse_root(H: Array) -> Array:
    """``L^{-T}``, upper triangular, of ``H = L L' (q, q, ...)``, entry by entry."""
    q, xp = len(H), namespace(H)
    L: dict[tuple[int, int], Array] = {}
    inverse: dict[tuple[int, int], Array] = {}
    for j in range(q):
        L[j, j] = xp.sqrt(H[j, j] - sum(L[j, k] ** 2 for k in range(j)))
        for i in range(j + 1, q):
            L[i, j] = (H[i, j] - sum(L[i, k] * L[j, k] for k in range(j))) / L[j, j]
    for j in range(q):
        inverse[j, j] = 1.0 / L[j, j]
        for i in range(j + 1, q):
            inverse[i, j] = -sum(L[i, k] * inverse[k, j] for k in range(j, i)) / L[i, i]
    zero = xp.zeros_like(H[0, 0])
    return stack_of([[inverse.get((j, i), zero) for j in range(q)] for i in range(q)])


class Scales(NamedTuple):
    """``S`` and ``C``: ``(q, q, m, L)``."""

    S: Array
    C: Array


def scales(Lambda: Array, A: Array) -> Scales:
    """Args: Lambda: ``(q, q, L)`` lower triangular factor of all effects of a level. A: ``(q, q, m, L)``."""
    L = Lambda[:, :, None]
    H = linalg.eye(len(L), A) + linalg.matmul(linalg.matmul(linalg.transpose(L), A), L)
    S = inverse_root(H)
    return Scales(S, linalg.matmul(L, S))


def _row_columns(model: Model, C: Array) -> list[Array]:
    """``z_j'C`` by columns, each ``(*rows, L)``."""
    shape = (*model.effects.effect_shape, C.shape[-1])
    return [model.effects.rows(C[:, b].reshape(shape)) for b in range(C.shape[1])]


def log_sums(model: Model, rule: Rule, C: Array, eta: Array, at: Derivatives, psi: Array) -> Array:
    """``log sum_k w_k exp(-r_ik)`` of every level, ``(m, L)``, as JAX differentiates it.

    A node so far away that it counts for nothing is evaluated at the mode instead, for densities are infinite there and
    zero times infinity is no derivative.
    """
    xp = namespace(C, eta)
    nodes, logs = xp.asarray(rule.nodes, C.dtype), xp.asarray(rule.log_weights, C.dtype)
    columns = _row_columns(model, C)
    c, c1, c2 = at.by_eta[:3]
    at_rows = _at_rows(model)

    def exponent(t: Array, log: Array) -> Array:
        return log - model.effects.units(model.density(eta + t, psi) - c - t * (c1 + 0.5 * t * c2))

    def add(k: Any, total: Array) -> Array:
        t = sum(column * nodes[k, b] for b, column in enumerate(columns))
        seen = jax.lax.stop_gradient(exponent(t, logs[k])) if xp is not np else exponent(t, logs[k])
        counts = seen > -700.0
        near = xp.where(at_rows(counts), t, 0.0)
        return total + xp.where(counts, xp.exp(exponent(near, logs[k])), 0.0)

    return xp.log(fori_loop(len(rule.nodes), add, xp.zeros(C.shape[2:], C.dtype), xp))


def _at_rows(model: Model) -> Any:
    """``(m, L)`` -> rows: of levels by level, whatever the kind of effects."""
    effects: Any = model.effects
    if hasattr(effects, "at_rows"):
        return effects.at_rows
    return lambda values: values[effects.groups[0]]


class Correction(NamedTuple):
    """What quadrature adds to Laplace's approximation, and its derivatives.

    Attributes:
        value: ``(L,)``. by_fixed: ``(p + s, L)``. by_D: ``(J, L)`` by the free entries of the covariances, the scale
            held; by_factor: ``(q, q, L)`` by Lambda, as far as it scales the nodes.
    """

    value: Array
    by_fixed: Array
    by_D: Array
    by_factor: Array


def of_covariances(
    effects: Any, Lambda: Array, scaled: Scales, A: Array, g: Array, f: Array, M: Array, V: Array
) -> tuple[Array, Array]:
    """``by_D`` and ``by_factor`` of :class:`Correction`; letters as above, f as in the closed form."""
    SV = linalg.matmul(scaled.S, V)
    Y = linalg.matmul(SV, linalg.transpose(scaled.S))
    AL = linalg.matmul(A, Lambda[:, :, None])
    by_factor = 2.0 * (linalg.matmul(M, linalg.transpose(scaled.S)) - linalg.matmul(AL, Y)).sum(2)
    return (effects.moved(g) * f[None]).sum((1, 2)), by_factor


def without_middle(rule: Rule) -> tuple[float, np.ndarray, np.ndarray]:
    """Weight of the mode itself, where nothing is left; nodes and logarithms of weights of the others."""
    middle = ~rule.nodes.any(1)
    return float(np.exp(rule.log_weights[middle]).sum()), rule.nodes[~middle], rule.log_weights[~middle]


def correction(model: Model, rule: Rule, lambdas: list[Array], Lambda: Array, fixed: Array, b: Array) -> Correction:
    """The correction at the modes ``b (q, m, L)``, for effects level by level.

    A node costs a density with its slope and three sums over rows; what Taylor's formula takes away is known by level,
    and is taken away at the end.

    Args:
        lambdas: per term a factor of its covariance. Lambda: ``(q, q, L)`` the lower triangular factor of all.
    """
    effects: Any = model.effects
    xp, p, q = namespace(fixed, b), model.p, len(Lambda)
    eta, psi = model.predictor(fixed, b), fixed[p:]
    at = model.derivatives(eta, psi)
    _, c1, c2, c3, _ = at.by_eta
    A, g = effects.normal(c2), -effects.effects(c1)
    S, C = scales(Lambda, A)
    columns = _row_columns(model, C)
    begin = effects.units(model.kernel(eta, psi)[0])
    gC = linalg.matmul(g[None], C)[0]  # (q, m, L)
    CAC = linalg.matmul(linalg.transpose(C), linalg.matmul(A, C))
    weight, *others = without_middle(rule)
    nodes, logs = map(xp.asarray, others)

    def add(k: Any, sums: tuple[Any, ...]) -> tuple[Any, ...]:
        total, P, Q, first, second, by_psi = sums
        zeta = [nodes[k, a] for a in range(q)]
        t = sum(column * own for own, column in zip(zeta, columns, strict=True))
        new = model.derivatives(eta + t, psi) if at.by_psi else None
        c, slope = _in_memory(new.by_eta[:2] if new is not None else model.kernel(eta + t, psi))
        taken = sum(own * gC[a] for a, own in enumerate(zeta))
        taken = taken - 0.5 * sum(u * v * CAC[a, e] for a, u in enumerate(zeta) for e, v in enumerate(zeta))
        part = xp.exp(logs[k] + begin - taken - effects.units(c))
        counts = part > 0.0
        if not (xp is np and counts.all()):  # densities of nodes that count for nothing need not be finite
            slope = xp.where(effects.at_rows(counts), slope, 0.0)
        share = effects.at_rows(part)
        P = P + share * slope
        pulled = effects.effects(slope)
        Q = [own + zeta[a] * part * pulled for a, own in enumerate(Q)]
        first = [own + zeta[a] * part for a, own in enumerate(first)]
        second = {(a, e): own + zeta[a] * zeta[e] * part for (a, e), own in second.items()}
        if new is not None:
            seen = share > 0.0
            by_psi = [
                own + share * xp.where(seen, there[0] - old[0] - t * (old[1] + 0.5 * t * old[2]), 0.0)
                for own, there, old in zip(by_psi, new.by_psi, at.by_psi, strict=True)
            ]
        return total + part, P, Q, first, second, by_psi

    zero, none = xp.zeros_like(c1), xp.zeros(C.shape[2:], c1.dtype)
    some = {(a, e): none for a in range(q) for e in range(a, q)}
    start = (none + weight, weight * c1, [xp.zeros_like(g)] * q, [none] * q, some, [zero] * len(at.by_psi))
    total, P, Q, first, second, by_psi = fori_loop(len(nodes), add, start, xp)
    inverse = 1.0 / total
    first = xp.stack([own * inverse for own in first])
    moments = stack_of([[second[min(a, e), max(a, e)] * inverse for e in range(q)] for a in range(q)])
    # What is left of the slopes: c1 + c2 t + c3 t^2 / 2 taken away.
    squares = sum(
        columns[a] * columns[e] * effects.at_rows(moments[a, e] if a == e else 2.0 * moments[a, e]) for a, e in some
    )
    along_first = sum(column * effects.at_rows(own) for column, own in zip(columns, first, strict=True))
    P = P * effects.at_rows(inverse) - c1 - c2 * along_first - 0.5 * c3 * squares
    taken = g[:, None] * first[None] - linalg.matmul(linalg.matmul(A, C), moments)
    M = xp.stack([own * inverse for own in Q], 1) + taken
    MC = linalg.matmul(linalg.transpose(M), C)
    V = stack_of([[MC[max(a, b), min(a, b)] for b in range(q)] for a in range(q)])
    CV = linalg.matmul(C, V)
    kappa = sum(u * v for u, v in zip(_row_columns(model, CV), columns, strict=True))
    omega = 2.0 * P - kappa * c3

    gain = effects.gain(lambdas, A)
    h = effects.effects(omega)
    moved = gain.solve(h)
    f = h - gain.times_A(moved)
    along = effects.rows(moved)

    def over_rows(values: Array) -> Array:
        return values.sum(tuple(range(-1 - effects.row_axes, -1)))

    left = omega - c2 * along
    by_fixed = [over_rows(left * column) for column in model.data.X]
    for own, old in zip(by_psi, at.by_psi, strict=True):
        by_fixed.append(over_rows(2.0 * own * effects.at_rows(inverse) - kappa * old[2] - along * old[1]))
    by_D, by_factor = of_covariances(effects, Lambda, Scales(S, C), A, g, f, M, V)
    nothing = xp.zeros((0, c1.shape[-1]), c1.dtype)
    by_fixed_ = xp.stack(by_fixed) if by_fixed else nothing
    return Correction(-2.0 * xp.log(total).sum(0), by_fixed_, by_D, by_factor)


def _in_memory(values: tuple[Array, ...]) -> tuple[Array, ...]:
    """Row functions, each once: XLA would compute them anew for every sum."""
    return values if namespace(values[0]) is np else tuple(as_laid_out(own) for own in values)
