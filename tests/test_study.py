"""Simulation studies: scenarios, measures, and the same bits whatever the split."""

import json
import re
import warnings
from dataclasses import replace

import jax
import numpy as np
import pandas as pd
import pytest
from scipy import stats

import mixjax as mj
from mixjax.studies.describe import describe
from mixjax.studies.measures import bias, empirical_se, model_se, relative_error_se, rmse
from mixjax.studies.outcomes import BLOCK, outcomes
from mixjax.studies.scenario import scenario_of
from mixjax.studies.study import _cells
from mixjax.studies.task import Task

FORMULA = "y ~ x + (x | g)"
WALD = Task(None, {}, None, ddf="wald")
PARAMETERS = {"beta": [1.0, 0.5], "sd": [1.0, 0.5], "cor": 0.3, "sigma": 1.0}


def layout(groups=12, rows=6):
    x = np.tile(np.linspace(-1, 1, rows), groups)
    return pd.DataFrame({"g": np.repeat(np.arange(groups), rows), "x": x})


def source(slope=0.5, groups=12):
    return mj.scenario(FORMULA, layout(groups), **{**PARAMETERS, "beta": [1.0, slope]})


@pytest.fixture(scope="module")
def both():
    """Two cells and two models, with a partial last block."""
    models = {"small": "y ~ 1 + (x | g)", "large": FORMULA}
    return mj.study(
        source, models, {"slope": [0.0, 0.5]}, BLOCK + 300, key=5, compared=[("small", "large")], progress=False
    )


# --- scenarios -------------------------------------------------------------------------------------------------------


def test_a_scenario_simulates_what_it_says():
    truth = source()
    Y = truth.simulate(3, 40_000)
    x = truth.table["x"].to_numpy()
    Z = np.column_stack([np.ones(6), x[:6]])
    V = Z @ np.array([[1.0, 0.15], [0.15, 0.25]]) @ Z.T + np.eye(6)
    errors = np.sqrt(np.outer(np.diag(V), np.diag(V)) + V**2) / np.sqrt(40_000)
    assert (np.abs(np.cov(Y[:, :6].T) - V) < 5 * errors).all()
    assert (np.abs(Y.mean(0) - (1 + 0.5 * x)) < 5 * np.sqrt(np.diag(V)[np.arange(72) % 6] / 40_000)).all()
    assert np.abs(np.cov(Y[:, 0], Y[:, 6])[0, 1]) < 5 * V[0, 0] / 200
    assert truth.truth == pytest.approx(
        {"Intercept": 1, "x": 0.5, "sd_Intercept|g": 1, "sd_x|g": 0.5, "cor_x.Intercept|g": 0.3, "sigma": 1}
    )
    np.testing.assert_array_equal(mj.simulate(FORMULA, layout(), **PARAMETERS, key=3, n=5), Y[:5])
    np.testing.assert_array_equal(truth.simulate(3, 7, first=11), Y[11:18])


def test_a_fit_simulates_as_a_scenario_with_its_parameters():
    data = mj.datasets.load("sleepstudy")
    formula = "Reaction ~ Days + (Days | Subject)"
    fit = mj.lmm(formula, data)
    Y = mj.simulate(formula, data, beta=fit.fixef, theta=fit.theta, sigma=fit.sigma, key=1, n=3)
    np.testing.assert_allclose(Y, fit.simulate(1, 3), rtol=1e-12)
    named = mj.simulate(formula, data, beta=fit.fixef.to_dict(), theta=fit.theta, sigma=fit.sigma, key=1, n=3)
    np.testing.assert_array_equal(named, Y)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": [1.0]}, "2 fixed effects are Intercept, x"),
        ({"beta": {"Intercept": 1.0, "z": 2.0}}, "beta names 'z'"),
        ({"beta": {"x": 1.0}}, "no value of Intercept"),
        ({"beta": [np.nan, 1.0]}, "beta must be finite"),
        ({"sd": [1.0]}, "2 random effects"),
        ({"sd": None}, "sd is needed"),
        ({"sd": {"h": 1.0}}, "sd must name every random term"),
        ({"sd": [1.0, -1.0]}, "0 or more"),
        ({"cor": 1.5}, "covariance of 'g' is impossible"),
        ({"cor": {"g": [[1.0, 0.2], [0.3, 1.0]]}}, "symmetric"),
        ({"cor": {"h": 0.1}}, "cor names 'h'"),
        ({"sigma": -1.0}, "sigma must be"),
        ({"theta": [1.0, 0.0, 1.0]}, "either theta, or sd and cor"),
    ],
)
def test_impossible_parameters_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        mj.scenario(FORMULA, layout(), **{**PARAMETERS, **change})


def test_an_impossible_covariance_of_three_effects_is_named():
    cor = np.array([[1.0, 0.9, -0.9], [0.9, 1.0, 0.9], [-0.9, 0.9, 1.0]])
    data = layout().assign(z=lambda d: d["x"] ** 2)
    with pytest.raises(ValueError, match=r"'g' is impossible.*not positive semidefinite"):
        mj.scenario("y ~ x + (x + z | g)", data, [0, 1], 1.0, [1, 1, 1], {"g": cor})


def test_predictors_with_missing_values_are_refused():
    with pytest.raises(mj.DataError, match="1 rows of the predictors"), pytest.warns(mj.DataWarning):
        mj.scenario(FORMULA, layout().assign(x=lambda d: d["x"].where(d.index > 0)), **PARAMETERS)


def test_a_scenario_is_shown_in_short():
    text = repr(source())
    assert text.startswith("<Scenario 'y ~ x + (x | g)': 72 rows; 12 g")
    assert "fixed effects: Intercept 1, x 0.5" in text
    assert "sd_Intercept|g 1, cor_x.Intercept|g 0.3, sd_x|g 0.5, sigma 1>" in text
    many = pd.DataFrame({"f": [f"f{i:02}" for i in range(30)] * 4, "g": np.arange(120) % 8})
    text = repr(mj.scenario("y ~ f + (1 | g)", many, np.ones(30), sd=1))
    assert text.count("\n") == 2
    assert "(10 more)" in text


# --- scenarios of fits -----------------------------------------------------------------------------------------------

divisor = 2.0


def sleepstudy():
    return mj.datasets.load("sleepstudy").assign(w=lambda d: 1 + d["Days"] % 3, o=lambda d: 3.0 * d["Days"])


@pytest.mark.parametrize(
    ("formula", "options"),
    [
        ("Reaction ~ Days + (Days | Subject)", {}),
        ("Reaction ~ I(Days / divisor) + (Days || Subject)", {"weights": "w"}),
        ("Reaction ~ Days + offset(o) + (1 | Subject)", {"offset": "o"}),
        ("log(Reaction) ~ Days + offset(o / 100) + (1 | Subject)", {}),
        ("Reaction ~ Days + (1 | Subject)", {"weights": np.arange(1.0, 181.0), "offset": np.ones(180)}),
        ("Reaction ~ scale(Days) + (1 | Subject)", {"subset": "Days > 1", "weights": "w", "offset": "o"}),
    ],
)
def test_a_scenario_of_a_fit_simulates_what_the_fit_simulates(formula, options):
    fit = mj.lmm(formula, sleepstudy(), **options)
    truth = scenario_of(fit)
    np.testing.assert_allclose(truth.simulate(1, 3), fit.simulate(1, 3), rtol=1e-12)
    assert truth.truth["sigma"] == fit.sigma
    assert "Reaction" not in truth.table
    # What a study fits to a simulated response is the same model.
    y = truth.simulate(1, 1)[0]
    again = mj.lmm("y ~ " + formula.partition("~")[2], truth.table.assign(y=y), **truth.options)
    np.testing.assert_allclose(again.fixef, fit.refit(y).fixef, rtol=1e-7)
    np.testing.assert_allclose(again.se, fit.refit(y).se, rtol=1e-5)


@pytest.mark.parametrize("contrasts", [{"recipe": "sum"}, {"recipe": "contr.treatment(base='B')"}, None])
def test_contrasts_of_a_fit_are_kept(contrasts):
    data = mj.datasets.load("cake")
    formula = "angle ~ recipe * temp + (1 | recipe:replicate)"
    fit = mj.lmm(formula, data, contrasts=contrasts)
    truth = scenario_of(fit)
    assert truth.labels.fixed == fit.labels.fixed
    np.testing.assert_allclose(truth.simulate(2, 2), fit.simulate(2, 2), rtol=1e-12)
    both = pd.concat([data, data.assign(replicate=lambda d: d["replicate"].astype(str) + "b")])
    twice = truth.on(both)
    assert (twice.nobs, twice.truth) == (540, truth.truth)
    np.testing.assert_allclose(twice.design.X[:270], fit.X, rtol=1e-12)


def test_contrasts_in_the_formula_are_not_taken_for_an_option():
    fit = mj.lmm("angle ~ C(recipe, contr.sum) + (1 | recipe:replicate)", mj.datasets.load("cake"))
    truth = scenario_of(fit)
    assert truth.options["contrasts"] is None
    np.testing.assert_allclose(truth.simulate(2, 2), fit.simulate(2, 2), rtol=1e-12)


def crossed(participants, items=8):
    names = ["participant", "item"]
    rows = pd.MultiIndex.from_product([range(participants), range(items)], names=names).to_frame(index=False)
    return rows.assign(condition=np.where((rows["participant"] + rows["item"]) % 2, "b", "a"))


def test_parameters_follow_their_terms_to_another_table():
    """With more participants than items the terms of the fit stand in another order."""
    formula = "y ~ condition + (1 | participant) + (1 + condition | item)"
    small = mj.scenario(formula, crossed(6), [1.0, 0.5], 1.0, {"participant": 2.0, "item": [0.5, 0.3]}, {"item": 0.4})
    large = small.on(crossed(20))
    assert [t.group for t in small.labels.terms] == ["item", "participant"]
    assert [t.group for t in large.labels.terms] == ["participant", "item"]
    assert large.truth == small.truth
    direct = mj.scenario(formula, crossed(20), [1.0, 0.5], 1.0, {"participant": 2.0, "item": [0.5, 0.3]}, {"item": 0.4})
    np.testing.assert_array_equal(large.simulate(1, 2), direct.simulate(1, 2))


def test_other_fixed_effects_in_place_of_the_estimates():
    truth = source()
    other = truth.with_effects({"x": 0.2})
    assert other.truth == truth.truth | {"x": 0.2}
    with pytest.raises(ValueError, match="beta names 'z', but the fixed effects are Intercept, x"):
        truth.with_effects({"z": 1.0})


@pytest.mark.parametrize(
    ("formula", "options", "change", "message"),
    [
        ("Reaction ~ Days + (1 | Subject)", {}, lambda d: d.drop(columns="Days"), "no column 'Days'"),
        ("Reaction ~ Days + (1 | Subject)", {"weights": "w"}, lambda d: d.drop(columns="w"), "no column 'w'"),
        ("Reaction ~ Days + (1 | Subject)", {"weights": np.ones(180)}, lambda d: d, "weights= was given as numbers"),
        ("Reaction ~ scale(Days) + (1 | Subject)", {}, lambda d: d[d["Days"] < 5], r"scale\(Days\) is computed from"),
        ("Reaction ~ f + (1 | Subject)", {}, lambda d: d[d["f"] != "c"], "f has the categories a, b in the new"),
        ("Reaction ~ f + (1 | Subject)", {}, lambda d: d.assign(f=1.0), r"f has the categories \(none: numbers\)"),
        ("Reaction ~ Days + (0 + f | Subject)", {}, lambda d: d[d["f"] != "c"], "f has the categories a, b in the"),
        ("Reaction ~ Days + w + (1 | Subject)", {}, lambda d: d.assign(w=d["Days"]), "must be able to tell"),
    ],
)
@pytest.mark.filterwarnings("ignore:fixed-effects columns left out")
def test_a_table_on_which_the_parameters_mean_something_else_is_refused(formula, options, change, message):
    data = sleepstudy().assign(f=lambda d: np.array(list("abc"))[d["Days"] % 3])
    truth = scenario_of(mj.lmm(formula, data, **options))
    with pytest.raises(mj.DataError, match=message):
        truth.on(change(data))


def test_fits_that_cannot_be_simulated_from():
    data = sleepstudy()
    chunks = mj.lmm("Reaction ~ Days + (1 | Subject)", [data[:90], data[90:]])
    with pytest.raises(mj.DataError, match=r"rows were not kept.*mixjax.scenario\(formula, table, beta=fit.fixef"):
        mj.study(chunks, "Reaction ~ Days + (1 | Subject)", progress=False)
    shift = {"by": 1.0}

    def moved(x):
        return (x - 4) ** 2 + shift["by"] * x

    fit = mj.lmm("Reaction ~ moved(Days) + (1 | Subject)", data)
    shift["by"] = 3.0
    with pytest.raises(mj.DataError, match="gives other columns now"):
        scenario_of(fit)
    lost = replace(fit.record, estimates=fit.record.estimates._replace(converged=np.array(False)))
    with pytest.raises(ValueError, match="did not converge"):
        scenario_of(lost)
    with pytest.raises(TypeError, match="a fit is needed"):
        scenario_of("fit")


def test_a_study_of_a_fit():
    formula = "Reaction ~ Days + (Days | Subject)"
    fit = mj.lmm(formula, mj.datasets.load("sleepstudy"))
    found = mj.study(fit, formula, replicates=60, key=1, progress=False)
    same = mj.study(scenario_of(fit), formula, replicates=60, key=1, progress=False)
    pd.testing.assert_frame_equal(found.raw(), same.raw(), check_exact=True)
    assert found.truths[0]["Days"] == fit.fixef["Days"]
    made = mj.study(lambda which: fit, formula, {"which": ["own"]}, replicates=60, key=1, common=True, progress=False)
    assert made.truths == found.truths
    with pytest.raises(ValueError, match=r"lambda groups: mixjax.scenario_of\(fit\).on\(table\(groups\)\)"):
        mj.study(fit, formula, {"groups": [10]}, progress=False)


def test_other_variances_of_a_scenario():
    data = mj.datasets.load("cake")
    fit = mj.lmm("angle ~ temp + (temp | recipe) + (1 | recipe:replicate)", data, reml=False)
    truth = scenario_of(fit).with_variances({"sd_temp|recipe": 0.2})
    group = "recipe"
    values = {f"sd_Intercept|{group}": 7.0, f"cor_temp.Intercept|{group}": -0.25, "sigma": 3.0}
    changed = truth.with_variances(values)
    assert {name: pytest.approx(changed.truth[name], rel=1e-12) for name in values} == values
    kept = {name: value for name, value in truth.truth.items() if name not in values}
    assert {name: changed.truth[name] for name in kept} == pytest.approx(kept, rel=1e-12)
    by_hand = mj.scenario(
        "angle ~ temp + (temp | recipe) + (1 | recipe:replicate)", data, beta=fit.fixef,
        sd={"recipe": [7.0, 0.2], "recipe:replicate": truth.truth["sd_Intercept|recipe:replicate"]},
        cor={"recipe": -0.25}, sigma=3.0,
    )  # fmt: skip
    np.testing.assert_allclose(changed.simulate(1, 3), by_hand.simulate(1, 3), rtol=1e-10)
    np.testing.assert_array_equal(truth.with_variances({}).simulate(1, 2), truth.simulate(1, 2))
    # lme4's names, in any order; the first is that of the term with most levels.
    first = truth.with_variances({".sigma": 2.0, ".sig01": 1.5})
    assert (first.truth["sigma"], first.truth["sd_Intercept|recipe:replicate"]) == (2.0, pytest.approx(1.5))


def test_other_variances_of_equal_effects_change_all():
    fit = mj.lmm("Reaction ~ Days + homcs(1 + Days | Subject)", mj.datasets.load("sleepstudy"))
    changed = scenario_of(fit).with_variances({"sd|Subject": 5.0, "cor|Subject": 0.5})
    np.testing.assert_allclose(changed.Sigma[0], [[25, 12.5], [12.5, 25]], rtol=1e-12)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sd_day|Subject": 1}, "there is no parameter 'sd_day|Subject'; there are 'sd_Intercept|Subject'"),
        ({"sd_Days|Subject": -1}, "'sd_Days|Subject' must be a standard deviation, 0 or more, got -1"),
        ({"sigma": np.nan}, "'sigma' must be a standard deviation"),
        ({"sigma": True}, "'sigma' must be a standard deviation"),
        ({"cor_Days.Intercept|Subject": 1.2}, "must be a correlation, from -1 to 1, got 1.2"),
        ({"theta_": 1}, "'theta_' stands for 4 parameters"),
        ({"sigma": 1, ".sigma": 2}, "'sigma' is given twice"),
        ([1.0], "a dict name -> value is needed"),
    ],
)
def test_variances_that_cannot_be(values, message):
    truth = scenario_of(mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy")))
    with pytest.raises(ValueError, match=re.escape(message)):
        truth.with_variances(values)
    with pytest.raises(ValueError, match=r"no fixed effect: with_variances\(\{'sigma': ...\}\) changes it"):
        truth.with_effects({"sigma": 1.0})


def test_correlations_that_cannot_be_together():
    data = mj.datasets.load("Machines")
    truth = scenario_of(mj.lmm("score ~ Machine + (0 + Machine | Worker)", data))
    names = [name for name in truth.truth if name.startswith("cor")]
    with pytest.raises(ValueError, match=r"effects of 'Worker' cannot have the correlations .*smallest eigenv"):
        truth.with_variances(dict(zip(names, (0.9, 0.9, -0.9), strict=True)))


# --- replicates ------------------------------------------------------------------------------------------------------


def test_replicates_are_the_fits_of_the_simulated_responses(both):
    truth = source(0.5)
    cells = _cells(lambda slope: source(slope), FORMULA, {"slope": [0.5]}, 5, None, (), False, WALD)
    key = cells[0][0].task.key
    Y = truth.simulate(key, 3)
    raw = both.raw(1)
    assert len(raw) == BLOCK + 300
    for i in range(3):
        fit = mj.lmm(FORMULA, truth.table.assign(y=Y[i]))
        tests = fit.tidy(ddf="satterthwaite")
        row = raw.loc[i]
        np.testing.assert_allclose(row["large::x"], fit.fixef["x"], rtol=1e-7)
        np.testing.assert_allclose(row["large::sd_x|g"], np.sqrt(fit.Sigma["g"][1, 1]), rtol=1e-5, atol=1e-8)
        own = tests[tests["term"] == "x"].iloc[0]
        for column in ("df", "p"):
            expected = own["df"] if column == "df" else own["p_value"]
            np.testing.assert_allclose(row[f"large::{column}(x)"], expected, rtol=1e-5)
        ml = [mj.lmm(f, truth.table.assign(y=Y[i]), reml=False).criterion for f in ("y ~ 1 + (x | g)", FORMULA)]
        np.testing.assert_allclose(row["lrt(large|small)"], ml[0] - ml[1], rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(row["p(large|small)"], stats.chi2.sf(ml[0] - ml[1], 1), rtol=1e-6)


@pytest.mark.parametrize(("cell", "replicate"), [(0, 0), (1, 7), (1, BLOCK + 3)])
def test_the_data_of_a_replicate_are_those_that_were_fitted(both, cell, replicate):
    fit = mj.lmm(FORMULA, both.data(cell, replicate))
    row = both.raw(cell).loc[replicate]
    assert row["large::x"] == pytest.approx(fit.fixef["x"], rel=1e-6)
    assert row["large::sigma"] == pytest.approx(fit.sigma, rel=1e-6)


def test_data_of_counts_of_drop_out_and_of_new_predictors():
    cbpp = mj.datasets.load("cbpp")
    herds = mj.glmm("incidence / size ~ period + (1 | herd)", cbpp, family="binomial", weights="size")
    formula = "incidence / size ~ period + (1 | herd)"
    found = mj.study(mj.scenario_of(herds), formula, replicates=4, key=1, progress=False)
    again = mj.glmm(formula, found.data(replicate=3), family="binomial", weights="size")
    assert found.raw()["sd_Intercept|herd"][3] == pytest.approx(again.tidy()["estimate"].iloc[-1], abs=1e-5)

    made = {"cluster": mj.factor(12, balance="blocks"), "treated": mj.bernoulli(0.5)}
    drawn = mj.population(**made, y=mj.response("treated", error_scale=1)).rows(60, x="new")
    found = mj.study(drawn, "y ~ treated + (1 | cluster)", replicates=4, key=1, ddf="wald", progress=False)
    again = mj.lmm("y ~ treated + (1 | cluster)", found.data(replicate=2))
    assert found.raw()["treated"][2] == pytest.approx(again.fixef["treated"], rel=1e-6)

    visits = pd.DataFrame({"id": np.repeat(np.arange(40), 3), "visit": [*["w1", "w2", "w3"] * 40]})
    formula = "y ~ 0 + visit + us(visit | id)"
    truth = mj.trial(formula, visits, [0, 0, 0], cor=("ar1", 0.5), sd=1, dropout=0.2)
    found = mj.study(truth, formula, replicates=3, key=1, progress=False)
    data = found.data(replicate=1)
    with pytest.warns(mj.DataWarning, match="missing"):
        again = mj.mmrm(formula, data)
    assert data["y"].isna().any()
    assert found.raw()["visit[w3]"][1] == pytest.approx(again.fixef["visit[w3]"], abs=1e-5)


@pytest.mark.parametrize(("cell", "replicate", "message"), [
    (2, 0, "cell is a row of .cells, 0 to 1"), (0, BLOCK + 300, "replicate is a number from 0 to 1323"),
    (0, -1, "replicate is"), (0, True, "replicate is")])  # fmt: skip
def test_data_that_there_are_not(both, cell, replicate, message):
    with pytest.raises(ValueError, match=message):
        both.data(cell, replicate)


def test_bits_do_not_depend_on_the_split(both):
    models = {"small": "y ~ 1 + (x | g)", "large": FORMULA}
    options = {"key": 5, "compared": [("small", "large")], "progress": False}
    again = mj.study(source, models, {"slope": [0.0, 0.5]}, BLOCK + 300, chunk=BLOCK, **options)
    fewer = mj.study(source, models, [{"slope": 0.5}], 40, **options)
    more = mj.study(source, models, {"slope": [0.5, 0.0]}, 2 * BLOCK + 1, **options)
    pd.testing.assert_frame_equal(again.raw(0), both.raw(0), check_exact=True)
    pd.testing.assert_frame_equal(again.to_frame(), both.to_frame(), check_exact=True)
    pd.testing.assert_frame_equal(fewer.raw(0), both.raw(1).iloc[:40], check_exact=True)
    pd.testing.assert_frame_equal(more.raw(0).iloc[: BLOCK + 300], both.raw(1), check_exact=True)


def test_a_mesh_of_devices(both):
    mesh = jax.sharding.Mesh(np.array(jax.devices()), ("replicates",))
    models = {"small": "y ~ 1 + (x | g)", "large": FORMULA}
    found = mj.study(source, models, [{"slope": 0.5}], 40, 5, compared=[("small", "large")], mesh=mesh, progress=False)
    pd.testing.assert_frame_equal(found.raw(0), both.raw(1).iloc[:40], rtol=1e-6, atol=1e-8)
    with pytest.raises(ValueError, match="either an executor"):
        mj.study(source(), FORMULA, mesh=mesh, executor=object(), progress=False)


def test_common_random_numbers():
    result = mj.study(source, FORMULA, {"slope": [0.0, 0.5]}, 50, key=1, common=True, progress=False)
    # A shift of the response by 0.5 x shifts the estimate by 0.5 and leaves all variances.
    np.testing.assert_allclose(result.raw(1)["x"] - result.raw(0)["x"], 0.5, atol=1e-6)
    np.testing.assert_allclose(result.raw(1)["sigma"], result.raw(0)["sigma"], rtol=1e-6)
    apart = mj.study(source, FORMULA, {"slope": [0.0, 0.5]}, 50, key=1, progress=False)
    assert np.ptp(apart.raw(1)["x"] - apart.raw(0)["x"]) > 0.1


def test_a_statistic_of_the_estimates():
    def ratio(est):
        return {"icc": est.Sigma[0][0, 0] / (est.Sigma[0][0, 0] + est.sigma**2), "beta": est.beta}

    result = mj.study(source(), FORMULA, replicates=30, key=1, statistic=ratio, truth={"icc": 0.5}, progress=False)
    raw = result.raw()
    np.testing.assert_allclose(
        raw["icc"], raw["sd_Intercept|g"] ** 2 / (raw["sd_Intercept|g"] ** 2 + raw["sigma"] ** 2)
    )
    np.testing.assert_array_equal(raw["beta[1]"], raw["x"])
    found = result.to_frame(("bias", "mean")).query("term == 'icc'").set_index("measure")["value"]
    assert found["bias"] == pytest.approx(found["mean"] - 0.5)


def test_a_null_that_is_not_zero():
    result = mj.study(source(), FORMULA, replicates=40, key=1, null={"x": 0.5}, ddf="wald", progress=False)
    raw = result.raw()
    z = (raw["x"] - 0.5) / raw["se(x)"]
    np.testing.assert_allclose(raw["p(x)"], 2 * stats.norm.sf(np.abs(z)), rtol=1e-9)


class Broken:
    """A source whose every fourth response has no numbers."""

    own = source()
    truth, nobs, options = own.truth, own.nobs, own.options

    def tables(self, key, first, count):
        tables, Y = self.own.tables(key, first, count)
        Y[::4] = np.nan
        return tables, Y


def test_failed_fits_are_counted_and_not_used():
    result = mj.study(Broken(), FORMULA, replicates=40, key=1, progress=False)
    assert result.counts["failed"].tolist() == [10]
    assert result.counts["converged"].tolist() == [30]
    assert result.counts["failed: NOT_FINITE"].tolist() == [10]
    assert (result.to_frame()["replicates"] <= 30).all()
    assert result.raw().iloc[::4].drop(columns=["result", "singular"]).isna().all(axis=None)
    assert "10 fits failed" in str(result)


# --- measures --------------------------------------------------------------------------------------------------------


def test_measures_against_numbers_by_hand(both):
    raw = both.raw(1)
    frame = both.to_frame().query("slope == 0.5 and model == 'large'").set_index(["term", "measure"])
    x, se, df = (raw[f"large::{name}"] for name in ("x", "se(x)", "df(x)"))
    assert frame.loc[("x", "bias"), "value"] == pytest.approx(x.mean() - 0.5)
    assert frame.loc[("x", "empirical_se"), "value"] == pytest.approx(x.std())
    assert frame.loc[("x", "rmse"), "value"] == pytest.approx(np.sqrt(((x - 0.5) ** 2).mean()))
    inside = (np.abs(x - 0.5) <= stats.t.ppf(0.975, df) * se)[df.notna()]
    assert frame.loc[("x", "coverage"), "value"] == pytest.approx(inside.mean())
    assert frame.loc[("x", "coverage"), "replicates"] == df.notna().sum()
    assert frame.loc[("x", "rejection"), "value"] == pytest.approx((raw["large::p(x)"].dropna() < 0.05).mean())
    tests = both.to_frame("rejection").query("term.str.startswith('large|small')", engine="python")
    assert len(tests) == 4  # chi-square and mixture in both cells
    assert (tests["model"] == "").all()


def test_monte_carlo_errors_are_the_spread_of_the_measures():
    """Over 4 000 studies of 200 replicates each the standard deviation of a measure is its mcse."""
    rng = np.random.default_rng(1)
    x = rng.standard_normal((4_000, 200)) * 2 + 1
    se = np.sqrt(rng.chisquare(20, (4_000, 200)) / 20) * 2
    for measure in (
        lambda a, b: bias(a, 0.5),
        lambda a, b: empirical_se(a),
        lambda a, b: model_se(b),
        lambda a, b: rmse(a, 0.5),
        relative_error_se,
    ):
        found = [measure(a, b) for a, b in zip(x, se, strict=True)]
        values, errors = np.array([f.value for f in found]), np.array([f.mcse for f in found])
        # The standard deviation of 4 000 values is good to 1.1 %; formulas are of first order in 1 / 200.
        assert abs(values.std() / errors.mean() - 1) < 0.05


def test_the_truth_is_covered_and_tests_hold_their_level():
    """With the true model and 60 groups: coverage, type I error and the standard error, within Monte Carlo error."""
    n = 4_000
    result = mj.study(lambda slope: source(slope, 60), FORMULA, {"slope": [0.0]}, n, key=2, progress=False)
    frame = result.to_frame().set_index(["term", "measure"])
    for name in ("Intercept", "x"):
        assert abs(frame.loc[(name, "coverage"), "value"] - 0.95) < 4 * np.sqrt(0.05 * 0.95 / n)
        assert abs(frame.loc[(name, "bias"), "value"]) < 4 * frame.loc[(name, "bias"), "mcse"]
        assert abs(frame.loc[(name, "relative_error_se"), "value"]) < 4 * frame.loc[(name, "relative_error_se"), "mcse"]
    assert abs(frame.loc[("x", "rejection"), "value"] - 0.05) < 4 * np.sqrt(0.05 * 0.95 / n)


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"replicates": 0}, "replicates must be an integer, 1 or more"),
        ({"chunk": 1000}, "multiple of 1024"),
        ({"ddf": "exact"}, "ddf must be one of"),
        ({"grid": {"slope": []}}, "must be a list of values"),
        ({"grid": {"slope": "abc"}}, "must be a list of values"),
        ({"grid": {"tilt": [1]}}, "does not take the grid's"),
        ({"grid": [{"slope": 1}, {"groups": 3}]}, "dicts of the same names"),
        ({"grid": {"slope": {0.5, 0.6}}}, "must be a list of values"),
        ({"grid": {"slope": [0.5, 0.5]}}, "has the cell slope=0.5 twice"),
        ({"grid": {1: [0.5]}}, "names of the grid are text"),
        ({"grid": {"slope": [0.5], "ddf": ["wald"]}}, "ddf is an option of mixjax.study and no argument of source"),
        ({"grid": {"slope": range(10**11)}}, "has more than 100000 values"),
        ({"grid": {"slope": range(10**3), "groups": range(10**3)}}, "the grid has 1000000 cells, and may have 100000"),
        ({"grid": ({"slope": i} for i in range(10**11))}, "grid has more than 100000 values"),
        ({"replicates": 10**400}, r"replicates must be 4294967296 or less, got 10\^400 or more"),
        ({"replicates": 10**11}, "replicates must be 4294967296 or less, got 100000000000"),
        ({"replicates": 4 * 10**9}, "results of 4000000000 fits would take 156 GiB of memory.*by store="),
        ({"replicates": -1}, "replicates must be an integer, 1 or more, got -1"),
        ({"replicates": 1e3}, "replicates must be an integer, 1 or more, got 1000.0"),
        ({"replicates": np.inf}, "replicates must be an integer, 1 or more, got inf"),
        ({"replicates": True}, "replicates must be an integer, 1 or more, got True"),
        ({"chunk": 10**400}, "chunk must be 4294967296 or less"),
        ({"null": {"z": 1.0}}, "null names z, and the fixed effects are Intercept, x"),
        ({"statistic": lambda est: {"sigma": est.sigma**2}}, "the statistic's sigma is also the name of an estimate"),
        ({"compared": [("a", "b")]}, "compared= takes pairs"),
        ({"models": {}}, "models is empty"),
        ({"models": {"a::b": FORMULA}}, "without '::'"),
        ({"models": {"a": FORMULA, "b": "y ~ 1 + (x | g)"}, "compared": [("a", "b")]}, "is not a special case"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch):
    monkeypatch.setattr("mixjax.checks._memory", lambda: 2**35)
    arguments = {"models": FORMULA, "grid": {"slope": [0.5]}, "replicates": 2, "progress": False} | arguments
    models = arguments.pop("models")
    with pytest.raises(ValueError, match=message):
        mj.study(source, models, **arguments)


def test_a_source_that_is_none():
    with pytest.raises(ValueError, match="data come from"):
        mj.study(layout(), FORMULA, progress=False)
    with pytest.raises(ValueError, match="does not depend on the grid's slope"):
        mj.study(source(), FORMULA, {"slope": [1]}, progress=False)


def test_responses_that_cannot_be_are_refused_before_memory_is_taken(monkeypatch):
    monkeypatch.setattr("mixjax.checks._memory", lambda: 2**35)
    for n, message in [
        (10**9, "1000000000 responses of 72 rows would take 536 GiB of memory, and this machine has 32"),
        (10**11, "n must be 4294967296 or less"),
        (10**400, r"n must be 4294967296 or less, got 10\^400 or more"),
        (-1, "n must be an integer, 1 or more, got -1"),
        (2.0, "n must be an integer"),
        (True, "n must be an integer"),
        (np.inf, "n must be an integer"),
    ]:
        with pytest.raises(ValueError, match=message):
            source().simulate(1, n)
        with pytest.raises(ValueError, match=message):
            mj.simulate(FORMULA, layout(), **PARAMETERS, n=n)
    with pytest.raises(ValueError, match="first must be 4294967296 or less"):
        source().simulate(1, 1, first=10**400)


# --- names of the grid -----------------------------------------------------------------------------------------------


def test_a_grid_may_be_called_n():
    """The name of Population.rows, and of everybody; the results had a column of that name, which went first."""
    pop = mj.population(g=mj.factor(6, balance="blocks"), x=mj.normal(), y=mj.response("x", error_scale=1))
    found = mj.study(pop.rows, "y ~ x + (1 | g)", {"n": [30, 60]}, 40, truth={"x": 1.0}, ddf="wald", progress=False)
    frame = found.to_frame()
    assert frame["n"].unique().tolist() == [30, 60]
    assert frame["replicates"].unique().tolist() == [40]
    assert found.counts["n"].tolist() == [30, 60]
    se = frame.query("term == 'x' and measure == 'model_se'")["value"].tolist()
    assert 1.2 < se[0] / se[1] < 1.7  # half as many rows: 1.4 times
    assert len(str(found).splitlines()[1:-3]) == 2 + 2 * 4


@pytest.mark.parametrize("name", ["model", "term", "measure", "value", "mcse", "replicates", "converged", "failed"])
def test_names_of_columns_of_the_results_are_refused(name):
    call = eval(f"lambda {name}: source()")
    message = rf"the grid's name '{name}' is that of a column.*lambda {name}_: source\({name}={name}_\)"
    with pytest.raises(ValueError, match=message):
        mj.study(call, FORMULA, {name: [1]}, 2, progress=False)


def test_names_that_nothing_reads_are_warned_of():
    with pytest.warns(mj.DataWarning, match="the data do not depend on the grid's 'groups'") as caught:
        mj.study(
            lambda slope, **more: source(slope), FORMULA, {"slope": [0.1, 0.2], "groups": [10, 12]}, 4, ddf="wald",
            progress=False,
        )  # fmt: skip
    assert len(caught) == 1
    assert caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the truth reads it; or there is nothing to compare
        options = {"ddf": "wald", "progress": False}
        mj.study(lambda a: source(), FORMULA, {"a": [1, 2]}, 4, truth=lambda a: {"x": float(a)}, **options)
        mj.study(lambda slope, groups: source(slope), FORMULA, [{"slope": 0.1, "groups": 1}], 4, **options)
        mj.study(source, FORMULA, [{"slope": 0.1, "groups": 8}, {"slope": 0.2, "groups": 9}], 4, **options)


def test_an_option_that_the_source_would_swallow_is_refused():
    with pytest.raises(ValueError, match=r"reml is an option of mixjax\.study and no argument of"):
        mj.study(lambda slope, **more: source(slope), FORMULA, {"slope": [0.5], "reml": [True, False]}, 2)


steepness = 3.0


def test_a_name_of_the_grid_that_a_formula_would_read_elsewhere_is_refused():
    formula = "y ~ I(x * steepness) + (1 | g)"

    def bent(steepness):
        return mj.scenario(formula, layout(), [1.0, 0.5], sd=1.0)

    with pytest.raises(ValueError, match=r"reads steepness, which is a name of the grid and no column"):
        mj.study(bent, formula, {"steepness": [1.0, 2.0]}, 2, progress=False)


def test_a_truth_that_names_nothing_is_warned_of():
    message = "truth names slope, which no model estimates; estimates are Intercept"
    with pytest.warns(mj.DataWarning, match=message) as caught:
        mj.study(source(), FORMULA, None, 4, truth={"slope": 1.0, "x": 0.5}, ddf="wald", progress=False)
    assert caught[0].filename == __file__
    pop = mj.population(x=mj.normal(), g=mj.factor(6, balance="blocks"), y=mj.response("x", error_scale=1))
    rows = pop.rows(30, x_key=1, truth={"slope": 1.0})
    with pytest.warns(mj.DataWarning, match=message):
        mj.study(rows, "y ~ x + (1 | g)", None, 4, ddf="wald", progress=False)
    small = mj.study(source(), "y ~ 1 + (x | g)", None, 4, ddf="wald", progress=False)
    assert "x" in small.truths[0]  # of a scenario, and no fault


def test_cells_that_cannot_be_compared_are_all_shown():
    values = [None, np.nan, [1, 2]]
    found = mj.study(lambda a: source(), FORMULA, {"a": iter(values)}, 4, ddf="wald", common=True, progress=False,
                     truth=lambda a: {"x": float(values.index(a))})  # fmt: skip
    text = str(found)
    assert all(f"\n{value} " in text for value in ("None", "nan", "[1, 2]"))


def test_errors_say_in_which_cell():
    with pytest.raises(ValueError, match="'z'") as caught:
        mj.study(lambda groups: source(groups=groups), "y ~ z + (1 | g)", {"groups": [12]}, 2, progress=False)
    assert any("groups=12" in note for note in caught.value.__notes__)


def test_unknown_measures_and_cells(both):
    with pytest.raises(ValueError, match=r"unknown measure 'precision'.*statistic="):
        both.to_frame("precision")
    for cell in (2, -1, 1.0, True):
        with pytest.raises(ValueError, match="cell is a row"):
            both.raw(cell)
    with pytest.raises(ValueError, match="there is no column 'y', 'z'; there are small::result"):
        both.raw(0, ["y", "large::x", "z"])
    with pytest.raises(ValueError, match="level must be"):
        both.to_frame(level=95)
    with pytest.raises(ValueError, match="alpha"):
        both.to_frame(alpha=5)


# --- descriptions ----------------------------------------------------------------------------------------------------


def test_descriptions_tell_apart_what_gives_other_numbers():
    def first(x, k=1):
        return x + k

    def second(x, k=1):
        return x + 2 * k

    assert describe(source(0.5)) == describe(source(0.5))
    assert describe(source(0.5)) != describe(source(0.6))
    assert describe(first) != describe(second)
    assert describe({"a": np.arange(100)}) == describe({"a": np.arange(100)})
    assert describe({"a": np.arange(100)}) != describe({"a": np.arange(100) + 1})

    def adding(k):
        return lambda x: x + k

    closures = [adding(k) for k in (1, 1, 2)]
    assert describe(closures[0]) == describe(closures[1]) != describe(closures[2])
    json.dumps(describe(source(0.5)))
    # What a function is called with, not where it was written.
    with jax.enable_x64(True):
        assert describe(jax.numpy.arange(3.0)) == [0.0, 1.0, 2.0]


def test_outcomes_begin_at_blocks():
    task = _cells(source, FORMULA, [{"slope": 0.5}], 0, None, (), False, WALD)[0][0].task
    with pytest.raises(ValueError, match="does not begin one"):
        outcomes(task, 100, 5)


@pytest.mark.parametrize("weights", [None, "w"])
@pytest.mark.parametrize("reml", [True, False])
def test_models_without_random_effects_are_ordinary_regressions(weights, reml):
    """As mixjax.lmm(dispersion="~ 1") fits them, and as the null of a likelihood ratio."""
    data = mj.datasets.load("sleepstudy")
    data = data.assign(w=1.0 + data["Days"] % 3)
    own = mj.scenario("y ~ Days + (1 | Subject)", data, beta=[250, 2], sd=[10.0], sigma=25, weights=weights)
    models = {"none": "y ~ Days", "one": "y ~ Days + (1 | Subject)"}
    raw = mj.study(own, models, replicates=5, key=1, reml=reml, compared=[("none", "one")],
                   common=True, progress=False).raw()  # fmt: skip
    fits = [
        [mj.lmm(formula, data.assign(y=y), reml=False, weights=weights, **more)
         for formula, more in (("y ~ Days", {"dispersion": "~ 1"}), ("y ~ Days + (1 | Subject)", {}))]
        for y in own.simulate(1, 5)
    ]  # fmt: skip
    for i, (none, one) in enumerate(fits):
        again = none.refit(reml=reml)
        row = raw.iloc[i]
        np.testing.assert_allclose(row[["none::Intercept", "none::Days"]].astype(float), again.fixef, rtol=1e-9)
        np.testing.assert_allclose(row["none::sigma"], again.sigma, rtol=1e-9)
        test = again.test("Days = 0")
        for column in ("se", "df", "p"):
            name = {"se": "std_error", "df": "df", "p": "p_value"}[column]
            np.testing.assert_allclose(row[f"none::{column}(Days)"], test[name].iloc[0], rtol=1e-7)
        np.testing.assert_allclose(row["lrt(one|none)"], max(0.0, none.criterion - one.criterion), atol=1e-6)


def test_a_variance_that_is_not_there_is_found_as_often_as_a_test_says():
    data = mj.datasets.load("sleepstudy")
    none = mj.scenario("y ~ Days + (1 | Subject)", data, beta=[250, 2], sd=[0.0], sigma=25)
    models = {"none": "y ~ Days", "one": "y ~ Days + (1 | Subject)"}
    found = mj.power(none, models, "mixture", replicates=2000, key=1, progress=False).table.iloc[0]
    # The mixture is asymptotic: of 18 subjects P(no variance is estimated) is above a half, and the level below 0.05.
    assert 0.03 < found["power"] < 0.05 + 4.5 * np.sqrt(0.05 * 0.95 / 2000)
    with pytest.raises(ValueError, match="not a special case"):
        mj.study(none, {"a": "y ~ Days", "b": "y ~ 1 + (1 | Subject)"}, replicates=2, compared=[("a", "b")],
                 progress=False)  # fmt: skip
    several = mj.study(none, {"a": "y ~ 1", "b": "y ~ Days"}, replicates=500, compared=[("a", "b")], progress=False)
    assert several.to_frame("rejection").query("term == 'b|a'")["value"].iloc[0] > 0.5


def test_fits_without_tests_are_said():
    """One patient in an arm or two: some fits converge without degrees of freedom."""
    table = pd.DataFrame({"id": np.arange(14), "arm": np.where(np.arange(14) % 2, "b", "a")})
    visits = pd.DataFrame({"visit": pd.Categorical(["w2", "w4", "w8"], ordered=True)})
    plan = mj.trial(
        "y ~ 0 + visit + visit:arm + us(visit | id)", table.merge(visits, how="cross"), beta=[0] * 6,
        sd=[1, 1.1, 1.2], cor=("ar1", 0.6), dropout=[0.35, 0.35], dropout_slope=0.3,
    )  # fmt: skip
    found = mj.study(plan, "y ~ 0 + visit + visit:arm + us(visit | id)", replicates=300, key=1, progress=False)
    frame = found.to_frame().set_index(["term", "measure"])
    own = frame.loc["visit[w8]:arm[T.b]"]
    assert np.isfinite(own.loc["model_se", "value"])
    lost = own.loc["mean", "replicates"] - own.loc["rejection", "replicates"]
    assert ("have no standard error or degrees of freedom" in str(found)) == (lost > 0)
    assert lost > 0
