"""The methods of a generalised linear mixed model that predict: a thin face over ``prediction``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.prediction.generalized import predict as predicted


class GeneralizedPredicting:
    """Methods of an object with a ``record``."""

    record: GeneralizedFitted

    def predict(
        self,
        newdata: Any = None,
        random: bool | str | Sequence[str] | None = None,
        scale: Literal["response", "link"] = "response",
        integrate: bool = False,
        allow_new_levels: bool = False,
        interval: Literal["confidence", "prediction"] | None = None,
        level: float = 0.95,
        size: Any = None,
    ) -> Any:
        """Means of the rows of the fit or of a new table, and intervals; see
        :func:`mixjax.prediction.generalized.predict`.

        Args:
            newdata: table with the columns of the formula; None for the rows of the fit. Contrasts, categories, knots
                and centring are those of the fit.
            random: True: with all random effects of a row's levels (conditional mean). False: with none, the median
                subject. Or the grouping factors, or terms, whose effects count. None: True, or False with
                ``integrate=True``.
            scale: ``"response"``: means, of a binomial response proportions. ``"link"``: the linear predictor.
            integrate: average means over the random effects that ``random`` leaves out, and over new levels: the
                population's average, by an exact integral.
            allow_new_levels: unknown and missing levels have random effects of zero, the median level's, or with
                ``integrate=True`` those that are averaged over; otherwise they are an error.
            interval: ``"confidence"`` of the mean, ``"prediction"`` of a new response; None for means alone.
            level: coverage.
            size: number or ``(rows,)`` of trials of new binomial responses; None: as in the fit.

        Returns:
            Series ``fitted``; with an interval a DataFrame ``estimate``, ``std_error``, ``lower``, ``upper``.

        Example:
            >>> import mixjax as mj
            >>> data = mj.datasets.load("sleepstudy").assign(slow=lambda d: d["Reaction"] > 300)
            >>> fit = mj.glmm("slow ~ Days + (1 | Subject)", data, family="binomial")
            >>> fit.predict({"Days": [9], "Subject": ["308"]}, interval="confidence").round(2)
               estimate  std_error  lower  upper
            0      0.96       0.04   0.79   0.99
        """
        return predicted(
            self.record, newdata, random, scale, integrate, allow_new_levels, interval, level, size
        )  # fmt: skip
