"""Random effects and the rows that they meet, when every row has a weight of its own: sums over rows, and the equations
that the sums make.

Row functions stand in arrays ``(..., *rows, L)``, effects in ``(..., *effects, L)``; L lanes are fits side by side.
What ``rows`` and ``effects`` are is each kind's own: :class:`~mixjax.engine.level_effects.OneFactor` works level by
level, :class:`~mixjax.engine.block_effects.Crossed` eliminates the levels of the first factor and has one dense block
for all others.

With ``D`` the covariance of all effects and ``A = Z'WZ``: ``K = D (I + A D)^{-1}``, ``R = I - A K``, ``N = R A``. There
is no inverse of D, so a singular D is nothing special. A *direction* is a free entry (a, b) of a term's covariance, in
which E moves D: one number at (a, b) and (b, a) of every level.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import numpy as np

from mixjax.covariance import pairs_of, stack_of
from mixjax.machine import Array, namespace
from mixjax.products.sums import Layout


class Traces(NamedTuple):
    """Traces of the second derivative of ``log det(I + A D)``, for T changes of A and the J directions.

    Attributes:
        KK: ``tr(K dA K eA) (T, T, L)``. RR: ``tr(R'E R dA) (T, J, L)``. NN: ``tr(N E N E') (J, J, L)``.
    """

    KK: Array
    RR: Array
    NN: Array


class Effects(Protocol):
    """What the likelihood asks of random effects. A *unit* is what an inner step is judged by: a level where levels do
    not meet, else all effects together."""

    @property
    def layout(self) -> Layout: ...
    @property
    def row_axes(self) -> int: ...
    @property
    def effect_shape(self) -> tuple[int, ...]: ...
    def rows(self, b: Array) -> Array:
        """``z_j'b`` of effects ``(..., *effects, L)``."""

    def effects(self, w: Array) -> Array:
        """``Z'w`` of row functions ``(..., *rows, L)``."""

    def normal(self, w: Array) -> Any:
        """``A = Z' diag(w) Z``."""

    def gain(self, lambdas: list[Array], A: Any) -> Any:
        """What follows from D and A: ``logdet (L,)`` of ``I + A D``, ``solve`` (K times effects), ``times_A``."""

    def times_D(self, lambdas: list[Array], v: Array) -> Array: ...
    def units(self, w: Array) -> Array:
        """Sums of rows ``(*rows, L)`` over each unit: ``(units, L)``."""

    def unit_dots(self, a: Array, b: Array) -> Array:
        """``a'b`` within each unit."""

    def of_units(self, values: Array) -> Array:
        """A number per unit ``(units, L)``, for each of its effects."""


class CurvedEffects(Effects, Protocol):
    """What the closed form of the derivatives asks beside that."""

    def leverages(self, gain: Any) -> Array:
        """``z_j'K z_j`` of every row."""

    def moved(self, v: Array) -> Array:
        """``E v`` of every direction: ``(J, *effects, L)``."""

    def traces_of_N(self, gain: Any) -> Array:
        """``tr(N E) (J, L)``."""

    def traces(self, gain: Any, dW: Array) -> Traces:
        """Of the changes ``dA = Z' diag(dW) Z``, ``dW (T, *rows, L)``."""


def directions_of(layout: Layout) -> list[tuple[int, tuple[int, int]]]:
    """Factor and pair of effects of every direction, term by term."""
    return [(place.factor, (place.start + a, place.start + b)) for place in layout.terms for a, b in pairs_of(place.q)]


def free_entries(D: list[Array]) -> Array:
    """The free entries ``(J, L)`` of covariances ``(q, q, L)``, one per term: what directions change."""
    return namespace(*D).stack([own[a, b] for own in D for a, b in pairs_of(len(own))])


def factor_of(lambdas: list[Array], layout: Layout, f: int) -> Array:
    """Block-diagonal factor ``(q, q, L)`` of the covariance of all terms on one grouping factor."""
    own = [Lambda for Lambda, place in zip(lambdas, layout.terms, strict=True) if place.factor == f]
    if len(own) == 1:
        return own[0]
    q, start = sum(len(Lambda) for Lambda in own), 0
    entries: list[list[Any]] = [[None] * q for _ in range(q)]
    for Lambda in own:
        for a in range(len(Lambda)):
            for b in range(len(Lambda)):
                entries[start + a][start + b] = Lambda[a, b]
        start += len(Lambda)
    return stack_of(entries)


def dots(a: Array, b: Array, axes: int, symmetric: bool = False) -> Array:
    """``sum a_s b_t`` over all axes but the first and the last: ``(S, ..., L), (T, ..., L) -> (S, T, L)``.

    Args:
        axes: how many are summed over. symmetric: s and t may change places.
    """
    xp = namespace(a, b)
    if a.shape[-1] == b.shape[-1] == 1:
        return (a.reshape(len(a), -1) @ b.reshape(len(b), -1).T)[..., None]
    if xp is np:
        over = tuple(range(axes))
        if symmetric:
            found = np.empty((len(a), len(b), a.shape[-1]))
            for s, u in enumerate(a):
                for t in range(s, len(b)):
                    found[s, t] = found[t, s] = (u * b[t]).sum(over)
            return found
        return np.stack([np.stack([(u * v).sum(over) for v in b]) for u in a])
    return (a[:, None] * b[None]).sum(tuple(range(2, 2 + axes)))


def orders_of(a: int, b: int) -> list[tuple[int, int]]:
    """Where the number of a direction (a, b) stands."""
    return [(a, b)] if a == b else [(a, b), (b, a)]
