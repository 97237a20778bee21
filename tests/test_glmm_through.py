"""Derivatives of estimates of generalised linear mixed models with respect to the data, through the fit, against refits
by NumPy; and those of the likelihood."""

from dataclasses import replace
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from designs import Structure, random_design

import mixjax as mj
from mixjax.engine.laplace_fit import evaluate, nothing_known
from mixjax.estimation.glmm import model_of
from mixjax.estimation.glmm_start import fixed_start
from mixjax.machine import silently

pytestmark = pytest.mark.usefixtures("x64")
# Central differences err by STEP^2 times a third derivative. The last Newton step of a fit squares its error, so that
# refits are good to about 1e-12 of the estimates and differences of them to 1e-7; 1e-5 leaves room for curvature.
STEP, SAME = 1e-5, 1e-5
FIELDS = ("theta", "beta", "psi", "Sigma", "b", "eta", "criterion")

MODELS = {
    "one factor": (Structure(((2, 8, "free"),), weights=True), "binomial", "observed"),
    "nested": (Structure(((1, 10, "free"), (1, 4, "parent"))), "gamma", "expected"),
    "crossed": (Structure(((1, 8, "free"), (1, 5, "free"))), "poisson", "observed"),
}


@cache
def design_of(name, sd=1.0, seed=1):
    """Rows whose random effects have so large standard deviations."""
    structure, family, _ = MODELS[name]
    design = random_design(structure, 2, n=60)
    rng = np.random.default_rng(seed)
    eta = 0.5 + 0.3 * design.X[:, 1] + 0.2 * design.offset
    for term in design.terms:
        effects = sd * rng.normal(size=(term.n_groups, term.Z.shape[1])) / np.sqrt((term.Z**2).mean(0))
        eta = eta + (term.Z * effects[term.group]).sum(1)
    size = rng.integers(3, 8, len(eta)).astype(float) if family == "binomial" else None
    y = {
        "binomial": lambda: rng.binomial(size.astype(int), 1 / (1 + np.exp(-eta))).astype(float),
        "poisson": lambda: rng.poisson(np.exp(eta)).astype(float),
        "gamma": lambda: rng.gamma(3.0, np.exp(eta) / 3.0),
    }[family]()
    weights = np.ones(len(eta)) if design.weights is None else design.weights
    return replace(design, y=y, size=size, weights=weights, offset=0.2 * design.offset)


def point_of(design):
    return design.y, design.X, design.terms[0].Z, design.offset, design.weights


def estimates(name, design, arrays):
    y, X, Z, offset, weights = arrays
    terms = (replace(design.terms[0], Z=Z), *design.terms[1:])
    moved = replace(design, y=y, X=X, terms=terms, offset=offset, weights=weights)
    _, family, curvature = MODELS[name]
    family = mj.families.gamma("log") if family == "gamma" else family
    return mj.glmm_estimate(mj.rows(moved, family), curvature=curvature)


def some(est):
    return {field: getattr(est, field) for field in FIELDS}


@cache
def derivatives_of(name):
    """Outputs, their derivative along a direction, and the transpose of that, as one program."""
    design = design_of(name)

    def derivatives(point, direction, weigh):
        value, along = jax.linearize(lambda *arrays: some(estimates(name, design, arrays)), *point)
        return value, along(*direction), jax.linear_transpose(along, *point)(weigh)

    return jax.jit(derivatives)


def assert_slope(tangent, ahead, behind, what=""):
    numeric = (np.asarray(ahead) - np.asarray(behind)) / (2 * STEP)
    np.testing.assert_allclose(
        tangent, numeric, rtol=SAME, atol=SAME * np.abs(numeric).max(initial=0.0) + 1e-7, err_msg=what
    )


@pytest.mark.parametrize("kind", ["regular", "singular"])
@pytest.mark.parametrize("name", MODELS)
def test_against_refits(name, kind):
    design = replace(design_of(name), y=response_of(name, kind))
    point, rng = point_of(design), np.random.default_rng(2)
    direction = tuple(rng.normal(size=a.shape) * (0.3 if i else 0.1) for i, a in enumerate(point))
    here = estimates(name, design, point)
    assert here.converged
    assert (here.theta == 0).any() == bool(here.singular) == (kind == "singular")
    weigh = jax.tree.map(lambda a: rng.normal(size=np.shape(a)), some(here))
    value, tangent, pulled = derivatives_of(name)(point, direction, weigh)
    for key, expected in some(here).items():
        for a, b in zip(jax.tree.leaves(value[key]), jax.tree.leaves(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
    np.testing.assert_array_equal(np.asarray(tangent["theta"])[here.theta == 0], 0.0)
    ahead, behind = (
        some(estimates(name, design, tuple(a + s * STEP * d for a, d in zip(point, direction, strict=True))))
        for s in (1, -1)
    )
    for key in value:
        for parts in zip(*map(jax.tree.leaves, (tangent[key], ahead[key], behind[key])), strict=True):
            assert_slope(*parts, key)
    # Reverse mode is the transpose of forward mode.
    left = sum((np.asarray(g) * d).sum() for g, d in zip(pulled, direction, strict=True))
    pairs = zip(jax.tree.leaves(tangent), jax.tree.leaves(weigh), strict=True)
    np.testing.assert_allclose(left, sum((np.asarray(t) * w).sum() for t, w in pairs), rtol=1e-9)


@cache
def response_of(name, kind):
    """The first of rows with and without random effects whose fit is regular or singular."""
    for seed in range(1, 30):
        design = design_of(name, sd=1.0 if kind == "regular" else 0.0, seed=seed)
        # Trials are those of all responses.
        size = design_of(name).size
        design = design if size is None else replace(design, y=np.minimum(design.y, size), size=size)
        est = estimates(name, design, point_of(design))
        if est.result == mj.Result.CONVERGED and bool(est.singular) == (kind == "singular"):
            return design.y
    raise AssertionError(f"no {kind} fit")


# --- one small model ---------------------------------------------------------------------------------------------


@cache
def small():
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(6), 4)
    X = np.column_stack([np.ones(24), rng.normal(size=24)])
    y = rng.poisson(np.exp(1.0 + 0.3 * X[:, 1] + 0.7 * rng.normal(size=6)[group])).astype(float)
    term = mj.RandomTerm(Z=np.ones((24, 1)), group=group, n_groups=6)
    return mj.Design(y=y, X=X, terms=(term,), offset=0.1 * rng.normal(size=24))


def fit(y=None, offset=None, design=None):
    design = design or small()
    offset = design.offset if offset is None else offset
    return mj.glmm_estimate(mj.rows(replace(design, y=design.y if y is None else y, offset=offset), "poisson"))


def test_covariances_move_as_refits_say():
    offset = small().offset
    along = np.random.default_rng(1).normal(size=24)
    both = lambda offset: (fit(offset=offset).vcov, fit(offset=offset).vcov_all)  # noqa: E731
    value, tangent = jax.jit(lambda o: jax.jvp(both, (o,), (along,)))(offset)
    for a, b in zip(value, both(offset), strict=True):
        np.testing.assert_array_equal(a, b)  # NumPy's own numbers
    for parts in zip(tangent, both(offset + STEP * along), both(offset - STEP * along), strict=True):
        assert_slope(*parts)


def test_second_derivative():
    """Differences of step h: ``h^2`` and ``1e-12 / h^2``."""
    along, h = np.random.default_rng(1).normal(size=24), 1e-3
    sd = lambda s: fit(small().y + s * along).theta[0]  # noqa: E731
    behind, here, ahead = (sd(s) for s in (-h, 0.0, h))
    np.testing.assert_allclose(jax.jit(jax.hessian(sd))(0.0), (ahead - 2 * here + behind) / h**2, rtol=1e-4)


def test_vmap_over_responses_is_a_loop_and_one_program():
    Y = np.random.default_rng(3).poisson(3.0, (4, 24)).astype(float)
    Y[0] = small().y
    traced = []

    def of_y(y):
        traced.append(y)
        return fit(y)

    many = jax.jit(jax.vmap(of_y))
    batch = many(Y)
    again = many(Y[::-1].copy())
    assert len(traced) == 1
    for i, y in enumerate(Y):
        one = fit(y)
        for est in (jax.tree.map(lambda a, i=i: a[i], batch), jax.tree.map(lambda a, i=i: a[3 - i], again)):
            for name, a, b in zip(one._fields, est, one, strict=True):
                for u, v in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
                    np.testing.assert_allclose(u, v, rtol=1e-10, atol=1e-12, err_msg=name)
    assert jnp.ndim(batch.result) == 1
    assert batch.theta.dtype == np.float64


def on_the_kink():
    """A response, as real numbers, in whose fit the variance zero has no slope: the smallest change can free it."""
    design = small()
    fitted = replace(design, X=design.X[:, :1], offset=None)
    between = np.random.default_rng(2).normal(size=6)[design.terms[0].group]
    within = np.random.default_rng(4).poisson(4.0, 24).astype(float)
    level = np.bincount(design.terms[0].group, within) / 4
    within = within - level[design.terms[0].group] + 9.0  # the same mean in every level

    def slope(s):
        model = model_of(mj.rows(replace(fitted, y=within + s * between), "poisson"))
        at = evaluate(model, np.zeros((1, 1)), nothing_known(model, fixed_start(model, 1)), 1e-13, 1e-18)
        return at.form.gradient[-1, 0]

    with silently():
        s = scipy.optimize.brentq(slope, 0.0, 4.0, xtol=1e-15)
    return replace(fitted, y=within + s * between)


def separated():
    """A column whose rows are all without events, in all levels."""
    design = small()
    X = np.column_stack([np.ones(24), np.tile([0.0, 0.0, 1.0, 1.0], 6)])
    return replace(design, y=np.where(X[:, 1] > 0, 0.0, design.y), X=X)


def moved_all(design, y):
    """Estimates and how they move when all counts grow."""

    def outputs(y):
        est = fit(y, design=design)
        return some(est), est.result

    (value, code), (tangent, _) = jax.jit(lambda y: jax.jvp(outputs, (y,), (np.ones(24),)))(y)
    return value, int(code), tangent


@pytest.mark.parametrize(
    ("make", "codes"),
    [(on_the_kink, {mj.Result.NONDIFFERENTIABLE}), (separated, {mj.Result.SEPARATED, mj.Result.UNBOUNDED})],
)
def test_where_there_are_no_derivatives_they_are_nan(make, codes):
    design = make()
    value, found, tangent = moved_all(design, design.y)
    assert found == fit(design=design).result
    assert found in codes
    np.testing.assert_allclose(value["theta"], fit(design=design).theta, atol=1e-12)
    for key in ("theta", "beta", "criterion"):
        assert np.isnan(tangent[key]).all(), key


def test_what_is_not_a_number_is_not_searched():
    """It cannot be refused where arrays are traced: the code says so, beside lanes that have numbers."""
    Y = np.stack([small().y, np.where(np.arange(24) == 3, np.nan, small().y)])
    batch = jax.jit(jax.vmap(fit))(Y)
    np.testing.assert_array_equal(batch.result, [mj.Result.CONVERGED, mj.Result.NOT_FINITE])
    np.testing.assert_array_equal(batch.converged, [True, False])
    np.testing.assert_allclose(batch.beta[0], fit().beta, rtol=1e-12)
    for field in ("theta", "beta", "vcov", "b", "criterion"):
        assert np.isnan(jax.tree.leaves(getattr(batch, field))[0][1]).all(), field


def test_single_precision_is_refused_and_single_numbers_are_not():
    y = small().y.astype(np.float32)
    with jax.enable_x64(False), pytest.raises(ValueError, match=r"needs 64 bits.*enable_x64"):
        jax.jit(lambda y: fit(y).beta)(y)
    beta = jax.jit(lambda y: fit(y).beta)(y)  # counts are exact in 24 bits
    assert beta.dtype == np.float64
    np.testing.assert_allclose(beta, fit().beta, rtol=1e-12)


# --- the likelihood ----------------------------------------------------------------------------------------------


def test_gradient_of_the_likelihood_by_the_data():
    """y, X, Z, offset; differences of a sum of some hundred are good to 1e-13 / STEP."""
    design = replace(design_of("one factor"), weights=None)
    params = mj.GLMMParams(np.array([0.3, -0.2]), (np.array([-0.3, 0.2, -0.5]),))

    def loglik(y, X, Z, offset):
        terms = (replace(design.terms[0], Z=Z),)
        return mj.glmm_loglik(params, mj.rows(replace(design, y=y, X=X, terms=terms, offset=offset), "binomial"))

    point = point_of(design)[:4]
    gradient = jax.jit(jax.grad(loglik, argnums=(0, 1, 2, 3)))(*point)
    rng = np.random.default_rng(0)
    for i, (array, own) in enumerate(zip(point, gradient, strict=True)):
        along = rng.normal(size=array.shape)
        ahead, behind = (
            float(loglik(*(a + s * STEP * along if j == i else a for j, a in enumerate(point)))) for s in (1, -1)
        )
        np.testing.assert_allclose((own * along).sum(), (ahead - behind) / (2 * STEP), rtol=1e-6, atol=1e-6)
