"""Fixed effects in the inner problem, ``nagq=0`` and ``reml=True``: the criteria against dense matrices, derivatives
against differences, fits against glmmTMB's and lme4's."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from glmm_cases import arrays, case
from glmm_dense import modes
from scipy import stats
from test_glmm_estimate import rows_of
from test_nothing_compiles import compiled
from test_quadrature import random_design

import mixjax as mj
from mixjax import covariance as cov
from mixjax.engine.joint_form import joint_form
from mixjax.engine.joint_modes import find_joint_modes
from mixjax.engine.laplace_fit import chain
from mixjax.estimation.glmm import fit_rows, model_of
from mixjax.estimation.glmm_joint import fit_rows_jointly
from mixjax.products.family_rows import rows

REFERENCE = json.loads((Path(__file__).parent / "oracle" / "inner.json").read_text())
BINOMIAL, POISSON, GAUSSIAN = mj.families.binomial(), mj.families.poisson(), mj.families.gaussian()


@cache
def fit_of(model, restricted, curvature="observed"):
    return fit_rows_jointly(rows_of(model), restricted, None, curvature)


# --- against other programs -------------------------------------------------------------------------------------------


def reference_Sigmas(model, stored):
    """In the order of the terms; other programs have their own."""
    groups = [term["group"] for term in case(model).fits["nAGQ1"]["varcorr"]]
    return [np.array(stored["Sigma"][group], float).reshape(len(stored["Sigma"][group]), -1) for group in groups]


@pytest.mark.parametrize("model", REFERENCE["reml"])
def test_restricted_fits_of_glmmTMB(model):
    """Never above by more than 1e-9, estimates to where its search ends, standard errors to its differences."""
    stored, est = REFERENCE["reml"][model], fit_of(model, True)
    assert est.converged
    assert not est.singular
    assert -1e-8 < est.criterion - stored["m2logLik"] < 1e-9
    se = np.sqrt(np.diag(est.vcov))
    np.testing.assert_allclose((est.beta - stored["beta"]) / se, 0.0, atol=1e-6)
    np.testing.assert_allclose(est.vcov, stored["vcov"], rtol=0, atol=1e-5 * np.outer(se, se).max())
    np.testing.assert_allclose(se, np.sqrt(np.diag(stored["vcov"])), rtol=1e-5)
    for Sigma, expected in zip(est.Sigma, reference_Sigmas(model, stored), strict=True):
        np.testing.assert_allclose(Sigma, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    if len(est.psi):  # glmmTMB's sigma of a gamma family is a coefficient of variation
        power = 2.0 if case(model).family == "gamma" else 1.0
        np.testing.assert_allclose(est.psi, power * np.log(stored["sigma"]), rtol=1e-5)


@pytest.mark.parametrize("model", REFERENCE["nagq0"])
def test_fits_of_lme4(model):
    """Its inner iteration is asked for 1e-13, and ends where it ends: fixed effects that are not at their minimum may
    even have a lower criterion, by 1e-7 here."""
    stored, link = REFERENCE["nagq0"][model], case(model).link
    est = fit_of(model, False, "observed" if link in ("logit", "log") else "expected")
    assert est.converged
    assert bool(est.singular) == stored["isSingular"]
    assert abs(est.criterion - stored["m2logLik"]) < 1e-6
    se = np.sqrt(np.diag(est.vcov))
    np.testing.assert_allclose((est.beta - stored["beta"]) / se, 0.0, atol=2e-6)
    np.testing.assert_allclose(se, np.sqrt(np.diag(stored["vcov"])), rtol=1e-6)
    for Sigma, expected in zip(est.Sigma, reference_Sigmas(model, stored), strict=True):
        np.testing.assert_allclose(Sigma, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max() + 1e-20)


# --- by dense matrices ------------------------------------------------------------------------------------------------


def dense(design, size, family, link, lambdas, psi, restricted, curvature="observed"):
    """The criterion and the fixed effects, by Newton's steps of those with the modes of :mod:`glmm_dense`."""
    beta, p = np.zeros(design.X.shape[1]), design.X.shape[1]
    for _ in range(100):
        at = modes(design, size, family, link, beta, lambdas, psi)
        ZL, W = at.ZL, at.row.c2[:, None]
        B = np.eye(ZL.shape[1]) + ZL.T @ (W * ZL)
        S = design.X.T @ (W * design.X)
        side = ZL.T @ (W * design.X)
        S = S - side.T @ np.linalg.solve(B, side)
        step = -np.linalg.solve(S, design.X.T @ at.row.c1)
        last, beta = beta, beta + step * min(1.0, 1.0 / np.abs(step).max())
        if np.abs(beta - last).max() < 1e-12:
            break
    if curvature == "expected":
        B = np.eye(ZL.shape[1]) + ZL.T @ (at.row.expected[:, None] * ZL)
    value = 2 * at.row.c.sum() + at.u @ at.u + np.linalg.slogdet(B)[1]
    return value + restricted * (np.linalg.slogdet(S)[1] - p * np.log(2 * np.pi)), beta


CASES = [
    ("cbpp", True, "observed"),
    ("cbpp_cloglog", False, "expected"),
    ("cbpp_cloglog", True, "observed"),
    ("epil_nbinom2", False, "observed"),
    ("epil_nbinom2", True, "observed"),
    ("gasoline_beta", True, "observed"),
    ("gasoline_beta", False, "expected"),
    ("sleepstudy_gamma_slopes", True, "observed"),
]


@pytest.mark.parametrize(("model", "restricted", "curvature"), CASES)
def test_the_optimum_by_dense_matrices(model, restricted, curvature):
    """The value to rounding, the gradient there by differences of it, and twice the inverse of their Hessian."""
    stored, (design, size) = case(model), arrays(model)
    est, (q,) = fit_of(model, restricted, curvature), {t.Z.shape[1] for t in design.terms}

    def value(z):
        Lambda = np.zeros((q, q))
        Lambda.T[np.triu_indices(q)] = z[len(est.psi) :]
        return dense(design, size, stored.family, stored.link, [Lambda], z[: len(est.psi)], restricted, curvature)

    z = np.concatenate([est.psi, est.theta])
    found, beta = value(z)
    np.testing.assert_allclose(est.criterion, found, rtol=1e-12)
    np.testing.assert_allclose(est.beta, beta, rtol=1e-8, atol=1e-10)
    step = 0.02 * np.maximum(np.abs(z), 0.02)
    for own in np.diag(step):  # differences of third order of a minimum: far below its curvature times the step
        ahead, behind = (8 * (value(z + own)[0] - value(z - own)[0]), value(z + 2 * own)[0] - value(z - 2 * own)[0])
        second = value(z + own)[0] - 2 * found + value(z - own)[0]
        assert abs(ahead - behind) / 12 < 2e-4 * second


@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize(
    ("model", "curvature"),
    [("epil_nbinom2", "observed"), ("owls_slopes", "observed"), ("singular_zero", "observed"),
     ("gasoline_beta", "observed"), ("gasoline_beta", "expected")],
)  # fmt: skip
def test_derivatives_in_closed_form(model, curvature, restricted):
    """Against central differences of fourth order of value, gradient and fixed effects: 1e-3 to the fourth power times
    what the fifth derivatives are, and rounding of 1e-13 over 1e-3."""
    if restricted and curvature == "expected":
        return
    data = rows_of(model)
    own, structures = model_of(data, curvature), data.layout.structures
    p, s, k = own.p, own.n_fixed - own.p, sum(structure.k for structure in structures)
    start = fit_of(model, restricted, curvature)
    z = np.concatenate([start.psi + 0.2, 0.4 + 0.3 * np.random.default_rng(0).normal(size=k)])
    begin = data.X_basis.R @ start.beta

    def at(z):
        x, fixed = z[s:, None], np.concatenate([begin, z[:s]])[:, None]
        lambdas = cov.factors_of(x, structures)
        found = find_joint_modes(own, lambdas, fixed, np.zeros((*own.effects.effect_shape, 1)), 1e-13)
        form = joint_form(own, lambdas, found.fixed, found.modes, restricted)
        jacobian, bend = chain(x, form.gradient[s:, None], data.layout)
        J, more = np.eye(len(form.gradient), s + k), np.zeros((s + k, s + k))
        J[s:, s:], more[s:, s:] = jacobian[..., 0], bend[..., 0]
        return form.value, J.T @ form.gradient, found.fixed[:p, 0], J.T @ form.Hessian @ J + more, form.slopes @ J

    _, gradient, _, Hessian, slopes = at(z)
    h = 1e-3
    for i, axis in enumerate(np.eye(s + k)):
        one, other, two, another = (at(z + step * h * axis) for step in (1, -1, 2, -2))
        by = [(8 * (a - b) - (c - d)) / (12 * h) for a, b, c, d in zip(one, other, two, another, strict=True)]
        np.testing.assert_allclose(gradient[i], by[0], rtol=0, atol=1e-8 * np.abs(gradient).max())
        np.testing.assert_allclose(Hessian[i], by[1], rtol=0, atol=1e-8 * np.abs(Hessian).max())
        np.testing.assert_allclose(slopes[:, i], by[2], rtol=0, atol=1e-9)


# --- closed forms -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("formula", ["Reaction ~ Days + (Days | Subject)", "Reaction ~ Days + (1 | Subject)"])
def test_a_linear_mixed_model_by_REML(formula):
    """Values to 1e-9 of the criterion; estimates to where the two searches end."""
    fit = mj.lmm(formula, mj.datasets.load("sleepstudy"))
    est = mj.glmm_estimate(mj.rows(fit.design, GAUSSIAN), reml=True)
    assert est.converged
    np.testing.assert_allclose(est.criterion, fit.criterion, rtol=0, atol=1e-9)
    np.testing.assert_allclose(est.beta, fit.fixef, rtol=1e-9)
    np.testing.assert_allclose(np.exp(est.psi), [fit.sigma], rtol=1e-6)
    np.testing.assert_allclose(est.theta, fit.theta * fit.sigma, rtol=1e-5)


def test_crossed_linear_mixed_models():
    fit = mj.lmm("diameter ~ 1 + (1 | plate) + (1 | sample)", mj.datasets.load("Penicillin"))
    est = mj.glmm_estimate(mj.rows(fit.design, GAUSSIAN), reml=True)
    np.testing.assert_allclose(est.criterion, fit.criterion, rtol=0, atol=1e-9)
    np.testing.assert_allclose(est.theta, fit.theta * fit.sigma, rtol=1e-5)
    # Given the covariances, fixed effects of nagq = 1 and 0 are the same.
    one, zero = (mj.glmm_estimate(mj.rows(fit.design, GAUSSIAN), nagq=nagq) for nagq in (1, 0))
    np.testing.assert_allclose(one.criterion, zero.criterion, rtol=0, atol=1e-9)


@pytest.mark.parametrize("restricted", [False, True])
def test_no_variance_at_all(restricted):
    """Levels that vary less than chance: the variance is exactly zero, the rest a model without random effects."""
    y = np.tile([0.0, 1.0, 0.0, 1.0, 1.0], 8)
    X = np.column_stack([np.ones(40), np.random.default_rng(0).normal(size=40)])
    term = mj.RandomTerm(Z=np.ones((40, 1)), group=np.repeat(np.arange(8), 5), n_groups=8)
    est = fit_rows_jointly(rows(mj.Design(y=y, X=X, terms=(term,)), BINOMIAL), restricted)
    assert est.converged
    assert est.singular
    assert est.theta == 0.0
    p = 1 / (1 + np.exp(-est.eta))
    np.testing.assert_allclose(X.T @ (y - p), 0.0, atol=1e-9)
    information = (X.T * p * (1 - p)) @ X
    extra = restricted * (np.linalg.slogdet(information)[1] - 2 * np.log(2 * np.pi))
    np.testing.assert_allclose(est.criterion, extra - 2 * stats.bernoulli.logpmf(y, p).sum(), rtol=1e-13)
    np.testing.assert_allclose(est.vcov, np.linalg.inv(information), rtol=1e-8)


def test_a_correlation_of_one():
    est = fit_of("singular_correlation", False)
    assert est.theta[2] == 0.0
    np.testing.assert_allclose(est.vcov_all[-1], 0.0)


def test_without_fixed_effects():
    """All criteria are one."""
    design = replace(random_design(1, family=POISSON), X=np.zeros((60, 0)))
    data = rows(design, POISSON)
    expected = fit_rows(data)
    for restricted in (False, True):
        est = fit_rows_jointly(data, restricted)
        np.testing.assert_allclose(est.criterion, expected.criterion, rtol=1e-13)
        np.testing.assert_allclose(est.vcov_all, expected.vcov_all, rtol=1e-6)


@pytest.mark.parametrize("model", ["grouseticks_brood", "epil_nbinom2"])
def test_fixed_effects_of_the_criterion_are_better(model):
    """nagq = 1 minimises the same function over fixed effects as well."""
    assert fit_rows(rows_of(model)).criterion < fit_of(model, False).criterion


def test_values_do_not_depend_on_order_names_or_scales():
    design = random_design(2, family=POISSON, m=15, n=90, seed=1)
    (term,) = design.terms
    rng = np.random.default_rng(1)
    order, names = rng.permutation(len(design.y)), rng.permutation(term.n_groups)
    T = np.array([[1.0, -30.0], [0.0, 1e3]])
    moved = replace(design, y=design.y[order], X=(design.X @ T)[order],
                    terms=(replace(term, Z=term.Z[order], group=names[term.group[order]]),))  # fmt: skip
    for restricted in (False, True):
        one, other = (fit_rows_jointly(rows(d, POISSON), restricted) for d in (design, moved))
        # A flat prior of other columns has another scale.
        scale = 2.0 * restricted * np.log(np.linalg.det(T))
        np.testing.assert_allclose(other.criterion - scale, one.criterion, rtol=1e-11)
        np.testing.assert_allclose(T @ other.beta, one.beta, rtol=1e-6)
        np.testing.assert_allclose(T @ other.vcov @ T.T, one.vcov, rtol=1e-5)
        np.testing.assert_allclose(other.theta, one.theta, rtol=1e-5)


# --- what does not end ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restricted", [False, True])
@pytest.mark.parametrize("family", ["binomial", "poisson", "nbinom"])
def test_levels_without_events_are_separated(family, restricted):
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(8), 5)
    x = (group < 2) * 1.0
    y = (rng.random(40) < 0.5 if family == "binomial" else rng.poisson(2.0, 40)) * (1.0 - x)
    term = mj.RandomTerm(Z=np.ones((40, 1)), group=group, n_groups=8)
    design = mj.Design(y=y, X=np.column_stack([np.ones(40), x]), terms=(term,))
    options = {"reml": True} if restricted else {"nagq": 0}
    assert mj.glmm_estimate(mj.rows(design, family), **options).result == mj.Result.SEPARATED


def test_a_restricted_likelihood_without_a_maximum():
    """Few 0 and 1: variances and with them fixed effects grow for ever, which are finite for given variances."""
    design = random_design(2, m=4, n=12, seed=3)
    est = fit_rows_jointly(rows(design, BINOMIAL), True)
    assert est.result == mj.Result.UNBOUNDED
    assert not est.converged


# --- the face ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ticks():
    return mj.datasets.load("sleepstudy").assign(slow=lambda d: 1.0 * (d["Reaction"] > 300))


@pytest.fixture(scope="module")
def restricted(ticks):
    return mj.glmm("slow ~ Days + (1 | Subject)", ticks, "binomial", reml=True)


def test_a_fit_says_what_it_is(ticks, restricted):
    assert restricted.reml
    assert str(restricted.summary()).startswith(
        "Generalized linear mixed model fit by restricted maximum likelihood (Laplace approximation)"
    )
    assert "restricted -2 log-likelihood" in repr(restricted)
    row = restricted.glance().iloc[0]
    assert row["reml"]
    assert row["nagq"] == 1
    assert restricted.npar == 3
    zero = mj.glmm("slow ~ Days + (1 | Subject)", ticks, "binomial", nagq=0)
    assert (zero.nagq, zero.reml) == (0, False)
    assert "maximum likelihood (nAGQ = 0)" in str(zero.summary())
    assert zero.criterion < restricted.criterion


def test_refits_keep_the_likelihood(ticks, restricted):
    turned = restricted.refit(1 - ticks["slow"])
    assert turned.reml
    np.testing.assert_allclose(turned.fixef, -restricted.fixef, rtol=1e-6)
    plain = restricted.refit(reml=False)
    assert not plain.reml
    np.testing.assert_allclose(plain.criterion, mj.glmm("slow ~ Days + (1 | Subject)", ticks, "binomial").criterion)
    assert mj.glmm("slow ~ Days + (1 | Subject)", ticks, "binomial", nagq=0).refit(ticks["slow"]).nagq == 0


def test_many_responses_are_fitted_by_the_same_likelihood(restricted):
    many = restricted.record.fit_many(np.tile(restricted.design.y, (2, 1)), ("beta", "criterion"))
    assert many.criterion.tolist() == pytest.approx([restricted.criterion] * 2, abs=1e-9)
    assert many.theta is None


def test_they_compile_nothing(ticks):
    jax.clear_caches()
    with compiled() as names:
        for options in ({"reml": True}, {"nagq": 0}):
            fit = mj.glmm("slow ~ Days + (Days | Subject)", ticks, "binomial", **options)
            str(fit.summary()), fit.vcov_all, fit.ranef(condvar=True), fit.refit(reml=False)
    assert not names


def test_what_is_not_checked(ticks, restricted):
    with pytest.raises(ValueError, match=r"by the restricted likelihood: look at fit.refit\(reml=False\)"):
        restricted.laplace_check()
    with pytest.raises(ValueError, match="nagq = 0: look at the fit with nagq=1"):
        mj.glmm("slow ~ Days + (1 | Subject)", ticks, "binomial", nagq=0).laplace_check()


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"reml": True, "nagq": 3}, "reml=True goes with nagq=1, got nagq=3"),
        ({"reml": True, "nagq": 0}, "reml=True goes with nagq=1, got nagq=0"),
        ({"reml": True, "curvature": "expected"}, "reml=True goes with curvature='observed'"),
        ({"reml": "yes"}, "reml must be True or False, got 'yes'"),
        ({"nagq": False}, r"nagq must be a whole number from 1 \(Laplace\), or 0 .*got False"),
        ({"nagq": -1}, "nagq must be a whole number from 1"),
        ({"nagq": 3, "curvature": "expected"}, "goes with nagq=1 or nagq=0"),
    ],
)
def test_options_that_do_not_go_together(ticks, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        mj.glmm("slow ~ Days + (1 | Subject)", ticks, "binomial", **options)
    with pytest.raises(ValueError, match=sentence):
        mj.glmm_estimate(rows(random_design(1), BINOMIAL), **options)


def test_arrays_by_every_likelihood():
    """One function decides, for arrays as for formulas."""
    data = rows(random_design(1), BINOMIAL)
    assert mj.glmm_estimate(data, nagq=0).criterion == fit_rows_jointly(data, False).criterion
    assert mj.glmm_estimate(data, reml=True).criterion == fit_rows_jointly(data, True).criterion
    with jax.enable_x64(True):
        quadrature = mj.glmm_criterion(*(mj.glmm_estimate(data, nagq=7)[:2]), data, nagq=7)
    np.testing.assert_allclose(mj.glmm_estimate(data, nagq=7).criterion, quadrature, rtol=1e-12)
    with jax.enable_x64(True), pytest.raises(ValueError, match="leave out nagq= and reml="):
        jax.jit(lambda y: mj.glmm_estimate(data.with_response(y), nagq=0).beta)(data.y)
