"""Scenarios, studies and power of generalised linear mixed models."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from glmm_cases import fit_of

import mixjax as mj
from mixjax.optimise.results import Result
from mixjax.studies.scenario import design_of

FORMULA = "y ~ x + (1 | g)"


def layout(groups, rows=8):
    return pd.DataFrame({"g": np.repeat(np.arange(groups), rows), "x": np.tile(np.linspace(-1, 1, rows), groups)})


@pytest.fixture(scope="module")
def truth():
    return mj.scenario(FORMULA, layout(25), beta=[-0.5, 0.8], sd=1.0, family="binomial")


@pytest.fixture(scope="module")
def studied(truth):
    models = {"small": "y ~ 1 + (1 | g)", "large": FORMULA}
    return mj.study(truth, models, compared=[("small", "large")], replicates=60, key=2, progress=False)


def test_a_scenario_says_what_it_is(truth):
    assert truth.truth == {"Intercept": -0.5, "x": 0.8, "sd_Intercept|g": 1.0}
    assert "binomial (logit), 200 rows; 25 g" in repr(truth)
    assert truth.family.name == "binomial"
    with pytest.raises(AttributeError, match="a binomial response has no sigma"):
        _ = truth.sigma
    Y = truth.simulate(key=1, n=2000)
    assert set(np.unique(Y)) == {0.0, 1.0}
    mean = truth.family.integrated_mean(-0.5 + 0.8 * truth.table["x"].to_numpy(), 1.0)
    assert np.abs(Y.mean(0) - mean).max() < 5 * 0.5 / np.sqrt(2000)


def test_replicates_are_the_fits_of_their_responses(truth, studied):
    raw = studied.raw(0)
    Y = truth.tables(studied_key(truth), 0, 3)[1]
    for i in range(3):
        fit = mj.glmm(FORMULA, truth.table.assign(y=Y[i]), "binomial")
        small = mj.glmm("y ~ 1 + (1 | g)", truth.table.assign(y=Y[i]), "binomial")
        assert raw["large::x"][i] == pytest.approx(fit.fixef["x"], abs=1e-6)
        assert raw["large::se(x)"][i] == pytest.approx(fit.se["x"], rel=1e-5)
        assert raw["large::sd_Intercept|g"][i] == pytest.approx(fit.theta[0], abs=1e-5)
        assert raw["lrt(large|small)"][i] == pytest.approx(small.criterion - fit.criterion, abs=1e-7)
    assert np.isinf(raw["large::df(x)"]).all()
    assert studied.counts["converged"].tolist() == [60, 60]


def studied_key(truth, key=2):
    """The key of the only cell of a study."""
    from mixjax.studies.study import _cells
    from mixjax.studies.task import Task

    return _cells(truth, FORMULA, None, key, None, (), False, Task(None, {}, None))[0][0].task.key


def test_measures_know_the_truth(studied):
    frame = studied.to_frame(("bias", "coverage", "rejection")).set_index(["model", "term", "measure"])["value"]
    assert abs(frame["large", "x", "bias"]) < 0.2
    assert frame["large", "x", "coverage"] > 0.85
    assert frame["", "large|small", "rejection"] == pytest.approx(frame["large", "x", "rejection"], abs=0.1)


def test_chunks_do_not_change_a_number(truth):
    from mixjax.studies.outcomes import outcomes
    from mixjax.studies.task import Task

    task = Task(truth, {"": FORMULA}, np.array([0, 5], np.uint32), fits=1030)
    whole, part = outcomes(task, 0, 40), outcomes(task, 0, 16)
    for name, values in part.items():
        np.testing.assert_allclose(values, whole[name][:16], rtol=1e-9, atol=1e-12, err_msg=name)


def test_power_counts_separated_replicates_apart():
    rare = mj.scenario(FORMULA, layout(8, 4), beta=[-4.0, 0.5], sd=0.5, family="binomial")
    found = mj.power(rare, FORMULA, "x", replicates=60, key=1, progress=False)
    codes = found.study.raw(0)["result"]
    endless = np.isin(codes, [int(Result.SEPARATED), int(Result.UNBOUNDED)]).sum()
    assert endless > 10
    assert found.table["separated"].iloc[0] == endless
    assert found.table["replicates"].iloc[0] == 60 - found.table["failed"].iloc[0]
    assert f"({endless} because some estimate is infinite)" in str(found)


def test_populations_are_fitted_by_a_family():
    population = mj.population(
        g=mj.factor(15), x=mj.normal(), a=mj.random_effects("g", sd=0.5), y=mj.response("0.5 * x + a", family="poisson")
    )
    study = mj.study(population.rows(90), FORMULA, family="poisson", truth={"x": 0.5}, replicates=20, progress=False)
    raw = study.raw(0)
    assert abs(raw["x"].mean() - 0.5) < 0.15
    assert "sigma" not in raw


def test_a_fit_is_a_scenario_on_its_own_table():
    fit = fit_of("cbpp")
    again = mj.scenario_of(fit)
    assert again.truth["sd_Intercept|herd"] == pytest.approx(fit.theta[0])
    assert np.array_equal(again.design.size, fit.design.size)
    assert np.array_equal(again.simulate(3, 5), fit.simulate(3, 5))
    counts = fit_of("epil_nbinom2")
    own = mj.scenario_of(counts)
    assert own.dispersion["size"] == pytest.approx(counts.dispersion["size"])
    assert np.array_equal(own.simulate(3, 5), counts.simulate(3, 5))


def test_parameters_are_changed_by_name():
    truth = mj.scenario(FORMULA, layout(6), beta=[1, 0.3], sd=0.5, family="nbinom", dispersion={"size": 2.0})
    assert truth.with_variances({"size": 5.0, "sd_Intercept|g": 0.1}).truth["size"] == 5.0
    assert truth.with_effects({"x": 0.0}).truth["x"] == 0.0
    assert truth.on(layout(9)).nobs == 72
    with pytest.raises(ValueError, match="size of the nbinom family must be a positive number"):
        truth.with_variances({"size": 0.0})


def test_trials_are_a_number_or_a_column():
    table = layout(6).assign(n=5)
    one = mj.scenario(FORMULA, table, beta=[0, 1], sd=1, family="binomial", size=5)
    other = mj.scenario(FORMULA, table, beta=[0, 1], sd=1, family="binomial", size="n")
    assert np.array_equal(one.simulate(1, 4), other.simulate(1, 4))
    assert one.simulate(1, 50).max() > 1
    assert other.on(layout(3).assign(n=2)).design.size.tolist() == [2.0] * 24
    given = mj.simulate(FORMULA, table, beta=[0, 1], sd=1, family="binomial", size=5, key=1, n=4)
    assert np.array_equal(given, one.simulate(1, 4))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"family": "binomial", "sigma": 1.0}, "sigma belongs to linear mixed models"),
        ({"size": 3}, "size belong to a family"),
        ({"family": "nbinom"}, "dispersion= is needed: size of the nbinom family"),
        ({"family": "nbinom", "dispersion": -1}, "size of the nbinom family must be a positive number"),
        ({"family": "nbinom", "dispersion": {"shape": 1}}, "dispersion must name size"),
        ({"family": "nbinom", "dispersion": [1, 2]}, "dispersion has 2 numbers"),
        ({"family": "poisson", "dispersion": 1.0}, "the poisson family has no parameter of its own"),
        ({"family": "poisson", "size": 3}, "size= are numbers of trials"),
    ],
)
def test_what_a_scenario_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        mj.scenario(FORMULA, layout(4), beta=[1, 0.3], sd=0.5, **arguments)


def test_what_a_study_cannot_do(truth):
    with pytest.raises(ValueError, match="ddf='kenward-roger' is for linear models"):
        mj.study(truth, FORMULA, ddf="kenward-roger", replicates=2, progress=False)
    with pytest.raises(ValueError, match="belong to a family"):
        mj.study(truth, FORMULA, size=3, replicates=2, progress=False)


def test_a_predictor_with_the_name_of_a_parameter_is_named():
    linear = mj.scenario("y ~ sigma + (1 | g)", layout(6).rename(columns={"x": "sigma"}), beta=[0, 1], sd=1)
    with pytest.raises(mj.DataError, match="the fixed effect sigma has the name of another parameter"):
        mj.study(linear, "y ~ sigma + (1 | g)", replicates=2, progress=False)


def test_designs_without_a_response_are_of_the_family():
    from mixjax.families import family_of

    for family, size in [("binomial", None), ("binomial", 4), ("gamma", None), ("beta", None), ("nbinom", None)]:
        design, labels = design_of("s / n ~ x + (1 | g)", layout(5), family=family_of(family), size=size)
        assert labels.response == "s / n"
        assert (design.size is None) == (size is None)


def test_replicates_by_quadrature():
    truth = mj.scenario(FORMULA, layout(12, 3), beta=[0.0, 1.0], sd=1.5, family="binomial")
    study = mj.study(truth, FORMULA, replicates=6, key=2, nagq=7, progress=False)
    Y = truth.tables(studied_key(truth), 0, 2)[1]
    fit = mj.glmm(FORMULA, truth.table.assign(y=Y[1]), "binomial", nagq=7)
    assert study.raw(0)["x"][1] == pytest.approx(fit.fixef["x"], abs=1e-5)
    assert study.raw(0)["sd_Intercept|g"][1] == pytest.approx(fit.theta[0], abs=1e-5)
    linear = mj.scenario(FORMULA, layout(6), beta=[0, 1], sd=1)
    with pytest.raises(ValueError, match=r"nagq=3 is for generalised models"):
        mj.study(linear, FORMULA, replicates=2, nagq=3, progress=False)


def test_trials_of_a_scenario_hold_for_its_fits():
    table = layout(8).assign(n=6)
    truth = mj.scenario(FORMULA, table, beta=[0.0, 1.0], sd=0.5, family="binomial", size="n")
    own = mj.study(truth, FORMULA, replicates=4, key=1, progress=False).raw(0)
    named = mj.study(truth, FORMULA, replicates=4, key=1, family="binomial", progress=False).raw(0)
    pd.testing.assert_frame_equal(own, named)
    population = mj.population(g=mj.factor(6), x=mj.normal(), y=mj.response("0.2 * x", family="binomial", trials=5))
    with pytest.raises(mj.DataError, match=r"responses go up to .*size= is the number of trials"):
        mj.study(population.rows(30), FORMULA, family="binomial", replicates=3, progress=False)


def test_trials_of_cbind_on_another_table_are_named():
    fit = mj.glmm("cbind(incidence, size - incidence) ~ period + (1 | herd)", mj.datasets.load("cbpp"), "binomial")
    with pytest.raises(mj.DataError, match=r"numbers of trials are known as numbers.*cbind\(successes, failures\)"):
        mj.scenario_of(fit).on(mj.datasets.load("cbpp"))


# --- formulas of the family's parameters ------------------------------------------------------------------------------


def dispersed(groups=30, rows=12):
    """Counts with extra zeros and a size by arm, in a table with columns that only the other formulas read."""
    rng = np.random.default_rng(11)
    n = groups * rows
    table = pd.DataFrame({"g": np.repeat(np.arange(groups), rows), "x": rng.normal(size=n).round(2)})
    table["arm"] = pd.Categorical(np.tile(["b", "a"], n // 2), ["b", "a"])
    table["site"] = np.tile(np.repeat(["u", "v"], rows // 2), groups)
    mu = np.exp(1.2 + 0.3 * table["x"] + 0.4 * rng.normal(size=groups)[table["g"]])
    k = np.where(table["arm"] == "a", 6.0, 1.5)
    table["y"] = rng.negative_binomial(k, k / (k + mu)) * (rng.random(n) > np.where(table["site"] == "u", 0.15, 0.4))
    return table


@pytest.fixture(scope="module")
def inflated():
    return mj.glmm(FORMULA, dispersed(), "nbinom", dispformula="~ arm", ziformula="~ 0 + site")


def test_scenarios_of_fits_with_formulas_of_psi(inflated):
    truth = mj.scenario_of(inflated)
    np.testing.assert_array_equal(truth.simulate(3, 4), inflated.simulate(3, 4))
    names = ["sd_Intercept|g", "disp~Intercept", "disp~arm[T.a]", "zi~site[u]", "zi~site[v]"]
    assert list(truth.truth) == ["Intercept", "x", *names]
    assert list(inflated.vcov_all) == [*names, "Intercept", "x"]
    np.testing.assert_allclose([truth.truth[f"zi~{name}"] for name in inflated.zi.index], inflated.zi)
    assert set(truth.table) == {"g", "x", "arm", "site"}
    coded = mj.glmm(FORMULA, dispersed(), "nbinom", dispformula="~ arm", contrasts={"arm": "sum"})
    np.testing.assert_array_equal(mj.scenario_of(coded).simulate(3, 4), coded.simulate(3, 4))
    # On rows in another order, and twice as many: the same distribution of every row.
    larger = truth.on(pd.concat([truth.table, truth.table.assign(g=truth.table["g"] + 100)]).iloc[::-1])
    assert larger.nobs == 2 * truth.nobs
    drawn = larger.simulate(1, 300).mean(0)[::-1]
    want = np.tile(np.asarray(inflated.predict(random=False, integrate=True)), 2)
    for rows in (np.tile(truth.table["site"] == site, 2) for site in "uv"):
        # Effects of 60 groups are shared: the spread of a mean of groups, over all replicates.
        error = 3 * inflated.theta[0] / np.sqrt(60 * 300)
        np.testing.assert_allclose(drawn[rows].mean(), want[rows].mean(), rtol=4 * error)
    # Other values of the coefficients, which may be negative; numbers of none are refused.
    never = truth.with_variances({"zi~site[u]": -30.0, "zi~site[v]": -30.0, "disp~arm[T.a]": -0.5})
    assert never.truth["disp~arm[T.a]"] == -0.5
    assert (never.simulate(1, 50) == 0).mean() < (truth.simulate(1, 50) == 0).mean() - 0.1
    with pytest.raises(ValueError, match="must be a number"):
        truth.with_variances({"zi~site[u]": np.nan})
    with pytest.raises(mj.DataError, match="site has the categories u, w in the new table"):
        truth.on(truth.table.replace({"site": {"v": "w"}}))
    with pytest.raises(mj.DataError, match="site"):
        truth.on(truth.table.drop(columns="site"))


def test_studies_of_fits_with_formulas_of_psi(inflated):
    """Estimates of the replicates are those of a fit of each."""
    truth = mj.scenario_of(inflated)
    found = mj.study(truth, FORMULA, replicates=12, key=4, progress=False)
    columns = found.raw()
    many = inflated.refit_many(truth.simulate(studied_key(truth, 4), 12))
    np.testing.assert_allclose(columns["x"], many.fixef["x"], rtol=1e-6, atol=1e-7)
    for name in ("disp~arm[T.a]", "zi~site[v]"):
        np.testing.assert_allclose(columns[name], many.sdcor[name], rtol=1e-5, atol=1e-6)
    assert {"se(x)", "p(x)"} <= set(columns)
    # Wald's test of a coefficient, by each fit's own covariance.
    Y = truth.simulate(studied_key(truth, 4), 12)
    for i in (0, 7):
        one = mj.glmm(FORMULA, dispersed().assign(y=Y[i]), "nbinom", dispformula="~ arm", ziformula="~ 0 + site")
        for name in ("disp~arm[T.a]", "zi~site[v]"):
            se = np.sqrt(one.vcov_all.loc[name, name])
            assert columns[f"se({name})"][i] == pytest.approx(se, rel=1e-5)
            p = 2 * scipy.stats.norm.sf(abs(columns[name][i] / columns[f"se({name})"][i]))
            assert columns[f"p({name})"][i] == pytest.approx(p, rel=1e-10)
    # Another family is fitted without the formulas.
    other = mj.study(truth, FORMULA, replicates=4, key=4, family="poisson", progress=False)
    assert not any(name.startswith(("zi", "disp", "size")) for name in other.raw())
    shares = {
        test: float(mj.power(truth, FORMULA, test, replicates=12, key=4, progress=False).to_frame()["power"].iloc[0])
        for test in ("x", "zi~site[v]")
    }
    assert all(shares[test] == (columns[f"p({test})"] < 0.05).mean() for test in shares)
    against = mj.study(truth, FORMULA, null={"zi~site[v]": -1.0}, replicates=4, key=4, progress=False).raw()
    z = (against["zi~site[v]"] + 1.0) / against["se(zi~site[v])"]
    np.testing.assert_allclose(against["p(zi~site[v])"], 2 * scipy.stats.norm.sf(abs(z)), rtol=1e-10)
    with pytest.raises(mj.DataError, match=r"there is no fixed effect 'zi~sight'.*zi~site\[v\]"):
        mj.power(truth, FORMULA, "zi~sight", replicates=4, progress=False)
