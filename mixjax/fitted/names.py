"""Names of a fit: of its terms, its effects and what stands beside them in tables."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from mixjax.checks import DataError
from mixjax.covariance import NaturalParameter, Structure
from mixjax.covariance.custom import Written
from mixjax.design import Labels
from mixjax.formula.table import row_values
from mixjax.kernels import KERNELS


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


def modes_by_group(labels: Labels, b: Sequence[np.ndarray]) -> dict[str, pd.DataFrame]:
    """Grouping factor -> modes ``b``, of every term ``(levels, q)``, as a table, the terms of a factor side by side."""
    return {
        group: pd.DataFrame(
            np.hstack([b[t] for t in ts]),
            index=list(labels.terms[ts[0]].levels),
            columns=[effect for t in ts for effect in labels.terms[t].effects],
        )
        for group, ts in terms_of_group(labels).items()
    }


class VarianceParameter(NamedTuple):
    """A standard deviation or a correlation of random effects.

    Attributes:
        name: ``sd_Days|Subject``, ``cor_Days.Intercept|Subject``, as ``confint()`` and others call it.
        term: number of the random term. natural: which of its structure's. structure: that.
    """

    name: str
    term: int
    natural: NaturalParameter
    structure: Structure

    @property
    def kind(self) -> str:
        """How its values are spread: as ``"sd"``, specific ones too, as ``"cor"``, or ``"real"``, of loadings and of a
        structure of the user's own."""
        return {"loading": "real", "specific": "sd"}.get(self.natural.kind, self.natural.kind)

    @property
    def is_scaled(self) -> bool:
        """It has the units of the response, and is relative to sigma where covariances are."""
        return self.natural.kind in ("sd", "loading", "specific")

    def value(self, Sigma: Sequence[np.ndarray]) -> np.ndarray:
        """Value ``(...)`` at covariances ``(..., q, q)`` of all terms; NaN of a correlation beside a zero variance."""
        own, q = np.asarray(Sigma[self.term]), np.shape(Sigma[self.term])[-1]
        if self.natural.kind in ("real", "loading", "specific"):
            values, vectors = np.linalg.eigh(own.reshape(-1, q, q))
            factors = vectors * np.sqrt(np.maximum(values, 0.0))[:, None]
            x = self.structure.near(np.moveaxis(factors, 0, -1))
            place = self.structure.natural.index(self.natural)
            if isinstance(self.structure, Written):
                x, place = self.structure.reported(x)[0], self.natural.i - self.structure.n_scales
            value: np.ndarray = np.asarray(x[place]).reshape(own.shape[:-2])
            return value
        variances = np.diagonal(own, axis1=-2, axis2=-1)
        if self.kind == "sd":
            sd: np.ndarray = np.sqrt(variances[..., self.natural.i])
            return sd
        with np.errstate(invalid="ignore", divide="ignore"):
            correlations = [
                own[..., i, j] / (np.sqrt(variances[..., i]) * np.sqrt(variances[..., j]))
                for i, j in self.natural.pairs(q)
            ]
        value = correlations[0]
        for other in correlations[1:]:  # the same of two other effects, where these have no variance
            value = np.where(np.isnan(value), other, value)
        return value


def names_of_variances(labels: Labels, structures: Sequence[Structure]) -> tuple[VarianceParameter, ...]:
    """The parameters of the random effects' covariances, term by term, in the order of every table; sigma follows."""
    return tuple(
        VarianceParameter(natural.name(term.effects, group), t, natural, structure)
        for t, (group, term, structure) in enumerate(zip(term_names(labels), labels.terms, structures, strict=True))
        for natural in structure.natural
    )


def names_of_residuals(labels: Labels) -> tuple[str, ...]:
    """The parameters of the residuals beside sigma: ``disp~Sex[T.Female]``, of the logarithm of the standard deviation,
    and ``rho|Subject``, or ``range|Subject`` of one by distance."""
    name = "range" if labels.residual.partition("(")[0] in KERNELS else "rho"
    correlation = (f"{name}|{labels.residual_group}",) if labels.residual else ()
    return (*(f"disp~{name}" for name in labels.dispersion), *correlation)


def names_of_further(labels: Labels) -> tuple[str, ...]:
    """Parameters beside standard deviations, correlations and sigma: of residuals, or of correlations by distance."""
    return (*names_of_residuals(labels), *names_of_kernels(labels))


def further_of(est: Any) -> np.ndarray:
    """Their estimates ``(..., r)``."""
    own = getattr(est, "residual", None) if getattr(est, "kernels", None) is None else est.kernels
    return np.zeros(0) if own is None else np.asarray(own)


def names_of_kernels(labels: Labels) -> tuple[str, ...]:
    """The parameters of correlations by distance: ``range|exp(u + v | 1)``, ``smoothness|mat(u + v | 1)``."""
    if labels.state is None:
        return ()
    kernels = {part.group.name: part.kernel for part in labels.state.parsed.random}
    return tuple(
        f"{name}|{term.group}"
        for term in labels.terms
        if (own := kernels.get(term.group)) is not None
        for name in own.kernel.parameters
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
    column: np.ndarray = row_values(name, values, index, len(index), numbers)
    return column


def values_of_fit(labels: Labels, name: str, values: Any) -> np.ndarray:
    """:func:`values_of_rows` without missing values.

    Raises:
        DataError: another length, labels that are not the fit's, or a missing value.
    """
    column = values_of_rows(labels, name, values)
    missing = np.flatnonzero(~np.isfinite(column))
    if len(missing):
        raise DataError(
            f"{name} is missing or infinite in {len(missing)} of the {len(column)} rows of the fit (first: row "
            f"{labels.frame.index[missing[0]]}): fit the table with that column, which leaves such rows out"
        )
    return column


def responses_of_rows(labels: Labels, Y: Any) -> np.ndarray:
    """Many responses for the rows of a fit, ``(B, nobs)``: an array or a data frame with one in every row, or a list of
    such as :func:`values_of_rows` takes. Columns of a data frame that are labels of the table are lined up, unless they
    are the numbers 0, 1, ... that a data frame has when nobody names its columns.

    Raises:
        DataError: no numbers, or another length.
    """
    n, used = len(labels.frame.index), labels.used
    if isinstance(Y, list | tuple) and any(np.ndim(y) == 1 for y in Y):
        Y = np.array([values_of_rows(labels, f"response {i + 1}", y) for i, y in enumerate(Y)])
    elif isinstance(Y, pd.DataFrame) and not isinstance(Y.columns, pd.RangeIndex) and Y.columns.is_unique:
        Y = Y[labels.frame.index] if labels.frame.index.isin(Y.columns).all() else Y
    try:
        Y = np.asarray(Y) if np.iscomplexobj(Y) else np.asarray(Y, dtype=np.float64)
    except (TypeError, ValueError):
        raise DataError(f"Y must be numbers, (B, {n}): got {type(Y).__name__} of others") from None
    if np.iscomplexobj(Y):
        raise DataError("Y holds complex numbers; take their real part, size or angle")
    if Y.ndim == 2 and used is not None and Y.shape[1] == len(used):
        Y = Y[:, used]
    if Y.ndim != 2 or Y.shape[1] != n:
        or_all = "" if used is None else f" or (B, {len(used)})"
        turned = Y.ndim == 2 and Y.shape[0] in (n, *(() if used is None else (len(used),)))
        hint = ": turn it, Y.T" if turned else ""
        raise DataError(f"Y has shape {Y.shape}; many responses are (B, {n}){or_all}, one per row{hint}")
    return np.ascontiguousarray(Y)


def factors_of(name: str) -> list[str]:
    """The factors of a column's name: of ``a:b`` two.

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
    return parts


def interaction_key(name: str) -> tuple[str, ...]:
    """The factors of a column's name in alphabetical order: ``a:b`` and ``b:a`` are one product."""
    return tuple(sorted(factors_of(name)))


# --- what a user types -----------------------------------------------------------------------------------------------

# Interactions of more factors are understood in any order too, but other orders are not listed.
MOST_LISTED = 3


class Spellings(Mapping[str, int]):
    """Every spelling of some names that is understood -> the place of the name among them.

    Names are those of effects, or of their standard deviations and correlations (``sd_Days|Subject``). Understood are
    the name itself; other blanks, ``^`` for ``**``, ``(Intercept)``, the factors of an interaction in another order;
    and R's names: levels that follow the factor (``recipeB``, ``flagTRUE``), ``factor(a)``, numbers of the columns that
    sums and Helmert's contrasts make (``recipe1``). A spelling that two names share, or that is how another name is
    written more exactly, is not understood. Iteration gives a list of spellings that need no rule for blanks.

    Args:
        names: all different.
        refused: names that nothing is to stand for, such as columns that were left out of the fit.
        in_order: names stand in the order of the columns, so that R's numbers of contrasts are known.

    Example:
        >>> from mixjax.fitted.names import Spellings
        >>> known = Spellings(["Intercept", "time", "arm[T.treated]", "arm[T.treated]:time", "I(x ** 2)"])
        >>> [known[name] for name in ("(Intercept)", "armtreated", "time:armtreated", "I(x^2)")]
        [0, 2, 3, 4]
    """

    def __init__(self, names: Sequence[str], refused: Collection[str] = (), in_order: bool = True):
        self._own = {name: j for j, name in enumerate(names)}
        self._refused = set(refused) - set(names)
        everything = [*names, *sorted(self._refused)]
        numbers = _numbers_of_contrasts(everything) if in_order else {}
        self._keys: list[dict[Any, int | None]] = []
        for key_of in (_exact_key, _r_key, lambda name: _r_key(name, numbers)):
            keys: dict[Any, int | None] = {}
            for place, name in enumerate(everything):
                key = key_of(name)
                keys[key] = None if key in keys or name in self._refused else place
            self._keys.append(keys)
        self._listed = self._list(names, numbers)

    def __getitem__(self, name: str) -> int:
        if name in self._own:
            return self._own[name]
        if not isinstance(name, str) or name in self._refused:
            raise KeyError(name)
        # From the most exact reading down; the first that knows the name decides, also that it is not understood.
        for keys, key in zip(self._keys, (_exact_key(name), _r_key(name), _r_key(name)), strict=True):
            if key in keys:
                found = keys[key]
                if found is None:
                    raise KeyError(name)
                return found
        raise KeyError(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._listed)

    def __len__(self) -> int:
        return len(self._listed)

    def _list(self, names: Sequence[str], numbers: Mapping[str, str]) -> dict[str, int]:
        found = dict(self._own)
        for name in names:
            parts = factors_of(name)
            ways: list[Callable[[str], str]] = [str, _r_part, lambda part: numbers.get(part, _r_part(part))]
            orders = itertools.permutations(parts) if len(parts) <= MOST_LISTED else iter([tuple(parts)])
            for order in orders:
                for way in ways:
                    spelling = ":".join(map(way, order)) if name != "Intercept" else "(Intercept)"
                    for own in (spelling, spelling.replace(" ** ", "^")):
                        if own not in found and own in self:
                            found[own] = self[own]
        return found


_COEFFICIENT = re.compile(r"(sd|cor|var|cov)_(.*)\|(.*)", re.DOTALL)
_LEVEL = re.compile(r"\[(?:T\.)?([^\[\]]*)\](?=$|\.)")  # a dot: of the two effects of a correlation
_CODED = re.compile(r"(.*)\[[SHD]\.([^\[\]]*)\]", re.DOTALL)
_BLANKS = re.compile(r"""('[^']*'|"[^"]*"|`[^`]*`)|\s+""")


def _exact_key(name: str) -> Any:
    """The name without blanks, its factors sorted."""
    return _key(name, _plain)


def _r_key(name: str, numbers: Mapping[str, str] | None = None) -> Any:
    """The same as R writes it."""
    return _key(name, lambda part: _plain((numbers or {}).get(part) or _r_part(part)))


def _key(name: str, part_of: Callable[[str], str]) -> Any:
    written = _COEFFICIENT.fullmatch(name)
    if written is None:
        return tuple(sorted(map(part_of, factors_of(name))))
    kind, effects, group = written.groups()
    # Effects may have dots in their names, so that the two of a correlation are not told apart.
    effects = effects.replace("(Intercept)", "Intercept")
    return (kind, tuple(sorted(map(part_of, factors_of(effects)))), group.replace(" ", ""))


def _plain(part: str) -> str:
    part = _BLANKS.sub(lambda found: found[1] or "", part)
    if part == "(Intercept)":
        return "Intercept"
    return re.sub(r"^(?:as\.)?factor\(", "C(", part.replace("^", "**"))


def _r_part(part: str) -> str:
    """A factor's column as R names it: the level follows the factor."""
    return _LEVEL.sub(lambda level: {"True": "TRUE", "False": "FALSE"}.get(level[1], level[1]), part)


def _numbers_of_contrasts(names: Sequence[str]) -> dict[str, str]:
    """``recipe[S.A]`` -> ``recipe1``: R numbers the columns of contrasts that are not single levels.

    Not where a number is the name of a level of another column, because it could be meant.
    """
    levels: dict[str, list[str]] = {}
    for part in dict.fromkeys(part for name in names for part in factors_of(name)):
        coded = _CODED.fullmatch(part)
        if coded is not None:
            levels.setdefault(coded[1], []).append(part)
    found: dict[str, str] = {}
    for factor, parts in levels.items():
        own = [_CODED.fullmatch(part)[2] for part in parts]  # type: ignore[index]
        numbers = [str(k + 1) for k in range(len(own))]
        if all(number == level or number not in own for number, level in zip(numbers, own, strict=True)):
            found |= {part: f"{factor}{number}" for part, number in zip(parts, numbers, strict=True)}
    return found


def known_names(labels: Labels) -> Spellings:
    """Every spelling of a fixed effect that is understood -> its column of X."""
    return Spellings(labels.fixed, labels.dropped_columns)


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
