"""Residuals with a dispersion formula or a correlation: against R, dense likelihoods, differences and invariance."""

import json
import pickle
import warnings
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from test_nothing_compiles import compiled

import mixjax as mj
from mixjax.checks import ConvergenceWarning, InferenceWarning
from mixjax.engine.residual import ResidualEngine
from mixjax.estimation.residual import fit_residual
from mixjax.products.rows import rows_of
from mixjax.residual.correlation import AR1, CAR1, CompoundSymmetry
from mixjax.residual.transform import Transform, pairs

HERE = Path(__file__).parent
ORACLE = json.loads((HERE / "oracle" / "residual.json").read_text())


@cache
def table(name):
    if name in ("sleepstudy", "Orthodont"):
        return mj.datasets.load(name)
    data = pd.read_csv(HERE / "data" / f"{name}.csv")
    if name == "Ovary":
        data["s"], data["c"] = np.sin(2 * np.pi * data["Time"]), np.cos(2 * np.pi * data["Time"])
    if name == "trial":
        data["visit"] = pd.Categorical(data["visit"])
        data["arm"] = pd.Categorical(data["arm"], ["placebo", "active"])
    return data


AR1_SLEEP = {"residual": "ar1(Days | Subject)"}
CASES = {
    "sleepstudy_ar1_intercept": ("sleepstudy", "Reaction ~ Days + (1 | Subject)", AR1_SLEEP),
    "sleepstudy_ar1_slopes": ("sleepstudy", "Reaction ~ Days + (Days | Subject)", AR1_SLEEP),
    "sleepstudy_ar1_diag": ("sleepstudy", "Reaction ~ Days + (Days || Subject)", AR1_SLEEP),
    "sleepstudy_gls_ar1": ("sleepstudy", "Reaction ~ Days", AR1_SLEEP),
    "sleepstudy_gls_compsymm": ("sleepstudy", "Reaction ~ Days", {"residual": "cs(1 | Subject)"}),
    "sleepstudy_varexp": ("sleepstudy", "Reaction ~ Days + (1 | Subject)", {"dispersion": "~ Days"}),
    "r_disp_sleepstudy_days_slopes": ("sleepstudy", "Reaction ~ Days + (Days | Subject)", {"dispersion": "~ Days"}),
    "orthodont_varident_intercept": ("Orthodont", "distance ~ age * Sex + (1 | Subject)", {"dispersion": "~ Sex"}),
    "orthodont_varident_slopes": ("Orthodont", "distance ~ age * Sex + (age | Subject)", {"dispersion": "~ Sex"}),
    "orthodont_varpower_age": ("Orthodont", "distance ~ age * Sex + (1 | Subject)", {"dispersion": "~ log(age)"}),
    "r_disp_orthodont_sex_age": ("Orthodont", "distance ~ age * Sex + (1 | Subject)", {"dispersion": "~ Sex + age"}),
    "orthodont_gls_compsymm": ("Orthodont", "distance ~ age * Sex", {"residual": "cs(1 | Subject)"}),
    "ovary_ar1_intercept": ("Ovary", "follicles ~ s + c + (1 | Mare)", {"residual": "ar1(obs | Mare)"}),
    "ovary_ar1_pdiag": ("Ovary", "follicles ~ s + c + (s || Mare)", {"residual": "ar1(obs | Mare)"}),
    "r_ar1_varident_arm_intercept": (
        "trial", "y ~ base + arm * visit + (1 | patient)", {"residual": "ar1(visit | patient)", "dispersion": "~ arm"},
    ),
    "r_car1_tracks": ("tracks", "y ~ time + (1 | animal)", {"residual": "car1(time | animal)"}),
}  # fmt: skip
# The optimum has a correlation of random effects at exactly 1, which R's parameters reach at infinity only.
DEGENERATE = {"sleepstudy_ar1_slopes"}
# R's names of parameters that stand for others here.
LOG_RATIOS = ("sd_ratio_Female_over_Male", "ratio_active")


@cache
def fit_of(name, reml=True):
    data, formula, options = CASES[name]
    return mj.lmm(formula, table(data), reml=reml, **options)


def natural(fit, name):
    """Parameters by R's names."""
    found = fit.variance_parameters()["estimate"]
    sds = {k.split("|")[0].removeprefix("sd_"): v for k, v in found.items() if k.startswith("sd_")}
    own = {"sd_intercept": sds.get("Intercept"), "sigma": fit.sigma, "sigma_placebo": fit.sigma}
    own |= {
        k: v for slope in ("Days", "age", "s") for k in ("sd_slope", f"sd_{slope}", "sd_sin") if (v := sds.get(slope))
    }
    own |= {k: v for n, v in found.items() if n.startswith("cor_") for k in ("corr",)}
    rho = [v for n, v in found.items() if n.startswith("rho|")]
    own |= dict.fromkeys(("phi", "rho"), rho[0]) if rho else {}
    disp = {n.removeprefix("disp~"): v for n, v in found.items() if n.startswith("disp~")}
    if disp:
        first = next(iter(disp.values()))
        own |= {"expon": first, "power": first} | dict.fromkeys(LOG_RATIOS, np.exp(first))
        own["sigma_Female"] = fit.sigma * np.exp(first)
        names = {n.replace("[T.Female]", "Female"): v for n, v in disp.items()}
        own["log_sd"] = {"(Intercept)": np.log(fit.sigma), **names}
    return own


@pytest.mark.parametrize("method", ["REML", "ML"])
@pytest.mark.parametrize("name", list(CASES))
def test_fits_of_r(name, method):
    """Dense likelihoods in R, polished from nlme's and glmmTMB's estimates."""
    wanted, fit = ORACLE[name]["fits"][method], fit_of(name, method == "REML")
    degenerate = name in DEGENERATE
    assert fit.converged
    assert fit.criterion == pytest.approx(-2 * wanted["logLik"], abs=1e-6 if degenerate else 1e-9)
    assert fit.npar == wanted["npar"]
    tolerance = 1e-5 if degenerate else 1e-7
    np.testing.assert_allclose(fit.fixef, list(wanted["fixef"].values()), rtol=tolerance)
    np.testing.assert_allclose(fit.se, list(wanted["fixef_se"].values()), rtol=tolerance)
    found = natural(fit, name)
    for parameter, value in wanted["parameters"].items():
        if isinstance(value, dict):
            np.testing.assert_allclose(list(found[parameter].values()), list(value.values()), rtol=1e-6)
        elif parameter != "corr" or not degenerate:
            assert found[parameter] == pytest.approx(value, rel=tolerance), parameter
    assert fit.is_singular == degenerate


def test_what_nlme_says_of_rows():
    """At nlme's own estimates, which are a little off."""
    for name in ("sleepstudy_ar1_intercept", "sleepstudy_gls_ar1", "orthodont_varident_intercept"):
        fit, own = fit_of(name), ORACLE[name]["fits"]["REML"]["nlme"]
        np.testing.assert_allclose(fit.residuals(scale="normalized"), own["residuals_normalized"], atol=2e-6)
        pearson = fit.residuals(scale="pearson") / fit.sigma
        np.testing.assert_allclose(pearson, own["residuals_pearson"], atol=2e-6)
        if "ranef" in own:
            by_level = dict(zip(own["ranef"]["levels"], own["ranef"]["values"], strict=True))
            (modes,) = fit.ranef().values()
            expected = [by_level[level][0] for level in modes.index]
            np.testing.assert_allclose(modes["Intercept"], expected, rtol=1e-4, atol=1e-5)


# --- dense likelihoods ------------------------------------------------------------------------------------------------


def dense(y, X, V, reml):
    """Criterion, beta and its covariance from a covariance of the responses."""
    L = np.linalg.cholesky(V)
    A, b = np.linalg.solve(L, X), np.linalg.solve(L, y)
    XX = A.T @ A
    beta = np.linalg.solve(XX, A.T @ b)
    n, p = X.shape
    value = 2 * np.log(np.diag(L)).sum() + ((b - A @ beta) ** 2).sum() + (n - p * reml) * np.log(2 * np.pi)
    return value + reml * np.linalg.slogdet(XX)[1], beta, np.linalg.inv(XX)


@pytest.mark.parametrize("name", list(CASES))
def test_the_covariance_of_the_responses_is_that_of_the_criterion(name):
    fit = fit_of(name)
    y, V = np.asarray(fit.design.y), fit.marginal_cov()
    value, beta, vcov = dense(y, fit.X, V, True)
    assert fit.criterion == pytest.approx(value, abs=1e-8)
    np.testing.assert_allclose(fit.fixef, beta, rtol=1e-9)
    np.testing.assert_allclose(fit.vcov, vcov, rtol=1e-8)
    b = np.concatenate([np.asarray(own).ravel() for own in fit.estimates.b]) if fit.labels.terms else np.zeros(0)
    G = np.zeros((len(b), len(b)))
    start = 0
    for term, Sigma in zip(fit.design.terms, fit.estimates.Sigma, strict=True):
        for _ in range(term.n_groups):
            G[start : start + len(Sigma), start : start + len(Sigma)] = Sigma
            start += len(Sigma)
    expected = G @ fit.Z.toarray().T @ np.linalg.solve(V, y - fit.X @ beta)
    np.testing.assert_allclose(b, expected, atol=1e-7)
    np.testing.assert_allclose(fit.fitted, fit.X @ beta + fit.Z @ expected, rtol=1e-9)


def textbook(data, group, time, W, u):
    """``V`` of a random intercept, AR(1) and a dispersion, from ``log sd, atanh rho, gamma, log sigma``."""
    sd, rho, gamma, sigma = np.exp(u[0]), np.tanh(u[1]), u[2:-1], np.exp(u[-1])
    s = sigma * np.exp(W @ gamma)
    same = group[:, None] == group
    return same * (sd**2 + s[:, None] * s * rho ** abs(time[:, None] - time))


def test_satterthwaite_by_differences():
    """Degrees of freedom from second differences of the joint criterion and first ones of the covariance of beta."""
    data = table("sleepstudy")
    fit = mj.lmm("Reaction ~ Days + (1 | Subject)", data, dispersion="~ Days", **AR1_SLEEP)
    group, time = pd.factorize(data["Subject"])[0], data["Days"].to_numpy(float)
    found = fit.variance_parameters()["estimate"]
    u = np.array([np.log(found.iloc[0]), np.arctanh(found["rho|Subject"]), found["disp~Days"], np.log(fit.sigma)])
    W, y = time[:, None], np.asarray(fit.design.y)

    def at(u):
        return dense(y, fit.X, textbook(data, group, time, W, u), True)

    steps = np.diag([1e-3, 1e-3, 1e-4, 1e-3])
    h = steps.diagonal()
    f = np.vectorize(lambda i, j, a, b: at(u + a * steps[i] + b * steps[j])[0])
    i, j = np.indices((4, 4))
    H = (f(i, j, 1, 1) - f(i, j, 1, -1) - f(i, j, -1, 1) + f(i, j, -1, -1)) / (4 * np.outer(h, h))
    A = 2 * np.linalg.inv(H)
    slopes = np.stack([(at(u + s)[2] - at(u - s)[2]) / (2 * e) for s, e in zip(steps, h, strict=True)])
    vcov = at(u)[2]
    L = np.array([[0.0, 1.0], [1.0, 4.0]])
    v, g = np.einsum("rp,pq,rq->r", L, vcov, L), np.einsum("rp,kpq,rq->rk", L, slopes, L)
    expected = 2 * v**2 / np.einsum("rk,kl,rl->r", g, A, g)
    tests = fit.test(L, joint=False)
    np.testing.assert_allclose(tests["df"], expected, rtol=1e-4)
    np.testing.assert_allclose(tests["std_error"], np.sqrt(v), rtol=1e-7)
    # The same covariance by name: sd, gamma, rho, sigma by the delta method.
    by_u = np.array([found.iloc[0], 1 - found["rho|Subject"] ** 2, 1.0, fit.sigma])
    expected = by_u * np.sqrt(A.diagonal())
    order = [0, 2, 1, 3]
    np.testing.assert_allclose(fit.variance_parameters()["std_error"], expected[order], rtol=1e-4)
    assert fit.pvalues["Days"] == pytest.approx(fit.anova()["p_value"]["Days"])


# --- derivatives ------------------------------------------------------------------------------------------------------


def designs():
    """Designs of every layout that the engine tells apart, and columns of a dispersion."""
    rng = np.random.default_rng(4)
    sleep = mj.build_design("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))[0]
    group, n = np.asarray(sleep.terms[0].group), len(sleep.y)
    time = np.asarray(sleep.X)[:, 1]
    keep = rng.permutation(n)[: n - 25]  # gaps, and rows in no order
    terms = tuple(replace(t, Z=np.asarray(t.Z)[keep], group=group[keep]) for t in sleep.terms)
    sleep = replace(sleep, y=np.asarray(sleep.y)[keep], X=np.asarray(sleep.X)[keep], terms=terms)
    group, time = group[keep], time[keep]
    W = np.stack([time, rng.normal(size=len(time))], axis=1)
    yield "us, dispersion", sleep, W, None
    yield "us, ar1", sleep, W[:, :0], AR1.of(group, time)
    yield "us, both", sleep, W, AR1.of(group, time)
    yield "us, car1", sleep, W[:, :1], CAR1.of(group, time + 0.3 * rng.random(len(time)))
    yield "us, cs", sleep, W[:, :1], CompoundSymmetry.of(group)
    yield "no random terms", replace(sleep, terms=(), dispersion=W), W, AR1.of(group, time)
    crossed = mj.build_design("diameter ~ 1 + (1 | plate) + (1 | sample)", mj.datasets.load("penicillin"))[0]
    yield "crossed", crossed, rng.normal(size=(len(crossed.y), 1)), None
    nested = mj.build_design("strength ~ 1 + (1 | batch / cask)", mj.datasets.load("pastes"))[0]
    weighted = replace(nested, weights=rng.uniform(0.5, 2.0, len(nested.y)))
    inner = np.asarray(nested.terms[0].group)
    yield "nested, weights", weighted, rng.normal(size=(len(nested.y), 1)), CompoundSymmetry.of(inner)


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("case", list(designs()), ids=lambda case: case[0])
def test_derivatives_are_those_of_differences(case, reml):
    _, design, W, correlation = case
    engine = ResidualEngine(rows_of(design), Transform(W, correlation), reml)
    k = engine.k + engine.transform.k
    x = 0.5 + 0.4 * np.random.default_rng(1).normal(size=k)
    x[engine.k :] -= 0.3
    h = 1e-5
    value, gradient, H = engine.evaluate(x[:, None])
    up, down = ([engine.evaluate((x + s * h * e)[:, None]) for e in np.eye(k)] for s in (1, -1))
    slopes = np.array([(a[0][0] - b[0][0]) / (2 * h) for a, b in zip(up, down, strict=True)])
    curves = np.array([(a[1][:, 0] - b[1][:, 0]) / (2 * h) for a, b in zip(up, down, strict=True)])
    np.testing.assert_allclose(gradient[:, 0], slopes, atol=1e-8 * abs(gradient).max())
    np.testing.assert_allclose(H[..., 0], curves, atol=1e-8 * abs(H).max())
    at = engine.slopes(x)
    up, down = ([engine.slopes(x + s * h * e).lanes for e in np.eye(k)] for s in (1, -1))
    moves = np.array([(a.XX_inverse - b.XX_inverse) / (2 * h) for a, b in zip(up, down, strict=True)])
    np.testing.assert_allclose(at.XX_inverse, moves, atol=1e-8 * abs(moves).max())
    falls = np.array([(np.log(a.rss) - np.log(b.rss)) / (2 * h) for a, b in zip(up, down, strict=True)])
    np.testing.assert_allclose(at.log_rss, falls, atol=1e-8)
    assert value[0] == pytest.approx(engine.solution(x)[0].criterion, rel=1e-13)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from(["ar1", "car1", "cs"]), st.floats(-1.4, 1.4))
def test_rows_are_whitened(seed, name, angle):
    """``T V T' = I`` with V from the textbook's formula, ``log |T|`` and its derivatives, and colouring undoes it."""
    rng = np.random.default_rng(seed)
    group = rng.integers(0, 4, 15)
    scale = (1, 2, 3)[seed % 3] if name == "ar1" else rng.uniform(0.5, 2.0)
    time = rng.permutation(15) * scale + (name == "car1") * rng.random(15)
    own = {"ar1": AR1.of, "car1": CAR1.of}.get(name)
    group[:2] = 0
    correlation = CompoundSymmetry.of(np.unique(group, return_inverse=True)[1]) if own is None else own(group, time)
    W = rng.normal(size=(15, 2))
    transform = Transform(W, correlation)
    phi = np.append(0.3 * rng.normal(size=2), angle)
    found = transform.natural(phi)
    same = group[:, None] == group
    rho, distance = found.values[-1], abs(time[:, None] - time)
    R = np.where(same, rho if name == "cs" else np.sign(rho) ** distance * abs(rho) ** distance, 0.0)
    R[np.arange(15), np.arange(15)] = 1.0
    sd = np.exp(found.log_sigma + W @ found.values[:2])
    T = transform.rows(phi, np.eye(15))
    np.testing.assert_allclose(T @ (sd[:, None] * R * sd) @ T.T, np.eye(15), atol=1e-8)
    assert transform.logdet(phi).value == pytest.approx(np.linalg.slogdet(T)[1], abs=1e-9)
    np.testing.assert_allclose(transform.phi_of(found.values)[:2], phi[:2], atol=1e-12)
    np.testing.assert_allclose(correlation.matrix(rho, np.arange(15)), R, atol=1e-12)
    colour = correlation.colour(rho, np.eye(15))
    np.testing.assert_allclose(colour @ colour.T, R, atol=1e-8)
    slope = (correlation.rho(angle + 1e-6)[0] - correlation.rho(angle - 1e-6)[0]) / 2e-6
    assert abs(angle) < 0.1 or correlation.rho(angle)[1] == pytest.approx(slope, abs=1e-6)
    if name != "cs" and abs(angle) < 0.1:
        return  # second derivatives of |s|^2.1 at 0 are seen by no difference
    A, h = rng.normal(size=(15, 3)), 1e-5
    products = [sum(L.T @ right for L, right in pieces) for pieces in transform.products(phi, A)]
    up, down = ([transform.products(phi + s * h * e, A) for e in np.eye(3)] for s in (1, -1))
    at = [[sum(L.T @ right for L, right in pieces) for pieces in own] for own in (*up, *down)]
    for j in range(3):
        scale = max(abs(p).max() for p in products)
        np.testing.assert_allclose(products[1 + j], (at[j][0] - at[3 + j][0]) / (2 * h), atol=1e-6 * scale)
    for number, (i, j) in enumerate(pairs(3)):
        expected = (at[j][1 + i] - at[3 + j][1 + i]) / (2 * h)
        np.testing.assert_allclose(products[4 + number], expected, atol=1e-5 * scale)


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_no_better_minimum_of_the_dense_criterion(seed, reml):
    """Random data with gaps; the textbook's criterion is searched without derivatives, from the fit and elsewhere."""
    rng = np.random.default_rng(seed)
    data = pd.DataFrame({"g": np.repeat(np.arange(9), 7), "t": np.tile(np.arange(7), 9)}).sample(45, random_state=seed)
    data["x"] = rng.normal(size=45)
    noise = np.exp(0.4 * data["x"]) * rng.normal(size=45)
    data["y"] = 3 + data["t"] + rng.normal(size=9)[data["g"]] + noise.groupby(data["g"]).transform("cumsum") / 2
    fit = mj.lmm("y ~ t + (1 | g)", data, reml=reml, dispersion="~ x", residual="ar1(t | g)")
    assert fit.converged
    group, time, W = data["g"].to_numpy(), data["t"].to_numpy(float), data[["x"]].to_numpy()
    y, X = np.asarray(fit.design.y), fit.X

    def value(u):
        with np.errstate(all="ignore"):
            try:
                return dense(y, X, textbook(data, group, time, W, u), reml)[0]
            except np.linalg.LinAlgError:
                return np.inf

    gamma, rho = fit.estimates.residual
    at = np.array([np.log(max(np.sqrt(fit.Sigma["g"][0, 0]), 1e-6)), np.arctanh(rho), gamma, np.log(fit.sigma)])
    assert value(at) == pytest.approx(fit.criterion, abs=1e-6)
    for start in (at, np.array([0.0, 0.0, 0.0, 0.0]), np.array([-2.0, 1.5, 0.0, 0.5])):
        found = minimize(value, start, method="Nelder-Mead", options={"maxfev": 1500, "fatol": 1e-9, "xatol": 1e-6})
        assert found.fun > fit.criterion - 1e-5


# --- invariance -------------------------------------------------------------------------------------------------------


def test_order_names_and_scales_do_not_matter():
    data = table("trial")
    formula, options = "y ~ base + arm * visit + (1 | patient)", CASES["r_ar1_varident_arm_intercept"][2]
    fit = fit_of("r_ar1_varident_arm_intercept")
    rng = np.random.default_rng(0)
    mixed = data.sample(frac=1.0, random_state=1)
    names = dict(zip(data["patient"].unique(), rng.permutation(data["patient"].nunique()), strict=True))
    mixed = mixed.assign(
        patient=mixed["patient"].map(names).astype(str), y=1e3 * mixed["y"] + 1e7, base=mixed["base"] / 7
    )
    other = mj.lmm(formula, mixed, **options)
    df = fit.nobs - len(fit.fixef)
    # REML: log |X'X| moves with the scale of base.
    assert other.criterion == pytest.approx(fit.criterion + 2 * df * np.log(1e3) - 2 * np.log(7.0), abs=1e-6)
    np.testing.assert_allclose(other.estimates.residual, fit.estimates.residual, atol=1e-7)
    assert other.sigma == pytest.approx(1e3 * fit.sigma, rel=1e-7)
    assert other.fixef["base"] == pytest.approx(7e3 * fit.fixef["base"], rel=1e-7)
    one = {"disp~arm[T.active]": -1}
    swapped = data.assign(arm=data["arm"].cat.reorder_categories(["active", "placebo"]))
    other = mj.lmm(formula, swapped, **options)
    assert other.criterion == pytest.approx(fit.criterion, abs=1e-8)
    assert other.variance_parameters()["estimate"]["disp~arm[T.placebo]"] == pytest.approx(
        one["disp~arm[T.active]"] * fit.variance_parameters()["estimate"]["disp~arm[T.active]"], rel=1e-7
    )


def test_times_shift_and_covariates_of_the_dispersion_far_from_zero():
    data = table("sleepstudy").assign(year=lambda d: d["Days"] + 2000)
    plain = mj.lmm("Reaction ~ Days + (1 | Subject)", data, dispersion="~ Days", residual="ar1(Days | Subject)")
    far = mj.lmm("Reaction ~ Days + (1 | Subject)", data, dispersion="~ year", residual="ar1(year | Subject)")
    assert far.criterion == pytest.approx(plain.criterion, abs=1e-8)
    gamma = plain.estimates.residual[0]
    assert np.log(far.sigma) == pytest.approx(np.log(plain.sigma) - 2000 * gamma, abs=1e-4)
    np.testing.assert_allclose(far.marginal_cov(range(4)), plain.marginal_cov(range(4)), rtol=1e-6)


def test_car1_at_whole_times_is_ar1_and_ar1_without_time_is_the_order_of_rows():
    data = table("sleepstudy")
    ar1 = fit_of("sleepstudy_ar1_intercept")
    car1 = mj.lmm("Reaction ~ Days + (1 | Subject)", data, residual="car1(Days | Subject)")
    rows = mj.lmm("Reaction ~ Days + (1 | Subject)", data, residual="ar1(1 | Subject)")
    levels = data.assign(day=pd.Categorical("d" + data["Days"].astype(str), [f"d{i}" for i in range(10)]))
    factor = mj.lmm("Reaction ~ Days + (1 | Subject)", levels, residual="ar1(day | Subject)")
    hours = mj.lmm("Reaction ~ Days + (1 | Subject)", data, residual="car1(I(24 * Days) | Subject)")
    for other in (car1, rows, factor, hours):
        assert other.criterion == pytest.approx(ar1.criterion, abs=1e-8)
    assert hours.estimates.residual[0] ** 24 == pytest.approx(ar1.estimates.residual[0], rel=1e-6)


def test_gaps_count_as_distance():
    data = table("sleepstudy")
    data = data[~data["Days"].isin([3, 4])].reset_index(drop=True)
    fit = mj.lmm("Reaction ~ Days", data, residual="ar1(Days | Subject)")
    rho = fit.estimates.residual[0]
    assert fit.marginal_cov([2, 3])[0, 1] == pytest.approx(fit.sigma**2 * rho**3)


def ar1_series(rho, seed=1):
    rng = np.random.default_rng(seed)
    e = rng.normal(size=(40, 6))
    for j in range(1, 6):
        e[:, j] = rho * e[:, j - 1] + np.sqrt(1 - rho**2) * e[:, j]
    g, t = np.repeat(np.arange(40), 6), np.tile(np.arange(6), 40)
    return pd.DataFrame({"y": e.ravel(), "x": rng.normal(size=240), "t": t, "g": g})


# Visits that are kept: distances 1; 2, 1, 2; 2 and 4, a common divisor; 2 and 3, which have none.
KEPT = [[0, 1, 2, 3, 4, 5], [0, 2, 3, 5], [0, 2], [0, 2, 5]]


@pytest.mark.parametrize("kept", KEPT, ids=str)
@pytest.mark.parametrize("formula", ["y ~ x", "y ~ x + (1 | g)"])
@pytest.mark.parametrize("rho", [0.6, 0.0, -0.6])
def test_the_unit_of_time_does_not_matter(rho, formula, kept):
    """Times in years, or in days that are years apart: the same criterion, and rho per unit. A correlation per unit
    that is not near 1 is none at such distances, and no search leaves it."""
    data = ar1_series(rho)
    data = data[data["t"].isin(kept)]
    gaps = np.unique(np.diff(kept))
    for structure in ("ar1", "car1"):
        fits = {
            k: mj.lmm(formula, data.assign(t=k * data["t"]), residual=f"{structure}(t | g)") for k in (1, 7, 365, 1440)
        }
        assert all(fit.converged for fit in fits.values())
        own = fits.pop(1)
        # Even distances have no negative correlations, whatever rho.
        if structure == "ar1" and own.estimates.residual[0] < 0 and (gaps % 2).any():
            even = fits.pop(1440)
            positive = mj.lmm(formula, data, residual="car1(t | g)")
            assert even.criterion == pytest.approx(positive.criterion, abs=1e-8)
        for k, fit in fits.items():
            assert fit.criterion == pytest.approx(own.criterion, abs=1e-8)
            shortest, found = gaps[0], (own.estimates.residual[0], fit.estimates.residual[0])
            assert abs(found[1]) ** (k * shortest) == pytest.approx(abs(found[0]) ** shortest, abs=1e-6)
            np.testing.assert_allclose(fit.se, own.se, rtol=1e-5)


@pytest.mark.parametrize("kept", KEPT, ids=str)
def test_a_negative_correlation_is_found(kept):
    """The dense criterion over a grid of rho has no lower point."""
    data = ar1_series(-0.6)
    data = data[data["t"].isin(kept)]
    fit = mj.lmm("y ~ x", data, residual="ar1(t | g)")
    g = data["g"].to_numpy()
    X, same = np.stack([np.ones(len(data)), data["x"]], axis=1), g[:, None] == g
    distance = abs(np.subtract.outer(data["t"].to_numpy(), data["t"].to_numpy()))
    n, values = len(data), []
    for rho in (*np.linspace(-0.95, 0.95, 39), fit.estimates.residual[0]):
        L = np.linalg.cholesky(np.where(same, np.float64(rho) ** distance, 0.0))
        A, b = np.linalg.solve(L, X), np.linalg.solve(L, data["y"])
        rss = np.linalg.lstsq(A, b, rcond=None)[1][0]
        logs = np.linalg.slogdet(A.T @ A)[1] + 2 * np.log(L.diagonal()).sum()
        values.append((n - 2) * (1 + np.log(2 * np.pi * rss / (n - 2))) + logs)
    assert fit.criterion == pytest.approx(values[-1], abs=1e-8)
    assert fit.criterion <= min(values) + 1e-8
    if (np.diff(kept) % 2).any():
        assert fit.estimates.residual[0] < -0.3


def test_a_search_that_ends_nowhere_does_not_blame_the_table(monkeypatch):
    nowhere = fit_residual

    def lost(engine, x0=None):
        found = nowhere(engine, x0)
        code = np.asarray(int(mj.Result.NOT_FINITE))
        est = found.estimates._replace(residual=np.full(1, np.nan), converged=np.bool_(False), result=code)
        return found._replace(estimates=est, x=np.full_like(found.x, np.nan))

    monkeypatch.setattr("mixjax.fitted.residual.fit_residual", lost)
    with pytest.raises(ValueError, match=r"the fit of .* has no estimates: the criterion is not finite"):
        mj.lmm("y ~ x", ar1_series(0.5), residual="ar1(t | g)")


def test_parameters_of_residuals_are_not_dropped():
    fit = fit_of("orthodont_varident_intercept")
    with pytest.raises(ValueError, match="parameters of the residuals beside sigma"):
        mj.to_params(fit.estimates)
    with pytest.raises(ValueError, match=r"which mixjax.MarginalParams cannot have"):
        mj.to_params(fit.estimates, fit._fitted.given)


def test_effect_sizes_need_one_standard_deviation():
    """Sigma of a dispersion is that of the reference level, and which one that is must not matter."""
    fit = fit_of("orthodont_varident_intercept")
    with pytest.raises(ValueError, match=r"dispersion='~ Sex' standard deviations differ between rows.*sigma=.*edf="):
        fit.emmeans("Sex").eff_size()
    contrast, size = (getattr(fit.emmeans("Sex"), name)(**own)["estimate"].iloc[0] for name, own in (
        ("contrasts", {}), ("eff_size", {"sigma": 2.0, "edf": 30})
    ))  # fmt: skip
    assert size == pytest.approx(contrast / 2)
    plain = fit_of("sleepstudy_gls_ar1").emmeans("Days", at={"Days": [0, 1]})
    assert abs(plain.eff_size()["estimate"].iloc[0]) == pytest.approx(
        abs(plain.contrasts()["estimate"].iloc[0]) / fit_of("sleepstudy_gls_ar1").sigma
    )
    constant = mj.lmm("distance ~ age * Sex", table("Orthodont"), dispersion="~ 1")
    assert np.isfinite(constant.emmeans("Sex").eff_size()["estimate"]).all()
    with pytest.raises(ValueError, match="a fit with dispersion='~ 1' or without random effects has no profiles"):
        constant.profile()


def test_no_responses_are_no_batch():
    for name in ("orthodont_varident_intercept", "sleepstudy_gls_ar1"):
        fit = fit_of(name)
        with pytest.raises(ValueError, match="there are no responses to fit"):
            fit.refit_many(np.zeros((0, fit.nobs)))


def test_compound_symmetry_is_a_random_intercept_where_that_has_a_variance():
    fit = fit_of("sleepstudy_gls_compsymm")
    plain = mj.lmm("Reaction ~ Days + (1 | Subject)", table("sleepstudy"))
    assert fit.criterion == pytest.approx(plain.criterion, abs=1e-8)
    np.testing.assert_allclose(fit.se, plain.se, rtol=1e-6)
    np.testing.assert_allclose(fit.test("Days = 0")["df"], plain.test("Days = 0")["df"], rtol=1e-6)
    np.testing.assert_allclose(fit.marginal_cov(range(12)), plain.marginal_cov(range(12)), rtol=1e-6)


def test_a_dispersion_of_known_size_is_a_weight():
    """At gamma = 0 nothing is added, and prior weights multiply."""
    data = table("sleepstudy").assign(w=lambda d: np.exp(-0.1 * d["Days"]))
    free = mj.lmm("Reaction ~ Days + (1 | Subject)", data, dispersion="~ Days")
    both = mj.lmm("Reaction ~ Days + (1 | Subject)", data, dispersion="~ Days", weights="w")
    assert both.criterion == pytest.approx(free.criterion, abs=1e-8)
    assert both.estimates.residual[0] == pytest.approx(free.estimates.residual[0] - 0.05, abs=1e-7)
    assert both.sigma == pytest.approx(free.sigma, rel=1e-7)
    held = data.assign(v=np.exp(-2 * free.estimates.residual[0] * data["Days"]))
    plain = mj.lmm("Reaction ~ Days + (1 | Subject)", held, weights="v")
    assert plain.criterion == pytest.approx(free.criterion, abs=1e-8)
    for method in ("leverage", "augment"):
        a, b = (getattr(fit, method)() for fit in (free, plain))
        shared = [c for c in b.columns if c.startswith((".", "overall", "fixed", "random"))]
        np.testing.assert_allclose(a[shared].to_numpy(float), b[shared].to_numpy(float), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(free.robust().to_frame()["std_error"], plain.robust().to_frame()["std_error"], rtol=1e-6)


# --- bounds and failures ----------------------------------------------------------------------------------------------


def series(kind, seed=1):
    rng = np.random.default_rng(seed)
    e = rng.normal(size=(20, 12))
    if kind == "alternating":
        e[:, 1:] -= 0.6 * e[:, :-1].copy()
    elif kind == "walk":
        e = e.cumsum(1)
    elif kind == "constant":
        e = np.repeat(e[:, :1], 12, axis=1)
    g, t = np.repeat(np.arange(20), 12), np.tile(np.arange(12), 20)
    return pd.DataFrame({"y": e.ravel(), "t": t, "g": g, "gf": pd.Categorical(g)})


def test_a_correlation_that_cannot_be_negative_ends_at_zero():
    data = series("alternating")
    fit = mj.lmm("y ~ t", data, residual="car1(t | g)")
    assert fit.converged
    assert fit.estimates.residual[0] == 0.0
    X = np.stack([np.ones(240), data["t"]], axis=1)
    rss = np.linalg.lstsq(X, data["y"], rcond=None)[1][0]
    independent = 238 * (1 + np.log(2 * np.pi * rss / 238)) + np.linalg.slogdet(X.T @ X)[1]
    assert fit.criterion == pytest.approx(independent, abs=1e-9)
    assert np.isnan(fit.variance_parameters()["std_error"]["rho|g"])
    assert "rho|g is at its bound, 0" in str(fit.summary())
    with pytest.warns(InferenceWarning, match="correlations at their bounds"):
        assert fit.test("t = 0")["df"].iloc[0] == pytest.approx(238, rel=1e-6)
    negative = mj.lmm("y ~ t", data, residual="ar1(t | g)")
    assert negative.estimates.residual[0] < -0.3
    assert negative.criterion < fit.criterion - 10


@pytest.mark.parametrize("formula", ["y ~ t", "y ~ t + (1 | g)", "y ~ t + gf"])
def test_random_walks_end_near_one(formula):
    fit = mj.lmm(formula, series("walk"), residual="ar1(t | g)")
    assert fit.converged
    assert 0.8 < fit.estimates.residual[0] < 1.0


@pytest.mark.parametrize("residual", ["ar1(t | g)", "cs(1 | g)"])
def test_residuals_that_are_equal_within_groups_are_told(residual):
    """The likelihood grows for ever as rho -> 1."""
    with pytest.warns(ConvergenceWarning, match="run to a bound"):
        fit = mj.lmm("y ~ t", series("constant"), residual=residual)
    assert not fit.converged
    assert fit.estimates.result == mj.Result.UNBOUNDED
    assert fit.estimates.residual[0] > 1 - 1e-6


# --- again ------------------------------------------------------------------------------------------------------------


def test_a_thousand_data_sets():
    """All converge; none ends above what searches from other places find (looked at for some)."""
    fit = fit_of("sleepstudy_ar1_intercept")
    Y = fit.simulate(3, 1000)
    batch = fit.refit_many(Y)
    assert batch.counts["failed"] == 0
    assert batch.counts["converged"] == 1000
    frame = batch.sdcor
    assert list(frame) == ["sd_Intercept|Subject", "rho|Subject", "sigma"]
    assert abs(frame["rho|Subject"].mean() - 0.653) < 4 * frame["rho|Subject"].std() / np.sqrt(1000) + 0.02
    assert abs(batch.fixef["Days"].mean() - fit.fixef["Days"]) < 4 * batch.se["Days"].mean() / np.sqrt(1000)
    assert batch.fixef["Days"].std() == pytest.approx(fit.se["Days"], rel=0.1)
    engine = fit.record.residual_engine
    for i in range(0, 1000, 100):
        own = ResidualEngine(engine.rows.with_response(Y[i]), engine.transform, True)
        others = [fit_residual(own, np.array([sd, np.arcsin(rho)])).estimates for sd in (0.1, 2) for rho in (0, 0.9)]
        best = min(float(est.criterion) for est in others if est.converged)
        assert batch.criterion[i] <= best + 1e-6
    alone = fit.refit(Y[7])
    assert alone.criterion == pytest.approx(batch.criterion[7], abs=1e-7)
    bad = Y[:3].copy()
    bad[1, 5] = np.nan
    bad[2] = 1.0 + np.asarray(fit.design.X)[:, 1]
    codes = fit.refit_many(bad).estimates.result
    assert codes.tolist() == [mj.Result.CONVERGED, mj.Result.NOT_FINITE, mj.Result.NO_NOISE]


def test_simulated_responses_have_the_covariance_of_the_model():
    for name in ("r_ar1_varident_arm_intercept", "orthodont_gls_compsymm", "r_car1_tracks"):
        fit = fit_of(name)
        Y = fit.simulate(1, 4000)
        np.testing.assert_allclose(Y.mean(0), fit.predict(random=False), atol=6 * fit.sigma * 1.5 / np.sqrt(4000))
        rows = np.arange(12)
        V, found = fit.marginal_cov(rows), np.cov(Y[:, rows].T)
        sd = np.sqrt(np.outer(V.diagonal(), V.diagonal()) * 2 / 4000)
        assert (abs(found - V) < 5 * sd).all()
        np.testing.assert_array_equal(fit.simulate(1, 3, random="new"), Y[:3])


def test_refits_and_pickles():
    fit = fit_of("r_ar1_varident_arm_intercept")
    other = fit.refit(reml=False)
    wanted = ORACLE["r_ar1_varident_arm_intercept"]["fits"]["ML"]
    assert other.criterion == pytest.approx(-2 * wanted["logLik"], abs=1e-8)
    again = fit.refit(1.0 - 2.0 * np.asarray(fit.design.y))
    np.testing.assert_allclose(again.estimates.residual, fit.estimates.residual, atol=1e-6)
    loaded = pickle.loads(pickle.dumps(fit))
    pd.testing.assert_frame_equal(loaded.test("base = 0"), fit.test("base = 0"))
    warm = mj.lmm(
        "y ~ base + arm * visit + (1 | patient)",
        table("trial"),
        start=[0.3],
        **CASES["r_ar1_varident_arm_intercept"][2],
    )
    assert warm.criterion == pytest.approx(fit.criterion, abs=1e-8)


@pytest.mark.parametrize("name", ["r_ar1_varident_arm_intercept", "sleepstudy_gls_ar1", "orthodont_varident_slopes"])
def test_nothing_is_compiled(name):
    data, formula, options = CASES[name]
    with compiled() as programs:
        fit = mj.lmm(formula, table(data), **options)
        str(fit.summary("satterthwaite"))
        fit.anova()
        fit.confint(method="wald")
        fit.refit_many(np.stack([fit.design.y, -np.asarray(fit.design.y)]))
        fit.predict(interval="prediction")
        mj.compare(fit, fit.without(fit.labels.fixed[1] if name == "sleepstudy_gls_ar1" else "(1 | patient)"
                                    if data == "trial" else "age in (age | Subject)"))  # fmt: skip
    assert programs == []


# --- inference --------------------------------------------------------------------------------------------------------


def test_models_are_compared():
    data = table("sleepstudy")
    plain = mj.lmm("Reaction ~ Days + (1 | Subject)", data)
    ar1, gls, varexp = (fit_of(f"sleepstudy_{name}") for name in ("ar1_intercept", "gls_ar1", "varexp"))
    table_ = mj.compare(plain, ar1).to_frame()
    deviance = -2 * ORACLE["sleepstudy_ar1_intercept"]["fits"]["ML"]["logLik"]
    assert table_["deviance"].tolist() == pytest.approx([plain.refit(reml=False).criterion, deviance], abs=1e-7)
    assert table_["df"].iloc[1] == 1
    assert "p_mixture" not in table_
    restricted = mj.compare(plain, varexp, refit=False).to_frame()
    assert restricted["chisq"].iloc[1] == pytest.approx(plain.criterion - varexp.criterion, abs=1e-8)
    assert "nested" not in str(mj.compare(plain, varexp))
    # The null of a random intercept is a model without random terms, at the bound of its variance.
    both = mj.compare(gls, ar1, refit=False)
    assert both.to_frame()["p_mixture"].iloc[1] == pytest.approx(both.to_frame()["p_value"].iloc[1] / 2)
    with pytest.warns(InferenceWarning, match=r"not a special case .*residuals"):
        mj.compare(varexp, mj.lmm("Reaction ~ Days + (Days | Subject)", data, residual="ar1(Days | Subject)"))
    car1 = mj.lmm("Reaction ~ Days + (1 | Subject)", data, residual="car1(Days | Subject)")
    shown = mj.compare(plain, car1)
    assert "a correlation of residuals to 0" in str(shown)
    boot = mj.compare(plain, ar1, method="bootstrap", n=20).to_frame()
    assert boot["p_bootstrap"].iloc[1] == pytest.approx(1 / 21)
    assert "ar1(Days | Subject)" in str(both)


def test_random_effects_left_out_one_at_a_time():
    fit = fit_of("sleepstudy_ar1_diag")
    found = fit.ranova()
    assert found.loc["<none>", "loglik"] == pytest.approx(ORACLE["sleepstudy_ar1_diag"]["fits"]["REML"]["logLik"])
    reduced = fit.without("(0 + Days | Subject)")
    assert reduced.criterion == pytest.approx(fit_of("sleepstudy_ar1_intercept").criterion, abs=1e-8)
    one = fit_of("sleepstudy_ar1_intercept")
    gls = one.without("(1 | Subject)")
    assert gls.criterion == pytest.approx(fit_of("sleepstudy_gls_ar1").criterion, abs=1e-8)
    row = one.ranova().loc["(1 | Subject)"]
    assert row["lrt"] == pytest.approx(gls.criterion - one.criterion, abs=1e-7)
    assert row["p_mixture"] == pytest.approx(row["p_value"] / 2)
    terms = fit_of("r_ar1_varident_arm_intercept").drop1("lrt")
    smaller = fit_of("r_ar1_varident_arm_intercept").without("base").refit(reml=False)
    assert terms.loc["base", "loglik"] == pytest.approx(smaller.loglik)
    assert smaller.record.own_formulas == {"dispersion": "~ arm", "residual": "ar1(visit | patient)"}


def test_predictions_have_the_noise_of_their_rows():
    fit = fit_of("orthodont_varident_intercept")
    new = pd.DataFrame({"age": 11, "Sex": ["Male", "Female"], "Subject": ["M01", "F01"]})
    mean = fit.predict(new, interval="confidence")["std_error"]
    whole = fit.predict(new, interval="prediction")["std_error"]
    noise = fit.sigma**2 * np.exp(2 * np.array([0.0, fit.estimates.residual[0]]))
    np.testing.assert_allclose(whole**2 - mean**2, noise, rtol=1e-9)
    rows = fit.predict(interval="prediction")["std_error"] ** 2 - fit.predict(interval="confidence")["std_error"] ** 2
    sex = table("Orthodont")["Sex"].to_numpy()
    np.testing.assert_allclose(rows, np.where(sex == "Male", *noise), rtol=1e-9)
    gls = fit_of("sleepstudy_gls_ar1")
    se = gls.predict({"Days": [3.0]}, interval="confidence")["std_error"].iloc[0]
    x = np.array([1.0, 3.0])
    assert se == pytest.approx(np.sqrt(x @ gls.vcov.to_numpy() @ x))
    # The errors of beta and b together, from the dense joint distribution.
    ar1 = fit_of("sleepstudy_ar1_intercept")
    V, X, y = ar1.marginal_cov(), ar1.X, np.asarray(ar1.design.y)
    C = ar1.Z.toarray()[:1] * float(ar1.Sigma["Subject"][0, 0])  # Cov(b_1, y) = Sigma Z_1'
    C = (C[0, 0] * ar1.Z.toarray()[:, :1]).T
    x, S = X[:1], np.linalg.inv(V)
    d = x - C @ S @ X
    variance = ar1.Sigma["Subject"][0, 0] - C @ S @ C.T + d @ ar1.vcov.to_numpy() @ d.T
    found = ar1.predict(interval="confidence")["std_error"].iloc[0]
    assert found**2 == pytest.approx(variance.item(), rel=1e-8)
    assert len(y) == 180


def test_tables_name_the_parameters_of_residuals():
    fit = fit_of("r_ar1_varident_arm_intercept")
    names = ["disp~arm[T.active]", "rho|patient"]
    text = str(fit.summary())
    assert "Dispersion: ~ arm" in text
    assert "Residuals: ar1(visit | patient)" in text
    assert all(name in text for name in names)
    tidy = fit.tidy().set_index("term")
    assert (tidy.loc[names, "effect"] == "residual").all()
    np.testing.assert_allclose(tidy.loc[names, "estimate"].astype(float), fit.estimates.residual)
    intervals = fit.confint(method="wald")
    assert list(intervals.index[:4]) == ["sd_Intercept|patient", *names, "sigma"]
    z = np.arctanh(fit.estimates.residual[1])
    assert np.arctanh(intervals.loc["rho|patient"]).mean() == pytest.approx(z)
    assert "rho | patient" in str(mj.table(fit))
    assert "Linear model fit" in str(fit_of("sleepstudy_gls_ar1").summary("satterthwaite"))
    for name in CASES:
        assert fit_of(name)._repr_html_()


def test_shares_of_variance_take_the_mean_over_rows():
    fit = fit_of("orthodont_varident_intercept")
    noise = fit.sigma**2 * np.exp(2 * fit.estimates.residual[0] * (table("Orthodont")["Sex"] == "Female")).mean()
    random = fit.Sigma["Subject"][0, 0]
    assert fit.icc()["adjusted"] == pytest.approx(random / (random + noise))
    relative = fit.variance_parameters()["std_error"]["sigma"] / fit.sigma
    assert fit.record.log_sigma_variance == pytest.approx(relative**2)


# --- what such fits do not have ---------------------------------------------------------------------------------------

REFUSED = {
    "profile": "confint(method='wald')", "sensitivity": "fixed-theta|without the rows",
    "influence": "fixed-theta|without the rows",
}  # fmt: skip
CORRELATED = REFUSED | {"leverage": "normalized", "robust": "satterthwaite"}
# Of models without random terms.
ALONE = {"plot": "residuals", "shrinkage": "random term", "robust": "random term|satterthwaite"}
CALLS = {
    "test": lambda fit: fit.test(np.eye(len(fit.fixef))[1]),
    "without": lambda fit: fit.without("Days" if "Days" in fit.fixef else "age:Sex"),
    "refit": lambda fit: fit.refit(),
    "refit_many": lambda fit: fit.refit_many(fit.simulate(1, 2), ranef=True).to_frame(),
    "simulate": lambda fit: fit.simulate(1, 2, random="fitted"),
    "emmeans": lambda fit: fit.emmeans("1"),
    "emtrends": lambda fit: fit.emtrends("1", "Days" if "Days" in fit.fixef else "age"),
    "bootstrap": lambda fit: fit.bootstrap(1, 3),
    "confint": lambda fit: fit.confint(method="wald"),
}
MODELS = {
    "orthodont_varident_intercept": REFUSED,
    "sleepstudy_ar1_intercept": CORRELATED,
    "sleepstudy_gls_ar1": CORRELATED | ALONE,
}


@pytest.mark.parametrize("name", list(MODELS))
def test_every_public_method_answers_or_refuses_by_name(name, monkeypatch):
    pytest.importorskip("matplotlib").use("agg")
    fit, refused = fit_of(name), MODELS[name]
    of_curves = ("smooth", "smooths")  # of which these formulas have none
    for method in [method for method in dir(type(fit)) if not method.startswith("_") and method not in of_curves]:
        own = getattr(fit, method)
        call = (lambda m=method: CALLS[m](fit)) if method in CALLS else own if callable(own) else None
        if method in refused:
            with pytest.raises(ValueError, match=r"(a fit with|without random terms).*has no"):
                call()
        elif call is not None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                assert call() is not None, method


@pytest.mark.parametrize(
    ("ask", "instead"),
    [
        (lambda fit: fit.test("Days = 0", ddf="kenward-roger"), "satterthwaite"),
        (lambda fit: fit.anova(ddf="kenward-roger"), "satterthwaite"),
        (lambda fit: fit.bootstrap(1, 5, kind="cases"), "parametric"),
        (lambda fit: fit.bootstrap(1, 5, kind="wild"), "parametric"),
        (lambda fit: fit.bootstrap(1, 5).confint(kind="bca"), "parametric"),
        (lambda fit: fit.predict(interval="confidence", method="second-order"), "henderson"),
        (lambda fit: fit.predict(interval="confidence", method="bootstrap", key=1), "henderson"),
        (lambda fit: fit.residuals(scale="studentized"), "normalized"),
        (lambda fit: fit.residuals("marginal", "cholesky"), "normalized"),
        (lambda fit: mj.scenario_of(fit), "simulate"),
        (lambda fit: mj.exact_rlrt(fit), "compare"),
        (lambda fit: mj.exact_lrt(fit), "compare"),
        (lambda fit: fit.refit_many(fit.simulate(1, 2), engine="jax"), "leave engine= out"),
        (lambda fit: mj.cross_products(fit.design), "mixjax.lmm"),
        (lambda fit: mj.marginal_loglik(None, fit.design), "mixjax.lmm"),
        (lambda fit: mj.rows(fit.design, mj.families.poisson()), "mixjax.lmm"),
    ],
)  # fmt: skip
def test_what_is_not_there_is_refused_by_name(ask, instead):
    with pytest.raises(ValueError, match=instead):
        ask(fit_of("sleepstudy_ar1_intercept"))


# --- ordinary regression ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, "w"])
def test_without_anything_random_it_is_ordinary_regression(weights):
    data = mj.datasets.load("sleepstudy").assign(w=lambda d: 1.0 + d["Days"] / 3)
    fit = mj.lmm("Reaction ~ Days", data, dispersion="~ 1", weights=weights)
    w = np.ones(180) if weights is None else data["w"].to_numpy()
    X, y, n = fit.X * np.sqrt(w)[:, None], data["Reaction"].to_numpy() * np.sqrt(w), 180
    beta, rss, *_ = np.linalg.lstsq(X, y, rcond=None)
    variance = float(rss[0]) / (n - 2)
    np.testing.assert_allclose(fit.fixef, beta, rtol=1e-12)
    np.testing.assert_allclose(fit.sigma**2, variance, rtol=1e-12)
    np.testing.assert_allclose(fit.vcov, variance * np.linalg.inv(X.T @ X), rtol=1e-10)
    # Satterthwaite's degrees of freedom are those of the t distribution, exactly.
    np.testing.assert_allclose(fit.test("Days = 0")["df"], n - 2, rtol=1e-12)
    assert fit.npar == 3
    ml = fit.refit(reml=False)
    deviance = n * (1 + np.log(2 * np.pi * rss[0] / n)) - np.log(w).sum()
    np.testing.assert_allclose(ml.criterion, deviance, rtol=1e-12)
    larger = mj.lmm("Reaction ~ Days + (1 | Subject)", data, weights=weights)
    table = mj.compare(fit, larger).to_frame()
    np.testing.assert_allclose(table["chisq"].iloc[1], deviance - larger.refit(reml=False).criterion, rtol=1e-9)
    np.testing.assert_allclose(table["p_mixture"].iloc[1], table["p_value"].iloc[1] / 2, rtol=1e-9)
    np.testing.assert_allclose(larger.ranova()["loglik"].iloc[1], fit.loglik, rtol=1e-10)
    batch = fit.refit_many(fit.simulate(key=1, n=3))
    assert batch.converged.all()
    assert fit.predict({"Days": [3], "w": [1.0]}, interval="prediction")["std_error"].iloc[0] > fit.sigma


# --- by distance -----------------------------------------------------------------------------------------------------


def by_distance(**options):
    return mj.lmm("y ~ time + (1 | animal)", tracks(), **options)


def tracks():
    return pd.read_csv(HERE / "data" / "tracks.csv")


def test_an_exponential_correlation_in_time_is_car1():
    """The same model by whitening with the row before and by dense blocks."""
    one, other = by_distance(residual="car1(time | animal)"), by_distance(residual="exp(time | animal)")
    assert other.criterion == pytest.approx(one.criterion, abs=1e-9)
    np.testing.assert_allclose(other.fixef, one.fixef, rtol=1e-8)
    np.testing.assert_allclose(other.vcov, one.vcov, rtol=1e-7)
    values, errors = (own.variance_parameters().T.to_numpy() for own in (one, other))
    rho, range_ = values[0][1], errors[0][1]
    assert np.exp(-1.0 / range_) == pytest.approx(rho, rel=1e-7)
    # The delta method between the two charts.
    assert errors[1][1] * rho / range_**2 == pytest.approx(values[1][1], rel=1e-6)
    np.testing.assert_allclose(other.marginal_cov(), one.marginal_cov(), rtol=1e-6, atol=1e-10)
    np.testing.assert_allclose(
        other.residuals(scale="normalized"), one.residuals(scale="normalized"), rtol=1e-6, atol=1e-8
    )
    assert other.test("time = 0").df.iloc[0] == pytest.approx(one.test("time = 0").df.iloc[0], rel=1e-6)
    assert other.npar == one.npar
    assert list(other.variance_parameters().index)[1] == "range|animal"


def test_sas_spatial_exponential():
    """SAS PROC MIXED of mmrm's example, distances in the plane of two columns (openpharma/mmrm at ec290b2,
    design/ddfm_covtype): criterion where SAS stopped, parameters and the degrees of freedom of one contrast."""
    data = pd.read_csv(HERE / "data" / "fev_places.csv")
    fit = mj.lmm("FEV1 ~ ARMCD", data, residual="exp(VISITN + VISITN2 | USUBJID)")
    assert fit.criterion == pytest.approx(3872.29178394, abs=1e-6)
    assert fit.criterion <= 3872.29178394 + 1e-8
    assert fit.variance_parameters()["estimate"]["range|USUBJID"] == pytest.approx(1.0898, abs=5e-5)
    assert fit.sigma**2 == pytest.approx(83.3648, abs=1e-3)
    test = fit.test("ARMCD[T.TRT] = 0").iloc[0]
    assert test["estimate"] == pytest.approx(4.21488979997259, rel=1e-6)
    assert test["df"] == pytest.approx(195.584197921463, rel=1e-5)


@pytest.mark.parametrize("kernel", ["exp", "gau", "mat"])
def test_derivatives_by_distance(kernel):
    option = ", nu = 1.5" if kernel == "mat" else ""
    fit = by_distance(residual=f"{kernel}(time | animal{option})", dispersion="~ time")
    engine, x = fit.record.residual_engine, fit.record.x + 0.1
    _, gradient, H = engine.evaluate(x[:, None])
    h = 1e-5
    ends = [(engine.evaluate((x + h * d)[:, None]), engine.evaluate((x - h * d)[:, None])) for d in np.eye(len(x))]
    slopes = [(a[0][0] - b[0][0]) / (2 * h) for a, b in ends]
    np.testing.assert_allclose(gradient[:, 0], slopes, rtol=1e-5, atol=1e-4)
    curves = np.array([(a[1] - b[1])[:, 0] / (2 * h) for a, b in ends])
    np.testing.assert_allclose(H[..., 0], curves, rtol=1e-5, atol=1e-3)
    # The dense criterion of the marginal covariance.
    design, beta = fit.record.given, fit.fixef.to_numpy()
    V, r = fit.marginal_cov(), design.y - design.X @ beta
    V = np.asarray(V)
    n, p = design.X.shape
    dense = np.linalg.slogdet(V)[1] + r @ np.linalg.solve(V, r) + (n - p) * np.log(2 * np.pi)
    dense += np.linalg.slogdet(design.X.T @ np.linalg.solve(V, design.X))[1]
    assert fit.criterion == pytest.approx(dense, abs=1e-7)


def test_draws_by_distance():
    fit = by_distance(residual="gau(time | animal)")
    own, rows = fit.record.residual_engine.transform.correlation, np.arange(fit.nobs)
    range_ = float(fit.estimates.residual[-1])
    L = own.colour(range_, np.eye(fit.nobs))
    np.testing.assert_allclose(L @ L.T, own.matrix(range_, rows), atol=1e-12)
    batch = fit.refit_many(fit.simulate(1, 4))
    assert batch.converged.all()
    assert "range|animal" in batch.sdcor


@pytest.mark.parametrize(
    ("residual", "message"),
    [
        ("mat(u + v | 1)", "of residuals the smoothness is held"),
        ("exp(u + v | row)", "has one row"),
        ("exp(w | 1)", "no column 'w'"),
        ("exp(u | 1)", "are at one place"),
        ("exp(log(u) | 1)", "make a column of it first"),
        ("gau(site | 1)", "needs numbers that say how far apart places are.*'site' holds text"),
    ],
)
def test_bad_residuals_by_distance(residual, message):
    data = pd.read_csv(HERE / "data" / "sites.csv").groupby("site", as_index=False).first()
    data = data.assign(row=np.arange(len(data)).astype(str), u=data["u"].round(1))
    with pytest.raises(ValueError, match=message):
        mj.lmm("y ~ x", data.assign(u=data["u"].round() if residual == "exp(u | 1)" else data["u"]), residual=residual)


def test_residuals_by_distance_are_refused_where_they_must_be():
    with pytest.raises(ValueError, match="have different levels of"):
        mj.lmm("y ~ time + ou(time | animal)", tracks(), residual="exp(time | animal)")
    with pytest.raises(ValueError, match="have no posteriors"):
        mj.bayes("y ~ time + (1 | animal)", tracks(), residual="exp(time | animal)", key=1)
