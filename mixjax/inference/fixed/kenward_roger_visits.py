"""Kenward & Roger (1997, Biometrics 53, 983-997) for repeated measures, of one response or many.

What is needed is that of :mod:`mixjax.inference.fixed.kenward_roger`, here from sums by pattern: with ``V_i`` a block
of Sigma, every derivative of V is one of Sigma. The covariances need not be linear in their parameters; then the
adjusted covariance has second derivatives, ``R_ij``, which depend on what the parameters are. They are variances and
correlations, as in SAS; the *linear* form leaves them out, and does not depend on that choice. Parameters of a linear
structure have no second derivatives, and both forms agree. The covariance of the parameters is from the observed
information, twice the inverse Hessian of the criterion, as in SAS and in R's mmrm (pbkrtest, and so linear mixed
models here, have the expected one).
"""

from __future__ import annotations

import numpy as np

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.covariance import by_natural, pairs_of
from mixjax.engine.visits import Visits
from mixjax.inference.fixed.kenward_roger import Adjusted


def adjust_visits(visits: Visits, x: np.ndarray, linear: bool = False) -> Adjusted:
    """Adjusted covariances at REML estimates ``x (k, B)``, all arrays with B in front and of responses of scale 1.

    Args:
        linear: without second derivatives.
    """
    rows, covariances = visits.rows, visits.covariances(x)
    T, J = rows.n_visits, len(pairs_of(rows.n_visits))
    W, _ = visits.inverses(covariances)
    at = visits.at(covariances)
    C, fall = at.XX_inverse, at.J_XX
    B, p = len(C), rows.p
    _, H, _ = visits.by_coordinates(x, at)
    of_x = 2.0 * inverses(np.ascontiguousarray(np.moveaxis(H, -1, 0)))
    slopes, curvatures, moves = [], [], []
    for s, part in zip(rows.structures, cov.cut(x, rows.structures), strict=True):
        first, second, by_x = by_natural(s, part, linear)
        slopes.append(first)
        curvatures.append(second)
        moves.append(by_x)
    by_parameter, by_x = _diagonal(slopes), _diagonal(moves)
    k = by_parameter.shape[2]
    of_parameters = by_x @ of_x @ by_x.swapaxes(1, 2)
    back = by_parameter.swapaxes(1, 2)
    P = (back @ fall.reshape(B, -1, p * p)).reshape(B, k, p, p)
    CP = C[:, None] @ P
    WP = (of_parameters @ P.reshape(B, k, p * p)).reshape(B, k, p, p)
    U = -(WP @ CP).sum(1)
    # sum_ij W_ij (Q_ij - R_ij / 4): of every pattern one matrix between W and W.
    of_entries = by_parameter @ of_parameters @ back
    middle = np.empty_like(W)
    start = 0
    for i, (own, second) in enumerate(zip(visits.sums.patterns.of_arms, curvatures, strict=True)):
        V = W[:, own]
        middle[:, own] = _between(of_entries[:, i * J : (i + 1) * J, i * J : (i + 1) * J], V, T)
        if second is not None:
            here = slice(start, start + second.shape[2])
            own_W = of_parameters[:, here, here]
            bend = (second.reshape(B, J, -1) @ own_W.reshape(B, -1, 1))[..., 0]
            middle[:, own] -= 0.25 * linalg.symmetric_of(bend, T)[:, None]
        start += slopes[i].shape[2]
    U = U + visits.sums.contract(W @ middle @ W).XX
    R_inv = np.asarray(rows.X_basis.R_inv)

    def own_columns(X: np.ndarray) -> np.ndarray:
        own: np.ndarray = R_inv @ X @ R_inv.T
        return own

    vcov = own_columns(C)
    adjusted = vcov + 2.0 * own_columns(C @ (0.5 * (U + U.swapaxes(1, 2))) @ C)
    return Adjusted(vcov, adjusted, own_columns(CP @ C[:, None]), of_parameters)


def inverses(A: np.ndarray) -> np.ndarray:
    """Of positive definite ``A (B, k, k)``, scaled first; NaN where it is not."""
    d = np.sqrt(np.abs(np.einsum("bii->bi", A)))
    both = d[:, :, None] * d[:, None]
    inverse, _ = linalg.inverse_logdet(np.ascontiguousarray(np.moveaxis(A / both, 0, -1)))
    found: np.ndarray = np.moveaxis(inverse, -1, 0) / both
    return found


def _between(omega: np.ndarray, V: np.ndarray, T: int) -> np.ndarray:
    """``sum_jl omega_jl E_j V E_l (B, C, T, T)`` of the unit symmetric matrices E, with ``omega (B, J, J)``."""
    B = len(omega)
    a, b = np.triu_indices(T)
    # The covariance of the entries themselves, each symmetric pair twice.
    at = np.empty((T, T), int)
    at[a, b] = at[b, a] = np.arange(len(a))
    entries = omega[:, at[:, :, None, None], at[None, None]]  # (B, T, T, T, T): (a, b), (c, d)
    middle = np.ascontiguousarray(entries.transpose(0, 1, 4, 2, 3)).reshape(B, T * T, T * T)
    found: np.ndarray = (V.reshape(B, -1, T * T) @ middle.swapaxes(1, 2)).reshape(B, -1, T, T)
    symmetric: np.ndarray = 0.5 * (found + found.swapaxes(2, 3))
    return symmetric


def _diagonal(parts: list[np.ndarray]) -> np.ndarray:
    """Blocks ``(B, i, j)`` in a larger matrix of zeros."""
    ends = np.cumsum([[0, 0], *(part.shape[1:] for part in parts)], axis=0)
    found = np.zeros((len(parts[0]), *ends[-1]))
    for (i, j), (i2, j2), part in zip(ends[:-1], ends[1:], parts, strict=True):
        found[:, i:i2, j:j2] = part
    return found
