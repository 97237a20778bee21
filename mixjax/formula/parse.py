"""The formula language of lme4: ``response ~ fixed + (effects | group) + ...``.

Text in, a small tree of text out. Fixed effects, and the effects inside a random term, are left to formulaic; what is
read here are the random terms themselves, offsets, and the algebra of grouping factors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from mixjax.covariance import STRUCTURES
from mixjax.formula.errors import FormulaError

OPENING, CLOSING = "([{", ")]}"


@dataclass(frozen=True)
class Group:
    """A grouping factor: one column or the interaction of several.

    Attributes:
        name: as lme4 prints it: ``g``, ``b:a``, ``c:(b:a)``.
        columns: the columns whose combinations of values are the levels, in the order of the name.
    """

    name: str
    columns: tuple[str, ...]


@dataclass(frozen=True)
class RandomPart:
    """One random term as written, its group expanded.

    Attributes:
        effects: text of the effects, ``1 + x``.
        group: grouping factor.
        independent: written with ``||``: the effects are to be split into independent terms.
        structure: name of its covariance structure, ``us`` where none is written.
    """

    effects: str
    group: Group
    independent: bool
    structure: str = "us"


@dataclass(frozen=True)
class ParsedFormula:
    """The parts of a mixed-model formula.

    Attributes:
        text: as given.
        response: left-hand side.
        fixed: fixed effects, for formulaic.
        offsets: expressions inside ``offset(...)``.
        random: random terms in the order written; ``(1 | a/b)`` gives two.
    """

    text: str
    response: str
    fixed: str
    offsets: tuple[str, ...]
    random: tuple[RandomPart, ...]


def parse(text: str) -> ParsedFormula:
    """Read a formula.

    Raises:
        FormulaError: with the culprit and what to write instead.
    """
    if not isinstance(text, str):
        raise FormulaError(f"the formula must be text such as 'y ~ x + (x | g)', got {type(text).__name__}")
    _check_brackets(text)
    sides = split_top(text, ("~",))
    if len(sides) != 2:
        raise FormulaError(f"{text!r} must have one '~' between response and terms, as in 'y ~ x + (x | g)'")
    response, right = (side.strip() for side in sides)
    if not response:
        raise FormulaError(f"{text!r} has no response before '~'")
    if not right:
        raise FormulaError(f"{text!r} has no terms after '~'")
    fixed: list[str] = []
    offsets: list[str] = []
    random: list[RandomPart] = []
    for sign, piece in _summands(right, text):
        inner = _strip_brackets(piece)
        if _has_bar(inner):
            if sign == "-":
                raise FormulaError(f"random term '({inner})' is subtracted; leave it out instead")
            random.extend(_random_term(inner))
        elif structured := _structured_term(inner):
            if sign == "-":
                raise FormulaError(f"random term '{piece}' is subtracted; leave it out instead")
            random.extend(structured)
        elif match := re.fullmatch(r"offset\s*\((.*)\)", piece, flags=re.DOTALL):
            if sign == "-":
                raise FormulaError(f"'{piece}' is subtracted; write offset(-({match[1]}))")
            offsets.append(to_python(match[1]))
        elif piece == ".":
            raise FormulaError("'.' (all other columns) is not understood; name the columns")
        else:
            if "|" in _without_calls(piece):
                raise FormulaError(f"random terms can only be added, not combined with other terms: '{piece}'")
            fixed.append(f"{sign} {to_python(piece)}")
    text_of_fixed = " ".join(fixed).removeprefix("+ ") or "1"
    return ParsedFormula(text, to_python(response), text_of_fixed, tuple(offsets), tuple(random))


def split_top(text: str, separators: tuple[str, ...]) -> list[str]:
    """Split at separators that stand outside all brackets and quotes."""
    pieces, start = [], 0
    for i, char, depth in _walk(text):
        if depth == 0 and char in separators:
            pieces.append(text[start:i])
            start = i + 1
    return [*pieces, text[start:]]


def to_python(text: str) -> str:
    """R's spelling -> formulaic's: a power inside a function call, and ``factor()``."""
    text = re.sub(r"\b(?:as\.)?factor\s*\(", "C(", text)
    calls = _inside_calls(text)
    return "".join("**" if char == "^" and calls[i] else char for i, char in enumerate(text)).strip()


def names_in(text: str) -> list[str]:
    """The names that an expression reads, in order: not functions called, attributes, keywords or quoted text."""
    text = re.sub(r"'[^']*'|\"[^\"]*\"", " ", text)
    names = []
    token = re.compile(r"`(?P<quoted>[^`]+)`|(?P<name>(?<![\w.])[^\W\d]\w*)(?P<after>\s*(?:\(|=(?!=))?)")
    for match in token.finditer(text):
        name = match["quoted"] or (match["name"] if not match["after"].strip() else None)
        if name and name not in names and name not in ("True", "False", "None"):
            names.append(name)
    return names


def made_factors(text: str) -> set[str]:
    """The columns that an expression makes factors of: ``C(x)``, and so ``factor(x)``."""
    return {plain or quoted for plain, quoted in _FACTOR_CALL.findall(text)}


def names_outside_factors(text: str) -> list[str]:
    """The names that an expression reads in another place than as the column of ``C(...)``."""
    return names_in(_FACTOR_CALL.sub("C(", text))


def names_outside_calls(text: str) -> list[str]:
    """The names that stand as variables by themselves: not inside ``log(...)``, ``C(...)`` or any other call."""
    return names_in(_without_calls(text))


_FACTOR_CALL = re.compile(r"(?<![\w.])C\(\s*(?:(\w+)|`([^`]+)`)")


def quote_columns(parsed: ParsedFormula, columns: list[str]) -> ParsedFormula:
    """Backticks around column names with dots, as R users write them bare: to Python ``a.b`` is an attribute."""
    dotted = sorted((c for c in columns if re.fullmatch(r"[^\W\d]\w*(\.\w+)+", c)), key=len, reverse=True)
    if not dotted:
        return parsed
    pattern = re.compile(r"(?<![\w.`])(" + "|".join(map(re.escape, dotted)) + r")(?![\w.`(])")

    def quote(text: str) -> str:
        return pattern.sub(r"`\1`", text)

    return replace(
        parsed,
        response=quote(parsed.response),
        fixed=quote(parsed.fixed),
        offsets=tuple(map(quote, parsed.offsets)),
        random=tuple(replace(part, effects=quote(part.effects)) for part in parsed.random),
    )


def _random_term(inner: str) -> list[RandomPart]:
    parts = split_top(inner, ("|",))
    independent = len(parts) == 3 and parts[1] == ""
    if len(parts) != 2 and not independent:
        raise FormulaError(f"'({inner})' must read (effects | group) or (effects || group)")
    effects, group = parts[0].strip(), parts[-1].strip()
    if not effects or not group:
        raise FormulaError(f"'({inner})' needs effects before the bar and a grouping factor after it, as in (1 | g)")
    return [RandomPart(to_python(effects), g, independent) for g in expand_groups(group)]


def _structured_term(piece: str) -> list[RandomPart] | None:
    """``name(effects | group)`` or lme4's ``name(effects | group, hom = TRUE)``; None for anything else."""
    match = re.fullmatch(r"(\w+)\s*\((.*)\)", piece, flags=re.DOTALL)
    if not match or match[1] == "I" or min(depth for _, _, depth in _walk(piece[match.start(2) - 1 :])) < 1:
        return None
    name, (inner, *options) = match[1], split_top(match[2], (",",))
    inner = _strip_brackets(inner)
    if not _has_bar(inner):
        return None
    for option in options:
        hom = re.fullmatch(r"\s*hom\s*=\s*(TRUE|True|T|FALSE|False|F)\s*", option)
        if not hom or len(options) > 1 or (name.startswith("hom") and hom[1].startswith("F")):
            raise FormulaError(f"'{option.strip()}' in '{piece}' is not understood; there is only hom = TRUE or FALSE")
        name = f"hom{name.removeprefix('hom')}" if hom[1].startswith("T") else name
    if name not in STRUCTURES:
        similar = "; hom = TRUE gives all effects one variance" if f"hom{name}" in STRUCTURES else ""
        raise FormulaError(
            f"there is no covariance structure '{name}' ('{piece}'); there are {', '.join(STRUCTURES)}{similar}"
        )
    parts = _random_term(inner)
    if parts[0].independent:
        raise FormulaError(f"'{piece}': a covariance structure and '||' exclude each other; write '|'")
    return [replace(part, structure=name) for part in parts]


def expand_groups(text: str) -> list[Group]:
    """Expand the algebra of grouping factors: ``a/b -> b:a, a``; ``a:b``; ``a*b -> a, b, a:b``.

    Orders and names are lme4's: ``a/b/c`` gives ``c:(b:a)``, ``b:a``, ``a``.
    """
    tokens = re.findall(r"`[^`]+`|[^\W\d][\w.]*|[:/*+()]|\S", text)
    groups, rest = _group_expression(tokens, text)
    if rest:
        raise FormulaError(f"grouping factor '{text}': '{rest[0]}' is not understood; {_GROUP_HELP}")
    return groups


_GROUP_HELP = "write column names joined by ':', '/' or '*', or make a column of it first"


def _group_expression(tokens: list[str], text: str) -> tuple[list[Group], list[str]]:
    """``/``, ``*`` and ``+``, from left to right; ``:`` binds tighter."""
    left, tokens = _group_interaction(tokens, text)
    while tokens and tokens[0] in "/*+":
        operator = tokens[0]
        right, tokens = _group_interaction(tokens[1:], text)
        if operator == "/":
            left = [_interaction(inner, left[0]) for inner in right] + left
        elif operator == "*":
            left = left + right + [_interaction(a, b) for a in left for b in right]
        else:
            left = left + right
    return left, tokens


def _group_interaction(tokens: list[str], text: str) -> tuple[list[Group], list[str]]:
    left, tokens = _group_atom(tokens, text)
    while tokens and tokens[0] == ":":
        right, tokens = _group_atom(tokens[1:], text)
        left = [_interaction(a, b) for a in left for b in right]
    return left, tokens


def _group_atom(tokens: list[str], text: str) -> tuple[list[Group], list[str]]:
    if tokens and tokens[0] in ("factor", "as.factor", "C") and tokens[1:2] == ["("]:
        tokens = tokens[1:]
    if tokens and tokens[0] == "(":
        groups, rest = _group_expression(tokens[1:], text)
        if rest[:1] != [")"]:
            raise FormulaError(f"grouping factor '{text}' is not understood; {_GROUP_HELP}")
        return groups, rest[1:]
    if not tokens or not re.match(r"`|[^\W\d]", tokens[0]):
        found = f"'{tokens[0]}'" if tokens else "nothing"
        raise FormulaError(f"grouping factor '{text}': a column name is needed where {found} stands; {_GROUP_HELP}")
    name = tokens[0].strip("`")
    return [Group(name, (name,))], tokens[1:]


def _interaction(a: Group, b: Group) -> Group:
    right = b.name if len(b.columns) == 1 else f"({b.name})"
    return Group(f"{a.name}:{right}", a.columns + b.columns)


def _summands(right: str, text: str) -> list[tuple[str, str]]:
    """Signed summands, brackets around sums with random terms opened."""
    pieces: list[tuple[str, str]] = []
    start, sign = 0, "+"
    for i, char, depth in [*_walk(right), (len(right), "+", 0)]:
        if depth == 0 and char == "|" and i < len(right):
            raise FormulaError(f"put brackets around the random term: '... + ({right[start:].strip()})'")
        if depth or char not in "+-":
            continue
        piece = right[start:i].strip()
        if piece:
            inner = _strip_brackets(piece)
            if inner != piece and not _has_bar(inner) and "|" in _without_calls(inner):
                if sign == "-":
                    raise FormulaError(f"'{piece}' with random terms is subtracted; leave the terms out instead")
                pieces.extend(_summands(inner, text))
            else:
                pieces.append((sign, piece))
        elif start > 0 and sign == "+" and char == "+":
            raise FormulaError(f"{text!r}: a term is missing next to a '+'")
        start, sign = i + 1, char
    if not pieces:
        raise FormulaError(f"{text!r} has no terms after '~'")
    return pieces


def _strip_brackets(piece: str) -> str:
    """Take away brackets that enclose the whole piece, however many."""
    piece = piece.strip()
    while piece.startswith("(") and piece.endswith(")"):
        depths = [depth for _, _, depth in _walk(piece)]
        if min(depths[:-1]) < 1:
            break
        piece = piece[1:-1].strip()
    return piece


def _has_bar(text: str) -> bool:
    return any(char == "|" and depth == 0 for _, char, depth in _walk(text))


def _walk(text: str):
    """``(position, character, depth of brackets)``; a bracket counts as inside, quoted text as deeply inside."""
    depth, quote = 0, ""
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
            yield i, char, depth + 1
        elif char in "'\"`":
            quote = char
            yield i, char, depth + 1
        elif char in OPENING:
            depth += 1
            yield i, char, depth
        elif char in CLOSING:
            yield i, char, depth
            depth -= 1
        else:
            yield i, char, depth


def _inside_calls(text: str) -> list[bool]:
    """For every character: does it stand inside the brackets of a function call?"""
    stack: list[bool] = []
    inside = []
    for i, char in enumerate(text):
        if char in OPENING:
            is_call = bool(re.search(r"[\w.]\s*$", text[:i]))
            stack.append(is_call or (bool(stack) and stack[-1]))
        elif char in CLOSING and stack:
            stack.pop()
        inside.append(bool(stack) and stack[-1])
    return inside


def _without_calls(text: str) -> str:
    return "".join(char for char, inside in zip(text, _inside_calls(text), strict=True) if not inside)


def _check_brackets(text: str) -> None:
    stack: list[tuple[str, int]] = []
    quote = ""
    for i, char in enumerate(text):
        if quote:
            quote = "" if char == quote else quote
        elif char in "'\"`":
            quote = char
        elif char in OPENING:
            stack.append((char, i))
        elif char in CLOSING:
            if not stack or OPENING.index(stack[-1][0]) != CLOSING.index(char):
                raise FormulaError(f"unbalanced '{char}' in the formula:\n  {text}\n  {' ' * i}^")
            stack.pop()
    if stack:
        char, i = stack[-1]
        raise FormulaError(f"'{char}' is never closed in the formula:\n  {text}\n  {' ' * i}^")
    if quote:
        raise FormulaError(f"a quote {quote} is never closed in the formula: {text}")
