"""From the parameters of a random term to the covariance of its effects, and back.

A term with q effects has relative covariance ``D = Lambda Lambda'`` (relative to sigma^2; absolute: ``Sigma = sigma^2
D``). Ways of writing it down:

* ``theta``: the q (q + 1) / 2 entries of the lower triangle of Lambda, column by column, as in lme4, whatever the
  structure of D. What users see, with a non-negative diagonal.
* the coordinates of a :class:`Structure`: what the optimiser moves over. Standard deviations stand there with free
  signs: the criterion is even in them, and a zero variance is an ordinary stationary point.
* the same with logarithms of the standard deviations, of an unstructured covariance log-Cholesky: unconstrained, good
  for priors and samplers; a singular covariance lies at minus infinity.

Structures are in :data:`STRUCTURES`; docs/contributing.md says how to add one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache
from typing import ClassVar, Literal

import numpy as np

from mixjax import decompositions, linalg
from mixjax.machine import Array, namespace, set_at


def rank_tolerance(dtype) -> float:
    """A row of a factor of the covariance that lies in the span of the rows above it up to this part of its length
    counts as dependent: 1e-8 in float64, 1e-4 in float32. The correlation is then 1 to twice as many digits."""
    return 1e-8 if np.finfo(dtype).bits == 64 else 1e-4


# --- theta ----------------------------------------------------------------------------------------------------------


def n_theta(q: int) -> int:
    """Length of theta for one term of q effects."""
    return q * (q + 1) // 2


@cache
def triangle(q: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of every entry of theta: the lower triangle, column by column."""
    # 32-bit: with 64-bit indices JAX's indexing fails outside the float64 scope.
    columns, rows = np.triu_indices(q)
    return rows.astype(np.int32), columns.astype(np.int32)


@cache
def diagonal_positions(q: int) -> np.ndarray:
    """Where in theta the diagonal of Lambda stands."""
    rows, columns = triangle(q)
    return np.flatnonzero(rows == columns).astype(np.int32)


def lambda_of_theta(theta: Array, q: int) -> Array:
    """``Lambda (q, q, ...)``, lower triangular, from ``theta (q (q + 1) / 2, ...)``."""
    return stack_of(Unstructured(q).entries(theta))


def theta_of_lambda(Lambda: Array, q: int) -> Array:
    """``theta (q (q + 1) / 2, ...)`` from a lower-triangular ``Lambda (q, q, ...)``; numpy in, numpy out."""
    rows, columns = triangle(q)
    if isinstance(Lambda, np.ndarray):
        return Lambda[rows, columns]
    xp = namespace(Lambda)
    return xp.stack([Lambda[int(row), int(column)] for row, column in zip(rows, columns, strict=True)])


def theta_of_lambdas(lambdas: list[Array]) -> Array:
    """theta of all terms from the lower-triangular Lambda of each."""
    return namespace(*lambdas).concatenate([theta_of_lambda(Lambda, Lambda.shape[0]) for Lambda in lambdas])


def split_theta(theta: Array, qs: tuple[int, ...]) -> list[Array]:
    """theta of every term, from theta of all; the terms have ``qs`` effects."""
    return _cut(theta, [n_theta(q) for q in qs], f"theta has shape {np.shape(theta)}; terms with {qs} effects need")


def lambdas_of_theta(theta: Array, qs: tuple[int, ...]) -> list[Array]:
    """``Lambda`` of every term, from theta of all."""
    return [lambda_of_theta(part, q) for part, q in zip(split_theta(theta, qs), qs, strict=True)]


def n_effects(k: int) -> int:
    """Number of effects whose theta has k entries."""
    q = int((np.sqrt(8 * k + 1) - 1) / 2)
    if n_theta(q) != k:
        raise ValueError(f"{k} parameters are no lower triangle: 1, 3, 6, 10, ... are")
    return q


def _cut(x: Array, sizes: list[int], wrong: str) -> list[Array]:
    """The pieces of a vector; ``wrong`` begins the message for one of another length."""
    ends = np.cumsum(sizes)
    if np.shape(x)[:1] != (int(ends[-1]),):
        raise ValueError(f"{wrong} ({int(ends[-1])},)")
    return [x[end - size : end] for size, end in zip(sizes, ends, strict=True)]


def stack_of(entries: list[list[Array | None]]) -> Array:
    """A matrix ``(q, q, ...)`` from its entries ``(...)``, None for zero."""
    some = next(entry for row in entries for entry in row if entry is not None)
    xp = namespace(some)
    zero = xp.zeros_like(some)
    flat = xp.stack([zero if entry is None else entry for row in entries for entry in row])
    return flat.reshape(len(entries), len(entries), *flat.shape[1:])


@cache
def pairs_of(q: int) -> tuple[tuple[int, int], ...]:
    """Pairs a <= b of q effects, row by row: the order in which entries of symmetric matrices stand."""
    return tuple((a, b) for a in range(q) for b in range(a, q))


# --- structures ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Structure(ABC):
    """How the covariance D of the q effects of a term depends on k coordinates ``x (k, ...)``. Static, hashable.

    A new structure is a subclass with :attr:`k`, :meth:`entries` and :meth:`near`, and :attr:`scaling` where more than
    a common scale of Z's columns keeps it. Everything else follows where the coordinates are chosen so that

    * every real vector is allowed, and all covariances of the structure, to their bounds, are reached;
    * each coordinate is a standard deviation, such as the root of an eigenvalue of D: D is even in it, so that zero is
      a stationary point, and zero lowers the rank of D;
    * all of them zero is ``D = 0``.

    Coordinates of another kind beside standard deviations need :attr:`deviations`, and reductions of rank that are not
    zeros of single coordinates :attr:`n_reductions`, :meth:`sizes` and :meth:`reduced`, which belong together.
    """

    q: int

    # Z's columns are replaced by others before the fit, of mean square 1: by any with the same span where the structure
    # is kept by that ("any"), by columns on scales of their own ("each"), or on a common one ("common"). Coordinates
    # belong to these columns, theta to the user's.
    scaling: ClassVar[Literal["any", "each", "common"]] = "common"

    @property
    @abstractmethod
    def k(self) -> int:
        """Number of coordinates."""

    @abstractmethod
    def entries(self, x: Array) -> list[list[Array | None]]:
        """A factor of D, any ``Lambda (q, q)`` with ``D = Lambda Lambda'``, by its entries ``(...)``; None for 0.

        Linear in x; otherwise :meth:`jacobian` and :meth:`curvature` must be given as well."""

    @abstractmethod
    def near(self, F: Array) -> Array:
        """Coordinates ``(k, ...)``, standard deviations not negative, of a covariance near ``F F'``: the same where
        that has this structure, positive definite where ``F (q, q, ...)`` has full rank. A start: how near is free.

        Args:
            F: any square root, not only a triangular one; numpy's or JAX's, with trailing axes or without.
        """

    @property
    def deviations(self) -> tuple[int, ...]:
        """Coordinates that are standard deviations."""
        return tuple(range(self.k))

    def factor(self, x: Array) -> Array:
        """``Lambda (q, q, ...)``."""
        return stack_of(self.entries(x))

    def directions(self) -> np.ndarray | None:
        """``(k, q, q)`` symmetric matrices whose linear combinations hold all covariances of the structure, and no
        others near them; None where there are no such. Kenward-Roger degrees of freedom need them."""
        return None

    # --- unconstrained parameters: standard deviations as logarithms

    def logarithms(self, x: Array) -> Array:
        """Coordinates ``(k, ...)`` -> the same with logarithms of the standard deviations; ``-inf`` for zero."""
        at = np.array(self.deviations, np.int32)
        return set_at(x, at, namespace(x).log(x[at]))

    def exponentials(self, x: Array) -> Array:
        """The inverse of :meth:`logarithms`."""
        at = np.array(self.deviations, np.int32)
        return set_at(x, at, namespace(x).exp(x[at]))

    # --- lower ranks: each is tried where it is near, and kept where the criterion does not rise

    @property
    def n_reductions(self) -> int:
        """How many ways there are to lower the rank of D; each is tried after the one before."""
        return len(self.deviations)

    def sizes(self, x: Array) -> Array:
        """``(n_reductions, B)``: what each would set to zero, on the scale of the singular values of a factor."""
        return abs(x[np.array(self.deviations, np.int32)])

    def reduced(self, x: Array, c: Array) -> tuple[Array, Array]:
        """Reduction ``c (B,)`` of ``x (k, B)``, and which of its coordinates stay free: those that are not zero, also
        by reductions made before. Any other c, such as -1, leaves x as it is."""
        which = np.full((self.k, 1), -1)
        which[list(self.deviations), 0] = np.arange(self.n_reductions)
        x = namespace(x, c).where((which >= 0) & (which == c), 0.0, x)
        return x, (x != 0) | (which < 0)

    def has_derivatives(self, Lambda: Array) -> Array:
        """``(...)``: whether there are derivatives where the factor of the user's columns is ``Lambda (q, q, ...)``."""
        return namespace(Lambda).ones(Lambda.shape[2:], bool)

    # --- derivatives of D = (D_ab), a <= b, row by row

    def jacobian(self, x: Array) -> Array:
        """``dD_ab / dx_i (pairs, k, B)``."""
        return 2.0 * _product(_quadratic_forms(self), x)

    def curvature(self, x: Array, g: Array) -> Array:
        """``sum_ab g_ab d2D_ab / dx_i dx_j (k, k, B)`` for ``g (pairs, B)``."""
        return 2.0 * _product(_quadratic_forms(self).transpose(1, 2, 0), g)


@cache
def _quadratic_forms(structure: Structure) -> np.ndarray:
    """``S (pairs, k, k)`` with ``D_ab = x' S_ab x``, of a structure whose factor is linear in x."""
    units = [structure.factor(unit) for unit in np.eye(structure.k)]
    U = np.stack([np.asarray(unit, np.float64) for unit in units])  # (k, q, q)
    D = np.einsum("iac,jbc->abij", U, U)
    return np.stack([0.5 * (D[a, b] + D[a, b].T) for a, b in pairs_of(structure.q)])


def _product(A: np.ndarray, x: Array) -> Array:
    flat = A.astype(x.dtype).reshape(-1, A.shape[-1]).T
    return linalg.over_first(flat, x).reshape(*A.shape[:-1], *x.shape[1:])


@dataclass(frozen=True)
class Unstructured(Structure):
    """Any covariance. The coordinates are theta with free signs: D is even in every column of Lambda."""

    scaling = "any"

    @property
    def k(self) -> int:
        return n_theta(self.q)

    def entries(self, x: Array) -> list[list[Array | None]]:
        entries: list[list[Array | None]] = [[None] * self.q for _ in range(self.q)]
        for i, (row, column) in enumerate(zip(*triangle(self.q), strict=True)):
            entries[row][column] = x[i]
        return entries

    def near(self, F: Array) -> Array:
        return theta_of_lambda(decompositions.lower_factor(F, rank_tolerance(F.dtype)), self.q)

    def directions(self) -> np.ndarray:
        units = np.zeros((self.k, self.q, self.q))
        for j, (a, b) in enumerate(pairs_of(self.q)):
            units[j, a, b] = units[j, b, a] = 1.0
        return units

    @property
    def deviations(self) -> tuple[int, ...]:
        return tuple(map(int, diagonal_positions(self.q)))

    def sizes(self, x: Array) -> Array:
        """The singular values of Lambda, ascending: the rank falls to q - 1, q - 2, ..."""
        return decompositions.orthogonal_columns(self.factor(x))[1][::-1]

    def reduced(self, x: Array, c: Array) -> tuple[Array, Array]:
        q, xp = self.q, namespace(x, c)
        columns, _ = decompositions.orthogonal_columns(self.factor(x))
        kept = xp.where(np.arange(q)[:, None] < q - 1 - c, columns, 0.0)
        theta = theta_of_lambda(decompositions.lower_factor(kept, rank_tolerance(x.dtype)), q)
        theta = xp.where((c >= 0) & (c < q), theta, x)
        nonzero = (self.factor(theta) != 0).any(0)  # (q, B), by column
        return theta, nonzero[triangle(q)[1]]

    def has_derivatives(self, Lambda: Array) -> Array:
        """Not where a zero column of Lambda stands in front of one that is not zero."""
        nonzero = (Lambda != 0).any(0)
        behind = nonzero[::-1].astype(int).cumsum(0)[::-1]
        return ~(~nonzero & (behind > 0)).any(0)


@dataclass(frozen=True)
class Diagonal(Structure):
    """Uncorrelated effects, a standard deviation each: ``x = sd / sigma``."""

    scaling = "each"

    @property
    def k(self) -> int:
        return self.q

    def entries(self, x: Array) -> list[list[Array | None]]:
        return [[x[a] if a == b else None for b in range(self.q)] for a in range(self.q)]

    def near(self, F: Array) -> Array:
        return namespace(F).sqrt((F * F).sum(1))

    def directions(self) -> np.ndarray:
        return np.eye(self.q)[:, :, None] * np.eye(self.q)[:, None]


@dataclass(frozen=True)
class HomogeneousCompoundSymmetry(Structure):
    """One variance v and one correlation rho of all q effects: ``D = v ((1 - rho) I + rho 11')``.

    The coordinates are the square roots of D's two eigenvalues: ``v (1 + (q - 1) rho)``, of the effects' mean, and
    ``v (1 - rho)``, of their differences. So rho = -1 / (q - 1) is a zero of the first, rho = 1 one of the second.
    """

    @property
    def k(self) -> int:
        return 2

    def entries(self, x: Array) -> list[list[Array | None]]:
        between = (x[0] - x[1]) / self.q
        return [[x[1] + between if a == b else between for b in range(self.q)] for a in range(self.q)]

    def near(self, F: Array) -> Array:
        mean = F.mean(0)
        of_mean, of_differences = self.q * (mean**2).sum(0), ((F - mean) ** 2).sum((0, 1)) / (self.q - 1)
        return namespace(F).sqrt(namespace(F).stack([of_mean, of_differences]))

    def directions(self) -> np.ndarray:
        return np.stack([np.eye(self.q), np.ones((self.q, self.q)) - np.eye(self.q)])


STRUCTURES: dict[str, type[Structure]] = {
    "us": Unstructured,
    "diag": Diagonal,
    "homcs": HomogeneousCompoundSymmetry,
}


def structure_of(name: str, q: int) -> Structure:
    """The structure of a name for q effects. Of one effect there is only one.

    Raises:
        ValueError: the name is not known.
    """
    if name not in STRUCTURES:
        known = ", ".join(map(repr, STRUCTURES))
        raise ValueError(f"there is no covariance structure {name!r}; there are {known}")
    return Unstructured(1) if q == 1 else STRUCTURES[name](q)


def cut(x: Array, structures: tuple[Structure, ...]) -> list[Array]:
    """The coordinates of every term, from those of all."""
    sizes = [s.k for s in structures]
    return _cut(x, sizes, f"the coordinates have shape {np.shape(x)}; {structures} need")


def factors_of(x: Array, structures: tuple[Structure, ...]) -> list[Array]:
    """A factor of the covariance of every term, ``(q, q, ...)``, from the coordinates of all."""
    return [s.factor(part) for s, part in zip(structures, cut(x, structures), strict=True)]


def near(factors: list[Array], structures: tuple[Structure, ...]) -> Array:
    """Coordinates of all terms from a factor of the covariance of each; see :meth:`Structure.near`."""
    return namespace(*factors).concatenate([s.near(F) for s, F in zip(structures, factors, strict=True)])
