"""Known covariances of the levels of a grouping factor: from a matrix, a pedigree, or a phylogenetic tree."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

# Entries of a symmetric matrix may differ by this part of its largest one, and an eigenvalue be negative by so much of
# the largest: rounding of whoever made it.
ROUNDING = 1e-8
# Levels at most. The factor of the matrix is dense, and a fit works with the cube of their number.
MOST_LEVELS = 5000


@dataclass(frozen=True, eq=False)
class Relationship:
    """A known covariance K of levels: ``propto(1 | animal, A)`` says ``b ~ N(0, sd^2 K)``.

    Its scale matters: sd^2 is the variance of a level whose diagonal entry is 1. A diagonal other than 1 (inbred
    animals, long branches) is allowed, and so is a matrix without full rank.

    Attributes:
        matrix: ``(m, m)``, symmetric and positive semidefinite. Eigenvalues that are negative by rounding (down to
            -1e-8 of the largest) count as zero.
        levels: names of its rows and columns, as the grouping factor has them; numbers stand for their names. A data
            frame has its own, and these can only say the order.

    Raises:
        ValueError: the matrix is not square, finite, symmetric or positive semidefinite, with the number that says so;
            levels that are not as many, or stand twice.

    Example:
        >>> import mixjax as mj
        >>> K = mj.Relationship([[1.0, 0.5], [0.5, 1.0]], ["a", "b"])
        >>> K
        <Relationship of 2 levels: a, b>
    """

    matrix: np.ndarray
    levels: tuple[str, ...]

    def __init__(self, matrix: Any, levels: Iterable[Any] | None = None):
        if _is_frame(matrix):
            matrix, levels = _by_labels(matrix, levels)
        if levels is None:
            raise ValueError(
                "a relationship needs levels, the names of its rows and columns; a pandas DataFrame has them"
            )
        names = names_of(levels)
        K = _checked(matrix, names)
        object.__setattr__(self, "matrix", K)
        object.__setattr__(self, "levels", tuple(names))

    @cached_property
    def factor(self) -> np.ndarray:
        """``L (m, m)`` with ``L L' = K``."""
        return _factor(self.matrix)

    def __repr__(self) -> str:
        return f"<Relationship of {len(self.levels)} levels: {_some(self.levels)}>"


def as_relationship(value: Any) -> Relationship | None:
    """A relationship from one, or from a DataFrame labelled on both axes; None of anything else."""
    if isinstance(value, Relationship):
        return value
    return Relationship(value) if _is_frame(value) else None


def _is_frame(value: Any) -> bool:
    return hasattr(value, "index") and hasattr(value, "columns") and hasattr(value, "to_numpy")


def _by_labels(frame: Any, levels: Iterable[Any] | None) -> tuple[np.ndarray, list[str]]:
    """The matrix of a frame labelled on both axes, in the order of ``levels`` or of its columns."""
    rows, columns = names_of(frame.index), names_of(frame.columns)
    if set(rows) != set(columns) or len(rows) != len(columns):
        odd = sorted(set(rows) ^ set(columns))
        raise ValueError(
            f"rows and columns of a relationship must have the same labels; in one of the two only: "
            f"{_some(odd) if odd else 'labels that stand twice'}"
        )
    _refuse_twice(columns)
    names = columns if levels is None else names_of(levels)
    _refuse_twice(names)
    odd = [*(name for name in names if name not in set(columns)), *(name for name in columns if name not in set(names))]
    if odd:
        raise ValueError(
            f"levels= and the labels of the data frame differ; in one of the two only: {_some(odd)}. Leave levels= out "
            "and the labels count; for other names rename the frame's, or pass its matrix (frame.to_numpy())"
        )
    row, column = ({name: i for i, name in enumerate(labels)} for labels in (rows, columns))
    matrix = np.asarray(frame, np.float64)
    return matrix[np.ix_([row[name] for name in names], [column[name] for name in names])], names


def name_of(level: Any) -> str:
    """The name of a level: whole numbers without decimals."""
    if isinstance(level, float | np.floating) and float(level).is_integer():
        return str(int(level))
    return str(level)


def names_of(levels: Iterable[Any]) -> list[str]:
    """Names of levels."""
    return [name_of(level) for level in levels]


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _refuse_twice(names: Sequence[str]) -> None:
    seen: set[str] = set()
    twice = list(dict.fromkeys(name for name in names if name in seen or seen.add(name)))  # type: ignore[func-returns-value]
    if twice:
        raise ValueError(f"levels of a relationship stand twice: {_some(twice)}")


def _checked(matrix: Any, names: Sequence[str]) -> np.ndarray:
    K = np.array(matrix, np.float64)
    if K.ndim != 2 or K.shape[0] != K.shape[1]:
        raise ValueError(f"the matrix of a relationship must be square, got shape {K.shape}")
    if len(names) != len(K):
        raise ValueError(f"a relationship of {len(K)} levels needs as many names, got {len(names)}")
    _refuse_twice(names)
    if not np.isfinite(K).all():
        at = int(np.argmin(np.isfinite(K).all(axis=1)))
        raise ValueError(f"the matrix of a relationship has missing or infinite entries, first in row '{names[at]}'")
    size = np.abs(K).max(initial=0.0)
    if not size > 0:
        raise ValueError("the matrix of a relationship is all zeros")
    apart = np.abs(K - K.T)
    if apart.max() > ROUNDING * size:
        i, j = divmod(int(np.argmax(apart)), len(K))
        raise ValueError(
            f"the matrix of a relationship is not symmetric: ({names[i]}, {names[j]}) is {K[i, j]:.6g} and "
            f"({names[j]}, {names[i]}) is {K[j, i]:.6g}"
        )
    K = 0.5 * (K + K.T)
    if not _is_definite(K):
        values = np.linalg.eigvalsh(K)
        if values[0] < -ROUNDING * values[-1]:
            raise ValueError(
                f"the matrix of a relationship is not positive semidefinite: its least eigenvalue is {values[0]:.4g}, "
                f"its largest {values[-1]:.4g}; a covariance has none below zero (nearest such matrix: set negative "
                "eigenvalues to zero, or shrink towards the diagonal)"
            )
    K.setflags(write=False)
    return K


def _is_definite(K: np.ndarray) -> bool:
    try:
        np.linalg.cholesky(K)
    except np.linalg.LinAlgError:
        return False
    return True


def _factor(K: np.ndarray) -> np.ndarray:
    try:
        L: np.ndarray = np.linalg.cholesky(K)
    except np.linalg.LinAlgError:
        values, vectors = np.linalg.eigh(K)
        L = vectors * np.sqrt(np.maximum(values, 0.0))
    L.setflags(write=False)
    return L


# --- pedigrees -------------------------------------------------------------------------------------------------------


def pedigree(id: Any, sire: Any, dam: Any) -> Relationship:
    """The numerator relationship matrix A of a pedigree: twice the kinship coefficients, ``1 + inbreeding`` on the
    diagonal.

    Henderson's tabular method (Henderson 1976, Biometrics 32, 69; Mrode 2014, Linear Models for the Prediction of
    Animal Breeding Values, section 2.2). Animals may stand in any order, parents behind their offspring too.

    Args:
        id: ``(m,)`` names of the animals, each once and none missing. sire, dam: ``(m,)`` names of their parents, None
            or NaN where they are not known; so are '', 'NA' and other words for that, unless an animal has that name.
            One animal may be both (selfing).

    Returns:
        :class:`Relationship` with the animals in the order of ``id``.

    Raises:
        ValueError: an animal has no name, stands twice, is its own ancestor, or a parent is not listed; each is named.

    Example:
        >>> import mixjax as mj
        >>> A = mj.pedigree(["a", "b", "c", "d"], [None, None, "a", "a"], [None, None, "b", "c"])
        >>> A.matrix[3].tolist()
        [0.75, 0.25, 0.75, 1.25]
    """
    given = list(np.asarray(id, object).ravel())
    nameless = [i for i, value in enumerate(given) if _is_missing(value) or value == ""]
    if nameless:
        raise ValueError(
            f"id of a pedigree has missing names, first in row {nameless[0]} ({len(nameless)} in all): leave these "
            "rows out, or give the animals names"
        )
    animals = names_of(given)
    listed = set(animals)
    parents = [[_parent(p, listed) for p in np.asarray(side, object).ravel()] for side in (sire, dam)]
    if not len(animals) == len(parents[0]) == len(parents[1]):
        raise ValueError(
            f"id, sire and dam must be equally long, got {len(animals)}, {', '.join(map(str, map(len, parents)))}"
        )
    _refuse_twice(animals)
    at = {name: i for i, name in enumerate(animals)}
    for side, names in zip(("sire", "dam"), parents, strict=True):
        unknown = list(dict.fromkeys(name for name in names if name is not None and name not in at))
        if unknown:
            raise ValueError(
                f"pedigree names a {side} that is not among the animals: {_some(unknown)}; list it with parents that "
                "are not known (None), or write None where a parent is not known"
            )
    s, d = ([-1 if name is None else at[name] for name in names] for names in parents)
    order = _parents_first(animals, s, d)
    m = len(animals)
    place = np.empty(m + 1, np.intp)
    place[order], place[-1] = np.arange(m), m
    A = np.zeros((m + 1, m + 1))  # whoever is not known is related to nobody
    for i, animal in enumerate(order):
        a, b = place[s[animal]], place[d[animal]]
        A[i, :i] = A[:i, i] = 0.5 * (A[a, :i] + A[b, :i])
        A[i, i] = 1.0 + 0.5 * A[a, b]
    here = place[:-1]
    return Relationship(A[np.ix_(here, here)], animals)


# What a parent that is not known is written as in text.
UNKNOWN = ("", "<NA>", "nan", "NaN", "NA", "NaT", "None")


def _is_missing(value: Any) -> bool:
    """None, NaN, NaT and pandas' NA, but no text."""
    return value is None or (not isinstance(value, str) and str(value) in ("<NA>", "nan", "NaT"))


def _parent(value: Any, listed: set[str]) -> str | None:
    if _is_missing(value):
        return None
    name = name_of(value)
    return None if name in UNKNOWN and name not in listed else name


def _parents_first(animals: Sequence[str], s: Sequence[int], d: Sequence[int]) -> list[int]:
    """All animals, parents in front of their offspring."""
    order: list[int] = []
    state = [0] * len(animals)  # 0: not seen, 1: its ancestors are being placed, 2: placed
    for start in range(len(animals)):
        trail = [start]
        while trail:
            animal = trail[-1]
            if state[animal] == 2:
                trail.pop()
                continue
            state[animal] = 1
            waiting = [parent for parent in (s[animal], d[animal]) if parent >= 0 and state[parent] != 2]
            for parent in waiting:
                if state[parent] == 1:
                    raise ValueError(f"the pedigree has a loop: '{animals[parent]}' is an ancestor of itself")
            if waiting:
                trail.append(waiting[0])
            else:
                state[animal] = 2
                order.append(animal)
                trail.pop()
    return order


# --- trees -----------------------------------------------------------------------------------------------------------


def phylogeny(newick: str, correlation: bool = False) -> Relationship:
    """The covariance of a trait at the tips of a tree under Brownian motion: the length that two tips share, from the
    root to their last common ancestor.

    As ``ape::vcv``: with the lengths as they are by default (the variance component is that of one unit of length), or
    as correlations, ``vcv(corr = TRUE)``. Of a tree whose tips are all at one height the latter divides by that height,
    as MCMCglmm's ``inverseA(scale = TRUE)`` does (Felsenstein 1985, Am. Nat. 125, 1; Hadfield & Nakagawa 2010, J. Evol.
    Biol. 23, 494).

    Args:
        newick: the tree as text, ``"((a:1,b:1):2,c:3);"``: every branch has its length, every tip a name. A length
            below the root counts for nothing; names of inner nodes are not looked at. correlation: scale to unit
            diagonal.

    Returns:
        :class:`Relationship` with the tips in the order of the text.

    Raises:
        ValueError: the text is no tree; a branch has no length or a negative one; tips without a name, or of one name.

    Example:
        >>> import mixjax as mj
        >>> C = mj.phylogeny("((a:1,b:1):2,c:3);")
        >>> C.levels, C.matrix.tolist()
        (('a', 'b', 'c'), [[3.0, 2.0, 0.0], [2.0, 3.0, 0.0], [0.0, 0.0, 3.0]])
    """
    if not isinstance(newick, str):
        raise ValueError(f"a tree is Newick text such as '((a:1,b:1):2,c:3);', got {type(newick).__name__}")
    parent, length, name, children = _read_newick(newick)
    n = len(parent)
    depth = np.zeros(n)
    for node in range(1, n):  # parents have smaller numbers
        own = length[node]
        if own is None:
            raise ValueError(f"the branch above {_node(name[node])} has no length; a covariance needs all of them")
        if not (np.isfinite(own) and own >= 0):
            raise ValueError(f"the branch above {_node(name[node])} has length {own:g}; 0 or more is needed")
        depth[node] = depth[parent[node]] + own
    tips = [node for node in range(n) if not children[node]]
    names = [name[tip] for tip in tips]
    if "" in names:
        raise ValueError("a tip of the tree has no name")
    if len(tips) < 2:
        raise ValueError("the tree has one tip; a covariance between levels needs two or more")
    # Tips below a node stand side by side, because nodes are numbered as they are read.
    first, last = np.zeros(n, np.intp), np.zeros(n, np.intp)
    for i, tip in enumerate(tips):
        first[tip], last[tip] = i, i + 1
    for node in range(n - 1, -1, -1):
        if children[node]:
            first[node], last[node] = first[children[node][0]], last[children[node][-1]]
    C = np.zeros((len(tips), len(tips)))
    for i, tip in enumerate(tips):
        C[i, i] = depth[tip]
    for node in range(n):
        for k, child in enumerate(children[node][1:], 1):
            left, right = slice(first[children[node][0]], last[children[node][k - 1]]), slice(first[child], last[child])
            C[left, right], C[right, left] = depth[node], depth[node]
    if correlation:
        root = np.sqrt(np.diagonal(C))
        if not (root > 0).all():
            raise ValueError(f"tip '{names[int(np.argmin(root))]}' has no distance to the root: no correlations")
        C = C / np.outer(root, root)
        np.fill_diagonal(C, 1.0)
    return Relationship(C, names)


def _node(name: str) -> str:
    return f"'{name}'" if name else "an inner node"


# Blanks, comments, quoted names, signs, names and numbers.
_TOKEN = re.compile(r"\s+|\[[^\]]*\]|'(?:[^']|'')*'|[(),:;]|[^\s(),:;\[\]']+")
# Characters shown before and behind the place of an error.
AROUND = 12


def _read_newick(text: str) -> tuple[list[int], list[float | None], list[str], list[list[int]]]:
    """Nodes in the order in which they begin, the root first: parents, lengths of the branches above, names, and
    children."""
    parent, length, name, children = [-1], [None], [""], [[]]  # type: list[int], list[float | None], list[str], list[list[int]]
    at, before, ended, place = 0, "", False, 0

    def bad(why: str) -> ValueError:
        left = ("..." if place > AROUND else "") + text[max(place - AROUND, 0) : place]
        right = text[place : place + AROUND] + ("..." if place + AROUND < len(text) else "")
        return ValueError(
            f"this is no Newick tree, such as '((a:1,b:1):2,c:3);': {why}, at character {place + 1}: {left} >>> {right}"
        )

    def pieces() -> Iterator[str]:
        nonlocal place
        while place < len(text):
            found = _TOKEN.match(text, place)
            if found is None:
                what = {"[": "a comment that no ']' ends", "'": "a quoted name that no ' ends"}
                raise bad(what.get(text[place], f"{text[place]!r} belongs to nothing"))
            token = found.group()
            if not token.isspace() and not token.startswith("["):
                yield token
            place = found.end()

    def begin(of: int) -> int:
        parent.append(of)
        length.append(None)
        name.append("")
        children.append([])
        children[of].append(len(parent) - 1)
        return len(parent) - 1

    for token in pieces():
        if ended:
            raise bad(f"{token!r} stands behind the ';': one tree at a time")
        if before == ":" and token in (",", ")", ";"):
            raise bad(f"no length stands behind the ':' of {_node(name[at])}")
        if token == "(":
            if before not in ("", "(", ","):
                raise bad(f"'(' stands behind {before!r}")
            at = begin(at)
        elif token == ",":
            if parent[at] < 0:
                raise bad("',' stands outside all brackets")
            at = begin(parent[at])
        elif token == ")":
            if parent[at] < 0:
                raise bad("there is a ')' too many")
            at = parent[at]
        elif token == ";":
            ended = True
        elif token == ":":
            if before == ":":
                raise bad("'::'")
            if length[at] is not None:
                raise bad(f"a second length of the branch above {_node(name[at])}")
        elif before == ":":
            try:
                length[at] = float(token)
            except ValueError:
                raise bad(f"{token!r} is no length of a branch") from None
            if "_" in token:  # a number to Python only
                raise bad(f"{token!r} is no length of a branch")
        else:
            if before not in ("", "(", ",", ")"):
                raise bad(f"{token!r} stands behind {before!r}")
            name[at] = token[1:-1].replace("''", "'") if token.startswith("'") else token
        before = token
    if at != 0 or len(parent) == 1:
        raise bad("a ')' is missing" if at else "it has no brackets")
    return parent, length, name, children
