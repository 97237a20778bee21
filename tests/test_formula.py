"""The formula language: what is read, how terms expand, what tables are taken."""

import warnings
from decimal import Decimal

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from conftest import fit_of, table

import mixjax as mj
from mixjax.formula.parse import expand_groups, parse
from mixjax.formula.syntax import expression


def random_parts(text):
    return [(str(p.effects), p.group.name, p.independent) for p in parse(text).random]


@pytest.mark.parametrize(
    ("text", "fixed", "random"),
    [
        ("y ~ x + (1 | g)", "x", [("1", "g", False)]),
        ("y~x+(x|g)", "x", [("x", "g", False)]),
        ("y ~ (1 | g)", "1", [("1", "g", False)]),
        ("y ~ 0 + x + (0 + x | g)", "0 + x", [("0 + x", "g", False)]),
        ("y ~ x - 1 + (1|g)", "x - 1", [("1", "g", False)]),
        ("  y  ~  ( ( 1 | g ) )  +  x ", "x", [("1", "g", False)]),
        ("y ~ (x + (1 | g)) + z", "x + z", [("1", "g", False)]),
        ("y ~ a*(b + c) + (b*c | g)", "a*(b + c)", [("b*c", "g", False)]),
        ("y ~ x + (x || g)", "x", [("x", "g", True)]),
        ("y ~ (1 | a/b)", "1", [("1", "b:a", False), ("1", "a", False)]),
        ("y ~ (1 | a/b/c)", "1", [("1", "c:(b:a)", False), ("1", "b:a", False), ("1", "a", False)]),
        ("y ~ (1 | a:b)", "1", [("1", "a:b", False)]),
        ("y ~ (1 | a*b)", "1", [("1", "a", False), ("1", "b", False), ("1", "a:b", False)]),
        ("y ~ (1 | a) + (0 + x | a)", "1", [("1", "a", False), ("0 + x", "a", False)]),
        ("y ~ I(x^2) + (a + b)^2 + (1 | g)", "I(x^2) + (a + b)^2", [("1", "g", False)]),
        ("y ~ factor(x) + (poly(x, 2) | as.factor(g))", "factor(x)", [("poly(x, 2)", "g", False)]),
        ("y ~ `a b` + (`a b` | `g h`)", "`a b`", [("`a b`", "g h", False)]),
    ],
)
def test_parse(text, fixed, random):
    parsed = parse(text)
    assert str(parsed.fixed) == fixed
    assert random_parts(text) == random


def test_offsets_and_response():
    parsed = parse("log(y^2) ~ x + offset(3*z) + offset(w) + (1 | g)")
    assert str(parsed.response) == "log(y ** 2)"
    assert [str(e) for e in parsed.offsets] == ["3 * z", "w"]
    assert str(parsed.fixed) == "x"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("y", "one '~'"),
        ("y ~ x ~ z", "one '~'"),
        ("~ x + (1 | g)", "no response"),
        ("y ~ ", "no terms"),
        ("y ~ (1 | g", "'\\(' is never closed"),
        ("y ~ 1 | g)", r"unbalanced '\)'"),
        ("y ~ x + 1 | g", "put brackets around the random term"),
        ("y ~ x - (1 | g)", "subtracted"),
        ("y ~ x * (1 | g)", "can only be added"),
        ("y ~ ( | g)", "needs effects"),
        ("y ~ (1 | )", "needs effects"),
        ("y ~ (1 | a | b)", r"must read \(effects \| group\)"),
        ("y ~ (1 | a^b)", r"'\^' is not understood"),
        ("y ~ (1 | 3)", "column name is needed"),
        ("y ~ x + + (1 | g)", "a term is missing"),
        ("y ~ . + (1 | g)", "'.'"),
        ("y ~ 'x + (1 | g)", "quote"),
        (3, "must be text"),
    ],
)
def test_what_cannot_be_read_says_so(text, message):
    with pytest.raises(mj.FormulaError, match=message):
        parse(text)


def test_groups_nest_through_brackets():
    assert [g.name for g in expand_groups("a/(b + c)")] == ["b:a", "c:a", "a"]
    assert [g.columns for g in expand_groups("(a:b):c")] == [("a", "b", "c")]


def test_names_in_an_expression():
    e = expression("np.log(x) + f(z, df=3) + `a b` + C(w, contr.treatment(base='B')) + x == 3", ["x", "z"])
    assert (e.columns, e.names, e.functions) == (("x", "z", "a b"), ("np", "w", "contr"), ("f", "C"))
    assert str(e) == "np.log(x) + f(z, df=3) + `a b` + C(w, contr.treatment(base='B')) + x == 3"


def test_double_bar_is_one_term_per_numeric_effect():
    design, labels = mj.build_design("Reaction ~ Days + (Days || Subject)", table("sleepstudy"))
    assert [(t.group, t.effects) for t in labels.terms] == [("Subject", ("Intercept",)), ("Subject", ("Days",))]
    assert [t.Z.shape[1] for t in design.terms] == [1, 1]


def test_a_factor_inside_a_double_bar_keeps_its_block():
    _, labels = mj.build_design("score ~ Machine + (0 + Machine || Worker)", table("Machines"))
    assert [t.effects for t in labels.terms] == [("Machine[A]", "Machine[B]", "Machine[C]")]
    _, labels = mj.build_design("score ~ Machine + (Machine || Worker)", table("Machines"))
    assert [t.effects for t in labels.terms] == [("Intercept",), ("Machine[A]", "Machine[B]", "Machine[C]")]


def test_nested_levels_are_named_as_lme4_names_them():
    _, labels = mj.build_design("strength ~ 1 + (1 | batch/cask)", table("Pastes"))
    assert [t.group for t in labels.terms] == ["cask:batch", "batch"]
    assert labels.terms[0].levels[:4] == ("a:A", "a:B", "a:C", "a:D")


def test_three_nested_factors_keep_the_order_of_levels():
    rng = np.random.default_rng(0)
    data = pd.DataFrame({k: rng.integers(0, m, 60) for k, m in (("a", 2), ("b", 3), ("c", 2))}).assign(
        y=rng.normal(size=60)
    )
    _, labels = mj.build_design("y ~ 1 + (1 | a/b/c)", data)
    assert [t.group for t in labels.terms] == ["c:(b:a)", "b:a", "a"]
    assert labels.terms[0].levels == tuple(f"{c}:{b}:{a}" for c in (0, 1) for b in (0, 1, 2) for a in (0, 1))
    _, labels = mj.build_design("y ~ 1 + (1 | a*b)", data)
    assert sorted(t.group for t in labels.terms) == ["a", "a:b", "b"]


def test_a_string_as_slope_is_a_factor_slope():
    data = table("Machines").assign(Machine=lambda d: d.Machine.astype(str))
    _, labels = mj.build_design("score ~ 1 + (Machine | Worker)", data)
    assert labels.terms[0].effects == ("Intercept", "Machine[T.B]", "Machine[T.C]")


def test_terms_stand_by_decreasing_number_of_levels():
    _, labels = mj.build_design("diameter ~ 1 + (1 | sample) + (1 | plate)", table("Penicillin"))
    assert [t.group for t in labels.terms] == ["plate", "sample"]


def test_transforms_of_response_and_inside_terms():
    data = table("sleepstudy")
    design, labels = mj.build_design("log(Reaction) ~ sqrt(Days) + (poly(Days, 2) | Subject)", data)
    np.testing.assert_allclose(design.y, np.log(data.Reaction))
    assert labels.fixed == ("Intercept", "sqrt(Days)")
    assert labels.terms[0].effects == ("Intercept", "poly(Days, 2)[1]", "poly(Days, 2)[2]")
    design, _ = mj.build_design("I(Reaction - 3 * Days) ~ I(Days^2) + (1 | Subject)", data)
    np.testing.assert_allclose(design.y, data.Reaction - 3 * data.Days)
    np.testing.assert_allclose(design.X[:, 1], data.Days**2)
    design, _ = mj.build_design("Reaction / 2 ~ bs(Days, df=4) + (1 | Subject)", data)
    np.testing.assert_allclose(design.y, data.Reaction / 2)
    assert design.X.shape[1] == 5


def test_functions_of_the_caller_are_found():
    def double(x):
        return 2 * x

    design, _ = mj.build_design("Reaction ~ double(Days) + (1 | Subject)", table("sleepstudy"))
    np.testing.assert_allclose(design.X[:, 1], 2 * table("sleepstudy").Days)


def test_contrasts():
    data = table("cake")
    _, labels = mj.build_design("angle ~ recipe + temp + (1 | recipe:replicate)", data, contrasts={"recipe": "sum"})
    assert labels.fixed == ("Intercept", "recipe[S.A]", "recipe[S.B]", "temp")
    fit = mj.lmm("angle ~ recipe + temp + (1 | recipe:replicate)", data, reml=False, contrasts={"recipe": "contr.sum"})
    np.testing.assert_allclose(fit.criterion, fit_of("cake_temp", "ML").criterion, atol=1e-8)
    with pytest.raises(mj.DataError, match="contrasts= names 'replicate'"):
        mj.build_design("angle ~ recipe + (1 | replicate)", data, contrasts={"replicate": "sum"})


def test_offset_argument_and_formula_add_up():
    data = table("sleepstudy_wo")
    design, _ = mj.build_design("Reaction ~ Days + offset(off) + (1 | Subject)", data, offset="Days")
    np.testing.assert_allclose(design.offset, data.off + data.Days)
    reference = fit_of("sleepstudy_offset", "REML")
    fit = mj.lmm("Reaction ~ Days + (Days | Subject)", data, offset=data["off"].to_numpy())
    np.testing.assert_allclose(fit.criterion, reference.criterion, atol=1e-9)


def test_weights_by_name_and_by_value_agree():
    data = table("sleepstudy_wo")
    a = mj.build_design("Reaction ~ Days + (1 | Subject)", data, weights="w")[0]
    b = mj.build_design("Reaction ~ Days + (1 | Subject)", data, weights=data["w"])[0]
    np.testing.assert_array_equal(a.weights, b.weights)


def as_polars(frame, kind):
    columns = {
        name: pl.Series(frame[name].astype(str).tolist(), dtype=pl.Enum(list(frame[name].cat.categories)))
        if isinstance(frame[name].dtype, pd.CategoricalDtype)
        else pl.Series(frame[name].tolist())
        for name in frame.columns
    }
    eager = pl.DataFrame(columns)
    return eager.lazy() if kind == "lazy" else eager


TABLES = {
    "pandas": lambda f: f,
    "polars": lambda f: as_polars(f, "eager"),
    "polars lazy": lambda f: as_polars(f, "lazy"),
    "pyarrow": lambda f: pa.Table.from_pandas(f),
    "dict": lambda f: {k: f[k].astype(str).to_numpy() if k == "Subject" else f[k].to_numpy() for k in f},
}


@pytest.mark.parametrize("make", TABLES.values(), ids=TABLES.keys())
def test_every_make_of_table_gives_the_same_design(make):
    frame = table("sleepstudy").assign(half=lambda d: pd.Categorical(np.where(d.Days < 5, "late", "early")))
    expected, expected_labels = mj.build_design("Reaction ~ Days + half + (Days | Subject)", frame)
    design, labels = mj.build_design("Reaction ~ Days + half + (Days | Subject)", make(frame))
    np.testing.assert_allclose(design.y, expected.y)
    np.testing.assert_allclose(design.X, expected.X)
    np.testing.assert_array_equal(design.terms[0].group, expected.terms[0].group)
    assert labels.terms == expected_labels.terms
    assert labels.fixed == expected_labels.fixed


def test_order_of_categories_is_kept_and_unused_ones_are_dropped():
    frame = table("cake").assign(
        recipe=lambda d: pd.Categorical(d.recipe.astype(str), categories=["C", "unused", "A", "B"])
    )
    _, labels = mj.build_design("angle ~ recipe + (1 | replicate)", frame)
    assert labels.fixed == ("Intercept", "recipe[T.A]", "recipe[T.B]")
    _, labels = mj.build_design("angle ~ temp + (1 | recipe)", frame)
    assert labels.terms[0].levels == ("C", "A", "B")


def test_numbers_as_groups_are_sorted_as_numbers():
    frame = pd.DataFrame({"y": np.arange(12.0) ** 1.5, "g": np.tile([10, 9, 2], 4)})
    assert mj.build_design("y ~ 1 + (1 | g)", frame)[1].terms[0].levels == ("2", "9", "10")
    frame.loc[0, "g"] = np.nan  # pandas makes them floats
    with pytest.warns(mj.DataWarning, match=r"1 of 12 rows left out .*\(g 1\)"):
        _, labels = mj.build_design("y ~ 1 + (1 | g)", frame)
    assert labels.terms[0].levels == ("2", "9", "10")


@pytest.mark.parametrize("make", [TABLES["pandas"], TABLES["polars"], TABLES["pyarrow"]])
def test_missing_rows_are_counted(make):
    frame = table("sleepstudy").copy()
    frame.loc[[3, 7], "Reaction"] = np.nan
    frame.loc[[7, 9], "Subject"] = None
    frame["unused"] = np.nan
    if make is TABLES["polars"]:
        subjects = [None if pd.isna(s) else s for s in frame.Subject]
        data = pl.DataFrame({"Reaction": pl.Series([None if np.isnan(v) else v for v in frame.Reaction]),
                             "Days": frame.Days.to_numpy(), "Subject": subjects})  # fmt: skip
    else:
        data = make(frame)
    with pytest.warns(mj.DataWarning, match=r"3 of 180 rows left out .*\(Reaction 2, Subject 2\)"):
        design, labels = mj.build_design("Reaction ~ Days + (1 | Subject)", data)
    assert len(design.y) == 177
    assert labels.n_missing == 3


def test_subset():
    data = table("sleepstudy")
    by_text = mj.build_design("Reaction ~ Days + (1 | Subject)", data, subset="Days >= 2")[0]
    by_mask = mj.build_design("Reaction ~ Days + (1 | Subject)", data, subset=data.Days >= 2)[0]
    assert len(by_text.y) == 144
    np.testing.assert_array_equal(by_text.y, by_mask.y)


def test_redundant_columns_are_named_and_the_fit_goes_on():
    data = table("sleepstudy").assign(twice=lambda d: 2 * d.Days + 1)
    with pytest.warns(mj.DataWarning, match="determine them: twice"):
        fit = mj.lmm("Reaction ~ Days + twice + (Days | Subject)", data)
    np.testing.assert_allclose(fit.criterion, fit_of("sleepstudy_slopes", "REML").criterion, atol=1e-9)
    assert fit.labels.dropped_columns == ("twice",)
    assert "twice" in str(fit.summary())


def test_weighted_rank_is_judged_on_the_weighted_columns():
    data = table("sleepstudy_wo").assign(twice=lambda d: 2 * d.Days)
    with pytest.warns(mj.DataWarning, match="twice"):
        mj.build_design("Reaction ~ Days + twice + (1 | Subject)", data, weights="w")


def test_dotted_names_need_no_backticks():
    data = table("sleepstudy").rename(columns={"Reaction": "reaction.time", "Subject": "subj.id", "Days": "days"})
    design, labels = mj.build_design("reaction.time ~ days + I(days^2) + (days | subj.id)", data)
    np.testing.assert_array_equal(design.y, data["reaction.time"])
    assert labels.response == "reaction.time"
    data = data.rename(columns={"days": "x.1"})
    _, labels = mj.build_design("log(reaction.time) ~ x.1 + (x.1 | subj.id)", data)
    assert labels.fixed == ("Intercept", "x.1")


def test_variables_of_the_caller_do_not_hide_functions():
    C, scale, log, I = 1, 2.0, table("cake"), np.eye(2)  # noqa: E741, F841
    data = table("sleepstudy")
    mj.build_design("log(Reaction) ~ factor(Days) + (1 | Subject)", data)
    mj.build_design("Reaction ~ scale(Days) + I(Days^2) + (1 | Subject)", data)


def test_arrays_of_the_caller_are_columns():
    data = table("sleepstudy")
    age = data["Days"].to_numpy() + 0.5
    design, _ = mj.build_design("Reaction ~ age + (1 | Subject)", data, subset="Days > 1")
    np.testing.assert_array_equal(design.X[:, 1], age[data["Days"] > 1])
    shuffled = {"shuffled": data["Days"].sample(frac=1, random_state=1) * 1.0}
    design, _ = mj.build_design("Reaction ~ shuffled + (1 | Subject)", data, context=shuffled)
    np.testing.assert_array_equal(design.X[:, 1], data["Days"])
    with pytest.raises(mj.DataError, match="'short' has shape"):
        mj.build_design("Reaction ~ short + (1 | Subject)", data, context={"short": age[:3]})
    design, _ = mj.build_design("Reaction ~ I(two * Days) + (1 | Subject)", data, context={"two": 2.0})
    np.testing.assert_array_equal(design.X[:, 1], 2 * data["Days"])


def test_series_are_lined_up_by_their_index():
    data = table("sleepstudy_wo")
    expected = mj.build_design("Reaction ~ Days + (1 | Subject)", data, weights="w", offset="off", subset="Days > 4")[0]
    back = data.iloc[::-1]
    design, _ = mj.build_design(
        "Reaction ~ Days + (1 | Subject)", data, weights=back["w"], offset=back["off"], subset=back["Days"] > 4
    )
    np.testing.assert_array_equal(design.weights, expected.weights)
    np.testing.assert_array_equal(design.offset, expected.offset)
    np.testing.assert_array_equal(design.y, expected.y)
    with pytest.raises(mj.DataError, match="index of weights differs"):
        mj.build_design("Reaction ~ Days + (1 | Subject)", data, weights=data["w"].set_axis(range(1000, 1180)))


@pytest.mark.parametrize("make", [lambda s: s.astype(object), lambda s: s.map(Decimal)], ids=["object", "Decimal"])
def test_numbers_in_object_columns_are_numbers(make):
    data = table("sleepstudy").assign(Days=lambda d: make(d["Days"].astype(int)))
    assert mj.build_design("Reaction ~ Days + (1 | Subject)", data)[1].fixed == ("Intercept", "Days")


def test_integer_column_names():
    data = table("sleepstudy").set_axis([0, "Days", 2], axis=1)
    design, _ = mj.build_design("`0` ~ Days + (1 | `2`)", data)
    assert design.X.shape == (180, 2)


def test_missing_weights_are_counted_once():
    data = table("sleepstudy_wo").copy()
    data.loc[0, "w"] = np.nan
    with pytest.warns(mj.DataWarning, match=r"\(\(weights\) 1\)"):
        mj.build_design("Reaction ~ Days + (1 | Subject)", data, weights="w")


def test_warnings_are_shown_every_time_and_point_at_the_call():
    data = table("sleepstudy").copy()
    data.loc[0, "Reaction"] = np.nan
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        warnings.filterwarnings("always", category=mj.DataWarning)
        for _ in range(2):
            mj.build_design("Reaction ~ Days + (1 | Subject)", data)
    assert len(caught) == 2
    assert caught[0].filename == __file__
