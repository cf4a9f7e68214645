"""Traces: every worker appends what it did to a JSONL file of its own. Emitting never blocks training.

A record is appended to a list by the training thread and written by a background thread about four times a second,
so that a slow disk delays the trace, not the step. A writer that falls behind by more than `MAX_PENDING` records
drops the newest and says at the end how many. Readers (progress, reports) see only the files.

The records, one JSON object a line:

    {"kind": "span", "name": N, "step": S, "micro": I, "start": T, "seconds": D}
        N: load, forward, backward (of micro-batch I), wait, exchange, reduce, update (of the whole step, no "micro")
    {"kind": "counter", "name": N, "step": S, "value": V}
    {"kind": "event", "name": N, "at": T, ...}             start, steps, step, evaluate, save, end and what they carry

`T` is seconds since the epoch, `D` seconds.
"""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import TextIO

#: Records that may wait for the writing thread before new ones are dropped.
MAX_PENDING = 1_000_000

#: Seconds between two writes.
WRITE_INTERVAL = 0.25

Record = tuple[str, str, int, int, float, float] | dict[str, object]


class Trace:
    """One worker's trace file.

    Owns: the file at `path`, which it creates; `None` discards everything (the null trace).
    """

    def __init__(self, path: Path | None) -> None:
        self._pending: list[Record] = []
        self._dropped = 0
        self._file: TextIO | None = path.open("a", encoding="utf-8") if path else None
        # Spans are taken on the monotonic clock; this turns them into seconds since the epoch.
        self._offset = time.time() - time.perf_counter()
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None
        if self._file:
            self._thread = threading.Thread(target=self._write_forever, name="lightwork-trace", daemon=True)
            self._thread.start()

    def span(self, name: str, step: int, micro: int, start: float, end: float) -> None:
        """Record that `name` lasted from `start` to `end` (`time.perf_counter()`); `micro` -1: the whole step."""
        if self._file and len(self._pending) < MAX_PENDING:
            self._pending.append(("span", name, step, micro, start, end))

    def counter(self, name: str, step: int, value: float) -> None:
        """Record the value of a counter at a step."""
        self._append({"kind": "counter", "name": name, "step": step, "value": value})

    def event(self, name: str, **values: object) -> None:
        """Record something that happened once, with JSON values."""
        self._append({"kind": "event", "name": name, "at": round(time.time(), 6), **values})

    def close(self) -> None:
        """Write what is pending and close the file. Blocks: until it is written."""
        if self._file is None:
            return
        self._stopping.set()
        if self._thread:
            self._thread.join()
        if self._dropped:
            self._append({"kind": "counter", "name": "dropped_records", "step": -1, "value": self._dropped})
        self._write()
        self._file.close()
        self._file = None

    def _append(self, record: Record) -> None:
        if self._file is None:
            return
        if len(self._pending) < MAX_PENDING:
            self._pending.append(record)
        else:
            self._dropped += 1

    def _write_forever(self) -> None:
        while not self._stopping.wait(WRITE_INTERVAL):
            self._write()

    def _write(self) -> None:
        if self._file is None or not self._pending:
            return
        records, self._pending = self._pending, []
        self._file.write("".join(self._format(record) for record in records))
        self._file.flush()

    def _format(self, record: Record) -> str:
        if isinstance(record, dict):
            return json.dumps(record) + "\n"
        _, name, step, micro, start, end = record
        where = f'"step": {step}' if micro < 0 else f'"step": {step}, "micro": {micro}'
        return (
            f'{{"kind": "span", "name": "{name}", {where}, '
            f'"start": {start + self._offset:.6f}, "seconds": {end - start:.6f}}}\n'
        )
