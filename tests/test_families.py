"""Families: densities and their derivatives, against each other, SciPy and quadrature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import mixjax as mj

ETA = np.array([-4.0, -3.1, -1.3, -0.4, 0.3, 1.0, 2.2, 3.5])
Y = np.array([0.0, 1.0, 2.0, 0.0, 3.0, 5.0, 4.0, 5.0])
SIZE = np.array([5.0, 4.0, 6.0, 3.0, 3.0, 9.0, 4.0, 6.0])


@pytest.mark.parametrize("link", ["logit", "probit", "cloglog", "cauchit"])
def test_binomial_density(link):
    family = mj.families.binomial(link)
    # SciPy takes 1 - p, which has lost digits where p is near 1
    eta = np.minimum(ETA, 1.5)
    expected = -stats.binom.logpmf(Y, SIZE, family.mean(eta))
    np.testing.assert_allclose(family.density(eta, Y, SIZE, ()), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("link", ["log", "sqrt"])
def test_density_of_counts(link):
    poisson, nbinom = mj.families.poisson(link), mj.families.nbinom(link)
    mu, k = poisson.mean(ETA), 1.7
    np.testing.assert_allclose(poisson.density(ETA, Y, None, ()), -stats.poisson.logpmf(Y, mu), rtol=1e-13)
    expected = -stats.nbinom.logpmf(Y, k, k / (k + mu))
    np.testing.assert_allclose(nbinom.density(ETA, Y, None, (np.log(k),)), expected, rtol=1e-12)


@pytest.mark.parametrize("family", [mj.families.binomial(), mj.families.poisson(), mj.families.nbinom()])
def test_numpy_is_jax(family, x64):
    psi = (0.4,) * family.n_psi
    size = SIZE if family.name == "binomial" else None
    at_once = family.derivatives(ETA, Y, size, psi)
    compiled = jax.jit(family.derivatives)(jnp.asarray(ETA), Y, size, psi)
    for one, other in zip(jax.tree.leaves(at_once), jax.tree.leaves(compiled), strict=True):
        assert isinstance(one, np.ndarray)
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-13)
