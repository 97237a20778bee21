"""Whether the data can tell what a model asks for: noise, random effects, and which of them are fixed as well."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mixjax.bases import Orthonormal, in_span, orthonormal_columns
from mixjax.checks import DataError, some_of, warn
from mixjax.covariance import Covariance, Diagonal, Structure, Unstructured
from mixjax.design import Design, Labels, RandomTerm, TermLabels
from mixjax.formula.evaluate import Columns
from mixjax.formula.parse import ParsedFormula

# Structures of effects in an order; those in which distances count.
ORDERED = ("ar1", "hetar1", "homtoep", "toep", "adh")
BY_DISTANCE = ("ar1", "hetar1", "homtoep", "toep")

# Families of counts without trials, their usual link log; families with a dispersion of their own, which effects of
# single rows would describe as well.
COUNTS, DISPERSED = ("poisson", "nbinom"), ("nbinom", "gamma", "inverse_gaussian", "beta")
# A mean offset that is hardly the logarithm of anything, exp(20) = 5e8, and its distance from that of the mean count.
HIGH_OFFSET, ABOVE_COUNTS = 20.0, 15.0


def check_varies(y: np.ndarray, response: str) -> None:
    """Refuse a response of one value."""
    if (y == y[0]).all():
        raise DataError(f"the response '{response}' is constant ({y[0]:g}): there is nothing to model")


def check_weights(weights: np.ndarray | None) -> None:
    """Refuse weights that leave rows out, or worse."""
    if weights is not None and not (weights > 0).all():
        raise DataError(
            f"weights must be positive, but {int((weights <= 0).sum())} of {len(weights)} are zero or negative; to "
            "leave rows out, use subset="
        )


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


def check_structure(structure: str | Covariance, columns: Columns, term: str) -> None:
    """Refuse a covariance structure of effects that it has no meaning for.

    Args:
        columns: of the effects. term: as written.

    Raises:
        DataError: one effect where the structure is of correlations; effects that are not the levels of one factor
            where it is of effects in an order.

    Warns:
        DataWarning: levels whose names count in another order, or with gaps.
    """
    if isinstance(structure, Covariance) or structure not in (*ORDERED, "cs"):
        return
    own = columns.effects
    numeric = [e.shown for e in own.expressions if columns.categories(e) is None]
    of_one = len(own.terms) == 1 and len(own.expressions) == 1 and not numeric
    if structure in ORDERED and not of_one:
        hint = f"; {numeric[0]!r} holds numbers, of which C({numeric[0]}) makes a factor" if numeric else ""
        raise DataError(
            f"'{structure}({term})' is a covariance of effects in an order: write '{structure}(0 + f | g)', the "
            f"effects being the levels of one factor f{hint}; effects of other kinds may have 'cs' or no structure"
        )
    levels = columns.categories(own.expressions[0]) if of_one else None
    if len(columns.names) < 2 or (structure in ORDERED and len(levels or ()) != len(columns.names)):
        one = len(columns.names) < 2
        why = "one effect has no correlations: write" if one else "the effects are to be the levels themselves: write"
        instead = f"'({term})'" if one else f"'{structure}(0 + {own.expressions[0]} | ...)'"
        raise DataError(f"'{structure}({term})': {why} {instead}")
    if structure in ORDERED and levels is not None:
        warn_of_order(structure, [str(level) for level in levels], term)


def warn_of_gaps(frame: Mapping[str, pd.Series] | pd.DataFrame, parsed: ParsedFormula) -> None:
    """Declared categories without rows, between others, of a factor whose levels have distances."""
    placed = [
        (f"'{part.structure}({part.effects} | {part.group.name})'", part.effects.expressions)
        for part in parsed.random
        if part.structure in BY_DISTANCE
    ]
    own = parsed.residual
    if own is not None and own.time is not None:
        placed.append((f"residual='{own.text}'", (own.time,)))
    for what, expressions in placed:
        names = [e.column for e in expressions]
        if len(names) != 1 or names[0] is None:
            continue
        column = frame[names[0]]
        if not isinstance(column.dtype, pd.CategoricalDtype):
            continue
        codes = column.array.codes
        there = np.bincount(codes[codes >= 0], minlength=len(column.dtype.categories)) > 0
        seen = np.flatnonzero(there)
        missing = (
            [str(column.dtype.categories[i]) for i in range(*seen[[0, -1]])[1:] if not there[i]] if len(seen) else []
        )
        if missing:
            warn(
                f"{what} counts distance in levels that have rows, and {some_of(missing)} of '{names[0]}' has none: "
                "the levels on both sides are taken as neighbours"
            )


def warn_of_order(structure: str, levels: list[str], term: str) -> None:
    """Levels whose names are numbers in another order, or with gaps where a structure has distances."""
    found = [re.fullmatch(r"(.*?)(-?\d+(?:\.\d+)?)", level) for level in levels]
    if any(match is None for match in found) or len({match[1] for match in found if match}) > 1:
        return
    steps = np.diff([float(match[2]) for match in found if match])
    if (steps < 0).any():
        warn(
            f"'{structure}({term})' takes the levels in the order {some_of(levels)}: make a categorical column with "
            "the order that is meant"
        )
    elif structure in BY_DISTANCE and not np.allclose(steps, steps[0]):
        at = int(np.argmax(steps > steps.min()))
        warn(
            f"'{structure}({term})' counts distance in levels: {levels[at]} and {levels[at + 1]} are taken as "
            "neighbours, as far apart as all others; a level in between counts only where it has rows"
        )


def check_number_of_effects(
    n: int,
    labels: Labels,
    family: Any = None,
    size: np.ndarray | None = None,
    structures: Sequence[Structure] = (),
    repeated: Sequence[bool] = (),
    known: Sequence[bool] = (),
) -> None:
    """Refuse random terms with as many effects as there are rows, where these could not be told from noise.

    An effect of every row is welcome beside counts, and beside proportions of several trials, whose overdispersion it
    describes. Single trials of 0 or 1 have none.

    Args:
        family: of a generalised linear mixed model; None: linear. size: ``(n,)`` numbers of trials, or None for 1 each.
        structures: of the terms; those are let through whose correlations tell effects of single rows from noise.
        repeated: a level of the term has two rows at one effect, which tell noise from effects that have a structure.
        known: the levels with rows have a known covariance, by which they are told from noise.

    Raises:
        DataError: names the term and the way to go on.

    Warns:
        DataWarning: the family describes overdispersion as well.
    """
    linear = family is None or family.name == "gaussian"
    single = not linear and family.name == "binomial" and (size is None or (size == 1).all())
    for t, names in enumerate(labels.terms):
        if known and known[t]:
            continue
        effects = len(names.levels) * len(names.effects)
        own = structures[t] if structures else None
        structured = own is not None and not isinstance(own, Unstructured | Diagonal)
        told = structured and repeated and repeated[t]
        if effects < n or (told and linear) or (own and own.apart_from_noise and not single):
            continue
        term = f"({some_of(names.effects, ' + ')} | {names.group})"
        if linear:
            why = "the residual variance cannot be told from the random effects"
            if structured and len(names.effects) > 2:
                why += ", which ar1, hetar1 and adh can by their correlations"
            if structured or isinstance(own, Unstructured):
                why += "; a covariance of the rows themselves, without random effects, is mixjax.mmrm's (--repeated)"
        elif single:
            why = "single trials, each 0 or 1, say nothing of effects of single rows"
        elif effects > n and not structured:
            why = "so many cannot be told apart"
        else:
            if family.name in DISPERSED:
                warn(
                    f"term {term} has an effect for every row, and the {family.name} family describes overdispersion "
                    f"too: the data hardly tell the two apart; leave the term out, or the family's own for one without"
                )
            continue
        raise DataError(
            f"{n} rows and {effects} random effects in term {term}: {why}; use fewer effects or a coarser grouping "
            "factor, or pass check_identifiable=False to fit it all the same"
        )


def check_identifiable(design: Design, labels: Labels, basis: Orthonormal, family: Any = None) -> None:
    """Refuse random terms whose variance the data cannot tell: too many effects, or effects that are fixed as well.

    Args:
        basis: of X, times the roots of the weights in a linear mixed model. family: of a generalised one.

    Raises:
        DataError: names the term and the way to go on.
    """
    n, p = design.X.shape
    seen = [_seen(term) if n <= term.n_groups * np.shape(term.Z)[1] else None for term in design.terms]
    apart = [bool((np.asarray(term.Z) != 0).sum(1).max() == 1) for term in design.terms]  # a row has one effect
    repeated = [own is not None and one and bool(own.max() > 1) for own, one in zip(seen, apart, strict=True)]
    known = [term.kernel is not None or (term.levels is not None and _correlated(term)) for term in design.terms]
    check_number_of_effects(n, labels, family, design.size, design.structures, repeated, known)
    for own, structure, names in zip(seen, design.structures, labels.terms, strict=True):
        if own is not None and structure.apart_from_noise:
            _check_seen(own, names)
    plain = design.weights is None or family is not None
    Q, root_w = basis.Q, 1.0 if plain else np.sqrt(np.asarray(design.weights))
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


def _correlated(term: RandomTerm) -> bool:
    """The known covariance of the levels that have rows is not that of independent levels with one variance."""
    L = np.asarray(term.levels)[np.unique(np.asarray(term.group))]
    K = L @ L.T
    return bool(np.abs(K - K[0, 0] * np.eye(len(K))).max() > 1e-8 * np.abs(K).max())


def _seen(term: RandomTerm) -> np.ndarray:
    """``(levels, q)``: numbers of rows of a level in which an effect is not zero."""
    seen = np.zeros((term.n_groups, np.shape(term.Z)[1]), np.int64)
    np.add.at(seen, np.asarray(term.group), np.asarray(term.Z) != 0)
    return seen


def _check_seen(seen: np.ndarray, names: TermLabels) -> None:
    """Correlations tell effects from noise only where levels show three of them or more, or one of them twice."""
    if (seen > 0).sum(1).max() < 3 and seen.max() < 2:
        raise DataError(
            f"no level of '{names.group}' has rows at three of the effects {some_of(names.effects)} or two rows at "
            "one: the residual variance cannot be told from the random effects; use a coarser grouping factor, or pass "
            "check_identifiable=False to fit it all the same"
        )


# --- offsets of generalised linear mixed models ----------------------------------------------------------------------


def refuse_infinite_offset(offset: np.ndarray, name: str, index: pd.Index) -> None:
    """Raise DataError where an offset is infinite, as the logarithm of no exposure is."""
    infinite = np.isinf(offset)
    if infinite.any():
        raise DataError(
            f"the offset '{name}' is infinite in {int(infinite.sum())} rows (first: row "
            f"{index[np.flatnonzero(infinite)[0]]}), as the logarithm of zero exposure is: drop the row or rows "
            "(subset=), or add to the exposure"
        )


def warn_of_high_offset(y: np.ndarray, offset: np.ndarray | None, family: Any) -> None:
    """An exposure that should have been its logarithm."""
    if family.name not in COUNTS or getattr(family, "link", "log") != "log" or offset is None:
        return
    if offset.mean() > max(HIGH_OFFSET, ABOVE_COUNTS + np.log(max(y.mean(), 1.0))):
        warn(
            f"the offset is {offset.mean():.4g} on average, and counts are {y.mean():.4g}: an offset is on the scale "
            "of the linear predictor; did you mean log(exposure)?"
        )
