"""Terms of the formula and written hypotheses: against lmerTest, extra sums of squares, cell means, and recodings."""

import json
import re
import warnings
from functools import cache

import numpy as np
import pandas as pd
import pytest
from conftest import HERE, fit_of, oracle, table

import mixjax as mj
from mixjax.checks import InferenceWarning
from mixjax.fitted.record import Fitted
from mixjax.inference.fixed import hypotheses
from mixjax.inference.fixed.hypotheses import anova, contrast_matrix
from mixjax.inference.fixed.terms import terms_of, type_contrasts

NAMES = sorted(path.stem.removeprefix("inference_ddf_") for path in (HERE / "oracle").glob("inference_ddf_*.json"))
METHODS = {"satterthwaite": "satterthwaite", "kenward_roger": "kenward-roger"}
COLUMNS = {"Sum Sq": "sum_sq", "Mean Sq": "mean_sq", "NumDF": "num_df", "DenDF": "den_df", "F value": "statistic",
           "Pr(>F)": "p_value"}  # fmt: skip
TYPES = ("I", "II", "III")


@cache
def reference(name):
    return json.loads((HERE / "oracle" / f"inference_ddf_{name}.json").read_text())


def projector(L):
    """The row space of L as a matrix."""
    return np.linalg.pinv(np.atleast_2d(L)) @ np.atleast_2d(L)


def record_of_design(formula, data, **kwargs):
    """A record without estimates, for what needs the design only."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mj.DataWarning)  # columns left out are asserted where they matter
        design, labels = mj.build_design(formula, data, **kwargs)
    return Fitted(labels, None, None, True, None, design)


# --- lmerTest ------------------------------------------------------------------------------------------------------


def test_there_are_references():
    assert len(NAMES) == 10


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", TYPES)
def test_hypotheses_of_terms_are_lmertests(name, kind):
    expected = reference(name)["satterthwaite"][f"anova_type{kind}"]
    found = type_contrasts(fit_of(name, "REML").record, kind)
    assert list(found) == list(expected["row_names"])
    for term, L in found.items():
        theirs = expected["hypotheses"][term]
        theirs = np.reshape(theirs["values"], (len(theirs["rows"]), len(theirs["cols"])))
        assert L.shape == theirs.shape
        # lmerTest rounds entries below 1e-7 or so away.
        np.testing.assert_allclose(projector(L), projector(theirs), atol=2e-7)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", TYPES)
def test_f_tables_are_lmertests(name, kind, method):
    expected = reference(name)[method][f"anova_type{kind}"]
    found = anova(fit_of(name, "REML").record, kind, METHODS[method])
    assert list(found.index) == list(expected["row_names"])
    assert list(found.columns) == list(COLUMNS.values())
    for theirs, ours in COLUMNS.items():
        tolerance = {"p_value": {"rtol": 1e-4, "atol": 1e-9}}.get(ours, {"rtol": 1e-5})
        np.testing.assert_allclose(found[ours].to_numpy(float), np.array(expected[theirs], float), **tolerance)


CONTRASTS = [(n, c) for n in NAMES for c in reference(n)["satterthwaite"].get("contrasts", {})]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "contrast"), CONTRASTS)
def test_contrasts_are_lmertests(name, contrast, method):
    expected = reference(name)[method]["contrasts"][contrast]
    L = np.reshape(expected["L"]["values"], (-1, len(fit_of(name, "REML").labels.fixed)))
    found = hypotheses.test(fit_of(name, "REML").record, L, METHODS[method], joint=True)
    assert len(found) == 1
    for theirs, ours in COLUMNS.items():
        np.testing.assert_allclose(found[ours].iloc[0], expected[theirs], rtol=1e-4 if ours == "p_value" else 1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_one_by_one_they_are_the_table_of_coefficients(method):
    fit = fit_of("cake_temp", "REML")
    expected = reference("cake_temp")[method]["coefficients"]
    found = hypotheses.test(fit.record, expected["row_names"], METHODS[method], joint=False)
    columns = {"Estimate": "estimate", "Std. Error": "std_error", "df": "df", "t value": "statistic"}
    for theirs, ours in columns.items():
        np.testing.assert_allclose(found[ours], expected[theirs], rtol=1e-5)
    np.testing.assert_allclose(found["p_value"], expected["Pr(>|t|)"], rtol=1e-4)
    assert list(found.index) == expected["row_names"]


# --- what is tested by default -------------------------------------------------------------------------------------


def test_one_hypothesis_is_a_t_test_and_several_an_f_test():
    record = fit_of("sleepstudy_slopes", "REML").record
    one = hypotheses.test(record, "Days = 10")
    both = hypotheses.test(record, ["Days = 10", "Intercept = 250"])
    assert list(one.columns) == ["estimate", "std_error", "df", "lower", "upper", "statistic", "p_value"]
    assert list(both.columns) == list(COLUMNS.values())
    assert len(both) == 1
    assert both["num_df"].iloc[0] == 2
    alone = hypotheses.test(record, "Days = 10", joint=True)
    np.testing.assert_allclose(alone["statistic"].iloc[0], one["statistic"].iloc[0] ** 2, rtol=1e-10)
    np.testing.assert_allclose(alone["p_value"].iloc[0], one["p_value"].iloc[0], rtol=1e-8)
    np.testing.assert_allclose(one["estimate"].iloc[0], fit_of("sleepstudy_slopes", "REML").fixef["Days"], rtol=1e-14)


def test_walds_f_is_the_quadratic_form():
    fit = fit_of("sleepstudy_slopes", "REML")
    L, rhs, _ = contrast_matrix(fit.record, ["Days = 10", "Intercept + 5*Days = 290"])
    d = L @ fit.fixef.to_numpy() - rhs
    F = d @ np.linalg.solve(L @ fit.vcov.to_numpy() @ L.T, d) / 2
    found = hypotheses.test(fit.record, ["Days = 10", "Intercept + 5*Days = 290"], "wald").iloc[0]
    np.testing.assert_allclose(found["statistic"], F, rtol=1e-10)
    np.testing.assert_allclose(found["sum_sq"], 2 * F * fit.sigma**2, rtol=1e-10)


# --- textbook: unbalanced tables -----------------------------------------------------------------------------------


@cache
def unbalanced(empty=False):
    """A 2 x 3 table with 2 to 6 rows in a cell, a covariate and a grouping factor."""
    counts = {("u", "p"): 4, ("u", "q"): 2, ("u", "r"): 5, ("v", "p"): 3, ("v", "q"): 6, ("v", "r"): 0 if empty else 2}
    cells = [cell for cell, n in counts.items() for _ in range(n)]
    rng = np.random.default_rng(3)
    frame = pd.DataFrame(cells, columns=["a", "b"])
    return frame.assign(x=rng.normal(2.0, 1.0, len(frame)), y=rng.normal(size=len(frame)), g=np.arange(len(frame)) % 4,
                        late=rng.random(len(frame)) < 0.4)  # fmt: skip


def cell_rows(record, cells):
    """Rows of X of the cells (a, b)."""
    frame, X = record.labels.frame, np.asarray(record.design.X)
    return np.array([X[np.flatnonzero((frame.a == a) & (frame.b == b))[0]] for a, b in cells])


def extra_sum_of_squares(X, y, before, after):
    def rss(columns):
        return np.sum((y - X[:, columns] @ np.linalg.lstsq(X[:, columns], y, rcond=None)[0]) ** 2)

    return rss(before) - rss(after)


@pytest.mark.parametrize("fixed", ["a * b", "a * b + x", "a * x + b", "b * a * x", "a + b:x + np.exp(x)"])
@pytest.mark.parametrize("kind", ["I", "II"])
@pytest.mark.parametrize("coding", ["treatment", "sum"])
def test_types_one_and_two_are_extra_sums_of_squares(fixed, kind, coding):
    contrasts = {} if coding == "treatment" else {"a": "sum", "b": "helmert"}
    record = record_of_design(f"y ~ {fixed} + (1 | g)", unbalanced(), contrasts=contrasts)
    X, y = np.asarray(record.design.X), np.asarray(record.design.y)
    terms = terms_of(record.labels)
    beta = np.linalg.lstsq(X, y, rcond=None)[0]
    found = type_contrasts(record, kind)
    assert list(found) == [t.name for t in terms[1:]]
    for i, term in enumerate(terms[1:], 1):
        others = terms[:i] if kind == "I" else [t for t in terms if t is not term and not term.is_contained_in(t)]
        before = sorted(c for t in others for c in t.columns)
        L = found[term.name]
        d = L @ beta
        ours = d @ np.linalg.solve(L @ np.linalg.inv(X.T @ X) @ L.T, d)
        expected = extra_sum_of_squares(X, y, before, sorted([*before, *term.columns]))
        np.testing.assert_allclose(ours, expected, rtol=1e-8)


def test_type_one_of_the_first_factor_weighs_cells_by_their_rows():
    record = record_of_design("y ~ a * b + (1 | g)", unbalanced())
    X, a = np.asarray(record.design.X), record.labels.frame.a.to_numpy()
    expected = X[a == "v"].mean(axis=0) - X[a == "u"].mean(axis=0)
    np.testing.assert_allclose(projector(type_contrasts(record, "I")["a"]), projector(expected), atol=1e-12)


@pytest.mark.parametrize("coding", [{}, {"a": "sum", "b": "sum"}, {"a": "contr.treatment(base='v')", "b": "helmert"}])
def test_type_three_compares_means_of_cells_with_equal_weights(coding):
    record = record_of_design("y ~ a * b + (1 | g)", unbalanced(), contrasts=coding)
    cells = cell_rows(record, [(a, b) for a in "uv" for b in "pqr"]).reshape(2, 3, -1)
    rows, columns = cells.mean(axis=1), cells.mean(axis=0)
    both = (cells[1] - cells[0])[1:] - (cells[1] - cells[0])[:1]
    found = type_contrasts(record, "III")
    assert list(found) == ["a", "b", "a:b"]
    for L, expected in zip(found.values(), (rows[1] - rows[0], columns[1:] - columns[0], both), strict=True):
        np.testing.assert_allclose(projector(L), projector(expected), atol=1e-12)


def test_type_three_is_the_own_columns_under_sum_to_zero():
    record = record_of_design("y ~ a * b + a * x + (1 | g)", unbalanced(), contrasts={"a": "sum", "b": "sum"})
    assert not record.labels.dropped_columns
    terms = {term.name: term for term in terms_of(record.labels)}
    for name, L in type_contrasts(record, "III").items():
        np.testing.assert_allclose(projector(L), projector(np.eye(L.shape[1])[terms[name].columns]), atol=1e-9)


def test_type_three_with_an_empty_cell_is_that_of_sas():
    """By hand from the definition: cell weights c_ij, those of other terms zero, orthogonal to the interaction's."""
    record = record_of_design("y ~ a * b + (1 | g)", unbalanced(empty=True))
    assert len(record.labels.dropped_columns) == 1
    u = cell_rows(record, [("u", b) for b in "pqr"])
    v = cell_rows(record, [("v", b) for b in "pq"])
    found = type_contrasts(record, "III")
    expected = {
        "a": u[0] + u[1] - v[0] - v[1],
        "b": np.array([u[0] + v[0] - u[1] - v[1], u[0] + u[1] - 2 * u[2]]),
        "a:b": u[0] - u[1] - v[0] + v[1],
    }
    assert list(found) == list(expected)
    for name, L in expected.items():
        np.testing.assert_allclose(projector(found[name]), projector(L), atol=1e-12)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("empty", [False, True])
def test_types_do_not_depend_on_names_scales_or_the_order_of_rows(kind, empty):
    """Tests of the same hypotheses have the same sums of squares."""
    frame = unbalanced(empty)
    other = frame.iloc[::-1].assign(
        a=pd.Categorical(frame.a[::-1], categories=["v", "u"]),
        b=frame.b[::-1].replace({"p": "z"}),
        x=frame.x[::-1] * 1e5,
    )
    squares = []
    for data in (frame, other):
        record = record_of_design("y ~ a * b + a * x + late + (1 | g)", data)
        X, y = np.asarray(record.design.X), np.asarray(record.design.y)
        beta, _, _, _ = np.linalg.lstsq(X, y, rcond=None)
        covariance = np.linalg.inv(X.T @ X)
        found = type_contrasts(record, kind)
        squares.append({n: (L @ beta) @ np.linalg.solve(L @ covariance @ L.T, L @ beta) for n, L in found.items()})
    assert list(squares[0]) == ["a", "b", "x", "late", "a:b", "a:x"]
    for name, value in squares[0].items():
        np.testing.assert_allclose(squares[1][name], value, rtol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("fixed", ["a * b", "a * b + x", "b * a * late", "a * x + b"])
def test_rows_are_those_of_treatment_coding(kind, fixed):
    """lmerTest's: of types I and II from the Doolittle factorisation of X'X, of type III an identity in the columns of
    the term; in any other coding the same functions of the means, which decide the pooled degrees of freedom."""
    record = record_of_design(f"y ~ {fixed} + (1 | g)", unbalanced())
    X, terms = np.asarray(record.design.X), terms_of(record.labels)
    found = type_contrasts(record, kind)
    for term in terms[1:]:
        L = found[term.name]
        np.testing.assert_allclose(np.tril(L[:, term.columns]), np.eye(len(L)), atol=1e-9)
        if kind == "I":
            before = sum(len(t.columns) for t in terms[: terms.index(term)])
            lower = np.linalg.cholesky(X.T @ X)
            theirs = (lower / np.diag(lower)).T[before : before + len(L)]
            np.testing.assert_allclose(L, theirs, atol=1e-8 * np.abs(theirs).max())
        elif kind == "III":
            np.testing.assert_allclose(L[:, term.columns], np.eye(len(L)), atol=1e-9)
    other = record_of_design(f"y ~ {fixed} + (1 | g)", unbalanced(), contrasts={"a": "sum", "b": "helmert"})
    to_other = np.linalg.lstsq(X, np.asarray(other.design.X), rcond=None)[0]
    for name, L in type_contrasts(other, kind).items():
        np.testing.assert_allclose(L, found[name] @ to_other, atol=1e-8 * np.abs(L).max())


@pytest.mark.parametrize(
    ("without", "with_one"), [("0 + a * b", "a * b"), ("0 + b * a + x", "b * a + x"), ("0 + a + b", "a + b")]
)
def test_a_model_without_intercept_has_the_hypotheses_of_the_same_model_with_one(without, with_one):
    """SAS's: what is adjusted for another factor is adjusted for the mean as well."""
    a, b = (record_of_design(f"y ~ {fixed} + (1 | g)", unbalanced()) for fixed in (without, with_one))
    to_other = np.linalg.lstsq(np.asarray(b.design.X), np.asarray(a.design.X), rcond=None)[0]
    for kind in ("II", "III"):
        ours, wanted = type_contrasts(a, kind), type_contrasts(b, kind)
        assert list(ours) == list(wanted)
        for name, L in wanted.items():
            np.testing.assert_allclose(ours[name], L @ to_other, atol=1e-9, err_msg=name)
    first = type_contrasts(a, "I")[without[4]]
    assert len(first) == unbalanced()[without[4]].nunique()  # nothing comes before it: its means are zero
    alone = type_contrasts(record_of_design("y ~ 0 + b + x + (1 | g)", unbalanced()), "III")["b"]
    np.testing.assert_allclose(alone, np.eye(4)[:3], atol=1e-12)


def test_terms_that_others_determine_have_rows_without_numbers():
    cake = table("cake").assign(temperature=table("cake")["temperature"].astype(str))
    with pytest.warns(mj.DataWarning, match="left out"):
        fit = mj.lmm("angle ~ recipe + temp + temperature + (1 | recipe:replicate)", cake)
    for kind, num_df in (("I", [2, 1, 4]), ("II", [2, 0, 4]), ("III", [2, 0, 4])):
        found = anova(fit.record, kind)
        assert list(found.index) == ["recipe", "temp", "temperature"]
        assert found["num_df"].tolist() == num_df
        assert found.loc["temp"].drop("num_df").isna().all() == (kind != "I")
    expected = anova(mj.lmm("angle ~ recipe + temp + (1 | recipe:replicate)", cake).record, "III")
    np.testing.assert_allclose(found.loc["recipe", "statistic"], expected.loc["recipe", "statistic"], rtol=1e-6)
    assert found.loc["temperature", "statistic"] == pytest.approx(1.631, abs=5e-4)  # lmerTest
    with pytest.warns(mj.DataWarning, match="left out"):
        twice = mj.lmm("angle ~ temp + I(2 * temp) + (1 | recipe:replicate)", cake)
    whole = anova(twice.record, "III", "kenward-roger")
    assert "num_df 0: other terms determine" in repr(whole)
    assert whole["num_df"].tolist() == [0, 0]
    assert whole.drop(columns="num_df").isna().all(axis=None)


def test_truth_values_are_levels():
    frame = unbalanced()
    levels = frame.assign(late=np.where(frame.late, "yes", "no"))
    X = [record_of_design("y ~ a * late + (1 | g)", data) for data in (frame, levels)]
    for kind in TYPES:
        truth, text = (type_contrasts(record, kind) for record in X)
        for name in truth:
            np.testing.assert_allclose(projector(truth[name]), projector(text[name]), atol=1e-12)


def test_an_unknown_type_is_refused():
    with pytest.raises(ValueError, match="got 'KR'; degrees of freedom are ddf='KR'"):
        fit_of("sleepstudy_slopes", "REML").anova("KR")
    with pytest.raises(ValueError, match=r"type must be 'I', 'II' or 'III', got 'IV'$"):
        type_contrasts(fit_of("cake_temp", "REML").record, "IV")
    for number, numeral in ((1, "I"), (2, "II"), (3, "III")):
        found = (type_contrasts(fit_of("cake_temp", "REML").record, t)["recipe"] for t in (number, numeral))
        np.testing.assert_array_equal(*found)


# --- written hypotheses --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "weights", "rhs"),
    [
        ("Days", {"Days": 1}, 0),
        ("Days = 10", {"Days": 1}, 10),
        ("10 = Days", {"Days": -1}, -10),
        (" 2*Days - Intercept ", {"Days": 2, "Intercept": -1}, 0),
        ("Days*2-(Intercept)", {"Days": 2, "Intercept": -1}, 0),
        ("(Intercept) + 5 * Days = 290.5", {"Intercept": 1, "Days": 5}, 290.5),
        ("-(Intercept - Days)/2 = -1e2 + 3", {"Intercept": -0.5, "Days": 0.5}, -97),
        ("Days + 3 = 10 - Intercept", {"Days": 1, "Intercept": 1}, 7),
        ("2 * (3 - .5) * Days = 1/4", {"Days": 5}, 0.25),
        ("- -Days = +1", {"Days": 1}, 1),
    ],
)
def test_equations(text, weights, rhs):
    L, right, names = contrast_matrix(fit_of("sleepstudy_slopes", "REML").record, text)
    expected = [weights.get(name, 0.0) for name in ("Intercept", "Days")]
    np.testing.assert_allclose(L, [expected], rtol=1e-15)
    np.testing.assert_allclose(right, [rhs], rtol=1e-15)
    assert names == [text.strip()]


def test_lme4s_names_are_understood():
    record = fit_of("cake_factor", "REML").record
    fixed = list(record.labels.fixed)
    for ours, theirs in zip(fixed, oracle("cake_factor")["fits"]["REML"]["fixef"], strict=True):
        np.testing.assert_array_equal(contrast_matrix(record, theirs).L, np.eye(len(fixed))[[fixed.index(ours)]])
        np.testing.assert_array_equal(contrast_matrix(record, ours).L, np.eye(len(fixed))[[fixed.index(ours)]])
    L = contrast_matrix(record, "recipe[T.B] = recipeC - recipeB:temperature185").L[0]
    assert {fixed[j]: L[j] for j in np.flatnonzero(L)} == {
        "recipe[T.B]": 1.0,
        "recipe[T.C]": -1.0,
        "recipe[T.B]:temperature[T.185]": 1.0,
    }


def test_names_with_signs_and_spaces():
    frame = unbalanced().assign(
        **{"dose mg": lambda d: np.cos(d.x), "x1": lambda d: np.sin(d.x), "a-b": lambda d: np.sin(3 * d.x)}
    )
    record = record_of_design("y ~ `dose mg` + x + x1 + `a-b` + np.log(x + 9) + bs(x, df=5) + b + (1 | g)", frame)
    fixed = list(record.labels.fixed)
    assert {"dose mg", "x", "x1", "a-b", "np.log(x + 9)", "b[T.q]"} <= set(fixed)
    for name in fixed:
        np.testing.assert_array_equal(contrast_matrix(record, name).L, np.eye(len(fixed))[[fixed.index(name)]])
        L, rhs, _ = contrast_matrix(record, f"2*{name}-3*{name}+x1/4=7")
        np.testing.assert_allclose(L[0], 0.25 * (np.array(fixed) == "x1") - (np.array(fixed) == name))
        assert rhs == [7]
    spline = next(name for name in fixed if name.startswith("bs"))
    for spelling in (
        spline.replace("df=", "df = "),
        spline.replace(", ", ","),
        spline.replace("[", "").replace("]", ""),
    ):
        np.testing.assert_array_equal(contrast_matrix(record, spelling).L[0], np.eye(len(fixed))[fixed.index(spline)])


def test_expressions_mean_what_python_means():
    """Random nested expressions: L beta - rhs is the difference of both sides."""
    rng = np.random.default_rng(0)
    record = fit_of("orthodont", "REML").record
    fixed, values = list(record.labels.fixed), rng.normal(size=4)

    def number():
        return f"{rng.uniform(0.5, 4):.3f}"

    def linear(depth):
        kind = rng.integers(0, 6) if depth else 0
        if kind == 0:
            return str(rng.choice(fixed))
        inner = linear(depth - 1)
        return {
            1: f"{number()} * ({inner})",
            2: f"({inner}) / {number()}",
            3: f"({inner}) - {linear(depth - 1)}",
            4: f"-({inner} + {number()})",
            5: f"{inner} + ({number()} - {number()}) * {rng.choice(fixed)}",
        }[kind]

    count = 0
    for _ in range(60):
        left, right = linear(3), linear(2)
        python = f"({left}) - ({right})"
        for j in np.argsort([-len(name) for name in fixed]):
            python = python.replace(fixed[j], f"v[{j}]")
        expected = eval(python, {"v": values})
        try:
            L, rhs, _ = contrast_matrix(record, f"{left} = {right}")
        except ValueError as error:
            if "no fixed effect is left" not in str(error):  # x = x
                raise
            continue
        np.testing.assert_allclose(L[0] @ values - rhs[0], expected, rtol=1e-12, atol=1e-12)
        count += 1
    assert count > 40


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("Dayz = 1", "no fixed effect 'Dayz'; did you mean 'Days'"),
        ("Days2", "no fixed effect 'Days2'"),
        ("Days:Intercept", "no fixed effect 'Days:Intercept'"),
        ("", "it is empty"),
        ("3 = 4", "no fixed effect is left"),
        ("Days - Days", "no fixed effect is left"),
        ("Days * Days", "not linear"),
        ("1 / Days", "not linear"),
        ("Days / 0", "divides by zero"),
        ("Days +", "breaks off"),
        ("(Days", "parenthesis is not closed"),
        ("Days = 1 = 2", "more than one '='"),
        ("2 Days", r"expected \+, -, \*, / or = before 'Days'"),
        ("Days) = 1", "before '\\)"),
        ("* Days", "expected a fixed effect or a number"),
        ({"Dais": 1}, "did you mean 'Days'"),
        ({"Days": "two"}, "weight of 'Days' must be a finite number"),
        ({"Days": np.nan}, "finite"),
        ({}, "no weight other than zero"),
        ([], r"shape \(0,\), but there are 2 fixed effects: Intercept, Days"),
        ([1, 2, 3], r"shape \(3,\), but there are 2"),
        (np.zeros(2), "no weight other than zero"),
        (np.zeros((0, 2)), "there is no hypothesis"),
        (np.ones((2, 3)), r"shape \(3,\), but there are 2"),
        (np.ones((2, 2, 2)), "got shape"),
        (5.0, r"shape \(\)"),
        (None, "shape"),
        (["Days", None], "shape"),
    ],
)
def test_what_cannot_be_read_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        contrast_matrix(fit_of("sleepstudy_slopes", "REML").record, spec)


def test_a_column_left_out_is_named():
    record = record_of_design("y ~ a * b + (1 | g)", unbalanced(empty=True))
    for spec in ("a[T.v]:b[T.r] = 1", {"a[T.v]:b[T.r]": 1}):
        with pytest.raises(ValueError, match=r"'a\[T.v\]:b\[T.r\]' was left out of the fit"):
            contrast_matrix(record, spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("recipe", "'recipe' is a factor, with the fixed effects recipe[T.B], recipe[T.C]: name one"),
        ("recipe = 0", "emmeans('recipe').contrasts()"),
        ("recipe[T.A] = 0", "'A' is the base level of 'recipe', which the others are differences from"),
        ({"recipe[T.A]": 1}, "there are recipe[T.B], recipe[T.C]"),
        ("recipeb = 0", "or 'recipe[T.B]'?"),
    ],
)
def test_factors_and_base_levels_are_explained(spec, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        contrast_matrix(fit_of("cake_temp", "REML").record, spec)


def test_ways_to_write_the_same():
    record = fit_of("sleepstudy_slopes", "REML").record
    expected = np.array([[0.0, 1.0], [-1.0, 2.0]])
    for spec in (
        expected,
        expected.tolist(),
        list(expected),
        ["Days", "2*Days - Intercept"],
        ["Days", {"(Intercept)": -1, "Days": 2}],
        [[0, 1], "2 * Days = Intercept"],
        pd.DataFrame({"Days": [1, 2], "Intercept": [0, -1]}),
    ):
        np.testing.assert_array_equal(contrast_matrix(record, spec).L, expected)
    assert contrast_matrix(record, expected).names == ["Days", "-Intercept + 2*Days"]
    np.testing.assert_array_equal(contrast_matrix(record, [0, 1]).L, [[0.0, 1.0]])


def test_recoded_factors_give_the_same_f_tests():
    data = table("cake").drop(index=[0, 7, 19, 40, 41])
    formula = "angle ~ recipe * temp + (1 | recipe:replicate)"
    treatment = mj.lmm(formula, data).record
    recoded = mj.lmm(formula, data.sample(frac=1, random_state=1), contrasts={"recipe": "sum"}).record
    for kind, ddf in (("II", "satterthwaite"), ("III", "satterthwaite"), ("III", "kenward-roger")):
        a, b = anova(treatment, kind, ddf), anova(recoded, kind, ddf)
        assert list(a.index) == list(b.index) == ["recipe", "temp", "recipe:temp"]
        # Estimates agree to the optimiser's 1e-6 standard errors or better, the rest to its square root.
        np.testing.assert_allclose(a, b, rtol=1e-5)


def test_functions_of_the_formula_are_those_of_the_fit():
    def fitted():
        def half(z):
            return z / 2

        return record_of_design("y ~ a * half(x) + (1 | g)", unbalanced(), context={"half": half})

    def half(z):
        return z**2

    assert list(type_contrasts(fitted(), "III")) == ["a", "half(x)", "a:half(x)"]
    assert half(4) == 16


def test_an_ml_fit_is_refitted_once_for_kenward_roger():
    fit = mj.lmm("angle ~ recipe + temp + (1 | recipe:replicate)", table("cake"), reml=False)
    with pytest.warns(InferenceWarning, match="refitted by REML") as caught:
        found = anova(fit.record, "III", "kenward-roger")
    assert len(caught) == 1
    np.testing.assert_allclose(found, anova(fit_of("cake_temp", "REML").record, "III", "kenward-roger"), rtol=1e-6)
