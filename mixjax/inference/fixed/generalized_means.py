"""Marginal means of generalised linear mixed models on the scale of the response, and averaged over random effects."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from scipy.special import expit, logit

from mixjax.checks import InferenceWarning, warn
from mixjax.distributions import normal_quantile
from mixjax.engine.coordinates import coordinates_in
from mixjax.engine.equations import covariances_with_slopes
from mixjax.families.links import RATIOS_OF_MEANS
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.fitted.parameters import is_covariance
from mixjax.formula.evaluate import Columns
from mixjax.inference.fixed.contrasts import ddf_note
from mixjax.inference.fixed.families import COLUMNS, Combinations, family_tests
from mixjax.inference.fixed.grid import FixedPart, Grid
from mixjax.inference.fixed.marginal_means import Contrasts, MarginalMeans
from mixjax.inference.fixed.means import means_over_grid
from mixjax.tables import NotedTable

MEDIAN = "random effects zero: of the median subject; integrate=True averages over subjects"
# Of models with extra zeros: what a mean may be of, and what its title says.
COMPONENTS = {"cond": "of counts that are no extra zeros", "response": "extra zeros among the responses"}
# What means may be transformed to before they are compared: the function, its derivative and its inverse.
TRANSFORMS: dict[str, tuple[Callable[[Any], Any], Callable[[Any], Any], Callable[[Any], Any]]] = {
    "log": (np.log, lambda m: 1.0 / m, np.exp),
    "logit": (logit, lambda m: 1.0 / (m * (1.0 - m)), expit),
}


def emmeans(
    fitted: GeneralizedFitted,
    spec: Any,
    by: Any = None,
    at: Mapping[str, Any] | None = None,
    scale: str | None = None,
    integrate: bool = False,
    component: str | None = None,
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
        component: of a model with ``ziformula=`` and means of the response: ``"cond"``: of counts that are no extra
            zeros, as glmmTMB's emmeans; ``"response"`` or None: of the response, ``(1 - pi) mu``, as
            :func:`~mixjax.prediction.generalized.predict`. Variables of ``ziformula=`` are in the grid then, and means
            are averaged over it after they are formed, with or without random effects.

    On the scale of the response standard errors are by the delta method and intervals transformed from the link's.
    Contrasts of links log and logit are ratios (of rates, of odds), with the tests and the transformed intervals of the
    link's scale; of other links, and of averaged means, differences, by the delta method. Averaged means have it over
    all parameters together: fixed effects, those of extra zeros, covariances of the random effects.
    :meth:`ResponseMeans.regrid` makes ratios of any means.

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
    component = _component(fitted, component, integrate or scale == "response")
    zeros = fitted.labels.state.psi[-1] if component == "response" else None
    model = FixedPart(fitted, [zeros[0]] if zeros else [])
    base, grid, rows = means_over_grid(fitted, model, spec, by, at, "wald", level, "marginal means", model.rows)
    if not integrate and scale != "response":
        return base
    family, est = fitted.family, fitted.estimates
    own = {field.name: getattr(base, field.name) for field in fields(base)}
    more = f", {COMPONENTS[component]}" if component else ""
    if not integrate and component != "response":
        eta = base.offset + base.W @ est.beta
        slopes = np.asarray(family.mean_slope(eta))[:, None] * base.W
        own["title"] = f"{base.title}, on the scale of the response{more}"
        return ResponseMeans(
            **own, means=np.asarray(family.mean(eta)), slopes=slopes, covariance=np.asarray(est.vcov), averaged=False
        )
    k = len(base.cells)
    X, free = model.weights(rows.X)
    means, slopes = _averages(fitted, X, rows.offset, model.effects(grid.table) if integrate else None)
    if zeros:
        means, slopes, left = _with_zeros(fitted, model, zeros, grid, means, slopes)
        free = np.concatenate([free, left], axis=1)
    what = "averaged over random effects" if integrate else "on the scale of the response"
    own |= {
        "title": f"{base.title}, {what}{more}",
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
        covariance=covariance, averaged=True, median=not integrate,
    )  # fmt: skip


def _component(fitted: GeneralizedFitted, component: Any, of_response: bool) -> str:
    """Which part of a model with extra zeros means are of; empty where there is but one."""
    if component not in (None, *COMPONENTS):
        raise ValueError(f"component must be None, 'cond' or 'response', got {component!r}")
    if fitted.family.plain is fitted.family:
        if component is not None:
            raise ValueError(
                "component= is of models with ziformula=; the means of this one have one part: leave it out"
            )
        return ""
    if of_response:
        return component or "response"
    if component == "response":
        raise ValueError(
            "component='response' is a mean of the response, which the scale of the link has none of: take "
            "scale='response' or integrate=True"
        )
    return ""


def _with_zeros(
    fitted: GeneralizedFitted,
    model: FixedPart,
    zeros: tuple[Columns, np.ndarray],
    grid: Grid,
    means: np.ndarray,
    slopes: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Means ``(1 - pi) mu`` of the rows of a grid, their derivatives by all parameters, and what the columns of
    ``ziformula`` that are in the fit leave open."""
    columns, left = model.rows_of(*zeros, grid.table)
    rows, est = fitted.rows, fitted.estimates
    end = len(est.beta) + rows.n_psi
    width = rows.psi_widths[-1]
    pi = expit(columns @ np.asarray(est.psi)[rows.n_psi - width :])
    means, slopes = (1.0 - pi) * means, (1.0 - pi)[:, None] * slopes
    slopes[:, end - width : end] = -(pi * means)[:, None] * columns
    return means, slopes, left


def _averages(
    fitted: GeneralizedFitted, X: np.ndarray, offset: np.ndarray, Z: list[np.ndarray] | None
) -> tuple[np.ndarray, np.ndarray]:
    """Means ``(g,)`` over all random effects, or where they are zero, and derivatives ``(g, T)`` by all parameters."""
    est, rows = fitted.estimates, fitted.rows
    x, _ = coordinates_in(est.theta, rows.layout, [basis.R for basis in rows.Z_bases])
    eta, variance, by_x = offset + X @ est.beta, np.zeros(len(X)), np.zeros((len(X), len(x)))
    by_psi = np.zeros((len(X), rows.n_psi))
    if Z is None:
        by_eta = np.asarray(fitted.family.mean_slope(eta))
        return np.asarray(fitted.family.mean(eta)), np.concatenate([by_eta[:, None] * X, by_psi, by_x], axis=1)
    moved = covariances_with_slopes(x, rows)[3]
    for own, Sigma, slopes in zip(Z, est.Sigma, moved, strict=True):
        variance = variance + np.einsum("ma,ab,mb->m", own, Sigma, own, optimize=True)
        by_x = by_x + np.einsum("ma,kab,mb->mk", own, slopes, own, optimize=True)
    means = np.asarray(fitted.family.integrated_mean(eta, variance))
    by_eta, by_variance = map(np.asarray, fitted.family.integrated_slopes(eta, variance))
    return means, np.concatenate([by_eta[:, None] * X, by_psi, by_variance[:, None] * by_x], axis=1)


@dataclass(frozen=True, kw_only=True)
class ResponseMeans(MarginalMeans):
    """Means of the response for the cells of some factors.

    Attributes:
        means: ``(k,)``. slopes: ``(k, T)`` derivatives by parameters. covariance: ``(T, T)`` of these.
        averaged: means of rows of the grid were averaged, over random effects (otherwise, ``median``, those are zero)
            and over the grid; else the linear predictors were.
        transform: that :meth:`regrid` was asked for, or empty.
    """

    means: np.ndarray
    slopes: np.ndarray
    covariance: np.ndarray
    averaged: bool
    median: bool = False
    transform: str = ""

    @property
    def ratio(self) -> str:
        """What contrasts are called where they are ratios."""
        scale = self.transform or ("" if self.averaged else self.fitted.family.link)  # type: ignore[union-attr]
        return RATIOS_OF_MEANS.get(scale, "")

    def regrid(self, transform: str) -> ResponseMeans:
        """The same means, compared on another scale, as by R's ``regrid(means, transform)``: contrasts are ratios of
        them, or of their odds, with the delta method on the scale of the logarithm, of the log odds.

        Args:
            transform: ``"log"``: ratios of means, of probabilities risk ratios; ``"logit"``: odds ratios.

        Raises:
            ValueError: no such transformation, or means that do not have it.

        Example:
            >>> import mixjax as mj
            >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
            >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
            >>> means = fit.emmeans("Days", at={"Days": [9, 0]}, integrate=True).regrid("logit")
            >>> means.contrasts()[["contrast", "odds_ratio", "lower", "upper"]].round(1)
              contrast  odds_ratio  lower  upper
            0    9 / 0        37.2   10.3  134.4
        """
        if transform not in TRANSFORMS:
            raise ValueError(f"transform must be 'log' or 'logit', got {transform!r}")
        support = self.fitted.family.plain.support  # type: ignore[union-attr]
        if transform == "logit" and support in ("counts", "positive"):
            raise ValueError(
                "odds are of probabilities, and these means are none: transform='log' makes ratios of them"
            )
        with np.errstate(divide="ignore", invalid="ignore"):
            finite = np.isfinite(TRANSFORMS[transform][0](self.means))
        if not finite[np.isfinite(self.means)].all():
            raise ValueError(
                f"some of the means ({', '.join(f'{one:.4g}' for one in self.means[~finite][:5])}) have no {transform}"
            )
        return replace(self, transform=transform)

    def to_frame(self) -> pd.DataFrame:
        """The cells with estimate, std_error, df, lower, upper on the scale of the response; printed with notes."""
        every, family = np.eye(len(self.W)), self.fitted.family  # type: ignore[union-attr]
        found = self._delta(every)
        z, about = normal_quantile(0.5 + self.level / 2), f"intervals by way of the {self.transform} of the means"
        if self.transform:
            there, slope, back = TRANSFORMS[self.transform]
            middle, width = there(found.estimate), z * slope(found.estimate) * found.std_error
            lower, upper = back(middle - width), back(middle + width)
        elif self.averaged:
            lower, upper = family.mean_interval(found.estimate, found.std_error, z)
            known = family.link != "custom"
            about = f"intervals by way of the {family.link} of the means" if known else "intervals, symmetric"
        else:
            link = family_tests(super().combinations(every), level=self.level).table
            lower, upper = family.mean_between(link["lower"].to_numpy(float), link["upper"].to_numpy(float))
            about = f"intervals transformed from the scale of the {family.link} link"
        if self.median or not self.averaged:
            about = f"{about}; {MEDIAN}"
        own = (found.estimate, found.std_error, found.df, lower, upper)
        missing = np.isnan(found.estimate)
        columns = {name: np.where(missing, np.nan, one) for name, one in zip(COLUMNS[:5], own, strict=True)}
        frame = pd.concat([self.cells, pd.DataFrame(columns)], axis=1)
        return NotedTable(frame, (f"{ddf_note(self.ddf)}, {100 * self.level:g} % {about}", *self._notes(frame)))

    def combinations(self, weights: np.ndarray) -> Combinations:
        """Linear combinations ``(r, k)`` of the means; of their logarithms or predictors where contrasts are ratios."""
        if self.transform:
            there, slope, _ = TRANSFORMS[self.transform]
            means = there(self.means)
            return replace(self, means=means, slopes=slope(self.means)[:, None] * self.slopes)._delta(weights)
        return super().combinations(weights) if self.ratio else self._delta(weights)

    def estimable(self, weights: np.ndarray) -> np.ndarray:
        """``(r,)``: does every mean with a weight depend on nothing that was left out of the fit?"""
        found: np.ndarray = ~((weights != 0) & self.open.any(axis=1)).any(axis=1)
        return super().estimable(weights) if self.ratio and not self.transform else found

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
        scale = f"{self.transform} of the means" if self.transform else self.fitted.family.link  # type: ignore[union-attr]
        about = f"tests and intervals are those of the scale of the {scale}"
        return NotedTable(frame.rename(columns={"estimate": self.ratio}), (f"{notes[0]}; {about}", *notes[1:]))
