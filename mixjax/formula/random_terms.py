"""The random terms of a formula on the rows of a table."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from mixjax.checks import DataError, FormulaError
from mixjax.covariance import Covariance
from mixjax.design import TermLabels
from mixjax.formula.checks import check_columns_of_term, check_structure, warn_of_constant_slopes
from mixjax.formula.context import Context
from mixjax.formula.evaluate import Columns, columns_of
from mixjax.formula.parse import Group, ParsedFormula
from mixjax.formula.table import combinations


@dataclass(frozen=True)
class TermColumns:
    """One random term on the rows.

    Attributes:
        Z: ``(n, q)``. codes: ``(n,)`` levels. levels: ``(m, columns)`` names of the values that make every level.
        labels: names. columns: of Z as functions of rows. group, structure: as the formula has them.
    """

    Z: np.ndarray
    codes: np.ndarray
    levels: np.ndarray
    labels: TermLabels
    columns: Columns
    group: Group
    structure: str | Covariance


def random_terms(parsed: ParsedFormula, frame: pd.DataFrame, context: Context) -> list[TermColumns]:
    """The random terms by decreasing number of levels; those of one factor share its codes."""
    factors: dict[str, tuple[np.ndarray, np.ndarray, tuple[str, ...]]] = {}
    terms = []
    for part in parsed.random:
        if part.group.name not in factors:
            factors[part.group.name] = _grouping_factor(part.group, frame)
        codes, levels, names = factors[part.group.name]
        for block in part.blocks():
            Z, columns = columns_of(block, frame, context)
            check_columns_of_term(Z, columns.names, part.group.name)
            check_structure(part.structure, columns, f"{block} | {part.group.name}")
            if part.structure == "us":
                warn_of_constant_slopes(Z, columns.names, codes, f"({block} | {part.group.name})", part.group.name)
            labels = TermLabels(part.group.name, columns.names, names)
            terms.append(TermColumns(Z, codes, levels, labels, columns, part.group, part.structure))
    _check_no_effect_twice(terms)
    return sorted(terms, key=lambda term: -len(term.labels.levels))


def _grouping_factor(group: Group, frame: pd.DataFrame) -> tuple[np.ndarray, np.ndarray, tuple[str, ...]]:
    codes, levels = combinations(frame, group.columns)
    names = tuple(":".join(values) for values in levels)
    if len(names) < 2:
        raise DataError(
            f"grouping factor '{group.name}' has one level ('{names[0]}'); a variance between levels needs two or more"
        )
    return codes, levels, names


def _check_no_effect_twice(terms: list[TermColumns]) -> None:
    """One effect of one grouping factor in two terms has two variances of which only the sum is known."""
    seen: list[tuple[TermColumns, str]] = []
    for term in terms:
        for effect in term.labels.effects:
            for other, same in seen:
                if effect == same and np.array_equal(term.codes, other.codes):
                    groups = " and ".join(dict.fromkeys(f"'{t.labels.group}'" for t in (other, term)))
                    raise FormulaError(
                        f"effect '{effect}' of group {groups} stands in two random terms with the same levels, so its "
                        "variance cannot be estimated; write one term, or 0 + in one of them: "
                        f"(1 | {term.labels.group}) + (0 + x | {term.labels.group})"
                    )
            seen.append((term, effect))
