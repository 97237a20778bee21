"""Residuals, leverages, regressions by level and shrinkage, against HLMdiag and dense algebra."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import fit_of, table
from hypothesis import given, settings
from hypothesis import strategies as st

import mixjax as mj
from mixjax.diagnostics.least_squares import least_squares, level2
from mixjax.diagnostics.leverage import confounding, leverage
from mixjax.diagnostics.shrinkage import shrinkage

ORACLE = Path(__file__).parent / "oracle"
MODELS = [("sleepstudy_slopes", m) for m in ("REML", "ML")] + [("sleepstudy_intercept", m) for m in ("REML", "ML")]
OTHERS = ["penicillin", "pastes_nested", "machines_slopes", "sleepstudy_weighted_offset", "dyestuff2",
          "singular_correlation_one", "sleepstudy_doublebar"]  # fmt: skip


@cache
def hlmdiag(name, method):
    return json.loads((ORACLE / f"diagnostics_{name}_{method}.json").read_text())


def close(a, b, rtol=1e-5):
    """HLMdiag's columns to 1e-5 of their scale."""
    b = np.asarray(b, float)
    np.testing.assert_allclose(np.asarray(a, float), b, rtol=rtol, atol=rtol * np.abs(b).max())


def dense(fit):
    """``V / sigma^2``, X, Z Sigma Z' / sigma^2, P sigma^2 and diag(1 / w), of a fit of a few hundred rows."""
    X, Z = fit.X, fit.Z.toarray()
    blocks = [np.kron(np.eye(len(t.levels)), S) for t, S in zip(fit.labels.terms, fit.estimates.Sigma, strict=True)]
    D = np.zeros((Z.shape[1], Z.shape[1]))
    at = 0
    for block in blocks:
        D[at : at + len(block), at : at + len(block)] = block / fit.sigma**2
        at += len(block)
    w = np.ones(len(X)) if fit.design.weights is None else np.asarray(fit.design.weights)
    W_inv = np.diag(1 / w)
    ZDZ = Z @ D @ Z.T
    V = W_inv + ZDZ
    V_inv = np.linalg.inv(V)
    C = np.linalg.inv(X.T @ V_inv @ X)
    P = V_inv - V_inv @ X @ C @ X.T @ V_inv
    return V, X, ZDZ, P, W_inv, C


# --- HLMdiag ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "method"), MODELS)
def test_rows_agree_with_hlmdiag(name, method):
    expected, found = hlmdiag(name, method)["residuals"], fit_of(name, method).augment()
    columns = {".resid": "level1", ".fitted": "level1", ".ls.resid": "level1", ".ls.fitted": "level1",
               ".mar.resid": "level1", ".std.resid": "level1_std", ".std.ls.resid": "level1_std",
               ".chol.mar.resid": "level1_std", ".semi.ls.resid": "level1_semi"}  # fmt: skip
    for column, block in columns.items():
        close(found["." + column[1:].replace(".", "_")], expected[block][column])
    close(found[".fixed"], expected["level1"][".mar.fitted"])


@pytest.mark.parametrize(("name", "method"), MODELS)
def test_levels_agree_with_hlmdiag(name, method):
    expected, fit = hlmdiag(name, method)["residuals"], fit_of(name, method)
    for block, scale, prefix in (("level2", "raw", "."), ("level2_std", "standardized", ".std.")):
        frame, own = pd.DataFrame(expected[block]).set_index("Subject"), level2(fit, scale=scale)
        for column in own:
            kind, effect = column.split("_")
            name_r = f"{prefix}{kind}.{effect.lower()}"
            close(own[column], frame.loc[own.index, name_r])
    with pytest.raises(ValueError, match="scale must be"):
        level2(fit, scale="studentized")


@pytest.mark.parametrize(("name", "method"), MODELS)
def test_leverages_agree_with_hlmdiag(name, method):
    block, found = hlmdiag(name, method)["influence_obs"], leverage(fit_of(name, method))
    for column, values in (("overall", found.overall), ("fixef", found.fixed), ("ranef", found.random),
                           ("ranef.uc", found.random_unconfounded)):  # fmt: skip
        close(values, block[f"leverage.{column}"])


# --- dense algebra ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OTHERS)
def test_scales_against_dense_algebra(name):
    fit = fit_of(name, "REML")
    V, X, ZDZ, P, W_inv, C = dense(fit)
    sigma, w = fit.sigma, 1 / np.diag(W_inv)
    marginal, conditional, random = (fit.residuals(kind).to_numpy() for kind in ("marginal", "conditional", "random"))
    y = np.asarray(fit.design.y)
    # The definitions themselves: e = W^{-1} P y and Z b = Z D Z' P y, beta dropping out.
    y0 = y - (0 if fit.design.offset is None else np.asarray(fit.design.offset))
    scale = np.abs(y0 - y0.mean()).max()
    np.testing.assert_allclose(conditional, W_inv @ P @ y0, atol=1e-8 * scale)
    np.testing.assert_allclose(random, ZDZ @ P @ y0, atol=1e-8 * scale)
    np.testing.assert_allclose(marginal, conditional + random, atol=1e-10 * scale)
    divisors = {
        ("conditional", "pearson"): 1 / np.sqrt(w),
        ("conditional", "standardized"): sigma / np.sqrt(w),
        ("marginal", "standardized"): sigma * np.sqrt(np.diag(V)),
        ("conditional", "studentized"): sigma * np.sqrt(np.diag(W_inv @ P @ W_inv)),
        ("marginal", "studentized"): sigma * np.sqrt(np.diag(V - X @ C @ X.T)),
        ("random", "studentized"): sigma * np.sqrt(np.maximum(np.diag(ZDZ @ P @ ZDZ), 0)),
    }
    raw = {"conditional": conditional, "marginal": marginal, "random": random}
    for (kind, scale_name), divisor in divisors.items():
        found = fit.residuals(kind, scale_name).to_numpy()
        with np.errstate(invalid="ignore", divide="ignore"):
            expected = raw[kind] / divisor
        known = divisor > 1e-6 * divisor.max(initial=1e-300)
        assert np.isnan(found[~known]).all() or not (~known).any()
        np.testing.assert_allclose(found[known], expected[known], rtol=1e-6, atol=1e-8)
    L = np.linalg.cholesky(V)
    np.testing.assert_allclose(fit.residuals("marginal", "cholesky"), np.linalg.solve(L, marginal) / sigma, rtol=1e-6,
                               atol=1e-8)  # fmt: skip
    expected = 1 - np.diag(P @ W_inv @ P) / np.diag(P)
    np.testing.assert_allclose(confounding(fit), expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", OTHERS)
def test_leverages_are_the_diagonal_of_the_hat_matrix(name):
    fit = fit_of(name, "REML")
    V, X, ZDZ, P, _, C = dense(fit)
    V_inv = np.linalg.inv(V)
    H1, H2 = X @ C @ X.T @ V_inv, ZDZ @ P
    found = fit.leverage()
    np.testing.assert_allclose(found["fixed"], np.diag(H1), rtol=1e-7, atol=1e-10)
    np.testing.assert_allclose(found["random"], np.diag(H2), rtol=1e-7, atol=1e-10)
    assert found["overall"].sum() == pytest.approx(np.trace(H1 + H2))
    assert found["fixed"].sum() == pytest.approx(X.shape[1])


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), crossed=st.booleans(), weighted=st.booleans())
def test_random_designs(seed, crossed, weighted):
    rng = np.random.default_rng(seed)
    n = 40
    data = pd.DataFrame({"x": rng.standard_normal(n), "g": rng.integers(0, 6, n), "h": rng.integers(0, 4, n)})
    data["y"] = rng.standard_normal(n) + rng.standard_normal(6)[data["g"]] + data["x"]
    formula = "y ~ x + (1 | g) + (1 | h)" if crossed else "y ~ x + (x | g)"
    weights = rng.uniform(0.5, 2, n) if weighted else np.ones(n)
    fit = mj.lmm(formula, data, weights=weights)
    parts = fit.augment()
    np.testing.assert_allclose(parts[".fixed"] + parts[".random"] + parts[".resid"], data["y"], atol=1e-10)
    P, W_inv = dense(fit)[3:5]
    np.testing.assert_allclose(fit.leverage()["overall"], 1 - np.diag(W_inv @ P), atol=1e-8)
    # Another order of the rows changes nothing but the order.
    order = rng.permutation(n)
    again = mj.lmm(formula, data.iloc[order], weights=weights[order]).residuals("conditional", "studentized")
    np.testing.assert_allclose(again, fit.residuals("conditional", "studentized").to_numpy()[order], atol=2e-4)


def test_relabelled_groups_and_scaled_responses():
    data = table("sleepstudy")
    fit = fit_of("sleepstudy_slopes", "REML")
    other = mj.lmm("y ~ Days + (Days | S)", data.assign(y=10 * data["Reaction"], S="s" + data["Subject"].astype(str)))
    for kind, scale in (("conditional", "studentized"), ("marginal", "cholesky"), ("random", "standardized")):
        np.testing.assert_allclose(other.residuals(kind, scale), fit.residuals(kind, scale), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(other.leverage(), fit.leverage(), rtol=1e-6)


def test_large_and_crossed_tables():
    fit = fit_of("insteval_crossed", "REML")
    assert fit.nobs > 70_000
    found = fit.augment()
    assert ".chol_mar_resid" not in found
    assert ".ls_resid" not in found
    assert found[".leverage"].between(0, 1).all()
    with pytest.raises(ValueError, match="up to 5000 are possible"):
        fit.residuals("marginal", "cholesky")


def test_bad_input():
    fit = fit_of("sleepstudy_slopes", "REML")
    with pytest.raises(ValueError, match="kind must be one of"):
        fit.residuals("partial")
    with pytest.raises(ValueError, match=r"scale of kind='random'.*'cholesky', which marginal residuals have"):
        fit.residuals("random", "cholesky")
    with pytest.raises(mj.DataError, match=r"no grouping factor 'Batch'.*Subject"):
        fit.shrinkage("Batch")


# --- levels by themselves --------------------------------------------------------------------------------------------


def test_constant_columns_are_left_to_the_intercept():
    fit = mj.lmm("distance ~ age * Sex + (age | Subject)", mj.datasets.load("Orthodont"))
    own = least_squares(fit)
    assert own.columns == ("Intercept", "age", "age:Sex[T.Female]")
    frame = fit.labels.frame
    subject = fit.labels.terms[0].levels[0]
    rows = frame[frame["Subject"].astype(str) == subject]
    slope, intercept = np.polyfit(rows["age"], rows["distance"], 1)
    np.testing.assert_allclose(own.fitted[frame["Subject"].astype(str) == subject], intercept + slope * rows["age"])


def test_shrinkage_of_random_intercepts_is_ridge_regression():
    """The BLUP of random intercepts minimises the sum of squares plus ``sigma^2 / tau^2`` times that of the effects."""
    fit = fit_of("sleepstudy_intercept", "REML")
    tau2, sigma2 = float(fit.Sigma["Subject"][0, 0]), fit.sigma**2
    Z = fit.Z.toarray()
    ridge = np.linalg.solve(Z.T @ Z + sigma2 / tau2 * np.eye(18), Z.T @ fit.residuals("marginal"))
    np.testing.assert_allclose(fit.ranef()["Subject"]["Intercept"], ridge, rtol=1e-8)
    # And beta too: ridge with the fixed effects unpenalised.
    X = fit.X
    A = np.block([[X.T @ X, X.T @ Z], [Z.T @ X, Z.T @ Z + sigma2 / tau2 * np.eye(18)]])
    both = np.linalg.solve(A, np.concatenate([X.T, Z.T]) @ np.asarray(fit.design.y))
    np.testing.assert_allclose(both, np.concatenate([fit.fixef, ridge]), rtol=1e-8)


def test_shrinkage_factor_of_unequal_groups():
    rng = np.random.default_rng(1)
    sizes = np.array([1, 2, 5, 10, 30, 3, 8])
    g = np.repeat(np.arange(7), sizes)
    fit = mj.lmm(
        "y ~ 1 + (1 | g)", pd.DataFrame({"g": g, "y": 3 * rng.standard_normal(7)[g] + rng.standard_normal(59)})
    )
    found = fit.shrinkage()
    tau2, sigma2 = float(fit.Sigma["g"][0, 0]), fit.sigma**2
    np.testing.assert_allclose(found["shrinkage"], sigma2 / (sigma2 + sizes * tau2), rtol=1e-7)
    np.testing.assert_array_equal(found["n"], sizes)
    np.testing.assert_allclose(found["own"], pd.Series(fit.design.y).groupby(g).mean(), rtol=1e-10)
    np.testing.assert_allclose(found["mixed"], fit.coef()["g"]["Intercept"], rtol=1e-12)


def test_shrinkage_of_slopes_and_of_a_singular_fit():
    fit = fit_of("sleepstudy_slopes", "REML")
    found = fit.shrinkage().pivot(index="level", columns="effect", values="own")
    own = least_squares(fit)
    np.testing.assert_allclose(found.loc[list(fit.labels.terms[0].levels), ["Intercept", "Days"]], own.coefficients)
    flat = fit_of("dyestuff2", "REML").shrinkage()
    np.testing.assert_allclose(flat["mixed"], flat["population"])
    np.testing.assert_allclose(flat["shrinkage"], 1.0)
    crossed = shrinkage(fit_of("penicillin", "REML"), "sample")
    assert crossed["level"].tolist() == list("ABCDEF")
    assert (crossed["shrinkage"].between(0, 0.2)).all()


def test_levels_with_too_few_rows_have_no_line_of_their_own():
    data = table("sleepstudy").iloc[9:]  # the first subject keeps one row
    fit = mj.lmm("Reaction ~ Days + (Days | Subject)", data)
    found = fit.shrinkage()
    assert found["own"].isna().sum() == 2
    assert found["mixed"].notna().all()
    frame = fit.augment()
    assert frame[".std_ls_resid"].isna().sum() == 1
    assert frame[".ls_resid"].notna().all()
