"""Profiles of generalised linear mixed models, against direct minimisation of a dense likelihood, and against R."""

from functools import cache

import numpy as np
import pandas as pd
import pytest
import scipy.optimize
from glmm_cases import case, fit_of
from glmm_dense import agq_dense, laplace_dense

import mixjax as mj
from mixjax.covariance import Diagonal, Unstructured
from mixjax.covariance.held import with_correlation, with_deviation
from mixjax.families.held import HeldFamily

Z95 = 1.959963984540054


@cache
def data():
    rng = np.random.default_rng(8)
    g, x = np.repeat(np.arange(14), 5), rng.normal(size=70)
    h = np.arange(70) % 6
    eta = 0.8 + 0.4 * x + rng.normal(size=14)[g] * 0.7 + rng.normal(size=14)[g] * 0.5 * x
    return pd.DataFrame({
        "g": g, "h": h, "x": x, "y": rng.negative_binomial(4, 4 / (4 + np.exp(eta))),
        "b": (rng.random(70) < 1 / (1 + np.exp(-eta + 0.6 - rng.normal(size=6)[h]))) * 1.0,
        "n": np.full(70, 4.0), "s": rng.binomial(4, 1 / (1 + np.exp(0.6 - eta))),
    })  # fmt: skip


MODELS = {
    "slopes": ("y ~ x + (x | g)", "poisson", {}),
    "size": ("y ~ x + (1 | g)", "nbinom", {}),
    "crossed": ("s ~ x + (1 | g) + (1 | h)", "binomial", {"size": "n"}),
    "expected": ("y ~ x + (1 | g)", "nbinom", {"curvature": "expected"}),
}


@cache
def fit(model):
    formula, family, options = MODELS[model]
    return mj.glmm(formula, data(), family, **options)


@cache
def profiled(model):
    found = fit(model).profile()
    return found, found.confint()


def dense(model, values):
    """The criterion by definition, at parameters in the order of a profile's rows."""
    own, design = fit(model), fit(model).design
    values = list(values)
    lambdas = []
    for term in design.terms:
        if np.shape(term.Z)[1] == 1:
            lambdas.append(np.array([[values.pop(0)]]))
        else:
            first, cor, second = values[:3]
            values = values[3:]
            lambdas.append(np.array([[first, 0], [second * cor, second * np.sqrt(max(0.0, 1 - cor**2))]]))
    psi = np.log([values.pop(0)]) if own.family.n_psi else np.zeros(0)
    size = np.ones(len(design.X)) if design.size is None else design.size
    return laplace_dense(
        design, size, own.family.name, own.link, np.array(values), lambdas, psi, curvature=own.curvature
    )


# --- against the definition ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", MODELS)
def test_the_deviance_at_a_limit_is_the_quantile(model):
    """Conditional estimates are stationary in all other directions, and the criterion there is a quantile higher."""
    found, limits = profiled(model)
    names = list(found.estimate.index)
    least = dense(model, found.estimate)
    assert least == pytest.approx(fit(model).criterion, abs=1e-7)
    for name in names:
        curve = found._curves[name]
        for limit in limits.loc[name]:
            at = curve.conditional[curve.values.index(limit)]
            rise = dense(model, at) - least
            if limit == 0.0 and name in limits.attrs["boundary"]:
                assert rise < Z95**2
            else:
                assert rise == pytest.approx(Z95**2, abs=2e-6)
            for i in range(len(names)):
                if names[i] != name:
                    move = 1e-4 * max(1.0, abs(at[i])) * np.eye(len(at))[i]
                    slope = (dense(model, at + move) - dense(model, at - move)) / (2 * move[i])
                    assert abs(slope) < 2e-4 * np.sqrt(len(data()))


@pytest.mark.parametrize("name", ["sd_Intercept|g", "cor_x.Intercept|g", "x"])
def test_no_lower_deviance_is_found_directly(name):
    found, limits = profiled("slopes")
    names, least = list(found.estimate.index), fit("slopes").criterion
    curve = found._curves[name]
    held = names.index(name)
    limit = limits.loc[name, "upper"]
    start = np.delete(curve.conditional[curve.values.index(limit)], held)

    def others(free):
        values = np.insert(free, held, limit)
        inside = values[0] > 0 and values[2] > 0 and abs(values[1]) < 1
        return dense("slopes", values) if inside else 1e6

    best = scipy.optimize.minimize(others, start + 0.02, method="Nelder-Mead",
                                   options={"xatol": 1e-5, "fatol": 1e-9, "maxfev": 900})  # fmt: skip
    assert best.fun - least == pytest.approx(Z95**2, abs=1e-6)


def test_a_held_fixed_effect_is_an_offset():
    _, limits = profiled("size")
    for limit in limits.loc["x"]:
        table = data().assign(held=limit * data()["x"])
        smaller = mj.glmm("y ~ 1 + (1 | g)", table, "nbinom", offset="held")
        assert smaller.criterion - fit("size").criterion == pytest.approx(Z95**2, abs=1e-6)


def test_offsets_and_weights_stay():
    table = data().assign(w=np.linspace(0.5, 1.5, 70), o=np.linspace(-1, 1, 70))
    own = mj.glmm("y ~ x + (1 | g)", table, "poisson", offset="o", weights="w")
    limit = own.confint("x").loc["x", "lower"]
    smaller = mj.glmm("y ~ 1 + (1 | g)", table.assign(o=table["o"] + limit * table["x"]), "poisson", offset="o",
                      weights="w")  # fmt: skip
    assert smaller.criterion - own.criterion == pytest.approx(Z95**2, abs=1e-6)


def test_zeta_and_curves():
    found, limits = profiled("size")
    name = "size"
    zeta = found.zeta(name, limits.loc[name])
    assert zeta == pytest.approx([-Z95, Z95], abs=1e-6)
    assert found.zeta(name, [fit("size").dispersion["size"]]) == pytest.approx([0.0], abs=1e-5)
    frame = found.to_frame(points=7)
    own = frame[frame["parameter"] == "x"]
    assert (np.diff(own["zeta"]) > 0).all()
    assert own["x"].to_numpy() == pytest.approx(own["value"].to_numpy())
    assert list(frame.columns[3:]) == list(found.estimate.index)


# --- against R -------------------------------------------------------------------------------------------------------


def test_limits_of_cbpp_as_glmmTMB_finds_them():
    """``confint(method = "profile")``, which interpolates."""
    found = fit_of("cbpp").confint()
    reference = {
        "sd_Intercept|herd": (np.exp(-1.061163374), np.exp(0.0952717654)),
        "Intercept": (-1.901240934, -0.9477867570),
        "period[T.2]": (-1.616769248, -0.4077756553),
        "period[T.3]": (-1.801015578, -0.5115478896),
        "period[T.4]": (-2.500851844, -0.8007573398),
    }
    for name, limits in reference.items():
        assert found.loc[name].tolist() == pytest.approx(limits, abs=2e-4)


def test_order_of_rows_and_scale_of_a_column_change_nothing():
    _, limits = profiled("slopes")
    shuffled = data().sample(frac=1.0, random_state=1).assign(x=lambda d: 100 * d["x"])
    other = mj.glmm("y ~ x + (x | g)", shuffled, "poisson").confint(["sd_x|g", "cor_x.Intercept|g", "x"])
    assert 100 * other.loc["x"].to_numpy() == pytest.approx(limits.loc["x"].to_numpy(), rel=1e-5)
    assert 100 * other.loc["sd_x|g"].to_numpy() == pytest.approx(limits.loc["sd_x|g"].to_numpy(), rel=1e-5)
    assert other.loc["cor_x.Intercept|g"].tolist() == pytest.approx(
        limits.loc["cor_x.Intercept|g"].tolist(), rel=1e-5, abs=1e-6
    )


# --- by quadrature ---------------------------------------------------------------------------------------------------


def test_limits_by_quadrature_are_of_its_criterion():
    own = mj.glmm("y ~ x + (1 | g)", data(), "nbinom", nagq=5)
    profile = own.profile(["sd_Intercept|g", "size", "x"])
    limits = profile.confint()
    least = agq(own, [curve.estimate for curve in profile._all])
    assert least == pytest.approx(own.criterion, abs=1e-7)
    for name in limits.index:
        curve, limit = profile._curves[name], limits.loc[name, "upper"]
        at = curve.conditional[curve.values.index(limit)]
        assert agq(own, at) - least == pytest.approx(Z95**2, abs=2e-6)
        for i in range(len(at)):
            if profile._all[i].name != name:
                move = 1e-4 * np.eye(len(at))[i]
                assert abs(agq(own, at + move) - agq(own, at - move)) < 2e-7


def test_limits_by_quadrature_as_lme4_finds_them():
    """``confint`` of a ``glmer`` fit with ``nAGQ = 11``."""
    table = case("cbpp").table
    own = mj.glmm("cbind(incidence, size - incidence) ~ period + (1 | herd)", table, "binomial", nagq=11)
    found = own.confint([".sig01", "period4"])
    assert found.loc["sd_Intercept|herd"].tolist() == pytest.approx([0.3488017082, 1.1112959643], abs=1e-5)
    assert found.loc["period[T.4]"].tolist() == pytest.approx([-2.5001926456, -0.7995917739], abs=1e-5)


def agq(own, values):
    """The criterion by definition, at the parameters of a profile: sd, size, fixed effects."""
    sd, size, *beta = values
    return agq_dense(own.design, np.ones(70), "nbinom", "log", np.array(beta), [np.array([[sd]])], np.log([size]), 5)


def test_the_restricted_fit_is_refitted():
    own = mj.glmm("y ~ x + (1 | g)", data(), "nbinom", reml=True)
    with pytest.warns(mj.InferenceWarning, match="refitted by maximum likelihood"):
        found = own.confint("size")
    assert found.loc["size"].tolist() == pytest.approx(profiled("size")[1].loc["size"].tolist(), rel=1e-6)


# --- ends that are not reached ---------------------------------------------------------------------------------------


def test_a_variance_that_may_be_zero():
    with pytest.warns(mj.InferenceWarning, match="end on the boundary: sd_Intercept.sample"):
        found = fit_of("singular_zero").confint("theta_")
    assert found.loc["sd_Intercept|sample", "lower"] == 0.0
    assert 0.2 < found.loc["sd_Intercept|sample", "upper"] < 1.0
    assert found.loc["sd_Intercept|site", "lower"] > 0.1


def test_a_size_that_may_be_infinite():
    rng = np.random.default_rng(2)
    g = np.repeat(np.arange(20), 6)
    counts = {"y": rng.poisson(np.exp(1 + 0.5 * rng.normal(size=20)[g])), "g": g}
    for seed in range(10):
        counts["y"] = np.random.default_rng(seed).negative_binomial(60, 60 / (60 + np.exp(1 + 0.3 * (g % 3))))
        own = mj.glmm_estimate(mj.rows(mj.Design(counts["y"], np.ones((120, 1)), (
            mj.RandomTerm(np.ones((120, 1)), g, 20),)), "nbinom"))  # fmt: skip
        if own.converged and own.psi[0] < 6:
            break
    negative = mj.glmm("y ~ 1 + (1 | g)", counts, "nbinom")
    found = negative.profile("size").confint()
    poisson = mj.glmm("y ~ 1 + (1 | g)", counts, "poisson")
    assert poisson.criterion - negative.criterion < Z95**2
    assert np.isinf(found.loc["size", "upper"])
    assert 0 < found.loc["size", "lower"] < negative.dispersion["size"]
    assert found.attrs["boundary"] == ("size",)


def test_correlations_beside_a_vanishing_variance_are_anything():
    with pytest.warns(mj.InferenceWarning, match="end on the boundary"):
        found = fit_of("singular_correlation").confint("cor_week.Intercept|ID")
    assert found.iloc[0].tolist() == [-1.0, 1.0]


def test_what_has_no_profile_is_refused():
    with pytest.raises(ValueError, match=r"nagq=3, .* use method='wald' or 'bootstrap'"):
        mj.glmm("y ~ x + (x | g)", data(), "poisson", nagq=3).confint()
    with pytest.raises(ValueError, match="nagq=0, whose fixed effects are not at the minimum"):
        mj.glmm("y ~ x + (1 | g)", data(), "poisson", nagq=0).confint()
    with pytest.raises(ValueError, match="written for the covariance structure 'rr'"):
        mj.glmm("y ~ x + rr(0 + x + I(x ** 2) | g, d = 1)", data(), "poisson").confint()
    lost = pd.DataFrame({"y": [0.0] * 10 + [1.0] * 10, "x": np.arange(20.0), "g": np.arange(20) % 5})
    with pytest.warns(mj.ConvergenceWarning):
        separated = mj.glmm("y ~ x + (1 | g)", lost, "binomial")
    with pytest.raises(ValueError, match="the fit did not converge"):
        separated.profile()
    with pytest.raises(ValueError, match="there is no parameter 'sigma'"):
        fit("size").profile("sigma")


# --- what it is made of ----------------------------------------------------------------------------------------------


def test_a_family_with_a_parameter_held_is_the_family():
    rng = np.random.default_rng(0)
    family = mj.families.nbinom()
    held = HeldFamily("log", family, 0, 0.7)
    eta, y = rng.normal(size=6), rng.poisson(2.0, 6).astype(float)
    whole, part = family.derivatives(eta, y, None, [0.7]), held.derivatives(eta, y, None, [])
    assert held.n_psi == 0
    assert part.by_psi == part.by_psi_twice == ()
    assert np.array_equal(whole.by_eta, part.by_eta)
    assert held.expected(eta, None, []).by_psi == ()
    assert np.array_equal(held.density(eta, y, None, []), family.density(eta, y, None, [0.7]))


def test_held_structures_hold_and_have_their_derivatives():
    rng = np.random.default_rng(1)
    R = np.array([[1.0, 0.4], [0.0, 2.0]])
    R_inv, factor = np.linalg.inv(R), np.array([[0.8, 0.0], [0.3, 0.6]])
    cases = [
        (with_deviation(Unstructured(2).chart(R, factor[None], [1]), R_inv, 1, 0.9), lambda D: D[1, 1], 0.81),
        (with_deviation(Unstructured(2).chart(R, factor[None], [0]), R_inv, 0, 0.0), lambda D: D[0, 0], 0.0),
        (with_deviation(Diagonal(2).chart(np.diag([1.0, 3.0]), factor[None], [1]), np.diag([1.0, 1 / 3]), 1, 0.5),
         lambda D: D[1, 1], 0.25),
        (with_correlation(Unstructured(2).chart(R, factor[None], [0, 1], np.array([-0.6])), (0, 2)),
         lambda D: D[0, 1] / np.sqrt(D[0, 0] * D[1, 1]), -0.6),
    ]  # fmt: skip
    for number, (held, parameter, value) in enumerate(cases):
        back = np.diag([1.0, 1 / 3]) if number == 2 else R_inv
        x = np.abs(held.start)[:, None] + 0.1 * rng.random((len(held.start), 1))
        F = back @ held.structure.factor(x)[..., 0]
        assert parameter(F @ F.T) == pytest.approx(value, abs=1e-14)
        g = rng.normal(size=(3, 1))

        def entries(x, own=held.structure):
            F = own.factor(x)[..., 0]
            return (F @ F.T)[[0, 0, 1], [0, 1, 1]]

        for i in range(len(x)):
            move = 1e-5 * np.eye(len(x))[:, i : i + 1]
            slopes = (entries(x + move) - entries(x - move)) / 2e-5
            assert held.structure.jacobian(x)[:, i, 0] == pytest.approx(slopes, abs=1e-9)
            turn = (held.structure.jacobian(x + move) - held.structure.jacobian(x - move)) / 2e-5
            assert held.structure.curvature(x, g)[i, :, 0] == pytest.approx((g * turn[..., 0]).sum(0), abs=1e-9)
