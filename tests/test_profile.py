"""Profile likelihood against lme4's deviance, minimised independently (profile_direct, profile_zeta_grid)."""

import json

import jax
import numpy as np
import pandas as pd
import pytest
import scipy.optimize
import scipy.stats
from conftest import HERE, fit_of, table

import mixjax as mj
from mixjax.covariance import factors_of
from mixjax.estimation.surface import coordinates_of
from mixjax.inference.constrained import Held, minimise, with_fixed
from mixjax.inference.profile import profile
from mixjax.likelihood.curvature import deviance_at_sigma
from mixjax.likelihood.moments import moments_of
from mixjax.likelihood.statistics import pad

MODELS = sorted(path.stem.removeprefix("inference_confint_") for path in (HERE / "oracle").glob("*confint_*.json"))


def as_lme4(name):
    return (
        name.replace("Intercept", "(Intercept)").replace("[T.", "").replace("]", "").replace("|Subject.1", "|Subject")
    )


@pytest.mark.parametrize("model", MODELS)
def test_intervals_agree_with_direct_minimisation(model):
    found = profile(fit_of(model, "ML").record).confint()
    block = json.loads((HERE / "oracle" / f"inference_confint_{model}.json").read_text())["profile_direct"]
    wanted = dict(zip(block["rows"], np.array(block["values"], float), strict=True))
    assert {as_lme4(name) for name in found.index} == set(wanted)
    for name, row in found.iterrows():
        ends = wanted[as_lme4(name)]
        np.testing.assert_allclose(row, ends, atol=1e-5 * np.ptp(ends), err_msg=name)


def test_zeta_on_a_grid():
    reference = json.loads((HERE / "oracle" / "profile_zeta_grid_sleepstudy.json").read_text())
    profiles = profile(fit_of("sleepstudy_slopes", "ML").record)
    for one in reference["profiles"]:
        name = one["parameter"].replace("(Intercept)", "Intercept")
        np.testing.assert_allclose(profiles.zeta(name, one["grid"]), one["zeta"], atol=1e-8)
        np.testing.assert_allclose(profiles.estimate[name], one["estimate"], rtol=1e-7)


def test_limits_are_where_the_deviance_has_risen_by_the_quantile():
    profiles = profile(fit_of("machines_slopes", "ML").record)
    for level in (0.5, 0.99):
        frame, z = profiles.confint(level), scipy.stats.norm.ppf(0.5 + level / 2)
        for name, (lower, upper) in frame.iterrows():
            if name not in frame.attrs["boundary"]:
                np.testing.assert_allclose(profiles.zeta(name, [lower, upper]), [-z, z], atol=1e-6)


def test_where_a_range_ends():
    """Deviances at sd 0 are those of the models without the effect; a correlation may be anything there."""
    data = table("sleepstudy")
    fit = fit_of("sleepstudy_slopes", "ML")
    at_zero = [
        mj.lmm(formula, data, reml=False).criterion
        for formula in ("Reaction ~ Days + (0 + Days | Subject)", "Reaction ~ Days + (1 | Subject)")
    ]
    problems = [
        (Held("sd", 0, 0), 0.0),
        (Held("sd", 0, 1), 0.0),
        (Held("fixed", i=1), 0.0),
        (Held("fixed", i=0), 251.0),
    ]
    found, converged = minimise(pad(fit.stats), fit.theta, fit.sigma, problems)
    assert converged.all()
    np.testing.assert_allclose(found[:2], at_zero, rtol=1e-11)
    without = mj.lmm("Reaction ~ 1 + (Days | Subject)", data, reml=False).criterion
    offset = mj.lmm("Reaction ~ 0 + Days + (Days | Subject)", data, reml=False, offset=np.full(180, 251.0)).criterion
    np.testing.assert_allclose(found[2:], [without, offset], rtol=1e-11)
    profiles = profile(fit.record)
    assert profiles.zeta("cor_Days.Intercept|Subject", [1.0])[0] ** 2 <= min(at_zero) - fit.criterion
    assert profiles.zeta("sd_Intercept|Subject", 0.0)[0] == pytest.approx(
        -np.sqrt(at_zero[0] - fit.criterion), rel=1e-9
    )


def test_a_correlation_keeps_its_sign(x64):
    """At the bounds too: the deviance there, by a minimisation of its own over two standard deviations and sigma."""
    fit = fit_of("sleepstudy_slopes", "ML")

    def deviance(parameters, rho):
        a, b, log_sigma = parameters
        Sigma = np.array([[a * a, rho * a * b], [rho * a * b, b * b]])
        V = np.kron(np.eye(18), Z @ Sigma @ Z.T + np.exp(2 * log_sigma) * np.eye(10))
        C = np.linalg.cholesky(V)
        X, y = np.linalg.solve(C, fit.X), np.linalg.solve(C, np.asarray(fit.design.y))
        r = y - X @ np.linalg.lstsq(X, y, rcond=None)[0]
        return 180 * np.log(2 * np.pi) + 2 * np.log(np.diag(C)).sum() + r @ r

    Z = np.asarray(fit.design.terms[0].Z)[:10]
    for rho in (-1.0, 1.0, -0.7):
        bounds = [(0, None), (0, None), (None, None)]
        ends = [scipy.optimize.minimize(deviance, [a, 5.0, 3.3], (rho,), bounds=bounds) for a in (5.0, 25.0)]
        wanted = min(end.fun for end in ends)
        zeta = profile(fit.record, "cor_Days.Intercept|Subject").zeta("cor_Days.Intercept|Subject", rho)
        assert zeta[0] ** 2 + fit.criterion == pytest.approx(wanted, abs=2e-4)


@pytest.mark.parametrize("model", ["sleepstudy_slopes", "penicillin"])
def test_the_deviance_with_sigma_given_has_these_derivatives(model, x64):
    """By finite differences of the value, and by its minimum over sigma, which is the criterion."""
    fit = fit_of(model, "ML")
    stats = fit.stats
    moments = moments_of(stats)
    x, _ = coordinates_of(fit.theta, stats)

    def at(scale, sigma2):
        F = [(1.0 + 0.1 * scale) * f[..., None] for f in factors_of(x, stats.layout.structures)]
        return deviance_at_sigma(F, moments, lambda profiled: jax.numpy.full_like(profiled, sigma2))

    sigma2 = fit.sigma**2
    assert float(at(0.0, sigma2).value[0]) == pytest.approx(fit.criterion, rel=1e-12)
    np.testing.assert_allclose(at(0.0, sigma2).gradient[-1], 0.0, atol=1e-6)
    h = 1e-4
    up, down = at(1.0, sigma2 * np.exp(h)), at(1.0, sigma2 * np.exp(-h))
    here = at(1.0, sigma2)
    np.testing.assert_allclose(here.gradient[-1], (up.value - down.value) / (2 * h), rtol=1e-6)
    np.testing.assert_allclose(here.Hessian[-1], (up.gradient - down.gradient) / (2 * h), rtol=1e-6, atol=1e-6)


def test_a_column_moved_into_the_response():
    """Products with a column of X taken out, against those of the changed rows."""
    fit = fit_of("cake_temp", "ML")
    j, value = 2, -1.5
    moved = with_fixed(fit.stats, j, value)
    X = np.delete(fit.X, j, axis=1)
    design = mj.Design(y=np.asarray(fit.design.y) - value * fit.X[:, j], X=X, terms=fit.design.terms)
    wanted = mj.cross_products(design)
    np.testing.assert_allclose(moved.yy, wanted.yy, rtol=1e-10)
    np.testing.assert_allclose(moved.factors[0].Zy, wanted.factors[0].Zy, atol=1e-8)
    gram = np.einsum("qpm,qpn->mn", moved.factors[0].ZX, moved.factors[0].ZX)  # free of the basis of X
    np.testing.assert_allclose(gram, np.einsum("qpm,qpn->mn", wanted.factors[0].ZX, wanted.factors[0].ZX), atol=1e-10)


def test_curves():
    frame = fit_of("sleepstudy_slopes", "ML").profile().to_frame()
    assert list(frame.columns) == ["parameter", "value", "zeta"]
    for _, curve in frame.groupby("parameter"):
        assert (np.diff(curve["value"]) > 0).all()
        assert (np.diff(curve["zeta"]) > -1e-9).all()
        assert len(curve) >= 10


def test_singular_fits_have_profiles():
    fit = fit_of("dyestuff2", "ML")
    with pytest.warns(mj.InferenceWarning, match=r"end on the boundary: sd_Intercept\|Batch"):
        frame = fit.confint()
    assert frame.loc["sd_Intercept|Batch", "lower"] == 0.0
    assert frame.attrs["boundary"] == ("sd_Intercept|Batch",)
    frame = profile(fit_of("singular_correlation_one", "ML").record).confint()
    assert frame.loc[[name for name in frame.index if name.startswith("cor")]].iloc[0, 1] == 1.0


def test_scale_and_order_do_not_matter():
    data = table("sleepstudy")
    changed = data.assign(Reaction=data["Reaction"] * 100, Days=data["Days"] * 0.1).sample(frac=1, random_state=2)
    formula = "Reaction ~ Days + (Days | Subject)"
    a, b = (profile(mj.lmm(formula, frame, reml=False).record).confint() for frame in (data, changed))
    scale = np.array([100, 1, 1000, 100, 100, 1000])[:, None]
    pd.testing.assert_frame_equal(a * scale, b, rtol=1e-5)


def test_a_REML_fit_is_refitted_and_says_so():
    reml, ml = fit_of("sleepstudy_slopes", "REML"), fit_of("sleepstudy_slopes", "ML")
    with pytest.warns(mj.InferenceWarning, match="refitted by maximum likelihood"):
        frame = reml.confint([".sig01", "(Intercept)"])
    assert list(frame.index) == ["sd_Intercept|Subject", "Intercept"]
    np.testing.assert_allclose(frame, ml.confint([".sig01", "(Intercept)"]), rtol=1e-5)


def test_what_is_refused():
    fit = fit_of("sleepstudy_slopes", "ML")
    with pytest.raises(ValueError, match="level"):
        fit.confint(level=0.0)
    with pytest.raises(ValueError, match="no parameter 'sigm'"):
        fit.profile("sigm")
    with pytest.raises(ValueError, match="lies between"):
        fit.profile("sigma").zeta("sigma", [-1.0])
    with pytest.raises(ValueError, match="largest must be positive"):
        fit.profile("sigma").to_frame(largest=0.0)
    with pytest.raises(ValueError, match="no profiles for this model"):
        fit_of("insteval", "ML").profile()
