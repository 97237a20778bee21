"""Predictions of generalised linear mixed models: means, averages over random effects, errors, intervals."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import scipy.stats
from glmm_cases import MODELS, case, fit_of

import mixjax as mj
from mixjax import covariance as cov
from mixjax.estimation.glmm import conditional_covariances
from mixjax.families import family_of
from mixjax.fitted.generalized import fit_family_rows
from mixjax.prediction.mixture import Mixture
from mixjax.prediction.targets import Targets, effect_rows
from mixjax.products.family_rows import rows_in

FAMILIES = [
    ("binomial", "logit"), ("binomial", "probit"), ("binomial", "cloglog"), ("binomial", "cauchit"),
    ("poisson", "log"), ("poisson", "sqrt"), ("nbinom", "log"), ("gamma", "log"), ("inverse_gaussian", "log"),
    ("beta", "logit"), ("gaussian", "log"),
]  # fmt: skip

# glmmTMB 1.1.x, predict(fit, newdata=rows 1, 7, 11, 20, 30, se.fit=TRUE): fit and se on the link's scale, fit and se on
# that of the response, and se with re.form=NA. Its optimum is by a quasi-Newton method, as good as the figures.
TMB = {
    "cbpp": [
        [-0.8085122655, -2.82610100481, -2.57259046055, -1.79880109671, -2.62851967800],
        [0.3783301285, 0.44956422017, 0.47084779120, 0.41756835380, 0.53349810678],
        [0.3082076135, 0.05592991564, 0.07092342028, 0.14199706928, 0.06732534440],
        [0.0806659158, 0.02373778214, 0.03102570945, 0.05087398173, 0.03349975584],
        [0.2324720507, 0.33027515999, 0.43007195478, 0.23247205066, 0.31021397787],
    ],
    "epil_nbinom2": [
        [1.2627986441, 1.2576097776, 0.8741989391, 2.5406461178, 3.0945353257],
        [0.2716910668, 0.2717507123, 0.3023956869, 0.2159503632, 0.1934110780],
        [3.5353017066, 3.5170050085, 2.3969544182, 12.6878661787, 22.0769775493],
        [0.9605098920, 0.9557486161, 0.7248286778, 2.7399493090, 4.2699320264],
        [0.1514018805, 0.1492975155, 0.2137142559, 0.2021553827, 0.1955408598],
    ],
    "owls_slopes": [
        [1.5680820683, 1.6154832783, 1.0175254913, 1.78464053755, 1.9031352188],
        [0.1261772386, 0.1119550403, 0.1078655872, 0.08491345615, 0.1060185376],
        [4.7974382056, 5.0303183798, 2.7663409528, 5.95743808738, 6.7068890787],
        [0.6053275053, 0.5631694968, 0.2983929912, 0.50586665779, 0.7110545722],
        [0.1345057039, 0.1178905410, 0.1089315109, 0.09325771400, 0.1077850286],
    ],
    "grouseticks": [
        [-0.6872956051, 0.2875629465, -1.2137501737, -0.1747052596, 0.6219104234],
        [0.8029298713, 0.5688151076, 0.8351322109, 0.6205662907, 0.5133230543],
        [0.5029343647, 1.3331745082, 0.2970810821, 0.8397044791, 1.8624827760],
        [0.4038210247, 0.7583298014, 0.2481019809, 0.5210922939, 0.9560553471],
        [0.1967118166, 0.2017076789, 0.2224784186, 0.1965363840, 0.2137809061],
    ],
}


def trials(seed=0, n_groups=12, per=8):
    """Counts of trials with a slope, two grouping factors and an offset."""
    rng = np.random.default_rng(seed)
    n = n_groups * per
    table = pd.DataFrame({
        "g": np.repeat([f"g{i}" for i in range(n_groups)], per), "h": np.tile([f"h{i}" for i in range(per)], n_groups),
        "x": rng.normal(size=n).round(2), "n": rng.integers(1, 12, n), "o": rng.normal(size=n).round(1) / 5,
    })  # fmt: skip
    b = rng.normal(size=n_groups).repeat(per) + 0.8 * np.tile(rng.normal(size=per), n_groups)
    p = 1 / (1 + np.exp(-(0.3 + 0.8 * table["x"] + table["o"] + b)))
    return table.assign(s=rng.binomial(table["n"], p)).assign(f=lambda d: d["n"] - d["s"])


@pytest.fixture(scope="module")
def crossed():
    return mj.glmm("s ~ x + (1 | g) + (1 | h)", trials(), "binomial", size="n", offset="o")


# --- against references ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_means_are_those_of_the_reference(model):
    fit, want = fit_of(model), case(model).fits["nAGQ1"]["predict"]
    new = case(model).table.iloc[want["row_index0"]]
    found = {
        "link_NA": fit.predict(new, random=False, scale="link"),
        "link_NULL": fit.predict(new, scale="link"),
        "response_NA": fit.predict(new, random=False),
        "response_NULL": fit.predict(new),
        "response_integrated": fit.predict(new, integrate=True),
        "se_link_NA": fit.predict(new, random=False, scale="link", interval="confidence")["std_error"],
    }
    assert set(want) == {"row_index0", *found}
    for name, values in found.items():
        assert list(values.index) == list(new.index)
        np.testing.assert_allclose(values, want[name], rtol=1e-7 if name == "se_link_NA" else 1e-8, err_msg=name)
    np.testing.assert_allclose(fit.predict(), fit.fitted, rtol=1e-12)


@pytest.mark.parametrize("model", TMB)
def test_errors_at_known_levels_are_those_of_tmb(model):
    """``z'K z + g'V g``, the errors of the covariances and of the family's parameter among them."""
    fit, new = fit_of(model), case(model).table.iloc[[0, 6, 10, 19, 29]]
    link = fit.predict(new, scale="link", interval="confidence")
    mean = fit.predict(new, interval="confidence")
    median = fit.predict(new, random=False, scale="link", interval="confidence")
    found = [link["estimate"], link["std_error"], mean["estimate"], mean["std_error"], median["std_error"]]
    np.testing.assert_allclose(found, TMB[model], rtol=2e-5)
    family = fit.family  # ends are transformed
    np.testing.assert_allclose(mean["lower"], family.mean(link["lower"].to_numpy()), rtol=1e-12)
    np.testing.assert_allclose(mean["upper"], family.mean(link["upper"].to_numpy()), rtol=1e-12)
    np.testing.assert_allclose(link["upper"] - link["estimate"], 1.959963984540054 * link["std_error"], rtol=1e-9)


# --- what errors are made of ----------------------------------------------------------------------------------------


def in_user_columns(record, blocks):
    """Covariances per grouping factor from the bases of the working products."""
    found = []
    for f, own in enumerate(blocks):
        back = np.zeros(own.shape[1:])
        for place, basis in zip(record.working.layout.terms, record.working.Z_bases, strict=True):
            at = slice(place.start, place.start + place.q)
            if place.factor == f:
                back[at, at] = basis.R_inv
        found.append(back @ own @ back.T)
    return found


@pytest.mark.parametrize("model", ["cbpp", "epil_nbinom2", "grouseticks", "owls_slopes", "singular_zero"])
def test_the_mixed_model_equations_serve_working_products(model):
    """Conditional covariances by Henderson's equations and by the likelihood's own curvature are the same."""
    record = fit_of(model).record
    found = in_user_columns(record, record.equations.covariances())
    for own, want in zip(found, conditional_covariances(record.rows, record.estimates), strict=True):
        np.testing.assert_allclose(own, want, rtol=1e-9, atol=1e-13)


def test_working_products_of_rows_with_negative_curvature():
    rng = np.random.default_rng(3)
    table = pd.DataFrame({"g": np.repeat(np.arange(12), 10), "x": rng.normal(size=120)})
    table["y"] = (table["x"] + rng.normal(size=12).repeat(10) + rng.standard_cauchy(120) > 0).astype(float)
    record = mj.glmm("y ~ x + (x | g)", table, "binomial", link="cauchit").record
    curvature = record.family.derivatives(record.estimates.eta, record.rows.y, None, []).by_eta[2]
    assert (curvature < -0.01).sum() > 3
    want = conditional_covariances(record.rows, record.estimates)[0]
    np.testing.assert_allclose(in_user_columns(record, record.equations.covariances())[0], want, rtol=1e-9, atol=1e-12)
    X = np.asarray(record.design.X) @ np.asarray(record.working.X_basis.R_inv)
    np.testing.assert_allclose(record.working.XX, X.T @ (curvature[:, None] * X), atol=1e-12)


def test_a_gaussian_model_has_the_equations_of_a_linear_one():
    data = mj.datasets.load("sleepstudy").assign(Days=lambda d: d["Days"] / 4, Reaction=lambda d: d["Reaction"] / 50)
    linear = mj.lmm("Reaction ~ Days + (Days | Subject)", data, reml=False).record
    sigma = float(linear.estimates.sigma)
    rows = rows_in(linear.design, mj.families.gaussian(), linear.design.y)
    own = fit_family_rows(rows, linear.design, linear.labels, np.asarray(linear.estimates.theta) * sigma, "observed")
    np.testing.assert_allclose(own.estimates.theta, np.asarray(linear.estimates.theta) * sigma, rtol=1e-5)
    design = linear.design
    term = design.terms[0]
    targets = Targets(design.X, np.zeros(180), (term.Z,), (term.group,), np.zeros(180))
    want = sigma**2 * linear.equations.variance(effect_rows(targets, linear.stats))
    np.testing.assert_allclose(own.equations.variance(effect_rows(targets, own.working)), want, rtol=1e-5)


def dense_modes(record, beta, psi, lambdas):
    """Modes of all effects by Newton's method on dense matrices."""
    design, family = record.design, record.family
    Z = np.concatenate([
        (np.eye(t.n_groups)[np.asarray(t.group)][:, :, None] * np.asarray(t.Z)[:, None]).reshape(len(t.Z), -1)
        for t in design.terms
    ], axis=1)  # fmt: skip
    Lambda = np.zeros((Z.shape[1],) * 2)
    at = 0
    for term, own in zip(design.terms, lambdas, strict=True):
        size = term.n_groups * len(own)
        Lambda[at : at + size, at : at + size] = np.kron(np.eye(term.n_groups), own)
        at += size
    U = Z @ Lambda
    fixed = np.asarray(design.X) @ beta + (0.0 if design.offset is None else design.offset)
    u = np.zeros(Z.shape[1])
    for _ in range(50):
        _, c1, c2, *_ = family.derivatives(fixed + U @ u, design.y, design.size, list(psi)).by_eta
        step = np.linalg.solve(np.eye(len(u)) + U.T @ (c2[:, None] * U), U.T @ c1 + u)
        u = u - step
        if np.abs(step).max() < 1e-13:
            break
    b, found, at = Lambda @ u, [], 0
    for term, own in zip(design.terms, lambdas, strict=True):
        size = term.n_groups * len(own)
        found.append(b[at : at + size].reshape(term.n_groups, len(own)))
        at += size
    return found


@pytest.mark.parametrize("model", ["epil_nbinom2", "owls_slopes", "singular_zero"])
def test_slopes_of_modes_by_finite_differences(model):
    record = fit_of(model).record
    est, rows = record.estimates, record.rows
    x, _ = mj.engine.coordinates.coordinates_in(est.theta, rows.layout, [Z.R for Z in rows.Z_bases])
    p, s = len(est.beta), len(est.psi)
    point, h = np.concatenate([est.beta, est.psi, x]), 1e-4

    def modes(at):
        factors = cov.factors_of(at[p + s :][:, None], rows.layout.structures)
        lambdas = [Z.R_inv @ F[..., 0] for Z, F in zip(rows.Z_bases, factors, strict=True)]
        return dense_modes(record, at[:p], at[p : p + s], lambdas)

    for own, b in zip(modes(point), est.b, strict=True):
        np.testing.assert_allclose(own, b, atol=1e-8)
    for i in range(len(point)):
        step = np.zeros(len(point))
        step[i] = h
        ends = zip(modes(point + step), modes(point - step), record.mode_slopes, strict=True)
        for above, below, slope in ends:
            np.testing.assert_allclose(slope[i], (above - below) / (2 * h), atol=1e-5 * (1 + np.abs(slope[i]).max()))


# --- averages -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "link"), FAMILIES)
def test_integrals_and_their_slopes(name, link):
    family = family_of(name, link)
    eta, variance = np.array([-1.3, 0.2, 2.0]), np.array([0.0, 0.3, 1.1])
    z, w = np.polynomial.hermite_e.hermegauss(180)
    brute = (family.mean(eta[:, None] + np.sqrt(variance)[:, None] * z) * w).sum(1) / w.sum()
    tolerance = 1e-3 if link == "cauchit" else 1e-9  # which Gauss-Hermite quadrature does not do well
    np.testing.assert_allclose(family.integrated_mean(eta, variance), brute, rtol=tolerance)
    by_eta, by_variance = family.integrated_slopes(eta, variance)
    h = 1e-5

    def change(d_eta, d_variance):
        ends = (family.integrated_mean(eta + sign * d_eta, variance + sign * d_variance) for sign in (1, -1))
        return np.subtract(*ends) / (2 * h)

    np.testing.assert_allclose(by_eta, change(h, 0.0), rtol=1e-8)
    inside = variance > 0
    np.testing.assert_allclose(by_variance[inside], change(0.0, h * inside)[inside], rtol=1e-7, atol=1e-10)


def test_slopes_of_a_custom_mean():
    family = mj.families.custom(lambda y, eta, size, psi: -0.5 * (y - eta) ** 2, lambda eta: eta**3)
    eta, variance = np.array([0.5, 2.0]), np.array([0.2, 0.7])
    np.testing.assert_allclose(family.integrated_mean(eta, variance), eta**3 + 3 * eta * variance, rtol=1e-10)
    by_eta, by_variance = family.integrated_slopes(eta, variance)
    np.testing.assert_allclose(by_eta, 3 * eta**2 + 3 * variance, rtol=1e-10)
    np.testing.assert_allclose(by_variance, 3 * eta, rtol=1e-10)
    np.testing.assert_allclose(family.mean_slope(eta), 3 * eta**2, rtol=1e-12)


@pytest.mark.parametrize("model", ["cbpp", "cbpp_cloglog", "epil_nbinom2", "bacteria"])
def test_errors_of_averages_are_the_delta_method_over_all_parameters(model):
    """By finite differences over standard deviation and fixed effects, with the covariance on their scale."""
    fit = fit_of(model)
    found = fit.predict(integrate=True, interval="confidence")
    est, design = fit.estimates, fit.design
    sd, Z = float(est.theta[0]), np.asarray(design.terms[0].Z)[:, 0]
    assert est.theta.shape == (1,)

    def mean(parameters):
        eta = np.asarray(design.X) @ parameters[1:]
        return fit.family.integrated_mean(eta, (parameters[0] * Z) ** 2)

    point = np.concatenate([[sd], est.beta])
    steps = 1e-5 * np.eye(len(point))
    slopes = np.stack([(mean(point + step) - mean(point - step)) / 2e-5 for step in steps], 1)
    names = ["sd_Intercept|" + design_group(fit), *fit.labels.fixed]
    V = fit.vcov_all.loc[names, names].to_numpy()
    se = np.sqrt(np.einsum("mi,ij,mj->m", slopes, V, slopes))
    np.testing.assert_allclose(found["estimate"], mean(point), rtol=1e-12)
    np.testing.assert_allclose(found["std_error"], se, rtol=1e-6)
    link = {"logit": lambda m: np.log(m / (1 - m)), "cloglog": lambda m: np.log(-np.log1p(-m)), "log": np.log}[fit.link]
    middle = (link(found["lower"]) + link(found["upper"])) / 2
    np.testing.assert_allclose(middle, link(found["estimate"]), rtol=1e-9, atol=1e-12)


def design_group(fit):
    return fit.labels.terms[0].group


def test_averages_of_several_terms(crossed):
    """One integral: the variance of z'b is the sum. By Monte Carlo, and by hand where one term is held."""
    new = trials().iloc[:4]
    g, h = (crossed.Sigma[name][0, 0] for name in ("g", "h"))
    eta = crossed.predict(new, random=False, scale="link").to_numpy()
    both = crossed.predict(new, integrate=True).to_numpy()
    np.testing.assert_allclose(both, crossed.family.integrated_mean(eta, np.full(4, g + h)), rtol=1e-12)
    draws = np.random.default_rng(0).normal(size=(200_000, 2)) * np.sqrt([g, h])
    sample = 1 / (1 + np.exp(-(eta + draws.sum(1)[:, None])))
    assert np.abs((sample.mean(0) - both) / (sample.std(0) / np.sqrt(len(sample)))).max() < 4.5

    held = crossed.predict(new, random="g", integrate=True)
    with_g = crossed.predict(new, random="g", scale="link").to_numpy()
    np.testing.assert_allclose(held, crossed.family.integrated_mean(with_g, np.full(4, h)), rtol=1e-12)
    # The mode of g has an error, h has none but its variance's.
    interval = crossed.predict(new, random="g", integrate=True, interval="confidence")
    link = crossed.predict(new, random="g", scale="link", interval="confidence")
    slope = crossed.family.integrated_slopes(with_g, np.full(4, h))[0]
    np.testing.assert_allclose(interval["std_error"], slope * link["std_error"], rtol=0.1)
    assert not np.allclose(interval["std_error"], slope * link["std_error"], rtol=1e-6)


def test_known_levels_are_kept_and_new_ones_averaged_over(crossed):
    new = trials().iloc[:2].assign(g=["g3", "nobody"])
    found = crossed.predict(new, random=True, integrate=True, allow_new_levels=True).to_numpy()
    known = crossed.predict(new.iloc[:1]).to_numpy()
    assert found[0] == pytest.approx(known[0], rel=1e-12)
    eta = crossed.predict(new, allow_new_levels=True, scale="link").to_numpy()[1]
    assert found[1] == pytest.approx(float(crossed.family.integrated_mean(eta, crossed.Sigma["g"][0, 0])), rel=1e-12)
    assert crossed.predict(new, allow_new_levels=True).to_numpy()[1] == pytest.approx(1 / (1 + np.exp(-eta)), rel=1e-12)


def test_new_levels_widen_confidence_intervals(crossed):
    new = trials().iloc[[0]].assign(g="nobody", h="nobody")
    wide = crossed.predict(new, allow_new_levels=True, scale="link", interval="confidence")["std_error"][0]
    narrow = crossed.predict(new, random=False, scale="link", interval="confidence")["std_error"][0]
    extra = sum(own[0, 0] for own in crossed.Sigma.values())
    assert wide**2 == pytest.approx(narrow**2 + extra, rel=1e-10)


# --- new responses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "link"), FAMILIES)
def test_distribution_functions(name, link):
    family, psi, eta = family_of(name, link), 0.4, np.array([-0.7, 0.3, 1.1])
    mu, k = np.asarray(family.mean(eta)), np.exp(psi)
    y = np.array([0.0, 2.0, 5.0]) if family.support in ("counts", "trials") else np.array([0.1, 0.4, 0.9])
    want = {
        "binomial": lambda: scipy.stats.binom(7, mu).cdf(y),
        "poisson": lambda: scipy.stats.poisson(mu).cdf(y),
        "nbinom": lambda: scipy.stats.nbinom(k, k / (k + mu)).cdf(y),
        "gamma": lambda: scipy.stats.gamma(1 / k, scale=mu * k).cdf(y),
        "inverse_gaussian": lambda: scipy.stats.invgauss(mu * k, scale=1 / k).cdf(y),
        "beta": lambda: scipy.stats.beta(mu * k, (1 - mu) * k).cdf(y),
        "gaussian": lambda: scipy.stats.norm(mu, k).cdf(y),
    }[name]()
    size = np.full(3, 7.0) if name == "binomial" else None
    np.testing.assert_allclose(family.cdf(y, eta, size, [psi]), want, rtol=1e-11)
    if family.support in ("counts", "trials"):
        assert (family.cdf(np.full(3, -1.0), eta, size, [psi]) == 0).all()
    if name == "binomial":
        assert (family.cdf(np.full(3, 7.0), eta, size, [psi]) == 1).all()


def test_distribution_functions_at_their_ends():
    near_poisson = family_of("nbinom", "log").cdf(np.array([3.0]), np.array([1.0]), None, [np.log(1e9)])
    np.testing.assert_allclose(near_poisson, scipy.stats.poisson(np.e).cdf(3), rtol=1e-7)
    # 2 / (dispersion mu) is 2e4, whose exponential is infinite.
    small = family_of("inverse_gaussian", "log").cdf(np.array([1.01]), np.array([0.0]), None, [np.log(1e-4)])
    np.testing.assert_allclose(small, scipy.stats.invgauss(1e-4, scale=1e4).cdf(1.01), rtol=1e-6)
    sure = family_of("binomial", "logit").cdf(np.array([0.0]), np.array([-40.0]), np.array([5.0]), [])
    assert sure[0] == pytest.approx(1.0, abs=1e-15)


@pytest.mark.parametrize(("name", "link"), FAMILIES)
def test_quantiles_of_mixtures(name, link):
    """Held against Gauss-Legendre quadrature of the distribution function."""
    family = family_of(name, link)
    eta, variance = np.array([-0.7, 0.5, 1.2]), np.array([0.0, 0.2, 1.5])
    psi, size = (
        [1.5 if name == "beta" else 0.1] * family.n_psi,
        np.array([1.0, 20.0, 60.0]) if name == "binomial" else None,
    )
    mixture = Mixture(family, eta, variance, size, psi)
    z, w = np.polynomial.legendre.leggauss(1500)
    z, w = 9 * z, w * np.exp(-0.5 * (9 * z) ** 2)
    at, n = eta[:, None] + np.sqrt(variance)[:, None] * z, None if size is None else size[:, None]

    def below(y):
        return (family.cdf(y[:, None], at, n, psi) * w).sum(1) / w.sum()

    for p in (0.025, 0.5, 0.975):
        q = mixture.quantiles(p)
        if family.support in ("counts", "trials"):
            assert (q == np.round(q)).all()
            assert (below(q) >= p - 1e-4).all()
            assert ((q == 0) | (below(q - 1) < p + 1e-4)).all()
        else:
            np.testing.assert_allclose(below(q), p, atol=1e-7)
    mean = family.mean(at)
    spread = family.variance(mean, n, psi) / (1.0 if n is None else n**2)
    about = np.array([0.3, 0.4, 0.5])
    want = ((spread + (mean - about[:, None]) ** 2) * w).sum(1) / w.sum()
    # The nodes end at 8 standard deviations, where the cube of a mean has still some of its mass.
    np.testing.assert_allclose(mixture.mean_square(about), want, rtol=1e-5)


def test_quantiles_of_a_sharp_distribution():
    """A hundred thousand trials: the distribution is that of the predictor, and as a function of it nearly a step."""
    mixture = Mixture(family_of("binomial", "logit"), np.array([0.3]), np.array([1.0]), np.array([100_000.0]), [])
    for p in (0.025, 0.5, 0.975):
        want = 1 / (1 + np.exp(-(0.3 + scipy.stats.norm.ppf(p))))
        assert mixture.quantiles(p)[0] / 100_000 == pytest.approx(want, abs=2e-4)


def test_intervals_of_new_responses(crossed):
    data = trials()
    found = crossed.predict(random=False, interval="prediction", level=0.8)
    counts = found[["lower", "upper"]].mul(data["n"], axis=0)
    np.testing.assert_allclose(counts, counts.round(), atol=1e-9)
    assert ((found["lower"] >= 0) & (found["upper"] <= 1)).all()
    # Against draws: predictors from their error and all random effects, then responses.
    rng, at = np.random.default_rng(1), 5
    link = crossed.predict(random=False, scale="link", interval="confidence")
    sd = np.sqrt(link["std_error"][at] ** 2 + sum(own[0, 0] for own in crossed.Sigma.values()))
    eta = link["estimate"][at] + sd * rng.normal(size=100_000)
    y = rng.binomial(data["n"][at], 1 / (1 + np.exp(-eta))) / data["n"][at]
    inside = ((y >= found["lower"][at] - 1e-9) & (y <= found["upper"][at] + 1e-9)).mean()
    assert inside >= 0.8 - 0.005
    assert (y < found["lower"][at] - 1e-9).mean() <= 0.1 + 0.004
    assert (y > found["upper"][at] + 1e-9).mean() <= 0.1 + 0.004
    root = np.sqrt(((y - found["estimate"][at]) ** 2).mean())
    assert found["std_error"][at] == pytest.approx(root, rel=0.01)


def test_numbers_of_trials_of_new_responses(crossed):
    data = trials()
    new = data.iloc[:3].drop(columns=["s", "f"])
    by_column = crossed.predict(new, interval="prediction")
    pd.testing.assert_frame_equal(by_column, crossed.predict(interval="prediction").iloc[:3])
    given = crossed.predict(new.drop(columns="n"), interval="prediction", size=new["n"].to_numpy())
    pd.testing.assert_frame_equal(by_column, given)
    with pytest.raises(mj.DataError, match=r"'n'.*the fit had size='n'"):
        crossed.predict(new.drop(columns="n"), interval="prediction")
    crossed.predict(new.drop(columns="n"), interval="confidence")  # means need none
    with pytest.raises(mj.DataError, match="whole and above 0"):
        crossed.predict(new.assign(n=[1.0, 2.5, 3.0]), interval="prediction")

    pair = mj.glmm("cbind(s, f) ~ x + (1 | g) + (1 | h)", data, "binomial", offset="o")
    pd.testing.assert_frame_equal(by_column, pair.predict(data.iloc[:3], interval="prediction"), rtol=1e-9)
    with pytest.warns(mj.InferenceWarning, match="single trials"):
        single = pair.predict(new, interval="prediction")
    assert set(single[["lower", "upper"]].to_numpy().ravel()) <= {0.0, 1.0}


def test_intervals_of_positive_responses():
    fit, data = fit_of("sleepstudy_gamma_slopes"), case("sleepstudy_gamma_slopes").table
    found = fit.predict(interval="prediction", level=0.9)
    y = data[fit.labels.response].to_numpy()
    inside = ((y >= found["lower"]) & (y <= found["upper"])).mean()
    assert 0.85 < inside <= 1.0
    assert (found["upper"] - found["lower"] > fit.predict(interval="confidence", level=0.9).eval("upper - lower")).all()


def test_a_link_that_has_no_mean_everywhere():
    rng = np.random.default_rng(5)
    table = pd.DataFrame({"g": np.repeat(np.arange(10), 8), "x": np.tile(np.arange(8.0), 10)})
    eta = 1.0 + 0.2 * table["x"] + 0.15 * rng.normal(size=10).repeat(8)
    table["y"] = rng.gamma(8.0, 1 / (8.0 * eta))
    fit = mj.glmm("y ~ x + (1 | g)", table, "gamma", link="inverse")
    mean, link = (fit.predict(interval="confidence", scale=scale) for scale in ("response", "link"))
    np.testing.assert_allclose(mean["lower"], 1 / link["upper"], rtol=1e-12)
    np.testing.assert_allclose(mean["upper"], 1 / link["lower"], rtol=1e-12)
    assert np.isfinite(fit.predict(interval="prediction")).all(axis=None)
    with pytest.raises(ValueError, match="does not exist"):
        fit.predict(integrate=True)
    with pytest.warns(mj.InferenceWarning, match="have no mean"):
        assert np.isnan(fit.predict({"x": [-5.0], "g": [0]}, interval="prediction")["lower"][0])


# --- rows -----------------------------------------------------------------------------------------------------------


def test_order_of_rows_and_names_of_levels_do_not_matter(crossed):
    data = trials()
    order = np.random.default_rng(2).permutation(len(data))
    moved = data.iloc[order].assign(g=lambda d: "z" + d["g"].str[1:].str.zfill(3))
    again = mj.glmm("s ~ x + (1 | h) + (1 | g)", moved, "binomial", size="n", offset="o")
    for arguments in ({}, {"random": False}, {"integrate": True}):
        for interval in ("confidence", "prediction"):
            want = crossed.predict(interval=interval, **arguments)
            found = again.predict(interval=interval, **arguments).loc[data.index]
            np.testing.assert_allclose(found, want, rtol=2e-6)


def test_offsets_and_missing_values(crossed):
    new = pd.DataFrame({"x": [0.0, np.nan, 0.0], "g": "g1", "h": "h1", "o": [0.0, 0.0, 1.0], "n": 5})
    with pytest.warns(mj.DataWarning, match="1 of 3 rows"):
        link = crossed.predict(new, scale="link")
    assert np.isnan(link[1])
    assert link[2] - link[0] == pytest.approx(1.0, abs=1e-12)
    with pytest.warns(mj.DataWarning):
        table = crossed.predict(new, interval="prediction")
    assert table.isna().all(axis=1).tolist() == [False, True, False]
    with pytest.raises(mj.DataError, match="'o'"):
        crossed.predict(new.drop(columns="o"))
    with pytest.raises(mj.DataError, match="does not know"):
        crossed.predict(new.assign(g="nobody").iloc[:1])
    assert len(crossed.predict(new.iloc[:0])) == len(crossed.predict(new.iloc[:0], interval="prediction")) == 0


def test_bad_arguments(crossed):
    for arguments, message in (
        ({"scale": "mean"}, "scale must be"), ({"integrate": 1}, "integrate must be"),
        ({"integrate": True, "random": True}, "one or the other"),
        ({"integrate": True, "random": ["g", "h"]}, "one or the other"),
        ({"integrate": True, "scale": "link"}, "averages means"),
        ({"interval": "prediction", "scale": "link"}, "new responses"), ({"interval": "normal"}, "interval must be"),
        ({"random": "nothing"}, "no random term"), ({"interval": "confidence", "level": 95}, "between 0 and 1"),
        ({"size": 3}, "numbers of trials"), ({"interval": "prediction", "size": [3, 4]}, "must be a number"),
        ({"interval": "prediction", "size": 2.5}, "whole numbers"), ({"allow_new_levels": "yes"}, "True or False"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            crossed.predict(**arguments)


def test_families_without_a_distribution_function_say_so():
    table = pd.DataFrame({"y": np.random.default_rng(0).normal(size=60) + 3, "g": np.repeat(np.arange(10), 6)})
    family = mj.families.custom(lambda y, eta, size, psi: -0.5 * (y - eta) ** 2, lambda eta: eta)
    fit = mj.glmm("y ~ 1 + (1 | g)", table, family)
    with pytest.raises(ValueError, match="no distribution function"):
        fit.predict(interval="prediction")
    found = fit.predict(interval="confidence")
    np.testing.assert_allclose(found, fit.predict(interval="confidence", scale="link"), rtol=1e-12)
    np.testing.assert_allclose(fit.predict(integrate=True), fit.predict(random=False), rtol=1e-10)


def test_without_a_hessian_there_are_means_but_no_errors(crossed):
    record = crossed.record
    broken = record.estimates._replace(vcov_all=np.full_like(record.estimates.vcov_all, np.nan))
    fit = mj.GLMMFit(replace(record, estimates=broken))
    with pytest.warns(mj.InferenceWarning, match="no standard errors"):
        found = fit.predict(interval="confidence")
    assert np.isfinite(found["estimate"]).all()
    assert found[["std_error", "lower", "upper"]].isna().all(axis=None)
    with pytest.warns(mj.InferenceWarning, match="no standard errors"):
        found = fit.predict(interval="prediction")
    assert np.isfinite(found["estimate"]).all()
    assert found[["std_error", "lower", "upper"]].isna().all(axis=None)


def test_effects_without_variance_have_no_error():
    """A singular fit: what is zero is taken as known."""
    fit = fit_of("singular_zero")
    assert fit.is_singular
    found = fit.predict(interval="confidence", scale="link")
    assert np.isfinite(found).all(axis=None)


def test_weighted_rows_are_rows_repeated():
    data = trials(9, 10, 6)
    weight = np.random.default_rng(0).integers(1, 4, len(data))
    weighted = mj.glmm("s ~ x + (1 | g)", data.assign(w=weight), "binomial", size="n", weights="w")
    repeated = mj.glmm("s ~ x + (1 | g)", data.loc[data.index.repeat(weight)], "binomial", size="n")
    new = data.iloc[[3, 20, 41]]
    for arguments in (
        {"interval": "confidence"},
        {"interval": "prediction"},
        {"interval": "confidence", "integrate": True},
    ):
        found = weighted.predict(new, **arguments)
        np.testing.assert_allclose(found, repeated.predict(new, **arguments), rtol=1e-6)


@pytest.mark.parametrize("options", [{"nagq": 5}, {"curvature": "expected"}])
def test_other_approximations_are_predicted_from_too(options):
    """Estimates differ; errors are those of their own Hessian and of the observed curvature at their modes."""
    fit = mj.glmm("s ~ x + (1 | g)", trials(9, 10, 6), "binomial", link="probit", size="n", **options)
    record = fit.record
    link = fit.predict(scale="link", interval="confidence")
    K = conditional_covariances(record.rows, record.estimates)[0][:, 0, 0]
    group = np.asarray(fit.design.terms[0].group)
    slopes = record.mode_slopes[0][:, group, 0].T.copy()
    slopes[:, :2] += np.asarray(fit.design.X)
    want = K[group] + np.einsum("mi,ij,mj->m", slopes, record.estimates.vcov_all, slopes)
    np.testing.assert_allclose(link["std_error"], np.sqrt(want), rtol=1e-9)
    np.testing.assert_allclose(link["estimate"], fit.linear_predictor, rtol=1e-10)


def test_errors_after_a_restricted_fit_are_those_of_tmb():
    """glmmTMB with REML = TRUE, levels known. (Its predictions with re.form = NA are not those of its own fixef.)"""
    fit = mj.glmm(case("cbpp").formula, case("cbpp").table, "binomial", reml=True)
    new = case("cbpp").table.iloc[[0, 6, 10, 19, 29]]
    found = fit.predict(new, scale="link", interval="confidence")
    estimate = [-0.7886484009, -2.8109983174, -2.5384087167, -1.8141866488, -2.6107727679]
    error = [0.3796418161, 0.4532986756, 0.4696307797, 0.4243231457, 0.5441050004]
    np.testing.assert_allclose(found["estimate"], estimate, rtol=1e-7)
    np.testing.assert_allclose(found["std_error"], error, rtol=1e-7)
    median = fit.predict(new.iloc[:1], random=False, scale="link", interval="confidence")
    assert median.iloc[0, :2].tolist() == pytest.approx([fit.fixef.iloc[0], fit.se.iloc[0]], rel=1e-10)
