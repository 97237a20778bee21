"""Text of formulas -> tokens and expressions.

Two languages meet in a formula. Between terms stands R's algebra (``algebra.py``). What a term is made of is an
expression, read by Python's own parser after names of columns, which may hold any signs, were replaced.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import NamedTuple

from mixjax.checks import FormulaError

# What is more than this is a slip or an attack, and would take minutes or all memory before it fails.
LONGEST, DEEPEST, HIGHEST_POWER = 100_000, 60, 1_000
OPENING, CLOSING = "([{", ")]}"
_TOKEN = re.compile(
    r"""(?P<space>\s+)
    |(?P<quoted>`[^`]*`)
    |(?P<string>'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")
    |(?P<number>(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)
    |(?P<name>[^\W\d]\w*(?:\.\w+)*)
    |(?P<sign>%in%|%/%|%%|\*\*|\|\||&&|<=|>=|==|!=|//|<-|->|:=|[-+*/^:~|<>!&@%=,;?$.\[\](){}])""",
    re.VERBOSE | re.DOTALL,
)
# Words of Python that stand between operands or before one. Where neither can stand, they are names of columns.
_BETWEEN, _BEFORE = {"and", "or", "in", "is", "if", "else", "for"}, {"not", "lambda"}
_SPELLINGS = {"TRUE": "True", "FALSE": "False", "NULL": "None"}
_FACTOR = ("factor", "as.factor")
_BASES = ("poly", "bs", "cr", "cs", "cc", "hashed")
_CURES = {
    "%in%": "it stands between terms only; inside a function use x.isin([...])",
    "%/%": "write //",
    "%%": "write %",
    "&&": "write &, with brackets around comparisons: (x > 1) & (z < 2)",
    "||": "write |, with brackets around comparisons: (x > 1) | (z < 2)",
    "!": "write ~(...)",
    "$": "write the column's name alone",
    "@": "it is no operator here",
    "<-": "write x < -1 with a blank",
}


class Token(NamedTuple):
    """One sign, name, number or quoted text. ``depth`` counts the brackets around it; they belong to what they hold."""

    kind: str
    text: str
    start: int
    end: int
    depth: int


@dataclass(frozen=True)
class Piece:
    """A stretch of a formula: its tokens, and the whole text that they were cut from."""

    source: str
    tokens: tuple[Token, ...]

    def __str__(self) -> str:
        return self.source[self.tokens[0].start : self.tokens[-1].end] if self.tokens else ""

    @cached_property
    def depth(self) -> int:
        """Depth of what stands outside all brackets of the piece."""
        return min((t.depth - (t.text in (*OPENING, *CLOSING) and t.kind == "sign") for t in self.tokens), default=0)

    def outer(self, *signs: str) -> list[int]:
        """Where signs stand outside all brackets."""
        return [i for i, t in enumerate(self.tokens) if t.depth == self.depth and t.kind == "sign" and t.text in signs]

    def split(self, *signs: str) -> list[Piece]:
        """The pieces between signs that stand outside all brackets."""
        ends = [-1, *self.outer(*signs), len(self.tokens)]
        return [Piece(self.source, self.tokens[a + 1 : b]) for a, b in pairwise(ends)]

    def unwrapped(self) -> Piece:
        """Without the brackets that enclose all of it, however many."""
        piece = self
        while len(piece.tokens) > 2 and piece.tokens[0].text == "(" and piece.closes(0) == len(piece.tokens) - 1:
            piece = Piece(piece.source, piece.tokens[1:-1])
        return piece

    def call(self) -> tuple[str, Piece] | None:
        """Name and arguments of a piece that is one call of a plain name; None of any other."""
        tokens = self.tokens
        if len(tokens) < 3 or tokens[0].kind != "name" or tokens[1].text != "(" or self.closes(1) != len(tokens) - 1:
            return None
        return tokens[0].text, Piece(self.source, tokens[2:-1])

    def closes(self, at: int) -> int:
        """Where the bracket that opens at a place is closed."""
        depth = self.tokens[at].depth
        return next(i for i, t in enumerate(self.tokens) if i > at and t.text in CLOSING and t.depth == depth)


def read(text: str) -> Piece:
    """Text as tokens.

    Raises:
        FormulaError: a sign that is unknown, brackets or quotes that do not match, or more of anything than is sane.
    """
    if len(text) > LONGEST:
        raise FormulaError(f"the formula has {len(text)} characters (limit {LONGEST})")
    tokens: list[Token] = []
    open_at: list[Token] = []
    at = 0
    while at < len(text):
        found = _TOKEN.match(text, at)
        if found is None:
            what = f"a quote {text[at]} is never closed" if text[at] in "'\"`" else f"{text[at]!r} is not understood"
            raise FormulaError(_pointing(f"{what} in the formula", text, at))
        kind, own = str(found.lastgroup), found[0]
        at = found.end()
        if kind == "space":
            continue
        opens, closes = kind == "sign" and own in OPENING, kind == "sign" and own in CLOSING
        token = Token(kind, own, found.start(), at, len(open_at) + opens)
        if opens:
            open_at.append(token)
            if len(open_at) > DEEPEST:
                raise FormulaError(f"brackets in the formula are more than {DEEPEST} deep")
        elif closes and (not open_at or OPENING.index(open_at.pop().text) != CLOSING.index(own)):
            raise FormulaError(_pointing(f"unbalanced '{own}' in the formula", text, found.start()))
        tokens.append(token)
    if open_at:
        raise FormulaError(_pointing(f"'{open_at[-1].text}' is never closed in the formula", text, open_at[-1].start))
    return Piece(text, tuple(tokens))


def _pointing(what: str, text: str, at: int) -> str:
    if len(text) > 200 or "\n" in text:
        start = max(0, at - 20)
        return f"{what}: ...{text[start : at + 20]}..."
    return f"{what}:\n  {text}\n  {' ' * at}^"


def quoted(name: str) -> str:
    """A column's name as formulas write it: between backticks unless it is a plain word, dotted or not."""
    return name if re.fullmatch(r"[^\W\d]\w*(?:\.\w+)*", name) else f"`{name}`"


# --- expressions -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expression:
    """Something that gives a value for every row.

    Attributes:
        shown: as messages and names of columns have it.
        code: Python, with ``__c0__``, ``__c1__``, ... in place of the columns. columns: their names.
        names: other names that are read, such as a number of the caller's. functions: names that are called.
    """

    shown: str
    code: str
    columns: tuple[str, ...]
    names: tuple[str, ...] = ()
    functions: tuple[str, ...] = ()

    @property
    def column(self) -> str | None:
        """The column that it is, if it is nothing more."""
        return self.columns[0] if self.code == "__c0__" else None

    @property
    def factor_of(self) -> str | None:
        """The column that it makes a factor of, ``C(x)`` or ``C(x, ...)``, and None for anything else."""
        match self.tree:
            case ast.Call(func=ast.Name(id="C"), args=[ast.Name(id=alias), *_]) if alias in self.aliases:
                return self.aliases[alias]
        return None

    @property
    def tree(self) -> ast.expr:
        """The code's syntax tree."""
        return ast.parse(self.code, mode="eval").body

    @property
    def aliases(self) -> dict[str, str]:
        """Placeholders of columns in the code -> their names."""
        return {f"__c{i}__": name for i, name in enumerate(self.columns)}

    def __str__(self) -> str:
        return self.shown


def column(name: str) -> Expression:
    """A column by itself."""
    return Expression(name, "__c0__", (name,))


def expression(piece: Piece | str, columns: Collection[str] = ()) -> Expression:
    """Read Python with R's spellings: ``^`` is a power, ``factor()`` is ``C()``, names in backticks are columns.

    Raises:
        FormulaError: shows the text and what is wrong with it.
    """
    piece = read(piece) if isinstance(piece, str) else piece
    if not piece.tokens:
        raise FormulaError(f"'{piece.source}': an expression is missing between brackets or next to a sign")
    aliases: dict[str, str] = {}
    code = " ".join(_python(piece, columns, aliases))
    try:
        tree = ast.parse(code, mode="eval")
        _check_sizes(tree, str(piece))
        plain = ast.unparse(tree)
    except (SyntaxError, ValueError, TypeError, ArithmeticError, MemoryError, RecursionError) as error:
        why = error.msg if isinstance(error, SyntaxError) else str(error)
        if isinstance(error, FormulaError):
            raise
        raise FormulaError(f"'{piece}' cannot be read: {why}{_hint(piece)}") from None
    shown = plain
    for alias, name in aliases.items():
        shown = shown.replace(alias, name if plain == alias else quoted(name))
    bound = {arg.arg for node in ast.walk(tree) if isinstance(node, ast.Lambda) for arg in node.args.args}
    bound |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    called = {id(n.func): n for n in ast.walk(tree) if isinstance(n, ast.Call)}
    read_names = [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id not in aliases and n.id not in bound]
    read_names.sort(key=lambda n: n.col_offset)
    return Expression(
        shown.replace("\n", " "),
        plain,
        tuple(aliases.values()),
        tuple(dict.fromkeys(n.id for n in read_names if id(n) not in called)),
        tuple(dict.fromkeys(n.id for n in read_names if id(n) in called)),
    )


def _python(piece: Piece, columns: Collection[str], aliases: dict[str, str]) -> Iterator[str]:
    """The tokens as Python's; aliases are made on the way."""
    names: dict[str, str] = {}

    def alias(name: str) -> str:
        if name not in names:
            names[name] = f"__c{len(names)}__"
            aliases[names[name]] = name
        return names[name]

    tokens = piece.tokens
    operand = True  # whether an operand is to come, so that a word of Python's cannot stand between two
    skip = 0
    for i, token in enumerate(tokens):
        if skip:
            skip -= 1
            continue
        before, after = (tokens[j] if 0 <= j < len(tokens) else None for j in (i - 1, i + 1))
        follows = after.text if after is not None and after.kind == "sign" else ""
        text = token.text
        if token.kind == "quoted":
            if len(text) < 3:
                raise FormulaError(f"'{piece}' has a name without letters: ``")
            yield alias(text[1:-1])
        elif token.kind == "name" and before is not None and before.text == ".":
            yield text
        elif token.kind == "name" and follows == "=" and token.depth > piece.depth:
            yield text  # the name of an argument
        elif token.kind == "name" and text == "Q" and (name := _patsy_name(tokens[i + 1 : i + 4])) is not None:
            skip = 3
            yield alias(name)
        elif token.kind == "name":
            begins = after is not None and (after.kind != "sign" or after.text in ("(", "["))
            word = (text in _BETWEEN and not operand) or (text in _BEFORE and operand and begins)
            own = None if word else _as_column(text, columns, follows == "(")
            if own is not None:
                yield alias(own) + text[len(own) :]
            elif text in _FACTOR and follows == "(":
                yield "C"
            else:
                if re.match(r"__c\d+__", text):  # would stand for another column
                    raise FormulaError(f"'{piece}': there is no column '{text}'; a column of that name takes backticks")
                _refuse_bad_attribute(text, piece)
                yield _SPELLINGS.get(text, text)
            operand = word
            continue
        elif token.kind == "sign":
            if text in _CURES:
                raise FormulaError(f"'{piece}': {text} is not understood; {_CURES[text]}")
            yield "**" if text == "^" else text
            operand = text not in CLOSING
            continue
        else:
            yield text
        operand = False


def _as_column(text: str, columns: Collection[str], called: bool) -> str | None:
    """The column that a dotted name begins with; the rest are attributes. A name that is called may be its method."""
    parts = text.split(".")
    for k in range(len(parts) - called, 0, -1):
        name = ".".join(parts[:k])
        if name in columns and all(part.isidentifier() for part in parts[k:]):
            return name
    return None


def _patsy_name(tokens: tuple[Token, ...]) -> str | None:
    """``("name")`` after ``Q``."""
    if [t.kind for t in tokens] == ["sign", "string", "sign"] and tokens[0].text == "(" and tokens[2].text == ")":
        return str(ast.literal_eval(tokens[1].text))
    return None


def _refuse_bad_attribute(text: str, piece: Piece) -> None:
    if any(not part.isidentifier() for part in text.split(".")):
        raise FormulaError(f"'{piece}': there is no column '{text}'")


def _hint(piece: Piece) -> str:
    words = [t.text for t in piece.tokens if t.kind == "name"]
    if any(t.text == "=" and t.depth == piece.depth for t in piece.tokens):
        return "; a comparison is written =="
    numbers = [(a, b) for a, b in pairwise(piece.tokens) if a.kind == "number" == b.kind]
    if numbers or len(words) > 1:
        return "; names with blanks or other signs stand between backticks"
    return ""


def _check_sizes(tree: ast.AST, text: str) -> None:
    """Python computes constants exactly, however many digits they have; splines have as many columns as one says."""
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow | ast.LShift):
            right: ast.expr = node.right.operand if isinstance(node.right, ast.UnaryOp) else node.right
            value = right.value if isinstance(right, ast.Constant) else None
            if abs(value) > HIGHEST_POWER if isinstance(value, int | float) else _is_constant(node):
                raise FormulaError(f"'{text}': powers go up to {HIGHEST_POWER}")
    for node in ast.walk(tree):  # powers are small by now
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _BASES:
            for part in [*node.args[1:], *(k.value for k in node.keywords)]:
                if _is_constant(part) and abs(eval(compile(ast.Expression(part), "", "eval"))) > HIGHEST_POWER:
                    raise FormulaError(f"'{text}': {ast.unparse(part)} columns are too many (limit {HIGHEST_POWER})")


def _is_constant(node: ast.AST) -> bool:
    """Arithmetic of numbers alone."""
    arithmetic = ast.BinOp | ast.UnaryOp | ast.operator | ast.unaryop
    return all(
        isinstance(part.value, int | float) if isinstance(part, ast.Constant) else isinstance(part, arithmetic)
        for part in ast.walk(node)
    )
