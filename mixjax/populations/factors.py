"""Factors of a population: who belongs to which level, and the order of rows within a level."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.checks import check_count, check_list, check_memory
from mixjax.families.sampling import log_gamma, standard_uniform
from mixjax.populations.expressions import Kind, Scope
from mixjax.populations.variables import Spec, Variable, factor_of, shown

Balance = Literal["random", "blocks", "cycle"]
# Probabilities may miss a sum of 1 by rounding.
ROUNDING = 1e-8
# Levels at most, because their codes are int32; and the bytes that the name of one takes, with the references to it.
MOST, NAME = 2**31 - 1, 128
# Names of levels that are given one by one, at most.
NAMES = 10**7


@dataclass(frozen=True, eq=False)
class Dirichlet:
    """Probabilities that are drawn anew with the predictors; see :func:`dirichlet`."""

    alpha: Any

    def __repr__(self) -> str:
        return f"dirichlet({shown(self.alpha)})"


def dirichlet(alpha: Any) -> Dirichlet:
    """Probabilities of a factor's levels, drawn anew with each sample of the predictors.

    Args:
        alpha: concentration, above 0: one number, or one per level. Large: about equal shares; small: very unequal.

    Example:
        >>> import mixjax as mj
        >>> pop = mj.population(county=mj.factor(26, probs=mj.dirichlet(2)))
        >>> pop.sample_x(500, key=1).to_frame()["county"].value_counts().sum().item()
        500
    """
    return Dirichlet(alpha)


@dataclass(frozen=True, eq=False)
class Factor(Spec):
    """Levels for rows, or for the levels of another factor; see :func:`factor` and :func:`categorical`."""

    levels: Any
    probs: Any = None
    balance: Balance = "random"
    each: int = 1
    within: str | None = None
    by: str | None = None

    @property
    def factors(self) -> tuple[str, ...]:
        return tuple(name for name in (self.by, self.within) if name is not None)

    def bind(self, name: str, scope: Scope) -> Variable:
        if self.balance not in ("random", "blocks", "cycle"):
            raise ValueError(f"{name}: balance must be 'random', 'blocks' or 'cycle', got {self.balance!r}")
        each = check_count(f"{name}: each", self.each, 1)
        if self.balance == "cycle" and self.probs is not None:
            raise ValueError(f"{name}: balance='cycle' gives every level the same number of rows; leave out probs")
        if self.balance != "cycle" and each != 1:
            raise ValueError(f"{name}: each belongs to balance='cycle'")
        parents = None if self.within is None else factor_of(self.within, f"{name}: within", scope)
        own, counts = _levels(self.levels, name, parents)
        parent = None
        if parents is None:
            labels = tuple(own[0])
        else:
            assert self.within is not None
            labels = tuple(
                f"{above}/{label}" for above, children in zip(parents, own, strict=True) for label in children
            )
            parent = (self.within, np.repeat(np.arange(len(parents)), counts))
        leaves = {} if self.probs is None else _shares(self.probs, name, counts)
        static = (tuple(counts), self.balance, each, self.within, isinstance(self.probs, Dirichlet))
        return Variable(name, self.by, {name: Kind(labels=labels)}, _codes, static, leaves, (), self.factors, parent)

    def describe(self) -> str:
        if isinstance(self.levels, int | np.integer):
            text = f"{self.levels} level{'s' * (self.levels != 1)}"
        else:
            text = f"levels {shown(list(self.levels)[:6])}" + ("..." if len(self.levels) > 6 else "")
        text += f" within each {self.within}" if self.within else ""
        probs = "" if self.probs is None else f", probs {shown(self.probs)}"
        each = f", each {self.each}" if self.each > 1 else ""
        return f"factor: {text}, {self.balance}{each}{probs}"


def factor(
    levels: int | Sequence[Any],
    probs: Any = None,
    balance: Balance = "random",
    within: str | None = None,
    each: int = 1,
) -> Factor:
    """A grouping factor.

    Args:
        levels: their number (they are called ``"1"``, ``"2"``, ...) or their names. With ``within``: of each level of
            that factor; a list of integers then gives the numbers one by one. Nested levels are called ``"3/2"``, have
            codes of their own, and no two parents share one.
        probs: probabilities of the levels, or :func:`dirichlet`; None: equal.
        balance: ``"random"``: each row's level is drawn. ``"blocks"``: sorted, in runs as equal as can be (or as long
            as ``probs`` say). ``"cycle"``: 1, 2, ..., 1, 2, ...; blocks and cycle together cross two factors fully.
        within: the factor that this one is nested in; ``balance`` then holds within each of its levels.
        each: of a cycle, how many rows in a row have the same level. Three crossed factors of a, b, c levels: blocks,
            cycle with ``each=c``, cycle.

    Returns:
        A variable for :func:`mixjax.population`.

    Example:
        >>> import mixjax as mj
        >>> pop = mj.population(
        ...     school=mj.factor(2, balance="blocks"), room=mj.factor(2, within="school", balance="cycle"))
        >>> pop.sample_x(4, key=1).to_frame()["room"].tolist()
        ['1/1', '1/2', '2/1', '2/2']
    """
    return Factor(levels, probs, balance, each, within)


def categorical(
    levels: int | Sequence[Any], probs: Any = None, balance: Balance = "random", by: str | None = None
) -> Factor:
    """A categorical predictor, such as a treatment.

    Args:
        levels, probs, balance: as for :func:`factor`.
        by: a factor whose levels get one value each: ``categorical(["t", "c"], balance="cycle", by="school")`` treats
            half of the schools.

    Returns:
        A variable for :func:`mixjax.population`.

    Example:
        >>> import mixjax as mj
        >>> pop = mj.population(
        ...     school=mj.factor(4, balance="blocks"), arm=mj.categorical(["t", "c"], balance="cycle", by="school"))
        >>> pop.sample_x(8, key=1).to_frame()["arm"].tolist()
        ['t', 't', 'c', 'c', 't', 't', 'c', 'c']
    """
    return Factor(levels, probs, balance, by=by)


@dataclass(frozen=True, eq=False)
class Occasion(Spec):
    """Number of a row within its level; see :func:`occasion`."""

    within: str
    times: Any = None

    @property
    def factors(self) -> tuple[str, ...]:
        return (self.within,)

    def bind(self, name: str, scope: Scope) -> Variable:
        factor_of(self.within, f"{name}: occasion", scope)
        if self.times is None:
            return Variable(name, None, {name: Kind(dtype=np.int64)}, _ranks, self.within, needs=self.factors)
        times = np.asarray(self.times)
        if times.ndim != 1 or not times.size or times.dtype.kind not in "iuf" or not np.isfinite(times).all():
            raise ValueError(f"{name}: times must be a list of finite numbers, got {self.times!r}")
        dtype = np.int64 if times.dtype.kind in "iu" else None
        failure = f"{name}: a level of {self.within} has more rows than the {len(times)} times"
        leaves = {"times": times.astype(np.float64)}
        return Variable(name, None, {name: Kind(dtype=dtype)}, _times, self.within, leaves, (failure,), self.factors)

    def describe(self) -> str:
        return f"occasion within {self.within}" + ("" if self.times is None else f", times {shown(list(self.times))}")


def occasion(within: str, times: Sequence[float] | None = None) -> Occasion:
    """The number of a row within its level: 0, 1, 2, ... in the order of rows, for repeated measurements.

    Args:
        within: the factor. times: in place of 0, 1, 2, ..., such as ``[0, 1, 3, 6]`` months; no level may have more
            rows than there are times.

    Returns:
        A variable for :func:`mixjax.population`.

    Example:
        >>> import mixjax as mj
        >>> pop = mj.population(subject=mj.factor(2, balance="cycle"), month=mj.occasion("subject", times=[0, 3, 6]))
        >>> pop.sample_x(6, key=1).to_frame()["month"].tolist()
        [0, 0, 3, 3, 6, 6]
    """
    return Occasion(within, times)


# --- what is checked -------------------------------------------------------------------------------------------------


def _levels(levels: Any, name: str, parents: tuple[str, ...] | None) -> tuple[list[list[str]], list[int]]:
    """Names of the levels, and their number, per parent; without a parent, as if there were one."""
    n_parents = 1 if parents is None else len(parents)
    if isinstance(levels, bool | str) or not (isinstance(levels, int | np.integer) or hasattr(levels, "__iter__")):
        raise ValueError(f"{name}: levels must be their number or a list of names, got {levels!r}")
    if isinstance(levels, int | np.integer):
        counts = [int(levels)] * n_parents
    else:
        given = check_list(f"{name}: levels", levels, NAMES)
        numbers = [isinstance(level, int | np.integer) and not isinstance(level, bool) for level in given]
        if parents is None or not all(numbers) or not given:
            labels = [str(level) for level in given]
            twice = sorted({label for label in labels if labels.count(label) > 1})
            if twice:
                raise ValueError(f"{name}: the level {twice[0]!r} is there twice")
            if not labels:
                raise ValueError(f"{name}: a factor needs one level or more, got none")
            return [labels] * n_parents, [len(labels)] * n_parents
        if len(given) != n_parents:
            raise ValueError(f"{name}: {len(given)} numbers of levels within {n_parents} levels")
        counts = [int(level) for level in given]
    if min(counts) < 1:
        raise ValueError(f"{name}: a factor needs one level or more, got {min(counts)}")
    total = check_count(f"{name}: levels", sum(counts), 1, MOST)
    check_memory(f"{name}: {total} levels", NAME * total, "give the factor fewer")
    return [[str(j + 1) for j in range(count)] for count in counts], counts


def _shares(probs: Any, name: str, counts: list[int]) -> dict[str, np.ndarray]:
    if len(set(counts)) > 1:
        raise ValueError(f"{name}: probs need the same number of levels in each parent")
    m = counts[0]
    drawn = isinstance(probs, Dirichlet)
    values = np.asarray(probs.alpha if drawn else probs, np.float64)
    if drawn and values.ndim == 0:
        values = np.full(m, values)
    if values.shape != (m,):
        raise ValueError(f"{name}: {values.size} probabilities for {m} levels")
    if drawn:
        if not (np.isfinite(values) & (values > 0)).all():
            raise ValueError(f"{name}: the alpha of a Dirichlet distribution must be above 0, got {values.tolist()}")
        return {"alpha": values}
    if not (values >= 0).all():
        raise ValueError(f"{name}: probabilities must be 0 or more, got {values.tolist()}")
    if abs(values.sum() - 1) > ROUNDING:
        raise ValueError(f"{name}: probabilities must sum to 1, and {values.tolist()} sum to {values.sum():.6g}")
    return {"probs": values / values.sum()}


# --- in compiled programs --------------------------------------------------------------------------------------------


def _codes(
    static: Any, leaves: Mapping[str, Any], key: Any, count: int, column: Callable[[str], Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    counts, balance, each, within, drawn = static
    for_shares, for_rows = jax.random.split(key) if drawn else (key, key)
    n_parents, offset = len(counts), np.cumsum([0, *counts[:-1]])
    parent = jnp.zeros(count, jnp.int64) if within is None else column(within)
    m = jnp.asarray(counts)[parent]
    if balance == "random":
        place = standard_uniform(for_rows, (count,))
    else:
        rank, size = _within(parent, n_parents)
        if balance == "cycle":
            return ((jnp.asarray(offset)[parent] + rank // each % m).astype(jnp.int32),), ()
        place = (rank + 0.5) / size
        if not leaves:
            return ((jnp.asarray(offset)[parent] + rank * m // size).astype(jnp.int32),), ()
    if leaves:
        if drawn:
            # By logarithms, because gamma variables of a small alpha are smaller than any number.
            shares = jax.nn.softmax(log_gamma(for_shares, leaves["alpha"], (n_parents, counts[0])), axis=1)
        else:
            shares = jnp.broadcast_to(leaves["probs"], (n_parents, counts[0]))
        upper = jnp.cumsum(shares, axis=1)
        upper = upper / upper[:, -1:]
        if n_parents == 1:
            own = jnp.searchsorted(upper[0], place, side="right")
        else:
            own = (place[:, None] >= upper[parent]).sum(axis=1)
    else:
        own = jnp.minimum(jnp.floor(place * m).astype(jnp.int64), m - 1)
    return ((jnp.asarray(offset)[parent] + own).astype(jnp.int32),), ()


def _within(codes: Any, m: int) -> tuple[Any, Any]:
    """Per row its number within its level, and the number of rows of that level."""
    count = codes.shape[0]
    if m == 1:
        return jnp.arange(count), jnp.full(count, count)
    sizes = jnp.zeros(m, jnp.int64).at[codes].add(1)
    order = jnp.argsort(codes, stable=True)
    rank = jnp.arange(count) - (jnp.cumsum(sizes) - sizes)[codes[order]]
    return jnp.zeros(count, jnp.int64).at[order].set(rank), sizes[codes]


def _ranks(
    static: Any, leaves: Mapping[str, Any], key: Any, count: int, column: Callable[[str], Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    # Levels are no more than rows that can be told apart: the number of levels itself is not needed.
    codes = column(static)
    order = jnp.argsort(codes, stable=True)
    first = jnp.searchsorted(codes[order], codes[order], side="left")
    rank = jnp.zeros(count, jnp.int64).at[order].set(jnp.arange(count) - first)
    return (rank.astype(jnp.float64),), ()


def _times(
    static: Any, leaves: Mapping[str, Any], key: Any, count: int, column: Callable[[str], Any]
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    ((rank,), _) = _ranks(static, leaves, key, count, column)
    times = leaves["times"]
    at, last = rank.astype(jnp.int64), times.shape[0] - 1
    return (jnp.where(at > last, jnp.nan, times[jnp.minimum(at, last)]),), ((at > last).any(),)
