"""Normal quantile plots with bands."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mixjax.checks import check_level
from mixjax.fitted.either import AnyFitted
from mixjax.plots.canvas import Axes, name_points, note, one, palette, percent, thousands, title
from mixjax.plots.columns import effect_names, group_name, known, residuals_of, rows_of
from mixjax.plots.order import KINDS, bands, line, scores

# Of the points outside the bands so many are named.
MOST_NAMED = 5
MANY = 100  # of so many none is
# Longer samples are drawn thinner in the middle, where neighbours cover each other; the ends are complete.
MOST_DRAWN = 4_000


class _Sample(NamedTuple):
    """Values ``(n,)`` and their names."""

    label: str
    values: np.ndarray
    names: np.ndarray


def qq(
    fit: Any,
    kind: str | None = None,
    scale: str | None = None,
    *,
    band: str | None = "simultaneous",
    level: float = 0.95,
    ax: Axes | None = None,
) -> Axes:
    """Normal quantile plot of residuals.

    The line is fitted to the middle 80 % of the points, so that outliers do not turn it. Bands are for independent
    normal numbers, which residuals are not quite: conditional ones are shrunk towards normality with the random
    effects, and marginal ones are correlated within groups. A lineup compares with data simulated from the fit itself.

    Args:
        fit: of :func:`mixjax.lmm` or :func:`mixjax.glmm`.
        kind, scale: of the residuals, see ``fit.residuals``; None for conditional Pearson residuals, which are raw
            without weights, and of generalised models for quantile residuals, the only ones that are normal in a right
            model; they have no scales.
        band: ``"simultaneous"``: all ordered values of a normal sample lie inside with probability ``level``;
            ``"pointwise"``: each of them; None for none. See :func:`mixjax.plots.order.bands`.
        level: of the bands.
        ax: axes to draw on; None for a new figure.

    Returns:
        The axes. Up to five points outside the bands, the farthest from the line, are named by the index of
        their rows, unless there are more than 100.

    Raises:
        ValueError: an unknown kind, scale or band.

    Example:
        >>> import mixjax as mj
        >>> from mixjax import plots
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> plots.qq(fit).get_title()
        '95 % simultaneous band'
    """
    _check(band, level)
    record = rows_of(fit)
    residual, name = residuals_of(fit, record, kind, scale, "pearson")
    ax = one(ax, (4.8, 4.6))
    sample = _Sample("", np.asarray(residual, np.float64), np.asarray(record.labels.frame.index))
    _draw(ax, [sample], band, level)
    ax.set_ylabel(name)
    return ax


def qq_ranef(
    fit: Any,
    group: str | None = None,
    effect: Any = None,
    *,
    band: str | None = "simultaneous",
    level: float = 0.95,
    ax: Axes | None = None,
) -> Axes:
    """Normal quantile plot of random effects, each over its own standard deviation.

    A BLUP varies by ``Var(b) - Var(b | y)`` when the model is right, less where a level has few rows: without the
    division a level's number of rows would show as heavy or light tails. Shrinkage makes BLUPs look normal even where
    the effects are not; outlying levels are what this plot finds.

    Args:
        fit: of :func:`mixjax.lmm` or :func:`mixjax.glmm`; of the latter variances of modes are approximate.
        group: grouping factor; None for the first.
        effect: one effect or several by name; None for all of the group, which are drawn together.
        band, level, ax: as in :func:`qq`.

    Returns:
        The axes. Points outside the bands are named by their levels. An effect without estimated variance is left out,
        and a note says so.

    Raises:
        DataError: no such group or effect.

    Example:
        >>> import mixjax as mj
        >>> from mixjax import plots
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> ax = plots.qq_ranef(fit, "Subject")
        >>> [text.get_text() for text in ax.get_legend().get_texts()]
        ['Intercept', 'Days']
    """
    _check(band, level)
    record = known(fit)
    group = group_name(record.labels, group, "qq_ranef(group=)")
    frames, covariances = fit.ranef(condvar=True)
    frame, condvar = frames[group], covariances[group]
    names = effect_names(list(frame.columns), effect, group, "qq_ranef(effect=)")
    places = [list(frame.columns).index(name) for name in names]
    prior = marginal_variances(record, group)
    samples, flat = [], []
    for name, i in zip(names, places, strict=True):
        left = prior[i] - condvar[:, i, i]
        varies = left > 1e-10 * prior[i]
        if not varies.any():
            flat.append(name)
            continue
        b = frame[name].to_numpy(float)[varies] / np.sqrt(left[varies])
        samples.append(_Sample(name, b, frame.index.to_numpy()[varies]))
    ax = one(ax, (4.8, 4.6))
    _draw(ax, samples, band, level)
    which = f"{names[0]} of {group}" if len(names) == 1 else f"random effects of {group}"
    ax.set_ylabel(f"standardized {which}")
    if flat:
        note(ax, f"{', '.join(flat)}: variance estimated as 0", "bottom" if samples else "middle")
    if len(names) > 1 and samples:
        ax.legend(loc="upper left", fontsize="small", frameon=False)
    return ax


def marginal_variances(record: AnyFitted, group: str) -> np.ndarray:
    """Estimated variances of a group's effects, all its terms side by side, ``(q,)``."""
    pairs = zip(record.labels.terms, record.estimates.Sigma, strict=True)
    return np.concatenate([np.diag(Sigma) for term, Sigma in pairs if term.group == group])


def _check(band: str | None, level: float) -> None:
    if band is not None and band not in KINDS:
        raise ValueError(f"band must be 'simultaneous', 'pointwise' or None, got {band!r}")
    check_level(level)


def _draw(ax: Axes, samples: list[_Sample], band: str | None, level: float) -> None:
    """Ordered values over normal scores; line and band of each sample's own centre and scale."""
    ax.set_xlabel("standard normal quantile")
    ink, first, second = palette().ink, palette().data, palette().model
    outside: list[tuple[float, float, float, str]] = []
    count = undefined = 0
    for i, (label, values, names) in enumerate(samples):
        finite = np.isfinite(values)
        undefined += int((~finite).sum())
        values, names = values[finite], names[finite]
        n = len(values)
        order = np.argsort(values, kind="stable")
        y, z = values[order], scores(n)
        centre, scale = line(y) if n > 2 else (0.0, 0.0)
        colour = (first, second, ink)[i % 3]
        if scale > 0:
            ax.plot(z[[0, -1]], centre + scale * z[[0, -1]], color=ink, lw=1, ls="-" if i == 0 else ":", alpha=0.8)
        if scale > 0 and band is not None:
            found = bands(n, level, band)
            ax.fill_between(
                found.quantiles, centre + scale * found.lower, centre + scale * found.upper, color=ink, alpha=0.1, lw=0
            )
            low, high = (np.interp(z, found.quantiles, limit) for limit in (found.lower, found.upper))
            t = (y - centre) / scale
            beyond = np.flatnonzero((t < low) | (t > high))
            count += len(beyond)
            distance = np.abs(t - z)[beyond]
            for j in np.argsort(-distance, kind="stable")[:MOST_NAMED]:
                at = beyond[j]
                outside.append((distance[j], z[at], y[at], str(names[order[at]])))
        drawn = _thinned(n)
        marker = "os^vD"[i % 5]
        style: dict[str, Any] = {
            "ms": 4 if n <= 500 else 2.5,
            "color": colour,
            "mec": colour,
            "mfc": colour if i == 0 else "none",
        }
        ax.plot(z[drawn], y[drawn], marker, ls="none", alpha=0.8, label=label, **style)
    farthest = sorted(outside, reverse=True)[:MOST_NAMED]
    if farthest and count <= MANY:
        _, x_named, y_named, named = zip(*farthest, strict=True)
        name_points(ax, x_named, y_named, named)
    if undefined:
        note(ax, f"{undefined} undefined", "bottom")
    if samples and band is not None:
        more = f", {thousands(count)} outside" if count > len(farthest) else ""
        title(ax, f"{percent(level)} {band} band{more}")


def _thinned(n: int) -> np.ndarray:
    """Positions to draw: all of a short sample, all at the ends and every so many in the middle of a long one."""
    if n <= MOST_DRAWN:
        return np.arange(n)
    ends = MOST_DRAWN // 4
    middle = np.linspace(ends, n - ends - 1, 2 * ends).astype(int)
    return np.unique(np.concatenate([np.arange(ends), middle, np.arange(n - ends, n)]))
