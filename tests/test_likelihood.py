"""The pure functions: against the dense textbook formula, finite differences, and JAX's transformations."""

from dataclasses import replace

import dense
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from designs import STRUCTURES, random_design, random_theta
from jax.flatten_util import ravel_pytree

import mixjax as mj
from mixjax.covariance import lambdas_of_theta
from mixjax.products.sums import pad

pytestmark = pytest.mark.usefixtures("x64")
NAMES = list(STRUCTURES)


@pytest.fixture(params=NAMES)
def model(request):
    structure = STRUCTURES[request.param]
    return random_design(structure, seed=3), random_theta(structure, seed=3)


def lambdas(design, theta):
    return [np.asarray(L) for L in lambdas_of_theta(jnp.asarray(theta), tuple(t.Z.shape[1] for t in design.terms))]


def random_params(design, seed=0):
    rng = np.random.default_rng(seed)
    qs = [t.Z.shape[1] for t in design.terms]
    chol = tuple(rng.normal(size=q * (q + 1) // 2) * 0.5 for q in qs)
    return mj.MarginalParams(rng.normal(size=design.X.shape[1]), np.array(rng.normal() * 0.3), chol)


def finite_differences(f, x, h=1e-5):
    """Central differences, fourth order."""
    x = np.asarray(x, float)
    rows = []
    for i in range(len(x)):
        e = np.zeros_like(x)
        e[i] = h
        rows.append((8 * (f(x + e) - f(x - e)) - (f(x + 2 * e) - f(x - 2 * e))) / (12 * h))
    return np.array(rows)


def with_derivatives(f):
    """Value, gradient and Hessian by the first argument, in one program that holds the likelihood once."""

    def gradient(x, *others):
        value, slope = jax.value_and_grad(f)(x, *others)
        return slope, (value, slope)

    def all_three(x, *others):
        H, (value, slope) = jax.jacfwd(gradient, has_aux=True)(x, *others)
        return value, slope, H

    return jax.jit(all_three)


@pytest.mark.parametrize("reml", [True, False])
def test_criterion_is_the_dense_one(model, reml):
    design, theta = model
    expected = dense.criterion(design, lambdas(design, theta), reml)
    stats = mj.cross_products(design)
    np.testing.assert_allclose(mj.criterion(theta, stats, reml), expected, rtol=1e-10)
    np.testing.assert_allclose(mj.criterion(theta, pad(stats), reml), expected, rtol=1e-10)


def test_marginal_loglik_is_the_dense_one(model):
    design, _ = model
    p = random_params(design)
    natural = mj.from_params(p)
    expected = dense.loglik(design, p.beta, [np.asarray(S) for S in natural.Sigma], float(natural.sigma))
    np.testing.assert_allclose(mj.marginal_loglik(p, design), expected, rtol=1e-10)
    np.testing.assert_allclose(mj.marginal_loglik(p, mj.cross_products(design)), expected, rtol=1e-10)


def test_gradient_and_hessian_of_the_criterion(model):
    design, theta = model
    stats = mj.cross_products(design)
    derivatives = with_derivatives(mj.criterion)
    for reml in (True, False):
        _, gradient, H = map(np.asarray, derivatives(theta, stats, reml))
        expected = finite_differences(lambda t, reml=reml: derivatives(t, stats, reml)[0], theta)
        np.testing.assert_allclose(gradient, expected, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(H, H.T, rtol=1e-9, atol=1e-9)
        expected = finite_differences(lambda t, reml=reml: derivatives(t, stats, reml)[1], theta)
        np.testing.assert_allclose(H, expected, rtol=1e-6, atol=1e-6)


def test_gradient_of_marginal_loglik(model):
    design, _ = model
    p = random_params(design)
    flat, unflatten = ravel_pytree(p)
    stats = mj.cross_products(design)
    derivatives = with_derivatives(lambda x: mj.marginal_loglik(unflatten(x), stats))
    _, gradient, H = map(np.asarray, derivatives(flat))
    np.testing.assert_allclose(gradient, finite_differences(lambda x: derivatives(x)[0], flat), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(H, H.T, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(H, finite_differences(lambda x: derivatives(x)[1], flat), rtol=1e-6, atol=1e-6)


def test_third_derivatives_exist_and_are_right():
    structure = STRUCTURES["nested"]
    design, theta = random_design(structure, 5), random_theta(structure, 5)
    stats = mj.cross_products(design)
    hessian = jax.hessian(lambda t: mj.criterion(t, stats))
    derivatives = jax.jit(lambda t: (hessian(t), jax.jacrev(hessian)(t)))
    third = derivatives(theta)[1]
    numeric = np.moveaxis(finite_differences(lambda t: derivatives(t)[0], theta), 0, -1)
    np.testing.assert_allclose(third, numeric, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", ["one factor, q=2, weights", "nested", "crossed"])
def test_gradient_with_respect_to_the_design(name):
    design = random_design(STRUCTURES[name], 4)
    p = random_params(design)

    def loglik(y, X, Z):
        terms = (replace(design.terms[0], Z=Z), *design.terms[1:])
        return mj.marginal_loglik(p, replace(design, y=y, X=X, terms=terms))

    arrays = (design.y, design.X, design.terms[0].Z)
    gradients = jax.jit(jax.grad(loglik, argnums=(0, 1, 2)))(*arrays)
    rng = np.random.default_rng(0)
    for i, gradient in enumerate(gradients):
        direction = rng.normal(size=arrays[i].shape)

        def moved(h, i=i, direction=direction):
            return dense_loglik(design, p, *[a + h * direction if j == i else a for j, a in enumerate(arrays)])

        numeric = (moved(1e-5) - moved(-1e-5)) / 2e-5
        np.testing.assert_allclose((np.asarray(gradient) * direction).sum(), numeric, rtol=1e-6)


def dense_loglik(design, p, y, X, Z):
    terms = (replace(design.terms[0], Z=Z), *design.terms[1:])
    natural = mj.from_params(p)
    Sigmas = [np.asarray(S) for S in natural.Sigma]
    return dense.loglik(replace(design, y=y, X=X, terms=terms), p.beta, Sigmas, float(natural.sigma))


def test_a_traced_design_gives_the_same_likelihood(model):
    design, _ = model
    p = random_params(design)
    traced = jax.jit(mj.marginal_loglik)(p, design)  # groups are tracers too: nothing is known of their structure
    np.testing.assert_allclose(traced, mj.marginal_loglik(p, design), rtol=1e-10)


def test_vmap_over_theta(model):
    design, theta = model
    stats = mj.cross_products(design)
    thetas = np.stack([theta, -theta, 0.3 * theta])
    batched = jax.vmap(lambda t: mj.criterion(t, stats))(thetas)
    np.testing.assert_allclose(batched, [mj.criterion(t, stats) for t in thetas], rtol=1e-12)


def test_vmap_over_responses():
    design = random_design(STRUCTURES["nested"], 1)
    Y = np.random.default_rng(0).normal(size=(3, len(design.y)))
    theta = random_theta(STRUCTURES["nested"], 1)
    batched = jax.vmap(lambda y: mj.criterion(theta, mj.cross_products(design, y)))(Y)
    np.testing.assert_allclose(batched, [mj.criterion(theta, mj.cross_products(design, y)) for y in Y], rtol=1e-10)


def test_signs_of_columns_do_not_matter(model):
    design, theta = model
    stats = mj.cross_products(design)
    np.testing.assert_allclose(mj.criterion(theta, stats), mj.criterion(-theta, stats), rtol=1e-13)


def test_one_shape_compiles_once():
    traces = []

    @jax.jit
    def f(theta, stats):
        traces.append(1)
        return mj.criterion(theta, stats)

    structure = STRUCTURES["crossed"]
    for seed in range(4):
        stats = pad(mj.cross_products(random_design(structure, seed, n=30 + seed)))
        f(random_theta(structure, seed), stats)
    assert len(traces) == 1


def test_zero_variance_is_a_stationary_point():
    design = random_design(STRUCTURES["crossed"], 2)
    stats = mj.cross_products(design)
    gradient = jax.grad(mj.criterion)(np.zeros(4), stats)
    np.testing.assert_array_equal(gradient, 0.0)


def test_without_fixed_effects():
    design = random_design(STRUCTURES["nested"], 8)
    design = replace(design, X=np.zeros((len(design.y), 0)))
    theta = random_theta(STRUCTURES["nested"], 8)
    for reml in (True, False):
        expected = dense.criterion(design, lambdas(design, theta), reml)
        np.testing.assert_allclose(mj.criterion(theta, mj.cross_products(design), reml), expected, rtol=1e-10)


def test_integer_arrays_count_as_float64():
    term = mj.RandomTerm(Z=np.ones((6, 1), int), group=np.repeat([0, 1, 2], 2), n_groups=3)
    stats = mj.cross_products(mj.Design(y=np.array([1, 2, 4, 3, 7, 6]), X=np.ones((6, 1), int), terms=(term,)))
    assert stats.XX.dtype == np.float64


def test_float32_in_float32_out():
    structure = STRUCTURES["crossed"]
    design, theta = random_design(structure, 6), random_theta(structure, 6)
    single = jax.tree.map(lambda x: x.astype(np.float32) if x.dtype.kind == "f" else x, design)
    value = mj.criterion(theta.astype(np.float32), mj.cross_products(single))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, mj.criterion(theta, mj.cross_products(design)), rtol=1e-5)
    p = jax.tree.map(lambda x: np.asarray(x, np.float32), random_params(design))
    assert mj.marginal_loglik(p, single).dtype == jnp.float32
