"""Marginal means that can be compared by eye, and their contrasts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixjax.checks import DataError
from mixjax.families.links import RATIOS_OF_MEANS
from mixjax.inference.fixed.grid import as_text
from mixjax.inference.fixed.marginal_means import MarginalMeans, check_level_named
from mixjax.plots.arrows import Arrows, comparison_arrows
from mixjax.plots.canvas import (
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
from mixjax.plots.columns import response_name

NEEDED = ("estimate", "lower", "upper")


def means(
    m: MarginalMeans, arrows: bool | None = None, alpha: float = 0.05, adjust: str = "tukey", *, ax: Any = None
) -> Axes | np.ndarray:
    """Marginal means with intervals, and arrows that overlap where two are not significantly different.

    Intervals of single means say nothing of their differences, whose standard errors may be smaller or larger. The
    arrows do, as those of emmeans' ``plot(comparisons = TRUE)``: the right one of a lower mean and the left one of a
    higher mean meet if the difference is not significant. Their lengths are those of a linear program that comes as
    close as it can to the least significant differences of all pairs; should it show a pair wrongly, a note says so.

    Args:
        m: of ``fit.emmeans(...)`` or ``fit.emtrends(...)``; a panel for every cell of ``by``.
        arrows: draw them; None: where means are compared by differences.
        alpha: level of the tests. adjust: of the pairwise differences in a panel, as in ``MarginalMeans.contrasts``.
        ax: None for a new figure; axes, or as many as panels.

    Returns:
        The axes, an array of them for several panels.

    Raises:
        ValueError: an adjustment or level that is none, or not as many axes as panels.

    Example:
        >>> import mixjax as mj
        >>> from mixjax import plots
        >>> fit = mj.lmm("angle ~ recipe + temperature + (1 | recipe:replicate)", mj.datasets.load("cake"))
        >>> ax = plots.means(fit.emmeans("temperature"))
        >>> ax.get_xlabel()
        'angle'
    """
    if not isinstance(m, MarginalMeans):
        raise TypeError(f"means() draws what fit.emmeans(...) returns, got {type(m).__name__}")
    check_level_named("alpha", alpha)
    arrows = not m.ratio if arrows is None else arrows
    if arrows and m.ratio:
        raise ValueError(
            "arrows show which differences are significant, and these means are compared by ratios: arrows=False, or "
            "means with scale='link'"
        )
    frame = pd.DataFrame(m.to_frame())
    panels = _panels(frame, list(m.by))
    others = [name for name in m.cells.columns if name not in m.by]
    names = [" ".join(map(as_text, row)) for row in frame[others].itertuples(index=False)]
    least = _least_significant(m, 1 - alpha, adjust) if arrows else None
    k = max(len(rows) for _, rows in panels)
    size = (4.6, float(np.clip(1.3 + 0.34 * k, 2.0, 9.0)))
    axes = many(len(panels), ax, f"means of {len(panels)} cells", 3, size, sharex=True)
    for each, (where, rows) in zip(axes, panels, strict=True):
        place = np.arange(len(rows))
        estimate, lower, upper = (frame[name].to_numpy(float)[rows] for name in NEEDED)
        each.hlines(place, lower, upper, color=palette().data, lw=7, alpha=0.3)
        each.plot(estimate, place, "o", ms=5, color=palette().data, mec="none")
        if least is not None:
            there = np.flatnonzero(np.isfinite(estimate))
            found = comparison_arrows(estimate[there], least[np.ix_(rows[there], rows[there])])
            _draw(each, estimate[there], place[there], found)
        for at in place[~np.isfinite(estimate)]:
            each.text(
                0.5, at, "not estimable", transform=each.get_yaxis_transform(), ha="center", va="center",
                fontsize="small", color=palette().ink,
            )  # fmt: skip
        each.set_ylim(-0.7, len(rows) - 0.3)
        each.set_xlabel(_what(m))
        if outer(each, "left") or ax is not None:
            category_ticks(each, [names[i] for i in rows], " ".join(others), "y")
        else:
            each.set_yticks([])
        text = f"{percent(m.level)} intervals" + (f"; arrows apart: different at {alpha:g}" if arrows else "")
        title(each, where or text)
    return single(axes)


def _what(m: MarginalMeans) -> str:
    response = response_name(m.fitted.labels)
    return f"slope of {response}" if m.title.startswith("slopes") else response


def _least_significant(m: MarginalMeans, level: float, adjust: str) -> np.ndarray:
    """``(k, k)`` half widths of the intervals of differences; NaN of means that are not compared."""
    table = m.contrasts("pairwise", adjust, level=level)
    half = ((table["upper"] - table["lower"]) / 2).to_numpy()
    least = np.full((len(m.W), len(m.W)), np.nan)
    for w, one in zip(m.contrast_rows("pairwise").weights, half, strict=True):
        i, j = np.flatnonzero(w)
        least[i, j] = least[j, i] = one
    return least


def _draw(ax: Axes, estimate: np.ndarray, place: np.ndarray, found: Arrows) -> None:
    for sign, lengths, others in ((-1, found.left, estimate.min()), (1, found.right, estimate.max())):
        for x, y, length in zip(estimate, place, lengths, strict=True):
            if length > 0 and x != others:  # nothing lies beyond the outermost means
                style = {"arrowstyle": "-|>", "color": palette().model, "lw": 1.3, "shrinkA": 0, "shrinkB": 0}
                ax.annotate("", (x + sign * length, y), (x, y), arrowprops=style)
    if found.wrong:
        note(ax, f"{found.wrong} pair{'s' * (found.wrong > 1)} shown wrongly: see contrasts()", "bottom")


def contrasts(table: pd.DataFrame, *, ax: Any = None) -> Axes | np.ndarray:
    """Estimates with their intervals and a line at zero; filled where the interval leaves zero out. Ratios stand on a
    logarithmic axis, with a line at 1.

    Args:
        table: of ``MarginalMeans.contrasts()`` or ``eff_size()``, or of ``fit.test(..., joint=False)``; a panel for
            every cell of ``by``.
        ax: None for a new figure; axes, or as many as panels.

    Returns:
        The axes, an array of them for several panels.

    Raises:
        DataError: a table without estimate, lower and upper. ValueError: not as many axes as panels.

    Example:
        >>> import mixjax as mj
        >>> from mixjax import plots
        >>> fit = mj.lmm("angle ~ recipe + (1 | recipe:replicate)", mj.datasets.load("cake"))
        >>> ax = plots.contrasts(fit.emmeans("recipe").contrasts())
        >>> [text.get_text() for text in ax.get_yticklabels()]
        ['B - C', 'A - C', 'A - B']
    """
    columns = table.columns if isinstance(table, pd.DataFrame) else []
    value = next((name for name in RATIOS_OF_MEANS.values() if name in columns and "null" in columns), "estimate")
    ratio = value != "estimate"
    if any(name not in columns for name in (value, *NEEDED[1:])):
        raise DataError(
            "contrasts() draws a table with the columns estimate, lower and upper, as contrasts() returns it"
        )
    frame = pd.DataFrame(table).reset_index(drop="contrast" in table.columns)
    labels = list(frame.columns[: list(frame.columns).index(value)])
    by = labels[: labels.index("contrast")] if "contrast" in labels else []
    shown = [name for name in labels if name not in by]
    names = [" ".join(map(as_text, row)) for row in frame[shown].itertuples(index=False)]
    panels = _panels(frame, by)
    k = max(len(rows) for _, rows in panels)
    size = (4.6, float(np.clip(1.2 + 0.3 * k, 2.0, 9.0)))
    axes = many(len(panels), ax, f"contrasts of {len(panels)} cells", 3, size, sharex=True)
    for each, (where, rows) in zip(axes, panels, strict=True):
        place = np.arange(len(rows))[::-1]
        estimate, lower, upper = (frame[name].to_numpy(float)[rows] for name in (value, *NEEDED[1:]))
        null = 1.0 if ratio else 0.0
        if ratio:
            each.set_xscale("log")
        reference(each, null, axis="x")
        each.hlines(place, lower, upper, color=palette().data, lw=1.6)
        outside = (lower > null) | (upper < null)
        for which, fill in ((outside, palette().data), (~outside, "none")):
            each.plot(estimate[which], place[which], "o", ms=6, color=palette().data, mfc=fill, ls="none")
        each.set_ylim(-0.7, len(rows) - 0.3)
        each.set_xlabel(value.replace("_", " "))
        if outer(each, "left") or ax is not None:
            category_ticks(each, [names[i] for i in rows[::-1]], "", "y")
        else:
            each.set_yticks([])
        if where:
            title(each, where)
    return single(axes)


def _panels(frame: pd.DataFrame, by: list[str]) -> list[tuple[str, np.ndarray]]:
    """Cells of ``by``, each with its rows."""
    if not by:
        return [("", np.arange(len(frame)))]
    names = [
        ", ".join(f"{name} = {as_text(value)}" for name, value in zip(by, row, strict=True))
        for row in frame[by].itertuples(index=False)
    ]
    return [(name, np.flatnonzero(np.array(names) == name)) for name in dict.fromkeys(names)]
