"""Stored studies: interrupted at any moment, split over workers, refused where they are other studies."""

import concurrent.futures
import json
import multiprocessing
import os
import signal
import time

import numpy as np
import pandas as pd
import pytest
from conftest import processes_of

import mixjax as mj
from mixjax.studies.outcomes import BLOCK
from mixjax.studies.store import Store, StoreError, missing

pytest.importorskip("pyarrow", reason="studies are stored as parquet files: pip install 'mixjax[parquet]'")

FORMULA = "y ~ x + (1 | g)"
CHUNKS = 24


def study(path=None, replicates=CHUNKS * BLOCK - 100, slopes=(0.0, 0.5), **options):
    """Two cells of many chunks."""

    def source(slope):
        data = pd.DataFrame({"g": np.repeat(np.arange(8), 4), "x": np.tile(np.linspace(-1, 1, 4), 8)})
        return mj.scenario(FORMULA, data, beta=[0.0, slope], sd=1.0, sigma=1.0)

    options = {"key": 7, "progress": False, "chunk": BLOCK} | options
    return mj.study(source, FORMULA, {"slope": list(slopes)}, replicates, store=path, **options)


@pytest.fixture(scope="module")
def whole():
    return study()


def assert_same(a, b):
    for cell in range(2):
        pd.testing.assert_frame_equal(a.raw(cell), b.raw(cell), check_exact=True)
    pd.testing.assert_frame_equal(a.to_frame(), b.to_frame(), check_exact=True)
    pd.testing.assert_frame_equal(a.counts, b.counts)


def files(path):
    return sorted(path.glob("cell-*.parquet"))


def killed(path, n_files):
    """A process of its own that is killed once so many chunks are there; whether it was still at work."""
    (process,) = processes_of(f"from test_store import study; study({str(path)!r})")
    begin = time.monotonic()
    while process.poll() is None and len(files(path)) < n_files:
        assert time.monotonic() - begin < 120
        time.sleep(0.002)
    alive = process.poll() is None
    os.kill(process.pid, signal.SIGKILL) if alive else None
    _, err = process.communicate()
    assert alive or process.returncode == 0, err
    return alive


@pytest.mark.parametrize("times", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_and_resumed_it_is_bit_identical(times, tmp_path, whole):
    path = tmp_path / "study"
    path.mkdir()
    for i in range(times):
        assert killed(path, len(files(path)) + 1 + (7 * i) % 3)
    assert 0 < len(files(path)) < 2 * CHUNKS
    before = {p.name: p.stat().st_mtime_ns for p in files(path)}
    assert_same(study(path), whole)
    assert len(files(path)) == 2 * CHUNKS
    assert all((path / name).stat().st_mtime_ns == moment for name, moment in before.items())  # nothing done twice


def test_chunks_of_other_sizes_and_more_replicates_fit_together(tmp_path, whole):
    few = study(tmp_path, replicates=BLOCK + 10)
    assert len(few.raw(0)) == BLOCK + 10
    assert_same(study(tmp_path, chunk=5 * BLOCK), whole)
    again = study(tmp_path, replicates=BLOCK + 10)
    pd.testing.assert_frame_equal(again.raw(1), few.raw(1), check_exact=True)


def test_processes_give_the_same(tmp_path, whole):
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        assert_same(study(executor=threads, chunk=4 * BLOCK), whole)
    with concurrent.futures.ProcessPoolExecutor(2, mp_context=context) as pool:
        found = _scenario_study(tmp_path, pool)
    alone = _scenario_study(None, None)
    pd.testing.assert_frame_equal(found.raw(), alone.raw(), check_exact=True)


def _scenario_study(path, executor):
    data = pd.DataFrame({"g": np.repeat(np.arange(8), 4), "x": np.tile(np.linspace(-1, 1, 4), 8)})
    truth = mj.scenario(FORMULA, data, beta=[0.0, 0.5], sd=1.0, sigma=1.0)
    return mj.study(truth, FORMULA, None, 6 * BLOCK, 3, store=path, executor=executor, chunk=BLOCK, progress=False)


def test_dask_with_a_worker_killed(tmp_path, whole):
    distributed = pytest.importorskip("distributed", reason="pip install 'mixjax[dask]'")
    options = {"n_workers": 2, "threads_per_worker": 1, "processes": True, "dashboard_address": None}
    with (
        distributed.LocalCluster(**options) as cluster,
        distributed.Client(cluster) as client,
        concurrent.futures.ThreadPoolExecutor(1) as aside,
    ):
        running = aside.submit(study, tmp_path, executor=client.get_executor())
        while len(files(tmp_path)) < 3:
            assert not running.done() or running.result()
            time.sleep(0.01)
        victim = next(iter(client.run(os.getpid).values()))
        os.kill(victim, signal.SIGKILL)
        assert_same(running.result(timeout=300), whole)


# --- refusals --------------------------------------------------------------------------------------------------------


def test_another_study_is_refused_with_the_difference(tmp_path):
    study(tmp_path, replicates=10)
    with pytest.raises(StoreError, match=r"holds another study.*\n(.*\n)*\+.*0\.25"):
        study(tmp_path, replicates=10, slopes=(0.0, 0.25))
    with pytest.raises(StoreError, match="holds another study"):
        study(tmp_path, replicates=10, key=8)
    with pytest.raises(StoreError, match="holds another study"):
        study(tmp_path, replicates=10, ddf="wald")


def test_other_versions_are_noted(tmp_path):
    study(tmp_path, replicates=10)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["versions"]["jax"] = "0.0.1"
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    assert "agree to rounding only" in study(tmp_path, replicates=10).notes[0]


def test_directories_of_something_else(tmp_path):
    (tmp_path / "letter.txt").write_text("Dear Sir")
    with pytest.raises(StoreError, match="not empty"):
        study(tmp_path, replicates=10)
    with pytest.raises(StoreError, match="is a file"):
        study(tmp_path / "letter.txt", replicates=10)


def test_a_full_disk_leaves_nothing_broken(tmp_path, monkeypatch):
    def full(_):
        if len(files(tmp_path)) >= 3:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("mixjax.studies.store.os.fsync", full)
    with pytest.raises(StoreError, match="No space left on device"):
        study(tmp_path, replicates=4 * BLOCK)
    assert len(files(tmp_path)) == 3
    assert not list(tmp_path.glob(".*"))
    monkeypatch.undo()
    result = study(tmp_path, replicates=4 * BLOCK)
    pd.testing.assert_frame_equal(result.raw(1), study(replicates=4 * BLOCK).raw(1), check_exact=True)


def test_a_damaged_file_is_named(tmp_path):
    study(tmp_path, replicates=10)
    files(tmp_path)[0].write_bytes(b"no parquet")
    with pytest.raises(StoreError, match=r"cell-00000.*cannot be read"):
        study(tmp_path, replicates=10).raw(0)


def test_missing_work():
    assert missing([], 2500, 1024, 1024) == [(0, 1024), (1024, 1024), (2048, 452)]
    assert missing([(0, 2500)], 2500, 1024, 1024) == []
    assert missing([(0, 1500)], 2500, 2048, 1024) == [(1024, 1476)]
    assert missing([(1024, 2048)], 2500, 4096, 1024) == [(0, 1024), (2048, 452)]
    assert missing([(0, 5000)], 2500, 1024, 1024) == []


def test_what_is_not_there_is_said(tmp_path):
    store = Store(tmp_path, {"a": 1})
    store.write(0, 0, {"x": np.arange(5.0)})
    with pytest.raises(StoreError, match="lacks replicates 5 to 8"):
        store.read(0, 8)
