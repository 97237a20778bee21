"""Names of a fit: of its terms, its effects and what stands beside them in tables."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mixjax.checks import DataError
from mixjax.covariance import NaturalParameter, Structure
from mixjax.design import Labels
from mixjax.formula.table import row_values


def term_names(labels: Labels) -> list[str]:
    """One name per random term: its group, with ``.1``, ``.2`` where a group has several terms, as in lme4."""
    groups = [term.group for term in labels.terms]
    earlier = [groups[:t].count(group) for t, group in enumerate(groups)]
    return [f"{group}.{k}" if k else group for group, k in zip(groups, earlier, strict=True)]


def terms_of_group(labels: Labels) -> dict[str, list[int]]:
    """Grouping factor -> its terms."""
    terms: dict[str, list[int]] = {}
    for t, term in enumerate(labels.terms):
        terms.setdefault(term.group, []).append(t)
    return terms


class VarianceParameter(NamedTuple):
    """A standard deviation or a correlation of random effects.

    Attributes:
        name: ``sd_Days|Subject``, ``cor_Days.Intercept|Subject``, as ``confint()`` and others call it.
        term: number of the random term. natural: which of its structure's.
    """

    name: str
    term: int
    natural: NaturalParameter

    @property
    def kind(self) -> str:
        """``"sd"`` or ``"cor"``."""
        return self.natural.kind

    def value(self, Sigma: Sequence[np.ndarray]) -> np.ndarray:
        """Value ``(...)`` at covariances ``(..., q, q)`` of all terms; NaN of a correlation beside a zero variance."""
        own, i, j = np.asarray(Sigma[self.term]), self.natural.i, self.natural.j
        variances = np.diagonal(own, axis1=-2, axis2=-1)
        if self.kind == "sd":
            return np.sqrt(variances[..., i])
        with np.errstate(invalid="ignore", divide="ignore"):
            return own[..., i, j] / (np.sqrt(variances[..., i]) * np.sqrt(variances[..., j]))


def names_of_variances(labels: Labels, structures: Sequence[Structure]) -> tuple[VarianceParameter, ...]:
    """The parameters of the random effects' covariances, term by term, in the order of every table; sigma follows."""
    return tuple(
        VarianceParameter(natural.name(term.effects, group), t, natural)
        for t, (group, term, structure) in enumerate(zip(term_names(labels), labels.terms, structures, strict=True))
        for natural in structure.natural
    )


def values_of_rows(labels: Labels, name: str, values: Any, numbers: bool = True) -> np.ndarray:
    """A column for the rows of a fit, ``(nobs,)``: of those rows, or of all rows of the table that the fit was made of.

    A pandas Series is lined up by its index.

    Raises:
        DataError: another length, or labels that are not the fit's.
    """
    index, used = labels.frame.index, labels.used
    whole = used is not None and np.shape(values) == (len(used),)
    if not isinstance(values, pd.Series):
        values = np.asarray(values)[used] if whole else values
    elif whole and values.index[used].equals(index):
        values = values[used]
    elif len(values) > len(index) and values.index.is_unique and index.isin(values.index).all():
        values = values.loc[index]
    if used is not None and np.shape(values) not in ((len(index),), ()):
        raise DataError(
            f"{name} has shape {np.shape(values)}, but the fit has {len(index)} rows, of {len(used)} of the table"
        )
    return row_values(name, values, index, len(index), numbers)


def interaction_key(name: str) -> tuple[str, ...]:
    """The factors of a column's name in alphabetical order: ``a:b`` and ``b:a`` are one product.

    A colon inside brackets, parentheses, quotes or backticks belongs to a factor.
    """
    parts, depth, quote = [""], 0, ""
    for sign in name:
        if quote:
            quote = "" if sign == quote else quote
        elif sign in "'\"`":
            quote = sign
        depth += 0 if quote else (sign in "[(") - (sign in "])")
        if sign == ":" and depth == 0 and not quote:
            parts.append("")
        else:
            parts[-1] += sign
    return tuple(sorted(parts))


def by_effect(values: Mapping[str, Any]) -> Callable[[str, Any], Any]:
    """Looks values up by the name of an effect, fixed or random, whatever the order of its factors: ``(name, default)
    -> value``."""
    by_key = {interaction_key(name): value for name, value in values.items()}
    return lambda name, default: by_key.get(interaction_key(name), default)


def names_apart(fixed: Sequence[str], taken: Collection[str]) -> list[str]:
    """Fixed effects in a table that they share with other columns: where one of those has the name, ``beta_`` goes in
    front, as in ``beta_sigma`` of a predictor that is called sigma."""
    own: list[str] = []
    for name in fixed:
        while name in taken or name in own:
            name = f"beta_{name}"
        own.append(name)
    return own
