"""Structures: how the covariance of the effects of a random term depends on parameters.

A term with q effects has relative covariance ``D = Lambda Lambda'`` (relative to sigma^2; absolute: ``Sigma = sigma^2
D``). A :class:`Structure` knows its parameters in three forms:

* the coordinates: what the optimiser moves over. Standard deviations stand there with free signs: the criterion is even
  in them, and a zero variance is an ordinary stationary point.
* the same with logarithms of the standard deviations, of an unstructured covariance log-Cholesky: unconstrained, good
  for priors and samplers; a singular covariance lies at minus infinity.
* the natural parameters: standard deviations and correlations of the user's columns, with names.

Structures are in :data:`mixjax.covariance.names.STRUCTURES`; docs/contributing.md says how to add one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from mixjax import decompositions, linalg
from mixjax.covariance.charts import TermChart, diagonal_chart, triangular_chart
from mixjax.covariance.theta import (
    cut_by_sizes,
    diagonal_positions,
    entries_of_theta,
    lambda_of_theta,
    n_theta,
    pairs_of,
    rank_tolerance,
    stack_of,
    theta_of_lambda,
    triangle,
)
from mixjax.machine import Array, namespace, set_at


class NaturalParameter(NamedTuple):
    """A parameter of a covariance as users know it.

    Attributes:
        kind: ``"sd"``, a standard deviation, ``"cor"``, a correlation, or ``"real"``, a coordinate itself, number i.
            ``"loading"`` of effect i on dimension j, and ``"specific"``, the standard deviation that effect i has by
            itself: coordinates of the user's columns, in their places.
        i, j: of effect i; of effects i and j, i the later one. Of several that are equal, one of them.
        shared: all effects, or all pairs, have it. lag: all pairs that are as far apart as i and j.
        label: the name of a coordinate.
    """

    kind: Literal["sd", "cor", "real", "loading", "specific"]
    i: int
    j: int = -1
    shared: bool = False
    lag: bool = False
    label: str = ""

    def pairs(self, q: int) -> list[tuple[int, int]]:
        """Effects (i, j) of q that have the correlation, i the later one; its own first."""
        own = (self.i, self.j)
        if not self.shared:
            return [own]
        others = [(i, j) for j in range(q) for i in range(j + 1, q) if not self.lag or i - j == self.i - self.j]
        return [own, *(pair for pair in others if pair != own)]

    def name(self, effects: Sequence[str], group: str) -> str:
        """``sd_Days|Subject``, ``cor_Days.Intercept|Subject``; ``sd|Subject`` of a shared one, ``cor_lag1|Subject`` of
        neighbours."""
        if self.kind == "real":
            return f"{self.label}|{group}"
        if self.kind in ("loading", "specific"):
            return f"{self.kind}{self.j + 1 if self.kind == 'loading' else ''}_{effects[self.i]}|{group}"
        if self.lag:
            return f"{self.kind}_lag{self.i - self.j}|{group}"
        of = effects[self.i] if self.kind == "sd" else f"{effects[self.i]}.{effects[self.j]}"
        return f"{self.kind}|{group}" if self.shared else f"{self.kind}_{of}|{group}"


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

    def exactly(self, F: Array) -> Array:
        """Coordinates of the covariance ``F F'`` of this structure, at its bounds where it is up to rounding; NaN where
        they are not found."""
        return self.settled(self.near(F))

    @property
    def deviations(self) -> tuple[int, ...]:
        """Coordinates that are standard deviations."""
        return tuple(range(self.k))

    @property
    def rank(self) -> int:
        """The highest rank that a covariance of the structure has; a fit of less is singular."""
        return self.q

    def wide_start(self, scale: float, like: Array) -> Array:
        """Coordinates ``(k,)`` of the kind of ``like`` at which a search may begin where nothing is known: effects of
        this standard deviation."""
        return self.near(scale * namespace(like).eye(self.q, dtype=like.dtype))

    def factor(self, x: Array) -> Array:
        """``Lambda (q, q, ...)``."""
        return stack_of(self.entries(x))

    def slopes(self, x: Array) -> Array:
        """Derivatives of :meth:`factor` by the coordinates, ``(k, q, q, ...)``."""
        units = np.stack([np.asarray(self.factor(unit)) for unit in np.eye(self.k)])
        return namespace(x).broadcast_to(
            namespace(x).asarray(units.reshape(*units.shape, *(1,) * (x.ndim - 1)), x.dtype),
            (*units.shape, *x.shape[1:]),
        )

    # The effects are ordered, and must be the levels of one factor.
    ordered: ClassVar[bool] = False

    @property
    def apart_from_noise(self) -> bool:
        """Correlations tell the effects' variances from noise even where each is seen once; False where the structure
        has all covariances ``D + c I``, or nearly."""
        return False

    def directions(self) -> np.ndarray | None:
        """``(k, q, q)`` symmetric matrices whose linear combinations hold all covariances of the structure, and no
        others near them; None where there are no such."""
        return None

    # --- natural parameters

    # Effects may be correlated; False where the structure puts all correlations to zero.
    correlated: ClassVar[bool] = True

    @property
    def natural(self) -> tuple[NaturalParameter, ...]:
        """The parameters that a fit reports: as many as :attr:`k` where each is free. By default all standard
        deviations and correlations, column by column of the lower triangle, as in lme4."""
        return tuple(
            NaturalParameter("sd", int(row)) if row == column else NaturalParameter("cor", int(row), int(column))
            for row, column in zip(*triangle(self.q), strict=True)
            if row == column or self.correlated
        )

    def parameter(self, kind: str, i: int, j: int) -> NaturalParameter:
        """That of the natural parameters."""
        return next(own for own in self.natural if (own.kind, own.i, own.j) == (kind, i, j))

    def completed(self, cor: np.ndarray) -> np.ndarray:
        """The correlations ``(q, q)`` of the structure from those, in their places, that are natural parameters."""
        return cor

    def is_told_by(self, entries: np.ndarray) -> bool:
        """Whether these entries ``(pairs,)``, True or False for each a <= b row by row, tell all parameters: whether
        their derivatives have full rank at a covariance like any other."""
        return bool(entries.all()) or _rank_at_some(self, tuple(np.flatnonzero(entries))) == self.k

    # --- one parameter held at a value

    # Whether there are charts for that, and profiles of many data sets at once; whether there are others, one by one.
    has_charts: ClassVar[bool] = False
    has_sections: ClassVar[bool] = True

    def chart(self, R: np.ndarray, factor: np.ndarray, first: Sequence[int], cor: Any = None) -> TermChart:
        """Coordinates for a search with the standard deviation of one effect, or the correlation of two, held.

        Args:
            R: ``(..., q, q)``, to the basis of the products. factor: ``(B, q, q)``, where the search begins, of the
                user's effects. first: the effect, or the two, or none. cor: ``(B,)``, their correlation.
        """
        raise NotImplementedError(f"{self} has no charts")

    # --- a factor given by theta

    # Whether :meth:`entries` is a lower triangle with a diagonal as coordinates, which is theta itself.
    is_lower: ClassVar[bool] = False

    def of_theta(self, theta: Array) -> Array:
        """Coordinates ``(k,)`` of the covariance of this structure with theta ``(q (q + 1) / 2,)``, for the user's own
        columns; exactly zero where they are up to rounding."""
        x = self.near(lambda_of_theta(theta, self.q))
        return x if self.scaling != "common" else self.settled(x)  # effects on scales of their own

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

    def n_zeros(self, made: np.ndarray) -> int:
        """How many variances are zero, or other parameters at their bounds, where the reductions ``made
        (n_reductions,)`` hold: of one alone the likelihood ratio is a mixture of two chi-squares."""
        return int(np.count_nonzero(made))

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

    def is_inside(self, x: Array, least: float) -> Array:
        """``(B,)`` what reductions would set to zero is above ``least``."""
        F = self.factor(x)
        one = namespace(x).eye(self.q, dtype=x.dtype)[..., None]
        return decompositions.is_positive(linalg.matmul(F, linalg.transpose(F)) - least**2 * one)

    def settled(self, x: Array) -> Array:
        """Coordinates ``(k, ...)`` with what is a bound up to rounding exactly there."""
        xp, deviation = namespace(x), np.isin(np.arange(self.k), self.deviations)
        small = abs(x) <= rank_tolerance(x.dtype) * abs(x).max(0)
        return xp.where(deviation.reshape(-1, *(1,) * (x.ndim - 1)) & small, 0.0, x)

    def moving(self, x: Array) -> Array:
        """Coordinates ``(k, ...)`` on which D depends at ``x``; others are nowhere near an estimate."""
        return namespace(x).ones(x.shape, bool)

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
    is_lower = True
    has_charts = True

    @property
    def k(self) -> int:
        return n_theta(self.q)

    def entries(self, x: Array) -> list[list[Array | None]]:
        return entries_of_theta(x, self.q)

    def near(self, F: Array) -> Array:
        return theta_of_lambda(decompositions.lower_factor(F, rank_tolerance(F.dtype)), self.q)

    def of_theta(self, theta: Array) -> Array:
        return theta

    def chart(self, R: np.ndarray, factor: np.ndarray, first: Sequence[int], cor: Any = None) -> TermChart:
        return triangular_chart(R, factor, first, cor)

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
        if self.q == 2 and isinstance(x, np.ndarray):  # a sum and a difference of two lengths
            largest = 0.5 * (np.hypot(x[0] + x[2], x[1]) + np.hypot(x[0] - x[2], x[1]))
            return np.array([np.abs(x[0] * x[2]) / np.where(largest > 0, largest, 1.0), largest])
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
    correlated = False
    is_lower = True
    has_charts = True

    @property
    def k(self) -> int:
        return self.q

    def entries(self, x: Array) -> list[list[Array | None]]:
        return [[x[a] if a == b else None for b in range(self.q)] for a in range(self.q)]

    def near(self, F: Array) -> Array:
        return namespace(F).sqrt((F * F).sum(1))

    def chart(self, R: np.ndarray, factor: np.ndarray, first: Sequence[int], cor: Any = None) -> TermChart:
        return diagonal_chart(R, factor, first)

    def directions(self) -> np.ndarray:
        return np.eye(self.q)[:, :, None] * np.eye(self.q)[:, None]


@dataclass(frozen=True)
class HomogeneousDiagonal(Structure):
    """Uncorrelated effects of one variance: ``x = sd / sigma``."""

    correlated = False

    @property
    def k(self) -> int:
        return 1

    def entries(self, x: Array) -> list[list[Array | None]]:
        return [[x[0] if a == b else None for b in range(self.q)] for a in range(self.q)]

    def near(self, F: Array) -> Array:
        return namespace(F).sqrt((F * F).sum((0, 1)) / self.q)[None]

    @property
    def natural(self) -> tuple[NaturalParameter, ...]:
        return (NaturalParameter("sd", 0, shared=True),)

    def directions(self) -> np.ndarray:
        return np.eye(self.q)[None]


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

    @property
    def natural(self) -> tuple[NaturalParameter, ...]:
        return NaturalParameter("sd", 0, shared=True), NaturalParameter("cor", 1, 0, shared=True)

    def directions(self) -> np.ndarray:
        return np.stack([np.eye(self.q), np.ones((self.q, self.q)) - np.eye(self.q)])


def cut(x: Array, structures: tuple[Structure, ...]) -> list[Array]:
    """The coordinates of every term, from those of all."""
    sizes = [s.k for s in structures]
    return cut_by_sizes(x, sizes, lambda: f"the coordinates have shape {np.shape(x)}; {structures} need")


def factors_of(x: Array, structures: tuple[Structure, ...]) -> list[Array]:
    """A factor of the covariance of every term, ``(q, q, ...)``, from the coordinates of all."""
    return [s.factor(part) for s, part in zip(structures, cut(x, structures), strict=True)]


def near(factors: list[Array], structures: tuple[Structure, ...]) -> Array:
    """Coordinates of all terms from a factor of the covariance of each; see :meth:`Structure.near`."""
    return namespace(*factors).concatenate([s.near(F) for s, F in zip(structures, factors, strict=True)])


def wide_start(scale: float, structures: tuple[Structure, ...], like: Array) -> Array:
    """Of all terms; see :meth:`Structure.wide_start`."""
    return namespace(like).concatenate([s.wide_start(scale, like) for s in structures])


@cache
def _rank_at_some(structure: Structure, entries: tuple[int, ...]) -> int:
    """Rank of the derivatives of some entries of a covariance without zeros."""
    x = structure.exponentials(0.4 * np.random.default_rng(1).standard_normal((structure.k, 1)))
    return int(np.linalg.matrix_rank(np.asarray(structure.jacobian(x))[list(entries), :, 0], rtol=1e-8))
