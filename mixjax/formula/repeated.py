"""A formula of repeated measures and a table -> RepeatedDesign and Labels: ``y ~ x + us(visit | subject)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mixjax.bases import Orthonormal
from mixjax.checks import DataError, FormulaError, some_of, warn
from mixjax.covariance import Covariance, structure_of
from mixjax.design import Labels, RepeatedDesign, TermLabels
from mixjax.formula.build import full_rank, offsets_of, read_formula, used_rows, with_contrasts
from mixjax.formula.checks import ORDERED, check_noise, check_varies, check_weights, warn_of_order
from mixjax.formula.context import is_trusted
from mixjax.formula.evaluate import columns_of, numbers
from mixjax.formula.parse import Group, ParsedFormula, RandomPart, check_text
from mixjax.formula.reading import column_names, read_columns
from mixjax.formula.state import FormulaState, kinds_of
from mixjax.formula.table import combinations

# Names that mean one thing here and another in R's mmrm and SAS; and what is meant in either.
BOTH = {"cs": ("homcs", "csh"), "toep": ("homtoep", "toeph")}
EXAMPLE = "us(visit | subject), or us(visit | arm / subject) for a covariance in every arm"


class Repetition(NamedTuple):
    """What repeats within what.

    Attributes:
        visit: column. subject: grouping factor. arm: the factor each of whose levels has a covariance, or None.
        structure: as the formula has it. written: the whole term.
    """

    visit: str
    subject: Group
    arm: Group | None
    structure: str | Covariance
    written: str


@dataclass(frozen=True)
class RepeatedLabels(Labels):
    """Names beside a :class:`~mixjax.design.RepeatedDesign`; ``terms`` has one for every arm, of effects that are the
    visits and levels that are the subjects.

    Attributes:
        repetition: what repeats within what. arms: names of the arms; empty where one covariance serves all.
    """

    repetition: Any = None
    arms: tuple[str, ...] = ()


class Repeated(NamedTuple):
    """A design with its names, and the basis of its X, times the roots of the weights."""

    design: RepeatedDesign
    labels: RepeatedLabels
    basis: Orthonormal


def build_repeated(
    formula: str,
    data: Any,
    weights: Any,
    offset: Any,
    subset: Any,
    contrasts: Mapping[str, str] | None,
    caller: Mapping[str, Any],
    trusted: bool | None,
) -> Repeated:
    """Read a formula and a table; args as of :func:`mixjax.build_design`.

    Raises:
        FormulaError, DataError: with the name of the culprit.
    """
    check_text(formula)
    available = column_names(data)
    parsed, known = read_formula(formula, available, caller, is_trusted(trusted), data)
    if parsed.smooths:
        raise FormulaError(
            f"'{parsed.smooths[0].text}': a smooth is a random effect, and mmrm() has none; bs(x, df = 4) is a fixed "
            "effect, and lmm() with residual= has both"
        )
    repetition = repetition_of(parsed)
    contrasts = {} if contrasts is None else contrasts
    if not isinstance(contrasts, Mapping):
        raise DataError(f"contrasts must be a dict, column -> coding, got {contrasts!r}")
    frame, beside, used, n_missing = used_rows(
        parsed, data, available, weights, offset, None, subset, known, caller, contrasts, None
    )
    parsed = replace(with_contrasts(parsed, frame, contrasts, known), random=())
    y, _ = numbers(parsed.response, frame, known, "response")
    check_varies(y, str(parsed.response))
    X, fixed = columns_of(parsed.fixed, frame, known)
    total_offset, offsets = offsets_of(parsed, frame, beside.get("offset"), known, None)
    own_weights = beside.get("weights")
    check_weights(own_weights)
    X, kept, basis = full_rank(X, fixed.names, own_weights, spare="to estimate a covariance from")
    own = y if total_offset is None else y - total_offset
    check_noise(own, X, basis.Q, own_weights, parsed.response.shown)
    _warn_of_absent(data, frame, repetition)
    visit, visits = _visits(frame, repetition)
    subject, subjects = _subjects(frame, repetition.subject)
    _check_visits_once(visit, visits, subject, subjects, repetition, frame)
    arm, arms = _arms(frame, repetition, subject, subjects)
    design = RepeatedDesign(
        y=y,
        X=X,
        subject=subject,
        visit=visit,
        n_subjects=len(subjects),
        n_visits=len(visits),
        structure=repetition.structure,
        arm=arm,
        n_arms=len(arms) or 1,
        weights=own_weights,
        offset=total_offset,
    )
    _check_pairs(design, visits, arms, repetition)
    name = repetition.subject.name
    groups = [f"{name}:{repetition.arm.name}[{own}]" for own in arms] if repetition.arm else [name]
    state = FormulaState(
        parsed=parsed,
        fixed=fixed,
        kept=kept,
        random=(),
        offsets=tuple(offsets),
        weights=weights if isinstance(weights, str) else None,
        offset=offset if isinstance(offset, str) else None,
        offset_beside=offset is not None and not isinstance(offset, str),
        contrasts=dict(contrasts),
        context=known,
        kinds=kinds_of(frame, parsed),
        levels={},
    )
    names = np.array(fixed.names, object)
    labels = RepeatedLabels(
        formula=formula,
        response=parsed.response.shown,
        fixed=tuple(names[kept]),
        terms=tuple(TermLabels(group, tuple(visits), tuple(subjects)) for group in groups),
        frame=frame,
        dropped_columns=tuple(names[~kept]),
        n_missing=n_missing,
        used=None if used.all() else used,
        state=state,
        repetition=repetition,
        arms=tuple(arms),
    )
    return Repeated(design, labels, basis)


def repetition_of(parsed: ParsedFormula) -> Repetition:
    """The one term that says how errors depend on each other.

    Raises:
        FormulaError: there is none, or more; random effects; a name that other packages understand differently.
    """
    terms = list(parsed.random)
    if not terms:
        raise FormulaError(f"{parsed.text!r} does not say which rows belong together: add {EXAMPLE}")
    known = [part for part in terms if part.known]
    if known:
        raise FormulaError(
            f"'propto({_shown(known[0])}, {known[0].known})': subjects of mmrm() are independent; related levels have "
            "random effects, propto(1 | subject, K) of mixjax.lmm"
        )
    kernels = [part.group.name for part in terms if part.kernel]
    if kernels:
        raise FormulaError(
            f"'{kernels[0]}': mmrm() has covariances between common visits; one of residuals by distance in time is "
            "residual='car1(time | subject)' of mixjax.lmm, and a process beside the residuals is a term of its formula"
        )
    plain = [part for part in terms if not part.written]
    if plain:
        raise FormulaError(
            f"'{_shown(plain[0])}' is a random effect, and mmrm() has none: write {EXAMPLE}; random effects belong to "
            "mixjax.lmm"
        )
    first, others = terms[0], terms[1:]
    inside = others and others[0].effects == first.effects and first.group.columns[1:] == others[0].group.columns
    if len(others) > (1 if inside else 0):
        raise FormulaError(
            f"{parsed.text!r} has several terms such as '{_shown(first)}': one covariance serves all rows; write "
            f"{EXAMPLE}"
        )
    written = _shown(first)
    if first.written in BOTH:
        hom, het = BOTH[first.written]
        raise FormulaError(
            f"'{written}': {first.written} is homogeneous in R's mmrm and in SAS and heterogeneous in lme4 and "
            f"glmmTMB; write {hom} (one variance for all visits) or {het} (one for each)"
        )
    expressions = first.effects.expressions
    column = expressions[0].column if len(expressions) == 1 else None
    if column is None:
        raise FormulaError(f"'{written}': before the bar stands the column of the visits alone, as in {EXAMPLE}")
    subject = first.group if not inside else Group(first.group.columns[0], first.group.columns[:1])
    return Repetition(column, subject, others[0].group if inside else None, first.structure, written)


def _shown(part: RandomPart) -> str:
    return f"{part.written}({part.effects} | {part.group.name})"


def _visits(frame: pd.DataFrame, repetition: Repetition) -> tuple[np.ndarray, list[str]]:
    """``(n,)`` numbers of the visits, and their names in the order of the factor's levels, or of the numbers."""
    codes, levels = combinations(frame, (repetition.visit,))
    if len(levels) < 2:
        raise DataError(f"'{repetition.visit}' has one value in all rows: nothing is repeated within subjects")
    structure_of(repetition.structure, len(levels))
    names = [":".join(values) for values in levels]
    if isinstance(repetition.structure, str) and repetition.structure in ORDERED:
        warn_of_order(repetition.structure, names, f"{repetition.visit} | {repetition.subject.name}")
    return codes, names


def _warn_of_absent(data: Any, frame: pd.DataFrame, repetition: Repetition) -> None:
    column = read_columns(data, [repetition.visit])[0][repetition.visit]
    if not isinstance(column.dtype, pd.CategoricalDtype):
        return
    there = set(frame[repetition.visit])
    absent = [str(level) for level in column.dtype.categories if level not in there]
    if absent:
        warn(f"nobody has a row at {some_of(absent)} of '{repetition.visit}': left out")


def _subjects(frame: pd.DataFrame, subject: Group) -> tuple[np.ndarray, list[str]]:
    codes, levels = combinations(frame, subject.columns)
    return codes, [":".join(values) for values in levels]


def _check_visits_once(
    visit: np.ndarray,
    visits: list[str],
    subject: np.ndarray,
    subjects: list[str],
    repetition: Repetition,
    frame: pd.DataFrame,
) -> None:
    cell = subject.astype(np.int64) * len(visits) + visit
    _, first, counts = np.unique(cell, return_index=True, return_counts=True)
    twice = np.flatnonzero(counts > 1)
    if len(twice):
        row = first[twice[0]]
        rows = frame.index[cell == cell[row]]
        more = f", and {len(twice) - 1} more" if len(twice) > 1 else ""
        raise DataError(
            f"{repetition.subject.name} '{subjects[subject[row]]}' has {counts[twice[0]]} rows at {repetition.visit} "
            f"'{visits[visit[row]]}' (rows {', '.join(map(str, rows[:4]))}){more}: a subject has one row a visit; "
            "leave one out, average them, or name subjects apart"
        )


def _arms(
    frame: pd.DataFrame, repetition: Repetition, subject: np.ndarray, subjects: list[str]
) -> tuple[np.ndarray | None, list[str]]:
    """``(subjects,)`` the arm of each, and the arms' names."""
    if repetition.arm is None:
        return None, []
    codes, levels = combinations(frame, repetition.arm.columns)
    arm = np.zeros(len(subjects), int)
    arm[subject] = codes
    wrong = np.flatnonzero(arm[subject] != codes)
    if len(wrong):
        raise DataError(
            f"{repetition.subject.name} '{subjects[subject[wrong[0]]]}' has rows in several levels of "
            f"'{repetition.arm.name}': a subject belongs to one; name subjects apart, or leave "
            f"'{repetition.arm.name} /' out"
        )
    return arm, [":".join(values) for values in levels]


def _check_pairs(design: RepeatedDesign, visits: list[str], arms: list[str], repetition: Repetition) -> None:
    """Raise DataError where the data cannot tell the covariance that is asked for."""
    T = design.n_visits
    structure = structure_of(repetition.structure, T)
    for i in range(design.n_arms):
        own = np.ones(design.n_subjects, bool) if design.arm is None else np.asarray(design.arm) == i
        seen = np.zeros((design.n_subjects, T), bool)
        seen[design.subject, design.visit] = True
        seen = seen[own] * 1.0
        where = f" in {repetition.arm.name} '{arms[i]}'" if repetition.arm else ""
        alone = np.flatnonzero(seen.sum(0) == 0)
        if len(alone):
            raise DataError(f"nobody{where} has a row at {repetition.visit} '{visits[alone[0]]}': there is no variance "
                            "of it to estimate; leave that visit out, or have one covariance for all arms")  # fmt: skip
        full = structure.k == T * (T + 1) // 2
        if full and len(seen) <= T:
            raise DataError(
                f"'{repetition.written}': {len(seen)} {repetition.subject.name}s{where} cannot tell any covariance of "
                f"{T} visits; take a structure with fewer parameters, such as ar1h, toeph or homcs"
            )
        both = seen.T @ seen > 0
        if structure.is_told_by(both[np.triu_indices(T)]):
            continue
        a, b = next(zip(*np.nonzero(~both), strict=True))
        raise DataError(
            f"'{repetition.written}': nobody{where} has rows at both {repetition.visit} '{visits[a]}' and "
            f"'{visits[b]}', so that a parameter of the covariance cannot be estimated; take a structure with fewer "
            f"parameters, such as {'ar1h, toeph or homcs' if full else 'ar1h or homcs'}"
        )
