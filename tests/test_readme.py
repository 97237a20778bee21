"""The README and the documents tell the truth: their code runs, and what they say is printed is printed."""

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import HERE, fit_of

import mixjax as mj

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

NAMES = ("analyses", "populations", "studies", "predictions", "inference", "tables", "tutorial", "embedding",
         "troubleshooting", "generalized", "singular", "convergence", "scaling", "how", "index",
         "mmrm", "structures", "smooths", "bayes", "scikit_learn", "tour")  # fmt: skip
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES)]


@cache
def names_after(page):
    """What the code of a page leaves behind; run in the working directory of the test that asks first."""
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block, page.name, "exec"), names)
    return names


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    if page.stem == "scikit_learn":
        pytest.importorskip("sklearn", reason='pip install "mixjax[sklearn]"')
    names_after(page)


def test_what_the_page_on_scikit_learn_says_of_its_scores():
    pytest.importorskip("sklearn", reason='pip install "mixjax[sklearn]"')
    names = names_after(ROOT / "docs" / "scikit_learn.md")
    assert names["known"].mean() == pytest.approx(0.7, abs=0.05)
    assert abs(names["new"].mean()) < 0.05


def test_what_the_page_on_embedding_says_of_its_examples():
    names = names_after(ROOT / "docs" / "embedding.md")
    # One program for all batches, and the residual standard deviation that was drawn.
    assert names["batch_step"]._cache_size() == names["step"]._cache_size() == 1
    losses, (_, variances) = names["losses"], names["params"]
    assert np.mean(losses[:4]) == pytest.approx(1.4, abs=0.1)
    assert np.mean(losses[-4:]) == pytest.approx(0.5, abs=0.05)
    assert np.exp(variances.log_sigma) == pytest.approx(0.3, abs=0.03)
    # Information against its closed form, sigma^2 (X'X)^{-1} + D; no times on a grid are better.
    L = np.array([[np.exp(3.2), 0.0, 0.0], [1.0, np.exp(1.7), 0.0], [0.0, 0.0, 0.0]])

    def log_det(times):
        X = np.vander(times, 3, increasing=True)
        return -np.linalg.slogdet(25.0**2 * np.linalg.inv(X.T @ X) + L @ L.T)[1]

    assert float(names["value"].max()) == pytest.approx(log_det(names["times"]), abs=1e-3)
    grid = max(
        log_det(np.array([0.0] * a + [middle] * b + [10.0] * (6 - a - b)))
        for a in range(1, 5)
        for b in range(1, 6 - a)
        for middle in np.arange(0.25, 10.0, 0.25)
    )
    assert grid - 0.01 < log_det(names["times"])
    np.testing.assert_allclose(names["times"], [0, 0, 4.5, 4.5, 4.5, 10], atol=0.1)


def test_printed_summary_is_the_real_one():
    shown = re.search(r"```text\n(.*?)```", README, flags=re.DOTALL)[1]
    assert shown.strip() == str(fit_of("sleepstudy_slopes", "REML").summary())


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target.partition("#")[0]).exists(), target


def test_names_in_the_documents_exist():
    """Every ``fit.name``, ``mj.name`` and ``plots.name`` of the README and the documents."""
    plots = pytest.importorskip("mixjax.plots", reason='pip install "mixjax[plots]"')
    homes = {"fit": (mj.LMMFit, mj.GLMMFit, mj.MMRMFit), "mj": (mj,), "plots": (plots,)}
    missing = {
        (page.name, f"{home}.{name}")
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for home, name in re.findall(r"(?<![\w./])(fit|mj|plots)\.([A-Za-z_]\w*)", page.read_text())
        if not any(hasattr(kind, name) for kind in homes[home])
    }
    assert not missing


# --- docs/analyses.md against R (tests/oracle/analyses.R) -------------------------------------------------------------

ANALYSES = ROOT / "docs" / "analyses.md"


@pytest.fixture
def analyses(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return names_after(ANALYSES), json.loads((HERE / "oracle" / "analyses.json").read_text())


def agree(found, expected, columns=("estimate", "std_error", "df", "statistic"), rtol=1e-6):
    for column in columns:
        np.testing.assert_allclose(found[column].to_numpy(float), expected[column], rtol=rtol, err_msg=column)


def test_the_tables_of_the_analyses_are_those_that_r_has_read(analyses):
    for name in ("trial", "split", "responses", "pilot"):
        made = analyses[0][name].reset_index(drop=True)
        read = pd.read_csv(HERE / "data" / f"analyses_{name}.csv")
        pd.testing.assert_frame_equal(made.astype(read.dtypes), read, check_dtype=False)


def test_the_trial_is_r_s(analyses):
    names, found = analyses[0], analyses[1]["trial"]
    fit = names["fit"]
    np.testing.assert_allclose(fit.criterion, found["criterion"], rtol=1e-10)
    np.testing.assert_allclose(fit.varcorr.to_frame()["sdcor"], found["sds"]["sdcor"], rtol=1e-5)
    interaction = fit.anova(ddf="kenward-roger").loc["arm:visit"]
    for column, value in found["interaction"].items():
        np.testing.assert_allclose(interaction[column], value, rtol=1e-6)
    agree(names["each_visit"], found["within"])
    agree(names["simultaneous"], found["all"])
    # Dunnett's distribution is the multivariate t, of which emmeans takes random lattices at whole degrees of freedom.
    np.testing.assert_allclose(names["each_visit"]["p_value"], found["within_mvt"]["p_value"], atol=2e-3)
    np.testing.assert_allclose(names["simultaneous"]["p_value"], found["all"]["p_value"], atol=2e-3)
    for limit in ("lower", "upper"):
        np.testing.assert_allclose(names["simultaneous"][limit], found["all"][limit], atol=0.02)
    tests = fit.joint_tests(by="visit", ddf="kenward-roger").query("term == 'baseline'")
    np.testing.assert_allclose(tests["p_value"], found["joint"]["p.value"][:4], rtol=1e-5)


def test_the_split_plot_is_r_s(analyses):
    names, found = analyses[0], analyses[1]["split"]
    field, within = names["field"], names["within"]
    np.testing.assert_allclose(field.criterion, found["criterion"], rtol=1e-10)
    interaction = field.anova(ddf="kenward-roger").loc["irrigation:variety"]
    for column, value in found["interaction"].items():
        np.testing.assert_allclose(interaction[column], value, rtol=1e-6)
    agree(within.contrasts(), found["within"])
    np.testing.assert_allclose(within.contrasts()["p_value"], found["within"]["p_value"], rtol=1e-5, atol=2e-12)
    agree(within.contrasts(), found["within"], ("lower", "upper"), 1e-4)
    letters = within.letters()
    for column in ("irrigation", "variety", "group"):
        assert letters[column].tolist() == found["letters"][column]
    products = names["cells"].contrasts(interaction="pairwise")
    by_r = pd.DataFrame(found["products"])
    keys = ["irrigation_pairwise", "variety_pairwise"]
    by_r = by_r.set_index(keys).loc[list(map(tuple, products[keys].to_numpy()))]
    agree(products, {column: by_r[column].to_numpy() for column in by_r}, ("estimate", "std_error", "df", "p_value"))
    sizes = within.eff_size(edf=found["edf"])
    agree(sizes, {"estimate": found["sizes"]["effect.size"], "std_error": found["sizes"]["std_error"]},
          ("estimate", "std_error"))  # fmt: skip
    agree(within.eff_size(), {"std_error": found["sizes"]["std_error"]}, ("std_error",))


def test_the_crossed_design_is_r_s(analyses):
    names, found = analyses[0], analyses[1]["crossed"]
    for name in ("maximal", "uncorrelated", "supported"):
        np.testing.assert_allclose(names[name].criterion, found[name], atol=1e-6)
    assert names["maximal"].is_singular == found["singular"]
    assert names["supported"].labels.formula == "rt ~ A * B + (1 | subject) + (0 + A | subject) + (1 | item)"
    for name in ("maximal", "supported"):
        tidy = names[name].tidy("kenward-roger").query("effect == 'fixed'")
        agree(tidy, found[f"fixed_{name}"], ("estimate", "std_error", "df"))
        agree(tidy, found[f"fixed_{name}"], ("p_value",), 1e-5)
    tests = names["tests"].iloc[1:]
    by_r = dict(zip(found["ranova"]["term"], found["ranova"]["lrt"], strict=True))
    np.testing.assert_allclose(tests["lrt"], [by_r[term] for term in tests.index], rtol=1e-5)


def test_the_power_is_that_of_a_t_test_of_slopes(analyses):
    names, found = analyses[0], analyses[1]["pilot"]
    first = names["first"]
    np.testing.assert_allclose(first.criterion, found["criterion"], rtol=1e-10)
    tidy = first.tidy("kenward-roger").query("effect == 'fixed'")
    agree(tidy, found["fixed"], ("estimate", "std_error", "df"))
    exact = pd.DataFrame(found["power"]).set_index(["patients", "spread"])["power"]
    for row in names["sensitivity"].table.itertuples():
        expected = exact[row.patients, row.spread]
        assert abs(row.power - expected) < 4 * np.sqrt(expected * (1 - expected) / 400)
    curve = names["curve"].table
    assert len(curve) > 3
    for row in curve.itertuples():
        if (row.patients, 1.0) in exact.index:
            expected = exact[row.patients, 1.0]
            assert abs(row.power - expected) < 4 * np.sqrt(expected * (1 - expected) / 400) + row.singular / 400


def test_the_sick_animals_are_r_s(analyses):
    names, found = analyses[0], json.loads((HERE / "oracle" / "analyses_binomial.json").read_text())
    herds, both = names["herds"], names["both"]
    for name, sds in (("herds", [found["herds"]["sd"]]), ("both", found["both"]["sd"][::-1])):
        np.testing.assert_allclose(names[name].criterion, found[name]["m2logLik"], rtol=0, atol=1e-7)
        np.testing.assert_allclose(names[name].theta, sds, rtol=2e-4)
    assert found["both"]["sd_names"] == ["herd", "occasion"]
    np.testing.assert_allclose(both.fixef, found["both"]["fixef"], rtol=1e-5)
    np.testing.assert_allclose(both.se, found["both"]["se"], rtol=1e-4)
    np.testing.assert_allclose(herds.criterion - both.criterion, found["test"]["chisq"], atol=1e-6)
    period = both.drop1().loc["period"]
    np.testing.assert_allclose(period[["lrt", "p_value"]], list(found["period"].values()), rtol=1e-6)
    ratios = names["median"].contrasts("trt.vs.ctrl")
    agree(ratios, found["ratios"], ("odds_ratio", "std_error", "statistic"), 1e-4)
    agree(ratios, found["ratios"], ("lower", "upper"), 5e-3)  # of random lattices there, as p values
    np.testing.assert_allclose(ratios["p_value"], found["ratios"]["p_value"], atol=1e-3)
    means = names["average"].to_frame()["estimate"]
    np.testing.assert_allclose(means, found["means"]["average"], rtol=1e-5)
    np.testing.assert_allclose(names["median"].to_frame()["estimate"], found["means"]["median"], rtol=1e-5)
    odds = names["average"].regrid("logit").contrasts("trt.vs.ctrl")["odds_ratio"]
    np.testing.assert_allclose(odds, found["average_ratios"], rtol=1e-5)


def test_numbers_printed_in_the_analyses_are_those_of_the_code(analyses):
    names, text = analyses[0], ANALYSES.read_text()
    rows = {row.split("|")[1].strip(): row.split("|")[2].strip() for row in text.splitlines() if row.startswith("|")}

    def shown(start):
        (cell,) = (cell for head, cell in rows.items() if head.startswith(start))
        return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-\d+)?", cell)]

    def near(start, *values, error=0.0):
        found = shown(start)
        for number, value in zip(found, values, strict=True):
            digits = len(f"{number!r}".partition(".")[2]) if "e" not in f"{number!r}" else 8
            assert abs(number - value) <= 0.51 * 10.0**-digits + error, (start, number, value)

    f = names["fit"].anova(ddf="KR").loc["arm:visit"]
    near("`arm:visit`", f["statistic"], f["num_df"], f["den_df"], f["p_value"])
    one, all_of = names["each_visit"].iloc[-1], names["simultaneous"].iloc[-1]
    near("high against placebo at v4", one["estimate"], one["std_error"], one["df"])
    near("p and interval, family of the visit", one["p_value"], one["lower"], one["upper"])
    # Probabilities of eight dimensions are by lattices, good to 1e-3: of the limits, 1e-3 of their length (17.4).
    near("p and interval, family of all eight", all_of["p_value"], all_of["lower"], all_of["upper"], error=0.0174)
    f = names["field"].anova(ddf="KR").loc["irrigation:variety"]
    near("`irrigation:variety`", f["statistic"], f["num_df"], f["den_df"], f["p_value"])
    within = names["within"]
    which = within.contrasts().query("irrigation == 'high' and contrast == 'A - D'").index[0]
    c, d = within.contrasts().loc[which], within.eff_size().loc[which]
    near("A against D at high", c["estimate"], c["lower"], c["upper"])
    near("effect size", d["estimate"], d["std_error"], d["lower"], d["upper"])
    products = names["cells"].contrasts(interaction="pairwise")
    p = products.query("irrigation_pairwise == 'none - high' and variety_pairwise == 'A - D'").iloc[0]
    near("(none - high) x (A - D)", p["estimate"], p["p_value"])
    near("REML criterion of the maximal", names["maximal"].criterion)
    near("of the uncorrelated one", names["uncorrelated"].criterion)
    near("supported: REML", names["supported"].criterion)
    for start, name in (("`A`: standard error", "maximal"), ("the same in the supported", "supported")):
        a = names[name].tidy("KR").query("term == 'A'").iloc[0]
        near(start, a["std_error"], a["p_value"])
    herds, both = names["herds"], names["both"]
    near("herds alone", herds.criterion)
    near("occasions: chi-square", herds.criterion - both.criterion)
    near("standard deviations of herds and occasions", *both.theta[::-1])
    near("periods: chi-square", both.drop1().loc["period", "lrt"], both.drop1().loc["period", "p_value"])
    last = names["median"].contrasts("trt.vs.ctrl").iloc[-1]
    near("period 4 against 1, odds ratio", last["odds_ratio"], last["std_error"])
    near("its interval, Dunnett's", last["lower"], last["upper"])
    for start, means in (("sick in periods", "median"), ("sick on average", "average")):
        near(start, *names[means].to_frame()["estimate"].iloc[[0, 3]])
    odds = names["average"].regrid("logit").contrasts("trt.vs.ctrl")["odds_ratio"]
    near("odds ratio of the averages", odds.iloc[-1])
    spread = herds.overdispersion(key=1, n=1000)["p_value"]
    assert (
        f"p is {spread['simulation']:.2f} by simulation, where Pearson's usual ratio has {spread['pearson']:.2f}"
        in text
    )
