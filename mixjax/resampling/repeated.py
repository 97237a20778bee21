"""The parametric bootstrap of repeated measures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixjax.checks import InferenceWarning, check_count, warn
from mixjax.fitted.names import names_apart, names_of_variances
from mixjax.fitted.repeated import RepeatedFitted
from mixjax.optimise.results import note_of_failures
from mixjax.resampling.replicates import chunk_size
from mixjax.waiting import Waiting


def bootstrap_visits(fitted: RepeatedFitted, key: Any, n: int) -> pd.DataFrame:
    """All parameters of refits to n responses drawn from the fit: those of the covariance, then the fixed effects.

    Replicate i depends on the key and on i.

    Warns:
        InferenceWarning: refits failed; they are left out.
    """
    n = check_count("n", n, 1)
    variances = names_of_variances(fitted.labels, fitted.structures)
    names = [parameter.name for parameter in variances]
    size = chunk_size(fitted.nobs)
    parts, results = [], []
    with Waiting(f"bootstrap: refitting {n} responses"):
        for first in range(0, n, size):
            est = fitted.fit_many(fitted.simulate(key, min(size, n - first), first))
            columns = {parameter.name: parameter.value(est.Sigma) for parameter in variances}
            columns |= dict(zip(names_apart(fitted.labels.fixed, names), np.asarray(est.beta).T, strict=True))
            parts.append(pd.DataFrame(columns)[np.asarray(est.converged)])
            results.append(est.result)
    if note := note_of_failures(np.concatenate(results)):
        warn(note, InferenceWarning)
    return pd.concat(parts, ignore_index=True)
