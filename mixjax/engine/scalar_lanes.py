"""The closed form of many fits by NumPy where nothing but one variance ratio is left of the random effects.

With one effect a level of one factor, its variance ratio D and ``h_i = 1 / (1 + D a_i)``, everything follows from sums
over levels of ``[U_i z_i]'[U_i z_i]`` times ``D h``, ``h^2`` and ``a h^3``: the value, and its first and second
derivatives by D. Of the second one only the residuals ``e_i = z_i - U_i delta`` are needed beside products of U. So do
random intercepts of unbalanced data, and known covariances in their eigenvectors
(:mod:`mixjax.products.known`), ten thousand phenotypes at a time. The general form is
:mod:`mixjax.engine.curvature`, against which this is held in the tests.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mixjax import linalg
from mixjax.engine.moments import LevelSums, Moments
from mixjax.engine.profiled import Profiled
from mixjax.machine import namespace


class ByRatio(NamedTuple):
    """The criterion as a function of D; last axis: lanes.

    Attributes:
        lanes: the profiled likelihood. gradient: ``(1, B)``. Hessian: ``(1, 1, B)``.
    """

    lanes: Profiled
    gradient: np.ndarray
    Hessian: np.ndarray


def serves(moments: Any) -> bool:
    """Whether these are such fits, by NumPy, of one design."""
    if not isinstance(moments, Moments) or moments.dense or not isinstance(moments.sums, LevelSums):
        return False
    U = moments.sums.U
    shared = moments.A.shape[-1] == 1 and moments.A.shape[0] == 1 and np.ndim(U) == 4 and U.shape[-1] == 1
    return bool(shared and namespace(moments.A, moments.yy) is np)


def profiled(D: np.ndarray, moments: Moments, reml: Any) -> Profiled:
    """At ratios ``D (B,)``."""
    return _Levels(D, moments, reml).lanes


def by_ratio(D: np.ndarray, moments: Moments, reml: Any) -> ByRatio:
    """The same with derivatives by D."""
    at = _Levels(D, moments, reml)
    lanes, h2 = at.lanes, at.h * at.h
    g, he = h2 * at.N, h2 * at.e
    eJe, eSe = (he * at.e).sum(0), (g * at.e * at.e).sum(0)
    s = at.df / lanes.rss
    gradient, Hessian = at.N.sum(0) - s * eJe, -(at.N * at.N).sum(0)
    curve = 2.0 * eSe
    if at.p:
        J, S = at.among(h2), at.among(g)
        C = lanes.XX_inverse
        Je = linalg.over_first(at.U, he)
        curve = curve - 2.0 * (Je * linalg.matmul(C, Je[:, None])[:, 0]).sum(0)
        if reml:
            CJ = linalg.matmul(C, J)
            gradient = gradient - np.einsum("iiB->B", CJ)
            Hessian = Hessian + 2.0 * (C * S).sum((0, 1)) - (CJ * linalg.transpose(CJ)).sum((0, 1))
    Hessian = Hessian + s * curve - s / lanes.rss * eJe * eJe
    return ByRatio(lanes, gradient[None], Hessian[None, None])


# Factors of one product: a logarithm takes as long as ten multiplications.
FACTORS = 8


def _sum_of_logs(pivot: np.ndarray) -> np.ndarray:
    """``sum_i log pivot_i``: ``(C, B) -> (B,)``, of numbers that are 1 or more."""
    whole = len(pivot) // FACTORS * FACTORS
    products = pivot[:whole].reshape(FACTORS, whole // FACTORS, pivot.shape[1]).prod(0)
    if not np.isfinite(products).all():  # a lane that went astray
        total: np.ndarray = np.log(pivot).sum(0)
        return total
    total = np.log(products).sum(0) + np.log(pivot[whole:]).sum(0)
    return total


class _Levels:
    """Sums over levels at ratios ``D (B,)``; arrays ``(C, B)`` by level."""

    def __init__(self, D: np.ndarray, moments: Moments, reml: Any):
        assert isinstance(moments.sums, LevelSums)
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
        logdet = _sum_of_logs(pivot)
        yy = moments.yy - (Kz * z).sum(0)
        self.df = moments.n - (p if reml else 0)
        if p:
            XX = moments.UU - self.among(K)
            Xy = moments.Uy - linalg.over_first(self.U, Kz)
            XX_inverse, logdet_XX = linalg.inverse_logdet(XX)
            delta = linalg.matmul(XX_inverse, Xy[:, None])[:, 0]
            rss = yy - (Xy * delta).sum(0)
            self.e = z - linalg.over_first(np.ascontiguousarray(self.U.T), delta)
        else:
            XX_inverse, logdet_XX = np.zeros((0, 0, len(yy))), np.zeros(len(yy))
            delta, rss, self.e = np.zeros((0, len(yy))), yy, z
        criterion = logdet + self.df * (1.0 + np.log(2.0 * np.pi * rss / self.df)) - moments.sum_log_weights
        if reml:
            criterion = criterion + logdet_XX + 2.0 * moments.X_logdet
        self.lanes = Profiled(criterion, delta, XX_inverse, rss, np.sqrt(rss / self.df))

    def among(self, weights: np.ndarray) -> np.ndarray:
        """``sum_i weights_i U_i U_i' (p, p, B)``."""
        upper = linalg.over_first(self._pairs, weights)
        full = np.empty((self.p, self.p, weights.shape[1]))
        full[self._rows, self._columns] = full[self._columns, self._rows] = upper
        return full
