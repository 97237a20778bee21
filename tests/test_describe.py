"""Descriptions of studies: equal where the numbers are, whatever the process; different where a helper is."""

import importlib
import json
import re
import subprocess
import sys
import textwrap
import threading
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from conftest import processes_of

from mixjax.studies.describe import describe

# A user's module, and its helper module.
HELPER = """
def half(x):
    return x / 2

class Scale:
    def __init__(self, by):
        self.by = by
    def __call__(self, est):
        return self.inner(est) * self.by
    def inner(self, est):
        return est.sigma + LIMIT
    @property
    def twice(self):
        return 2 * self.by

LIMIT = 3.0
UNUSED = 1
"""
MODULE = """
import functools
import jax
import jax.numpy as jnp
import helper_module
from helper_module import Scale

RATE = 0.5
NAMES = {"alpha", "beta", "gamma", "delta"}
TABLE = {"a": [1, 2], "b": (3.0, None)}

def first(x, *, power=2):
    return second(x) ** power

def second(x):
    return x * RATE if TABLE else first(x)

def statistic(est, k=1):
    chosen = {n: first(est.sigma) for n in sorted(NAMES) if n in {"alpha", "gamma", "other", "more"}}
    def nested(x):
        return helper_module.half(x) + k
    return chosen | {"nested": nested(est.sigma)}

def local(est):
    from helper_module import half as own
    import helper_module as whole
    return own(est.sigma) + whole.LIMIT

@jax.custom_jvp
def curved(x):
    return x

@curved.defjvp
def _(primals, tangents):
    return curved(primals[0]), 3 * tangents[0]

def bent(est):
    return curved(est.sigma)

part = functools.partial(statistic, k=2)
jitted = jax.jit(statistic)
mapped = jax.vmap(statistic)
scaled = Scale(2.0)
method = scaled.inner
"""
WHICH = ("statistic", "local", "bent", "part", "jitted", "mapped", "scaled", "method")


def write(folder: Path, module=MODULE, helper=HELPER):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "stat_module.py").write_text(module)
    (folder / "helper_module.py").write_text(helper)


def described(folder, monkeypatch, **texts):
    """The descriptions that the modules with these texts give."""
    write(folder, **texts)
    monkeypatch.syspath_prepend(str(folder))
    for name in ("stat_module", "helper_module"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    importlib.invalidate_caches()
    module = importlib.import_module("stat_module")
    found = {}
    for name in WHICH:
        unseen: list[str] = []
        found[name] = json.dumps(describe(getattr(module, name), unseen), sort_keys=True)
        assert unseen == []
    for name in ("stat_module", "helper_module"):
        monkeypatch.delitem(sys.modules, name)
    return found


def test_other_processes_places_and_lines_give_the_same_description(tmp_path):
    code = f"""
    import sys, json
    sys.path.insert(0, sys.argv[1])
    {{pad}}
    import stat_module
    from mixjax.studies.describe import describe
    unseen = []
    print(json.dumps([describe(getattr(stat_module, name), unseen) for name in {WHICH}], sort_keys=True), unseen)
    """
    running = []
    for i, seed in enumerate(["0", "1", "2", "random"]):
        folder = tmp_path / ("x" * i) / "own"
        write(folder, "\n" * 7 * i + MODULE, "# a comment\n" * i + HELPER)
        program = textwrap.dedent(code).replace("sys.argv[1]", repr(str(folder))).replace("{pad}", f"a = {[0] * i}")
        running += processes_of(program, PYTHONHASHSEED=seed, PYTHONDONTWRITEBYTECODE="1")
    found = [process.communicate() for process in running]
    assert all(process.returncode == 0 for process in running), found[0][1][-2_000:]
    assert len({out for out, _ in found}) == 1
    assert found[0][0].endswith("[]\n")


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (("module", "RATE = 0.5", "RATE = 0.6"), {"statistic", "part", "jitted", "mapped"}),
        (("module", "return x * RATE if", "return x + RATE if"), {"statistic", "part", "jitted", "mapped"}),
        (("module", "power=2", "power=3"), {"statistic", "part", "jitted", "mapped"}),
        (("module", '"delta"}', '"epsilon"}'), {"statistic", "part", "jitted", "mapped"}),
        (("module", '"other"', '"another"'), {"statistic", "part", "jitted", "mapped"}),
        (("module", "(3.0, None)", "(4.0, None)"), {"statistic", "part", "jitted", "mapped"}),
        (("module", "half(x) + k", "half(x) - k"), {"statistic", "part", "jitted", "mapped"}),
        (("module", "k=1", "k=0"), {"statistic", "part", "jitted", "mapped"}),
        (("module", "k=2)", "k=3)"), {"part"}),
        (("module", "3 * tangents", "4 * tangents"), {"bent"}),
        (("module", "Scale(2.0)", "Scale(2.5)"), {"scaled", "method"}),
        (("helper", "return x / 2", "return x / 3"), {"statistic", "part", "jitted", "mapped", "local"}),
        (("helper", "LIMIT = 3.0", "LIMIT = 4.0"), {"local", "scaled", "method"}),
        (("helper", "est.sigma + LIMIT", "est.sigma - LIMIT"), {"local", "scaled", "method"}),
        (("helper", "(est) * self.by", "(est) / self.by"), {"local", "scaled", "method"}),
        (("helper", "2 * self.by", "3 * self.by"), {"local", "scaled", "method"}),
        (("helper", "UNUSED = 1", "UNUSED = 2"), {"local"}),  # takes the module as a whole
        (("module", "RATE = 0.5", "# moved\n\nRATE = 0.5"), set()),
    ],
)
def test_a_change_of_what_a_function_uses_is_seen(change, changed, tmp_path, monkeypatch):
    which, old, new = change
    texts = {"module": MODULE, "helper": HELPER}
    before = described(tmp_path / "before", monkeypatch, **texts)
    assert texts[which].count(old) == 1
    after = described(tmp_path / "after", monkeypatch, **texts | {which: texts[which].replace(old, new)})
    assert {name for name in WHICH if before[name] != after[name]} == changed


LOCK = threading.Lock()


def waits(est, lock=LOCK):
    return est.sigma


def evaluated(est):
    return eval("est.sigma * 2")


def unknown(est):
    return est.sigma * not_there  # noqa: F821


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (waits, r"0 of a default of waits\(\) \(_thread.lock\) cannot be seen"),
        (evaluated, r"evaluated\(\) calls eval, and what that reads cannot be seen"),
        (unknown, r"the global not_there of unknown\(\) has no value yet"),
        (lambda est: subprocess.imported(est), None),  # a library is known by name
        ({"a": (i for i in range(3))}, r"what is in a of it \(builtins.generator\) cannot be seen"),
        (partial(waits), "cannot be seen"),
    ],
)
def test_what_cannot_be_seen_is_said(value, message):
    unseen: list[str] = []
    json.dumps(describe(value, unseen))
    if message is None:
        assert unseen == []
    else:
        assert len(unseen) == 1
        assert re.search(message, unseen[0])


def looping(n):
    return looping(n - 1) if n else 0


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def test_circles_and_depths_end():
    circle: list = [1]
    circle.append(circle)
    assert describe(circle) == [1, {"again": "list"}]
    json.dumps(describe(looping))
    unseen: list[str] = []
    describe(nested(100_000), unseen)
    assert unseen == ["list is nested too deeply to be seen"]


class Slots:
    __slots__ = ("a",)

    def __init__(self, a):
        self.a = a


class Named(dict):
    """A dict that says more than its items."""


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({1: "a", "1": "b"}, {1: "b", "1": "a"}),
        ({"a", "b"}, {"a", "c"}),
        (b"ab", b"ac"),
        (1j, 2j),
        (range(3), range(4)),
        (Slots(1), Slots(2)),
        (Named(a=1), Named(a=2)),
        (np.array([Slots(1)] * 20, object), np.array([Slots(2)] * 20, object)),
        (jax.random.key(1), jax.random.key(2)),
        (np.random.default_rng(1), np.random.default_rng(2)),
        (pd.Timestamp("2020-01-01"), pd.Timestamp("2020-01-02")),
        (
            pd.DataFrame({"a": pd.Categorical(["x", "y"], ["x", "y"])}),
            pd.DataFrame({"a": pd.Categorical(["x", "y"], ["y", "x"])}),
        ),
        (jnp.sin, jnp.cos),
        (np.add, np.multiply),
        (str.upper, str.lower),
    ],
)
def test_objects_are_told_apart(one, other):
    assert json.dumps(describe(one)) != json.dumps(describe(other))
    unseen: list[str] = []
    assert describe(one, unseen) == describe(one)
    assert unseen == []
