"""Claim: the estimator finds the best maximum known, with the right flag, on small and awkward data sets.

Small random designs (20-60 rows, unequal groups, some empty) of nine structures, responses simulated with variance
ratios from 0 to 900 and covariances of any rank; and sleepstudy's design with variances that are there or not. Each is
fitted from the estimator's own start and from four random ones; a fit is bad when another start ends more than 1e-5
below it, and flags differ when starts end at one height with and without "singular".

    python benchmarks/robustness.py --sets 200
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

import mixjax as mj
from mixjax.products.sums import pad

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from designs import STRUCTURES, Structure, random_design

STARTS = (0.1, 1.0, 10.0, 1.0)  # scales of the random starts


def simulated(structure: Structure, seed: int) -> mj.Design:
    """A random design with a response whose random effects have a random covariance of random size and rank."""
    rng = np.random.default_rng(seed + 777)
    design = random_design(structure, seed, n=int(rng.integers(20, 60)))
    scale = rng.choice([0, 0.3, 1, 5, 30.0])
    weights = 1.0 if design.weights is None else design.weights
    n, p = design.X.shape
    y = design.X @ rng.normal(size=p) + design.offset + rng.normal(size=n) / np.sqrt(weights)
    for term in design.terms:
        q = term.Z.shape[1]
        L = np.tril(rng.normal(size=(q, q))) * scale
        if rng.random() < 0.3:
            L[:, rng.integers(q) :] = 0
        y = y + (term.Z * (rng.normal(size=(term.n_groups, q)) @ L.T)[term.group]).sum(1)
    return replace(design, y=y)


def sleepstudy(sds: tuple[float, float], correlation: float, seed: int) -> mj.Design:
    """A simulated response on sleepstudy's design, residual sd 25.6."""
    rng = np.random.default_rng(seed)
    design, _ = mj.build_design("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
    z = rng.normal(size=(18, 2))
    b = np.column_stack([z[:, 0], correlation * z[:, 0] + np.sqrt(1 - correlation**2) * z[:, 1]]) * sds
    (term,) = design.terms
    y = design.X @ [251.4, 10.5] + (term.Z * b[term.group]).sum(1) + 25.6 * rng.normal(size=180)
    return replace(design, y=y)


SMALL = {name: partial(simulated, structure) for name, structure in STRUCTURES.items()}
SLEEPSTUDY = {
    "sleepstudy, as fitted": partial(sleepstudy, (24.7, 5.9), 0.07),
    "sleepstudy, no slope variance": partial(sleepstudy, (24.7, 0.0), 0.0),
    "sleepstudy, no variance": partial(sleepstudy, (0.0, 0.0), 0.0),
    "sleepstudy, correlation 1": partial(sleepstudy, (24.7, 5.9), 1.0),
}


def judge(design: mj.Design, seed: int) -> tuple[mj.Estimates, float, bool]:
    """The fit, how far it ends above the best of five, and whether ends of one height disagree about singularity."""
    stats = pad(mj.cross_products(design))
    k = sum(term.Z.shape[1] * (term.Z.shape[1] + 1) // 2 for term in design.terms)
    starts = [scale * np.random.default_rng(10 * seed + j).normal(size=k) for j, scale in enumerate(STARTS)]
    fits = [mj.estimate(stats), *(mj.estimate(stats, start=start) for start in starts)]
    criteria = np.array([float(fit.criterion) for fit in fits])
    best = np.nanmin(criteria)
    flags = {bool(fit.singular) for fit, value in zip(fits, criteria, strict=True) if value - best < 1e-8}
    return fits[0], criteria[0] - best, len(flags) > 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=200, help="data sets per structure")
    sets = parser.parse_args().sets
    print(f"{'structure':<34}{'singular':>9}{'failed':>8}{'bad':>5}{'flags':>7}{'evaluations (max)':>20}{'seconds':>9}")
    total: Counter[str] = Counter()
    with jax.enable_x64(True):
        for name, make in {**SMALL, **SLEEPSTUDY}.items():
            start, counts, evaluations, worst = time.perf_counter(), Counter(), [], []
            for seed in range(sets):
                fit, gap, disagree = judge(make(seed), seed)
                counts += Counter(singular=int(fit.singular), failed=int(not fit.converged), flags=int(disagree))
                evaluations.append(int(fit.iterations))
                if gap > 1e-5:
                    counts["bad"] += 1
                    worst.append((seed, round(gap, 4)))
            total += counts
            print(
                f"{name:<34}{counts['singular']:>9}{counts['failed']:>8}{counts['bad']:>5}{counts['flags']:>7}"
                f"{np.mean(evaluations):>13.1f} ({max(evaluations)}){time.perf_counter() - start:>9.0f}"
            )
            for seed, gap in worst:
                print(f"    seed {seed}: {gap} above the best known")
    outcome = f"{total['bad']} bad, {total['failed']} failed, {total['flags']} flags differ"
    print(f"\n{sets * len(SMALL | SLEEPSTUDY)} data sets: {outcome}")


if __name__ == "__main__":
    main()
