"""How much of its own fitted value each row makes, and how much of its residual is not its error."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from mixjax.diagnostics.hat import NOTHING, HatDiagonals, Whitened, parts_of, whiten
from mixjax.fitted.either import any_record_of
from mixjax.fitted.record import record_of

# The imaginary step of a derivative: its square is nothing beside 1, so no digits are lost.
STEP = 1e-40


class Leverage(NamedTuple):
    """Diagonals of the hat matrix by row; its parts as HLMdiag defines them.

    Attributes:
        overall: ``(n,)`` in 0 .. 1, ``d fitted_i / d y_i`` given theta: fixed + random.
        fixed: ``(n,)`` through the fixed effects, the diagonal of ``H1 = X (X'V^{-1}X)^{-1} X'V^{-1}``; they add to p.
        random: ``(n,)`` through the random effects, the diagonal of ``Z Sigma Z' V^{-1} (I - H1)``.
        random_unconfounded: ``(n,)`` ``z_i' Sigma z_i`` over the row's residual variance ``sigma^2 / w_i``: what the
            random effects give to a row, whatever X is. It has no upper limit.
    """

    overall: np.ndarray
    fixed: np.ndarray
    random: np.ndarray
    random_unconfounded: np.ndarray


def leverage(fitted: Any) -> Leverage:
    """Leverages of every row, theta taken as known.

    A row of large ``fixed`` leverage lies far out in X, one of large ``random`` leverage far out in Z or in a level of
    few rows. ``overall`` adds up to the effective number of coefficients (Hodges & Sargent 2001, Biometrika 88, 367).
    The parts are those of Demidenko & Stukel (2005, Statist. Med. 24, 893); ``random_unconfounded`` is Nobre & Singer's
    (2011, J. Appl. Statist. 38, 1063), over the residual variance.

    Args:
        fitted: fit with rows. Of a generalised linear mixed model leverages are those of the linear one that it is at
            its modes, with the curvatures of the rows' log densities as weights and residual variance 1: how much of
            its own linear predictor a row's working response makes.

    Returns:
        :class:`Leverage`.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.diagnostics.leverage import leverage
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> leverage(fit).overall[:3].round(4).tolist(), leverage(fit).fixed.sum().round(6).item()
        ([0.2293, 0.1697, 0.1268], 2.0)
    """
    whitened = whiten(any_record_of(fitted))
    return leverage_of(whitened, parts_of(whitened.Q, whitened.effects))


def leverage_of(whitened: Whitened, parts: HatDiagonals) -> Leverage:
    """As :func:`leverage`, of the parts of the rows."""
    fixed = parts.along(whitened.Q, parts.GQ)
    # Q - GQ = pull: written so, nothing cancels where the random effects say little.
    random = parts.taken - parts.along(parts.pull, parts.GQ)
    return Leverage(fixed + random, fixed, random, whitened.random_variance)


def confounding(fitted: Any) -> np.ndarray:
    """How much of each conditional residual is not error: the fraction of confounding, in 0 .. 1.

    A conditional residual is ``sigma^2 W^{-1} P (Z b + e)``, ``P = V^{-1} - V^{-1} X (X'V^{-1}X)^{-1} X'V^{-1}``. The
    fraction is the part of its variance that comes from ``Z b``, that is ``1 - sigma^2 (P W^{-1} P)_ii / P_ii``
    (Hilden-Minton 1995, PhD thesis, UCLA; Nobre & Singer 2007, Biom. J. 49, 863). Near 0 the residual shows the errors.
    Near 1 it shows the random effects and says little of the errors' distribution; residuals by level's own least
    squares (:mod:`mixjax.diagnostics.least_squares`) are then the ones to look at.

    Args:
        fitted: fit with rows.

    Returns:
        ``(n,)``; NaN where the residual is zero whatever y is.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.diagnostics.leverage import confounding
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> confounding(fit)[:3].round(4).tolist()
        [0.0951, 0.0601, 0.0358]
    """
    whitened = whiten(record_of(fitted))
    # With more error variance, sigma^2 (1 + t), P falls by P^2 dt: a derivative along the imaginary axis.
    t = 1j * STEP
    effects = [factor._replace(U=factor.U / np.sqrt(1 + t)) for factor in whitened.effects]
    parts = parts_of(whitened.Q, effects)
    P = (1 - parts.taken - parts.along(parts.GQ, parts.GQ)) / (1 + t)
    shares: np.ndarray = 1 + np.divide(P.imag / STEP, P.real, out=np.full(len(P), np.nan), where=P.real > NOTHING)
    return shares
