"""A lock between the workers of a host that dies with its holder."""

from __future__ import annotations

import fcntl
import os
import struct
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import final

#: Seconds of yielding the core before sleeping: a holder needs some microseconds.
SPIN_SECONDS = 200e-6
#: Seconds between two tries after that.
POLL_SECONDS = 500e-6
#: Seconds after which a holder is told of, and again: it is stopped, or the machine has come to a halt.
HELD_SECONDS = 1.0

#: Linux's `struct flock` of 64 bits: type, whence, start, length, process.
_FLOCK = struct.Struct("hhqqi4x")


@final
class FileLock:
    """A POSIX record lock on one byte of a file: the kernel releases it when its holder dies. 1.5 us, 2026-11.

    Not an open-file-description lock: a forked data-loading child would inherit it and keep it alive. It excludes
    processes, not threads of one process; only a worker's main thread takes it. The file is that of the team's memory:
    [Note: one descriptor of a memory file] in `store/mapped`.

    Who waits asks again and again rather than to sleep in the kernel: a holder that is stopped would keep it there.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        #: Called with the holder's process and the seconds waited, once for each second that somebody holds the lock.
        self.when_held: Callable[[int, float], None] = lambda pid, seconds: None

    def __enter__(self) -> None:
        if not self._try():
            self._wait()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1)

    def _try(self) -> bool:
        try:
            fcntl.lockf(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1)
        except (BlockingIOError, PermissionError):  # systems differ in what they say of a lock that is held
            return False
        return True

    def _wait(self) -> None:
        since = time.monotonic()
        told = 0
        while not self._try():
            waited = time.monotonic() - since
            if waited < SPIN_SECONDS:
                os.sched_yield()
                continue
            time.sleep(POLL_SECONDS)
            if waited // HELD_SECONDS > told:
                told = int(waited // HELD_SECONDS)
                self.when_held(self._holder(), waited)

    def _holder(self) -> int:
        """Return the process that holds the lock, 0 where that is not known."""
        if sys.platform != "linux":
            return 0
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, 0, 1, 0)
        kind, _, _, _, pid = _FLOCK.unpack(fcntl.fcntl(self._fd, fcntl.F_GETLK, asked))
        return 0 if kind == fcntl.F_UNLCK else int(pid)
