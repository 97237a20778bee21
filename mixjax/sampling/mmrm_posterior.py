"""Draws from the posterior of a model for repeated measures, and what is computed from them."""

from __future__ import annotations

from typing import Any, Literal

import jax
import numpy as np

from mixjax.checks import check_count, check_level, check_memory
from mixjax.design import RepeatedDesign
from mixjax.engine.visit_sums import VisitSums
from mixjax.fitted.names import term_names
from mixjax.fitted.repeated import RepeatedFitted
from mixjax.formula.repeated import RepeatedLabels
from mixjax.machine import float64, jit
from mixjax.prediction.repeated import new_places
from mixjax.sampling.draws import Draws, Sampling, of_rows
from mixjax.sampling.loo import Loo
from mixjax.sampling.model_priors import ModelPriors
from mixjax.sampling.names import Names, names_of
from mixjax.sampling.priors import Priors

# Draws in one call of the program.
BATCH = 256


class MMRMPosterior(Draws):
    """Draws from the posterior of a model for repeated measures, as :func:`mixjax.bayes_mmrm` returns them.

    Standard deviations are absolute. Draws stand in arrays ``(chains, draws, ...)``.
    """

    def __init__(
        self,
        fitted: RepeatedFitted,
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
    def reml_fit(self) -> RepeatedFitted:
        """The REML fit of the same model, at which the search for the mode began."""
        return self._fitted

    @property
    def design(self) -> RepeatedDesign:
        """Arrays of the model."""
        return self._fitted.design

    @property
    def labels(self) -> RepeatedLabels:
        """Names of columns, visits and subjects."""
        return self._fitted.labels

    @property
    def _names(self) -> Names:
        return names_of(self.design, self.labels)

    @property
    def Sigma(self) -> dict[str, np.ndarray]:
        """Dict arm -> ``(chains, draws, visits, visits)`` covariances between visits; of one for all arms by the name
        of the subjects' column."""
        return self._covariances(term_names(self.labels))

    def ranef(self) -> Any:
        """There are none.

        Raises:
            ValueError: always.
        """
        raise ValueError("repeated measures of mixjax.bayes_mmrm have no random effects; mixjax.bayes has")

    # --- predictions --------------------------------------------------------------------------------------------------

    def predict(
        self,
        newdata: Any = None,
        interval: Literal["confidence", "prediction"] = "confidence",
        level: float = 0.95,
        draws: bool = False,
        key: Any = None,
    ) -> Any:
        """Means or new responses of the rows of the fit or of a new table, over the posterior.

        Args:
            newdata: table with the columns of the formula, for ``"prediction"`` also those of visits and arms; None for
                the rows of the fit.
            interval: ``"confidence"``: of the mean. ``"prediction"``: of a response of a new subject at this visit.
            level: between quantiles.
            draws: True for the draws of means themselves, ``(chains x draws, rows)``, NaN in rows with missing values.
            key: of what is drawn anew; by default that of the posterior.

        Returns:
            data frame ``mean``, ``sd``, ``lower``, ``upper`` with the index of newdata; or an array.

        Raises:
            ValueError: draws of new responses, which are correlated within subjects: :meth:`simulate` has those of the
                rows of the fit. DataError: a column is missing, or a visit is none of the fit's.
        """
        if interval not in ("confidence", "prediction"):
            raise ValueError(f"interval must be 'confidence' or 'prediction', got {interval!r}")
        check_level(level)
        if draws and interval == "prediction":
            raise ValueError(
                "draws of new responses would be independent from row to row, and visits of a subject are not: "
                "simulate() has those of the rows of the fit; intervals row by row are right"
            )
        rows = new_places(self._fitted, newdata, interval == "prediction")
        S, m = len(self._beta), len(rows.X)
        check_memory(f"{S} draws of {m} rows", S * m * 8, "predict fewer rows at a time")
        values = self._beta @ rows.X.T + rows.offset
        values[:, ~rows.estimable] = np.nan
        if interval == "prediction":
            sd = np.stack([np.sqrt(np.einsum("abs,abs->sa", F, F)) for F in self._factors])[rows.arm, :, rows.visit].T
            if rows.weights is not None:
                sd = sd / np.sqrt(rows.weights)
            values = values + sd * self._rng(2, key).standard_normal((S, m))
        return of_rows(values, rows.labels, rows.complete, level, draws)

    def simulate(self, n: int | None = None, key: Any = None) -> np.ndarray:
        """Posterior predictive responses of the rows of the fit ``(n, nobs)``, of new subjects with the same visits,
        one for each of n draws.

        Args:
            n: how many; None for all draws.
        """
        S = len(self._beta)
        count = S if n is None else check_count("n", n, 1, S)
        at = np.linspace(0, S - 1, count).round().astype(int)
        design, rng = self.design, self._rng(3, key)
        subject, visit = np.asarray(design.subject), np.asarray(design.visit)
        arm = np.zeros(len(subject), int) if design.arm is None else np.asarray(design.arm)[subject]
        found: np.ndarray = self._beta[at] @ np.asarray(design.X).T
        found = found if design.offset is None else found + np.asarray(design.offset)
        scale = 1.0 if design.weights is None else 1.0 / np.sqrt(np.asarray(design.weights))
        for a, F in enumerate(self._factors):
            own = arm == a
            errors = np.einsum(
                "abs,snb->sna", F[..., at], rng.standard_normal((count, design.n_subjects, F.shape[1])), optimize=True
            )
            found[:, own] += (errors[:, subject, visit] * scale)[:, own]
        return found

    # --- cross-validation ---------------------------------------------------------------------------------------------

    def log_lik(self, by: str | None = None) -> np.ndarray:
        """Log densities at every draw.

        Args:
            by: None: of the rows, each given the other visits of its subject, ``(chains, draws, nobs)``. The column of
                the subjects: of all rows of a subject together, ``(chains, draws, subjects)``.
        """
        name = self.labels.repetition.subject.name
        if by not in (None, name):
            raise ValueError(f"by must be None or the column of the subjects, {name!r}; got {by!r}")
        rows, sums = self._fitted.rows, VisitSums.of(self._fitted.rows)
        S = len(self._beta)
        subjects = len(rows.order)
        found = np.empty((S, rows.n if by is None else subjects))
        log_w = np.zeros(rows.n) if rows.sqrt_w is None else 2.0 * np.log(rows.sqrt_w)
        visit = np.asarray(self.design.visit)
        factors = [np.moveaxis(F, -1, 0) for F in self._factors]
        with float64():
            for first in range(0, S, BATCH):
                at = np.minimum(np.arange(first, first + BATCH), S - 1)
                parts = [np.asarray(a) for a in _by_subject([F[at] for F in factors], self._beta[at], sums)]
                twice, away, precision = (a[: min(BATCH, S - first)] for a in parts)
                own = slice(first, min(first + BATCH, S))
                if by is None:
                    e, p = away[:, rows.place, visit], precision[:, rows.place, visit]
                    found[own] = 0.5 * (np.log(p) - np.log(2.0 * np.pi) - p * e * e + log_w)
                else:
                    counts = np.bincount(rows.place, minlength=subjects)
                    sums_w = np.bincount(rows.place, weights=log_w, minlength=subjects)
                    found[own] = -0.5 * (twice + counts * np.log(2.0 * np.pi) - sums_w)
        if by is not None:
            whole = np.zeros((S, self.design.n_subjects))
            whole[:, rows.order] = found
            found = whole
        densities: np.ndarray = found.reshape(*self.shape, -1)
        return densities

    def loo(self, by: str | None = None) -> Loo:
        """Expected log predictive density of what is left out, by Pareto-smoothed importance sampling.

        Args:
            by: None: row by row, each given the other visits of its subject (Buerkner, Gabry & Vehtari 2021, Comput.
                Stat. 36, 1243). The column of the subjects: subject by subject, for new subjects.

        Returns:
            :class:`~mixjax.sampling.loo.Loo`.

        Warns:
            InferenceWarning: k-hat of some unit is above 0.7.
        """
        log_lik = self.log_lik(by)
        if by is None:
            return self._loo(log_lik, "rows", self.labels.frame.index)
        return self._loo(log_lik, by, list(self.labels.terms[0].levels))

    # --- arviz --------------------------------------------------------------------------------------------------------

    def to_arviz(self, log_likelihood: bool = False, predictive: bool = False) -> Any:
        """ArviZ's InferenceData (from ArviZ 1 on a DataTree): parameters by name, and the response.

        Args:
            log_likelihood: add log densities of the rows, each given the other visits of its subject. predictive: add
                posterior predictive responses.

        Raises:
            ImportError: arviz is not installed.
        """
        more = {}
        if log_likelihood:
            more["log_likelihood"] = self.log_lik()
        if predictive:
            more["posterior_predictive"] = self.simulate().reshape(*self.shape, -1)
        return self._to_arviz({}, np.asarray(self.design.y), more)


@jit
def _by_subject(factors: Any, beta: Any, sums: VisitSums) -> Any:
    return jax.vmap(lambda factors, beta: sums.by_subject(factors, beta))(factors, beta)
