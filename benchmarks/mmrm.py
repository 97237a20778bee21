"""Claim: many simulated trials are refitted at 25 times or more the rate that R's package mmrm publishes for one fit,
each by REML to the optimum, with degrees of freedom; one fit of 1 000 patients at 10 visits takes under a second.

    python benchmarks/mmrm.py

mmrm (0.3.18, its vignette "Comparison with other software", median on its authors' machine) takes 56 ms for fev_data,
unstructured, and 3.4 s for bcva_data (1 000 patients, 10 visits). Where R is there, nlme's gls fits the same model in
the same minutes.
"""

import shutil
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import numpy as np
import pandas as pd

import mixjax as mj

FORMULA = "FEV1 ~ RACE + ARMCD * AVISIT + us(AVISIT | USUBJID)"
PUBLISHED, PUBLISHED_TEN = 0.056, 3.4
GLS = """
suppressPackageStartupMessages(library(nlme)); d <- read.csv("{file}"); d <- d[!is.na(d$FEV1), ]
d$t <- as.integer(factor(d$AVISIT)); d <- d[order(d$USUBJID, d$t), ]
fit <- function() gls(FEV1 ~ RACE + ARMCD * AVISIT, d, correlation = corSymm(form = ~ t | USUBJID),
                      weights = varIdent(form = ~ 1 | AVISIT))
m <- fit(); cat(-2 * as.numeric(logLik(m)), system.time(for (i in 1:3) fit())[[1]] / 3)
"""


def cpu(work, n):
    begun = time.process_time()
    for _ in range(n):
        found = work()
    return (time.process_time() - begun) / n, found


def by_gls(data):
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "fev.csv"
        data.to_csv(file, index=False)
        done = subprocess.run(["Rscript", "-e", GLS.format(file=file)], capture_output=True, text=True, check=True)
    return [float(x) for x in done.stdout.split()]


def ten_visits(seed=1, patients=1000, T=10):
    rng = np.random.default_rng(seed)
    who = pd.DataFrame({"id": np.arange(patients), "arm": rng.choice(["a", "b"], patients),
                        "base": rng.normal(size=patients), "race": rng.choice(["x", "y", "z"], patients)})  # fmt: skip
    table = who.merge(pd.DataFrame({"visit": [f"v{t:02d}" for t in range(T)]}), how="cross")
    truth = mj.trial("y ~ base + race + arm * visit + us(visit | id)", table, np.zeros(2 * T + 3),
                     sd=np.linspace(1, 2.5, T), cor=("ar1", 0.8), dropout=0.03)  # fmt: skip
    return table.assign(y=truth.simulate(1, 1)[0]).dropna()


def main():
    data = mj.datasets.load("fev")
    first, fit = cpu(lambda: mj.mmrm(FORMULA, data), 1)
    again, _ = cpu(lambda: fit.refit(), 20)
    record = fit.record
    alone, _ = cpu(lambda: record.refit(record.design.y), 20)
    print(
        f"fev, us(4), p = 10: criterion {fit.criterion:.6f}, first call {1e3 * first:.0f} ms, "
        f"another response {1e3 * alone:.1f} ms of CPU"
    )
    del again
    Y = fit.simulate(key=1, n=10_000)
    took, batch = cpu(lambda: fit.refit_many(Y), 1)
    print(
        f"10 000 trials: {took:.1f} s of CPU, {10_000 / took:.0f} a second, {PUBLISHED * 10_000 / took:.0f} times "
        f"mmrm's published rate; {batch.counts['failed']} failed, largest scaled gradient "
        f"{batch.estimates.grad_norm.max():.1e}"
    )
    for ddf in ("satterthwaite", "kenward-roger"):
        took, _ = cpu(lambda ddf=ddf: batch.test("ARMCD[T.TRT]:AVISIT[T.VIS4] = 0", ddf), 1)
        print(f"  {ddf} tests of all: {took:.1f} s")
    rng = np.random.default_rng(2)
    Z = np.where(rng.random(Y.shape) < 0.1, np.nan, Y)
    took, batch = cpu(lambda: fit.refit_many(Z), 1)
    print(
        f"  with a tenth of the visits missed, each its own: {took:.1f} s, {10_000 / took:.0f} a second, "
        f"{batch.counts['failed']} failed"
    )
    ten = ten_visits()
    formula = "y ~ base + race + arm * visit + us(visit | id)"
    took, one = cpu(lambda: mj.mmrm(formula, ten), 1)
    print(
        f"1 000 patients, us(10), {one.nobs} rows, {one.npar} parameters: {took:.2f} s, {PUBLISHED_TEN / took:.0f} "
        f"times mmrm's published rate; Kenward-Roger F tests {cpu(lambda: one.anova(ddf='kenward-roger'), 1)[0]:.2f} s"
    )
    if shutil.which("Rscript"):
        criterion, seconds = by_gls(data)
        print(
            f"nlme's gls, same model: criterion {criterion:.6f} ({criterion - fit.criterion:+.1e} against ours), "
            f"{1e3 * seconds:.0f} ms, {seconds / alone:.0f} times one refit here"
        )


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
