"""Posteriors of generalised linear mixed models: against a sampler of all random effects, and integrals on grids."""

import itertools
import warnings
from dataclasses import replace

import jax
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import table
from scipy.special import expit, gammaln

import mixjax as mj
from mixjax.engine.family_draws import FamilyTarget, Place, effects_at, left_out, log_densities_by_level
from mixjax.sampling.density import density as plain_density
from mixjax.sampling.density import log_prior, place_of
from mixjax.sampling.laplace_shift import LaplaceShift

CBPP = "incidence ~ period + (1 | herd)"


def no_warnings(call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mj.InferenceWarning)
        return call()


def of_cbpp(**options):
    return mj.bayes(CBPP, table("cbpp"), family="binomial", size="size", key=1, **options)


@pytest.fixture(scope="module")
def cbpp():
    return of_cbpp(method="importance")


# blackjax's NUTS over all random effects, non-centred, 4 chains of 10 000 draws, the same priors
# (benchmarks/bayes_glmm.py): mean, sd.
FULL = {
    "Intercept": (-1.4016, 0.2589),
    "period[T.2]": (-0.9938, 0.3092),
    "period[T.3]": (-1.1350, 0.3335),
    "period[T.4]": (-1.6110, 0.4389),
    "sd_Intercept|herd": (0.7566, 0.2234),
}
FULL_TICKS = {
    "Intercept": (0.4937, 0.1931),
    "YEAR[T.96]": (1.1481, 0.2527),
    "YEAR[T.97]": (-1.0066, 0.2790),
    "cHEIGHT": (-0.0240, 0.00315),
    "sd_Intercept|BROOD": (0.9949, 0.0924),
}


def check(found, full, shifts):
    """Means within Monte Carlo error once Laplace's shift, which is said, is taken away; sds within theirs."""
    for name, (mean, sd) in full.items():
        error = 4.0 * sd / np.sqrt(found.loc[name, "ess_bulk"]) + 0.02 * sd
        assert found.loc[name, "mean"] + shifts[name] * sd == pytest.approx(mean, abs=error)
        assert found.loc[name, "sd"] == pytest.approx(sd, rel=0.08)


def test_cbpp_against_all_effects_sampled(cbpp):
    check(cbpp.summary(), FULL, cbpp.laplace_check().table["shift"])
    assert cbpp.names == tuple(FULL)
    assert cbpp.laplace_check().khat < 0.5
    assert 0.01 < cbpp.laplace_check().table.loc["sd_Intercept|herd", "shift"] < 0.07
    assert "largest shift of a mean 0.0" in repr(cbpp)
    assert cbpp.problems() == []


def test_the_no_u_turn_sampler_on_ticks():
    """A Poisson model with 118 broods; the shift of Laplace's approximation is found by weights."""
    pytest.importorskip("blackjax")
    data = table("grouseticks")
    post = mj.bayes("TICKS ~ YEAR + cHEIGHT + (1 | BROOD)", data.assign(YEAR=data["YEAR"].astype(str)),
                    family="poisson", key=1)  # fmt: skip
    check(post.summary(), FULL_TICKS, post.laplace_check().table["shift"])
    assert post.sampling.divergences == 0
    assert (post.summary()["ess_bulk"] > 2500).all()


def test_quadrature_in_place_of_laplace():
    post = of_cbpp(nagq=9, method="importance")
    check(post.summary(), FULL, dict.fromkeys(FULL, 0.0))
    assert "integrated out by 9 nodes an effect" in repr(post)
    with pytest.raises(ValueError, match="no approximation to check"):
        post.laplace_check()


# --- densities -------------------------------------------------------------------------------------------------------


def one_factor(family="binomial", q=1, seed=0):
    rng = np.random.default_rng(seed)
    n, m = 24, 6
    group = np.repeat(np.arange(m), 4)
    Z = np.column_stack([np.ones(n), rng.normal(size=n)])[:, :q]
    X = np.column_stack([np.ones(n), rng.normal(size=n)])
    y = rng.integers(0, 2, n) if family == "binomial" else rng.poisson(2.0, n)
    return mj.Design(y=y.astype(float), X=X, terms=(mj.RandomTerm(Z, group, m),), offset=0.1 * rng.normal(size=n))


def crossed(seed=1):
    rng = np.random.default_rng(seed)
    n = 14
    a, b = rng.integers(0, 3, n), rng.integers(0, 2, n)
    a[:3], b[:4] = [0, 1, 2], [0, 1, 0, 1]
    ones = np.ones((n, 1))
    y = rng.integers(0, 2, n).astype(float)
    return mj.Design(y=y, X=ones, terms=(mj.RandomTerm(ones, a, 3), mj.RandomTerm(ones, b, 2)))


@pytest.mark.parametrize("nagq", [1, 7])
def test_the_density_is_likelihood_and_priors(nagq, x64):
    """Of all parts by what is public, the negative binomial's size among them."""
    design = one_factor("nbinom")
    data = mj.rows(design, "nbinom")
    model = mj.priors(family=mj.prior.log_normal(1.0, 1.5)).resolve(design, family="nbinom")
    z = np.array([-0.4, 0.8, 0.3, -0.2])  # log sd, log size, the mean of the predictor, a slope
    beta = np.array([0.3 + 0.2 * design.X[:, 1].mean(), -0.2])
    p = mj.GLMMParams(beta=beta, chol=(np.array([-0.4]),), psi=np.array([0.8]))
    loglik = float(mj.glmm_loglik(p, data, nagq))
    found = float(plain_density(z, FamilyTarget(data, nagq), model))
    assert found == pytest.approx(loglik + float(log_prior(z, model)), rel=1e-12)
    own = mj.default_priors(design, family="nbinom")
    by_hand = float(own.sd.log_prob(np.exp(-0.4))) - 0.4
    by_hand += scipy.stats.lognorm(1.5, scale=np.e).logpdf(np.exp(0.8)) + 0.8
    by_hand += float(own.intercept.log_prob(0.3))
    assert float(log_prior(z, model)) == pytest.approx(by_hand, rel=1e-12)
    if nagq == 1:
        assert float(mj.log_posterior(z, data, model)) == pytest.approx(found, rel=1e-12)


def test_gradients_against_differences(x64):
    design = one_factor(q=2)
    data, model = FamilyTarget(mj.rows(design, "binomial")), mj.priors().resolve(design, family="binomial")
    density = jax.jit(plain_density)
    z = np.array([-0.3, 0.2, 0.4, -0.5, 0.3])
    gradient = np.asarray(jax.jit(jax.grad(plain_density))(z, data, model))
    for i, step in itertools.product(range(5), [1e-5]):
        e = np.zeros(5)
        e[i] = step
        slope = (float(density(z + e, data, model)) - float(density(z - e, data, model))) / (2 * step)
        assert gradient[i] == pytest.approx(slope, rel=1e-6, abs=1e-7)


def stacked(*places):
    return jax.tree.map(lambda *own: np.stack(own), *places)


def binary_grid(design, sds, beta, size=61, reach=5.0):
    """All random effects of a binary model on a grid: points ``(G, N)`` and the logs of density times cell."""
    N = sum(t.n_groups for t in design.terms)
    sd = np.concatenate([np.full(t.n_groups, s) for t, s in zip(design.terms, sds, strict=True)])
    axis, step = np.linspace(-reach, reach, size, retstep=True)
    u = np.stack(np.meshgrid(*[axis] * N, indexing="ij"), -1).reshape(-1, N)
    at, start = [], 0
    for term in design.terms:
        at.append(start + term.group)
        start += term.n_groups
    eta = (design.X @ beta)[None] + sum((u * sd)[:, own] for own in at)
    p = expit(np.where(design.y == 1, eta, -eta))
    logs = np.log(p).sum(1) - 0.5 * (u**2).sum(1) + N * np.log(step / np.sqrt(2 * np.pi))
    return u * sd, logs


def test_crossed_effects_against_a_grid(x64):
    """Five effects of two crossed factors: what Laplace leaves out, and the effects' own distribution."""
    design = crossed()
    rows, beta, sds = mj.rows(design, "binomial"), np.array([0.3]), (1.6, 1.1)
    b, logs = binary_grid(design, sds, beta, size=19)
    exact = np.logaddexp.reduce(logs)
    w = np.exp(logs - exact)
    mean, second = w @ b, w @ b**2
    place = Place([np.array([[s]]) for s in sds], beta, np.zeros(0))
    params = mj.GLMMParams(beta=beta, chol=tuple(np.log([s]) for s in sds))
    laplace = float(mj.glmm_loglik(params, rows))
    missing = left_out(stacked(place), jax.random.key(0), rows, False)
    assert abs(exact - laplace) > 0.02  # there is something to find
    assert float(missing.difference[0]) == pytest.approx(exact - laplace, abs=4 * float(missing.error[0]) + 1e-3)
    assert float(missing.error[0]) < 0.02
    S = 8000
    drawn = effects_at(stacked(*[place] * S), jax.random.split(jax.random.key(1), S), rows)
    found = np.concatenate([np.asarray(own)[..., 0] for own in drawn], axis=1)
    sd = np.sqrt(second - mean**2)
    assert (np.abs(found.mean(0) - mean) < 5 * sd / np.sqrt(S)).all()
    assert (np.abs(found.std(0) / sd - 1) < 5 / np.sqrt(S)).all()


def test_effects_and_levels_of_one_factor_against_integrals(x64):
    """Level by level: four binary rows each, far from normal."""
    design = one_factor()
    rows, beta, sd, S = mj.rows(design, "binomial"), np.array([0.4, -0.7]), 2.5, 8000
    place = Place([np.array([[sd]])], beta, np.zeros(0))
    drawn = effects_at(stacked(*[place] * S), jax.random.split(jax.random.key(0), S), rows)
    found = np.asarray(drawn[0])[..., 0]
    u = np.linspace(-8, 8, 4001)
    eta = (design.offset + design.X @ beta)[:, None] + sd * u
    logs = np.log(expit(np.where(design.y[:, None] == 1, eta, -eta)))
    each = []
    for level in range(6):
        own = logs[design.terms[0].group == level].sum(0) + scipy.stats.norm.logpdf(u)
        total = np.logaddexp.reduce(own) + np.log(u[1] - u[0])
        w = np.exp(own - np.logaddexp.reduce(own))
        mean, spread = w @ (sd * u), np.sqrt(w @ (sd * u) ** 2 - (w @ (sd * u)) ** 2)
        assert abs(found[:, level].mean() - mean) < 5 * spread / np.sqrt(S)
        assert abs(found[:, level].std() / spread - 1) < 5 / np.sqrt(S)
        skew = w @ ((sd * u - mean) / spread) ** 3
        assert scipy.stats.skew(found[:, level]) == pytest.approx(skew, abs=0.15)
        each.append(total)
    by_level = np.asarray(log_densities_by_level(stacked(place), rows, 25))[0]
    assert np.allclose(by_level, each, atol=2e-5)
    params = mj.GLMMParams(beta=beta, chol=(np.log([sd]),))
    laplace = np.asarray(log_densities_by_level(stacked(place), rows, 1))[0]
    assert laplace.sum() == pytest.approx(float(mj.glmm_loglik(params, rows)), rel=1e-11)
    missing = left_out(stacked(place), jax.random.key(0), rows, True)
    assert float(missing.difference[0]) == pytest.approx(sum(each) - laplace.sum(), abs=1e-4)


def test_two_effects_a_level(x64):
    """Correlated slopes: densities by level add up, by quadrature too."""
    design = one_factor("poisson", q=2)
    rows, beta = mj.rows(design, "poisson"), np.array([0.4, -0.2])
    F = np.array([[0.8, 0.0], [0.3, 0.5]])
    params = mj.GLMMParams(beta=beta, chol=(np.array([np.log(0.8), 0.3, np.log(0.5)]),))
    for nodes in (1, 7):
        found = np.asarray(log_densities_by_level(stacked(Place([F], beta, np.zeros(0))), rows, nodes))[0]
        assert found.sum() == pytest.approx(float(mj.glmm_loglik(params, rows, nodes)), rel=1e-10)


# --- what comes of draws ---------------------------------------------------------------------------------------------


def test_random_effects(cbpp):
    fit = mj.glmm(CBPP, table("cbpp"), family="binomial", size="size")
    effects, modes = cbpp.ranef()["herd"], fit.ranef()["herd"]
    assert (np.abs(effects - modes) < 0.4 * cbpp.ranef("sd")["herd"]).all(axis=None)
    assert cbpp.b["herd"].shape == (4, 1000, 15, 1)
    # Draws belong to the draws of the parameters: effects spread as their sd says.
    sd = cbpp.draws[..., -1].ravel()
    spread = cbpp.b["herd"].reshape(4000, 15).std(axis=1)
    assert np.corrcoef(sd, spread)[0, 1] > 0.6
    assert cbpp.Sigma["herd"].shape == (4, 1000, 1, 1)


def test_predictions(cbpp):
    fit = mj.glmm(CBPP, table("cbpp"), family="binomial", size="size")
    rows = cbpp.predict()
    assert np.allclose(rows["mean"], fit.predict(), atol=0.05)
    link = cbpp.predict(scale="link", draws=True)
    assert np.allclose(cbpp.predict(draws=True), expit(link), rtol=1e-12)
    # A new herd: more spread than a known one, and the mean over herds rather than the median one's.
    new = {"period": ["1", "1"], "herd": ["1", "none"]}
    found = cbpp.predict(new, allow_new_levels=True)
    assert found["sd"].iloc[1] > 1.3 * found["sd"].iloc[0]
    average = fit.predict({"period": ["1"]}, integrate=True)
    assert found["mean"].iloc[1] == pytest.approx(float(average.iloc[0]), abs=0.02)
    whole = cbpp.predict(interval="prediction")
    assert (whole["sd"] > rows["sd"]).all()
    size = table("cbpp")["size"].to_numpy()
    drawn = cbpp.simulate(key=4)
    assert drawn.shape == (4000, 56)
    assert (drawn >= 0).all()
    assert (drawn <= size).all()
    assert np.allclose((drawn / size).mean(0), rows["mean"], atol=0.02)
    assert np.allclose((drawn / size).std(0), whole["sd"], rtol=0.1)
    fresh = cbpp.simulate(500, random="new")
    assert (fresh / size).std(0).mean() > 1.1 * (drawn / size).std(0).mean()
    for ask, message in (
        (lambda: cbpp.predict(scale="odds"), "scale must be"),
        (lambda: cbpp.predict(interval="prediction", scale="link"), "scale of the response"),
        (lambda: cbpp.predict(size=3), "numbers of trials of new"),
        (lambda: cbpp.predict(interval=None), "interval must be"),
        (lambda: cbpp.predict(new), "none"),
        (lambda: cbpp.simulate(random="old"), "random must be"),
    ):
        with pytest.raises(ValueError, match=message):
            ask()


def test_left_out(cbpp):
    log_lik = cbpp.log_lik()[0, 3]
    data = table("cbpp")
    p = cbpp.predict(draws=True)[3]
    exact = scipy.stats.binom.logpmf(data["incidence"], data["size"], p)
    assert np.allclose(log_lik, exact, rtol=1e-9)
    by = no_warnings(lambda: cbpp.loo(by="herd"))
    assert len(by.pointwise) == 15
    assert by.n_bad == 0
    assert no_warnings(cbpp.loo).p_loo > by.p_loo
    with pytest.raises(ValueError, match="grouping factor of the model, 'herd'"):
        cbpp.loo(by="period")


def test_levels_left_out_against_refits(cbpp):
    """elpd of a herd is log p(y) - log p(y without it); here by importance over the posterior without it."""
    data = table("cbpp")
    found = no_warnings(lambda: cbpp.loo(by="herd")).pointwise["elpd"]
    without = data[data["herd"].astype(str) != "1"]
    own = mj.priors(intercept=cbpp.priors.intercept, sd=cbpp.priors.sd)
    post = mj.bayes(CBPP, without, own, family="binomial", size="size", method="importance", key=3)
    rows = cbpp._rows
    places = jax.vmap(lambda z: place_of(z, post.model))
    with jax.enable_x64():
        draws = np.asarray(log_densities_by_level(places(post._z), rows, 25))
    level = list(cbpp.labels.terms[0].levels).index("1")
    exact = np.logaddexp.reduce(draws[:, level]) - np.log(len(draws))
    assert found.loc["1"] == pytest.approx(exact, abs=0.08)


@pytest.mark.filterwarnings("ignore:.*ArviZ is undergoing")
def test_inference_data(cbpp):
    pytest.importorskip("arviz")
    data = cbpp.to_arviz(log_likelihood=True, predictive=True)
    assert set(cbpp.names) <= set(data.posterior.data_vars)
    assert data.posterior["b_herd"].shape == (4, 1000, 15, 1)
    assert data.posterior_predictive["incidence"].shape == (4, 1000, 56)
    assert cbpp.plot("forest") is not None


def test_parameters_of_families():
    """Extra zeros, a size, and a dispersion that depends on a column: names, supports, means near the estimates."""
    rng = np.random.default_rng(3)
    n = 300
    group = np.repeat(np.arange(30), 10)
    x = rng.normal(size=n)
    mu = np.exp(1.0 + 0.4 * x + 0.5 * rng.normal(size=30)[group])
    y = rng.negative_binomial(3.0, 3.0 / (3.0 + mu)) * (rng.random(n) > 0.25)
    data = pd.DataFrame({"y": y, "x": x, "g": group})
    post = mj.bayes("y ~ x + (1 | g)", data, family="nbinom", ziformula="~ 1", method="importance", draws=250, key=1)
    fit = mj.glmm("y ~ x + (1 | g)", data, family="nbinom", ziformula="~ 1")
    est = fit.record.parameters
    found = post.summary()
    assert post.names[3:] == ("size", "zi~Intercept")
    for name, value in zip(est.names, est.estimate, strict=True):
        assert abs(found.loc[name, "mean"] - value) < 0.8 * found.loc[name, "sd"], name
    assert np.allclose(post.predict()["mean"], fit.predict(), rtol=0.15)
    assert (post.simulate(50) == 0).mean() == pytest.approx((y == 0).mean(), abs=0.05)
    assert post.log_lik().shape == (4, 250, 300)


@pytest.mark.parametrize("family", [mj.families.gamma(), mj.families.gaussian("log"), mj.families.beta()], ids=str)
def test_priors_of_family_parameters(family, x64):
    rng = np.random.default_rng(0)
    design = one_factor("poisson")
    design = replace(design, y=rng.uniform(0.2, 0.8, 24))
    model = mj.priors().resolve(design, family=family)
    assert model.dim == 4
    assert model.others[0].kind == "positive"
    assert np.isfinite(float(mj.log_posterior(np.zeros(4), mj.rows(design, family), model)))
    dispersed = replace(design, psi_columns=(design.X,))
    own = mj.priors(dispersion=mj.prior.normal(0, 2)).resolve(dispersed, family=family)
    assert own.dim == 5
    assert [one.kind for one in own.others] == ["real", "real"]
    assert np.isfinite(float(mj.log_posterior(np.zeros(5), mj.rows(dispersed, family), own)))


def test_default_priors_are_those_of_brms():
    design = one_factor()
    assert repr(mj.default_priors(design, family="binomial").intercept) == "student_t(3, 0, 2.5)"
    ticks = mj.build_design("TICKS ~ cHEIGHT + (1 | BROOD)", table("grouseticks"))[0]
    eta = np.log(np.asarray(ticks.y) + 0.1)
    found = mj.default_priors(ticks, family="poisson")
    assert found.intercept.loc == pytest.approx(np.median(eta), abs=0.1)
    assert found.sigma is None
    assert mj.default_priors(design, weak=True, family="binomial").beta[1].proper


# --- what is refused or warned of ------------------------------------------------------------------------------------


def test_separated_fixed_effects_need_priors():
    rng = np.random.default_rng(0)
    x = np.repeat([0.0, 1.0], 30)
    y = np.where(x == 1, 1, rng.integers(0, 2, 60))
    data = pd.DataFrame({"y": y, "x": x, "g": np.tile(np.arange(10), 6)})
    with pytest.raises(ValueError, match=r"flat priors.*give beta= a prior"):
        mj.bayes("y ~ x + (1 | g)", data, family="binomial")
    own = mj.priors(beta=mj.prior.normal(0, 2.5))
    post = mj.bayes("y ~ x + (1 | g)", data, own, family="binomial", method="importance", key=1)
    assert 1.5 < post.summary().loc["x", "mean"] < 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 1.0}, "sigma= is for linear mixed models"),
        ({"dispersion": "~ period"}, "dispersion= is for linear mixed models"),
        ({"residual": "ar1(period | herd)"}, "residual= is for linear mixed models"),
        ({"priors": mj.priors(sigma=mj.prior.half_normal(1))}, "no residual standard deviation"),
        ({"priors": mj.priors(family=mj.prior.log_normal(0, 1))}, "no parameters of its family"),
        ({"priors": mj.priors(sd=mj.prior.normal(0, 1))}, "half_normal"),
        ({"priors": mj.priors(beta=mj.prior.half_normal(1))}, "use flat, normal"),
        ({"nagq": 0}, "nagq must be a whole number"),
        ({"method": "laplace"}, "method must be"),
        ({"family": "nonsense"}, "nonsense"),
        ({"dispformula": "~ period"}, "dispformula"),
    ],
)
def test_bad_arguments(options, message):
    options = {"family": "binomial", "size": "size", **options}
    with pytest.raises(ValueError, match=message):
        mj.bayes(CBPP, table("cbpp"), **options)


@pytest.mark.parametrize("option", ["link", "size", "ziformula", "dispformula"])
def test_what_belongs_to_families_is_refused_without_one(option):
    with pytest.raises(ValueError, match=f"{option}= belongs to generalised models"):
        mj.bayes("Yield ~ 1 + (1 | Batch)", table("Dyestuff"), **{option: "~ 1"})
    with pytest.raises(ValueError, match="nagq= belongs"):
        mj.bayes("Yield ~ 1 + (1 | Batch)", table("Dyestuff"), nagq=5)


def test_smooths_are_refused():
    with pytest.raises(ValueError, match=r"smooth, s\(cHEIGHT\).*mixjax.glmm"):
        mj.bayes("TICKS ~ s(cHEIGHT) + (1 | BROOD)", table("grouseticks"), family="poisson")


def test_crossed_factors_have_no_quadrature():
    data = table("grouseticks")
    with pytest.raises(ValueError, match="one grouping factor"):
        mj.bayes("TICKS ~ 1 + (1 | BROOD) + (1 | YEAR)", data, family="poisson", nagq=5)


def test_too_many_crossed_effects_are_refused(monkeypatch):
    monkeypatch.setattr("mixjax.sampling.bayes_glmm.MOST_DENSE_DRAWS", 2)
    with pytest.raises(ValueError, match="3 random effects beside"):
        mj.bayes("TICKS ~ 1 + (1 | BROOD) + (1 | YEAR)", table("grouseticks"), family="poisson")


def test_what_a_generalised_posterior_has_not(cbpp):
    for ask, message in ((lambda: cbpp.sigma, "no sigma"), (lambda: cbpp.reml_fit, "ml_fit")):
        with pytest.raises(ValueError, match=message):
            ask()
    assert cbpp.ml_fit.family.name == "binomial"


def test_what_is_said_of_laplace():
    """Shifts, weights that cannot be trusted, errors that hide all: each has its sentence."""
    frame = pd.DataFrame({"shift": [0.02, -0.3], "sd_ratio": [1.0, 1.1]}, index=["a", "b"])
    bad = LaplaceShift(frame, 0.2, 500, "quadrature", 25, 0.0)
    assert "shifts a mean by 0.30" in bad.problem
    assert "nagq=9" in bad.problem
    assert "of b" in bad.note
    heavy = replace(bad, khat=0.9, method="importance sampling")
    assert "0.90" in heavy.problem
    assert "brms" in heavy.problem
    assert "could not be checked" in replace(heavy, error=1.0).problem
    assert "could not be checked" in replace(heavy, error=1.0).note
    assert replace(bad, table=frame * 0.1).problem is None


def test_laplace_is_far_off_with_few_binary_rows():
    """Two binary rows a level: Laplace's approximation is known to be wrong there, and the check says so."""
    rng = np.random.default_rng(5)
    group = np.repeat(np.arange(60), 2)
    y = rng.random(120) < expit(2.5 * rng.normal(size=60))[group]
    data = pd.DataFrame({"y": y * 1, "g": group})
    post = no_warnings(lambda: mj.bayes("y ~ 1 + (1 | g)", data, family="binomial", method="importance", key=1))
    shift = post.laplace_check().table.loc["sd_Intercept|g", "shift"]
    assert abs(shift) > 0.2
    assert "shifts a mean" in " ".join(post.problems())
    # By draws of the effects, as where there is no quadrature, the same is found.
    with jax.enable_x64():
        places = jax.vmap(lambda z: place_of(z, post.model))(post._z[:4])
        drawn = left_out(places, jax.random.key(0), post._rows, False)
        exact = left_out(places, jax.random.key(0), post._rows, True)
    away = np.asarray(drawn.difference - exact.difference)
    assert (np.abs(away) < 5 * np.asarray(drawn.error) + 0.05).all()


def test_a_density_by_hand(x64):
    """Poisson with one effect a level: Laplace's approximation from its definition."""
    design = one_factor("poisson")
    rows, beta, sd = mj.rows(design, "poisson"), np.array([0.5, 0.1]), 0.7
    found = np.asarray(log_densities_by_level(stacked(Place([np.array([[sd]])], beta, np.zeros(0))), rows, 1))[0]
    for level in range(6):
        at = design.terms[0].group == level
        y, base = design.y[at], (design.offset + design.X @ beta)[at]
        b = 0.0
        for _ in range(50):
            mu = np.exp(base + b)
            b += ((y - mu).sum() - b / sd**2) / (mu.sum() + 1 / sd**2)
        mu = np.exp(base + b)
        exact = (y * (base + b) - mu - gammaln(y + 1)).sum() - 0.5 * b**2 / sd**2
        exact -= 0.5 * np.log(1 + sd**2 * mu.sum())
        assert found[level] == pytest.approx(exact, rel=1e-10)
