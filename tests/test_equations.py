"""The mixed-model equations of one fit: against dense textbook formulas and against automatic differentiation; and
what a fit says compiles nothing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import covariance
from designs import STRUCTURES, random_design

import mixjax as mj
from mixjax.estimation.blup import conditional_covariances
from mixjax.likelihood.criterion import in_bases
from mixjax.likelihood.equations import Equations, by_factor

pytestmark = pytest.mark.usefixtures("x64")
WAYS = {"dense": {}, "sparse": {"most_crossed": 0}, "factorised": {"most_dense": 0}}


def close(actual, desired, rtol=1e-9, atol=0.0):
    np.testing.assert_allclose(np.asarray(actual, float), np.asarray(desired, float), rtol=rtol, atol=atol)


def random_lambdas(design, seed, singular):
    """A triangle per term; singular ones lose their last column, or are zero."""
    rng = np.random.default_rng(seed)
    lambdas = [np.tril(rng.normal(size=(term.Z.shape[1],) * 2)) for term in design.terms]
    if singular:
        for Lambda in lambdas:
            Lambda[:, -1] = 0.0
    return lambdas


def factors_of(design):
    """Terms of every grouping factor."""
    found = {}
    for t, term in enumerate(design.terms):
        found.setdefault(term.group.tobytes(), []).append(t)
    return list(found.values())


def dense_conditional_covariances(design, lambdas):
    """``D - D Z'H^{-1}Z D`` among the effects of every level, per grouping factor ``(levels, w, w)``."""
    H = covariance(design, [L @ L.T for L in lambdas], 1.0)
    found = []
    for ts in factors_of(design):
        own = [lambdas[t] @ lambdas[t].T for t in ts]
        D = np.zeros((sum(map(len, own)),) * 2)
        start = 0
        for block in own:
            D[start : start + len(block), start : start + len(block)] = block
            start += len(block)
        Z, group = np.hstack([design.terms[t].Z for t in ts]), design.terms[ts[0]].group
        levels = []
        for level in range(design.terms[ts[0]].n_groups):
            DZ = D @ (Z * (group == level)[:, None]).T
            levels.append(D - DZ @ np.linalg.solve(H, DZ.T))
        found.append(np.stack(levels))
    return found


@pytest.mark.parametrize("singular", [False, True])
@pytest.mark.parametrize("name", STRUCTURES)
def test_conditional_covariances(name, singular):
    design = random_design(STRUCTURES[name], 4)
    stats, lambdas = mj.cross_products(design), random_lambdas(design, 5, singular)
    expected = dense_conditional_covariances(design, lambdas)
    own = in_bases(lambdas, stats)
    for found, dense in zip(conditional_covariances(own, stats), expected, strict=True):
        close(np.moveaxis(found, -1, 0), dense, 1e-9, 1e-12 * np.abs(dense).max())
    differentiated = jax.jit(conditional_covariances)([jnp.asarray(F) for F in own], stats)
    for found, other in zip(conditional_covariances(own, stats), differentiated, strict=True):
        assert isinstance(found, np.ndarray)
        close(found, other, 1e-9, 1e-12 * np.abs(found).max())
    first = Equations(stats, by_factor(own, stats.layout)).covariances()
    for options in WAYS.values():
        for found, other in zip(
            Equations(stats, by_factor(own, stats.layout), **options).covariances(), first, strict=True
        ):
            close(found, other, 1e-10, 1e-13 * np.abs(other).max())
