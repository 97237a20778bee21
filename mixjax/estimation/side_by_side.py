"""Some hundred fits at once by NumPy: data sets that have their levels in common, in the lanes of one search.

Nothing is compiled, and what one fit costs beside its arithmetic is shared by all. What takes long enough to be worth a
compiled program on all cores belongs to :mod:`mixjax.estimation.many`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import numpy as np

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.bases import Basis
from mixjax.engine.coordinates import coordinates_in
from mixjax.engine.curvature import value_gradient_hessian
from mixjax.engine.moments import Moments, moments_of
from mixjax.estimation import search
from mixjax.estimation.estimate import Estimates
from mixjax.estimation.lanes import Bases, finish
from mixjax.estimation.start import minque_start
from mixjax.machine import silently
from mixjax.optimise.newton import Solution
from mixjax.optimise.results import Result
from mixjax.products.sizes import is_small
from mixjax.products.sums import CrossProducts

# Numbers of the first factor's matrices of all fits up to which they are worked on here: at most some 10 s. What the
# other factors and X cost takes as long here as in a compiled program.
MOST_NUMBERS = 2**20
# Numbers of the largest arrays: 32 MB.
TOGETHER = 2**22
# Lanes that are done are left out where they are more than this part.
DONE = 0.3


def is_worthwhile(stats: CrossProducts, fits: int) -> bool:
    """Whether so many fits like the one of ``stats`` take less time here than a program takes to compile."""
    q, m = stats.factors[stats.layout.chain[0]].Zy.shape
    return is_small(stats) and fits * m * q * q <= MOST_NUMBERS


def how_many(stats: CrossProducts) -> int:
    """Data sets like the one of ``stats`` that are worked on at the same time."""
    first, *rest = stats.layout.chain + stats.layout.dense
    q, m = stats.factors[first].Zy.shape
    u = sum(np.size(stats.factors[f].Zy) for f in rest) + stats.XX.shape[-1]
    return max(1, TOGETHER // max(u * u * (1 + stats.layout.k), m * q * (u + q + 1)))


def fit_side_by_side(stats: CrossProducts, reml: bool) -> Estimates:
    """Fit each of B data sets, from moment estimates.

    Args:
        stats: B data sets in a leading axis, as :func:`~mixjax.products.sums.stack` makes them.

    Returns:
        :class:`~mixjax.Estimates` with a leading axis B; no ``b``.
    """
    with silently():
        return _joined(
            [_estimates(_searched(moments, reml), moments, bases, reml) for moments, bases in _groups(stats)]
        )


def step_side_by_side(stats: CrossProducts, theta: np.ndarray, reml: bool) -> tuple[Estimates, np.ndarray]:
    """One Newton step from ``theta (k,)`` for each of B data sets, no longer than a search's first; and ``(B,)``
    whether the Hessian allows for it."""
    parts, sound = [], []
    with silently():
        for moments, bases in _groups(stats):
            solution, regular = _stepped(moments, bases, theta, reml)
            parts.append(_estimates(solution, moments, bases, reml))
            sound.append(regular & np.isfinite(parts[-1].sigma))
    return _joined(parts), np.concatenate(sound)


def _stepped(moments: Moments, bases: Bases, theta: np.ndarray, reml: bool) -> tuple[Solution, np.ndarray]:
    lanes = moments.yy.shape
    different = any(np.ptp(basis.R, axis=-1).any() for basis in bases.Z)
    each = [
        coordinates_in(theta, moments.layout, [b.R[..., i] for b in bases.Z])
        for i in range(lanes[0] if different else 1)
    ]
    points, sets = zip(*each, strict=True)
    shape = (moments.layout.k, *lanes)
    x, free = np.broadcast_to(np.stack(points, -1), shape), np.broadcast_to(np.stack(sets, -1), shape)
    value, gradient, H = value_gradient_hessian(x, moments, reml)
    among = free[:, None] & free[None]
    one = np.eye(len(x))[..., None]
    H = np.where(among, H, one)
    d = np.sqrt(abs(np.einsum("iiB->iB", H)))
    regular = linalg.is_positive(H / (d[:, None] * d) - np.sqrt(np.finfo(np.float64).eps) * one)
    H = np.where(regular & np.isfinite(H).all((0, 1)), H, one)
    right = np.where(free, gradient, 0.0)
    step = -np.linalg.solve(np.moveaxis(H, -1, 0), right.T[:, :, None])[:, :, 0].T
    step = np.where(free, step, 0.0)
    longest, length = search.REGION * np.sqrt((x * x).sum(0)), np.sqrt((step * step).sum(0))
    x = x + step * np.where(length > longest, longest / np.where(length > 0, length, 1.0), 1.0)
    nothing = np.zeros(lanes)
    return Solution(x, value, free, nothing > 0, nothing, np.zeros(lanes, int), np.zeros(lanes, int)), regular


def _searched(moments: Moments, reml: bool) -> Solution:
    """The minima of all lanes. Lanes that are done leave the search now and then."""
    structures = moments.layout.structures
    state = search.begin(minque_start(moments), structures)
    best, lane, own = Solution(*(np.array(a) for a in state.best)), np.arange(len(state.done)), moments
    while len(lane):
        state = search.advance(state, partial(value_gradient_hessian, moments=own, reml=reml), structures)
        if state.done.mean() > DONE:
            for whole, part in zip(best, state.best, strict=True):
                whole[..., lane[state.done]] = part[..., state.done]
            left = ~state.done
            lane, own = lane[left], _take(own, left)
            state = jax.tree.map(lambda a, left=left: a[..., left], state)
    return best


def _take(moments: Moments, at: np.ndarray) -> Moments:
    """Some of the lanes."""

    def some(a: np.ndarray) -> np.ndarray:
        # Indexing the first axis keeps lanes running slowest where they do.
        return np.moveaxis(np.moveaxis(a, -1, 0)[at], 0, -1) if a.shape[-1] == len(at) else a

    return jax.tree.map(some, moments)


def _estimates(solution: Solution, moments: Moments, bases: Bases, reml: bool) -> Estimates:
    fits = finish(solution, moments, bases, reml)
    lambdas = cov.lambdas_of_theta(fits.theta, moments.layout.qs)
    Sigma = tuple(_first(fits.sigma**2 * linalg.matmul(L, linalg.transpose(L))) for L in lambdas)
    values = {name: _first(getattr(fits, name)) for name in fits._fields if name != "x"}
    converged = np.isin(fits.result, [code for code in Result if code.is_solution])
    return Estimates(**values, Sigma=Sigma, b=(), converged=converged)


def _first(a: np.ndarray) -> np.ndarray:
    return np.moveaxis(a, -1, 0)


def _joined(parts: list[Estimates]) -> Estimates:
    return parts[0] if len(parts) == 1 else jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def _groups(stats: CrossProducts) -> Iterator[tuple[Moments, Bases]]:
    """Moments and bases, lanes last, of data sets in which the same levels meet: all together, or one by one."""
    together = all((np.asarray(a) == np.asarray(a)[:1]).all() for pair in stats.pairs for a in (pair.rows, pair.cols))
    B = len(stats.yy)
    for at in [slice(None)] if together else [slice(i, i + 1) for i in range(B)]:
        some = jax.tree.map(lambda a, at=at: np.moveaxis(np.asarray(a)[at], 0, -1), stats)
        pairs = tuple(pair._replace(rows=pair.rows[..., 0], cols=pair.cols[..., 0]) for pair in some.pairs)
        bases: Any = tuple(Basis(*basis) for basis in some.Z_bases)
        yield moments_of(replace(some, pairs=pairs)), Bases(some.X_basis.R_inv, some.beta0, bases)
