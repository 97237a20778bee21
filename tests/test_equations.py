"""The mixed-model equations of one fit: against dense textbook formulas and against automatic differentiation; and
what a fit says compiles nothing."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import covariance
from designs import STRUCTURES, random_design

import mixjax as mj
from mixjax.bases import Basis
from mixjax.covariance import Diagonal, HomogeneousCompoundSymmetry, Unstructured, triangle
from mixjax.diagnostics.deletion import rows_of
from mixjax.diagnostics.sensitivity import _at_once, _contract, _jacobian, _slopes_of_products
from mixjax.estimation.blup import conditional_covariances
from mixjax.estimation.estimate import fit_at_once
from mixjax.likelihood.criterion import in_bases
from mixjax.likelihood.equations import Equations, by_factor
from mixjax.likelihood.statistics import Layout, TermPlace

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


def record(design, reml):
    """A fit that has gone a little past its minimum, of a response that every term has a part in."""
    rng = np.random.default_rng(7)
    effects = [rng.normal(0, 2, (term.n_groups, term.Z.shape[1]))[term.group] for term in design.terms]
    y = design.y + sum((term.Z * b).sum(1) for term, b in zip(design.terms, effects, strict=True))
    design = replace(design, y=y)
    stats = mj.cross_products(design)
    found = fit_at_once(stats, None, reml)
    return SimpleNamespace(rows=design, stats=stats, reml=reml, estimates=found._replace(theta=1.03 * found.theta))


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


# --- derivatives by case weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("name", STRUCTURES)
def test_case_slopes_are_those_of_automatic_differentiation(name, reml):
    """Beside the minimum too: derivatives of a gradient that is not zero, by the formulas of a minimum."""
    fitted = record(random_design(STRUCTURES[name], 6), reml)
    rows = rows_of(fitted)
    x, regular, found = _at_once(fitted, rows)
    stats = rows.padded().stats
    x2, _, slopes = jax.device_get(_slopes_of_products(stats, fitted.estimates.theta, np.bool_(reml), None))
    close(x, x2, 1e-12)
    assert regular
    expected = _contract(rows, slopes)
    size = np.abs(expected).max(axis=0) + (expected == 0).all(axis=0)
    close(found / size, expected / size, 0.0, 1e-9)


@pytest.mark.parametrize("scale", ["sdcor", "vcov", "theta"])
@pytest.mark.parametrize("structure", [Unstructured(3), Diagonal(3), HomogeneousCompoundSymmetry(3)])
def test_slopes_of_variances_are_those_of_automatic_differentiation(scale, structure):
    rng = np.random.default_rng(2)
    basis = Basis(*(rng.normal(size=(3, 3)) if structure == Unstructured(3) else np.eye(3) for _ in "ab"), 0.0)
    basis = basis._replace(R_inv=np.linalg.inv(basis.R))
    x, layout = rng.normal(size=structure.k), Layout((TermPlace(structure, 0, 0),), (0,), (), ())
    stats = SimpleNamespace(layout=layout, Z_bases=(basis,))

    def variances(at):
        x, sigma = at[:-1], at[-1]
        own = basis.R_inv @ structure.factor(x)
        D = own @ own.T
        rows, columns = triangle(3)
        sd = jnp.sqrt(jnp.diagonal(D))
        if scale == "theta":
            values = jnp.linalg.cholesky(D)[rows, columns]
        elif scale == "vcov":
            values = sigma**2 * D[rows, columns]
        else:
            values = jnp.where(rows == columns, sigma * sd[rows], D[rows, columns] / (sd[rows] * sd[columns]))
        return jnp.append(values, sigma**2 if scale == "vcov" else sigma)

    close(_jacobian(x, 1.7, stats, scale), jax.jacfwd(variances)(jnp.append(x, 1.7)), 1e-9, 1e-11)
