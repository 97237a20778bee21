"""Simulated residuals: uniform under the model, and tests that hold their level and see what is wrong."""

import numpy as np
import pandas as pd
import pytest
from conftest import fit_of
from scipy import stats

import mixjax as mj
from mixjax.diagnostics.quantile_residuals import (
    QuantileResiduals,
    _dispersion,
    _distance,
    _outliers,
    _ranks,
    quantile_residuals,
    scaled_residuals,
)


def of(y, simulated, key=0):
    import jax

    return QuantileResiduals(np.asarray(y, float), np.asarray(simulated, float), jax.random.key(key), None, "")


def test_places_among_simulated_ones_by_hand():
    simulated = np.array([[1.0, 5.0], [2.0, 5.0], [3.0, 5.0]])
    a = scaled_residuals(np.array([2.5, 5.0]), simulated, key=1)
    assert 2 / 4 <= a[0] < 3 / 4  # two of three below
    assert 0 <= a[1] < 1  # all equal: anywhere
    np.testing.assert_array_equal(a, scaled_residuals(np.array([2.5, 5.0]), simulated, key=1))
    assert (a != scaled_residuals(np.array([2.5, 5.0]), simulated, key=2)).all()
    # Scale and location of response and simulations together do not matter.
    np.testing.assert_array_equal(a, scaled_residuals(3 * np.array([2.5, 5.0]) - 1, 3 * simulated - 1, key=1))


def test_exactly_uniform_for_normal_and_for_count_data():
    rng = np.random.default_rng(1)
    for draw in (rng.standard_normal, lambda size: rng.poisson(1.5, size)):
        u = scaled_residuals(draw(20_000), draw((19, 20_000)), key=3)
        assert stats.kstest(u, "uniform").pvalue > 1e-3


def test_statistics_by_hand():
    rng = np.random.default_rng(2)
    y, simulated = rng.standard_normal(30), rng.standard_normal((9, 30))
    all_y = np.vstack([y, simulated])
    ranks = _ranks(all_y, of(y, simulated).key)
    np.testing.assert_array_equal(ranks, stats.rankdata(all_y, axis=0) - 1)
    expected = [stats.kstest((row + 0.5) / 10, "uniform").statistic for row in ranks]
    np.testing.assert_allclose(_distance(ranks), expected, rtol=1e-12)
    np.testing.assert_allclose(_outliers(ranks), [np.isin(row, [0, 9]).mean() for row in ranks])
    squares = [((all_y[i] - np.delete(all_y, i, 0).mean(0)) ** 2).mean() for i in range(10)]
    np.testing.assert_allclose(_dispersion(y, simulated), squares / np.mean(squares[1:]))


def test_ties_have_random_places():
    y, simulated = np.zeros(4_000), np.zeros((3, 4_000))
    ranks = _ranks(np.vstack([y, simulated]), of(y, simulated).key)
    assert (np.sort(ranks, axis=0) == np.arange(4)[:, None]).all()
    assert abs(ranks[0].mean() - 1.5) < 4 * np.sqrt(1.25 / 4_000)


def test_p_values_hold_their_level_where_residuals_depend_on_each_other():
    """600 data sets with a large group variance: shares of small p values are binomial. KS tables would reject half."""
    rng = np.random.default_rng(3)
    p, naive = [], []

    def draw(size):
        return 2 * np.repeat(rng.standard_normal((size, 6)), 5, axis=1) + rng.standard_normal((size, 30))

    for _ in range(600):
        sample = draw(40)
        found = of(sample[0], sample[1:])
        p.append(found.tests()["p_value"])
        naive.append(stats.kstest(found.values, "uniform").pvalue)
    p = np.array(p)
    for column in p.T:
        for alpha in (0.1, 0.3):
            assert stats.binom.cdf((column <= alpha).sum(), 600, alpha) < 0.9999
    assert (p[:, 0] <= 0.3).mean() > 0.3 - 4 * np.sqrt(0.21 / 600)  # one-sided, continuous: no smaller either
    assert np.mean(np.array(naive) < 0.05) > 0.2


def test_a_fit_of_the_right_model_passes():
    found = quantile_residuals(fit_of("penicillin", "REML").record, key=1)
    assert (found.tests()["p_value"] > 0.01).all()
    assert ((found.values > 0) & (found.values < 1)).all()
    again = quantile_residuals(fit_of("penicillin", "REML").record, key=1)
    pd.testing.assert_series_equal(found.values, again.values)


def simulated_fit(error, curve=0.0, key=1):
    rng = np.random.default_rng(key)
    g = np.repeat(np.arange(40), 10)
    x = np.tile(np.linspace(-1, 1, 10), 40)
    y = rng.standard_normal(40)[g] + x + curve * x**2 + error(rng, x)
    return mj.lmm("y ~ x + (1 | g)", pd.DataFrame({"y": y, "x": x, "g": g}))


def test_what_is_wrong_is_seen():
    heavy = simulated_fit(lambda rng, x: rng.standard_t(2, len(x)))
    tests = quantile_residuals(heavy.record, 1, random="fitted").tests()
    assert tests.loc["uniformity", "p_value"] < 0.01
    assert tests.loc["outliers", "statistic"] > 2 * tests.loc["outliers", "expected"]
    curved = simulated_fit(lambda rng, x: rng.standard_normal(len(x)), curve=3.0)
    by_x = quantile_residuals(curved.record, 1, random="fitted").by("x")
    assert (by_x["p_holm"] < 0.05).sum() >= 5
    assert by_x["mean"].iloc[0] > 0.7 > 0.3 > by_x["mean"].iloc[4]
    fan = simulated_fit(lambda rng, x: np.exp(1.5 * x) * rng.standard_normal(len(x)))
    by_x = quantile_residuals(fan.record, 1, random="fitted").by("x")
    assert by_x["p_holm"].iloc[0] < 0.05


def test_numbers_are_cut_into_groups():
    rng = np.random.default_rng(2)
    table = pd.DataFrame({"y": rng.normal(size=400), "x": rng.normal(size=400), "g": np.arange(400) // 10})
    found = quantile_residuals(mj.lmm("y ~ x + (1 | g)", table).record, 1, n=60)
    by_x = found.by("x")
    assert by_x["n"].tolist() == [40] * 10
    assert (by_x.index.left < by_x.index.right).all()
    assert by_x.index.is_monotonic_increasing
    # The groups are those of labels given by hand.
    edges = np.quantile(table["x"], np.arange(1, 4) / 4)
    by_hand = found.by(np.searchsorted(edges, table["x"].to_numpy()))
    pd.testing.assert_frame_equal(found.by("x", bins=4).reset_index(drop=True), by_hand.reset_index(drop=True))
    np.testing.assert_allclose(found.recalculate("x", bins=4).y[0], table["y"][table["x"] <= edges[0]].mean())
    # Whole numbers may be names of levels, and stay as they are unless asked otherwise.
    assert len(found.by("g")) == 40
    assert found.by("g", bins=5)["n"].tolist() == [80] * 5
    assert len(found.by(np.repeat([1.5, 2.5], 200), bins=5)) == 2
    ties = np.where(np.arange(400) < 300, 0.5, table["x"])  # edges that are one
    assert found.by(ties)["n"].sum() == 400
    with pytest.raises(mj.DataError, match="bins= cuts numbers, and groups has"):
        found.by(np.array(list("ab") * 200), bins=3)
    with pytest.raises(mj.DataError, match="1 missing values"):
        found.by(np.r_[np.nan, np.arange(399.0)], bins=3)
    with pytest.raises(ValueError, match="bins must be an integer, 2 or more"):
        found.by("x", bins=1)


def test_tests_are_printed_whole():
    tests = quantile_residuals(fit_of("sleepstudy_slopes", "REML").record, 1, n=40).tests()
    assert list(tests.columns) == ["statistic", "expected", "p_value"]
    assert "..." not in str(tests)
    for note in tests.attrs["notes"]:
        assert note in str(tests)
    assert [note.split(":")[0] for note in tests.attrs["notes"]] == list(tests.index)


def test_means_of_groups():
    fit = fit_of("sleepstudy_slopes", "REML")
    found = quantile_residuals(fit.record, 1)
    means = found.recalculate("Subject")
    frame = fit.labels.frame
    np.testing.assert_allclose(means.y, frame.groupby("Subject", observed=True)["Reaction"].mean())
    assert means.to_frame().index.tolist() == sorted(frame["Subject"].unique())
    assert list(found.to_frame())[-1] == ".quantile_resid"
    assert "uniformity" in str(means)
    labels = found.recalculate(frame["Subject"].astype(str).to_numpy())
    np.testing.assert_allclose(labels.y, means.y)


def test_bad_input():
    fit = fit_of("sleepstudy_slopes", "REML")
    found = quantile_residuals(fit.record, 1, n=5)
    with pytest.raises(ValueError, match="n must be an integer, 1 or more"):
        quantile_residuals(fit.record, 1, n=0)
    with pytest.raises(mj.DataError, match=r"no column 'Nights'.*Subject"):
        found.by("Nights")
    with pytest.raises(mj.DataError, match="180 labels"):
        found.by([1, 2])
    with pytest.raises(mj.DataError, match="1 missing labels"):
        found.by([None, *["a"] * 179])
    with pytest.raises(ValueError, match="random must be"):
        quantile_residuals(fit.record, 1, random="some")
    with pytest.raises(ValueError, match=r"simulated \(B, n\)"):
        scaled_residuals(np.zeros(3), np.zeros((5, 2)))
    with pytest.raises(ValueError, match="too much memory"):
        quantile_residuals(fit.record, 1, n=10**7)
