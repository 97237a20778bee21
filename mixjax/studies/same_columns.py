"""Whether a formula gives the same columns again, and means the same by them on another table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mixjax.design import Design, Labels
from mixjax.formula.errors import DataError


def same_columns(design: Design, labels: Labels, again: Design, own: Labels) -> bool:
    """Whether two designs are the same but for their response."""
    if labels.fixed != own.fixed or labels.terms != own.terms:
        return False
    pairs = [(design.X, again.X), (design.weights, again.weights), (design.offset, again.offset)]
    for mine, other in zip(design.terms, again.terms, strict=True):
        pairs += [(mine.Z, other.Z), (mine.group, other.group)]
    return all(_agree(mine, other) for mine, other in pairs)


def refuse_other_columns(labels: Labels, other: Labels) -> None:
    """Raise DataError where columns of the same formula have another meaning in another table."""
    encoded, encoded_now = _learnt(labels, "encoder_state"), _learnt(other, "encoder_state")
    for text, (_, state) in encoded.items():
        was, now = (list(s.get("categories") or ()) for s in (state, encoded_now.get(text, (None, {}))[1]))
        if was != now:
            raise DataError(
                f"{text} has the categories {', '.join(map(str, now)) or '(none: numbers)'} in the new table, and the "
                f"parameters are those of {', '.join(map(str, was)) or 'numbers'}: give the column the same ones in "
                "the same order, as by pandas.Categorical"
            )
    computed, computed_now = _learnt(labels, "transform_state"), _learnt(other, "transform_state")
    for text, state in computed.items():
        if not _agree(state, computed_now.get(text)):
            raise DataError(
                f"{text} is computed from all rows of a table and is something else in the new one, so that the "
                "parameters do not fit: make a column of it before fitting, and name the column in the formula"
            )
    if labels.fixed != other.fixed:
        raise DataError(
            f"the fixed effects on the new table are {', '.join(other.fixed)}, and the parameters are those of "
            f"{', '.join(labels.fixed)}: its predictors must be able to tell the same effects apart"
        )


def _learnt(labels: Labels, what: str) -> dict[str, Any]:
    """Part of a formula -> what formulaic learnt of it from the table: categories, or centres, knots and the like."""
    specs = [labels.specs["fixed"], *labels.specs["random"]]
    return {text: state for spec in specs for text, state in getattr(spec, what).items()}


def _agree(a: Any, b: Any) -> bool:
    """Equal up to rounding, whatever the nesting: what a transform learnt from a table, or arrays."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_agree(a[name], b[name]) for name in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return all(map(_agree, a, b))
    if isinstance(a, int | float | np.number | np.ndarray) and isinstance(b, int | float | np.number | np.ndarray):
        a, b = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
        scale = np.abs(a).max(initial=0.0)
        return a.shape == b.shape and bool(np.allclose(a, b, rtol=1e-9, atol=1e-9 * scale, equal_nan=True))
    return bool(a == b)
