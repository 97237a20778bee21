"""Residuals against what may explain them."""

from __future__ import annotations

from typing import Any

import numpy as np

from mixjax.checks import InferenceWarning, warn
from mixjax.diagnostics.residuals import conditional_mean, population_mean
from mixjax.fitted.either import AnyFitted
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.plots.canvas import (
    MOST_NAMES,
    Axes,
    category_ticks,
    note,
    one,
    palette,
    reference,
    shades,
    thousands,
    title,
)
from mixjax.plots.columns import Column, column, group_name, residuals_of, response_name, rows_of
from mixjax.plots.smooth import local_linear

# Above this number of rows single points cannot be told apart: their density is drawn.
MOST_POINTS = 5_000
# Groups that a variable of numbers is cut into.
N_CUTS = 10


def residuals(
    fit: Any,
    x: Any = None,
    kind: str | None = None,
    scale: str | None = None,
    *,
    smooth: bool = True,
    span: float = 2 / 3,
    ax: Axes | None = None,
) -> Axes:
    """Residuals against fitted values or any variable, with a smooth.

    A trend in the smooth says that the mean is wrong; against a variable that is not in the model, that it is missing.
    A funnel says that the variance is not constant. Conditional residuals against conditional means may show a trend in
    a correct model, because random effects are shrunk: ``kind="marginal"`` against a covariate is free of that.

    Of generalised models quantile residuals are drawn, against the mean where random effects are zero: they are
    standard normal whatever that is, and free of what shrinkage does.

    Args:
        fit: of :func:`mixjax.lmm` or :func:`mixjax.glmm`.
        x: None for fitted values, of the mean that the residuals are from; a column of the model or a grouping factor
            by name; or ``(nobs,)`` values, which may be a column that the model does not use. Categories are drawn as
            boxes with their points; of more than 60 medians and quartiles are.
        kind, scale: of the residuals, see ``fit.residuals``; None for conditional raw ones, of generalised models for
            quantile residuals, which have no scales.
        smooth: draw a robust local linear curve (lowess); of numbers only.
        span: share of the rows that the curve looks at around each place.
        ax: axes to draw on; None for a new figure.

    Returns:
        The axes. Above 5 000 rows density is shown in hexagons, of stronger colour for more rows (log scale).

    Raises:
        DataError: no such column.

    Example:
        >>> import mixjax as mj
        >>> from mixjax import plots
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> plots.residuals(fit, "Days").get_ylabel()
        'conditional residual of Reaction (raw)'
    """
    record = rows_of(fit)
    values, name = residuals_of(fit, record, kind, scale, "raw")
    across = _fitted(record, kind) if x is None else column(record, x, "residuals(x=)")
    ax = one(ax, _size(across))
    _draw(ax, across, values, smooth, span)
    reference(ax)
    ax.set_ylabel(name)
    return ax


def scale_location(fit: Any, x: Any = None, *, span: float = 2 / 3, ax: Axes | None = None) -> Axes:
    """Roots of absolute residuals against fitted values or any variable: does the spread change?

    Residuals are conditional, times the root of the weights, over sigma; of generalised models quantile residuals, over
    the mean where random effects are zero. The root makes their distribution less skew,
    so that a level curve means constant variance (as in R's ``plot.lm``).

    Args:
        fit: of :func:`mixjax.lmm` or :func:`mixjax.glmm`.
        x, span, ax: as in :func:`residuals`.

    Returns:
        The axes.

    Example:
        >>> import mixjax as mj
        >>> from mixjax import plots
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> ax = plots.scale_location(fit)
    """
    record = rows_of(fit)
    across = _fitted(record, None) if x is None else column(record, x, "scale_location(x=)")
    if isinstance(record, GeneralizedFitted):
        scaled, name = np.asarray(fit.residuals("quantile"), np.float64), "√|quantile residual|"
    else:
        scaled = np.asarray(fit.residuals("conditional", "pearson"), np.float64) / float(record.estimates.sigma)
        name = "√|conditional residual / σ|"
    ax = one(ax, _size(across))
    _draw(ax, across, np.sqrt(np.abs(scaled)), True, span)
    ax.set_ylim(bottom=0)
    ax.set_ylabel(name)
    return ax


def observed(fit: Any, group: Any = None, *, ax: Axes | None = None) -> Axes:
    """Mean responses against mean fitted values, group by group: does the mean hold everywhere?

    Points on the diagonal say yes. The groups that a factor of random effects makes lie near it by themselves, drawn to
    the population a little; those of a variable that the model does not use are the test.

    Args:
        fit: of :func:`mixjax.lmm` or :func:`mixjax.glmm`; of trials proportions are drawn, every trial counting.
        group: None for the first grouping factor; a column of the model or a grouping factor by name; or ``(nobs,)``
            values, which may be a column that the model does not use. Numbers are cut into ten groups of equal size.
        ax: axes to draw on; None for a new figure.

    Returns:
        The axes; larger points have more rows, or trials.

    Raises:
        DataError: no such column.

    Example:
        >>> import mixjax as mj
        >>> from mixjax import plots
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> plots.observed(fit).get_xlabel()
        'mean fitted Reaction by Subject'
    """
    record = rows_of(fit)
    name = group_name(record.labels, None, "observed(group=)") if group is None else group
    by = column(record, name, "observed(group=)")
    values = np.asarray(by.values)
    if by.levels is None and len(np.unique(values)) > N_CUTS:
        values = np.searchsorted(np.quantile(values, np.arange(1, N_CUTS) / N_CUTS), values)
    codes = np.unique(values, return_inverse=True)[1].reshape(-1)
    generalised = isinstance(record, GeneralizedFitted)
    y = record.observed if isinstance(record, GeneralizedFitted) else np.asarray(record.design.y, np.float64)
    means = record.mean if isinstance(record, GeneralizedFitted) else conditional_mean(record)
    size = record.design.size if generalised else None
    weights = np.ones(len(y)) if size is None else np.asarray(size, np.float64)
    if record.design.weights is not None:
        weights = weights * np.asarray(record.design.weights)
    counts = np.bincount(codes, weights)
    own, fitted = (np.bincount(codes, weights * part) / np.where(counts > 0, counts, np.nan) for part in (y, means))
    ax = one(ax, (4.8, 4.6))
    ends = np.nanmin([own, fitted]), np.nanmax([own, fitted])
    colours = palette()
    ax.plot(ends, ends, color=colours.ink, lw=1, alpha=0.8)
    area = 12 + 60 * counts / counts.max()
    ax.scatter(fitted, own, s=area, color=colours.data, alpha=0.7, edgecolors="none", label="groups")
    ax.set_xlabel(f"mean fitted {response_name(record.labels)} by {by.name}")
    ax.set_ylabel(f"mean {response_name(record.labels)}")
    return ax


def _fitted(record: AnyFitted, kind: str | None) -> Column:
    """The mean that residuals of this kind are from."""
    response = response_name(record.labels)
    if isinstance(record, GeneralizedFitted):
        if kind in (None, "quantile"):
            family = record.family
            mean = np.asarray(family.response_mean(family.mean(population_mean(record)), record.psi_by_row))
            return Column(f"fitted {response} (random effects zero)", mean, None)
        return Column(f"fitted {response} (conditional mean)", record.mean, None)
    if kind in (None, "conditional"):
        return Column(f"fitted {response} (conditional mean)", conditional_mean(record), None)
    return Column(f"fitted {response} (population mean)", population_mean(record), None)


def _size(across: Column) -> tuple[float, float]:
    """Of a new figure: wide enough for the names of categories."""
    m = 0 if across.levels is None else len(across.levels)
    return float(np.clip(1 + 0.2 * m, 6.0, 12.0)) if m <= MOST_NAMES else 8.0, 4.2


def _draw(ax: Axes, across: Column, y: np.ndarray, smooth: bool, span: float) -> None:
    if not 0 < span <= 1:
        raise ValueError(f"span is a share of the rows, between 0 and 1, got {span}")
    x = across.values
    finite = np.isfinite(y) & np.isfinite(x)
    if not finite.all():
        missing = int((~finite).sum())
        warn(f"{missing} of {len(y)} rows have no residual of this scale, or no finite x: not drawn", InferenceWarning)
        x, y = x[finite], y[finite]
        note(ax, f"{thousands(missing)} rows not drawn")
    colours = palette()
    if across.levels is not None:
        _boxes(ax, Column(across.name, x, across.levels), y)
        return
    if len(x) > MOST_POINTS:
        ax.hexbin(x, y, gridsize=60, bins="log", mincnt=1, cmap=shades(colours.data), linewidths=0.2)
        title(ax, f"{thousands(len(x))} rows, stronger colour for more")
    else:
        size = float(np.clip(6 - np.log10(max(len(x), 1)), 2.5, 5.0))
        ax.plot(x, y, "o", ms=size, color=colours.data, mec="none", alpha=0.65, label="rows")
    if smooth:
        places, curve = local_linear(x, y, span)
        if len(places):
            ax.plot(places, curve, color=colours.model, lw=2, label="smooth")
    ax.set_xlabel(across.name)


def _boxes(ax: Axes, across: Column, y: np.ndarray) -> None:
    """A box for every category, and its points where there are few enough to see."""
    assert across.levels is not None
    colours, m = palette(), len(across.levels)
    codes = np.asarray(across.values).astype(int)
    parts = [y[codes == i] for i in range(m)]
    line = {"color": colours.ink, "lw": 1.0}
    if m > MOST_NAMES:
        _quartiles(ax, across, parts)
        return
    few = len(y) <= MOST_POINTS
    ax.boxplot(
        parts,
        positions=np.arange(m),
        widths=0.6,
        showfliers=not few,
        manage_ticks=False,
        boxprops=line,
        whiskerprops=line,
        capprops=line,
        medianprops={"color": colours.model, "lw": 2},
        flierprops={"marker": ".", "ms": 2, "mec": colours.data, "alpha": 0.4},
    )
    if few:
        # Spread by the order of the rows in their category: the same picture every time.
        turn = np.concatenate([np.arange(len(part)) for part in parts]) if len(y) else np.empty(0)
        place = np.repeat(np.arange(m), [len(part) for part in parts])
        jitter = 0.44 * (np.modf(0.5 + turn * 0.6180339887)[0] - 0.5)
        ax.plot(place + jitter, np.concatenate(parts), "o", ms=3.5, color=colours.data, mec="none", alpha=0.65)
    ax.set_xlim(-0.6, m - 0.4)
    category_ticks(ax, across.levels, across.name)


def _quartiles(ax: Axes, across: Column, parts: list[np.ndarray]) -> None:
    """Of many categories medians, in ascending order, and quartiles."""
    parts = [part for part in parts if len(part)]
    low, median, high = np.array([np.quantile(part, [0.25, 0.5, 0.75]) for part in parts]).T
    order = np.argsort(median, kind="stable")
    colours, place = palette(), np.arange(len(parts))
    ax.vlines(place, low[order], high[order], color=colours.data, lw=0.6, alpha=0.5, label="quartiles")
    ax.plot(place, median[order], "o", ms=1.5, color=colours.ink, mec="none", label="median")
    ax.set_xticks([])
    ax.set_xlabel(f"{across.name} ({thousands(len(parts))} levels, by their median)")
    ax.legend(fontsize="small", frameon=False, loc="upper left")
