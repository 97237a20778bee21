"""Trials with repeated measures by their parameters: drop-out, studies, power, comparisons, the command line."""

import json

import numpy as np
import pandas as pd
import pytest

import mixjax as mj
from mixjax.cli import main
from mixjax.covariance import structure_of
from mixjax.inference.random.repeated_ratio import contains

pytestmark = pytest.mark.filterwarnings("ignore::mixjax.DataWarning")

FORMULA = "y ~ 0 + visit + visit:arm + us(visit | id)"
LAST = "visit[w3]:arm[T.b]"


def layout(n, visits=("w1", "w2", "w3")):
    who = pd.DataFrame({"id": np.arange(n), "arm": np.where(np.arange(n) % 2, "b", "a")})
    return who.merge(pd.DataFrame({"visit": list(visits)}), how="cross")


def plan(n, effect=0.4, **options):
    options = {"cor": ("ar1", 0.6), "dropout": 0.1} | options
    return mj.trial(FORMULA, layout(n), [0, 0, 0, 0, 0, effect], **options)


def test_responses_have_the_covariance_and_drop_out():
    S = np.array([[1.0, 0.5, 0.2], [0.5, 2.0, 1.0], [0.2, 1.0, 3.0]])
    trial = plan(200, Sigma=S, cor=None, dropout=[0.1, 0.3])
    Y = trial.simulate(key=1, n=400)
    seen = ~np.isnan(Y).reshape(400, 200, 3)
    n = 400 * 200
    # Of shares of n independent subjects: standard deviation sqrt(p q / n).
    assert seen[:, :, 0].all()
    for t, share in ((1, 0.9), (2, 0.9 * 0.7)):
        assert abs(seen[:, :, t].mean() - share) < 4.5 * np.sqrt(share * (1 - share) / n)
    assert not (~seen[:, :, 1] & seen[:, :, 2]).any()
    complete = Y.reshape(400, 200, 3)[:, ::2][seen[:, ::2, 2]]
    np.testing.assert_allclose(np.cov(complete.T), S, atol=5 * 3 * np.sqrt(2 / len(complete)))
    np.testing.assert_array_equal(trial.simulate(1, 5, first=3), Y[3:8])
    # Random numbers belong to subjects and visits: without drop-out the responses are the same.
    whole = plan(200, Sigma=S, cor=None, dropout=0).simulate(key=1, n=5)
    np.testing.assert_array_equal(whole[~np.isnan(Y[:5])], Y[:5][~np.isnan(Y[:5])])


def test_drop_out_may_depend_on_the_response_before_or_be_a_function():
    trial = plan(300, dropout=0.2, dropout_slope=1.0)
    Y = trial.simulate(key=1, n=100).reshape(100, 300, 3)
    gone = np.isnan(Y[:, :, 1])
    assert Y[:, :, 0][gone].mean() > 0.5 > 0 > Y[:, :, 0][~gone].mean()
    own = plan(10, dropout=lambda Y, table, u: (table["visit"] == "w2").to_numpy() & (u < 0.5))
    missing = np.isnan(own.simulate(key=1, n=200)).reshape(200, 10, 3)
    assert not missing[:, :, [0, 2]].any()
    assert abs(missing[:, :, 1].mean() - 0.5) < 0.06


def test_studies_and_power():
    truth = plan(60)
    assert truth.truth[LAST] == 0.4
    assert round(truth.truth["cor_w3.w1|id"], 3) == 0.36
    found = mj.study(truth, {"homcs": FORMULA.replace("us(", "homcs("), "us": FORMULA}, replicates=600, key=1,
                     ddf="kenward-roger", compared=[("homcs", "us")], progress=False)  # fmt: skip
    table = found.to_frame().set_index(["model", "term", "measure"])["value"]
    assert found.counts["failed"].sum() == 0
    # 600 replicates: standard errors of 0.27 / sqrt(600) and sqrt(0.05 * 0.95 / 600).
    assert abs(table["us", LAST, "bias"]) < 4.5 * 0.30 / np.sqrt(600)
    assert abs(table["us", LAST, "coverage"] - 0.95) < 4.5 * 0.0089
    assert table["", "us|homcs", "rejection"] > 0.1
    power = mj.power(lambda n: plan(n), FORMULA, LAST, {"n": [40, 160]}, 400, key=2, progress=False).table
    assert power["power"].is_monotonic_increasing
    assert (power["failed"] == 0).all()


def test_a_study_is_single_fits():
    truth = plan(40)
    raw = mj.study(truth, FORMULA, replicates=3, key=7, progress=False, ddf="satterthwaite").raw()
    again = mj.study(truth, FORMULA, replicates=3, key=7, progress=False, ddf="satterthwaite").raw()
    pd.testing.assert_frame_equal(raw, again)
    fit = mj.mmrm(FORMULA, layout(40).assign(y=truth.simulate(1, 1)[0]))
    assert set(fit.fixef.index) <= set(raw.columns)
    assert f"p({LAST})" in raw


STRUCTURES = ["homdiag", "diag", "homcs", "csh", "ar1", "ar1h", "homtoep", "toeph", "adh", "us"]
INSIDE = {
    "homdiag": STRUCTURES, "diag": ["diag", "csh", "ar1h", "toeph", "adh", "us"],
    "homcs": ["homcs", "csh", "homtoep", "toeph", "us"], "csh": ["csh", "toeph", "us"],
    "ar1": ["ar1", "ar1h", "homtoep", "toeph", "adh", "us"], "ar1h": ["ar1h", "toeph", "adh", "us"],
    "homtoep": ["homtoep", "toeph", "us"], "toeph": ["toeph", "us"], "adh": ["adh", "us"], "us": ["us"],
}  # fmt: skip


@pytest.mark.parametrize("small", STRUCTURES)
def test_which_structures_are_special_cases(small):
    found = [large for large in STRUCTURES if contains(structure_of(large, 4), structure_of(small, 4))]
    assert found == INSIDE[small]


def test_comparisons():
    data = mj.datasets.load("fev")
    fits = [mj.mmrm(f"FEV1 ~ RACE + ARMCD * AVISIT + {s}(AVISIT | USUBJID)", data) for s in ("homcs", "csh", "us")]
    table = mj.compare(*fits).to_frame()
    ml = [fit.refit(reml=False) for fit in fits]
    np.testing.assert_allclose(table["deviance"], [fit.criterion for fit in ml], rtol=1e-12)
    np.testing.assert_allclose(table["df"].iloc[1:], [3, 5])
    by_reml = mj.compare(*fits, refit=False).to_frame()
    np.testing.assert_allclose(by_reml["chisq"].iloc[1:], -np.diff([fit.criterion for fit in fits]), rtol=1e-9)
    arms = mj.mmrm("FEV1 ~ RACE + ARMCD * AVISIT + us(AVISIT | ARMCD / USUBJID)", data)
    assert mj.compare(fits[2], arms).to_frame()["df"].iloc[1] == 10
    smaller = mj.mmrm("FEV1 ~ ARMCD + us(AVISIT | USUBJID)", data)
    assert mj.compare(smaller, fits[2]).to_frame()["p_value"].iloc[1] < 1e-6
    with pytest.raises(ValueError, match="REML criteria of different fixed effects"):
        mj.compare(smaller, fits[2], refit=False)
    adh = mj.mmrm("FEV1 ~ RACE + ARMCD * AVISIT + adh(AVISIT | USUBJID)", data)
    with pytest.warns(mj.InferenceWarning, match="not a special case"):
        assert np.isnan(mj.compare(fits[1], adh).to_frame()["p_value"].iloc[1])
    with pytest.raises(mj.DataError, match="different data"):
        mj.compare(smaller, mj.mmrm("FEV1 ~ ARMCD + us(AVISIT | USUBJID)", data, subset="AVISIT != 'VIS1'"))
    lmm = mj.lmm("FEV1 ~ ARMCD + (1 | USUBJID)", data)
    with pytest.raises(ValueError, match=r"compare their fit\.aic"):
        mj.compare(smaller, lmm)
    with pytest.raises(ValueError, match="bootstrap"):
        mj.compare(smaller, fits[2], method="bootstrap")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cor": 1.2}, "not positive definite"),
        ({"cor": -0.6}, "not positive definite"),
        ({"sd": [1, 2]}, "one for each of the 3 visits"),
        ({"sd": 0}, "positive"),
        ({"dropout": 1.0}, "probability"),
        ({"dropout": [0.1]}, "2 visits after the first"),
        ({"dropout_slope": np.inf}, "dropout_slope"),
        ({"dropout": "much"}, "dropout must be of numbers"),
        ({"dropout_slope": "a"}, "dropout_slope must be of numbers"),
        ({"Sigma": np.eye(2), "sd": None, "cor": None}, "3 visits"),
        ({"Sigma": {"a": np.eye(3)}, "sd": None, "cor": None}, "arms of the formula are: none"),
        ({"Sigma": np.eye(3)}, "leave sd and cor out"),
        ({"cor": "ar1"}, "cor must be of numbers"),
        ({"cor": ("ar2", 0.3)}, "or a matrix"),
        ({"cor": 2 * np.eye(3)}, "on its diagonal"),
        ({"sd": {"w1": 1.0}}, "a dict is for Sigma"),
    ],
)
def test_bad_parameters(options, message):
    with pytest.raises(ValueError, match=message):
        plan(10, **options)


def test_bad_use():
    truth = plan(20)
    with pytest.raises(ValueError, match="booleans"):
        plan(10, dropout=lambda Y, table, u: u).simulate(1, 2)
    with pytest.raises(mj.FormulaError, match="random effect"):
        mj.study(truth, "y ~ arm + (1 | id)", replicates=2, progress=False)
    with pytest.raises(ValueError, match="special case"):
        mj.study(truth, {"a": FORMULA, "b": "y ~ arm + us(visit | id)"}, replicates=2,
                 compared=[("a", "b")], progress=False)  # fmt: skip


def test_a_fit_is_a_trial():
    pilot = layout(40).assign(y=plan(40).simulate(key=3, n=1)[0]).dropna()
    fit = mj.mmrm(FORMULA, pilot)
    truth = mj.trial_of(fit)
    assert truth.nobs == fit.nobs
    np.testing.assert_allclose(truth.beta, fit.fixef)
    np.testing.assert_allclose(truth.truth["sd_w2|id"], fit.residual_sd["w2"])
    np.testing.assert_allclose(truth.simulate(5, 3), fit.simulate(5, 3), rtol=1e-12)
    more = truth.on(layout(300), dropout=0.2).with_effects({LAST: 1.0})
    assert more.truth[LAST] == 1.0
    assert np.isnan(more.simulate(1, 2)).any()
    power = mj.power(fit, FORMULA, LAST, replicates=60, key=1, progress=False).table["power"].iloc[0]
    larger = mj.power(more, FORMULA, LAST, replicates=60, key=1, progress=False).table["power"].iloc[0]
    assert larger > power
    with pytest.raises(mj.DataError, match="other fixed effects or visits"):
        truth.on(layout(20, ("w1", "w2")))
    with pytest.raises(TypeError, match="scenario_of"):
        mj.trial_of(mj.lmm("y ~ arm + (1 | id)", pilot))


def test_command_line(capsys):
    assert main(["fit", "--repeated", "FEV1 ~ ARMCD + ar1(AVISIT | USUBJID)", "fev", "--confint", "wald"]) == 0
    out = capsys.readouterr().out
    assert "Mixed model for repeated measures fit by REML" in out
    assert "cor_lag1|USUBJID" in out
    assert main(["fit", "--repeated", "FEV1 ~ ARMCD + ar1(AVISIT | USUBJID)", "fev", "--json", "--ddf", "kr"]) == 0
    found = json.loads(capsys.readouterr().out)
    fit = mj.mmrm("FEV1 ~ ARMCD + ar1(AVISIT | USUBJID)", mj.datasets.load("fev"))
    np.testing.assert_allclose(found["criterion"], fit.criterion)
    assert found["ddf"] == "kenward-roger"
    assert round(found["df"]["ARMCD[T.TRT]"], 2) == 188.47
    command = ["trial", "--effect", "0,0.5", "--subjects", "40,80", "--replicates", "200", "--dropout", "0.1"]
    assert main(command) == 0
    assert "visit[v2]:arm[T.b]" in capsys.readouterr().out
    for wrong, message in (
        (["--sd", "1,2,3"], "--sd has 3 numbers"),
        (["--dropout", "0.1,0.1"], "--dropout has 2 numbers"),
        (["--dropout", "1"], "below 1"),
    ):
        assert main([*command[:7], *wrong]) == 2
        assert message in capsys.readouterr().err
    assert main(["fit", "--repeated", "FEV1 ~ ARMCD + ar1(AVISIT | USUBJID)", "fev", "--family", "poisson"]) == 2
    assert "leave --family out" in capsys.readouterr().err
