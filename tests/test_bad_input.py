"""Bad input: each gets a clear error that names the culprit."""

import jax
import numpy as np
import pandas as pd
import polars as pl
import pytest
from conftest import table

import mixjax as mj

FORMULA = "Reaction ~ Days + (Days | Subject)"


def sleep(**columns):
    return table("sleepstudy").assign(**columns)


CASES = {
    "unknown column": ("Reaction ~ days + (1 | Subject)", {}, "no column 'days'.*did you mean 'Days'"),
    "unknown response": ("reaction ~ Days + (1 | Subject)", {}, "no column 'reaction'"),
    "unknown group": ("Reaction ~ Days + (1 | subject)", {}, "no column 'subject' \\(grouping factor 'subject'\\)"),
    "unknown slope": ("Reaction ~ Days + (dayz | Subject)", {}, "no column 'dayz'"),
    "unknown function": ("Reaction ~ nofunction(Days) + (1 | Subject)", {}, "nofunction"),
    "no random term": ("Reaction ~ Days", {}, "no random term.*ordinary regression"),
    "unbalanced parenthesis": ("Reaction ~ Days + (Days | Subject", {}, "never closed"),
    "bad fixed effects": ("Reaction ~ Days + * Days + (1 | Subject)", {}, "not understood"),
    "response not numeric": ("name ~ Days + (1 | Subject)", {"name": "a"}, "'name' is not numeric"),
    "response is a factor": ("Subject ~ Days + (1 | Subject)", {}, "'Subject' is not numeric"),
    "constant response": ("flat ~ Days + (1 | Subject)", {"flat": 3.0}, "'flat' is constant"),
    "response made of X": ("line ~ Days + (1 | Subject)", {"line": lambda d: 1 + 2 * d.Days}, "'line' exactly"),
    "one level": ("Reaction ~ Days + (1 | one)", {"one": "x"}, "'one' has one level"),
    "a group per row": ("Reaction ~ Days + (1 | row)", {"row": range(180)}, "180 rows and 180 random effects"),
    "inf in response": ("y ~ Days + (1 | Subject)", {"y": lambda d: np.where(d.Days == 1, np.inf, d.Reaction)},
                        "'y' has 18 infinite values \\(first in row 1\\)"),
    "inf in a column": ("Reaction ~ x + (1 | Subject)", {"x": lambda d: 1 / d.Days}, "'x' has 18 infinite"),
    "inf from a transform": ("Reaction ~ log(Days) + (1 | Subject)", {}, "'log\\(Days\\)' is not finite in 18 rows"),
    "all rows missing": ("Reaction ~ gone + (1 | Subject)", {"gone": np.nan}, "all 180 rows.*'gone'"),
    "redundant random effects": ("Reaction ~ Days + (Days + twice | Subject)", {"twice": lambda d: 2 * d.Days},
                                 "of 'Subject' cannot be told apart.*twice"),
    "an effect twice": ("Reaction ~ Days + (1 | Subject) + (Days | Subject)", {}, "'Intercept' of group 'Subject'"),
    "one grouping under two names": ("Reaction ~ Days + (1 | Subject) + (1 | other)", {"other": lambda d: d.Subject},
                                     "'Intercept' of group 'Subject' and 'other' stands in two random terms"),
    "dates": ("Reaction ~ when + (1 | Subject)", {"when": lambda d: pd.to_datetime(d.Days, unit="D")},
              "'when' holds datetime64.* values; make numbers of them first"),
    "fixed and random": ("Reaction ~ Subject + (1 | Subject)", {}, "hold 'Intercept' of every level of 'Subject'"),
    "fixed and random slopes": ("Reaction ~ Subject*Days + (0 + Days | Subject)", {}, "hold 'Days' of every level"),
    "R function": ("Reaction ~ ns(Days, 3) + (1 | Subject)", {}, r"use cr\(x, df=...\)"),
    "more columns than rows": ("Reaction ~ 0 + C(row) + (1 | Subject)", {"row": range(180)}, "exactly|for 180 rows"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:divide by zero")
@pytest.mark.parametrize(("formula", "columns", "message"), CASES.values(), ids=CASES.keys())
def test_formula_and_columns(formula, columns, message):
    with pytest.raises(ValueError, match=message) as caught:
        mj.lmm(formula, sleep(**columns))
    assert isinstance(caught.value, mj.FormulaError | mj.DataError)


ARGUMENTS = {
    "weights name": ({"weights": "nope"}, "no column 'nope' \\(weights=\\)"),
    "zero weight": ({"weights": np.r_[0.0, np.ones(179)]}, "weights must be positive, but 1 of 180"),
    "negative weights": ({"weights": -np.ones(180)}, "weights must be positive, but 180 of 180"),
    "weights of wrong length": ({"weights": np.ones(3)}, "weights has shape \\(3,\\), but the table has 180 rows"),
    "weights not numbers": ({"weights": np.array(["a"] * 180)}, "weights must be numbers"),
    "offset of wrong length": ({"offset": np.ones(181)}, "offset has shape \\(181,\\)"),
    "offset name": ({"offset": "nope"}, "no column 'nope' \\(offset=\\)"),
    "subset length": ({"subset": np.ones(4, bool)}, r"subset has shape \(4,\), but the table has 180 rows"),
    "subset empty": ({"subset": np.zeros(180, bool)}, "subset leaves no rows"),
    "subset expression": ({"subset": "Dayz > 1"}, "subset 'Dayz > 1' cannot be evaluated"),
    "contrasts name": ({"contrasts": {"Subject": "summ"}}, "must be one of treatment, SAS, sum.*got 'summ'"),
    "contrasts array": ({"contrasts": {"Subject": np.eye(2)}}, "must be one of treatment"),
    "contrasts of a number": ({"contrasts": {"Days": "sum"}}, "'Days', which is numeric"),
    "contrasts column": ({"contrasts": {"nope": "sum"}}, "no column 'nope' \\(contrasts=\\)"),
}


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS.values(), ids=ARGUMENTS.keys())
def test_arguments(arguments, message):
    with pytest.raises(mj.DataError, match=message):
        mj.lmm(FORMULA, table("sleepstudy"), **arguments)


def test_empty_table():
    with pytest.raises(mj.DataError, match="no rows"):
        mj.lmm(FORMULA, table("sleepstudy").iloc[:0])


def test_not_a_table():
    with pytest.raises(mj.DataError, match="got int"):
        mj.lmm(FORMULA, 3)


def test_dict_columns_of_different_length():
    with pytest.raises(mj.DataError, match="different length"):
        mj.lmm("y ~ 1 + (1 | g)", {"y": [1.0, 2.0], "g": ["a"]})


def test_column_with_two_dimensions():
    with pytest.raises(mj.DataError, match="column 'y' has shape"):
        mj.lmm("y ~ 1 + (1 | g)", {"y": np.ones((2, 2)), "g": ["a", "b"]})


def test_columns_of_the_same_name():
    frame = pd.concat([table("sleepstudy"), table("sleepstudy")[["Days"]]], axis=1)
    with pytest.raises(mj.DataError, match="more than one column named 'Days'"):
        mj.lmm(FORMULA, frame)


def test_as_many_effects_as_rows_can_be_fitted_on_request():
    data = sleep(row=range(180)).iloc[:60]
    with pytest.raises(mj.DataError, match="check_identifiable=False"):
        mj.lmm("Reaction ~ Days + (1 | row)", data)
    fit = mj.lmm("Reaction ~ Days + (1 | row)", data, check_identifiable=False)
    total = fit.sigma**2 + fit.Sigma["row"][0, 0]  # only the sum is identified
    residual = data.Reaction - np.polyval(np.polyfit(data.Days, data.Reaction, 1), data.Days)
    np.testing.assert_allclose(total, (residual**2).sum() / 58, rtol=1e-6)


# --- numbers that are text -----------------------------------------------------------------------------------------

NUMBERS = np.random.default_rng(0).normal(size=180).round(3)


def text_of(values, **changes):
    """Numbers as a csv reader leaves them where a cell is none."""
    text = [str(value) for value in values]
    for row, value in changes.items():
        text[int(row.removeprefix("row"))] = value
    return text


TEXT = {
    "a cell": (text_of(NUMBERS, row5="n/a?"),
               r"column 'x' holds text in 1 of 180 rows \(first: row 5: 'n/a\?'\), all others are numbers: mend the "
               r"table, or use pandas.to_numeric\(..., errors='coerce'\).*if its values are names, make it a category"),
    "cells and missing ones": (text_of(NUMBERS, row3=None, row7="-", row9="-"),
                               r"text in 2 of 180 rows \(first: row 7: '-'\), all others are numbers or missing"),
    "an empty cell": (text_of(NUMBERS, row2=""), "1 of 180 rows \\(first: row 2: ''"),
    "one comma": (text_of(NUMBERS, row4="0,5"), "1 of 180 rows \\(first: row 4: '0,5'"),
    "decimal commas": ([str(v).replace(".", ",") for v in NUMBERS], r"column 'x' holds numbers with decimal commas "
                       r"\(first: row 0: '0,126'\): read the file with pandas.read_csv\(..., decimal=','\)"),
    "decimal commas among whole numbers": (text_of(range(180), row4="0,5"), "decimal commas \\(first: row 4: '0,5'"),
    "decimal commas after thousands": (["1.234,5", *(f"{v},5" for v in range(179))], "decimal commas.*'1.234,5'"),
    "thousands": ([f"{v:,}" for v in range(900, 1080)],
                  r"numbers with commas \(first: row 100: '1,000'\).*thousands=','"),
}  # fmt: skip
MAKES = {"pandas": lambda f: f, "polars": pl.from_pandas, "dict": lambda f: f.to_dict("list")}


@pytest.mark.parametrize("make", MAKES.values(), ids=MAKES.keys())
@pytest.mark.parametrize(("x", "message"), TEXT.values(), ids=TEXT.keys())
def test_text_among_numbers_is_named(x, message, make):
    with pytest.raises(mj.DataError, match=message):
        mj.build_design("Reaction ~ x + (1 | Subject)", make(sleep(x=x)))


@pytest.mark.parametrize(
    "formula", ["Reaction ~ Days + x + (x | Subject)", "Reaction ~ Days + (x | Subject)",
                "Reaction ~ I(x > 0) + (1 | Subject)", "log(x) ~ Days + (1 | Subject)",
                "Reaction ~ Days + offset(2 * x) + (1 | Subject)"],
)  # fmt: skip
def test_text_among_numbers_is_named_wherever_it_is_read(formula):
    with pytest.raises(
        mj.DataError, match=r"column 'x' holds text in 1 of 180 rows \(first: row 5: 'n/a\?'\)"
    ) as caught:
        mj.lmm(formula, sleep(x=TEXT["a cell"][0]))
    assert len(str(caught.value)) < 300


def test_text_that_names_things_is_a_factor(recwarn):
    names = text_of(NUMBERS, row5="n/a?")
    expected = len(set(names))
    for formula, x in (("C(x)", names), ("factor(x)", names), ("x", pd.Categorical(names))):
        assert mj.build_design(f"Reaction ~ 0 + {formula} + (1 | Subject)", sleep(x=x))[0].X.shape[1] == expected
    by_contrasts = names[:80] * 3
    mj.build_design("Reaction ~ x + (1 | Subject)", sleep(x=by_contrasts[:180]), contrasts={"x": "sum"})
    mj.build_design("Reaction ~ Days + (1 | x)", sleep(x=names))  # only a grouping factor
    mj.build_design("Reaction ~ x + (1 | Subject)", sleep(x=text_of(np.arange(180) % 4)))  # codes
    mj.build_design("Reaction ~ x + (1 | Subject)", sleep(x=[f"id{i % 30}" for i in range(180)]))
    mj.build_design("Reaction ~ I(x == '3') + (1 | Subject)", sleep(x=text_of(np.arange(180) % 30)))
    assert not recwarn.list


def test_many_numbers_as_text_are_a_factor_with_a_warning():
    data = sleep(x=text_of(np.arange(180) % 30))
    for formula in ("Reaction ~ x + (x | half)", "Reaction ~ x + (1 | half)"):
        data["half"] = np.arange(180) // 90
        with pytest.warns(
            mj.DataWarning, match=r"'x' holds numbers as text.*factor with 30 levels.*to_numeric"
        ) as caught:
            mj.build_design(formula, data)
        assert len([w for w in caught if "numbers as text" in str(w.message)]) == 1


@pytest.mark.parametrize(
    ("y", "message"),
    [
        (
            TEXT["a cell"][0],
            r"the response 'y' is not numeric: it holds text in 1 of 180 rows \(first: row 5: 'n/a\?'\)",
        ),
        (TEXT["decimal commas"][0], r"the response 'y' is not numeric: it holds numbers with decimal commas"),
        (text_of(NUMBERS), r"it holds numbers as text \(first: row 0: '0.126'\): use pandas.to_numeric"),
        (["yes", "no"] * 90, r"it holds text \(first: row 0: 'yes'\): make numbers of it first"),
        (pd.Categorical(["yes", "no"] * 90), "it holds category values"),
    ],
)
def test_response_of_text(y, message):
    with pytest.raises(mj.DataError, match=message):
        mj.build_design("y ~ Days + (1 | Subject)", sleep(y=y))


def test_functions_of_text_say_that_it_is_text():
    with pytest.raises(mj.FormulaError, match=r"log\(x\).*column 'x' holds numbers as text \(first: row 0: '0.126'\)"):
        mj.build_design("Reaction ~ log(x) + (1 | Subject)", sleep(x=text_of(NUMBERS)))


@pytest.mark.parametrize("bad", [0, 1], ids=["first", "later"])
def test_text_among_numbers_in_chunks(bad):
    data = sleep(x=NUMBERS)
    chunks = [data[:90], data[90:]]
    chunks[bad] = chunks[bad].assign(x=text_of(chunks[bad]["x"], row5="n/a?"))
    with pytest.raises(mj.DataError, match=rf"'x' holds text in 1 of 90 rows \(first: row {90 * bad + 5}: 'n/a\?'\)"):
        mj.cross_products_from(chunks, "Reaction ~ x + (1 | Subject)")


def test_long_terms_are_shortened():
    data = sleep(x=[f"id{i % 20}" for i in range(180)])
    with pytest.raises(mj.DataError, match=r"term \(Intercept \+ x\[T.id1\] \+ .* and 15 more \| Subject\)") as caught:
        mj.lmm("Reaction ~ Days + (x | Subject)", data)
    assert "id15" not in str(caught.value)


# --- random slopes that do not vary ---------------------------------------------------------------------------------


def between():
    """Columns that are one value per subject: two, three and many distinct ones."""
    subject = np.arange(180) // 10
    return sleep(drug=np.array(["a", "b"])[subject % 2], dose=np.array(["low", "mid", "high"])[subject % 3],
                 age=20.0 + subject)  # fmt: skip


CONSTANT = {
    "(drug | Subject)": r"the effect 'drug\[T.b\]' of \(drug \| Subject\) does not vary within any level of 'Subject': "
    "its variance and correlation cannot all be told from those of the other effects; a random slope needs values that",
    "(Days + drug | Subject)": r"the effect 'drug\[T.b\]' of \(Days \+ drug \| Subject\)",
    "(0 + drug | Subject)": r"the effects 'drug\[a\]', 'drug\[b\]' .* and correlations cannot all be told apart",
    "(dose | Subject)": r"the effects 'dose\[T.low\]', 'dose\[T.mid\]' of",
    "(age | Subject)": "the effect 'age' of .* show only in how the variance between levels changes with the values",
}


@pytest.mark.parametrize(("term", "message"), CONSTANT.items(), ids=CONSTANT.keys())
def test_slopes_that_do_not_vary_within_levels(term, message):
    with pytest.warns(mj.DataWarning, match=message) as caught:
        mj.build_design(f"Reaction ~ Days + {term}", between())
    assert len(caught) == 1


@pytest.mark.parametrize(
    "term",
    ["(Days | Subject)", "(0 + age | Subject)", "(age || Subject)", "(0 + Days + age | Subject)",
     "(Days:drug | Subject)", "(drug | dose)", "diag(drug | Subject)", "(1 + drug | row)"],
)  # fmt: skip
def test_slopes_that_can_be_estimated_are_not_warned_of(term, recwarn):
    mj.build_design(f"Reaction ~ Days + {term}", between().assign(row=range(180)))
    assert not recwarn.list


def test_one_level_in_which_a_slope_varies_is_enough(recwarn):
    data = between()
    data.loc[0, "drug"] = "b"
    mj.build_design("Reaction ~ Days + (drug | Subject)", data)
    assert not recwarn.list


# --- names and single values ----------------------------------------------------------------------------------------


def test_names_in_another_case_are_suggested():
    data = sleep().rename(columns={"Reaction": "rt", "Days": "P01"})
    for formula, right in (("RT ~ P01 + (1 | Subject)", "rt"), ("rt ~ p01 + (1 | Subject)", "P01"),
                           ("rt ~ P01 + (1 | SUBJEKT)", "Subject")):  # fmt: skip
        with pytest.raises(mj.DataError, match=f"did you mean '{right}'\\?"):
            mj.build_design(formula, data)


def test_single_values_make_no_table_to_fit():
    with pytest.raises(mj.DataError, match=r"the table has one row.*dict of single values"):
        mj.lmm("y ~ x + (1 | g)", {"y": 1.0, "x": 2.0, "g": "a"})
    with pytest.raises(mj.DataError, match="the response 'y' is constant"):
        mj.lmm("y ~ x + (1 | g)", {"y": 1.0, "x": [2.0, 3.0], "g": ["a", "b"]})
    with pytest.raises(mj.DataError, match="different length"):
        mj.lmm("y ~ x + (1 | g)", {"y": [1.0, 2.0, 3.0], "x": [2.0, 3.0], "g": "a"})


# --- arrays --------------------------------------------------------------------------------------------------------


def arrays(**changes):
    term = {"Z": np.ones((6, 1)), "group": np.repeat([0, 1, 2], 2), "n_groups": 3} | changes.pop("term", {})
    return mj.Design(**({"y": np.arange(6.0), "X": np.ones((6, 1)), "terms": (mj.RandomTerm(**term),)} | changes))


DESIGNS = {
    "no terms": ({"terms": ()}, "no random term"),
    "X not a matrix": ({"X": np.ones(6)}, "X must be"),
    "y of wrong length": ({"y": np.ones(5)}, "y has shape \\(5,\\), but X has 6 rows"),
    "Z not a matrix": ({"term": {"Z": np.ones(6)}}, r"terms\[0\].Z must be"),
    "group of wrong length": ({"term": {"group": np.zeros(5, int)}}, r"terms\[0\].group has shape"),
    "group out of range": ({"term": {"n_groups": 2}}, "runs from 0 to 2; with n_groups=2"),
    "group not integer": ({"term": {"group": np.zeros(6)}}, "must be integers"),
    "weights not positive": ({"weights": np.zeros(6)}, "weights must be positive"),
    "nan": ({"y": np.array([1, 2, 3, 4, 5, np.nan])}, "y has missing or infinite"),
    "y of two dimensions": ({"y": np.ones((6, 1))}, "y has shape \\(6, 1\\); it must be one-dimensional"),
    "a bare term": ({"terms": mj.RandomTerm(np.ones((6, 1)), np.zeros(6, int), 1)}, "write terms=\\(term,\\)"),
    "complex": ({"y": np.arange(6.0) + 1j}, "y is complex"),
    "no rows": ({"X": np.ones((0, 1)), "y": np.ones(0)}, "no rows"),
}


@pytest.mark.parametrize(("changes", "message"), DESIGNS.values(), ids=DESIGNS.keys())
def test_designs_from_arrays(changes, message):
    with pytest.raises(ValueError, match=message):
        mj.cross_products(arrays(**changes))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"reml": "ML"}, "reml must be True"),
        ({"optimizer": "bobyqa"}, "optax GradientTransformation"),
        ({"start": [np.nan, 0, 1]}, "start must be finite"),
    ],
)
def test_options(arguments, message):
    with pytest.raises(ValueError, match=message):
        mj.lmm(FORMULA, table("sleepstudy"), **arguments)


def test_index_levels_are_not_columns():
    with pytest.raises(mj.DataError, match=r"'Days'.*level of the index.*reset_index"):
        mj.lmm(FORMULA, table("sleepstudy").set_index(["Subject", "Days"]))


def test_a_design_is_not_its_cross_products():
    for call in (mj.estimate, lambda d: mj.criterion(np.ones(1), d)):
        with pytest.raises(TypeError, match=r"pass mixjax\.cross_products"):
            call(arrays())


def test_parameters_of_the_wrong_shape():
    good = mj.MarginalParams(beta=np.zeros(1), log_sigma=np.array(0.0), chol=(np.zeros(1),))
    for bad in ({"beta": np.array(0.0)}, {"log_sigma": np.zeros(1)}, {"chol": (np.zeros(3),)}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} has shape"):
            mj.marginal_loglik(good._replace(**bad), arrays())


def test_adding_inside_jit_is_refused_and_sum_works():
    stats = mj.cross_products(arrays())
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(lambda a, b: (a + b).XX)(stats, stats)
    assert float(sum([stats, stats]).n) == 12.0


def test_collinear_columns_are_a_code_never_an_estimate():
    X = np.column_stack([np.ones(6), np.arange(6.0), 2 * np.arange(6.0)])
    design = arrays(X=X, y=np.array([1.0, 3.0, 2.0, 5.0, 4.0, 9.0]))
    with jax.enable_x64(True):
        for run in (lambda d: mj.estimate(mj.cross_products(d)), jax.jit(lambda d: mj.estimate(mj.cross_products(d)))):
            est = run(design)
            assert not bool(est.converged)
            assert int(est.result) == mj.Result.NOT_FINITE


def test_a_refit_to_one_value_is_refused():
    """Also without an intercept, which would reproduce it."""
    data = table("sleepstudy")
    fit = mj.lmm("Reaction ~ 0 + Days + (Days | Subject)", data)
    with pytest.raises(mj.DataError, match=r"the response 'Reaction' is constant \(3\)"):
        fit.refit(np.full(180, 3.0))


@pytest.mark.parametrize("fit", [mj.lmm, mj.mmrm, mj.build_design, lambda *a: mj.glmm(*a, family="poisson")])
def test_a_table_before_the_formula(fit):
    data = pd.DataFrame({"y": [1, 2, 3], "g": list("aab")})
    with pytest.raises(mj.FormulaError, match="comes before the table, got DataFrame"):
        fit(data, "y ~ 1 + (1 | g)")


@pytest.mark.parametrize("fit", [mj.lmm, lambda *a: mj.glmm(*a, family="poisson")])
@pytest.mark.parametrize(
    ("data", "what"),
    [
        ([1, 2, 3], "list of int"),
        (("y", "g"), "tuple of str"),
        ([{"y": 1, "g": "a"}, {"y": 2, "g": "b"}], "list of dict"),
    ],
)
def test_lists_that_are_no_tables(fit, data, what):
    with pytest.raises(mj.DataError, match=f"a {what} is no table: pandas.DataFrame"):
        fit("y ~ 1 + (1 | g)", data)


def test_columns_that_the_fixed_effects_do_not_have():
    data = pd.DataFrame({"y": np.arange(12.0) ** 2, "x": list("ab") * 6, "z": 1.0, "g": list("aabbccaabbcc")})
    fit = mj.lmm("y ~ x + (1 | g)", data)
    with pytest.raises(mj.DataError, match=r"the fixed effects have no column 'z' \(spec\); columns: x"):
        fit.emmeans("z")
