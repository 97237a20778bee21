"""Columns of a population as they stand in a table, and back."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from mixjax.checks import DataError
from mixjax.populations.expressions import Kind, shortened


def to_series(values: np.ndarray, kind: Kind) -> Any:
    """A column as it stands in a table."""
    if kind.labels is None:
        return values if kind.dtype is None else pd.Series(values).astype(kind.dtype).array
    if kind.values is None:
        return pd.Categorical.from_codes(values, categories=pd.Index(kind.labels))
    if isinstance(kind.values, pd.CategoricalDtype):
        return pd.Categorical.from_codes(values, dtype=kind.values)
    return kind.values.take(values).array


def from_series(column: pd.Series, name: str, kind: Kind) -> np.ndarray:
    """A column of a user's table as numbers, or as codes of a factor that the population has."""
    if column.isna().any():
        raise DataError(f"the column {name!r} has {int(column.isna().sum())} missing values; drop or fill them first")
    if kind.labels is None:
        if not pd.api.types.is_numeric_dtype(column):
            raise DataError(f"the column {name!r} must be numbers, got {column.dtype}")
        return column.to_numpy(np.float64)
    codes = pd.Index(kind.labels).get_indexer(pd.Index(column.astype(object).map(str)))
    if (codes < 0).any():
        unknown = column[codes < 0].iloc[0]
        raise DataError(f"{unknown!r} in the column {name!r} is no level of it (levels: {shortened(kind.labels)})")
    return codes.astype(np.int32)
