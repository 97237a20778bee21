"""Deletion diagnostics: HLMdiag's numbers, fits of the table without the rows, textbook least squares, invariances."""

import json
from dataclasses import replace
from functools import cache

import dense
import jax
import numpy as np
import pandas as pd
import pytest
from conftest import HERE, fit_of, table
from designs import STRUCTURES, random_design, random_theta

import mixjax as mj
from mixjax.checks import DataError, InferenceWarning
from mixjax.covariance import split_theta, triangle
from mixjax.design import Labels, TermLabels
from mixjax.diagnostics.deletion import batches
from mixjax.diagnostics.fixed_theta import delete_at_theta, fixed_part
from mixjax.diagnostics.influence import LEVERAGES, MEASURES, METHODS, influence
from mixjax.engine import engine
from mixjax.engine.incidence import incidence
from mixjax.estimation.estimate import Estimates
from mixjax.fitted.record import Fitted, OptimizerInfo
from mixjax.formula.table import level_name

MODELS = [(name, method) for name in ("sleepstudy_slopes", "sleepstudy_intercept") for method in ("REML", "ML")]
LEVELS = {"obs": None, "group": "Subject"}


@cache
def reference(name, method):
    return json.loads((HERE / "oracle" / f"diagnostics_{name}_{method}.json").read_text())


@cache
def result_of(name, method, by, how="exact"):
    return influence(fit_of(name, method).record, by, how)


def columns(part, names):
    return np.column_stack([np.array(part[name], float) for name in names])


# --- HLMdiag ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("name", "method"), MODELS)
def test_refits_are_those_of_lme4(name, method, level):
    result, expected = result_of(name, method, LEVELS[level]), reference(name, method)[f"full_refit_{level}"]
    assert [str(u + 1) if level == "obs" else u for u in result.units] == expected["unit"]
    names = ["cooksd", "mdffits", "covtrace", "covratio"]
    # A trace near zero is the difference of numbers near 2.
    np.testing.assert_allclose(result.measures, columns(expected["measures"], names), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(result.beta, columns(expected["fixef"], ["(Intercept)", "Days"]), rtol=1e-9)
    entries = [key for key in expected["varcomp"] if key != "row_names"]
    np.testing.assert_allclose(result.variances, columns(expected["varcomp"], entries), rtol=1e-6)
    np.testing.assert_allclose(result.rvc, columns(expected["rvc"], entries), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("name", "method"), MODELS)
def test_at_fixed_theta_as_HLMdiag(name, method, level):
    result, expected = result_of(name, method, LEVELS[level], "fixed-theta"), reference(name, method)
    own = expected[f"influence_{level}"]
    # HLMdiag's own solutions carry eight to ten digits; those of a trace near zero fewer.
    names = ["cooksd", "mdffits", "covtrace", "covratio"]
    np.testing.assert_allclose(result.measures, columns(own, names), rtol=1e-6, atol=1e-8)
    names = ["leverage.overall", "leverage.fixef", "leverage.ranef", "leverage.ranef.uc"]
    np.testing.assert_allclose(result.leverages, columns(own, names), rtol=1e-6)
    change = columns(expected[f"influence_{level}_change"]["cooks"], ["(Intercept)", "Days"])
    np.testing.assert_allclose(result.dfbeta, change, rtol=1e-6, atol=1e-8)
    assert (result.rvc == 0).all(axis=None)


def test_refits_of_case_delete_are_near():
    """HLMdiag's own refits stop where lmer's default optimiser does: four digits."""
    expected = reference("sleepstudy_slopes", "REML")["hlmdiag_case_delete_group"]
    result = result_of("sleepstudy_slopes", "REML", "Subject")
    np.testing.assert_allclose(result.cooks, expected["cooksd"], rtol=1e-6)
    np.testing.assert_allclose(result.rvc["sigma2"], expected["rvc"]["sigma2"], atol=2e-5)


# --- fits of the table without the rows ------------------------------------------------------------------------------


def assert_same_fit(result, u, fit, rtol=1e-8):
    """Row u of the result is the fit of the other rows; rtol of standard errors, and of the largest covariance."""
    est, se = fit.estimates, fit.se.to_numpy()
    assert np.abs(result.beta.iloc[u] - est.beta).max() <= rtol * se.max()
    assert result.sigma.iloc[u] == pytest.approx(est.sigma, rel=rtol)
    np.testing.assert_allclose(result.vcov[u], est.vcov, rtol=0, atol=rtol * np.abs(est.vcov).max())
    for many, one in zip(result._without.Sigma, est.Sigma, strict=True):
        np.testing.assert_allclose(many[u], one, rtol=0, atol=rtol * est.sigma**2 + rtol * np.abs(one).max())
    assert result.singular.iloc[u] == est.singular


CASES = {
    "weights": ("sleepstudy_weighted", "ML", None),
    "weights, groups": ("sleepstudy_weighted", "REML", "Subject"),
    "a column that is no grouping factor": ("sleepstudy_slopes", "REML", "Days"),
    "nested, outer": ("pastes_nested", "REML", "batch"),
    "nested, inner": ("pastes_nested", "ML", "cask:batch"),
    "crossed": ("penicillin", "REML", None),
    "crossed, the larger factor": ("penicillin", "ML", "plate"),
    "crossed, the smaller factor": ("penicillin", "REML", "sample"),
    "singular": ("singular_correlation_one", "REML", "g"),
}


@pytest.mark.parametrize("case", CASES)
def test_refits_are_fits_of_the_other_rows(case):
    name, method, by = CASES[case]
    fit = fit_of(name, method)
    result, frame = influence(fit.record, by), fit.labels.frame
    if by is None:
        labels = np.arange(len(frame))
    elif by in frame:
        labels = frame[by].map(level_name).to_numpy()
    else:
        term = next(t for t, label in enumerate(fit.labels.terms) if label.group == by)
        labels = np.array(fit.labels.terms[term].levels)[fit.design.terms[term].group]
    assert result.converged.all()
    for u in {0, 1, len(result.units) // 2, len(result.units) - 1}:
        left = labels != (u if by is None else result.units[u])
        weights = fit.design.weights
        other = mj.lmm(fit.labels.formula, frame[left], reml=method == "REML",
                       weights=None if weights is None else weights[left], check_identifiable=False)  # fmt: skip
        assert_same_fit(result, u, other)
        assert result.rows.iloc[u] == (~left).sum()


@pytest.mark.parametrize("how", ["exact", "one-step"])
def test_large_crossed_designs_go_one_by_one_over_sparse_rows(monkeypatch, how):
    """The same numbers by the other way, which a small design is made to take."""
    fitted = fit_of("penicillin", "REML").record
    usual = influence(fitted, "sample", how)
    monkeypatch.setattr("mixjax.engine.incidence.FEW_PRODUCTS", 0)
    monkeypatch.setattr("mixjax.products.sizes.MOST_DENSE_AT_ONCE", 0)
    monkeypatch.setattr("mixjax.products.sizes.MOST_COLUMNS", -1)
    taken = []
    monkeypatch.setattr(engine, "incidence", lambda *args, **how: taken.append(incidence(*args, **how)) or taken[-1])
    other = influence(fitted, "sample", how)
    assert 1 <= len(taken) < len(usual.units)
    assert all(taken)
    np.testing.assert_allclose(other.measures, usual.measures, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(other.theta, usual.theta, rtol=1e-7)


def test_a_singular_fit_can_be_regular_without_a_unit():
    result = influence(fit_of("singular_correlation_one", "REML").record, "g")
    assert result.counts["singular"] == result.singular.sum() > 0
    assert len(result.singular) == result.counts["units"]


def test_a_group_that_carries_nearly_everything():
    """All but 1e-13 of the spread of Days, and nearly all of the response's, is one subject's: products of the others
    that were found by subtraction would have no digits."""
    data = table("sleepstudy").copy()
    rest = data["Subject"] != "308"
    data["Days"] = np.where(rest, 5 + 1e-4 * (data["Days"] - 4.5), 1e3 * data["Days"])
    data["Reaction"] = np.where(rest, data["Reaction"], 1e6 + data["Reaction"])
    fit = mj.lmm("Reaction ~ Days + (1 | Subject)", data)
    result = influence(fit.record, "Subject")
    assert_same_fit(result, 0, mj.lmm(fit.labels.formula, data[rest]), rtol=1e-6)  # which processor, decides on 1e-7
    assert_same_fit(result, 5, mj.lmm(fit.labels.formula, data[data["Subject"] != result.units[5]]), rtol=1e-6)


@pytest.mark.parametrize("how", METHODS)
def test_a_unit_that_alone_determines_a_fixed_effect_is_counted(how):
    data = table("sleepstudy").copy()
    data["Days"] = np.where(data["Subject"] == "310", data["Days"], 3.0)
    fit = mj.lmm("Reaction ~ Days + (1 | Subject)", data)
    with pytest.warns(InferenceWarning, match="1 of 18 deletions left no estimates .*310"):
        result = influence(fit.record, "Subject", how)
    assert result.result["310"] == "RANK_DEFICIENT"
    assert result.counts["failed"] == result.counts["failed: RANK_DEFICIENT"] == 1
    frame = result.to_frame()
    lost = frame.loc["310", [*MEASURES, "dfbetas_Days", "rvc_sigma2"]]
    assert lost.isna().all()
    assert frame.drop(index="310")[list(MEASURES)].notna().all(axis=None)
    assert np.isnan(result.theta.loc["310"]).all()
    assert "310 (X loses rank)" in str(result)
    assert result.ranked().index[-1] == "310"


# --- products without rows, and counted rows --------------------------------------------------------------------------


def record(design, theta=None, sigma=1.3):
    """A fit without fitting: any theta, beta by generalised least squares."""
    terms = tuple(
        TermLabels(f"g{t}", tuple(f"e{t}{j}" for j in range(term.Z.shape[1])), tuple(map(str, range(term.n_groups))))
        for t, term in enumerate(design.terms)
    )
    frame = pd.DataFrame({"third": np.arange(len(design.y)) // 3})
    labels = Labels("y ~ ...", "y", tuple(f"x{j}" for j in range(design.X.shape[1])), terms, frame)
    stats = mj.cross_products(design)
    Sigmas = sigmas_of(theta, stats.layout.qs, sigma)
    beta, vcov = least_squares(design, Sigmas, sigma)
    est = Estimates(theta, beta, np.float64(sigma), Sigmas, vcov, (), 0.0, True, np.bool_(False), 0, 0.0, 0)
    return Fitted(labels, stats, est, True, OptimizerInfo("", 0, 0.0, ""), design)


def sigmas_of(theta, qs, sigma):
    result = []
    for part, q in zip(split_theta(theta, qs), qs, strict=True):
        Lambda = np.zeros((q, q))
        Lambda[triangle(q)] = part
        result.append(sigma**2 * Lambda @ Lambda.T)
    return tuple(result)


def least_squares(design, Sigmas, sigma):
    W = np.linalg.inv(dense.covariance(design, Sigmas, sigma))
    vcov = np.linalg.inv(design.X.T @ W @ design.X)
    return vcov @ design.X.T @ W @ (design.y - (0.0 if design.offset is None else design.offset)), vcov


def some(design, at):
    pick = lambda a: None if a is None else a[at]  # noqa: E731
    terms = tuple(replace(term, Z=term.Z[at], group=term.group[at]) for term in design.terms)
    return mj.Design(design.y[at], design.X[at], terms, pick(design.weights), pick(design.offset))


def units(design, kind):
    n = len(design.y)
    codes = {"rows": np.arange(n), "thirds": np.arange(n) // 3, "levels": design.terms[0].group}[kind]
    return np.unique(codes, return_inverse=True)[1].reshape(-1)


@pytest.mark.parametrize("name", STRUCTURES)
def test_products_without_rows_and_with_rows_counted_twice(name):
    structure = STRUCTURES[name]
    design, theta = random_design(structure, 5), random_theta(structure, 5)
    fitted = record(design, theta)
    rows, lambdas = fitted.rows, [np.asarray(S) for S in sigmas_of(theta, fitted.stats.layout.qs, 1.0)]
    lambdas = [np.linalg.cholesky(S) for S in lambdas]
    criterion = jax.jit(mj.criterion, static_argnames="reml")
    with jax.enable_x64(True):
        for kind in ("rows", "levels"):
            unit = units(design, kind)
            for deleted, stats in batches(rows, unit):
                for i in (0, len(deleted) // 2, len(deleted) - 1):
                    one = jax.tree.map(lambda a, i=i: a[i], stats)
                    expected = dense.criterion(some(design, unit != deleted[i]), lambdas, True)
                    assert float(criterion(theta, one, True)) == pytest.approx(expected, rel=1e-11)
        counts = np.random.default_rng(0).integers(0, 3, len(design.y)).astype(float)
        repeated = some(design, np.repeat(np.arange(len(design.y)), counts.astype(int)))
        expected = dense.criterion(repeated, lambdas, True)
        assert float(criterion(theta, rows.sums(counts), True)) == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("kind", ["rows", "thirds", "levels"])
@pytest.mark.parametrize("name", STRUCTURES)
def test_fixed_theta_is_least_squares_of_the_other_rows(name, kind):
    structure = STRUCTURES[name]
    for seed in (0, 1):
        design, theta = random_design(structure, seed), random_theta(structure, seed)
        fitted, unit = record(design, theta), units(design, kind)
        result = influence(fitted, pd.Series(unit, fitted.labels.frame.index), "fixed-theta")
        for position, label in enumerate(result.units):
            left = unit != int(label)
            beta, vcov = least_squares(some(design, left), fitted.estimates.Sigma, fitted.estimates.sigma)
            np.testing.assert_allclose(result.beta.iloc[position], beta, rtol=1e-9, atol=1e-10)
            np.testing.assert_allclose(result.vcov[position], vcov, rtol=1e-9, atol=1e-12)


def test_the_whole_inverse_and_single_columns_of_it_agree(monkeypatch):
    structure = STRUCTURES["nested and crossed"]
    design, theta = random_design(structure, 2), random_theta(structure, 2)
    fitted = record(design, theta)
    rows, unit = fitted.rows, units(design, "thirds")
    whole = delete_at_theta(rows, unit, fixed_part(fitted, rows), np.zeros(0))
    monkeypatch.setattr("mixjax.diagnostics.fixed_theta.MOST_DENSE", 0)
    monkeypatch.setattr("mixjax.diagnostics.fixed_theta.BLOCK", 100)
    by_columns = delete_at_theta(rows, unit, fixed_part(fitted, rows), np.zeros(0))
    for one, other in zip(whole, by_columns, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-10, atol=1e-14)


# --- measures --------------------------------------------------------------------------------------------------------


def test_measures_are_their_definitions():
    fit, result = fit_of("sleepstudy_slopes", "REML"), result_of("sleepstudy_slopes", "REML", "Subject")
    V, p = fit.vcov.to_numpy(), 2
    for u in range(18):
        d, V_u = fit.fixef.to_numpy() - result.beta.iloc[u].to_numpy(), result.vcov[u]
        assert result.cooks.iloc[u] == pytest.approx(d @ np.linalg.solve(V, d) / p, rel=1e-9)
        assert result.mdffits.iloc[u] == pytest.approx(d @ np.linalg.solve(V_u, d) / p, rel=1e-9)
        assert result.covtrace.iloc[u] == pytest.approx(abs(np.trace(np.linalg.solve(V, V_u)) - p), abs=1e-12)
        assert result.covratio.iloc[u] == pytest.approx(np.linalg.det(V_u) / np.linalg.det(V), rel=1e-9)
    np.testing.assert_allclose(result.dfbeta, fit.fixef - result.beta, rtol=1e-12)
    np.testing.assert_allclose(result.dfbetas, result.dfbeta / result.se, rtol=1e-12)
    np.testing.assert_allclose(result.dftheta, fit.theta - result.theta, rtol=1e-12, atol=1e-15)


# --- one step --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("name", "method"), MODELS)
def test_one_step_has_the_pattern_of_the_refits(name, method, level):
    exact, step = result_of(name, method, LEVELS[level]), result_of(name, method, LEVELS[level], "one-step")
    assert (step.result == "COMPUTED").all()

    def agreement(a, b):
        return min(np.corrcoef(a[:, j], b[:, j])[0, 1] for j in range(a.shape[1]))

    assert agreement(exact.cooks.to_numpy()[:, None], step.cooks.to_numpy()[:, None]) > 0.9999
    assert agreement(exact.beta.to_numpy(), step.beta.to_numpy()) > 0.9999
    assert agreement(exact.theta.to_numpy(), step.theta.to_numpy()) > 0.95
    assert agreement(exact.sigma.to_numpy()[:, None], step.sigma.to_numpy()[:, None]) > 0.95


def test_one_step_is_newtons_step():
    """One random intercept: theta is the optimiser's coordinate up to scale; derivatives by central differences."""
    fit, result = (
        fit_of("sleepstudy_intercept", "REML"),
        result_of("sleepstudy_intercept", "REML", "Subject", "one-step"),
    )
    theta, h = fit.theta[0], 1e-3
    for u in (0, 3, 17):
        left = fit.labels.frame["Subject"].astype(str).to_numpy() != result.units[u]
        rest = some(fit.design, left)
        values = {k: dense.criterion(rest, [np.array([[theta + k * h]])], True) for k in (-2, -1, 0, 1, 2)}
        slope = (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * h)
        curvature = (16 * (values[1] + values[-1]) - (values[2] + values[-2]) - 30 * values[0]) / (12 * h**2)
        assert result.theta.iloc[u, 0] == pytest.approx(theta - slope / curvature, rel=1e-7)
        Sigma = result.sigma.iloc[u] ** 2 * result.theta.iloc[u, 0] ** 2
        beta, vcov = least_squares(rest, [np.array([[Sigma]])], result.sigma.iloc[u])
        np.testing.assert_allclose(result.beta.iloc[u], beta, rtol=1e-10)
        np.testing.assert_allclose(result.vcov[u], vcov, rtol=1e-9, atol=1e-9)


@cache
def without_variance():
    """Subjects with one and the same mean: their variance is estimated as zero."""
    data = table("sleepstudy").copy()
    data["Reaction"] -= data.groupby("Subject", observed=True)["Reaction"].transform("mean")
    fit = mj.lmm("Reaction ~ Days + (1 | Subject)", data)
    assert fit.theta[0] == 0
    return fit


def of_least_squares(fit, i):
    X, y = np.delete(fit.design.X, i, 0), np.delete(fit.design.y, i)
    beta, rss, *_ = np.linalg.lstsq(X, y)
    return beta, np.sqrt(rss[0] / (len(y) - 2))


@pytest.mark.parametrize("how", ["exact", "one-step"])
def test_without_variance_least_squares_is_left(how):
    fit = without_variance()
    result = influence(fit.record, None, how)
    assert result.singular.all()
    assert (result.theta == 0).all(axis=None)
    assert result.rvc["var_Intercept|Subject"].isna().all()
    for i in (0, 50, 179):
        beta, sigma = of_least_squares(fit, i)
        np.testing.assert_allclose(result.beta.iloc[i], beta, rtol=1e-9, atol=1e-9)
        assert result.sigma.iloc[i] == pytest.approx(sigma, rel=1e-10)


# --- invariances -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", METHODS)
def test_order_of_rows_names_of_groups_and_scale_do_not_matter(how):
    data = table("sleepstudy")
    result = result_of("sleepstudy_slopes", "REML", "Subject", how)
    moved = data.sample(frac=1, random_state=1)
    moved = moved.assign(
        Subject=moved["Subject"].astype(str).map(lambda s: f"x{int(s) * 7919 % 1000:03d}"),
        Reaction=7e3 + 0.01 * moved["Reaction"],
        Days=1990 + moved["Days"] / 365,
    )
    other = influence(mj.lmm("Reaction ~ Days + (Days | Subject)", moved).record, "Subject", how)
    expected = result.measures.rename(index=lambda s: f"x{int(s) * 7919 % 1000:03d}").loc[other.units]
    assert not expected.index.duplicated().any()
    # A Newton step depends on the coordinates: those of Z's basis do not change with the rows' order, units or origin.
    np.testing.assert_allclose(other.measures, expected, rtol=1e-6, atol=1e-7)
    first = list(dict.fromkeys(moved["Subject"]))
    assert list(other.units) == first


def test_rows_keep_the_names_of_the_table():
    data = table("sleepstudy").set_index(pd.Index([f"r{i}" for i in range(180)], name="case"))
    result = influence(
        mj.lmm("Reaction ~ Days + (Days | Subject)", data, subset="Days > 0").record, method="fixed-theta"
    )
    assert result.units.name == "case"
    assert list(result.units[:2]) == ["r1", "r2"]
    assert (result.rows == 1).all()


def test_by_a_list_of_columns_and_by_labels_of_the_table():
    fit = fit_of("sleepstudy_slopes", "REML")
    data = fit.labels.frame
    both = influence(fit.record, ["Subject", "Days"], "fixed-theta")
    single = influence(fit.record, method="fixed-theta")
    np.testing.assert_allclose(both.cooks, single.cooks, rtol=1e-9, atol=1e-14)
    assert both.units.name == "Subject:Days"
    assert both.units[1] == "308:1"
    joined = influence(fit.record, "Days:Subject", "fixed-theta")
    np.testing.assert_array_equal(joined.cooks, both.cooks)
    assert joined.units[1] == "1:308"
    named = influence(fit.record, data["Subject"].rename("person"), "fixed-theta")
    assert named.units.name == "person"
    by_name = influence(fit.record, "Subject", "fixed-theta")
    np.testing.assert_array_equal(named.measures, by_name.measures)
    as_list = influence(fit.record, data["Subject"].astype(str).tolist(), "fixed-theta")
    np.testing.assert_array_equal(as_list.measures, by_name.measures)


# --- tables ----------------------------------------------------------------------------------------------------------


def test_frame_ranks_and_flags():
    result = result_of("sleepstudy_slopes", "REML", None)
    frame = result.to_frame()
    names = ["rows", *MEASURES, *LEVERAGES, "dfbetas_Intercept", "dfbetas_Days", "rvc_sigma2",
             "rvc_var_Intercept|Subject", "rvc_cov_Days.Intercept|Subject", "rvc_var_Days|Subject",
             "singular", "result"]  # fmt: skip
    assert list(frame.columns) == names
    assert frame.shape == (180, len(names))
    ranked = result.ranked()
    assert ranked["cooks"].is_monotonic_decreasing
    assert (result.ranked("covratio", n=3)["covratio"] - 1).abs().is_monotonic_decreasing
    assert result.ranked("dfbetas_Days", n=1).index[0] == result.dfbetas["Days"].abs().idxmax()

    q1, q3 = np.quantile(result.cooks, [0.25, 0.75])
    flagged = result.flagged()
    assert set(flagged.index) == set(frame.index[frame["cooks"] > q3 + 3 * (q3 - q1)])
    assert len(flagged) > 0
    assert set(result.flagged(rule="size").index) == set(frame.index[frame["cooks"] > 4 / 180])
    assert set(result.flagged("covratio", "size").index) == set(frame.index[(frame["covratio"] - 1).abs() > 6 / 180])
    assert set(result.flagged("dfbetas_Days", 0.1).index) == set(frame.index[frame["dfbetas_Days"].abs() > 0.1])
    assert result.cutoff("leverage_overall", "size")[1] == pytest.approx(3 * frame["leverage_overall"].mean())
    text = str(result)
    assert "Influence of 180 rows" in text
    assert "180 fitted, 0 singular, 0 failed" in text
    assert f"{len(flagged)} by cooks" in text
    assert repr(result).startswith("<Influence, exact: 180 units")


def test_units_that_are_all_alike_are_not_flagged():
    """In a balanced design every subject brings the same precision: no box, and rounding is no reason to stand out."""
    result = result_of("sleepstudy_slopes", "REML", "Subject", "fixed-theta")
    assert np.ptp(result.covratio) < 1e-12
    assert result.flagged("covratio").empty


def test_bad_input_is_named():
    fit = fit_of("sleepstudy_slopes", "REML")
    with pytest.raises(ValueError, match="method must be one of 'exact'"):
        influence(fit.record, method="approximate")
    with pytest.raises(DataError, match=r"no column 'subject'.*did you mean 'Subject'"):
        influence(fit.record, "subject")
    with pytest.raises(DataError, match="no column 'clinic'"):
        influence(fit.record, ["Subject", "clinic"])
    with pytest.raises(DataError, match=r"by has shape \(3,\), but the table has 180 rows"):
        influence(fit.record, [1, 2, 3])
    with pytest.raises(DataError, match="missing in 1 of the used rows"):
        influence(fit.record, [None, *["a", "b"] * 89, "a"])
    with pytest.raises(ValueError, match="one level"):
        influence(fit.record, ["a"] * 180)
    result = result_of("sleepstudy_slopes", "REML", None)
    with pytest.raises(ValueError, match="no measure 'cook'"):
        result.ranked("cook")
    with pytest.raises(ValueError, match="rule must be"):
        result.flagged(rule="hampel")
    with pytest.raises(ValueError, match="no cut-off by size for 'rvc_sigma2'"):
        result.flagged("rvc_sigma2", "size")
    chunks = (table("sleepstudy").iloc[at : at + 60] for at in (0, 60, 120))
    stream = mj.lmm("Reaction ~ Days + (Days | Subject)", list(chunks))
    with pytest.raises(ValueError, match="chunks of rows, which were not kept"):
        influence(stream.record)
