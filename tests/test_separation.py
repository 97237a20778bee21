"""Separation by the fixed effects, against brute force in whole numbers, maxima found by scipy, and cases known by
hand."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.special import expit

import mixjax as mj
from mixjax.formula.separation import separated_columns, separation_of

NAMES = ("a", "b", "c")


def cases(p):
    """Small designs of whole numbers: X, y, size, family."""
    row = st.tuples(*[st.integers(-2, 2)] * p)
    binomial = st.tuples(row, st.sampled_from([(0, 1), (1, 1), (0, 3), (3, 3), (1, 3)]))
    counts = st.tuples(row, st.sampled_from([(0, 1), (0, 1), (2, 1)]))
    return st.one_of(
        st.tuples(st.lists(binomial, min_size=p, max_size=9), st.just("binomial")),
        st.tuples(st.lists(counts, min_size=p, max_size=9), st.sampled_from(["poisson", "nbinom"])),
    )


def arrays(rows):
    X = np.array([x for x, _ in rows])
    y, size = np.array([outcome for _, outcome in rows]).T
    return X, y, size


def allowed_signs(y, size, family):
    return [-1 if k == 0 else 1 if family == "binomial" and k == n else 0 for k, n in zip(y, size, strict=True)]


def rays(X):
    """The directions that p - 1 rows hold fast: every extreme ray of the cone is among them, up to its sign."""
    p = X.shape[1]
    for some in combinations(X.tolist(), p - 1):
        if p == 1:
            yield (1,)
        elif p == 2:
            yield (-some[0][1], some[0][0])
        else:
            (a, b, c), (d, e, f) = some
            yield (b * f - c * e, c * d - a * f, a * e - b * d)


def by_hand(X, y, size, family):
    """Rows that some direction of recession moves, and columns that have a part in one."""
    sign = allowed_signs(y, size, family)
    moved, columns = set(), set()
    for ray in rays(X):
        for d in (ray, tuple(-v for v in ray)):
            change = [sum(a * b for a, b in zip(x, d, strict=True)) for x in X.tolist()]
            if any(d) and all(s * v >= 0 if s else v == 0 for s, v in zip(sign, change, strict=True)):
                moved |= {i for i, v in enumerate(change) if v}
                columns |= {j for j, v in enumerate(d) if v}
    return moved, columns


@settings(max_examples=400, deadline=None)
@given(st.integers(1, 3).flatmap(cases))
def test_against_brute_force(case):
    """The cone has no line, because X has full rank: it is trivial exactly where it has no extreme ray."""
    rows, family = case
    X, y, size = arrays(rows)
    p = X.shape[1]
    if np.linalg.matrix_rank(X) < p:
        return
    moved, columns = by_hand(X, y, size, family)
    found = separated_columns(X, NAMES[:p], y, size, family)
    if found is None:
        assert not moved
        return
    assert set(np.flatnonzero(found.rows)) == moved
    assert found.columns == tuple(NAMES[j] for j in sorted(columns))
    change = X @ found.direction
    sign = np.array(allowed_signs(y, size, family))
    # Whole numbers up to 2 and a direction of length about 1: an error of more than some roundings is no rounding.
    assert (sign[found.rows] * change[found.rows] > 0).all()
    assert np.abs(change[~found.rows]).max(initial=0.0) < 1e-12
    for name in found.columns:
        assert name in found.sentence


@settings(max_examples=60, deadline=None)
@given(cases(2))
def test_without_separation_there_is_a_maximum(case):
    rows, family = case
    X, y, size = arrays(rows)
    if np.linalg.matrix_rank(X) < 2 or separated_columns(X, NAMES[:2], y, size, family) is not None:
        return

    def minus_loglik(beta):
        eta = X @ beta
        if family == "binomial":
            return (size * np.logaddexp(0, eta) - y * eta).sum(), X.T @ (size * expit(eta) - y)
        mu = np.exp(np.minimum(eta, 50))
        return (mu - y * eta).sum(), X.T @ (mu - y)

    best = minimize(minus_loglik, np.zeros(2), jac=True, method="BFGS", options={"gtol": 1e-8})
    # A maximum, and not a slope that has become flat: there curvature would be no more than the gradient.
    eta = X @ best.x
    weight = size * expit(eta) * expit(-eta) if family == "binomial" else np.exp(eta)
    curvature = np.linalg.eigvalsh(X.T @ (weight[:, None] * X))[0]
    assert np.abs(minus_loglik(best.x)[1]).max() < 1e-5
    assert curvature > 1e-3


def treatment(levels, n=12, seed=0):
    """Columns and values of a factor, n rows a level, beside a covariate."""
    names = np.repeat(list(levels), n)
    x = np.random.default_rng(seed).normal(size=len(names))
    X = np.column_stack([np.ones(len(names)), *[(names == level) * 1.0 for level in levels[1:]], x])
    return X, ("Intercept", *(f"treatment[T.{level}]" for level in levels[1:]), "x"), names


def mixed(names, **fixed):
    y = np.arange(len(names)) % 2 * 1.0
    for level, value in fixed.items():
        y[names == level] = value
    return y


def test_a_level_of_failures_is_named():
    X, columns, names = treatment("ABC")
    found = separated_columns(X, columns, mixed(names, C=0.0), None, "binomial")
    assert found.columns == ("treatment[T.C]",)
    assert found.words == ("all 12 rows with treatment = C are 0",)
    assert found.sentence.startswith("the fixed effects separate the response (all 12 rows with treatment = C are 0): ")
    assert (found.rows == (names == "C")).all()


def test_the_base_level_is_named_where_the_values_are_known():
    X, columns, names = treatment("ABC")
    y = mixed(names, A=1.0)
    found = separated_columns(X, columns, y, None, "binomial", {"treatment": names}, "cured")
    assert found.columns == columns[:3]
    assert found.words == ("all 12 rows with treatment = A are 1",)
    assert "separate cured (all" in found.sentence
    assert separated_columns(X, columns, y, None, "binomial").words == ()


class Binomial:
    name = "binomial"

    def check(self, y, size, name):
        assert size is None


def test_a_design_knows_its_factors():
    _, _, names = treatment("ABC")
    n = len(names)
    data = {"y": mixed(names, A=1.0), "treatment": names, "k": np.arange(n) % 5, "g": np.arange(n) // 2 % 6}
    data["x"] = np.random.default_rng(0).normal(size=n)
    design, labels = mj.build_design("y ~ treatment + C(k) + x + (1 | g)", data, family=Binomial())
    found = separation_of(design, labels, "binomial")
    assert found.sentence.startswith(
        "the fixed effects separate the response 'y' (all 12 rows with treatment = A are 1)"
    )
    data["y"][0] = 0
    design, labels = mj.build_design("y ~ treatment + C(k) + x + (1 | g)", data, family=Binomial())
    assert separation_of(design, labels, "binomial") is None


def test_two_levels_and_successes_of_several_trials():
    X, columns, names = treatment("ABC")
    y = mixed(names, B=4.0, C=0.0) + (names == "A")
    found = separated_columns(X, columns, y, np.full(len(y), 4.0), "binomial")
    assert found.columns == columns[1:3]
    assert found.words == (
        "all 12 rows with treatment = B are successes only",
        "all 12 rows with treatment = C are 0",
    )


def test_an_interaction_is_named():
    a, b = np.repeat([0.0, 1.0], 20), np.tile(np.repeat([0.0, 1.0], 10), 2)
    X = np.column_stack([np.ones(40), a, b, a * b])
    y = np.where(a * b == 1, 1.0, np.arange(40) % 2)
    found = separated_columns(X, ("Intercept", "a[T.y]", "b[T.y]", "a[T.y]:b[T.y]"), y, None, "binomial")
    assert (found.columns, found.words) == (("a[T.y]:b[T.y]",), ("all 10 rows with a = y and b = y are 1",))


@pytest.mark.parametrize(("family", "value"), [("poisson", 3.0), ("nbinom", 3.0)])
def test_counts_are_separated_by_zeros_only(family, value):
    X, columns, names = treatment("ABC")
    y = mixed(names)
    found = separated_columns(X, columns, np.where(names == "C", 0.0, y), None, family)
    assert (found.columns, found.words) == (("treatment[T.C]",), ("all 12 rows with treatment = C are 0",))
    assert separated_columns(X, columns, np.where(names == "C", value, y), None, family) is None


def test_a_threshold_is_named():
    x = np.arange(20.0)
    X = np.column_stack([np.ones(20), x])
    found = separated_columns(X, ("Intercept", "dose"), (x > 7) * 1.0, None, "binomial")
    assert found.columns == ("Intercept", "dose")
    assert found.words == ("dose is at most 7 in rows of 0 and at least 8 in rows of 1",)
    assert found.rows.all()
    y = (x > 7) * 1.0
    y[9] = 0.0
    assert separated_columns(X, ("Intercept", "dose"), y, None, "binomial") is None


def test_families_that_cannot_be_separated():
    X, columns, names = treatment("ABC")
    y = mixed(names, C=0.0)
    assert all(separated_columns(X, columns, y, None, f) is None for f in ("gamma", "beta", "gaussian", "custom"))
    assert separated_columns(np.zeros((36, 0)), (), y, None, "binomial") is None


def test_scales_and_the_order_of_rows_do_not_matter():
    X, columns, names = treatment("ABC")
    y = mixed(names, C=0.0)
    order = np.random.default_rng(1).permutation(len(y))
    found = separated_columns(X[order] * [1e-6, 1.0, 1e9, 1e4], columns, y[order], None, "binomial")
    assert found.columns == ("treatment[T.C]",)
    assert (found.rows == (names[order] == "C")).all()


@pytest.mark.parametrize("family", ["binomial", "poisson"])
def test_large_tables(family):
    """A sample of the rows proves that nothing is separated; one rare level, hardly in the sample, is found."""
    rng = np.random.default_rng(0)
    n, p = 20_000, 6
    X = np.column_stack([np.ones(n), rng.normal(size=(n, p - 1))])
    names = ("Intercept", *(f"x{j}" for j in range(1, p - 1)), "rare[T.yes]")
    X[:, -1] = 0.0
    X[rng.choice(n, 9, replace=False), -1] = 1.0
    eta = X[:, :-1] @ rng.normal(size=p - 1)
    y = (rng.logistic(size=n) < eta) * 1.0 if family == "binomial" else rng.poisson(np.exp(0.3 * eta)) * 1.0
    y[np.flatnonzero(X[:, -1])[0]] = 1.0  # of both kinds
    y[np.flatnonzero(X[:, -1])[1]] = 0.0
    assert separated_columns(X, names, y, None, family) is None
    y[X[:, -1] == 1] = 0.0
    found = separated_columns(X, names, y, None, family)
    assert (found.columns, found.words) == (("rare[T.yes]",), ("all 9 rows with rare = yes are 0",))
    # Too many numbers to look, n p^2 of 1.2e7, and no sample that settles it.
    wide = np.column_stack([X, rng.normal(size=(n, 19))])
    wide_names = (*names, *(f"z{j}" for j in range(19)))
    assert separated_columns(wide, wide_names, y, None, family) is None


def test_complete_separation_with_many_columns():
    """Every linear programme leaves rows that it holds fast: the next one moves those."""
    rng = np.random.default_rng(0)
    X = np.column_stack([np.ones(300), rng.normal(size=(300, 49))])
    found = separated_columns(
        X, tuple(f"x{j}" for j in range(50)), (X @ rng.normal(size=50) > 0) * 1.0, None, "binomial"
    )
    assert found.rows.all()
    assert len(found.columns) == 50
