"""Likelihood ratio tests between fits: R's tables, mixtures, the bootstrap, what is nested in what."""

import json
import warnings
from dataclasses import replace
from functools import cache

import numpy as np
import pandas as pd
import pytest
from conftest import HERE, table
from scipy import stats

import mixjax as mj
from mixjax.checks import InferenceWarning
from mixjax.fitted.record import record_of
from mixjax.inference.random.likelihood_ratio import bootstrap_null, compare, mixture_p
from mixjax.inference.random.nesting import is_within, place_of
from mixjax.optimise.results import failed
from mixjax.resampling import replicates

ORACLE = json.loads((HERE / "oracle" / "inference_lrt.json").read_text())
R_COLUMNS = {
    "npar": "npar",
    "aic": "AIC",
    "bic": "BIC",
    "loglik": "logLik",
    "deviance": "deviance",
    "chisq": "Chisq",
    "df": "Df",
    "p_value": "Pr(>Chisq)",
}
SLEEP = "Reaction ~ Days + "
SINGULAR = ["Yield ~ 1 + (1 | Batch)", "Yield ~ 1 + (1 | Batch) + (1 | half)"]


@cache
def fit(formula, name, reml=True):
    return mj.lmm(formula, table(name), reml=reml)


@cache
def sleep(random, reml=True):
    return fit(SLEEP + random, "sleepstudy", reml)


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error", InferenceWarning)
        yield


# --- oracle ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(ORACLE["anova"]))
def test_anova(name, no_warnings):
    reference = ORACLE["anova"][name]
    fits = [fit(formula, reference["data"]) for formula in reference["formulas"]]
    result = compare(*fits[::-1], names=reference["row_names"][::-1])
    frame = result.to_frame()
    assert list(frame.index) == reference["row_names"]
    for column, theirs in R_COLUMNS.items():
        np.testing.assert_allclose(frame[column], np.array(reference[theirs], float), rtol=1e-9, atol=1e-9)
    assert "refitted by maximum likelihood" in str(result)
    by_ml = compare(*(mj_fit.refit(reml=False) for mj_fit in fits))
    np.testing.assert_allclose(by_ml.to_frame()["deviance"], frame["deviance"], atol=1e-8)
    assert "refitted" not in str(by_ml)


@pytest.mark.parametrize("name", list(ORACLE["ranova"]))
def test_ranova(name, no_warnings):
    """REML tests of each random term, as lmerTest's ``ranova``."""
    reference = ORACLE["ranova"][name]
    full = fit(reference["formula"], reference["data"])
    smaller = {
        "sleepstudy": [SLEEP + "(1 | Subject)"],
        "penicillin": ["diameter ~ 1 + (1 | sample)", "diameter ~ 1 + (1 | plate)"],
    }[name]
    for i, formula in enumerate(smaller, start=1):
        frame = compare(fit(formula, reference["data"]), full, refit=False).to_frame()
        for column, theirs in {"npar": "npar", "loglik": "logLik", "aic": "AIC"}.items():
            np.testing.assert_allclose(frame[column], np.array(reference[theirs], float)[[i, 0]], rtol=1e-9)
        for column, theirs in {"chisq": "LRT", "df": "Df", "p_value": "Pr(>Chisq)"}.items():
            assert frame[column].iloc[1] == pytest.approx(reference[theirs][i], rel=1e-7)
        df = reference["Df"][i]
        below = stats.chi2.sf(reference["LRT"][i], df - 1) if df > 1 else 0.0
        expected = (below + stats.chi2.sf(reference["LRT"][i], df)) / 2
        assert frame["p_mixture"].iloc[1] == pytest.approx(expected, rel=1e-7)


# --- what is nested, and on which bound ------------------------------------------------------------------------------

MACHINES = ["(1 | Worker)", "(1 | Worker/Machine)", "(Machine | Worker)", "diag(0 + Machine | Worker)",
            "homcs(0 + Machine | Worker)"]  # fmt: skip
SUBJECT = ["(1 | Subject)", "(0 + Days | Subject)", "(1 | Subject) + (0 + Days | Subject)", "(Days | Subject)"]


@pytest.mark.parametrize(
    ("data", "fixed", "random", "expected"),
    [
        # Row: smaller, column: larger; standard deviations at 0, or None where it is not nested.
        ("sleepstudy", SLEEP, SUBJECT, [[0, None, 1, 1], [None, 0, 1, 1], [None, None, 0, 0], [None, None, None, 0]]),
        (
            "Machines",
            "score ~ Machine + ",
            MACHINES,
            [
                [0, 1, 2, None, 1],
                # Compound symmetry with a correlation that is not negative; so not the other way round.
                [None, 0, 0, None, 0],
                [None, None, 0, None, None],
                [None, None, 0, 0, None],
                [None, None, 0, None, 0],
            ],
        ),
        (
            "Pastes",
            "strength ~ 1 + ",
            ["(1 | sample)", "(1 | batch/cask)", "(1 | batch)"],
            [[0, 1, None], [None, 0, None], [None, 1, 0]],
        ),
    ],
)
def test_place_of_random_effects(data, fixed, random, expected):
    fits = [record_of(fit(fixed + term, data)) for term in random]
    for small, row in zip(fits, expected, strict=True):
        for large, zeros in zip(fits, row, strict=True):
            place = place_of(small, large)
            assert place.nested == (zeros is not None)
            assert place.zeros == zeros


@pytest.mark.filterwarnings("ignore::mixjax.checks.DataWarning")
def test_coding_names_and_weights_do_not_matter():
    data = table("sleepstudy").assign(
        year=lambda d: 2000.0 + 3.0 * d["Days"],
        who=lambda d: d["Subject"].astype(str).str[::-1],
        w=np.random.default_rng(0).uniform(0.5, 2.0, 180),
    )
    small = mj.lmm("Reaction ~ 1 + year + (1 | who)", data, weights="w")
    large = mj.lmm("Reaction ~ Days + (year | Subject)", data, weights="w")
    same = mj.lmm("Reaction ~ Days + (Days | Subject)", data, weights="w")
    assert place_of(record_of(small), record_of(large)) == (True, 1)
    assert place_of(record_of(large), record_of(small)).nested is False
    assert place_of(record_of(large), record_of(same)) == place_of(record_of(same), record_of(large)) == (True, 0)
    assert is_within(record_of(small), record_of(large))
    assert is_within(record_of(large), record_of(small))

    # REML criteria depend on the columns of X; the test must not.
    years = mj.lmm("Reaction ~ year + (Days | Subject)", data, weights="w")
    coded, plain = compare(small, large, refit=False), compare(small, years, refit=False)
    np.testing.assert_allclose(coded.to_frame(), plain.to_frame(), rtol=1e-8)
    assert "coded differently" in str(coded)
    assert "coded differently" not in str(plain)
    expected = small.criterion - large.criterion - 2 * np.log(3.0)
    assert coded.to_frame()["chisq"].iloc[1] == pytest.approx(expected, abs=1e-7)


@pytest.mark.filterwarnings("ignore::mixjax.checks.ConvergenceWarning")
def test_several_ways_to_write_one_covariance():
    """An intercept beside one effect per machine: nested, but where in the larger model is not defined."""
    small = fit("score ~ Machine + (1 | Worker)", "Machines")
    both = fit("score ~ Machine + (1 | Worker) + (0 + Machine | Worker)", "Machines")
    assert place_of(record_of(small), record_of(both)) == (True, None)
    notes = compare(small, both).notes
    assert any("several ways" in note and "bootstrap" in note for note in notes)


def test_models_that_are_not_nested():
    with pytest.warns(InferenceWarning, match=r"m0 is not a special case of m1 \(random effects\)"):
        result = compare(
            sleep("(0 + Days | Subject)"), fit("Reaction ~ Days + I(Days**2) + (1 | Subject)", "sleepstudy")
        )
    assert result.to_frame()["chisq"].iloc[1] >= 0
    with pytest.warns(InferenceWarning, match="fixed effects"):
        compare(fit("Reaction ~ I(Days**2) + (1 | Subject)", "sleepstudy"), sleep("(Days | Subject)"))
    with pytest.warns(InferenceWarning, match="no parameter more"):
        frame = compare(sleep("(1 | Subject)"), sleep("(0 + Days | Subject)"), method="bootstrap", n=10).to_frame()
    assert np.isnan(frame["p_value"]).all()
    assert np.isnan(frame["p_bootstrap"]).all()


# --- mixtures --------------------------------------------------------------------------------------------------------


def test_mixtures_by_kind_of_null(no_warnings):
    smaller, larger = sleep("(1 | Subject)", False), sleep("(Days | Subject)", False)
    intercept = fit("Reaction ~ 1 + (1 | Subject)", "sleepstudy", False)
    zerocorr = sleep("(1 | Subject) + (0 + Days | Subject)", False)

    def last(*fits):
        result = compare(*fits, method="mixture")
        return result.to_frame().iloc[-1], result.notes

    def expected(t, df):
        return ((stats.chi2.sf(t, df - 1) if df > 1 else 0.0) + stats.chi2.sf(t, df)) / 2

    for pair, df in (((smaller, larger), 2), ((smaller, zerocorr), 1), ((intercept, larger), 3)):
        row, notes = last(*pair)
        assert row["df"] == df
        assert row["p_mixture"] == pytest.approx(expected(row["chisq"], df), rel=1e-12)
        assert any(f"1/2 chi2({df - 1}) + 1/2 chi2({df})" in note for note in notes)
    # A correlation between effects that are there, fixed effects: no bound.
    for pair in ((zerocorr, larger), (intercept, smaller)):
        row, notes = last(*pair)
        assert row["p_mixture"] == row["p_value"] == pytest.approx(stats.chi2.sf(row["chisq"], row["df"]), rel=1e-12)
        assert notes == ()
    assert "p_mixture" not in compare(zerocorr, larger).to_frame()


def test_no_mixture_is_known():
    two = [fit("score ~ Machine + " + random, "Machines") for random in (MACHINES[0], MACHINES[2])]
    with pytest.warns(InferenceWarning, match="2 standard deviations"):
        result = compare(*two, method="mixture")
    assert np.isnan(result.to_frame()["p_mixture"]).all()
    assert any("method='bootstrap'" in note for note in result.notes)
    data = table("Dyestuff2").assign(half=lambda d: [str(i % 2) for i in range(len(d))])
    fits = [mj.lmm(formula, data) for formula in SINGULAR]
    result = compare(*fits)
    assert any("the fit of m0 is singular" in note for note in result.notes)
    # Fixed effects alone: a singular fit does not matter.
    fixed = mj.lmm("Yield ~ half + (1 | Batch)", data)
    assert not any("singular" in note for note in compare(fits[0], fixed).notes)


def test_a_variance_estimated_as_zero(no_warnings):
    assert mixture_p(0.0, 1) == mixture_p(0.0, 4) == 1.0
    data = table("Dyestuff").assign(other=lambda d: [str(i % 5) for i in range(len(d))])
    data["Yield"] -= data.groupby("other")["Yield"].transform("mean")
    small, large = (mj.lmm(f"Yield ~ 1 + (1 | Batch){more}", data) for more in ("", " + (1 | other)"))
    assert large.is_singular
    row = compare(small, large, refit=False).to_frame().iloc[1]
    assert (row["chisq"], row["p_mixture"], row["p_value"]) == (0.0, 1.0, 1.0)


def test_the_mixture_holds_where_the_chi_square_does_not():
    """Random slopes that are not there, 60 subjects: of 6 000 replicates, against both reference distributions."""
    rng = np.random.default_rng(3)
    data = pd.DataFrame({"g": np.repeat(np.arange(60), 6).astype(str), "x": np.tile(np.linspace(-1, 1, 6), 60)})
    data["y"] = 0.8 * rng.normal(size=60).repeat(6) + rng.normal(size=360)
    small, large = (record_of(mj.lmm(f"y ~ x + ({effects} | g)", data)) for effects in ("1", "x"))
    draws, codes = bootstrap_null(small, large, 11, 6_000)
    assert not failed(codes).any()
    for limit in stats.chi2.isf([0.2, 0.05], 2):
        share, p = np.mean(draws >= limit), mixture_p(limit, 2)
        error = np.sqrt(p * (1 - p) / 6_000)
        # The limit law is off by the order of 1/sqrt(60) of p besides.
        assert share == pytest.approx(p, abs=4 * error + p / np.sqrt(60))
        assert share < stats.chi2.sf(limit, 2) - 4 * error


# --- the bootstrap ---------------------------------------------------------------------------------------------------


def test_bootstrap_of_a_slope_is_an_f_test():
    """Balanced random intercepts: the ML statistic of a covariate within groups is ``n_w log(1 + F / df_w)``."""
    small, large = (fit(f"Reaction ~ {fixed} + (1 | Subject)", "sleepstudy", False) for fixed in ("1", "Days"))
    n, within = 4_000, 18 * 9
    result = compare(small, large, method="bootstrap", key=5, n=n)
    draws = result.null_draws["m1"]
    assert len(draws) == n
    for p in (0.5, 0.2, 0.05, 0.01):
        limit = within * np.log1p(stats.f.isf(p, 1, within - 1) / (within - 1))
        assert np.mean(draws >= limit) == pytest.approx(p, abs=4.5 * np.sqrt(p * (1 - p) / n))
    row = result.to_frame().iloc[1]
    assert row["p_bootstrap"] == 1 / (n + 1)
    again = compare(small, large, method="bootstrap", key=5, n=200)
    np.testing.assert_array_equal(again.null_draws["m1"], draws[:200])


def test_bootstrap_by_reml_with_weights_and_offset():
    """p and its error are those of the draws; blocks do not change them; criteria keep their columns' constant."""
    rng = np.random.default_rng(1)
    data = table("sleepstudy").assign(w=rng.uniform(0.5, 2, 180), o=rng.normal(size=180), twice=lambda d: 2 * d["Days"])
    small, large, other = (
        mj.lmm(f, data, weights="w", offset="o")
        for f in (SLEEP + "(1 | Subject)", SLEEP + "(Days | Subject)", "Reaction ~ twice + (Days | Subject)")
    )
    result = compare(small, large, refit=False, method="bootstrap", n=300, key=2)
    row, draws = result.to_frame().iloc[1], result.null_draws["m1"]
    p = (1 + np.sum(draws >= row["chisq"])) / 301
    assert (row["p_bootstrap"], row["mc_error"]) == (p, pytest.approx(np.sqrt(p * (1 - p) / 300)))
    recoded, _ = bootstrap_null(record_of(small), record_of(other), 2, 300)
    np.testing.assert_allclose(recoded, draws, atol=1e-7)
    # Of 1/2 chi2(1) + 1/2 chi2(2), roughly; a constant of the columns would be 2 log 2.
    assert draws.mean() == pytest.approx(1.5, abs=0.5)


def test_chunks_and_failed_replicates(monkeypatch):
    small, large = sleep("(1 | Subject)"), sleep("(Days | Subject)")
    whole, _ = bootstrap_null(record_of(small), record_of(large), 2, 50)
    monkeypatch.setattr(replicates, "MOST", 16)
    parts, _ = bootstrap_null(record_of(small), record_of(large), 2, 50)
    np.testing.assert_allclose(parts, whole, atol=1e-9)

    fit_many = replicates.estimate_many

    def failing(products, reml, keep, **options):
        found = fit_many(products, reml, keep=keep, **options)
        return found._replace(result=np.where(np.arange(len(found.result)) == 3, mj.Result.STALLED, found.result))

    monkeypatch.setattr(replicates, "estimate_many", failing)
    result = compare(small, large, refit=False, method="bootstrap", n=50, key=2)
    kept = np.arange(50) % 16 != 3
    np.testing.assert_allclose(result.null_draws["m1"], whole[kept], atol=1e-9)
    assert "m1 against m0: 3 of 50 refits failed (STALLED 3) and are left out" in result.notes
    assert result.to_frame()["p_bootstrap"].iloc[1] == 1 / (kept.sum() + 1)


# --- behaviour -------------------------------------------------------------------------------------------------------


def test_text_and_html(no_warnings):
    result = compare(sleep("(Days | Subject)"), sleep("(1 | Subject)"), names=["slopes", "a<b"])
    text = str(result)
    assert text.splitlines()[0] == "Data: 180 rows, response Reaction; maximum likelihood"
    assert "a<b: Reaction ~ Days + (1 | Subject)\nslopes: Reaction ~ Days + (Days | Subject)" in text
    assert "a<b       4  1802.08" in text
    assert "nan" not in text.lower()
    page = result._repr_html_()
    assert "a&lt;b: Reaction" in page
    assert "a<b" not in page
    assert ">p (mixture)</th>" in page
    frame = result.to_frame()
    frame["npar"] = 0
    assert (result.to_frame()["npar"] == [4, 6]).all()


def test_different_data():
    data = table("sleepstudy").assign(w=np.linspace(1, 2, 180), o=1.0, other=lambda d: d["Reaction"] + 1)
    base = sleep("(1 | Subject)")
    for arguments, words in (
        ({"subset": "Days > 1"}, "180 and 144 rows"),
        ({"formula": "other ~ Days + (Days | Subject)"}, "the response differs"),
        ({"weights": "w"}, "the weights differ"),
        ({"offset": "o"}, "the offset differs"),
    ):
        formula = arguments.pop("formula", SLEEP + "(Days | Subject)")
        with pytest.raises(ValueError, match=f"m0 and m1 were not fitted to the same data: .*{words}"):
            compare(base, mj.lmm(formula, data, **arguments))
    ones = mj.lmm(SLEEP + "(Days | Subject)", data.assign(w=1.0, o=0.0), weights="w", offset="o")
    assert compare(base, ones).to_frame()["chisq"].iloc[1] == pytest.approx(42.1393, abs=1e-4)


def test_criteria_that_cannot_be_compared():
    small, large = sleep("(1 | Subject)"), sleep("(Days | Subject)", False)
    with pytest.raises(ValueError, match=r"m0 REML, m1 ML.*refit='ml'"):
        compare(small, large, refit=False)
    with pytest.raises(ValueError, match="m0 and m1 have different fixed effects"):
        compare(fit("Reaction ~ 1 + (1 | Subject)", "sleepstudy"), sleep("(Days | Subject)"), refit=False)
    assert compare(small, large).to_frame()["chisq"].iloc[1] == pytest.approx(42.1393, abs=1e-4)


def test_a_fit_that_failed_is_named():
    small, large = (record_of(sleep(random)) for random in ("(1 | Subject)", "(Days | Subject)"))
    lost = replace(large, estimates=large.estimates._replace(converged=np.False_))
    assert any("NOT CONVERGED: m1" in note for note in compare(small, lost, refit=False).notes)
    assert not any("NOT CONVERGED" in note for note in compare(small, large, refit=False).notes)


def test_options():
    small, large = sleep("(1 | Subject)"), sleep("(Days | Subject)")
    for arguments, words in (
        ({"refit": "reml"}, "refit must be 'ml' or False"),
        ({"method": "wald"}, "method must be one of 'chi2', 'mixture', 'bootstrap'"),
        ({"names": ["a"]}, "names must be 2 different"),
        ({"names": ["a", "a"]}, "names must be 2 different"),
        ({"n": 0}, "n must be an integer"),
    ):
        with pytest.raises(ValueError, match=words):
            compare(small, large, **arguments)
    with pytest.raises(ValueError, match="two fits or more"):
        compare(small)
    with pytest.raises(ValueError, match=r"one by one, compare\(m0, m1\), not as a list"):
        compare([small, large])
    with pytest.raises(TypeError, match="a fit is needed"):
        compare(small, "large")


def test_fits_whose_rows_were_not_kept(no_warnings):
    data = table("sleepstudy")
    chunks = [data.iloc[:90], data.iloc[90:]]
    fits = [mj.lmm(SLEEP + random, chunks) for random in ("(1 | Subject)", "(Days | Subject)")]
    result = compare(*fits, method="bootstrap", n=10)
    frame = result.to_frame()
    assert frame["chisq"].iloc[1] == pytest.approx(42.1393, abs=1e-4)
    assert np.isnan(frame["p_bootstrap"]).all()
    assert any("rows were not kept" in note for note in result.notes)
    other = mj.lmm("Days ~ Reaction + (1 | Subject)", chunks)
    with pytest.raises(ValueError, match="the responses are 'Reaction' and 'Days'"):
        compare(fits[0], other)
