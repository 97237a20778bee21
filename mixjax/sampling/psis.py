"""Pareto-smoothed importance sampling (Vehtari, Simpson, Gelman, Yao & Gabry 2024, J. Mach. Learn. Res. 25, 72)."""

from __future__ import annotations

import math

import numpy as np


def smoothed(log_ratios: np.ndarray, relative_ess: float = 1.0) -> tuple[np.ndarray, float]:
    """Smoothed log weights ``(S,)``, whose exponentials add up to 1, and k-hat, the shape of the Pareto distribution
    that the largest of them follow. Above 0.7 the weights are not to be trusted.

    Args:
        log_ratios: ``(S,)``. relative_ess: effective sample size of the draws by their number.
    """
    S = len(log_ratios)
    logs = log_ratios - log_ratios.max()
    n_tail = math.ceil(min(0.2 * S, 3.0 * math.sqrt(S / relative_ess)))
    khat = math.inf
    if n_tail >= 5:
        order = np.argsort(logs, kind="stable")
        cut = max(float(logs[order[-n_tail - 1]]), math.log(np.finfo(float).tiny))
        tail = order[logs[order] > cut]  # less where weights are tied
        if len(tail) < 5:
            khat = 0.0 if np.ptp(logs) < 1e-10 else khat  # all alike: nothing to smooth
        else:
            khat, scale = generalised_pareto(np.exp(logs[tail]) - math.exp(cut))
            if math.isfinite(khat):
                p = (np.arange(len(tail)) + 0.5) / len(tail)
                logs = logs.copy()
                logs[tail] = np.minimum(np.log(_quantiles(p, khat, scale) + math.exp(cut)), 0.0)
    logs = logs - np.logaddexp.reduce(logs)
    return logs, float(khat)


def _quantiles(p: np.ndarray, k: float, scale: float) -> np.ndarray:
    if abs(k) < 1e-12:
        k = 0.0
    log_left = np.log1p(-p)
    found: np.ndarray = -scale * log_left if k == 0 else scale * np.expm1(-k * log_left) / k
    return found


def generalised_pareto(x: np.ndarray) -> tuple[float, float]:
    """Shape and scale of a generalised Pareto distribution from ascending ``x (n,)`` above 0: the empirical Bayes
    estimate of Zhang & Stephens (2009, Technometrics 51, 316), its shape drawn to 0.5 by ten observations."""
    n = len(x)
    m = 30 + int(math.sqrt(n))
    quartile = x[int(n / 4 + 0.5) - 1]
    b = 1.0 / x[-1] + (1.0 - np.sqrt(m / (np.arange(m) + 0.5))) / (3.0 * quartile)
    k = np.log1p(-b[:, None] * x).mean(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        likelihood = n * (np.log(-b / k) - k - 1.0)
    weights = np.exp(likelihood - likelihood.max())
    weights /= weights.sum()
    kept = weights >= 10.0 * np.finfo(float).eps
    b_mean = float((b[kept] * weights[kept]).sum() / weights[kept].sum())
    shape = float(np.log1p(-b_mean * x).mean())
    scale = -shape / b_mean
    return (n * shape + 10.0 * 0.5) / (n + 10.0), scale
