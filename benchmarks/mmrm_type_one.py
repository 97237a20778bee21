"""Claim: in small trials with missed visits the t test of a mixed model for repeated measures keeps its level, by
Kenward-Roger's degrees of freedom and errors better than by Satterthwaite's, and z tests do not.

    python benchmarks/mmrm_type_one.py [REPLICATES]

Two arms, four visits, autoregressive correlation 0.6 with standard deviations that grow; between two visits a share of
the subjects drops out, more likely after a high response (missing at random). Tested is the difference at the last
visit, which is zero, by the model that has any covariance and by one with the right structure.
"""

import sys
import time
import warnings

import numpy as np
import pandas as pd

import mixjax as mj

REPLICATES = int(sys.argv[1]) if len(sys.argv) > 1 else 100_000
VISITS = ["v1", "v2", "v3", "v4"]
TEST = "visit[v4]:arm[T.b]"


def trial(n, dropout):
    who = pd.DataFrame({"id": np.arange(n), "arm": np.where(np.arange(n) % 2, "b", "a")})
    table = who.merge(pd.DataFrame({"visit": VISITS}), how="cross")
    return mj.trial("y ~ 0 + visit + visit:arm + us(visit | id)", table, np.zeros(8), sd=[1, 1.2, 1.4, 1.6],
                    cor=("ar1", 0.6), dropout=dropout, dropout_slope=0.5)  # fmt: skip


def main():
    error = np.sqrt(0.05 * 0.95 / REPLICATES)
    print(f"rejections of a true hypothesis at level 0.05, {REPLICATES} trials each (Monte Carlo error {error:.4f})")
    heads = ("subjects", "drop-out", "structure", "wald", "satterth.", "KR", "failed", "CPU s")
    print(" ".join(f"{head:>9}" for head in heads))
    for n, dropout in ((20, 0.1), (30, 0.1), (60, 0.1), (60, 0.2), (200, 0.1)):
        truth = trial(n, dropout)
        for structure in ("us", "ar1h"):
            failed, begun = 0, time.process_time()
            fit = mj.mmrm(
                f"y ~ 0 + visit + visit:arm + {structure}(visit | id)",
                truth.table.assign(y=truth.simulate(0, 1)[0]).fillna({"y": 0.0}),
            )
            hits = dict.fromkeys(("wald", "satterthwaite", "kenward-roger"), 0)
            tested = 0
            for first in range(0, REPLICATES, 10_000):
                Y = truth.simulate(1, min(10_000, REPLICATES - first), first)
                batch = fit.refit_many(Y)
                failed += batch.counts["failed"]
                for ddf in hits:
                    p = batch.test(f"{TEST} = 0", ddf)["p_value"].dropna()
                    hits[ddf] += int((p < 0.05).sum())
                tested += len(p)
            shares = [hits[ddf] / tested for ddf in hits]
            took = time.process_time() - begun
            cells = (n, dropout, structure, *(f"{share:.4f}" for share in shares), failed, f"{took:.0f}")
            print(" ".join(f"{cell:>9}" for cell in cells), flush=True)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        main()
