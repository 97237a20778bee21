"""Claim: tests and intervals of small samples hold their level where the textbook says so; the tables show where not.

Small designs, responses simulated with known truth, every replicate refitted and tested in one batch:

* fixed effects: 8 subjects x 6 occasions, random slopes, a treatment between subjects and one within: share of
  replicates in which a true hypothesis is rejected at 5 % (one minus the coverage of the 95 % interval), by Wald,
  Satterthwaite and Kenward-Roger;
* one variance component that is zero, 8 groups x 5 rows: the naive chi-square, the half-half mixture, the exact
  restricted likelihood ratio test;
* all parameters, in that design of random slopes and in one of one variance: coverage of 95 % profile intervals, and of
  four parametric bootstrap intervals.

A profile interval covers the truth where the deviance with the parameter held there is within the quantile of the
least: one search for each replicate and parameter, and no ends. ``--check`` compares with the intervals themselves.

    python benchmarks/calibration.py --replicates 10000
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd
import scipy.stats

import mixjax as mj
from mixjax.inference.random.exact_lrt import least_squares_criterion
from mixjax.inference.random.held_parameter import Held, value_of
from mixjax.inference.random.profile import profile, zeta_of_many
from mixjax.inference.random.profile_search import estimates_start
from mixjax.inference.random.spectral import draw, spectrum
from mixjax.resampling import intervals
from mixjax.simulation import simulate_responses

LEVEL = 0.95
# Refits of one call.
REFITS = 40_000


class Study(NamedTuple):
    """A design with its truth.

    Attributes:
        Sigma: of the one random term. truth: name -> the parameter, and its value. formula, data: the same for lmm.
    """

    title: str
    design: mj.Design
    beta: np.ndarray
    sigma: float
    Sigma: np.ndarray
    truth: dict[str, tuple[Held, float]]
    formula: str
    data: pd.DataFrame


def random_slopes() -> Study:
    m, occasions = 8, 6
    group = np.repeat(np.arange(m), occasions)
    time_ = np.tile(np.arange(occasions, dtype=float), m)
    treated = (group % 2).astype(float)
    X = np.column_stack([np.ones(m * occasions), time_, treated, treated * time_])
    design = mj.Design(y=np.zeros(len(group)), X=X, terms=(mj.RandomTerm(Z=X[:, :2], group=group, n_groups=m),))
    beta, Sigma = np.array([1.0, 0.5, 0.0, 0.0]), np.array([[1.0, 0.1], [0.1, 0.1]])
    truth = {
        "sd_Intercept|g": (Held("sd", 0, 0), 1.0),
        "cor_time.Intercept|g": (Held("cor", 0, 1, 0), np.sqrt(0.1)),
        "sd_time|g": (Held("sd", 0, 1), np.sqrt(0.1)),
        "sigma": (Held("sigma"), 1.0),
    }
    fixed = ("Intercept", "time", "treated", "time:treated")
    truth |= {name: (Held("fixed", i=j), beta[j]) for j, name in enumerate(fixed)}
    data = pd.DataFrame({"g": [f"s{i}" for i in group], "time": time_, "treated": treated})
    title = f"random slopes, {m} subjects x {occasions}"
    return Study(title, design, beta, 1.0, Sigma, truth, "y ~ time * treated + (time | g)", data)


def one_variance(sd: float) -> Study:
    m, rows = 8, 5
    group, x = np.repeat(np.arange(m), rows), np.linspace(0, 1, m * rows)
    X = np.column_stack([np.ones(m * rows), x])
    design = mj.Design(y=np.zeros(m * rows), X=X, terms=(mj.RandomTerm(Z=X[:, :1], group=group, n_groups=m),))
    truth = {
        "sd_Intercept|g": (Held("sd", 0, 0), sd),
        "sigma": (Held("sigma"), 1.0),
        "Intercept": (Held("fixed", i=0), 1.0),
        "x": (Held("fixed", i=1), 0.0),
    }
    data = pd.DataFrame({"g": [f"s{i}" for i in group], "x": x})
    title = f"one variance, {m} groups x {rows}"
    Sigma = np.array([[sd**2]])
    return Study(title, design, np.array([1.0, 0.0]), 1.0, Sigma, truth, "y ~ x + (1 | g)", data)


def responses(study: Study, key: int, n: int) -> np.ndarray:
    return simulate_responses(study.design, study.beta, study.sigma, (study.Sigma,), key, n)


def share(hit: np.ndarray) -> str:
    rate = hit.mean()
    return f"{100 * rate:5.2f} % +- {100 * np.sqrt(rate * (1 - rate) / len(hit)):.2f}"


# --- tests ----------------------------------------------------------------------------------------------------------


def fixed_effects(n: int, key: int) -> None:
    study = random_slopes()
    start = time.perf_counter()
    stats = mj.cross_products(study.design, responses(study, key, n))
    est = mj.estimate_many(stats)
    L = np.array([[0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 1.0]])
    print(f"fixed effects, {study.title}, {n} replicates, {int(est.singular.sum())} of them singular, "
          f"{int((~est.converged).sum())} failed; nominal 5 %")  # fmt: skip
    print(f"{'':16}{'between subjects':>20}{'slope difference':>20}{'no df':>8}")
    for function in (mj.wald, mj.satterthwaite, mj.kenward_roger):
        p = function(est, stats, L).p
        known = ~np.isnan(p).any(1) & est.converged
        between, slope = (share(p[known, j] < 0.05) for j in (0, 1))
        print(f"{function.__name__:16}{between:>20}{slope:>20}{(~known).sum():8d}")
    print(f"{time.perf_counter() - start:.1f} s, compiling included\n")


def variance_component(n: int, key: int) -> None:
    study = one_variance(0.0)
    start = time.perf_counter()
    Y = responses(study, key, n)
    stats = mj.cross_products(study.design, Y)
    fits = mj.estimate_many(stats)
    # The null criterion depends on the response through its residual sum of squares alone.
    one = mj.cross_products(study.design, Y[0])
    df = Y.shape[1] - len(study.beta)
    null = least_squares_criterion(one, True) + df * np.log(np.asarray(stats.yy) / float(one.yy))
    statistic = np.maximum(null - fits.criterion, 0.0)
    naive = scipy.stats.chi2.sf(statistic, 1)
    mixture = np.where(statistic < 1e-8, 1.0, 0.5 * naive)
    drawn = np.sort(draw(spectrum(one, True), key + 1, 1_000_000))
    exact = np.where(statistic < 1e-8, 1.0, 1.0 - np.searchsorted(drawn, statistic) / len(drawn))
    print(f"{study.title} that is zero, {n} replicates, {int((~fits.converged).sum())} failed, statistic 0 in "
          f"{100 * (statistic < 1e-8).mean():.1f} %; share rejected, nominal 5 %")  # fmt: skip
    for name, p in (("naive", naive), ("mixture", mixture), ("exact", exact)):
        print(f"{name:16}{share(p[fits.converged] < 0.05):>20}")
    print(f"{time.perf_counter() - start:.1f} s, compiling included\n")


# --- intervals ------------------------------------------------------------------------------------------------------


def profile_coverage(study: Study, n: int, key: int, check: int) -> None:
    z = scipy.stats.norm.ppf(0.5 + LEVEL / 2)
    start = time.perf_counter()
    Y = responses(study, key, n)
    stats = mj.cross_products(study.design, Y)
    est = mj.estimate_many(stats, reml=False)
    zetas = {name: zeta_of_many(stats, est, held, value) for name, (held, value) in study.truth.items()}
    seconds = time.perf_counter() - start
    print(f"profile intervals, {study.title}, {n} replicates (ML), {int(est.singular.sum())} of them singular, "
          f"{int((~est.converged).sum())} fits failed; coverage, nominal 95 %")  # fmt: skip
    print(f"{'':22}{'covered':>18}{'below':>9}{'above':>9}{'failed':>8}")
    for name, (zeta, converged) in zetas.items():
        inside = np.abs(zeta[converged]) <= z
        # The truth lies below the interval where it lies far below the estimate.
        below, above = (100 * (side * zeta[converged] > z).mean() for side in (-1, 1))
        print(f"{name:22}{share(inside):>18}{below:7.2f} %{above:7.2f} %{int((~converged).sum()):8d}")
    print(f"{seconds:.1f} s, compiling included\n")
    if check:
        compared, same = 0, 0
        for i in range(min(check, n)):
            profiles = profile(mj.lmm(study.formula, study.data.assign(y=Y[i]), reml=False).record)
            frame = profiles.confint(LEVEL)
            for name, (_, value) in study.truth.items():
                if not frame.loc[name].isna().any():
                    contains = frame.loc[name, "lower"] <= value <= frame.loc[name, "upper"]
                    compared += 1
                    same += contains == (abs(zetas[name][0][i]) <= z)
        print(f"the same answer as Profile.confint() in {same} of {compared} intervals of {min(check, n)} fits\n")


def parameters(study: Study, stats: mj.CrossProducts, est: mj.Estimates) -> np.ndarray:
    """All parameters ``(B, k)``; NaN where the fit failed or the parameter is undefined."""
    at = estimates_start(est.theta, est.sigma, stats.layout.qs)
    values = np.stack([value_of(held, stats, at, est.beta) for held, _ in study.truth.values()], 1)
    return np.where(est.converged[:, None], values, np.nan)


def redraw(study: Study, est: mj.Estimates, rows: slice, B: int, rng: np.random.Generator) -> np.ndarray:
    """Responses drawn from each replicate's own estimates: ``(replicates B, n)``."""
    (term,), X = study.design.terms, study.design.X
    beta, sigma, theta = est.beta[rows], est.sigma[rows], est.theta[rows]
    R, q = len(beta), term.Z.shape[1]
    root = estimates_start(theta, sigma, (q,)).factors[0] * sigma[:, None, None]
    b = np.einsum("rij,rbmj->rbmi", root, rng.standard_normal((R, B, term.n_groups, q)))
    Y = rng.standard_normal((R, B, len(X))) * sigma[:, None, None] + (beta @ X.T)[:, None]
    for j in range(q):
        Y += b[:, :, term.group, j] * term.Z[:, j]
    return Y.reshape(R * B, -1)


def without_each_level(study: Study, Y: np.ndarray) -> tuple[np.ndarray, int]:
    """All parameters of the fits without each level, ``(levels, replicates, k)``, and how many failed."""
    (term,), values, failed = study.design.terms, [], 0
    for level in range(term.n_groups):
        kept = term.group != level
        group = term.group[kept] - (term.group[kept] > level)
        own = mj.RandomTerm(Z=term.Z[kept], group=group, n_groups=term.n_groups - 1)
        stats = mj.cross_products(mj.Design(y=Y[0, kept], X=study.design.X[kept], terms=(own,)), Y[:, kept])
        est = mj.estimate_many(stats)
        values.append(parameters(study, stats, est))
        failed += int((~est.converged).sum())
    return np.stack(values), failed


def bootstrap_coverage(study: Study, n: int, key: int, B: int) -> None:
    start = time.perf_counter()
    Y = responses(study, key, n)
    stats = mj.cross_products(study.design, Y)
    est = mj.estimate_many(stats)
    estimates = parameters(study, stats, est)
    left_out, failed_without = without_each_level(study, Y)
    limits = {name: np.full((n, len(study.truth), 2), np.nan) for name in intervals.METHODS}
    failed = singular = 0
    step, refitting = max(1, REFITS // B), 0.0
    for first in range(0, n, step):
        rows = slice(first, min(n, first + step))
        drawn = redraw(study, est, rows, B, np.random.default_rng([key, first]))
        began = time.perf_counter()
        products = mj.cross_products(study.design, drawn)
        again = mj.estimate_many(products)
        refitting += time.perf_counter() - began
        failed += int((~again.converged).sum())
        singular += int((again.singular & again.converged).sum())
        values = parameters(study, products, again).reshape(-1, B, len(study.truth))
        for i, own in zip(range(rows.start, rows.stop), values, strict=True):
            for name, function in four_intervals(own, estimates[i], left_out[:, i]).items():
                limits[name][i] = function()
    seconds = time.perf_counter() - start
    ok, truth = est.converged, np.array([value for _, value in study.truth.values()])
    print(f"parametric bootstrap, {study.title}, {n} replicates (REML) x {B} refits; {int(est.singular.sum())} "
          f"fits are singular, {int((~ok).sum())} failed; of the refits {100 * singular / (n * B):.1f} % are "
          f"singular, {failed} failed; {failed_without} fits without a level failed; coverage, "
          "nominal 95 %")  # fmt: skip
    print(f"{'':22}" + "".join(f"{name:>18}" for name in limits) + f"{'no interval':>13}{'no BCa':>8}")
    for j, name in enumerate(study.truth):
        cells, missing = [], []
        for ends in limits.values():
            known = ok & ~np.isnan(ends[:, j]).any(1)
            lower, upper = ends[known, j].T
            cells.append(share((lower <= truth[j]) & (truth[j] <= upper)))
            missing.append(int((ok & ~known).sum()))
        more = max(missing[:-1])
        print(f"{name:22}" + "".join(f"{cell:>18}" for cell in cells) + f"{more:13d}{missing[-1]:8d}")
    print(f"{seconds:.1f} s, compiling included, {refitting:.1f} s of them the {n * B:,} refits\n")


def four_intervals(values: np.ndarray, estimate: np.ndarray, left_out: np.ndarray) -> dict[str, Callable]:
    """As :meth:`mixjax.resampling.bootstrap.Bootstrap.confint` makes them."""
    frame = pd.DataFrame(values)

    def normal() -> np.ndarray:
        return intervals.normal(frame.mean().to_numpy() - estimate, frame.std().to_numpy(), estimate, LEVEL)

    return {
        "percentile": lambda: intervals.percentile(values, LEVEL),
        "basic": lambda: intervals.basic(values, estimate, LEVEL),
        "normal": normal,
        "bca": lambda: intervals.bca(values, estimate, intervals.acceleration(left_out), LEVEL),
    }


def bootstrap_speed(n: int, key: int) -> None:
    fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
    fit.bootstrap(key, 100).confint(kind="bca")
    start = time.perf_counter()
    sample = fit.bootstrap(key, n)
    for method in intervals.METHODS:
        sample.confint(method=method)
    print(f"{n} parametric bootstrap replicates of sleepstudy's random slopes, with four intervals each: "
          f"{time.perf_counter() - start:.2f} s after compiling (target 3 s for 10 000)")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=10_000)
    parser.add_argument("--refits", type=int, default=399, help="bootstrap refits of a replicate")
    parser.add_argument("--check", type=int, default=50, help="fits whose profile intervals are computed themselves")
    parser.add_argument("--key", type=int, default=1)
    args = parser.parse_args()
    print(f"jax {jax.__version__}, numpy {np.__version__}")
    fixed_effects(args.replicates, args.key)
    variance_component(args.replicates, args.key)
    for study in (random_slopes(), one_variance(0.5)):
        profile_coverage(study, args.replicates, args.key, args.check)
        bootstrap_coverage(study, args.replicates, args.key, args.refits)
    bootstrap_speed(args.replicates, args.key)


if __name__ == "__main__":
    main()
