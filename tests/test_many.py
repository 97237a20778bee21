"""Many fits at once: the same numbers as one by one, whatever the batch, its blocks, threads and devices."""

from dataclasses import replace
from functools import cache

import jax
import numpy as np
import pandas as pd
import pytest
from conftest import fit_of, table
from designs import STRUCTURES, Structure, random_design
from test_curvature import balanced

import mixjax as mj
from mixjax import decompositions
from mixjax.estimation import batch as batch_room
from mixjax.estimation import many
from mixjax.optimise.results import Result
from mixjax.products import sizes
from mixjax.products.sums import pad

ALL = (*many.KEEP, "Sigma", "vcov", "b")


def responses(design, B, seed=0, scale=1.5):
    """Simulated responses; every third without random effects, so that some fits are singular."""
    rng = np.random.default_rng(seed)
    noise = 1.0 if design.weights is None else 1 / np.sqrt(design.weights)
    Y = design.X @ np.arange(1.0, design.X.shape[1] + 1) + noise * rng.normal(size=(B, len(design.y)))
    for term in design.terms:
        b = scale * rng.normal(size=(B, term.n_groups, term.Z.shape[1]))
        b[::3] = 0.0
        Y += np.einsum("nq,bnq->bn", term.Z, b[:, term.group])
    return Y


CASES = {
    **{name: random_design(STRUCTURES[name], 0) for name in ("one factor, q=2, weights", "nested", "crossed")},
    "two terms on a factor": random_design(STRUCTURES["two terms on a factor"], 1),
    "no closed form": random_design(STRUCTURES["one factor, q=4"], 2, n=60),
    "one class": balanced(),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.usefixtures("x64")
def test_equal_to_one_by_one(name):
    design = CASES[name]
    Y = responses(design, 6)
    fits = mj.estimate_many(mj.cross_products(design, Y), keep=ALL)
    assert fits.singular.any()
    assert fits.converged.all()
    for i, y in enumerate(Y):
        one = mj.estimate(pad(mj.cross_products(design, y)))
        # The criterion is flat to second order at the minimum; theta is settled to about 1e-9 standard errors.
        np.testing.assert_allclose(fits.criterion[i], one.criterion, rtol=1e-12)
        assert fits.singular[i] == one.singular
        for field in ("theta", "beta", "sigma", "vcov"):
            np.testing.assert_allclose(getattr(fits, field)[i], getattr(one, field), rtol=1e-6, atol=1e-7)
        for ours, theirs in zip((*fits.Sigma, *fits.b), (*one.Sigma, *one.b), strict=True):
            np.testing.assert_allclose(ours[i], theirs[: len(ours[i])], rtol=1e-6, atol=1e-6)


def test_maximum_likelihood_and_starts():
    design = CASES["one class"]
    Y = responses(design, 20)
    stats = mj.cross_products(design, Y)
    fits = mj.estimate_many(stats, reml=False)
    again = mj.estimate_many(stats, reml=False, start=[1.0, 0.0, 1.0])
    np.testing.assert_allclose(fits.criterion, again.criterion, rtol=1e-11)
    with jax.enable_x64(True):
        np.testing.assert_allclose(fits.criterion[4], mj.estimate(mj.cross_products(design, Y[4]), False).criterion)
    settled = mj.estimate_many(stats, reml=False, start=fits.theta)
    np.testing.assert_allclose(settled.criterion, fits.criterion, rtol=1e-12)


def sleepstudy_replicates(B, zero_slopes):
    fit = fit_of("sleepstudy_slopes", "REML")
    rng = np.random.default_rng(11)
    factor = np.linalg.cholesky(fit.Sigma["Subject"])
    if zero_slopes:
        factor[1] = 0.0
    b = rng.normal(size=(B, 18, 2)) @ factor.T
    (term,) = fit.design.terms
    Y = np.asarray(fit.X) @ fit.fixef.to_numpy() + np.einsum("nq,bnq->bn", term.Z, b[:, term.group])
    return fit.design, Y + fit.sigma * rng.normal(size=Y.shape)


@pytest.mark.parametrize("reml", [True, False])
@pytest.mark.parametrize("zero_slopes", [False, True])
def test_a_thousand_replicates_each_at_the_best_of_all_starts(zero_slopes, reml):
    """None is worse than the best of five starts by 1e-6, and none fails; singular is said by all that get there."""
    design, Y = sleepstudy_replicates(1_000, zero_slopes)
    stats = mj.cross_products(design, Y)
    fits = mj.estimate_many(stats, reml)
    starts = np.random.default_rng(0).normal(size=(3, 1_000, 3)) * [[[0.3]], [[1.0]], [[5.0]]]
    others = [mj.estimate_many(stats, reml, start=start) for start in (np.array([1.0, 0.0, 1.0]), *starts)]
    best = np.min([fits.criterion, *(other.criterion for other in others)], axis=0)
    assert fits.converged.all()
    assert (fits.criterion <= best + 1e-6).all()
    for other in others:
        level = np.abs(other.criterion - fits.criterion) < 1e-8
        assert (other.singular == fits.singular)[level].all()
    share = fits.singular.mean()
    assert (0.4 < share < 0.75) if zero_slopes else (0.005 < share < 0.05)
    # Singular means an exact zero: a column of Lambda, seen here as a determinant.
    assert ((fits.theta[:, 0] * fits.theta[:, 2] == 0) == fits.singular).all()


def test_no_search_is_lost_where_nothing_varies():
    """Without any variance many lead into a flat valley; lower ranks are tried there before they have converged."""
    fit = fit_of("sleepstudy_slopes", "REML")
    Y = np.asarray(fit.X).sum(1) + np.random.default_rng(4).normal(size=(4_000, fit.nobs))
    fits = mj.estimate_many(mj.cross_products(fit.design, Y))
    assert fits.converged.all()
    assert fits.iterations.max() <= 60
    assert fits.singular.mean() > 0.8


def test_missing_values_in_one_response_touch_no_other():
    design, Y = sleepstudy_replicates(50, False)
    clean = mj.estimate_many(mj.cross_products(design, Y))
    Y[7, 3], Y[9] = np.nan, np.inf
    fits = mj.estimate_many(mj.cross_products(design, Y))
    assert fits.result[7] == fits.result[9] == Result.NOT_FINITE
    rest = np.delete(np.arange(50), [7, 9])
    for field in ("theta", "beta", "sigma", "criterion"):
        np.testing.assert_array_equal(getattr(fits, field)[rest], getattr(clean, field)[rest])


@cache
def three_blocks():
    design, Y = sleepstudy_replicates(9_000, True)
    stats = mj.cross_products(design, Y)
    return design, Y, mj.estimate_many(stats, engine="jax")


@pytest.mark.parametrize("n", [32, 160, 304, 1_600])
@pytest.mark.parametrize("p", [1, 2, 5])
def test_products_of_a_response_do_not_depend_on_the_block_it_comes_with(n, p):
    """Also where blocks are of another size, or worked off in slices: to the last bit, from any multiple of 1024 on."""
    rng = np.random.default_rng(n + p)
    group = np.repeat(np.arange(8), n // 8)
    term = mj.RandomTerm(Z=np.ones((n, 1)), group=group, n_groups=8)
    design = mj.Design(y=np.zeros(n), X=np.column_stack([np.ones(n), rng.normal(size=(n, p - 1))]), terms=(term,))
    B = 20_000 if n < 200 else 3_000
    Y = rng.normal(size=(B, n))
    whole = mj.cross_products(design, Y)
    for start in (1_024, 2_048, (B - 1) // 1_024 * 1_024):
        part = mj.cross_products(design, Y[start:])
        for a, b in ((whole.beta0, part.beta0), (whole.yy, part.yy), (whole.factors[0].Zy, part.factors[0].Zy)):
            np.testing.assert_array_equal(a[start:], b)


@pytest.mark.parametrize("engine", ["jax", "numpy"])
def test_results_do_not_depend_on_chunks_or_on_how_many_there_are(engine):
    design, Y, fits = three_blocks()
    stats = mj.cross_products(design, Y)
    if engine == "numpy":  # the three blocks themselves are JAX's
        fits = mj.estimate_many(stats, engine=engine)
    for other, B in (
        (mj.estimate_many(stats, chunk=1, engine=engine), 9_000),
        (mj.estimate_many(mj.cross_products(design, Y[:5_000]), engine=engine), 5_000),
    ):
        for field in many.KEEP:
            np.testing.assert_array_equal(getattr(other, field), getattr(fits, field)[:B], err_msg=field)


def test_several_threads_of_three_effects_a_level():
    """Six parameters, several blocks at a time: nothing in the program waits for the pool of threads that runs it."""
    m, n = 12, 7
    x = np.tile(np.arange(n) - 3.0, m)
    Z = np.column_stack([np.ones(m * n), x, x**2 / 4])
    term = mj.RandomTerm(Z=Z, group=np.repeat(np.arange(m), n), n_groups=m)
    design = mj.Design(y=np.zeros(m * n), X=Z, terms=(term,))
    fits = mj.estimate_many(mj.cross_products(design, responses(design, 9_000, scale=0.6)), engine="jax")
    assert fits.converged.mean() > 0.999


def test_eigenvalues_of_stacks():
    rng = np.random.default_rng(0)
    for k in (1, 2, 3, 5, 6, 8):
        F = rng.normal(size=(k, k, 20))
        H = F + np.swapaxes(F, 0, 1)
        H[..., 0] = np.eye(k)[:, :]
        with jax.enable_x64(True):
            values, vectors = decompositions.eigh(H)
            columns, singular = decompositions.orthogonal_columns(F)
            # One negative eigenvalue is enough, wherever elimination meets it.
            shifted = H - (np.asarray(values[0]) + rng.choice([-0.1, 0.1], 20)) * np.eye(k)[..., None]
            positive = decompositions.is_positive(shifted)
        np.testing.assert_array_equal(positive, np.linalg.eigvalsh(np.moveaxis(shifted, -1, 0))[:, 0] > 0)
        np.testing.assert_allclose(values, np.linalg.eigvalsh(np.moveaxis(H, -1, 0)).T, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(np.einsum("ijm,jm,kjm->ikm", vectors, values, vectors), H, atol=1e-12)
        np.testing.assert_allclose(singular, np.linalg.svd(np.moveaxis(F, -1, 0))[1].T, rtol=1e-10)
        np.testing.assert_allclose(np.einsum("ijm,kjm->ikm", columns, columns), np.einsum("ijm,kjm->ikm", F, F))


def test_one_shape_compiles_once():
    design, Y, _ = three_blocks()
    before = many._fit_block._cache_size()
    mj.estimate_many(mj.cross_products(design, Y[:10] + 3.0), reml=False, engine="jax")
    other = balanced(m=18, n=10)
    mj.estimate_many(mj.cross_products(other, responses(other, 3)), engine="jax")
    assert many._fit_block._cache_size() == before


def test_a_batch_of_different_designs():
    rng = np.random.default_rng(0)
    structures = [
        random_design(Structure(((2, m, "free"), (1, k, "free"))), seed, n=n)
        for seed, (m, k, n) in enumerate([(9, 5, 40), (7, 4, 35), (12, 3, 60), (9, 5, 44)])
    ]
    # In the last one the second factor happens to hold the first.
    group = structures[3].terms[0].group
    nested = replace(structures[3].terms[1], group=rng.integers(0, 5, 9)[group])
    designs = [*structures[:3], replace(structures[3], terms=(structures[3].terms[0], nested))]
    designs = [replace(d, y=responses(d, 2, seed=i)[1]) for i, d in enumerate(designs)]
    fits = mj.estimate_many(mj.stack([mj.cross_products(d) for d in designs]), keep=ALL)
    assert fits.b[0].shape == (4, 12, 2)
    with jax.enable_x64(True):
        for i, design in enumerate(designs):
            one = mj.estimate(pad(mj.cross_products(design)))
            np.testing.assert_allclose(fits.criterion[i], one.criterion, rtol=1e-12)
            np.testing.assert_allclose(fits.theta[i], one.theta, rtol=1e-6, atol=1e-7)
            np.testing.assert_allclose(fits.beta[i], one.beta, rtol=1e-6)
            m = design.terms[0].n_groups
            np.testing.assert_allclose(fits.b[0][i, :m], one.b[0][:m], rtol=1e-5, atol=1e-6)
            np.testing.assert_array_equal(fits.b[0][i, m:], 0.0)


def test_what_is_not_kept_is_none():
    design = CASES["one class"]
    fits = mj.estimate_many(mj.cross_products(design, responses(design, 3)), keep=("beta",))
    assert fits.beta.shape == (3, 2)
    assert all(value is None for name, value in fits._asdict().items() if name != "beta")


def test_bad_input():
    design = CASES["one class"]
    stats = mj.cross_products(design, responses(design, 3))
    with pytest.raises(ValueError, match=r"\['ranef'\]"):
        mj.estimate_many(stats, keep=("ranef",))
    with pytest.raises(ValueError, match="of one response"):
        mj.estimate_many(mj.cross_products(design))
    with pytest.raises(TypeError, match="cross_products"):
        mj.estimate_many(design)
    with pytest.raises(TypeError, match="outside jit"):
        jax.jit(mj.estimate_many)(stats)
    with pytest.raises(ValueError, match=r"y has shape \(3, 7\), but X has 72 rows"):
        mj.cross_products(design, np.zeros((3, 7)))
    with pytest.raises(ValueError, match="already a batch"):
        mj.stack([stats])
    with pytest.raises(ValueError, match="data set 1 has another structure"):
        mj.stack([mj.cross_products(design), mj.cross_products(CASES["crossed"])])
    with pytest.raises(ValueError, match="at least one"):
        mj.stack([])


def test_one_minimum_is_known_where_it_is_so():
    """Balanced, the fixed effects' estimates free of the covariances: singular ends need no second search."""
    days, group = np.tile(np.arange(10.0), 18), np.repeat(np.arange(18), 10)
    ones, between = np.ones(180), np.repeat(np.random.default_rng(0).normal(size=18), 10)
    Z = np.column_stack([ones, days])

    def known(X, *Zs, group=group, structure="us"):
        terms = tuple(mj.RandomTerm(Z=Z, group=group, n_groups=18, structure=structure) for Z in Zs or (Z,))
        design = mj.Design(y=days, X=X, terms=terms)
        return batch_room._has_one_minimum(mj.cross_products(design, np.zeros((2, len(days)))))

    assert known(Z)
    assert known(np.column_stack([Z, days**2]))
    assert known(Z, Z[:, :1])
    assert not known(ones[:, None])  # a random slope without a fixed one
    assert not known(np.column_stack([Z, between]))
    assert not known(np.column_stack([Z, between * days]))
    assert not known(Z, Z[:, :1], Z[:, 1:])  # convex over all covariances, not over the uncorrelated ones
    assert not known(Z, structure="diag")
    assert not known(Z, group=np.random.default_rng(0).permutation(group))  # the days differ between the groups


@pytest.mark.parametrize("reml", [True, False])
def test_one_minimum_changes_no_result(reml, monkeypatch):
    design, Y = sleepstudy_replicates(300, True)
    stats = mj.cross_products(design, Y)
    quick = mj.estimate_many(stats, reml)
    monkeypatch.setattr(batch_room, "_has_one_minimum", lambda stats: False)
    twice = mj.estimate_many(stats, reml)
    assert quick.singular.mean() > 0.3
    assert quick.iterations.mean() < 0.6 * twice.iterations.mean()
    for name in ("theta", "criterion", "singular", "result"):
        np.testing.assert_array_equal(getattr(quick, name), getattr(twice, name))


def test_refit_many_names_and_counts():
    fit = fit_of("sleepstudy_slopes", "REML")
    _, Y = sleepstudy_replicates(40, True)
    Y[0] = np.asarray(table("sleepstudy")["Reaction"])
    Y[5, 0] = np.nan
    batch = fit.refit_many(Y)
    frame = batch.to_frame()
    assert len(batch) == len(frame) == 40
    np.testing.assert_allclose(frame.loc[0, ["Intercept", "Days"]].to_numpy(float), fit.fixef, rtol=1e-10)
    np.testing.assert_allclose(batch.se.loc[0], fit.se, rtol=1e-6)
    columns = ["sd_Intercept|Subject", "cor_Days.Intercept|Subject", "sd_Days|Subject", "sigma"]
    expected = fit.varcorr.to_frame()["sdcor"].to_numpy()[[0, 2, 1, 3]]
    np.testing.assert_allclose(frame.loc[0, columns].to_numpy(float), expected, rtol=1e-6)
    assert batch.counts["fits"] == 40
    assert batch.counts["failed"] == batch.counts["failed: NOT_FINITE"] == 1
    assert batch.counts["converged"] == 39 == len(batch.ok)
    assert batch.counts["singular"] == batch.singular.sum() > 5
    assert "39 converged" in repr(batch)
    with pytest.raises(mj.DataError, match=r"\(B, 180\)"):
        fit.refit_many(Y[0])


def test_a_response_without_noise_fails_alone():
    fit = fit_of("sleepstudy_slopes", "REML")
    _, Y = sleepstudy_replicates(40, True)
    expected = fit.refit_many(Y)
    Y = Y.copy()
    Y[3], Y[7] = 2 + 3 * table("sleepstudy")["Days"], 5.0
    batch = fit.refit_many(Y)
    assert np.flatnonzero(batch.estimates.result == Result.NO_NOISE).tolist() == [3, 7]
    assert batch.counts["failed: NO_NOISE"] == batch.counts["failed"] == 2
    assert batch.to_frame()["result"].iloc[3] == "NO_NOISE"
    assert not batch.converged[[3, 7]].any()
    others = np.delete(np.arange(40), [3, 7])
    np.testing.assert_array_equal(batch.estimates.theta[others], expected.estimates.theta[others])
    for y, why in (
        (Y[3], "fixed effects reproduce the response 'Reaction' exactly"),
        (Y[7], r"the response 'Reaction' is constant \(5\)"),
    ):
        with pytest.raises(mj.DataError, match=why):
            fit.refit(y)


def test_many_fixed_effects_are_fitted_one_by_one(monkeypatch):
    fit = fit_of("sleepstudy_slopes", "REML")
    stats = mj.cross_products(fit.design, fit.simulate(7, 3))
    in_blocks = mj.estimate_many(stats), mj.satterthwaite(mj.estimate_many(stats), stats, np.eye(2))
    monkeypatch.setattr(sizes, "MOST_COLUMNS", 1)
    est = mj.estimate_many(stats, engine="jax")
    one_by_one = est, mj.satterthwaite(est, stats, np.eye(2))
    for name in ("theta", "beta", "sigma", "criterion"):
        np.testing.assert_allclose(getattr(one_by_one[0], name), getattr(in_blocks[0], name), rtol=1e-6)
    np.testing.assert_allclose(one_by_one[1].df, in_blocks[1].df, rtol=1e-5)


@pytest.mark.parametrize("name", ["sleepstudy_zerocorr", "pastes_nested"])
def test_refit_many_keeps_the_random_effects_of_every_fit(name):
    fit = fit_of(name, "REML")
    Y = np.stack([fit.design.y, fit.design.y[::-1], 2 * fit.design.y])
    batch = fit.refit_many(Y, ranef=True)
    for i, one in enumerate(map(fit.refit, Y)):
        for found, expected in ((batch.ranef(), one.ranef()), (batch.coef(), one.coef())):
            assert list(found) == list(expected)
            for group, frame in expected.items():
                part = found[group].loc[i].rename_axis(None)
                pd.testing.assert_frame_equal(part, frame, rtol=1e-5, atol=1e-6 * fit.sigma)
    with pytest.raises(ValueError, match="ranef=True"):
        fit.refit_many(Y).coef()


def test_responses_in_float32():
    design = CASES["one class"]
    Y = responses(design, 4)
    single = jax.tree.map(lambda a: a.astype(np.float32) if a.dtype == np.float64 else a, mj.cross_products(design, Y))
    with pytest.warns(UserWarning, match="float32"):
        fits = mj.estimate_many(single)
    assert fits.beta.dtype == np.float32
    np.testing.assert_allclose(fits.criterion, mj.estimate_many(mj.cross_products(design, Y)).criterion, rtol=1e-4)
