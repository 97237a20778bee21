"""Curves of penalised smooths."""

from __future__ import annotations

from typing import Any

import numpy as np

from mixjax.checks import DataError
from mixjax.plots.canvas import Axes, many, palette, percent, reference, single, title
from mixjax.plots.columns import known, response_name
from mixjax.prediction.smooths import smooth_curve, smooth_names, smooth_table


def smooths(
    fit: Any, name: str | None = None, level: float = 0.95, *, n: int = 200, ax: Any = None
) -> Axes | np.ndarray:
    """The smooths of a fit with pointwise bands; see ``fit.smooth``.

    Each is centred, 0 on average over the rows of the fit, whose places are ticks along the axis. Of a generalised
    model it is on the scale of the linear predictor.

    Args:
        fit: of :func:`mixjax.lmm` or :func:`mixjax.glmm`.
        name: of one smooth, ``"s(x)"``; None for all.
        level: of the bands. n: values at which each is drawn.
        ax: None for a new figure; axes for one smooth, or as many axes as smooths.

    Returns:
        The axes, an array of them for several smooths.

    Raises:
        DataError: no such smooth. ValueError: the fit has none, or not as many axes as smooths.

    Example:
        >>> import mixjax as mj
        >>> from mixjax import plots
        >>> fit = mj.lmm("Reaction ~ s(Days, k = 8) + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> plots.smooths(fit).get_ylabel()
        's(Days) (Reaction)'
    """
    record = known(fit)
    names = smooth_names(record)
    if name is not None:
        chosen = [own for own in names if "".join(own.split()) == "".join(str(name).split())]
        if not chosen:
            raise DataError(f"smooths(name=): there is no smooth {name!r}; there are {', '.join(map(repr, names))}")
        names = chosen
    edf = smooth_table(record)["edf"]
    axes = many(len(names), ax, f"smooths {', '.join(names)}", min(len(names), 3), (3.6, 3.2))
    colours, frame = palette(), record.labels.frame
    for i, (each, own) in enumerate(zip(axes, names, strict=True)):
        curve = smooth_curve(record, own, n=n, level=level)
        variable = str(curve.columns[0])
        x = curve[variable].to_numpy()
        reference(each)
        each.fill_between(x, curve["lower"], curve["upper"], color=colours.model, alpha=0.22, lw=0)
        each.plot(x, curve["estimate"], color=colours.model, lw=1.8)
        if variable in frame.columns:
            places = frame[variable].to_numpy(float)
            each.plot(places, np.zeros(len(places)), "|", ms=6, color=colours.ink, alpha=0.35,
                      transform=each.get_xaxis_transform())  # fmt: skip
        each.set_xlabel(variable)
        each.set_ylabel(own)
        title(each, f"{edf[own]:.1f} degrees of freedom" + f", {percent(level)} band" * (i == 0))
    axes[0].set_ylabel(f"{names[0]} ({response_name(record.labels)})" if len(names) == 1 else names[0])
    return single(axes)
