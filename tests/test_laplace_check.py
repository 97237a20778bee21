"""The check of Laplace's approximation: by quadrature against fits by quadrature, by importance sampling against it."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from test_glmm_estimate import rows_of
from test_quadrature import BINOMIAL, POISSON, random_design, random_rows

import mixjax as mj
from mixjax.engine.laplace import glmm_criterion
from mixjax.estimation.glmm import fit_rows
from mixjax.estimation.glmm_quadrature import fit_rows_by_quadrature
from mixjax.estimation.laplace_check import laplace_check
from mixjax.products.family_rows import rows


@pytest.mark.parametrize("model", ["bacteria", "epil_nbinom2"])
def test_by_quadrature(model):
    """The difference at the estimates; the shifts are those of the fit by quadrature to second order."""
    data = rows_of(model)
    est = fit_rows(data)
    check = laplace_check(data, est)
    with jax.enable_x64(True):
        at = [-0.5 * float(glmm_criterion(est.theta, est.beta, data, est.psi, nagq=n)) for n in (25, 1)]
    assert check.difference == pytest.approx(at[0] - at[1], abs=1e-10)
    assert check.error < 1e-5
    moved = fit_rows_by_quadrature(data, 25)
    scale = data.Z_bases[0].R[0, 0]
    change = np.concatenate([moved.beta - est.beta, moved.psi - est.psi, scale * (moved.theta - est.theta)])
    # A shift of 0.15 standard errors: the second order is some of its square.
    np.testing.assert_allclose(check.shifts, change / np.sqrt(np.diag(est.vcov_all)), rtol=0, atol=0.01)


@pytest.mark.parametrize("data", [rows_of("bacteria"), random_rows(2, POISSON, m=15, n=90, seed=1)], ids=["one", "two"])
@pytest.mark.parametrize("key", [1, 2])
def test_draws_and_quadrature_agree(data, key):
    est = fit_rows(data)
    exact, check = laplace_check(data, est), laplace_check(data, est, key=key, n=4000)
    assert abs(check.difference - exact.difference) < 4 * check.error < 0.2
    assert check.effective > 2000
    assert (np.abs(check.shifts - exact.shifts) < 4 * check.shift_errors).all()
    assert (check.shift_errors < 0.05).all()


def test_errors_are_those_of_the_draws():
    """Of forty keys: mean within 4 of its own errors, spread within 4 / sqrt(2 * 40) of the reported error."""
    data = rows_of("cbpp")
    est = fit_rows(data)
    exact = laplace_check(data, est)
    many = [laplace_check(data, est, key=key, n=400) for key in range(40)]
    z = np.array([(check.difference - exact.difference) / check.error for check in many])
    assert abs(z.mean()) < 4 / np.sqrt(40)
    assert abs(z.std() - 1) < 4 / np.sqrt(80)
    z = np.array([(check.shifts - exact.shifts) / check.shift_errors for check in many])
    assert (np.abs(z.mean(0)) < 4 / np.sqrt(40)).all()
    assert (np.abs(z.std(0) - 1) < 4 / np.sqrt(80)).all()


def test_several_factors_as_one():
    """A second factor whose variance is zero: the draws are joint, and agree with quadrature of the first alone."""
    design = random_design(1, m=12)
    other = mj.RandomTerm(Z=np.ones((60, 1)), group=np.arange(60) % 4, n_groups=4)
    alone, both = rows(design, BINOMIAL), rows(replace(design, terms=(*design.terms, other)), BINOMIAL)
    est = fit_rows(alone)
    exact = laplace_check(alone, est)
    first = [0, 1] if both.layout.terms[0].factor == 0 else [1, 0]
    theta = np.array([est.theta[0], 0.0])[first]
    joint = est._replace(theta=theta)
    check = laplace_check(both, joint, key=3, n=4000)
    assert not check.has_quadrature
    assert abs(check.difference - exact.difference) < 4 * check.error < 0.2
    assert np.isnan(check.shifts[-2:]).sum() == 1
    kept = np.isfinite(check.shifts)
    assert (np.abs(check.shifts[kept] - exact.shifts) < 4 * check.shift_errors[kept]).all()


def test_crossed():
    """The gradient at the optimum of Laplace's approximation is small beside what it lacks; keys agree."""
    data = rows_of("salamanders_presence")
    est = fit_rows(data)
    one, two = (laplace_check(data, est, key=key, n=1000) for key in (1, 2))
    assert abs(one.difference - two.difference) < 4 * np.hypot(one.error, two.error) < 0.3
    assert (np.abs(one.shifts - two.shifts) < 4 * np.hypot(one.shift_errors, two.shift_errors)).all()
    assert laplace_check(data, est, key=1, n=1000).difference == one.difference


def test_too_many_effects_for_the_draws():
    data = rows_of("grouseticks")
    check = laplace_check(data, fit_rows(data), key=1, n=1000)
    assert check.effective < 10
    assert np.isnan([check.difference, check.error, *check.shifts]).all()
    assert "could not be checked: of 1000 draws only" in str(check)


def test_words():
    data = rows_of("bacteria")
    check = laplace_check(data, fit_rows(data)).named(["a", "b", "c", "d", "sd"])
    first, second, third = str(check).splitlines()
    assert first.startswith("log-likelihood less Laplace's approximation: +0.2192 (error ")
    assert second == "largest shift of an estimate: +0.15 standard errors, of sd"
    assert "nagq=9" in third
    assert "does for these data" in str(laplace_check(rows_of("cbpp"), fit_rows(rows_of("cbpp"))))
    assert "no quadrature for these grouping factors" in str(replace(check, has_quadrature=False))


@pytest.mark.parametrize("n", [0, 3, -2])
def test_draws_come_in_pairs(n):
    data = random_rows(1)
    with pytest.raises(ValueError, match="even number of draws"):
        laplace_check(data, fit_rows(data), n=n)


def test_curved_upwards():
    """A density that is not log-concave: the proposal has the part of the curvature that is positive."""
    rng = np.random.default_rng(0)
    x, group = np.linspace(-4, 4, 60), np.arange(60) % 6
    p = np.arctan(2.0 * x + 4.0 * rng.normal(size=6)[group]) / np.pi + 0.5
    y = (rng.random(60) < p).astype(float)
    y[[2, 5, 53, 57]] = 1.0 - y[[2, 5, 53, 57]]
    term = mj.RandomTerm(Z=np.ones((60, 1)), group=group, n_groups=6)
    design = mj.Design(y=y, X=np.column_stack([np.ones(60), x]), terms=(term,))
    data = rows(design, mj.families.binomial("cauchit"))
    est = fit_rows(data)._replace(theta=np.array([2.0]))
    exact, check = laplace_check(data, est), laplace_check(data, est, n=4000)
    assert (data.family.derivatives(est.eta, data.y, None, ()).by_eta[2] < 0).any()
    assert abs(check.difference - exact.difference) < 4 * check.error < 0.3
