"""Generalised linear mixed models by formula: against reference fits, arrays, invariances, and what is refused."""

import pickle
import re
import warnings
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pandas as pd
import pytest
from conftest import table
from glmm_cases import arrays, case, family_parameter, fits
from scipy.special import gammaln
from test_nothing_compiles import compiled

import mixjax as mj

LAPLACE = [(model, name) for model, name in fits() if name in ("nAGQ1", "nAGQ1_expected")]
WITH_ROWS = [model for model, name in LAPLACE if name == "nAGQ1"]
# Estimates of two fits of one model differ by what Newton's last step leaves, some 1e-10 standard errors, and rounding.
SAME = {"rtol": 1e-7, "atol": 1e-8}


@cache
def fit_of(model, name="nAGQ1"):
    stored = case(model)
    curvature = "expected" if name.endswith("expected") else "observed"
    return mj.glmm(
        stored.formula, stored.table, family=stored.family, link=stored.link, curvature=curvature, **stored.arguments
    )


def fitted_to(model, data, formula=None, **options):
    stored = case(model)
    options = {"family": stored.family, "link": stored.link, **stored.arguments, **options}
    return mj.glmm(formula or stored.formula, data, **options)


def assert_same_fit(one, other, **tolerance):
    """Criterion, estimates and their covariance."""
    tolerance = tolerance or SAME
    np.testing.assert_allclose(other.criterion, one.criterion, rtol=1e-10)
    np.testing.assert_allclose(other.fixef, one.fixef, **tolerance)
    np.testing.assert_allclose(other.theta, one.theta, **tolerance)
    np.testing.assert_allclose(other.dispersion, one.dispersion, **tolerance)
    np.testing.assert_allclose(other.vcov_all, one.vcov_all, rtol=1e-5, atol=1e-8)


# --- reference fits ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "name"), LAPLACE)
def test_a_formula_is_its_arrays(model, name):
    fit, stored, design = fit_of(model, name), case(model), arrays(model)
    size = design.size if stored.family == "binomial" else None
    data = mj.rows(replace(design.design, size=size), fit.family)
    est = mj.glmm_estimate(data, curvature=fit.curvature)
    for own, theirs in zip(jax.tree.leaves(fit.estimates), jax.tree.leaves(est), strict=True):
        np.testing.assert_allclose(own, theirs, rtol=1e-12)


@pytest.mark.parametrize(("model", "name"), [("cbpp_probit", "nAGQ1_expected"), ("epil_nbinom2", "nAGQ1")])
def test_the_criterion_is_that_of_arrays(model, name):
    fit = fit_of(model, name)
    with jax.enable_x64(True):
        found = mj.glmm_criterion(fit.theta, fit.estimates.beta, fit.record.rows, fit.estimates.psi, fit.curvature)
    np.testing.assert_allclose(fit.criterion, found, rtol=1e-12)


@pytest.mark.parametrize(("model", "name"), LAPLACE)
def test_what_a_fit_says_of_itself(model, name):
    fit, stored = fit_of(model, name), case(model).fits[name]
    assert fit.converged
    assert fit.is_singular == stored["isSingular"]
    assert (fit.npar, fit.nobs) == (stored["npar"], stored["n"])
    np.testing.assert_allclose(
        [fit.loglik, fit.aic, fit.bic], [stored["logLik"], stored["AIC"], stored["BIC"]], rtol=0, atol=1e-8
    )
    assert list(fit.fixef.index) == list(stored["fixef"])
    np.testing.assert_allclose(fit.vcov, stored["vcov"], rtol=1e-5, atol=1e-9)
    np.testing.assert_allclose(np.log(fit.dispersion), family_parameter(model, name), rtol=1e-6)
    own = fit.varcorr.to_frame()
    for term in stored["varcorr"]:
        rows = own[(own["group"] == term["group"]) & own["name2"].isna()]
        assert list(rows["name1"]) == term["terms"]
        np.testing.assert_allclose(rows["sdcor"], term["sd"], rtol=1e-6, atol=1e-9)
    assert "Residual" not in set(own["group"])


@pytest.mark.parametrize(("model", "name"), LAPLACE)
def test_covariance_of_all_estimates(model, name):
    """The reference is over theta and logarithms of the family's parameters: standard deviations and correlations
    follow by hand."""
    fit, stored = fit_of(model, name), case(model).fits[name]
    values, covariance = list(stored["theta"].values()), np.array(stored["vcov_all"]["values"])
    known = stored["vcov_all"]["parameters"]
    k, p, s = len(values), len(stored["fixef"]), len(stored.get("dispersion", {}))
    held = [j for j, parameter in enumerate(stored["theta"]) if parameter not in known]
    J, column = np.zeros((k + p + s, k + p + s)), 0
    for term in stored["varcorr"]:
        here = slice(column, column + (1 if len(term["terms"]) == 1 else 3))
        if len(term["terms"]) == 1:
            J[here, here] = 1.0
        else:
            _, b, c = values[here]
            d = np.hypot(b, c)
            J[here, here] = [[1, 0, 0], [0, c**2 / d**3, -b * c / d**3], [0, b / d, c / d]]
        column = here.stop
    J[k : k + s, k + p :] = np.diag(np.exp(family_parameter(model, name)))
    J[k + s :, k : k + p] = np.eye(p)
    free = [j for j in range(len(J)) if j not in held]
    expected = J[:, free] @ covariance @ J[:, free].T
    boundary = np.isnan(np.diag(fit.vcov_all))
    own = np.asarray(fit.vcov_all)
    assert np.isnan(own[boundary]).all()
    assert boundary.any() == fit.is_singular
    inside = np.ix_(~boundary, ~boundary)
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    np.testing.assert_allclose(own[inside] / scale[inside], expected[inside] / scale[inside], rtol=0, atol=1e-6)
    assert list(fit.vcov_all.columns[-p:]) == list(fit.fixef.index)


@pytest.mark.parametrize(("model", "name"), LAPLACE)
def test_random_effects(model, name):
    frames, covariances = fit_of(model, name).ranef(condvar=True)
    for group, stored in case(model).fits[name]["ranef"].items():
        own = frames[group]
        order = [list(own.index).index(level) for level in stored["levels"]]
        effects = [list(own.columns).index(term) for term in stored["terms"]]
        np.testing.assert_allclose(own.to_numpy()[np.ix_(order, effects)], stored["values"], rtol=1e-6, atol=1e-8)
        cov = covariances[group][np.ix_(order, effects, effects)]
        sd = np.sqrt(np.diagonal(cov, axis1=1, axis2=2))
        np.testing.assert_allclose(sd, stored["condsd"], rtol=1e-6, atol=1e-8)
        if "condvar" in stored:
            np.testing.assert_allclose(cov, stored["condvar"], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("model", WITH_ROWS)
def test_rows(model):
    fit, stored = fit_of(model), case(model).fits["nAGQ1"]
    n = stored["n_rows_stored"]
    scale = np.abs(stored["fitted"]).max()
    np.testing.assert_allclose(fit.fitted[:n], stored["fitted"], rtol=1e-7, atol=1e-9 * scale)
    for kind in ("pearson", "deviance"):
        if f"residuals_{kind}" in stored:
            np.testing.assert_allclose(fit.residuals(kind)[:n], stored[f"residuals_{kind}"], rtol=1e-6, atol=1e-7)
    assert fit.fitted.index.equals(fit.labels.frame.index)
    np.testing.assert_allclose(fit.deviance, (fit.residuals("deviance") ** 2).sum(), rtol=1e-12)
    h, eta = 1e-6, fit.linear_predictor.to_numpy()
    slope = (fit.family.mean(eta + h) - fit.family.mean(eta - h)) / (2 * h)
    # Rounding of the difference: 1e-16 / h = 1e-10 of the mean.
    np.testing.assert_allclose(fit.residuals("working") * slope, fit.residuals("response"), rtol=1e-6, atol=1e-9)


# --- as text -----------------------------------------------------------------------------------------------------

CBPP = """
Generalized linear mixed model fit by maximum likelihood (Laplace approximation)
Family: binomial (logit)
Formula: cbind(incidence, size - incidence) ~ period + (1 | herd)
Success: 'incidence' (failures: 'size - incidence')

  AIC   BIC logLik -2*log(L) df.resid
194.1 204.2  -92.0     184.1       51

Scaled residuals:
    Min      1Q  Median     3Q    Max
-2.3818 -0.7888 -0.2024 0.5146 2.8796

Random effects:
Groups Name      Variance Std.Dev.
herd   Intercept  0.41250  0.64226
Number of obs: 56, groups: herd, 15

Fixed effects:
            Estimate Std. Error z value Pr(>|z|)
Intercept    -1.3985     0.2325  -6.016 1.79e-09
period[T.2]  -0.9923     0.3066  -3.236  0.00121
period[T.3]  -1.1287     0.3266  -3.455 0.000549
period[T.4]  -1.5803     0.4274  -3.697 0.000218

Correlation of Fixed Effects:
                   (1)   (2)   (3)
(1) Intercept
(2) period[T.2] -0.364
(3) period[T.3] -0.340 0.278
(4) period[T.4] -0.261 0.212 0.196
"""
# What lme4 prints of it. Its inner iteration stops early, and its standard errors are finite differences of that.
LME4 = {"estimates": [-1.3983, -0.9919, -1.1282, -1.5797], "errors": [0.2312, 0.3032, 0.3228, 0.4220],
        "residuals": [-2.3816, -0.7889, -0.2026, 0.5142, 2.8791], "sd": 0.6421,
        "statistics": ["194.1", "204.2", "-92.0", "184.1", "51"]}  # fmt: skip


def test_summary_of_cbpp():
    fit = fit_of("cbpp")
    text = str(fit.summary())
    assert text.strip() == CBPP.strip()
    assert re.search(r"df\.resid\n(.*)", text)[1].split() == LME4["statistics"]
    assert [float(x) for x in re.search(r"Max\n(.*)", text)[1].split()] == pytest.approx(LME4["residuals"], abs=1e-3)
    assert fit.fixef.to_list() == pytest.approx(LME4["estimates"], abs=1e-3)
    assert fit.se.to_list() == pytest.approx(LME4["errors"], rel=0.02)
    assert float(fit.theta[0]) == pytest.approx(LME4["sd"], abs=1e-3)


def test_tables():
    fit = fit_of("epil_nbinom2")
    text = str(fit.summary())
    assert f"Size parameter for nbinom: {fit.dispersion['size']:.4g}" in text
    assert "Success" not in text
    tidy = fit.tidy()
    assert list(tidy["effect"]) == ["fixed"] * 6 + ["ran_pars", "family"]
    assert tidy["estimate"].iloc[-1] == fit.dispersion["size"]
    assert tidy["term"].iloc[-1] == "size"
    np.testing.assert_allclose(tidy["statistic"][:6], fit.fixef / fit.se)
    row = fit.glance().iloc[0]
    assert (row["family"], row["link"], row["npar"]) == ("nbinom", "log", fit.npar)
    assert row["deviance"] == fit.deviance
    assert "expected curvature" in str(fit_of("cbpp_probit", "nAGQ1_expected").summary())
    assert repr(fit) == f"<GLMMFit {case('epil_nbinom2').formula!r}: nbinom (log), -2 log-likelihood 1249.9142>"
    assert ", singular>" in repr(fit_of("singular_zero"))
    for report in (fit.summary()._repr_html_(), fit.summary().to_latex(), fit.varcorr.to_html()):
        assert "Size parameter for nbinom" in report


def test_the_level_that_is_success_is_named():
    fit = fit_of("bacteria")
    assert fit.labels.success == "'y' is y (failure: n)"
    assert "Success: 'y' is y (failure: n)" in str(fit.summary())


# --- invariances -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["cbpp", "epil_nbinom2", "owls_slopes", "salamanders_presence"])
def test_the_order_of_rows_does_not_matter(model):
    data = case(model).table
    fit = fit_of(model)
    other = fitted_to(model, data.iloc[np.random.default_rng(0).permutation(len(data))])
    assert_same_fit(fit, other)
    np.testing.assert_allclose(other.fitted.loc[fit.fitted.index], fit.fitted, rtol=1e-6)


@pytest.mark.parametrize(("model", "group"), [("cbpp", "herd"), ("owls_slopes", "Nest")])
def test_names_of_groups_do_not_matter(model, group):
    data, fit = case(model).table, fit_of(model)
    levels = list(fit.ranef()[group].index)
    names = dict(zip(levels, np.random.default_rng(1).permutation(len(levels)), strict=True))
    other = fitted_to(model, data.assign(**{group: [f"g{names[str(level)]:03d}" for level in data[group]]}))
    assert_same_fit(fit, other)
    ranef = other.ranef()[group].loc[[f"g{names[level]:03d}" for level in levels]]
    np.testing.assert_allclose(ranef, fit.ranef()[group], rtol=1e-6, atol=1e-8)


def test_a_covariate_on_another_scale():
    fit, data = fit_of("owls_slopes"), case("owls_slopes").table
    other = fitted_to("owls_slopes", data.assign(arrival_c=100 * data["arrival_c"] + 7000))
    np.testing.assert_allclose(other.criterion, fit.criterion, rtol=1e-10)
    np.testing.assert_allclose(100 * other.fixef["arrival_c"], fit.fixef["arrival_c"], rtol=1e-6)
    np.testing.assert_allclose(100 * other.se["arrival_c"], fit.se["arrival_c"], rtol=1e-6)
    np.testing.assert_allclose(other.linear_predictor, fit.linear_predictor, rtol=1e-6, atol=1e-7)
    back = np.array([[1.0, 7000.0], [0.0, 100.0]])  # of effects of 1 and x to those of 1 and the old x
    # 7000 slopes of 100 times less cancel in the intercept: some four digits of eight.
    np.testing.assert_allclose(back @ other.Sigma["Nest"] @ back.T, fit.Sigma["Nest"], rtol=1e-4)


@pytest.mark.parametrize("model", ["cbpp", "cbpp_probit"])
def test_successes_and_failures_exchanged(model):
    fit = fit_of(model)
    other = fitted_to(model, case(model).table, "cbind(size - incidence, incidence) ~ period + (1 | herd)")
    np.testing.assert_allclose(other.criterion, fit.criterion, rtol=1e-12)
    np.testing.assert_allclose(other.fixef, -fit.fixef, **SAME)
    np.testing.assert_allclose(other.ranef()["herd"], -fit.ranef()["herd"], **SAME)
    np.testing.assert_allclose(other.fitted, 1 - fit.fitted, rtol=1e-7)
    np.testing.assert_allclose(other.vcov, fit.vcov, rtol=1e-6)


def single_trials(data, successes, size):
    """Every trial a row."""
    rows = data.loc[data.index.repeat(data[size])].reset_index(drop=True)
    within = np.concatenate([np.arange(n) for n in data[size]])
    return rows.assign(y=1.0 * (within < np.repeat(data[successes], data[size]).to_numpy()))


def test_counts_are_their_single_trials():
    data, fit = case("cbpp").table, fit_of("cbpp")
    single = single_trials(data, "incidence", "size")
    other = mj.glmm("y ~ period + (1 | herd)", single, family="binomial")
    s, n = data["incidence"].to_numpy(float), data["size"].to_numpy(float)
    ways = (gammaln(n + 1) - gammaln(s + 1) - gammaln(n - s + 1)).sum()
    np.testing.assert_allclose(other.criterion, fit.criterion + 2 * ways, rtol=1e-12)
    np.testing.assert_allclose(other.fixef, fit.fixef, **SAME)
    np.testing.assert_allclose(other.theta, fit.theta, **SAME)
    np.testing.assert_allclose(other.vcov_all, fit.vcov_all, rtol=1e-6)
    assert other.nobs == n.sum()


@pytest.mark.parametrize(
    ("formula", "options"),
    [
        ("incidence ~ period + (1 | herd)", {"size": "size"}),
        ("share ~ period + (1 | herd)", {"size": "size"}),
        ("share ~ period + (1 | herd)", {"weights": "size"}),
        ("incidence / size ~ period + (1 | herd)", {"weights": "size"}),
    ],
)
def test_ways_to_write_trials(formula, options):
    data = case("cbpp").table
    other = mj.glmm(formula, data.assign(share=data["incidence"] / data["size"]), family="binomial", **options)
    for own, theirs in zip(jax.tree.leaves(fit_of("cbpp").estimates), jax.tree.leaves(other.estimates), strict=True):
        np.testing.assert_allclose(own, theirs, rtol=1e-9)


def test_an_offset_of_log_2_halves_the_rate():
    fit, data = fit_of("epil_poisson"), case("epil_poisson").table
    other = fitted_to("epil_poisson", data, offset=np.full(len(data), np.log(2)))
    moved = fit.fixef - np.log(2) * (fit.fixef.index == "Intercept")
    np.testing.assert_allclose(other.fixef, moved, **SAME)
    np.testing.assert_allclose(other.criterion, fit.criterion, rtol=1e-12)
    np.testing.assert_allclose(other.fitted, fit.fitted, rtol=1e-7)


@pytest.mark.parametrize("model", ["epil_poisson", "epil_nbinom2"])
def test_weights_are_rows_repeated(model):
    data = case(model).table
    k = np.random.default_rng(0).integers(1, 4, len(data))
    weighted = fitted_to(model, data, weights=k.astype(float))
    repeated = fitted_to(model, data.loc[data.index.repeat(k)].reset_index(drop=True))
    assert_same_fit(repeated, weighted)
    np.testing.assert_allclose(weighted.deviance, repeated.deviance, rtol=1e-7)


def test_case_weights_of_trials():
    """Beside ``size`` weights repeat rows."""
    data = case("cbpp").table
    k = np.resize([1, 2], len(data))
    weighted = mj.glmm("incidence ~ period + (1 | herd)", data, family="binomial", size="size", weights=1.0 * k)
    repeated = mj.glmm(
        "incidence ~ period + (1 | herd)", data.loc[data.index.repeat(k)], family="binomial", size="size"
    )
    assert_same_fit(repeated, weighted)


def test_a_start_changes_nothing():
    fit = fit_of("owls_slopes")
    other = fitted_to("owls_slopes", case("owls_slopes").table, start=[1.0, 0.1, 0.3])
    assert_same_fit(fit, other, rtol=1e-6, atol=1e-8)


# --- again -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["cbpp", "epil_nbinom2", "bacteria", "salamanders_presence"])
def test_a_refit_is_a_fresh_fit(model):
    fit = fit_of(model)
    y = np.random.default_rng(0).permutation(fit.design.y)
    if fit.design.size is not None:
        y = np.minimum(y, fit.design.size)
    refit = fit.refit(y)
    design = replace(fit.design, y=y)
    est = mj.glmm_estimate(mj.rows(design, fit.family))
    for own, theirs in zip(jax.tree.leaves(refit.estimates), jax.tree.leaves(est), strict=True):
        np.testing.assert_allclose(own, theirs, rtol=1e-12)
    assert refit.labels.success == fit.labels.success
    np.testing.assert_allclose(refit.residuals("response") + refit.fitted, refit.record.observed, rtol=1e-12)


def test_refits_take_rows_by_their_labels():
    data = table("sleepstudy").assign(n=lambda d: np.round(d["Reaction"] / 10))
    fit = mj.glmm("n ~ Days + (1 | Subject)", data, family="poisson", subset="Days > 1")
    assert_same_fit(fit, fit.refit(data["n"].sample(frac=1.0, random_state=0)))
    assert fit.refit(data["n"] + 1).labels.frame["n"].equals(fit.labels.frame["n"] + 1)
    for y, message in [
        (-data["n"], "negative"),
        (data["n"].where(data["Days"] != 5), "y is missing or infinite in 18 of the 144 rows"),
        (np.ones(3), r"y has shape \(3,\)"),
        (0 * data["n"], "are 0"),
    ]:
        with pytest.raises(mj.DataError, match=message):
            fit.refit(y)
    with pytest.raises(mj.DataError, match="more successes than trials"):
        fit_of("cbpp").refit(fit_of("cbpp").design.size + 1)


def test_pickles():
    fit = fit_of("owls_slopes")
    again = pickle.loads(pickle.dumps(fit))
    assert str(again.summary()) == str(fit.summary())
    assert again.vcov_all.equals(fit.vcov_all)
    assert again.residuals().equals(fit.residuals())
    assert again.refit(fit.design.y).criterion == fit.criterion


@pytest.mark.parametrize("model", WITH_ROWS)
def test_a_fit_and_what_it_says_compile_nothing(model):
    jax.clear_caches()
    with compiled() as names:
        fit = fitted_to(model, case(model).table)
        str(fit.summary()), fit.tidy(), fit.glance(), fit.ranef(condvar=True), fit.vcov_all, fit.coef()
        [fit.residuals(kind) for kind in ("response", "pearson", "deviance", "working")]
        fit.refit(fit.design.y)
    assert not names


# --- what goes wrong ---------------------------------------------------------------------------------------------


def separated():
    """Nobody of arm B recovers."""
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"g": np.repeat(np.arange(12).astype(str), 10), "arm": np.resize(["A", "B"], 120)})
    effects = np.repeat(rng.normal(size=12), 10)
    return frame.assign(y=1.0 * (rng.random(120) < 1 / (1 + np.exp(-effects))) * (frame["arm"] == "A"))


def test_separation_is_named():
    data = separated()
    with pytest.warns(mj.ConvergenceWarning, match=r"all 60 rows with arm = B are 0.*estimate of arm\[T.B\]") as seen:
        fit = mj.glmm("y ~ arm + (1 | g)", data, family="binomial")
    assert seen[0].filename == __file__
    assert not fit.converged
    assert fit.estimates.result == mj.Result.SEPARATED
    assert "NOT CONVERGED" in repr(fit)
    assert "NOT CONVERGED: the fixed effects separate the response 'y'" in str(fit.summary())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = mj.glmm("y ~ 1 + (1 | g)", data, family="binomial")
    assert other.converged
    assert other.optimizer.message == "converged"


def test_an_unbounded_size_is_named():
    """Counts that vary less than Poisson ones."""
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"g": np.repeat(np.arange(20), 8), "y": rng.binomial(8, 0.5, 160)})
    with pytest.warns(
        mj.ConvergenceWarning, match="the size of the negative binomial family runs to infinity.*take family='poisson'"
    ):
        fit = mj.glmm("y ~ 1 + (1 | g)", data, family="nbinom")
    assert fit.estimates.result == mj.Result.UNBOUNDED


def outcomes(**columns):
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({
        "g": np.resize(list("abcdef"), 48), "x": rng.normal(size=48), "y": rng.integers(0, 2, 48),
        "count": rng.poisson(3.0, 48), "n": rng.integers(1, 5, 48), "row": np.arange(48).astype(str),
    })  # fmt: skip
    return frame.assign(**columns)


THREE = np.resize(["a", "b", "c"], 48)
BAD = {
    "three levels": ("z ~ x + (1 | g)", {"z": THREE}, "binomial", {}, "3 levels .* ordinal or multinomial is not here"),
    "all failures": ("z ~ x + (1 | g)", {"z": 0}, "binomial", {}, "no finite estimate"),
    "negative": ("z ~ x + (1 | g)", {"z": -1}, "poisson", {}, "negative"),
    "counts of zero": ("z ~ x + (1 | g)", {"z": 0}, "nbinom", {}, "all 48 counts of 'z' are 0"),
    "counts": ("count ~ x + (1 | g)", {}, "binomial", {}, "give the numbers of trials as size="),
    "proportions": ("z ~ x + (1 | g)", {"z": 0.5}, "binomial", {}, "give the numbers of trials as size="),
    "one column": ("cbind(y) ~ x + (1 | g)", {}, "binomial", {}, "takes two columns"),
    "three columns": ("cbind(y, n, n) ~ x + (1 | g)", {}, "binomial", {}, "takes two columns, .* got 3"),
    "pair of counts": ("cbind(y, n) ~ x + (1 | g)", {}, "poisson", {}, "a poisson response is one column"),
    "successes": ("n ~ x + (1 | g)", {}, "binomial", {"size": "y"}, "size= is 0, but 'n' is not in"),
    "size of counts": ("count ~ x + (1 | g)", {}, "poisson", {"size": "n"}, "an exposure is an offset"),
    "trials in parts": ("y ~ x + (1 | g)", {}, "binomial", {"size": np.full(48, 1.5)}, "whole numbers of trials"),
    "zero weights": ("count ~ x + (1 | g)", {}, "poisson", {"weights": np.zeros(48)}, "weights must be positive"),
    "no exposure": ("count ~ x + offset(log(z)) + (1 | g)", {"z": 0.0}, "poisson", {}, "infinite in 48 rows"),
    "single trials": ("y ~ x + (1 | row)", {}, "binomial", {}, "say nothing of effects of single rows"),
    "one group": ("y ~ x + (1 | z)", {"z": "a"}, "binomial", {}, "'z' has one level"),
    "no random term": ("y ~ x", {}, "binomial", {}, "no random term"),
    "no column": ("y ~ nope + (1 | g)", {}, "binomial", {}, "nope"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("formula", "columns", "family", "options", "message"), BAD.values(), ids=BAD.keys())
def test_bad_data(formula, columns, family, options, message):
    with pytest.raises((mj.DataError, mj.FormulaError), match=message):
        mj.glmm(formula, outcomes(**columns), family=family, **options)


OPTIONS = {
    "gaussian": ({"family": "gaussian"}, "use mj.lmm"),
    "unknown family": ({"family": "binomal"}, "there is no family 'binomal'; did you mean 'binomial'"),
    "quasi family": ({"family": "quasipoisson"}, "has no likelihood"),
    "no family": ({"family": 3}, "family must be a name"),
    "link": ({"link": "log"}, "binomial has no link 'log'"),
    "two links": ({"family": mj.families.binomial("probit"), "link": "logit"}, "link is given twice"),
    "curvature": ({"curvature": "both"}, "curvature must be 'observed' or 'expected', got 'both'"),
    "start of wrong length": ({"start": [1.0, 2.0]}, r"theta has shape \(2,\)"),
    "infinite start": ({"start": [np.inf]}, "start must be finite"),
    "start of text": ({"start": ["a"]}, "start must be theta as numbers"),
    "chunks": ({"data": [outcomes()]}, "data in chunks are read once"),
}


@pytest.mark.parametrize(("options", "message"), OPTIONS.values(), ids=OPTIONS.keys())
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        mj.glmm(**{"formula": "y ~ x + (1 | g)", "data": outcomes(), "family": "binomial", **options})


def test_an_effect_of_every_row_is_fitted_beside_counts():
    """Poisson counts with an effect a row are overdispersed."""
    fit = mj.glmm("count ~ x + (1 | row)", outcomes(), family="poisson")
    assert fit.converged
    assert fit.ranef()["row"].shape == (48, 1)


def test_a_family_of_ones_own():
    """Poisson counts again, given by their log density: what follows from a variance is refused in words."""
    own = mj.families.custom(
        lambda y, eta, size, psi: y * eta - jax.numpy.exp(eta) - jax.scipy.special.gammaln(y + 1), mean=jax.numpy.exp
    )
    data = case("epil_poisson").table
    fit, expected = mj.glmm(case("epil_poisson").formula, data, family=own), fit_of("epil_poisson")
    assert_same_fit(expected, fit)
    np.testing.assert_allclose(fit.fitted, expected.fitted, rtol=1e-7)
    assert "Scaled residuals" not in str(fit.summary())
    with pytest.raises(ValueError, match="does not say the variance"):
        fit.residuals("pearson")
    with pytest.raises(ValueError, match="has no known derivative"):
        fit.residuals("working")


def test_parameters_of_ones_own_family_are_as_they_are():
    """A gamma density by the logarithm of its dispersion, under that name."""

    def loglik(y, eta, size, psi):
        shape, mean = jax.numpy.exp(-psi[0]), jax.numpy.exp(eta)
        ratio = shape * y / mean
        return shape * jax.numpy.log(ratio) - ratio - jax.numpy.log(y) - jax.scipy.special.gammaln(shape)

    own = mj.families.custom(loglik, mean=jax.numpy.exp, psi=("log_dispersion",), start=(-3.0,))
    stored, expected = case("sleepstudy_gamma_intercept"), fit_of("sleepstudy_gamma_intercept")
    fit = mj.glmm(stored.formula, stored.table, family=own)
    np.testing.assert_allclose(fit.criterion, expected.criterion, rtol=1e-9)
    np.testing.assert_allclose(fit.dispersion["log_dispersion"], np.log(expected.dispersion["dispersion"]), rtol=1e-6)
    slope = expected.dispersion["dispersion"]
    one, other = fit.vcov_all.loc["log_dispersion"], expected.vcov_all.loc["dispersion"]
    np.testing.assert_allclose(one["log_dispersion"] * slope**2, other["dispersion"], rtol=1e-5)
    np.testing.assert_allclose(one["Days"] * slope, other["Days"], rtol=1e-4, atol=1e-12)


def test_kinds_of_residuals_are_listed():
    with pytest.raises(
        ValueError, match="kind must be one of 'response', 'pearson', 'deviance', 'working' or 'quantile', got 'raw'"
    ):
        fit_of("cbpp").residuals("raw")


# --- arrays ------------------------------------------------------------------------------------------------------


def small_rows(**changes):
    term = mj.RandomTerm(Z=np.ones((12, 1)), group=np.repeat(np.arange(4), 3), n_groups=4)
    design = mj.Design(y=np.arange(12.0), X=np.ones((12, 1)), terms=(term,))
    return mj.rows(replace(design, **changes), mj.families.poisson())


def test_arrays_that_are_refused():
    data = small_rows()
    with pytest.raises(ValueError, match=r"y has shape \(2, 12\).*glmm_estimate_many"):
        mj.glmm_estimate(data.with_response(np.ones((2, 12))))
    with pytest.raises(ValueError, match="needs 64 bits"):
        jax.jit(lambda y: mj.glmm_estimate(data.with_response(y)).beta)(np.arange(12.0))
    with pytest.raises(ValueError, match="curvature must be"):
        mj.glmm_estimate(data, curvature="none")
    with pytest.raises(ValueError, match="start must be finite"):
        mj.glmm_estimate(data, start=[np.nan])


def test_arrays_of_jax():
    """Concrete arrays of JAX, in single precision too, are read as float64."""
    expected = mj.glmm_estimate(small_rows())
    y = jax.numpy.arange(12.0, dtype="float32")
    found = mj.glmm_estimate(small_rows(y=y, X=jax.numpy.ones((12, 1), "float32")))
    assert found.beta.dtype == np.float64
    np.testing.assert_allclose(found.beta, expected.beta, rtol=1e-6)  # single precision has seven digits
    np.testing.assert_allclose(found.theta, expected.theta, rtol=1e-6)


def test_covariances_belong_to_the_coordinates_of_theta():
    """Whatever signs the search ends with: of two starts that lead to different ones the covariances are the same."""
    data, family = arrays("owls_slopes").design, mj.families.poisson()
    expected = mj.glmm_estimate(mj.rows(data, family))
    for start in ([0.5, 0.05, 0.2], [0.1, 3.0, 0.1], [5.0, -5.0, 0.01]):
        found = mj.glmm_estimate(mj.rows(data, family), start=start)
        scale = np.sqrt(np.diag(expected.vcov_all))
        difference = (found.vcov_all - expected.vcov_all) / np.outer(scale, scale)
        assert np.abs(difference).max() < 1e-6


# --- units -----------------------------------------------------------------------------------------------------------

UNITS = [
    ("gamma", "inverse"),
    ("inverse_gaussian", "1/mu^2"),
    ("inverse_gaussian", "inverse"),
    ("gamma", "log"),
]


@pytest.mark.parametrize(("family", "link"), UNITS)
def test_units_of_the_response_change_nothing(family, link):
    """A response in other units is the same fit, also where the predictor has its scale: with levels of unequal size,
    whose empty places in the rectangle have no predictor of their own."""
    data = case("cbpp").table
    fit = mj.glmm("size ~ period + (1 | herd)", data, family, link)
    assert fit.converged
    power = {"log": 0.0, "inverse": 1.0, "1/mu^2": 2.0}[link]
    for unit in (1e-3, 1e3):
        other = mj.glmm("size ~ period + (1 | herd)", data.assign(size=data["size"] * unit), family, link)
        assert other.converged
        assert other.criterion - 2 * len(data) * np.log(unit) == pytest.approx(fit.criterion, abs=1e-8)
        assert other.theta == pytest.approx(fit.theta / unit**power, rel=1e-6)
        assert other.fixef.to_numpy()[1:] == pytest.approx(fit.fixef.to_numpy()[1:] / unit**power, rel=1e-6)


def test_gamma_with_an_inverse_link_against_glmmtmb():
    """glmmTMB 1.1.5: -2 log-likelihood 372.1039226, sd 0.028152, dispersion 0.1753804."""
    fit = mj.glmm("size ~ period + (1 | herd)", case("cbpp").table, "gamma", "inverse")
    assert fit.criterion == pytest.approx(372.1039226, abs=1e-6)
    assert fit.theta[0] == pytest.approx(0.028152, rel=2e-5)
    assert fit.dispersion["dispersion"] == pytest.approx(0.1753804, rel=1e-5)
