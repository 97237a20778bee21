"""Tables that say under themselves how their numbers came about."""

from __future__ import annotations

import html
from collections.abc import Sequence

import pandas as pd


class NotedTable(pd.DataFrame):
    """A data frame whose ``attrs["notes"]`` are shown below it; what pandas makes of it are plain data frames."""

    def __init__(self, frame: pd.DataFrame, notes: Sequence[str]):
        super().__init__(frame)  # type: ignore[call-arg]
        self.attrs["notes"] = tuple(notes)

    def __reduce__(self) -> tuple:
        return type(self), (pd.DataFrame(self), self.attrs["notes"])

    def __repr__(self) -> str:
        return "\n".join([super().__repr__(), *self.attrs["notes"]])

    def _repr_html_(self) -> str | None:
        table = pd.DataFrame(self)._repr_html_()  # type: ignore[operator]
        return table and table + "".join(f"<p>{html.escape(note)}</p>" for note in self.attrs["notes"])
