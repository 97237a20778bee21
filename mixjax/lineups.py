"""Lineups: the real plot hidden among plots of data that the model gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from scipy import stats

from mixjax.checks import check_count
from mixjax.machine import float64
from mixjax.simulation import as_key


class Lineup:
    """Plots of one real fit and of fits to data simulated from it; see :func:`lineup`.

    Attributes:
        figure: matplotlib figure. axes: its panels, numbered from 1.
    """

    def __init__(self, figure: Any, axes: list[Any], place: int):
        self.figure, self.axes = figure, axes
        self._place = place

    def reveal(self) -> int:
        """Number of the real plot; a frame is drawn around it."""
        for spine in self.axes[self._place - 1].spines.values():
            spine.set(visible=True, linewidth=3.0, edgecolor="tab:red")
        return self._place

    def p_value(self, picks: int | Sequence[int]) -> float:
        """Chance that so many viewers pick the real plot if it is no different from the others.

        Args:
            picks: number that each viewer picked, who had not seen the data before.

        Binomial with probability 1 / n each (Buja et al. 2009, Phil. Trans. R. Soc. A 367, 4361): of viewers who all
        saw this one lineup it holds roughly, since a simulated panel may look striking to all of them.
        """
        chosen = np.atleast_1d(np.asarray(picks))
        n = len(self.axes)
        if not len(chosen) or chosen.dtype.kind not in "iu" or chosen.min() < 1 or chosen.max() > n:
            raise ValueError(f"picks are numbers of panels, 1 to {n}, one per viewer, got {picks!r}")
        hits = int((chosen == self._place).sum())
        return float(stats.binom.sf(hits - 1, len(chosen), 1 / n))

    def __repr__(self) -> str:
        return f"<Lineup of {len(self.axes)} plots; .reveal() tells the real one>"


def lineup(fit: Any, plot: str | Callable[..., Any], n: int = 20, key: Any = 0) -> Lineup:
    """Hide a plot of a fit among plots of fits to data simulated from it.

    If you can tell the real one, the model does not give data like yours (Buja et al. 2009; for mixed models Loy,
    Hofmann & Cook 2017, J. Comput. Graph. Stat. 26, 478). Look before you have seen the real plot.

    Args:
        fit: as :func:`mixjax.lmm` or :func:`mixjax.glmm` returns it.
        plot: ``plot(fit, ax=ax)`` draws one; or the name of a function of ``mixjax.plots``, such as ``"residuals"``,
            ``"qq"``, ``"qq_ranef"``.
        n: number of plots, the real one among them.
        key: int or JAX key: of the simulated data and of the place of the real plot.

    Returns:
        :class:`Lineup`.

    Raises:
        ValueError: n is less than 2; there is no such plot. ImportError: matplotlib is not installed.

    Example:
        >>> import mixjax as mj
        >>> fit = mj.lmm("Yield ~ 1 + (1 | Batch)", mj.datasets.load("Dyestuff"))
        >>> found = mj.lineup(fit, "residuals", n=4, key=1)
        >>> found
        <Lineup of 4 plots; .reveal() tells the real one>
        >>> found.p_value([found.reveal()])
        0.25
    """
    n = check_count("n", n, 2)
    from mixjax import plots
    from mixjax.plots.canvas import many

    if isinstance(plot, str):
        draw = getattr(plots, plot, None)
        if plot not in plots.__all__ or draw is None:
            raise ValueError(f"there is no plot {plot!r}; there are {', '.join(plots.__all__)}")
    else:
        draw = plot
    with float64():
        data_key, place_key = jax.random.split(as_key(key))
        place = int(jax.random.randint(place_key, (), 1, n + 1))
    fits = [fit.refit(y) for y in fit.simulate(data_key, n - 1)]
    fits.insert(place - 1, fit)
    columns = min(5, int(np.ceil(np.sqrt(n))))
    panels = list(many(n, None, "a lineup", columns, (2.4, 2.0)))
    for number, (one, ax) in enumerate(zip(fits, panels, strict=True), 1):
        draw(one, ax=ax)
        ax.set(title=str(number), xlabel="", ylabel="")
        if ax.get_legend() is not None:
            ax.get_legend().remove()
    _share_limits(panels)
    return Lineup(panels[0].figure, panels, place)


def _share_limits(panels: list[Any]) -> None:
    """The same limits everywhere, so that scales give nothing away."""
    x = [ax.get_xlim() for ax in panels]
    y = [ax.get_ylim() for ax in panels]
    for ax in panels:
        ax.set(xlim=(min(a for a, _ in x), max(b for _, b in x)), ylim=(min(a for a, _ in y), max(b for _, b in y)))
        ax.tick_params(labelbottom=False, labelleft=False)
