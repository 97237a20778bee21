"""Derivatives of the estimates with respect to the data, through the fit: against refits, in both modes, twice."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fit_of
from designs import STRUCTURES, random_design
from hypothesis import given, settings
from hypothesis import strategies as st
from refits import fit_at_once

import mixjax as mj
from mixjax.products.sums import pad

pytestmark = pytest.mark.usefixtures("x64")
STEP = 1e-5


FIELDS = ("theta", "beta", "sigma", "Sigma", "vcov", "b", "criterion")


def moved_design(design, y, X, Z, weights):
    terms = (replace(design.terms[0], Z=Z), *design.terms[1:])
    return replace(design, y=y, X=X, terms=terms, weights=weights)


def refitted(design, fields=FIELDS):
    """The estimates of another design, by NumPy: another search and other derivatives than those under test."""
    est = fit_at_once(mj.cross_products(design), None, True)
    return {name: getattr(est, name) for name in fields}


@cache
def program(name):
    """A design; and its outputs, their derivative along a direction, and the transpose of that, compiled once."""
    design = random_design(STRUCTURES[name], 4)

    def fun(*arrays):
        est = mj.estimate(mj.cross_products(moved_design(design, *arrays)))
        return {name: getattr(est, name) for name in FIELDS}

    @jax.jit
    def derivatives(point, direction, weigh):
        value, along = jax.linearize(fun, *point)
        return value, along(*direction), jax.linear_transpose(along, *point)(weigh)

    return design, derivatives


def point_of(design, y):
    weights = np.linspace(0.5, 2.0, len(y)) if design.weights is None else design.weights
    return (y, design.X, design.terms[0].Z, weights)


def weights_of_outputs(design, rng):
    """A random number for each number of the estimates."""
    return {name: jax.tree.map(lambda x: rng.normal(size=np.shape(x)), x) for name, x in refitted(design).items()}


@pytest.mark.parametrize("kind", ["regular", "singular"])
@pytest.mark.parametrize("name", ["one factor, q=2, weights", "crossed", "nested"])
def test_against_refits(name, kind):
    design, derivatives = program(name)
    y = design.y
    if kind == "regular":  # a clear covariance of full rank
        rng = np.random.default_rng(4 if name == "nested" else 1)
        y = y + sum((t.Z * (1.5 * rng.normal(size=(t.n_groups, t.Z.shape[1])))[t.group]).sum(1) for t in design.terms)
    point = point_of(design, y)
    rng = np.random.default_rng(2)
    # The constant column of X stays one: it is recognised by its values.
    direction = tuple(rng.normal(size=a.shape) * (0.3 if a is point[3] else 1.0) for a in point)
    weigh = weights_of_outputs(design, rng)
    value, tangent, pulled = derivatives(point, direction, weigh)
    assert (np.asarray(value["theta"]) == 0).any() == (kind == "singular")
    ahead, behind = (
        refitted(moved_design(design, *(a + s * STEP * d for a, d in zip(point, direction, strict=True))))
        for s in (1, -1)
    )
    for key in value:
        for t, u, v in zip(*map(jax.tree.leaves, (tangent[key], ahead[key], behind[key])), strict=True):
            numeric = (u - v) / (2 * STEP)
            np.testing.assert_allclose(t, numeric, rtol=1e-5, atol=1e-5 * np.abs(numeric).max() + 1e-8)
    # Reverse mode is the transpose of forward mode.
    left = sum((np.asarray(g) * d).sum() for g, d in zip(pulled, direction, strict=True))
    right = sum(
        (np.asarray(t) * w).sum() for t, w in zip(jax.tree.leaves(tangent), jax.tree.leaves(weigh), strict=True)
    )
    np.testing.assert_allclose(left, right, rtol=1e-9)


def test_zeroed_entries_of_theta_do_not_move():
    design, derivatives = program("crossed")
    point = point_of(design, design.y)
    along_y = (np.ones_like(design.y), *(np.zeros_like(a) for a in point[1:]))
    value, tangent, _ = derivatives(point, along_y, weights_of_outputs(design, np.random.default_rng(0)))
    zero = np.asarray(value["theta"]) == 0
    assert zero.any()
    np.testing.assert_array_equal(np.asarray(tangent["theta"])[zero], 0.0)


def test_second_derivative():
    design = random_design(STRUCTURES["one factor, q=1"], 3)
    direction = np.random.default_rng(0).normal(size=len(design.y))
    sigma = lambda s: mj.estimate(mj.cross_products(design, jnp.asarray(design.y) + s * direction)).sigma  # noqa: E731
    h = 1e-3
    behind, here, ahead = (refitted(replace(design, y=design.y + s * direction))["sigma"] for s in (-h, 0.0, h))
    np.testing.assert_allclose(jax.jit(jax.hessian(sigma))(0.0), (ahead - 2 * here + behind) / h**2, rtol=1e-4)


def test_vmap_over_responses_equals_a_loop():
    design = random_design(STRUCTURES["one factor, q=1"], 3)
    Y = design.y + np.random.default_rng(0).normal(size=(3, len(design.y)))
    batch = jax.vmap(lambda y: mj.estimate(mj.cross_products(design, y)))(Y)
    for i, y in enumerate(Y):
        one = mj.estimate(mj.cross_products(design, y))
        np.testing.assert_allclose(batch.theta[i], one.theta, rtol=1e-8, atol=1e-10)
        np.testing.assert_allclose(batch.criterion[i], one.criterion, rtol=1e-12)


@pytest.mark.parametrize(
    "name", ["singular_correlation_one", "singular_crossed_zero", "singular_rank_two", "pastes_nested"]
)
def test_reference_data_against_refits(name):
    """theta, beta, sigma, Sigma and b move with y, X and weights as refits say, at singular and nested fits."""
    fit = fit_of(name, "REML")
    assert fit.is_singular == name.startswith("singular")
    design = fit.design
    y, X = np.asarray(design.y), np.asarray(design.X)
    rng = np.random.default_rng(3)
    # A constant column stays constant: it is recognised by its values.
    X_moves = rng.normal(size=X.shape) * X.std(0)
    direction = (rng.normal(size=y.shape) * y.std(), X_moves, 0.3 * rng.normal(size=y.shape))

    def products(y, X, weights):
        return mj.cross_products(replace(design, y=y, X=X, weights=weights))

    fields = ("theta", "beta", "sigma", "Sigma", "b")

    def fun(stats):
        est = mj.estimate(stats)
        return {key: getattr(est, key) for key in fields}

    point = (y, X, np.ones_like(y))
    stats, tangent = jax.jit(lambda p, d: jax.jvp(products, p, d))(point, direction)
    value, moved = jax.jit(lambda s, t: jax.jvp(fun, (s,), (t,)))(jax.tree.map(jnp.asarray, stats), tangent)
    moves = [tuple(a + s * STEP * d for a, d in zip(point, direction, strict=True)) for s in (1.0, -1.0)]
    shifted = [refitted(replace(design, y=y, X=X, weights=weights), fields) for y, X, weights in moves]
    for key in value:
        for t, u, v in zip(*map(jax.tree.leaves, (moved[key], *(s[key] for s in shifted))), strict=True):
            numeric = (u - v) / (2 * STEP)
            np.testing.assert_allclose(t, numeric, rtol=1e-5, atol=1e-5 * np.abs(numeric).max() + 1e-7, err_msg=key)


def float0_or(leaf, tangent):
    """Integers have no tangent."""
    integer = np.issubdtype(np.asarray(leaf).dtype, np.integer)
    return np.zeros(np.shape(leaf), jax.dtypes.float0) if integer else np.asarray(tangent, float)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000))
def test_random_designs_against_refits(seed):
    """One compiled program for many designs: derivatives along random directions of the cross-products themselves."""
    stats = jax.tree.map(jnp.asarray, pad(mj.cross_products(random_design(STRUCTURES["one factor, q=1"], seed))))
    if int(jitted_fit(stats)[1]) != 0 or float(jitted_fit(stats)[0]["theta"][0]) < 0.05:
        return  # no derivative, or one of a huge curvature next to the edge
    rng = np.random.default_rng(seed)
    direction = replace(
        jax.tree.map(lambda a: float0_or(a, np.zeros(a.shape)), stats),
        factors=tuple(f._replace(ZZ=np.asarray(f.ZZ) * rng.normal(), ZX=0 * f.ZX, Zy=np.asarray(f.Zy) * rng.normal())
                      for f in stats.factors),
        Xy=np.asarray(rng.normal(size=stats.Xy.shape)),
        yy=np.asarray(rng.normal()),
    )  # fmt: skip
    moved, pulled = jitted_derivatives(stats, direction)

    def shift(s):
        return jax.tree.map(
            lambda a, d: a if np.asarray(d).dtype == jax.dtypes.float0 else a + s * 1e-5 * d, stats, direction
        )

    ahead, behind = jitted_fit(shift(1.0))[0], jitted_fit(shift(-1.0))[0]
    for key in moved:
        numeric = (np.asarray(ahead[key]) - np.asarray(behind[key])) / 2e-5
        np.testing.assert_allclose(moved[key], numeric, rtol=1e-5, atol=1e-5 * np.abs(numeric).max() + 1e-7)
    np.testing.assert_allclose(pulled, sum(np.asarray(m).sum() for m in jax.tree.leaves(moved)), rtol=1e-9, atol=1e-10)


@jax.jit
def jitted_fit(stats):
    est = mj.estimate(stats)
    return {"theta": est.theta, "beta": est.beta, "sigma": est.sigma}, est.result


@jax.jit
def jitted_derivatives(stats, direction):
    """Forward along the direction, and backward from the sum of all outputs, along the same direction."""
    fun = lambda s: jitted_fit(s)[0]  # noqa: E731
    _, moved = jax.jvp(fun, (stats,), (direction,))
    gradient = jax.grad(lambda s: sum(leaf.sum() for leaf in jax.tree.leaves(fun(s))), allow_int=True)(stats)
    pairs = zip(jax.tree.leaves(gradient), jax.tree.leaves(direction), strict=True)
    return moved, sum((g * d).sum() for g, d in pairs if d.dtype != jax.dtypes.float0)


def on_the_kink():
    """One-way layout whose mean squares between and within are equal: the estimate 0 has derivative 0 on both sides."""
    m, n = 6, 4
    group = np.repeat(np.arange(m), n)
    y = np.random.default_rng(0).normal(size=m * n)
    means = np.bincount(group, y) / n
    within, between = y - means[group], (means - y.mean())[group]
    ratio = (between @ between / (m - 1)) / (within @ within / (m * (n - 1)))
    term = mj.RandomTerm(Z=np.ones((m * n, 1)), group=group, n_groups=m)
    return mj.Design(y=within + between / np.sqrt(ratio), X=np.ones((m * n, 1)), terms=(term,))


def zero_leading_column():
    """Slopes vary between groups, intercepts do not at all: the first column of Lambda is zero, the second is not."""
    m, n = 8, 5
    group, x = np.repeat(np.arange(m), n), np.tile(np.arange(n) - 2.0, m)
    rng = np.random.default_rng(1)
    noise = rng.normal(size=m * n)
    noise -= (np.bincount(group, noise) / n)[group]
    Z = np.column_stack([np.ones(m * n), x])
    term = mj.RandomTerm(Z=Z, group=group, n_groups=m)
    return mj.Design(y=noise + 2.0 * x * rng.normal(size=m)[group], X=Z, terms=(term,))


@pytest.mark.parametrize("make", [on_the_kink, zero_leading_column])
def test_where_derivatives_do_not_exist_they_are_nan_and_the_code_says_so(make):
    design = make()
    along = np.cos(np.arange(len(design.y)))
    fit = lambda y: mj.estimate(mj.cross_products(design, y))  # noqa: E731
    est, tangent = jax.jit(lambda y: jax.jvp(fit, (y,), (along,)))(design.y)
    assert int(est.result) == mj.Result.NONDIFFERENTIABLE
    assert bool(est.converged)
    assert bool(est.singular)
    assert np.isnan(tangent.theta).all()
    many = mj.estimate_many(mj.cross_products(design, design.y[None]))
    assert many.result[0] == mj.Result.NONDIFFERENTIABLE
    assert many.converged[0]
