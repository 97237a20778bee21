"""What a model says of its residuals: ``dispersion="~ Sex"`` and ``residual="ar1(Days | Subject)"``."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mixjax.checks import DataError, FormulaError, some_of
from mixjax.covariance import canonical
from mixjax.design import ResidualTerm
from mixjax.formula.algebra import INTERCEPT
from mixjax.formula.context import Context
from mixjax.formula.evaluate import Columns, numbers
from mixjax.formula.own_formulas import OwnColumns
from mixjax.formula.parse import Group, KernelPart, ResidualPart, expand_groups, kernel_part
from mixjax.formula.random_terms import TermColumns, coordinates_of
from mixjax.formula.syntax import Piece, expression, read
from mixjax.formula.table import combinations, level_name
from mixjax.kernels import KERNELS

# Name -> an example.
STRUCTURES = {
    "ar1": "ar1(Days | Subject)", "car1": "car1(time | Subject)", "cs": "cs(1 | Subject)",
    "exp": "exp(u + v | plot)", "gau": "gau(u + v | plot)", "mat": "mat(u + v | plot, nu = 1.5)",
}  # fmt: skip
# Structures that mixjax.mmrm has.
BY_VISIT = "us, csh, toeph, ... by visits: mixjax.mmrm"


class DispersionColumns(NamedTuple):
    """Attributes:
    W: ``(n, d)`` without a constant. names: of its columns. columns: as functions of rows. kept: ``(c,)`` which of
        the columns are in W.
    """

    W: np.ndarray
    names: tuple[str, ...]
    columns: Columns
    kept: np.ndarray


def dispersion_columns(own: OwnColumns) -> DispersionColumns:
    """The columns of a dispersion formula, whose intercept is sigma itself.

    Raises:
        FormulaError: it has no intercept. DataError: no column varies.
    """
    terms = own.columns.effects.terms
    if INTERCEPT not in terms:
        raise FormulaError(
            f"dispersion='~ {own.columns.effects}' takes the intercept away, and that is sigma: leave the 0 or -1 out"
        )
    names = own.columns.names
    kept = own.kept.copy()
    kept[names.index("Intercept")] = False
    if not kept.any():
        raise DataError(
            f"dispersion='~ {own.columns.effects}' has no column that varies between rows: leave it out, or name a "
            "column that does"
        )
    W = own.X[:, [name != "Intercept" for name in own.names]]
    return DispersionColumns(
        np.ascontiguousarray(W), tuple(name for name in own.names if name != "Intercept"), own.columns, kept
    )


def parse_residual(text: Any, columns: Collection[str]) -> ResidualPart:
    """Read ``ar1(time | group)``.

    Raises:
        FormulaError: it is no such structure.
    """
    wanted = f"residual must be text such as {STRUCTURES['ar1']!r}"
    if not isinstance(text, str):
        raise FormulaError(f"{wanted}, got {type(text).__name__}")
    piece = read(text.strip().removeprefix("~")).unwrapped()
    call = piece.call()
    known = f"there are {', '.join(STRUCTURES)}; {BY_VISIT}"
    if call is None:
        raise FormulaError(f"{wanted}, got {text!r}: {known}")
    name, inside = call
    if name not in STRUCTURES and canonical(name) is not None:
        raise FormulaError(
            f"residual={text!r} is a covariance between visits, which mixjax.mmrm fits, without random effects beside "
            f"it: write mixjax.mmrm('y ~ x + {text.strip()}', data)"
        )
    if name not in STRUCTURES:
        raise FormulaError(f"there is no residual structure '{name}' ({text!r}): {known}")
    if name in KERNELS:
        return _by_distance(piece, name, inside)
    parts = inside.split("|", "||")
    if len(parts) != 2 or not all(part.tokens for part in parts) or inside.outer("||"):
        raise FormulaError(f"residual={text!r} must read {STRUCTURES[name]}: time before the bar, the group after it")
    groups = expand_groups(f"{parts[1]}")
    # a/b stands for the finest, as in nlme.
    group = groups[0]
    if len(groups) > 1 and "/" not in f"{parts[1]}":
        raise FormulaError(f"residual={text!r} has {len(groups)} grouping factors, and residuals have one")
    shown = f"{parts[0]}".strip()
    if name == "cs":
        if shown != "1":
            raise FormulaError(
                f"residual={text!r}: all residuals of a group have one correlation, whatever the time: write "
                f"cs(1 | {group.name})"
            )
        return ResidualPart(f"{piece}", name, None, group)
    if shown == "1":
        if name == "car1":
            raise FormulaError(f"residual={text!r} needs times: write car1(time | {group.name})")
        return ResidualPart(f"{piece}", name, None, group)
    return ResidualPart(f"{piece}", name, expression(parts[0], columns), group)


def _by_distance(piece: Piece, name: str, inside: Piece) -> ResidualPart:
    first, *options = inside.split(",")
    kernel = kernel_part(piece, name, first.unwrapped(), options)
    if kernel.kernel.k > 1:
        raise FormulaError(
            f"residual='{piece}': of residuals the smoothness is held: write mat(..., nu = 0.5), 1.5, 2.5, and compare "
            "their criteria"
        )
    group = Group("1", ()) if kernel.within is None else kernel.within
    return ResidualPart(kernel.shown, name, None, group, kernel)


def residual_term(part: ResidualPart, frame: pd.DataFrame, context: Context, terms: Sequence[TermColumns]) -> Any:
    """The structure on the rows of a table.

    Raises:
        DataError: no group has two rows; times are no times, or repeat within a group; a random term is not constant
            within groups, or is the same as the structure.
    """
    codes, names = np.zeros(len(frame), np.int64), ["all rows"]
    if part.group.columns:
        codes, levels = combinations(frame, part.group.columns)
        names = [":".join(values) for values in levels]
    if np.bincount(codes).max() < 2:
        raise DataError(
            f"residual='{part.text}': every level of '{part.group.name}' has one row, and one residual has no "
            "correlation; use a coarser grouping factor"
        )
    for term in terms:
        inner = np.full(len(names), -1)
        inner[codes] = term.codes
        apart = np.flatnonzero(inner[codes] != term.codes)
        if len(apart):
            raise DataError(
                f"residual='{part.text}': rows of one level of '{part.group.name}' ({names[codes[apart[0]]]!r}) have "
                f"different levels of '{term.labels.group}', and residuals are correlated within the levels of every "
                "random term only (as in nlme): use a finer grouping factor here; or a random term with this "
                "structure, which is a latent process beside independent residuals, another model"
            )
        one_to_one = len(np.unique(inner)) == len(names)
        if part.structure == "cs" and one_to_one and _has_constant(term.Z, codes):
            raise DataError(
                f"residual='{part.text}' is one correlation of all rows of '{part.group.name}', and so is the random "
                f"intercept of '{term.labels.group}': the data cannot tell them apart; leave one of them out"
            )
    if part.structure == "cs":
        return ResidualTerm("cs", codes)
    if part.kernel is not None:
        return _places(part, part.kernel, frame, codes, names)
    time = _times(part, frame, context, codes)
    order = np.lexsort((time, codes))
    twice = np.flatnonzero((np.diff(codes[order]) == 0) & (np.diff(time[order]) == 0))
    if len(twice):
        row = order[twice[0]]
        shown = level_name(frame[part.time.column].iloc[row]) if part.time and part.time.column else f"{time[row]:g}"
        raise DataError(
            f"residual='{part.text}': {part.time} is {shown} more than once in '{part.group.name}' "
            f"{names[codes[row]]!r} ({len(twice)} such rows in all), and two residuals at one time have correlation 1: "
            "add what tells these rows apart to the grouping factor, or make times that differ"
        )
    return ResidualTerm(part.structure, codes, time)


def _places(
    part: ResidualPart, kernel: KernelPart, frame: pd.DataFrame, codes: np.ndarray, names: Sequence[str]
) -> ResidualTerm:
    at = coordinates_of(part.text, kernel, frame)
    both = np.column_stack([codes, at])
    _, first, counts = np.unique(both, axis=0, return_index=True, return_counts=True)
    if (counts > 1).any():
        row = int(first[counts > 1][0])
        raise DataError(
            f"residual='{part.text}': two rows of {names[codes[row]]!r} are at one place ({int((counts > 1).sum())} "
            "such places), and their residuals would have correlation 1: a random effect with this structure "
            f"leaves independent residuals beside it, '+ {part.text}' in the formula"
        )
    return ResidualTerm(part.structure, codes, at, kernel.kernel.smoothness)


def _has_constant(Z: np.ndarray, codes: np.ndarray) -> bool:
    """Whether the columns of a random term have a combination that is the same not zero in all rows of every group."""
    coefficients, *_ = np.linalg.lstsq(Z, np.ones(len(Z)), rcond=None)
    return bool(np.abs(Z @ coefficients - 1.0).max() < 1e-8)


def _times(part: ResidualPart, frame: pd.DataFrame, context: Context, codes: np.ndarray) -> np.ndarray:
    if part.time is None:  # the order of the rows
        order = np.argsort(codes, kind="stable")
        starts = np.cumsum(np.bincount(codes)) - np.bincount(codes)
        time = np.empty(len(codes))
        time[order] = np.arange(len(codes)) - starts[codes[order]]
        return time
    name = part.time.column
    column = None if name is None else frame[name]
    if column is not None and isinstance(column.dtype, pd.CategoricalDtype):
        if part.structure == "car1":
            raise DataError(
                f"residual='{part.text}': '{name}' is a category, and car1 needs times as numbers; ar1 counts levels"
            )
        own: np.ndarray = np.asarray(column.cat.codes, np.float64)
        return own
    if column is not None and not pd.api.types.is_numeric_dtype(column):
        levels = some_of(sorted({level_name(value) for value in column}))
        raise DataError(
            f"residual='{part.text}': '{name}' holds text ({levels}), which has no order: make a categorical column "
            "with the order that is meant, or numbers"
        )
    time, _ = numbers(part.time, frame, context, "residual")
    if part.structure == "ar1" and (time != np.round(time)).any():
        bad = time[time != np.round(time)][0]
        raise DataError(
            f"residual='{part.text}': ar1 counts distance in whole steps, and {part.time} is {bad:g} somewhere; write "
            f"car1({part.time} | {part.group.name}) for times of any kind"
        )
    found: np.ndarray = time
    return found
