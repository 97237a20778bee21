"""Means with comparison arrows and contrasts with intervals: what is drawn, and that arrows show what tests say."""

import itertools

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import fit_of, table

pytest.importorskip("matplotlib", reason="plots need the extra mixjax[plots]")

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt

import mixjax as mj
from mixjax import plots
from mixjax.plots.arrows import comparison_arrows


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def cake():
    return fit_of("cake_factor", "REML")


def meet(found, estimate, i, j):
    low, high = (i, j) if estimate[i] <= estimate[j] else (j, i)
    return estimate[low] + found.right[low] > estimate[high] - found.left[high]


def test_arrows_of_equal_errors_are_half_the_least_difference():
    estimate = np.array([1.0, 4.0, 2.5, 9.0])
    least = np.where(np.eye(4, dtype=bool), np.nan, 2.0)
    found = comparison_arrows(estimate, least)
    np.testing.assert_allclose([found.left, found.right], np.ones((2, 4)), rtol=1e-6)
    assert found.wrong == 0


def test_arrows_meet_where_differences_are_not_significant():
    """Unequal variances: Games and Howell's least differences of up to eight means."""
    rng, wrong, pairs = np.random.default_rng(1), 0, 0
    for k in (2, 3, 5, 8):
        for _ in range(10):
            estimate, se = rng.normal(size=k) * 2, rng.uniform(0.3, 1.0, k)
            least = 2.5 * np.sqrt(se[:, None] ** 2 + se**2)
            np.fill_diagonal(least, np.nan)
            found = comparison_arrows(estimate, least)
            shown = [
                meet(found, estimate, i, j) == (abs(estimate[i] - estimate[j]) < least[i, j])
                for i, j in itertools.combinations(range(k), 2)
            ]
            assert shown.count(False) == found.wrong
            wrong, pairs = wrong + found.wrong, pairs + len(shown)
            assert (found.left >= 0).all()
            assert (found.right >= 0).all()
    assert wrong == 0, f"{wrong} of {pairs} pairs"


def test_arrows_that_cannot_be_right_are_counted():
    """Two neighbours differ and the two far ends do not: no arrows say so."""
    estimate = np.array([0.0, 1.0, 2.0])
    least = np.array([[np.nan, 0.1, 9.0], [0.1, np.nan, 0.1], [9.0, 0.1, np.nan]])
    found = comparison_arrows(estimate, least)
    shown = [
        meet(found, estimate, i, j) != (abs(estimate[i] - estimate[j]) < least[i, j])
        for i, j in itertools.combinations(range(3), 2)
    ]
    assert found.wrong == sum(shown) > 0
    assert comparison_arrows(np.array([1.0]), np.array([[np.nan]])).wrong == 0


def test_scale_and_shift_move_arrows_along():
    rng = np.random.default_rng(2)
    estimate, se = rng.normal(size=6), rng.uniform(0.3, 1.0, 6)
    least = 2.5 * np.sqrt(se[:, None] ** 2 + se**2)
    first, second = comparison_arrows(estimate, least), comparison_arrows(1e4 + 1e3 * estimate, 1e3 * least)
    np.testing.assert_allclose(second.left + second.right, 1e3 * (first.left + first.right), rtol=1e-6)


def test_means_are_drawn_with_their_intervals(cake):
    m = cake.emmeans("temperature", level=0.9)
    frame = m.to_frame()
    ax = plots.means(m)
    np.testing.assert_allclose(ax.lines[0].get_xdata(), frame["estimate"])
    segments = np.array(ax.collections[0].get_segments())[:, :, 0]
    np.testing.assert_allclose(segments, frame[["lower", "upper"]])
    assert [tick.get_text() for tick in ax.get_yticklabels()] == list(frame["temperature"].astype(str))
    assert ax.get_title() == "90 % intervals; arrows apart: different at 0.05"
    assert ax.get_xlabel() == "angle"
    # All differences have one standard error: half a least significant difference to each side, but for the outermost.
    arrows = np.array([[note.xyann[0], note.xy[0]] for note in ax.texts])
    assert len(arrows) == 2 * 6 - 2
    q = scipy.stats.studentized_range.ppf(0.95, 6, 210) / np.sqrt(2)
    half = q * m.contrasts()["std_error"].iloc[0] / 2
    np.testing.assert_allclose(np.abs(arrows[:, 1] - arrows[:, 0]), half, rtol=1e-6)
    assert not plots.means(m, arrows=False).texts


def test_panels_are_cells_of_by(cake):
    axes = plots.means(cake.emmeans("temperature | recipe"), adjust="none")
    assert [ax.get_title() for ax in axes] == ["recipe = A", "recipe = B", "recipe = C"]
    table_of_contrasts = cake.emmeans("temperature | recipe").contrasts("consec")
    axes = plots.contrasts(table_of_contrasts)
    own = table_of_contrasts[table_of_contrasts["recipe"] == "B"]
    np.testing.assert_allclose(np.array(axes[1].collections[0].get_segments())[:, :, 0], own[["lower", "upper"]])
    with pytest.raises(ValueError, match="needs 3 axes, got 1"):
        plots.contrasts(table_of_contrasts, ax=plt.subplots()[1])


def test_contrasts_that_leave_out_zero_are_filled(cake):
    found = cake.emmeans("temperature").contrasts("trt.vs.ctrl")
    ax = plots.contrasts(found)
    outside = found["lower"] > 0
    filled, hollow = ax.lines[1], ax.lines[2]
    np.testing.assert_allclose(filled.get_xdata(), found["estimate"][outside])
    np.testing.assert_allclose(hollow.get_xdata(), found["estimate"][~outside])
    assert hollow.get_markerfacecolor() == "none"
    assert [tick.get_text() for tick in ax.get_yticklabels()] == list(found["contrast"])[::-1]
    ax = plots.contrasts(cake.test(["recipe[T.B]", "recipe[T.C] = 1"], joint=False))
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["recipe[T.C] = 1", "recipe[T.B]"]
    assert plots.contrasts(cake.emmeans("recipe").eff_size()).get_xlabel() == "estimate"


@pytest.mark.filterwarnings("ignore::mixjax.checks.DataWarning")
def test_means_that_cannot_be_estimated_are_named():
    data = table("cake")
    fit = mj.lmm(
        "angle ~ recipe * temperature + (1 | recipe:replicate)",
        data[~((data.recipe == "C") & (data.temperature == "225"))],
    )
    ax = plots.means(fit.emmeans("recipe"))
    assert "not estimable" in [text.get_text() for text in ax.texts]
    found = fit.emmeans("recipe").letters()
    assert list(found["group"])[-1] == ""
    assert np.isnan(found["estimate"].iloc[-1])
    assert plots.contrasts(fit.emmeans("recipe").contrasts()) is not None


def test_what_cannot_be_drawn_is_refused(cake):
    with pytest.raises(TypeError, match="draws what"):
        plots.means(cake)
    with pytest.raises(mj.DataError, match="estimate, lower and upper"):
        plots.contrasts(pd.DataFrame({"x": [1]}))
    with pytest.raises(ValueError, match="adjust must be one of"):
        plots.means(cake.emmeans("recipe"), adjust="odd")
    with pytest.raises(ValueError, match="alpha must be between 0 and 1"):
        plots.means(cake.emmeans("recipe"), alpha=5)
