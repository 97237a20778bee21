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
from mixjax.engine.coordinates import coordinates_of
from mixjax.engine.curvature import deviance_at_sigma
from mixjax.engine.moments import moments_of
from mixjax.engine.turned import turned
from mixjax.inference.random.held_parameter import Held, charts_of
from mixjax.inference.random.profile import profile, zeta_of_many
from mixjax.inference.random.profile_search import OneDataSet, estimates_start
from mixjax.simulation import simulate_responses

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
    found = OneDataSet(fit.stats, fit.theta, fit.sigma).minimise(problems)
    assert found.converged.all()
    np.testing.assert_allclose(found.deviance[:2], at_zero, rtol=1e-11)
    without = mj.lmm("Reaction ~ 1 + (Days | Subject)", data, reml=False)
    offset = mj.lmm("Reaction ~ 0 + Days + (Days | Subject)", data, reml=False, offset=np.full(180, 251.0))
    np.testing.assert_allclose(found.deviance[2:], [without.criterion, offset.criterion], rtol=1e-11)
    np.testing.assert_allclose(found.sigma[2:], [without.sigma, offset.sigma], rtol=1e-7)
    np.testing.assert_allclose(
        found.beta[2:], [[without.fixef["Intercept"], 0.0], [251.0, offset.fixef["Days"]]], atol=1e-6
    )
    for fitted, F, sigma in zip((without, offset), found.factors[0][2:], found.sigma[2:], strict=True):
        np.testing.assert_allclose(sigma**2 * F @ F.T, fitted.Sigma["Subject"], rtol=1e-6)
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
        C = np.linalg.cholesky(Z @ Sigma @ Z.T + np.exp(2 * log_sigma) * np.eye(10))  # of every subject
        X, y = np.linalg.solve(C, Z), np.linalg.solve(C, Y)
        r = y - X @ np.linalg.solve(X.T @ X, X.T @ y.mean(1))[:, None]
        return 180 * np.log(2 * np.pi) + 36 * np.log(np.diag(C)).sum() + (r**2).sum()

    Z = np.asarray(fit.design.terms[0].Z)[:10]  # also X of every subject
    Y = np.asarray(fit.design.y).reshape(18, 10).T
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


@pytest.mark.parametrize("model", ["cake_temp", "penicillin", "sleepstudy_slopes"])
def test_a_column_moved_into_the_response(model, x64):
    """The deviance and its derivatives with a column of X taken out, against those of the changed rows."""
    fit = fit_of(model, "ML")
    j, value = fit.X.shape[1] - 1, -1.5
    sigma = np.array([fit.sigma])
    start = estimates_start(fit.theta[None], sigma, fit.stats.layout.qs)
    chart = charts_of(fit.stats, Held("fixed", i=j), np.array([value]), start)
    X = np.delete(fit.X, j, axis=1)
    design = mj.Design(y=np.asarray(fit.design.y) - value * fit.X[:, j], X=X, terms=fit.design.terms)
    x, _ = coordinates_of(fit.theta, fit.stats)

    def at(moments):
        F = [1.1 * f[..., None] for f in factors_of(x, fit.stats.layout.structures)]
        return deviance_at_sigma(F, moments, lambda profiled: 0.9 * profiled)

    changed = turned(moments_of(fit.stats), jax.numpy.asarray(chart.v), jax.numpy.asarray(chart.s))
    for found, wanted in zip(at(changed), at(moments_of(mj.cross_products(design))), strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-8, atol=1e-8 * np.abs(wanted).max())


@pytest.mark.parametrize("model", ["sleepstudy_slopes", "dyestuff2"])
def test_curves(model):
    profiles = fit_of(model, "ML").profile()
    frame = profiles.to_frame()
    assert list(frame.columns) == ["parameter", "value", "zeta", *profiles.estimate.index]
    assert (frame["value"] == [row[row["parameter"]] for _, row in frame.iterrows()]).all()
    for _, curve in frame.groupby("parameter"):
        assert (np.diff(curve["value"]) > 0).all()
        assert (np.diff(curve["zeta"]) > -1e-9).all()
        assert len(curve) >= (8 if model == "dyestuff2" else 10)


def dense_deviance(fit, row):
    """-2 log density of the responses at the parameters of a row of the curves, from the textbook."""
    y, V = np.asarray(fit.design.y), row["sigma"] ** 2 * np.eye(fit.nobs)
    for (name, term), labels in zip(zip(fit.Sigma, fit.design.terms, strict=True), fit.labels.terms, strict=True):
        sd = np.diag([row[f"sd_{effect}|{name}"] for effect in labels.effects])
        C = np.eye(len(sd))
        if len(sd) == 2 and not np.isnan(row[f"cor_{labels.effects[1]}.{labels.effects[0]}|{name}"]):
            C[0, 1] = C[1, 0] = row[f"cor_{labels.effects[1]}.{labels.effects[0]}|{name}"]
        Z = np.asarray(term.Z)
        V += (Z @ sd @ C @ sd @ Z.T) * (term.group[:, None] == term.group)
    r = y - fit.X @ row[list(fit.labels.fixed)].to_numpy(float)
    return fit.nobs * np.log(2 * np.pi) + np.linalg.slogdet(V)[1] + r @ np.linalg.solve(V, r)


@pytest.mark.parametrize("model", ["sleepstudy_slopes", "pastes_nested", "dyestuff2", "singular_correlation_one"])
def test_conditional_estimates_have_the_deviance_of_their_curve(model):
    """All parameters along every curve, put into the density itself, give ``least + zeta^2``."""
    fit = fit_of(model, "ML")
    frame = fit.profile().to_frame(points=5)
    for _, row in frame.iterrows():
        assert dense_deviance(fit, row) == pytest.approx(fit.criterion + row["zeta"] ** 2, abs=1e-6), row["parameter"]


def test_fixed_effects_named_as_columns():
    data = table("sleepstudy").rename(columns={"Days": "value"})
    fit = mj.lmm("Reaction ~ value + (1 | Subject)", data, reml=False)
    frame = fit.profile("value").to_frame(points=3)
    assert list(frame.columns[-2:]) == ["Intercept", "fixed_value"]
    np.testing.assert_array_equal(frame["fixed_value"], frame["value"])


def small_study(B, sd_slope):
    """Responses of 8 subjects x 6 occasions, by formula and as arrays, with random slopes."""
    group, time = np.repeat(np.arange(8), 6), np.tile(np.arange(6.0), 8)
    X = np.column_stack([np.ones(48), time])
    design = mj.Design(y=np.zeros(48), X=X, terms=(mj.RandomTerm(Z=X, group=group, n_groups=8),))
    Sigma = np.diag([1.0, sd_slope]) @ np.array([[1.0, 0.3], [0.3, 1.0]]) @ np.diag([1.0, sd_slope])
    Y = simulate_responses(design, np.array([1.0, 0.5]), 1.0, (Sigma,), 3, B)
    return design, Y, pd.DataFrame({"g": [f"s{i}" for i in group], "time": time})


def test_many_data_sets_at_once_are_those_one_by_one():
    """zeta of every parameter, some of them of singular fits, against each fit's own profile."""
    design, Y, data = small_study(300, 0.2)
    stats = mj.cross_products(design, Y)
    est = mj.estimate_many(stats, reml=False)
    one = {"sd_Intercept|g": (Held("sd", 0, 0), 1.0), "cor_time.Intercept|g": (Held("cor", 0, 1, 0), 0.3),
           "sd_time|g": (Held("sd", 0, 1), 0.2), "sigma": (Held("sigma"), 1.0),
           "Intercept": (Held("fixed", i=0), 1.0), "time": (Held("fixed", i=1), 0.5)}  # fmt: skip
    many = {name: zeta_of_many(stats, est, *problem) for name, problem in one.items()}
    chosen = [*np.flatnonzero(est.singular)[:3], *np.flatnonzero(~est.singular)[:3]]
    for i in chosen:
        profiles = profile(mj.lmm("y ~ time + (time | g)", data.assign(y=Y[i]), reml=False).record)
        for name, (zeta, converged) in many.items():
            assert converged.mean() > 0.99
            if not np.isnan(profiles.estimate[name]):
                np.testing.assert_allclose(zeta[i], profiles.zeta(name, one[name][1]), atol=2e-5, err_msg=name)
    # Data sets of their own design give the same as responses of one.
    stacked = mj.stack([mj.cross_products(mj.Design(y=y, X=design.X, terms=design.terms)) for y in Y[:20]])
    for name in ("sd_time|g", "time"):
        again, _ = zeta_of_many(stacked, mj.estimate_many(stacked, reml=False), *one[name])
        np.testing.assert_allclose(again, many[name][0][:20], atol=2e-5)


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
    large = fit_of("insteval", "ML")
    with pytest.raises(ValueError, match="no profiles of many data sets of this model"):
        zeta_of_many(large.stats, large.estimates, Held("sigma"), 1.0)
