"""The estimator: boundary, starts, optax, failures, dtypes, transformations."""

import warnings
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest
from conftest import fit_of, table
from designs import STRUCTURES, random_design

import mixjax as mj
from mixjax.products.sums import pad

FORMULA = "Reaction ~ Days + (Days | Subject)"


def design_of(formula, name):
    return mj.build_design(formula, table(name))[0]


def test_estimates_are_those_of_lmm(x64):
    fit = fit_of("sleepstudy_slopes", "REML")
    est = mj.estimate(mj.cross_products(fit.design))  # not padded
    for name in ("theta", "beta", "sigma", "vcov", "criterion"):
        np.testing.assert_allclose(getattr(est, name), getattr(fit.estimates, name), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(est.b[0], fit.estimates.b[0], rtol=1e-6, atol=1e-8)
    assert est.b[0].shape == (18, 2)


def test_works_inside_jit_and_compiles_once_per_shape(x64):
    traces = []

    @jax.jit
    def slope(stats):
        traces.append(1)
        return mj.estimate(stats).beta[1]

    for seed in range(3):
        slope(pad(mj.cross_products(random_design(STRUCTURES["one factor, q=2, weights"], seed))))
    assert len(traces) == 1


@pytest.mark.parametrize("start", [[1e-3, 0.0, 1e-3], [50.0, -20.0, 30.0], [0.0, 0.0, 0.0], [0.0, 5.0, 0.0]])
def test_any_start_ends_at_the_same_minimum(start):
    """Zero columns are stationary points: a start on one has to be left along negative curvature."""
    fit = mj.lmm(FORMULA, table("sleepstudy"), start=start)
    reference = fit_of("sleepstudy_slopes", "REML")
    np.testing.assert_allclose(fit.criterion, reference.criterion, atol=1e-8)
    np.testing.assert_allclose(fit.theta, reference.theta, rtol=1e-6)


def test_start_of_wrong_length_is_refused():
    with pytest.raises(ValueError, match=r"theta has shape \(2,\)"):
        mj.lmm(FORMULA, table("sleepstudy"), start=[1.0, 1.0])


@pytest.mark.parametrize("optimizer", [optax.lbfgs(), optax.adam(0.05)], ids=["lbfgs", "adam"])
def test_optax(optimizer):
    fit = mj.lmm(FORMULA, table("sleepstudy"), optimizer=optimizer, start=[0.5, 0.0, 0.5])
    reference = fit_of("sleepstudy_slopes", "REML")
    assert fit.converged
    assert fit.optimizer.name == "optax"
    np.testing.assert_allclose(fit.theta, reference.theta, rtol=1e-6)
    np.testing.assert_allclose(fit.criterion, reference.criterion, atol=1e-8)
    assert fit.refit(table("sleepstudy")["Reaction"] * 2).optimizer.name == "optax"


def test_optax_that_starts_at_the_minimum_stays():
    """Of a balanced design the moments' estimates are the minimum."""
    fit = mj.lmm(FORMULA, table("sleepstudy"), optimizer=optax.adam(0.05))
    assert fit.converged
    np.testing.assert_allclose(fit.theta, fit_of("sleepstudy_slopes", "REML").theta, rtol=1e-6)


def test_optax_ends_on_the_boundary():
    fit = mj.lmm("Yield ~ 1 + (1 | Batch)", table("Dyestuff2"), optimizer=optax.lbfgs())
    assert fit.is_singular
    assert fit.converged
    assert fit.theta[0] == 0.0


def test_optax_that_stops_early_warns():
    with pytest.warns(mj.ConvergenceWarning, match="did not converge after 5000 iterations"):
        fit = mj.lmm(FORMULA, table("sleepstudy"), optimizer=optax.sgd(1e-7), start=[0.5, 0.0, 0.5])
    assert not fit.converged
    assert "NOT CONVERGED" in str(fit.summary())
    assert "NOT CONVERGED" in repr(fit)


@pytest.mark.parametrize(
    "name", ["dyestuff2", "singular_correlation_one", "singular_crossed_zero", "singular_rank_two"]
)
def test_no_warnings_at_a_singular_fit(name):
    from conftest import oracle

    reference = oracle(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit = mj.lmm(reference["formula"], table(reference["data"]))
    assert fit.is_singular
    assert fit.converged


def test_derivative_in_the_direction_of_growing_variance_at_a_singular_fit(x64):
    """At a zero variance the criterion rises, or is flat, as the variance grows."""
    stats = mj.cross_products(design_of("Yield ~ 1 + (1 | Batch)", "Dyestuff2"))
    at_zero, nearby = (float(mj.criterion(np.array([t]), stats)) for t in (0.0, 1e-3))
    assert nearby >= at_zero


def test_nan_in_the_response_gives_a_code(x64):
    design = design_of(FORMULA, "sleepstudy")
    stats = mj.cross_products(design)
    est = mj.estimate(replace(stats, yy=np.float64(np.nan)))
    assert int(est.result) == mj.Result.NOT_FINITE
    assert not est.converged


@pytest.mark.parametrize(("noise", "rtol"), [(1e-3, 1e-8), (1e-4, 1e-6), (1e-5, 1e-5)])
def test_a_nearly_exact_fit_is_found(noise, rtol):
    """Random effects up to 100 000 times larger than the noise; digits are lost with the square of the ratio."""
    rng = np.random.default_rng(0)
    b = rng.normal(size=18).repeat(10)
    data = table("sleepstudy").assign(y=lambda d: b + noise * rng.normal(size=180))
    fit = mj.lmm("y ~ 1 + (1 | Subject)", data)
    assert fit.converged
    within = data.groupby("Subject", observed=True)["y"].var().mean()  # balanced: REML is the analysis of variance
    np.testing.assert_allclose(fit.sigma**2, within, rtol=rtol)
    between = data.groupby("Subject", observed=True)["y"].mean().var() - within / 10
    np.testing.assert_allclose(fit.Sigma["Subject"][0, 0], between, rtol=10 * rtol)


def test_float32_warns_and_is_near():
    reference = fit_of("sleepstudy_slopes", "REML")
    single = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype.kind == "f" else x, reference.design)
    with pytest.warns(UserWarning, match="float32"):
        est = mj.estimate(mj.cross_products(single))
    assert est.theta.dtype == np.float32
    assert est.converged
    np.testing.assert_allclose(est.criterion, reference.criterion, rtol=1e-5)
    np.testing.assert_allclose(est.theta, reference.theta, rtol=0.02, atol=0.005)
    np.testing.assert_allclose(est.beta, reference.fixef, rtol=1e-4)


def test_params_round_trip(x64):
    fit = fit_of("sleepstudy_slopes", "ML")
    p = mj.to_params(fit.estimates)
    np.testing.assert_allclose(-2 * mj.marginal_loglik(p, fit.design), fit.criterion, rtol=1e-12)
    natural = mj.from_params(p)
    np.testing.assert_allclose(natural.theta, fit.theta, rtol=1e-12)
    np.testing.assert_allclose(natural.Sigma[0], fit.Sigma["Subject"], rtol=1e-12)
    np.testing.assert_allclose(natural.sigma, fit.sigma, rtol=1e-12)
    gradient = jax.grad(mj.marginal_loglik)(p, fit.stats)
    for leaf, scale in zip(jax.tree.leaves(gradient), (1e-6, 1e-4, 1e-4), strict=True):
        np.testing.assert_allclose(leaf, 0.0, atol=scale)


def test_params_of_a_singular_fit_have_minus_infinity():
    assert mj.to_params(fit_of("dyestuff2", "REML").estimates).chol[0][0] == -np.inf


def test_default_precision_of_jax_is_left_alone():
    assert not jax.config.jax_enable_x64
    fit_of("sleepstudy_slopes", "REML")
    assert not jax.config.jax_enable_x64
    assert jax.numpy.ones(1).dtype == np.float32


@pytest.mark.parametrize("sds", [(24.7, 5.9), (24.7, 0.0), (0.0, 0.0)], ids=["both", "no slopes", "none"])
def test_simulated_responses_reach_the_best_minimum_known_from_any_start(x64, sds):
    """About half of the fits under a null variance are singular; none may depend on where the search starts."""
    reference = fit_of("sleepstudy_slopes", "REML")
    term = reference.design.terms[0]
    rng = np.random.default_rng(1)
    n_singular = 0
    for _ in range(40):
        b = rng.normal(size=(18, 2)) * sds
        y = reference.predict(random=False) + (term.Z * b[term.group]).sum(1) + 25.6 * rng.normal(size=180)
        stats = pad(mj.cross_products(reference.design, y.to_numpy()))
        est = mj.estimate(stats)
        assert est.converged
        n_singular += bool(est.singular)
        for start in ([1.0, 0.0, 1.0], [3.0, -0.5, 0.3], [0.1, 0.05, 0.02]):
            other = mj.estimate(stats, start=np.array(start))
            assert est.criterion <= other.criterion + 1e-6
            assert bool(est.singular) == bool(other.singular)
    assert sds[1] > 0 or 10 <= n_singular <= 40


def test_a_flat_valley_is_followed_to_its_end(x64):
    """The first effect of a level has almost no variance, so the covariance hardly changes where Lambda's second row
    turns: the way to the minimum is long, curved and 3e-5 deep (benchmarks/sweep.py found it)."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(10), 4)
    Z = np.column_stack([np.ones(40), rng.normal(size=40)])
    X = np.column_stack([np.ones(40), rng.normal(size=40)])
    rng = np.random.default_rng([sum(map(ord, "y in units of 1e8")), 0])
    noise, b = rng.normal(size=(2_000, 40)), rng.normal(size=(2_000, 10, 2))
    y = X.sum(1) + noise[625] + (Z * b[625, group]).sum(1)
    stats = mj.cross_products(mj.Design(y=y, X=X, terms=(mj.RandomTerm(Z=Z, group=group, n_groups=10),)))
    est = mj.estimate(stats)
    best = mj.estimate(stats, start=np.array([0.142, 2.071, 0.527]))
    assert int(best.iterations) < 10
    assert float(est.criterion) == pytest.approx(float(best.criterion), abs=1e-8)
    np.testing.assert_allclose(est.theta, best.theta, rtol=1e-4)
    # What an estimate costs must not depend on luck: a dozen evaluations usually, here more.
    assert int(est.iterations) < 200
