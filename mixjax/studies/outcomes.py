"""One cell of a study, replicate by replicate: responses, fits, tests, as columns of numbers.

Blocks of replicates stand at fixed places, and what is computed of a block does not depend on other blocks: however
the replicates are split over calls, chunks and workers of one kind of machine, they get the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
import numpy as np
import pandas as pd
from scipy import stats

from mixjax.checks import some_of
from mixjax.design import Labels, RepeatedDesign
from mixjax.estimation.batch import batch_axes
from mixjax.estimation.choice import EngineName, chosen_engine
from mixjax.estimation.estimate import Estimates
from mixjax.estimation.many import KEEP
from mixjax.families import Family
from mixjax.fitted.batch import BatchFit
from mixjax.fitted.names import Spellings
from mixjax.fitted.parameters import formula_coefficients
from mixjax.inference.fixed.contrasts import Contrast, kenward_roger, satterthwaite, two_sided, wald
from mixjax.inference.fixed.many import errors_of_many, in_lanes
from mixjax.inference.random.likelihood_ratio import mixture_p
from mixjax.inference.random.nesting import Place, in_span, place_of
from mixjax.machine import float64
from mixjax.optimise.results import failed
from mixjax.products.cross_products import cross_products
from mixjax.products.rows import rows_of
from mixjax.products.sums import CrossProducts, pad, stack
from mixjax.resampling.replicates import fit_drawn
from mixjax.resampling.statistic import Statistic
from mixjax.studies.bayes_fits import bayes_fits
from mixjax.studies.family_fits import family_fits
from mixjax.studies.plain_fits import plain_fits
from mixjax.studies.repeated_fits import difference_of_repeated, repeated_fits
from mixjax.studies.scenario import design_of
from mixjax.studies.task import Fits, Model, Task, named_apart

# Replicates whose tests are computed in one call: every call has this shape.
BLOCK = 2**10
TESTS: dict[str, Callable[..., Contrast]] = {
    "wald": wald,
    "satterthwaite": satterthwaite,
    "kenward-roger": kenward_roger,
}


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
    models = {name: _model(formula, tables, task.options) for name, formula in task.models.items()}
    effects = list(
        dict.fromkeys(name for model in models.values() for name in tested_names(model.labels, model.family))
    )
    known = Spellings(effects)
    if nothing := [name for name in task.null if name not in known]:
        raise ValueError(f"null names {some_of(nothing)}, and the fixed effects are {some_of(effects)}")
    task = replace(task, null={effects[known[name]]: value for name, value in task.null.items()})
    if task.nagq != 1 and any(model.family is None for model in models.values()):
        raise ValueError(f"nagq={task.nagq!r} is for generalised models: name the family=")
    for name, model in models.items():
        prefix = f"{name}::" if several else ""
        fits[name] = _fits_of(task, model)(task, model, Y, mesh)
        columns |= {prefix + column: values for column, values in _columns_of(task, model, fits[name]).items()}
    deviances: dict[str, np.ndarray] = {}
    for smaller, larger in task.compared:
        for name in (smaller, larger):
            if name not in deviances:
                deviances[name] = fits[name].deviances()
        statistic = deviances[smaller] - deviances[larger]
        pair = f"{larger}|{smaller}"
        columns |= _ratio_tests(pair, statistic, deviances[smaller], models[smaller], models[larger])
    return columns


def _model(formula: str, tables: list[pd.DataFrame], options: Mapping[str, Any]) -> Model:
    found = [design_of(formula, table, **options, may_be_plain=True) for table in tables]
    for _, labels in found[1:]:
        if labels.fixed != found[0][1].fixed:
            different = sorted(set(labels.fixed) ^ set(found[0][1].fixed))
            raise ValueError(
                f"{formula!r} has other fixed effects in other draws of the predictors ({', '.join(different)}): use "
                "predictors whose categories are all there in every draw, or x='fixed'"
            )
    return Model([design for design, _ in found], found[0][1], options.get("family"))


def tested_names(labels: Labels, family: Family | None) -> tuple[str, ...]:
    """What a fit has a test of: fixed effects, and coefficients of the formulas of a family's parameters."""
    if family is None or not labels.psi:
        return labels.fixed
    return (*labels.fixed, *formula_coefficients(labels, family))


def _fits_of(task: Task, model: Model) -> Callable[[Task, Model, np.ndarray, Any], Fits]:
    if task.estimator == "bayes":
        return bayes_fits
    if task.options.get("repeated"):
        return repeated_fits
    if model.family is not None:
        return family_fits
    return _linear_fits if model.designs[0].terms else plain_fits


def _linear_fits(task: Task, model: Model, Y: np.ndarray, mesh: Any) -> Fits:
    if len(model.designs) == 1:
        products = cross_products(model.designs[0], Y)
    else:
        products = stack([cross_products(replace(d, y=y)) for d, y in zip(model.designs, Y, strict=True)])
    fits = task.fits or len(Y)
    est = fit_drawn(products, fits, (*KEEP, "Sigma"), task.reml, task.engine, mesh)
    batch = BatchFit(est, model.labels, products.layout.structures)
    engine = chosen_engine(products, fits, task.engine, mesh)
    se, df = _errors(task, est, products, engine)

    def deviances() -> np.ndarray:
        keep = ("criterion", "converged")
        ml = fit_drawn(products, fits, keep, False, task.engine, mesh) if task.reml else est
        return np.where(ml.converged, ml.criterion, np.nan)

    return Fits(est, named_apart(batch.fixef, batch.sdcor), se, df, deviances)


def _columns_of(task: Task, model: Model, fits: Fits) -> dict[str, np.ndarray]:
    """Of one model; see :func:`outcomes`."""
    labels, est, parameters, se, df = model.labels, fits.estimates, fits.parameters, fits.se, fits.df
    lost = failed(est.result)
    columns: dict[str, np.ndarray] = {"result": est.result.astype(np.int8), "singular": est.singular & ~lost}
    columns |= {name: np.where(lost, np.nan, values) for name, values in parameters.items()}
    null = np.array([float(task.null.get(name, 0.0)) for name in labels.fixed])
    for j, name in enumerate(labels.fixed):
        # Not the p value of a compiled program: its iterations depend on the other replicates of a block.
        with np.errstate(invalid="ignore", divide="ignore"):
            p = two_sided((est.beta[:, j] - null[j]) / se[:, j], df[:, j]) if fits.p is None else fits.p[:, j]
        of_test = [("se", se[:, j]), ("df", df[:, j]), ("p", p)]
        for column, values in of_test if fits.above is None else [*of_test, ("above", fits.above[:, j])]:
            columns[f"{column}({name})"] = np.where(lost, np.nan, values)
    for name, own_se in fits.further.items():
        with np.errstate(invalid="ignore", divide="ignore"):
            p = two_sided((parameters[name] - float(task.null.get(name, 0.0))) / own_se, np.full(len(own_se), np.inf))
        for column, values in (("se", own_se), ("df", np.full(len(own_se), np.inf)), ("p", p)):
            columns[f"{column}({name})"] = np.where(lost, np.nan, values)
    if task.statistic is not None:
        statistic = Statistic(task.statistic, jax.tree.map(lambda a: a[0], est))
        own = dict(zip(statistic.names, statistic.of_many(est).T, strict=True))
        if twice := [name for name in own if name in columns]:
            raise ValueError(f"the statistic's {some_of(twice)} is also the name of an estimate: give it another name")
        columns |= {name: np.where(lost, np.nan, values) for name, values in own.items()}
    return columns


def _errors(task: Task, est: Estimates, products: CrossProducts, engine: EngineName) -> tuple[np.ndarray, np.ndarray]:
    """Standard errors and degrees of freedom of all fixed effects ``(B, p)``."""
    ddf = "satterthwaite" if task.ddf is None else task.ddf
    if in_lanes(ddf, products, engine):
        with float64():
            return errors_of_many(ddf, est, products, np.eye(est.beta.shape[1]), task.reml, engine)
    # Block by block, the last one filled up.
    padded = pad(replace(products, classes=None))
    axes, B, p = batch_axes(padded), len(est.result), est.beta.shape[1]
    test = TESTS[ddf]
    kwargs = {"reml": task.reml} if ddf == "satterthwaite" else {}
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
    pair: str, statistic: np.ndarray, deviance: np.ndarray, small: Model, large: Model
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


def _difference(small: Model, large: Model) -> tuple[int, int | None]:
    """Parameters more, and how many standard deviations the smaller model puts to 0 (None: not known).

    Raises:
        ValueError: the models are not nested.
    """
    if isinstance(small.designs[0], RepeatedDesign):
        return difference_of_repeated(small, large), 0
    designs = [model.designs[0] for model in (small, large)]
    structures = [design.structures for design in designs]
    npar = [np.shape(d.X)[1] + sum(s.k for s in own) for d, own in zip(designs, structures, strict=True)]
    if all(structures):
        place = place_of(*(rows_of(replace(design, size=None)) for design in designs))
    else:  # without random effects all of those of the larger model have no variance
        place = Place(not structures[0], sum(s.n_zeros(np.ones(s.n_reductions, bool)) for s in structures[1]))
    if npar[1] <= npar[0] or not place.nested or not in_span(*(np.asarray(d.X, np.float64) for d in designs)):
        raise ValueError(
            f"{small.labels.formula!r} is not a special case of {large.labels.formula!r}: compare the smaller model "
            "with a larger one that contains it"
        )
    return npar[1] - npar[0], place.zeros
