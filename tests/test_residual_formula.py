"""``dispersion=`` and ``residual=`` as users write them: what is understood, and what is refused with which words."""

from functools import cache

import numpy as np
import pandas as pd
import pytest

import mixjax as mj
from mixjax.checks import DataError, DataWarning, FormulaError
from mixjax.formula.residual_side import parse_residual

FORMULA = "Reaction ~ Days + (1 | Subject)"


@cache
def sleep():
    rng = np.random.default_rng(0)
    data = mj.datasets.load("sleepstudy")
    return data.assign(
        one=1.0,
        day=pd.Categorical(data["Days"].map("d{}".format)),
        text=data["Days"].map("d{}".format),
        half=data["Days"] / 2,
        week=data["Days"] // 5,
        site=np.where(data["Subject"].astype(int) < 340, "a", "b"),
        order=rng.permutation(len(data)),
        batch=np.arange(len(data)) % 7,
        row=np.arange(len(data)).astype(str),
    )


@pytest.mark.parametrize(
    ("text", "structure", "time", "group"),
    [
        ("ar1(Days | Subject)", "ar1", "Days", "Subject"),
        ("car1(log(Days + 1)|Subject)", "car1", "log(Days + 1)", "Subject"),
        ("~ cs(1 | Subject)", "cs", None, "Subject"),
        ("ar1(1 | Subject)", "ar1", None, "Subject"),
        ("ar1(Days | site:Subject)", "ar1", "Days", "site:Subject"),
        ("ar1(Days | site / Subject)", "ar1", "Days", "Subject:site"),
    ],
)
def test_what_is_read(text, structure, time, group):
    part = parse_residual(text, list(sleep()))
    assert (part.structure, part.group.name) == (structure, group)
    assert (part.time and part.time.shown) == time


@pytest.mark.parametrize(
    ("residual", "words"),
    [
        (
            "us(Days | Subject)",
            r"a covariance between visits.*write mixjax.mmrm\('y ~ x \+ us\(",
        ),
        ("csh(Days | Subject)", "a covariance between visits.*mixjax.mmrm"),
        ("(Days | Subject)", "residual must be text such as"),
        ("Days", "residual must be text such as"),
        (3, "residual must be text such as 'ar1.*got int"),
        ("ar1(Days)", "time before the bar"),
        ("ar1(Days || Subject)", "time before the bar"),
        ("cs(Days | Subject)", r"write cs\(1 \| Subject\)"),
        ("car1(1 | Subject)", r"needs times: write car1\(time \| Subject\)"),
        ("ar1(Days | Subject * site)", "3 grouping factors, and residuals have one"),
    ],
)
def test_structures_that_are_none(residual, words):
    with pytest.raises(FormulaError, match=words):
        mj.lmm(FORMULA, sleep(), residual=residual)


@pytest.mark.parametrize(
    ("formula", "residual", "words"),
    [
        (FORMULA, "ar1(week | Subject)", r"week is 0 more than once in 'Subject' '308' \(144 such rows in all\)"),
        (FORMULA, "ar1(half | Subject)", r"whole steps, and half is 0.5 somewhere; write car1\(half \| Subject\)"),
        (FORMULA, "ar1(text | Subject)", r"'text' holds text \(d0, .*\), which has no order: make a categorical"),
        (FORMULA, "car1(day | Subject)", "'day' is a category, and car1 needs times as numbers; ar1 counts levels"),
        (FORMULA, "ar1(Day | Subject)", "Day"),
        (FORMULA, "ar1(Days | Subjekt)", "Subjekt"),
        (FORMULA, "ar1(Days | row)", "every level of 'row' has one row"),
        (FORMULA, "ar1(order | site)", r"one level of 'site' \('a'\) have different levels of 'Subject'.*as in nlme"),
        ("Reaction ~ Days + (1 | Subject) + (1 | batch)", "ar1(Days | Subject)", "have different levels of 'batch'"),
        (FORMULA, "cs(1 | Subject)", "so is the random intercept of 'Subject'.*leave one of them out"),
    ],
)  # fmt: skip
def test_times_and_groups_that_make_no_structure(formula, residual, words):
    with pytest.raises(DataError, match=words):
        mj.lmm(formula, sleep(), residual=residual)


@pytest.mark.parametrize(
    ("dispersion", "error", "words"),
    [
        ("Days", FormulaError, "dispersion must be text such as '~ treatment', without a response"),
        ("y ~ Days", FormulaError, "without a response"),
        (2, FormulaError, "got int"),
        ("~ 0 + Days", FormulaError, "takes the intercept away, and that is sigma"),
        ("~ 0", FormulaError, "no terms"),
        ("~ Days + (1 | Subject)", FormulaError, "has a random term"),
        ("~ Day", DataError, "Day"),
        ("~ offset(Days)", FormulaError, "offset"),
    ],
)
def test_dispersions_that_are_none(dispersion, error, words):
    with pytest.raises(error, match=words):
        mj.lmm(FORMULA, sleep(), dispersion=dispersion)


def test_columns_of_a_dispersion_that_say_nothing():
    with pytest.raises(DataError, match="no column that varies between rows"), pytest.warns(DataWarning, match="one"):
        mj.lmm(FORMULA, sleep(), dispersion="~ one")
    with pytest.warns(DataWarning, match=r"columns of dispersion left out.*half"):
        fit = mj.lmm(FORMULA, sleep(), dispersion="~ Days + half")
    assert fit.labels.dispersion == ("Days",)
    assert fit.criterion == pytest.approx(mj.lmm(FORMULA, sleep(), dispersion="~ Days").criterion, abs=1e-9)


def test_what_goes_together_and_what_does_not():
    data = sleep()
    plain = mj.lmm(FORMULA, data)
    assert mj.lmm(FORMULA, data, dispersion="~ 1").criterion == plain.criterion
    assert mj.lmm("Reaction ~ Days", data, dispersion="~ 1").npar == 3
    with pytest.raises(FormulaError, match="no random term"):
        mj.lmm("Reaction ~ Days", data)
    with pytest.raises(ValueError, match="leave optimizer= out"):
        mj.lmm(FORMULA, data, dispersion="~ Days", optimizer=pytest.importorskip("optax").lbfgs())
    with pytest.raises(DataError, match="need the rows themselves"):
        mj.lmm(FORMULA, iter([data]), residual="ar1(Days | Subject)")
    contrasts = mj.lmm(FORMULA, data, dispersion="~ site", contrasts={"site": "sum"})
    treatment = mj.lmm(FORMULA, data, dispersion="~ site")
    assert contrasts.criterion == pytest.approx(treatment.criterion, abs=1e-8)
    assert abs(treatment.estimates.residual[0]) == pytest.approx(2 * abs(contrasts.estimates.residual[0]), rel=1e-6)


def test_levels_without_rows_are_told():
    data = sleep()[~sleep()["Days"].isin([3, 4])]
    with pytest.warns(DataWarning, match="and d3, d4 of 'day' has none: the levels on both sides are taken as neigh"):
        fit = mj.lmm("Reaction ~ Days", data, residual="ar1(day | Subject)")
    assert fit.marginal_cov([2, 3])[0, 1] == pytest.approx(fit.sigma**2 * fit.estimates.residual[0])


def test_missing_values_of_times_groups_and_dispersions_leave_rows_out():
    data = sleep().copy()
    data.loc[3, "half"], data.loc[14, "site"] = np.nan, None
    with pytest.warns(DataWarning, match="rows"):
        fit = mj.lmm(FORMULA, data, dispersion="~ site", residual="car1(half | Subject)")
    assert (fit.nobs, fit.labels.n_missing) == (178, 2)
    again = mj.lmm(FORMULA, data.drop([3, 14]), dispersion="~ site", residual="car1(half | Subject)")
    assert again.criterion == pytest.approx(fit.criterion, abs=1e-9)
    part = mj.lmm(FORMULA, sleep(), subset="Days > 1", residual="ar1(Days | Subject)")
    assert part.nobs == 144


def test_new_rows_need_the_columns_of_the_dispersion_for_new_responses_only():
    fit = mj.lmm(FORMULA, sleep(), dispersion="~ site")
    new = {"Days": [1.0], "Subject": ["308"]}
    assert fit.predict(new, interval="confidence").shape == (1, 4)
    with pytest.raises(DataError, match="site"):
        fit.predict(new, interval="prediction")
    with pytest.raises(DataError, match="'c'"):
        fit.predict(new | {"site": ["c"]}, interval="prediction")
    wide = [fit.predict(new | {"site": [s]}, interval="prediction")["std_error"].iloc[0] for s in "ab"]
    assert (wide[1] > wide[0]) == (fit.estimates.residual[0] > 0)


def test_formulas_of_strangers_are_columns_and_functions_only():
    with pytest.raises(FormulaError):
        mj.lmm(FORMULA, sleep(), dispersion="~ open('x')", trusted=False)
    with pytest.raises(FormulaError):
        mj.lmm(FORMULA, sleep(), residual="car1(open('x') | Subject)", trusted=False)
