"""Tests of fixed effects in many fits are those of every fit."""

from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest

import mixjax as mj
from mixjax.face.batches import ModelBatch

COLUMNS = ["estimate", "std_error", "df", "statistic", "p_value"]


@cache
def sleep(reml=True, **options):
    formula = "Reaction ~ Days + I(Days**2) + (Days | Subject)"
    return mj.lmm(formula, mj.datasets.load("sleepstudy"), reml=reml, **options)


@cache
def slow():
    data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
    return mj.glmm("slow ~ Days + I(Days > 4) + (1 | Subject)", data, family="binomial")


def same(batch, fit, L, responses, rtol=1e-6, joint=None, columns=COLUMNS, **options):
    found = batch.test(L, joint=joint, **options)
    assert found.index.name == "replicate"
    for i, y in enumerate(responses):
        one = fit.refit(y).test(L, joint=joint, **options)
        np.testing.assert_allclose(found.loc[i, columns].to_numpy(float), one[columns].to_numpy(float)[0], rtol=rtol)


@pytest.mark.parametrize("ddf", ["satterthwaite", "wald", "Kenward-Roger", "kenward-roger-linear"])
@pytest.mark.parametrize("engine", ["numpy", "jax"])
def test_t_tests_of_linear_models(ddf, engine):
    fit = sleep()
    Y = fit.simulate(key=3, n=6)
    batch = fit.refit_many(Y, engine=engine)
    assert isinstance(batch, ModelBatch)
    assert isinstance(batch, mj.BatchFit)
    same(batch, fit, "Days + 9*I(Days ** 2) = 10", Y, ddf=ddf)


@pytest.mark.parametrize("ddf", ["satterthwaite", "kenward-roger", "wald"])
def test_joint_tests_of_linear_models(ddf):
    fit = sleep()
    Y = fit.simulate(key=4, n=4)
    columns = ["num_df", "den_df", "statistic", "p_value"]
    same(fit.refit_many(Y), fit, ["Days", "I(Days ** 2)"], Y, ddf=ddf, columns=columns)
    same(fit.refit_many(Y), fit, "Days", Y, ddf=ddf, columns=columns, joint=True)


def test_several_one_by_one():
    fit = sleep(reml=False)
    Y = fit.simulate(key=5, n=3)
    found = fit.refit_many(Y).test(["Days", "I(Days ** 2) = 1"], joint=False)
    assert list(found.columns.get_level_values(0).unique()) == ["Days", "I(Days ** 2) = 1"]
    for i, y in enumerate(Y):
        one = fit.refit(y).test(["Days", "I(Days ** 2) = 1"], joint=False)
        np.testing.assert_allclose(found.loc[i].to_numpy(), one[COLUMNS].to_numpy().ravel(), rtol=1e-6)


@pytest.mark.parametrize("ddf", ["satterthwaite", "kenward-roger"])
@pytest.mark.parametrize("joint", [False, True])
def test_failed_fits_have_no_numbers(ddf, joint):
    fit = sleep()
    Y = np.array(fit.simulate(key=6, n=4))
    Y[1, 5] = np.nan
    found = fit.refit_many(Y).test(["Days", "I(Days ** 2)"], ddf=ddf, joint=joint)
    assert found.iloc[1].isna().all()
    assert found.drop(index=1).notna().all(axis=None)
    if ddf == "kenward-roger":
        with pytest.raises(ValueError, match=r"none of the 2 fits has converged.*counts"):
            fit.refit_many(Y[[1, 1]]).test("Days", ddf=ddf)


def test_z_and_chi_square_tests_of_generalised_models():
    fit = slow()
    Y = np.array(fit.simulate(key=7, n=5))
    batch = fit.refit_many(Y)
    ok = [i for i in range(5) if batch.converged[i]]
    assert len(ok) > 2
    # Standard errors by lanes and by a single fit's end agree as far as the ends do.
    for L, columns in (("Days = 0.5", COLUMNS), (["Days", "I(Days > 4)[T.True]"], ["statistic", "df", "p_value"])):
        found = batch.test(L)
        for i in ok:
            one = fit.refit(Y[i]).test(L)
            np.testing.assert_allclose(
                found.loc[i, columns].to_numpy(float), one[columns].to_numpy(float)[0], rtol=1e-4
            )
    separated = np.tile(np.asarray(fit.record.labels.frame["Days"] > 4, float), (2, 1))
    assert fit.refit_many(separated).test("Days").isna().all(axis=None)


@pytest.mark.parametrize("options", [{"residual": "ar1(Days | Subject)"}, {"dispersion": "~ Days"}])
def test_residuals_with_parameters_of_their_own(options):
    fit = mj.lmm("Reaction ~ Days + (1 | Subject)", mj.datasets.load("sleepstudy"), **options)
    Y = fit.simulate(key=8, n=2)
    for ddf in ("satterthwaite", "wald"):
        same(fit.refit_many(Y), fit, "Days = 10", Y, ddf=ddf, rtol=1e-4)


def test_a_null_hypothesis_is_rejected_as_often_as_it_says():
    """Satterthwaite's level among 2 000 trials of 18 subjects: 5 % within four Monte Carlo errors of 0.005."""
    fit = sleep()
    beta = fit.fixef.to_numpy()
    p = fit.refit_many(fit.simulate(key=9, n=2_000)).test(f"I(Days ** 2) = {float(beta[2])!r}")["p_value"]
    assert abs((p < 0.05).mean() - 0.05) < 0.02


def test_what_is_refused():
    fit = sleep()
    Y = fit.simulate(key=1, n=2)
    with pytest.raises(ValueError, match="'Dayz'"):
        fit.refit_many(Y).test("Dayz")
    with pytest.raises(ValueError, match=r"'satterthwaite'.*got 'satterthwite'"):
        fit.refit_many(Y).test("Days", ddf="satterthwite")
    with pytest.raises(ValueError, match="reml=True"):
        fit.refit_many(Y, reml=False).test("Days", ddf="kenward-roger")
    generalised = slow()
    with pytest.raises(ValueError, match=r"Wald's tests only.*'satterthwaite'"):
        generalised.refit_many(generalised.simulate(1, 2)).test("Days", ddf="satterthwaite")


def test_rows_of_results_are_responses():
    fit = sleep()
    found = fit.refit_many(fit.simulate(key=2, n=3)).test("Days")
    assert isinstance(found, pd.DataFrame)
    assert list(found.columns) == COLUMNS
    assert list(found.index) == [0, 1, 2]
