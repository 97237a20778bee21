"""The mode of the log posterior and the curvature there: Newton's method, which never steps downhill."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mixjax.sampling.density import Data, value_gradient_hessian
from mixjax.sampling.model_priors import ModelPriors

# A step in whitened coordinates is no longer than this; the search ends where the next one is shorter than TOLERANCE.
LONGEST, TOLERANCE, STEPS = 2.0, 1e-6, 100
# Standard deviations of coordinates, all of which are logarithms or logits but for fixed effects, are not taken for
# larger than this: the data may say nothing of a variance, and the priors' tails are long.
WIDEST = 2.0


class Mode(NamedTuple):
    """Where the search ended.

    Attributes:
        z: ``(dim,)``. root: ``(dim, dim)`` of the inverse of the negative Hessian, lower triangular.
        converged: the gradient vanished, and the density falls in all directions.
    """

    z: np.ndarray
    root: np.ndarray
    converged: bool


def mode(start: np.ndarray, stats: Data, priors: ModelPriors) -> Mode:
    """Find the mode near ``start (dim,)``; call in the float64 scope."""
    n_log = len(start) - len(priors.fixed)

    def at(z: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
        value, gradient, H = value_gradient_hessian(z, stats, priors)
        return float(value), np.asarray(gradient), np.asarray(H)

    z, (value, gradient, H) = np.array(start), at(start)
    converged = False
    for _ in range(STEPS):
        values, vectors, scale = _spectrum(H, n_log)
        along = vectors.T @ (gradient / scale)
        step = along / np.abs(values)
        length = float(np.sqrt((step * np.abs(values) * step).sum()))
        converged = length < TOLERANCE and bool((values > 0).all())
        if converged:
            break
        direction = vectors @ (step * min(1.0, LONGEST * np.sqrt(len(z)) / max(length, 1e-300))) / scale
        direction[:n_log] = np.clip(direction[:n_log], -LONGEST, LONGEST)
        for _ in range(30):
            new = at(z + direction)
            if np.isfinite(new[0]) and new[0] > value - 1e-10 * (1.0 + abs(value)):
                break
            direction = 0.25 * direction
        else:
            break
        z, (value, gradient, H) = z + direction, new
    values, vectors, scale = _spectrum(H, n_log)
    covariance = (vectors / np.abs(values)) @ vectors.T / np.outer(scale, scale)
    sd = np.sqrt(covariance.diagonal())
    shrink = np.ones(len(z))
    shrink[:n_log] = np.minimum(1.0, WIDEST / sd[:n_log])
    root = np.linalg.cholesky(covariance * np.outer(shrink, shrink))
    return Mode(z, root, converged)


def _spectrum(H: np.ndarray, n_log: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvalues and vectors of the negative Hessian scaled to a diagonal of 1, none near zero, and the scale. Fixed
    effects, behind ``n_log`` logarithms, have the units of y."""
    scale = np.sqrt(np.abs(H.diagonal()))
    scale[:n_log] = np.maximum(scale[:n_log], 0.03)  # of logarithms, of which the data may say nothing
    values, vectors = np.linalg.eigh(-0.5 * (H + H.T) / np.outer(scale, scale))
    least = 1e-3
    return np.where(np.abs(values) < least, least, values), vectors, scale
