"""Small data sets of the mixed-model literature. Sources and what they are: docs/data.md."""

from __future__ import annotations

import difflib
import json
from functools import lru_cache
from importlib.resources import files
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd

NAMES = (
    "sleepstudy",
    "Dyestuff",
    "Dyestuff2",
    "Penicillin",
    "Pastes",
    "cake",
    "Orthodont",
    "Machines",
    "InstEval",
    "cbpp",
    "grouseticks",
    "bacteria",
    "fev",
)


def load(name: str) -> pd.DataFrame:
    """A bundled data set as a data frame; factors are categorical, their levels in the order of the source.

    Args:
        name: one of ``mixjax.datasets.NAMES``, upper or lower case.

    Raises:
        KeyError: no such data set.

    Example:
        >>> import mixjax as mj
        >>> mj.datasets.load("sleepstudy").shape
        (180, 3)
    """
    known = {n.lower(): n for n in NAMES}
    if name.lower() not in known:
        close = difflib.get_close_matches(name, NAMES, n=1)
        raise KeyError(
            f"no data set {name!r}{f'; did you mean {close[0]!r}?' if close else ''} (have {', '.join(NAMES)})"
        )
    return _read(known[name.lower()]).copy()


@lru_cache
def _read(name: str) -> pd.DataFrame:
    import pandas as pd  # mixjax.datasets.NAMES is read without pandas

    folder = files(__name__)
    levels = json.loads((folder / "levels.json").read_text("utf-8"))[name]
    suffix = ".csv.gz" if name == "InstEval" else ".csv"
    with (folder / f"{name}{suffix}").open("rb") as stream:
        frame = pd.read_csv(
            stream, dtype=dict.fromkeys(levels, str), compression="gzip" if suffix.endswith("gz") else None
        )
    for column, order in levels.items():
        # Factors with many levels are stored without them: their levels are numbers.
        order = order or sorted(frame[column].unique(), key=int)
        frame[column] = pd.Categorical(frame[column], categories=order)
    return frame
