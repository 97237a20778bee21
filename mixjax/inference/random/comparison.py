"""Models side by side, each tested against the one above it: a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from mixjax.markup import Report, Reported
from mixjax.tables import frame_report

_FORMATS = {
    **dict.fromkeys(("npar", "df"), "{:.0f}"),
    **dict.fromkeys(("aic", "bic", "loglik", "deviance"), "{:.2f}"),
    "chisq": "{:.4f}",
    **dict.fromkeys(("p_value", "p_mixture", "p_bootstrap"), "{:.4g}"),
    "mc_error": "{:.1g}",
}


@dataclass(frozen=True)
class Comparison(Reported):
    """Fits side by side, each tested against the one above it. ``str()`` is laid out like R's ``anova()``.

    Attributes:
        title: the data and the criterion.
        formulas: name -> formula, in the order of the rows.
        table: see :meth:`to_frame`.
        notes: what was done, and what to know about the p-values.
        null_draws: with ``method="bootstrap"``, name -> bootstrap statistics of the replicates that converged.
    """

    title: str
    formulas: dict[str, str]
    table: pd.DataFrame
    notes: tuple[str, ...] = ()
    null_draws: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    def to_frame(self) -> pd.DataFrame:
        """One row per model, by number of parameters; NaN where there is nothing to test.

        Columns ``npar``, ``aic``, ``bic``, ``loglik``, ``deviance`` (REML criterion where that is compared), and of
        the test against the row above ``chisq``, ``df``, ``p_value`` (chi-square with df degrees of freedom),
        ``p_mixture`` (mixture of chi-squares), ``p_bootstrap`` and its Monte Carlo standard error ``mc_error``.
        """
        return self.table.copy()

    def __str__(self) -> str:
        return "\n".join([self.title, "Models:", *self._models(), self._cells().to_string(), *self.notes])

    def __repr__(self) -> str:
        return str(self)

    def _models(self) -> list[str]:
        return [f"{name}: {formula}" for name, formula in self.formulas.items()]

    def _report(self) -> Report:
        formats = {name: text for name, text in _FORMATS.items() if not name.startswith("p_")}
        return frame_report(self.table, [self.title, *self._models()], self.notes, index=True, formats=formats)

    def _cells(self) -> pd.DataFrame:
        columns = {
            str(name): [_FORMATS[str(name)].format(x) if np.isfinite(x) else "" for x in column]
            for name, column in self.table.items()
        }
        return pd.DataFrame(columns, index=self.table.index)


def names_of(fits: Sequence[object], names: Sequence[str] | None) -> list[str]:
    """Names of models, m0, m1, ... where none are given.

    Raises:
        ValueError: another number of them, or two alike.
    """
    found = [f"m{i}" for i in range(len(fits))] if names is None else [str(name) for name in names]
    if len(found) != len(fits) or len(set(found)) < len(found):
        raise ValueError(f"names must be {len(fits)} different ones, got {found}")
    return found
