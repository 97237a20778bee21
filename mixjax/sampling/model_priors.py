"""Priors of one model, in the order of its coordinates: what the density needs."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import jax
import numpy as np

from mixjax.covariance import Structure
from mixjax.engine.integrated import FixedParts
from mixjax.sampling.charts import Chart
from mixjax.sampling.others import Other
from mixjax.sampling.prior import Prior


@dataclass(frozen=True)
class TermPriors:
    """Of one random term.

    Attributes:
        scales: of every standard deviation. shapes: LKJ of all correlations, or one prior for each.
    """

    scales: tuple[Prior, ...]
    shapes: Prior | tuple[Prior, ...]


@dataclass(frozen=True)
class ModelPriors:
    """Priors of one model's parameters, in the order of its coordinates ``z (dim,)``: per term logarithms of standard
    deviations, then correlations as :mod:`mixjax.sampling.charts` has them; log sigma; others as
    :mod:`mixjax.sampling.others` has them, of residuals or of a family; fixed effects that are sampled. A JAX pytree
    whose leaves are the priors' numbers.

    Attributes:
        terms: per random term, or per arm of repeated measures. sigma: its prior, or None where it is known, or the
            model has none. fixed: of the sampled fixed effects.
        parts: fixed effects that are sampled and integrated. to_beta: ``(p, p)`` from these, sampled first, to beta.
        others: parameters of residuals or of the family, coefficients of a dispersion first.
        held: log sigma where that is known. means: ``(d,)`` of the columns of the dispersion: log sigma is that of rows
            with these. prior_at: ``(d,)`` of the rows whose sigma has the prior.
        structures: of the terms.
    """

    terms: tuple[TermPriors, ...]
    sigma: Prior | None
    fixed: tuple[Prior, ...]
    parts: FixedParts
    to_beta: Any
    others: tuple[Other, ...]
    held: Any
    means: Any
    prior_at: Any
    structures: tuple[Structure, ...]

    @cached_property
    def charts(self) -> tuple[Chart, ...]:
        """Of every term."""
        return tuple(map(Chart, self.structures))

    @property
    def dim(self) -> int:
        """Number of coordinates."""
        has_sigma = self.sigma is not None
        return sum(chart.k for chart in self.charts) + has_sigma + len(self.others) + len(self.fixed)

    @property
    def at_sigma(self) -> int:
        """Coordinates in front of log sigma, those of covariances."""
        return sum(chart.k for chart in self.charts)

    def cut(self, z: Any) -> tuple[list[Any], Any, Any]:
        """Coordinates ``(dim, ...)`` of every term, log sigma, and sampled fixed effects."""
        parts, at = [], 0
        for chart in self.charts:
            parts.append(z[at : at + chart.k])
            at += chart.k
        if self.sigma is None:
            log_sigma = 0.0 * z[0] + self.held
        else:
            log_sigma, at = z[at], at + 1
        return parts, log_sigma, z[at + len(self.others) :]

    def others_of(self, z: Any) -> list[Any]:
        """Coordinates ``(dim, ...)`` of the others."""
        at = self.at_sigma + (self.sigma is not None)
        return [z[at + i] for i in range(len(self.others))]

    def residual_of(self, z: Any) -> tuple[list[Any], Any]:
        """Coefficients of the dispersion, and the correlation of residuals at the shortest distance or None."""
        values = [one.value(own) for one, own in zip(self.others, self.others_of(z), strict=True)]
        d = len(self.means)
        return values[:d], values[d] if len(values) > d else None

    def log_sigma_of(self, z: np.ndarray) -> np.ndarray:
        """Log sigma as it is reported, of rows where columns of the dispersion are 0."""
        found: np.ndarray = self.cut(z)[1]
        for mean, gamma in zip(np.asarray(self.means), self.residual_of(z)[0] if len(self.means) else [], strict=True):
            found = found - mean * gamma
        return found

    @property
    def proper(self) -> bool:
        """All priors are proper, so that one can draw from them."""
        return bool(np.all(np.asarray(self.parts.precision) > 0)) and all(one.proper for one in self.fixed)


jax.tree_util.register_dataclass(TermPriors, data_fields=["scales", "shapes"], meta_fields=[])
jax.tree_util.register_dataclass(
    ModelPriors, data_fields=[f.name for f in fields(ModelPriors)][:-1], meta_fields=["structures"]
)
