"""The bootstrap: refits of many data sets that are drawn from one fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from mixjax.checks import InferenceWarning, check_count, check_level, warn
from mixjax.estimation.choice import EngineName, check_engine, chosen_engine
from mixjax.estimation.estimate import Estimates
from mixjax.estimation.many import KEEP, estimate_many
from mixjax.fitted.batch import BatchFit
from mixjax.fitted.names import names_apart
from mixjax.fitted.record import Fitted
from mixjax.machine import float64
from mixjax.optimise.results import Result
from mixjax.products.sums import CrossProducts
from mixjax.resampling import intervals
from mixjax.resampling.kinds import NUMBERS, Kind, chunk_size, resampler
from mixjax.resampling.statistic import entries, named

# A statistic is computed for so many replicates at a time, or for fewer where each has many numbers.
STATISTIC = 2**10


def bootstrap(
    fitted: Fitted,
    key: Any,
    n: int,
    kind: Kind = "parametric",
    statistic: Callable[[Estimates], Any] | None = None,
    chunk: int | None = None,
    progress: bool = False,
    weights: Literal["mammen", "rademacher"] = "mammen",
    modes: bool = False,
    engine: EngineName = "auto",
) -> Bootstrap:
    """Draw n data sets from a fit, refit each by the same criterion, and collect a statistic of them.

    Args:
        fitted: the fit; its rows are needed.
        key: int or JAX key. Replicate i depends on the key and on i, to the last bit, and not on chunk, nor on n but
            for the engine that it takes.
        n: number of replicates.
        kind: how data sets are drawn.

            * ``"parametric"``: random effects and residuals from their estimated normal distributions.
            * ``"residual"``: predicted random effects, by level, and residuals, by row, drawn with replacement after
              they were centred and rescaled to the estimated variances (Carpenter, Goldstein & Rasbash 2003, Appl.
              Statist. 52, 431). No normal distribution is assumed.
            * ``"cases"``: levels of the outermost grouping factor with all their rows. Nothing is assumed but that they
              are independent; other factors must be nested in it. A level drawn twice becomes two levels.
            * ``"wild"``: marginal residuals of every outermost level, adjusted for leverage (HC2), times one random
              number (Modugno & Giannerini 2015, Commun. Stat. Theory Methods 44, 4812). For the fixed effects under
              residual covariances that are not those of the model.
        statistic: JAX function of one :class:`~mixjax.Estimates` -> scalar, array, or dict of those. None: all
            parameters of the model, standard deviations and correlations of the random effects first, then sigma, then
            the fixed effects.
        chunk: so many data sets are in memory at the same time; None for as many as fit into about 100 MB.
        engine: ``"numpy"`` or ``"jax"``; ``"auto"`` compiles a program where n fits pay for it. Engines differ by
            rounding.
        progress: a bar, where tqdm is installed.
        weights: of the wild bootstrap: Mammen's two points, which keep the skewness, or Rademacher's signs.
        modes: the statistic needs the random effects ``b`` too. With cases, of the levels in the order drawn.

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
        >>> result.confint(method="basic").columns.tolist()
        ['lower', 'upper']
    """
    n = check_count("n", n, 1)
    resample = resampler(fitted, kind, key, weights)
    check_engine(engine)
    compute = _Statistic(fitted, statistic, modes, engine)
    chunk = chunk_size(resample.numbers) if chunk is None else check_count("chunk", chunk, 1)
    parts = [
        compute.refitted(resample.products(first, min(chunk, n - first)), n)
        for first in _bar(range(0, n, chunk), progress)
    ]
    values, singular, result = (np.concatenate(part) for part in zip(*parts, strict=True))
    replicates = pd.DataFrame(values, columns=list(compute.names))
    done = Bootstrap(replicates, compute.estimate, kind, singular, result, fitted, compute)
    if done.counts["failed"]:
        warn(
            f"{done.counts['failed']} of {n} refits failed and are left out (see .counts): what is computed from the "
            "others holds only for data sets that can be fitted",
            InferenceWarning,
        )
    return done


@dataclass(frozen=True, eq=False)
class Bootstrap:
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
    _fitted: Fitted = field(repr=False)
    _compute: _Statistic = field(repr=False)

    @property
    def converged(self) -> np.ndarray:
        """``(n,)`` the refit converged."""
        return np.isin(self.result, [code for code in Result if code.is_solution])

    @property
    def counts(self) -> pd.Series:
        """How many replicates there are, how many converged, are singular (of those), and failed, by code."""
        converged = self.converged
        codes = {f"failed: {code.name}": int((self.result == code).sum()) for code in Result if not code.is_solution}
        return pd.Series(
            {
                "replicates": len(converged),
                "converged": int(converged.sum()),
                "singular": int((self.singular & converged).sum()),
                "failed": int((~converged).sum()),
                **{name: count for name, count in codes.items() if count},
            },
            name="count",
        )

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
        self, level: float = 0.95, method: Literal["percentile", "basic", "normal", "bca"] = "percentile"
    ) -> pd.DataFrame:
        """Confidence intervals, terms in rows.

        Args:
            level: between 0 and 1.
            method: ``"percentile"``: quantiles of the replicates. ``"basic"``: these reflected at the estimate.
                ``"normal"``: estimate less bias, plus and minus normal quantiles of the standard error. ``"bca"``:
                percentile limits corrected for bias and for a standard error that changes with the parameter; needs
                the refits without each level of the outermost grouping factor, which are made now.

        Returns:
            DataFrame with ``lower`` and ``upper``; see :mod:`mixjax.resampling.intervals`.

        Raises:
            ValueError: level or method is none; or there are no levels to leave out for BCa.

        Warns:
            InferenceWarning: a term has no BCa limits; they are NaN.
        """
        check_level(level)
        values, estimate = self.replicates.to_numpy(), self.estimate.to_numpy()
        if method == "percentile":
            limits = intervals.percentile(values, level)
        elif method == "basic":
            limits = intervals.basic(values, estimate, level)
        elif method == "normal":
            limits = intervals.normal(self.bias.to_numpy(), self.std_error.to_numpy(), estimate, level)
        elif method == "bca":
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
            raise ValueError(f"method must be one of {', '.join(map(repr, intervals.METHODS))}, got {method!r}")
        return pd.DataFrame(limits, index=self.estimate.index, columns=["lower", "upper"])

    def to_frame(self) -> pd.DataFrame:
        """Tidy: term, estimate, bias, std_error, and the number of replicates that they rest on."""
        columns = [self.estimate.rename("estimate"), self.bias, self.std_error, self.used]
        return pd.concat(columns, axis=1).rename_axis("term").reset_index()

    def summary(self) -> str:
        """The table as text, with the counts above it and what was left out below."""
        counts = self.counts
        head = f"{self.kind.capitalize()} bootstrap of {self._fitted.labels.formula!r}: {counts['replicates']} "
        head += "replicates, " + ", ".join(f"{number} {name}" for name, number in counts.iloc[1:].items())
        undefined = counts["converged"] - self.used
        notes = [
            f"{term} is undefined in {number} of the replicates that converged; they are left out."
            for term, number in undefined.items()
            if number
        ]
        return "\n".join([head, "", self.to_frame().to_string(index=False), *([""] if notes else []), *notes])

    def __str__(self) -> str:
        return self.summary()


# --- the statistic -------------------------------------------------------------------------------------------------


class _Refitted(NamedTuple):
    """``values (B, k)``, NaN where the refit failed; ``singular (B,)``; ``result (B,)``."""

    values: np.ndarray
    singular: np.ndarray
    result: np.ndarray


class _Statistic:
    """What is computed of every refit, and its value and names in the fit itself."""

    def __init__(self, fitted: Fitted, function: Callable[[Estimates], Any] | None, modes: bool, engine: EngineName):
        self._reml, self._engine = fitted.reml, engine
        self._keep = (*KEEP, "Sigma", "vcov", "b") if modes else (*KEEP, "Sigma", "vcov")
        self._labels, self._structures, self._function = fitted.labels, fitted.stats.layout.structures, function
        own = Estimates._make(getattr(fitted.estimates, f) if f in self._keep else None for f in Estimates._fields)
        if function is None:
            frame = self._parameters(jax.tree.map(lambda a: np.asarray(a)[None], own))
            self.names, values = tuple(frame), frame.to_numpy()[0]
        else:
            with float64():
                own = jax.tree.map(jnp.asarray, own)
                leaves = named(function, function(own))
                self.names = tuple(name for name, leaf in leaves for name in entries(name, leaf))
                values = np.concatenate([np.ravel(leaf) for _, leaf in leaves]).astype(np.float64)
                jax.eval_shape(self._flat, own)  # a function that JAX cannot trace fails here, before any refit
        self.estimate = pd.Series(values, index=pd.Index(self.names, name="term"), name="estimate")

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_many"}  # programs cannot be pickled

    @cached_property
    def _many(self) -> Any:
        return jax.jit(jax.vmap(self._flat))

    def refitted(self, stats: CrossProducts, n: int) -> _Refitted:
        """The statistic of the fits of B data sets, of n in all."""
        est = estimate_many(stats, self._reml, keep=self._keep, engine=chosen_engine(stats, n, self._engine))
        values = self._parameters(est).to_numpy() if self._function is None else self._by_blocks(est)
        values = np.where(est.converged[:, None], values, np.nan)
        return _Refitted(values, est.singular, est.result)

    def _parameters(self, est: Estimates) -> pd.DataFrame:
        batch = BatchFit(est, self._labels, self._structures)
        frame = batch.sdcor
        return pd.concat([frame, batch.fixef.set_axis(names_apart(self._labels.fixed, frame.columns), axis=1)], axis=1)

    def _flat(self, est: Estimates) -> jax.Array:
        leaves = named(self._function, self._function(est))  # type: ignore[misc]
        return jnp.concatenate([jnp.ravel(leaf).astype(jnp.float64) for _, leaf in leaves])

    def _by_blocks(self, est: Estimates) -> np.ndarray:
        """Blocks of one size, so that the function is compiled once and its last bits do not depend on chunks."""
        leaves, B = jax.tree.leaves(est), len(est.result)
        numbers = sum(int(np.prod(leaf.shape[1:])) for leaf in leaves)
        size = max(1, min(STATISTIC, NUMBERS // max(1, numbers)))
        values = np.empty((B, len(self.names)))
        with float64():
            for first in range(0, B, size):
                at = np.minimum(np.arange(first, first + size), B - 1)
                block = np.asarray(self._many(jax.tree.map(lambda leaf, at=at: leaf[at], est)))
                values[first : first + size] = block[: B - first]
        return values


# --- progress ------------------------------------------------------------------------------------------------------


def _bar(source: Iterable[int], progress: bool) -> Iterable[int]:
    if not progress:
        return source
    try:
        from tqdm.auto import tqdm
    except ImportError:
        return source
    return tqdm(source, unit="chunk")
