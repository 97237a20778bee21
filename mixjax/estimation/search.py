"""The search for the minimum of the criterion, in many lanes: one search, and a second one where the first is doubtful.

Local minima that are not global are singular in all cases seen: the search fell into rank deficiency on its way. So
where the first search ends singular, or fails, a second one comes down from large variances, and the better of the two
is taken.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.optimise import newton
from mixjax.optimise.newton import Evaluate, Simplify, Solution
from mixjax.optimise.results import Result

# A row of a factor of the covariance that lies in the span of the rows above it up to this part of its length counts
# as dependent: the correlation is then 1 to twice as many digits.
RANK_RTOL = 1e-8
# Singular values of Lambda (in the basis of Z, so free of scale) below this are worth an attempt to set them to zero.
NEAR_ZERO = 1e-2
# Standard deviation ratio, in the basis of Z, from which a second search comes down.
FAR = 10.0
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


def begin(x0: Array, qs: tuple[int, ...], iterations: Array | int = 0) -> Search:
    """Searches that start at ``x0 (k, B)``, for terms of q effects each, after so many evaluations already."""
    lanes = x0.shape[1:]
    nothing = Solution(
        x=x0,
        value=jnp.full(lanes, jnp.inf, x0.dtype),
        free=jnp.ones(x0.shape, bool),
        kink=jnp.zeros(lanes, bool),
        scaled_gradient=jnp.full(lanes, jnp.inf, x0.dtype),
        iterations=jnp.broadcast_to(jnp.asarray(iterations, int), lanes),
        result=jnp.full(lanes, int(Result.NOT_FINITE)),
    )
    return Search(_begin_at(x0, qs), jnp.zeros(lanes, bool), nothing, jnp.zeros(lanes, bool))


def advance(search: Search, evaluate: Evaluate, qs: tuple[int, ...], one_minimum: Array | bool = False) -> Search:
    """One evaluation in every lane that is not done.

    Args:
        one_minimum: ``(B,)`` or one bool: the criterion is known to have no other minimum, so that no end is doubtful.
    """
    state = newton.advance(search.state, evaluate, rank_reductions(qs))
    ended = state.done & ~search.done
    new, best = newton.solution_of(state), search.best
    converged, had = new.result == int(Result.CONVERGED), best.result == int(Result.CONVERGED)
    lower = new.value < best.value - newton.value_tolerance(new.value.dtype)
    take = ended & (~search.again | (converged & (~had | lower)))
    iterations = best.iterations + jnp.where(ended, new.iterations, 0)
    best = jax.tree.map(lambda a, b: jnp.where(take, a, b), new, best)._replace(iterations=iterations)
    doubtful = ended & ~search.again & ~(converged & (new.free.all(0) | one_minimum))
    restart = _begin_at(jnp.broadcast_to(_far(qs, state.trial.dtype)[:, None], state.trial.shape), qs)
    state = jax.tree.map(lambda a, b: jnp.where(doubtful, a, b), restart, state)
    return Search(state, search.again | doubtful, best, search.done | (ended & ~doubtful))


def is_plain(x: Array, qs: tuple[int, ...], least: float = NEAR_ZERO) -> Array:
    """``(B,)`` the singular values of every term's Lambda are above ``least``: no reduction of rank would be tried."""
    clear = [
        linalg.is_positive(linalg.matmul(L, linalg.transpose(L)) - least**2 * jnp.eye(q, dtype=x.dtype)[..., None])
        for L, q in zip(cov.lambdas_of_theta(x, qs), qs, strict=True)
    ]
    return jnp.stack(clear).all(0)


def run(evaluate: Evaluate, x0: Array, qs: tuple[int, ...]) -> Solution:
    """Search until every lane is done."""
    goes_on = lambda search: ~search.done.all()  # noqa: E731
    return jax.lax.while_loop(goes_on, lambda search: advance(search, evaluate, qs), begin(x0, qs)).best


def _begin_at(x0: Array, qs: tuple[int, ...]) -> newton.State:
    length = jnp.sqrt((x0 * x0).sum(0))
    return newton.begin(x0, jnp.maximum(REGION * length, LEAST_REGION), rank_reductions(qs))


def _far(qs: tuple[int, ...], dtype) -> Array:
    return jnp.concatenate([cov.theta_of_lambda(FAR * jnp.eye(q, dtype=dtype), q) for q in qs])


def rank_reductions(qs: tuple[int, ...]) -> Simplify:
    """Candidates with the smallest singular values of one term's Lambda set to zero: rank q - 1, then q - 2, ..."""
    which = [(t, rank) for t, q in enumerate(qs) for rank in reversed(range(q))]

    def decompose(x):
        return [linalg.orthogonal_columns(Lambda) for Lambda in cov.lambdas_of_theta(x, qs)]

    def worthwhile(x):
        values = [S for _, S in decompose(x)]
        return jnp.stack([(values[t][rank] < NEAR_ZERO) & (values[t][rank] > 0) for t, rank in which])

    def candidate(x, c):
        xs, frees = [], []
        for t, (part, (columns, _)) in enumerate(zip(cov.split(x, qs), decompose(x), strict=True)):
            q = qs[t]
            first = sum(qs[:t])
            rank = q - 1 - (c - first)
            chosen = (c >= first) & (c < first + q)
            reduced = linalg.lower_factor(jnp.where(jnp.arange(q)[:, None] < rank, columns, 0.0), RANK_RTOL)
            theta = jnp.where(chosen, cov.theta_of_lambda(reduced, q), part)
            xs.append(theta)
            nonzero = (cov.lambda_of_theta(theta, q) != 0).any(0)  # (q, B), by column
            frees.append(nonzero[cov.triangle(q)[1]])
        return jnp.concatenate(xs), jnp.concatenate(frees)

    return Simplify(len(which), worthwhile, candidate)


def own_factor(R_inv: Array, Lambda: Array) -> tuple[Array, Array]:
    """Lower-triangular factor for the user's columns of Z, and whether it has less than full rank.

    Rank is judged in the basis of Z: there it does not depend on where a slope's column has its zero. In a singular
    factor a row that is nothing but rounding becomes zero.

    Args:
        R_inv: ``(q, q, ...)`` of the basis. Lambda: ``(q, q, ...)``, any factor in the basis.
    """
    deficient = (~(linalg.lower_factor(Lambda, RANK_RTOL) != 0).any(0)).any(0)
    own = linalg.matmul(R_inv, Lambda)
    longest = (Lambda * Lambda).sum(1).max(0)
    rounding = RANK_RTOL**2 * jnp.abs(R_inv).sum(1) ** 2 * longest
    own = jnp.where((deficient & ((own * own).sum(1) <= rounding))[:, None], 0.0, own)
    return linalg.lower_factor(own, jnp.where(deficient, RANK_RTOL, 0.0)), deficient


def leading_zero(Lambda: Array) -> Array:
    """A zero column of ``Lambda (q, q, ...)`` in front of one that is not zero."""
    nonzero = (Lambda != 0).any(0)
    behind = jnp.flip(jnp.cumsum(jnp.flip(nonzero.astype(int), 0), 0), 0)
    return (~nonzero & (behind > 0)).any(0)


def result_code(solution: Solution, turned: Array) -> Array:
    """The optimiser's code, or ``NONDIFFERENTIABLE`` for a converged fit whose derivatives do not exist."""
    edge = (solution.result == int(Result.CONVERGED)) & (solution.kink | turned)
    return jnp.where(edge, int(Result.NONDIFFERENTIABLE), solution.result)
