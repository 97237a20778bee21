"""Lineups: the real plot among simulated ones, told by the key only."""

import numpy as np
import pytest
from conftest import fit_of
from scipy import stats

import mixjax as mj

matplotlib = pytest.importorskip("matplotlib", reason='pip install "mixjax[plots]"')
matplotlib.use("Agg")


def points(fit, ax=None):
    ax.plot(np.asarray(fit.fitted), np.asarray(fit.residuals()), ".")


@pytest.fixture(scope="module")
def fit():
    return fit_of("sleepstudy_intercept", "REML")


def test_the_real_plot_is_where_it_says_and_the_others_are_refits(fit):
    found = mj.lineup(fit, points, n=6, key=3)
    drawn = [np.column_stack(ax.lines[0].get_data()) for ax in found.axes]
    real = np.column_stack([fit.fitted, fit.residuals()])
    place = found.reveal()
    assert [np.array_equal(d, real) for d in drawn] == [i + 1 == place for i in range(6)]
    assert len({d.tobytes() for d in drawn}) == 6
    assert [ax.get_title() for ax in found.axes] == list("123456")
    assert len({(*ax.get_xlim(), *ax.get_ylim()) for ax in found.axes}) == 1
    assert found.axes[place - 1].spines["left"].get_linewidth() == 3.0
    # Residuals of refits are those of fits to responses simulated from the fit.
    others = [d for i, d in enumerate(drawn) if i + 1 != place]
    assert all(abs(np.log(d[:, 1].std() / real[:, 1].std())) < 1 for d in others)
    matplotlib.pyplot.close(found.figure)


def test_the_place_depends_on_the_key_and_nothing_tells_it(fit):
    places = []
    for key in range(12):
        found = mj.lineup(fit, lambda fit, ax: ax.plot([0, 1]), n=3, key=key)
        places.append(found.reveal())
        assert str(places[-1]) not in repr(found).replace("Lineup of 3", "") or places[-1] == 3
        matplotlib.pyplot.close(found.figure)
    assert set(places) == {1, 2, 3}
    again = mj.lineup(fit, points, n=3, key=5)
    assert again.reveal() == places[5]
    matplotlib.pyplot.close(again.figure)


def test_plots_by_name(fit):
    found = mj.lineup(fit, "qq", n=4, key=1)
    assert len(found.figure.axes) == 4
    assert all(ax.get_xlabel() == "" for ax in found.axes)
    matplotlib.pyplot.close(found.figure)


def test_p_values(fit):
    found = mj.lineup(fit, points, n=20, key=1)
    place = found.reveal()
    wrong = place % 20 + 1
    assert found.p_value(place) == pytest.approx(1 / 20)
    assert found.p_value(wrong) == 1.0
    assert found.p_value([place, place, wrong]) == pytest.approx(stats.binom.sf(1, 3, 1 / 20))
    with pytest.raises(ValueError, match="1 to 20"):
        found.p_value([21])
    matplotlib.pyplot.close(found.figure)


def test_bad_input(fit):
    with pytest.raises(ValueError, match="n must be an integer, 2 or more"):
        mj.lineup(fit, points, n=1)
    with pytest.raises(ValueError, match=r"no plot 'residual'.*residuals"):
        mj.lineup(fit, "residual")
