"""Data and fitted lines, group by group."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixjax.diagnostics.residuals import fixed_part, population_mean
from mixjax.fitted.record import Fitted
from mixjax.plots.canvas import MaxNLocator, category_ticks, many, palette, thousands
from mixjax.plots.columns import Column, column, group_name, level_names, linear, response_name

MOST_PANELS = 25


def trellis(
    fit: Any,
    x: Any,
    group: str | None = None,
    levels: Any = None,
    *,
    ncols: int = 5,
    ax: Any = None,
) -> np.ndarray:
    """Responses of every group against a variable, with the group's line and the population's.

    The group's line has the fixed effects and the random effects of its own level, and of factors that it is nested in;
    effects of crossed factors, and of those within it, are left out. Lines join fitted values of the rows. Where other
    variables change the mean at the same x there is a line for each of their combinations, or single markers where
    there are no two rows of one combination.

    Args:
        fit: of :func:`mixjax.lmm`.
        x: column of the model or grouping factor by name, or ``(nobs,)`` values.
        group: grouping factor; None for the first.
        levels: which to draw, by name; None for all, of more than 25 an even selection through the order of levels,
            and the legend says so.
        ncols: panels in a row.
        ax: None for a new figure, or as many axes as levels.

    Returns:
        Array of axes, one per level, with common limits in a new figure.

    Raises:
        DataError: no such column, group or level. ValueError: not as many axes as levels.

    Example:
        >>> import mixjax as mj
        >>> from mixjax import plots
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> axes = plots.trellis(fit, "Days", levels=["308", "309"])
        >>> [ax.get_title() for ax in axes]
        ['308', '309']
    """
    record = linear(fit, "trellis", "plots.observed, or plots.residuals against the variable")
    _ = record.design  # the error says why there is none
    across = column(record, x, "trellis(x=)")
    group = group_name(record.labels, group, "trellis(group=)")
    t = [term.group for term in record.labels.terms].index(group)
    available = list(record.labels.terms[t].levels)
    if isinstance(ncols, bool) or not isinstance(ncols, int | np.integer) or ncols < 1:
        raise ValueError(f"ncols must be 1 or more, got {ncols!r}")
    if levels is None:
        n = min(len(available), MOST_PANELS)
        chosen = [available[i] for i in np.linspace(0, len(available) - 1, n).round().astype(int)]
    else:
        chosen = level_names(available, levels, group, "trellis(levels=)")
    codes = np.asarray(record.design.terms[t].group)
    own, population = group_mean(record, group), population_mean(record)
    others = _others(record, across)
    axes = many(len(chosen), ax, "a trellis", int(ncols), (2.0, 1.9), sharex=True, sharey=True)
    colours, y = palette(), np.asarray(record.design.y)
    for each, level in zip(axes, chosen, strict=True):
        rows = np.flatnonzero(codes == available.index(level))
        each.plot(across.values[rows], y[rows], "o", ms=3.2, color=colours.data, mec="none", alpha=0.8, label="data")
        dashes = (0, (4, 2))
        _lines(each, across.values[rows], population[rows], others[rows], colours.ink, dashes, 1.1, "population")
        _lines(each, across.values[rows], own[rows], others[rows], colours.model, "-", 1.6, group)
        each.set_title(level, fontsize="small", pad=3)
    _label(axes, across, response_name(record.labels), ax is None)
    figure = axes[0].get_figure()
    if ax is None:
        some = len(chosen) < len(available) and levels is None
        heading = f"{len(chosen)} of {thousands(len(available))} levels of {group}" if some else f"levels of {group}"
        handles, names = axes[0].get_legend_handles_labels()
        last = dict(zip(names, handles, strict=True))
        figure.legend(
            last.values(),
            last.keys(),
            loc="outside upper center",
            ncols=3,
            fontsize="small",
            frameon=False,
            title=heading,
        )
    return axes


def group_mean(record: Fitted, group: str) -> np.ndarray:
    """Fixed part and the random effects of a grouping factor and of those it is nested in, ``(n,)``."""
    terms, labels = record.design.terms, record.labels.terms
    own = np.asarray(terms[[label.group for label in labels].index(group)].group)
    mean = fixed_part(record)
    for term, label, b in zip(terms, labels, record.estimates.b, strict=True):
        other = np.asarray(term.group)
        if label.group == group or _is_function_of(other, own):
            mean = mean + (np.asarray(term.Z) * b[other]).sum(axis=1)
    return mean


def _is_function_of(values: np.ndarray, codes: np.ndarray) -> bool:
    """The values are the same wherever the codes are."""
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    return bool((values == values[first][inverse.reshape(-1)]).all())


def _others(record: Fitted, across: Column) -> np.ndarray:
    """Codes ``(n,)`` of the combinations of the categories that the fixed effects use, apart from x and what x says."""
    frame = record.labels.frame
    names = set(record.labels.state.fixed.effects.columns)
    used = [name for name in frame.columns if name in names and name != across.name]
    codes = np.zeros(len(frame), np.int64)
    for name in used:
        if pd.api.types.is_numeric_dtype(frame[name]) and not pd.api.types.is_bool_dtype(frame[name]):
            continue
        own = pd.factorize(frame[name])[0]
        if not _is_function_of(own, across.values):
            codes = np.unique(codes * (own.max() + 1) + own, return_inverse=True)[1].reshape(-1)
    return codes


def _lines(
    ax: Any, x: np.ndarray, mean: np.ndarray, others: np.ndarray, colour: str, dashes: Any, lw: float, label: str
) -> None:
    """A line per combination; markers where the mean is no function of x, or has one value of it."""
    tolerance = 1e-9 * max(1.0, float(np.abs(mean).max(initial=0.0)))
    parts = (
        [np.arange(len(x))] if _one_value(x, mean, tolerance) else [np.flatnonzero(others == c) for c in set(others)]
    )
    loose: list[np.ndarray] = []
    for part in parts:
        part = part[np.argsort(x[part], kind="stable")]
        places, first = np.unique(x[part], return_index=True)
        if len(places) < 2 or not _one_value(x[part], mean[part], tolerance):
            loose.append(part)
            continue
        ax.plot(places, mean[part][first], color=colour, ls=dashes, lw=lw, label=label)
    if loose:
        at = np.concatenate(loose)
        ax.plot(x[at], mean[at], marker="_", ls="none", ms=9, mew=lw, color=colour, label=label)


def _one_value(x: np.ndarray, mean: np.ndarray, tolerance: float) -> bool:
    order = np.argsort(x, kind="stable")
    same = np.diff(x[order]) == 0
    return bool((np.abs(np.diff(mean[order]))[same] <= tolerance).all())


def _label(axes: np.ndarray, across: Column, response: str, ours: bool) -> None:
    for each in axes:
        if across.levels is not None:
            each.set_xlim(-0.5, len(across.levels) - 0.5)
            category_ticks(each, across.levels, "")
            each.set_xlabel("")
        else:
            whole = bool((across.values == np.round(across.values)).all())
            each.xaxis.set_major_locator(MaxNLocator(4, integer=whole))
        if not ours:
            each.set_xlabel(across.name)
            each.set_ylabel(response)
    if ours:
        figure = axes[0].get_figure()
        figure.supxlabel(across.name, fontsize="medium")
        figure.supylabel(response, fontsize="medium")
