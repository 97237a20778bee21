"""Fits of generalised linear mixed models from arrays, against reference optima."""

from dataclasses import replace

import numpy as np
import pytest
from glmm_cases import arrays, case, factors, family_parameter, fits

import mixjax as mj
from mixjax.estimation.glmm import fit_rows
from mixjax.products.family_rows import rows

LAPLACE = [(model, name) for model, name in fits() if name.startswith("nAGQ1") and name[5:] in ("", "_expected")]


def rows_of(model):
    stored, design = case(model), arrays(model)
    size = design.size if stored.family == "binomial" else None
    return rows(replace(design.design, size=size), getattr(mj.families, stored.family)(stored.link))


@pytest.mark.parametrize(("model", "name"), [f for f in LAPLACE if hasattr(mj.families, case(f[0]).family)])
def test_reference_optima(model, name):
    """Criterion to 1e-8 and never above by more than 1e-9, estimates to 1e-6: the references are Newton's optima."""
    fit = case(model).fits[name]
    est = fit_rows(rows_of(model), curvature="expected" if name.endswith("expected") else "observed")
    assert est.converged
    assert bool(est.singular) == fit["isSingular"]
    assert -1e-8 < est.criterion - fit["m2logLik"] < 1e-9
    np.testing.assert_allclose(est.beta, list(fit["fixef"].values()), rtol=1e-6)
    np.testing.assert_allclose(np.sqrt(np.diag(est.vcov)), list(fit["fixef_se"].values()), rtol=1e-5)
    np.testing.assert_allclose(est.psi, family_parameter(model, name), rtol=1e-6)
    for Sigma, Lambda in zip(est.Sigma, factors(model, name), strict=True):
        np.testing.assert_allclose(Sigma, Lambda @ Lambda.T, rtol=1e-6, atol=1e-6 * (Lambda**2).sum())


@pytest.mark.parametrize("family", ["binomial", "poisson", "nbinom"])
def test_levels_without_events_are_separated(family):
    """A covariate of levels that have no event at all, where Newton's steps end in rounding."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(8), 5)
    x = (group < 2) * 1.0
    y = (rng.random(40) < 0.5 if family == "binomial" else rng.poisson(2.0, 40)) * (1.0 - x)
    term = mj.RandomTerm(Z=np.ones((40, 1)), group=group, n_groups=8)
    design = mj.Design(y=y, X=np.column_stack([np.ones(40), x]), terms=(term,))
    assert mj.glmm_estimate(mj.rows(design, family)).result == mj.Result.SEPARATED
    many = mj.glmm_estimate_many(mj.rows(design, family, np.stack([y, y])), engine="numpy")
    assert (many.result == mj.Result.SEPARATED).all()
