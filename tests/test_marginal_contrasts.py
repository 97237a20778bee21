"""Contrasts of marginal means against emmeans (tests/oracle/emmeans.R): methods, adjustments, letters, joint tests."""

import json
import warnings
from functools import cache

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import HERE, table

import mixjax as mj
from mixjax.inference.fixed.simultaneous import LargestT, studentized_range_tail

NAMES = ("cake", "split_plot", "trial", "holed")
DDF = ("satterthwaite", "kenward-roger")
COLUMNS = {"estimate": "estimate", "std_error": "std_error", "df": "df", "lower": "lower", "upper": "upper",
           "statistic": "statistic", "p_value": "p_value"}  # fmt: skip


@cache
def reference(name):
    return json.loads((HERE / "oracle" / f"emmeans_{name}.json").read_text())


@cache
def fit(name):
    found = reference(name)
    if name == "cake":
        return mj.lmm(found["formula"], table("cake"))
    data = pd.DataFrame(found["data"])
    for column, levels in found["levels"].items():
        data[column] = pd.Categorical(data[column], categories=levels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mj.DataWarning)  # the column of the empty cell
        return mj.lmm(found["formula"], data)


@cache
def means_of(name, spec, ddf):
    return fit(name).emmeans(spec, ddf=ddf)


def entries(kind, **same):
    """Everything of a kind in the references."""
    return [
        pytest.param(name, ddf, entry, id="-".join([name, ddf, *(str(entry.get(k)) for k in ("spec", "method", "adjust")
                                                               if entry.get(k))]))
        for name in NAMES
        for ddf in DDF
        for entry in reference(name)[ddf]
        if entry["kind"] == kind and all(entry.get(k) in v for k, v in same.items())
    ]  # fmt: skip


def numbers(entry, column):
    return np.array(entry["table"][column], float)


def compare(found, entry, columns, scale):
    """To what lme4's polished optimum is good for, 1e-8 or so: theta is known to 4e-8 in the worst of these fits."""
    for column in columns:
        expected = numbers(entry, column)
        ours = found[column].to_numpy()
        rtol, atol = {"df": (2e-7, 0.0), "p_value": (1e-5, 5e-8), "std_error": (1e-7, 0.0)}.get(column, (2e-7, 0.0))
        atol = {"estimate": 1e-7, "lower": 3e-7, "upper": 3e-7}.get(column, 0.0) * scale or atol
        if column == "statistic":
            atol = 3e-7
        np.testing.assert_allclose(ours, expected, rtol=rtol, atol=atol, err_msg=column)


def scale_of(name):
    return float(fit(name).sigma)


@pytest.mark.parametrize("name", NAMES)
def test_the_fits_are_lme4s(name):
    found = reference(name)
    np.testing.assert_allclose(fit(name).theta, found["theta"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(fit(name).sigma, found["sigma"], rtol=1e-7)


@pytest.mark.parametrize(("name", "ddf", "entry"), entries("means"))
def test_means_are_emmeans(name, ddf, entry):
    found = means_of(name, entry["spec"], ddf).to_frame()
    emmean = {"table": entry["table"] | {"estimate": entry["table"]["emmean"]}}
    compare(found, emmean, ["estimate", "std_error", "df", "lower", "upper"], scale_of(name))


@pytest.mark.parametrize(("name", "ddf", "entry"), entries("contrasts"))
def test_contrasts_are_emmeans(name, ddf, entry):
    means = means_of(name, entry["spec"], ddf)
    found = means.contrasts(entry["method"], "none")
    compare(found, entry, COLUMNS, scale_of(name))
    default = {"dunnettx": "dunnett"}.get(entry["default"], entry["default"])
    if ddf == DDF[0]:
        note = means.contrasts(entry["method"]).attrs["notes"][0]
        assert ("not adjusted" if default == "none" else f"adjusted by {default} ") in note


@pytest.mark.parametrize(("name", "ddf", "entry"), entries("adjusted"))
def test_adjustments_are_emmeans(name, ddf, entry):
    means = means_of(name, entry["spec"], ddf)
    found = means.contrasts(entry["method"], entry["adjust"])
    keep = np.ones(len(found), bool)
    if name == "holed" and entry["adjust"] != "tukey":
        # emmeans counts what cannot be estimated in some of these families and not in others; here it never counts.
        missing = found["estimate"].isna()
        by = list(means.by)
        keep = ~(missing.groupby([found[b] for b in by]).transform("any") if by else missing.any() | missing).to_numpy()
    p = numbers(entry, "p_value")
    if (entry["method"], entry["adjust"]) == ("eff", "scheffe"):
        if found["p_value"].isna().all():
            return
        # Effects of k means have rank k - 1. emmeans rounds their weights to seven digits before it counts, and where
        # they are thirds of averages over another factor it has k.
        k = len(found) if not means.by else found.groupby(list(means.by), observed=True).size().iloc[0]
        if not keep.all():
            found, p = found[keep], p[keep]
            keep = keep[keep]
        else:
            assert f"scheffe with rank {k - 1}" in found.attrs["notes"][0]
        t, df = found["statistic"], found["df"]
        np.testing.assert_allclose(found["p_value"], scipy.stats.f.sf(t**2 / (k - 1), k - 1, df), rtol=1e-9)
        rank = k - 1 if means.by else k
        np.testing.assert_allclose(p[keep], scipy.stats.f.sf(t**2 / rank, rank, df)[keep], rtol=1e-5, atol=5e-8)
        return
    if entry["adjust"] == "tukey" and np.isnan(p).any():
        # Beside what cannot be estimated emmeans rounds degrees of freedom to whole numbers, for p values only.
        k = len(means.cells) // (means.cells[list(means.by)].drop_duplicates().shape[0] if means.by else 1)
        t, df = np.abs(found["statistic"]), found["df"]
        rounded = studentized_range_tail(np.sqrt(2) * t, k, np.round(df))
        np.testing.assert_allclose(rounded, p, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(found["p_value"], studentized_range_tail(np.sqrt(2) * t, k, df), rtol=1e-10)
    else:
        np.testing.assert_allclose(found["p_value"][keep], p[keep], rtol=1e-5, atol=5e-8)
    if entry["adjust"] == "tukey":
        half = (found["upper"] - found["lower"]) / 2 / found["std_error"]
        np.testing.assert_allclose(half, numbers(entry, "critical"), rtol=2e-8)
        # R's own quantile of the studentized range is good to four digits.
        for column in ("lower", "upper"):
            np.testing.assert_allclose(found[column], numbers(entry, column), atol=2e-3 * scale_of(name))
    else:
        compare(found[keep], {"table": {k: np.array(v, float)[keep] for k, v in entry["table"].items()}},
                ["lower", "upper"], scale_of(name))  # fmt: skip


@pytest.mark.parametrize(("name", "ddf", "entry"), entries("interaction"))
def test_products_of_contrasts_are_emmeans(name, ddf, entry):
    methods = entry["methods"]
    found = means_of(name, entry["spec"], ddf).contrasts(interaction=methods[0] if len(methods) == 1 else methods)
    # emmeans' first factor varies fastest.
    sizes = [found[column].nunique() for column in found.columns[:2]]
    found = found.iloc[np.arange(len(found)).reshape(sizes).T.ravel()]
    compare(found, entry, COLUMNS, scale_of(name))
    assert "not adjusted" in found.attrs["notes"][0]


@pytest.mark.parametrize(("name", "ddf", "entry"), entries("eff_size"))
def test_effect_sizes_are_emmeans(name, ddf, entry):
    means = means_of(name, entry["spec"], ddf)
    found = means.eff_size(sigma=entry["sigma"], edf=entry["edf"])
    expected = {"table": entry["table"] | {"estimate": entry["table"]["effect.size"]}}
    compare(found, expected, ["estimate", "std_error"], 1.0)
    # emmeans' degrees of freedom there are those of the means; here every contrast has its own.
    own = means.contrasts(adjust="none")["df"]
    np.testing.assert_array_equal(found["df"], own)
    half = scipy.stats.t.ppf(0.975, own) * found["std_error"]
    np.testing.assert_allclose(found["upper"], found["estimate"] + half, rtol=1e-9)
    np.testing.assert_allclose(found["lower"], found["estimate"] - half, rtol=1e-9)


@pytest.mark.parametrize(("name", "ddf", "entry"), entries("letters"))
def test_letters_are_those_of_cld(name, ddf, entry):
    means = means_of(name, entry["spec"], ddf)
    found = means.letters(adjust=entry["adjust"])
    groups = [text.strip() if text else "" for text in entry["table"][".group"]]
    estimate = numbers(entry, "emmean")
    np.testing.assert_allclose(found["estimate"], estimate, atol=1e-6 * scale_of(name))
    digits = ["".join(str("abcdefghi".index(letter) + 1) for letter in text) for text in found["group"]]
    expected = ["" if np.isnan(e) else text.replace(" ", "") for e, text in zip(estimate, groups, strict=True)]
    assert digits == expected


@pytest.mark.parametrize(("name", "ddf", "entry"), entries("joint"))
def test_joint_tests_are_emmeans(name, ddf, entry):
    by = entry["by"] or None
    found = fit(name).joint_tests(by, ddf)
    expected = pd.DataFrame(entry["table"])
    expected = expected[~expected["term"].str.contains("confounded") & (expected["df1"] > 0)]
    for _, row in expected.iterrows():
        own = found[(found["term"] == row["term"])]
        if by:
            own = own[own[by] == row[by]]
        (own,) = own.to_dict("records")
        assert own["num_df"] == row["df1"]
        if ddf == "satterthwaite":
            np.testing.assert_allclose(own["statistic"], row["exact"], rtol=1e-6)
        elif own["num_df"] == 1:
            np.testing.assert_allclose(own["statistic"], row["exact"], rtol=2e-5)
        if own["num_df"] == 1 or name in ("cake", "split_plot"):
            np.testing.assert_allclose(own["den_df"], row["df2"], atol=0.006)  # which it rounds
    assert set(found.loc[found["num_df"] > 0, "term"]) == set(expected["term"])


MVT = [
    pytest.param(entry, id=f"{name}-{entry['spec']}-{entry['method']}-{entry['df']}")
    for name in NAMES
    for entry in reference(name)["mvt"]
]


@pytest.mark.parametrize("entry", MVT)
def test_multivariate_t_is_mvtnorms(entry):
    R = np.array(entry["correlation"])
    sizes, vectors = np.linalg.eigh(R)
    largest = LargestT(vectors * np.sqrt(np.maximum(sizes, 0.0)))
    found = largest.tail(np.array(entry["t"]), np.full(3, float(entry["df"] or np.inf)))
    assert (found.error == 0.0) == largest.is_exact
    np.testing.assert_allclose(found.value, entry["p"], atol=2e-8 + found.error + 1.5 * max(entry["error"]))
    if "quadrature" in entry:
        assert largest.is_exact
        np.testing.assert_allclose(found.value, entry["quadrature"], rtol=1e-8, atol=1e-10)


# --- one family of all cells ------------------------------------------------------------------------------------------


def test_one_family_of_all_cells_is_that_of_the_same_weights_by_hand():
    within = fit("trial").emmeans("arm | visit")
    together = within.contrasts("trt.vs.ctrl", family="all")
    cells = fit("trial").emmeans("visit * arm")
    rows = within.contrast_rows("trt.vs.ctrl")
    by_hand = cells.contrasts({str(i): w for i, w in enumerate(rows.weights)}, "mvt")
    columns = list(COLUMNS)
    pd.testing.assert_frame_equal(pd.DataFrame(together)[columns], pd.DataFrame(by_hand)[columns])
    assert f"mvt (multivariate t) for {len(together)} tests" in together.attrs["notes"][0]
    assert "within" not in together.attrs["notes"][0]
    alone = within.contrasts("trt.vs.ctrl", "none")
    bonferroni = np.minimum(1.0, len(alone) * alone["p_value"])
    assert (alone["p_value"] <= together["p_value"]).all()
    assert (together["p_value"] <= bonferroni + 1e-12).all()
    assert (together["p_value"] > within.contrasts("trt.vs.ctrl")["p_value"]).all()


@pytest.mark.parametrize("adjust", ["sidak", "bonferroni", "holm", "fdr"])
def test_steps_over_one_family_of_all_cells(adjust):
    means = fit("trial").emmeans("arm | visit")
    p = means.contrasts("pairwise", "none")["p_value"].to_numpy()
    found = means.contrasts("pairwise", adjust, family="all")["p_value"].to_numpy()
    m, order = len(p), np.argsort(p)
    if adjust == "sidak":
        expected = 1 - (1 - p) ** m
    elif adjust == "bonferroni":
        expected = np.minimum(1, m * p)
    elif adjust == "holm":
        expected = np.empty(m)
        expected[order] = np.minimum(1, np.maximum.accumulate(p[order] * (m - np.arange(m))))
    else:
        expected = scipy.stats.false_discovery_control(p)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_a_family_of_one_cell_and_what_has_no_family():
    means = fit("cake").emmeans("recipe")
    pd.testing.assert_frame_equal(means.contrasts(family="all"), means.contrasts())
    within = fit("cake").emmeans("recipe | temperature")
    with pytest.raises(ValueError, match="within one cell; with family='all' use 'mvt'"):
        within.contrasts(adjust="tukey", family="all")
    with pytest.raises(ValueError, match="family must be 'within' or 'all', got 'each'"):
        within.contrasts(family="each")
