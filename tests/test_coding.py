"""Columns of terms: the same as formulaic's model matrix, bit by bit and name by name."""

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from formulaic import ModelSpec
from formulaic.parser.types import Factor as FormulaicFactor
from formulaic.parser.types import Term as FormulaicTerm
from formulaic.transforms import TRANSFORMS
from hypothesis import given, settings
from hypothesis import strategies as st

import mixjax as mj
from mixjax.formula.algebra import effects, summands
from mixjax.formula.coding import Factor, code_terms, scoped_terms
from mixjax.formula.context import resolve
from mixjax.formula.evaluate import columns_of
from mixjax.formula.syntax import read

FACTORS = ["a", "b", "o", "flag", "one"]
NUMBERS = ["x", "k", "np.log(x)", "poly(x, 2)", "bs(x, df=4)", "bs(x, df=4, include_intercept=True)", "cr(x, df=3)"]
CODINGS = [
    "C(a)", "C(k, contr.treatment(base=2))", "C(a, contr.sum)", "C(b, contr.poly)", "C(o, contr.helmert)",
    "C(o, contr.helmert(reverse=False, scale=True))", "C(b, contr.diff)", "C(a, contr.SAS)", "C(b, Treatment('q'))",
    "C(k, contr.poly(scores=[1, 2, 5]))", "C(a, {'first': [1, -1, 0], 'last': [0.5, 0.5, -1]})",
    "C(o, np.array([[1.0], [0.0], [-2.0]]))", "C(a, spans_intercept=False)", "C(a, levels=['w', 'u', 'v', 'nobody'])",
    "C(b, contr.sum, levels=['q', 'p', 'r', 's'])", "hashed(a, levels=3)",
]  # fmt: skip


def table(seed, n=12):
    rng = np.random.default_rng(seed)
    frame = pd.DataFrame({"x": rng.uniform(0.1, 3, n), "k": rng.permutation(np.arange(n) % 3 + 1)})
    frame["a"] = pd.Series(rng.permutation(np.resize(["u", "v", "w"], n)), dtype=object)
    frame["b"] = pd.Categorical(rng.permutation(np.resize(["p", "q", "r"], n)), categories=["r", "s", "q", "p"])
    frame["o"] = pd.Categorical.from_codes(np.arange(n) % 3, categories=[10, 5, 20], ordered=True)
    frame["one"] = pd.Categorical(["only"] * n)
    frame["flag"] = frame["x"] > frame["x"].median()
    frame["k"] = frame["k"].astype(float)
    return frame


class Reference:
    """The terms as formulaic materialises them, out of values that its own functions make."""

    def __init__(self, terms, expressions, frame):
        self.expressions, self.states = expressions, {e.shown: {} for e in expressions}
        factors = {e.shown: FormulaicFactor(e.shown, eval_method="lookup") for e in expressions}
        constant = FormulaicFactor("1", eval_method="literal")
        terms = [FormulaicTerm([factors[name] for name in term] or [constant]) for term in terms]
        self.spec = ModelSpec(formula=terms, ensure_full_rank=True, na_action="ignore", output="numpy")
        self.matrix = self.of(frame)
        self.spec = self.matrix.model_spec

    def of(self, frame):
        values = {e.shown: self.value(e, frame) for e in self.expressions}
        return self.spec.get_model_matrix(pd.DataFrame(index=pd.RangeIndex(len(frame))), context=values)

    def value(self, e, frame):
        columns = {}
        for alias, name in e.aliases.items():
            own = frame[name].reset_index(drop=True)
            if own.dtype in (bool, object):
                own = own.astype(object).astype("category")
            # Whole numbers that are levels have names without decimals.
            columns[alias] = own.astype(int) if e.functions[:1] == ("C",) and name == "k" else own
        state = ", _state=state)" if e.functions[:1] in (("poly",), ("bs",), ("cr",)) else ")"
        code = e.code.removesuffix(")") + state if e.code.endswith(")") else e.code
        return eval(code, {**TRANSFORMS, **columns, "state": self.states[e.shown]})


@st.composite
def sums(draw):
    atoms = draw(st.lists(st.sampled_from([*FACTORS, *NUMBERS, *CODINGS]), min_size=1, max_size=4, unique=True))
    own = st.recursive(
        st.sampled_from(atoms),
        lambda inner: st.tuples(inner, st.sampled_from([" + ", "*", ":", "/"]), inner).map(
            lambda t: f"({t[0]}{t[1]}{t[2]})"
        ),
        max_leaves=5,
    )
    return draw(own) + draw(st.sampled_from(["", " - 1", f" - {atoms[0]}", f" + 0 + {atoms[-1]}"]))


@given(sums(), st.integers(0, 5), st.data())
@settings(max_examples=200, deadline=None)
def test_columns_are_those_of_formulaic(text, seed, data):
    frame = table(seed)
    parts = effects(summands(read(text)), list(frame))
    context = resolve(parts.expressions, {"np": np}, True, lambda name, where: pytest.fail(f"{name} {where}"))
    reference = Reference(parts.terms, parts.expressions, frame)
    X, columns = columns_of(parts, frame, context, several=False)
    assert columns.names == tuple(reference.spec.column_names)
    np.testing.assert_array_equal(X, np.asarray(reference.matrix, float).reshape(X.shape))
    rows = data.draw(st.lists(st.integers(0, len(frame) - 1), min_size=1, max_size=5))
    some = frame.iloc[rows]
    np.testing.assert_array_equal(columns.of(some), np.asarray(reference.of(some), float).reshape(len(rows), -1))
    for part, theirs in zip(columns.spec.structure, reference.spec.structure, strict=True):
        assert list(part.columns) == theirs.columns


@given(
    st.lists(st.lists(st.sampled_from("abcd"), min_size=1, max_size=3, unique=True), min_size=1, max_size=6),
    st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_terms_add_full_rank_and_span_what_they_say(terms, constant):
    """With all cells filled the columns are independent, and span all products of all levels."""
    cells = np.array(np.meshgrid(*[range(2)] * 4)).reshape(4, -1)
    values = {name: Factor(codes, ["u", "v"]) for name, codes in zip("abcd", cells, strict=True)}
    unique = list({frozenset(term): tuple(term) for term in [[]] * constant + sorted(terms, key=len)}.values())
    X, _ = code_terms(unique, values, 16)
    full = [np.ones((16, 1))] * constant
    for term in terms:
        key = np.array([cells["abcd".index(name)] for name in term])
        full.append((key.T[:, None, :] == np.unique(key.T, axis=0)[None]).all(axis=2).astype(float))
    everything = np.hstack(full)
    rank = np.linalg.matrix_rank(everything)
    assert X.shape[1] == np.linalg.matrix_rank(X) == rank
    assert np.linalg.matrix_rank(np.hstack([X, everything])) == rank


def test_a_term_is_joined_from_what_is_not_yet_spanned():
    spans = {"a": True, "b": True, "x": False}
    scoped = list(scoped_terms([(), ("b",), ("a", "b"), ("a", "x")], spans))
    assert scoped == [
        ((),),
        ((("b", True),),),
        ((("a", True), ("b", False)),),
        ((("a", False), ("x", False)),),
    ]


def test_rows_without_a_level_have_zeros():
    frame = pd.DataFrame({"x": [0.5, 1.5, 9.0, 0.2]})
    parts = effects(summands(read("pd.cut(x, [0, 1, 2])")), ["x"])
    context = resolve(parts.expressions, {"pd": pd}, True, lambda name, where: pytest.fail(name))
    X, _ = columns_of(parts, frame, context)
    assert X.tolist() == [[1, 0], [1, 1], [1, 0], [1, 0]]


@pytest.mark.parametrize("asked", ["np.eye(7)", "contr.treatment(base='zz')", "contr.poly(scores=[1])"])
def test_contrasts_that_do_not_fit_are_refused(asked):
    data = pd.DataFrame({"f": list("abc") * 10, "g": np.arange(30) // 5, "y": np.arange(30.0) ** 0.5})
    with pytest.raises(mj.FormulaError, match="cannot be coded"):
        mj.build_design(f"y ~ C(f, {asked}) + (1 | g)", data, context={"np": np})


@pytest.mark.parametrize("formula", ["C(y > 0) ~ 1 + (1 | g)", "y ~ offset(C(k)) + (1 | g)", "C(k) ~ y + (1 | g)"])
def test_factors_of_zeros_and_ones_are_no_numbers(formula):
    data = pd.DataFrame({"k": np.arange(30) % 2, "g": np.arange(30) // 5, "y": np.sin(np.arange(30.0))})
    with pytest.raises(mj.DataError, match="is not one numeric column"):
        mj.build_design(formula, data)
    assert set(mj.build_design("(y > 0) ~ k + (1 | g)", data)[0].y) == {0.0, 1.0}


def test_hashed_factors_are_predicted():
    rng = np.random.default_rng(3)
    data = pd.DataFrame({"f": list("abcd") * 12, "g": np.arange(48) // 6, "y": rng.normal(size=48)})
    data["y"] += 3.0 * data["g"]
    with pytest.warns(mj.DataWarning, match=r"left out because other columns determine them: hashed"):  # empty ones
        fit = mj.lmm("y ~ hashed(f, levels=9) + (1 | g)", data)
    assert len(fit.fixef) > 2
    np.testing.assert_allclose(fit.predict(data.iloc[::-1]), np.asarray(fit.fitted)[::-1], rtol=1e-12)


def test_columns_of_numbers_and_text_need_no_formulaic():
    code = """
import sys, mixjax as mj
mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy")).predict({"Days": [1.0]}, random=False)
mj.build_design("angle ~ recipe * temperature + (1 | recipe:replicate)", mj.datasets.load("cake"))
assert "formulaic" not in sys.modules
"""
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
