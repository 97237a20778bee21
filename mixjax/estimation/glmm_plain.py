"""Generalised linear models without random effects, which a fit is tested against: many responses at a time."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mixjax.design import Design, RandomTerm
from mixjax.engine.laplace_fit import INNER_LAST, MIDDLE, profile
from mixjax.estimation.glmm import model_of
from mixjax.estimation.glmm_start import fixed_start
from mixjax.machine import silently
from mixjax.products.family_rows import FamilyRows, rows_in


class Plain(NamedTuple):
    """Estimates without random effects: ``beta (B, p)``, ``psi (B, s)``, -2 log-likelihoods ``criterion (B,)``, all
    constants kept."""

    beta: np.ndarray
    psi: np.ndarray
    criterion: np.ndarray


def fit_plain(rows: FamilyRows) -> Plain:
    """Maximum likelihood of the same fixed effects and family without random effects, exact.

    Args:
        rows: of responses ``(B, n)``.

    It is the approximation of the likelihood, which then is none, with one random effect of variance 0.
    """
    Y, n = np.asarray(rows.y, np.float64), rows.n
    nothing = RandomTerm(np.ones((n, 1)), np.zeros(n, int), 1)
    design = Design(Y[0], rows.Q, (nothing,), rows.weights, rows.offset, rows.size, rows.psi_columns)
    own = rows_in(design, rows.family, Y[0])
    with silently():
        model = model_of(own)
        index = np.asarray(model.effects.index)  # type: ignore[attr-defined]
        y = np.moveaxis(Y[:, index], 0, -1)
        model = replace(model, data=model.data._replace(y=np.ascontiguousarray(y)))
        v = np.zeros((*model.effects.effect_shape, len(Y)))
        found = profile(model, [np.zeros((1, 1, len(Y)))], fixed_start(model, len(Y)), v, INNER_LAST, MIDDLE)
        fixed, value = found.fixed + found.step, found.form.value - 0.5 * found.decrement
    beta = rows.X_basis.R_inv @ (own.X_basis.R_inv @ fixed[: rows.p])
    return Plain(beta.T, rows.psi_of_bases(own.psi_of_bases(fixed[rows.p :])).T, value)
