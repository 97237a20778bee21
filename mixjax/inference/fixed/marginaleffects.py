"""A fit in the terms of the package marginaleffects, which is loaded only by those who ask for it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.formula.table import level_name
from mixjax.inference.fixed.grid import FixedPart

if TYPE_CHECKING:
    from mixjax.fitted.either import AnyRecord


def to_marginaleffects(fitted: AnyRecord, scale: str = "link") -> Any:
    """A model for ``marginaleffects.predictions``, ``comparisons``, ``slopes`` and the like.

    Predictions are population means, random effects zero, with the covariance of the fixed effects that takes theta as
    known; tests are z tests, where ``emmeans`` has degrees of freedom. Pass ``eps_vcov=1.0`` to whatever is called:
    means are linear in the fixed effects, so a step of one is exact, while the tiny steps that are the default there
    lose most digits of the standard errors of slopes::

        marginaleffects.slopes(to_marginaleffects(fit.record), variables="temp", by="recipe", eps_vcov=1.0)

    Of a generalised linear mixed model predictions are linear predictors, or means of the response of the median
    subject, with a covariance that takes account of theta being estimated. Means on ``scale="response"`` are not
    linear: leave ``eps_vcov`` at its default.

    Args:
        fitted: the fit. Not one whose columns were left out, for there nobody checks which means can be estimated.
        scale: ``"link"`` or ``"response"``; of a linear mixed model they are one.

    Returns:
        A ``marginaleffects`` model. Needs ``pip install marginaleffects`` (0.6, whose comparisons of categories need
        polars < 2).

    Raises:
        ImportError: marginaleffects is missing. ValueError: columns of X were left out; no such scale.
    """
    if scale not in ("link", "response"):
        raise ValueError(f"scale must be 'link' or 'response', got {scale!r}")
    transformed = scale == "response" and isinstance(fitted, GeneralizedFitted)
    if transformed:
        fitted.refuse_extra_zeros("a prediction by marginaleffects", "take scale='link', or predict()")  # type: ignore
    try:
        from marginaleffects.classes import ModelAbstract, ModelVault
        from marginaleffects.utils import ingest
    except ImportError as error:
        raise ImportError("this needs the package marginaleffects: pip install marginaleffects") from error
    labels = fitted.labels
    if labels.dropped_columns:
        raise ValueError(
            f"columns were left out of the fit ({', '.join(labels.dropped_columns)}), and marginaleffects would take "
            "them for zero; use emmeans, or a formula without them"
        )
    part = FixedPart(fitted)
    # Categories there are strings.
    levels_of = {
        name: {level_name(level): level for level in part.factors[name]}
        for name in part.factors
        if not part.is_number(name)
    }
    frame = part.frame.assign(
        **{name: pd.Categorical(part.frame[name].map(level_name), list(levels)) for name, levels in levels_of.items()}
    )

    class Model(ModelAbstract):
        def get_vcov(self, vcov: Any = True) -> np.ndarray | None:
            if vcov is True:
                return np.asarray(fitted.estimates.vcov)
            if vcov is False or vcov is None:
                return None
            raise ValueError(f"vcov must be True, False or a ({len(labels.fixed)}, ...) array, got {vcov!r}")

        def get_exog(self, newdata: Any) -> np.ndarray:
            table = newdata.to_pandas()
            for name, levels in levels_of.items():
                table[name] = [levels[value] for value in table[name]]
            X, offset = part.rows(table)
            # The offset rides along as one more column, whose coefficient is 1.
            return np.column_stack([X, offset])

        def get_predict(self, params: Any, newdata: Any) -> Any:
            import polars as pl

            rows = newdata if isinstance(newdata, np.ndarray) else self.get_exog(newdata)
            estimate = rows[:, :-1] @ np.asarray(params) + rows[:, -1]
            if transformed:
                estimate = np.asarray(fitted.family.mean(estimate))  # type: ignore[union-attr]
            return pl.DataFrame({"rowid": np.arange(len(estimate), dtype=np.int32), "estimate": estimate})

        def get_df(self) -> float:
            return np.inf

    vault = ModelVault(
        coef=np.asarray(fitted.estimates.beta),
        coefnames=np.array(labels.fixed),
        formula=f"{part.state.parsed.response} ~ {part.state.parsed.fixed}",
        modeldata=ingest(frame),
        package="mixjax",
        pandas_categorical_orders={name: list(levels) for name, levels in levels_of.items()},
        vcov=np.asarray(fitted.estimates.vcov),
        variable_names=[labels.response, *part.variables],
    )
    return Model(fitted, vault)
