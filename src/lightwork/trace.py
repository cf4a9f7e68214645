"""Traces: every worker appends what it did to a JSONL file of its own. Emitting never blocks training, nor ends it.

A record is appended to a queue by the training thread and written by a background thread about four times a second,
so that a slow disk delays the trace, not the step. A writer that falls behind by more than `MAX_PENDING` records
drops the newest; a disk that is full loses what does not fit, and is tried again. What was lost is counted, and told
at the end by the counter `dropped_records`, if there is room for that. Readers (progress, reports) see only the files.

The records, one JSON object a line:

    {"kind": "span", "name": N, "step": S, "micro": I, "start": T, "seconds": D}
        N: load, forward, backward (of micro-batch I), wait, exchange, reduce, update (of the whole step, no "micro")
    {"kind": "counter", "name": N, "step": S, "value": V}
    {"kind": "event", "name": N, "at": T, ...}             start, steps, step, evaluate, save, end and what they carry

`T` is seconds since the epoch, `D` seconds. A full disk may leave the beginning of a record, a line by itself.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from io import FileIO
from pathlib import Path

#: Records that may wait for the writing thread before new ones are dropped.
MAX_PENDING = 1_000_000

#: Seconds between two writes.
WRITE_INTERVAL = 0.25

Record = tuple[str, str, int, int, float, float] | dict[str, object]


class Trace:
    """One worker's trace file.

    Owns: the file at `path`, which it creates; `None` discards everything (the null trace).
    """

    def __init__(self, path: Path | None, tell: Callable[[str], None]) -> None:
        """`tell` is called with a sentence when the file can not be written, once, and at the end of such a trace."""
        self._path = path
        self._tell = tell
        self._pending: deque[Record] = deque()
        self._dropped = 0  # by the training thread
        self._lost = 0  # by the writing thread
        self._problem = ""  # why
        self._is_cut = False  # the file ends within a record
        self._file: FileIO | None = None
        # Spans are taken on the monotonic clock; this turns them into seconds since the epoch.
        self._offset = time.time() - time.perf_counter()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._write_forever, name="lightwork-trace", daemon=True)
        if path is not None:
            try:
                self._file = path.open("ab", buffering=0)
            except OSError as error:
                tell(f"the trace {path} can not be written ({error.strerror}). Training goes on without it.")
            else:
                self._thread.start()

    def span(self, name: str, step: int, micro: int, start: float, end: float) -> None:
        """Record that `name` lasted from `start` to `end` (`time.perf_counter()`); `micro` -1: the whole step."""
        self._append(("span", name, step, micro, start, end))

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
        self._thread.join()
        self._write(self._file)
        count = self._dropped + self._lost
        if count:
            self.counter("dropped_records", -1, count)
            self._write(self._file)
        if self._problem:
            self._tell(f"{count} records of the trace {self._path} are lost ({self._problem}).")
        with contextlib.suppress(OSError):
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
            if self._file is not None:
                self._write(self._file)

    def _write(self, file: FileIO) -> None:
        records = [self._pending.popleft() for _ in range(len(self._pending))]
        if not records:
            return
        # What a full disk cut off is ended, so that it does not spoil the record after it.
        text = b"\n" * self._is_cut + "".join(self._format(record) for record in records).encode()
        written = 0
        try:
            while written < len(text):
                written += file.write(text[written:])
        except OSError as error:
            whole = text.count(b"\n", 0, written) - (self._is_cut and written > 0)
            self._lost += len(records) - whole
            if not self._problem:
                self._problem = str(error.strerror)
                self._tell(f"the trace {self._path} can not be written ({error.strerror}). Training goes on.")
        if written:
            self._is_cut = text[written - 1 : written] != b"\n"

    def _format(self, record: Record) -> str:
        if isinstance(record, dict):
            return json.dumps(record) + "\n"
        _, name, step, micro, start, end = record
        where = f'"step": {step}' if micro < 0 else f'"step": {step}, "micro": {micro}'
        return (
            f'{{"kind": "span", "name": "{name}", {where}, '
            f'"start": {start + self._offset:.6f}, "seconds": {end - start:.6f}}}\n'
        )
