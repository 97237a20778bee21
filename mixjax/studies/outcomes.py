"""One cell of a study, replicate by replicate: responses, fits, tests, as columns of numbers.

Blocks of replicates stand at fixed places, and what is computed of a block does not depend on other blocks: however
the replicates are split over calls, chunks and workers of one kind of machine, they get the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import jax
import numpy as np
import pandas as pd
from scipy import stats

from mixjax.checks import some_of
from mixjax.design import Design, Labels
from mixjax.estimation.batch import batch_axes
from mixjax.estimation.choice import EngineName, chosen_engine
from mixjax.estimation.estimate import Estimates
from mixjax.estimation.many import KEEP
from mixjax.fitted.batch import BatchFit
from mixjax.fitted.names import Spellings
from mixjax.inference.fixed.contrasts import Contrast, kenward_roger, satterthwaite, two_sided, wald
from mixjax.inference.fixed.many import errors_of_many, in_lanes
from mixjax.inference.random.likelihood_ratio import mixture_p
from mixjax.inference.random.nesting import is_within, place_of
from mixjax.machine import float64
from mixjax.optimise.results import failed
from mixjax.products.cross_products import cross_products
from mixjax.products.rows import rows_of
from mixjax.products.sums import CrossProducts, pad, stack
from mixjax.resampling.replicates import fit_drawn
from mixjax.resampling.statistic import Statistic
from mixjax.studies.scenario import design_of

# Replicates whose tests are computed in one call: every call has this shape.
BLOCK = 2**10
TESTS: dict[str, Callable[..., Contrast]] = {
    "wald": wald,
    "satterthwaite": satterthwaite,
    "kenward-roger": kenward_roger,
}


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
        key: of the cell. reml: criterion of the fits; likelihood ratios are always by ML.
        ddf: test of the fixed effects. null: their values under the hypothesis, 0 where not named.
        statistic: JAX function of one :class:`~mixjax.Estimates` -> number, array or dict of those; or None.
        engine: of the fits, as for :func:`mixjax.estimate_many`. fits: number of replicates that ``"auto"`` goes by.
    """

    source: Any
    models: Mapping[str, str]
    key: Any
    compared: tuple[tuple[str, str], ...] = ()
    reml: bool = True
    ddf: str = "satterthwaite"
    null: Mapping[str, float] = field(default_factory=dict)
    statistic: Callable[[Estimates], Any] | None = None
    engine: EngineName = "auto"
    fits: int = 0


class _Model(NamedTuple):
    """Designs of one model for some replicates: one for all, or one each."""

    designs: list[Design]
    labels: Labels


def outcomes(task: Task, first: int, count: int, mesh: Any = None) -> dict[str, np.ndarray]:
    """Columns ``(count,)`` of the replicates ``first .. first + count - 1``; ``first`` begins a block.

    Of every model (a prefix ``name::`` where there are several): ``result`` (code of ``mixjax.Result``), ``singular``,
    estimates by name, and of the fixed effects ``se(name)``, ``df(name)``, ``p(name)``; of every compared pair
    ``lrt(larger|smaller)`` (the statistic), ``p(...)`` (chi-square) and ``p_mixture(...)``. NaN where a fit failed or
    there is no test.

    Args:
        mesh: devices to spread the fits over, as for :func:`mixjax.estimate_many`.
    """
    if first % BLOCK:
        raise ValueError(f"replicates are computed in blocks of {BLOCK}; {first} does not begin one")
    tables, Y = task.source.tables(task.key, first, count)
    several = len(task.models) > 1
    columns: dict[str, np.ndarray] = {}
    fits = {}
    models = {name: _model(formula, tables, task.source.options) for name, formula in task.models.items()}
    effects = list(dict.fromkeys(name for model in models.values() for name in model.labels.fixed))
    known = Spellings(effects)
    if nothing := [name for name in task.null if name not in known]:
        raise ValueError(f"null names {some_of(nothing)}, and the fixed effects are {some_of(effects)}")
    task = replace(task, null={effects[known[name]]: value for name, value in task.null.items()})
    for name, model in models.items():
        prefix = f"{name}::" if several else ""
        own, products, est = _fitted(task, model, Y, mesh)
        fits[name] = (model, products, est)
        columns |= {prefix + column: values for column, values in own.items()}
    deviances: dict[str, np.ndarray] = {}
    for smaller, larger in task.compared:
        for name in (smaller, larger):
            if name not in deviances:
                _, products, est = fits[name]
                ml = est
                if task.reml:
                    keep = ("criterion", "converged")
                    ml = fit_drawn(products, _fits(task, products), keep, False, task.engine, mesh)
                deviances[name] = np.where(ml.converged, ml.criterion, np.nan)
        statistic = deviances[smaller] - deviances[larger]
        pair = f"{larger}|{smaller}"
        columns |= _ratio_tests(pair, statistic, deviances[smaller], fits[smaller][0], fits[larger][0])
    return columns


def _model(formula: str, tables: list[pd.DataFrame], options: Mapping[str, Any]) -> _Model:
    found = [design_of(formula, table, **options) for table in tables]
    for _, labels in found[1:]:
        if labels.fixed != found[0][1].fixed:
            different = sorted(set(labels.fixed) ^ set(found[0][1].fixed))
            raise ValueError(
                f"{formula!r} has other fixed effects in other draws of the predictors ({', '.join(different)}): use "
                "predictors whose categories are all there in every draw, or x='fixed'"
            )
    return _Model([design for design, _ in found], found[0][1])


def _fitted(
    task: Task, model: _Model, Y: np.ndarray, mesh: Any
) -> tuple[dict[str, np.ndarray], CrossProducts, Estimates]:
    labels = model.labels
    if len(model.designs) == 1:
        products = cross_products(model.designs[0], Y)
    else:
        products = stack([cross_products(replace(d, y=y)) for d, y in zip(model.designs, Y, strict=True)])
    est = fit_drawn(products, _fits(task, products), (*KEEP, "Sigma"), task.reml, task.engine, mesh)
    batch = BatchFit(est, labels, products.layout.structures)
    lost = failed(est.result)
    columns: dict[str, np.ndarray] = {"result": est.result.astype(np.int8), "singular": est.singular & ~lost}
    parameters = {**batch.fixef, **batch.sdcor}
    columns |= {str(name): np.where(lost, np.nan, values) for name, values in parameters.items()}
    engine = chosen_engine(products, _fits(task, products), task.engine, mesh)
    se, df = _errors(task, est, products, engine)
    null = np.array([float(task.null.get(name, 0.0)) for name in labels.fixed])
    for j, name in enumerate(labels.fixed):
        # Not the p value of a compiled program: its iterations depend on the other replicates of a block.
        with np.errstate(invalid="ignore", divide="ignore"):
            p = two_sided((est.beta[:, j] - null[j]) / se[:, j], df[:, j])
        for column, values in (("se", se[:, j]), ("df", df[:, j]), ("p", p)):
            columns[f"{column}({name})"] = np.where(lost, np.nan, values)
    if task.statistic is not None:
        statistic = Statistic(task.statistic, jax.tree.map(lambda a: a[0], est))
        own = dict(zip(statistic.names, statistic.of_many(est).T, strict=True))
        if twice := [name for name in own if name in columns]:
            raise ValueError(f"the statistic's {some_of(twice)} is also the name of an estimate: give it another name")
        columns |= {name: np.where(lost, np.nan, values) for name, values in own.items()}
    return columns, products, est


def _fits(task: Task, products: CrossProducts) -> int:
    return task.fits or len(products.yy)


def _errors(task: Task, est: Estimates, products: CrossProducts, engine: EngineName) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors and degrees of freedom of all fixed effects ``(B, p)``."""
    if in_lanes(task.ddf, products, engine):
        with float64():
            return errors_of_many(task.ddf, est, products, np.eye(est.beta.shape[1]), task.reml, engine)
    # Block by block, the last one filled up.
    padded = pad(replace(products, classes=None))
    axes, B, p = batch_axes(padded), len(est.result), est.beta.shape[1]
    test = TESTS[task.ddf]
    kwargs = {"reml": task.reml} if task.ddf == "satterthwaite" else {}
    parts = []
    for begin in range(0, B, BLOCK):
        at = np.minimum(np.arange(begin, begin + BLOCK), B - 1)
        own = jax.tree.map(lambda a, axis, at=at: np.asarray(a)[at] if axis == 0 else a, padded, axes)
        none: dict[str, Any] = dict.fromkeys(Estimates._fields)
        few = Estimates(**none | {"theta": est.theta[at], "beta": est.beta[at], "sigma": est.sigma[at]})
        found = test(few, own, np.eye(p), **kwargs)
        parts.append((np.asarray(found.se)[: B - begin], np.asarray(found.df)[: B - begin]))
    se, df = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return se, df


# --- likelihood ratios -----------------------------------------------------------------------------------------------


def _ratio_tests(
    pair: str, statistic: np.ndarray, deviance: np.ndarray, small: _Model, large: _Model
) -> dict[str, np.ndarray]:
    df, zeros = _difference(small, large)
    rounding = np.maximum(1e-8, 1e-12 * np.abs(deviance))
    statistic = np.where(statistic > rounding, statistic, np.where(np.isnan(statistic), np.nan, 0.0))
    known = ~np.isnan(statistic)
    chi2 = np.where(known, stats.chi2.sf(statistic, df), np.nan)
    mixture = np.full(len(statistic), np.nan)
    if zeros == 0:
        mixture = chi2
    elif zeros == 1:
        mixture[known] = [mixture_p(float(s), df) for s in statistic[known]]
    return {f"lrt({pair})": statistic, f"p({pair})": chi2, f"p_mixture({pair})": mixture}


def _difference(small: _Model, large: _Model) -> tuple[int, int | None]:
    """Parameters more, and how many standard deviations the smaller model puts to 0 (None: not known).

    Raises:
        ValueError: the models are not nested.
    """
    rows = [rows_of(model.designs[0]) for model in (small, large)]
    npar = [own.design.X.shape[1] + own.stats.layout.k for own in rows]
    place = place_of(*rows)
    if npar[1] <= npar[0] or not place.nested or not is_within(*rows):
        raise ValueError(
            f"{small.labels.formula!r} is not a special case of {large.labels.formula!r}: compare the smaller model "
            "with a larger one that contains it"
        )
    return npar[1] - npar[0], place.zeros
