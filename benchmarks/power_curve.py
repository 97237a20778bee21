"""Claim: power studies take seconds, their data cost little, and a million replicates need little memory.

* A power curve of 6 cells x 10 000 replicates of random slopes (20 to 120 groups of 8), Satterthwaite tests included,
  in under 20 s on 2 cores from a warm process, compiling included; and what share of the time the data take.
* A peer in the same run: PyPI ``mixedlm``'s ``powerSim`` of the cell of 40 groups; at least 200 times slower.
* 1 000 000 replicates of sleepstudy's random slopes (simulate, fit, test, summarise), with the peak memory.
* The same of a binary outcome: 10 cells x 1 000 replicates of logistic random slopes in under 20 s, Wald tests, and
  PyPI ``glmm``'s loop of the fits of one cell.

    python benchmarks/power_curve.py [--million] [--peer] [--binary]
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import pandas as pd

import mixjax as mj

FORMULA = "y ~ x + (x | g)"


def trial(groups: int):
    data = pd.DataFrame({"g": np.repeat(np.arange(groups), 8), "x": np.tile(np.linspace(-1, 1, 8), groups)})
    return mj.scenario(FORMULA, data, beta=[0, 0.3], sd=[1, 0.5], sigma=1)


def curve(replicates: int) -> None:
    mj.lmm("Yield ~ 1 + (1 | Batch)", mj.datasets.load("dyestuff"))  # a warm process
    sizes = [20, 40, 60, 80, 100, 120]
    start = time.perf_counter()
    found = mj.power_curve(trial, FORMULA, "x", {"groups": sizes}, replicates=replicates, key=1, progress=False)
    first = time.perf_counter() - start
    print(found)
    start = time.perf_counter()
    mj.power_curve(trial, FORMULA, "x", {"groups": sizes}, replicates=replicates, key=2, progress=False)
    again = time.perf_counter() - start
    start = time.perf_counter()
    for size in sizes:
        trial(size).simulate(3, replicates)
    data = time.perf_counter() - start
    print(f"6 cells x {replicates} replicates: {first:.1f} s with compiling (target 20 s), {again:.2f} s without, of "
          f"which the data {data:.2f} s ({100 * data / again:.0f} %)\n")  # fmt: skip


def peer(replicates: int = 100_000) -> None:
    import mixedlm

    truth = trial(40)
    mj.power(truth, FORMULA, "x", replicates=1_024, key=1, progress=False)
    start = time.perf_counter()
    mj.power(truth, FORMULA, "x", replicates=replicates, key=2, progress=False)
    each = (time.perf_counter() - start) / replicates
    table = truth.table.assign(y=truth.simulate(1, 1)[0], g=lambda d: d["g"].astype(str))
    fit = mixedlm.lmer(FORMULA, table)
    n = 100
    start = time.perf_counter()
    mixedlm.powerSim(fit, nsim=n)
    own = (time.perf_counter() - start) / n
    print(
        f"mixedlm.powerSim, 40 groups: {1e3 * own:.1f} ms a replicate; mixjax {1e3 * each:.4f} ms: "
        f"{own / each:.0f} times\n"
    )


def million(replicates: int) -> None:
    data = mj.datasets.load("sleepstudy")
    formula = "Reaction ~ Days + (Days | Subject)"
    truth = mj.scenario(formula, data, beta=[250, 10], sd=[25, 6], cor=0.1, sigma=25)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    start = time.perf_counter()
    found = mj.study(truth, formula, replicates=replicates, key=1, progress=False)
    text = str(found)
    took = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    print(text)
    print(f"{replicates} replicates of sleepstudy, simulated, fitted, tested, summarised: {took:.0f} s, peak memory "
          f"{peak:.0f} MB ({before:.0f} MB before)")  # fmt: skip


def binary_trial(groups: int):
    data = pd.DataFrame({"g": np.repeat(np.arange(groups), 10), "x": np.tile(np.linspace(-1, 1, 10), groups)})
    return mj.scenario(FORMULA, data, beta=[-0.5, 0.6], sd=[1, 0.5], cor=0.3, family="binomial")


def binary(replicates: int, with_peer: bool) -> None:
    sizes = list(range(20, 120, 10))
    took = []
    for key in (1, 2):
        start = time.perf_counter(), time.process_time()
        found = mj.power_curve(binary_trial, FORMULA, "x", {"groups": sizes}, replicates=replicates, key=key,
                               progress=False)  # fmt: skip
        took.append((time.perf_counter() - start[0], time.process_time() - start[1]))
    print(found)
    fits = len(sizes) * replicates
    print(f"binary: {len(sizes)} cells x {replicates} replicates: {took[0][0]:.1f} s first (target 20 s), "
          f"{took[1][0]:.1f} s again, {took[1][1]:.1f} s of CPU, {1e3 * took[1][1] / fits:.2f} ms a fit")  # fmt: skip
    if not with_peer:
        return
    import glmm

    truth = binary_trial(60)
    n = 50
    Y = truth.simulate(1, n)
    columns = truth.table.assign(g=lambda d: d["g"].astype(str)).to_dict("list")
    start = time.process_time()
    for y in Y:
        glmm.fit({**columns, "y": y.tolist()}, FORMULA, "binomial")
    own = (time.process_time() - start) / n
    start = time.process_time()
    mj.power(truth, FORMULA, "x", replicates=replicates, key=3, progress=False)
    each = (time.process_time() - start) / replicates
    print(f"60 groups: glmm {1e3 * own:.1f} ms of CPU a fit, mixjax {1e3 * each:.2f}, with data and tests: "
          f"{own / each:.1f} times")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=10_000)
    parser.add_argument("--million", action="store_true")
    parser.add_argument("--peer", action="store_true")
    parser.add_argument("--binary", action="store_true", help="the binary outcome alone")
    args = parser.parse_args()
    if args.binary:
        binary(min(args.replicates, 1_000), args.peer)
        return
    curve(args.replicates)
    if args.peer:
        peer()
    if args.million:
        million(1_000_000)


if __name__ == "__main__":
    main()
