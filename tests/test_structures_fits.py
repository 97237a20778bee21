"""Fits with structures of correlated effects: against R, against dense likelihoods, at bounds, and in all that follows.

Fits are NumPy's; one program is compiled, for one structure (the last tests).
"""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.optimize
from dense import criterion as dense_criterion
from refits import fit_at_once

import mixjax as mj
from mixjax import covariance as cov
from mixjax.engine.curvature import value_gradient_hessian
from mixjax.engine.engine import Engine
from mixjax.engine.moments import moments_of
from mixjax.inference.random.nesting import place_of
from mixjax.optimise.newton import by_differentiation

HERE = Path(__file__).parent
ORACLE = {
    "ar1": "ar1", "cs": "cs", "hetar1": "hetar1", "toep": "toep", "homtoep": "homtoep", "adh": "ante",
    "homdiag": "homdiag", "homcs": "homcs",
}  # fmt: skip
NEW = [name for name in ORACLE if name != "homcs"]
Q = 3


@cache
def visits():
    """30 subjects, 6 visits, two rows at most visits; sds grow, correlations fall with distance."""
    data = pd.read_csv(HERE / "data" / "visits.csv")
    return data.assign(
        t=data["visit"].str[1:].astype(int),
        count=np.round(np.exp((data["y"] - 12.0) / 2.5 + 0.8)),
    )


@cache
def three():
    return visits()[visits()["visit"].isin(["v1", "v2", "v3"])].reset_index(drop=True)


@cache
def fit_of(name, reml=True):
    return mj.lmm(f"y ~ t + {name}(0 + visit | subject)", three(), reml=reml)


@pytest.mark.parametrize("method", ["REML", "ML"])
@pytest.mark.parametrize("name", list(ORACLE))
def test_fits_of_r(name, method):
    """Dense likelihoods in R, polished, which agree with glmmTMB's fits where that has the structure."""
    oracle = json.loads((HERE / "oracle" / f"structure_g_{ORACLE[name]}.json").read_text())
    wanted = oracle["fits"][method]
    fit = mj.lmm(f"y ~ arm * t + {name}(0 + visit | subject)", visits(), reml=method == "REML")
    parameters = wanted["parameters"]
    assert fit.converged
    assert fit.criterion == pytest.approx(wanted["criterion"], abs=1e-9)
    assert fit.npar == wanted["npar"]
    np.testing.assert_allclose(fit.Sigma["subject"], parameters["Sigma"], rtol=1e-7, atol=1e-8)
    assert fit.sigma == pytest.approx(parameters["sigma"], rel=1e-8)
    np.testing.assert_allclose(fit.fixef, list(wanted["fixef"].values()), rtol=1e-7, atol=1e-8)
    np.testing.assert_allclose(fit.vcov, wanted["vcov_fixef"]["values"], rtol=1e-7, atol=1e-9)


def natural_covariance(name, u):
    """``(q, q)`` from logarithms of standard deviations and Fisher's z of correlations as the textbook has them."""
    n = 1 if name in ("ar1", "homtoep", "homdiag") else Q
    sd, rho = np.exp(u[:n]) * np.ones(Q), np.tanh(u[n:])
    lag = abs(np.arange(Q)[:, None] - np.arange(Q))
    if name == "homdiag":
        R = np.eye(Q)
    elif name == "cs":
        R = np.where(lag == 0, 1.0, rho[0])
    elif "ar1" in name:
        R = rho[0] ** lag
    elif "toep" in name:
        R = np.array([1.0, *rho])[lag]
    else:
        R = np.array([[1, rho[0], rho[0] * rho[1]], [rho[0], 1, rho[1]], [rho[0] * rho[1], rho[1], 1]])
    return sd[:, None] * R * sd


@pytest.mark.parametrize("name", NEW)
def test_an_independent_search_over_a_dense_likelihood(name):
    fit = fit_of(name)
    design = fit.record.design

    def deviance(u):
        D = natural_covariance(name, u)
        if np.linalg.eigvalsh(D)[0] <= 0:
            return 1e6
        return dense_criterion(design, [np.linalg.cholesky(D)], True)

    table = fit.variance_parameters()["estimate"]
    is_sd = [str(parameter).startswith("sd") for parameter in table.index[:-1]]
    own = np.where(is_sd, np.log(table[:-1] / fit.sigma), np.arctanh(table[:-1] * ~np.array(is_sd)))
    assert deviance(own) == pytest.approx(fit.criterion, rel=1e-12)
    start = np.where(is_sd, 0.0, 0.3)
    end = scipy.optimize.minimize(deviance, start, jac="3-point", method="BFGS", options={"gtol": 1e-6})
    assert fit.criterion == pytest.approx(end.fun, abs=1e-8)
    np.testing.assert_allclose(own, end.x, atol=1e-5)


def test_standard_errors_by_differences():
    """Of natural parameters and sigma, from the Hessian of the deviance with sigma free."""
    for name in ("ar1", "toep"):
        fit = fit_of(name)
        found = fit.record.covariance_of_all()
        design, k = fit.record.design, fit.npar - 2
        is_sd = np.array([parameter.startswith("sd") for parameter in found.names[: k - 1]])

        def deviance(p, name=name, design=design, is_sd=is_sd):
            u = np.where(is_sd, np.log(np.maximum(p[:-1], 1e-300)), np.arctanh(np.where(is_sd, 0.0, p[:-1])))
            term = design.terms[0]
            V = np.where(term.group[:, None] == term.group, term.Z @ natural_covariance(name, u) @ term.Z.T, 0.0)
            V += p[-1] ** 2 * np.eye(len(V))
            VX = np.linalg.solve(V, design.X)
            XVX = design.X.T @ VX
            r = design.y - design.X @ np.linalg.solve(XVX, VX.T @ design.y)
            return np.linalg.slogdet(V)[1] + np.linalg.slogdet(XVX)[1] + r @ np.linalg.solve(V, r)

        at = found.estimate[:k]
        H, h = np.empty((k, k)), 1e-3 * np.eye(k)
        for i in range(k):
            for j in range(i + 1):
                corners = [a * b * deviance(at + a * h[i] + b * h[j]) for a in (1, -1) for b in (1, -1)]
                H[i, j] = H[j, i] = sum(corners) / 4e-6
        wanted = 2 * np.linalg.inv(H)
        np.testing.assert_allclose(found.covariance[:k, :k], wanted, rtol=1e-3, atol=1e-4 * abs(wanted).max())


# --- bounds


def design_of(name, D, q=4, seed=0, m=25, repeats=3):
    """Effects of relative covariance D, three rows at every one of them."""
    rng = np.random.default_rng(seed)
    group, t = np.repeat(np.arange(m), q * repeats), np.tile(np.arange(q), repeats * m)
    values, vectors = np.linalg.eigh(D)
    b = rng.normal(size=(m, q)) @ (vectors * np.sqrt(np.maximum(values, 0.0))).T
    y = 3.0 + b[group, t] + rng.normal(size=len(t))
    term = mj.RandomTerm(Z=np.eye(q)[t], group=group, n_groups=m, structure=name)
    return mj.Design(y=y, X=np.column_stack([np.ones(len(t)), t == 1]).astype(float), terms=(term,))


LAG = abs(np.arange(4)[:, None] - np.arange(4))
SCALED = np.array([0.7, 0.7, 0.0, 0.6])
ENDS = {  # structure, covariance, seed: data that end on the bound, and what is then seen of Sigma
    "ar1 rho = 1": ("ar1", 0.3 * np.ones((4, 4)), 1, lambda R: R - 1.0),
    "ar1 rho = -1": ("ar1", 0.3 * (-1.0) ** LAG, 2, lambda R: R - (-1.0) ** LAG),
    "hetar1 rho = 1": ("hetar1", 0.3 * np.ones((4, 4)), 1, lambda R: R - 1.0),
    "cs rho = 1": ("cs", 0.3 * np.ones((4, 4)), 0, lambda R: R - 1.0),
    "cs rho = -1/3": ("cs", 0.5 * (np.eye(4) - 0.25), 0, lambda R: R - np.where(LAG == 0, 1.0, -1.0 / 3.0)),
    "homtoep": ("homtoep", 0.3 * np.ones((4, 4)), 0, None),
    "toep": ("toep", 0.3 * np.ones((4, 4)), 1, None),
    "adh": ("adh", 0.3 * np.ones((4, 4)), 0, None),
    "hetar1 sd = 0": ("hetar1", np.outer(SCALED, SCALED) * 0.5**LAG, 0, lambda S: S[2]),
    "cs sd = 0": ("cs", np.outer(SCALED, SCALED) * 0.5**LAG, 0, lambda S: S[2]),
    "ar1 sd = 0": ("ar1", np.zeros((4, 4)), 1, lambda S: S),
    "homdiag sd = 0": ("homdiag", np.zeros((4, 4)), 1, lambda S: S),
}


@pytest.mark.parametrize("case", list(ENDS))
def test_bounds_are_reached_exactly(case):
    """No search from two starts finds anything lower, and the estimate is on the bound itself."""
    name, D, seed, rest = ENDS[case]
    design = design_of(name, D, seed=seed)
    est = fit_at_once(mj.cross_products(design), None, True)
    assert bool(est.converged)
    assert bool(est.singular)
    s = cov.structure_of(name, 4)

    def deviance(x):
        return dense_criterion(design, [np.asarray(s.factor(x))], True)

    for start in (np.linalg.cholesky(D + 0.1 * np.eye(4)), 0.8 * np.eye(4)):
        end = scipy.optimize.minimize(deviance, s.near(start), method="BFGS", options={"gtol": 1e-5, "maxiter": 60})
        assert float(est.criterion) <= end.fun + 1e-8
    S = np.asarray(est.Sigma[0])
    assert np.linalg.matrix_rank(S, tol=1e-10) < 4
    if rest is not None and "sd" in case:
        np.testing.assert_array_equal(rest(S), 0.0)
    elif rest is not None:
        sd = np.sqrt(np.diagonal(S))
        np.testing.assert_allclose(rest(S / np.outer(sd, sd)), 0.0, atol=1e-13)


def test_parameters_at_a_bound_have_no_error_and_others_have():
    design = design_of("hetar1", np.outer(SCALED, SCALED) * 0.5**LAG)
    f = np.array(list("abcd"))[np.argmax(design.terms[0].Z, 1)]
    data = pd.DataFrame({"y": design.y, "b": (f == "b") * 1.0, "f": f, "g": design.terms[0].group})
    fit = mj.lmm("y ~ b + hetar1(0 + f | g)", data)
    table = fit.variance_parameters()
    assert table.loc["sd_f[c]|g", "estimate"] == 0
    assert np.isnan(table.loc["sd_f[c]|g", "std_error"])
    others = table.drop("sd_f[c]|g")
    assert np.isfinite(others.to_numpy()).all()
    # The same without the effect that has no variance: but for the distance of its neighbours.
    assert -1 < table.loc["cor_lag1|g", "estimate"] < 1
    np.testing.assert_allclose(fit.refit_many(data["y"].to_numpy()[None]).sdcor.iloc[0], table["estimate"], atol=1e-6)


# --- many fits, and what a fit is asked


@pytest.mark.parametrize("name", NEW)
def test_many_fits_are_those_one_by_one(name):
    fit = fit_of(name)
    rng = np.random.default_rng(1)
    Y = np.concatenate([fit.simulate(2, 1), rng.normal(size=(2, fit.nobs)), fit.record.design.y[None]])
    many = fit.refit_many(Y)
    for i, y in enumerate(Y):
        one = fit.refit(y)
        assert many.criterion[i] == pytest.approx(one.criterion, abs=1e-8)
        np.testing.assert_allclose(many.sigma[i], one.sigma, rtol=1e-6)
    # Chunks, other names of groups and another order of rows are the same model.
    turned = three().assign(subject=three()["subject"].map(lambda s: f"x{99 - int(s[1:])}"))
    turned = turned.sample(frac=1.0, random_state=1)
    formula = f"y ~ t + {name}(0 + visit | subject)"
    assert mj.lmm(formula, turned).criterion == pytest.approx(fit.criterion, rel=1e-12)
    assert mj.lmm(formula, [three()[:80], three()[80:]]).criterion == pytest.approx(fit.criterion, rel=1e-11)
    assert mj.lmm(formula, three(), start=fit.theta).criterion == pytest.approx(fit.criterion, rel=1e-12)


def test_heterogeneous_structures_do_not_depend_on_units():
    data = three().assign(a=np.sin(np.arange(162)), b=np.cos(np.arange(162) ** 2))
    fit = mj.lmm("y ~ t + cs(1 + a + b | subject)", data)
    scaled = mj.lmm("y ~ t + cs(1 + a + b | subject)", data.assign(a=1e4 * data["a"], b=1e-4 * data["b"]))
    assert scaled.criterion == pytest.approx(fit.criterion, rel=1e-12)
    factors = np.array([1.0, 1e-4, 1e4, 1.0, 1.0])
    np.testing.assert_allclose(
        scaled.variance_parameters()["estimate"], factors * fit.variance_parameters()["estimate"], rtol=1e-5
    )


@pytest.mark.parametrize("name", ["ar1", "cs", "toep", "adh"])
def test_what_follows_from_a_fit(name):
    fit = fit_of(name)
    names = list(fit.variance_parameters().index)
    assert len(names) == fit.npar - 2
    assert "Groups" in str(fit.summary())
    assert np.isfinite(fit.test("t = 0")["df"]).all()
    boot = fit.bootstrap(10, 1)
    assert list(boot.replicates)[: len(names)] == names
    wald = fit.confint(method="wald")
    assert list(wald.index)[: len(names)] == names
    assert (wald["lower"] < wald["upper"]).all()
    cor = [row for row in names if row.startswith("cor")]
    assert wald.loc[cor].abs().to_numpy().max() <= 1.0
    # Another value of one parameter is another covariance of the same structure.
    wanted = {cor[0]: 0.25, "sigma": 2.0}
    scenario = mj.scenario_of(fit).with_variances(wanted)
    expected = {**fit.variance_parameters()["estimate"], **wanted}
    for parameter, value in expected.items():
        assert scenario.truth[parameter] == pytest.approx(value, rel=1e-9)
    s = cov.structure_of(name, Q)
    F = s.factor(s.near(np.linalg.cholesky(scenario.Sigma[0])))
    np.testing.assert_allclose(F @ F.T, scenario.Sigma[0], rtol=1e-9)


def test_predictions_and_modes_are_those_of_the_covariance():
    """BLUPs by the dense formula ``D Z' V^{-1} (y - X beta)``."""
    fit = fit_of("ar1")
    d, S = fit.record.design, np.asarray(fit.Sigma["subject"])
    term = d.terms[0]
    V = np.where(term.group[:, None] == term.group, term.Z @ S @ term.Z.T, 0.0) + fit.sigma**2 * np.eye(len(d.y))
    r = np.linalg.solve(V, d.y - d.X @ fit.fixef.to_numpy())
    wanted = np.stack([S @ term.Z[term.group == g].T @ r[term.group == g] for g in range(term.n_groups)])
    np.testing.assert_allclose(fit.ranef()["subject"], wanted, atol=1e-9)
    np.testing.assert_allclose(fit.predict(three()), d.X @ fit.fixef + (term.Z * wanted[term.group]).sum(1), atol=1e-8)


def test_satterthwaite_by_differences():
    """``2 v^2 / (g' W g)``, with v's slopes and W by the natural parameters of a refitted model."""
    fit = fit_of("hetar1")
    found = fit.test("t = 0")["df"].iloc[0]
    us = mj.lmm("y ~ t + (0 + visit | subject)", three()).test("t = 0")["df"].iloc[0]
    assert 5 < found < 150
    assert found != pytest.approx(us)
    # Two visits: hetar1 is the unstructured covariance, by other coordinates.
    two = three()[three()["visit"] != "v3"]
    dfs = [
        mj.lmm(f"y ~ t + {name}(0 + visit | subject)", two).test("t = 0")["df"].iloc[0]
        for name in ("us", "hetar1", "cs", "toep", "adh")
    ]
    np.testing.assert_allclose(dfs, dfs[0], rtol=1e-6)


def test_kenward_roger_of_linear_structures():
    two = three()[three()["visit"] != "v3"]
    tables = [
        mj.lmm(f"y ~ t + {name}(0 + visit | subject)", two).test("t = 0", ddf="kenward-roger")
        for name in ("homcs", "homtoep")
    ]
    np.testing.assert_allclose(tables[0].iloc[0, :3].astype(float), tables[1].iloc[0, :3].astype(float), rtol=1e-6)
    # One variance of all cells of subject and visit: a grouping factor of its own.
    data = three().assign(cell=three()["subject"] + three()["visit"])
    a = mj.lmm("y ~ t + homdiag(0 + visit | subject)", data)
    b = mj.lmm("y ~ t + (1 | cell)", data)
    assert a.criterion == pytest.approx(b.criterion, abs=1e-9)
    tests = [each.test("t = 0", ddf="kenward-roger").iloc[0, :3].astype(float) for each in (a, b)]
    np.testing.assert_allclose(*tests, rtol=1e-6)


WITHIN = {  # smaller -> larger models in which it lies, with the number of bounds it lies on there
    "diag": {"us": 0, "cs": 0, "hetar1": 0, "toep": 0, "adh": 0},
    "homdiag": {"us": 0, "diag": 0, "homcs": 0, "cs": 0, "ar1": 0, "hetar1": 0, "homtoep": 0, "toep": 0, "adh": 0},
    "homcs": {"us": 0, "cs": 0, "homtoep": 0, "toep": 0},
    "cs": {"us": 0, "toep": 0},
    "ar1": {"us": 0, "hetar1": 0, "homtoep": 0, "toep": 0, "adh": 0},
    "hetar1": {"us": 0, "toep": 0, "adh": 0},
    "homtoep": {"us": 0, "toep": 0},
    "toep": {"us": 0},
    "adh": {"us": 0},
}


def test_which_structure_is_a_special_case_of_which():
    names = ["us", *WITHIN]
    for small in names:
        for large in names:
            place = place_of(fit_of(small).record, fit_of(large).record)
            wanted = 0 if small == large else WITHIN.get(small, {}).get(large)
            assert (place.zeros if place.nested else None) == wanted, (small, large)
    intercept = mj.lmm("y ~ t + (1 | subject)", three())
    for large in ("homcs", "cs", "ar1", "hetar1", "homtoep", "toep"):  # the correlation is 1
        assert place_of(intercept.record, fit_of(large).record).zeros == 1
    table = mj.compare(fit_of("homdiag"), fit_of("ar1"), fit_of("us")).to_frame()
    assert list(table["npar"]) == [4, 5, 9]
    assert "p_mixture" not in table
    assert mj.compare(intercept, fit_of("ar1")).to_frame()["p_mixture"].notna().any()


def test_special_cases_where_every_effect_has_one_row():
    """The diagonal may then be noise or effects: what a structure says of the others decides."""
    one = visits()[(visits()["rep"] == 1)].reset_index(drop=True)
    names = ("ar1", "hetar1", "adh")
    fits = {name: mj.lmm(f"y ~ t + {name}(0 + visit | subject)", one, reml=False).record for name in names}
    fits |= {f: mj.lmm(f"y ~ t + ({f} | subject)", one, reml=False).record for f in ("1", "t")}
    found = {(a, b): place_of(fits[a], fits[b]) for a in fits for b in names if a != b}
    nested = {pair: place.zeros for pair, place in found.items() if place.nested}
    assert nested == {
        ("ar1", "hetar1"): 0, ("ar1", "adh"): 0, ("hetar1", "adh"): 0,
        ("1", "ar1"): 1, ("1", "hetar1"): 1, ("1", "adh"): 5,
    }  # fmt: skip


def test_a_variance_put_to_zero_takes_its_correlations_along():
    notes = fit_of("ar1").ranova().attrs["notes"]
    assert any("not known" in note for note in notes)


# --- generalised models


def test_counts_of_glmmtmb():
    """glmmTMB 1.1.5: ``glmmTMB(count ~ t + ar1(0 + visit | subject), V, family = poisson)``, and with ``cs``."""
    wanted = {
        "ar1": (1275.5637998655, [0.3589352941, 0.2150399210], 0.495451429, 0.853358403, 4),
        "cs": (1267.1081835362, [0.3975950461, 0.1991315621], 0.220486190, 0.853533023, 9),
    }
    for name, (criterion, beta, sd, cor, npar) in wanted.items():
        fit = mj.glmm(f"count ~ t + {name}(0 + visit | subject)", visits(), family="poisson")
        assert fit.criterion == pytest.approx(criterion, abs=1e-7)
        np.testing.assert_allclose(fit.fixef, beta, atol=2e-6)
        table = fit.variance_parameters()["estimate"]
        assert table.iloc[0] == pytest.approx(sd, abs=5e-6)
        assert table.iloc[-1] == pytest.approx(cor, abs=5e-6)
        assert fit.npar == npar


def test_of_two_effects_all_generalised_fits_are_the_unstructured_one():
    """By Laplace's approximation, by quadrature, and what is asked of them."""
    two = visits()[visits()["visit"].isin(["v3", "v6"])]
    formula = "count ~ t + {}(0 + visit | subject)"
    us = {nagq: mj.glmm(formula.format("us"), two, family="poisson", nagq=nagq) for nagq in (1, 5)}
    checks = [us[1].laplace_check()]
    for name in ("hetar1", "cs"):
        for nagq, wanted in us.items():
            fit = mj.glmm(formula.format(name), two, family="poisson", nagq=nagq)
            assert fit.criterion == pytest.approx(wanted.criterion, abs=1e-8)
            own, other = fit.variance_parameters(), wanted.variance_parameters().iloc[[0, 2, 1]]
            np.testing.assert_allclose(own.to_numpy(), other.to_numpy(), rtol=2e-5)
            if nagq == 1:
                checks.append(fit.laplace_check())
    assert len({str(check).splitlines()[0] for check in checks}) == 1
    m = mj.glmm("count ~ t + ar1(0 + visit | subject)", three(), family="poisson")
    Y = np.random.default_rng(0).poisson(m.fitted, size=(2, m.nobs)).astype(float)
    many = mj.glmm_estimate_many(mj.rows(m.record.design, m.record.family, Y), engine="numpy")
    np.testing.assert_allclose(many.criterion, [m.refit(y).criterion for y in Y], atol=1e-7)


# --- by XLA


@pytest.fixture(scope="module")
def compiled_design():
    rng = np.random.default_rng(4)
    return design_of("hetar1", 0.9 * 0.6 ** abs(np.arange(Q)[:, None] - np.arange(Q)), q=Q, m=12, seed=1), rng


@pytest.mark.usefixtures("x64")
def test_closed_form_derivatives_are_those_of_the_elimination(compiled_design):
    """Inside, and where an angle is at its bound and an sd at zero: the elimination is differentiated there too."""
    stats = mj.cross_products(compiled_design[0])
    s = stats.layout.structures[0]
    differentiated = jax.jit(
        lambda x, stats: by_differentiation(lambda x: Engine(stats, True).profiled(x).criterion)(x)
    )
    points = [np.random.default_rng(1).normal(size=s.k), [0.8, 0.7, 0.9, np.pi / 2], [0.8, 0.0, 0.9, 0.4]]
    for x in np.array(points, float)[..., None]:
        wanted = differentiated(jnp.asarray(x), stats)
        for found, own in zip(value_gradient_hessian(x, moments_of(stats), True), wanted, strict=True):
            np.testing.assert_allclose(found, own, rtol=1e-11, atol=1e-11 * abs(np.asarray(own)).max())


@pytest.mark.usefixtures("x64")
def test_unconstrained_parameters(compiled_design):
    """Logarithms of standard deviations and Fisher's z; the likelihood there, its slopes, and the way back."""
    design, _ = compiled_design
    stats = mj.cross_products(design)
    est = fit_at_once(stats, None, False)
    p = mj.to_params(est, design)
    S = np.asarray(est.Sigma[0])
    sd = np.sqrt(np.diagonal(S))
    np.testing.assert_allclose(p.chol[0], [*np.log(sd), np.arctanh(S[1, 0] / sd[0] / sd[1])], rtol=1e-9)
    np.testing.assert_allclose(-2 * mj.marginal_loglik(p, stats), est.criterion, rtol=1e-12)
    for leaf in jax.tree.leaves(jax.grad(mj.marginal_loglik)(p, stats)):
        np.testing.assert_allclose(leaf, 0.0, atol=1e-5)
    np.testing.assert_allclose(mj.from_params(p, stats).Sigma[0], S, rtol=1e-9)
    # A correlation of 1 lies at infinity.
    end = p._replace(chol=(p.chol[0].at[-1].set(jnp.inf),))
    S = np.asarray(mj.from_params(end, stats).Sigma[0])
    np.testing.assert_allclose(S / np.sqrt(np.outer(np.diagonal(S), np.diagonal(S))), 1.0, atol=1e-14)
    assert np.isfinite(jax.grad(mj.marginal_loglik)(end, stats).chol[0]).all()


@pytest.mark.usefixtures("x64")
def test_lanes_and_derivatives_through_the_fit(compiled_design):
    """Batches by XLA, singular fits among them, equal those by NumPy; and est moves with the data."""
    design, rng = compiled_design
    Y = np.concatenate([design.y + rng.normal(size=(4, len(design.y))), rng.normal(size=(4, len(design.y)))])
    data = mj.cross_products(design, Y)
    lanes, at_once = (mj.estimate_many(data, engine=engine) for engine in ("jax", "numpy"))
    np.testing.assert_allclose(lanes.criterion, at_once.criterion, atol=1e-8)
    np.testing.assert_array_equal(lanes.singular, at_once.singular)
    assert lanes.singular.any()
    assert not lanes.singular.all()
    direction = rng.normal(size=len(design.y))

    def fun(t):
        return mj.estimate(mj.cross_products(replace(design, y=design.y + t * direction))).theta

    def refitted(t):
        return fit_at_once(mj.cross_products(replace(design, y=design.y + t * direction)), None, True).theta

    _, moved = jax.jit(lambda t: jax.jvp(fun, (t,), (1.0,)))(0.0)
    np.testing.assert_allclose(moved, (refitted(1e-5) - refitted(-1e-5)) / 2e-5, rtol=1e-5, atol=1e-7)
