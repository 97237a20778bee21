"""Whether one fitted model is a special case of another, and where in the larger one it lies.

Names say nothing here: columns and grouping are compared as numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.optimize import minimize_scalar

from mixjax.bases import orthonormal_columns
from mixjax.checks import DataError
from mixjax.covariance import Structure
from mixjax.design import Design, RandomTerm, ResidualTerm
from mixjax.families import Family
from mixjax.fitted.either import AnyFitted
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.fitted.record import Fitted
from mixjax.products.rows import Rows

# Relative size of what counts as rounding in projections and in covariances that follow from them.
ROUNDING = 1e-8
# Random covariances of the smaller model that are looked for in the larger one, and random vectors that stand for rows.
POINTS, PROBES = 6, 3
# Families whose densities are probabilities of counts, and those of numbers: within one of these rows the same response
# has the same measure, and log-likelihoods compare.
MEASURES = (("binomial", "poisson", "nbinom"), ("gamma", "inverse_gaussian", "beta", "gaussian"))
# Places on a line at which a structure is looked for.
SCAN = 101


class Place(NamedTuple):
    """Where the random effects of a smaller model lie in a larger one.

    Attributes:
        nested: every covariance of the smaller model is one of the larger.
        zeros: standard deviations (of effects, or of their combinations) that are zero in the larger model's
            covariances, and correlations at a bound, wherever the smaller model holds; None where the larger model has
            several ways to write them.
    """

    nested: bool
    zeros: int | None


def check_same_data(fits: Sequence[AnyFitted], names: Sequence[str]) -> None:
    """Raise DataError, saying what differs, unless all fits are of the same response, rows, trials, weights and offset.

    Of fits whose rows were not kept only the name of the response and the sums that remain are compared.
    """
    for fit, name in zip(fits[1:], names[1:], strict=True):
        difference = _difference(fits[0], fit)
        if difference:
            raise DataError(
                f"{names[0]} and {name} were not fitted to the same data: {difference}. Criteria can be compared only "
                "for the same rows in the same order; fit both to one table without missing values in any column used"
            )


def _difference(a: AnyFitted, b: AnyFitted) -> str | None:
    if a.nobs != b.nobs:
        return f"they have {a.nobs} and {b.nobs} rows"
    if isinstance(a, Fitted) and isinstance(b, Fitted) and (a.kept is None or b.kept is None):
        if a.labels.response != b.labels.response:
            return f"the responses are {a.labels.response!r} and {b.labels.response!r}"
        return None if np.isclose(a.stats.sum_log_weights, b.stats.sum_log_weights) else "the weights differ"
    if not np.array_equal(a.design.y, b.design.y):
        return "the response differs"
    n = a.nobs
    if not np.array_equal(_or(_given(a).weights, 1.0, n), _or(_given(b).weights, 1.0, n)):
        return "the weights differ"
    if not np.array_equal(_or(a.design.offset, 0.0, n), _or(b.design.offset, 0.0, n)):
        return "the offset differs"
    if not np.array_equal(_or(a.design.size, 1.0, n), _or(b.design.size, 1.0, n)):
        return "the numbers of trials differ"
    return None


def _given(fit: AnyFitted | Rows) -> Design:
    """The design with prior weights, whatever the variances of residuals are at the estimates."""
    return fit.given if isinstance(fit, Fitted) else fit.design


def are_residuals_within(small: Fitted, large: Fitted) -> bool:
    """Whether the residuals' covariances of the one model are among those of the other."""
    a, b = small.given, large.given
    ones = np.ones((small.nobs, 1))
    W0, W1 = (
        ones if own.dispersion is None else np.concatenate([ones, np.asarray(own.dispersion)], axis=1) for own in (a, b)
    )
    return in_span(W0, W1) and (a.residual is None or _same_correlation(a.residual, b.residual))


def _same_correlation(a: ResidualTerm, b: ResidualTerm | None) -> bool:
    if b is None or a.structure != b.structure:
        return False
    same = np.array_equal(np.asarray(a.group), np.asarray(b.group))
    if not same or a.time is None or b.time is None:
        return same and a.time is b.time
    return np.allclose(np.asarray(a.time) - np.min(a.time), np.asarray(b.time) - np.min(b.time))


def residual_bounds(small: Fitted, large: Fitted) -> int:
    """How many parameters of the larger model's residuals are at a bound where the smaller one holds: a correlation
    that cannot be negative."""
    own = large.given.residual
    return int(own is not None and own.structure == "car1" and small.given.residual is None)


def check_same_likelihood(fits: Sequence[AnyFitted], names: Sequence[str]) -> None:
    """Raise ValueError, saying why, where log-likelihoods of the same data are not of one kind: of linear and of
    generalised models, by different approximations, of counts and of numbers."""
    first = fits[0]
    for fit, name in zip(fits[1:], names[1:], strict=True):
        pair = f"{names[0]} and {name} cannot be compared"
        if not isinstance(first, GeneralizedFitted) or not isinstance(fit, GeneralizedFitted):
            if isinstance(first, GeneralizedFitted) or isinstance(fit, GeneralizedFitted):
                raise ValueError(f"{pair}: one is a linear mixed model, the other a generalised one")
            continue
        if first.nagq != fit.nagq:
            raise ValueError(
                f"{pair}: their log-likelihoods are approximated with nagq={first.nagq} and nagq={fit.nagq}; fit all "
                "with the same nagq="
            )
        if first.curvature != fit.curvature:
            raise ValueError(
                f"{pair}: their log-likelihoods are approximated by the {first.curvature} and by the {fit.curvature} "
                "curvature; fit all with the same curvature="
            )
        if not _one_measure(first.family, fit.family):
            raise ValueError(
                f"{pair}: the families {first.family.name} and {fit.family.name} give the response densities with "
                "respect to different measures, so that their log-likelihoods have different constants"
            )


def _one_measure(a: Family, b: Family) -> bool:
    a, b = a.plain, b.plain
    same = a == b or (a.name == b.name and any(a.name in names for names in MEASURES))
    return same or any(a.name in names and b.name in names for names in MEASURES)


class Bounds(NamedTuple):
    """Parameters of a larger family that are at their bounds where it is a smaller one: ``zeros``, the probability of
    extra zeros is 0; ``size``, Poisson counts are negative binomial ones with 1/size = 0."""

    zeros: bool
    size: bool

    def __str__(self) -> str:
        parts = ["the probability of extra zeros"] * self.zeros + ["1/size of a negative binomial response"] * self.size
        return " and ".join(parts)


def bounds_of(small: Family, large: Family) -> Bounds | None:
    """Where one family lies in another; None where it is no special case of it."""
    a, b = small.plain, large.plain
    size = (a.name, b.name) == ("poisson", "nbinom") and a.link == b.link
    inflated = (a is not small, b is not large)
    if not (size or a == b) or inflated == (True, False):
        return None
    return Bounds(inflated == (False, True), size)


def are_formulas_within(small: GeneralizedFitted, large: GeneralizedFitted) -> bool:
    """Whether what the family's parameters depend on in the one lies in the span of that in the other, parameters that
    only the larger model has aside."""
    ones = np.ones((small.nobs, 1))

    def columns(fit: GeneralizedFitted) -> dict[str, np.ndarray]:
        own = fit.design.psi_columns or (None,) * fit.family.n_psi
        return {
            name: ones if values is None else np.asarray(values, np.float64)
            for name, values in zip(fit.family.psi_names, own, strict=True)
        }

    own, other = columns(small), columns(large)
    return all(in_span(values, other[name]) for name, values in own.items() if name in other)


def _or(values: np.ndarray | None, default: float, n: int) -> np.ndarray:
    return np.full(n, default) if values is None else np.asarray(values)


def is_within(small: AnyFitted | Rows, large: AnyFitted | Rows) -> bool:
    """Whether the fixed-effects columns of the one lie in the span of those of the other, both with rows."""
    return in_span(np.asarray(small.design.X, np.float64), np.asarray(large.design.X, np.float64))


def in_span(X0: np.ndarray, X1: np.ndarray) -> bool:
    """Whether the columns of ``X0`` ``(n, p0)`` lie in the span of those of ``X1`` ``(n, p1)``."""
    if not X0.shape[1]:
        return True
    Q0, _, independent = orthonormal_columns(X0, None)
    Q0, Q1 = Q0[:, independent], orthonormal_columns(X1, None)[0] if X1.shape[1] else X1
    outside = np.linalg.norm(Q0 - Q1 @ (Q1.T @ Q0), axis=0)
    return bool(outside.max(initial=0.0) <= ROUNDING)


def logdet_X(fit: AnyFitted) -> float:
    """``log |X'WX|``, of a generalised model ``log |X'X|``, by which REML criteria of differently coded fixed effects
    differ."""
    if isinstance(fit, GeneralizedFitted):
        Q = np.asarray(fit.rows.Q)
        return float(np.linalg.slogdet(Q.T @ Q)[1] + 2.0 * fit.rows.X_basis.logdet)
    stats = fit.given_stats
    return float(np.linalg.slogdet(stats.XX)[1] + 2.0 * stats.X_basis.logdet)


# --- correlations by distance ----------------------------------------------------------------------------------------


def are_kernels_within(small: AnyFitted, large: AnyFitted) -> bool:
    """Whether every correlation by distance of the one model is among those of the other."""
    return all(any(_is_kernel_of(a, b) for b in _with_kernels(large)) for a in _with_kernels(small))


def free_kernels(small: AnyFitted | None, large: AnyFitted) -> list[str]:
    """Correlations by distance of the larger model that mean nothing where the smaller one holds, by name."""
    own = [] if small is None else _with_kernels(small)
    names = [names.group for names, term in zip(large.labels.terms, _given(large).terms, strict=True) if term.kernel]
    return [
        name for name, b in zip(names, _with_kernels(large), strict=True) if not any(_is_kernel_of(a, b) for a in own)
    ]


def _with_kernels(fit: AnyFitted) -> list[RandomTerm]:
    return [term for term in _given(fit).terms if term.kernel is not None] if fit.kept is not None else []


def _is_kernel_of(a: RandomTerm, b: RandomTerm) -> bool:
    assert a.kernel is not None
    assert b.kernel is not None
    pairs = ((a.group, b.group), (a.coordinates, b.coordinates), (a.within, b.within))
    return a.kernel.is_case_of(b.kernel) and all(np.array_equal(np.asarray(x), np.asarray(y)) for x, y in pairs)


# --- random effects --------------------------------------------------------------------------------------------------


def place_of(small: AnyFitted | Rows, large: AnyFitted | Rows) -> Place:
    """Where the covariances of one model lie among those of another, both with rows.

    A covariance of the responses is a sum of ``Z_t D_t Z_t'`` over pairs of rows in one level, and of ``1 / weights``;
    of generalised models that of the linear predictors is the sum without the last part, and weights have none in it.
    Random covariances of the smaller model are applied to random vectors, and least squares finds the covariances
    ``D_t`` of the larger model that do the same. Vectors agree with probability one only where the covariances do,
    so that no matrix of rows by rows is needed. What was found must then be a covariance of the structure of each term.
    """
    rng = np.random.default_rng(0)
    probes = rng.standard_normal((len(small.design.X), PROBES))
    terms0, terms1 = _weighted_terms(small, large), _weighted_terms(large, large)
    if not terms0 or not terms1:  # of models that have parameters of residuals
        return Place(not terms0, sum(s.n_zeros(np.ones(s.n_reductions, bool)) for s in (t.structure for t in terms1)))
    spans = [_span(term.structure, rng) for term in terms1]
    kernels = [term.apply(D, probes).ravel() for term, span in zip(terms1, spans, strict=True) for D in span]
    residual = [] if isinstance(small, GeneralizedFitted) else [probes.ravel()]
    A = np.stack([*kernels, *residual], axis=1)
    lengths = np.linalg.norm(A, axis=0)
    left, singular, right = np.linalg.svd(A / lengths, full_matrices=False)
    kept = singular > ROUNDING * singular[0]
    zeros = []
    for _ in range(POINTS):
        target = np.sum([t.apply(_random_covariance(t.structure, rng), probes) for t in terms0], axis=0).ravel()
        in_span = left[:, kept].T @ target
        if np.linalg.norm(target - left[:, kept] @ in_span) > ROUNDING * np.linalg.norm(target):
            return Place(False, None)
        coefficients = right[kept].T @ (in_span / singular[kept]) / lengths
        if kept.all():
            found = _zeros(coefficients if residual else np.append(coefficients, 0.0), terms1, spans)
        elif residual and (~kept).sum() == 1 and any(term.structure.apart_from_noise for term in terms1):
            found = _zeros_along(coefficients, right[~kept][0] / lengths, terms1, spans)
        else:
            continue
        if found is None:
            return Place(False, None)
        zeros.append(found)
    return Place(True, min(zeros) if zeros else None)


class _WeightedTerm(NamedTuple):
    """A random term in the basis that its fit used: ``Z (n, q)``, of a linear model times the root of the weights, mean
    squares 1."""

    Z: np.ndarray
    group: np.ndarray
    n_groups: int
    structure: Structure
    levels: np.ndarray | None = None

    def apply(self, D: np.ndarray, vectors: np.ndarray) -> np.ndarray:
        """``Z D Z'`` over pairs of rows in one level, or times what levels are known to share, times ``(n, r)``."""
        sums = np.stack(
            [
                np.bincount(self.group, self.Z[:, a] * v, self.n_groups)
                for v in vectors.T
                for a in range(self.Z.shape[1])
            ],
            axis=1,
        ).reshape(self.n_groups, vectors.shape[1], -1)
        if self.levels is not None:
            flat = sums.reshape(self.n_groups, -1)
            sums = (self.levels @ (self.levels.T @ flat)).reshape(sums.shape)
        products: np.ndarray = np.einsum("na,nra->nr", self.Z @ D, sums[self.group])
        return products


def _weighted_terms(fit: AnyFitted | Rows, large: AnyFitted | Rows) -> list[_WeightedTerm]:
    """Correlations by distance are those of the larger model at its estimates, in both."""
    design, generalised = _given(fit), isinstance(fit, GeneralizedFitted)
    scale = np.sqrt(_or(None if generalised else design.weights, 1.0, len(design.X)))[:, None]
    if isinstance(fit, Fitted):
        bases = fit.given_stats.Z_bases
    else:
        bases = fit.rows.Z_bases if isinstance(fit, GeneralizedFitted) else fit.stats.Z_bases
    return [
        _WeightedTerm(
            scale * (np.asarray(term.Z, np.float64) @ np.asarray(basis.R_inv)),
            np.asarray(term.group),
            term.n_groups,
            place.structure,
            _levels_of(term, large),
        )
        for term, basis, place in zip(design.terms, bases, fit.layout.terms, strict=True)
    ]


def _levels_of(term: RandomTerm, large: AnyFitted | Rows) -> np.ndarray | None:
    if term.kernel is None:
        return None if term.levels is None else np.asarray(term.levels, np.float64)
    for own, at_estimates in zip(_given(large).terms, large.design.terms, strict=True):
        if own.kernel is not None and _is_kernel_of(term, own):
            return np.asarray(at_estimates.levels, np.float64)
    return None


def _covariance(structure: Structure, x: np.ndarray) -> np.ndarray:
    factor = structure.factor(x)
    covariance: np.ndarray = factor @ factor.T
    return covariance


def _random_covariance(structure: Structure, rng: np.random.Generator) -> np.ndarray:
    return _covariance(structure, rng.standard_normal(structure.k))


def _span(structure: Structure, rng: np.random.Generator) -> list[np.ndarray]:
    """Symmetric matrices ``(q, q)`` that span the covariances of a structure."""
    q = structure.q
    sample = np.stack([_random_covariance(structure, rng).ravel() for _ in range(q * (q + 1) + 2)])
    _, singular, right = np.linalg.svd(sample, full_matrices=False)
    return list(right[singular > ROUNDING * singular[0]].reshape(-1, q, q))


def _zeros_along(
    coefficients: np.ndarray, direction: np.ndarray, terms: list[_WeightedTerm], spans: list[list[np.ndarray]]
) -> int | None:
    """:func:`_zeros` at the place where coefficients on a line, which all give the same covariance, are those of the
    structures; None if there is none.

    With one row for every effect the diagonal may be noise or effects. A structure that has not every diagonal tells.
    """
    if np.abs(direction[-1]) <= ROUNDING * np.abs(direction).max():
        return None
    direction = direction / direction[-1]  # noise up, effects down

    def distance(t: float) -> float:
        return _distance(coefficients + t * direction, terms, spans)

    low = -coefficients[-1]
    inside, outside = low, low + np.abs(coefficients).max() * len(coefficients)
    for _ in range(40):  # how much noise leaves variances
        middle = 0.5 * (inside + outside)
        inside, outside = (middle, outside) if np.isfinite(distance(middle)) else (inside, middle)
    points = np.linspace(low, inside, SCAN)
    values = np.array([distance(t) for t in points])
    ends = []
    for k in range(SCAN):
        left, right = max(k - 1, 0), min(k + 1, SCAN - 1)
        if np.isfinite(values[k]) and values[k] <= min(values[left], values[right]):
            end = minimize_scalar(distance, bounds=(points[left], points[right]), options={"xatol": 1e-13})
            ends += [(values[k], points[k]), (float(end.fun), float(end.x))]
    if not ends or min(ends)[0] > 10 * ROUNDING:
        return None
    return _zeros(coefficients + min(ends)[1] * direction, terms, spans, 100 * ROUNDING)


def _distance(coefficients: np.ndarray, terms: list[_WeightedTerm], spans: list[list[np.ndarray]]) -> float:
    """How far covariances are from their structures, relative to the largest; infinite where they are none."""
    found, scale = _covariances(coefficients, spans)
    worst = 0.0
    for term, D in zip(terms, found, strict=True):
        x = _coordinates(term.structure, D, scale)
        if x is None:
            return np.inf
        worst = max(worst, float(np.abs(_covariance(term.structure, x) - D).max()) / scale)
    return worst


def _covariances(coefficients: np.ndarray, spans: list[list[np.ndarray]]) -> tuple[list[np.ndarray], float]:
    """The ``(q, q)`` of every term, and the size of the largest entry, that of the residual variance among them."""
    found, at = [], 0
    for span in spans:
        found.append(np.tensordot(coefficients[at : at + len(span)], np.stack(span), 1))
        at += len(span)
    return found, float(max(np.abs(coefficients[-1]), *(np.abs(D).max() for D in found)))


def _coordinates(structure: Structure, D: np.ndarray, scale: float) -> np.ndarray | None:
    """Those near a symmetric matrix; None where it is no covariance."""
    values, vectors = np.linalg.eigh(D)
    if values[0] < -ROUNDING * scale:
        return None
    x: np.ndarray = structure.near(vectors * np.sqrt(np.where(values > ROUNDING * scale, values, 0.0)))
    return x


def _zeros(
    coefficients: np.ndarray,
    terms: list[_WeightedTerm],
    spans: list[list[np.ndarray]],
    tolerance: float = 10 * ROUNDING,
) -> int | None:
    """Standard deviations that are zero in covariances given by their coefficients, or None if these are none.

    The last coefficient is the part of the residual variance.
    """
    found, scale = _covariances(coefficients, spans)
    if coefficients[-1] < -ROUNDING * scale:
        return None
    zeros = 0
    for term, D in zip(terms, found, strict=True):
        x = _coordinates(term.structure, D, scale)
        if x is None or np.abs(_covariance(term.structure, x) - D).max() > tolerance * scale:
            return None
        sizes = np.asarray(term.structure.sizes(x[:, None]))
        zeros += term.structure.n_zeros((sizes <= np.sqrt(ROUNDING * scale))[:, 0])
    return zeros
