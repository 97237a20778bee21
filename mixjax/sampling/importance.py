"""Importance sampling from a multivariate t at the mode: no chains, no warm-up, and a diagnosis that says no."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.special import gammaln

from mixjax.products.sums import CrossProducts
from mixjax.sampling.density import look
from mixjax.sampling.mode import Mode
from mixjax.sampling.priors import ModelPriors
from mixjax.sampling.psis import smoothed

# Degrees of freedom of the proposal, proposals in one call of the program, of the round that finds the proposal, and
# for every draw that is wanted.
DF, BATCH, FIRST, PER_DRAW = 5.0, 2048, 4096, 4
# Coordinates up to which it is tried.
MOST_COORDINATES = 12
# k-hat above which weights are not to be trusted; and up to which their variance is finite.
TRUSTED, PREFERRED = 0.7, 0.5


class Weighted(NamedTuple):
    """Draws by importance.

    Attributes:
        z: ``(draws, dim)`` resampled by the weights. khat: Pareto shape of the largest weights.
        ess: ``1 / sum of squared weights`` of the proposals, no more than the number of draws.
    """

    z: np.ndarray
    khat: float
    ess: float


def sample(mode: Mode, stats: CrossProducts, priors: ModelPriors, rng: np.random.Generator, draws: int) -> Weighted:
    """Draw from the posterior; call in the float64 scope. A first round moves and widens the proposal as its weights
    say."""
    z, logs = _proposed(mode.z, mode.root, stats, priors, rng, FIRST)
    weights, _ = smoothed(logs)
    w = np.exp(weights)
    centre = w @ z
    covariance = (w[:, None] * (z - centre)).T @ (z - centre)
    effective = 1.0 / (w @ w)
    share = effective / (effective + 10.0 * len(centre))
    root = np.linalg.cholesky(share * covariance + (1.0 - share) * mode.root @ mode.root.T)
    n = -(-PER_DRAW * draws // BATCH) * BATCH
    z, logs = _proposed(share * centre + (1.0 - share) * mode.z, root, stats, priors, rng, n)
    weights, khat = smoothed(logs)
    w = np.exp(weights)
    # Systematic resampling, in random order.
    places = (rng.random() + np.arange(draws)) / draws
    chosen = np.minimum(np.searchsorted(np.cumsum(w), places * w.sum()), n - 1)
    return Weighted(z[rng.permutation(chosen)], khat, min(float(1.0 / (w @ w)), float(draws)))


def _proposed(
    centre: np.ndarray,
    root: np.ndarray,
    stats: CrossProducts,
    priors: ModelPriors,
    rng: np.random.Generator,
    n: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Points ``(n, dim)`` and the logs of their importance ratios; not finite densities count as zero."""
    dim = len(centre)
    u = rng.standard_normal((n, dim)) / np.sqrt(rng.chisquare(DF, n) / DF)[:, None]
    z = centre + u @ root.T
    values = np.concatenate([np.asarray(look(z[i : i + BATCH], stats, priors).value) for i in range(0, n, BATCH)])
    own = gammaln(0.5 * (DF + dim)) - gammaln(0.5 * DF) - 0.5 * dim * np.log(DF * np.pi)
    own = own - np.log(root.diagonal()).sum() - 0.5 * (DF + dim) * np.log1p((u * u).sum(1) / DF)
    return z, np.where(np.isfinite(values), values - own, -1e300)
