"""Reference fits of generalised models, and the dense likelihood that other tests stand on, against each other.

The R code that made the fits and ``glmm_dense`` share nothing but definitions. Estimates are stored with 15 digits at
an optimum, so the criterion differs by rounding only: sums of magnitudes up to 2e5 (gamma, shape 150) lose 2e-11.
"""

import numpy as np
import pytest
from glmm_cases import MODELS, arrays, case, factors, family_parameter, fits
from glmm_dense import agq_dense, laplace_dense, modes

import mixjax as mj

ROUNDING = 1e-10
FITS = fits()
ONE_EFFECT = [(m, f) for m, f in FITS if [len(t["terms"]) for t in case(m).fits["nAGQ1"]["varcorr"]] == [1]]
INTEGRATED = [(m, f) for m, f in FITS if "m2logLik_exact_integration_at_estimates" in case(m).fits[f]]


def estimates(model, name):
    """All that the dense functions take."""
    design, size = arrays(model)
    beta = np.array(list(case(model).fits[name]["fixef"].values()))
    family, link = case(model).family, case(model).link
    return design, size, family, link, beta, factors(model, name), family_parameter(model, name)


def criterion(model, name, estimates):
    fit = case(model).fits[name]
    if fit["nAGQ"] > 1:
        return agq_dense(*estimates, nagq=fit["nAGQ"])
    return laplace_dense(*estimates, curvature=fit["curvature"])


@pytest.mark.parametrize(("model", "name"), FITS)
def test_criterion(model, name):
    stored = case(model).fits[name]
    value = criterion(model, name, estimates(model, name))
    np.testing.assert_allclose(value, stored["m2logLik"], rtol=0, atol=ROUNDING)
    np.testing.assert_allclose(stored["logLik"], -value / 2, rtol=0, atol=ROUNDING)


@pytest.mark.parametrize(("model", "name"), FITS)
def test_modes(model, name):
    stored = case(model).fits[name]["ranef"]
    wanted = np.concatenate([np.ravel(effects["values"]) for effects in stored.values()])
    np.testing.assert_allclose(modes(*estimates(model, name)).b, wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("model", "name"), INTEGRATED)
def test_many_nodes_are_the_integral(model, name):
    integral = case(model).fits[name]["m2logLik_exact_integration_at_estimates"]
    # R's integrate() was asked for 1e-12 of every level's likelihood, of which there are up to 118.
    np.testing.assert_allclose(agq_dense(*estimates(model, name), nagq=61), integral, rtol=0, atol=2 * 118e-12)


@pytest.mark.parametrize(("model", "name"), ONE_EFFECT)
def test_one_node_is_laplace(model, name):
    at = estimates(model, name)
    np.testing.assert_allclose(agq_dense(*at, nagq=1), laplace_dense(*at), rtol=0, atol=ROUNDING)


def surface(model, name):
    """The criterion as a function of the free parameters in units of their standard errors, from the estimates."""
    design, size, family, link, beta, lambdas, psi = estimates(model, name)
    fit = case(model).fits[name]
    theta = np.array(list(fit["theta"].values()))
    whole = np.concatenate([theta, beta, psi])
    free = np.setdiff1d(np.arange(len(whole)), np.flatnonzero(theta == 0))
    se = np.sqrt(np.diag(fit["vcov_all"]["values"]))
    assert len(se) == len(free) == fit["npar"] - fit["isSingular"]

    def at(z):
        moved = whole.copy()
        moved[free] += se * z
        rest, new = moved[: len(theta)], []
        for Lambda in lambdas:
            columns, rows = np.triu_indices(len(Lambda))
            new.append(np.zeros_like(Lambda))
            new[-1][rows, columns], rest = rest[: len(rows)], rest[len(rows) :]
        split = moved[len(theta) :]
        return criterion(model, name, (design, size, family, link, split[: len(beta)], new, split[len(beta) :]))

    return at, len(free)


@pytest.mark.parametrize(("model", "name"), [fit for fit in FITS if fit[0] != "grouseticks"])  # 584 effects: slow
def test_estimates_are_stationary(model, name):
    at, k = surface(model, name)
    h = 1e-2

    def slope(axis):  # by h^4: 3e-10 times a fifth derivative, and rounding of 2e-11 / h
        return (8 * (at(h * axis) - at(-h * axis)) - (at(2 * h * axis) - at(-2 * h * axis))) / (12 * h)

    gradient = [slope(axis) for axis in np.eye(k)]
    np.testing.assert_allclose(gradient, 0, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("model", "name"),
    [("cbpp", "nAGQ1"), ("cbpp", "nAGQ10"), ("grouseticks_brood", "nAGQ1"), ("epil_nbinom2", "nAGQ1")],
)
def test_covariance_of_all_parameters(model, name):
    at, k = surface(model, name)
    here, axes = at(np.zeros(k)), np.eye(k)

    def hessian(h):
        plus, minus = ([at(sign * h * e) for e in axes] for sign in (1, -1))
        H = np.diag([(p - 2 * here + m) / h**2 for p, m in zip(plus, minus, strict=True)])
        for i in range(k):
            for j in range(i):
                cross = (
                    at(h * (axes[i] + axes[j])) + at(-h * (axes[i] + axes[j])) - plus[i] - plus[j] - minus[i] - minus[j]
                )
                H[i, j] = H[j, i] = (cross + 2 * here) / (2 * h**2)
        return H

    # Errors of h^2 and h^4 extrapolated away leave (0.1)^6 times sixth derivatives, and rounding of 1e-11 / 0.025^2.
    coarse, middle, fine = (hessian(h) for h in (0.1, 0.05, 0.025))
    H = (64 * fine - 20 * middle + coarse) / 45
    stored = np.array(case(model).fits[name]["vcov_all"]["values"])
    se = np.sqrt(np.diag(stored))
    np.testing.assert_allclose(2 * np.linalg.inv(H), stored / np.outer(se, se), rtol=0, atol=1e-6)


@pytest.mark.parametrize("model", ["singular_zero", "singular_correlation"])
def test_zeros_are_minima(model):
    *at, lambdas, psi = estimates(model, "nAGQ1")
    assert case(model).fits["nAGQ1"]["isSingular"]
    least = laplace_dense(*at, lambdas, psi)
    for Lambda in lambdas:
        if Lambda[-1, -1] == 0:
            Lambda[-1, -1] = 0.05
            assert laplace_dense(*at, lambdas, psi) > least + 1e-4
            Lambda[-1, -1] = 0.0


# A level per row cannot be told from the noise of a Gaussian model, which build_design makes: not grouseticks.
@pytest.mark.parametrize("model", [m for m in MODELS if m != "grouseticks"])
def test_arrays_are_those_of_the_formula(model):
    formula, table, *_, stored = case(model)
    design, _ = arrays(model)
    right = formula.split("~", 1)[1]
    built, labels = mj.build_design(f"response_ ~ {right}", table.assign(response_=design.y))
    names = list(stored["nAGQ1"]["fixef"])
    assert sorted(labels.fixed) == sorted(names)
    np.testing.assert_array_equal(built.X[:, [labels.fixed.index(name) for name in names]], design.X)
    np.testing.assert_array_equal(
        0 if design.offset is None else design.offset, 0 if built.offset is None else built.offset
    )
    for term, other, label, reference in zip(
        design.terms, built.terms, labels.terms, stored["nAGQ1"]["varcorr"], strict=True
    ):
        assert (label.group, list(label.effects)) == (reference["group"], reference["terms"])
        assert list(label.levels) == stored["nAGQ1"]["ranef"][label.group]["levels"]
        np.testing.assert_array_equal(term.Z, other.Z)
        np.testing.assert_array_equal(term.group, other.group)
