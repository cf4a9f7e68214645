"""The page that `lightwork run` leaves to its workers: how they find each other, and what it reads of them."""

from __future__ import annotations

import mmap
import os
import struct
import time
from datetime import timedelta
from typing import TYPE_CHECKING, final

from lightwork.errors import TeamError
from lightwork.spec.roster import FIRST_RANK
from lightwork.team.meeting_point import JOIN_TIMEOUT, LOOPBACK, serve_on_loopback
from lightwork.team.rendezvous import DISTRIBUTE, IfKilled, Progress, Rendezvous

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_JOURNAL = struct.Struct("<qq")

#: Of a worker: its process, its descriptors of its first run's memory and, less 1, of that on disk, and its places.
_MEMORY = struct.Struct("<qqqq")

#: The first bytes of a page, so that another file is not taken for one.
_MAGIC = b"lightwork rendezvous page"

_MAX_WORKERS = 4096

_ENDS_AT = 32
_PROGRESS_AT = 64
_IF_KILLED_AT = _PROGRESS_AT + _MAX_WORKERS
_RUNS_AT = _IF_KILLED_AT + _MAX_WORKERS
_MEMORY_AT = _RUNS_AT + 8 * _MAX_WORKERS
_JOURNAL_AT = _MEMORY_AT + _MEMORY.size * _MAX_WORKERS
_JOURNAL_BYTES = 16 * 1024 * 1024  # takes up what was written; a message is about 1 KiB
_LINES_AT = _JOURNAL_AT + 16
_PAGE_BYTES = _LINES_AT + _JOURNAL_BYTES


@final
class Page:
    """It, as the launcher sees it: of each rank two bytes (progress, and what becomes of its runs without it), a count
    of runs, and where it has its memory. Behind that lies the journal (`FileRendezvous`).
    """

    def __init__(self, fd: int) -> None:
        """Raises: TeamError when the descriptor is no such page."""
        try:
            self.bytes = mmap.mmap(fd, _PAGE_BYTES)
            is_page = self.bytes[: len(_MAGIC)] == _MAGIC
        except (OSError, ValueError):
            is_page = False
        if not is_page:
            raise TeamError(
                f"descriptor {fd} (LIGHTWORK_RENDEZVOUS_FD) is not the page that lightwork run leaves to its workers: "
                "it was closed, or is another file. Leave a worker's descriptors open, or unset the variable for a "
                "team of one."
            )

    @classmethod
    def create(cls) -> int:
        """Return a descriptor of a new, empty page, for `lightwork run` to leave to its workers."""
        try:
            fd = os.memfd_create("lightwork-rendezvous")
        except AttributeError:  # no anonymous memory files on this system
            import tempfile

            fd, path = tempfile.mkstemp(prefix="lightwork-rendezvous-")
            os.unlink(path)
        os.ftruncate(fd, _PAGE_BYTES)
        os.pwrite(fd, _MAGIC, 0)
        return fd

    def progress(self, rank: int) -> Progress:
        """Return how far `rank` got."""
        return Progress(self.bytes[_PROGRESS_AT + rank])

    def num_runs(self, rank: int) -> int:
        """Return how many runs `rank` has begun to join."""
        at = _RUNS_AT + 8 * rank
        return int.from_bytes(self.bytes[at : at + 8], "little")

    def if_killed(self, rank: int) -> IfKilled:
        """Return what becomes of the runs that `rank` has joined if it is killed."""
        return IfKilled(self.bytes[_IF_KILLED_AT + rank])

    def memories(self) -> list[tuple[str, str]]:
        """Return what was written down, of processes that may have ended."""
        found = []
        for pid, fd, disk_fd, _ in _MEMORY.iter_unpack(self.bytes[_MEMORY_AT:_JOURNAL_AT]):
            if pid:
                folder = f"/proc/{pid}/fd"
                found.append((f"{folder}/{fd}", f"{folder}/{disk_fd - 1}" if disk_fd > 0 else ""))
        return found

    def capacity(self) -> int:
        """Return how many places the team has, as far as any worker that is there has said."""
        return max(int(row[3]) for row in _MEMORY.iter_unpack(self.bytes[_MEMORY_AT:_JOURNAL_AT]))

    def announce_end(self) -> None:
        """Tell the workers that SIGTERM ends the team from now on, not one worker's part in it."""
        self.bytes[_ENDS_AT] = 1

    def is_ending(self) -> bool:
        """Return whether that was told."""
        return bool(self.bytes[_ENDS_AT])

    def clear(self, rank: int) -> None:
        """Forget all of `rank`, whose process has ended: another one takes its place."""
        self.bytes[_PROGRESS_AT + rank] = Progress.STARTED
        self.bytes[_IF_KILLED_AT + rank] = 0
        for at, size in ((_RUNS_AT, 8), (_MEMORY_AT, _MEMORY.size)):
            self.bytes[at + size * rank : at + size * (rank + 1)] = bytes(size)


@final
class FileRendezvous(Rendezvous):
    """A worker's use of the page: its own bytes, and a journal of `key=message` lines.

    Before the lines stand how often the journal was begun anew, and its length.
    """

    def __init__(self, fd: int, rank: int) -> None:
        """Raises: TeamError when the descriptor is no such page."""
        self.page = Page(fd)
        self._page = self.page.bytes
        self._rank = rank
        self._times_begun = 0
        self._length_read = 0
        self._messages: dict[str, str] = {}  # that were read and not asked for yet
        self._before = Progress.STARTED  # this run

    def next_run(self) -> int:
        """Count the runs of this process; for a new one, the first rank makes room for messages.

        By then everyone has read those of the runs before.
        """
        self._before = self.page.progress(self._rank)
        times_begun, length = self._journal()
        number = self.page.num_runs(self._rank) + 1
        if self._rank == FIRST_RANK and number > 1 and length > _JOURNAL_BYTES // 2:
            self._write_journal(times_begun + 1, 0)
        at = _RUNS_AT + 8 * self._rank
        self._page[at : at + 8] = number.to_bytes(8, "little")
        self.report(Progress.JOINING)
        return number

    def publish(self, key: str, message: str) -> None:
        """Append to the journal; only the first rank does, so nothing can collide.

        Raises: TeamError when the messages of one run are too long.
        """
        times_begun, length = self._journal()
        line = f"{key}={message}\n".encode()
        end = length + len(line)
        if end > _JOURNAL_BYTES:
            raise TeamError(
                f"the message {key!r} to the other workers has {len(line)} bytes, and {_JOURNAL_BYTES - length} are "
                "left. A spec of this size is a mistake: look at its lists of names."
            )
        self._page[_LINES_AT + length : _LINES_AT + end] = line
        self._write_journal(times_begun, end)

    def wait_for_message(self, key: str, what: str = DISTRIBUTE, timeout: float | None = None) -> str:
        """Look at what is new in the journal, a thousand times a second."""
        timeout = JOIN_TIMEOUT if timeout is None else timeout
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self._read_new()
            if key in self._messages:
                return self._messages.pop(key)
            time.sleep(0.001)
        raise TeamError(
            f"rank {self._rank} waited {timeout:.0f} s for rank 0 to {what}. "
            "Every worker must reach it; see the log of rank 0."
        )

    def store(self, key: str) -> Store:
        """Serve one from rank 0, whose workers are all on this machine."""
        from torch._C._distributed_c10d import TCPStore

        if self._rank == FIRST_RANK:
            store = serve_on_loopback(0)
            self.publish(key, str(store.port))
            return store
        timeout = timedelta(seconds=JOIN_TIMEOUT)
        return TCPStore(LOOPBACK, int(self.wait_for_message(key)), is_master=False, timeout=timeout)

    def address(self) -> str:
        """Return the loopback's: its workers are all on this machine."""
        return LOOPBACK

    def report(self, progress: Progress) -> None:
        """Write this rank's byte. After a further `distribute` it is as it was before: another run may go on."""
        self._page[_PROGRESS_AT + self._rank] = max(progress, self._before) if progress is Progress.JOINED else progress

    def report_if_killed(self, follows: IfKilled) -> None:
        """Write this rank's byte."""
        at = _IF_KILLED_AT + self._rank
        self._page[at] = max(self._page[at], follows)

    def show_memory(self, fd: int, disk_fd: int | None, capacity: int) -> None:
        """Write it down, of the first run: newcomers begin with it, and are let in nowhere else."""
        if self.page.num_runs(self._rank) == 1:
            at = _MEMORY_AT + _MEMORY.size * self._rank
            _MEMORY.pack_into(self._page, at, os.getpid(), fd, 0 if disk_fd is None else disk_fd + 1, capacity)

    def memories(self) -> list[tuple[str, str]]:
        """Return what was written down, of processes that may have ended."""
        return self.page.memories()

    def is_ending(self) -> bool:
        """Return whether the launcher has said so."""
        return self.page.is_ending()

    def _read_new(self) -> None:
        times_begun, length = self._journal()
        if times_begun != self._times_begun:
            self._times_begun, self._length_read = times_begun, 0
            self._messages.clear()
        lines = self._page[_LINES_AT + self._length_read : _LINES_AT + length]
        if self._journal()[0] != times_begun:  # they may have been overwritten in between
            return
        self._length_read = length
        for line in lines.decode().splitlines():
            key, _, message = line.partition("=")
            self._messages[key] = message

    def _journal(self) -> tuple[int, int]:
        """Return how often the journal was begun anew, and its length."""
        times_begun, length = _JOURNAL.unpack_from(self._page, _JOURNAL_AT)
        return times_begun, length

    def _write_journal(self, times_begun: int, length: int) -> None:
        _JOURNAL.pack_into(self._page, _JOURNAL_AT, times_begun, length)
