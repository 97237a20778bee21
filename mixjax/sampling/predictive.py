"""Draws from priors, and responses that they lead to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mixjax.checks import check_count, check_memory
from mixjax.design import Design
from mixjax.estimation.residual import correlation_of
from mixjax.fitted.names import names_apart
from mixjax.formula.build import build
from mixjax.formula.context import caller_context
from mixjax.markup import Report, Reported
from mixjax.sampling.charts import Chart
from mixjax.sampling.effects import fresh_effects
from mixjax.sampling.model_priors import ModelPriors, TermPriors
from mixjax.sampling.names import names_of
from mixjax.sampling.prior import LKJ, Normal
from mixjax.sampling.priors import Priors, default_priors
from mixjax.simulation import key_words, random_columns
from mixjax.tables import frame_report


@dataclass(frozen=True, eq=False, repr=False)
class PriorPredictive(Reported):
    """Draws from the prior. ``print()`` shows the parameters' quantiles.

    Attributes:
        parameters: data frame, a row for each draw, a column for each parameter.
        y: ``(draws, nobs)`` responses, a data set for each draw.
        b: per term ``(draws, levels, q)`` the random effects that they were made with.
    """

    parameters: pd.DataFrame
    y: np.ndarray
    b: tuple[np.ndarray, ...]

    def __repr__(self) -> str:
        return self._report().text()

    def _report(self) -> Report:
        frame = self.parameters.quantile([0.05, 0.25, 0.5, 0.75, 0.95]).T
        frame.columns = ["5 %", "25 %", "median", "75 %", "95 %"]
        draws, rows = self.y.shape
        return frame_report(frame, notes=[f"{draws} draws from the prior, each with a data set of {rows} rows"])


def prior_predictive(
    formula: str,
    data: Any,
    priors: Priors | None = None,
    draws: int = 1000,
    key: Any = 0,
    *,
    weights: Any = None,
    offset: Any = None,
    subset: Any = None,
    contrasts: Mapping[str, str] | None = None,
    trusted: bool | None = None,
) -> PriorPredictive:
    """Data sets that a model would give before it has seen data: what do the priors say of responses?

    Args:
        formula, data, weights, offset, subset, contrasts, trusted: as in :func:`mixjax.lmm`.
        priors: all proper; None for ``default_priors(design, weak=True)``, which are also those of what is not said.
        draws: how many. key: int or JAX key.

    Raises:
        ValueError: a prior is improper, as flat ones are.

    Example:
        >>> import mixjax as mj
        >>> sleep = mj.datasets.load("sleepstudy")
        >>> drawn = mj.prior_predictive("Reaction ~ Days + (Days | Subject)", sleep, draws=50)
        >>> drawn.y.shape, list(drawn.parameters)[:2]
        ((50, 180), ['Intercept', 'Days'])
    """
    draws = check_count("draws", draws, 1)
    if priors is not None and not isinstance(priors, Priors):
        raise ValueError(f"priors must be mixjax.priors(...), got {priors!r}")
    design, labels, _ = build(formula, data, weights, offset, subset, contrasts, caller_context(), trusted)
    own = Priors() if priors is None else priors
    model = own.resolve(design, labels, defaults=default_priors(design, weak=True))
    n = np.shape(design.X)[0]
    check_memory(f"{draws} responses of {n} rows", draws * n * 8, "draw fewer")
    z, beta = draw_parameters(model, draws, np.random.default_rng(key_words(key)))
    terms, _, _ = model.cut(z.T)
    variances = np.concatenate(
        [*(chart.natural(part) for chart, part in zip(model.charts, terms, strict=True)),
         np.exp(model.log_sigma_of(z.T))[None]]
    )  # fmt: skip
    own_names = names_of(design, labels)
    of_terms = [name for t, s in enumerate(model.structures) for name in own_names.of_term(t, s)]
    columns = [*names_apart(labels.fixed, [*of_terms, "sigma"]), *of_terms, "sigma"]
    y, b = respond(design, model, z, beta, np.random.default_rng([*key_words(key), 1]))
    return PriorPredictive(pd.DataFrame(np.hstack([beta, variances.T]), columns=columns), y, b)


def draw_parameters(model: ModelPriors, n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates ``(n, dim)`` and fixed effects ``(n, p)`` from the prior.

    Raises:
        ValueError: a prior is improper.
    """
    if not model.proper:
        raise ValueError(
            "draws from the prior need proper priors, and a fixed effect has a flat one: give it "
            "mixjax.prior.normal(...), or take mixjax.default_priors(design, weak=True)"
        )
    parts = []
    for chart, own in zip(model.charts, model.terms, strict=True):
        parts += [np.log(one.sample(rng, n)) for one in own.scales]
        parts += list(_shapes(chart, own, n, rng))
    if model.sigma is not None:
        parts.append(np.log(model.sigma.sample(rng, n)))
    parts += [one.sample(rng, n) for one in model.others]
    given = [one.sample(rng, n) for one in model.fixed]
    mean, sd = np.asarray(model.parts.mean), np.asarray(model.parts.precision) ** -0.5
    inner = mean + sd * rng.standard_normal((n, len(mean)))
    gamma = np.column_stack([*given, inner]) if given else inner
    return np.column_stack([*parts, *given]), gamma @ np.asarray(model.to_beta).T


def _shapes(chart: Chart, own: TermPriors, n: int, rng: np.random.Generator) -> np.ndarray:
    """``(n_shapes, n)`` coordinates."""
    found = np.zeros((chart.n_shapes, n))
    if not chart.n_shapes:
        return found
    if chart.is_written:
        assert isinstance(own.shapes, tuple)
        return np.stack([one.sample(rng, n) for one in own.shapes])
    each = own.shapes if isinstance(own.shapes, tuple) else (own.shapes,) * chart.n_shapes
    tiny = np.finfo(float).tiny
    for i, one in enumerate(each):
        if isinstance(one, LKJ):
            a, b = (side[i] for side in chart.beta_of(one.eta))
            u = rng.beta(a, b, n)
        else:
            assert isinstance(one, Normal)
            u = (one.sample_between(rng, n, chart.low, 1.0) - chart.low) / (1.0 - chart.low)
        found[i] = (np.log(np.maximum(u, tiny)) - np.log(np.maximum(1.0 - u, 1e-16))) / chart.slope
    return found


class Noise(NamedTuple):
    """Residuals at S draws.

    Attributes:
        middling: ``(S,)`` standard deviations, where columns of the dispersion are at their means. gamma: ``(S, d)``
            its coefficients. c: ``(S,)`` correlations at the shortest distance, rho: as they are reported; or None.
    """

    middling: np.ndarray
    gamma: np.ndarray
    c: np.ndarray | None
    rho: np.ndarray | None

    def take(self, at: np.ndarray) -> Noise:
        """Some of the draws."""
        return Noise(*(None if own is None else own[at] for own in self))  # type: ignore[arg-type]

    def sd(self, design: Design) -> np.ndarray:
        """``(S, nobs)`` standard deviations."""
        sd = self.middling[:, None] * (1.0 if design.weights is None else 1.0 / np.sqrt(np.asarray(design.weights)))
        if design.dispersion is not None and self.gamma.shape[1]:
            W = np.asarray(design.dispersion, np.float64)
            sd = sd * np.exp(self.gamma @ (W - W.mean(axis=0)).T)
        return np.broadcast_to(sd, (len(self.middling), np.shape(design.X)[0]))

    def sample(self, design: Design, rng: np.random.Generator) -> np.ndarray:
        """``(S, nobs)``, correlated as residuals are."""
        sd = self.sd(design)
        drawn = rng.standard_normal(sd.shape)
        correlation = correlation_of(design)
        if correlation is not None and self.rho is not None:
            drawn = np.stack(
                [correlation.colour(float(rho), own[:, None])[:, 0] for rho, own in zip(self.rho, drawn, strict=True)]
            )
        errors: np.ndarray = sd * drawn
        return errors


def noise_of(design: Design, model: ModelPriors, z: np.ndarray) -> Noise:
    """Residuals at coordinates ``z (S, dim)``."""
    middling = np.exp(model.cut(z.T)[1])
    gamma, c = model.residual_of(z.T) if design.has_residual_side else ([], None)
    rho = None if c is None else model.others[-1].reported(model.others_of(z.T)[-1])
    return Noise(middling, np.stack(gamma, axis=1) if gamma else np.zeros((len(z), 0)), c, rho)


def respond(
    design: Design, model: ModelPriors, z: np.ndarray, beta: np.ndarray, rng: np.random.Generator
) -> tuple[np.ndarray, tuple[np.ndarray, ...]]:
    """Responses ``(S, nobs)`` and random effects, per term ``(S, levels, q)``, at parameters ``z (S, dim)``, ``beta (S,
    p)``."""
    terms, _, _ = model.cut(z.T)
    S = len(z)
    b = tuple(
        fresh_effects(chart.factor(part), term, rng)
        for chart, part, term in zip(model.charts, terms, design.terms, strict=True)
    )
    flat = np.concatenate([np.zeros((S, 0)), *(own.reshape(S, -1) for own in b)], axis=1)
    mean = beta @ np.asarray(design.X).T + np.asarray((random_columns(design) @ flat.T).T)
    offset = 0.0 if design.offset is None else np.asarray(design.offset)
    y: np.ndarray = mean + offset + noise_of(design, model, z).sample(design, rng)
    return y, b
