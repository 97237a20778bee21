"""One source, two ways to run it: NumPy's numbers beside JAX's, which of them fits a batch, and users' threads."""

import itertools
import threading
from dataclasses import replace

import jax
import numpy as np
import pandas as pd
import pytest
from conftest import table
from designs import STRUCTURES, Structure, random_design, random_theta

import mixjax as mj
from mixjax import covariance as cov
from mixjax.engine.curvature import slopes_of, value_gradient_hessian
from mixjax.engine.engine import AtOnce
from mixjax.engine.moments import moments_of
from mixjax.estimation.choice import chosen_engine
from mixjax.estimation.estimate import fit as fit_engine
from mixjax.products.sizes import has_closed_form
from mixjax.products.sums import pad


@pytest.fixture(scope="module", autouse=True)
def _optimised_programs():
    """Programs as users have them, with all of XLA's optimisations (see conftest.py), beside NumPy."""
    least = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()
    yield
    jax.config.update("jax_disable_most_optimizations", least)
    jax.clear_caches()


SLOPES = "Reaction ~ Days + (Days | Subject)"
WIDE = {
    "one factor, q=3": Structure(((3, 8, "free"),)),
    "crossed, q=2 and 2": Structure(((2, 12, "free"), (2, 5, "free"))),
}


@jax.jit
def by_jax(x, stats, reml):
    moments = moments_of(stats)
    found = slopes_of(x, moments, reml)
    return (*value_gradient_hessian(x, moments, reml), found.XX_inverse, found.log_rss)


@pytest.mark.parametrize("name", ["one factor, q=2, weights", "two terms on a factor", "nested chain of three",
                                  "crossed, three factors, weights", *WIDE])  # fmt: skip
def test_derivatives_agree(name):
    """Value, gradient, Hessian, and what moves with them, to some roundings; also where a column of Lambda vanishes."""
    structure = (STRUCTURES | WIDE)[name]
    for seed, reml in ((3, True), (4, False)):
        stats = mj.cross_products(random_design(structure, seed))
        x = random_theta(structure, seed)[:, None]
        if seed == 4:
            x[0] = 0.0
        moments = moments_of(stats)
        ours = (*value_gradient_hessian(x, moments, reml), *slopes_of(x, moments, reml)[2:])
        assert all(isinstance(a, np.ndarray) for a in ours)
        with jax.enable_x64(True):
            theirs = [np.asarray(a) for a in by_jax(x, pad(stats), np.bool_(reml))]
        scale = np.abs(theirs[2]).max()  # of the derivatives: their terms cancel
        np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-12)
        for a, b in zip(ours[1:], theirs[1:], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * max(scale, np.abs(b).max()))


@pytest.mark.parametrize("name", [*STRUCTURES, *WIDE])
def test_estimates_agree(name):
    """Both start at the same place and go the same way, so that ends differ by rounding; most of them are singular."""
    structure = (STRUCTURES | WIDE)[name]
    for seed, reml in itertools.product(range(4), (True, False)):
        stats = mj.cross_products(random_design(structure, seed))
        ours = AtOnce(stats, reml).run(fit_engine)
        with jax.enable_x64(True):
            theirs = jax.tree.map(np.asarray, mj.estimate(pad(stats), reml))
        assert ours.criterion == pytest.approx(float(theirs.criterion), rel=1e-12)
        for field in ("result", "singular", "iterations"):
            assert getattr(ours, field) == getattr(theirs, field)
        b_theirs = [b[: len(a)] for a, b in zip(ours.b, theirs.b, strict=True)]  # without the levels of the padding
        pairs = [(getattr(ours, field), getattr(theirs, field)) for field in ("theta", "beta", "sigma", "vcov")]
        for a, b in (*pairs, *zip(ours.Sigma, theirs.Sigma, strict=True), *zip(ours.b, b_theirs, strict=True)):
            np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12 * np.abs(b).max())


def batch(kind):
    if kind == "classes":
        fit = mj.lmm(SLOPES, table("sleepstudy"))
        return mj.cross_products(fit.design, fit.simulate(1, 300))
    if kind == "levels":
        fit = mj.lmm(SLOPES, table("sleepstudy").sample(frac=0.8, random_state=1))
        return mj.cross_products(fit.design, fit.simulate(1, 200))
    if kind == "crossed":
        fit = mj.lmm("diameter ~ 1 + (1 | plate) + (1 | sample)", table("Penicillin"))
        return mj.cross_products(fit.design, fit.simulate(1, 100))
    tables = [table("sleepstudy").sample(frac=0.7, random_state=i) for i in range(40)]
    return mj.stack([mj.cross_products(mj.build_design(SLOPES, one)[0]) for one in tables])


KEEP = ("theta", "beta", "sigma", "criterion", "iterations", "result", "singular", "vcov", "Sigma", "b")


@pytest.mark.parametrize("kind", ["classes", "levels", "crossed", "stacked"])
def test_batches_agree(kind):
    stats = batch(kind)
    ours, theirs = (mj.estimate_many(stats, keep=KEEP, engine=engine) for engine in ("numpy", "jax"))
    np.testing.assert_allclose(ours.criterion, theirs.criterion, rtol=1e-12)
    np.testing.assert_array_equal(ours.result, theirs.result)
    np.testing.assert_array_equal(ours.singular, theirs.singular)
    np.testing.assert_array_equal(ours.iterations, theirs.iterations)
    tolerance = np.full(len(theirs.theta), 1e-12)
    if kind == "crossed":
        # Beside the samples' effects the products of the intercept cancel to this part of what they were.
        plate, sample = theirs.theta.T
        tolerance = 2 * np.finfo(float).eps * (1 + 6 * plate**2) * (1 + 24 * sample**2)
    for name in ("theta", "beta", "sigma", "vcov", "Sigma", "b"):
        for a, b in zip(jax.tree.leaves(getattr(ours, name)), jax.tree.leaves(getattr(theirs, name)), strict=True):
            a, b = (np.reshape(part, (len(tolerance), -1)) for part in (a, b))
            assert (np.abs(a - b) <= tolerance[:, None] * np.abs(b).max(1, keepdims=True)).all(), name
    start = theirs.theta[0] + 0.1
    from_there = mj.estimate_many(stats, start=start, engine="numpy")
    np.testing.assert_allclose(from_there.criterion, theirs.criterion, rtol=1e-10)


def test_a_lane_does_not_depend_on_the_others():
    fit = mj.lmm(SLOPES, table("sleepstudy"))
    Y = fit.simulate(7, 700)
    whole = mj.estimate_many(mj.cross_products(fit.design, Y), engine="numpy")
    for part in (slice(0, 1), slice(0, 37), slice(100, 612)):
        some = mj.estimate_many(mj.cross_products(fit.design, Y[part]), engine="numpy")
        for name in ("theta", "beta", "sigma", "criterion", "iterations"):
            np.testing.assert_array_equal(getattr(some, name), getattr(whole, name)[part])


def test_one_fit_is_a_batch_of_one():
    fit = mj.lmm(SLOPES, table("sleepstudy"))
    many = fit.refit_many(fit.simulate(3, 5), ranef=True)
    for i, y in enumerate(fit.simulate(3, 5)):
        one = fit.refit(y).estimates
        assert one.criterion == pytest.approx(many.estimates.criterion[i], rel=1e-13)
        np.testing.assert_allclose(many.estimates.b[0][i], one.b[0], rtol=1e-8, atol=1e-8 * np.abs(one.b[0]).max())


def test_failures_stay_in_their_lanes():
    fit = mj.lmm(SLOPES, table("sleepstudy"))
    Y = fit.simulate(3, 20)
    Y[7, 3] = np.nan
    many = mj.estimate_many(mj.cross_products(fit.design, Y), engine="numpy")
    assert (~many.converged).nonzero()[0].tolist() == [7]
    assert many.result[7] == mj.Result.NOT_FINITE


# --- which of them fits a batch --------------------------------------------------------------------------------------


def test_the_engine_is_chosen_by_sizes():
    fit = mj.lmm(SLOPES, table("sleepstudy"))
    stats = mj.cross_products(fit.design, fit.simulate(1, 2))
    assert chosen_engine(stats, 1_000) == "numpy"
    assert chosen_engine(stats, 1_000_000) == "jax"
    assert chosen_engine(stats, 1_000_000, "numpy") == "numpy"
    assert chosen_engine(stats, 10, "jax") == "jax"
    single = jax.tree.map(lambda a: a.astype(np.float32) if np.asarray(a).dtype == np.float64 else a, stats)
    assert chosen_engine(single, 10) == "jax"
    with pytest.raises(ValueError, match=r"does not serve these fits .not in float64.; use engine='auto'"):
        chosen_engine(single, 10, "numpy")


@pytest.mark.parametrize("call", [
    lambda fit, Y: fit.refit_many(Y, engine="C"), lambda fit, Y: fit.bootstrap(1, 5, engine="C"),
    lambda fit, Y: mj.estimate_many(mj.cross_products(fit.design, Y), engine="C"),
    lambda fit, Y: mj.power(mj.scenario(SLOPES, table("sleepstudy"), beta=[250, 3], sd=[25, 6], sigma=25), SLOPES,
                            "Days", engine="C")])  # fmt: skip
def test_unknown_engines(call):
    fit = mj.lmm(SLOPES, table("sleepstudy"))
    with pytest.raises(ValueError, match="engine must be 'auto', 'numpy' or 'jax', got 'C'"):
        call(fit, fit.simulate(1, 2))


def test_a_study_goes_on_by_the_engine_that_it_began_with(tmp_path, monkeypatch):
    from mixjax.studies import outcomes

    asked = []
    choose = outcomes.chosen_engine
    monkeypatch.setattr(outcomes, "chosen_engine", lambda stats, n, *rest: asked.append(n) or choose(stats, n, *rest))
    source = mj.scenario(
        "y ~ 1 + (1 | g)", pd.DataFrame({"g": np.repeat(list("abcdef"), 4)}), beta=[1], sd=[1], sigma=1
    )
    for replicates in (50, 2_000):
        mj.study(source, "y ~ 1 + (1 | g)", replicates=replicates, key=1, store=tmp_path, progress=False)
    assert set(asked) == {50}


# --- threads and settings of the caller's ----------------------------------------------------------------------------


@pytest.mark.parametrize("q", [2, 3, 4])
@pytest.mark.parametrize("n_threads", [2, 8])
def test_threads_of_the_users(q, n_threads):
    """Models of 3, 7 and 10 covariance parameters: with more than six XLA's LAPACK calls waited for each other."""
    rng = np.random.default_rng(q)
    x, g, h = rng.normal(size=(240, 3)), np.repeat(np.arange(20), 12), np.tile(np.arange(6), 40)
    data = pd.DataFrame(x, columns=["a", "b", "c"]).assign(g=g.astype(str), h=h.astype(str))
    data["y"] = rng.normal(size=240) + rng.normal(size=20)[g] + x[:, 0] * rng.normal(size=20)[g]
    slopes = " + ".join("abc"[: q - 1])
    fit = mj.lmm(f"y ~ {slopes} + ({slopes} | g){' + (1 | h)' if q == 3 else ''}", data)
    assert len(fit.theta) == {2: 3, 3: 7, 4: 10}[q]
    Y = fit.simulate(1, 12)
    alone = fit.refit_many(Y).estimates.theta
    found = [None] * n_threads

    def work(i):
        found[i] = fit.refit_many(Y).estimates.theta

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    for theta in found:
        np.testing.assert_array_equal(theta, alone)


@pytest.mark.slow
def test_settings_that_look_for_mistakes_in_the_callers_code():
    fit = mj.lmm("Yield ~ 1 + (1 | Batch)", table("Dyestuff"))
    stats = mj.cross_products(fit.design, fit.simulate(1, 20))
    wanted = mj.estimate_many(stats, engine="numpy").theta
    with jax.numpy_rank_promotion("raise"), jax.debug_nans(True), jax.checking_leaks():
        np.testing.assert_allclose(mj.estimate_many(stats, engine="jax").theta, wanted, rtol=1e-9)
        with jax.enable_x64(True):
            one = mj.cross_products(fit.design)
            assert float(mj.estimate(one).criterion) == pytest.approx(fit.criterion, rel=1e-12)
            assert float(mj.criterion(fit.theta, one)) == pytest.approx(fit.criterion, rel=1e-12)


# --- models that are too wide to compile -----------------------------------------------------------------------------


def maximal():
    """60 subjects by 24 items, two crossed treatments, all effects of which vary over both."""
    rng = np.random.default_rng(1)
    s, i = (a.ravel() for a in np.meshgrid(np.arange(60), np.arange(24), indexing="ij"))
    A, B = (np.where((s // k + i // k) % 2 == 0, 0.5, -0.5) for k in (1, 2))
    X = np.column_stack([np.ones(len(s)), A, B, A * B])
    by_subject = np.tril(rng.normal(size=(4, 4))) * 20 + np.diag([60, 20, 20, 15])
    by_item = np.tril(rng.normal(size=(4, 4))) * 10 + np.diag([30, 10, 10, 8])
    b, c = rng.normal(size=(60, 4)) @ by_subject.T, rng.normal(size=(24, 4)) @ by_item.T
    y = X @ [600, 20, -15, 10] + (X * b[s]).sum(1) + (X * c[i]).sum(1) + rng.normal(size=len(s)) * 80
    return pd.DataFrame({"y": y, "A": A, "B": B, "subj": s.astype(str), "item": i.astype(str)})


def test_a_maximal_crossed_model():
    """REML criterion of glmm 0.6.2 for these data: 17034.177111200; of lme4 1.1-31: 17034.18."""
    fit = mj.lmm("y ~ A * B + (1 + A * B | subj) + (1 + A * B | item)", maximal())
    assert fit.converged
    assert fit.criterion <= 17034.177111200 + 1e-6
    assert fit.criterion == pytest.approx(17034.177111200, abs=1e-6)


def test_many_fits_of_a_model_without_a_compiled_closed_form():
    fit = mj.lmm("y ~ A + (1 + A * B | subj) + (1 | item)", maximal())
    stats = mj.cross_products(fit.design, fit.simulate(2, 3))
    assert not has_closed_form(replace(stats, classes=None))
    assert chosen_engine(stats, 10**9) == "numpy"
    many = mj.estimate_many(stats)
    for i, y in enumerate(fit.simulate(2, 3)):
        assert many.criterion[i] == pytest.approx(fit.refit(y).criterion, rel=1e-12)


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("q", [6, 7, 8, 12, 13])
def test_any_number_of_effects_a_level(q):
    """NumPy inverts their matrices in several ways, by size; 7 to 12 effects once had none that worked."""
    rng = np.random.default_rng(q)
    group, effect = np.repeat(np.arange(30), 2 * q), np.tile(np.arange(q), 60)
    y = rng.normal(size=len(group)) + rng.normal(size=(30, q))[group, effect]
    term = mj.RandomTerm(Z=np.eye(q)[effect], group=group, n_groups=30)
    stats = mj.cross_products(mj.Design(y=y, X=np.ones((len(y), 1)), terms=(term,)))
    engine = AtOnce(stats, True)
    x = np.concatenate([s.near(0.7 * np.eye(q)) for s in stats.layout.structures])
    theta = cov.theta_of_lambda(stats.Z_bases[0].R_inv @ (0.7 * np.eye(q)), q)
    assert float(engine.profiled(x).criterion) == pytest.approx(float(mj.criterion(theta, stats)), rel=1e-12)
