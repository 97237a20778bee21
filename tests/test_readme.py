"""The README and the notebooks tell the truth: their code runs, and what they say is printed is printed."""

import json
import re
from pathlib import Path

import jax
import pytest
from conftest import fit_of

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("block", re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL))
def test_python_blocks_run(block):
    exec(compile(block, "README.md", "exec"), {})


def test_printed_summary_is_the_real_one():
    shown = re.search(r"```text\n(.*?)```", README, flags=re.DOTALL)[1]
    assert shown.strip() == str(fit_of("sleepstudy_slopes", "REML").summary())


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebooks_run_and_their_assertions_hold(path):
    cells = json.loads(path.read_text())["cells"]
    code = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    precision = jax.config.read("jax_enable_x64")
    try:
        exec(compile(code, path.name, "exec"), {"display": print})
    finally:
        jax.config.update("jax_enable_x64", precision)
