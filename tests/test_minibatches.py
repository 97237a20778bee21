"""Minibatches over groups: one shape, every level once an epoch, and losses whose mean is the full one."""

from dataclasses import replace

import dense
import jax
import numpy as np
import pytest
from designs import STRUCTURES, random_design

import mixjax as mj

SPLIT = [name for name in STRUCTURES if "crossed" not in name]


def parameters(design, seed=0):
    rng = np.random.default_rng(seed)
    chol = tuple(0.5 * rng.normal(size=s.k) for s in design.structures)
    return mj.MarginalParams(rng.normal(size=design.X.shape[1]), np.array(-0.3), chol)


def one_factor(X=None, n_levels=6, seed=0):
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(n_levels), rng.integers(1, 6, n_levels))
    n = len(group)
    X = np.ones((n, 1)) if X is None else X(group)
    term = mj.RandomTerm(Z=np.column_stack([np.ones(n), rng.normal(size=n)]), group=group, n_groups=n_levels)
    return mj.Design(y=rng.normal(size=n), X=X, terms=(term,), offset=rng.normal(size=n))


@pytest.mark.parametrize("name", ["one factor, q=2, weights", "two terms on a factor", "nested chain of three"])
def test_the_mean_gradient_of_an_epoch_is_the_full_one(name, x64):
    design = random_design(STRUCTURES[name], 3)
    p, batches, traced = parameters(design), mj.group_batches(design, 2, key=4), []

    @jax.jit
    @jax.value_and_grad
    def part(p, batch):
        traced.append(batch)
        return mj.marginal_loglik_by_level(p, batch.design).sum()

    full = jax.value_and_grad(mj.marginal_loglik)(p, design)
    for epoch in batches.epochs(2):
        parts = [part(p, batch) for batch in epoch]
        assert len(parts) == len(batches)
        mean = jax.tree.map(lambda *values: batches.scale * np.mean(values, axis=0), *parts)
        for found, expected in zip(jax.tree.leaves(mean), jax.tree.leaves(full), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11)
    assert len(traced) == 1  # batches of one shape, whichever levels are in them


@pytest.mark.parametrize("name", SPLIT)
def test_an_epoch_has_every_row_once(name):
    design = random_design(STRUCTURES[name], 5)
    outer = min(design.terms, key=lambda term: term.n_groups).group
    batches = mj.group_batches(design, 2, key=0)
    shapes, rows, levels = set(), [], []
    for batch in batches.epoch(1):
        there = batch.design.present
        rows += batch.rows[there].tolist()
        levels += batch.levels[batch.levels >= 0].tolist()
        np.testing.assert_array_equal(batch.design.y[there], design.y[batch.rows[there]])
        found = [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(batch)]
        shapes.add((tuple(found), jax.tree.structure(batch)))
        own = min(batch.design.terms, key=lambda term: term.n_groups)
        np.testing.assert_array_equal(batch.levels[own.group[there]], outer[batch.rows[there]])
        for part in (batch.design.y, batch.design.X, batch.design.offset, *(t.Z for t in batch.design.terms)):
            assert not part[~there].any()
    assert sorted(rows) == list(range(len(design.y)))
    assert sorted(levels) == sorted(set(outer.tolist()))
    assert len(shapes) == 1
    again = [batch.levels.tolist() for batch in mj.group_batches(design, 2, key=0).epoch(1)]
    assert again == [batch.levels.tolist() for batch in batches.epoch(1)]
    assert again != [batch.levels.tolist() for batch in batches.epoch(2)]


def test_levels_of_a_batch_have_the_density_of_the_whole(x64):
    design = one_factor()
    p = parameters(design)
    whole = np.asarray(mj.marginal_loglik_by_level(p, design))
    for batch in mj.group_batches(design, 4, key=0).epoch(0):
        found = np.asarray(mj.marginal_loglik_by_level(p, batch.design))
        real = batch.levels >= 0
        np.testing.assert_allclose(found[real], whole[batch.levels[real]], rtol=1e-11)
        np.testing.assert_array_equal(found[~real], 0.0)


def test_each_batch_is_unbiased_where_size_does_not_divide_the_levels():
    design = one_factor(n_levels=5)
    value = np.array([10.0, -3.0, 4.0, 0.5, 7.0])
    batches = mj.group_batches(design, 2, key=9)
    assert (len(batches), batches.scale) == (3, 3.0)
    found = []
    for epoch in range(4_000):
        first = next(batches.epoch(epoch)).levels
        found.append(batches.scale * value[first[first >= 0]].sum())
    error = np.std(found) / np.sqrt(len(found))
    assert abs(np.mean(found) - value.sum()) < 4 * error


def test_rows_that_are_not_there_add_nothing_whatever_stands_in_them(x64):
    design = random_design(STRUCTURES["one factor, q=2, weights"], 3)
    p = parameters(design)
    batch = next(batch for batch in mj.group_batches(design, 2, 0).epoch(0) if not batch.design.present.all()).design
    junk = np.where(batch.present, 0.0, np.random.default_rng(0).normal(size=len(batch.y)))
    term = batch.terms[0]
    spoilt = replace(
        batch,
        y=batch.y + junk,
        X=batch.X + junk[:, None],
        offset=batch.offset + junk,
        weights=np.where(batch.present, batch.weights, 7.0),
        terms=(replace(term, Z=term.Z + junk[:, None]),),
    )

    def by_level(p, design):
        return mj.marginal_loglik_by_level(p, design).sum()

    step = jax.jit(jax.value_and_grad(by_level))
    for found, expected in zip(jax.tree.leaves(step(p, spoilt)), jax.tree.leaves(step(p, batch)), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-10, atol=1e-10)
    # Derivatives by what a network would put there are zero, and finite.
    of_offset = jax.grad(lambda offset: by_level(p, replace(batch, offset=offset)))(batch.offset)
    assert np.isfinite(of_offset).all()
    np.testing.assert_array_equal(np.asarray(of_offset)[~batch.present], 0.0)
    # The whole density of the batch, and the number of rows, leave them out too.
    assert float(mj.cross_products(spoilt).n) == batch.present.sum()
    there = batch.present
    rest = replace(
        batch,
        **{name: getattr(batch, name)[there] for name in ("y", "X", "offset", "weights")},
        terms=(replace(term, Z=term.Z[there], group=term.group[there]),),
        present=None,
    )
    assert float(mj.marginal_loglik(p, spoilt)) == pytest.approx(float(mj.marginal_loglik(p, rest)), rel=1e-10)


def test_fixed_effects_that_a_batch_cannot_tell(x64):
    """A column that is constant within levels depends on the others in a batch of one level."""
    design = one_factor(lambda group: np.column_stack([np.ones(len(group)), group % 2, group**2.0]))
    p = parameters(design)
    F = np.asarray(design.structures[0].factor(design.structures[0].exponentials(p.chol[0])))
    for batch in mj.group_batches(design, 1, key=0).epoch(0):
        own = batch.rows[batch.design.present]
        term = design.terms[0]
        part = replace(
            design,
            y=design.y[own],
            X=design.X[own],
            offset=design.offset[own],
            terms=(replace(term, Z=term.Z[own], group=term.group[own]),),
        )
        expected = dense.loglik(part, p.beta, [F @ F.T], np.exp(p.log_sigma))
        assert float(mj.marginal_loglik_by_level(p, batch.design)[0]) == pytest.approx(expected, rel=1e-10)


def test_nesting_that_is_said_is_seen_in_traced_groups(x64):
    design = random_design(STRUCTURES["nested"], 0)
    p = parameters(design)

    def total(design):
        return mj.marginal_loglik_by_level(p, design).sum()

    with pytest.raises(ValueError, match="cross each other"):
        jax.jit(total)(design)
    said = replace(design, nested=(0, 1))
    assert float(jax.jit(total)(said)) == pytest.approx(float(mj.marginal_loglik(p, design)), rel=1e-11)
    assert float(mj.marginal_loglik(p, said)) == pytest.approx(float(mj.marginal_loglik(p, design)), rel=1e-12)
    with pytest.raises(ValueError, match=r"nested=\(1, 0\): levels of grouping factor 1 lie in several"):
        mj.cross_products(replace(design, nested=(1, 0)))
    with pytest.raises(ValueError, match="must have one and the same group"):
        mj.cross_products(replace(design, nested=(0, 0)))
    with pytest.raises(ValueError, match="nested has 1 numbers for 2 terms"):
        mj.cross_products(replace(design, nested=(0,)))


def test_what_cannot_be_is_refused():
    for name in set(STRUCTURES) - set(SPLIT):
        with pytest.raises(ValueError, match=r"cross each other \(terms\[1\].*biased"):
            mj.group_batches(random_design(STRUCTURES[name], 0), 2)
    design = one_factor()
    with pytest.raises(ValueError, match="size must be 6 or less"):
        mj.group_batches(design, 7)
    with pytest.raises(ValueError, match="size must be an integer"):
        mj.group_batches(design, 0)
    with pytest.raises(ValueError, match=r"numbers \(size\)|numbers of trials"):
        mj.group_batches(replace(design, size=np.ones(len(design.y))), 2)
    with pytest.raises(ValueError, match=r"does not know Design\.dispersion"):
        mj.group_batches(replace(design, dispersion=np.ones((len(design.y), 1))), 2)
    related = replace(design, terms=(replace(design.terms[0], levels=np.eye(6)),))
    with pytest.raises(ValueError, match=r"does not know RandomTerm\.levels"):
        mj.group_batches(related, 2)
    with pytest.raises(ValueError, match="nested= is not for random effects whose levels have a known"):
        mj.cross_products(replace(related, nested=(0,)))
    with pytest.raises(ValueError, match="outside JAX's transformations"):
        jax.jit(lambda y: mj.group_batches(replace(design, y=y), 2).scale)(design.y)
    batch = next(mj.group_batches(design, 2).epoch(0)).design
    for refused in (
        lambda: mj.group_batches(batch, 1),
        lambda: mj.cross_products(batch, np.zeros((3, len(batch.y)))),
        lambda: mj.rows(batch, "poisson"),
        lambda: mj.default_priors(batch),
    ):
        with pytest.raises(ValueError, match="rows that are not there"):
            refused()
    with pytest.raises(ValueError, match="present must be booleans"):
        mj.cross_products(replace(design, present=np.ones(len(design.y))))
    with pytest.raises(ValueError, match="beta has shape"):
        mj.marginal_loglik_by_level(parameters(batch)._replace(beta=np.zeros(3)), batch)
    assert repr(mj.group_batches(design, 4)).startswith("GroupBatches(6 levels, 4 a batch: 2 batches")
