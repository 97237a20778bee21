"""What R says of the same fits in its own way: contrasts of random terms, tables of modes, lme4's Cook's distances."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import table

import mixjax as mj

HERE = Path(__file__).parent
REFERENCE = json.loads((HERE / "oracle" / "left_out.json").read_text())
# lme4's criteria are good to 1e-12 here, so its theta, where criteria are flat, to about their root; what follows too.
THETA = 5e-6


@cache
def data_of(name):
    return pd.read_csv(HERE / "data" / "crossed_factorial.csv") if name == "crossed_factorial" else table(name)


@cache
def fit_of(name, formula, weights=None):
    return mj.lmm(formula, data_of(name), weights=weights)


# --- contrasts -------------------------------------------------------------------------------------------------------

KINDS = {"contr.treatment": "treatment", "contr.sum": "sum", "contr.helmert": "helmert", "contr.SAS": "SAS"}


@pytest.mark.parametrize("case", REFERENCE["contrasts"], ids=lambda c: f"{c['data']} {c['coding']}")
def test_random_terms_are_coded_as_in_r(case):
    """R codes random terms by the contrasts that are attached to the column, which is what is compared with here."""
    fit = mj.lmm(case["formula"], data_of(case["data"]), contrasts={case["factor"]: KINDS[case["coding"]]})
    np.testing.assert_allclose(fit.criterion, case["criterion"], rtol=1e-13)
    np.testing.assert_allclose(fit.theta, case["theta"], rtol=THETA, atol=THETA)
    # Standard deviations, then correlations; the residual's last.
    group = fit.varcorr.to_frame()["sdcor"].to_numpy()
    np.testing.assert_allclose(group, case["sdcor"], rtol=THETA, atol=THETA)
    np.testing.assert_allclose(next(iter(fit.ranef().values())), case["ranef"], rtol=0, atol=THETA)
    np.testing.assert_allclose(fit.fixef.iloc[:3], case["fixef"][:3], rtol=THETA)


@pytest.mark.parametrize("kind", ["sum", "helmert", "SAS", "poly", "diff"])
def test_an_unstructured_term_is_the_same_model_in_every_coding(kind):
    data = data_of("crossed_factorial")
    formula = "y ~ A * B + (A | subj) + (1 | item)"
    plain = mj.lmm(formula, data, reml=False)
    coded = mj.lmm(formula, data, reml=False, contrasts={"A": kind})
    np.testing.assert_allclose(coded.criterion, plain.criterion, rtol=1e-10)
    np.testing.assert_allclose(coded.fitted, plain.fitted, rtol=1e-5, atol=1e-6)
    # D of one coding is that of the other, turned by the matrix that turns the columns.
    Z0, Z1 = (np.asarray(fit.design.terms[0].Z) for fit in (plain, coded))
    turn = np.linalg.lstsq(Z0, Z1, rcond=None)[0]
    np.testing.assert_allclose(turn @ coded.Sigma["subj"] @ turn.T, plain.Sigma["subj"], rtol=1e-3, atol=1e-5)
    # Uncorrelated effects of other columns are another model.
    independent = [
        mj.lmm("y ~ A * B + diag(A | subj)", data, contrasts=c).criterion for c in (None, {"A": kind}, {"A": kind})
    ]
    assert independent[1] == independent[2] != independent[0]


def test_a_factor_in_a_random_term_alone():
    data = data_of("crossed_factorial")
    fit = mj.lmm("y ~ x + (A | subj)", data, contrasts={"A": "sum"})
    assert fit.labels.terms[0].effects == ("Intercept", "A[S.a1]", "A[S.a2]")
    assert set(np.unique(fit.design.terms[0].Z)) == {-1.0, 0.0, 1.0}
    own = mj.lmm("y ~ A + (C(A, contr.treatment) | subj)", data, contrasts={"A": "sum"})
    assert own.labels.fixed == ("Intercept", "A[S.a1]", "A[S.a2]")
    assert all("[T." in name for name in own.labels.terms[0].effects[1:])
    full = mj.lmm("y ~ A + (0 + A | subj)", data, contrasts={"A": "sum"})
    assert full.labels.terms[0].effects == ("A[a1]", "A[a2]", "A[a3]")
    with pytest.raises(mj.DataError, match=r"'subj', which is in none of the effects: x, \(A \| subj\)"):
        mj.lmm("y ~ x + (A | subj)", data, contrasts={"subj": "sum"})


def test_what_follows_the_coding_of_random_terms():
    """Coefficients, new rows, rows in chunks, simulation: all by the columns of the fit."""
    data = data_of("crossed_factorial")
    formula, coding = "y ~ A + (A | subj) + (1 | item)", {"A": "sum"}
    fit = mj.lmm(formula, data, contrasts=coding)
    np.testing.assert_allclose(fit.predict(data), fit.predict(), rtol=1e-12)
    one = data.iloc[[7]]
    np.testing.assert_allclose(fit.predict(one), fit.predict().iloc[[7]], rtol=1e-12)
    # A level's coefficients give its means without the formula: the last level is minus the sum of the others.
    own = fit.coef()["subj"].loc["s03"]
    row = data[(data["subj"] == "s03") & (data["A"] == "a3")].iloc[[0]]
    by_hand = own["Intercept"] - own["A[S.a1]"] - own["A[S.a2]"]
    np.testing.assert_allclose(fit.predict(row, random="subj"), by_hand, rtol=1e-12)
    pieces = [data.iloc[:100], data.iloc[100:]]
    chunks = mj.lmm(formula, pieces, contrasts=coding)
    np.testing.assert_allclose(chunks.theta, fit.theta, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(chunks.predict(data), fit.predict(), rtol=1e-8)
    Sigma = fit.Sigma["subj"]
    sd = np.sqrt(np.diag(Sigma))
    scenario = mj.scenario(
        formula, data, beta=fit.fixef.to_dict(), sigma=fit.sigma, contrasts=coding,
        sd={"subj": sd, "item": np.sqrt(fit.Sigma["item"][0])}, cor={"subj": Sigma / np.outer(sd, sd)},
    )  # fmt: skip
    np.testing.assert_array_equal(scenario.design.terms[0].Z, fit.design.terms[0].Z)
    np.testing.assert_allclose(scenario.simulate(3, 4), fit.simulate(3, 4), rtol=1e-9)
    again = mj.lmm(formula, data.sample(frac=1, random_state=1), contrasts=coding)
    np.testing.assert_allclose(again.theta, fit.theta, rtol=1e-6, atol=1e-8)


# --- conditional modes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", REFERENCE["ranef"], ids=lambda c: c["formula"])
def test_modes_in_rows_are_rs_data_frame(case):
    fit = fit_of(case["data"], case["formula"])
    found = fit.ranef_frame()
    assert list(found) == ["grpvar", "term", "grp", "condval", "condsd"]
    keys = ["grpvar", "term", "grp"]
    expected = pd.DataFrame({name: case[name] for name in found})
    expected["term"] = expected["term"].replace("(Intercept)", "Intercept")
    assert found.groupby(keys).ngroups == len(found) == len(expected)
    both = found.merge(expected, on=keys, suffixes=("", "_r"), validate="one_to_one")
    assert len(both) == len(found)
    scale = np.abs(both["condval_r"]).max()
    np.testing.assert_allclose(both["condval"], both["condval_r"], rtol=0, atol=1e-6 * scale)
    np.testing.assert_allclose(both["condsd"], both["condsd_r"], rtol=1e-6)
    # Groups, effects and levels in R's order too.
    assert found[keys].drop_duplicates("grpvar")["grpvar"].tolist() == list(dict.fromkeys(case["grpvar"]))
    assert found["grp"].tolist() == case["grp"]


def test_modes_in_rows_are_those_of_the_frames():
    fit = fit_of("crossed_factorial", "y ~ a * b + x + (a + x | subj) + (1 | item)")
    frames, covariances = fit.ranef(condvar=True)
    found = fit.ranef_frame()
    for group, frame in frames.items():
        for j, effect in enumerate(frame):
            own = found[(found["grpvar"] == group) & (found["term"] == effect)]
            np.testing.assert_array_equal(own["condval"], frame[effect])
            np.testing.assert_array_equal(own["condsd"] ** 2, np.sqrt(covariances[group][:, j, j]) ** 2)


# --- Cook's distance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", REFERENCE["influence"], ids=lambda c: c["formula"])
def test_influence_of_groups_is_lme4s(case):
    """lme4 refits without each group, and is off by 2e-5 in dfbetas and 2e-7 in Cook's distances here."""
    fit = fit_of(case["data"], case["formula"])
    found = fit.influence(case["by"])
    order = [str(unit) for unit in case["units"]]
    np.testing.assert_allclose(found.cooks_lme4.loc[order], case["cooks"], rtol=2e-6)
    U, p = len(order), len(fit.fixef)
    np.testing.assert_allclose(found.cooks_lme4, found.cooks * (U - p) / U, rtol=1e-12)
    np.testing.assert_allclose(-found.dfbetas.loc[order], case["dfbetas"], rtol=0, atol=5e-5)


@pytest.mark.parametrize("case", [*REFERENCE["influence"], REFERENCE["weighted"]], ids=lambda c: c["formula"])
def test_cooks_distances_of_rows_are_lme4s(case):
    fit = fit_of(case["data"], case["formula"], case.get("weights"))
    np.testing.assert_allclose(fit.leverage()["overall"], case["hat"], rtol=1e-6)
    np.testing.assert_allclose(fit.augment()[".cooksd"], case["row_cooks"], rtol=2e-5, atol=1e-10)
