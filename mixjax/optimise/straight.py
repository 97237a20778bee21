"""The steps of the trust-region search where nothing stands in its way, of one problem by NumPy."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from mixjax.machine import Array
from mixjax.optimise import newton
from mixjax.optimise.newton import Evaluate, Point, Simplify, Solution, State
from mixjax.optimise.results import Result

# Curvature that is clear, relative to the largest: what the scaled gradient takes as it is.
CLEAR = 1e-8
# Part of the region that a step may fill and still be Newton's own.
INSIDE = 0.99


class _Point(NamedTuple):
    """An evaluated point whose Hessian is clearly positive definite. Numbers but for x, found, eigen and step."""

    x: Array
    found: tuple[Array, Array, Array]
    value: float
    eigenvalues: Array
    eigenvectors: Array
    distance: float
    step: Array
    length: float


def straight(x0: Array, radius: float, evaluate: Evaluate, simplify: Simplify) -> Solution | State:
    """The search of :func:`~mixjax.optimise.newton.advance`, as long as its steps are Newton's own.

    Most searches of one problem are that and nothing else, and here they cost a sixth beside their evaluations. The
    points are those of ``advance``, which goes on from where the search stands, with what was evaluated there, as soon
    as a curvature is not clearly positive, a step reaches the edge of its region or lowers the value by less than it
    should, a simpler point is worth a look, or the search takes long.

    Args:
        x0: ``(k, 1)``, NumPy. radius: the first trust region. evaluate, simplify: as there.

    Returns:
        The minimum, or the state of a search to be advanced.
    """
    here: _Point | None = None
    trial, before, n = x0, 0.0, 0
    while n < newton.PATIENCE - 1:
        found = evaluate(trial)
        new = _convex(trial, found)
        judged = None if new is None else _judged(here, new, radius, simplify)
        if new is None or judged is None:
            state = _state(x0, here, trial, radius, before, n, simplify)
            return newton.advance(state, lambda _, found=found: found, simplify)  # type: ignore[misc]
        n += 1
        radius, left = judged
        if math.isfinite(left):
            return _solution(new, left, n)
        before = 0.0 if here is None else here.distance
        here, trial = new, trial + new.step
    return _state(x0, here, trial, radius, before, n, simplify)


def _judged(here: _Point | None, new: _Point, radius: float, simplify: Simplify) -> tuple[float, float] | None:
    """The radius after the step from ``here``, and the distance of the next point from the minimum where the search
    ends with it, else infinity; None where it takes more than a plain step."""
    wider = radius if here is None else _region(here, new, radius)
    if wider is None or not new.length < INSIDE * wider:
        return None
    dtype, left = new.x.dtype, math.inf
    if new.distance <= newton.gradient_tolerance(dtype):
        left = new.distance
    elif here is not None:
        foretold = float(newton.foretold_distance(np.float64(new.distance), np.float64(here.distance)))
        left = foretold if foretold <= newton.foretold_tolerance(dtype) else math.inf
    return None if math.isfinite(left) and simplify.worthwhile(new.x).any() else (wider, left)


def _convex(x: Array, found: tuple[Array, Array, Array]) -> _Point | None:
    f, g, H = found
    value = float(f[0])
    if not (math.isfinite(value) and np.isfinite(H).all()):
        return None
    eigenvalues, eigenvectors = np.linalg.eigh(H[..., 0])
    if not eigenvalues[0] > CLEAR * eigenvalues[-1]:
        return None
    along = g[:, 0] @ eigenvectors
    distance = math.sqrt(float(along @ (along / eigenvalues)))
    step = -(eigenvectors @ (along / eigenvalues))
    length = math.sqrt(float(step @ step))
    return _Point(x, found, value, eigenvalues, eigenvectors, distance, step[:, None], length)


def _region(here: _Point, new: _Point, radius: float) -> float | None:
    """The radius after a full step, None where the step was not good."""
    dtype, fall, predicted = new.x.dtype, here.value - new.value, 0.5 * here.distance**2
    noise = float(newton.noise_of(new.value, dtype))
    ratio = (fall + noise) / (predicted + noise)
    gained = fall > 10 * noise and ratio > 0.1
    if predicted < 100 * newton.value_tolerance(dtype) and not gained:
        return radius if new.distance < here.distance else None
    if ratio <= 0.25:
        return None
    return max(radius, 3.0 * here.length) if ratio > 0.75 else radius


def _solution(at: _Point, left: float, n: int) -> Solution:
    one = np.ones(1, at.x.dtype)
    value = at.value if left == at.distance else at.value - 0.5 * at.distance**2
    code, free = np.full(1, int(Result.CONVERGED)), np.ones(at.x.shape, bool)
    return Solution(at.x + at.step, value * one, free, one < 0, left * one, np.full(1, n), code)


def _state(
    x0: Array, here: _Point | None, trial: Array, radius: float, before: float, n: int, simplify: Simplify
) -> State:
    """Where the search stands before the trial is evaluated."""
    one = np.ones(1, x0.dtype)
    state = newton.begin(x0, radius * one, simplify)
    if here is None:
        return state
    eigenvalues, eigenvectors = here.eigenvalues[:, None], here.eigenvectors[..., None]
    at = Point(here.x, state.trial_free, *here.found, eigenvalues, eigenvectors, here.distance * one, one > 0)
    predicted = 0.5 * here.distance**2 * one
    return state._replace(at=at, trial=trial, predicted=predicted, before=before * one, iterations=np.full(1, n))
