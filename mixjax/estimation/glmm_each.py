"""Fits of generalised linear mixed models one after the other, where lanes do not serve them: by quadrature, or of data
sets that have rows of their own."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from mixjax.estimation.glmm import GLMMEstimates
from mixjax.optimise.results import Result
from mixjax.products.family_rows import FamilyRows


def fit_each(
    data: Iterable[FamilyRows | None],
    fit: Callable[[FamilyRows], GLMMEstimates],
    keep: Sequence[str],
    like: GLMMEstimates,
) -> GLMMEstimates:
    """The estimates of some data sets, with a leading axis.

    Args:
        data: of one model each; None for one that cannot be fitted, which gets ``NOT_FINITE`` and NaN. fit: of one
            data set. keep: fields of :class:`~mixjax.GLMMEstimates`. like: estimates of the same shapes.
    """
    found = [None if rows is None else fit(rows) for rows in data]
    nothing = jax.tree.map(lambda a: np.full_like(a, np.nan if np.asarray(a).dtype.kind == "f" else 0), like)
    nothing = nothing._replace(converged=np.bool_(False), result=np.int64(Result.NOT_FINITE))
    every = [nothing if one is None else one for one in found]

    def together(name: str) -> Any:
        return jax.tree.map(lambda *a: np.stack(a), *(getattr(one, name) for one in every)) if name in keep else None

    return GLMMEstimates._make(map(together, GLMMEstimates._fields))
