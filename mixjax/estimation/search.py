"""The search for the minimum of the criterion, in many lanes: one search, and a second one where the first is doubtful.

Most local minima that are not global are singular: the search fell into rank deficiency on its way. So where the first
search ends singular, or fails, a second one comes down from larger variances, and the better of the two is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mixjax import covariance as cov
from mixjax import decompositions, linalg
from mixjax.bases import Basis
from mixjax.covariance import Structure, rank_tolerance
from mixjax.machine import Array, is_nowhere, namespace, stack, while_loop
from mixjax.optimise import newton
from mixjax.optimise.newton import Evaluate, Simplify, Solution
from mixjax.optimise.results import Result
from mixjax.optimise.straight import straight
from mixjax.products.sums import Layout

# Singular values of Lambda (in the basis of Z, so free of scale) below this are worth an attempt to set them to zero.
NEAR_ZERO = 1e-2
# Standard deviation ratio, in the basis of Z, from which a second search comes down.
FAR = 3.0
# Evaluations of one search at most.
MOST_ITERATIONS = 200
# First trust region, relative to the length of the start, and its least radius.
REGION, LEAST_REGION = 0.5, 0.1


class Search(NamedTuple):
    """State of the searches, one per lane.

    Attributes:
        state: of the search that is under way. again: ``(B,)`` it is the second.
        best: the best end so far; its iterations count both searches.
        done: ``(B,)`` the best end is final.
    """

    state: newton.State
    again: Array
    best: Solution
    done: Array


def begin(x0: Array, structures: tuple[Structure, ...], iterations: Array | int = 0) -> Search:
    """Searches that start at ``x0 (k, B)``, after so many evaluations already."""
    xp = namespace(x0)
    lanes = x0.shape[1:]
    nothing = Solution(
        x=x0,
        value=xp.full(lanes, xp.inf, x0.dtype),
        free=xp.ones(x0.shape, bool),
        kink=xp.zeros(lanes, bool),
        scaled_gradient=xp.full(lanes, xp.inf, x0.dtype),
        iterations=xp.zeros(lanes, int) + iterations,
        result=xp.full(lanes, int(Result.NOT_FINITE)),
    )
    return Search(_begin_at(x0, structures), xp.zeros(lanes, bool), nothing, xp.zeros(lanes, bool))


def advance(
    search: Search,
    evaluate: Evaluate,
    structures: tuple[Structure, ...],
    one_minimum: Array | bool = False,
    far: float = FAR,
    most: int = MOST_ITERATIONS,
) -> Search:
    """One evaluation in every lane that is not done.

    Args:
        one_minimum: ``(B,)`` or one bool: the criterion is known to have no other minimum, so that no end is doubtful.
        far: standard deviation, in the basis of Z, from which a second search comes down.
        most: evaluations of each search.
    """
    state = newton.advance(search.state, evaluate, rank_reductions(structures), most)
    return _judged(search, state, structures, one_minimum, far)


def _judged(
    search: Search, state: newton.State, structures: tuple[Structure, ...], one_minimum: Array | bool, far: float
) -> Search:
    """The searches with their new state: where one has ended, that is the end, or another begins."""
    xp = namespace(search.done)
    ended = state.done & ~search.done
    if is_nowhere(ended):
        return search._replace(state=state)
    new, best = newton.solution_of(state), search.best
    new = new._replace(free=new.free & moving(new.x, structures))
    converged, had = new.result == int(Result.CONVERGED), best.result == int(Result.CONVERGED)
    lower = new.value < best.value - newton.value_tolerance(new.value.dtype)
    take = ended & (~search.again | (converged & (~had | lower)))
    iterations = best.iterations + xp.where(ended, new.iterations, 0)
    best = newton.where(take, new, best)._replace(iterations=iterations)
    doubtful = ended & ~search.again & ~(converged & (new.free.all(0) | one_minimum))
    if is_nowhere(doubtful):
        return Search(state, search.again, best, search.done | ended)
    start = cov.wide_start(far, structures, state.trial)
    restart = _begin_at(xp.broadcast_to(start[:, None], state.trial.shape), structures)
    state = newton.where(doubtful, restart, state)
    return Search(state, search.again | doubtful, best, search.done | (ended & ~doubtful))


def is_plain(x: Array, structures: tuple[Structure, ...], least: float = NEAR_ZERO) -> Array:
    """``(B,)`` the singular values of every term's Lambda are above ``least``: no reduction of rank would be tried."""
    parts = zip(structures, cov.cut(x, structures), strict=True)
    return namespace(x).stack([s.is_inside(part, least) for s, part in parts]).all(0)


def run(
    evaluate: Evaluate,
    x0: Array,
    structures: tuple[Structure, ...],
    far: float = FAR,
    most: int = MOST_ITERATIONS,
) -> Solution:
    """Search until every lane is done."""
    if namespace(x0) is np and x0.shape[1] == 1:
        found = straight(x0, float(_first_region(x0)[0]), evaluate, rank_reductions(structures))
        if isinstance(found, Solution):  # with clear curvature in every coordinate, so that all are moving
            return found
        begun = _judged(begin(x0, structures), found, structures, False, far)
    else:
        begun = begin(x0, structures)
    goes_on = lambda search: ~search.done.all()  # noqa: E731
    step = lambda search: advance(search, evaluate, structures, far=far, most=most)  # noqa: E731
    best: Solution = while_loop(goes_on, step, begun, namespace(x0)).best
    return best


def best_of(ends: list[Solution]) -> Solution:
    """The best of searches of one lane from several starts; its iterations count all of them."""
    best = ends[0]
    for other in ends[1:]:
        better = (other.result == int(Result.CONVERGED)) & (
            (best.result != int(Result.CONVERGED)) | (other.value < best.value - newton.value_tolerance(np.float64))
        )
        iterations = best.iterations + other.iterations
        best = (other if better.all() else best)._replace(iterations=iterations)
    return best


def _begin_at(x0: Array, structures: tuple[Structure, ...]) -> newton.State:
    return newton.begin(x0, _first_region(x0), rank_reductions(structures))


def _first_region(x0: Array) -> Array:
    xp = namespace(x0)
    return xp.maximum(REGION * xp.sqrt((x0 * x0).sum(0)), LEAST_REGION)


def rank_reductions(structures: tuple[Structure, ...]) -> Simplify:
    """Candidates with the rank of one term's covariance lowered, where what that sets to zero is small already."""
    starts = np.cumsum([0, *(s.n_reductions for s in structures)])

    def worthwhile(x: Array) -> Array:
        sizes = sizes_of(x, structures)
        return (sizes < NEAR_ZERO) & (sizes > 0)

    def candidate(x: Array, c: Array) -> tuple[Array, Array]:
        xp = namespace(x)
        parts = zip(structures, cov.cut(x, structures), starts[:-1], strict=True)
        xs, frees = zip(*(s.reduced(part, c - int(first)) for s, part, first in parts), strict=True)
        return xp.concatenate(xs), xp.concatenate(frees)

    return Simplify(int(starts[-1]), worthwhile, candidate)


def sizes_of(x: Array, structures: tuple[Structure, ...]) -> Array:
    """``(n_reductions, B)``: what each reduction would set to zero."""
    parts = zip(structures, cov.cut(x, structures), strict=True)
    return namespace(x).concatenate([s.sizes(part) for s, part in parts])


def moving(x: Array, structures: tuple[Structure, ...]) -> Array:
    """``(k, B)`` coordinates on which covariances depend at x: others, as a correlation beside a variance of zero, are
    not free at an end."""
    parts = zip(structures, cov.cut(x, structures), strict=True)
    return namespace(x).concatenate([s.moving(part) for s, part in parts])


class OwnFactors(NamedTuple):
    """Covariances of the effects of Z's own columns.

    Attributes:
        lambdas: per term its lower-triangular Lambda ``(q, q, ...)``. deficient: ``(...)`` one has less rank than
            covariances of its structure have.
        smooth: ``(...)`` all vary smoothly with the covariances.
    """

    lambdas: list[Array]
    deficient: Array
    smooth: Array


def own_factors(x: Array, bases: tuple[Basis, ...], layout: Layout) -> OwnFactors:
    """From the optimiser's coordinates ``(k, ...)`` to the user's columns; axes behind the first may be absent."""
    factors = zip(bases, cov.factors_of(x, layout.structures), layout.structures, strict=True)
    pairs = [own_factor(basis.R_inv, F, s.rank) for basis, F, s in factors]
    lambdas = [factor for factor, _ in pairs]
    smooth = [s.has_derivatives(factor) for s, factor in zip(layout.structures, lambdas, strict=True)]
    return OwnFactors(lambdas, stack([d for _, d in pairs]).any(0), stack(smooth).all(0))


def own_factor(R_inv: Array, Lambda: Array, full: int) -> tuple[Array, Array]:
    """Lower-triangular factor for the user's columns of Z, and whether it has less than the rank ``full``.

    Rank is judged in the basis of Z: there it does not depend on where a slope's column has its zero. In a singular
    factor a row that is nothing but rounding becomes zero.

    Args:
        R_inv: ``(q, q, ...)`` of the basis. Lambda: ``(q, q, ...)``, any factor in the basis.
    """
    xp = namespace(Lambda)
    rtol = rank_tolerance(Lambda.dtype)
    rank = _rank(Lambda, rtol)
    deficient = rank < len(Lambda)
    own = linalg.matmul(R_inv, Lambda)
    longest = (Lambda * Lambda).sum(1).max(0)
    rounding = rtol**2 * xp.abs(R_inv).sum(1) ** 2 * longest
    own = xp.where((deficient & ((own * own).sum(1) <= rounding))[:, None], 0.0, own)
    return decompositions.lower_factor(own, xp.where(deficient, rtol, 0.0)), rank < full


def _rank(Lambda: Array, rtol: float) -> Array:
    """Of factors ``(q, q, ...)``, judged row by row as :func:`~mixjax.decompositions.lower_factor` does."""
    q = len(Lambda)
    if isinstance(Lambda, np.ndarray) and not any(Lambda[i, i + 1 :].any() for i in range(q - 1)):
        # In a triangle whose diagonal is clear, a row's diagonal is what the rows above it leave of it.
        squares, i = Lambda * Lambda, np.arange(q)
        if (squares[i, i] > rtol**2 * squares.sum(1)).all():
            return np.full(Lambda.shape[2:], q)
    return (decompositions.lower_factor(Lambda, rtol) != 0).any(0).sum(0)


def result_code(solution: Solution, own: OwnFactors) -> Array:
    """The optimiser's code, or ``NONDIFFERENTIABLE`` for a converged fit whose derivatives do not exist."""
    edge = (solution.result == int(Result.CONVERGED)) & (solution.kink | ~own.smooth)
    return namespace(edge).where(edge, int(Result.NONDIFFERENTIABLE), solution.result)
