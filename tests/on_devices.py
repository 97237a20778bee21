"""Several devices against one: checks for processes that have several, run by test_sharding.py."""

import json
import traceback
from dataclasses import replace
from unittest import mock

import jax
import numpy as np
from designs import Structure, random_design
from jax.experimental.multihost_utils import broadcast_one_to_all, process_allgather
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from refits import fit_at_once

import mixjax as mj
from mixjax.engine import incidence as lookup

SLOPES = Structure(((2, 45, "free"),))
NESTED = Structure(((1, 45, "free"), (2, 12, "parent")))
CROSSED = Structure(((1, 90, "free"), (1, 70, "free")))


def design_of(structure, n=400):
    design = random_design(structure, 0, n=n)
    rng = np.random.default_rng(0)
    for t in design.terms:
        design.y[:] += (t.Z * rng.normal(size=(t.n_groups, t.Z.shape[1]))[t.group]).sum(1)
    return design


def same(a, b, rtol=1e-9):
    np.testing.assert_allclose(b.criterion, a.criterion, rtol=1e-12)
    for name, u, v in zip(a._fields, a, b, strict=True):
        for x, y in zip(jax.tree.leaves(u), jax.tree.leaves(v), strict=True):
            x, y = np.asarray(x), np.asarray(y)
            if name == "b":
                assert not y[len(x) :].any()
                y = y[: len(x)]
            if name != "grad_norm":
                np.testing.assert_allclose(y, x, rtol=rtol, atol=1e-9, err_msg=name)
    assert bool(a.converged)


# --- one fit, eight devices ------------------------------------------------------------------------------------------


def placed_by_level(structure):
    """Products here and spread over eight devices, none of which has all levels."""
    stats = mj.cross_products(design_of(structure))
    placed = mj.shard(stats, jax.make_mesh((4, 2), ("a", "b")))
    share = -(-structure.terms[0][1] // 8)
    for leaf in placed.factors[0]:
        assert {shard.data.shape[-1] for shard in leaf.addressable_shards} == {share}
    eight = mj.estimate(placed)
    assert {shard.data.shape[0] for shard in eight.b[0].addressable_shards} == {share}
    return stats, placed, eight


def slopes():
    stats, _, eight = placed_by_level(SLOPES)
    same(fit_at_once(stats, None, True), eight)


def nested():
    stats, _, eight = placed_by_level(NESTED)
    same(fit_at_once(stats, None, True), eight)


def crossed():
    """Half of the levels go by the list of pairs, half by dense blocks; the derivative of theta with respect to one
    level's Z'y is looked at too."""

    def moved(stats):
        first, *others = stats.factors
        Zy = jax.numpy.asarray(first.Zy)
        fit = lambda Zy: mj.estimate(replace(stats, factors=(first._replace(Zy=Zy), *others)))  # noqa: E731
        est, tangent = jax.jvp(fit, (Zy,), (jax.numpy.zeros_like(Zy).at[0, 3].set(1.0),))
        return est, tangent.theta

    with mock.patch.object(lookup, "_worth_a_list", lambda per_level, cost: np.arange(len(per_level)) % 2 == 0):
        stats, placed, eight = placed_by_level(CROSSED)
        one, along = moved(stats)
        same(one, eight)
        also, along_placed = moved(placed)
    same(one, also)
    np.testing.assert_allclose(along_placed, along, rtol=1e-8)


def rows_inside_jit():
    """Products of rows that stand on several devices: one program from the rows to the estimates."""
    design = design_of(Structure(((2, 12, "free"),)))
    rows = NamedSharding(Mesh(jax.devices(), ("rows",)), PartitionSpec("rows"))
    spread = jax.tree.map(lambda a: jax.device_put(a, rows), design)
    assert len(spread.y.addressable_shards) == 8
    fit = jax.jit(lambda design: mj.estimate(mj.cross_products(design)))
    same(fit_at_once(mj.cross_products(design), None, True), fit(spread))


# --- one fit, two processes ------------------------------------------------------------------------------------------


def levels_of_two_processes():
    for structure in (SLOPES, CROSSED):
        stats = mj.cross_products(design_of(structure))
        est = mj.estimate(mj.shard(stats, jax.make_mesh((4,), ("levels",))))
        assert not est.b[0].is_fully_addressable
        gathered = jax.tree.map(lambda a: process_allgather(a, tiled=True), est)
        same(fit_at_once(stats, None, True), gathered)
        if jax.process_index() == 0:  # the other process would compile the same program
            same(mj.estimate(stats), gathered)


# --- many fits -------------------------------------------------------------------------------------------------------


def products_of_many():
    rng = np.random.default_rng(0)
    X = np.column_stack([np.ones(60), np.tile(np.arange(6.0), 10)])
    term = mj.RandomTerm(Z=X, group=np.repeat(np.arange(10), 6), n_groups=10)
    design = mj.Design(y=np.zeros(60), X=X, terms=(term,))
    return mj.cross_products(design, rng.normal(size=(30_000, 60)) + rng.normal(size=(30_000, 10)).repeat(6, 1))


def same_lanes(one, several):
    """Each device runs the same program on its own blocks: nothing is reordered, so the numbers are the same."""
    for name, a, b in zip(one._fields, one, several, strict=True):
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=1e-13, atol=1e-13, err_msg=name)


def many_fits():
    stats = products_of_many()
    mesh = Mesh(np.array(jax.devices()).reshape(4, 2), ("a", "b"))
    same_lanes(mj.estimate_many(stats, engine="jax"), mj.estimate_many(stats, mesh=mesh))


def many_fits_of_two_processes():
    stats = products_of_many()
    fits = mj.estimate_many(stats, mesh=Mesh(np.array(jax.devices()), ("replicates",)))
    with jax.enable_x64(True):
        jax.tree.map(np.testing.assert_array_equal, broadcast_one_to_all(fits), fits)
    if jax.process_index() == 0:
        same_lanes(mj.estimate_many(stats, engine="jax"), fits)


def run(names):
    """Print which checks failed, and how, as the last line."""
    failures = {}
    for name in names:
        check = globals()[name]
        try:
            with jax.enable_x64("many" not in name):  # batches need no settings of the caller's
                check()
            failures[name] = None
        except Exception:
            failures[name] = traceback.format_exc()[-3_000:]
    print(json.dumps(failures))
