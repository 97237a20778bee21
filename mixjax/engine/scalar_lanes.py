"""The closed form of many fits where nothing but one variance ratio is left of the random effects.

With one effect a level of one factor, its variance ratio D and ``h_i = 1 / (1 + D a_i)``, everything follows from sums
over levels of ``[U_i z_i]'[U_i z_i]`` times ``D h``, ``h^2`` and ``a h^3``: the value, and its first and second
derivatives by D. Of the second one only the residuals ``e_i = z_i - U_i delta`` are needed beside products of U. So do
random intercepts of unbalanced data, and known covariances in their eigenvectors
(:mod:`mixjax.products.known`), ten thousand phenotypes at a time. The general form is
:mod:`mixjax.engine.curvature`, against which this is held in the tests.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeGuard

import numpy as np

from mixjax import linalg
from mixjax.engine.moments import LevelSums, Moments
from mixjax.engine.profiled import Profiled
from mixjax.machine import Array, as_laid_out, namespace


class ByRatio(NamedTuple):
    """The criterion as a function of D; last axis: lanes.

    Attributes:
        lanes: the profiled likelihood. gradient: ``(1, B)``. Hessian: ``(1, 1, B)``.
    """

    lanes: Profiled
    gradient: Array
    Hessian: Array


def serves(moments: Any) -> TypeGuard[Moments]:
    """Whether these are such fits, of one design."""
    # Of Moments themselves: those of another basis (turned.py) contract their sums in a way of their own.
    if type(moments) is not Moments or moments.dense or not isinstance(moments.sums, LevelSums):
        return False
    U = moments.sums.U
    shared = np.ndim(U) == 4 and U.shape[-1] == 1 and moments.A.shape[-1] == 1
    return bool(shared and moments.A.shape[0] == 1 and U.shape[1] > 0)


def profiled(D: Array, moments: Moments, reml: Any) -> Profiled:
    """At ratios ``D (B,)``."""
    return _Levels(D, moments, reml).lanes


def by_ratio(D: Array, moments: Moments, reml: Any) -> ByRatio:
    """The same with derivatives by D."""
    xp = namespace(D, moments.UU)
    at = _Levels(D, moments, reml)
    lanes, h2 = at.lanes, at.h * at.h
    g, he = h2 * at.N, h2 * at.e
    eJe, eSe = (he * at.e).sum(0), (g * at.e * at.e).sum(0)
    s = at.df / lanes.rss
    gradient, Hessian = at.N.sum(0) - s * eJe, -(at.N * at.N).sum(0)
    J, S, C = at.among(h2), at.among(g), lanes.XX_inverse
    CJ, Je = linalg.matmul(C, J), linalg.over_first(at.U, he)
    curve = 2.0 * eSe - 2.0 * (Je * linalg.matmul(C, Je[:, None])[:, 0]).sum(0)
    second = 2.0 * (C * S).sum((0, 1)) - (CJ * linalg.transpose(CJ)).sum((0, 1))
    gradient = gradient - xp.where(reml, xp.einsum("iiB->B", CJ), 0.0)
    Hessian = Hessian + xp.where(reml, second, 0.0)
    Hessian = Hessian + s * curve - s / lanes.rss * eJe * eJe
    return ByRatio(lanes, gradient[None], Hessian[None, None])


# Factors of one product: a logarithm takes as long as ten multiplications.
FACTORS = 8


def _sum_of_logs(pivot: np.ndarray) -> np.ndarray:
    """``sum_i log pivot_i``: ``(C, B) -> (B,)``, of numbers that are 1 or more."""
    whole = len(pivot) // FACTORS * FACTORS
    products = pivot[:whole].reshape(FACTORS, whole // FACTORS, pivot.shape[1]).prod(0)
    if not np.isfinite(products).all():  # a lane that went astray
        products = pivot[:whole]
    total: np.ndarray = np.log(products).sum(0) + np.log(pivot[whole:]).sum(0)
    return total


class _Levels:
    """Sums over levels at ratios ``D (B,)``; arrays ``(C, B)`` by level."""

    def __init__(self, D: Array, moments: Moments, reml: Any):
        assert isinstance(moments.sums, LevelSums)
        xp = namespace(D, moments.UU)
        a, z = moments.A[0, 0], moments.sums.z[0]
        self.U = moments.sums.U[0, :, :, 0].T  # (C, p)
        self.p = p = self.U.shape[1]
        self._rows, self._columns = np.triu_indices(p)
        self._pairs = self.U[:, self._rows] * self.U[:, self._columns]
        pivot = 1.0 + D * a
        self.h = 1.0 / pivot
        self.N = a * self.h
        K = D * self.h
        Kz = K * z
        logdet = _sum_of_logs(pivot) if xp is np else xp.log(pivot).sum(0)
        yy = moments.yy - (Kz * z).sum(0)
        self.df = moments.n - xp.where(reml, p, 0)
        XX = moments.UU - self.among(K)
        Xy = moments.Uy - linalg.over_first(self.U, Kz)
        XX_inverse, logdet_XX = linalg.inverse_logdet(XX)
        delta = linalg.matmul(XX_inverse, Xy[:, None])[:, 0]
        rss = yy - (Xy * delta).sum(0)
        self.e = z - linalg.over_first(as_laid_out(self.U.T), delta)
        criterion = logdet + self.df * (1.0 + xp.log(2.0 * np.pi * rss / self.df)) - moments.sum_log_weights
        criterion = criterion + xp.where(reml, logdet_XX + 2.0 * moments.X_logdet, 0.0)
        self.lanes = Profiled(criterion, delta, XX_inverse, rss, xp.sqrt(rss / self.df))

    def among(self, weights: Array) -> Array:
        """``sum_i weights_i U_i U_i' (p, p, B)``."""
        upper = linalg.over_first(self._pairs, weights)
        position = np.zeros((self.p, self.p), np.int32)
        position[self._rows, self._columns] = position[self._columns, self._rows] = np.arange(len(self._rows))
        full: Array = upper[position]
        return full
