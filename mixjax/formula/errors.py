"""What can be wrong with a formula or a table, and the warnings that say what was left out."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

# A message that lists more names than this shows the first of them and counts the rest.
SHOWN = 5


class FormulaError(ValueError):
    """The formula cannot be read, or does not describe a mixed model."""


class DataError(ValueError):
    """The table does not have what the formula needs."""


class DataWarning(UserWarning):
    """Rows or columns were left out, or are hardly what was meant; the message counts or names them."""


# Python shows a warning once per text and line; the rows that a second data set loses are news again. Appended, so that
# any filter of the user's goes first.
warnings.filterwarnings("always", category=DataWarning, append=True)


def some_of(names: Sequence[str], separator: str = ", ", most: int = SHOWN) -> str:
    """``a, b, c, d, e and 370 more``: a factor of many levels would make a message of thousands of characters."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return separator.join(names[:most]) + more


def listed(values: Iterable[Any], most: int = SHOWN) -> str:
    """Values as Python writes them, of many the first."""
    return some_of([repr(value.item() if hasattr(value, "item") else value) for value in values], most=most)


def warn(message: str, category: type[Warning] = DataWarning) -> None:
    """Warn as from the line that called mixjax, whichever methods came between; by default of rows or columns."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "mixjax":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
