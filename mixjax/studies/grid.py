"""The grid of a study: its cells, the source of data in each, and names that change nothing."""

from __future__ import annotations

import inspect
import itertools
import json
import math
from collections.abc import Collection, Mapping, Sequence, Set
from typing import Any

import numpy as np
import pandas as pd

from mixjax.checks import check_list, warn
from mixjax.fitted.generalized import GeneralizedFitted
from mixjax.fitted.record import Fitted
from mixjax.fitted.repeated import RepeatedFitted
from mixjax.studies.describe import describe
from mixjax.studies.scenario import scenario_of
from mixjax.studies.trial import trial_of

MOST_CELLS = 10**5  # each of which has a design


def combinations(grid: Any, columns: Sequence[str] = ()) -> list[dict[str, Any]]:
    """Values of every cell; ``columns`` are names that a grid may not have."""
    if grid is None:
        return [{}]
    if isinstance(grid, Mapping):
        lists = {name: _plain_values(name, values) for name, values in grid.items()}
        if (number := math.prod(map(len, lists.values()))) > MOST_CELLS:
            raise ValueError(f"the grid has {number} cells, and may have {MOST_CELLS}: name fewer values")
        cells = [dict(zip(lists, combination, strict=True)) for combination in itertools.product(*lists.values())]
    else:
        cells = [dict(cell) for cell in check_list("grid", grid, MOST_CELLS)]
        if not cells or any(set(cell) != set(cells[0]) for cell in cells):
            raise ValueError("a grid as a list needs dicts of the same names, one per cell")
    for name in cells[0]:
        if not isinstance(name, str):
            raise ValueError(f"names of the grid are text, those of the source's arguments; got {name!r}")
        if name in columns or name.startswith("failed: "):
            raise ValueError(
                f"the grid's name {name!r} is that of a column of the results; call it something else, such as "
                f"grid={{'{name}_': ...}} with the source lambda {name}_: source({name}={name}_)"
            )
    found: set[str] = set()
    for cell in cells:
        unseen: list[str] = []
        text = json.dumps(describe(cell, unseen), sort_keys=True)
        if text in found and not unseen:
            raise ValueError(f"the grid has the cell {named(cell)} twice, and it would have the same replicates twice")
        found.add(text)
    return cells


def _plain_values(name: str, values: Any) -> list[Any]:
    # A set has no order that another process would have, too.
    if isinstance(values, str | Set) or not hasattr(values, "__iter__"):
        raise ValueError(f"grid[{name!r}] must be a list of values, got {values!r}")
    found = check_list(f"grid[{name!r}]", values, MOST_CELLS)
    if not found:
        raise ValueError(f"grid[{name!r}] must be a list of values, and is empty")
    return [value.item() if isinstance(value, np.generic) else value for value in found]


def cell_of(cells: pd.DataFrame, i: int) -> dict[Any, Any]:
    """The values of cell i. pandas before 3 makes no records of a table without columns, which a study without a grid
    has."""
    records: list[dict[Any, Any]] = cells.iloc[[i]].to_dict("records")
    return records[0] if records else {}


def named(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in values.items())


def source_of(source: Any, values: Mapping[str, Any], options: Collection[str]) -> Any:
    """The source of the data of one cell.

    Args:
        source: scenario, rows of a population, fit, or a function of the grid's names that returns one of these.
        values: of the cell. options: names of the study's own arguments, which no name of a grid stands for.
    """
    if callable(source) and not hasattr(source, "tables"):
        signature = inspect.signature(source)
        shown = f"{getattr(source, '__name__', 'source')}{signature}"
        own = set(signature.parameters) - {p.name for p in signature.parameters.values() if p.kind is p.VAR_KEYWORD}
        if taken := [name for name in values if name not in own and name in options]:
            raise ValueError(
                f"the grid's {', '.join(taken)} is an option of mixjax.study and no argument of {shown}: make one "
                "study for each of its values"
            )
        try:
            signature.bind(**values)
        except TypeError as error:
            raise ValueError(f"{shown} does not take the grid's {list(values)}: {error}") from error
        source = source(**values)
    elif values:
        names = ", ".join(values)
        hint = ""
        if is_fit(source):
            how = f"lambda {names}: mixjax.scenario_of(fit).on(table({names}))"
            hint = f", such as {how}, with your own table of predictors"
        raise ValueError(f"the source does not depend on the grid's {names}: pass a function of these{hint}")
    if not hasattr(source, "tables") and is_fit(source):
        return truth_of(source)
    if not hasattr(source, "tables"):
        raise ValueError(
            "data come from mixjax.scenario(...), from population.rows(n), from a fit, or from a function that returns "
            f"one of these; got {type(source).__name__}"
        )
    return source


def warn_of_ignored(cells: list[dict[str, Any]], data: list[Any], unseen: list[str]) -> None:
    """Warn of names of the grid whose values change neither data nor truth, whatever the others are."""
    if unseen:  # what cannot be seen may be what changes
        return
    texts = [json.dumps(own, sort_keys=True, default=str) for own in data]
    for name in cells[0]:
        by_others: dict[str, list[int]] = {}
        for i, cell in enumerate(cells):
            rest = json.dumps(
                describe({other: value for other, value in cell.items() if other != name}), sort_keys=True
            )
            by_others.setdefault(rest, []).append(i)
        several = [group for group in by_others.values() if len(group) > 1]
        if several and all(len({texts[i] for i in group}) == 1 for group in several):
            warn(
                f"the data do not depend on the grid's {name!r}: the source takes it and makes the same of each of its "
                "values, so that cells differ by their random numbers alone"
            )


def is_fit(source: Any) -> bool:
    return isinstance(getattr(source, "record", source), Fitted | GeneralizedFitted | RepeatedFitted)


def truth_of(fit: Any) -> Any:
    """A fit with its estimates as the truth: a scenario, or of repeated measures a trial."""
    record = getattr(fit, "record", fit)
    return trial_of(record) if isinstance(record, RepeatedFitted) else scenario_of(fit)
