"""How far draws can be trusted: R-hat and effective sample sizes (Vehtari, Gelman, Simpson, Carpenter & Buerkner 2021,
Bayesian Anal. 16, 667), by rank-normalised split chains."""

from __future__ import annotations

import numpy as np
import scipy.fft
import scipy.special


def rhat(x: np.ndarray) -> np.ndarray:
    """Of draws ``(chains, draws, ...)``: the larger one of their ranks and of the ranks of their distances from the
    median."""
    split = _split(x)
    folded = np.abs(split - np.median(split, axis=(0, 1)))
    larger: np.ndarray = np.maximum(_rhat(_normalised(split)), _rhat(_normalised(folded)))
    return larger


def ess_bulk(x: np.ndarray) -> np.ndarray:
    """Effective sample size of the middle of the distribution."""
    return ess(_normalised(_split(x)))


def ess_tail(x: np.ndarray) -> np.ndarray:
    """The smaller one of the 5 % and 95 % quantiles."""
    low, high = np.quantile(x, [0.05, 0.95], axis=(0, 1))
    smaller: np.ndarray = np.minimum(ess(_split((x <= low) * 1.0)), ess(_split((x <= high) * 1.0)))
    return smaller


def ess_mean(x: np.ndarray) -> np.ndarray:
    """Of the mean of the draws as they are."""
    return ess(_split(x))


def ess(x: np.ndarray) -> np.ndarray:
    """Of means of draws ``(chains, draws, ...)``: Geyer's initial monotone sequence over all chains."""
    chains, n = x.shape[:2]
    centred = x - x.mean(axis=1, keepdims=True)
    size = scipy.fft.next_fast_len(2 * n)
    spectrum = scipy.fft.rfft(centred, size, axis=1)
    covariance = scipy.fft.irfft(np.abs(spectrum) ** 2, size, axis=1)[:, :n] / n  # (chains, n, ...)
    within = covariance[:, 0].mean(axis=0) * n / (n - 1.0)
    plus = within * (n - 1.0) / n
    if chains > 1:
        plus = plus + x.mean(axis=1).var(axis=0, ddof=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        rho = 1.0 - (within - covariance.mean(axis=0) * n / (n - 1.0)) / plus
    rho[0] = 1.0
    flat = rho.reshape(n, -1)
    found = np.empty(flat.shape[1])
    for i, own in enumerate(flat.T):
        pairs = own[: n // 2 * 2].reshape(-1, 2).sum(axis=1)
        positive = np.flatnonzero(pairs <= 0)
        last = positive[0] if len(positive) else len(pairs)
        kept = np.minimum.accumulate(pairs[:last])
        tau = -1.0 + 2.0 * kept.sum()
        if last < len(pairs):
            tau += max(0.0, own[2 * last])
        total = chains * n
        found[i] = np.nan if not np.isfinite(own).all() else total / max(tau, 1.0 / np.log10(total))
    return found.reshape(x.shape[2:])


def _split(x: np.ndarray) -> np.ndarray:
    """Every chain in two halves."""
    half = x.shape[1] // 2
    return np.concatenate([x[:, :half], x[:, x.shape[1] - half :]], axis=0)


def _normalised(x: np.ndarray) -> np.ndarray:
    """Normal scores of the ranks over all chains; ties share the mean of theirs."""
    chains, n = x.shape[:2]
    flat = x.reshape(chains * n, -1)
    scores = np.empty_like(flat)
    for i, own in enumerate(flat.T):
        _, inverse, counts = np.unique(own, return_inverse=True, return_counts=True)
        ranks = (np.cumsum(counts) - 0.5 * (counts - 1.0))[inverse]
        scores[:, i] = scipy.special.ndtri((ranks - 0.375) / (len(own) + 0.25))
    return scores.reshape(x.shape)


def _rhat(x: np.ndarray) -> np.ndarray:
    n = x.shape[1]
    within = x.var(axis=1, ddof=1).mean(axis=0)
    between = x.mean(axis=1).var(axis=0, ddof=1)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio: np.ndarray = np.sqrt((n - 1.0) / n + between / within)
    return ratio
