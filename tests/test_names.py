"""Names of effects as users type them: mixjax's own and R's."""

import itertools

import numpy as np
import pandas as pd
import pytest
from conftest import fit_of, oracle, table

import mixjax as mj
from mixjax.fitted.names import Spellings, known_names


@pytest.fixture(scope="module")
def cake():
    return mj.lmm("angle ~ recipe * temp + I(temp^2) + (1 | recipe:replicate)", table("cake"))


@pytest.mark.parametrize("name", ["cake_factor", "cake_temp", "sleepstudy_slopes", "machines_slopes", "orthodont"])
def test_every_name_of_lme4_is_understood(name):
    """Each of lme4's names of an oracle fit finds the estimate that lme4 has."""
    fit, reference = fit_of(name, "REML"), oracle(name)["fits"]["REML"]["fixef"]
    known = known_names(fit.labels)
    found = [fit.fixef.iloc[known[own]] for own in reference]
    np.testing.assert_allclose(found, list(reference.values()), rtol=1e-6, atol=1e-8)
    assert sorted(known[own] for own in reference) == list(range(len(fit.fixef)))


def test_other_orders_blanks_and_powers(cake):
    same = ["temp:recipeB", "recipeB:temp", "recipe[T.B]:temp", "temp:recipe[T.B]", "temp : recipe[T.B]"]
    beta = cake.fixef["recipe[T.B]:temp"]
    for name in same:
        assert cake.test(name).iloc[0]["estimate"] == beta
        assert cake.test({name: 1}).iloc[0]["estimate"] == beta
        assert cake.confint(name, method="wald").index.tolist() == ["recipe[T.B]:temp"]
    for name in ("I(temp^2)", "I(temp ** 2)", "I(temp**2)", "I( temp ^ 2 )"):
        assert cake.test(name).iloc[0]["estimate"] == cake.fixef["I(temp ** 2)"]


def test_interactions_of_many_factors_in_any_order():
    known = Spellings(["a[T.x]:b:c[T.True]:d:e"])
    for order in itertools.permutations(["ax", "b", "cTRUE", "d", "e"]):
        assert known[":".join(order)] == 0


def test_columns_of_sums_have_numbers_in_r():
    fit = mj.lmm("angle ~ recipe * temp + (1 | recipe:replicate)", table("cake"), contrasts={"recipe": "sum"})
    known = known_names(fit.labels)
    assert [fit.labels.fixed[known[name]] for name in ("recipe1", "recipe2", "temp:recipe2")] == [
        "recipe[S.A]",
        "recipe[S.B]",
        "recipe[S.B]:temp",
    ]
    # Levels that are called 2 and 3: R's f2 is the column of level 3, and a reader may mean that of level 2.
    assert not {"f1", "f2"} & set(Spellings(["f[S.2]", "f[S.3]"]))
    assert "f1" not in Spellings(["f[S.2]", "f[S.3]"])


def test_what_two_names_could_mean_is_not_understood():
    known = Spellings(["recipeB", "recipe[T.B]", "a[T.bc]", "ab[T.c]", "x:y"], ["z[T.1]", "y:w"])
    assert known["recipeB"] == 0
    assert known["recipe[T.B]"] == 1
    for name in ("abc", "z1", "z[T.1]", "w:y", "y:w", "recipe", "", "x"):
        assert name not in known
    with pytest.raises(KeyError):
        known["abc"]
    assert known["y:x"] == 4


def test_standard_deviations_and_correlations():
    known = Spellings(["sd_Intercept|g:h", "cor_f[T.B].Intercept|g:h", "sd_f[T.B]|g:h", "sigma", "sd_a:b|g:h"])
    spelled = ["sd_(Intercept)|g:h", "cor_fB.(Intercept)|g:h", "sd_fB|g:h", "sigma", "sd_b:a|g:h"]
    assert [known[name] for name in spelled] == list(range(5))
    assert "sd_Intercept|h:g" not in known


def test_studies_read_the_same_names():
    data = table("cake")
    model = "angle ~ recipe + temp + (1 | recipe:replicate)"
    beta = {"(Intercept)": 10, "recipeB": 1, "recipe[T.C]": 2, "temp": 0.1}
    own = mj.scenario(model, data, beta=beta, sd=2)
    np.testing.assert_array_equal(own.beta, [10, 1, 2, 0.1])
    options = {"replicates": 16, "key": 1, "progress": False}
    spelled = mj.study(own, model, truth={"recipeB": 1}, null={"recipeB": 1}, **options)
    named = mj.study(own, model, truth={"recipe[T.B]": 1}, null={"recipe[T.B]": 1}, **options)
    assert spelled.to_frame().equals(named.to_frame())
    with pytest.raises(ValueError, match="null names recipeD"):
        mj.study(own, model, null={"recipeD": 1}, **options)


def test_power_reads_the_same_names():
    data = table("cake")
    model = "angle ~ recipe * temp + (1 | recipe:replicate)"
    truth = mj.scenario(model, data, beta=[10, 1, 1, 0.1, 0, 0], sd=2)
    options = {"replicates": 16, "key": 1, "progress": False}
    spelled, named = (mj.power(truth, model, test, **options).table for test in ("temp:recipeB", "recipe[T.B]:temp"))
    assert spelled.equals(named)
    with pytest.raises(mj.DataError, match="no fixed effect 'temp:recipeD'"):
        mj.power(truth, model, "temp:recipeD", **options)


def test_measures_of_influence_read_the_same_names():
    fit = mj.lmm("angle ~ recipe + temp + (1 | recipe:replicate)", table("cake"))
    found = fit.influence("recipe:replicate", method="fixed-theta")
    pd.testing.assert_frame_equal(found.ranked("dfbetas_recipeB"), found.ranked("dfbetas_recipe[T.B]"))
    pd.testing.assert_frame_equal(found.flagged("dfbetas_(Intercept)", 0.2), found.flagged("dfbetas_Intercept", 0.2))
    assert found.cutoff("dfbetas_recipeC", "size") == found.cutoff("dfbetas_recipe[T.C]", "size")
    with pytest.raises(ValueError, match="there is no measure 'dfbetas_recipeD'"):
        found.ranked("dfbetas_recipeD")


def test_pictures_read_the_same_names():
    pytest.importorskip("matplotlib")
    from mixjax import plots

    fit = mj.lmm("angle ~ recipe + temp + (temp + recipe | replicate)", table("cake"), reml=False)
    draws = fit.bootstrap(key=1, n=20)
    (axes,) = np.atleast_1d(plots.bootstrap(draws, ["recipeB"]))
    assert "recipe[T.B]" in axes.get_xlabel() + axes.get_title()
    with pytest.raises(mj.DataError, match="no parameter 'recipeD'"):
        plots.bootstrap(draws, ["recipeD"])


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spelled", "own"),
    [
        ("Kenward-Roger", "kenward-roger"),
        ("KR", "kenward-roger"),
        ("kenward_roger", "kenward-roger"),
        ("Satterthwaite", "satterthwaite"),
        ("Wald", "wald"),
    ],
)
def test_degrees_of_freedom_as_r_calls_them(cake, spelled, own):
    asked = [
        lambda ddf: cake.test("recipeB", ddf=ddf),
        lambda ddf: cake.anova(ddf=ddf),
        lambda ddf: cake.drop1(ddf=ddf),
        lambda ddf: cake.tidy(ddf),
        lambda ddf: cake.summary(ddf).tests,
        lambda ddf: cake.emmeans("recipe", ddf=ddf).to_frame(),
        lambda ddf: cake.emtrends("recipe", "temp", ddf=ddf).to_frame(),
        lambda ddf: cake.confint(method="wald", ddf=ddf),
    ]
    for ask in asked:
        pd.testing.assert_frame_equal(ask(spelled), ask(own))
        with pytest.raises(ValueError, match="ddf must be one of"):
            ask("lme4")


def test_methods_and_types_as_r_calls_them(cake):
    pd.testing.assert_frame_equal(cake.confint("temp", method="Wald"), cake.confint("temp", method="wald"))
    boot = [
        cake.confint("temp", method=m, key=1, n=20, kind=k) for m, k in (("boot", "perc"), ("bootstrap", "percentile"))
    ]
    pd.testing.assert_frame_equal(*boot)
    with pytest.raises(ValueError, match="method must be"):
        cake.confint(method="likelihood")
    for kind in (3, "3", "iii", "III"):
        pd.testing.assert_frame_equal(cake.anova(kind), cake.anova("III"))
    pd.testing.assert_frame_equal(cake.drop1("Chisq"), cake.drop1("lrt"))
