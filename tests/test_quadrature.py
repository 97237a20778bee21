"""Adaptive Gauss-Hermite quadrature of generalised models: the value against direct integration, derivatives against
automatic differentiation, fits against reference optima."""

from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from glmm_cases import case, factors, family_parameter, fits
from scipy import integrate, stats
from test_glmm_estimate import rows_of

import mixjax as mj
from mixjax import covariance as cov
from mixjax.engine import laplace, quadrature
from mixjax.engine.laplace import GLMMParams, glmm_criterion, glmm_loglik
from mixjax.engine.quadrature import product_rule
from mixjax.estimation.glmm import fit_rows, model_of
from mixjax.estimation.glmm_quadrature import fit_rows_by_quadrature, joint_at
from mixjax.products.family_rows import rows

QUADRATURE = [(model, name) for model, name in fits() if name.startswith("nAGQ") and not name.startswith("nAGQ1_")]
QUADRATURE = [(model, name) for model, name in QUADRATURE if case(model).fits[name]["nAGQ"] > 1]
BINOMIAL, POISSON, NBINOM = mj.families.binomial(), mj.families.poisson(), mj.families.nbinom()
THETA = {1: np.array([0.9]), 2: np.array([0.9, 0.2, 0.5]), 3: np.array([0.9, 0.2, -0.1, 0.5, 0.2, 0.4])}


def random_design(q, m=8, n=60, seed=0, family=BINOMIAL, **term):
    rng = np.random.default_rng(seed)
    g, x = rng.integers(0, m, n), rng.normal(size=(n, 3)) + 2.0
    Z = np.column_stack([np.ones(n), x])[:, :q]
    eta = -0.3 + 0.2 * x[:, 0] + (Z * rng.normal(size=(m, q))[g]).sum(1) * 0.7
    y = rng.random(n) < 1 / (1 + np.exp(-eta)) if family.name == "binomial" else rng.poisson(np.exp(eta.clip(-3, 3)))
    X = np.column_stack([np.ones(n), x[:, 0]])
    return mj.Design(y=y.astype(float), X=X, terms=(mj.RandomTerm(Z=Z, group=g, n_groups=m, **term),))


def random_rows(q, family=BINOMIAL, **options):
    return rows(random_design(q, family=family, **options), family)


@pytest.fixture(autouse=True, scope="module")
def _digits():
    with jax.enable_x64(True):
        yield


# --- the value ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q", [1, 2, 3])
@pytest.mark.parametrize("family", [BINOMIAL, POISSON])
def test_one_node_is_laplace(q, family):
    """The sum itself, for which more than one node would be asked: nothing is left of Taylor's formula at the mode."""
    data = random_rows(q, family)
    model, x = (
        model_of(data),
        cov.near([L[..., None] for L in cov.lambdas_of_theta(THETA[q], (q,))], data.layout.structures),
    )
    at = joint_at(model, product_rule(1, q), np.array([[0.1], [0.2]]), x, np.zeros((q, 8, 1)))
    assert at.value == pytest.approx(at.form.value[0], rel=1e-15)
    np.testing.assert_allclose(at.gradient[:2], at.form.gradient[:2, 0], rtol=1e-12)


def direct(design, theta, beta, limit=9.0):
    """-2 log-likelihood, level by level, the effects integrated over ``N(0, I)`` times Lambda."""
    (term,) = design.terms
    (Lambda,) = cov.lambdas_of_theta(theta, (term.Z.shape[1],))
    q, total = len(Lambda), 0.0
    for level in range(term.n_groups):
        own = term.group == level
        y, eta, ZL = design.y[own], design.X[own] @ beta, term.Z[own] @ Lambda

        def joint(*u, y=y, eta=eta, ZL=ZL):
            at = eta + ZL @ np.array(u[::-1])
            return np.exp((y * at - np.logaddexp(0.0, at)).sum()) * np.prod(stats.norm.pdf(u))

        accuracy = {"epsabs": 1e-13, "epsrel": 1e-10}
        if q == 1:
            value = integrate.quad(joint, -limit, limit, **accuracy)[0]
        else:
            value = integrate.dblquad(joint, -limit, limit, -limit, limit, **accuracy)[0]
        total -= 2.0 * np.log(value)
    return total


def test_many_nodes_are_the_integral():
    """Of 61 nodes; the reference is asked for 1e-10 of eight levels' likelihoods."""
    design = random_design(1)
    beta = np.array([-0.3, 0.2])
    found = glmm_criterion(THETA[1], beta, rows(design, BINOMIAL), nagq=61)
    np.testing.assert_allclose(found, direct(design, THETA[1], beta), rtol=0, atol=2 * 8 * 1e-10)


def test_many_nodes_are_the_integral_of_two_effects():
    """Two levels. 25 nodes are within 1e-7 of 41 there."""
    design = random_design(2, m=2, n=12)
    beta, data = np.array([-0.3, 0.2]), rows(design, BINOMIAL)
    wanted = direct(design, THETA[2], beta)
    coarse, fine = (abs(float(glmm_criterion(THETA[2], beta, data, nagq=n)) - wanted) for n in (5, 25))
    assert fine < 1e-6 < 1e-3 < abs(float(glmm_criterion(THETA[2], beta, data)) - wanted)
    assert fine < coarse


@pytest.mark.parametrize("q", [2, 3])
def test_product_rules_converge(q):
    data, beta = random_rows(q), np.array([-0.3, 0.2])
    values = [float(glmm_criterion(THETA[q], beta, data, nagq=n)) for n in (1, 5, 15, 25)]
    distance = np.abs(np.array(values[:-1]) - values[-1])
    assert distance[2] < 1e-4
    assert (distance[1:] < distance[:-1] / 5).all()


@pytest.mark.parametrize("nagq", [4, 9])
def test_a_singular_covariance_has_a_value(nagq):
    """Of rank one the product rule is the rule of its one direction."""
    design = random_design(2)
    (term,) = design.terms
    beta, data = np.array([-0.3, 0.2]), rows(design, BINOMIAL)
    slope = np.array([0.8, 0.3])
    alone = replace(design, terms=(replace(term, Z=term.Z @ slope[:, None]),))
    found = glmm_criterion(np.array([0.8, 0.3, 0.0]), beta, data, nagq=nagq)
    np.testing.assert_allclose(found, glmm_criterion(np.ones(1), beta, rows(alone, BINOMIAL), nagq=nagq), rtol=1e-13)
    nothing = glmm_criterion(np.zeros(3), beta, data, nagq=nagq)
    np.testing.assert_allclose(nothing, glmm_criterion(np.zeros(3), beta, data), rtol=1e-13)


def test_values_do_not_depend_on_order_names_or_scales():
    design = random_design(2)
    (term,) = design.terms
    beta = np.array([-0.3, 0.2])
    value = glmm_criterion(THETA[2], beta, rows(design, BINOMIAL), nagq=5)
    rng = np.random.default_rng(1)
    order, names = rng.permutation(len(design.y)), rng.permutation(term.n_groups)
    moved = replace(design, y=design.y[order], X=design.X[order],
                    terms=(replace(term, Z=term.Z[order], group=names[term.group[order]]),))  # fmt: skip
    np.testing.assert_allclose(glmm_criterion(THETA[2], beta, rows(moved, BINOMIAL), nagq=5), value, rtol=1e-13)
    flipped = replace(design, y=1.0 - design.y)
    np.testing.assert_allclose(glmm_criterion(THETA[2], -beta, rows(replace(flipped), BINOMIAL), nagq=5),
                               glmm_criterion(THETA[2], beta, rows(design, BINOMIAL), nagq=5), rtol=1e-13)  # fmt: skip
    # A slope on another scale, with its zero elsewhere: Z T, and T^{-1} Lambda made triangular again.
    T = np.array([[1.0, -3.0], [0.0, 0.2]])
    (Lambda,) = cov.lambdas_of_theta(THETA[2], (2,))
    inside = np.linalg.solve(T, Lambda)
    theta = cov.theta_of_lambda(np.linalg.cholesky(inside @ inside.T), 2)
    other = replace(design, terms=(replace(term, Z=term.Z @ T),))
    np.testing.assert_allclose(glmm_criterion(theta, beta, rows(other, BINOMIAL), nagq=5), value, rtol=1e-12)


def test_counts_are_the_same_rows_split():
    """But for the binomial coefficients."""
    rng = np.random.default_rng(0)
    size, g = rng.integers(1, 6, 20), np.arange(20) % 5
    y, X, x = rng.binomial(size, 0.4), np.ones((20, 1)), rng.normal(size=20)
    counts = mj.Design(y=y * 1.0, X=X, terms=(mj.RandomTerm(Z=x[:, None], group=g, n_groups=5),), size=size * 1.0)
    row = np.repeat(np.arange(20), size)
    single = np.concatenate([np.arange(s) < own for s, own in zip(size, y, strict=True)])
    split = mj.Design(y=single * 1.0, X=X[row], terms=(mj.RandomTerm(Z=x[row, None], group=g[row], n_groups=5),))
    # The basis of Z has mean square one over rows: a factor of it that no value sees.
    beta, theta = np.array([0.3]), np.array([0.9])
    a, b = (glmm_criterion(theta, beta, rows(d, BINOMIAL), nagq=7) for d in (counts, split))
    chosen = -stats.binom.logpmf(y, size, 0.5).sum() - size.sum() * np.log(2.0)
    np.testing.assert_allclose(a - b, 2 * chosen, rtol=1e-12)


def test_far_nodes_have_derivatives():
    """exp(eta) overflows at the outermost of 100 nodes; they count for nothing."""
    y = np.array([0.0, 0.0, 3.0, 1.0])
    term = mj.RandomTerm(Z=np.ones((4, 1)), group=np.array([0, 0, 1, 1]), n_groups=2)
    data = rows(mj.Design(y=y, X=np.ones((4, 1)), terms=(term,)), POISSON)
    value, slope = jax.value_and_grad(glmm_criterion)(np.array([300.0]), np.array([0.0]), data, nagq=100)
    assert np.isfinite(value)
    assert np.isfinite(slope).all()
    at = joint_at(model_of(data), product_rule(100, 1), np.zeros((1, 1)), np.array([[300.0]]), np.zeros((1, 2, 1)))
    np.testing.assert_allclose(at.value, value, rtol=1e-12)
    np.testing.assert_allclose(at.gradient[1:], slope, rtol=1e-8)


def test_loglik_is_the_criterion():
    data = random_rows(1, NBINOM)
    params = GLMMParams(np.array([-0.3, 0.2]), (np.log(THETA[1]),), np.array([0.5]))
    found = glmm_loglik(params, data, nagq=5)
    np.testing.assert_allclose(-2 * found, glmm_criterion(THETA[1], params.beta, data, params.psi, nagq=5), rtol=1e-14)


# --- what cannot be done ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("nagq", [0, -1, 101, 2.0, "9", True, None])
def test_impossible_numbers_of_nodes(nagq):
    with pytest.raises(ValueError, match="nagq must be a whole number from 1"):
        glmm_criterion(THETA[1], np.zeros(2), random_rows(1), nagq=nagq)


def test_too_many_nodes():
    with pytest.raises(ValueError, match=r"needs 26\^3 = 17576 nodes, more than 15625: use nagq = 25"):
        fit_rows_by_quadrature(random_rows(3), 26)
    assert len(product_rule(25, 3).nodes) <= 15625


def test_too_many_effects_and_factors():
    design = random_design(3)
    (term,) = design.terms
    wide = replace(term, Z=np.column_stack([term.Z, design.y]))
    with pytest.raises(ValueError, match="up to 3 effects a level; this model has 4"):
        fit_rows_by_quadrature(rows(replace(design, terms=(wide,)), BINOMIAL), 3)
    other = mj.RandomTerm(Z=np.ones((60, 1)), group=np.arange(60) % 5, n_groups=5)
    with pytest.raises(ValueError, match="this model has 2: use nagq = 1"):
        fit_rows_by_quadrature(rows(replace(design, terms=(term, other)), BINOMIAL), 3)
    with pytest.raises(ValueError, match="observed curvature"):
        glmm_criterion(THETA[1], np.zeros(2), random_rows(1), curvature="expected", nagq=3)


# --- derivatives ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("q", "family", "structure"),
    [(1, NBINOM, "us"), (2, NBINOM, "us"), (2, BINOMIAL, "diag"), (2, POISSON, "homcs"), (3, BINOMIAL, "us")],
)
def test_derivatives_in_closed_form(q, family, structure):
    """Against automatic differentiation. The gradient is exact; the Hessian is by differences of 1e-4 standard errors:
    their square, and the gradient's rounding of 1e-12 over them."""
    data = random_rows(q, family, structure=structure)
    model, k, n = model_of(data), sum(s.k for s in data.layout.structures), 2 + family.n_psi
    rng = np.random.default_rng(1)
    phi = np.concatenate([0.3 * rng.normal(size=n), rng.normal(size=k)])
    nagq = {1: 7, 2: 5, 3: 3}[q]

    def objective(phi):
        lambdas = [L[..., 0] for L in cov.factors_of(phi[n:, None], data.layout.structures)]
        return laplace.objective(laplace.Point(phi[:n], lambdas), data, nagq=nagq)

    at = joint_at(model, product_rule(nagq, q), phi[:n, None], phi[n:, None], np.zeros((q, 8, 1)))
    value, gradient = jax.jit(jax.value_and_grad(objective))(phi)
    np.testing.assert_allclose(at.value, value, rtol=1e-13)
    np.testing.assert_allclose(at.gradient, gradient, rtol=1e-11, atol=1e-11 * np.abs(gradient).max())
    if structure == "homcs" or q == 1:  # what else is compiled for long
        Hessian = jax.jit(jax.hessian(objective))(phi)
        np.testing.assert_allclose(at.Hessian, Hessian, rtol=0, atol=1e-7 * np.abs(Hessian).max())
    if q > 1:
        return
    # The rule for the modes' derivatives itself: by differences. Values are good to 1e-11, differences to that over h.
    h, value_at = 1e-3, jax.jit(objective)
    for i, axis in enumerate(np.eye(len(phi))):
        slope = (8 * (value_at(phi + h * axis) - value_at(phi - h * axis))
                 - (value_at(phi + 2 * h * axis) - value_at(phi - 2 * h * axis))) / (12 * h)  # fmt: skip
        np.testing.assert_allclose(gradient[i], slope, rtol=1e-7, atol=1e-7)


def test_slopes_of_triangular_factors():
    rng = np.random.default_rng(0)
    F, dF, h = rng.normal(size=(3, 3, 2)), rng.normal(size=(1, 3, 3, 2)), 1e-6
    L, dL = quadrature.lower_root_slopes(F, dF)
    np.testing.assert_allclose(L, quadrature.lower_root(F), rtol=1e-14)
    by_difference = (quadrature.lower_root(F + h * dF[0]) - quadrature.lower_root(F - h * dF[0])) / (2 * h)
    np.testing.assert_allclose(dL[0], by_difference, atol=1e-8)


@pytest.mark.parametrize("theta", [np.array([0.0, 0.0, 0.0]), np.array([0.8, 0.3, 0.0]), np.array([0.8, 0.0, 0.0])])
def test_slopes_at_singular_covariances(theta):
    """No NaN, and none by a zero of the triangle, in which the value is even."""
    data, beta = random_rows(2), np.array([-0.3, 0.2])
    F = partial(glmm_criterion, beta=beta, data=data, nagq=5)
    slope = jax.grad(F)(theta)
    assert np.isfinite(slope).all()
    free = theta != 0
    for i in range(3):
        if free[i] or i == 2:
            axis, h = np.eye(3)[i], 1e-4
            np.testing.assert_allclose(slope[i], (F(theta + h * axis) - F(theta - h * axis)) / (2 * h), atol=1e-6)


def test_derivatives_by_the_response():
    """Through modes and nodes, against differences."""
    data = random_rows(1, POISSON)
    params = GLMMParams(np.array([-0.3, 0.2]), (np.log(THETA[1]),), np.zeros(0))

    def loglik(y):
        return glmm_loglik(params, data.with_response(y), nagq=5)

    slope, h, axis = jax.grad(loglik)(data.y), 1e-4, np.eye(60)[7]
    np.testing.assert_allclose(slope[7], (loglik(data.y + h * axis) - loglik(data.y - h * axis)) / (2 * h), rtol=1e-6)


# --- fits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "name"), QUADRATURE)
def test_reference_optima(model, name):
    """Criterion to 1e-8 and never above by more than 1e-9, estimates to 1e-6, standard errors to 1e-5."""
    fit = case(model).fits[name]
    est = fit_rows_by_quadrature(rows_of(model), fit["nAGQ"])
    assert est.converged
    assert bool(est.singular) == fit["isSingular"]
    assert -1e-8 < est.criterion - fit["m2logLik"] < 1e-9
    np.testing.assert_allclose(est.beta, list(fit["fixef"].values()), rtol=1e-6)
    np.testing.assert_allclose(np.sqrt(np.diag(est.vcov)), list(fit["fixef_se"].values()), rtol=1e-5)
    np.testing.assert_allclose(est.psi, family_parameter(model, name), rtol=1e-6)
    for Sigma, Lambda in zip(est.Sigma, factors(model, name), strict=True):
        np.testing.assert_allclose(Sigma, Lambda @ Lambda.T, rtol=1e-6, atol=1e-6 * (Lambda**2).sum())


def test_one_node_is_the_fit_by_laplace():
    data = random_rows(1)
    np.testing.assert_array_equal(fit_rows_by_quadrature(data, 1).criterion, fit_rows(data).criterion)


@pytest.mark.parametrize("nagq", [4, 9])
def test_no_variance_at_all(nagq):
    """Levels that vary less than chance: the variance is exactly zero, the rest a model without random effects."""
    y = np.tile([0.0, 1.0, 0.0, 1.0, 1.0], 8)
    x = np.random.default_rng(0).normal(size=40)
    term = mj.RandomTerm(Z=np.ones((40, 1)), group=np.repeat(np.arange(8), 5), n_groups=8)
    est = fit_rows_by_quadrature(
        rows(mj.Design(y=y, X=np.column_stack([np.ones(40), x]), terms=(term,)), BINOMIAL), nagq
    )
    assert est.converged
    assert est.singular
    assert est.theta == 0.0
    p = 1 / (1 + np.exp(-est.eta))
    np.testing.assert_allclose([(y - p).sum(), x @ (y - p)], 0.0, atol=1e-9)
    np.testing.assert_allclose(est.criterion, -2 * stats.bernoulli.logpmf(y, p).sum(), rtol=1e-13)
    X = np.column_stack([np.ones(40), x])
    np.testing.assert_allclose(est.vcov, np.linalg.inv((X.T * p * (1 - p)) @ X), rtol=1e-8)


def test_a_correlation_of_one():
    """The minimum lies on the edge: the gradient along it vanishes, and a third parameter rises from zero."""
    data = rows_of("singular_correlation")
    est = fit_rows_by_quadrature(data, 5)
    assert est.converged
    assert est.singular
    assert est.theta[2] == 0.0

    @jax.jit
    def with_slopes(theta, beta):
        return jax.value_and_grad(lambda *both: glmm_criterion(*both, data, nagq=5), (0, 1))(theta, beta)

    value, (by_theta, by_beta) = with_slopes(est.theta, est.beta)
    np.testing.assert_allclose(value, est.criterion, rtol=0, atol=1e-10)
    np.testing.assert_allclose([*by_theta[:2], *by_beta], 0.0, atol=1e-5)
    for other in (0.02, 0.1):
        assert with_slopes(np.array([*est.theta[:2], other]), est.beta)[0] > est.criterion


def test_two_effects_against_automatic_differentiation():
    data = random_rows(2, POISSON, m=15, n=90, seed=1)
    est = fit_rows_by_quadrature(data, 7)
    assert est.converged
    assert not est.singular

    def at(both):
        return glmm_criterion(both[2:], both[:2], data, nagq=7)

    both = np.concatenate([est.beta, est.theta])
    np.testing.assert_allclose(at(both), est.criterion, rtol=0, atol=1e-10)
    covariance = 2.0 * np.linalg.inv(jax.jit(jax.hessian(at))(both))
    np.testing.assert_allclose(est.vcov, covariance[:2, :2], rtol=1e-6)
    distance = np.asarray(jax.jit(jax.grad(at))(both))
    assert np.sqrt(distance @ covariance @ distance / 2) < 1e-6
