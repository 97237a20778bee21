"""The likelihood with beta and sigma profiled out, whoever computes it."""

from __future__ import annotations

from typing import NamedTuple

from mixjax.machine import Array


class Profiled(NamedTuple):
    """At one set of relative covariances, or at that of every lane, in the last axis.

    Attributes:
        criterion: -2 log-likelihood (ML) or the REML criterion, all constants kept, equal to lme4's.
        delta: ``(p,)`` generalised least-squares coefficients of the basis of X, on top of ``stats.beta0``.
        XX_inverse: ``(p, p)`` inverse of the reduced products of the basis of X.
        rss: penalised residual sum of squares.
        sigma: residual standard deviation.
    """

    criterion: Array
    delta: Array
    XX_inverse: Array
    rss: Array
    sigma: Array

    def lane(self, i: int = 0) -> Profiled:
        """One of the lanes."""
        return Profiled(*(a[..., i] for a in self))
