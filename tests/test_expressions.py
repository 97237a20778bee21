"""Expressions and terms: what text means, what it is on rows, and what a new row means by it."""

import datetime
import pickle
import warnings

import numpy as np
import pandas as pd
import pytest
from formulaic import Formula
from hypothesis import given, settings
from hypothesis import strategies as st

import mixjax as mj
from mixjax.formula.algebra import effects, summands
from mixjax.formula.context import resolve
from mixjax.formula.evaluate import columns_of
from mixjax.formula.parse import parse
from mixjax.formula.state import new_rows
from mixjax.formula.syntax import expression, read

N = 60


@pytest.fixture(scope="module")
def data():
    rng = np.random.default_rng(5)
    frame = pd.DataFrame({"g": np.repeat(np.arange(12), 5), "x": np.exp(rng.normal(size=N)), "z": rng.normal(size=N)})
    frame["k"], frame["f"] = rng.integers(1, 9, N), np.tile(list("abc"), N // 3)
    frame["flag"] = frame["z"] > 0
    frame["y"] = frame["x"] + rng.normal(size=12)[frame["g"]] + rng.normal(size=N)
    return frame


def X_of(formula, data, **options):
    design, labels = mj.build_design(formula, data, **options)
    return pd.DataFrame(np.asarray(design.X), columns=list(labels.fixed))


def same(a, b):
    np.testing.assert_allclose(np.asarray(a, float), np.asarray(b, float), rtol=1e-12, atol=1e-12)


# --- algebra -------------------------------------------------------------------------------------------------------


def sums():
    atom = st.sampled_from(["a", "b", "c", "d"])
    return st.recursive(
        atom,
        lambda inner: st.one_of(
            st.tuples(inner, st.sampled_from([" + ", "*", ":", "/"]), inner).map(lambda t: f"({t[0]}{t[1]}{t[2]})"),
            st.tuples(inner, inner).map(lambda t: f"(({t[0]}) + ({t[1]}))^2"),
        ),
        max_leaves=5,
    )


@given(sums(), st.sampled_from(["", " - 1", " + 0", " - a", " - a:b"]))
@settings(max_examples=200, deadline=None)
def test_terms_are_those_of_formulaic(text, end):
    own = {frozenset(term) for term in effects(summands(read(text + end))).terms}
    theirs = {frozenset(f.expr for f in term.factors if f.expr != "1") for term in Formula(text + end)}
    assert own == theirs


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("a + (b - a)", ["", "a", "b"]),
        ("a + b - (b - a)", ["", "a"]),
        ("(a + 0) + b", ["a", "b"]),
        ("a - (1 + a)", []),
        ("a - (b - 1)", ["", "a"]),
        ("0 + a + 1", ["", "a"]),
        ("(a + b) %in% (c * d)", ["", "a:c:d", "b:c:d"]),
        ("(a + b) / c", ["", "a", "b", "a:b:c"]),
        ("a + (a + b)^2 - a:b", ["", "a", "b"]),
    ],
)
def test_terms_are_those_of_r(text, terms):
    """As ``attr(terms(~ text), "term.labels")`` and ``"intercept"`` have them, R 4."""
    assert [":".join(term) for term in effects(summands(read(text))).terms] == terms


@pytest.mark.parametrize("text", ["1 * a", "(a + 0) * b", "(1 + a):b", "a / 1", "a %in% 0", "(a - 1)^2"])
def test_the_intercept_has_no_products(text):
    with pytest.raises(mj.FormulaError, match="can only be added or taken away"):
        effects(summands(read(text)))


def test_terms_stand_by_degree_and_named_as_first_written(data):
    assert effects(summands(read("x:z + b*a + a:b - z"))).terms == ((), ("b",), ("a",), ("x", "z"), ("b", "a"))
    assert list(X_of("y ~ z %in% f + (1 | g)", data)) == ["Intercept", "z:f[a]", "z:f[b]", "z:f[c]"]
    same(X_of("y ~ (x + z)^2 + (1 | g)", data), X_of("y ~ x*z + (1 | g)", data))
    assert list(X_of("y ~ (0 + x) + (1 | g)", data)) == ["x"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("y ~ 2*x + (1 | g)", "'2' cannot be a term"),
        ("y ~ x > 1 + (1 | g)", "cannot stand between terms"),
        ("y ~ x^1.5 + (1 | g)", "no power of terms"),
        ("y ~ x^z + (1 | g)", "no power of terms"),
        ("y ~ x^999999999 + (1 | g)", "no power of terms"),
        ("y ~ my x + (1 | g)", "'my x' cannot be read.*backticks"),
        ("y ~ log(x z) + (1 | g)", r"'log\(x z\)' cannot be read"),
        ("y ~ I(x = 2) + (1 | g)", "unexpected keyword argument 'x'"),
        ("y ~ I(x && z) + (1 | g)", "&& is not understood; write &"),
        ("y ~ I(!flag) + (1 | g)", r"write ~\("),
        ("y ~ I(x %in% k) + (1 | g)", "between terms only"),
        ("y ~ d$x + (1 | g)", "column's name alone"),
        ("y ~ x # z", "'#' is not understood"),
        ("y ~ `` + (1 | g)", "name without letters"),
        ("y ~ offset() + (1 | g)", "an expression is missing"),
        ("y ~ x.1 + (1 | g)", "no column 'x.1'"),
        ("y ~ 'x' + (1 | g)", "cannot stand between terms"),
        ("y ~ ns(x) + (1 | g)", "cr"),
        ("y ~ as.numeric(k) + (1 | g)", "as.numeric"),
        ("cbind(x, z) ~ k + (1 | g)", "one response"),
        ("y ~ poly(x, 2, raw=T) + (1 | g)", "write True"),
        ("y ~ nowhere(x) + (1 | g)", "no function 'nowhere'"),
        ("y ~ lag.fun(x) + (1 | g)", "cannot be evaluated"),
        ("y ~ x + I(2) + (1 | g)", "gives one value"),
        ("y ~ max(x) + (1 | g)", "gives one value"),
        ("y ~ nothing(x) + (1 | g)", "gives None"),
        ("y ~ x.sort() + (1 | g)", "'sort'"),
        ("y ~ x[:3] + (1 | g)", "gives 3 values for 60 rows"),
        ("y ~ C(f, levels=['a', 'b']) + (1 | g)", "leaves out 'c'"),
        ("y ~ np.array([z, x, z]) + (1 | g)", "shape"),
    ],
)
def test_what_cannot_be_understood_names_the_text(text, message, data):
    def nothing(x):
        return None

    with pytest.raises((mj.FormulaError, mj.DataError), match=message):
        mj.build_design(text, data, context={"np": np, "nothing": nothing})


@pytest.mark.parametrize(
    "text",
    [
        "y ~ " + "(" * 2000 + "x" + ")" * 2000 + " + (1 | g)",
        "y ~ (x + z)^999999999 + (1 | g)",
        "y ~ " + "*".join(f"a{i}" for i in range(20)) + " + (1 | g)",
        "y ~ x + (1 | " + "*".join(f"a{i}" for i in range(20)) + ")",
        "y ~ I(9**9**9**9) + (1 | g)",
        "y ~ I(x * 2**99999999) + (1 | g)",
        "y ~ I(1 << 99999999999) + (1 | g)",
        "y ~ bs(x, df=10**9) + (1 | g)",
        "y ~ poly(x, 99999) + (1 | g)",
        "y ~ " + " + ".join(["x"] * 200_000),
        "y ~ x + " + " + ".join(f"(1 | a{i})" for i in range(500)),
        "y ~ I(" + "-" * 90_000 + "x) + (1 | g)",
    ],
    ids=range(12),
)
def test_what_would_take_for_ever_is_refused_at_once(text, data):
    with pytest.raises(mj.FormulaError):
        mj.build_design(text, data)


def test_a_factor_of_too_many_levels_is_refused_before_its_columns_are_made():
    n = 30_000
    data = pd.DataFrame({"y": np.arange(n) % 7.0, "g": np.arange(n) % 9, "f": np.arange(n).astype(str)})
    with pytest.raises(mj.DataError, match=r"30000 columns.*\(1 \| g\)"):
        mj.build_design("y ~ C(f) + (1 | g)", data)


# --- expressions ---------------------------------------------------------------------------------------------------


def test_a_response_of_two_calls_is_their_difference(data):
    design, labels = mj.build_design("log(x) - log(k) ~ z + (1 | g)", data)
    same(design.y, np.log(data.x) - np.log(data.k))
    assert labels.response == "log(x) - log(k)"
    design, _ = mj.build_design("k^2 ~ z + offset(log(x) - log(k)) + offset(k^2) + (1 | g)", data)
    same(design.y, data.k**2)
    same(design.offset, np.log(data.x) - np.log(data.k) + data.k**2)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("log(x, 2)", lambda d: np.log2(d.x)),
        ("I(k^2)", lambda d: d.k**2),
        ("I(k ^ 2 - x)", lambda d: d.k**2 - d.x),
        ("I(x^-1)", lambda d: 1 / d.x),
        ("{x - k}", lambda d: d.x - d.k),
        ("Q('x')", lambda d: d.x),
        ("np.where(x > 1, x, z)", lambda d: np.where(d.x > 1, d.x, d.z)),
        ("x.clip(lower=0.5)", lambda d: np.maximum(d.x, 0.5)),
        ("np.interp(x, [0, 1000], [5, 7])", lambda d: 5 + d.x / 500),
        ("I(sum(x) * z)", lambda d: d.x.sum() * d.z),
        ("scale(x, scale=FALSE)", lambda d: d.x - d.x.mean()),
        ("abs(z)", lambda d: d.z.abs()),
        ("I(x.astype(int) / 2)", lambda d: np.floor(d.x) / 2),
        ("I((lambda v: v + 1)(x))", lambda d: d.x + 1),
        ("x.map(lambda v: v * 2)", lambda d: d.x * 2),
        ("I(-x if True else z)", lambda d: -d.x),
    ],
)
def test_values_of_expressions(text, value, data):
    design, labels = mj.build_design(f"y ~ {text} + (1 | g)", data, context={"np": np})
    same(design.X[:, 1], value(data))
    # The fit's rows alone, and backwards, mean what they meant.
    columns = labels.state.fixed
    same(columns.of(data.iloc[::-1].astype({"k": float})), design.X[::-1])
    same(columns.of(data.iloc[[7]].astype({"k": float})), design.X[[7]])


IN_COMPANY = [
    "np.cumsum(x)",
    "x.rank()",
    "I(x.index % 5)",
    "np.array([v - max(x) for v in x])",
    "np.linspace(0, 1, len(x))",
]
IN_COMPANY += ["np.linspace(0, 1, 60)", "I(x - x.shift(fill_value=0))", "I(x[::-1])", "np.sort(x)"]


@pytest.mark.parametrize("text", IN_COMPANY)
def test_what_depends_on_other_rows_is_refused_for_new_ones(text, data):
    _, labels = mj.build_design(f"y ~ {text} + (1 | g)", data, context={"np": np})
    with pytest.raises(mj.DataError, match="other rows"):
        labels.state.fixed.of(data.iloc[[3, 4]])
    with pytest.raises(mj.FormulaError, match=r"depends on all rows|values for 30 rows"):
        mj.cross_products_from([data[:30], data[30:]], f"y ~ {text} + (1 | g)", context={"np": np})


STATISTICS = [
    "I(x - np.mean(x))",
    "I(x / max(x))",
    "I(x / x.quantile(0.9))",
    "I(x - x.mean() + len(x))",
    "I(x * x.mean() / np.std(np.log(x)))",
    "k.map(k.value_counts())",
    "center(x)",
]


@pytest.mark.parametrize("text", STATISTICS)
def test_statistics_of_columns_stay_those_of_the_fit(text, data):
    design, labels = mj.build_design(f"y ~ {text} + offset(z - np.mean(z)) + ({text} | g)", data, context={"np": np})
    part = data.iloc[[40, 3]].astype({"k": float})
    same(labels.state.fixed.of(part), design.X[[40, 3]])
    same(labels.state.random[0].of(part), design.terms[0].Z[[40, 3]])
    same(labels.state.offset_of(part), design.offset[[40, 3]])


NAMES = ["class", "lambda", "not", "in", "C", "I", "log", "None", "TRUE", "my x", "blood.type", "Cohen's d", "µ", "9"]
NAMES += ["1", "a+b", "Growth factor (ng/ml)", "x|g", "~", "__c0__", "np", "if", 'say "x"', "(weights)", "`"]


@pytest.mark.parametrize("name", NAMES)
def test_names_of_any_kind(name, data):
    """Between backticks any name works; bare where R users write it so."""
    if "`" in name:
        with pytest.raises(mj.FormulaError):
            mj.build_design(f"y ~ `{name}` + (1 | g)", data.rename(columns={"x": name}))
        return
    table, factor = data.rename(columns={"x": name}), data.rename(columns={"f": name})
    plain = mj.build_design("y ~ log(x) + x:z + (x | g)", data)[0]
    own, labels = mj.build_design(f"y ~ log(`{name}`) + `{name}`:z + (`{name}` | g)", table)
    same(own.X, plain.X)
    same(own.terms[0].Z, plain.terms[0].Z)
    assert len(set(labels.fixed)) == 3
    same(X_of(f"y ~ C(`{name}`) + (1 | g)", factor), X_of("y ~ f + (1 | g)", data))
    same(
        X_of(f"y ~ `{name}` + (1 | g)", factor, contrasts={name: "sum"}),
        X_of("y ~ f + (1 | g)", data, contrasts={"f": "sum"}),
    )
    mj.build_design(f"y ~ z + (1 | `{name}`)", factor)
    mj.build_design(f"y ~ z + (`{name}` || g)", table)
    mj.build_design("y ~ z + (1 | g)", table, weights=name)


@pytest.mark.parametrize("name", ["class", "lambda", "not", "in", "C", "blood.type", "µ", "if", "and", "is", "None"])
def test_bare_names(name, data):
    table = data.rename(columns={"x": name})
    same(
        X_of(f"y ~ log({name}) + {name} + I({name} / z) + (1 | g)", table),
        X_of("y ~ log(x) + x + I(x / z) + (1 | g)", data),
    )
    assert X_of(f"y ~ {name} + (1 | g)", table).columns[1] == name


def test_a_column_called_intercept_is_refused(data):
    with pytest.raises(mj.DataError, match=r"called 'Intercept'.*rename"):
        mj.build_design("y ~ Intercept + (1 | g)", data.rename(columns={"x": "Intercept"}))


def test_columns_with_the_names_of_weights_and_offset(data):
    table = data.rename(columns={"x": "(weights)", "z": "(offset)"})
    design, labels = mj.build_design(
        "y ~ `(weights)` + `(offset)` + (1 | g)", table, weights=np.arange(1.0, 61), offset=np.arange(60.0)
    )
    same(design.X[:, 1:], data[["x", "z"]])
    same(design.weights, np.arange(1.0, 61))
    assert list(labels.frame) == ["y", "(weights)", "(offset)", "g"]


@pytest.mark.parametrize(
    "asked", ["sum", "contr.sum", "helmert", "poly", "diff", "treatment", "SAS", "contr.treatment(base='b')"]
)
@pytest.mark.parametrize("written", ["f", "C(f)", "factor(f)", "f*z"])
def test_contrasts_of_a_factor_keep_its_name(asked, written, data):
    call = asked.removeprefix("contr.")
    own = X_of(f"y ~ {written} + (1 | g)", data, contrasts={"f": asked})
    coded = X_of(
        f"y ~ {written.replace('factor(f)', 'f').replace('C(f)', 'f').replace('f', f'C(f, contr.{call})')} + (1 | g)",
        data,
    )
    same(own, coded)
    assert not any("contr" in name for name in own)


def test_names_of_the_caller_are_looked_up_when_the_fit_is_made(data):
    shift = 5.0
    fit = mj.lmm("y ~ I(x - shift) * f + (1 | g)", data)

    def answers():
        means, slopes = fit.emmeans("f", ddf="wald"), fit.emtrends("f", "x", ddf="wald")
        return [means.to_frame(), slopes.to_frame(), fit.anova("III", ddf="wald"), fit.predict(data).to_frame()]

    before = answers()
    shift = 100.0  # noqa: F841
    for a, b in zip(before, answers(), strict=True):
        pd.testing.assert_frame_equal(a, b)
    again = pickle.loads(pickle.dumps(fit))
    pd.testing.assert_frame_equal(again.predict(data).to_frame(), before[3])
    made = mj.lmm("y ~ shifted * f + (1 | g)", data.assign(shifted=data.x - 5.0))
    right = made.emmeans("f", at={"shifted": 1.0 - 5.0}, ddf="wald").to_frame()["estimate"]
    np.testing.assert_allclose(fit.emmeans("f", at={"x": 1.0}, ddf="wald").to_frame()["estimate"], right, rtol=1e-6)


def test_functions_that_cannot_be_pickled_say_so(data):
    twice = lambda x: 2 * x  # noqa: E731
    _, labels = mj.build_design("y ~ twice(x) + np.log(x) + (1 | g)", data, context={"twice": twice, "np": np})
    again = pickle.loads(pickle.dumps(labels))
    with pytest.raises(mj.FormulaError, match="'twice' was not stored"):
        again.state.fixed.of(data)


# --- kinds of values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formula", ["y ~ x:flag + (1 | g)", "y ~ 0 + flag + (1 | g)", "y ~ flag * x + (0 + flag | g)"])
@pytest.mark.parametrize("kind", ["bool", "boolean", "bool[pyarrow]", "object"])
def test_truth_values_are_a_factor_of_two_levels(formula, kind, data):
    text = data.assign(flag=np.where(data.flag, "yes", "no"))
    own, labels = mj.build_design(formula, data.astype({"flag": kind}))
    right, names = mj.build_design(formula, text)
    same(own.X, right.X)
    same(own.terms[0].Z, right.terms[0].Z)
    assert [n.replace("False", "no").replace("True", "yes") for n in labels.fixed] == list(names.fixed)


def test_conditions_are_factors_and_numbers_in_arithmetic(data):
    assert list(X_of("y ~ I(x > 1) + (1 | g)", data)) == ["Intercept", "I(x > 1)[T.True]"]
    same(X_of("y ~ I((x > 1) * z) + (1 | g)", data).iloc[:, 1], (data.x > 1) * data.z)
    same(mj.build_design("flag ~ x + (1 | g)", data)[0].y, data.flag)
    same(mj.build_design("I(x > 1) ~ z + (1 | g)", data)[0].y, data.x > 1)


NUMBERS = ["int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "Int8", "UInt16", "float32", ">i2", ">f8"]
NUMBERS += ["int8[pyarrow]", "uint64[pyarrow]", "double[pyarrow]"]


@given(
    st.sampled_from(NUMBERS),
    st.sampled_from(["k * a", "I(k^2 * a^3)", "k:a + I(a - k)", "poly(k, 2, raw=True)", "I(-k) + I(k ** 9)"]),
)
@settings(max_examples=60, deadline=None)
def test_numbers_of_any_type_are_numbers(kind, text):
    rng = np.random.default_rng(2)
    frame = pd.DataFrame(
        {"y": rng.normal(size=N), "g": np.arange(N) % 9, "k": rng.integers(1, 90, N), "a": rng.integers(1, 60, N)}
    )
    small = frame.astype({"k": kind, "a": kind})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mj.DataWarning)  # columns of very different size
        same(
            X_of(f"y ~ {text} + (1 | g)", small), X_of(f"y ~ {text} + (1 | g)", frame.astype({"k": float, "a": float}))
        )


@pytest.mark.parametrize("kind", ["string", "string[pyarrow]", "object", "category", "str"])
def test_codes_of_text_are_a_factor(kind, data):
    table = data.assign(code=np.tile(list("123"), 20))
    assert list(X_of("y ~ code + (1 | g)", table.astype({"code": kind}))) == ["Intercept", "code[T.2]", "code[T.3]"]


DAY = datetime.date(2024, 1, 1)
DATES = {
    "date": [DAY + datetime.timedelta(int(i)) for i in range(N)],
    "Timestamp": pd.Series(pd.date_range("2024", periods=N)).astype(object),
    "datetime64": pd.date_range("2024", periods=N),
    "timedelta": [datetime.timedelta(int(i)) for i in range(N)],
    "timedelta64": pd.to_timedelta(np.arange(N), unit="h"),
    "period": pd.period_range("2024", periods=N, freq="D"),
    "time": [datetime.time(i % 24) for i in range(N)],
    "date32": pd.Series([DAY + datetime.timedelta(int(i)) for i in range(N)]).astype("date32[pyarrow]"),
}


@pytest.mark.parametrize("kind", DATES)
def test_dates_are_refused_wherever_numbers_are_needed(kind, data):
    table = data.assign(day=DATES[kind])
    for formula in (
        "y ~ day + (1 | g)",
        "y ~ x + (day | g)",
        "day ~ x + (1 | g)",
        "y ~ x + offset(day) + (1 | g)",
        "y ~ I(day * 2) + (1 | g)",
    ):
        with pytest.raises(mj.DataError, match="day"):
            mj.build_design(formula, table)
    for option in ("weights", "offset"):
        with pytest.raises(mj.DataError, match=option):
            mj.build_design("y ~ x + (1 | g)", table, **{option: "day"})


def test_results_that_are_no_numbers_are_refused(data):
    table = data.assign(s=data.f + "_x")
    with pytest.raises(mj.DataError, match="datetime64"):
        mj.build_design("y ~ pd.to_datetime(k) + (1 | g)", data, context={"pd": pd})
    with pytest.raises(mj.DataError, match="complex"):
        mj.build_design("y ~ np.emath.sqrt(z) + (1 | g)", data, context={"np": np})
    assert list(X_of("y ~ s.str.upper() + (1 | g)", table)) == [
        "Intercept", "s.str.upper()[T.B_X]", "s.str.upper()[T.C_X]"]  # fmt: skip


@pytest.mark.parametrize(
    "fixed", ["x + f", "x * f", "0 + f:x", "x + (f | g)", "C(k > 0)", "C(f, levels=['b', 'a', 'c'])"]
)
def test_a_factor_of_one_level_is_named(fixed, data):
    with pytest.raises(mj.DataError, match=r"one level"):
        mj.build_design(f"y ~ {fixed} + (1 | g)", data, subset=data.f == "a")


# --- new tables ----------------------------------------------------------------------------------------------------


def test_expressions_of_new_tables_know_their_categories(data):
    _, labels = mj.build_design("y ~ C(np.log2(2 * k)) + f.str.upper() + I(x > 1) + (1 | g)", data, context={"np": np})
    part = labels.state.fixed
    frame = data.astype({"k": float})
    same(
        part.of(frame.iloc[[4]]),
        X_of("y ~ C(np.log2(2 * k)) + f.str.upper() + I(x > 1) + (1 | g)", data, context={"np": np}).iloc[[4]],
    )
    with pytest.raises(mj.DataError, match=r"log2.*not among the categories of the fit"):
        part.of(frame.iloc[[0, 1]].assign(k=1000.0))
    with pytest.raises(mj.DataError, match=r"'D'.*not among the categories"):
        part.of(frame.iloc[[0, 1]].assign(f="d"))


def test_levels_made_of_dates_are_found_again(data):
    day = pd.Timestamp("2024-05-01") + pd.to_timedelta(data.g, unit="D")
    for column in (day, day.astype("category"), day.dt.date, day.astype("datetime64[s]"), data.g.astype("float32")):
        table = data.assign(day=column.to_numpy() if column.dtype == object else column)
        design, labels = mj.build_design("y ~ x + (1 | day/f)", table)
        rows = new_rows(labels, table.iloc[::-1], [True, True], [True, True])
        for term, level in zip(design.terms, rows.level, strict=True):
            np.testing.assert_array_equal(level, term.group[::-1])


# --- means of factors that the formula makes -----------------------------------------------------------------------


@pytest.mark.parametrize("factor", ["C(np.log2(dose))", "C(2 * dose)", "factor(dose)"])
def test_means_average_over_factors_made_in_the_formula(factor, data):
    table = data.assign(dose=np.array([1, 2, 4, 8])[data.k % 4])
    right = mj.lmm("y ~ C(dose) + f + (1 | g)", table).emmeans("f", ddf="wald").to_frame()["estimate"]
    got = mj.lmm(f"y ~ {factor} + f + (1 | g)", table).emmeans("f", ddf="wald").to_frame()["estimate"]
    np.testing.assert_allclose(got, right, rtol=1e-7)


def test_means_over_a_condition_weigh_its_two_sides_alike(data):
    fit = mj.lmm("y ~ I(x > 1) + f + (1 | g)", data)
    beta = fit.fixef
    right = beta["Intercept"] + beta["I(x > 1)[T.True]"] / 2 + np.array([0, beta["f[T.b]"], beta["f[T.c]"]])
    np.testing.assert_allclose(fit.emmeans("f", ddf="wald").to_frame()["estimate"], right, rtol=1e-10)
    with pytest.raises(mj.DataError, match="makes the factor"):
        fit.emmeans("x")
    both = mj.lmm("y ~ I(x > 1) + x + f + (1 | g)", data)
    with pytest.raises(mj.DataError, match="make a column of the factor"):
        both.emmeans("f")


def test_every_expression_is_compiled_from_its_own_code(data):
    parsed = parse("y ~ log(x) + (1 | g)", list(data))
    context = resolve(parsed.predictors, {}, True, lambda name, where: pytest.fail(name))
    X, _ = columns_of(parsed.fixed, data, context)
    same(X[:, 1], np.log(data.x))
    assert expression("f(x, y=2) ** `a b`", ["x"]).code == "f(__c0__, y=2) ** __c1__"


def test_means_of_dotted_and_blank_names(data):
    plain = mj.lmm("y ~ f + z + (1 | g)", data).emmeans("f", ddf="wald").to_frame()["estimate"]
    own = mj.lmm("y ~ blood.type + `my z` + (1 | g)", data.rename(columns={"f": "blood.type", "z": "my z"}))
    np.testing.assert_allclose(own.emmeans("blood.type", ddf="wald").to_frame()["estimate"], plain, rtol=1e-10)
    slope = own.emtrends("1", "my z", ddf="wald").to_frame()["estimate"].iloc[0]
    assert slope == pytest.approx(own.fixef["my z"], rel=1e-9)


def test_without_fixed_effects_there_are_no_means(data):
    fit = mj.lmm("y ~ 0 + (1 | g)", data)
    with pytest.raises(mj.DataError, match="no fixed effects"):
        fit.emmeans("1")


def test_rows_of_a_fit_that_left_columns_out_are_estimable(data):
    """Also rows of zeros, in which rounding is all that the columns left out have."""
    table = data.assign(x=np.arange(N) % 5.0).assign(twice=lambda d: 2 * d.x)
    with pytest.warns(mj.DataWarning, match="twice"):
        _, labels = mj.build_design("y ~ x + twice + (1 | g)", table)
    assert new_rows(labels, table, [True], [True]).estimable.all()


def test_one_random_term_needs_no_brackets(data):
    own, labels = mj.build_design("y ~ 1|g", data)
    right = mj.build_design("y ~ 1 + (1 | g)", data)[0]
    same(own.X, right.X)
    assert [term.effects for term in labels.terms] == [("Intercept",)]
    same(X_of("y ~ poly(x, 2, raw=TRUE) + (1 | g)", data).iloc[:, 1:], np.column_stack([data.x, data.x**2]))


def test_names_of_the_reader_itself_are_no_columns():
    """``__c0__`` stands for the first column of an expression, and never for one that a user means."""
    data = pd.DataFrame({"y": np.arange(8.0) ** 2 % 5, "x": np.arange(8.0), "g": list("aabbccdd")})
    for formula in ("y ~ __c0__ + (1 | g)", "y ~ I(__c0__ + x) + (1 | g)", "y ~ x + (__c1__ | g)"):
        with pytest.raises(mj.FormulaError, match=r"no column '__c.__'; a column of that name takes backticks"):
            mj.build_design(formula, data)
    named = data.rename(columns={"x": "__c0__"})
    for formula in ("y ~ `__c0__` + (1 | g)", "y ~ __c0__ + (1 | g)", "y ~ I(__c0__ + 0) + (1 | g)"):
        np.testing.assert_array_equal(mj.build_design(formula, named)[0].X[:, 1], data["x"])
