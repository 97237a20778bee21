"""Value, gradient and Hessian of the Laplace approximation in closed form.

``F = min_b [2 sum_j c_j(eta_j) + b'D^{-1}b] + log det(I + A D)`` is -2 times the logarithm of the approximate
likelihood of fixed effects delta, parameters psi of the family and covariances D; ``c_j`` is minus the log density of a
row, ``A = Z' diag(c'') Z`` at the mode b. (Breslow & Clayton 1993, J. Am. Stat. Assoc. 88; Skaug & Fournier 2006,
Comput. Stat. Data Anal. 51, whose derivatives are by differentiation.) At the mode ``b = D g`` with ``g = -Z'c'``.

In a direction that changes ``x_j'delta`` by ``dx_j``, row functions by psi explicitly by ``d_``, and D by ``dD``:

    ``db = R'dD g - K Z'(c2 dx + d_c1)``, of the predictor ``t = dx + z'db``, of the score ``dg = -Z'(c2 t + d_c1)``,
    ``dA = Z' diag(c3 t + d_c2) Z``
    ``F_d = 2 sum(c1 dx + d_c) - g'dD g + tr(K dA) + tr(N dD)``
    ``F_de = 2 sum[dx (c2 t^e + e_c1) + d_c1 t^e + d_e_c] - 2 g'dD dg^e - tr(K dA K eA) + tr(R'eD R dA) + tr(R'dD R eA)
    - tr(N dD N eD) + sum k [c4 t t^e + d_c3 t^e + e_c3 t + d_e_c2] - sum kappa [c3 t t^e + d_c2 t^e + e_c2 t + d_e_c1]
    + (R e)'(dD dg^e + eD dg)``

with ``k_j = z_j'K z_j``, ``e = sum c3 k z``, ``kappa_j = z_j'K e``. They follow from differentiating F twice, the mode
by the implicit function theorem; the tests hold them against automatic differentiation of :mod:`mixjax.engine.laplace`.
With the expected curvature w in place of c2 in the determinant, K, R, N, c3, c4 and the like there are those of w, and
what moves the mode stays as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from mixjax.engine.effects import CurvedEffects, dots
from mixjax.families import Derivatives, Expected
from mixjax.machine import Array, broadcast_to, namespace, stack


class Data(NamedTuple):
    """What a row's density needs, in arrays over rows ``(*rows, L)`` or ``(*rows, 1)``; None where there is none.

    Attributes:
        y, size, weights, offset: as in :class:`~mixjax.products.family_rows.FamilyRows`. X: ``(p, *rows, 1)``.
        psi: per parameter of the family its columns ``(r, *rows, 1)``, or None where it is one number; ``()``: all are.
        psi_offset: beside columns, per parameter a known part ``(*rows, 1)``, or None; ``()``: none has.
    """

    y: Array
    size: Array | None
    weights: Array | None
    offset: Array | None
    X: Array
    psi: tuple[Array | None, ...] = ()
    psi_offset: tuple[Array | None, ...] = ()

    def predictor(self, delta: Array, of_effects: Array) -> Array:
        """``eta``, from ``delta (p, L)`` and the rows' ``z'b``."""
        found = of_effects if self.offset is None else of_effects + self.offset
        for column, own in zip(self.X, delta, strict=True):
            found = found + column * own
        return found

    def weighted(self, values: Any) -> Any:
        """Row functions, however nested, times case weights."""
        if self.weights is None:
            return values
        if isinstance(values, tuple):
            parts = [self.weighted(part) for part in values]
            return type(values)(*parts) if hasattr(values, "_fields") else tuple(parts)
        return values * self.weights


def moved(at: Derivatives, t: Array) -> Derivatives:
    """Row functions where the predictor has moved by a small ``t``, by their own derivatives: ``c`` to ``c3`` as far as
    the fourth derivative tells."""

    def series(parts: tuple[Array, ...]) -> tuple[Array, ...]:
        """Taylor's, of a function and each of its derivatives."""
        found = []
        for i in range(len(parts)):
            value = parts[-1]
            for j in range(len(parts) - 2, i - 1, -1):
                value = parts[j] + t / (j - i + 1) * value
            found.append(value)
        return tuple(found)

    by_psi: Any = tuple(series(part) for part in at.by_psi)
    by_eta: Any = series(at.by_eta)
    return Derivatives(by_eta, by_psi, at.by_psi_twice)


class ClosedForm(NamedTuple):
    """F at the modes, by T directions: delta (p), psi (s), free entries of D (J).

    Attributes:
        value: ``(L,)``. gradient: ``(T, L)``. Hessian: ``(T, T, L)``.
        fisher: ``(p + s, p + s, L)`` the Hessian of the penalised likelihood alone, of delta positive definite.
        scores: ``(T, *effects, L)`` how g moves.
    """

    value: Array
    gradient: Array
    Hessian: Array
    fisher: Array
    scores: Array


def closed_form(
    effects: CurvedEffects, lambdas: list[Array], data: Data, at: Derivatives, expected: Expected | None, penalty: Array
) -> ClosedForm:
    """Args:
    lambdas: per term ``(q, q, L)``, any factor of its covariance.
    at: row functions at the mode, times case weights. expected: the same of the expected curvature, or None for the
        observed one. penalty: ``(L,)`` ``b'D^{-1}b``.
    """
    xp = namespace(at.by_eta[0])
    rows, own = effects.row_axes, len(effects.effect_shape)
    c, c1, c2, c3, c4 = at.by_eta
    p, s = len(data.X), len(at.by_psi)
    gain = effects.gain(lambdas, effects.normal(c2))
    if expected is None:
        w1, w2, of_det = c3, c4, gain
        w_psi = [(c2_psi, c3_psi) for _, _, c2_psi, c3_psi in at.by_psi]
        w_psi_twice: Any = [[row[2] for row in rows_] for rows_ in at.by_psi_twice]
    else:
        (w1, w2), of_det = expected.by_eta, effects.gain(lambdas, effects.normal(expected.w))
        w_psi, w_psi_twice = list(expected.by_psi), expected.by_psi_twice
    shape = c1.shape

    def stacked(parts: list[Array]) -> Array:
        return stack([broadcast_to(part, shape) for part in parts])

    def total(values: Array) -> Array:
        return values.sum(tuple(range(-1 - rows, -1)))

    g = -effects.effects(c1)
    k = effects.leverages(of_det)
    e = effects.effects(w1 * k)
    kappa = effects.rows(gain.solve(e))
    f = effects.moved(e - gain.times_A(gain.solve(e)))  # E R e

    # How modes, predictors and scores move.
    pushes = [c2 * column for column in data.X] + [c1_psi for _, c1_psi, _, _ in at.by_psi]  # c2 dx + d_c1
    Eg = effects.moved(g)
    db_D = Eg - gain.solve(gain.times_A(Eg))
    dg_D = -gain.times_A(db_D)
    if pushes:
        push = stacked(pushes)
        h = effects.effects(push)
        db = -gain.solve(h)
        dg = -(h + gain.times_A(db))
        t_fixed = effects.rows(db)
        if p:
            t_fixed = xp.concatenate([t_fixed[:p] + data.X, t_fixed[p:]])
        t = xp.concatenate([t_fixed, effects.rows(db_D)])
        scores = xp.concatenate([dg, dg_D])
    else:
        t, scores = effects.rows(db_D), dg_D

    dW = w1 * t
    if s:
        moved_w = stacked([w for w, _ in w_psi])
        dW = xp.concatenate([dW[:p], dW[p : p + s] + moved_w, dW[p + s :]])
    by_weights = total(k * dW)
    explicit = [2.0 * total(c1 * column) for column in data.X] + [2.0 * total(part[0]) for part in at.by_psi]
    of_D = effects.traces_of_N(of_det) - _inner(Eg, g, own)
    gradient = by_weights + xp.concatenate([stack(explicit), of_D] if explicit else [of_D])

    # Second derivatives: of the penalised likelihood, ...
    top = 2.0 * dots(push, t, rows) if pushes else None
    low = -2.0 * dots(Eg, scores, own)
    if top is not None:
        n = p + s
        top = xp.concatenate([top[:, :n] + _explicit(xp, data, at, total, p, s), top[:, n:]], 1) if s else top
        Hessian = xp.concatenate([top, xp.concatenate([xp.swapaxes(top[:, n:], 0, 1), low[:, n:]], 1)])
        fisher = top[:, :n]
    else:
        Hessian, fisher = low, low[:0, :0]
    # ... of the determinant, ...
    traces = effects.traces(of_det, dW)
    J = len(Eg)
    Hessian = Hessian - traces.KK
    RR = xp.concatenate([xp.zeros((len(t), p + s, *traces.RR.shape[2:])), traces.RR], 1)
    corner = _in_corner(xp, traces.NN, p + s)
    Hessian = Hessian + RR + xp.swapaxes(RR, 0, 1) - corner
    # ... and of the weights and modes within it.
    omega = w2 * k - c3 * kappa
    Hessian = Hessian + dots(omega * t, t, rows)
    if s:
        omega_psi = stacked([k * w_p[1] - kappa * part[2] for w_p, part in zip(w_psi, at.by_psi, strict=True)])
        mixed = dots(omega_psi, t, rows)  # (s, T, L)
        pad = xp.zeros((p, *mixed.shape[1:]), mixed.dtype)
        after = xp.zeros((J, *mixed.shape[1:]), mixed.dtype)
        mixed = xp.concatenate([pad, mixed, after])
        Hessian = Hessian + mixed + xp.swapaxes(mixed, 0, 1)

        def second(i: int, j: int) -> Array:
            return total(k * w_psi_twice[i][j] - kappa * at.by_psi_twice[i][j][1])

        twice = xp.stack([xp.stack([second(i, j) for j in range(s)]) for i in range(s)])
        Hessian = Hessian + _in_middle(xp, twice, p, J)
    fg = dots(f, scores, own)  # (J, T, L)
    if p + s:
        fg = xp.concatenate([xp.zeros((p + s, *fg.shape[1:]), fg.dtype), fg])
    Hessian = Hessian + fg + xp.swapaxes(fg, 0, 1)
    value = 2.0 * total(c) + penalty + of_det.logdet
    return ClosedForm(value, gradient, Hessian, fisher, scores)


class Slope(NamedTuple):
    """F at the modes without its Hessian, by T directions as in :class:`ClosedForm`.

    Attributes:
        value: ``(L,)``. gradient: ``(T, L)``. scores: ``(directions (T, L)) -> (*effects, L)``, how g moves along a sum
            of directions.
    """

    value: Array
    gradient: Array
    scores: Callable[[Array], Array]


def slope_at(
    effects: CurvedEffects, lambdas: list[Array], data: Data, at: Derivatives, expected: Expected | None, penalty: Array
) -> Slope:
    """:func:`closed_form` as far as the gradient, in a small part of the time: the mode's move is met once, in its
    adjoint, and not in every direction. Arguments as there."""
    xp, rows, own = namespace(at.by_eta[0]), effects.row_axes, len(effects.effect_shape)
    c, c1, c2, c3, _ = at.by_eta
    gain = effects.gain(lambdas, effects.normal(c2))
    w1, of_det = (
        (c3, gain) if expected is None else (expected.by_eta[0], effects.gain(lambdas, effects.normal(expected.w)))
    )

    def total(values: Array) -> Array:
        return values.sum(tuple(range(-1 - rows, -1)))

    g = -effects.effects(c1)
    k = effects.leverages(of_det)
    e = effects.effects(w1 * k)
    Ke = gain.solve(e)
    kappa = effects.rows(Ke)
    by_eta = 2.0 * c1 + k * w1 - kappa * c2
    gradient = [total(by_eta * column) for column in data.X]
    for i, part in enumerate(at.by_psi):
        of_weight = part[2] if expected is None else expected.by_psi[i][0]
        gradient.append(total(2.0 * part[0] + k * of_weight - kappa * part[1]))
    Eg = effects.moved(g)
    of_D = effects.traces_of_N(of_det) - _inner(Eg, g, own) + _inner(Eg, e - gain.times_A(Ke), own)
    pushes = [c2 * column for column in data.X] + [part[1] for part in at.by_psi]
    n = len(pushes)

    def scores(change: Array) -> Array:
        push = sum((own * step for own, step in zip(pushes, change[:n], strict=True)), xp.zeros_like(c1))
        h = effects.effects(push)
        shape = (len(Eg), *(1,) * own, change.shape[-1])
        moved = (Eg * change[n:].reshape(shape)).sum(0)
        db = moved - gain.solve(h + gain.times_A(moved))
        return -(h + gain.times_A(db))

    value = 2.0 * total(c) + penalty + of_det.logdet
    return Slope(value, xp.concatenate([xp.stack(gradient), of_D]) if gradient else of_D, scores)


def _inner(a: Array, b: Array, axes: int) -> Array:
    return (a * b).sum(tuple(range(1, 1 + axes)))


def _explicit(xp: Any, data: Data, at: Derivatives, total: Any, p: int, s: int) -> Array:
    """``2 sum[dx e_c1 + d_e_c]`` among delta and psi: ``(p + s, p + s, L)``."""
    zero = xp.zeros_like(total(at.by_eta[0]))
    entries = [[zero] * (p + s) for _ in range(p + s)]
    for i in range(s):
        for j in range(p):
            entries[j][p + i] = 2.0 * total(data.X[j] * at.by_psi[i][1])
        for j in range(s):
            entries[p + i][p + j] = 2.0 * total(at.by_psi_twice[i][j][0])
    return stack([stack(row) for row in entries])


def _in_corner(xp: Any, M: Array, before: int) -> Array:
    """``M (J, J, L)`` behind so many rows and columns of zeros."""
    return _in_middle(xp, M, before, 0)


def _in_middle(xp: Any, M: Array, before: int, after: int) -> Array:
    if xp is not np:
        return xp.pad(M, ((before, after), (before, after), (0, 0)))
    inside = slice(before, before + len(M))
    found = np.zeros((before + len(M) + after,) * 2 + M.shape[2:], M.dtype)
    found[inside, inside] = M
    return found
