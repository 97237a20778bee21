"""Claim: what the README's table says. Prints that table, every row with its peers in the same run.

Wall time: of mixjax's first call in a process, imports and compiling included, and after it; of peers after a call
that is not counted. A peer that is not installed, or that cannot do the task, has no entry. Peers: ``glmm``,
``mixedlm``, ``statsmodels``, from the Python package index.

    pip install mixjax glmm mixedlm statsmodels
    python benchmarks/headline.py
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import date

from batched_fits import cases as batches
from batched_fits import has, loop_over_glmm, loop_over_mixedlm, loop_over_statsmodels, simulate
from influence import PEERS as REFITS
from large_fits import fit as fit_by
from large_fits import insteval
from power_curve import FORMULA as TRIAL
from power_curve import trial

import mixjax as mj

SLOPES = "Reaction ~ Days + (Days | Subject)"
PACKAGES = ("mixjax", "glmm", "mixedlm", "statsmodels")


def seconds(call: Callable[[], object], repeats: int = 5, warm: bool = True) -> float:
    """Median of the repeats, after one call that is not counted."""
    if warm:
        call()
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def ours(call: Callable[[], object], repeats: int = 5, scale: float = 1.0) -> dict[str, float]:
    """The first call in this process, and the median of the repeats times ``scale``."""
    start = time.perf_counter()
    call()
    first = time.perf_counter() - start
    return {"first": first, "mixjax": scale * seconds(call, repeats, warm=False)}


def one_fit() -> dict[str, float]:
    data = mj.datasets.load("sleepstudy")
    plain = data.assign(Subject=data["Subject"].astype(str))
    found = ours(lambda: mj.lmm(SLOPES, data), 20)
    return found | {name: seconds(lambda fit=fit: fit(plain)) for name, fit in REFITS.items() if has(name)}


def many_fits(B: int = 100_000) -> dict[str, float]:
    """Seconds per 10 000 fits, cross-products from the responses included."""
    case = batches()["sleepstudy, balanced"]
    fit = mj.lmm(case.formula, case.table)
    Y = simulate(case, fit, B)
    found = ours(lambda: mj.estimate_many(mj.cross_products(fit.design, Y)), 3, 1e4 / B)
    loops = {
        "glmm": (loop_over_glmm, 1_000),
        "mixedlm": (loop_over_mixedlm, 100),
        "statsmodels": (loop_over_statsmodels, 20),
    }
    return found | {name: 1e4 * loop(case, Y[:n])[0] / n for name, (loop, n) in loops.items() if has(name)}


def large_fit() -> dict[str, float]:
    table = insteval()[["y", "service", "s", "d", "cell"]]
    formula = "y ~ service + (1 | s) + (1 | d) + (1 | cell)"
    found = ours(lambda: fit_by("mixjax", table, formula), 3)
    peers = filter(has, ("glmm", "mixedlm"))
    return found | {name: seconds(lambda name=name: fit_by(name, table, formula), 3) for name in peers}


def bootstrap(n: int = 10_000) -> dict[str, float]:
    data = mj.datasets.load("sleepstudy")
    fit = mj.lmm(SLOPES, data)
    found = ours(lambda: fit.bootstrap(key=1, n=n).confint(kind="percentile"), 3)
    if has("mixedlm"):
        import mixedlm

        model = mixedlm.lmer(SLOPES, data.assign(Subject=data["Subject"].astype(str)))
        found["mixedlm"] = n / 100 * seconds(lambda: mixedlm.bootMer(model, nsim=100, seed=1), 1, warm=False)
    return found


def power(n: int = 10_000) -> dict[str, float]:
    """Seconds per 10 000 simulated trials of 40 groups of 8, with the test of the slope."""
    run = lambda key: mj.power(trial(40), TRIAL, "x", replicates=n, key=key, ddf="wald", progress=False)  # noqa: E731
    found = ours(lambda: run(2), 3)
    if has("mixedlm"):
        import mixedlm

        truth = trial(40)
        table = truth.table.assign(y=truth.simulate(1, 1)[0], g=lambda d: d["g"].astype(str))
        fit = mixedlm.lmer(TRIAL, table)
        found["mixedlm"] = n / 100 * seconds(lambda: mixedlm.powerSim(fit, nsim=100), 1, warm=False)
    return found


def deletion() -> dict[str, float]:
    data = mj.datasets.load("sleepstudy")
    fit = mj.lmm(SLOPES, data)
    found = ours(lambda: fit.influence(method="exact"))
    plain = data.assign(Subject=data["Subject"].astype(str))
    for name, refit in REFITS.items():
        if has(name):
            rows = range(0, len(plain), 20 if name == "statsmodels" else 1)
            tables = [plain.drop(index=i) for i in rows]
            once = seconds(lambda refit=refit, tables=tables: [refit(table) for table in tables], 1, warm=False)
            found[name] = once * len(plain) / len(tables)
    return found


ROWS: dict[str, Callable[[], dict[str, float]]] = {
    "one fit: sleepstudy, random slopes": one_fit,
    "10 000 fits of simulated responses": many_fits,
    "10 000 parametric bootstrap replicates, with intervals": bootstrap,
    "power: 10 000 simulated trials, random slopes of 40 groups, Wald test": power,
    "180 refits, each without one row": deletion,
    "InstEval: 73 421 ratings, three crossed factors": large_fit,
}


def in_words(seconds: float) -> str:
    """Two digits: 4.4 ms, 83 ms, 1.2 s, 950 s."""
    value, unit = (seconds * 1e3, "ms") if seconds < 1 else (seconds, "s")
    return f"{float(f'{value:.2g}'):,.{1 if value < 9.95 else 0}f} {unit}"


def cell(value: float | None, own: float) -> str:
    if value is None:
        return ""
    if value == own:
        return f"**{in_words(value)}**"
    return f"{in_words(value)} ({float(f'{value / own:.2g}'):,g} x)"


def prepare() -> None:
    for name in filter(has, PACKAGES):
        importlib.import_module(name)
    if has("statsmodels"):
        importlib.import_module("statsmodels.tools.sm_exceptions")  # switches its warnings on when it is imported
    warnings.simplefilter("ignore")


def main() -> None:
    if len(sys.argv) > 1:  # one row, in a process of its own
        prepare()
        print(json.dumps(ROWS[sys.argv[1]]()))
        return
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("jax", *PACKAGES) if has(name))
    print(f"{date.today()}, {platform.machine()}, Python {platform.python_version()}, {versions}\n")
    print(f"| | mixjax, first call | {' | '.join(PACKAGES)} |\n|---|---|{'---|' * len(PACKAGES)}")
    for what in ROWS:
        row = subprocess.run([sys.executable, __file__, what], capture_output=True, text=True, check=True)
        found = json.loads(row.stdout.splitlines()[-1])
        peers = " | ".join(cell(found.get(name), found["mixjax"]) for name in PACKAGES)
        print(f"| {what} | {in_words(found['first'])} | {peers} |", flush=True)


if __name__ == "__main__":
    main()
