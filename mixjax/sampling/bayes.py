"""``bayes()``: formula, table and priors in, draws out."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from mixjax.checks import ConvergenceWarning, check_count
from mixjax.covariance import lambdas_of_theta
from mixjax.design import refuse_smooths
from mixjax.engine.residual_rows import ResidualRows
from mixjax.estimation.residual import transform_of
from mixjax.fitted.record import Fitted, fit_rows
from mixjax.fitted.residual import ResidualFitted, fit_residual_rows
from mixjax.formula.build import build
from mixjax.formula.checks import check_identifiable
from mixjax.formula.context import caller_context
from mixjax.machine import float64
from mixjax.products.rows import rows_of
from mixjax.products.sizes import MOST_DENSE_DRAWS, MOST_DENSE_LANES, sizes_of
from mixjax.products.sums import CrossProducts, pad
from mixjax.sampling import importance
from mixjax.sampling.bayes_glmm import bayes_glmm
from mixjax.sampling.chain import Method, Options, check_arguments, fixed_effects, sampled
from mixjax.sampling.density import Data
from mixjax.sampling.model_priors import ModelPriors
from mixjax.sampling.posterior import Posterior
from mixjax.sampling.priors import Priors, default_priors
from mixjax.simulation import as_key, key_words
from mixjax.waiting import Waiting

# Standard deviations that a search starts from at least, times the root mean square of their column, by sigma.
FLOOR = 0.2


def bayes(
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
    dispersion: str | None = None,
    residual: str | None = None,
    sigma: float | None = None,
    family: Any = None,
    link: str | None = None,
    size: Any = None,
    nagq: int = 1,
    ziformula: str | None = None,
    dispformula: str | None = None,
) -> Posterior:
    """Draws from the posterior of a linear mixed model, or with a family of a generalised one.

    What is sampled are the variance parameters alone: random effects are integrated out of the likelihood, and so are
    fixed effects whose prior is flat or normal. They are drawn afterwards, exactly, given every draw of the others. So
    the sampler moves in a few dimensions, in which the posterior is nearly normal.

    With a family random effects are integrated out by Laplace's approximation, or by quadrature, and all fixed effects
    are sampled. Some draws are then weighted by the likelihood itself, and what that says of the approximation stands
    in the summary.

    Args:
        formula, data, weights, offset, subset, contrasts, trusted: as in :func:`mixjax.lmm`, with a family as in
            :func:`mixjax.glmm`.
        priors: :func:`mixjax.priors`; None for :func:`mixjax.default_priors`, which are brms's.
        draws: of each chain, kept. chains: run side by side. warmup: iterations before, rounded up to hundreds.
        key: int or JAX key. The same key gives the same draws.
        target: acceptance that the step size aims at; towards 0.99 where transitions diverge.
        method: ``"nuts"``: the no-U-turn sampler of blackjax. ``"importance"``: independent draws from a multivariate t
            at the mode, weighted (Pareto-smoothed) and resampled; refused where k-hat is above 0.7. ``"auto"``:
            importance where there are at most 12 coordinates, few crossed effects, and k-hat is at most 0.5;
            else NUTS.
        integrate: False samples all fixed effects too.
        max_doublings: of a trajectory of NUTS.
        dispersion, residual: as in :func:`mixjax.lmm`.
        sigma: a residual standard deviation that is known, that of a row of weight 1: ``sigma=1`` with ``weights`` of
            ``1 / se^2`` is a meta-analysis of estimates with standard errors se.
        family, link, size, ziformula, dispformula: as in :func:`mixjax.glmm`; None for a linear mixed model.
        nagq: with a family, nodes of quadrature an effect, of models with one grouping factor and up to three effects;
            1 is Laplace's approximation.

    Returns:
        :class:`~mixjax.Posterior`: ``summary()``, ``draws``, ``b``, ``ranef()``, ``predict()``, ``loo()``,
        ``to_arviz()``; with a family :class:`~mixjax.GLMMPosterior`, which also has ``laplace_check()``.

    Raises:
        ValueError: an argument, a prior, or a model that this cannot do; FormulaError, DataError as in
            :func:`mixjax.lmm`. ImportError: blackjax is not installed (extra ``bayes``).

    Warns:
        InferenceWarning: transitions diverged, chains have not mixed, the effective sample size is small, or Laplace's
        approximation does not do.

    The first call in a process compiles a program for the structure of the model, some 8-10 s for NUTS and 1-2 s
    for importance sampling; other data, priors, numbers of draws then need none.
    :func:`mixjax.enable_compilation_cache` keeps it for other processes.

    Example:
        >>> import mixjax as mj
        >>> sleep = mj.datasets.load("sleepstudy")
        >>> post = mj.bayes("Reaction ~ Days + (Days | Subject)", sleep, method="importance", key=1)
        >>> post.summary().loc["sigma", ["mean", "sd"]].round().tolist()
        [26.0, 2.0]
    """
    check_arguments(priors, method, target, integrate)
    draws, chains = check_count("draws", draws, 4), check_count("chains", chains, 1)
    warmup, max_doublings = check_count("warmup", warmup, 1), check_count("max_doublings", max_doublings, 1, 15)
    caller = caller_context()
    if family is not None:
        refused = {"dispersion": dispersion, "residual": residual, "sigma": sigma}
        for name, value in refused.items():
            if value is not None:
                raise ValueError(f"{name}= is for linear mixed models, and family= was given: leave one of them out")
        how = Options(draws, chains, warmup, target, method, max_doublings, is_quick=True)
        return bayes_glmm(
            formula, data, family, link, size, priors, key, how, nagq, weights, offset, subset, contrasts, caller,
            trusted, ziformula, dispformula,
        )  # fmt: skip
    for name, value in {"link": link, "size": size, "ziformula": ziformula, "dispformula": dispformula}.items():
        if value is not None:
            raise ValueError(f"{name}= belongs to generalised models: give family= too")
    if nagq != 1:
        raise ValueError("nagq= belongs to generalised models: random effects of a linear one are integrated exactly")
    if sigma is not None and dispersion is None and residual is None:
        sigma = check_known_sigma(sigma)
    elif sigma is not None:
        raise ValueError("sigma= is known, and dispersion= and residual= are parameters of residuals: leave one out")
    own_formulas = None if dispersion is None else {"dispersion": dispersion}
    built = build(
        formula, data, weights, offset, subset, contrasts, caller, trusted, None, None, own_formulas, residual
    )
    if not built.design.terms and not built.design.has_residual_side:
        raise ValueError(
            "dispersion='~ 1' has no parameters, and without a random term there is nothing but a regression to sample"
        )
    if sigma is None:
        check_identifiable(*built)
    rows = rows_of(built.design, built.basis)
    own = Priors() if priors is None else priors
    refuse_smooths(built.labels, "mixjax.bayes", "its predictions know random effects of levels only; use mixjax.lmm")
    model = own.resolve(built.design, built.labels, integrate, sigma=sigma)
    own = own.filled(
        default_priors(built.design) if sigma is None else replace(default_priors(built.design), sigma=None)
    )
    if built.design.has_residual_side:
        fitted: Fitted = fit_residual_rows(rows, built.labels, True)
        data_: Data = ResidualRows.of(rows, transform_of(built.design))
    else:
        refuse(rows.stats)
        with warnings.catch_warnings():
            if sigma is not None:  # the fit estimates sigma, and serves as a start only
                warnings.simplefilter("ignore", ConvergenceWarning)
            fitted = fit_rows(rows, built.labels, True, None, None)
        data_ = pad(fitted.stats)
    few = not built.design.terms or sizes_of(rows.stats).d <= MOST_DENSE_LANES
    is_quick = few and model.dim <= importance.MOST_COORDINATES
    how = Options(draws, chains, warmup, target, method, max_doublings, is_quick)
    with Waiting(f"drawing from the posterior of {formula!r}; the first time, a program is compiled"), float64():
        z, sampling = sampled(_start(fitted, model), data_, model, as_key(key), how)
        beta = fixed_effects(z, data_, model, np.random.default_rng([*key_words(key), 0]))
    post = Posterior(fitted, own, model, z, beta, sampling, key)
    post.warn()
    return post


def check_known_sigma(sigma: Any) -> float:
    """The number, if it is one that a standard deviation may be."""
    if isinstance(sigma, bool) or not isinstance(sigma, int | float | np.integer | np.floating):
        raise ValueError(f"sigma must be a number, the known residual standard deviation of weight 1, got {sigma!r}")
    if not (np.isfinite(sigma) and sigma > 0):
        raise ValueError(f"sigma must be positive, got {sigma!r}")
    return float(sigma)


def refuse(stats: CrossProducts) -> None:
    """Raise ValueError for models that cannot be sampled in reasonable time."""
    n_dense = sizes_of(stats).d
    if n_dense > MOST_DENSE_DRAWS:
        raise ValueError(
            f"{n_dense} random effects beside those of the largest grouping factor are too many for sampling (more "
            f"than {MOST_DENSE_DRAWS}): every gradient would invert a matrix of that size; mixjax.lmm fits the model"
        )


def start_at(spread: float, stats: CrossProducts, model: ModelPriors) -> np.ndarray:
    """Coordinates where every random effect and the residual have a share of the standard deviation ``spread`` of y."""
    parts = [
        chart.near(0.4 * spread * np.asarray(basis.R_inv), 1e-3 * spread / np.sqrt((np.asarray(basis.R) ** 2).sum(0)))
        for chart, basis in zip(model.charts, stats.Z_bases, strict=True)
    ]
    given = (np.asarray(model.parts.of_beta) @ np.asarray(stats.beta0))[: len(model.fixed)]
    return np.concatenate([*parts, [np.log(0.7 * spread)], given])


def _start(fitted: Fitted, model: ModelPriors) -> np.ndarray:
    """Coordinates near the REML estimates, well inside."""
    est, stats = fitted.estimates, fitted.stats
    sigma = float(est.sigma)
    own = (np.asarray(est.residual) if isinstance(fitted, ResidualFitted) else np.zeros(0)).tolist()
    if isinstance(fitted, ResidualFitted):
        mean = np.asarray(model.means)
        sigma *= float(np.exp(mean @ own[: len(mean)]))
    if model.sigma is None:
        # Sigma and variances of random effects may be one in the fit: half of the variance is theirs.
        known = float(np.exp(model.held))
        spread = np.sqrt(float(stats.yy) / max(1.0, float(stats.n) - len(est.beta)))
        lambdas = [0.7 * spread / known * np.asarray(basis.R_inv) for basis in stats.Z_bases]
        sigma = known
    else:
        lambdas = lambdas_of_theta(np.asarray(est.theta) * float(est.sigma) / sigma, stats.layout.qs)
    parts = []
    for chart, Lambda, basis in zip(model.charts, lambdas, stats.Z_bases, strict=True):
        of_columns = np.sqrt((np.asarray(basis.R) ** 2).sum(axis=0))
        parts.append(chart.near(sigma * Lambda, FLOOR * sigma / np.where(of_columns > 0, of_columns, 1.0)))
    given = (np.asarray(model.parts.of_beta) @ np.asarray(est.beta))[: len(model.fixed)]
    log_sigma = [np.log(sigma)] if model.sigma is not None else []
    others = [one.start(value) for one, value in zip(model.others, own, strict=True)]
    return np.concatenate([*parts, log_sigma, others, given])
