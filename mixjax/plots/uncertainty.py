"""Profiles of the likelihood and replicates of the bootstrap, parameter by parameter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy.interpolate import PchipInterpolator
from scipy.special import ndtr, ndtri

from mixjax.checks import check_level
from mixjax.fitted.names import Spellings
from mixjax.plots.canvas import Axes, many, name_parameter, note, outer, palette, percent, reference, single, title
from mixjax.plots.columns import refuse

LEVELS = (0.5, 0.8, 0.95, 0.99)
# A density that lacks more than this ends with its parameter's range, not with the curve.
CUT = 0.002


def profile_zeta(profile: Any, parm: Any = None, *, ax: Any = None) -> Axes | np.ndarray:
    """Signed root deviances ``zeta`` along every parameter.

    A straight line is a parabolic deviance, where Wald intervals are good; the dashed line is the tangent at the
    estimate. Thin lines are normal quantiles: where the curve meets them are the ends of the profile intervals of
    50, 80, 95 and 99 %. A curve that ends between them stops at the end of the parameter's range.

    Args:
        profile: of ``fit.profile()``, its ``.to_frame()``, or a fit, which is profiled now.
        parm: parameters by name; None for all.
        ax: None for a new figure, or as many axes as parameters.

    Returns:
        The axes, an array of them for several parameters.

    Raises:
        DataError: no such parameter in the profile. ValueError: not as many axes as parameters.

    Example:
        >>> import mixjax as mj
        >>> from mixjax import plots
        >>> fit = mj.lmm("Yield ~ 1 + (1 | Batch)", mj.datasets.load("Dyestuff"), reml=False)
        >>> axes = plots.profile_zeta(fit)
        >>> [ax.get_xlabel() for ax in axes]
        ['sd_Intercept|Batch', 'sigma', 'Intercept']
    """
    curves = _curves(profile, parm)
    axes = many(len(curves), ax, f"a profile of {', '.join(curves)}", 3, (2.9, 2.5))
    colours = palette()
    for each, (name, curve) in zip(axes, curves.items(), strict=True):
        value, zeta = curve["value"].to_numpy(float), curve["zeta"].to_numpy(float)
        reference(each)
        for level in LEVELS:
            for side in (-1, 1):
                each.axhline(side * ndtri(0.5 + level / 2), color=colours.ink, lw=0.5, alpha=0.35, zorder=1)
        if len(value) > 2:
            shape = PchipInterpolator(value, zeta)
            fine = np.unique(np.concatenate([value, np.linspace(value[0], value[-1], 200)]))
            each.plot(fine, shape(fine), color=colours.data, lw=1.8)
            at = int(np.argmin(np.abs(zeta)))
            if 0 < at < len(value) - 1:
                slope = float(shape.derivative()(value[at]))
                each.axline((value[at], zeta[at]), slope=slope, color=colours.model, lw=1, ls=(0, (4, 3)))
        each.plot(value, zeta, "o", ms=2.5, color=colours.data, mec="none")
        each.set_ylim(-3.9, 3.9)
        name_parameter(each, name)
        if outer(each, "left") or ax is not None:
            each.set_ylabel("ζ")
        if outer(each, "right") or each is axes[-1]:
            for level in LEVELS:
                height = float(ndtri(0.5 + level / 2))
                each.text(
                    1.02, height, percent(level), transform=each.get_yaxis_transform(), va="center", fontsize="x-small"
                )
    return single(axes)


def profile_density(profile: Any, parm: Any = None, *, ax: Any = None) -> Axes | np.ndarray:
    """Profiles as densities: of a parameter whose ``zeta`` were standard normal, ``phi(zeta) d zeta / d value``.

    A way to see skewness, as lme4's ``densityplot``; no posterior. Where the parameter's range ends first (a standard
    deviation of 0) the density is cut there, and a note says how much of it lies beyond.

    Args:
        profile, parm, ax: as in :func:`profile_zeta`.

    Returns:
        The axes, an array of them for several parameters.

    Example:
        >>> import mixjax as mj
        >>> from mixjax import plots
        >>> fit = mj.lmm("Yield ~ 1 + (1 | Batch)", mj.datasets.load("Dyestuff"), reml=False)
        >>> axes = plots.profile_density(fit.profile("sigma"))
    """
    curves = _curves(profile, parm)
    axes = many(len(curves), ax, f"densities of {', '.join(curves)}", 3, (2.9, 2.3))
    colours = palette()
    for each, (name, curve) in zip(axes, curves.items(), strict=True):
        value, zeta = curve["value"].to_numpy(float), curve["zeta"].to_numpy(float)
        name_parameter(each, name)
        if outer(each, "left") or ax is not None:
            each.set_ylabel("density")
        if len(value) < 3:
            note(each, "too few points", "middle")
            continue
        shape = PchipInterpolator(zeta, value)
        fine = np.linspace(zeta[0], zeta[-1], 300)
        density = np.exp(-(fine**2) / 2) / np.sqrt(2 * np.pi) / np.maximum(shape.derivative()(fine), 1e-300)
        each.plot(shape(fine), density, color=colours.data, lw=1.8)
        each.fill_between(shape(fine), density, color=colours.data, alpha=0.2, lw=0)
        reference(each, float(value[np.argmin(np.abs(zeta))]), axis="x")
        each.set_ylim(bottom=0)
        beyond = ndtr(zeta[0]) + ndtr(-zeta[-1])
        if beyond > CUT:
            note(each, f"{100 * beyond:.2g} % beyond the range")
    return single(axes)


def _curves(profile: Any, parm: Any) -> dict[str, pd.DataFrame]:
    if hasattr(profile, "profile"):
        profile = profile.profile(parm)
        parm = None
    frame = profile if isinstance(profile, pd.DataFrame) else profile.to_frame()
    names = list(dict.fromkeys(frame["parameter"]))
    return {name: frame[frame["parameter"] == name] for name in _chosen(names, parm, "profile")}


def _chosen(names: list[str], parm: Any, where: str) -> list[str]:
    if parm is None:
        return names
    chosen = [parm] if isinstance(parm, str) else list(parm)
    known = Spellings(names)
    for name in chosen:
        if name not in known:
            refuse("parameter", name, names, where)
    return [names[known[name]] for name in chosen]


def bootstrap(
    bootstrap: Any,
    parm: Any = None,
    level: float = 0.95,
    method: str = "percentile",
    *,
    ax: Any = None,
) -> Axes | np.ndarray:
    """Histograms of bootstrap replicates with the estimate and an interval.

    Args:
        bootstrap: of ``fit.bootstrap(key, n)``.
        parm: terms by name; None for all.
        level, method: of the interval, see ``Bootstrap.confint``.
        ax: None for a new figure, or as many axes as terms.

    Returns:
        The axes, an array of them for several terms. The solid line is the estimate, the bar below the interval. A note
        gives the share of replicates whose variance is exactly 0, or correlation exactly 1 or -1, and how many have no
        value.

    Raises:
        DataError: no such term. ValueError: not as many axes as terms.

    Example:
        >>> import mixjax as mj
        >>> from mixjax import plots
        >>> fit = mj.lmm("Yield ~ 1 + (1 | Batch)", mj.datasets.load("Dyestuff"))
        >>> axes = plots.bootstrap(fit.bootstrap(key=1, n=200))
        >>> axes[0].get_title()
        '95 % percentile interval'
    """
    check_level(level)
    names = _chosen([str(name) for name in bootstrap.replicates.columns], parm, "bootstrap(parm=)")
    limits = bootstrap.confint(level, method)
    axes = many(len(names), ax, f"replicates of {', '.join(names)}", 3, (2.9, 2.4))
    for each, name in zip(axes, names, strict=True):
        _histogram(each, bootstrap.replicates[name].to_numpy(float), name)
        each.axvline(float(bootstrap.estimate[name]), color=palette().ink, lw=1.6)
        low, high = limits.loc[name, ["lower", "upper"]].to_numpy(float)
        if np.isfinite([low, high]).all():
            each.plot([low, high], [0, 0], color=palette().model, lw=5, solid_capstyle="butt", clip_on=False, zorder=4)
        name_parameter(each, name)
        if outer(each, "left") or ax is not None:
            each.set_ylabel("density")
    title(axes[0], f"{percent(level)} {method} interval")
    return single(axes)


def _histogram(ax: Axes, values: np.ndarray, name: str) -> None:
    known = values[np.isfinite(values)]
    remarks = []
    if name.startswith(("sd_", "cor_")) and len(known):
        ends = (0.0,) if name.startswith("sd_") else (-1.0, 1.0)
        for end in ends:
            share = np.mean(np.abs(known - end) < 1e-9)
            if share > 0:
                remarks.append(f"{100 * share:.2g} % at {end:g}")
    if len(known) < len(values):
        remarks.append(f"{len(values) - len(known)} undefined")
    if len(known) and known.max() > known.min():
        low, high = np.quantile(known, [0.25, 0.75])
        width = 2 * (high - low) / len(known) ** (1 / 3)
        bins = int(np.clip((known.max() - known.min()) / width, 10, 60)) if width > 0 else 20
        ax.hist(known, bins=bins, density=True, color=palette().data, alpha=0.45, histtype="stepfilled")
        ax.margins(y=0.18)
    elif len(known):
        remarks.append(f"all replicates are {known[0]:g}")
    else:
        remarks = ["no replicate has a value"]
    if remarks:
        note(ax, "\n".join(remarks))
