"""What is drawn: numbers in artists, names on axes; and that nothing else changes."""

import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import HERE, fit_of, run_python, table

pytest.importorskip("matplotlib", reason="plots need the extra mixjax[plots]")

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import same_color, to_hex

import mixjax as mj
from mixjax import plots
from mixjax.diagnostics.influence import influence
from mixjax.plots import scatter, units
from mixjax.plots.canvas import name_points
from mixjax.plots.lines import group_mean
from mixjax.plots.order import bands, line, scores
from mixjax.plots.smooth import local_linear


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def sleep():
    return fit_of("sleepstudy_slopes", "REML")


@pytest.fixture(scope="module")
def flat():
    """Singular: its one variance is 0."""
    return fit_of("dyestuff2", "REML")


@pytest.fixture(scope="module")
def crossed():
    return fit_of("penicillin", "REML")


def labelled(ax, label):
    """The lines with a label."""
    return [one for one in ax.lines if one.get_label() == label]


def texts(ax):
    return [text.get_text() for text in ax.texts]


# --- curves and bands -------------------------------------------------------------------------------------------------


def test_smooth_keeps_a_line():
    x = np.random.default_rng(0).uniform(0, 9, 50)
    places, curve = local_linear(x, 3 - 2 * x)
    np.testing.assert_allclose(curve, 3 - 2 * places, rtol=1e-12, atol=1e-12)


def test_smooth_is_local_weighted_least_squares():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=40), rng.normal(size=40)
    places, curve = local_linear(x, y, 0.4, iterations=0)
    np.testing.assert_array_equal(places, np.sort(x))
    for place, value in zip(places, curve, strict=True):
        distance = np.abs(x - place)
        reach = 1.0001 * np.sort(distance)[15]  # ceil(0.4 * 40) nearest
        w = np.sqrt(np.clip(1 - (distance / reach) ** 3, 0, None) ** 3)
        line_there = np.linalg.lstsq(w[:, None] * np.column_stack([np.ones(40), x - place]), w * y, rcond=None)[0]
        assert value == pytest.approx(line_there[0], abs=1e-10)


def test_smooth_withstands_outliers_and_ties():
    x = np.repeat(np.arange(10.0), 10)
    y = np.sin(x / 3)
    y[::17] += 50.0
    places, curve = local_linear(x, y, 0.3)
    np.testing.assert_array_equal(places, np.arange(10.0))
    assert np.abs(curve - np.sin(places / 3)).max() < 0.1
    shaken = np.abs(local_linear(x, y, 0.3, iterations=0)[1] - np.sin(places / 3)).max()
    assert shaken > 1.0
    assert len(local_linear(np.repeat([1.0, 2.0, 3.0], 9), np.ones(27))[0]) == 0


def test_smooth_of_many_rows_is_that_of_their_runs():
    rng = np.random.default_rng(2)
    x = np.sort(rng.uniform(size=4_000))
    y = np.sin(6 * x) + rng.normal(size=4_000) / 5
    places, curve = local_linear(x, y, 0.3)
    assert len(places) == 80
    inner = (places > 0.05) & (places < 0.95)
    assert np.abs(curve - np.sin(6 * places))[inner].max() < 0.08


def test_smooth_moves_and_scales_with_the_data():
    rng = np.random.default_rng(3)
    x, y = rng.normal(size=60), rng.normal(size=60)
    places, curve = local_linear(x, y)
    moved, scaled = local_linear(5 - 3 * x, 1 + 2 * y)
    np.testing.assert_allclose(moved, np.sort(5 - 3 * places), rtol=1e-12)
    np.testing.assert_allclose(scaled, (1 + 2 * curve)[::-1], rtol=1e-8)


@pytest.mark.parametrize("n", [6, 40, 1_500])
def test_simultaneous_bands_hold_all_values_as_often_as_they_say(n):
    """Counts of 1 000 other samples: within 4 standard errors of a coverage that itself is good to 1 %."""
    found, N = bands(n, 0.9), 1_000
    samples = np.sort(np.random.default_rng(n).normal(size=(N, n)), axis=1)
    inside = 0
    for sample in samples:
        centre, scale = line(sample)
        t = (sample - centre) / scale
        low, high = (np.interp(scores(n), found.quantiles, limit) for limit in (found.lower, found.upper))
        inside += bool(((t >= low) & (t <= high)).all())
    # Between the places of a long sample a value may step out as well.
    slack = 0.01 if n <= 256 else 0.03
    assert abs(inside / N - 0.9) < 4 * np.sqrt(0.09 / N) + slack


def test_pointwise_bands_are_quantiles_of_order_statistics():
    found = bands(30, 0.9, "pointwise")
    i = np.arange(1, 31)
    np.testing.assert_allclose(found.lower, scipy.stats.norm.ppf(scipy.stats.beta.ppf(0.05, i, 31 - i)), rtol=1e-9)
    np.testing.assert_allclose(found.upper, -found.lower[::-1], rtol=1e-7)
    assert (bands(30, 0.9).upper > found.upper).all()


@pytest.mark.parametrize("n", [4, 25, 300])
def test_the_line_is_fitted_to_the_middle(n):
    y = np.sort(np.random.default_rng(n).normal(2, 3, n))
    cut = n // 10
    z = scores(n)
    slope, intercept = np.polyfit(z[cut : n - cut], y[cut : n - cut], 1)
    np.testing.assert_allclose(line(y), (intercept, slope), rtol=1e-10)
    y[-cut:] += 100.0 * (cut > 0)
    np.testing.assert_allclose(line(y), (intercept, slope), rtol=1e-10)


# --- residuals --------------------------------------------------------------------------------------------------------


def test_residuals_against_fitted_values(sleep):
    ax = plots.residuals(sleep)
    (points,), (smooth,) = labelled(ax, "rows"), labelled(ax, "smooth")
    np.testing.assert_array_equal(points.get_xdata(), sleep.fitted)
    np.testing.assert_array_equal(points.get_ydata(), sleep.residuals())
    expected = local_linear(sleep.fitted.to_numpy(), sleep.residuals().to_numpy())
    np.testing.assert_allclose(smooth.get_xydata().T, expected)
    assert ax.get_xlabel() == "fitted Reaction (conditional mean)"
    assert ax.get_ylabel() == "conditional residual of Reaction (raw)"
    assert any(list(one.get_ydata()) == [0.0, 0.0] for one in ax.lines)


def test_residuals_against_a_column_and_values(sleep):
    ax = plots.residuals(sleep, "Days", "marginal", smooth=False)
    (points,) = labelled(ax, "rows")
    np.testing.assert_array_equal(points.get_xdata(), table("sleepstudy")["Days"])
    np.testing.assert_array_equal(points.get_ydata(), sleep.residuals("marginal"))
    assert not labelled(ax, "smooth")
    hours = (table("sleepstudy")["Days"] * 24.0).rename("hours")
    ax = plots.residuals(sleep, hours.sample(frac=1, random_state=1))  # lined up by its index
    np.testing.assert_array_equal(labelled(ax, "rows")[0].get_xdata(), hours)
    assert ax.get_xlabel() == "hours"


@pytest.mark.parametrize("x", ["Subject", "text"])
def test_categories_are_boxes(sleep, x):
    values = table("sleepstudy")["Subject"].astype(str).to_numpy() if x == "text" else x
    ax = plots.residuals(sleep, values)
    medians = [
        one.get_ydata()[0] for one in ax.lines if len(set(one.get_ydata())) == 1 and same_color(one.get_color(), "C3")
    ]
    by_subject = sleep.residuals().groupby(table("sleepstudy")["Subject"].to_numpy(), observed=True).median()
    np.testing.assert_allclose(medians, by_subject)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == list(by_subject.index.astype(str))
    points = max(ax.lines, key=lambda one: len(one.get_xdata()))
    assert len(points.get_xdata()) == 180
    assert np.abs(points.get_xdata() - np.round(points.get_xdata())).max() < 0.25


def test_many_rows_are_hexagons_and_many_categories_quartiles(sleep, monkeypatch):
    monkeypatch.setattr(scatter, "MOST_POINTS", 100)
    ax = plots.residuals(sleep)
    assert not labelled(ax, "rows")
    assert ax.collections[0].get_array().sum() == 180
    assert labelled(ax, "smooth")
    assert ax.get_title() == "180 rows, stronger colour for more"
    pairs = np.arange(180) // 2
    ax = plots.residuals(sleep, pairs.astype(str))
    assert "90 levels" in ax.get_xlabel()
    assert len(ax.get_xticks()) == 0
    expected = np.sort(sleep.residuals().groupby(pairs).median())
    np.testing.assert_allclose(labelled(ax, "median")[0].get_ydata(), expected)


def test_scale_location(sleep):
    ax = plots.scale_location(sleep)
    expected = np.sqrt(np.abs(sleep.residuals()) / sleep.sigma)
    np.testing.assert_allclose(labelled(ax, "rows")[0].get_ydata(), expected)


def test_rows_without_a_residual_are_counted(sleep):
    class Undefined:
        record = sleep.record

        def residuals(self, kind, scale):
            values = sleep.residuals().copy()
            values.iloc[:3] = np.nan
            return values

    with pytest.warns(mj.InferenceWarning, match="3 of 180 rows"):
        ax = plots.residuals(Undefined())
    assert "3 rows not drawn" in texts(ax)
    assert len(labelled(ax, "rows")[0].get_xdata()) == 177


# --- quantiles --------------------------------------------------------------------------------------------------------


def test_qq_draws_ordered_residuals(sleep):
    ax = plots.qq(sleep)
    points = ax.lines[-1]
    np.testing.assert_array_equal(points.get_ydata(), np.sort(sleep.residuals()))
    np.testing.assert_allclose(points.get_xdata(), scores(180))
    assert ax.get_title() == "95 % simultaneous band"
    assert len(ax.collections) == 1
    outlying = {str(i) for i in np.abs(sleep.residuals()).nlargest(3).index}
    assert outlying <= set(texts(ax))
    assert len(texts(ax)) <= 5
    assert not plots.qq(sleep, band=None).collections
    weighted = fit_of("sleepstudy_weighted", "REML")
    ax = plots.qq(weighted)
    np.testing.assert_array_equal(ax.lines[-1].get_ydata(), np.sort(weighted.residuals(scale="pearson")))
    assert ax.get_ylabel() == "conditional residual of Reaction (pearson)"


def test_qq_of_values_that_are_undefined_or_alike(sleep):
    class Strange:
        record = sleep.record

        def residuals(self, kind, scale):
            values = sleep.residuals().copy()
            values.iloc[:4] = np.nan
            return values if kind == "conditional" else values * 0

    ax = plots.qq(Strange())
    assert "4 undefined" in texts(ax)
    np.testing.assert_array_equal(ax.lines[-1].get_ydata(), np.sort(sleep.residuals()[4:]))
    ax = plots.qq(Strange(), "marginal")
    assert len(ax.lines) == 1  # points, and neither line nor band
    assert not ax.collections


def test_qq_of_random_effects_divides_by_their_sd(sleep):
    frames, condvar = sleep.ranef(condvar=True)
    sd = np.sqrt(np.diag(sleep.Sigma["Subject"]) - condvar["Subject"][:, [0, 1], [0, 1]])
    expected = frames["Subject"].to_numpy() / sd
    ax = plots.qq_ranef(sleep)
    for j, name in enumerate(["Intercept", "Days"]):
        np.testing.assert_allclose(labelled(ax, name)[0].get_ydata(), np.sort(expected[:, j]), rtol=1e-10)
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["Intercept", "Days"]
    ax = plots.qq_ranef(sleep, "Subject", "(Intercept)")  # lme4's name
    assert ax.get_ylabel() == "standardized Intercept of Subject"
    assert ax.get_legend() is None


def test_effects_without_variance_are_said_to_have_none(flat):
    ax = plots.qq_ranef(flat)
    assert not ax.lines
    assert texts(ax) == ["Intercept: variance estimated as 0"]
    ax = plots.caterpillar(flat)
    assert ax.get_title() == "variance estimated as 0"
    assert len(plots.overview(flat)) == 4


# --- levels -----------------------------------------------------------------------------------------------------------


def test_caterpillar_has_intervals_in_the_order_of_the_first_effect(sleep):
    axes = plots.caterpillar(sleep, level=0.9)
    frames, condvar = sleep.ranef(condvar=True)
    frame = frames["Subject"]
    order = np.argsort(frame["Intercept"].to_numpy())
    for j, ax in enumerate(axes):
        b = frame.iloc[order, j].to_numpy()
        half = scipy.stats.norm.ppf(0.95) * np.sqrt(condvar["Subject"][order, j, j])
        segments = np.array(ax.collections[0].get_segments())
        np.testing.assert_allclose(segments[:, :, 0], np.column_stack([b - half, b + half]), rtol=1e-10)
        np.testing.assert_array_equal(ax.lines[-1].get_xdata(), b)
    assert [tick.get_text() for tick in axes[0].get_yticklabels()] == list(frame.index[order])
    assert axes[1].get_xlabel() == "Days (Reaction per unit of Days)"
    assert axes[0].get_title() == "BLUPs, 90 % intervals"


def test_many_levels_have_no_names():
    # Levels enough that no type is small enough.
    n = 80
    g = np.repeat(np.arange(n), 1 + np.arange(n) % 3)
    y = np.random.default_rng(0).normal(size=len(g)) + 2.0 * np.sin(g)
    fit = mj.lmm("y ~ 1 + (1 | g)", {"g": g, "y": y})
    ax = plots.caterpillar(fit)
    assert len(ax.get_yticks()) == 0
    assert ax.get_ylabel() == "g (80 levels)"
    frames, condvar = fit.ranef(condvar=True)
    order = np.argsort(frames["g"]["Intercept"].to_numpy())
    widths = np.diff([segment[:, 0] for segment in ax.collections[0].get_segments()])[:, 0]
    expected = 2 * scipy.stats.norm.ppf(0.975) * np.sqrt(condvar["g"][order, 0, 0])  # unequal numbers of rows
    np.testing.assert_allclose(widths, expected, rtol=1e-9)


def own_estimates(fit, group="Subject"):
    """The table of mixjax.diagnostics.shrinkage, by least squares level by level."""
    term = [label.group for label in fit.labels.terms].index(group)
    Z, codes = np.asarray(fit.design.terms[term].Z), np.asarray(fit.design.terms[term].group)
    rows = []
    for i, level in enumerate(fit.labels.terms[term].levels):
        own = np.linalg.lstsq(Z[codes == i], np.asarray(fit.design.y)[codes == i], rcond=None)[0]
        for name, value in zip(fit.labels.terms[term].effects, own, strict=True):
            mixed = fit.coef()[group].loc[level, name]
            rows.append((group, level, name, (codes == i).sum(), value, mixed, fit.fixef.get(name, 0.0)))
    return pd.DataFrame(rows, columns=["group", "level", "effect", "n", "own", "mixed", "population"])


def test_shrinkage_in_a_plane(sleep):
    frame = own_estimates(sleep)
    ax = plots.shrinkage(frame)
    for label, part in (("own estimate", "own"), ("mixed model", "mixed")):
        expected = frame.pivot(index="level", columns="effect", values=part)
        (points,) = labelled(ax, label)
        np.testing.assert_allclose(points.get_xydata(), expected[["Intercept", "Days"]])
    arrows = ax.collections[0]
    (own,), (mixed,) = labelled(ax, "own estimate"), labelled(ax, "mixed model")
    np.testing.assert_allclose(np.column_stack([arrows.U, arrows.V]), mixed.get_xydata() - own.get_xydata())
    np.testing.assert_allclose(labelled(ax, "population")[0].get_xydata()[0], sleep.fixef)


def test_shrinkage_along_one_effect_and_in_pairs(sleep):
    frame = own_estimates(sleep)
    frame.loc[(frame["level"] == "309"), "own"] = np.nan
    ax = plots.shrinkage(frame, effects="Days")
    assert texts(ax) == ["1 of 18 levels have no estimate of their own"]
    own = labelled(ax, "own estimate")[0].get_xdata()
    assert np.isnan(own).sum() == 1
    assert len(ax.collections[0].U) == 17
    third = frame[frame["effect"] == "Days"].assign(effect="Days2")
    axes = plots.shrinkage(pd.concat([frame, third]))
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in axes] == [
        ("Intercept", "Days"), ("Intercept", "Days2"), ("Days", "Days2"),
    ]  # fmt: skip
    with pytest.raises(mj.DataError, match=r"no effect of Subject 'Day' .*did you mean 'Days'"):
        plots.shrinkage(frame, effects="Day")


def test_shrinkage_asks_the_fit(sleep):
    fit = SimpleNamespace(record=sleep.record, shrinkage=lambda group: own_estimates(sleep, group))
    ax = plots.shrinkage(fit, "Subject")
    assert ax.get_xlabel() == "Intercept (Reaction)"
    with pytest.raises(TypeError, match="no method shrinkage"):
        plots.shrinkage(SimpleNamespace(record=sleep.record))


# --- lines by group ---------------------------------------------------------------------------------------------------


def test_trellis_draws_the_lines_of_coef(sleep):
    axes = plots.trellis(sleep, "Days", ncols=6)
    assert len(axes) == 18
    coef, data = sleep.coef()["Subject"], table("sleepstudy")
    for ax in axes:
        level = ax.get_title()
        (points,), (own,), (population,) = (labelled(ax, label) for label in ("data", "Subject", "population"))
        np.testing.assert_array_equal(points.get_ydata(), data.loc[data["Subject"] == level, "Reaction"])
        days = own.get_xdata()
        np.testing.assert_allclose(own.get_ydata(), coef.loc[level, "Intercept"] + coef.loc[level, "Days"] * days)
        np.testing.assert_allclose(population.get_ydata(), sleep.fixef["Intercept"] + sleep.fixef["Days"] * days)


def test_trellis_leaves_crossed_effects_out(crossed):
    axes = plots.trellis(crossed, "sample", "plate", levels=["a", "g"])
    for ax in axes:
        expected = crossed.fixef["Intercept"] + crossed.ranef()["plate"].loc[ax.get_title(), "Intercept"]
        np.testing.assert_allclose(labelled(ax, "plate")[0].get_ydata(), expected)
        assert len(labelled(ax, "data")[0].get_ydata()) == 6
    assert [tick.get_text() for tick in axes[0].get_xticklabels()] == list("ABCDEF")


def test_group_mean_has_the_factors_that_a_group_is_nested_in():
    fit = fit_of("pastes_nested", "REML")
    inner, outer = (label.group for label in fit.labels.terms)
    assert (inner, outer) == ("cask:batch", "batch")
    frame = fit.labels.frame
    b = {group: part["Intercept"] for group, part in fit.ranef().items()}
    batch = b["batch"].loc[frame["batch"]].to_numpy()
    np.testing.assert_allclose(group_mean(fit.record, "cask:batch"), fit.fitted, rtol=1e-12)
    np.testing.assert_allclose(group_mean(fit.record, "batch"), fit.fixef["Intercept"] + batch, rtol=1e-12)


def test_trellis_has_a_line_for_every_combination_of_other_categories():
    rng = np.random.default_rng(4)
    g, arm, x = (part.ravel() for part in np.meshgrid(range(40), ["a", "b"], range(4), indexing="ij"))
    frame = pd.DataFrame({"g": g, "arm": arm, "x": x, "y": rng.normal(size=40)[g] + x + rng.normal(size=320)})
    fit = mj.lmm("y ~ x + arm + (1 | g)", frame)
    axes = plots.trellis(fit, "x")
    assert len(axes) == 25
    assert axes[0].get_figure().legends[0].get_title().get_text() == "25 of 40 levels of g"
    for ax in axes[:2]:
        lines = labelled(ax, "g")
        assert [list(one.get_xdata()) for one in lines] == [[0, 1, 2, 3]] * 2
        np.testing.assert_allclose(np.diff(lines[0].get_ydata()), fit.fixef["x"])
        gap = lines[1].get_ydata() - lines[0].get_ydata()
        np.testing.assert_allclose(gap, fit.fixef["arm[T.b]"])


# --- profiles and replicates ------------------------------------------------------------------------------------------


def parabola():
    """A parameter whose deviance is a parabola around 3 with standard error 2, and a variance that ends at 0."""
    value = np.linspace(-4, 10, 15)
    near = pd.DataFrame({"parameter": "Days", "value": value, "zeta": (value - 3) / 2})
    sd = np.linspace(0, 4, 15)
    return pd.concat([near, pd.DataFrame({"parameter": "sd_Intercept|g", "value": sd, "zeta": sd - 1.0})])


def test_zeta_of_a_parabola_is_its_tangent():
    axes = plots.profile_zeta(parabola())
    curve = max(axes[0].lines, key=lambda one: len(one.get_xdata()))
    np.testing.assert_allclose(curve.get_ydata(), (curve.get_xdata() - 3) / 2, atol=1e-12)
    tangent = next(one for one in axes[0].lines if isinstance(one, mpl.lines.AxLine))
    assert tangent.get_xy1() == (3.0, 0.0)
    assert tangent.get_slope() == pytest.approx(0.5)
    assert [ax.get_xlabel() for ax in axes] == ["Days", "sd_Intercept|g"]
    limits = {round(float(one.get_ydata()[0]), 3) for one in axes[0].lines if len(one.get_xdata()) == 2} - {0.0}
    assert {1.96, -1.96, 2.576, -2.576} <= limits


def test_density_of_a_parabola_is_normal():
    axes = plots.profile_density(parabola())
    x, density = axes[0].lines[0].get_xydata().T
    np.testing.assert_allclose(density, scipy.stats.norm.pdf(x, 3, 2), rtol=1e-6)
    x, density = axes[1].lines[0].get_xydata().T
    assert x[0] == 0.0
    np.testing.assert_allclose(np.trapezoid(density, x), 0.99865 - 0.158655, atol=2e-3)
    assert texts(axes[1]) == ["16 % beyond the range"]


def test_profile_takes_a_fit_or_a_profile():
    profile = SimpleNamespace(to_frame=parabola)
    fit = SimpleNamespace(profile=lambda parm: profile)
    assert len(plots.profile_zeta(fit)) == 2
    assert plots.profile_zeta(profile, "Days").get_xlabel() == "Days"
    with pytest.raises(mj.DataError, match=r"no parameter 'Day' .*did you mean 'Days'"):
        plots.profile_density(profile, "Day")


def replicates():
    rng = np.random.default_rng(0)
    frame = pd.DataFrame({"sd_Intercept|g": np.maximum(rng.normal(1, 1, 400), 0.0), "Intercept": rng.normal(5, 1, 400)})
    frame.loc[:9, "Intercept"] = np.nan
    limits = frame.quantile([0.025, 0.975]).T.set_axis(["lower", "upper"], axis=1)
    estimate = pd.Series({"sd_Intercept|g": 1.0, "Intercept": 5.0})
    return SimpleNamespace(replicates=frame, estimate=estimate, confint=lambda level, method: limits)


def test_bootstrap_shows_estimate_interval_and_what_lies_on_the_boundary():
    done = replicates()
    axes = plots.bootstrap(done)
    for ax, name in zip(axes, done.replicates, strict=True):
        assert any(list(one.get_xdata()) == [done.estimate[name]] * 2 for one in ax.lines)
        assert any(list(one.get_xdata()) == list(done.confint(0.95, "").loc[name]) for one in ax.lines)
        corners = ax.patches[0].get_xy()
        steps, heights = corners[:, 0], corners[:, 1]
        assert np.abs(np.sum(np.diff(steps) * heights[1:])) == pytest.approx(1.0, rel=1e-6)  # area
    share = 100 * (done.replicates["sd_Intercept|g"] == 0).mean()
    assert texts(axes[0]) == [f"{share:.2g} % at 0"]
    assert texts(axes[1]) == ["10 undefined"]
    assert plots.bootstrap(done, "Intercept").get_xlabel() == "Intercept"
    with pytest.raises(mj.DataError, match="no parameter 'slope'"):
        plots.bootstrap(done, "slope")


def test_replicates_that_are_all_alike():
    done = replicates()
    done.replicates["Intercept"] = 2.0
    done.replicates["sd_Intercept|g"] = np.nan
    axes = plots.bootstrap(done)
    assert texts(axes[0]) == ["no replicate has a value"]
    assert texts(axes[1]) == ["all replicates are 2"]


# --- influence and shares ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def deleted(sleep):
    return influence(sleep.record, method="fixed-theta")


def test_influence_draws_a_stem_per_unit_and_names_the_flagged(deleted):
    ax = plots.influence(deleted)
    segments = np.array(ax.collections[0].get_segments())
    np.testing.assert_allclose(segments[:, 1, 1], deleted.cooks)
    assert (segments[:, 0, 1] == 0).all()
    flagged = deleted.flagged("cooks")
    (marked,) = labelled(ax, "flagged")
    np.testing.assert_allclose(np.sort(marked.get_ydata()), np.sort(flagged["cooks"]))
    assert texts(ax)
    assert set(texts(ax)) <= set(flagged.index.astype(str))
    assert texts(ax)[0] == str(flagged.index[0])
    assert ax.get_xlabel() == "180 rows, in the order of the data"
    assert ax.get_title() == f"{len(flagged)} of 180 flagged (fixed-theta)"


def test_influence_of_a_fit_leaves_out_now(sleep, monkeypatch):
    asked = []

    def quick(record, by):
        asked.append((record, by))
        return influence(record, by, "fixed-theta")

    monkeypatch.setattr(units, "leave_out", quick)
    ax = plots.influence(sleep, "mdffits", "Subject")
    assert asked == [(sleep.record, "Subject")]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == list(sleep.ranef()["Subject"].index)
    assert ax.get_xlabel() == "Subject"


def test_influence_ranked_and_around_one(deleted):
    ax = plots.influence(deleted, "covratio", rule="size", index=False)
    segments = np.array(ax.collections[0].get_segments())
    assert (segments[:, 0, 1] == 1).all()
    assert (np.diff(np.abs(segments[:, 1, 1] - 1)) <= 0).all()
    low, high = deleted.cutoff("covratio", "size")
    assert {low, high} <= {one.get_ydata()[0] for one in ax.lines if len(one.get_ydata()) == 2}


def test_influence_flags_both_sides_of_a_change(deleted):
    ax = plots.influence(deleted, "dfbetas_Days", rule=0.05)
    low, high = -0.05, 0.05
    change = deleted.dfbetas["Days"]
    assert (change < low).any()
    assert (change > high).any()
    expected = np.sort(change[(change < low) | (change > high)])
    np.testing.assert_allclose(np.sort(labelled(ax, "flagged")[0].get_ydata()), expected)


def test_influence_refuses_what_there_is_not(deleted):
    with pytest.raises(mj.DataError, match=r"no measure 'cook' .*did you mean 'cooks'"):
        plots.influence(deleted, "cook")
    with pytest.raises(ValueError, match="has its units already"):
        plots.influence(deleted, by="Subject")


def test_variance_components(sleep, flat):
    ax = plots.variance_components(sleep)
    shares = sleep.variance_shares()
    np.testing.assert_allclose([bar.get_width() for bar in ax.patches], 100 * shares["share"])
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [
        "Subject\n(Intercept, Days)",
        "residual",
        "fixed effects",
    ]
    assert texts(ax)[1] == f" {sleep.sigma**2:.4g} ({100 * shares['share'][1]:.0f} %)"
    assert texts(plots.variance_components(flat)) == [" 0 (0 %)", " 13.81 (100 %)"]


# --- studies ---------------------------------------------------------------------------------------------------------


def powers():
    table = pd.DataFrame(
        {"g": [10, 20, 40], "power": [0.3, 0.6, 0.9], "lower": [0.2, 0.5, 0.8], "upper": [0.5, 0.7, 0.95]}
    )
    curve = SimpleNamespace(power=lambda size: scipy.stats.norm.cdf(np.sqrt(size) - 4))
    return SimpleNamespace(table=table, over="g", curve=curve, target=0.8, smallest=31, test="x", alpha=0.05)


def test_power_curve_has_points_intervals_curve_and_target():
    ax = plots.power_curve(powers())
    assert any(list(one.get_ydata()) == [0.3, 0.6, 0.9] for one in ax.lines)
    (bars,) = ax.collections
    np.testing.assert_allclose(np.array(bars.get_segments())[:, :, 1], [[0.2, 0.5], [0.5, 0.7], [0.8, 0.95]])
    (curve,) = labelled(ax, "probit in the root of the size")
    np.testing.assert_allclose(curve.get_ydata(), scipy.stats.norm.cdf(np.sqrt(curve.get_xdata()) - 4))
    assert texts(ax) == ["31"]
    assert ax.get_ylabel() == "power of x (level 0.05)"


# --- all of them ------------------------------------------------------------------------------------------------------


def curved(data):
    return mj.lmm("Reaction ~ s(Days, k = 6) + (1 | Subject)", data)


DRAWN = {
    "residuals": lambda fit, ax: plots.residuals(fit, ax=ax),
    "residuals by group": lambda fit, ax: plots.residuals(fit, "Subject", ax=ax),
    "scale_location": lambda fit, ax: plots.scale_location(fit, ax=ax),
    "observed": lambda fit, ax: plots.observed(fit, ax=ax),
    "qq": lambda fit, ax: plots.qq(fit, ax=ax),
    "qq_ranef": lambda fit, ax: plots.qq_ranef(fit, ax=ax),
    "caterpillar": lambda fit, ax: plots.caterpillar(fit, effect="Days", ax=ax),
    "shrinkage": lambda fit, ax: plots.shrinkage(own_estimates(fit), ax=ax),
    "smooths": lambda fit, ax: plots.smooths(curved(fit.labels.frame), ax=ax),
    "trellis": lambda fit, ax: plots.trellis(fit, "Days", levels="308", ax=ax),
    "profile_zeta": lambda fit, ax: plots.profile_zeta(parabola(), "Days", ax=ax),
    "profile_density": lambda fit, ax: plots.profile_density(parabola(), "Days", ax=ax),
    "bootstrap": lambda fit, ax: plots.bootstrap(replicates(), "Intercept", ax=ax),
    "influence": lambda fit, ax: plots.influence(influence(fit.record, "Subject", "fixed-theta"), ax=ax),
    "means": lambda fit, ax: plots.means(fit_of("cake_factor", "REML").emmeans("temperature"), ax=ax),
    "contrasts": lambda fit, ax: plots.contrasts(fit_of("cake_factor", "REML").emmeans("recipe").contrasts(), ax=ax),
    "power_curve": lambda fit, ax: plots.power_curve(powers(), ax=ax),
    "variance_components": lambda fit, ax: plots.variance_components(fit, ax=ax),
}


def test_every_public_plot_is_tested_on_given_axes():
    assert {name.split()[0] for name in DRAWN} | {"overview"} == set(plots.__all__)


@pytest.mark.parametrize("name", DRAWN)
def test_given_axes_are_used_and_nothing_else_changes(sleep, name):
    before, record = dict(mpl.rcParams), json.dumps(sleep.fixef.to_dict())
    frame, residuals = sleep.labels.frame.copy(), sleep.residuals().copy()
    figure, (ax, other) = plt.subplots(1, 2)
    plt.sca(other)
    returned = DRAWN[name](sleep, ax)
    assert np.ravel(returned)[0] is ax
    assert ax.has_data()
    assert not other.has_data()
    assert ax.get_xlabel()
    assert ax.get_ylabel() or ax.get_yticklabels()
    assert plt.get_fignums() == [figure.number]
    assert plt.gca() is other
    assert dict(mpl.rcParams) == before
    assert json.dumps(sleep.fixef.to_dict()) == record
    pd.testing.assert_frame_equal(sleep.labels.frame, frame)
    pd.testing.assert_series_equal(sleep.residuals(), residuals)
    figure.canvas.draw()


@pytest.mark.parametrize("name", DRAWN)
def test_colours_are_those_of_the_style(sleep, name):
    with plt.style.context("dark_background"):
        ax = np.ravel(DRAWN[name](sleep, None))[0]
        figure = ax.get_figure()
        assert to_hex(figure.get_facecolor()) == "#000000"
        allowed = {to_hex(colour) for colour in ("C0", "C3", "white")}
    drawn = {to_hex(one.get_color()) for one in ax.lines} | {to_hex(text.get_color()) for text in ax.texts}
    assert drawn <= allowed
    figure.canvas.draw()


def names_overlap(ax, axis):
    figure = ax.get_figure()
    figure.canvas.draw()
    ticks = ax.get_xticklabels() if axis == "x" else ax.get_yticklabels()
    boxes = [text.get_window_extent() for text in ticks if text.get_text()]
    key = ("x0", "x1") if axis == "x" else ("y0", "y1")
    spans = sorted((getattr(box, key[0]), getattr(box, key[1])) for box in boxes)
    return any(a[1] > b[0] + 0.5 for a, b in itertools.pairwise(spans))


@pytest.mark.parametrize("m", [2, 7, 25, 59, 200])
def test_names_of_categories_never_overlap(sleep, m):
    values = np.array([f"category {i:03d}" for i in np.arange(180) % m])
    for ax in (None, plt.subplots(figsize=(3, 2))[1]):
        assert not names_overlap(plots.residuals(sleep, values, ax=ax), "x")


def test_names_of_points_never_overlap():
    ax = plt.subplots()[1]
    x, y = np.random.default_rng(0).uniform(size=(2, 60))
    ax.plot(x, y, "o")
    name_points(ax, x, y, [f"row {i}" for i in range(60)])
    figure = ax.get_figure()
    figure.canvas.draw()
    boxes = [text.get_window_extent() for text in ax.texts]
    assert 10 < len(boxes) < 60
    assert texts(ax)[0] == "row 0"  # the first to come is the most important
    touching = [(a, b) for a, b in itertools.combinations(boxes, 2) if a.padded(-2).overlaps(b.padded(-2))]
    assert not touching


def test_axes_of_a_subfigure(sleep):
    upper, _ = plt.figure(figsize=(6, 6)).subfigures(2, 1)
    ax = upper.subplots()
    assert plots.residuals(sleep, "Subject", ax=ax) is ax
    assert not names_overlap(ax, "x")
    assert plots.qq(sleep, ax=upper.add_axes([0, 0, 1, 1]))


def test_overview(sleep):
    axes = plots.overview(sleep)
    assert [bool(ax.has_data()) for ax in axes] == [True] * 4
    given = plt.subplots(2, 2)[1]
    assert all(a is b for a, b in zip(plots.overview(sleep, ax=given), given.ravel(), strict=True))


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda fit: plots.residuals(fit, "Day"), "no column 'Day' .*did you mean 'Days'"),
        (lambda fit: plots.residuals(fit, "age"), r"no column 'age' .*data\['age'\]"),
        (lambda fit: plots.residuals(fit, np.arange(3.0)), "x has shape"),
        (lambda fit: plots.residuals(fit, [None, *["a"] * 179]), "'x' has 1 missing"),
        (lambda fit: plots.scale_location(fit, "Day"), "no column 'Day'"),
        (lambda fit: plots.trellis(fit, "Day"), "no column 'Day'"),
        (lambda fit: plots.trellis(fit, "Days", "subject"), "no grouping factor 'subject' .*did you mean 'Subject'"),
        (lambda fit: plots.trellis(fit, "Days", levels=["308", "3"]), "no level of Subject '3'"),
        (lambda fit: plots.caterpillar(fit, "batch"), "no grouping factor 'batch' .*there are: Subject"),
        (lambda fit: plots.caterpillar(fit, effect="Day"), "no effect of Subject 'Day'"),
        (lambda fit: plots.qq_ranef(fit, "batch"), "no grouping factor 'batch'"),
        (lambda fit: plots.qq_ranef(fit, effect="x"), "no effect of Subject 'x'"),
        (lambda fit: plots.overview(fit, "batch"), "no grouping factor 'batch'"),
    ],
)
def test_unknown_names(sleep, draw, message):
    with pytest.raises(mj.DataError, match=message):
        draw(sleep)
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("draw", "error", "message"),
    [
        (lambda fit: plots.caterpillar(fit, ax=plt.subplots()[1]), ValueError, "needs 2 axes, got 1"),
        (lambda fit: plots.caterpillar(fit, level=95), ValueError, "level must be between 0 and 1"),
        (lambda fit: plots.residuals(fit, ax=3), TypeError, "ax must be matplotlib Axes or None, got int"),
        (lambda fit: plots.residuals(fit, span=0), ValueError, "span"),
        (lambda fit: plots.residuals(fit, kind="other"), ValueError, "kind"),
        (lambda fit: plots.qq(fit, band="wide"), ValueError, "band must be"),
        (lambda fit: plots.trellis(fit, "Days", ncols=0), ValueError, "ncols"),
        (lambda fit: plots.residuals(fit.record), TypeError, "not its record"),
        (lambda fit: plots.qq(3), TypeError, "a fit is needed"),
    ],
)
def test_bad_arguments(sleep, draw, error, message):
    with pytest.raises(error, match=message):
        draw(sleep)


def test_a_fit_without_rows_says_so():
    data = table("sleepstudy")
    fit = mj.lmm("Reaction ~ Days + (Days | Subject)", [data[:90], data[90:]])
    for draw in (plots.residuals, plots.qq, plots.overview):
        with pytest.raises(ValueError, match="made from chunks of rows"):
            draw(fit)
    assert len(plots.caterpillar(fit)) == 2


def test_the_gallery_shows_every_plot():
    docs = HERE.parent / "docs"
    page = (docs / "gallery.md").read_text()
    assert [name for name in plots.__all__ if f"`{name}`" not in page and f"plots.{name}(" not in page] == []
    shown = re.findall(r"\]\((gallery/[^)]+)\)", page)
    assert sorted(shown) == sorted(f"gallery/{path.name}" for path in (docs / "gallery").glob("*.png"))
    assert all((docs / name).stat().st_size <= 60_000 for name in shown)


def test_without_matplotlib_the_message_names_the_extra():
    code = """
    import sys
    sys.modules["matplotlib"] = None
    try:
        import mixjax.plots
    except ImportError as error:
        print(error)
    """
    assert run_python(code).strip() == 'mixjax.plots needs matplotlib: pip install "mixjax[plots]"'
