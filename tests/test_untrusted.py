"""A formula is code. What comes from a stranger is read as columns, numbers, operators and a list of functions only."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import mixjax as mj
from mixjax.formula.context import SAFE

N = 40
RIGHT = "y ~ log(x) + poly(z, 2) * f + I(x^2 - 1 / z) + C(f, contr.sum):z + offset(2 * z) + (scale(x) | g)"


@pytest.fixture
def data():
    rng = np.random.default_rng(3)
    frame = pd.DataFrame({"y": rng.normal(size=N), "x": np.exp(rng.normal(size=N)), "z": 1 + rng.random(N)})
    return frame.assign(f=np.tile(list("ab"), N // 2), g=np.repeat(np.arange(10), 4))


@pytest.fixture
def trap(tmp_path):
    """A path that no attack may make a file of, and code that makes one."""
    path = tmp_path / "written"
    yield path
    assert not path.exists()


def test_what_is_allowed_means_the_same(data):
    own = mj.build_design(RIGHT, data, trusted=False)[0]
    right = mj.build_design(RIGHT, data)[0]
    np.testing.assert_array_equal(own.X, right.X)
    np.testing.assert_array_equal(own.terms[0].Z, right.terms[0].Z)
    np.testing.assert_array_equal(own.offset, right.offset)


ATTACKS = {
    "import": "y ~ __import__('os').system('touch {path}') + (1 | g)",
    "open": "y ~ open('{path}', 'w') + (1 | g)",
    "eval": 'y ~ eval(\'open("{path}", "w")\') + (1 | g)',
    "attribute": "y ~ x.to_csv('{path}') + (1 | g)",
    "dunder": "y ~ x.__class__.__init__.__globals__ + (1 | g)",
    "module": "y ~ np.save('{path}', x) + (1 | g)",
    "module attribute": "y ~ np.lib.npyio.os.system('touch {path}') + (1 | g)",
    "random effect": "y ~ x + (open('{path}', 'w') | g)",
    "offset": "y ~ x + offset(open('{path}', 'w')) + (1 | g)",
    "response": "open('{path}', 'w') ~ x + (1 | g)",
    "inside an allowed function": "y ~ log(open('{path}', 'w')) + (1 | g)",
    "keyword": "y ~ C(f, levels=open('{path}', 'w')) + (1 | g)",
    "contrasts": "y ~ C(f, contr.__init__.__globals__) + (1 | g)",
    "lambda": "y ~ (lambda: open('{path}', 'w'))() + (1 | g)",
    "comprehension": "y ~ I([open('{path}', 'w') for i in x]) + (1 | g)",
    "walrus": "y ~ I((y := open('{path}', 'w'))) + (1 | g)",
    "braces": "y ~ {{open('{path}', 'w')}} + (1 | g)",
    "f-string": 'y ~ I(f\'{{open("{path}", "w")}}\') + (1 | g)',
    "backticks in a call": "y ~ log(`x`.to_csv('{path}')) + (1 | g)",
    "subscript": "y ~ x[open('{path}', 'w')] + (1 | g)",
    "text times a number": "y ~ I('a' * 99999999999) + (1 | g)",
    "list times a number": "y ~ I([0] * 99999999999) + (1 | g)",
    "many columns": "y ~ poly(x, 99999999) + (1 | g)",
    "many knots": "y ~ bs(x, df=99999999) + (1 | g)",
    "columns by hashing": "y ~ hashed(f, levels=99999999) + (1 | g)",
    "shift": "y ~ I(1 << 99999999) + (1 | g)",
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_attacks_by_formula(attack, data, trap):
    with pytest.raises((mj.FormulaError, mj.DataError)):
        mj.lmm(ATTACKS[attack].format(path=trap), data, trusted=False)


def test_names_of_the_caller_are_not_read(data, trap):
    secret, log = 42.0, lambda x: trap.touch()  # noqa: F841
    with pytest.raises(mj.DataError, match="no column 'secret'"):
        mj.build_design("y ~ I(x * secret) + (1 | g)", data, trusted=False)
    array = np.ones(N)  # noqa: F841
    with pytest.raises(mj.DataError, match="no column 'array'"):
        mj.build_design("y ~ array + (1 | g)", data, trusted=False)
    design = mj.build_design("y ~ log(x) + (1 | g)", data, trusted=False)[0]
    np.testing.assert_allclose(design.X[:, 1], np.log(data.x))


def test_attacks_by_subset(data, trap):
    with pytest.raises(mj.DataError, match="subset= as text is code"):
        mj.lmm("y ~ x + (1 | g)", data, subset=f"@pd.io.common.os.system('touch {trap}') == 0", trusted=False)
    assert len(mj.build_design("y ~ x + (1 | g)", data, subset=data.x > 1, trusted=False)[0].y) == int(
        (data.x > 1).sum()
    )


@pytest.mark.parametrize(
    "asked", ["sum() or open('{path}', 'w')", "treatment(base=open('{path}', 'w'))", "sum.__init__.__globals__"]
)
def test_attacks_by_contrasts(asked, data, trap):
    with pytest.raises((mj.FormulaError, mj.DataError)):
        mj.lmm("y ~ f + (1 | g)", data, contrasts={"f": asked.format(path=trap)}, trusted=False)


def test_attacks_by_names_of_columns_and_new_data(data, trap):
    code = f"__import__('os').system('touch {trap}')"
    table = data.rename(columns={"x": code})
    design, labels = mj.build_design(f"y ~ log(`{code}`) + (1 | g)", table, trusted=False)
    np.testing.assert_allclose(design.X[:, 1], np.log(data.x))
    assert labels.state.fixed.of(table).shape == (N, 2)
    with pytest.raises((mj.FormulaError, mj.DataError)):
        mj.build_design(f"y ~ {code} + (1 | g)", table, trusted=False)


def test_what_a_fit_was_told_holds_after_it(data, trap):
    fit = mj.lmm("y ~ x + z + (1 | g)", data, trusted=False)
    assert not fit.labels.state.context.trusted
    with pytest.raises((mj.FormulaError, mj.DataError)):
        mj.exact_lrt(fit.refit(reml=False), f"y ~ x + open('{trap}', 'w')")
    for hypothesis in (f"x = __import__('os').system('touch {trap}')", f"open('{trap}', 'w') = 0", "x.__class__ = 0"):
        with pytest.raises(ValueError):
            fit.test(hypothesis)


def test_attacks_by_chunks_and_studies(data, trap, monkeypatch):
    attack = ATTACKS["open"].format(path=trap)
    with pytest.raises(mj.FormulaError):
        mj.cross_products_from([data[:20], data[20:]], attack, trusted=False)
    monkeypatch.setenv("MIXJAX_UNTRUSTED", "1")
    with pytest.raises(mj.FormulaError):
        mj.lmm(attack, data)
    with pytest.raises(mj.FormulaError):
        mj.scenario(attack, data, beta=[0, 0], sd=1)
    assert mj.build_design("y ~ np.log(x) + (1 | g)", data, trusted=True)[0].X.shape == (N, 2)  # said in so many words


def test_expressions_of_populations_are_never_code(trap):
    with pytest.raises(ValueError):
        mj.population(x=mj.normal(0, 1), y=mj.response(f"open('{trap}', 'w') + x")).sample_x(5, key=1)


def test_attacks_by_the_command_line(data, trap, tmp_path):
    path = tmp_path / "data.csv"
    data.to_csv(path, index=False)
    attack = ATTACKS["open"].format(path=trap)
    command = [sys.executable, "-m", "mixjax", "fit", attack, str(path), "--no-cache"]
    environment = {**os.environ, "MIXJAX_UNTRUSTED": "1"}
    for more, env in (["--untrusted"], os.environ), ([], environment):
        run = subprocess.run([*command, *more], capture_output=True, text=True, env=env, check=False)
        assert run.returncode != 0
        assert "is not allowed in a formula that is not trusted" in run.stderr
        assert "Traceback" not in run.stderr


def test_documentation_lists_what_is_allowed():
    text = (Path(__file__).parent.parent / "docs" / "formulas.md").read_text(encoding="utf-8")
    for name in SAFE:
        assert f"`{name}`" in text or f"{name}(" in text, name
