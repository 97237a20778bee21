"""benchmarks/gpu.py is run by whoever first has a GPU: it must work before."""

import importlib.util
import sys
from pathlib import Path

import pytest

PATH = Path(__file__).parent.parent / "benchmarks" / "gpu.py"
if not PATH.exists():
    pytest.skip("the benchmarks are not there", allow_module_level=True)


@pytest.fixture(scope="module")
def gpu():
    spec = importlib.util.spec_from_file_location("gpu", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules["gpu"] = module  # dataclasses look there
    spec.loader.exec_module(module)
    yield module
    del sys.modules["gpu"]


def test_bounds_are_quotients_of_costs_and_peaks(gpu):
    device = gpu.Device("some", double=1e12, single=2e12, memory=1e11, link=1e10)
    cost = gpu.Cost(flops=1e4, memory=1e3, link=50.0, evaluations=1.5)
    assert cost.seconds(device, 1e6, single=False) == pytest.approx((0.01, 0.01, 0.005))
    assert cost.seconds(device, 1e6, single=True) == pytest.approx((0.005, 0.005, 0.0025))


@pytest.mark.filterwarnings("ignore:computing in float32")
def test_what_is_compared_tells_a_wrong_number(gpu, monkeypatch, capsys):
    """A device that is off by a little fails the run."""
    monkeypatch.setattr(gpu, "models", gpu.models_of_sleepstudy)
    monkeypatch.setattr(gpu, "largest_difference", lambda found, other: 0.06)
    assert gpu.main(["--fits", "300", "--float32"]) == 1
    assert "DIFFER" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:computing in float32")
def test_the_whole_runs_on_a_cpu(gpu, capsys):
    assert gpu.main(["--fits", "300"]) == 0
    assert gpu.main(["--fits", "300", "--float32"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("all numbers are those of the host") == 2
    assert printed.count("fits/s") == 3 + 3 + 1 + 3


@pytest.mark.slow
def test_the_prediction_is_of_real_programs(gpu):
    """More rows of matrices of their own cost more operations, and each evaluation adds its own."""
    balanced, unbalanced, crossed = map(gpu.cost_of, gpu.models())
    assert balanced.evaluations == pytest.approx(1.2, abs=0.2)
    assert unbalanced.flops > 10 * balanced.flops > 0
    assert balanced.link < unbalanced.link
    assert crossed.memory > 0
