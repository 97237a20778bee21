"""The pictures that a fit is looked at first."""

from __future__ import annotations

from typing import Any

import numpy as np

from mixjax.plots.canvas import many
from mixjax.plots.columns import group_name, rows_of
from mixjax.plots.quantiles import qq, qq_ranef
from mixjax.plots.scatter import residuals, scale_location


def overview(fit: Any, group: str | None = None, *, ax: Any = None) -> np.ndarray:
    """Four pictures: is the mean right, is the variance constant, are errors and random effects normal?

    Residuals against fitted values, their normal quantiles, the roots of their sizes against fitted values, and normal
    quantiles of the random effects of one grouping factor. Of generalised models residuals are quantile residuals.

    Args:
        fit: of :func:`mixjax.lmm` or :func:`mixjax.glmm`.
        group: grouping factor; None for the first.
        ax: None for a new figure, or four axes.

    Returns:
        Array of four axes; see :func:`residuals`, :func:`qq`, :func:`scale_location`, :func:`qq_ranef`.

    Raises:
        DataError: no such group. ValueError: not four axes.

    Example:
        >>> import mixjax as mj
        >>> from mixjax import plots
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> len(plots.overview(fit))
        4
    """
    record = rows_of(fit)
    record.check_can("random effects to draw")
    group = group_name(record.labels, group, "overview(group=)")
    axes = many(4, ax, "an overview", 2, (4.6, 3.7))
    residuals(fit, ax=axes[0])
    qq(fit, ax=axes[1])
    scale_location(fit, ax=axes[2])
    qq_ranef(fit, group, ax=axes[3])
    return axes
