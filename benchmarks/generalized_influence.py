"""Claim: leaving out every row of a generalised fit with several grouping factors takes less than 2 s of CPU, exactly.

Cases of ``tests/glmm_cases.py``: 644 rows of 23 sites crossed with 7 species (binomial), 403 rows with an effect each
in broods and places (Poisson), and, of one factor, 599 rows of 27 nests with correlated slopes. The loop is of bare
fits without single rows (``mj.glmm_estimate`` with the row's weight zero), of a dozen of them. ``beta`` is the largest
difference of fixed effects, in standard errors; the last column the correlation of Cook's distances.

    python benchmarks/generalized_influence.py
"""

from __future__ import annotations

import platform
import sys
import time
import warnings
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np

import mixjax as mj

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from glmm_cases import fit_of

MODELS = ("salamanders_presence", "grouseticks", "owls_slopes")
LOOP = 12


def main() -> None:
    warnings.simplefilter("ignore")
    print(f"{date.today()}, {platform.processor() or platform.machine()}, seconds of CPU")
    print("model                   rows   exact  one step    loop  ratio   beta  Cook's, one step")
    for model in MODELS:
        fit = fit_of(model)
        rows, n = fit.record.rows, fit.nobs
        seconds, found = {}, {}
        for method in ("exact", "one-step"):
            start = time.process_time()
            found[method] = fit.influence(method=method)
            seconds[method] = time.process_time() - start
        some = np.linspace(0, n - 1, LOOP).astype(int)
        start, far = time.process_time(), 0.0
        for u in some:
            alone = mj.glmm_estimate(replace(rows, weights=np.where(np.arange(n) == u, 0.0, 1.0)))
            far = max(far, float(np.abs((found["exact"].beta.iloc[u] - alone.beta) / fit.se).max()))
        loop = (time.process_time() - start) / LOOP * n
        alike = np.corrcoef(found["exact"].cooks, found["one-step"].cooks)[0, 1]
        print(
            f"{model:22s} {n:5d} {seconds['exact']:7.2f} {seconds['one-step']:9.2f} {loop:7.1f} "
            f"{loop / seconds['exact']:6.0f}  {far:.0e} {alike:.5f}"
        )


if __name__ == "__main__":
    main()
