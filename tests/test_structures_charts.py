"""Structures of correlated effects as functions of their coordinates: arrays, no fits, and nothing is compiled."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mixjax import covariance as cov
from mixjax.covariance.scaled import QUARTER, Scaled

NAMES = [name for name, kind in cov.STRUCTURES.items() if issubclass(kind, Scaled)]
NEW = [*NAMES, "homdiag"]
LANES = 4


def product(F):
    return np.einsum("ab...,cb...->ac...", F, F)


def lag(q):
    return abs(np.arange(q)[:, None] - np.arange(q))


def correlations(D):
    sd = np.sqrt(np.diagonal(D))
    return D / np.outer(sd, sd)


def is_of(name, R):
    """Whether correlations have the pattern, by the definition in words."""
    q = len(R)
    if name == "cs":
        return np.ptp(R[np.triu_indices(q, 1)]) < 1e-12
    if "toep" in name:
        return all(np.ptp(np.diagonal(R, k)) < 1e-12 for k in range(1, q))
    steps = np.diagonal(R, 1) if name == "adh" else np.full(q - 1, R[0, 1])
    wanted = np.array([[np.prod(steps[min(a, b) : max(a, b)]) for b in range(q)] for a in range(q)])
    return abs(R - wanted).max() < 1e-12


@pytest.mark.parametrize("name", NEW)
@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(st.integers(2, 6), st.integers(0, 10**6), st.sampled_from([0.1, 1.0, 4.0]))
def test_any_coordinates_are_a_covariance_of_the_structure(name, q, seed, size):
    s = cov.structure_of(name, q)
    rng = np.random.default_rng(seed)
    x = size * rng.normal(size=s.k)
    D = product(s.factor(x))
    scale = abs(D).max()
    assert np.linalg.eigvalsh(D).min() >= -1e-12 * scale
    if name == "homdiag":
        np.testing.assert_allclose(D, x[0] ** 2 * np.eye(q), rtol=1e-14)
    else:
        assert is_of(name, correlations(D))
        if s.homogeneous:
            np.testing.assert_allclose(np.diagonal(D), x[0] ** 2, rtol=1e-12)
        else:
            np.testing.assert_allclose(np.diagonal(D), x[:q] ** 4, rtol=1e-12)
    # No sign of a scale counts, and an angle is where its reflection at a quarter turn is.
    flips = x.copy()
    scales = list(s.deviations)
    flips[scales] *= rng.choice([-1.0, 1.0], len(scales))
    angles = np.setdiff1d(np.arange(s.k), scales)
    flips[angles] = np.where(rng.random(len(angles)) < 0.5, np.pi - flips[angles], flips[angles])
    np.testing.assert_allclose(product(s.factor(flips)), D, atol=1e-12 * scale)
    # There and back, also to what is unconstrained.
    back = s.near(s.factor(x))
    np.testing.assert_allclose(product(s.factor(back)), D, atol=1e-11 * scale)
    np.testing.assert_allclose(product(s.factor(s.exponentials(s.logarithms(back)))), D, atol=1e-6 * scale)


@pytest.mark.parametrize("q", [2, 4])
@pytest.mark.parametrize("name", NEW)
def test_derivatives_by_differences(name, q):
    s, rng = cov.structure_of(name, q), np.random.default_rng(q)
    x, g = rng.normal(size=(s.k, LANES)), rng.normal(size=(q * (q + 1) // 2, LANES))
    upper, h = np.triu_indices(q), 1e-5

    def slope_along(fun, i):
        step = h * np.eye(s.k)[i][:, None]
        near, far = (fun(x + n * step) - fun(x - n * step) for n in (1, 2))
        return (8 * near - far) / (12 * h)

    jacobian, curvature, slopes = s.jacobian(x), s.curvature(x, g), s.slopes(x)
    for i in range(s.k):
        wanted = slope_along(lambda x: product(s.factor(x))[upper], i)
        np.testing.assert_allclose(jacobian[:, i], wanted, rtol=1e-8, atol=1e-8)
        wanted = slope_along(lambda x: np.einsum("pl,pkl->kl", g, s.jacobian(x)), i)
        np.testing.assert_allclose(curvature[i], wanted, rtol=1e-8, atol=1e-7)
        np.testing.assert_allclose(slopes[i], slope_along(s.factor, i), rtol=1e-8, atol=1e-8)
    np.testing.assert_allclose(curvature, np.swapaxes(curvature, 0, 1), atol=1e-12)
    # One point is one lane.
    np.testing.assert_array_equal(s.slopes(x[:, 0]), slopes[..., 0])
    np.testing.assert_array_equal(s.factor(x[:, 0]), s.factor(x)[..., 0])


def edges(name, q):
    """Coordinates at each bound, and the correlations there."""
    s = cov.structure_of(name, q)
    scales, angle = np.linspace(0.5, 1.5, s.n_scales), 0.4
    for j in range(s.n_shapes):
        for bound in (-QUARTER, QUARTER, 3 * QUARTER):
            x = np.concatenate([scales, np.full(s.n_shapes, angle)])
            x[s.n_scales + j] = bound
            yield s, x
    if name == "cs":
        yield s, np.concatenate([scales, [0.0]])


@pytest.mark.parametrize("name", NAMES)
def test_bounds_are_ordinary_stationary_points(name):
    """Exactly singular there; no slope in the angle; coordinates say that it does not move; there and back."""
    for s, x in edges(name, 4):
        D = product(s.factor(x))
        assert np.linalg.matrix_rank(D, tol=1e-9) < 4
        at = np.flatnonzero(abs(np.cos(x[s.n_scales :])) < 1e-9)[0] if name != "cs" else 0
        np.testing.assert_array_equal(s.jacobian(x[:, None])[:, s.n_scales + at], 0.0)
        unchanged, free = s.reduced(x[:, None], np.array([-1]))
        assert not free[s.n_scales + at, 0]
        np.testing.assert_array_equal(unchanged[:, 0], x)
        back = s.settled(s.near(s.factor(x)))
        np.testing.assert_allclose(product(s.factor(back)), D, atol=1e-12)
        assert not (s.reduced(back[:, None], np.array([-1]))[1] & s.moving(back[:, None])).all()
        # From nearby the reduction ends exactly there.
        close = x.copy()
        close[s.n_scales + at] += 1e-3
        assert 0 < s.sizes(close[:, None])[s.n_scales + at, 0] < 1e-2
        reduced, _ = s.reduced(close[:, None], np.array([s.n_scales + at]))
        np.testing.assert_array_equal(s.sizes(reduced)[s.n_scales + at], 0.0)
        np.testing.assert_allclose(product(s.factor(reduced))[..., 0], D, atol=1e-5)


def test_bounds_of_the_correlation_of_all():
    s = cov.structure_of("cs", 5)
    for t, rho in ((0.0, 1.0), (QUARTER, -0.25), (2 * QUARTER, 1.0)):
        R = correlations(product(s.factor(np.append(np.ones(5), t))))
        np.testing.assert_allclose(R[np.triu_indices(5, 1)], rho, atol=4e-16)


@pytest.mark.parametrize("name", [name for name in NAMES if not cov.STRUCTURES[name].homogeneous])
@pytest.mark.parametrize("zeros", [[0], [1], [3], [0, 1], [1, 2], [0, 2], [1, 3]])
def test_effects_without_variance(name, zeros):
    """The others keep their covariance, there and back; what is left of it is what moves."""
    s, x = cov.structure_of(name, 4), np.random.default_rng(3).uniform(0.3, 0.9, cov.structure_of(name, 4).k)
    kept = np.setdiff1d(np.arange(4), zeros)
    D = product(s.factor(x))[np.ix_(kept, kept)]
    found = x[:, None]
    for c in zeros:
        found, free = s.reduced(found, np.array([c]))
        assert not free[c, 0]
    for coordinates in (found[:, 0], s.settled(s.near(s.factor(found[:, 0])))):
        new = product(s.factor(coordinates))
        np.testing.assert_allclose(new[np.ix_(kept, kept)], D, atol=1e-12)
        np.testing.assert_array_equal(new[zeros], 0.0)
        np.testing.assert_array_equal(coordinates[zeros], 0.0)
        moving = s.moving(coordinates[:, None])[:, 0]
        np.testing.assert_array_equal(moving, (s.jacobian(coordinates[:, None]) != 0).any(0)[:, 0])
        assert moving.sum() < s.k


def test_nothing_depends_on_a_correlation_beside_no_variance():
    s = cov.structure_of("ar1", 3)
    np.testing.assert_array_equal(s.moving(np.array([0.0, 0.3])), [False, False])
    np.testing.assert_array_equal(s.moving(np.array([0.5, 0.3])), [True, True])
    np.testing.assert_array_equal(s.moving(np.array([0.5, QUARTER])), [True, False])
    toep = cov.structure_of("homtoep", 4)
    # At a partial autocorrelation of 1 those of larger distances are without effect.
    np.testing.assert_array_equal(toep.moving(np.array([0.5, 0.3, QUARTER, 0.2])), [True, True, False, False])


def test_a_start_is_positive_definite_whatever_it_is_near_to():
    rng = np.random.default_rng(0)
    for name in NEW:
        for q in (2, 3, 6):
            s = cov.structure_of(name, q)
            F = rng.normal(size=(q, q, 50))
            D = product(s.factor(s.near(F)))
            assert (np.linalg.eigvalsh(np.moveaxis(D, -1, 0)).min(-1) > 1e-8).all(), name


def test_the_toeplitz_chart_reaches_every_positive_definite_matrix():
    """Of any spectrum: autocovariances of a random moving average."""
    rng = np.random.default_rng(1)
    for _ in range(20):
        a = rng.normal(size=7)
        r = np.array([a[: 7 - k] @ a[k:] for k in range(5)])
        D = r[lag(5)]
        for name in ("homtoep", "toep"):
            s = cov.structure_of(name, 5)
            np.testing.assert_allclose(product(s.factor(s.near(np.linalg.cholesky(D)))), D, atol=1e-12 * r[0])


def test_two_effects_have_one_correlation_whatever_it_is_called():
    F = np.linalg.cholesky(np.array([[2.0, -0.8], [-0.8, 1.5]]))
    for name in ("cs", "hetar1", "toep", "adh"):
        s = cov.structure_of(name, 2)
        np.testing.assert_allclose(product(s.factor(s.near(F))), F @ F.T, rtol=1e-13)


def test_natural_parameters():
    names = {
        "cs": ["sd_a|g", "sd_b|g", "sd_c|g", "cor|g"],
        "ar1": ["sd|g", "cor_lag1|g"],
        "hetar1": ["sd_a|g", "sd_b|g", "sd_c|g", "cor_lag1|g"],
        "homtoep": ["sd|g", "cor_lag1|g", "cor_lag2|g"],
        "toep": ["sd_a|g", "sd_b|g", "sd_c|g", "cor_lag1|g", "cor_lag2|g"],
        "adh": ["sd_a|g", "sd_b|g", "sd_c|g", "cor_b.a|g", "cor_c.b|g"],
        "homdiag": ["sd|g"],
    }
    rng = np.random.default_rng(2)
    for name, wanted in names.items():
        s = cov.structure_of(name, 3)
        assert [parameter.name("abc", "g") for parameter in s.natural] == wanted
        assert len(s.natural) == s.k
        R = correlations(product(s.factor(rng.normal(size=s.k))))
        # All correlations follow from those with names.
        known = np.eye(3)
        for parameter in s.natural:
            if parameter.kind == "cor":
                for i, j in parameter.pairs(3):
                    np.testing.assert_allclose(R[i, j], R[parameter.i, parameter.j], rtol=1e-12)
                    known[i, j] = known[j, i] = R[parameter.i, parameter.j]
        np.testing.assert_allclose(s.completed(known), R, atol=1e-12)


def test_of_one_effect_there_is_one_structure_and_none_of_correlations():
    for name in cov.STRUCTURES:
        assert cov.structure_of(name, 1) == cov.Unstructured(1)
    with pytest.raises(ValueError, match="two effects or more, got 1"):
        cov.STRUCTURES["ar1"](1)


def test_toeplitz_covariances_are_linear_in_directions():
    s = cov.structure_of("homtoep", 4)
    D = product(s.factor(np.random.default_rng(0).normal(size=s.k)))
    np.testing.assert_allclose(sum(D[0, k] * unit for k, unit in enumerate(s.directions())), D, atol=1e-14)
