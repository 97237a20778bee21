"""Random effects level by level: intervals, and how far they were drawn to the population."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import ndtri

from mixjax.checks import DataError, check_level
from mixjax.plots.canvas import (
    MOST_NAMES,
    Axes,
    category_ticks,
    many,
    note,
    outer,
    palette,
    percent,
    reference,
    single,
    title,
)
from mixjax.plots.columns import effect_label, effect_names, group_name, known, linear, refuse

# Heads of more arrows than these hide each other.
MOST_HEADS = 200


def caterpillar(
    fit: Any, group: str | None = None, level: float = 0.95, *, effect: Any = None, ax: Any = None
) -> Axes | np.ndarray:
    """Random effects of a grouping factor with intervals, levels in the order of the first effect shown.

    Intervals are BLUPs and normal quantiles of their conditional standard deviations given theta and beta: for
    comparing levels with 0, one at a time. Two levels may differ although their intervals overlap.

    Args:
        fit: of :func:`mixjax.lmm` or :func:`mixjax.glmm`, whose modes are on the scale of the linear predictor.
        group: grouping factor; None for the first.
        level: of the intervals.
        effect: one effect or several by name; None for all of the group.
        ax: None for a new figure; axes for one effect, or as many axes as effects.

    Returns:
        The axes, an array of them for several effects. Names of more than 60 levels are left out.

    Raises:
        DataError: no such group or effect. ValueError: not as many axes as effects.

    Example:
        >>> import mixjax as mj
        >>> from mixjax import plots
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> axes = plots.caterpillar(fit)
        >>> [ax.get_xlabel() for ax in axes]
        ['Intercept (Reaction)', 'Days (Reaction per unit of Days)']
    """
    check_level(level)
    record = known(fit)
    group = group_name(record.labels, group, "caterpillar(group=)")
    if any(term.smooth and term.group == group for term in record.labels.terms):
        raise DataError(f"caterpillar(group=): {group} is a smooth, which plots.smooths(fit) draws")
    frames, covariances = fit.ranef(condvar=True)
    frame, condvar = frames[group], covariances[group]
    effects = effect_names(list(frame.columns), effect, group, "caterpillar(effect=)")
    m = len(frame)
    height = float(np.clip(0.9 + 0.19 * m, 2.2, 9.0)) if m <= MOST_NAMES else 5.0
    axes = many(len(effects), ax, f"a caterpillar plot of {', '.join(effects)}", 4, (3.4, height))
    order = np.argsort(frame[effects[0]].to_numpy(float), kind="stable")
    colours, place = palette(), np.arange(m)
    for i, (each, name) in enumerate(zip(axes, effects, strict=True)):
        at = list(frame.columns).index(name)
        b = frame.iloc[:, at].to_numpy(float)[order]
        half = ndtri(0.5 + level / 2) * np.sqrt(np.maximum(condvar[order, at, at], 0.0))
        reference(each, axis="x")
        wide = 1.4 if m <= MOST_NAMES else 0.5
        each.hlines(place, b - half, b + half, color=colours.data, lw=wide, alpha=0.55 if m <= MOST_NAMES else 0.35)
        size = 4.5 if m <= MOST_NAMES else 1.2
        each.plot(b, place, "o", ms=size, color=colours.data if m <= MOST_NAMES else colours.ink, mec="none")
        each.set_xlabel(effect_label(record, name))
        each.set_ylim(-0.8 - 0.01 * m, m - 0.2 + 0.01 * m)
        if not b.any() and not half.any():
            each.set_title("variance estimated as 0", fontsize="small")
        elif i == 0:
            title(each, f"BLUPs, {percent(level)} intervals")
        if outer(each, "left") or ax is not None:
            category_ticks(each, [str(name) for name in frame.index[order]], group, "y")
        else:
            each.set_yticks([])
    return single(axes)


def shrinkage(fit: Any, group: str | None = None, effects: Any = None, *, ax: Any = None) -> Axes | np.ndarray:
    """From every level's own least-squares estimate to its estimate in the mixed model.

    Arrows are long where a level has little information of its own. Two effects span a plane, of more every pair is
    drawn, and one effect has a row per level, in the order of the own estimates.

    Args:
        fit: of :func:`mixjax.lmm`; or the table that ``fit.shrinkage()`` returns, with columns group, level, effect,
            own, mixed and population.
        group: grouping factor; None for the first.
        effects: one, two or more effects by name; None for all.
        ax: None for a new figure; axes, or as many as there are pairs.

    Returns:
        The axes; an array of them for more than two effects. A note counts levels without an estimate of their own.

    Raises:
        DataError: no such group or effect. ValueError: not as many axes as pairs.
    """
    if isinstance(fit, pd.DataFrame):
        table, record = fit, None
        groups = list(dict.fromkeys(table["group"]))
        if group is not None and group not in groups:
            refuse("grouping factor", group, groups, "shrinkage(group=)")
        group = groups[0] if group is None else group
    else:
        record = linear(fit, "shrinkage", "plots.caterpillar, or plots.observed")
        group = group_name(record.labels, group, "shrinkage(group=)")
        if not hasattr(fit, "shrinkage"):
            raise TypeError("this fit has no method shrinkage(): pass the table of own and mixed estimates itself")
        table = fit.shrinkage(group)
    table = table[table["group"] == group]
    available = list(dict.fromkeys(table["effect"]))
    names = effect_names(available, effects, group, "shrinkage(effects=)")
    if len(set(names)) < len(names):
        raise DataError(f"shrinkage(effects=): {', '.join(names)} names an effect twice")
    levels = list(dict.fromkeys(table["level"]))
    wide = {part: table.pivot(index="level", columns="effect", values=part).loc[levels] for part in ("own", "mixed")}
    population = table.drop_duplicates("effect").set_index("effect")["population"]
    labels = {name: effect_label(record, name) if record is not None else name for name in names}
    if len(names) == 1:
        height = float(np.clip(1.0 + 0.19 * len(levels), 2.4, 9.0)) if len(levels) <= MOST_NAMES else 5.0
        axes = many(1, ax, f"shrinkage of {names[0]}", 1, (4.8, height))
        _along_one(axes[0], names[0], wide, float(population[names[0]]), labels, group)
        return single(axes)
    pairs = list(combinations(names, 2))
    axes = many(len(pairs), ax, f"shrinkage of {len(pairs)} pairs of {', '.join(names)}", 3, (4.2, 4.0))
    for each, pair in zip(axes, pairs, strict=True):
        _in_a_plane(each, pair, wide, population, labels)
    title(axes[0], f"shrinkage by {group}")
    axes[0].legend(fontsize="small", frameon=False, loc="best")
    return single(axes)


def _along_one(
    ax: Axes, name: str, wide: dict[str, pd.DataFrame], population: float, labels: dict[str, str], group: str
) -> None:
    own, mixed = wide["own"][name], wide["mixed"][name]
    order = own.fillna(mixed).argsort(kind="stable").to_numpy()
    own, mixed = own.iloc[order], mixed.iloc[order]
    colours, place, m = palette(), np.arange(len(own)), len(own)
    reference(ax, population, axis="x")
    _arrows(ax, own.to_numpy(), place, mixed.to_numpy(), place)
    size = 5.0 if m <= MOST_NAMES else 1.5
    ax.plot(own, place, "o", ms=size, mfc="none", color=colours.data, label="own estimate")
    ax.plot(mixed, place, "o", ms=size, color=colours.model, mec="none", label="mixed model")
    ax.set_xlabel(labels[name])
    ax.set_ylim(-0.8 - 0.01 * m, m - 0.2 + 0.01 * m)
    category_ticks(ax, [str(level) for level in own.index], group, "y")
    title(ax, f"shrinkage by {group}, population dashed")
    ax.legend(fontsize="small", frameon=False, loc="best")
    _note_missing(ax, int(own.isna().sum()), m)


def _in_a_plane(
    ax: Axes, pair: tuple[str, str], wide: dict[str, pd.DataFrame], population: pd.Series, labels: dict[str, str]
) -> None:
    (x0, y0), (x1, y1) = ([wide[part][name].to_numpy(float) for name in pair] for part in ("own", "mixed"))
    colours, m = palette(), len(x0)
    size = 5.0 if m <= MOST_HEADS else 2.0
    _arrows(ax, x0, y0, x1, y1)
    ax.plot(x0, y0, "o", ms=size, mfc="none", color=colours.data, label="own estimate")
    ax.plot(x1, y1, "o", ms=size, color=colours.model, mec="none", label="mixed model")
    at = [float(population[name]) for name in pair]
    ax.plot(*[[value] for value in at], "P", ms=10, color=colours.ink, mec="none", label="population", zorder=4)
    ax.set_xlabel(labels[pair[0]])
    ax.set_ylabel(labels[pair[1]])
    _note_missing(ax, int((np.isnan(x0) | np.isnan(y0)).sum()), m)


def _arrows(ax: Axes, x0: np.ndarray, y0: np.ndarray, x1: np.ndarray, y1: np.ndarray) -> None:
    finite = np.isfinite(x0) & np.isfinite(y0)
    heads: dict[str, Any] = {} if len(x0) <= MOST_HEADS else {"headwidth": 0, "headlength": 0, "headaxislength": 0}
    x0, y0, x1, y1 = (np.asarray(values, float)[finite] for values in (x0, y0, x1, y1))
    ink = palette().ink
    scale: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.003, "alpha": 0.5}
    ax.quiver(x0, y0, x1 - x0, y1 - y0, color=ink, minlength=0, zorder=1.8, **scale, **heads)


def _note_missing(ax: Axes, missing: int, m: int) -> None:
    if missing:
        note(ax, f"{missing} of {m} levels have no estimate of their own", "bottom")
