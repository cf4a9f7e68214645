"""Reading a trace while it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, BinaryIO

#: Bytes read at a time; what a faster run wrote before that is passed over, so that looking stays cheap.
MAX_READ = 128 * 1024


class Tail:
    """The records that a trace gains between two calls of `read`; a file that does not exist yet is empty.

    What is not a record (a line cut off by a full disk) is passed over: a reader must never stop a run.
    """

    def __init__(
        self, path: Path, *, max_read: int = MAX_READ, keep: str | None = None, skip_existing: bool = False
    ) -> None:
        """Begin at the start of the file, or with `skip_existing` at its end: an earlier run's records stay unread.

        `max_read` is in bytes; records with the text `keep` are never passed over (at 1 ms per MB passed over).
        """
        self._path = path
        self._max_read = max_read
        self._keep = keep.encode() if keep else None
        self._at = path.stat().st_size if skip_existing and path.exists() else 0

    def read(self) -> list[dict[str, Any]]:
        """Return the complete new records, at most the last `max_read` bytes of them and those that are kept."""
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, 2)
                start = max(self._at, size - self._max_read)
                kept = self._pass_over(file, start)
                file.seek(start)
                data = file.read(size - start)
        except OSError:
            return []
        lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
        if start > self._at and lines:
            lines[0] = b""  # the end of a line that was passed over
        self._at = start + data.rfind(b"\n") + 1
        return [record for line in (*kept, *lines) for record in _parse(line)]

    def _pass_over(self, file: BinaryIO, end: int) -> list[bytes]:
        """Return the lines to keep that begin before `end`."""
        kept: list[bytes] = []
        if self._keep is None:
            return kept
        file.seek(self._at)
        position = self._at
        while position < end:
            line = file.readline()
            if not line.endswith(b"\n"):
                break
            position += len(line)
            if self._keep in line:
                kept.append(line)
        return kept


def _parse(line: bytes) -> list[dict[str, Any]]:
    try:
        record = json.loads(line)
    except ValueError:
        return []
    return [record] if isinstance(record, dict) else []
