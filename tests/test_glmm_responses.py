"""From a table and a formula to the response of a generalised linear mixed model: y, size, weights, names."""

import datetime
import pickle
import warnings

import jax
import numpy as np
import pandas as pd
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mixjax as mj
from mixjax.checks import DataWarning, warn
from mixjax.formula.build import build
from mixjax.formula.checks import check_identifiable
from mixjax.formula.state import new_rows


class Stand:
    """A family as far as formulas know one: its name, and what it says of impossible values."""

    link = "log"

    def __init__(self, name):
        self.name = name

    def check(self, y, size, name):
        assert y.dtype == np.float64
        self.seen = (y, size, name)
        if (y < 0).any():
            raise mj.DataError(f"{name}: cannot be negative")
        if self.name == "binomial" and (y != np.round(y)).any():
            warn(f"{name}: not whole")


BINOMIAL = Stand("binomial")


def trials(seed=0, n=24):
    """Successes and failures of up to six trials a row, in four groups."""
    rng = np.random.default_rng(seed)
    size = rng.integers(1, 7, n)
    s = rng.binomial(size, 0.5)
    return pd.DataFrame({
        "g": np.resize(list("abcd"), n), "x": rng.normal(size=n), "s": s, "f": size - s, "n": size, "p": s / size,
    })  # fmt: skip


def single(seed=0, n=24):
    """The same outcome of single trials in every guise."""
    rng = np.random.default_rng(seed)
    y = rng.permutation(np.resize([0, 1, 1], n))
    return pd.DataFrame({
        "g": np.resize(list("abcd"), n), "x": rng.normal(size=n), "y": y, "real": y * 1.0, "flag": y == 1,
        "text": np.array(["no", "yes"])[y], "cured": pd.Categorical(np.array(["no", "a cure"])[y], ["no", "a cure"]),
        "code": pd.Categorical(y), "none": 1 - y, "z": y * 2.0 - 1, "two": y + 1, "digits": y.astype(str),
    })  # fmt: skip


def read(formula, data, family=BINOMIAL, **options):
    return mj.build_design(formula, data, family=family, context={}, **options)


def response_of(left, data, **options):
    return read(f"{left} ~ x + (1 | g)", data, **options)


# --- all kinds mean the same -------------------------------------------------------------------------------------


TRIALS = {
    "counts and failures": ("cbind(s, f)", {}),
    "computed failures": ("cbind(s, n - s)", {}),
    "named": ("cbind(won = s, lost = f)", {}),
    "in brackets": ("(cbind(s, f))", {}),
    "counts and sizes": ("s", {"size": "n"}),
    "sizes as an array": ("s", {"size": lambda d: d.n.to_numpy()}),
    "sizes as a series": ("s", {"size": lambda d: d.n[::-1]}),
    "proportions, weights": ("p", {"weights": "n"}),
    "proportions, weights as an array": ("p", {"weights": lambda d: d.n.to_numpy(float)}),
    "proportions, sizes": ("p", {"size": "n"}),
    "a ratio, weights": ("s / n", {"weights": "n"}),
    "a ratio, sizes": ("s / n", {"size": "n"}),
    "a ratio in I()": ("I(s / n)", {"size": "n"}),
}


@pytest.mark.parametrize(("left", "options"), TRIALS.values(), ids=TRIALS.keys())
def test_trials(left, options):
    success = {
        ("cbind(s, f)", None): "'s' (failures: 'f')",
        ("cbind(s, n - s)", None): "'s' (failures: 'n - s')",
        ("s", "n"): "'s' of 'n' trials",
        ("s", None): "'s' of size= trials",
        ("s / n", "n"): "'s / n' as a proportion of 'n' trials",
    }
    data = trials()
    named = "n" if "n" in options.values() else None
    options = {name: value(data) if callable(value) else value for name, value in options.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        design, labels = response_of(left, data, **options)
    assert (design.y == data.s).all()
    assert (design.size == data.n).all()
    assert (design.y.dtype, design.size.dtype) == (np.float64, np.float64)
    assert design.weights is None
    assert labels.state.size == named
    assert labels.state.weights is None
    assert labels.success == success.get((left, named), labels.success)
    assert labels.success.endswith(" trials" if options else ")")
    mj.design.check_design(design)


SINGLE = {
    "integers": ("y", "'y' is 1"),
    "floats": ("real", "'real' is 1"),
    "truth values": ("flag", "'flag' is True"),
    "text": ("text", "'text' is yes (failure: no)"),
    "categories in their order": ("cured", "'cured' is a cure (failure: no)"),
    "categories of numbers": ("code", "'code' is 1 (failure: 0)"),
    "text of digits": ("digits", "'digits' is 1 (failure: 0)"),
    "a condition": ("I(z > 0)", "'I(z > 0)' is True"),
    "a bare condition": ("z > 0", "'z > 0' is True"),
    "equality": ("I(two == 2)", "'I(two == 2)' is True"),
    "a factor": ("factor(two)", "'C(two)' is 2 (failure: 1)"),
    "a factor with its levels": (
        "C(text, levels=['no', 'yes'])",
        "'C(text, levels=['no', 'yes'])' is yes (failure: no)",
    ),
    "one of one": ("cbind(y, none)", "'y' (failures: 'none')"),
}


@pytest.mark.parametrize(("left", "success"), SINGLE.values(), ids=SINGLE.keys())
def test_single_trials(left, success):
    data = single()
    design, labels = response_of(left, data)
    assert (design.y == data.y).all()
    assert design.size is None
    assert design.weights is None
    assert labels.success == success


@pytest.mark.parametrize("make", [pl.from_pandas, lambda d: d.to_dict("list"), lambda d: pl.from_pandas(d).to_arrow()])
@pytest.mark.parametrize("left", ["y", "flag", "text"])
def test_tables_of_every_make(left, make):
    data = single()[["g", "x", left]]
    assert (response_of(left, make(data))[0].y == single().y).all()


def test_an_enumeration_has_its_own_order():
    data = single()
    own = pl.from_pandas(data[["g", "x", "text"]])
    assert (response_of("text", own.cast({"text": pl.Enum(["yes", "no"])}))[0].y == 1 - data.y).all()


@settings(max_examples=25, deadline=None)
@given(st.permutations(range(24)), st.sampled_from(list(TRIALS.values())))
def test_the_order_of_rows_does_not_matter(order, case):
    left, options = case
    data = trials()
    order = list(order)
    moved = data.iloc[order]
    here, there = (
        response_of(left, d, **{k: v(d) if callable(v) else v for k, v in options.items()})[0] for d in (data, moved)
    )
    for name in ("y", "size", "X"):
        assert (getattr(here, name)[order] == getattr(there, name)).all()
    assert (here.terms[0].group[order] == there.terms[0].group).all()


def test_the_second_level_is_success():
    data = single()
    data["upside"] = data["cured"].cat.reorder_categories(["a cure", "no"])
    assert (response_of("upside", data)[0].y == 1 - data.y).all()
    data["wide"] = data["cured"].cat.add_categories(["never"])  # unused ones are none
    assert (response_of("wide", data)[0].y == data.y).all()


def test_levels_are_those_of_the_rows_used():
    data = single()
    data.loc[:2, "text"] = "unknown"
    with pytest.raises(mj.DataError, match="has 3 levels"):
        response_of("text", data)
    design, _ = response_of("text", data, subset=data.text != "unknown")
    assert (design.y == data.y[3:]).all()


def test_the_family_sees_what_the_design_holds():
    family, data = Stand("binomial"), trials()
    design, _ = response_of("s / n", data, family=family, weights="n")
    y, size, name = family.seen
    assert (y == design.y).all()
    assert (size == design.size).all()
    assert name == "s / n"


# --- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["y", "flag", "text"])
def test_weights_of_single_outcomes_are_trials_as_in_R(left):
    data = single().assign(w=lambda d: np.arange(len(d)) % 3 + 1)
    design, labels = response_of(left, data, weights="w")
    assert (design.size == data.w).all()
    assert (design.y == data.y * data.w).all()
    assert (design.weights, labels.state.size) == (None, "w")


def test_weights_that_are_no_trials_are_case_weights():
    data = single().assign(w=lambda d: np.arange(len(d)) / 3 + 0.5)
    with pytest.warns(DataWarning, match=r"no whole numbers \(first: row 0: 0.5\).*row of 'text'"):
        design, labels = response_of("text", data, weights="w")
    assert (design.weights == data.w).all()
    assert (design.y == data.y).all()
    assert (design.size, labels.state.size, labels.state.weights) == (None, None, "w")


@pytest.mark.parametrize(("left", "options"), [("cbind(s, f)", {}), ("s", {"size": "n"}), ("p", {"size": "n"})])
def test_beside_sizes_weights_are_case_weights(left, options):
    data = trials().assign(w=0.5)
    design, labels = response_of(left, data, weights="w", **options)
    assert (design.size == data.n).all()
    assert (design.weights == 0.5).all()
    assert labels.state.weights == "w"
    with pytest.raises(mj.DataError, match="weights must be positive, but 24 of 24"):
        response_of(left, data.assign(w=0), weights="w", **options)


def test_proportions_of_no_whole_number_of_trials_warn_once():
    data = trials().assign(p=0.33)
    data["n"] = 10
    with pytest.warns(DataWarning) as caught:
        design, _ = response_of("p", data, weights="n")
    assert len(caught) == 1
    assert "in 24 of 24 rows (first: row 0: 3.3 of 10)" in str(caught[0].message)
    assert np.allclose(design.y, 3.3, rtol=1e-15)


def test_proportions_that_were_rounded_are_counts():
    """Six digits of a proportion of up to six trials lose 3e-6 of a success, half of 1e-6 times the trials."""
    data = trials()
    data["p"] = data.p.round(6)
    assert (response_of("p", data, weights="n")[0].y == data.s).all()


# --- rows that are left out --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("left", "options"), TRIALS.values(), ids=TRIALS.keys())
def test_rows_without_trials_are_left_out(left, options):
    data = trials()
    data.loc[[3, 5, 7], ["s", "f", "n"]] = 0
    data.loc[[3, 5, 7], "g"] = "nobody"
    data["h"] = pd.Categorical(data.g)
    data.loc[[3, 5, 7], "p"] = 0.0
    options = {name: value(data) if callable(value) else value for name, value in options.items()}
    with pytest.warns(DataWarning, match="3 of 24 rows left out because they have no trials"):
        design, labels = response_of(left, data, **options)
    rest = data.drop([3, 5, 7])
    assert (design.y == rest.s).all()
    assert (design.size == rest.n).all()
    assert (labels.used == (data.n > 0)).all()
    assert list(labels.frame.index) == list(rest.index)
    assert labels.terms[0].levels == tuple("abcd")
    assert design.terms[0].group.max() == 3
    assert labels.n_missing == 0
    with pytest.warns(DataWarning, match="no trials"):
        assert read(f"{left} ~ h + (1 | g)", data, **options)[1].fixed[-1] == "h[T.d]"


def test_missing_values_are_left_out():
    data = trials()
    data["n"] = data["n"].astype(float)
    data.loc[2, "n"] = np.nan
    data.loc[4, "s"] = np.nan
    with pytest.warns(DataWarning, match=r"2 of 24 rows left out.*s 1.*\(size\) 1"):
        design, labels = response_of("s", data, size="n")
    assert (design.size == data.n.drop([2, 4])).all()
    assert labels.n_missing == 2


def test_truth_values_among_missing_ones():
    data = single()
    data["flag"] = data["flag"].astype(object)
    data.loc[[0, 1], "flag"] = None
    with pytest.warns(DataWarning, match=r"2 of 24 rows left out.*flag 2"):
        design, _ = response_of("flag", data)
    assert (design.y == data.y[2:]).all()
    with pytest.warns(DataWarning, match="2 of 24"):
        assert (response_of("flag", data.astype({"flag": "boolean"}))[0].y == data.y[2:]).all()


# --- what is refused ---------------------------------------------------------------------------------------------


BAD = {
    "three levels": ("kind", {}, r"'kind' has 3 levels \(high, low, mid\).*ordinal or multinomial is not here"),
    "one level": ("same", {}, "'same' is 'yes' in all 24 rows.*no finite estimate.*what counts as success"),
    "all True": ("sure", {}, "all 24 rows of 'sure' are successes.*no finite estimate"),
    "all 0": ("nil", {}, "all 24 rows of 'nil' are failures.*no finite estimate"),
    "all trials": ("n", {"size": "n"}, "all 24 rows of 'n' are successes"),
    "no success": ("cbind(nil, n)", {}, r"all 24 rows of 'cbind\(nil, n\)' are failures"),
    "1 and 2": ("two", {}, r"'two' is 1 or 2, not 0 or 1: say which is success, I\(two == 2\)"),
    "counts": ("s", {}, r"'s' holds counts \(up to \d\).*numbers of trials as size=, or cbind"),
    "negative": ("minus", {}, r"'minus' is neither 0 nor 1 \(first: row 0: -1\)"),
    "negative counts": ("minus", {"size": "n"}, "minus: cannot be negative"),
    "proportions": ("p", {}, "'p' holds proportions .*give the numbers of trials as size=\\.\\.\\."),
    "a ratio": ("s / n", {}, "holds proportions .*give the numbers of trials as size='n'"),
    "percentages with weights": ("percent", {"weights": "n"}, "'percent' goes from .* to 100, .*counts with size="),
    "more successes than trials": ("s", {"size": "few"}, r"more successes than trials in \d+ rows \(first: row"),
    "successes without trials": ("s", {"size": "zero"}, "size= is 0, but 's' is not in 23 rows"),
    "a ratio by zero": ("s / zero", {"size": "zero"}, "size= is 0, but 's / zero' is not in 23 rows"),
    "a ratio by zero, weights": ("s / zero", {"weights": "zero"}, "weights= is 0, but 's / zero' is not in 23 rows"),
    "no trials at all": ("nil", {"size": "nil"}, "size= is 0 in all 24 rows: there are no trials"),
    "negative sizes": ("s", {"size": "minus"}, "size= must be numbers of trials, but is negative in 12 rows"),
    "negative weights": ("p", {"weights": "minus"}, "weights= must be numbers of trials, but is negative in 12 rows"),
    "fractional sizes": ("s", {"size": "x"}, "size= must be whole numbers|size= must be numbers of trials"),
    "sizes and a half": ("s", {"size": "half"}, r"whole numbers of trials, but is not in 24 rows \(first: row 0: 6.5"),
    "sizes of text": ("s", {"size": "kind"}, "size='kind' must be numbers, but holds text"),
    "unknown sizes": ("s", {"size": "m"}, r"no column 'm' \(size=\)"),
    "sizes of another length": ("s", {"size": np.ones(3)}, r"size has shape \(3,\), but the table has 24 rows"),
    "sizes of text outcomes": ("answer", {"size": "n"}, "'answer' has two levels, one trial a row.*leave size= out"),
    "cbind and size": ("cbind(s, f)", {"size": "n"}, "gives the numbers of trials already: leave size= out"),
    "one column": ("cbind(s)", {}, "cbind\\(\\) takes two columns, successes and failures, got 1"),
    "three columns": ("cbind(s, f, n)", {}, "takes two columns, successes and failures, got 3"),
    "no columns": ("cbind()", {}, "takes two columns"),
    "cbind inside": ("cbind(s, f) / 2", {}, "stands alone before '~'"),
    "failures below zero": ("cbind(n, s - n)", {}, r"'s - n' must be counts, but is negative in \d+ rows"),
    "cbind of text": ("cbind(s, kind)", {}, "response 'kind' is not numeric"),
    "cbind of nothing": ("cbind(s, nothing)", {}, "no column 'nothing'"),
    "dates": ("when", {}, "'when' holds datetime64.* values; make numbers of them first"),
    "counts as text": ("words", {}, "'words' is not numeric: it holds numbers as text"),
    "two columns": ("poly(x, 2)", {}, "not one numeric column"),
}  # fmt: skip


def bad_table():
    data = trials(1)
    i = np.arange(len(data))
    return data.assign(
        kind=np.resize(["low", "mid", "high"], 24), same="yes", sure=True, nil=0, two=i % 2 + 1, half=6.5,
        minus=np.where(i % 2, 1, -1), percent=100 * data.p.where(data.s != 0, 1.0), few=np.maximum(data.s - 1, 1),
        zero=np.where(data.s == 0, 1, 0), answer=np.resize(["no", "yes"], 24), words=i.astype(str),
        when=[datetime.date(2024, 5, 1)] * 24, s=np.where(i == 1, 0, np.maximum(data.s, 1)), f=data.f, n=data.n,
    ).assign(zero=lambda d: np.where(d.s == 0, 1, 0), few=lambda d: np.maximum(d.s - 1, 1))  # fmt: skip


@pytest.mark.parametrize(("left", "options", "message"), BAD.values(), ids=BAD.keys())
def test_bad_binomial_responses(left, options, message):
    with pytest.raises((mj.DataError, mj.FormulaError), match=message):
        response_of(left, bad_table(), **options)


OTHERS = {
    "no counts at all": ("poisson", "nil ~ x + (1 | g)", {}, "all 24 counts of 'nil' are 0.*no finite estimate"),
    "constant counts": ("nbinom", "two ~ x + (1 | g)", {}, "'two' is constant"),
    "constant": ("gamma", "half ~ x + (1 | g)", {}, "'half' is constant"),
    "negative counts": ("poisson", "minus ~ x + (1 | g)", {}, "minus: cannot be negative"),
    "text": ("poisson", "kind ~ x + (1 | g)", {}, "'kind' is not numeric"),
    "sizes": ("poisson", "s ~ x + (1 | g)", {"size": "n"}, "a poisson response has none; an exposure is an offset"),
    "cbind": ("nbinom", "cbind(s, f) ~ x + (1 | g)", {}, "a nbinom response is one column"),
    "weights of zero": ("poisson", "s ~ x + (1 | g)", {"weights": "nil"}, "weights must be positive, but 24 of 24"),
    "no random term": ("poisson", "s ~ x", {}, "no random term"),
    "too many columns": ("poisson", "s ~ C(row) + (1 | g)", {}, "24 rows leave nothing for random effects"),
}


@pytest.mark.parametrize(("name", "formula", "options", "message"), OTHERS.values(), ids=OTHERS.keys())
def test_bad_responses_of_other_families(name, formula, options, message):
    data = bad_table().assign(two=2, row=np.arange(24))
    with pytest.raises((mj.DataError, mj.FormulaError), match=message):
        read(formula, data, Stand(name), **options)


def test_other_families_take_numbers():
    data = trials().assign(w=2.0, t=lambda d: d.x**2 + 1)
    design, labels = read("s ~ x + (1 | g)", data, Stand("poisson"), weights="w", offset="x")
    assert (design.y == data.s).all()
    assert (design.weights == 2).all()
    assert (design.offset == data.x).all()
    assert (design.size, labels.success) == (None, "")
    design, _ = read("log(t) ~ x + (1 | g)", data, Stand("gamma"))
    assert np.array_equal(design.y, np.log(data.t))
    # No noise is left of a response that the fixed effects reproduce: nothing to object to beside other families.
    assert (read("t ~ I(x^2) + (1 | g)", data, Stand("gamma"))[0].y == data.t).all()


def test_one_count_everywhere_beside_exposures_is_a_rate():
    data = trials().assign(one=1)
    with pytest.raises(mj.DataError, match="'one' is constant"):
        read("one ~ x + (1 | g)", data, Stand("poisson"))
    assert (read("one ~ x + offset(log(n)) + (1 | g)", data, Stand("poisson"))[0].y == 1).all()


def test_a_family_of_the_users_own_may_have_trials():
    data, family = trials(), Stand("custom")
    for left, options in (("cbind(s, f)", {}), ("s", {"size": "n"})):
        design, _ = response_of(left, data, family=family, **options)
        assert (design.y == data.s).all()
        assert (design.size == data.n).all()
    design, _ = response_of("p", data, family=family, weights="n")  # only a binomial response has R's meaning
    assert (design.weights == data.n).all()
    assert design.size is None


@pytest.mark.parametrize("family", [3, object()])
def test_what_is_no_family(family):
    with pytest.raises(ValueError, match="family must be a family of distributions or None, got"):
        response_of("s", trials(), family=family)


# --- offsets -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("term", "options", "name"),
    [
        (" + offset(log(zero))", {}, r"log\(zero\)"),
        (" + offset(logged)", {}, "logged"),
        ("", {"offset": "logged"}, "offset="),
        ("", {"offset": lambda d: d.logged.to_numpy()}, "offset="),
    ],
)
def test_infinite_offsets_name_the_row(term, options, name):
    data = trials().assign(zero=lambda d: np.where(d.index == 5, 0, d.n))
    with np.errstate(divide="ignore"):
        data["logged"] = np.log(data.zero)
    data.index = [f"row{i}" for i in range(24)]
    options = {key: value(data) if callable(value) else value for key, value in options.items()}
    message = f"the offset '{name}' is infinite in 1 rows \\(first: row row5\\).*drop the row.*or add to the exposure"
    with pytest.raises(mj.DataError, match=message):
        read(f"s ~ x{term} + (1 | g)", data, Stand("poisson"), **options)


def test_an_exposure_without_its_logarithm_is_warned_of():
    data = trials().assign(people=lambda d: 50 + d.n)
    for name in ("poisson", "nbinom"):
        with pytest.warns(DataWarning, match=r"offset is 5\d.* on average, and counts are .*log\(exposure\)\?"):
            read("s ~ x + offset(people) + (1 | g)", data, Stand(name))
    with pytest.warns(DataWarning, match=r"did you mean log\(exposure\)"):  # however large the counts
        read("I(100 * n) ~ x + offset(1000 * people) + (1 | g)", data, Stand("poisson"))
    identity = Stand("poisson")
    identity.link = "identity"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        read("s ~ x + offset(log(people)) + (1 | g)", data, Stand("poisson"))
        read("s ~ x + offset(people) + (1 | g)", data, identity)
        # Germs in a million litres: a mean of 1e5 is not far below exp(21).
        read("I(1e5 * n) ~ x + offset(21 + x) + (1 | g)", data, Stand("poisson"))
        read("cbind(s, f) ~ x + offset(people) + (1 | g)", data)


# --- effects of single rows ---------------------------------------------------------------------------------------


def identifiable(formula, data, family, **options):
    built = build(formula, data, options.get("weights"), None, None, None, {}, None, family, options.get("size"))
    check_identifiable(*built, family)


def test_effects_of_single_rows():
    data = trials().assign(row=np.arange(24), y=single().y, t=1.0 + np.arange(24))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        identifiable("s ~ x + (1 | g) + (1 | row)", data, Stand("poisson"))
        identifiable("s ~ x + (1 | g) + (1 | row)", data, BINOMIAL, size="n")
        identifiable("cbind(s, f) ~ x + (1 | row)", data, BINOMIAL)
    for one in ({}, {"size": np.ones(24)}):
        with pytest.raises(
            mj.DataError, match=r"single trials, each 0 or 1, .*coarser grouping factor.*check_ident"
        ) as e:
            identifiable("y ~ x + (1 | g) + (1 | row)", data, BINOMIAL, **one)
        assert "(Intercept | row)" in str(e.value)
    for name in ("nbinom", "gamma"):
        with pytest.warns(DataWarning, match=rf"\(Intercept \| row\) .*the {name} family describes overdispersion too"):
            identifiable(("s" if name == "nbinom" else "t") + " ~ x + (1 | row)", data, Stand(name))
    with pytest.raises(mj.DataError, match=r"48 random effects in term .* so many cannot be told apart"):
        identifiable("s ~ x + (x | row)", data, Stand("poisson"))
    with pytest.raises(mj.DataError, match="residual variance cannot be told"):
        identifiable("t ~ x + (1 | row)", data, Stand("gaussian"))


def test_effects_that_are_fixed_as_well_are_refused_whatever_the_weights():
    data = trials().assign(w=lambda d: 1 + d.x**2)
    with pytest.raises(mj.DataError, match="already hold 'Intercept' of every level of 'g'"):
        identifiable("s ~ g + (1 | g)", data, Stand("poisson"), weights="w")


# --- the design, and linear mixed models --------------------------------------------------------------------------


def plain(**more):
    term = mj.RandomTerm(np.ones((4, 1)), np.array([0, 0, 1, 1]), 2)
    return mj.Design(y=np.arange(4.0), X=np.ones((4, 1)), terms=(term,), **more)


def test_design_with_sizes_is_a_pytree():
    design = plain(size=np.full(4, 5.0))
    assert len(jax.tree.leaves(design)) == len(jax.tree.leaves(plain())) + 1
    assert (jax.tree.map(lambda a: 2 * a, design).size == 10).all()


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (np.ones(3), "size has shape \\(3,\\), but X has 4 rows"),
        (np.ones((4, 1)), "size has shape \\(4, 1\\); it must be one-dimensional"),
        (np.r_[1.0, 0, 1, 1], "size must be positive: it is the number of trials"),
        (np.r_[1.0, np.nan, 1, 1], "size has missing or infinite values"),
    ],
)
def test_sizes_are_checked(size, message):
    with pytest.raises(ValueError, match=message):
        mj.design.check_design(plain(size=size))


def test_linear_mixed_models_refuse_sizes():
    design = plain(size=np.full(4, 5.0))
    labels = mj.build_design("s ~ x + (1 | g)", trials(), context={})[1]
    from mixjax.fitted.record import fit_design

    for make in (
        lambda: mj.cross_products(design),
        lambda: mj.cross_products(design, np.ones((3, 4))),
        lambda: jax.jit(mj.cross_products)(design),
        lambda: fit_design(design, labels),
    ):
        with pytest.raises(ValueError, match=r"numbers of trials \(size\), and a linear mixed model has none"):
            make()
    with pytest.raises(mj.DataError, match=r"size= are numbers of trials of a binomial response.*name a family"):
        mj.build_design("s ~ x + (1 | g)", trials(), size="n", context={})
    with pytest.raises(mj.FormulaError, match="one response at a time"):
        mj.build_design("cbind(s, f) ~ x + (1 | g)", trials(), context={})


def test_new_rows_need_neither_response_nor_size():
    data = trials()
    for left, options in TRIALS.values():
        options = {name: value(data) if callable(value) else value for name, value in options.items()}
        design, labels = response_of(left, data, **options)
        rows = new_rows(pickle.loads(pickle.dumps(labels)), data[["x", "g"]], (True,), (True,))
        assert (rows.X == design.X).all()
        assert (rows.level[0] == design.terms[0].group).all()
        assert rows.weights is None


def test_a_formula_of_a_stranger():
    data = trials()
    assert (response_of("cbind(s, f)", data, trusted=False)[0].size == data.n).all()
    with pytest.raises(mj.FormulaError, match="not allowed"):
        response_of("cbind(s, f.abs())", data, trusted=False)


def test_arrays_of_the_callers_stand_for_columns():
    data, won, lost = trials(), trials().s.to_numpy(), trials().f.to_numpy()
    design, _ = mj.build_design("cbind(won, lost) ~ x + (1 | g)", data, family=BINOMIAL)
    assert (design.size == won + lost).all()
