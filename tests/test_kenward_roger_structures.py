"""Kenward-Roger's adjustment where covariances are not linear in their parameters, against the dense definition."""

from functools import cache

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from conftest import HERE

import mixjax as mj
from mixjax.engine.engine import AtOnce
from mixjax.inference.fixed import kenward_roger as kr

L = np.array([0.0, 0.0, 1.0, 0.0])


def visits():
    data = pd.read_csv(HERE / "data" / "visits.csv")
    data = data[data["subject"].isin(data["subject"].unique()[:12])]
    return data.assign(t=data["visit"].astype("category").cat.codes.astype(float))


@cache
def fit_of(name, other=""):
    return mj.lmm(f"y ~ arm * t + {name}(0 + visit | subject){other}", visits())


def adjusted(fit, linear=False):
    return AtOnce(fit.stats, True).run(kr.adjust, fit.estimates.theta, fit.estimates.sigma, linear)


def covariance_of(fit, t):
    """V of variances and correlations ``t``, sigma^2 the last, as the structure's definition says."""
    (term, structure), q = (fit.design.terms[0], fit.stats.layout.structures[0]), 6
    name = term.structure
    sds = sum(p.kind == "sd" for p in structure.natural)
    variances = np.broadcast_to(t[:sds], (q,)) if sds == 1 else t[:sds]
    cors, apart = t[sds:-1], np.abs(np.subtract.outer(np.arange(q), np.arange(q)))
    if name in ("ar1", "hetar1"):
        R = cors[0] ** apart
    elif name == "cs":
        R = np.where(apart == 0, 1.0, cors[0])
    else:  # toep
        R = np.concatenate([[1.0], cors])[apart]
    D = R * np.sqrt(np.outer(variances, variances))
    Z = fit.Z.toarray()
    return t[-1] * np.eye(len(Z)) + Z @ np.kron(np.eye(term.n_groups), D) @ Z.T


def by_definition(fit):
    """Kenward & Roger (1997), section 2: vcov, adjusted, without second derivatives, and df of L, by differences."""
    S = fit.estimates.Sigma[0]
    values = [S[p.i, p.i] if p.kind == "sd" else S[p.i, p.j] / np.sqrt(S[p.i, p.i] * S[p.j, p.j])
              for p in fit.stats.layout.structures[0].natural]  # fmt: skip
    t = np.array([*values, fit.sigma**2])
    k, X = len(t), fit.X
    h = 1e-4 * np.maximum(np.abs(t), 0.1)
    steps = np.diag(h)

    def V(at):
        return covariance_of(fit, at)

    W = np.linalg.inv(V(t))
    first = [(V(t + e) - V(t - e)) / (2 * h[i]) for i, e in enumerate(steps)]
    C = np.linalg.inv(X.T @ W @ X)
    P = [-X.T @ W @ d @ W @ X for d in first]
    Q = [[X.T @ W @ a @ W @ b @ W @ X for b in first] for a in first]
    traces = np.array([[np.trace(W @ a @ W @ b) for b in first] for a in first])
    information = np.array([[0.5 * traces[i, j] - np.trace(C @ Q[i][j]) + 0.5 * np.trace(C @ P[i] @ C @ P[j])
                             for j in range(k)] for i in range(k)])  # fmt: skip
    of_parameters = np.linalg.inv(information)
    U, bent = 0.0, 0.0
    for i, a in enumerate(steps):
        for j, b in enumerate(steps):
            second = (V(t + a + b) - V(t + a - b) - V(t - a + b) + V(t - a - b)) / (4 * h[i] * h[j])
            U = U + of_parameters[i, j] * (Q[i][j] - P[i] @ C @ P[j])
            bent = bent + 0.25 * of_parameters[i, j] * (X.T @ W @ second @ W @ X)
    g = np.array([L @ C @ p @ C @ L for p in P])
    df = 2 * (L @ C @ L) ** 2 / (g @ of_parameters @ g)
    return C, C + 2 * C @ (U - bent) @ C, C + 2 * C @ U @ C, df


@pytest.mark.parametrize("name", ["ar1", "cs", "hetar1", "toep"])
def test_adjustment_is_that_of_the_definition(name):
    fit = fit_of(name)
    assert not fit.is_singular
    vcov, wanted, linear, df = by_definition(fit)
    own, without = adjusted(fit), adjusted(fit, linear=True)
    size = np.abs(wanted - vcov).max()
    # Second differences with steps of 1e-4 have errors of 1e-8 of what they are differences of.
    np.testing.assert_allclose(own.vcov, vcov, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(own.adjusted, wanted, atol=1e-6 * size)
    np.testing.assert_allclose(without.adjusted, linear, atol=1e-6 * size)
    assert np.abs(wanted - linear).max() > 1e-3 * size
    np.testing.assert_allclose(fit.test(L, ddf="kenward-roger")["df"].iloc[0], df, rtol=1e-6)
    np.testing.assert_allclose(
        fit.test(L, ddf="kenward-roger-linear")["std_error"].iloc[0], np.sqrt(linear[2, 2]), rtol=1e-7
    )


def test_linear_structures_have_one_form():
    fit = fit_of("homcs")
    for a, b in zip(adjusted(fit), adjusted(fit, linear=True), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_sum_of_the_traces_does_not_see_units_or_scales_of_columns():
    fit = fit_of("hetar1")
    other = mj.lmm("y ~ arm * t + hetar1(0 + visit | subject)", visits().assign(y=lambda d: 1e3 * d["y"] - 5e4))
    ours, theirs = (f.test(L, ddf="kenward-roger").iloc[0] for f in (fit, other))
    np.testing.assert_allclose(theirs["df"], ours["df"], rtol=1e-5)
    np.testing.assert_allclose(theirs["statistic"], ours["statistic"], rtol=1e-5)


def falling(p, q):
    return jnp.tanh(p[0]) ** jnp.abs(jnp.arange(q)[:, None] - jnp.arange(q))


own = mj.Covariance(falling, k=1, names=("rho",), natural=jnp.tanh)
own_het = mj.Covariance(falling, k=1, scale="het", names=("rho",), natural=jnp.tanh)


@pytest.mark.parametrize(("name", "built_in"), [("own", "ar1"), ("own_het", "hetar1")])
def test_own_structure_equals_the_built_in_one(name, built_in):
    """To rounding at one covariance, where it reports the same parameters; fits end as near to theirs as a search."""
    fit, wanted = mj.lmm(f"y ~ arm * t + {name}(0 + visit | subject)", visits()), fit_of(built_in)
    assert fit.criterion == pytest.approx(wanted.criterion, abs=1e-10)
    at = wanted.estimates.theta, wanted.estimates.sigma
    for linear in (False, True):
        mine, theirs = (AtOnce(each.stats, True).run(kr.adjust, *at, linear) for each in (fit, wanted))
        for a, b in zip(mine[:2], theirs[:2], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10)
        for L in (np.eye(4)[1:2], np.eye(4)[1:]):
            np.testing.assert_allclose(kr.f_scaling(L, mine), kr.f_scaling(L, theirs), rtol=1e-9)
    for ddf in ("kenward-roger", "kenward-roger-linear", "satterthwaite"):
        np.testing.assert_allclose(*(each.anova(ddf=ddf) for each in (fit, wanted)), rtol=1e-6)
    # Another parameter has other second derivatives, and other standard errors.
    plain = mj.Covariance(falling, k=1, scale=fit.design.terms[0].structure.scale)
    other = mj.lmm("y ~ arm * t + plain(0 + visit | subject)", visits())
    assert plain.natural is None
    a, b = (each.test("arm[T.B] = 0", ddf="kenward-roger")["std_error"] for each in (other, wanted))
    assert not np.allclose(a, b, rtol=1e-4)


def test_beside_another_term_and_in_array_form():
    fit = fit_of("ar1", " + (0 + t | subject)")
    ours = fit.test(L, ddf="kenward-roger").iloc[0]
    found = mj.kenward_roger(fit.estimates, fit.stats, L)
    np.testing.assert_allclose([found.se[0], found.df[0]], [ours["std_error"], ours["df"]], rtol=1e-10)
    assert ours["std_error"] > fit.se.iloc[2]


def test_many_fits():
    fit = fit_of("ar1")
    Y = fit.simulate(key=1, n=3)
    stats = mj.cross_products(fit.design, Y)
    est = mj.estimate_many(stats, keep=("theta", "beta", "sigma", "result"))
    found = mj.kenward_roger(est, stats, L)
    for i in range(3):
        alone = fit.refit(Y[i]).test(L, ddf="kenward-roger").iloc[0]
        np.testing.assert_allclose([found.se[i, 0], found.df[i, 0]], [alone["std_error"], alone["df"]], rtol=1e-5)


def test_at_a_bound_it_is_refused():
    rng = np.random.default_rng(0)
    data = visits()
    shift = dict(zip(data["subject"].unique(), rng.normal(size=12), strict=True))
    data = data.assign(y=data["subject"].map(shift).astype(float) + 0.5 * rng.normal(size=len(data)))
    fit = mj.lmm("y ~ arm * t + ar1(0 + visit | subject)", data)
    if not fit.record.information.free.all():
        with pytest.raises(ValueError, match="at its bound"):
            fit.test(L, ddf="kenward-roger")
    else:
        raise AssertionError("a random intercept is an autoregression whose correlation is 1")
