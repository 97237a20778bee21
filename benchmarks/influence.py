"""Claim: leaving out every row, and every subject, of sleepstudy takes less than a second, exactly.

Targets on 2 cores, ``Reaction ~ Days + (Days | Subject)`` by REML, once compiled:
  * 180 exact refits without a row and 18 without a subject, with all measures, in 1 s together;
  * rows: twice as fast as a loop of bare fits by the fastest peer at hand, 20 times as fast as one by ``mixedlm``;
  * one Newton step: correlation with the refits above 0.99 for Cook's distance and the fixed effects, above 0.95 for
    theta, for rows and for subjects;
  * derivatives of all estimates by all case weights in the time of one refit; correlation with the refits without a row
    above 0.99 for the fixed effects.

Peers in the same run, where they are installed: the PyPI packages ``glmm``, ``mixedlm`` and ``statsmodels``, in a loop
of fits of the table without the unit.

    pip install mixjax glmm mixedlm statsmodels
    python benchmarks/influence.py
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import platform
import time
import warnings
from collections.abc import Callable
from datetime import date
from typing import Any

import jax
import numpy as np
import pandas as pd

import mixjax as mj
from mixjax.diagnostics.influence import METHODS, Influence, influence
from mixjax.diagnostics.sensitivity import sensitivity

warnings.simplefilter("ignore")
FORMULA = "Reaction ~ Days + (Days | Subject)"


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def timed(call: Callable[[], Any], repeats: int = 5) -> tuple[float, float, Any]:
    """Seconds of the first call, and of the best of the others; and the result."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return seconds[0], min(seconds[1:]), result


def with_glmm(data: pd.DataFrame) -> np.ndarray:
    import glmm

    columns = {name: data[name].astype(str).tolist() if name == "Subject" else data[name].tolist() for name in data}
    return np.ravel(glmm.fit(columns, FORMULA, satterthwaite=False).beta)


def with_mixedlm(data: pd.DataFrame) -> np.ndarray:
    import mixedlm

    return np.fromiter(mixedlm.lmer(FORMULA, data).fixef().values(), float)


def with_statsmodels(data: pd.DataFrame) -> np.ndarray:
    import statsmodels.formula.api as smf

    fit = smf.mixedlm("Reaction ~ Days", data, groups="Subject", re_formula="~Days").fit(reml=True)
    return fit.fe_params.to_numpy()


PEERS = {"glmm": with_glmm, "mixedlm": with_mixedlm, "statsmodels": with_statsmodels}


def peer_loop(fit_one: Callable, data: pd.DataFrame, unit: np.ndarray, exact: Influence, most: int) -> tuple:
    """Seconds a unit of a loop of fits, after one to warm up, and how far its fixed effects lie from ours."""
    units = range(min(int(unit.max()) + 1, most))
    tables = [data[unit != u].assign(Subject=lambda d: d["Subject"].astype(str)) for u in units]
    fit_one(tables[0])
    start = time.perf_counter()
    beta = np.stack([fit_one(table) for table in tables])
    return (time.perf_counter() - start) / len(tables), np.abs(beta - exact.beta.to_numpy()[: len(beta)]).max()


def agreement(exact: pd.DataFrame | pd.Series, other: pd.DataFrame | pd.Series) -> float:
    """The lowest correlation among the columns."""
    one, two = (np.asarray(a).reshape(len(a), -1) for a in (exact, other))
    return min(np.corrcoef(one[:, j], two[:, j])[0, 1] for j in range(one.shape[1]))


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-fits", type=int, default=60, help="units that a peer leaves out at most")
    args = parser.parse_args()
    packages = ("mixjax", "jax", *PEERS)
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages if has(name))
    device = jax.devices()[0]
    print(f"{date.today()}, {device.device_kind} x {len(jax.devices())} ({platform.machine()}), {versions}\n")

    data = mj.datasets.load("sleepstudy")
    fit = mj.lmm(FORMULA, data).record
    results, seconds = {}, {}
    print(f"{'':<10}{'method':<14}{'first, s':>10}{'again, ms':>11}{'Cook':>11}{'beta':>11}{'theta':>11}{'sigma':>11}")
    for what, by in (("rows", None), ("subjects", "Subject")):
        for method in METHODS:
            first, again, result = timed(lambda by=by, method=method: influence(fit, by, method))
            results[what, method], seconds[what, method] = result, again
            exact = results[what, "exact"]
            parts = ("cooks", "beta", "theta", "sigma") if method == "one-step" else ("cooks", "beta")
            shown = [agreement(getattr(exact, part), getattr(result, part)) for part in parts]
            cells = "".join(f"{r:>11.6f}" for r in shown) if method != "exact" else ""
            print(f"{what:<10}{method:<14}{first:>10.2f}{again * 1e3:>11.1f}{cells}")
            if method == "one-step":
                met = min(shown[:2]) > 0.99 and shown[2] > 0.95
                print(f"{'':<10}target: correlations above 0.99, 0.99, 0.95: {verdict(met)}")
    total = seconds["rows", "exact"] + seconds["subjects", "exact"]
    print(f"\nexact, rows and subjects: {total * 1e3:.1f} ms; target 1 s: {verdict(total < 1)}")

    first, again, slopes = timed(lambda: sensitivity(fit))
    exact = results["rows", "exact"]
    beta = agreement(exact.dfbeta, slopes[["Intercept", "Days"]])
    sigma = agreement(fit.estimates.sigma - exact.sigma, slopes["sigma"])
    print(
        f"sensitivities, 180 rows x {slopes.shape[1]} estimates: first {first:.2f} s, again {again * 1e3:.1f} ms; "
        f"correlation with refits: beta {beta:.4f}, sigma {sigma:.4f}; target 0.99 for beta: {verdict(beta > 0.99)}\n"
    )

    ratios = {}
    units = {"rows": np.arange(len(data)), "subjects": pd.factorize(data["Subject"])[0]}
    for package in filter(has, PEERS):
        for what, unit in units.items():
            most = 4 if package == "statsmodels" else args.peer_fits
            each, gap = peer_loop(PEERS[package], data, unit, results[what, "exact"], most)
            ratio = each * (int(unit.max()) + 1) / seconds[what, "exact"]
            ratios[package, what] = ratio
            cells = f"{each * 1e3:>8.2f} ms a fit, ratio {ratio:>7.1f}, beta apart {gap:.1e}"
            print(f"loop over {package:<12}{what:<10}{cells}")
    if ratios:
        least = min(ratio for (_, what), ratio in ratios.items() if what == "rows")
        print(f"\nrows, the fastest loop over exact: {least:.1f}; target 2: {verdict(least > 2)}")
    if ("mixedlm", "rows") in ratios:
        ratio = ratios["mixedlm", "rows"]
        print(f"rows, mixedlm over exact: {ratio:.1f}; target 20: {verdict(ratio > 20)}")


if __name__ == "__main__":
    main()
