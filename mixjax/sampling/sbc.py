"""Simulation-based calibration: posteriors of data sets drawn from the prior know where they came from."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache, cached_property
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from scipy.special import bdtr

from mixjax.checks import InferenceWarning, check_count, check_level, check_memory, warn
from mixjax.fitted.names import names_apart
from mixjax.formula.build import build
from mixjax.formula.checks import check_identifiable
from mixjax.formula.context import caller_context
from mixjax.machine import float64, n_cores
from mixjax.markup import Report, Reported
from mixjax.products.responses import Responses
from mixjax.products.rows import rows_of
from mixjax.products.sums import CrossProducts, pad
from mixjax.sampling import importance, nuts
from mixjax.sampling.bayes import refuse
from mixjax.sampling.chain import fixed_effects
from mixjax.sampling.mode import mode
from mixjax.sampling.model_priors import ModelPriors
from mixjax.sampling.names import names_of
from mixjax.sampling.predictive import draw_parameters, respond
from mixjax.sampling.priors import Priors, default_priors
from mixjax.simulation import key_words
from mixjax.tables import NotedTable, frame_report
from mixjax.waiting import Waiting

# Proposals of a round that fits a mixture, and rounds; draws of each of four chains of NUTS, where that is needed, of
# which some are kept.
FITTING, ROUNDS, CHAIN = 2048, 2, 500
# Data sets of uniform ranks by which bands are found.
SIMULATED = 2000


class Bands(NamedTuple):
    """Of counts of ranks below each of L + 1 points: ``lower``, ``upper (L + 1,)``, and ``least (R,)`` pointwise
    probabilities of simulated data sets."""

    lower: np.ndarray
    upper: np.ndarray
    least: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class Calibration(Reported):
    """Ranks of the parameters that data sets were made with among draws from their posteriors.

    ``print()`` shows :meth:`uniformity`.

    Attributes:
        ranks: data frame, a row for each data set, a column for each parameter: how many of the draws are smaller, 0 to
            ``draws``. Uniform where the posteriors are right.
        draws: of each posterior.
        khat: ``(replicates,)`` Pareto k-hat of the importance weights. by_nuts: ``(replicates,)`` where it was above
            0.7, and chains drew instead.
    """

    ranks: pd.DataFrame
    draws: int
    khat: np.ndarray
    by_nuts: np.ndarray

    def uniformity(self) -> NotedTable:
        """A test of every parameter: ``mean_rank`` (0.5 where nothing is biased), ``largest`` difference between the
        distribution of the ranks and the uniform one, ``p_value`` of a test that looks at all points of it (Sailynoja,
        Buerkner & Vehtari 2022, Stat. Comput. 32, 32)."""
        least = _least_of_uniform(len(self.ranks), self.draws)
        tests = []
        for ranks in self.ranks.to_numpy().T:
            counts = self._counts(ranks)
            ecdf, points = counts / len(ranks), self._points
            own = _pointwise(counts, len(ranks), points).min()
            p_value = (1.0 + (least <= own).sum()) / (1.0 + len(least))
            tests.append((ranks.mean() / self.draws, np.abs(ecdf - points).max(), p_value))
        frame = pd.DataFrame(tests, index=self.ranks.columns, columns=["mean_rank", "largest", "p_value"])
        by_nuts = f"; {self.by_nuts.sum()} of them by NUTS" if self.by_nuts.any() else ""
        note = f"{len(self.ranks)} data sets from the prior, ranks among {self.draws} draws{by_nuts}"
        return NotedTable(frame, (note,))

    def __repr__(self) -> str:
        return repr(self.uniformity())

    def _report(self) -> Report:
        tests = self.uniformity()
        return frame_report(tests, (), tests.attrs["notes"])

    def ecdf(self, level: float = 0.95) -> pd.DataFrame:
        """The distribution functions of the ranks less the uniform one: a row for each point between 0 and 1, a column
        for each parameter, and the simultaneous band ``lower``, ``upper`` that all of one stay in with this
        probability."""
        check_level(level)
        n, bands, points = len(self.ranks), self._bands(level), self._points
        each = [self._counts(ranks) for ranks in self.ranks.to_numpy().T]
        values = np.column_stack([*each, bands.lower, bands.upper]) / n - points[:, None]
        return pd.DataFrame(values, pd.Index(points, name="point"), [*self.ranks.columns, "lower", "upper"])

    @cached_property
    def _points(self) -> np.ndarray:
        """Probabilities of a rank up to 0, 1, ..., L - 1."""
        points: np.ndarray = np.arange(1, self.draws + 1) / (self.draws + 1.0)
        return points

    def _counts(self, ranks: np.ndarray) -> np.ndarray:
        counts: np.ndarray = np.cumsum(np.bincount(ranks, minlength=self.draws + 1))[:-1]
        return counts

    def _bands(self, level: float) -> Bands:
        n, points = len(self.ranks), self._points
        least = _least_of_uniform(n, self.draws)
        gamma = float(np.quantile(least, 1.0 - level))
        below = bdtr(np.arange(n + 1)[:, None], n, points)  # (n + 1, L)
        lower = (below < gamma / 2).sum(0)
        upper = (below < 1.0 - gamma / 2).sum(0)
        return Bands(lower.astype(float), upper.astype(float), least)


@cache
def _least_of_uniform(n: int, draws: int) -> np.ndarray:
    """The smallest pointwise probabilities of data sets of n ranks that are uniform on 0 .. draws."""
    points = np.arange(1, draws + 1) / (draws + 1.0)
    rng = np.random.default_rng(0)
    counts = rng.multinomial(n, np.full(draws + 1, 1.0 / (draws + 1)), SIMULATED).cumsum(1)[:, :-1]
    least: np.ndarray = _pointwise(counts, n, points).min(1)
    return least


def _pointwise(counts: np.ndarray, n: int, points: np.ndarray) -> np.ndarray:
    """Two-sided binomial probabilities of counts, point by point."""
    below = bdtr(counts, n, points)
    above = 1.0 - np.where(counts > 0, bdtr(np.maximum(counts - 1, 0), n, points), 0.0)
    pointwise: np.ndarray = np.minimum(1.0, 2.0 * np.minimum(below, above))
    return pointwise


def sbc(
    formula: str,
    data: Any,
    priors: Priors | None = None,
    replicates: int = 1000,
    draws: int = 100,
    key: Any = 0,
    *,
    weights: Any = None,
    offset: Any = None,
    contrasts: Mapping[str, str] | None = None,
    trusted: bool | None = None,
) -> Calibration:
    """Simulation-based calibration (Talts, Betancourt, Simpson, Vehtari & Gelman 2018, arXiv 1804.06788).

    Parameters are drawn from the prior, a data set from each, and its posterior is drawn from: the true value's rank
    among the draws is uniform if and only if model, priors and sampler agree. Posteriors are those of
    :func:`mixjax.bayes` with ``method="importance"``, and by NUTS where k-hat is above 0.7.

    Args:
        formula, data, weights, offset, contrasts, trusted: as in :func:`mixjax.lmm`; the response is not looked at, but
            for the default priors.
        priors: all proper; what is not said is as ``default_priors(design, weak=True)``.
        replicates: data sets. draws: from each posterior. key: int or JAX key: the same call gives the same ranks.

    Returns:
        :class:`~mixjax.sampling.sbc.Calibration`.

    Raises:
        ValueError: a prior is improper. ImportError: NUTS is needed, and blackjax not installed.

    Example:
        >>> import mixjax as mj
        >>> found = mj.sbc("Yield ~ 1 + (1 | Batch)", mj.datasets.load("Dyestuff"), replicates=10)
        >>> found.ranks.shape
        (10, 3)
    """
    replicates, draws = check_count("replicates", replicates, 2), check_count("draws", draws, 9, 1000)
    if priors is not None and not isinstance(priors, Priors):
        raise ValueError(f"priors must be mixjax.priors(...), got {priors!r}")
    built = build(formula, data, weights, offset, None, contrasts, caller_context(), trusted)
    check_identifiable(*built)
    design, labels, basis = built
    rows = rows_of(design, basis)
    refuse(rows.stats)
    check_memory(f"{replicates} data sets of {rows.n} rows", replicates * rows.n * 8, "draw fewer")
    own = Priors() if priors is None else priors
    model = own.resolve(design, labels, defaults=default_priors(design, weak=True))
    words = key_words(key)
    z, beta = draw_parameters(model, replicates, np.random.default_rng([*words, 0]))
    y, _ = respond(design, model, z, beta, np.random.default_rng([*words, 1]))
    stats = replace(Responses(rows).products(y), classes=None)
    truth = _parameters(model, z, beta)
    ranks, khat = np.empty(truth.shape, np.int64), np.empty(replicates)

    def work(i: int) -> None:
        with float64():  # the scope is each thread's own
            own, rng = pad(_one(stats, i)), np.random.default_rng([*words, 2, i])
            found, khat[i] = _posterior(z[i], own, model, rng, draws)
            drawn = _parameters(model, found, fixed_effects(found[None], own, model, rng)[0])
            ranks[i] = (drawn < truth[i]).sum(0)

    with Waiting("simulation-based calibration", replicates, unit="data set") as waiting:
        work(0)  # compiles
        with ThreadPoolExecutor(n_cores()) as pool:
            for _ in pool.map(work, range(1, replicates)):
                waiting.update(1)
    names = names_of(design, labels)
    of_terms = [name for t, s in enumerate(model.structures) for name in names.of_term(t, s)]
    columns = [*names_apart(labels.fixed, [*of_terms, "sigma"]), *of_terms, "sigma"]
    by_nuts = khat > importance.TRUSTED
    if by_nuts.mean() > 0.1:
        warn(f"importance sampling failed for {by_nuts.sum()} of {replicates} data sets; NUTS drew", InferenceWarning)
    return Calibration(pd.DataFrame(ranks, columns=columns), draws, khat, by_nuts)


def _one(stats: CrossProducts, i: int) -> CrossProducts:
    factors = tuple(f._replace(Zy=f.Zy[i]) for f in stats.factors)
    return replace(stats, factors=factors, Xy=stats.Xy[i], yy=stats.yy[i], beta0=stats.beta0[i])


def _posterior(
    start: np.ndarray, stats: CrossProducts, model: ModelPriors, rng: np.random.Generator, draws: int
) -> tuple[np.ndarray, float]:
    at = mode(np.clip(start, *_inside(start, model)), stats, model)
    found = importance.sample(at, stats, model, rng, draws, FITTING, ROUNDS)
    if found.khat <= importance.TRUSTED:
        return found.z, found.khat
    key = jax.random.key(int(rng.integers(2**31)))
    chains = nuts.sample(at, stats, model, key, 4, CHAIN, 300, 0.9, 10).z.reshape(-1, model.dim)
    return chains[np.linspace(0, len(chains) - 1, draws).astype(int)], found.khat


def _inside(start: np.ndarray, model: ModelPriors) -> tuple[np.ndarray, np.ndarray]:
    """Where a search may begin: draws of standard deviations near zero and correlations near 1 are far out."""
    low, high = np.full(len(start), -np.inf), np.full(len(start), np.inf)
    log_sigma, at = float(model.cut(start)[1]), 0
    for chart in model.charts:
        low[at : at + chart.n_scales] = log_sigma - 5.0
        shapes = slice(at + chart.n_scales, at + chart.k)
        low[shapes], high[shapes] = -1.0, 1.0
        at += chart.k
    return low, high


def _parameters(model: ModelPriors, z: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """``(S, parameters)``: fixed effects, standard deviations and correlations, sigma."""
    terms, log_sigma, _ = model.cut(z.T)
    natural = [chart.natural(part) for chart, part in zip(model.charts, terms, strict=True)]
    parameters: np.ndarray = np.concatenate([beta.T, *natural, np.exp(log_sigma)[None]]).T
    return parameters
