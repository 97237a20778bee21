"""Results of many fits, as far as they are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.engine.curvature import profile_and_modes
from mixjax.estimation.batch import Batch
from mixjax.estimation.estimate import Estimates
from mixjax.estimation.lane_program import Fits
from mixjax.machine import silently
from mixjax.optimise.results import Result


class Results:
    """Arrays of all B replicates, filled part by part."""

    def __init__(self, batch: Batch, keep: Sequence[str]):
        self.batch, self.keep = batch, keep
        self.arrays: dict[str, Any] = {}

    def put(self, at: slice, fits: Fits) -> None:
        """Store replicates ``at``; ``fits`` has them in the last axis, and padding behind them."""
        count = at.stop - at.start
        fits = Fits(*(np.moveaxis(np.asarray(a), -1, 0)[:count] for a in fits))
        values: dict[str, Any] = {name: getattr(fits, name) for name in Fits._fields if name in self.keep}
        if "converged" in self.keep:
            values["converged"] = np.isin(fits.result, [code for code in Result if code.is_solution])
        if "Sigma" in self.keep:
            values["Sigma"] = _Sigma(fits.theta, fits.sigma, self.batch.stats.layout.qs)
        if "b" in self.keep:
            values["b"] = _modes(self.batch, at, fits.x)
        for name, value in values.items():
            if name not in self.arrays:
                self.arrays[name] = jax.tree.map(lambda a: np.empty((self.batch.B, *a.shape[1:]), a.dtype), value)
            for whole, part in zip(jax.tree.leaves(self.arrays[name]), jax.tree.leaves(value), strict=True):
                whole[at] = part

    def estimates(self) -> Estimates:
        return Estimates._make(self.arrays.get(name) for name in Estimates._fields)


def _Sigma(theta: np.ndarray, sigma: np.ndarray, qs: tuple[int, ...]) -> tuple[np.ndarray, ...]:
    parts = []
    for part, q in zip(np.split(theta, np.cumsum([cov.n_theta(q) for q in qs])[:-1], axis=1), qs, strict=True):
        Lambda = np.zeros((len(theta), q, q), theta.dtype)
        Lambda[(slice(None), *cov.triangle(q))] = part
        parts.append(sigma[:, None, None] ** 2 * (Lambda @ np.swapaxes(Lambda, 1, 2)))
    return tuple(parts)


def _modes(batch: Batch, at: slice, x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Random effects of replicates ``at``, of which the coordinates are ``x (N, k)``."""
    lanes = batch.lanes(at, True)
    with silently():
        _, by_factor = profile_and_modes(np.asarray(x).T, lanes.moments, True, batch.levels(at))
    stats, found = batch.stats, []
    for place, Z in zip(stats.layout.terms, lanes.bases.Z, strict=True):
        b = linalg.matmul(Z.R_inv, by_factor[place.factor][place.start : place.start + place.q])
        found.append(stats.at_levels(place.factor, np.moveaxis(b, -1, 0)).swapaxes(1, 2))
    return tuple(found)
