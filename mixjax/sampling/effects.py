"""Random effects given each draw of the other parameters: exact and joint, of nested and of crossed factors.

Matheron's rule: with effects and errors ``(b*, e*)`` from their distribution at the draw,
``b* + E[b | y - X beta - Z b* - e*]`` has the distribution of b given y. All it takes are conditional means, of many
responses, each at covariances of its own: lanes of the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from mixjax import linalg
from mixjax.covariance import near
from mixjax.design import Design, RandomTerm
from mixjax.engine.engine import engine_of
from mixjax.engine.residual_rows import ResidualRows
from mixjax.estimation.blocks import has_lanes, over_lanes
from mixjax.estimation.residual import transform_of
from mixjax.machine import float64, jit
from mixjax.products.responses import Responses
from mixjax.products.rows import rows_of
from mixjax.simulation import random_columns

# Numbers of the responses that are in memory at once.
NUMBERS = 2**22
# Draws in one call of the program where residuals have parameters.
MANY = 256


def draw_effects(
    design: Design, factors: Sequence[np.ndarray], sigma: np.ndarray, beta: np.ndarray, rng: np.random.Generator
) -> list[np.ndarray]:
    """Per term ``(S, n_groups, q)``: random effects given y and each of S draws.

    Args:
        factors: per term ``(q, q, S)``, any factor of its absolute covariance. sigma: ``(S,)``. beta: ``(S, p)``.
    """
    n, S = np.shape(design.X)[0], len(sigma)
    X, y = np.asarray(design.X, np.float64), np.asarray(design.y, np.float64)
    y = y if design.offset is None else y - np.asarray(design.offset)
    responses = Responses(rows_of(replace(design, X=np.zeros((n, 0)), y=np.zeros(n), offset=None)))
    columns = random_columns(design)
    sd = np.ones(n) if design.weights is None else 1.0 / np.sqrt(np.asarray(design.weights, np.float64))
    found = [np.empty((S, term.n_groups, np.shape(term.Z)[1])) for term in design.terms]
    size = max(16, NUMBERS // n)
    for first in range(0, S, size):
        at = slice(first, min(first + size, S))
        own, s = [F[..., at] for F in factors], sigma[at]
        fresh = [fresh_effects(F, term, rng) for F, term in zip(own, design.terms, strict=True)]
        drawn = np.asarray((columns @ np.concatenate([b.reshape(len(s), -1) for b in fresh], axis=1).T).T)
        drawn = drawn + s[:, None] * sd * rng.standard_normal((len(s), n))
        means = _means(responses, y - beta[at] @ X.T - drawn, [F / s for F in own])
        for whole, b, mean in zip(found, fresh, means, strict=True):
            whole[at] = b + mean
    return found


def fresh_effects(F: np.ndarray, term: RandomTerm, rng: np.random.Generator) -> np.ndarray:
    """``(S, n_groups, q)`` effects from their distribution, F ``(q, q, S)`` any factor of their covariances; of levels
    with a known covariance ``L`` times independent ones."""
    drawn: np.ndarray = np.einsum("abs,smb->sma", F, rng.standard_normal((F.shape[2], term.n_groups, F.shape[0])))
    if term.levels is None:
        return drawn
    related: np.ndarray = np.einsum("ml,sla->sma", np.asarray(term.levels, np.float64), drawn, optimize=True)
    return related


def draw_effects_of_residuals(
    design: Design,
    factors: Sequence[np.ndarray],
    sigma: np.ndarray,
    gamma: np.ndarray,
    c: np.ndarray | None,
    beta: np.ndarray,
    rng: np.random.Generator,
) -> list[np.ndarray]:
    """As :func:`draw_effects`, where residuals have parameters: of rows transformed at each draw, whose errors are
    independent.

    Args:
        sigma: ``(S,)`` where the dispersion's columns are at their means. gamma: ``(S, d)``. c: ``(S,)`` the
            correlation at the shortest distance, or None.
    """
    n, S = np.shape(design.X)[0], len(sigma)
    X, y = np.asarray(design.X, np.float64), np.asarray(design.y, np.float64)
    y = y if design.offset is None else y - np.asarray(design.offset)
    rows = rows_of(replace(design, X=np.zeros((n, 0)), y=np.zeros(n), offset=None))
    data = ResidualRows.of(rows, transform_of(design))
    root = np.ones(n) if rows.sqrt_w is None else np.asarray(rows.sqrt_w)
    columns = random_columns(design)
    found = [np.empty((S, term.n_groups, np.shape(term.Z)[1])) for term in design.terms]
    with float64():
        for first in range(0, S, MANY):
            at = np.minimum(np.arange(first, first + MANY), S - 1)
            own = [F[..., at] for F in factors]
            fresh = [fresh_effects(F, term, rng) for F, term in zip(own, design.terms, strict=True)]
            drawn = np.asarray((columns @ np.concatenate([b.reshape(MANY, -1) for b in fresh], axis=1).T).T)
            left = root * (y - beta[at] @ X.T - drawn)
            errors = sigma[at, None] * rng.standard_normal((MANY, n))
            lambdas = [np.moveaxis(F, -1, 0) / sigma[at, None, None] for F in own]
            means = _of_residuals(lambdas, left, errors, gamma[at], None if c is None else c[at], data)
            kept = slice(first, min(first + MANY, S))
            for whole, b, mean in zip(found, fresh, means, strict=True):
                whole[kept] = (b + np.asarray(mean).swapaxes(1, 2))[: kept.stop - first]
    return found


@jit
def _of_residuals(lambdas: Any, left: Any, errors: Any, gamma: Any, c: Any, data: ResidualRows) -> Any:
    return jax.vmap(data.modes, in_axes=(0, 0, 0, 0, None if c is None else 0))(lambdas, left, errors, gamma, c)


def _means(responses: Responses, Y: np.ndarray, lambdas: list[np.ndarray]) -> list[np.ndarray]:
    """Conditional means of effects, per term ``(B, m, q)``, of responses ``Y (B, n)`` of mean zero."""
    stats = replace(responses.products(Y), classes=None)
    bases = [np.asarray(basis.R) for basis in stats.Z_bases]
    turned = [linalg.matmul(R, Lambda) for R, Lambda in zip(bases, lambdas, strict=True)]
    x = np.asarray(near(turned, stats.layout.structures)).T  # (B, k)
    if has_lanes(stats, "numpy"):
        modes = over_lanes(_of_lanes, stats, False, [x], [], engine="numpy")
    else:
        each = [_of_one(stats, i, x[i]) for i in range(len(Y))]
        modes = tuple(np.stack(parts) for parts in zip(*each, strict=True))
    at_levels = [
        own if T is None else np.einsum("sqr,mr->sqm", own, np.asarray(T), optimize=True)
        for own, T in zip(modes, (stats.transform_of(place.factor) for place in stats.layout.terms), strict=True)
    ]
    return [
        np.einsum("ab,sbm->sma", np.asarray(basis.R_inv), own)
        for basis, own in zip(stats.Z_bases, at_levels, strict=True)
    ]


def _of_lanes(lanes: Any, x: Any) -> Any:
    return lanes.modes(x)


def _of_one(stats: Any, i: int, x: np.ndarray) -> list[np.ndarray]:
    factors = tuple(f._replace(Zy=f.Zy[i]) for f in stats.factors)
    one = replace(stats, factors=factors, Xy=stats.Xy[i], yy=stats.yy[i], beta0=stats.beta0[i])
    found = engine_of(one, False).run(_solved, x)
    sizes = [f.Zy.shape[-1] for f in factors]
    return [
        own[:, : sizes[place.factor]]
        for own, place in zip(jax.tree.map(np.asarray, found), stats.layout.terms, strict=True)
    ]


def _solved(engine: Any, x: Any) -> Any:
    return engine.solution(x)[1]
