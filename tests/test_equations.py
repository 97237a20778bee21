"""The mixed-model equations of one fit: against dense textbook formulas and against automatic differentiation; and
what a fit says compiles nothing."""

from dataclasses import replace
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from dense import covariance
from designs import STRUCTURES, random_design, random_lambdas

import mixjax as mj
from mixjax.bases import Basis
from mixjax.covariance import Diagonal, HomogeneousCompoundSymmetry, Unstructured, lambdas_of_theta, triangle
from mixjax.diagnostics.deletion import batches
from mixjax.diagnostics.residuals import SCALES
from mixjax.diagnostics.sensitivity import _at_once, _contract, _jacobian, _slopes
from mixjax.engine.criterion import in_bases
from mixjax.engine.engine import AtOnce, engine_of
from mixjax.engine.equations import Equations, by_factor
from mixjax.engine.modes import conditional_covariances
from mixjax.estimation.estimate import fit
from mixjax.estimation.many import KEEP
from mixjax.estimation.steps import newton_steps
from mixjax.fitted.record import Fitted
from mixjax.products.sums import Layout, TermPlace, stack

pytestmark = pytest.mark.usefixtures("x64")
WAYS = {"dense": {}, "sparse": {"most_crossed": 0}, "factorised": {"most_dense": 0}}


def close(actual, desired, rtol=1e-9, atol=0.0):
    np.testing.assert_allclose(np.asarray(actual, float), np.asarray(desired, float), rtol=rtol, atol=atol)


def factors_of(design):
    """Terms of every grouping factor."""
    found = {}
    for t, term in enumerate(design.terms):
        found.setdefault(term.group.tobytes(), []).append(t)
    return list(found.values())


def record(design, reml):
    """A fit that has gone a little past its minimum, of a response that every term has a part in."""
    rng = np.random.default_rng(7)
    effects = [rng.normal(0, 2, (term.n_groups, term.Z.shape[1]))[term.group] for term in design.terms]
    y = design.y + sum((term.Z * b).sum(1) for term, b in zip(design.terms, effects, strict=True))
    design = replace(design, y=y)
    stats = mj.cross_products(design)
    found = AtOnce(stats, reml).run(fit)
    return Fitted(None, stats, found._replace(theta=1.03 * found.theta), reml, None, design)


def dense_conditional_covariances(design, lambdas):
    """``D - D Z'H^{-1}Z D`` among the effects of every level, per grouping factor ``(levels, w, w)``."""
    H = covariance(design, [L @ L.T for L in lambdas], 1.0)
    found = []
    for ts in factors_of(design):
        own = [lambdas[t] @ lambdas[t].T for t in ts]
        D = np.zeros((sum(map(len, own)),) * 2)
        start = 0
        for block in own:
            D[start : start + len(block), start : start + len(block)] = block
            start += len(block)
        Z, group = np.hstack([design.terms[t].Z for t in ts]), design.terms[ts[0]].group
        levels = []
        for level in range(design.terms[ts[0]].n_groups):
            DZ = D @ (Z * (group == level)[:, None]).T
            levels.append(D - DZ @ np.linalg.solve(H, DZ.T))
        found.append(np.stack(levels))
    return found


@pytest.mark.parametrize("singular", [False, True])
@pytest.mark.parametrize("name", STRUCTURES)
def test_conditional_covariances(name, singular):
    design = random_design(STRUCTURES[name], 4)
    stats, lambdas = mj.cross_products(design), random_lambdas(design, 5, singular)
    expected = dense_conditional_covariances(design, lambdas)
    own = in_bases(lambdas, stats)
    for found, dense in zip(conditional_covariances(lambdas, stats), expected, strict=True):
        close(np.moveaxis(found, -1, 0), dense, 1e-9, 1e-12 * np.abs(dense).max())
    differentiated = jax.jit(conditional_covariances)([jnp.asarray(F) for F in lambdas], stats)
    for found, other in zip(conditional_covariances(lambdas, stats), differentiated, strict=True):
        assert isinstance(found, np.ndarray)
        close(found, other, 1e-9, 1e-12 * np.abs(found).max())
    first = Equations(stats, by_factor(own, stats.layout)).covariances()
    for options in WAYS.values():
        for found, other in zip(
            Equations(stats, by_factor(own, stats.layout), **options).covariances(), first, strict=True
        ):
            close(found, other, 1e-10, 1e-13 * np.abs(other).max())


# --- derivatives by case weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("name", STRUCTURES)
def test_case_slopes_are_those_of_automatic_differentiation(name, reml):
    """Beside the minimum too: derivatives of a gradient that is not zero, by the formulas of a minimum."""
    fitted = record(random_design(STRUCTURES[name], 6), reml)
    rows = fitted.rows
    theta = fitted.estimates.theta
    x, regular, found = AtOnce(rows.stats, reml).run(_at_once, theta, rows)
    x2, _, slopes = engine_of(rows.stats, reml, at_once=False).run(_slopes, theta)
    close(x, x2, 1e-12)
    assert regular
    expected = _contract(rows.padded(), slopes)
    size = np.abs(expected).max(axis=0) + (expected == 0).all(axis=0)
    close(found / size, expected / size, 0.0, 1e-9)


@pytest.mark.parametrize("name", ["one factor, q=2, weights", "crossed"])
def test_without_fixed_effects(name):
    design = random_design(STRUCTURES[name], 6)
    fitted = record(replace(design, X=design.X[:, :0]), True)
    rows = fitted.rows
    lambdas = lambdas_of_theta(fitted.estimates.theta, fitted.stats.layout.qs)
    expected = dense_conditional_covariances(fitted.design, lambdas)
    for covariances, dense in zip(conditional_covariances(lambdas, fitted.stats), expected, strict=True):
        close(np.moveaxis(covariances, -1, 0), dense, 1e-9, 1e-12 * np.abs(dense).max())
    theta = fitted.estimates.theta
    expected = _contract(rows.padded(), engine_of(rows.stats, True, at_once=False).run(_slopes, theta)[2])
    found = AtOnce(rows.stats, True).run(_at_once, theta, rows)[2]
    close(found / np.abs(expected).max(axis=0), expected / np.abs(expected).max(axis=0), 0.0, 1e-9)
    deleted, stats = next(iter(batches(rows, np.arange(rows.n) // 8)))
    found = mj.estimate_many(stats, engine="numpy")
    for i in range(len(deleted)):
        one = AtOnce(jax.tree.map(lambda a, i=i: np.asarray(a)[i], stats), True).run(fit)
        close(found.criterion[i], one.criterion, 1e-10)


@pytest.mark.parametrize("scale", ["sdcor", "vcov", "theta"])
@pytest.mark.parametrize("structure", [Unstructured(3), Diagonal(3), HomogeneousCompoundSymmetry(3)])
def test_slopes_of_variances_are_those_of_automatic_differentiation(scale, structure):
    rng = np.random.default_rng(2)
    basis = Basis(*(rng.normal(size=(3, 3)) if structure == Unstructured(3) else np.eye(3) for _ in "ab"), 0.0)
    basis = basis._replace(R_inv=np.linalg.inv(basis.R))
    x, layout = rng.normal(size=structure.k), Layout((TermPlace(structure, 0, 0),), (0,), (), ())
    stats = SimpleNamespace(layout=layout, Z_bases=(basis,))

    def variances(at):
        x, sigma = at[:-1], at[-1]
        own = basis.R_inv @ structure.factor(x)
        D = own @ own.T
        rows, columns = triangle(3)
        sd = jnp.sqrt(jnp.diagonal(D))
        if scale == "theta":
            values = jnp.linalg.cholesky(D)[rows, columns]
        elif scale == "vcov":
            values = sigma**2 * D[rows, columns]
        else:
            values = jnp.where(rows == columns, sigma * sd[rows], D[rows, columns] / (sd[rows] * sd[columns]))
        return jnp.append(values, sigma**2 if scale == "vcov" else sigma)

    close(_jacobian(x, 1.7, stats, scale), jax.jacfwd(variances)(jnp.append(x, 1.7)), 1e-9, 1e-11)


# --- many data sets side by side --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("name", STRUCTURES)
def test_fits_side_by_side_are_single_fits(name, reml):
    rows = record(random_design(STRUCTURES[name], 8), reml).rows
    unit = np.arange(rows.n) // 4
    deleted, stats = next(iter(batches(rows, unit)))
    found = mj.estimate_many(stats, reml, keep=(*KEEP, "Sigma", "vcov"), engine="numpy")
    assert found.converged.all()
    lower = 0
    for i in range(len(deleted)):
        one = AtOnce(jax.tree.map(lambda a, i=i: np.asarray(a)[i], stats), reml).run(fit)
        if found.criterion[i] < one.criterion - 1e-6:  # direct steps may reach another minimum
            lower += 1
            continue
        assert bool(one.singular) == found.singular[i]
        for what in ("criterion", "sigma", "beta", "vcov", "theta"):
            expected = np.asarray(getattr(one, what))
            close(getattr(found, what)[i], expected, 1e-9, 1e-7 * np.abs(expected).max(initial=1e-3))
        for Sigma, expected in zip(found.Sigma, one.Sigma, strict=True):
            close(Sigma[i], expected, 1e-9, 1e-7 * np.abs(expected).max())
    assert 4 * lower < len(deleted)


@pytest.mark.parametrize("name", STRUCTURES)
def test_steps_side_by_side_are_those_of_the_compiled_program(name):
    fitted = record(random_design(STRUCTURES[name], 8), True)
    rows = fitted.rows
    _, stats = next(iter(batches(rows, np.arange(rows.n) // 8)))
    found, sound = newton_steps(stats, fitted.estimates.theta, True, "numpy")
    expected, also = newton_steps(stats, fitted.estimates.theta, True, "jax")
    np.testing.assert_array_equal(sound, also)
    for what in ("theta", "sigma", "beta", "vcov", "singular"):
        own, other = (np.asarray(getattr(est, what), float)[sound] for est in (found, expected))
        close(own, other, 1e-9, 1e-9 * np.abs(other).max(initial=1e-3))


def test_data_sets_of_different_pairs_of_levels_go_one_by_one():
    design = random_design(STRUCTURES["crossed"], 8)
    parts = [
        replace(design, terms=(design.terms[0], replace(design.terms[1], group=np.roll(design.terms[1].group, k))))
        for k in range(3)
    ]
    found = mj.estimate_many(stack([mj.cross_products(part) for part in parts]), engine="numpy")
    for i, part in enumerate(parts):
        close(found.criterion[i], AtOnce(mj.cross_products(part), True).run(fit).criterion, 1e-10)


# --- nothing is compiled ----------------------------------------------------------------------------------------------

MODELS = {
    "sleepstudy": "Reaction ~ Days + (Days | Subject)",
    "cake": "angle ~ recipe * temperature + (1 | recipe:replicate)",
    "Penicillin": "diameter ~ 1 + (1 | plate) + (1 | sample)",
    "Pastes": "strength ~ 1 + (1 | batch/cask)",
    "Machines": "score ~ Machine + (Machine | Worker)",
}
CALLS = {
    "ranef": lambda fit: fit.ranef(condvar=True),
    "coef": lambda fit: fit.coef(),
    "Lambda, Sigma, varcorr": lambda fit: (fit.Lambda, fit.Sigma, str(fit.varcorr)),
    "summary": lambda fit: (str(fit.summary()), fit.tidy(), fit.glance()),
    "predict": lambda fit: fit.predict(fit.labels.frame),
    "predict, henderson": lambda fit: fit.predict(fit.labels.frame, interval="prediction"),
    "predict, second-order": lambda fit: fit.predict(interval="confidence", method="second-order"),
    "residuals": lambda fit: [fit.residuals(kind, scale) for kind, scales in SCALES.items() for scale in scales],
    "leverage": lambda fit: fit.leverage(),
    "augment": lambda fit: fit.augment(),
    "shrinkage": lambda fit: fit.shrinkage(),
    "sensitivity": lambda fit: [fit.sensitivity(scale) for scale in ("sdcor", "vcov", "theta")],
    "influence, exact": lambda fit: fit.influence(fit.labels.terms[-1].group).to_frame(),
    "influence, one-step": lambda fit: fit.influence(method="one-step").to_frame(),
    "influence, fixed-theta": lambda fit: fit.influence(method="fixed-theta").to_frame(),
}


@pytest.fixture
def compiled():
    """How many programs have been compiled since the test began."""
    names = []

    def note(name, *_, **__):
        if "backend_compile" in name:
            names.append(name)

    jax.clear_caches()  # what another test has compiled would not be counted
    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def test_what_counts_programs_sees_one(compiled):
    jax.jit(lambda x: x + 1)(np.ones(3))
    assert compiled


@pytest.mark.parametrize("name", MODELS)
def test_what_a_fit_says_compiles_nothing(name, compiled):
    fit = mj.lmm(MODELS[name], mj.datasets.load(name))
    found = {}
    for call, of in CALLS.items():
        del compiled[:]
        of(fit)
        found[call] = len(compiled)
    assert not any(found.values()), found
