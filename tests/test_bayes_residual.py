"""Posteriors where residuals have parameters, levels a known covariance, sigma is known; and of repeated measures."""

import warnings
from dataclasses import replace

import dense
import jax
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import table

import mixjax as mj
from mixjax.engine.residual_rows import ResidualRows
from mixjax.engine.visit_sums import VisitSums
from mixjax.estimation.residual import correlation_of, transform_of
from mixjax.products.rows import rows_of
from mixjax.products.visits import visit_rows
from mixjax.sampling.density import density as plain_density
from mixjax.sampling.density import log_prior as plain_log_prior
from mixjax.sampling.density import parts_of as plain_parts_of
from mixjax.sampling.effects import draw_effects, draw_effects_of_residuals
from mixjax.sampling.others import Other
from mixjax.sampling.predictive import draw_parameters, noise_of, respond

density, log_prior, parts_of = jax.jit(plain_density), jax.jit(plain_log_prior), jax.jit(plain_parts_of)
FLAT = mj.priors(intercept=mj.prior.flat())
ORTH = "distance ~ age + (1 | Subject)"
# Formula and options of models whose residuals have parameters.
MODELS = {
    "dispersion": (ORTH, {"dispersion": "~ Sex"}),
    "ar1": ("distance ~ age", {"residual": "ar1(age | Subject)"}),
    "car1 and dispersion": ("distance ~ age", {"residual": "car1(age | Subject)", "dispersion": "~ Sex + age"}),
    "cs and dispersion": ("distance ~ age", {"residual": "cs(1 | Subject)", "dispersion": "~ Sex"}),
    "ar1 and intercepts": (ORTH, {"residual": "ar1(age | Subject)"}),
}


def no_warnings(call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mj.InferenceWarning)
        return call()


def fit_of(name):
    formula, options = MODELS[name]
    return mj.lmm(formula, table("Orthodont"), **options)


def coordinates(model, Sigmas, sigma, own):
    """z of given parameters: sds of terms of one effect, sigma where W gamma = 0, those of residuals."""
    log_sigma = np.log(sigma) + np.asarray(model.means) @ own[: len(model.means)]
    parts = [0.5 * np.log(S[0, 0]) for S in Sigmas]
    others = []
    for one, value in zip(model.others, own, strict=True):
        if one.kind == "real":
            others.append(value * float(one.scale))
        else:
            c = np.sign(value) * abs(value) ** (1.0 / float(one.root))
            u = (c - float(one.low)) / (1.0 - float(one.low))
            others.append(0.5 * np.log(u / (1.0 - u)))
    return np.array([*parts, log_sigma, *others])


@pytest.mark.parametrize("name", MODELS)
def test_flat_priors_are_the_restricted_likelihood(name, x64):
    """-2 log of the integral over flat fixed effects is the REML criterion, which others have computed."""
    record = fit_of(name).record
    model = FLAT.resolve(record.given, record.labels)
    est = record.estimates
    z = coordinates(model, est.Sigma, float(est.sigma), np.asarray(est.residual))
    data = ResidualRows.of(rows_of(record.given), transform_of(record.given))
    found = -2.0 * float(parts_of(z, data, model).likelihood.loglik)
    assert found == pytest.approx(float(est.criterion), rel=1e-12)
    assert float(mj.log_posterior(z, record.given, model)) == pytest.approx(float(density(z, data, model)), rel=1e-13)
    # And what is reported of the coordinates are the parameters again.
    assert np.exp(model.log_sigma_of(z)) == pytest.approx(float(est.sigma), rel=1e-12)
    reported = [one.reported(own) for one, own in zip(model.others, model.others_of(z), strict=True)]
    assert reported == pytest.approx(np.asarray(est.residual), rel=1e-9)


@pytest.mark.parametrize("negative", [False, True])
def test_whitened_rows_against_the_fits(negative, x64):
    """Two roads to one transform; of a negative correlation at odd and even distances."""
    rng = np.random.default_rng(2)
    group, time = np.repeat(np.arange(6), 5), np.tile([0, 1, 3, 4, 7], 6)
    design = mj.Design(
        y=rng.normal(size=30), X=np.ones((30, 1)), terms=(), dispersion=rng.normal(size=(30, 2)),
        residual=mj.design.ResidualTerm("ar1", group, time),
    )  # fmt: skip
    transform = transform_of(design)
    c = -0.4 if negative else 0.6
    gamma = np.array([0.3, -0.2])
    phi = transform.phi_of(np.array([*gamma, c]))
    data = ResidualRows.of(rows_of(design), transform)
    at = data.whitener(gamma, np.asarray(c))
    A = rng.normal(size=(30, 3))
    # Theirs is relative to a row at the means of the columns too.
    assert np.allclose(data.moved(at, A), transform.rows(phi, A), rtol=1e-12)
    assert float(at.logdet.sum()) == pytest.approx(transform.logdet(phi).value, rel=1e-11)


@pytest.mark.parametrize(
    ("one", "exact"),
    [
        (Other(mj.prior.normal(0.5, 2.0), "real", 3.0), scipy.stats.norm(0.5, 2.0)),
        (Other(mj.prior.log_normal(0.3, 0.8), "positive"), scipy.stats.lognorm(0.8, scale=np.exp(0.3))),
        (Other(mj.prior.lkj(1.0), "correlation", 1.0, -0.25), scipy.stats.uniform(-0.25, 1.25)),
        (Other(mj.prior.lkj(3.0), "correlation", 1.0, -1.0), scipy.stats.beta(3, 3, -1, 2)),
        (Other(mj.prior.normal(0.4, 0.3), "correlation", 1.0, 0.0),
         scipy.stats.truncnorm(-0.4 / 0.3, 0.6 / 0.3, 0.4, 0.3)),
    ],
)  # fmt: skip
def test_priors_of_residuals(one, exact, x64):
    """Densities of coordinates are those of the values times the slope; draws have that distribution."""
    for z in (-0.7, 0.2, 1.1):
        value, slope = jax.value_and_grad(lambda z: one.value(z))(z)
        assert float(one.log_density(z)) == pytest.approx(exact.logpdf(value) + np.log(slope), rel=1e-10)
    drawn = one.value(one.sample(np.random.default_rng(0), 4000))
    assert scipy.stats.kstest(drawn, exact.cdf).pvalue > 1e-3
    assert one.value(one.near(0.3)) == pytest.approx(0.3)


def test_a_cut_lkj(x64):
    """lkj above a bound is the Beta density over its mass there."""
    one, beta = Other(mj.prior.lkj(2.0), "correlation", 1.0, -0.2), scipy.stats.beta(2, 2, -1, 2)
    for z in (-1.0, 0.4):
        value, slope = jax.value_and_grad(lambda z: one.value(z))(z)
        exact = beta.logpdf(value) - np.log(beta.sf(-0.2)) + np.log(slope)
        assert float(one.log_density(z)) == pytest.approx(exact, rel=1e-10)


def test_where_the_prior_of_sigma_belongs(x64):
    """By class to a row at the means of the dispersion's columns, by name to one at zero."""
    record = fit_of("dispersion").record
    half = mj.prior.half_normal(2.0)
    by_class = mj.priors(sigma=half).resolve(record.given, record.labels)
    by_name = mj.priors({"sigma": half}).resolve(record.given, record.labels)
    z = np.array([0.3, 0.5, 0.7, 24.0])
    sds = np.exp(by_class.cut(z)[1]), np.exp(by_class.log_sigma_of(z))
    slope = [float(half.log_prob(sd)) + np.log(sd) for sd in sds]
    assert float(log_prior(z, by_name) - log_prior(z, by_class)) == pytest.approx(slope[1] - slope[0], rel=1e-10)


# --- random effects --------------------------------------------------------------------------------------------------


def moments_agree(drawn, V, prior, Z, r):
    """Draws of all effects ``(S, N)`` against their distribution given the data."""
    gain = np.linalg.solve(V, Z @ prior).T
    mean, covariance = gain @ r, prior - gain @ Z @ prior
    sd, S = np.sqrt(np.maximum(covariance.diagonal(), 1e-14)), len(drawn)
    assert (np.abs(drawn.mean(0) - mean) < 5 * sd / np.sqrt(S)).all()
    error = np.sqrt((np.outer(sd, sd) ** 2 + covariance**2) / S)
    assert (np.abs(np.cov(drawn.T) - covariance) < 5.5 * error).all()


@pytest.mark.parametrize("structure", ["ar1", "cs", None])
def test_effects_beside_residuals_with_parameters(structure):
    rng = np.random.default_rng(4)
    n, m = 20, 5
    group = np.repeat(np.arange(m), 4)
    time = np.tile([0, 1, 2, 5], m)
    term = mj.RandomTerm(np.column_stack([np.ones(n), rng.normal(size=n)]), group, m)
    residual = None if structure is None else mj.design.ResidualTerm(structure, group, time)
    design = mj.Design(
        y=rng.normal(size=n), X=np.column_stack([np.ones(n), rng.normal(size=n)]), terms=(term,),
        weights=rng.uniform(0.5, 2, n), offset=rng.normal(size=n), dispersion=rng.normal(size=(n, 1)),
        residual=residual,
    )  # fmt: skip
    S, sigma, beta, gamma, c = 20_000, 0.8, np.array([0.4, -0.3]), 0.5, 0.6
    L = np.tril(rng.normal(size=(2, 2)))
    drawn = draw_effects_of_residuals(
        design, [np.repeat(L[..., None], S, -1)], np.full(S, sigma), np.full((S, 1), gamma),
        None if structure is None else np.full(S, c), np.tile(beta, (S, 1)), np.random.default_rng(1),
    )  # fmt: skip
    W = design.dispersion[:, 0] - design.dispersion[:, 0].mean()
    sd = sigma * np.exp(gamma * W) / np.sqrt(design.weights)
    correlation = correlation_of(design)
    R = np.eye(n) if correlation is None else correlation.matrix(c, np.arange(n))
    prior = np.kron(np.eye(m), L @ L.T)
    Z = np.zeros((n, 2 * m))
    for i in range(n):
        Z[i, 2 * group[i] : 2 * group[i] + 2] = term.Z[i]
    V = Z @ prior @ Z.T + np.outer(sd, sd) * R
    moments_agree(drawn[0].reshape(S, -1), V, prior, Z, design.y - design.offset - design.X @ beta)


@pytest.mark.parametrize("beside", [False, True])
def test_effects_of_related_levels(beside):
    """Alone, by eigenvectors; beside another factor, as independent effects. One level has no row."""
    rng = np.random.default_rng(6)
    n, m = 18, 7
    A = rng.normal(size=(m, m))
    L = np.linalg.cholesky(A @ A.T / m + 0.3 * np.eye(m))
    group = np.repeat(np.arange(m - 1), 3)
    terms = [mj.RandomTerm(np.ones((n, 1)), group, m, levels=L)]
    if beside:
        terms.append(mj.RandomTerm(np.ones((n, 1)), rng.integers(0, 4, n), 4))
    design = mj.Design(y=rng.normal(size=n), X=np.ones((n, 1)), terms=tuple(terms))
    S, sigma, beta, sds = 20_000, 0.7, np.array([0.2]), [0.9, 0.5][: len(terms)]
    drawn = draw_effects(
        design, [np.full((1, 1, S), s) for s in sds], np.full(S, sigma), np.tile(beta, (S, 1)), np.random.default_rng(3)
    )
    Z = np.concatenate([np.eye(t.n_groups)[t.group] for t in terms], axis=1)
    blocks = [sds[0] ** 2 * L @ L.T, *(s**2 * np.eye(t.n_groups) for s, t in zip(sds[1:], terms[1:], strict=True))]
    prior = np.zeros((Z.shape[1],) * 2)
    at = 0
    for block in blocks:
        prior[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    V = Z @ prior @ Z.T + sigma**2 * np.eye(n)
    moments_agree(np.concatenate([b[..., 0] for b in drawn], axis=1), V, prior, Z, design.y - design.X @ beta)


# --- whole posteriors ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uneven():
    formula, options = MODELS["dispersion"]
    return mj.bayes(formula, table("Orthodont"), method="importance", key=1, **options)


def test_a_posterior_with_a_dispersion(uneven):
    """Orthodont, boys vary more than girls: near the REML estimates, and log densities by their definition."""
    fit = fit_of("dispersion")
    found, est = uneven.summary(), fit.variance_parameters()["estimate"]
    assert uneven.names == ("Intercept", "age", "sd_Intercept|Subject", "disp~Sex[T.Female]", "sigma")
    for name in uneven.names[2:]:
        assert abs(found.loc[name, "mean"] - est[name]) < 0.6 * found.loc[name, "sd"]
    assert np.allclose(uneven.predict()["mean"], fit.predict(), atol=0.3)
    draws = uneven.draws.reshape(-1, 5)
    girl = (table("Orthodont")["Sex"] == "Female").to_numpy()
    sd = draws[:, 4:] * np.exp(draws[:, 3:4] * girl)
    mean = uneven.predict(draws=True)
    y = table("Orthodont")["distance"].to_numpy()
    assert np.allclose(uneven.log_lik().reshape(-1, 108), scipy.stats.norm.logpdf(y, mean, sd), rtol=1e-10)
    # Of new responses girls vary less, in rows of the fit, of a table, and as simulated.
    whole = uneven.predict(interval="prediction")
    assert whole["sd"][girl].mean() < 0.6 * whole["sd"][~girl].mean()
    new = uneven.predict({"age": [8, 8], "Sex": ["Female", "Male"], "Subject": ["M01", "M01"]}, interval="prediction")
    assert new["sd"].iloc[0] < 0.65 * new["sd"].iloc[1]
    drawn = uneven.simulate(key=3)
    assert drawn.std(0) == pytest.approx(whole["sd"].to_numpy(), rel=0.1)
    assert np.isfinite(uneven.simulate(5, random="new")).all()


def test_levels_left_out_beside_a_dispersion(uneven):
    """Log densities of subjects against dense ones at a draw."""
    record, draw = uneven.reml_fit, uneven.draws[0, 7]
    found = uneven.log_lik(by="Subject")[0, 7]
    design = record.given
    sd = draw[4] * np.exp(draw[3] * np.asarray(design.dispersion)[:, 0])
    r = design.y - design.X @ draw[:2]
    group = design.terms[0].group
    for level in (0, 5, 26):
        at = group == level
        V = np.diag(sd[at] ** 2) + draw[2] ** 2
        assert found[level] == pytest.approx(scipy.stats.multivariate_normal.logpdf(r[at], cov=V), rel=1e-9)
    loo = no_warnings(lambda: uneven.loo(by="Subject"))
    assert len(loo.pointwise) == 27
    assert no_warnings(uneven.loo).elpd > loo.elpd
    with pytest.raises(ValueError, match="grouping factor of the model, 'Subject'"):
        uneven.loo(by="Sex")


def test_a_posterior_with_correlated_residuals():
    formula, options = MODELS["ar1"]
    post = mj.bayes(formula, table("Orthodont"), method="importance", key=1, **options)
    fit = fit_of("ar1")
    found = post.summary()
    assert post.names == ("Intercept", "age", "rho|Subject", "sigma")
    est = fit.variance_parameters()["estimate"]
    assert abs(found.loc["rho|Subject", "mean"] - est["rho|Subject"]) < 0.6 * found.loc["rho|Subject", "sd"]
    drawn, correlation = post.simulate(key=2), correlation_of(fit.record.given)
    R = correlation.matrix(float(post.draws[..., 2].mean()), np.arange(4))
    assert np.corrcoef(drawn[:, :4].T) == pytest.approx(R, abs=0.08)
    by = post.log_lik(by="Subject")[0, 3]
    rho, sigma = post.draws[0, 3, 2:]
    r = np.asarray(fit.design.y) - np.asarray(fit.design.X) @ post.beta[0, 3]
    group = np.unique(np.asarray(fit.record.given.residual.group), return_inverse=True)[1]
    at = np.flatnonzero(group == 2)
    V = sigma**2 * correlation.matrix(rho, at)
    assert by[2] == pytest.approx(scipy.stats.multivariate_normal.logpdf(r[at], cov=V), rel=1e-9)
    assert len(no_warnings(lambda: post.loo(by="Subject")).pointwise) == 27
    with pytest.raises(ValueError, match="leave out whole levels"):
        post.loo()
    with pytest.raises(ValueError, match="simulate"):
        post.predict(interval="prediction", draws=True)
    with pytest.raises(ValueError, match="that of the residuals, 'Subject'"):
        post.loo(by="Sex")
    assert post.ranef() == {}


def test_a_posterior_of_related_levels():
    rng = np.random.default_rng(0)
    names = [f"a{i}" for i in range(12)]
    A = rng.normal(size=(12, 12))
    K = pd.DataFrame(A @ A.T / 12 + 0.5 * np.eye(12), index=names, columns=names)
    animal = np.repeat(names[:10], 5)
    u = np.linalg.cholesky(K.to_numpy()) @ rng.normal(size=12)
    data = pd.DataFrame({"y": 2 + u[np.repeat(np.arange(10), 5)] + rng.normal(size=50), "animal": animal})
    post = mj.bayes("y ~ 1 + propto(1 | animal, K)", data, method="importance", key=1)
    fit = mj.lmm("y ~ 1 + propto(1 | animal, K)", data)
    effects, blup = post.ranef()["animal"], fit.ranef()["animal"]
    assert effects.shape == blup.shape == (12, 1)
    assert (np.abs(effects - blup) < 0.5 * post.ranef("sd")["animal"]).all(axis=None)
    assert np.allclose(post.predict()["mean"], fit.predict(), atol=0.3)
    unseen = post.predict({"animal": ["a11"]})
    assert unseen["mean"].iloc[0] == pytest.approx(float((post.beta + post.b["animal"][:, :, 11]).mean()), rel=1e-9)
    assert np.isfinite(post.simulate(3, random="new")).all()
    assert no_warnings(post.loo).elpd < 0
    with pytest.raises(ValueError, match=r"loo\(by='animal'\).*does not know RandomTerm.levels"):
        post.loo(by="animal")


def test_a_known_sigma():
    """Eight schools (Gelman et al. 2014, Bayesian Data Analysis, table 5.2): the posterior on a grid over tau."""
    y = np.array([28.0, 8, -3, 7, -1, 1, 18, 12])
    se = np.array([15.0, 10, 16, 11, 9, 11, 10, 18])
    data = pd.DataFrame({"y": y, "w": se**-2.0, "school": list("ABCDEFGH")})
    own = mj.priors(intercept=mj.prior.normal(0, 20), sd=mj.prior.half_normal(10))
    post = mj.bayes("y ~ 1 + (1 | school)", data, own, sigma=1.0, weights="w", method="importance", draws=4000, key=1)
    assert post.names == ("Intercept", "sd_Intercept|school")
    tau = np.linspace(1e-4, 60, 4000)
    v = se**2 + tau[:, None] ** 2
    precision = (1 / v).sum(1) + 1 / 400
    mu = (y / v).sum(1) / precision
    log = -0.5 * (np.log(v) + y**2 / v).sum(1) - 0.5 * np.log(precision) + 0.5 * mu**2 * precision
    w = np.exp(log - log.max() - 0.5 * (tau / 10) ** 2)
    w /= w.sum()
    found = post.summary()
    assert found.loc["sd_Intercept|school", "mean"] == pytest.approx(w @ tau, rel=0.03)
    assert found.loc["Intercept", "mean"] == pytest.approx(w @ mu, abs=0.15)
    sd = np.sqrt(w @ (1 / precision) + w @ mu**2 - (w @ mu) ** 2)
    assert found.loc["Intercept", "sd"] == pytest.approx(sd, rel=0.04)
    effect = w @ ((tau**2 / (tau**2 + se[0] ** 2)) * (y[0] - mu))
    assert post.ranef()["school"].iloc[0, 0] == pytest.approx(effect, abs=0.3)
    assert "residual standard deviation known: 1" in repr(post)
    assert (post.sigma == 1.0).all()
    assert no_warnings(lambda: post.loo(by="school")).n_bad >= 0
    assert (post.predict(interval="prediction")["sd"] > se).all()
    with pytest.raises(ValueError, match="no REML fit"):
        post.reml_fit  # noqa: B018
    for sigma, message in ((0, "positive"), ("w", "must be a number"), (True, "must be a number")):
        with pytest.raises(ValueError, match=message):
            mj.bayes("y ~ 1 + (1 | school)", data, sigma=sigma, weights="w")
    with pytest.raises(ValueError, match="leave one out"):
        mj.bayes("y ~ 1 + (1 | school)", data, sigma=1.0, dispersion="~ w")
    with pytest.raises(ValueError, match="no residual standard deviation"):
        mj.bayes("y ~ 1 + (1 | school)", data, mj.priors(sigma=mj.prior.half_normal(1)), sigma=1.0)


# --- repeated measures -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("structure", ["us(age | Subject)", "ar1h(age | Sex / Subject)"])
@pytest.mark.parametrize("integrate", [True, False])
def test_repeated_measures_against_dense_integrals(structure, integrate, x64):
    """y ~ N(X m, V + X S X'), visits missing; sampled: the likelihood of mixjax.repeated_loglik."""
    data = table("Orthodont").drop(index=[3, 10, 11, 40])
    record = mj.mmrm(f"distance ~ age + {structure}", data).record
    own = {name: mj.prior.normal(m, s) for name, m, s in (("Intercept", 15, 4.0), ("age", 0.6, 0.3))}
    model = mj.priors(own).resolve(record.design, record.labels, integrate)
    sums = VisitSums.of(record.rows)
    rng = np.random.default_rng(1)
    z = np.concatenate([0.7 + 0.3 * rng.normal(size=model.dim - len(model.fixed)), np.array([16.0, 0.7])])[: model.dim]
    terms, _, beta = model.cut(z)
    factors = [chart.factor(part) for chart, part in zip(model.charts, terms, strict=True)]
    Sigma = np.stack([np.asarray(F @ F.T) for F in factors])
    found = float(parts_of(z, sums, model).likelihood.loglik)
    design = record.design
    if integrate:
        subject = np.asarray(design.subject)
        arm = np.zeros(len(subject), int) if design.arm is None else np.asarray(design.arm)[subject]
        V = Sigma[arm][np.arange(len(subject))[:, None], np.asarray(design.visit)[:, None], design.visit[None]]
        V = V * (subject[:, None] == subject)
        m, s = np.array([15.0, 0.6]), np.array([4.0, 0.3])
        V = V + (design.X * s) @ (design.X * s).T
        expected = scipy.stats.multivariate_normal.logpdf(design.y, design.X @ m, V)
    else:
        expected = float(mj.repeated_loglik(np.asarray(beta), Sigma, design))
    assert found == pytest.approx(expected, rel=1e-11)
    assert float(mj.log_posterior(z, design, model)) == pytest.approx(float(density(z, sums, model)), rel=1e-12)


@pytest.fixture(scope="module")
def visits():
    return mj.bayes_mmrm("distance ~ Sex * age + ar1(age | Subject)", table("Orthodont"), method="importance", key=1)


def test_a_posterior_of_repeated_measures(visits):
    fit = mj.mmrm("distance ~ Sex * age + ar1(age | Subject)", table("Orthodont"))
    found = visits.summary()
    est = fit.variance_parameters()["estimate"]
    assert list(visits.names[4:]) == list(est.index)
    for name, value in {**est, **fit.fixef}.items():
        assert abs(found.loc[name, "mean"] - value) < 0.5 * found.loc[name, "sd"]
    assert visits.Sigma["Subject"].shape == (4, 1000, 4, 4)
    assert visits.Sigma["Subject"].mean((0, 1)) == pytest.approx(np.asarray(fit.estimates.Sigma[0]), rel=0.3)
    drawn = visits.simulate(key=2)
    V = np.cov(drawn[:, :4].T)
    assert V[0, 1] == pytest.approx(visits.Sigma["Subject"][..., 0, 1].mean(), rel=0.25)
    assert abs(np.cov(drawn[:, 0], drawn[:, 4])[0, 1]) < 0.5
    assert visits.simulate(7).shape == (7, 108)
    rows = visits.predict()
    assert np.allclose(rows["mean"], fit.predict(), atol=0.1)
    new = {"Sex": ["Male", "Female"], "age": [14.0, 8.0]}
    mean, whole = visits.predict(new), visits.predict(new, interval="prediction")
    assert np.allclose(mean["mean"], whole["mean"], atol=0.2)
    assert np.allclose(whole["sd"], np.sqrt(mean["sd"] ** 2 + V[0, 0]), rtol=0.06)
    assert visits.predict(new, draws=True).shape == (4000, 2)
    for ask, message in (
        (lambda: visits.predict(new, interval="prediction", draws=True), "simulate"),
        (lambda: visits.predict(interval=None), "interval must be"),
        (visits.ranef, "no random effects"),
        (lambda: visits.loo(by="Sex"), "column of the subjects, 'Subject'"),
        (lambda: visits.predict({"Sex": ["Male"], "age": [9.0]}, interval="prediction"), "no visit of the fit"),
    ):
        with pytest.raises(ValueError, match=message):
            ask()
    assert "Posterior of distance" in repr(visits)
    assert visits.problems() == []


def test_visits_and_subjects_left_out(visits):
    """Log densities at a draw, of a visit given the others and of whole subjects, by their definition."""
    design = visits.design
    Sigma, beta = visits.Sigma["Subject"][1, 5], visits.beta[1, 5]
    e = np.zeros((27, 4))
    e[design.subject, design.visit] = np.asarray(design.y) - np.asarray(design.X) @ beta
    P = np.linalg.inv(Sigma)
    mean, sd = e - (e @ P) / P.diagonal(), P.diagonal() ** -0.5
    rows = np.zeros((27, 4))
    rows[design.subject, design.visit] = visits.log_lik()[1, 5]
    assert np.allclose(rows, scipy.stats.norm.logpdf(e, mean, sd), rtol=1e-9)
    by = visits.log_lik(by="Subject")[1, 5]
    assert np.allclose(by, scipy.stats.multivariate_normal.logpdf(e, cov=Sigma), rtol=1e-9)
    assert no_warnings(visits.loo).elpd > no_warnings(lambda: visits.loo(by="Subject")).elpd


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda d: mj.bayes(ORTH, d, mj.priors(dispersion=mj.prior.flat()), dispersion="~ Sex"), "improper"),
        (lambda d: mj.bayes(ORTH, d, mj.priors(dispersion=mj.prior.half_normal(1)), dispersion="~ Sex"), "real number"),
        (lambda d: mj.bayes(ORTH, d, mj.priors(dispersion=mj.prior.normal(0, 1))), "no coefficients of a dispersion"),
        (lambda d: mj.bayes(ORTH, d, mj.priors(rho=mj.prior.lkj(1))), "no correlation of residuals"),
        (lambda d: mj.bayes("distance ~ age", d, mj.priors({"rho|Subject": mj.prior.student_t(3, 0, 1)}),
                            residual="ar1(age | Subject)"), "a correlation: use lkj"),
        (lambda d: mj.bayes("distance ~ age", d, dispersion="~ 1"), "nothing but a regression"),
        (lambda d: mj.bayes("distance ~ age", d), "no random"),
        (lambda d: mj.bayes_mmrm("distance ~ age + us(age | Subject)", d, mj.priors(sigma=mj.prior.half_normal(1))),
         "no residual standard deviation"),
        (lambda d: mj.bayes_mmrm("distance ~ age + us(age | Subject)", d, mj.priors(sd=mj.prior.normal(0, 1))),
         "half_normal"),
        (lambda d: mj.bayes_mmrm("distance ~ age + us(age | Subject)", d, method="no"), "method must be"),
        (lambda d: mj.bayes_mmrm("distance ~ age + (1 | Subject)", d), "random effect"),
    ],
)  # fmt: skip
def test_what_is_refused(ask, message):
    with pytest.raises(ValueError, match=message):
        ask(table("Orthodont"))


def test_distances_without_one_correlation_are_refused():
    design = mj.Design(
        y=np.arange(12.0) % 5, X=np.ones((12, 1)), terms=(),
        residual=mj.design.ResidualTerm("ar1", np.repeat(np.arange(4), 3), np.tile([0, 2, 5], 4)),
    )  # fmt: skip
    with pytest.raises(ValueError, match="take 'car1'"):
        mj.priors().resolve(design)


def test_priors_of_another_model_are_refused(x64):
    """What a density does not ask of its coordinates would be left aside in silence."""
    record = fit_of("dispersion").record
    model = mj.priors().resolve(record.given, record.labels)
    plain = replace(record.given, dispersion=None)
    z = np.zeros(model.dim)
    with pytest.raises(ValueError, match="of another model"):
        mj.log_posterior(z, mj.cross_products(plain), model)
    with pytest.raises(ValueError, match="of another model"):
        mj.log_posterior(np.zeros(3), record.given, mj.priors().resolve(plain))


def test_draws_from_priors_of_residuals():
    """Second moments of responses drawn from the prior at given parameters are those of the model."""
    rng = np.random.default_rng(0)
    n = 12
    group, time = np.repeat(np.arange(3), 4), np.tile([0, 1, 2, 4], 3)
    design = mj.Design(
        y=rng.normal(size=n), X=np.ones((n, 1)), terms=(mj.RandomTerm(np.ones((n, 1)), group, 3),),
        dispersion=rng.normal(size=(n, 1)), residual=mj.design.ResidualTerm("ar1", group, time),
    )  # fmt: skip
    model = mj.priors().resolve(design, defaults=mj.default_priors(design, weak=True))
    z, beta = draw_parameters(model, 1, rng)
    S = 20_000
    y, _ = respond(design, model, np.repeat(z, S, 0), np.repeat(beta, S, 0), rng)
    noise = noise_of(design, model, z)
    sd = noise.sd(design)[0]
    V = np.outer(sd, sd) * correlation_of(design).matrix(float(noise.rho[0]), np.arange(n))
    V = V + dense.covariance(design, [np.exp(2 * z[0, :1, None])], 0.0)
    error = np.sqrt((np.outer(V.diagonal(), V.diagonal()) + V**2) / S)
    assert (np.abs(np.cov(y.T) - V) < 5 * error).all()


def test_rows_in_another_order(x64):
    record = fit_of("car1 and dispersion").record
    design = record.given
    model = mj.priors().resolve(design)
    z = 0.2 * np.random.default_rng(0).normal(size=model.dim)
    order = np.random.default_rng(1).permutation(len(design.y))
    residual = replace(design.residual, group=design.residual.group[order], time=design.residual.time[order])
    moved = replace(
        design, y=design.y[order], X=design.X[order], dispersion=design.dispersion[order], residual=residual
    )
    found = float(mj.log_posterior(z, moved, mj.priors().resolve(moved)))
    assert found == pytest.approx(float(mj.log_posterior(z, design, model)), rel=1e-11)


def test_visit_rows_are_those_of_the_fit():
    record = mj.mmrm("distance ~ age + us(age | Subject)", table("Orthodont")).record
    sums = VisitSums.of(visit_rows(record.design))
    assert np.asarray(sums.moments).shape == (1, 4, 4, 3, 3)
