"""How much single units weigh, and single parts of the model."""

from __future__ import annotations

from typing import Any

import numpy as np

from mixjax.diagnostics.influence import Influence
from mixjax.diagnostics.influence import influence as leave_out
from mixjax.plots.canvas import (
    MOST_NAMES,
    Axes,
    category_ticks,
    name_points,
    note,
    one,
    palette,
    reference,
    thousands,
    title,
)
from mixjax.plots.columns import known, linear, refuse, response_name

LABELS = {"cooks": "Cook's distance", "mdffits": "MDFFITS", "covtrace": "COVTRACE", "covratio": "COVRATIO"}
# Of flagged units so many are named; of more units than MANY stems are thin.
MANY = 300
MOST_NAMED = 12
PARTS = {"residual": "residual", "fixed": "fixed effects"}


def variance_components(fit: Any, *, ax: Axes | None = None) -> Axes:
    """Where the variance lies: random terms, residual and fixed effects, as shares of their sum.

    Args:
        fit: of :func:`mixjax.lmm`.
        ax: axes to draw on; None for a new figure.

    Returns:
        The axes; every bar says its variance, in squared units of the response, and its share.

    Example:
        >>> import mixjax as mj
        >>> from mixjax import plots
        >>> fit = mj.lmm("strength ~ 1 + (1 | batch/cask)", mj.datasets.load("Pastes"))
        >>> ax = plots.variance_components(fit)
        >>> ax.texts[-1].get_text().strip()
        '0.678 (6.3 %)'
    """
    record = linear(fit, "variance_components", "fit.varcorr: shares of a variance need a residual one")
    shares = fit.variance_shares()
    if shares["variance"].iloc[-1] <= 1e-12 * shares["variance"].sum():  # an intercept alone explains nothing
        shares = shares.iloc[:-1]
    names = [
        f"{row.group}\n({_shortened(row.effects)})" if row.component == "random" else PARTS[row.component]
        for row in shares.itertuples()
    ]
    place = np.arange(len(shares))[::-1]
    colours = palette()
    ax = one(ax, (6.0, 1.0 + 0.55 * len(shares)))
    percents = 100 * shares["share"].to_numpy(float)
    for at, component, share, variance in zip(place, shares["component"], percents, shares["variance"], strict=True):
        colour = colours.model if component == "fixed" else colours.data
        ax.barh(at, share, height=0.62, color=colour, alpha=0.35 if component == "residual" else 0.85)
        says = f" {variance:.4g} ({_percent(share)} %)"
        ax.text(share, at, says, va="center", ha="left", color=colours.ink, fontsize="small")
    ax.set_yticks(place, names)
    ax.set_xlim(0, 1.32 * percents.max())
    ax.set_xticks([tick for tick in ax.get_xticks() if tick <= 100])
    ax.set_xlim(0, 1.32 * percents.max())
    ax.set_xlabel(f"share of the variance of {response_name(record.labels)} (%)")
    return ax


def _shortened(effects: str) -> str:
    return effects if len(effects) <= 28 else effects[:26] + " …"


def _percent(share: float) -> str:
    return f"{share:.0f}" if share >= 9.95 else f"{share:.2g}"


def influence(
    fit: Any,
    measure: str = "cooks",
    by: Any = None,
    *,
    rule: str | float = "boxplot",
    index: bool = True,
    ax: Axes | None = None,
) -> Axes:
    """A measure of influence, unit by unit, with the flagged units named.

    Args:
        fit: what :func:`mixjax.diagnostics.influence.influence` returned; or a fit, whose units are left out now.
        measure: a column of numbers of ``Influence.to_frame()``: ``"cooks"``, ``"mdffits"``, ``"covratio"``,
            ``"leverage_overall"``, ``"dfbetas_Days"``, ...
        by: of a fit, what is left out: None for single rows, or a grouping factor or column.
        rule: cut-off, see ``Influence.cutoff``; drawn as dashed lines.
        index: units in their own order; False: the largest first.
        ax: axes to draw on; None for a new figure.

    Returns:
        The axes. Up to 12 of the units beyond the cut-off are named, the farthest.

    Raises:
        DataError: no such measure, or no such units.

    Example:
        >>> import mixjax as mj
        >>> from mixjax import plots
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> from mixjax.diagnostics.influence import influence
        >>> plots.influence(influence(fit.record, "Subject", "fixed-theta")).get_ylabel()
        "Cook's distance"
    """
    if not isinstance(fit, Influence):
        fit = leave_out(known(fit), by)
    elif by is not None:
        raise ValueError("by= says which units of a fit to leave out; an Influence has its units already")
    frame = fit.to_frame()
    measure = fit.measure_called(measure)
    if measure not in frame.columns or frame[measure].dtype.kind not in "fi":
        refuse("measure", measure, [name for name in frame if frame[name].dtype.kind in "fi"], "influence(measure=)")
    names, values = frame.index.astype(str).to_numpy(), frame[measure].to_numpy(float)
    low, high = fit.cutoff(measure, rule)
    flagged = (values > high) | (values < low)
    neutral = 1.0 if measure == "covratio" else 0.0
    distance = np.where(np.isnan(values), -np.inf, np.abs(values - neutral))
    order = np.arange(len(values)) if index else np.argsort(-distance, kind="stable")
    names, values, flagged, distance = names[order], values[order], flagged[order], distance[order]
    ax = one(ax, (6.4, 3.6))
    colours, place, m = palette(), np.arange(len(values)), len(values)
    ax.vlines(place, neutral, values, color=colours.data, lw=1.2 if m <= MANY else 0.6, alpha=0.8)
    ax.plot(place, values, "o", ms=3.5 if m <= MANY else 1.8, color=colours.data, mec="none", label="units")
    ax.plot(place[flagged], values[flagged], "D", ms=4.5, color=colours.model, mec="none", label="flagged")
    ax.axhline(neutral, color=colours.ink, lw=0.8, alpha=0.6)
    for limit in (low, high):
        if np.isfinite(limit):
            reference(ax, limit)
    ax.margins(y=0.12)
    named = np.flatnonzero(flagged)
    named = named[np.argsort(-distance[named], kind="stable")][:MOST_NAMED]
    name_points(ax, place[named], values[named], names[named])
    unknown = int(np.isnan(values).sum())
    if unknown:
        note(ax, f"{unknown} of {m} units without a value")
    kind = str(fit.units.name or "row")
    if m <= MOST_NAMES and index:
        category_ticks(ax, list(names), kind)
    else:
        units = "rows" if kind == "row" else f"levels of {kind}"
        ax.set_xlabel(f"{thousands(m)} {units}, {'in the order of the data' if index else 'the largest first'}")
    ax.set_ylabel(LABELS.get(measure, measure))
    title(ax, f"{thousands(int(flagged.sum()))} of {thousands(m)} flagged ({fit.method})")
    return ax
