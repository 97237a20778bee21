"""Trust-region Newton with exact Hessians, for few parameters, inside one compiled loop.

The trust-region step follows Conn, Gould & Toint (2000, Trust-Region Methods, section 7.3): the Hessian is
diagonalised, so negative curvature is seen and followed and a saddle point is never mistaken for a minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mixjax.optimise.results import Result


class Solution(NamedTuple):
    """A minimum, or where the search ended.

    Attributes:
        x: ``(k,)``, a Newton step beyond the last evaluation when that one was found converged.
        value: ``()``. gradient: ``(k,)``, zero where fixed. hessian: ``(k, k)``, of all; at the last evaluation.
        free: ``(k,)`` False where a simplification fixed the coordinate.
        scaled_gradient: ``sqrt(g' H^{-1} g)``: distance to the minimum in units of the curvature.
        iterations: number of evaluations of value, gradient and Hessian.
        result: code of :class:`~mixjax.optimise.results.Result`.
    """

    x: Array
    value: Array
    gradient: Array
    hessian: Array
    free: Array
    scaled_gradient: Array
    iterations: Array
    result: Array


class Simplify(NamedTuple):
    """Simpler points to try once a minimum is found, for example with a variance set to zero.

    Attributes:
        n_candidates: how many there are; static.
        worthwhile: ``x -> (n_candidates,)`` bools, which candidates deserve an evaluation.
        candidate: ``(x, c) -> (x_c, free_c)``: candidate c and which of its coordinates stay free.
    """

    n_candidates: int
    worthwhile: Callable[[Array], Array]
    candidate: Callable[[Array, Array], tuple[Array, Array]]


class _Point(NamedTuple):
    x: Array
    free: Array
    f: Array
    g: Array
    H: Array
    eigenvalues: Array
    eigenvectors: Array


class _State(NamedTuple):
    at: _Point
    trial: Array
    trial_free: Array
    predicted: Array  # decrease that the quadratic model promises for the trial
    radius: Array
    candidate: Array  # -1: the trial is a Newton step; else which simplification it is
    settled: Array  # simplifications have been tried
    at_rounding: Array  # the last step promised less than rounding and did not lower the gradient
    iterations: Array
    result: Array
    done: Array


def gradient_tolerance(dtype) -> float:
    """Scaled gradient below which a search has converged: 1e-6 in float64, 3e-3 in float32.

    It is the distance to the minimum in units of the curvature; for a deviance, in standard errors. The last Newton
    step, taken without another evaluation, squares it.
    """
    return 1e-6 if jnp.finfo(dtype).bits == 64 else 3e-3


def value_tolerance(dtype) -> float:
    """Rise of the value that a simplification may cost: 1e-9 in float64, 1e-3 in float32."""
    return 1e-9 if jnp.finfo(dtype).bits == 64 else 1e-3


def scaled_gradient(gradient: Array, eigenvalues: Array, eigenvectors: Array) -> Array:
    """``sqrt(g' |H|^{-1} g)``, with eigenvalues of a flat Hessian bounded from below."""
    floor = 1e-8 * jnp.maximum(jnp.abs(eigenvalues).max(), jnp.finfo(eigenvalues.dtype).tiny)
    along = eigenvectors.T @ gradient
    return jnp.sqrt((along**2 / jnp.maximum(jnp.abs(eigenvalues), floor)).sum())


def is_semidefinite(eigenvalues: Array) -> Array:
    """No eigenvalue negative beyond rounding."""
    slack = 1e-10 if jnp.finfo(eigenvalues.dtype).bits == 64 else 1e-4
    return eigenvalues.min() >= -slack * jnp.abs(eigenvalues).max()


def has_converged(gradient: Array, eigenvalues: Array, eigenvectors: Array) -> Array:
    """The one definition of convergence: scaled gradient below tolerance, Hessian positive semidefinite.

    :func:`minimise` also stops, as converged, where rounding leaves nothing to gain: less than 1e-7 is promised
    (float64) and the step does not bring the gradient closer to zero.
    """
    small = scaled_gradient(gradient, eigenvalues, eigenvectors) <= gradient_tolerance(gradient.dtype)
    return small & is_semidefinite(eigenvalues)


def value_gradient_hessian(fun: Callable[[Array], Array]) -> Callable[[Array], tuple[Array, Array, Array]]:
    """``x -> value, gradient, Hessian`` by forward-over-reverse differentiation."""

    def evaluate(x):
        def along(direction):
            return jax.jvp(jax.value_and_grad(fun), (x,), (direction,))

        (f, g), (_, H) = jax.vmap(along, out_axes=((None, None), (0, 0)))(jnp.eye(x.shape[0], dtype=x.dtype))
        return f, g, 0.5 * (H + H.T)

    return evaluate


def minimise(
    fun: Callable[[Array], Array],
    x0: Array,
    simplify: Simplify | None = None,
    max_iterations: int = 200,
    radius: Array | float = 1.0,
) -> Solution:
    """Minimise ``fun``; then try simplifications and keep those that do not raise it.

    A candidate is kept if the value rises by no more than :func:`value_tolerance` and the Hessian there, fixed
    coordinates included, is positive semidefinite. The search then ends with Newton steps in the free coordinates.

    Args:
        fun: ``(k,) -> ()``, twice differentiable.
        x0: ``(k,)``.
        simplify: candidates, or None.
        max_iterations: limit on evaluations.
        radius: first trust region: how far from ``x0`` a quadratic model may be good.
    """
    point = _evaluator(fun)
    count = simplify.n_candidates if simplify is not None else 0
    dtype = x0.dtype
    rounding = 100 * jnp.finfo(dtype).eps

    def next_trial(state: _State) -> _State:
        """Converged: next candidate or end. Else: a trust-region step."""
        at = state.at
        # At the floor of rounding no step brings the gradient closer to zero: nothing is left to gain.
        converged = has_converged(at.g, at.eigenvalues, at.eigenvectors)
        converged = converged | (state.at_rounding & is_semidefinite(at.eigenvalues))
        step, predicted = _trust_region_step(at.g, at.eigenvalues, at.eigenvectors, state.radius)
        step = jnp.where(at.free, step, 0.0)
        trial, free, candidate, settled = at.x + step, at.free, jnp.array(-1), state.settled
        if simplify is not None and count:
            start = jnp.where(state.candidate >= 0, state.candidate + 1, 0)
            trying = (state.candidate >= 0) | (converged & ~state.settled)
            left = simplify.worthwhile(at.x) & (jnp.arange(count) >= start)
            chosen = jnp.argmax(left)
            found = trying & left.any()
            x_c, free_c = simplify.candidate(at.x, chosen)
            trial = jnp.where(found, x_c, trial)
            free = jnp.where(found, free_c, free)
            candidate = jnp.where(found, chosen, -1)
            settled = settled | trying
            converged = converged & ~found
        shrunk = (state.radius < rounding * (1.0 + jnp.abs(at.x).max())) & (candidate < 0)
        exhausted = state.iterations >= max_iterations
        result = jnp.where(
            converged,
            int(Result.CONVERGED),
            jnp.where(shrunk, int(Result.STALLED), int(Result.MAX_ITERATIONS)),
        )
        return state._replace(
            trial=trial,
            trial_free=free,
            predicted=predicted,
            candidate=candidate,
            settled=settled,
            result=jnp.where(jnp.isfinite(at.f), result, int(Result.NOT_FINITE)),
            done=converged | shrunk | exhausted | ~jnp.isfinite(at.f),
        )

    def body(state: _State) -> _State:
        at = state.at
        new = point(state.trial, state.trial_free)
        finite = jnp.isfinite(new.f) & jnp.isfinite(new.g).all() & jnp.isfinite(new.H).all()
        noise = rounding * jnp.maximum(1.0, jnp.abs(new.f))
        ratio = (at.f - new.f + noise) / (state.predicted + noise)
        # A decrease this small drowns in the rounding of the value; the gradient keeps its digits longer. (Not where
        # the curvature is negative: there the gradient grows on the way down.)
        promised = jnp.maximum(state.predicted, 0.5 * _distance(at) ** 2)
        judged_by_gradient = (promised < 100 * value_tolerance(dtype)) & is_semidefinite(at.eigenvalues)
        judged_by_gradient = judged_by_gradient & jnp.isfinite(at.f)
        closer = _distance(new) < _distance(at)
        good_step = finite & jnp.where(judged_by_gradient, closer, ratio > 1e-3)
        # A candidate is judged with every coordinate free: its zeros must be a minimum, not a saddle.
        full = _diagonalise(new._replace(free=jnp.ones_like(new.free)))
        good_candidate = finite & (new.f <= at.f + value_tolerance(dtype)) & is_semidefinite(full.eigenvalues)
        is_step = state.candidate < 0
        accept = jnp.where(is_step, good_step, good_candidate)
        length = jnp.linalg.norm(state.trial - at.x)
        radius = jnp.where(ratio > 0.75, jnp.maximum(state.radius, 3.0 * length), state.radius)
        radius = jnp.where(ratio < 0.25, 0.25 * length, radius)
        radius = jnp.where(judged_by_gradient, jnp.where(closer, state.radius, 0.25 * length), radius)
        radius = jnp.where(finite, radius, 0.25 * length)
        state = state._replace(
            at=jax.tree.map(lambda a, b: jnp.where(accept, a, b), new, at),
            radius=jnp.where(is_step, radius, state.radius),
            at_rounding=is_step & finite & judged_by_gradient & ~closer,
            iterations=state.iterations + 1,
        )
        return next_trial(state)

    # The first trial is the start itself, and a start of infinite value accepts anything.
    k = x0.shape[0]
    nowhere = _Point(
        x0, jnp.ones(k, bool), jnp.array(jnp.inf, dtype), jnp.zeros(k, dtype), jnp.eye(k, dtype=dtype),
        jnp.ones(k, dtype), jnp.eye(k, dtype=dtype),
    )  # fmt: skip
    state = _State(
        at=nowhere, trial=x0, trial_free=nowhere.free, predicted=jnp.array(0.0, dtype),
        radius=jnp.asarray(radius, dtype), candidate=jnp.array(-1), settled=jnp.array(count == 0),
        at_rounding=jnp.array(False), iterations=jnp.array(0), result=jnp.array(int(Result.MAX_ITERATIONS)),
        done=jnp.array(False),
    )  # fmt: skip
    state = jax.lax.while_loop(lambda s: ~s.done, body, state)
    at = state.at
    # state.trial is a Newton step beyond the point that was found converged: second-order convergence for free.
    x = jnp.where(state.result == int(Result.CONVERGED), state.trial, at.x)
    return Solution(x, at.f, at.g, at.H, at.free, _distance(at), state.iterations, state.result)


def judge(fun: Callable[[Array], Array], x: Array, simplify: Simplify) -> Solution:
    """Simplifications of a point found by another optimiser, then :func:`has_converged`; no step is taken.

    Unlike in :func:`minimise` the candidates are tried before convergence is looked at: an optimiser over logarithms
    cannot reach a zero.
    """
    point = _evaluator(fun)
    k, dtype = x.shape[0], x.dtype

    def attempt(c, at):
        candidate, free = simplify.candidate(at.x, c)
        new = point(candidate, free)
        full = _diagonalise(new._replace(free=jnp.ones(k, bool)))
        keep = simplify.worthwhile(at.x)[c] & (new.f <= at.f + value_tolerance(dtype))
        keep = keep & is_semidefinite(full.eigenvalues)
        return jax.tree.map(lambda a, b: jnp.where(keep, a, b), new, at)

    at = jax.lax.fori_loop(0, simplify.n_candidates, attempt, point(x, jnp.ones(k, bool)))
    converged = has_converged(at.g, at.eigenvalues, at.eigenvectors)
    result = jnp.where(converged, int(Result.CONVERGED), int(Result.MAX_ITERATIONS))
    result = jnp.where(jnp.isfinite(at.f), result, int(Result.NOT_FINITE))
    return Solution(at.x, at.f, at.g, at.H, at.free, _distance(at), jnp.array(0), result)


def _evaluator(fun: Callable[[Array], Array]) -> Callable[[Array, Array], _Point]:
    evaluate = value_gradient_hessian(fun)

    def point(x, free):
        f, g, H = evaluate(x)
        return _diagonalise(_Point(x, free, f, jnp.where(free, g, 0.0), H, g, H))

    return point


def _distance(at: _Point) -> Array:
    """How far the minimum is, in units of the curvature."""
    return scaled_gradient(at.g, at.eigenvalues, at.eigenvectors)


def _diagonalise(point: _Point) -> _Point:
    """Eigenvalues and -vectors of the Hessian among the free coordinates; fixed ones count as curvature 1."""
    free = point.free
    H = jnp.where(free[:, None] & free[None], point.H, jnp.diag(jnp.where(free, 0.0, 1.0)).astype(point.H.dtype))
    finite = jnp.isfinite(H).all()
    eigenvalues, eigenvectors = jnp.linalg.eigh(jnp.where(finite, H, jnp.eye(H.shape[0], dtype=H.dtype)))
    return point._replace(eigenvalues=eigenvalues, eigenvectors=eigenvectors)


def _trust_region_step(g: Array, eigenvalues: Array, eigenvectors: Array, radius: Array) -> tuple[Array, Array]:
    """Minimiser of ``g's + s'Hs/2`` over ``|s| <= radius``, and the decrease that the model promises."""
    along = eigenvectors.T @ g
    lowest = eigenvalues[0]
    eps = jnp.finfo(g.dtype).eps
    # The hard case (no gradient along negative curvature) becomes the easy one by a push along the lowest eigenvector.
    push = 1e-3 * jnp.abs(lowest) * radius
    pushed = jnp.where((lowest < 0) & (jnp.abs(along[0]) < push), jnp.where(along[0] < 0, -push, push), along[0])
    along = along.at[0].set(pushed)
    floor = eps * jnp.maximum(jnp.abs(eigenvalues).max(), jnp.finfo(g.dtype).tiny)
    shift0 = jnp.maximum(0.0, -lowest)
    curvature = eigenvalues + shift0

    def length(extra):
        return jnp.linalg.norm(along / jnp.maximum(curvature + extra, floor))

    interior = (lowest > 0) & (length(0.0) <= radius)
    # |s| falls from |along| / extra or more to zero: the root lies below |along| / radius.
    high = jnp.linalg.norm(along) / radius
    low = jnp.where(lowest > 0, 0.0, jnp.abs(along[0]) / radius)

    def improve(_, extra):
        s = along / jnp.maximum(curvature + extra, floor)
        norm = jnp.linalg.norm(s)
        slope = (s**2 / jnp.maximum(curvature + extra, floor)).sum()
        step = (norm / radius - 1.0) * norm**2 / jnp.maximum(slope, jnp.finfo(g.dtype).tiny)
        return jnp.clip(extra + step, low, high)

    extra = jax.lax.fori_loop(0, 12, improve, low)
    extra = jnp.where(interior, 0.0, extra)
    s = -along / jnp.maximum(curvature + extra, floor)
    s = s * jnp.minimum(1.0, radius / jnp.maximum(jnp.linalg.norm(s), jnp.finfo(g.dtype).tiny))
    predicted = -(along @ s + 0.5 * (eigenvalues * s**2).sum())
    return eigenvectors @ s, predicted
