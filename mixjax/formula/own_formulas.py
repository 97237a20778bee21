"""Formulas of a family's own parameters: ``dispformula``, ``ziformula``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mixjax.bases import orthonormal_columns
from mixjax.checks import DataError, FormulaError, some_of, warn
from mixjax.formula.algebra import INTERCEPT, Effects
from mixjax.formula.context import Context
from mixjax.formula.evaluate import Columns, columns_of
from mixjax.formula.parse import ParsedFormula, parse

# Option -> an example.
EXAMPLES = {"dispformula": "~ treatment", "ziformula": "~ 1", "dispersion": "~ treatment"}


class OwnColumns(NamedTuple):
    """A formula of a parameter that has met its table.

    Attributes:
        option: ``"dispformula"`` or ``"ziformula"``. X: ``(n, r)`` of full rank. names: of its columns.
        columns: as functions of rows, and ``kept``: which of these are in X.
    """

    option: str
    X: np.ndarray
    names: tuple[str, ...]
    columns: Columns
    kept: np.ndarray


def parse_own(option: str, text: Any, columns: Any) -> Effects | None:
    """The terms of ``~ x + z``; None where the formula has no more to say than its absence: ``~ 1`` of a dispersion,
    which is one number anyway, ``~ 0`` of zero inflation, which there is then not.

    Raises:
        FormulaError: it is no such formula.
    """
    wanted = f"{option} must be text such as '{EXAMPLES[option]}'"
    if not isinstance(text, str):
        raise FormulaError(f"{wanted}, got {type(text).__name__}")
    left, tilde, right = text.partition("~")
    if not tilde or left.strip():
        raise FormulaError(f"{wanted}, without a response, got {text!r}")
    parsed = parse(f"y ~ {right}", columns)
    if parsed.random:
        raise FormulaError(
            f"{option}={text!r} has a random term ({parsed.random[0].effects} | {parsed.random[0].group.name}), and "
            "here are fixed effects only: leave it out, or make a fixed effect of the factor"
        )
    if parsed.smooths:
        raise FormulaError(f"{option}={text!r} has a smooth, and here are fixed effects only: bs(x, df = 4) is one")
    if parsed.offsets:
        raise FormulaError(f"{option}={text!r} has an offset, and here are terms with coefficients only: leave it out")
    found = parsed.fixed
    if option == "ziformula":
        return found if found.terms else None
    if not found.terms:
        raise FormulaError(f"{option}={text!r} has no terms; for one common parameter leave it out")
    return None if found.terms == (INTERCEPT,) else found


def own_columns(parsed: ParsedFormula, frame: pd.DataFrame, context: Context) -> list[OwnColumns]:
    """Their columns on the rows of the fit, those that others determine left out, of which a warning says so."""
    found = []
    for option, effects in parsed.own:
        X, columns = columns_of(effects, frame, context)
        kept = orthonormal_columns(X, None).independent
        if not kept.all():
            left = [name for name, keep in zip(columns.names, kept, strict=True) if not keep]
            warn(f"columns of {option} left out because other columns of it determine them: {some_of(left)}")
        names = tuple(name for name, keep in zip(columns.names, kept, strict=True) if keep)
        if not names:
            raise DataError(f"{option} has no column that is not zero everywhere")
        if len(names) >= len(X):
            raise DataError(f"{option} has {len(names)} columns for {len(X)} rows: {some_of(list(names))}")
        found.append(OwnColumns(option, np.ascontiguousarray(X[:, kept]), names, columns, kept))
    return found


def refuse_without_parameter(given: Mapping[str, Any], family: Any) -> None:
    """Raise ValueError where a dispersion is to depend on columns that the family does not have."""
    if given.get("dispformula") is None or family.plain.n_psi == 1:
        return
    if family.plain.n_psi:
        names = ", ".join(family.plain.psi_names)
        raise ValueError(f"dispformula= is of one parameter, and the {family.plain.name} family has several: {names}")
    other = {"poisson": ": 'nbinom' is a family of counts with one", "binomial": ": an effect of every row gives "
             "proportions more variance"}.get(family.plain.name, "")  # fmt: skip
    raise ValueError(
        f"dispformula= models a parameter of the family, and the {family.plain.name} family has none{other}; leave it "
        "out"
    )
