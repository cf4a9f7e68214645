"""How workers that share nothing yet find each other's memory: one small message from rank 0 to the others.

Two ways. `lightwork run` leaves its workers a descriptor of a one-page file (`FileRendezvous`); it also reads there
how far each of them got, which is how a script that never reached `distribute`, or left in the middle, gets its
name. Under torchrun, srun and mpirun the key-value store of torch.distributed serves (`StoreRendezvous`).
"""

from __future__ import annotations

import contextlib
import mmap
import os
import socket
import time
from abc import ABC, abstractmethod
from datetime import timedelta
from enum import IntEnum
from typing import TYPE_CHECKING, final

from lightwork.errors import TeamError
from lightwork.team.environment import Environment

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

#: Seconds that a worker waits for rank 0 before it says so and gives up.
JOIN_TIMEOUT = 300.0

_MAX_WORKERS = 4096
_RUNS_AT = _MAX_WORKERS
_MESSAGE_AT = _RUNS_AT + 8 * _MAX_WORKERS
_PAGE_BYTES = _MESSAGE_AT + 16 * 1024 * 1024  # takes up what was written; a message is about 1 KiB


class Progress(IntEnum):
    """How far a worker got; it moves forward only."""

    STARTED = 0  #: the process runs
    JOINING = 1  #: it is inside the first `distribute`, which needs all others
    JOINED = 2  #: `distribute` has returned
    TRAINING = 3  #: it is inside `run.steps`
    BETWEEN = 4  #: it has left `run.steps`, or has not entered it again


class Rendezvous(ABC):
    """Rank 0 publishes, everyone waits. Keys are used once."""

    @abstractmethod
    def next_run(self) -> int:
        """Return a number for a new run of this team: the same on every worker, as they make the same calls."""

    @abstractmethod
    def publish(self, key: str, message: str) -> None:
        """Make `message` known under `key`."""

    @abstractmethod
    def wait(self, key: str) -> str:
        """Return the message under `key`. Blocks: until it is published, at most `JOIN_TIMEOUT` seconds."""

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


@final
class FileRendezvous(Rendezvous):
    """A page inherited from `lightwork run`.

    It holds a byte of progress and a count of runs for each rank, then a journal of `key=message` lines.
    """

    def __init__(self, fd: int, rank: int) -> None:
        self._page = mmap.mmap(fd, _PAGE_BYTES)
        self._rank = rank

    @classmethod
    def create(cls) -> int:
        """Return a descriptor of a new, empty page, for `lightwork run` to leave to its workers."""
        try:
            fd = os.memfd_create("lightwork-rendezvous", 0)
        except AttributeError:  # no anonymous memory files on this system
            import tempfile

            fd, path = tempfile.mkstemp(prefix="lightwork-rendezvous-")
            os.unlink(path)
        os.set_inheritable(fd, True)
        os.ftruncate(fd, _PAGE_BYTES)
        return fd

    def next_run(self) -> int:
        """Count the runs of this process."""
        if self.progress(self._rank) is Progress.STARTED:
            self.report(Progress.JOINING)
        at = _RUNS_AT + 8 * self._rank
        number = int.from_bytes(self._page[at : at + 8], "little") + 1
        self._page[at : at + 8] = number.to_bytes(8, "little")
        return number

    def publish(self, key: str, message: str) -> None:
        """Append to the journal; only rank 0 does, so nothing can collide."""
        journal = self._journal()
        line = f"{key}={message}\n".encode()
        end = _MESSAGE_AT + 8 + len(journal)
        self._page[end : end + len(line)] = line
        self._page[_MESSAGE_AT : _MESSAGE_AT + 8] = (len(journal) + len(line)).to_bytes(8, "little")

    def wait(self, key: str) -> str:
        """Poll the journal, a thousand times a second."""
        deadline = time.monotonic() + JOIN_TIMEOUT
        while time.monotonic() < deadline:
            for line in self._journal().decode().splitlines():
                name, _, message = line.partition("=")
                if name == key:
                    return message
            time.sleep(0.001)
        raise TeamError(
            f"rank {self._rank} waited {JOIN_TIMEOUT:.0f} s for rank 0 to call lightwork.distribute. "
            "Every worker must reach it; see the log of rank 0."
        )

    def store(self, key: str) -> Store:
        """Serve one from rank 0, whose workers are all on this machine."""
        from torch._C._distributed_c10d import TCPStore

        timeout = timedelta(seconds=JOIN_TIMEOUT)
        if self._rank == 0:
            store = TCPStore("127.0.0.1", 0, is_master=True, timeout=timeout, wait_for_workers=False)
            self.publish(key, str(store.port))
            return store
        return TCPStore("127.0.0.1", int(self.wait(key)), is_master=False, timeout=timeout)

    def address(self) -> str:
        """Return the loopback's: its workers are all on this machine."""
        return "127.0.0.1"

    def report(self, progress: Progress) -> None:
        """Write this rank's byte."""
        self._page[self._rank] = int(progress)

    def progress(self, rank: int) -> Progress:
        """Return how far `rank` got."""
        return Progress(self._page[rank])

    def _journal(self) -> bytes:
        length = int.from_bytes(self._page[_MESSAGE_AT : _MESSAGE_AT + 8], "little")
        return self._page[_MESSAGE_AT + 8 : _MESSAGE_AT + 8 + length]


@final
class StoreRendezvous(Rendezvous):
    """The key-value store that torchrun's agent serves, or that rank 0 serves under srun and mpirun."""

    def __init__(self, environment: Environment) -> None:
        from torch._C._distributed_c10d import TCPStore

        if environment.port is None:
            raise TeamError(
                "rank and world size are set, but MASTER_ADDR and MASTER_PORT are not, so the workers can not find "
                "each other. Set both, or start with lightwork run or torchrun."
            )
        self._rank = environment.rank
        self._interface = environment.interface
        self._store = TCPStore(
            environment.address or "127.0.0.1",
            environment.port,
            is_master=environment.rank == 0 and not environment.store_is_served,
            timeout=timedelta(seconds=JOIN_TIMEOUT),
            wait_for_workers=False,
        )
        self._prefix = f"lightwork/{environment.attempt}/"

    def next_run(self) -> int:
        """Count in the store."""
        return int(self._store.add(f"{self._prefix}runs of {self._rank}", 1))

    def publish(self, key: str, message: str) -> None:
        """Set the key in the store."""
        self._store.set(self._prefix + key, message)

    def wait(self, key: str) -> str:
        """Get the key from the store."""
        try:
            return bytes(self._store.get(self._prefix + key)).decode()
        except Exception as error:
            raise TeamError(
                f"rank {self._rank} waited {JOIN_TIMEOUT:.0f} s for rank 0 to call lightwork.distribute ({error}). "
                "Every worker must reach it."
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

    def wait(self, key: str) -> str:
        """Return the kept message."""
        return self._messages[key]

    def store(self, key: str) -> Store:
        """Return one of this process's own."""
        from torch._C._distributed_c10d import HashStore

        return HashStore()

    def address(self) -> str:
        """Return the loopback's."""
        return "127.0.0.1"

    def report(self, progress: Progress) -> None:
        """Do nothing: nobody looks."""


def find(environment: Environment) -> Rendezvous:
    """Return the rendezvous that this worker's launcher offers."""
    if environment.world_size == 1 and environment.rendezvous_fd is None:
        return SoloRendezvous()
    if environment.rendezvous_fd is not None:
        return FileRendezvous(environment.rendezvous_fd, environment.rank)
    return StoreRendezvous(environment)
