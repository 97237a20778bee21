"""Files named on the command line -> tables.

A csv file is read as it stands. What does not fit together is refused with the row, counted as editors and
spreadsheets count them: the header is row 1. These numbers are the index of the table, for the messages of all others.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import difflib
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mixjax import datasets

if TYPE_CHECKING:
    import pandas as pd

# Cells that are missing values. pandas takes more for missing, among them names such as None and null.
MISSING = ("", "NA", "NaN", "nan")
# What files named csv are separated by; looked for where a file seems to have one column.
SEPARATORS = (",", ";", "\t", "|", " ")
COMPRESSED: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
# First bytes of files that are no text, and what to do with them.
NO_TEXT = {
    b"PK\x03\x04": "is a spreadsheet or a zip archive: save the sheet as csv",
    b"PAR1": "is a parquet file: let its name end in .parquet",
    b"\x1f\x8b": "is compressed by gzip: let its name end in .csv.gz",
}


def read(
    name: str,
    as_text: Callable[[list[str]], Iterable[str]],
    separator: str | None = None,
    decimal: str | None = None,
    encoding: str | None = None,
) -> pd.DataFrame:
    """The table of a csv or parquet file, or a bundled data set.

    Args:
        name: of the file or data set.
        as_text: names of the columns -> those that are names even where they look like numbers.
        separator, decimal, encoding: of a csv file; None for a comma, a point and UTF-8.

    Raises:
        ValueError, OSError: the file cannot be read, or not in one way only.
    """
    path = Path(name)
    given = {"--sep": separator, "--decimal": decimal, "--encoding": encoding}
    is_csv = path.exists() and path.suffix not in (".parquet", ".pq")
    if not is_csv and any(given.values()):
        raise ValueError(f"{', '.join(o for o, value in given.items() if value)}: only for csv files; {name} is none")
    if not path.exists():
        if name.lower() in (known.lower() for known in datasets.NAMES):
            return datasets.load(name)
        close = difflib.get_close_matches(name, datasets.NAMES, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise FileNotFoundError(f"there is no file {name!r} and no bundled data set of that name{hint}")
    if path.is_dir():
        raise ValueError(f"{name} is a folder: name a file in it")
    if not is_csv:
        return _parquet(path)
    separator, decimal, encoding = separator or ",", decimal or ".", encoding or "utf-8"
    if separator == decimal:
        raise ValueError(f"--sep and --decimal are both {separator!r}: add --sep ';' or whatever separates the columns")
    raw = _bytes(path, encoding)
    header, rows = _checked(name, raw, separator, encoding)
    try:
        frame = _frame(raw, header, set(as_text(header)), separator, decimal, encoding)
    except ValueError as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    # A first column without a name is what R and pandas write row names to.
    return frame.set_axis(rows, axis=0).drop(columns=[""], errors="ignore")


def counted(levels: Iterable[str]) -> list[str]:
    """Names with numbers in them by these: week2 before week10; others by the alphabet."""

    def key(name: str) -> list[tuple[bool, int, str]]:
        parts = re.findall(r"\d+|\D+", name)
        return [(not part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]

    return sorted(levels, key=key)


def ordered(levels: Iterable[str]) -> list[str]:
    """Levels as they are sorted in a summary: numbers by their values, other names by the alphabet."""
    names = sorted(levels)
    try:
        return sorted(names, key=float)
    except ValueError:
        return names


def _parquet(path: Path) -> pd.DataFrame:
    import pandas as pd

    try:
        import pyarrow  # noqa: F401 (pandas' own message is a page long)
    except ImportError as error:
        raise ImportError("reading parquet files needs pyarrow: pip install 'mixjax[parquet]'") from error
    try:
        return pd.read_parquet(path)
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error


# --- csv -------------------------------------------------------------------------------------------------------------


def _bytes(path: Path, encoding: str) -> bytes:
    """All of a file, read once: a pipe cannot be read twice."""
    try:
        with COMPRESSED.get(path.suffix, open)(path, "rb") as stream:
            raw: bytes = stream.read()
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    kind = next((kind for start, kind in NO_TEXT.items() if raw.startswith(start)), None)
    if kind is not None:
        raise ValueError(f"{path} {kind}")
    if codecs.lookup(encoding).name in ("utf-8", "utf-8-sig"):
        if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise ValueError(f"{path} seems to be UTF-16 text: add --encoding utf-16")
        return raw.removeprefix(codecs.BOM_UTF8)
    return raw


def _checked(name: str, raw: bytes, separator: str, encoding: str) -> tuple[list[str], list[int]]:
    """The names of the columns, and the number of every row below, each of which has a cell for every name."""
    text = io.TextIOWrapper(io.BytesIO(raw), encoding, newline="")
    try:
        rows = _rows(name, text, separator)
        _first, _last, header = next(rows, (1, 1, []))
        _check_header(name, header, separator)
        numbers = []
        for first, last, cells in rows:
            if len(cells) != len(header):
                _refuse_row(name, first, last, cells, len(header), separator)
            numbers.append(first)
    except UnicodeDecodeError:
        _refuse_encoding(name, raw, encoding)
    except UnicodeError as error:  # UTF-16 without its mark
        raise ValueError(f"{name} is not {encoding} text: {error}") from error
    if not numbers:
        raise ValueError(f"{name} has a header ({', '.join(header[:5])}) and no rows")
    return header, numbers


def _rows(name: str, text: Iterable[str], separator: str) -> Iterator[tuple[int, int, list[str]]]:
    """First line, last line and cells of every row that is not blank."""
    line = ""

    def lines() -> Iterator[str]:
        nonlocal line
        for number, line in enumerate(text, 1):
            if "\0" in line:
                raise ValueError(f"{name}: row {number} holds a NUL character: is it text? add --encoding utf-16 if so")
            yield line

    reader, first = csv.reader(lines(), delimiter=separator, strict=True), 1
    try:
        for cells in reader:
            if len(cells) > 1 or line.strip(" \t\r\n"):
                yield first, reader.line_num, cells
            first = reader.line_num + 1
    except csv.Error as error:
        if "expected after" in str(error):
            raise ValueError(
                f"{name}: row {first} has text behind a closing quote: write a quote inside a quoted cell twice"
            ) from error
        raise ValueError(f"{name}: a quote is opened in row {first} and never closed") from error


def _check_header(name: str, header: list[str], separator: str) -> None:
    if not header:
        raise ValueError(f"{name} is empty")
    other = next((mark for mark in SEPARATORS if len(header) == 1 and mark in header[0]), None)
    if other is not None:
        shown = r"\t" if other == "\t" else other
        kind = {"\t": "tabs", " ": "spaces"}.get(other, repr(other))
        raise ValueError(
            f"{name} has one column, {header[0]!r}: the file seems to be separated by {kind}: add --sep '{shown}'"
        )
    nameless = [i for i, column in enumerate(header, 1) if not column.strip() and i > 1]
    if nameless:
        trailing = nameless == list(range(nameless[0], len(header) + 1))
        cure = f"the {_shown(separator)} at the end of all rows" if trailing else "the column"
        raise ValueError(f"{name}: column {nameless[0]} has no name in the header: give it one, or remove {cure}")
    twice = sorted({column for column in header if header.count(column) > 1})
    if twice:
        at = ", ".join(str(i) for i, column in enumerate(header, 1) if column == twice[0])
        raise ValueError(f"{name}: columns {at} are all named {twice[0]!r}: give each a name of its own in the header")


def _refuse_row(name: str, first: int, last: int, cells: Sequence[str], width: int, separator: str) -> NoReturn:
    several = f" (a quote makes one row of lines {first} to {last}: is it closed in the right place?)" * (last > first)
    count = f"{len(cells)} cell{'s' * (len(cells) != 1)}"
    message = f"{name}: row {first} has {count}, the header names {width}{several}: "
    mark = _shown(separator)
    if len(cells) < width:
        raise ValueError(f"{message}add what is missing (an empty cell is a missing value), or remove the row")
    if not any(cell.strip() for cell in cells[width:]):
        raise ValueError(f"{message}remove the {mark} at its end")
    decimal = ", of numbers with decimal commas too; or save with --sep ';' --decimal ','" * (separator == ",")
    raise ValueError(f"{message}put quotes around cells that hold a {mark}{decimal}; or name all columns in the header")


def _shown(separator: str) -> str:
    return {",": "comma", ";": "semicolon", "\t": "tab", " ": "space"}.get(separator, repr(separator))


def _refuse_encoding(name: str, raw: bytes, encoding: str) -> NoReturn:
    try:
        raw.decode(encoding)
    except UnicodeDecodeError as error:  # of the whole, which says where: the stream's knows its own part only
        row = raw[: error.start].decode(encoding, "ignore").count("\n") + 1
        raise ValueError(
            f"{name}: row {row} is not {encoding} text (byte {raw[error.start]:#04x}): add --encoding with that of the "
            "file, such as cp1252 of Windows and Excel"
        ) from error
    raise ValueError(f"{name} is not {encoding} text")


def _frame(
    raw: bytes, header: list[str], as_text: set[str], separator: str, decimal: str, encoding: str
) -> pd.DataFrame:
    import pandas as pd

    def parse(text: set[str]) -> pd.DataFrame:
        return pd.read_csv(
            io.BytesIO(raw), sep=separator, decimal=decimal, encoding=encoding, header=0, names=header, index_col=False,
            dtype=dict.fromkeys(text & set(header), str), keep_default_na=False, na_values=list(MISSING),
            low_memory=False,  # which would type a column piece by piece
        )  # fmt: skip

    frame = parse(as_text)
    # TRUE and FALSE are names like any others, not the True and False that pandas makes of them.
    logical = {name for name in header if pd.api.types.infer_dtype(frame[name], skipna=True) == "boolean"}
    if logical:
        frame = parse(as_text | logical)
    for name in as_text & set(header):
        levels = ordered(frame[name].dropna().unique())
        frame[name] = pd.Categorical(frame[name], categories=levels)
    return frame
