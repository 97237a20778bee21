"""The methods that look for what is wrong, of fits of either kind: a thin face over ``diagnostics`` and ``plots``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from mixjax.diagnostics.leverage import leverage
from mixjax.fitted.either import AnyFitted

if TYPE_CHECKING:
    from mixjax.diagnostics.influence import Influence
    from mixjax.diagnostics.quantile_residuals import QuantileResiduals


class Examining:
    """Methods of an object with a ``record``."""

    record: AnyFitted

    def augment(self) -> pd.DataFrame:
        """The used rows and columns with fitted values, residuals and leverage beside them, in columns that begin with
        a dot; see :func:`mixjax.diagnostics.augment.augmented`."""
        from mixjax.diagnostics.augment import augmented

        columns = augmented(self.record)
        frame: pd.DataFrame = self.record.labels.frame.assign(**{str(name): columns[name] for name in columns})
        return frame

    def quantile_residuals(
        self, key: Any = 0, n: int = 250, random: Literal["new", "fitted"] = "new"
    ) -> QuantileResiduals:
        """Simulated residuals, as R's DHARMa, and tests of them; see
        :func:`mixjax.diagnostics.quantile_residuals.quantile_residuals`."""
        from mixjax.diagnostics.quantile_residuals import quantile_residuals

        return quantile_residuals(self.record, key, n, random)

    def influence(self, by: Any = None, method: Literal["exact", "fixed-theta", "one-step"] = "exact") -> Influence:
        """Leave out every row or group; see :func:`mixjax.diagnostics.influence.influence`.

        Args:
            by: None for rows; a grouping factor, a column or several, whose levels are left out.
            method: ``"exact"``: refits. ``"one-step"``: one Newton step. ``"fixed-theta"``: variances stay; of linear
                models only.

        Returns:
            Influence: ``.to_frame()``, ``.ranked()``, ``.flagged()``, ``.dfbetas``, ...
        """
        from mixjax.diagnostics.influence import influence

        return influence(self.record, by, method)

    def leverage(self) -> pd.DataFrame:
        """Leverage of the rows: ``overall``, its parts ``fixed`` and ``random``, and ``random_unconfounded``; see
        :func:`mixjax.diagnostics.leverage.leverage`."""
        return pd.DataFrame(leverage(self.record)._asdict(), index=self.record.labels.frame.index)

    def smooths(self) -> pd.DataFrame:
        """The penalised smooths ``s(x)`` of the formula: basis, effective degrees of freedom ``edf``, standard
        deviation of the penalised effects ``sd``, smoothing parameter ``lambda``; see
        :func:`mixjax.prediction.smooths.smooth_table`.

        Raises:
            ValueError: the formula has none.
        """
        from mixjax.prediction.smooths import smooth_table

        return smooth_table(self.record)

    def smooth(self, name: str | None = None, at: Any = None, n: int = 100, level: float = 0.95) -> pd.DataFrame:
        """The curve of a smooth with pointwise errors; see :func:`mixjax.prediction.smooths.smooth_curve`.

        Args:
            name: ``"s(x)"``, ``"s(x):f[a]"``; None where there is one.
            at: values of the variable, ``(n,)``; None: n of them, equally spaced over those of the fit.
            n: how many. level: of the band.

        Returns:
            DataFrame: the variable, ``estimate`` (0 on average over the rows of the fit), ``std_error``, ``lower``,
            ``upper``; of a generalised model on the scale of the linear predictor.

        Raises:
            ValueError: there is no such smooth, or ``at`` holds no numbers.
        """
        from mixjax.prediction.smooths import smooth_curve

        return smooth_curve(self.record, name, at, n, level)

    def plot(self, group: str | None = None) -> Any:
        """Four panels: residuals, their normal quantiles, their sizes, normal quantiles of random effects; see
        :mod:`mixjax.plots` for these and more.

        Args:
            group: grouping factor; None for the first.

        Returns:
            Array of four matplotlib Axes.

        Raises:
            ImportError: matplotlib is not installed: ``pip install "mixjax[plots]"``.
        """
        from mixjax.plots.panel import overview

        return overview(self, group)
