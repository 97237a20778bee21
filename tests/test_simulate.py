"""Simulated responses: their distribution, and that a replicate depends on its key and number alone."""

import jax
import numpy as np
import pytest
from conftest import fit_of
from dense import covariance
from designs import STRUCTURES, random_design

import mixjax as mj
from mixjax.simulation import simulate_responses, symmetric_root

N = 20_000


def parameters(design, seed=0):
    """beta, sigma, and full covariances that are no diagonal."""
    rng = np.random.default_rng(seed)
    factors = [rng.normal(size=(term.Z.shape[1],) * 2) for term in design.terms]
    return rng.normal(size=design.X.shape[1]), 0.7, [F @ F.T for F in factors]


def moment_scores(Y, mean, V):
    """Normal scores of the sample means, and of the sample covariances with the mean known (Wishart variances)."""
    n = len(Y)
    d = np.diagonal(V)
    of_mean = (Y.mean(axis=0) - mean) / np.sqrt(d / n)
    S = (Y - mean).T @ (Y - mean) / n
    of_covariance = (S - V) / np.sqrt((V**2 + np.outer(d, d)) / n)
    return of_mean, of_covariance[np.tril_indices(len(d))]


@pytest.mark.parametrize("name", ["one factor, q=2, weights", "crossed, three factors, weights", "nested"])
def test_mean_and_covariance(name):
    """Weights, offset and covariances of several terms: all moments within five standard errors, and not too close."""
    design = random_design(STRUCTURES[name], seed=3)
    beta, sigma, Sigma = parameters(design)
    Y = simulate_responses(design, beta, sigma, Sigma, key=11, n=N)
    mean = design.offset + design.X @ beta
    for z in moment_scores(Y, mean, covariance(design, Sigma, sigma)):
        assert np.abs(z).max() < 5
        assert 0.5 < np.sqrt((z**2).mean()) < 1.6


def test_moments_of_a_fit():
    fit = fit_of("sleepstudy_slopes", "REML")
    est = fit.estimates
    Y = simulate_responses(fit.design, est.beta, est.sigma, est.Sigma, key=5, n=N)
    for z in moment_scores(Y, fit.predict(random=False).to_numpy(), fit.marginal_cov()):
        assert np.abs(z).max() < 5.5  # the largest of 16 290


def test_responses_are_normal():
    """Third and fourth moments of single responses, whose errors are sqrt(6 / N) and sqrt(24 / N)."""
    fit = fit_of("sleepstudy_slopes", "REML")
    est = fit.estimates
    Y = simulate_responses(fit.design, est.beta, est.sigma, est.Sigma, key=6, n=N)
    z = (Y - fit.predict(random=False).to_numpy()) / np.sqrt(np.diagonal(fit.marginal_cov()))
    assert np.abs((z**3).mean(axis=0)).max() < 5 * np.sqrt(15 / N)
    assert np.abs((z**4).mean(axis=0) - 3).max() < 5 * np.sqrt(96 / N)


def test_given_random_effects():
    """With random="fitted" what varies is the residual, independent from row to row, the same as with new effects."""
    design = random_design(STRUCTURES["one factor, q=2, weights"], seed=4)
    beta, sigma, Sigma = parameters(design)
    b = [np.random.default_rng(0).normal(size=(term.n_groups, term.Z.shape[1])) for term in design.terms]
    Y = simulate_responses(design, beta, sigma, Sigma, 3, N, random="fitted", b=b)
    mean = design.offset + design.X @ beta + (design.terms[0].Z * b[0][design.terms[0].group]).sum(axis=1)
    for z in moment_scores(Y, mean, np.diag(sigma**2 / design.weights)):
        assert np.abs(z).max() < 5
    residuals_alone = simulate_responses(design, beta, sigma, [np.zeros((2, 2))], 3, 50)
    expected = residuals_alone - (design.offset + design.X @ beta)
    np.testing.assert_allclose(Y[:50] - mean, expected, atol=1e-12)


def test_a_replicate_depends_on_key_and_number_alone():
    design = random_design(STRUCTURES["nested"], seed=5)
    beta, sigma, Sigma = parameters(design)

    def draw(key, n, first=0):
        return simulate_responses(design, beta, sigma, Sigma, key, n, first)

    Y = draw(7, 5_000)
    for first, n in [(0, 1), (0, 3_001), (2_047, 2), (4_999, 1), (1_234, 2_000)]:
        np.testing.assert_array_equal(draw(7, n, first), Y[first : first + n])
    for key in (np.int64(7), jax.random.key(7), jax.random.PRNGKey(7), np.asarray(jax.random.PRNGKey(7))):
        np.testing.assert_array_equal(draw(key, 10), Y[:10])
    with jax.enable_x64(True):
        np.testing.assert_array_equal(draw(7, 10), Y[:10])
    assert Y.dtype == np.float64
    assert len(np.unique(Y[:, 0])) == len(Y)
    assert not (draw(8, 10) == Y[:10]).any()
    other_end = draw(7, 3, 2**32 - 3)
    assert np.isfinite(other_end).all()
    assert not (other_end == Y[:3]).any()


def test_scale_and_order_of_rows():
    """Twice all standard deviations doubles the deviations; rows that change places keep their group's effects."""
    design = random_design(STRUCTURES["one factor, q=2, weights"], seed=6)
    beta, sigma, Sigma = parameters(design)
    mean = design.offset + design.X @ beta
    Y = simulate_responses(design, beta, sigma, Sigma, 1, 5)
    twice = simulate_responses(design, beta, 2 * sigma, [4 * Sigma[0]], 1, 5)
    np.testing.assert_allclose(twice - mean, 2 * (Y - mean), rtol=1e-12, atol=1e-12)
    back = np.arange(len(mean))[::-1]
    term = mj.RandomTerm(Z=design.terms[0].Z[back], group=design.terms[0].group[back], n_groups=7)
    turned = mj.Design(design.y[back], design.X[back], (term,), design.weights[back], design.offset[back])
    np.testing.assert_allclose(
        simulate_responses(turned, beta, 0.0, Sigma, 1, 5)[:, back],
        simulate_responses(design, beta, 0.0, Sigma, 1, 5),
        rtol=1e-12,
    )


def test_root_of_any_rank():
    rng = np.random.default_rng(0)
    F = rng.normal(size=(4, 4))
    for rank in range(5):
        Sigma = F[:, :rank] @ F[:, :rank].T
        R = symmetric_root(Sigma)
        np.testing.assert_allclose(R @ R.T, Sigma, atol=1e-14)
    far_apart = np.diag([1e-9, 1.0, 1e9]) @ (np.eye(3) + 0.5) @ np.diag([1e-9, 1.0, 1e9])
    R = symmetric_root(far_apart)
    np.testing.assert_allclose(R @ R.T, far_apart, rtol=1e-14)
    no_variance = np.array([[0.0, 0.0], [0.0, 2.0]])
    np.testing.assert_allclose(symmetric_root(no_variance), np.diag([0.0, np.sqrt(2.0)]), atol=1e-15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beta": [1.0]}, "beta has shape"),
        ({"sigma": -1.0}, "sigma must be"),
        ({"sigma": np.nan}, "sigma must be"),
        ({"Sigma": []}, "0 covariances"),
        ({"Sigma": [np.eye(3)]}, r"Sigma\[0\] has shape"),
        ({"Sigma": [np.array([[1.0, 2.0], [2.0, 1.0]])]}, "positive semidefinite"),
        ({"Sigma": [np.array([[1.0, 0.5], [0.0, 1.0]])]}, "symmetric"),
        ({"Sigma": [np.array([[0.0, 0.5], [0.5, 1.0]])]}, "positive semidefinite"),
        ({"Sigma": [-np.eye(2)]}, "diagonal not negative"),
        ({"n": 0}, "n must be an integer"),
        ({"n": 2.5}, "n must be an integer"),
        ({"first": -1}, "first must be"),
        ({"first": 2**32}, "numbered up to"),
        ({"key": 1.5}, "key must be"),
        ({"key": True}, "key must be"),
        ({"key": 2**70}, "64 bits"),
        ({"key": jax.random.split(jax.random.key(0))}, "key must be"),
        ({"random": "old"}, "random must be"),
        ({"random": "fitted"}, "needs b"),
        ({"random": "fitted", "b": []}, "0 parts"),
        ({"random": "fitted", "b": [np.zeros((3, 2))]}, r"b\[0\] has shape"),
    ],
)
def test_bad_arguments(change, message):
    design = random_design(STRUCTURES["one factor, q=2, weights"], seed=0)
    beta, sigma, Sigma = parameters(design)
    arguments = {"beta": beta, "sigma": sigma, "Sigma": Sigma, "key": 0, "n": 1, **change}
    with pytest.raises(ValueError, match=message):
        simulate_responses(design, **arguments)


def test_one_program_for_similar_designs():
    """Compiled are random numbers only, of padded length: neither terms, nor parameters, nor the key compile again."""
    from mixjax import simulation

    first = random_design(STRUCTURES["one factor, q=2, weights"], seed=1)
    simulate_responses(first, *parameters(first), 0, 1)
    before = simulation._draws._cache_size()
    for n in (38, 40):
        other = random_design(STRUCTURES["one factor, q=2, weights"], seed=2, n=n)
        simulate_responses(other, *parameters(other, 1), 1, 3)
    assert simulation._draws._cache_size() == before


@pytest.mark.parametrize("random", ["foo", "", ["new"], None])
def test_a_fit_draws_random_effects_anew_or_as_predicted_and_nothing_else(random):
    fit = mj.lmm("Yield ~ 1 + (1 | Batch)", mj.datasets.load("Dyestuff"))
    with pytest.raises(ValueError, match="random must be 'new'"):
        fit.simulate(1, 2, random=random)
