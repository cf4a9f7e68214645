"""A lock between the workers of a host that dies with its holder."""

from __future__ import annotations

import fcntl
from types import TracebackType
from typing import final


@final
class FileLock:
    """A POSIX record lock on one byte of a file: the kernel releases it when its holder dies. 1.5 us, 2026-11.

    Not an open-file-description lock: a forked data-loading child would inherit it and keep it alive. It excludes
    processes, not threads of one process; only a worker's main thread takes it. The file is that of the team's memory:
    [Note: one descriptor of a memory file] in `store/mapped`.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd

    def __enter__(self) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_EX, 1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        fcntl.lockf(self._fd, fcntl.LOCK_UN, 1)
