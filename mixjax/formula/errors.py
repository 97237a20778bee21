"""What can be wrong with a formula or a table, and the warnings that say what was left out."""

from __future__ import annotations

import sys
import warnings


class FormulaError(ValueError):
    """The formula cannot be read, or does not describe a mixed model."""


class DataError(ValueError):
    """The table does not have what the formula needs."""


class DataWarning(UserWarning):
    """Rows or columns were left out; the message counts or names them."""


# Python shows a warning once per text and line; the rows that a second data set loses are news again. Appended, so that
# any filter of the user's goes first.
warnings.filterwarnings("always", category=DataWarning, append=True)


def warn(message: str) -> None:
    """Warn of rows or columns left out, as from the line that called mixjax."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] == "mixjax":
        frame, level = frame.f_back, level + 1
    warnings.warn(message, DataWarning, stacklevel=level)
