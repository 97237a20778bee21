"""The README and the documents tell the truth: their code runs, and what they say is printed is printed."""

import re
from pathlib import Path

import pytest
from conftest import fit_of

import mixjax as mj

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()

NAMES = ("populations", "studies", "predictions", "inference", "tables", "tutorial", "embedding", "troubleshooting",
         "singular", "convergence", "scaling", "how", "index")  # fmt: skip
PAGES = [ROOT / "README.md", *(ROOT / "docs" / f"{name}.md" for name in NAMES)]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # some write files
    names = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        exec(compile(block, page.name, "exec"), names)


def test_printed_summary_is_the_real_one():
    shown = re.search(r"```text\n(.*?)```", README, flags=re.DOTALL)[1]
    assert shown.strip() == str(fit_of("sleepstudy_slopes", "REML").summary())


def test_files_that_the_readme_names_exist():
    for target in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (ROOT / target).exists(), target


def test_names_in_the_documents_exist():
    """Every ``fit.name``, ``mj.name`` and ``plots.name`` of the README and the documents."""
    plots = pytest.importorskip("mixjax.plots", reason='pip install "mixjax[plots]"')
    homes = {"fit": mj.LMMFit, "mj": mj, "plots": plots}
    missing = {
        (page.name, f"{home}.{name}")
        for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))
        for home, name in re.findall(r"(?<![\w./])(fit|mj|plots)\.([A-Za-z_]\w*)", page.read_text())
        if not hasattr(homes[home], name)
    }
    assert not missing
