"""Reading a trace while it is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

#: Bytes read at a time; what a faster run wrote before that is passed over, so that looking stays cheap.
MAX_READ = 128 * 1024


class Tail:
    """The records that a trace gains between two calls of `read`; a file that does not exist yet is empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._at = 0

    def read(self) -> list[dict[str, Any]]:
        """Return the complete new records, at most the last `MAX_READ` bytes of them."""
        try:
            with self._path.open("rb") as file:
                size = file.seek(0, 2)
                skipped = size - self._at > MAX_READ
                start = size - MAX_READ if skipped else self._at
                file.seek(start)
                data = file.read(size - start)
        except FileNotFoundError:
            return []
        end = data.rfind(b"\n") + 1
        self._at = start + end
        lines = data[:end].splitlines()
        return [json.loads(line) for line in lines[skipped:]]
