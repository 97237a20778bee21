"""Coverage of the intervals of ``GLMMFit.predict``: of the mean of a level, of the median subject, of the average over
subjects, and of new responses.

    python benchmarks/glmm_coverage.py [replicates]

Claim: 95 % intervals cover 95 % where there are enough levels for the variances to be known; new responses of counts
more, because counts are whole. With few levels all are short, as all are that take estimated variances for normal.
"""

from __future__ import annotations

import sys
import time
import warnings

import numpy as np
import pandas as pd

import mixjax as mj
from mixjax.families import family_of

# family, link, psi, trials, levels, rows of a level, sd of the levels, intercept
DESIGNS = [
    ("binomial", "logit", (), 1, 100, 8, 1.0, -0.5),
    ("binomial", "logit", (), 10, 30, 6, 0.8, -0.5),
    ("binomial", "probit", (), 10, 10, 6, 0.5, -0.5),
    ("poisson", "log", (), 0, 30, 6, 0.6, 1.0),
    ("nbinom", "log", (0.7,), 0, 40, 6, 0.6, 1.0),
    ("gamma", "log", (-1.2,), 0, 30, 6, 0.5, 0.0),
]
KINDS = ("level, mean", "level, response", "new level, response", "median", "average")
SLOPE = 0.4


def covered(found: pd.DataFrame, truth: np.ndarray) -> np.ndarray:
    return ((found["lower"] <= truth + 1e-9) & (found["upper"] >= truth - 1e-9)).to_numpy()


def measure(design: tuple, n: int, rng: np.random.Generator) -> dict[str, float]:
    name, link, psi, trials, levels, rows, sd, intercept = design
    family = family_of(name, link)
    table = pd.DataFrame({"g": np.repeat(np.arange(levels), rows), "x": np.tile(np.linspace(-1, 1, rows), levels)})
    size = None if not trials else np.full(len(table), float(trials))
    table["n"] = 1.0 if size is None else size
    options = {"size": "n"} if trials > 1 else {}
    fixed = intercept + SLOPE * table["x"].to_numpy()
    at = table.iloc[:rows]
    new = {"size": trials} if options else {}
    hits = {kind: [] for kind in KINDS}
    start = None
    for _ in range(n):
        b = sd * rng.normal(size=levels)
        eta = fixed + b[table["g"]]
        y = family.sample(rng, eta, size, list(psi))
        try:
            if start is None:
                start = mj.glmm("y ~ x + (1 | g)", table.assign(y=y), name, link, **options)
            fit = start.refit(y)
        except mj.DataError:
            continue
        if not fit.converged:
            continue
        share = 1.0 if size is None else size[:rows]
        mean = np.asarray(family.mean(eta[:rows]))
        hits["level, mean"].append(covered(fit.predict(at, interval="confidence"), mean))
        again = family.sample(rng, eta[:rows], size if size is None else size[:rows], list(psi)) / share
        hits["level, response"].append(covered(fit.predict(at, interval="prediction", **new), again))
        other = fixed[:rows] + sd * rng.normal(size=rows)
        again = family.sample(rng, other, size if size is None else size[:rows], list(psi)) / share
        hits["new level, response"].append(covered(fit.predict(at, random=False, interval="prediction", **new), again))
        median = np.asarray(family.mean(fixed[:rows]))
        hits["median"].append(covered(fit.predict(at, random=False, interval="confidence"), median))
        average = np.asarray(family.integrated_mean(fixed[:rows], np.full(rows, sd**2)))
        hits["average"].append(covered(fit.predict(at, integrate=True, interval="confidence"), average))
    return {kind: float(np.mean(found)) for kind, found in hits.items()} | {"fits": len(hits["median"])}


def main() -> None:
    n = int(sys.argv[1]) if len(sys.argv) > 1 else 1000
    rng = np.random.default_rng(1)
    print("| family | levels x rows | sd | " + " | ".join(KINDS) + " | fits |")
    print("|" + "---|" * (4 + len(KINDS)))
    for design in DESIGNS:
        begin = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = measure(design, n, rng)
        name, link, _, trials, levels, rows, sd, _ = design
        title = f"{name} ({link}){f', {trials} trials' if trials else ''}"
        cells = " | ".join(f"{100 * found[kind]:.1f}" for kind in KINDS)
        print(f"| {title} | {levels} x {rows} | {sd} | {cells} | {found['fits']} |", flush=True)
        print(f"{time.process_time() - begin:.0f} s of CPU", file=sys.stderr)


if __name__ == "__main__":
    main()
