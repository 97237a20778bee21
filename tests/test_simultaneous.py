"""The largest of several t statistics: closed forms, scipy, simulation, and what must not matter."""

import itertools

import numpy as np
import pytest
import scipy.stats

from mixjax.inference.fixed import families
from mixjax.inference.fixed.simultaneous import (
    LargestT,
    one_factor_tail,
    studentized_range_quantile,
    studentized_range_tail,
)


def pairwise(k):
    """Unit rows of all differences of k independent means."""
    return np.array([np.eye(k)[i] - np.eye(k)[j] for i, j in itertools.combinations(range(k), 2)]) / np.sqrt(2)


def root_of(R):
    sizes, vectors = np.linalg.eigh(R)
    return vectors * np.sqrt(np.maximum(sizes, 0.0))


def with_control(m):
    """Of m comparisons with one control, all of the same variance."""
    return root_of(np.full((m, m), 0.5) + 0.5 * np.eye(m))


DF = (1.0, 2.5, 7.0, 42.3, 1e4, np.inf)


@pytest.mark.parametrize("df", DF)
@pytest.mark.parametrize("k", [2, 3, 8])
def test_the_studentized_range_is_scipys(k, df):
    q = np.array([0.3, 2.0, 3.5, 6.0, 12.0])
    expected = scipy.stats.studentized_range.sf(q, k, df)
    np.testing.assert_allclose(studentized_range_tail(q, k, df), expected, rtol=1e-8, atol=1e-9)
    q95 = studentized_range_quantile(0.95, k, df)
    assert scipy.stats.studentized_range.sf(q95, k, df) == pytest.approx(0.05, abs=1e-8)


def test_small_tails_keep_their_digits():
    """Far out, the range of k is exceeded by one of k (k - 1) / 2 pairs alone."""
    q = np.array([12.0, 20.0])
    pair = 2 * scipy.stats.norm.sf(q / np.sqrt(2))
    np.testing.assert_allclose(studentized_range_tail(q, 4, np.inf), 6 * pair, rtol=1e-3)
    np.testing.assert_allclose(
        LargestT(with_control(4)).tail([9.0], [np.inf]).value, 8 * scipy.stats.norm.sf(9), rtol=1e-3
    )


@pytest.mark.parametrize("df", DF)
def test_one_statistic_is_students_t(df):
    t = np.array([0.2, 1.7, 4.0])
    expected = 2 * scipy.stats.t.sf(t, df) if np.isfinite(df) else 2 * scipy.stats.norm.sf(t)
    for B in ([[1.0]], [[0.6, 0.8], [-0.6, -0.8]]):  # the second is the first's negative
        found = LargestT(np.array(B))
        np.testing.assert_allclose(found.tail(t, np.full(3, df)).value, expected, rtol=1e-10)
        assert found.is_exact
        assert 2 * scipy.stats.t.sf(found.quantile(0.9, df), df) == pytest.approx(0.1, rel=1e-10)


@pytest.mark.parametrize("df", DF)
def test_three_means_in_two_dimensions_are_the_range(df):
    largest, t = LargestT(pairwise(3)), np.array([0.5, 2.0, 4.0, 9.0])
    assert largest.rank == 2
    expected = studentized_range_tail(np.sqrt(2) * t, 3, df)
    np.testing.assert_allclose(largest.tail(t, np.full(4, df)).value, expected, rtol=1e-7, atol=1e-12)
    c = studentized_range_quantile(0.95, 3, df) / np.sqrt(2)
    assert largest.quantile(0.95, df) == pytest.approx(c, rel=1e-8)


@pytest.mark.parametrize("df", [3.0, 20.0, np.inf])
@pytest.mark.parametrize("rho", [0.0, 0.3, -0.7, 0.99])
def test_two_statistics_one_factor_and_angles_agree(rho, df):
    """Two correlated statistics: by the angle in their plane, and by a common factor; SciPy's is a random integral."""
    B = root_of(np.array([[1, rho], [rho, 1]]))
    t = np.array([1.0, 2.2, 3.7])
    loadings = np.sqrt(abs(rho)) * np.array([1.0, np.sign(rho) or 1.0])
    largest = LargestT(B)
    found = largest.tail(t, np.full(3, df)).value
    if np.isinf(df):
        np.testing.assert_allclose(found, one_factor_tail(t, loadings), rtol=1e-9)
    joint = scipy.stats.multivariate_t(shape=[[1, rho], [rho, 1]], df=1e7 if np.isinf(df) else df)
    if rho != 0.99:
        inside = [joint.cdf([a, a], lower_limit=[-a, -a], maxpts=10**6, random_state=1) for a in t]
        np.testing.assert_allclose(found, 1 - np.array(inside), atol=2e-5)
    if rho == 0.0 and np.isinf(df):
        np.testing.assert_allclose(found, 1 - (1 - 2 * scipy.stats.norm.sf(t)) ** 2, rtol=1e-10)


def test_dunnetts_tables():
    """Two-sided 5 % points for m treatments and a control (Dunnett 1964, Biometrics 20, 482), to two decimals."""
    for m, df, point in ((2, 10, 2.57), (3, 20, 2.54), (5, 30, 2.66), (9, 60, 2.77)):
        largest = LargestT(with_control(m))
        assert largest.is_exact
        assert largest.quantile(0.95, df) == pytest.approx(point, abs=0.006)


@pytest.mark.parametrize("df", [6.0, np.inf])
def test_scipys_dunnett(df):
    """scipy's own p values, by quasi-Monte Carlo, of unequal groups."""
    rng = np.random.default_rng(3)
    control, *treated = (rng.normal(size=n) for n in (7, 4, 5, 9))
    found = scipy.stats.dunnett(*treated, control=control, random_state=1)
    loadings = np.sqrt(np.array([4, 5, 9]) / (7 + np.array([4, 5, 9])))
    R = np.outer(loadings, loadings)
    np.fill_diagonal(R, 1.0)
    largest = LargestT(root_of(R))
    assert largest.is_exact
    p = largest.tail(found.statistic, np.full(3, 25 - 4.0)).value
    np.testing.assert_allclose(p, found.pvalue, atol=5e-3)


@pytest.mark.parametrize("k", [4, 6])
def test_lattices_agree_with_the_range(k):
    """All pairwise differences of equal variance: what Tukey's integral gives, within the error that is said."""
    largest = LargestT(pairwise(k))
    assert not largest.is_exact
    t, df = np.array([1.0, 2.4, 3.3]), np.full(3, 12.3)
    found = largest.tail(t, df)
    np.testing.assert_allclose(found.value, studentized_range_tail(np.sqrt(2) * t, k, df), atol=2 * found.error)
    assert 0 < found.error < 1e-3
    again = LargestT(pairwise(k)).tail(t, df)
    np.testing.assert_array_equal(again.value, found.value)
    c = largest.quantile(0.95, 12.3)
    assert c == pytest.approx(studentized_range_quantile(0.95, k, 12.3) / np.sqrt(2), abs=2e-3)


def test_quantiles_of_many_degrees_of_freedom():
    df = np.array([3.0, 4.1, 5.0, 8.2, 13.0, 30.0, 100.0, np.inf])
    found = LargestT(pairwise(4)).quantiles(0.95, df)
    expected = [studentized_range_quantile(0.95, 4, d) / np.sqrt(2) for d in df]
    np.testing.assert_allclose(found, expected, rtol=1e-3)
    one_by_one = [LargestT(pairwise(4)).quantile(0.95, d) for d in df[[1, 3]]]
    np.testing.assert_allclose(found[[1, 3]], one_by_one, rtol=1e-3)
    exact = LargestT(with_control(3))
    np.testing.assert_array_equal(exact.quantiles(0.9, df), [exact.quantile(0.9, d) for d in df])


def test_order_and_signs_do_not_matter():
    R = 0.7 ** np.abs(np.subtract.outer(np.arange(5), np.arange(5)))
    B, rng = root_of(R), np.random.default_rng(0)
    order, signs = rng.permutation(5), rng.choice([-1.0, 1.0], size=(5, 1))
    t, df = np.array([2.0, 3.0]), np.array([9.0, 30.0])
    first, second = LargestT(B).tail(t, df), LargestT((signs * B)[order]).tail(t, df)
    np.testing.assert_allclose(first.value, second.value, atol=2 * (first.error + second.error))
    alike = LargestT(np.vstack([B, -B[2:]])).tail(t, df)  # the same five again
    np.testing.assert_allclose(alike.value, first.value, atol=2 * (first.error + alike.error))


def test_a_probability_of_simulated_t_statistics():
    R = np.array([[1, 0.8, 0.1, -0.3], [0.8, 1, 0.4, 0.0], [0.1, 0.4, 1, 0.2], [-0.3, 0.0, 0.2, 1]])
    B, rng, n = root_of(R), np.random.default_rng(5), 400_000
    largest = np.abs(rng.normal(size=(n, 4)) @ B.T).max(axis=1) / np.sqrt(rng.chisquare(5, n) / 5)
    for t in (1.5, 2.6):
        p = LargestT(B).tail([t], [5.0]).value[0]
        assert np.mean(largest > t) == pytest.approx(p, abs=4 * np.sqrt(p / n))


@pytest.mark.parametrize("adjust", [a for a in families.ADJUSTMENTS if a not in ("holm", "fdr")])
@pytest.mark.parametrize("df", [8.5, np.inf])
def test_intervals_leave_out_zero_where_p_is_below_the_level(adjust, df):
    """Where p equals 1 - level, the limit is zero: for every adjustment, at level = 1 - p of the second test."""
    rng = np.random.default_rng(2)
    root = rng.normal(size=(5, 3)) @ np.diag([1, 2, 0.5])
    se = np.linalg.norm(root, axis=1)
    found = families.Combinations(se * np.array([0.5, 2.1, -1.7, 3.0, 1.0]), se, np.full(5, df), root)
    p = families.family_tests(found, adjust, means=4).table["p_value"][1]
    table = families.family_tests(found, adjust, 1 - p, means=4).table
    roots = 1e-5 if adjust in ("mvt", "dunnett") else 1e-8  # which lattices are not worth seeking closer
    assert table["lower"][1] == pytest.approx(0.0, abs=roots)
    assert (table["p_value"] <= p * (1 + 1e-9)).tolist() == [False, True, False, True, False]
    excludes = (table["lower"] > roots) | (table["upper"] < -roots)
    assert excludes.tolist() == [False, False, False, True, False]


def test_adjusted_p_values_lie_between_none_and_bonferroni():
    rng = np.random.default_rng(8)
    for dims in (2, 4):
        root = rng.normal(size=(5, dims))
        se, z = np.linalg.norm(root, axis=1), rng.normal(size=5) * 2
        found = families.Combinations(se * z, se, np.array([3.0, 12.0, 3.0, 12.0, 60.0]), root)
        p = {a: families.family_tests(found, a, means=5).table["p_value"] for a in families.ADJUSTMENTS}
        for adjust in set(families.ADJUSTMENTS) - {"none", "scheffe", "tukey"}:
            assert (p[adjust] >= p["none"] - 1e-12).all()
            assert (p[adjust] <= p["bonferroni"] + 1e-12).all()
        np.testing.assert_array_equal(p["dunnett"], p["mvt"])


def test_coverage_is_simultaneous():
    """All limits hold together as often as they say: 20 000 draws of three correlated estimates and their variance."""
    root = np.array([[1.0, 0.0], [0.6, 0.8], [-0.2, 1.5]])
    se, rng, n, df = np.linalg.norm(root, axis=1), np.random.default_rng(4), 20_000, 6.0
    draws = rng.normal(size=(n, 2)) @ root.T
    s = np.sqrt(rng.chisquare(df, n) / df)[:, None]
    found = families.Combinations(np.zeros(3), se, np.full(3, df), root)
    half = families.family_tests(found, "mvt", 0.9).table["upper"].to_numpy()
    assert np.mean((np.abs(draws) <= s * half).all(axis=1)) == pytest.approx(0.9, abs=4 * np.sqrt(0.09 / n))


@pytest.mark.parametrize("level", [0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("df", [3.0, 12.3, np.inf])
def test_a_quantile_by_lattices_is_where_the_tail_says(level, df):
    largest = LargestT(pairwise(5))
    c = largest.quantile(level, df)
    assert not largest.is_exact
    np.testing.assert_allclose(largest.tail(np.array([c]), np.array([df])).value, 1 - level, rtol=1e-4)
    np.testing.assert_allclose(LargestT(pairwise(5)).quantile(level, df), c, rtol=1e-5)  # wherever the search began


def test_few_nodes_are_enough_for_degrees_of_freedom_that_hardly_differ():
    df = np.linspace(41.0, 70.0, 8)
    largest = LargestT(pairwise(4))
    found = largest.quantiles(0.95, df)
    np.testing.assert_allclose(found, [LargestT(pairwise(4)).quantile(0.95, d) for d in df], rtol=2e-5)
