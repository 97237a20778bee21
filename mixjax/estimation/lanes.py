"""Many fits at once.

Replicates run in blocks of fixed size, aligned to their index: what a replicate's numbers are does not depend on how
many others there are, nor on chunks or threads. Within a block all replicates take the first step side by
side (in balanced designs it is often the last: the start is then the REML estimate itself); those that are not done
then queue for the lanes, which are refilled every few steps where their replicate is finished, so that the slowest
replicate does not hold the others.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.bases import Basis
from mixjax.design import AnyArray
from mixjax.estimation import search
from mixjax.estimation.search import RANK_RTOL, Search, leading_zero, own_factor, result_code
from mixjax.estimation.start import minque_start
from mixjax.likelihood.curvature import profile_lanes, value_gradient_hessian
from mixjax.likelihood.moments import Moments
from mixjax.optimise.newton import Solution

# Newton steps between two looks at which lanes are finished. Bookkeeping costs about as much as half a step.
STEPS = 3
# Arrays over lanes should stay in the cache: so many numbers each.
CACHED = 2**12


class Sizes(NamedTuple):
    """Static sizes of a program: replicates of a block, and lanes."""

    block: int
    lanes: int


class Bases(NamedTuple):
    """What leads back to the user's columns, lanes last or 1: X's ``R_inv``, ``beta0``, each Z's basis."""

    X_R_inv: AnyArray
    beta0: AnyArray
    Z: tuple[Basis, ...]


class Fits(NamedTuple):
    """Results of N fits, last axis; see :class:`~mixjax.estimation.estimate.Estimates`. ``x`` are the coordinates."""

    x: AnyArray
    theta: AnyArray
    beta: AnyArray
    sigma: AnyArray
    vcov: AnyArray
    criterion: AnyArray
    singular: AnyArray
    iterations: AnyArray
    grad_norm: AnyArray
    result: AnyArray


def sizes_for(moments: Moments, platform: str) -> Sizes:
    """Sizes for a structure; they depend on nothing else, so that results do not."""
    u, n_classes, k = moments.Uy.shape[0], moments.A.shape[2], moments.layout.n_theta
    numbers = max(n_classes, u * u // 2, k * k)  # of the largest arrays per lane
    if platform != "cpu":
        lanes = max(32, min(2**15, 2**22 // numbers))
        return Sizes(4 * lanes, lanes)
    lanes = 1 << max(3, min(8, (CACHED // numbers).bit_length() - 1 if numbers < CACHED else 3))
    return Sizes(16 * lanes, lanes)


def fit_block(moments: Moments, bases: Bases, count: Array, reml: Array, start: Array | None, sizes: Sizes) -> Fits:
    """Fit the first ``count`` of N replicates.

    Args:
        moments: lanes N = ``sizes.block`` last, or 1 where all replicates share.
        bases: likewise.
        count: the replicates behind it are padding and not looked at.
        start: ``(k, N)`` theta to start from, or None for moment estimates.
    """
    qs = moments.layout.qs
    N, L = sizes
    k = moments.layout.n_theta
    dtype = moments.UU.dtype

    def start_of(at, own):
        """Coordinates ``(k, L)`` of the tile's start."""
        if start is None:
            return minque_start(own)
        theta = jax.lax.dynamic_slice_in_dim(start, at, L, -1)
        lambdas = cov.lambdas_of_theta(theta, qs)
        in_basis = [linalg.matmul(Z.R, Lambda) for Z, Lambda in zip(_slice(bases, at, L, N).Z, lambdas, strict=True)]
        return _theta([linalg.lower_factor(Lambda, RANK_RTOL) for Lambda in in_basis], qs)

    tiles = jnp.asarray((count + L - 1) // L, jnp.int32)
    stored = search.begin(jnp.zeros((k, N), dtype), qs)
    idle = search.begin(jnp.zeros((k, L), dtype), qs)._replace(done=jnp.ones(L, bool))

    class Work(NamedTuple):
        tile: Array  # the next tile for a first step
        stored: Search  # of all N, as it stands
        replicate: Array  # (L,) which replicate is in each lane; N in an idle one
        lanes: Search
        own: Moments
        queue: Array  # (N,) replicates that wait for a lane
        waiting: Array  # how many they are
        taken: Array  # how many of them have been given one

    def first_step(work):
        """A tile of fresh replicates."""
        at = work.tile * L
        own = _slice(moments, at, L, N)
        x0 = jnp.broadcast_to(start_of(at, own), (k, L))
        return work._replace(replicate=at + jnp.arange(L, dtype=jnp.int32), lanes=search.begin(x0, qs), own=own)

    def refill(work):
        """Lanes that are done get the next replicates of the queue."""
        free = work.lanes.done | (work.replicate >= N)
        rank = work.taken + jnp.cumsum(free, dtype=jnp.int32) - 1
        fresh = jnp.where(rank < work.waiting, work.queue[jnp.minimum(rank, N - 1)], N)
        replicate = jnp.where(free, fresh, work.replicate)
        index = jnp.minimum(replicate, N - 1)
        lanes = jax.tree.map(lambda a, b: jnp.where(free, a, b), _take(work.stored, index, N), work.lanes)
        return work._replace(
            replicate=replicate,
            lanes=lanes._replace(done=lanes.done | (replicate >= N)),
            own=_take(moments, index, N),
            taken=jnp.minimum(work.taken + free.sum(dtype=jnp.int32), work.waiting),
        )

    def put_tile(work):
        return work._replace(stored=_put(work.stored, work.lanes, work.tile * L), tile=work.tile + 1)

    def put_ended(work):
        target = jnp.where(work.lanes.done, work.replicate, N)
        best = jax.tree.map(
            lambda all, new: all.at[..., target].set(new, mode="drop"), work.stored.best, work.lanes.best
        )
        return work._replace(stored=work.stored._replace(best=best))

    def enqueue(work):
        """All first steps are done: who is left waits for a lane."""
        left = ~work.stored.done & (jnp.arange(N) < count)
        place = jnp.where(left, jnp.cumsum(left) - 1, N)
        queue = jnp.zeros(N, jnp.int32).at[place].set(jnp.arange(N, dtype=jnp.int32), mode="drop")
        return work._replace(
            queue=queue, waiting=left.sum(dtype=jnp.int32), taken=jnp.int32(0), replicate=nobody, lanes=idle
        )

    def turn(work):
        fresh = work.tile < tiles
        work = jax.lax.cond(fresh, first_step, refill, work)
        steps = jnp.where(fresh, 1, STEPS)
        evaluate = partial(value_gradient_hessian, moments=work.own, reml=reml)
        lanes = jax.lax.fori_loop(0, steps, lambda _, lanes: search.advance(lanes, evaluate, qs), work.lanes)
        work = work._replace(lanes=lanes)
        work = jax.lax.cond(fresh, put_tile, put_ended, work)
        return jax.lax.cond(fresh & (work.tile == tiles), enqueue, lambda work: work, work)

    def goes_on(work):
        return (work.tile < tiles) | (work.taken < work.waiting) | ((work.replicate < N) & ~work.lanes.done).any()

    nobody = jnp.full(L, N, jnp.int32)
    none, zero = jnp.zeros(N, jnp.int32), jnp.int32(0)
    work = Work(zero, stored, nobody, idle, _slice(moments, 0, L, N), none, zero, zero)
    best = jax.lax.while_loop(goes_on, turn, work).stored.best

    def finish_tile(tile, fits):
        own, solution, own_bases = (_slice(tree, tile * L, L, N) for tree in (moments, best, bases))
        return _put(fits, finish(solution, own, own_bases, reml), tile * L)

    shapes = jax.eval_shape(
        lambda: finish(_slice(best, 0, L, N), _slice(moments, 0, L, N), _slice(bases, 0, L, N), reml)
    )
    empty = jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape[:-1], N), leaf.dtype), shapes)
    return jax.lax.fori_loop(0, tiles, finish_tile, empty)


def finish(solution: Solution, moments: Moments, bases: Bases, reml: Array) -> Fits:
    """All that follows from the optimiser's coordinates, on the scale of the original columns."""
    qs = moments.layout.qs
    lambdas = cov.lambdas_of_theta(solution.x, qs)
    lanes = profile_lanes(solution.x, moments, reml)
    pairs = [own_factor(basis.R_inv, Lambda) for basis, Lambda in zip(bases.Z, lambdas, strict=True)]
    own = [factor for factor, _ in pairs]
    singular = jnp.stack([deficient for _, deficient in pairs]).any(0)
    result = result_code(solution, jnp.stack([leading_zero(factor) for factor in own]).any(0))
    X_R_inv = bases.X_R_inv
    scaled = linalg.matmul(linalg.matmul(X_R_inv, lanes.XX_inverse), linalg.transpose(X_R_inv))
    return Fits(
        x=solution.x,
        theta=_theta(own, qs),
        beta=bases.beta0 + linalg.matmul(X_R_inv, lanes.delta[:, None])[:, 0],
        sigma=lanes.sigma,
        vcov=lanes.sigma**2 * scaled,
        criterion=lanes.criterion,
        singular=singular,
        iterations=solution.iterations,
        grad_norm=solution.scaled_gradient,
        result=result,
    )


def _theta(lambdas: list[Array], qs: tuple[int, ...]) -> Array:
    return jnp.concatenate([cov.theta_of_lambda(L, q) for L, q in zip(lambdas, qs, strict=True)])


def _slice(tree: Any, at: Array | int, size: int, N: int) -> Any:
    """Replicates ``at .. at + size - 1`` of what has N in the last axis."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, at, size, -1) if a.shape[-1] == N else a, tree)


def _put(tree: Any, part: Any, at: Array) -> Any:
    return jax.tree.map(lambda all, new: jax.lax.dynamic_update_slice_in_dim(all, new, at, -1), tree, part)


def _take(tree: Any, index: Array, N: int) -> Any:
    return jax.tree.map(lambda a: a[..., index] if a.shape[-1] == N else a, tree)
