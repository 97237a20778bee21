"""Many fits of crossed and nested models: the optima of single ones, whoever is first."""

import numpy as np
import pytest

import mixjax as mj
from mixjax import covariance as cov
from mixjax.engine.laplace_curvature import slope_at
from mixjax.engine.laplace_fit import find_modes, form_at, linalg_sum
from mixjax.estimation import glmm_many
from mixjax.estimation.glmm import fit_rows, model_of
from mixjax.estimation.glmm_chords import fit_by_chords, reference_of
from mixjax.machine import silently

KEEP = ("theta", "beta", "psi", "criterion", "converged", "singular", "result", "vcov", "b", "eta", "iterations")
BINOMIAL, POISSON, NBINOM = mj.families.binomial(), mj.families.poisson(), mj.families.nbinom()


def design(nested=False, slopes=False):
    """12 subjects and 10 items crossed, or 24 nests in 8 sites; 120 rows."""
    rng = np.random.default_rng(1)
    group, other = np.repeat(np.arange(12), 10), np.tile(np.arange(10), 12)
    if nested:
        group, other = np.repeat(np.arange(24), 5), np.repeat(np.arange(8), 15)
    X = np.column_stack([np.ones(120), rng.normal(size=120)])
    terms = tuple(
        mj.RandomTerm(Z=X[:, : 1 + (slopes and t == 0)], group=g, n_groups=int(g.max()) + 1)
        for t, g in enumerate((group, other))
    )
    return mj.Design(y=np.zeros(120), X=X, terms=terms)


def responses(d, family, B, sd=0.8, seed=3):
    rng = np.random.default_rng(seed)
    eta = np.broadcast_to(0.2 + 0.5 * d.X[:, 1], (B, 120)).copy()
    for term in d.terms:
        b = rng.normal(size=(B, term.n_groups, term.Z.shape[1])) * sd
        eta += np.einsum("bnq,nq->bn", b[:, term.group], term.Z)
    if family.name == "binomial":
        return (rng.random(eta.shape) < 1 / (1 + np.exp(-eta))).astype(float)
    scale = rng.gamma(2.0, 0.5, eta.shape) if family.name == "nbinom" else 1.0
    return rng.poisson(np.exp(eta) * scale).astype(float)


CASES = [
    (design(), BINOMIAL, "observed"), (design(nested=True), POISSON, "observed"), (design(), NBINOM, "observed"),
    (design(slopes=True), POISSON, "observed"), (design(), mj.families.binomial("probit"), "expected"),
]  # fmt: skip


@pytest.mark.parametrize(("d", "family", "curvature"), CASES, ids=range(len(CASES)))
def test_many_are_as_one(d, family, curvature):
    """Within 1e-6 standard errors, so that criteria differ by 1e-12 and rounding."""
    Y = responses(d, family, 5)
    fits = mj.glmm_estimate_many(mj.rows(d, family, Y), curvature, KEEP)
    for i, y in enumerate(Y):
        one = fit_rows(mj.rows(d, family, y), curvature=curvature)
        assert fits.result[i] == one.result
        assert fits.singular[i] == one.singular
        if not one.converged:
            continue
        np.testing.assert_allclose(fits.criterion[i], one.criterion, rtol=0, atol=1e-9)
        np.testing.assert_allclose(fits.theta[i], one.theta, rtol=0, atol=1e-6)
        np.testing.assert_allclose(fits.beta[i], one.beta, rtol=0, atol=1e-6)
        np.testing.assert_allclose(fits.vcov[i], one.vcov, rtol=1e-5)
        np.testing.assert_allclose(fits.eta[i], one.eta, rtol=0, atol=1e-5)


@pytest.mark.parametrize(("d", "family", "curvature"), CASES, ids=range(len(CASES)))
def test_the_slope_is_that_of_the_closed_form(d, family, curvature):
    rng = np.random.default_rng(0)
    model = model_of(mj.rows(d, family, responses(d, family, 1)[0]), curvature)
    structures = model.layout.structures
    x = cov.near([0.6 * np.eye(s.q)[..., None] for s in structures], structures)
    fixed, lambdas = np.full((model.n_fixed, 1), 0.2), cov.factors_of(x, structures)
    modes = find_modes(model, lambdas, fixed, np.zeros((*model.effects.effect_shape, 1)), 1e-13)
    form = form_at(model, lambdas, fixed, modes)
    eta, psi = model.predictor(fixed, modes.b), fixed[model.p :]
    expected = model.expected_curvature(eta, psi) if model.expected else None
    slope = slope_at(model.effects, lambdas, model.data, model.derivatives(eta, psi), expected, modes.penalty)
    np.testing.assert_allclose(slope.value, form.value, rtol=1e-14)
    np.testing.assert_allclose(slope.gradient, form.gradient, rtol=1e-11, atol=1e-11)
    change = rng.normal(size=form.gradient.shape)
    np.testing.assert_allclose(slope.scores(change), linalg_sum(change, form.scores), rtol=1e-9, atol=1e-9)


def test_few_need_a_search_of_their_own(monkeypatch):
    """The point of it: with clear variances most replicates end along chords."""
    searched = []

    def counted(rows, *args, **options):
        searched.append(rows)
        return fit_rows(rows, *args, **options)

    monkeypatch.setattr(glmm_many, "fit_rows", counted)
    d = design(nested=True)
    fits = mj.glmm_estimate_many(mj.rows(d, POISSON, responses(d, POISSON, 8)))
    assert fits.converged.all()
    assert len(searched) <= 3


def test_who_is_first_changes_rounding_only():
    d = design()
    Y = responses(d, POISSON, 4)
    fits = mj.glmm_estimate_many(mj.rows(d, POISSON, Y))
    turned = mj.glmm_estimate_many(mj.rows(d, POISSON, Y[::-1]))
    np.testing.assert_allclose(fits.criterion, turned.criterion[::-1], rtol=0, atol=1e-9)
    np.testing.assert_allclose(fits.theta, turned.theta[::-1], rtol=0, atol=1e-6)
    part = mj.glmm_estimate_many(mj.rows(d, POISSON, Y[[0, 2]]))
    np.testing.assert_array_equal(fits.theta[[0, 2]], part.theta)


def test_singular_and_separated_replicates():
    """A first fit that is no reference, others that come near the boundary, and one that has no estimate."""
    d = design()
    Y = np.concatenate([responses(d, BINOMIAL, 3, sd=0.1), responses(d, BINOMIAL, 2)])
    Y[4] = (d.X[:, 1] > 0).astype(float)
    for order in ([0, 1, 2, 3, 4], [3, 4, 2, 1, 0]):
        fits = mj.glmm_estimate_many(mj.rows(d, BINOMIAL, Y[order]))
        ones = [fit_rows(mj.rows(d, BINOMIAL, y)) for y in Y[order]]
        assert fits.singular.any()
        for i, one in enumerate(ones):
            assert fits.converged[i] == one.converged
            assert fits.singular[i] == one.singular or not one.converged
            if one.converged:
                np.testing.assert_allclose(fits.criterion[i], one.criterion, rtol=0, atol=1e-9)


def test_no_reference_of_a_singular_fit():
    d = design()
    y = responses(d, BINOMIAL, 1, sd=0.0)[0]
    data = mj.rows(d, BINOMIAL, y)
    est = fit_rows(data)
    assert est.singular
    assert reference_of(data, model_of(data), est) is None


def test_a_far_reference_is_no_harm():
    """From the covariances of another response, five times as large, the same minimum or none."""
    d = design()
    Y = responses(d, POISSON, 2)
    data, other = (mj.rows(d, POISSON, y) for y in Y)
    with silently():
        reference = reference_of(other, model_of(other), fit_rows(other))
        far = fit_by_chords(data, model_of(data), replace_x(reference, 5.0))
    one = fit_rows(data)
    assert far is None or abs(far.criterion - one.criterion) < 1e-9


def replace_x(reference, by):
    return reference._replace(x=by * reference.x)
