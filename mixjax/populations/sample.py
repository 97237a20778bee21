"""Samples of a population: predictors that are there, and the responses drawn for them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
import pandas as pd

from mixjax.checks import MOST, check_count
from mixjax.machine import float64
from mixjax.populations.columns import to_series
from mixjax.populations.expressions import shortened
from mixjax.simulation import as_key


@dataclass(frozen=True, eq=False)
class Sample:
    """Predictors of one sample; made by :meth:`Population.sample_x` and :meth:`Population.given`.

    Attributes:
        population: where they come from. arrays: column -> ``(n,)`` numbers, or codes of a factor. n: rows.
        table: the user's own, with :meth:`Population.given`.
    """

    population: Any
    arrays: Mapping[str, np.ndarray]
    n: int
    table: pd.DataFrame | None = None

    def __len__(self) -> int:
        return self.n

    def __repr__(self) -> str:
        return repr(self.to_frame())

    def _repr_html_(self) -> str | None:
        table: str | None = self.to_frame()._repr_html_()  # type: ignore[operator]
        return table

    def column(self, name: str) -> np.ndarray:
        """A column as numbers or codes."""
        if name not in self.arrays:
            raise ValueError(f"the predictors have no column {name!r} (columns: {shortened(self.arrays)})")
        return self.arrays[name]

    def to_frame(self) -> pd.DataFrame:
        """The predictors, factors as categories."""
        if self.table is not None:
            return self.table.copy()
        kinds = self.population._plan.kinds
        return pd.DataFrame({name: to_series(values, kinds[name]) for name, values in self.arrays.items()})

    def sample_y(self, key: Any, replicate: int = 0, effects: bool = False) -> pd.DataFrame:
        """Draw random effects and responses.

        Args:
            key: int or JAX key. replicate: number of the sample; responses of one key are independent.
            effects: with a column for every random effect, its level's value in each row.

        Returns:
            DataFrame of predictors and responses.

        Raises:
            ValueError: a parameter that is an expression takes an impossible value; names it.
        """
        pop, plan, replicate = self.population, self.population._plan, check_numbers(replicate, 1)
        size = plan.size(self.n)
        with float64():
            block = pop._y(self._spread(size), as_key(key), self.n, replicate)
            y = row_of(block, replicate % size, plan.columns("y"))
        frame = self.to_frame()
        for name, values in y.items():
            unit = plan.units[name]
            if unit is None:
                frame[name] = to_series(values, plan.kinds[name])
            elif effects:
                frame[name] = values[self.column(unit)]
        return frame

    def _spread(self, size: int) -> dict[str, Any]:
        """Columns that the responses read, once per sample of a block."""
        needed = {name: jnp.asarray(self.column(name)) for name in self.population._plan.needed()}
        return {name: jnp.broadcast_to(values, (size, self.n)) for name, values in needed.items()}


@dataclass(frozen=True, eq=False)
class PopulationRows:
    """A population with a number of rows: the source of a study's data; made by :meth:`Population.rows`."""

    population: Any
    nobs: int
    x: Any
    x_key: Any
    response: str
    truth: Mapping[str, float]
    options: Mapping[str, Any]

    def tables(self, key: Any, first: int, count: int) -> tuple[list[pd.DataFrame], np.ndarray]:
        """Predictors of samples ``first .. first + count - 1``, one table where all share it, and ``(count, nobs)``."""
        plan = self.population._plan
        names = [name for name in plan.columns("x") if not isinstance(self.x, Sample) or name in self.x.arrays]
        keep = [*names, self.response]
        found = self.population.sample_many(key, count, self.nobs, first, self.x, self.x_key, keep=keep)
        arrays = {name: np.asarray(found[name]) for name in keep}
        if isinstance(self.x, Sample):
            return [self.x.to_frame()], arrays[self.response]
        number = count if self.x == "new" else 1
        tables = [
            pd.DataFrame({name: to_series(arrays[name][i], plan.kinds[name]) for name in names}, index=range(self.nobs))
            for i in range(number)
        ]
        return tables, arrays[self.response]


def check_numbers(first: int, count: int) -> int:
    """The number of the first of some samples, or ValueError."""
    first = check_count("the number of a sample", first, 0)
    if first + count > MOST:
        raise ValueError(f"samples are numbered up to {MOST}; got {first + count}")
    return first


def row_of(block: Mapping[str, Any], place: int, names: list[str]) -> dict[str, np.ndarray]:
    """One sample of a block, columns in the order of ``names``."""
    return {name: np.asarray(block[name][place]) for name in names}
