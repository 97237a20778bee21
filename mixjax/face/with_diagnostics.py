"""The methods of a fit that predict, look for what is wrong and draw: a thin face over ``prediction``,
``diagnostics`` and ``plots``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import pandas as pd

from mixjax.diagnostics.residuals import residuals
from mixjax.face.diagnosing import Examining
from mixjax.fitted.record import Fitted
from mixjax.prediction.predict import predict as predicted


class Diagnosing(Examining):
    """Methods of an object with a ``record``."""

    record: Fitted

    # --- predictions --------------------------------------------------------------------------------------------------

    @property
    def fitted(self) -> pd.Series:
        """Conditional means of the rows, offset included."""
        means: pd.Series = self.predict()
        return means

    def predict(
        self,
        newdata: Any = None,
        random: bool | str | Sequence[str] = True,
        allow_new_levels: bool = False,
        interval: Literal["confidence", "prediction"] | None = None,
        level: float = 0.95,
        method: Literal["henderson", "second-order", "bootstrap"] = "henderson",
        key: Any = None,
        n: int = 1000,
    ) -> Any:
        """Means of the rows of the fit or of a new table, and intervals; see :func:`mixjax.prediction.predict.predict`.

        Args:
            newdata: table with the columns of the formula; None for the rows of the fit. Contrasts, categories, knots
                and centring are those of the fit.
            random: True: with all random effects of a row's levels (conditional mean). False: without (population). Or
                the grouping factors, or terms, whose effects count: ``"Subject"``, ``"1 | Subject"``, also of a larger
                term.
            allow_new_levels: unknown and missing levels get the population's value; otherwise they are an error.
            interval: ``"confidence"`` of the mean, ``"prediction"`` of a new response; None for means alone.
            level: coverage.
            method: ``"henderson"``, variances taken as known; ``"second-order"`` and ``"bootstrap"`` not, better for
                few levels.
            key, n: of the bootstrap.

        Returns:
            Series ``fitted``; with an interval a DataFrame ``estimate``, ``std_error``, ``lower``, ``upper``.

        Example:
            >>> import mixjax as mj
            >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
            >>> fit.predict({"Days": [10], "Subject": ["308"]}, interval="prediction").round(1)
               estimate  std_error  lower  upper
            0     450.3       30.1  391.3  509.3
        """
        return predicted(self.record, newdata, random, allow_new_levels, interval, level, method, key, n)

    # --- residuals ----------------------------------------------------------------------------------------------------

    def residuals(self, kind: str = "conditional", scale: str = "raw") -> pd.Series:
        """Residuals of the rows; :func:`mixjax.diagnostics.residuals.residuals` says which one shows what.

        Args:
            kind: ``"conditional"``, ``"marginal"`` or ``"random"``.
            scale: ``"raw"``, ``"pearson"``, ``"standardized"``, ``"studentized"``, ``"normalized"`` (conditional only),
                ``"cholesky"`` (marginal only).
        """
        return pd.Series(residuals(self.record, kind, scale), self.record.labels.frame.index, name="residual")

    # --- what drives the fit ------------------------------------------------------------------------------------------

    def sensitivity(self, scale: Literal["sdcor", "vcov", "theta"] = "sdcor") -> pd.DataFrame:
        """Derivatives of all estimates with respect to case weights; see
        :func:`mixjax.diagnostics.sensitivity.sensitivity`."""
        from mixjax.diagnostics.sensitivity import sensitivity

        return sensitivity(self.record, scale)

    def shrinkage(self, group: str | None = None) -> pd.DataFrame:
        """Coefficients of every level by its own rows, by the model, and in the population; see
        :func:`mixjax.diagnostics.shrinkage.shrinkage`."""
        from mixjax.diagnostics.shrinkage import shrinkage

        return shrinkage(self.record, group)
