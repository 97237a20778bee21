"""Conditional minima by adaptive quadrature, of models with one random effect a level: one parameter held."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mixjax import covariance as cov
from mixjax.bases import Basis
from mixjax.engine.laplace_fit import MIDDLE_LAST, MOST_PSI
from mixjax.engine.quadrature import product_rule
from mixjax.estimation.glmm import model_of
from mixjax.estimation.glmm_held import ConditionalFit, Parameter
from mixjax.estimation.glmm_quadrature import fit_rows_by_quadrature, profile
from mixjax.families.held import HeldFamily
from mixjax.machine import silently
from mixjax.products.family_rows import FamilyRows


class HeldQuadrature:
    """Conditional minima of one data set; see :class:`~mixjax.estimation.glmm_held.HeldSearch`. A fixed effect or a
    parameter of the family that is held leaves a smaller model, and its fit is the minimum; with the standard deviation
    held nothing is left to search but the fixed effects."""

    def __init__(self, rows: FamilyRows, nagq: int):
        self.rows, self.nagq = rows, nagq
        self._model, self._rule = model_of(rows), product_rule(nagq, 1)

    def minimise(self, what: Parameter, value: float, near: ConditionalFit) -> ConditionalFit:
        """The least criterion with a parameter at a value. ``near``: where the search begins."""
        with silently():
            if what.kind == "sd":
                return self._at_deviation(value, near)
            return self._of_smaller(what, value, near)

    def _at_deviation(self, value: float, near: ConditionalFit) -> ConditionalFit:
        rows, p = self.rows, self.rows.p
        fixed = np.concatenate([rows.X_basis.R @ near.beta, np.clip(near.psi, -MOST_PSI, MOST_PSI)])[:, None]
        x = np.asarray(rows.Z_bases[0].R) * value
        v = np.zeros((*self._model.effects.effect_shape, 1)) if near.v is None else near.v
        at = profile(self._model, self._rule, fixed, x, v, MIDDLE_LAST)
        beta, psi = rows.X_basis.R_inv @ at.fixed[:p, 0], at.fixed[p:, 0]
        return ConditionalFit(at.value, bool(np.isfinite(at.value)), beta, psi, (np.array([[value]]),), at.modes.v)

    def _of_smaller(self, what: Parameter, value: float, near: ConditionalFit) -> ConditionalFit:
        rows, j = self.rows, what.i
        if what.kind == "psi":
            rows = replace(rows, family=HeldFamily(rows.family.link, rows.family, j, value))
        else:
            U, T = np.linalg.qr(np.delete(rows.X_basis.R, j, 1))
            offset = rows.Q @ rows.X_basis.R[:, j] * value
            offset = offset if rows.offset is None else rows.offset + offset
            logdet = np.log(np.abs(np.diag(T))).sum()
            rows = replace(rows, Q=rows.Q @ U, X_basis=Basis(T, np.linalg.inv(T), logdet), offset=offset)
        est = fit_rows_by_quadrature(rows, self.nagq, cov.theta_of_lambdas(list(near.factors)))
        beta = np.insert(est.beta, j, value) if what.kind == "fixed" else est.beta
        psi = np.insert(est.psi, j, value) if what.kind == "psi" else est.psi
        factors = tuple(np.sqrt(Sigma) for Sigma in est.Sigma)
        return ConditionalFit(float(est.criterion), bool(est.converged), beta, psi, factors)
