"""Fits side by side: the numbers against the fits and R, which rows there are, and what the notes warn of."""

import json
import re

import glmm_cases
import numpy as np
import pandas as pd
import pytest
from conftest import HERE, fit_of, oracle, r_name, table
from scipy import stats

import mixjax as mj
from mixjax.face.report import _fixed_rows


def cells_of(models):
    """Label -> cells of its row; what stands below a fixed effect as (label, "below")."""
    found, last = {}, ""
    for label, *cells in models.cells.rows:
        found[label or (last, "below")] = cells
        last = label or last
    return found


def decimals(text):
    return len(text.partition(".")[2])


def fit_in(data, formula, **options):
    return mj.lmm(formula, data, **options)


# --- numbers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sleepstudy_slopes", "cake_temp", "penicillin", "machines_slopes"])
@pytest.mark.parametrize("method", ["REML", "ML"])
def test_numbers_against_lme4(name, method):
    """Every number of R's summary, to as many digits as stand in the cell, and unrounded in the frame."""
    reference, models = oracle(name)["fits"][method], mj.table(fit_of(name, method))
    shown, frame = cells_of(models), models.to_frame()["(1)"]

    def agrees(label, expected, row, rtol=1e-5):
        text = shown[label][0].strip("()")
        assert abs(float(text) - expected) <= 0.5 * 10.0 ** -decimals(text) + rtol * abs(expected)
        np.testing.assert_allclose(frame[row], expected, rtol=rtol, atol=1e-5)

    for effect in fit_of(name, method).labels.fixed:
        agrees(effect, reference["fixef"][r_name(effect)], ("fixed", effect, "estimate"))
        agrees((effect, "below"), reference["fixef_se"][r_name(effect)], ("fixed", effect, "std_error"))
    for term, own in zip(reference["varcorr"], fit_of(name, method).labels.terms, strict=True):
        for i, effect in enumerate(own.effects):
            label = f"sd {effect} | {own.group}"
            agrees(label, term["sd"][i], ("random", label, "estimate"), rtol=1e-4)
            for j in range(i + 1, len(own.effects)):
                label = f"cor {effect}, {own.effects[j]} | {own.group}"
                agrees(label, term["cor"][i][j], ("random", label, "estimate"), rtol=1e-4)
    agrees("sigma", reference["sigma"], ("random", "sigma", "estimate"))
    for label in ("logLik", "AIC", "BIC"):
        agrees(label, reference[label], ("fit", label, ""))
    agrees("Criterion", reference["criterion"], ("fit", "Criterion", ""))
    assert shown["Observations"] == [str(reference["n"])]
    assert shown["Estimated by"] == [method]
    assert frame["fit", "REML", ""] == (method == "REML")


@pytest.mark.parametrize("name", ["sleepstudy_slopes", "cake_factor"])
def test_tests_against_lmertest(name):
    reference = json.loads((HERE / "oracle" / f"inference_ddf_{name}.json").read_text())
    reference = reference["satterthwaite"]["coefficients"]
    fit = fit_of(name, "REML")
    by_stat = {stat: mj.table(fit, stat, ddf="satterthwaite") for stat in ("p", "statistic", "ci")}
    for i, effect in enumerate(fit.labels.fixed):
        assert reference["row_names"][i] == r_name(effect)
        p, t, df = (reference[column][i] for column in ("Pr(>|t|)", "t value", "df"))
        estimate, se = reference["Estimate"][i], reference["Std. Error"][i]
        below = {stat: cells_of(models)[effect, "below"][0] for stat, models in by_stat.items()}
        assert below["p"] == ("(<0.001)" if p < 0.001 else f"({p:.3f})")
        assert abs(float(below["statistic"].strip("()")) - t) <= 0.005 + 1e-4 * abs(t)
        frames = {stat: models.to_frame()["(1)"].sort_index()["fixed", effect] for stat, models in by_stat.items()}
        np.testing.assert_allclose(frames["p"]["p_value"], p, rtol=1e-3)
        half = stats.t.ppf(0.975, df) * se
        np.testing.assert_allclose(frames["ci"][["lower", "upper"]], [estimate - half, estimate + half], rtol=1e-4)


def test_shares_against_performance():
    reference = json.loads((HERE / "oracle" / "inference_performance.json").read_text())
    for name in ("sleepstudy_slopes", "penicillin", "cake_temp"):
        expected = reference[name]["REML"]["definition"]
        shown = cells_of(mj.table(fit_of(name, "REML"), digits=4))
        for label, key in (("ICC (adjusted)", "ICC_adjusted"), ("R2 marginal", "R2_marginal"),
                           ("R2 conditional", "R2_conditional")):  # fmt: skip
            assert float(shown[label][0]) == pytest.approx(expected[key], abs=0.6e-4)


@pytest.mark.parametrize("ddf", ["satterthwaite", "kenward-roger", "wald"])
def test_every_statistic_against_the_fit(ddf):
    fit = fit_of("cake_factor", "REML")
    tests = fit.tidy(ddf).query("effect == 'fixed'").set_index("term")
    for stat, columns in (("std_error", ["std_error"]), ("p", ["p_value"]), ("statistic", ["statistic"])):
        frame = mj.table(fit, stat, ddf=ddf).to_frame()["(1)"]["fixed"].unstack()
        for column in ["estimate", *columns]:
            np.testing.assert_array_equal(frame.loc[tests.index, column], tests[column])
    intervals = mj.table(fit, "ci", ddf=ddf, level=0.9).to_frame()["(1)"]["fixed"].unstack()
    expected = fit.confint("beta_", 0.9, method="wald", ddf=ddf)
    np.testing.assert_allclose(intervals.loc[expected.index, ["lower", "upper"]], expected, rtol=1e-12)


def test_degrees_of_freedom_that_nobody_named_are_satterthwaites():
    fit = fit_of("cake_factor", "REML")
    for stat, stars in (("p", False), ("ci", False), (None, True)):
        models = mj.table(fit, stat, stars=stars)
        assert models.cells == mj.table(fit, stat, ddf="satterthwaite", stars=stars).cells
        assert "satterthwaite degrees of freedom" in models.notes[0]
    assert "satterthwaite" not in str(mj.table(fit))
    assert "wald" in mj.table(fit, "ci", ddf="wald").notes[0]
    assert mj.table(fit, "ci", level=0.9).notes[0].startswith("90 % confidence intervals in brackets")


def test_stars_are_those_of_the_p_values():
    fit = fit_of("cake_factor", "REML")
    models = mj.table(fit, None, stars=True)
    for term, row in fit.tidy("satterthwaite").query("effect == 'fixed'").set_index("term").iterrows():
        marks = "*" * sum(row["p_value"] < limit for limit in (0.05, 0.01, 0.001))
        assert re.sub(r"[-\d.]", "", cells_of(models)[term][0]) == marks
    assert "* p < 0.05, ** p < 0.01, *** p < 0.001" in models.notes
    limits = {
        0.0: "***",
        0.000999: "***",
        0.001: "**",
        0.00999: "**",
        0.01: "*",
        0.0499: "*",
        0.05: "",
        1.0: "",
        np.nan: "",
    }
    found = [{"estimate": 1.0, "std_error": 1.0, "p_value": p} for p in limits]
    assert _fixed_rows("x", found, None, 1, stars=True) == [["x", *(f"1{mark}" for mark in limits.values())]]
    assert not any("*" in cell for row in mj.table(fit, None).cells.rows for cell in row)


def test_order_of_rows_names_of_levels_and_scales():
    data = table("sleepstudy")
    formula = "Reaction ~ Days + (Days | Subject)"
    frame = mj.table(fit_in(data, formula)).to_frame()
    shuffled = data.sample(frac=1, random_state=1).assign(
        Subject=lambda d: d["Subject"].astype(str).map(lambda s: f"s{999 - int(s)}")
    )
    np.testing.assert_allclose(mj.table(fit_in(shuffled, formula)).to_frame(), frame, rtol=1e-5, atol=1e-5)
    larger = mj.table(fit_in(data.assign(Reaction=1000 * data["Reaction"]), formula)).to_frame()
    is_scaled = [row[0] in ("fixed", "random") and not str(row[1]).startswith("cor") for row in frame.index]
    np.testing.assert_allclose(larger[is_scaled], 1000 * frame[is_scaled], rtol=1e-5)
    shares = [("fit", label, "") for label in ("ICC (adjusted)", "R2 marginal", "R2 conditional")]
    np.testing.assert_allclose(larger.loc[shares], frame.loc[shares], rtol=1e-6)


# --- rows -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def three():
    data = table("sleepstudy").assign(night=lambda d: d["Days"] ** 2)
    return [
        fit_in(data, "Reaction ~ Days + (1 | Subject)", reml=False),
        fit_in(data, "Reaction ~ night + Days + (Days | Subject)", reml=False),
        fit_in(data, "Reaction ~ 1 + (Days || Subject)", reml=False),
    ]


def test_terms_stand_in_the_order_in_which_they_appear(three):
    shown = cells_of(mj.table(three, None))
    assert list(shown)[:7] == [
        "Intercept", "Days", "night", "sd Intercept | Subject", "sd Days | Subject", "cor Intercept, Days | Subject",
        "sigma",
    ]  # fmt: skip
    assert [bool(cell) for cell in shown["night"]] == [False, True, False]
    assert [bool(cell) for cell in shown["Days"]] == [True, True, False]
    # Uncorrelated terms of one group share the rows of correlated ones.
    assert [bool(cell) for cell in shown["sd Days | Subject"]] == [False, True, True]
    assert [bool(cell) for cell in shown["cor Intercept, Days | Subject"]] == [False, True, False]
    frame = mj.table(three).to_frame()
    assert np.isnan(frame.loc[("fixed", "night", "std_error"), "(1)"])
    assert frame.loc[("random", "sd Days | Subject", "estimate"), "(3)"] == pytest.approx(
        np.sqrt(three[2].Sigma["Subject.1"][0, 0])
    )
    own = mj.table(three[1]).to_frame()["(1)"]
    pd.testing.assert_series_equal(frame["(2)"].loc[own.index], own, check_names=False)


def test_estimates_of_a_row_have_the_decimals_of_its_smallest_standard_error(three):
    shown = cells_of(mj.table(three, digits=2))
    for term in ("Intercept", "Days", "night"):
        smallest = min(fit.se[term] for fit in three if term in fit.se)
        wanted = max(0, 1 - int(np.floor(np.log10(smallest))))
        for cell in [*shown[term], *shown[term, "below"]]:
            assert not cell or decimals(cell.strip("()")) == wanted


def test_digits():
    for digits, texts in ((1, ["25", "6", "0", "26", "0.7"]), (3, ["24.7", "5.92", "0.07", "25.6", "0.722"]),
                          (5, ["24.740", "5.9221", "0.0656", "25.592", "0.72166"])):  # fmt: skip
        shown = cells_of(mj.table(fit_of("sleepstudy_slopes", "REML"), digits=digits))
        labels = ["sd Intercept | Subject", "sd Days | Subject", "cor Intercept, Days | Subject", "sigma"]
        assert [shown[label][0] for label in [*labels, "ICC (adjusted)"]] == texts
        assert shown["logLik"] == ["-871.8"]


def test_a_table_of_three_fits_is_printed(three):
    lines = str(mj.table(three, names=["plain", "curved", "none"])).split("\n")
    assert lines[0].split() == ["plain", "curved", "none"]
    widths = {len(line) for line in lines if line.startswith("---")}
    assert widths == {max(len(line) for line in lines[:-1] if not line.startswith("standard"))}
    for text in (mj.table(three).to_latex(), mj.table(three).to_html(), mj.table(three).to_markdown()):
        assert "standard errors in parentheses" in text
    rows = mj.table(three).to_latex().split("\n")
    assert {line.count("&") for line in rows if line.endswith(r"\\")} == {3}


def test_one_fit_a_list_and_a_dict(three):
    alone = mj.table(three[0])
    for fits in ([three[0]], (three[0],), three[0].record):
        assert mj.table(fits).cells == alone.cells
    named = mj.table({"first": three[0], 2: three[1]})
    assert list(named.to_frame().columns) == ["first", "2"]
    assert named.cells == mj.table(three[:2], names=["first", 2]).cells
    assert mj.table(three[0], names="own").cells.heads == ["", "own"]
    assert repr(alone) == str(alone)
    frame = alone.to_frame()
    frame.iloc[:] = 0.0
    assert alone.to_frame().iloc[0, 0] == three[0].fixef["Intercept"]


def test_products_in_another_order_share_a_row():
    rng = np.random.default_rng(2)
    data = pd.DataFrame(rng.normal(size=(120, 3)), columns=["a", "b", "y"]).assign(g=np.repeat(np.arange(12), 10))
    models = mj.table(
        [fit_in(data, f"y ~ {terms} + (0 + {terms[-3:]} | g)") for terms in ("a + b + a:b", "a + b + b:a")]
    )
    labels = [row[0] for row in models.cells.rows if row[0]]
    assert labels[:4] == ["Intercept", "a", "b", "a:b"]
    assert labels[4:6] == ["sd a:b | g", "sigma"]
    assert all(cells_of(models)["a:b"])


def test_nested_and_crossed_groups():
    models = mj.table([fit_of("pastes_nested", "REML"), fit_of("penicillin", "REML")])
    shown = cells_of(models)
    assert shown["Groups: cask:batch"] == ["30", ""]
    assert shown["Groups: plate"] == ["", "24"]
    assert "responses or numbers of rows differ: logLik, AIC, BIC and criteria cannot be compared" in models.notes


def test_correlations_that_are_held_at_zero_have_no_row():
    data = table("sleepstudy")
    labels = [row[0] for row in mj.table(fit_in(data, "Reaction ~ Days + diag(Days | Subject)")).cells.rows]
    assert "sd Days | Subject" in labels
    assert not [label for label in labels if label.startswith("cor")]


def test_what_all_effects_of_a_term_share_names_none_of_them():
    fit = fit_in(table("Machines"), "score ~ 1 + homcs(0 + Machine | Worker)")
    shown, reference = cells_of(mj.table(fit, digits=6)), fit.variance_parameters()["estimate"]
    assert [label for label in shown if "Worker" in label][:2] == ["sd | Worker", "cor | Worker"]
    for label, name in (("sd | Worker", "sd|Worker"), ("cor | Worker", "cor|Worker")):
        assert float(shown[label][0]) == pytest.approx(reference[name], rel=1e-4)


def test_two_terms_whose_parameters_have_one_name():
    """Nothing tells them apart, so that they are numbered."""
    rng = np.random.default_rng(3)
    data = pd.DataFrame({"g": np.repeat(np.arange(20), 18), "a": np.tile(list("pqr"), 120)})
    y = rng.normal(size=360) + rng.normal(size=20)[data["g"]]
    data = data.assign(b=np.tile(np.repeat(list("uvw"), 3), 40), y=y)
    fit = fit_in(data, "y ~ 1 + homcs(0 + a | g) + homcs(0 + b | g)")
    assert [row[0] for row in mj.table(fit).cells.rows if row[0].endswith(("g", "(2)"))] == [
        "sd | g", "sd | g (2)", "cor | g", "cor | g (2)", "Groups: g",
    ]  # fmt: skip
    frame = mj.table(fit).to_frame()["(1)"]["random"].droplevel("value")
    np.testing.assert_allclose(frame.to_numpy()[[0, 2, 1, 3, 4]], fit.variance_parameters()["estimate"])


def test_a_model_without_fixed_effects():
    fit = fit_in(table("Dyestuff").assign(Yield=lambda d: d["Yield"] - 1500), "Yield ~ 0 + (1 | Batch)")
    for ddf in (None, "wald", "satterthwaite"):
        models = mj.table(fit, ddf=ddf)
        assert models.cells.rows[0][0] == "sd Intercept | Batch"
        assert models.to_latex().count(r"\midrule") == 2
        assert str(models)


def test_tiny_and_huge_responses():
    """Nothing is rounded to zero, nothing fills the line with digits."""
    data = table("sleepstudy")
    for scale in (1e-12, 1e12):
        shown = cells_of(
            mj.table(fit_in(data.assign(Reaction=scale * data["Reaction"]), "Reaction ~ Days + (1 | Subject)"))
        )
        for label in ("Intercept", "Days", "sd Intercept | Subject", "sigma"):
            assert len(shown[label][0]) <= 12
            assert float(shown[label][0]) == pytest.approx(
                scale * {"Intercept": 251.405, "Days": 10.467, "sigma": 30.991}.get(label, 37.124), rel=1e-3
            )


# --- notes ----------------------------------------------------------------------------------------------------------


def test_singular_fits_are_marked():
    models = mj.table([fit_of("dyestuff", "REML"), fit_of("dyestuff2", "REML")])
    assert cells_of(models)["Singular"] == ["no", "yes"]
    assert "(2) is singular: a covariance of random effects has less than full rank" in models.notes
    assert cells_of(models)["sd Intercept | Batch"][1] == "0.0"
    assert "Singular" not in str(mj.table(fit_of("dyestuff", "REML")))


def test_a_correlation_beside_a_zero_variance_is_nan():
    data = table("Dyestuff2").assign(x=np.tile(np.arange(5.0) - 2, 6))
    fit = fit_in(data, "Yield ~ x + (x | Batch)")
    assert fit.varcorr.to_frame()["sdcor"][:2].min() == 0
    assert cells_of(mj.table(fit))["cor Intercept, x | Batch"] == ["NaN"]


def test_fits_that_did_not_converge_are_marked():
    optax = pytest.importorskip("optax")
    with pytest.warns(mj.ConvergenceWarning):
        fit = fit_in(table("sleepstudy"), "Reaction ~ Days + (1 | Subject)", optimizer=optax.sgd(0.0), start=[2.0])
    models = mj.table({"still": fit})
    assert cells_of(models)["Converged"] == ["no"]
    assert any(note.startswith("still NOT CONVERGED: ") for note in models.notes)
    assert models.to_frame().loc[("fit", "Converged", ""), "still"] == 0


def test_what_cannot_be_compared_is_said(three):
    mixed = "REML beside ML: their logLik, AIC, BIC and criteria cannot be compared"
    other = "REML fits of different fixed effects: their logLik, AIC, BIC and criteria cannot be compared"
    reml = [fit.refit(reml=True) for fit in three]
    assert not [note for note in mj.table(three).notes if "compared" in note]
    assert mixed in mj.table([three[0], reml[0]]).notes
    assert cells_of(mj.table([three[0], reml[0]]))["Estimated by"] == ["ML", "REML"]
    assert other in mj.table(reml[:2]).notes
    assert other not in mj.table([reml[0], fit_of("sleepstudy_slopes", "REML")]).notes


def test_columns_that_were_left_out_are_named():
    data = table("sleepstudy").assign(twice=lambda d: 2 * d["Days"])
    with pytest.warns(mj.DataWarning):
        fit = fit_in(data, "Reaction ~ Days + twice + (1 | Subject)")
    assert "(1): redundant columns left out: twice" in mj.table(fit).notes


def test_chunks_have_no_shares_of_variance():
    data = table("sleepstudy").assign(Subject=lambda d: d["Subject"].astype(str))
    fit = mj.lmm("Reaction ~ Days + (1 | Subject)", [data[:90], data[90:]])
    models = mj.table([fit, fit_of("sleepstudy_intercept", "REML")])
    assert cells_of(models)["ICC (adjusted)"] == ["", "0.589"]
    assert "(1) kept no rows, which ICC and R2 need" in models.notes


def test_kenward_roger_of_an_ml_fit_says_what_it_shows():
    fit = fit_of("sleepstudy_slopes", "ML")
    with pytest.warns(mj.InferenceWarning, match="refitted by REML"):
        models = mj.table(fit, "p", ddf="kenward-roger")
    assert "(1): fixed effects and their standard errors are those of its REML refit" in models.notes


def test_names_that_mean_something_to_a_format():
    data = table("sleepstudy").rename(columns={"Days": "a_1 & b|c", "Subject": "g<1>"})
    fit = fit_in(data, "Reaction ~ `a_1 & b|c` + (1 | `g<1>`)")
    models = mj.table({"m_1": fit, "50 %": fit})
    assert r"a\_1 \& b\textbar{}c" in models.to_latex()
    assert r" & m\_1 & 50 \% \\" in models.to_latex()
    assert "a_1 &amp; b|c" in models.to_html()
    assert "<1>" not in models.to_html()
    assert {
        len(re.findall(r"(?<!\\)\|", line)) for line in models.to_markdown().split("\n") if line.startswith("|")
    } == {4}


def test_what_is_wrong_is_named(three):
    for call, words in (
        (lambda: mj.table([]), "there are no fits"),
        (lambda: mj.table({}), "there are no fits"),
        (lambda: mj.table(three[0], "se"), "stat must be one of 'std_error', 'ci', 'p', 'statistic' or None, got 'se'"),
        (lambda: mj.table(three, names=["a", "b"]), "names must be one for each of the 3 fits, got 'a', 'b'"),
        (lambda: mj.table(three, names=["a", "b", "a"]), "names must be different"),
        (lambda: mj.table({"a": three[0]}, names=["b"]), "the keys of a dict are their names"),
        (lambda: mj.table(three, ddf="kent"), "ddf must be one of"),
        (lambda: mj.table(*three), "several fits are given as one list, table([m0, m1])"),
        (lambda: mj.table(three, "ci", level=95), "level must be between 0 and 1"),
        (lambda: mj.table(three, digits=0), "digits must be an integer, 1 or more, got 0"),
        (lambda: mj.table(three, digits=30), "digits must be 12 or less"),
        (lambda: mj.table(three, stars="yes"), "stars must be True or False, got 'yes'"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            call()
    for fits in (["no fit"], "no fit", 3, [three]):
        with pytest.raises(
            TypeError, match=r"a fit is needed, as mixjax\.lmm or mixjax\.glmm returns it; got (str|int|list)"
        ):
            mj.table(fits)


def test_words_for_degrees_of_freedom_are_those_of_all_methods(three):
    reml = three[0].refit(reml=True)
    assert str(mj.table(reml, "ci", ddf="KR")) == str(mj.table(reml, "ci", ddf="kenward-roger"))


# --- generalised models ----------------------------------------------------------------------------------------------


def test_a_generalised_fit_has_its_family_and_its_parameters():
    fit = glmm_cases.fit_of("epil_nbinom2")
    cells = cells_of(mj.table(fit, "p"))
    assert float(cells["size"][0]) == pytest.approx(fit.dispersion["size"], rel=1e-2)
    assert cells["Family"] == ["nbinom (log)"]
    assert cells["Estimated by"] == ["Laplace"]
    assert "sigma" not in cells
    assert any("z tests of generalised models" in note for note in mj.table(fit, "p").notes)


def test_ratios_are_exponentials():
    fit = glmm_cases.fit_of("cbpp")
    frame = mj.table({"m": fit}, "ci", exponentiate=True).to_frame()["m"]
    name = fit.fixef.index[1]
    assert frame["fixed", name, "estimate"] == pytest.approx(np.exp(fit.fixef[name]))
    assert frame["fixed", name, "lower"] == pytest.approx(np.exp(fit.confint(name, method="wald")["lower"].iloc[0]))
    with pytest.raises(
        ValueError, match=r"exponentiate=True is for links logit, log, cloglog.*\(2\) is binomial \(probit\)"
    ):
        mj.table([fit, glmm_cases.fit_of("cbpp_probit")], exponentiate=True)
    with pytest.raises(ValueError, match="is gaussian"):
        mj.table(fit_of("penicillin", "REML"), exponentiate=True)


def test_linear_and_generalised_fits_stand_side_by_side():
    both = mj.table([fit_of("penicillin", "REML"), glmm_cases.fit_of("cbpp")])
    cells = cells_of(both)
    assert cells["Family"] == ["gaussian", "binomial (logit)"]
    assert cells["Estimated by"] == ["REML", "Laplace"]
    assert any("cannot be compared" in note for note in both.notes)


def test_fits_of_repeated_measures_keep_their_degrees_of_freedom():
    data = mj.datasets.load("fev").dropna(subset="FEV1")
    formula = "FEV1 ~ ARMCD * AVISIT + ar1h(AVISIT | USUBJID)"
    roger, plain = mj.mmrm(formula, data, ddf="kenward-roger"), mj.mmrm(formula, data)
    both = mj.table([roger, plain], "p")
    for column, fit in zip(both.to_frame(), (roger, plain), strict=True):
        values = both.to_frame().loc["fixed", column].unstack()["p_value"]
        np.testing.assert_allclose(
            values[list(fit.fixef.index)], fit.tidy().set_index("term")["p_value"][list(fit.fixef.index)], rtol=1e-10
        )
    assert "(1): kenward-roger degrees of freedom" in str(both)
    assert "kenward-roger degrees of freedom" in str(mj.table(roger))
    assert "satterthwaite degrees of freedom" in str(mj.table(roger, "p", ddf="satterthwaite"))
