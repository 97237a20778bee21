"""Simulated populations: factors, predictors, random effects and responses, described once and sampled by key."""

from __future__ import annotations

import keyword
import re
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from mixjax.checks import DataError, check_count, check_memory
from mixjax.machine import float64, n_cores
from mixjax.populations.columns import from_series
from mixjax.populations.draws import Plan, check_order, draw_stage, failures_of, x_block, y_block
from mixjax.populations.expressions import shortened
from mixjax.populations.predictors import Empirical, MultivariateNormal
from mixjax.populations.responses import RandomEffects, Response
from mixjax.populations.sample import PopulationRows, Sample, check_numbers, row_of
from mixjax.populations.variables import Spec
from mixjax.simulation import as_key


def population(*, functions: Mapping[str, Callable[..., Any]] | None = None, **variables: Spec) -> Population:
    """Describe a population to draw samples from: who belongs together, predictors, random effects, responses.

    Args:
        functions: name -> function in JAX, for use in expressions besides exp, log, sqrt, abs, where and others.
        variables: name -> :func:`factor`, :func:`categorical`, :func:`occasion`, :func:`normal`, :func:`uniform`,
            :func:`bernoulli`, :func:`poisson`, :func:`multivariate_normal`, :func:`empirical`, :func:`derived`,
            :func:`custom`, :func:`random_effects`, :func:`response`. A variable may refer to those before it, in
            expressions: text such as ``"50 + a[0] + x**2 * (x > 0) + by_level(group, {'t': 2, 'c': 0})"``, or a
            function whose arguments are named after variables.

    Returns:
        :class:`Population`.

    Raises:
        ValueError: names the variable, and what there is in place of an unknown name.

    Example:
        >>> import mixjax as mj
        >>> pop = mj.population(
        ...     school=mj.factor(20), x=mj.normal(), a=mj.random_effects("school", sd=(1, 0.5), cor=0.3),
        ...     y=mj.response("50 + a[0] + (0.3 + a[1]) * x", error_scale=2))
        >>> pop.sample_x(200, key=1).sample_y(key=2).shape
        (200, 3)
        >>> pop.sample_many(key=3, B=1000, n=200)["y"].shape
        (1000, 200)
    """
    for name, spec in variables.items():
        if not name.isidentifier() or keyword.iskeyword(name):
            raise ValueError(f"{name!r} cannot be the name of a variable: expressions could not use it")
        if not isinstance(spec, Spec):
            raise ValueError(
                f"{name} must be a variable such as factor(...), normal(...), random_effects(...) or response(...), "
                f"got {spec!r}"
            )
    if not variables:
        raise ValueError(
            "a population needs variables, as in population(x=normal(), y=response('2 * x', error_scale=1))"
        )
    for name, function in (functions or {}).items():
        if not callable(function):
            raise ValueError(f"functions[{name!r}] must be a function, got {function!r}")
    return Population(dict(variables), dict(functions or {}))


@dataclass(frozen=True, eq=False, repr=False)
class Population:
    """Variables that samples are drawn from; made by :func:`population`.

    Every variable has a stream of random numbers of its own, found by its name: another one more, or in another place,
    changes none of them.

    Attributes:
        variables: name -> description. functions: the user's own, for expressions.
    """

    variables: Mapping[str, Spec]
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._plan  # noqa: B018  (finds what is wrong)

    def __getstate__(self) -> dict[str, Any]:
        return {"variables": self.variables, "functions": self.functions}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    @cached_property
    def _plan(self) -> Plan:
        check_order(self.variables, {name: _columns(name, spec) for name, spec in self.variables.items()})
        return Plan(self.variables, self.functions)

    @property
    def responses(self) -> list[str]:
        """Names of the responses."""
        return [name for name, spec in self.variables.items() if isinstance(spec, Response)]

    def levels(self, factor: str) -> tuple[str, ...]:
        """Names of a factor's levels, in the order of their codes."""
        kind = self._plan.kinds.get(factor)
        if kind is None or kind.labels is None:
            factors = [name for name, kind in self._plan.kinds.items() if kind.labels is not None]
            raise ValueError(f"{factor!r} is no factor (factors: {shortened(factors) or 'none'})")
        return kind.labels

    def __repr__(self) -> str:
        rows = [
            {"variable": name, "per": spec.unit or "row", "definition": spec.describe()}
            for name, spec in self.variables.items()
        ]
        columns = ["variable", "per", "definition"]
        widths = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
        table = [dict(zip(columns, columns, strict=True)), *rows]
        lines = ["  ".join(row[c].ljust(widths[c]) for c in columns).rstrip() for row in table]
        return f"Population of {len(rows)} variable{'s' * (len(rows) > 1)}\n" + "\n".join(lines)

    # --- one sample ---

    def sample_x(self, n: int, key: Any, replicate: int = 0) -> Sample:
        """Draw predictors.

        Args:
            n: number of rows. key: int or JAX key. replicate: number of the sample; samples of one key are independent.

        Returns:
            :class:`Sample`; its ``sample_y(key)`` draws responses.

        Raises:
            ValueError: a parameter that is an expression takes an impossible value; names it.
        """
        n, replicate = self._rows(n), check_numbers(replicate, 1)
        with float64():
            place = replicate % self._plan.size(n)
            return Sample(self, row_of(self._x(as_key(key), n, replicate), place, self._plan.columns("x")), n)

    def given(self, table: pd.DataFrame) -> Sample:
        """Predictors of your own, such as those of a real study, in place of drawn ones.

        Args:
            table: has the columns that the responses need; levels of factors by name. Further columns are kept.

        Returns:
            :class:`Sample`.

        Raises:
            DataError: a column or a level is not what the population has.

        Example:
            >>> import mixjax as mj
            >>> sleep = mj.datasets.load("sleepstudy")
            >>> pop = mj.population(
            ...     Subject=mj.factor(sleep["Subject"].unique()), Days=mj.normal(),
            ...     b=mj.random_effects("Subject", sd=30), y=mj.response("250 + 10 * Days + b", error_scale=25))
            >>> len(pop.given(sleep).sample_y(key=1))
            180
        """
        if not isinstance(table, pd.DataFrame) or not len(table):
            raise DataError("given needs a pandas DataFrame with rows")
        arrays = {}
        for name in self._plan.columns("x"):
            if name in table:
                arrays[name] = from_series(table[name], name, self._plan.kinds[name])
            elif name in self._plan.needed():
                raise DataError(f"the table has no column {name!r}, which the responses need")
        return Sample(self, arrays, len(table), table)

    # --- many samples ---

    def sample_many(
        self,
        key: Any,
        B: int,
        n: int | None = None,
        first: int = 0,
        x: Literal["fixed", "new"] | Sample = "fixed",
        x_key: Any = None,
        effects: bool = False,
        keep: str | tuple[str, ...] | list[str] | None = None,
    ) -> dict[str, jax.Array]:
        """Many samples, on the device.

        Sample i is ``sample_x(n, x_key, replicate=first + i).sample_y(key, replicate=first + i)``, to the last bit;
        with predictors that all share, ``sample_x(n, x_key).sample_y(key, replicate=first + i)``.

        Args:
            key: int or JAX key of the responses. B: number of samples. n: rows of each; not needed with a Sample.
            first: number of the first one.
            x: ``"fixed"``: all samples share the predictors. ``"new"``: each has its own. Or a :class:`Sample`.
            x_key: of the predictors; None: key.
            effects: with the random effects, one value per level.
            keep: names of the columns wanted, or of a variable that has several, as ``a`` for ``a_0`` and ``a_1``;
                None: all.

        Returns:
            Column -> JAX array, float64, or codes of a factor, int32. Predictors ``(1, n)`` where they are shared, else
            ``(B, n)``; responses ``(B, n)``; random effects ``(B, levels)``. Outside of ``jax.enable_x64()`` JAX would
            reduce them to single precision in the next operation: go on inside, or by ``numpy.asarray``.

        Raises:
            ValueError: as :meth:`sample_x`.
        """
        x_key = key if x_key is None else x_key
        B, first = check_count("B", B, 1), check_numbers(first, B)
        plan = self._plan
        if isinstance(x, Sample):
            if x.population is not self and x.population._plan != plan:
                raise ValueError("x is a sample of another population")
            if n is not None and n != x.n:
                raise ValueError(f"n is {n}, and the predictors have {x.n} rows; leave out n")
            n, shared = x.n, x
        elif x not in ("fixed", "new"):
            raise ValueError(f"x must be 'fixed', 'new' or a Sample, got {x!r}")
        else:
            if n is None:
                raise ValueError("n, the number of rows, is needed")
            n = self._rows(n)
            shared = None
        wanted = _wanted(plan, effects, keep)
        new = isinstance(x, str) and x == "new"
        drawn = plan.numbers(n, [name for name in wanted if new or plan.stages[name] == "y"])
        check_memory(f"{B} samples of {n} rows", 8 * B * drawn, "draw fewer at a time (first=), or keep= fewer columns")
        size = plan.size(n)
        own_x = [name for name in wanted if plan.stages[name] == "x"]
        own_y = [name for name in wanted if plan.stages[name] == "y"]
        with float64():
            key, x_key = as_key(key), as_key(x_key)
            if not new and shared is None:
                shared = Sample(self, row_of(self._x(x_key, n, 0), 0, plan.columns("x")), n)
            spread = None if new else shared._spread(size)  # type: ignore[union-attr]

        def work(block: int) -> dict[str, Any]:
            begin = block * size
            rows = slice(max(first, begin) - begin, min(first + B, begin + size) - begin)
            with float64():  # the scope is each thread's own
                sampled = self._x(x_key, n, begin, rows) if new else {}
                part = {name: sampled[name] for name in own_x if name in sampled}
                if own_y:
                    given = {name: sampled[name] for name in plan.needed()} if spread is None else spread
                    part |= {name: v for name, v in self._y(given, key, n, begin, rows).items() if name in own_y}
                return {name: value[rows] for name, value in part.items()}

        blocks = range(first // size, -(-(first + B) // size))
        if own_y or new:
            parts = [work(blocks[0])]  # compiles
            if len(blocks) > 1 and jax.default_backend() == "cpu":
                with ThreadPoolExecutor(n_cores()) as pool:
                    parts += pool.map(work, blocks[1:])
            else:
                parts += map(work, blocks[1:])
        else:
            parts = []
        found = {}
        with float64():
            for name in wanted:
                if not new and name in own_x:
                    assert shared is not None
                    found[name] = jnp.asarray(shared.column(name))[None]
                else:  # column by column, so that no more than one of them is there twice
                    found[name] = jnp.concatenate([part.pop(name) for part in parts])
        return found

    def draw(self, key: Any, n: int, x_key: Any = None) -> dict[str, jax.Array]:
        """One sample as a pure function of keys, for use inside ``jax.jit`` and ``jax.vmap``, with 64 bits enabled.

        Args:
            key: JAX key. n: rows. x_key: of the predictors; None: key.

        Returns:
            Column -> ``(n,)``, random effects ``(levels,)``. Sample i of :meth:`sample_many` is, up to rounding,
            ``draw(fold_in(key, i), n, fold_in(x_key, 0))``. Impossible parameters are no errors here; they give NaN.

        Example:
            >>> import jax, mixjax as mj
            >>> pop = mj.population(x=mj.normal(), y=mj.response("2 * x", error_scale=1))
            >>> with jax.enable_x64():
            ...     keys = jax.random.split(jax.random.key(1), 5)
            ...     jax.jit(jax.vmap(lambda key: pop.draw(key, 30)["y"].mean()))(keys).shape
            (5,)
        """
        plan, n = self._plan, self._rows(n)
        x_leaves, y_leaves = (jax.tree.map(jnp.asarray, plan.leaves(stage)) for stage in ("x", "y"))
        x, _ = draw_stage(plan, "x", x_leaves, key if x_key is None else x_key, n, {})
        y, _ = draw_stage(plan, "y", y_leaves, key, n, x)
        return x | y

    def rows(
        self,
        n: int | None = None,
        x: Literal["fixed", "new"] | Sample = "fixed",
        x_key: Any = None,
        response: str | None = None,
        truth: Mapping[str, float] | None = None,
        **options: Any,
    ) -> PopulationRows:
        """This population with a number of rows: where the data of a :func:`mixjax.study` come from.

        Args:
            n, x, x_key: as for :meth:`sample_many`. response: which, where there are several.
            truth: parameter -> value, by the names of a fit, for bias and coverage.
            options: ``weights``, ``offset``, ``contrasts`` of the fits, as for :func:`mixjax.lmm`.

        Example:
            >>> import mixjax as mj
            >>> pop = mj.population(g=mj.factor(8), b=mj.random_effects("g", sd=1), y=mj.response("b", error_scale=1))
            >>> tables, Y = pop.rows(40).tables(key=1, first=0, count=3)
            >>> len(tables), Y.shape
            (1, (3, 40))
        """
        if isinstance(x, Sample):
            n = x.n if n is None else n
            if n != x.n:
                raise ValueError(f"n is {n}, and the predictors have {x.n} rows; leave out n")
        elif x not in ("fixed", "new"):
            raise ValueError(f"x must be 'fixed', 'new' or a Sample, got {x!r}")
        if response is None:
            if len(self.responses) != 1:
                raise ValueError(
                    f"response must name one of the responses: {shortened(self.responses) or 'there are none'}"
                )
            response = self.responses[0]
        elif response not in self.responses:
            raise ValueError(f"there is no response {response!r} (responses: {shortened(self.responses) or 'none'})")
        if unknown := set(options) - {"weights", "offset", "contrasts"}:
            raise ValueError(f"rows takes weights, offset and contrasts for the fits, not {', '.join(sorted(unknown))}")
        options = {"weights": None, "offset": None, "contrasts": None} | options
        x_key = None if x_key is None else _frozen(x_key)
        return PopulationRows(self, self._rows(n), x, x_key, response, dict(truth or {}), options)

    def _rows(self, n: Any) -> int:
        """A number of rows that one sample may have, or ValueError."""
        count: int = check_count("n", n, 1)
        check_memory(
            f"a sample of {count} rows", 8 * self._plan.numbers(count, self._plan.stages), "ask for fewer rows"
        )
        return count

    # --- blocks, inside the float64 scope ---

    def _x(self, key: Any, n: int, number: int, rows: slice | None = None) -> dict[str, Any]:
        """Predictors of the block that sample ``number`` is in; errors in ``rows``, or in that sample alone."""
        size = self._plan.size(n)
        begin = np.uint32(number // size * size)
        x, flags = x_block(self._plan.leaves("x"), key, begin, plan=self._plan, n=n, size=size)
        self._raise("x", flags, slice(number % size, number % size + 1) if rows is None else rows)
        return x

    def _y(self, x: Any, key: Any, n: int, number: int, rows: slice | None = None) -> dict[str, Any]:
        size = self._plan.size(n)
        begin = np.uint32(number // size * size)
        y, flags = y_block(self._plan.leaves("y"), x, key, begin, plan=self._plan, n=n, size=size)
        self._raise("y", flags, slice(number % size, number % size + 1) if rows is None else rows)
        return y

    def _raise(self, stage: str, flags: Any, rows: slice) -> None:
        failed = np.asarray(flags)[rows].any(axis=0)
        for message in np.array(failures_of(self._plan, stage), object)[failed]:
            raise ValueError(message)


# --- helpers ---------------------------------------------------------------------------------------------------------


def _columns(name: str, spec: Spec) -> list[str]:
    """Further names by which a variable's columns go, as far as its description tells."""
    if isinstance(spec, MultivariateNormal):
        return (
            [f"{name}_{j}" for j in range(len(spec.mean))] if spec.names is None else [str(part) for part in spec.names]
        )
    if isinstance(spec, Empirical):
        columns = getattr(spec.frame, "columns", []) if spec.columns is None else spec.columns
        return [str(column) for column in columns]
    if isinstance(spec, RandomEffects):
        return [f"{name}_{j}" for j in range(max(np.shape(spec.sd)[:1] + np.shape(spec.cov)[:1], default=0))]
    return []


def _wanted(plan: Plan, effects: bool, keep: Any) -> list[str]:
    if keep is None:
        return [*plan.columns("x"), *plan.columns("y", unit=False), *(plan.columns("y", unit=True) if effects else [])]
    wanted: list[str] = []
    for name in [keep] if isinstance(keep, str) else keep:
        # Several effects of one variable have a column each: a[0] of expressions is a_0.
        parts = (
            [name] if name in plan.stages else [c for c in plan.stages if re.fullmatch(rf"{re.escape(name)}_\d+", c)]
        )
        if not parts:
            raise ValueError(f"keep names {name!r}, but the columns are {shortened(plan.stages, 30)}")
        wanted += parts
    return list(dict.fromkeys(wanted))


def _frozen(key: Any) -> Any:
    """A key as an int or plain numbers, whatever it was made of."""
    if isinstance(key, int | np.integer):
        return key
    with float64():
        return np.asarray(jax.random.key_data(as_key(key)))
