"""The bundled tables are those that the reference fits used."""

import pytest
from conftest import ORACLES, oracle

import mixjax as mj

SHAPES = {
    "sleepstudy": (180, 3), "Dyestuff": (30, 2), "Dyestuff2": (30, 2), "Penicillin": (144, 3), "Pastes": (60, 4),
    "cake": (270, 5), "Orthodont": (108, 4), "Machines": (54, 3), "InstEval": (73421, 7),
    "cbpp": (56, 4), "grouseticks": (403, 7), "bacteria": (220, 7),
    "fev": (800, 8),
}  # fmt: skip


@pytest.mark.parametrize("name", mj.datasets.NAMES)
def test_shape_and_no_missing(name):
    frame = mj.datasets.load(name)
    assert frame.shape == SHAPES[name]
    missing = frame.isna().sum()
    assert missing.sum() == (263 if name == "fev" else 0) == missing.get("FEV1", 0)  # visits that were missed


@pytest.mark.parametrize("name", [n for n in ORACLES if oracle(n)["data"] in mj.datasets.NAMES])
def test_levels_are_those_of_the_reference(name):
    frame = mj.datasets.load(oracle(name)["data"])
    for column, levels in oracle(name)["factor_levels"].items():
        if levels:
            assert list(frame[column].cat.categories) == levels


def test_unknown_name():
    with pytest.raises(KeyError, match="did you mean 'sleepstudy'"):
        mj.datasets.load("sleepstudi")


def test_case_does_not_matter():
    assert mj.datasets.load("pastes").shape == (60, 4)
