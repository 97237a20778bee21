"""Many fits of one model, with names: the data-frame face of :func:`mixjax.estimate_many`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mixjax.covariance import Structure
from mixjax.design import Labels
from mixjax.estimation.estimate import Estimates
from mixjax.estimation.glmm import GLMMEstimates
from mixjax.families import Family
from mixjax.fitted.names import by_effect, further_of, names_apart, names_of_further, names_of_variances, terms_of_group
from mixjax.fitted.parameters import parameters_of_family
from mixjax.markup import Report, Reported
from mixjax.optimise.results import Result, counts_of
from mixjax.tables import frame_report

# Fits that a notebook shows.
MOST = 10


@dataclass(frozen=True)
class BatchFit(Reported):
    """B fits of one model; every frame has one row per response, in the order given.

    Rows of fits that failed hold whatever the search ended with: look at ``converged``, or use ``ok``.

    Attributes:
        estimates: arrays with a leading axis B, see :class:`mixjax.Estimates` and :class:`mixjax.GLMMEstimates`.
        labels: names. structures: of the covariances, one per term. family: of a generalised model, else None.
    """

    estimates: Estimates | GLMMEstimates
    labels: Labels
    structures: tuple[Structure, ...]
    family: Family | None = None

    def __len__(self) -> int:
        return len(self.estimates.result)

    @property
    def fixef(self) -> pd.DataFrame:
        """Fixed effects ``(B, p)``."""
        return pd.DataFrame(self.estimates.beta, columns=list(self.labels.fixed))

    @property
    def se(self) -> pd.DataFrame:
        """Standard errors of the fixed effects ``(B, p)``: of linear models with the covariances of the random effects
        taken as known, of generalised ones from the Hessian of all parameters."""
        diagonal = np.diagonal(self.estimates.vcov, axis1=1, axis2=2)
        with np.errstate(invalid="ignore"):
            return pd.DataFrame(np.sqrt(diagonal), columns=list(self.labels.fixed))

    @property
    def sigma(self) -> pd.Series:
        """Residual standard deviations ``(B,)``.

        Raises:
            AttributeError: the family has none.
        """
        own = self._family_parameters()
        if "sigma" not in own:
            assert self.family is not None
            raise AttributeError(f"a {self.family.name} response has no sigma; sdcor has the family's parameters")
        return pd.Series(own["sigma"], name="sigma")

    def _family_parameters(self) -> dict[str, np.ndarray]:
        """``(B,)`` of the distribution of the response, by name: sigma, or those of a family."""
        if self.family is None:
            return {"sigma": self.estimates.sigma}  # type: ignore[union-attr]
        names, own, _ = parameters_of_family(self.labels, self.family, self.estimates.psi.T)  # type: ignore[union-attr]
        return dict(zip(names, own, strict=True))

    @property
    def sdcor(self) -> pd.DataFrame:
        """Standard deviations and correlations of the random effects, then sigma, or the parameters of the family.

        Columns ``sd_Days|Subject``, ``cor_Days.Intercept|Subject``, ..., parameters of residuals or of kernels,
        ``sigma``. A correlation with an effect of zero variance is NaN.
        """
        variances = names_of_variances(self.labels, self.structures)
        columns = {parameter.name: parameter.value(self.estimates.Sigma) for parameter in variances}
        further = further_of(self.estimates)
        if further.size:
            columns |= dict(zip(names_of_further(self.labels), further.T, strict=True))
        others = self._family_parameters()
        columns |= dict(zip(names_apart(list(others), columns), others.values(), strict=True))
        return pd.DataFrame(columns, index=range(len(self)))

    def ranef(self) -> dict[str, pd.DataFrame]:
        """Conditional modes (BLUPs) of all fits, kept by ``refit_many(Y, ranef=True)``.

        Returns:
            dict group -> DataFrame (B * levels x effects) with the index (``replicate``, ``level``).
        """
        if self.estimates.b is None:
            raise ValueError("the random effects were not kept; ask for them by refit_many(Y, ranef=True)")
        found = {}
        for group, mine in terms_of_group(self.labels).items():
            levels = list(self.labels.terms[mine[0]].levels)
            b = np.concatenate([self.estimates.b[t] for t in mine], axis=2)
            index = pd.MultiIndex.from_product([range(len(self)), levels], names=["replicate", "level"])
            effects = [effect for t in mine for effect in self.labels.terms[t].effects]
            found[group] = pd.DataFrame(b.reshape(-1, b.shape[2]), index, effects)
        return found

    def coef(self) -> dict[str, pd.DataFrame]:
        """Coefficients per level: fixed effects plus the random effects of the same name; as :meth:`ranef`."""
        return {
            group: with_fixed(
                frame, {name: np.repeat(x.to_numpy(), len(frame) // len(self)) for name, x in self.fixef.items()}
            )
            for group, frame in self.ranef().items()
        }

    @property
    def criterion(self) -> pd.Series:
        """ML deviances or REML criteria ``(B,)``."""
        return pd.Series(self.estimates.criterion, name="criterion")

    @property
    def converged(self) -> pd.Series:
        return pd.Series(self.estimates.converged, name="converged")

    @property
    def singular(self) -> pd.Series:
        """Some covariance matrix has less than full rank."""
        return pd.Series(self.estimates.singular, name="singular")

    @property
    def ok(self) -> np.ndarray:
        """Positions of the fits that converged."""
        return np.flatnonzero(self.estimates.converged)

    @property
    def counts(self) -> pd.Series:
        """How many fits there are, how many converged, are singular (of those that converged), and failed, by code."""
        return pd.Series(counts_of(self.estimates.result, self.estimates.singular, "fits"))

    def to_frame(self) -> pd.DataFrame:
        """One row per response: fixed effects, their standard errors (``se_...``), sds and correlations, codes.

        A fixed effect that has the name of another column is ``beta_...`` (and ``se_beta_...``).
        """
        others = pd.concat(
            [
                self.sdcor,
                self.criterion,
                self.converged,
                self.singular,
                pd.Series([Result(code).name for code in self.estimates.result], name="result"),
            ],
            axis=1,
        )
        names = names_apart(self.labels.fixed, others.columns)
        errors = [f"se_{name}" for name in names]
        return pd.concat([self.fixef.set_axis(names, axis=1), self.se.set_axis(errors, axis=1), others], axis=1)

    def _report(self) -> Report:
        frame = self.to_frame()
        more = [f"and {len(frame) - MOST} more, see to_frame()"] * (len(frame) > MOST)
        return frame_report(frame.head(MOST), [repr(self).strip("<>")], more, index=True, known=False)

    def __repr__(self) -> str:
        parts = [f"{count} {name}" for name, count in self.counts.items() if name != "fits"]
        return f"<BatchFit of {len(self)}: {', '.join(parts)}>"


def with_fixed(ranef: pd.DataFrame, fixef: Mapping[Any, Any]) -> pd.DataFrame:
    """Coefficients per level: name -> fixed effect (one, or one for every row) plus the random effects of that name,
    in which factors of an interaction may stand in another order."""
    name_of = by_effect({name: name for name in fixef})
    random = {name_of(str(effect), effect): ranef[effect].to_numpy() for effect in ranef}
    zeros = np.zeros(len(ranef))
    return pd.DataFrame(
        {name: random.get(name, zeros) + fixef.get(name, 0.0) for name in dict.fromkeys([*fixef, *random])},
        index=ranef.index,
    )
