"""Generalised linear mixed models: many fits beside a loop over PyPI ``glmm`` in the same run, and one fit.

The cases are those of ``glmm_peers.py``. The ratio is the loop's wall time per fit over that of one call of
``mixjax.glmm_estimate_many`` with all responses, from the responses on, and beside it that of CPU times of all threads;
the first call, with compiling, has a column of its own. Of four further calls, and of four loops, the fastest counts.
``above`` is the largest -2 log-likelihood of ours above glmm's over the responses that glmm fitted: not positive beyond
rounding where ours is the optimum.

    pip install glmm
    python benchmarks/generalized.py [--case intercepts] [--fits 10000]
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform
import time
from collections.abc import Callable
from datetime import date
from typing import TypeVar

import numpy as np
from glmm_peers import CASES, FITS, in_words

import mixjax as mj

T = TypeVar("T")

NAMES = {"binomial": "binomial", "poisson": "poisson", "negative binomial": "nbinom"}
# Responses of a batch, and of the peer's loop.
BATCHES = {
    "intercepts": (10_000, 200),
    "slopes": (4_000, 200),
    "factorial": (10_000, 200),
    "intercepts, 9 nodes": (10_000, 200),
    "genes, Poisson": (1_000, 20),
    "genes, NB2": (1_000, 10),
}
ONE = ("bacteria", "one, 9 nodes", "InstEval")


# Calls after the first one, of which the fastest counts: ours and the peer's alike.
AGAIN = 4


def taken(work: Callable[[], T]) -> tuple[float, float, T]:
    """Seconds by the clock and of CPU, and what was made."""
    start, cpu = time.perf_counter(), time.process_time()
    found = work()
    return time.perf_counter() - start, time.process_time() - cpu, found


def many(name: str, fits: int | None, engine: str) -> None:
    case, (size, of_peer) = CASES[name], BATCHES[name]
    size = fits or size
    table, Y = case.make(size)
    family = getattr(mj.families, NAMES[case.family])()
    design, _ = mj.build_design(case.formula, table.assign(y=Y[0]), family=family)
    data = mj.rows(design, family, Y)
    first, _, found = taken(lambda: mj.glmm_estimate_many(data, nagq=case.nagq, engine=engine))
    again, cpu, found = min((taken(lambda: mj.glmm_estimate_many(data, nagq=case.nagq, engine=engine))
                             for _ in range(AGAIN)), key=lambda one: one[0])  # fmt: skip
    peer = FITS["glmm"](case, table)
    loops = (taken(lambda: np.array([peer(y) for y in Y[:of_peer]])) for _ in range(AGAIN))
    each, cpu_of_peer, theirs = min(loops, key=lambda one: one[0])
    each, cpu_of_peer, cpu = each / len(theirs), cpu_of_peer / len(theirs), cpu / size
    fine = found.converged[: len(theirs)]
    above = (found.criterion[: len(theirs)] - theirs)[fine].max()
    codes = {mj.Result(code).name: int(n) for code, n in enumerate(np.bincount(found.result)) if n}
    codes |= {"singular": int(found.singular.sum())}
    print(
        f"| {name} | {size} | {in_words(again / size)} | {size / again:.0f} | {first:.1f} s | "
        f"{in_words(each)} | {each * size / again:.1f} | {cpu_of_peer / cpu:.1f} | {above:.0e} | {codes} |",
        flush=True,
    )


def one(name: str) -> None:
    case = CASES["intercepts, 9 nodes" if name == "one, 9 nodes" else name]
    table, Y = case.make(1)
    table = table.assign(y=Y[0])
    taken = []
    for _ in range(1 if name == "InstEval" else 6):
        start = time.perf_counter()
        fit = mj.glmm(case.formula, table, family=NAMES[case.family], nagq=case.nagq)
        taken.append(time.perf_counter() - start)
    peer, theirs = FITS["glmm"](case, table), []
    for _ in range(1 if name == "InstEval" else 6):
        start = time.perf_counter()
        criterion = peer(Y[0])
        theirs.append(time.perf_counter() - start)
    print(
        f"| {name} | {in_words(taken[0])} | {in_words(min(taken))} | {in_words(theirs[0])} | {in_words(min(theirs))} | "
        f"{min(theirs) / min(taken):.2g} | {fit.criterion - criterion:.0e} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", choices=(*BATCHES, *ONE), help="one case only")
    parser.add_argument("--fits", type=int, help="responses of a batch")
    parser.add_argument("--engine", default="auto", help="of the batches: numpy or jax")
    arguments = parser.parse_args()
    named = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mixjax", "jax", "glmm"))
    print(f"{date.today()}, {platform.machine()}, Python {platform.python_version()}, {named}\n")
    chosen = [arguments.case] if arguments.case else [*BATCHES, *ONE]
    if set(chosen) & set(BATCHES):
        print("| many | fits | a fit | fits/s | first call | glmm, a fit | ratio | of CPU | above | codes |\n|---|"
              + "---|" * 9)  # fmt: skip
    for name in chosen:
        if name in BATCHES:
            many(name, arguments.fits, arguments.engine)
    if set(chosen) & set(ONE):
        print("\n| one | first call | again | glmm, first | again | ratio | above |\n|---|" + "---|" * 6)
    for name in chosen:
        if name in ONE:
            one(name)


if __name__ == "__main__":
    main()
