"""The random terms of a formula on the rows of a table."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mixjax.checks import DataError, FormulaError, some_of
from mixjax.covariance import Covariance
from mixjax.design import TermLabels
from mixjax.formula.algebra import INTERCEPT, Effects
from mixjax.formula.checks import check_columns_of_term, check_structure, warn_of_constant_slopes
from mixjax.formula.context import Context
from mixjax.formula.evaluate import Columns, columns_of
from mixjax.formula.parse import Group, KernelPart, ParsedFormula, RandomPart
from mixjax.formula.reading import read_columns
from mixjax.formula.table import combinations, content, refuse_dates
from mixjax.kernels import Kernel
from mixjax.relationship import Relationship


@dataclass(frozen=True)
class TermColumns:
    """One random term on the rows.

    Attributes:
        Z: ``(n, q)``. codes: ``(n,)`` levels. levels: ``(m, columns)`` names of the values that make every level.
        labels: names. columns: of Z as functions of rows. group, structure: as the formula has them.
        relationship: known covariance of the levels, which are then all of its own, in its order; or None.
        kernel: correlation of the levels by distance, or None; coordinates ``(m, d)`` and within ``(m,)`` say where
            they are.
    """

    Z: np.ndarray
    codes: np.ndarray
    levels: np.ndarray
    labels: TermLabels
    columns: Columns
    group: Group
    structure: str | Covariance
    relationship: Relationship | None = None
    kernel: Kernel | None = None
    coordinates: np.ndarray | None = None
    within: np.ndarray | None = None


def random_terms(parsed: ParsedFormula, frame: pd.DataFrame, context: Context) -> list[TermColumns]:
    """The random terms by decreasing number of levels; those of one factor share its codes."""
    factors: dict[str, tuple[np.ndarray, np.ndarray, tuple[str, ...]]] = {}
    places: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    terms = []
    for part in parsed.random:
        if part.group.name not in factors:
            factors[part.group.name] = (
                _grouping_factor(part.group, frame) if part.relationship is None else _known_factor(part, frame)
            )
            if part.kernel is not None:
                places[part.group.name] = _places(part, frame, factors[part.group.name][0])
        codes, levels, names = factors[part.group.name]
        for block in part.blocks():
            Z, columns = columns_of(block, frame, context)
            check_columns_of_term(Z, columns.names, part.group.name)
            check_structure(part.structure, columns, f"{block} | {part.group.name}")
            if part.structure == "us":
                warn_of_constant_slopes(Z, columns.names, codes, f"({block} | {part.group.name})", part.group.name)
            labels = TermLabels(part.group.name, columns.names, names, part.smooth is not None)
            own = TermColumns(Z, codes, levels, labels, columns, part.group, part.structure, part.relationship)
            if part.kernel is not None:
                coordinates, within = places[part.group.name]
                own = replace(own, kernel=part.kernel.kernel, coordinates=coordinates, within=within)
            terms.append(own)
    _check_no_effect_twice(terms)
    return sorted(terms, key=lambda term: -len(term.labels.levels))


def _grouping_factor(group: Group, frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    codes, levels = combinations(frame, group.columns)
    names = tuple(":".join(values) for values in levels)
    if len(names) < 2 and group.columns:
        raise DataError(
            f"grouping factor '{group.name}' has one level ('{names[0]}'); a variance between levels needs two or more"
        )
    return codes, levels, names


def _places(part: RandomPart, frame: pd.DataFrame, codes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Coordinates ``(m, d)`` of the levels of a term with a kernel, and codes ``(m,)`` of what they lie in.

    Raises:
        DataError: a column that says where a level is holds no numbers; all places are alone in their groups.
    """
    assert part.kernel is not None
    first = np.unique(codes, return_index=True)[1]
    coordinates = coordinates_of(part.group.name, part.kernel, frame)[first]
    if part.kernel.within is None:
        return coordinates, np.zeros(len(first), np.int64)
    within = combinations(frame, part.kernel.within.columns)[0][first]
    if np.bincount(within).max() < 2:
        raise DataError(
            f"'{part.group.name}': no level of '{part.kernel.within.name}' has two places, so nothing is known of a "
            "correlation by distance; use a coarser grouping factor, or 1 where all places are one map"
        )
    return coordinates, within


class NewPlaces(NamedTuple):
    """Places that a fit does not know.

    Attributes:
        levels: ``(k, columns)`` names of the values that make each. coordinates: ``(k, d)``. within: ``(k,)`` codes of
            the fit.
    """

    levels: np.ndarray
    coordinates: np.ndarray
    within: np.ndarray


def new_places(part: RandomPart, newdata: Any, known: np.ndarray, places: Any) -> NewPlaces:
    """Places of a new table that are not among the levels of a term with a kernel, in groups that are.

    Args:
        known: ``(m, columns)`` names of the values that make every level. places: with ``within (m,)`` of these.
    """
    assert part.kernel is not None
    frame = pd.DataFrame(read_columns(newdata, part.group.columns)[0]).dropna()
    codes, levels = combinations(frame, part.group.columns)
    first = np.unique(codes, return_index=True)[1]
    inside = 0 if part.kernel.within is None else len(part.kernel.within.columns)
    of_group = {tuple(own[:inside]): int(code) for own, code in zip(known, places.within, strict=True)}
    seen = {tuple(own) for own in known}
    new = [i for i, own in enumerate(levels) if tuple(own) not in seen and tuple(own[:inside]) in of_group]
    if not new:
        return NewPlaces(levels[:0], places.coordinates[:0], places.within[:0])
    coordinates = coordinates_of(part.group.name, part.kernel, frame)[first[new]]
    return NewPlaces(levels[new], coordinates, np.array([of_group[tuple(levels[i][:inside])] for i in new]))


def coordinates_of(term: str, kernel: KernelPart, frame: pd.DataFrame) -> np.ndarray:
    """``(n, d)`` where the rows are; ``term`` as messages call it."""
    refuse_dates(frame, kernel.coordinates)
    columns = []
    for name in kernel.coordinates:
        column = frame[name]
        if not pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column):
            raise DataError(
                f"'{term}' needs numbers that say how far apart places are, and column '{name}' holds {content(column)}"
            )
        columns.append(np.asarray(column, np.float64))
    return np.stack(columns, axis=1)


def with_own_groups(parsed: ParsedFormula, frame: pd.DataFrame) -> ParsedFormula:
    """glmmTMB's ``propto(0 + g | dummy, K)``, where dummy has one level and the effects are the levels of g, as
    ``propto(1 | g, K)``."""
    return replace(parsed, random=tuple(_with_own_group(part, frame) for part in parsed.random))


def _with_own_group(part: RandomPart, frame: pd.DataFrame) -> RandomPart:
    terms, expressions = part.effects.terms, part.effects.expressions
    one = len(terms) == 1 and len(terms[0]) == 1 and len(expressions) == 1 and part.structure == "us"
    column = (expressions[0].column or expressions[0].factor_of) if one else None
    if not part.known or column is None or frame[part.group.columns[0]].nunique() > 1:
        return part
    return replace(part, effects=Effects("1", (INTERCEPT,), ()), group=Group(column, (column,)))


def _known_factor(part: RandomPart, frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    """Levels of a grouping factor as its known covariance has them; those without rows stay.

    Raises:
        DataError: the table has levels that the covariance lacks.
    """
    relationship = part.relationship
    assert relationship is not None
    codes, levels = combinations(frame, part.group.columns)
    own = [":".join(values) for values in levels]
    at = {name: i for i, name in enumerate(relationship.levels)}
    missing = [name for name in own if name not in at]
    if missing:
        known = some_of(list(relationship.levels))
        raise DataError(
            f"'{part.known}' has no row for {len(missing)} of the {len(own)} levels of '{part.group.columns[0]}' in "
            f"the table: {some_of([repr(name) for name in missing])}; its levels are {known}. Add them to it "
            "(unrelated levels have 0 beside the diagonal), or leave their rows out"
        )
    places = np.array([at[name] for name in own])
    return places[codes], np.array(relationship.levels, object)[:, None], relationship.levels


def _check_no_effect_twice(terms: list[TermColumns]) -> None:
    """One effect of one grouping factor in two terms has two variances of which only the sum is known."""
    seen: list[tuple[TermColumns, str]] = []
    for term in terms:
        for effect in term.labels.effects:
            for other, same in seen:
                if effect == same and np.array_equal(term.codes, other.codes) and _alike(term, other):
                    groups = " and ".join(dict.fromkeys(f"'{t.labels.group}'" for t in (other, term)))
                    raise FormulaError(
                        f"effect '{effect}' of group {groups} stands in two random terms with the same levels, so its "
                        "variance cannot be estimated; write one term, or 0 + in one of them: "
                        f"(1 | {term.labels.group}) + (0 + x | {term.labels.group})"
                    )
            seen.append((term, effect))


def _alike(a: TermColumns, b: TermColumns) -> bool:
    """The levels of two terms have the same covariance."""
    if a.kernel is not None or b.kernel is not None:
        return a.kernel == b.kernel
    if a.relationship is None or b.relationship is None:
        return a.relationship is b.relationship
    return np.array_equal(a.relationship.matrix, b.relationship.matrix)
