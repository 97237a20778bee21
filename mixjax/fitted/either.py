"""Records of linear and of generalised linear mixed models, for what is asked of both."""

from __future__ import annotations

from typing import Any, TypeAlias

from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.fitted.record import Fitted

AnyFitted: TypeAlias = Fitted | GeneralizedFitted


def any_record_of(fit: Any) -> AnyFitted:
    """The record of a fit of either kind: of a record itself, or of an object that carries one as ``record``."""
    record = getattr(fit, "record", fit)
    if not isinstance(record, Fitted | GeneralizedFitted):
        raise TypeError(f"a fit is needed, as mixjax.lmm or mixjax.glmm returns it; got {type(fit).__name__}")
    return record
