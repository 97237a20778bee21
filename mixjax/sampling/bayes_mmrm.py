"""``bayes_mmrm()``: posteriors of repeated measures without random effects."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mixjax.checks import check_count
from mixjax.engine.visit_sums import VisitSums
from mixjax.fitted.repeated import RepeatedFitted, fit_visit_rows
from mixjax.formula.context import caller_context
from mixjax.formula.repeated import build_repeated
from mixjax.machine import float64
from mixjax.products.visits import visit_rows
from mixjax.sampling import importance
from mixjax.sampling.chain import Method, Options, check_arguments, fixed_effects, sampled
from mixjax.sampling.mmrm_posterior import MMRMPosterior
from mixjax.sampling.model_priors import ModelPriors
from mixjax.sampling.priors import Priors, default_priors
from mixjax.simulation import as_key, key_words
from mixjax.waiting import Waiting

# Standard deviations of visits that a search starts from at least, by that of all.
FLOOR = 0.05


def bayes_mmrm(
    formula: str,
    data: Any,
    priors: Priors | None = None,
    draws: int = 1000,
    chains: int = 4,
    key: Any = 0,
    *,
    warmup: int = 300,
    target: float = 0.8,
    method: Method = "nuts",
    integrate: bool = True,
    max_doublings: int = 10,
    weights: Any = None,
    offset: Any = None,
    subset: Any = None,
    contrasts: Mapping[str, str] | None = None,
    trusted: bool | None = None,
) -> MMRMPosterior:
    """Draws from the posterior of a model for repeated measures, as :func:`mixjax.mmrm` fits it.

    What is sampled is the covariance between visits, in the structure that the formula names; fixed effects whose prior
    is flat or normal are integrated out, and drawn afterwards, exactly. Visits that a subject misses are left out.

    Args:
        formula: as of :func:`mixjax.mmrm`, ``"y ~ arm * visit + us(visit | subject)"``. data, weights, offset, subset,
            contrasts, trusted: as there.
        priors: :func:`mixjax.priors`; ``sd`` are the standard deviations of visits, ``cor`` their correlations, by name
            ``"sd_<visit>|subject"``, ``"cor|subject"``; of several arms each has its own. None for
            :func:`mixjax.default_priors`.
        draws, chains, key, warmup, target, method, integrate, max_doublings: as of :func:`mixjax.bayes`.

    Returns:
        :class:`~mixjax.MMRMPosterior`: ``summary()``, ``draws``, ``Sigma``, ``predict()``, ``simulate()``, ``loo()``,
        ``to_arviz()``.

    Raises:
        ValueError: an argument or a prior; FormulaError, DataError as in :func:`mixjax.mmrm`. ImportError: blackjax is
            not installed (extra ``bayes``).

    Warns:
        InferenceWarning: transitions diverged, chains have not mixed, or the effective sample size is small.

    Example:
        >>> import mixjax as mj
        >>> data = mj.datasets.load("Orthodont")
        >>> post = mj.bayes_mmrm("distance ~ Sex * age + ar1(age | Subject)", data, method="importance", key=1)
        >>> post.summary().loc["age", ["mean", "sd"]].round(1).tolist()
        [0.8, 0.1]
    """
    check_arguments(priors, method, target, integrate)
    draws, chains = check_count("draws", draws, 4), check_count("chains", chains, 1)
    warmup, max_doublings = check_count("warmup", warmup, 1), check_count("max_doublings", max_doublings, 1, 15)
    built = build_repeated(formula, data, weights, offset, subset, contrasts, caller_context(), trusted)
    rows = visit_rows(built.design, built.basis)
    own = Priors() if priors is None else priors
    model = own.resolve(built.design, built.labels, integrate)
    own = own.filled(default_priors(built.design))
    fitted = fit_visit_rows(rows, built.labels, True)
    sums = VisitSums.of(rows)
    how = Options(draws, chains, warmup, target, method, max_doublings, model.dim <= importance.MOST_COORDINATES)
    with Waiting(f"drawing from the posterior of {formula!r}; the first time, a program is compiled"), float64():
        z, sampling = sampled(_start(fitted, model), sums, model, as_key(key), how)
        beta = fixed_effects(z, sums, model, np.random.default_rng([*key_words(key), 0]))
    post = MMRMPosterior(fitted, own, model, z, beta, sampling, key)
    post.warn()
    return post


def _start(fitted: RepeatedFitted, model: ModelPriors) -> np.ndarray:
    """Coordinates near the REML estimates, well inside."""
    est = fitted.estimates
    parts = []
    for chart, Sigma in zip(model.charts, est.Sigma, strict=True):
        values, vectors = np.linalg.eigh(np.asarray(Sigma))
        root = vectors * np.sqrt(np.maximum(values, 0.0))
        least = np.full(len(root), FLOOR * np.sqrt(np.trace(Sigma) / len(root)))
        parts.append(chart.near(root, least))
    given = (np.asarray(model.parts.of_beta) @ np.asarray(est.beta))[: len(model.fixed)]
    return np.concatenate([*parts, given])
