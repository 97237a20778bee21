"""Many random replicates of generalised linear mixed models: how every search ended, and whether a sample of the ends
is what it says.

Five designs, two families: ordinary ones, two rows a level, a prevalence of 5 %, few levels, random slopes. Of each
kind of end a sample is looked at again, alone:

* converged: from other starts no lower criterion is found, by more than 1e-7;
* separated, unbounded: the criterion falls on along the direction of the last step, or the single fit ends so too;
* any other end counts as unexplained, and is printed.

    python benchmarks/generalized_sweep.py [--fits 2000] [--sample 20]
    python benchmarks/generalized_sweep.py --fits 200000 --sample 100    # a million
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np

import mixjax as mj


def design(levels: int, rows: int, q: int, seed: int) -> mj.Design:
    rng = np.random.default_rng(seed)
    group = np.repeat(np.arange(levels), rows)
    X = np.column_stack([np.ones(levels * rows), rng.normal(size=levels * rows)])
    term = mj.RandomTerm(Z=X[:, :q], group=group, n_groups=levels)
    return mj.Design(y=np.zeros(levels * rows), X=X, terms=(term,))


PART = 20_000
FALLING = (mj.Result.SEPARATED, mj.Result.UNBOUNDED)
# name: family, levels, rows a level, effects, intercept, standard deviation
DESIGNS = {
    "logistic, 40 x 10": ("binomial", 40, 10, 1, -0.5, 1.0),
    "logistic, 100 x 2": ("binomial", 100, 2, 1, -0.5, 1.0),
    "logistic, 40 x 10, 5 %": ("binomial", 40, 10, 1, -3.2, 0.7),
    "logistic slopes, 30 x 8": ("binomial", 30, 8, 2, -0.3, 0.7),
    "Poisson slopes, 15 x 6": ("poisson", 15, 6, 2, 0.3, 0.5),
}


def responses(d: mj.Design, family: str, intercept: float, sd: float, B: int, part: int) -> np.ndarray:
    rng = np.random.default_rng((7, part))
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
        ends: Counter[str] = Counter()
        sampled: Counter[str] = Counter()
        singular, seconds = 0, 0.0
        unexplained: list[str] = []
        for part, first in enumerate(range(0, arguments.fits, PART)):
            B = min(PART, arguments.fits - first)
            data = mj.rows(d, family, responses(d, family, intercept, sd, B, part))
            start = time.perf_counter()
            found = mj.glmm_estimate_many(data, engine=arguments.engine)
            seconds += time.perf_counter() - start
            singular += int(found.singular.sum())
            for code in np.unique(found.result):
                mine, kind = np.flatnonzero(found.result == code), mj.Result(code)
                ends[kind.name] += len(mine)
                share = -(-arguments.sample * B // arguments.fits) if kind.is_solution else arguments.sample
                for i in mine[:: max(1, len(mine) // share)][: arguments.sample - sampled[kind.name]]:
                    sampled[kind.name] += 1
                    if said := _looked_at_again(replace(data, y=data.y[i]), kind, float(found.criterion[i]), q):
                        unexplained.append(f"{first + i}: {kind.name}, {said}")
                if not (kind.is_solution or kind in FALLING):
                    unexplained += [f"{first + i}: {kind.name}" for i in mine]
        print(
            f"{name}: {dict(ends)}, singular {singular}, {1e3 * seconds / arguments.fits:.2g} ms a fit; "
            f"looked at again {dict(sampled)}; unexplained {unexplained}",
            flush=True,
        )


def _looked_at_again(one: Any, kind: mj.Result, criterion: float, q: int) -> str:
    """What is wrong with an end, or nothing."""
    if kind.is_solution:
        ends = [mj.glmm_estimate(one, start=theta) for theta in other_starts(q)]
        best = min((e.criterion for e in ends if e.converged), default=np.inf)
        return f"lower by {criterion - best:.2g} from another start" if best < criterion - 1e-7 else ""
    if kind in FALLING:
        alone = mj.glmm_estimate(one)
        return "alone it converges" if alone.converged and alone.criterion < criterion + 1e-6 else ""
    return ""


if __name__ == "__main__":
    main()
