"""Claim: one fit is as quick as a user wants it, from a shell and in a loop.

Targets on 2 cores:
  * fresh process to printed summary of sleepstudy: 2.5 s with a warm compilation cache, 8 s with a cold one;
  * repeat call of ``lmm()`` on sleepstudy: 20 ms;
  * a second data set with other n and group count but the same structure compiles nothing;
  * ``import mixjax`` costs at most 0.1 s on top of ``import jax`` and loads no pandas.

Peers in the same run, where they are installed: the PyPI packages ``glmm`` and ``statsmodels``.

    pip install mixjax glmm statsmodels
    python benchmarks/single_fit.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from datetime import date

import numpy as np
import pandas as pd

import mixjax as mj

FORMULAS = {
    "sleepstudy": "Reaction ~ Days + (Days | Subject)",
    "cake": "angle ~ recipe * temperature + (1 | recipe:replicate)",
    "Pastes": "strength ~ 1 + (1 | batch/cask)",
    "chem-sized": "score ~ age + (1 | lea/school)",
}


def chem_sized(seed: int = 0, n: int = 30_000, schools: int = 2_400, leas: int = 131) -> pd.DataFrame:
    """Pupils in schools in authorities, of unequal size, as in the A-level chemistry data."""
    rng = np.random.default_rng(seed)
    lea_of_school = np.sort(rng.integers(0, leas, schools))
    school = rng.choice(schools, n, p=rng.dirichlet(np.full(schools, 2.0)))
    lea = lea_of_school[school]
    age = rng.normal(size=n)
    effects = 0.4 * rng.normal(size=leas)[lea] + 1.1 * rng.normal(size=schools)[school]
    score = 6 + 0.3 * age + effects + 2.3 * rng.normal(size=n)
    # Schools are numbered within their authority, as (1 | lea/school) expects.
    within = school - np.searchsorted(lea_of_school, lea)
    return pd.DataFrame({"score": score, "age": age, "lea": lea.astype(str), "school": within.astype(str)})


def tables() -> dict[str, pd.DataFrame]:
    return {name: mj.datasets.load(name) for name in ("sleepstudy", "cake", "Pastes")} | {"chem-sized": chem_sized()}


# --- fresh processes -----------------------------------------------------------------------------------------------

SNIPPETS = {
    "glmm": """
import csv, glmm
from importlib.resources import files
rows = list(csv.DictReader((files("mixjax.datasets") / "sleepstudy.csv").open()))
data = {"Reaction": [float(r["Reaction"]) for r in rows], "Days": [float(r["Days"]) for r in rows],
        "Subject": [r["Subject"] for r in rows]}
print(glmm.fit(data, "Reaction ~ Days + (Days | Subject)", satterthwaite=False))
""",
    "statsmodels": """
import pandas as pd, statsmodels.formula.api as smf
from importlib.resources import files
data = pd.read_csv(files("mixjax.datasets") / "sleepstudy.csv")
print(smf.mixedlm("Reaction ~ Days", data, groups="Subject", re_formula="~Days").fit(reml=True).summary())
""",
}


def process_seconds(command: list[str], environment: dict[str, str] | None = None) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, env={**os.environ, **(environment or {})}, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode:
        raise RuntimeError(done.stderr)
    return seconds


def median_seconds(command: list[str], runs: int, environment: dict[str, str] | None = None) -> float:
    return statistics.median(process_seconds(command, environment) for _ in range(runs))


def fresh_processes(runs: int, peers: list[str]) -> None:
    print("\nSeconds from process start to printed summary, sleepstudy (median of", runs, "runs)")
    fit = [sys.executable, "-m", "mixjax", "fit", FORMULAS["sleepstudy"], "sleepstudy"]
    cold = []
    for _ in range(max(2, runs // 2)):
        with tempfile.TemporaryDirectory() as folder:
            cold.append(process_seconds(fit, {"MIXJAX_CACHE_DIR": folder}))
    with tempfile.TemporaryDirectory() as folder:
        process_seconds(fit, {"MIXJAX_CACHE_DIR": folder})
        warm = median_seconds(fit, runs, {"MIXJAX_CACHE_DIR": folder})
    report("mixjax, cold cache", statistics.median(cold), 8.0)
    report("mixjax, warm cache", warm, 2.5)
    for peer in peers:
        print(f"  {peer:<28} {median_seconds([sys.executable, '-c', SNIPPETS[peer]], runs):7.2f} s")
    imports = {code: median_seconds([sys.executable, "-c", code], runs) for code in
               ("pass", "import jax", "import jax, mixjax", "import jax, pandas, formulaic")}  # fmt: skip
    print("\nSeconds to import (whole process)")
    for code, seconds in imports.items():
        print(f"  {code:<28} {seconds:7.2f} s")
    report("mixjax on top of jax", imports["import jax, mixjax"] - imports["import jax"], 0.1)
    loaded = subprocess.run([sys.executable, "-c", "import sys, mixjax; print('pandas' in sys.modules)"],
                            capture_output=True, text=True).stdout.strip()  # fmt: skip
    print(f"  import mixjax loads pandas: {loaded} (target False)")


def report(what: str, seconds: float, target: float) -> None:
    verdict = "meets" if seconds <= target else f"misses by {seconds - target:.2f} s"
    print(f"  {what:<28} {seconds:7.2f} s   target {target:g} s: {verdict}")


# --- repeat calls --------------------------------------------------------------------------------------------------


def repeat_call(call, runs: int) -> tuple[float, float]:
    """Seconds of the first call and the median of those after it."""
    times = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times[0], statistics.median(times[1:])


def peer_call(peer: str, name: str, data: pd.DataFrame):
    """A call of a peer on the same model, or None where it cannot."""
    if peer == "glmm":
        import glmm

        columns = {c: (data[c].astype(str) if data[c].dtype.kind not in "if" else data[c].astype(float)).tolist()
                   for c in data}  # fmt: skip
        formula = FORMULAS[name]
        return lambda: glmm.fit(columns, formula, satterthwaite=False)
    import statsmodels.formula.api as smf

    if name == "sleepstudy":
        return lambda: smf.mixedlm("Reaction ~ Days", data, groups="Subject", re_formula="~Days").fit(reml=True)
    if name == "cake":
        frame = data.assign(group=data["recipe"].astype(str) + data["replicate"].astype(str))
        return lambda: smf.mixedlm("angle ~ recipe * temperature", frame, groups="group").fit(reml=True)
    return None  # nested factors: variance components of minutes


def criterion_of(peer: str, result) -> float:
    return -2 * (result.loglik if peer == "glmm" else result.llf)


def repeat_calls(runs: int, peers: list[str]) -> None:
    print("\nMilliseconds of a repeat call in one process (median); criterion above the best of all in brackets")
    head = f"  {'model':<12}{'first call':>12}{'mixjax':>12}" + "".join(f"{p:>26}" for p in peers)
    print(head + "".join(f"{'ratio to ' + p:>22}" for p in peers))
    for name, data in tables().items():
        first, ours = repeat_call(lambda name=name, data=data: mj.lmm(FORMULAS[name], data), runs)
        criteria = {"mixjax": mj.lmm(FORMULAS[name], data).criterion}
        seconds = {"mixjax": ours}
        for peer in peers:
            try:
                call = peer_call(peer, name, data)
                if call is None:
                    continue
                criteria[peer] = criterion_of(peer, call())
                seconds[peer] = repeat_call(call, max(3, runs // 4))[1]
            except Exception as error:
                print(f"  {peer} cannot fit {name}: {error}")
        best = min(criteria.values())
        cells = [f"{first * 1e3:10.0f}  {ours * 1e3:8.2f} [{criteria['mixjax'] - best:.0e}]"]
        for peer in peers:
            known = peer in seconds
            cells.append(f"{seconds[peer] * 1e3:12.2f} [{criteria[peer] - best:.0e}]" if known else f"{'-':>20}")
        cells += [f"{seconds[p] / ours:18.2f}x" if p in seconds else f"{'-':>19}" for p in peers]
        print(f"  {name:<12}" + "  ".join(cells))
        if name == "sleepstudy":
            report("mixjax, repeat, sleepstudy", ours, 0.02)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="fresh processes per figure")
    parser.add_argument("--repeats", type=int, default=40, help="repeat calls per figure")
    arguments = parser.parse_args()
    peers = [p for p in SNIPPETS if importlib.util.find_spec(p)]
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in ("mixjax", "jax", *peers))
    print(
        f"{date.today()}, {os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}, {versions}"
    )
    warnings.simplefilter("ignore")
    fresh_processes(arguments.runs, peers)
    repeat_calls(arguments.repeats, peers)


if __name__ == "__main__":
    main()
