"""Fitted values and residuals of the rows."""

from __future__ import annotations

from typing import Any

import numpy as np

from mixjax.diagnostics.decorrelation import decorrelated
from mixjax.diagnostics.hat import NOTHING, HatDiagonals, Whitened, parts_of, whiten
from mixjax.diagnostics.leverage import leverage_of
from mixjax.fitted.either import AnyFitted
from mixjax.fitted.record import Fitted, record_of

SCALES = {
    "conditional": ("raw", "pearson", "standardized", "studentized", "normalized"),
    "marginal": ("raw", "pearson", "standardized", "studentized", "cholesky"),
    "random": ("raw", "standardized", "studentized"),
}


def fixed_part(fitted: AnyFitted) -> np.ndarray:
    """``offset + X beta``: the mean over the population, ``(n,)``; of a generalised model on the link's scale."""
    mean = np.asarray(fitted.design.X) @ fitted.estimates.beta
    fixed: np.ndarray = mean if fitted.design.offset is None else mean + fitted.design.offset
    return fixed


def population_mean(fitted: AnyFitted) -> np.ndarray:
    """The same with the curves of smooths, which are random effects in name only, ``(n,)``."""
    mean = fixed_part(fitted)
    for label, term, b in zip(fitted.labels.terms, fitted.design.terms, fitted.estimates.b, strict=True):
        if label.smooth:
            mean = mean + (np.asarray(term.Z) * b[term.group]).sum(axis=1)
    return mean


def random_part(fitted: AnyFitted) -> np.ndarray:
    """``Z b``: what the predicted random effects of a row's own levels add to that, ``(n,)``."""
    total = np.zeros(len(fitted.design.y))
    for term, b in zip(fitted.design.terms, fitted.estimates.b, strict=True):
        total = total + (np.asarray(term.Z) * b[term.group]).sum(axis=1)
    return total


def conditional_mean(fitted: Fitted) -> np.ndarray:
    """``offset + X beta + Z b``: the mean given the random effects of a row's own levels, ``(n,)``."""
    mean: np.ndarray = fixed_part(fitted) + random_part(fitted)
    return mean


def conditional_residuals(fitted: Fitted, scale: str = "raw") -> np.ndarray:
    """``y`` minus the conditional mean, ``(n,)``: see :func:`residuals`."""
    return residuals(fitted, "conditional", scale)


def residuals(fitted: Any, kind: str = "conditional", scale: str = "raw") -> np.ndarray:
    """Residuals of three kinds on five scales.

    Which kind shows what (Hilden-Minton 1995, PhD thesis, UCLA; Nobre & Singer 2007, Biom. J. 49, 863; Singer, Rocha &
    Nobre 2017, Int. Stat. Rev. 85, 290):

    * ``"marginal"``, ``y - offset - X beta``: is the mean linear in X; with ``scale="cholesky"``: is the covariance
      within levels right, and is y normal. Free of predicted random effects, but rows of a level are correlated.
    * ``"conditional"``, ``y - offset - X beta - Z b``: outlying rows, equal variance, normal errors. Confounded with
      the random effects: shrinkage leaves part of ``Z b`` in it, see :func:`mixjax.diagnostics.leverage.confounding`.
    * ``"random"``, ``Z b`` at the rows: outlying levels, and the part of the mean that the levels make. Confounded with
      the errors, the more the fewer rows a level has; level by level, see
      :func:`mixjax.diagnostics.least_squares.level2`.

    What they are divided by; ``sigma^2 / w`` is a row's residual variance, ``V = sigma^2 W^{-1} + Z Sigma Z'``:

    * ``"raw"``: nothing.
    * ``"pearson"``: times ``sqrt(w)``, as lme4's; not of ``"random"``.
    * ``"standardized"``: the standard deviation that the model gives to what the residual predicts: ``sigma / sqrt(w)``
      (HLMdiag's ``.std.resid``, lme4's scaled residuals), ``sqrt(V_ii)`` for ``"marginal"``, ``sqrt(z' Sigma z)`` for
      ``"random"``.
    * ``"studentized"``: the residual's own standard deviation, theta and sigma as known: the root of ``(1 -
      overall leverage) sigma^2 / w``, of the diagonal of ``V - X vcov X'``, of that of ``Z Sigma Z' P Z Sigma Z'``, in
      turn. ``P = V^{-1} - V^{-1} X (X'V^{-1}X)^{-1} X'V^{-1}``. Only these are alike in variance for all rows.
    * ``"normalized"``: ``sigma`` and the factor of the residuals' own covariance, so that correlations within groups
      go too: nlme's, of ``residual=`` and ``dispersion=``; otherwise as "standardized". ``"conditional"`` only.
    * ``"cholesky"``: ``L^{-1} (y - offset - X beta)`` with ``V = L L'``, rows in the order of the table; ``"marginal"``
      only. Uncorrelated, of variance 1, but for beta being estimated. Each is a row less what the rows before it say,
      so that another order gives others.

    Args:
        fitted: fit with rows.
        kind, scale: as above.

    Returns:
        ``(n,)``; NaN where the divisor is zero, as that of a row that the model fits whatever its y is.

    Raises:
        ValueError: no such kind or scale; or Cholesky residuals of too many rows that crossed factors tie together.

    Example:
        >>> import mixjax as mj
        >>> from mixjax.diagnostics.residuals import residuals
        >>> fit = mj.lmm("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> residuals(fit, "conditional", "studentized")[:3].round(3).tolist()
        [-0.183, -0.627, -1.764]
        >>> residuals(fit, "marginal", "cholesky")[:3].round(3).tolist()
        [-0.052, -0.071, -0.632]
    """
    fitted = record_of(fitted)
    if kind not in SCALES:
        raise ValueError(f"kind must be one of {', '.join(map(repr, SCALES))}, got {kind!r}")
    if scale not in SCALES[kind]:
        known = scale in SCALES["marginal"]
        raise ValueError(
            f"scale of kind={kind!r} must be one of {', '.join(map(repr, SCALES[kind]))}, got {scale!r}"
            + (f", which {' and '.join(k for k, s in SCALES.items() if scale in s)} residuals have" if known else "")
        )
    if kind == "random":
        raw = random_part(fitted)
    else:
        y, mean = np.asarray(fitted.design.y), conditional_mean if kind == "conditional" else fixed_part
        raw = y - mean(fitted)
    if scale == "raw":
        return raw
    if scale == "pearson":
        return raw if fitted.design.weights is None else raw * np.sqrt(fitted.design.weights)
    if scale == "normalized":
        whole: np.ndarray = fitted.whitened(raw)
        return whole
    if kind == "conditional" and scale == "standardized" and fitted.given.residual is not None:
        own: np.ndarray = raw * np.sqrt(fitted.design.weights) / float(fitted.estimates.sigma)
        return own
    whitened = whiten(fitted)
    if scale == "cholesky":
        return decorrelated(whitened, raw * whitened.root_w / float(fitted.estimates.sigma))
    parts = parts_of(whitened.Q, whitened.effects) if scale == "studentized" else None
    return scaled(raw, kind, whitened, parts, float(fitted.estimates.sigma))


def scaled(raw: np.ndarray, kind: str, whitened: Whitened, parts: HatDiagonals | None, sigma: float) -> np.ndarray:
    """Raw residuals standardized, or studentized where parts of the rows are given."""
    prior = whitened.random_variance
    whole = {"conditional": np.ones(len(raw)), "marginal": 1 + prior, "random": prior}[kind]
    if parts is None:
        variance = whole
    elif kind == "conditional":
        variance = 1 - leverage_of(whitened, parts).overall
    elif kind == "marginal":
        variance = whole - parts.along(whitened.Q, whitened.Q)
    else:
        variance = parts.predicted(prior)
    known = (variance > NOTHING * whole) & (sigma > 0)
    sd = np.sqrt(np.where(known, variance, 1.0)) * (sigma if sigma > 0 else 1.0) / whitened.root_w
    return np.where(known, raw / sd, np.nan)
