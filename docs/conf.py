"""Settings of the documentation: ``sphinx-build -W docs docs/_build`` (``pip install ".[docs]"``). Needs no network."""

import shutil
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import mixjax  # noqa: E402

# Sphinx reads below docs only: the notebooks, with the outputs that are stored in them, are copied.
shutil.rmtree(HERE / "notebooks", ignore_errors=True)
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", ignore=shutil.ignore_patterns("*.py", ".*"))

project = "mixjax"
author = "the mixjax authors"
version = release = mixjax.__version__
extensions = [
    "myst_nb",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
html_theme = "furo"
html_title = "mixjax"
exclude_patterns = ["_build", "jupyter_execute"]

nb_execution_mode = "off"  # the tests run them
myst_heading_anchors = 3
myst_enable_extensions = ["dollarmath"]

autodoc_typehints = "none"  # signatures of array functions say little that the docstrings do not
autodoc_member_order = "bysource"
napoleon_use_rtype = False
napoleon_use_ivar = True
