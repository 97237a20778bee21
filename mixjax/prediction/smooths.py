"""Smooths of a fit: how smooth each was estimated to be, and its curve with a band."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mixjax.checks import check_count, check_level
from mixjax.distributions import normal_quantile
from mixjax.fitted.either import AnyFitted
from mixjax.fitted.record import Fitted
from mixjax.formula.evaluate import Columns, numbers
from mixjax.formula.parse import RandomPart
from mixjax.formula.state import FormulaState
from mixjax.prediction.targets import Targets, effect_rows
from mixjax.tables import NotedTable


class _Place(NamedTuple):
    """Where a smooth stands: number of its random term, of its column of X; as written."""

    name: str
    term: int
    column: int | None
    part: RandomPart


def _places(fitted: AnyFitted) -> list[_Place]:
    labels = fitted.labels
    if not any(term.smooth for term in labels.terms):
        raise ValueError(f"{labels.formula!r} has no smooth, such as s(x)")
    parts = {part.group.name: part for part in labels.state.parsed.random if part.smooth is not None}
    fixed = {name: j for j, name in enumerate(labels.fixed)}
    places = [
        _Place(term.group, t, fixed.get(f"{term.group}.fx1"), parts[term.group])
        for t, term in enumerate(labels.terms)
        if term.smooth
    ]
    order = list(parts)
    return sorted(places, key=lambda place: order.index(place.name))


def smooth_table(fitted: AnyFitted) -> pd.DataFrame:
    """The smooths of a fit and their effective degrees of freedom.

    ``edf`` is the trace of the smooth's part of ``(C'WC + P)^{-1} C'WC``, C all fixed and random columns and P the
    penalty, as mgcv's: 1 for the line, and for each of the other columns one less what its predicted effect is
    uncertain by, relative to its variance. 1 where the curve is a straight line, k - 1 where nothing is smoothed.

    Returns:
        DataFrame, one row per smooth: ``basis``, ``k``, ``edf``, ``sd`` of the penalised effects, and ``lambda``, the
        smoothing parameter: the residual variance, of a generalised model 1, over ``sd^2``.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.prediction.smooths import smooth_table
        >>> fit = mj.lmm("Reaction ~ s(Days, k = 8) + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> smooth_table(fit.record)["edf"].round(2).to_dict()
        {'s(Days)': 1.25}
    """
    rows = {}
    for place in _places(fitted):
        smooth = place.part.smooth
        assert smooth is not None
        variance = float(fitted.estimates.Sigma[place.term][0, 0])
        noise = float(fitted.estimates.sigma) ** 2 if isinstance(fitted, Fitted) else 1.0
        free = float(place.column is not None)
        if variance > 0:
            errors = _variance(fitted, _bend_rows(fitted, place, None))
            free += float((1.0 - errors / variance).sum())
        ratio = noise / variance if variance > 0 else np.inf
        rows[place.name] = [smooth.bs, smooth.k, free, np.sqrt(variance), ratio]
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["basis", "k", "edf", "sd", "lambda"])
    return NotedTable(table.rename_axis("smooth"), ["edf: effective degrees of freedom, the straight line among them"])


def smooth_curve(
    fitted: AnyFitted, name: str | None = None, at: Any = None, n: int = 100, level: float = 0.95
) -> pd.DataFrame:
    """The curve of a smooth, with pointwise errors.

    It is centred: over the rows of the fit its mean is 0. Errors are those of its line and of its penalised part
    together, given the variances (Bayesian ones, as mgcv's ``se.fit`` of ``type="terms"``; Nychka 1988, J. Am. Stat.
    Assoc. 83: over the curve, intervals hold their level on average). Beyond the values of the fit the curve goes on as
    its basis does, straight.

    Args:
        name: of the smooth, ``"s(x)"``, ``"s(x):f[a]"``; None where there is one.
        at: ``(n,)`` values of what it is a smooth of; None: equally spaced between the smallest and the largest.
        n: how many of these. level: of the band.

    Returns:
        DataFrame: the variable by its name, ``estimate``, ``std_error``, ``lower``, ``upper``; of a generalised model
        on the scale of the linear predictor.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.prediction.smooths import smooth_curve
        >>> fit = mj.lmm("Reaction ~ s(Days, k = 8) + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> smooth_curve(fit.record, at=[0, 4.5, 9]).round(1)["estimate"].tolist()
        [-46.3, -0.5, 47.9]
    """
    check_level(level)
    n = check_count("n", n, 2)
    places = {place.name: place for place in _places(fitted)}
    if name is None and len(places) == 1:
        (name,) = places
    key = "" if name is None else "".join(str(name).split())
    found = next((place for own, place in places.items() if "".join(own.split()) == key), None)
    if found is None:
        which = "name the smooth" if name is None else f"there is no smooth {name!r}"
        raise ValueError(f"{which}; there are {', '.join(map(repr, places))}")
    state: FormulaState = fitted.labels.state
    smooth = found.part.smooth
    assert smooth is not None
    shown = smooth.x.shown
    if at is None:
        if fitted.labels.frame is None:
            raise ValueError("this fit kept no rows: say at which values, at=")
        own, _ = numbers(smooth.x, fitted.labels.frame, state.context, "smooth")
        values = np.linspace(own.min(), own.max(), n)
    else:
        values = np.atleast_1d(np.asarray(at, np.float64))
        if values.ndim != 1 or not np.isfinite(values).all():
            raise ValueError(f"at must be finite values of {shown}, one-dimensional")
    targets = _bend_rows(fitted, found, values)
    estimate = targets.mean(np.asarray(fitted.estimates.beta), fitted.estimates.b)
    se = np.sqrt(np.maximum(_variance(fitted, targets), 0.0))
    width = normal_quantile(0.5 + level / 2) * se
    return pd.DataFrame(
        {shown: values, "estimate": estimate, "std_error": se, "lower": estimate - width, "upper": estimate + width}
    )


def _bend_rows(fitted: AnyFitted, place: _Place, values: np.ndarray | None) -> Targets:
    """The smooth at values of its variable, of each of its penalised effects by itself where there are none."""
    labels = fitted.labels
    q, p, terms = len(labels.terms[place.term].effects), len(labels.fixed), len(labels.terms)
    if values is None:
        X, own = np.zeros((q, p)), np.eye(q)
    else:
        state: FormulaState = labels.state
        X = np.zeros((len(values), p))
        own = _columns(state.random[place.term], place, values)[0]
        if place.column is not None:
            X[:, place.column] = _columns(state.fixed, place, values)[1]
    Z: list[np.ndarray | None] = [None] * terms
    level: list[np.ndarray | None] = [None] * terms
    Z[place.term], level[place.term] = own, np.zeros(len(X), int)
    return Targets(X, np.zeros(len(X)), tuple(Z), tuple(level), np.zeros(len(X)))


def _columns(columns: Columns, place: _Place, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The penalised columns ``(n, q)`` and the line ``(n,)`` of a smooth, from what an expression of it learnt."""
    (learnt,) = (
        own
        for e in columns.effects.expressions
        if e.shown in (place.name, f"{place.name}.fx1")
        for own in columns.learnt[e.shown].state.values()
    )
    smooth = learnt["smooth"]
    B = smooth.functions(values)
    return B @ smooth.bend, B @ smooth.line


def _variance(fitted: AnyFitted, targets: Targets) -> np.ndarray:
    """``(m,)`` of the errors of linear combinations of fixed and random effects, variances as known."""
    stats = fitted.stats if isinstance(fitted, Fitted) else fitted.working
    scale = float(fitted.estimates.sigma) ** 2 if isinstance(fitted, Fitted) else 1.0
    found: np.ndarray = scale * fitted.equations.variance(effect_rows(targets, stats))
    return found


def smooth_names(fitted: AnyFitted) -> list[str]:
    """Names of the smooths of a fit, and the levels of ``by`` in them."""
    return [place.name for place in _places(fitted)]
