"""R's algebra of terms: ``a*b``, ``a/b``, ``b %in% a``, ``(a + b)^2``, ``x - 1``."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

from mixjax.checks import FormulaError
from mixjax.formula.syntax import CLOSING, Expression, Piece, expression

MOST_TERMS = 2_000
Term = tuple[str, ...]
INTERCEPT: Term = ()


@dataclass(frozen=True)
class Effects:
    """A sum of terms: the fixed effects, or those of a random term.

    Attributes:
        shown: as written.
        terms: each a product of expressions, by their ``shown``; the empty product is the intercept. By degree, as
            R and formulaic order them.
        expressions: what the terms are made of.
    """

    shown: str
    terms: tuple[Term, ...]
    expressions: tuple[Expression, ...]

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that are read."""
        return tuple(dict.fromkeys(name for e in self.expressions for name in e.columns))

    def __str__(self) -> str:
        return self.shown


def effects(pieces: list[tuple[str, Piece]], columns: Collection[str] = (), shown: str = "") -> Effects:
    """Signed summands -> terms, with an intercept unless it is taken away.

    Raises:
        FormulaError: shows the text and what is wrong with it.
    """
    algebra = _Algebra(columns)
    terms = algebra.add_up(pieces, True)
    ordered = tuple(sorted([INTERCEPT, *terms] if algebra.intercept else terms, key=len))
    used = {name for term in ordered for name in term}
    shown = shown or " ".join(f"{sign} {piece}" for sign, piece in pieces).removeprefix("+ ") or "1"
    return Effects(shown, ordered, tuple(e for name, e in algebra.expressions.items() if name in used))


class _Algebra:
    """R's algebra of terms. Terms are sets: ``b:a`` is ``a:b``, and stands as it was written first.

    The intercept is no term: 1 and 0 say for the whole formula whether there is one, wherever in a sum they stand.
    """

    def __init__(self, columns: Collection[str]):
        self.columns = columns
        self.expressions: dict[str, Expression] = {}
        self.order: dict[frozenset[str], Term] = {}
        self.intercept = True
        self.in_product = 0

    def add_up(self, parts: list[tuple[str, Piece]], adds: bool) -> list[Term]:
        """Terms of signed summands; ``adds`` is False where all of them are taken away from something."""
        terms: dict[Term, None] = {}
        for sign, part in parts:
            plus, inner = (sign == "+") == adds, part.unwrapped()
            if [t.text for t in inner.tokens] in (["0"], ["1"]) and not self.in_product:
                self.intercept = plus == (inner.tokens[0].text == "1")
                continue
            own = self.product(part) if inner is part else self.add_up(summands(inner), plus)
            for term in own:
                if sign == "-":
                    terms.pop(term, None)
                else:
                    terms.setdefault(term)
            self._few(list(terms), part)
        return list(terms)

    def product(self, piece: Piece) -> list[Term]:
        """``a * b`` and ``a / b``, from left to right."""
        at = piece.outer("*", "/")
        if not at:
            return self.nested(piece)
        left = self.nested(_cut(piece, 0, at[0]))
        for here, end in zip(at, [*at[1:], len(piece.tokens)], strict=True):
            right = self.nested(_cut(piece, here + 1, end))
            if piece.tokens[here].text == "*":
                left = [*left, *right, *self.cross(left, right, piece)]
            else:
                everything = self.joined([name for term in left for name in term])
                left = [*left, *self.cross([everything], right, piece)]
            left = self._few(list(dict.fromkeys(left)), piece)
        return left

    def nested(self, piece: Piece) -> list[Term]:
        """``b %in% a``: the levels of b within those of a, without a main effect of b."""
        parts = [self.interaction(part) for part in piece.split("%in%")]
        terms = parts[0]
        for right in parts[1:]:
            terms = self.cross(terms, [self.joined([name for term in right for name in term])], piece)
        return terms

    def interaction(self, piece: Piece) -> list[Term]:
        parts = [self.power(part) for part in piece.split(":")]
        terms = parts[0]
        for right in parts[1:]:
            terms = self.cross(terms, right, piece)
        return terms

    def power(self, piece: Piece) -> list[Term]:
        base, *exponents = piece.split("^", "**")
        terms = self.atom(base)
        for exponent in exponents:
            text = str(exponent)
            if not re.fullmatch(r"[1-9]\d{0,2}", text):
                raise FormulaError(
                    f"'{piece}': {text or 'nothing'} is no power of terms, which are 1, 2, ... 999; the power of "
                    f"a number is written I({piece})"
                )
            once = terms
            for _ in range(min(int(text), len(once) + 1) - 1):  # more add nothing
                terms = self._few(list(dict.fromkeys([*terms, *self.cross(terms, once, piece)])), piece)
        return terms

    def atom(self, piece: Piece) -> list[Term]:
        inner = piece.unwrapped()
        if inner is not piece:
            self.in_product += 1
            terms = self.add_up(summands(inner), True)
            self.in_product -= 1
            return terms
        if not piece.tokens:
            raise FormulaError(f"'{piece.source}' is not understood: a term is missing next to a sign")
        first = piece.tokens[0]
        if first.kind == "number":
            if len(piece.tokens) == 1 and first.text in ("0", "1"):
                raise FormulaError(f"'{piece.source}': {first.text}, the intercept, can only be added or taken away")
            raise FormulaError(
                f"'{piece}' cannot be a term: of numbers only 1 (intercept) and 0 (none); arithmetic is written I(...)"
            )
        if first.text == "{" and piece.closes(0) == len(piece.tokens) - 1:
            return [self.factor(Piece(piece.source, piece.tokens[1:-1]))]
        if first.text == "." and len(piece.tokens) == 1:
            raise FormulaError("'.' (all other columns) is not understood; name the columns")
        outer = piece.outer("<", ">", "<=", ">=", "==", "!=", "&", "|", "!", "=", "~", "%", "//", "-", "+")
        if outer or first.kind == "string":
            sign = piece.tokens[outer[0]].text if outer else first.text
            raise FormulaError(f"'{piece}': {sign} cannot stand between terms; write I({piece})")
        return [self.factor(piece)]

    def factor(self, piece: Piece) -> Term:
        own = expression(piece, self.columns)
        if not own.columns and not own.names and own.functions == ():
            raise FormulaError(f"'{piece}' cannot be a term: it reads no column")
        if own.column is not None and not own.shown.isidentifier() and (
            own.shown in ("0", "1") or self.expressions.get(own.shown, own) != own
        ):  # fmt: skip
            own = Expression(f"`{own.column}`", own.code, own.columns)
        self.expressions.setdefault(own.shown, own)
        return self.joined([own.shown])

    def joined(self, names: list[str]) -> Term:
        return self.order.setdefault(frozenset(names), tuple(dict.fromkeys(names)))

    def cross(self, left: list[Term], right: list[Term], piece: Piece) -> list[Term]:
        if len(left) * len(right) > MOST_TERMS**2:
            self._few([*left, *right] * MOST_TERMS, piece)
        return self._few(list(dict.fromkeys(self.joined([*a, *b]) for a in left for b in right)), piece)

    def _few(self, terms: list[Term], piece: Piece) -> list[Term]:
        if len(terms) > MOST_TERMS:
            raise FormulaError(f"'{str(piece)[:80]}' has more than {MOST_TERMS} terms")
        return terms


def _cut(piece: Piece, start: int, end: int) -> Piece:
    return Piece(piece.source, piece.tokens[start:end])


def summands(piece: Piece) -> list[tuple[str, Piece]]:
    """Signed parts of a sum. A sign that follows another operator belongs to its operand."""
    before = [None, *piece.tokens]
    at = [i for i in piece.outer("+", "-") if (t := before[i]) is None or t.kind != "sign" or t.text in (*CLOSING, ".")]
    starts, parts = ([] if at[:1] == [0] else [-1]) + at, []
    for start, end in zip(starts, [*starts[1:], len(piece.tokens)], strict=True):
        sign = "+" if start < 0 else piece.tokens[start].text
        tokens = piece.tokens[start + 1 : end]
        if tokens and tokens[0].text in "+-" and tokens[0].kind == "sign":
            if sign == tokens[0].text == "+":
                raise FormulaError(f"'{piece.source}': a term is missing next to a '+'")
            sign = "-" if sign != tokens[0].text else "+"
            tokens = tokens[1:]
        if not tokens:
            raise FormulaError(f"'{piece.source}': a term is missing next to a '{sign}'")
        parts.append((sign, Piece(piece.source, tokens)))
    return parts
