"""Data frames for readers: rounded, with the names that papers use, and notes under them that say how they came
about."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from mixjax import numerals
from mixjax.checks import check_count, listed
from mixjax.markup import Cells, Report, deliver

# Columns of numbers: what stands above them in a report, and how they are rounded.
_COLUMNS = {
    "estimate": ("Estimate", "estimate"),
    "std_error": ("Std. Error", "estimate"),
    "lower": ("Lower", "estimate"),
    "upper": ("Upper", "estimate"),
    "bias": ("Bias", "estimate"),
    "df": ("df", "fixed"),
    "num_df": ("Num. df", "fixed"),
    "den_df": ("Den. df", "fixed"),
    "statistic": ("Statistic", "fixed"),
    "chisq": ("Chisq", "fixed"),
    "lrt": ("LRT", "fixed"),
    "p_value": ("p", "p"),
    "p_mixture": ("p (mixture)", "p"),
    "p_bootstrap": ("p (bootstrap)", "p"),
    "mc_error": ("MC error", ""),
    "mcse": ("MC error", ""),
    "sum_sq": ("Sum Sq", ""),
    "mean_sq": ("Mean Sq", ""),
    "npar": ("Parameters", "fixed"),
    "aic": ("AIC", "fixed"),
    "bic": ("BIC", "fixed"),
    "loglik": ("logLik", "fixed"),
    "deviance": ("Deviance", "fixed"),
    "used": ("Replicates", ""),
    "mean": ("Mean", ""),
    "empirical_se": ("Empirical SE", ""),
    "model_se": ("Model SE", ""),
    "relative_error_se": ("Relative error of SE", ""),
    "rmse": ("RMSE", ""),
    "coverage": ("Coverage", ""),
    "rejection": ("Rejection", ""),
    "rows": ("Rows", ""),
    "cooks": ("Cook's distance", ""),
    "mdffits": ("MDFFITS", ""),
    "covtrace": ("COVTRACE", ""),
    "covratio": ("COVRATIO", ""),
    "leverage_overall": ("Leverage", ""),
    "power": ("Power", ""),
    "replicates": ("Replicates", ""),
    "singular": ("Singular", ""),
    "failed": ("Failed", ""),
    "expected": ("Expected", ""),
    "variance": ("Variance", ""),
    "share": ("Share", ""),
}
# So long may a line be where no terminal says how much it shows: contrasts of means with all their columns.
LINE = 120
_LABELS = {"term": "Term", "contrast": "Contrast", "parameter": "Parameter", "group": "Group", "effect": "Effect"}


def frame_cells(
    frame: pd.DataFrame,
    digits: int = 3,
    columns: Any = None,
    index: bool | None = None,
    heads: Sequence[str] | None = None,
    na_rep: str = "",
    formats: Mapping[str, str] | None = None,
    known: bool = True,
) -> Cells:
    """A data frame of numbers as rounded text.

    Args:
        frame: one column per quantity. What stands left of ``estimate`` or ``power`` are names of rows, which nothing
            rounds.
        digits: significant digits of standard errors, with as many decimals for the estimates; decimals of p values,
            one less of test statistics and degrees of freedom.
        columns: which are shown, a name or a list; None: all.
        index: show the index; None: unless it only counts the rows.
        heads: of the columns, instead of those that are known here. na_rep: of missing numbers.
        formats: column -> such as ``"{:.2f}"``, instead of ``digits``.
        known: columns are what they are called; False where a user gave the names.

    Raises:
        ValueError: there is no such column, or not a head for each.
    """
    if index is None:
        index = not (isinstance(frame.index, pd.RangeIndex) and frame.index.name is None)
    heads_and_kinds = _heads_and_kinds(frame, known)
    errors = _errors(frame) if known else ()
    texts, shown, left = [], [], 0
    if index:
        levels = [frame.index.get_level_values(i) for i in range(frame.index.nlevels)]
        texts = [[_name_of(value) for value in level] for level in levels]
        shown = [_LABELS.get(str(level.name), str(level.name or "")) for level in levels]
        left = len(levels)
    chosen = _places(frame, columns)
    for j in chosen:
        (head, kind), values, name = heads_and_kinds[j], frame.iloc[:, j], str(frame.columns[j])
        left += kind == "label" and left == len(texts)
        shown.append(head)
        if kind != "label" and formats and name in formats:
            texts.append([na_rep if pd.isna(x) else formats[name].format(x) for x in values])
        else:
            texts.append(_rounded(values, kind, digits, errors if name != "std_error" else (), na_rep))
    if heads is not None:
        if len(heads) != len(chosen):
            raise ValueError(f"header= names {len(heads)} columns, but there are {len(chosen)}: {listed(shown, 20)}")
        shown[len(shown) - len(chosen) :] = map(str, heads)
    return Cells(shown, list(map(list, zip(*texts, strict=True))), left)


def _places(frame: pd.DataFrame, columns: Any) -> list[int]:
    """Positions of columns."""
    own = list(frame.columns)
    if columns is None:
        return list(range(len(own)))
    wanted = [columns] if isinstance(columns, str) else list(columns)
    for name in wanted:
        if name not in own:
            raise ValueError(f"there is no column {name!r}; there are {listed(own, 20)}")
    return [own.index(name) for name in wanted]


def _heads_and_kinds(frame: pd.DataFrame, known: bool) -> list[tuple[str, str]]:
    """The head of each column, and how it is rounded: ``"label"`` is not."""
    own = [str(name) for name in frame.columns]
    anchor = next((own.index(name) for name in ("estimate", "power") if known and name in own), 0)
    found = []
    for j, name in enumerate(own):
        values = frame.iloc[:, j]
        if j < anchor or not pd.api.types.is_numeric_dtype(values) or pd.api.types.is_bool_dtype(values):
            found.append((_LABELS.get(name, name) if known else name, "label"))
        elif known and name == "statistic":
            found.append((_test_of(frame), _COLUMNS[name][1]))
        else:
            found.append(_COLUMNS.get(name, (name, "")) if known else (name, ""))
    return found


def _errors(frame: pd.DataFrame) -> Any:
    """Standard errors, or what comes near: a quarter of 95 % intervals. They say how many decimals mean something."""
    if "std_error" in frame:
        return frame["std_error"]
    return (frame["upper"] - frame["lower"]) / 4 if {"lower", "upper"} <= set(frame.columns) else ()


def _test_of(frame: pd.DataFrame) -> str:
    """The head of the column ``statistic``, by the degrees of freedom beside it."""
    if "num_df" in frame:
        return "F"
    if "df" not in frame:
        return "Statistic"
    if pd.api.types.is_integer_dtype(frame["df"]):
        return "Chisq"
    known = frame["df"].dropna()
    return "z" if len(known) and (known == float("inf")).all() else "t"


def _name_of(value: Any) -> str:
    """A level, or what else names a row, never rounded to digits that are asked of estimates."""
    if value is None or value is pd.NA or value is pd.NaT:
        return ""
    return f"{value:.10g}" if isinstance(value, float) else str(value)


def _rounded(values: pd.Series, kind: str, digits: int, errors: Any, na_rep: str) -> list[str]:
    if kind == "label":
        return [na_rep if _is_missing(value) else _name_of(value) for value in values]
    if pd.api.types.is_integer_dtype(values):
        return [na_rep if pd.isna(value) else str(value) for value in values]
    numbers = values.to_numpy(dtype=float, na_value=float("nan"))
    if kind == "p":
        texts = [numerals.p_value(x, digits) for x in numbers]
    elif kind == "fixed":
        texts = [numerals.number(x, digits - 1) for x in numbers]
    else:
        texts = numerals.column(numbers, digits, errors if kind == "estimate" else ())
    return [na_rep if x != x else text for x, text in zip(numbers, texts, strict=True)]


def _is_missing(value: Any) -> bool:
    return bool(pd.api.types.is_scalar(value) and pd.isna(value))


def frame_report(frame: pd.DataFrame, above: Sequence[str] = (), notes: Sequence[str] = (), **options: Any) -> Report:
    """Lines, a data frame and notes; options as for :func:`frame_cells`."""
    return Report([*above, frame_cells(frame, **options)], notes)


def text_table(table: pd.DataFrame, left: int) -> str:
    """Columns of text aligned to the right, the first ``left`` of them to the left."""
    return Report([Cells.of(table, left)]).text()


def _all_columns() -> Any:
    """pandas' options under which a table that a terminal is too narrow for loses no columns; as they are where the
    user has set how many there may be."""
    if pd.get_option("display.max_columns") != 0:  # 0: as many as fit
        return contextlib.nullcontext()
    line = shutil.get_terminal_size().columns if sys.stdout.isatty() else LINE
    wide = max(line, pd.get_option("display.width") or 0)
    return pd.option_context("display.max_columns", None, "display.width", wide)


class NotedTable(pd.DataFrame):
    """A data frame whose ``attrs["notes"]`` are shown below it; what pandas makes of it are plain data frames.

    ``print()`` and notebooks show it as pandas does, with the names by which columns are taken, and with all columns:
    on lines as long as the terminal's, else up to 120 signs, and broken beyond. Who sets pandas' option
    ``display.max_columns`` has it that way. :meth:`to_latex`, :meth:`to_html` and :meth:`to_markdown` are for readers:
    numbers rounded, columns called as in papers, notes below.

    Example:
        >>> table = NotedTable(pd.DataFrame({"estimate": [10.4673], "p_value": [0.021]}, index=["Days"]), ["t tests"])
        >>> print(table)
              estimate  p_value
        Days   10.4673    0.021
        t tests
        >>> print(table.to_markdown())
        |  | Estimate | p |
        | :--- | ---: | ---: |
        | Days | 10.5 | 0.021 |
        <BLANKLINE>
        t tests
    """

    def __init__(self, frame: pd.DataFrame, notes: Sequence[str]):
        super().__init__(frame)  # type: ignore[call-arg]
        self.attrs["notes"] = tuple(notes)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (pd.DataFrame(self), self.attrs["notes"])

    def __repr__(self) -> str:
        with _all_columns():
            return "\n".join([super().__repr__(), *self.attrs["notes"]])

    def _repr_html_(self) -> str | None:
        table: str | None = pd.DataFrame(self)._repr_html_()  # type: ignore[operator]
        return table and table + Report((), self.attrs["notes"]).html()

    def to_latex(  # type: ignore[override]
        self,
        buf: Any = None,
        *,
        digits: int | None = None,
        columns: Sequence[str] | None = None,
        header: bool | Sequence[str] = True,
        index: bool | None = None,
        na_rep: str | None = None,
        caption: str | None = None,
        label: str | None = None,
        **pandas: Any,
    ) -> str | None:
        """LaTeX, for a document that loads booktabs, with the notes below the ``tabular``.

        Args:
            buf: path or open file to write to; None to get the text.
            digits: significant digits of standard errors, with as many decimals for the estimates; decimals of p
                values (``<0.001``); one less of test statistics and degrees of freedom. None: 3.
            columns: which. header: names for them. index: show the index; None: unless it only counts the rows.
            na_rep: what stands for missing numbers, nothing otherwise.
            caption, label: put it into a floating ``table``. The caption is LaTeX of your own, and is left as it is.
            pandas: other arguments of pandas' method of this name, such as ``float_format``. Then pandas writes the
                table, of unrounded numbers under their own names, and needs its jinja2; the notes stand below.

        Raises:
            ValueError: a column is not there, or ``digits`` was given beside arguments of pandas.
        """
        if pandas or header is False:
            placed = {"caption": caption, "label": label}
            text = self._by_pandas("to_latex", digits, columns, header, index, na_rep, pandas, placed)
            return deliver("\n".join([text.rstrip("\n"), Report((), self.attrs["notes"]).latex()]), buf)
        return deliver(self._report(digits, columns, header, index, na_rep).latex(caption, label), buf)

    def to_html(  # type: ignore[override]
        self,
        buf: Any = None,
        *,
        digits: int | None = None,
        columns: Sequence[str] | None = None,
        header: bool | Sequence[str] = True,
        index: bool | None = None,
        na_rep: str | None = None,
        **pandas: Any,
    ) -> str | None:
        """HTML, part of a page, which needs no style sheet; arguments as for :meth:`to_latex`."""
        if pandas or header is False:
            text = self._by_pandas("to_html", digits, columns, header, index, na_rep, pandas)
            return deliver("\n".join([text, Report((), self.attrs["notes"]).html()]), buf)
        return deliver(self._report(digits, columns, header, index, na_rep).html(), buf)

    def to_markdown(  # type: ignore[override]
        self,
        buf: Any = None,
        *,
        digits: int | None = None,
        columns: Sequence[str] | None = None,
        header: bool | Sequence[str] = True,
        index: bool | None = None,
        na_rep: str | None = None,
        **pandas: Any,
    ) -> str | None:
        """Markdown with GitHub's tables; arguments as for :meth:`to_latex`. What only pandas knows, such as
        ``tablefmt``, needs its tabulate."""
        if pandas:
            text = self._by_pandas("to_markdown", digits, columns, header, index, na_rep, pandas)
            return deliver("\n\n".join([text, *self.attrs["notes"]]), buf)
        return deliver(self._report(digits, columns, header, index, na_rep).markdown(), buf)

    def _report(
        self, digits: int | None, columns: Any, header: bool | Sequence[str], index: bool | None, na_rep: str | None
    ) -> Report:
        digits = check_count("digits", 3 if digits is None else digits, 1, 12)
        heads = None if isinstance(header, bool) else header
        cells = frame_cells(pd.DataFrame(self), digits, columns, index, heads, na_rep or "")
        return Report([cells], self.attrs["notes"])

    def _by_pandas(
        self,
        method: str,
        digits: Any,
        columns: Any,
        header: Any,
        index: Any,
        na_rep: Any,
        pandas: Mapping[str, Any],
        placed: Mapping[str, Any] | None = None,
    ) -> str:
        if digits is not None:
            raise ValueError(
                f"digits= rounds the table that is written here, and {', '.join(pandas) or 'header=False'} belongs to "
                "pandas' own; give one of them"
            )
        given = {"index": index, "na_rep": na_rep, "header": None if header is True else header, **(placed or {})}
        given = {name: value for name, value in given.items() if value is not None}
        frame = pd.DataFrame(self)
        written: str = getattr(frame.iloc[:, _places(frame, columns)], method)(**given, **pandas)
        return written
