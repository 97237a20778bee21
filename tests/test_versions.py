"""What reports of errors say of the machine, and compiler options that an XLA may not know."""

import re
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mixjax as mj
from mixjax import machine, versions

PROJECT = Path(__file__).parent.parent / "pyproject.toml"


def test_versions_of_everything_are_printed(capsys, monkeypatch):
    monkeypatch.setenv("MIXJAX_CACHE_DIR", "/home/someone/secret")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("MY_TOKEN", "hunter2")
    mj.show_versions()
    printed = capsys.readouterr().out
    lines = dict(line.split(": ", 1) for line in printed.splitlines())
    assert lines["mixjax"] == mj.__version__
    assert lines["jax"] == jax.__version__
    assert lines["numpy"] == np.__version__
    assert re.fullmatch(r"cpu, \d+ x cpu", lines["devices"])
    assert lines["JAX_PLATFORMS"] == "cpu"
    assert lines["MIXJAX_CACHE_DIR"] == "set"
    assert "someone" not in printed
    assert "hunter2" not in printed


def test_packages_that_are_not_there_and_devices_that_do_not_start(monkeypatch):
    def broken():
        raise RuntimeError("no such driver\nand much more")

    monkeypatch.setattr(versions, "OPTIONAL", ("no-such-package",))
    monkeypatch.setattr(jax, "devices", broken)
    found = versions.versions()
    assert found["no-such-package"] == "not installed"
    assert found["devices"] == "none (RuntimeError: no such driver)"


def test_default_precision_is_told(x64):
    assert versions.versions()["64 bits"] == "on"


@pytest.mark.skipif(not PROJECT.exists(), reason="not in the repository")
def test_all_packages_that_the_project_names_are_told():
    project = tomllib.loads(PROJECT.read_text("utf-8"))["project"]
    name = lambda line: re.split(r"[^\w.-]", line, maxsplit=1)[0]  # noqa: E731
    assert {name(line) for line in project["dependencies"]} == set(versions.NEEDED)
    extras = {key: lines for key, lines in project["optional-dependencies"].items() if key not in ("docs", "test")}
    assert {name(line) for lines in extras.values() for line in lines} <= {*versions.NEEDED, *versions.OPTIONAL}


def test_compiler_options_that_xla_does_not_know_are_left_out(monkeypatch):
    """One by one: what else was asked for stays."""
    monkeypatch.setattr(machine, "_unknown", set())
    kept = {"xla_cpu_prefer_vector_width": 512}
    fun = machine.jit(lambda x: 2.0 * x, compiler_options={"xla_cpu_no_such_option": True, **kept})
    np.testing.assert_array_equal(fun(np.ones(3, np.float32)), 2.0)
    assert machine._unknown == {"xla_cpu_no_such_option"}
    fun(np.ones(3, np.float32))
    assert fun._cache_size() == 1
    # Inside a transformation there are no options; where none is known there are none either.
    np.testing.assert_array_equal(jax.jit(fun)(jnp.ones(3)), 2.0)
    alone = machine.jit(lambda x: 3.0 * x, compiler_options={"xla_cpu_no_such_option": True})
    np.testing.assert_array_equal(alone(np.ones(3, np.float32)), 3.0)


def test_other_errors_of_xla_are_raised(monkeypatch):
    """A value that an option does not take is no unknown option."""
    monkeypatch.setattr(machine, "_unknown", set())
    fun = machine.jit(lambda x: 2.0 * x, compiler_options={"xla_cpu_prefer_vector_width": "wide"})
    with pytest.raises(jax.errors.JaxRuntimeError):
        fun(np.ones(3, np.float32))
    assert not machine._unknown
