"""The log density split over levels: against the dense density of each, and added up."""

from dataclasses import replace

import dense
import jax
import numpy as np
import pytest
from designs import STRUCTURES, random_design

import mixjax as mj

SPLIT = [name for name in STRUCTURES if "crossed" not in name]


def parameters(design, seed):
    rng = np.random.default_rng(seed)
    chol = tuple(0.5 * rng.normal(size=s.k) for s in design.structures)
    return mj.MarginalParams(rng.normal(size=design.X.shape[1]), np.array(-0.3), chol)


def outermost(design):
    """The grouping factor with fewest levels."""
    return min(design.terms, key=lambda term: term.n_groups)


@pytest.mark.parametrize("name", SPLIT)
def test_each_level_is_the_dense_density_of_its_rows(name, x64):
    design = random_design(STRUCTURES[name], 3)
    p = parameters(design, 4)
    found = np.asarray(mj.marginal_loglik_by_level(p, design))
    group, m = outermost(design).group, outermost(design).n_groups
    Sigmas = [np.asarray(s.factor(s.exponentials(c))) for s, c in zip(design.structures, p.chol, strict=True)]
    for level in range(m):
        at = group == level
        part = replace(
            design,
            y=design.y[at],
            X=design.X[at],
            terms=tuple(replace(t, Z=t.Z[at], group=t.group[at]) for t in design.terms),
            weights=None if design.weights is None else design.weights[at],
            offset=design.offset[at],
        )
        expected = dense.loglik(part, p.beta, [F @ F.T for F in Sigmas], np.exp(p.log_sigma)) if at.any() else 0.0
        assert found[level] == pytest.approx(expected, rel=1e-10, abs=1e-10)
    total = float(mj.marginal_loglik(p, design))
    assert found.sum() == pytest.approx(total, rel=1e-12)


def test_scores_by_level_add_up(x64):
    design = random_design(STRUCTURES["one factor, q=2, weights"], 1)
    p = parameters(design, 2)
    each = jax.jacobian(mj.marginal_loglik_by_level)(p, design)
    total = jax.grad(mj.marginal_loglik)(p, design)
    for a, b in zip(jax.tree.leaves(each), jax.tree.leaves(total), strict=True):
        assert np.allclose(a.sum(0), b, rtol=1e-9, atol=1e-9)


def test_inside_jit_and_by_number(x64):
    design = random_design(STRUCTURES["nested"], 0)
    p = parameters(design, 0)
    outside = mj.marginal_loglik_by_level(p, design, factor=1)
    inside = jax.jit(lambda y: mj.marginal_loglik_by_level(p, replace(design, y=y)))(design.y)
    assert np.allclose(outside, inside, rtol=1e-10)


def test_what_does_not_split_is_refused():
    p = parameters(random_design(STRUCTURES["crossed"], 0), 0)
    with pytest.raises(ValueError, match="cross each other"):
        mj.marginal_loglik_by_level(p, random_design(STRUCTURES["crossed"], 0))
    nested = random_design(STRUCTURES["nested"], 0)
    with pytest.raises(ValueError, match=r"factor 0 is nested in factor 1.*factor=1"):
        mj.marginal_loglik_by_level(parameters(nested, 0), nested, factor=0)
    with pytest.raises(ValueError, match=r"one of 0 \.\. 1, got 5"):
        mj.marginal_loglik_by_level(parameters(nested, 0), nested, factor=5)
    one = random_design(STRUCTURES["one factor, q=1"], 0)
    with pytest.raises(ValueError, match="beta has shape"):
        mj.marginal_loglik_by_level(parameters(one, 0)._replace(beta=np.zeros(3)), one)
