"""Conditional covariances of the random effects, level by level."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from mixjax.covariance import lambdas_of_theta
from mixjax.engine.modes import conditional_covariances
from mixjax.fitted.names import terms_of_group
from mixjax.fitted.record import Fitted


def conditional_covariances_by_group(fitted: Fitted) -> dict[str, np.ndarray]:
    """Grouping factor -> ``(levels, q, q)``, absolute, given theta and beta, all terms of the factor side by side."""
    if not fitted.labels.terms:
        return {}
    stats = fitted.stats if fitted.stats.classes is None else replace(fitted.stats, classes=None)
    blocks = conditional_covariances(lambdas_of_theta(fitted.estimates.theta, stats.layout.qs), stats)
    result = {}
    for group, ts in terms_of_group(fitted.labels).items():
        m = len(fitted.labels.terms[ts[0]].levels)
        places = [fitted.stats.layout.terms[t] for t in ts]
        own = np.concatenate([np.arange(place.start, place.start + place.q) for place in places])
        block = np.asarray(blocks[places[0].factor])[np.ix_(own, own, np.arange(m))]
        result[group] = float(fitted.estimates.sigma) ** 2 * np.moveaxis(block, -1, 0)
    return result


def tidy_modes(fitted: Fitted) -> pd.DataFrame:
    """Conditional modes and their standard deviations in rows, as R's ``as.data.frame(ranef(m, condVar = TRUE))``.

    Returns:
        DataFrame, a row for every group, effect and level, in this order: ``grpvar``, ``term``, ``grp`` (the level),
        ``condval`` (the mode), ``condsd`` (the root of its conditional variance, theta and beta taken as known).
    """
    parts = [pd.DataFrame(columns=["grpvar", "term", "grp", "condval", "condsd"])] * (not fitted.labels.terms)
    covariances = conditional_covariances_by_group(fitted)
    for group, ts in terms_of_group(fitted.labels).items():
        sd = np.sqrt(np.maximum(np.diagonal(covariances[group], axis1=1, axis2=2), 0.0))
        modes = np.hstack([fitted.estimates.b[t] for t in ts])
        effects = [effect for t in ts for effect in fitted.labels.terms[t].effects]
        levels = list(fitted.labels.terms[ts[0]].levels)
        parts.append(
            pd.DataFrame(
                {
                    "grpvar": group,
                    "term": np.repeat(effects, len(levels)),
                    "grp": np.tile(levels, len(effects)),
                    "condval": modes.T.ravel(),
                    "condsd": sd.T.ravel(),
                }
            )
        )
    return pd.concat(parts, ignore_index=True)
