"""The notebooks run, and the numbers in their prose are numbers that they assert.

They run at a small size (``MIXJAX_NOTEBOOKS=small``); ``python notebooks/run.py`` runs them at full size and stores
what they show.
"""

import ast
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PRIVATE = ROOT.parent / "shared" / "data" / "metr_ai.csv"  # never part of the repository

notebooks = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells_of(path, kind):
    return ["".join(cell["source"]) for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


@notebooks
def test_runs_and_its_assertions_hold(path, monkeypatch):
    plt = pytest.importorskip("matplotlib.pyplot", reason='pip install "mixjax[plots]"')
    monkeypatch.setenv("MIXJAX_NOTEBOOKS", "small")
    if path.stem.startswith("06") and not PRIVATE.exists():
        pytest.skip(f"needs {PRIVATE.name}, which is not part of the repository")
    if path.stem.startswith("14"):
        for package in ("equinox", "flax"):
            pytest.importorskip(package, reason='pip install "mixjax[embedding]"')
    monkeypatch.setenv("METR_AI", str(PRIVATE))
    monkeypatch.chdir(path.parent)
    precision = jax.config.read("jax_enable_x64")
    try:
        names = {"display": print, "__name__": "__main__"}
        for i, cell in enumerate(cells_of(path, "code")):
            exec(compile(cell, f"{path.name}, code cell {i}", "exec"), names)
    finally:
        jax.config.update("jax_enable_x64", precision)
        plt.close("all")


def asserted(path):
    """Every number in a condition that the notebook asserts, also those in a table that it compares with."""
    found = []
    for cell in cells_of(path, "code"):
        for node in ast.walk(ast.parse(cell)):
            if isinstance(node, ast.Assert) or (
                isinstance(node, ast.Call) and "assert" in ast.unparse(node.func).rpartition(".")[2]
            ):
                found += [float(leaf.value) for leaf in ast.walk(node)
                          if isinstance(leaf, ast.Constant) and type(leaf.value) in (int, float)]  # fmt: skip
    return np.array(found)


# Decimals, percentages and numbers of four and more digits: what a computation gives and prose repeats. Code, formulas,
# years and references to the literature are not that.
NOT_PROSE = re.compile(
    r"```.*?```|`[^`]*`|\$\$.*?\$\$|\$[^$]*\$|\]\([^)]*\)|\b(1[89]|20)\d\d\b|exercise \d+\.\d+", re.DOTALL
)
NUMBER = re.compile(r"(?<![\w.])\d{1,3}(?: \d{3})+(?![\w.]| \d)|(?<![\w.])\d+(?:\.\d+)?(?!\w)")


def claims(path):
    for text in cells_of(path, "markdown"):
        prose = NOT_PROSE.sub(" ", text)
        for match in NUMBER.finditer(prose):
            number = match[0].replace(" ", "")
            percent = prose[match.end() : match.end() + 2].strip().startswith("%")
            if "." in number or percent or len(number) > 3:
                yield match[0] + " %" * percent, float(number), len(number.partition(".")[2]), percent


@notebooks
def test_numbers_in_prose_are_asserted(path):
    """A claim of d decimals must be a number of an assertion, rounded to d decimals."""
    known = np.abs(asserted(path))
    assert len(known), "a notebook asserts its numbers"
    missing = []
    for text, value, digits, percent in claims(path):
        numbers = np.concatenate([known, 100 * known]) if percent else known
        # Half a unit of the last digit, and as much for assertions that were rounded themselves.
        if not (np.abs(numbers - value) <= 0.5001 * 10.0**-digits).any():
            missing.append(text)
    assert not missing, f"not among the asserted numbers: {missing}"


@notebooks
def test_starts_with_a_question_and_stays_small(path):
    head = cells_of(path, "markdown")[0]
    assert head.startswith("# ")
    assert "?" in head
    assert path.stat().st_size < 400_000


def test_a_false_number_would_be_found(tmp_path):
    def cell(kind, source):
        return {"cell_type": kind, "source": [source]}

    path = tmp_path / "x.ipynb"
    path.write_text(json.dumps({"cells": [
        cell("markdown", "sd 0.162 in 12 345 rows, 61 % of them, `0.7`, $0.8$, (1991), and 0.163"),
        cell("code", "assert (round(a, 4), n, share) == (0.1622, 12345, 0.607)")]}))  # fmt: skip
    with pytest.raises(AssertionError, match=re.escape("['0.163']")):
        test_numbers_in_prose_are_asserted(path)
