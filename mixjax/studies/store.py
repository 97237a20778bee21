"""Finished chunks of a study as parquet files in a directory, with a manifest of what they are.

A file is written beside its place and then renamed, so that it is whole or not there. Its name says which replicates it
holds and has a checksum of these, of the study and of every byte, so that a chunk that was damaged, or put in the place
of another, is noticed. What lies in the directory is all that counts. Chunks of any size fit together.
"""

from __future__ import annotations

import difflib
import hashlib
import io
import json
import os
import re
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mixjax.checks import warn

MANIFEST = "manifest.json"
# Of the files and the manifest; another one is not read.
FORMAT = 3
_FILE = re.compile(r"cell-(\d+)-replicates-(\d+)-(\d+)-([0-9a-f]{32})\.parquet")
# What a damaged chunk is renamed to, so that nothing reads it again.
DAMAGED = ".damaged"


class StoreError(RuntimeError):
    """A directory that cannot be used for this study, or could not be read or written."""


class Chunk(NamedTuple):
    """Replicates ``first .. end - 1`` of a cell, in a file."""

    cell: int
    first: int
    end: int
    checksum: str

    @property
    def name(self) -> str:
        """Name of its file."""
        return f"cell-{self.cell:05d}-replicates-{self.first:010d}-{self.end:010d}-{self.checksum}.parquet"


class Store:
    """A directory of chunks. All of them are read once, and those that are damaged are warned of and left out.

    Args:
        path: the directory; made if it is not there.
        manifest: what determines the numbers, as plain JSON. ``versions`` and ``began_with`` in it may differ from
            those on disk.

    Attributes:
        began_with: the number of replicates that the study was asked for first.

    Raises:
        StoreError: the directory belongs to another study; the message has the difference.
    """

    def __init__(self, path: Any, manifest: Mapping[str, Any]):
        _parquet()
        self.path = Path(path)
        self.notes: list[str] = []
        manifest = {**manifest, "format": FORMAT}
        self.began_with: int = manifest.get("began_with", 0)
        self._study = hashlib.sha256(_plain(_numbers(manifest)).encode()).digest()
        try:
            if self.path.exists() and not self.path.is_dir():
                raise StoreError(f"{self.path} is a file; a study is stored in a directory")
            self.path.mkdir(parents=True, exist_ok=True)
            names = sorted(name for name in os.listdir(self.path) if not name.startswith("."))
        except OSError as error:
            raise StoreError(f"{self.path} cannot be used: {error}") from error
        there = self.path / MANIFEST
        if MANIFEST in names:
            self._check(there, manifest)
        elif any(_FILE.fullmatch(name.removesuffix(DAMAGED)) is None for name in names):
            raise StoreError(f"{self.path} is not empty and has no {MANIFEST}: choose an empty or a new directory")
        else:
            self._write(there, _plain(manifest).encode())
        self._damaged: list[str] = []
        self._chunks: list[Chunk] = []
        for name in names:
            if match := _FILE.fullmatch(name):
                self._add(Chunk(int(match[1]), int(match[2]), int(match[3]), match[4]), name)

    def _check(self, there: Path, manifest: Mapping[str, Any]) -> None:
        cure = (
            "put it back from a copy; or delete it and run the same study again, which keeps the chunks of this study"
        )
        try:
            found = json.loads(there.read_bytes())
        except (OSError, ValueError, RecursionError) as error:
            raise StoreError(f"{there} cannot be read ({error}): {cure}") from error
        if not isinstance(found, dict):
            raise StoreError(f"{there} is no manifest of a study, but {type(found).__name__}: {cure}")
        form = found.get("format", 1)
        if isinstance(form, int) and form > FORMAT:
            raise StoreError(
                f"{there} was written by a newer version of mixjax (format {form}, and this one reads {FORMAT}): "
                "upgrade mixjax, or use another directory"
            )
        if form != FORMAT and "cells" in found:
            raise StoreError(
                f"{there} has format {form!r}, of an older version of mixjax, and this one reads {FORMAT}: use "
                "another directory"
            )
        if lacking := sorted(manifest.keys() - found.keys()):
            raise StoreError(f"{there} is no manifest of a study, because it lacks {', '.join(lacking)}: {cure}")
        if isinstance(found.get("began_with"), int):
            self.began_with = found["began_with"]
        old, new = (_plain(_numbers(m)) for m in (found, manifest))
        versions = [m.get("versions") for m in (found, manifest)]
        if old != new:
            lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "stored", "asked for", lineterm="", n=1)
            also = f"\n(it was computed with {versions[0]}, now {versions[1]})" if versions[0] != versions[1] else ""
            raise StoreError(
                f"{self.path} holds another study; use another directory, or ask for the same study. The difference:\n"
                + "\n".join(lines)
                + also
            )
        if versions[0] != versions[1]:
            self.notes.append(
                f"chunks in {self.path} were computed with {versions[0]}, now {versions[1]}: numbers agree to rounding "
                "only"
            )

    def _checksum(self, cell: int, first: int, end: int, data: bytes) -> str:
        """Of the study, the place of a chunk in it, and every byte."""
        digest = hashlib.sha256(self._study + f"{cell}:{first}:{end}:".encode())
        digest.update(data)
        return digest.hexdigest()[:32]

    def _load(self, chunk: Chunk) -> bytes:
        """Bytes of a chunk's file; ValueError or OSError where they are not those that were written."""
        data = (self.path / chunk.name).read_bytes()
        if self._checksum(chunk.cell, chunk.first, chunk.end, data) != chunk.checksum:
            raise ValueError("its checksum is not that of its replicates in this study")
        return data

    def _add(self, chunk: Chunk, name: str) -> None:
        try:
            if chunk.name != name or chunk.first >= chunk.end:
                raise ValueError("its name is none of a chunk")
            self._load(chunk)
        except FileNotFoundError:  # another process has put it aside
            pass
        except (OSError, ValueError) as error:
            self._damaged.append(name)
            warn(f"{self.path / name} is damaged ({error}); what it held is computed again")
        else:
            self._chunks.append(chunk)

    def done(self) -> dict[int, list[tuple[int, int]]]:
        """Per cell the stored replicates, as ``(first, end)``, ascending."""
        found: dict[int, list[tuple[int, int]]] = {}
        for chunk in sorted(self._chunks):
            found.setdefault(chunk.cell, []).append((chunk.first, chunk.end))
        return found

    def columns(self, cell: int) -> list[str]:
        """Names of the columns of a cell, of which there is a chunk."""
        _, pq = _parquet()
        chunk = next(chunk for chunk in self._chunks if chunk.cell == cell)
        return list(pq.read_schema(self.path / chunk.name).names)

    def prepare(self) -> None:
        """Before chunks are computed: put damaged ones aside.

        Raises:
            StoreError: nothing can be written here; better said now than after an hour of computing.
        """
        place = self.path / MANIFEST
        temporary, file = self._create(place)
        file.close()
        temporary.unlink(missing_ok=True)
        for name in self._damaged:
            try:
                os.replace(self.path / name, self.path / f"{name}{DAMAGED}")
            except FileNotFoundError:
                pass
            except OSError as error:
                raise StoreError(f"{self.path / name} is damaged and cannot be renamed: {error}") from error
        self._damaged.clear()

    def write(self, cell: int, first: int, columns: Mapping[str, np.ndarray]) -> None:
        """Keep a chunk.

        Raises:
            StoreError: it could not be written, as on a full disk; chunks that were written stay.
        """
        pa, pq = _parquet()
        end = first + len(next(iter(columns.values())))
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(dict(columns)), sink, compression="zstd")
        data = sink.getvalue().to_pybytes()
        chunk = Chunk(cell, first, end, self._checksum(cell, first, end, data))
        self._write(self.path / chunk.name, data)
        self._chunks.append(chunk)

    def _write(self, place: Path, data: bytes) -> None:
        temporary, file = self._create(place)
        try:
            with file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, place)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise _not_written(place, error) from error

    def _create(self, place: Path) -> tuple[Path, io.BufferedWriter]:
        """A new file beside a place. Its name cannot be foreseen, and what has it already, as a link, is not opened."""
        temporary = place.with_name(f".{place.name}.{secrets.token_hex(8)}.part")
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        try:
            return temporary, os.fdopen(os.open(temporary, flags, 0o666), "wb")
        except OSError as error:
            raise _not_written(place, error) from error

    def read(self, cell: int, replicates: int, names: list[str] | None = None) -> dict[str, np.ndarray]:
        """Columns of the first replicates of a cell, all of which are there; each counted once.

        Raises:
            StoreError: a chunk is damaged, or replicates or columns are missing.
        """
        pa, pq = _parquet()
        parts: list[dict[str, np.ndarray]] = []
        at = 0
        for chunk in sorted(chunk for chunk in self._chunks if chunk.cell == cell):
            first, end = chunk.first, chunk.end
            if end <= at or first >= replicates:
                continue
            if first > at:
                break
            path = self.path / chunk.name
            try:
                table = pq.read_table(pa.BufferReader(self._load(chunk)))
                if table.num_rows != end - first:
                    raise ValueError(f"it has {table.num_rows} rows, and its name says {end - first}")
            except Exception as error:
                raise StoreError(
                    f"{path} was damaged or taken away since the study ran ({error}); run the study again, which "
                    "computes it anew"
                ) from error
            if lacking := [name for name in names or list(parts[0] if parts else []) if name not in table.column_names]:
                there = ", ".join(table.column_names)
                message = f"there is no column {', '.join(map(repr, lacking))} in {path}; there are {there}"
                raise ValueError(message) if names else StoreError(message)
            window = slice(at - first, min(end, replicates) - first)
            parts.append({name: table[name].to_numpy()[window] for name in names or table.column_names})
            at = min(end, replicates)
        if at < replicates:
            raise StoreError(f"{self.path} lacks replicates {at} to {replicates} of cell {cell}")
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def missing(done: list[tuple[int, int]], replicates: int, chunk: int, block: int) -> list[tuple[int, int]]:
    """Chunks ``(first, count)`` that are still to be computed, each beginning at a whole block."""
    gaps, at = [], 0
    for first, end in done:
        if first > at:
            gaps.append((at, first))
        at = max(at, end)
    if at < replicates:
        gaps.append((at, replicates))
    work = []
    for begin, end in gaps:
        start = begin // block * block
        work += [(first, min(chunk, end - first)) for first in range(start, min(end, replicates), chunk)]
    return work


def _numbers(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """The description of the numbers but for rounding."""
    return {name: value for name, value in manifest.items() if name not in ("versions", "began_with")}


def _not_written(place: Path, error: OSError) -> StoreError:
    return StoreError(
        f"{place} could not be written: {error}; what was stored before is whole, and the same call goes on from there "
        "once the directory can be written, or with a copy of it"
    )


def _plain(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=True)


def _parquet() -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError('a study is stored as parquet files: pip install "mixjax[parquet]"') from error
    return pa, pq
