"""Random effects correlated by distance: against glmmTMB's criteria, against dense matrices, and in all that follows.

Nothing is compiled.
"""

import json
import warnings
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from test_contract import METHODS, PROPERTIES

import mixjax as mj
from mixjax.engine.kernels import KernelEngine
from mixjax.estimation.kernels import kernel_engine
from mixjax.inference.fixed.contrasts import FixedEffects
from mixjax.inference.random.nesting import free_kernels
from mixjax.kernels import Bounds, Kernel, distances
from mixjax.products.rows import rows_of

HERE = Path(__file__).parent


def close(found, wanted, rtol=1e-8, atol=0.0):
    np.testing.assert_allclose(np.asarray(found), np.asarray(wanted), rtol=rtol, atol=atol)


FORMULAS = {
    "exp": "y ~ x + exp(u + v | 1)",
    "gau": "y ~ x + gau(u + v | 1)",
    "mat15": "y ~ x + mat(u + v | 1, nu = 1.5)",
    "mat": "y ~ x + mat(u + v | 1)",
    "ou_tracks": "y ~ time + (1 | animal) + ou(time | animal)",
}


@cache
def table(name):
    return pd.read_csv(HERE / "data" / f"{name}.csv")


def table_of(name):
    return table("tracks" if "tracks" in name else "sites")


@cache
def fitted(name, reml=True):
    return mj.lmm(FORMULAS[name], table_of(name), reml=reml)


def own(fit):
    """Variance parameters by what stands before the bar, the animals' apart."""
    found = fit.variance_parameters()["estimate"]
    return {n.replace("|animal", "_intercept").split("|")[0].replace("_Intercept", ""): x for n, x in found.items()}


# --- correlations ----------------------------------------------------------------------------------------------------

DISTANCES = np.array([0.0, 1e-6, 1e-3, 0.1, 1.0, 3.0, 10.0, 50.0, 300.0])


@pytest.mark.parametrize("nu", [0.05, 0.3, 0.5, 1.5, 2.5, 7.0, 20.0])
def test_matern_is_bessels(nu):
    u = DISTANCES / 1.3
    with np.errstate(all="ignore"):
        wanted = np.where(u > 0, 2 ** (1 - nu) / scipy.special.gamma(nu) * u**nu * scipy.special.kv(nu, u), 1.0)
    close(Kernel("mat")(DISTANCES, (1.3, nu)), wanted, 0.0, 1e-12)
    close(Kernel("mat", nu)(DISTANCES, (1.3,)), wanted, 0.0, 1e-12)


def test_ou_and_half_a_matern_are_exp():
    for other in (Kernel("ou"), Kernel("mat", 0.5)):
        close(other(DISTANCES, (1.3,)), np.exp(-DISTANCES / 1.3), 1e-15)


KERNELS = [Kernel("exp"), Kernel("gau"), Kernel("mat"), *(Kernel("mat", nu) for nu in (0.8, 1.5, 2.5))]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_derivatives_of_kernels(kernel):
    at, h = np.log([1.3, 0.8])[: kernel.k], 1e-5
    found = kernel.curves(DISTANCES, np.exp(at))
    for i, step in enumerate(h * np.eye(kernel.k)):
        above, below = kernel.curves(DISTANCES, np.exp(at + step)), kernel.curves(DISTANCES, np.exp(at - step))
        close(found.slopes[i], (above.value - below.value) / (2 * h), 0.0, 1e-9)
        close(found.curves[i], (above.slopes - below.slopes) / (2 * h), 0.0, 1e-9)


def test_bounds_and_angles():
    bounds = Bounds.of(Kernel("mat"), 0.1, 30.0)
    angles = np.array([0.4, -0.7])
    parameters, slopes, curves = bounds.at(angles)
    close(bounds.angles(parameters), angles, 1e-12)
    h = 1e-5
    above, below = bounds.at(angles + h), bounds.at(angles - h)
    close(slopes, np.log(above[0] / below[0]) / (2 * h), 1e-8)
    close(curves, (above[1] - below[1]) / (2 * h), 1e-8)


# --- against glmmTMB -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("name", FORMULAS)
def test_oracles(name, reml):
    """The oracles are polished: the last step is below 1e-9 of a parameter."""
    wanted = json.loads((HERE / "oracle" / f"structure_k_{name}.json").read_text())["fits"]["REML" if reml else "ML"]
    fit = fitted(name, reml)
    assert fit.converged
    assert fit.npar == wanted["npar"]
    close(fit.criterion, wanted["criterion"], 0.0, 1e-8)
    found = own(fit)
    assert set(found) == set(wanted["parameters"])
    close([found[key] for key in wanted["parameters"]], list(wanted["parameters"].values()), 1e-7)
    close(fit.fixef, list(wanted["fixef"].values()), 1e-7)
    close(fit.vcov, wanted["vcov_fixef"]["values"], 1e-7)


# --- the criterion ---------------------------------------------------------------------------------------------------


def random_data(seed, crossed=False):
    """Some groups with places of their own, several rows at some of them, and days that cross the groups."""
    rng = np.random.default_rng(seed)
    sizes = rng.integers(2, 7, 6)
    group = np.repeat(np.arange(6), sizes)
    place = rng.uniform(0, 3, (len(group), 2))
    at = np.concatenate([np.arange(len(group)), rng.integers(0, len(group), 12)])
    data = pd.DataFrame({"g": group[at].astype(str), "u": place[at, 0], "v": place[at, 1]})
    data["x"], data["day"] = rng.normal(size=len(at)), rng.integers(0, 4, len(at)).astype(str)
    data["w"] = rng.uniform(0.5, 2.0, len(at))
    return data.assign(y=rng.normal(size=len(at)) + rng.normal(size=6)[group[at]])


CASES = {
    "groups": "y ~ x + exp(u + v | g)",
    "map": "y ~ x + mat(u + v | 1)",
    "beside": "y ~ x + gau(u + v | g) + (1 + x | g)",
    "crossed": "y ~ x + exp(u + v | g) + (1 | day)",
    "two": "y ~ x + exp(u + v | 1) + mat(u | g, nu = 1.5)",
}


def engine_of(name, seed=1, reml=True, weights=None):
    design, labels = mj.build_design(CASES[name], random_data(seed), weights=weights)
    return kernel_engine(rows_of(design), reml), labels


def dense_criterion(engine: KernelEngine, x):
    """By a matrix of rows by rows."""
    design, rows = engine.rows.design, engine.rows
    n, root = len(design.y), 1.0 if rows.sqrt_w is None else np.asarray(rows.sqrt_w)
    V, start = np.eye(n), 0
    angles = engine.angles(x)
    for t, (term, place, basis) in enumerate(zip(design.terms, engine.layout.terms, rows.Z_bases, strict=True)):
        F = place.structure.factor(x[start : start + place.structure.k])
        Z = root * (np.asarray(term.Z) @ basis.R_inv).T
        start += place.structure.k
        same = (term.group[:, None] == term.group).astype(float)
        if t in engine.places:
            own = engine.places[t]
            K = own.kernel(distances(own.coordinates, own.coordinates), own.bounds.at(angles[t])[0])
            same = np.where(own.within[:, None] == own.within, K, 0.0)[np.ix_(term.group, term.group)]
        V += np.einsum("ai,ab,bj->ij", Z, F @ F.T, Z) * same
    X, y = root[:, None] * design.X if rows.sqrt_w is not None else design.X, root * design.y
    V_inv = np.linalg.inv(V)
    M = X.T @ V_inv @ X
    e = y - X @ np.linalg.solve(M, X.T @ V_inv @ y)
    df = n - (X.shape[1] if engine.reml else 0)
    rss = e @ V_inv @ e
    value = np.linalg.slogdet(V)[1] + df * (1 + np.log(2 * np.pi * rss / df)) - 2 * np.log(root * np.ones(n)).sum()
    return value + (np.linalg.slogdet(M)[1] if engine.reml else 0.0)


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("name", CASES)
def test_criterion_and_derivatives(name, reml):
    engine, _ = engine_of(name, reml=reml, weights="w" if name in ("map", "beside") else None)
    rng = np.random.default_rng(0)
    k = engine.k + sum(own.kernel.k for own in engine.places.values())
    for x in (rng.uniform(-1, 1, (k, 2)) * 0.9).T:
        close(engine.value(x), dense_criterion(engine, x), 1e-10)
        value, gradient, H = engine.evaluate(x[:, None])
        close(value[0], engine.value(x), 1e-12)
        h = 1e-5
        steps = h * np.eye(k)
        close(gradient[:, 0], [(engine.value(x + d) - engine.value(x - d)) / (2 * h) for d in steps], 1e-6, 1e-6)
        of = [engine.evaluate((x + d)[:, None])[1] - engine.evaluate((x - d)[:, None])[1] for d in steps]
        close(H[..., 0], np.array(of)[..., 0] / (2 * h), 1e-6, 1e-6)
        slopes = engine.slopes(x)
        ends = [(engine.slopes(x + d).lanes, engine.slopes(x - d).lanes) for d in steps]
        close(slopes.XX_inverse, [(a.XX_inverse - b.XX_inverse) / (2 * h) for a, b in ends], 1e-6, 1e-8)
        close(slopes.log_rss, [np.log(a.rss / b.rss) / (2 * h) for a, b in ends], 1e-6, 1e-8)


@given(st.integers(0, 2**32 - 1), st.sampled_from(list(CASES)))
@settings(max_examples=20, deadline=None)
def test_random_designs(seed, name):
    engine, _ = engine_of(name, seed)
    k = engine.k + sum(own.kernel.k for own in engine.places.values())
    x = np.random.default_rng(seed).uniform(-1.2, 1.2, k)
    close(engine.value(x), dense_criterion(engine, x), 1e-9)


def test_a_zero_variance_and_a_smooth_kernel_of_close_places():
    """At D = 0, and where K has less than full rank to rounding, the criterion is what the dense matrix says."""
    engine, _ = engine_of("beside")
    x = np.full(engine.k + 1, 0.5)
    x[-1] = 1.2  # a range of many times the map
    close(engine.value(x), dense_criterion(engine, x), 1e-9)
    x[: engine.k] = 0.0
    close(engine.value(x), dense_criterion(engine, x), 1e-10)


# --- invariance ------------------------------------------------------------------------------------------------------


def test_order_names_and_units():
    data = table("tracks")
    plain = fitted("ou_tracks")
    rng = np.random.default_rng(2)
    names = dict(zip(sorted(data["animal"].unique()), rng.permutation(1000), strict=False))
    other = data.assign(
        animal=data["animal"].map(names).astype(str), time=data["time"] * 60.0, y=data["y"] * 1e3
    ).sample(frac=1.0, random_state=1)
    moved = mj.lmm(FORMULAS["ou_tracks"], other)
    close(moved.criterion, plain.criterion + 2 * (len(data) - 2) * np.log(1e3) + 2 * np.log(60.0), 1e-9)
    a, b = own(plain), own(moved)
    close([b[key] for key in a], [a[key] * (60.0 if key == "range" else 1e3) for key in a], 1e-5)


# --- what follows from a fit -----------------------------------------------------------------------------------------


@cache
def with_known():
    """The map's fit, and the one with its correlations taken as known."""
    fit = fitted("exp")
    frame = table("sites").assign(place=lambda d: [f"{u:g}:{v:g}" for u, v in zip(d["u"], d["v"], strict=True)])
    term, levels = fit.design.terms[0], fit.labels.terms[0].levels
    K = mj.Relationship(term.levels @ term.levels.T, levels)  # noqa: F841 found by its name
    return fit, mj.lmm("y ~ x + propto(1 | place, K)", frame)


def test_given_its_correlations_it_is_a_fit_with_known_ones():
    fit, known = with_known()
    close(fit.criterion, known.criterion, 1e-10)
    close(fit.fixef, known.fixef, 1e-6)
    close(fit.vcov, known.vcov, 1e-6)
    order = [list(known.labels.terms[0].levels).index(level) for level in fit.labels.terms[0].levels]
    for found, wanted in ((fit.fitted, known.fitted), (fit.residuals(), known.residuals())):
        close(found, wanted, 1e-5, 1e-7)
    close(fit.leverage(), known.leverage(), 1e-4, 1e-6)
    columns = [name for name in known.augment() if name.startswith(".")]
    close(fit.augment()[columns], known.augment()[columns], 1e-4, 1e-6)
    (a,), (b,) = fit.ranef().values(), known.ranef().values()
    close(a, b.to_numpy()[order], 1e-6, 1e-8)
    close(fit.marginal_cov(), known.marginal_cov(), 1e-5)
    assert fit.npar == known.npar + 1
    close(fit.simulate(3, 2), known.simulate(3, 2), 1e-4, 1e-3)


def test_kriging():
    """Predictions at other places, with errors, by hand."""
    fit, data = fitted("exp"), table("sites")
    sd, range_, sigma = own(fit).values()
    new = pd.DataFrame(
        {"x": [0.0, 1.0, 2.0, 2.0], "u": [1.0, 2.0, data["u"][3], 1.0], "v": [3.0, 1.5, data["v"][3], 3.0]}
    )
    at = np.concatenate([data[["u", "v"]], new[["u", "v"]]])
    n = len(data)
    K = sd**2 * np.exp(-distances(at, at) / range_)
    V_inv = np.linalg.inv(K[:n, :n] + sigma**2 * np.eye(n))
    X, Xn = np.column_stack([np.ones(n), data["x"]]), np.column_stack([np.ones(len(new)), new["x"]])
    vcov = np.linalg.inv(X.T @ V_inv @ X)
    beta, k = vcov @ X.T @ V_inv @ data["y"], K[n:, :n]
    mean = Xn @ beta + k @ V_inv @ (data["y"] - X @ beta)
    left = Xn - k @ V_inv @ X
    variance = np.diag(K[n:, n:] - k @ V_inv @ k.T + left @ vcov @ left.T)
    for interval, more in (("confidence", 0.0), ("prediction", sigma**2)):
        found = fit.predict(new, interval=interval)
        close(found["estimate"], mean, 1e-8)
        close(found["std_error"], np.sqrt(variance + more), 1e-8)
    population = fit.predict(new, random=False, interval="prediction")
    close(population["std_error"], np.sqrt(np.diag(Xn @ vcov @ Xn.T) + sd**2 + sigma**2), 1e-8)
    close(fit.predict(new.iloc[[1]]), mean[1], 1e-8)


def test_new_places_of_known_and_of_unknown_animals():
    fit = fitted("ou_tracks")
    animal = table("tracks")["animal"].iloc[0]
    new = {"time": [1.234], "animal": [animal]}
    (known,) = fit.predict(new)
    (at,) = fit.predict({"time": [1e7], "animal": [animal]}) - fit.fixef["time"] * (1e7 - 1.234)
    assert known != pytest.approx(at)  # far away only the animal's own intercept is left
    with pytest.raises(mj.DataError, match="'nobody"):
        fit.predict({"time": [1.234], "animal": ["nobody"]})
    alone = fit.predict({"time": [1.234], "animal": ["nobody"]}, allow_new_levels=True, interval="prediction")
    close(alone["estimate"], fit.fixef.to_numpy() @ [1.0, 1.234], 1e-12)
    sd_a, sd, sigma = (own(fit)[key] for key in ("sd_intercept", "sd", "sigma"))
    x = np.array([1.0, 1.234])
    close(alone["std_error"], np.sqrt(x @ fit.vcov.to_numpy() @ x + sd_a**2 + sd**2 + sigma**2), 1e-8)


def test_many_new_places_go_in_parts(monkeypatch):
    new = {"x": np.zeros(5), "u": np.arange(5.0), "v": np.zeros(5)}
    whole = fitted("exp").predict(new, interval="confidence")
    monkeypatch.setattr("mixjax.fitted.kernels.MOST_NEW", 2)
    parts = fitted("exp").predict(new, interval="confidence")
    close(parts, whole, 1e-9)
    assert list(parts.index) == list(whole.index)
    monkeypatch.setattr("mixjax.fitted.kernels.MOST_LEVELS", 51)
    with pytest.raises(mj.DataError, match="51 in all"):
        fitted("exp").predict(new)


def test_satterthwaite():
    """Degrees of freedom by differences: the covariance of beta and the criterion with sigma free, at other x."""
    fit = fitted("ou_tracks")
    record, engine = fit.record, fit.record.kernel_engine
    info, n = record.information, len(record.x)
    at, h = np.append(record.x, np.log(fit.sigma)), 1e-4

    def criterion(z):
        lanes, df = engine.slopes(z[:n]).lanes, engine.df
        return lanes.criterion - df * (1 + np.log(lanes.rss / df)) + 2 * df * z[n] + lanes.rss * np.exp(-2 * z[n])

    def mixed(a, b):
        ends = (criterion(at + s * a + t * b) * s * t for s in (1, -1) for t in (1, -1))
        return sum(ends) / (4 * h * h)

    steps = h * np.eye(n + 1)
    H = np.array([[mixed(a, b) for a in steps] for b in steps])
    # As correlations: a difference of steps h leaves some 100 roundings of the criterion over h^2.
    sd = np.sqrt(np.diag(info.covariance))
    scale = np.outer(sd, sd)
    close(info.covariance / scale, 2 * np.linalg.inv(H) / scale, 1e-4, 1e-5)
    R_inv = np.asarray(engine.rows.X_basis.R_inv)

    def variance(z):
        C = np.exp(2 * z[n]) * R_inv @ engine.slopes(z[:n]).lanes.XX_inverse @ R_inv.T
        return np.diag(C)

    slopes = np.array([(variance(at + a) - variance(at - a)) / (2 * h) for a in steps])
    df = 2 * variance(at) ** 2 / np.einsum("ip,ij,jp->p", slopes, 2 * np.linalg.inv(H), slopes)
    close(FixedEffects.of(record, "satterthwaite").df(np.eye(2)), df, 1e-4)


def test_many_responses():
    fit = fitted("ou_tracks")
    Y = fit.simulate(5, 12)
    batch = fit.refit_many(Y)
    assert batch.converged.all()
    for i in (0, 7):
        alone = fit.refit(Y[i])
        close(batch.criterion[i], alone.criterion, 1e-9)
        close(batch.sdcor.iloc[i], list(alone.variance_parameters()["estimate"]), 1e-4)
    assert any(name.startswith("range|") for name in batch.sdcor)
    boot = fit.bootstrap(key=3, n=30)
    assert "range|ou(time | animal)" in boot.confint().index


def test_search_finds_the_better_of_two_minima():
    """No start does better than the search, over a grid of ranges and standard deviations."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        xy = rng.uniform(0, 10, (40, 2))
        K = np.exp(-distances(xy, xy) / 0.7) + 2.0 * np.exp(-distances(xy, xy) / 30.0)
        y = np.linalg.cholesky(K) @ rng.normal(size=40) + 0.4 * rng.normal(size=40)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit = mj.lmm("y ~ exp(u + v | 1)", {"y": y, "u": xy[:, 0], "v": xy[:, 1]})
        engine = fit.record.kernel_engine
        grid = [
            engine.value(np.array([s, a])) for s in np.geomspace(0.05, 50, 12) for a in np.linspace(-1.57, 1.57, 25)
        ]
        assert fit.criterion <= min(grid) + 1e-8


def test_ranges_at_their_bounds():
    rng = np.random.default_rng(7)
    xy = np.repeat(rng.uniform(0, 10, (30, 2)), 4, axis=0)
    data = {"u": xy[:, 0], "v": xy[:, 1]}
    independent = np.repeat(rng.normal(size=30), 4) + 0.3 * rng.normal(size=120)
    with pytest.warns(mj.ConvergenceWarning, match="effects of different places are independent"):
        fit = mj.lmm("y ~ 1 + exp(u + v | 1)", data | {"y": independent})
    place = np.unique(xy, axis=0, return_inverse=True)[1].reshape(-1).astype(str)
    plain = mj.lmm("y ~ 1 + (1 | place)", data | {"y": independent, "place": place})
    close(fit.criterion, plain.criterion, 0.0, 1e-6)
    assert np.isnan(fit.variance_parameters()["std_error"].iloc[1])
    close(fit.se, plain.se, 1e-5)


def test_no_variance_at_all():
    rng = np.random.default_rng(12)
    data = {"y": np.tile([1.0, -1.0], 20) + 0.01 * rng.normal(size=40), "t": np.repeat(np.arange(20.0), 2)}
    fit = mj.lmm("y ~ 1 + exp(t | 1)", data)
    assert fit.converged
    assert fit.is_singular
    assert own(fit)["sd"] == 0.0
    assert fit.variance_parameters()["std_error"].iloc[:2].isna().all()


def test_comparisons():
    exp, mat, gau = fitted("exp", False), fitted("mat", False), fitted("gau", False)
    table_of_two = mj.compare(exp, mat)
    close(table_of_two.to_frame()["chisq"].iloc[1], exp.criterion - mat.criterion, 1e-9)
    with pytest.warns(mj.InferenceWarning, match="correlations by distance"):
        mj.compare(gau, mat)
    null = mj.lmm("y ~ time + (1 | animal)", table("tracks"), reml=False)
    whole = fitted("ou_tracks", False)
    assert free_kernels(null.record, whole.record) == ["ou(time | animal)"]
    assert "means nothing where m0 holds" in str(mj.compare(null, whole))
    assert mj.compare(null, whole, method="bootstrap", key=1, n=19).to_frame()["p_bootstrap"].iloc[1] == 0.05
    left_out = whole.ranova()
    close(left_out.loc["ou(time | animal)", "lrt"], null.criterion - whole.criterion, 1e-8)
    assert np.isnan(left_out.loc["ou(time | animal)", "p_mixture"])
    assert np.isfinite(left_out.loc["(1 | animal)", "p_mixture"])


def test_tables():
    fit = fitted("mat")
    assert "Correlations by distance:" in str(fit.summary())
    rows = fit.tidy().set_index("term")
    close(rows.loc[["range", "smoothness"], "estimate"], [own(fit)["range"], own(fit)["smoothness"]], 1e-12)
    assert "range | mat(u + v | 1)" in str(mj.table([fit, fitted("exp")]))
    assert "Correlations by distance" in fit.summary().to_html()


REFUSED = {"confint", "profile", "influence", "sensitivity", "robust"}
SMOOTHS = {"smooth", "smooths"}


def test_every_method_is_right_or_refused_by_name(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    fit = fitted("exp")
    arguments = {
        "test": ("x = 0",), "emmeans": ("1",), "emtrends": ("1", "x"), "bootstrap": (1, 5), "simulate": (1, 2),
        "refit": (table("sites")["y"].to_numpy()[::-1],), "refit_many": (fit.simulate(1, 2),), "without": ("x",),
    }  # fmt: skip
    refused = set()
    for method in METHODS.keys() - SMOOTHS:
        try:
            found = getattr(fit, method)(*arguments.get(method, ()))
        except ValueError as error:
            by_name = "exp(u + v | 1)" in str(error) or "known covariance" in str(error)
            refused.add(method if by_name else f"{method}: {error}")
            continue
        assert found is not None
        str(found)
    assert refused == REFUSED
    for attribute in PROPERTIES:
        assert getattr(fit, attribute) is not None
    assert fit.influence(method="fixed-theta") is not None
    assert fit.confint(method="wald").shape == (5, 2)


# --- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "y ~ x + exp(1 | u)": "before the bar stand the columns",
    "y ~ x + exp(log(u) | 1)": r"not 'log\(u\)'; make a column of it first",
    "y ~ x + ou(u + v | 1)": "in several dimensions write exp",
    "y ~ x + mat(u + v | 1, nu = -1)": "mat",
    "y ~ x + mat(u + v | 1, nu = 30)": "smoother than that is 'gau'",
    "y ~ x + mat(u + v | 1, foo = 2)": "there is only the smoothness",
    "y ~ x + exp(u + v | 1, nu = 2)": "'exp' has no smoothness",
    "y ~ x + exp(u || 1)": "all places are one map",
    "y ~ x + exp(site2 | 1)": "column 'site2' holds",
    "y ~ x + ou(when | 1)": "column 'when' holds datetime64.*for example days",
    "y ~ x + exp(u | site2)": "no level of 'site2' has two places",
    "y ~ x + exp(u + u | 1)": "names a column twice",
    "y ~ x + exp(w | 1)": "there is no column 'w'",
    "y ~ x + exp(u | site2/x)": "one grouping factor",
    "y ~ x + exp(u | u)": "cannot be in the grouping factor too",
    "y ~ x + exp(0 | 1)": "names no column",
    "y ~ x + exp(u + v | 1) + exp(u + v | 1)": "two random terms with the same levels",
}


@pytest.mark.parametrize("formula", BAD)
def test_bad_formulas(formula):
    data = table("sites").assign(
        site2=lambda d: [f"{u:g}_{v:g}" for u, v in zip(d["u"], d["v"], strict=True)],
        when=lambda d: pd.date_range("2026-01-01", periods=len(d)),
    )
    with pytest.raises(ValueError, match=BAD[formula]):
        mj.lmm(formula, data)


def test_refused_by_name():
    formula, data = FORMULAS["exp"], table("sites")
    design, _ = mj.build_design(formula, data)
    for call in (
        lambda: mj.cross_products(design),
        lambda: mj.lmm(formula, data, dispersion="~ x"),
        lambda: mj.glmm("k ~ x + exp(u + v | 1)", data.assign(k=(data["y"] > 0) * 1), family="binomial"),
        lambda: mj.group_batches(design, key=1, size=5),
        lambda: mj.scenario_of(fitted("exp")),
        lambda: mj.exact_lrt(fitted("exp")),
        lambda: mj.to_params(fitted("exp").estimates),
        lambda: mj.lmm(formula, [data.iloc[:50], data.iloc[50:]]),
        lambda: mj.mmrm("y ~ x + exp(u + v | site)", data),
    ):
        with pytest.raises(ValueError, match=r"kernel|exp\(u \+ v|distance"):
            call()
    term = design.terms[0]
    for change, message in (
        ({"coordinates": None}, "coordinates must be"),
        ({"coordinates": np.full((term.n_groups, 2), np.nan)}, "finite"),
        ({"within": np.zeros(3, int)}, "within must be"),
        ({"kernel": None}, "but no kernel"),
        ({"kernel": "exp"}, "must be a mixjax.Kernel"),
        ({"levels": np.eye(term.n_groups)}, "no other known covariance"),
    ):
        other = mj.Design(design.y, design.X, (mj.RandomTerm(**(vars(term) | change)),))
        with pytest.raises(ValueError, match=message):
            rows_of(other)
