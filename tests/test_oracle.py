"""Every reference fit of lme4, by ML and REML: criterion, estimates, random effects, fitted values.

The stored optima are polished by Newton steps to 5e-10 relative, so agreement is limited by this fit's own
convergence: a scaled gradient of 1e-6, squared by the last step.
"""

import numpy as np
import pytest
from conftest import ORACLES, fit_of, oracle, r_name

CASES = [(name, method) for name in ORACLES for method in ("REML", "ML")]
SINGULAR_RANK = {  # rank of each Lambda at the optimum, in the order of the terms
    "dyestuff2": [0],
    "singular_correlation_one": [1],
    "singular_crossed_zero": [1, 0],
    "singular_rank_two": [2],
}


@pytest.fixture(params=CASES, ids=lambda case: "-".join(case), scope="module")
def case(request):
    name, method = request.param
    return fit_of(name, method), oracle(name)["fits"][method], name


def close(actual, desired, rtol, atol=0.0):
    np.testing.assert_allclose(np.asarray(actual, float), np.asarray(desired, float), rtol=rtol, atol=atol)


def test_criterion_is_not_above_lme4s(case):
    fit, reference, _ = case
    assert fit.converged
    assert fit.criterion <= reference["criterion"] + 1e-6
    assert fit.criterion >= reference["criterion"] - 1e-6  # the reference is an optimum: nothing lies far below
    close([fit.loglik, fit.aic, fit.bic], [reference[k] for k in ("logLik", "AIC", "BIC")], rtol=1e-9)
    assert (fit.nobs, fit.npar) == (reference["n"], reference["npar"])


def test_fixed_effects(case):
    fit, reference, _ = case
    names = [r_name(name) for name in fit.fixef.index]
    assert sorted(names) == sorted(reference["fixef"])
    close(fit.se, [reference["fixef_se"][n] for n in names], rtol=1e-5)
    # Estimates near zero are judged by their standard error.
    close(fit.fixef, [reference["fixef"][n] for n in names], rtol=1e-5, atol=1e-6 * fit.se.min())
    order = [reference["vcov"]["rows"].index(n) for n in names]
    close(
        fit.vcov,
        np.asarray(reference["vcov"]["values"])[np.ix_(order, order)],
        rtol=1e-5,
        atol=1e-6 * fit.se.min() ** 2,
    )


def test_variance_parameters(case):
    fit, reference, _ = case
    close(fit.sigma, reference["sigma"], rtol=1e-5)
    close(fit.theta, list(reference["theta"].values()), rtol=1e-5, atol=1e-6)
    assert [t.group for t in fit.labels.terms] == [t["group"].split(".")[0] for t in reference["varcorr"]]
    for Sigma, term in zip(fit.Sigma.values(), reference["varcorr"], strict=True):
        sd = np.sqrt(np.diag(Sigma))
        close(sd, term["sd"], rtol=1e-5)
        close(Sigma, term["cov"], rtol=1e-5, atol=1e-6 * sd.max() ** 2)
    assert [r_name(e) for t in fit.labels.terms for e in t.effects] == [
        e for t in reference["varcorr"] for e in t["terms"]
    ]


def test_singular_fits_end_exactly_on_the_boundary(case):
    fit, reference, name = case
    assert fit.is_singular == reference["isSingular"]
    ranks = [np.linalg.matrix_rank(Lambda) for Lambda in fit.Lambda.values()]
    full = [Lambda.shape[0] for Lambda in fit.Lambda.values()]
    assert ranks == SINGULAR_RANK.get(name, full)
    for rank, Lambda in zip(ranks, fit.Lambda.values(), strict=True):
        assert (np.abs(Lambda).max(axis=0) == 0).sum() == Lambda.shape[0] - rank  # columns that are exactly zero


def test_random_effects(case):
    fit, reference, _ = case
    modes, covariances = fit.ranef(condvar=True)
    assert list(modes) == list(reference["ranef"])
    for group, stored in reference["ranef"].items():
        frame = modes[group]
        assert [r_name(column) for column in frame.columns] == stored["terms"]
        assert list(frame.index) == stored["levels"]
        sd = np.concatenate([np.sqrt(np.diag(S)) for key, S in fit.Sigma.items() if key.split(".")[0] == group])
        assert (np.abs(frame.to_numpy() - np.asarray(stored["values"])) <= 1e-4 * sd + 1e-12).all()
        variances = np.einsum("iaa->ia", covariances[group])
        close(np.sqrt(variances), stored["condsd"], rtol=1e-5, atol=1e-8)
        if "condvar" in stored:
            close(covariances[group], stored["condvar"], rtol=1e-5, atol=1e-6 * variances.max())


def test_fitted_values(case):
    fit, reference, _ = case
    k = reference["n_rows_stored"]
    close(fit.fitted[:k], reference["fitted"][:k], rtol=0, atol=1e-6 * fit.sigma)
    close(fit.residuals()[:k], reference["residuals"][:k], rtol=0, atol=1e-6 * fit.sigma)
    rows = np.asarray(reference["predict"]["row_index0"])
    close(fit.predict(random=False).iloc[rows], reference["predict"]["re_form_NA"], rtol=0, atol=1e-6 * fit.sigma)
    close(fit.predict().iloc[rows], reference["predict"]["re_form_NULL"], rtol=0, atol=1e-6 * fit.sigma)
