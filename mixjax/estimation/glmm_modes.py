"""Random effects of other responses at the estimates of a fit."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mixjax import covariance as cov
from mixjax.engine.component_effects import in_lanes
from mixjax.engine.laplace_fit import INNER, find_modes
from mixjax.engine.level_effects import OneFactor, filled
from mixjax.estimation.glmm import GLMMEstimates, in_order, model_of
from mixjax.machine import silently
from mixjax.products.family_rows import FamilyRows

# Numbers of a row function of a tile of responses.
TILE_NUMBERS, MOST_LANES = 2**16, 256


def predictors_at_modes(rows: FamilyRows, est: GLMMEstimates, Y: np.ndarray) -> np.ndarray:
    """``(B, n)`` linear predictors with the random effects at their modes given each response ``Y (B, n)`` and all
    parameters of the fit."""
    with silently():
        model = model_of(rows)
        one_factor = isinstance(model.effects, OneFactor)
        index = filled(np.asarray(model.effects.index)) if isinstance(model.effects, OneFactor) else np.arange(rows.n)
        lanes = max(1, min(MOST_LANES, TILE_NUMBERS // index.size))
        if not one_factor:
            beside = in_lanes(rows)
            model, lanes = (model, 1) if beside is None else (replace(model, effects=beside), lanes)
        lambdas = cov.lambdas_of_theta(np.asarray(est.theta), rows.layout.qs)
        inside = [(Z.R @ own)[..., None] for Z, own in zip(rows.Z_bases, lambdas, strict=True)]
        fixed = rows.fixed_in_bases(est.beta, est.psi)[:, None]
        found = np.empty(Y.shape)
        for first in range(0, len(Y), lanes):
            own = np.asarray(Y[first : first + lanes], np.float64)
            y = np.ascontiguousarray(np.moveaxis(own[:, index], 0, -1))
            here = replace(model, data=model.data._replace(y=y))
            L = len(own)
            wide, at = [np.repeat(F, L, -1) for F in inside], np.repeat(fixed, L, -1)
            modes = find_modes(here, wide, at, np.zeros((*model.effects.effect_shape, L)), INNER)
            eta = here.predictor(at, modes.b)
            for i in range(L):
                found[first + i] = in_order(here, eta[..., i : i + 1], rows.n)
        return found
