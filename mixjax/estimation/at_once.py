"""Many fits by NumPy: data sets in the lanes of one search, which those that are done leave.

Nothing is compiled, and what one fit costs beside its arithmetic is shared by all. What takes long enough to be worth a
compiled program on all cores belongs to :mod:`mixjax.estimation.many`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from mixjax import decompositions
from mixjax.covariance import Structure
from mixjax.engine.curvature import minque_equations
from mixjax.engine.lanes import Lanes
from mixjax.engine.moments import RowSums
from mixjax.engine.scalar_lanes import serves
from mixjax.estimation import search
from mixjax.estimation.lane_program import INSIDE, Fits, direct_steps, finish, start_in_lanes
from mixjax.estimation.search import Search
from mixjax.estimation.start import minque_start
from mixjax.machine import lanes_of, silently
from mixjax.optimise.newton import Evaluate, Solution, advance_directly, begin_directly
from mixjax.optimise.results import Result

# Numbers of the largest array of a tile of lanes, so that it stays in the cache, and lanes at most.
TILE_NUMBERS, MOST_LANES = 2**15, 512
# The same of lanes with one variance ratio each, which take few operations.
SCALAR_NUMBERS = 2**17
# The same of lanes that are matrices of their own each.
TOGETHER = 2**22
# What the number of lanes is a multiple of, so that the last bits of a lane do not depend on how many others there are:
# BLAS and NumPy sum the remainder of a row in another order.
MULTIPLE = 16


def fit_lanes(lanes: Lanes, count: int, start: np.ndarray | None, one_minimum: bool = False) -> Fits:
    """Fit the first ``count`` lanes; see :func:`~mixjax.estimation.lane_program.fit_block`.

    Args:
        start: ``(k, N)`` theta to start from, or None for moment estimates.
        one_minimum: see :func:`~mixjax.estimation.search.advance`.
    """
    structures, k = lanes.layout.structures, lanes.layout.k
    N, tile = lanes.moments.yy.shape[-1], tile_of(lanes)
    with silently():
        found = Solution(*(np.array(a) for a in search.begin(np.zeros((k, count)), structures).best))
        x = np.zeros((k, count))
        is_plain = partial(search.is_plain, structures=structures, least=INSIDE)
        is_shared = start is None and lanes.moments.UU.shape[-1] < N
        shared = minque_equations(lanes.moments) if is_shared else None
        for first in range(0, count, tile):
            at = np.arange(first, min(first + tile, count))
            padded = padded_lanes(at)
            own = lanes_of(lanes, padded, N)
            begun = minque_start(own.moments, shared) if start is None else start_in_lanes(start[:, padded], own)
            state = begin_directly(np.array(np.broadcast_to(begun, (k, len(padded)))))
            x[:, at] = state.x[:, : len(at)]
            for _ in range(direct_steps(lanes.moments)):
                state = advance_directly(state, own.evaluate, is_plain, search.REGION)
                x[:, at] = state.x[:, : len(at)]
                store(found, at, state.solution())
                going = np.flatnonzero(state.going[: len(at)])
                if not len(going):
                    break
                at, still = at[going], padded_lanes(going)
                state, own = lanes_of(state, still), lanes_of(lanes, padded_lanes(at), N)
        left = np.flatnonzero(found.result != int(Result.CONVERGED))
        for first in range(0, len(left), tile):
            at = left[first : first + tile]
            begun = search.begin(x[:, padded_lanes(at)], structures, found.iterations[padded_lanes(at)])
            _search(begun, at, lanes, one_minimum, found)
        every = padded_lanes(np.arange(count))
        fits: Fits = lanes_of(finish(lanes_of(found, every), lanes_of(lanes, every, N)), np.arange(count))
        return fits


def _search(state: Search, at: np.ndarray, lanes: Lanes, one_minimum: bool, found: Solution) -> None:
    N = lanes.moments.yy.shape[-1]

    def evaluate(of: np.ndarray) -> Evaluate:
        own: Lanes = lanes_of(lanes, of, N)
        return own.evaluate

    search_lanes(state, at, evaluate, lanes.layout.structures, found, one_minimum)


def search_lanes(
    state: Search,
    at: np.ndarray,
    evaluate: Callable[[np.ndarray], Evaluate],
    structures: tuple[Structure, ...],
    found: Solution,
    one_minimum: bool = False,
) -> None:
    """The full search of lanes ``at``; its ends are put into ``found``. Those that are done leave.

    Args:
        evaluate: of lanes, as many as given.
    """
    own = evaluate(padded_lanes(at))
    while len(at):
        state = search.advance(state, own, structures, one_minimum)
        done = state.done[: len(at)]
        if not done.any():
            continue
        store(found, at[done], lanes_of(state.best, np.flatnonzero(done)))
        going = np.flatnonzero(~done)
        at = at[going]
        if len(going):
            state = lanes_of(state, padded_lanes(going))
            own = evaluate(padded_lanes(at))


def tile_of(lanes: Lanes) -> int:
    """Lanes that NumPy works on side by side."""
    moments = lanes.moments
    q, C, u = moments.A.shape[0], moments.A.shape[2], moments.Uy.shape[0]
    if isinstance(moments.sums, RowSums):
        numbers: int = max(u * u * (1 + moments.layout.k), C * q * (u + q + 1))
        size = min(MOST_LANES, TOGETHER // numbers)
        return size // MULTIPLE * MULTIPLE if size >= MULTIPLE else max(1, size)
    if serves(moments):
        scalar: int = max(MULTIPLE, min(MOST_LANES, SCALAR_NUMBERS // max(C, u * u) // MULTIPLE * MULTIPLE))
        return scalar
    numbers = max(C * q * q, u * u) * (1 + q * (q + 1) // 2)
    return max(MULTIPLE, min(MOST_LANES, TILE_NUMBERS // numbers // MULTIPLE * MULTIPLE))


def padded_lanes(at: np.ndarray) -> np.ndarray:
    """Lanes, the last one repeated so that their number is a multiple."""
    return np.append(at, np.repeat(at[-1], -len(at) % MULTIPLE))


def store(found: Solution, at: np.ndarray, part: Solution) -> None:
    """Put the first lanes of a part where they belong."""
    for whole, new in zip(found, part, strict=True):
        whole[..., at] = new[..., : len(at)]


def step_lanes(lanes: Lanes, theta: np.ndarray) -> tuple[Fits, np.ndarray]:
    """One Newton step from ``theta (k,)`` in every lane, no longer than a search's first; and ``(B,)`` whether the
    Hessian allows for it."""
    with silently():
        solution, regular = _stepped(lanes, theta)
        fits = finish(solution, lanes)
        return fits, regular & np.isfinite(fits.sigma)


def _stepped(lanes: Lanes, theta: np.ndarray) -> tuple[Solution, np.ndarray]:
    B = lanes.moments.yy.shape
    everywhere = np.broadcast_to(theta[:, None], (len(theta), *B))
    x, free = (np.broadcast_to(part, (len(part), *B)) for part in lanes.coordinates(everywhere))
    value, gradient, H = lanes.evaluate(x)
    among = free[:, None] & free[None]
    one = np.eye(len(x))[..., None]
    H = np.where(among, H, one)
    d = np.sqrt(abs(np.einsum("iiB->iB", H)))
    regular = decompositions.is_positive(H / (d[:, None] * d) - np.sqrt(np.finfo(np.float64).eps) * one)
    H = np.where(regular & np.isfinite(H).all((0, 1)), H, one)
    right = np.where(free, gradient, 0.0)
    step = -np.linalg.solve(np.moveaxis(H, -1, 0), right.T[:, :, None])[:, :, 0].T
    step = np.where(free, step, 0.0)
    longest, length = search.REGION * np.sqrt((x * x).sum(0)), np.sqrt((step * step).sum(0))
    x = x + step * np.where(length > longest, longest / np.where(length > 0, length, 1.0), 1.0)
    nothing = np.zeros(B)
    return Solution(x, value, free, nothing > 0, nothing, np.zeros(B, int), np.zeros(B, int)), regular
