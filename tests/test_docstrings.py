"""The examples in docstrings run."""

import doctest
import importlib

import pytest
from test_structure import modules

MODULES = [module for module, path in modules() if ">>>" in path.read_text()]


@pytest.mark.parametrize("module", MODULES)
def test_examples(module):
    if module == "mixjax.sklearn":
        pytest.importorskip("sklearn", reason='pip install "mixjax[sklearn]"')
    result = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert result.attempted > 0
    assert result.failed == 0
