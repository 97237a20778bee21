"""What is said to whoever waits."""

import sys
import time
import types

import numpy as np
import pytest
from conftest import fit_of

import mixjax as mj
from mixjax import waiting
from mixjax.waiting import Waiting, is_shown


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    """No tqdm, and the choice of the start again after every test."""
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    monkeypatch.delenv("MIXJAX_PROGRESS", raising=False)
    yield
    mj.show_progress()
    assert waiting._outermost is None


def test_a_line_after_two_seconds_and_none_before(monkeypatch, capsys):
    mj.show_progress(True)
    assert waiting.AFTER == 2.0
    monkeypatch.setattr(waiting, "AFTER", 0.05)
    with Waiting("short work"):
        pass
    time.sleep(0.2)
    with Waiting("long work"), Waiting("a part of it"):
        time.sleep(0.4)
    assert capsys.readouterr().err == "mixjax: long work ...\n"


def test_who_decides(monkeypatch):
    """The argument of a call, then the process's own choice, then the environment, then whether somebody looks."""
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: True))
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    assert is_shown()
    monkeypatch.setenv("MIXJAX_PROGRESS", "0")
    assert not is_shown()
    mj.show_progress(True)
    assert is_shown()
    assert not is_shown(False)
    mj.show_progress(None)
    monkeypatch.delenv("MIXJAX_PROGRESS")
    monkeypatch.setattr(sys, "stderr", types.SimpleNamespace(isatty=lambda: False))
    assert not is_shown()
    monkeypatch.setitem(sys.modules, "ipykernel", types.ModuleType("ipykernel"))
    assert is_shown()
    monkeypatch.setattr(sys, "stderr", None)
    monkeypatch.delitem(sys.modules, "ipykernel")
    assert not is_shown()
    with pytest.raises(ValueError, match="on must be True, False or None, got 'yes'"):
        mj.show_progress("yes")


def test_a_bar_counts_what_is_done(monkeypatch):
    seen = []

    def tqdm(total, desc, unit, unit_scale, delay):
        seen.append((total, unit, delay))
        return types.SimpleNamespace(update=seen.append, close=lambda: seen.append("closed"))

    bar = types.ModuleType("tqdm.auto")
    bar.tqdm = tqdm
    monkeypatch.setitem(sys.modules, "tqdm.auto", bar)
    fit = fit_of("sleepstudy_intercept", "REML")
    fit.bootstrap(1, 50, chunk=20)
    assert not seen
    fit.bootstrap(1, 50, chunk=20, progress=True)
    assert seen == [(50, "fit", 0.0), 20, 20, 10, "closed"]
    seen.clear()
    mj.show_progress(True)
    fit.refit_many(np.ones((3, fit.nobs)) + np.arange(fit.nobs) % 7)
    assert not seen  # nothing tells of it while it runs: a line, where it is long
    fit.bootstrap(1, 50, progress=False)
    assert not seen


def test_an_error_ends_the_scope(capsys):
    mj.show_progress(True)
    with pytest.raises(ZeroDivisionError), Waiting("work"):
        1 / 0  # noqa: B018
    assert waiting._outermost is None
    assert capsys.readouterr().err == ""
