"""Properties that hold for every data set, on random unbalanced designs of a few structures."""

from dataclasses import replace
from functools import cache

import dense
import jax
import numpy as np
import pytest
from designs import STRUCTURES, random_design, random_theta
from hypothesis import given, settings
from hypothesis import strategies as st

import mixjax as mj
from mixjax.covariance import lambdas_of_theta
from mixjax.products.sums import pad

names = st.sampled_from(list(STRUCTURES))
seeds = st.integers(0, 2**31)
common = settings(max_examples=60, deadline=None)


@cache
def compiled():
    return jax.jit(mj.criterion)


def criterion(theta, design, reml=True):
    """Padded, so that the random designs of one structure share a program."""
    with jax.enable_x64(True):
        return float(compiled()(theta, pad(mj.cross_products(design)), reml))


@common
@given(names, seeds, st.booleans(), st.floats(-3, 3))
def test_criterion_is_the_dense_one(name, seed, reml, log_scale):
    structure = STRUCTURES[name]
    design, theta = random_design(structure, seed), np.exp(log_scale) * random_theta(structure, seed)
    with jax.enable_x64(True):
        lambdas = [np.asarray(L) for L in lambdas_of_theta(theta, tuple(q for q, _, _ in structure.terms))]
    np.testing.assert_allclose(criterion(theta, design, reml), dense.criterion(design, lambdas, reml), rtol=1e-9)


@common
@given(names, seeds)
def test_row_order_does_not_matter(name, seed):
    structure = STRUCTURES[name]
    design, theta = random_design(structure, seed), random_theta(structure, seed)
    order = np.random.default_rng(seed).permutation(len(design.y))
    shuffled = jax.tree.map(lambda x: x[order], design)
    np.testing.assert_allclose(criterion(theta, shuffled), criterion(theta, design), rtol=1e-11)


@common
@given(names, seeds)
def test_names_of_groups_do_not_matter(name, seed):
    structure = STRUCTURES[name]
    design, theta = random_design(structure, seed), random_theta(structure, seed)
    rng = np.random.default_rng(seed)
    new = {m: rng.permutation(m) for m in {t.n_groups for t in design.terms}}
    relabelled = replace(design, terms=tuple(replace(t, group=new[t.n_groups][t.group]) for t in design.terms))
    np.testing.assert_allclose(criterion(theta, relabelled), criterion(theta, design), rtol=1e-11)


@common
@given(names, seeds, st.floats(0.01, 100), st.floats(-1e4, 1e4))
def test_response_scaled_and_shifted_in_the_span_of_x(name, seed, a, c):
    structure = STRUCTURES[name]
    design, theta = random_design(structure, seed), random_theta(structure, seed)
    n, p = design.X.shape
    y = a * (design.y - design.offset) + design.X @ np.full(p, c) + design.offset
    moved = criterion(theta, replace(design, y=y))
    np.testing.assert_allclose(moved, criterion(theta, design) + 2 * (n - p) * np.log(a), rtol=1e-8)


@common
@given(names, seeds, st.floats(1e-4, 1e4))
def test_scaling_a_slope_scales_theta_back(name, seed, a):
    structure = STRUCTURES[name]
    design, theta = random_design(structure, seed), random_theta(structure, seed)
    term = design.terms[0]
    q = term.Z.shape[1]
    scaled = replace(design, terms=(replace(term, Z=term.Z * a), *design.terms[1:]))
    k = q * (q + 1) // 2
    np.testing.assert_allclose(
        criterion(np.concatenate([theta[:k] / a, theta[k:]]), scaled), criterion(theta, design), rtol=1e-10
    )


@common
@given(names, seeds, st.integers(6, 34))
def test_two_halves_add_up(name, seed, cut):
    structure = STRUCTURES[name]
    design, theta = random_design(structure, seed), random_theta(structure, seed)
    halves = [jax.tree.map(lambda x, rows=rows: x[rows], design) for rows in (slice(cut), slice(cut, None))]
    total = mj.cross_products(halves[0]) + mj.cross_products(halves[1])
    whole = mj.cross_products(design)
    assert float(total.n) == float(whole.n)
    assert total.layout == whole.layout
    with jax.enable_x64(True):
        for reml in (True, False):
            np.testing.assert_allclose(
                compiled()(theta, pad(total), reml), compiled()(theta, pad(whole), reml), rtol=1e-9
            )


def test_adding_is_refused_when_the_structure_differs():
    one, other = (mj.cross_products(random_design(STRUCTURES[name], 0)) for name in ("crossed", "nested"))
    with pytest.raises(ValueError, match="different structure"):
        one + other


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.sampled_from(["one factor, q=2, weights", "nested", "crossed", "two terms on a factor"]), seeds)
def test_a_fit_is_a_minimum_and_its_parts_agree_with_the_dense_formulas(name, seed):
    design = random_design(STRUCTURES[name], seed)
    with jax.enable_x64(True):
        stats = pad(mj.cross_products(design))
        est = jax.tree.map(np.asarray, mj.estimate(stats))
        assert est.converged, mj.Result(int(est.result)).message
        np.testing.assert_allclose(est.criterion, compiled()(est.theta, stats, True), rtol=1e-9)
        rng = np.random.default_rng(seed)
        for scale in (1e-4, 1e-2, 0.3):
            for _ in range(4):
                elsewhere = est.theta + scale * rng.normal(size=est.theta.shape)
                assert compiled()(elsewhere, stats, True) >= est.criterion - 1e-9
    V = dense.covariance(design, est.Sigma, float(est.sigma))
    Vi = np.linalg.inv(V)
    vcov = np.linalg.inv(design.X.T @ Vi @ design.X)
    beta = vcov @ design.X.T @ Vi @ (design.y - design.offset)
    np.testing.assert_allclose(est.vcov, vcov, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(est.beta, beta, rtol=1e-6, atol=1e-7)
    residual = Vi @ (design.y - design.offset - design.X @ beta)
    for term, Sigma, b in zip(design.terms, est.Sigma, est.b, strict=True):
        moments = np.zeros((term.n_groups, term.Z.shape[1]))
        np.add.at(moments, term.group, term.Z * residual[:, None])
        np.testing.assert_allclose(b[: term.n_groups], moments @ Sigma, rtol=1e-6, atol=1e-7)
