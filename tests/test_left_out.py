"""Terms left out one at a time, against lmerTest and lme4, closed forms, and fits of the smaller formulas."""

import json
import pickle
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import table

import mixjax as mj
from mixjax.distributions import chi2_tail
from mixjax.formula.deletion import fixed_deletions, random_deletions
from mixjax.inference.random.ranova import _linear_null, linear_criterion
from mixjax.optimise.results import failed
from mixjax.simulation import simulate_responses

HERE = Path(__file__).parent
REFERENCE = json.loads((HERE / "oracle" / "left_out.json").read_text())
CROSSED = "y ~ a * b + x + (a + x | subj) + (1 | item)"


@cache
def data_of(name):
    if name == "crossed_factorial":
        return pd.read_csv(HERE / "data" / "crossed_factorial.csv")
    return table(name)


@cache
def fit_of(name, formula, reml=True):
    with pytest.warns(mj.DataWarning) if "* C" in formula else nullcontext():
        return mj.lmm(formula, data_of(name), reml=reml)


def in_r(columns):
    return pd.DataFrame(columns).set_index("row").astype(float)


def spaced(names):
    return ["".join(name.split()) for name in names]


def model_of(case):
    return f"{case['data']}: {case['formula']}, {'REML' if case['REML'] else 'ML'}"


# --- random effects --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", REFERENCE["ranova"], ids=lambda c: f"{model_of(c)}, {c['reduce']}")
def test_ranova_is_lmertests(case):
    found = fit_of(case["data"], case["formula"], case["REML"]).ranova("chi2", reduce=case["reduce"])
    expected = in_r(case["table"])
    assert spaced(found.index) == spaced(expected.index)
    # Criteria are flat at their optima: lme4's, searched to 1e-10 in theta, are good to 1e-9 where no variance is 0.
    np.testing.assert_allclose(found["lrt"], expected["LRT"], rtol=1e-7, atol=2e-6)
    np.testing.assert_allclose(found["loglik"], expected["logLik"], rtol=1e-9)
    np.testing.assert_allclose(found["aic"], expected["AIC"], rtol=1e-9)
    np.testing.assert_allclose(found["p_value"], expected["Pr(>Chisq)"], rtol=1e-5, atol=1e-12)
    np.testing.assert_array_equal(found[["npar", "df"]], expected[["npar", "Df"]])


@pytest.mark.parametrize("reml", [True, False])
def test_mixtures_are_those_of_compare(reml):
    fit = fit_of("crossed_factorial", CROSSED, reml)
    found = fit.ranova()
    assert list(found.index[1:]) == ["a in (a + x | subj)", "x in (a + x | subj)", "(1 | item)"]
    for name in found.index[1:]:
        pair = mj.compare(fit.without(name), fit, refit=False, method="mixture").to_frame().iloc[1]
        own = found.loc[name, ["lrt", "df", "p_value", "p_mixture"]].to_numpy(float)
        np.testing.assert_allclose(own, pair[["chisq", "df", "p_value", "p_mixture"]].to_numpy(float), rtol=1e-12)
    lrt, df = found.loc["a in (a + x | subj)", ["lrt", "df"]]
    assert df == 3
    half = 0.5 * float(chi2_tail(lrt, 2)) + 0.5 * float(chi2_tail(lrt, 3))
    np.testing.assert_allclose(found.loc["a in (a + x | subj)", "p_mixture"], half, rtol=1e-12)


def test_where_no_mixture_is_known():
    found = fit_of("Machines", "score ~ Machine + (Machine | Worker)").ranova()
    assert np.isnan(found["p_mixture"].iloc[1])
    assert any("2 standard deviations are 0" in note for note in found.attrs["notes"])
    assert any("method='bootstrap'" in note for note in found.attrs["notes"])
    assert "p_mixture" not in fit_of("Machines", "score ~ Machine + (Machine | Worker)").ranova("chi2")


@pytest.mark.parametrize("reml", [True, False])
def test_the_linear_model_in_closed_form(reml):
    """Against the density of the responses, and of their error contrasts, written out with matrices of rows."""
    data = data_of("crossed_factorial")
    fit = mj.lmm("y ~ a + x + (1 | subj)", data, reml=reml, weights="w", offset="b")
    X, w, y = fit.X, data["w"].to_numpy(), (data["y"] - data["b"]).to_numpy()
    n, p = X.shape
    beta = np.linalg.solve(X.T @ (w[:, None] * X), X.T @ (w * y))
    sigma2 = (w * (y - X @ beta) ** 2).sum() / (n - p if reml else n)
    expected = n * np.log(2 * np.pi * sigma2) - np.log(w).sum() + (w * (y - X @ beta) ** 2).sum() / sigma2
    if reml:
        expected += np.linalg.slogdet(X.T @ (w[:, None] * X) / sigma2)[1] - p * np.log(2 * np.pi)
    np.testing.assert_allclose(linear_criterion(fit.record), expected, rtol=1e-12)
    np.testing.assert_allclose(fit.ranova().loc["(1 | subj)", "loglik"], -expected / 2, rtol=1e-12)


def test_bootstrap_of_one_variance_agrees_with_the_exact_test():
    """Both are of the same statistic; 2 000 replicates leave a standard error of 0.0015 at p = 0.0044."""
    fit = fit_of("Dyestuff", "Yield ~ 1 + (1 | Batch)")
    exact = mj.exact_rlrt(fit)
    row = fit.ranova("bootstrap", key=3, n=2000).iloc[1]
    np.testing.assert_allclose(row["lrt"], exact.statistic, rtol=1e-9)
    assert abs(row["p_bootstrap"] - exact.p_value) < 4 * np.sqrt(exact.p_value / 2000)
    np.testing.assert_allclose(row["mc_error"], np.sqrt(row["p_bootstrap"] * (1 - row["p_bootstrap"]) / 2000))


@pytest.mark.parametrize("reml", [True, False])
def test_bootstrap_statistics_are_those_of_fits(reml):
    """Responses of the linear model, fitted one by one, with weights and an offset."""
    data = data_of("crossed_factorial")
    fit = mj.lmm("y ~ a + x + (1 | subj)", data, reml=reml, weights="w", offset="b")
    draws, codes = _linear_null(fit.record, 7, 40)
    assert not failed(codes).any()
    X, w, y = fit.X, data["w"].to_numpy(), (data["y"] - data["b"]).to_numpy()
    beta = np.linalg.solve(X.T @ (w[:, None] * X), X.T @ (w * y))
    sigma = np.sqrt((w * (y - X @ beta) ** 2).sum() / (len(y) - 3 * reml))
    Y = simulate_responses(fit.design, beta, sigma, (np.zeros((1, 1)),), 7, 40)
    np.testing.assert_allclose(np.std(np.sqrt(w) * (Y - data["b"].to_numpy() - X @ beta)), sigma, rtol=0.05)
    expected = [fit.refit(y).ranova("chi2")["lrt"].iloc[1] for y in Y[:8]]
    np.testing.assert_allclose(draws[:8], expected, atol=1e-7)
    # Half of the variances are estimated to be 0 or nearly so: the mixture's point mass.
    assert 0.3 < np.mean(draws < 1e-6) < 0.9


def test_bootstrap_of_a_slope_is_that_of_compare():
    fit = fit_of("sleepstudy", "Reaction ~ Days + (Days | Subject)")
    row = fit.ranova("bootstrap", key=1, n=200).iloc[1]
    small = fit.without("Days in (Days | Subject)")
    pair = mj.compare(small, fit, refit=False, method="bootstrap", key=1, n=200).to_frame().iloc[1]
    assert row["p_bootstrap"] == pair["p_bootstrap"]


def test_what_can_be_left_out_of_a_structure():
    data = data_of("crossed_factorial")

    def names(formula, reduce=True):
        fit = mj.lmm(formula, data)
        return [each.name for each in random_deletions(fit.labels, reduce)]

    assert names("y ~ A + diag(1 + x | subj)") == ["1 in diag(1 + x | subj)", "x in diag(1 + x | subj)"]
    assert names("y ~ A + homcs(0 + A | subj)") == ["homcs(0 + A | subj)"]
    assert names("y ~ A + (1 | subj/item)") == ["(1 | item:subj)", "(1 | subj)"]
    assert names("y ~ A + (x | subj)", reduce=False) == ["(x | subj)"]
    # The constant is in no other term of the group, or it is.
    fit = mj.lmm("y ~ A + (0 + A | subj)", data)
    assert fit.without("A in (0 + A | subj)").labels.terms[0].effects == ("Intercept",)
    fit = mj.lmm("y ~ A + (A || subj)", data)
    assert len(fit.without("A in (0 + A | subj)").labels.terms) == 1


def test_a_diagonal_structure_is_two_bars():
    data = data_of("crossed_factorial")
    diagonal = mj.lmm("y ~ A + diag(1 + x | subj)", data).ranova()
    bars = mj.lmm("y ~ A + (1 + x || subj)", data).ranova()
    np.testing.assert_allclose(diagonal.to_numpy(float), bars.to_numpy(float), rtol=1e-7, atol=1e-9)


def test_maximal_crossed_design_step_by_step():
    """Eight terms, each left out once; the user goes on from the least needed one."""
    fit = fit_of("crossed_factorial", "y ~ a * b + (1 + a * b || subj) + (1 + a * b || item)")
    found = fit.ranova("chi2")
    assert len(found) == 9
    assert (found["df"].iloc[1:] == 1).all()
    while len(fit.labels.terms) > 2:
        found = fit.ranova("chi2").iloc[1:]
        least = found["lrt"].idxmin()
        smaller = fit.without(least)
        np.testing.assert_allclose(smaller.criterion - fit.criterion, found.loc[least, "lrt"], atol=2e-6)
        fit = smaller
    assert fit.npar == 4 + 2 + 1


# --- the smaller fit -------------------------------------------------------------------------------------------------

MODELS = [
    ("crossed_factorial", CROSSED),
    ("crossed_factorial", "y ~ A * B + poly(x, 2) + (A * B | subj) + (1 | item)"),
    ("crossed_factorial", "y ~ 0 + A + B + (0 + A + x || subj)"),
    ("crossed_factorial", "log(y + 20) ~ A + offset(x / 2) + I(x^2) + (1 | subj/item) + diag(1 + x | B)"),
    ("crossed_factorial", "y ~ A + (1 | subj/B/A)"),
    ("Pastes", "strength ~ 1 + (1 | batch/cask)"),
]


@pytest.mark.parametrize(("name", "formula"), MODELS)
def test_the_formula_of_the_smaller_fit_says_what_it_is(name, formula):
    """Read again, it gives the same fit; and predictions of new rows are those of the design."""
    fit = mj.lmm(formula, data_of(name))
    deletions = [*fixed_deletions(fit.labels), *random_deletions(fit.labels)]
    assert deletions
    for each in deletions:
        smaller = fit.without(each.name)
        again = mj.lmm(smaller.labels.formula, data_of(name))
        assert again.labels.fixed == smaller.labels.fixed
        assert [t.effects for t in again.labels.terms] == [t.effects for t in smaller.labels.terms]
        assert [t.group for t in again.labels.terms] == [t.group for t in smaller.labels.terms]
        np.testing.assert_allclose(smaller.criterion, again.criterion, rtol=1e-9)
        np.testing.assert_allclose(smaller.predict(data_of(name)), smaller.predict(), rtol=1e-9, atol=1e-9)


def test_weights_offset_subset_contrasts_stay():
    data = data_of("crossed_factorial").copy()
    data.loc[data.index[data["a"] < 0.5][[3, 20]], "x"] = np.nan
    options = {"weights": "w", "offset": "b", "subset": data["a"] < 0.5, "contrasts": {"A": "sum"}, "reml": False}
    with pytest.warns(mj.DataWarning, match="2 of"):
        fit = mj.lmm("y ~ A + x + (A + x | subj)", data, **options)
    smaller = fit.without("A in (A + x | subj)")
    with pytest.warns(mj.DataWarning, match="2 of"):
        again = mj.lmm("y ~ A + x + (x | subj)", data, **options)
    np.testing.assert_allclose(smaller.criterion, again.criterion, rtol=1e-10)
    assert smaller.labels.fixed == again.labels.fixed == ("Intercept", "A[S.a1]", "x")
    assert not smaller.reml
    fixed = fit.without("x")
    assert fixed.labels.fixed == ("Intercept", "A[S.a1]")
    assert fixed.nobs == fit.nobs


def test_columns_with_blanks():
    data = data_of("crossed_factorial").rename(columns={"x": "reaction time", "subj": "the subject", "a": "class"})
    fit = mj.lmm("y ~ class + `reaction time` + (`reaction time` + class | `the subject`) + (1 | item)", data)
    plain = fit_of("crossed_factorial", "y ~ a + x + (x + a | subj) + (1 | item)")
    np.testing.assert_allclose(fit.ranova("chi2").to_numpy(), plain.ranova("chi2").to_numpy(), rtol=1e-9)
    name = fit.ranova("chi2").index[1]
    again = mj.lmm(fit.without(name).labels.formula, data)
    np.testing.assert_allclose(again.criterion, fit.without(name).criterion, rtol=1e-10)


def test_names_of_terms_are_read():
    fit = fit_of("crossed_factorial", CROSSED)
    same = ["x in (a + x | subj)", "x in (a+x|subj)", " x in ( a + x|subj )"]
    assert len({fit.without(name).labels.formula for name in same}) == 1
    assert fit.without("(a+x|subj)").labels.formula == "y ~ a * b + x + (1 | item)"
    assert fit.without("a:b").labels.fixed == ("Intercept", "a", "b", "x")
    with pytest.raises(ValueError, match="'a' cannot be left out while 'a:b' contains it: leave that out first"):
        fit.without("a")
    assert fit.without("a:b").without("a").labels.formula == "y ~ b + x + (a + x | subj) + (1 | item)"
    for wrong in ("z", "b:c", "(1 | subj)", "", None):
        with pytest.raises(ValueError, match=r"there is no term .* that can be left out; there are x, a:b, a in"):
            fit.without(wrong)
    with pytest.raises(ValueError, match="without '\\(1 \\| Subject\\)' no random term is left"):
        fit_of("sleepstudy", "Reaction ~ Days + (1 | Subject)").without("(1 | Subject)")


# --- fixed effects ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", REFERENCE["drop1"], ids=model_of)
def test_drop1_is_lmertests(case):
    fit = fit_of(case["data"], case["formula"], case["REML"])
    for key, ddf in (("satterthwaite", "satterthwaite"), ("kenward_roger", "kenward-roger")):
        if case[key] is None:
            continue
        expected, found = in_r(case[key]), fit.drop1(ddf=ddf)
        assert set(found.index) == set(expected.index)
        # lme4's theta is good to 1e-7 here, and F and degrees of freedom follow it; p in the tail more than either.
        expected = expected.reindex(found.index).to_numpy()
        np.testing.assert_allclose(found.to_numpy(float)[:, :5], expected[:, :5], rtol=2e-6)
        np.testing.assert_allclose(found.to_numpy(float)[:, 5], expected[:, 5], rtol=2e-5)


@pytest.mark.parametrize("case", REFERENCE["drop1"], ids=model_of)
def test_likelihood_ratios_are_lme4s(case):
    found = fit_of(case["data"], case["formula"], case["REML"]).drop1("lrt")
    expected = in_r(case["chisq"])
    assert set(found.index) == set(expected.index)
    expected = expected.reindex(found.index)
    np.testing.assert_allclose(found["lrt"], expected["LRT"], rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(found["aic"], expected["AIC"], rtol=1e-10)
    np.testing.assert_allclose(found["p_value"], expected["Pr(Chi)"], rtol=1e-7)
    np.testing.assert_array_equal(found["df"], expected["npar"])


def test_an_empty_cell_leaves_a_term_with_fewer_columns():
    fit = fit_of("crossed_factorial", "y ~ A * B * C + x + (1 | subj)")
    assert fit.labels.dropped_columns == ("A[T.a3]:B[T.b2]:C[T.c2]",)
    assert fit.drop1().loc["A:B:C", "num_df"] == 1
    assert fit.drop1("lrt").loc["A:B:C", "df"] == 1


def test_a_term_that_others_determine_has_no_test():
    data = data_of("crossed_factorial").assign(twice=lambda d: 2 * d["x"])
    with pytest.warns(mj.DataWarning, match="twice"):
        fit = mj.lmm("y ~ x + twice + A + (1 | subj)", data)
    found = fit.drop1()
    assert found["num_df"].to_dict() == {"x": 0, "twice": 0, "A": 2}
    assert found.loc[["x", "twice"], ["statistic", "p_value"]].isna().all(axis=None)
    ratios = fit.drop1("lrt")
    assert ratios.loc[["x", "twice"], "df"].tolist() == [0, 0]
    assert ratios.loc[["x", "twice"], "p_value"].isna().all()


def test_the_same_in_other_rows_labels_and_scales():
    data = data_of("crossed_factorial")
    other = data.sample(frac=1, random_state=4).assign(
        y=lambda d: 1000 * d["y"] + 5, subj=lambda d: d["subj"].map(lambda s: f"z{99 - int(s[1:])}")
    )
    formula = "y ~ A * B + x + (x | subj) + (1 | item)"
    a, b = (mj.lmm(formula, d) for d in (data, other))
    columns = ["num_df", "den_df", "statistic", "p_value"]
    np.testing.assert_allclose(a.drop1()[columns], b.drop1()[columns], rtol=1e-6)
    columns = ["npar", "lrt", "df", "p_value", "p_mixture"]
    np.testing.assert_allclose(a.ranova()[columns], b.ranova()[columns], rtol=1e-6, atol=1e-9)


def test_one_coefficient_is_its_t_test():
    fit = fit_of("crossed_factorial", CROSSED)
    found, t = fit.drop1(), fit.test(["x", "a:b"], joint=False)
    np.testing.assert_allclose(found.loc[["x", "a:b"], "statistic"], t["statistic"] ** 2, rtol=1e-10)
    np.testing.assert_allclose(found.loc[["x", "a:b"], "den_df"], t["df"], rtol=1e-10)


def test_tables_for_papers():
    fit = fit_of("sleepstudy", "Reaction ~ Days + (Days | Subject)")
    text = fit.ranova().to_markdown()
    assert "| Days in (Days \\| Subject) | 4 | -893.23 | 1794.47 | 42.84 |" in text
    assert "LRT" in text
    assert "p_mixture: 1/2 chi2(df - 1) + 1/2 chi2(df)" in text
    assert "LRT" in fit.drop1("lrt").to_latex()
    pd.testing.assert_frame_equal(pd.DataFrame(pickle.loads(pickle.dumps(fit.ranova()))), pd.DataFrame(fit.ranova()))


# --- what cannot be asked --------------------------------------------------------------------------------------------


def test_arguments_that_are_none():
    fit = fit_of("sleepstudy", "Reaction ~ Days + (Days | Subject)")
    with pytest.raises(ValueError, match="method must be one of 'mixture', 'chi2', 'bootstrap', got 'exact'"):
        fit.ranova("exact")
    with pytest.raises(ValueError, match="reduce must be True or False, got 1"):
        fit.ranova(reduce=1)
    with pytest.raises(ValueError, match="n must be an integer, 1 or more, got 0"):
        fit.ranova(n=0)
    with pytest.raises(ValueError, match="test must be one of 'F', 'lrt', got 'Chi'"):
        fit.drop1("Chi")
    with pytest.raises(ValueError, match="ddf must be one of"):
        fit.drop1(ddf="none")


def test_rows_are_needed():
    data = table("sleepstudy")
    fit = mj.lmm("Reaction ~ Days + (Days | Subject)", [data.iloc[:90], data.iloc[90:]])
    for ask in (fit.ranova, fit.drop1, lambda: fit.drop1("lrt"), lambda: fit.without("Days")):
        with pytest.raises(ValueError, match="made from chunks of rows"):
            ask()
