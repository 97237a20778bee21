"""Exact (restricted) likelihood ratio tests: oracle, closed forms, dense textbook formulas, invariance."""

import json
import re
from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pytest
from conftest import HERE, fit_of, table
from scipy import optimize, stats

import mixjax as mj
from mixjax.design import Design, Labels, RandomTerm, TermLabels
from mixjax.estimation.many import estimate_many
from mixjax.fitted.record import fit_design, record_of
from mixjax.inference.random import spectral
from mixjax.inference.random.exact_lrt import exact_lrt, exact_rlrt, least_squares_criterion
from mixjax.products.cross_products import cross_products

ORACLE = json.loads((HERE / "oracle" / "inference_rlrsim.json").read_text())
N = 100_000
INTERCEPTS, SLOPES = "Reaction ~ Days + (1 | Subject)", "Reaction ~ Days + (0 + Days | Subject)"


@cache
def slopes_only():
    return mj.lmm(SLOPES, table("sleepstudy"))


@cache
def unbalanced(weighted=False):
    """14 levels of 1 to 9 rows, a covariate within and one between levels."""
    rng = np.random.default_rng(7)
    group = np.repeat(np.arange(14), rng.integers(1, 10, 14))
    n = len(group)
    X = np.column_stack([np.ones(n), rng.normal(size=n), rng.normal(size=14)[group]])
    term = RandomTerm(Z=np.ones((n, 1)), group=group, n_groups=14)
    y = X @ [3.0, 1.0, -2.0] + 0.7 * rng.normal(size=14)[group] + rng.normal(size=n)
    return Design(y=y, X=X, terms=(term,), weights=rng.uniform(0.5, 3.0, n) if weighted else None)


def dense_spectrum(design):
    """Residual basis K'(n - p), the eigenvalues and vectors of ``K'Z Z'K``, and those of ``Z'Z``, rows weighted."""
    root = np.ones(len(design.y)) if design.weights is None else np.sqrt(design.weights)
    X = root[:, None] * design.X
    group, m = design.terms[0].group, design.terms[0].n_groups
    Z = root[:, None] * (group[:, None] == np.arange(m)) * design.terms[0].Z
    K = np.linalg.svd(X)[0][:, X.shape[1] :]
    mu, U = np.linalg.eigh(K.T @ Z @ Z.T @ K)
    return mu, (U.T @ K.T @ (root * design.y)) ** 2, np.linalg.eigvalsh(Z.T @ Z)


def supremum(mu, squares, xi, total):
    """sup over lambda by brute force: a fine grid, then golden section around its best point."""

    def negative(t):
        lam = np.expm1(t)
        D = (squares / (1 + mu * lam)).sum()
        return -total * np.log(squares.sum() / D) + np.log1p(xi * lam).sum()

    # In units where the largest eigenvalue is 1.
    mu, xi = mu / mu.max(), xi / mu.max()
    grid = np.linspace(0, 30, 4_000)
    best = int(np.argmin([negative(t) for t in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    found = optimize.minimize_scalar(negative, bounds=(low, high), method="bounded", options={"xatol": 1e-10})
    return max(0.0, -negative(grid[best]), -found.fun)


def suprema(of, squares, left_out):
    """The package's, of given chi-square variables ``(J, B)``."""
    return spectral._suprema(squares, left_out, of.mu, of.xi, of.xi_df, of.total, spectral._log_grid(of.mu))


# --- oracle ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "test"),
    [
        ("sleepstudy_intercept_vs_lm_REML", lambda: exact_rlrt(fit_of("sleepstudy_intercept", "REML"))),
        ("sleepstudy_intercept_vs_lm_ML", lambda: exact_lrt(fit_of("sleepstudy_intercept", "ML"))),
        ("dyestuff_batch_REML", lambda: exact_rlrt(fit_of("dyestuff", "REML"))),
        ("dyestuff2_batch_REML", lambda: exact_rlrt(fit_of("dyestuff2", "REML"))),
        ("pastes_sample_REML", lambda: exact_rlrt(fit_of("pastes_sample", "REML"))),
        (
            "sleepstudy_slope_given_intercept_REML",
            lambda: exact_rlrt(
                slopes_only(), fit_of("sleepstudy_intercept", "REML"), fit_of("sleepstudy_zerocorr", "REML")
            ),
        ),
        (
            "sleepstudy_intercept_given_slope_REML",
            lambda: exact_rlrt(
                fit_of("sleepstudy_intercept", "REML"), slopes_only(), fit_of("sleepstudy_zerocorr", "REML")
            ),
        ),
    ],
)
def test_rlrsim(name, test):
    reference, test = ORACLE[name], test()
    assert test.statistic == pytest.approx(reference["statistic"], abs=2e-9)
    if name.startswith("dyestuff2"):
        assert test.p_value == 1.0
        return
    share = np.mean(test.null_draws >= test.statistic)
    error = np.sqrt(max(test.p_value, 1 / N) / N)
    assert test.p_value == pytest.approx(reference["p.value"], abs=5 * error)
    assert share == pytest.approx(test.p_value, abs=5 * error)
    assert ("approximate" in str(test)) == ("given" in name)


@pytest.mark.parametrize(
    ("name", "fit", "reml"),
    [
        ("null_RLRT_intercept_alone", lambda: fit_of("sleepstudy_intercept", "REML"), True),
        ("null_RLRT_slope_alone", slopes_only, True),
        ("null_LRT_intercept_alone", lambda: fit_of("sleepstudy_intercept", "ML"), False),
    ],
)
def test_null_distribution_of_rlrsim(name, fit, reml):
    reference = ORACLE[name]
    test = (exact_rlrt if reml else exact_lrt)(fit(), key=3)
    of = spectral.spectrum(fit().stats, reml)
    assert len(test.null_draws) == test.n == N
    assert test.zero_share == pytest.approx(reference["prop_zero"], abs=4.5 * np.sqrt(0.5 / N))
    variance = test.null_draws.var()
    assert test.null_draws.mean() == pytest.approx(reference["mean"], abs=4.5 * np.sqrt(2 * variance / N))
    for probability, quantile in zip(reference["prob"], reference["quantile"], strict=True):
        error = np.sqrt(probability * (1 - probability) / N)
        if quantile > 0:
            assert np.mean(test.null_draws <= quantile) == pytest.approx(probability, abs=4.5 * np.sqrt(2) * error)
            assert 1 - spectral.exact_p(of, quantile) == pytest.approx(probability, abs=4.5 * error)


# --- closed forms ----------------------------------------------------------------------------------------------------


def test_balanced_one_way_is_an_f_test():
    """With k groups of r: ``(n - 1) log(((k - 1) F + n - k) / (n - 1)) - (k - 1) log F`` where F > 1, else 0."""
    fit = fit_of("dyestuff", "REML")
    k, n = 6, 30
    of = spectral.spectrum(fit.stats, True)
    assert of.df.tolist() == [n - k, k - 1]
    rng = np.random.default_rng(1)
    squares = rng.chisquare(of.df[:, None], (2, 500))
    F = squares[1] / (k - 1) / (squares[0] / (n - k))
    expected = np.where(F > 1, (n - 1) * np.log(((k - 1) * F + n - k) / (n - 1)) - (k - 1) * np.log(F), 0.0)
    np.testing.assert_allclose(suprema(of, squares, np.zeros(500)), expected, atol=1e-9)
    for statistic, f in zip(expected[F > 1.01][:5], F[F > 1.01][:5], strict=True):
        assert spectral.exact_p(of, statistic) == pytest.approx(stats.f.sf(f, k - 1, n - k), rel=1e-9)

    test = exact_rlrt(fit)
    mean_square = fit.labels.frame.groupby("Batch", observed=True)["Yield"].agg(["mean", "var"])
    f = 5 * mean_square["mean"].var() / mean_square["var"].mean()
    assert test.p_value == pytest.approx(stats.f.sf(f, k - 1, n - k), rel=1e-8)
    assert test.mc_error == 0.0
    zeros = stats.f.cdf(1, k - 1, n - k)
    assert test.zero_share == pytest.approx(zeros, abs=4.5 * np.sqrt(zeros * (1 - zeros) / N))
    for f in stats.f.ppf([0.7, 0.9, 0.99], k - 1, n - k):
        quantile = (n - 1) * np.log(((k - 1) * f + n - k) / (n - 1)) - (k - 1) * np.log(f)
        p = stats.f.sf(f, k - 1, n - k)
        assert np.mean(test.null_draws > quantile) == pytest.approx(p, abs=4.5 * np.sqrt(p * (1 - p) / N))


@pytest.mark.parametrize("reml", [True, False])
def test_suprema_are_those_of_brute_force(reml):
    of = spectral.spectrum(cross_products(unbalanced()), reml, 0 if reml else 2)
    rng = np.random.default_rng(2)
    squares = rng.chisquare(of.df[:, None], (len(of.df), 40))
    squares[1:, ::3] *= rng.uniform(1.0, 30.0, (1, 14))  # also large estimates
    left_out = np.zeros(40) if reml else rng.chisquare(2, 40)
    xi = np.repeat(of.xi, of.xi_df.astype(int))
    fixed = of.total * np.log1p(left_out / squares.sum(0))
    expected = [supremum(of.mu, column, xi, of.total) for column in squares.T] + fixed
    assert (expected - fixed == 0).any()
    assert (expected > 1).any()
    np.testing.assert_allclose(suprema(of, squares, left_out), expected, atol=1e-7)


def test_suprema_of_eigenvalues_that_spread_widely():
    mu = np.append(0.0, np.geomspace(1e-6, 1.0, 12))
    of = spectral.Spectrum(mu, np.append(4.0, np.ones(12)), mu[1:], np.ones(12), 16.0, 0)
    rng = np.random.default_rng(3)
    squares = rng.chisquare(of.df[:, None], (13, 30)) * (1 + rng.uniform(0, 1e5, (1, 30)) * mu[:, None])
    expected = [supremum(mu, column, mu[1:], 16.0) for column in squares.T]
    np.testing.assert_allclose(suprema(of, squares, np.zeros(30)), expected, atol=1e-6)


# --- textbook --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighted", [False, True])
def test_spectrum_is_that_of_dense_matrices(weighted):
    design = unbalanced(weighted)
    products = cross_products(design)
    mu, _, xi = dense_spectrum(design)
    of = spectral.spectrum(products, False)
    # Z has another scale in its basis.
    ratio = of.xi.max() / xi.max()
    assert of.df.sum() == len(mu)
    np.testing.assert_allclose(np.repeat(of.mu, of.df.astype(int)), mu * ratio, atol=1e-11 * of.xi.max())
    np.testing.assert_allclose(np.repeat(of.xi, of.xi_df.astype(int)), xi * ratio, rtol=1e-11)
    by_reml = spectral.spectrum(products, True)
    np.testing.assert_array_equal(by_reml.xi, by_reml.mu[1:])
    assert (by_reml.total, of.total) == (len(mu), len(design.y))


def test_levels_that_share_their_sums_are_not_decomposed_one_by_one():
    """5000 levels of two sizes: eigenvalues with multiplicities, by a decomposition of 2p rows."""
    group = np.repeat(np.arange(5_000), np.tile([2, 5], 2_500))
    n = len(group)
    rng = np.random.default_rng(4)
    X = np.column_stack([np.ones(n), rng.normal(size=n)])
    term = RandomTerm(Z=np.ones((n, 1)), group=group, n_groups=5_000)
    of = spectral.spectrum(cross_products(Design(y=rng.normal(size=n), X=X, terms=(term,))), True)
    assert len(of.mu) <= 1 + 2 + 4
    assert sorted(of.df[1:])[-2:] == [2_498, 2_498]
    assert of.df.sum() == n - 2
    # The trace: of Z'Z, less that of the projection on X.
    sums = np.stack([np.bincount(group, weights=x) for x in X.T])
    trace = n - np.trace(np.linalg.solve(X.T @ X, sums @ sums.T))
    largest_of_five = of.mu[1:][of.df[1:] == 2_498].max()
    assert of.mu @ of.df / largest_of_five == pytest.approx(trace / 5.0, rel=1e-10)


@pytest.mark.parametrize("weighted", [False, True])
def test_statistic_is_the_supremum_at_the_data(weighted):
    """What the fit finds by its own search is what the spectral formula says for the data's own variables."""
    design = unbalanced(weighted)
    mu, squares, xi = dense_spectrum(design)
    n, p = design.X.shape
    for reml, test in ((True, exact_rlrt), (False, exact_lrt)):
        fit = fit_design(design, labels_of(design), reml)
        expected = supremum(mu, squares, mu[mu > 1e-9] if reml else xi, n - p if reml else n)
        result = test(fit, n=500)
        assert expected > 0.1
        assert result.statistic == pytest.approx(expected, abs=1e-7)
        assert result.p_value == (1 + np.sum(result.null_draws >= result.statistic)) / 501
        assert result.mc_error == pytest.approx(np.sqrt(result.p_value * (1 - result.p_value) / 500))


def labels_of(design):
    levels = tuple(map(str, range(design.terms[0].n_groups)))
    return Labels("y ~ a + b + (1 | g)", "y", ("Intercept", "a", "b"), (TermLabels("g", ("Intercept",), levels),), None)


def test_draws_are_those_of_refits():
    """Responses simulated under the null and refitted have the statistics that are drawn."""
    design = unbalanced()
    Y = np.random.default_rng(5).normal(size=(20_000, len(design.y)))
    products = cross_products(design, Y)
    for reml in (True, False):
        found = np.array(
            [
                least_squares_criterion(
                    replace(products, yy=products.yy[i], Xy=products.Xy[i], beta0=products.beta0[i]), reml
                )
                for i in range(len(Y))
            ]
        )
        found = found - estimate_many(products, reml, keep=("criterion",)).criterion
        draws = spectral.draw(spectral.spectrum(cross_products(design), reml), 6, N)
        for threshold in (1e-7, 0.1, 1.0, 3.0, 6.0):
            share = np.mean(draws > threshold)
            error = np.sqrt(share * (1 - share) * (1 / N + 1 / len(Y)))
            assert np.mean(found > threshold) == pytest.approx(share, abs=4.5 * error)


def test_criterion_of_least_squares_by_the_textbook():
    design = unbalanced(weighted=True)
    products = cross_products(design)
    w, n = design.weights, len(design.y)

    def dense(X, reml):
        XWX = X.T @ (w[:, None] * X)
        r = design.y - X @ np.linalg.solve(XWX, X.T @ (w * design.y))
        df = n - X.shape[1] if reml else n
        value = df * (1 + np.log(2 * np.pi * (w @ r**2) / df)) - np.log(w).sum()
        return value + (np.linalg.slogdet(XWX)[1] if reml else 0.0)

    for reml in (True, False):
        assert least_squares_criterion(products, reml) == pytest.approx(dense(design.X, reml), rel=1e-12)
    for zero, kept in ((np.eye(3)[1:], design.X[:, :1]), (np.eye(3)[:1], design.X[:, 1:])):
        assert least_squares_criterion(products, False, zero) == pytest.approx(dense(kept, False), rel=1e-12)


# --- behaviour -------------------------------------------------------------------------------------------------------


def test_fixed_effects_left_out():
    """Without variance and slope: the statistic adds up, and the null is the sum of two independent parts."""
    fit = fit_of("sleepstudy_intercept", "ML")
    alone, both = exact_lrt(fit, n=20_000), exact_lrt(fit, "Reaction ~ 1", n=20_000)
    y, days = fit.design.y, fit.X[:, 1] - fit.X[:, 1].mean()
    total = np.sum((y - y.mean()) ** 2)
    slope = len(y) * np.log(total / (total - (days @ y) ** 2 / (days @ days)))
    assert both.statistic == pytest.approx(alone.statistic + slope, abs=1e-9)
    np.testing.assert_array_equal(both.null_draws >= alone.null_draws, True)
    # The part of the fixed effect: n log(1 + chi2(1) / chi2(n - p)), a t test.
    part = both.null_draws - alone.null_draws
    limit = stats.t.ppf(0.95, 178) ** 2
    assert np.mean(part > 180 * np.log1p(limit / 178)) == pytest.approx(0.1, abs=4.5 * np.sqrt(0.09 / 20_000))
    assert exact_lrt(fit, "Reaction ~ Days", n=20_000).statistic == alone.statistic
    assert exact_lrt(fit, "Reaction ~ 0 + Days", n=100).statistic > both.statistic
    assert "null: Reaction ~ 1, no random effects" in repr(both)


@pytest.mark.parametrize("name", ["sleepstudy_weighted_offset", "cake"])
@pytest.mark.parametrize("null", ["{y} ~ 1", "{y} ~ 0", "{y} ~ {x}", "{y} ~ 0 + I(2 * {x} + 3)"])
def test_the_null_is_the_regression_of_its_formula(name, null):
    """Criterion of the null by dense least squares on the columns of m0, whatever combination of m's they are."""
    if name == "cake":
        x, fit = "temp", mj.lmm("angle ~ recipe * temp + (1 | replicate)", table("cake"), reml=False)
        y, weights, y_name = fit.design.y, np.ones(fit.nobs), "angle"
    else:
        x, data = "Days", table("sleepstudy_wo")
        fit = mj.lmm("Reaction ~ Days + (1 | Subject)", data, weights="w", offset="off", reml=False)
        y, weights, y_name = fit.design.y - fit.design.offset, fit.design.weights, "Reaction"
    values = fit.labels.frame[x].to_numpy(float)
    columns = {"{y} ~ 1": [np.ones(fit.nobs)], "{y} ~ 0": [], "{y} ~ {x}": [np.ones(fit.nobs), values],
               "{y} ~ 0 + I(2 * {x} + 3)": [2 * values + 3]}[null]  # fmt: skip
    root = np.sqrt(weights)
    X0 = np.column_stack(columns) * root[:, None] if columns else np.zeros((fit.nobs, 0))
    residual = root * y - X0 @ np.linalg.lstsq(X0, root * y, rcond=None)[0]
    dense = fit.nobs * (1 + np.log(2 * np.pi * residual @ residual / fit.nobs)) - np.log(weights).sum()
    test = exact_lrt(fit, null.format(y=y_name, x=x), n=10)
    assert test.statistic == pytest.approx(dense - fit.criterion, abs=1e-8)


def test_a_fit_by_the_other_criterion_is_refitted():
    by_reml, by_ml = fit_of("sleepstudy_intercept", "REML"), fit_of("sleepstudy_intercept", "ML")
    for test, own, other in ((exact_rlrt, by_reml, by_ml), (exact_lrt, by_ml, by_reml)):
        assert test(own, n=10).statistic == pytest.approx(test(other, n=10).statistic, abs=1e-8)
        assert "refitted" in str(test(other, n=10))
        assert "refitted" not in str(test(own, n=10))


def test_a_fit_that_failed_is_named():
    record = record_of(fit_of("dyestuff", "REML"))
    failed = replace(record, estimates=record.estimates._replace(converged=np.False_))
    assert "NOT CONVERGED: m" in str(exact_rlrt(failed, n=10))
    assert "NOT CONVERGED" not in str(exact_rlrt(record, n=10))


def test_scales_and_order_do_not_matter():
    data = table("Pastes").iloc[5:].copy()
    fit = mj.lmm("strength ~ 1 + (1 | sample)", data)
    shuffled = data.sample(frac=1.0, random_state=1).assign(strength=lambda d: 1e3 * d["strength"] + 7.0)
    shuffled["sample"] = shuffled["sample"].astype(str).map(lambda level: level[::-1])
    other = exact_rlrt(mj.lmm("strength ~ 1 + (1 | sample)", shuffled), n=2_000)
    test = exact_rlrt(fit, n=2_000)
    assert other.statistic == pytest.approx(test.statistic, abs=1e-8)
    assert other.p_value == pytest.approx(test.p_value)
    np.testing.assert_allclose(other.quantile([0.8, 0.95]), test.quantile([0.8, 0.95]), rtol=1e-6)


def test_keys():
    fit = fit_of("dyestuff", "REML")
    few, many = exact_rlrt(fit, n=1_000), exact_rlrt(fit, n=20_000)
    np.testing.assert_array_equal(few.null_draws, many.null_draws[:1_000])
    assert not np.array_equal(few.null_draws, exact_rlrt(fit, key=1, n=1_000).null_draws)
    np.testing.assert_array_equal(few.null_draws, exact_rlrt(fit, key=jax.random.key(0), n=1_000).null_draws)


def test_bad_input():
    intercepts, correlated = fit_of("sleepstudy_intercept", "REML"), fit_of("sleepstudy_slopes", "REML")
    zerocorr = fit_of("sleepstudy_zerocorr", "REML")
    with pytest.raises(ValueError, match=r"Intercept\|Subject, Days\|Subject.*bootstrap"):
        exact_rlrt(correlated)
    with pytest.raises(ValueError, match="one of them alone"):
        exact_lrt(zerocorr)
    with pytest.raises(ValueError, match="belong together"):
        exact_rlrt(intercepts, m0=slopes_only())
    with pytest.raises(ValueError, match="2 covariance parameters more"):
        exact_rlrt(slopes_only(), intercepts, correlated)
    with pytest.raises(ValueError, match=r"m0 has the tested effect \(1 \| Subject\)"):
        exact_rlrt(intercepts, intercepts, zerocorr)
    with pytest.raises(ValueError, match="not among those of mA"):
        exact_rlrt(slopes_only(), correlated, zerocorr)
    for m0, message in {
        "Reaction ~ Day": "there is no column 'Day' (in 'Day'); did you mean 'Days'?",
        "Days ~ 1": "response of m0 is 'Days', that of m is 'Reaction'",
        "Reaction ~ Days + (1 | Subject)": "leave the random terms out",
        "Reaction ~ I(Days**2)": "are not among those of m",
        "Reaction ~ 1 + offset(Days)": "offset of m0 must be that of m",
    }.items():
        with pytest.raises(ValueError, match=re.escape(message)):
            exact_lrt(intercepts, m0)
    with pytest.raises(ValueError, match="must be the formula of a regression"):
        exact_lrt(intercepts, intercepts)
    with pytest.raises(ValueError, match="n must be an integer"):
        exact_rlrt(intercepts, n=0)
    with pytest.raises(ValueError, match="same data"):
        exact_rlrt(fit_of("dyestuff", "REML"), intercepts, zerocorr)
    with pytest.raises(TypeError, match="fit is needed"):
        exact_rlrt("fit")


def test_a_variance_that_fixed_effects_hide():
    group = np.repeat(np.arange(4), 3)
    X = (group[:, None] == np.arange(4)).astype(float)
    term = RandomTerm(Z=np.ones((12, 1)), group=group, n_groups=4)
    with pytest.raises(ValueError, match="lie in the span of the fixed effects"):
        spectral.spectrum(cross_products(Design(y=np.arange(12.0), X=X, terms=(term,))), True)
