"""Likelihood ratio tests of generalised linear mixed models, and terms left out of them.

Figures of R: glmmTMB 1.1.5 (``anova``, ``drop1``), ``glm`` and ``MASS::glm.nb``.
"""

import warnings
from functools import cache

import numpy as np
import pandas as pd
import pytest
import scipy.special
import scipy.stats
from glmm_cases import case, fit_of

import mixjax as mj
from mixjax.estimation.glmm_plain import fit_plain
from mixjax.inference.random.likelihood_ratio import bootstrap_null
from mixjax.inference.random.nesting import place_of

CBPP = "cbind(incidence, size - incidence) ~ {} (1 | herd)"


@cache
def cbpp(terms="", **options):
    return mj.glmm(CBPP.format(terms), case("cbpp").table, "binomial", **options)


@pytest.fixture(scope="module")
def counts():
    """Poisson counts y with an effect of the level, overdispersed ones z, weights."""
    rng = np.random.default_rng(3)
    g = np.repeat(np.arange(16), 6)
    x = rng.normal(size=96)
    mean = np.exp(0.6 + 0.5 * rng.normal(size=16)[g] + 0.3 * x)
    y, z = rng.poisson(mean), rng.negative_binomial(3, 3 / (3 + mean))
    return pd.DataFrame(
        {"y": y, "z": z, "x": x, "g": g, "h": g // 4, "w": rng.uniform(0.5, 2.0, 96), "f": np.arange(96) % 3}
    )


def poisson(formula, data, family="poisson", **options):
    return mj.glmm(formula, data, family, **options)


# --- compare ---------------------------------------------------------------------------------------------------------


def test_fixed_effects_as_in_R():
    found = mj.compare(cbpp(), fit_of("cbpp"))
    table = found.to_frame()
    assert table["deviance"].tolist() == pytest.approx([209.662627179, 184.052563730], abs=1e-6)
    assert table["aic"].tolist() == pytest.approx([213.662627179, 194.052563730], abs=1e-6)
    assert table["bic"].tolist() == pytest.approx([217.713330561, 204.179322183], abs=1e-6)
    assert table.loc["m1", ["chisq", "df"]].tolist() == pytest.approx([25.610063, 3], abs=1e-6)
    assert table.loc["m1", "p_value"] == pytest.approx(1.1509e-05, rel=1e-4)
    assert "Laplace's approximation; family binomial (logit)" in str(found)


def test_random_effects_are_nested_by_their_numbers(counts):
    whole = poisson("y ~ x + (x | g)", counts, weights="w")
    constant = poisson("y ~ x + (1 | g)", counts, weights="w")
    apart = poisson("y ~ x + (x || g)", counts, weights="w")
    outer = poisson("y ~ x + (1 | h)", counts, weights="w")
    both = poisson("y ~ x + (1 | h) + (1 | g)", counts, weights="w")
    record = {name: fit.record for name, fit in locals().items() if isinstance(fit, mj.GLMMFit)}
    assert place_of(record["constant"], record["whole"]) == (True, 1)
    assert place_of(record["constant"], record["apart"]) == (True, 1)
    assert place_of(record["apart"], record["whole"]) == (True, 0)
    assert place_of(record["outer"], record["both"]) == (True, 1)
    assert place_of(record["whole"], record["constant"]).nested is False
    assert place_of(record["outer"], record["whole"]).nested is False
    # No part of a covariance of predictors is residual: an effect of every row is not there beforehand.
    rows = counts.assign(row=np.arange(len(counts)))
    overdispersed = poisson("y ~ x + (1 | g) + (1 | row)", rows, weights="w")
    assert place_of(record["constant"], overdispersed.record) == (True, 1)


def test_a_variance_at_its_bound_has_the_mixture(counts):
    small, large = poisson("y ~ x + (1 | g)", counts), poisson("y ~ x + (x | g)", counts)
    row = mj.compare(small, large).to_frame().loc["m1"]
    tails = [scipy.stats.chi2.sf(row["chisq"], df) for df in (1, 2)]
    assert row["p_mixture"] == pytest.approx(np.mean(tails), rel=1e-9)


def test_poisson_is_negative_binomial_at_a_bound(counts):
    small, large = fit_of("epil_poisson"), fit_of("epil_nbinom2")
    found = mj.compare(small, large)
    row = found.to_frame().loc["m1"]
    assert row["chisq"] == pytest.approx(small.criterion - large.criterion)
    assert row["p_mixture"] == pytest.approx(0.5 * scipy.stats.chi2.sf(row["chisq"], 1))
    assert "1/size of a negative binomial response to 0" in str(found)
    assert "family nbinom (log)" in str(found)
    more = poisson("z ~ x + (x | g)", counts, "nbinom")
    both = mj.compare(poisson("z ~ x + (1 | g)", counts), more)
    assert any("puts 2 parameters, or coefficients of their formulas, to 0" in note for note in both.notes)


def test_null_draws_of_an_infinite_size_count(counts):
    small = poisson("z ~ x + (1 | g)", counts)
    large = poisson("z ~ x + (1 | g)", counts, "nbinom")
    draws, codes = bootstrap_null(small.record, large.record, 4, 40)
    infinite = codes == mj.Result.UNBOUNDED
    assert 10 < infinite.sum() < 32
    assert len(draws) == 40
    assert draws[infinite].max() < 1e-6
    assert draws[~infinite].max() > 0.1
    Y = small.simulate(4, 3)
    for i in range(3):
        difference = (
            small.refit(Y[i]).criterion - large.record.estimates_of(large.record.rows.with_response(Y[i])).criterion
        )
        assert draws[i] == pytest.approx(max(0.0, difference), abs=1e-7)
    assert any("size is infinite" in note for note in mj.compare(small, large, method="bootstrap", key=4, n=40).notes)


def test_bootstrap_of_fixed_effects():
    found = mj.compare(cbpp(), fit_of("cbpp"), method="bootstrap", n=30)
    assert found.to_frame().loc["m1", "p_bootstrap"] == pytest.approx(1 / 31)
    small, large = cbpp(), fit_of("cbpp")
    y = small.simulate(0, 30)[7]
    assert found.null_draws["m1"][7] == pytest.approx(small.refit(y).criterion - large.refit(y).criterion, abs=1e-6)


def test_models_that_are_not_nested_have_no_test(counts):
    small, large = poisson("y ~ x + (1 | g)", counts), poisson("y ~ f + (x | g)", counts)
    with pytest.warns(mj.InferenceWarning, match="fixed effects"):
        mj.compare(small, large)
    probit = mj.glmm(CBPP.format(""), case("cbpp").table, "binomial", "probit")
    with pytest.warns(mj.InferenceWarning, match="family"):
        mj.compare(probit, fit_of("cbpp"))


def test_a_singular_null_has_no_mixture_even_of_fixed_effects():
    rng = np.random.default_rng(1)
    data = {"y": rng.poisson(3.0, 60), "x": rng.normal(size=60), "g": np.repeat(np.arange(12), 5)}
    small, large = poisson("y ~ 1 + (1 | g)", data), poisson("y ~ x + (1 | g)", data)
    assert small.is_singular
    assert any("the fit of m0 is singular" in note for note in mj.compare(small, large).notes)


def test_what_cannot_be_compared_is_refused(counts):
    fit = cbpp()
    with pytest.raises(ValueError, match="nagq=1 and nagq=5"):
        mj.compare(fit, cbpp(nagq=5))
    with pytest.raises(ValueError, match="by the observed and by the expected curvature"):
        mj.compare(fit, cbpp(curvature="expected"))
    with pytest.raises(ValueError, match="one is a linear mixed model"):
        mj.compare(fit, mj.lmm("Reaction ~ 1 + (1 | Subject)", mj.datasets.load("sleepstudy")))
    positive = counts.assign(y=counts["y"] + 1)
    with pytest.raises(ValueError, match=r"families poisson and gamma .* different measures"):
        mj.compare(poisson("y ~ 1 + (1 | g)", positive), poisson("y ~ 1 + (1 | g)", positive, "gamma"))
    other = case("cbpp").table.assign(size=lambda d: d["size"] + 1)
    with pytest.raises(mj.DataError, match="the numbers of trials differ"):
        mj.compare(
            mj.glmm("incidence ~ 1 + (1 | herd)", case("cbpp").table, "binomial", size="size"),
            mj.glmm("incidence ~ period + (1 | herd)", other, "binomial", size="size"),
        )
    with pytest.raises(TypeError, match=r"mixjax\.lmm or mixjax\.glmm"):
        mj.compare(fit, 3)


def test_fits_by_quadrature_are_compared():
    found = mj.compare(cbpp(nagq=5), cbpp("period + ", nagq=5))
    assert "quadrature, nagq = 5" in found.title
    assert 24 < found.to_frame().loc["m1", "chisq"] < 27


def test_restricted_fits_are_refitted_or_compared_as_they_are(counts):
    small = poisson("z ~ x + (1 | g)", counts, "nbinom", reml=True)
    large = poisson("z ~ x + (x | g)", counts, "nbinom", reml=True)
    ml = [poisson(fit.labels.formula, counts, "nbinom") for fit in (small, large)]
    found = mj.compare(small, large)
    assert found.to_frame()["deviance"].tolist() == pytest.approx([fit.criterion for fit in ml], abs=1e-7)
    assert "refitted by maximum likelihood" in found.notes[0]
    as_they_are = mj.compare(small, large, refit=False)
    assert as_they_are.to_frame()["deviance"].tolist() == pytest.approx([small.criterion, large.criterion])
    assert "restricted likelihoods" in as_they_are.title
    with pytest.raises(ValueError, match="different fixed effects"):
        mj.compare(small, poisson("z ~ 1 + (x | g)", counts, "nbinom", reml=True), refit=False)
    recoded = poisson("z ~ I(2 * x + 1) + (1 | g)", counts, "nbinom", reml=True)
    assert recoded.criterion - small.criterion == pytest.approx(2 * np.log(2), abs=1e-6)
    with pytest.warns(mj.InferenceWarning, match="no parameter more"):
        table = mj.compare(small, recoded, refit=False).to_frame()
    assert table["deviance"].iloc[0] == pytest.approx(table["deviance"].iloc[1], abs=1e-6)
    assert small.drop1()["loglik"].iloc[0] == pytest.approx(ml[0].loglik, abs=1e-7)
    assert small.ranova()["loglik"].iloc[0] == pytest.approx(ml[0].loglik, abs=1e-7)


# --- terms left out --------------------------------------------------------------------------------------------------


def test_drop1_as_in_R():
    table = fit_of("cbpp").drop1()
    assert table["aic"].tolist() == pytest.approx([194.0525637, 213.6626272], abs=1e-6)
    assert table.loc["period", ["lrt", "df"]].tolist() == pytest.approx([25.61006345, 3], abs=1e-7)
    assert fit_of("cbpp").drop1("chisq").equals(table)
    with pytest.raises(ValueError, match="F tests are of linear mixed models"):
        fit_of("cbpp").drop1("F")


def test_the_last_random_term_is_tested_against_a_generalised_linear_model():
    table = fit_of("cbpp").ranova()
    assert -2 * table.loc["(1 | herd)", "loglik"] == pytest.approx(198.058398979, abs=1e-7)  # R's glm
    assert table["npar"].tolist() == [5, 4]
    assert table.loc["(1 | herd)", "p_mixture"] == pytest.approx(scipy.stats.chi2.sf(table["lrt"].iloc[1], 1) / 2)
    nbinom = fit_of("epil_nbinom2").ranova()
    assert -2 * nbinom.loc["(1 | subject)", "loglik"] == pytest.approx(1294.35777288, abs=1e-6)  # R's glm.nb


def test_the_bootstrap_of_the_last_term():
    fit = fit_of("cbpp")
    table = fit.ranova("bootstrap", key=2, n=25)
    assert table.loc["(1 | herd)", "p_bootstrap"] == pytest.approx(1 / 26, rel=0.05)
    assert any("Laplace's approximation" in note for note in table.attrs["notes"])


def test_models_without_random_effects_side_by_side(counts):
    fit = poisson("z ~ x + (1 | g)", counts, "nbinom", offset="x", weights="w")
    Y = np.stack([counts["z"], counts["z"].to_numpy()[::-1], np.arange(96) % 9])
    many = fit_plain(fit.record.rows.with_response(Y))
    for i in range(3):
        one = fit_plain(fit.record.rows.with_response(Y[i : i + 1]))
        assert many.criterion[i] == pytest.approx(one.criterion[0], abs=1e-9)
        assert many.beta[i] == pytest.approx(one.beta[0], rel=1e-6)
    X, w, y = np.asarray(fit.design.X), counts["w"].to_numpy(), Y[0]

    def minus_twice(at):
        size, mu = np.exp(at[2]), np.exp(counts["x"].to_numpy() + X @ at[:2])
        return -2 * (w * scipy.stats.nbinom.logpmf(y, size, size / (size + mu))).sum()

    at = np.append(many.beta[0], many.psi[0])
    assert minus_twice(at) == pytest.approx(many.criterion[0], abs=1e-8)
    for move in 1e-3 * np.eye(3):
        assert minus_twice(at + move) > many.criterion[0] < minus_twice(at - move)


def test_slopes_are_reduced_and_terms_removed(counts):
    fit = poisson("y ~ x + (x | g)", counts)
    table = fit.ranova()
    small = fit.without("x in (x | g)")
    assert small.labels.formula == "y ~ x + (1 | g)"
    assert table.loc["x in (x | g)", "loglik"] == pytest.approx(small.loglik)
    assert small.criterion == pytest.approx(poisson("y ~ x + (1 | g)", counts).criterion, abs=1e-9)
    assert fit.without("x").labels.formula == "y ~ 1 + (x | g)"
    assert isinstance(small, mj.GLMMFit)
    with pytest.raises(ValueError, match="a generalised linear model, statsmodels"):
        small.without("(1 | g)")


# --- where the variance lies -----------------------------------------------------------------------------------------


def test_shares_of_a_binomial_response_are_of_its_latent_variable():
    fit = fit_of("cbpp")
    between = fit.Sigma["herd"][0, 0]
    fixed = np.var(np.asarray(fit.design.X) @ fit.fixef, ddof=1)
    residual = np.pi**2 / 3
    assert fit.icc()["adjusted"] == pytest.approx(between / (between + residual))
    assert fit.r2()["marginal"] == pytest.approx(fixed / (fixed + between + residual))
    assert fit.variance_shares()["variance"].tolist() == pytest.approx([between, residual, fixed])
    assert fit.icc(by_group=True)["herd"] == fit.icc()["adjusted"]
    for link, own in (("probit", 1.0), ("cloglog", np.pi**2 / 6)):
        other = fit_of(f"cbpp_{link}")
        between = other.Sigma["herd"][0, 0]
        assert other.icc()["adjusted"] == pytest.approx(between / (between + own))
    size, mean = fit.design.size, fit.family.integrated_mean(np.asarray(fit.design.X) @ fit.fixef, fit.Sigma["herd"][0])
    assert size is not None
    own = fit.variance_shares("delta").set_index("component").loc["residual", "variance"]
    assert own == pytest.approx(1 / (mean.mean() * (1 - mean.mean())), rel=1e-9)


def test_shares_of_counts_and_positive_responses(counts):
    fit = fit_of("epil_nbinom2")
    mean = np.exp(np.asarray(fit.design.X) @ fit.fixef + fit.Sigma["subject"][0, 0] / 2).mean()
    excess = 1 / mean + 1 / fit.dispersion["size"]
    expected = {None: scipy.special.polygamma(1, 1 / excess), "delta": excess, "lognormal": np.log1p(excess)}
    for approximation, own in expected.items():
        table = fit.variance_shares(approximation).set_index("component")
        assert table.loc["residual", "variance"] == pytest.approx(float(own), rel=1e-9)
    gamma = fit_of("sleepstudy_gamma_intercept")
    own = gamma.variance_shares().set_index("component").loc["residual", "variance"]
    assert own == pytest.approx(float(scipy.special.polygamma(1, 1 / gamma.dispersion["dispersion"])), rel=1e-9)
    roots = poisson("y ~ 1 + (1 | g)", counts, mj.families.poisson("sqrt"))
    assert roots.variance_shares()["variance"].iloc[1] == pytest.approx(0.25, rel=1e-9)


def test_variances_that_there_are_not_are_refused(counts):
    fit = fit_of("cbpp")
    with pytest.raises(ValueError, match="approximation='trigamma' is of log links"):
        fit.icc(approximation="trigamma")
    with pytest.raises(ValueError, match="approximation must be None or one of"):
        fit.r2("exact")
    cauchit = mj.glmm(CBPP.format(""), case("cbpp").table, "binomial", "cauchit")
    with pytest.raises(ValueError, match="latent variable without a variance"):
        cauchit.icc()


def test_families_with_and_without_extra_zeros_are_nested():
    rng = np.random.default_rng(3)
    data = pd.DataFrame({"g": np.repeat(np.arange(20), 8), "x": np.tile(np.linspace(-1, 1, 8), 20)})
    eta = 1.0 + 0.5 * data["x"] + rng.normal(0, 0.4, 20)[data["g"]]
    data["y"] = rng.negative_binomial(2, 2 / (2 + np.exp(eta))) * (rng.random(160) > 0.25)
    formula = "y ~ x + (1 | g)"
    poisson, negative = (mj.glmm(formula, data, family) for family in ("poisson", "nbinom"))
    zip_, zinb = (mj.glmm(formula, data, family, ziformula="~ 1") for family in ("poisson", "nbinom"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        one = mj.compare(zip_, zinb)
        two = mj.compare(poisson, zinb)
    table = one.to_frame()
    assert table["p_mixture"].iloc[1] == pytest.approx(table["p_value"].iloc[1] / 2, rel=1e-9)
    assert any("puts 2 parameters" in note for note in two.notes)
    with pytest.warns(mj.InferenceWarning, match=r"not a special case .*\(one has no parameter more.*family"):
        none = mj.compare(negative, zip_)
    assert np.isnan(none.to_frame()["p_value"]).all()


def test_heads_of_chi_square_tests():
    fit = fit_of("cbpp")
    assert "Chisq" in fit.anova().to_markdown()
    assert "Chisq" in fit.test(["period[T.2]", "period[T.3]"]).to_latex()
    assert "| z " in fit.test("period[T.2]").to_markdown() or " z |" in fit.test("period[T.2]").to_markdown()
