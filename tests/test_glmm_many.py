"""Many fits of generalised linear mixed models: the same optima as one at a time, codes per replicate."""

import numpy as np
import pytest

import mixjax as mj
from mixjax.estimation import glmm_tiles
from mixjax.estimation.glmm import fit_rows
from mixjax.products.family_rows import cells

ROWS, LEVELS = 6, 20


def design(q=1, size=None, offset=None, p=2):
    group = np.repeat(np.arange(LEVELS), ROWS)
    rng = np.random.default_rng(1)
    X = np.column_stack([np.ones(len(group)), rng.normal(size=(len(group), p - 1))])
    term = mj.RandomTerm(Z=X[:, :q], group=group, n_groups=LEVELS)
    return mj.Design(y=np.zeros(len(group)), X=X, terms=(term,), size=size, offset=offset)


def responses(d, family, B, seed=2, sd=0.8):
    rng = np.random.default_rng(seed)
    group, X = np.asarray(d.terms[0].group), d.X
    b = rng.normal(size=(B, LEVELS, d.terms[0].Z.shape[1])) * sd
    eta = -0.3 + 0.5 * X[:, 1] + np.einsum("bnq,nq->bn", b[:, group], d.terms[0].Z)
    if family.name == "binomial":
        return rng.binomial(1 if d.size is None else d.size.astype(int), 1 / (1 + np.exp(-eta))).astype(float)
    if family.name == "poisson":
        return rng.poisson(np.exp(eta)).astype(float)
    if family.name == "nbinom":
        return rng.poisson(np.exp(eta) * rng.gamma(2.0, 0.5, eta.shape)).astype(float)
    return np.exp(eta) * rng.gamma(3.0, 1 / 3, eta.shape)


FAMILIES = [
    (mj.families.binomial(), 1), (mj.families.binomial("probit"), 1), (mj.families.binomial(), 2),
    (mj.families.poisson(), 2), (mj.families.nbinom(), 1), (mj.families.gamma(), 1),
]  # fmt: skip


@pytest.mark.parametrize(("family", "q"), FAMILIES, ids=lambda v: str(getattr(v, "name", v)))
def test_many_are_as_one(family, q):
    """Criterion to 1e-8 of a single fit, estimates to 1e-5 of their own size: both are Newton's optima, within 1e-9
    standard errors or where the criterion is flat to rounding."""
    d = design(q)
    Y = responses(d, family, 24)
    keep = ("theta", "beta", "psi", "criterion", "converged", "singular", "result", "vcov", "b", "eta")
    fits = mj.glmm_estimate_many(mj.rows(d, family, Y), keep=keep, engine="numpy")
    for i, y in enumerate(Y):
        one = fit_rows(mj.rows(d, family, y))
        assert fits.result[i] == one.result
        if not one.converged:
            continue
        np.testing.assert_allclose(fits.criterion[i], one.criterion, rtol=0, atol=1e-8)
        assert fits.singular[i] == one.singular
        np.testing.assert_allclose(fits.beta[i], one.beta, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(fits.theta[i], one.theta, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(fits.vcov[i], one.vcov, rtol=1e-4)
        np.testing.assert_allclose(fits.eta[i], one.eta, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(fits.b[0][i], one.b[0], rtol=1e-4, atol=1e-5)


def singular_design(kind):
    """12 levels of 5 rows, whose random effects are small: most fits are singular."""
    rng = np.random.default_rng(6)
    group, x = np.repeat(np.arange(12), 5), rng.normal(size=(60, 2))
    ones = np.ones((60, 1))
    Z = {"(1 | g)": [ones], "(x | g)": [np.column_stack([ones, x[:, 0]])], "(x + w | g)": [np.column_stack([ones, x])],
         "(1 | g) + (0 + x | g)": [ones, x[:, :1]]}[kind]  # fmt: skip
    terms = tuple(mj.RandomTerm(Z=own, group=group, n_groups=12) for own in Z)
    return mj.Design(y=np.zeros(60), X=np.column_stack([ones, x[:, 0]]), terms=terms)


@pytest.mark.parametrize("kind", ["(1 | g)", "(x | g)", "(x + w | g)", "(1 | g) + (0 + x | g)"])
@pytest.mark.parametrize("family", [mj.families.binomial(), mj.families.poisson()], ids=lambda family: family.name)
def test_singular_fits_are_those_of_single_searches(family, kind, monkeypatch):
    d = singular_design(kind)
    rng = np.random.default_rng(7)
    eta = 0.2 + 0.5 * d.X[:, 1] + 0.3 * rng.normal(size=(40, 12))[:, np.asarray(d.terms[0].group)]
    Y = (
        (rng.random(eta.shape) < 1 / (1 + np.exp(-eta))) * 1.0
        if family.name == "binomial"
        else rng.poisson(np.exp(eta))
    )
    searched = []
    whole = glmm_tiles.Tiles._search
    monkeypatch.setattr(glmm_tiles.Tiles, "_search", lambda self, at, *a: (searched.extend(at), whole(self, at, *a)))
    keep = ("theta", "beta", "criterion", "singular", "result", "vcov", "iterations")
    fits = mj.glmm_estimate_many(mj.rows(d, family, Y * 1.0), keep=keep, engine="numpy")
    assert fits.singular.sum() > 10
    # The full search is for what direct steps cannot do, not for what is singular.
    assert fits.singular[searched].sum() <= 0.2 * fits.singular.sum()
    for i, y in enumerate(Y * 1.0):
        one = fit_rows(mj.rows(d, family, y))
        assert fits.result[i] == one.result
        assert fits.singular[i] == one.singular
        np.testing.assert_allclose(fits.criterion[i], one.criterion, rtol=0, atol=1e-8)
        if one.converged:
            np.testing.assert_allclose(fits.beta[i], one.beta, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(fits.theta[i], one.theta, rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(fits.vcov[i], one.vcov, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("replicate", [671, 1239, 1802])
def test_a_singular_minimum_that_is_not_the_least(replicate):
    """Direct steps fall into a singular minimum; the second search, from large variances, finds a lower one."""
    group, x = np.repeat(np.arange(15), 6), np.random.default_rng(3).normal(size=90)
    rng = np.random.default_rng([4, replicate])
    b = rng.normal(size=(15, 2)) * [0.5, 0.2]
    y = rng.poisson(np.exp(0.3 + 0.6 * x + b[group, 0] + b[group, 1] * x)).astype(float)
    X = np.column_stack([np.ones(90), x])
    d = mj.Design(y=y, X=X, terms=(mj.RandomTerm(Z=X, group=group, n_groups=15),))
    fits = mj.glmm_estimate_many(mj.rows(d, "poisson", y[None]), engine="numpy")
    rows = mj.rows(d, "poisson", y)
    assert not fits.singular[0]
    np.testing.assert_allclose(fits.criterion[0], fit_rows(rows).criterion, rtol=0, atol=1e-8)


@pytest.mark.parametrize("counts", [
    "122051224344000132111021001155322464100002011111512331100111130022041021130200006000120101",
    "423252151145000453201021101000704965104302343122110110404003241131160250151502005000020002",
])  # fmt: skip
@pytest.mark.usefixtures("x64")
def test_a_regular_minimum_that_is_not_the_least(counts):
    """Direct steps end at a regular minimum; one beside it, of less rank, is lower."""
    rng, group = np.random.default_rng(1), np.repeat(np.arange(15), 6)
    X = np.column_stack([np.ones(90), rng.normal(size=90)])
    y = np.array([float(count) for count in counts])
    design = mj.Design(y=y, X=X, terms=(mj.RandomTerm(Z=X, group=group, n_groups=15),))
    fits = mj.glmm_estimate_many(mj.rows(design, "poisson", y[None]), engine="numpy")
    assert fits.singular[0]
    regular = fit_rows(mj.rows(design, "poisson", y), start=np.array([0.4, 0.0, 0.2]))
    assert fits.criterion[0] < regular.criterion - 0.06
    first, second, nothing = fits.theta[0]
    assert nothing == 0
    point = mj.GLMMParams(beta=fits.beta[0], chol=(np.array([np.log(first), second, -25.0]),))
    loglik = float(mj.glmm_loglik(point, mj.rows(design, "poisson", y)))
    np.testing.assert_allclose(fits.criterion[0], -2.0 * loglik, rtol=0, atol=1e-8)


def test_engines_agree():
    d, family = design(1), mj.families.binomial()
    rows = mj.rows(d, family, responses(d, family, 40))
    numpys, xlas = (mj.glmm_estimate_many(rows, engine=engine) for engine in ("numpy", "jax"))
    np.testing.assert_array_equal(numpys.result, xlas.result)
    np.testing.assert_allclose(numpys.criterion, xlas.criterion, atol=1e-9)
    np.testing.assert_allclose(numpys.theta, xlas.theta, atol=1e-6)


def test_a_replicate_does_not_depend_on_its_neighbours():
    """To the bit: lanes share no arithmetic."""
    d, family = design(2), mj.families.poisson()
    Y = responses(d, family, 12)
    Y[3] = 0.0
    whole = mj.glmm_estimate_many(mj.rows(d, family, Y), engine="numpy")
    part = mj.glmm_estimate_many(mj.rows(d, family, Y[[5, 3, 7]]), engine="numpy")
    for field in ("theta", "beta", "criterion"):
        np.testing.assert_array_equal(getattr(whole, field)[[5, 7]], getattr(part, field)[[0, 2]])
    assert not whole.converged[3]
    assert np.delete(whole.converged, 3).all()


def test_separated_and_unbounded():
    d, family = design(1), mj.families.binomial()
    Y = responses(d, family, 3)
    Y[1] = (d.X[:, 1] > 0).astype(float)  # the covariate tells the response
    fits = mj.glmm_estimate_many(mj.rows(d, family, Y), engine="numpy")
    assert fits.result[1] in (mj.Result.SEPARATED, mj.Result.UNBOUNDED)
    assert fits.converged[[0, 2]].all()
    assert not fits.converged[1]


def test_cells_are_the_rows():
    """A factorial design: the criterion of rows, of cells and of counts differ by known constants only."""
    group = np.repeat(np.arange(12), 12)
    item = np.tile(np.repeat([0.0, 1.0, 2.0], 4), 12)
    X = np.column_stack([np.ones(144), item])
    d = mj.Design(y=np.zeros(144), X=X, terms=(mj.RandomTerm(Z=np.ones((144, 1)), group=group, n_groups=12),))
    rng = np.random.default_rng(5)
    eta = -0.5 + 0.4 * item + rng.normal(size=(6, 12))[:, group]
    for family, Y in (
        (mj.families.binomial(), (rng.random(eta.shape) < 1 / (1 + np.exp(-eta))).astype(float)),
        (mj.families.poisson(), rng.poisson(np.exp(eta)).astype(float)),
    ):
        rows = mj.rows(d, family, Y)
        assert cells(rows).rows.n == 36
        fits = mj.glmm_estimate_many(rows, engine="numpy")
        for i, y in enumerate(Y):
            one = fit_rows(mj.rows(d, family, y))
            np.testing.assert_allclose(fits.criterion[i], one.criterion, atol=1e-8)
            np.testing.assert_allclose(fits.beta[i], one.beta, rtol=1e-6, atol=1e-7)


def test_no_cells_where_nothing_is_alike():
    assert cells(mj.rows(design(), "poisson")) is None
    assert cells(mj.rows(design(), "nbinom")) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: mj.glmm_estimate_many(r, keep=("nothing",)), "keep names"),
        (lambda r: mj.glmm_estimate_many(r, engine="gpu"), "engine must be"),
        (lambda r: mj.glmm_estimate_many(mj.rows(design(), "poisson")), "rows of one response"),
        (lambda r: mj.glmm_estimate_many(mj.rows(design(), "poisson", np.zeros((0, LEVELS * ROWS)))), "no responses"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call(mj.rows(design(), "poisson", np.ones((2, LEVELS * ROWS))))
