"""What the likelihood of a generalised linear mixed model is made of: row densities, effects, columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from typing import Any

import jax
import numpy as np

from mixjax.engine.effects import CurvedEffects
from mixjax.engine.laplace_curvature import Data
from mixjax.engine.level_effects import OneFactor
from mixjax.families import Derivatives, Expected, Family
from mixjax.machine import Array
from mixjax.products.family_rows import places_of
from mixjax.products.sums import Layout

Key = tuple[int, ...]

# Sums by level at most; beyond them rows are better passed over again.
MOST_SUMS = 160


@dataclass(frozen=True)
class Columns:
    """The distinct columns of X and Z, and products of them. A JAX pytree.

    Attributes:
        products: per key the product of its columns ``(*rows, 1)``; of all-one columns None.
        levels: the same of columns that are constant within levels, ``(m, 1)``.
        x, z: which distinct column each of X's and Z's is; constant: those that are so; static.
    """

    products: dict[Key, Array | None]
    levels: dict[Key, Array | None]
    x: tuple[int, ...]
    z: tuple[int, ...]
    constant: tuple[int, ...] = ()

    def key(self, *columns: int) -> Key:
        return tuple(sorted(columns))

    @property
    def s(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(self.x + self.z))

    def split(self, key: Key) -> tuple[Key, Key]:
        """Columns that are constant within levels, which sums by level leave alone, and the others."""
        return tuple(i for i in key if i in self.constant), tuple(i for i in key if i not in self.constant)

    def keys(self, zs: int, ss: int) -> list[Key]:
        """Of the products of so many columns of Z and so many of any."""
        found = {
            self.key(*a, *b)
            for a in combinations_with_replacement(self.z, zs)
            for b in combinations_with_replacement(self.s, ss)
        }
        return sorted(found)


jax.tree_util.register_dataclass(Columns, data_fields=["products", "levels"], meta_fields=["x", "z", "constant"])


def columns_of(effects: CurvedEffects, data: Data) -> Columns | None:
    """Of a model with one grouping factor and NumPy's columns; None where there are too many sums."""
    if not isinstance(effects, OneFactor):
        return None
    known: list[np.ndarray] = []

    def place(column: np.ndarray) -> int:
        for i, other in enumerate(known):
            if np.abs(column - other).max() <= 1e-14 * np.abs(other).max():
                return i
        known.append(column)
        return len(known) - 1

    z = tuple(place(np.asarray(column)) for column in effects.Z)
    x = tuple(place(np.asarray(column)) for column in data.X)
    firsts = [column[:, :1] if effects.starts is None else column[effects.starts] for column in known]
    spread = [first if effects.starts is None else first[np.asarray(effects.level)] for first in firsts]
    constant = tuple(
        i for i, column in enumerate(known) if np.abs(column - spread[i]).max() <= 1e-14 * np.abs(column).max()
    )
    plan = Columns({}, {}, x, z, constant)
    needed = {key for zs, ss in ((0, 1), (0, 2), (1, 2), (2, 2)) for key in plan.keys(zs, ss)}
    if len(needed) > MOST_SUMS:
        return None
    weights = data.weights
    full = 1.0 if weights is None else np.where(weights > 0, 1.0, np.nan)

    def product_of(key: Key, columns: list[np.ndarray], full: Any) -> Array | None:
        product = np.ones_like(columns[0])
        for i in key:
            product = product * columns[i]
        return None if np.nanmax(np.abs(product * full - 1.0)) <= 1e-12 else product

    of_levels = [first.reshape(effects.m, 1) for first in firsts]
    return Columns(
        {key: product_of(key, known, full) for key in sorted(needed)},
        {key: product_of(key, of_levels, 1.0) for key in sorted({(), *(plan.split(key)[0] for key in needed)})},
        x,
        z,
        constant,
    )


@dataclass(frozen=True)
class Model:
    """All that the objective depends on but parameters. A JAX pytree.

    Attributes:
        effects, data: of the rows. family: static. expected: the determinant has the expected curvature.
        columns: of X and Z, where sums by level serve (:mod:`mixjax.engine.level_moments`), else None.
        unit: as of the rows; static. trials: of every row of a binomial family, 0 where they differ or are not known to
            be the same; static.
    """

    effects: CurvedEffects
    data: Data
    family: Family
    expected: bool
    columns: Columns | None = None
    unit: float = 1.0
    trials: float = 0.0

    @property
    def layout(self) -> Layout:
        return self.effects.layout

    @property
    def p(self) -> int:
        return len(self.data.X)

    @property
    def n_psi(self) -> int:
        """Coefficients of the family's parameters: one of each that is one number."""
        own = self.data.psi
        return sum(1 if columns is None else len(columns) for columns in own) if own else self.family.n_psi

    @property
    def n_fixed(self) -> int:
        """Fixed effects, and coefficients of the parameters of the family."""
        return self.p + self.n_psi

    # Functions of a row take the coefficients of psi, ``(s, L)``, and give derivatives by these.

    def psi_by_row(self, psi: Array) -> Sequence[Array]:
        """The family's parameters, each ``(L,)`` or ``(*rows, L)``, of their coefficients."""
        if not self.data.psi:
            found: Sequence[Array] = psi
            return found
        known = [0.0 if part is None else part for part in self.data.psi_offset] or [0.0] * len(self.data.psi)
        return [
            own[0] if Q_j is None else sum((Q * g for Q, g in zip(Q_j, own, strict=True)), part)
            for (Q_j, own), part in zip(self._of_psi(psi), known, strict=True)
        ]

    def _of_psi(self, values: Any) -> list[tuple[Array | None, Any]]:
        """Columns of each of the family's parameters, and its part of ``values``."""
        widths = [1 if columns is None else len(columns) for columns in self.data.psi]
        parts = [values[place] for place in places_of(widths)]
        return list(zip(self.data.psi, parts, strict=True))

    def _spread(self, by_psi: tuple[Any, ...], by_psi_twice: tuple[Any, ...]) -> tuple[Any, Any]:
        """Derivatives by parameters -> by their coefficients: times the columns."""
        columns = [(j, Q) for j, own in enumerate(self.data.psi) for Q in ([None] if own is None else own)]

        def times(part: Any, *own: Array | None) -> Any:
            if isinstance(part, tuple):
                return tuple(times(one, *own) for one in part)
            for Q in own:
                part = part if Q is None else part * Q
            return part

        once = tuple(times(by_psi[j], Q) for j, Q in columns)
        return once, tuple(tuple(times(by_psi_twice[j][i], Q, R) for i, R in columns) for j, Q in columns)

    def density(self, eta: Array, psi: Array) -> Array:
        data = self.data
        found: Array = data.weighted(self.family.density(eta, data.y, data.size, self.psi_by_row(psi)))
        return found

    def derivatives(self, eta: Array, psi: Array) -> Derivatives:
        data = self.data
        found: Derivatives = self.family.derivatives(eta, data.y, data.size, self.psi_by_row(psi))
        if data.psi:
            found = Derivatives(found.by_eta, *self._spread(found.by_psi, found.by_psi_twice))
        weighted: Derivatives = data.weighted(found)
        return weighted

    def kernel(self, eta: Array, psi: Array) -> tuple[Array, Array]:
        """Minus log density but for what eta does not change, and its slope by eta."""
        data = self.data
        found: tuple[Array, Array] = data.weighted(
            self.family.kernel(eta, data.y, data.size, self.psi_by_row(psi))
        )  # fmt: skip
        return found

    def factored(self, eta: Array, psi: Array) -> tuple[Array, Array, Array, float] | None:
        """:meth:`mixjax.families.Family.factored` where rows have no weights and as many trials, and these."""
        data, trials = self.data, 1.0 if self.data.size is None else self.trials
        if data.weights is not None or not trials:
            return None
        found = self.family.factored(eta, data.y, data.size, self.psi_by_row(psi))
        return None if found is None else (*found, trials)

    def expected_curvature(self, eta: Array, psi: Array) -> Expected:
        found: Expected = self.family.expected(eta, self.data.size, self.psi_by_row(psi))
        if self.data.psi:
            found = Expected(found.w, found.by_eta, *self._spread(found.by_psi, found.by_psi_twice))
        weighted: Expected = self.data.weighted(found)
        return weighted

    def predictor(self, fixed: Array, b: Array) -> Array:
        return self.data.predictor(fixed[: self.p], self.effects.rows(b))


jax.tree_util.register_dataclass(
    Model, data_fields=["effects", "data", "columns"], meta_fields=["family", "expected", "unit", "trials"]
)
