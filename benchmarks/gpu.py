"""Claim: on a GPU a million mixed models are fitted and tested in about the time that their numbers take to get there.

What docs/performance.md predicts, checked by its first owner with one command; also what the prediction is made of:

    python benchmarks/gpu.py                 # measure: on the GPU if JAX sees one, else a small case on the CPU
    python benchmarks/gpu.py --predict       # bytes and operations of the programs, and times by two devices' peaks
    python benchmarks/gpu.py --fits 1000000 --float32

Measured: fits a second (statistics given, and from Y), Satterthwaite tests, bootstrap draws, one generalised batch, a
large crossed fit; each beside its largest difference from NumPy's fits of the same data on the host, so that a fast
wrong number is seen. Transfers are measured by themselves.

Prediction: operations and bytes of the compiled programs of one evaluation, and numbers of evaluations of real fits
(both from this machine's CPU), by the peaks that the vendors state: NVIDIA H100 SXM5 (datasheet: 34 TFLOPS in FP64,
67 in FP32, HBM3 3.35 TB/s, PCIe gen 5 128 GB/s both ways) and GeForce RTX 4090 (Ada whitepaper: 82.6 TFLOPS in FP32,
1.29 in FP64, GDDR6X 1 008 GB/s, PCIe gen 4 x16 32 GB/s each way). A bound from below: no kernel reaches both peaks.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

import mixjax as mj
from mixjax.estimation.batch import Batch
from mixjax.estimation.lane_program import sizes_for, slice_of
from mixjax.inference.fixed.many import errors_of_many

REACTION = "Reaction ~ Days + (Days | Subject)"
KEEP = ("theta", "beta", "sigma", "criterion", "iterations", "result")


@dataclass(frozen=True)
class Device:
    """Peaks a second: operations in double and in single precision, bytes of memory, bytes to it and from it."""

    name: str
    double: float
    single: float
    memory: float
    link: float


DEVICES = (
    Device("H100 SXM5", 34e12, 67e12, 3.35e12, 64e9),
    Device("RTX 4090", 1.29e12, 82.6e12, 1.008e12, 32e9),
)


@dataclass(frozen=True)
class Model:
    """A model, responses ``(B, n)`` of which are drawn from its fit."""

    name: str
    fit: mj.LMMFit

    def responses(self, B: int) -> np.ndarray:
        return np.asarray(self.fit.simulate(key=1, n=B))


def models_of_sleepstudy() -> list[Model]:
    return [Model("sleepstudy, balanced", mj.lmm(REACTION, mj.datasets.load("sleepstudy")))]


def models() -> list[Model]:
    sleepstudy = mj.datasets.load("sleepstudy")
    unbalanced = sleepstudy.sample(frac=0.8, random_state=1).sort_index().reset_index(drop=True)
    return [
        *models_of_sleepstudy(),
        Model("the same, a fifth of the rows removed", mj.lmm(REACTION, unbalanced)),
        Model(
            "Penicillin, crossed", mj.lmm("diameter ~ 1 + (1 | plate) + (1 | sample)", mj.datasets.load("Penicillin"))
        ),
    ]


# --- prediction ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Of one fit: operations and bytes of memory of all evaluations, bytes there and back, and evaluations."""

    flops: float
    memory: float
    link: float
    evaluations: float

    def seconds(self, device: Device, fits: float, single: bool) -> tuple[float, float, float]:
        """Lower bounds of so many fits: by operations, by memory, by the link."""
        width = 0.5 if single else 1.0
        peak = device.single if single else device.double
        return (
            fits * self.flops / peak,
            fits * width * self.memory / device.memory,
            fits * width * self.link / device.link,
        )


def cost_of(model: Model, B: int = 4096) -> Cost:
    """By the compiled program of one evaluation over the lanes of a tile, on this machine's CPU."""
    stats = mj.cross_products(model.fit.design, model.responses(B))
    with jax.enable_x64(True):
        batch = Batch(stats)
        sizes = sizes_for(batch.shapes, "cpu")
        lanes = slice_of(batch.lanes(slice(0, sizes.block), np.bool_(True)), 0, sizes.lanes, sizes.block)
        x = jnp.full((lanes.layout.k, sizes.lanes), 0.5)
        with jax.numpy_rank_promotion("allow"):
            analysis = jax.jit(lambda x, lanes: lanes.evaluate(x)).lower(x, lanes).compile().cost_analysis()
    found = mj.estimate_many(stats, keep=KEEP, engine="jax")
    evaluations = float(np.mean(found.iterations))
    own = sum(np.size(a) for a in jax.tree.leaves(batch.lanes(slice(0, 2), np.bool_(True))) if np.shape(a)[-1:] == (2,))
    back = sum(np.size(a[0]) for a in (found.theta, found.beta, found.sigma, found.criterion)) + 2
    p = found.beta.shape[1]
    return Cost(
        flops=evaluations * analysis["flops"] / sizes.lanes,
        memory=evaluations * analysis["bytes accessed"] / sizes.lanes,
        link=8.0 * (own / 2 + back + p * p),
        evaluations=evaluations,
    )


def predict(fits: int) -> None:
    print(f"{fits:,} fits, seconds at least: by operations, by memory, by the link; float64, float32")
    for model in models():
        cost = cost_of(model)
        print(
            f"{model.name}: {cost.evaluations:.1f} evaluations, {cost.flops:,.0f} operations, "
            f"{cost.memory:,.0f} bytes of memory, {cost.link:,.0f} bytes over the link, a fit"
        )
        for device in DEVICES:
            both = [cost.seconds(device, fits, single) for single in (False, True)]
            print("   ", device.name, "; ".join(" ".join(f"{s:.3f}" for s in bounds) for bounds in both))


# --- measurement -----------------------------------------------------------------------------------------------------


def timed(call):
    """What a second call gives, its seconds, and those of the first."""
    begin = time.perf_counter()
    call()
    first, begin = time.perf_counter() - begin, time.perf_counter()
    found = call()
    return found, time.perf_counter() - begin, first


def largest_difference(found: mj.Estimates, other: mj.Estimates) -> float:
    """Of the criteria: NumPy's fits of the same data are the judge."""
    return float(np.max(np.abs(np.asarray(found.criterion, float)[: len(other.criterion)] - other.criterion)))


def transfer(megabytes: int) -> None:
    host = np.ones(megabytes * 2**17)
    jax.block_until_ready(jax.device_put(host))
    begin = time.perf_counter()
    there = jax.block_until_ready(jax.device_put(host))
    middle = time.perf_counter()
    np.asarray(there)
    seconds = middle - begin, time.perf_counter() - middle
    print(f"link: {host.nbytes / 1e9 / seconds[0]:.1f} GB/s there, {host.nbytes / 1e9 / seconds[1]:.1f} GB/s back")


def measure(fits: int, single: bool) -> bool:
    device = jax.devices()[0]
    print(f"{device.platform}: {device.device_kind}, jax {jax.__version__}, {'float32' if single else 'float64'}")
    transfer(16 if fits < 100_000 else 1024)
    good = True
    # The criterion of these data is some 1 700: single precision has six digits of it.
    allowed = 0.05 if single else 1e-6
    for model in models():
        Y = model.responses(fits)
        with jax.enable_x64(not single):
            stats, prepared, _ = timed(lambda: mj.cross_products(model.fit.design, Y))  # noqa: B023
            if single:
                stats = jax.tree.map(lambda a: np.float32(a) if np.asarray(a).dtype == np.float64 else a, stats)
            found, seconds, first = timed(lambda: mj.estimate_many(stats, keep=KEEP, engine="jax"))  # noqa: B023
        few = mj.cross_products(model.fit.design, Y[:256])
        worst = largest_difference(found, mj.estimate_many(few, keep=KEEP, engine="numpy"))
        good &= worst <= allowed
        print(
            f"{model.name}: {fits / seconds:,.0f} fits/s, from Y {fits / (seconds + prepared):,.0f}, first call "
            f"{first:.1f} s, {np.mean(found.iterations):.1f} evaluations, criterion off by {worst:.0e} at most"
        )
        if single:
            continue
        with jax.enable_x64(True):
            L = np.eye(found.beta.shape[1])
            (_, df), seconds, _ = timed(lambda: errors_of_many("satterthwaite", found, stats, L, True, "jax"))  # noqa: B023
            other = errors_of_many("satterthwaite", jax.tree.map(lambda a: a[:256], found), few, L, True, "numpy")
        worst = float(np.nanmax(np.abs(df[:256] / other[1] - 1.0)))
        good &= worst <= 1e-4
        print(f"    Satterthwaite's tests: {fits / seconds:,.0f} fits/s, degrees of freedom off by {worst:.0e} at most")
    if not single:
        good &= generalised(min(fits, 100_000)) & crossed()
    print("all numbers are those of the host" if good else "NUMBERS DIFFER FROM THOSE OF THE HOST")
    return good


def generalised(fits: int) -> bool:
    """Logistic models with random intercepts: tiles of lanes go to the device, the rest of the search is the host's."""
    rng = np.random.default_rng(0)
    group, x = np.repeat(np.arange(40), 10), rng.normal(size=400)
    X = np.column_stack([np.ones(400), x])
    design = mj.Design(y=np.zeros(400), X=X, terms=(mj.RandomTerm(np.ones((400, 1)), group, 40),))
    eta = X @ [0.2, 0.5] + rng.normal(size=(fits, 40))[:, group]
    Y = (rng.random((fits, 400)) < 1 / (1 + np.exp(-eta))).astype(float)
    rows = mj.rows(design, mj.families.binomial(), Y)
    keep = ("theta", "criterion", "iterations")
    found, seconds, first = timed(lambda: mj.glmm_estimate_many(rows, keep=keep, engine="jax"))
    few = mj.rows(design, mj.families.binomial(), Y[:64])
    other = mj.glmm_estimate_many(few, keep=keep, engine="numpy")
    worst = float(np.max(np.abs(found.criterion[:64] - other.criterion)))
    print(f"logistic, 40 x 10: {fits / seconds:,.0f} fits/s, first call {first:.1f} s, criterion off by {worst:.0e}")
    return worst <= 1e-6


def crossed() -> bool:
    """One fit with two crossed factors, as a program: dense algebra of the smaller one."""
    m = 2_000 if jax.default_backend() != "cpu" else 150
    rng = np.random.default_rng(0)
    n = 40 * m
    a, b = rng.integers(0, 2 * m, n), rng.integers(0, m, n)
    y = rng.normal(size=2 * m)[a] + rng.normal(size=m)[b] + rng.normal(size=n)
    one = np.ones((n, 1))
    design = mj.Design(y=y, X=one, terms=(mj.RandomTerm(one, a, 2 * m), mj.RandomTerm(one, b, m)))
    stats = mj.cross_products(design)
    with jax.enable_x64(True):
        found, seconds, first = timed(lambda: jax.block_until_ready(mj.estimate(stats)))
    other = mj.lmm("y ~ 1 + (1 | a) + (1 | b)", {"y": y, "a": a, "b": b})
    worst = abs(float(found.criterion) - other.criterion)
    print(f"crossed, {2 * m} x {m}: {seconds:.2f} s, first call {first:.1f} s, criterion off by {worst:.0e}")
    return worst <= 1e-6 * abs(other.criterion)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fits", type=int, help="responses a model (default: a million on a device, 2 000 on a CPU)")
    parser.add_argument("--float32", action="store_true", help="linear models in single precision")
    parser.add_argument("--predict", action="store_true", help="bytes, operations and bounds instead of a measurement")
    options = parser.parse_args(argv)
    if options.predict:
        predict(options.fits or 1_000_000)
        return 0
    return (
        0 if measure(options.fits or (1_000_000 if jax.default_backend() != "cpu" else 2_000), options.float32) else 1
    )


if __name__ == "__main__":
    sys.exit(main())
