"""Formulas of a family's parameters, ``dispformula=`` and ``ziformula=``: beside glmmTMB, beside two separate fits, and
beside the likelihood that JAX differentiates.

``zi_*.json`` are optima of an objective coded anew in R; ``dispformula.json`` glmmTMB's, polished by Newton steps on
its gradient (below 1e-10), whose covariances are differences of that gradient: 1e-7 of themselves.
"""

import json
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from scipy.special import polygamma

import mixjax as mj
from mixjax.estimation.glmm_held import HeldSearch, Parameter, unconditional
from mixjax.inference.random.variance import icc as icc_of
from mixjax.simulation import simulate_family

HERE = Path(__file__).parent
COUNT = "count ~ mined + (1 | site)"
EPIL = "y ~ lbase * trt + lage + V4 + (1 | subject)"


def stored(name):
    return json.loads((HERE / "oracle" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def salamanders():
    table = pd.read_csv(HERE / "data" / "Salamanders.csv")
    levels = stored("zi_salamanders_zinb")["factor_levels"]
    return table.assign(**{f: pd.Categorical(table[f].astype(str), levels[f]) for f in ("mined", "spp", "site")})


@pytest.fixture(scope="module")
def epil():
    table = pd.read_csv(HERE / "data" / "epil.csv")
    return table.assign(trt=pd.Categorical(table["trt"], ["placebo", "progabide"]))


@pytest.fixture(scope="module")
def both(salamanders):
    """Both formulas."""
    return mj.glmm(COUNT, salamanders, "nbinom", ziformula="~ 1", dispformula="~ mined")


# --- the family ------------------------------------------------------------------------------------------------------

ZEROS = [("poisson", "log"), ("poisson", "sqrt"), ("nbinom", "log"), ("nbinom", "sqrt"), ("binomial", "cloglog")]
ETA = np.array([-4.0, -3.1, -1.3, -0.4, 0.3, 1.0, 2.2, 2.9])
Y = np.array([0.0, 1.0, 2.0, 0.0, 3.0, 0.0, 0.0, 0.0])
SIZE = np.array([5.0, 4.0, 6.0, 3.0, 3.0, 9.0, 4.0, 6.0])


@pytest.mark.parametrize(("base", "link"), [("poisson", "log"), ("nbinom", "log"), ("binomial", "cloglog")])
def test_derivatives_of_extra_zeros(base, link, x64):
    """Each closed form is JAX's derivative of the one before it, from hardly any extra zeros to nothing else."""
    family = mj.families.zero_inflated(base, link)
    z = np.repeat([-20.0, -3.0, 0.0, 2.0, 20.0], 8)
    eta, y = jnp.tile(ETA, 5), np.tile(Y, 5)
    size = np.tile(SIZE, 5) if base == "binomial" else None
    psi = [jnp.full(40, 0.3)] * (family.n_psi - 1) + [jnp.asarray(z)]
    closed = family.derivatives(np.asarray(eta), y, size, list(map(np.asarray, psi)))
    ones, zeros = jnp.ones(40), jnp.zeros(40)

    def moved(e, *along):
        return jax.jvp(
            lambda eta, *psi: (family.density(eta, y, size, psi), family.derivatives(eta, y, size, psi)),
            (eta, *psi),
            (e, *along),
        )[1]

    def close(one, other):
        np.testing.assert_allclose(np.broadcast_to(one, 40), other, rtol=1e-10, atol=1e-10)

    close(family.density(np.asarray(eta), y, size, list(map(np.asarray, psi))), closed.by_eta[0])
    of_density, of_closed = moved(ones, *[zeros] * family.n_psi)
    close(of_density, closed.by_eta[1])
    for order in range(4):
        close(of_closed.by_eta[order], closed.by_eta[order + 1])
    for i in range(family.n_psi):
        of_density, of_closed = moved(zeros, *(ones if j == i else zeros for j in range(family.n_psi)))
        close(of_density, closed.by_psi[i][0])
        for order in range(1, 4):
            close(of_closed.by_eta[order], closed.by_psi[i][order])
        for j in range(family.n_psi):
            for order in range(3):
                close(of_closed.by_psi[j][order], closed.by_psi_twice[i][j][order])


@pytest.mark.parametrize(("base", "link"), ZEROS)
def test_extra_zeros_are_a_distribution(base, link):
    family, size = mj.families.zero_inflated(base, link), 7.0 if base == "binomial" else None
    psi, eta = [0.4] * (family.n_psi - 1) + [-0.8], 0.5
    y = np.arange(8.0 if size else 400.0)
    p = np.exp(-family.density(eta, y, size, psi))
    np.testing.assert_allclose(p.sum(), 1.0, rtol=1e-12)
    np.testing.assert_allclose(np.cumsum(p), family.cdf(y, np.full(len(y), eta), size, psi), rtol=1e-11)
    mean = (p * y).sum()
    mu = np.asarray(family.mean(eta))
    np.testing.assert_allclose(mean, family.response_mean(mu, psi) * (size or 1.0), rtol=1e-11)
    np.testing.assert_allclose((p * (y - mean) ** 2).sum(), family.variance(mu, size, psi), rtol=1e-10)
    drawn = family.sample(np.random.default_rng(1), np.full(20000, eta), size, psi)
    assert abs((drawn == 0).mean() - p[0]) < 4 * np.sqrt(p[0] * (1 - p[0]) / 20000)
    natural = family.natural(psi)
    np.testing.assert_allclose(family.unconstrained(list(natural)), psi, rtol=1e-14)


def test_no_extra_zeros_are_the_base():
    family, base = mj.families.zero_inflated("poisson"), mj.families.poisson()
    for one, other in zip(
        family.derivatives(ETA, Y, None, [-700.0]).by_eta, base.derivatives(ETA, Y, None, ()).by_eta, strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-12, atol=1e-14)


# --- beside others ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "base"), [("zip", "poisson"), ("zinb", "nbinom")])
def test_zero_inflation(name, base, salamanders):
    model = stored(f"zi_salamanders_{name}")
    want = model["fits"]["nAGQ1"]
    fit = mj.glmm(model["formula"], salamanders, base, ziformula=model["ziformula"])
    assert (fit.npar, fit.converged) == (want["npar"], True)
    np.testing.assert_allclose(fit.criterion, want["m2logLik"], rtol=0, atol=1e-10)
    np.testing.assert_allclose([fit.aic, fit.bic], [want["AIC"], want["BIC"]], rtol=0, atol=1e-10)
    size = [] if base == "poisson" else list(want["dispersion"].values())
    ours = np.concatenate([fit.theta, fit.fixef, np.log(fit.dispersion), fit.zi])
    theirs = [*want["theta"].values(), *want["fixef"].values(), *size, *want["zi"].values()]
    V = np.array(want["vcov_all"]["values"])
    np.testing.assert_allclose((ours - theirs) / np.sqrt(np.diag(V)), 0, rtol=0, atol=1e-7)
    p, n = len(fit.fixef), len(V)
    order = [*range(p + len(size) + 2), -1]  # theirs begins with theta, ours ends with it
    mine = fit.estimates.vcov_all[np.ix_(order, order)]
    np.testing.assert_allclose(np.sqrt(np.diag(mine))[:-1], np.sqrt(np.diag(V))[1:], rtol=1e-6)
    np.testing.assert_allclose(fit.vcov, np.array(want["vcov"]["values"]), rtol=0, atol=1e-6 * V[1:n, 1:n].max())
    np.testing.assert_allclose(fit.fitted[: want["n_rows_stored"]], want["fitted"], rtol=0, atol=1e-6)
    np.testing.assert_allclose(
        fit.residuals("response")[: want["n_rows_stored"]], want["residuals_response"], rtol=0, atol=1e-6
    )


DISPERSED = {
    "nbinom_trt": (EPIL, "epil", "nbinom", {"dispformula": "~ trt"}),
    "gamma_days": ("Reaction ~ Days + (1 | Subject)", "sleepstudy", "gamma", {"dispformula": "~ Days"}),
    "beta_endpoint": ("share ~ e + (1 | Sample)", "gasoline", "beta", {"dispformula": "~ e"}),
    "zinb_both": (COUNT, "salamanders", "nbinom", {"ziformula": "~ 1", "dispformula": "~ mined"}),
    "nbinom_reml": (EPIL, "epil", "nbinom", {"dispformula": "~ trt", "reml": True}),
}


@pytest.mark.parametrize("name", DISPERSED)
def test_dispersion(name, epil, salamanders):
    formula, table, family, options = DISPERSED[name]
    gasoline = pd.read_csv(HERE / "data" / "Gasoline.csv").assign(e=lambda d: (d["endpoint"] - 330) / 100)
    tables = {"epil": epil, "salamanders": salamanders, "gasoline": gasoline}
    data = tables[table] if table in tables else mj.datasets.load(table)
    fit, want = mj.glmm(formula, data, family, **options), stored("dispformula")[name]
    kinds, par, se = (np.array(want[key]) for key in ("names", "par", "se"))
    sign = -1 if family == "gamma" else 1  # its betad is the logarithm of the shape, 1 / dispersion
    np.testing.assert_allclose(fit.criterion, want["m2logLik"], rtol=0, atol=1e-9)
    ours = {"beta": fit.fixef, "betad": sign * fit.disp, "betazi": fit.zi, "theta": np.log(fit.theta)}
    p = len(fit.fixef)
    errors = np.sqrt(np.diag(fit.estimates.vcov_all))[p:-1]
    errors = {"beta": fit.se, "betad": errors[: len(fit.disp)], "betazi": errors[len(fit.disp) :]}
    for kind in np.unique(kinds):
        np.testing.assert_allclose(ours[kind] / se[kinds == kind], par[kinds == kind] / se[kinds == kind], atol=1e-8)
        if kind != "theta" and "reml" not in options:
            np.testing.assert_allclose(errors[kind], se[kinds == kind], rtol=1e-6)


def test_a_constant_dispersion_is_none(epil):
    one, other = (mj.glmm(EPIL, epil, "nbinom", dispformula=text) for text in (None, "~ 1"))
    assert one.criterion == other.criterion
    assert one.dispersion.equals(other.dispersion)
    assert other.disp.empty
    # The same by columns of ones.
    design = mj.Design(**{**vars(one.design), "psi_columns": (np.full((one.nobs, 1), 2.0),)})
    twice = mj.glmm_estimate(mj.rows(design, "nbinom"))
    np.testing.assert_allclose(twice.criterion, one.criterion, rtol=0, atol=1e-9)
    np.testing.assert_allclose(2 * twice.psi, one.estimates.psi, rtol=1e-9)


@pytest.mark.parametrize("family", ["gamma", "nbinom"])
def test_two_groups_are_two_fits(family):
    """Whatever is asked of each group by itself, the likelihoods add up."""
    rng = np.random.default_rng(3)
    frame = pd.DataFrame({"g": np.repeat(np.arange(24), 6), "x": rng.normal(size=144)})
    frame["arm"] = np.where(frame["g"] < 12, "a", "b")
    mu = np.exp(1.5 + 0.3 * frame["x"] + rng.normal(size=24)[frame["g"]] * 0.5)
    shape = np.where(frame["arm"] == "a", 1.0, 6.0)
    frame["y"] = rng.gamma(shape, mu / shape) if family == "gamma" else rng.poisson(rng.gamma(shape, mu / shape))
    frame["a"], frame["b"] = (frame["arm"] == "a") * 1.0, (frame["arm"] == "b") * 1.0
    whole = mj.glmm("y ~ 0 + arm + arm:x + (0 + a | g) + (0 + b | g)", frame, family, dispformula="~ 0 + arm")
    parts = [mj.glmm("y ~ x + (1 | g)", frame[frame["arm"] == arm], family) for arm in "ab"]
    np.testing.assert_allclose(whole.criterion, sum(part.criterion for part in parts), rtol=0, atol=1e-8)
    np.testing.assert_allclose(whole.disp, [np.log(part.dispersion.iloc[0]) for part in parts], rtol=0, atol=1e-5)
    np.testing.assert_allclose(whole.theta[:2], [part.theta[0] for part in parts], rtol=1e-5)


def test_row_order_and_scale(both, salamanders):
    mixed = salamanders.sample(frac=1, random_state=1)
    mixed["far"] = 2000.0 + 1e3 * (mixed["mined"] == "no")
    again = mj.glmm(COUNT, mixed, "nbinom", ziformula="~ 1", dispformula="~ far")
    np.testing.assert_allclose(again.criterion, both.criterion, rtol=0, atol=1e-10)
    np.testing.assert_allclose(1e3 * again.disp["far"], both.disp["mined[T.no]"], rtol=1e-8)
    np.testing.assert_allclose(again.fitted.sort_index(), both.fitted, rtol=1e-9)


# --- the likelihood --------------------------------------------------------------------------------------------------


def in_standard_errors(fit, curvature="observed", nagq=1):
    """The likelihood that JAX has, as a function of all parameters in standard errors from the estimates."""
    rows, e = fit.record.rows, fit.estimates
    p, s = len(e.beta), len(e.psi)
    phi, se = np.concatenate([e.beta, e.psi, e.theta]), np.sqrt(np.diag(e.vcov_all))

    def criterion(z):
        v = phi + se * z
        return float(mj.glmm_criterion(v[p + s :], v[:p], rows, v[p : p + s], curvature, nagq))

    return criterion, np.eye(len(phi))


def test_likelihood_gradient_and_covariance(both, x64):
    """The closed form has the derivatives of the likelihood that JAX has: central differences, extrapolated."""
    criterion, axes = in_standard_errors(both)
    here, k = criterion(0 * axes[0]), len(axes)
    np.testing.assert_allclose(here, both.criterion, rtol=0, atol=1e-11)

    def derivatives(h):
        plus, minus = ([criterion(sign * h * e) for e in axes] for sign in (1, -1))
        g = (np.array(plus) - minus) / (2 * h)
        H = np.diag((np.array(plus) - 2 * here + minus) / h**2)
        for i in range(k):
            for j in range(i):
                mixed = criterion(h * (axes[i] + axes[j])) + criterion(-h * (axes[i] + axes[j]))
                H[i, j] = H[j, i] = (mixed - plus[i] - minus[i] - plus[j] - minus[j] + 2 * here) / (2 * h**2)
        return g, H

    (g, H), (g2, H2) = derivatives(0.04), derivatives(0.02)
    np.testing.assert_allclose((4 * g2 - g) / 3, 0, atol=1e-6)
    V = both.estimates.vcov_all
    se = np.sqrt(np.diag(V))
    np.testing.assert_allclose(2 * np.linalg.inv((4 * H2 - H) / 3), V / np.outer(se, se), atol=1e-5)


def test_quadrature_expected_curvature_and_joint(both, epil, salamanders, x64):
    more = mj.glmm(COUNT, salamanders, "nbinom", ziformula="~ 1", dispformula="~ mined", nagq=5)
    expected = mj.glmm(EPIL, epil, "nbinom", dispformula="~ trt", curvature="expected")
    for fit, curvature, nagq in ((more, "observed", 5), (expected, "expected", 1)):
        assert fit.converged
        criterion, axes = in_standard_errors(fit, curvature, nagq)
        np.testing.assert_allclose(criterion(0 * axes[0]), fit.criterion, rtol=0, atol=1e-9)
        near, far = ([criterion(h * e) - criterion(-h * e) for e in axes] for h in (0.01, 0.02))
        np.testing.assert_allclose(
            (8 * np.array(near) - far) / 0.12, 0, atol=1e-6
        )  # fifth derivatives times 0.01^4 / 30
    check = both.laplace_check()
    np.testing.assert_allclose(-2 * check.difference, more.criterion - both.criterion, atol=0.05)
    assert list(check.names) == ["Intercept", "mined[T.no]", "disp~Intercept", "disp~mined[T.no]", "zi~Intercept",
                                 "sd_Intercept|site"]  # fmt: skip
    inner = mj.glmm(COUNT, salamanders, "nbinom", ziformula="~ 1", dispformula="~ mined", nagq=0)
    assert inner.converged
    assert inner.criterion >= both.criterion


def test_many_are_singles(both):
    Y = both.record.simulate(3, 5)
    keep = ("beta", "psi", "criterion", "result", "vcov_all")
    many = both.record.fit_many(Y, keep, "numpy")
    assert (many.result == 0).all()
    for i in range(3):
        one = both.refit(Y[i])
        np.testing.assert_allclose(many.criterion[i], one.criterion, rtol=0, atol=1e-9)
        se = np.sqrt(np.diag(one.estimates.vcov_all))[2:5]
        np.testing.assert_allclose((many.psi[i] - one.estimates.psi) / se, 0, atol=1e-6)
        np.testing.assert_allclose(np.diag(many.vcov_all[i])[2:5], se**2, rtol=1e-4)


def test_truth_is_found():
    """Simulated by the parameters of a fit, estimates scatter about them as their standard errors say."""
    rng = np.random.default_rng(0)
    n, group = 400, np.repeat(np.arange(40), 10)
    columns = np.column_stack([np.ones(n), np.arange(n) % 2])
    X = np.column_stack([np.ones(n), rng.normal(size=n)])
    term = mj.RandomTerm(Z=np.ones((n, 1)), group=group, n_groups=40)
    design = mj.Design(y=np.zeros(n), X=X, terms=(term,), psi_columns=(columns,))
    family, truth = mj.families.zero_inflated("poisson"), np.array([-1.0, 1.5])
    Y = simulate_family(design, family, [1.0, 0.3], [[[0.2]]], [columns @ truth], 5, 100)
    found = mj.glmm_estimate_many(mj.rows(design, family, Y), keep=("psi", "vcov_all", "result"), engine="numpy")
    assert (found.result == 0).all()
    z = (found.psi - truth) / np.sqrt(np.diagonal(found.vcov_all, axis1=1, axis2=2)[:, 2:4])
    assert (np.abs(z.mean(0)) < 0.35).all()
    assert (z.std(0) > 0.8).all()
    assert (z.std(0) < 1.25).all()


# --- tables and predictions ------------------------------------------------------------------------------------------


def test_tables(both):
    text = str(both.summary())
    assert "Zero-inflation model: ~ 1" in text
    assert "Dispersion model:\n" in text
    assert "Dispersion model" in both.summary().to_html()
    names = ["sd_Intercept|site", "disp~Intercept", "disp~mined[T.no]", "zi~Intercept", "Intercept", "mined[T.no]"]
    assert list(both.vcov_all) == names
    wald = both.confint(method="wald")
    assert list(wald.index) == names
    table = both.tidy(conf_int=True)
    own = table[table["component"] == "disp"].set_index("term")
    np.testing.assert_allclose(own["estimate"], both.disp)
    np.testing.assert_allclose(own[["lower", "upper"]], wald.loc[names[1:3]], rtol=1e-12)
    assert table["component"].tolist() == ["cond", "cond", "cond", "zi", "disp", "disp"]
    ratios = both.tidy(exponentiate=True)
    np.testing.assert_allclose(ratios["estimate"][3:], table["estimate"][3:])
    assert "component" not in mj.glmm("slow ~ Days + (1 | Subject)", slow(), "binomial").tidy()


def slow():
    return mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)


def test_means_have_extra_zeros(both, salamanders):
    pi = 1 / (1 + np.exp(-both.zi["Intercept"]))
    mu = np.exp(both.linear_predictor)
    np.testing.assert_allclose(both.fitted, (1 - pi) * mu, rtol=1e-13)
    k = np.exp(both.disp["Intercept"] + both.disp["mined[T.no]"] * (salamanders["mined"] == "no"))
    variance = (1 - pi) * (mu + mu**2 / k + pi * mu**2)
    np.testing.assert_allclose(
        both.residuals("pearson"), (salamanders["count"] - both.fitted) / np.sqrt(variance), rtol=1e-12
    )
    np.testing.assert_allclose((both.residuals("deviance") ** 2).sum(), both.deviance)
    Y = both.record.simulate(1, 400)
    expected = both.predict(random=False, integrate=True)
    error = Y.std(0).mean() / np.sqrt(400 * 23)  # effects of a site are shared
    assert abs(Y.mean() - expected.mean()) < 4 * error
    assert abs((Y == 0).mean() - (salamanders["count"] == 0).mean()) < 0.03


def test_predictions(both):
    rows = both.predict(interval="confidence")
    np.testing.assert_allclose(rows["estimate"], both.fitted, rtol=1e-12)
    new = {"mined": ["yes", "no"], "site": ["R-1", "R-99"]}
    found = both.predict(new, random=False, interval="confidence")
    pi = 1 / (1 + np.exp(-both.zi["Intercept"]))
    mean = (1 - pi) * np.exp(both.predict(new, random=False, scale="link"))
    np.testing.assert_allclose(found["estimate"], mean, rtol=1e-12)

    # The delta method: the mean's derivatives by all parameters, of which standard deviations have none.
    X = np.array([[1.0, 0.0], [1.0, 1.0]])
    slopes = mean.to_numpy()[:, None] * np.column_stack([X, np.zeros((2, 2)), np.full((2, 1), -pi), np.zeros((2, 1))])
    want = np.sqrt(np.einsum("mi,ij,mj->m", slopes, both.estimates.vcov_all, slopes))
    np.testing.assert_allclose(found["std_error"], want, rtol=1e-10)
    averages = both.predict(new, random=False, integrate=True)
    np.testing.assert_allclose(averages, mean * np.exp(both.theta[0] ** 2 / 2), rtol=1e-10)
    limits = both.predict(new, random=False, interval="prediction")
    drawn = both.record.simulate(2, 400)
    for mined, upper in zip(("yes", "no"), limits["upper"], strict=True):
        own = drawn[:, (both.labels.frame["mined"] == mined).to_numpy()]
        assert (own > upper).mean() < 0.03
        assert (own > 0.5 * upper).mean() > 0.02


def test_dispersion_of_new_rows(epil):
    fit = mj.glmm(EPIL, epil, "nbinom", dispformula="~ trt + period")
    new = epil.head(3)
    assert fit.predict(new.drop(columns="period"), random=False).notna().all()
    with pytest.raises(mj.DataError, match="period"):
        fit.predict(new.drop(columns="period"), random=False, interval="prediction")
    assert (fit.predict(new, random=False, interval="prediction")["upper"] > 0).all()


# --- inference -------------------------------------------------------------------------------------------------------


def test_comparisons(both, salamanders):
    size = mj.glmm(COUNT, salamanders, "nbinom")
    dispersed = mj.glmm(COUNT, salamanders, "nbinom", dispformula="~ mined")
    found = mj.compare(size, dispersed, both)
    text = str(found)
    table = found.to_frame()
    np.testing.assert_allclose(table["chisq"].iloc[1], size.criterion - dispersed.criterion, rtol=1e-12)
    np.testing.assert_allclose(table["p_mixture"].iloc[2], table["p_value"].iloc[2] / 2)
    assert "puts the probability of extra zeros to 0, its bound" in text
    assert "disp ~ mined" in text
    other = mj.glmm("count ~ mined + spp + (1 | site)", salamanders, "nbinom")
    with pytest.warns(mj.InferenceWarning, match="not a special case of m1 .dispformula or ziformula"):
        mj.compare(dispersed, other)


def test_ratios_of_counts_without_extra_zeros(salamanders):
    """Under the smaller model about half of the replicates have no extra zeros: they count, with a ratio of 0."""
    poisson = mj.glmm(COUNT, salamanders, "poisson")
    zeros = mj.glmm(COUNT, salamanders, "poisson", ziformula="~ 1")
    found = mj.compare(poisson, zeros, method="bootstrap", n=40)
    (draws,) = found.null_draws.values()
    assert len(draws) == 40
    assert 8 <= (draws < 1e-6).sum() <= 32
    assert "replicates there are no extra zeros" in " ".join(found.notes)


def test_resampling_and_robust_errors(both, salamanders):
    dispersed = mj.glmm(COUNT, salamanders, "nbinom", dispformula="~ mined")
    for kind in ("parametric", "cases"):
        boot = dispersed.bootstrap(1, 6, kind=kind, engine="numpy")
        assert list(boot.replicates.columns) == list(dispersed.vcov_all)
        assert np.isfinite(boot.replicates).to_numpy().all()
    assert list(both.refit_many(both.record.simulate(1, 2)).sdcor)[1:] == ["disp~Intercept", "disp~mined[T.no]",
                                                                            "zi~Intercept"]  # fmt: skip
    # glmmTMB without the random effect: -867.672560769
    np.testing.assert_allclose(both.ranova()["loglik"].iloc[1], -867.672560769, rtol=0, atol=1e-8)
    # Scores add up to the gradient of all rows, which is 0.
    from mixjax.estimation.glmm_scores import cluster_scores

    codes = salamanders["site"].cat.codes.to_numpy().astype(int)
    scores = cluster_scores(both.record.rows, both.estimates, codes)
    np.testing.assert_allclose(scores.sum(0) * np.sqrt(np.diag(both.estimates.vcov_all)), 0, atol=1e-6)
    assert scores.std(0).min() > 1e-3


# --- bad input -------------------------------------------------------------------------------------------------------


def counts(n=60):
    rng = np.random.default_rng(2)
    group = np.repeat(np.arange(n // 5), 5)
    y = rng.poisson(np.exp(0.3 + rng.normal(size=n // 5)[group] * 0.5))
    return pd.DataFrame({"y": y, "g": group, "x": rng.normal(size=n), "f": np.tile(list("abcde"), n // 5)})


@pytest.mark.parametrize(
    ("family", "options", "words"),
    [
        ("gamma", {"ziformula": "~ 1"}, "no zeros; leave them out and model whether"),
        ("poisson", {"dispformula": "~ x"}, "'nbinom' is a family of counts with one"),
        ("nbinom", {"ziformula": "~ 1 + (1 | g)"}, r"ziformula=.* has a random term \(1 \| g\)"),
        ("nbinom", {"dispformula": "~ (1 | f)"}, r"dispformula=.* has a random term"),
        ("nbinom", {"dispformula": "~ offset(x)"}, "has an offset"),
        ("nbinom", {"dispformula": "y ~ x"}, "without a response"),
        ("nbinom", {"dispformula": "x"}, "dispformula must be text such as '~ treatment'"),
        ("nbinom", {"ziformula": 1}, "ziformula must be text such as '~ 1', got int"),
        ("nbinom", {"dispformula": "~ 0"}, "has no terms"),
        ("nbinom", {"ziformula": "~ nowhere"}, "nowhere"),
        ("beta", {"ziformula": "~ x"}, "no zeros"),
    ],
)
def test_refusals(family, options, words):
    with pytest.raises(ValueError, match=words):
        mj.glmm("y ~ x + (1 | g)", counts(), family, **options)


def test_zeros_that_cannot_be_told():
    data = counts()
    with pytest.raises(mj.DataError, match="no response is 0"):
        mj.glmm("z ~ x + (1 | g)", data.assign(z=data["y"] + 1), "poisson", ziformula="~ 1")
    with pytest.raises(mj.DataError, match="cannot be told from failures"):
        mj.glmm("z ~ x + (1 | g)", data.assign(z=(data["y"] > 0) * 1), "binomial", ziformula="~ 1")


def test_rows_and_columns_of_the_formulas():
    data = counts()
    data.loc[3, "x"] = np.nan
    data["twice"] = 2 * data["x"]
    with pytest.warns(mj.DataWarning) as warned:
        fit = mj.glmm("y ~ 1 + (1 | g)", data, "nbinom", dispformula="~ x + twice")
    text = " ".join(str(one.message) for one in warned)
    assert "columns of dispformula left out because other columns of it determine them: twice" in text
    assert "missing values (x 1" in text
    assert fit.nobs == len(data) - 1
    assert list(fit.disp.index) == ["Intercept", "x"]
    assert mj.glmm("y ~ 1 + (1 | g)", data, "poisson", ziformula="~ 0").zi.empty


def test_a_family_with_extra_zeros(salamanders):
    given = mj.glmm(COUNT, salamanders, mj.families.zero_inflated("poisson"))
    asked = mj.glmm(COUNT, salamanders, "poisson", ziformula="~ 1")
    assert list(given.zi.index) == ["Intercept"]
    assert given.criterion == asked.criterion
    # The same as one number for all rows.
    design = mj.Design(**{**vars(given.design), "psi_columns": ()})
    one = mj.glmm_estimate(mj.rows(design, mj.families.zero_inflated("poisson")))
    np.testing.assert_allclose(one.criterion, given.criterion, rtol=0, atol=1e-9)
    np.testing.assert_allclose(one.psi, given.zi, rtol=1e-7)


def test_coding(salamanders):
    one, other = (
        mj.glmm("count ~ 1 + (1 | site)", salamanders, "poisson", ziformula="~ mined", contrasts=contrasts)
        for contrasts in (None, {"mined": "sum"})
    )
    assert list(other.zi.index) == ["Intercept", "mined[S.yes]"]
    np.testing.assert_allclose(other.criterion, one.criterion, rtol=0, atol=1e-9)
    np.testing.assert_allclose(-2 * other.zi.iloc[1], one.zi.iloc[1], rtol=1e-6)


def test_counts_of_ticks():
    """Real counts whose first criterion lay beside a pole of Laplace's approximation; glmmTMB ends at 2244.50858221."""
    fit = mj.glmm("TICKS ~ YEAR + (1 | LOCATION)", mj.datasets.load("grouseticks"), "poisson", ziformula="~ YEAR")
    np.testing.assert_allclose(fit.criterion, 2244.50858221, rtol=0, atol=1e-7)
    assert fit.optimizer.iterations < 15


def test_no_zero_inflation_is_named():
    rng = np.random.default_rng(5)
    group = np.repeat(np.arange(20), 10)
    data = pd.DataFrame({"y": rng.binomial(3, 0.7, 200), "g": group})  # fewer zeros than Poisson counts have
    with pytest.warns(mj.ConvergenceWarning, match="there is no zero inflation beyond what the family has"):
        fit = mj.glmm("y ~ 1 + (1 | g)", data, "poisson", ziformula="~ 1")
    assert fit.estimates.result == mj.Result.UNBOUNDED
    data["arm"] = np.where(group < 10, "a", "b")
    data["y"] = np.where(group < 10, data["y"], rng.negative_binomial(1, 0.3, 200))
    with pytest.warns(mj.ConvergenceWarning, match="vary no more than the family without it"):
        mj.glmm("y ~ arm + (1 | g)", data, "nbinom", dispformula="~ arm")


def test_shares_of_the_variance(epil):
    """Every row has its own variance at the common mean; by hand."""
    fit = mj.glmm(EPIL, epil, "nbinom", dispformula="~ trt")
    size = np.exp(fit.disp["Intercept"] + fit.disp["trt[T.progabide]"] * (epil["trt"] == "progabide"))
    between = float(fit.Sigma["subject"][0, 0])
    eta = fit.predict(random=False, scale="link")
    m = np.exp(eta + between / 2).mean()
    fixed = eta.var(ddof=1)
    for approximation, own in (
        (None, polygamma(1, 1 / (1 / m + 1 / size)).mean()),
        ("lognormal", np.log1p(1 / m + 1 / size).mean()),
        ("delta", (1 / m + 1 / size).mean()),
    ):
        icc, r2 = fit.icc(approximation=approximation), fit.r2(approximation=approximation)
        np.testing.assert_allclose(icc["adjusted"], between / (between + own), rtol=1e-12)
        np.testing.assert_allclose(r2["marginal"], fixed / (fixed + between + own), rtol=1e-12)
        residual = fit.variance_shares(approximation=approximation).set_index("component")["variance"]["residual"]
        np.testing.assert_allclose(residual, own, rtol=1e-12)
    # One dispersion for all rows is that of the fit without the formula.
    plain = mj.glmm(EPIL, epil, "nbinom")
    psi = np.append(plain.estimates.psi, 0.0)
    same = replace(fit.record, estimates=fit.estimates._replace(
        beta=plain.estimates.beta, psi=psi, Sigma=plain.estimates.Sigma))  # fmt: skip
    np.testing.assert_allclose(icc_of(same), plain.icc(), rtol=1e-12)
    table = str(mj.table([fit]))
    assert "R2 marginal" in table


def test_what_is_not_there_yet(both, epil):
    both.emmeans("mined")
    for refused in (both.icc, both.r2, both.variance_shares, lambda: both.residuals("working")):
        with pytest.raises(ValueError, match="ziformula="):
            refused()
    fit = mj.glmm(EPIL, epil, "nbinom", dispformula="~ trt")
    assert fit.emmeans("trt", scale="response").to_frame()["estimate"].notna().all()
    assert np.isfinite(fit.leverage()).to_numpy().all()
    assert fit.quantile_residuals(n=20) is not None


# Method -> arguments, and of those that refuse what they say.
ANSWERED = {
    "summary": (), "tidy": (), "glance": (), "ranef": (), "coef": (), "predict": (), "residuals": (), "augment": (),
    "anova": (), "drop1": (), "ranova": (), "joint_tests": (), "overdispersion": (0, 20),
    "zero_inflation": (0, 20), "quantile_residuals": (0, 20), "robust": (), "variance_parameters": (),
    "laplace_check": (), "simulate": (0, 2),
    "profile": ("sd_Intercept|site",), "confint": ("mined[T.no]",), "influence": ("site",),
    "test": (["mined[T.no] = 0"],), "emmeans": ("mined",),
}  # fmt: skip
REFUSED = {
    "icc": "no accepted variance", "r2": "no accepted variance", "variance_shares": "no accepted variance",
    "leverage": "not concave at .* see fit.quantile_residuals",
}  # fmt: skip


def test_every_method_answers_or_says_why_not(both):
    for name, arguments in ANSWERED.items():
        assert getattr(both, name)(*arguments) is not None, name
    for name, message in REFUSED.items():
        with pytest.raises(ValueError, match=message):
            getattr(both, name)()
    others = {"bootstrap", "emtrends", "plot", "refit", "refit_many", "without", "smooth", "smooths"}
    methods = {name for name in dir(both) if not name.startswith("_") and callable(getattr(both, name))}
    assert methods - {*ANSWERED, *REFUSED, *others} <= {"to_latex", "to_html", "to_markdown"}
    assert list(both.augment())[-1] == ".std_resid"
    assert both.refit(both.simulate(1, 1)[0]).converged
    assert both.bootstrap(key=1, n=4).replicates.shape[1] == len(both.vcov_all)
    assert len(both.refit_many(both.simulate(1, 2))) == 2


def test_shapes_of_columns():
    term = mj.RandomTerm(Z=np.ones((12, 1)), group=np.repeat(np.arange(4), 3), n_groups=4)
    y, X = np.arange(12.0), np.ones((12, 1))

    def rows(*columns, family="nbinom"):
        return mj.rows(mj.Design(y=y, X=X, terms=(term,), psi_columns=columns), family)

    assert rows(None).psi_columns == ()
    with pytest.raises(ValueError, match="2 entries; family 'nbinom' has 1 parameters"):
        rows(X, X)
    with pytest.raises(ValueError, match="others determine"):
        rows(np.ones((12, 2)))
    with pytest.raises(ValueError, match="must be"):
        rows(np.ones(12))


# --- profiles and influence ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "options"),
    [("poisson", {"ziformula": "~ mined"}), ("nbinom", {"ziformula": "~ 1", "dispformula": "~ mined"})],
)
def test_profiles_are_conditional_minima(salamanders, family, options, x64):
    """At a limit the criterion is a quantile higher, and stationary in all other parameters: by JAX's derivatives."""
    fit = mj.glmm(COUNT, salamanders, family, **options)
    rows, s, p = fit.record.rows, len(fit.estimates.psi), len(fit.fixef)
    found = fit.profile()
    limits = found.confint()

    @jax.jit
    def criterion(values):
        return mj.glmm_criterion(values[:1], values[1 + s :], rows, values[1 : 1 + s])

    slope = jax.jit(jax.grad(criterion))
    for place, name in enumerate(limits.index):
        curve = found._curves[name]
        for limit in limits.loc[name]:
            if not np.isfinite(limit):  # no extra zeros at all are within reach
                assert name == "zi~Intercept"
                continue
            at = jnp.asarray(curve.conditional[curve.values.index(limit)])
            assert float(criterion(at)) - fit.criterion == pytest.approx(1.959963984540054**2, abs=2e-6)
            assert np.abs(np.delete(slope(at), place)).max() < 2e-3
    assert len(limits) == 1 + s + p


def test_a_zero_coefficient_is_the_smaller_model(salamanders):
    """zi~mined held at 0 is ziformula='~ 1'."""
    large = mj.glmm(COUNT, salamanders, "poisson", ziformula="~ mined")
    small = mj.glmm(COUNT, salamanders, "poisson", ziformula="~ 1")
    name = "zi~mined[T.no]"
    search = HeldSearch(large.record.rows, "observed")
    at = search.minimise(Parameter("psi", i=1), 0.0, unconditional(large.estimates, (1,)))
    assert list(large.zi.index) == ["Intercept", name.split("~")[1]]
    assert at.criterion == pytest.approx(small.criterion, abs=1e-8)
    np.testing.assert_allclose(at.beta, small.fixef, rtol=1e-5)
    np.testing.assert_allclose(at.psi, [small.zi.iloc[0], 0.0], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("poisson", {"ziformula": "~ mined"}),
        ("nbinom", {"dispformula": "~ mined"}),
        ("nbinom", {"ziformula": "~ 1", "dispformula": "~ mined"}),
    ],
)
def test_influence_is_that_of_refits(salamanders, family, options):
    fit = mj.glmm(COUNT, salamanders, family, **options)
    found = fit.influence("site")
    assert (found.result == "CONVERGED").all()
    for site in ("VF-1", "R-2"):
        without = mj.glmm(COUNT, salamanders[salamanders["site"] != site], family, **options)
        np.testing.assert_allclose(found.dfbeta.loc[site], fit.fixef - without.fixef, rtol=1e-6, atol=1e-8)
        np.testing.assert_allclose(found.dispersion.loc[site], without.estimates.psi, rtol=1e-6)
        np.testing.assert_allclose(found.se.loc[site], without.se, rtol=1e-6)
    assert found.leverages.isna().all(axis=None) == ("ziformula" in options)
    step = fit.influence("site", method="one-step") if options.keys() == {"dispformula"} else found
    assert np.corrcoef(step.cooks, found.cooks)[0, 1] > 0.9


def test_a_unit_that_alone_tells_a_coefficient_of_psi(salamanders):
    """Without it the columns of the dispersion have less than full rank, and it is said."""
    table = salamanders.assign(alone=(salamanders["site"] == "R-2") * 1.0)
    fit = mj.glmm(COUNT, table, "nbinom", dispformula="~ alone")
    with pytest.warns(mj.InferenceWarning, match="R-2"):
        found = fit.influence("site")
    assert found.result["R-2"] == "RANK_DEFICIENT"
    assert (found.result.drop("R-2") == "CONVERGED").all()
