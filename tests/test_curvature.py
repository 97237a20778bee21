"""The closed-form derivatives over lanes: against automatic differentiation of the criterion, and lanes against one."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from designs import STRUCTURES, Structure, random_design, random_theta

import mixjax as mj
from mixjax.engine.curvature import profile_lanes, value_gradient_hessian
from mixjax.engine.engine import Engine
from mixjax.engine.moments import LevelSums, moments_of
from mixjax.estimation.blocks import Blocks
from mixjax.estimation.lane_program import slice_of
from mixjax.estimation.start import minque_start
from mixjax.products.sizes import has_closed_form
from mixjax.products.sums import pad

pytestmark = pytest.mark.usefixtures("x64")

CLOSED = {name: structure for name, structure in STRUCTURES.items() if name != "one factor, q=4"} | {
    "one factor, q=3": Structure(((3, 8, "free"),)),
    "crossed, q=2 and 2": Structure(((2, 12, "free"), (2, 5, "free"))),
}


@jax.jit
def by_differentiation(theta, stats, reml):
    def objective(x):
        return Engine(stats, reml).profiled(x).criterion

    return objective(theta), jax.grad(objective)(theta), jax.hessian(objective)(theta)


@jax.jit
def closed_form(theta, stats, reml):
    moments = moments_of(stats)
    x = theta[:, None]
    return *value_gradient_hessian(x, moments, reml), profile_lanes(x, moments, reml).criterion


@pytest.mark.parametrize("name", CLOSED)
def test_against_automatic_differentiation(name):
    structure = CLOSED[name]
    for seed, reml in ((0, True), (1, False)):
        stats = pad(mj.cross_products(random_design(structure, seed)))  # one shape, one program
        theta = random_theta(structure, seed)
        if seed:
            theta[0] = 0.0  # a column may vanish
        f, g, H = by_differentiation(theta, stats, reml)
        f2, g2, H2, f3 = closed_form(theta, stats, reml)
        np.testing.assert_allclose([f2[0], f3[0]], f, rtol=1e-13)
        np.testing.assert_allclose(g2[:, 0], g, rtol=1e-9, atol=1e-11 * np.abs(H).max())
        np.testing.assert_allclose(H2[..., 0], H, rtol=1e-9, atol=1e-12 * np.abs(H).max())


def test_without_fixed_effects():
    design = random_design(CLOSED["crossed"], 2)
    stats = mj.cross_products(replace(design, X=design.X[:, :0]))
    theta = random_theta(CLOSED["crossed"], 2)
    for ours, theirs in zip(closed_form(theta, stats, True), by_differentiation(theta, stats, True), strict=False):
        np.testing.assert_allclose(ours[..., 0], theirs, rtol=1e-9)


def balanced(m=12, n=6, crossed=False):
    """Random intercepts and slopes, the same for all groups; or two crossed factors with every cell once."""
    group = np.repeat(np.arange(m), n)
    x = np.tile(np.arange(n) - 1.0, m)
    X = np.column_stack([np.ones(m * n), x])
    terms = [(X[:, :1], group, m), (X[:, :1], np.tile(np.arange(n), m), n)] if crossed else [(X, group, m)]
    return mj.Design(y=np.zeros(m * n), X=X, terms=tuple(mj.RandomTerm(*term) for term in terms))


@pytest.mark.parametrize("crossed", [False, True])
def test_classes_equal_levels(crossed):
    """One class of all groups gives the numbers that the groups give one by one."""
    design = balanced(crossed=crossed)
    stats = mj.cross_products(design, np.random.default_rng(0).normal(size=(5, 72)))
    assert stats.classes is not None
    assert len(stats.classes.count) == 1
    moments = []
    for each in (stats, replace(stats, classes=None)):
        blocks = Blocks(each, "cpu")
        moments.append(slice_of(blocks.lanes(0, True).moments, 0, 5, blocks.sizes.block))
    assert isinstance(moments[1].sums, LevelSums)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(2 if crossed else 3, 5)))
    evaluate = jax.jit(lambda moments: value_gradient_hessian(x, moments, True))
    for by_class, by_level in zip(*map(evaluate, moments), strict=True):
        np.testing.assert_allclose(by_class, by_level, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("crossed", [False, True])
def test_the_start_is_the_reml_estimate_of_balanced_designs(crossed):
    design = balanced(crossed=crossed)
    rng = np.random.default_rng(3)
    y = rng.normal(size=72) + sum(
        (2.0 * t.Z * rng.normal(size=(t.n_groups, t.Z.shape[1]))[t.group]).sum(1) for t in design.terms
    )
    stats = jax.tree.map(jnp.asarray, mj.cross_products(design, y))
    assert has_closed_form(stats)
    est = mj.estimate(stats)
    assert not bool(est.singular)
    assert int(est.iterations) == 1
    start = jax.jit(lambda stats: minque_start(moments_of(stats))[:, 0])(stats)
    np.testing.assert_allclose(closed_form(start, stats, True)[1], 0.0, atol=1e-8)
