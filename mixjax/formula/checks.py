"""Whether the data can tell what a model asks for: noise, random effects, and which of them are fixed as well."""

from __future__ import annotations

import numpy as np

from mixjax.bases import Orthonormal, in_span, orthonormal_columns
from mixjax.checks import DataError, some_of, warn
from mixjax.design import Design, Labels


def check_varies(y: np.ndarray, response: str) -> None:
    """Refuse a response of one value."""
    if (y == y[0]).all():
        raise DataError(f"the response '{response}' is constant ({y[0]:g}): there is nothing to model")


def check_noise(y: np.ndarray, X: np.ndarray, Q: np.ndarray, weights: np.ndarray | None, response: str) -> None:
    """A response that the fixed effects reproduce up to rounding leaves no variance to model.

    Args:
        Q: ``(n, p)`` basis of X times the roots of the weights.
    """
    if in_span(y, X, Q, None if weights is None else np.sqrt(weights)):
        raise DataError(
            f"the fixed effects reproduce the response '{response}' exactly: no variance is left; look for a column "
            "that was computed from the response"
        )


def check_columns_of_term(Z: np.ndarray, names: tuple[str, ...], group: str) -> None:
    independent = orthonormal_columns(Z, None)[2]
    if not independent.all():
        culprits = some_of([name for name, keep in zip(names, independent, strict=True) if not keep])
        raise DataError(
            f"random effects of '{group}' cannot be told apart: other effects of the term determine {culprits}; "
            "leave it out of the term"
        )


def warn_of_constant_slopes(Z: np.ndarray, names: tuple[str, ...], codes: np.ndarray, term: str, group: str) -> None:
    """Effects that no level shows at two values, beside others of that kind with which they may correlate.

    Such effects move all rows of a level alike, so the data show one sum of them per level: its variance is a quadratic
    form in the effects' values, whose coefficients are the variances and covariances asked for. An effect that is alone
    in this (``0 + x``, ``x || g``) has one variance, which can be estimated.
    """
    if Z.shape[1] < 2:
        return
    first = np.zeros(codes.max() + 1, np.int64)
    first[codes[::-1]] = np.arange(len(codes))[::-1]
    within = (Z[first[codes]] == Z).all(axis=0)
    k = int(within.sum())
    flagged = [name for name, flag in zip(names, within & ~(Z[0] == Z).all(axis=0), strict=True) if flag]
    if k < 2 or len(first) == len(codes) or not flagged:
        return
    one = len(flagged) == 1
    effects = f"the effect {flagged[0]!r}" if one else f"the effects {some_of([repr(name) for name in flagged])}"
    does, its = ("does", "its variance and correlation") if one else ("do", "their variances and correlations")
    if len(np.unique(Z[first][:, within], axis=0)) < k * (k + 1) // 2:  # fewer equations than unknowns
        known = f"cannot all be told {'from those of the other effects' if one else 'apart'}"
    else:
        known = "show only in how the variance between levels changes with the values"
    warn(
        f"{effects} of {term} {does} not vary within any level of '{group}': {its} {known}; a random slope needs "
        "values that change within levels"
    )


def check_number_of_effects(n: int, labels: Labels) -> None:
    """Refuse random terms with as many effects as there are rows.

    Raises:
        DataError: names the term and the way to go on.
    """
    for names in labels.terms:
        effects = len(names.levels) * len(names.effects)
        if effects >= n:
            raise DataError(
                f"{n} rows and {effects} random effects in term ({some_of(names.effects, ' + ')} | {names.group}): the "
                "residual variance cannot be told from the random effects; use fewer effects or a coarser grouping "
                "factor, or pass check_identifiable=False to fit it all the same"
            )


def check_identifiable(design: Design, labels: Labels, basis: Orthonormal) -> None:
    """Refuse random terms whose variance the data cannot tell: too many effects, or effects that are fixed as well.

    Args:
        basis: of X times the roots of the weights.

    Raises:
        DataError: names the term and the way to go on.
    """
    n, p = design.X.shape
    check_number_of_effects(n, labels)
    Q, root_w = basis.Q, 1.0 if design.weights is None else np.sqrt(np.asarray(design.weights))
    for term, names in zip(design.terms, labels.terms, strict=True):
        if term.n_groups > p:
            continue  # the levels' columns cannot all lie in the span of X
        for j, effect in enumerate(names.effects):
            columns = np.zeros((n, term.n_groups))
            columns[np.arange(n), term.group] = root_w * term.Z[:, j]
            left = np.linalg.norm(columns - Q @ (Q.T @ columns), axis=0)
            if (left <= 1e-8 * np.linalg.norm(columns, axis=0)).all():
                raise DataError(
                    f"the fixed effects already hold '{effect}' of every level of '{names.group}', so its variance "
                    "cannot be estimated; leave it out of the fixed or of the random effects (or pass "
                    "check_identifiable=False to fit it all the same)"
                )
