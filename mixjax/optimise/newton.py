"""Trust-region Newton with exact Hessians, for few parameters and many problems at once.

Problems are lanes: they stand in the last axis of every array, and each step is a few vector operations over all of
them. One problem is one lane. The trust-region step follows Conn, Gould & Toint (2000, Trust-Region Methods, section
7.3): the Hessian is diagonalised, so negative curvature is seen and followed and a saddle point is never mistaken for
a minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import DTypeLike

from mixjax import decompositions, linalg
from mixjax.machine import Array, broadcast_to, fori_loop, is_nowhere, namespace, while_loop
from mixjax.optimise.results import Result

T = TypeVar("T")

# x (k, B) -> value (B,), gradient (k, B), Hessian (k, k, B)
Evaluate = Callable[[Array], tuple[Array, Array, Array]]


# Evaluations after which simplifications are tried before the search has converged.
PATIENCE = 8


class Solution(NamedTuple):
    """Minima, or where the searches ended.

    Attributes:
        x: ``(k, B)``, a Newton step beyond the last evaluation when that one was found converged.
        value: ``(B,)`` at the last evaluation, less what the step to ``x`` promises where that was foretold.
        free: ``(k, B)`` False where a simplification fixed the coordinate.
        kink: ``(B,)`` True where a fixed coordinate has no curvature: the smallest change of the data can free it.
        scaled_gradient: ``(B,)`` ``sqrt(g' H^{-1} g)``: distance to the minimum in units of the curvature, at the last
            evaluation; or of ``x``, where the last steps foretell it.
        iterations: ``(B,)`` number of evaluations of value, gradient and Hessian.
        result: ``(B,)`` code of :class:`~mixjax.optimise.results.Result`.
    """

    x: Array
    value: Array
    free: Array
    kink: Array
    scaled_gradient: Array
    iterations: Array
    result: Array


class Simplify(NamedTuple):
    """Simpler points to try once a minimum is found, for example with a variance set to zero.

    Attributes:
        n_candidates: how many there are; static.
        worthwhile: ``x (k, B) -> (n_candidates, B)`` bools, which candidates deserve an evaluation.
        candidate: ``(x (k, B), c (B,)) -> (x_c, free_c)``: candidate c and which of its coordinates stay free.
    """

    n_candidates: int
    worthwhile: Callable[[Array], Array]
    candidate: Callable[[Array, Array], tuple[Array, Array]]


class Point(NamedTuple):
    """An evaluated point of every lane."""

    x: Array
    free: Array
    f: Array
    g: Array  # zero where fixed
    H: Array
    eigenvalues: Array  # of H among the free coordinates, ascending; fixed ones count as curvature 1
    eigenvectors: Array
    distance: Array  # how far the minimum is, in units of the curvature
    semidefinite: Array


class State(NamedTuple):
    """Where every search stands. ``done (B,)`` says which have ended."""

    at: Point
    trial: Array
    trial_free: Array
    predicted: Array  # decrease that the quadratic model promises for the trial
    radius: Array
    candidate: Array  # -1: the trial is a Newton step; else which simplification it is
    before: Array  # distance from the minimum one full Newton step before; 0 if the last step was none
    settled: Array  # simplifications have been tried
    at_rounding: Array  # the last step promised less than rounding and did not lower the gradient
    iterations: Array
    result: Array
    done: Array


def gradient_tolerance(dtype: DTypeLike) -> float:
    """Scaled gradient below which a search has converged: 1e-6 in float64, 3e-3 in float32.

    It is the distance to the minimum in units of the curvature; for a deviance, in standard errors. The last Newton
    step, taken without another evaluation, squares it.
    """
    return 1e-6 if np.finfo(dtype).bits == 64 else 3e-3


def foretold_distance(distance: Array, before: Array) -> Array:
    """Where Newton's next step will end, by the contraction of the last one: errors square, so ``d^3 / before^2``.

    Only close to the minimum, where a step of at most a thousandth follows one of less than half a standard error;
    else infinite. (Deuflhard 2004, Newton Methods for Nonlinear Problems, builds on such contraction factors.)
    """
    xp = namespace(distance)
    near = (before > 0) & (before < 0.5) & (distance <= 1e-3)
    return xp.where(near, distance * (distance / xp.where(near, before, 1.0)) ** 2, xp.inf)


def foretold_tolerance(dtype: DTypeLike) -> float:
    """Foretold distance at which a search ends without evaluating there: 1e-9 in float64, never in float32."""
    return 1e-9 if np.finfo(dtype).bits == 64 else -1.0


def noise_of(value: Array | float, dtype: DTypeLike) -> Array:
    """What rounding may do to a value: a hundred roundings of it."""
    xp = namespace(value)
    return 100 * np.finfo(dtype).eps * xp.maximum(1.0, xp.abs(value))


def value_tolerance(dtype: DTypeLike) -> float:
    """Rise of the value that a simplification may cost: 1e-9 in float64, 1e-3 in float32."""
    return 1e-9 if np.finfo(dtype).bits == 64 else 1e-3


def curvature_tolerance(dtype: DTypeLike) -> float:
    """Curvature that counts as none, relative to the largest: 1e-10 in float64, 1e-4 in float32."""
    return 1e-10 if np.finfo(dtype).bits == 64 else 1e-4


def scaled_gradient(gradient: Array, eigenvalues: Array, eigenvectors: Array) -> Array:
    """``sqrt(g' |H|^{-1} g)``, with eigenvalues of a flat Hessian bounded from below."""
    xp = namespace(gradient)
    floor = 1e-8 * xp.maximum(xp.abs(eigenvalues).max(0), np.finfo(eigenvalues.dtype).tiny)
    along = (eigenvectors * gradient[:, None]).sum(0)
    return xp.sqrt((along**2 / xp.maximum(xp.abs(eigenvalues), floor)).sum(0))


def is_semidefinite(eigenvalues: Array) -> Array:
    """No eigenvalue negative beyond rounding."""
    xp = namespace(eigenvalues)
    return eigenvalues.min(0) >= -curvature_tolerance(eigenvalues.dtype) * xp.abs(eigenvalues).max(0)


def has_converged(at: Point) -> Array:
    """The one definition of convergence: scaled gradient below tolerance, Hessian positive semidefinite.

    :func:`minimise` also stops, as converged, where the contraction of its steps says that the next point will be
    within :func:`foretold_tolerance`, which saves an evaluation; and where rounding leaves nothing to gain: less than
    some thirty roundings of the value are promised, and a step lowers neither the value nor the gradient.
    """
    return (at.distance <= gradient_tolerance(at.g.dtype)) & at.semidefinite


def by_differentiation(fun: Callable[[Array], Array]) -> Evaluate:
    """The evaluation of one lane of ``fun: (k,) -> ()``, forward over reverse."""

    def evaluate(x: Array) -> tuple[Array, Array, Array]:
        def along(direction: Array) -> Any:
            return jax.jvp(jax.value_and_grad(fun), (x[:, 0],), (direction,))

        (f, g), (_, H) = jax.vmap(along, out_axes=((None, None), (0, 0)))(jnp.eye(x.shape[0], dtype=x.dtype))
        return f[None], g[:, None], 0.5 * (H + H.T)[..., None]

    return evaluate


def minimise(
    evaluate: Evaluate,
    x0: Array,
    simplify: Simplify | None = None,
    max_iterations: int = 200,
    radius: Array | float = 1.0,
) -> Solution:
    """Minimise; then try simplifications and keep those that do not raise the value.

    A candidate is kept if the value rises by no more than :func:`value_tolerance` and the Hessian there, fixed
    coordinates included, is positive semidefinite. The search then ends with Newton steps in the free coordinates.

    Args:
        evaluate: ``x (k, B)`` -> values ``(B,)``, gradients ``(k, B)``, Hessians ``(k, k, B)``.
        x0: ``(k, B)``.
        simplify: candidates, or None.
        max_iterations: limit on evaluations.
        radius: ``(B,)`` or scalar, first trust region: how far from ``x0`` a quadratic model may be good.
    """
    xp = namespace(x0)
    state = begin(x0, xp.broadcast_to(xp.asarray(radius, x0.dtype), x0.shape[1:]), simplify)
    step = lambda state: advance(state, evaluate, simplify, max_iterations)  # noqa: E731
    return solution_of(while_loop(lambda state: ~state.done.all(), step, state, xp))


def begin(x0: Array, radius: Array, simplify: Simplify | None = None) -> State:
    """The state before the first evaluation, at ``x0 (k, B)`` with trust regions ``radius (B,)``."""
    xp = namespace(x0)
    (k, lanes), dtype = x0.shape, x0.dtype

    def full(value: Any, of: Any = dtype) -> Array:
        return xp.full(lanes, value, of)

    # The first trial is the start itself, and a start of infinite value accepts anything.
    eye = broadcast_to(linalg.eye(k, x0[None]), (k, k, lanes))
    free = xp.ones((k, lanes), bool)
    nowhere = Point(x0, free, full(xp.inf), xp.zeros_like(x0), eye, xp.ones_like(x0), eye, full(0.0), full(True, bool))
    return State(
        at=nowhere, trial=x0, trial_free=free, predicted=full(0.0), radius=radius, candidate=full(-1, int),
        before=full(0.0), settled=full(simplify is None, bool), at_rounding=full(False, bool), iterations=full(0, int),
        result=full(int(Result.MAX_ITERATIONS), int), done=full(False, bool),
    )  # fmt: skip


def advance(state: State, evaluate: Evaluate, simplify: Simplify | None = None, max_iterations: int = 200) -> State:
    """One evaluation in every lane, and the next trial. Lanes that are done do not change."""
    xp = namespace(state.trial)
    at, dtype = state.at, state.trial.dtype
    new = _point(evaluate, state.trial, state.trial_free)
    finite = xp.isfinite(new.f) & xp.isfinite(new.g).all(0) & xp.isfinite(new.H).all((0, 1))
    noise = noise_of(new.f, dtype)
    ratio = (at.f - new.f + noise) / (state.predicted + noise)
    # A decrease this small drowns in the rounding of the value; the gradient keeps its digits longer. (Not where
    # the curvature is negative: there the gradient grows on the way down.)
    promised = xp.maximum(state.predicted, 0.5 * at.distance**2)
    judged_by_gradient = (promised < 100 * value_tolerance(dtype)) & at.semidefinite
    judged_by_gradient = judged_by_gradient & xp.isfinite(at.f)
    # In a flat and curved valley the gradient grows where the value still falls.
    gained = (at.f - new.f > 10 * noise) & (ratio > 0.1)
    closer = (new.distance < at.distance) | gained
    good_step = finite & xp.where(judged_by_gradient, closer, ratio > 1e-3)
    is_step = state.candidate < 0
    accept = good_step
    if not is_nowhere(~is_step):
        # A candidate is judged with every coordinate free: its zeros must be a minimum, not a saddle.
        good_candidate = finite & (new.f <= at.f + value_tolerance(dtype)) & is_minimum(new.H, new.f)
        accept = xp.where(is_step, good_step, good_candidate)
    length = xp.sqrt(((state.trial - at.x) ** 2).sum(0))
    radius = xp.where(ratio > 0.75, xp.maximum(state.radius, 3.0 * length), state.radius)
    radius = xp.where(ratio < 0.25, 0.25 * length, radius)
    radius = xp.where(judged_by_gradient & ~gained, xp.where(closer, state.radius, 0.25 * length), radius)
    radius = xp.where(finite, radius, 0.25 * length)
    newton = is_step & at.semidefinite & (length < 0.99 * state.radius) & xp.isfinite(at.f)
    moved = state._replace(
        at=where(accept, new, at),
        before=xp.where(accept, xp.where(newton, at.distance, 0.0), state.before),
        radius=xp.where(is_step, radius, state.radius),
        at_rounding=is_step & finite & judged_by_gradient & ~closer & (state.predicted < 30 * noise),
        iterations=state.iterations + 1,
    )
    return where(state.done, state, _next_trial(moved, simplify, max_iterations))


def solution_of(state: State) -> Solution:
    """The solutions of the searches."""
    xp = namespace(state.trial)
    at = state.at
    # state.trial is a Newton step beyond the point that was found converged: second-order convergence for free.
    converged = state.result == int(Result.CONVERGED)
    foretold = foretold_distance(at.distance, state.before)
    foretold = xp.where(converged & (at.distance > gradient_tolerance(at.f.dtype)), foretold, xp.inf)
    value = xp.where(xp.isfinite(foretold), at.f - 0.5 * at.distance**2, at.f)
    x = xp.where(converged, state.trial, at.x)
    return Solution(
        x,
        value,
        at.free,
        has_kink(at.H, at.f, at.free),
        xp.minimum(at.distance, foretold),
        state.iterations,
        state.result,
    )


def judge(evaluate: Evaluate, x: Array, simplify: Simplify) -> Solution:
    """Simplifications of points found by another optimiser, then :func:`has_converged`; no step is taken.

    Unlike in :func:`minimise` the candidates are tried before convergence is looked at: an optimiser over logarithms
    cannot reach a zero.
    """
    xp = namespace(x)
    lanes, dtype = x.shape[1], x.dtype

    def attempt(c: Array, at: Point) -> Point:
        candidate, free = simplify.candidate(at.x, xp.full(lanes, c))
        new = _point(evaluate, candidate, free)
        keep = simplify.worthwhile(at.x)[c] & (new.f <= at.f + value_tolerance(dtype)) & is_minimum(new.H, new.f)
        return where(keep, new, at)

    at = fori_loop(simplify.n_candidates, attempt, _point(evaluate, x, xp.ones(x.shape, bool)), xp)
    result = xp.where(has_converged(at), int(Result.CONVERGED), int(Result.MAX_ITERATIONS))
    result = xp.where(xp.isfinite(at.f), result, int(Result.NOT_FINITE))
    return Solution(at.x, at.f, at.free, has_kink(at.H, at.f, at.free), at.distance, xp.zeros(lanes, int), result)


class Direct(NamedTuple):
    """Where searches by Newton's steps alone stand; see :func:`advance_directly`.

    Attributes:
        x: ``(k, B)`` where to evaluate next, or where a search had better begin; the minimum where converged.
        last: the point before. value, predicted: at ``last``, and the decrease that x promises.
        before: distance of ``last`` from the minimum if a full step led to x, else 0.
        iterations, distance: as in Solution. going, converged: ``(B,)``.
    """

    x: Array
    last: Array
    value: Array
    predicted: Array
    before: Array
    distance: Array
    iterations: Array
    going: Array
    converged: Array

    def solution(self) -> Solution:
        """Minima where converged; infinite values elsewhere."""
        xp = namespace(self.value)
        lanes = self.value.shape
        result = xp.where(self.converged, int(Result.CONVERGED), int(Result.NOT_FINITE))
        free, kink = xp.ones(self.x.shape, bool), xp.zeros(lanes, bool)
        value = xp.where(self.converged, self.value, xp.inf)
        return Solution(self.x, value, free, kink, self.distance, self.iterations, result)


def begin_directly(x0: Array) -> Direct:
    """The state before the first evaluation, at ``x0 (k, B)``."""
    xp = namespace(x0)
    lanes = x0.shape[1:]
    infinite, no = xp.full(lanes, xp.inf, x0.dtype), xp.zeros(lanes, bool)
    zero = xp.zeros(lanes, x0.dtype)
    return Direct(x0, x0, infinite, zero, zero, infinite, xp.zeros(lanes, int), ~no, no)


def advance_directly(state: Direct, evaluate: Evaluate, is_plain: Callable[[Array], Array], region: float) -> Direct:
    """One evaluation of a cheap first attempt: Newton's steps without eigenvalues and without simplifications.

    A lane gives up where that is not enough: the Hessian is not clearly positive definite, the value did not fall as
    promised, or ``is_plain(x) -> (B,)`` does not hold for the next point. A search from ``x`` (:func:`begin`) goes on
    from there. The convergence that is found is that of :func:`has_converged`. Steps are no longer than ``region``
    times the point.
    """
    xp = namespace(state.x)
    at, dtype = state.x, state.x.dtype
    f, g, H = evaluate(at)
    # Free of scale, and far above the tolerance of has_converged.
    least = xp.sqrt(curvature_tolerance(dtype)) * xp.stack([H[i, i] for i in range(H.shape[0])])
    definite = decompositions.is_positive(H - linalg.eye(len(H), H) * least)
    step = -linalg.matmul(linalg.inverse_logdet(H)[0], g[:, None])[:, 0]
    decrement = -(g * step).sum(0)
    distance = xp.sqrt(xp.maximum(decrement, 0.0))
    part = xp.minimum(1.0, region * xp.sqrt((at * at).sum(0) / (step * step).sum(0)))
    noise = noise_of(f, dtype)
    fell = state.value - f + noise > 1e-3 * (state.predicted + noise)
    sound = definite & fell & xp.isfinite(f) & xp.isfinite(step).all(0)
    x = at + part * step
    plain = is_plain(x)
    foretold = foretold_distance(distance, state.before)
    reached = distance <= gradient_tolerance(dtype)
    converged = sound & plain & (reached | (foretold <= foretold_tolerance(dtype)))
    new = Direct(
        x=x,
        last=at,
        value=xp.where(converged & ~reached, f - 0.5 * decrement, f),
        predicted=(part - 0.5 * part**2) * decrement,
        before=xp.where(part < 1.0, 0.0, distance),
        distance=xp.where(converged & ~reached, foretold, distance),
        iterations=state.iterations,
        going=sound & plain & ~converged,
        converged=converged,
    )
    back = state._replace(x=state.last, going=xp.zeros_like(state.going))
    new = where(sound, new, back)._replace(iterations=state.iterations + 1)
    return where(state.going, new, state)


def _next_trial(state: State, simplify: Simplify | None, max_iterations: int) -> State:
    """Converged: next candidate or end. Else: a trust-region step."""
    xp = namespace(state.trial)
    at = state.at
    rounding = 100 * np.finfo(at.x.dtype).eps
    # At the floor of rounding no step brings the gradient closer to zero: nothing is left to gain.
    converged = has_converged(at) | (state.at_rounding & at.semidefinite)
    foretold = foretold_distance(at.distance, state.before) <= foretold_tolerance(at.x.dtype)
    foretold = foretold & at.semidefinite
    step, predicted = _trust_region_step(at.g, at.eigenvalues, at.eigenvectors, state.radius)
    trial, free, candidate, settled = at.x + xp.where(at.free, step, 0.0), at.free, state.candidate, state.settled
    if simplify is not None:
        start = xp.where(candidate >= 0, candidate + 1, 0)
        # A search that takes long may be following a valley that leads nowhere but to a simpler point.
        slow = (state.iterations % PATIENCE == 0) & xp.isfinite(at.f)
        trying = (candidate >= 0) | ((converged | slow) & ~settled)
        worthwhile = simplify.worthwhile(at.x)
        # Candidates are compared with the value at a minimum that was reached, not one that is foretold.
        foretold = foretold & (state.settled | ~worthwhile.any(0)) & (candidate < 0)
        left = worthwhile & (xp.arange(simplify.n_candidates)[:, None] >= start)
        chosen = xp.argmax(left, axis=0)
        found = trying & left.any(0)
        if xp is not np or found.any():
            x_c, free_c = simplify.candidate(at.x, chosen)
            trial = xp.where(found, x_c, trial)
            free = xp.where(found, free_c, free)
        candidate = xp.where(found, chosen, -1)
        settled = settled | (trying & converged)
        converged = converged & ~found
    converged = converged | (foretold & (candidate < 0))
    shrunk = (state.radius < rounding * (1.0 + xp.abs(at.x).max(0))) & (candidate < 0)
    finite = xp.isfinite(at.f)
    result = xp.where(shrunk, int(Result.STALLED), int(Result.MAX_ITERATIONS))
    result = xp.where(converged, int(Result.CONVERGED), result)
    return state._replace(
        trial=trial,
        trial_free=free,
        predicted=predicted,
        candidate=candidate,
        settled=settled,
        result=xp.where(finite, result, int(Result.NOT_FINITE)),
        done=converged | shrunk | (state.iterations >= max_iterations) | ~finite,
    )


def where(condition: Array, a: T, b: T) -> T:
    """``a`` in the lanes where the condition holds, else ``b``."""
    if namespace(condition) is np:
        if condition.all():
            return a
        if not condition.any():
            return b
    chosen: T = jax.tree.map(lambda u, v: namespace(condition, u, v).where(condition, u, v), a, b)
    return chosen


def _point(evaluate: Evaluate, x: Array, free: Array) -> Point:
    xp = namespace(x)
    f, g, H = evaluate(x)
    among = free[:, None] & free[None]
    values, vectors = decompositions.eigh(xp.where(among, H, linalg.eye(len(x), H)))
    g = xp.where(free, g, 0.0)
    return Point(x, free, f, g, H, values, vectors, scaled_gradient(g, values, vectors), is_semidefinite(values))


def _no_curvature(H: Array, value: Array) -> Array:
    """The rounding of a curvature that is zero: relative to the largest, and to the value itself."""
    xp = namespace(value)
    smallest = curvature_tolerance(H.dtype)
    return smallest * (xp.abs(H).max((0, 1)) + xp.maximum(1.0, xp.abs(value)))


def is_minimum(H: Array, value: Array) -> Array:
    """A Hessian ``(k, k, B)``, of coordinates that are fixed too, is positive semidefinite up to rounding."""
    return decompositions.is_positive(H + _no_curvature(H, value) * linalg.eye(len(H), H))


def has_kink(H: Array, value: Array, free: Array) -> Array:
    """Some fixed coordinate, or a direction among them, without curvature."""
    xp = namespace(value)
    fixed = ~free
    if is_nowhere(fixed):
        return xp.zeros_like(value, bool)
    eye = linalg.eye(len(H), H)
    block = xp.where(fixed[:, None] & fixed[None], H, xp.abs(H).max((0, 1)) * eye)
    return fixed.any(0) & ~decompositions.is_positive(block - 100 * _no_curvature(H, value) * eye)


def _trust_region_step(g: Array, eigenvalues: Array, eigenvectors: Array, radius: Array) -> tuple[Array, Array]:
    """Minimiser of ``g's + s'Hs/2`` over ``|s| <= radius``, and the decrease that the model promises."""
    xp = namespace(g)
    along = (eigenvectors * g[:, None]).sum(0)
    lowest = eigenvalues[0]
    eps, tiny = np.finfo(g.dtype).eps, np.finfo(g.dtype).tiny
    # The hard case (no gradient along negative curvature) becomes the easy one by a push along the lowest eigenvector.
    push = 1e-3 * xp.abs(lowest) * radius
    pushed = xp.where((lowest < 0) & (xp.abs(along[0]) < push), xp.where(along[0] < 0, -push, push), along[0])
    along = xp.concatenate([pushed[None], along[1:]])
    floor = eps * xp.maximum(xp.abs(eigenvalues).max(0), tiny)
    curvature = eigenvalues + xp.maximum(0.0, -lowest)

    def norm(v: Array) -> Array:
        return xp.sqrt((v * v).sum(0))

    interior = (lowest > 0) & (norm(along / xp.maximum(curvature, floor)) <= radius)
    # |s| falls from |along| / extra or more to zero: the root lies below |along| / radius.
    high = norm(along) / radius
    low = xp.where(lowest > 0, 0.0, xp.abs(along[0]) / radius)

    def improve(_: Any, extra: Array) -> Array:
        inverse = 1.0 / xp.maximum(curvature + extra, floor)
        s = along * inverse
        length = norm(s)
        slope = (s * s * inverse).sum(0)
        step = (length / radius - 1.0) * length**2 / xp.maximum(slope, tiny)
        return xp.clip(extra + step, low, high)

    extra = xp.zeros_like(low) if is_nowhere(~interior) else fori_loop(12, improve, low, xp)
    extra = xp.where(interior, 0.0, extra)
    s = -along / xp.maximum(curvature + extra, floor)
    s = s * xp.minimum(1.0, radius / xp.maximum(norm(s), tiny))
    predicted = -(along * s + 0.5 * eigenvalues * s**2).sum(0)
    return (eigenvectors * s[None]).sum(1), predicted
