"""What is wrong with a generalised fit: residuals by simulation, dispersion, zeros, leverage, pictures."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from glmm_cases import case, fit_of
from scipy import stats

import mixjax as mj
from mixjax.diagnostics.dispersion import pearson_of
from mixjax.diagnostics.hat import working_weights
from mixjax.diagnostics.quantile_residuals import scaled_residuals
from mixjax.estimation.glmm_modes import predictors_at_modes


def with_response(fit, y):
    """The record of a fit with another response, all parameters as they are, and modes that belong to them."""
    record = fit.record
    eta = predictors_at_modes(record.rows, record.estimates, y[None])[0]
    estimates = record.estimates._replace(eta=eta)
    design = dataclasses.replace(record.design, y=y)
    return dataclasses.replace(record, rows=record.rows.with_response(y), kept=design, estimates=estimates)


# --- residuals by simulation -----------------------------------------------------------------------------------------


def test_quantile_residuals_are_places_among_simulated_responses():
    fit = fit_of("cbpp")
    found = fit.quantile_residuals(key=3, n=100)
    assert found.simulated.shape == (100, 56)
    np.testing.assert_array_equal(found.values, scaled_residuals(fit.design.y, found.simulated, found.key))
    np.testing.assert_allclose(stats.norm.cdf(found.normal), found.values, rtol=1e-12)
    pd.testing.assert_series_equal(
        fit.residuals("quantile"), fit.quantile_residuals().normal, check_names=False, check_exact=True
    )
    assert list(found.tests().index) == ["uniformity", "dispersion", "outliers"]
    assert not found.zeros
    # Simulated responses are those of fit.simulate, by a key of their own.
    again = fit.quantile_residuals(key=3, n=20)
    np.testing.assert_array_equal(again.simulated, found.simulated[:20])
    held = fit.quantile_residuals(key=3, n=100, random="fitted")
    assert held.simulated.std(0).mean() < found.simulated.std(0).mean()
    with pytest.raises(ValueError, match="random must be 'new' or 'fitted', got 'old'"):
        fit.quantile_residuals(random="old")


def test_zeros_of_counts_are_tested():
    fit = fit_of("epil_poisson")
    found = fit.quantile_residuals(key=1)
    row = found.tests().loc["zeros"]
    zeros = (found.simulated == 0).mean(1)
    own = (fit.design.y == 0).mean()
    assert row["statistic"] == own
    assert row["expected"] == pytest.approx(zeros.mean(), rel=1e-12)
    above, below = (1 + (zeros >= own).sum()) / 251, (1 + (zeros <= own).sum()) / 251
    assert row["p_value"] == pytest.approx(min(1.0, 2 * min(above, below)))
    assert "zeros: share of zeros" in str(found)
    whole = fit.zero_inflation(key=1)
    assert whole["observed"] == (fit.design.y == 0).sum()
    assert whole["expected"] == pytest.approx(236 * zeros.mean())
    assert whole["ratio"] == pytest.approx(own / zeros.mean())
    assert whole["p_value"] == row["p_value"]


def test_tests_hold_their_level():
    """Of 60 responses of the model each, at the 10 % level; parameters known, so that the level is exact."""
    fit = fit_of("epil_nbinom2")
    names = ("uniformity", "dispersion", "outliers", "zeros")
    p = {name: [] for name in (*names, "simulation")}
    for i, y in enumerate(fit.simulate(7, 60)):
        record = with_response(fit, y)
        tests = mj.GLMMFit(record).quantile_residuals(key=100 + i, n=39).tests()
        for name in names:
            p[name].append(tests.loc[name, "p_value"])
        if i < 30:
            p["simulation"].append(mj.GLMMFit(record).overdispersion(key=100 + i, n=39).loc["simulation", "p_value"])
    for values in p.values():
        values = np.array(values)
        rejected = int((values <= 0.1).sum())
        assert stats.binom.sf(rejected - 1, len(values), 0.1) > 1e-3
        assert values.mean() > 0.4


# --- dispersion and zeros --------------------------------------------------------------------------------------------


def test_pearson_s_ratio_by_hand():
    fit = fit_of("cbpp")
    found = fit.overdispersion(n=50)
    size = case("cbpp").table["size"].to_numpy(float)
    mu = fit.fitted.to_numpy()
    squares = ((fit.design.y - size * mu) ** 2 / (size * mu * (1 - mu))).sum()
    df = 56 - fit.npar
    assert found.loc["pearson", "df"] == df
    assert found.loc["pearson", "statistic"] == pytest.approx(squares / df, rel=1e-12)
    assert found.loc["pearson", "p_value"] == pytest.approx(stats.chi2.sf(squares, df), rel=1e-9)
    # By simulation: modes of every response by a fit whose parameters cannot move.
    record = fit.record
    Y = fit.simulate(0, 50)
    own = np.concatenate([fit.design.y[None], Y])
    eta = predictors_at_modes(record.rows, record.estimates, own)
    np.testing.assert_allclose(eta[0], fit.linear_predictor, rtol=1e-6, atol=1e-7)
    squares = (pearson_of(record, own, eta) ** 2).sum(1)
    assert found.loc["simulation", "statistic"] == pytest.approx(squares[0] / squares[1:].mean(), rel=1e-9)
    above = (1 + (squares[1:] >= squares[0]).sum()) / 51
    assert found.loc["simulation", "p_value"] == pytest.approx(above)


def unequal(extra, seed=5):
    """Counts of successes of 5 to 19 trials in 18 groups of unequal size; ``extra`` is what rows vary beyond."""
    rng = np.random.default_rng(seed)
    g, x, size = rng.integers(0, 18, 240), rng.normal(2.0, 1.5, 240), rng.integers(5, 20, 240)
    eta = -1.5 + 0.4 * x + rng.normal(0.0, 1.2, 18)[g] + rng.normal(0.0, extra, 240)
    s = rng.binomial(size, 1 / (1 + np.exp(-eta)))
    return mj.glmm(
        "s ~ x + (1 | g)", pd.DataFrame({"g": g, "x": x, "size": size, "s": s}), family="binomial", size="size"
    )


@pytest.mark.parametrize("model", ["salamanders_presence", "owls_slopes", "grouseticks", "groups of unequal size"])
def test_modes_of_other_responses(model):
    """Stationary points of the penalised likelihood: ``Sigma^-1 b = -Z'c'``, by rows and levels."""
    fit = unequal(0.0) if model == "groups of unequal size" else fit_of(model)
    record = fit.record
    rows, design = record.rows, record.design
    Y = fit.simulate(5, 20 if model == "groups of unequal size" else 2)
    eta = predictors_at_modes(rows, record.estimates, Y)
    for y, own in zip(Y, eta, strict=True):
        c1 = rows.family.derivatives(own, y, rows.size, list(fit.estimates.psi)).by_eta[1]
        total = np.asarray(design.X) @ fit.fixef.to_numpy() + (0.0 if design.offset is None else design.offset)
        for term, Sigma in zip(design.terms, fit.Sigma.values(), strict=True):
            score = np.stack([np.bincount(term.group, -c1 * z, term.n_groups) for z in np.asarray(term.Z).T], 1)
            total = total + (np.asarray(term.Z) * (score @ Sigma)[term.group]).sum(1)
        np.testing.assert_allclose(own, total, rtol=1e-4, atol=1e-4)


def test_trials_that_vary_too_much_are_found_and_others_are_not():
    """An empty place of a short group must not have the response of a row with more trials than its own."""
    fit = unequal(0.8)
    found = fit.overdispersion(key=1)
    assert (found["p_value"] < 0.01).all()
    # Against refits, whose parameters move too, which takes up a little.
    squares = [(fit.refit(y).residuals("pearson") ** 2).sum() for y in fit.simulate(1, 10)]
    ratio = (fit.residuals("pearson") ** 2).sum() / np.mean(squares)
    assert found.loc["simulation", "statistic"] == pytest.approx(ratio, rel=0.1)
    # Of responses of the model, parameters known, a tenth is found at the 10 % level.
    true = unequal(0.0)
    again = [mj.GLMMFit(with_response(true, y)).overdispersion(key=i, n=39) for i, y in enumerate(true.simulate(7, 40))]
    p = np.array([found.loc["simulation", "p_value"] for found in again])
    assert stats.binom.sf((p <= 0.1).sum() - 1, 40, 0.1) > 1e-3
    assert p.mean() > 0.4
    assert np.mean([found.loc["simulation", "statistic"] for found in again]) == pytest.approx(1.0, abs=0.05)


def test_counts_that_vary_too_much_are_found_and_others_are_not():
    poisson, nbinom = fit_of("epil_poisson").overdispersion(), fit_of("epil_nbinom2").overdispersion()
    assert (poisson["p_value"] < 0.01).all()
    assert poisson.loc["simulation", "statistic"] > 1.5
    assert nbinom.loc["simulation", "p_value"] > 0.1
    # The chi-square distribution does not know that random effects take up half of these rows' variance.
    assert nbinom.loc["pearson", "statistic"] < 0.9
    assert abs(nbinom.loc["simulation", "statistic"] - 1) < 0.15


def test_zeros_beside_counts_are_found():
    rng = np.random.default_rng(0)
    y = rng.poisson(3.0, 200) * (rng.random(200) < 0.75)
    fit = mj.glmm("y ~ 1 + (1 | g)", {"y": y, "g": np.arange(200) // 10}, "poisson")
    found = fit.zero_inflation(n=100)
    assert found["observed"] == (y == 0).sum()
    assert found["ratio"] > 1.5
    assert found["p_value"] == pytest.approx(2 / 101)


def test_responses_without_dispersion_or_zeros_say_what_to_do():
    single, positive = fit_of("bacteria"), fit_of("sleepstudy_gamma_intercept")
    with pytest.raises(ValueError, match=r"single outcomes vary as their mean says.*recalculate\(group\)"):
        single.overdispersion()
    with pytest.raises(ValueError, match=r"share of zeros is fitted.*recalculate\(group\)"):
        single.zero_inflation()
    with pytest.raises(ValueError, match="family gamma has zeros: there is nothing to compare"):
        positive.zero_inflation(n=20)
    with pytest.raises(ValueError, match="take too much memory"):
        fit_of("cbpp").overdispersion(n=10**8)
    assert abs(positive.overdispersion(n=50).loc["simulation", "statistic"] - 1) < 0.2
    assert len(single.quantile_residuals(n=50).recalculate("ID").values) == 50


# --- the working model -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["salamanders_presence", "owls_slopes", "cbpp_cloglog", "sleepstudy_gamma_slopes"])
def test_leverages_are_those_of_the_hat_matrix(model):
    fit = fit_of(model)
    record = fit.record
    w = working_weights(record)
    Z = np.concatenate([
        np.concatenate([np.asarray(term.Z)[:, [a]] * (np.asarray(term.group)[:, None] == np.arange(term.n_groups))
                        for a in range(np.shape(term.Z)[1])], axis=1)
        for term in record.design.terms
    ], axis=1)  # fmt: skip
    D = [
        np.kron(Sigma, np.eye(term.n_groups))
        for Sigma, term in zip(fit.Sigma.values(), record.design.terms, strict=True)
    ]
    total = np.zeros((Z.shape[1], Z.shape[1]))
    at = 0
    for block in D:
        total[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    X = np.asarray(record.design.X)
    V = Z @ total @ Z.T + np.diag(1 / w)
    VX = np.linalg.solve(V, X)
    H1 = X @ np.linalg.solve(X.T @ VX, VX.T)
    H2 = Z @ total @ Z.T @ np.linalg.solve(V, np.eye(len(w)) - H1)
    found = fit.leverage()
    np.testing.assert_allclose(found["fixed"], np.diag(H1), rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(found["random"], np.diag(H2), rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(found["overall"], found["fixed"] + found["random"])
    assert found["fixed"].sum() == pytest.approx(X.shape[1])


def test_weights_of_a_family_that_is_not_log_concave_are_the_expected_ones():
    fit = mj.glmm(
        "Reaction ~ Days + (1 | Subject)", mj.datasets.load("sleepstudy").assign(Reaction=lambda d: d.Reaction / 300),
        "gamma", link="inverse",
    )  # fmt: skip
    record = fit.record
    psi = list(fit.estimates.psi)
    observed = np.asarray(record.family.derivatives(fit.estimates.eta, record.rows.y, None, psi).by_eta[2])
    expected = np.asarray(record.family.expected(fit.estimates.eta, None, psi).w)
    np.testing.assert_array_equal(working_weights(record), expected if (observed < 0).any() else observed)
    # A response so far out that its density is not concave there.
    y = np.array(record.rows.y)
    far = dataclasses.replace(record, estimates=record.estimates._replace(eta=-np.abs(record.estimates.eta)))
    with pytest.raises(ValueError, match="not concave at"):
        working_weights(dataclasses.replace(far, rows=dataclasses.replace(record.rows, y=y, family=bent())))


def bent():
    """A family of one's own whose log density is convex in places."""
    import jax.numpy as jnp

    return mj.families.custom(lambda y, eta, size, psi: -jnp.log1p((y - eta) ** 2), lambda eta: eta)


def test_columns_beside_the_table():
    fit = fit_of("cbpp")
    frame = fit.augment()
    assert list(frame)[:-12] == list(fit.labels.frame)
    np.testing.assert_array_equal(frame[".fitted"], fit.fitted)
    np.testing.assert_allclose(frame[".linear_predictor"], frame[".fixed"] + frame[".random"], rtol=1e-12)
    np.testing.assert_array_equal(frame[".resid"], fit.residuals("deviance"))
    np.testing.assert_array_equal(frame[".pearson_resid"], fit.residuals("pearson"))
    h, p = frame[".leverage"], len(fit.fixef)
    np.testing.assert_array_equal(h, fit.leverage()["overall"])
    np.testing.assert_allclose(frame[".cooksd"], (frame[".std_resid"] / (1 - h)) ** 2 * h / p, rtol=1e-12)
    np.testing.assert_allclose(frame[".student_resid"], frame[".std_resid"] / np.sqrt(1 - h), rtol=1e-12)
    gamma = fit_of("sleepstudy_gamma_intercept")
    own = gamma.augment()
    scale = np.sqrt(gamma.dispersion["dispersion"])
    np.testing.assert_allclose(own[".std_resid"], own[".pearson_resid"] / scale, rtol=1e-10)


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plots():
    mpl = pytest.importorskip("matplotlib", reason="plots need the extra mixjax[plots]")
    mpl.use("Agg")
    from mixjax import plots

    yield plots
    mpl.pyplot.close("all")


def test_pictures_show_quantile_residuals(plots):
    fit = fit_of("epil_poisson")
    residual = fit.residuals("quantile")
    axes = fit.plot()
    assert [ax.get_ylabel() for ax in axes] == [
        "quantile residual of y", "quantile residual of y", "√|quantile residual|", "standardized Intercept of subject"
    ]  # fmt: skip
    x, y = axes[0].lines[0].get_data()
    np.testing.assert_allclose(y, residual)
    np.testing.assert_allclose(x, np.exp(np.asarray(fit.design.X) @ fit.fixef.to_numpy()))
    np.testing.assert_allclose(np.sort(axes[1].lines[-1].get_ydata()), np.sort(residual))
    other = plots.residuals(fit, kind="pearson")
    np.testing.assert_allclose(other.lines[0].get_data(), [fit.fitted, fit.residuals("pearson")])
    assert other.get_xlabel() == "fitted y (conditional mean)"
    assert plots.caterpillar(fit).get_xlabel() == "Intercept (log scale)"
    with pytest.raises(ValueError, match="kinds and no scales; got scale='pearson'"):
        plots.qq(fit, scale="pearson")
    with pytest.raises(ValueError, match="or 'quantile', got 'conditional'"):
        plots.residuals(fit, kind="conditional")


def test_means_of_groups_are_drawn_trial_by_trial(plots):
    fit, table = fit_of("cbpp"), case("cbpp").table
    ax = plots.observed(fit)
    sums = (
        table.assign(fitted=fit.fitted * table["size"])
        .groupby("herd", observed=True)[["incidence", "size", "fitted"]]
        .sum()
    )
    drawn = ax.collections[0].get_offsets()
    expected = np.column_stack([sums["fitted"] / sums["size"], sums["incidence"] / sums["size"]])
    np.testing.assert_allclose(np.sort(drawn, 0), np.sort(expected, 0), rtol=1e-10)
    assert len(plots.observed(fit_of("epil_poisson"), "lbase").collections[0].get_offsets()) == 10


def test_pictures_of_linear_models_say_what_to_use(plots):
    fit = fit_of("cbpp")
    for draw, instead in (
        (lambda: plots.trellis(fit, "size"), "plots.observed"),
        (lambda: plots.shrinkage(fit), "plots.caterpillar"),
        (lambda: plots.variance_components(fit), "fit.varcorr"),
    ):
        with pytest.raises(TypeError, match=f"linear mixed models; of a generalised one use {instead}"):
            draw()


def test_a_lineup_hides_the_fit_among_refits(plots):
    fit = fit_of("cbpp")
    found = mj.lineup(fit, "qq", n=3, key=2)
    drawn = [np.sort(ax.lines[-1].get_ydata()) for ax in found.axes]
    real = np.sort(fit.residuals("quantile"))
    place = found.reveal()
    assert [bool(np.allclose(own, real)) for own in drawn] == [i + 1 == place for i in range(3)]
