"""Covariances that a user writes, against those that are built in."""

from contextlib import nullcontext
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import criterion as dense_criterion
from test_structures_fits import fit_of, three

import mixjax as mj
from mixjax import covariance as cov
from mixjax.checks import FormulaError


def powers(p, q):
    return jnp.tanh(p[0]) ** abs(jnp.arange(q)[:, None] - jnp.arange(q))


def scaled_root(p, q):
    """Cholesky factor of AR(1) with the last sd twice the first, linearly between: no correlation matrix."""
    rho = jnp.tanh(p[0])
    lag = jnp.arange(q)[:, None] - jnp.arange(q)
    C = jnp.where(lag >= 0, rho ** abs(lag), 0.0) * jnp.where(jnp.arange(q) > 0, jnp.sqrt(1 - rho**2), 1.0)
    return (1 + jnp.arange(q) / (q - 1.0))[:, None] * C


own = mj.Covariance(powers, k=1, names=["z"])
own_het = mj.Covariance(powers, k=1, scale="het")
named = mj.Covariance(powers, k=1, names=["rho"], natural=jnp.tanh)
rooted = mj.Covariance(scaled_root, k=1, returns="factor")


named_het = mj.Covariance(powers, k=1, scale="het", names=["rho"], natural=jnp.tanh)
BUILT_IN = {"named": "ar1", "named_het": "hetar1"}


def growing(p, q):
    sd = jnp.exp(p[1] * jnp.arange(q))
    return sd[:, None] * powers(p, q) * sd


both = mj.Covariance(growing, k=2, names=["a", "b"], natural=lambda p: jnp.stack([p[0] + p[1], p[0] - p[1]]))


def same(a, b, rtol=1e-10):
    """Numbers of two tables, or arrays; what is nearly zero, as a p value may be, to as much of one."""
    numbers = [x.select_dtypes(float).to_numpy() if hasattr(x, "select_dtypes") else np.asarray(x) for x in (a, b)]
    np.testing.assert_allclose(*numbers, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", list(BUILT_IN))
def test_an_autoregression_of_ones_own_is_the_built_in_one(name):
    """To 1e-10 in everything. Of many responses, whose last step squares a scaled gradient of 1e-5 and more where the
    one before foretells it, parameters to 1e-8."""
    fit, wanted = mj.lmm(f"y ~ t + {name}(0 + visit | subject)", three()), fit_of(BUILT_IN[name])
    assert fit.npar == wanted.npar
    same(fit.criterion, wanted.criterion)
    same(fit.Sigma["subject"], wanted.Sigma["subject"])
    same(fit.variance_parameters(), wanted.variance_parameters())
    same(fit.vcov, wanted.vcov)
    for ddf in ("satterthwaite", "kenward-roger"):
        same(fit.tidy(ddf=ddf), wanted.tidy(ddf=ddf))
        same(fit.test("t = 0", ddf=ddf), wanted.test("t = 0", ddf=ddf))
    same(fit.confint(method="wald"), wanted.confint(method="wald"))
    same(fit.ranef()["subject"], wanted.ranef()["subject"], 1e-9)
    Y = wanted.simulate(3, 20)
    many = [each.refit_many(Y) for each in (fit, wanted)]
    same(many[0].criterion, many[1].criterion, 1e-9)
    same(many[0].sdcor, many[1].sdcor, 1e-8)


def test_parameters_as_they_are():
    """Without ``natural=`` it is the same model, whose parameter is Fisher's z."""
    fit, wanted = mj.lmm("y ~ t + own(0 + visit | subject)", three()), fit_of("ar1")
    same(fit.criterion, wanted.criterion)
    mine, theirs = (each.variance_parameters() for each in (fit, wanted))
    assert list(mine.index) == ["sd|subject", "z|subject", "sigma"]
    z, rho = mine.loc["z|subject"], theirs.loc["cor_lag1|subject"]
    slope = 1 - rho["estimate"] ** 2
    same([np.tanh(z["estimate"]), z["std_error"]], [rho["estimate"], rho["std_error"] / slope])
    intervals = [each.confint(method="wald").iloc[1] for each in (fit, wanted)]
    same(np.tanh(intervals[0]), intervals[1])
    het = mj.lmm("y ~ t + own_het(0 + visit | subject)", three()).variance_parameters()
    assert list(het.index[-2:]) == ["p1|subject", "sigma"]
    glmm = [
        mj.glmm(f"count ~ t + {each}(0 + visit | subject)", three(), family="poisson").criterion
        for each in ("own", "ar1")
    ]
    assert glmm[0] == pytest.approx(glmm[1], abs=1e-9)


@pytest.mark.parametrize("rho", [1 + 1e-8, np.nan])
def test_at_a_limit_of_what_is_reported_there_are_plain_intervals(rho, monkeypatch):
    """No parameters are reported as a number beyond it; and beside a variance of zero nothing is known of them."""
    fit = mj.lmm("y ~ t + named(0 + visit | subject)", three())
    known = fit.record.variance_parameters
    estimate = known.estimate.copy()
    estimate[1] = rho
    covariance = known.covariance if np.isfinite(rho) else known.covariance * np.nan
    monkeypatch.setitem(
        vars(fit.record), "variance_parameters", replace(known, estimate=estimate, covariance=covariance)
    )
    with nullcontext() if np.isfinite(rho) else pytest.warns(mj.InferenceWarning, match="no Wald interval"):
        ends = fit.confint(method="wald").loc["rho|subject"]
    same(ends, rho + 1.959963984540054 * np.sqrt(covariance[1, 1]) * np.array([-1, 1]))


def test_what_is_reported_together_has_plain_intervals():
    """Of two parameters of which each is reported as a function of both there is no scale of one."""

    fit = mj.lmm("y ~ t + both(0 + visit | subject)", three())
    table, ends = fit.variance_parameters().loc["a|subject"], fit.confint(method="wald").loc["a|subject"]
    same(ends, table["estimate"] + 1.959963984540054 * table["std_error"] * np.array([-1, 1]))


def test_where_it_is_named():
    fit = mj.lmm("y ~ t + own(0 + visit | subject)", three())
    assert "own(0 + visit | subject)" in fit.ranova().index[1]
    assert "z | subject" in str(mj.table([fit]))
    scenario = mj.scenario_of(fit).with_variances({"z|subject": 0.3, "sd|subject": 2.0})
    assert scenario.truth["z|subject"] == pytest.approx(0.3)
    np.testing.assert_allclose(scenario.Sigma[0], 4 * np.asarray(powers([0.3], 3)), rtol=1e-6)
    chunks = mj.lmm("y ~ t + own(0 + visit | subject)", [three()[:80], three()[80:]])
    assert chunks.criterion == pytest.approx(fit.criterion, rel=1e-11)
    table = mj.compare(fit_of("homdiag"), fit, fit_of("us")).to_frame()
    assert list(table["npar"]) == [4, 5, 9]
    assert table["p_value"].iloc[1:].notna().all()


def test_what_is_reported_may_be_another_function_of_the_parameters():
    fit, wanted = mj.lmm("y ~ t + named(0 + visit | subject)", three()), fit_of("ar1")
    mine, theirs = fit.variance_parameters(), wanted.variance_parameters()
    assert mine.index[-2] == "rho|subject"
    np.testing.assert_allclose(mine, theirs, rtol=1e-7)
    Y = wanted.simulate(3, 4)
    many = [each.refit_many(Y).sdcor.iloc[:, -1] for each in (fit, wanted)]
    np.testing.assert_allclose(*many, rtol=1e-5)
    scenario = mj.scenario_of(fit).with_variances({"rho|subject": 0.4, "sd|subject": 2.0})
    np.testing.assert_allclose(scenario.Sigma[0], 4 * 0.4 ** abs(np.subtract.outer(range(3), range(3))), rtol=1e-9)
    assert scenario.truth["rho|subject"] == pytest.approx(0.4, abs=1e-9)
    assert "rho | subject" in str(mj.table([fit]))
    with pytest.raises(ValueError, match=r"no parameters that are reported as rho = 1\.2"):
        mj.scenario_of(fit).with_variances({"rho|subject": 1.2})
    with pytest.raises(ValueError, match="priors are of the parameters themselves"):
        mj.bayes(
            "y ~ t + named(0 + visit | subject)", three(), priors=mj.priors({"rho|subject": mj.prior.normal(0, 1)})
        )
    plain = [mj.scenario_of(mj.lmm("y ~ t + own(0 + visit | subject)", three())), mj.scenario_of(fit)]
    np.testing.assert_allclose(*(one.Sigma[0] for one in plain), rtol=1e-6)


@pytest.mark.usefixtures("x64")
def test_a_root_of_another_shape():
    """The first effect's standard deviation stands for the scale; and a hand-made likelihood agrees."""
    fit = mj.lmm("y ~ t + rooted(0 + visit | subject)", three())
    table = fit.variance_parameters()["estimate"]
    assert list(table.index) == ["sd_visit[v1]|subject", "p1|subject", "sigma"]
    F = np.asarray(scaled_root([table["p1|subject"]], 3))
    np.testing.assert_allclose(fit.Sigma["subject"], table.iloc[0] ** 2 * F @ F.T, rtol=1e-6)
    values = [
        dense_criterion(fit.record.design, [sd * np.asarray(scaled_root([p], 3))], True)
        for sd, p in np.array([table.iloc[0] / fit.sigma, table.iloc[1]])
        + np.array([[0, 0], [1e-3, 0], [-1e-3, 0], [0, 1e-3], [0, -1e-3]])
    ]
    assert values[0] == pytest.approx(fit.criterion, rel=1e-11)
    assert min(values) == values[0]


def test_derivatives_by_differences():
    rng = np.random.default_rng(0)
    for s in (own.of(3), own_het.of(3), rooted.of(3)):
        x, g, h = rng.uniform(0.3, 1.0, size=(s.k, 4)), rng.normal(size=(6, 4)), 1e-5

        def D(x, s=s):
            F = s.factor(x)
            return np.einsum("abl,cbl->acl", F, F)[np.triu_indices(3)]

        for i in range(s.k):
            step = h * np.eye(s.k)[i][:, None]
            np.testing.assert_allclose(s.jacobian(x)[:, i], (D(x + step) - D(x - step)) / (2 * h), rtol=1e-7, atol=1e-8)
            slopes = [np.einsum("pl,pkl->kl", g, s.jacobian(x + sign * step)) for sign in (1, -1)]
            np.testing.assert_allclose(s.curvature(x, g)[i], (slopes[0] - slopes[1]) / (2 * h), rtol=1e-7, atol=1e-7)
            np.testing.assert_allclose(s.slopes(x)[i], (s.factor(x + step) - s.factor(x - step)) / (2 * h), atol=1e-8)
        np.testing.assert_allclose(s.near(s.factor(x)), x, rtol=1e-8)


@pytest.mark.usefixtures("x64")
def test_in_arrays_and_inside_jax():
    """A RandomTerm takes it; the likelihood is a function that JAX differentiates."""
    d = fit_of("ar1").record.design
    terms = [
        (mj.RandomTerm(Z=d.terms[0].Z, group=d.terms[0].group, n_groups=d.terms[0].n_groups, structure=structure),)
        for structure in (own, "ar1")
    ]
    designs = [mj.Design(y=d.y, X=d.X, terms=each) for each in terms]
    p = mj.MarginalParams(beta=np.array([10.0, 0.8]), log_sigma=np.array(-0.1), chol=(np.array([0.2, 0.9]),))
    values, slopes = zip(*(jax.value_and_grad(mj.marginal_loglik)(p, each) for each in designs), strict=True)
    assert float(values[0]) == pytest.approx(float(values[1]), rel=1e-12)
    for a, b in zip(*map(jax.tree.leaves, slopes), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_it_is_the_same_as_itself_only():
    assert own.of(3) == mj.Covariance(powers, 1, names=("z",)).of(3)
    assert hash(own.of(3)) == hash(mj.Covariance(powers, 1, names=("z",)).of(3))
    assert own.of(3) != own_het.of(3)
    assert own.of(3).apart_from_noise
    assert not mj.Covariance(lambda p, q: jnp.eye(q) + jnp.exp(p[0]), 1).of(3).apart_from_noise
    assert isinstance(own.of(4), cov.Structure)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fun": 3}, "must be a function"),
        ({"k": 0}, "k must be"),
        ({"scale": "both"}, "'hom' or 'het'"),
        ({"returns": "chol"}, "'covariance' or 'factor'"),
        ({"names": ["a", "b"]}, "names must be 1 different ones"),
        ({"fun": lambda p, q: jnp.eye(2)}, r"gives shape \(2, 2\) for 3 effects"),
        ({"fun": lambda p, q: jnp.eye(q) + jnp.tanh(p[0]) * jnp.eye(q, k=1)}, "not symmetric"),
        ({"fun": lambda p, q: jnp.eye(q) - 2 * jnp.exp(p[0]) / q}, "not positive definite at p = "),
        ({"fun": lambda p, q: jnp.eye(q) * jnp.nan}, "not finite at p = "),
        ({"fun": lambda p, q: jnp.eye(q) * jnp.exp(p[0])}, "does not show all of its 1 parameters"),
        ({"fun": lambda p, q: jnp.eye(q)}, "does not show all of its 1 parameters"),
        ({"fun": lambda p, q: 2 * powers(p, q), "scale": "het"}, "must give correlations"),
        ({"natural": "tanh"}, "natural must be a function"),
        ({"natural": lambda p: jnp.stack([p[0], p[0]])}, r"natural gives shape \(2,\) for 1 parameters"),
        ({"natural": lambda p: 0 * p}, "natural is not one for one"),
    ],
)
def test_what_is_none(options, message):
    with pytest.raises(ValueError, match=message):
        mj.Covariance(**({"fun": powers, "k": 1} | options)).of(3)


def test_names_that_are_none():
    message = "no covariance structure 'other'.*those of one's own"
    with pytest.raises(FormulaError, match=message):
        mj.lmm("y ~ t + other(0 + visit | subject)", three())
    other = powers
    assert callable(other)
    with pytest.raises(FormulaError, match=message):  # a function, not a Covariance of it
        mj.lmm("y ~ t + other(0 + visit | subject)", three())
    with pytest.raises(FormulaError, match="no covariance structure 'own'"):
        mj.lmm("y ~ t + own(0 + visit | subject)", three(), trusted=False)
