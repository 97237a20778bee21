"""The steps of the trust-region search where nothing stands in its way, of one problem by NumPy."""

from __future__ import annotations

import math

import numpy as np

from mixjax.machine import Array
from mixjax.optimise import newton
from mixjax.optimise.newton import Evaluate, Point, Simplify, State
from mixjax.optimise.results import Result

# Curvature that is clear, relative to the largest: what the scaled gradient takes as it is.
CLEAR = 1e-8
# Part of the region that a step may fill and still be Newton's own.
INSIDE = 0.99


def straight(state: State, evaluate: Evaluate, simplify: Simplify) -> State:
    """As :func:`~mixjax.optimise.newton.advance`, for as long as steps are Newton's own and need no second thought.

    Most searches of one problem are that and nothing else, and here a step costs a quarter beside its evaluation. The
    points are those of ``advance``, which goes on from where the search stands, with what was evaluated there, as soon
    as a curvature is not clearly positive, a step reaches the edge of its region or lowers the value by less than it
    should, a simpler point is worth a look, or the search takes long.

    Args:
        state: of one lane, at the beginning; NumPy. evaluate, simplify: as there.

    Returns:
        The state, done or to be advanced.
    """
    while not state.done[0] and state.iterations[0] < newton.PATIENCE - 1:
        found = evaluate(state.trial)
        after = _after(state, *found, simplify)
        if after is None:
            return newton.advance(state, lambda _, found=found: found, simplify)  # type: ignore[misc]
        state = after
    return state


def _after(state: State, f: Array, g: Array, H: Array, simplify: Simplify) -> State | None:
    """The state after a plain step to the trial and Newton's next one; None where it takes more than that."""
    value, dtype = float(f[0]), state.trial.dtype
    if not (math.isfinite(value) and np.isfinite(H).all()):
        return None
    eigenvalues, eigenvectors = np.linalg.eigh(H[..., 0])
    if not eigenvalues[0] > CLEAR * eigenvalues[-1]:
        return None
    along = g[:, 0] @ eigenvectors
    distance = math.sqrt(float((along * along / eigenvalues).sum()))
    radius, before = float(state.radius[0]), 0.0
    if math.isfinite(state.at.f[0]):
        before = float(state.at.distance[0])
        widened = _region(state, value, distance)
        if widened is None:
            return None
        radius = widened
    step = -(eigenvectors @ (along / eigenvalues))
    if not math.sqrt(float(step @ step)) < INSIDE * radius:
        return None
    ends = distance <= newton.gradient_tolerance(dtype)
    ends = ends or _foretold(distance, before) <= newton.foretold_tolerance(dtype)
    if ends and simplify.worthwhile(state.trial).any():
        return None
    one = np.ones(1, dtype)
    at = Point(
        state.trial, state.trial_free, f, g, H, eigenvalues[:, None], eigenvectors[..., None], distance * one, one > 0
    )
    return state._replace(
        at=at,
        trial=state.trial + step[:, None],
        predicted=0.5 * distance**2 * one,
        radius=radius * one,
        before=before * one,
        settled=one > 0 if ends else state.settled,
        iterations=state.iterations + 1,
        result=np.full(1, int(Result.CONVERGED)) if ends else state.result,
        done=one > 0 if ends else state.done,
    )


def _region(state: State, value: float, distance: float) -> float | None:
    """The radius after a full step from a finite value, None where the step was not good."""
    old, dtype = float(state.at.f[0]), state.trial.dtype
    radius, predicted, before = float(state.radius[0]), float(state.predicted[0]), float(state.at.distance[0])
    noise = newton.noise_of(value, dtype)
    ratio = (old - value + noise) / (predicted + noise)
    gained = old - value > 10 * noise and ratio > 0.1
    if max(predicted, 0.5 * before**2) < 100 * newton.value_tolerance(dtype) and not gained:
        return radius if distance < before else None
    if ratio <= 0.25:
        return None
    if ratio <= 0.75:
        return radius
    length = state.trial[:, 0] - state.at.x[:, 0]
    return max(radius, 3.0 * math.sqrt(float(length @ length)))


def _foretold(distance: float, before: float) -> float:
    return float(newton.foretold_distance(np.float64(distance), np.float64(before)))
