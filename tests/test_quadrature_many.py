"""Many fits by adaptive quadrature: the optima of single ones, zeros exactly, a code per replicate."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from test_glmm_many import LEVELS, ROWS, design, responses

import mixjax as mj
from mixjax.engine.laplace_model import columns_of
from mixjax.engine.quadrature import correction, product_rule
from mixjax.engine.quadrature_moments import moment_correction
from mixjax.estimation.glmm import model_of
from mixjax.estimation.glmm_quadrature import fit_rows_by_quadrature
from mixjax.estimation.glmm_quadrature_lanes import falls_to_zero
from mixjax.estimation.glmm_tiles import Tiles
from mixjax.machine import silently

BINOMIAL, POISSON, NBINOM, GAMMA = (
    mj.families.binomial(),
    mj.families.poisson(),
    mj.families.nbinom(),
    mj.families.gamma(),
)
ALL = ("theta", "beta", "psi", "criterion", "converged", "singular", "result", "vcov", "b", "eta", "iterations")


def agree(fits, i, one):
    """Both are within 1e-7 standard errors of the same point, so that criteria differ by rounding and estimates by the
    seventh digit of a standard error; Hessians by the differences of gradients they have in common, 1e-8 of a unit."""
    assert fits.result[i] == one.result
    assert fits.singular[i] == one.singular
    if not one.converged:
        return
    np.testing.assert_allclose(fits.criterion[i], one.criterion, rtol=0, atol=1e-9)
    np.testing.assert_allclose(fits.beta[i], one.beta, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(fits.theta[i], one.theta, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(fits.theta[i] == 0, one.theta == 0)
    np.testing.assert_allclose(fits.psi[i], one.psi, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(fits.vcov[i], one.vcov, rtol=1e-6)
    np.testing.assert_allclose(fits.eta[i], one.eta, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(fits.b[0][i], one.b[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "q", "sd", "nagq"),
    [
        (BINOMIAL, 1, 0.8, 9), (mj.families.binomial("probit"), 1, 0.8, 4), (POISSON, 2, 0.5, 5),
        (NBINOM, 1, 0.8, 7), (GAMMA, 1, 0.8, 7),
    ],
    ids=str,
)  # fmt: skip
def test_many_are_as_one(family, q, sd, nagq):
    d = design(q)
    Y = responses(d, family, 8, sd=sd)
    fits = mj.glmm_estimate_many(mj.rows(d, family, Y), keep=ALL, engine="numpy", nagq=nagq)
    assert fits.converged.all()
    for i, y in enumerate(Y):
        agree(fits, i, fit_rows_by_quadrature(mj.rows(d, family, y), nagq))


def test_zeros_are_exact():
    """Half of the replicates have no variance, and the lanes find out without a search for each."""
    d = design(1)
    Y = responses(d, BINOMIAL, 24, sd=0.25)
    fits = mj.glmm_estimate_many(mj.rows(d, BINOMIAL, Y), keep=ALL, engine="numpy", nagq=5)
    assert 5 < fits.singular.sum() < 20
    for i, y in enumerate(Y):
        agree(fits, i, fit_rows_by_quadrature(mj.rows(d, BINOMIAL, y), 5))


def model_in_lanes(d, family, Y):
    rows = mj.rows(d, family, Y[0])
    model = model_of(rows)
    model = replace(model, columns=columns_of(model.effects, model.data))
    return Tiles(rows, model, Y, ("theta",), False, 5).of(np.arange(len(Y)))


def test_what_falls_to_zero():
    """Responses with a clear variance do not; of those without one, which do is what single fits find."""
    d = design(1)
    Y = np.concatenate([responses(d, BINOMIAL, 6, sd=2.0), responses(d, BINOMIAL, 6, sd=0.0)])
    with silently():
        falls = falls_to_zero(model_in_lanes(d, BINOMIAL, Y), np.zeros((2, len(Y))), 5)
    singular = [fit_rows_by_quadrature(mj.rows(d, BINOMIAL, y), 5).singular for y in Y]
    np.testing.assert_array_equal(falls, singular)
    assert not falls[:6].any()
    assert falls[6:].any()


def test_a_code_per_replicate():
    d = design(1)
    Y = responses(d, BINOMIAL, 3)
    Y[1] = (d.X[:, 1] > 0).astype(float)  # the covariate tells the response
    fits = mj.glmm_estimate_many(mj.rows(d, BINOMIAL, Y), engine="numpy", nagq=5)
    assert fits.result[1] in (mj.Result.SEPARATED, mj.Result.UNBOUNDED)
    assert fits.converged.tolist() == [True, False, True]


def test_a_replicate_does_not_depend_on_its_neighbours():
    d = design(1)
    Y = responses(d, POISSON, 6)
    whole = mj.glmm_estimate_many(mj.rows(d, POISSON, Y), engine="numpy", nagq=5)
    part = mj.glmm_estimate_many(mj.rows(d, POISSON, Y[[5, 3, 2]]), engine="numpy", nagq=5)
    for field in ("theta", "beta", "criterion"):
        np.testing.assert_array_equal(getattr(whole, field)[[5, 3, 2]], getattr(part, field))


def test_order_of_rows_and_scale_of_a_covariate():
    d = design(1)
    Y = responses(d, BINOMIAL, 4)
    order = np.random.default_rng(7).permutation(ROWS * LEVELS)
    (term,) = d.terms
    other = mj.Design(
        y=d.y, X=(d.X * [1.0, 1e4])[order],
        terms=(mj.RandomTerm(Z=term.Z[order], group=(LEVELS - 1 - term.group)[order], n_groups=LEVELS),),
    )  # fmt: skip
    fits = mj.glmm_estimate_many(mj.rows(d, BINOMIAL, Y), engine="numpy", nagq=5)
    moved = mj.glmm_estimate_many(mj.rows(other, BINOMIAL, Y[:, order]), engine="numpy", nagq=5)
    np.testing.assert_allclose(fits.criterion, moved.criterion, rtol=0, atol=1e-9)
    np.testing.assert_allclose(fits.theta, moved.theta, atol=1e-7)
    np.testing.assert_allclose(fits.beta, moved.beta * [1.0, 1e4], rtol=1e-6, atol=1e-7)


def test_one_node_is_laplace():
    d = design(1)
    Y = responses(d, POISSON, 4)
    laplace = mj.glmm_estimate_many(mj.rows(d, POISSON, Y), engine="numpy")
    same = mj.glmm_estimate_many(mj.rows(d, POISSON, Y), engine="numpy", nagq=1)
    np.testing.assert_array_equal(laplace.theta, same.theta)


def test_cells_are_the_rows():
    """Counts of successes of rows alike: the criterion differs by what is known of the binomial coefficients."""
    group, item = np.repeat(np.arange(12), 12), np.tile(np.repeat([0.0, 1.0, 2.0], 4), 12)
    X = np.column_stack([np.ones(144), item])
    d = mj.Design(y=np.zeros(144), X=X, terms=(mj.RandomTerm(Z=np.ones((144, 1)), group=group, n_groups=12),))
    rng = np.random.default_rng(5)
    eta = -0.5 + 0.4 * item + rng.normal(size=(4, 12))[:, group]
    Y = (rng.random(eta.shape) < 1 / (1 + np.exp(-eta))).astype(float)
    fits = mj.glmm_estimate_many(mj.rows(d, BINOMIAL, Y), engine="numpy", nagq=7)
    for i, y in enumerate(Y):
        one = fit_rows_by_quadrature(mj.rows(d, BINOMIAL, y), 7)
        np.testing.assert_allclose(fits.criterion[i], one.criterion, rtol=0, atol=1e-9)


def test_engines_agree():
    d = design(1)
    rows = mj.rows(d, BINOMIAL, responses(d, BINOMIAL, 40, sd=0.4))
    numpys, xlas = (mj.glmm_estimate_many(rows, engine=engine, nagq=5) for engine in ("numpy", "jax"))
    assert 0 < numpys.singular.sum() < 40
    np.testing.assert_array_equal(numpys.result, xlas.result)
    np.testing.assert_array_equal(numpys.singular, xlas.singular)
    np.testing.assert_allclose(numpys.criterion, xlas.criterion, rtol=0, atol=1e-9)
    np.testing.assert_allclose(numpys.theta, xlas.theta, atol=1e-7)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nagq": 0}, "not with nagq = 0"),
        ({"nagq": 2.5}, "nagq must be a whole number"),
        ({"nagq": True}, "nagq must be a whole number"),
        ({"nagq": 5, "curvature": "expected"}, "curvature='expected' goes with nagq=1"),
        ({"curvature": "some"}, "curvature must be"),
    ],
)
def test_bad_calls(options, message):
    with pytest.raises(ValueError, match=message):
        mj.glmm_estimate_many(mj.rows(design(), "poisson", np.ones((2, LEVELS * ROWS))), **options)


def test_quadrature_needs_one_factor():
    group, other = np.repeat(np.arange(8), 6), np.tile(np.arange(6), 8)
    terms = tuple(mj.RandomTerm(Z=np.ones((48, 1)), group=g, n_groups=int(g.max()) + 1) for g in (group, other))
    d = mj.Design(y=np.zeros(48), X=np.ones((48, 1)), terms=terms)
    with pytest.raises(ValueError, match="one grouping factor"):
        mj.glmm_estimate_many(mj.rows(d, "poisson", np.ones((2, 48))), nagq=5)


def test_ends_of_several_effects():
    """Replicates of which most have a singular covariance, or a small one: searched by secants, confirmed exactly."""
    d = design(2)
    Y = responses(d, BINOMIAL, 10, sd=0.5)
    fits = mj.glmm_estimate_many(mj.rows(d, BINOMIAL, Y), keep=ALL, engine="numpy", nagq=3)
    assert fits.singular.any()
    for i, y in enumerate(Y):
        one = fit_rows_by_quadrature(mj.rows(d, BINOMIAL, y), 3)
        assert (fits.result[i], fits.singular[i]) == (one.result, one.singular)
        np.testing.assert_allclose(fits.criterion[i], one.criterion, rtol=0, atol=1e-9)
        np.testing.assert_allclose(fits.theta[i], one.theta, rtol=0, atol=1e-6)
        np.testing.assert_allclose(fits.vcov[i], one.vcov, rtol=1e-5)


@pytest.mark.parametrize(
    ("q", "family"), [(1, BINOMIAL), (2, BINOMIAL), (2, POISSON), (1, mj.families.binomial("probit"))]
)
def test_moments_by_level_say_what_rows_say(q, family):
    """The correction and its derivatives by sums of every level, and row by row: of slopes that reach 1e4 at the far
    nodes of a Poisson response 12 digits are left."""
    d = design(q)
    model = model_in_lanes(d, family, responses(d, family, 3))
    rng = np.random.default_rng(0)
    Lambda = np.tril(rng.normal(size=(q, q)))[..., None] * np.linspace(0.5, 1.0, 3)
    b, fixed = 0.5 * rng.normal(size=(q, LEVELS, 3)), 0.3 * rng.normal(size=(2, 3))
    rule = product_rule(5, q)
    for one, other in zip(moment_correction(model, rule, [Lambda], Lambda, fixed, b),
                          correction(model, rule, [Lambda], Lambda, fixed, b), strict=True):  # fmt: skip
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-9)


def test_a_fit_by_quadrature_has_many_responses():
    d = design(1)
    rng = np.random.default_rng(4)
    table = pd.DataFrame({"x": d.X[:, 1], "g": np.asarray(d.terms[0].group).astype(str)})
    Y = responses(d, POISSON, 3)[:, rng.permutation(ROWS * LEVELS)]
    fit = mj.glmm("y ~ x + (1 | g)", table.assign(y=Y[0]), family="poisson", nagq=5)
    many = fit.record.fit_many(Y, ("criterion",))
    for i, y in enumerate(Y):
        np.testing.assert_allclose(many.criterion[i], fit.record.refit(y).estimates.criterion, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("family", "size"),
    [(mj.families.binomial(link), size) for link in ("logit", "probit", "cloglog") for size in (None, 5.0)]
    + [(family, None) for family in (POISSON, mj.families.poisson("sqrt"), NBINOM, GAMMA)],
    ids=str,
)
def test_kernels_are_densities_but_for_a_constant(family, size):
    eta, y = np.linspace(0.1, 3.0, 7), np.array([1.0])
    if family.name == "binomial":
        eta = np.linspace(-30.0, 5.0, 9)
    size = None if size is None else np.array([size])
    psi = [0.3] * family.n_psi
    c, slope, *_ = family.derivatives(eta, y, size, psi).by_eta
    value, own = family.kernel(eta, y, size, psi)
    np.testing.assert_allclose(own, slope, rtol=1e-13, atol=1e-300)
    np.testing.assert_allclose((value - c) - (value - c)[0], 0.0, atol=1e-12)
    factored = family.factored(eta, y, size, psi)
    assert (factored is None) == (family.name != "binomial" or family.link != "logit")
    if factored is not None:
        assert ((factored[1] >= 1) & (factored[1] <= 2)).all()
        n = 1.0 if size is None else size
        np.testing.assert_allclose(factored[0] + n * np.log(factored[1]), value, rtol=1e-14, atol=5e-14)
        np.testing.assert_allclose(factored[2], slope, rtol=1e-13, atol=1e-300)


def test_long_responses_whose_tiles_are_small():
    """1 200 rows have 16 lanes in a tile; more of them wait for the full search at the same time."""
    rng = np.random.default_rng(5)
    group = np.repeat(np.arange(100), 12)
    X = np.column_stack([np.ones(1200), np.tile(np.linspace(-1, 1, 12), 100)])
    design = mj.Design(y=np.zeros(1200), X=X, terms=(mj.RandomTerm(Z=np.ones((1200, 1)), group=group, n_groups=100),))
    eta = -3.5 + 0.5 * X[:, 1] + 0.25 * rng.standard_normal((48, 100))[:, group]
    Y = (rng.random(eta.shape) < 1 / (1 + np.exp(-eta))).astype(float)
    rows = mj.rows(design, "binomial", Y)
    by_jax, by_numpy = (
        mj.glmm_estimate_many(rows, keep=("criterion", "result", "singular"), nagq=5, engine=engine)
        for engine in ("jax", "numpy")
    )
    assert by_numpy.singular.sum() > 3
    np.testing.assert_array_equal(by_jax.result, by_numpy.result)
    np.testing.assert_allclose(by_jax.criterion, by_numpy.criterion, rtol=0, atol=1e-8)
