"""Draws from the posterior of a generalised linear mixed model, and what is computed from them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import jax
import numpy as np

from mixjax.checks import check_count, check_level, check_memory
from mixjax.design import Design, Labels
from mixjax.engine.family_draws import NODES, density_of_rows, effects_at, has_quadrature, log_densities_by_level
from mixjax.families import Family
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.fitted.names import term_names
from mixjax.machine import float64, jit
from mixjax.prediction.asked import check_asked, effects_included, rows_asked
from mixjax.prediction.generalized import trials_of
from mixjax.products.family_rows import FamilyRows, places_of
from mixjax.sampling.draws import Sampling, of_rows
from mixjax.sampling.effects import fresh_effects
from mixjax.sampling.laplace_shift import LaplaceShift, laplace_shift
from mixjax.sampling.laplace_shift import places_of as places_at
from mixjax.sampling.loo import Loo
from mixjax.sampling.model_priors import ModelPriors
from mixjax.sampling.names import Names, names_of
from mixjax.sampling.posterior import Posterior
from mixjax.sampling.priors import Priors
from mixjax.simulation import as_key, random_columns

# Draws in one call of the programs.
BATCH = 250


class GLMMPosterior(Posterior):
    """Draws from the posterior of a generalised linear mixed model, as :func:`mixjax.bayes` returns them with
    ``family=``.

    Parameters were drawn with random effects integrated out by Laplace's approximation; :meth:`laplace_check` says how
    far that is from the likelihood itself. Everything about random effects is on the scale of the link. Draws stand in
    arrays ``(chains, draws, ...)``.
    """

    def __init__(
        self,
        fitted: GeneralizedFitted,
        priors: Priors,
        model: ModelPriors,
        z: np.ndarray,
        beta: np.ndarray,
        sampling: Sampling,
        key: Any,
        nagq: int = 1,
    ):
        self._glmm, self._key, self.nagq = fitted, key, nagq
        self.priors, self.model, self.z, self.beta, self.sampling = priors, model, z, beta, sampling

    # --- the model ----------------------------------------------------------------------------------------------------

    @property
    def ml_fit(self) -> GeneralizedFitted:
        """The fit of the same model by maximum likelihood, at which the search for the mode began; it need not have
        converged."""
        return self._glmm

    @property
    def reml_fit(self) -> Any:
        """There is none.

        Raises:
            ValueError: always.
        """
        raise ValueError("a generalised model has no REML fit here: ml_fit is that by maximum likelihood")

    @property
    def design(self) -> Design:
        """Arrays of the model; of a binomial response ``y`` are counts of successes."""
        return self._glmm.design

    @property
    def labels(self) -> Labels:
        """Names of columns, effects and levels."""
        return self._glmm.labels

    @property
    def family(self) -> Family:
        """Distribution of the response given its linear predictor."""
        return self._glmm.family

    @property
    def sigma(self) -> np.ndarray:
        """There is none; parameters of the family are in :attr:`draws`, by name.

        Raises:
            ValueError: always.
        """
        raise ValueError("a generalised model has no sigma of its own: its family's parameters are among .names")

    @property
    def _names(self) -> Names:
        return names_of(self.design, self.labels, self.family)

    @property
    def _rows(self) -> FamilyRows:
        return self._glmm.rows

    def _psi(self, at: Any = slice(None)) -> np.ndarray:
        """``(S, s)`` coefficients of the family's parameters."""
        z = self._z[at].T
        psi = [
            own if one.kind == "positive" else one.value(own)
            for one, own in zip(self.model.others, self.model.others_of(z), strict=True)
        ]
        return np.stack(psi, axis=1) if psi else np.zeros((z.shape[1], 0))

    def _psi_by_row(self, columns: Sequence[np.ndarray | None], at: Any = slice(None)) -> list[np.ndarray]:
        """The family's parameters, each ``(S, 1)`` or ``(S, m)`` where it has columns ``(m, r)``."""
        psi, found = self._psi(at), []
        for j, place in enumerate(places_of(self._rows.psi_widths)):
            own = columns[j] if columns else None
            found.append(psi[:, place] if own is None else psi[:, place] @ np.asarray(own).T)
        return found

    # --- Laplace's approximation --------------------------------------------------------------------------------------

    @cached_property
    def _shift(self) -> LaplaceShift:
        with float64():
            key = jax.random.fold_in(as_key(self._key), 7)
        flat = self.draws.reshape(-1, self.draws.shape[-1])
        return laplace_shift(self._z, flat, self.names, self.model, self._rows, key)

    def laplace_check(self) -> LaplaceShift:
        """How far the posterior is from that by the likelihood itself.

        Some draws are weighted by the likelihood over Laplace's approximation of it: by quadrature of one grouping
        factor with up to three effects a level, else by importance sampling of all random effects. Pareto's k-hat of
        the weights and the shifts of means, in posterior standard deviations, stand in the summary; large ones are
        warned of.

        Returns:
            :class:`~mixjax.sampling.laplace_shift.LaplaceShift`: ``table``, ``khat``.

        Raises:
            ValueError: the posterior is by quadrature.
        """
        if self.nagq > 1:
            raise ValueError(f"this posterior is by quadrature, nagq={self.nagq}: there is no approximation to check")
        return self._shift

    def notes(self, level: float = 0.95) -> tuple[str, ...]:
        """What stands below the summary."""
        found = super(Posterior, self).notes(level)
        note = self._shift.note if self.nagq == 1 else f"random effects integrated out by {self.nagq} nodes an effect"
        return (*found[:2], note, *found[2:])

    def problems(self) -> list[str]:
        """What speaks against the draws, in sentences; empty where nothing does."""
        found = super().problems()
        if self.nagq == 1 and (problem := self._shift.problem):
            found.append(problem)
        return found

    # --- random effects -----------------------------------------------------------------------------------------------

    @cached_property
    def b(self) -> dict[str, np.ndarray]:
        """Dict term -> ``(chains, draws, levels, q)`` random effects given each draw of the other parameters: by
        elliptical slice sampling that begins with a draw of the normal distribution at the modes, so that they have
        their own distribution and not that normal one."""
        z, rows, S = self._z, self._rows, len(self._z)
        found = [np.empty((S, term.n_groups, np.shape(term.Z)[1])) for term in self.design.terms]
        with float64():
            keys = jax.random.split(jax.random.fold_in(as_key(self._key), 1), S)
            for first in range(0, S, BATCH):
                at = np.minimum(np.arange(first, first + BATCH), S - 1)
                drawn = effects_at(places_at(z[at], self.model), keys[at], rows)
                kept = slice(first, min(first + BATCH, S))
                for whole, own in zip(found, drawn, strict=True):
                    whole[kept] = np.asarray(own)[: kept.stop - first]
        return {
            name: own.reshape(*self.shape, *own.shape[1:])
            for name, own in zip(term_names(self.labels), found, strict=True)
        }

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
        scale: Literal["response", "link"] = "response",
        size: Any = None,
    ) -> Any:
        """Means or new responses of the rows of the fit or of a new table, over the posterior.

        Args:
            newdata, random, allow_new_levels: as in :meth:`mixjax.GLMMFit.predict`. Unknown levels have effects drawn
                from the distribution of levels, each row its own.
            interval: ``"confidence"``: of the mean. ``"prediction"``: of a new response, with new effects of the terms
                that ``random`` leaves out; of a binomial response of the proportion.
            level: between quantiles.
            draws: True for the draws themselves, ``(chains x draws, rows)``, NaN in rows with missing values.
            key: of what is drawn anew; by default that of the posterior.
            scale: ``"response"``, or ``"link"`` for the linear predictor.
            size: number or ``(rows,)`` of trials of the new binomial responses, as there.

        Returns:
            data frame ``mean``, ``sd``, ``lower``, ``upper`` with the index of newdata; or an array.
        """
        check_asked(allow_new_levels, interval)
        check_level(level)
        if interval is None:
            raise ValueError("interval must be 'confidence' or 'prediction'")
        if scale not in ("response", "link"):
            raise ValueError(f"scale must be 'response' or 'link', got {scale!r}")
        new, fitted, family = interval == "prediction", self._glmm, self.family
        if new and scale == "link":
            raise ValueError("new responses have the scale of the response: leave scale= out")
        trials = new and family.support == "trials"
        if size is not None and not trials:
            raise ValueError("size= are numbers of trials of new binomial responses, interval='prediction'")
        included = effects_included(self.labels, random)
        needed = [new or (name == "zero_inflation" and scale == "response") for name in family.psi_names]
        whole = "new response" if new else None
        asked = rows_asked(fitted, newdata, included, allow_new_levels, whole, trials and size is None, needed)
        targets, S, m = asked.targets, len(self._z), len(asked.targets.X)
        check_memory(f"{S} draws of {m} rows", S * m * 8, "predict fewer rows at a time")
        flat = (
            tuple(own.reshape(S, *own.shape[2:]) for own in self.b.values()) if any(w.any() for w in included) else ()
        )
        b = flat or tuple(np.zeros((S, t.n_groups, np.shape(t.Z)[1])) for t in self.design.terms)
        values, rng = targets.mean(self._beta, b), self._rng(2, key)
        for Z, F in zip(targets.fresh(), self._factors, strict=True):
            if Z is not None and Z.any():
                values = values + np.einsum("mq,qrs,smr->sm", Z, F, rng.standard_normal((S, m, F.shape[0])))
        if scale == "response":
            psi = self._psi_by_row(asked.psi)
            if new:
                n = trials_of(fitted, asked, size, newdata, trials)
                values = self._responses(values, n, psi, rng)
                values = values if n is None else values / n
            else:
                values = np.asarray(family.response_mean(np.asarray(family.mean(values)), psi))
        return of_rows(values, asked.index, asked.complete, level, draws)

    def _responses(
        self, eta: np.ndarray, size: np.ndarray | None, psi: list[np.ndarray], rng: np.random.Generator
    ) -> np.ndarray:
        """``(S, m)`` drawn at predictors ``(S, m)``."""
        n = None if size is None else np.broadcast_to(size, eta.shape[1:])
        whole = [np.broadcast_to(own, eta.shape) for own in psi]
        with np.errstate(invalid="ignore", divide="ignore"):
            drawn = np.stack([self.family.sample(rng, own, n, [one[s] for one in whole]) for s, own in enumerate(eta)])
        if np.isnan(drawn).any():
            raise ValueError(
                f"link {self.family.link!r} gives no mean to {int(np.isnan(drawn).sum())} of {drawn.size} linear "
                "predictors, because they are 0 or less; use link='log'"
            )
        return drawn

    def simulate(
        self, n: int | None = None, random: Literal["fitted", "new"] = "fitted", key: Any = None
    ) -> np.ndarray:
        """Posterior predictive responses of the rows of the fit ``(n, nobs)``, one for each of n draws; of a binomial
        family counts of successes.

        Args:
            n: how many; None for all draws. random: ``"fitted"``: of the same levels. ``"new"``: of new ones.
        """
        if random not in ("fitted", "new"):
            raise ValueError(f"random must be 'fitted' or 'new', got {random!r}")
        S = len(self._z)
        count = S if n is None else check_count("n", n, 1, S)
        at, rng, design = np.linspace(0, S - 1, count).round().astype(int), self._rng(3, key), self.design
        if random == "fitted":
            eta = self.predict(draws=True, scale="link")[at]
        else:
            fresh = [fresh_effects(F[..., at], term, rng) for F, term in zip(self._factors, design.terms, strict=True)]
            flat = np.concatenate([own.reshape(count, -1) for own in fresh], axis=1)
            eta = self._beta[at] @ np.asarray(design.X).T + np.asarray((random_columns(design) @ flat.T).T)
            eta = eta if design.offset is None else eta + np.asarray(design.offset)
        size = None if design.size is None else np.asarray(design.size)
        return self._responses(eta, size, self._psi_by_row(design.psi_columns, at), rng)

    # --- cross-validation ---------------------------------------------------------------------------------------------

    def log_lik(self, by: str | None = None) -> np.ndarray:
        """Log densities at every draw, times case weights.

        Args:
            by: None: of the rows, given their random effects, ``(chains, draws, nobs)``. The only grouping factor: of
                all rows of a level together, random effects integrated out by quadrature (of more than three effects by
                Laplace's approximation), ``(chains, draws, levels)``.
        """
        rows, S = self._rows, len(self._z)
        if by is None:
            eta, psi = self.predict(draws=True, scale="link"), self._psi_by_row(self.design.psi_columns)
            with float64():
                found = np.asarray(_densities(eta, psi, rows))
            return found.reshape(*self.shape, -1)
        self._check_factor(by)
        if len(rows.levels) > 1:
            raise ValueError(
                f"loo(by={by!r}) integrates over random effects level by level, which is for one grouping factor; this "
                f"model has {len(rows.levels)}: loo() leaves out rows"
            )
        nodes = NODES[rows.Z[0].shape[1]] if has_quadrature(rows) else 1
        found = np.empty((S, rows.levels[0]))
        with float64():
            for first in range(0, S, BATCH):
                at = np.minimum(np.arange(first, first + BATCH), S - 1)
                block = np.asarray(log_densities_by_level(places_at(self._z[at], self.model), rows, nodes))
                found[first : first + BATCH] = block[: min(BATCH, S - first)]
        return found.reshape(*self.shape, -1)

    def loo(self, by: str | None = None) -> Loo:
        """Expected log predictive density of what is left out, by Pareto-smoothed importance sampling.

        Args:
            by: None: row by row, given the other rows of its level. The only grouping factor: level by level, random
                effects integrated out: for new levels.

        Returns:
            :class:`~mixjax.sampling.loo.Loo`.

        Raises:
            ValueError: ``by`` is no grouping factor, or there are several.

        Warns:
            InferenceWarning: k-hat of some unit is above 0.7.
        """
        return super().loo(by)


@jit
def _densities(eta: Any, psi: Any, rows: FamilyRows) -> Any:
    return jax.vmap(lambda eta, psi: density_of_rows(eta, psi, rows))(eta, psi)
