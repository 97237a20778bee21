"""The parametric bootstrap of prediction errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import scipy.sparse as sp

from mixjax.checks import InferenceWarning, warn
from mixjax.design import Design
from mixjax.engine.equations import Equations, factors_in_bases
from mixjax.fitted.record import Fitted
from mixjax.optimise.results import failed, note_of_failures
from mixjax.prediction.blocks import CHUNK, DependentEffects, TooLarge
from mixjax.prediction.targets import Targets, effect_rows, relative_factors
from mixjax.products.responses import Responses
from mixjax.resampling.replicates import Drawn, Source, refits
from mixjax.simulation import draw_responses, random_columns, root_of_effects, symmetric_root

KEEP = ("theta", "beta", "sigma", "b", "result")


class Errors(NamedTuple):
    """Of the refits that converged, B of them, and m targets.

    Attributes:
        error: ``(B, m)`` prediction less what came. scale: ``(B, m)`` Henderson's standard error in the refit.
    """

    error: np.ndarray
    scale: np.ndarray


def bootstrap_errors(fitted: Fitted, targets: Targets, key: Any, n: int) -> Errors:
    """Errors of the predictions of n data sets drawn from the fit, whose random effects are known.

    Warns:
        InferenceWarning: refits failed; they are left out.
    """
    design, est = fitted.design, fitted.estimates
    roots = [symmetric_root(Sigma) for Sigma in est.Sigma]
    D = tuple(np.asarray(Sigma) / est.sigma**2 for Sigma in est.Sigma)
    nobs, m = fitted.nobs, len(targets.X)
    levels = [term.n_groups for term in design.terms]
    q_total = sum(count * len(root) for count, root in zip(levels, roots, strict=True))
    root = root_of_effects(design, roots)
    columns = sp.vstack([random_columns(design), _known_columns(targets, design)], format="csr") @ root
    fixed = np.asarray(design.X) @ est.beta
    fixed = fixed if design.offset is None else fixed + np.asarray(design.offset)
    none = tuple(np.zeros_like(own) for own in est.b)
    fixed = np.concatenate([fixed, targets.mean(est.beta, none)])
    noise = np.ones(nobs) if design.weights is None else 1.0 / np.asarray(design.weights)
    scale = est.sigma * np.sqrt(np.concatenate([noise, targets.fresh_variance(D)]))

    def respond(draws: np.ndarray) -> np.ndarray:
        responses: np.ndarray = (
            fixed + scale * draws[:, : nobs + m] + (columns @ np.ascontiguousarray(draws[:, nobs + m :].T)).T
        )
        return responses

    scale_of, responses = _Scale(fitted, targets), Responses(fitted.rows)
    width = nobs + m + q_total

    def draw(first: int, count: int) -> Drawn:
        drawn = draw_responses(respond, nobs + m, width, key, count, first)
        return Drawn((responses.products(np.ascontiguousarray(drawn[:, :nobs])),), drawn[:, nobs:])

    parts, codes = [], []
    for drawn, (fits,) in refits(Source(draw, width + m), n, KEEP, fitted.reml, what="prediction errors: refitting"):
        good = ~failed(fits.result)
        codes.append(fits.result)
        predicted = targets.mean(fits.beta[good], tuple(b[good] for b in fits.b))
        parts.append((predicted - drawn.beside[good], scale_of(fits.theta[good], fits.sigma[good])))
    if note := note_of_failures(np.concatenate(codes)):
        warn(note, InferenceWarning)
    if not sum(len(error) for error, _ in parts):
        raise ValueError("no refit converged: there are no errors to look at; use method='henderson'")
    return Errors(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def quantile_of_size(errors: Errors, level: float) -> np.ndarray:
    """``(m,)`` the quantile of the errors' sizes in units of their standard error.

    Sizes, because prediction errors are symmetric: the estimates of theta are the same for a response turned around its
    mean, and the error changes its sign.
    """
    with np.errstate(divide="ignore"):
        sizes = np.divide(np.abs(errors.error), errors.scale, where=errors.error != 0, out=np.zeros_like(errors.error))
    quantiles: np.ndarray = np.quantile(sizes, level, axis=0)
    return quantiles


class _Scale:
    """Henderson's standard errors of the targets at many estimates."""

    def __init__(self, fitted: Fitted, targets: Targets):
        self._stats, self._targets = fitted.stats, targets
        self._rows = effect_rows(targets, fitted.stats)
        try:
            self._blocks: DependentEffects | None = DependentEffects(fitted.stats, self._rows)
        except TooLarge:
            self._blocks = None

    def __call__(self, theta: np.ndarray, sigma: np.ndarray) -> np.ndarray:
        """``(B, m)`` from ``theta (B, k)``, ``sigma (B,)``."""
        numbers = 1 if self._blocks is None else self._blocks.n_blocks * self._blocks.size**2
        step = 1 if self._blocks is None else max(1, CHUNK // numbers)
        parts = [np.zeros((0, len(self._rows.X)))]
        for i in range(0, len(theta), step):
            lambdas = relative_factors(theta[i : i + step], self._stats.layout.qs)
            D = tuple(L @ np.swapaxes(L, -1, -2) for L in lambdas)
            factors = factors_in_bases(lambdas, self._stats)
            if self._blocks is None:
                variance = Equations(self._stats, [F[0] for F in factors]).variance(self._rows)[None]
            else:
                variance = self._blocks.variance(factors)
            variance = variance + self._targets.fresh_variance(D)
            parts.append(sigma[i : i + step, None] * np.sqrt(np.maximum(variance, 0.0)))
        return np.concatenate(parts)


def _known_columns(targets: Targets, design: Design) -> sp.csr_array:
    """Columns of the targets' known effects, in the order of :func:`~mixjax.simulation.random_columns`."""
    m, terms = len(targets.X), []
    for term, Z, level in zip(design.terms, targets.Z, targets.level, strict=True):
        q = np.shape(term.Z)[1]
        own, group = np.zeros((m, q)), np.zeros(m, int)
        if Z is not None and level is not None:
            own, group = np.where((level >= 0)[:, None], Z, 0.0), np.maximum(level, 0)
        terms.append(replace(term, Z=own, group=group))
    return random_columns(replace(design, terms=tuple(terms)))
