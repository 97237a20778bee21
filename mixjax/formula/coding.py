"""Terms -> columns: how the levels of factors are coded, where one of them is left out, products, names.

Contrasts are formulaic's, but for those of treatments, and so are the names of columns, their order and the rule by
which a factor is coded in full.
A factor's contrasts are formed once, one row per level, and the rows of a table pick theirs by number.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import chain, product
from typing import Any

import numpy as np
import pandas as pd

from mixjax.formula.algebra import Term

# A product of columns: expressions, each with whether its factor is short of one level.
Scoped = tuple[tuple[str, bool], ...]
# Names of columns, and the columns ``(n, k)``.
Block = tuple[tuple[str, ...], np.ndarray]


@dataclass(frozen=True)
class Contrasts:
    """Levels and contrasts of ``C(...)``, beside the values; stands in formulaic's values where an encoder would."""

    contrasts: Any
    levels: Any


@dataclass(frozen=True)
class Factor:
    """The values of a factor.

    Attributes:
        codes: ``(n,)`` numbers of the levels, -1 where there is no value. levels: in order.
        contrasts: as formulaic's ``C`` takes them; None for treatment contrasts.
        spans_intercept: whether the columns of all levels add up to the constant.
        declared: whether ``C(...)`` made it, and not the kind of its values.
    """

    codes: np.ndarray
    levels: list[Any]
    contrasts: Any = None
    spans_intercept: bool = True
    declared: bool = False

    @staticmethod
    def of(values: pd.Series, levels: Any = None) -> Factor:
        """Of a column: the levels are those given, the categories, or else the values in order."""
        if levels is not None:
            values = pd.Series(pd.Categorical(values, categories=list(levels)))
        elif not isinstance(values.dtype, pd.CategoricalDtype):
            values = values.astype("category")
        own: Any = values.array
        return Factor(own.codes, list(own.categories))

    def __len__(self) -> int:
        return len(self.codes)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The levels' values."""
        values = np.empty(len(self.levels) + 1, object)
        values[:-1] = self.levels
        of_rows: np.ndarray = values[self.codes].astype(object if dtype is None else dtype)
        return of_rows


def metadata_of(value: Any) -> Any:
    """Metadata of formulaic's own values, which otherwise pass for those that they wrap; None of others."""
    return getattr(value, "__formulaic_metadata__", None)


# --- expressions -----------------------------------------------------------------------------------------------------


class Levels:
    """How a factor becomes columns, as the fit had it."""

    def __init__(self, name: str, factor: Factor):
        self.name, self.levels, self.spans_intercept = name, factor.levels, factor.spans_intercept
        self.contrasts = factor.contrasts
        self._coded: dict[bool, Block] = {}

    def block(self, value: Factor, reduced: bool) -> Block:
        """The columns of a factor; a row without a value has zeros."""
        names, coded = self.coded(reduced)
        return names, coded[self._among_own(value)]

    def coded(self, reduced: bool) -> Block:
        """A row for every level and one of zeros."""
        if reduced not in self._coded:
            levels = self.levels
            if self.contrasts is None:  # not worth the time that formulaic takes to load
                sign = "T." if reduced else ""
                names = tuple(f"{self.name}[{sign}{level}]" for level in levels[reduced:])
                self._coded[reduced] = names, np.eye(len(levels) + 1, len(levels))[:, reduced:]
            elif not levels or (len(levels) == 1 and reduced):
                self._coded[reduced] = (), np.zeros((len(levels) + 1, 0))
            else:
                contrasts = _contrasts(self.contrasts)
                matrix = np.asarray(contrasts.get_coding_matrix(levels, reduced_rank=reduced), float)
                form = contrasts.get_factor_format(levels, reduced_rank=reduced)
                fields = contrasts.get_coding_column_names(levels, reduced_rank=reduced)
                names = tuple(form.format(name=self.name, field=field) for field in fields)
                self._coded[reduced] = names, np.vstack([matrix, np.zeros(matrix.shape[1])])
        return self._coded[reduced]

    def unknown(self, value: Factor) -> list[Any]:
        """Levels of rows that the fit does not know, as they appear."""
        if value.levels == self.levels:
            return []
        known = set(self.levels)
        used = (value.levels[code] for code in pd.unique(value.codes) if code >= 0)
        return [level for level in used if level not in known]

    def _among_own(self, value: Factor) -> np.ndarray:
        if value.levels == self.levels:
            return value.codes
        place = {level: k for k, level in enumerate(self.levels)}
        codes: np.ndarray = np.array([*(place.get(level, -1) for level in value.levels), -1])[value.codes]
        return codes


def _contrasts(asked: Any) -> Any:
    """formulaic's object for what its ``C`` takes."""
    from formulaic.transforms import contrasts

    if inspect.isclass(asked) and issubclass(asked, contrasts.Contrasts):
        asked = asked()
    return asked if isinstance(asked, contrasts.Contrasts) else contrasts.CustomContrasts(asked)


class Numbers:
    """How numbers become columns: those of one array, or formulaic's values, such as a spline's."""

    levels = None

    def __init__(self, name: str, value: Any):
        self.name = name
        metadata = metadata_of(value)
        self.spans_intercept = metadata is not None and metadata.spans_intercept
        self.state: dict[str, Any] = {}

    def block(self, value: Any, reduced: bool) -> Block:
        """The columns ``(n, k)``."""
        if metadata_of(value) is None:
            names = [self.name] if value.ndim == 1 else [f"{self.name}[{j}]" for j in range(value.shape[1])]
            return tuple(names), value.reshape(len(value), -1)
        columns = self._columns(value, reduced)
        return tuple(columns), np.column_stack([*columns.values()] or [np.empty((len(value), 0))])

    def _columns(self, value: Any, reduced: bool) -> dict[str, np.ndarray]:
        """formulaic's values, coded by their own encoder where they have one."""
        from formulaic import ModelSpec
        from formulaic.utils.cast import as_columns

        encoder = value.__formulaic_metadata__.encoder
        if encoder is not None:
            spec = ModelSpec(formula=[], output="numpy")
            value = encoder(value, reduced_rank=reduced, drop_rows=[], encoder_state=self.state, model_spec=spec)
        columns, metadata = as_columns(value), value.__formulaic_metadata__
        reduced = reduced and metadata.spans_intercept
        form = (metadata.format_reduced if reduced else None) or metadata.format
        if isinstance(columns, dict):
            columns = {field: v for field, v in columns.items() if not reduced or field != metadata.drop_field}
        return dict(_flat(self.name, columns, form))


def _flat(name: str, values: Any, form: str = "{name}[{field}]") -> Iterator[tuple[str, np.ndarray]]:
    """Columns by name, however deep they are nested."""
    if not isinstance(values, dict):
        yield name, np.asarray(values, float)
        return
    for field, value in values.items():
        if not (isinstance(field, str) and field.startswith("__")):
            metadata = metadata_of(value)
            own = form.format(name=name, field=field)
            yield from _flat(own, value, "{name}[{field}]" if metadata is None else metadata.get_format())


def coder_of(name: str, value: Any) -> Levels | Numbers:
    """How the values of an expression become columns."""
    return Levels(name, value) if isinstance(value, Factor) else Numbers(name, value)


# --- terms -----------------------------------------------------------------------------------------------------------


def scoped_terms(terms: Iterable[Term], spans_intercept: Mapping[str, bool]) -> Iterator[tuple[Scoped, ...]]:
    """Per term the products that it adds to what terms before it span (the rule of marginality).

    A factor coded in full spans its reduced coding and the constant, so a term spans the products of its factors'
    reduced codings with some left out. Those not yet spanned are joined again: beside ``a``, ``a:b`` adds ``a-:b-`` and
    ``b-``, which are ``a:b-``.
    """
    spanned: set[frozenset[tuple[str, bool]]] = set()
    for term in terms:
        parts = [[((name, True),), ()] if spans_intercept[name] else [((name, False),)] for name in term]
        own: list[Scoped] = [tuple(chain(*chosen)) for chosen in product(*parts)]
        new = [scoped for scoped in own if frozenset(scoped) not in spanned]
        yield tuple(_joined(new))
        spanned.update(map(frozenset, new))


def _joined(products: Iterable[Scoped]) -> list[Scoped]:
    """Fewer products of the same span: one with a reduced factor and the same without it are the factor in full."""
    found: dict[frozenset[tuple[str, bool]], Scoped] = {}
    for scoped in sorted(products, key=len):
        own = frozenset(scoped)
        smaller = next((k for k in found if len(k) == len(own) - 1 and k < own and all(f[1] for f in own - k)), None)
        if smaller is None:
            found.setdefault(own, scoped)
            continue
        del found[smaller]
        full = tuple((name, reduced and (name, reduced) in smaller) for name, reduced in scoped)
        found = {frozenset(each): each for each in _joined([*found.values(), full])}
    return list(found.values())


@dataclass(frozen=True)
class TermColumns:
    """One term.

    Attributes:
        scoped: products of coded expressions. columns: names of its columns.
    """

    scoped: tuple[Scoped, ...]
    columns: tuple[str, ...]


@dataclass(frozen=True)
class Spec:
    """How terms become columns, as the fit had it.

    Attributes:
        structure: term by term. coders: expression -> how it becomes columns.
        names: coded expression -> names of its columns.
    """

    structure: tuple[TermColumns, ...]
    coders: Mapping[str, Levels | Numbers]
    names: Mapping[tuple[str, bool], tuple[str, ...]]

    def matrix(self, values: Mapping[str, Any], n: int) -> np.ndarray:
        """The columns of other rows ``(n, p)``.

        Args:
            values: expression -> its values. n: number of rows.

        Raises:
            ValueError: an expression has other columns than it had.
        """
        blocks: dict[tuple[str, bool], np.ndarray] = {}
        for factor, names in self.names.items():
            own, blocks[factor] = self.coders[factor[0]].block(values[factor[0]], factor[1])
            if own != names:
                raise ValueError(f"'{factor[0]}' gives the columns {', '.join(own)}; in the fit {', '.join(names)}")
        return _matrix(self.structure, blocks, n)


def code_terms(terms: Sequence[Term], values: Mapping[str, Any], n: int) -> tuple[np.ndarray, Spec]:
    """The columns of terms on the rows of a fit ``(n, p)``, and how others are coded alike."""
    coders = {name: coder_of(name, value) for name, value in values.items()}
    scoped = list(scoped_terms(terms, {name: coder.spans_intercept for name, coder in coders.items()}))
    used = dict.fromkeys(factor for term in scoped for each in term for factor in each)
    coded = {(name, reduced): coders[name].block(values[name], reduced) for name, reduced in used}
    names = {factor: own for factor, (own, _) in coded.items()}
    structure = tuple(TermColumns(term, tuple(chain(*(_names(each, names) for each in term)))) for term in scoped)
    blocks = {factor: block for factor, (_, block) in coded.items()}
    return _matrix(structure, blocks, n), Spec(structure, coders, names)


def _names(scoped: Scoped, names: Mapping[tuple[str, bool], tuple[str, ...]]) -> Iterator[str]:
    """Names of the columns of a product, the first factor's varying fastest."""
    if not scoped:
        yield "Intercept"
        return
    for chosen in product(*(names[factor] for factor in reversed(scoped))):
        yield ":".join(reversed(chosen))


def _matrix(structure: Sequence[TermColumns], blocks: Mapping[tuple[str, bool], np.ndarray], n: int) -> np.ndarray:
    columns = np.empty((n, sum(len(term.columns) for term in structure)))
    at = 0
    for scoped in chain(*(term.scoped for term in structure)):
        own = [blocks[factor] for factor in scoped]
        # Single columns are multiplied first, and once.
        single = [block for block in own if block.shape[1] == 1]
        own = [block for block in own if block.shape[1] != 1] + ([reduce(np.multiply, single)] if single else [])
        made = reduce(_products, own) if own else np.ones((1, 1))
        columns[:, at : at + made.shape[1]] = made
        at += made.shape[1]
    return columns


def _products(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """All products of two columns, the first's varying fastest."""
    products: np.ndarray = (b[:, :, None] * a[:, None, :]).reshape(len(a), a.shape[1] * b.shape[1])
    return products
