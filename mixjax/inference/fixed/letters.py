"""Compact letter display: which means are not significantly different."""

from __future__ import annotations

import string

import numpy as np


def letters_of(differ: np.ndarray) -> list[str]:
    """Letters for k things, such that two share one if and only if they do not differ.

    Insertion and absorption (Piepho 2004, J. Comput. Graph. Stat. 13, 456): a column that holds two that differ is
    replaced by two, each without one of them, and columns within another are dropped.

    Args:
        differ: ``(k, k)`` symmetric, True where two differ.

    Returns:
        k strings; letters are given in the order of the things.

    Example:
        >>> import numpy as np
        >>> from mixjax.inference.fixed.letters import letters_of
        >>> letters_of(np.array([[0, 0, 1], [0, 0, 0], [1, 0, 0]], bool))
        ['a', 'ab', 'b']
    """
    k = len(differ)
    columns = [frozenset(range(k))] if k else []
    for i, j in zip(*np.nonzero(np.triu(differ, 1)), strict=True):
        split = [column for column in columns if i in column and j in column]
        kept = [column for column in columns if column not in split]
        new = {column - {one} for column in split for one in (int(i), int(j))}
        columns = kept + [
            column for column in new if not any(column <= other for other in kept) and not any(column < o for o in new)
        ]
    columns.sort(key=lambda column: sorted(column))
    names = [_letter(i) for i in range(len(columns))]
    return ["".join(name for name, column in zip(names, columns, strict=True) if i in column) for i in range(k)]


def _letter(i: int) -> str:
    """a to z, A to Z, then a1 to Z1, ..."""
    turn, place = divmod(i, 52)
    return string.ascii_letters[place] + (str(turn) if turn else "")
