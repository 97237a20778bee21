"""A model with one term less: which terms can be left out, and the design without one of them.

Terms are left out of the formula as it was read, not of its text, and what stays gets its columns anew from the rows
of the fit: where a factor's columns stood for the constant too, those of the terms that stay do so from then on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mixjax.checks import some_of
from mixjax.covariance import dimensions_of, with_dimensions
from mixjax.design import Design, Labels
from mixjax.formula.algebra import INTERCEPT, Effects, Term
from mixjax.formula.build import full_rank
from mixjax.formula.evaluate import Columns, columns_of
from mixjax.formula.parse import Group, RandomPart
from mixjax.formula.smooths import LINE
from mixjax.formula.state import FormulaState

# One plain column of ones.
CONSTANT = Effects("1", (INTERCEPT,), ())


class Deletion(NamedTuple):
    """One term less.

    Attributes:
        name: ``recipe`` of the fixed effects, ``(1 | Subject)`` or ``Days in (Days | Subject)`` of the random ones.
        place: number of the random term; None for the fixed effects.
        effects: what stays of the random term, or of the fixed effects; None where the random term goes as a whole.
        structure: the covariance structure of what stays, where that is another.
    """

    name: str
    place: int | None
    effects: Effects | None
    structure: str | None = None


def fixed_deletions(labels: Labels) -> list[Deletion]:
    """The terms of the fixed effects that no other term contains, each by itself, in the order of the columns."""
    own: Effects = labels.state.fixed.effects
    lines = {(f"{term.group}.fx1",) for term in labels.terms if term.smooth}  # within the rest of their smooths
    return [Deletion(":".join(term), None, _less(own, term)) for term in _marginal(own) if term not in lines]


def random_deletions(labels: Labels, reduce: bool = True) -> list[Deletion]:
    """The parts of the random effects that can go, each by itself, in the order of the terms.

    Args:
        reduce: of a term with several effects one goes at a time, if no other contains it; the only one of a factor,
            ``(0 + f | g)``, leaves the constant behind, if that is in no other term of g. Of ``rr`` and ``fa`` with
            several dimensions one dimension goes. Otherwise, and of terms that have one variance for all effects, whole
            terms.
    """
    state: FormulaState = labels.state
    found = []
    parts = random_parts(labels)
    for t, part in enumerate(parts):
        effects, written = part.effects, _bar(part)
        reducible = reduce and part.structure in ("us", "diag")
        terms, of = _marginal(effects), dimensions_of(part.structure)
        if reduce and of is not None and of[1] > 1:
            found.append(Deletion(f"d = {of[1]} in {written}", t, effects, with_dimensions(of[0], of[1] - 1)))
        elif not reducible or (not terms and effects.terms == (INTERCEPT,)):
            found.append(Deletion(written, t, None))
        elif part.structure == "diag":
            # Each variance is a parameter of its own, the constant's too.
            found += [Deletion(f"{':'.join(term) or '1'} in {written}", t, _or_none(_less(effects, term)))
                      for term in dict.fromkeys([INTERCEPT, *terms]) if term in effects.terms]  # fmt: skip
        elif len(effects.terms) == 1:
            others = [u for u, other in enumerate(parts) if u != t and other.group.name == part.group.name]
            alone = not any(_spans_constant(state.random[u]) for u in others)
            constant = alone and _spans_constant(state.random[t])
            found.append(Deletion(f"{':'.join(terms[0])} in {written}", t, CONSTANT if constant else None))
        else:
            found += [Deletion(f"{':'.join(term)} in {written}", t, _less(effects, term)) for term in terms]
    return found


def _spans_constant(columns: Columns) -> bool:
    factors = {e.shown for e in columns.effects.expressions if columns.categories(e) is not None}
    return any(factors.issuperset(term) for term in columns.effects.terms)


def find_deletion(name: str, labels: Labels) -> Deletion:
    """The deletion that a user names; blanks do not matter.

    Raises:
        ValueError: there is none of that name, or another term contains it.
    """
    available = [*fixed_deletions(labels), *random_deletions(labels)]
    available += random_deletions(labels, reduce=False)
    by_key: dict[str, Deletion] = {}
    for each in available:
        by_key.setdefault(_key(each.name), each)
    found = by_key.get(_key(name)) if isinstance(name, str) else None
    if found is None:
        names = list(dict.fromkeys(each.name for each in available))
        own = labels.state.fixed.effects.terms
        terms = {_key(":".join(term)): term for term in own if term}
        term = terms.get(_key(name)) if isinstance(name, str) else None
        if term is not None:
            larger = next(":".join(other) for other in own if set(term) < set(other))
            raise ValueError(f"'{name}' cannot be left out while '{larger}' contains it: leave that out first")
        raise ValueError(f"there is no term {name!r} that can be left out; there are {some_of(names, most=20)}")
    return found


def _key(name: str) -> str:
    return "".join(name.split()).replace("^", "**")


def design_without(design: Design, labels: Labels, deletion: Deletion) -> tuple[Design, Labels]:
    """The design and the names without a term; without the last random term the design has none.

    Args:
        design, labels: of a fit that kept its rows.

    Warns:
        DataWarning: fixed-effects columns depend on others.
    """
    state: FormulaState = labels.state
    parts = random_parts(labels)
    columns, terms, names = list(state.random), list(design.terms), list(labels.terms)
    t, effects = deletion.place, deletion.effects
    if t is None:
        assert effects is not None
        X, fixed = columns_of(effects, labels.frame, state.context)
        weights = None if design.weights is None else np.asarray(design.weights)
        X, kept, _ = full_rank(X, fixed.names, weights, labels.dropped_columns)
        own = np.array(fixed.names, object)
        state = replace(state, fixed=fixed, kept=kept)
        design = replace(design, X=X)
        labels = replace(labels, fixed=tuple(own[kept]), dropped_columns=tuple(own[~kept]))
    elif effects is None:
        del parts[t], columns[t], terms[t], names[t]
    else:
        Z, columns[t] = columns_of(effects, labels.frame, state.context)
        terms[t] = replace(terms[t], Z=Z, structure=deletion.structure or terms[t].structure)
        names[t] = replace(names[t], effects=columns[t].names)
        parts[t] = replace(parts[t], effects=effects, structure=deletion.structure or parts[t].structure)
    text = _text(labels.response, state, parts)
    parsed = replace(state.parsed, text=text, fixed=state.fixed.effects, random=tuple(parts))
    levels = {name: state.levels[name] for name in dict.fromkeys(term.group for term in names)}
    state = replace(state, parsed=parsed, random=tuple(columns), levels=levels)
    labels = replace(labels, formula=text, terms=tuple(names), state=state)
    return replace(design, terms=tuple(terms)), labels


# --- terms -----------------------------------------------------------------------------------------------------------


def random_parts(labels: Labels) -> list[RandomPart]:
    """The random terms of a fit, one part for each: those of ``||`` and of nested groups stand by themselves."""
    state: FormulaState = labels.state
    sizes = {term.group: len(term.levels) for term in labels.terms}
    written = [replace(part, independent=False) for part in state.parsed.random for _ in part.blocks()]
    written.sort(key=lambda part: -sizes[part.group.name])  # as the design has them
    return [replace(part, effects=own.effects) for part, own in zip(written, state.random, strict=True)]


def _marginal(effects: Effects) -> list[Term]:
    """Terms that no other contains, without the intercept."""
    return [t for t in effects.terms if t and not any(set(t) < set(other) for other in effects.terms)]


def _less(effects: Effects, term: Term) -> Effects:
    terms = tuple(own for own in effects.terms if own != term)
    used = {name for own in terms for name in own}
    return Effects(_sum(terms), terms, tuple(e for e in effects.expressions if e.shown in used))


def _or_none(effects: Effects) -> Effects | None:
    return effects if effects.terms else None


# --- text ------------------------------------------------------------------------------------------------------------


def _sum(terms: Sequence[Term]) -> str:
    """``1``, ``x + z`` with an intercept, ``0 + x`` without."""
    others = [":".join(term) for term in terms if term]
    if INTERCEPT not in terms:
        return " + ".join(["0", *others])
    return " + ".join(others) or "1"


def _bar(part: RandomPart) -> str:
    if part.kernel is not None:
        return part.group.name
    if part.smooth is not None:
        return part.effects.shown
    if part.known:
        (column,) = part.group.columns
        inner = f"{part.effects.shown} | {_group(Group(column, (column,)))}"
        inner = inner if part.structure == "us" else _structured(part, inner)
        return f"propto({inner}, {part.known})"
    inner = f"{part.effects.shown} | {_group(part.group)}"
    return f"({inner})" if part.structure == "us" else _structured(part, inner)


def _structured(part: RandomPart, inner: str) -> str:
    of = dimensions_of(part.structure)
    return f"{part.name or part.structure}({inner})" if of is None else f"{of[0]}({inner}, d = {of[1]})"


def _group(group: Group) -> str:
    """The name, columns that are no plain words in backticks."""
    text, rest = "", group.name
    for name in group.columns:
        before, _, rest = rest.partition(name)
        text += before + (name if name.replace(".", "_").isidentifier() else f"`{name}`")
    return text + rest


def _text(response: str, state: FormulaState, parts: Sequence[RandomPart]) -> str:
    offsets = [f"offset({e.shown})" for e, _ in state.offsets]
    lines = [e.shown for e in state.fixed.effects.expressions if LINE in e.functions]
    there = {f"{part.group.name}.fx1" for part in parts if part.smooth is not None}
    shown = state.fixed.effects.shown
    for line in lines:  # beside its smooth a line is not shown, without it is
        shown = shown.replace(f" + {line}", "").replace(f"{line} + ", "").replace(line, "1")
    right = [shown, *(line for line in lines if line not in there), *offsets, *map(_bar, parts)]
    return f"{response} ~ {' + '.join(right)}"
