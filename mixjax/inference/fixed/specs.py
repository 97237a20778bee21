"""Which means, and within what: names, lists of names, or R's formulas of them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd


def names_of(value: Any, what: str) -> list[str]:
    """A name, or a list of different names."""
    if (value is None and what != "spec") or (isinstance(value, str) and value == "1"):
        return []
    several = isinstance(value, Sequence | np.ndarray | pd.Index | pd.Series)
    names = [value] if isinstance(value, str) else list(value) if several and np.ndim(value) == 1 else []
    if not names or not all(isinstance(name, str) and name for name in names) or len(set(names)) < len(names):
        raise ValueError(f"{what} must be a name or a list of different names, got {value!r}")
    return names


def read_spec(spec: Any, by: Any, variables: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of what is compared, and of the factors within whose levels it is.

    Args:
        spec: a name, a list of names, ``"1"``, or a formula: ``"A + B"``, ``"A * B"`` (the same), ``"~ A | B"``.
            Whatever is the name of a variable is that variable; names with signs stand in backquotes.
        by: names, or None.

    Raises:
        ValueError: neither names nor such a formula, or ``by=`` beside ``|``.

    Example:
        >>> from mixjax.inference.fixed.specs import read_spec
        >>> read_spec("~ arm | visit", None, ["arm", "visit"])
        (['arm'], ['visit'])
    """
    if not isinstance(spec, str) or spec in variables or not re.search(r"[~|+*:`]", spec):
        return names_of(spec, "spec"), names_of(by, "by")
    left, tilde, right = _outside_quotes(spec).partition("~")
    if tilde and left.strip():
        raise ValueError(
            f"spec={spec!r} has something before '~'; say what is compared as '~ A | B', and how by "
            f".contrasts({left.strip()!r})"
        )
    compared, bar, within = (right if tilde else left).partition("|")
    if "~" in right or "|" in within:
        raise ValueError(f"spec={spec!r} has more than one '~' or '|'; write '~ A * B | C'")
    if bar and by is not None:
        raise ValueError(f"spec={spec!r} says by '|' within what is compared, and by= does too: use one of them")
    groups = _names(within, spec) if bar else names_of(by, "by")
    return _names(compared, spec), groups


def _outside_quotes(text: str) -> str:
    """The text with what stands between backquotes coded, so that no sign in it counts."""
    if text.count("`") % 2:
        raise ValueError(f"spec={text!r} has a backquote that is not closed")
    parts = text.split("`")
    return "".join(part if i % 2 == 0 else f"`{part.encode().hex()}`" for i, part in enumerate(parts))


def _names(text: str, spec: str) -> list[str]:
    names = []
    for part in re.split(r"[+*:]", text):
        name = part.strip()
        if name.startswith("`"):
            name = bytes.fromhex(name.strip("`")).decode()
        names.append(name)
    if names == ["1"]:
        return []
    if not all(names) or "1" in names or len(set(names)) < len(names):
        raise ValueError(f"spec={spec!r} must name different variables, such as 'A', 'A * B' or 'A | B'")
    return names
