"""Several devices, in one process and in two, give the numbers of one, and no device holds all levels.

The checks are those of ``on_devices.py``. Sums over levels are reordered, so the last bits of one fit may move: the
criterion by 1e-12, the rest with it.
"""

import json

import jax
import numpy as np
import pytest
from conftest import FLAGS, over_loopback, run_python
from designs import STRUCTURES, random_design

import mixjax as mj

EIGHT = ("slopes", "nested", "crossed", "rows_inside_jit", "many_fits")
TWO = ("levels_of_two_processes", "many_fits_of_two_processes")


@pytest.fixture(scope="module")
def failures():
    """name -> what failed, or None, of the checks on eight devices."""
    flags = f"--xla_force_host_platform_device_count=8 {FLAGS}"
    return json.loads(run_python(f"import on_devices; on_devices.run({EIGHT})", XLA_FLAGS=flags).splitlines()[-1])


@pytest.mark.parametrize("check", EIGHT)
def test_eight_devices_give_the_numbers_of_one(check, failures):
    assert failures[check] is None, failures[check]


@pytest.fixture(scope="module")
def failures_of_two(failures):
    """The same of both processes; they find what the eight devices compiled for one."""
    return [json.loads(out.splitlines()[-1]) for out in over_loopback(f"import on_devices; on_devices.run({TWO})")]


@pytest.mark.slow
@pytest.mark.parametrize("check", TWO)
def test_two_processes_over_loopback(check, failures_of_two):
    """Two processes of two devices each: each holds half of the levels, or of the fits."""
    for failed in failures_of_two:
        assert failed[check] is None, failed[check]


def test_what_cannot_be_spread_is_refused():
    design = random_design(STRUCTURES["one factor, q=1"], 0)
    mesh = jax.make_mesh((1,), ("levels",))
    with pytest.raises(ValueError, match="estimate_many"):
        mj.shard(mj.cross_products(design, np.zeros((3, len(design.y)))), mesh)
    with pytest.raises(TypeError, match="inside jit"):
        jax.jit(lambda stats: mj.shard(stats, mesh))(mj.cross_products(design))
