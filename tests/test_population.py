"""Simulated populations: distributions, structure, reproducibility to the bit, and errors that name the variable."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy import stats
from test_simulate import moment_scores

import mixjax as mj
from mixjax.checks import DataError
from mixjax.families.sampling import poisson as poisson_counts
from mixjax.populations import draws
from mixjax.populations.expressions import FUNCTIONS, Kind, Scope, bind, evaluate
from mixjax.populations.factors import categorical, dirichlet, factor, occasion
from mixjax.populations.noise import contaminated_normal, shifted_gamma, skew_normal, student_t
from mixjax.populations.population import population
from mixjax.populations.predictors import (
    bernoulli,
    custom,
    derived,
    empirical,
    multivariate_normal,
    normal,
    poisson,
    uniform,
)
from mixjax.populations.responses import LINKS, random_effects, response

N = 100_000
# Two-sided, of four standard errors.
LEAST = 6.3e-5


def exponential(key, n):
    return jax.random.exponential(key, (n,))


def laplace(key, shape):
    return jax.random.laplace(key, shape) / np.sqrt(2)


@pytest.fixture(scope="module")
def schools():
    """Nested factors, covariates of levels, random slopes, by_level: most of what there is."""
    return population(
        school=factor(6),
        classroom=factor(3, within="school", balance="cycle"),
        group=categorical(["t", "c"]),
        x=normal(0, 1),
        size=normal("by_level(school, [1, 2, 3, 4, 5, 6])", 0.1, by="school"),
        room=normal("10 * size", 0, by="classroom"),
        a=random_effects("school", sd=(1.0, 0.5), cor=0.3),
        c=random_effects("classroom", sd=0.4),
        y=response("50 + a[0] + c + (0.3 + a[1]) * x + by_level(group, {'t': 2, 'c': 0})", error_scale="0.5 + x**2"),
        z=response("y - 50", family="binomial"),
    )


@pytest.fixture(scope="module")
def wide():
    """One large sample of every distribution."""
    pop = population(
        normal=normal(2, 3),
        uniform=uniform(-1, 3),
        bernoulli=bernoulli(0.3),
        few=poisson(2.5),
        own=custom(exponential),
        arm=categorical(["a", "b", "c"], [0.2, 0.0, 0.8]),
        equal=categorical(7),
        body=multivariate_normal([1, "uniform"], [[4, 3], [3, 9]], names=["height", "weight"]),
        twice=derived("2 * uniform"),
        heavy=response("0", error_scale=2, error=student_t(3)),
        raw=response("0", error_scale=2, error=student_t(3, standardize=False)),
        skewed=response("0", error_scale=1, error=skew_normal(-4)),
        gamma=response("1", error_scale=3, error=shifted_gamma(1.5)),
        outliers=response("0", error_scale=1, error=contaminated_normal(0.1, 5)),
        users=response("0", error_scale=1, error=laplace),
        spread=response("0", error_scale="1 + (uniform > 1)"),
        hits=response("0.5", family="binomial", trials=12),
        yes=response("-0.5", family="binomial", link="probit"),
        counts=response("log(4)", family="poisson"),
    )
    return pop.sample_x(N, key=1).sample_y(key=2)


# --- distributions ---------------------------------------------------------------------------------------------------


def contaminated_cdf(x):
    sd = np.sqrt(0.9 + 0.1 * 25)
    return 0.9 * stats.norm.cdf(x * sd) + 0.1 * stats.norm.cdf(x * sd / 5)


def skew_cdf(x):
    own = stats.skewnorm(-4)
    return own.cdf(own.mean() + x * own.std())


@pytest.mark.parametrize(
    ("name", "cdf"),
    [
        ("normal", stats.norm(2, 3).cdf),
        ("uniform", stats.uniform(-1, 4).cdf),
        ("own", stats.expon.cdf),
        ("height", stats.norm(1, 2).cdf),
        ("twice", stats.uniform(-2, 8).cdf),
        ("heavy", lambda y: stats.t(3).cdf(y / 2 * np.sqrt(3))),
        ("raw", lambda y: stats.t(3).cdf(y / 2)),
        ("skewed", skew_cdf),
        ("gamma", lambda y: stats.gamma(1.5).cdf((y - 1) / 3 * np.sqrt(1.5) + 1.5)),
        ("outliers", contaminated_cdf),
        ("users", stats.laplace(scale=1 / np.sqrt(2)).cdf),
    ],
)
def test_continuous_distributions(wide, name, cdf):
    assert stats.kstest(wide[name], cdf).pvalue > LEAST


@pytest.mark.parametrize(
    ("name", "own"),
    [
        ("bernoulli", stats.bernoulli(0.3)),
        ("few", stats.poisson(2.5)),
        ("hits", stats.binom(12, stats.logistic.cdf(0.5))),
        ("yes", stats.bernoulli(stats.norm.cdf(-0.5))),
        ("counts", stats.poisson(4)),
    ],
)
def test_counts(wide, name, own):
    assert wide[name].dtype == np.int64
    assert count_test(wide[name].to_numpy(), own) > LEAST


def count_test(values, own):
    """p value of the chi-square test, rare counts taken together."""
    k = np.arange(values.max() + 1)
    common = N * own.pmf(k) > 10
    observed, expected = np.bincount(values)[common], N * own.pmf(k[common])
    observed, expected = np.append(observed, N - observed.sum()), np.append(expected, N - expected.sum())
    if expected[-1] < 10:
        observed, expected = (np.append(a[:-2], a[-2:].sum()) for a in (observed, expected))
    return stats.chisquare(observed, expected).pvalue


def test_levels_have_their_probabilities(wide):
    counts = wide["arm"].value_counts()
    assert counts["b"] == 0
    assert abs(counts["a"] - 0.2 * N) < 4 * np.sqrt(0.16 * N)
    assert stats.chisquare(wide["equal"].value_counts()).pvalue > LEAST
    assert list(wide["arm"].cat.categories) == ["a", "b", "c"]


def test_covariance_of_correlated_predictors(wide):
    z = wide[["height", "weight"]].to_numpy() - np.column_stack([np.ones(N), wide["uniform"]])
    for scores in moment_scores(z, np.zeros(2), np.array([[4.0, 3], [3, 9]])):
        assert np.abs(scores).max() < 4


def test_error_scale_is_the_standard_deviation_of_each_row(wide):
    for high, sd in ((False, 1.0), (True, 2.0)):
        y = wide["spread"][(wide["uniform"] > 1) == high]
        assert stats.kstest(y, stats.norm(0, sd).cdf).pvalue > LEAST


@pytest.mark.parametrize("mean", [0.0, 1e-3, 9.99, 10.0, 30.0, 1e4, 1e9])
def test_poisson_counts_over_all_means(mean):
    """The distribution, and mean and variance, whose error is that of a fourth moment of 3 + 1 / mean."""
    with jax.enable_x64(True):
        counts = np.asarray(jax.jit(poisson_counts)(jax.random.key(3), jnp.full(N, mean)))
    if mean == 0:
        assert not counts.any()
        return
    assert abs(counts.mean() - mean) < 4 * np.sqrt(mean / N)
    assert abs(((counts - mean) ** 2).mean() / mean - 1) < 4 * np.sqrt((2 + 1 / mean) / N)
    assert (counts == np.floor(counts)).all()
    assert counts.min() >= 0
    if 1 < mean < 100:
        assert count_test(counts.astype(int), stats.poisson(mean)) > LEAST
    if mean > 1e8:
        assert stats.kstest(counts, stats.norm(mean, np.sqrt(mean)).cdf).pvalue > LEAST


COV = np.array([[2.0, -0.6, 0.0], [-0.6, 1.0, 0.3], [0.0, 0.3, 0.5]])
KURTOSIS = {"normal": 3.0, "student": 3 + 6 / 8, "skewed": 4.0, "gamma": 5.0, "laplace": 6.0}


@pytest.fixture(scope="module")
def effects():
    own = {
        "normal": "normal",
        "student": student_t(12),
        "skewed": skew_normal(3),
        "gamma": shifted_gamma(3),
        "laplace": laplace,
    }
    pop = population(
        g=factor(N // 4, balance="cycle"),
        **{name: random_effects("g", cov=COV, distribution=distribution) for name, distribution in own.items()},
        y=response("gamma[2]", error_scale=0),
    )
    drawn = pop.sample_many(5, 1, N // 4, effects=True)
    np.testing.assert_allclose(drawn["y"], drawn["gamma_2"], rtol=1e-9, atol=1e-12)
    return {name: np.column_stack([drawn[f"{name}_{j}"][0] for j in range(3)]) for name in own}


@pytest.mark.parametrize("name", KURTOSIS)
def test_covariance_of_random_effects(effects, name):
    """The covariance stated is the covariance drawn; the standard error has the largest kurtosis in it."""
    b, d = effects[name], np.diag(COV)
    n = len(b)
    assert np.abs(b.mean(axis=0) / np.sqrt(d / n)).max() < 4
    error = np.sqrt((COV**2 + np.outer(d, d)) * (KURTOSIS[name] - 1) / 2 / n)
    assert np.abs((b.T @ b / n - COV) / error).max() < 4


def test_student_effects_of_one_level_are_far_out_together(effects):
    """Multivariate t, uncorrelated with variance 1: E z_i^2 z_j^2 = (df - 2) / (df - 4). Of normal effects it is 1."""
    for name, expected in (("student", 10 / 8), ("normal", 1.0)):
        products = effects[name][:, 0] ** 2 / 2.0 * effects[name][:, 2] ** 2 / 0.5
        assert abs(products.mean() - expected) < 4 * products.std() / np.sqrt(len(products))
        assert 4 * products.std() / np.sqrt(len(products)) < 0.25  # tells the two apart


def test_marginal_covariance_of_a_mixed_model():
    """Two crossed factors, random slopes, heteroscedastic errors: Z Sigma Z' + diag(scale^2) and the mean."""
    pop = population(
        g=factor(3, balance="blocks"), h=factor(4, balance="cycle"), x=normal(),
        a=random_effects("g", sd=(1.0, 0.5), cor=-0.4), b=random_effects("h", cov=0.7),
        y=response("3 + 2 * x + a[0] + a[1] * x + b", error_scale="0.5 + abs(x)"),
    )  # fmt: skip
    drawn = pop.sample_many(4, 20_000, 12)
    g, h, x = (np.asarray(drawn[name][0]) for name in ("g", "h", "x"))
    Z = np.column_stack([np.ones(12), x])
    V = (
        (Z @ [[1, -0.2], [-0.2, 0.25]] @ Z.T) * (g[:, None] == g)
        + 0.7 * (h[:, None] == h)
        + np.diag((0.5 + abs(x)) ** 2)
    )
    for scores in moment_scores(np.asarray(drawn["y"]), 3 + 2 * x, V):
        assert np.abs(scores).max() < 4
        assert np.sqrt((scores**2).mean()) > 0.5


def test_links():
    inverse = {"log": np.exp, "cloglog": lambda e: 1 - np.exp(-np.exp(e)), "identity": lambda e: e, "sqrt": np.square}
    cases = {
        "a": ("gaussian", "log", 0.4), "b": ("binomial", "cloglog", -0.3), "c": ("binomial", "log", -0.7),
        "d": ("binomial", "identity", 0.2), "e": ("poisson", "sqrt", 1.7),
    }  # fmt: skip
    responses = {
        name: response(str(eta), family, link, error_scale=0.1 if family == "gaussian" else None)
        for name, (family, link, eta) in cases.items()
    }
    table = population(**responses).sample_x(N, key=1).sample_y(key=2)
    for name, (_, link, eta) in cases.items():
        assert abs(table[name].mean() - inverse[link](eta)) < 4 * table[name].std() / np.sqrt(N)
    assert {*inverse, "logit", "probit"} == set(LINKS)  # the last two: test_counts


# --- structure -------------------------------------------------------------------------------------------------------


def test_nested_levels_belong_to_one_parent(schools):
    table = schools.sample_x(40, key=1).to_frame()
    assert (table.groupby("classroom", observed=True)["school"].nunique() == 1).all()
    assert (table["classroom"].str.split("/").str[0] == table["school"].astype(str)).all()
    assert len(schools.levels("classroom")) == 18
    sizes = table["classroom"].value_counts().groupby(lambda label: label.split("/")[0])
    assert (sizes.max() - sizes.min() <= 1).all()  # a cycle within each school


def test_covariates_of_levels_are_constant_there(schools):
    table = schools.sample_x(40, key=1).to_frame()
    assert (table.groupby("school", observed=True)["size"].nunique() == 1).all()
    np.testing.assert_allclose(table["size"], table["school"].astype(int), atol=0.5)
    np.testing.assert_allclose(table["room"], 10 * table["size"])  # through the parent of each classroom


def test_blocks_and_cycles_cross_fully():
    pop = population(
        a=factor(3, balance="blocks"), b=factor(2, balance="cycle", each=4), c=factor(4, balance="cycle"),
        s=factor([2, 1, 3], within="a", balance="blocks"),
        u=factor(2, within="b", probs=[0.25, 0.75], balance="blocks"),
        r=factor([1, 5, 2], within="a"), time=occasion("s"), y=derived("1"),
    )  # fmt: skip
    table = pop.sample_x(48, key=1).to_frame()
    assert (table.groupby(["a", "b", "c"], observed=False).size() == 2).all()
    assert table["a"].is_monotonic_increasing
    sizes = table["s"].value_counts()
    assert sizes.to_dict() == {"1/1": 8, "1/2": 8, "2/1": 16, "3/1": 6, "3/2": 5, "3/3": 5}
    assert table["u"].value_counts().to_dict() == {"1/1": 6, "1/2": 18, "2/1": 6, "2/2": 18}
    assert (table["r"].str.split("/").str[0] == table["a"].astype(str)).all()
    assert set(table.loc[table["a"] == "2", "r"]) <= {f"2/{j}" for j in range(1, 6)}
    pd.testing.assert_series_equal(table["time"], table.groupby("s", observed=True).cumcount(), check_names=False)


def test_occasions_of_a_random_layout():
    pop = population(g=factor(7), t=occasion("g"), month=occasion("g", times=np.arange(60) / 2))
    table = pop.sample_x(100, key=3).to_frame()
    expected = table.groupby("g", observed=True).cumcount()
    np.testing.assert_array_equal(table["t"], expected)
    np.testing.assert_array_equal(table["month"], expected / 2)
    short = population(g=factor(7), t=occasion("g", times=[0, 1, 2]))
    with pytest.raises(ValueError, match="t: a level of g has more rows than the 3 times"):
        short.sample_x(100, key=3)


def test_dirichlet_proportions_are_drawn_with_the_predictors():
    """Given alpha, a level's share has variance p (1 - p) / (m alpha + 1), and the rows add multinomial noise."""
    m, alpha, n, B = 4, 2.0, 50, 4000
    pop = population(g=factor(m, probs=dirichlet(alpha)), inner=factor(2, within="g", probs=dirichlet([3, 1])))
    drawn = pop.sample_many(6, B, n, x="new")
    share = (np.asarray(drawn["g"]) == 0).mean(axis=1)
    p = 1 / m
    between = p * (1 - p) / (m * alpha + 1)
    variance = between + (p * (1 - p) - between) / n
    assert abs(share.mean() - p) < 4 * np.sqrt(variance / B)
    spread = (share - p) ** 2
    assert abs(spread.mean() - variance) < 4 * spread.std() / np.sqrt(B)
    inner = np.asarray(drawn["inner"])
    np.testing.assert_array_equal(inner // 2, drawn["g"])
    first = (inner % 2 == 0).mean(axis=1)
    assert abs(first.mean() - 0.75) < 4 * first.std() / np.sqrt(B)


def test_rows_of_a_table_stay_together():
    source = pd.DataFrame({
        "age": np.array([8, 10, 12], np.int8), "sex": ["m", "f", "m"], "on": [True, False, True],
        "size": pd.Categorical(["S", "L", "S"], ["S", "M", "L"], ordered=True),
    })  # fmt: skip
    pop = population(
        people=empirical(source), one=empirical(pd.Series([1.5, 2.5])), u=random_effects("sex", sd=0),
        y=response("age + by_level(size, {'S': 0, 'M': 50, 'L': 100}) + on * (sex == 'm') + u", error_scale=0),
    )  # fmt: skip
    table = pop.sample_x(3000, key=1).sample_y(key=2)
    assert table.dtypes[list(source)].to_dict() == source.dtypes.to_dict()
    assert set(map(tuple, table[list(source)].to_numpy())) == set(map(tuple, source.to_numpy()))
    assert stats.chisquare(table["age"].value_counts()).pvalue > LEAST
    assert sorted(table["one"].unique()) == [1.5, 2.5]
    expected = table["age"] + 100 * (table["size"] == "L") + (table["on"] & (table["sex"] == "m"))
    np.testing.assert_allclose(table["y"], expected)


# --- expressions -----------------------------------------------------------------------------------------------------

COLUMNS = {"x": np.array([-1.0, 0.5, 2.0]), "w": np.array([1.0, 2.0, 3.0]), "g": np.array([1, 0, 1]),
           "a_0": np.array([1.0, 2.0, 4.0]), "a_1": np.array([0.0, 1.0, -1.0])}  # fmt: skip
KINDS = {"x": Kind(), "w": Kind(), "g": Kind(labels=("no", "3")), "a": Kind(parts=("a_0", "a_1")),
         "a_0": Kind(), "a_1": Kind()}  # fmt: skip
SCOPE = Scope(KINDS, {"later": "later is not there yet"}, {"double": lambda v: 2 * v})


def value(source):
    bound = bind(source, SCOPE, "y")
    with jax.enable_x64(True):
        columns = {name: jnp.asarray(column) for name, column in COLUMNS.items()}
        assert set(bound.names) <= set(columns)
        return np.asarray(evaluate(bound.tree, np.array(bound.numbers), columns.__getitem__))


X, W, G, A0, A1 = COLUMNS.values()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("1 + 2 * x - w / 4", 1 + 2 * X - W / 4),
        ("-x**2 + (-x)**3", -(X**2) + (-X) ** 3),
        ("x**-2 * w**0.5", X**-2 * W**0.5),
        ("2**w + pi", 2**W + np.pi),
        ("+x - -1.5", X + 1.5),
        ("a[0] * a[1]", A0 * A1),
        ("(x > 0) + (w >= 2)", (X > 0).astype(float) + (W >= 2)),
        ("0 < x <= 0.5", (X > 0) & (X <= 0.5)),
        ("not (x > 0 and w < 3) or x == 2", ~((X > 0) & (W < 3)) | (X == 2)),
        ("(g == '3') - (g != 'no')", 0.0 * X),
        ("10 * (3 == g)", 10.0 * G),
        ("by_level(g, {'no': 5, 3: -1})", np.where(G == 0, 5, -1)),
        ("by_level(g, [x, 2 * w])", np.where(G == 0, X, 2 * W)),
        ("where(x > 0, log(w), exp(x))", np.where(X > 0, np.log(W), np.exp(X))),
        ("minimum(x, 1) + maximum(w, 2) * abs(x) * sign(x)", np.minimum(X, 1) + np.maximum(W, 2) * X),
        ("expit(x) + tanh(x) + sin(x) * cos(w)", 1 / (1 + np.exp(-X)) + np.tanh(X) + np.sin(X) * np.cos(W)),
        ("expm1(x) + log1p(w) + sqrt(w) + floor(x)", np.expm1(X) + np.log1p(W) + np.sqrt(W) + np.floor(X)),
        ("double(x) + double(1)", 2 * X + 2),
        (lambda x, a: x + a[:, 1], X + A1),
        (lambda g, w, power=2: jnp.array([10.0, 20.0])[g] + w**power, np.where(G == 0, 10, 20) + W**2),
        (3, 3.0),
        (np.float32(0.5), 0.5),
    ],
)
def test_expressions(source, expected):
    np.testing.assert_allclose(np.broadcast_to(value(source), 3), np.broadcast_to(expected, 3), rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("x +", "y 'x \\+' cannot be read"),
        ("q + 1", r"there is no variable 'q' \(variables: x, w, g, a, a_0, a_1\)"),
        ("latr", "no variable 'latr'"),
        ("later", "later is not there yet"),
        ("exq(x)", "no function 'exq'; did you mean 'exp'.*functions="),
        ("exp(x, w)", "exp takes 1 argument, not 2"),
        ("x.real", "'x.real' cannot stand in an expression; expressions are made of"),
        ("(lambda: 1)()", "cannot stand in an expression"),
        ("[x for x in w]", "cannot stand in an expression"),
        ("__import__('os')", "no function '__import__'"),
        ("x.__class__()", "cannot stand in an expression"),
        ("x & w", "cannot stand in an expression"),
        ("'text'", "cannot stand in an expression"),
        ("True * x", "cannot stand in an expression"),
        ("exp(x=1)", "cannot stand in an expression"),
        ("x is w", "only < <= > >= == != compare"),
        ("a + 1", r"a has 2 components; write a\[0\] .. a\[1\]"),
        ("a[2]", r"a\[2\] is no component; a has \[0\] to \[1\]"),
        ("a[-1]", r"a\[-1\] is no component"),
        ("a[x]", r"a\[x\] is no component"),
        ("x[0]", "x is one number per row; write x without an index"),
        ("g * 2", r"g is a factor \(levels: no, 3\), not a number.*by_level\(g, \{'no': ..., ...\}\)"),
        ("g > 'no'", "a factor can be compared with the name of a level"),
        ("g == 'yes'", r"g has no level 'yes'.*\(levels: no, 3\)"),
        ("by_level(g, {'no': 1})", "no value for the levels 3 of g"),
        ("by_level(g, {'no': 1, 'n': 2})", "g has no level 'n'; did you mean 'no'"),
        ("by_level(g, {'3': 1, 3: 2})", "the level 3 of g is there twice"),
        ("by_level(x, {'a': 1})", r"x is no factor \(factors: g\)"),
        ("by_level(g)", "by_level takes a factor and the value of each level"),
        ("by_level(g, [1])", "g has 2 levels, the list 1 values"),
        (lambda q: q, "no variable 'q'"),
        (lambda *x: x, "arguments must be named as variables"),
        (np.nan, "y must be a finite number"),
        (True, "y must be a finite number"),
        (None, "y must be a finite number"),
    ],
)
def test_expressions_that_are_none(source, message):
    with pytest.raises(ValueError, match=message):
        bind(source, SCOPE, "y")


def test_every_function_is_tested():
    tested = " ".join(case[0] for case in test_expressions.pytestmark[0].args[1] if isinstance(case[0], str))
    assert all(f"{name}(" in tested for name in FUNCTIONS)


# --- reproducible ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("x", ["fixed", "new"])
def test_a_sample_depends_on_key_and_number_alone(schools, x):
    n, size = 40, schools._plan.size(40)
    B = size + 7
    whole = schools.sample_many(3, B, n, x=x, x_key=9, effects=True)
    assert list(whole) == ["school", "classroom", "group", "x", "size", "room", "y", "z", "a_0", "a_1", "c"]
    for first, count in ((0, 3), (size - 2, 5), (B - 1, 1)):
        part = schools.sample_many(3, count, n, first=first, x=x, x_key=9, effects=True)
        for name, values in part.items():
            expected = whole[name] if len(whole[name]) == 1 else whole[name][first : first + count]
            np.testing.assert_array_equal(values, expected)
    for i in (0, 5, size + 1):
        sample = schools.sample_x(n, key=9, replicate=i if x == "new" else 0)
        table = sample.sample_y(key=3, replicate=i, effects=True)
        place = i if x == "new" else 0
        np.testing.assert_array_equal(table["school"].cat.codes, whole["school"][place])
        np.testing.assert_array_equal(table["x"], whole["x"][place])
        np.testing.assert_array_equal(table["y"], whole["y"][i])
        np.testing.assert_array_equal(table["z"], whole["z"][i])
        np.testing.assert_array_equal(table["a_1"], np.asarray(whole["a_1"][i])[table["school"].cat.codes])
    other = schools.sample_many(4, 2, n, x=x, x_key=9)
    assert not np.array_equal(other["y"], whole["y"][:2])
    kept = schools.sample_many(3, 2, n, x=x, x_key=9, keep=["y", "c"])
    assert list(kept) == ["y", "c"]
    assert list(schools.sample_many(3, 2, n, x=x, x_key=9, keep=["y", "a"])) == ["y", "a_0", "a_1"]
    assert list(schools.sample_many(3, 2, n, x=x, x_key=9, keep="y")) == ["y"]
    np.testing.assert_array_equal(kept["y"], whole["y"][:2])


def test_the_pure_function_draws_the_same(schools):
    key, x_key = jax.random.key(3), jax.random.key(9)
    with jax.enable_x64(True):
        draw = jax.jit(jax.vmap(lambda i: schools.draw(jax.random.fold_in(key, i), 40, jax.random.fold_in(x_key, i))))
        drawn = draw(jnp.arange(4, dtype=jnp.uint32))
    for name, values in schools.sample_many(key, 4, 40, x="new", x_key=x_key, effects=True).items():
        np.testing.assert_allclose(drawn[name], values, rtol=1e-12, atol=1e-12)


def test_another_variable_changes_no_other():
    few = population(x=normal(), y=response("x", error_scale=1))
    more = population(
        g=factor(3), w=uniform(), x=normal(), b=random_effects("g", sd=1), t=response("b", error_scale=1),
        y=response("x", error_scale=1),
    )  # fmt: skip
    one, other = (pop.sample_x(20, key=1).sample_y(key=2) for pop in (few, more))
    np.testing.assert_allclose(one[["x", "y"]], other[["x", "y"]], rtol=1e-14)
    np.testing.assert_allclose(few.sample_many(3, 2, 20)["y"], more.sample_many(3, 2, 20)["y"], rtol=1e-14)


def study_of(intercept, sd, cor, probs, scale, low, source, df, alpha):
    """Every kind of number that a program takes as data."""
    return population(
        g=factor(4, probs=probs), d=factor(3, probs=dirichlet(alpha)), t=occasion("g", times=np.arange(30) * low),
        x=uniform(low, 3), e=empirical(source), m=multivariate_normal([low, 0], [[1, cor], [cor, 1]]),
        b=random_effects("g", sd=sd, cor=cor, distribution=student_t(df)),
        y=response(f"{intercept} + b[0] + x * b[1] + by_level(g, [1, {intercept}, 2, 3]) + t + e", error_scale=scale),
    )  # fmt: skip


def test_populations_that_differ_in_numbers_share_their_programs():
    """And yet every number counts: what comes out is what a program compiled for it alone gives."""
    base = {"intercept": 5, "sd": (1, 2), "cor": 0.5, "probs": [0.1, 0.2, 0.3, 0.4], "scale": 1, "low": 0.5,
            "source": pd.Series([1.0, 2.0]), "df": 4, "alpha": 1}  # fmt: skip
    changes = {"intercept": 6, "sd": (3, 2), "cor": -0.2, "probs": [0.4, 0.3, 0.2, 0.1], "scale": 2, "low": 0.25,
               "source": pd.Series([7.0, 2.0]), "df": 40, "alpha": 9}  # fmt: skip
    n = 30
    reference = study_of(**base).sample_x(n, key=1).sample_y(key=2)
    programs = draws.x_block._cache_size(), draws.y_block._cache_size()
    for name, changed in changes.items():
        assert not study_of(**{**base, name: changed}).sample_x(n, key=1).sample_y(key=2).equals(reference), name
    pop = study_of(**changes)
    table = pop.sample_x(n, key=1).sample_y(key=2)
    assert (draws.x_block._cache_size(), draws.y_block._cache_size()) == programs
    with jax.enable_x64(True):
        alone = jax.jit(lambda key, x_key: pop.draw(key, n, x_key))(
            *(jax.random.fold_in(jax.random.key(i), 0) for i in (2, 1))
        )
    np.testing.assert_allclose(table["y"], alone["y"], rtol=1e-12)
    np.testing.assert_allclose(table["m_1"], alone["m_1"], rtol=1e-12)
    np.testing.assert_array_equal(table["d"].cat.codes, alone["d"])


def test_keys_and_copies(schools):
    expected = schools.sample_x(40, key=5).sample_y(key=6)
    again = schools.sample_x(40, key=jax.random.key(5)).sample_y(key=jax.random.key(6))
    copied = pickle.loads(pickle.dumps(schools)).sample_x(40, key=5).sample_y(key=6)
    pd.testing.assert_frame_equal(expected, again)
    pd.testing.assert_frame_equal(expected, copied)
    assert jnp.zeros(1).dtype == np.float32  # JAX's default is left alone


def test_given_predictors(schools):
    sample = schools.sample_x(40, key=9)
    table = sample.to_frame().assign(note="kept")
    own = schools.given(table)
    drawn = own.sample_y(key=3)
    assert set(drawn["note"]) == {"kept"}
    np.testing.assert_array_equal(drawn["y"], sample.sample_y(key=3)["y"])
    many = schools.sample_many(3, 2, x=own)
    np.testing.assert_array_equal(many["y"][0], drawn["y"])
    assert len(schools.given(table.drop(columns=["size", "room", "note"]))) == 40
    for broken, message in (
        (table.drop(columns="group"), "no column 'group', which the responses need"),
        (table.assign(group="q"), r"'q' in the column 'group' is no level of it \(levels: t, c\)"),
        (table.assign(x=np.nan), "'x' has 40 missing values"),
        (table.assign(x="text"), "'x' must be numbers"),
        (table[:0], "needs a pandas DataFrame with rows"),
    ):
        with pytest.raises(DataError, match=message):
            schools.given(broken)


def test_source_of_a_study(schools):
    fixed = schools.rows(40, x_key=9, response="y", truth={"x": 0.3}, contrasts={"group": "sum"})
    tables, Y = fixed.tables(3, 5, 4)
    assert (len(tables), Y.shape, fixed.nobs, dict(fixed.truth)) == (1, (4, 40), 40, {"x": 0.3})
    assert dict(fixed.options) == {"weights": None, "offset": None, "contrasts": {"group": "sum"}}
    np.testing.assert_array_equal(Y, schools.sample_many(3, 4, 40, first=5, x_key=9)["y"])
    pd.testing.assert_frame_equal(tables[0], schools.sample_x(40, key=9).to_frame())
    tables, Y = schools.rows(40, x="new", response="y").tables(jax.random.key(3), 5, 4)
    pd.testing.assert_frame_equal(tables[2], schools.sample_x(40, key=3, replicate=7).to_frame())
    np.testing.assert_array_equal(Y[2], schools.sample_x(40, key=3, replicate=7).sample_y(key=3, replicate=7)["y"])
    own = schools.given(schools.sample_x(40, key=1).to_frame())
    assert schools.rows(x=own, response="z").tables(3, 0, 2)[1].shape == (2, 40)
    with pytest.raises(ValueError, match="response must name one of the responses: y, z"):
        schools.rows(40)
    with pytest.raises(ValueError, match=r"there is no response 'x' \(responses: y, z\)"):
        schools.rows(40, response="x")
    with pytest.raises(ValueError, match="weights, offset and contrasts for the fits, not waits"):
        schools.rows(40, response="y", waits=1)


def test_table_of_variables(schools):
    lines = repr(schools).splitlines()
    assert lines[0] == "Population of 10 variables"
    assert lines[1].split() == ["variable", "per", "definition"]
    assert "classroom  row        factor: 3 levels within each school, cycle" in lines
    assert "a          school     random effects: sd (1, 0.5), cor 0.3, normal" in lines
    assert len(lines) == 12


# --- what is wrong ---------------------------------------------------------------------------------------------------

NOT_PSD = [[1, 0.9, -0.9], [0.9, 1, 0.9], [-0.9, 0.9, 1]]


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, "a population needs variables"),
        ({"x": 3}, "x must be a variable such as factor"),
        ({"class": normal()}, "'class' cannot be the name"),
        ({"g": factor(0)}, "g: a factor needs one level or more, got 0"),
        ({"g": factor([])}, "g: a factor needs one level or more"),
        ({"g": factor(["a", "a"])}, "g: the level 'a' is there twice"),
        ({"g": factor("abc")}, "g: levels must be their number or a list"),
        ({"g": factor(2.5)}, "g: levels must be their number or a list"),
        ({"g": factor(3, probs=[0.5, 0.5])}, "g: 2 probabilities for 3 levels"),
        ({"g": factor(2, probs=[0.5, 0.4])}, "g: probabilities must sum to 1, and .* sum to 0.9"),
        ({"g": factor(2, probs=[1.5, -0.5])}, "g: probabilities must be 0 or more"),
        ({"g": factor(2, probs=dirichlet(0))}, "g: the alpha of a Dirichlet distribution must be above 0"),
        ({"g": factor(2, balance="even")}, "g: balance must be 'random', 'blocks' or 'cycle'"),
        ({"g": factor(2, probs=[0.5, 0.5], balance="cycle")}, "g: balance='cycle' gives every level the same"),
        ({"g": factor(2, each=2)}, "g: each belongs to balance='cycle'"),
        ({"g": factor(2, within="h")}, "g: within: there is no variable 'h'"),
        ({"h": factor(3), "g": factor([2, 2], within="h")}, "g: 2 numbers of levels within 3 levels"),
        ({"h": factor(2), "g": factor([2, 0], within="h")}, "g: a factor needs one level or more, got 0"),
        ({"h": factor(2), "g": factor([1, 2], within="h", probs=[1])}, "g: probs need the same number of levels"),
        ({"x": normal(), "g": factor(2, within="x")}, r"g: within: x is no factor \(factors: none\)"),
        ({"x": normal(0, -1)}, "x: sd must be 0 or more, got -1"),
        ({"x": normal("u")}, "x: mean 'u': there is no variable 'u'"),
        ({"x": normal(by="h")}, "x: by: there is no variable 'h'"),
        ({"x": uniform(2, 1)}, "x: low must be below high, got 2 and 1"),
        ({"x": bernoulli(1.2)}, "x: p must be between 0 and 1, got 1.2"),
        ({"x": poisson(-1)}, r"x: mean must be between 0 and 10\^9, got -1"),
        ({"x": multivariate_normal([0, 0], [[1, 2], [2, 1]])}, "x: the covariance .* is not positive semidefinite"),
        ({"x": multivariate_normal([0, 0], [[1, 2], [0, 1]])}, "x: the covariance .* is not symmetric"),
        ({"x": multivariate_normal([0, 0], np.eye(3))}, r"x: the covariance has shape \(3, 3\); \(2, 2\) is needed"),
        ({"x": multivariate_normal([0, 0], np.eye(2), names=["a"])}, "x: 1 names for 2 means"),
        ({"a": normal(), "x": multivariate_normal([0, 0], np.eye(2), names=["a", "b"])}, "two variables called 'a'"),
        ({"x": derived("x + 1")}, "x refers to itself"),
        ({"x": derived("z"), "z": normal()}, "x refers to z, which is defined after it: put z in front of x"),
        ({"x": derived("z"), "z": derived("w"), "w": normal("x")}, "in a circle: x -> z -> w -> x"),
        ({"x": normal(by="g"), "g": factor(2)}, "x refers to g, which is defined after it"),
        ({"x": derived("b_1"), "g": factor(2), "b": random_effects("g", sd=[1, 1])}, "x refers to b, which is defined"),
        (
            {"g": factor(2), "b": random_effects("g", sd=1), "x": derived("b")},
            "b is drawn with the responses, and predictors cannot depend on it",
        ),
        (
            {"g": factor(2), "w": normal(), "x": normal("w", by="g")},
            "x has one value per level of g, and w varies within these levels",
        ),
        ({"e": empirical([1, 2])}, "e: empirical needs a pandas DataFrame or Series"),
        ({"e": empirical(pd.DataFrame({"a": [1.0, None]}))}, "e: the column 'a' has 1 missing values"),
        ({"e": empirical(pd.DataFrame({"a": [1.0]}), ["b"])}, "e: the table has no column 'b'; columns: a"),
        ({"e": empirical(pd.DataFrame({"a": []}))}, "e: the table has no rows"),
        ({"g": factor(2), "t": occasion("g", times=[])}, "t: times must be a list of finite numbers"),
        ({"b": random_effects("g", sd=1)}, "b: by: there is no variable 'g'"),
        ({"g": factor(2), "b": random_effects("g")}, "b: give either sd"),
        ({"g": factor(2), "b": random_effects("g", sd=1, cov=1)}, "b: give either sd"),
        ({"g": factor(2), "b": random_effects("g", sd=-1)}, "b: sd must be 0 or more, got -1.0"),
        ({"g": factor(2), "b": random_effects("g", sd=1, cor=0.5)}, "b: one effect has no correlations"),
        ({"g": factor(2), "b": random_effects("g", sd=[1, 1], cor=1.5)}, "b: correlations .* not positive"),
        ({"g": factor(2), "b": random_effects("g", sd=[1, 1, 1], cor=NOT_PSD)}, "b: correlations .* eigenvalue -0.8"),
        ({"g": factor(2), "b": random_effects("g", cov=NOT_PSD)}, "b: the covariance .* not positive semidefinite"),
        ({"g": factor(2), "b": random_effects("g", sd=[1, 1], cor=np.ones((3, 3)))}, r"b: cor must be a number or"),
        ({"g": factor(2), "b": random_effects("g", cov=[1, 2])}, r"b: cov must be \(q, q\)"),
        ({"g": factor(2), "b": random_effects("g", cov=-1)}, "b: cov of one effect is its variance"),
        ({"g": factor(2), "b": random_effects("g", sd=1, distribution="t")}, "b: distribution must be 'normal'"),
        ({"y": response("0")}, "y: a gaussian response needs error_scale"),
        ({"y": response("0", error_scale=-1)}, "y: error_scale must be 0 or more, got -1"),
        ({"y": response("0", family="gamma")}, "y: family must be one of gaussian, binomial, poisson"),
        ({"y": response("0", family="poisson", link="logit")}, "y: the links of poisson are log, sqrt, identity"),
        ({"y": response("0", family="poisson", error_scale=1)}, "y: error_scale and error belong to gaussian"),
        ({"y": response("0", error_scale=1, trials=3)}, "y: trials belong to binomial responses"),
        ({"y": response("0", family="binomial", trials=2.5)}, "y: trials must be whole and 0 or more, got 2.5"),
        ({"y": response("z", error_scale=1), "z": response("0", error_scale=1)}, "y refers to z, which is defined"),
    ],
)  # fmt: skip
def test_populations_that_are_none(variables, message):
    with pytest.raises(ValueError, match=message):
        population(**variables)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: student_t(2), "2 degrees of freedom have no variance"),
        (lambda: student_t(0, standardize=False), "df must be above 0"),
        (lambda: shifted_gamma(-1), "shape must be above 0"),
        (lambda: contaminated_normal(2, 3), "share must be between 0 and 1"),
        (lambda: skew_normal(np.inf), "shape must be finite"),
        (lambda: custom(3), "custom needs a function"),
    ],
)
def test_distributions_that_are_none(call, message):
    with pytest.raises(ValueError, match=message):
        call()


X_CASES = {
    "normal": (normal(0, "u_normal"), "normal: sd must be 0 or more, and 'u_normal' is not in some rows"),
    "bernoulli": (bernoulli("u_bernoulli"), "bernoulli: p must be between 0 and 1, and 'u_bernoulli'"),
    "poisson": (
        poisson(lambda u_poisson: u_poisson),
        r"poisson: mean must be between 0 and 10\^9, and what the function",
    ),
    "derived": (derived("log(u_derived)"), "derived is not finite in some rows"),
}
Y_CASES = {
    "scale": (response("1", error_scale="u_scale"), "scale: error_scale must be 0 or more, and 'u_scale'"),
    "mean": (response("log(u_mean)", error_scale=1), "mean is not finite in some rows"),
    "p": (
        response("u_p", "binomial", "identity"),
        "p: the mean must be a probability, and identity of 'u_p' gives none",
    ),
    "trials": (response("0", "binomial", trials="u_trials"), "trials: trials must be whole and 0 or more"),
    "rate": (
        response("u_rate", "poisson", "identity"),
        "rate: the mean must be between .* and identity of 'u_rate' is not",
    ),
}


@pytest.mark.parametrize("name", [*X_CASES, *Y_CASES])
def test_impossible_values_of_expressions(name):
    """One program: which variable gets impossible parameters is a matter of numbers."""
    cases = {**X_CASES, **Y_CASES}
    bad = population(
        **{f"u_{other}": uniform(-0.5 if other == name else 0.9, 0.95) for other in cases if other != "trials"},
        u_trials=derived("5" if name != "trials" else "2.5"),
        **{other: spec for other, (spec, _) in cases.items()},
    )
    if name in X_CASES:
        with pytest.raises(ValueError, match=cases[name][1]):
            bad.sample_x(20, key=1)
    else:
        sample = bad.sample_x(20, key=1)
        with pytest.raises(ValueError, match=cases[name][1]):
            sample.sample_y(key=1)
    with pytest.raises(ValueError, match=cases[name][1]):
        bad.sample_many(1, 3, 20)


def test_the_pure_function_gives_nan_where_parameters_are_impossible():
    pop = population(u=derived("-1"), x=normal(0, "u"), y=response("0", error_scale="u"))
    with jax.enable_x64(True):
        drawn = jax.jit(lambda key: pop.draw(key, 4))(jax.random.key(1))
    assert np.isnan(drawn["x"]).all()
    assert np.isnan(drawn["y"]).all()


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (custom(lambda key, n: jnp.zeros(n + 1)), r"v: the function returned an array of shape \(21,\); \(20,\)"),
        (normal(lambda u: u[:3]), r"mean has shape \(3,\); one number or \(20,\) is needed"),
        (response("0", error_scale=1, error=lambda key, shape: 1.0), r"returned an array of shape \(\)"),
    ],
)
def test_functions_that_return_something_else(spec, message):
    pop = population(u=uniform(), v=spec)
    with pytest.raises(ValueError, match=message):
        pop.sample_x(20, key=1).sample_y(key=1)


def test_counts_that_are_none(schools):
    for n in (0, -1, 2.5, True):
        with pytest.raises(ValueError, match="n must be an integer, 1 or more"):
            schools.sample_x(n, key=1)
    with pytest.raises(ValueError, match="B must be an integer, 1 or more"):
        schools.sample_many(1, 0, 10)
    with pytest.raises(ValueError, match="n, the number of rows, is needed"):
        schools.sample_many(1, 1)
    with pytest.raises(ValueError, match="samples are numbered up to 4294967296"):
        schools.sample_many(1, 10, 10, first=2**32 - 5)
    with pytest.raises(ValueError, match="x must be 'fixed', 'new' or a Sample"):
        schools.sample_many(1, 10, 10, x="old")
    with pytest.raises(ValueError, match="keep names 'q', but the columns are school, classroom"):
        schools.sample_many(1, 10, 10, keep=["q"])
    with pytest.raises(ValueError, match="'x' is no factor"):
        schools.levels("x")
    with pytest.raises(ValueError, match="sample of another population"):
        schools.sample_many(1, 10, x=population(x=normal()).sample_x(10, key=1))
    with pytest.raises(ValueError, match="key must be an int or one JAX key"):
        schools.sample_x(10, key="1")
    with pytest.raises(ValueError, match="key must be an int or one JAX key"):
        schools.sample_many("1", 2, 10)


# --- exercises -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("layout", "sd"), [(factor(26), 0.5), (factor(26, probs=dirichlet(1)), 2.0)])
def test_exercise_of_groups_and_of_counties(layout, sd):
    """Intercept 4, slope 7, n = 500; groups with sd 0.5, and counties of very unequal size with sd 2.

    The mean residual of a group of n_j rows has variance sd^2 + 1 / n_j, and the rows within it 1.
    """
    pop = population(
        group=layout, x=normal(), a=random_effects("group", sd=sd), y=response("4 + a + 7 * x", error_scale=1)
    )
    drawn = pop.sample_many(2, 2000, 500, x_key=1)
    group, x = np.asarray(drawn["group"][0]), np.asarray(drawn["x"][0])
    residual = np.asarray(drawn["y"]) - 4 - 7 * x
    n_j = np.bincount(group, minlength=26)
    there = n_j > 0
    means = (residual @ np.eye(26)[group])[:, there] / n_j[there]
    z = means / np.sqrt(sd**2 + 1 / n_j[there])
    assert abs((z**2).mean() - 1) < 4 * np.sqrt(2 / z.size)
    assert abs(z.mean()) < 4 / np.sqrt(z.size)
    within = (residual**2).sum(axis=1) - (n_j[there] * means**2).sum(axis=1)
    df = 500 - there.sum()
    assert abs((within / df).mean() - 1) < 4 * np.sqrt(2 / (df * 2000))
    # Counts of equal probabilities are about Poisson: their sd over its expectation is 1, with error 1 / sqrt(2 * 26).
    unequal = n_j.std() / np.sqrt(500 / 26)
    assert (unequal > 1 + 4 / np.sqrt(52)) == (sd == 2.0)


def test_exercise_fitted():
    """Estimates of the model that the data come from average to the truth."""
    pop = population(
        group=factor(26), x=normal(), a=random_effects("group", sd=0.5), y=response("4 + a + 7 * x", error_scale=1)
    )
    tables, Y = pop.rows(500, x_key=1).tables(2, 0, 400)
    batch = mj.lmm("y ~ x + (1 | group)", tables[0].assign(y=Y[0])).refit_many(Y)
    assert batch.converged.all()
    # REML estimates of variances are unbiased but for the zeros, and there are none here.
    found = {**batch.fixef, **batch.sdcor**2}
    for name, truth in {"Intercept": 4, "x": 7, "sd_Intercept|group": 0.25, "sigma": 1}.items():
        assert abs(found[name].mean() - truth) < 4 * found[name].std() / 20


def test_exercise_of_a_misspecified_model():
    """Random slopes and errors from t with 3 df, quadratic mean: the straight line's slope is the projection's."""
    pop = population(
        group=factor(26, balance="cycle"), x=normal(),
        a=random_effects("group", sd=(1, 1), distribution=student_t(3)),
        y=response("1 + a[0] + (2 + a[1]) * x + x**2", error_scale=1, error=student_t(3)),
    )  # fmt: skip
    drawn = pop.sample_many(2, 3000, 520, x_key=1)
    x, Y = np.asarray(drawn["x"][0]), np.asarray(drawn["y"])
    X = np.column_stack([np.ones(520), x])
    projection = np.linalg.lstsq(X, 1 + 2 * x + x**2)[0]
    beta = np.linalg.lstsq(X, Y.T)[0].T
    # Random slopes with variance add to that of beta; the standard error is measured.
    assert (np.abs(beta.mean(axis=0) - projection) < 4 * beta.std(axis=0) / np.sqrt(len(beta))).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda pop: pop.sample_x(10**9, key=1), "a sample of 1000000000 rows would take 44 GiB of memory, and this"),
        (lambda pop: pop.sample_x(10**11, key=1), "n must be 4294967296 or less, got 100000000000"),
        (lambda pop: pop.sample_x(10**400, key=1), r"n must be 4294967296 or less, got 10\^400 or more"),
        (lambda pop: pop.sample_x(10**5000, key=1), r"n must be .* got 10\^5000 or more"),
        (lambda pop: pop.sample_x(-(10**400), key=1), r"1 or more, got -10\^400 or more"),
        (lambda pop: pop.sample_x(np.inf, key=1), "n must be an integer, 1 or more, got inf"),
        (lambda pop: pop.draw(jax.random.key(1), 10**9), "would take 44 GiB"),
        (lambda pop: pop.rows(10**9, response="y"), "would take 44 GiB"),
        (lambda pop: pop.rows(10**11, response="y"), "n must be 4294967296 or less"),
        (lambda pop: pop.sample_many(1, 10**9, 100, keep="y"), "1000000000 samples of 100 rows would take 745 GiB"),
        (lambda pop: pop.sample_many(1, 10**400, 100), "B must be 4294967296 or less"),
        (
            lambda pop: pop.sample_many(1, 10**9, 10, x="new", keep="x"),
            "1000000000 samples of 10 rows would take 74 GiB",
        ),
        (
            lambda pop: pop.sample_x(5, 1).sample_y(1, replicate=10**400),
            "number of a sample must be 4294967296 or less",
        ),
        (lambda pop: population(g=factor(10**11)), "g: levels must be 2147483647 or less, got 100000000000"),
        (lambda pop: population(g=factor(10**400)), r"g: levels must be 2147483647 or less, got 10\^400"),
        (lambda pop: population(g=factor(2 * 10**9)), "g: 2000000000 levels would take 238 GiB"),
        (lambda pop: population(g=factor(range(10**400))), "g: levels has more than 10000000 values"),
        (lambda pop: population(g=factor(np.float32(3))), "g: levels must be their number or a list"),
        (lambda pop: population(g=factor(10**5), h=factor(10**5, within="g")), "h: levels must be 2147483647 or less"),
        (lambda pop: population(g=factor(3, balance="cycle", each=10**400)), "g: each must be 4294967296 or less"),
    ],
)
def test_counts_that_cannot_be_are_refused_before_memory_is_taken(call, message, schools, monkeypatch):
    monkeypatch.setattr("mixjax.checks._memory", lambda: 2**35)
    with pytest.raises(ValueError, match=message):
        call(schools)
