"""The ML deviance minimised with one parameter held, for many values of many parameters in one batch of lanes.

Every problem is a lane with its own chart of the covariances, linear in its coordinates z: ``F = sum_j z_j M_j`` is a
factor of a term's relative covariance. What is held fixes the chart or sigma:

* sigma: it is given.
* the sd of an effect: ``sigma^2 = value^2 / D_ii``, D_ii being the effect's relative variance.
* sd 0: the effect's row of the factor is zero.
* a correlation: with its two effects first, the second row of the lower-triangular factor is
  ``b (rho, sqrt(1 - rho^2))``; sigma is profiled out.
* a fixed effect: its column moves into the response.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from mixjax import covariance as cov
from mixjax import linalg
from mixjax.compiling import LANES, jit
from mixjax.covariance import Diagonal, Structure, Unstructured, pairs_of
from mixjax.estimation.start import LOWEST
from mixjax.likelihood.curvature import deviance_at_sigma
from mixjax.likelihood.moments import Moments, has_closed_form, moments_of
from mixjax.likelihood.statistics import CrossProducts
from mixjax.optimise import newton
from mixjax.optimise.results import Result

# Lanes of one call: half as many problems, each from two starts.
WIDTH = 64
# Numbers that the cross-products of all lanes of a call may have together.
MOST_NUMBERS = 2**25


class Held(NamedTuple):
    """A parameter: ``kind`` "sd", "cor", "sigma" or "fixed"; its term; effects i (and j), or the column of X."""

    kind: str
    term: int = -1
    i: int = -1
    j: int = -1


class Chart(NamedTuple):
    """One problem.

    Attributes:
        maps: per term ``(q, q, k_t)`` M. alive: ``(k,)`` which coordinates are free. start: ``(k,)``.
        positive: ``(k,)`` which must stay so: those of the two effects whose correlation is held, which would change
            its sign.
        row: per term ``(q,)``: an sd is held where one is not zero, ``D_ii = |F' row|^2``.
        log_variance: ``log sigma^2 + log D_ii`` (without an sd the first alone) where given; NaN: profiled out.
    """

    maps: tuple[np.ndarray, ...]
    alive: np.ndarray
    positive: np.ndarray
    start: np.ndarray
    row: tuple[np.ndarray, ...]
    log_variance: float


def refusal(stats: CrossProducts) -> str | None:
    """Why a model's deviance cannot be minimised here; None where it can."""
    if not has_closed_form(stats):
        return "more than 3 effects a level of the largest factor, or more than 64 effects of the others"
    if not all(isinstance(s, Unstructured | Diagonal) for s in stats.layout.structures):
        return "a covariance structure other than unstructured or diagonal"
    return None


def minimise(
    stats: CrossProducts, theta: np.ndarray, sigma: float, problems: list[tuple[Held, float]]
) -> tuple[np.ndarray, np.ndarray]:
    """Least deviance for each (parameter, value): ``(n,)``, and whether the search converged.

    Args:
        stats: padded cross-products. theta, sigma: the ML estimates.
    """
    deviances, converged = np.empty(len(problems)), np.empty(len(problems), bool)
    size = sum(np.size(leaf) for leaf in jax.tree.leaves(stats))
    width = int(max(2, min(WIDTH, 2 ** int(np.log2(max(2, MOST_NUMBERS // size))))))
    for first in range(0, len(problems), width // 2):
        part = problems[first : first + width // 2]
        lanes = [(held, value, far) for held, value in part for far in (False, True)]
        lanes += [lanes[-1]] * (width - len(lanes))
        charts = [chart_of(stats, theta, sigma, *lane) for lane in lanes]
        data = [with_fixed(stats, held.i, value) if held.kind == "fixed" else stats for held, value, _ in lanes]
        stacked = jax.tree.map(lambda *leaves: np.stack([np.asarray(leaf) for leaf in leaves]), *data)
        columns = jax.tree.map(lambda *leaves: np.stack(leaves, -1), *charts)
        with jax.enable_x64(True):
            value, result = map(np.asarray, _minimise(stacked, columns))
        value = np.where(result == int(Result.NOT_FINITE), np.inf, value)[: 2 * len(part)].reshape(-1, 2)
        best = value.argmin(1)
        at = slice(first, first + len(part))
        deviances[at] = value.min(1)
        converged[at] = (result[: 2 * len(part)].reshape(-1, 2) == int(Result.CONVERGED))[np.arange(len(part)), best]
    return deviances, converged


# --- charts ----------------------------------------------------------------------------------------------------------


def chart_of(stats: CrossProducts, theta: np.ndarray, sigma: float, held: Held, value: float, far: bool) -> Chart:
    """The chart of one problem, and a start: near the estimates, or far from them with all effects uncorrelated."""
    layout = stats.layout
    lambdas = [np.asarray(part) for part in _lambdas(theta, layout.qs)]
    maps, alive, positive, start, rows = [], [], [], [], []
    log_variance = np.nan
    for t, (structure, basis) in enumerate(zip(layout.structures, stats.Z_bases, strict=True)):
        R, R_inv, q = np.asarray(basis.R), np.asarray(basis.R_inv), structure.q
        own = R_inv if far else lambdas[t]  # far: uncorrelated effects of the basis, as variable as the residuals
        here, row, order, effects = held.term == t, np.zeros(q), list(range(q)), list(range(q))
        if here and held.kind == "cor":
            effects = [held.j, held.i, *(e for e in order if e not in (held.i, held.j))]
        elif here and held.kind == "sd":
            effects = [held.i, *(e for e in order if e != held.i)]
        if isinstance(structure, Diagonal):
            M, z, free = _diagonal(R, own, held.i if here and value == 0 else -1)
        else:
            M, z, free = _triangular(R, own, effects, here, held, value)
        if here and held.kind == "sd" and value > 0:
            row = R_inv[held.i]
            F = M @ z
            now = np.sqrt(((F.T @ row) ** 2).sum())
            if isinstance(structure, Diagonal):
                z[held.i] *= value / sigma / now
            else:
                z[0] *= value / sigma / now  # the effect stands first: its row has one entry
            log_variance = 2 * np.log(value)
        maps.append(M)
        alive.append(free)
        held_signs = here and held.kind == "cor"
        positive.append(np.isin(np.arange(len(z)), cov.diagonal_positions(q)[:2]) & held_signs)
        start.append(z)
        rows.append(row)
    if held.kind == "sigma":
        log_variance = 2 * np.log(value)
    return Chart(
        tuple(maps), np.concatenate(alive), np.concatenate(positive), np.concatenate(start), tuple(rows), log_variance
    )


def _lambdas(theta: np.ndarray, qs: tuple[int, ...]) -> list[np.ndarray]:
    lambdas, at = [], 0
    for q in qs:
        Lambda = np.zeros((q, q))
        k = cov.n_theta(q)
        Lambda[cov.triangle(q)] = theta[at : at + k]
        lambdas.append(Lambda)
        at += k
    return lambdas


def _diagonal(R: np.ndarray, own: np.ndarray, zero: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q = len(R)
    M = np.zeros((q, q, q))
    M[np.arange(q), np.arange(q), np.arange(q)] = 1.0
    z = np.maximum(np.sqrt((own**2).sum(1)) * np.diag(R), LOWEST)
    free = np.arange(q) != zero
    return M, np.where(free, z, 0.0), free


def _triangular(
    R: np.ndarray, own: np.ndarray, effects: list[int], here: bool, held: Held, value: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Chart of an unstructured term: the lower triangle of the factor with its effects in another order."""
    q = len(R)
    L = np.asarray(np.linalg.qr(own[effects].T, mode="r")).T
    L = L * np.where(np.diag(L) < 0, -1.0, 1.0)
    lengths = np.sqrt((L**2).sum(1))
    # Nothing may start at zero, which is a stationary point; lengths in the basis are of order one.
    scale = 1.0 / np.sqrt((R**2).sum(0))[effects]
    np.fill_diagonal(L, np.maximum(np.diag(L), LOWEST * np.maximum(lengths, scale)))
    rows, columns = cov.triangle(q)
    k = len(rows)
    M, free = np.zeros((q, q, k)), np.ones(k, bool)
    M[rows, columns, np.arange(k)] = 1.0
    z = L[rows, columns]
    at = {(int(r), int(c)): j for j, (r, c) in enumerate(zip(rows, columns, strict=True))}
    if here and held.kind == "cor":
        other = np.sqrt(max(0.0, 1.0 - value**2))
        z[at[1, 1]] = np.sqrt(L[1, 0] ** 2 + L[1, 1] ** 2)
        M[1, 0, at[1, 1]], M[1, 1, at[1, 1]] = value, other
        free[at[1, 0]] = False
        if other == 0.0:
            free &= ~((columns == 1) & (rows > 1))
    if here and held.kind == "sd" and value == 0:
        free &= columns != 0
    in_basis = np.einsum("ab,bcj->acj", R[:, effects], M)
    return in_basis, np.where(free, z, 0.0), free


def with_fixed(stats: CrossProducts, j: int, value: float) -> CrossProducts:
    """The cross-products with ``value`` times column j of X taken out of y, and the column out of X.

    Its place is kept by a column that meets nothing and has length 1, so that shapes stay. For the ML deviance, which
    does not look at the basis of X.
    """
    R, p = np.asarray(stats.X_basis.R), len(stats.beta0)
    rest = [c for c in range(p) if c != j]
    full = np.linalg.qr(np.column_stack([R[:, rest], R[:, j]]))[0]
    U, v = full[:, :-1], full[:, -1]
    s = (v @ R[:, j]) * (np.asarray(stats.beta0)[j] - value)
    XX, Xy = np.asarray(stats.XX), np.asarray(stats.Xy)
    new_XX = np.eye(p)
    new_XX[:-1, :-1] = U.T @ XX @ U
    factors = []
    for f in stats.factors:
        ZX = np.einsum("qpm,pr->qrm", f.ZX, U)
        ZX = np.concatenate([ZX, np.zeros_like(f.ZX[:, :1])], axis=1)
        factors.append(f._replace(ZX=ZX, Zy=f.Zy + s * np.einsum("qpm,p->qm", f.ZX, v)))
    return replace(
        stats,
        factors=tuple(factors),
        XX=new_XX,
        Xy=np.append(U.T @ (Xy + s * XX @ v), 0.0),
        yy=np.asarray(stats.yy + 2 * s * v @ Xy + s**2 * v @ XX @ v),
    )


# --- the program -----------------------------------------------------------------------------------------------------


@partial(jit, compiler_options=LANES)
def _minimise(stats: CrossProducts, chart: Chart) -> tuple[Array, Array]:
    """Deviances and result codes ``(B,)`` of stacked cross-products and charts with lanes last."""
    moments = jax.vmap(moments_of, out_axes=-1)(stats)
    moments = jax.tree.map(lambda a: a[..., 0, :], moments)
    chart = jax.tree.map(jnp.asarray, chart)
    evaluate = partial(_evaluate, moments=moments, chart=chart, structures=stats.layout.structures)
    length = jnp.sqrt((chart.start**2).sum(0))
    solution = newton.minimise(evaluate, jnp.asarray(chart.start), radius=0.5 * jnp.maximum(length, 0.2))
    return solution.value, solution.result


def _evaluate(z: Array, moments: Moments, chart: Chart, structures: tuple[Structure, ...]):
    parts = cov.cut(z, structures)
    factors = [(M * part).sum(2) for M, part in zip(chart.maps, parts, strict=True)]
    given = ~jnp.isnan(chart.log_variance)
    has_sd = sum((row**2).sum(0) for row in chart.row) > 0
    # D_ii and its derivatives by the entries of D.
    d = sum(((F * row[:, None]).sum(0) ** 2).sum(0) for F, row in zip(factors, chart.row, strict=True))
    d = jnp.where(has_sd, d, 1.0)
    d_D = jnp.stack([row[a] * row[b] * (1.0 if a == b else 2.0) for row in chart.row for a, b in pairs_of(len(row))])
    fixed_variance = jnp.exp(jnp.where(given, chart.log_variance, 0.0)) / d
    at = deviance_at_sigma(factors, moments, lambda profiled: jnp.where(given, fixed_variance, profiled))
    g, H = at.gradient, at.Hessian
    g_D, g_s, H_DD, H_Ds, H_ss = g[:-1], g[-1], H[:-1, :-1], H[:-1, -1], H[-1, -1]
    s_D = jnp.where(given, -d_D / d, -H_Ds / H_ss)  # how log sigma^2 moves with D
    s_DD = jnp.where(given, d_D[:, None] * d_D / d**2, 0.0)
    gradient = g_D + jnp.where(given, g_s, 0.0) * s_D
    Hessian = H_DD + H_Ds[:, None] * s_D + s_D[:, None] * H_Ds + H_ss * s_D[:, None] * s_D + g_s * s_DD
    jacobian, curvature, start, k = [], [], 0, z.shape[0]
    column = 0
    for M, F, part in zip(chart.maps, factors, parts, strict=True):
        q, own = len(F), len(part)
        slopes = jnp.stack(
            [(M[a] * F[b][:, None] + F[a][:, None] * M[b]).sum(0) for a, b in pairs_of(q)]
        )  # (pairs, k_t, B)
        jacobian.append(jnp.pad(slopes, ((0, 0), (column, k - column - own), (0, 0))))
        along = [
            gradient[start + n] * ((M[a][:, :, None] * M[b][:, None] + M[b][:, :, None] * M[a][:, None]).sum(0))
            for n, (a, b) in enumerate(pairs_of(q))
        ]
        curvature.append(jnp.pad(sum(along), ((column, k - column - own),) * 2 + ((0, 0),)))
        start += q * (q + 1) // 2
        column += own
    J = jnp.concatenate(jacobian)
    back = linalg.transpose(J)
    g_z = linalg.matmul(back, gradient[:, None])[:, 0]
    H_z = linalg.matmul(back, linalg.matmul(Hessian, J)) + sum(curvature)
    alive = chart.alive
    H_z = jnp.where(alive[:, None] & alive, H_z, jnp.eye(k, dtype=z.dtype)[..., None])
    outside = (chart.positive & (z <= 0)).any(0)
    return jnp.where(outside, jnp.inf, at.value), jnp.where(alive, g_z, 0.0), H_z
