"""Many random replicates of generalised linear mixed models: how every search ended, and whether a sample of the ends
is what it says.

Five designs, two families: ordinary ones, two rows a level, a prevalence of 5 %, few levels, random slopes. Of each
kind of end a sample is looked at again, alone:

* converged: from other starts no lower criterion is found, by more than 1e-7;
* separated, unbounded: the criterion falls on along the direction of the last step, or the single fit ends so too;
* any other end counts as unexplained, and is printed.

    python benchmarks/generalized_sweep.py [--fits 2000] [--sample 20]
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace

import numpy as np

import mixjax as mj


def design(levels: int, rows: int, q: int, seed: int) -> mj.Design:
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(levels), rows)
    X = np.column_stack([np.ones(levels * rows), rng.normal(size=levels * rows)])
    term = mj.RandomTerm(Z=X[:, :q], group=group, n_groups=levels)
    return mj.Design(y=np.zeros(levels * rows), X=X, terms=(term,))


# name: family, levels, rows a level, effects, intercept, standard deviation
DESIGNS = {
    "logistic, 40 x 10": ("binomial", 40, 10, 1, -0.5, 1.0),
    "logistic, 100 x 2": ("binomial", 100, 2, 1, -0.5, 1.0),
    "logistic, 40 x 10, 5 %": ("binomial", 40, 10, 1, -3.2, 0.7),
    "logistic slopes, 30 x 8": ("binomial", 30, 8, 2, -0.3, 0.7),
    "Poisson slopes, 15 x 6": ("poisson", 15, 6, 2, 0.3, 0.5),
}


def responses(d: mj.Design, family: str, intercept: float, sd: float, B: int) -> np.ndarray:
    rng = np.random.default_rng(7)
    group, Z = np.asarray(d.terms[0].group), np.asarray(d.terms[0].Z)
    b = sd * rng.normal(size=(B, d.terms[0].n_groups, Z.shape[1])) * np.array([1.0, 0.5])[: Z.shape[1]]
    eta = intercept + 0.6 * np.asarray(d.X)[:, 1] + np.einsum("bnq,nq->bn", b[:, group], Z)
    if family == "binomial":
        return (rng.random(eta.shape) < 1 / (1 + np.exp(-eta))).astype(float)
    return rng.poisson(np.exp(eta)).astype(float)


def other_starts(q: int) -> list[np.ndarray]:
    """theta near zero, large, and of opposite correlation."""
    if q == 1:
        return [np.array([0.05]), np.array([3.0])]
    return [np.array([0.1, 0.0, 0.1]), np.array([2.0, -1.0, 0.8]), np.array([0.7, 0.5, 0.1])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fits", type=int, default=2000, help="replicates of each design")
    parser.add_argument(
        "--sample", type=int, default=20, help="replicates of each kind of end that are looked at again"
    )
    parser.add_argument("--engine", default="auto", choices=("auto", "numpy", "jax"))
    arguments = parser.parse_args()
    for name, (family, levels, rows, q, intercept, sd) in DESIGNS.items():
        d = design(levels, rows, q, seed=1)
        data = mj.rows(d, family, responses(d, family, intercept, sd, arguments.fits))
        start = time.perf_counter()
        found = mj.glmm_estimate_many(data, engine=arguments.engine)
        seconds = time.perf_counter() - start
        codes = {mj.Result(code).name: int(n) for code, n in enumerate(np.bincount(found.result)) if n}
        unexplained, lower = [], []
        for code in np.unique(found.result):
            mine = np.flatnonzero(found.result == code)
            for i in mine[:: max(1, len(mine) // arguments.sample)]:
                one = replace(data, y=data.y[i])
                if mj.Result(code).is_solution:
                    ends = [mj.glmm_estimate(one, start=theta) for theta in other_starts(q)]
                    best = min((e.criterion for e in ends if e.converged), default=np.inf)
                    if best < found.criterion[i] - 1e-7:
                        lower.append((int(i), float(found.criterion[i] - best)))
                elif mj.Result(code) in (mj.Result.SEPARATED, mj.Result.UNBOUNDED):
                    alone = mj.glmm_estimate(one)
                    if alone.converged and alone.criterion < found.criterion[i] + 1e-6:
                        unexplained.append((int(i), mj.Result(code).name, "alone it converges"))
                else:
                    unexplained.append((int(i), mj.Result(code).name))
        print(
            f"{name}: {codes}, singular {int(found.singular.sum())}, {1e3 * seconds / arguments.fits:.2g} ms a fit; "
            f"lower from other starts {lower}; unexplained {unexplained}",
            flush=True,
        )


if __name__ == "__main__":
    main()
