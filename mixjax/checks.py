"""Errors, warnings at the user's line, and checks of what users give: counts, levels of confidence, options."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

# A message that lists more names than this shows the first of them and counts the rest.
SHOWN = 5
# Replicates are numbered by 32 bits, as jax.random.fold_in takes them.
MOST = 2**32


class FormulaError(ValueError):
    """The formula cannot be read, or does not describe a mixed model."""


class DataError(ValueError):
    """The table does not have what the formula needs."""


class DataWarning(UserWarning):
    """Rows or columns were left out, or are hardly what was meant; the message counts or names them."""


class ConvergenceWarning(UserWarning):
    """A fit did not converge: its numbers are not estimates."""


class InferenceWarning(UserWarning):
    """An interval or a test is not quite what was asked for, or rests on less than it usually does."""


# Python shows a warning once per text and line; the rows that a second data set loses are news again. Appended, so that
# any filter of the user's goes first.
for _category in (DataWarning, ConvergenceWarning, InferenceWarning):
    warnings.filterwarnings("always", category=_category, append=True)


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


def check_level(level: float) -> None:
    """Raise ValueError unless 0 < level < 1."""
    if isinstance(level, bool) or not isinstance(level, int | float | np.integer | np.floating) or not 0 < level < 1:
        raise ValueError(f"level must be between 0 and 1, such as 0.95, got {level!r}")


def check_count(name: str, value: Any, least: int, most: int = MOST) -> int:
    """An integer that is not too small and not too large, or ValueError."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least:
        raise ValueError(f"{name} must be an integer, {least} or more, got {_shown(value)}")
    if value > most:
        raise ValueError(f"{name} must be {most} or less, got {_shown(value)}")
    return int(value)


def check_list(name: str, values: Iterable[Any], most: int) -> list[Any]:
    """The values as a list, or ValueError where there are too many; ``range(10**11)`` is not written out first."""
    found = list(itertools.islice(values, most + 1))
    if len(found) > most:
        raise ValueError(f"{name} has more than {most} values: name fewer")
    return found


def _shown(value: Any) -> str:
    """A value in a message; of an integer with hundreds of digits its size."""
    if isinstance(value, int) and abs(value) >= 10**18:
        return f"{'-' * (value < 0)}10^{int(math.log10(abs(value)))} or more"
    return repr(value)


def check_memory(what: str, size: int, advice: str) -> None:
    """Raise ValueError, before any is taken, where numbers need more bytes than this machine has memory."""
    if size > _memory():
        raise ValueError(
            f"{what} would take {size // 2**30:,} GiB of memory, and this machine has {_memory() // 2**30:,}: {advice}"
        )


@cache
def _memory() -> int:
    """Bytes of memory that this process can have at most, as far as the system says."""
    found = [2**63]
    with contextlib.suppress(AttributeError, ValueError, OSError):  # Windows does not say
        found.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):  # of a container
        with contextlib.suppress(OSError, ValueError):  # there is none, or it is "max"
            found.append(int(Path(path).read_text()))
    return min(size for size in found if size > 0)


def check_start(start: Any) -> np.ndarray | None:
    """theta to start from as ``(k,)`` finite numbers, or ValueError; None as it is. Who uses it knows how many."""
    if start is None:
        return None
    try:
        theta = np.atleast_1d(np.asarray(start, dtype=np.float64))
    except (TypeError, ValueError):
        raise ValueError(f"start must be theta as numbers, got {start!r}") from None
    if not np.isfinite(theta).all():
        raise ValueError(f"start must be finite, got {theta}")
    return theta


def check_options(reml: Any, optimizer: Any) -> None:
    """Raise ValueError for options that are none."""
    if not isinstance(reml, bool | np.bool_):
        raise ValueError(f"reml must be True (REML) or False (maximum likelihood), got {reml!r}")
    if optimizer is not None and not (hasattr(optimizer, "init") and hasattr(optimizer, "update")):
        raise ValueError(
            f"optimizer must be None or an optax GradientTransformation such as optax.lbfgs(), got {optimizer!r}"
        )
