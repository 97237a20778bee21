"""Generalised models without some of their rows: held against fits of the smaller table."""

import dataclasses

import numpy as np
import pandas as pd
import pytest
from glmm_cases import case, fit_of

import mixjax as mj
from mixjax import covariance as cov
from mixjax.checks import InferenceWarning
from mixjax.diagnostics.influence import influence
from mixjax.engine.block_effects import crossed
from mixjax.engine.component_effects import Components, in_lanes
from mixjax.engine.dense_effects import together
from mixjax.engine.laplace_fit import find_modes, form_at
from mixjax.engine.laplace_model import Model
from mixjax.estimation import glmm_deletion
from mixjax.estimation.glmm import fit_rows, model_of
from mixjax.estimation.glmm_deletion import fits_without
from mixjax.estimation.glmm_lanes import probe


def refitted(model, keep, **options):
    """The model fitted anew to some rows of its table."""
    formula, table, family, link, arguments, _ = case(model)
    return mj.glmm(formula, table[keep].reset_index(drop=True), family, link, **arguments, **options)


def deleted(fit, unit, units, nagq=1):
    """As :func:`fits_without`, of some units."""
    record = fit.record

    def refit(rows):
        return fit_rows(rows, record.estimates.theta, record.curvature)

    return fits_without(record.rows, record.estimates, unit, np.asarray(units), record.curvature, nagq, refit)


@pytest.fixture(scope="module")
def rows_of_crossed():
    """Every row of 644 left out, 23 sites crossed with 7 species."""
    return fit_of("salamanders_presence").influence()


def test_rows_of_a_crossed_fit_are_left_out_as_if_they_were_not_there(rows_of_crossed):
    fit, found = fit_of("salamanders_presence"), rows_of_crossed
    assert found.converged.all()
    some = [*found.ranked().index[:2].tolist(), 0, 643]
    criterion = deleted(fit, np.arange(644), some).criterion
    for u, value in zip(some, criterion, strict=True):
        one = refitted("salamanders_presence", np.arange(644) != u)
        assert abs(value - one.criterion) <= 1e-8
        np.testing.assert_allclose(found.beta.loc[u], one.fixef, rtol=1e-6, atol=1e-7)
        np.testing.assert_allclose(found.theta.loc[u], one.theta, rtol=1e-6)
        np.testing.assert_allclose(found.vcov[u], one.vcov, rtol=1e-5, atol=1e-7)
        # Measures by their definitions.
        C, change = fit.vcov.to_numpy(), (fit.fixef - one.fixef).to_numpy()
        p = len(change)
        expected = {
            "cooks": change @ np.linalg.solve(C, change) / p,
            "mdffits": change @ np.linalg.solve(one.vcov, change) / p,
            "covtrace": abs(np.trace(np.linalg.solve(C, one.vcov)) - p),
            "covratio": np.linalg.det(one.vcov) / np.linalg.det(C),
        }
        np.testing.assert_allclose(found.measures.loc[u], pd.Series(expected), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(found.dfbetas.loc[u], change / one.se, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.variances.loc[u], [S.item() for S in one.Sigma.values()], rtol=1e-5)


@pytest.mark.parametrize(
    ("model", "by", "name", "options"),
    [
        ("owls_slopes", "Nest", "nAGQ1", {}),  # correlated slopes
        ("epil_nbinom2", "subject", "nAGQ1", {}),  # a parameter of the family
        ("cbpp_cloglog", "herd", "nAGQ1", {"curvature": "expected"}),
        ("bacteria", "ID", "nAGQ5", {"nagq": 5}),  # quadrature
        ("singular_correlation", None, "nAGQ1", {}),  # every lane ends on a boundary
    ],
)
def test_groups_are_left_out_as_if_they_were_not_there(model, by, name, options):
    formula, table, family, link, arguments, _ = case(model)
    fit = mj.glmm(formula, table, family, link, **arguments, **options) if options else fit_of(model)
    unit = np.arange(len(table)) if by is None else pd.factorize(table[by])[0]
    units = [0, int(unit.max()) // 2, int(unit.max())]
    found = deleted(fit, unit, units, fit.nagq)
    for i, u in enumerate(units):
        one = refitted(model, unit != u, **options)
        assert one.converged
        assert abs(found.criterion[i] - one.criterion) <= 1e-8
        beta = fit.record.rows.X_basis.R_inv @ found.fixed[i]
        np.testing.assert_allclose(beta, one.fixef, rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found.theta[i], one.theta, rtol=2e-6, atol=1e-6)
        np.testing.assert_allclose(found.psi[i], one.estimates.psi, rtol=1e-6, atol=1e-6)
        assert found.singular[i] == one.is_singular
        R_inv = fit.record.rows.X_basis.R_inv
        np.testing.assert_allclose(R_inv @ found.covariance[i] @ R_inv.T, one.vcov, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{"nagq": 0}, {"reml": True}])
def test_fits_by_other_criteria_are_fitted_again_one_by_one(options):
    formula, table, family, link, arguments, _ = case("cbpp")
    fit = mj.glmm(formula, table, family, link, **arguments, **options)
    found = fit.influence("herd")
    for herd in ("1", "8"):
        one = refitted("cbpp", (table["herd"].astype(str) != herd).to_numpy(), **options)
        np.testing.assert_allclose(found.beta.loc[herd], one.fixef, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(found.theta.loc[herd], one.theta, rtol=1e-5)
        np.testing.assert_allclose(found.se.loc[herd], one.se, rtol=1e-4)
    with pytest.raises(ValueError, match="one step is of the likelihood of all parameters together"):
        fit.influence("herd", "one-step")


def test_rows_with_effects_of_their_own_are_left_out():
    """Tick counts: 403 rows, each an effect beside those of its brood and its place."""
    fit = fit_of("grouseticks")
    units = [0, 200, 402]
    found = deleted(fit, np.arange(403), units)
    for i, u in enumerate(units[:2]):
        one = refitted("grouseticks", np.arange(403) != u)
        assert abs(found.criterion[i] - one.criterion) <= 1e-8
        np.testing.assert_allclose(found.theta[i], one.theta, rtol=1e-6)
    assert found.iterations.max() <= 5


def test_many_crossed_effects_are_left_out_one_by_one(monkeypatch):
    """Beyond what lanes take."""
    fit = fit_of("salamanders_presence")
    side_by_side = deleted(fit, np.arange(644), [5, 6])
    monkeypatch.setattr(glmm_deletion, "in_lanes", lambda rows: None)
    found = deleted(fit, np.arange(644), [5, 6])
    np.testing.assert_allclose(found.fixed, side_by_side.fixed, rtol=1e-9)
    np.testing.assert_allclose(found.covariance, side_by_side.covariance, rtol=1e-7, atol=1e-9)
    np.testing.assert_array_equal(found.iterations, side_by_side.iterations)


def test_units_do_not_depend_on_their_neighbours(monkeypatch):
    """On others in their tile: to rounding of sums that are made in another order."""
    fit = fit_of("cbpp")
    whole = deleted(fit, np.arange(56), np.arange(56))
    monkeypatch.setattr(glmm_deletion, "MOST_LANES", 8)
    some = deleted(fit, np.arange(56), np.arange(56)[::-1])
    np.testing.assert_allclose(whole.fixed, some.fixed[::-1], rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(whole.criterion, some.criterion[::-1], rtol=1e-14)


def test_one_step_is_near_where_little_changes(rows_of_crossed):
    """What is left out is of second order in the influence: at most its square, in standard errors."""
    fit, exact = fit_of("salamanders_presence"), rows_of_crossed
    step = fit.influence(method="one-step")
    assert (step.result == "COMPUTED").all()
    se = fit.se.to_numpy()
    size = np.abs(exact.dfbeta / se).max(axis=1)
    error = np.abs((step.dfbeta - exact.dfbeta) / se).max(axis=1)
    assert (error <= 2.0 * size**2 + 1e-4).all()
    assert size.max() > 0.05
    assert np.corrcoef(step.cooks, exact.cooks)[0, 1] > 0.999
    # An unlikely row is missed at once: Newton's step by hand, of one row.
    record = fit.record
    u = int(exact.cooks.idxmax())
    rows = dataclasses.replace(record.rows, weights=np.where(np.arange(644) == u, 0.0, 1.0))
    p, lanes = record.rows.p, 4 + 2
    x = np.concatenate([record.rows.X_basis.R @ fit.estimates.beta, np.asarray(fit.theta)])

    def F(at):
        return criterion_at(rows, at[:p], at[p:])

    g, H = differences(F, x, lanes)
    moved = record.rows.X_basis.R_inv @ (-np.linalg.solve(H, g))[:p]
    np.testing.assert_allclose(-step.dfbeta.loc[u], moved, rtol=1e-3, atol=1e-6)


def criterion_at(rows, delta, theta):
    """Laplace's criterion at fixed effects in the basis of X and standard deviations of scalar effects."""
    model = model_of(rows)
    lambdas = [np.full((1, 1, 1), value * Z.R.item()) for value, Z in zip(theta, rows.Z_bases, strict=True)]
    nowhere, fixed = np.zeros((model.effects.n_effects, 1)), delta[:, None]
    return form_at(model, lambdas, fixed, find_modes(model, lambdas, fixed, nowhere, 1e-13)).value.item()


def differences(F, x, n):
    """Gradient and Hessian by central differences."""
    h, e = 1e-3, np.eye(n)
    up, down = (np.array([F(x + s * h * own) for own in e]) for s in (1, -1))
    H = np.empty((n, n))
    here = F(x)
    for i in range(n):
        H[i, i] = (up[i] - 2 * here + down[i]) / h**2
        for j in range(i):
            both = [F(x + h * (s * e[i] + t * e[j])) for s in (1, -1) for t in (1, -1)]
            H[i, j] = H[j, i] = (both[0] - both[1] - both[2] + both[3]) / (4 * h**2)
    return (up - down) / (2 * h), H


def test_one_step_of_groups_and_of_quadrature():
    for model, options in (("epil_nbinom2", {}), ("bacteria", {"nagq": 5})):
        formula, table, family, link, _, _ = case(model)
        fit = mj.glmm(formula, table, family, link, **options) if options else fit_of(model)
        by = "subject" if model == "epil_nbinom2" else "ID"
        step = fit.influence(by, "one-step")
        strongest = step.cooks.idxmin(), step.cooks.idxmax()
        for level in strongest:
            one = refitted(model, (table[by].astype(str) != str(level)).to_numpy(), **options)
            change = np.abs((one.fixef - fit.fixef) / fit.se).max()
            error = np.abs((step.beta.loc[level] - one.fixef) / fit.se).max()
            assert error <= 0.35 * change + 1e-3


def test_a_unit_that_alone_keeps_the_response_from_being_separated():
    """Group by group both outcomes; in the arm only one row is 1."""
    rng = np.random.default_rng(2)
    g, arm = np.repeat(np.arange(12), 10), np.tile([0, 1], 60)
    y = (rng.random(120) < 0.5).astype(float)
    y[arm == 1] = 0.0
    y[[21, 45]] = 1.0
    data = pd.DataFrame({"y": y, "arm": arm, "g": g, "pair": np.where(np.isin(np.arange(120), [21, 45]), "a", "b")})
    data.loc[data["pair"] == "b", "pair"] = [f"b{i % 4}" for i in range(118)]
    fit = mj.glmm("y ~ arm + (1 | g)", data, "binomial")
    with pytest.warns(InferenceWarning, match=r"1 of 5 deletions left no estimates \(see .result\): a"):
        found = fit.influence(data["pair"])
    assert found.result["a"] == "SEPARATED"
    assert not found.converged["a"]
    assert np.isnan(found.cooks["a"])
    assert found.beta.loc["a"].isna().all()
    assert found.converged.drop("a").all()
    assert found.counts["failed: SEPARATED"] == 1
    assert "No estimates without a (SEPARATED)" in str(found)


def test_a_unit_that_alone_determines_a_fixed_effect():
    rng = np.random.default_rng(3)
    data = pd.DataFrame({"y": rng.poisson(3.0, 60), "g": np.repeat(np.arange(10), 6), "x": rng.normal(size=60)})
    data["odd"] = (data["g"] == 4).astype(float)
    fit = mj.glmm("y ~ x + odd + (1 | g)", data, "poisson")
    with pytest.warns(InferenceWarning, match="1 of 10 deletions"):
        found = fit.influence("g")
    assert found.result["4"] == "RANK_DEFICIENT"
    assert found.converged.drop("4").all()


def test_parameters_of_the_family_stand_among_the_variances():
    fit = fit_of("epil_nbinom2")
    found = fit.influence("subject", "one-step")
    assert list(found.variances) == ["size", "var_Intercept|subject"]
    assert list(found.dispersion) == ["size"]
    np.testing.assert_allclose(found.rvc["size"], found.dispersion["size"] / fit.dispersion["size"] - 1)
    assert "rvc_size" in found.to_frame()
    with pytest.raises(ValueError, match=r"no sigma.*in \.dispersion"):
        _ = found.sigma


def test_what_is_not_there_says_so():
    fit = fit_of("cbpp")
    with pytest.raises(ValueError, match="of a generalised one method='one-step' is the quick way"):
        fit.influence(method="fixed-theta")
    with pytest.raises(ValueError, match="method must be one of"):
        influence(fit, method="approximate")
    data = pd.DataFrame({"y": np.repeat([0.0, 1.0], 20), "x": np.repeat([0.0, 1.0], 20), "g": np.tile(np.arange(8), 5)})
    with pytest.warns(mj.ConvergenceWarning):
        separated = mj.glmm("y ~ x + (1 | g)", data, "binomial")
    with pytest.raises(ValueError, match=r"no finite estimates that could change: .*separate"):
        separated.influence()


@pytest.mark.parametrize(
    ("terms", "make"),
    [
        ("(1 | a) + (1 | b)", together),
        ("(1 + x | a) + (1 | b)", together),
        ("(x || a) + (1 | b)", together),
        ("(1 | a/b)", together),
        ("(1 | a/b)", in_lanes),
        ("(1 + x | a) + (1 | a:b) + (1 | row)", in_lanes),
    ],
)
def test_effects_side_by_side_are_those_that_are_eliminated(terms, make):
    """Value, gradient, Hessian and modes of several lanes, against the other way, lane by lane."""
    rng = np.random.default_rng(4)
    n = 120
    data = {"y": rng.poisson(2.0, n), "x": rng.normal(size=n), "a": rng.integers(0, 9, n), "b": rng.integers(0, 4, n)}
    fit = mj.glmm(f"y ~ x + {terms}", data | {"row": np.arange(n)}, "poisson", check_identifiable=False)
    rows = fit.record.rows
    model = model_of(rows)
    effects = crossed(rows)
    L = 3
    weights = rng.uniform(0.2, 1.0, (n, L)) * (np.arange(n)[:, None] != [3, 77, 11])
    x = np.stack([rng.uniform(0.3, 0.9, rows.layout.k) for _ in range(L)], 1)
    x[0, 2] = 0.0  # nothing is divided by a standard deviation
    fixed = np.repeat((rows.X_basis.R @ fit.estimates.beta)[:, None], L, 1) + 0.1 * rng.normal(size=(2, L))
    side = make(rows)
    assert isinstance(side, Components) == (make is in_lanes)
    wide = Model(side, model.data._replace(weights=weights), rows.family, False)
    lambdas = cov.factors_of(x, rows.layout.structures)
    modes = find_modes(wide, lambdas, fixed, np.zeros((side.N, L)), 1e-13)
    assert modes.decrement.max() <= 1e-13
    _, _, form = probe(wide, x, fixed, modes.v)
    for i in range(L):
        lane = slice(i, i + 1)
        alone = Model(effects, model.data._replace(weights=weights[:, lane]), rows.family, False)
        nowhere = np.zeros((effects.n_effects, 1))
        own_modes = find_modes(alone, [F[..., lane] for F in lambdas], fixed[:, lane], nowhere, 1e-13)
        _, _, own = probe(alone, x[:, lane], fixed[:, lane], own_modes.v)
        for name in ("value", "gradient", "Hessian", "fisher"):
            one, other = getattr(own, name), getattr(form, name)[..., lane]
            np.testing.assert_allclose(other, one, rtol=1e-9, atol=1e-9 * np.abs(one).max())
        np.testing.assert_allclose(side.rows(modes.b)[:, lane], effects.rows(own_modes.b), rtol=1e-7, atol=1e-8)
