"""Functions of real numbers that the families need, by NumPy and SciPy or by JAX, with digits where formulas lose them.

What is written out here is made of elementary functions, so that JAX differentiates it to any order; branches are
chosen by ``where`` of arguments that are safe in both, so that no derivative is NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from scipy import special

from mixjax.machine import Array, namespace

HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
# Bernoulli numbers B_2, B_4, ..., B_20.
BERNOULLI = (1 / 6, -1 / 30, 1 / 42, -1 / 30, 5 / 66, -691 / 2730, 7 / 6, -3617 / 510, 43867 / 798, -174611 / 330)
# Stirling's series of ten terms is exact to rounding from here on, with four of its derivatives: the eleventh term of
# the fourth, B_22 23 24 / 2 / 12^22 of it, is 3e-18. Smaller arguments are moved up by as much.
STIRLING = 12
# Numbers from which functions of counts are looked up, and how many of them there are for each entry of the table.
COUNTED, LEAST_SHARE = 4096, 8
# log1p(u) - u is summed below this: above, the difference loses no more than three bits.
SMALL = 0.25


def as_floats(eta: Any, *others: Any) -> tuple[Any, ...]:
    """The namespace, then all arguments as arrays of it: integers, truth values and single numbers take eta's type.

    So what is computed of float32 is float32; None stays None.
    """
    xp = namespace(eta, *others)
    eta = xp.asarray(eta)
    if not xp.issubdtype(eta.dtype, xp.floating):
        eta = eta.astype(xp.result_type(float))
    found = [xp, eta]
    for other in others:
        if other is not None:
            other = xp.asarray(other)
            if other.ndim == 0 or not xp.issubdtype(other.dtype, xp.floating):
                other = other.astype(eta.dtype)
        found.append(other)
    return tuple(found)


def of_counts(fun: Callable[..., tuple[Array, ...]], y: Array, *k: Array) -> tuple[Array, ...]:
    """``fun(y, *k)``, arrays each. By NumPy, of many whole y: computed once for every count up to the largest, and
    looked up; the same numbers.

    Args:
        y: ``(..., L)``. k: nothing, or a parameter: one number, or one a lane, ``(L,)``; of others nothing is looked
            up.
    """
    if namespace(y, *k) is not np or np.ndim(y) == 0 or y.size < COUNTED:
        return fun(y, *k)
    lanes = np.size(k[0]) if k else 1
    if k and (lanes not in (1, y.shape[-1]) or any(length != 1 for length in np.shape(k[0])[:-1])):
        return fun(y, *k)
    with np.errstate(invalid="ignore"):
        index = y.astype(np.intp)
    counts = int(index.max()) + 1
    if not 0 < counts * lanes * LEAST_SHARE <= y.size or index.min() < 0 or (index != y).any():
        return fun(y, *k)
    table = fun(np.arange(counts, dtype=y.dtype)[:, None], *(np.reshape(one, (1, lanes)) for one in k))
    if lanes > 1:
        index = index * lanes + np.arange(lanes)
    return tuple(np.take(part.reshape(-1), index) for part in table)


def log_factorial(y: Array) -> Array:
    """``log Gamma(y + 1)``, of many whole y by NumPy looked up."""
    return of_counts(lambda y: (gammaln(y + 1),), y)[0]


def gammaln(x: Array) -> Array:
    """``log |Gamma(x)|``."""
    return special.gammaln(x) if namespace(x) is np else jax.scipy.special.gammaln(x)


def expit(x: Array) -> Array:
    """``1 / (1 + exp(-x))``."""
    return special.expit(x) if namespace(x) is np else jax.nn.sigmoid(x)


def ndtr(x: Array) -> Array:
    """The standard normal distribution function."""
    return special.ndtr(x) if namespace(x) is np else jax.scipy.special.ndtr(x)


def ndtri(p: Array) -> Array:
    """Standard normal quantiles."""
    return special.ndtri(p) if namespace(p) is np else jax.scipy.special.ndtri(p)


def erfc(x: Array) -> Array:
    """``1 - erf(x)``."""
    return special.erfc(x) if namespace(x) is np else jax.scipy.special.erfc(x)


def xlogy(x: Array, y: Array) -> Array:
    """``x log y``, 0 where x is 0."""
    return special.xlogy(x, y) if namespace(x, y) is np else jax.scipy.special.xlogy(x, y)


def bounded_exp(x: Array) -> Array:
    """``exp(x)``, the largest number below infinity where that would overflow: 0 times it is 0."""
    xp = namespace(x)
    most = float(np.log(np.finfo(x.dtype).max)) - 1.0
    return xp.exp(xp.minimum(x, most))


def log1p_minus(u: Array) -> Array:
    """``log(1 + u) - u`` for u >= 0, with relative digits: about ``-u^2 / 2`` near 0.

    With ``r = u / (2 + u)``, ``log(1 + u) = 2 atanh(r)`` and ``u - 2 r = u r``.
    """
    return _by_size(u, SMALL, _log1p_minus_near, lambda far: namespace(far).log1p(far) - far)


def _log1p_minus_near(u: Array) -> Array:
    r = u / (2 + u)
    square, total = r * r, 0.0
    for odd in range(21, 2, -2):
        total = total * square + 1 / odd
    return -u * r + 2 * r * square * total


def _by_size(u: Array, limit: float, near: Callable[[Array], Array], far: Callable[[Array], Array]) -> Array:
    """``near(u)`` below the limit, ``far(u)`` elsewhere; many of NumPy's by what is needed of each alone."""
    xp = namespace(u)
    small = u < limit
    if xp is np and np.size(u) >= COUNTED:
        found: Array = far(u)
        found[small] = near(u[small])
        return found
    return xp.where(small, near(xp.where(small, u, 0.0)), far(xp.where(small, 1.0, u)))


def log1p_minus_share(w: Array) -> Array:
    """``log(1 + w) - w / (1 + w)`` for w >= 0, with relative digits: about ``w^2 / 2`` near 0."""
    return _by_size(
        w, 1.0, lambda near: log1p_minus(near) + near * near / (1 + near),
        lambda far: namespace(far).log1p(far) - far / (1 + far),
    )  # fmt: skip


def entropy(u: Array) -> Array:
    """``(1 + u) log(1 + u) - u`` for u >= 0, with relative digits: about ``u^2 / 2`` near 0."""
    return _by_size(
        u, 1.0, lambda near: (1 + near) * log1p_minus(near) + near * near,
        lambda far: (1 + far) * namespace(far).log1p(far) - far,
    )  # fmt: skip


def _series(x: Array, order: int) -> Array:
    """A derivative of Stirling's series ``sum_k B_2k / (2k (2k - 1)) x^(1 - 2k)``, x >= 12."""
    inverse = 1 / x
    square, total = inverse * inverse, 0.0
    for k in range(len(BERNOULLI), 0, -1):
        factor = BERNOULLI[k - 1] / (2 * k * (2 * k - 1))
        for power in range(order):
            factor *= 1 - 2 * k - power
        total = total * square + factor
    return total * inverse ** (1 + order)


def stirling_error(x: Array, order: int = 0) -> Array:
    """``delta(x)`` in ``log Gamma(x) = (x - 1/2) log x - x + log(2 pi)/2 + delta(x)``, or its first or second
    derivative; with relative digits for large x, where it is ``1 / (12 x)``.

    Args:
        x: above 0. order: 0, 1 or 2.
    """
    xp = namespace(x)
    large = x >= STIRLING
    small = xp.where(large, 1.0, x)
    moved = small + STIRLING
    if order == 0:
        product = small
        for i in range(1, STIRLING):
            product = product * (small + i)
        near = (moved - 0.5) * xp.log(moved) - STIRLING - xp.log(product) - (small - 0.5) * xp.log(small)
    elif order == 1:
        near = xp.log(moved) - 0.5 / moved - xp.log(small) + 0.5 / small - sum(1 / (small + i) for i in range(STIRLING))
    else:
        near = 1 / moved + 0.5 / moved**2 - 1 / small - 0.5 / small**2
        near = near + sum(1 / (small + i) ** 2 for i in range(STIRLING))
    return xp.where(large, 0.0, near) + _series(xp.where(large, x, moved), order)


def log_rising(y: Array, k: Array) -> Array:
    """``log Gamma(y + k) - log Gamma(k) - y log k``, y >= 0, k > 0: for whole y ``sum_{i < y} log(1 + i / k)``.

    By Stirling's formula on both sides, so that it keeps its digits as k grows, where it is ``y (y - 1) / (2 k)``.
    """
    xp = namespace(y, k)
    u = y / k
    return k * entropy(u) - 0.5 * xp.log1p(u) + (stirling_error(y + k) - stirling_error(k))


def log_rising_by_log(y: Array, k: Array) -> tuple[Array, Array]:
    """First and second derivative of :func:`log_rising` by ``log k``."""
    u = y / k
    bent = k * log1p_minus(u)
    first = k * (stirling_error(y + k, 1) - stirling_error(k, 1))
    second = k * k * (stirling_error(y + k, 2) - stirling_error(k, 2))
    by_log = bent + 0.5 * u / (1 + u) + first
    return by_log, bent + k * u * u / (1 + u) - 0.5 * u / (1 + u) ** 2 + first + second


def log1p_of_part(e: Array) -> Array:
    """``log(1 + e)`` for ``0 <= e <= 1``.

    XLA's own takes as long as three exponentials. The series ``2 artanh(s)``, ``s = e / (2 + e) <= 1/3``, is cut where
    its terms are below ``3^-33 / 33 = 5e-18``.
    """
    if namespace(e) is np:
        return np.log1p(e)
    s = e / (2.0 + e)
    square = s * s
    found = 1.0 / 33 + 0.0 * square
    for k in range(15, -1, -1):
        found = found * square + 1.0 / (2 * k + 1)
    return 2.0 * s * found


def factorial_error(x: Array) -> Array:
    """``log Gamma(1 + x) - x log x + x``, x >= 0: 0 at 0, about ``log(2 pi x) / 2`` for large x."""
    xp = namespace(x)
    large = x >= STIRLING
    far, near = xp.where(large, x, STIRLING), xp.where(large, 1.0, x)
    return xp.where(large, 0.5 * xp.log(far) + HALF_LOG_2PI + _series(far, 0), gammaln(1 + near) - _xlogx(near) + near)


def factorial_derivatives(x: Array) -> tuple[tuple[Array, ...], tuple[Array, Array]]:
    """Of ``log Gamma(1 + x)``, x > 0: ``(factorial_error, psi, psi', psi'', psi''')`` at 1 + x, and two derivatives of
    :func:`factorial_error` with the digits that ``log x`` takes from them."""
    xp = namespace(x)
    large = x >= STIRLING
    near = xp.where(large, 1.0, x)
    z = xp.where(large, x, near + STIRLING)
    i = 1 / z
    s = [_series(z, order) for order in range(5)]
    # digamma and three derivatives at 1 + z
    digamma = [
        xp.log(z) + 0.5 * i + s[1],
        i - 0.5 * i**2 + s[2],
        -(i**2) + i**3 + s[3],
        2 * i**3 - 3 * i**4 + s[4],
    ]
    moved = (~large).astype(x.dtype)
    for order, factor in enumerate((-1.0, 1.0, -2.0, 6.0)):
        down = sum(1 / (near + j) ** (order + 1) for j in range(1, STIRLING + 1))
        digamma[order] = digamma[order] + factor * moved * down
    safe = xp.maximum(near, np.finfo(x.dtype).tiny)
    first = xp.where(large, 0.5 * i + s[1], digamma[0] - xp.log(safe))
    second = xp.where(large, -0.5 * i**2 + s[2], digamma[1] - 1 / safe)
    return (factorial_error(x), *digamma), (first, second)


def _xlogx(x: Array) -> Array:
    xp = namespace(x)
    nothing = x <= 0
    return xp.where(nothing, 0.0, x * xp.log(xp.where(nothing, 1.0, x)))
