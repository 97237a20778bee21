"""Derivatives with respect to case weights: refits with other weights, repeated rows, closed forms, invariances."""

import json
from dataclasses import replace
from functools import cache

import dense
import jax
import numpy as np
import pandas as pd
import pytest
from conftest import HERE, fit_of, table
from designs import STRUCTURES, random_design
from refits import fit_at_once

import mixjax as mj
from mixjax.checks import InferenceWarning
from mixjax.design import Labels, TermLabels
from mixjax.diagnostics.sensitivity import sensitivity
from mixjax.fitted.record import fit_design

NAMES = ["sd_Intercept|Subject", "cor_Days.Intercept|Subject", "sd_Days|Subject", "sigma", "Intercept", "Days"]


def refitted(fitted, rows, weights, scale):
    """All estimates with these case weights, in the order of the columns."""
    est = fit_at_once(rows.sums(weights), None, fitted.reml)
    assert est.converged
    values, at = [], 0
    for place, Sigma in zip(fitted.stats.layout.terms, est.Sigma, strict=True):
        q, sd = place.q, np.sqrt(np.diag(Sigma))
        theta, at = est.theta[at : at + q * (q + 1) // 2], at + q * (q + 1) // 2
        columns, rows_ = np.triu_indices(q)
        cor = np.divide(Sigma, np.outer(sd, sd), out=np.full((q, q), np.nan), where=np.outer(sd, sd) > 0)
        own = {"vcov": Sigma[rows_, columns], "theta": theta,
               "sdcor": np.where(rows_ == columns, sd[rows_], cor[rows_, columns])}[scale]  # fmt: skip
        values.append(own)
    return np.concatenate([*values, [est.sigma**2 if scale == "vcov" else est.sigma], est.beta])


def slope_along(fitted, direction, scale, h=1e-3):
    """Derivative along a direction of all weights, by central differences of the fourth order."""
    rows = fitted.rows
    values = {k: refitted(fitted, rows, 1 + k * h * direction, scale) for k in (-2, -1, 1, 2)}
    return (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * h)


def assert_slopes(fitted, scale, directions, rtol=1e-6):
    slopes = sensitivity(fitted, scale).to_numpy()
    for direction in directions:
        expected = slope_along(fitted, direction, scale)
        size = np.linalg.norm(slopes, axis=0) * np.linalg.norm(direction)
        seen = ~np.isnan(slopes).all(axis=0)
        assert np.isnan(expected[~seen]).all()
        np.testing.assert_array_less(np.abs(direction @ slopes - expected)[seen], (rtol * size + 1e-10)[seen])


def directions_of(n, seed=0):
    """Two single rows, and two that move all at once: errors of any row would show."""
    rng = np.random.default_rng(seed)
    return [np.eye(n)[0], np.eye(n)[n // 2], rng.normal(size=n), rng.uniform(-1, 1, n)]


# --- refits with other weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["sdcor", "vcov", "theta"])
@pytest.mark.parametrize("method", ["REML", "ML"])
def test_slopes_are_differences_of_refits(method, scale):
    fitted = fit_of("sleepstudy_slopes", method).record
    assert_slopes(fitted, scale, directions_of(180))


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("sleepstudy_weighted_offset", "sdcor"),
        ("sleepstudy_zerocorr", "sdcor"),
        ("pastes_nested", "vcov"),
        ("penicillin", "theta"),
        ("singular_correlation_one", "vcov"),
        ("singular_correlation_one", "sdcor"),
    ],
)
def test_slopes_of_other_models(name, scale):
    fitted = fit_of(name, "REML").record
    assert_slopes(fitted, scale, directions_of(fitted.nobs))


def test_slopes_without_a_closed_form_of_the_criterion():
    """Four effects a level, their covariance singular."""
    design = random_design(STRUCTURES["one factor, q=4"], 3)
    labels = Labels("y ~ ...", "y", ("a", "b"), (TermLabels("g", tuple("pqrs"), tuple("012345")),),
                    pd.DataFrame(index=range(40)))  # fmt: skip
    fitted = fit_design(design, labels, True)
    assert fitted.estimates.singular
    assert_slopes(fitted, "vcov", directions_of(40)[1:3])


def test_a_weight_counts_rows():
    """Weight 2 of some rows is a table in which they stand twice: values, not derivatives."""
    fit, counts = fit_of("sleepstudy_weighted", "REML"), np.where(np.arange(180) % 7 == 0, 2, 1)
    repeated = fit.labels.frame.iloc[np.repeat(np.arange(180), counts)]
    weights = np.repeat(fit.design.weights, counts)
    twice = mj.lmm("Reaction ~ Days + (Days | Subject)", repeated, weights=weights)
    with jax.enable_x64(True):
        est = jax.device_get(mj.estimate(fit.record.rows.sums(counts.astype(float)), True))
    np.testing.assert_allclose(est.beta, twice.fixef, rtol=1e-10)
    np.testing.assert_allclose(est.theta, twice.theta, rtol=1e-7)
    assert est.criterion == pytest.approx(twice.criterion, rel=1e-12)


# --- closed forms ----------------------------------------------------------------------------------------------------


@cache
def slopes(method="REML", scale="sdcor"):
    return sensitivity(fit_of("sleepstudy_slopes", method).record, scale)


@pytest.mark.parametrize("method", ["REML", "ML"])
def test_fixed_effects_of_a_balanced_design(method):
    """They do not depend on theta, so that only least squares moves: ``(X'V^{-1}X)^{-1} x~_i e_i / sigma^2`` with
    ``x~ = sigma^2 V^{-1}X`` and the conditional residual e. And all rows counted more move nothing."""
    fit = fit_of("sleepstudy_slopes", method)
    W = np.linalg.inv(dense.covariance(fit.design, fit.estimates.Sigma, fit.sigma))
    X, residual = fit.design.X, fit.design.y - fit.design.X @ fit.fixef.to_numpy()
    expected = (W @ X) @ np.linalg.inv(X.T @ W @ X) * (fit.sigma**2 * W @ residual)[:, None]
    own = slopes(method)
    np.testing.assert_allclose(own[["Intercept", "Days"]], expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(own[["Intercept", "Days"]].sum(), 0, atol=1e-11)


def test_one_way_layout():
    """All weights at once, c each, in the closed form of ML: with m groups of n rows ``sigma^2 = c SSW / (m (c n -
    1))`` and ``tau^2 = SSB / m - sigma^2 / (c n)``, differentiated at c = 1."""
    fit = fit_of("dyestuff", "ML")
    m, n = 6, 5
    y = fit.design.y.reshape(m, n)
    within = ((y - y.mean(1, keepdims=True)) ** 2).sum()
    between = ((y.mean(1) - y.mean()) ** 2).sum()
    sigma2 = within / (m * (n - 1))
    assert [fit.sigma**2, fit.Sigma["Batch"][0, 0]] == pytest.approx([sigma2, between / m - sigma2 / n], rel=1e-9)
    own, by_c = sensitivity(fit.record, "vcov"), -sigma2 / (n - 1)
    assert own["sigma2"].sum() == pytest.approx(by_c, rel=1e-8)
    assert own["var_Intercept|Batch"].sum() == pytest.approx((sigma2 - by_c) / n, rel=1e-8)
    assert own["Intercept"].sum() == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("method", ["REML", "ML"])
def test_slopes_foretell_what_leaving_out_a_row_does(method):
    """lme4's refits without each row. Of variances the change is not small: a row is a tenth of its subject."""
    fit = fit_of("sleepstudy_slopes", method)
    refits = json.loads((HERE / "oracle" / f"diagnostics_sleepstudy_slopes_{method}.json").read_text())[
        "full_refit_obs"
    ]
    own = slopes(method, "vcov")
    assert np.corrcoef(own["Intercept"], fit.fixef["Intercept"] - np.array(refits["fixef"]["(Intercept)"]))[0, 1] > 0.99
    assert np.corrcoef(own["Days"], fit.fixef["Days"] - np.array(refits["fixef"]["Days"]))[0, 1] > 0.99
    for name, column in (("sigma2", "sigma2"), ("var_Days|Subject", "D22"), ("cov_Days.Intercept|Subject", "D21")):
        assert np.corrcoef(own[name], -np.array(refits["varcomp"][column]))[0, 1] > 0.9


# --- invariances -----------------------------------------------------------------------------------------------------


def test_order_of_rows_and_scale():
    moved = table("sleepstudy").sample(frac=1, random_state=3)
    moved = moved.assign(Reaction=1e5 + 10 * moved["Reaction"], Days=(moved["Days"] + 2000) / 2)
    other = sensitivity(mj.lmm("Reaction ~ Days + (Days | Subject)", moved).record)
    assert list(other.index) == list(moved.index)
    own = slopes().loc[moved.index]
    np.testing.assert_allclose(other["sigma"], 10 * own["sigma"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(other["Days"], 20 * own["Days"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(other["sd_Days|Subject"], 20 * own["sd_Days|Subject"], rtol=1e-6, atol=1e-7)


def test_names_and_rows_are_those_of_the_fit():
    own = slopes()
    assert list(own.columns) == NAMES
    assert list(own.index) == list(fit_of("sleepstudy_slopes", "REML").labels.frame.index)
    assert list(slopes(scale="vcov").columns[:4]) == [
        "var_Intercept|Subject", "cov_Days.Intercept|Subject", "var_Days|Subject", "sigma2",
    ]  # fmt: skip
    assert list(slopes(scale="theta").columns[:4]) == [
        "theta_Intercept|Subject", "theta_Days.Intercept|Subject", "theta_Days|Subject", "sigma",
    ]  # fmt: skip


# --- the boundary ----------------------------------------------------------------------------------------------------


def test_on_the_boundary_zeros_stay_and_the_rest_moves():
    fitted = fit_of("singular_correlation_one", "REML").record
    own = sensitivity(fitted)
    correlation = own.filter(like="cor_").iloc[:, 0]
    assert np.abs(correlation).max() < 1e-10
    assert (own.drop(columns=correlation.name).abs().max() > 1e-6).all()
    assert (sensitivity(fitted, "theta").iloc[:, 2] == 0).all()


def test_a_variance_of_zero():
    fitted = fit_of("dyestuff2", "REML").record
    own, y = sensitivity(fitted), fitted.design.y
    assert (own["sd_Intercept|Batch"] == 0).all()
    # What is left is a mean and a variance: d mean / dw = (y - mean) / n, and sigma^2 = sum w e^2 / (sum w - 1).
    e, n = y - y.mean(), len(y)
    sigma2 = (e**2).sum() / (n - 1)
    np.testing.assert_allclose(own["Intercept"], e / n, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(own["sigma"], (e**2 - sigma2) / (n - 1) / (2 * np.sqrt(sigma2)), rtol=1e-9)


def test_where_there_are_no_derivatives():
    """Between no variance and some: batches whose mean square is exactly that within."""
    m, n = 6, 4
    rng = np.random.default_rng(0)
    within = rng.normal(size=(m, n))
    within -= within.mean(1, keepdims=True)
    between = rng.normal(size=m)
    between -= between.mean()
    ratio = (n * (between**2).sum() / (m - 1)) / ((within**2).sum() / (m * (n - 1)))
    data = pd.DataFrame({"y": (within + between[:, None] / np.sqrt(ratio)).ravel(), "g": np.repeat(list("abcdef"), n)})
    fit = mj.lmm("y ~ 1 + (1 | g)", data)
    assert fit.estimates.result == mj.Result.NONDIFFERENTIABLE
    with pytest.warns(InferenceWarning, match="no derivatives, all are NaN: converged, on the edge"):
        own = sensitivity(fit.record)
    assert own.isna().all(axis=None)
    unfinished = replace(fit.record, estimates=fit.estimates._replace(result=int(mj.Result.MAX_ITERATIONS)))
    with pytest.warns(InferenceWarning, match="iteration limit"):
        sensitivity(unfinished)


def test_bad_input():
    fit = fit_of("sleepstudy_slopes", "REML")
    with pytest.raises(ValueError, match="scale must be one of 'sdcor', 'vcov', 'theta', got 'log'"):
        sensitivity(fit.record, "log")
    with pytest.raises(TypeError, match="a fit is needed"):
        sensitivity(fit.design)
