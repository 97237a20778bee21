"""Posteriors of replicates: Bayesian power is how often an interval leaves the null out."""

from __future__ import annotations

import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pandas as pd

from mixjax.bases import in_span
from mixjax.estimation.estimate import Estimates
from mixjax.machine import float64, n_cores
from mixjax.optimise.results import Result
from mixjax.products.rows import rows_of
from mixjax.products.sums import CrossProducts, pad
from mixjax.sampling import convergence, importance, nuts
from mixjax.sampling.bayes import refuse, start_at
from mixjax.sampling.chain import fixed_effects
from mixjax.sampling.mode import mode
from mixjax.sampling.model_priors import ModelPriors
from mixjax.sampling.names import names_of
from mixjax.sampling.priors import Priors
from mixjax.studies.task import Fits, Model, Task, named_apart

# Draws of each posterior; proposals of a round that fits the mixture, and rounds; draws of each of four chains where
# importance sampling fails, and R-hat up to which these count.
DRAWS, FITTING, ROUNDS, CHAIN, MOST_RHAT = 1000, 2048, 2, 500, 1.05


def bayes_fits(task: Task, model: Model, Y: np.ndarray, mesh: object) -> Fits:
    """Posterior means and standard deviations of every replicate, and tail probabilities of its fixed effects.

    Importance sampling, and NUTS where its k-hat is above 0.7; a replicate that neither does has failed
    (``Result.STALLED``). A replicate's numbers depend on its data alone.
    """
    _refuse(task, model, mesh)
    own = Priors() if task.priors is None else task.priors
    shared = rows_of(model.designs[0])
    refuse(shared.stats)
    p, B = len(model.labels.fixed), len(Y)
    names = names_of(model.designs[0], model.labels)
    of_terms = [name for t, s in enumerate(shared.layout.structures) for name in names.of_term(t, s)]
    found = np.full((B, 2 * p + len(of_terms) + 1), np.nan)
    above = np.full((B, p), np.nan)
    codes = np.full(B, int(Result.STALLED))
    null = np.array([float(task.null.get(name, 0.0)) for name in model.labels.fixed])
    single = len(model.designs) == 1
    starts = _starts(model, Y)

    def work(i: int) -> None:
        design = replace(model.designs[0 if single else i], y=Y[i])
        rows = shared.with_response(Y[i]) if single else rows_of(design)
        y = Y[i] if design.offset is None else Y[i] - np.asarray(design.offset)
        if in_span(y[None], np.asarray(design.X, np.float64), rows.Q, rows.sqrt_w)[0]:
            codes[i] = int(Result.NO_NOISE)
            return
        with float64():  # the scope is each thread's own
            priors = own.resolve(design, model.labels)
            seed = zlib.crc32(np.ascontiguousarray(Y[i]).tobytes())
            z = _draws(starts[i], pad(rows.stats), priors, np.random.default_rng(seed), rows.stats)
            if z is None:
                return
            beta = fixed_effects(z[None], pad(rows.stats), priors, np.random.default_rng([seed, 1]))[0]
        terms, log_sigma, _ = priors.cut(z.T)
        natural = [chart.natural(part) for chart, part in zip(priors.charts, terms, strict=True)]
        variances = np.concatenate([*natural, np.exp(log_sigma)[None]])
        found[i] = np.concatenate([beta.mean(0), beta.std(0, ddof=1), variances.mean(1)])
        above[i] = (beta > null).mean(0)
        codes[i] = int(Result.CONVERGED)

    work(0)  # compiles
    with ThreadPoolExecutor(n_cores()) as pool:
        list(pool.map(work, range(1, B)))
    none: dict[str, Any] = dict.fromkeys(Estimates._fields)
    est = Estimates(**none)._replace(
        beta=found[:, :p], sigma=found[:, -1], result=codes, converged=codes == int(Result.CONVERGED),
        singular=np.zeros(B, bool),
    )  # fmt: skip
    fixed = pd.DataFrame(found[:, :p], columns=list(model.labels.fixed))
    others = pd.DataFrame(found[:, 2 * p :], columns=[*of_terms, "sigma"])
    # No draw on one side: less than half a draw's share.
    p_value = np.maximum(2.0 * np.minimum(above, 1.0 - above), 1.0 / DRAWS)
    nothing = np.full((B, p), np.nan)
    return Fits(est, named_apart(fixed, others), found[:, p : 2 * p], nothing, _no_deviances, p=p_value, above=above)


def _refuse(task: Task, model: Model, mesh: object) -> None:
    """Raise ValueError for what posteriors of replicates do not have."""
    wrong = {
        "mesh=": (mesh is not None, "posteriors use this machine"),
        "ddf=": (task.ddf is not None, "a posterior has no degrees of freedom"),
        "compared=": (bool(task.compared), "likelihood ratios are of fits by maximum likelihood"),
        "statistic=": (task.statistic is not None, "it is a function of estimates, which a posterior has none of"),
        "reml=False": (not task.reml, "fixed effects have the priors that priors= says"),
        "engine='jax'": (task.engine == "jax", "leave it out"),
    }
    for name, (given, why) in wrong.items():
        if given:
            raise ValueError(f"estimator='bayes' has no {name}: {why}")
    if task.options.get("repeated") or model.family is not None:
        raise ValueError(
            "estimator='bayes' is for linear mixed models; posteriors of repeated measures and of families take "
            "seconds each: call mixjax.bayes_mmrm or mixjax.bayes for some replicates"
        )
    if any(design.has_residual_side for design in model.designs):
        raise ValueError("estimator='bayes' is for independent residuals: call mixjax.bayes for some replicates")
    if not model.designs[0].terms:
        raise ValueError("estimator='bayes' is for models with random terms")


def _no_deviances() -> np.ndarray:
    raise ValueError("a posterior has no deviance")


def _starts(model: Model, Y: np.ndarray) -> list[float]:
    """The residual standard deviation of least squares, by which a search for a mode begins."""
    single = len(model.designs) == 1
    found = []
    shared = rows_of(model.designs[0]) if single else None
    for i, y in enumerate(Y):
        rows = shared.with_response(y) if shared is not None else rows_of(replace(model.designs[i], y=y))
        df = max(1, rows.n - rows.Q.shape[1])
        found.append(np.sqrt(float(rows.stats.yy) / df))
    return found


def _draws(
    spread: float, stats: CrossProducts, priors: ModelPriors, rng: np.random.Generator, plain: CrossProducts
) -> np.ndarray | None:
    """``(DRAWS, dim)``, or None where nothing could be drawn that is to be trusted."""
    start = start_at(spread, plain, priors)
    if not np.isfinite(start).all():
        return None
    at = mode(start, stats, priors)
    found = importance.sample(at, stats, priors, rng, DRAWS, FITTING, ROUNDS)
    if found.khat <= importance.TRUSTED:
        return found.z
    try:
        chains = nuts.sample(at, stats, priors, jax.random.key(int(rng.integers(2**31))), 4, CHAIN, 300, 0.9, 10)
    except ImportError:
        return None
    if chains.divergent.any() or not (convergence.rhat(chains.z) < MOST_RHAT).all():
        return None
    flat = chains.z.reshape(-1, priors.dim)
    drawn: np.ndarray = flat[np.linspace(0, len(flat) - 1, DRAWS).astype(int)]
    return drawn
