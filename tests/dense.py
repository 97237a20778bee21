"""The marginal likelihood straight from the textbook: N(X beta, V) with V dense. For n <= 200."""

import numpy as np


def covariance(design, Sigmas, sigma):
    """``V = sigma^2 W^{-1} + sum_t Z_t (I x Sigma_t) Z_t'``: rows of one group share ``z_i' Sigma_t z_j``, and
    those of groups with a known covariance their part of it."""
    n = len(design.y)
    weights = np.ones(n) if design.weights is None else np.asarray(design.weights)
    V = np.diag(sigma**2 / weights)
    for term, Sigma in zip(design.terms, Sigmas, strict=True):
        group = np.asarray(term.group)
        alike = group[:, None] == group if term.levels is None else (term.levels @ term.levels.T)[np.ix_(group, group)]
        V += alike * (term.Z @ Sigma @ np.transpose(term.Z))
    return V


def loglik(design, beta, Sigmas, sigma):
    """Log-density of y under N(offset + X beta, V)."""
    V = covariance(design, Sigmas, sigma)
    offset = 0 if design.offset is None else design.offset
    r = design.y - offset - design.X @ beta
    return -0.5 * (len(r) * np.log(2 * np.pi) + np.linalg.slogdet(V)[1] + r @ np.linalg.solve(V, r))


def criterion(design, lambdas, reml):
    """-2 log (restricted) likelihood with beta and sigma profiled out, by generalised least squares."""
    n, p = design.X.shape
    H = covariance(design, [L @ L.T for L in lambdas], 1.0)
    offset = 0 if design.offset is None else design.offset
    y = design.y - offset
    HX = np.linalg.solve(H, design.X)
    XHX = design.X.T @ HX
    beta = np.linalg.solve(XHX, HX.T @ y) if p else np.zeros(0)
    r = y - design.X @ beta
    df = n - p if reml else n
    sigma2 = r @ np.linalg.solve(H, r) / df
    value = np.linalg.slogdet(H)[1] + df * (1 + np.log(2 * np.pi * sigma2))
    return value + (np.linalg.slogdet(XHX)[1] if reml and p else 0.0)
