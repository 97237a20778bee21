"""Draws from the posterior of a linear mixed model, and what is computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np
import pandas as pd

from mixjax.checks import check_count, check_level, check_memory
from mixjax.design import Design, Labels
from mixjax.engine.by_level import level_products
from mixjax.estimation.residual import transform_of
from mixjax.fitted.names import modes_by_group, term_names
from mixjax.fitted.record import Fitted
from mixjax.prediction.asked import check_asked, effects_included, rows_asked
from mixjax.sampling.draws import Draws, Sampling, of_rows
from mixjax.sampling.effects import draw_effects, draw_effects_of_residuals
from mixjax.sampling.loo import Loo, log_lik_by_level, log_lik_of_residuals
from mixjax.sampling.model_priors import ModelPriors
from mixjax.sampling.names import Names, names_of
from mixjax.sampling.predictive import Noise, noise_of, respond
from mixjax.sampling.priors import Priors


class Posterior(Draws):
    """Draws from the posterior of a linear mixed model, as :func:`mixjax.bayes` returns them.

    Standard deviations are absolute. Draws stand in arrays ``(chains, draws, ...)``.
    """

    def __init__(
        self,
        fitted: Fitted,
        priors: Priors,
        model: ModelPriors,
        z: np.ndarray,
        beta: np.ndarray,
        sampling: Sampling,
        key: Any,
    ):
        self._fitted, self._key = fitted, key
        self.priors, self.model, self.z, self.beta, self.sampling = priors, model, z, beta, sampling

    # --- the model ----------------------------------------------------------------------------------------------------

    @property
    def reml_fit(self) -> Fitted:
        """The REML fit of the same model, at which the search for the mode began.

        Raises:
            ValueError: sigma is known, which no fit has.
        """
        if self.model.sigma is None:
            raise ValueError("a posterior with a known sigma has no REML fit: that would estimate it")
        return self._fitted

    @property
    def design(self) -> Design:
        """Arrays of the model."""
        return self._fitted.given

    @property
    def labels(self) -> Labels:
        """Names of columns, effects and levels."""
        return self._fitted.labels

    @property
    def _names(self) -> Names:
        return names_of(self.design, self.labels)

    # --- draws of the parameters --------------------------------------------------------------------------------------

    @property
    def sigma(self) -> np.ndarray:
        """``(chains, draws)`` residual standard deviations, where columns of a dispersion are 0."""
        sigma: np.ndarray = np.exp(self.model.log_sigma_of(np.moveaxis(self.z, -1, 0)))
        return sigma

    @property
    def Sigma(self) -> dict[str, np.ndarray]:
        """Dict term -> ``(chains, draws, q, q)`` covariances of its random effects, absolute; of levels with a known
        covariance, times that."""
        return self._covariances(term_names(self.labels))

    def _flat(self) -> tuple[list[np.ndarray], np.ndarray, np.ndarray]:
        """Factors ``(q, q, S)``, sigma ``(S,)``, beta ``(S, p)``."""
        return self._factors, self.sigma.ravel(), self._beta

    @cached_property
    def _noise(self) -> Noise:
        return noise_of(self.design, self.model, self._z)

    def notes(self, level: float = 0.95) -> tuple[str, ...]:
        """What stands below the summary."""
        found = super().notes(level)
        if self.model.sigma is not None:
            return found
        return (*found[:2], f"residual standard deviation known: {float(self.sigma.flat[0]):g}", *found[2:])

    # --- random effects -----------------------------------------------------------------------------------------------

    @cached_property
    def b(self) -> dict[str, np.ndarray]:
        """Dict term -> ``(chains, draws, levels, q)`` random effects, drawn exactly and jointly given each draw of the
        other parameters."""
        factors, _, beta = self._flat()
        design, noise, rng = self.design, self._noise, self._rng(1)
        if not design.terms:
            return {}
        if design.has_residual_side:
            drawn = draw_effects_of_residuals(design, factors, noise.middling, noise.gamma, noise.c, beta, rng)
        else:
            drawn = draw_effects(design, factors, noise.middling, beta, rng)
        return {
            name: own.reshape(*self.shape, *own.shape[1:])
            for name, own in zip(term_names(self.labels), drawn, strict=True)
        }

    def ranef(self, stat: Literal["mean", "sd"] = "mean") -> dict[str, pd.DataFrame]:
        """Dict group -> data frame, levels by effects: posterior means of the random effects, or standard deviations.

        All draws are in :attr:`b`.
        """
        if stat not in ("mean", "sd"):
            raise ValueError(f"stat must be 'mean' or 'sd', got {stat!r}; draws are in .b")
        parts = [getattr(own, {"mean": "mean", "sd": "std"}[stat])(axis=(0, 1)) for own in self.b.values()]
        return modes_by_group(self.labels, parts)

    # --- predictions --------------------------------------------------------------------------------------------------

    def predict(
        self,
        newdata: Any = None,
        random: bool | str | Sequence[str] = True,
        allow_new_levels: bool = False,
        interval: Literal["confidence", "prediction"] = "confidence",
        level: float = 0.95,
        draws: bool = False,
        key: Any = None,
    ) -> Any:
        """Means or new responses of the rows of the fit or of a new table, over the posterior.

        Args:
            newdata, random, allow_new_levels: as in :meth:`mixjax.LMMFit.predict`. Unknown levels have effects drawn
                from the distribution of levels, each row its own.
            interval: ``"confidence"``: of the mean. ``"prediction"``: of a new response, with the residual, and new
                effects of the terms that ``random`` leaves out.
            level: between quantiles. draws: True for the draws themselves, ``(chains x draws, rows)``, NaN in rows with
                missing values. key: of what is drawn anew; by default that of the posterior.

        Returns:
            data frame ``mean``, ``sd``, ``lower``, ``upper`` with the index of newdata; or an array.

        Raises:
            ValueError: draws of new responses whose residuals are correlated; :meth:`simulate` has those of the rows
                of the fit.
        """
        check_asked(allow_new_levels, interval)
        check_level(level)
        if interval is None:
            raise ValueError("interval must be 'confidence' or 'prediction'")
        if draws and interval == "prediction" and self.design.residual is not None:
            raise ValueError(
                "draws of new responses would be independent from row to row, and residuals of this model are not: "
                "simulate() has those of the rows of the fit; intervals row by row are right"
            )
        included = effects_included(self.labels, random)
        whole = "new response" if interval == "prediction" else None
        asked = rows_asked(self._fitted, newdata, included, allow_new_levels, whole)
        targets, (factors, _, beta) = asked.targets, self._flat()
        S, m = len(beta), len(targets.X)
        check_memory(f"{S} draws of {m} rows", S * m * 8, "predict fewer rows at a time")
        flat = (
            tuple(own.reshape(S, *own.shape[2:]) for own in self.b.values()) if any(w.any() for w in included) else ()
        )
        b = flat or tuple(np.zeros((S, t.n_groups, np.shape(t.Z)[1])) for t in self.design.terms)
        values = targets.mean(beta, b)
        rng = self._rng(2, key)
        for Z, F in zip(targets.fresh(), factors, strict=True):
            if Z is not None and Z.any():
                values = values + np.einsum("mq,qrs,smr->sm", Z, F, rng.standard_normal((S, m, F.shape[0])))
        if targets.noise.any():
            sd = np.sqrt(targets.noise) * self._relative_noise(asked.dispersion)
            values = values + sd * rng.standard_normal((S, m))
        return of_rows(values, asked.index, asked.complete, level, draws)

    def simulate(
        self, n: int | None = None, random: Literal["fitted", "new"] = "fitted", key: Any = None
    ) -> np.ndarray:
        """Posterior predictive responses of the rows of the fit ``(n, nobs)``, one for each of n draws.

        Args:
            n: how many; None for all draws. random: ``"fitted"``: of the same levels. ``"new"``: of new ones.
        """
        if random not in ("fitted", "new"):
            raise ValueError(f"random must be 'fitted' or 'new', got {random!r}")
        S = self.z.shape[0] * self.z.shape[1]
        count = S if n is None else check_count("n", n, 1, S)
        new = random == "new"
        at = np.linspace(0, S - 1, count).round().astype(int)
        if new:
            return respond(self.design, self.model, self._z[at], self._beta[at], self._rng(3, key))[0]
        noise = self._noise.take(at)
        responses: np.ndarray = self.predict(draws=True)[at] + noise.sample(self.design, self._rng(2, key))
        return responses

    def _relative_noise(self, W: np.ndarray | None) -> np.ndarray:
        """``(S, m)`` or ``(S, 1)`` by what the root of a target's noise, which is relative to sigma and has the
        dispersion of the fit, is to be multiplied."""
        sigma = self.sigma.ravel()[:, None]
        if W is None:
            return sigma
        d = W.shape[1]
        away = self._noise.gamma - np.asarray(self._fitted.estimates.residual)[:d]
        relative: np.ndarray = sigma * np.exp(away @ W.T)
        return relative

    # --- cross-validation ---------------------------------------------------------------------------------------------

    def log_lik(self, by: str | None = None) -> np.ndarray:
        """Log densities at every draw.

        Args:
            by: None: of the rows, given their random effects, ``(chains, draws, nobs)``. A grouping factor: of all rows
                of a level together, random effects integrated out, ``(chains, draws, levels)``; of the only factor, or
                the outermost of nested ones.
        """
        factors, sigma, beta = self._flat()
        design, noise = self.design, self._noise
        if by is None:
            if design.residual is not None:
                raise ValueError(
                    "residuals of this model are correlated, and the density of a row given its random effects depends "
                    "on other rows: leave out whole levels, by=a grouping factor"
                )
            sd = noise.sd(design)
            values = -0.5 * ((np.asarray(design.y) - self.predict(draws=True)) / sd) ** 2
            values = values - np.log(sd) - 0.5 * np.log(2.0 * np.pi)
        elif design.has_residual_side:
            group, m = self._independent_rows(by)
            values = log_lik_of_residuals(
                design, transform_of(design), group, m, factors, noise.middling, noise.gamma, noise.c, beta
            )
        else:
            values = log_lik_by_level(self._products_by(by), factors, sigma, beta)
        found: np.ndarray = values.reshape(*self.shape, -1)
        return found

    def _independent_rows(self, by: str) -> tuple[np.ndarray, int]:
        """Levels of a factor that rows of different levels are independent by: the outermost of nested ones, or that of
        the correlation of residuals where there are no random terms."""
        if self.labels.terms:
            self._check_factor(by)
            layout = self._fitted.layout
            factor = layout.terms[[term.group for term in self.labels.terms].index(by)].factor
            if layout.dense or factor != layout.chain[-1]:
                raise ValueError(
                    f"loo(by={by!r}) integrates over random effects level by level, and levels of {by!r} share random "
                    "effects with others: it is for one grouping factor, or the outermost of nested ones"
                )
            term = self.design.terms[[term.group for term in self.labels.terms].index(by)]
            return np.asarray(term.group), term.n_groups
        if by != self.labels.residual_group or self.design.residual is None:
            of = (
                f"that of the residuals, {self.labels.residual_group!r}"
                if self.labels.residual_group
                else "there is none"
            )
            raise ValueError(f"by must be a grouping factor of the model: {of}; got {by!r}")
        codes = np.unique(np.asarray(self.design.residual.group), return_inverse=True)[1].reshape(-1)
        return codes, int(codes.max()) + 1

    def _check_factor(self, by: str) -> None:
        groups = [term.group for term in self.labels.terms]
        if by not in groups:
            known = ", ".join(map(repr, dict.fromkeys(groups)))
            raise ValueError(f"by must be a grouping factor of the model, {known}; got {by!r}")

    def _products_by(self, by: str) -> Any:
        self._check_factor(by)
        groups = [term.group for term in self.labels.terms]
        factor = self._fitted.layout.terms[groups.index(by)].factor
        try:
            return level_products(self.design, factor)
        except ValueError as error:
            raise ValueError(f"loo(by={by!r}) integrates over random effects level by level: {error}") from None

    def loo(self, by: str | None = None) -> Loo:
        """Expected log predictive density of what is left out, by Pareto-smoothed importance sampling.

        Args:
            by: None: row by row, given the other rows of its level, as brms and lme4's users know it: for new rows of
                the levels that were seen. A grouping factor: level by level, random effects integrated out: for new
                levels.

        Returns:
            :class:`~mixjax.sampling.loo.Loo`.

        Raises:
            ValueError: ``by`` is no grouping factor, or one whose levels share random effects with others, as crossed
                factors do.

        Warns:
            InferenceWarning: k-hat of some unit is above 0.7.
        """
        log_lik = self.log_lik(by)
        if by is None:
            return self._loo(log_lik, "rows", self.labels.frame.index)
        levels = [term.levels for term in self.labels.terms if term.group == by]
        return self._loo(log_lik, by, list(levels[0]) if levels else range(log_lik.shape[-1]))

    # --- arviz --------------------------------------------------------------------------------------------------------

    def to_arviz(self, log_likelihood: bool = False, predictive: bool = False) -> Any:
        """ArviZ's InferenceData (from ArviZ 1 on a DataTree): parameters by name, random effects as ``b_<term>``, the
        response.

        Args:
            log_likelihood: add log densities of the rows. predictive: add posterior predictive responses.

        Raises:
            ImportError: arviz is not installed.
        """
        more = {}
        if log_likelihood:
            more["log_likelihood"] = self.log_lik()
        if predictive:
            more["posterior_predictive"] = self.simulate().reshape(*self.shape, -1)
        return self._to_arviz(self.b, np.asarray(self.design.y), more)
