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
from mixjax.bases import Basis
from mixjax.design import AnyArray
from mixjax.engine.curvature import profile_lanes, value_gradient_hessian
from mixjax.engine.moments import Moments
from mixjax.estimation import search
from mixjax.estimation.search import Search, own_factors, result_code
from mixjax.estimation.start import LOWEST, minque_start
from mixjax.machine import Array, lanes_of, silently
from mixjax.optimise.newton import Solution, advance_directly, begin_directly
from mixjax.optimise.results import Result

# Newton steps between two looks at which lanes are finished. Bookkeeping costs about as much as half a step.
STEPS = 3
# A lane whose Lambda has a singular value below this is on its way to the boundary, or started there, and leaves the
# direct steps, which the others of its tile would have to go on with. Each lane decides for itself: then its numbers do
# not depend on its neighbours.
INSIDE = 1.2 * LOWEST
# Arrays over lanes should stay in the cache: so many numbers each.
CACHED = 2**12


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
    u, n_classes, k = moments.Uy.shape[0], moments.A.shape[2], moments.layout.k
    numbers = max(n_classes, u * u // 2, k * k)  # of the largest arrays per lane
    # A direct step costs half of a full one, but a tile takes as many as its slowest lane: not where they are dear.
    direct = 5 if moments.A.shape[0] < 3 and not moments.dense else 1
    if platform != "cpu":
        lanes = max(32, min(2**15, 2**22 // numbers))
        return Sizes(4 * lanes, lanes, lanes, direct)
    lanes = 1 << max(3, min(8, (CACHED // numbers).bit_length() - 1 if numbers < CACHED else 3))
    return Sizes(16 * lanes, lanes, max(16, lanes // 4), direct)


def fit_block(
    moments: Moments,
    bases: Bases,
    count: Array,
    reml: Array,
    start: Array | None,
    one_minimum: AnyArray,
    sizes: Sizes,
) -> Fits:
    """Fit the first ``count`` of N replicates.

    Args:
        moments: lanes N = ``sizes.block`` last, or 1 where all replicates share.
        bases: likewise.
        count: the replicates behind it are padding and not looked at.
        start: ``(k, N)`` theta to start from, or None for moment estimates.
        one_minimum: ``()`` bool, see :func:`~mixjax.estimation.search.advance`.
    """
    structures = moments.layout.structures
    N, L, M, n_direct = sizes
    k = moments.layout.k
    dtype = moments.UU.dtype

    def start_of(at, own):
        """Coordinates ``(k, L)`` of the tile's start."""
        if start is None:
            return minque_start(own)
        theta = jax.lax.dynamic_slice_in_dim(start, at, L, -1)
        lambdas = cov.lambdas_of_theta(theta, moments.layout.qs)
        in_basis = [linalg.matmul(Z.R, Lambda) for Z, Lambda in zip(slice_of(bases, at, L, N).Z, lambdas, strict=True)]
        return cov.near(in_basis, structures)

    is_plain = partial(search.is_plain, structures=structures, least=INSIDE)

    def first_steps(tile, found):
        """Direct steps of a tile of fresh replicates: where each stands, whether it is done, the solution if so."""
        at = tile * L
        own = slice_of(moments, at, L, N)
        evaluate = partial(value_gradient_hessian, moments=own, reml=reml)
        direct = begin_directly(jnp.broadcast_to(start_of(at, own), (k, L)))
        _, direct = jax.lax.while_loop(
            lambda carry: (carry[0] < n_direct) & carry[1].going.any(),
            lambda carry: (carry[0] + 1, advance_directly(carry[1], evaluate, is_plain, search.REGION)),
            (jnp.int32(0), direct),
        )
        return put(found, (direct.x, direct.converged, direct.solution()), at)

    tiles = jnp.asarray((count + L - 1) // L, jnp.int32)
    nothing = search.begin(jnp.zeros((k, N), dtype), structures).best
    x, done, best = jax.lax.fori_loop(0, tiles, first_steps, (nothing.x, jnp.zeros(N, bool), nothing))

    left = ~done & (jnp.arange(N) < count)
    place = jnp.where(left, jnp.cumsum(left) - 1, N)
    queue = jnp.zeros(N, jnp.int32).at[place].set(jnp.arange(N, dtype=jnp.int32), mode="drop")
    waiting = left.sum(dtype=jnp.int32)

    class Work(NamedTuple):
        best: Solution  # of all N
        replicate: Array  # (M,) which replicate is in each lane; N in an idle one
        lanes: Search
        own: Moments
        taken: Array  # how many of the queue have been given a lane

    def refill(work):
        """Lanes that are done get the next replicates of the queue."""
        free = work.lanes.done | (work.replicate >= N)
        rank = work.taken + jnp.cumsum(free, dtype=jnp.int32) - 1
        fresh = jnp.where(rank < waiting, queue[jnp.minimum(rank, N - 1)], N)
        replicate = jnp.where(free, fresh, work.replicate)
        index = jnp.minimum(replicate, N - 1)
        begun = search.begin(x[:, index], structures, best.iterations[index])
        lanes = jax.tree.map(lambda a, b: jnp.where(free, a, b), begun, work.lanes)
        return work._replace(
            replicate=replicate,
            lanes=lanes._replace(done=lanes.done | (replicate >= N)),
            own=_take(moments, index, N),
            taken=jnp.minimum(work.taken + free.sum(dtype=jnp.int32), waiting),
        )

    def turn(work):
        work = refill(work)
        evaluate = partial(value_gradient_hessian, moments=work.own, reml=reml)
        lanes = jax.lax.fori_loop(
            0, STEPS, lambda _, lanes: search.advance(lanes, evaluate, structures, one_minimum), work.lanes
        )
        target = jnp.where(lanes.done, work.replicate, N)
        best = jax.tree.map(lambda all, new: all.at[..., target].set(new, mode="drop"), work.best, lanes.best)
        return work._replace(lanes=lanes, best=best)

    def goes_on(work):
        return (work.taken < waiting) | ((work.replicate < N) & ~work.lanes.done).any()

    idle = search.begin(jnp.zeros((k, M), dtype), structures)._replace(done=jnp.ones(M, bool))
    work = Work(best, jnp.full(M, N, jnp.int32), idle, slice_of(moments, 0, M, N), jnp.int32(0))
    best = jax.lax.while_loop(goes_on, turn, work).best

    def finish_tile(tile, fits):
        own, solution, own_bases = (slice_of(tree, tile * L, L, N) for tree in (moments, best, bases))
        return put(fits, finish(solution, own, own_bases, reml), tile * L)

    shapes = jax.eval_shape(
        lambda: finish(slice_of(best, 0, L, N), slice_of(moments, 0, L, N), slice_of(bases, 0, L, N), reml)
    )
    empty = jax.tree.map(lambda leaf: jnp.zeros((*leaf.shape[:-1], N), leaf.dtype), shapes)
    return jax.lax.fori_loop(0, tiles, finish_tile, empty)


# --- by NumPy -------------------------------------------------------------------------------------------------------

# Numbers of the largest array of a tile of lanes, so that it stays in the cache, and lanes at most.
TILE_NUMBERS, MOST_LANES = 2**15, 512
# What the number of lanes is a multiple of, so that the last bits of a lane do not depend on how many others there are:
# BLAS and NumPy sum the remainder of a row in another order.
MULTIPLE = 16


def fit_block_at_once(
    moments: Moments, bases: Bases, count: int, reml: bool, start: np.ndarray | None, one_minimum: bool, sizes: Sizes
) -> Fits:
    """As :func:`fit_block`, by NumPy: lanes that are done are dropped. Returns the first ``count`` replicates."""
    structures, k = moments.layout.structures, moments.layout.k
    N = sizes.block
    tile = tile_of(moments)
    with silently():
        found = Solution(*(np.array(a) for a in search.begin(np.zeros((k, count)), structures).best))
        x = np.zeros((k, count))
        is_plain = partial(search.is_plain, structures=structures, least=INSIDE)
        for first in range(0, count, tile):
            at = np.arange(first, min(first + tile, count))
            own = lanes_of(moments, padded_lanes(at), N)
            begun = minque_start(own) if start is None else _start_at(start, bases, padded_lanes(at), moments, N)
            state = begin_directly(np.array(np.broadcast_to(begun, (k, len(padded_lanes(at))))))
            for _ in range(sizes.direct):
                evaluate = partial(value_gradient_hessian, moments=own, reml=reml)
                state = advance_directly(state, evaluate, is_plain, search.REGION)
                x[:, at] = state.x[:, : len(at)]
                _store(found, at, state.solution())
                going = np.flatnonzero(state.going[: len(at)])
                if not len(going):
                    break
                at, lanes = at[going], padded_lanes(going)
                state, own = lanes_of(state, lanes), lanes_of(moments, padded_lanes(at), N)
        left = np.flatnonzero(found.result != int(Result.CONVERGED))
        for first in range(0, len(left), tile):
            at = left[first : first + tile]
            begun = search.begin(x[:, padded_lanes(at)], structures, found.iterations[padded_lanes(at)])
            _search(begun, at, moments, N, reml, one_minimum, found)
        every = padded_lanes(np.arange(count))
        fits = finish(lanes_of(found, every), lanes_of(moments, every, N), lanes_of(bases, every, N), reml)
        return lanes_of(fits, np.arange(count))


def _search(
    state: Search, at: np.ndarray, moments: Moments, N: int, reml: bool, one_minimum: bool, found: Solution
) -> None:
    """The full search of replicates ``at``; its ends are put into ``found``."""
    structures = moments.layout.structures
    own = lanes_of(moments, padded_lanes(at), N)
    while len(at):
        evaluate = partial(value_gradient_hessian, moments=own, reml=reml)
        state = search.advance(state, evaluate, structures, one_minimum)
        done = state.done[: len(at)]
        if not done.any():
            continue
        _store(found, at[done], lanes_of(state.best, np.flatnonzero(done)))
        going = np.flatnonzero(~done)
        if len(going):
            at, lanes = at[going], padded_lanes(going)
            state = lanes_of(state, lanes)
            own = lanes_of(moments, padded_lanes(at), N)
        else:
            at = at[:0]


def tile_of(moments: Moments) -> int:
    """Lanes that NumPy works on side by side."""
    q, C, u = moments.A.shape[0], moments.A.shape[2], moments.Uy.shape[0]
    numbers = max(C * q * q, u * u) * (1 + q * (q + 1) // 2)
    return max(MULTIPLE, min(MOST_LANES, TILE_NUMBERS // numbers // MULTIPLE * MULTIPLE))


def padded_lanes(at: np.ndarray) -> np.ndarray:
    """Lanes, the last one repeated so that their number is a multiple."""
    return np.append(at, np.repeat(at[-1], -len(at) % MULTIPLE))


def _store(found: Solution, at: np.ndarray, part: Solution) -> None:
    for whole, new in zip(found, part, strict=True):
        whole[..., at] = new[..., : len(at)]


def _start_at(start: np.ndarray, bases: Bases, at: np.ndarray, moments: Moments, N: int) -> np.ndarray:
    lambdas = cov.lambdas_of_theta(start[:, at], moments.layout.qs)
    in_basis = [linalg.matmul(Z.R, L) for Z, L in zip(lanes_of(bases, at, N).Z, lambdas, strict=True)]
    return cov.near(in_basis, moments.layout.structures)


def finish(solution: Solution, moments: Moments, bases: Bases, reml: Array | bool) -> Fits:
    """All that follows from the optimiser's coordinates, on the scale of the original columns."""
    lanes = profile_lanes(solution.x, moments, reml)
    own = own_factors(solution.x, bases.Z, moments.layout)
    X_R_inv = bases.X_R_inv
    scaled = linalg.matmul(linalg.matmul(X_R_inv, lanes.XX_inverse), linalg.transpose(X_R_inv))
    return Fits(
        x=solution.x,
        theta=cov.theta_of_lambdas(own.lambdas),
        beta=bases.beta0 + linalg.matmul(X_R_inv, lanes.delta[:, None])[:, 0],
        sigma=lanes.sigma,
        vcov=lanes.sigma**2 * scaled,
        criterion=lanes.criterion,
        singular=own.deficient,
        iterations=solution.iterations,
        grad_norm=solution.scaled_gradient,
        result=result_code(solution, own),
    )


def slice_of(tree: Any, at: Array | int, size: int, N: int) -> Any:
    """Replicates ``at .. at + size - 1`` of what has N in the last axis."""
    return jax.tree.map(lambda a: jax.lax.dynamic_slice_in_dim(a, at, size, -1) if a.shape[-1] == N else a, tree)


def put(tree: Any, part: Any, at: Array) -> Any:
    return jax.tree.map(lambda all, new: jax.lax.dynamic_update_slice_in_dim(all, new, at, -1), tree, part)


def _take(tree: Any, index: Array, N: int) -> Any:
    return jax.tree.map(lambda a: a[..., index] if a.shape[-1] == N else a, tree)
