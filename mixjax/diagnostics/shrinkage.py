"""How far the model draws the coefficients of each level towards those of the population."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixjax.bases import orthonormal_columns
from mixjax.diagnostics.least_squares import group_of
from mixjax.fitted.names import by_effect, terms_of_group
from mixjax.fitted.record import record_of

# Own coefficients this close to the population's, in their own size, leave nothing to shrink.
NOTHING = 1e-10


def shrinkage(fitted: Any, group: str | None = None) -> pd.DataFrame:
    """Coefficients of every level: by its own rows, by the model, and in the population.

    ``own`` is what the model's coefficients would be without shrinkage: least squares of a level's rows on the effects
    of the grouping factor, the other fixed effects, and the random effects of other factors, being what they are
    estimated to be. ``mixed`` is population plus predicted random effect, as in ``fit.coef()``.

    With one effect per level ``mixed`` lies between the others, and ``shrinkage`` is the weight of the population, with
    random intercepts ``(sigma^2 / n) / (sigma^2 / n + tau^2)``: that of a ridge regression on the levels with penalty
    ``sigma^2 / tau^2``. With several, levels lend strength across their effects: a single one may move away from the
    population (shrinkage below 0) or past it (above 1).

    Args:
        fitted: fit with rows.
        group: grouping factor; None for the first.

    Returns:
        DataFrame, one row per level and effect: ``group``, ``level``, ``effect``, ``n`` (rows of the level), ``own``
        (NaN where they do not determine it), ``mixed``, ``population`` (0 of an effect that is not fixed),
        ``shrinkage`` ``= 1 - (mixed - population) / (own - population)``.

    Raises:
        DataError: there is no such grouping factor.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.diagnostics.shrinkage import shrinkage
        >>> fit = mj.lmm("Reaction ~ Days + (1 | Subject)", mj.datasets.load("sleepstudy"))
        >>> shrinkage(fit)["shrinkage"].round(3).unique().tolist()
        [0.065]
    """
    fitted = record_of(fitted)
    fitted.check_can("shrinkage")
    design, est, labels = fitted.design, fitted.estimates, fitted.labels
    name, codes, m = group_of(fitted, group)
    terms = terms_of_group(labels)[name]
    effects = [effect for t in terms for effect in labels.terms[t].effects]
    Z = np.hstack([np.asarray(design.terms[t].Z, float) for t in terms])
    b = np.hstack([est.b[t] for t in terms])
    fixed = by_effect(dict(zip(labels.fixed, est.beta, strict=True)))
    population = np.array([float(fixed(effect, 0.0)) for effect in effects])
    y = np.asarray(design.y, float) - (0.0 if design.offset is None else np.asarray(design.offset))
    y = y - np.asarray(design.X) @ est.beta
    for t, (term, modes) in enumerate(zip(design.terms, est.b, strict=True)):
        if t not in terms:
            y = y - (np.asarray(term.Z) * modes[term.group]).sum(1)
    root_w = np.ones(len(y)) if design.weights is None else np.sqrt(np.asarray(design.weights, float))
    own = np.full(b.shape, np.nan)
    count = np.bincount(codes, minlength=m)
    order = np.argsort(codes, kind="stable")
    for level, rows in enumerate(np.split(order, np.cumsum(count)[:-1])):
        A = Z[rows] * root_w[rows, None]
        if len(rows) >= len(effects) and orthonormal_columns(A, None)[2].all():
            own[level] = population + np.linalg.lstsq(A, y[rows] * root_w[rows], rcond=None)[0]
    distance = own - population
    size = np.abs(own) + np.abs(population)
    some = np.abs(distance) > NOTHING * size
    factor = np.where(some, 1 - b / np.where(some, distance, 1.0), np.nan)
    q = len(effects)
    levels = labels.terms[terms[0]].levels
    return pd.DataFrame(
        {
            "group": name,
            "level": np.repeat(np.array(levels, dtype=object), q),
            "effect": np.tile(np.array(effects, dtype=object), m),
            "n": np.repeat(count, q),
            "own": own.ravel(),
            "mixed": (population + b).ravel(),
            "population": np.tile(population, m),
            "shrinkage": factor.ravel(),
        }
    )
