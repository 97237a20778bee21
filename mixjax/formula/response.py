"""The left-hand side of a generalised linear mixed model: counts of successes and numbers of trials, or other values.

Whether values can come from a distribution is the family's to check; here they are read and coded, by R's rules.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mixjax.checks import DataError, DataWarning, FormulaError, listed, some_of, warn
from mixjax.formula.checks import COUNTS, check_varies, check_weights
from mixjax.formula.coding import Factor
from mixjax.formula.context import Context
from mixjax.formula.evaluate import evaluate, numbers
from mixjax.formula.parse import ParsedFormula
from mixjax.formula.syntax import Expression
from mixjax.formula.table import TextColumn, content, is_text, level_name

# Families of successes among trials.
TRIALS = ("binomial", "custom")
# A proportion times its number of trials is a whole number up to this share of the trials.
WHOLE = 1e-6


class Response(NamedTuple):
    """The response of a generalised linear mixed model as arrays.

    Attributes:
        y: ``(n,)`` values; of trials the counts of successes.
        size: ``(n,)`` numbers of trials, or None for one each and for families without.
        weights: ``(n,)`` case weights, or None.
        success: what counts as success, as a phrase; empty where there are no trials.
        size_from: the argument that gave the numbers of trials, ``"size"`` or ``"weights"``, or None.
    """

    y: np.ndarray
    size: np.ndarray | None
    weights: np.ndarray | None
    success: str
    size_from: str | None


def check_family(family: Any, size: Any) -> None:
    """Raise ValueError for what is no family, DataError for trials without one."""
    if family is None:
        if size is not None:
            raise DataError(
                "size= are numbers of trials of a binomial response, and a linear mixed model has none: name a family, "
                "or pass precisions as weights="
            )
    elif not isinstance(getattr(family, "name", None), str) or not callable(getattr(family, "check", None)):
        raise ValueError(f"family must be a family of distributions or None, got {family!r}")


def check_pair(parsed: ParsedFormula, family: Any) -> None:
    """Raise FormulaError where ``cbind()`` is not two columns, or not what the family takes."""
    if "cbind" not in parsed.response.functions:
        return
    shown = parsed.response.shown
    if family.name not in TRIALS:
        raise FormulaError(
            f"'{shown}': cbind(successes, failures) is a response of trials; a {family.name} response is one column"
        )
    if len(parsed.pair) != 2:
        found = f", got {len(parsed.pair)}" if parsed.pair else ""
        raise FormulaError(
            f"'{shown}': cbind() takes two columns, successes and failures{found}, and stands alone before '~'"
        )


# --- rows without trials -----------------------------------------------------------------------------------------


def rows_with_trials(
    parsed: ParsedFormula, frame: pd.DataFrame, beside: dict[str, np.ndarray], family: Any, context: Context
) -> np.ndarray:
    """``(n,)`` which rows have trials; warns with their count where some have none.

    Raises:
        DataError: numbers of trials are negative or no whole numbers; successes without trials; no row is left.
    """
    trials, name = _trials(parsed, frame, beside, family, context)
    if trials is None:
        return np.ones(len(frame), bool)
    _refuse(trials < 0, f"{name} must be numbers of trials, but is negative", trials, frame.index)
    if "size" in beside:
        _refuse(trials != np.round(trials), f"{name} must be whole numbers of trials, but is not", trials, frame.index)
    has = trials > 0
    if has.all():
        return has
    if not parsed.pair:
        value, _ = evaluate(parsed.response, frame, context)
        if isinstance(value, np.ndarray) and value.shape == has.shape:
            claimed = ~has & (np.isinf(value) | ((value > 0) & ("size" in beside)))
            _refuse(claimed, f"{name} is 0, but '{parsed.response}' is not", value, frame.index)
    k = int((~has).sum())
    if k == len(has):
        raise DataError(f"{name} is 0 in all {k} rows: there are no trials")
    warn(f"{k} of {len(has)} rows left out because they have no trials ({name} is 0)")
    return has


def _trials(
    parsed: ParsedFormula, frame: pd.DataFrame, beside: dict[str, np.ndarray], family: Any, context: Context
) -> tuple[np.ndarray | None, str]:
    """Numbers of trials as given, and what they are called; None where nothing says how many."""
    if family.name not in TRIALS:
        return None, ""
    if "size" in beside:
        return beside["size"], "size="
    if parsed.pair:
        successes, failures = (_counts(e, frame, context) for e in parsed.pair)
        return successes + failures, f"the sum of '{parsed.pair[0]}' and '{parsed.pair[1]}'"
    return (beside["weights"], "weights=") if family.name == "binomial" and "weights" in beside else (None, "")


def _counts(e: Expression, frame: pd.DataFrame, context: Context) -> np.ndarray:
    counts, _ = numbers(e, frame, context, "response")
    _refuse(counts < 0, f"'{e}' must be counts, but is negative", counts, frame.index)
    return counts


def _refuse(rows: np.ndarray, what: str, values: np.ndarray, index: pd.Index) -> None:
    """Raise DataError naming the first of the rows, if there are any."""
    if rows.any():
        first = int(np.flatnonzero(rows)[0])
        raise DataError(f"{what} in {int(rows.sum())} rows (first: row {index[first]}: {values[first]:g})")


# --- values ------------------------------------------------------------------------------------------------------


def read_response(
    parsed: ParsedFormula,
    frame: pd.DataFrame,
    beside: dict[str, np.ndarray],
    offset: np.ndarray | None,
    family: Any,
    context: Context,
    given: Mapping[str, Any],
) -> Response:
    """The response, as its family takes it.

    Args:
        parsed: the formula. frame: complete rows, all with trials. context: names beside columns.
        beside: weights and sizes given beside the table, if they were. offset: ``(n,)`` or None.
        family: with a ``name``, and ``check(y, size, name)``, which raises DataError for impossible values.
        given: ``"size"`` and ``"weights"`` as the user gave them.

    Raises:
        DataError: the values are none of the family's, or leave no finite estimate; with the name and a cure.

    Warns:
        DataWarning: counts of successes are not whole; weights that are no numbers of trials.
    """
    shown = parsed.response.shown
    weights, size = beside.get("weights"), beside.get("size")
    if size is not None and family.name not in TRIALS:
        raise DataError(
            f"size= are numbers of trials, and a {family.name} response has none; an exposure is an offset: "
            "offset(log(exposure))"
        )
    if parsed.pair:
        if size is not None:
            raise DataError(f"'{shown}' gives the numbers of trials already: leave size= out")
        s, f = (_counts(e, frame, context) for e in parsed.pair)
        found = Response(s, s + f, weights, f"'{parsed.pair[0]}' (failures: '{parsed.pair[1]}')", None)
    elif family.name == "binomial":
        found = _binomial(parsed.response, frame, size, weights, context, given)
    else:
        y, _ = numbers(parsed.response, frame, context, "response")
        found = Response(y, size, weights, "", None if size is None else "size")
    check_weights(found.weights)
    check_values(found, shown, offset, family, frame.index)
    return found._replace(size=None) if found.size is not None and (found.size == 1).all() else found


def check_values(found: Response, shown: str, offset: np.ndarray | None, family: Any, index: pd.Index) -> None:
    """Raise DataError where a response can come from no distribution of the family, or leaves no finite estimate.

    Args:
        found: the response. shown: as messages call it. offset: ``(n,)`` or None. index: labels of the rows.

    Warns:
        DataWarning: counts of successes are not whole.
    """
    y, size = found.y, found.size
    most = np.ones(len(y)) if size is None else size
    if family.name == "binomial":
        if (y > most).any():
            first = int(np.argmax(y > most))
            raise DataError(
                f"'{shown}' has more successes than trials in {int((y > most).sum())} rows (first: row "
                f"{index[first]}: {y[first]:g} of {most[first]:g}); size= is the number of trials, not of failures"
            )
        for what, all_are in (("failures", (y == 0).all()), ("successes", (y == most).all())):
            if all_are:
                raise DataError(_no_estimate(f"all {len(y)} rows of '{shown}' are {what}"))
    if family.name in COUNTS and (y == 0).all():
        raise DataError(_no_estimate(f"all {len(y)} counts of '{shown}' are 0", "which column it is"))
    fractions = ~_whole(y) if family.name == "binomial" else np.zeros(len(y), bool)
    if fractions.any():
        first = int(np.argmax(fractions))
        warn(
            f"'{shown}' gives no whole number of successes in {int(fractions.sum())} of {len(y)} rows (first: row "
            f"{index[first]}: {y[first]:g} of {most[first]:g}), and the binomial likelihood is continued between whole "
            "numbers; counts with size= or cbind(successes, failures) leave no doubt"
        )
    with warnings.catch_warnings():
        if fractions.any():
            warnings.simplefilter("ignore", DataWarning)  # a second one, without the row
        family.check(y, size, shown)
    if size is None and family.name != "binomial" and (offset is None or (offset == offset[0]).all()):
        check_varies(y, shown)


def check_many(Y: np.ndarray, size: np.ndarray | None, shown: str, family: Any) -> None:
    """Raise DataError, naming the response, where one of many ``(B, n)`` can come from no distribution of the family.

    Missing values, and responses that leave no finite estimate, are for each fit's result code to tell.
    """
    sound = np.flatnonzero(np.isfinite(Y).all(1) & (Y != 0).any(1))
    sizes = None if size is None else np.tile(size, len(sound))
    try:
        family.check(Y[sound].reshape(-1), sizes, shown)
    except DataError:
        for i in sound:
            family.check(Y[i], size, f"response {i + 1} of Y")
        raise


def _no_estimate(what: str, besides: str = "what counts as success") -> str:
    return f"{what}, so the intercept has no finite estimate: look at subset=, at missing values and at {besides}"


def _whole(values: np.ndarray, tolerance: Any = 0.0) -> np.ndarray:
    whole: np.ndarray = np.abs(values - np.round(values)) <= tolerance
    return whole


# --- binomial ----------------------------------------------------------------------------------------------------


def _binomial(
    e: Expression,
    frame: pd.DataFrame,
    size: np.ndarray | None,
    weights: np.ndarray | None,
    context: Context,
    given: Mapping[str, Any],
) -> Response:
    """0 and 1, truth values, two levels; counts with sizes; proportions with sizes or weights."""
    trials = {what: f"'{name}'" if isinstance(name, str) else f"{what}=" for what, name in given.items()}
    value, _ = evaluate(e, frame, context)
    if isinstance(value, Factor) and not all(isinstance(level, bool | np.bool_) for level in value.levels):
        y, success = _of_levels(e, value, frame)
        if size is not None:
            raise DataError(
                f"the response '{e}' has two levels, one trial a row, so there are no numbers of trials: leave size= "
                "out; how often a row counts is weights="
            )
        return _weighted(y, weights, e, success, frame.index)
    y, _ = numbers(e, frame, context, "response")
    single = f"'{e}' is {'True' if isinstance(value, Factor) else '1'}"
    if size is not None:
        if _divisor(e) is not None or (((y >= 0) & (y <= 1)).all() and not _whole(y).all()):
            return Response(
                _successes(y, size), size, weights, f"'{e}' as a proportion of {trials['size']} trials", "size"
            )
        return Response(y, size, weights, f"'{e}' of {trials['size']} trials", "size")
    if weights is not None:
        if not ((y >= 0) & (y <= 1)).all():
            raise DataError(
                f"'{e}' goes from {y.min():g} to {y.max():g}, and weights= of a binomial response are the numbers of "
                "trials of proportions between 0 and 1, as in R: give counts with size="
            )
        success = single if _whole(y).all() else f"'{e}' as a proportion of {trials['weights']} trials"
        return _weighted(y, weights, e, success, frame.index)
    _check_zero_one(e, y, frame.index)
    return Response(y, None, None, single, None)


def _of_levels(e: Expression, value: Factor, frame: pd.DataFrame) -> tuple[np.ndarray, str]:
    """R's rule: the first level is failure, the second success."""
    none = int((value.codes < 0).sum())
    if none:
        raise DataError(f"the response '{e}' has no value in {none} rows: leave them out with subset=")
    there = np.unique(value.codes)
    text = e.column is not None and len(there) > 2 and is_text(frame[e.column])
    if text and TextColumn(frame[e.column]).mostly_numbers():
        raise DataError(f"the response '{e}' is not numeric: it holds {content(frame[e.column])}")
    levels = [level_name(value.levels[k]) for k in there]
    if len(levels) == 1:
        raise DataError(_no_estimate(f"the response '{e}' is '{levels[0]}' in all {len(value)} rows"))
    if len(levels) > 2:
        raise DataError(
            f"the response '{e}' has {len(levels)} levels ({some_of(levels)}), and a binomial one has two: ordinal or "
            f"multinomial is not here; keep two with subset=, or set one against the others: I({e} == "
            f"{listed([value.levels[there[-1]]])})"
        )
    return (value.codes == there[1]).astype(float), f"'{e}' is {levels[1]} (failure: {levels[0]})"


def _weighted(y: np.ndarray, weights: np.ndarray | None, e: Expression, success: str, index: pd.Index) -> Response:
    """Weights are numbers of trials, as in R. Of 0 and 1 these are as good as case weights, which need not be whole."""
    if weights is None:
        return Response(y, None, None, success, None)
    if _whole(y).all() and not _whole(weights).all():
        first = int(np.argmin(_whole(weights)))
        warn(
            f"weights= are no whole numbers (first: row {index[first]}: {weights[first]:g}), so no numbers of trials: "
            f"they multiply the log-likelihood of a row of '{e}'"
        )
        return Response(y, None, weights, success, None)
    return Response(_successes(y, weights), weights, None, success, "weights")


def _successes(p: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Counts of successes from proportions; those that are no whole numbers stay as they are."""
    product = p * size
    counts: np.ndarray = np.where(_whole(product, WHOLE * size), np.round(product), product)
    return counts


def _divisor(e: Expression) -> ast.expr | None:
    """What stands below the line in ``s / n``, also inside ``I()``; None of other expressions."""
    match e.tree:
        case (
            ast.BinOp(op=ast.Div(), right=right)
            | ast.Call(func=ast.Name(id="I"), args=[ast.BinOp(op=ast.Div(), right=right)])
        ):
            return right
    return None


def _check_zero_one(e: Expression, y: np.ndarray, index: pd.Index) -> None:
    """Single trials are 0 or 1; anything else needs to say how many there were."""
    wrong = (y != 0) & (y != 1)
    if not wrong.any():
        return
    first = int(np.flatnonzero(wrong)[0])
    where = f"row {index[first]}: {y[first]:g}"
    if ((y >= 0) & (y <= 1)).all():
        divisor = _divisor(e)
        name = e.aliases.get(divisor.id) if isinstance(divisor, ast.Name) else None
        raise DataError(
            f"the response '{e}' holds proportions (first: {where}), which say nothing without the numbers of trials: "
            f"give the numbers of trials as size={'...' if name is None else repr(name)}"
        )
    if (y < 0).any():
        raise DataError(
            f"the response '{e}' is neither 0 nor 1 (first: {where}); a binomial response is 0 and 1, True and False, "
            "two levels, or counts with size="
        )
    values = np.unique(y)
    if len(values) == 2 and not (values == 0).any():
        raise DataError(
            f"the response '{e}' is {values[0]:g} or {values[1]:g}, not 0 or 1: say which is success, I({e} == "
            f"{values[1]:g})"
        )
    raise DataError(
        f"the response '{e}' holds counts (up to {y.max():g}) or other numbers than 0 and 1 (first: {where}): give the "
        "numbers of trials as size=, or cbind(successes, failures); counts without trials are family 'poisson'"
    )
