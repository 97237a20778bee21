"""What a prediction is asked for: which random effects count, and the rows of the fit or of a new table as targets. Of
linear and of generalised models."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import pandas as pd

from mixjax.checks import FormulaError, InferenceWarning, warn
from mixjax.design import Labels, TermLabels
from mixjax.fitted.either import AnyFitted
from mixjax.fitted.names import interaction_key, term_names
from mixjax.fitted.record import Fitted
from mixjax.formula.algebra import Effects
from mixjax.formula.coding import scoped_terms
from mixjax.formula.evaluate import Columns
from mixjax.formula.parse import parse
from mixjax.formula.state import FormulaState, new_rows
from mixjax.formula.syntax import read
from mixjax.prediction.targets import Targets

Interval = Literal["confidence", "prediction"]
INTERVALS = ("confidence", "prediction")


def check_asked(allow_new_levels: Any, interval: Any) -> None:
    """Raise ValueError for arguments that are none."""
    if not isinstance(allow_new_levels, bool | np.bool_):
        raise ValueError(f"allow_new_levels must be True or False, got {allow_new_levels!r}")
    if interval is not None and interval not in INTERVALS:
        raise ValueError(f"interval must be None or one of {', '.join(map(repr, INTERVALS))}, got {interval!r}")


# --- which random effects ------------------------------------------------------------------------------------------


def effects_included(labels: Labels, random: Any) -> list[np.ndarray]:
    """Per random term ``(q,)``, which of its effects ``random`` asks for. Smooths are part of every mean."""
    terms = labels.terms
    if isinstance(random, bool | np.bool_):
        return [np.full(len(term.effects), bool(random) or term.smooth) for term in terms]
    names = [random] if isinstance(random, str) else random
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"random must be True, False, or names of grouping factors or terms, got {random!r}")
    own = term_names(labels)
    wanted = [np.full(len(term.effects), term.smooth) for term in terms]
    for name in names:
        matches = [t for t, term in enumerate(terms) if term.group == name]
        matches = matches or [t for t, one in enumerate(own) if one == name]
        found = {t: np.ones(len(terms[t].effects), bool) for t in matches} or _effects_written(name, labels)
        if not found:
            texts = [f"{one!r} ({' + '.join(t.effects)} | {t.group})" for one, t in zip(own, terms, strict=True)]
            raise ValueError(f"there is no random term {name!r}; there are {', '.join(texts)}")
        for t, which in found.items():
            wanted[t] |= which
    return wanted


def _effects_written(name: str, labels: Labels) -> dict[int, np.ndarray]:
    """Terms, and which of their effects, that ``(0 + Days | Subject)`` or ``Days | Subject`` stands for; none where the
    fit does not have all of them."""
    return _columns_written(name, labels.terms) or _terms_written(name, labels)


def _columns_written(name: str, terms: Sequence[TermLabels]) -> dict[int, np.ndarray]:
    """Effects by the names of their columns. A factor stands for its columns where the term is asked for as a whole."""
    text = re.sub(r"\s", "", name)
    written = re.fullmatch(r"(?:\w*\((.*)\)|(.*))", text)
    effects, bar, group = (written[1] or written[2] or "").partition("|") if written else ("", "", "")
    parts = effects.split("+")
    if not bar:
        return {}
    parts = parts[1:] if parts[0] in ("0", "-1") else ["Intercept", *(p for p in parts if p not in ("1", "Intercept"))]
    keys = {interaction_key(part) for part in parts}
    of_group = [t for t, term in enumerate(terms) if term.group.replace(" ", "") == group.lstrip("|")]
    for t in of_group:
        factors = [re.sub(r"\[[^\[\]]*\]", "", effect.replace(" ", "")) for effect in terms[t].effects]
        if set(map(interaction_key, factors)) == keys:
            return {t: np.ones(len(factors), bool)}
    own = {t: [interaction_key(effect.replace(" ", "")) for effect in terms[t].effects] for t in of_group}
    if not keys <= {key for every in own.values() for key in every}:
        return {}
    found = {t: np.array([key in keys for key in every]) for t, every in own.items()}
    return {t: which for t, which in found.items() if which.any()}


def _terms_written(name: str, labels: Labels) -> dict[int, np.ndarray]:
    """Effects by the terms of a formula, one or a sum of random terms, factors coded as the fit has them."""
    state: FormulaState | None = labels.state
    text = name.strip().removeprefix("~").strip()
    if state is None or "|" not in text:
        return {}
    try:
        text = f"({text})" if read(text).outer("|", "||") else text
        asked = parse(f"y ~ {text}", [*state.kinds, *(c for part in state.parsed.random for c in part.group.columns)])
    except FormulaError:
        return {}
    columns_of = {part.group.name: frozenset(part.group.columns) for part in state.parsed.random}
    found: dict[int, np.ndarray] = {}
    for part in asked.random:
        of_group = [t for t, own in enumerate(labels.terms) if columns_of[own.group] == frozenset(part.group.columns)]
        for effects in part.blocks():
            places = [place for t in of_group for place in _coded_alike(effects, state.random[t], t)]
            if len(places) != len(effects.terms):
                return {}
            for t, at in places:
                which = found.setdefault(t, np.zeros(len(labels.terms[t].effects), bool))
                which[at] = True
    return found


def _coded_alike(effects: Effects, own: Columns, t: int) -> list[tuple[int, slice]]:
    """The terms that a random term of the fit has with the same columns: its number and where they stand."""
    if not {e.shown for e in effects.expressions} <= set(own.spec.coders):
        return []
    spans = {name: coder.spans_intercept for name, coder in own.spec.coders.items()}
    asked = dict(zip(map(frozenset, effects.terms), scoped_terms(effects.terms, spans), strict=True))
    found, at = [], 0
    for term, part in zip(own.effects.terms, own.spec.structure, strict=True):
        scoped = asked.get(frozenset(term))
        if scoped is not None and set(map(frozenset, scoped)) == set(map(frozenset, part.scoped)):
            found.append((t, slice(at, at + len(part.columns))))
        at += len(part.columns)
    return found


# --- the rows ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Asked:
    """Rows to predict.

    Attributes:
        targets: m of them. index: of all rows. complete: which rows are predicted.
        size: ``(m,)`` numbers of trials of new responses, or None where there are none, they are not known or not
            needed.
        psi: per parameter of the family ``(m, r)`` its columns, or None; ``()`` where they are not needed.
        dispersion: ``(m, d)`` columns of the dispersion of residuals of new responses, or None.
    """

    targets: Targets
    index: pd.Index
    complete: np.ndarray
    size: np.ndarray | None
    psi: tuple[np.ndarray | None, ...] = ()
    dispersion: np.ndarray | None = None


def rows_asked(
    fitted: AnyFitted,
    newdata: Any,
    effects: list[np.ndarray],
    allow_new_levels: bool,
    whole: str | None,
    trials: bool = False,
    psi: Sequence[bool] = (),
) -> Asked:
    """The rows of the fit, or of a new table, as targets.

    Args:
        effects: per random term ``(q,)``, which of its effects count.
        whole: what needs the variance of the other terms too, as messages call it, or None. Of a linear mixed model
            that is a new response, which has noise as well.
        trials: numbers of trials are needed, where the fit has them by the name of a column or in ``cbind()``.
        psi: per parameter of the family, whether the columns of its formula are needed.
    """
    included = [bool(which.any()) for which in effects]
    if whole and any(which.any() and not which.all() for which in effects):
        raise ValueError(
            "random= asks for some effects of a term: the others of the same level are correlated with these, so that "
            f"there is no {whole}; name whole terms, or take interval='confidence'"
        )
    noisy = bool(whole) and isinstance(fitted, Fitted)
    if newdata is None:
        design = fitted.design
        m = len(np.asarray(design.X))
        offset = np.zeros(m) if design.offset is None else np.asarray(design.offset)
        weights = np.ones(m) if design.weights is None else np.asarray(design.weights)
        Z = tuple(np.asarray(t.Z) if own or whole else None for t, own in zip(design.terms, included, strict=True))
        Z = _of_own_level(fitted, Z, tuple(np.asarray(t.group) for t in design.terms), included)
        level = tuple(np.asarray(t.group) if own else None for t, own in zip(design.terms, included, strict=True))
        noise = 1.0 / weights if noisy else np.zeros(m)
        targets = Targets(np.asarray(design.X), offset, Z, level, noise).with_effects(effects)
        size = None if design.size is None else np.asarray(design.size)
        of_psi = tuple(own if wanted else None for own, wanted in zip(design.psi_columns, psi, strict=False))
        W = fitted.given.dispersion if noisy and isinstance(fitted, Fitted) else None
        return Asked(targets, fitted.labels.frame.index, np.ones(m, bool), size, of_psi, W)

    labels = fitted.labels
    needed = [own or bool(whole) for own in included]
    # The variance of an effect that is left out depends on its level where these have a known covariance.
    levels = [
        own or (bool(whole) and L is not None) for own, L in zip(included, _factors_of_levels(fitted), strict=True)
    ]
    rows = new_rows(labels, newdata, needed, levels, allow_new_levels, weights=noisy, trials=trials, psi=psi)
    scaled = _of_own_level(fitted, rows.Z, rows.level, included)
    own_levels = tuple(level if own else None for level, own in zip(rows.level, included, strict=True))
    rows = replace(rows, Z=scaled, level=own_levels)
    if noisy and rows.weights is None and isinstance(fitted, Fitted) and _has_weights(fitted):
        warn(
            "the fit had weights, but the weights of newdata are not known: intervals are for responses of weight 1",
            InferenceWarning,
        )
    m = len(rows.X)
    noise = np.zeros(m)
    if noisy and isinstance(fitted, Fitted):
        noise = fitted.noise(rows.weights, rows.dispersion, m)
    targets = Targets(rows.X, rows.offset, rows.Z, rows.level, noise).with_effects(effects)
    complete, size, of_psi, W = rows.complete.copy(), rows.size, rows.psi, rows.dispersion if noisy else None
    if not rows.estimable.all():
        bad = int((~rows.estimable).sum())
        warn(
            f"{bad} rows of newdata cannot be estimated, because they need columns that were left out of the fit "
            f"({', '.join(labels.dropped_columns)}): NaN there",
            InferenceWarning,
        )
        complete[np.flatnonzero(complete)[~rows.estimable]] = False
        targets = targets.take(rows.estimable)
        size = None if size is None else size[rows.estimable]
        of_psi = tuple(None if own is None else own[rows.estimable] for own in of_psi)
        W = None if W is None else W[rows.estimable]
    return Asked(targets, rows.index, complete, size, of_psi, W)


def _factors_of_levels(fitted: AnyFitted) -> tuple[Any, ...]:
    """Per random term a factor of the known covariance of its levels, or None."""
    if fitted.kept is None:
        return (None,) * len(fitted.labels.terms)
    return tuple(term.levels for term in fitted.design.terms)


def _of_own_level(
    fitted: AnyFitted,
    Z: tuple[np.ndarray | None, ...],
    level: tuple[np.ndarray | None, ...],
    included: Sequence[bool],
) -> tuple[np.ndarray | None, ...]:
    """Columns of effects that are left out, times the standard deviation of the row's level where that is known."""
    found = []
    for own, codes, L, kept in zip(Z, level, _factors_of_levels(fitted), included, strict=True):
        if own is not None and codes is not None and L is not None and not kept:
            own = own * np.sqrt((np.asarray(L) ** 2).sum(1))[codes][:, None]
        found.append(own)
    return tuple(found)


def _has_weights(fitted: Fitted) -> bool:
    if fitted.kept is not None:
        return fitted.given.weights is not None
    return bool(np.asarray(fitted.stats.sum_log_weights) != 0)


def on_rows(index: pd.Index, complete: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Values of the predicted rows at their places among all rows, NaN elsewhere."""
    out = np.full(len(index), np.nan)
    out[complete] = values
    return out
