"""Charts of a term's covariance for a search with one of its parameters held."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from mixjax.covariance.theta import LOWEST, triangle


class TermChart(NamedTuple):
    """A factor of a term's relative covariance as a linear function of coordinates: ``F = sum_j z_j M_j``.

    Attributes:
        maps: ``(B or 1, q, q, k)`` M, to the basis of the products. start: ``(B, k)``. free: ``(B, k)``.
        held: the coordinate that is proportional to the standard deviation of the first effect, others aside.
        vanishing: ``(k,)`` coordinates that are zero where that is.
    """

    maps: np.ndarray
    start: np.ndarray
    free: np.ndarray
    held: int
    vanishing: np.ndarray


def diagonal_chart(R: np.ndarray, factor: np.ndarray, first: Sequence[int]) -> TermChart:
    """Of uncorrelated effects: their standard deviations."""
    q = R.shape[-1]
    M = np.zeros((1, q, q, q))
    M[0, np.arange(q), np.arange(q), np.arange(q)] = 1.0
    z = np.maximum(np.sqrt((factor**2).sum(-1)) * np.diagonal(R, axis1=-2, axis2=-1), LOWEST)
    own = first[0] if len(first) else 0
    return TermChart(M, z, np.ones(z.shape, bool), own, np.arange(q) == own)


def triangular_chart(
    R: np.ndarray, factor: np.ndarray, first: Sequence[int], cor: np.ndarray | None = None
) -> TermChart:
    """Of any covariance: the lower triangle of the factor with some effects first.

    Args:
        cor: ``(B,)``, held correlation of the first two; None where it is free.
    """
    q = R.shape[-1]
    effects = [*first, *(effect for effect in range(q) if effect not in first)]
    L = np.swapaxes(np.linalg.qr(np.swapaxes(factor[:, effects], 1, 2), mode="r"), 1, 2)
    diagonal = np.diagonal(L, axis1=1, axis2=2)
    L = L * np.where(diagonal < 0, -1.0, 1.0)[:, None]
    # Nothing may start at zero, which is a stationary point; lengths in the basis are of order one.
    scale = 1.0 / np.sqrt((R**2).sum(-2))[..., effects]
    least = LOWEST * np.maximum(np.sqrt((L**2).sum(2)), scale)
    L[:, np.arange(q), np.arange(q)] = np.maximum(np.abs(diagonal), least)
    rows, columns = triangle(q)
    k = len(rows)
    M, free, z = np.zeros((1, q, q, k)), np.ones((len(factor), k), bool), L[:, rows, columns]
    M[0, rows, columns, np.arange(k)] = 1.0
    if cor is not None:
        at = {(int(r), int(c)): j for j, (r, c) in enumerate(zip(rows, columns, strict=True))}
        M = np.repeat(M, len(factor), 0)
        other = np.sqrt(np.maximum(0.0, 1.0 - cor**2))
        z[:, at[1, 1]] = np.sqrt(L[:, 1, 0] ** 2 + L[:, 1, 1] ** 2)
        M[:, 1, 0, at[1, 1]], M[:, 1, 1, at[1, 1]] = cor, other
        free[:, at[1, 0]] = False
        free &= ~((other == 0.0)[:, None] & (columns == 1) & (rows > 1))
    # The effect stands first: its row has one entry.
    return TermChart(np.einsum("...ab,...bcj->...acj", R[..., effects], M), z, free, 0, columns == 0)
