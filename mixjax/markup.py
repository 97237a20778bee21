"""Tables of text, as text, HTML, LaTeX and Markdown.

What is to be shown becomes a :class:`Report`, lines and :class:`Cells` in reading order, and each format has one way to
write it.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

# --- what is shown --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cells:
    """A table whose cells are text.

    Attributes:
        heads: of the columns. rows: as many cells each.
        left: how many of the first columns are aligned to the left; numbers stand to the right.
        title: what stands above it. rules: rows that have a line above them.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    left: int = 1
    title: str = ""
    rules: Sequence[int] = ()

    @classmethod
    def of(cls, frame: pd.DataFrame, left: int, title: str = "") -> Cells:
        """A data frame of text."""
        return cls(list(map(str, frame.columns)), frame.astype(str).to_numpy().tolist(), left, title)


@dataclass(frozen=True)
class Report:
    """Lines of text and tables in reading order, and notes below them."""

    parts: Sequence[str | Cells]
    notes: Sequence[str] = ()

    def text(self) -> str:
        """For a terminal: columns aligned."""
        return "\n".join(part if isinstance(part, str) else _text_of(part) for part in [*self.parts, *self.notes])

    def html(self) -> str:
        """Part of a page, which needs no style sheet."""
        return "\n".join(_html_of(part) for part in [*self.parts, *self.notes])

    def latex(self, caption: str | None = None, label: str | None = None) -> str:
        """``tabular`` with the rules of booktabs; in a ``table`` where there is a caption or a label."""
        body = "\n\n".join([*map(_latex_of, self.parts), *_latex_notes(self.notes)])
        if caption is None and label is None:
            return body
        head = [rf"\caption{{{caption}}}"] * (caption is not None) + [rf"\label{{{label}}}"] * (label is not None)
        head += [r"\smallskip"] * (caption is not None)  # LaTeX leaves no room below a caption
        return "\n".join([r"\begin{table}", r"\centering", *head, body, r"\end{table}"])

    def markdown(self) -> str:
        """GitHub's Markdown, a paragraph per line."""
        return "\n\n".join(_markdown_of(part) for part in [*self.parts, *self.notes])


class Reported:
    """Results that can be shown in a notebook and written into a paper: a class with ``_report() -> Report``."""

    def _report(self) -> Report:
        raise NotImplementedError

    def to_latex(self, buf: Any = None, *, caption: str | None = None, label: str | None = None) -> str | None:
        """LaTeX, for a document that loads booktabs.

        Args:
            buf: path or open file to write to; None to get the text.
            caption, label: put it into a floating ``table``. The caption is LaTeX of your own, and is left as it is.
        """
        return deliver(self._report().latex(caption, label), buf)

    def to_html(self, buf: Any = None) -> str | None:
        """HTML, part of a page, which needs no style sheet; ``buf`` as above."""
        return deliver(self._report().html(), buf)

    def to_markdown(self, buf: Any = None) -> str | None:
        """Markdown with GitHub's tables; ``buf`` as above."""
        return deliver(self._report().markdown(), buf)

    def _repr_html_(self) -> str:
        return self._report().html()


def deliver(text: str, buf: Any) -> str | None:
    """The text; or None, where it was written to a path (UTF-8) or an open file."""
    if buf is None:
        return text
    if hasattr(buf, "write"):
        buf.write(text + "\n")
    else:
        Path(buf).write_text(text + "\n", encoding="utf-8")
    return None


# --- text -----------------------------------------------------------------------------------------------------------

# Line breaks and other signs without a shape, which would end a row.
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029]+")


def _one_line(text: str) -> str:
    return _CONTROL.sub(" ", text)


def _width(text: str) -> int:
    """Columns of a terminal: East Asian signs take two, accents of their own none."""
    return sum(0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF") for c in text)


def _text_of(cells: Cells) -> str:
    rows = [[_one_line(cell) for cell in row] for row in (cells.heads, *cells.rows)]
    widths = [max(map(_width, column)) for column in zip(*rows, strict=True)]
    lines = []
    for i, row in enumerate(rows):
        if i - 1 in cells.rules:
            lines.append("-" * (sum(widths) + len(widths) - 1))
        padded = [
            cell + " " * (w - _width(cell)) if j < cells.left else " " * (w - _width(cell)) + cell
            for j, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append(" ".join(padded).rstrip())
    return "\n".join([*[cells.title + ":"] * bool(cells.title), *lines])


# --- HTML -----------------------------------------------------------------------------------------------------------


def _html_of(part: str | Cells) -> str:
    if isinstance(part, str):
        return f"<p>{html.escape(_one_line(part))}</p>"
    ruled = ' style="border-top: 1px solid"'
    rows = [f"<tr{ruled * (i in part.rules)}>{_html_row(row, 'td', part.left)}</tr>" for i, row in enumerate(part.rows)]
    return "\n".join(
        [
            *[f"<h4>{html.escape(_one_line(part.title))}</h4>"] * bool(part.title),
            '<table style="border-collapse: collapse">',
            f'<thead><tr style="border-bottom: 1px solid">{_html_row(part.heads, "th", part.left)}</tr></thead>',
            "<tbody>",
            *rows,
            "</tbody>",
            "</table>",
        ]
    )


def _html_row(row: Sequence[str], tag: str, left: int) -> str:
    return "".join(
        f'<{tag} style="text-align: {"left" if j < left else "right"}">{html.escape(_one_line(cell))}</{tag}>'
        for j, cell in enumerate(row)
    )


# --- LaTeX ----------------------------------------------------------------------------------------------------------

# Braces, not spaces, end a command, so that no space of the text is eaten.
_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#", "_": r"\_", "%": r"\%",
        "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
        "|": r"\textbar{}", "`": r"\textasciigrave{}",
    }
)  # fmt: skip
_NUMBER = re.compile(r"(-?[\d.]+)(?:e([+-]\d+))?")
# A minus in front of a number, also of one in parentheses or brackets.
_MINUS = re.compile(r"(?<![\w)\]}])-(?=\d|inf\b)")


def latex_escaped(text: str) -> str:
    r"""Text for LaTeX: signs that mean something there are written out, and the minus of a number is one.

    Example:
        >>> print(latex_escaped("50 % of a_b"), latex_escaped("(-1.5)"), latex_escaped("2.1e-05"))
        50 \% of a\_b ($-$1.5) $2.1 \times 10^{-5}$
    """
    text = _one_line(text)
    found = _NUMBER.fullmatch(text)
    if found and found[2]:
        return rf"${found[1]} \times 10^{{{int(found[2])}}}$"
    text = text.translate(_LATEX)
    text = _MINUS.sub("$-$", text).replace("--", "-{}-")
    # After the end of a row a bracket would be its argument, and a star its variant.
    return f"{{{text[0]}}}{text[1:]}" if text[:1] in ("[", "*") else text


def _latex_of(part: str | Cells) -> str:
    if isinstance(part, str):
        return rf"\noindent {latex_escaped(part)}"
    columns = "l" * part.left + "r" * (len(part.heads) - part.left)
    lines = [rf"\noindent\begin{{tabular}}{{{columns}}}", r"\toprule", _latex_row(part.heads), r"\midrule"]
    for i, row in enumerate(part.rows):
        lines += [r"\midrule"] * (i in part.rules) + [_latex_row(row)]
    title = [rf"\smallskip\noindent\textbf{{{latex_escaped(part.title)}}}", ""] * bool(part.title)
    return "\n".join([*title, *lines, r"\bottomrule", r"\end{tabular}"])


def _latex_row(row: Sequence[str]) -> str:
    return " & ".join(map(latex_escaped, row)) + r" \\"


def _latex_notes(notes: Sequence[str]) -> list[str]:
    lines = [rf"\footnotesize\noindent {latex_escaped(note)}\par" for note in notes]
    return [f"{{{line}}}" if i else rf"{{\smallskip{line}}}" for i, line in enumerate(lines)]


# --- Markdown -------------------------------------------------------------------------------------------------------

_MARKDOWN = re.compile(r"[\\|`*<~$&]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])|(?<=\])(?=[(\[])")
# A line that begins like a heading, a quotation, a list or a rule is none.
_BLOCK = re.compile(r"^(\d*)(?=[#>+=-]|(?<=\d)[.)](?:\s|$))")


def markdown_escaped(text: str) -> str:
    r"""Text for GitHub's Markdown, in cells and lines.

    Example:
        >>> print(markdown_escaped("Pr(>|t|)"), markdown_escaped("sd_x"), markdown_escaped("a * b"))
        Pr(>\|t\|) sd_x a \* b
    """
    return _MARKDOWN.sub(lambda found: "\\" + found[0], _one_line(text))


def _markdown_of(part: str | Cells) -> str:
    if isinstance(part, str):
        return _BLOCK.sub(r"\1\\", markdown_escaped(part).strip())
    aligned = [":---"] * part.left + ["---:"] * (len(part.heads) - part.left)
    rows = [list(map(markdown_escaped, row)) for row in (part.heads, *part.rows)]
    lines = [f"| {' | '.join(row)} |" for row in (rows[0], aligned, *rows[1:])]
    return "\n".join([*[f"**{markdown_escaped(part.title)}**", ""] * bool(part.title), *lines])
