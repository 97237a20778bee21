"""Studies whose estimator is a posterior: Bayesian power."""

import numpy as np
import pytest
from conftest import table

import mixjax as mj
from mixjax.optimise.results import Result
from mixjax.studies import bayes_fits

FORMULA = "Reaction ~ Days + (1 | Subject)"


def source(slope=2.0):
    return mj.scenario(FORMULA, table("sleepstudy"), beta=[250, slope], sd=[35], sigma=30)


def study(n=12, **options):
    given = {"replicates": n, "key": 1, "progress": False, "estimator": "bayes", **options}
    return mj.study(source(), FORMULA, **given)


@pytest.fixture(scope="module")
def few():
    return study()


def test_replicates_are_posteriors(few):
    """Near the fits of the same data sets; tails are those of mixjax.bayes."""
    raw = few.raw()
    by_reml = mj.study(source(), FORMULA, replicates=12, key=1, progress=False, ddf="wald").raw()
    assert (raw["result"] == 0).all()
    assert np.allclose(raw["Days"], by_reml["Days"], atol=0.15)
    assert np.allclose(raw["se(Days)"], by_reml["se(Days)"], rtol=0.12)
    assert np.allclose(raw["p(Days)"], np.maximum(2 * np.minimum(raw["above(Days)"], 1 - raw["above(Days)"]), 1e-3))
    assert np.allclose(raw["p(Days)"], by_reml["p(Days)"], atol=0.05)
    assert raw["df(Days)"].isna().all()


def test_measures(few):
    frame = few.to_frame()
    days = frame[frame["term"] == "Days"].set_index("measure")["value"]
    assert {"bias", "empirical_se", "model_se", "rejection"} <= set(days.index)
    assert "coverage" not in days.index
    assert not frame["term"].str.startswith("above").any()
    assert days["rejection"] == (few.raw()["p(Days)"] < 0.05).mean()


def test_a_replicate_depends_on_its_data_alone(few):
    assert study(5).raw().equals(few.raw().iloc[:5])


def test_priors_count():
    """A prior of the slope far below zero draws the estimates there."""
    own = mj.priors(beta=mj.prior.normal(-3, 0.2))
    raw = study(3, priors=own).raw()
    assert (raw["Days"] < -1.5).all()
    assert (raw["above(Days)"] < 0.01).all()
    null = study(3, priors=own, null={"Days": -6.0}).raw()
    assert (null["above(Days)"] > 0.99).all()
    assert (null["p(Days)"] == 1e-3).all()


def test_a_posterior_that_cannot_be_drawn_from_has_failed(monkeypatch):
    monkeypatch.setattr(bayes_fits.importance, "TRUSTED", -9.0)
    monkeypatch.setitem(__import__("sys").modules, "blackjax", None)
    found = study(3)
    assert (found.raw()["result"] == int(Result.STALLED)).all()
    assert found.counts["failed"].tolist() == [3]
    assert found.raw()["Days"].isna().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "mcmc"}, "estimator must be"),
        ({"estimator": "likelihood", "priors": mj.priors()}, "with estimator='bayes'"),
        ({"priors": mj.prior.normal(0, 1)}, "priors must be"),
        ({"ddf": "wald"}, "no ddf="),
        ({"reml": False}, "no reml=False"),
        ({"statistic": lambda est: est.sigma}, "no statistic="),
        ({"engine": "jax"}, "no engine='jax'"),
        ({"family": "poisson"}, "mixjax.bayes for some replicates"),
        ({"priors": mj.priors(sigma=mj.prior.flat())}, "improper"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        study(2, **options)


def test_comparisons_are_refused():
    models = {"a": "Reaction ~ 1 + (1 | Subject)", "b": FORMULA}
    with pytest.raises(ValueError, match="no compared="):
        mj.study(source(), models, replicates=2, compared=[("a", "b")], estimator="bayes", progress=False)
