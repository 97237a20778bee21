"""Variables of a population: how one is described, bound to the others, and checked."""

from __future__ import annotations

import abc
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from mixjax.populations.expressions import Bound, Kind, Scope, bind, evaluate, kind_of, shortened

# Name -> what a parameter must be, on numpy and on JAX arrays.
RULES: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "any": ("finite", lambda value: value == value),
    "scale": ("0 or more", lambda value: (value >= 0) & (value < np.inf)),
    "probability": ("between 0 and 1", lambda value: (value >= 0) & (value <= 1)),
    "mean of counts": ("between 0 and 10^9", lambda value: (value >= 0) & (value <= 1e9)),
    "count": ("whole and 0 or more", lambda value: (value >= 0) & (value == value // 1)),
}


class Spec(abc.ABC):
    """A variable as the user describes it. :meth:`bind` finds out what it needs of the others."""

    #: predictors are drawn with ``sample_x``, random effects and responses with ``sample_y``
    stage: str = "x"

    @property
    def unit(self) -> str | None:
        """The factor whose levels have one value each; None: rows."""
        return getattr(self, "by", None)

    @property
    def factors(self) -> tuple[str, ...]:
        """Factors that it is drawn by, or within."""
        return () if self.unit is None else (self.unit,)

    @property
    def sources(self) -> tuple[Any, ...]:
        """Its expressions."""
        return ()

    @abc.abstractmethod
    def bind(self, name: str, scope: Scope) -> Variable:
        """The variable, its names looked up; ValueError names what is wrong."""

    @abc.abstractmethod
    def describe(self) -> str:
        """One line for the table that a population prints."""


# Of the static part, the numbers, a key, how many, and column(name): outputs, and what went wrong as flags.
Sampler = Callable[[Any, Mapping[str, Any], Any, int, Callable[[str], Any]], tuple[tuple[Any, ...], tuple[Any, ...]]]


@dataclass(frozen=True, eq=False)
class Variable:
    """A variable that can be drawn.

    Attributes:
        name: its stream of random numbers is found by it. unit: factor by whose levels it is drawn, or None.
        outputs: name -> kind of every column that it makes. sampler: draws them.
        static: all that the sampler depends on besides numbers, hashable. leaves: the numbers.
        failures: what the flags of the sampler mean. needs: columns that it reads.
        parent: of a nested factor, the factor that it is nested in, and per level the code of its parent.
    """

    name: str
    unit: str | None
    outputs: Mapping[str, Kind]
    sampler: Sampler
    static: Hashable = ()
    leaves: Mapping[str, Any] = field(default_factory=dict)
    failures: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    parent: tuple[str, np.ndarray] | None = None

    @property
    def signature(self) -> Hashable:
        """Equal where the compiled programs are."""
        sizes = tuple((name, kind.labels and len(kind.labels)) for name, kind in self.outputs.items())
        parent = None if self.parent is None else (self.parent[0], self.parent[1].tobytes())
        return self.name, self.unit, self.sampler, self.static, sizes, len(self.failures), parent


# --- parameters ------------------------------------------------------------------------------------------------------


class Parameters(NamedTuple):
    """Bound parameters of a variable; ``values`` computes them inside a program."""

    static: tuple[tuple[str, Any, str, bool], ...]
    leaves: dict[str, np.ndarray]
    failures: tuple[str, ...]
    needs: tuple[str, ...]
    bounds: dict[str, Bound]


def bind_parameters(name: str, sources: Mapping[str, tuple[Any, str]], scope: Scope) -> Parameters:
    """Parameters of a variable: name -> expression and rule.

    Raises:
        ValueError: an expression cannot be bound, or a number breaks its rule.
    """
    static, failures, bounds = [], [], {}
    for parameter, (source, rule) in sources.items():
        where = f"{name}: {parameter}"
        bound = bind(source, scope, where)
        wanted, holds = RULES[rule]
        if bound.constant is not None and not holds(bound.constant):
            raise ValueError(f"{where} must be {wanted}, got {source!r}")
        checked = bound.constant is None and rule != "any"
        if checked:
            failures.append(f"{where} must be {wanted}, and {_shown(source)} is not in some rows")
        static.append((parameter, bound.tree, rule, checked))
        bounds[parameter] = bound
    leaves = {parameter: np.array(bound.numbers, np.float64) for parameter, bound in bounds.items()}
    needs = tuple(dict.fromkeys(column for bound in bounds.values() for column in bound.names))
    return Parameters(tuple(static), leaves, tuple(failures), needs, bounds)


def values_of(
    static: tuple[tuple[str, Any, str, bool], ...],
    leaves: Mapping[str, Any],
    count: int,
    column: Callable[[str], Any],
) -> tuple[dict[str, Any], tuple[Any, ...]]:
    """Parameters ``(count,)`` by name, NaN where one breaks its rule, and a flag for each that may."""
    values, flags = {}, []
    for parameter, tree, rule, checked in static:
        value = jnp.asarray(evaluate(tree, leaves[parameter], column), jnp.float64)
        if value.shape not in ((), (count,)):
            raise ValueError(f"{parameter} has shape {value.shape}; one number or ({count},) is needed")
        if checked:
            holds = RULES[rule][1](value)
            flags.append(~holds.all())
            value = jnp.where(holds, value, jnp.nan)
        values[parameter] = jnp.broadcast_to(value, (count,))
    return values, tuple(flags)


def _shown(source: Any) -> str:
    return repr(source) if isinstance(source, str) else "what the function returns"


def shown(value: Any) -> str:
    """A parameter as it is printed."""
    if callable(value):
        return getattr(value, "__name__", "function")
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple | np.ndarray):
        return "(" + ", ".join(map(shown, value)) + ")"
    return f"{value:g}" if isinstance(value, float | np.floating) else str(value)


def factor_of(name: str, where: str, scope: Scope) -> tuple[str, ...]:
    """The levels of a factor that is to be grouped by, or ValueError."""
    labels = kind_of(name, scope, where).labels
    if labels is None:
        factors = [other for other, kind in scope.kinds.items() if kind.labels is not None]
        raise ValueError(f"{where}: {name} is no factor (factors: {shortened(factors) or 'none'})")
    return labels
