"""Methods, formulas of means, letters, joint tests, effect sizes: by hand, by another way, and what must not matter."""

import itertools
import re

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import fit_of, table

import mixjax as mj
from mixjax.inference.fixed.contrast_methods import METHODS, contrast_weights, orthogonal_polynomials
from mixjax.inference.fixed.letters import letters_of
from mixjax.inference.fixed.specs import read_spec

NUMBERS = ["estimate", "std_error", "df", "lower", "upper", "statistic", "p_value"]
FORMULA = "angle ~ recipe * temperature + (1 | recipe:replicate)"


@pytest.fixture(scope="module")
def cake():
    return fit_of("cake_factor", "REML")


@pytest.fixture(scope="module")
def uneven():
    """Degrees of freedom that differ."""
    return mj.lmm(FORMULA, rows())


def rows():
    return table("cake").drop(index=[0, 7, 19, 40, 41, 100, 101, 102])


# --- methods -------------------------------------------------------------------------------------------------------


def test_weights_of_every_method_by_hand():
    names = list("abcd")
    found = {method: contrast_weights(method, names) for method in METHODS}
    assert {name: list(w) for name, w in found["mean_chg"].items()} == {
        "a|b": [-1, 1 / 3, 1 / 3, 1 / 3], "b|c": [-0.5, -0.5, 0.5, 0.5], "c|d": [-1 / 3, -1 / 3, -1 / 3, 1]
    }  # fmt: skip
    assert list(found["del.eff"]["b effect"]) == pytest.approx([-1 / 3, 1, -1 / 3, -1 / 3])
    assert list(found["eff"]["b effect"]) == [-0.25, 0.75, -0.25, -0.25]
    assert list(found["trt.vs.ctrl"]) == list(found["trt.vs.ctrl1"]) == ["b - a", "c - a", "d - a"]
    assert list(found["trt.vs.ctrlk"]) == ["a - d", "b - d", "c - d"]
    assert list(found["consec"]) == ["b - a", "c - b", "d - c"]
    assert list(found["revpairwise"]) == ["b - a", "c - a", "c - b", "d - a", "d - b", "d - c"]
    for method, contrasts in found.items():
        for name, w in contrasts.items():
            assert abs(w.sum()) < 1e-12, (method, name)
    assert list(contrast_weights("trt.vs.ctrl", names, "c")) == ["a - c", "b - c", "d - c"]
    assert list(contrast_weights("trt.vs.ctrl", names, -1)) == list(found["trt.vs.ctrlk"])
    assert list(contrast_weights("trt.vs.ctrl", names, 1)) == ["a - b", "c - b", "d - b"]
    assert list(contrast_weights("Dunnett", names)) == list(found["trt.vs.ctrl"])
    assert list(contrast_weights("Tukey", names)) == list(found["pairwise"])
    assert all(contrast_weights(method, ["a"]) == {} for method in METHODS)


def test_polynomials_are_orthogonal_and_the_smallest_integers():
    assert [list(w) for w in orthogonal_polynomials(5)] == [
        [-2, -1, 0, 1, 2], [2, -1, -2, -1, 2], [-1, 2, 0, -2, 1], [1, -4, 6, -4, 1]
    ]  # fmt: skip
    assert list(orthogonal_polynomials(7)[2]) == [-1, 1, 1, 0, -1, -1, 1]  # Fisher & Yates, table XXIII
    assert list(orthogonal_polynomials(10)[3]) == [18, -22, -17, 3, 18, 18, 3, -17, -22, 18]
    for k in range(2, 30):
        P = np.array(orthogonal_polynomials(k))
        assert P.shape == (min(6, k - 1), k)
        assert (np.round(P) == P).all()
        assert (np.gcd.reduce(P.astype(np.int64), axis=1) == 1).all()
        G = P @ P.T
        np.testing.assert_array_equal(G - np.diag(np.diag(G)), 0.0)
        for degree, w in enumerate(P, start=1):  # no polynomial of lower degree has anything of it
            assert not any(w @ np.arange(k) ** lower for lower in range(degree))
        assert (P[:, -1] > 0).all()


def test_a_dict_an_array_and_a_data_frame_say_the_same(cake):
    means = cake.emmeans("recipe")
    W = np.array([[1, -0.5, -0.5], [0, 1, -1]])
    by_dict = means.contrasts({"A against the rest": W[0], "B - C": W[1]})
    by_array = means.contrasts(W)
    frame = pd.DataFrame(W[:, [2, 0, 1]], index=["A against the rest", "B - C"], columns=["C", "A", "B"])
    assert list(by_array["contrast"]) == ["A - 0.5*B - 0.5*C", "B - C"]
    pd.testing.assert_frame_equal(pd.DataFrame(means.contrasts(frame)), pd.DataFrame(by_dict))
    pd.testing.assert_frame_equal(by_array[NUMBERS], by_dict[NUMBERS])
    assert list(means.contrasts([[1, -1, 0], [1, -1, 0]])["contrast"]) == ["A - B (0)", "A - B (1)"]


def test_rs_spellings(cake):
    means = cake.emmeans("recipe")
    for ours, theirs in (("tukey", "Tukey"), ("fdr", "BH"), ("mvt", "single-step"), ("dunnett", "dunnettx")):
        pd.testing.assert_frame_equal(means.contrasts(adjust=ours), means.contrasts(adjust=theirs))
    pd.testing.assert_frame_equal(means.contrasts("trt.vs.ctrl"), means.contrasts("Trt.vs.Ctrl1"))


def test_reversed_differences_are_the_same_with_other_signs(uneven):
    means = uneven.emmeans("temperature")
    forward, back = means.contrasts().set_index("contrast"), means.contrasts("revpairwise").set_index("contrast")
    back.index = [" - ".join(reversed(name.split(" - "))) for name in back.index]
    back = back.loc[forward.index]
    np.testing.assert_allclose(back["estimate"], -forward["estimate"], rtol=1e-12)
    np.testing.assert_allclose(back["lower"], -forward["upper"], rtol=1e-9)
    np.testing.assert_allclose(back["p_value"], forward["p_value"], rtol=1e-9)


def test_interactions_are_differences_of_differences(cake):
    cells = cake.emmeans("recipe * temperature")
    m = cells.to_frame().set_index(["recipe", "temperature"])["estimate"]
    found = cells.contrasts("trt.vs.ctrl", interaction=True, ref={"recipe": "C"})
    assert list(found.columns[:2]) == ["recipe_trt.vs.ctrl", "temperature_trt.vs.ctrl"]
    assert list(found.iloc[0, :2]) == ["A - C", "185 - 175"]
    by_hand = m["A", "185"] - m["A", "175"] - m["C", "185"] + m["C", "175"]
    assert found["estimate"][0] == pytest.approx(by_hand, rel=1e-9)
    lines = cells.contrasts(interaction={"temperature": "poly", "recipe": "consec"})
    assert list(lines.columns[:2]) == ["recipe_consec", "temperature_poly"]
    slope = np.array(orthogonal_polynomials(6)[0])
    assert lines["estimate"][0] == pytest.approx(slope @ (m["B"] - m["A"]).to_numpy(), rel=1e-9)
    within = cake.emmeans("recipe * temperature").contrasts(interaction="pairwise", adjust="mvt")
    assert "mvt (multivariate t) for 45 tests, error of p values about" in within.attrs["notes"][0]


# --- formulas of means ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("a", (["a"], [])),
        ("~ a", (["a"], [])),
        ("a |b", (["a"], ["b"])),
        ("a|b", (["a|b"], [])),  # the name of a variable
        ("~ a * c | b", (["a", "c"], ["b"])),
        ("a + c | b + d", (["a", "c"], ["b", "d"])),
        ("a:c", (["a", "c"], [])),
        ("~1|b", ([], ["b"])),
        ("1", ([], [])),
        ("x*y", (["x*y"], [])),
        ("`x*y` | `a|b`", (["x*y"], ["a|b"])),
        (["a", "c"], (["a", "c"], [])),
    ],
)
def test_formulas_of_means(spec, expected):
    assert read_spec(spec, None, ["a", "b", "c", "d", "x*y", "a|b"]) == expected


@pytest.mark.parametrize(
    ("spec", "by", "message"),
    [
        ("a | b", "b", "use one of them"),
        ("pairwise ~ a", None, r"\.contrasts\('pairwise'\)"),
        ("a | b | c", None, "more than one"),
        ("~ a ~ b", None, "more than one"),
        ("a +", None, "must name different variables"),
        ("a * a", None, "must name different variables"),
        ("1 + a", None, "must name different variables"),
        ("`a", None, "not closed"),
        ("", None, "spec must be"),
    ],
)
def test_formulas_that_cannot_be_read(spec, by, message):
    with pytest.raises(ValueError, match=message):
        read_spec(spec, by, ["a", "b"])


def test_formulas_are_lists_and_by(cake):
    one, other = cake.emmeans("~ recipe | temperature"), cake.emmeans("recipe", by="temperature")
    pd.testing.assert_frame_equal(one.to_frame(), other.to_frame())
    assert one.title == other.title
    pd.testing.assert_frame_equal(
        cake.emmeans("temperature + recipe").to_frame(), cake.emmeans(["temperature", "recipe"]).to_frame()
    )


# --- cautions ------------------------------------------------------------------------------------------------------


def test_averages_over_an_interaction_say_so(cake):
    about = "recipe is in an interaction with temperature, over which these are averages"
    assert any(note.startswith(about) for note in cake.emmeans("recipe").to_frame().attrs["notes"])
    assert any(note.startswith(about) for note in cake.emmeans("recipe").contrasts().attrs["notes"])
    assert about in str(cake.emmeans("recipe"))
    additive = mj.lmm("angle ~ recipe + temperature + (1 | recipe:replicate)", table("cake"))
    for means in (cake.emmeans("recipe | temperature"), additive.emmeans("recipe"), cake.emmeans("1")):
        assert not means.cautions
    sexes = fit_of("orthodont", "REML")
    assert sexes.emtrends("1", "age").cautions
    assert not sexes.emtrends("Sex", "age").cautions
    assert not sexes.emmeans("Sex").cautions  # at one age, which the title says


# --- letters -------------------------------------------------------------------------------------------------------


def test_letters_say_what_differs():
    """Two share a letter if and only if they do not differ; and no letter lies within another: random relations."""
    rng = np.random.default_rng(0)
    for k in (1, 2, 5, 8):
        for share in (0.0, 0.3, 0.7, 1.0):
            upper = np.triu(rng.random((k, k)) < share, 1)
            groups = letters_of(upper | upper.T)
            for i, j in itertools.combinations(range(k), 2):
                assert bool(set(groups[i]) & set(groups[j])) != upper[i, j]
            members = {letter: {i for i in range(k) if letter in groups[i]} for letter in set("".join(groups))}
            assert not any(a < b for a, b in itertools.permutations(members.values(), 2))
    assert letters_of(np.zeros((0, 0), bool)) == []
    everything = letters_of(~np.eye(60, dtype=bool))
    assert len(set(everything)) == 60


def test_letters_of_means(cake):
    means = cake.emmeans("temperature")
    found = means.letters()
    assert found["estimate"].is_monotonic_increasing
    p = means.contrasts().set_index("contrast")["p_value"]
    group = found.set_index(found["temperature"].astype(str))["group"]
    for name, value in p.items():
        a, b = name.split(" - ")
        assert bool(set(group[a]) & set(group[b])) == (value >= 0.05)
    other = means.letters(descending=True)
    assert list(other["temperature"]) == list(found["temperature"])[::-1]
    assert other["group"].iloc[0] == "a"
    strict = means.letters(alpha=1e-12, adjust="none")
    assert "not significantly different at 1e-12, p values not adjusted" in strict.attrs["notes"][1]
    within = cake.emmeans("temperature | recipe").letters()
    assert list(within["recipe"]) == ["A"] * 6 + ["B"] * 6 + ["C"] * 6
    assert all(part["group"].iloc[0].startswith("a") for _, part in within.groupby("recipe", observed=True))


# --- joint tests ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ddf", ["satterthwaite", "kenward-roger", "wald"])
def test_joint_tests_of_filled_cells_are_type_three(uneven, ddf):
    found = uneven.joint_tests(ddf=ddf).set_index("term")
    expected = uneven.anova("III", ddf)
    assert list(found.index) == list(expected.index)
    # F is that of anova after Kenward-Roger's scaling, which anova does not show.
    np.testing.assert_allclose(found[["den_df", "p_value"]], expected[["den_df", "p_value"]], rtol=1e-7)
    if ddf != "kenward-roger":
        np.testing.assert_allclose(found["statistic"], expected["statistic"], rtol=1e-8)


def test_joint_tests_within_a_factor_are_those_of_its_means(uneven):
    found = uneven.joint_tests(by="recipe")
    assert list(found["recipe"]) == ["A", "B", "C"]
    assert list(found["term"]) == ["temperature"] * 3
    means = uneven.emmeans("temperature | recipe")
    rows_of_b = means.contrast_rows("trt.vs.ctrl")
    L = rows_of_b.weights[rows_of_b.family == 1] @ means.W
    expected = uneven.test(L, joint=True)
    np.testing.assert_allclose(found.loc[1, ["den_df", "statistic", "p_value"]].astype(float),
                               expected[["den_df", "statistic", "p_value"]].iloc[0], rtol=1e-9)  # fmt: skip


def test_joint_tests_of_a_covariate_are_of_its_slope():
    fit = fit_of("orthodont", "REML")
    found = fit.joint_tests().set_index("term")
    slope = fit.emtrends("1", "age").contrasts({"slope": [1.0]})
    np.testing.assert_allclose(found.loc["age", "statistic"], slope["statistic"][0] ** 2, rtol=1e-8)
    np.testing.assert_allclose(found.loc["age", "den_df"], slope["df"][0], rtol=1e-7)
    both = fit.emtrends("Sex", "age").contrasts()
    np.testing.assert_allclose(found.loc["age:Sex", "p_value"], both["p_value"][0], rtol=1e-6)
    assert list(fit.joint_tests("Sex")["term"]) == ["age", "age"]
    by_hand = [fit.emtrends("Sex", "age").to_frame().eval("(estimate / std_error)**2")]
    np.testing.assert_allclose(fit.joint_tests("Sex")["statistic"], by_hand[0], rtol=1e-8)


@pytest.mark.filterwarnings("ignore::mixjax.checks.InferenceWarning")
def test_joint_tests_of_an_ml_fit_by_kenward_roger(uneven):
    ml = uneven.refit(reml=False)
    found, expected = ml.joint_tests(ddf="kenward-roger"), uneven.joint_tests(ddf="kenward-roger")
    np.testing.assert_allclose(found["statistic"], expected["statistic"], rtol=1e-5)


# --- effect sizes --------------------------------------------------------------------------------------------------


def test_effect_sizes_are_contrasts_over_sigma(uneven):
    means = uneven.emmeans("recipe")
    plain, own = means.contrasts(adjust="none"), means.eff_size()
    d = plain["estimate"] / uneven.sigma
    np.testing.assert_allclose(own["estimate"], d, rtol=1e-12)
    sd = uneven.variance_parameters().loc["sigma"]
    # The delta method on both, independent of each other.
    se = np.hypot(plain["std_error"] / uneven.sigma, d * sd["std_error"] / sd["estimate"])
    np.testing.assert_allclose(own["std_error"], se, rtol=1e-7)
    known = means.eff_size(sigma=2.0)
    np.testing.assert_allclose(known["std_error"], plain["std_error"] / 2.0, rtol=1e-12)
    assert "the residual standard deviation of the fit, with" in own.attrs["notes"][0]
    assert "in units of sigma = 2, as given, taken as known" in known.attrs["notes"][0]
    assert list(own.columns) == ["contrast", "estimate", "std_error", "df", "lower", "upper"]


def test_sigma_of_a_balanced_table_has_the_strata_degrees_of_freedom(cake):
    assert "with 210 degrees of freedom" in cake.emmeans("recipe").eff_size().attrs["notes"][0]


# --- written hypotheses --------------------------------------------------------------------------------------------


def test_hypotheses_are_adjusted_together(uneven):
    spec = ["recipe[T.B]", "recipe[T.C]", "recipe[T.B] = recipe[T.C]"]
    plain, found = uneven.test(spec, joint=False), uneven.test(spec, adjust="mvt", level=0.9)
    assert list(found.columns) == NUMBERS
    np.testing.assert_array_equal(found["estimate"], plain["estimate"])
    assert (found["p_value"] > plain["p_value"]).all()
    assert "p values and 90 % intervals adjusted by mvt (multivariate t) for 3 tests" in repr(found)
    half = scipy.stats.t.ppf(0.975, plain["df"]) * plain["std_error"]
    np.testing.assert_allclose(plain["upper"], plain["estimate"] + half, rtol=1e-9)
    # The third is spanned by the others: rank 2.
    assert "scheffe with rank 2" in repr(uneven.test(spec, adjust="Scheffe"))
    moved = uneven.test("temperature[T.185] = 2", level=0.8)
    half = scipy.stats.t.ppf(0.9, moved["df"]) * moved["std_error"]
    np.testing.assert_allclose(moved["lower"], moved["estimate"] - half, rtol=1e-9)
    np.testing.assert_allclose(moved["statistic"], (moved["estimate"] - 2) / moved["std_error"], rtol=1e-12)


# --- what must not matter ------------------------------------------------------------------------------------------


def test_order_of_rows_names_and_scale_do_not_matter(uneven):
    data = rows().sample(frac=1, random_state=3)
    data = data.assign(
        angle=data.angle * 1e3 + 5e4,
        recipe=data.recipe.map({"A": "one", "B": "two", "C": "three"}).astype(
            pd.CategoricalDtype(["one", "two", "three"])
        ),
    )
    other = mj.lmm(FORMULA, data, contrasts={"recipe": "sum", "temperature": "helmert"})
    for spec, method, adjust in (
        ("recipe", "trt.vs.ctrl", None), ("temperature", "consec", "mvt"), ("temperature", "pairwise", "tukey"),
        ("temperature | recipe", "poly", "sidak"), ("recipe | temperature", "eff", "scheffe"),
    ):  # fmt: skip
        a, b = (fit.emmeans(spec).contrasts(method, adjust)[NUMBERS] for fit in (uneven, other))
        # Lattices see the same correlations up to roundings, which may reorder their variables.
        for name in ("estimate", "std_error", "lower", "upper"):
            rough = 1e-4 if adjust == "mvt" and name in ("lower", "upper") else 1e-6
            np.testing.assert_allclose(b[name] / 1e3, a[name], rtol=rough, atol=rough * np.abs(a[name]).max())
        np.testing.assert_allclose(b["p_value"], a["p_value"], rtol=1e-4, atol=2e-4 if adjust == "mvt" else 1e-7)
    assert list(uneven.emmeans("temperature").letters()["group"]) == list(
        other.emmeans("temperature").letters()["group"]
    )
    np.testing.assert_allclose(uneven.joint_tests()["statistic"], other.joint_tests()["statistic"], rtol=1e-6)
    np.testing.assert_allclose(
        uneven.emmeans("recipe").eff_size()["lower"], other.emmeans("recipe").eff_size()["lower"], rtol=1e-5
    )


# --- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m.contrasts("trt.vs.ctrl", ref="D"), "ref='D' is none of the means; there are A, B, C"),
        (lambda m: m.contrasts("trt.vs.ctrl", ref=3), "ref=3: there are 3 means, at positions 0 to 2"),
        (lambda m: m.contrasts("trt.vs.ctrl", ref=1.5), "ref must be the name of a mean or its position"),
        (lambda m: m.contrasts("trt.vs.ctrlk", ref="A"), "says itself which mean is the control"),
        (lambda m: m.contrasts("consec", ref="A"), "method='consec' has none"),
        (lambda m: m.contrasts({"x": [1, -1, 0]}, ref="A"), "weights of your own have none"),
        (lambda m: m.contrasts([1, -1, 0]), "must have weights of shape (r, 3)"),
        (lambda m: m.contrasts([[1, -1], [1]]), "must have weights of shape (r, 3)"),
        (lambda m: m.contrasts([[1, -1, np.nan]]), "needs 3 finite weights"),
        (lambda m: m.contrasts(pd.DataFrame({"c1": [1, -1, 0]})), "its columns must be the means A, B, C"),
        (lambda m: m.contrasts({"x": "abc"}), "'x' needs 3 finite weights"),
        (lambda m: m.contrasts({}), "a dict without a contrast"),
        (lambda m: m.contrasts("pairwise", level=1), "level must be between 0 and 1"),
        (lambda m: m.contrasts("consec", "tukey"), "use 'mvt'"),
        (lambda m: m.contrasts(interaction=True), "two factors or more, and these are of recipe"),
        (lambda m: m.letters(alpha=5), "alpha must be between 0 and 1, such as 0.05, got 5"),
        (lambda m: m.letters(adjust="best"), "adjust must be one of"),
        (lambda m: m.eff_size(sigma=-1), "sigma must be a positive number or None, got -1"),
        (lambda m: m.eff_size(sigma=2, edf=0), "edf must be a positive number or None, got 0"),
    ],
)
def test_bad_input_is_named(cake, call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(cake.emmeans("recipe"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda f: f.emmeans("recipe*temperature").contrasts("eff", interaction="poly"), "use one of them"),
        (
            lambda f: f.emmeans("recipe*temperature").contrasts(interaction=["poly"]),
            "one for each of recipe, temperature",
        ),
        (lambda f: f.emmeans("recipe*temperature").contrasts(interaction={"recipe": "poly"}), "a method for each of"),
        (lambda f: f.emmeans("recipe*temperature").contrasts(interaction=["poly", "odd"]), "method must be one of"),
        (lambda f: f.emmeans("recipe*temperature").contrasts(interaction="poly", ref="A"), "which no factor has here"),
        (lambda f: f.emmeans("temperature").contrasts("trt.vs.ctrl", ref=175), "give the name, ref='175'"),
        (lambda f: f.joint_tests("recpe"), "did you mean 'recipe'"),
        (lambda f: f.joint_tests("angle"), "is the response"),
        (lambda f: f.joint_tests(ddf="kenward"), "ddf must be one of"),
        (lambda f: f.joint_tests(["recipe", "temperature"]), "no fixed effects to test beside recipe, temperature"),
        (lambda f: f.test("recipe[T.B]", adjust="tukey"), "use 'mvt' here"),
        (lambda f: f.test(["recipe[T.B]", "recipe[T.C]"], joint=True, adjust="mvt"), "joint=True is a single F test"),
        (lambda f: f.test("recipe[T.B]", adjust=["mvt"]), "adjust must be one of"),
        (lambda f: f.test("recipe[T.B]", level=0), "level must be between 0 and 1"),
    ],
)
def test_bad_calls_of_a_fit_are_named(cake, call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(cake)


def test_a_number_that_is_a_name_and_a_position_is_refused():
    with pytest.raises(ValueError, match="may be the mean called '1' or the one at position 1"):
        contrast_weights("trt.vs.ctrl", ["0", "1", "2"], 1)
    assert list(contrast_weights("trt.vs.ctrl", ["0", "1", "2"], "1")) == ["0 - 1", "2 - 1"]
