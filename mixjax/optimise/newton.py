"""Trust-region Newton with exact Hessians, for few parameters and many problems at once.

Problems are lanes: they stand in the last axis of every array, and each step is a few vector operations over all of
them. One problem is one lane. The trust-region step follows Conn, Gould & Toint (2000, Trust-Region Methods, section
7.3): the Hessian is diagonalised, so negative curvature is seen and followed and a saddle point is never mistaken for
a minimum.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mixjax import linalg
from mixjax.optimise.results import Result

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


class _Point(NamedTuple):
    x: Array
    free: Array
    f: Array
    g: Array  # zero where fixed
    H: Array
    eigenvalues: Array  # of H among the free coordinates, ascending; fixed ones count as curvature 1
    eigenvectors: Array


class State(NamedTuple):
    """Where every search stands. ``done (B,)`` says which have ended."""

    at: _Point
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


def gradient_tolerance(dtype) -> float:
    """Scaled gradient below which a search has converged: 1e-6 in float64, 3e-3 in float32.

    It is the distance to the minimum in units of the curvature; for a deviance, in standard errors. The last Newton
    step, taken without another evaluation, squares it.
    """
    return 1e-6 if jnp.finfo(dtype).bits == 64 else 3e-3


def foretold_distance(distance: Array, before: Array) -> Array:
    """Where Newton's next step will end, by the contraction of the last one: errors square, so ``d^3 / before^2``.

    Only close to the minimum, where a step of at most a thousandth follows one of less than half a standard error;
    else infinite. (Deuflhard 2004, Newton Methods for Nonlinear Problems, builds on such contraction factors.)
    """
    near = (before > 0) & (before < 0.5) & (distance <= 1e-3)
    return jnp.where(near, distance * (distance / jnp.where(near, before, 1.0)) ** 2, jnp.inf)


def foretold_tolerance(dtype) -> float:
    """Foretold distance at which a search ends without evaluating there: 1e-9 in float64, never in float32."""
    return 1e-9 if jnp.finfo(dtype).bits == 64 else -1.0


def value_tolerance(dtype) -> float:
    """Rise of the value that a simplification may cost: 1e-9 in float64, 1e-3 in float32."""
    return 1e-9 if jnp.finfo(dtype).bits == 64 else 1e-3


def curvature_tolerance(dtype) -> float:
    """Curvature that counts as none, relative to the largest: 1e-10 in float64, 1e-4 in float32."""
    return 1e-10 if jnp.finfo(dtype).bits == 64 else 1e-4


def scaled_gradient(gradient: Array, eigenvalues: Array, eigenvectors: Array) -> Array:
    """``sqrt(g' |H|^{-1} g)``, with eigenvalues of a flat Hessian bounded from below."""
    floor = 1e-8 * jnp.maximum(jnp.abs(eigenvalues).max(0), jnp.finfo(eigenvalues.dtype).tiny)
    along = (eigenvectors * gradient[:, None]).sum(0)
    return jnp.sqrt((along**2 / jnp.maximum(jnp.abs(eigenvalues), floor)).sum(0))


def is_semidefinite(eigenvalues: Array) -> Array:
    """No eigenvalue negative beyond rounding."""
    return eigenvalues.min(0) >= -curvature_tolerance(eigenvalues.dtype) * jnp.abs(eigenvalues).max(0)


def has_converged(gradient: Array, eigenvalues: Array, eigenvectors: Array) -> Array:
    """The one definition of convergence: scaled gradient below tolerance, Hessian positive semidefinite.

    :func:`minimise` also stops, as converged, where the contraction of its steps says that the next point will be
    within :func:`foretold_tolerance`, which saves an evaluation; and where rounding leaves nothing to gain: less than
    some thirty roundings of the value are promised, and a step lowers neither the value nor the gradient.
    """
    small = scaled_gradient(gradient, eigenvalues, eigenvectors) <= gradient_tolerance(gradient.dtype)
    return small & is_semidefinite(eigenvalues)


def by_differentiation(fun: Callable[[Array], Array]) -> Evaluate:
    """The evaluation of one lane of ``fun: (k,) -> ()``, forward over reverse."""

    def evaluate(x):
        def along(direction):
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
    state = begin(x0, jnp.broadcast_to(jnp.asarray(radius, x0.dtype), x0.shape[1:]), simplify)
    step = lambda state: advance(state, evaluate, simplify, max_iterations)  # noqa: E731
    return solution_of(jax.lax.while_loop(lambda state: ~state.done.all(), step, state))


def begin(x0: Array, radius: Array, simplify: Simplify | None = None) -> State:
    """The state before the first evaluation, at ``x0 (k, B)`` with trust regions ``radius (B,)``."""
    (k, lanes), dtype = x0.shape, x0.dtype

    def full(value, of=dtype):
        return jnp.full(lanes, value, of)

    # The first trial is the start itself, and a start of infinite value accepts anything.
    eye = jnp.broadcast_to(jnp.eye(k, dtype=dtype)[..., None], (k, k, lanes))
    free = jnp.ones((k, lanes), bool)
    nowhere = _Point(x0, free, full(jnp.inf), jnp.zeros_like(x0), eye, jnp.ones_like(x0), eye)
    return State(
        at=nowhere, trial=x0, trial_free=free, predicted=full(0.0), radius=radius, candidate=full(-1, int),
        before=full(0.0), settled=full(simplify is None, bool), at_rounding=full(False, bool), iterations=full(0, int),
        result=full(int(Result.MAX_ITERATIONS), int), done=full(False, bool),
    )  # fmt: skip


def advance(state: State, evaluate: Evaluate, simplify: Simplify | None = None, max_iterations: int = 200) -> State:
    """One evaluation in every lane, and the next trial. Lanes that are done do not change."""
    at, dtype = state.at, state.trial.dtype
    rounding = 100 * jnp.finfo(dtype).eps
    new = _point(evaluate, state.trial, state.trial_free)
    finite = jnp.isfinite(new.f) & jnp.isfinite(new.g).all(0) & jnp.isfinite(new.H).all((0, 1))
    noise = rounding * jnp.maximum(1.0, jnp.abs(new.f))
    ratio = (at.f - new.f + noise) / (state.predicted + noise)
    # A decrease this small drowns in the rounding of the value; the gradient keeps its digits longer. (Not where
    # the curvature is negative: there the gradient grows on the way down.)
    distance, distance_new = _distance(at), _distance(new)
    promised = jnp.maximum(state.predicted, 0.5 * distance**2)
    judged_by_gradient = (promised < 100 * value_tolerance(dtype)) & is_semidefinite(at.eigenvalues)
    judged_by_gradient = judged_by_gradient & jnp.isfinite(at.f)
    # In a flat and curved valley the gradient grows where the value still falls.
    gained = (at.f - new.f > 10 * noise) & (ratio > 0.1)
    closer = (distance_new < distance) | gained
    good_step = finite & jnp.where(judged_by_gradient, closer, ratio > 1e-3)
    # A candidate is judged with every coordinate free: its zeros must be a minimum, not a saddle.
    good_candidate = finite & (new.f <= at.f + value_tolerance(dtype)) & _fixed_is_semidefinite(new)
    is_step = state.candidate < 0
    accept = jnp.where(is_step, good_step, good_candidate)
    length = jnp.sqrt(((state.trial - at.x) ** 2).sum(0))
    radius = jnp.where(ratio > 0.75, jnp.maximum(state.radius, 3.0 * length), state.radius)
    radius = jnp.where(ratio < 0.25, 0.25 * length, radius)
    radius = jnp.where(judged_by_gradient & ~gained, jnp.where(closer, state.radius, 0.25 * length), radius)
    radius = jnp.where(finite, radius, 0.25 * length)
    newton = is_step & is_semidefinite(at.eigenvalues) & (length < 0.99 * state.radius) & jnp.isfinite(at.f)
    moved = state._replace(
        at=_where(accept, new, at),
        before=jnp.where(accept, jnp.where(newton, distance, 0.0), state.before),
        radius=jnp.where(is_step, radius, state.radius),
        at_rounding=is_step & finite & judged_by_gradient & ~closer & (state.predicted < 30 * noise),
        iterations=state.iterations + 1,
    )
    return _where(state.done, state, _next_trial(moved, simplify, max_iterations))


def solution_of(state: State) -> Solution:
    """What the searches have found."""
    at = state.at
    # state.trial is a Newton step beyond the point that was found converged: second-order convergence for free.
    converged = state.result == int(Result.CONVERGED)
    distance = _distance(at)
    foretold = foretold_distance(distance, state.before)
    foretold = jnp.where(converged & (distance > gradient_tolerance(distance.dtype)), foretold, jnp.inf)
    value = jnp.where(jnp.isfinite(foretold), at.f - 0.5 * distance**2, at.f)
    x = jnp.where(converged, state.trial, at.x)
    return Solution(x, value, at.free, _kink(at), jnp.minimum(distance, foretold), state.iterations, state.result)


def judge(evaluate: Evaluate, x: Array, simplify: Simplify) -> Solution:
    """Simplifications of points found by another optimiser, then :func:`has_converged`; no step is taken.

    Unlike in :func:`minimise` the candidates are tried before convergence is looked at: an optimiser over logarithms
    cannot reach a zero.
    """
    lanes, dtype = x.shape[1], x.dtype

    def attempt(c, at):
        candidate, free = simplify.candidate(at.x, jnp.full(lanes, c))
        new = _point(evaluate, candidate, free)
        keep = simplify.worthwhile(at.x)[c] & (new.f <= at.f + value_tolerance(dtype)) & _fixed_is_semidefinite(new)
        return _where(keep, new, at)

    at = jax.lax.fori_loop(0, simplify.n_candidates, attempt, _point(evaluate, x, jnp.ones(x.shape, bool)))
    converged = has_converged(at.g, at.eigenvalues, at.eigenvectors)
    result = jnp.where(converged, int(Result.CONVERGED), int(Result.MAX_ITERATIONS))
    result = jnp.where(jnp.isfinite(at.f), result, int(Result.NOT_FINITE))
    return Solution(at.x, at.f, at.free, _kink(at), _distance(at), jnp.zeros(lanes, int), result)


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
        lanes = self.value.shape
        result = jnp.where(self.converged, int(Result.CONVERGED), int(Result.NOT_FINITE))
        free, kink = jnp.ones(self.x.shape, bool), jnp.zeros(lanes, bool)
        value = jnp.where(self.converged, self.value, jnp.inf)
        return Solution(self.x, value, free, kink, self.distance, self.iterations, result)


def begin_directly(x0: Array) -> Direct:
    """The state before the first evaluation, at ``x0 (k, B)``."""
    lanes = x0.shape[1:]
    infinite, no = jnp.full(lanes, jnp.inf, x0.dtype), jnp.zeros(lanes, bool)
    zero = jnp.zeros(lanes, x0.dtype)
    return Direct(x0, x0, infinite, zero, zero, infinite, jnp.zeros(lanes, int), ~no, no)


def advance_directly(state: Direct, evaluate: Evaluate, is_plain: Callable[[Array], Array], region: float) -> Direct:
    """One evaluation of a cheap first attempt: Newton's steps without eigenvalues and without simplifications.

    A lane gives up where that is not enough: the Hessian is not clearly positive definite, the value did not fall as
    promised, or ``is_plain(x) -> (B,)`` does not hold for the next point. A search from ``x`` (:func:`begin`) goes on
    from there. The convergence that is found is that of :func:`has_converged`. Steps are no longer than ``region``
    times the point.
    """
    at, dtype = state.x, state.x.dtype
    f, g, H = evaluate(at)
    # Free of scale, and far above the tolerance of has_converged.
    least = jnp.sqrt(curvature_tolerance(dtype)) * jnp.stack([H[i, i] for i in range(H.shape[0])])
    definite = linalg.is_positive(H - jnp.eye(H.shape[0], dtype=dtype)[..., None] * least)
    step = -linalg.matmul(linalg.inverse_logdet(H)[0], g[:, None])[:, 0]
    decrement = -(g * step).sum(0)
    distance = jnp.sqrt(jnp.maximum(decrement, 0.0))
    part = jnp.minimum(1.0, region * jnp.sqrt((at * at).sum(0) / (step * step).sum(0)))
    noise = 100 * jnp.finfo(dtype).eps * jnp.maximum(1.0, jnp.abs(f))
    fell = state.value - f + noise > 1e-3 * (state.predicted + noise)
    sound = definite & fell & jnp.isfinite(f) & jnp.isfinite(step).all(0)
    x = at + part * step
    plain = is_plain(x)
    foretold = foretold_distance(distance, state.before)
    reached = distance <= gradient_tolerance(dtype)
    converged = sound & plain & (reached | (foretold <= foretold_tolerance(dtype)))
    new = Direct(
        x=x,
        last=at,
        value=jnp.where(converged & ~reached, f - 0.5 * decrement, f),
        predicted=(part - 0.5 * part**2) * decrement,
        before=jnp.where(part < 1.0, 0.0, distance),
        distance=jnp.where(converged & ~reached, foretold, distance),
        iterations=state.iterations,
        going=sound & plain & ~converged,
        converged=converged,
    )
    back = state._replace(x=state.last, going=jnp.zeros_like(state.going))
    new = _where(sound, new, back)._replace(iterations=state.iterations + 1)
    return _where(state.going, new, state)


def _next_trial(state: State, simplify: Simplify | None, max_iterations: int) -> State:
    """Converged: next candidate or end. Else: a trust-region step."""
    at = state.at
    rounding = 100 * jnp.finfo(at.x.dtype).eps
    # At the floor of rounding no step brings the gradient closer to zero: nothing is left to gain.
    converged = has_converged(at.g, at.eigenvalues, at.eigenvectors)
    converged = converged | (state.at_rounding & is_semidefinite(at.eigenvalues))
    foretold = foretold_distance(_distance(at), state.before) <= foretold_tolerance(at.x.dtype)
    foretold = foretold & is_semidefinite(at.eigenvalues)
    step, predicted = _trust_region_step(at.g, at.eigenvalues, at.eigenvectors, state.radius)
    trial, free, candidate, settled = at.x + jnp.where(at.free, step, 0.0), at.free, state.candidate, state.settled
    if simplify is not None:
        start = jnp.where(candidate >= 0, candidate + 1, 0)
        # A search that takes long may be following a valley that leads nowhere but to a simpler point.
        slow = (state.iterations % PATIENCE == 0) & jnp.isfinite(at.f)
        trying = (candidate >= 0) | ((converged | slow) & ~settled)
        worthwhile = simplify.worthwhile(at.x)
        # Candidates are compared with the value at a minimum that was reached, not one that is foretold.
        foretold = foretold & (state.settled | ~worthwhile.any(0)) & (candidate < 0)
        left = worthwhile & (jnp.arange(simplify.n_candidates)[:, None] >= start)
        chosen = jnp.argmax(left, axis=0)
        found = trying & left.any(0)
        x_c, free_c = simplify.candidate(at.x, chosen)
        trial = jnp.where(found, x_c, trial)
        free = jnp.where(found, free_c, free)
        candidate = jnp.where(found, chosen, -1)
        settled = settled | (trying & converged)
        converged = converged & ~found
    converged = converged | (foretold & (candidate < 0))
    shrunk = (state.radius < rounding * (1.0 + jnp.abs(at.x).max(0))) & (candidate < 0)
    finite = jnp.isfinite(at.f)
    result = jnp.where(shrunk, int(Result.STALLED), int(Result.MAX_ITERATIONS))
    result = jnp.where(converged, int(Result.CONVERGED), result)
    return state._replace(
        trial=trial,
        trial_free=free,
        predicted=predicted,
        candidate=candidate,
        settled=settled,
        result=jnp.where(finite, result, int(Result.NOT_FINITE)),
        done=converged | shrunk | (state.iterations >= max_iterations) | ~finite,
    )


def _where(condition: Array, a, b):
    """``a`` in the lanes where the condition holds, else ``b``."""
    return jax.tree.map(lambda u, v: jnp.where(condition, u, v), a, b)


def _point(evaluate: Evaluate, x: Array, free: Array) -> _Point:
    f, g, H = evaluate(x)
    among = free[:, None] & free[None]
    eye = jnp.eye(x.shape[0], dtype=x.dtype)[..., None]
    return _Point(x, free, f, jnp.where(free, g, 0.0), H, *linalg.eigh(jnp.where(among, H, eye)))


def _distance(at: _Point) -> Array:
    """How far the minimum is, in units of the curvature."""
    return scaled_gradient(at.g, at.eigenvalues, at.eigenvectors)


def _no_curvature(at: _Point) -> Array:
    """What rounding leaves of a curvature that is zero: relative to the largest, and to the value itself."""
    smallest = curvature_tolerance(at.H.dtype)
    return smallest * (jnp.abs(at.H).max((0, 1)) + jnp.maximum(1.0, jnp.abs(at.f)))


def _fixed_is_semidefinite(at: _Point) -> Array:
    """The Hessian, fixed coordinates included, is positive semidefinite up to rounding."""
    return linalg.is_positive(at.H + _no_curvature(at) * jnp.eye(at.H.shape[0], dtype=at.H.dtype)[..., None])


def _kink(at: _Point) -> Array:
    """Some fixed coordinate, or a direction among them, without curvature."""
    fixed = ~at.free
    eye = jnp.eye(at.H.shape[0], dtype=at.H.dtype)[..., None]
    block = jnp.where(fixed[:, None] & fixed[None], at.H, jnp.abs(at.H).max((0, 1)) * eye)
    return fixed.any(0) & ~linalg.is_positive(block - 100 * _no_curvature(at) * eye)


def _trust_region_step(g: Array, eigenvalues: Array, eigenvectors: Array, radius: Array) -> tuple[Array, Array]:
    """Minimiser of ``g's + s'Hs/2`` over ``|s| <= radius``, and the decrease that the model promises."""
    along = (eigenvectors * g[:, None]).sum(0)
    lowest = eigenvalues[0]
    eps, tiny = jnp.finfo(g.dtype).eps, jnp.finfo(g.dtype).tiny
    # The hard case (no gradient along negative curvature) becomes the easy one by a push along the lowest eigenvector.
    push = 1e-3 * jnp.abs(lowest) * radius
    pushed = jnp.where((lowest < 0) & (jnp.abs(along[0]) < push), jnp.where(along[0] < 0, -push, push), along[0])
    along = jnp.concatenate([pushed[None], along[1:]])
    floor = eps * jnp.maximum(jnp.abs(eigenvalues).max(0), tiny)
    curvature = eigenvalues + jnp.maximum(0.0, -lowest)

    def norm(v):
        return jnp.sqrt((v * v).sum(0))

    interior = (lowest > 0) & (norm(along / jnp.maximum(curvature, floor)) <= radius)
    # |s| falls from |along| / extra or more to zero: the root lies below |along| / radius.
    high = norm(along) / radius
    low = jnp.where(lowest > 0, 0.0, jnp.abs(along[0]) / radius)

    def improve(_, extra):
        inverse = 1.0 / jnp.maximum(curvature + extra, floor)
        s = along * inverse
        length = norm(s)
        slope = (s * s * inverse).sum(0)
        step = (length / radius - 1.0) * length**2 / jnp.maximum(slope, tiny)
        return jnp.clip(extra + step, low, high)

    extra = jax.lax.fori_loop(0, 12, improve, low)
    extra = jnp.where(interior, 0.0, extra)
    s = -along / jnp.maximum(curvature + extra, floor)
    s = s * jnp.minimum(1.0, radius / jnp.maximum(norm(s), tiny))
    predicted = -(along * s + 0.5 * eigenvalues * s**2).sum(0)
    return (eigenvectors * s[None]).sum(1), predicted
