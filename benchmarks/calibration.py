"""Claim: tests and intervals of small samples hold their level where the textbook says so; the table shows where not.

Two small designs, responses simulated with known truth, every replicate refitted and tested in one batch:

* fixed effects: 8 subjects x 6 occasions, random slopes, a treatment between subjects and one within: share of
  replicates in which a true hypothesis is rejected at 5 % (one minus the coverage of the 95 % interval), by Wald,
  Satterthwaite and Kenward-Roger;
* one variance component that is zero, 8 groups x 5 rows: the naive chi-square, the half-half mixture, the exact
  restricted likelihood ratio test.

    python benchmarks/calibration.py --replicates 10000
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import scipy.stats

import mixjax as mj
from mixjax.inference.exact_lrt import least_squares_criterion
from mixjax.inference.spectral import draw, spectrum
from mixjax.simulate import simulate_responses


def share(rejected: np.ndarray) -> str:
    rate = rejected.mean()
    return f"{100 * rate:5.2f} % +- {100 * np.sqrt(rate * (1 - rate) / len(rejected)):.2f}"


def fixed_effects(n: int, key: int) -> None:
    m, occasions = 8, 6
    group = np.repeat(np.arange(m), occasions)
    time_ = np.tile(np.arange(occasions, dtype=float), m)
    treated = (group % 2).astype(float)
    X = np.column_stack([np.ones(m * occasions), time_, treated, treated * time_])
    Z = X[:, :2]
    design = mj.Design(y=np.zeros(len(group)), X=X, terms=(mj.RandomTerm(Z=Z, group=group, n_groups=m),))
    beta, Sigma = np.array([1.0, 0.5, 0.0, 0.0]), np.array([[1.0, 0.1], [0.1, 0.1]])
    start = time.perf_counter()
    Y = simulate_responses(design, beta, 1.0, (Sigma,), key, n)
    stats = mj.cross_products(design, Y)
    est = mj.estimate_many(stats)
    L = np.array([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    print(f"fixed effects, {m} subjects x {occasions}, {n} replicates, {int(est.singular.sum())} of them singular, "
          f"{int((~est.converged).sum())} failed; nominal 5 %")  # fmt: skip
    print(f"{'':16}{'between subjects':>20}{'slope difference':>20}{'no df':>8}")
    for function in (mj.wald, mj.satterthwaite, mj.kenward_roger):
        p = function(est, stats, L).p
        known = ~np.isnan(p).any(1) & est.converged
        between, slope = (share(p[known, j] < 0.05) for j in (0, 1))
        print(f"{function.__name__:16}{between:>20}{slope:>20}{(~known).sum():8d}")
    print(f"{time.perf_counter() - start:.1f} s, compiling included\n")


def variance_component(n: int, key: int) -> None:
    m, rows = 8, 5
    group = np.repeat(np.arange(m), rows)
    X = np.column_stack([np.ones(m * rows), np.linspace(0, 1, m * rows)])
    design = mj.Design(y=np.zeros(m * rows), X=X, terms=(mj.RandomTerm(Z=X[:, :1], group=group, n_groups=m),))
    start = time.perf_counter()
    Y = simulate_responses(design, np.array([1.0, 0.0]), 1.0, (np.zeros((1, 1)),), key, n)
    stats = mj.cross_products(design, Y)
    fits = mj.estimate_many(stats)
    # The null criterion depends on the response through its residual sum of squares alone.
    one = mj.cross_products(design, Y[0])
    df = m * rows - X.shape[1]
    null = least_squares_criterion(one, True) + df * np.log(np.asarray(stats.yy) / float(one.yy))
    statistic = np.maximum(null - fits.criterion, 0.0)
    naive = scipy.stats.chi2.sf(statistic, 1)
    mixture = np.where(statistic < 1e-8, 1.0, 0.5 * naive)
    drawn = np.sort(draw(spectrum(one, True), key + 1, 1_000_000))
    exact = np.where(statistic < 1e-8, 1.0, 1.0 - np.searchsorted(drawn, statistic) / len(drawn))
    print(f"one variance that is zero, {m} groups x {rows}, {n} replicates, statistic 0 in "
          f"{100 * (statistic < 1e-8).mean():.1f} %; share rejected, nominal 5 %")  # fmt: skip
    for name, p in (("naive", naive), ("mixture", mixture), ("exact", exact)):
        print(f"{name:16}{share(p < 0.05):>20}")
    print(f"{time.perf_counter() - start:.1f} s, compiling included\n")


def bootstrap(n: int, key: int) -> None:
    fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
    fit.bootstrap(key, 100).confint(method="bca")
    start = time.perf_counter()
    sample = fit.bootstrap(key, n)
    for method in ("percentile", "basic", "normal", "bca"):
        sample.confint(method=method)
    print(f"{n} parametric bootstrap replicates of sleepstudy's random slopes, with four intervals each: "
          f"{time.perf_counter() - start:.2f} s after compiling (target 3 s for 10 000)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=10_000)
    parser.add_argument("--key", type=int, default=1)
    args = parser.parse_args()
    fixed_effects(args.replicates, args.key)
    variance_component(args.replicates, args.key)
    bootstrap(args.replicates, args.key)


if __name__ == "__main__":
    main()
