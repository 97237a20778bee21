"""Records of linear and of generalised linear mixed models, and of repeated measures, for what is asked of all."""

from __future__ import annotations

from typing import Any, TypeAlias

from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.fitted.record import Fitted
from mixjax.fitted.repeated import RepeatedFitted

AnyFitted: TypeAlias = Fitted | GeneralizedFitted
# What has fixed effects, and nothing else of which is asked.
AnyRecord: TypeAlias = AnyFitted | RepeatedFitted


def any_record_of(fit: Any) -> AnyFitted:
    """The record of a fit of either kind: of a record itself, or of an object that carries one as ``record``."""
    record = getattr(fit, "record", fit)
    if isinstance(record, RepeatedFitted):
        raise TypeError(
            "this is for models with random effects, as mixjax.lmm and mixjax.glmm fit them; the fit is of repeated "
            "measures without any (mixjax.mmrm)"
        )
    if not isinstance(record, Fitted | GeneralizedFitted):
        raise TypeError(f"a fit is needed, as mixjax.lmm or mixjax.glmm returns it; got {type(fit).__name__}")
    return record
