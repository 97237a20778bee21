"""Large crossed designs: the closed form over sparse rows against the elimination and automatic differentiation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import fit_of
from designs import Structure, random_design, random_theta
from refits import fit_at_once

import mixjax as mj
from mixjax import linalg
from mixjax.engine import incidence as lookup
from mixjax.engine.crossed import crossed_moments
from mixjax.engine.curvature import profile_lanes, value_gradient_hessian
from mixjax.engine.engine import AtOnce, Engine, engine_of
from mixjax.engine.incidence import incidence
from mixjax.estimation import estimate as estimation
from mixjax.fitted.information import information
from mixjax.products import sizes
from mixjax.products.sums import pad

STRUCTURES = {
    "intercepts": Structure(((1, 90, "free"), (1, 70, "free"))),
    "slopes on both": Structure(((2, 60, "free"), (2, 40, "free")), weights=True),
    "with a parent": Structure(((1, 100, "free"), (1, 80, "free"), (1, 6, "grandparent"))),
    "three effects a level": Structure(((3, 80, "free"), (1, 70, "free"))),
}
ROWS = 400


def ways(monkeypatch, how):
    """Sums by the list of pairs alone, by dense blocks alone, or by both."""
    chosen = {"list": lambda n: n >= 0, "blocks": lambda n: n < 0, "both": lambda n: np.arange(len(n)) % 2 == 0}[how]
    monkeypatch.setattr(lookup, "_worth_a_list", lambda per_level, cost: chosen(per_level))


@jax.jit
def by_differentiation(theta, stats, reml):
    def objective(x):
        return Engine(stats, reml).profiled(x).criterion

    return objective(theta), jax.grad(objective)(theta), jax.hessian(objective)(theta)


@jax.jit
def closed_form(theta, stats, where, reml):
    moments = crossed_moments(stats, where)
    x = theta[:, None]
    return *value_gradient_hessian(x, moments, reml), profile_lanes(x, moments, reml).criterion


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(("name", "how"), [*((name, "both") for name in STRUCTURES), ("intercepts", "list"),
                                          ("slopes on both", "blocks")])  # fmt: skip
def test_against_automatic_differentiation(name, how, monkeypatch):
    ways(monkeypatch, how)
    structure = STRUCTURES[name]
    stats = jax.tree.map(jnp.asarray, pad(mj.cross_products(random_design(structure, 0, n=ROWS))))
    where = incidence(stats)
    assert (where.pairs is None, where.blocks is None) == (how == "blocks", how == "list")
    regular, zero = random_theta(structure, 0), random_theta(structure, 1)
    zero[-1] = 0.0  # a dense factor without variance: products of matrices instead of its inverse
    for theta, reml in ((regular, True), (zero, False)):
        f, g, H = by_differentiation(theta, stats, reml)
        f2, g2, H2, f3 = closed_form(theta, stats, where, reml)
        np.testing.assert_allclose([f2[0], f3[0]], f, rtol=1e-12)
        np.testing.assert_allclose(g2[:, 0], g, rtol=1e-9, atol=1e-11 * np.abs(H).max())
        np.testing.assert_allclose(H2[..., 0], H, rtol=1e-9, atol=1e-11 * np.abs(H).max())
        numbers = jax.tree.map(np.asarray, stats)
        engine = AtOnce(numbers, reml, incidence(numbers, at_once=True))
        at_once = engine.run(AtOnce.evaluate, theta[:, None])
        for numpys, xlas in zip(at_once, (f2, g2, H2), strict=True):
            assert isinstance(numpys, np.ndarray)
            np.testing.assert_allclose(numpys, xlas, rtol=1e-10, atol=1e-12 * np.abs(xlas).max())


@pytest.mark.parametrize("name", ["intercepts", "slopes on both"])
def test_a_large_crossed_fit_and_inference_on_it_compile_nothing(name, monkeypatch):
    """And are those of the compiled program, which differentiates the elimination."""
    monkeypatch.setattr(sizes, "MOST_DENSE_AT_ONCE", 0)
    structure = STRUCTURES[name]
    stats = mj.cross_products(random_design(structure, 1, n=ROWS))
    at_once, engine = engine_of(stats, True), engine_of(stats, True, at_once=False)
    assert isinstance(at_once, AtOnce)
    assert engine.where is not None
    est, same = at_once.run(estimation.fit, None), engine.run(estimation.fit, None)
    theta = est.theta
    np.testing.assert_allclose(est.criterion, same.criterion, rtol=1e-12)
    np.testing.assert_allclose(theta, same.theta, rtol=1e-7, atol=1e-9)
    for ours, theirs in zip(est.b, same.b, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-8 * np.abs(theirs).max())
    for ours, theirs in zip(at_once.run(information, theta, 1.3), engine.run(information, theta, 1.3), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-10 * np.abs(theirs).max())
    solved, compiled = (e.run(type(e).solution, e.coordinates(theta)[0]) for e in (at_once, engine))
    for ours, theirs in zip(jax.tree.leaves(solved), jax.tree.leaves(compiled), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12 * np.abs(theirs).max())


@pytest.mark.usefixtures("x64")
def test_estimates_equal_those_of_the_elimination(monkeypatch):
    design = random_design(STRUCTURES["slopes on both"], 3, n=ROWS)
    stats = mj.cross_products(design)
    est = mj.estimate(stats)
    monkeypatch.setattr(estimation, "incidence", lambda stats: None)
    other = mj.estimate(stats)
    assert bool(est.converged)
    np.testing.assert_allclose(est.criterion, other.criterion, rtol=1e-12)
    for ours, theirs in zip(jax.tree.leaves(est[:6]), jax.tree.leaves(other[:6]), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", ["penicillin", "singular_crossed_zero"])
@pytest.mark.parametrize("method", ["REML", "ML"])
def test_small_designs_fit_the_same_by_sparse_rows(name, method, monkeypatch):
    """The crossed oracle models that are small enough to go the other way (InstEval's are not)."""
    fit = fit_of(name, method)
    monkeypatch.setattr(lookup, "FEW_PRODUCTS", 0)
    stats = pad(fit.stats)
    assert incidence(stats) is not None
    est = mj.estimate(stats, reml=method == "REML")
    np.testing.assert_allclose(est.criterion, fit.criterion, rtol=1e-11)
    np.testing.assert_allclose(est.theta, fit.theta, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(est.beta, fit.fixef, rtol=1e-8)
    assert bool(est.singular) == fit.is_singular


@pytest.mark.usefixtures("x64")
def test_derivatives_through_the_fit_against_refits():
    """Both modes, with respect to y, through the sparse rows."""
    design = random_design(STRUCTURES["intercepts"], 2, n=ROWS)
    rng = np.random.default_rng(0)
    y = design.y + sum((t.Z * rng.normal(size=(t.n_groups, 1))[t.group]).sum(1) for t in design.terms)
    where = incidence(mj.cross_products(design))
    assert where is not None

    names = ("theta", "beta", "sigma", "b")

    def fit(y):
        est = mj.estimate(mj.cross_products(replace(design, y=y)))
        return {name: getattr(est, name) for name in names}

    @jax.jit
    def derivatives(y, direction):
        """Forward along the direction, and backward from the sum of theta and one effect."""
        value, along = jax.linearize(fit, y)
        weigh = jax.tree.map(jnp.zeros_like, value)
        weigh |= {"theta": jnp.ones_like(value["theta"]), "b": (weigh["b"][0].at[3, 0].set(1.0), *weigh["b"][1:])}
        return along(direction), jax.linear_transpose(along, y)(weigh)[0]

    direction = rng.normal(size=len(y))
    moved, gradient = derivatives(y, direction)
    h = 1e-5
    # By NumPy, which does not know of sparse rows.
    ahead, behind = (
        fit_at_once(mj.cross_products(replace(design, y=y + s * h * direction)), None, True) for s in (1, -1)
    )
    for name in names:
        for t, u, v in zip(
            *map(jax.tree.leaves, (moved[name], getattr(ahead, name), getattr(behind, name))), strict=True
        ):
            numeric = (u - v) / (2 * h)
            np.testing.assert_allclose(t, numeric, rtol=1e-5, atol=1e-6 * np.abs(numeric).max())
    np.testing.assert_allclose(gradient @ direction, moved["theta"].sum() + moved["b"][0][3, 0], rtol=1e-9)


@pytest.mark.usefixtures("x64")
def test_many_responses_share_the_incidence():
    design = random_design(STRUCTURES["intercepts"], 2, n=ROWS)
    Y = np.stack([design.y, 3 * (design.y - design.offset) + 1 + design.offset, np.full(ROWS, np.nan)])
    fits = mj.estimate_many(mj.cross_products(design, Y), keep=("theta", "criterion", "result", "b"))
    one = mj.estimate(mj.cross_products(design))
    assert fits.vcov is None
    assert list(fits.result == int(mj.Result.NOT_FINITE)) == [False, False, True]
    np.testing.assert_allclose(fits.theta[0], one.theta, rtol=1e-9, atol=1e-10)
    np.testing.assert_allclose(fits.criterion[0], one.criterion, rtol=1e-12)
    np.testing.assert_allclose(fits.b[0][0], one.b[0], rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(fits.theta[1], fits.theta[0], rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("x64")
def test_padding_and_row_order_change_nothing():
    design = random_design(STRUCTURES["with a parent"], 1, n=ROWS)
    order = np.random.default_rng(0).permutation(ROWS)
    shuffled = replace(
        design, y=design.y[order], X=design.X[order], offset=design.offset[order],
        terms=tuple(replace(t, Z=t.Z[order], group=t.group[order]) for t in design.terms),
    )  # fmt: skip
    stats = [mj.cross_products(design), pad(mj.cross_products(design)), mj.cross_products(shuffled)]
    fits = [mj.estimate(each) for each in stats]
    for fit in fits[1:]:
        np.testing.assert_allclose(fit.criterion, fits[0].criterion, rtol=1e-12)
        np.testing.assert_allclose(fit.theta, fits[0].theta, rtol=1e-7, atol=1e-8)


@pytest.mark.usefixtures("x64")
def test_inverse_by_halves(monkeypatch):
    """Ill-conditioned too: as good as by a Cholesky factor."""
    monkeypatch.setattr(linalg, "BY_HALVES", 7)
    rng = np.random.default_rng(0)
    F = rng.normal(size=(41, 41)) * np.logspace(0, 4, 41)
    M = np.eye(41) + F.T @ F
    inverse, logdet = linalg.inverse_logdet(jnp.asarray(M))
    expected = np.linalg.inv(M)
    scale = 1 / np.sqrt(np.diag(expected))
    np.testing.assert_allclose(scale[:, None] * inverse * scale, scale[:, None] * expected * scale, atol=1e-8)
    np.testing.assert_allclose(logdet, np.linalg.slogdet(M)[1], rtol=1e-13)


@pytest.mark.usefixtures("x64")
def test_a_dense_block_beyond_memory_is_refused(monkeypatch):
    monkeypatch.setattr(lookup, "_memory", lambda: 1e5)
    design = random_design(STRUCTURES["intercepts"], 0, n=ROWS)
    with pytest.raises(MemoryError, match=r"70 levels.*72 x 72.*gpboost"):
        mj.estimate(mj.cross_products(design))


def test_insteval_takes_few_evaluations():
    fit = fit_of("insteval", "REML")
    assert fit.optimizer.iterations <= 12
    assert abs(fit.criterion - 237661.53572) < 1e-3
