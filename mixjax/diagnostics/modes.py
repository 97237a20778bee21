"""Conditional covariances of the random effects, level by level."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from mixjax.covariance import lambdas_of_theta
from mixjax.engine.modes import conditional_covariances
from mixjax.fitted.names import terms_of_group
from mixjax.fitted.record import Fitted


def conditional_covariances_by_group(fitted: Fitted) -> dict[str, np.ndarray]:
    """Grouping factor -> ``(levels, q, q)``, absolute, given theta and beta, all terms of the factor side by side."""
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
