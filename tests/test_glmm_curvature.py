"""The closed form of Laplace's approximation against automatic differentiation of the likelihood itself."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from designs import Structure, random_design

import mixjax as mj
from mixjax import covariance as cov
from mixjax.engine import level_effects
from mixjax.engine.laplace import Point, objective
from mixjax.engine.laplace_fit import INNER_LAST, chain, find_modes, form_at, joint_Hessian
from mixjax.engine.laplace_model import columns_of
from mixjax.engine.level_effects import filled
from mixjax.engine.level_moments import moment_form
from mixjax.estimation.glmm import model_of
from mixjax.machine import jit, silently

pytestmark = pytest.mark.usefixtures("x64")
N = 24
# Both sides are sums of some hundred products of numbers of order one, and inverses of well-conditioned matrices: of
# sixteen digits three or four are lost. Modes are found to 1e-13 of a deviance before their last step.
SAME = 1e-10

DESIGNS = {
    "q=1": Structure(((1, 6, "free"),)),
    "q=2, weights": Structure(((2, 6, "free"),), weights=True),
    "q=3": Structure(((3, 5, "free"),)),
    "diag": Structure(((2, 6, "free"),)),
    "homcs": Structure(((3, 5, "free"),)),
    "two terms on a factor": Structure(((1, 6, "free"), (1, 6, "same"))),
    "nested": Structure(((1, 8, "free"), (1, 3, "parent"))),
    "crossed": Structure(((1, 6, "free"), (1, 4, "free"))),
    "crossed, slopes": Structure(((2, 6, "free"), (1, 4, "free"))),
}
# Every family at least once with one factor, and every structure at least once.
CASES = [
    ("q=1", "binomial-probit", "observed"),
    ("q=1", "gamma-log", "observed"),
    ("q=1", "gaussian-identity", "observed"),
    ("q=2, weights", "nbinom-log", "observed"),
    ("q=2, weights", "gamma-log", "expected"),
    ("q=3", "binomial-logit", "observed"),
    ("diag", "poisson-log", "observed"),
    ("homcs", "poisson-log", "observed"),
    ("two terms on a factor", "poisson-log", "observed"),
    ("nested", "nbinom-log", "observed"),
    ("crossed", "binomial-logit", "observed"),
    ("crossed", "gamma-log", "expected"),
    ("crossed, slopes", "poisson-log", "observed"),
]


@cache
def data_of(name, family):
    """Rows with responses that the family can have; 24 of them."""
    design = random_design(DESIGNS[name], 3, n=N)
    rng = np.random.default_rng(5)
    size = rng.integers(1, 5, N).astype(float) if family.startswith("binomial") else None
    y = {
        "binomial": lambda: rng.binomial(size.astype(int), 0.5).astype(float),
        "poisson": lambda: rng.poisson(2.0, N).astype(float),
        "nbinom": lambda: rng.poisson(2.0, N).astype(float),
        "gamma": lambda: rng.gamma(2.0, 1.0, N),
        "gaussian": lambda: rng.normal(size=N),
    }[family.split("-")[0]]()
    structure = name if name in ("diag", "homcs") else "us"
    terms = tuple(replace(term, structure=structure) for term in design.terms)
    design = replace(design, y=y, size=size, terms=terms, offset=0.3 * design.offset)
    return mj.rows(design, getattr(mj.families, family.split("-")[0])(family.split("-")[1]))


def point_of(data, kind):
    """``fixed`` and coordinates ``x``: regular, with the rank of the first term lowered, or without any variance."""
    rng = np.random.default_rng(7)
    fixed, structures = 0.4 * rng.normal(size=data.p + data.family.n_psi), data.layout.structures
    parts = [s.near(0.4 * rng.normal(size=(s.q, s.q, 1)) + 0.6 * np.eye(s.q)[..., None]) for s in structures]
    parts[0][structures[0].deviations[0]] *= -1.0  # signs are free
    if kind == "deficient":
        parts[0], _ = structures[0].reduced(parts[0], np.zeros(1, int))
    x = np.concatenate(parts)[:, 0]
    return fixed, (0.0 * x if kind == "zero" else x)


def of_coordinates(phi, data, expected):
    n = data.p + data.family.n_psi
    return objective(Point(phi[:n], cov.factors_of(phi[n:], data.layout.structures)), data, expected)


@partial(jit, static_argnames="expected")
def differentiated(phi, data, expected=False):
    """Value, gradient, Hessian."""

    def slope(phi):
        value, gradient = jax.value_and_grad(of_coordinates)(phi, data, expected)
        return gradient, (value, gradient)

    Hessian, (value, gradient) = jax.jacfwd(slope, has_aux=True)(phi)
    return value, gradient, Hessian


def modes_at(model, fixed, x):
    lambdas = cov.factors_of(x[:, None], model.layout.structures)
    start = np.zeros((*model.effects.effect_shape, 1))
    return lambdas, find_modes(model, lambdas, fixed[:, None], start, INNER_LAST)


def by_phi(model, form, x):
    """The form's value, and its gradient and Hessian by fixed and x."""
    n = model.n_fixed
    jacobian, _ = chain(x[:, None], form.gradient[n:], model.layout)
    gradient = np.concatenate([form.gradient[:n, 0], jacobian[..., 0].T @ form.gradient[n:, 0]])
    return form.value[0], gradient, joint_Hessian(model, x[:, None], form)[..., 0]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=SAME * np.abs(b).max())


@pytest.mark.parametrize("kind", ["regular", "deficient", "zero"])
@pytest.mark.parametrize(("name", "family", "curvature"), CASES, ids=map(", ".join, CASES))
def test_closed_form(name, family, curvature, kind):
    data = data_of(name, family)
    fixed, x = point_of(data, kind)
    expected = differentiated(np.concatenate([fixed, x]), data, expected=curvature == "expected")
    with silently():
        model = model_of(data, curvature)
        lambdas, modes = modes_at(model, fixed, x)
        assert_same(by_phi(model, form_at(model, lambdas, fixed[:, None], modes), x), expected)
        if len(data.levels) > 1 or curvature == "expected":
            return
        model = replace(model, columns=columns_of(model.effects, model.data))
        assert model.columns is not None
        *_, form = moment_form(model, lambdas, fixed[:, None], modes.v)
        assert_same(by_phi(model, form, x), expected)


def test_gradient_against_finite_differences():
    """Central differences of step h err by ``h^2 / 6`` of the third derivative and ``1e-15 / h`` of the value."""
    data = data_of("nested", "nbinom-log")
    phi = np.concatenate(point_of(data, "regular"))
    _, gradient, _ = differentiated(phi, data)
    h = 1e-5
    for i, unit in enumerate(np.eye(len(phi))):
        ahead, behind = (float(differentiated(phi + s * h * unit, data)[0]) for s in (1, -1))
        np.testing.assert_allclose(gradient[i], (ahead - behind) / (2 * h), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("name", ["q=1", "q=3", "crossed, slopes"])
def test_a_gaussian_response_is_a_linear_mixed_model(name):
    """Laplace's approximation is exact there: minimised over beta and log sd it is the linear model's deviance."""
    data = data_of(name, "gaussian-identity")
    design = replace(random_design(DESIGNS[name], 3, n=N), y=data.y, offset=data.offset)
    theta = np.random.default_rng(0).normal(size=sum(s.k for s in data.layout.structures))
    lambdas = [
        (Z.R @ own)[..., None] for Z, own in zip(data.Z_bases, cov.lambdas_of_theta(theta, data.layout.qs), strict=True)
    ]
    model = model_of(data)

    def form(fixed, psi):
        scaled = [np.exp(psi) * own for own in lambdas]
        fixed = np.append(fixed, psi)[:, None]
        start = np.zeros((*model.effects.effect_shape, 1))
        return form_at(model, scaled, fixed, find_modes(model, scaled, fixed, start, INNER_LAST))

    def profiled(psi):  # quadratic in beta: one step leads to the minimum
        at = form(np.zeros(data.p), psi)
        delta = -np.linalg.solve(at.Hessian[: data.p, : data.p, 0], at.gradient[: data.p, 0])
        return form(delta, psi).value[0]

    found = scipy.optimize.minimize_scalar(profiled, (-1.0, 1.0), tol=1e-10)
    expected = mj.criterion(theta, mj.cross_products(design), reml=False)
    np.testing.assert_allclose(found.fun, expected, rtol=0, atol=1e-9)


# --- lanes -------------------------------------------------------------------------------------------------------


@jit
def in_lanes(model, lambdas, fixed, v):
    """Both forms by XLA, with the modes of the second one step further."""
    *_, by_moments = moment_form(model, lambdas, fixed, v)
    modes = find_modes(model, lambdas, fixed, v, 1e-13)
    return form_at(model, lambdas, fixed, modes), by_moments


def test_numpy_and_jax_agree_in_lanes_that_do_not_meet():
    data, L = data_of("q=2, weights", "nbinom-log"), 3
    fixed, x = point_of(data, "regular")
    rng = np.random.default_rng(1)
    fixed = fixed[:, None] + 0.1 * rng.normal(size=(len(fixed), L))
    lambdas = cov.factors_of(x[:, None] + 0.1 * rng.normal(size=(len(x), L)), data.layout.structures)
    with silently():
        model = model_of(data)
        model = replace(model, columns=columns_of(model.effects, model.data))
        y = model.data.y + rng.poisson(1.0, (*model.data.y.shape[:-1], L))
        model = replace(model, data=model.data._replace(y=y))
        modes = find_modes(model, lambdas, fixed, np.zeros((*model.effects.effect_shape, L)), INNER_LAST)
        *_, by_moments = moment_form(model, lambdas, fixed, modes.v)
        expected = form_at(model, lambdas, fixed, modes), by_moments
    found = in_lanes(*jax.tree.map(jnp.asarray, (model, lambdas, fixed)), jnp.asarray(modes.v))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=SAME * np.abs(b).max())
    # One that is not a number has the others' modes take another step, which moves them by rounding.
    broken = replace(model, data=model.data._replace(y=np.where(np.arange(L) == 1, np.nan, model.data.y)))
    beside = in_lanes(*jax.tree.map(jnp.asarray, (broken, lambdas, fixed)), jnp.asarray(modes.v))
    for a, b in zip(jax.tree.leaves(beside), jax.tree.leaves(found), strict=True):
        np.testing.assert_allclose(a[..., [0, 2]], b[..., [0, 2]], rtol=0, atol=SAME * np.abs(b).max())
    for form in beside:
        assert np.isnan(form.value[1])


@pytest.mark.parametrize("xp", [np, jnp])
def test_matrices_of_two_effects_are_those_of_linear_algebra(xp):
    """Also of a singular covariance; and where a level's curvature is no minimum the determinant is not a number."""
    rng = np.random.default_rng(4)
    B = rng.normal(size=(2, 2, 5, 3))
    A = np.einsum("acml,bcml->abml", B, B)
    L = rng.normal(size=(2, 2, 1, 3)) * np.array([[1.0, 0.0], [1.0, 1.0]])[..., None, None]
    L[1, 1, 0, 1] = 0.0
    with jax.enable_x64(True), silently():
        gain = level_effects._gain_of_two(xp.asarray(L), xp.asarray(A))
        lost = level_effects._gain_of_two(xp.asarray(L), xp.asarray(-1e4 * A))
    assert np.isnan(lost.logdet).all()
    for m in range(5):
        for lane in range(3):
            D, a = L[:, :, 0, lane] @ L[:, :, 0, lane].T, A[..., m, lane]
            K = D @ np.linalg.inv(np.eye(2) + a @ D)
            for found, wanted in ((gain.K, K), (gain.R, np.eye(2) - a @ K), (gain.N, a - a @ K @ a)):
                np.testing.assert_allclose(found[..., m, lane], wanted, rtol=1e-9, atol=1e-11)
    both = np.eye(2) + np.einsum("abml,bcl->mlac", A, np.einsum("abl,cbl->acl", L[:, :, 0], L[:, :, 0]))
    np.testing.assert_allclose(gain.logdet, np.linalg.slogdet(both)[1].sum(0), rtol=1e-10)


@pytest.mark.parametrize(
    "counts", [[4] * 6, [1, 2, 6, 6, 9, 0], [1, 1, 1, 2, 2, 17]], ids=["balanced", "empty", "long"]
)
@pytest.mark.parametrize(("family", "q"), [("binomial", 1), ("nbinom", 2)])
def test_columns_that_are_constant_within_levels(family, q, counts):
    """The form by moments leaves them out of its sums over rows; the form by rows does not know of them."""
    rng = np.random.default_rng(11)
    group = rng.permutation(np.repeat(np.arange(6), counts))
    X = np.column_stack([np.ones(N), rng.normal(size=6)[group], group % 2.0, rng.normal(size=N)])
    X = X[:, : 2 + q]  # none that is not constant, and one
    term = mj.RandomTerm(Z=X[:, [0, 3][:q]], group=group, n_groups=6)
    y = (rng.binomial(1, 0.5, N) if family == "binomial" else rng.poisson(2.0, N)).astype(float)
    weights = rng.uniform(0.5, 2.0, N) if q == 2 else None
    rows = mj.rows(mj.Design(y=y, X=X, terms=(term,), weights=weights), family)
    # In a basis of X that mixes columns none would be constant.
    with silently():
        model = model_of(rows)
        own = model.data.X.copy()
        index = np.asarray(model.effects.index)
        own[:] = np.moveaxis(X[filled(index)], -1, 0)[..., None]
        model = replace(model, data=model.data._replace(X=own))
        columns = columns_of(model.effects, model.data)
        assert [i for i in columns.x if i in columns.constant] == list(columns.x[:3])
        x = np.full(len(point_of(rows, "regular")[1]), 0.7)
        fixed = 0.3 * rng.normal(size=model.n_fixed)
        lambdas, modes = modes_at(model, fixed, x)
        expected = form_at(model, lambdas, fixed[:, None], modes)
        *_, form = moment_form(replace(model, columns=columns), lambdas, fixed[:, None], modes.v)
    for a, b in zip(jax.tree.leaves(form), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=SAME * np.abs(b).max())
