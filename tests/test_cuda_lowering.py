"""Without a GPU: every program of the compiled road is translated for CUDA, in both precisions, and asks for nothing
that only a CPU has.

Arguments are those of real calls, caught where a call hands them to its program; nothing is compiled or run. A program
that calls Python back, or LAPACK, would stand there by name. What is NumPy's by design is named at the end.
"""

import re
import warnings
from dataclasses import replace
from functools import cache, partial
from types import SimpleNamespace
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from designs import STRUCTURES, random_design

import mixjax as mj
from mixjax import simulation
from mixjax.engine.engine import Engine
from mixjax.engine.incidence import incidence
from mixjax.estimation import blocks, glmm_tiles, many
from mixjax.estimation.estimate import fit
from mixjax.estimation.lane_program import fit_block
from mixjax.inference.fixed import contrasts
from mixjax.inference.fixed.many import errors_of_many
from mixjax.inference.random import profile_search
from mixjax.sampling import nuts

# What CUDA's programs may call beside XLA's own: dense algebra of cuSOLVER and cuBLAS, random bits.
OF_THE_DEVICE = re.compile(r"cu(solver|blas|_lu|_threefry)\w*|Sharding")
REACTION = "Reaction ~ Days + (Days | Subject)"


class Caught(Exception):
    pass


def caught(place, name, call):
    """The arguments with which ``call()`` would have called ``place.name``, or what ``place`` has under ``name``."""
    seen = []

    def record(*args, **kwargs):
        seen.append((args, kwargs))
        raise Caught

    of_names = isinstance(place, dict)
    with (
        mock.patch.dict(place, {name: record}) if of_names else mock.patch.object(place, name, record),
        pytest.raises(Caught),
    ):
        call()
    return seen[0]


def on_a_device():
    """Calls believe that their programs run on a GPU, and choose blocks and tiles for it."""
    return mock.patch.object(jax, "default_backend", return_value="gpu")


def lowered(fun, *args, wide, platform="cuda"):
    """The text of the program, its arguments in double or in single precision."""

    def in_precision(leaf):
        leaf = np.asarray(leaf)
        if leaf.dtype.kind == "f":
            return leaf.astype(np.float64 if wide else np.float32)
        return leaf if wide or leaf.dtype.kind != "i" else leaf.astype(np.int32)

    args = jax.tree.map(in_precision, args)
    # Rules of lanes are those of machine.jit; NumPy's constants of a closure keep the precision that they have.
    with jax.enable_x64(wide), jax.numpy_rank_promotion("allow"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of float32
        return jax.export.export(jax.jit(fun), platforms=[platform])(*args).mlir_module()


# --- programs --------------------------------------------------------------------------------------------------------


@cache
def sleepstudy():
    data = mj.datasets.load("sleepstudy")
    one = mj.lmm(REACTION, data)
    Y = np.asarray(one.fitted) + one.sigma * np.random.default_rng(0).normal(size=(50, 180))
    many_stats = mj.cross_products(one.design, Y)
    estimates = mj.estimate_many(many_stats, keep=("theta", "beta", "sigma"))
    return SimpleNamespace(data=data, fit=one, stats=one.stats, many=many_stats, estimates=estimates)


@cache
def herds():
    data = mj.datasets.load("cbpp")
    family = mj.families.binomial()
    one = mj.glmm("incidence ~ period + (1 | herd)", data, family="binomial", size="size")
    design, _ = mj.build_design("incidence ~ period + (1 | herd)", data, family=family, size="size")
    rows = mj.rows(design, family)
    return SimpleNamespace(
        fit=one, design=design, rows=rows, many=mj.rows(design, family, np.stack([np.asarray(design.y)] * 20))
    )


def criterion():
    s = sleepstudy()
    return jax.value_and_grad(mj.criterion), s.fit.theta, s.stats


def criterion_hessian():
    s = sleepstudy()
    return jax.hessian(mj.criterion), s.fit.theta, s.stats


def marginal_loglik():
    s = sleepstudy()
    return jax.value_and_grad(mj.marginal_loglik), mj.to_params(s.fit.estimates), s.fit.design


def estimate(structure):
    def of_random_design():
        stats = mj.cross_products(random_design(STRUCTURES[structure], 0))
        return mj.estimate, stats

    return of_random_design


def gradient_through_estimate():
    s = sleepstudy()
    return jax.grad(lambda stats: mj.estimate(stats).beta[1], allow_int=True), s.stats


def responses_on_the_device():
    """What the host would do otherwise, the sums over rows, too."""
    design = sleepstudy().fit.design
    return jax.vmap(lambda y: mj.estimate(mj.cross_products(design, y)).beta), np.zeros((8, 180))


def crossed_by_sparse_rows():
    rng = np.random.default_rng(0)
    group, item = rng.integers(0, 90, 900), rng.integers(0, 70, 900)
    one = np.ones((900, 1))
    X = np.column_stack([np.ones(900), rng.normal(size=900)])
    terms = (mj.RandomTerm(one, group, 90), mj.RandomTerm(one, item, 70))
    stats = mj.cross_products(mj.Design(rng.normal(size=900), X, terms))
    which = incidence(stats)
    assert which is not None
    return lambda stats, reml, which: fit(Engine(stats, reml, which)), stats, np.bool_(True), which


def lanes_of_lmm():
    with on_a_device():
        (*inputs, sizes), _ = caught(many, "_fit_block", lambda: mj.estimate_many(sleepstudy().many, engine="jax"))
    assert sizes.lanes == 2**15
    return partial(fit_block, sizes=sizes), *inputs


def satterthwaite_of_many():
    s = sleepstudy()
    with on_a_device():
        (fun, lanes, each, shared, sizes), _ = caught(
            blocks, "_in_tiles", lambda: errors_of_many("satterthwaite", s.estimates, s.many, np.eye(2), True, "jax")
        )
    return lambda lanes, each, shared: blocks._in_tiles(fun, lanes, each, shared, sizes), lanes, each, shared


def inference_on_one(fun):
    def of_sleepstudy():
        s, e = sleepstudy(), sleepstudy().fit.estimates

        def of_arrays(stats, theta, beta, sigma, L):
            return fun(Engine(stats, jnp.asarray(True)), theta, beta, sigma, L)

        return of_arrays, s.stats, e.theta, e.beta, e.sigma, np.eye(2)

    return of_sleepstudy


def profile():
    ml = sleepstudy().fit.refit(reml=False)
    with mock.patch.object(profile_search, "in_lanes_held", return_value=False):
        inputs, _ = caught(profile_search, "_minimise", ml.confint)
    return profile_search._minimise, *inputs


def draws_of_the_bootstrap():
    """The fits of its replicates are those of the lanes."""
    (key, first), static = caught(simulation, "_draws", lambda: sleepstudy().fit.bootstrap(key=1, n=20))
    return lambda key, first: simulation._draws(key, first, **static), key, first


def lanes_of_glmm(name, nagq=1):
    """A step of the fits: how the first is begun, and how they go on."""

    def of_herds():
        fun = {fun.__name__: fun for fun in glmm_tiles._PROGRAMS}
        begin = fun["begin_directly"]
        with on_a_device():
            (model, lanes, nodes, start), _ = caught(
                glmm_tiles._PROGRAMS, begin, lambda: mj.glmm_estimate_many(herds().many, engine="jax", nagq=nagq)
            )
        if name == "begin":
            return lambda model: begin(model, lanes, nodes, start), model
        with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
            shapes = jax.eval_shape(lambda model: begin(model, lanes, nodes, start), model)
        state = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
        return lambda model, state: fun["go_on"](model, state, 4, False, nodes, 0.01), model, state

    return of_herds


def glmm_loglik(nagq):
    def of_herds():
        h = herds()
        loglik = jax.value_and_grad(partial(mj.glmm_loglik, nagq=nagq))
        return loglik, mj.GLMMParams(h.fit.estimates.beta, (np.zeros(1),)), h.rows

    return of_herds


def repeated_loglik():
    seen = mj.datasets.load("fev").dropna(subset="FEV1")
    found = mj.mmrm("FEV1 ~ RACE + ARMCD * AVISIT + us(AVISIT | USUBJID)", seen)
    return jax.value_and_grad(mj.repeated_loglik), found.estimates.beta, found.estimates.Sigma[0], found.design


def log_posterior():
    s = sleepstudy()
    priors = mj.priors(intercept=mj.prior.flat()).resolve(s.fit.design, s.fit.labels)
    return jax.value_and_grad(mj.log_posterior), np.zeros(priors.dim), s.stats, priors


def nuts_of_all_chains():
    pytest.importorskip("blackjax", reason='pip install "mixjax[bayes]"')
    inputs, static = caught(nuts, "_chunk", lambda: mj.bayes(REACTION, sleepstudy().data, draws=10, chains=2, key=1))
    key = inputs[2]

    def with_key(words, *others):
        return nuts._chunk(*others[:2], jax.random.wrap_key_data(words), *others[2:], **static)

    return with_key, jax.random.key_data(key), *inputs[:2], *inputs[3:]


PROGRAMS = {
    "criterion and gradient": criterion,
    "criterion's Hessian": criterion_hessian,
    "marginal_loglik and gradient": marginal_loglik,
    **{f"estimate: {name}": estimate(name) for name in ("one factor, q=2, weights", "nested", "crossed")},
    "derivative through estimate": gradient_through_estimate,
    "estimate of many responses, from their rows": responses_on_the_device,
    "estimate: crossed by sparse rows": crossed_by_sparse_rows,
    "lanes of linear models": lanes_of_lmm,
    "Satterthwaite of many": satterthwaite_of_many,
    "Satterthwaite of one": inference_on_one(contrasts._satterthwaite),
    "Kenward-Roger of one": inference_on_one(contrasts._kenward_roger),
    "profile": profile,
    "draws of the bootstrap": draws_of_the_bootstrap,
    "lanes of generalised models, begun": lanes_of_glmm("begin"),
    "lanes of generalised models": lanes_of_glmm("go on"),
    "lanes of generalised models, quadrature": lanes_of_glmm("go on", 5),
    "glmm_loglik and gradient": glmm_loglik(1),
    "glmm_loglik and gradient, quadrature": glmm_loglik(5),
    "repeated_loglik and gradient": repeated_loglik,
    "log_posterior and gradient": log_posterior,
    "NUTS": nuts_of_all_chains,
}


@cache
def program(name):
    return PROGRAMS[name]()


@pytest.mark.parametrize("precision", ["float64", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", PROGRAMS)
def test_cuda_lowering(name, precision):
    text = lowered(*program(name), wide=precision == "float64")
    called = set(re.findall(r"custom_call @([\w.$]+)", text))
    assert not {target for target in called if not OF_THE_DEVICE.fullmatch(target)}
    wide = len(re.findall(r"f64\b", text))
    if precision == "float64":
        assert wide > 100
    elif not name.startswith("draws"):  # whose numbers are always double, as the data are
        assert wide == 0


def test_what_only_a_cpu_has_is_noticed():
    """The same programs for a CPU name LAPACK's routines, and a call of Python has a name too."""
    text = lowered(*program("estimate: crossed by sparse rows"), wide=True, platform="cpu")
    called = set(re.findall(r"custom_call @([\w.$]+)", text))
    assert {target for target in called if not OF_THE_DEVICE.fullmatch(target)}

    def calls_python(x):
        return jax.pure_callback(np.sin, jax.ShapeDtypeStruct(x.shape, x.dtype), x)

    with pytest.raises(ValueError, match="different from the lowering platform cuda"):
        lowered(calls_python, np.ones(3), wide=True)


def test_generalised_models_inside_jit_call_numpy():
    """By design (``estimation/glmm_traced.py``): the optimum is found by NumPy, and only what follows from it is JAX's.
    docs/performance.md says so; who takes this out, takes it out there too."""
    rows = herds().rows

    def through_the_fit(y):
        return mj.glmm_estimate(replace(rows, y=y)).beta

    with jax.enable_x64(True):
        assert "pure_callback" in str(jax.make_jaxpr(through_the_fit)(np.asarray(rows.y)))
    with pytest.raises(ValueError, match="different from the lowering platform cuda"):
        lowered(through_the_fit, np.asarray(rows.y), wide=True)


# --- the host's part -------------------------------------------------------------------------------------------------


def test_blocks_and_tiles_are_a_device_s():
    """Long vectors instead of what fits into a cache; blocks are then as large as memory likes, whatever the model."""
    moments = blocks.Blocks(sleepstudy().many, "cpu"), blocks.Blocks(sleepstudy().many, "gpu")
    cpu, gpu = (found.sizes for found in moments)
    assert (cpu.lanes, gpu.lanes) == (256, 2**15)
    assert gpu.narrow == gpu.lanes
    assert gpu.block == 4 * gpu.lanes
    with on_a_device():
        (model, lanes, *_), _ = caught(
            glmm_tiles._PROGRAMS,
            {fun.__name__: fun for fun in glmm_tiles._PROGRAMS}["begin_directly"],
            lambda: mj.glmm_estimate_many(herds().many, engine="jax"),
        )
    assert lanes >= 2**12
    assert model.data.y.shape[-1] == lanes


@pytest.mark.parametrize("work", ["fits", "tests"])
def test_a_device_is_fed_by_one_thread_and_gives_the_same(work, monkeypatch):
    """The next block is under way before the last one is fetched, without threads of Python."""
    s = sleepstudy()
    rng = np.random.default_rng(1)
    Y = np.asarray(s.fit.fitted) + s.fit.sigma * rng.normal(size=(3 * 64 + 5, 180))
    stats = mj.cross_products(s.fit.design, Y)
    keep = ("theta", "beta", "sigma", "result")
    expected = mj.estimate_many(stats, keep=keep, engine="numpy")

    def no_threads(*_, **__):
        raise AssertionError("a thread of Python")

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr("mixjax.estimation.blocks.ThreadPoolExecutor", no_threads)
    small = blocks.sizes_for(blocks.Batch(stats).shapes, "cpu")._replace(block=64, lanes=16, narrow=16)
    monkeypatch.setattr(blocks, "sizes_for", lambda shapes, platform: small)
    if work == "fits":
        found = mj.estimate_many(stats, keep=keep, engine="jax")
        for name in keep:
            np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-6)
    else:
        with jax.enable_x64(True):
            one, other = (
                errors_of_many("satterthwaite", expected, stats, np.eye(2), True, engine) for engine in ("jax", "numpy")
            )
        for a, b in zip(one, other, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-9)
