"""Fits of repeated measures without random effects: one response, or many of one design side by side.

Every response is divided by its residual standard deviation first, so that coordinates are free of its unit. NumPy does
it all; nothing is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from mixjax import covariance as cov
from mixjax.bases import in_span
from mixjax.design import AnyArray, RepeatedDesign
from mixjax.engine.visits import ManyResponses, ManyTrials, OneResponse, Visits
from mixjax.estimation import search
from mixjax.estimation.at_once import padded_lanes, search_lanes, store
from mixjax.machine import lanes_of, silently
from mixjax.optimise.newton import Solution, advance_directly, begin_directly
from mixjax.optimise.results import Result
from mixjax.products.visits import Trials, VisitRows, visit_rows

# Numbers of the largest array of the lanes that are worked on side by side.
NUMBERS = 2**17
# Responses with missing values that are worked on side by side.
MOST_TRIALS = 64
# Newton's steps before a lane that has not converged is searched for with all that a search has.
DIRECT_STEPS = 12
# A factor of a covariance with a smaller singular value, of responses with residuals of 1, is no plain lane.
LEAST = 1e-3


class RepeatedEstimates(NamedTuple):
    """Estimates of repeated measures; of many responses each array has them in front.

    Attributes:
        beta: ``(p,)`` fixed effects. vcov: ``(p, p)`` their covariance, Sigma taken as known.
        Sigma: per arm ``(T, T)``, the covariance of a subject's visits.
        criterion: ``()`` ML deviance or REML criterion, all constants kept.
        converged: ``()`` bool. singular: ``()`` bool, always False: the criterion is infinite there.
        iterations: ``()`` evaluations of criterion, gradient and Hessian. grad_norm: ``()`` scaled gradient at the end.
        result: ``()`` code, see ``mixjax.Result``.
        x: ``(k,)`` coordinates of the covariances of the response divided by ``scale ()``.
    """

    beta: AnyArray
    vcov: AnyArray
    Sigma: tuple[AnyArray, ...]
    criterion: AnyArray
    converged: AnyArray
    singular: AnyArray
    iterations: AnyArray
    grad_norm: AnyArray
    result: AnyArray
    x: AnyArray
    scale: AnyArray


class Scaled(NamedTuple):
    """Responses less their least-squares fits, divided by the residual standard deviation.

    Attributes:
        residuals: ``(B, n)``. beta0: ``(B, p)``, of the responses themselves. scale: ``(B,)``.
    """

    residuals: np.ndarray
    beta0: np.ndarray
    scale: np.ndarray


def scaled(rows: VisitRows, Y: np.ndarray, trials: Trials | None = None) -> Scaled:
    """Of responses ``(B, n)``, of which those of ``trials`` are not all there."""
    if trials is None:
        residuals, beta0 = rows.residuals(Y)
        df: Any = rows.n - rows.p
    else:
        residuals, beta0, full_rank = trials.residuals(Y)
        df = np.where(full_rank, trials.n - rows.p, -1)
    scale = np.sqrt((residuals**2).sum(1) / df)
    usable = np.isfinite(scale) & (scale > 0)
    return Scaled(residuals / np.where(usable, scale, np.nan)[:, None], beta0, scale)


def fit_repeated(rows: VisitRows, reml: bool, start: tuple[np.ndarray, ...] | None = None) -> RepeatedEstimates:
    """Fit the response of ``rows``.

    Args:
        start: per arm ``(T, T)``, a covariance to start from; None for that of least-squares residuals.
    """
    with silently():
        visits, own = _alone(rows, reml)
        x0 = visits.start
        if start is not None:
            halves = [np.linalg.cholesky(np.asarray(S, np.float64))[..., None] / own.scale for S in start]
            x0 = cov.near(halves, rows.structures)
        solution = search.run(visits.evaluate, x0, rows.structures)
        return some_of(assembled(visits, solution, own), 0)


def visits_of(rows: VisitRows, reml: bool) -> Visits:
    """The likelihood of the response of ``rows``, divided by its residual standard deviation."""
    return _alone(rows, reml)[0]


def _alone(rows: VisitRows, reml: bool) -> tuple[Visits, Scaled]:
    own = scaled(rows, np.asarray(rows.design.y, np.float64)[None])
    return Visits(rows, OneResponse.of(rows, own.residuals[0]), reml), own


def some_of(est: RepeatedEstimates, at: Any) -> RepeatedEstimates:
    """Some of many estimates, or one."""
    return RepeatedEstimates._make(tuple(S[at] for S in a) if isinstance(a, tuple) else a[at] for a in est)


def assembled(visits: Visits, solution: Solution, own: Scaled) -> RepeatedEstimates:
    """On the scale of the responses; lanes in front."""
    rows, s = visits.rows, own.scale
    covariances = visits.covariances(solution.x)
    W, logdet = visits.inverses(covariances)
    C, logdet_XX, delta, rss = visits.solve(W)
    R_inv = np.asarray(rows.X_basis.R_inv)
    value = np.where(visits.is_told, visits.value(logdet, logdet_XX, rss), np.inf)
    ended = solution.result == int(Result.CONVERGED)
    solved = ended & np.isfinite(value)
    result = np.where((ended & ~solved) | ~visits.is_told, int(Result.NOT_FINITE), solution.result)
    return RepeatedEstimates(
        beta=own.beta0 + s[:, None] * (delta @ R_inv.T),
        vcov=(s**2)[:, None, None] * (R_inv @ C @ R_inv.T),
        Sigma=tuple((s**2)[:, None, None] * S for S in covariances),
        criterion=value + 2.0 * visits.df * np.log(s),
        converged=solved,
        singular=np.zeros(len(s), bool),
        iterations=solution.iterations,
        grad_norm=solution.scaled_gradient,
        result=result,
        x=solution.x.T,
        scale=s,
    )


def repeated_estimate(design: RepeatedDesign, reml: bool = True) -> RepeatedEstimates:
    """Fit one model for repeated measures by maximum likelihood or restricted maximum likelihood.

    Newton with exact derivatives over coordinates in which every covariance of the structure can be reached; see
    :mod:`mixjax.engine.visits`. For formulas and tables see :func:`mixjax.mmrm`.

    Args:
        design: NumPy's arrays. reml: restricted maximum likelihood if true.

    Returns:
        :class:`RepeatedEstimates`. Look at ``converged`` or ``result``: nothing is raised for a fit that fails, as
        where nobody has two visits whose covariance is asked for (``NOT_FINITE``).

    Raises:
        ValueError: the arrays make no model.

    Example:
        >>> import mixjax as mj, numpy as np
        >>> y = np.array([1.0, 2, 4, 2, 2, 3, 1, 3, 3, 3, 5, 4, 2, 1, 2])
        >>> design = mj.RepeatedDesign(
        ...     y=y, X=np.ones((15, 1)), subject=np.repeat(np.arange(5), 3), visit=np.arange(15) % 3,
        ...     n_subjects=5, n_visits=3, structure="ar1",
        ... )
        >>> est = mj.repeated_estimate(design)
        >>> bool(est.converged), est.beta.round(3).tolist()
        (True, [2.522])
    """
    return fit_repeated(visit_rows(design), reml)


def fit_repeated_many(
    rows: VisitRows, Y: np.ndarray, reml: bool, progress: Callable[[int], None] | None = None
) -> RepeatedEstimates:
    """The same model fitted to many responses ``(B, n)``. Missing values are visits that a subject misses in this one.

    Args:
        progress: called with the number of responses done.

    Raises:
        ValueError: there are none.
    """
    if not len(Y):
        raise ValueError("there are no responses to fit")
    parts, done = [], 0
    with silently():
        for own in tiles(rows, Y):
            parts.append(_fit_tile(rows, Y[own], reml))
            done += len(own)
            if progress is not None:
                progress(done)
    order = np.argsort(np.concatenate([*tiles(rows, Y), np.zeros(0, int)]), kind="stable")
    together = RepeatedEstimates._make(
        tuple(np.concatenate(S) for S in zip(*values, strict=True))
        if isinstance(values[0], tuple)
        else np.concatenate(values)
        for values in zip(*parts, strict=True)
    )
    return some_of(together, order)


def tile_of(rows: VisitRows) -> int:
    """Responses that are worked on side by side."""
    (C, T), p = rows.patterns.seen.shape, rows.p
    directions = rows.design.n_arms * T * (T + 1) // 2
    return int(max(16, min(1024, NUMBERS // max(C * T * T * 2, directions * p * p) // 16 * 16)))


def visits_in_parts(rows: VisitRows, Y: np.ndarray, reml: bool) -> Iterator[tuple[np.ndarray, Visits]]:
    """The likelihoods of responses ``(B, n)``, each divided by its residual standard deviation, some at a time, and
    which these are."""
    for own in tiles(rows, Y):
        with silently():
            yield own, _many(rows, Y[own], reml)[0]


def tiles(rows: VisitRows, Y: np.ndarray) -> Iterator[np.ndarray]:
    """Responses ``(B, n)`` some at a time: complete ones, then those with missing values."""
    incomplete = np.isnan(Y).any(1)
    for which, size in ((~incomplete, tile_of(rows)), (incomplete, MOST_TRIALS)):
        at = np.flatnonzero(which)
        for first in range(0, len(at), size):
            yield at[first : first + size]


def _many(rows: VisitRows, Y: np.ndarray, reml: bool) -> tuple[Visits, Scaled]:
    there = ~np.isnan(Y)
    if there.all():
        own = scaled(rows, Y)
        return Visits(rows, ManyResponses.of(rows, own.residuals), reml), own
    trials = Trials.of(rows, there)
    own = scaled(rows, Y, trials)
    return Visits(rows, ManyTrials.of(trials, own.residuals), reml), own


def _fit_tile(rows: VisitRows, Y: np.ndarray, reml: bool) -> RepeatedEstimates:
    count = len(Y)
    visits, own = _many(rows, Y[padded_lanes(np.arange(count))], reml)
    assert not isinstance(visits.sums, OneResponse)
    sums, structures = visits.sums, rows.structures
    x = np.array(visits.start)
    usable = np.isfinite(x).all(0) & np.isfinite(own.scale) & (own.scale > 0) & visits.is_told
    found = Solution(*(np.array(a) for a in search.begin(x, structures).best))
    at = np.flatnonzero(usable[:count])
    is_plain = partial(search.is_plain, structures=structures, least=LEAST)
    if len(at):
        state = begin_directly(x[:, padded_lanes(at)])
        for _ in range(DIRECT_STEPS):
            here = Visits(rows, sums.take(padded_lanes(at)), reml)
            state = advance_directly(state, here.evaluate, is_plain, search.REGION)
            x[:, at] = state.x[:, : len(at)]
            store(found, at, state.solution())
            going = np.flatnonzero(state.going[: len(at)])
            if not len(going):
                break
            at, state = at[going], lanes_of(state, padded_lanes(going))
    left = np.flatnonzero((found.result != int(Result.CONVERGED))[:count] & usable[:count])
    if len(left):
        padded = padded_lanes(left)
        begun = search.begin(x[:, padded], structures, found.iterations[padded])
        search_lanes(begun, left, lambda of: Visits(rows, sums.take(of), reml).evaluate, structures, found)
    every = np.arange(count)
    fits = some_of(assembled(visits, found, own), every)
    exact = own.scale[:count] == 0
    if not np.isnan(Y).any():
        response = Y if rows.design.offset is None else Y - rows.design.offset
        exact = in_span(response, np.asarray(rows.design.X), rows.Q, rows.sqrt_w)
    if exact.any():
        result = np.where(exact, int(Result.NO_NOISE), fits.result)
        fits = fits._replace(result=result, converged=fits.converged & ~exact)
    return fits
