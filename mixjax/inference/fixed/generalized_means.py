"""Marginal means of generalised linear mixed models on the scale of the response, and averaged over random effects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NoReturn

import numpy as np
import pandas as pd

from mixjax.checks import InferenceWarning, warn
from mixjax.distributions import normal_quantile
from mixjax.engine.coordinates import coordinates_in
from mixjax.engine.equations import covariances_with_slopes
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.fitted.parameters import is_covariance
from mixjax.inference.fixed.contrasts import ddf_note
from mixjax.inference.fixed.families import COLUMNS, Combinations, family_tests
from mixjax.inference.fixed.grid import FixedPart
from mixjax.inference.fixed.marginal_means import Contrasts, MarginalMeans
from mixjax.inference.fixed.means import means_over_grid
from mixjax.tables import NotedTable

# Links whose differences are logarithms of ratios -> the ratio's column.
RATIOS = {"log": "ratio", "logit": "odds_ratio"}
MEDIAN = "random effects zero: of the median subject; integrate=True averages over subjects"


def emmeans(
    fitted: GeneralizedFitted,
    spec: Any,
    by: Any = None,
    at: Mapping[str, Any] | None = None,
    scale: str | None = None,
    integrate: bool = False,
    level: float = 0.95,
) -> MarginalMeans:
    """Marginal means of a generalised linear mixed model, as R's ``emmeans``.

    Args:
        fitted: the fit. spec, by, at, level: as of :func:`mixjax.inference.fixed.means.emmeans`.
        scale: ``"link"``: of the linear predictor, random effects zero. ``"response"``: these as means of the response,
            of the median subject: averaged over the grid first, then transformed. None: the former, or the latter with
            ``integrate=True``.
        integrate: average every mean of the grid over the random effects, and then over the grid: the population's
            means.

    On the scale of the response standard errors are by the delta method and intervals transformed from the link's.
    Contrasts of links log and logit are ratios (of rates, of odds), with the tests and the transformed intervals of the
    link's scale; of other links, and of averaged means, differences, by the delta method. Averaged means have it over
    fixed effects and covariances of the random effects together.

    Returns:
        MarginalMeans.

    Raises:
        DataError: as there; random effects read a factor that is not among the fixed effects. ValueError: no such
        scale; the mean over random effects does not exist.

    Example:
        >>> import mixjax as mj
        >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
        >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
        >>> fit.emmeans("Days", at={"Days": [0, 9]}, scale="response").to_frame().round(3)
           Days  estimate  std_error   df  lower  upper
        0   0.0     0.039      0.026  inf  0.011  0.136
        1   9.0     0.888      0.060  inf  0.710  0.963
        >>> fit.emmeans("Days", at={"Days": [0, 9]}, integrate=True).to_frame().round(3)
           Days  estimate  std_error   df  lower  upper
        0   0.0     0.098      0.045  inf  0.039  0.227
        1   9.0     0.801      0.070  inf  0.631  0.905
    """
    if scale not in (None, "link", "response"):
        raise ValueError(f"scale must be 'link' or 'response', got {scale!r}")
    if not isinstance(integrate, bool | np.bool_):
        raise ValueError(f"integrate must be True or False, got {integrate!r}")
    if integrate and scale == "link":
        raise ValueError("integrate=True averages means of the response, which scale='link' has none of")
    model = FixedPart(fitted)
    base, grid, rows = means_over_grid(fitted, model, spec, by, at, "wald", level, "marginal means", model.rows)
    if not integrate and scale != "response":
        return base
    fitted.refuse_extra_zeros(
        "a marginal mean of the response", "take scale='link', of counts that are no extra zeros, or predict() rows"
    )
    family, est = fitted.family, fitted.estimates
    own = {field.name: getattr(base, field.name) for field in fields(base)}
    if not integrate:
        eta = base.offset + base.W @ est.beta
        slopes = np.asarray(family.mean_slope(eta))[:, None] * base.W
        own["title"] = f"{base.title}, on the scale of the response"
        return ResponseMeans(
            **own, means=np.asarray(family.mean(eta)), slopes=slopes, covariance=np.asarray(est.vcov), averaged=False
        )
    k = len(base.cells)
    X, free = model.weights(rows.X)
    means, slopes = _averages(fitted, X, rows.offset, model.effects(grid.table))
    own |= {
        "title": f"{base.title}, averaged over random effects",
        "open": np.abs(free).reshape(k, len(free) // k, free.shape[1]).max(axis=1),
    }
    covariance = np.asarray(est.vcov_all)
    if not is_covariance(covariance):
        warn(
            "the Hessian is not positive definite at these estimates, so there are no standard errors: "
            f"{fitted.optimizer.message}",
            InferenceWarning,
        )
        covariance = np.full_like(covariance, np.nan)
    return ResponseMeans(
        **own, means=means.reshape(k, -1).mean(1), slopes=slopes.reshape(k, -1, slopes.shape[1]).mean(1),
        covariance=covariance, averaged=True,
    )  # fmt: skip


def _averages(
    fitted: GeneralizedFitted, X: np.ndarray, offset: np.ndarray, Z: list[np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """Means ``(g,)`` over all random effects, and derivatives ``(g, T)`` by all parameters."""
    est, rows = fitted.estimates, fitted.rows
    x, _ = coordinates_in(est.theta, rows.layout, [basis.R for basis in rows.Z_bases])
    moved = covariances_with_slopes(x, rows)[3]
    eta, variance, by_x = offset + X @ est.beta, np.zeros(len(X)), np.zeros((len(X), len(x)))
    for own, Sigma, slopes in zip(Z, est.Sigma, moved, strict=True):
        variance = variance + np.einsum("ma,ab,mb->m", own, Sigma, own, optimize=True)
        by_x = by_x + np.einsum("ma,kab,mb->mk", own, slopes, own, optimize=True)
    means = np.asarray(fitted.family.integrated_mean(eta, variance))
    by_eta, by_variance = map(np.asarray, fitted.family.integrated_slopes(eta, variance))
    by_psi = np.zeros((len(X), fitted.rows.n_psi))
    return means, np.concatenate([by_eta[:, None] * X, by_psi, by_variance[:, None] * by_x], axis=1)


@dataclass(frozen=True, kw_only=True)
class ResponseMeans(MarginalMeans):
    """Means of the response for the cells of some factors.

    Attributes:
        means: ``(k,)``. slopes: ``(k, T)`` derivatives by parameters. covariance: ``(T, T)`` of these. averaged: over
            the random effects; otherwise those are zero.
    """

    means: np.ndarray
    slopes: np.ndarray
    covariance: np.ndarray
    averaged: bool

    @property
    def ratio(self) -> str:
        """What contrasts are called where they are ratios."""
        return "" if self.averaged else RATIOS.get(self.fitted.family.link, "")  # type: ignore[union-attr]

    def to_frame(self) -> pd.DataFrame:
        """The cells with estimate, std_error, df, lower, upper on the scale of the response; printed with notes."""
        every, family = np.eye(len(self.W)), self.fitted.family  # type: ignore[union-attr]
        found = self._delta(every)
        if self.averaged:
            lower, upper = family.mean_interval(found.estimate, found.std_error, normal_quantile(0.5 + self.level / 2))
            known = family.link != "custom"
            about = f"intervals by way of the {family.link} of the means" if known else "intervals, symmetric"
        else:
            link = family_tests(super().combinations(every), level=self.level).table
            lower, upper = family.mean_between(link["lower"].to_numpy(float), link["upper"].to_numpy(float))
            about = f"intervals transformed from the scale of the {family.link} link; {MEDIAN}"
        own = (found.estimate, found.std_error, found.df, lower, upper)
        missing = np.isnan(found.estimate)
        columns = {name: np.where(missing, np.nan, one) for name, one in zip(COLUMNS[:5], own, strict=True)}
        frame = pd.concat([self.cells, pd.DataFrame(columns)], axis=1)
        return NotedTable(frame, (f"{ddf_note(self.ddf)}, {100 * self.level:g} % {about}", *self._notes(frame)))

    def combinations(self, weights: np.ndarray) -> Combinations:
        """Linear combinations ``(r, k)`` of the means; of the predictors where contrasts are ratios."""
        return super().combinations(weights) if self.ratio else self._delta(weights)

    def estimable(self, weights: np.ndarray) -> np.ndarray:
        """``(r,)``: does every mean with a weight depend on nothing that was left out of the fit?"""
        found: np.ndarray = ~((weights != 0) & self.open.any(axis=1)).any(axis=1)
        return super().estimable(weights) if self.ratio else found

    def contrast_rows(self, method: Any = "pairwise", ref: Any = None, interaction: Any = None) -> Contrasts:
        """As of :class:`MarginalMeans`.

        Raises:
            ValueError: contrasts are ratios, and weights do not sum to zero.
        """
        found = super().contrast_rows(method, ref, interaction)
        weights = found.weights
        if self.ratio and (np.abs(weights.sum(axis=1)) > 1e-8 * np.abs(weights).sum(axis=1)).any():
            raise ValueError(
                "weights that do not sum to zero make no ratio of means: take scale='link', or weights that sum to zero"
            )
        return found

    def eff_size(self, *_: Any, **__: Any) -> NoReturn:
        """Not of means of the response.

        Raises:
            ValueError: always.
        """
        raise ValueError("effect sizes are differences on the scale of the linear predictor: take scale='link'")

    def _delta(self, weights: np.ndarray) -> Combinations:
        slopes = weights @ self.slopes
        # Differences that cancel leave roundings, which no standard error should be made of.
        slopes = np.where(np.abs(slopes) <= 1e-13 * (np.abs(weights) @ np.abs(self.slopes)), 0.0, slopes)
        exists = self.estimable(weights)
        same = ~slopes.any(axis=1)
        sizes, vectors = np.linalg.eigh(np.where(np.isfinite(self.covariance), self.covariance, 0.0))
        root = slopes @ (vectors * np.sqrt(np.maximum(sizes, 0.0)))
        with np.errstate(invalid="ignore"):
            error = np.sqrt(np.einsum("ri,ij,rj->r", slopes, self.covariance, slopes))
        error = np.where(same, 0.0, error)
        contrast = np.abs(weights.sum(axis=1)) <= 1e-12 * np.abs(weights).sum(axis=1)
        estimate = np.where(same & contrast, 0.0, weights @ self.means)
        df = np.where(same, np.nan, np.inf)
        estimate, error, df = (np.where(exists, own, np.nan) for own in (estimate, error, df))
        return Combinations(estimate, error, df, np.where(exists[:, None], root, 0.0))

    def _table(self, rows: Contrasts, found: Combinations, adjust: str, level: float | None) -> pd.DataFrame:
        table = super()._table(rows, found, adjust, level)
        if not self.ratio:
            return table
        notes = table.attrs["notes"]
        frame = pd.DataFrame(table)
        ratio = np.exp(frame["estimate"])
        frame = frame.assign(
            estimate=ratio, std_error=ratio * frame["std_error"], lower=np.exp(frame["lower"]),
            upper=np.exp(frame["upper"]),
        )  # fmt: skip
        frame.insert(list(frame.columns).index("statistic"), "null", 1.0)
        about = f"tests and intervals are those of the scale of the {self.fitted.family.link}"  # type: ignore[union-attr]
        return NotedTable(frame.rename(columns={"estimate": self.ratio}), (f"{notes[0]}; {about}", *notes[1:]))
