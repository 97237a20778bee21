"""Repeated measures without random effects, held against SAS, nlme, a dense likelihood and themselves."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
from hypothesis import given, settings
from hypothesis import strategies as st

import mixjax as mj
from mixjax.covariance import structure_of
from mixjax.engine.visits import ManyResponses, OneResponse, Visits
from mixjax.estimation.repeated import fit_repeated, fit_repeated_many, scaled
from mixjax.inference.fixed.kenward_roger_visits import by_natural
from mixjax.products.visits import visit_rows
from mixjax.simulation import simulate_visits

HERE = Path(__file__).parent
ORACLE = json.loads((HERE / "oracle" / "mmrm.json").read_text())
# SAS's names of structures, and ours.
SAS = {"us": "us", "ar1": "ar1", "arh1": "ar1h", "cs": "homcs", "csh": "csh", "adh": "adh", "toep": "homtoep",
       "toeph": "toeph"}  # fmt: skip
STRUCTURES = [*SAS.values(), "homdiag", "diag"]
FEV = "FEV1 ~ RACE + ARMCD * AVISIT + {}(AVISIT | USUBJID)"

pytestmark = pytest.mark.filterwarnings("ignore::mixjax.DataWarning")


def fev():
    return mj.datasets.load("fev")


@cache
def fev_fit(structure="us", formula=FEV, reml=True):
    return mj.mmrm(formula.format(structure), fev(), reml=reml)


def trial():
    frame = pd.read_csv(HERE / "data" / "trial.csv")
    for name, levels in ORACLE["fits"]["r_us"]["levels"].items():
        frame[name] = pd.Categorical(frame[name], categories=levels)
    return frame


# --- against others ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SAS)
def test_fits_are_those_of_sas_and_no_worse(name):
    fit = mj.mmrm(f"FEV1 ~ ARMCD + {SAS[name]}(AVISIT | USUBJID)", fev())
    own = ORACLE["sas"][name]
    # SAS stops where its relative change is below 1e-8, which leaves up to 1e-5 of the criterion.
    assert -2e-5 < fit.criterion - own["criterion"] <= 1e-8
    assert fit.converged
    assert fit.estimates.grad_norm < 1e-6
    for ddf, key in (("kenward-roger", "kr"), ("kenward-roger-linear", "kr_linear")):
        ours = fit.test("ARMCD[T.TRT] = 0", ddf=ddf).iloc[0]
        # So its estimates are within sqrt(2 * 1e-5) = 0.0045 standard deviations of their covariance's parameters.
        np.testing.assert_allclose(ours["estimate"], own[key]["estimate"], rtol=5e-5)
        np.testing.assert_allclose(ours["std_error"], own[key]["std_error"], rtol=2e-4)
        np.testing.assert_allclose(ours["df"], own[key]["df"], rtol=6e-4)


def test_kenward_roger_at_sas_own_optimum_has_its_digits():
    """Where SAS's search ended close to the optimum, so do the second derivatives, which differ from the linear form in
    the third digit."""
    fit = mj.mmrm("FEV1 ~ ARMCD + ar1(AVISIT | USUBJID)", fev())
    for ddf, key in (("kenward-roger", "kr"), ("kenward-roger-linear", "kr_linear")):
        ours, own = fit.test("ARMCD[T.TRT] = 0", ddf=ddf).iloc[0], ORACLE["sas"]["ar1"][key]
        np.testing.assert_allclose(ours["std_error"], own["std_error"], rtol=1e-6)
        np.testing.assert_allclose(ours["df"], own["df"], rtol=1e-6)
    assert abs(ORACLE["sas"]["ar1"]["kr"]["std_error"] / ORACLE["sas"]["ar1"]["kr_linear"]["std_error"] - 1) > 1e-3


@pytest.mark.parametrize("written", ["car1", "ar1"])
def test_residuals_along_a_line_are_sas_ar1(written):
    """Exponential correlation in one dimension, at whole times, is AR(1). SAS's SP(EXP), whose distances are in a
    plane, is no model of residuals here."""
    data = fev().assign(time=lambda d: d["AVISIT"].astype(str).str[-1].astype(float))
    fit, own = mj.lmm("FEV1 ~ ARMCD", data, residual=f"{written}(time | USUBJID)"), ORACLE["sas"]["ar1"]
    assert fit.criterion == pytest.approx(own["criterion"], abs=1e-8)
    table = fit.variance_parameters()["estimate"]
    np.testing.assert_allclose([table["rho|USUBJID"], table["sigma"] ** 2], [0.3904, 84.4289], atol=5e-5)  # as printed
    ours = fit.test("ARMCD[T.TRT] = 0").iloc[0]
    np.testing.assert_allclose(ours["estimate"], own["kr"]["estimate"], rtol=1e-6)
    np.testing.assert_allclose(
        ours["df"], own["kr"]["df"], rtol=2e-6
    )  # of one contrast Satterthwaite's are Kenward-Roger's
    with pytest.raises(ValueError, match="no Kenward-Roger"):
        fit.test("ARMCD[T.TRT] = 0", ddf="kenward-roger")


MODELS = {
    "r_us": ("y ~ base + arm * visit + us(visit | patient)", trial),
    "r_csh": ("y ~ base + arm * visit + csh(visit | patient)", trial),
    "sleepstudy_gls_ar1": ("Reaction ~ Days + ar1(Days | Subject)", lambda: mj.datasets.load("sleepstudy")),
    "sleepstudy_gls_compsymm": ("Reaction ~ Days + homcs(Days | Subject)", lambda: mj.datasets.load("sleepstudy")),
    "orthodont_gls_compsymm": ("distance ~ age * Sex + homcs(age | Subject)", lambda: mj.datasets.load("Orthodont")),
}


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_fits_are_those_of_gls(name, reml):
    formula, data = MODELS[name]
    fit, own = mj.mmrm(formula, data(), reml=reml), ORACLE["fits"][name]["REML" if reml else "ML"]
    np.testing.assert_allclose(fit.criterion, own["criterion"], atol=1e-8)
    assert fit.npar == own["npar"]
    np.testing.assert_allclose(fit.fixef.to_numpy(), list(own["fixef"].values()), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(fit.se.to_numpy(), list(own["fixef_se"].values()), rtol=1e-6)
    Sigma, parameters = fit.estimates.Sigma[0], own["parameters"]
    sd = np.sqrt(np.diag(Sigma))
    if "Sigma" in parameters:
        np.testing.assert_allclose(Sigma, parameters["Sigma"], rtol=1e-6)
    else:
        np.testing.assert_allclose(sd, parameters.get("sd", np.full(len(sd), parameters.get("sigma"))), rtol=1e-6)
        rho = parameters.get("rho", parameters.get("phi"))
        np.testing.assert_allclose(Sigma[0, 1] / (sd[0] * sd[1]), rho, rtol=1e-6)


def dense_criterion(design, beta_free, covariances, reml):
    """-2 (restricted) log-likelihood of a design from its dense covariance, written out; and GLS estimates."""
    del beta_free
    n, w = len(design.y), np.ones(len(design.y)) if design.weights is None else design.weights
    arm = np.zeros(n, int) if design.arm is None else design.arm[design.subject]
    V = np.stack([covariances[a][v] for a, v in zip(arm, design.visit, strict=True)])[:, design.visit]
    V = V * (design.subject[:, None] == design.subject) / np.sqrt(np.outer(w, w))
    y = design.y if design.offset is None else design.y - design.offset
    Vi = np.linalg.inv(V)
    XVX = design.X.T @ Vi @ design.X
    beta = np.linalg.solve(XVX, design.X.T @ Vi @ y)
    e = y - design.X @ beta
    value = np.linalg.slogdet(V)[1] + e @ Vi @ e + n * np.log(2 * np.pi)
    if reml:
        value += np.linalg.slogdet(XVX)[1] - design.X.shape[1] * np.log(2 * np.pi)
    return value, beta, np.linalg.inv(XVX)


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize(
    ("formula", "options"),
    [
        (FEV.format("us"), {}),
        ("FEV1 ~ RACE + ARMCD * AVISIT + us(AVISIT | ARMCD / USUBJID)", {}),
        (FEV.format("toeph"), {"weights": "WEIGHT"}),
        ("FEV1 ~ 0 + AVISIT + offset(FEV1_BL) + ar1h(AVISIT | USUBJID)", {}),
        ("FEV1 ~ 0 + homcs(AVISIT | USUBJID)", {}),
    ],
)
def test_criterion_and_estimates_are_those_of_the_dense_likelihood(formula, options, reml):
    fit = mj.mmrm(formula, fev(), reml=reml, **options)
    value, beta, vcov = dense_criterion(fit.design, None, fit.estimates.Sigma, reml)
    np.testing.assert_allclose(fit.criterion, value, rtol=1e-12)
    np.testing.assert_allclose(fit.fixef, beta, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(fit.vcov, vcov, rtol=1e-8, atol=1e-10)


def test_minimum_is_that_of_a_general_search():
    """By arms and weighted: no search over the dense likelihood finds anything lower."""
    data = fev()
    fit = mj.mmrm(
        "FEV1 ~ ARMCD + homcs(AVISIT | ARMCD / USUBJID)", data[data["USUBJID"].cat.codes < 80], weights="WEIGHT"
    )
    design = fit.design

    def criterion(z):
        covariances = []
        for log_sd, t in z.reshape(2, 2):
            rho = -1 / 3 + (4 / 3) / (1 + np.exp(-t))
            covariances.append(np.exp(2 * log_sd) * (rho + (1 - rho) * np.eye(4)))
        return dense_criterion(design, None, covariances, True)[0]

    found = scipy.optimize.minimize(criterion, [2.0, 0.0, 2.0, 0.0], method="BFGS")
    assert fit.criterion <= found.fun + 1e-9
    np.testing.assert_allclose(fit.criterion, found.fun, rtol=1e-7)


# --- against itself ---------------------------------------------------------------------------------------------------


def engine(structure, arms=False, reml=True, weights=None):
    formula = f"FEV1 ~ RACE + ARMCD * AVISIT + {structure}(AVISIT | {'ARMCD / ' if arms else ''}USUBJID)"
    rows = mj.mmrm(formula, fev(), weights=weights).record.rows
    own = scaled(rows, np.asarray(rows.design.y)[None])
    return Visits(rows, OneResponse.of(rows, own.residuals[0]), reml), own


@pytest.mark.parametrize(
    ("structure", "arms", "reml"),
    [("us", True, True), ("toeph", False, True), ("adh", False, False), ("ar1", True, False), ("csh", False, True)],
)
def test_derivatives_are_those_of_differences(structure, arms, reml):
    visits, _ = engine(structure, arms, reml)
    x = visits.start * 1.05
    f, g, H = visits.evaluate(x)
    h = 1e-5
    for j, step in enumerate(h * np.eye(len(x))[:, :, None]):
        (fp, gp, _), (fm, gm, _) = visits.evaluate(x + step), visits.evaluate(x - step)
        # Errors of differences: h^2 of the third derivative, and rounding of f (1e-13 * 1e3) over h.
        np.testing.assert_allclose(g[j], (fp - fm) / (2 * h), atol=1e-4)
        np.testing.assert_allclose(H[j], (gp - gm) / (2 * h), atol=1e-6 * np.abs(H).max())
    assert f.shape == (1,)


def test_many_responses_are_each_alone():
    visits, own = engine("us", arms=True)
    Y = np.stack([own.residuals[0], 2.0 * own.residuals[0][::-1], own.residuals[0] ** 2])
    Y = np.stack([row - visits.rows.Q @ (visits.rows.Q.T @ row) for row in Y])
    x = np.repeat(visits.start, 3, axis=1)
    together = Visits(visits.rows, ManyResponses.of(visits.rows, Y), True).evaluate(x)
    for i, y in enumerate(Y):
        alone = Visits(visits.rows, OneResponse.of(visits.rows, y), True).evaluate(x[:, :1])
        for a, b in zip(together, alone, strict=True):
            np.testing.assert_allclose(a[..., i], b[..., 0], rtol=1e-10, atol=1e-10 * np.abs(b).max())


@pytest.mark.parametrize("structure", [s for s in STRUCTURES if s not in ("us", "homcs", "homtoep", "homdiag")])
def test_second_derivatives_by_variances_and_correlations(structure):
    """Of the covariance's entries; by differences of the first."""
    s = structure_of(structure, 4)
    rng = np.random.default_rng(1)
    x = s.near(np.linalg.cholesky(np.cov(rng.normal(size=(4, 40)) + 0.5 * rng.normal(size=40)))[..., None])
    if s.directions() is not None:
        assert by_natural(s, x, False)[1] is None
        return
    first, second, by_x = by_natural(s, x, False)
    back = np.linalg.inv(by_x[0])  # of the coordinates by the parameters
    h = 1e-5
    for m in range(s.k):
        ahead, behind = (by_natural(s, x + sign * h * back[:, [m]], False)[0][0] for sign in (1, -1))
        np.testing.assert_allclose(second[0, :, :, m], (ahead - behind) / (2 * h), atol=1e-6)
    natural = [p.kind for p in s.natural]
    assert np.allclose(first[0, 0, natural.index("sd")], 1.0)  # the variance of visit 1 by itself


def test_satterthwaite_is_that_of_differences():
    """Against lmerTest's definition with the Hessian and the slopes of the variance by differences of the dense
    likelihood, in entries of the Cholesky factor."""
    data = fev()
    fit = mj.mmrm("FEV1 ~ ARMCD + AVISIT + us(AVISIT | USUBJID)", data[data["USUBJID"].cat.codes < 60])
    design, L = fit.design, np.zeros(5)
    L[1] = 1.0
    at = np.linalg.cholesky(fit.estimates.Sigma[0])[np.tril_indices(4)]

    def covariance(theta):
        lower = np.zeros((4, 4))
        lower[np.tril_indices(4)] = theta
        return [lower @ lower.T]

    def value(theta):
        return dense_criterion(design, None, covariance(theta), True)[0]

    def variance(theta):
        return L @ dense_criterion(design, None, covariance(theta), True)[2] @ L

    k, h = len(at), 1e-2
    steps = h * np.eye(k)
    g = np.array([(variance(at + e) - variance(at - e)) / (2 * h) for e in steps])
    H = np.empty((k, k))
    for i in range(k):
        for j in range(i, k):
            a, b = steps[i], steps[j]
            H[i, j] = H[j, i] = (value(at + a + b) - value(at + a - b) - value(at - a + b) + value(at - a - b)) / (
                4 * h * h
            )
    df = 2 * variance(at) ** 2 / (g @ (2 * np.linalg.inv(H)) @ g)
    np.testing.assert_allclose(fit.test(L).iloc[0]["df"], df, rtol=1e-4)


def test_own_structure_equals_the_built_in_one():
    import jax.numpy as jnp

    own = mj.Covariance(
        lambda p, q: jnp.tanh(p[0]) ** jnp.abs(jnp.arange(q)[:, None] - jnp.arange(q)),
        k=1, names=("rho",), natural=jnp.tanh,
    )  # fmt: skip
    data = fev()
    fit = mj.mmrm("FEV1 ~ ARMCD * AVISIT + own(AVISIT | USUBJID)", data)
    built_in = mj.mmrm("FEV1 ~ ARMCD * AVISIT + ar1(AVISIT | USUBJID)", data)
    assert own.k == 1
    np.testing.assert_allclose(fit.criterion, built_in.criterion, atol=1e-10)
    np.testing.assert_allclose(fit.estimates.Sigma[0], built_in.estimates.Sigma[0], rtol=1e-7)
    for ddf in ("satterthwaite", "kenward-roger", "kenward-roger-linear"):
        np.testing.assert_allclose(fit.anova(ddf=ddf), built_in.anova(ddf=ddf), rtol=1e-6)
    np.testing.assert_allclose(fit.variance_parameters(), built_in.variance_parameters(), rtol=1e-6)


@settings(max_examples=12, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from(STRUCTURES))
def test_order_of_rows_names_and_units_do_not_matter(seed, structure):
    rng = np.random.default_rng(seed)
    data, formula = fev().dropna(), f"FEV1 ~ FEV1_BL + ARMCD + AVISIT + {structure}(AVISIT | USUBJID)"
    fit = mj.mmrm(formula, data)
    names = {s: f"a{i}" for s, i in zip(data["USUBJID"].unique(), rng.permutation(1000), strict=False)}
    turned = data.sample(frac=1, random_state=int(seed % 1000)).assign(
        USUBJID=lambda d: d["USUBJID"].astype(str).map(names),
        FEV1=lambda d: 1000.0 * d["FEV1"] + 7.0,
        FEV1_BL=lambda d: 1e-3 * d["FEV1_BL"] - 2000.0,
    )
    other = mj.mmrm(formula, turned)
    df = fit.nobs - len(fit.fixef)
    # The REML criterion moves by df log(1000^2), and by the determinant of X'X of the changed column.
    moved = 2 * df * np.log(1000.0) + 2 * np.log(1e-3)
    np.testing.assert_allclose(other.criterion, fit.criterion + moved, rtol=1e-10)
    np.testing.assert_allclose(other.estimates.Sigma[0], 1e6 * fit.estimates.Sigma[0], rtol=1e-6)
    np.testing.assert_allclose(other.fixef["FEV1_BL"], 1e6 * fit.fixef["FEV1_BL"], rtol=1e-6)
    for ddf in ("satterthwaite", "kenward-roger"):
        ours, theirs = (f.test("ARMCD[T.TRT] = 0", ddf=ddf).iloc[0] for f in (fit, other))
        np.testing.assert_allclose(theirs["df"], ours["df"], rtol=1e-5)
        np.testing.assert_allclose(theirs["statistic"], ours["statistic"], rtol=1e-5)


def test_complete_data_of_one_design_have_the_sample_covariance():
    """With cell means for all visits REML's estimate is the pooled sample covariance, and the t test of a difference
    has S - 2 degrees of freedom by either method."""
    rng = np.random.default_rng(5)
    S, T = 14, 3
    arm = np.repeat(["a", "b"], S // 2)
    Y = rng.normal(size=(S, T)) @ np.linalg.cholesky([[2.0, 1, 0.5], [1, 3, 1], [0.5, 1, 1]]).T
    data = pd.DataFrame({"y": Y.ravel(), "visit": np.tile(["v1", "v2", "v3"], S), "arm": np.repeat(arm, T),
                         "subject": np.repeat(np.arange(S), T)})  # fmt: skip
    fit = mj.mmrm("y ~ 0 + arm:visit + us(visit | subject)", data)
    rest = np.concatenate([Y[arm == a] - Y[arm == a].mean(0) for a in "ab"])
    np.testing.assert_allclose(fit.estimates.Sigma[0], rest.T @ rest / (S - 2), rtol=1e-9)
    means = fit.emmeans("arm | visit")
    for ddf in ("satterthwaite", "kenward-roger"):
        table = fit.emmeans("arm | visit", ddf=ddf).contrasts()
        np.testing.assert_allclose(table["df"], S - 2, rtol=1e-7)
    pooled = np.sqrt(np.diag(rest.T @ rest / (S - 2)) * (4 / S))
    np.testing.assert_allclose(means.contrasts()["std_error"], pooled, rtol=1e-9)


# --- many -------------------------------------------------------------------------------------------------------------


def test_many_fits_are_single_fits():
    fit = fev_fit()
    Y = fit.simulate(key=3, n=20)
    Y[4, 7] = np.inf
    Y[5] = fit.X @ np.arange(10.0)
    batch = fit.refit_many(Y)
    assert batch.counts["failed"] == 2
    codes = [mj.Result(code).name for code in batch.estimates.result]
    assert codes[5] == "NO_NOISE"
    assert codes[4] == "NOT_FINITE"
    for i in (0, 11, 19):
        one = fit.refit(Y[i])
        np.testing.assert_allclose(batch.criterion[i], one.criterion, rtol=1e-12)
        np.testing.assert_allclose(batch.fixef.iloc[i], one.fixef, rtol=1e-7)
        np.testing.assert_allclose(batch.sdcor.iloc[i], one.variance_parameters()["estimate"], rtol=1e-6)
        for ddf in ("satterthwaite", "kenward-roger", "wald"):
            L = "ARMCD[T.TRT]:AVISIT[T.VIS4] = 0.5"
            ours, alone = batch.test(L, ddf).iloc[i], one.test(L, ddf).iloc[0]
            np.testing.assert_allclose(ours, alone[list(ours.index)], rtol=1e-5)
            both = [L, "ARMCD[T.TRT]:AVISIT[T.VIS3] = 0"]
            ours, alone = batch.test(both, ddf).iloc[i], one.test(both, ddf).iloc[0]
            np.testing.assert_allclose(ours, alone[list(ours.index)], rtol=1e-5)
    assert batch.test("ARMCD[T.TRT] = 0")["p_value"].isna().tolist() == [i in (4, 5) for i in range(20)]


@pytest.mark.parametrize(("structure", "arms"), [("us", False), ("us", True), ("ar1h", False)])
def test_missing_responses_are_visits_that_are_missed(structure, arms):
    """Of many responses each with visits missing of its own: the fits are those of the tables without these rows."""
    formula = f"FEV1 ~ RACE + ARMCD * AVISIT + {structure}(AVISIT | {'ARMCD / ' if arms else ''}USUBJID)"
    fit = mj.mmrm(formula, fev(), weights="WEIGHT")
    rng = np.random.default_rng(2)
    Y = fit.simulate(key=3, n=6)
    missing = rng.random(Y.shape) < 0.25
    missing[0] = False
    Y[missing] = np.nan
    Y[5, fit.labels.frame["AVISIT"] == "VIS3"] = np.nan  # the column of the visit depends on others
    batch = fit.refit_many(Y)
    assert [mj.Result(code).name for code in batch.estimates.result] == ["CONVERGED"] * 5 + ["NOT_FINITE"]
    frame = fev().loc[fit.labels.frame.index]
    for i in range(5):
        alone = mj.mmrm(formula, frame.assign(FEV1=Y[i]), weights="WEIGHT")
        np.testing.assert_allclose(batch.criterion[i], alone.criterion, rtol=1e-11)
        np.testing.assert_allclose(batch.fixef.iloc[i], alone.fixef, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(batch.se.iloc[i], alone.se, rtol=1e-6)
        np.testing.assert_allclose(batch.sdcor.iloc[i], alone.variance_parameters()["estimate"], rtol=1e-5, atol=1e-7)
        for ddf in ("satterthwaite", "kenward-roger"):
            L = "ARMCD[T.TRT]:AVISIT[T.VIS4] = 0.5"
            ours, own = batch.test(L, ddf).iloc[i], alone.test(L, ddf).iloc[0]
            np.testing.assert_allclose(ours, own[list(ours.index)], rtol=1e-5)


@pytest.mark.parametrize("structure", ["us", "ar1", "csh", "toeph", "adh"])
def test_no_simulated_trial_fails(structure):
    fit = fev_fit(structure)
    batch = fit.refit_many(fit.simulate(key=1, n=500))
    assert batch.counts["failed"] == 0
    est = batch.estimates
    assert est.grad_norm.max() <= 1e-6
    error = (batch.fixef - fit.fixef).mean() / (batch.fixef.std() / np.sqrt(500))
    assert np.abs(error).max() < 4.5


def test_simulated_responses_have_the_covariance():
    fit = mj.mmrm("FEV1 ~ ARMCD + us(AVISIT | ARMCD / USUBJID)", fev(), weights="WEIGHT")
    design, n = fit.design, 4000
    Y = fit.simulate(key=1, n=n)
    same = fit.simulate(key=1, n=10)
    np.testing.assert_array_equal(Y[:10], same)
    np.testing.assert_array_equal(simulate_visits(design, fit.estimates.beta, fit.estimates.Sigma, 1, 5, 3), Y[3:8])
    e = (Y - fit.fitted.to_numpy()) / fit.record.deviations
    # Of a mean of n squares of standard normal variables: standard deviation sqrt(2 / n).
    assert np.abs((e**2).mean(0) - 1).max() < 5.5 * np.sqrt(2 / n)
    first = np.flatnonzero(design.subject == design.subject[0])
    S = fit.estimates.Sigma[design.arm[design.subject[0]]]
    v = design.visit[first]
    cor = S[np.ix_(v, v)] / np.sqrt(np.outer(np.diag(S)[v], np.diag(S)[v]))
    np.testing.assert_allclose(np.corrcoef(e[:, first].T), cor, atol=5 / np.sqrt(n))


# --- what follows -----------------------------------------------------------------------------------------------------


def test_normalized_residuals_are_independent():
    fit = mj.mmrm("FEV1 ~ ARMCD + us(AVISIT | ARMCD / USUBJID)", fev(), weights="WEIGHT")
    Y = fit.simulate(key=2, n=300)
    record = fit.record
    e = np.stack([record.rows.with_response(y) and _normalized(fit, y) for y in Y])
    assert np.abs(np.corrcoef(e[:, :40].T) - np.eye(40)).max() < 5.5 / np.sqrt(300)
    assert abs((e**2).mean() - 1) < 0.02
    # Their squares are the exponent of the likelihood.
    design = fit.design
    value, _, vcov = dense_criterion(design, None, fit.estimates.Sigma, True)
    logdet = value - (fit.residuals("normalized") ** 2).sum()
    other = dense_criterion(
        mj.RepeatedDesign(**{**design.__dict__, "y": design.y * 0}), None, fit.estimates.Sigma, True
    )
    np.testing.assert_allclose(logdet, other[0], rtol=1e-10)
    assert vcov.shape == (2, 2)


def _normalized(fit, y):
    from dataclasses import replace

    record = fit.record
    moved = replace(record, rows=record.rows.with_response(y))
    return moved.residuals("normalized")


def test_conditional_predictions_are_those_of_the_dense_normal_distribution():
    fit = mj.mmrm("FEV1 ~ RACE + ARMCD * AVISIT + us(AVISIT | ARMCD / USUBJID)", fev())
    data = fev()
    found = fit.predict(data, conditional=True, interval="prediction")
    observed = data["FEV1"].notna()
    np.testing.assert_allclose(found.loc[observed, "estimate"], data.loc[observed, "FEV1"], rtol=1e-10)
    np.testing.assert_allclose(found.loc[observed, "std_error"], 0.0, atol=1e-6)
    row = int(np.flatnonzero(~observed & data["USUBJID"].isin(data.loc[observed, "USUBJID"]))[0])
    subject = data["USUBJID"].iloc[row]
    own = data[(data["USUBJID"] == subject) & observed]
    S = fit.Sigma[f"USUBJID:ARMCD[{own['ARMCD'].iloc[0]}]"]
    visit, visits = data["AVISIT"].iloc[row], list(own["AVISIT"])
    mean = fit.predict(data.iloc[[row]]).iloc[0]
    share = np.linalg.solve(S.loc[visits, visits], S.loc[visits, visit])
    np.testing.assert_allclose(found["estimate"].iloc[row], mean + share @ fit.resid().loc[own.index], rtol=1e-10)
    left = S.loc[visit, visit] - share @ S.loc[visits, visit]
    assert np.sqrt(left) < found["std_error"].iloc[row] < 1.2 * np.sqrt(left)
    # A subject that is not in the fit has the mean of all.
    new = data.iloc[[row]].assign(USUBJID="someone")
    np.testing.assert_allclose(fit.predict(new, conditional=True), [mean])


def test_every_method_of_a_fit_answers():
    fit = fev_fit()
    assert fit.nobs == 537
    assert fit.npar == 20
    assert "NOT" not in repr(fit)
    assert fit.anova().shape == (4, 4)
    assert fit.joint_tests().shape[0] == 4
    assert list(fit.anova(ddf="KR").columns) == ["num_df", "den_df", "statistic", "p_value"]
    assert fit.confint().shape == (20, 2)
    assert fit.confint("theta_").shape == (10, 2)
    assert fit.confint("beta_", method="bootstrap", n=20).shape == (10, 2)
    assert fit.conf_int().shape == (10, 2)
    intervals = fit.tidy(conf_int=True)[["lower", "upper"]][:10].astype(float)
    np.testing.assert_allclose(intervals, fit.confint("beta_"), rtol=1e-13)
    assert fit.tidy().shape[0] == 20
    assert fit.glance().loc[0, "subjects"] == 197
    assert fit.augment()[".normalized"].notna().all()
    assert fit.emtrends("ARMCD", "FEV1_BL").to_frame().shape[0] == 2 if "FEV1_BL" in fit.labels.frame else True
    assert "Covariance of visits" in str(fit.summary("kenward-roger"))
    assert "<table" in fit._repr_html_()
    assert fit.refit(reml=False).criterion < fit.criterion + 100
    assert fit.residual_sd.index.tolist() == ["VIS1", "VIS2", "VIS3", "VIS4"]
    with pytest.raises(AttributeError, match="residual_sd"):
        _ = fit.sigma
    with pytest.raises(ValueError, match="no profiles"):
        fit.confint(method="profile")
    with pytest.raises(ValueError, match="sigma="):
        fit.emmeans("ARMCD").eff_size()
    for function in (mj.exact_rlrt, mj.scenario_of):
        with pytest.raises(TypeError, match="mmrm"):
            function(fit)


def test_side_by_side_with_a_random_intercept():
    own, other = fev_fit("ar1"), mj.lmm("FEV1 ~ RACE + ARMCD * AVISIT + (1 | USUBJID)", fev())
    table = mj.table({"mmrm": own, "lmm": other}, "p", ddf="kenward-roger")
    frame = table.to_frame()["mmrm"]
    np.testing.assert_allclose(frame["random", "cor lag 1 | USUBJID", "estimate"], own.estimates.Sigma[0][0, 1]
                               / own.estimates.Sigma[0][0, 0])  # fmt: skip
    np.testing.assert_allclose(frame["fit", "Criterion", ""], own.criterion)
    p = own.test("ARMCD[T.TRT] = 0", ddf="kenward-roger")["p_value"].iloc[0]
    np.testing.assert_allclose(frame["fixed", "ARMCD[T.TRT]", "p_value"], p)
    with pytest.raises(ValueError, match="ratios"):
        mj.table(own, exponentiate=True)


def test_kenward_roger_of_an_ml_fit_says_that_it_refits():
    fit = fev_fit(reml=False)
    with pytest.warns(mj.InferenceWarning, match="refitted by REML"):
        found = fit.test("ARMCD[T.TRT] = 0", ddf="kenward-roger")
    np.testing.assert_allclose(found, fev_fit().test("ARMCD[T.TRT] = 0", ddf="kenward-roger"), rtol=1e-6)
    with pytest.raises(ValueError, match="REML"):
        fit.refit_many(fit.simulate(0, 2)).test("ARMCD[T.TRT] = 0", ddf="kenward-roger")


# --- what is refused --------------------------------------------------------------------------------------------------


def doubled():
    data = fev().dropna()
    return pd.concat([data, data.iloc[[10]]], ignore_index=True)


def moved_arm():
    data = fev().dropna()
    data.loc[data.index[1], "ARMCD"] = "PBO" if data["ARMCD"].iloc[1] == "TRT" else "TRT"
    return data


def without_pair():
    data = fev()
    return data[~data["USUBJID"].isin(data.loc[(data["AVISIT"] == "VIS4") & data["FEV1"].notna(), "USUBJID"])
                | data["AVISIT"].isin(["VIS2", "VIS3", "VIS4"])]  # fmt: skip


@pytest.mark.parametrize(
    ("formula", "data", "message"),
    [
        ("FEV1 ~ ARMCD + us(AVISIT | USUBJID)", doubled, r"USUBJID 'PT\d+' has 2 rows at AVISIT 'VIS\d'"),
        ("FEV1 ~ ARMCD + us(AVISIT | ARMCD / USUBJID)", moved_arm, r"'PT1' has rows in several levels of 'ARMCD'"),
        ("FEV1 ~ ARMCD + us(AVISIT | USUBJID)", without_pair, "nobody has rows at both AVISIT 'VIS1' and 'VIS4'"),
        ("FEV1 ~ ARMCD + us(AVISIT | USUBJID)", lambda: fev().head(400).assign(AVISIT="x"), "one value"),
        ("FEV1 ~ ARMCD + us(AVISIT | USUBJID)", lambda: fev().head(16), "cannot tell any covariance of 4 visits"),
        ("FEV1 ~ ARMCD + cs(AVISIT | USUBJID)", fev, "homogeneous in R's mmrm and in SAS"),
        ("FEV1 ~ ARMCD + toep(AVISIT | USUBJID)", fev, "write homtoep .* or toeph"),
        ("FEV1 ~ ARMCD + (AVISIT | USUBJID)", fev, "is a random effect"),
        ("FEV1 ~ ARMCD", fev, "does not say which rows belong together"),
        ("FEV1 ~ ARMCD + us(AVISIT | USUBJID) + ar1(AVISIT | USUBJID)", fev, "several terms"),
        ("FEV1 ~ ARMCD + us(AVISIT + RACE | USUBJID)", fev, "the column of the visits alone"),
        ("FEV1 ~ ARMCD + spexp(AVISIT | USUBJID)", fev, "no covariance structure 'spexp'"),
        ("FEV1 ~ ARMCD + us(visit | USUBJID)", fev, "'visit'"),
    ],
)
def test_bad_input_is_named(formula, data, message):
    with pytest.raises((mj.FormulaError, mj.DataError), match=message):
        mj.mmrm(formula, data())


def test_options_that_are_none():
    with pytest.raises(ValueError, match="ddf"):
        mj.mmrm(FEV.format("us"), fev(), ddf="residual")
    fit = fev_fit()
    with pytest.raises(mj.DataError, match="not among the categories"):
        fit.predict(fev().head(1).assign(AVISIT="VIS9"), conditional=True)
    alone = mj.mmrm("FEV1 ~ ARMCD + us(AVISIT | USUBJID)", fev())
    with pytest.raises(mj.DataError, match="'VIS9', which is no visit of the fit"):
        alone.predict(fev().head(1).assign(AVISIT="VIS9"), conditional=True)
    lmm = mj.lmm("Reaction ~ Days + (1 | Subject)", mj.datasets.load("sleepstudy"))
    forms = [lmm.test("Days = 0", ddf=ddf) for ddf in ("kenward-roger-linear", "kenward-roger")]
    np.testing.assert_array_equal(*forms)


@pytest.mark.filterwarnings("default::mixjax.DataWarning")
def test_visits_that_nobody_has_are_named():
    data = fev().dropna()
    with pytest.warns(mj.DataWarning, match="nobody has a row at VIS2 of 'AVISIT'"):
        fit = mj.mmrm("FEV1 ~ ARMCD + us(AVISIT | USUBJID)", data[data["AVISIT"] != "VIS2"])
    assert list(fit.residual_sd.index) == ["VIS1", "VIS3", "VIS4"]
    with pytest.warns(mj.DataWarning, match="taken as neighbours"):
        mj.mmrm("FEV1 ~ ARMCD + ar1(AVISIT | USUBJID)", data[data["AVISIT"] != "VIS2"])


@pytest.mark.parametrize("weights", [None, "WEIGHT"])
def test_pure_likelihood_has_its_maximum_there(x64, weights):
    """Of NumPy, of JAX and differentiated: the ML fit's deviance, and slopes of zero at its estimates."""
    import jax

    fit = mj.mmrm("FEV1 ~ ARMCD + us(AVISIT | ARMCD / USUBJID)", fev(), reml=False, weights=weights)
    est, design = fit.estimates, fit.design
    Sigma = np.stack(est.Sigma)
    np.testing.assert_allclose(mj.repeated_loglik(est.beta, Sigma, design), fit.loglik, rtol=1e-12)
    L = np.linalg.cholesky(Sigma)

    def of(beta, L):
        return mj.repeated_loglik(beta, L @ L.swapaxes(1, 2), design)

    value, slopes = jax.jit(jax.value_and_grad(of, argnums=(0, 1)))(est.beta, L)
    np.testing.assert_allclose(value, fit.loglik, rtol=1e-12)
    # A scaled gradient of 1e-6 and Newton's last step leave less than 1e-6 of a standard error.
    assert np.abs(slopes[0]).max() < 1e-5
    assert np.abs(np.tril(slopes[1])).max() < 1e-5
    alone = mj.mmrm("FEV1 ~ ARMCD + us(AVISIT | USUBJID)", fev(), reml=False)
    np.testing.assert_allclose(
        jax.jit(mj.repeated_loglik)(alone.estimates.beta, alone.estimates.Sigma[0], alone.design),
        alone.loglik,
        rtol=1e-12,
    )
    single = mj.repeated_loglik(
        np.float32(est.beta),
        Sigma.astype(np.float32),
        jax.tree.map(lambda a: np.float32(a) if a.dtype.kind == "f" else a, design),
    )
    np.testing.assert_allclose(single, fit.loglik, rtol=1e-5)


def test_array_form_is_the_face():
    fit = fev_fit("ar1h")
    est = mj.repeated_estimate(fit.design)
    np.testing.assert_allclose(est.beta, fit.fixef, rtol=1e-12)
    rows = visit_rows(fit.design)
    np.testing.assert_allclose(fit_repeated(rows, True, start=est.Sigma).criterion, fit.criterion, rtol=1e-12)
    many = fit_repeated_many(rows, np.stack([fit.design.y] * 3), True)
    np.testing.assert_allclose(many.criterion, fit.criterion, rtol=1e-12)
