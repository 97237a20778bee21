"""Messages of the commands on stderr, and their programs on disk."""

from __future__ import annotations

import argparse
import sys
import warnings
from typing import Any

import mixjax

# What messages of the library advise in Python, and the option that does it here.
IN_A_SHELL = {
    "read the file with pandas.read_csv(..., decimal=',')": "add --decimal ',' (and --sep ';', if columns are "
    "separated so)",
    "read the file with pandas.read_csv(..., thousands=',') if they separate thousands, decimal=',' if they are "
    "decimal commas": "remove them from the file if they separate thousands, add --decimal ',' if they are decimal "
    "commas",
    "mend the table, or use pandas.to_numeric(..., errors='coerce') to make such cells missing": "mend the file; an "
    "empty cell is a missing value",
}


def explained(error: Exception) -> str:
    """An error for somebody who did not write the program: one line, or a formula with a mark below it."""
    text = str(error).strip()
    for advice, here in IN_A_SHELL.items():
        text = text.replace(advice, here)
    line = " ".join(text.split())
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in line:
        return "out of memory; fewer rows, levels or replicates need less, and docs/limitations.md says what needs most"
    if isinstance(error, RecursionError):
        return "the formula is nested too deeply to be read"
    if isinstance(error, SyntaxError):
        return f"the formula cannot be read: {error.msg}{f' in {error.text.strip()!r}' if error.text else ''}"
    if isinstance(error, OSError) and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, mixjax.FormulaError):
        return text
    if isinstance(error, ValueError | OSError | ImportError):
        return line
    return (
        f"unexpected {type(error).__name__}: {line}; --debug shows where. Please report it, with the command and that "
        "output"
    )


def tell(message: Any) -> None:
    """A message as one line on stderr, without the place in Python's code that means nothing in a shell."""
    print(f"mixjax: {' '.join(str(message).split())}", file=sys.stderr)


class Held:
    """Warnings of rows and columns left out wait here: the summary says the same, but only where there is one.

    ``known``: they stand in the summary.
    """

    def __init__(self) -> None:
        self.known = False

    def __enter__(self) -> Held:
        self.told: list[Any] = []
        self.catching = warnings.catch_warnings()
        self.catching.__enter__()
        warnings.showwarning = lambda message, *_, **__: self.told.append(message)
        return self

    def __exit__(self, *error: Any) -> None:
        self.catching.__exit__(*error)
        for message in self.told:
            if not (self.known and isinstance(message, mixjax.DataWarning) and "left out because" in str(message)):
                tell(message)


def keep_programs(arguments: argparse.Namespace) -> None:
    """Programs compiled from here on. It loads JAX, so that what can be refused before has been."""
    if arguments.no_cache:
        return
    try:
        mixjax.enable_compilation_cache(arguments.cache_dir)
    except OSError as error:
        tell(f"compiled programs are not kept: {error}")
