"""Power along a size."""

from __future__ import annotations

from typing import Any

import numpy as np

from mixjax.plots.canvas import Axes, one, palette, reference, title


def power_curve(found: Any, *, ax: Axes | None = None) -> Axes:
    """Power at every size that was simulated, with its interval, the curve through them, and what is enough.

    Args:
        found: as :func:`mixjax.power_curve` returns it.
        ax: axes to draw on; None for a new figure.
    """
    ax = one(ax)
    colors, table = palette(), found.table
    sizes, power = table[found.over].to_numpy(float), table["power"].to_numpy()
    errors = np.abs(table[["lower", "upper"]].to_numpy().T - power)
    ax.errorbar(
        sizes, power, errors, fmt="o", ms=4.5, color=colors.data, elinewidth=1.2, label="simulated, 95 % interval"
    )
    if found.curve is not None:
        along = np.linspace(sizes.min(), sizes.max(), 200)
        ax.plot(
            along, found.curve.power(along), "--", color=colors.model, lw=1.4, label="probit in the root of the size"
        )
    if found.target is not None:
        reference(ax, found.target)
    if found.smallest is not None:
        reference(ax, found.smallest, "x")
        ax.annotate(
            f"{found.smallest}", (found.smallest, 0.0), (4, 4), xycoords=("data", "axes fraction"),
            textcoords="offset points", color=colors.ink,
        )  # fmt: skip
    ax.set(xlabel=found.over, ylabel=f"power of {found.test} (level {found.alpha:g})", ylim=(0, 1.02))
    ax.legend(loc="lower right", frameon=False, fontsize="small")
    title(ax, "power")
    return ax
