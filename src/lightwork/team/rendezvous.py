"""How workers that share nothing yet find each other's memory: one small message from rank 0 to the others.

Two ways. `lightwork run` leaves its workers a descriptor of a one-page file (`FileRendezvous`); it also reads there
how far each of them got, which is how a script that never reached `distribute`, or left in the middle, gets its
name. Under torchrun, srun and mpirun the key-value store of torch.distributed serves (`StoreRendezvous`).
"""

from __future__ import annotations

import contextlib
import functools
import mmap
import os
import socket
import struct
import time
from abc import ABC, abstractmethod
from datetime import timedelta
from enum import IntEnum
from typing import TYPE_CHECKING, final

from lightwork.errors import TeamError
from lightwork.spec.roster import FIRST_RANK
from lightwork.team.environment import Environment
from lightwork.team.meeting_point import JOIN_TIMEOUT, LOOPBACK, connect, serve_on_loopback

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

_JOURNAL = struct.Struct("<qq")

#: Of a worker: its process, and its descriptors of its first run's memory and, less 1, of that on disk.
_MEMORY = struct.Struct("<qqq")

#: What workers do that wait for rank 0's message of a run.
_DISTRIBUTE = "call lightwork.distribute"

#: The first bytes of a page, so that another file is not taken for one.
_MAGIC = b"lightwork rendezvous page"

_MAX_WORKERS = 4096

#: Of a worker's runs, once there are any: all go on without it, or some do not.
_IS_ELASTIC, _RIGID = 1, 2
_PROGRESS_AT = 64
_ELASTIC_AT = _PROGRESS_AT + _MAX_WORKERS
_RUNS_AT = _ELASTIC_AT + _MAX_WORKERS
_MEMORY_AT = _RUNS_AT + 8 * _MAX_WORKERS
_JOURNAL_AT = _MEMORY_AT + _MEMORY.size * _MAX_WORKERS
_JOURNAL_BYTES = 16 * 1024 * 1024  # takes up what was written; a message is about 1 KiB
_LINES_AT = _JOURNAL_AT + 16
_PAGE_BYTES = _LINES_AT + _JOURNAL_BYTES


class Progress(IntEnum):
    """How far a worker got. It moves forward, but for further runs and loops: these begin at JOINING and TRAINING."""

    STARTED = 0  #: the process runs
    JOINING = 1  #: it is inside `distribute`, which needs all others
    JOINED = 2  #: the first `distribute` has returned
    TRAINING = 3  #: it is inside `run.steps`
    BETWEEN = 4  #: it has left `run.steps`, or has not entered it again


class Rendezvous(ABC):
    """Rank 0 publishes, everyone waits. Keys are used once."""

    num_firsts = 0  #: the times that this worker came to `with lightwork.first()`

    def next_first(self) -> int:
        """Return a number for a `with lightwork.first()`: the same on every worker, as they make the same calls."""
        self.num_firsts += 1
        return self.num_firsts

    def comes_first(self, key: str) -> bool:
        """Return whether this worker is the first that asks for `key`; where all are on rank 0's machine, False."""
        return False

    @abstractmethod
    def next_run(self) -> int:
        """Return a number for a new run of this team: the same on every worker, as they make the same calls."""

    @abstractmethod
    def publish(self, key: str, message: str) -> None:
        """Make `message` known under `key`."""

    @abstractmethod
    def wait_for_message(self, key: str, what: str = _DISTRIBUTE, timeout: float | None = None) -> str:
        """Return the message under `key`, which comes when a worker has done `what`.

        Blocks: until it is published, at most `timeout` seconds, or `JOIN_TIMEOUT`.
        Raises: TeamError after them.
        """

    @abstractmethod
    def store(self, key: str) -> Store:
        """Return a key-value store of torch.distributed that all workers who ask for `key` share.

        Blocks: until rank 0 has asked.
        """

    @abstractmethod
    def address(self) -> str | None:
        """Return this machine's address as the other hosts reach it; None leaves it to torch.distributed."""

    @abstractmethod
    def report(self, progress: Progress) -> None:
        """Tell the launcher how far this worker got, where there is one that looks."""

    def report_elastic(self, *, elastic: bool) -> None:  # noqa: B027  # other launchers do not look
        """Tell the launcher whether the others of a run that was joined go on if this worker is killed."""

    def show_memory(self, fd: int, disk_fd: int | None) -> None:  # noqa: B027  # ... and nobody joins later
        """Tell newcomers under which descriptors this process has the memory of its run, and its file on disk."""

    def memories(self) -> list[tuple[str, str]]:
        """Return where workers have it: a path of memory, and of the file on disk, empty where there is none."""
        return []


@final
class FileRendezvous(Rendezvous):
    """A page inherited from `lightwork run`.

    It holds two bytes (progress, and whether its runs go on without it), a count of runs and where it has its memory
    for each rank, then a journal of `key=message` lines, with a count of how often it was begun anew and its length.
    """

    def __init__(self, fd: int, rank: int) -> None:
        """Raises: TeamError when the descriptor is no such page."""
        try:
            self._page = mmap.mmap(fd, _PAGE_BYTES)
            is_page = self._page[: len(_MAGIC)] == _MAGIC
        except (OSError, ValueError):
            is_page = False
        if not is_page:
            raise TeamError(
                f"descriptor {fd} (LIGHTWORK_RENDEZVOUS_FD) is not the page that lightwork run leaves to its workers: "
                "it was closed, or is another file. Leave a worker's descriptors open, or unset the variable for a "
                "team of one."
            )
        self._rank = rank
        self._times_begun = 0
        self._length_read = 0
        self._messages: dict[str, str] = {}  # that were read and not asked for yet
        self._before = Progress.STARTED  # this run

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

    def next_run(self) -> int:
        """Count the runs of this process; for a new one, the first rank makes room for messages.

        By then everyone has read those of the runs before.
        """
        self._before = self.progress(self._rank)
        times_begun, length = self._journal()
        number = self.num_runs(self._rank) + 1
        if self._rank == FIRST_RANK and number > 1 and length > _JOURNAL_BYTES // 2:
            self._write_journal(times_begun + 1, 0)
        at = _RUNS_AT + 8 * self._rank
        self._page[at : at + 8] = number.to_bytes(8, "little")
        self.report(Progress.JOINING)
        return number

    def num_runs(self, rank: int) -> int:
        """Return how many runs `rank` has begun to join."""
        at = _RUNS_AT + 8 * rank
        return int.from_bytes(self._page[at : at + 8], "little")

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

    def wait_for_message(self, key: str, what: str = _DISTRIBUTE, timeout: float | None = None) -> str:
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

    def progress(self, rank: int) -> Progress:
        """Return how far `rank` got."""
        return Progress(self._page[_PROGRESS_AT + rank])

    def report_elastic(self, *, elastic: bool) -> None:
        """Write this rank's byte: of several runs all must go on."""
        at = _ELASTIC_AT + self._rank
        self._page[at] = _RIGID if not elastic or self._page[at] == _RIGID else _IS_ELASTIC

    def is_elastic(self, rank: int) -> bool:
        """Return whether the runs that `rank` has joined go on without it."""
        return self._page[_ELASTIC_AT + rank] == _IS_ELASTIC

    def show_memory(self, fd: int, disk_fd: int | None) -> None:
        """Write it down, of the first run: newcomers begin with it, and are let in nowhere else."""
        if self.num_runs(self._rank) == 1:
            at = _MEMORY_AT + _MEMORY.size * self._rank
            _MEMORY.pack_into(self._page, at, os.getpid(), fd, 0 if disk_fd is None else disk_fd + 1)

    def memories(self) -> list[tuple[str, str]]:
        """Return what was written down, of processes that may have ended."""
        found = []
        for rank in range(_MAX_WORKERS):
            pid, fd, disk_fd = _MEMORY.unpack_from(self._page, _MEMORY_AT + _MEMORY.size * rank)
            if pid:
                folder = f"/proc/{pid}/fd"
                found.append((f"{folder}/{fd}", f"{folder}/{disk_fd - 1}" if disk_fd > 0 else ""))
        return found

    def clear(self, rank: int) -> None:
        """Forget all of `rank`, whose process has ended: another one takes its place."""
        self._page[_PROGRESS_AT + rank] = Progress.STARTED
        self._page[_ELASTIC_AT + rank] = 0
        for at, size in ((_RUNS_AT, 8), (_MEMORY_AT, _MEMORY.size)):
            self._page[at + size * rank : at + size * (rank + 1)] = bytes(size)

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


@final
class StoreRendezvous(Rendezvous):
    """The key-value store that torchrun's agent serves, or that rank 0 serves under srun and mpirun."""

    def __init__(self, environment: Environment) -> None:

        if environment.port is None:
            raise TeamError(
                "rank and world size are set, but MASTER_ADDR and MASTER_PORT are not, and the launcher does not name "
                "the job, so the workers can not find each other. Set both, the port differently for each job of a "
                "machine, or start with lightwork run or torchrun."
            )
        self._rank = environment.rank
        self._interface = environment.interface
        address = environment.address or LOOPBACK
        serves = environment.rank == FIRST_RANK and not environment.store_is_served
        if serves and address in (LOOPBACK, "localhost"):
            self._store = serve_on_loopback(environment.port)
        else:
            self._store = connect(address, environment.port, serves=serves)
        self._prefix = f"lightwork/{environment.job}/{environment.attempt}/"

    def comes_first(self, key: str) -> bool:
        """Count in the store."""
        return int(self._store.add(f"{self._prefix}number of {key}", 1)) == 1

    def next_run(self) -> int:
        """Count in the store."""
        return int(self._store.add(f"{self._prefix}runs of {self._rank}", 1))

    def publish(self, key: str, message: str) -> None:
        """Set the key in the store."""
        self._store.set(self._prefix + key, message)

    def wait_for_message(self, key: str, what: str = _DISTRIBUTE, timeout: float | None = None) -> str:
        """Get the key from the store."""
        timeout = JOIN_TIMEOUT if timeout is None else timeout
        try:
            self._store.wait([self._prefix + key], timedelta(seconds=timeout))
            return bytes(self._store.get(self._prefix + key)).decode()
        except Exception as error:
            raise TeamError(
                f"rank {self._rank} waited {timeout:.0f} s for rank 0 to {what} ({error}). Every worker must reach it."
            ) from error

    def store(self, key: str) -> Store:
        """Return a part of the store."""
        from torch._C._distributed_c10d import PrefixStore

        return PrefixStore(f"{self._prefix}{key}/", self._store)

    def address(self) -> str | None:
        """Return the address from which the store is reached, unless Gloo was told its interface."""
        if self._interface is not None:
            return None
        with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((self._store.host, self._store.port))  # sends nothing, and chooses a route
            return str(probe.getsockname()[0])
        return None

    def report(self, progress: Progress) -> None:
        """Do nothing: these launchers look at exit statuses only."""


@final
class SoloRendezvous(Rendezvous):
    """A team of one: the messages stay here."""

    def __init__(self) -> None:
        self._messages: dict[str, str] = {}

    def next_run(self) -> int:
        """Return 0: its messages are nobody else's."""
        return 0

    def publish(self, key: str, message: str) -> None:
        """Keep the message."""
        self._messages[key] = message

    def wait_for_message(self, key: str, what: str = _DISTRIBUTE, timeout: float | None = None) -> str:
        """Return the kept message."""
        return self._messages[key]

    def store(self, key: str) -> Store:
        """Return one of this process's own."""
        from torch._C._distributed_c10d import HashStore

        return HashStore()

    def address(self) -> str:
        """Return the loopback's."""
        return LOOPBACK

    def report(self, progress: Progress) -> None:
        """Do nothing: nobody looks."""


def find(environment: Environment) -> Rendezvous:
    """Return the rendezvous that this worker's launcher offers: one for all that this process asks for."""
    if environment.world_size == 1 and environment.rendezvous_fd is None:
        return SoloRendezvous()
    return _found(environment, os.getpid())


@functools.lru_cache(maxsize=1)
def _found(environment: Environment, pid: int) -> Rendezvous:
    if environment.rendezvous_fd is not None:
        return FileRendezvous(environment.rendezvous_fd, environment.rank)
    return StoreRendezvous(environment)
