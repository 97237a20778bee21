"""Importance sampling: independent draws from a mixture that has been fitted to the posterior, weighted. No chains, no
warm-up, and a diagnosis that says no.

The first proposal is a multivariate t at the mode. Where a variance may be zero the posterior is bent, and no
elliptical proposal fits: some rounds replace it by a mixture of t distributions around points that the weights choose
(West 1993, J. R. Stat. Soc. B 55, 409), narrow and wide, beside which the first one stays.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import gammaln

from mixjax.sampling.density import Data, look
from mixjax.sampling.mode import Mode
from mixjax.sampling.model_priors import ModelPriors
from mixjax.sampling.psis import smoothed

# Degrees of freedom of all proposals, proposals in one call of the program, in a round that fits the mixture, and for
# every draw that is wanted.
DF, BATCH, FITTING, PER_DRAW = 5.0, 2048, 4096, 4
ROUNDS, COMPONENTS, NARROW, WIDE, DEFENSIVE = 3, 64, 0.55, 0.35, 0.1
# Coordinates up to which it is tried.
MOST_COORDINATES = 12
# k-hat above which weights are not to be trusted; and up to which their variance is finite.
TRUSTED, PREFERRED = 0.7, 0.5


class Weighted(NamedTuple):
    """Draws by importance.

    Attributes:
        z: ``(draws, dim)`` resampled by the weights. khat: Pareto shape of the largest weights.
        ess: effective sample size: of the weighted proposals ``1 / sum of squared weights``, and of the resampling.
    """

    z: np.ndarray
    khat: float
    ess: float


class Mixture(NamedTuple):
    """Multivariate t distributions around centres ``(J, dim)``, shape ``root (dim, dim)`` and ``weight`` shared."""

    centres: np.ndarray
    root: np.ndarray
    weight: float

    def sample(self, rng: np.random.Generator, n: int) -> np.ndarray:
        """Points ``(n, dim)``."""
        dim = self.centres.shape[1]
        u = rng.standard_normal((n, dim)) / np.sqrt(rng.chisquare(DF, n) / DF)[:, None]
        points: np.ndarray = self.centres[rng.integers(0, len(self.centres), n)] + u @ self.root.T
        return points

    def log_prob(self, z: np.ndarray) -> np.ndarray:
        """``(n,)``, with the weight."""
        J, dim = self.centres.shape
        inverse = np.linalg.inv(self.root).T
        y, c = z @ inverse, self.centres @ inverse
        squares = np.maximum((y * y).sum(1)[:, None] - 2.0 * y @ c.T + (c * c).sum(1), 0.0)
        each = -0.5 * (DF + dim) * np.log1p(squares / DF)
        constant = gammaln(0.5 * (DF + dim)) - gammaln(0.5 * DF) - 0.5 * dim * np.log(DF * np.pi)
        constant = constant - np.log(np.abs(self.root.diagonal())).sum() + np.log(self.weight / J)
        total: np.ndarray = np.logaddexp.reduce(each, axis=1) + constant
        return total


def sample(
    mode: Mode,
    stats: Data,
    priors: ModelPriors,
    rng: np.random.Generator,
    draws: int,
    fitting: int = FITTING,
    rounds: int = ROUNDS,
) -> Weighted:
    """Draw from the posterior; call in the float64 scope.

    Args:
        fitting: proposals in each of the ``rounds`` that fit the mixture.
    """
    proposal = [Mixture(mode.z[None], mode.root, 1.0)]
    dim = len(mode.z)
    for _ in range(rounds):
        z, logs = _proposed(proposal, stats, priors, rng, fitting)
        w = np.exp(smoothed(logs)[0])
        effective = 1.0 / (w @ w)
        centres = _resampled(z, w, COMPONENTS, rng)
        mean = w @ z
        covariance = (w[:, None] * (z - mean)).T @ (z - mean)
        share = effective / (effective + 10.0 * dim)
        shape = share * covariance + (1.0 - share) * mode.root @ mode.root.T
        # Of kernels around so many points.
        width = (4.0 / ((dim + 2.0) * COMPONENTS)) ** (1.0 / (dim + 4.0))
        root = np.linalg.cholesky(shape)
        # Wide ones reach into tails that fall as slowly as an exponential, which logarithms of small variances have.
        proposal = [
            Mixture(centres, width * root, NARROW),
            Mixture(centres, 1.5 * root, WIDE),
            Mixture(mode.z[None], mode.root, DEFENSIVE),
        ]
    n = -(-PER_DRAW * draws // BATCH) * BATCH
    z, logs = _proposed(proposal, stats, priors, rng, n)
    weights, khat = smoothed(logs)
    w = np.exp(weights)
    return Weighted(_resampled(z, w, draws, rng), khat, float(1.0 / (w @ w + 1.0 / draws)))


def _resampled(z: np.ndarray, w: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """n points by weights that add up to 1: systematically, in random order."""
    chosen = np.minimum(np.searchsorted(np.cumsum(w), (rng.random() + np.arange(n)) / n * w.sum()), len(z) - 1)
    points: np.ndarray = z[rng.permutation(chosen)]
    return points


def _proposed(
    proposal: list[Mixture], stats: Data, priors: ModelPriors, rng: np.random.Generator, n: int
) -> tuple[np.ndarray, np.ndarray]:
    """Points ``(n, dim)`` and the logs of their importance ratios; a density that is not finite counts as zero."""
    counts = [round(part.weight * n) for part in proposal[1:]]
    counts = [n - sum(counts), *counts]
    z = np.concatenate([part.sample(rng, count) for part, count in zip(proposal, counts, strict=True)])
    values = np.concatenate([np.asarray(look(z[i : i + BATCH], stats, priors).value) for i in range(0, n, BATCH)])
    own = np.logaddexp.reduce([part.log_prob(z) for part in proposal], axis=0)
    return z, np.where(np.isfinite(values), values - own, -1e300)
