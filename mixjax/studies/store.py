"""Finished chunks of a study as parquet files in a directory, with a manifest of what they are.

A file is written beside its place and then renamed, so that it is whole or not there; its name says which replicates it
holds, and what lies in the directory is all that counts. Chunks of any size fit together.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

MANIFEST = "manifest.json"
_FILE = re.compile(r"cell-(\d+)-replicates-(\d+)-(\d+)\.parquet")


class StoreError(RuntimeError):
    """A directory that cannot be used for this study, or could not be written."""


class Store:
    """A directory of chunks.

    Args:
        path: the directory; made if it is not there.
        manifest: what determines the numbers, as plain JSON. ``versions`` in it may differ from those on disk.

    Raises:
        StoreError: the directory belongs to another study; the message has the difference.
    """

    def __init__(self, path: Any, manifest: Mapping[str, Any]):
        _parquet()
        self.path = Path(path)
        self.notes: list[str] = []
        text = _plain(manifest)
        if self.path.exists() and not self.path.is_dir():
            raise StoreError(f"{self.path} is a file; a study is stored in a directory")
        self.path.mkdir(parents=True, exist_ok=True)
        there = self.path / MANIFEST
        if there.exists():
            self._check(there, manifest)
        elif any(self.path.iterdir()) and not all(p.name.startswith(".") for p in self.path.iterdir()):
            raise StoreError(f"{self.path} is not empty and has no {MANIFEST}: choose an empty or a new directory")
        else:
            self._write(there, text.encode())

    def _check(self, there: Path, manifest: Mapping[str, Any]) -> None:
        try:
            found = json.loads(there.read_text())
        except ValueError as error:
            raise StoreError(f"{there} cannot be read: {error}") from error
        old, new = (_plain({k: v for k, v in m.items() if k != "versions"}) for m in (found, manifest))
        if old != new:
            lines = difflib.unified_diff(old.splitlines(), new.splitlines(), "stored", "asked for", lineterm="", n=1)
            raise StoreError(
                f"{self.path} holds another study; use another directory, or ask for the same study. The difference:\n"
                + "\n".join(lines)
            )
        if found.get("versions") != manifest.get("versions"):
            self.notes.append(
                f"chunks in {self.path} were computed with {found.get('versions')}, now {manifest.get('versions')}: "
                "numbers agree to rounding only"
            )

    def done(self) -> dict[int, list[tuple[int, int]]]:
        """Per cell the stored replicates, as ``(first, end)``, ascending."""
        found: dict[int, list[tuple[int, int]]] = {}
        for path in self.path.iterdir():
            match = _FILE.fullmatch(path.name)
            if match:
                cell, first, end = map(int, match.groups())
                found.setdefault(cell, []).append((first, end))
        return {cell: sorted(ranges) for cell, ranges in found.items()}

    def write(self, cell: int, first: int, columns: Mapping[str, np.ndarray]) -> None:
        """Keep a chunk.

        Raises:
            StoreError: it could not be written, as on a full disk; chunks that were written stay.
        """
        pa, pq = _parquet()
        end = first + len(next(iter(columns.values())))
        name = f"cell-{cell:05d}-replicates-{first:010d}-{end:010d}.parquet"
        sink = pa.BufferOutputStream()
        pq.write_table(pa.table(dict(columns)), sink, compression="zstd")
        self._write(self.path / name, sink.getvalue().to_pybytes())

    def _write(self, place: Path, data: bytes) -> None:
        # A name of its own, so that two processes never write to the same one.
        temporary = place.with_name(f".{place.name}.{os.getpid()}.part")
        try:
            with open(temporary, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, place)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise StoreError(
                f"{place} could not be written: {error}; what was stored before is whole, and the same call goes on "
                "from there"
            ) from error

    def read(self, cell: int, replicates: int, names: list[str] | None = None) -> dict[str, np.ndarray]:
        """Columns of the first replicates of a cell, all of which are there; each counted once."""
        _, pq = _parquet()
        parts: list[dict[str, np.ndarray]] = []
        at = 0
        for first, end in self.done().get(cell, []):
            if end <= at or first >= replicates:
                continue
            if first > at:
                break
            path = self.path / f"cell-{cell:05d}-replicates-{first:010d}-{end:010d}.parquet"
            try:
                table = pq.read_table(path, columns=names)
            except Exception as error:
                raise StoreError(f"{path} cannot be read ({error}); delete it and run the study again") from error
            window = slice(at - first, min(end, replicates) - first)
            parts.append({name: table[name].to_numpy()[window] for name in table.column_names})
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


def _plain(manifest: Mapping[str, Any]) -> str:
    return json.dumps(manifest, indent=1, sort_keys=True)


def _parquet() -> Any:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ImportError('a study is stored as parquet files: pip install "mixjax[parquet]"') from error
    return pa, pq
