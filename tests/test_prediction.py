"""Predictions: of old rows and new tables, against lme4, dense formulas, finite differences and closed forms."""

import json
import warnings
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.stats
from conftest import ORACLES, fit_of, oracle, table
from dense import covariance
from designs import STRUCTURES, random_design, random_lambdas

import mixjax as mj
from mixjax.checks import DataError, DataWarning, InferenceWarning
from mixjax.engine.criterion import in_bases
from mixjax.engine.equations import Equations, covariances_with_slopes, factors_in_bases
from mixjax.engine.modes import conditional_modes
from mixjax.estimation.blup import predict as predict_arrays
from mixjax.estimation.estimate import Estimates
from mixjax.fitted.record import Fitted, OptimizerInfo
from mixjax.prediction import blocks
from mixjax.prediction.blocks import DependentEffects, TooLarge
from mixjax.prediction.bootstrap import bootstrap_errors
from mixjax.prediction.predict import predict
from mixjax.prediction.second_order import second_order
from mixjax.prediction.targets import Targets, effect_rows, relative_factors
from mixjax.products.responses import Responses

CASES = [(name, "REML") for name in ORACLES] + [("sleepstudy_slopes", "ML"), ("pastes_nested", "ML")]
Z95 = scipy.stats.norm.ppf(0.975)


@pytest.fixture(scope="module")
def sleep():
    return fit_of("sleepstudy_slopes", "REML").record


def close(actual, desired, rtol=1e-9, atol=0.0):
    np.testing.assert_allclose(np.asarray(actual, float), np.asarray(desired, float), rtol=rtol, atol=atol)


# --- arrays --------------------------------------------------------------------------------------------------------


def test_arrays_give_the_fitted_values(sleep):
    values = predict_arrays(sleep.estimates, sleep.design)
    assert isinstance(values, np.ndarray)
    close(values, predict(sleep))


def test_arrays_under_transformations(sleep, x64):
    est, design = jax.tree.map(jnp.asarray, sleep.estimates), sleep.design
    close(jax.jit(predict_arrays)(est, design), predict(sleep))
    slopes = jax.jacobian(lambda beta: predict_arrays(est._replace(beta=beta), design))(est.beta)
    close(slopes, design.X)
    by_effect = jax.grad(lambda b: predict_arrays(est._replace(b=(b,)), design)[7])(est.b[0])
    assert by_effect[0].tolist() == [1.0, 7.0]
    assert not by_effect[1:].any()
    two = est._replace(beta=jnp.stack([est.beta, 2 * est.beta]), b=(jnp.stack([est.b[0], 2 * est.b[0]]),))
    axes = est._replace(**dict.fromkeys(est._fields) | {"beta": 0, "b": 0})
    close(jax.vmap(predict_arrays, in_axes=(axes, None))(two, design), [predict(sleep), 2 * predict(sleep)])


def test_arrays_of_another_shape_are_refused(sleep):
    with pytest.raises(ValueError, match="1 columns of X"):
        predict_arrays(sleep.estimates, replace(sleep.design, X=sleep.design.X[:, :1]))
    term = replace(sleep.design.terms[0], n_groups=19)
    with pytest.raises(ValueError, match="19 levels"):
        predict_arrays(sleep.estimates, replace(sleep.design, terms=(term,)))


# --- lme4 ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", CASES, ids="-".join)
def test_lme4s_predictions(case):
    fit, stored = fit_of(*case).record, oracle(case[0])["fits"][case[1]]["predict"]
    tolerance = 1e-6 * float(fit.estimates.sigma)
    new = table(oracle(case[0])["data"]).iloc[stored["row_index0"]]
    new = new.drop(columns=[fit.labels.response])
    close(predict(fit, new, random=False), stored["re_form_NA"], 0, tolerance)
    close(predict(fit, new), stored["re_form_NULL"], 0, tolerance)
    first = new.assign(**{stored["new_level_first"]["variable"]: "new_level"})
    fixed = set(fit.labels.state.fixed.effects.columns)
    if not {stored["new_level_first"]["variable"]} & fixed:
        close(predict(fit, first, allow_new_levels=True), stored["new_level_first"]["re_form_NULL"], 0, tolerance)
    variables = stored["new_level_all"]["variables"]
    if not set(variables) & fixed:
        every = new.assign(**dict.fromkeys(variables, "new_level"))
        close(predict(fit, every, allow_new_levels=True), stored["new_level_all"]["re_form_NULL"], 0, tolerance)
        close(predict(fit, every, allow_new_levels=True), predict(fit, new, random=False))


# --- what the formula learnt ---------------------------------------------------------------------------------------

THRESHOLD = 1.5
FORMULAS = [
    "y ~ bs(x, df=5) + (1 | g)",
    "y ~ cr(x, df=4) + f + (1 | g)",
    "y ~ poly(x, 2) * f + (poly(x, 2) | g)",
    "y ~ center(x) + scale(k) + (center(x) | g)",
    "y ~ C(k) + f:x + (1 | g/h)",
    "y ~ f + t + (1 | g:h) + (1 | t:f)",
    "y ~ x + (0 + f | g) + (1 | h)",
    "y ~ x + (x + f || g)",
    "y ~ np.log1p(x) + I(x > THRESHOLD) + flag + (1 | g)",
    "y ~ x + offset(center(x)) + offset(log(k + 2)) + (1 | g)",
    "y ~ a.dotted + `two words` + (a.dotted | g)",
    "log(y + 20) ~ 0 + f + (1 | k)",
    "y ~ 0 + (1 | g)",
]


def make_table(n=90):
    rng = np.random.default_rng(5)
    g = rng.integers(0, 8, n)
    frame = pd.DataFrame(
        {
            "x": rng.uniform(0, 3, n),
            "k": rng.integers(0, 4, n),
            "f": pd.Categorical(rng.choice(["lo", "mid", "hi"], n), categories=["lo", "mid", "hi"]),
            "t": rng.choice(["u", "v"], n),
            "flag": rng.random(n) < 0.5,
            "g": [f"g{i}" for i in g],
            "h": rng.integers(0, 3, n),
            "a.dotted": rng.normal(size=n),
            "two words": rng.normal(size=n),
        },
        index=[f"row {i}" for i in range(n)],
    )
    frame["y"] = frame["x"] * rng.normal(1.0, 1.0, 8)[g] + rng.normal(size=8)[g] + rng.normal(size=n)
    return frame


TABLE = make_table()


def at_some_theta(design, labels, stats):
    """The record of a model at a theta that nothing was fitted for: to predict needs no optimum, and no compiling."""
    rng = np.random.default_rng(2)
    lambdas = [np.tril(rng.uniform(0.3, 1.0, size=(term.Z.shape[1],) * 2)) for term in design.terms]
    V = covariance(design, [L @ L.T for L in lambdas], 1.0)
    inverse, X = np.linalg.inv(V), design.X
    vcov = np.linalg.inv(X.T @ inverse @ X)
    y = design.y if design.offset is None else design.y - design.offset
    beta = vcov @ X.T @ inverse @ y
    left = inverse @ (y - X @ beta)
    sigma = float(np.sqrt(left @ (y - X @ beta) / (len(y) - len(beta))))
    b = tuple(
        np.stack([term.Z[term.group == i].T @ left[term.group == i] for i in range(term.n_groups)]) @ L @ L.T
        for term, L in zip(design.terms, lambdas, strict=True)
    )
    theta = np.concatenate([L.T[np.triu_indices(len(L))] for L in lambdas])
    Sigma = tuple(sigma**2 * L @ L.T for L in lambdas)
    est = Estimates(theta, beta, sigma, Sigma, sigma**2 * vcov, b, 0.0, True, False, 0, 0.0, 0)
    return Fitted(labels, stats, est, True, OptimizerInfo("none", 0, 0.0, ""), design)


def fit_formula(formula, data=TABLE, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        design, labels = mj.build_design(formula, data, **options)
    return at_some_theta(design, labels, mj.cross_products(design))


def test_the_record_at_some_theta_is_a_fits():
    """Its random effects and fixed effects are those of the likelihood at its theta."""
    fit = fit_formula("y ~ x + (x | g) + (1 | h)")
    with jax.enable_x64(True):
        lambdas = [jnp.asarray(L) for L in relative_factors(fit.estimates.theta, fit.stats.layout.qs)]
        modes = jax.jit(lambda lambdas: conditional_modes(in_bases(lambdas, fit.stats), fit.stats))(lambdas)
    for basis, b, own in zip(fit.stats.Z_bases, modes, fit.estimates.b, strict=True):
        close((basis.R_inv @ np.asarray(b)).T, own, 1e-8, 1e-12)


@pytest.mark.parametrize("formula", FORMULAS)
def test_the_training_table_gives_the_fitted_values(formula):
    fit = fit_formula(formula)
    expected = predict(fit)
    size = np.abs(expected).max()
    population = predict(fit, random=False)
    new = TABLE.drop(columns="y")
    for rows in (slice(None), slice(None, None, -1), [7], [80, 3, 3, 41]):
        values = predict(fit, new.iloc[rows])
        assert values.index.equals(new.index[rows])
        assert values.name == "fitted"
        close(values, expected.iloc[rows], 0, 1e-12 * size)
        close(predict(fit, new.iloc[rows], random=False), population.iloc[rows], 0, 1e-12 * size)
    close(predict(fit, dict(new)), expected, 0, 1e-12 * size)
    assert predict(fit, new.iloc[:0]).shape == (0,)
    old, as_new = predict(fit, interval="prediction"), predict(fit, new, interval="prediction")
    close(as_new, old, 1e-9)


def test_contrasts_and_types_of_columns():
    fit = fit_formula("y ~ f * x + t + (1 | k)", contrasts={"f": "sum", "t": "helmert"})
    expected = predict(fit)
    new = TABLE.iloc[[4, 9]]
    close(predict(fit, new.assign(f=new["f"].astype(str))), expected.iloc[[4, 9]])
    close(predict(fit, new.assign(f=new["f"].cat.set_categories(["hi", "lo", "mid"]))), expected.iloc[[4, 9]])
    close(predict(fit, new.assign(t=pd.Categorical(new["t"]))), expected.iloc[[4, 9]])
    close(predict(fit, new.assign(k=new["k"].astype(float))), expected.iloc[[4, 9]])
    close(predict(fit, new.assign(k=new["k"].astype(str))), expected.iloc[[4, 9]])
    close(predict(fit, new.assign(x=new["x"].astype(object))), expected.iloc[[4, 9]])


def test_names_have_the_values_that_they_had_when_the_fit_was_made():
    threshold = 1.5
    fit = fit_formula("y ~ I(x > threshold) + (1 | g)", context={"threshold": threshold})
    below, above = (predict(fit, TABLE.assign(x=x), random=False) for x in (1.0, 2.0))
    threshold = 0.0
    close(predict(fit, TABLE.assign(x=1.0), random=False), below)
    assert (below != above).all()


def test_a_name_of_the_caller_is_not_mistaken_for_a_missing_column():
    fit = fit_formula("y ~ x + (1 | g)")
    x = 3.0  # noqa: F841
    with pytest.raises(DataError, match="no column 'x'"):
        predict(fit, TABLE[["g"]])


def test_single_values_of_a_dict_stand_for_all_rows():
    fit = fit_formula("y ~ f + x + (1 | g)")
    level = str(TABLE["g"].iloc[0])
    long = predict(fit, {"f": ["lo", "lo"], "x": [0.5, 1.5], "g": [level, level]})
    close(predict(fit, {"f": "lo", "x": [0.5, 1.5], "g": level}), long, 1e-14)
    close(predict(fit, {"f": "lo", "x": 0.5, "g": level}), long.iloc[:1], 1e-14)
    close(predict(fit, {"f": np.array("lo"), "x": jnp.asarray(0.5), "g": np.str_(level)}), long.iloc[:1], 1e-6)
    # A column that this prediction does not read counts rows all the same.
    population = predict(fit, {"f": "lo", "x": 0.5, "g": [level, level, level]}, random=False)
    close(population, [predict(fit, {"f": "lo", "x": 0.5}, random=False).iloc[0]] * 3, 1e-14)
    with pytest.raises(DataError, match=r"different lengths: 'f' \(3,\), 'x' \(2,\)"):
        predict(fit, {"f": ["lo"] * 3, "x": [0.5, 1.5], "g": level})


# --- what is refused or missing ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fit_f():
    return fit_formula("y ~ f + x + C(k) + offset(log(`two words` + 9)) + (x | g) + (1 | g:h)")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": None}, "no column 'x'.*in 'x'"),
        ({"two words": None}, r"no column 'two words'.*offset"),
        ({"h": None}, "no column 'h'.*grouping factor 'g:h'"),
        ({"f": "huge"}, "'f' of newdata has 'huge'.*'lo', 'mid', 'hi'"),
        ({"k": 9}, "'k' of newdata has '9'.*'0', '1', '2', '3'"),
        ({"k": "1"}, "'k' of newdata holds text"),
        ({"f": 2.0}, "'f' of newdata holds numbers.*'lo', 'mid', 'hi'"),
        ({"x": "3"}, "'x' of newdata holds text"),
        ({"x": pd.Timestamp("2020-01-01")}, "'x' of newdata holds datetime64.* values; the fit had numbers"),
        ({"x": np.inf}, "'x' has 3 infinite values"),
        ({"two words": -9.5}, "not finite in 3 rows of newdata"),
        ({"g": "gX"}, "'gX:2', .* of grouping factor 'g:h'; 'gX' of grouping factor 'g'; allow_new_levels=True"),
        ({"h": 7}, "'g.:7'.*of grouping factor 'g:h'"),
    ],
)
def test_bad_tables(fit_f, change, message):
    new = TABLE.iloc[:3].drop(columns=[k for k, v in change.items() if v is None])
    new = new.assign(**{k: v for k, v in change.items() if v is not None})
    with pytest.raises(DataError, match=message):
        predict(fit_f, new)


def test_many_new_levels_are_counted(fit_f):
    new = pd.concat([TABLE.iloc[:1]] * 30).assign(g=[f"new{i}" for i in range(30)])
    with pytest.raises(DataError, match="'new9' and 20 more of grouping factor 'g'"):
        predict(fit_f, new)


def test_only_what_is_asked_for_is_needed(fit_f):
    new = TABLE.iloc[:4]
    population = predict(fit_f, new.drop(columns=["g", "h"]), random=False)
    close(population, predict(fit_f, random=False).iloc[:4])
    without_h = new.drop(columns="h").assign(x=new["x"])
    close(predict(fit_f, without_h, random="g"), predict(fit_f, random="g").iloc[:4])
    # A new response has an effect of a new level of h.
    close(
        predict(fit_f, without_h, random="g", interval="prediction"),
        predict(fit_f, random="g", interval="prediction").iloc[:4],
    )


def test_missing_values_are_counted_and_give_nan(fit_f):
    new = TABLE.iloc[:6].copy()
    new.loc[new.index[1], "x"] = np.nan
    new.loc[new.index[4], "two words"] = np.nan
    with pytest.warns(DataWarning, match=r"2 of 6 rows of newdata have missing values \(.*x 1.*two words 1"):
        values = predict(fit_f, new, interval="confidence")
    assert values.isna().all(axis=1).tolist() == [False, True, False, False, True, False]
    close(values.dropna(), predict(fit_f, interval="confidence").iloc[[0, 2, 3, 5]])
    with pytest.warns(DataWarning, match="2 of 6"):
        predict(fit_f, new, random=False)
    with pytest.warns(DataWarning, match="1 of 1"):
        nothing = predict(fit_f, TABLE.iloc[:1].assign(x=None), interval="prediction")
    assert nothing.isna().all(axis=None)


def test_missing_levels_are_refused_unless_new_ones_are_allowed(fit_f):
    """As in lme4: rows of no known level are predicted by the population only where the user says so."""
    new = TABLE.iloc[:6].copy()
    new["g"] = new["g"].astype(object)
    new.loc[new.index[[2, 4]], "g"] = None
    with pytest.raises(DataError, match=r"2 of 6 rows of newdata have missing levels .*\(g 2\): allow_new_levels=True"):
        predict(fit_f, new)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert predict(fit_f, new, random=False).notna().all()
    # A level that the fixed effects read too is a value without which there is no mean.
    both = fit_formula("y ~ x + h + (1 | h)", TABLE.assign(h=TABLE["h"].astype(str)))
    lost = TABLE.iloc[:3].assign(h=["0", None, "1"])
    for allowed in (True, False):
        with pytest.warns(DataWarning, match="1 of 3 rows of newdata have missing values"):
            assert predict(both, lost, allow_new_levels=allowed).isna().tolist() == [False, True, False]


REFERENCE = json.loads((Path(__file__).parent / "oracle" / "left_out.json").read_text())["predict"]


@pytest.fixture(scope="module")
def crossed():
    data = pd.read_csv(Path(__file__).parent / "data" / "crossed_factorial.csv")
    return mj.lmm(REFERENCE["formula"], data)


@pytest.mark.parametrize("part", REFERENCE["parts"], ids=lambda part: part["parts"])
def test_parts_of_random_effects_are_lme4s(crossed, part):
    """lme4's theta is good to 1e-7, and so are its modes."""
    close(crossed.predict(random=part["parts"]), part["fitted"], atol=5e-7)
    data = crossed.labels.frame
    close(crossed.predict(data, random=part["parts"].removeprefix("~ ").split(" + (")[0]),
          crossed.predict(random=part["parts"].split(" + (")[0]))  # fmt: skip


def test_rows_without_a_level_are_lme4s(crossed):
    new, expected = pd.DataFrame(REFERENCE["new"]), REFERENCE["unknown"]
    assert "NAs are not allowed" in expected["refused"]
    with pytest.raises(DataError, match=r"missing levels of grouping factors \(subj 2, item 2\)"):
        crossed.predict(new)
    with pytest.warns(DataWarning, match="taken as new levels"):
        close(crossed.predict(new, allow_new_levels=True), expected["fitted"], atol=5e-7)
    close(crossed.predict(new, random=False), expected["population"], atol=5e-7)


def test_parts_with_factors_must_be_coded_alike():
    data = pd.read_csv(Path(__file__).parent / "data" / "crossed_factorial.csv")
    fit = mj.lmm("y ~ A + (A * B + I(x^2) | subj) + (1 | subj:item)", data)
    population = fit.predict(random=False)
    Z, b = np.asarray(fit.design.terms[1].Z), fit.estimates.b[1][fit.design.terms[1].group]
    effects = fit.labels.terms[1].effects
    for asked, names in {
        "(A | subj)": ["Intercept", "A[T.a2]", "A[T.a3]"],
        "1 + B + A | subj": ["Intercept", "A[T.a2]", "A[T.a3]", "B[T.b2]"],
        "I(x^2) + 1 | subj": ["Intercept", "I(x ** 2)"],
        "0 + I(x**2) | subj": ["I(x ** 2)"],
    }.items():
        which = [effects.index(name) for name in names]
        close(fit.predict(random=asked) - population, (Z * b)[:, which].sum(axis=1), 1e-9, 1e-12)
    close(fit.predict(random="(1 | item:subj)"), fit.predict(random="subj:item"))
    close(fit.predict(random="(A * B + I(x^2) | subj) + (1 | subj:item)"), fit.predict())
    for wrong in (
        "0 + A | subj",
        "(x | subj)",
        "(1 | item)",
        "(A:B | subj)",
        "1 | subj | item",
        "(1 | subj) + (1 | B)",
    ):
        with pytest.raises(ValueError, match="there is no random term"):
            fit.predict(random=wrong)


def test_warnings_point_at_the_caller():
    data = TABLE.assign(w=2.0)
    fit = with_state(fit_formula("y ~ x + (1 | g)", data, weights="w"), weights=None)
    with pytest.warns(InferenceWarning) as caught:
        predict(fit, TABLE, interval="prediction")
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interval": "both"}, "interval must be None or one of"),
        ({"method": "exact", "interval": "confidence"}, "method must be one of"),
        ({"level": 95, "interval": "confidence"}, "level"),
        ({"random": "school"}, "no random term 'school'; there are 'g:h'"),
        ({"random": 3}, "random must be True, False"),
        ({"allow_new_levels": "yes"}, "allow_new_levels"),
        ({"interval": "confidence", "method": "bootstrap"}, "pass key="),
        ({"interval": "confidence", "method": "bootstrap", "key": 1, "n": 0}, "n must be"),
    ],
)
def test_bad_arguments(fit_f, options, message):
    with pytest.raises(ValueError, match=message):
        predict(fit_f, **options)


def test_missing_levels_are_new_levels_where_these_are_allowed(fit_f):
    new = TABLE.iloc[:6].copy()
    new["g"] = new["g"].astype(object)
    new.loc[new.index[4], "g"] = None
    unknown = new.assign(g=new["g"].where(new["g"].notna(), "nobody"))
    with pytest.warns(DataWarning, match=r"1 of 6 rows of newdata have missing levels .*\(g 1\): taken as new levels"):
        found = predict(fit_f, new, allow_new_levels=True, interval="prediction")
    close(found, predict(fit_f, unknown, allow_new_levels=True, interval="prediction"))
    assert found.notna().all(axis=None)
    with pytest.warns(DataWarning, match="1 of 1 rows"):
        alone = predict(fit_f, new.iloc[[4]], allow_new_levels=True)
    close(alone, found["estimate"].iloc[[4]])


def test_part_of_a_correlated_term():
    """lme4's re.form = ~(0 + Days | Subject) and ~(1 | Subject) of a (Days | Subject) fit, its test-predict.R."""
    fit = fit_of("sleepstudy_slopes", "REML").record
    new = {"Days": [0, 9], "Subject": ["308", "308"]}
    slopes, intercepts = (predict(fit, new, random=name) for name in ("0 + Days | Subject", "(1 | Subject)"))
    np.testing.assert_allclose(slopes, [251.405104848485, 428.401471760037], rtol=1e-6)
    np.testing.assert_allclose(intercepts, [253.663652396798, 347.869226033161], rtol=1e-6)
    both = predict(fit, new, random=["1 | Subject", "0 + Days | Subject"])
    close(both, predict(fit, new))
    close(predict(fit, random="0 + Days|Subject").iloc[:10] - predict(fit, random=False).iloc[:10],
          pd.Series(np.arange(10) * fit.estimates.b[0][0, 1]), 1e-9)  # fmt: skip
    # The error of the mean, by hand: at day 0 the slope does not count, so it is that of the population.
    close(predict(fit, new, random="0 + Days | Subject", interval="confidence")["std_error"].iloc[[0]],
          predict(fit, new, random=False, interval="confidence")["std_error"].iloc[[0]])  # fmt: skip
    with pytest.raises(ValueError, match="some effects of a term"):
        predict(fit, new, random="1 | Subject", interval="prediction")
    with pytest.raises(ValueError, match=r"no random term 'age \| Subject'"):
        predict(fit, new, random="age | Subject")


def test_terms_of_factors_and_interactions_by_their_formula():
    data = TABLE.assign(f=np.resize(["p", "q"], len(TABLE)), z=np.resize([0.5, -1.0, 2.0], len(TABLE)))
    fit = fit_formula("y ~ x + (0 + f | g) + (0 + x:z | h)", data)
    close(predict(fit, random="0 + f | g"), predict(fit, random="g"))
    close(predict(fit, random="0 + z:x | h"), predict(fit, random="h"))
    one = predict(fit, random="0 + f[q] | g") - predict(fit, random=False)
    assert ((one == 0) == (data["f"] == "p").to_numpy()).all()


def test_some_of_the_terms():
    fit = fit_formula("y ~ x + (x || g) + (1 | h)")
    names = ["1 | g", "0 + x | g", "h"]
    population = predict(fit, random=False)
    parts = [predict(fit, random=name) - population for name in names]
    close(population + sum(parts), predict(fit), 1e-12)
    close(predict(fit, random="g"), population + parts[0] + parts[1], 1e-12)
    close(predict(fit, random=["(1|g)", "h"]), population + parts[0] + parts[2], 1e-12)
    assert np.abs(parts[1]).max() > 0
    close(predict(fit, random="g.1") - population, parts[1])
    close(predict(fit, random=[]), population)


def test_levels_made_of_several_columns_are_not_confused():
    data = TABLE.assign(a=np.where(TABLE["h"] == 0, "p", "p:q"), b=np.where(TABLE["h"] == 0, "q:r", "r"))
    data.loc[data["h"] == 2, ["a", "b"]] = ["p", "r"]
    fit = fit_formula("y ~ x + (1 | a:b)", data)
    close(predict(fit, data), predict(fit), 1e-12)
    assert len(set(fit.labels.terms[0].levels)) < len(fit.labels.terms[0].levels)


# --- offsets and weights -------------------------------------------------------------------------------------------


def with_state(fit, **changes):
    return replace(fit, labels=replace(fit.labels, state=replace(fit.labels.state, **changes)))


def test_offset_given_beside_the_formula():
    off = np.linspace(0, 3, len(TABLE))
    fit = fit_formula("y ~ x + offset(k) + (1 | g)", offset=off)
    with pytest.raises(DataError, match="offset= as an array"):
        predict(fit, TABLE)
    named = with_state(fit, offset="off", offset_beside=False)
    close(predict(named, TABLE.assign(off=off)), predict(fit), 1e-12)
    with pytest.raises(DataError, match=r"no column 'off'.*offset='off'"):
        predict(named, TABLE)


def test_weights_of_new_responses():
    data = TABLE.assign(w=np.linspace(0.5, 2, len(TABLE)))
    fit = fit_formula("y ~ x + (1 | g)", data, weights="w")
    sigma2, old = float(fit.estimates.sigma) ** 2, predict(fit, interval="prediction")
    mean = predict(fit, interval="confidence")
    close(old["std_error"] ** 2, mean["std_error"] ** 2 + sigma2 / data["w"])
    close(predict(with_state(fit, weights="w"), data, interval="prediction"), old, 1e-12)
    with pytest.warns(InferenceWarning, match="weights of newdata are not known"):
        new = predict(with_state(fit, weights=None), TABLE, interval="prediction")
    close(new["std_error"] ** 2, mean["std_error"] ** 2 + sigma2)
    with pytest.raises(DataError, match=r"no column 'w'.*weights='w'"):
        predict(with_state(fit, weights="w"), TABLE, interval="prediction")
    close(predict(with_state(fit, weights="w"), TABLE), predict(fit), 1e-12)
    with pytest.raises(DataError, match="weights must be positive"):
        predict(with_state(fit, weights="w"), data.assign(w=0.0), interval="prediction")


# --- columns left out of the fit -----------------------------------------------------------------------------------


def test_rows_that_a_rank_deficient_fit_cannot_estimate():
    data = TABLE.assign(twice=2 * TABLE["x"] + 1)
    fit = fit_formula("y ~ x + twice + (1 | g)", data)
    assert fit.labels.dropped_columns == ("twice",)
    close(predict(fit, data), predict(fit), 1e-12)
    new = data.iloc[:3].assign(twice=[data["twice"].iloc[0], 0.0, data["twice"].iloc[2]])
    with pytest.warns(InferenceWarning, match="1 rows of newdata cannot be estimated.*twice"):
        values = predict(fit, new, interval="prediction")
    assert values.isna().all(axis=1).tolist() == [False, True, False]
    close(values.iloc[[0, 2]], predict(fit, interval="prediction").iloc[[0, 2]])


# --- rows that were not kept ---------------------------------------------------------------------------------------


def test_streamed_fits_predict_new_tables():
    formula, data = "y ~ x + f + (x | g) + (1 | h) + (1 | f:h)", TABLE
    chunks = [data[i : i + 30] for i in range(0, len(data), 30)]
    whole, (stats, labels) = fit_formula(formula), mj.cross_products_from(chunks, formula)
    streamed = replace(whole, kept=None, stats=stats, labels=labels)
    for options in ({}, {"random": False}, {"interval": "confidence"}, {"interval": "prediction", "random": "h"}):
        close(predict(streamed, data, **options), predict(whole, data, **options), 1e-9)
    with pytest.raises(ValueError, match="made from chunks"):
        predict(streamed)
    with pytest.raises(DataError, match="'f' of newdata has 'huge'"):
        predict(streamed, data.assign(f="huge"))
    with pytest.raises(DataError, match="'x' of newdata holds"):
        predict(streamed, data.assign(x="a"))
    with pytest.raises(DataError, match="no column 'x'"):
        predict(streamed, data.drop(columns="x"))


# --- Henderson's variances -----------------------------------------------------------------------------------------


def random_targets(design, seed, m=6, new=False):
    """Rows of any levels; terms on one factor have one level."""
    rng = np.random.default_rng(seed)
    shared = {}
    level = tuple(
        shared.setdefault(term.group.tobytes(), rng.integers(-1 if new else 0, term.n_groups, m))
        for term in design.terms
    )
    Z = tuple(rng.normal(size=(m, term.Z.shape[1])) for term in design.terms)
    return Targets(rng.normal(size=(m, design.X.shape[1])), np.zeros(m), Z, level, rng.uniform(size=m) * new)


def dense_prediction(design, targets, D, sigma):
    """Variance of the error, weights of y in the predictor ``(n, m)``, and V, by generalised least squares."""
    V = covariance(design, [sigma**2 * own for own in D], sigma)
    n, m = len(design.y), len(targets.X)
    between, own = np.zeros((n, m)), sigma**2 * targets.noise
    for term, S, Z, level in zip(design.terms, D, targets.Z, targets.level, strict=True):
        S = sigma**2 * S
        own = own + np.einsum("ma,ab,mb->m", Z, S, Z)
        same = term.group[:, None] == level
        between += same * (term.Z @ S @ Z.T)
    inverse, X = np.linalg.inv(V), design.X
    G = np.linalg.inv(X.T @ inverse @ X)
    d = targets.X.T - X.T @ inverse @ between
    weights = inverse @ (between + X @ G @ d)
    variance = own - np.einsum("nm,nk,km->m", between, inverse, between) + np.einsum("pm,pq,qm->m", d, G, d)
    return variance, weights, V


@pytest.mark.parametrize("singular", [False, True])
@pytest.mark.parametrize("name", STRUCTURES)
def test_three_ways_to_hendersons_variance(name, singular):
    design = random_design(STRUCTURES[name], 3)
    stats, lambdas, sigma = mj.cross_products(design), random_lambdas(design, 1, singular), 1.3
    targets = random_targets(design, 2)
    expected = dense_prediction(design, targets, [L @ L.T for L in lambdas], sigma)[0]
    factors, rows = factors_in_bases(lambdas, stats), effect_rows(targets, stats)
    close(sigma**2 * Equations(stats, factors).variance(rows), expected, 1e-10)
    close(sigma**2 * Equations(stats, factors, most_dense=0).variance(rows), expected, 1e-10)
    close(sigma**2 * DependentEffects(stats, rows).variance(factors), expected, 1e-10)


def test_population_errors_are_those_of_the_fixed_effects(sleep):
    result = predict(sleep, random=False, interval="confidence")
    X = sleep.design.X
    close(result["std_error"] ** 2, np.einsum("np,pq,nq->n", X, sleep.estimates.vcov, X))
    close(result["upper"] - result["estimate"], Z95 * result["std_error"])
    new = predict(sleep, random=False, interval="prediction")
    Z, Sigma = sleep.design.terms[0].Z, sleep.estimates.Sigma[0]
    both = np.einsum("na,ab,nb->n", Z, Sigma, Z) + float(sleep.estimates.sigma) ** 2
    close(new["std_error"] ** 2, result["std_error"] ** 2 + both)


def test_new_levels_add_their_variance(sleep):
    new = {"Days": [0.0, 4.0, 20.0], "Subject": ["nobody"] * 3}
    for interval in ("confidence", "prediction"):
        result = predict(sleep, new, allow_new_levels=True, interval=interval)
        population = predict(sleep, new, random=False, interval=interval)
        close(result["estimate"], population["estimate"])
        Z = np.column_stack([np.ones(3), new["Days"]])
        own = np.einsum("na,ab,nb->n", Z, sleep.estimates.Sigma[0], Z)
        close(result["std_error"] ** 2, population["std_error"] ** 2 + (own if interval == "confidence" else 0.0))


def test_a_balanced_one_way_layout_in_closed_form():
    fit = fit_of("dyestuff", "REML").record
    m, n = 6, 5
    s2, s2_b = float(fit.estimates.sigma) ** 2, float(fit.estimates.Sigma[0][0, 0])
    of_mean = s2_b + s2 / n
    shrink = s2_b / of_mean
    naive = s2_b * (1 - shrink) + (1 - shrink) ** 2 * of_mean / m
    result = predict(fit, interval="confidence")
    close(result["std_error"], np.sqrt(naive), 1e-8)
    # MSB and MSW are independent, each a multiple of chi-square: var(log(1 - shrink)) = 2/(m-1) + 2/(m(n-1)).
    g3 = (1 - shrink) ** 2 * (2 / (m - 1) + 2 / (m * (n - 1))) * of_mean * (1 - 1 / m)
    result = predict(fit, interval="confidence", method="second-order")
    close(result["std_error"], np.sqrt(naive + 2 * g3), 1e-8)
    # The variance is s2 / n + s2^2 / (n^2 of_mean) * (1/m - 1): of two independent mean squares.
    wrong = s2 / n * (1 - (1 - shrink) * (1 - 1 / m))
    close(wrong, naive, 1e-10)
    slopes = np.array([wrong - s2 / n * (1 - shrink) * (1 - 1 / m), s2 / n * (1 - shrink) * (1 - 1 / m)])
    df = 2 * naive**2 / (slopes**2 @ [2 / (m * (n - 1)), 2 / (m - 1)])
    width = (result["upper"] - result["estimate"]) / result["std_error"]
    close(width, scipy.stats.t.ppf(0.975, df), 1e-7)


def test_second_order_of_the_population_is_satterthwaites(sleep):
    mean = predict(sleep, {"Days": [0.0]}, random=False, interval="confidence", method="second-order").iloc[0]
    test = mj.satterthwaite(sleep.estimates, sleep.stats, [1.0, 0.0])
    close([mean["estimate"], mean["std_error"]], [test.estimate[0], test.se[0]])
    close(mean["upper"], mean["estimate"] + scipy.stats.t.ppf(0.975, test.df[0]) * mean["std_error"])


@pytest.mark.parametrize("name", STRUCTURES)
def test_second_order_parts_against_finite_differences(name):
    design = random_design(STRUCTURES[name], 3)
    stats, targets = mj.cross_products(design), random_targets(design, 2, new=True)
    rng = np.random.default_rng(8)
    k, sigma = stats.layout.k, 1.3
    x, A = rng.normal(size=k), rng.normal(size=(k + 1, k + 1))
    A = A @ A.T

    def dense(x):
        return dense_prediction(design, targets, covariances_with_slopes(x, stats)[2], sigma)

    variance, _, V = dense(x)
    h = 1e-5
    moved = [(dense(x + step), dense(x - step)) for step in h * np.eye(k)]
    slopes = np.array([(up[0] - down[0]) / (2 * h) for up, down in moved] + [2 * variance])
    weights = np.array([(up[1] - down[1]) / (2 * h) for up, down in moved])
    g3 = np.einsum("knm,kl,nj,ljm->m", weights, A[:k, :k], V, weights, optimize=True)
    found = second_order(stats, targets, x, np.array(sigma), A)
    close(found.naive, variance, 1e-10)
    close(found.correction, g3, 1e-6)
    close(found.df, 2 * variance**2 / np.einsum("km,kl,lm->m", slopes, A, slopes), 1e-6)
    # Many values of theta at once.
    xs, sigmas = np.stack([x, 0.5 * x]), np.array([sigma, 2.0])
    many = second_order(stats, targets, xs, sigmas, np.stack([A, 2 * A]))
    alone = second_order(stats, targets, xs[1], sigmas[1], 2 * A)
    for both, one in zip(many, alone, strict=True):
        close(both[1], one, 1e-9)


def test_targets_in_chunks_and_large_blocks(monkeypatch):
    design = random_design(STRUCTURES["nested"], 3)
    stats, targets = mj.cross_products(design), random_targets(design, 2, m=9)
    lambdas = random_lambdas(design, 1, False)
    factors, rows = factors_in_bases(lambdas, stats), effect_rows(targets, stats)
    whole = DependentEffects(stats, rows)
    expected = whole.variance(factors)
    monkeypatch.setattr(blocks, "CHUNK", 1)
    close(DependentEffects(stats, rows).variance(factors), expected)
    monkeypatch.setattr(blocks, "SMALL", 0)
    close(DependentEffects(stats, rows).variance(factors), expected)
    monkeypatch.setattr(blocks, "MOST", 10)
    with pytest.raises(TooLarge, match="random effects depend on each other"):
        DependentEffects(stats, rows)


def test_levels_of_separate_blocks_in_one_target():
    """Nested factors: a target may bring together an inner level and an outer one that no row has together."""
    design = random_design(STRUCTURES["nested"], 3)
    stats, lambdas = mj.cross_products(design), random_lambdas(design, 1, False)
    inner, outer = design.terms
    parent = dict(zip(inner.group, outer.group, strict=True))
    level = (np.array([inner.group[0]]), np.array([next(g for g in outer.group if g != parent[inner.group[0]])]))
    targets = Targets(np.ones((1, 2)), np.zeros(1), (np.ones((1, 1)), np.ones((1, 2))), level, np.zeros(1))
    expected = dense_prediction(design, targets, [L @ L.T for L in lambdas], 1.0)[0]
    factors, rows = factors_in_bases(lambdas, stats), effect_rows(targets, stats)
    close(Equations(stats, factors).variance(rows), expected, 1e-10)
    close(DependentEffects(stats, rows).variance(factors), expected, 1e-10)


def test_factors_that_are_one_in_the_fit_but_not_in_newdata():
    data = TABLE.assign(g2=TABLE["g"])
    fit = fit_formula("y ~ x + (1 | g) + (0 + x | g2)", data)
    new = data.iloc[:2].assign(g2="g0", g=["g0", "g1"])
    assert predict(fit, new).notna().all()
    with pytest.raises(ValueError, match="same levels in all rows of the fit, but not in newdata"):
        predict(fit, new, interval="confidence")


# --- invariance ----------------------------------------------------------------------------------------------------


def refit(formula, data=TABLE):
    return mj.lmm(formula, data).record


@pytest.mark.parametrize("method", ["henderson", "second-order"])
def test_units_and_order_do_not_matter(method):
    formula, options = "y ~ x + (x | g)", {"interval": "prediction", "method": method}
    plain = predict(refit(formula), TABLE.iloc[:5], **options)
    shuffled = TABLE.sample(frac=1, random_state=1)
    close(predict(refit(formula, shuffled), TABLE.iloc[:5], **options), plain, 1e-6)
    scaled = TABLE.assign(y=100 * TABLE["y"], x=1000 * TABLE["x"] + 5000)
    close(predict(refit(formula, scaled), scaled.iloc[:5], **options), 100 * plain, 1e-6)
    renamed = TABLE.assign(g="z" + TABLE["g"].str[::-1])
    close(predict(refit(formula, renamed), renamed.iloc[:5], **options), plain, 1e-6)


def test_far_from_zero_no_digits_are_lost():
    """A covariate of calendar seconds: variances do not come from differences of large numbers."""
    near, far = (TABLE.assign(x=(TABLE["x"] * 64).round() / 64 + shift) for shift in (0.0, 2.0**24))
    results = [predict(refit("y ~ x + (1 | g)", t), t.iloc[:9], interval="confidence") for t in (near, far)]
    close(results[1], results[0], 1e-6)


# --- singular fits, ML ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in ORACLES if name.startswith(("singular", "dyestuff2"))])
def test_singular_fits(name):
    fit = fit_of(name, "REML").record
    lambdas = relative_factors(fit.estimates.theta, fit.stats.layout.qs)
    design = fit.design
    Z = tuple(np.asarray(t.Z)[:5] for t in design.terms)
    targets = Targets(design.X[:5], np.zeros(5), Z, tuple(t.group[:5] for t in design.terms), np.zeros(5))
    expected = np.sqrt(dense_prediction(design, targets, [L @ L.T for L in lambdas], float(fit.estimates.sigma))[0])
    close(predict(fit, interval="confidence")["std_error"].iloc[:5], expected, 1e-9)
    with pytest.warns(InferenceWarning, match="singular fit"):
        result = predict(fit, interval="prediction", method="second-order")
    assert np.isfinite(result).all(axis=None)


def test_second_order_needs_reml():
    with pytest.raises(ValueError, match="reml=True"):
        predict(fit_of("dyestuff", "ML").record, interval="confidence", method="second-order")


# --- bootstrap -----------------------------------------------------------------------------------------------------


def test_bootstrap_errors_are_those_of_refits(sleep):
    """Every error again by a refit of its own: the drawn response is found from the target that is the row itself."""
    design = sleep.design
    m = sleep.nobs
    Z, level = (design.terms[0].Z,), (design.terms[0].group,)
    rows = Targets(design.X, np.zeros(m), Z, level, np.zeros(m))
    drawn = {}
    original = Responses.products

    def spy(own, Y):
        drawn["Y"] = Y
        return original(own, Y)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Responses, "products", spy)
        errors = bootstrap_errors(sleep, rows, 3, 4)
    for i in (0, 3):
        refit = mj.lmm("Reaction ~ Days + (Days | Subject)", sleep.labels.frame.assign(Reaction=drawn["Y"][i])).record
        again = predict(refit, interval="confidence")
        close(errors.scale[i], again["std_error"], 1e-6)
        truth = again["estimate"] - errors.error[i]
        # The truth lies in the span of a line per subject, and leaves residuals of the fit's sigma.
        by_subject = truth.to_numpy().reshape(18, 10)
        close(np.diff(by_subject, 2), 0.0, atol=1e-8 * np.abs(by_subject).max())
        left = drawn["Y"][i] - truth
        assert 0.75 < left.std() / float(sleep.estimates.sigma) < 1.25
    spread = bootstrap_errors(sleep, rows.take([0, 9]), 3, 4)
    assert spread.error.shape == (4, 2)


def test_bootstrap_intervals(sleep):
    new = {"Days": [5.0, 5.0], "Subject": ["308", "nobody"]}
    options = {"allow_new_levels": True, "interval": "prediction", "key": 4}
    found = predict(sleep, new, method="bootstrap", n=2000, **options)
    pd.testing.assert_frame_equal(found, predict(sleep, new, method="bootstrap", n=2000, **options))
    other = predict(sleep, new, method="second-order", **options)
    close(found["estimate"], other["estimate"])
    # 2000 replicates: standard errors to 1.6 %, 95 % quantiles to about 3 %; four of these.
    close(found["std_error"], other["std_error"], 0.07)
    close(found["upper"] - found["lower"], other["upper"] - other["lower"], 0.12)


def test_bootstrap_of_crossed_factors_and_excluded_terms():
    fit = fit_of("penicillin", "REML").record
    for interval, random in (("confidence", True), ("prediction", "plate"), ("confidence", False)):
        options = {"interval": interval, "random": random}
        found = predict(fit, fit.labels.frame[:2], method="bootstrap", key=1, n=1000, **options)
        close(found["std_error"], predict(fit, fit.labels.frame[:2], **options)["std_error"], 0.12)


def test_bootstrap_where_blocks_are_too_large(sleep, monkeypatch):
    new = {"Days": [5.0], "Subject": ["308"]}
    expected = predict(sleep, new, interval="confidence", method="bootstrap", key=4, n=20)
    monkeypatch.setattr(blocks, "MOST", 1)
    close(predict(sleep, new, interval="confidence", method="bootstrap", key=4, n=20), expected)


def test_information_of_the_fit_is_in_the_coordinates_of_the_slopes(sleep):
    """The covariances that the coordinates stand for are the fit's own."""
    info = sleep.information
    D = covariances_with_slopes(info.x, sleep.stats)[2]
    close(D[0] * float(sleep.estimates.sigma) ** 2, sleep.estimates.Sigma[0], 1e-8)
