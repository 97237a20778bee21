"""Whether a formula gives the same columns again, and means the same by them on another table."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from mixjax.checks import DataError
from mixjax.design import Design, Labels
from mixjax.formula.evaluate import Columns


def same_columns(design: Design, labels: Labels, again: Design, own: Labels) -> bool:
    """Whether two designs are the same but for their response."""
    if labels.fixed != own.fixed or labels.terms != own.terms or labels.psi != own.psi:
        return False
    pairs = [(design.X, again.X), (design.weights, again.weights), (design.offset, again.offset)]
    pairs += [(design.size, again.size), (design.psi_columns, again.psi_columns)]
    for mine, other in zip(design.terms, again.terms, strict=True):
        pairs += [(mine.Z, other.Z), (mine.group, other.group)]
    return all(_agree(mine, other) for mine, other in pairs)


def refuse_other_columns(labels: Labels, other: Labels) -> None:
    """Raise DataError where columns of the same formula have another meaning in another table."""
    now = {e.shown: (part, e) for part in _parts(other) for e in part.effects.expressions}
    for part in _parts(labels):
        for e in part.effects.expressions:
            part_now, e_now = now[e.shown]
            was, is_now = (list(p.categories(x) or ()) for p, x in ((part, e), (part_now, e_now)))
            if was != is_now:
                raise DataError(
                    f"{e} has the categories {', '.join(map(str, is_now)) or '(none: numbers)'} in the new table, and "
                    f"the parameters are those of {', '.join(map(str, was)) or 'numbers'}: give the column the same "
                    "ones in the same order, as by pandas.Categorical"
                )
            if not _agree(part.learnt[e.shown].state, part_now.learnt[e.shown].state):
                raise DataError(
                    f"{e} is computed from all rows of a table and is something else in the new one, so that the "
                    "parameters do not fit: make a column of it before fitting, and name the column in the formula"
                )
    of_psi = [("coefficients of ziformula= and dispformula=", a, b) for a, b in zip(labels.psi, other.psi, strict=True)]
    for what, was_fixed, is_fixed in (("fixed effects", labels.fixed, other.fixed), *of_psi):
        if was_fixed != is_fixed:
            raise DataError(
                f"the {what} on the new table are {', '.join(is_fixed)}, and the parameters are those of "
                f"{', '.join(was_fixed)}: its predictors must be able to tell the same effects apart"
            )


def _parts(labels: Labels) -> tuple[Columns, ...]:
    return (labels.state.fixed, *labels.state.random, *(part[0] for part in labels.state.psi if part is not None))


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
