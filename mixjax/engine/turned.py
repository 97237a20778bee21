"""Moments of data whose fixed effects and response were changed together, each lane in its own way.

One direction v of the basis of X moves into the response, and out of the basis: what remains of the likelihood when one
fixed effect is held at a value. What the lanes share they go on sharing.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from mixjax import linalg
from mixjax.design import AnyArray
from mixjax.engine.moments import Moments
from mixjax.machine import Array, namespace


@dataclass(frozen=True)
class TurnedMoments(Moments):
    """Moments with the columns ``[U y]`` changed to ``[U y] T``: Q to ``Q (I - v v')``, y to ``y + s Q v``."""

    v: AnyArray
    s: AnyArray

    def contract(self, weights: Any) -> tuple[Array, Array, Array]:
        return _changed(super().contract(weights), self.v[:, None], self.s)

    def pull_back(self, UU: Array, Uy: Array, yy: Array) -> Any:
        v, s = _padded(self.v, len(Uy)), self.s
        UU, Uy = _projected(UU, v), Uy - v * (v * Uy).sum(0)
        cross = s * Uy[:, None] * v[None]
        UU = UU + cross + linalg.transpose(cross) + s**2 * yy * v[:, None] * v[None]
        return super().pull_back(UU, Uy + s * yy * v, yy)


def turned(moments: Moments, v: Array, s: Array) -> Moments:
    """The moments of every lane with Q replaced by ``Q (I - v v')`` and y by ``y + s Q v``; ``v (p, B)``, ``s (B,)``.

    The place of the direction in the basis is kept by a column that meets nothing, so that shapes stay.
    """
    own = {field.name: getattr(moments, field.name) for field in fields(Moments)}
    UU, Uy, yy = _changed((moments.UU, moments.Uy, moments.yy), v, s)
    full = _padded(v, len(Uy))
    return replace(TurnedMoments(**own, v=v, s=s), UU=UU + full[:, None] * full[None], Uy=Uy, yy=yy)


def _changed(products: tuple[Array, Array, Array], v: Array, s: Array) -> tuple[Array, Array, Array]:
    """``T'[UU Uy; . yy] T`` in its parts."""
    UU, Uy, yy = products
    v = _padded(v, len(Uy))
    step = s * (UU * v[None]).sum(1)
    yy = yy + s * (v * (2.0 * Uy + step)).sum(0)
    Uy = Uy + step
    return _projected(UU, v), Uy - v * (v * Uy).sum(0), yy


def _projected(UU: Array, v: Array) -> Array:
    """``(I - v v') UU (I - v v')`` of a symmetric UU."""
    along = (UU * v[None]).sum(1)
    along = along - 0.5 * v * (v * along).sum(0)
    cross = along[:, None] * v[None]
    return UU - cross - linalg.transpose(cross)


def _padded(v: Array, u: int) -> Array:
    """v with zeros in front, for the dense effects: ``(u, ...)``."""
    if u == len(v):
        return v
    xp = namespace(v)
    return xp.concatenate([xp.zeros((u - len(v), *v.shape[1:]), v.dtype), v])
