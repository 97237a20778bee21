"""Penalised smooths in formulas, ``s(x, k = 10, bs = "cr", by = f)``: what is written, and their columns on rows."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from mixjax.checks import DataError, FormulaError, some_of
from mixjax.formula.smooth_bases import MOST_FUNCTIONS, Smooth, smooth_of
from mixjax.formula.syntax import Expression, Piece, expression, quoted
from mixjax.formula.table import level_names

BASES = ("cr", "ps", "tp")
# Basis functions where the formula does not say, as in mgcv, and at least.
USUAL, FEWEST = 10, {"cr": 3, "tp": 3, "ps": 4}
# mgcv's other smooths, of several variables.
OTHERS = ("te", "ti", "t2")
# The names that the columns of a smooth have in expressions, which no formula can write.
LINE, BEND = "__line__", "__bend__"


@dataclass(frozen=True)
class SmoothPart:
    """A smooth as written.

    Attributes:
        text: as formulas write it. x: the variable. k: number of basis functions. bs: the basis. by: a factor with a
            smooth for each of its levels, or None.
    """

    text: str
    x: Expression
    k: int
    bs: str
    by: str | None

    @property
    def expressions(self) -> tuple[Expression, ...]:
        """All that it reads."""
        return (self.x,) if self.by is None else (self.x, expression(f"C({quoted(self.by)})", [self.by]))


def smooth_part(piece: Piece, columns: Collection[str]) -> SmoothPart | None:
    """A smooth; None of a piece that is none.

    Raises:
        FormulaError: what is wrong with it.
    """
    call = piece.unwrapped().call()
    if call is None or call[0] not in ("s", *OTHERS):
        return None
    if call[0] in OTHERS:
        raise FormulaError(f"'{piece}': smooths of several variables are not there; s(x) is of one. mgcv has them")
    arguments = call[1].split(",")
    named = {a.tokens[0].text: a.tokens[2:] for a in arguments if len(a.tokens) > 1 and a.tokens[1].text == "="}
    variables = [a for a in arguments if not (len(a.tokens) > 1 and a.tokens[1].text == "=")]
    if len(variables) != 1 or not variables[0].tokens:
        raise FormulaError(
            f"'{piece}' must read s(x, k = 10, bs = 'cr'), of one variable; smooths of several are not there"
        )
    others = [name for name in named if name not in ("k", "bs", "by")]
    if others:
        raise FormulaError(
            f"'{piece}': {some_of([repr(name) for name in others])} is not understood: the options are k, bs and by "
            "(penalties are of second derivatives; how smooth it is is estimated)"
        )
    text = {name: "".join(token.text for token in tokens) for name, tokens in named.items()}
    bs = text.get("bs", "'tp'").strip("'\"")
    if bs not in BASES:
        raise FormulaError(f"'{piece}': bs = {text['bs']} is not there; bases are {', '.join(map(repr, BASES))}")
    k = text.get("k", str(USUAL))
    if not k.isdigit() or not FEWEST[bs] <= int(k) <= MOST_FUNCTIONS:
        raise FormulaError(f"'{piece}': k is a number of basis functions, {FEWEST[bs]} to {MOST_FUNCTIONS}, got {k}")
    x = expression(variables[0], columns)
    by = text["by"].strip("`") if "by" in text else None
    if by is not None and (len(named["by"]) != 1 or named["by"][0].kind not in ("name", "quoted")):
        raise FormulaError(f"'{piece}': by is the name of a column, a factor, got {text['by']!r}")
    if by in x.columns:
        raise FormulaError(f"'{piece}': the smooth and its by are of one column")
    return SmoothPart(str(piece), x, int(k), bs, by)


def expressions_of(part: SmoothPart, frame: pd.DataFrame) -> list[tuple[str, Expression, Expression]]:
    """Per smooth, of which there is one for every level of ``by``: its name, its line, and its other columns.

    Raises:
        DataError: ``by`` is no factor.
    """
    name, columns, more = f"s({part.x.shown})", part.x.columns, ""
    levels: list[str | None] = [None]
    if part.by is not None:
        column = frame[part.by]
        if pd.api.types.is_numeric_dtype(column) and not pd.api.types.is_bool_dtype(column):
            raise DataError(
                f"'{part.text}': by = {part.by} is numeric, and smooths are by the levels of a factor, a "
                "categorical column; a coefficient of a number that varies along the smooth is not here (mgcv has it)"
            )
        codes, found = level_names(column)
        levels = [found[code] for code in np.unique(codes)]
        columns, more = (*columns, part.by), f", by=__c{len(columns)}__, levels={levels!r}"
    made = []
    for level in levels:
        own = name if level is None else f"{name}:{part.by}[{level}]"
        options = f"{part.x.code}, k={part.k}, bs={part.bs!r}, name={own!r}{more}"
        options += "" if level is None else f", level={level!r}"
        line, bend = (
            Expression(shown, f"{function}({options})", columns, part.x.names, (*part.x.functions, function))
            for shown, function in ((f"{own}.fx1", LINE), (own, BEND))
        )
        made.append((own, line, bend))
    return made


# --- their columns ---------------------------------------------------------------------------------------------------


def _functions(x: Any, k: int, bs: str, name: str, state: dict[str, Any]) -> tuple[Smooth, np.ndarray]:
    values = np.asarray(x)
    if values.dtype.kind not in "iuf":
        raise DataError(f"{name}: a smooth is of numbers, and there are {values.dtype} values")
    values = values.astype(float)
    if "smooth" not in state:
        state["smooth"] = smooth_of(values, k, bs, name)
    smooth: Smooth = state["smooth"]
    return smooth, smooth.functions(values)


def _where(by: Any, level: str | None, levels: list[str]) -> Any:
    """``(n, 1)``, 1.0 on the rows of a level."""
    if level is None:
        return 1.0
    codes, found = level_names(pd.Series(by).reset_index(drop=True))
    unknown = [own for own in (found[code] for code in np.unique(codes[codes >= 0])) if own not in levels]
    if unknown:
        raise DataError(f"{some_of([repr(own) for own in unknown])} is none of the levels of the fit, {levels}")
    return np.array([own == level for own in [*found, ""]])[codes][:, None].astype(float)


def line(
    x: Any,
    k: int,
    bs: str,
    name: str,
    by: Any = None,
    levels: Any = (),
    level: str | None = None,
    _state: Any = None,
) -> np.ndarray:
    """The part of a smooth that is not penalised, ``(n,)``."""
    smooth, B = _functions(x, k, bs, name, _state)
    column: np.ndarray = ((B @ smooth.line)[:, None] * _where(by, level, levels))[:, 0]
    return column


def bend(
    x: Any,
    k: int,
    bs: str,
    name: str,
    by: Any = None,
    levels: Any = (),
    level: str | None = None,
    _state: Any = None,
) -> np.ndarray:
    """The others, ``(n, k - 2)``, whose effects are independent with one variance."""
    smooth, B = _functions(x, k, bs, name, _state)
    columns: np.ndarray = (B @ smooth.bend) * _where(by, level, levels)
    return columns


for function in (line, bend):  # they keep the knots of the fit
    function.__is_stateful_transform__ = True  # type: ignore[attr-defined]
FUNCTIONS = {LINE: line, BEND: bend}
