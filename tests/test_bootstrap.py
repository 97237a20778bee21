"""The bootstrap: what is drawn, what is made of the refits, and what happens to those that fail."""

import pickle
import sys
from dataclasses import replace
from functools import cache
from statistics import NormalDist

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from conftest import fit_of, table
from designs import STRUCTURES, random_design, random_theta

import mixjax as mj
from mixjax.checks import InferenceWarning
from mixjax.covariance import lambdas_of_theta
from mixjax.design import Labels, TermLabels
from mixjax.fitted import record as record_room
from mixjax.fitted.record import Fitted
from mixjax.resampling import intervals, kinds
from mixjax.resampling.bootstrap import _Kept, bootstrap
from mixjax.resampling.kinds import (
    TWO_POINTS,
    adjusted_residuals,
    cluster_products,
    outermost_clusters,
    reflated_effects,
    reflated_residuals,
)
from mixjax.simulation import draw_responses, simulate_responses

TERMS = ["sd_Intercept|Subject", "cor_Days.Intercept|Subject", "sd_Days|Subject", "sigma", "Intercept", "Days"]
KINDS = ["parametric", "residual", "cases", "wild"]


def slopes() -> Fitted:
    return fit_of("sleepstudy_slopes", "REML").record


@cache
def slopes_bootstrap(kind, n=4_000):
    return bootstrap(slopes(), key=2024, n=n, kind=kind)


@cache
def intercepts():
    """Dyestuff: six batches of five, one random effect."""
    return fit_of("dyestuff", "REML").record


@cache
def intercepts_bootstrap(kind, n=999):
    return bootstrap(intercepts(), key=3, n=n, kind=kind)


def unfitted(design) -> Fitted:
    """A record of a design that nothing was estimated of: enough for sums over rows."""
    terms = tuple(
        TermLabels(f"g{t}", tuple(f"x{j}" for j in range(term.Z.shape[1])), tuple(map(str, range(term.n_groups))))
        for t, term in enumerate(design.terms)
    )
    labels = Labels("y ~ ...", "y", tuple(f"x{j}" for j in range(design.X.shape[1])), terms, None)
    return Fitted(labels, mj.cross_products(design), None, True, None, design)


def scores(draws, expected):
    """Means of independent draws, in standard errors from what is expected."""
    draws = draws.reshape(len(draws), -1)
    return (draws.mean(axis=0) - np.ravel(expected)) / (draws.std(axis=0) / np.sqrt(len(draws)))


# --- the result ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_terms_and_counts(kind):
    result = slopes_bootstrap(kind)
    assert list(result.replicates.columns) == TERMS
    assert list(result.estimate.index) == TERMS
    fit = fit_of("sleepstudy_slopes", "REML")
    sdcor = fit.varcorr.to_frame()["sdcor"]
    np.testing.assert_array_equal(result.estimate.to_numpy(), [*sdcor[[0, 2, 1, 3]], *fit.fixef])
    assert result.counts["replicates"] == len(result.replicates) == 4_000
    assert result.counts["converged"] == result.converged.sum() == 4_000 - result.counts["failed"] == 4_000
    cor = result.replicates["cor_Days.Intercept|Subject"].abs()
    on_the_edge = ~(cor < 1 - 1e-9)
    assert result.counts["singular"] == on_the_edge.sum() > 0


def test_parametric_is_refits_of_simulated_responses():
    """The same numbers, to the last bit, as by the two steps that a user can take alone."""
    fit = fit_of("sleepstudy_slopes", "REML")
    est = fit.estimates
    batch = fit.refit_many(simulate_responses(fit.design, est.beta, est.sigma, est.Sigma, 2024, 300))
    frame = pd.concat([batch.sdcor, batch.fixef], axis=1)
    pd.testing.assert_frame_equal(slopes_bootstrap("parametric").replicates[:300], frame, check_exact=True)


def test_standard_errors_of_fixed_effects_in_a_balanced_design():
    """There beta* does not depend on the variances, and has the fit's own vcov."""
    result, vcov = slopes_bootstrap("parametric"), slopes().estimates.vcov
    d = result.replicates[["Intercept", "Days"]].to_numpy() - slopes().estimates.beta
    assert np.abs(scores(d, np.zeros(2))).max() < 4
    assert np.abs(scores(d[:, :, None] * d[:, None], vcov)).max() < 4
    np.testing.assert_allclose(result.std_error[["Intercept", "Days"]] ** 2, np.diag(vcov), rtol=5 * np.sqrt(2 / 4_000))


def test_ml_fits_are_refitted_by_ml():
    """Balanced one-way layout: E sigma^2 = sigma^2 by both, but ML's variance of the batches is smaller."""
    ml = fit_of("dyestuff", "ML").record
    result = bootstrap(ml, key=3, n=300)
    batch = fit_of("dyestuff", "ML").refit_many(
        simulate_responses(ml.design, ml.estimates.beta, ml.estimates.sigma, ml.estimates.Sigma, 3, 300)
    )
    np.testing.assert_array_equal(result.replicates["sd_Intercept|Batch"], batch.sdcor["sd_Intercept|Batch"])
    reml = fit_of("dyestuff", "REML").refit_many(
        simulate_responses(ml.design, ml.estimates.beta, ml.estimates.sigma, ml.estimates.Sigma, 3, 300)
    )
    assert batch.sdcor["sd_Intercept|Batch"].mean() < reml.sdcor["sd_Intercept|Batch"].mean()


@pytest.mark.parametrize("engine", ["numpy", "jax"])
@pytest.mark.parametrize("kind", KINDS)
def test_chunks_and_number_do_not_change_a_bit(kind, engine):
    whole = bootstrap(slopes(), 2024, 4_000, kind, engine=engine).replicates
    for n, chunk in [(400, 37), (400, 256), (1, None)]:
        part = bootstrap(slopes(), 2024, n, kind, chunk=chunk, engine=engine).replicates
        pd.testing.assert_frame_equal(part, whole[:n], check_exact=True)
    pd.testing.assert_frame_equal(slopes_bootstrap(kind).replicates, whole, rtol=1e-9)
    other = bootstrap(slopes(), 2025, 5, kind).replicates
    assert (other != whole[:5]).all(axis=None)


def test_crossed_factors():
    fit = fit_of("penicillin", "REML").record
    result = bootstrap(fit, 1, 200)
    assert list(result.estimate.index) == ["sd_Intercept|plate", "sd_Intercept|sample", "sigma", "Intercept"]
    pd.testing.assert_frame_equal(bootstrap(fit, 1, 200, chunk=64).replicates, result.replicates, check_exact=True)
    for refused in (lambda: bootstrap(fit, 1, 5, "cases"), lambda: bootstrap(fit, 1, 5, "wild"),
                    lambda: result.confint(kind="bca")):  # fmt: skip
        with pytest.raises(ValueError, match="'plate', 'sample' are crossed"):
            refused()


def test_scale_of_the_response():
    """In other units all but the correlation changes by the unit: for each kind the same draws."""
    data = table("sleepstudy").assign(Reaction=lambda d: 1e-3 * d["Reaction"])
    seconds = mj.lmm("Reaction ~ Days + (Days | Subject)", data).record
    unit = np.where([name.startswith("cor") for name in TERMS], 1.0, 1e-3)
    for kind in KINDS:
        result = bootstrap(seconds, 2024, 50, kind)
        np.testing.assert_allclose(result.replicates, slopes_bootstrap(kind).replicates[:50] * unit, rtol=1e-5)


def test_order_of_rows_does_not_matter_to_cases():
    data = table("sleepstudy").sample(frac=1.0, random_state=0)
    shuffled = mj.lmm("Reaction ~ Days + (Days | Subject)", data).record
    result = bootstrap(shuffled, 2024, 50, "cases")
    np.testing.assert_allclose(result.replicates, slopes_bootstrap("cases").replicates[:50], rtol=1e-5)


def test_names_of_terms_on_one_group():
    names = _Kept(fit_of("sleepstudy_zerocorr", "REML").record, None, False, "auto").names
    assert list(names[:3]) == ["sd_Intercept|Subject", "sd_Days|Subject.1", "sigma"]


def test_structural_zeros_are_no_parameters():
    record = mj.lmm("Reaction ~ Days + diag(Days | Subject)", table("sleepstudy")).record
    names = _Kept(record, None, False, "auto").names
    assert list(names) == ["sd_Intercept|Subject", "sd_Days|Subject", "sigma", "Intercept", "Days"]


def test_tables():
    result = slopes_bootstrap("cases")
    frame = result.to_frame()
    assert list(frame.columns) == ["term", "estimate", "bias", "std_error", "used"]
    np.testing.assert_allclose(frame["bias"], result.replicates.mean() - result.estimate)
    np.testing.assert_allclose(frame["std_error"], result.replicates.std(ddof=1))
    text = repr(result)
    assert text == result.summary()
    assert "Cases bootstrap" in text
    assert f"4000 replicates, 4000 converged, {result.counts['singular']} singular, 0 failed" in text
    again = pickle.loads(pickle.dumps(result))
    pd.testing.assert_frame_equal(again.replicates, result.replicates)
    assert "replicates" in repr(again)


# --- residuals -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sleepstudy_slopes", "sleepstudy_weighted", "pastes_nested", "machines_slopes",
                                  "singular_correlation_one", "singular_rank_two"])  # fmt: skip
def test_reflated_moments_are_exact(name):
    """Of any rank, and for several terms."""
    record = fit_of(name, "REML").record
    for pool, Sigma in zip(reflated_effects(record), record.estimates.Sigma, strict=True):
        np.testing.assert_allclose(pool.mean(axis=0), 0.0, atol=1e-10 * np.sqrt(np.diag(Sigma).max()))
        np.testing.assert_allclose(pool.T @ pool / len(pool), Sigma, atol=1e-10 * np.diag(Sigma).max())
    e = reflated_residuals(record)
    np.testing.assert_allclose([e.mean(), (e**2).mean()], [0.0, record.estimates.sigma**2], atol=1e-9)


def test_reflated_effects_keep_their_levels():
    """One effect: centred predictions times one number; no variance: zeros."""
    record = intercepts()
    (b,) = record.estimates.b
    (pool,) = reflated_effects(record)
    ratio = pool / (b - b.mean())
    np.testing.assert_allclose(ratio, ratio[0, 0])
    assert ratio[0, 0] > 1
    none = fit_of("dyestuff2", "REML").record
    assert none.estimates.singular
    np.testing.assert_array_equal(reflated_effects(none)[0], np.zeros((6, 1)))


def test_residual_responses_have_the_moments_of_the_model():
    """Weights included: mean and covariance of y* are those of the parametric bootstrap."""
    record = fit_of("sleepstudy_weighted", "REML").record
    est, design = record.estimates, record.design
    respond = kinds._residual_responses(record, key=9)
    d = respond(0, 8_000) - design.X @ est.beta
    V = dense.covariance(design, est.Sigma, est.sigma)
    pairs = np.random.default_rng(0).integers(0, record.nobs, (300, 2))
    pairs[:100, 1] = pairs[:100, 0] // 10 * 10 + np.arange(100) % 10  # rows of one subject
    assert np.abs(scores(d, np.zeros(record.nobs))).max() < 4.5
    assert np.abs(scores(d[:, pairs[:, 0]] * d[:, pairs[:, 1]], V[pairs[:, 0], pairs[:, 1]])).max() < 4.5


def test_too_few_levels_to_rescale():
    record = slopes()
    b = record.estimates.b[0].copy()
    b[:, 1] = 2.0 * b[:, 0]  # predictions on a line, a covariance of rank two
    flat = replace(record, estimates=record.estimates._replace(b=(b,)))
    with pytest.raises(ValueError, match="'Subject' cannot be rescaled"):
        bootstrap(flat, 1, 5, "residual")


# --- cases ---------------------------------------------------------------------------------------------------------


def crossed_within():
    """Two crossed factors, both within a third."""
    rng = np.random.default_rng(7)
    n, outer = 60, np.repeat(np.arange(4), [20, 10, 13, 17])
    groups = [rng.integers(0, 4, n) + 4 * outer, rng.integers(0, 3, n) + 3 * outer, outer]
    terms = [mj.RandomTerm(np.ones((n, 1)), group, m) for group, m in zip(groups, (16, 12, 4), strict=True)]
    X = np.column_stack([np.ones(n), rng.normal(size=n)])
    return mj.Design(rng.normal(size=n), X, tuple(terms), rng.uniform(0.5, 2, n))


def rows_of(design, cluster, index):
    """The design with the clusters' rows one after the other; whatever is drawn twice gets new levels."""
    rows = np.concatenate([np.flatnonzero(cluster == c) for c in index])
    slot = np.repeat(np.arange(len(index)), [(cluster == c).sum() for c in index])
    terms = []
    for term in design.terms:
        _, group = np.unique(slot * term.n_groups + term.group[rows], return_inverse=True)
        terms.append(mj.RandomTerm(term.Z[rows], group.reshape(-1), group.max() + 1, term.structure))
    columns = {name: None if getattr(design, name) is None else getattr(design, name)[rows]
               for name in ("y", "X", "weights", "offset")}  # fmt: skip
    return mj.Design(terms=tuple(terms), **columns)


@pytest.mark.parametrize("name", ["one factor, q=2, weights", "two terms on a factor", "nested", "crossed within"])
@pytest.mark.parametrize("reml", [True, False])
def test_gathered_products_are_those_of_the_rows(name, reml):
    """The criterion of gathered clusters against the dense textbook formula of really resampled rows."""
    design = crossed_within() if name == "crossed within" else random_design(STRUCTURES[name], seed=3)
    record = unfitted(design)
    cluster, M = outermost_clusters(record)
    clusters = cluster_products(record)
    assert clusters.M == M
    index = np.random.default_rng(1).integers(0, M, (3, M))
    index[0] = np.arange(M)
    theta = np.full(3, 0.8) if name == "crossed within" else random_theta(STRUCTURES[name], seed=1)
    qs = tuple(term.Z.shape[1] for term in design.terms)
    with jax.enable_x64(True):
        gathered = jax.jit(jax.vmap(lambda stats: mj.criterion(theta, stats, reml)))(clusters.gather(index))
        lambdas = [np.asarray(L) for L in lambdas_of_theta(jnp.asarray(theta), qs)]
    for value, drawn in zip(gathered, index, strict=True):
        expected = dense.criterion(rows_of(design, cluster, drawn), lambdas, reml)
        np.testing.assert_allclose(value, expected, rtol=1e-11)


def test_a_case_replicate_is_a_fit_of_resampled_rows():
    frame = table("sleepstudy")
    subjects = frame["Subject"].cat.categories
    M = len(subjects)
    index = draw_responses(lambda u: np.floor(u * M), M, M, 2024, 3, 0, "uniform").astype(int)
    for i, drawn in enumerate(index):
        parts = [frame[frame["Subject"] == subjects[c]].assign(Subject=f"s{slot:02}") for slot, c in enumerate(drawn)]
        fit = mj.lmm("Reaction ~ Days + (Days | Subject)", pd.concat(parts, ignore_index=True))
        sdcor = fit.varcorr.to_frame()["sdcor"][[0, 2, 1, 3]]
        np.testing.assert_allclose(slopes_bootstrap("cases").replicates.loc[i], [*sdcor, *fit.fixef], rtol=1e-6)


def test_a_large_mean_costs_no_digits():
    data = table("Dyestuff").assign(Yield=lambda d: d["Yield"] + 1e7)
    result = bootstrap(mj.lmm("Yield ~ 1 + (1 | Batch)", data).record, 3, 50, "cases")
    expected = intercepts_bootstrap("cases").replicates[:50]
    np.testing.assert_allclose(result.replicates[["sd_Intercept|Batch", "sigma"]], expected.iloc[:, :2], atol=1e-5)
    np.testing.assert_allclose(result.replicates["Intercept"], expected["Intercept"] + 1e7, atol=1e-5)


def test_nested_cases():
    """Casks within batches: the batches are drawn, with their casks."""
    record = fit_of("pastes_nested", "REML").record
    result = bootstrap(record, 5, 100, "cases")
    assert result.counts["converged"] == 100
    means = table("Pastes").groupby("batch", observed=True)["strength"].mean().to_numpy()
    index = draw_responses(lambda u: np.floor(u * 10), 10, 10, 5, 100, 0, "uniform").astype(int)
    np.testing.assert_allclose(result.replicates["Intercept"], means[index].mean(axis=1), rtol=1e-10)  # balanced


# --- wild ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", ["mammen", "rademacher"])
def test_wild_weights(weights):
    low, high, share = TWO_POINTS[weights]
    moments = [share * low**k + (1 - share) * high**k for k in (1, 2, 3)]
    np.testing.assert_allclose(moments, [0, 1, 1 if weights == "mammen" else 0], atol=1e-14)


@pytest.mark.parametrize("weights", ["mammen", "rademacher"])
def test_wild_covariance_is_the_sandwich(weights):
    """In a balanced design beta* is least squares, whose covariance given the residuals is the sandwich itself."""
    record = slopes()
    X, group = record.design.X, record.design.terms[0].group
    bread = np.linalg.inv(X.T @ X)
    r = record.design.y - X @ record.estimates.beta
    r = r / np.sqrt(1 - np.diagonal(X @ bread @ X.T))
    cluster_scores = np.stack([X[group == g].T @ r[group == g] for g in range(18)])
    sandwich = bread @ cluster_scores.T @ cluster_scores @ bread
    result = bootstrap(record, 2024, 4_000, "wild", weights=weights)
    d = result.replicates[["Intercept", "Days"]].to_numpy() - record.estimates.beta
    assert np.abs(scores(d, np.zeros(2))).max() < 4
    assert np.abs(scores(d[:, :, None] * d[:, None], sandwich)).max() < 4


def test_leverage_of_weighted_rows():
    design = random_design(STRUCTURES["one factor, q=2, weights"], seed=2)
    beta = np.array([0.3, -0.2])
    record = unfitted(design)
    record = replace(record, estimates=mj.Estimates._make([None, beta] + [None] * 12))
    W = np.diag(design.weights)
    hat = design.X @ np.linalg.solve(design.X.T @ W @ design.X, design.X.T @ W)
    r = design.y - design.offset - design.X @ beta
    np.testing.assert_allclose(adjusted_residuals(record), r / np.sqrt(1 - np.diagonal(hat)))
    alone = design.X.copy()
    alone[:, 1] = np.arange(len(alone)) == 5  # a column for one row: its residual is zero by least squares
    record = replace(record, kept=replace(design, X=alone))
    adjusted = adjusted_residuals(record)
    assert adjusted[5] == 0
    assert np.isfinite(adjusted).all()


# --- failures ------------------------------------------------------------------------------------------------------


def test_failed_refits_are_nan_and_counted(monkeypatch):
    clean = intercepts_bootstrap("parametric")

    def with_holes(*args, **options):
        Y = simulate_responses(*args, **options)
        Y[[3, 50]] = np.nan
        return Y

    monkeypatch.setattr(record_room, "simulate_responses", with_holes)
    with pytest.warns(InferenceWarning, match="2 of 999 refits failed"):
        result = bootstrap(intercepts(), 3, 999)
    assert result.counts.to_dict() == {"replicates": 999, "converged": 997, "singular": result.counts["singular"],
                                       "failed": 2, "failed: NOT_FINITE": 2}  # fmt: skip
    assert result.replicates.loc[[3, 50]].isna().all(axis=None)
    kept = np.setdiff1d(np.arange(999), [3, 50])
    pd.testing.assert_frame_equal(result.replicates.loc[kept], clean.replicates.loc[kept], check_exact=True)
    assert (result.used == 997).all()
    np.testing.assert_allclose(result.std_error, clean.replicates.loc[kept].std())
    assert np.isfinite(result.confint()).all(axis=None)
    assert "2 failed" in str(result)


def between_groups():
    """A fixed effect that varies between four groups only, two of each kind."""
    rng = np.random.default_rng(0)
    g = np.repeat(np.arange(4), 6)
    y = rng.normal(size=24) + rng.normal(size=4)[g]
    return mj.lmm("y ~ x + (1 | g)", {"y": y, "x": g % 2, "g": ["abcd"[i] for i in g]})


def test_cases_that_lose_a_fixed_effect_fail():
    record = between_groups().record
    n = 200
    index = draw_responses(lambda u: np.floor(u * 4), 4, 4, 8, n, 0, "uniform")
    lost = np.ptp(index % 2, axis=1) == 0  # all groups of one kind
    assert 5 < lost.sum() < 60
    with pytest.warns(InferenceWarning, match=f"{lost.sum()} of {n} refits failed"):
        result = bootstrap(record, 8, n, "cases")
    np.testing.assert_array_equal(~result.converged, lost)
    np.testing.assert_array_equal(result.replicates.isna().all(axis=1), lost)


def test_undefined_correlations_are_left_out_and_counted():
    """Data without random effects: many replicates have a variance of zero."""
    record = slopes()
    none = replace(record, estimates=record.estimates._replace(Sigma=(np.zeros((2, 2)),)))
    result = bootstrap(none, 1, 500)
    sd = result.replicates[["sd_Intercept|Subject", "sd_Days|Subject"]]
    undefined = (sd == 0).any(axis=1)
    assert 0 < undefined.sum() < 500
    np.testing.assert_array_equal(result.replicates["cor_Days.Intercept|Subject"].isna(), undefined)
    assert result.used["cor_Days.Intercept|Subject"] == 500 - undefined.sum()
    assert (result.used.drop("cor_Days.Intercept|Subject") == 500).all()
    assert f"cor_Days.Intercept|Subject is undefined in {undefined.sum()} of the replicates" in str(result)
    assert np.isnan(result.estimate["cor_Days.Intercept|Subject"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n": 0}, "n must be an integer"),
        ({"n": -5}, "n must be an integer"),
        ({"n": 10.0}, "n must be an integer"),
        ({"kind": "magic"}, "kind must be one of 'parametric'"),
        ({"chunk": 0}, "chunk must be"),
        ({"weights": "normal"}, "weights must be one of 'mammen'"),
        ({"key": "seed"}, "key must be an int"),
        ({"statistic": lambda est: "text"}, "statistic must be a real number"),
        ({"statistic": lambda est: {"a": est.beta[0], "b": None}}, "'b' is NoneType"),
        ({"statistic": lambda est: est.sigma + 1j}, "statistic must be a real number"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        bootstrap(intercepts(), **{"key": 1, "n": 5, **arguments})


def test_rows_are_needed():
    with pytest.raises(ValueError, match="which were not kept"):
        bootstrap(replace(intercepts(), kept=None), 1, 5)


def test_progress_bar_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    result = bootstrap(intercepts(), 3, 5, progress=True)
    pd.testing.assert_frame_equal(result.replicates, intercepts_bootstrap("parametric").replicates[:5])


# --- intervals -----------------------------------------------------------------------------------------------------


def test_percentile_basic_and_normal():
    result = intercepts_bootstrap("parametric")  # 999: limits of 90 % are the 50th and the 950th
    ordered = np.sort(result.replicates.to_numpy(), axis=0)
    percentile = result.confint(0.9)
    assert list(percentile.columns) == ["lower", "upper"]
    assert list(percentile.index) == list(result.estimate.index)
    np.testing.assert_allclose(percentile, ordered[[49, 949]].T, rtol=1e-14)
    basic = result.confint(0.9, "basic")
    np.testing.assert_allclose(basic["lower"], 2 * result.estimate - percentile["upper"])
    np.testing.assert_allclose(basic["upper"], 2 * result.estimate - percentile["lower"])
    normal = result.confint(0.9, "normal")
    np.testing.assert_allclose(normal.mean(axis=1), result.estimate - result.bias)
    width = 2 * NormalDist().inv_cdf(0.95) * result.std_error
    np.testing.assert_allclose(normal["upper"] - normal["lower"], width)
    wider = result.confint(0.99)
    assert (wider["lower"] < percentile["lower"]).sum() >= 2  # the sd's limits are both zero
    assert (wider["upper"] > percentile["upper"]).all()


def slow_bca(replicates, estimate, left_out, level):
    """Efron's formulas, one number at a time."""
    ordered, N, Phi = sorted(replicates), len(replicates), NormalDist()
    below = sum(1.0 if x < estimate else 0.5 if x == estimate else 0.0 for x in ordered) / N
    mean = sum(left_out) / len(left_out)
    a = sum((mean - x) ** 3 for x in left_out) / (6 * sum((mean - x) ** 2 for x in left_out) ** 1.5)
    limits = []
    for tail in ((1 - level) / 2, (1 + level) / 2):
        z = Phi.inv_cdf(below) + Phi.inv_cdf(tail)
        rank = Phi.cdf(Phi.inv_cdf(below) + z / (1 - a * z)) * (N + 1)
        lower = min(max(int(rank), 1), N)
        upper = min(lower + 1, N)
        limits.append(ordered[lower - 1] + (min(max(rank, 1), N) - lower) * (ordered[upper - 1] - ordered[lower - 1]))
    return limits


@pytest.mark.parametrize("kind", ["parametric", "cases"])
def test_bca_against_refits_of_tables(kind):
    frame = table("Dyestuff")
    rows = []
    for batch in frame["Batch"].cat.categories:
        fit = mj.lmm("Yield ~ 1 + (1 | Batch)", frame[frame["Batch"] != batch])
        rows.append([*fit.varcorr.to_frame()["sdcor"], *fit.fixef])
    result = intercepts_bootstrap(kind)
    limits = result.confint(0.9, "bca")
    for j, term in enumerate(result.estimate.index):
        expected = slow_bca(result.replicates[term], result.estimate[term], [row[j] for row in rows], 0.9)
        np.testing.assert_allclose(limits.loc[term], expected, rtol=1e-6)
    assert (limits != result.confint(0.9)).any(axis=None)


def test_jackknife_of_means():
    """Balanced: the mean without a batch; its acceleration is the skewness of the batch means over 6 sqrt(M)."""
    means = table("Dyestuff").groupby("Batch", observed=True)["Yield"].mean().to_numpy()
    left_out = intervals.jackknife(intercepts(), intercepts_bootstrap("cases")._compute.refitted)
    np.testing.assert_allclose(left_out[:, 2], (means.sum() - means) / 5, rtol=1e-12)
    d = means - means.mean()
    skewness = (d**3).mean() / (d**2).mean() ** 1.5
    np.testing.assert_allclose(intervals.acceleration(left_out)[2], skewness / (6 * np.sqrt(6)), rtol=1e-9)


def test_no_acceleration_without_variation():
    np.testing.assert_array_equal(intervals.acceleration(np.full((5, 2), 3.0)), [0.0, 0.0])
    tiny = 1e-200 * np.array([[1.0], [2.0], [4.0]])
    np.testing.assert_allclose(intervals.acceleration(tiny), intervals.acceleration(1e200 * tiny))


def test_bca_is_refused_where_no_level_can_be_left_out():
    rng = np.random.default_rng(1)
    g = np.repeat(np.arange(4), 6)
    data = {"y": rng.normal(size=24) + rng.normal(size=4)[g], "x": (g == 2) * 1, "g": ["abcd"[i] for i in g]}
    result = bootstrap(mj.lmm("y ~ x + (1 | g)", data).record, 1, 20)
    with pytest.raises(ValueError, match="without each level of 'g', but without 'c' it fails"):
        result.confint(kind="bca")


def test_bca_without_limits_warns():
    result = intercepts_bootstrap("parametric")
    above = replace(result, replicates=result.replicates.assign(sigma=lambda d: d["sigma"] + 1e6))
    with pytest.warns(InferenceWarning, match="no BCa limits for sigma"):
        limits = above.confint(kind="bca")
    assert limits.loc["sigma"].isna().all()
    assert limits.drop("sigma").notna().all(axis=None)


@pytest.mark.parametrize("level", [0, 1, -0.5, 95, True, "0.9", np.nan])
def test_bad_level(level):
    with pytest.raises(ValueError, match="level must be between 0 and 1"):
        intercepts_bootstrap("parametric").confint(level)


def test_bad_kind_of_interval():
    with pytest.raises(ValueError, match="kind must be one of 'percentile', 'basic', 'normal', 'bca'"):
        intercepts_bootstrap("parametric").confint(kind="profile")


def test_one_replicate():
    result = bootstrap(intercepts(), 3, 1)
    assert result.std_error.isna().all()
    np.testing.assert_array_equal(result.confint()["lower"], result.replicates.loc[0])


# --- statistics of one's own ---------------------------------------------------------------------------------------


def icc(est):
    between = est.Sigma[0][0, 0]
    return between / (between + est.sigma**2)


def test_a_statistic_of_ones_own():
    parameters = intercepts_bootstrap("parametric").replicates
    between = parameters["sd_Intercept|Batch"] ** 2
    expected = between / (between + parameters["sigma"] ** 2)
    result = bootstrap(intercepts(), 3, 999, statistic=icc)
    assert list(result.replicates.columns) == ["icc"]
    np.testing.assert_allclose(result.replicates["icc"], expected, rtol=1e-12)
    np.testing.assert_allclose(result.estimate["icc"], float(icc(intercepts().estimates)))
    chunks = bootstrap(intercepts(), 3, 999, statistic=icc, chunk=100)
    pd.testing.assert_frame_equal(chunks.replicates, result.replicates, check_exact=True)
    limits = result.confint(kind="bca")
    assert limits.loc["icc", "lower"] < result.estimate["icc"] < limits.loc["icc", "upper"]
    pd.testing.assert_series_equal(pickle.loads(pickle.dumps(result)).estimate, result.estimate)


def test_statistics_in_a_dict():
    def several(est):
        return {"z": est.beta[0] / jnp.sqrt(est.vcov[0, 0]), "beta": est.beta, "criterion": est.criterion}

    result = bootstrap(intercepts(), 3, 20, statistic=several)
    assert list(result.replicates.columns) == ["z", "beta[0]", "criterion"]
    np.testing.assert_array_equal(
        result.replicates["beta[0]"], intercepts_bootstrap("parametric").replicates["Intercept"][:20]
    )
    anonymous = bootstrap(intercepts(), 3, 20, statistic=lambda est: est.sigma)
    assert list(anonymous.replicates.columns) == ["statistic"]


def test_a_statistic_of_random_effects():
    assert bootstrap(intercepts(), 3, 2, statistic=lambda est: {"b": 1.0 * (est.b is None)}).estimate["b"] == 1
    result = bootstrap(intercepts(), 3, 20, statistic=lambda est: est.b[0][:, 0], modes=True)
    assert list(result.replicates.columns) == [f"statistic[{i}]" for i in range(6)]
    np.testing.assert_allclose(result.replicates.sum(axis=1), 0.0, atol=1e-8)  # balanced
    np.testing.assert_allclose(result.estimate, intercepts().estimates.b[0][:, 0])


def test_a_statistic_that_jax_cannot_trace_fails_before_any_refit():
    with pytest.raises(jax.errors.TracerArrayConversionError):
        bootstrap(intercepts(), 3, 10, statistic=lambda est: np.sqrt(np.asarray(est.sigma)))
