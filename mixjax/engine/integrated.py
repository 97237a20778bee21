"""The marginal likelihood with fixed effects integrated out too, under flat or normal priors.

With ``y | beta ~ N(X beta, sigma^2 H)`` the exponent is quadratic in beta, and so is that of a normal prior: what is
integrated is a Gaussian. Where the prior is flat it is the restricted likelihood: ``-2`` times its logarithm at the
REML estimates is the REML criterion (Harville 1974, Biometrika 61, 383).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax.numpy as jnp

from mixjax import linalg
from mixjax.engine.criterion import in_bases
from mixjax.engine.elimination import Reduced, arrange, eliminate
from mixjax.machine import Array
from mixjax.products.sums import CrossProducts


class FixedParts(NamedTuple):
    """Fixed effects in two parts: s that are given, r that are integrated out. All are coefficients of X's columns or,
    of an intercept, the mean at the means of the others.

    Attributes:
        given: ``(p, s)`` how far a unit of each given one moves in the basis of X.
        Q: ``(p, r)`` orthonormal basis of what the integrated ones move, ``Q R`` being the moves themselves.
        R_inv: ``(r, r)``. logdet: ``log |det R|``.
        of_beta: ``(s + r, p)`` from beta to all of them, the given ones first.
        mean, precision: ``(r,)`` of their normal priors, independent of each other; precision 0 is a flat one.
    """

    given: Array
    Q: Array
    R_inv: Array
    logdet: Array
    of_beta: Array
    mean: Array
    precision: Array


class Integrated(NamedTuple):
    """The likelihood integrated, and what the integrated fixed effects are given y and all other parameters.

    Attributes:
        loglik: log of the integral of likelihood times prior.
        mean: ``(r,)``. inverse: ``(r, r)`` and turn ``(r, r)``: their covariance is ``sigma^2 turn inverse turn'``.
    """

    loglik: Array
    mean: Array
    inverse: Array
    turn: Array


def integrated(
    factors: list[Array], log_sigma: Array, given: Array, stats: CrossProducts, parts: FixedParts
) -> Integrated:
    """Integrate over the fixed effects that ``parts`` says.

    Args:
        factors: per term ``(q, q)``, any factor of its absolute covariance, of Z's own columns.
        log_sigma: ``()``. given: ``(s,)`` the other fixed effects.
    """
    lambdas = in_bases([F / jnp.exp(log_sigma) for F in factors], stats)
    reduced = eliminate(lambdas, arrange(stats))
    return integrate_fixed(reduced, log_sigma, given, stats.beta0, stats.n, stats.sum_log_weights, parts)


def integrate_fixed(
    reduced: Reduced, log_sigma: Array, given: Array, beta0: Array, n: Array, sum_log_weights: Array, parts: FixedParts
) -> Integrated:
    """As :func:`integrated`, of what is left when random effects are out.

    Args:
        reduced: relative to ``sigma^2``. beta0: ``(p,)`` the least-squares coefficients taken out of y.
    """
    sigma = jnp.exp(log_sigma)
    at = jnp.asarray(parts.of_beta) @ beta0  # least squares
    s = parts.given.shape[1]
    moved = jnp.asarray(parts.given) @ (given - at[:s])
    rest = reduced.yy - 2.0 * moved @ reduced.Xy + moved @ reduced.XX @ moved
    constant = n * (math.log(2.0 * math.pi) + 2.0 * log_sigma) - sum_log_weights
    loglik = -0.5 * (constant + reduced.logdet + rest / sigma**2)
    r = parts.Q.shape[1]
    if not r:
        return Integrated(loglik, jnp.zeros(0), jnp.zeros((0, 0)), jnp.zeros((0, 0)))
    Q, R_inv = jnp.asarray(parts.Q), jnp.asarray(parts.R_inv)
    tau, away = jnp.asarray(parts.precision), jnp.asarray(parts.mean) - at[s:]
    M = Q.T @ reduced.XX @ Q + sigma**2 * (R_inv.T * tau) @ R_inv
    v = Q.T @ (reduced.Xy - reduced.XX @ moved) + sigma**2 * R_inv.T @ (tau * away)
    inverse, logdet = linalg.inverse_logdet(M)
    proper = tau > 0
    of_prior = jnp.where(proper, jnp.log(jnp.where(proper, tau, 1.0) / (2.0 * math.pi)) - tau * away**2, 0.0).sum()
    loglik = loglik + 0.5 * (
        of_prior
        + linalg.quadratic_form(M, v[:, None])[0, 0] / sigma**2
        + r * (math.log(2.0 * math.pi) + 2.0 * log_sigma)
        - logdet
    )
    return Integrated(loglik - parts.logdet, at[s:] + R_inv @ (inverse @ v), inverse, R_inv)
