"""What the workers print: each one's to a file, and to the terminal that of one of them."""

from __future__ import annotations

import contextlib
import os
import selectors
import time
from collections.abc import Callable
from pathlib import Path
from typing import final

from lightwork.spec.roster import FIRST_RANK

#: A process of the team: its rank, and how many were at its place before it.
Process = tuple[int, int]

#: Seconds for which output is still read after the last worker has ended: something it started may hold the pipe.
DRAIN = 0.5


class _Log:
    """The file that keeps what a worker prints, as far as there is room for it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lost_bytes = 0
        self.problem = ""  # why
        self.write(b"")

    def write(self, data: bytes) -> None:
        """Append; what does not fit is counted. (Opened each time: a team may be larger than what may be open.)"""
        written = 0
        try:
            with self.path.open("ab", buffering=0) as file:
                while written < len(data):
                    written += file.write(data[written:])
        except OSError as error:
            self.lost_bytes += len(data) - written
            self.problem = self.problem or str(error.strerror)


@final
class Output:
    """The pipes from the workers of a team.

    Owns: their ends here, until `close`.
    """

    def __init__(self, tell: Callable[[str], None]) -> None:
        """`tell` is called with what there is to say about logs."""
        self.shown: set[Process] = {(FIRST_RANK, 0)}  #: whose output is; of one that died the rest may still come
        self._tell = tell
        self._logs: dict[Path, _Log] = {}
        self._told: set[Path] = set()  # logs that can not be written
        self._selector = selectors.DefaultSelector()
        self._wake_read, self.wake_fd = os.pipe()
        os.set_blocking(self.wake_fd, False)
        self._selector.register(self._wake_read, selectors.EVENT_READ, "wake")

    def forward(self, process: Process, log: Path, show: Callable[[bytes], None]) -> int:
        """Return a descriptor, the caller's, for a worker: all that is written there goes to the file `log`.

        Also to `show`, as long as it is shown.
        """
        sink = self._logs.setdefault(log, _Log(log))

        def pass_on(data: bytes) -> None:
            sink.write(data)
            if process in self.shown:
                show(data)
            if sink.problem and log not in self._told:
                self._told.add(log)
                self._tell(f"the log {log} can not be written ({sink.problem}). Training goes on.")

        fd, write_end = os.pipe()
        self._selector.register(fd, selectors.EVENT_READ, pass_on)
        return write_end

    def pass_on(self, seconds: float) -> bool:
        """Pass on what comes, for so long at most; return whether anything came. A byte to `wake_fd` ends it."""
        events = self._selector.select(seconds)
        for key, _ in events:
            data = b""
            with contextlib.suppress(OSError):
                data = os.read(key.fd, 1 << 16)
            if key.data == "wake":
                continue
            if data:
                key.data(data)
            else:
                self._selector.unregister(key.fd)
                os.close(key.fd)
        return any(key.data != "wake" for key, _ in events)

    def drain(self) -> None:
        """Pass on what is left when all have ended, and say what the logs lack."""
        deadline = time.monotonic() + DRAIN
        while time.monotonic() < deadline and len(self._selector.get_map()) > 1:
            if not self.pass_on(0.05):
                break
        for log in self._logs.values():
            if log.lost_bytes:
                self._tell(f"{log.lost_bytes} bytes of output are not in the log {log.path} ({log.problem}).")

    def close(self) -> None:
        """Close the pipes."""
        for key in list(self._selector.get_map().values()):
            os.close(key.fd)
        self._selector.close()
        os.close(self.wake_fd)
