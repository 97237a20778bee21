"""Second-order prediction errors: the part of the uncertainty of theta, and degrees of freedom of the variance.

With ``g1 + g2`` Henderson's variance at the estimates and ``g3 = tr(A B)``, A the asymptotic covariance of the
covariance parameters and B that of the derivatives of the predictor with respect to them, the mean squared error is
``g1 + g2 + g3`` (Kackar & Harville 1984, J. Am. Stat. Assoc. 79, 853), and its estimate ``g1 + g2 + 2 g3``, because
``g1`` at REML estimates is too small by g3 on average (Prasad & Rao 1990, J. Am. Stat. Assoc. 85, 163; Harville &
Jeske 1992, J. Am. Stat. Assoc. 87, 724). Both g3 are free of the parametrisation.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mixjax.engine.equations import covariances_with_slopes
from mixjax.prediction.blocks import DependentEffects
from mixjax.prediction.targets import Targets, effect_rows
from mixjax.products.sums import CrossProducts


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
            :class:`~mixjax.fitted.information.Information`. sigma: ``(...)`` residual standard deviations.
        A: ``(..., k + 1, k + 1)`` asymptotic covariance of x and log sigma.

    Raises:
        TooLarge: too many effects depend on each other.
    """
    factors, slopes, D, D_slopes = covariances_with_slopes(x, stats)
    parts = DependentEffects(stats, effect_rows(targets, stats)).parts(factors, slopes)
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
