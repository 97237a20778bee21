"""Degrees of freedom, tests and Wald intervals of single fits and of many, against lmerTest, pbkrtest and lme4."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import HERE, fit_of, r_name, table
from designs import STRUCTURES, random_design, random_theta

import mixjax as mj
from mixjax.covariance import factors_of, lambdas_of_theta, triangle
from mixjax.engine.coordinates import coordinates_of
from mixjax.engine.criterion import in_bases, profile_out
from mixjax.engine.elimination import arrange
from mixjax.engine.engine import AtOnce, Engine, engine_of
from mixjax.estimation.batch import batch_axes
from mixjax.estimation.estimate import fit as fit_engine
from mixjax.fitted.information import information
from mixjax.fitted.parameters import natural_with_slopes, select
from mixjax.inference.fixed import contrasts
from mixjax.inference.fixed import kenward_roger as kr
from mixjax.inference.fixed.contrasts import FixedEffects, f_test, t_tests
from mixjax.inference.wald import wald_intervals

MODELS = sorted(path.stem.removeprefix("inference_ddf_") for path in (HERE / "oracle").glob("inference_ddf_*.json"))
METHODS = {"satterthwaite": "satterthwaite", "kenward_roger": "kenward-roger"}


def reference(model):
    return json.loads((HERE / "oracle" / f"inference_ddf_{model}.json").read_text())


@pytest.mark.parametrize("model", MODELS)
def test_coefficients_agree_with_lmerTest_and_pbkrtest(model):
    fit = fit_of(model, "REML")
    names = [r_name(name) for name in fit.labels.fixed]
    for block, ddf in METHODS.items():
        wanted = reference(model)[block]
        at = [wanted["coefficients"]["row_names"].index(name) for name in names]
        column = {key: np.array(values)[at] for key, values in wanted["coefficients"].items() if key != "row_names"}
        found = t_tests(fit.record, np.eye(len(names)), ddf)
        np.testing.assert_allclose(found["df"], column["df"], rtol=2e-7)  # numerical derivatives there
        np.testing.assert_allclose(found["std_error"], column["Std. Error"], rtol=1e-8)
        np.testing.assert_allclose(found["p_value"], column["Pr(>|t|)"], rtol=1e-6, atol=1e-12)
        if block == "kenward_roger":
            V = np.array(wanted["vcov_adjusted"]["values"])[np.ix_(at, at)]
            scale = np.sqrt(np.outer(np.diag(V), np.diag(V)))
            np.testing.assert_allclose(FixedEffects.of(fit.record, ddf).vcov / scale, V / scale, atol=5e-9)


@pytest.mark.parametrize("model", ["cake_factor", "machines_slopes", "sleepstudy_slopes"])
def test_joint_tests_agree(model):
    fit = fit_of(model, "REML")
    names = [r_name(name) for name in fit.labels.fixed]
    for block, ddf in METHODS.items():
        for kind in ("I", "II", "III"):
            wanted = reference(model)[block][f"anova_type{kind}"]
            for i, term in enumerate(wanted["row_names"]):
                hypothesis = wanted["hypotheses"][term]
                L = np.array(hypothesis["values"], float)[:, [hypothesis["cols"].index(name) for name in names]]
                found = f_test(fit.record, L, ddf)
                assert found.statistic == pytest.approx(wanted["F value"][i], rel=1e-6)
                assert found.den_df == pytest.approx(wanted["DenDF"][i], rel=1e-6)
                assert found.p_value == pytest.approx(wanted["Pr(>F)"][i], rel=1e-5, abs=1e-12)


def test_pooled_degrees_of_freedom_are_those_of_the_rows_as_given():
    """lmerTest 3.1-3: contestMD(lmer(Reaction ~ Days + (1 | Subject)), rbind(c(1, 0), c(1, 9)))."""
    record = fit_of("sleepstudy_intercept", "REML").record
    L = np.array([[1.0, 0.0], [1.0, 9.0]])
    found = f_test(record, L)
    assert found.den_df == pytest.approx(29.41379294, rel=1e-6)
    assert found.den_df != pytest.approx(f_test(record, np.eye(2)).den_df, rel=1e-2)
    # Rows that depend on others count as rows, and rank as what they add: nothing.
    V = FixedEffects.of(record, "satterthwaite").vcov
    rows = np.vstack([L, L[1]])
    values, vectors = np.linalg.eigh(rows @ V @ rows.T)
    df = FixedEffects.of(record, "satterthwaite").df(vectors[:, 1:].T @ rows)
    E = (df / (df - 2)).sum()
    dependent = f_test(record, rows)
    assert values[0] == pytest.approx(0, abs=1e-9 * values[2])
    assert (dependent.num_df, dependent.statistic) == (2, pytest.approx(found.statistic))
    assert dependent.den_df == pytest.approx(2 * E / (E - 2))
    for ddf in ("kenward-roger", "wald"):
        assert f_test(record, rows, ddf).den_df == pytest.approx(f_test(record, np.eye(2), ddf).den_df)
    assert f_test(record, np.zeros((0, 2))).num_df == 0


def dense_kenward_roger(fit):
    """The adjusted covariance from V and its derivatives by every variance and covariance, all n x n."""
    X, n = fit.X, fit.nobs
    G = [np.eye(n)]
    for term in fit.design.terms:
        Z, group = np.asarray(term.Z), np.asarray(term.group)
        same = group[:, None] == group[None] if term.levels is None else term.levels[group] @ term.levels[group].T
        for a, b in zip(*triangle(Z.shape[1]), strict=True):
            part = np.outer(Z[:, a], Z[:, b])
            G.append((part if a == b else part + part.T) * same)
    V_inverse = np.linalg.inv(fit.marginal_cov())
    C = np.linalg.inv(X.T @ V_inverse @ X)
    H = [V_inverse @ g for g in G]
    P = [-X.T @ h @ V_inverse @ X for h in H]
    Q = [[X.T @ h @ k @ V_inverse @ X for k in H] for h in H]
    information = np.array([[np.trace(h @ k) - 2 * np.trace(C @ Q[i][j]) + np.trace(C @ P[i] @ C @ P[j])
                             for j, k in enumerate(H)] for i, h in enumerate(H)])  # fmt: skip
    W = 2 * np.linalg.inv(information)
    U = sum(W[i, j] * (Q[i][j] - P[i] @ C @ P[j]) for i in range(len(G)) for j in range(len(G)))
    return C + 2 * C @ U @ C


@pytest.mark.parametrize("model", ["singular_correlation_one", "singular_crossed_zero", "penicillin"])
def test_kenward_roger_is_the_dense_formula_also_where_the_fit_is_singular(model):
    fit = fit_of(model, "REML")
    wanted = dense_kenward_roger(fit)
    np.testing.assert_allclose(FixedEffects.of(fit.record, "kenward-roger").vcov, wanted, rtol=1e-8)


def test_structured_covariances_have_their_own_directions(x64):
    """One variance for all of diag's effects is not assumed: with one effect a term the models are the same."""
    data = table("sleepstudy")
    split = mj.lmm("Reaction ~ Days + (Days || Subject)", data)
    diagonal = mj.lmm("Reaction ~ Days + diag(Days | Subject)", data)
    for ddf in METHODS.values():
        a, b = (t_tests(fit.record, np.eye(2), ddf) for fit in (split, diagonal))
        np.testing.assert_allclose(a, b, rtol=1e-6)


def test_information_is_the_hessian_of_the_criterion(x64):
    """With sigma free, by automatic differentiation in theta's coordinates."""
    fit = fit_of("sleepstudy_slopes", "REML")
    info, stats = fit.record.information, fit.stats
    df = fit.nobs - 2

    def free(parameters):
        theta, log_sigma = parameters[:-1], parameters[-1]
        profiled = mj.criterion(theta, stats)
        rss = rss_of(theta)
        return profiled - df * (1 + jnp.log(rss / df)) + 2 * df * log_sigma + rss * jnp.exp(-2 * log_sigma)

    def rss_of(theta):
        return profile_out(in_bases(lambdas_of_theta(theta, (2,)), stats), arrange(stats), stats, True).rss

    at = jnp.append(jnp.asarray(fit.theta), np.log(fit.sigma))
    covariance = 2 * np.linalg.inv(np.asarray(jax.jit(jax.hessian(free))(at)))
    to_x = np.asarray(jax.jit(jax.jacfwd(lambda theta: coordinates_of(theta, stats)[0]))(at[:-1]))
    J = np.block([[to_x, np.zeros((3, 1))], [np.zeros((1, 3)), np.ones((1, 1))]])
    np.testing.assert_allclose(info.covariance, J @ covariance @ J.T, rtol=1e-6, atol=1e-9)


SMALL = ["one factor, q=2, weights", "two terms on a factor", "nested", "crossed"]


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("name", SMALL)
def test_information_at_once_is_that_by_automatic_differentiation(x64, name, reml):
    """At singular fits, and at fits of responses that have all of the random effects."""
    free = set()
    for seed in range(6):
        design = random_design(STRUCTURES[name], seed, n=40 + 80 * (seed % 2))
        rng = np.random.default_rng(seed)
        effects = sum((t.Z * rng.normal(size=(t.n_groups, t.Z.shape[1]))[t.group]).sum(1) for t in design.terms)
        design = replace(design, y=2.0 * (seed % 2) * effects + rng.normal(size=len(design.y)))
        stats = mj.cross_products(design)
        engine = engine_of(stats, reml)
        est = engine.run(fit_engine)
        own = engine.run(information, est.theta, est.sigma)
        other = Engine(stats, np.bool_(reml)).run(information, est.theta, est.sigma)
        assert all(isinstance(part, np.ndarray | np.bool_) for part in own)
        assert own.regular
        for a, b in zip(own, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10 * np.abs(b).max())
        free.add(bool(own.free.all()))
    assert free == {True, False}


@pytest.mark.parametrize("name", [name for name in SMALL if not STRUCTURES[name].weights])
def test_kenward_roger_by_numpy_is_that_by_jax(x64, name):
    structure = STRUCTURES[name]
    stats = mj.cross_products(random_design(structure, 5))
    theta, L = random_theta(structure, 5), np.array([[1.0, 0.0], [1.0, -2.0]])
    own = kr.adjust(AtOnce(stats, True), theta, 1.7)
    other = jax.jit(kr.adjust)(Engine(stats, True), theta, 1.7)
    for a, b in zip(own, other, strict=True):
        assert isinstance(a, np.ndarray)
        np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-11 * np.abs(b).max())
    for a, b in zip(kr.f_scaling(L, own), jax.jit(kr.f_scaling)(L, other), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-10)
    rows = [kr.f_scaling(row[None], own) for row in L]
    np.testing.assert_allclose(kr.df_of_rows(L, own), [df for df, _ in rows], rtol=1e-9)
    np.testing.assert_allclose([scale for _, scale in rows], 1.0, rtol=1e-9)


def test_kenward_roger_from_dense_matrices():
    """Kenward & Roger (1997), section 2, written down with V itself; two terms on two crossed factors."""
    design = random_design(STRUCTURES["crossed"], 2)
    fit = engine_of(mj.cross_products(design), True).run(fit_engine)
    X, n = np.asarray(design.X), len(design.y)
    G = [np.eye(n)]
    for term in design.terms:
        same = np.equal.outer(term.group, term.group)
        for a in range(term.Z.shape[1]):
            for b in range(a, term.Z.shape[1]):
                part = np.outer(term.Z[:, a], term.Z[:, b])
                G.append(same * (part if a == b else part + part.T))
    pairs = [Sigma[a, b] for Sigma in fit.Sigma for a in range(len(Sigma)) for b in range(a, len(Sigma))]
    V_inverse = np.linalg.inv(sum(s * g for s, g in zip([fit.sigma**2, *pairs], G, strict=True)))
    C = np.linalg.inv(X.T @ V_inverse @ X)
    half = [V_inverse @ g @ V_inverse for g in G]
    P = [-X.T @ h @ X for h in half]
    Q = [[X.T @ h @ g @ V_inverse @ X for g in G] for h in half]
    projection = V_inverse - V_inverse @ X @ C @ X.T @ V_inverse
    information = [[0.5 * np.trace(projection @ g @ projection @ h) for h in G] for g in G]
    W = np.linalg.inv(information)
    spread = sum(W[i, j] * (Q[i][j] - P[i] @ C @ P[j]) for i in range(len(G)) for j in range(len(G)))
    own = kr.adjust(AtOnce(mj.cross_products(design), True), fit.theta, fit.sigma)
    np.testing.assert_allclose(own.vcov, C, rtol=1e-8)
    np.testing.assert_allclose(own.adjusted, C + 2 * C @ (0.5 * (spread + spread.T)) @ C, rtol=1e-7)
    slopes = np.array([[row @ C @ p @ C @ row for p in P] for row in np.eye(2)])
    df = 2 * np.diag(C) ** 2 / np.einsum("ri,ij,rj->r", slopes, W, slopes)
    np.testing.assert_allclose(kr.df_of_rows(np.eye(2), own), df, rtol=1e-7)


@pytest.mark.parametrize("formula", ["(Machine | Worker)", "diag(Machine | Worker)", "homcs(Machine | Worker)"])
def test_standard_deviations_and_correlations_have_the_slopes_of_automatic_differentiation(x64, formula):
    stats = mj.lmm(f"score ~ Machine + {formula} + (1 | Worker:Machine)", table("Machines")).stats
    structures = stats.layout.structures

    def natural(at):
        values = []
        for basis, s, F in zip(stats.Z_bases, structures, factors_of(at, structures), strict=True):
            D = (basis.R_inv @ F) @ (basis.R_inv @ F).T
            sd = jnp.sqrt(jnp.diagonal(D))
            for kind, i, j in ((parameter.kind, parameter.i, parameter.j) for parameter in s.natural):
                values.append(sd[i] if kind == "sd" else D[i, j] / (sd[i] * sd[j]))
        return jnp.stack(values)

    x = np.random.default_rng(3).normal(size=stats.layout.k)
    values, slopes = natural_with_slopes(x, stats.layout.structures, stats.Z_bases)
    np.testing.assert_allclose(values, natural(jnp.asarray(x)), rtol=1e-12)
    np.testing.assert_allclose(slopes, jax.jacfwd(natural)(jnp.asarray(x)), rtol=1e-10, atol=1e-12)


def test_array_forms_of_numpys_arrays_are_those_of_jaxs(x64):
    fit = fit_of("sleepstudy_slopes", "REML")
    L = np.array([[0.0, 1.0], [1.0, 3.0]])
    for function in (mj.wald, mj.satterthwaite, mj.kenward_roger):
        own = function(fit.estimates, fit.stats, L)
        other = function(*jax.tree.map(jnp.asarray, (fit.estimates, fit.stats)), L)
        for a, b in zip(own, other, strict=True):
            assert isinstance(a, np.ndarray)
            np.testing.assert_allclose(a, b, rtol=1e-10)


def test_models_too_large_for_numpy_are_tested_by_jax(monkeypatch):
    fit = fit_of("penicillin", "REML")
    own = fit.record.information, mj.satterthwaite(fit.estimates, fit.stats, [1.0])
    monkeypatch.setattr("mixjax.products.sizes.MOST_DENSE_AT_ONCE", 0)
    other = fit.record.information, mj.satterthwaite(fit.estimates, fit.stats, [1.0])
    for a, b in zip([*own[0], *own[1]], [*other[0], *other[1]], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-10 * np.abs(b).max())


@pytest.mark.parametrize("formula", ["0 + (1 | Subject)", "0 + (Days | Subject) + (1 | when)",
                                     "0 + (Days | Subject) + (Days | when)"])  # fmt: skip
def test_no_fixed_effects(formula):
    data = table("sleepstudy")
    data = data.assign(when=(data["Days"] * 7 + np.arange(len(data)) // 10) % 6)
    a, b = np.random.default_rng(1).normal(0.0, (50.0, 10.0), (6, 2)).T
    data["Reaction"] += a[data["when"]] + b[data["when"]] * data["Days"]
    fit = mj.lmm("Reaction ~ " + formula, data)
    info = fit.record.information
    assert info.vcov.shape == (0, 0)
    assert info.slopes.shape == (len(fit.theta) + 1, 0, 0)
    assert np.isfinite(fit.confint(method="wald").to_numpy()).all()
    for function in (mj.wald, mj.satterthwaite, mj.kenward_roger):
        assert function(fit.estimates, fit.stats, np.zeros((0, 0))).p.shape == (0,)


def test_many_fits_at_once_are_single_fits():
    fit = fit_of("sleepstudy_slopes", "REML")
    Y = fit.simulate(3, 6)
    stats = mj.cross_products(fit.design, Y)
    est = mj.estimate_many(stats)
    L = np.array([[0.0, 1.0], [1.0, 5.0]])
    for function in (mj.wald, mj.satterthwaite, mj.kenward_roger):
        many = function(est, stats, L)
        assert many.p.shape == (6, 2)
        for i in (0, 5):
            one = fit.refit(Y[i])
            for a, b in zip(function(one.estimates, one.stats, L), many, strict=True):
                np.testing.assert_allclose(b[i], a, rtol=1e-6)


@pytest.mark.parametrize(
    ("name", "stacked"),
    [
        ("one factor, q=2, weights", True),
        ("two terms on a factor", False),
        ("nested", False),
        ("crossed", False),
    ],
)
def test_tests_in_lanes_are_those_by_automatic_differentiation(name, stacked, monkeypatch):
    """Standard errors and degrees of freedom of a batch, of one design or of several, regular and singular."""
    rng = np.random.default_rng(8)
    designs = [random_design(STRUCTURES[name], seed) for seed in (3, 4)]
    if stacked:
        stats = mj.stack([mj.cross_products(d) for d in designs])
    else:
        d = designs[0]
        effects = sum((t.Z * rng.normal(size=(40, t.n_groups, t.Z.shape[1]))[:, t.group]).sum(2) for t in d.terms)
        stats = mj.cross_products(d, rng.uniform(0, 2, (40, 1)) * effects + rng.normal(size=(40, len(d.y))))
    L = np.array([[1.0, 0.0], [1.0, -2.0], [0.0, 1.0]])
    for reml in (True, False):
        est = mj.estimate_many(stats, reml)
        assert stacked or 2 < est.singular.sum() < 38
        own = mj.satterthwaite(est, stats, L, reml), mj.wald(est, stats, L)
        with monkeypatch.context() as patch:
            patch.setattr(contrasts, "in_lanes", lambda *_: False)
            other = mj.satterthwaite(est, stats, L, reml), mj.wald(est, stats, L)
        for ours, theirs in zip(own, other, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                assert a.shape == b.shape == (len(est.beta), 3)
                np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-14)


def test_the_test_of_a_fit_does_not_depend_on_its_neighbours():
    design = fit_of("sleepstudy_slopes", "REML").design
    stats = mj.cross_products(design, fit_of("sleepstudy_slopes", "REML").simulate(5, 5_000))
    est = mj.estimate_many(stats)
    whole = mj.satterthwaite(est, stats, np.eye(2))
    at = slice(4_096, None)
    axes = batch_axes(stats)
    part = jax.tree.map(lambda a, axis: a[at] if axis == 0 else a, stats, axes)
    alone = mj.satterthwaite(jax.tree.map(lambda a: a[at], est), part, np.eye(2))
    for a, b in zip(whole, alone, strict=True):
        np.testing.assert_array_equal(a[at], b)


def test_array_forms_inside_transformations(x64):
    fit = fit_of("sleepstudy_slopes", "REML")
    est, stats = fit.estimates, jax.tree.map(jnp.asarray, fit.stats)
    L = jnp.array([[0.0, 1.0]])
    inside = jax.jit(lambda est: mj.satterthwaite(est, stats, L))(est)
    np.testing.assert_allclose(inside.df, t_tests(fit.record, L)["df"], rtol=1e-9)
    slope = jax.grad(lambda l: mj.wald(est, stats, jnp.array([1.0, l])).se[0])(2.0)  # noqa: E741
    V = fit.vcov.to_numpy()
    se = np.sqrt(np.array([1.0, 2.0]) @ V @ [1.0, 2.0])
    assert float(slope) == pytest.approx((V[0, 1] + 2 * V[1, 1]) / se, rel=1e-9)


def test_scale_and_order_do_not_matter():
    data = table("sleepstudy")
    changed = data.assign(Reaction=data["Reaction"] * 1000 + 5, Days=data["Days"] * 0.01 + 7).sample(
        frac=1, random_state=1
    )
    formula = "Reaction ~ Days + (Days | Subject)"
    a, b = mj.lmm(formula, data), mj.lmm(formula, changed)
    for ddf in METHODS.values():
        one, two = (t_tests(fit.record, [[0.0, 1.0]], ddf) for fit in (a, b))
        np.testing.assert_allclose(one[["df", "statistic", "p_value"]], two[["df", "statistic", "p_value"]], rtol=1e-5)


def test_what_is_refused_and_what_is_said():
    fit, ml = fit_of("sleepstudy_slopes", "REML"), fit_of("sleepstudy_slopes", "ML")
    with pytest.raises(ValueError, match=r"L has shape \(1, 3\)"):
        t_tests(fit.record, [[0, 1, 0]])
    with pytest.raises(ValueError, match="ddf must be one of"):
        t_tests(fit.record, np.eye(2), "kr")
    with pytest.raises(ValueError, match="contradict"):
        f_test(fit.record, [[0, 1], [0, 2]], rhs=[1.0, 1.0])
    with pytest.raises(ValueError, match="only zeros"):
        f_test(fit.record, [[0, 0]])
    with pytest.raises(ValueError, match="weights; use ddf='satterthwaite'"):
        t_tests(fit_of("sleepstudy_weighted", "REML").record, np.eye(2), "kenward-roger")
    with pytest.raises(ValueError, match="too many"):
        mj.kenward_roger(fit_of("insteval", "REML").estimates, fit_of("insteval", "REML").stats, [1.0, 0.0])
    with pytest.warns(mj.InferenceWarning, match="refitted by REML"):
        refitted = t_tests(ml.record, np.eye(2), "kenward-roger")
    np.testing.assert_allclose(refitted, t_tests(fit.record, np.eye(2), "kenward-roger"), rtol=1e-6)
    with pytest.warns(mj.InferenceWarning, match="singular fit"):
        t_tests(fit_of("singular_rank_two", "REML").record, np.eye(3))


def test_wald_intervals():
    fit = fit_of("sleepstudy_slopes", "REML")
    frame = fit.confint(method="wald")
    assert list(frame.index) == [
        "sd_Intercept|Subject", "cor_Days.Intercept|Subject", "sd_Days|Subject", "sigma", "Intercept", "Days"
    ]  # fmt: skip
    wanted = json.loads((HERE / "oracle" / "inference_confint_sleepstudy_slopes.json").read_text())["wald_REML"]
    rows = dict(zip(wanted["rows"], wanted["values"], strict=True))
    np.testing.assert_allclose(frame.loc["Days"], rows["Days"], rtol=1e-8)
    np.testing.assert_allclose(fit.confint("(Intercept)", method="wald").to_numpy()[0], rows["(Intercept)"], rtol=1e-8)
    assert (fit.confint("Days", method="wald", ddf="satterthwaite")["upper"] > frame.loc["Days", "upper"]).all()
    estimates = fit.variance_parameters()["estimate"]
    assert ((frame["lower"][:4] < estimates) & (estimates < frame["upper"][:4])).all()
    np.testing.assert_allclose(fit.conf_int().loc["Days"], rows["Days"], rtol=1e-8)
    with pytest.raises(ValueError, match="no parameter 'Dasy'"):
        fit.confint("Dasy")
    with pytest.raises(ValueError, match="level"):
        fit.confint(level=1.5)
    with pytest.raises(ValueError, match="method must be"):
        fit.confint(method="guess")


def test_standard_errors_of_variances_in_a_balanced_layout():
    """One-way: MS_between and MS_within are independent chi-squares, and REML is a function of them."""
    fit = fit_of("dyestuff", "REML")
    m, n = 6, 5
    within, between = fit.sigma**2, fit.sigma**2 + n * fit.Sigma["Batch"][0, 0]
    var_within, var_between = 2 * within**2 / (m * (n - 1)), 2 * between**2 / (m - 1)
    sd = np.sqrt(fit.Sigma["Batch"][0, 0])
    wanted = [np.sqrt(var_within + var_between) / n / (2 * sd), np.sqrt(var_within) / (2 * fit.sigma)]
    np.testing.assert_allclose(fit.variance_parameters()["std_error"], wanted, rtol=1e-7)


def test_on_the_boundary_there_is_no_wald_interval():
    fit = fit_of("dyestuff2", "REML")
    assert np.isnan(fit.record.variance_parameters.std_error[0])
    with pytest.warns(mj.InferenceWarning, match=r"sd_Intercept\|Batch"):
        frame = wald_intervals(fit.record)
    assert frame["lower"].isna().tolist() == [True, False, False]


def test_names_of_parameters():
    names, fixed = (
        ["sd_Intercept|g", "cor_x.Intercept|g", "sd_x|g", "sigma", "Intercept", "a[T.2]"],
        ["Intercept", "a[T.2]"],
    )
    assert select(".sig02", names, len(fixed)) == ["cor_x.Intercept|g"]
    assert select(["theta_", "a2"], names, len(fixed)) == [*names[:4], "a[T.2]"]
    assert select("beta_", names, len(fixed)) == fixed
    assert select([".sigma", "sd_(Intercept)|g"], names, len(fixed)) == ["sigma", "sd_Intercept|g"]


def test_summary_and_tidy_with_degrees_of_freedom():
    fit = fit_of("sleepstudy_slopes", "REML")
    assert "Pr(>|t|)" in str(fit.summary("satterthwaite"))
    assert "Pr(>|z|)" in str(fit.summary("wald"))
    frame = fit.tidy("kenward-roger")
    np.testing.assert_allclose(frame["df"][:2], 17.0, rtol=1e-6)
    np.testing.assert_allclose(fit.pvalues, t_tests(fit.record, np.eye(2))["p_value"])
