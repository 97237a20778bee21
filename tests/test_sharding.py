"""One fit over several devices: the same numbers as on one, and no device holds all levels."""

import jax
import numpy as np
import pytest
from conftest import over_loopback, run_python
from designs import STRUCTURES, random_design

import mixjax as mj

SETUP = """
    import jax, numpy as np
    jax.config.update("jax_enable_x64", True)
    from designs import Structure, random_design
    import mixjax as mj

    def design_of(structure, n=400):
        design = random_design(structure, 0, n=n)
        rng = np.random.default_rng(0)
        for t in design.terms:
            design.y[:] += (t.Z * rng.normal(size=(t.n_groups, t.Z.shape[1]))[t.group]).sum(1)
        return design

    def same(a, b, rtol=1e-9):
        for name, u, v in zip(a._fields, a, b):
            for x, y in zip(jax.tree.leaves(u), jax.tree.leaves(v)):
                x, y = np.asarray(x), np.asarray(y)
                if name == "b":
                    assert not y[len(x):].any()
                    y = y[: len(x)]
                if name != "grad_norm":
                    np.testing.assert_allclose(y, x, rtol=rtol, atol=1e-9, err_msg=name)
        assert bool(a.converged)
"""
EIGHT = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_cpu_use_fusion_emitters=false"}


@pytest.mark.parametrize(
    "structure",
    ["((2, 45, 'free'),)", "((1, 45, 'free'), (2, 12, 'parent'))", "((1, 90, 'free'), (1, 70, 'free'))"],
    ids=["slopes", "nested", "crossed"],
)
def test_eight_devices_give_the_numbers_of_one(structure):
    """Sums over levels are reordered, so the last bits may move: the criterion by 1e-12, the rest with it.

    Of the crossed factors, half of the levels go by the list of pairs, half by dense blocks; there the derivative of
    theta with respect to one level's Z'y is looked at too.
    """
    out = run_python(
        SETUP
        + f"""
    structure = {structure}
    """
        + """
    from mixjax.engine import incidence as lookup
    lookup._worth_a_list = lambda per_level, cost: np.arange(len(per_level)) % 2 == 0
    design = design_of(Structure(structure))
    stats = mj.cross_products(design)
    placed = mj.shard(stats, jax.make_mesh((4, 2), ("a", "b")))
    share = -(-structure[0][1] // 8)
    for leaf in placed.factors[0]:
        assert {shard.data.shape[-1] for shard in leaf.addressable_shards} == {share}
    one, eight = mj.estimate(stats), mj.estimate(placed)
    np.testing.assert_allclose(eight.criterion, one.criterion, rtol=1e-12)
    same(one, eight)
    assert {shard.data.shape[0] for shard in eight.b[0].addressable_shards} == {share}

    if structure[0][1] == 90:
        from dataclasses import replace
        def theta(Zy, stats):
            first, *others = stats.factors
            return mj.estimate(replace(stats, factors=(first._replace(Zy=Zy), *others))).theta
        def moved(stats):
            Zy = jax.numpy.asarray(stats.factors[0].Zy)
            return jax.jvp(lambda z: theta(z, stats), (Zy,), (jax.numpy.zeros_like(Zy).at[0, 3].set(1.0),))[1]
        np.testing.assert_allclose(moved(placed), moved(stats), rtol=1e-8)
    print("same", float(one.criterion))
    """,
        **EIGHT,
    )
    assert "same" in out


def test_rows_on_eight_devices_inside_jit():
    """Products of rows that stand on several devices: one program from the rows to the estimates."""
    out = run_python(
        SETUP
        + """
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    design = design_of(Structure(((2, 12, "free"),)))
    rows = NamedSharding(Mesh(jax.devices(), ("rows",)), PartitionSpec("rows"))
    spread = jax.tree.map(lambda a: jax.device_put(a, rows), design)
    assert len(spread.y.addressable_shards) == 8
    fit = jax.jit(lambda design: mj.estimate(mj.cross_products(design)))
    same(mj.estimate(mj.cross_products(design)), fit(spread))
    print("same")
    """,
        **EIGHT,
    )
    assert "same" in out


@pytest.mark.slow
def test_two_processes_over_loopback():
    """Two processes of two devices each: each holds half of the levels."""
    fit = """
    from jax.experimental.multihost_utils import process_allgather
    for structure in (((2, 45, "free"),), ((1, 90, "free"), (1, 70, "free"))):
        stats = mj.cross_products(design_of(Structure(structure)))
        est = mj.estimate(mj.shard(stats, jax.make_mesh((4,), ("levels",))))
        assert not est.b[0].is_fully_addressable
        same(mj.estimate(stats), jax.tree.map(lambda a: process_allgather(a, tiled=True), est))
    print("same")
    """
    over_loopback(SETUP + fit)


def test_what_cannot_be_spread_is_refused():
    design = random_design(STRUCTURES["one factor, q=1"], 0)
    mesh = jax.make_mesh((1,), ("levels",))
    with pytest.raises(ValueError, match="estimate_many"):
        mj.shard(mj.cross_products(design, np.zeros((3, len(design.y)))), mesh)
    with pytest.raises(TypeError, match="inside jit"):
        jax.jit(lambda stats: mj.shard(stats, mesh))(mj.cross_products(design))
