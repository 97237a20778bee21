"""The programs that draw a population: variables bound to each other, and samples in blocks.

A sample has a key of its own, found by its number, and a variable a stream of its own, found by its name. Blocks of
samples stand at fixed places and have one size for a structure and a number of rows: what a sample is does not depend
on how many are drawn.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mixjax.machine import jit
from mixjax.populations.expressions import Kind, Scope, names_in
from mixjax.populations.variables import Spec, Variable, factor_of
from mixjax.simulation import BLOCK

# Samples of one block, at most.
MOST_SAMPLES = 2**11


class Plan:
    """Variables in the order in which they are drawn. Equal, and so of one compiled program, where only numbers differ.

    Attributes:
        variables: all of them. kinds: column -> kind. units: column -> factor by whose levels it is drawn, or None.
        stages: column -> ``"x"`` or ``"y"``. parents: nested factor -> its parent, and the parents of its levels.
    """

    def __init__(self, specs: Mapping[str, Spec], functions: Mapping[str, Callable[..., Any]]):
        self.variables: list[Variable] = []
        self.kinds: dict[str, Kind] = {}
        self.units: dict[str, str | None] = {}
        self.stages: dict[str, str] = {}
        self.parents: dict[str, tuple[str, np.ndarray]] = {}
        # What expressions may write: columns, and variables of several components.
        self._scope: dict[str, Kind] = {}
        self._stage_of: dict[str, str] = {name: spec.stage for name, spec in specs.items()}
        streams: dict[int, str] = {}
        for name, spec in specs.items():
            if (other := streams.setdefault(stream(name), name)) != name:
                raise ValueError(f"{name} and {other} would have the same random numbers: rename one of them")
            self._add(name, spec, functions)
        self._signature = tuple(variable.signature for variable in self.variables)

    def __hash__(self) -> int:
        return hash(self._signature)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Plan) and self._signature == other._signature

    @property
    def signature(self) -> Hashable:
        """The static part of compiled programs."""
        return self._signature

    def stage(self, stage: str) -> list[Variable]:
        """Variables drawn with the predictors (``"x"``) or with the responses (``"y"``)."""
        return [variable for variable in self.variables if self._stage_of[variable.name] == stage]

    def leaves(self, stage: str) -> dict[str, Mapping[str, Any]]:
        """The numbers of these variables."""
        return {variable.name: variable.leaves for variable in self.stage(stage)}

    def columns(self, stage: str, unit: bool | None = None) -> list[str]:
        """Columns of a stage; ``unit``: those with one value per level (True) or per row (False)."""
        return [
            name
            for name, own in self.stages.items()
            if own == stage and (unit is None or (self.units[name] is not None) == unit)
        ]

    def needed(self) -> list[str]:
        """Columns of the predictors that the responses read."""
        own = self.stage("y")
        read = {name for variable in own for name in variable.needs} | {v.unit for v in own if v.unit is not None}
        return [name for name in self.columns("x") if name in read]

    def numbers(self, n: int, columns: Iterable[str]) -> int:
        """Numbers in these columns of a sample of n rows."""
        return sum(n if self.units[name] is None else self.levels(str(self.units[name])) for name in columns)

    def size(self, n: int) -> int:
        """Samples in a block."""
        numbers = sum(len(v.outputs) * (n if v.unit is None else self.levels(v.unit)) for v in self.variables)
        return 1 << max(0, min(MOST_SAMPLES.bit_length() - 1, (BLOCK // max(1, numbers)).bit_length() - 1))

    def levels(self, factor: str) -> int:
        """Number of levels."""
        labels = self.kinds[factor].labels
        assert labels is not None
        return len(labels)

    def above(self, factor: str | None) -> list[str]:
        """The factors that a factor is nested in, from near to far."""
        found = []
        while factor in self.parents:
            factor = self.parents[factor][0]
            found.append(factor)
        return found

    # --- how it is made ---

    def _add(self, name: str, spec: Spec, functions: Mapping[str, Callable[..., Any]]) -> None:
        rows = Scope(dict(self._visible(spec.stage, None)), self._hidden(name, spec.stage, None), functions)
        if spec.unit is not None:
            factor_of(spec.unit, f"{name}: by", rows)
        scope = Scope(dict(self._visible(spec.stage, spec.unit)), self._hidden(name, spec.stage, spec.unit), functions)
        variable = spec.bind(name, scope)
        for column, kind in variable.outputs.items():
            if column in self._scope or (column != name and column in self._stage_of):
                raise ValueError(f"{name}: there are two variables called {column!r}; rename one (names=)")
            if not column.isidentifier() and spec.stage == "y":
                raise ValueError(f"{column!r} cannot be the name of a variable")
            self.kinds[column], self.units[column], self.stages[column] = kind, spec.unit, spec.stage
            self._scope[column] = kind
        if name not in variable.outputs:
            self._scope[name] = Kind(parts=tuple(variable.outputs))
        if variable.parent is not None:
            self.parents[name] = variable.parent
        self.variables.append(variable)

    def _unit_of(self, name: str) -> str | None:
        kind = self._scope[name]
        return self.units[name if kind.parts is None else kind.parts[0]]

    def _stage(self, name: str) -> str:
        kind = self._scope[name]
        return self.stages[name if kind.parts is None else kind.parts[0]]

    def _visible(self, stage: str, unit: str | None) -> dict[str, Kind]:
        levels = [unit, *self.above(unit)]
        return {
            name: kind
            for name, kind in self._scope.items()
            if (stage == "y" or self._stage(name) == "x")
            and (unit is None or name in levels or self._unit_of(name) in [level for level in levels if level])
        }

    def _hidden(self, own: str, stage: str, unit: str | None) -> dict[str, str]:
        visible, reasons = self._visible(stage, unit), {}
        for name in self._scope:
            if name in visible:
                continue
            if stage == "x" and self._stage(name) == "y":
                reasons[name] = f"{name} is drawn with the responses, and predictors cannot depend on it"
            else:
                reasons[name] = (
                    f"{own} has one value per level of {unit}, and {name} varies within these levels; use what is "
                    f"constant there, or leave out by={unit!r}"
                )
        return reasons


def check_order(specs: Mapping[str, Spec], columns: Mapping[str, list[str]]) -> None:
    """ValueError where a variable refers to itself or to one that is defined after it.

    Args:
        specs: the variables. columns: variable -> its further column names, as far as they are known.
    """
    home = {column: name for name in specs for column in [name, *columns.get(name, [])]}
    order = {name: place for place, name in enumerate(specs)}
    mentions = {
        name: [home[other] for source in spec.sources for other in sorted(names_in(source)) if other in home]
        + [home[factor] for factor in spec.factors if factor in home]
        for name, spec in specs.items()
    }
    for name, others in mentions.items():
        for other in others:
            if order[other] < order[name]:
                continue
            if other == name:
                raise ValueError(f"{name} refers to itself")
            path = _path(other, name, mentions)
            if path:
                raise ValueError(f"these variables refer to each other in a circle: {' -> '.join([name, *path])}")
            raise ValueError(f"{name} refers to {other}, which is defined after it: put {other} in front of {name}")


def _path(start: str, end: str, mentions: Mapping[str, list[str]]) -> list[str]:
    """Variables from start to end, each referring to the next; empty where there is no way."""
    trails, seen = [[start]], {start}
    for trail in trails:
        if trail[-1] == end:
            return trail
        new = [other for other in mentions[trail[-1]] if other not in seen]
        seen.update(new)
        trails += [[*trail, other] for other in new]
    return []


def stream(name: str) -> int:
    """The number of a variable's random stream."""
    return zlib.crc32(name.encode())


# --- one sample ------------------------------------------------------------------------------------------------------


def draw_stage(
    plan: Plan, stage: str, leaves: Mapping[str, Any], key: Any, n: int, given: Mapping[str, Any]
) -> tuple[dict[str, Any], Any]:
    """One sample, a pure function.

    Args:
        plan: the variables. stage: ``"x"`` or ``"y"``. leaves: their numbers. key: JAX key of the sample. n: rows.
        given: columns that are there already, one value per row.

    Returns:
        Columns of the stage: of predictors ``(n,)``, of responses ``(n,)`` and of random effects ``(levels,)``; and
        flags ``(k,)`` of what went wrong, in the order of :func:`failures_of`.
    """
    values: dict[str, Any] = dict(given)
    units: dict[str, str | None] = dict.fromkeys(given)

    def at(name: str, unit: str | None) -> Any:
        if unit is not None:
            if name == unit:
                return jnp.arange(plan.levels(unit))
            if name in plan.above(unit):
                codes: Any = np.arange(plan.levels(unit))
                level = unit
                while level != name:
                    level, parents = plan.parents[level]
                    codes = parents[codes]
                return jnp.asarray(codes)
        own = units[name]
        return values[name] if own == unit else values[name][at(own, unit)]  # type: ignore[arg-type]

    flags: list[Any] = []
    variables = plan.stage(stage)
    # All keys at once: XLA compiles every generator that it meets anew.
    streams = jnp.array([stream(variable.name) for variable in variables], jnp.uint32)
    keys: Any = jax.vmap(partial(jax.random.fold_in, key))(streams) if variables else ()
    for place, variable in enumerate(variables):
        unit = variable.unit
        count = n if unit is None else plan.levels(unit)
        column = partial(at, unit=unit)
        drawn, own_flags = variable.sampler(variable.static, leaves[variable.name], keys[place], count, column)
        values |= dict(zip(variable.outputs, drawn, strict=True))
        units |= dict.fromkeys(variable.outputs, unit)
        numbers = [value for value in drawn if jnp.issubdtype(value.dtype, jnp.floating)]
        flags += own_flags
        if numbers:
            flags.append(~jnp.all(jnp.stack([jnp.isfinite(value).all() for value in numbers])))
    names = plan.columns(stage)
    sample = {name: at(name, None) if stage == "x" else values[name] for name in names}
    return sample, jnp.stack(flags) if flags else jnp.zeros(0, bool)


def failures_of(plan: Plan, stage: str) -> list[str]:
    """Messages of the flags of :func:`draw_stage`."""
    messages: list[str] = []
    for variable in plan.stage(stage):
        messages += variable.failures
        if any(kind.labels is None for kind in variable.outputs.values()):
            messages.append(
                f"{variable.name} is not finite in some rows: a division by 0, a logarithm or root of a negative "
                "number, or an overflow"
            )
    return messages


# --- blocks ----------------------------------------------------------------------------------------------------------


@partial(jit, static_argnames=("plan", "n", "size"))
def x_block(leaves: Any, key: Any, first: Any, plan: Plan, n: int, size: int) -> tuple[dict[str, Any], Any]:
    """Predictors of samples ``first .. first + size - 1``: columns ``(size, n)`` and flags ``(size, k)``."""
    return jax.vmap(lambda i: draw_stage(plan, "x", leaves, jax.random.fold_in(key, i), n, {}))(_numbers(first, size))


@partial(jit, static_argnames=("plan", "n", "size"))
def y_block(leaves: Any, x: Any, key: Any, first: Any, plan: Plan, n: int, size: int) -> tuple[dict[str, Any], Any]:
    """Responses and random effects of the same samples, given predictors ``(size, n)``."""
    return jax.vmap(lambda i, given: draw_stage(plan, "y", leaves, jax.random.fold_in(key, i), n, given))(
        _numbers(first, size), x
    )


def _numbers(first: Any, size: int) -> Any:
    return first + jnp.arange(size, dtype=jnp.uint32)
