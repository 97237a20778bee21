"""Reduced rank and factor-analytic covariances: coordinates, fits against R, and all that follows from a fit.

Fits are NumPy's; nothing is compiled but in the tests of other engines.
"""

import json
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from conftest import HERE
from dense import criterion as dense_criterion
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

import mixjax as mj
from mixjax import covariance as cov
from mixjax.covariance import FactorAnalytic, ReducedRank
from mixjax.engine.engine import AtOnce
from mixjax.inference.fixed import kenward_roger as kr
from mixjax.inference.random.nesting import place_of
from mixjax.machine import float64
from mixjax.studies.variances import changed_variances

TERMS = {
    "rr1": "rr(0 + trait | unit, d = 1)",
    "rr2": "rr(0 + trait | unit)",
    "fa1": "fa(0 + trait | unit)",
}
SHAPES = [ReducedRank(2, 1), ReducedRank(4, 2), ReducedRank(3, 3), FactorAnalytic(3, 1), FactorAnalytic(6, 2)]


@cache
def traits():
    return pd.read_csv(HERE / "data" / "traits.csv")


@cache
def fit_of(name, reml=True):
    return mj.lmm(f"y ~ 0 + trait + {TERMS[name]}", traits(), reml=reml)


@cache
def regular():
    """Four traits whose specific variances are far from zero."""
    rng = np.random.default_rng(8)
    unit, trait = np.repeat(np.arange(40), 8), np.tile(np.repeat(np.arange(4), 2), 40)
    L, s = np.array([1.2, -0.8, 0.6, 1.0]), np.array([0.7, 0.6, 0.8, 0.6])
    b = rng.normal(size=40)[:, None] * L + rng.normal(size=(40, 4)) * s
    y = b[unit, trait] + 0.5 * rng.normal(size=len(unit)) + trait
    arm = unit % 3
    return pd.DataFrame({"y": y, "unit": [f"u{u}" for u in unit], "trait": [f"t{t}" for t in trait], "arm": arm * 1.0})


def product(F):
    return np.einsum("ab...,cb...->ac...", F, F)


def trapezoid(p, q, d):
    xp, columns, at = np if isinstance(p, np.ndarray) else jnp, [], 0
    for j in range(d):
        columns.append(xp.concatenate([xp.zeros(j), p[at : at + q - j]]))
        at += q - j
    return xp.stack(columns, axis=1)


# --- coordinates -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("s", SHAPES, ids=str)
@settings(max_examples=15, deadline=None, derandomize=True, database=None)
@given(st.integers(0, 10**6), st.sampled_from([1e-3, 1.0, 1e3]))
def test_any_coordinates_are_a_covariance_of_the_structure(s, seed, size):
    x = size * np.random.default_rng(seed).normal(size=(s.k, 3))
    D = product(s.factor(x))
    for lane in range(3):
        L = trapezoid(x[: s.n_loadings, lane], s.q, s.d)
        psi = x[s.n_loadings :, lane] ** 2 if s.k > s.n_loadings else np.zeros(s.q)
        np.testing.assert_allclose(D[..., lane], L @ L.T + np.diag(psi), rtol=1e-12, atol=1e-12 * size**2)
    back = s.exactly(s.factor(x))
    np.testing.assert_allclose(product(s.factor(back)), D, atol=1e-10 * size**2)
    first = np.array([back[at] for at in s.deviations])
    assert (first >= 0).all()  # signs of columns and roots do not count
    np.testing.assert_allclose(
        product(s.factor(s.exponentials(s.logarithms(back)))), D, atol=1e-9 * size**2, err_msg="unconstrained"
    )
    # A loading is what is left of sums of numbers of the largest one's size.
    np.testing.assert_allclose(
        s.exactly(s.factor(x)[..., 0]), back[:, 0], rtol=1e-12, atol=1e-12 * np.abs(back[:, 0]).max()
    )


@pytest.mark.parametrize("s", SHAPES, ids=str)
def test_derivatives_by_differences(s):
    rng = np.random.default_rng(1)
    x, g = rng.normal(size=(s.k, 3)), rng.normal(size=(s.q * (s.q + 1) // 2, 3))
    upper, h = np.triu_indices(s.q), 1e-5

    def slope_along(fun, i):
        step = h * np.eye(s.k)[i][:, None]
        near, far = (fun(x + n * step) - fun(x - n * step) for n in (1, 2))
        return (8 * near - far) / (12 * h)

    jacobian, curvature, slopes = s.jacobian(x), s.curvature(x, g), s.slopes(x)
    for i in range(s.k):
        np.testing.assert_allclose(
            jacobian[:, i], slope_along(lambda x: product(s.factor(x))[upper], i), rtol=1e-8, atol=1e-8
        )
        np.testing.assert_allclose(
            curvature[i], slope_along(lambda x: np.einsum("pl,pkl->kl", g, s.jacobian(x)), i), rtol=1e-8, atol=1e-7
        )
        np.testing.assert_allclose(slopes[i], slope_along(s.factor, i), rtol=1e-7, atol=1e-7)


def test_heywood_cases_are_ordinary_stationary_points():
    """A specific variance of zero: reached, found again from the covariance, without a slope, not free."""
    s = FactorAnalytic(5, 1)
    x = np.array([1.0, -0.8, 0.6, 0.9, 1.1, 0.5, 0.0, 0.0, 0.4, 0.3])
    back = s.exactly(s.factor(x))
    np.testing.assert_array_equal(back[5:] == 0, x[5:] == 0)
    np.testing.assert_allclose(back, x, atol=1e-10)
    np.testing.assert_array_equal(s.jacobian(x[:, None])[:, [6, 7]], 0.0)
    unchanged, free = s.reduced(x[:, None], np.array([-1]))
    np.testing.assert_array_equal(unchanged[:, 0], x)
    np.testing.assert_array_equal(~free[:, 0], x == 0)
    close = x.copy()
    close[6] = 1e-3
    assert s.sizes(close[:, None])[1, 0] == 1e-3
    np.testing.assert_array_equal(s.reduced(close[:, None], np.array([1]))[0][:, 0], x)


def test_a_dimension_less_is_the_nearest_one():
    for s in (ReducedRank(5, 3), FactorAnalytic(6, 2)):
        x = np.random.default_rng(2).normal(size=(s.k, 2))
        L = s.loadings(x)
        for lost in range(1, s.d + 1):
            at = np.full(2, lost - 1 + s.n_reductions - s.d)
            less, free = s.reduced(x, at)
            for lane in range(2):
                u, v, w = np.linalg.svd(L[..., lane])
                v[s.d - lost :] = 0
                wanted = (u[:, : s.d] * v) @ w
                np.testing.assert_allclose(product(s.loadings(less))[..., lane], wanted @ wanted.T, atol=1e-12)
                assert np.count_nonzero((s.loadings(less)[..., lane] != 0).any(0)) == s.d - lost
            np.testing.assert_array_equal(free[: s.n_loadings], less[: s.n_loadings] != 0)


def test_an_effect_that_loads_on_nothing():
    s = ReducedRank(4, 1)
    x = np.array([0.0, 2.0, -1.0, 0.5])
    np.testing.assert_allclose(s.exactly(s.factor(x)), x, atol=1e-15)


def test_what_is_not_identified_is_refused():
    for q, d in ((2, 1), (4, 2), (6, 3)):
        with pytest.raises(ValueError, match="not identified"):
            FactorAnalytic(q, d)
    for q, d in ((3, 1), (5, 2), (7, 3)):
        assert FactorAnalytic(q, d).k <= q * (q + 1) // 2
    with pytest.raises(ValueError, match="1 to 3"):
        ReducedRank(3, 4)
    with pytest.raises(ValueError, match="not identified"):
        mj.lmm("y ~ 0 + trait + fa(0 + trait | unit, d = 2)", traits())
    data = traits()[traits()["trait"].isin(["t1", "t2"])]
    with pytest.raises(ValueError, match="One dimension needs three effects"):
        mj.lmm("y ~ 0 + trait + fa(0 + trait | unit)", data)


def test_names():
    assert cov.structure_of("rr", 4) == ReducedRank(4, 2)
    assert cov.structure_of("fa", 4) == cov.structure_of("fa(d=1)", 4) == FactorAnalytic(4, 1)
    assert cov.structure_of("rr(d=3)", 4) == ReducedRank(4, 3)
    names = [p.name(["a", "b", "c"], "g") for p in ReducedRank(3, 2).natural]
    assert names == ["loading1_a|g", "loading1_b|g", "loading1_c|g", "loading2_b|g", "loading2_c|g"]
    assert FactorAnalytic(3, 1).natural[-1].name(["a", "b", "c"], "g") == "specific_c|g"
    with pytest.raises(ValueError, match="there is no covariance structure"):
        cov.structure_of("ar1(d=2)", 4)


@pytest.mark.parametrize("written", ["d = 0", "d = 2.5", "k = 2", "d = 2, hom = TRUE", "two"])
def test_options_that_are_none(written):
    with pytest.raises(mj.FormulaError, match="one option, the number of dimensions"):
        mj.lmm(f"y ~ 0 + trait + rr(0 + trait | unit, {written})", traits())


# --- fits ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["REML", "ML"])
@pytest.mark.parametrize("name", ["rr1", "fa1"])
def test_fits_of_r(name, method):
    """glmmTMB's reduced rank, and dense likelihoods in R. R's search for specific variances stops near their bound."""
    wanted = json.loads((HERE / "oracle" / f"structure_g_{name}.json").read_text())["fits"][method]
    fit = fit_of(name, method == "REML")
    exact = name == "rr1"
    assert fit.converged
    assert fit.npar == wanted["npar"]
    assert fit.criterion == pytest.approx(wanted["criterion"], abs=1e-9 if exact else 2e-7)
    assert fit.criterion <= wanted["criterion"] + 1e-9
    assert fit.is_singular is not exact
    parameters, table = wanted["parameters"], fit.variance_parameters()["estimate"]
    np.testing.assert_allclose(table[:4], parameters["loadings"], rtol=1e-8 if exact else 1e-6)
    np.testing.assert_allclose(fit.Sigma["unit"], parameters["Sigma"], atol=1e-8 if exact else 1e-6)
    assert fit.sigma == pytest.approx(parameters["sigma"], rel=1e-8 if exact else 1e-7)
    np.testing.assert_allclose(fit.fixef, list(wanted["fixef"].values()), rtol=1e-8)
    if not exact:
        specific = np.array(parameters["specific_sd"])
        np.testing.assert_allclose(table[4:8], np.where(specific < 1e-3, 0.0, specific), atol=1e-5)
        assert (table[4:8] == 0).sum() == (specific < 1e-3).sum()


@pytest.mark.parametrize("term", ["rr(0 + trait | unit, d = 2)", "fa(0 + trait | unit)"])
def test_an_independent_search_over_a_dense_likelihood(term):
    fit = mj.lmm(f"y ~ trait * arm + {term}", regular())
    structure = fit.record.layout.structures[0]
    assert not fit.is_singular
    design = fit.record.design

    def deviance(p):
        L = trapezoid(p[: structure.n_loadings], 4, structure.d)
        D = L @ L.T + (np.diag(p[structure.n_loadings :] ** 2) if "fa" in term else 0.0)
        return dense_criterion(design, [np.linalg.cholesky(D + 1e-13 * np.eye(4))], True)

    own = fit.variance_parameters()["estimate"].to_numpy()[:-1] / fit.sigma
    assert deviance(own) == pytest.approx(fit.criterion, abs=1e-9)
    end = minimize(deviance, own + 0.05, jac="3-point", method="BFGS", options={"gtol": 1e-5})
    assert fit.criterion == pytest.approx(end.fun, abs=1e-7)


@pytest.mark.parametrize("d", [1, 2])
def test_one_row_at_every_effect_is_probabilistic_principal_components(d):
    """Tipping & Bishop (1999, J. R. Stat. Soc. B 61, eqs. 7-8): sigma^2 is the mean of the eigenvalues left out."""
    one = regular().drop_duplicates(["unit", "trait"])
    fit = mj.lmm(f"y ~ 0 + trait + rr(0 + trait | unit, d = {d})", one, reml=False)
    Y = one.pivot(index="unit", columns="trait", values="y").to_numpy()
    values, vectors = np.linalg.eigh(np.cov(Y.T, bias=True))
    noise = values[: 4 - d].mean()
    kept = vectors[:, 4 - d :]
    assert fit.sigma**2 == pytest.approx(noise, rel=1e-7)
    np.testing.assert_allclose(fit.Sigma["unit"], kept * (values[4 - d :] - noise) @ kept.T, atol=1e-6)
    with pytest.raises(mj.DataError, match="cannot be told"):
        mj.lmm("y ~ 0 + trait + fa(0 + trait | unit)", one)


def test_all_dimensions_are_an_unstructured_covariance():
    fit, us = (mj.lmm(f"y ~ trait + {t}", regular()) for t in ("rr(0 + trait | unit, d = 4)", "(0 + trait | unit)"))
    assert fit.npar == us.npar
    assert fit.criterion == pytest.approx(us.criterion, abs=1e-9)
    np.testing.assert_allclose(fit.test("trait[T.t2] = 0"), us.test("trait[T.t2] = 0"), rtol=1e-6)


@pytest.mark.parametrize("name", list(TERMS))
def test_rows_levels_and_units_do_not_matter(name):
    fit = fit_of(name)
    shuffled = traits().sample(frac=1.0, random_state=3)
    shuffled = shuffled.assign(y=100.0 * shuffled["y"] + 7.0, unit="x" + shuffled["unit"].str[::-1])
    other = mj.lmm(f"y ~ 0 + trait + {TERMS[name]}", shuffled)
    ours, theirs = (f.variance_parameters()["estimate"] for f in (fit, other))
    np.testing.assert_allclose(theirs / 100.0, ours, rtol=1e-5, atol=1e-6)
    assert (theirs == 0).tolist() == (ours == 0).tolist()


def test_standard_errors_by_differences():
    for term in ("rr(0 + trait | unit)", "fa(0 + trait | unit)"):
        fit = mj.lmm(f"y ~ trait + {term}", regular())
        found, design = fit.record.covariance_of_all(), fit.record.design
        k, structure = fit.npar - 4, fit.record.layout.structures[0]
        same = np.asarray(design.terms[0].group[:, None] == design.terms[0].group)
        Z, X, y = design.terms[0].Z, design.X, design.y

        def deviance(p, structure=structure, same=same, Z=Z, X=X, y=y):
            L = trapezoid(p, 4, structure.d)
            r = p[structure.n_loadings : -1]
            D = L @ L.T + (jnp.diag(r**2) if len(r) else 0.0)
            V = same * (Z @ D @ Z.T) + p[-1] ** 2 * jnp.eye(len(y))
            VX = jnp.linalg.solve(V, X)
            r = y - X @ jnp.linalg.solve(X.T @ VX, VX.T @ y)
            return jnp.linalg.slogdet(V)[1] + jnp.linalg.slogdet(X.T @ VX)[1] + r @ jnp.linalg.solve(V, r)

        with float64():
            H = jax.hessian(deviance)(jnp.asarray(found.estimate[:k]))
        np.testing.assert_allclose(found.covariance[:k, :k], 2 * np.linalg.inv(H), rtol=1e-5, atol=1e-8)
        values = [p.value(fit.estimates.Sigma) for p in mj.fitted.names.names_of_variances(fit.labels, (structure,))]
        np.testing.assert_allclose(values, found.estimate[: k - 1], rtol=1e-9)


# --- what follows ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("term", ["rr(0 + trait | unit, d = 1)", "rr(0 + trait | unit)", "fa(0 + trait | unit)"])
def test_kenward_roger_is_that_of_the_definition(term):
    """Kenward & Roger (1997), section 2, with dense matrices; by loadings, specific variances and sigma^2."""
    data = regular()[regular()["unit"].isin([f"u{k}" for k in range(15)])]
    fit = mj.lmm(f"y ~ trait + arm + {term}", data)
    assert not fit.is_singular
    structure, design = fit.record.layout.structures[0], fit.record.design
    same = design.terms[0].group[:, None] == design.terms[0].group
    Z, X = np.asarray(design.terms[0].Z), np.asarray(design.X)
    n = structure.n_loadings

    def V(t):
        D = trapezoid(t, 4, structure.d)
        D = D @ D.T + (np.diag(t[n:-1]) if structure.k > n else 0.0)
        return same * (Z @ D @ Z.T) + t[-1] * np.eye(len(Z))

    t = fit.variance_parameters()["estimate"].to_numpy() ** np.where(np.arange(structure.k + 1) < n, 1, 2)
    W, steps = np.linalg.inv(V(t)), np.eye(len(t))
    first = [0.5 * (V(t + a) - V(t - a)) for a in steps]  # exact of quadratic functions
    second = [[0.25 * (V(t + a + b) - V(t + a - b) - V(t - a + b) + V(t - a - b)) for b in steps] for a in steps]
    C = np.linalg.inv(X.T @ W @ X)
    P = [-X.T @ W @ d @ W @ X for d in first]
    k = len(t)
    Q = [[X.T @ W @ a @ W @ b @ W @ X for b in first] for a in first]
    information = np.array([[
        0.5 * np.trace(W @ first[i] @ W @ first[j]) - np.trace(C @ Q[i][j]) + 0.5 * np.trace(C @ P[i] @ C @ P[j])
        for j in range(k)] for i in range(k)])  # fmt: skip
    of = np.linalg.inv(information)
    U = sum(of[i, j] * (Q[i][j] - P[i] @ C @ P[j]) for i in range(k) for j in range(k))
    bent = sum(0.25 * of[i, j] * (X.T @ W @ second[i][j] @ W @ X) for i in range(k) for j in range(k))
    for linear, wanted in ((False, C + 2 * C @ (U - bent) @ C), (True, C + 2 * C @ U @ C)):
        own = AtOnce(fit.stats, True).run(kr.adjust, fit.estimates.theta, fit.estimates.sigma, linear)
        np.testing.assert_allclose(own.adjusted, wanted, rtol=1e-7, atol=1e-9)


def test_kenward_roger_at_a_bound_is_refused():
    with pytest.raises(ValueError, match="at its bound"):
        fit_of("fa1").test("trait[t1] = 0", ddf="kenward-roger")


CALLS = {
    "summary": lambda f: str(f.summary()),
    "varcorr": lambda f: f.varcorr.to_frame(),
    "tidy": lambda f: f.tidy(),
    "glance": lambda f: f.glance(),
    "anova": lambda f: f.anova(),
    "drop1": lambda f: f.drop1(),
    "emmeans": lambda f: f.emmeans("trait"),
    "confint": lambda f: f.confint(method="wald"),
    "bootstrap": lambda f: f.confint(method="bootstrap", n=20),
    "predict": lambda f: f.predict(traits().head(5), interval="prediction"),
    "new": lambda f: f.predict(traits().head(5).assign(unit="new"), allow_new_levels=True, interval="prediction"),
    "ranef": lambda f: f.ranef_frame(),
    "pca": lambda f: f.pca(),
    "r2": lambda f: f.r2(),
    "icc": lambda f: f.icc(),
    "variance_shares": lambda f: f.variance_shares(),
    "influence": lambda f: f.influence("unit").cooks,
    "leverage": lambda f: f.leverage(),
    "robust": lambda f: f.robust(),
    "sensitivity": lambda f: f.sensitivity(),
    "shrinkage": lambda f: f.shrinkage(),
    "augment": lambda f: f.augment(),
    "quantile_residuals": lambda f: f.quantile_residuals(n=20),
    "simulate": lambda f: f.simulate(0, 3),
    "table": lambda f: str(mj.table({"a": f})),
}


@pytest.mark.filterwarnings("ignore::mixjax.InferenceWarning")
@pytest.mark.parametrize("name", ["rr1", "fa1"])
@pytest.mark.parametrize("call", list(CALLS))
def test_every_method_answers(call, name):
    found = CALLS[call](fit_of(name))
    numbers = found.select_dtypes("number").to_numpy() if isinstance(found, pd.DataFrame) else []
    assert found is not None
    if name == "rr1":
        assert not np.isnan(numbers).any() or call in ("tidy", "augment", "sensitivity")


def test_profiles_are_refused_by_name():
    with pytest.raises(ValueError, match=r"covariance structure 'rr'.*'wald'"):
        fit_of("rr1").confint()


def test_many_fits_equal_single_ones():
    fit = mj.lmm("y ~ trait + arm + fa(0 + trait | unit)", regular())
    for own in (fit, fit_of("rr2"), fit_of("rr1"), fit_of("fa1")):
        Y = own.simulate(3, 20)
        batch = own.refit_many(Y)
        assert batch.converged.all()
        for y, criterion in zip(np.asarray(Y)[:4], batch.criterion[:4], strict=True):
            assert own.refit(y).criterion == pytest.approx(criterion, abs=1e-7)


def test_fewer_dimensions():
    table = fit_of("rr2").ranova()
    one, two = fit_of("rr1"), fit_of("rr2")
    row = table.loc["d = 2 in rr(0 + trait | unit, d = 2)"]
    assert row["lrt"] == pytest.approx(one.criterion - two.criterion, abs=1e-8)
    assert row["df"] == two.npar - one.npar == 3
    assert np.isnan(row["p_mixture"])  # three directions in which a dimension may point
    assert two.without("d = 2 in rr(0 + trait | unit, d = 2)").npar == one.npar
    whole = one.ranova()
    assert whole.index[1] == "rr(0 + trait | unit, d = 1)"
    assert whole["df"].iloc[1] == 4


def test_what_is_within_what():
    fits = {name: fit_of(name, False).record for name in TERMS}
    fits["us"] = mj.lmm("y ~ 0 + trait + (0 + trait | unit)", traits(), reml=False).record
    fits["diag"] = mj.lmm("y ~ 0 + trait + diag(0 + trait | unit)", traits(), reml=False).record
    within = {(a, b) for a in fits for b in fits if place_of(fits[a], fits[b]).nested and a != b}
    assert within == {
        ("rr1", "rr2"), ("rr1", "fa1"), ("rr1", "us"), ("rr2", "us"), ("fa1", "us"), ("diag", "fa1"), ("diag", "us"),
    }  # fmt: skip
    assert place_of(fits["rr1"], fits["fa1"]).zeros == 4
    assert place_of(fits["rr1"], fits["rr2"]).zeros == 3


def test_studies_change_loadings_by_name():
    scenario = fit_of("rr1").record
    (Sigma,), _ = changed_variances(
        {"loading1_trait[t2]|unit": -2.0}, scenario.labels, scenario.layout.structures, scenario.estimates.Sigma, {}
    )
    L = fit_of("rr1").variance_parameters()["estimate"].to_numpy()[:4].copy()
    L[1] = -2.0
    np.testing.assert_allclose(Sigma, np.outer(L, L), atol=1e-12)


def test_refused_where_they_have_no_meaning():
    with pytest.raises(ValueError, match="no priors of loadings"):
        mj.bayes("y ~ 0 + trait + rr(0 + trait | unit)", traits())
    one = traits().drop_duplicates(["unit", "trait"])
    with pytest.raises(ValueError, match="structures of random effects"):
        mj.mmrm("y ~ trait + rr(trait | unit)", one)


def test_a_generalised_model():
    """Laplace's approximation: between one dimension and an unstructured covariance, which four dimensions are."""
    data = regular().assign(count=lambda d: np.round(np.exp(0.5 * (d["y"] - d["y"].mean()) + 0.5)))
    fit = mj.glmm("count ~ trait + rr(0 + trait | unit, d = 1)", data, "poisson")
    us = mj.glmm("count ~ trait + (0 + trait | unit)", data, "poisson")
    assert fit.converged
    assert not fit.is_singular
    assert fit.npar == 8
    assert us.npar == 14
    assert fit.criterion > us.criterion
    L = fit.variance_parameters()["estimate"].to_numpy()
    np.testing.assert_allclose(fit.Sigma["unit"], np.outer(L, L), rtol=1e-6, atol=1e-9)

    all_four = mj.glmm("count ~ trait + rr(0 + trait | unit, d = 4)", data, "poisson")
    assert all_four.criterion == pytest.approx(us.criterion, abs=1e-7)
    fa = mj.glmm("count ~ trait + fa(0 + trait | unit)", data, "poisson")
    assert fa.npar == 12
    assert us.criterion - 1e-7 <= fa.criterion <= fit.criterion + 1e-7
