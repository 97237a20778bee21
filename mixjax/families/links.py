"""Links: from the linear predictor to the mean and back, with derivatives.

Probabilities are never subtracted from 1: links of probabilities give ``a = -log F(eta)`` and ``b = -log(1 - F(eta))``,
each with four derivatives that keep their relative digits as far as numbers reach.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from mixjax.families.special import HALF_LOG_2PI, bounded_exp, erfc, expit, log1p_of_part, ndtr, ndtri
from mixjax.machine import Array, is_nowhere, namespace

Five = tuple[Array, Array, Array, Array, Array]
Four = tuple[Array, Array, Array, Array]

# Beyond this many standard deviations the normal tail is a continued fraction, of so many steps. Held against 4 000
# steps in 60 digits: where they meet, it gives the derivatives of m below to 6e-16, 2e-14, 5e-13 and 7e-12, and
# differences of h and eta to 1e-14, 2e-13, 1e-12 and 1e-11; farther out the one is better, farther in the other.
TAIL = 3.0
STEPS = 40
# exp(exp(eta)) is as good as infinite from here on, also in single precision.
FULL = 80.0
# g + e - 1 of the complementary log-log is summed below e = 1: coefficients B_2n / (2n)!, whose ratio is 1 / (2 pi)^2.
_G = (
    1 / 12, -1 / 720, 1 / 30240, -1 / 1209600, 1 / 47900160, -691 / 1307674368000, 1 / 74724249600,
    -3617 / 10670622842880000, 43867 / 5109094217170944000, -174611 / 802857662698291200000,
)  # fmt: skip


def _xp(eta: Any) -> Any:
    return namespace(eta)


# Name -> the mean of a linear predictor.
LINKS: dict[str, Callable[[Any], Any]] = {
    "identity": lambda eta: eta,
    "log": lambda eta: _xp(eta).exp(eta),
    "sqrt": lambda eta: _xp(eta).square(eta),
    "inverse": lambda eta: 1 / eta,
    "1/mu^2": lambda eta: 1 / _xp(eta).sqrt(eta),
    "logit": expit,
    "probit": ndtr,
    "cloglog": lambda eta: -_xp(eta).expm1(-_xp(eta).exp(eta)),
    "cauchit": lambda eta: _xp(eta).arctan2(_xp(eta).ones_like(eta), -eta) / math.pi,
}


class Ratio(NamedTuple):
    """What exponentials of differences of linear predictors are.

    Attributes:
        column: in a table of contrasts. coefficients: those of a model, in notes. of_means: emmeans, too, turns
            contrasts of means into these.
    """

    column: str
    coefficients: str
    of_means: bool = True


# Links whose differences are logarithms of ratios.
RATIOS = {
    "logit": Ratio("odds_ratio", "odds ratios"),
    "log": Ratio("ratio", "ratios of means"),
    "cloglog": Ratio("hazard_ratio", "hazard ratios", of_means=False),
}
RATIOS_OF_MEANS = {link: ratio.column for link, ratio in RATIOS.items() if ratio.of_means}

# Name -> the linear predictor of a mean.
LINEAR: dict[str, Callable[[Any], Any]] = {
    "identity": lambda mu: mu,
    "log": lambda mu: _xp(mu).log(mu),
    "sqrt": lambda mu: _xp(mu).sqrt(mu),
    "inverse": lambda mu: 1 / mu,
    "1/mu^2": lambda mu: 1 / (mu * mu),
    "logit": lambda mu: _xp(mu).log(mu) - _xp(mu).log1p(-mu),
    "probit": ndtri,
    "cloglog": lambda mu: _xp(mu).log(-_xp(mu).log1p(-mu)),
    "cauchit": lambda mu: _xp(mu).tan(math.pi * (mu - 0.5)),
}


def chained(outer: tuple[Array, ...], inner: Four) -> tuple[Array, ...]:
    """A function with up to four derivatives by tau, and tau's four by eta -> the derivatives by eta (Faa di Bruno).

    Args:
        outer: ``(C, C', ...)``, two to five of them. inner: ``(tau', tau'', tau''', tau'''')``.
    """
    t1, t2, t3, t4 = inner
    found = [outer[0], outer[1] * t1]
    if len(outer) > 2:
        found.append(outer[2] * t1**2 + outer[1] * t2)
    if len(outer) > 3:
        found.append(outer[3] * t1**3 + 3 * outer[2] * t1 * t2 + outer[1] * t3)
    if len(outer) > 4:
        third = 6 * outer[3] * t1**2 * t2 + outer[2] * (3 * t2**2 + 4 * t1 * t3)
        found.append(outer[4] * t1**4 + third + outer[1] * t4)
    return tuple(found)


# --- minus the logarithms of a probability and of its complement ----------------------------------------------------


def minus_logs(link: str, eta: Array) -> tuple[Array, Array]:
    """``-log F(eta)`` and ``-log(1 - F(eta))``; JAX differentiates them to any order."""
    xp = namespace(eta)
    if link == "logit":
        zero = xp.zeros_like(eta)
        return xp.logaddexp(zero, -eta), xp.logaddexp(zero, eta)
    if link == "probit":
        return _minus_log_ndtr(eta), _minus_log_ndtr(-eta)
    if link == "cauchit":
        return _minus_log_cauchy(eta), _minus_log_cauchy(-eta)
    e = bounded_exp(eta)
    small = e < 1e-3
    near, far = xp.where(small, e, 0.0), xp.where(small, 1.0, e)
    series = near * (0.5 - near * (1 / 24 - near * near / 2880)) - eta
    return xp.where(small, series, -xp.log(-xp.expm1(-far))), e


def _minus_log_ndtr(eta: Array) -> Array:
    return _probit(eta)[0][0] if namespace(eta) is np else _normal_log(0, eta)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normal_log(order: int, eta: Array) -> Array:
    """``-log Phi(eta)``, or a derivative of it up to the fourth: each has the next for its derivative, as to
    differentiate the continued fraction step by step takes minutes to compile."""
    return _probit(eta)[0][order]


@_normal_log.defjvp
def _normal_log_slope(order: int, primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (eta,), (change,) = primals, tangents
    if order < 4:
        slope = _normal_log(order + 1, eta)
    else:  # a' satisfies a'' = a'^2 - eta a'
        a1, a2, a3, a4 = (_normal_log(i, eta) for i in range(1, 5))
        slope = 6 * a2 * a3 + 2 * a1 * a4 - 3 * a3 - eta * a4
    return _normal_log(order, eta), slope * change


def _minus_log_cauchy(eta: Array) -> Array:
    xp = namespace(eta)
    left = eta < 0
    below, above = xp.where(left, eta, -1.0), xp.where(left, 1.0, eta)
    one = xp.ones_like(eta)
    return xp.where(left, -xp.log(xp.arctan2(one, -below) / math.pi), -xp.log1p(-xp.arctan2(one, above) / math.pi))


def minus_logs_derivatives(link: str, eta: Array) -> tuple[Five, Five]:
    """Both of :func:`minus_logs` with four derivatives by eta."""
    return {"logit": _logit, "probit": _probit, "cloglog": _cloglog, "cauchit": _cauchit}[link](eta)


def _logit(eta: Array) -> tuple[Five, Five]:
    xp = namespace(eta)
    positive, size = eta >= 0, xp.abs(eta)
    e = xp.exp(-size)
    large = 1 / (1 + e)
    small, rest, zero = e * large, log1p_of_part(e), xp.zeros_like(eta)
    s, f = xp.where(positive, large, small), xp.where(positive, small, large)
    v = large * small
    third, fourth = v * (f - s), v * (1 - 6 * v)
    a = rest + xp.where(positive, zero, size)
    b = rest + xp.where(positive, size, zero)
    return (a, -f, v, third, fourth), (b, s, v, third, fourth)


def logit_failure(eta: Array) -> tuple[Array, Array]:
    """``-log(1 - F(eta))`` of the logistic function and its slope, ``F``."""
    xp = namespace(eta)
    e = xp.exp(-xp.abs(eta))
    large = 1 / (1 + e)
    return log1p_of_part(e) + xp.maximum(eta, 0.0), xp.where(eta >= 0, large, e * large)


def _mills(x: Array) -> Four:
    """``m = phi(x) / Phi(-x) - x`` and three derivatives, x >= 3: Laplace's continued fraction ``1/(x + 2/(x + ...))``
    (Abramowitz & Stegun 26.2.14), differentiated step by step."""
    # where the steps end: m = n / (x + m), as if n went on
    root = namespace(x).sqrt(x * x + 4 * STEPS)
    m, m1, m2, m3 = (root - x) / 2, (x / root - 1) / 2, 2 * STEPS / root**3, -6 * STEPS * x / root**5
    for n in range(STEPS - 1, 0, -1):
        inverse = 1 / (x + m)
        r = 1 + m1
        t = r * inverse
        m, m1, m2, m3 = (
            n * inverse,
            -n * inverse * t,
            n * inverse * (2 * t * t - m2 * inverse),
            n * inverse * (6 * t * (m2 * inverse - t * t) - m3 * inverse),
        )
    return m, m1, m2, m3


def _normal_logs(eta: Array, value: Array, h: Array) -> Five:
    """``-log Phi`` and derivatives by ``h = phi / Phi``, where they do not cancel."""
    m = h + eta
    slope = 1 - h * m  # of m
    q = slope - m * m
    return value, -h, h * m, h * q, h * (-m * q + h * (m * m - slope) - 2 * m * slope)


def _probit(eta: Array) -> tuple[Five, Five]:
    xp = namespace(eta)
    x = xp.abs(eta)
    tail = x > TAIL
    p = 0.5 * erfc(x / math.sqrt(2))
    density = xp.exp(-0.5 * x * x - HALF_LOG_2PI)
    near = _normal_logs(x, -xp.log1p(-p), density / (1 - p))
    inside = xp.where(tail, 1.0, p)
    far = _normal_logs(-x, -xp.log(inside), density / inside)
    if not is_nowhere(tail):
        outside = xp.where(tail, x, TAIL)
        m, m1, m2, m3 = _mills(outside)
        h = outside + m
        beyond = (0.5 * outside * outside + HALF_LOG_2PI + xp.log(h), -h, 1 + m1, -m2, m3)
        far = tuple(xp.where(tail, one, other) for one, other in zip(beyond, far, strict=True))
    left = eta < 0
    # b(eta) = a(-eta): odd derivatives change their signs.
    a = tuple(xp.where(left, one, other) for one, other in zip(far, near, strict=True))
    mirrored = tuple(xp.where(left, one, other) for one, other in zip(near, far, strict=True))
    return a, (mirrored[0], -mirrored[1], mirrored[2], -mirrored[3], mirrored[4])


def _cloglog(eta: Array) -> tuple[Five, Five]:
    xp = namespace(eta)
    e = bounded_exp(eta)
    capped = xp.minimum(e, FULL)
    tiny = capped < 1e-30
    g = xp.where(tiny, 1.0, capped / xp.expm1(xp.where(tiny, 1.0, capped)))
    small = capped < 1
    near = xp.where(small, capped, 0.0)
    square, total = near * near, 0.0
    for coefficient in reversed(_G):
        total = total * square + coefficient
    # k, the derivative of log g
    k = xp.where(small, -near * (0.5 + near * total), 1 - capped - g)
    k1 = -capped - g * k
    k2 = -capped - g * (k * k + k1)
    a = minus_logs("cloglog", eta)[0]
    # beyond the cap all derivatives are 0
    g = xp.where(e > FULL, 0.0, g)
    return (a, -g, -g * k, -g * (k * k + k1), -g * (k**3 + 3 * k * k1 + k2)), (e, e, e, e, e)


def _cauchy_logs(eta: Array) -> Five:
    xp = namespace(eta)
    value = _minus_log_cauchy(eta)
    w = 1 / (1 + eta * eta)
    h = w / xp.arctan2(xp.ones_like(eta), -eta)
    slope = -2 * eta * w  # of log f, its derivatives next
    slope1, slope2 = 2 * w * (1 - 2 * w), -4 * eta * w * w * (1 - 4 * w)
    m = h - slope
    m1 = -h * m - slope1
    m2 = h * m * m - h * m1 - slope2
    q = m1 - m * m
    return value, -h, h * m, h * q, h * (-m * q + m2 - 2 * m * m1)


def _cauchit(eta: Array) -> tuple[Five, Five]:
    a, b = _cauchy_logs(eta), _cauchy_logs(-eta)
    return a, (b[0], -b[1], b[2], -b[3], b[4])


# --- derivatives of the mean ---------------------------------------------------------------------------------------


def mean_derivatives(link: str, eta: Array) -> Four:
    """Four derivatives of the mean by eta."""
    xp = namespace(eta)
    one, zero = xp.ones_like(eta), xp.zeros_like(eta)
    if link == "identity":
        return one, zero, zero, zero
    if link == "log":
        mu = bounded_exp(eta)
        return mu, mu, mu, mu
    if link == "sqrt":
        return 2 * eta, 2 * one, zero, zero
    if link == "inverse":
        m = 1 / xp.where(eta == 0, 1.0, eta)
        return -(m**2), 2 * m**3, -6 * m**4, 24 * m**5
    if link == "logit":
        _, (_, _, v, third, fourth) = _logit(eta)
        return v, third, fourth, third * (1 - 12 * v)
    if link == "probit":
        f = xp.exp(-0.5 * eta * eta - HALF_LOG_2PI)
        return f, -eta * f, (eta * eta - 1) * f, eta * (3 - eta * eta) * f
    if link == "cloglog":
        e = bounded_exp(xp.minimum(eta, math.log(FULL)))
        f, r = xp.where(eta > math.log(FULL), 0.0, e * xp.exp(-e)), 1 - e
        return f, f * r, f * (r * r - e), f * (r**3 - 3 * e * r - e)
    w = 1 / (1 + eta * eta)
    f = w / math.pi
    return f, -2 * eta * w * f, (6 * eta * eta - 2) * w * w * f, 24 * eta * (1 - eta * eta) * w**3 * f
