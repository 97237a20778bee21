"""Axes, colours and labels that all plots share. Nothing here knows of models."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

try:
    import matplotlib as mpl
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, LinearSegmentedColormap, to_hex, to_rgba
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError('mixjax.plots needs matplotlib: pip install "mixjax[plots]"') from error

__all__ = [
    "MOST_NAMES", "Axes", "MaxNLocator", "Palette", "category_ticks", "many", "name_parameter", "name_points", "note",
    "one", "outer", "palette", "percent", "reference", "shades", "single", "thousands", "title",
]  # fmt: skip

# More names than this on one axis cannot be read, whatever their size.
MOST_NAMES = 60


class Palette(NamedTuple):
    """Colours of the style in force: ``data`` for what was observed, ``model`` for what is compared with it, ``ink``
    for lines of reference and text. Meaning never hangs on hue alone: lines differ by dashes, points by shape."""

    data: str
    model: str
    ink: str


def palette() -> Palette:
    """Colours as fixed values, so that a figure that is saved under another style keeps them."""
    return Palette(to_hex("C0"), to_hex("C3"), to_hex(mpl.rcParams["text.color"]))


def shades(color: str) -> Colormap:
    """From nearly transparent to the colour itself: suits light and dark backgrounds."""
    return LinearSegmentedColormap.from_list("mixjax", [to_rgba(color, 0.12), to_rgba(color, 1.0)])


def one(ax: Any, size: tuple[float, float] = (6.0, 4.2)) -> Axes:
    """The given axes, or those of a new figure."""
    if ax is None:
        return plt.subplots(figsize=size, layout="constrained")[1]
    if not isinstance(ax, Axes):
        raise TypeError(f"ax must be matplotlib Axes or None, got {type(ax).__name__}")
    return ax


def many(
    n: int, ax: Any, what: str, ncols: int, size: tuple[float, float], sharex: bool = False, sharey: bool = False
) -> np.ndarray:
    """n axes ``(n,)``: the given ones, or those of a new figure.

    Args:
        what: for messages, what the axes are for. size: of one of them, in inches.
    """
    if ax is None:
        nrows = -(-n // ncols)
        ncols = -(-n // nrows)  # 6 panels are 3 + 3, not 5 + 1
        width, height = size[0] * ncols, size[1] * nrows
        figure, grid = plt.subplots(
            nrows, ncols, figsize=(width, height), layout="constrained", squeeze=False, sharex=sharex, sharey=sharey
        )
        for spare in grid.ravel()[n:]:
            if sharex:  # the panel above is now the lowest of its column
                above = grid[nrows - 2, list(grid[-1]).index(spare)]
                above.tick_params(labelbottom=True)
            figure.delaxes(spare)
        return grid.ravel()[:n]
    axes = np.atleast_1d(np.asarray(ax, dtype=object)).ravel()
    if len(axes) != n:
        raise ValueError(f"{what} needs {n} axes, got {len(axes)}: pass as many, or name what to draw")
    for each in axes:
        one(each)
    return axes


def single(axes: np.ndarray) -> Axes | np.ndarray:
    """One Axes as itself, several as an array."""
    found: Axes | np.ndarray = axes[0] if len(axes) == 1 else axes
    return found


def outer(ax: Axes, side: str) -> bool:
    """Is it in the first column (``side="left"``) or the last of its figure's grid?"""
    spec = ax.get_subplotspec()
    return spec is None or (spec.is_first_col() if side == "left" else spec.is_last_col())


def name_parameter(ax: Axes, name: str) -> None:
    """A parameter's name below the axes; a long one on two lines."""
    long = len(name) > 24
    ax.set_xlabel(name.replace("|", "\n|") if long else name, fontsize="small" if long else None)


def reference(ax: Axes, value: float = 0.0, axis: str = "y") -> None:
    """A thin line of reference at a value."""
    style: dict[str, Any] = {"color": palette().ink, "lw": 0.9, "ls": (0, (4, 3)), "alpha": 0.65, "zorder": 1.5}
    if axis == "y":
        ax.axhline(value, **style)
    else:
        ax.axvline(value, **style)


def note(ax: Axes, text: str, at: str = "top") -> None:
    """A remark inside the axes, in a corner or, ``at="middle"``, instead of a picture."""
    x, y, va, ha = {
        "top": (0.98, 0.98, "top", "right"),
        "bottom": (0.98, 0.02, "bottom", "right"),
        "middle": (0.5, 0.5, "center", "center"),
    }[at]
    box = {"boxstyle": "round,pad=0.25", "fc": mpl.rcParams["axes.facecolor"], "ec": "none", "alpha": 0.75}
    if at == "middle":
        ax.set(xticks=[], yticks=[])
    ax.text(x, y, text, transform=ax.transAxes, va=va, ha=ha, fontsize="small", color=palette().ink, bbox=box, zorder=5)


def title(ax: Axes, text: str) -> None:
    """A short title, of the size of a label."""
    ax.set_title(text, fontsize="medium")


def name_points(ax: Axes, x: Any, y: Any, names: Any) -> None:
    """Names beside points, on the side that has room; one that would cover an earlier one is left out."""
    (left, right), (bottom, top) = ax.get_xlim(), ax.get_ylim()
    room = _room(ax)
    height = mpl.font_manager.FontProperties(size="x-small").get_size_in_points()
    taken: list[tuple[float, float, float]] = []
    for a, b, name in zip(x, y, map(str, names), strict=True):
        # Points (1/72 inch) from the lower left corner; characters are about 0.6 of their height wide.
        at = (a - left) / (right - left) * room[0]
        up = (b - bottom) / (top - bottom) * room[1]
        width = 0.6 * height * len(name)
        to_left = at > 0.75 * room[0]
        start = at - 5 - width if to_left else at + 5
        if any(start < end and begin < start + width and abs(up - other) < height for begin, end, other in taken):
            continue
        taken.append((start, start + width, up))
        ax.annotate(
            name,
            (a, b),
            xytext=(-5 if to_left else 5, 0),
            textcoords="offset points",
            ha="right" if to_left else "left",
            va="center",
            fontsize="x-small",
            color=palette().ink,
        )


def category_ticks(ax: Axes, names: Sequence[str], label: str, axis: str = "x") -> None:
    """Names at 0, 1, 2, ...: upright where they would run into each other; none, and their number, where even that
    would not help."""
    room = _room(ax)[0 if axis == "x" else 1]
    size = mpl.rcParams["xtick.labelsize"] if axis == "x" else mpl.rcParams["ytick.labelsize"]
    points = mpl.font_manager.FontProperties(size=size).get_size_in_points()
    n = max(len(names), 1)
    longest = max(map(len, names), default=0)
    target = ax.xaxis if axis == "x" else ax.yaxis
    if n > MOST_NAMES or n * points * 1.05 > room:
        small = 5.0
        if n > MOST_NAMES or n * small * 1.15 > room:
            target.set_ticks([])
            target.set_label_text(f"{label} ({thousands(n)} levels)")
            return
        points = room / (1.15 * n)
    rotation = "vertical" if axis == "x" and n * (longest + 1) * 0.62 * points > room else "horizontal"
    target.set_ticks(np.arange(n), list(names), rotation=rotation, fontsize=points)
    target.set_label_text(label)


def _room(ax: Axes) -> tuple[float, float]:
    """Width and height in points of 1/72 inch, as far as they are known before the figure is laid out."""
    figure = ax.get_figure()
    assert figure is not None
    box = ax.get_window_extent()
    return 72 * box.width / figure.dpi, 72 * box.height / figure.dpi


def thousands(n: int) -> str:
    """73 421, with a thin space."""
    return f"{n:,}".replace(",", "\u2009")


def percent(level: float) -> str:
    """0.95 -> 95 %."""
    return f"{100 * level:g} %"
