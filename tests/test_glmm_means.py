"""Marginal means of generalised linear mixed models: on the link's scale, the response's, and averaged."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from glmm_cases import fit_of

import mixjax as mj

# R 4.x, emmeans 1.8.4.1: qdrg(~ period, coef = fixef, vcov = vcov of this fit, link = "logit"), type = "response".
EMMEANS = pd.DataFrame({
    "estimate": [0.19804914160, 0.08387195302, 0.07397293174, 0.04839074040],
    "std_error": [0.03692252205, 0.02383604902, 0.02262415932, 0.01980441509],
    "lower": [0.13538416598, 0.04747681043, 0.04013546977, 0.02142012498],
    "upper": [0.2803158544, 0.1439507488, 0.1324030287, 0.1056542437],
})  # fmt: skip
# pairs(., infer = TRUE), Tukey's intervals.
PAIRS = pd.DataFrame({
    "odds_ratio": [2.697519737, 3.091548457, 4.856479949, 1.146070746, 1.800350108, 1.570889157],
    "std_error": [0.8271741902, 1.0098167428, 2.0758372123, 0.4363186521, 0.8466182281, 0.7607569666],
    "lower": [1.2269831261, 1.3357982677, 1.6196591265, 0.4309719007, 0.5378846399, 0.4527116127],
    "upper": [5.930491281, 7.155026394, 14.561951407, 3.047711817, 6.025939895, 5.450915492],
    "null": 1.0,
    "statistic": [3.236122656, 3.455423437, 3.697189091, 0.358120238, 1.250353338, 0.932596400],
})  # fmt: skip
# contrast(., "eff", infer = TRUE), Bonferroni's intervals.
EFFECTS = pd.DataFrame({
    "odds_ratio": [2.5226997970, 0.9351923407, 0.8159987890, 0.5194502651],
    "std_error": [0.4675785052, 0.2163599503, 0.1999424515, 0.1626888288],
    "lower": [1.5878546524, 0.5247382182, 0.4424844840, 0.2375799296],
    "upper": [4.007932499, 1.666706720, 1.504807621, 1.135738100],
})  # fmt: skip
# The same coefficients with link = "probit": pairs(regrid(emmeans(., "period")), infer = TRUE).
DIFFERENCES = pd.DataFrame({
    "estimate": [0.07257229484, 0.07522793260, 0.07952998308, 0.00265563776, 0.00695768824, 0.00430205048],
    "std_error": [0.03276887876, 0.03327423514, 0.03436256814, 0.00755174374, 0.00693207474, 0.00536226255],
    "lower": [-0.011611996018, -0.010254634831, -0.008748546414, -0.016745031876, -0.010851032038, -0.009473772415],
    "upper": [0.15675658570, 0.16071050003, 0.16780851258, 0.02205630740, 0.02476640852, 0.01807787337],
})  # fmt: skip


@pytest.fixture(scope="module")
def cbpp():
    return fit_of("cbpp")


@pytest.fixture(scope="module")
def sloped():
    """Random slopes, two grouping factors, an interaction."""
    rng = np.random.default_rng(4)
    n = 240
    table = pd.DataFrame({
        "g": np.repeat(np.arange(24), 10), "h": np.tile(np.arange(10), 24), "x": rng.normal(size=n).round(1),
        "arm": np.where(rng.random(n) < 0.5, "a", "b"), "sex": np.where(rng.random(n) < 0.5, "f", "m"),
    })  # fmt: skip
    eta = 0.8 + 0.3 * table["x"] + 0.4 * (table["arm"] == "b") + 0.4 * rng.normal(size=24)[table["g"]]
    eta = eta + 0.3 * rng.normal(size=24)[table["g"]] * table["x"] + 0.3 * rng.normal(size=10)[table["h"]]
    table["y"] = rng.poisson(np.exp(eta))
    return mj.glmm("y ~ x + arm * sex + (x | g) + (1 | h)", table, "poisson")


def with_link(fit, link):
    """The same estimates under another link."""
    family = mj.families.binomial(link)
    record = fit.record
    return mj.GLMMFit(replace(record, rows=replace(record.rows, family=family)))


# --- the response's scale -------------------------------------------------------------------------------------------


def test_means_and_odds_ratios_are_those_of_emmeans(cbpp):
    means = cbpp.emmeans("period", scale="response")
    frame = means.to_frame()
    np.testing.assert_allclose(frame[EMMEANS.columns], EMMEANS, rtol=1e-8)
    pairs = means.contrasts()
    assert pairs["contrast"].tolist() == ["1 / 2", "1 / 3", "1 / 4", "2 / 3", "2 / 4", "3 / 4"]
    np.testing.assert_allclose(pairs[PAIRS.columns], PAIRS, rtol=5e-9)
    np.testing.assert_allclose(means.contrasts("eff")[EFFECTS.columns], EFFECTS, rtol=1e-8)
    assert "scale of the logit" in pairs.attrs["notes"][0]
    assert "median subject" in str(means)


def test_tests_of_ratios_are_those_of_the_link(cbpp):
    link, response = cbpp.emmeans("period"), cbpp.emmeans("period", scale="response")
    a, b = link.contrasts("trt.vs.ctrl"), response.contrasts("trt.vs.ctrl")
    np.testing.assert_array_equal(a[["statistic", "p_value"]], b[["statistic", "p_value"]])
    np.testing.assert_allclose(b["odds_ratio"], np.exp(a["estimate"]))
    np.testing.assert_allclose(b[["lower", "upper"]], np.exp(a[["lower", "upper"]]))
    assert (a["contrast"] == b["contrast"].str.replace(" / ", " - ")).all()
    assert link.letters()["group"].tolist() == response.letters()["group"].tolist()
    np.testing.assert_allclose(response.letters()["estimate"], np.sort(EMMEANS["estimate"]), rtol=1e-8)


def test_other_links_have_differences_of_means(cbpp):
    probit = with_link(cbpp, "probit")
    means, link = (probit.emmeans("period", scale=scale).to_frame() for scale in ("response", "link"))
    for name in ("estimate", "lower", "upper"):
        np.testing.assert_allclose(means[name], scipy.stats.norm.cdf(link[name]), rtol=1e-12)
    slope = scipy.stats.norm.pdf(link["estimate"])
    np.testing.assert_allclose(means["std_error"], slope * link["std_error"], rtol=1e-12)
    found = probit.emmeans("period", scale="response").contrasts()
    assert found["contrast"].tolist()[0] == "1 - 2"
    np.testing.assert_allclose(found[DIFFERENCES.columns], DIFFERENCES, rtol=2e-6, atol=1e-9)


def test_ratios_of_rates(sloped):
    found = sloped.emmeans("arm | sex", scale="response")
    pairs = found.contrasts()
    assert list(pairs.columns)[:3] == ["sex", "contrast", "ratio"]
    frame = found.to_frame()
    ratio = frame["estimate"].to_numpy().reshape(2, 2)
    np.testing.assert_allclose(pairs["ratio"], ratio[:, 0] / ratio[:, 1], rtol=1e-12)
    product = sloped.emmeans("arm * sex", scale="response").contrasts(interaction=True)
    assert product.iloc[0, :2].tolist() == ["a / b", "f / m"]
    np.testing.assert_allclose(product["ratio"], pairs["ratio"][0] / pairs["ratio"][1], rtol=1e-12)
    # A mean over sexes is one of predictors: geometric of the rates.
    alone = sloped.emmeans("arm", scale="response").to_frame()["estimate"]
    np.testing.assert_allclose(alone, np.exp(np.log(ratio).mean(0)), rtol=1e-12)


def test_what_has_no_ratio(cbpp):
    means = cbpp.emmeans("period", scale="response")
    with pytest.raises(ValueError, match="sum to zero"):
        means.contrasts({"mean": [0.25] * 4})
    with pytest.raises(ValueError, match="scale='link'"):
        means.eff_size(sigma=1.0)
    for arguments in ({"scale": "odds"}, {"integrate": "yes"}, {"integrate": True, "scale": "link"}):
        with pytest.raises(ValueError, match=r"scale|integrate"):
            cbpp.emmeans("period", **arguments)


def test_pictures_of_means(cbpp):
    pytest.importorskip("matplotlib").use("Agg")
    from mixjax import plots

    with pytest.raises(ValueError, match="ratios"):
        plots.means(cbpp.emmeans("period", scale="response"), arrows=True)
    plots.means(cbpp.emmeans("period", scale="response"))
    plots.means(cbpp.emmeans("period", integrate=True))
    ax = plots.contrasts(cbpp.emmeans("period", scale="response").contrasts())
    assert ax.get_xscale() == "log"
    assert ax.get_xlabel() == "odds ratio"
    shown = sorted(x for line in ax.lines if line.get_marker() == "o" for x in line.get_xdata())
    np.testing.assert_allclose(shown, np.sort(PAIRS["odds_ratio"]), rtol=1e-8)
    filled = [line for line in ax.lines if line.get_marker() == "o" and line.get_markerfacecolor() != "none"]
    assert sum(len(line.get_xdata()) for line in filled) == 3


# --- averaged over random effects -----------------------------------------------------------------------------------


def population_means(fit, table, parameters, cells):
    """Means over cells by hand, of Poisson responses: random slopes of x, an intercept of the second factor."""
    sd, sd_x, cor, sd_h = parameters[:4]
    beta = parameters[4:]
    x = table["x"].mean()
    found = []
    for arm in ("a", "b"):
        rows = []
        for sex in ("f", "m"):
            b, m = float(arm == "b"), float(sex == "m")
            eta = beta @ np.array([1.0, x, b, m, b * m])
            variance = sd**2 + 2 * cor * sd * sd_x * x + sd_x**2 * x**2 + sd_h**2
            rows.append(np.exp(eta + variance / 2))
        found.append(np.mean(rows) if cells == "arm" else rows)
    return np.array(found).ravel()


@pytest.mark.parametrize("cells", ["arm", "both"])
def test_population_means_and_their_errors(sloped, cells):
    """The variance of z'b with random slopes, two factors; the delta method by finite differences of names' scale."""
    means = sloped.emmeans("arm" if cells == "arm" else "arm * sex", integrate=True)
    found = means.to_frame()
    table, every = sloped.labels.frame, sloped.record.parameters
    assert every.names[:4] == ("sd_Intercept|g", "cor_x.Intercept|g", "sd_x|g", "sd_Intercept|h")
    order = [0, 2, 1, *range(3, len(every.names))]
    point, V = every.estimate[order], every.covariance[np.ix_(order, order)]
    assert list(sloped.labels.fixed) == ["Intercept", "x", "arm[T.b]", "sex[T.m]", "arm[T.b]:sex[T.m]"]
    want = population_means(sloped, table, point, cells)
    np.testing.assert_allclose(found["estimate"], want, rtol=1e-12)
    h = 1e-5
    slopes = np.stack([
        (population_means(sloped, table, point + h * e, cells) - population_means(sloped, table, point - h * e, cells))
        / (2 * h)
        for e in np.eye(len(point))
    ], 1)  # fmt: skip
    joint = slopes @ V @ slopes.T
    np.testing.assert_allclose(found["std_error"], np.sqrt(np.diag(joint)), rtol=1e-6)
    middle = np.log(found["lower"]) + np.log(found["upper"])
    np.testing.assert_allclose(middle, 2 * np.log(found["estimate"]), rtol=1e-10)
    pairs = means.contrasts(adjust="none")
    np.testing.assert_allclose(pairs["estimate"].iloc[0], want[0] - want[1], rtol=1e-10)
    error = np.sqrt(joint[0, 0] + joint[1, 1] - 2 * joint[0, 1])
    np.testing.assert_allclose(pairs["std_error"].iloc[0], error, rtol=1e-6)
    assert "averaged over random effects" in str(means)


def test_population_means_are_predictions(cbpp):
    table = cbpp.emmeans("period", integrate=True).to_frame()
    new = {"period": pd.Categorical(list("1234"))}
    want = cbpp.predict(new, integrate=True, interval="confidence")
    np.testing.assert_allclose(table[["estimate", "std_error", "lower", "upper"]], want, rtol=1e-10)
    median = cbpp.emmeans("period", scale="response").to_frame()
    want = cbpp.predict(new, random=False, interval="confidence")
    np.testing.assert_allclose(median[["estimate", "std_error", "lower", "upper"]], want, rtol=1e-10)


def test_variables_that_only_random_effects_read():
    rng = np.random.default_rng(6)
    table = pd.DataFrame(
        {"g": np.repeat(np.arange(20), 12), "z": np.tile(np.arange(12.0), 20), "k": np.tile(list("uv"), 120)}
    )
    table["arm"] = np.where(rng.random(240) < 0.5, "a", "b")
    b = 0.5 * rng.normal(size=20).repeat(12) + 0.1 * rng.normal(size=20).repeat(12) * table["z"]
    table["y"] = rng.poisson(np.exp(0.5 + b))
    fit = mj.glmm("y ~ arm + (1 | g) + (0 + z | g)", table, "poisson")
    found = fit.emmeans("arm", integrate=True).to_frame()["estimate"]
    variance = fit.Sigma["g"][0, 0] + 5.5**2 * fit.Sigma["g.1"][0, 0]
    eta = fit.emmeans("arm").to_frame()["estimate"]
    np.testing.assert_allclose(found, np.exp(eta + variance / 2), rtol=1e-12)
    factor = mj.glmm("y ~ arm + (1 | g) + (0 + k | g)", table, "poisson", check_identifiable=False)
    with pytest.raises(mj.DataError, match="'k', a factor"):
        factor.emmeans("arm", integrate=True)
    assert len(factor.emmeans("arm", scale="response").to_frame()) == 2


def test_means_that_cannot_be_estimated():
    rng = np.random.default_rng(7)
    table = pd.DataFrame(
        {"g": np.repeat(np.arange(20), 9), "a": np.tile(list("uvw"), 60), "b": rng.choice(list("xy"), 180)}
    )
    table = table[~((table["a"] == "u") & (table["b"] == "y"))]
    table = table.assign(y=rng.poisson(np.exp(0.5 + 0.4 * rng.normal(size=20)[table["g"]])))
    with pytest.warns(mj.DataWarning):
        fit = mj.glmm("y ~ a * b + (1 | g)", table, "poisson")
    for arguments in ({"scale": "response"}, {"integrate": True}):
        means = fit.emmeans("a", **arguments)
        assert means.to_frame()["estimate"].isna().tolist() == [True, False, False]
        column = "ratio" if "scale" in arguments else "estimate"
        assert means.contrasts()[column].isna().tolist() == [True, True, False]
        assert means.letters()["group"].tolist()[-1] == ""


def test_no_hessian_no_errors(cbpp):
    record = cbpp.record
    nothing = np.full_like(record.estimates.vcov_all, np.nan)
    fit = mj.GLMMFit(replace(record, estimates=record.estimates._replace(vcov_all=nothing)))
    with pytest.warns(mj.InferenceWarning, match="no standard errors"):
        found = fit.emmeans("period", integrate=True).to_frame()
    assert found["estimate"].notna().all()
    assert found["std_error"].isna().all()


# --- coefficients ---------------------------------------------------------------------------------------------------


def test_tidy_has_ratios_and_intervals(cbpp):
    plain, table = cbpp.tidy(), cbpp.tidy(exponentiate=True, conf_int=True)
    fixed = (table["effect"] == "fixed").to_numpy()
    assert list(table.columns) == [*plain.columns, "lower", "upper"]
    np.testing.assert_allclose(table["estimate"][fixed], np.exp(plain["estimate"][fixed]))
    np.testing.assert_allclose(table["std_error"][fixed], np.exp(plain["estimate"][fixed]) * plain["std_error"][fixed])
    pd.testing.assert_frame_equal(table[["statistic", "p_value"]], plain[["statistic", "p_value"]])
    want = np.exp(cbpp.confint(method="wald").iloc[-4:])
    np.testing.assert_allclose(table.loc[fixed, ["lower", "upper"]], want, rtol=1e-12)
    np.testing.assert_array_equal(table["estimate"][~fixed], plain["estimate"][~fixed])
    assert table.loc[~fixed, ["lower", "upper"]].isna().all(axis=None)
    assert table.attrs["notes"][-1] == "fixed effects are odds ratios"
    narrow = cbpp.tidy(conf_int=True, level=0.5)
    assert (narrow["upper"] - narrow["lower"] < cbpp.tidy(conf_int=True).eval("upper - lower")).sum() == fixed.sum()
    with pytest.raises(ValueError, match="link 'probit'"):
        with_link(cbpp, "probit").tidy(exponentiate=True)
    with pytest.raises(ValueError, match="True or False"):
        cbpp.tidy(exponentiate="odds")


def test_marginaleffects_takes_a_fit(cbpp):
    me = pytest.importorskip("marginaleffects")
    from mixjax.inference.fixed.marginaleffects import to_marginaleffects

    for scale in ("link", "response"):
        found = me.predictions(to_marginaleffects(cbpp.record, scale), by="period").sort("period")
        means = cbpp.emmeans("period", scale=scale).to_frame()
        np.testing.assert_allclose(found["estimate"], means["estimate"], rtol=1e-10)
        np.testing.assert_allclose(found["std_error"], means["std_error"], rtol=1e-4)
    with pytest.raises(ValueError, match="scale must be"):
        to_marginaleffects(cbpp.record, "odds")
