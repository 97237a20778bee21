"""The Laplace approximation as a function of covariances alone: modes found, fixed effects and the family's parameters
profiled out, in lanes.

Three searches stand in each other. Inside, Newton's steps for the modes of the random effects, level by level. In the
middle, Newton's steps for ``fixed = (delta, psi)`` with the exact Hessian of :mod:`mixjax.engine.laplace_curvature`.
Outside, the optimiser over the coordinates of the covariances sees only :func:`evaluate`. Each is begun where the
derivatives of the point before say that it will end, so that one step is mostly enough.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mixjax import covariance as cov
from mixjax import decompositions, linalg
from mixjax.covariance import pairs_of
from mixjax.engine.effects import directions_of, free_entries
from mixjax.engine.laplace_curvature import ClosedForm, closed_form
from mixjax.engine.laplace_model import Model
from mixjax.engine.level_moments import moment_form
from mixjax.machine import Array, namespace, while_loop
from mixjax.optimise.newton import where
from mixjax.products.sums import Layout

# Twice the decrease that a Newton step promises, in units of the deviance: of the inner step after which modes are
# found (errors square), and of the middle one after which no other follows.
INNER, MIDDLE = 1e-9, 1e-8
# The same of the last evaluation of a fit.
INNER_LAST, MIDDLE_LAST = 1e-13, 1e-18
MOST_INNER, MOST_MIDDLE, MOST_HALVINGS = 60, 40, 20
# Steps of the modes without looking at densities, where they promise less than this.
QUICK, NEAR = 6, 1e-2
# Increase of a level's penalised deviance that a step of its modes promises by rounding alone.
UPHILL = 1e-12
# Longest step of the fixed effects, in root mean squares of the predictor, and of psi.
LONGEST, LONGEST_PSI = 3.0, 2.0
# The least curvature by psi of which a step is made.
LEAST_PSI = 1e-10
# The logarithm of a family's parameter at most, in absolute value.
MOST_PSI = 20.0


class Modes(NamedTuple):
    """Modes of the random effects: ``b = D v``, ``(*effects, L)``, their ``penalty (L,)`` ``v'D v``, and twice the
    decrease that the last step promised, ``(L,)``."""

    v: Array
    b: Array
    penalty: Array
    decrement: Array


class Memory(NamedTuple):
    """The last point evaluated, from which the next one is foretold.

    Attributes:
        D: ``(J, L)`` free entries of the covariances. fixed: ``(p + s, L)``. v: ``(*effects, L)``.
        step: ``(p + s, L)`` Newton's step of ``fixed`` there, to be taken with the next one.
        slopes: ``(p + s, J, L)`` of ``fixed`` by D. scores: ``(T, *effects, L)`` of v by fixed and D.
    """

    D: Array
    fixed: Array
    v: Array
    step: Array
    slopes: Array
    scores: Array


class Evaluated(NamedTuple):
    """The profiled objective at one x.

    Attributes:
        value, gradient, Hessian: by x: ``(L,), (k, L), (k, k, L)``.
        form: all derivatives, by fixed and D. fixed: ``(p + s, L)``. modes: of the random effects.
        step: Newton's, of fixed, and decrement: twice what it promises.
    """

    value: Array
    gradient: Array
    Hessian: Array
    form: ClosedForm
    fixed: Array
    modes: Modes
    step: Array
    decrement: Array
    memory: Memory


# --- the modes -------------------------------------------------------------------------------------------------------


def find_modes(model: Model, lambdas: list[Array], fixed: Array, v: Array, tolerance: Any) -> Modes:
    """Modes of the random effects by Newton's method from ``b = D v``, with steps halved where a level's penalised
    deviance would rise."""
    effects, psi = model.effects, fixed[model.p :]
    xp = namespace(v, fixed)

    def deviance(b: Array, v: Array) -> Array:
        return 2.0 * effects.units(model.density(model.predictor(fixed, b), psi)) + effects.unit_dots(v, b)

    def newton(b: Array, v: Array) -> tuple[Array, Array, Array]:
        """The full step of b and v, and by unit twice what it promises."""
        at = model.derivatives(model.predictor(fixed, b), psi)
        g = -effects.effects(at.by_eta[1])

        def by(curvature: Array) -> tuple[Array, tuple[Array, Array, Array]]:
            gain = effects.gain(lambdas, effects.normal(curvature))
            r = gain.times_A(b) + g
            new_b = gain.solve(r)
            db = new_b - b
            return gain.logdet, (db, r - gain.times_A(new_b) - v, effects.unit_dots(g - v, db))

        logdet, step = by(at.by_eta[2])
        if not model.family.log_concave:  # a step that leads upwards, away from a saddle or a maximum, is none
            bent = ~xp.isfinite(logdet) | ~(step[2] >= -UPHILL).all(0)
            if xp is not np or bent.any():
                step = by(xp.where(bent, xp.maximum(at.by_eta[2], 0.0), at.by_eta[2]))[1]
        return step

    b = effects.times_D(lambdas, v)
    if xp is np:  # a start that is foretold well needs no care
        for _ in range(QUICK):
            db, dv, by_unit = newton(b, v)
            decrement = by_unit.sum(0)
            if not (decrement < NEAR).all():
                break
            b, v = b + db, v + dv
            if (decrement <= tolerance).all():
                return Modes(v, b, effects.unit_dots(v, b).sum(0), decrement)
    P, nothing = deviance(b, v), xp.zeros_like(v)
    at_zero = deviance(nothing, nothing)
    worse = ~(at_zero >= P)  # also where it is not finite
    keep = effects.of_units(worse)
    b, v, P = xp.where(keep, 0.0, b), xp.where(keep, 0.0, v), xp.where(worse, at_zero, P)

    def step(state: tuple[Array, ...]) -> tuple[Array, ...]:
        b, v, P, _, i = state
        db, dv, by_unit = newton(b, v)
        noise = 1e-12 * (1.0 + xp.abs(P))
        # A step that promises nothing is taken: all that can rise is rounding.
        matters = ~(by_unit <= tolerance)

        def rises(part: Array) -> Array:
            scaled = effects.of_units(part)
            return ~(deviance(b + scaled * db, v + scaled * dv) <= P + noise) & matters

        part = xp.ones_like(P)
        bad = rises(part)

        def halve(state: tuple[Array, ...]) -> tuple[Array, ...]:
            part, bad, i = state
            part = xp.where(bad, 0.5 * part, part)
            return part, rises(part), i + 1

        if xp is not np or bad.any():
            part, bad, _ = while_loop(lambda s: s[1].any() & (s[2] < MOST_HALVINGS), halve, (part, bad, 0), xp)
            part = xp.where(bad, 0.0, part)
        scaled = effects.of_units(part)
        b, v = b + scaled * db, v + scaled * dv
        # No step at all: rounding, or densities that are not finite, are in the way.
        left = xp.where(part > 0.0, xp.where(part < 1.0, xp.inf, by_unit), 0.0).sum(0)
        return b, v, deviance(b, v), left, i + 1

    def goes_on(state: tuple[Array, ...]) -> Array:
        return (~(state[3] <= tolerance)).any() & (state[4] < MOST_INNER)

    start = (b, v, P, xp.full(fixed.shape[1:], xp.inf, fixed.dtype), 0)
    b, v, P, decrement, _ = while_loop(goes_on, step, start, xp)
    return Modes(v, b, effects.unit_dots(v, b).sum(0), decrement)


def form_at(model: Model, lambdas: list[Array], fixed: Array, modes: Modes) -> ClosedForm:
    """The closed form at modes."""
    eta, psi = model.predictor(fixed, modes.b), fixed[model.p :]
    expected = model.expected_curvature(eta, psi) if model.expected else None
    return closed_form(model.effects, lambdas, model.data, model.derivatives(eta, psi), expected, modes.penalty)


def by_moments(model: Model, lambdas: list[Array], fixed: Array, v: Array) -> tuple[Modes, ClosedForm]:
    """One Newton step of the modes and the closed form, by moments."""
    v, b, decrement, form = moment_form(model, lambdas, fixed, v)
    return Modes(v, b, model.effects.unit_dots(v, b).sum(0), decrement), form


# --- fixed effects and psi -------------------------------------------------------------------------------------------


class _Middle(NamedTuple):
    """State of the middle search. ``fixed``, ``modes``, ``form``: the best point so far; ``step`` from it, of which
    ``part`` is tried next."""

    fixed: Array
    modes: Modes
    form: ClosedForm
    step: Array
    decrement: Array
    part: Array
    done: Array
    count: Any


def inverse_among_fixed(model: Model, form: ClosedForm) -> Array:
    """``(p + s, p + s, L)``: of the Hessian by ``fixed``, or of what stands for it where it is not positive."""
    xp, n, p = namespace(form.value), model.n_fixed, model.p
    H, fisher = form.Hessian[:n, :n], form.fisher
    if n > p:  # of psi it need not be positive: its own curvature then, in absolute value
        own = curvature_of_psi(model, H[p:, p:])
        fisher = xp.concatenate([
            xp.concatenate([fisher[:p, :p], xp.zeros((p, n - p, *own.shape[2:]))], 1),
            xp.concatenate([xp.zeros((n - p, p, *own.shape[2:])), own], 1),
        ])  # fmt: skip
    diagonal = xp.sqrt(xp.abs(H[np.arange(n), np.arange(n)]))
    definite = decompositions.is_positive(H - 1e-12 * diagonal[:, None] * diagonal[None] * linalg.eye(n, H))
    inverse: Array = linalg.inverse_logdet(xp.where(definite, H, fisher))[0]
    return inverse


def curvature_of_psi(model: Model, H: Array) -> Array:
    """``(s, s, L)`` positive definite, from a Hessian by psi that need not be: of parameters that are one number by
    their own curvatures, at least 1. A logit of extra zeros, and levels of a factor, have flat tails one at a time,
    where the gradient falls with the curvature: eigenvalues in absolute value."""
    s, xp = len(H), namespace(H)
    if model.family.plain is model.family and not model.data.psi:
        return xp.abs(H) * linalg.eye(s, H) + linalg.eye(s, H)
    known = xp.isfinite(H).all((0, 1))
    values, vectors = decompositions.eigh(xp.where(known, H, linalg.eye(s, H)))
    return linalg.matmul(vectors * xp.maximum(xp.abs(values), LEAST_PSI)[None], linalg.transpose(vectors))


def newton_step(model: Model, form: ClosedForm) -> tuple[Array, Array]:
    """Newton's step of ``fixed``, and twice what it promises."""
    g = form.gradient[: model.n_fixed]
    step = -linalg.matmul(inverse_among_fixed(model, form), g[:, None])[:, 0]
    return step, -(g * step).sum(0)


def cut(model: Model, step: Array) -> Array:
    """The part ``(L,)`` of a step that is not too long."""
    xp, p = namespace(step), model.p
    part = xp.ones(step.shape[1:], step.dtype)
    if p:
        length = xp.sqrt((step[:p] ** 2).sum(0))
        most = LONGEST * model.unit
        part = xp.minimum(part, most / xp.maximum(length, most))
    if len(step) > p:
        length = xp.abs(step[p:]).max(0)
        part = xp.minimum(part, LONGEST_PSI / xp.maximum(length, LONGEST_PSI))
    return part


def profile(
    model: Model, lambdas: list[Array], fixed: Array, v: Array, inner: Any = INNER, middle: Any = MIDDLE
) -> _Middle:
    """The objective's minimum over ``fixed (p + s, L)``, up to a last Newton step."""
    xp = namespace(fixed, v)
    n = model.n_fixed

    def at(fixed: Array, v: Array) -> tuple[Modes, ClosedForm]:
        if model.columns is None or model.expected:
            modes = find_modes(model, lambdas, fixed, v, inner)
            return modes, form_at(model, lambdas, fixed, modes)
        if xp is np:  # mostly one step is enough; a program would have the closed form twice
            found = by_moments(model, lambdas, fixed, v)
            far = ~(xp.abs(found[0].decrement) <= inner)
            if not far.any():
                return found
            modes = find_modes(model, lambdas, fixed, v, inner)
            return where(far, by_moments(model, lambdas, fixed, modes.v), found)
        return by_moments(model, lambdas, fixed, find_modes(model, lambdas, fixed, v, inner).v)

    def middle_step(form: ClosedForm) -> tuple[Array, Array]:
        return newton_step(model, form) if n else (fixed, xp.zeros_like(form.value))

    def advance(state: _Middle) -> _Middle:
        move = state.part * state.step
        fixed, v = state.fixed + move, state.modes.v
        if n > model.p:  # a parameter that runs to infinity ends here, before its numbers are rounding
            fixed = xp.concatenate([fixed[: model.p], xp.clip(fixed[model.p :], -MOST_PSI, MOST_PSI)])
        if n:
            v = v + linalg_sum(move, state.form.scores[:n])
        modes, form = at(fixed, v)
        noise = 1e-11 * (1.0 + xp.abs(state.form.value))
        fell = form.value <= state.form.value - 1e-4 * state.part * state.decrement + noise
        fell = fell | (state.count == 0)
        step, decrement = middle_step(form)
        better = _Middle(fixed, modes, form, step, decrement, cut(model, step), decrement <= middle, state.count)
        # Along a direction in which the likelihood grows for ever the Hessian becomes singular: the point before is the
        # last that has a step, by which the end is recognised.
        stuck = fell & ~xp.isfinite(decrement) & (state.count > 0)
        worse = state._replace(part=state.part / 3.0, done=(state.part < 1e-4) | stuck)
        new = where(state.done, state, where(fell & ~stuck, better, worse))
        return new._replace(count=state.count + 1)

    def goes_on(state: _Middle) -> Array:
        return (~state.done).any() & (state.count < MOST_MIDDLE)

    found: _Middle = while_loop(goes_on, advance, _nowhere(model, fixed, v), xp)
    return found


def _nowhere(model: Model, fixed: Array, v: Array) -> _Middle:
    """The middle search before its first evaluation."""
    xp, n, L = namespace(fixed, v), model.n_fixed, fixed.shape[-1]
    T = n + len(directions_of(model.layout))
    zero = xp.zeros(L, fixed.dtype)
    form = ClosedForm(
        zero, xp.zeros((T, L), fixed.dtype), xp.zeros((T, T, L), fixed.dtype), xp.zeros((n, n, L), fixed.dtype),
        xp.zeros((T, *v.shape), fixed.dtype),
    )  # fmt: skip
    return _Middle(
        fixed, Modes(v, xp.zeros_like(v), zero, zero), form, xp.zeros_like(fixed), zero, zero, xp.zeros(L, bool),
        0 if xp is np else xp.asarray(0),
    )  # fmt: skip


def linalg_sum(numbers: Array, stack: Array) -> Array:
    """``sum_t numbers_t stack_t``: ``(T, L), (T, ..., L) -> (..., L)``."""
    shape = (numbers.shape[0], *(1,) * (stack.ndim - 2), numbers.shape[-1])
    return (numbers.reshape(shape) * stack).sum(0)


# --- what the optimiser sees -----------------------------------------------------------------------------------------


def covariances(x: Array, layout: Layout) -> list[Array]:
    """Per term ``D (q, q, L)``."""
    return [linalg.matmul(F, linalg.transpose(F)) for F in cov.factors_of(x, layout.structures)]


def foretold(model: Model, memory: Memory, D: Array) -> tuple[Array, Array]:
    """``fixed`` and ``v`` where the free entries of the covariances are ``D (J, L)``."""
    moved = D - memory.D
    change = memory.step + (memory.slopes * moved[None]).sum(1)
    if len(change):
        change = cut(model, change) * change
    v = memory.v + linalg_sum(namespace(change).concatenate([change, moved]), memory.scores)
    return memory.fixed + change, v


def reduced(model: Model, form: ClosedForm, step: Array) -> tuple[Array, Array, Array]:
    """Gradient ``(J, L)`` and Hessian ``(J, J, L)`` by D with fixed profiled out, and fixed's slopes ``(p + s, J, L)``,
    where Newton's step of fixed is ``step``."""
    n, g, H = model.n_fixed, form.gradient, form.Hessian
    if not n:
        return g, H, H[:0]
    slopes = -linalg.matmul(inverse_among_fixed(model, form), H[:n, n:])
    back = H[n:, :n]
    return g[n:] + linalg.matmul(back, step[:, None])[:, 0], H[n:, n:] + linalg.matmul(back, slopes), slopes


def evaluate(model: Model, x: Array, memory: Memory, inner: Any = INNER, middle: Any = MIDDLE) -> Evaluated:
    """The objective with ``fixed`` profiled out, and its derivatives by ``x (k, L)``."""
    xp, lambdas = namespace(x), cov.factors_of(x, model.layout.structures)
    D = free_entries(covariances(x, model.layout))
    found = profile(model, lambdas, *foretold(model, memory, D), inner, middle)
    form = found.form
    reduced_g, reduced_H, slopes = reduced(model, form, found.step)
    jacobian, curvature = chain(x, reduced_g, model.layout)
    back = linalg.transpose(jacobian)
    gradient = linalg.matmul(back, reduced_g[:, None])[:, 0]
    Hessian = linalg.matmul(back, linalg.matmul(reduced_H, jacobian)) + curvature
    # A step that promises much has not been tried, and may promise what there is not.
    value = form.value - 0.5 * xp.where(found.decrement < NEAR, found.decrement, 0.0)
    memory = Memory(D, found.fixed, found.modes.v, found.step, slopes, form.scores)
    return Evaluated(
        value, gradient, Hessian, form, found.fixed, found.modes, found.step, found.decrement, memory
    )  # fmt: skip


def chain(x: Array, g: Array, layout: Layout) -> tuple[Array, Array]:
    """``dD/dx (J, k, L)``, and ``sum_j g_j d2D_j / dx dx (k, k, L)``."""
    xp, k = namespace(x, g), len(x)
    if len(layout.structures) == 1:
        structure = layout.structures[0]
        return structure.jacobian(x), structure.curvature(x, g)
    rows, columns, row, column = [], [], 0, 0
    for structure, part in zip(layout.structures, cov.cut(x, layout.structures), strict=True):
        n_pairs = len(pairs_of(structure.q))
        own = structure.jacobian(part), structure.curvature(part, g[row : row + n_pairs])
        before, after = column, k - column - structure.k
        rows.append(xp.pad(own[0], ((0, 0), (before, after), (0, 0))))
        columns.append(xp.pad(own[1], ((before, after), (before, after), (0, 0))))
        row, column = row + n_pairs, column + structure.k
    jacobian, curvature = xp.concatenate(rows), sum(columns[1:], columns[0])
    return jacobian, curvature


def joint_Hessian(model: Model, x: Array, form: ClosedForm) -> Array:
    """Of the objective by fixed and x: ``(p + s + k, p + s + k, L)``."""
    xp, n, H = namespace(x), model.n_fixed, form.Hessian
    jacobian, curvature = chain(x, form.gradient[n:], model.layout)
    back = linalg.transpose(jacobian)
    side = linalg.matmul(H[:n, n:], jacobian) if n else H[:0, n:]
    corner = linalg.matmul(back, linalg.matmul(H[n:, n:], jacobian)) + curvature
    if not n:
        return corner
    upper = xp.concatenate([H[:n, :n], side], 1)
    return xp.concatenate([upper, xp.concatenate([linalg.transpose(side), corner], 1)])


def nothing_known(model: Model, fixed: Array) -> Memory:
    """A memory of no point: fixed as it is, modes from zero."""
    xp = namespace(fixed, model.data.y)
    L = fixed.shape[-1]
    J, shape = len(directions_of(model.layout)), model.effects.effect_shape
    return Memory(
        D=xp.zeros((J, L), fixed.dtype),
        fixed=fixed,
        v=xp.zeros((*shape, L), fixed.dtype),
        step=xp.zeros_like(fixed),
        slopes=xp.zeros((len(fixed), J, L), fixed.dtype),
        scores=xp.zeros((len(fixed) + J, *shape, L), fixed.dtype),
    )
