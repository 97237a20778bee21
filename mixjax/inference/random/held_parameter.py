"""One parameter held at a value: what is left to move, as a chart of the covariances, and the data with an effect held.

Every problem is a lane with its own chart, linear in its coordinates z: ``F = sum_j z_j M_j`` is a factor of a term's
relative covariance. What is held fixes the chart or sigma:

* sigma: it is given.
* the sd of an effect: ``sigma^2 = value^2 / D_ii``, D_ii being the effect's relative variance.
* sd 0: the effect's row of the factor is zero.
* a correlation: with its two effects first, the second row of the lower-triangular factor is
  ``b (rho, sqrt(1 - rho^2))``; sigma is profiled out.
* a fixed effect: its column moves into the response.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mixjax.covariance import diagonal_positions
from mixjax.covariance.custom import Written
from mixjax.design import AnyArray
from mixjax.products.family_rows import FamilyRows
from mixjax.products.sums import CrossProducts


class Held(NamedTuple):
    """A parameter: ``kind`` "sd", "cor", "real" (of a structure of the user's own), "sigma" or "fixed", of a family,
    which is no term, "positive" or "real"; its term; effects i (and j), the coordinate, the column of X, or the number
    among the family's."""

    kind: str
    term: int = -1
    i: int = -1
    j: int = -1


class Start(NamedTuple):
    """Where searches begin. ``factors``: per term ``(B, q, q)``, any factor of the relative covariance of its own
    effects. ``sigma``: ``(B,)``."""

    factors: tuple[np.ndarray, ...]
    sigma: np.ndarray


# A standard deviation ratio below this, in the basis of Z, is where a search for zero has stopped.
ZERO = 1e-6


def value_of(held: Held, stats: CrossProducts | FamilyRows, at: Start, beta: np.ndarray) -> np.ndarray:
    """The parameter's value ``(B,)`` at B estimates: absolute sd, correlation (NaN beside an sd of zero), ..."""
    if held.kind == "sigma":
        return np.array(at.sigma)
    if held.kind == "fixed":
        return beta[:, held.i].copy()
    F, R_inv = at.factors[held.term], np.asarray(stats.Z_bases[held.term].R_inv)
    if held.kind == "real":
        structure = stats.layout.structures[held.term]
        assert isinstance(structure, Written)
        x = structure.near(np.moveaxis(np.asarray(stats.Z_bases[held.term].R) @ F, 0, -1))
        reported = np.asarray(structure.reported(x)[0])[held.i - structure.n_scales]
        return np.where((F != 0).any((1, 2)), reported, np.nan)
    unit = np.sqrt((R_inv**2).sum(-1))
    lengths = np.sqrt((F**2).sum(-1))
    lengths = np.where(lengths > ZERO * unit, lengths, 0.0)
    if held.kind == "sd":
        return at.sigma * lengths[:, held.i]
    product = lengths[:, held.i] * lengths[:, held.j]
    inner = (F[:, held.i] * F[:, held.j]).sum(-1)
    correlations: np.ndarray = np.clip(inner / np.where(product > 0, product, np.nan), -1.0, 1.0)
    return correlations


class Chart(NamedTuple):
    """B problems, lanes last.

    Attributes:
        maps: per term ``(q, q, k_t, B)`` M. alive: ``(k, B)`` which coordinates are free. start: ``(k, B)``.
        positive: ``(k, B)`` which must stay so: those of the two effects whose correlation is held, which would change
            its sign.
        row: per term ``(q, B)``: an sd is held where one is not zero, ``D_ii = |F' row|^2``.
        log_variance: ``(B,)`` ``log sigma^2 + log D_ii`` (without an sd the first alone) where given; NaN: profiled
            out.
        v, s: ``(p, B), (B,)``: the basis Q of X becomes ``Q (I - v v')``, y becomes ``y + s Q v``.
    """

    maps: tuple[AnyArray, ...]
    alive: AnyArray
    positive: AnyArray
    start: AnyArray
    row: tuple[AnyArray, ...]
    log_variance: AnyArray
    v: AnyArray
    s: AnyArray


def charts_of(stats: CrossProducts, held: Held, value: np.ndarray, start: Start) -> Chart:
    """Charts of one parameter held at values ``(B,)``.

    Args:
        stats: of one data set, of B responses of one design, or of B data sets.
    """
    maps, alive, positive, coordinates, rows = [], [], [], [], []
    B, sigma = len(value), start.sigma
    log_variance = np.full(B, np.nan)
    for t, (structure, basis) in enumerate(zip(stats.layout.structures, stats.Z_bases, strict=True)):
        R, R_inv, q = np.asarray(basis.R), np.asarray(basis.R_inv), structure.q
        here, row = held.term == t, np.zeros((B, q))
        is_cor = here and held.kind == "cor"
        first = [held.j, held.i] if is_cor else [held.i] if here and held.kind == "sd" else []
        chart = structure.chart(R, start.factors[t], first, value if is_cor else None)
        M, z, free = chart.maps, chart.start, chart.free
        if here and held.kind == "sd":
            zero = value == 0
            row = np.where(zero[:, None], 0.0, R_inv[..., held.i, :])
            F = (M @ z[:, None, :, None])[..., 0]
            length = np.sqrt(((F * row[..., None]).sum(1) ** 2).sum(1))
            z[:, chart.held] *= np.where(zero, 0.0, value / sigma / np.where(zero, 1.0, length))
            free = free & ~(zero[:, None] & chart.vanishing)
            with np.errstate(divide="ignore"):
                log_variance = np.where(zero, np.nan, 2 * np.log(value))
        maps.append(np.broadcast_to(M, (B, *M.shape[1:])))
        alive.append(free)
        keeps_signs = np.isin(np.arange(z.shape[1]), diagonal_positions(q)[:2]) & is_cor
        positive.append(np.broadcast_to(keeps_signs, z.shape))
        coordinates.append(np.where(free, z, 0.0))
        rows.append(row)
    if held.kind == "sigma":
        log_variance = 2 * np.log(value)
    v, multiple = taken_out(stats, held, value)
    return Chart(
        maps=tuple(_last(M) for M in maps),
        alive=_last(np.concatenate(alive, 1)),
        positive=_last(np.concatenate(positive, 1)),
        start=_last(np.concatenate(coordinates, 1)),
        row=tuple(_last(row) for row in rows),
        log_variance=log_variance,
        v=_last(v),
        s=multiple,
    )


def _last(x: np.ndarray) -> np.ndarray:
    return np.moveaxis(x, 0, -1)


# --- a fixed effect -------------------------------------------------------------------------------------------------


def taken_out(stats: CrossProducts, held: Held, value: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How X's basis Q and y change as ``value`` times a column of X is taken out of y, and the column out of X.

    The other columns of X span ``Q (I - v v')``, v being what is left of the held column after a regression on them;
    its place in the basis is kept by a column that meets nothing, so that shapes stay. For the ML deviance, which does
    not look at the basis of X.

    Returns:
        ``v (B, p)``, and the multiple of ``Q v`` to add to y, ``(B,)``.
    """
    R, beta0 = np.asarray(stats.X_basis.R), np.asarray(stats.beta0)
    B, p = len(value), R.shape[-1]
    if held.kind != "fixed":
        return np.zeros((B, p)), np.zeros(B)
    j = held.i
    v = np.linalg.qr(np.concatenate([np.delete(R, j, -1), R[..., [j]]], axis=-1))[0][..., -1]
    return np.broadcast_to(v, (B, p)), (v * R[..., j]).sum(-1) * (beta0[..., j] - value)
