"""The bootstrap: refits of many data sets that are drawn from one fit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import jax
import numpy as np
import pandas as pd

from mixjax.checks import InferenceWarning, check_count, check_level, warn
from mixjax.estimation.choice import EngineName, check_engine
from mixjax.estimation.glmm_many import KEEP as KEEP_FAMILY
from mixjax.estimation.many import KEEP
from mixjax.fitted.batch import BatchFit
from mixjax.fitted.either import AnyFitted
from mixjax.fitted.names import names_apart
from mixjax.fitted.record import Fitted
from mixjax.markup import Report, Reported
from mixjax.optimise.results import counts_of, failed, note_of_failures
from mixjax.resampling import intervals
from mixjax.resampling.kinds import Kind, resampler
from mixjax.resampling.replicates import Data, fit_drawn, refits
from mixjax.resampling.statistic import Statistic
from mixjax.tables import frame_report


def bootstrap(
    fitted: AnyFitted,
    key: Any,
    n: int,
    kind: Kind = "parametric",
    statistic: Callable[[Any], Any] | None = None,
    chunk: int | None = None,
    progress: bool | None = None,
    weights: Literal["mammen", "rademacher"] = "mammen",
    modes: bool = False,
    engine: EngineName = "auto",
) -> Bootstrap:
    """Draw n data sets from a fit, refit each by the same criterion, and collect a statistic of them.

    Args:
        fitted: the fit, linear or generalised; its rows are needed.
        key: int or JAX key. Replicate i depends on the key and on i, to the last bit, and not on chunk, nor on n but
            for the engine that it takes. (Of generalised models to rounding; crossed ones are refitted from the first
            fit of their chunk, which shows in the seventh digit.)
        n: number of replicates.
        kind: how data sets are drawn.

            * ``"parametric"``: random effects and residuals from their estimated normal distributions; responses of
              generalised models from their family.
            * ``"residual"``: predicted random effects, by level, and residuals, by row, drawn with replacement after
              they were centred and rescaled to the estimated variances (Carpenter, Goldstein & Rasbash 2003, Appl.
              Statist. 52, 431). No normal distribution is assumed. Of linear models.
            * ``"cases"``: levels of the outermost grouping factor with all their rows. Nothing is assumed but that they
              are independent; other factors must be nested in it. A level drawn twice becomes two levels. Data sets of
              generalised models are fitted one after another, by NumPy.
            * ``"wild"``: marginal residuals of every outermost level, adjusted for leverage (HC2), times one random
              number (Modugno & Giannerini 2015, Commun. Stat. Theory Methods 44, 4812). For the fixed effects under
              residual covariances that are not those of the model. Of linear models.
        statistic: JAX function of one :class:`~mixjax.Estimates`, or :class:`~mixjax.GLMMEstimates`, -> scalar, array,
            or dict of those. None: all parameters of the model, standard deviations and correlations of the random
            effects first, then sigma, or the family's parameters, then the fixed effects.
        chunk: so many data sets are in memory at the same time; None for as many as fit into about 100 MB.
        engine: ``"numpy"`` or ``"jax"``; ``"auto"`` compiles a program where n fits pay for it. Engines differ by
            rounding.
        progress: whether to show it; None for :func:`mixjax.show_progress`'s choice.
        weights: of the wild bootstrap: Mammen's two points, which keep the skewness, or Rademacher's signs.
        modes: the statistic needs the random effects ``b`` too. With cases, of the levels in the order drawn; not of
            generalised models.

    Returns:
        :class:`Bootstrap`.

    Raises:
        ValueError: an argument makes no sense, or the model cannot be resampled in this way.

    Warns:
        InferenceWarning: refits failed. Their rows are NaN, and they are counted.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.resampling.bootstrap import bootstrap
        >>> fit = mj.lmm("Yield ~ 1 + (1 | Batch)", mj.datasets.load("dyestuff"))
        >>> result = bootstrap(fit.record, key=1, n=200)
        >>> list(result.replicates.columns)
        ['sd_Intercept|Batch', 'sigma', 'Intercept']
        >>> result.confint(kind="basic").columns.tolist()
        ['lower', 'upper']
    """
    n = check_count("n", n, 1)
    resample = resampler(fitted, kind, key, weights)
    check_engine(engine)
    if modes and kind == "cases" and not isinstance(fitted, Fitted):
        raise ValueError("modes=True: samples of cases of a generalised model have other levels each; use 'parametric'")
    compute = _Kept(fitted, statistic, modes, engine)
    chunk = None if chunk is None else check_count("chunk", chunk, 1)
    found = refits(resample, n, compute.fields, compute.reml, engine, chunk, progress, "bootstrap: refitting")
    parts = [compute.values_of(est) for _, (est,) in found]
    values, singular, result = (np.concatenate(part) for part in zip(*parts, strict=True))
    replicates = pd.DataFrame(values, columns=list(compute.names))
    done = Bootstrap(replicates, compute.estimate, kind, singular, result, fitted, compute)
    if note := note_of_failures(result):
        warn(
            f"{note} (see .counts): what is computed from the others holds only for data sets that can be fitted",
            InferenceWarning,
        )
    return done


@dataclass(frozen=True, eq=False)
class Bootstrap(Reported):
    """Replicates of a statistic. ``str()`` is a table with the counts.

    Attributes:
        replicates: one row per data set, one column per term; NaN in all columns where the refit failed, and where the
            term is undefined, as a correlation is beside a zero variance.
        estimate: the statistic of the fit itself.
        kind: how data sets were drawn.
        singular: ``(n,)`` some covariance has less than full rank. result: ``(n,)`` codes of ``mixjax.Result``.
    """

    replicates: pd.DataFrame
    estimate: pd.Series
    kind: str
    singular: np.ndarray = field(repr=False)
    result: np.ndarray = field(repr=False)
    _fitted: AnyFitted = field(repr=False)
    _compute: _Kept = field(repr=False)

    @property
    def converged(self) -> np.ndarray:
        """``(n,)`` the refit converged."""
        return ~failed(self.result)

    @property
    def counts(self) -> pd.Series:
        """How many replicates there are, how many converged, are singular (of those), and failed, by code."""
        return pd.Series(counts_of(self.result, self.singular, "replicates"), name="count")

    @property
    def used(self) -> pd.Series:
        """Per term the number of replicates that have a value."""
        return self.replicates.notna().sum().rename("used")

    @property
    def std_error(self) -> pd.Series:
        """Standard deviations of the replicates."""
        return self.replicates.std().rename("std_error")

    @property
    def bias(self) -> pd.Series:
        """Mean of the replicates less the estimate."""
        return (self.replicates.mean() - self.estimate).rename("bias")

    def confint(
        self, level: float = 0.95, kind: Literal["percentile", "basic", "normal", "bca"] = "percentile"
    ) -> pd.DataFrame:
        """Confidence intervals, terms in rows.

        Args:
            level: between 0 and 1.
            kind: ``"percentile"``: quantiles of the replicates. ``"basic"``: these reflected at the estimate.
                ``"normal"``: estimate less bias, plus and minus normal quantiles of the standard error. ``"bca"``:
                percentile limits corrected for bias and for a standard error that changes with the parameter; needs
                the refits without each level of the outermost grouping factor, which are made now.

        Returns:
            DataFrame with ``lower`` and ``upper``; see :mod:`mixjax.resampling.intervals`.

        Raises:
            ValueError: level or kind is none; or there are no levels to leave out for BCa.

        Warns:
            InferenceWarning: a term has no BCa limits; they are NaN.
        """
        check_level(level)
        values, estimate = self.replicates.to_numpy(), self.estimate.to_numpy()
        if kind == "percentile":
            limits = intervals.percentile(values, level)
        elif kind == "basic":
            limits = intervals.basic(values, estimate, level)
        elif kind == "normal":
            limits = intervals.normal(self.bias.to_numpy(), self.std_error.to_numpy(), estimate, level)
        elif kind == "bca":
            acceleration = intervals.acceleration(intervals.jackknife(self._fitted, self._compute.refitted))
            limits = intervals.bca(values, estimate, acceleration, level)
            missing = self.estimate.index[np.isnan(limits).any(axis=1)]
            if len(missing):
                warn(
                    f"no BCa limits for {', '.join(missing)}: all replicates lie on one side of the estimate, or the "
                    "estimate is undefined with or without one of the levels",
                    InferenceWarning,
                )
        else:
            raise ValueError(f"kind must be one of {', '.join(map(repr, intervals.KINDS))}, got {kind!r}")
        return pd.DataFrame(limits, index=self.estimate.index, columns=["lower", "upper"])

    def to_frame(self) -> pd.DataFrame:
        """Tidy: term, estimate, bias, std_error, and the number of replicates that they rest on."""
        columns = [self.estimate.rename("estimate"), self.bias, self.std_error, self.used]
        return pd.concat(columns, axis=1).rename_axis("term").reset_index()

    def summary(self) -> str:
        """The table as text, with the counts above it and what was left out below."""
        notes = self._notes()
        return "\n".join([self._head(), "", self.to_frame().to_string(index=False), *([""] if notes else []), *notes])

    def _report(self) -> Report:
        return frame_report(self.to_frame(), [self._head()], self._notes())

    def _head(self) -> str:
        counts = self.counts
        head = f"{self.kind.capitalize()} bootstrap of {self._fitted.labels.formula!r}: {counts['replicates']} "
        return head + "replicates, " + ", ".join(f"{number} {name}" for name, number in counts.iloc[1:].items())

    def _notes(self) -> list[str]:
        undefined = self.counts["converged"] - self.used
        return [
            f"{term} is undefined in {number} of the replicates that converged; they are left out."
            for term, number in undefined.items()
            if number
        ]

    def __str__(self) -> str:
        return self.summary()

    __repr__ = __str__


# --- what is kept of a refit ----------------------------------------------------------------------------------------


class _Values(NamedTuple):
    """``values (B, k)``, NaN where the refit failed; ``singular (B,)``; ``result (B,)``."""

    values: np.ndarray
    singular: np.ndarray
    result: np.ndarray


class _Kept:
    """The statistic of every refit, with its value and names in the fit itself.

    Attributes:
        fields: of the estimates, that a refit is asked for. reml: by what criterion, of linear models.
    """

    def __init__(self, fitted: AnyFitted, function: Callable[[Any], Any] | None, modes: bool, engine: EngineName):
        linear = isinstance(fitted, Fitted)
        self.reml = fitted.reml
        self._family = None if isinstance(fitted, Fitted) else fitted.family
        self._engine: EngineName = engine
        self._labels, self._structures = fitted.labels, fitted.layout.structures
        own = fitted.estimates
        # The covariance of a generalised model's estimates takes an evaluation more, which parameters alone need not.
        kept = {
            *(KEEP if linear else KEEP_FAMILY),
            "Sigma",
            *["vcov"] * (linear or function is not None),
            *["b"] * modes,
            *(name for name in ("residual", "kernels") if getattr(fitted.estimates, name, None) is not None),
        }
        self.fields = tuple(name for name in own._fields if name in kept)
        self._statistic = None
        own = type(own)._make(getattr(own, f) if f in kept else None for f in own._fields)
        if function is None:
            frame = self._parameters(jax.tree.map(lambda a: np.asarray(a)[None], own))
            self.names, values = tuple(frame), frame.to_numpy()[0]
        else:
            self._statistic = Statistic(function, own)
            self.names, values = self._statistic.names, self._statistic.estimate
        self.estimate = pd.Series(values, index=pd.Index(self.names, name="term"), name="estimate")

    def refitted(self, data: Data, n: int) -> _Values:
        """Of the fits of B data sets, of n in all."""
        return self.values_of(fit_drawn(data, n, self.fields, self.reml, self._engine))

    def values_of(self, est: Any) -> _Values:
        """Of B fits."""
        values = self._parameters(est).to_numpy() if self._statistic is None else self._statistic.of_many(est)
        values = np.where(failed(est.result)[:, None], np.nan, values)
        return _Values(values, est.singular, est.result)

    def _parameters(self, est: Any) -> pd.DataFrame:
        batch = BatchFit(est, self._labels, self._structures, self._family)
        frame = batch.sdcor
        fixed = batch.fixef.set_axis(names_apart(self._labels.fixed, frame.columns), axis=1)
        return pd.concat([frame, fixed], axis=1)
