"""What the uncertainty of theta adds to the error of a prediction, and degrees of freedom of its variance.

With ``g1 + g2`` Henderson's variance at the estimates and ``g3 = tr(A B)``, A the asymptotic covariance of the
covariance parameters and B that of the derivatives of the predictor with respect to them, the mean squared error is
``g1 + g2 + g3`` (Kackar & Harville 1984, J. Am. Stat. Assoc. 79, 853), and its estimate ``g1 + g2 + 2 g3``, because
``g1`` at REML estimates is too small by g3 on average (Prasad & Rao 1990, J. Am. Stat. Assoc. 85, 163; Harville &
Jeske 1992, J. Am. Stat. Assoc. 87, 724). Both g3 are free of the parametrisation.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mixjax import covariance as cov
from mixjax.likelihood.statistics import CrossProducts
from mixjax.prediction.blocks import Blocks
from mixjax.prediction.targets import Targets, effect_rows


class SecondOrder(NamedTuple):
    """Of every target, absolute; fits in front.

    Attributes:
        naive: ``(..., m)`` Henderson's variance g1 + g2, with new effects and noise.
        correction: ``(..., m)`` g3; twice of it is added.
        df: ``(..., m)`` of the variance, Satterthwaite's: ``2 v^2 / (g'A g)``.
    """

    naive: np.ndarray
    correction: np.ndarray
    df: np.ndarray

    @property
    def variance(self) -> np.ndarray:
        """``(..., m)`` estimated mean squared error of the prediction."""
        return self.naive + 2.0 * self.correction


def second_order(
    stats: CrossProducts, targets: Targets, x: np.ndarray, sigma: np.ndarray, A: np.ndarray
) -> SecondOrder:
    """The parts of the second-order mean squared error.

    Args:
        stats: cross-products; the response is not looked at. targets: what is predicted.
        x: ``(..., k)`` coordinates of the relative covariances, as in
            :class:`~mixjax.inference.information.Information`. sigma: ``(...)`` residual standard deviations.
        A: ``(..., k + 1, k + 1)`` asymptotic covariance of x and log sigma.

    Raises:
        TooLarge: too many effects depend on each other.
    """
    factors, slopes, D, D_slopes = _covariances(x, stats)
    parts = Blocks(stats, effect_rows(targets, stats)).parts(factors, slopes)
    variance = parts.variance + targets.fresh_variance(D)
    slope = parts.slopes
    for Z, own in zip(targets.fresh(), D_slopes, strict=True):
        if Z is not None:
            slope = slope + np.einsum("ma,...kab,mb->...mk", Z, own, Z)
    scale = np.asarray(sigma)[..., None] ** 2
    # With D held, everything is proportional to sigma^2.
    gradient = np.concatenate([slope, 2.0 * variance[..., None]], axis=-1) * scale[..., None]
    correction = scale * np.einsum("...mkl,...kl->...m", parts.moves, A[..., :-1, :-1])
    with np.errstate(divide="ignore", invalid="ignore"):
        df = 2.0 * (scale * variance) ** 2 / np.einsum("...mk,...kl,...ml->...m", gradient, A, gradient)
    return SecondOrder(scale * variance, correction, df)


def _covariances(x: np.ndarray, stats: CrossProducts):
    """Per grouping factor F and the derivatives of ``F F'``, in the bases; per term D and its own, in its columns."""
    layout = stats.layout
    leading, k = np.shape(x)[:-1], np.shape(x)[-1]
    factors = [np.zeros((*leading, w, w)) for w in layout.widths]
    slopes = [np.zeros((*leading, k, w, w)) for w in layout.widths]
    D, D_slopes, start = [], [], 0
    for place, basis in zip(layout.terms, stats.Z_bases, strict=True):
        structure, q, R_inv = place.structure, place.q, np.asarray(basis.R_inv)
        own = slice(place.start, place.start + q)
        lanes = np.reshape(x, (-1, k)).T[start : start + structure.k]
        F, jacobian = structure.factor(lanes), structure.jacobian(lanes)
        F = np.moveaxis(F, -1, 0).reshape(*leading, q, q)
        moved = np.zeros((*leading, k, q, q))
        for pair, (a, b) in enumerate(cov.pairs_of(q)):
            entry = np.moveaxis(jacobian[pair], -1, 0).reshape(*leading, structure.k)
            moved[..., start : start + structure.k, a, b] = moved[..., start : start + structure.k, b, a] = entry
        factors[place.factor][..., own, own] = F
        slopes[place.factor][..., own, own] = moved
        D.append(R_inv @ F @ np.swapaxes(F, -1, -2) @ R_inv.T)
        D_slopes.append(R_inv @ moved @ R_inv.T)
        start += structure.k
    return factors, slopes, tuple(D), tuple(D_slopes)
