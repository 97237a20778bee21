"""Memory that stays with the process while large arrays come and go."""

import threading
from pathlib import Path

import numpy as np
import pytest

from mixjax import machine

MB = 2**20
needs_glibc = pytest.mark.skipif(
    machine._glibc() is None or not Path("/proc/self/statm").exists(), reason="glibc's malloc, on Linux"
)


def resident() -> float:
    """Of this process, in MB."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / MB


def come_and_go(megabytes: int = 256) -> None:
    np.ones(megabytes * MB // 8)


@needs_glibc
def test_freed_memory_stays_and_goes_back_in_the_end():
    before = resident()
    with machine.memory_kept():
        come_and_go()
        within = resident()
    after = resident()
    assert within - before > 200
    assert after - before < 50
    come_and_go()
    assert resident() - before < 50  # as before: straight back to the system


@needs_glibc
def test_the_outermost_gives_it_back():
    before = resident()
    with machine.memory_kept():
        with machine.memory_kept():
            come_and_go()
        assert resident() - before > 200
        with pytest.raises(RuntimeError, match="in between"), machine.memory_kept():
            raise RuntimeError("in between")
        assert resident() - before > 200
    assert resident() - before < 50
    assert machine._keepers == 0


@needs_glibc
def test_several_threads():
    start, end = threading.Barrier(4), threading.Barrier(4)

    def work():
        start.wait()
        with machine.memory_kept():
            come_and_go(64)
            end.wait()

    before = resident()
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert machine._keepers == 0
    assert resident() - before < 100


def test_elsewhere_nothing_happens(monkeypatch):
    monkeypatch.setattr(machine, "_glibc", lambda: None)
    with machine.memory_kept():
        come_and_go(1)
    assert machine._keepers == 0
