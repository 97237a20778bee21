"""Marginal means of generalised linear mixed models: on the link's scale, the response's, and averaged."""

import json
from dataclasses import replace
from pathlib import Path

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
# pairs(regrid(., "log"), infer = TRUE), Tukey's intervals; summary(regrid(., "log")).
RISKS = pd.DataFrame({
    "ratio": [2.361327410, 2.677319080, 4.092707406, 1.133819507, 1.733223181, 1.528658812],
    "std_error": [0.6432187407, 0.7869154834, 1.6334124359, 0.3977871498, 0.7671413120, 0.6981660156],
    "lower": [1.1728387764, 1.2582579499, 1.4679957309, 0.4603711099, 0.5559396800, 0.4728711529],
    "upper": [4.754163360, 5.696794890, 11.410287888, 2.792413875, 5.403576509, 4.941721967],
    "null": 1.0,
    "statistic": [3.1543064157, 3.3506349681, 3.5309335258, 0.3579771022, 1.2425910302, 0.9292183479],
})  # fmt: skip
LOGS = pd.DataFrame(
    {
        "lower": [0.13743030574, 0.04805171928, 0.04061983490, 0.02169697356],
        "upper": [0.2854062085, 0.1463944393, 0.1347123799, 0.1079258243],
    }
)
HERE = Path(__file__).parent


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


def test_titles_of_two_columns_of_counts(cbpp):
    """``cbind()`` is too long for an axis."""
    pytest.importorskip("matplotlib").use("Agg")
    from mixjax import plots

    assert cbpp.labels.response == "cbind(incidence, size - incidence)"
    assert plots.means(cbpp.emmeans("period", scale="response")).get_xlabel() == "proportion of incidence"
    ax = plots.observed(cbpp)
    assert ax.get_xlabel() == "mean fitted proportion of incidence by herd"
    assert ax.get_ylabel() == "mean proportion of incidence"
    assert plots.residuals(cbpp).get_ylabel() == "quantile residual of proportion of incidence"
    assert "cbind" not in plots.residuals(cbpp, kind="pearson").get_xlabel()
    table = mj.datasets.load("cbpp").assign(a_very_long_name_of_cases=lambda d: d["incidence"])
    long = mj.glmm("cbind(a_very_long_name_of_cases, size - incidence) ~ period + (1 | herd)", table, "binomial")
    assert plots.observed(long).get_ylabel() == "mean proportion of successes"


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


# --- ratios of means ------------------------------------------------------------------------------------------------


def test_risk_ratios_are_those_of_regrid(cbpp):
    """Means of the median subject, whose own ratios are of odds."""
    means = cbpp.emmeans("period", scale="response").regrid("log")
    found = means.contrasts()
    np.testing.assert_allclose(found[RISKS.columns], RISKS, rtol=5e-9)
    np.testing.assert_allclose(means.to_frame()[["lower", "upper"]], LOGS, rtol=5e-9)
    np.testing.assert_allclose(means.to_frame()[["estimate", "std_error"]], EMMEANS.iloc[:, :2], rtol=1e-8)
    assert found["contrast"][0] == "1 / 2"
    assert "scale of the log of the means" in found.attrs["notes"][0]
    # The log odds of means that nothing was averaged over are the link's scale.
    odds = cbpp.emmeans("period", scale="response").regrid("logit").contrasts()
    np.testing.assert_allclose(odds[PAIRS.columns], PAIRS, rtol=5e-9)


@pytest.mark.parametrize("transform", ["log", "logit"])
def test_ratios_of_population_means(cbpp, transform):
    """By hand from the means and their covariance, which finite differences hold below."""
    means = cbpp.emmeans("period", integrate=True)
    V = means.slopes @ means.covariance @ means.slopes.T
    np.testing.assert_allclose(np.sqrt(np.diag(V)), means.to_frame()["std_error"], rtol=1e-12)
    m = means.means
    there, slope = (np.log(m), 1 / m) if transform == "log" else (np.log(m / (1 - m)), 1 / (m * (1 - m)))
    c = np.array([1.0, 0.0, 0.0, -1.0])
    error = np.sqrt(c * slope @ V @ (slope * c))
    regrid = means.regrid(transform)
    found = regrid.contrasts({"first": c}, adjust="none").iloc[0]
    ratio = np.exp(there[0] - there[3])
    np.testing.assert_allclose(found["ratio" if transform == "log" else "odds_ratio"], ratio, rtol=1e-12)
    np.testing.assert_allclose(found["std_error"], ratio * error, rtol=1e-10)
    np.testing.assert_allclose(found["statistic"], np.log(ratio) / error, rtol=1e-10)
    ends = np.exp(np.log(ratio) + scipy.stats.norm.ppf([0.025, 0.975]) * error)
    np.testing.assert_allclose(found[["lower", "upper"]].astype(float), ends, rtol=1e-10)
    own = regrid.to_frame()
    back = np.log(own[["lower", "upper"]]) - (0 if transform == "log" else np.log1p(-own[["lower", "upper"]]))
    width = np.outer(slope * np.sqrt(np.diag(V)), scipy.stats.norm.ppf([0.025, 0.975]))
    np.testing.assert_allclose(back, there[:, None] + width, rtol=1e-9)
    if transform == "logit":  # of a logit link the means' own intervals
        pd.testing.assert_frame_equal(pd.DataFrame(own), pd.DataFrame(means.to_frame()), rtol=1e-9)
    assert means.contrasts()["contrast"][0] == "1 - 2"


def test_ratios_of_rates_do_not_depend_on_random_intercepts():
    """Where no effect but the intercept varies, the variance is in all means of a log link alike."""
    rng = np.random.default_rng(5)
    table = pd.DataFrame({"g": np.repeat(np.arange(20), 8), "arm": np.tile(list("ab"), 80)})
    table["y"] = rng.poisson(np.exp(0.5 + 0.4 * (table["arm"] == "b") + 0.5 * rng.normal(size=20)[table["g"]]))
    fit = mj.glmm("y ~ arm + (1 | g)", table, "poisson")
    averaged = fit.emmeans("arm", integrate=True).regrid("log").contrasts()
    median = fit.emmeans("arm", scale="response").contrasts()
    np.testing.assert_allclose(averaged.iloc[:, 1:], median.iloc[:, 1:], rtol=1e-9)


def test_means_without_such_ratios(cbpp, sloped):
    with pytest.raises(ValueError, match="scale='response' or integrate=True"):
        cbpp.emmeans("period").regrid("log")
    with pytest.raises(ValueError, match="'log' or 'logit'"):
        cbpp.emmeans("period", integrate=True).regrid("probit")
    with pytest.raises(ValueError, match="odds are of probabilities"):
        sloped.emmeans("arm", integrate=True).regrid("logit")
    means = cbpp.emmeans("period", integrate=True)
    with pytest.raises(ValueError, match=r"\(-0\.1\) have no log"):
        replace(means, means=np.array([0.1, -0.1, 0.2, 0.3])).regrid("log")
    with pytest.raises(ValueError, match="sum to zero"):
        means.regrid("log").contrasts({"mean": [0.25] * 4})
    lmm = mj.lmm("angle ~ recipe + (1 | recipe:replicate)", mj.datasets.load("cake"))
    with pytest.raises(ValueError, match="generalised model"):
        lmm.emmeans("recipe").regrid("log")


# --- extra zeros ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def salamanders():
    table = pd.read_csv(HERE / "data" / "Salamanders.csv")
    return table.assign(mined=pd.Categorical(table["mined"], ["yes", "no"]))


@pytest.mark.parametrize(("name", "family"), [("zip", "poisson"), ("zinb", "nbinom")])
def test_means_of_extra_zeros_are_those_of_glmmtmb(name, family, salamanders):
    """glmmTMB 1.1.5, tests/oracle/zi_means.R, whose optimum is good to 1e-5 of a standard error; it has t tests."""
    want = json.loads((HERE / "oracle" / "zi_means.json").read_text())[name]
    fit = mj.glmm("count ~ mined + (1 | site)", salamanders, family, ziformula="~ mined")
    np.testing.assert_allclose(fit.criterion, want["m2logLik"], rtol=0, atol=1e-7)
    close = {"rtol": 3e-5}
    cond = fit.emmeans("mined", scale="response", component="cond")
    np.testing.assert_allclose(cond.to_frame()["std_error"], want["cond_se"], **close)
    np.testing.assert_allclose(cond.to_frame()["estimate"], next(iter(list(want["cond"].values())[1:])), **close)
    pair = cond.contrasts().iloc[0]
    assert pair["contrast"] == want["ratio"]["contrast"]
    test = [want["ratio_test"][one] for one in ("ratio", "SE", "null", "t.ratio")]
    np.testing.assert_allclose(pair[["ratio", "std_error", "null", "statistic"]].astype(float), test, **close)
    assert (fit.emmeans("mined").contrasts()["statistic"] == pair["statistic"]).all()
    means = fit.emmeans("mined", scale="response")
    np.testing.assert_allclose(means.to_frame()["estimate"], want["response"]["estimate"], **close)
    np.testing.assert_allclose(means.to_frame()["std_error"], want["response"]["std_error"], **close)
    difference = replace(cond, averaged=True).contrasts().iloc[0]
    np.testing.assert_allclose(
        difference[["estimate", "std_error"]].astype(float), [want["difference"][one] for one in ("estimate", "SE")],
        **close,
    )  # fmt: skip
    assert "no extra zeros" in cond.title
    assert "extra zeros among the responses" in means.title
    assert "median subject" in str(means)


@pytest.mark.parametrize("integrate", [False, True])
def test_means_of_the_response_average_over_both_formulas(salamanders, integrate):
    """A factor and a number that only ziformula reads; the delta method by finite differences."""
    fit = mj.glmm("count ~ mined + (1 | site)", salamanders, "poisson", ziformula="~ spp + DOY")
    means = fit.emmeans("mined", scale="response", integrate=integrate)
    assert "averaged over spp" in means.title
    spp, every = sorted(salamanders["spp"].unique()), fit.record.parameters
    zi = [f"zi~{own}" for own in ["Intercept", *(f"spp[T.{one}]" for one in spp[1:]), "DOY"]]
    assert list(every.names) == ["sd_Intercept|site", *zi, "Intercept", "mined[T.no]"]
    day = salamanders["DOY"].mean()

    def by_hand(at):
        sd, z, beta = at[0], at[1:-2], at[-2:]
        pi = 1 / (1 + np.exp(-(z[0] + np.append(0.0, z[1:-1]) + z[-1] * day)))
        mu = np.exp(np.array([beta[0], beta.sum()]) + integrate * sd**2 / 2)
        return np.outer(mu, 1 - pi)

    point, h = np.array(every.estimate), 1e-5
    steps = h * np.eye(len(point))
    found = means.to_frame()
    np.testing.assert_allclose(found["estimate"], by_hand(point).mean(1), rtol=1e-12)
    slopes = np.stack([(by_hand(point + e) - by_hand(point - e)).mean(1) / (2 * h) for e in steps], 1)
    V = slopes @ every.covariance @ slopes.T
    np.testing.assert_allclose(found["std_error"], np.sqrt(np.diag(V)), rtol=1e-6)
    m = by_hand(point).mean(1)
    error = np.sqrt(V[0, 0] / m[0] ** 2 + V[1, 1] / m[1] ** 2 - 2 * V[0, 1] / (m[0] * m[1]))
    pair = means.regrid("log").contrasts().iloc[0]
    np.testing.assert_allclose(pair["ratio"], m[0] / m[1], rtol=1e-12)
    np.testing.assert_allclose(pair["std_error"], m[0] / m[1] * error, rtol=1e-6)
    # Cells are predictions, with their errors and intervals.
    cells = fit.emmeans("mined * spp", scale="response", integrate=integrate).to_frame()
    new = pd.DataFrame(cells[["mined", "spp"]]).assign(DOY=day)
    want = fit.predict(new, random=False, integrate=integrate, interval="confidence")
    np.testing.assert_allclose(cells[["estimate", "std_error", "lower", "upper"]], want, rtol=1e-9)
    # Those of the counts that are no extra zeros know nothing of spp.
    with pytest.raises(mj.DataError, match="spp"):
        fit.emmeans("spp", scale="response", component="cond")
    # Names of levels are no matter.
    other = salamanders.assign(spp=salamanders["spp"].map({one: f"{k}" for k, one in enumerate(spp[::-1])}))
    again = mj.glmm("count ~ mined + (1 | site)", other.iloc[::-1], "poisson", ziformula="~ spp + DOY")
    again = again.emmeans("mined", scale="response", integrate=integrate).to_frame()
    np.testing.assert_allclose(again[["estimate", "std_error"]], found[["estimate", "std_error"]], rtol=2e-6)


def test_averages_over_species_are_those_of_glmmtmb(salamanders):
    want = json.loads((HERE / "oracle" / "zi_means.json").read_text())["averaged"]
    fit = mj.glmm("count ~ mined + (1 | site)", salamanders, "poisson", ziformula="~ spp")
    found = fit.emmeans("mined", scale="response").to_frame()["estimate"]
    np.testing.assert_allclose(found, np.reshape(want["response"], (7, 2)).mean(0), rtol=2e-5)


def test_cells_that_ziformula_leaves_open():
    rng = np.random.default_rng(8)
    table = pd.DataFrame({"g": np.repeat(np.arange(25), 16), "a": np.tile(list("uvw" * 5 + "u"), 25)})
    table["b"] = rng.choice(list("xy"), len(table))
    table = table[~((table["a"] == "u") & (table["b"] == "y"))]
    mu = np.exp(1.0 + 0.4 * rng.normal(size=25)[table["g"]])
    table["y"] = rng.poisson(mu) * (rng.random(len(table)) < 0.7)
    with pytest.warns(mj.DataWarning, match="ziformula"):
        fit = mj.glmm("y ~ 1 + (1 | g)", table, "poisson", ziformula="~ a * b")
    means = fit.emmeans("a", scale="response")
    assert means.to_frame()["estimate"].isna().tolist() == [True, False, False]
    assert means.regrid("log").contrasts()["ratio"].isna().tolist() == [True, True, False]
    assert fit.emmeans("1", scale="response", component="cond").to_frame()["estimate"].notna().all()


def test_components_by_name(cbpp, salamanders):
    fit = mj.glmm("count ~ mined + (1 | site)", salamanders, "poisson", ziformula="~ 1")
    for arguments, match in (
        ({"component": "zi", "scale": "response"}, "'cond' or 'response'"),
        ({"component": "response"}, "scale='response' or integrate=True"),
    ):
        with pytest.raises(ValueError, match=match):
            fit.emmeans("mined", **arguments)
    with pytest.raises(ValueError, match="models with ziformula="):
        cbpp.emmeans("period", scale="response", component="cond")
    plain = fit.emmeans("mined")
    assert plain.to_frame().equals(fit.emmeans("mined", component="cond").to_frame())
    with pytest.raises(ValueError, match="odds are of probabilities"):
        fit.emmeans("mined", integrate=True).regrid("logit")


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
