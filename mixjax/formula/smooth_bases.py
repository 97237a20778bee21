"""Bases of penalised smooths of one variable, written as a straight line beside columns of independent effects.

A smooth is ``f(x) = B(x) beta`` with the penalty ``beta' S beta / lambda``. Constrained to sum to zero over the rows of
the fit, and in the eigenvectors of S, it is a line, which is not penalised, and columns whose effects are independent
with one variance (Wood 2017, Generalized Additive Models, sections 5.3-5.5 and 6.6). Knots, the scale of the penalty
and the constraint are those of mgcv, so that the standard deviation of the effects is too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from mixjax.checks import DataError

# Basis functions, and distinct values that a thin plate regression spline is made of.
MOST_FUNCTIONS, MOST_VALUES = 60, 2000
# Part of the range by which the knots of P-splines begin before the smallest value.
MARGIN = 1e-3


@dataclass(frozen=True)
class Smooth:
    """A smooth that has met the rows of its fit.

    Attributes:
        bs: ``"cr"``, ``"ps"`` or ``"tp"``.
        places: of "cr" ``(k,)`` and of "ps" ``(k + 4,)`` knots, of "tp" the distinct values less their mean.
        weights: what the functions of "cr" and "tp" are made of. shift: that mean.
        line: ``(k,)`` the basis functions' part in the line. bend: ``(k, k - 2)`` in the columns of independent
            effects.
    """

    bs: str
    places: np.ndarray
    weights: np.ndarray
    shift: float
    line: np.ndarray
    bend: np.ndarray

    def functions(self, x: np.ndarray) -> np.ndarray:
        """The k basis functions ``(m, k)``; beyond the fit's values they go on straight."""
        if self.bs == "cr":
            return _natural(x, self.places, self.weights)
        return _b_splines(x, self.places) if self.bs == "ps" else _thin_plate(x - self.shift, self.places, self.weights)


def smooth_of(x: np.ndarray, k: int, bs: str, name: str) -> Smooth:
    """The smooth of ``x (n,)`` with k basis functions.

    Raises:
        DataError: too few distinct values.
    """
    found = np.unique(x)
    if len(found) < max(k, 3):
        raise DataError(
            f"{name}: k = {k} basis functions need as many distinct values, and there are {len(found)}; write "
            f"k = {len(found)} or less, or a linear or categorical effect"
        )
    if bs == "tp" and len(found) > MOST_VALUES:
        raise DataError(
            f"{name}: thin plate regression splines are decomposed in full, up to {MOST_VALUES} distinct values, and "
            f"there are {len(found)}; bs = 'cr' has no such limit, or round the variable"
        )
    return _made(np.ascontiguousarray(x, np.float64).tobytes(), k, bs)


@lru_cache(maxsize=16)  # the line and the rest of one smooth are asked for one after the other
def _made(values: bytes, k: int, bs: str) -> Smooth:
    x = np.frombuffer(values)
    distinct, counts = np.unique(x, return_counts=True)
    shift, weights = 0.0, np.zeros((0, 0))
    if bs == "cr":
        places = np.quantile(distinct, np.linspace(0, 1, k))
        weights, S = _second_derivatives(places)
        B = _natural(distinct, places, weights)
    elif bs == "ps":
        places = _equal_knots(distinct[0], distinct[-1], k)
        B = _b_splines(distinct, places)
        steps = np.diff(np.eye(k), 2, axis=0)
        S = steps.T @ steps
    else:
        shift = float(x.mean())
        places = distinct - shift
        weights, S, B = _thin_plate_basis(places, counts, k)
    S = S * np.abs(B).sum(1).max() ** 2 / np.abs(S).sum(0).max()
    mean = counts @ B / len(x)
    constrained = _complement(mean)  # (k, k - 1)
    sizes, vectors = np.linalg.eigh(constrained.T @ S @ constrained)
    vectors = constrained @ vectors[:, ::-1]
    sizes = sizes[::-1][: k - 2]
    line, bend = vectors[:, -1], vectors[:, :-1] / np.sqrt(sizes)
    slope = np.polyfit(distinct, B @ line, 1)[0]
    bend = bend * np.where(bend[np.abs(bend).argmax(0), np.arange(k - 2)] < 0, -1.0, 1.0)
    return Smooth(bs, places, weights, shift, line * (-1.0 if slope < 0 else 1.0), bend)


def _complement(a: np.ndarray) -> np.ndarray:
    """``(k, k - 1)`` orthonormal columns to which ``a (k,)`` is orthogonal."""
    found: np.ndarray = np.linalg.qr(a[:, None], mode="complete")[0][:, 1:]
    return found


# --- cubic regression splines ----------------------------------------------------------------------------------------


def _second_derivatives(knots: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``F (k, k)``, from values at the knots to second derivatives there; and the integral of their square."""
    k, h = len(knots), np.diff(knots)
    D, at = np.zeros((k - 2, k)), np.arange(k - 2)
    D[at, at], D[at, at + 1], D[at, at + 2] = 1 / h[:-1], -1 / h[:-1] - 1 / h[1:], 1 / h[1:]
    W = np.diag((h[:-1] + h[1:]) / 3) + np.diag(h[1:-1] / 6, 1) + np.diag(h[1:-1] / 6, -1)
    inner = np.linalg.solve(W, D)
    return np.vstack([np.zeros(k), inner, np.zeros(k)]), D.T @ inner


def _natural(x: np.ndarray, knots: np.ndarray, F: np.ndarray) -> np.ndarray:
    """Natural cubic splines by their values at the knots."""
    k, h = len(knots), np.diff(knots)
    j = np.clip(np.searchsorted(knots, x, side="right") - 1, 0, k - 2)
    inside = np.clip(x, knots[0], knots[-1])
    right, left = knots[j + 1] - inside, inside - knots[j]
    step, one = h[j], np.eye(k)
    B: np.ndarray = one[j] * (right / step)[:, None] + one[j + 1] * (left / step)[:, None]
    B += F[j] * ((right**3 / step - step * right) / 6)[:, None]
    B += F[j + 1] * ((left**3 / step - step * left) / 6)[:, None]
    for end, beyond, other in ((0, x < knots[0], 1), (k - 1, x > knots[-1], k - 2)):
        if beyond.any():  # the slope at the end, where the second derivative is zero
            width, sign = abs(knots[other] - knots[end]), 1.0 if end == 0 else -1.0
            slope = sign * ((one[other] - one[end]) / width - F[other] * width / 6)
            B[beyond] += (x[beyond] - knots[end])[:, None] * slope
    return B


# --- P-splines -------------------------------------------------------------------------------------------------------


def _equal_knots(low: float, high: float, k: int) -> np.ndarray:
    """``(k + 4,)`` knots of k cubic B-splines, equally far apart, of which ``k - 2`` span the values."""
    margin = MARGIN * (high - low)
    low, high = low - margin, high + margin
    step = (high - low) / (k - 3)
    return np.linspace(low - 3 * step, high + 3 * step, k + 4)


def _b_splines(x: np.ndarray, knots: np.ndarray) -> np.ndarray:
    from scipy.interpolate import BSpline  # slow to load

    low, high = knots[3], knots[-4]
    splines = BSpline(knots, np.eye(len(knots) - 4), 3)
    B: np.ndarray = splines(np.clip(x, low, high))
    for end, beyond in ((low, x < low), (high, x > high)):
        if beyond.any():
            B[beyond] += (x[beyond] - end)[:, None] * splines(end, 1)
    return B


# --- thin plate regression splines -----------------------------------------------------------------------------------


def _thin_plate_basis(x: np.ndarray, counts: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Wood (2003, J. R. Stat. Soc. B 65): the k - 2 directions of the radial functions that matter most, then 1 and x.

    Returns:
        From radial functions, 1 and x to the basis ``(n + 2, k)``; penalty ``(k, k)``; basis ``(n, k)``. Mean squares
        of its columns over all rows, of which there are ``counts`` of every value, are 1.
    """
    E = _radial(x[:, None] - x)
    if 2 * k >= len(x) or len(x) < 100:
        values, U = np.linalg.eigh(E)
    else:
        from scipy.sparse.linalg import eigsh  # slow to load

        values, U = eigsh(E, k, which="LM", v0=np.ones(len(x)) / np.sqrt(len(x)) + x / np.linalg.norm(x))
    kept = np.argsort(-np.abs(values), kind="stable")[:k]
    order = kept[np.argsort(-values[kept], kind="stable")]
    values, U = values[order], U[:, order]
    Z = _last_reflected(np.vstack([np.ones_like(x), x]) @ U)
    weights = np.zeros((len(x) + 2, k))
    weights[:-2, : k - 2] = U @ Z
    weights[-2:, k - 2 :] = np.eye(2)
    B = _thin_plate(x, x, weights)
    S = np.zeros((k, k))
    S[: k - 2, : k - 2] = Z.T * values @ Z
    size = np.sqrt(counts @ B**2 / counts.sum())
    return weights / size, S / size / size[:, None], B / size


def _radial(r: np.ndarray) -> np.ndarray:
    found: np.ndarray = np.abs(r) ** 3 / 12
    return found


def _thin_plate(x: np.ndarray, places: np.ndarray, weights: np.ndarray) -> np.ndarray:
    B: np.ndarray = _radial(x[:, None] - places) @ weights[:-2] + weights[-2] + x[:, None] * weights[-1]
    return B


def _last_reflected(A: np.ndarray) -> np.ndarray:
    """Orthonormal columns that the rows of ``A (r, k)`` are orthogonal to, by reflections that end at its last columns:
    the scale of the penalty depends on which of all such bases is taken."""
    r, k = A.shape
    A, Q = A.copy(), np.eye(k)
    for i in range(r):
        u = np.zeros(k)
        u[: k - i] = A[i, : k - i]
        u[k - i - 1] += np.copysign(np.linalg.norm(u), u[k - i - 1])
        u /= np.linalg.norm(u)
        A -= 2.0 * np.outer(A @ u, u)
        Q -= 2.0 * np.outer(Q @ u, u)
    found: np.ndarray = Q[:, : k - r]
    return found
