"""A formula and a table -> Design and Labels."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
from formulaic import Formula
from formulaic.errors import FactorEvaluationError, FormulaicError
from formulaic.transforms import TRANSFORMS

from mixjax.bases import in_span, orthonormal_columns
from mixjax.design import Design, Labels, RandomTerm, TermLabels
from mixjax.formula.errors import DataError, FormulaError, some_of, warn
from mixjax.formula.parse import (
    Group,
    ParsedFormula,
    names_in,
    names_outside_calls,
    names_outside_factors,
    parse,
    quote_columns,
)
from mixjax.formula.table import (
    TextColumn,
    check_finite,
    column_names,
    complete_rows,
    drop_unused_categories,
    factor_codes,
    is_text,
    refuse_dates,
    refuse_numbers_among_text,
    refuse_unknown,
    row_values,
    to_pandas,
    warn_of_numeric_factors,
)

# What R users write without a prefix, beside formulaic's own transforms.
FUNCTIONS = {name: getattr(np, name) for name in ("sqrt", "abs", "sin", "cos", "tan", "log1p", "expm1", "round")}
# What R users write and formulaic does not know.
CURES = {
    "ns": "use cr(x, df=...) or bs(x, df=...)",
    "cut": "make a column with pandas.cut first",
    "relevel": "order the categories of the column; the first is the base",
    "ifelse": "use np.where(...)",
    "cbind": "fit one response at a time",
    "TRUE": "write True",
    "FALSE": "write False",
}
CONTRASTS = ("treatment", "SAS", "sum", "helmert", "diff", "poly")
WEIGHTS, OFFSET = "(weights)", "(offset)"


def build_design(
    formula: str,
    data: Any,
    weights: Any = None,
    offset: Any = None,
    subset: Any = None,
    contrasts: Mapping[str, str] | None = None,
    context: Mapping[str, Any] | None = None,
) -> tuple[Design, Labels]:
    """Read a formula and a table into arrays and names.

    Args:
        formula: lme4's language; fixed effects and the effects of random terms in formulaic's.
        data: pandas, polars or pyarrow table, or a dict of arrays.
        weights: column name or ``(n,)`` array of precision weights: the residual variance is ``sigma^2 / weights``.
        offset: column name or ``(n,)`` array, added to any ``offset(...)`` of the formula.
        subset: rows to use: ``(n,)`` booleans, or an expression for ``DataFrame.eval``.
        contrasts: column -> ``"treatment"``, ``"sum"``, ``"helmert"``, ``"poly"``, ``"diff"`` or a call such as
            ``"contr.treatment(base='B')"``; columns of X are then named ``recipe[S.A]`` and so on.
        context: names that the formula may use beside columns; by default those visible to the caller.

    Returns:
        Design with float64 arrays; random terms by decreasing number of levels, ties as written, as in lme4.

    Raises:
        FormulaError, DataError: with the name of the culprit.

    Warns:
        DataWarning: rows with missing values or redundant columns were left out; a column of numbers is text; a random
            slope does not vary within levels.

    Example:
        >>> import mixjax as mj
        >>> design, labels = mj.build_design("Reaction ~ Days + (Days | Subject)", mj.datasets.load("sleepstudy"))
        >>> design.X.shape, labels.fixed
        ((180, 2), ('Intercept', 'Days'))
    """
    parsed = parse(formula)
    if not parsed.random:
        raise FormulaError(
            f"{formula!r} has no random term such as (1 | g); for ordinary regression use "
            "statsmodels.formula.api.ols or numpy.linalg.lstsq"
        )
    parsed = quote_columns(parsed, column_names(data))
    context = usable(caller_context() if context is None else context)
    frame, used, n_missing = _used_rows(parsed, data, weights, offset, subset, context, contrasts or {})
    specs: dict[str, Any] = {}

    y = _response(parsed.response, frame, context)
    X, fixed, specs["fixed"] = fixed_effects(parsed.fixed, frame, context, contrasts or {})
    total_offset = frame[OFFSET].to_numpy(float) if OFFSET in frame else None
    for text in parsed.offsets:
        total_offset = expression(text, frame, context, "offset") + (0.0 if total_offset is None else total_offset)
    w = frame[WEIGHTS].to_numpy(float) if WEIGHTS in frame else None
    if w is not None and not (w > 0).all():
        raise DataError(
            f"weights must be positive, but {int((w <= 0).sum())} of {len(w)} are zero or negative; to leave rows out, "
            "use subset="
        )
    X, fixed, dropped = _full_rank(X, fixed, w)
    check_noise(y if total_offset is None else y - total_offset, X, w, parsed.response)

    random = _random_terms(parsed, frame, context)
    specs["random"] = [part.spec for part in random]
    specs["weights"], specs["offset"] = (value if isinstance(value, str) else None for value in (weights, offset))
    specs["context"] = _constants(parsed, frame, context)
    design = Design(
        y=y,
        X=X,
        terms=tuple(RandomTerm(part.Z, part.codes, len(part.labels.levels), part.structure) for part in random),
        weights=w,
        offset=total_offset,
    )
    labels = Labels(
        formula=formula,
        response=parsed.response.strip("`"),
        fixed=tuple(fixed),
        terms=tuple(part.labels for part in random),
        frame=frame.drop(columns=[c for c in (WEIGHTS, OFFSET) if c in frame]),
        dropped_columns=tuple(dropped),
        n_missing=n_missing,
        used=None if used.all() else used,
        specs=specs,
    )
    return design, labels


def caller_context() -> dict[str, Any]:
    """Names visible where mixjax was called from."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "mixjax":
        frame = frame.f_back
    return {**frame.f_globals, **frame.f_locals}


# --- rows ----------------------------------------------------------------------------------------------------------


def _used_rows(
    parsed: ParsedFormula,
    data: Any,
    weights: Any,
    offset: Any,
    subset: Any,
    context: Mapping[str, Any],
    contrasts: Mapping[str, str],
) -> tuple[pd.DataFrame, np.ndarray, int]:
    """The used columns, complete rows only, with weights and offset beside them; which rows of the table these are; and
    the number of rows with missing values."""
    available = column_names(data)
    columns: list[str] = []  # of the table
    arrays: list[str] = []  # variables of the caller that stand for columns
    numeric: list[str] = []  # what is read as numbers or categories, not only as a grouping factor
    for text in (parsed.response, parsed.fixed, *parsed.offsets, *(part.effects for part in parsed.random)):
        for name in names_in(text):
            if name in available:
                columns.append(name)
                numeric.append(name)
            elif _is_array(context.get(name)):
                arrays.append(name)
            elif name not in context and name not in TRANSFORMS:
                refuse_unknown(name, available, f"in '{text}'", data)
    for part in parsed.random:
        for name in part.group.columns:
            if name not in available:
                refuse_unknown(name, available, f"grouping factor '{part.group.name}'", data)
            columns.append(name)
    extra = []
    for name, values in (("weights", weights), ("offset", offset)):
        if isinstance(values, str):
            if values not in available:
                refuse_unknown(values, available, f"{name}=", data)
            extra.append(values)
    table = to_pandas(data, [*columns, *extra] if not isinstance(subset, str) else available)
    if len(table) == 0:
        raise DataError("the table has no rows")
    if len(table) == 1:
        raise DataError("the table has one row, and a model needs many; a dict of single values makes one row")
    # Only a pandas table has an index that other pandas columns can be lined up with.
    index = table.index if isinstance(data, pd.DataFrame) else None

    frame = table.loc[:, list(dict.fromkeys(columns))].copy()
    for name in arrays:
        frame[name] = row_values(f"'{name}'", context[name], index, len(table), numbers=False)
    for key, name, values in ((WEIGHTS, "weights", weights), (OFFSET, "offset", offset)):
        if values is not None:
            column = table[values] if isinstance(values, str) else values
            frame[key] = row_values(name, column, index, len(table))
    refuse_dates(frame, [*numeric, *arrays])
    effects = (parsed.fixed, *(part.effects for part in parsed.random))
    # A response or offset that is a column must be numbers anyway, and `expression` says so.
    computed = (text for text in (parsed.response, *parsed.offsets) if text.strip("`") not in frame)
    refuse_numbers_among_text(frame, _read_by((*effects, *computed), names_outside_factors, frame, contrasts))
    used = _subset_rows(subset, table, index).copy()
    frame = frame[used]
    if len(frame) == 0:
        raise DataError("subset leaves no rows")
    complete = complete_rows(frame)
    n_missing = int((~complete).sum())
    frame = frame[complete]
    used[used] = complete
    check_finite(frame)
    warn_of_numeric_factors(frame, _read_by(effects, names_outside_calls, frame, contrasts))
    return drop_unused_categories(frame.copy()), used, n_missing


def _read_by(
    texts: Iterable[str], names: Callable[[str], list[str]], frame: pd.DataFrame, contrasts: Mapping[str, str]
) -> list[str]:
    """Columns that the texts read, less those that ``contrasts=`` declares to be factors."""
    read = dict.fromkeys(name for text in texts for name in names(text))
    return [name for name in read if name in frame and name not in contrasts]


def _subset_rows(subset: Any, table: pd.DataFrame, index: Any) -> np.ndarray:
    if subset is None:
        return np.ones(len(table), bool)
    if isinstance(subset, str):
        try:
            subset = table.eval(subset)
        except Exception as error:
            raise DataError(f"subset {subset!r} cannot be evaluated: {error}") from error
    rows = row_values("subset", subset, index, len(table), numbers=False)
    if rows.dtype != bool:
        raise DataError(f"subset must be {len(table)} booleans or an expression giving them, got {rows.dtype}")
    return rows


def _constants(parsed: ParsedFormula, frame: pd.DataFrame, context: Mapping[str, Any]) -> dict[str, Any]:
    """Variables of the caller that the formula reads and that new data cannot bring: not columns, nor functions."""
    texts = (parsed.fixed, *parsed.offsets, *(part.effects for part in parsed.random))
    return {
        name: context[name]
        for text in texts
        for name in names_in(text)
        if name not in frame
        and name in context
        and not callable(context[name])
        and not isinstance(context[name], ModuleType)
    }


def _is_array(value: Any) -> bool:
    """A variable that can stand for a column, as opposed to a number, a function or a module."""
    if isinstance(value, list | tuple):
        return len(value) > 1
    return hasattr(value, "shape") and not callable(value) and len(np.shape(value)) == 1


def usable(context: Mapping[str, Any]) -> dict[str, Any]:
    """The caller's names, less those that would hide a function of the formula language without being one.

    R looks functions up in the same way: a variable called ``scale`` does not get in the way of ``scale(x)``.
    """
    taken = {*TRANSFORMS, *FUNCTIONS}
    own = {name: value for name, value in context.items() if name not in taken or callable(value)}
    return {**FUNCTIONS, **own}


# --- columns -------------------------------------------------------------------------------------------------------


def model_matrix(text: str, frame: pd.DataFrame, context: Mapping[str, Any]) -> tuple[np.ndarray, list[str], Any]:
    """Columns of a one-sided formula, their names, and formulaic's spec."""
    try:
        with np.errstate(all="ignore"):  # what is not finite is reported below, by name
            matrix = Formula(text).get_model_matrix(frame, context=dict(context), na_action="ignore", output="numpy")
    except FactorEvaluationError as error:
        cures = [cure for name, cure in CURES.items() if re.search(rf"(?<![\w.]){name}\b", text)]
        texts = {name: TextColumn(frame[name]) for name in names_in(text) if name in frame and is_text(frame[name])}
        cures += [f"column '{name}' holds {own.content()}" for name, own in texts.items() if own.mostly_numbers()]
        raise FormulaError("; ".join([f"'{text}' cannot be evaluated: {_plain(error)}", *cures])) from error
    except FormulaicError as error:
        raise FormulaError(f"'{text}' is not understood: {_plain(error)}") from error
    names = list(matrix.model_spec.column_names)
    columns = np.asarray(matrix, dtype=float).reshape(len(frame), len(names))
    for j, name in enumerate(names):
        bad = ~np.isfinite(columns[:, j])
        if bad.any():
            raise DataError(
                f"'{name}' is not finite in {int(bad.sum())} rows (first: row {frame.index[np.flatnonzero(bad)[0]]}); "
                "leave them out with subset=, or change the expression"
            )
    return columns, names, matrix.model_spec


def _plain(error: Exception) -> str:
    """formulaic's message without its markers and terminal colours."""
    return re.sub(r"\x1b\[[0-9;]*m|[⧛⧚]", "", str(error)).replace("\n", " ")


def expression(text: str, frame: pd.DataFrame, context: Mapping[str, Any], what: str) -> np.ndarray:
    """One numeric column."""
    name = text.strip("`")
    if name in frame:
        column = frame[name]
        if not (pd.api.types.is_numeric_dtype(column) or pd.api.types.is_bool_dtype(column)):
            content = TextColumn(column).content() if is_text(column) else f"{column.dtype} values"
            raise DataError(f"the {what} '{name}' is not numeric: it holds {content}")
        return column.to_numpy(float)
    columns, names, _spec = model_matrix(f"0 + {text}" if _is_call(text) else f"0 + I({text})", frame, context)
    if columns.shape[1] != 1 or "[" in names[0].replace(text, ""):
        raise DataError(f"the {what} '{text}' is not one numeric column: it gives {some_of(names)}")
    return columns[:, 0]


def _is_call(text: str) -> bool:
    return re.fullmatch(r"[\w.]+\s*\(.*\)|`[^`]+`|\w+", text, flags=re.DOTALL) is not None


def _response(text: str, frame: pd.DataFrame, context: Mapping[str, Any]) -> np.ndarray:
    y = expression(text, frame, context, "response")
    if (y == y[0]).all():
        raise DataError(f"the response '{text}' is constant ({y[0]:g}): there is nothing to model")
    return y


def fixed_effects(
    text: str, frame: pd.DataFrame, context: Mapping[str, Any], contrasts: Mapping[str, str]
) -> tuple[np.ndarray, list[str], Any]:
    rename = {}
    for column, spec in contrasts.items():
        if column not in frame:
            refuse_unknown(column, list(frame.columns), "contrasts=")
        name = spec.removeprefix("contr.").split("(")[0] if isinstance(spec, str) else spec
        if not isinstance(spec, str) or name not in CONTRASTS:
            raise DataError(f"contrasts for '{column}' must be one of {', '.join(CONTRASTS)}, got {spec!r}")
        if pd.api.types.is_numeric_dtype(frame[column]):
            raise DataError(f"contrasts= names '{column}', which is numeric: make it a category first")
        call = f"contr.{spec.removeprefix('contr.')}"
        text, count = re.subn(rf"(?<![\w.`]){re.escape(column)}(?![\w(`])", f"C({column}, {call})", text)
        if not count:
            raise DataError(f"contrasts= names '{column}', which is not among the fixed effects '{text}'")
        rename[f"C({column}, {call})"] = column
    X, names, spec = model_matrix(text, frame, context)
    for long, short in rename.items():
        names = [name.replace(long, short) for name in names]
    return X, names, spec


def _full_rank(X: np.ndarray, names: list[str], weights: np.ndarray | None) -> tuple[np.ndarray, list[str], list[str]]:
    """Leave out columns that earlier ones determine, as lme4 does, and say which."""
    independent = orthonormal_columns(X, None if weights is None else np.sqrt(weights))[2]
    dropped = [name for name, keep in zip(names, independent, strict=True) if not keep]
    if dropped:
        warn(f"fixed-effects columns left out because other columns determine them: {some_of(dropped)}")
        X, names = X[:, independent], [name for name, keep in zip(names, independent, strict=True) if keep]
    if X.shape[1] >= X.shape[0]:
        raise DataError(
            f"{X.shape[1]} fixed-effects columns for {X.shape[0]} rows leave nothing to estimate sigma from"
        )
    return X, names, dropped


def check_noise(y: np.ndarray, X: np.ndarray, weights: np.ndarray | None, response: str) -> None:
    """A response that the fixed effects reproduce up to rounding leaves no variance to model."""
    if in_span(y, X, None if weights is None else np.sqrt(weights)):
        raise DataError(
            f"the fixed effects reproduce the response '{response}' exactly: no variance is left; look for a column "
            "that was computed from the response"
        )


# --- random terms --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Term:
    Z: np.ndarray
    codes: np.ndarray
    labels: TermLabels
    spec: Any
    structure: str


def _random_terms(parsed: ParsedFormula, frame: pd.DataFrame, context: Mapping[str, Any]) -> list[_Term]:
    factors: dict[str, tuple[np.ndarray, list[str]]] = {}
    terms = []
    for part in parsed.random:
        if part.group.name not in factors:
            factors[part.group.name] = _grouping_factor(part.group, frame)
        codes, levels = factors[part.group.name]
        for effects in independent_effects(part.effects) if part.independent else [part.effects]:
            Z, names, spec = model_matrix(effects, frame, context)
            if not names:
                raise FormulaError(f"random term '({part.effects} | {part.group.name})' has no effects")
            _check_columns_of_term(Z, names, part.group.name)
            if part.structure == "us":
                _warn_of_constant_slopes(Z, names, codes, f"({effects} | {part.group.name})", part.group.name)
            labels = TermLabels(part.group.name, tuple(names), tuple(levels))
            terms.append(_Term(Z, codes, labels, spec, part.structure))
    _check_no_effect_twice(terms)
    return sorted(terms, key=lambda term: -len(term.labels.levels))


def independent_effects(effects: str) -> list[str]:
    """``x + z || g``: one term each for the intercept, x and z. A factor keeps its own block of correlated columns."""
    try:
        terms = [str(term) for term in Formula(effects)]
    except FormulaicError as error:
        raise FormulaError(f"'{effects}' is not understood: {_plain(error)}") from error
    return ["1" if term == "1" else f"0 + {term}" for term in terms]


def _grouping_factor(group: Group, frame: pd.DataFrame) -> tuple[np.ndarray, list[str]]:
    codes, levels = factor_codes(frame, group.columns)
    if len(levels) < 2:
        raise DataError(
            f"grouping factor '{group.name}' has one level ('{levels[0]}'); a variance between levels needs two or more"
        )
    return codes, levels


def _check_columns_of_term(Z: np.ndarray, names: list[str], group: str) -> None:
    independent = orthonormal_columns(Z, None)[2]
    if not independent.all():
        culprits = some_of([name for name, keep in zip(names, independent, strict=True) if not keep])
        raise DataError(
            f"random effects of '{group}' cannot be told apart: other effects of the term determine {culprits}; "
            "leave it out of the term"
        )


def _warn_of_constant_slopes(Z: np.ndarray, names: list[str], codes: np.ndarray, term: str, group: str) -> None:
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


def _check_no_effect_twice(terms: list[_Term]) -> None:
    """One effect of one grouping factor in two terms has two variances of which only the sum is known."""
    seen: list[tuple[_Term, str]] = []
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


def check_identifiable(design: Design, labels: Labels) -> None:
    """Refuse random terms whose variance the data cannot tell: too many effects, or effects that are fixed as well.

    Raises:
        DataError: names the term and the way to go on.
    """
    n, p = design.X.shape
    check_number_of_effects(n, labels)
    Q = None
    for term, names in zip(design.terms, labels.terms, strict=True):
        if term.n_groups > p:
            continue  # the levels' columns cannot all lie in the span of X
        Q = orthonormal_columns(design.X, None)[0] if Q is None else Q
        for j, effect in enumerate(names.effects):
            columns = np.zeros((n, term.n_groups))
            columns[np.arange(n), term.group] = term.Z[:, j]
            left = np.linalg.norm(columns - Q @ (Q.T @ columns), axis=0)
            if (left <= 1e-8 * np.linalg.norm(columns, axis=0)).all():
                raise DataError(
                    f"the fixed effects already hold '{effect}' of every level of '{names.group}', so its variance "
                    "cannot be estimated; leave it out of the fixed or of the random effects (or pass "
                    "check_identifiable=False to fit it all the same)"
                )
