"""Smooths of a formula as what they are: a fixed column each, and a random term of one level with one variance."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd

from mixjax.checks import FormulaError
from mixjax.formula.algebra import Effects
from mixjax.formula.parse import Group, ParsedFormula, RandomPart
from mixjax.formula.smooths import expressions_of


def with_smooths(parsed: ParsedFormula, frame: pd.DataFrame) -> ParsedFormula:
    """The formula with the columns of its smooths among the fixed effects and behind the random terms.

    Raises:
        FormulaError, DataError: two smooths of one name; ``by`` is no factor.
    """
    lines, random, names = [], [], set()
    for part in parsed.smooths:
        for name, line, bend in expressions_of(part, frame):
            if name in names:
                raise FormulaError(f"'{name}' stands twice in the formula: the data cannot tell two smooths apart")
            names.add(name)
            lines.append(line)
            effects = Effects(name, ((name,),), (bend,))
            random.append(RandomPart(effects, Group(name, ()), False, "homdiag", written="s", smooth=part))
    if not lines:
        return parsed
    fixed = parsed.fixed
    terms = tuple(sorted([*fixed.terms, *((line.shown,) for line in lines)], key=len))
    fixed = Effects(fixed.shown, terms, (*fixed.expressions, *lines))
    return replace(parsed, fixed=fixed, random=(*parsed.random, *random))
