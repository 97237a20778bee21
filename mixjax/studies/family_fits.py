"""Generalised linear mixed models fitted to replicates."""

from __future__ import annotations

import jax
import numpy as np
import pandas as pd

from mixjax.checks import DataError
from mixjax.estimation.choice import EngineName
from mixjax.estimation.glmm import GLMMEstimates
from mixjax.estimation.glmm_many import KEEP, glmm_estimate_many
from mixjax.families import Family
from mixjax.fitted.names import names_of_variances
from mixjax.fitted.parameters import formula_coefficients, parameters_of_family
from mixjax.optimise.results import failed
from mixjax.products.family_rows import FamilyRows, rows_in
from mixjax.studies.task import Fits, Model, Task, named_apart


def family_fits(task: Task, model: Model, Y: np.ndarray, mesh: object) -> Fits:
    """Fits by Laplace's approximation or by quadrature, with Wald tests.

    Where every replicate has predictors of its own they are fitted one by one.
    """
    if task.ddf not in (None, "wald"):
        raise ValueError(f"ddf={task.ddf!r} is for linear models: the tests of generalised ones are ddf='wald'")
    if mesh is not None:
        raise ValueError("mesh= is for linear mixed models; generalised ones use the cores of this machine")
    family = model.family
    assert isinstance(family, Family)
    _check_trials(family, model, Y)
    coefficients = formula_coefficients(model.labels, family) if model.labels.psi else {}
    keep, fits = (*KEEP, "Sigma", "vcov", *["vcov_all"] * bool(coefficients)), task.fits or len(Y)

    def fitted(rows: FamilyRows, engine: EngineName) -> GLMMEstimates:
        return glmm_estimate_many(rows, keep=keep, engine=engine, fits=fits, nagq=task.nagq)

    if len(model.designs) == 1:
        est = fitted(rows_in(model.designs[0], family, Y), task.engine)
    else:
        every = [fitted(rows_in(design, family, y[None]), "numpy") for design, y in zip(model.designs, Y, strict=True)]
        est = jax.tree.map(lambda *parts: np.concatenate(parts), *every)
    layout = rows_in(model.designs[0], family, Y[:1]).layout
    fixed = pd.DataFrame(est.beta, columns=list(model.labels.fixed))
    variances = names_of_variances(model.labels, layout.structures)
    names, own, _ = parameters_of_family(model.labels, family, np.asarray(est.psi).T)
    others = pd.DataFrame({parameter.name: parameter.value(est.Sigma) for parameter in variances})
    others = others.assign(**dict(zip(names, own, strict=True)))
    with np.errstate(invalid="ignore"):
        se = np.sqrt(np.diagonal(est.vcov, axis1=1, axis2=2))
        p = fixed.shape[1]
        further = {name: np.sqrt(est.vcov_all[:, p + j, p + j]) for name, j in coefficients.items()}
    criterion = np.where(failed(est.result), np.nan, est.criterion)
    return Fits(est, named_apart(fixed, others), se, np.full(se.shape, np.inf), lambda: criterion, further)


def _check_trials(family: Family, model: Model, Y: np.ndarray) -> None:
    """Raise DataError for counts of successes that have more than their trials, or no numbers of trials."""
    if family.plain.name != "binomial":
        return
    size = model.designs[0].size
    if ((1.0 if size is None else size) < Y).any():
        have = "are outcomes of one trial each, as long as size= is not given" if size is None else "have fewer trials"
        raise DataError(
            f"responses go up to {Y.max():g}, and binomial ones {have}: size= is the number of trials, or its column"
        )
