"""What is computed of every replicate of a cell, and what the fits of a model to some of them give."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol

import numpy as np
import pandas as pd

from mixjax.checks import DataError, some_of
from mixjax.design import Labels
from mixjax.estimation.choice import EngineName
from mixjax.estimation.estimate import Estimates
from mixjax.families import Family
from mixjax.sampling.priors import Priors


class Source(Protocol):
    """Where responses come from: :class:`~mixjax.studies.scenario.Scenario`, or a population with a number of rows."""

    @property
    def truth(self) -> Mapping[str, float]:
        """Parameter -> value, as far as it is known."""
        ...

    @property
    def nobs(self) -> int:
        """Rows of a data set."""
        ...

    @property
    def options(self) -> Mapping[str, Any]:
        """``weights``, ``offset``, ``contrasts`` of the fits."""
        ...

    def tables(self, key: Any, first: int, count: int) -> tuple[list[pd.DataFrame], np.ndarray]:
        """Predictors of replicates ``first .. first + count - 1``, one table if all share it, and responses
        ``(count, n)``."""
        ...


@dataclass(frozen=True)
class Task:
    """The computation of every replicate of a cell.

    Attributes:
        source: responses. models: name -> formula to fit. compared: pairs (smaller, larger) of names.
        key: of the cell. reml: criterion of linear fits; likelihood ratios are always by ML.
        ddf: test of the fixed effects; None: Satterthwaite's of linear models, Wald's of generalised ones.
        null: their values under the hypothesis, 0 where not named.
        statistic: JAX function of one :class:`~mixjax.Estimates` (or :class:`~mixjax.GLMMEstimates`) -> number, array
            or dict of those; or None.
        engine: of the fits, as for :func:`mixjax.estimate_many`. fits: number of replicates that ``"auto"`` goes by.
        family, size: of generalised models to fit; None: what the source says. nagq: quadrature nodes an effect.
        estimator: ``"likelihood"``, or ``"bayes"`` with ``priors``, None for the default ones.
    """

    source: Any
    models: Mapping[str, str]
    key: Any
    compared: tuple[tuple[str, str], ...] = ()
    reml: bool = True
    ddf: str | None = None
    null: Mapping[str, float] = field(default_factory=dict)
    statistic: Callable[[Estimates], Any] | None = None
    engine: EngineName = "auto"
    fits: int = 0
    family: Family | None = None
    size: Any = None
    nagq: int = 1
    estimator: str = "likelihood"
    priors: Priors | None = None

    @property
    def options(self) -> Mapping[str, Any]:
        """Of the models that are fitted."""
        if self.family is None:
            found: Mapping[str, Any] = self.source.options
            return found
        known = self.source.options.get("size") if self.family.plain.name == "binomial" else None
        # Formulas of the source's family are none of another one.
        found = {name: value for name, value in self.source.options.items() if name != "of_parameters"}
        return {**found, "family": self.family, "size": known if self.size is None else self.size}


class Model(NamedTuple):
    """Designs of one model for some replicates, of repeated measures RepeatedDesign: one for all, or one each; the
    family, None of a linear one."""

    designs: list[Any]
    labels: Labels
    family: Family | None


class Fits(NamedTuple):
    """Fits of one model to some replicates.

    Attributes:
        estimates: with a leading axis. parameters: name -> estimates ``(B,)``, those of variances after the fixed
            effects. se, df: of the fixed effects ``(B, p)``. deviances: computes those by ML ``(B,)``, NaN where a fit
            failed.
        further: name -> standard errors ``(B,)`` of coefficients of a family's formulas, which are tested by Wald's z.
        p: ``(B, p)`` where they are no t tests: twice the smaller tail probability beside the null. above: ``(B, p)``
            posterior probabilities that a fixed effect is above it.
    """

    estimates: Any
    parameters: dict[str, np.ndarray]
    se: np.ndarray
    df: np.ndarray
    deviances: Callable[[], np.ndarray]
    further: Mapping[str, np.ndarray] = MappingProxyType({})
    p: np.ndarray | None = None
    above: np.ndarray | None = None


def named_apart(fixed: pd.DataFrame, others: pd.DataFrame) -> dict[str, np.ndarray]:
    """Estimates by name.

    Raises:
        DataError: a fixed effect has the name of another parameter.
    """
    if twice := [str(name) for name in fixed if name in others]:
        raise DataError(
            f"the fixed effect {some_of(twice)} has the name of another parameter, and the columns of a study go by "
            "name: rename the predictor"
        )
    return {str(name): values.to_numpy() for name, values in {**fixed, **others}.items()}
