"""Tests, intervals and simulation of generalised linear mixed models."""

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from glmm_cases import fit_of

import mixjax as mj
from mixjax.families import family_of
from mixjax.inference.random.exact_lrt import exact_rlrt
from mixjax.simulation import simulate_family

FAMILIES = [
    ("binomial", "logit"), ("binomial", "probit"), ("binomial", "cloglog"), ("binomial", "cauchit"),
    ("poisson", "log"), ("poisson", "sqrt"), ("nbinom", "log"), ("gamma", "log"), ("gamma", "inverse"),
    ("inverse_gaussian", "log"), ("beta", "logit"), ("gaussian", "log"),
]  # fmt: skip


@pytest.fixture(scope="module")
def cbpp():
    return fit_of("cbpp")


@pytest.mark.parametrize(
    ("name", "link", "trials"),
    [(*own, None) for own in FAMILIES] + [(*own, 7.0) for own in FAMILIES if own[0] == "binomial"],
)
def test_samples_have_the_family_s_mean_and_variance(name, link, trials):
    family, n = family_of(name, link), 100_000
    eta, psi = np.full(n, 0.4), [0.3] * family.n_psi
    size = None if trials is None else np.full(n, trials)
    y = family.sample(np.random.default_rng(1), eta, size, psi)
    mean = family.mean(eta)[0] * (trials or 1.0)
    variance = family.variance(family.mean(eta), size, psi)[0]
    assert abs(y.mean() - mean) < 5.0 * np.sqrt(variance / n)
    fourth = ((y - mean) ** 4).mean()
    assert abs(y.var() - variance) < 6.0 * np.sqrt((fourth - variance**2) / n)


def test_custom_families_sample_by_their_own_function():
    import jax

    family = mj.families.custom(
        lambda y, eta, size, psi: -0.5 * (y - eta) ** 2,
        lambda eta: eta,
        draw=lambda key, mean, size, psi: mean + jax.random.normal(key, mean.shape),
    )
    y = family.sample(np.random.default_rng(2), np.full(5000, 3.0), None, [])
    assert y.dtype == np.float64
    assert abs(y.mean() - 3.0) < 0.1


def test_poisson_samples_of_means_that_numpy_refuses():
    from mixjax.families.sampling import poisson_at_once

    y = poisson_at_once(np.random.default_rng(0), np.array([2.0, 1e19, np.nan, -1.0]))
    assert y[0] < 20
    assert abs(y[1] / 1e19 - 1) < 1e-8
    assert np.isnan(y[2:]).all()


def test_a_simulated_response_depends_on_its_number_alone(cbpp):
    Y = cbpp.simulate(key=3, n=40)
    assert np.array_equal(cbpp.record.simulate(3, 7, first=20), Y[20:27])
    assert ((Y >= 0) & (cbpp.design.size >= Y) & (np.round(Y) == Y)).all()
    same = cbpp.simulate(key=3, n=3, random="fitted")
    assert np.array_equal(cbpp.record.simulate(3, 1, first=2, random="fitted"), same[2:])
    with pytest.raises(ValueError, match="random must be"):
        cbpp.simulate(key=3, n=1, random="old")


def test_simulated_responses_have_the_mean_that_is_integrated(cbpp):
    Y = cbpp.simulate(key=0, n=4000)
    design, est = cbpp.design, cbpp.estimates
    mean = cbpp.family.integrated_mean(np.asarray(design.X) @ est.beta, est.Sigma[0][0, 0]) * design.size
    error = Y.std(0) / np.sqrt(len(Y))
    assert np.abs((Y.mean(0) - mean) / error).max() < 5.0


def test_a_link_that_gives_no_mean_is_named(cbpp):
    with pytest.raises(ValueError, match=r"link 'inverse' of the gamma family gives no mean .* use link='log'"):
        simulate_family(cbpp.design, family_of("gamma", "inverse"), np.array([0.1, 0, 0, 0]), [[[1.0]]], [0.0], 1, 3)
    with pytest.raises(ValueError, match="psi has 0 numbers"):
        simulate_family(cbpp.design, family_of("gamma", "inverse"), np.zeros(4), [[[1.0]]], [], 1, 3)
    with pytest.raises(ValueError, match="beta has shape"):
        simulate_family(cbpp.design, cbpp.family, np.zeros(3), [[[1.0]]], [], 1, 3)


def test_many_responses_are_refitted(cbpp):
    Y = cbpp.simulate(key=1, n=3)
    many = cbpp.record.fit_many(Y, ("beta", "criterion"))
    one = cbpp.record.refit(Y[2])
    assert abs(many.criterion[2] - one.estimates.criterion) < 1e-9
    assert many.theta is None


# --- Wald ------------------------------------------------------------------------------------------------------------


def test_chi_square_of_a_term_is_that_of_its_coefficients(cbpp):
    beta, vcov = cbpp.fixef.to_numpy()[1:], cbpp.vcov.to_numpy()[1:, 1:]
    chisq = beta @ np.linalg.solve(vcov, beta)
    table = cbpp.anova()
    assert list(table.columns) == ["statistic", "df", "p_value"]
    assert table.loc["period", "statistic"] == pytest.approx(chisq, rel=1e-10)
    assert table.loc["period", "p_value"] == pytest.approx(scipy.stats.chi2.sf(chisq, 3), rel=1e-9)
    joint = cbpp.test([f"{name} = 0" for name in cbpp.fixef.index[1:]])
    assert joint["statistic"].iloc[0] == pytest.approx(chisq, rel=1e-10)
    assert joint["df"].iloc[0] == 3
    assert cbpp.joint_tests()["statistic"].iloc[0] == pytest.approx(chisq / 3, rel=1e-9)


def test_terms_that_others_determine_have_no_test():
    rng = np.random.default_rng(0)
    data = pd.DataFrame({"g": np.repeat(np.arange(12), 6), "x": np.tile(np.arange(6.0), 12)})
    data = data.assign(twice=2 * data["x"], y=rng.poisson(3.0, 72))
    with pytest.warns(mj.DataWarning):
        fit = mj.glmm("y ~ x + twice + (1 | g)", data, "poisson")
    table = fit.anova("I")
    assert table.loc["twice", "df"] == 0
    assert np.isnan(table.loc["twice", "statistic"])
    assert any("df 0" in note for note in table.attrs["notes"])


def test_wald_intervals_on_their_scales(cbpp):
    z = scipy.stats.norm.ppf(0.975)
    found, own = cbpp.confint(method="wald"), cbpp.variance_parameters()
    sd, se = own.loc["sd_Intercept|herd"]
    assert found.loc["sd_Intercept|herd"].tolist() == pytest.approx([sd * np.exp(s * z * se / sd) for s in (-1, 1)])
    assert found.loc["Intercept", "lower"] == pytest.approx(cbpp.fixef["Intercept"] - z * cbpp.se["Intercept"])
    assert cbpp.confint("beta_", method="wald").index.tolist() == cbpp.fixef.index.tolist()
    assert cbpp.confint(".sig01", method="wald").index.tolist() == ["sd_Intercept|herd"]
    with pytest.raises(ValueError, match="there is no parameter 'nothing'"):
        cbpp.confint("nothing", method="wald")


def test_intervals_of_a_family_s_parameter():
    fit = fit_of("epil_nbinom2")
    size = fit.dispersion["size"]
    lower, upper = fit.confint("size", method="wald").iloc[0]
    assert lower * upper == pytest.approx(size**2)
    assert lower < size < upper
    assert fit.variance_parameters().loc["size", "estimate"] == pytest.approx(size)


def test_marginal_means_are_combinations_of_the_fixed_effects(cbpp):
    means = cbpp.emmeans("period")
    beta = cbpp.fixef.to_numpy()
    assert means.to_frame()["estimate"].tolist() == pytest.approx([beta[0], *(beta[0] + beta[1:])])
    pairs = means.contrasts(adjust="none")
    assert pairs["std_error"].iloc[0] == pytest.approx(cbpp.se.iloc[1])
    assert np.isinf(pairs["df"]).all()
    with pytest.raises(ValueError, match="no residual standard deviation"):
        means.eff_size()
    assert means.eff_size(sigma=2.0)["estimate"].iloc[0] == pytest.approx(-beta[1] / 2.0)


def test_what_needs_a_linear_model_says_so(cbpp):
    with pytest.raises(TypeError, match=r"this is for linear mixed models.*binomial"):
        exact_rlrt(cbpp)
    from mixjax.inference.fixed.contrasts import t_tests

    with pytest.raises(ValueError, match="ddf='satterthwaite' is for linear mixed models"):
        t_tests(cbpp.record, np.eye(4))


def test_intervals_of_ratios(cbpp):
    plain, ratios = (cbpp.confint(method="wald", exponentiate=flag) for flag in (False, True))
    fixed = list(cbpp.fixef.index)
    assert ratios.loc[fixed].to_numpy() == pytest.approx(np.exp(plain.loc[fixed].to_numpy()))
    assert ratios.loc["sd_Intercept|herd"].tolist() == plain.loc["sd_Intercept|herd"].tolist()
    one = cbpp.confint("period[T.2]", exponentiate=True)
    assert np.log(one.to_numpy()) == pytest.approx(cbpp.confint("period[T.2]").to_numpy())
    with pytest.raises(ValueError, match="of link 'probit' they mean nothing"):
        fit_of("cbpp_probit").confint(exponentiate=True)
