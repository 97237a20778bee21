"""Expressions of a population's variables: a number, text or a function -> what a compiled program evaluates.

Text is Python's arithmetic, read into a small tree; nothing is ever handed to ``eval``. The numbers in it stand beside
the tree: expressions that differ in their numbers alone share a compiled program.
"""

from __future__ import annotations

import ast
import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

# Name -> function and number of its arguments.
FUNCTIONS: dict[str, tuple[Callable[..., Any], int]] = {
    "exp": (jnp.exp, 1),
    "expm1": (jnp.expm1, 1),
    "log": (jnp.log, 1),
    "log1p": (jnp.log1p, 1),
    "sqrt": (jnp.sqrt, 1),
    "abs": (jnp.abs, 1),
    "sign": (jnp.sign, 1),
    "floor": (jnp.floor, 1),
    "sin": (jnp.sin, 1),
    "cos": (jnp.cos, 1),
    "tanh": (jnp.tanh, 1),
    "expit": (jax.nn.sigmoid, 1),
    "minimum": (jnp.minimum, 2),
    "maximum": (jnp.maximum, 2),
    "where": (lambda condition, yes, no: jnp.where(condition != 0, yes, no), 3),
}
BY_LEVEL = "by_level"
CONSTANTS = {"pi": float(np.pi)}
ARITHMETIC: dict[type, tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Add: ("+", jnp.add),
    ast.Sub: ("-", jnp.subtract),
    ast.Mult: ("*", jnp.multiply),
    ast.Div: ("/", jnp.divide),
    ast.Pow: ("**", jnp.power),
}
COMPARISONS: dict[type, tuple[str, Callable[[Any, Any], Any]]] = {
    ast.Lt: ("<", jnp.less),
    ast.LtE: ("<=", jnp.less_equal),
    ast.Gt: (">", jnp.greater),
    ast.GtE: (">=", jnp.greater_equal),
    ast.Eq: ("==", jnp.equal),
    ast.NotEq: ("!=", jnp.not_equal),
}
OPERATORS = dict((*ARITHMETIC.values(), *COMPARISONS.values()))
GRAMMAR = (
    "expressions are made of numbers, variables, + - * / **, comparisons, and / or / not, indices such as a[0], "
    f"{BY_LEVEL}(factor, {{level: value}}) and functions"
)
# A power up to here is a product of factors, and defined for negative numbers.
HIGHEST = 64


@dataclass(frozen=True)
class Kind:
    """The kind of a variable, as an expression sees it.

    Attributes:
        labels: names of the levels, of a factor; its values are codes.
        parts: names of the components, of a variable that has several.
        values: the levels as they stand in a table, if they are not text. dtype: of a number, in a table.
    """

    labels: tuple[str, ...] | None = None
    parts: tuple[str, ...] | None = None
    values: Any = field(default=None, compare=False)
    dtype: Any = field(default=None, compare=False)


@dataclass(frozen=True)
class Scope:
    """The names that an expression may use.

    Attributes:
        kinds: name -> kind. hidden: name -> why it cannot be used here. functions: the user's own.
    """

    kinds: Mapping[str, Kind]
    hidden: Mapping[str, str] = field(default_factory=dict)
    functions: Mapping[str, Callable[..., Any]] = field(default_factory=dict)


class Bound(NamedTuple):
    """An expression whose names have been looked up.

    Attributes:
        tree: nested tuples, hashable. numbers: the constants that it refers to by position.
        names: columns that are read.
    """

    tree: Any
    numbers: tuple[float, ...]
    names: tuple[str, ...]

    @property
    def constant(self) -> float | None:
        """Its value, where it is one number."""
        return self.numbers[0] if self.tree == ("number", 0) else None


def names_in(source: Any) -> set[str]:
    """Variables that an expression mentions, known or not; of what cannot be read, none."""
    if isinstance(source, str):
        try:
            tree = ast.parse(source.strip(), mode="eval")
        except (SyntaxError, ValueError):
            return set()
        called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
        return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called}
    if callable(source):
        try:
            return set(inspect.signature(source).parameters)
        except (TypeError, ValueError):
            return set()
    return set()


def bind(source: Any, scope: Scope, where: str) -> Bound:
    """Read an expression and look up its names.

    Args:
        source: number, text, or a function whose arguments are named as variables: it gets ``(n,)`` arrays, codes of
            factors, ``(n, q)`` of variables with q components, and must be written in JAX.
        scope: what it may use. where: begins every message, as ``"y: mean"``.

    Returns:
        :class:`Bound`.

    Raises:
        ValueError: says what cannot be read, or which name is not known and what there is.

    Example:
        >>> import jax
        >>> from mixjax.populations.expressions import Kind, Scope, bind, evaluate
        >>> bound = bind("2 + x**2 * (x > 1)", Scope({"x": Kind()}), "y: mean")
        >>> bound.names, bound.numbers
        (('x',), (2.0, 1.0))
        >>> with jax.enable_x64(True):
        ...     evaluate(bound.tree, bound.numbers, {"x": 3.0}.__getitem__).item()
        11.0
    """
    if isinstance(source, str):
        return _Reader(source, scope, where).bound()
    if callable(source):
        return _bind_function(source, scope, where)
    try:
        number = float(source)
    except (TypeError, ValueError):
        number = np.nan
    if not np.isfinite(number) or isinstance(source, bool):
        raise ValueError(f"{where} must be a finite number, an expression as text or a function, got {source!r}")
    return Bound(("number", 0), (number,), ())


def evaluate(tree: Any, numbers: Any, column: Callable[[str], Any]) -> Any:
    """The value of a bound expression.

    Args:
        tree: of a :class:`Bound`. numbers: its constants, ``(k,)``. column: name -> array, codes of a factor.

    Returns:
        Array that broadcasts to the columns.
    """

    def value(node: Any) -> Any:
        return evaluate(node, numbers, column)

    match tree:
        case ("number", at):
            return jnp.asarray(numbers[at], jnp.float64)
        case ("column", name):
            return column(name)
        case ("is", name, code, same):
            return ((column(name) == code) == same).astype(jnp.float64)
        case ("by_level", name, nodes):
            if all(node[0] == "number" for node in nodes):
                return jnp.stack([value(node) for node in nodes])[column(name)]
            choices = jnp.stack(jnp.broadcast_arrays(column(name), *map(value, nodes))[1:])
            return jnp.take_along_axis(choices, column(name)[None], axis=0)[0]
        case ("power", base, exponent):
            return value(base) ** exponent
        case ("operator", symbol, left, right):
            result = OPERATORS[symbol](value(left), value(right))
            return jnp.asarray(result, jnp.float64)
        case ("call", name, nodes):
            return FUNCTIONS[name][0](*map(value, nodes))
        case ("all", nodes):
            return jnp.prod(jnp.stack(jnp.broadcast_arrays(*[value(node) != 0 for node in nodes])), axis=0, dtype=float)
        case ("not", node):
            return (value(node) == 0).astype(jnp.float64)
        case ("own", function, nodes):
            return jnp.asarray(function(*map(value, nodes)))
        case ("python", function, arguments):
            return jnp.asarray(function(**{name: _argument(parts, column) for name, parts in arguments}))
    raise AssertionError(tree)


def _argument(parts: Any, column: Callable[[str], Any]) -> Any:
    return column(parts) if isinstance(parts, str) else jnp.stack([column(part) for part in parts], axis=-1)


def _bind_function(function: Callable[..., Any], scope: Scope, where: str) -> Bound:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        raise ValueError(f"{where}: {function!r} does not say what its arguments are called: use a lambda") from None
    arguments: list[tuple[str, Any]] = []
    names: list[str] = []
    for parameter in parameters:
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"{where}: the function's arguments must be named as variables, got {parameter}")
        if parameter.name not in scope.kinds and parameter.default is not parameter.empty:
            continue
        kind = kind_of(parameter.name, scope, where)
        arguments.append((parameter.name, kind.parts or parameter.name))
        names += kind.parts or (parameter.name,)
    return Bound(("python", function, tuple(arguments)), (), tuple(dict.fromkeys(names)))


def kind_of(name: str, scope: Scope, where: str) -> Kind:
    """The kind of a variable, or ValueError that says what there is."""
    if name in scope.kinds:
        return scope.kinds[name]
    if name in scope.hidden:
        raise ValueError(f"{where}: {scope.hidden[name]}")
    raise ValueError(f"{where}: there is no variable {name!r}{_hint(name, scope.kinds, 'variables')}")


def _hint(name: str, known: Iterable[str], what: str) -> str:
    known = list(known)
    close = difflib.get_close_matches(str(name), known, n=2, cutoff=0.6)
    there = shortened(known) or "none"
    return (f"; did you mean {' or '.join(map(repr, close))}?" if close else "") + f" ({what}: {there})"


def shortened(names: Iterable[str], most: int = 12) -> str:
    """Names with commas, of many the first ones."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


# --- text ------------------------------------------------------------------------------------------------------------


class _Reader:
    """One text, read from its syntax tree."""

    def __init__(self, text: str, scope: Scope, where: str):
        self.text, self.scope, self.where = text, scope, f"{where} {text!r}"
        self.numbers: list[float] = []
        self.names: dict[str, None] = {}

    def bound(self) -> Bound:
        try:
            tree = ast.parse(self.text.strip(), mode="eval").body
        except (SyntaxError, ValueError) as error:
            place = f" at character {error.offset}" if isinstance(error, SyntaxError) and error.offset else ""
            raise ValueError(f"{self.where} cannot be read{place}: {error.args[0]}") from None
        return Bound(self.read(tree), tuple(self.numbers), tuple(self.names))

    def read(self, node: ast.expr) -> Any:
        match node:
            case ast.Constant(value=bool() | str()):
                self.refuse(node)
            case ast.Constant(value=int() | float() as value):
                return self.number(value, node)
            case ast.Name(id=name):
                return self.column(name)
            case ast.Subscript(value=ast.Name(id=name), slice=index):
                return self.component(name, index)
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                return self.read(operand)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                if (literal := _literal(node)) is not None:
                    return self.number(literal, node)
                return ("operator", "*", self.number(-1.0, node), self.read(operand))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return ("not", self.read(operand))
            case ast.BoolOp(op=ast.And(), values=values):
                return ("all", tuple(map(self.read, values)))
            case ast.BoolOp(values=values):
                return ("not", ("all", tuple(("not", self.read(value)) for value in values)))
            case ast.BinOp(left=left, op=ast.Pow(), right=right) if _whole(right) is not None:
                return ("power", self.read(left), _whole(right))
            case ast.BinOp(left=left, op=op, right=right) if type(op) in ARITHMETIC:
                return ("operator", ARITHMETIC[type(op)][0], self.read(left), self.read(right))
            case ast.Compare(left=left, ops=ops, comparators=others):
                return self.comparison([left, *others], ops)
            case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if not any(
                isinstance(arg, ast.Starred) for arg in args
            ):
                return self.call(name, args)
        return self.refuse(node)

    def refuse(self, node: ast.AST) -> NoReturn:
        raise ValueError(f"{self.where}: {ast.unparse(node)!r} cannot stand in an expression; {GRAMMAR}")

    def number(self, value: float, node: ast.AST) -> Any:
        try:
            self.numbers.append(float(value))
        except OverflowError:
            raise ValueError(f"{self.where}: {ast.unparse(node)} is too large") from None
        return ("number", len(self.numbers) - 1)

    def column(self, name: str) -> Any:
        if name in CONSTANTS and name not in self.scope.kinds:
            return self.number(CONSTANTS[name], ast.Name(id=name))
        kind = kind_of(name, self.scope, self.where)
        if kind.parts is not None:
            several = " .. ".join(f"{name}[{j}]" for j in sorted({0, len(kind.parts) - 1}))
            raise ValueError(f"{self.where}: {name} has {len(kind.parts)} components; write {several}")
        if kind.labels is not None:
            first = kind.labels[0]
            raise ValueError(
                f"{self.where}: {name} is a factor (levels: {shortened(kind.labels, 4)}), not a number; say what each "
                f"level is worth, {BY_LEVEL}({name}, {{{first!r}: ..., ...}}), or compare it: {name} == {first!r}"
            )
        self.names[name] = None
        return ("column", name)

    def component(self, name: str, index: ast.expr) -> Any:
        parts = kind_of(name, self.scope, self.where).parts
        if parts is None:
            raise ValueError(f"{self.where}: {name} is one number per row; write {name} without an index")
        at = _whole(index)
        if at is None or not 0 <= at < len(parts):
            raise ValueError(
                f"{self.where}: {name}[{ast.unparse(index)}] is no component; {name} has [0] to [{len(parts) - 1}]"
            )
        return self.column(parts[at])

    def comparison(self, operands: list[ast.expr], ops: list[ast.cmpop]) -> Any:
        pairs = []
        for left, op, right in zip(operands, ops, operands[1:], strict=False):
            if type(op) not in COMPARISONS:
                raise ValueError(f"{self.where}: only < <= > >= == != compare; {GRAMMAR}")
            symbol = COMPARISONS[type(op)][0]
            factor, label = (left, right) if self.is_factor(left) else (right, left)
            if self.is_factor(factor):
                if symbol not in ("==", "!=") or not isinstance(label, ast.Constant):
                    raise ValueError(
                        f"{self.where}: a factor can be compared with the name of a level, by == and !=; got "
                        f"{ast.unparse(left)} {symbol} {ast.unparse(right)}"
                    )
                assert isinstance(factor, ast.Name)
                code = self.code(factor.id, label.value)
                pairs.append(("is", factor.id, code, symbol == "=="))
            else:
                pairs.append(("operator", symbol, self.read(left), self.read(right)))
        return pairs[0] if len(pairs) == 1 else ("all", tuple(pairs))

    def is_factor(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and kind_of(node.id, self.scope, self.where).labels is not None

    def code(self, name: str, label: Any) -> int:
        labels = self.scope.kinds[name].labels
        assert labels is not None
        if str(label) not in labels:
            raise ValueError(f"{self.where}: {name} has no level {label!r}{_hint(label, labels, 'levels')}")
        self.names[name] = None
        return labels.index(str(label))

    def call(self, name: str, args: list[ast.expr]) -> Any:
        if name == BY_LEVEL:
            return self.by_level(args)
        if name in self.scope.functions:
            return ("own", self.scope.functions[name], tuple(map(self.read, args)))
        if name not in FUNCTIONS:
            known = [*FUNCTIONS, BY_LEVEL, *self.scope.functions]
            more = "; pass your own in functions={...}"
            raise ValueError(f"{self.where}: there is no function {name!r}{_hint(name, known, 'functions')}{more}")
        if len(args) != FUNCTIONS[name][1]:
            wanted = FUNCTIONS[name][1]
            raise ValueError(
                f"{self.where}: {name} takes {wanted} argument{'s' * (wanted > 1)}, not {len(args)}: "
                f"{ast.unparse(ast.Call(func=ast.Name(id=name), args=args, keywords=[]))}"
            )
        return ("call", name, tuple(map(self.read, args)))

    def by_level(self, args: list[ast.expr]) -> Any:
        if len(args) != 2 or not isinstance(args[0], ast.Name) or not isinstance(args[1], ast.Dict | ast.List):
            raise ValueError(
                f"{self.where}: {BY_LEVEL} takes a factor and the value of each level: {BY_LEVEL}(group, "
                "{'a': 1, 'b': 2}), or a list in the order of the levels"
            )
        name, table = args[0].id, args[1]
        labels = kind_of(name, self.scope, self.where).labels
        if labels is None:
            factors = [other for other, kind in self.scope.kinds.items() if kind.labels is not None]
            raise ValueError(f"{self.where}: {name} is no factor (factors: {shortened(factors) or 'none'})")
        if isinstance(table, ast.List):
            if len(table.elts) != len(labels):
                raise ValueError(f"{self.where}: {name} has {len(labels)} levels, the list {len(table.elts)} values")
            given: dict[int, ast.expr] = dict(enumerate(table.elts))
        else:
            given = {}
            for key, value in zip(table.keys, table.values, strict=True):
                if not isinstance(key, ast.Constant):
                    raise ValueError(f"{self.where}: levels are named by text or numbers, not {ast.unparse(table)}")
                code = self.code(name, key.value)
                if code in given:
                    raise ValueError(f"{self.where}: the level {key.value!r} of {name} is there twice")
                given[code] = value
        missing = [label for code, label in enumerate(labels) if code not in given]
        if missing:
            raise ValueError(f"{self.where}: {BY_LEVEL} has no value for the levels {shortened(missing)} of {name}")
        self.names[name] = None
        return ("by_level", name, tuple(self.read(given[code]) for code in range(len(labels))))


def _literal(node: ast.expr) -> float | int | None:
    """The value of a number with or without sign."""
    match node:
        case ast.Constant(value=bool()):
            return None
        case ast.Constant(value=int() | float() as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=operand) if isinstance(operand, ast.Constant):
            number = _literal(operand)
            return None if number is None else -number
    return None


def _whole(node: ast.expr) -> int | None:
    """A small literal integer."""
    value = _literal(node)
    return value if isinstance(value, int) and abs(value) <= HIGHEST else None
