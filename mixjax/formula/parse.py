"""The formula language of lme4: ``response ~ fixed + (effects | group) + ...``, read into its parts."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain, pairwise
from typing import Any

from mixjax.checks import DataError, FormulaError
from mixjax.covariance import BY_OPTION, DIMENSIONS, STRUCTURES, Covariance, canonical, with_dimensions
from mixjax.formula.algebra import INTERCEPT, Effects, effects, summands
from mixjax.formula.smooths import SmoothPart, smooth_part
from mixjax.formula.syntax import Expression, Piece, Token, expression, read
from mixjax.kernels import KERNELS, Kernel
from mixjax.relationship import Relationship, as_relationship

MOST_GROUPS = 100


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
class KernelPart:
    """A correlation of levels by distance, as written.

    Attributes:
        kernel: itself. coordinates: columns that say the place of a level. within: grouping factor whose levels are
            independent of each other, or None where all places see each other.
    """

    kernel: Kernel
    coordinates: tuple[str, ...]
    within: Group | None

    @property
    def shown(self) -> str:
        """As tables call it, ``exp(u + v | 1)``."""
        held = "" if self.kernel.smoothness is None else f", nu = {self.kernel.smoothness:g}"
        group = "1" if self.within is None else self.within.name
        return f"{self.kernel.name}({' + '.join(self.coordinates)} | {group}{held})"


@dataclass(frozen=True)
class RandomPart:
    """One random term as written, its group expanded.

    Attributes:
        effects: the effects, ``1 + x``.
        group: grouping factor.
        independent: written with ``||``: the effects are to be split into independent terms.
        structure: name of its covariance structure, ``us`` where none is written; one of the caller's own itself,
            once names are read. name: as it is written, where it is none of those known. written: as it is written,
            whichever it is, with lme4's option; empty where none is.
        known: name of the known covariance of the levels, ``K`` of ``propto(1 | g, K)``; empty where they are
            independent. relationship: itself, once names are read.
        kernel: correlation of the levels by distance, or None.
        smooth: the smooth whose penalised part it is; None of any other.
    """

    effects: Effects
    group: Group
    independent: bool
    structure: str | Covariance = "us"
    name: str = ""
    written: str = ""
    known: str = ""
    relationship: Relationship | None = None
    kernel: KernelPart | None = None
    smooth: SmoothPart | None = None

    def blocks(self) -> list[Effects]:
        """The effects that may correlate. ``x + f || g``: one block each for the intercept, x, and the levels of f."""
        if not self.independent:
            return [self.effects]
        by_name = {e.shown: e for e in self.effects.expressions}
        return [
            Effects(f"0 + {':'.join(term)}" if term else "1", (term,), tuple(by_name[name] for name in term))
            for term in self.effects.terms
        ]


@dataclass(frozen=True)
class ResidualPart:
    """The correlation of residuals as written.

    Attributes:
        text: as given. structure: ``"ar1"``, ``"car1"``, ``"cs"``, or the name of a kernel. time: None where there is
            none, or where the order of the rows counts. group: grouping factor; without columns where all rows are one
            group.
        kernel: of one by distance.
    """

    text: str
    structure: str
    time: Expression | None
    group: Group
    kernel: KernelPart | None = None


@dataclass(frozen=True)
class ParsedFormula:
    """The parts of a mixed-model formula.

    Attributes:
        text: as given.
        response: left-hand side.
        fixed: fixed effects.
        offsets: expressions inside ``offset(...)``.
        random: random terms in the order written; ``(1 | a/b)`` gives two.
        pair: what ``cbind()`` holds where it is the response; empty for any other response.
        own: formulas of the family's parameters, or of the dispersion of residuals, each with the name of the option
            that it is.
        residual: the correlation of residuals, or None.
        smooths: penalised smooths; once a table is read they stand among the fixed and the random effects too.
    """

    text: str
    response: Expression
    fixed: Effects
    offsets: tuple[Expression, ...]
    random: tuple[RandomPart, ...]
    pair: tuple[Expression, ...] = ()
    own: tuple[tuple[str, Effects], ...] = ()
    residual: ResidualPart | None = None
    smooths: tuple[SmoothPart, ...] = ()

    @property
    def predictors(self) -> tuple[Expression, ...]:
        """All expressions but the response."""
        time = None if self.residual is None else self.residual.time
        smooth = chain.from_iterable(part.expressions for part in self.smooths)
        return (*self.effects, *self.offsets, *([] if time is None else [time]), *smooth)

    @property
    def effects(self) -> tuple[Expression, ...]:
        """Factors of the fixed effects, of the effects of random terms, and of the family's parameters."""
        parts = (*(part.effects for part in self.random), *(effects for _, effects in self.own))
        return tuple(chain(self.fixed.expressions, *(part.expressions for part in parts)))


def parse(text: str, columns: Collection[str] = ()) -> ParsedFormula:
    """Read a formula.

    Args:
        text: the formula. columns: of the table, so that names with dots, and those that are words of Python, are
            known for what they are. Other plain names are left open.

    Raises:
        FormulaError: with the culprit and what to write instead.
    """
    check_text(text)
    return _parse(text, frozenset(columns))


def check_text(formula: Any) -> None:
    """Raise where a formula is no text."""
    if not isinstance(formula, str):
        raise FormulaError(
            "the formula must be text such as 'y ~ x + (x | g)' and comes before the table, got "
            f"{type(formula).__name__}"
        )


@lru_cache(maxsize=64)  # many tables are read by one formula
def _parse(text: str, columns: frozenset[str]) -> ParsedFormula:
    sides = read(text).split("~")
    if len(sides) != 2:
        raise FormulaError(f"{_cut(text)!r} must have one '~' between response and terms, as in 'y ~ x + (x | g)'")
    response, right = sides
    for side, where in ((response, "response before '~'"), (right, "terms after '~'")):
        if not side.tokens:
            raise FormulaError(f"{_cut(text)!r} has no {where}")
    fixed: list[tuple[str, Piece]] = []
    offsets: list[Expression] = []
    random: list[RandomPart] = []
    smooths: list[SmoothPart] = []
    for sign, piece in _summands(right):
        smooth = smooth_part(piece, columns)
        if smooth is not None:
            if sign == "-":
                raise FormulaError(f"'{piece}' is subtracted; leave it out instead")
            smooths.append(smooth)
            continue
        terms = _random_term(piece, columns)
        call = piece.call()
        if terms is not None:
            if sign == "-":
                raise FormulaError(f"random term '{piece}' is subtracted; leave it out instead")
            random.extend(terms)
            if len(random) > MOST_GROUPS:
                raise FormulaError(f"the formula has more than {MOST_GROUPS} random terms")
        elif call is not None and call[0] == "offset":
            if sign == "-":
                raise FormulaError(f"'{piece}' is subtracted; write offset(-({call[1]}))")
            offsets.append(expression(call[1], columns))
        else:
            if any(t.text in ("|", "||") and t.kind == "sign" for t in _outside_calls(piece)):
                raise FormulaError(f"random terms can only be added, not combined with other terms: '{piece}'")
            fixed.append((sign, piece))
    left = expression(response, columns)
    pair = _pair(response, columns)
    return ParsedFormula(
        text, left, effects(fixed, columns), tuple(offsets), tuple(random), pair, smooths=tuple(smooths)
    )


def _pair(response: Piece, columns: Collection[str]) -> tuple[Expression, ...]:
    """The arguments of ``cbind(successes, failures)``, which may have names."""
    call = response.unwrapped().call()
    if call is None or call[0] != "cbind":
        return ()
    parts = []
    for part in call[1].split(","):
        named = len(part.tokens) > 2 and part.tokens[0].kind == "name" and part.tokens[1].text == "="
        parts.append(Piece(part.source, part.tokens[2:]) if named else part)
    return tuple(expression(part, columns) for part in parts if part.tokens)


def _cut(text: str) -> str:
    return text if len(text) <= 200 else f"{text[:200]}..."


def _outside_calls(piece: Piece) -> list[Token]:
    """Tokens that are not among the arguments of a function."""
    found, inside = [], None
    for i, token in enumerate(piece.tokens):
        if inside is not None:
            inside = None if token.depth == inside and token.text == ")" else inside
        elif token.text == "(" and i and piece.tokens[i - 1].kind in ("name", "quoted"):
            inside = token.depth
        else:
            found.append(token)
    return found


def _summands(right: Piece) -> list[tuple[str, Piece]]:
    """Signed summands, brackets around sums opened. One random term may stand alone without brackets."""
    if right.outer("|", "||"):
        before = right.split("|", "||")[0]
        if len(before.split("+", "-")) > 1:
            raise FormulaError(
                f"put brackets around the random term: '({right})', or '{before.split('+', '-')[0]} + (...)' "
                "for one of its parts"
            )
        return [("+", right)]
    parts = []
    for sign, piece in summands(right):
        inner = piece.unwrapped()
        bars = any(t.text in ("|", "||") and t.kind == "sign" for t in _outside_calls(inner))
        if inner is piece or inner.outer("|", "||") or not bars:
            parts.append((sign, piece))
        elif sign == "-" or inner.outer("-"):
            raise FormulaError(f"'{piece}': take the random terms out of the brackets")
        else:
            parts.extend(_summands(inner))
    return parts


def _random_term(piece: Piece, columns: Collection[str]) -> list[RandomPart] | None:
    """``(effects | group)``, ``name(effects | group)``, or lme4's ``name(effects | group, hom = TRUE)``."""
    piece = piece.unwrapped()
    call = piece.call()
    if call is None or call[0] == "I":
        return _bar_term(piece, columns) if piece.outer("|", "||") else None
    name, (first, *options) = call[0], call[1].split(",")
    if name == "propto":
        return _known_term(piece, first, options, columns)
    inner = first.unwrapped()
    if not inner.outer("|", "||"):
        return None
    if name in KERNELS:
        return [_kernel_term(piece, name, inner, options)]
    if name in DIMENSIONS:
        return _dimensional_term(piece, name, inner, options, columns)
    hom = None
    for option in options:
        words = [t.text for t in option.tokens]
        value = words[2] if len(words) == 3 and words[:2] == ["hom", "="] else ""
        if len(options) > 1 or value not in (*"TF", "TRUE", "FALSE", "True", "False"):
            raise FormulaError(f"'{option}' in '{piece}' is not understood; there is only hom = TRUE or FALSE")
        hom = value[0] == "T"
        if canonical(name) and not canonical(name, hom):
            raise FormulaError(
                f"'{option}' in '{piece}' is not understood: hom = TRUE or FALSE is an option of {', '.join(BY_OPTION)}"
            )
    structure = canonical(name, hom)
    if structure is None and hom is not None:
        raise _no_structure(name, f"{piece}")
    parts = _bar_term(inner, columns)
    if parts[0].independent:
        raise FormulaError(f"'{piece}': a covariance structure and '||' exclude each other; write '|'")
    if structure is None:  # of the caller's own, or a mistake
        return [replace(part, structure=f"{piece}", name=name, written=name) for part in parts]
    written = name if hom is None else structure
    return [replace(part, structure=structure, written=written) for part in parts]


def _dimensional_term(
    piece: Piece, name: str, inner: Piece, options: list[Piece], columns: Collection[str]
) -> list[RandomPart]:
    """``rr(effects | group, d = 2)`` and ``fa(...)``; glmmTMB's ``rr(effects | group, 2)`` too."""
    words = [t.text for option in options for t in option.tokens]
    number = words[2] if len(words) == 3 and words[:2] == ["d", "="] else words[0] if len(words) == 1 else ""
    if options and not (len(options) == 1 and number.isdigit() and int(number) > 0):
        raise FormulaError(f"'{piece}' is not understood: {name} has one option, the number of dimensions, d = 2")
    parts = _bar_term(inner, columns)
    if parts[0].independent:
        raise FormulaError(f"'{piece}': a covariance structure and '||' exclude each other; write '|'")
    structure = with_dimensions(name, int(number) if options else DIMENSIONS[name])
    return [replace(part, structure=structure, written=structure) for part in parts]


def _known_term(piece: Piece, first: Piece, options: list[Piece], columns: Collection[str]) -> list[RandomPart]:
    """``propto(effects | group, K)``; the effects may have a structure, ``propto(diag(1 + x | group), K)``."""
    words = [t.text.strip("`") for option in options for t in option.tokens]
    if len(options) != 1 or len(words) != 1 or options[0].tokens[0].kind not in ("name", "quoted"):
        raise FormulaError(
            f"'{piece}' must read propto(effects | group, K), with the name of a mixjax.Relationship, or of a data "
            "frame labelled on both axes, as the second argument"
        )
    parts = _random_term(first, columns)
    if parts is None or any(part.known for part in parts):
        raise FormulaError(f"'{piece}' must hold one random term before the comma, as in propto(1 | g, K)")
    if len(parts) > 1 or len(parts[0].group.columns) > 1:
        raise FormulaError(
            f"'{piece}': the levels of a known covariance are those of one column; make a column of "
            f"'{parts[0].group.name}' first"
        )
    return [replace(part, known=words[0]) for part in parts]


def _kernel_term(piece: Piece, name: str, inner: Piece, options: list[Piece]) -> RandomPart:
    """A random effect of every place."""
    kernel = kernel_part(piece, name, inner, options)
    within = kernel.within
    columns = (*(() if within is None else within.columns), *kernel.coordinates)
    return RandomPart(Effects("1", (INTERCEPT,), ()), Group(kernel.shown, columns), False, kernel=kernel)


def kernel_part(piece: Piece, name: str, inner: Piece, options: list[Piece]) -> KernelPart:
    """``exp(u + v | 1)``, ``ou(time | animal)``, ``mat(u + v | plot, nu = 1.5)``: columns that say where a level is,
    and the groups in which levels see each other."""
    sides = inner.split("|", "||")
    if len(sides) != 2 or inner.outer("||"):
        raise FormulaError(f"'{piece}' must read {name}(u + v | g), or {name}(u + v | 1) where all places are one map")
    left, right = sides
    names = []
    for part in left.split("+"):
        if str(part) == "0":  # as glmmTMB writes it, exp(0 + u + v | g)
            continue
        if len(part.tokens) != 1 or part.tokens[0].kind not in ("name", "quoted"):
            raise FormulaError(
                f"'{piece}': before the bar stand the columns that say where a level is, {name}(u + v | ...), not "
                f"'{part}'; make a column of it first. The effect itself is the intercept of a place"
            )
        names.append(part.tokens[0].text.strip("`"))
    if not names:
        raise FormulaError(f"'{piece}' names no column that says where a level is: write {name}(u + v | ...)")
    if len(set(names)) < len(names):
        raise FormulaError(f"'{piece}' names a column twice")
    if name == "ou" and len(names) > 1:
        raise FormulaError(f"'{piece}': ou is a process in time, of one column; in several dimensions write exp")
    groups = [None] if str(right) == "1" else _groups(right)
    if len(groups) > 1:
        raise FormulaError(f"'{piece}': one grouping factor is needed after the bar; write the term twice")
    (within,) = groups
    if within is not None and set(names) & set(within.columns):
        raise FormulaError(f"'{piece}': a column that says the place cannot be in the grouping factor too")
    return KernelPart(Kernel(name, _smoothness(piece, name, options)), tuple(names), within)


def _smoothness(piece: Piece, name: str, options: list[Piece]) -> float | None:
    """The number of ``nu = 1.5``."""
    if not options:
        return None
    words = [t.text for t in options[0].tokens]
    try:
        if len(options) > 1 or words[:2] != ["nu", "="] or len(words) != 3:
            raise ValueError
        nu = float(words[2])
    except ValueError:
        raise FormulaError(
            f"'{piece}': '{', '.join(map(str, options))}' is not understood; there is only the smoothness, mat(u + v | "
            "g, nu = 1.5), which is estimated where it is left out"
        ) from None
    try:
        Kernel(name, nu)
    except ValueError as error:
        raise FormulaError(f"'{piece}': {error}") from None
    return nu


def _no_structure(name: str, written: str) -> FormulaError:
    return FormulaError(
        f"there is no covariance structure '{name}' ('{written}'); there are {', '.join(STRUCTURES)}, propto, by "
        f"distance {', '.join(KERNELS)}, and those of one's own (mixjax.Covariance)"
    )


def with_structures(parsed: ParsedFormula, caller: Mapping[str, Any]) -> ParsedFormula:
    """Structures of the caller's own in the place of their names.

    Raises:
        FormulaError: a name that is neither known nor the caller's.
    """
    random = []
    for part in parsed.random:
        if part.name:
            own = caller.get(part.name)
            if not isinstance(own, Covariance):
                raise _no_structure(part.name, str(part.structure))
            part = replace(part, structure=own)
        if part.known:
            part = replace(part, relationship=_relationship(part, caller))
        random.append(part)
    return replace(parsed, random=tuple(_apart(random)))


def _relationship(part: RandomPart, caller: Mapping[str, Any]) -> Relationship:
    where = f"'propto({part.effects} | {part.group.name}, {part.known})'"
    if part.known not in caller:
        raise FormulaError(
            f"{where}: there is no '{part.known}' where the formula is written; it is to be a mixjax.Relationship "
            "(mixjax.pedigree and mixjax.phylogeny make one) or a data frame labelled on both axes. Formulas that are "
            "not trusted read no names beside columns"
        )
    try:
        found = as_relationship(caller[part.known])
    except ValueError as error:
        raise DataError(f"{where}: {error}") from None
    if found is None:
        kind = type(caller[part.known]).__name__
        raise FormulaError(
            f"{where}: '{part.known}' is a {kind}; a mixjax.Relationship(matrix, levels) is needed, or a data frame "
            "labelled on both axes: the levels' names say which row is whose"
        )
    return found


def _apart(random: list[RandomPart]) -> list[RandomPart]:
    """Terms of one column with a known covariance and without one, or with another: each grouping factor has a name of
    its own, ``species`` and ``species (C)``."""
    of_group: dict[str, list[str]] = {}
    for part in random:
        known = of_group.setdefault(part.group.name, [])
        if part.known not in known:
            known.append(part.known)
    return [
        replace(part, group=Group(f"{part.group.name} ({part.known})", part.group.columns))
        if part.known and len(of_group[part.group.name]) > 1
        else part
        for part in random
    ]


def _bar_term(inner: Piece, columns: Collection[str]) -> list[RandomPart]:
    parts = inner.split("|", "||")
    if len(parts) != 2:
        raise FormulaError(f"'({inner})' must read (effects | group) or (effects || group)")
    left, group = parts
    if not left.tokens or not group.tokens:
        raise FormulaError(f"'({inner})' needs effects before the bar and a grouping factor after it, as in (1 | g)")
    own = effects(_summands(left), columns, str(left))
    if not own.terms:
        raise FormulaError(f"random term '({inner})' has no effects")
    return [RandomPart(own, g, bool(inner.outer("||"))) for g in _groups(group)]


# --- grouping factors ------------------------------------------------------------------------------------------------

_HELP = "write column names joined by ':', '/' or '*', or make a column of it first"


def expand_groups(text: str) -> list[Group]:
    """Expand the algebra of grouping factors: ``a/b -> b:a, a``; ``a:b``; ``a*b -> a, b, a:b``.

    Orders and names are lme4's: ``a/b/c`` gives ``c:(b:a)``, ``b:a``, ``a``.
    """
    return _groups(read(text))


def _groups(piece: Piece) -> list[Group]:
    """``/``, ``*`` and ``+``, from left to right; ``:`` binds tighter."""
    at = [-1, *piece.outer("/", "*", "+"), len(piece.tokens)]
    left: list[Group] = []
    for here, end in pairwise(at):
        own = _interactions(Piece(piece.source, piece.tokens[here + 1 : end]), piece)
        sign = piece.tokens[here].text if here >= 0 else "+"
        if sign == "/":
            left = [_interaction(inner, left[0]) for inner in own] + left
        else:
            left = [*left, *own, *([_interaction(a, b) for a in left for b in own] if sign == "*" else [])]
        if len(left) > MOST_GROUPS:
            raise FormulaError(f"grouping factor '{_cut(str(piece))}' stands for more than {MOST_GROUPS} factors")
    return left


def _interactions(part: Piece, whole: Piece) -> list[Group]:
    left, *others = (_atom(p, whole) for p in part.split(":"))
    for right in others:
        left = [_interaction(a, b) for a in left for b in right]
    return left


def _atom(part: Piece, whole: Piece) -> list[Group]:
    call = part.call()
    if call is not None and call[0] in ("factor", "as.factor", "C"):
        part = call[1]
    elif part.unwrapped() is not part:
        return _groups(part.unwrapped())
    if len(part.tokens) == 1 and part.tokens[0].kind in ("name", "quoted"):
        name = part.tokens[0].text.strip("`")
        return [Group(name, (name,))]
    if not part.tokens or part.tokens[0].kind not in ("name", "quoted"):
        found = f"'{part.tokens[0].text}'" if part.tokens else "nothing"
        raise FormulaError(f"grouping factor '{whole}': a column name is needed where {found} stands; {_HELP}")
    raise FormulaError(f"grouping factor '{whole}': '{part.tokens[1].text}' is not understood; {_HELP}")


def _interaction(a: Group, b: Group) -> Group:
    right = b.name if len(b.columns) == 1 else f"({b.name})"
    return Group(f"{a.name}:{right}", a.columns + b.columns)
