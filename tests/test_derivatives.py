"""Derivatives of the estimates with respect to the data, through the fit: against refits, in both modes, twice."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from designs import STRUCTURES, random_design

import mixjax as mj

pytestmark = pytest.mark.usefixtures("x64")
STEP = 1e-5


def outputs(y, X, Z, weights, design):
    terms = (replace(design.terms[0], Z=Z), *design.terms[1:])
    est = mj.estimate(mj.cross_products(replace(design, y=y, X=X, terms=terms, weights=weights)))
    return {name: getattr(est, name) for name in ("theta", "beta", "sigma", "Sigma", "vcov", "b", "criterion")}


@pytest.mark.parametrize("seed", [0, 4], ids=["regular", "singular"])
@pytest.mark.parametrize("name", ["one factor, q=2, weights", "crossed"])
def test_against_refits(name, seed):
    design = random_design(STRUCTURES[name], seed)
    if seed == 0:  # a clear covariance of full rank
        rng = np.random.default_rng(1)
        y = design.y + sum(
            (t.Z * (1.5 * rng.normal(size=(t.n_groups, t.Z.shape[1])))[t.group]).sum(1) for t in design.terms
        )
        design = replace(design, y=y)
    weights = np.linspace(0.5, 2.0, len(design.y)) if design.weights is None else design.weights
    point = (design.y, design.X, design.terms[0].Z, weights)
    assert bool(mj.estimate(mj.cross_products(replace(design, weights=weights))).singular) == (seed == 4)
    fun = jax.jit(lambda *arrays: outputs(*arrays, design))
    rng = np.random.default_rng(2)
    # The constant column of X stays one: it is recognised by its values.
    direction = tuple(rng.normal(size=a.shape) * (0.3 if a is weights else 1.0) for a in point)
    value, tangent = jax.jvp(fun, point, direction)
    ahead, behind = (fun(*(a + s * STEP * d for a, d in zip(point, direction, strict=True))) for s in (1, -1))
    for key in value:
        for t, u, v in zip(*map(jax.tree.leaves, (tangent[key], ahead[key], behind[key])), strict=True):
            numeric = (np.asarray(u) - np.asarray(v)) / (2 * STEP)
            np.testing.assert_allclose(t, numeric, rtol=1e-5, atol=1e-5 * np.abs(numeric).max() + 1e-8)
    # Reverse mode is the transpose of forward mode.
    weigh = jax.tree.map(lambda x: rng.normal(size=x.shape), value)
    _, pullback = jax.vjp(fun, *point)
    left = sum((np.asarray(g) * d).sum() for g, d in zip(pullback(weigh), direction, strict=True))
    right = sum(
        (np.asarray(t) * w).sum() for t, w in zip(jax.tree.leaves(tangent), jax.tree.leaves(weigh), strict=True)
    )
    np.testing.assert_allclose(left, right, rtol=1e-9)


def test_zeroed_entries_of_theta_do_not_move():
    design = random_design(STRUCTURES["crossed"], 4)
    est, tangent = jax.jvp(
        lambda y: mj.estimate(mj.cross_products(design, y)).theta, (design.y,), (np.ones_like(design.y),)
    )
    est = np.asarray(est)
    assert (est == 0).any()
    np.testing.assert_array_equal(np.asarray(tangent)[est == 0], 0.0)


def test_second_derivative():
    design = random_design(STRUCTURES["one factor, q=1"], 3)
    direction = np.random.default_rng(0).normal(size=len(design.y))
    sigma = jax.jit(lambda s: mj.estimate(mj.cross_products(design, jnp.asarray(design.y) + s * direction)).sigma)
    h = 1e-3
    numeric = (sigma(h) - 2 * sigma(0.0) + sigma(-h)) / h**2
    np.testing.assert_allclose(jax.hessian(sigma)(0.0), numeric, rtol=1e-4)


def test_vmap_over_responses_equals_a_loop():
    design = random_design(STRUCTURES["one factor, q=1"], 3)
    Y = design.y + np.random.default_rng(0).normal(size=(3, len(design.y)))
    batch = jax.vmap(lambda y: mj.estimate(mj.cross_products(design, y)))(Y)
    for i, y in enumerate(Y):
        one = mj.estimate(mj.cross_products(design, y))
        np.testing.assert_allclose(batch.theta[i], one.theta, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(batch.criterion[i], one.criterion, rtol=1e-12)
