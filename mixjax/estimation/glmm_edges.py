"""Singular fits of generalised linear mixed models, many at once: direct steps among covariances of less rank.

Lanes whose covariances lose rank leave the direct steps of :mod:`mixjax.estimation.glmm_lanes`. What is lost is set to
zero, where all functions of it are even, and the same steps find the minimum among the rest; curvature says whether it
is one with all coordinates free. Most minima that are not global are such, so that a second search comes down from
large variances, as in :mod:`mixjax.estimation.search`, and the better end is taken.
"""

from __future__ import annotations

import jax
import numpy as np

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.engine.laplace_model import Model
from mixjax.estimation import search
from mixjax.estimation.glmm_lanes import Direct
from mixjax.estimation.glmm_search import Ends
from mixjax.estimation.glmm_start import far_of
from mixjax.machine import lanes_of
from mixjax.optimise.newton import Solution, has_kink, is_minimum, value_tolerance
from mixjax.optimise.results import Result

# Standard errors between a regular end and less rank within which the minimum there is looked at.
DOUBT = 1.5


def _anew(state: Direct, x: np.ndarray, free: np.ndarray, v: np.ndarray) -> Direct:
    """Before the first evaluation at x; evaluations so far count on."""
    zero, yes = np.zeros(x.shape[1]), np.ones(x.shape[1], bool)
    return state._replace(x=x, free=free, v=v, value=zero + np.inf, predicted=zero, before=zero,
                          distance=zero + np.inf, going=yes, converged=~yes)  # fmt: skip


def of_less_rank(model: Model, state: Direct) -> Direct:
    """States that begin where the smallest of what is not zero is."""
    structures = model.layout.structures
    sizes = search.sizes_of(state.x, structures)
    smallest = np.argmin(np.where(sizes > 0, sizes, np.inf), axis=0)
    x, free = search.rank_reductions(structures).candidate(state.x, smallest)
    return _anew(state, x, free & state.free, state.v)


def from_far(model: Model, state: Direct) -> Direct:
    """States that begin at large variances."""
    start = cov.wide_start(far_of(model), model.layout.structures, state.x)
    x = np.array(np.broadcast_to(start[:, None], state.x.shape))
    return _anew(state, x, np.ones(x.shape, bool), np.zeros_like(state.v))


def resumed(state: Direct) -> Direct:
    """States that go on from where they are, all coordinates free."""
    return _anew(state, state.x, np.ones(state.x.shape, bool), state.v)


def is_settled(model: Model, state: Direct) -> np.ndarray:
    """``(L,)`` converged, to a minimum with all coordinates free, and with nothing left that should be zero."""
    found: np.ndarray = is_minimum(_profiled(model, state), state.value) & state.converged & ~has_small(model, state)
    return found


def has_small(model: Model, state: Direct) -> np.ndarray:
    """``(L,)`` something is left that should be zero."""
    sizes = search.sizes_of(state.x, model.layout.structures)
    found: np.ndarray = ((sizes > 0) & (sizes < search.NEAR_ZERO)).any(0)
    return found


def is_doubtful(model: Model, state: Direct) -> np.ndarray:
    """``(L,)`` regular ends so near to less rank, in standard errors of what would be lost, that there may be a lower
    minimum there."""
    structures = model.layout.structures

    def smallest(x: np.ndarray) -> np.ndarray:
        sizes = search.sizes_of(x, structures)
        return np.where(sizes > 0, sizes, np.inf).min(0)  # type: ignore[no-any-return]

    slopes = np.stack([smallest(state.x + h) - smallest(state.x - h) for h in 1e-4 * np.eye(len(state.x))[..., None]])
    slopes = slopes / 2e-4
    covariance = 2.0 * linalg.inverse_logdet(_profiled(model, state))[0]
    variance = (slopes * linalg.matmul(covariance, slopes[:, None])[:, 0]).sum(0)
    return ~(smallest(state.x) ** 2 > DOUBT**2 * variance)  # type: ignore[no-any-return]


def better_of(one: Direct, other: Direct) -> Direct:
    """The ends with the lower values, by more than rounding; evaluations of both count."""
    lower = other.value < one.value - value_tolerance(np.float64)
    best: Direct = jax.tree.map(lambda a, b: np.where(lower, b, a), one, other)
    return best._replace(iterations=other.iterations)


def ends_of(model: Model, state: Direct) -> Ends:
    """Of settled states."""
    free = state.free & search.moving(state.x, model.layout.structures)
    kink = has_kink(_profiled(model, state), state.value, free)
    code = np.full(len(state.value), int(Result.CONVERGED))
    solution = Solution(state.x, state.value, free, kink, state.distance, state.iterations, code)
    return Ends(solution, state.fixed, state.v, state.value, state.Hessian, state.step, ~state.converged)


def matched(at: np.ndarray, found: tuple[np.ndarray, Direct]) -> Direct:
    """The states of replicates ``at`` among those that were found."""
    where, state = found
    order = np.argsort(where)
    return lanes_of(state, order[np.searchsorted(where, at, sorter=order)])  # type: ignore[no-any-return]


def _profiled(model: Model, state: Direct) -> np.ndarray:
    """Hessians ``(k, k, L)`` of the covariances' coordinates, fixed effects following."""
    n, H = model.n_fixed, state.Hessian
    if not n:
        return np.asarray(H)
    finite = np.isfinite(H).all((0, 1))
    inverse, _ = linalg.inverse_logdet(np.where(finite, H[:n, :n], linalg.eye(n, H)))
    found: np.ndarray = H[n:, n:] - linalg.matmul(linalg.transpose(H[:n, n:]), linalg.matmul(inverse, H[:n, n:]))
    return found
