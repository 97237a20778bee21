"""Posteriors: draws against quadrature, the table of other programs, dense conditional distributions."""

import warnings
from dataclasses import replace

import dense
import jax
import numpy as np
import pandas as pd
import pytest
from conftest import table
from designs import STRUCTURES, random_design

import mixjax as mj
from mixjax.products.sums import pad
from mixjax.sampling import effects, importance, sbc
from mixjax.sampling.convergence import ess, ess_bulk, ess_tail, rhat
from mixjax.sampling.density import look
from mixjax.sampling.effects import draw_effects
from mixjax.sampling.mode import mode
from mixjax.sampling.psis import generalised_pareto, smoothed
from mixjax.simulation import random_columns

SLEEP = "Reaction ~ Days + (Days | Subject)"
DYE = "Yield ~ 1 + (1 | Batch)"
FLAT = mj.priors(intercept=mj.prior.flat())


def no_warnings(call):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mj.InferenceWarning)
        return call()


@pytest.fixture(scope="module")
def sleep():
    """sleepstudy's posterior by importance, which compiles little."""
    return mj.bayes(SLEEP, table("sleepstudy"), method="importance", key=1)


# Posterior means and standard deviations under brms's default priors: NUTS of blackjax and of numpyro over the marginal
# likelihood, NUTS over all random effects, and brms as published agree on these within Monte Carlo error (each has an
# effective size of 1 000 to 3 300).
TABLE = {
    "Intercept": (251.17, 7.47),
    "Days": (10.41, 1.71),
    "sd_Intercept|Subject": (26.95, 6.80),
    "sd_Days|Subject": (6.58, 1.55),
    "cor_Days.Intercept|Subject": (0.10, 0.30),
    "sigma": (25.90, 1.54),
}


def check_table(post):
    found = post.summary()
    for name, (mean, sd) in TABLE.items():
        # 0.03 sd of theirs, 0.02 of ours, rounding; four times.
        assert found.loc[name, "mean"] == pytest.approx(mean, abs=0.15 * sd + 0.01)
        assert found.loc[name, "sd"] == pytest.approx(sd, rel=0.12)


def test_importance_on_sleepstudy(sleep):
    check_table(sleep)
    assert sleep.sampling.khat < 0.5
    assert sleep.shape == (4, 1000)
    assert sleep.problems() == []
    assert "importance sampling; Pareto k-hat" in repr(sleep)


def test_the_no_u_turn_sampler_on_sleepstudy():
    pytest.importorskip("blackjax")
    post = mj.bayes(SLEEP, table("sleepstudy"), key=1)
    check_table(post)
    found = post.summary()
    assert post.sampling.divergences == 0
    assert (found["rhat"] < 1.01).all()
    assert (found["ess_bulk"] > 2500).all()
    assert "no divergences" in repr(post)
    again = no_warnings(lambda: mj.bayes(SLEEP, table("sleepstudy"), key=1, draws=150))
    assert np.array_equal(again.z, post.z[:, :150])  # how many are drawn changes none
    other = no_warnings(lambda: mj.bayes(SLEEP, table("sleepstudy"), key=2, draws=150))
    assert not np.array_equal(other.z, again.z)


def grid_of(design, priors, n=240):
    """Weights of the posterior of (log sd, log sigma) on a grid, and the log of their sum."""
    model, stats = priors.resolve(design), pad(mj.cross_products(design))
    assert model.dim == 2
    a, b = np.linspace(-6.0, 9.0, n), np.linspace(2.5, 6.5, n)
    z = np.stack(np.meshgrid(a, b, indexing="ij"), -1).reshape(-1, 2)
    with jax.enable_x64():
        value = np.concatenate([np.asarray(look(part, stats, model).value) for part in np.array_split(z, 8)])
    return z, value, np.logaddexp.reduce(value)


def test_importance_against_quadrature():
    design, _ = mj.build_design(DYE, table("Dyestuff"))
    z, value, total = grid_of(design, FLAT)
    w = np.exp(value - total)
    post = mj.bayes(DYE, table("Dyestuff"), FLAT, method="importance", draws=4000, key=3)
    order = np.argsort(z[:, 0])
    quantile = np.interp([0.05, 0.5, 0.95], np.cumsum(w[order]), z[order, 0])
    assert np.allclose(np.quantile(post.z[..., 0], [0.05, 0.5, 0.95]), quantile, atol=[0.12, 0.04, 0.04])
    assert post.sigma.mean() == pytest.approx(w @ np.exp(z[:, 1]), rel=0.01)
    # The intercept was integrated out, and drawn afterwards.
    assert post.beta.mean() == pytest.approx(table("Dyestuff")["Yield"].mean(), abs=1.0)


def test_levels_left_out_against_quadrature():
    """elpd of a batch is log p(y) - log p(y without it), both integrals on a grid: what refits would give."""
    data = table("Dyestuff")
    design, labels = mj.build_design(DYE, data)
    own = mj.default_priors(design)
    own = mj.priors(intercept=mj.prior.flat(), sd=own.sd, sigma=own.sigma)
    _, _, total = grid_of(design, own)
    post = mj.bayes(DYE, data, own, method="importance", draws=8000, key=2)
    found = no_warnings(lambda: post.loo(by="Batch"))
    group = design.terms[0].group
    for level in range(6):
        at = group != level
        term = replace(design.terms[0], Z=design.terms[0].Z[at], group=group[at])
        left = replace(design, y=design.y[at], X=design.X[at], terms=(term,))
        exact = total - grid_of(left, own)[2]
        assert found.pointwise["elpd"].iloc[level] == pytest.approx(exact, abs=0.06)
    assert list(found.pointwise.index) == list(labels.terms[0].levels)


# --- random effects --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["crossed", "nested and crossed", "one factor, q=2, weights"])
def test_joint_draws_of_effects_against_the_dense_distribution(name):
    design = random_design(STRUCTURES[name], 3)
    rng = np.random.default_rng(5)
    S, sigma, beta = 20_000, 0.8, np.array([0.5, -0.4])
    roots = [np.tril(rng.normal(size=(t.Z.shape[1],) * 2)) for t in design.terms]
    drawn = draw_effects(
        design,
        [np.repeat(L[..., None], S, -1) for L in roots],
        np.full(S, sigma),
        np.tile(beta, (S, 1)),
        np.random.default_rng(1),
    )
    b = np.concatenate([own.reshape(S, -1) for own in drawn], axis=1)
    Z = random_columns(design).toarray()
    prior = np.zeros((Z.shape[1],) * 2)
    at = 0
    for term, L in zip(design.terms, roots, strict=True):
        block = np.kron(np.eye(term.n_groups), L @ L.T)
        prior[at : at + len(block), at : at + len(block)] = block
        at += len(block)
    V = dense.covariance(design, [L @ L.T for L in roots], sigma)
    gain = np.linalg.solve(V, Z @ prior).T
    mean = gain @ (design.y - design.offset - design.X @ beta)
    covariance = prior - gain @ Z @ prior
    sd = np.sqrt(covariance.diagonal())
    assert (np.abs(b.mean(0) - mean) < 5 * sd / np.sqrt(S)).all()
    error = np.sqrt((np.outer(sd, sd) ** 2 + covariance**2) / S)
    assert (np.abs(np.cov(b.T) - covariance) < 5.5 * error).all()


def test_effects_at_each_draw_one_by_one_are_those_of_lanes(monkeypatch):
    """Where lanes do not serve, as beside many crossed effects."""
    design = random_design(STRUCTURES["crossed"], 3)
    rng = np.random.default_rng(0)
    factors = [np.tril(rng.normal(size=(20, q, q))).transpose(1, 2, 0) for q in (2, 1)]
    args = design, factors, rng.uniform(0.5, 2, 20), rng.normal(size=(20, 2))
    lanes = draw_effects(*args, np.random.default_rng(1))
    monkeypatch.setattr(effects, "has_lanes", lambda *_: False)
    single = draw_effects(*args, np.random.default_rng(1))
    for a, b in zip(lanes, single, strict=True):
        assert np.allclose(a, b, rtol=1e-7, atol=1e-9)


def test_modes_of_random_effects(sleep):
    means, sds = sleep.ranef()["Subject"], sleep.ranef("sd")["Subject"]
    blup = mj.lmm(SLEEP, table("sleepstudy")).ranef()["Subject"]
    assert list(means.columns) == ["Intercept", "Days"]
    assert (np.abs(means - blup) < 0.25 * sds).all(axis=None)
    assert sleep.b["Subject"].shape == (4, 1000, 18, 2)
    with pytest.raises(ValueError, match="'mean' or 'sd'"):
        sleep.ranef("median")


# --- what comes of draws ---------------------------------------------------------------------------------------------


def test_predictions(sleep):
    rows = sleep.predict()
    fit = mj.lmm(SLEEP, table("sleepstudy"))
    assert np.allclose(rows["mean"], fit.predict(), atol=3.0)
    new = {"Days": [0.0, 10.0, 3.0], "Subject": ["308", "nobody", "309"]}
    found = sleep.predict(new, allow_new_levels=True, interval="prediction")
    other = fit.predict(new, allow_new_levels=True, interval="prediction")
    assert np.allclose(found["mean"], other["estimate"], atol=4.0)
    assert np.allclose(found["sd"], other["std_error"], rtol=0.15)
    assert (found["lower"] < found["mean"]).all()
    population = sleep.predict({"Days": [0.0, 10.0]}, random=False)
    assert population["mean"].iloc[0] == pytest.approx(sleep.beta[..., 0].mean(), rel=1e-12)
    assert sleep.predict(new, allow_new_levels=True, draws=True).shape == (4000, 3)
    with pytest.raises(ValueError, match="nobody"):
        sleep.predict(new)
    with pytest.raises(ValueError, match="'confidence' or 'prediction'"):
        sleep.predict(interval=None)


def test_posterior_predictive_responses(sleep):
    y = table("sleepstudy")["Reaction"].to_numpy()
    fitted, new = sleep.simulate(key=5), sleep.simulate(random="new", key=5)
    assert fitted.shape == new.shape == (4000, 180)
    assert fitted.mean(0) == pytest.approx(sleep.predict()["mean"].to_numpy(), abs=3.0)
    # New subjects differ by their own effects, rows of one subject alike.
    sigma2 = float((sleep.sigma**2).mean())
    assert np.cov(new[:, 0], new[:, 1])[0, 1] > 300
    assert fitted.var(0).mean() == pytest.approx(sigma2 + sleep.predict()["sd"].pow(2).mean(), rel=0.05)
    assert sleep.simulate(7).shape == (7, 180)
    assert np.corrcoef(fitted.mean(0), y)[0, 1] > 0.8


def test_rows_left_out(sleep):
    found = no_warnings(sleep.loo)
    # brms's defaults give elpd_loo -861 and p_loo 34 on these data, k-hat above 0.7 for two to four rows.
    assert found.elpd == pytest.approx(-861.0, abs=1.5)
    assert found.p_loo == pytest.approx(34.0, abs=1.5)
    assert 1 <= found.n_bad <= 6
    assert "180 rows, one at a time" in repr(found)
    with pytest.warns(mj.InferenceWarning, match="k-hat above 0.7"):
        sleep.loo()
    assert sleep.log_lik().shape == (4, 1000, 180)
    by = no_warnings(lambda: sleep.loo(by="Subject"))
    assert len(by.pointwise) == 18
    assert by.p_loo < found.p_loo
    with pytest.raises(ValueError, match="grouping factor of the model, 'Subject'"):
        sleep.loo(by="Days")


def test_covariances_and_frames(sleep):
    frame = sleep.to_frame()
    assert list(frame.columns[:4]) == ["chain", "draw", "Intercept", "Days"]
    assert len(frame) == 4000
    Sigma = sleep.Sigma["Subject"]
    assert np.allclose(np.sqrt(Sigma[..., 1, 1]), sleep.draws[..., sleep.names.index("sd_Days|Subject")])
    assert isinstance(sleep.summary(), pd.DataFrame)
    assert "Posterior of" in repr(sleep)


def test_a_structure_is_sampled_inside_itself():
    post = mj.bayes("Reaction ~ Days + diag(Days | Subject)", table("sleepstudy"), method="importance", key=1)
    assert post.names == ("Intercept", "Days", "sd_Intercept|Subject", "sd_Days|Subject", "sigma")
    assert (post.Sigma["Subject"][..., 0, 1] == 0).all()


def test_crossed_factors_by_importance_and_by_density():
    """Penicillin: posterior means near the REML estimates, effects near the modes."""
    post = mj.bayes("diameter ~ 1 + (1 | plate) + (1 | sample)", table("Penicillin"), method="auto", key=1)
    fit = mj.lmm("diameter ~ 1 + (1 | plate) + (1 | sample)", table("Penicillin"))
    assert post.sampling.method == "importance"
    assert post.sigma.mean() == pytest.approx(fit.sigma, rel=0.02)
    assert np.allclose(post.ranef()["plate"], fit.ranef()["plate"], atol=0.1)
    with pytest.raises(ValueError, match=r"loo\(by='plate'\).*cross each other"):
        post.loo(by="plate")
    assert no_warnings(post.loo).n_bad >= 0


# --- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"priors": mj.prior.normal(0, 1)}, "priors must be mixjax.priors"),
        ({"priors": mj.priors({"sd_x|Subject": mj.prior.half_normal(1)})}, "no parameter 'sd_x|Subject'"),
        ({"priors": mj.priors(sd=mj.prior.flat())}, "improper"),
        ({"priors": mj.priors(sigma=mj.prior.normal(0, 1))}, "positive"),
        ({"method": "hmc"}, "'nuts', 'importance', 'auto'"),
        ({"target": 1.5}, "target must be an acceptance"),
        ({"draws": 0}, "draws must be an integer, 4 or more"),
        ({"chains": 0}, "chains must be"),
        ({"integrate": "no"}, "integrate must be"),
        ({"key": "a"}, "key must be"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        mj.bayes(SLEEP, table("sleepstudy"), **{"method": "importance", **options})


def test_too_many_crossed_effects_are_refused(monkeypatch):
    monkeypatch.setattr("mixjax.sampling.bayes.MOST_DENSE_DRAWS", 5)
    with pytest.raises(ValueError, match=r"6 random effects beside .* too many"):
        mj.bayes("diameter ~ 1 + (1 | plate) + (1 | sample)", table("Penicillin"))


def test_weights_that_cannot_be_trusted_are_refused(monkeypatch):
    monkeypatch.setattr(importance, "TRUSTED", -5.0)
    with pytest.raises(ValueError, match=r"Pareto k-hat is .* use method='nuts'"):
        mj.bayes(SLEEP, table("sleepstudy"), method="importance")


def test_without_blackjax(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "blackjax", None)
    with pytest.raises(ImportError, match=r"mixjax\[bayes\]"):
        mj.bayes(SLEEP, table("sleepstudy"))


def test_without_arviz(sleep, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "arviz", None)
    with pytest.raises(ImportError, match=r"mixjax\[bayes\]"):
        sleep.to_arviz()


def test_problems_are_said(sleep):
    worse = mj.Posterior(
        sleep.reml_fit, sleep.priors, sleep.model, sleep.z[:, :40].copy(), sleep.beta[:, :40],
        replace(sleep.sampling, method="nuts", divergences=3, khat=np.nan), 1,
    )  # fmt: skip
    worse.z[0] += 3.0
    text = " ".join(worse.problems())
    assert "3 of 160 transitions diverged" in text
    assert "R-hat of" in text
    assert "effective sample size" in text
    assert "warning: 3 of 160" in repr(worse)
    with pytest.warns(mj.InferenceWarning) as seen:
        worse.warn()
    assert len(seen) == 3


# --- the pieces ------------------------------------------------------------------------------------------------------


def test_a_posterior_is_no_fit(sleep):
    """What is made of fits by maximum likelihood would give its numbers for those of the posterior."""
    for ask in (mj.table, mj.scenario_of, lambda post: mj.compare(post, post), mj.exact_rlrt):
        with pytest.raises((TypeError, ValueError), match="Posterior"):
            ask(sleep)


def test_the_mode_where_reml_is_singular(x64):
    """The prior's Jacobian keeps the mode inside; the curvature there is that of differences."""
    data = table("Dyestuff2")
    design, labels = mj.build_design(DYE, data)
    model, stats = FLAT.resolve(design, labels), pad(mj.cross_products(design))
    found = mode(np.array([-3.0, 1.0]), stats, model)
    assert found.converged
    from mixjax.sampling.density import value_gradient_hessian

    _, gradient, H = map(np.asarray, value_gradient_hessian(found.z, stats, model))
    assert np.abs(gradient).max() < 1e-5
    assert np.allclose(np.linalg.inv(found.root @ found.root.T), -H, rtol=1e-6)


def test_pareto_shapes():
    rng = np.random.default_rng(0)
    for k in (0.2, 0.6, 1.0):
        x = np.sort(np.expm1(-k * np.log(rng.random(4000))) / k)
        assert generalised_pareto(x)[0] == pytest.approx(k, abs=0.08)
    logs, khat = smoothed(np.zeros(500))
    assert np.allclose(logs, -np.log(500))
    assert khat <= 0.0
    _, khat = smoothed(3.0 * rng.standard_t(2, 4000))
    assert khat > 0.7


def test_effective_sizes_of_autoregressions():
    rng = np.random.default_rng(0)
    for rho in (0.0, 0.5, -0.3):
        x = np.zeros((4, 4000))
        e = rng.standard_normal((4, 4000))
        for t in range(1, 4000):
            x[:, t] = rho * x[:, t - 1] + e[:, t]
        assert ess(x) == pytest.approx(16_000 * (1 - rho) / (1 + rho), rel=0.12)
        assert rhat(x) < 1.005
    assert rhat(np.stack([x[0], x[1] + 3.0])) > 1.5


@pytest.mark.filterwarnings("ignore:.*ArviZ is undergoing")
def test_against_arviz():
    arviz = pytest.importorskip("arviz")
    rng = np.random.default_rng(3)
    x = np.cumsum(rng.standard_normal((4, 500)), axis=1) * 0.1 + rng.standard_normal((4, 500))
    assert float(rhat(x)) == pytest.approx(float(arviz.rhat(x)), rel=1e-6)
    assert float(ess_bulk(x)) == pytest.approx(float(arviz.ess(x, method="bulk")), rel=1e-2)
    assert float(ess_tail(x)) == pytest.approx(float(arviz.ess(x, method="tail", prob=(0.05, 0.95))), rel=1e-2)
    logs = 1.5 * rng.standard_t(4, 2000)
    own, khat = smoothed(logs)
    if not hasattr(arviz, "psislw"):
        return  # ArviZ 1 has another estimate of the shape of tails as heavy as these
    other, k = arviz.psislw(logs)
    assert khat == pytest.approx(float(k), abs=1e-6)
    assert np.allclose(own, np.asarray(other), atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*ArviZ is undergoing")
def test_inference_data(sleep):
    arviz = pytest.importorskip("arviz")
    data = sleep.to_arviz(log_likelihood=True, predictive=True)
    assert set(sleep.names) <= set(data.posterior.data_vars)
    assert data.posterior["b_Subject"].shape == (4, 1000, 18, 2)
    assert data.posterior_predictive["Reaction"].shape == (4, 1000, 180)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the same k-hat
        theirs = arviz.loo(data, reff=1.0)
    elpd = theirs.elpd_loo if hasattr(theirs, "elpd_loo") else theirs.elpd  # since ArviZ 1
    assert no_warnings(sleep.loo).elpd == pytest.approx(float(elpd), abs=0.1)
    assert sleep.plot("forest") is not None
    with pytest.raises(ValueError, match="no picture 'nothing'"):
        sleep.plot("nothing")


# --- calibration -----------------------------------------------------------------------------------------------------


def test_calibration(monkeypatch):
    """Uniform where posteriors are right; found out where they are not."""
    own = mj.priors(sigma=mj.prior.half_normal(80), sd=mj.prior.half_normal(80))
    found = mj.sbc(DYE, table("Dyestuff"), own, replicates=40, draws=49, key=4)
    assert found.ranks.shape == (40, 3)
    assert repr(found).endswith("40 data sets from the prior, ranks among 49 draws")
    assert "| sigma |" in found.to_markdown()
    assert found.ranks.min(axis=None) >= 0
    assert found.ranks.max(axis=None) <= 49
    assert (found.uniformity()["p_value"] > 0.001).all()
    few = [mj.sbc(DYE, table("Dyestuff"), own, replicates=4, draws=49, key=4).ranks for _ in range(2)]
    assert few[0].equals(few[1])
    exact = sbc._posterior
    monkeypatch.setattr(sbc, "_posterior", lambda *args: (exact(*args)[0] + 0.15, 0.0))
    wrong = mj.sbc(DYE, table("Dyestuff"), own, replicates=40, draws=49, key=4).uniformity()
    assert wrong.loc["sigma", "p_value"] < 0.01
    with pytest.raises(ValueError, match=r"proper priors.*flat"):
        mj.sbc(DYE, table("Dyestuff"), FLAT)


def test_bands_of_uniform_ranks():
    """Simultaneous: about one of twenty uniform data sets leaves them somewhere."""
    rng = np.random.default_rng(3)
    out = 0
    for _ in range(40):
        ranks = pd.DataFrame({"a": rng.integers(0, 20, 200)})
        ecdf = sbc.Calibration(ranks, 19, np.zeros(200), np.zeros(200, bool)).ecdf()
        out += bool(((ecdf["a"] < ecdf["lower"]) | (ecdf["a"] > ecdf["upper"])).any())
    assert out <= 7
    skewed = pd.DataFrame({"a": np.minimum(rng.integers(0, 20, 200), 15)})
    ecdf = sbc.Calibration(skewed, 19, np.zeros(200), np.zeros(200, bool)).ecdf()
    assert (ecdf["a"] > ecdf["upper"]).any()
