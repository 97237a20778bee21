"""Data sets drawn from a fit, as what a refit needs of them: four kinds of bootstrap."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import numpy as np

from mixjax.design import refuse_known, refuse_smooths
from mixjax.fitted.either import AnyFitted
from mixjax.fitted.record import Fitted
from mixjax.products.clusters import ClusterProducts, by_cluster
from mixjax.resampling.family_data import FamilyClusters
from mixjax.resampling.replicates import Drawn, Source, data_of_responses
from mixjax.simulation import draw_responses, random_columns

Kind = Literal["parametric", "residual", "cases", "wild"]
KINDS = ("parametric", "residual", "cases", "wild")
# An eigenvalue that is this part of the largest one counts as zero.
RANK = 1e-12
# A row whose residual keeps less than this share of its variance determines a fixed effect by itself.
LEVERAGE_LEFT = 1e-10


def resampler(fitted: AnyFitted, kind: Kind, key: Any, weights: str = "mammen") -> Source:
    """The source of replicates of one kind; see :func:`mixjax.resampling.bootstrap.bootstrap`.

    Raises:
        ValueError: the kind is unknown, or the fit cannot be resampled in this way.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(map(repr, KINDS))}, got {kind!r}")
    if weights not in TWO_POINTS:
        raise ValueError(f"weights must be one of {', '.join(map(repr, TWO_POINTS))}, got {weights!r}")
    if kind != "parametric":
        fitted.check_can("resampling of residuals or cases")
        refuse_smooths(fitted.labels, f"kind={kind!r}", "levels are not independent beside it; use kind='parametric'")
        refuse_known(
            fitted.design,
            f"kind={kind!r}",
            "they depend on each other, and what is drawn level by level would not; use kind='parametric'",
        )
    if kind == "cases":
        clusters = cluster_products(fitted)

        def drawn(first: int, count: int) -> Drawn:
            M = clusters.M
            index = draw_responses(lambda u: np.floor(u * M), M, M, key, count, first, "uniform")
            return Drawn((clusters.gather(index.astype(np.intp)),))

        return Source(drawn, clusters.numbers(clusters.M))
    respond: Callable[[int, int], np.ndarray]
    if kind == "parametric":
        respond = partial(_parametric_responses, fitted, key)
    elif not isinstance(fitted, Fitted):
        raise ValueError(
            f"kind={kind!r} rests on residuals that are exchangeable, which those of a {fitted.family.name} response "
            "are not; use kind='parametric' or 'cases'"
        )
    elif kind == "residual":
        respond = _residual_responses(fitted, key)
    else:
        respond = _wild_responses(fitted, key, *TWO_POINTS[weights])
    data = data_of_responses(fitted)
    return Source(lambda first, count: Drawn((data(respond(first, count)),)), fitted.nobs)


def _parametric_responses(fitted: AnyFitted, key: Any, first: int, count: int) -> np.ndarray:
    return fitted.simulate(key, count, first)


# --- residuals -----------------------------------------------------------------------------------------------------


def reflated_effects(fitted: Fitted) -> list[np.ndarray]:
    """Per term ``(levels that have rows, q)``: predicted random effects, centred, with covariance Sigma exactly.

    Predicted effects vary less than the effects themselves, so they are multiplied by the matrix that turns their
    empirical covariance (divisor: number of levels) into the estimated one (Carpenter, Goldstein & Rasbash 2003, Appl.
    Statist. 52, 431). Where Sigma is singular that happens in the space that it spans.
    """
    pools = []
    for t, (term, b, Sigma) in enumerate(
        zip(fitted.design.terms, fitted.estimates.b, fitted.estimates.Sigma, strict=True)
    ):
        present = np.unique(term.group)
        F, G = _factor_and_inverse(np.asarray(Sigma))
        spherical = np.asarray(b)[present] @ G.T
        spherical = spherical - spherical.mean(axis=0)
        values, vectors = np.linalg.eigh(spherical.T @ spherical / len(present))
        if len(values) and (len(present) <= len(values) or values.min() <= RANK * values.max()):
            raise ValueError(
                f"the predicted random effects of term {fitted.labels.terms[t].group!r} cannot be rescaled to their "
                f"covariance: {len(present)} levels are too few for rank {len(values)}; use kind='parametric'"
            )
        pools.append(spherical @ (vectors / np.sqrt(values)) @ vectors.T @ F.T)
    return pools


def _factor_and_inverse(Sigma: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``F (q, r)`` of full rank with ``F F' = Sigma``, and ``G (r, q)`` with ``G F = I``."""
    sd = np.sqrt(np.diagonal(Sigma))
    kept = np.flatnonzero(sd > 0)
    values, vectors = np.linalg.eigh(Sigma[np.ix_(kept, kept)] / np.outer(sd[kept], sd[kept]))
    at = values > RANK * values.max(initial=0.0)
    values, vectors = values[at], vectors[:, at]
    F, G = np.zeros((len(sd), len(values))), np.zeros((len(values), len(sd)))
    F[kept] = sd[kept, None] * vectors * np.sqrt(values)
    G[:, kept] = (vectors / np.sqrt(values)).T / sd[kept]
    return F, G


def reflated_residuals(fitted: Fitted) -> np.ndarray:
    """``(n,)`` conditional residuals times the roots of the weights, centred, with mean square ``sigma^2`` exactly."""
    design, est = fitted.design, fitted.estimates
    raw = _marginal_residuals(fitted) - random_columns(design) @ np.concatenate([np.ravel(b) for b in est.b])
    residuals = raw if design.weights is None else raw * np.sqrt(design.weights)
    residuals = residuals - residuals.mean()
    mean_square = residuals @ residuals / len(residuals)
    if not mean_square > 0:
        raise ValueError("all residuals of this fit are zero: there is nothing to draw from; use kind='parametric'")
    reflated: np.ndarray = residuals * (est.sigma / np.sqrt(mean_square))
    return reflated


def _residual_responses(fitted: Fitted, key: Any) -> Callable[[int, int], np.ndarray]:
    """Effects drawn level by level and residuals row by row, with replacement."""
    design, n = fitted.design, fitted.nobs
    mean, Z = _fixed_part(fitted), random_columns(design)
    noise, pools = reflated_residuals(fitted), reflated_effects(fitted)
    scale = 1.0 if design.weights is None else 1.0 / np.sqrt(design.weights)
    levels = [term.n_groups for term in design.terms]
    cuts = np.cumsum([n, *levels])

    def respond(uniform: np.ndarray) -> np.ndarray:
        e, *parts = np.split(uniform, cuts[:-1], axis=1)
        drawn = [_pick(pool, part).reshape(len(part), -1) for pool, part in zip(pools, parts, strict=True)]
        effects = np.concatenate(drawn, axis=1)
        responses: np.ndarray = mean + scale * _pick(noise, e) + (Z @ np.ascontiguousarray(effects.T)).T
        return responses

    return lambda first, count: draw_responses(respond, n, int(cuts[-1]), key, count, first, "uniform")


def _pick(pool: np.ndarray, uniform: np.ndarray) -> np.ndarray:
    return pool[(uniform * len(pool)).astype(np.intp)]


# --- wild ----------------------------------------------------------------------------------------------------------

# Two points and the probability of the first: mean 0, variance 1; Mammen's third moment is 1, as that of squares is.
_ROOT5 = np.sqrt(5.0)
TWO_POINTS = {
    "mammen": ((1 - _ROOT5) / 2, (1 + _ROOT5) / 2, (_ROOT5 + 1) / (2 * _ROOT5)),
    "rademacher": (-1.0, 1.0, 0.5),
}


def adjusted_residuals(fitted: Fitted) -> np.ndarray:
    """``(n,)`` marginal residuals over ``sqrt(1 - h)``, h the row's leverage in least squares on X (HC2)."""
    Q = fitted.rows.Q
    left = 1.0 - np.einsum("ij,ij->i", Q, Q)
    # A row that determines a fixed effect by itself has no residual to draw from.
    inverse = np.where(left > LEVERAGE_LEFT, 1.0 / np.sqrt(np.maximum(left, LEVERAGE_LEFT)), 0.0)
    return _marginal_residuals(fitted) * inverse


def _wild_responses(
    fitted: Fitted, key: Any, low: float, high: float, share: float
) -> Callable[[int, int], np.ndarray]:
    """Marginal residuals of every cluster times one random number (Modugno & Giannerini 2015)."""
    cluster, M = outermost_clusters(fitted)
    mean, residuals = _fixed_part(fitted), adjusted_residuals(fitted)

    def respond(uniform: np.ndarray) -> np.ndarray:
        responses: np.ndarray = mean + residuals * np.where(uniform < share, low, high)[:, cluster]
        return responses

    return lambda first, count: draw_responses(respond, fitted.nobs, M, key, count, first, "uniform")


def _fixed_part(fitted: Fitted) -> np.ndarray:
    mean = np.asarray(fitted.design.X) @ fitted.estimates.beta
    fixed: np.ndarray = mean if fitted.design.offset is None else mean + np.asarray(fitted.design.offset)
    return fixed


def _marginal_residuals(fitted: Fitted) -> np.ndarray:
    residuals: np.ndarray = np.asarray(fitted.design.y) - _fixed_part(fitted)
    return residuals


# --- clusters ------------------------------------------------------------------------------------------------------


def outermost_term(fitted: AnyFitted) -> int:
    """The first of the terms in whose grouping factor all others are nested.

    Raises:
        ValueError: there is none, because factors are crossed.
    """
    refuse_known(
        fitted.design, "what leaves levels out, or draws them,", "no levels are independent; use kind='parametric', "
        "with percentile, basic or normal intervals"
    )  # fmt: skip
    terms, names = fitted.design.terms, [term.group for term in fitted.labels.terms]
    for t, outer in enumerate(terms):
        if all(_is_nested(inner, outer) for inner in terms):
            return t
    raise ValueError(
        f"the grouping factors {', '.join(map(repr, dict.fromkeys(names)))} are crossed: no levels are independent of "
        "each other, so there are no clusters to draw or to leave out; kind='parametric' and, of linear models, "
        "kind='residual' with percentile, basic or normal intervals need none"
    )


def _is_nested(inner: Any, outer: Any) -> bool:
    parent = np.zeros(inner.n_groups, np.int64)
    parent[inner.group] = outer.group
    return bool((parent[inner.group] == outer.group).all())


def outermost_clusters(fitted: AnyFitted) -> tuple[np.ndarray, int]:
    """``(n,)`` cluster of every row, and how many clusters: the levels of :func:`outermost_term` that have rows."""
    present, cluster = np.unique(fitted.design.terms[outermost_term(fitted)].group, return_inverse=True)
    if len(present) < 2:
        raise ValueError("the outermost grouping factor has one level: there is nothing to draw from")
    return cluster.reshape(-1), len(present)


def cluster_products(fitted: AnyFitted) -> ClusterProducts | FamilyClusters:
    """The fit's cross-products, or rows of a generalised model, by levels of the outermost grouping factor; see
    :func:`outermost_term`."""
    clusters = outermost_clusters(fitted)
    return by_cluster(fitted.rows, *clusters) if isinstance(fitted, Fitted) else FamilyClusters(fitted, *clusters)
