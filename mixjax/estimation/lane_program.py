"""Many fits at once.

Replicates run in blocks of fixed size, aligned to their index: what a replicate's numbers are does not depend on how
many others there are, nor on chunks or threads. A block is worked through twice. First, tile by tile, a few direct
Newton steps side by side (in balanced designs one is often enough: the start is then the REML estimate itself). Those
that need more, for a boundary, a saddle, or a slow tail, queue for the lanes of the full search, which are fewer and
are refilled every few steps where their replicate is finished, so that the slowest replicate does not hold the others.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.covariance import LOWEST
from mixjax.design import AnyArray
from mixjax.engine.lanes import Lanes
from mixjax.engine.moments import Moments
from mixjax.engine.scalar_lanes import serves
from mixjax.estimation import search
from mixjax.estimation.search import Search, own_factors, result_code
from mixjax.estimation.start import minque_start
from mixjax.machine import Array
from mixjax.optimise.newton import Solution, advance_directly, begin_directly

# Newton steps between two looks at which lanes are finished. Bookkeeping costs about as much as half a step.
STEPS = 3
# A lane whose Lambda has a singular value below this is on its way to the boundary, or started there, and leaves the
# direct steps, which the others of its tile would have to go on with. Each lane decides for itself: then its numbers do
# not depend on its neighbours.
INSIDE = 1.2 * LOWEST
# Arrays over lanes should stay in the cache: so many numbers each.
CACHED = 2**12
# The same of lanes with one variance ratio each.
SCALAR_CACHED = 2**16


class Sizes(NamedTuple):
    """Static sizes of a program.

    Attributes:
        block: replicates. lanes: of the direct steps. narrow: lanes of the full search of those that are left.
        direct: direct steps of a tile at most.
    """

    block: int
    lanes: int
    narrow: int
    direct: int


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
    u, n_classes, k = moments.Uy.shape[0], moments.A.shape[2], moments.layout.k
    numbers = max(n_classes, u * u // 2, k * k)  # of the largest arrays per lane
    direct = direct_steps(moments)
    if platform != "cpu":
        lanes = max(32, min(2**15, 2**22 // numbers))
        return Sizes(4 * lanes, lanes, lanes, direct)
    if serves(moments):  # few arrays, and each operation on more lanes costs less
        lanes = 1 << max(3, min(6, (SCALAR_CACHED // numbers).bit_length() - 1))
        return Sizes(16 * lanes, lanes, max(16, lanes // 4), direct)
    lanes = 1 << max(3, min(8, (CACHED // numbers).bit_length() - 1 if numbers < CACHED else 3))
    return Sizes(16 * lanes, lanes, max(16, lanes // 4), direct)


def direct_steps(moments: Moments) -> int:
    """How many come first. A direct step costs half of a full one, but a tile takes as many as its slowest lane: few
    where they are dear. The structure alone decides, so that NumPy and XLA go the same way."""
    return 5 if moments.A.shape[0] < 3 and not moments.dense else 1


def fit_block(lanes: Lanes, count: Array, start: Array | None, one_minimum: AnyArray, sizes: Sizes) -> Fits:
    """Fit the first ``count`` of N replicates: a few direct steps of all, tile by tile; the full search of those who
    need it, from a queue; and what follows from the coordinates.

    Args:
        lanes: N = ``sizes.block`` in the last axis, or 1 where all replicates share.
        count: the replicates behind it are padding and not looked at.
        start: ``(k, N)`` theta to start from, or None for moment estimates.
        one_minimum: ``()`` bool, see :func:`~mixjax.estimation.search.advance`.
    """
    tiles = jnp.asarray((count + sizes.lanes - 1) // sizes.lanes, jnp.int32)
    x, done, best = _directly(lanes, tiles, start, sizes)
    best = _searched(lanes, x, best, ~done & (jnp.arange(sizes.block) < count), one_minimum, sizes)
    return _finished(lanes, tiles, best, sizes)


def _directly(lanes: Lanes, tiles: Array, start: Array | None, sizes: Sizes) -> tuple[Array, Array, Solution]:
    """Direct steps from the start: where each replicate stands, ``(k, N)``, whether it is done, ``(N,)``, and its
    solution if so."""
    structures, k = lanes.layout.structures, lanes.layout.k
    N, L = sizes.block, sizes.lanes
    is_plain = partial(search.is_plain, structures=structures, least=INSIDE)

    def of_tile(tile: Array, found: Any) -> Any:
        own = slice_of(lanes, tile * L, L, N)
        if start is None:
            begin = minque_start(own.moments)
        else:
            begin = start_in_lanes(jax.lax.dynamic_slice_in_dim(start, tile * L, L, -1), own)
        direct = begin_directly(jnp.broadcast_to(begin, (k, L)))
        _, direct = jax.lax.while_loop(
            lambda carry: (carry[0] < sizes.direct) & carry[1].going.any(),
            lambda carry: (carry[0] + 1, advance_directly(carry[1], own.evaluate, is_plain, search.REGION)),
            (jnp.int32(0), direct),
        )
        return put(found, (direct.x, direct.converged, direct.solution()), tile * L)

    nothing = search.begin(jnp.zeros((k, N), lanes.moments.UU.dtype), structures).best
    found: tuple[Array, Array, Solution] = jax.lax.fori_loop(
        0, tiles, of_tile, (nothing.x, jnp.zeros(N, bool), nothing)
    )
    return found


class _Work(NamedTuple):
    """The queue being worked off.

    Attributes:
        best: of all N. replicate: ``(M,)`` which one is in each lane; N in an idle one. searches, own: of the lanes.
        taken: how many of the queue have been given a lane.
    """

    best: Solution
    replicate: Array
    searches: Search
    own: Lanes
    taken: Array


def _searched(lanes: Lanes, x: Array, best: Solution, left: Array, one_minimum: AnyArray, sizes: Sizes) -> Solution:
    """The full search of the replicates ``left (N,)`` from ``x (k, N)``, in M lanes; a lane that is done gets the next
    of the queue."""
    structures, k = lanes.layout.structures, lanes.layout.k
    N, M = sizes.block, sizes.narrow
    place = jnp.where(left, jnp.cumsum(left) - 1, N)
    queue = jnp.zeros(N, jnp.int32).at[place].set(jnp.arange(N, dtype=jnp.int32), mode="drop")
    waiting = left.sum(dtype=jnp.int32)
    before = best.iterations

    def refill(work: _Work) -> _Work:
        free = work.searches.done | (work.replicate >= N)
        rank = work.taken + jnp.cumsum(free, dtype=jnp.int32) - 1
        fresh = jnp.where(rank < waiting, queue[jnp.minimum(rank, N - 1)], N)
        replicate = jnp.where(free, fresh, work.replicate)
        index = jnp.minimum(replicate, N - 1)
        begun = search.begin(x[:, index], structures, before[index])
        searches = jax.tree.map(lambda a, b: jnp.where(free, a, b), begun, work.searches)
        return work._replace(
            replicate=replicate,
            searches=searches._replace(done=searches.done | (replicate >= N)),
            own=_take(lanes, index, N),
            taken=jnp.minimum(work.taken + free.sum(dtype=jnp.int32), waiting),
        )

    def turn(work: _Work) -> _Work:
        work = refill(work)
        searches = jax.lax.fori_loop(
            0, STEPS, lambda _, s: search.advance(s, work.own.evaluate, structures, one_minimum), work.searches
        )
        target = jnp.where(searches.done, work.replicate, N)
        found = jax.tree.map(lambda all, new: all.at[..., target].set(new, mode="drop"), work.best, searches.best)
        return work._replace(searches=searches, best=found)

    def goes_on(work: _Work) -> Array:
        return (work.taken < waiting) | ((work.replicate < N) & ~work.searches.done).any()

    idle = search.begin(jnp.zeros((k, M), x.dtype), structures)._replace(done=jnp.ones(M, bool))
    work = _Work(best, jnp.full(M, N, jnp.int32), idle, slice_of(lanes, 0, M, N), jnp.int32(0))
    return jax.lax.while_loop(goes_on, turn, work).best


def _finished(lanes: Lanes, tiles: Array, best: Solution, sizes: Sizes) -> Fits:
    """:func:`finish` of all replicates, tile by tile."""
    N, L = sizes.block, sizes.lanes

    def of_tile(tile: Array, fits: Fits) -> Fits:
        own, solution = (slice_of(tree, tile * L, L, N) for tree in (lanes, best))
        filled: Fits = put(fits, finish(solution, own), tile * L)
        return filled

    shapes = jax.eval_shape(lambda: finish(slice_of(best, 0, L, N), slice_of(lanes, 0, L, N)))
    empty = jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape[:-1], N), leaf.dtype), shapes)
    fits: Fits = jax.lax.fori_loop(0, tiles, of_tile, empty)
    return fits


def start_in_lanes(theta: Array, lanes: Lanes) -> Array:
    """Coordinates near ``theta (k, B)``, from which a search may start."""
    lambdas = cov.lambdas_of_theta(theta, lanes.layout.qs)
    in_basis = [linalg.matmul(Z.R, Lambda) for Z, Lambda in zip(lanes.bases.Z, lambdas, strict=True)]
    return cov.near(in_basis, lanes.layout.structures)


def finish(solution: Solution, lanes: Lanes) -> Fits:
    """All that follows from the optimiser's coordinates, on the scale of the original columns."""
    at = lanes.profiled(solution.x)
    own = own_factors(solution.x, lanes.bases.Z, lanes.layout)
    X_R_inv = lanes.bases.X_R_inv
    scaled = linalg.matmul(linalg.matmul(X_R_inv, at.XX_inverse), linalg.transpose(X_R_inv))
    return Fits(
        x=solution.x,
        theta=cov.theta_of_lambdas(own.lambdas),
        beta=lanes.bases.beta0 + linalg.matmul(X_R_inv, at.delta[:, None])[:, 0],
        sigma=at.sigma,
        vcov=at.sigma**2 * scaled,
        criterion=at.criterion,
        singular=own.deficient,
        iterations=solution.iterations,
        grad_norm=solution.scaled_gradient,
        result=result_code(solution, own),
    )


def slice_of(tree: Any, at: Array | int, size: int, N: int) -> Any:
    """Replicates ``at .. at + size - 1`` of what has N in the last axis."""
    return jax.tree.map(
        lambda a: jax.lax.dynamic_slice_in_dim(a, at, size, -1) if np.shape(a)[-1:] == (N,) else a, tree
    )


def put(tree: Any, part: Any, at: Array) -> Any:
    return jax.tree.map(lambda all, new: jax.lax.dynamic_update_slice_in_dim(all, new, at, -1), tree, part)


def _take(tree: Any, index: Array, N: int) -> Any:
    return jax.tree.map(lambda a: a[..., index] if np.shape(a)[-1:] == (N,) else a, tree)
