"""Claim: what intervals and tests of generalised linear mixed models hold in small clusters, and where they do not.

Random intercepts of standard deviation 1, a covariate within clusters and a treatment between them; responses are
simulated with known truth, and every replicate is refitted in one batch, by Laplace's approximation and by adaptive
quadrature. Of each design:

* bias of the covariate's effect, of the treatment's and of the standard deviation;
* coverage of 95 % intervals: Wald's of the three (of the standard deviation on the log scale), and profile intervals,
  which cover the truth where the criterion with the parameter held there is within 3.84 of the least;
* percentile intervals of a parametric bootstrap, of fewer replicates;
* how many fits are singular, and how many have no finite estimate, which enter no other number.

One minus the coverage of the treatment's effect, whose truth is 0, is the size of its test.

    python benchmarks/generalized_calibration.py --replicates 100000
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import scipy.stats

import mixjax as mj
from mixjax.engine.laplace_fit import evaluate, nothing_known
from mixjax.estimation.glmm import model_of
from mixjax.machine import silently
from mixjax.optimise.results import Result
from mixjax.simulation import simulate_family

QUANTILE, Z = scipy.stats.chi2.ppf(0.95, 1), scipy.stats.norm.ppf(0.975)
NAMES = ("x", "treated", "sd")
# Replicates whose objective is evaluated at once.
LANES = 512
ENDLESS = [int(Result.SEPARATED), int(Result.UNBOUNDED)]


class Case(NamedTuple):
    """A design with its truth: ``beta`` of intercept, x and treatment."""

    title: str
    design: mj.Design
    family: Any
    beta: np.ndarray
    psi: tuple[float, ...]


def case(title: str, clusters: int, rows: int, family: str, intercept: float, size: float | None = None) -> Case:
    """``clusters`` of ``rows``; ``size``: of a negative binomial response."""
    group = np.repeat(np.arange(clusters), rows)
    x = np.tile(np.linspace(-1, 1, rows), clusters) if rows > 1 else np.linspace(-1, 1, clusters)
    X = np.column_stack([np.ones(len(group)), x, (group % 2).astype(float)])
    term = mj.RandomTerm(Z=np.ones((len(group), 1)), group=group, n_groups=clusters)
    design = mj.Design(y=np.zeros(len(group)), X=X, terms=(term,))
    psi = () if size is None else (np.log(size),)
    return Case(title, design, mj.families.family_of(family), np.array([intercept, 0.5, 0.0]), psi)


def cases() -> list[Case]:
    """Prevalences are those of the median cluster."""
    rare = np.log(0.1 / 0.9)
    return [
        case("binary 50 %, 20 x 5", 20, 5, "binomial", 0.0),
        case("binary 50 %, 100 x 3", 100, 3, "binomial", 0.0),
        case("binary 50 %, 40 x 10", 40, 10, "binomial", 0.0),
        case("binary 50 %, 20 x 30", 20, 30, "binomial", 0.0),
        case("binary 10 %, 40 x 10", 40, 10, "binomial", rare),
        case("binary 10 %, 100 x 10", 100, 10, "binomial", rare),
        case("Poisson, mean 2, 20 x 5", 20, 5, "poisson", np.log(2.0)),
        case("nbinom, mean 2, size 2, 20 x 10", 20, 10, "nbinom", np.log(2.0), 2.0),
    ]


def fitted(own: Case, Y: np.ndarray, nagq: int, offset: np.ndarray | None = None, without: int | None = None) -> Any:
    """Fits of all responses; ``without`` a column of X, whose effect is in the offset."""
    design = own.design
    if without is not None:
        design = replace(design, X=np.delete(design.X, without, 1), offset=offset)
    keep = ("theta", "beta", "psi", "criterion", "singular", "result")
    keep = keep if without is not None else (*keep, "vcov", "vcov_all")
    more = {} if nagq == 1 else {"nagq": nagq}
    return mj.glmm_estimate_many(mj.rows(design, own.family, Y), keep=keep, **more)


def at_true_deviation(own: Case, Y: np.ndarray, sd: float) -> np.ndarray:
    """Laplace's criterion with the standard deviation held, everything else at its best."""
    rows = mj.rows(own.design, own.family, Y)
    found = []
    for first in range(0, len(Y), LANES):
        part = Y[first : first + LANES]
        with silently():
            one = model_of(replace(rows, y=part[0]))
            index = one.effects.index
            lanes = np.ascontiguousarray(np.moveaxis(part[:, index], 0, -1))
            model = replace(one, data=one.data._replace(y=lanes))
            fixed = np.zeros((model.n_fixed, len(part)))
            fixed[: model.p] = (rows.X_basis.R @ own.beta)[:, None]
            fixed[model.p :] = np.reshape(own.psi, (-1, 1))
            x = np.full((1, len(part)), sd * float(rows.Z_bases[0].R[0, 0]))
            found.append(evaluate(model, x, nothing_known(model, fixed)).value)
    return np.concatenate(found)


def percentiles(own: Case, est: Any, at: np.ndarray, draws: int, nagq: int) -> np.ndarray:
    """``(len(at), 3, 2)`` ends of percentile intervals of replicates ``at``."""
    ends = []
    for i in at:
        theta = float(est.theta[i, 0])
        Y = simulate_family(own.design, own.family, est.beta[i], [[[theta**2]]], est.psi[i], int(i), draws)
        again = fitted(own, Y, nagq, None, None)
        fine = ~np.isin(again.result, ENDLESS)
        values = np.column_stack([again.beta[fine, 1:], again.theta[fine]])
        ends.append(np.quantile(values, [0.025, 0.975], axis=0).T)
    return np.array(ends)


def measured(own: Case, replicates: int, bootstraps: int, nagq: int) -> pd.DataFrame:
    sd = 1.0
    truth = np.append(own.beta[1:], sd)
    Y = simulate_family(own.design, own.family, own.beta, [[[sd**2]]], own.psi, 0, replicates)
    est = fitted(own, Y, nagq)
    lost = np.isin(est.result, ENDLESS)
    failed = ~np.isin(est.result, [int(code) for code in Result if code.is_solution]) & ~lost
    fine = ~lost & ~failed
    values = np.column_stack([est.beta[:, 1:], est.theta[:, 0]])
    x_variance = est.vcov_all[:, -1, -1]
    rows = mj.rows(own.design, own.family)
    on_x = est.theta[:, 0] * float(rows.Z_bases[0].R[0, 0])
    with np.errstate(all="ignore"):
        se_fixed = np.sqrt(np.diagonal(est.vcov, axis1=1, axis2=2)[:, 1:])
        relative = np.sqrt(x_variance) / on_x  # of the logarithm of the standard deviation
        inside = np.column_stack([
            np.abs(values[:, :2] - truth[:2]) <= Z * se_fixed, np.abs(np.log(values[:, 2] / sd)) <= Z * relative
        ])  # fmt: skip
    held = [fitted(own, Y, nagq, own.design.X[:, j] * own.beta[j], j).criterion - est.criterion for j in (1, 2)]
    if nagq == 1:
        held.append(at_true_deviation(own, Y, sd) - est.criterion)
    covered = np.column_stack([np.where(np.isfinite(one), one <= QUANTILE, False) for one in held])
    table = []
    some = np.flatnonzero(fine)[:bootstraps]
    ends = percentiles(own, est, some, 400, nagq) if len(some) else None
    for j, name in enumerate(NAMES):
        with_interval = fine & (~est.singular if name == "sd" else True)
        row: dict[str, Any] = {
            "design": own.title,
            "nagq": nagq,
            "parameter": name,
            "bias": (values[fine, j] - truth[j]).mean(),
            "wald": 100 * inside[with_interval, j].mean(),
            "profile": 100 * covered[fine, j].mean() if j < covered.shape[1] else np.nan,
            "bootstrap": np.nan,
            "mcse": 100 * np.sqrt(0.05 * 0.95 / fine.sum()),
            "singular": 100 * est.singular[fine].mean(),
            "endless": 100 * lost.mean(),
            "failed": int(failed.sum()),
        }
        if ends is not None:
            row["bootstrap"] = 100 * ((ends[:, j, 0] <= truth[j]) & (truth[j] <= ends[:, j, 1])).mean()
        table.append(row)
    return pd.DataFrame(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--replicates", type=int, default=10_000)
    parser.add_argument("--bootstraps", type=int, default=0, help="replicates with a bootstrap of 400")
    parser.add_argument("--nagq", type=int, nargs="*", default=[1])
    parser.add_argument("--only", default="", help="designs whose title contains this")
    arguments = parser.parse_args()
    for own in cases():
        if arguments.only not in own.title:
            continue
        for nagq in arguments.nagq:
            begin = time.perf_counter(), time.process_time()
            frame = measured(own, arguments.replicates, arguments.bootstraps, nagq)
            spent = time.perf_counter() - begin[0], time.process_time() - begin[1]
            print(frame.round(3).to_string(index=False), f"\n{spent[0]:.1f} s wall, {spent[1]:.1f} s CPU\n", flush=True)


if __name__ == "__main__":
    main()
