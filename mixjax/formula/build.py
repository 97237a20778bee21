"""A formula and a table -> Design and Labels."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mixjax.bases import Orthonormal, orthonormal_columns
from mixjax.checks import DataError, FormulaError, some_of, warn
from mixjax.design import Design, Labels, RandomTerm
from mixjax.families import family_of
from mixjax.formula.algebra import Effects
from mixjax.formula.checks import (
    check_noise,
    check_varies,
    check_weights,
    refuse_infinite_offset,
    warn_of_gaps,
    warn_of_high_offset,
)
from mixjax.formula.context import Context, caller_context, is_trusted, resolve
from mixjax.formula.evaluate import Learnt, columns_of, evaluate, numbers
from mixjax.formula.own_formulas import own_columns, parse_own
from mixjax.formula.parse import ParsedFormula, check_text, with_structures
from mixjax.formula.parse import parse as parse_formula
from mixjax.formula.random_terms import TermColumns, random_terms, with_own_groups
from mixjax.formula.reading import column_names, read_columns
from mixjax.formula.residual_side import dispersion_columns, parse_residual, residual_term
from mixjax.formula.response import Response, check_family, check_pair, read_response, rows_with_trials
from mixjax.formula.smooth_terms import with_smooths
from mixjax.formula.state import FormulaState, kinds_of
from mixjax.formula.syntax import Expression, expression
from mixjax.formula.table import (
    as_numbers,
    check_finite,
    complete_rows,
    refuse_dates,
    refuse_numbers_among_text,
    refuse_unknown,
    row_column,
    row_values,
    selected,
    settle,
    warn_of_numeric_factors,
)

CONTRASTS = ("treatment", "SAS", "sum", "helmert", "diff", "poly")


def build_design(
    formula: str,
    data: Any,
    weights: Any = None,
    offset: Any = None,
    subset: Any = None,
    contrasts: Mapping[str, str] | None = None,
    context: Mapping[str, Any] | None = None,
    trusted: bool | None = None,
    family: Any = None,
    size: Any = None,
) -> tuple[Design, Labels]:
    """Read a formula and a table into arrays and names.

    Args:
        formula: lme4's language between terms; Python's inside them, with R's spellings.
        data: pandas, polars or pyarrow table, or a dict of arrays.
        weights: column name or ``(n,)`` array of precision weights: the residual variance is ``sigma^2 / weights``.
            With a family case weights; as in R, of a binomial response in one column the numbers of trials.
        offset: column name or ``(n,)`` array, added to any ``offset(...)`` of the formula.
        subset: rows to use: ``(n,)`` booleans, or an expression for ``DataFrame.eval``.
        contrasts: column -> ``"treatment"``, ``"sum"``, ``"helmert"``, ``"poly"``, ``"diff"`` or a call such as
            ``"contr.treatment(base='B')"``; columns are then named ``recipe[S.A]`` and so on. Fixed effects and random
            terms are coded alike, as with R's ``contrasts(d$recipe) <- contr.sum(3)``.
        context: names that the formula may use beside columns; by default those visible to the caller.
        trusted: False where the formula comes from a stranger: a formula is code, and then it is read as columns,
            numbers, operators and a list of functions only. None: True unless ``MIXJAX_UNTRUSTED`` is set to 1.
        family: distribution of the response of a generalised linear mixed model; None for a linear one. A binomial
            response is 0 and 1, truth values, or two levels, the second being success; counts or proportions with
            numbers of trials; or ``cbind(successes, failures)``.
        size: column name or ``(n,)`` array of numbers of trials. Rows without trials are left out.

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
    caller = caller_context() if context is None else context
    family = family_of(family, linear=True) if isinstance(family, str) else family
    return build(formula, data, weights, offset, subset, contrasts, caller, trusted, family, size)[:2]


class Built(NamedTuple):
    """A design with its names, and the basis of its X, times the roots of the weights in a linear mixed model."""

    design: Design
    labels: Labels
    basis: Orthonormal


def build(
    formula: str,
    data: Any,
    weights: Any,
    offset: Any,
    subset: Any,
    contrasts: Mapping[str, str] | None,
    caller: Mapping[str, Any],
    trusted: bool | None,
    family: Any = None,
    size: Any = None,
    of_parameters: Mapping[str, str] | None = None,
    residual: str | None = None,
) -> Built:
    """:func:`build_design`, with what was found on the way: orthonormalising X is most of the work on long tables.

    Args:
        caller: names that the formula may use beside columns.
        family: without extra zeros. of_parameters: formulas of its parameters, ``"dispformula"`` and ``"ziformula"``;
            of a linear model ``"dispersion"``. residual: correlation of a linear model's residuals.
    """
    check_text(formula)
    check_family(family, size)
    available = column_names(data)
    parsed, known = read_formula(formula, available, caller, is_trusted(trusted), data, family, of_parameters, residual)
    if not (parsed.random or parsed.smooths) and (family is not None or not (of_parameters or residual)):
        instead = (
            "for ordinary regression add dispersion='~ 1', or use statsmodels.formula.api.ols"
            if family is None
            else "for a generalised linear model without any use statsmodels.formula.api.glm"
        )
        raise FormulaError(f"{formula!r} has no random term such as (1 | g); {instead}")
    contrasts = {} if contrasts is None else contrasts
    if not isinstance(contrasts, Mapping):
        raise DataError(f"contrasts must be a dict, column -> coding, got {contrasts!r}")
    frame, beside, used, n_missing = used_rows(
        parsed, data, available, weights, offset, size, subset, known, caller, contrasts, family
    )
    parsed = with_smooths(with_own_groups(with_contrasts(parsed, frame, contrasts, known), frame), frame)

    if family is None:
        y, _ = numbers(parsed.response, frame, known, "response")
        check_varies(y, str(parsed.response))
    X, fixed = columns_of(parsed.fixed, frame, known)
    trials = {"size": size, "weights": weights}
    total_offset, offsets = offsets_of(parsed, frame, beside.get("offset"), known, family)
    if family is None:
        response = Response(y, None, beside.get("weights"), "", None)
        check_weights(response.weights)
        X, kept, basis = full_rank(X, fixed.names, response.weights)
        own = y if total_offset is None else y - total_offset
        check_noise(own, X, basis.Q, response.weights, parsed.response.shown)
    else:
        response = read_response(parsed, frame, beside, total_offset, family, known, trials)
        warn_of_high_offset(response.y, total_offset, family)
        X, kept, basis = full_rank(X, fixed.names, None, spare="for random effects")
    trials_from = trials.get(response.size_from or "")

    of_psi = {part.option: part for part in own_columns(parsed, frame, known)}
    own_dispersion = of_psi.pop("dispersion", None)
    disp = None if own_dispersion is None else dispersion_columns(own_dispersion)
    by_psi = [of_psi.get("dispformula")] * getattr(family, "n_psi", 0) + [of_psi[k] for k in of_psi if k == "ziformula"]
    random = random_terms(parsed, frame, known)
    part = parsed.residual
    correlated = None if part is None else residual_term(part, frame, known, random)
    design = Design(
        y=response.y,
        X=X,
        terms=tuple(_term(part) for part in random),
        weights=response.weights,
        offset=total_offset,
        size=response.size,
        psi_columns=tuple(part and part.X for part in by_psi) if of_psi else (),
        dispersion=None if disp is None else disp.W,
        residual=correlated,
    )
    state = FormulaState(
        parsed=parsed,
        fixed=fixed,
        kept=kept,
        random=tuple(part.columns for part in random),
        offsets=tuple(offsets),
        weights=weights if isinstance(weights, str) and response.size_from != "weights" else None,
        offset=offset if isinstance(offset, str) else None,
        offset_beside=offset is not None and not isinstance(offset, str),
        contrasts=dict(contrasts),
        context=known,
        kinds=kinds_of(frame, parsed),
        levels={part.labels.group: part.levels for part in random},
        size=trials_from if isinstance(trials_from, str) else None,
        psi=tuple(part and (part.columns, part.kept) for part in by_psi) if of_psi else (),
        dispersion=None if disp is None else (disp.columns, disp.kept),
    )
    names = np.array(fixed.names, object)
    labels = Labels(
        formula=formula,
        response=parsed.response.shown,
        fixed=tuple(names[kept]),
        terms=tuple(part.labels for part in random),
        frame=frame,
        dropped_columns=tuple(names[~kept]),
        n_missing=n_missing,
        used=None if used.all() else used,
        state=state,
        success=response.success,
        psi=tuple(part.names if part else () for part in by_psi) if of_psi else (),
        dispersion=() if disp is None else disp.names,
        residual="" if part is None else part.text,
        residual_group="" if part is None else part.group.name,
    )
    return Built(design, labels, basis)


def _term(part: TermColumns) -> RandomTerm:
    L = None if part.relationship is None else part.relationship.factor
    m = len(part.labels.levels)
    return RandomTerm(part.Z, part.codes, m, part.structure, L, part.kernel, part.coordinates, part.within)


def offsets_of(
    parsed: ParsedFormula, frame: pd.DataFrame, beside: np.ndarray | None, context: Context, family: Any
) -> tuple[np.ndarray | None, list[tuple[Expression, Learnt]]]:
    """The sum of all offsets ``(n,)``, and those of the formula with what they learnt."""
    total, found = beside, []
    for e in parsed.offsets:
        if family is not None:
            value, _ = evaluate(e, frame, context)
            if isinstance(value, np.ndarray):
                refuse_infinite_offset(value.reshape(len(frame), -1)[:, 0], e.shown, frame.index)
        own, learnt = numbers(e, frame, context, "offset")
        found.append((e, learnt))
        total = own + (0.0 if total is None else total)
    return total, found


def read_formula(
    formula: str,
    available: list[str],
    caller: Mapping[str, Any],
    trusted: bool,
    data: Any = None,
    family: Any = None,
    own: Mapping[str, str] | None = None,
    residual: str | None = None,
) -> tuple[ParsedFormula, Context]:
    """The parts of a formula, and the values of the names in it that are no columns.

    An array of the caller's that is read by its bare name stands for a column. A family lets ``cbind()`` be a response;
    ``own`` are formulas of its parameters, or that of a dispersion, ``residual`` is a correlation of residuals.
    """

    def parse(formula: str, columns: list[str]) -> ParsedFormula:
        read = [(option, parse_own(option, text, columns)) for option, text in (own or {}).items()]
        return replace(
            parse_formula(formula, columns),
            own=tuple((option, effects) for option, effects in read if effects),
            residual=None if residual is None else parse_residual(residual, columns),
        )

    parsed = parse(formula, available)
    arrays = [name for e in (parsed.response, *parsed.predictors) for name in e.names if _is_array(caller.get(name))]
    if arrays and trusted:
        parsed = parse(formula, [*available, *arrays])
    parsed = with_structures(parsed, caller if trusted else {})
    if family is None:
        parsed = replace(parsed, pair=())
    else:
        check_pair(parsed, family)
    expressions = (*(parsed.pair or (parsed.response,)), *parsed.predictors)
    return parsed, resolve(
        expressions, caller, trusted, lambda name, where: refuse_unknown(name, available, f"in '{where}'", data)
    )


def _is_array(value: Any) -> bool:
    """A variable that can stand for a column, as opposed to a number, a function or a module."""
    if isinstance(value, list | tuple):
        return len(value) > 1
    return hasattr(value, "shape") and not callable(value) and not isinstance(value, ModuleType) and np.ndim(value) == 1


# --- rows ----------------------------------------------------------------------------------------------------------


def columns_read(
    parsed: ParsedFormula, available: Iterable[str], caller: Mapping[str, Any], data: Any = None
) -> tuple[list[str], list[str]]:
    """Columns of the table that a formula reads, and variables of the caller's that stand for columns.

    Raises:
        DataError: there is no such column.
    """
    read = dict.fromkeys(name for e in (parsed.response, *parsed.predictors) for name in e.columns)
    where = {name: e.shown for e in (parsed.response, *parsed.predictors) for name in e.columns}
    available = list(available)
    for name in read:
        if name not in available and not _is_array(caller.get(name)):
            refuse_unknown(name, available, f"in '{where[name]}'", data)
    for part in parsed.random:
        for name in part.group.columns:
            if name not in available:
                refuse_unknown(name, available, f"grouping factor '{part.group.name}'", data)
    groups = [name for part in parsed.random for name in part.group.columns]
    if parsed.residual is not None:
        for name in parsed.residual.group.columns:
            if name not in available:
                refuse_unknown(name, available, f"grouping factor of residual='{parsed.residual.text}'", data)
        groups += parsed.residual.group.columns
        if parsed.residual.kernel is not None:
            for name in parsed.residual.kernel.coordinates:
                if name not in available:
                    refuse_unknown(name, available, f"residual='{parsed.residual.text}'", data)
            groups += parsed.residual.kernel.coordinates
    own = dict.fromkeys([*(name for name in read if name in available), *groups])
    return list(own), [name for name in read if name not in available]


def computed_with(parsed: ParsedFormula) -> list[str]:
    """Columns whose numbers matter; of those inside ``C(...)`` alone only the names do."""
    expressions = (parsed.response, *parsed.predictors)
    return list(dict.fromkeys(name for e in expressions for name in e.columns if name != e.factor_of))


def hardly_factors(parsed: ParsedFormula, contrasts: Mapping[str, str]) -> list[str]:
    """Columns where text among numbers is a slip: all but declared factors. A response says so itself."""
    computed = [e for e in (parsed.response, *parsed.offsets) if e.column is None]
    names = dict.fromkeys(name for e in (*parsed.effects, *computed) for name in e.columns if name != e.factor_of)
    return [name for name in names if name not in contrasts]


def used_rows(
    parsed: ParsedFormula,
    data: Any,
    available: list[str],
    weights: Any,
    offset: Any,
    size: Any,
    subset: Any,
    context: Context,
    caller: Mapping[str, Any],
    contrasts: Mapping[str, str],
    family: Any,
) -> tuple[pd.DataFrame, dict[str, np.ndarray], np.ndarray, int]:
    """The used columns, complete rows with trials only; weights, offset and size beside them; which rows of the table
    these are; and the number of rows with missing values."""
    columns, arrays = columns_read(parsed, available, caller, data)
    extra = []
    given = {"weights": weights, "offset": offset, "size": size}
    for what, values in given.items():
        if isinstance(values, str):
            if values not in available:
                refuse_unknown(values, available, f"{what}=", data)
            extra.append(values)
    table, labels = read_columns(data, available if isinstance(subset, str) else [*columns, *extra])
    n = len(labels)
    if n == 0:
        raise DataError("the table has no rows")
    if n == 1:
        raise DataError("the table has one row, and a model needs many; a dict of single values makes one row")
    # Only a pandas table has an index that other pandas columns can be lined up with.
    index = labels if isinstance(data, pd.DataFrame) else None

    frame = {name: table[name] for name in columns}
    for name in arrays:
        frame[name] = row_column(f"'{name}'", caller[name], index, n)
    beside: dict[str, str] = {}  # the name that it has in the frame for now, unlike any column's
    for what, values in given.items():
        if values is not None:
            beside[what] = f"({what})"
            while beside[what] in frame:
                beside[what] = f"({beside[what]})"
            column, name = (table[values], f"{what}={values!r}") if isinstance(values, str) else (values, what)
            frame[beside[what]] = pd.Series(row_values(name, column, index, n), labels)
    read = [name for e in (parsed.response, *parsed.predictors) for name in e.columns]
    refuse_dates(frame, read)
    refuse_numbers_among_text(frame, hardly_factors(parsed, contrasts))
    used = np.ones(n, bool)
    if subset is not None:
        used = _subset_rows(subset, pd.DataFrame(table, index=labels), index, context.trusted).copy()
    if not used.any():
        raise DataError("subset leaves no rows")
    frame = selected(frame, used)
    complete = complete_rows(frame)
    used[used] = complete
    frame = selected(frame, complete)
    warn_of_gaps(frame, parsed)
    frame = settle(as_numbers(frame, computed_with(parsed)))
    if family is not None:
        named = [(e.shown, e.column) for e in parsed.offsets if e.column is not None]
        for shown, name in [*named, *([("offset=", beside["offset"])] if "offset" in beside else [])]:
            if frame[name].dtype.kind == "f":
                refuse_infinite_offset(frame[name].to_numpy(), shown, frame[name].index)
    check_finite(frame)
    alone = [e.column for e in parsed.effects if e.column is not None and e.column not in contrasts]
    warn_of_numeric_factors(frame, dict.fromkeys(alone))
    values = {what: frame.pop(name).to_numpy(float) for what, name in beside.items()}
    own = pd.DataFrame(frame, index=labels if used.all() else labels[used], copy=True)
    if family is not None:
        there = rows_with_trials(parsed, own, values, family, context)
        if not there.all():
            used[used] = there
            own, values = settle(own[there]), {what: column[there] for what, column in values.items()}
    return own, values, used, int((~complete).sum())


def _subset_rows(subset: Any, table: pd.DataFrame, index: Any, trusted: bool) -> np.ndarray:
    if isinstance(subset, str):
        if not trusted:
            raise DataError("subset= as text is code, which is not allowed here: pass booleans")
        try:
            subset = table.eval(subset)
        except Exception as error:
            raise DataError(f"subset {subset!r} cannot be evaluated: {error}") from error
    rows: np.ndarray = row_values("subset", subset, index, len(table), numbers=False)
    if rows.dtype != bool:
        raise DataError(f"subset must be {len(table)} booleans or an expression giving them, got {rows.dtype}")
    return rows


# --- fixed effects ---------------------------------------------------------------------------------------------------


def with_contrasts(
    parsed: ParsedFormula, frame: pd.DataFrame, contrasts: Mapping[str, str], context: Context
) -> ParsedFormula:
    """The formula with factors coded as asked for, in the fixed effects and in random terms; their names stay.

    A factor that the formula itself codes, ``C(a, contr.treatment)``, stays as it is there.
    """
    found: dict[str, Expression] = {}
    for name, asked in contrasts.items():
        if name not in frame:
            refuse_unknown(str(name), list(frame.columns), "contrasts=")
        kind = asked.removeprefix("contr.").split("(")[0] if isinstance(asked, str) else asked
        if not isinstance(asked, str) or kind not in CONTRASTS:
            raise DataError(f"contrasts for '{name}' must be one of {', '.join(CONTRASTS)}, got {asked!r}")
        own = [e for e in parsed.effects if e.code in ("__c0__", "C(__c0__)") and e.columns == (name,)]
        if not own:
            there = [str(parsed.fixed), *(f"({part.effects} | {part.group.name})" for part in parsed.random)]
            there += [f"{option} {effects}" for option, effects in parsed.own]
            raise DataError(f"contrasts= names '{name}', which is in none of the effects: {', '.join(there)}")
        if any(e.column for e in own) and pd.api.types.is_numeric_dtype(frame[name]) and frame[name].dtype != bool:
            raise DataError(f"contrasts= names '{name}', which is numeric: make it a category first")
        coding = expression(f"contr.{asked.removeprefix('contr.')}")
        coded = Expression(name, f"C(__c0__, {coding.code})", (name,), coding.names, ("C", *coding.functions))
        resolve([coded], {}, context.trusted, lambda n, where: refuse_unknown(n, [], f"in '{where}'"))
        found |= {e.shown: replace(coded, shown=e.shown) for e in own}
    if not found:
        return parsed

    def coded_as_asked(effects: Effects) -> Effects:
        return replace(effects, expressions=tuple(found.get(e.shown, e) for e in effects.expressions))

    random = tuple(replace(part, effects=coded_as_asked(part.effects)) for part in parsed.random)
    own_effects = tuple((option, coded_as_asked(effects)) for option, effects in parsed.own)
    return replace(parsed, fixed=coded_as_asked(parsed.fixed), random=random, own=own_effects)


def full_rank(
    X: np.ndarray,
    names: tuple[str, ...],
    weights: np.ndarray | None,
    known: Collection[str] = (),
    spare: str = "to estimate sigma from",
) -> tuple[np.ndarray, np.ndarray, Orthonormal]:
    """Leave out columns that earlier ones determine, as lme4 does, and say which. With the basis of those that stay.

    Args:
        known: columns of which it has been said before. spare: what rows beyond the columns are needed for.
    """
    basis = orthonormal_columns(X, None if weights is None else np.sqrt(weights))
    kept = basis.independent
    if not kept.all():
        dropped = [name for name, keep in zip(names, kept, strict=True) if not keep]
        if not set(dropped) <= set(known):
            warn(f"fixed-effects columns left out because other columns determine them: {some_of(dropped)}")
        X = X[:, kept]
    if X.shape[1] >= X.shape[0]:
        raise DataError(
            f"{X.shape[1]} fixed-effects columns for {X.shape[0]} rows leave nothing {spare}: "
            f"{some_of([name for name, keep in zip(names, kept, strict=True) if keep])}"
        )
    return X, kept, basis.of(kept)
