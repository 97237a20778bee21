"""Models for repeated measures fitted to replicates."""

from __future__ import annotations

import numpy as np
import pandas as pd

from mixjax.estimation.repeated import fit_repeated_many
from mixjax.fitted.names import names_of_variances
from mixjax.inference.fixed.repeated_many import t_tests_of_many
from mixjax.inference.random.repeated_ratio import is_in_span, is_special_covariance
from mixjax.optimise.results import failed
from mixjax.products.visits import visit_rows
from mixjax.studies.task import Fits, Model, Task, named_apart


def repeated_fits(task: Task, model: Model, Y: np.ndarray, mesh: object) -> Fits:
    """Fits with t tests by the task's degrees of freedom. Missing responses are visits that a subject misses."""
    if mesh is not None:
        raise ValueError("mesh= is for linear mixed models; repeated measures use the cores of this machine")
    if len(model.designs) > 1:
        raise ValueError("repeated measures are fitted to one table of predictors, not to one for each replicate")
    rows = visit_rows(model.designs[0])
    est = fit_repeated_many(rows, Y, task.reml)
    ddf = "satterthwaite" if task.ddf is None else task.ddf
    found = t_tests_of_many(rows, task.reml, Y, est, np.eye(rows.p), 0.0, ddf)
    fixed = pd.DataFrame(np.asarray(est.beta), columns=list(model.labels.fixed))
    variances = names_of_variances(model.labels, rows.structures)
    others = pd.DataFrame({parameter.name: parameter.value(est.Sigma) for parameter in variances})

    def deviances() -> np.ndarray:
        ml = fit_repeated_many(rows, Y, False) if task.reml else est
        return np.where(failed(ml.result), np.nan, ml.criterion)

    return Fits(est, named_apart(fixed, others), found["std_error"], found["df"], deviances)


def difference_of_repeated(small: Model, large: Model) -> int:
    """Parameters more.

    Raises:
        ValueError: the models are not nested.
    """
    rows = [visit_rows(model.designs[0]) for model in (small, large)]
    npar = [own.p + sum(structure.k for structure in own.structures) for own in rows]
    if npar[1] <= npar[0] or not is_in_span(*rows) or not is_special_covariance(*rows):
        raise ValueError(
            f"{small.labels.formula!r} is not a special case of {large.labels.formula!r}: compare the smaller model "
            "with a larger one that contains it"
        )
    return npar[1] - npar[0]
