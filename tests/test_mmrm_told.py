"""Repeated measures at the edges: covariances that nothing tells, new responses, arrays that make no model."""

import numpy as np
import pandas as pd
import pytest

import mixjax as mj
from mixjax.cli import main
from mixjax.design import RepeatedDesign
from mixjax.products.visits import Trials, visit_rows

pytestmark = pytest.mark.filterwarnings("ignore::mixjax.DataWarning")

VISITS = ["v1", "v2", "v3", "v4"]


def table(n=24, seed=0):
    rng = np.random.default_rng(seed)
    who = pd.DataFrame({"id": np.arange(n), "arm": np.where(np.arange(n) % 2, "b", "a"), "u": rng.normal(size=n)})
    data = who.merge(pd.DataFrame({"visit": VISITS}), how="cross")
    data["x"], data["w"] = rng.normal(size=len(data)), rng.uniform(0.5, 2, len(data))
    data["y"] = data["x"] + data.pop("u") + rng.normal(size=len(data))
    return data


def without_v1_and_v4(data):
    """Nobody has both."""
    return ((data["visit"] == "v4") & (data["id"] % 2 == 0)) | ((data["visit"] == "v1") & (data["id"] % 2 == 1))


@pytest.mark.parametrize("structure", ["us", "toeph", "homtoep"])
def test_a_covariance_of_visits_that_nobody_has_both_of_is_refused(structure):
    data = table()
    seen = data[~without_v1_and_v4(data)]
    with pytest.raises(mj.DataError, match=r"nobody has rows at both visit 'v1' and 'v4'.*homcs"):
        mj.mmrm(f"y ~ arm + {structure}(visit | id)", seen)
    for other in ("ar1h", "adh", "csh", "diag"):
        assert mj.mmrm(f"y ~ arm + {other}(visit | id)", seen).converged


@pytest.mark.parametrize("structure", ["us", "toeph", "ar1h"])
def test_so_are_responses_of_many(structure):
    data = table()
    fit = mj.mmrm(f"y ~ arm + x + {structure}(visit | id)", data)
    Y = np.stack([data["y"].to_numpy()] * 4)
    Y[1, without_v1_and_v4(data)] = np.nan
    Y[2, data["visit"] == "v4"] = np.nan
    Y[3, (data["visit"] == "v4") & (data["id"] > 8)] = np.nan
    batch = fit.refit_many(Y)
    told = structure == "ar1h"
    assert batch.converged.tolist() == [True, told, False, True]
    assert set(batch.estimates.result[~np.asarray(batch.converged)]) == {int(mj.Result.NOT_FINITE)}
    own = mj.mmrm(f"y ~ arm + x + {structure}(visit | id)", data.assign(y=Y[3]).dropna())
    np.testing.assert_allclose(batch.criterion.iloc[3], own.criterion, rtol=1e-9)


def test_an_arm_without_a_visit_is_one_of_them():
    data = table()
    fit = mj.mmrm("y ~ x + us(visit | arm / id)", data)
    Y = np.stack([data["y"].to_numpy()] * 3)
    Y[1, (data["visit"] == "v4") & (data["arm"] == "b")] = np.nan
    Y[2, data["arm"] == "b"] = np.nan
    assert fit.refit_many(Y).converged.tolist() == [True, False, False]
    design = fit.design
    alone = RepeatedDesign(
        design.y, design.X, design.subject, design.visit, design.n_subjects, n_visits=5, structure="us"
    )
    assert int(mj.repeated_estimate(alone).result) == int(mj.Result.NOT_FINITE)


# --- new tables -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, "w"])
def test_responses_of_a_new_table_are_given_too(weights):
    data = table()
    fit = mj.mmrm("y ~ x + visit + us(visit | id)", data, weights=weights)
    new = table(seed=5).head(8).assign(id=[100] * 4 + [3] * 4)
    known = np.array([True, True, False, True, False, True, False, False])
    new["y"] = np.where(known, new["y"], np.nan)
    found = fit.predict(new, conditional=True, interval="prediction")
    mean, S = fit.predict(new.drop(columns="y")).to_numpy(), fit.Sigma["id"].to_numpy()
    y = new["y"].to_numpy().copy()
    old = data[data["id"] == 3]
    y[4:] = np.where(known[4:], y[4:], old["y"])  # of a subject of the fit its other responses are known as well
    w = np.ones(8) if weights is None else new["w"].to_numpy().copy()
    if weights:
        w[4:] = np.where(known[4:], w[4:], old["w"])
    mean_known = mean.copy()
    mean_known[4:] = np.where(known[4:], mean[4:], fit.predict().loc[old.index])
    for own, there in ((slice(0, 4), known[:4]), (slice(4, 8), np.ones(4, bool))):
        V = S / np.sqrt(np.outer(w[own], w[own]))
        share = np.linalg.solve(V[np.ix_(there, there)], V[there])
        expected = mean[own] + share.T @ (y - mean_known)[own][there]
        at = np.arange(8)[own][~there] if not there.all() else np.array([5])
        np.testing.assert_allclose(found["estimate"].to_numpy()[at], expected[at - own.start], rtol=1e-9)
    np.testing.assert_allclose(found.loc[known, "estimate"], new.loc[known, "y"], rtol=1e-9)


def test_the_weight_of_a_row_counts_with_and_without_an_interval():
    data = table()
    fit = mj.mmrm("y ~ visit + us(visit | id)", data[:-1], weights="w")
    last = data[-1:].assign(w=9.0).drop(columns="y")
    both = [fit.predict(last, conditional=True, **own) for own in ({}, {"interval": "prediction"})]
    np.testing.assert_allclose(both[0], both[1]["estimate"], rtol=1e-12)


def test_levels_are_their_values_and_not_their_names():
    data = table().assign(site=lambda d: np.where(d["id"] % 2, "a", "a:b"))
    data["sub"] = np.where(data["id"] % 2, "b:" + (data["id"] // 2).astype(str), (data["id"] // 2).astype(str))
    fit = mj.mmrm("y ~ visit + us(visit | site:sub)", data)
    assert len(set(fit.labels.terms[0].levels)) < 24
    pd.testing.assert_series_equal(
        fit.predict(data.drop(columns="y"), conditional=True), fit.predict(conditional=True), rtol=1e-10
    )


def test_subjects_that_new_tables_cannot_mean_are_refused():
    data = table()
    fit = mj.mmrm("y ~ visit + us(visit | arm / id)", data)
    with pytest.raises(mj.DataError, match=r"newdata has id '0' in arm 'b', and the fit in 'a'"):
        fit.predict(data.head(2).assign(arm="b"), conditional=True)
    with pytest.raises(mj.DataError, match="2 rows without id"):
        fit.predict(data.head(2).assign(id=np.nan), conditional=True)
    with pytest.raises(mj.DataError, match="2 responses of one id at visit 'v1'"):
        fit.predict(data.iloc[[0, 0]], conditional=True)
    assert fit.predict(data.head(2).drop(columns="id"), interval="prediction").shape == (2, 4)


# --- arrays -----------------------------------------------------------------------------------------------------------


def arrays(**other):
    own = {"y": np.arange(12.0) % 5, "X": np.ones((12, 1)), "subject": np.repeat(np.arange(4), 3)}
    return RepeatedDesign(**(own | {"visit": np.arange(12) % 3, "n_subjects": 4, "n_visits": 3} | other))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"X": np.ones(12)}, r"X must be \(n, p\)"),
        ({"y": np.ones(11)}, r"y must be \(12,\)"),
        ({"visit": np.arange(12) % 2}, "subject 0 has 2 rows at visit 0"),
        ({"visit": np.arange(12) % 3 - 1}, "visit must be integers 0 .. 2"),
        ({"n_subjects": 3}, "subject must be integers 0 .. 2"),
        ({"n_arms": 2}, "n_arms is 2, but arm is None"),
        ({"arm": np.array([0, 1, 0, 1])}, "arm must be integers 0 .. 0"),
        ({"arm": np.zeros(3, int)}, r"arm must be \(4,\)"),
        ({"weights": np.zeros(12)}, "weights must be positive"),
        ({"X": np.ones((0, 1))}, "no rows"),
    ],
)
def test_arrays_that_make_no_model(other, message):
    with pytest.raises(ValueError, match=message):
        mj.repeated_estimate(arrays(**other))
    with pytest.raises(ValueError, match=message):
        mj.repeated_loglik(np.ones(1), np.eye(3), arrays(**other))


def test_shapes_of_parameters_and_designs_of_the_other_kind():
    with pytest.raises(ValueError, match="Sigma has shape"):
        mj.repeated_loglik(np.ones(1), np.eye(2), arrays())
    with pytest.raises(ValueError, match="beta has shape"):
        mj.repeated_loglik(np.ones(2), np.eye(3), arrays())
    for ask in (mj.cross_products, lambda d: mj.group_batches(d, 2), lambda d: mj.marginal_loglik_by_level(None, d)):
        with pytest.raises(TypeError, match=r"mixjax\.repeated_loglik"):
            ask(arrays())
    term = mj.RandomTerm(np.ones((12, 1)), np.repeat(np.arange(4), 3), 4)
    with pytest.raises(TypeError, match=r"a mixjax.RepeatedDesign is needed, got Design"):
        mj.repeated_estimate(mj.Design(np.arange(12.0), np.ones((12, 1)), (term,)))
    # One covariance may serve arms that have their own otherwise.
    arms = arrays(arm=np.array([0, 1, 0, 1]), n_arms=2)
    one, two = (float(mj.repeated_loglik(np.ones(1), S, arms)) for S in (np.eye(3), np.stack([np.eye(3)] * 2)))
    assert one == two


@pytest.mark.parametrize("T", [3, 31, 62, 70])
def test_patterns_of_many_visits_are_told_apart(T):
    rng = np.random.default_rng(T)
    S = 9
    design = arrays(
        y=rng.normal(size=S * T), X=np.ones((S * T, 1)), subject=np.repeat(np.arange(S), T),
        visit=np.tile(np.arange(T), S), n_subjects=S, n_visits=T, arm=np.arange(S) % 3, n_arms=3, structure="homcs",
    )  # fmt: skip
    rows = visit_rows(design)
    there = rng.random((4, S * T)) < 0.7
    found = Trials.of(rows, there)
    assert sorted(set(found.patterns.arm)) == [0, 1, 2]
    assert (np.diff(found.patterns.arm) >= 0).all()
    np.testing.assert_array_equal(found.members.sum(1), 1.0)
    seen = there.reshape(4, S, T)[:, rows.order]
    np.testing.assert_array_equal(np.einsum("bcs,ct->bst", found.members, found.patterns.seen * 1.0) > 0, seen)
    np.testing.assert_array_equal(
        np.einsum("bcs,c->bs", found.members, found.patterns.arm), np.tile(np.asarray(design.arm)[rows.order], (4, 1))
    )


def test_models_without_fixed_effects():
    data = table(60)
    data["y"] -= data["x"]
    fit = mj.mmrm("y ~ 0 + us(visit | id)", data)
    Y = np.stack([data["y"], np.where(data.index % 17, data["y"], np.nan)])
    batch = fit.refit_many(Y)
    np.testing.assert_allclose(batch.criterion.iloc[0], fit.criterion, rtol=1e-10)
    own = mj.mmrm("y ~ 0 + us(visit | id)", data.assign(y=Y[1]).dropna())
    np.testing.assert_allclose(batch.criterion.iloc[1], own.criterion, rtol=1e-10)
    # Each visit's variance is a mean of squares, in complete data.
    wide = data["y"].to_numpy().reshape(60, 4)
    np.testing.assert_allclose(fit.Sigma["id"], wide.T @ wide / 60, rtol=1e-6)
    assert fit.variance_parameters().notna().all(axis=None)
    assert len(fit.confint()) == 10
    assert fit.bootstrap(key=1, n=3).shape == (3, 10)


@pytest.mark.parametrize("ddf", ["satterthwaite", "kenward-roger", "wald"])
def test_hypotheses_that_depend_on_each_other_are_tested_in_batches_as_in_one_fit(ddf):
    data = table()
    fit = mj.mmrm("y ~ arm + x + us(visit | id)", data)
    L = ["x = 0", "arm[T.b] = 0", "x + arm[T.b] = 0"]
    many = fit.refit_many(np.stack([data["y"]] * 2)).test(L, ddf)
    one = fit.test(L, ddf=ddf, joint=True)
    np.testing.assert_allclose(many.iloc[1], np.asarray(one[many.columns].iloc[0], float), rtol=1e-6)
    assert many["num_df"].tolist() == [2.0, 2.0]
    with pytest.raises(ValueError, match="no responses"):
        fit.refit_many(np.zeros((0, len(data))))


# --- what stands around it --------------------------------------------------------------------------------------------


def test_the_order_of_visits_is_asked_for_where_it_matters():
    who = pd.DataFrame({"id": np.arange(8)}).merge(pd.DataFrame({"visit": ["week2", "week10"]}), how="cross")
    with pytest.raises(mj.DataError, match=r"the alphabet's, week10, week2; in the table it is week2, week10"):
        mj.trial("y ~ visit + us(visit | id)", who, [0, 0])
    who["visit"] = pd.Categorical(who["visit"], categories=["week2", "week10"])
    assert mj.trial("y ~ visit + us(visit | id)", who, [0, 0]).labels.terms[0].effects == ("week2", "week10")


def test_a_shell_takes_visits_by_their_numbers(tmp_path, capsys):
    data = table().assign(visit=lambda d: d["visit"].map(dict(zip(VISITS, ["w2", "w10", "w20", "w100"], strict=True))))
    data.to_csv(tmp_path / "d.csv", index=False)
    formula = "y ~ visit + ar1(visit | id)"
    code = main(["fit", "--repeated", formula, str(tmp_path / "d.csv"), "--ddf", "kenward-roger-linear"])
    out = capsys.readouterr().out
    assert code == 0
    assert "visit[T.w10]" in out
    assert "visit[T.w2]" not in out
    ordered = data.assign(visit=pd.Categorical(data["visit"], ["w2", "w10", "w20", "w100"]))
    assert f"{mj.mmrm(formula, ordered).criterion:.1f}" in out


def test_fits_without_a_test_are_counted():
    formula = "y ~ 0 + visit + visit:arm + us(visit | id)"
    plan = mj.trial(formula, table(5).drop(columns="y"), [0.0] * 8, cor=0.5, dropout=0.1)
    found = mj.power(plan, formula, "visit[v4]:arm[T.b]", replicates=60, ddf="satterthwaite", progress=False)
    row = found.table.iloc[0]
    # 5 subjects hardly tell a covariance of 4 visits.
    assert row["untested"] > 0
    assert row["replicates"] + row["failed"] + row["untested"] == 60
    assert "have no degrees of freedom" in str(found)


def test_weights_scale_what_drop_out_depends_on():
    data = table().drop(columns="y").assign(four=4.0)
    options = {"cor": 0.5, "dropout": 0.2, "dropout_slope": 2.0}
    plain = mj.trial("y ~ visit + us(visit | id)", data, [0.0] * 4, **options)
    weighted = mj.trial("y ~ visit + us(visit | id)", data, [0.0] * 4, sd=2.0, weights="four", **options)
    np.testing.assert_allclose(plain.simulate(1, 20), weighted.simulate(1, 20), rtol=1e-12)


@pytest.mark.filterwarnings("ignore::mixjax.InferenceWarning")
def test_comparisons_name_what_differs():
    data = table()
    a = mj.mmrm("y ~ x + us(visit | id)", data)
    b = mj.mmrm("y ~ x + arm + us(visit | id)", data, weights="w")
    found = mj.compare(a, b)
    assert "weights or offset" in str(found)
    assert "fixed effects" not in str(found)
    assert found.to_frame()[["chisq", "df", "p_value"]].isna().all(axis=None)
    with pytest.raises(ValueError, match="different weights or offsets"):
        mj.compare(a, b, refit=False)
    with pytest.raises(ValueError, match="method='mixture'"):
        mj.compare(a, b, method="mixture")
