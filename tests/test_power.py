"""Power against closed forms, the search for a size, and the classic checks of a simulation study."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

import mixjax as mj
from mixjax.studies.power import _curve, _share
from mixjax.studies.scenario import scenario_of

TRIAL = "y ~ treated + (1 | cluster)"


def trial(clusters, effect=1.0, rows=5):
    """Two arms of clusters: random intercepts with sd 1, residuals with sd 1."""
    cluster = np.repeat(np.arange(clusters), rows)
    data = pd.DataFrame({"cluster": cluster, "treated": (cluster % 2).astype(float)})
    return mj.scenario(TRIAL, data, beta=[0.0, effect], sd=1.0, sigma=1.0)


def exact_power(clusters, effect=1.0, rows=5):
    """The mixed model's t test is that of two samples of cluster means, wherever the variance is not estimated as 0."""
    ncp = effect / np.sqrt(4 * (1 + 1 / rows) / clusters)
    t = stats.t.ppf(0.975, clusters - 2)
    return stats.nct.sf(t, clusters - 2, ncp) + stats.nct.cdf(-t, clusters - 2, ncp)


def test_a_cluster_randomised_trial_has_the_power_of_the_closed_form():
    n = 10_000
    found = mj.power(trial, TRIAL, "treated", {"clusters": [12, 20, 32]}, n, key=1, progress=False).table
    for row in found.itertuples():
        expected = exact_power(row.clusters)
        assert row.failed == 0
        # Of the replicates without a cluster variance the test has other df; they move the share by less than theirs.
        assert abs(row.power - expected) < 4 * np.sqrt(expected * (1 - expected) / n) + row.singular / n
        assert row.lower < row.power < row.upper


def test_the_smallest_size_is_found():
    sizes = range(8, 81, 2)
    found = mj.power_curve(trial, TRIAL, "treated", {"clusters": sizes}, 0.8, 4_000, key=3, progress=False)
    exact = next(m for m in sizes if exact_power(m) >= 0.8)
    assert found.interval[0] <= found.crossing <= found.interval[1]
    assert abs(found.smallest - exact) <= 2
    assert found.interval[0] - 2 <= exact <= found.interval[1] + 2
    assert len(found.table) < len(sizes) / 2
    assert {found.smallest, found.smallest - 2} <= set(found.table["clusters"])
    assert f"smallest clusters allowed with power 0.8: {found.smallest}" in str(found)


def test_without_a_target_all_sizes_are_looked_at():
    found = mj.power_curve(trial, TRIAL, "treated", {"clusters": [20, 12]}, replicates=500, key=3, progress=False)
    assert found.table["clusters"].tolist() == [12, 20]
    assert found.smallest is None
    assert found.target is None


def test_sizes_may_be_called_n():
    found = mj.power_curve(lambda n: trial(n), TRIAL, "treated", {"n": [12, 32]}, replicates=300, key=1, progress=False)
    same = mj.power(lambda n: trial(n), TRIAL, "treated", {"n": iter([12, 32])}, 300, key=1, progress=False).table
    assert found.table["n"].tolist() == same["n"].tolist() == [12, 32]
    assert found.table["replicates"].tolist() == [300, 300]
    assert found.table["power"].tolist() == same["power"].tolist()
    assert found.curve is not None
    assert found.curve.slope > 0


def test_out_of_reach_is_said():
    with pytest.warns(mj.InferenceWarning, match="no clusters up to 12 reaches power 0.99") as caught:
        found = mj.power_curve(trial, TRIAL, "treated", {"clusters": [8, 12]}, 0.99, 500, key=1, progress=False)
    assert caught[0].filename == __file__
    assert found.smallest is None
    assert "no clusters up to 12" in str(found)
    with pytest.warns(mj.InferenceWarning, match="allow smaller ones"):
        found = mj.power_curve(trial, TRIAL, "treated", {"clusters": [40, 80]}, 0.2, 500, key=1, progress=False)
    assert found.smallest == 40


def test_power_of_a_variance_by_the_mixture():
    models = {"none": "y ~ treated + (1 | cluster)", "slope": "y ~ treated + (1 | cluster) + (0 + x | cluster)"}

    def source(sd):
        data = trial(20).table.assign(x=np.tile(np.linspace(-1, 1, 5), 20))
        return mj.scenario(models["slope"], data, [0.0, 0.0], 1.0, {"cluster": 1.0, "cluster.1": sd})

    found = [
        mj.power(source, models, test, {"sd": [0.0, 1.0]}, 3_000, key=2, progress=False).table["power"].to_numpy()
        for test in ("lrt", "mixture")
    ]
    assert (found[0] <= found[1]).all()  # the naive p value is the larger one
    assert found[1][0] < 0.05 + 4 * np.sqrt(0.05 * 0.95 / 3_000)  # conservative with few groups
    assert found[1][0] > 0.02
    assert found[1][1] > 0.9


def test_probit_curves_recover_a_probit_curve():
    sizes, n = np.array([10, 20, 40, 80]), 4_000_000
    power = stats.norm.cdf(-1.5 + 0.3 * np.sqrt(sizes))
    curve = _curve(pd.DataFrame({"m": sizes, "power": power, "replicates": n}), "m")
    np.testing.assert_allclose([curve.intercept, curve.slope], [-1.5, 0.3], rtol=1e-4)
    np.testing.assert_allclose(curve.size(0.8)[0] ** 2, ((stats.norm.ppf(0.8) + 1.5) / 0.3) ** 2, rtol=1e-4)
    # Errors: the spread of curves through binomial counts.
    rng = np.random.default_rng(1)
    tables = [
        pd.DataFrame({"m": sizes, "power": rng.binomial(1000, power) / 1000, "replicates": 1000}) for _ in range(400)
    ]
    fits = [_curve(table, "m") for table in tables]
    roots = np.array([fit.size(0.8) for fit in fits])
    assert abs(roots[:, 0].std() / roots[:, 1].mean() - 1) < 0.15  # 400 values: 3.5 %, four times that
    assert _curve(pd.DataFrame({"m": [10, 20], "power": [0.0, 0.0], "replicates": 50}), "m") is None


def test_wilson_intervals():
    # Wilson (1927) for 0 of 10: 0 to z^2 / (n + z^2).
    z = stats.norm.ppf(0.975)
    found = _share(0, 10, 0.95)
    assert found["lower"] == pytest.approx(0, abs=1e-12)
    assert found["upper"] == pytest.approx(z**2 / (10 + z**2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mj.power(trial(12), TRIAL, "dose", replicates=2, progress=False), "no fixed effect 'dose'.*treated"),
        (lambda: mj.power(trial(12), TRIAL, "lrt", replicates=2, progress=False), "compares two models"),
        (lambda: mj.power(trial(12), TRIAL, "treated", alpha=5, progress=False), "alpha"),
        (lambda: mj.power_curve(trial, TRIAL, "treated", {"clusters": []}), "is empty"),
        (lambda: mj.power_curve(trial, TRIAL, "treated", {"clusters": [0, 4]}), "1 or more"),
        (lambda: mj.power_curve(trial, TRIAL, "treated", {"clusters": [4]}, target=0.01), "target must lie"),
        (lambda: mj.power_curve(trial, TRIAL, "treated", [4, 5]), "one name with its sizes"),
        (lambda: mj.power_curve(trial, TRIAL, "treated", {"clusters": "45"}), "must be a list of sizes"),
        (lambda: mj.power_curve(trial, TRIAL, "treated", {"clusters": [45, 60, 45]}), "has 45 twice"),
        (
            lambda: mj.power_curve(trial, TRIAL, "treated", {"clusters": [4.0]}),
            "must be an integer, 1 or more, got 4.0",
        ),
        (
            lambda: mj.power_curve(trial, TRIAL, "treated", {"clusters": [True]}),
            "must be an integer, 1 or more, got True",
        ),
        (lambda: mj.power_curve(trial, TRIAL, "treated", {"clusters": [10**400]}), "must be 4294967296 or less"),
        (lambda: mj.power_curve(trial, TRIAL, "treated", {"clusters": range(10**11)}), "has more than 100000 values"),
        (lambda: mj.power_curve(trial, TRIAL, "treated", {"clusters": [4]}, grid={"a": [1]}), "takes no grid: over="),
        (lambda: mj.power_curve(trial, TRIAL, "treated", {"cluster": [4, 6]}), "does not take the grid's"),
        (lambda: mj.power_curve(lambda **_: trial(8), TRIAL, "treated", {"n": [4, 6]}), "data do not depend on 'n'"),
        (
            lambda: mj.power_curve(lambda power: trial(8), TRIAL, "treated", {"power": [4]}),
            "'power' is that of a column",
        ),
        (lambda: mj.power(lambda lower: trial(8), TRIAL, "treated", {"lower": [4]}), "'lower' is that of a column"),
        (lambda: mj.power(trial(12), TRIAL, "treated", compared=[("a", "b")]), "power takes no compared"),
        (lambda: mj.power(trial(12), TRIAL, "treated", replicates=10**400), r"4294967296 or less, got 10\^400"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# --- what is tested --------------------------------------------------------------------------------------------------


def arms(clusters=12):
    data = trial(clusters).table.assign(arm=lambda d: np.array(list("abc"))[d["cluster"] % 3])
    return mj.scenario("y ~ arm + (1 | cluster)", data, beta=[0.0, 1.0, 1.0], sd=1.0)


def drawn():
    made = {"cluster": mj.factor(12, balance="blocks"), "treated": mj.bernoulli(0.5)}
    return mj.population(**made, y=mj.response("treated", error_scale=1)).rows(60, x="new")


@pytest.mark.parametrize(
    ("source", "model", "test", "message"),
    [
        (lambda: arms(), "y ~ arm + (1 | cluster)", "arm", r"'arm' is a factor.*arm\[T.b\], arm\[T.c\].*test='lrt'"),
        (lambda: arms(), "y ~ C(arm, contr.sum) + (1 | cluster)", "arm", "'arm' is a factor"),
        (lambda: arms(), "y ~ treated * arm + (1 | cluster)", "treated:arm", "'treated:arm' is a factor"),
        (lambda: arms(), "y ~ arm + (1 | cluster)", "ar", "no fixed effect 'ar' to test; there are Intercept, arm"),
        (lambda: arms(), {"a": TRIAL, "b": "y ~ arm + (1 | cluster)"}, "treated", "no fixed effect 'treated'"),
        (drawn, TRIAL, "dose", "no fixed effect 'dose' to test; there are Intercept, treated"),
    ],
)
def test_what_cannot_be_tested_is_said_before_simulating(source, model, test, message, monkeypatch):
    def simulated(*_):
        raise AssertionError("simulated before the name was looked at")

    monkeypatch.setattr("mixjax.studies.study.outcomes", simulated)
    with pytest.raises(mj.DataError, match=message):
        mj.power(source(), model, test, progress=False)
    with pytest.raises(mj.DataError, match=message):
        mj.power(lambda size: source(), model, test, {"size": [1]}, progress=False)


def test_power_from_pilot_data():
    pilot = trial(16)
    fit = mj.lmm(TRIAL, pilot.table.assign(y=pilot.simulate(2, 1)[0]))
    found = mj.power(fit, TRIAL, "treated", replicates=400, key=1, progress=False)
    same = mj.power(scenario_of(fit), TRIAL, "treated", replicates=400, key=1, progress=False)
    pd.testing.assert_frame_equal(found.table, same.table)
    # The estimates in the place of the truth, and from there the closed form.
    sd, sigma, effect = np.sqrt(fit.Sigma["cluster"][0, 0]), fit.sigma, fit.fixef["treated"]
    curve = mj.power_curve(
        lambda clusters: scenario_of(fit).on(trial(clusters).table), TRIAL, "treated", {"clusters": [16, 32]},
        replicates=4_000, key=1, progress=False,
    )  # fmt: skip
    for row in curve.table.itertuples():
        ncp = effect / np.sqrt(4 * (sd**2 + sigma**2 / 5) / row.clusters)
        t = stats.t.ppf(0.975, row.clusters - 2)
        expected = stats.nct.sf(t, row.clusters - 2, ncp) + stats.nct.cdf(-t, row.clusters - 2, ncp)
        assert abs(row.power - expected) < 4 * np.sqrt(expected * (1 - expected) / 4_000) + row.singular / 4_000


# --- classic checks --------------------------------------------------------------------------------------------------


def one_way(groups, rows, tau):
    data = pd.DataFrame({"g": np.repeat(np.arange(groups), rows)})
    return mj.scenario("y ~ 1 + (1 | g)", data, beta=[3.0], sd=tau, sigma=1.0)


def variances(est):
    return {"tau2": est.Sigma[0][0, 0], "sigma2": est.sigma**2}


def means(groups, rows, tau, reml, n=20_000):
    study = mj.study(
        one_way(groups, rows, tau), "y ~ 1 + (1 | g)", None, n, 4, reml=reml, ddf="wald", statistic=variances,
        progress=False,
    )  # fmt: skip
    frame = study.to_frame("mean").set_index("term")
    return frame.loc["tau2"], frame.loc["sigma2"], int(study.counts["singular"].iloc[0])


def test_reml_is_unbiased_and_ml_is_not_where_zeros_do_not_occur():
    m, rows, tau = 20, 10, 2.0
    tau2, sigma2, singular = means(m, rows, tau, True)
    assert singular == 0
    assert abs(tau2["value"] - tau**2) < 4 * tau2["mcse"]
    assert abs(sigma2["value"] - 1) < 4 * sigma2["mcse"]
    tau2, sigma2, singular = means(m, rows, tau, False)
    assert singular == 0
    # ML divides the sum of squares between groups by m, not m - 1.
    assert abs(tau2["value"] - (tau**2 - (tau**2 + 1 / rows) / m)) < 4 * tau2["mcse"]
    assert abs(sigma2["value"] - 1) < 4 * sigma2["mcse"]


@pytest.mark.parametrize("reml", [True, False], ids=["REML", "ML"])
def test_truncation_at_zero_biases_small_designs_as_the_closed_form_says(reml):
    """``tau^2 = max(0, SSB / d - MSW) / rows``, ``d = m - 1`` (REML) or m (ML), with independent chi-squares."""
    m, rows, tau = 5, 3, 0.5
    p, q = m - 1, m * (rows - 1)
    between, d = 1 + rows * tau**2, (m - 1 if reml else m)
    a, b = between / d, 1 / q  # SSB / d = a chi2_p, MSW = b chi2_q
    first = a * p * stats.f.sf(b * q / (a * (p + 2)), p + 2, q)
    second = b * q * stats.f.sf(b * (q + 2) / (a * p), p, q + 2)
    expected = (first - second) / rows
    tau2, _, singular = means(m, rows, tau, reml)
    zero = stats.f.cdf(b * q / (a * p), p, q)
    assert abs(singular / 20_000 - zero) < 4 * np.sqrt(zero * (1 - zero) / 20_000)
    assert abs(tau2["value"] - expected) < 4 * tau2["mcse"]
    if reml:
        assert tau2["value"] > tau**2 + 4 * tau2["mcse"]  # biased, though REML
