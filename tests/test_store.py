"""Stored studies: interrupted at any moment, split over workers, refused where they are other studies."""

import concurrent.futures
import errno
import json
import multiprocessing
import os
import re
import shutil
import signal
import time
import warnings

import numpy as np
import pandas as pd
import pytest
from conftest import processes_of

import mixjax as mj
from mixjax.studies.outcomes import BLOCK
from mixjax.studies.store import Store, StoreError, missing

pq = pytest.importorskip("pyarrow.parquet", reason="studies are stored as parquet files: pip install 'mixjax[parquet]'")

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
    process.kill()
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
        os.kill(victim, getattr(signal, "SIGKILL", signal.SIGTERM))
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


@pytest.fixture(scope="module")
def kept(tmp_path_factory, whole):
    """The directory of the whole study; not to be written to."""
    path = tmp_path_factory.mktemp("kept") / "study"
    assert_same(study(path), whole)
    return path


@pytest.fixture
def copied(kept, tmp_path):
    return shutil.copytree(kept, tmp_path / "study")


def swapped(paths):
    """Two chunks' bytes in each other's place."""
    one, other = paths[0].read_bytes(), paths[1].read_bytes()
    paths[0].write_bytes(other)
    paths[1].write_bytes(one)


def renamed(paths):
    """A chunk of the second cell in the place of one of the first, the checksum of its own."""
    (checksum,) = re.findall("-([0-9a-f]{32}).parquet", paths[-1].name)
    place = paths[0].name[:-40] + checksum + ".parquet"
    paths[0].unlink()
    paths[-1].rename(paths[-1].with_name(place))


def rewritten(change):
    def damage(paths):
        pq.write_table(change(pq.read_table(paths[0])), paths[0])

    return damage


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda paths: paths[0].write_bytes(b"no parquet"), [0]),
        (lambda paths: paths[0].write_bytes(b""), [0]),
        (lambda paths: paths[0].write_bytes(paths[0].read_bytes()[:-7]), [0]),
        (lambda paths: paths[0].write_bytes(paths[0].read_bytes() + b"\0"), [0]),
        (lambda paths: (paths[0].unlink(), paths[0].mkdir()), [0]),
        (swapped, [0, 1]),
        (lambda paths: swapped([paths[0], paths[CHUNKS]]), [0, CHUNKS]),  # of two cells
        (rewritten(lambda table: table.drop_columns(["p(x)"])), [0]),
        (rewritten(lambda table: table.slice(0, 10)), [0]),
        (rewritten(lambda table: table), [0]),  # the same numbers in other bytes
        (lambda paths: paths[0].rename(paths[0].with_name(paths[0].name.replace("cell-00000", "cell-00001"))), None),
        (renamed, None),
    ],
)
def test_damaged_chunks_are_named_and_computed_again(damage, named, copied, whole):
    before = files(copied)
    damage(before)
    names = sorted({p.name for p in files(copied)} - {p.name for p in before}) if named is None else [
        before[i].name for i in named
    ]  # fmt: skip
    with pytest.warns(mj.DataWarning, match="what it held is computed again") as caught:
        found = study(copied)
    assert {p.name for p in files(copied)} == {p.name for p in before}
    assert [str(w.message).split(" is damaged")[0] for w in caught] == [str(copied / name) for name in names]
    assert {w.filename for w in caught} == {__file__}
    assert_same(found, whole)
    assert sorted(p.name for p in copied.glob("*.damaged")) == [f"{name}.damaged" for name in names]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_same(study(copied), whole)


def test_a_chunk_of_another_study_is_noticed(copied, tmp_path):
    study(tmp_path / "other", key=8, replicates=BLOCK)
    (own, *_), (other, *_) = files(copied), files(tmp_path / "other")
    shutil.copy(other, copied / other.name)
    own.unlink()
    with pytest.warns(mj.DataWarning, match=f"{other.name} is damaged .*its checksum is not that"):
        study(copied)
    assert own.exists()


def test_every_flipped_bit_is_noticed(tmp_path):
    """Of parquet's own checks 373 of 400 such files were read as data."""
    manifest = {"cells": [], "versions": {}}
    rng = np.random.default_rng(1)
    Store(tmp_path, manifest).write(0, 0, {name: rng.standard_normal(200) for name in ("x", "se(x)", "p(x)")})
    (path,) = files(tmp_path)
    data = path.read_bytes()
    assert Store(tmp_path, manifest).done() == {0: [(0, 200)]}
    noticed = 0
    for bit in rng.choice(8 * len(data), 400, replace=False):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.warns(mj.DataWarning, match=f"{path.name} is damaged"):
            noticed += Store(tmp_path, manifest).done() == {}
    assert noticed == 400


def test_damage_while_a_study_is_open_is_an_error(copied):
    found = study(copied)
    swapped(files(copied))
    with pytest.raises(StoreError, match=r"cell-00000.*was damaged or taken away since the study ran"):
        found.raw(0)


# --- directories that cannot be written ------------------------------------------------------------------------------


@pytest.fixture
def read_only(monkeypatch):
    """Nothing can be created or renamed, as on a file system that is mounted so (root may write anywhere else)."""
    opened = os.open

    def refused(path, flags, *more, **options):
        if flags & os.O_CREAT:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
        return opened(path, flags, *more, **options)

    def not_renamed(*_):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(os, "open", refused)
    monkeypatch.setattr(os, "replace", not_renamed)


def test_a_complete_study_is_read_where_nothing_can_be_written(kept, read_only, whole):
    assert_same(study(kept), whole)


def test_what_has_to_be_written_is_said_before_it_is_computed(copied, tmp_path, read_only, monkeypatch):
    monkeypatch.setattr("mixjax.studies.study.outcomes", lambda *_: pytest.fail("computed first"))
    files(copied)[0].unlink()
    with pytest.raises(StoreError, match=r"could not be written: .*Read-only file system.*with a copy of it"):
        study(copied)
    with pytest.raises(StoreError, match="Read-only file system"):
        study(tmp_path / "study")
    (tmp_path / "new").mkdir()
    with pytest.raises(StoreError, match=r"manifest.json could not be written.*Read-only file system"):
        study(tmp_path / "new")


def test_a_link_in_the_place_of_a_temporary_file_is_not_followed(tmp_path, monkeypatch):
    victim = tmp_path / "victim"
    victim.write_text("precious")
    (tmp_path / "store").mkdir()
    monkeypatch.setattr("mixjax.studies.store.secrets.token_hex", lambda _: "known")
    (tmp_path / "store" / ".manifest.json.known.part").symlink_to(victim)
    with pytest.raises(StoreError, match=r"could not be written: .*File exists"):
        Store(tmp_path / "store", {"a": 1})
    assert victim.read_text() == "precious"
    monkeypatch.undo()
    store = Store(tmp_path / "store", {"a": 1})
    # A link in the place itself is replaced, not written through.
    store.write(0, 0, {"x": np.arange(5.0)})
    (path,) = files(tmp_path / "store")
    path.unlink()
    path.symlink_to(victim)
    store.write(0, 0, {"x": np.arange(5.0)})
    assert victim.read_text() == "precious"
    assert not path.is_symlink()


# --- manifests -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "cannot be read.*put it back from a copy; or delete it"),
        ("{", "cannot be read"),
        ("\0\1", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[1, 2]", "is no manifest of a study, but list"),
        ("null", "is no manifest of a study, but NoneType"),
        ('{"letter": "Dear Sir"}', "is no manifest of a study, because it lacks block, cells, format, versions"),
        ('{"format": 3, "block": 1024, "versions": {}}', "because it lacks cells"),
        ('{"format": 4, "chunks": []}', "newer version of mixjax .format 4, and this one reads 3.: upgrade mixjax"),
        ('{"block": 1024, "cells": [], "versions": {}}', "older version of mixjax, and this one reads"),
        ('{"format": "x", "block": 1, "cells": [], "versions": {}}', "has format 'x', of an older version"),
        ('{"format": 3, "block": 1, "cells": [], "versions": 3}', "holds another study"),
    ],
)
def test_manifests_that_are_none(text, message, tmp_path):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(StoreError, match=rf"(?s){re.escape(str(tmp_path))}.*{message}"):
        Store(tmp_path, {"cells": [1], "block": BLOCK, "versions": {}})


def test_without_its_manifest_a_study_keeps_its_own_chunks(copied, whole):
    (copied / "manifest.json").unlink()
    before = {p.name: p.stat().st_mtime_ns for p in files(copied)}
    assert_same(study(copied), whole)
    assert {p.name: p.stat().st_mtime_ns for p in files(copied)} == before


def test_a_statistic_that_cannot_be_seen_is_warned_of(tmp_path):
    source = (i for i in range(3))

    def odd(est):
        return est.sigma if source else 0.0

    with pytest.warns(mj.DataWarning, match=r"cannot tell in full .* what is in source of odd\(\)") as caught:
        study(tmp_path, replicates=10, slopes=[0.0], statistic=odd)
    assert {w.filename for w in caught} == {__file__}


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
