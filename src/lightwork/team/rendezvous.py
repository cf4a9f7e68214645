"""How workers that share nothing yet find each other's memory: one small message from rank 0 to the others.

Two ways. `lightwork run` leaves its workers a descriptor of a one-page file (`FileRendezvous`); it also reads there
how far each of them got, which is how a script that never reached `distribute`, or left in the middle, gets its
name. Under torchrun, srun and mpirun the key-value store of torch.distributed serves (`StoreRendezvous`).
"""

from __future__ import annotations

import socket
from abc import ABC, abstractmethod
from datetime import timedelta
from enum import IntEnum
from typing import TYPE_CHECKING, final

import psutil

from lightwork.errors import TeamError
from lightwork.spec.roster import FIRST_RANK
from lightwork.team.environment import Environment
from lightwork.team.meeting_point import JOIN_TIMEOUT, LOOPBACK, connect, serve_on_loopback

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

#: What workers do that wait for rank 0's message of a run.
DISTRIBUTE = "call lightwork.distribute"


class Progress(IntEnum):
    """How far a worker got. It moves forward, but for further runs and loops: these begin at JOINING and TRAINING."""

    STARTED = 0  #: the process runs
    JOINING = 1  #: it is inside `distribute`, which needs all others
    JOINED = 2  #: the first `distribute` has returned
    TRAINING = 3  #: it is inside `run.steps`
    BETWEEN = 4  #: it has left `run.steps`, or has not entered it again
    RETIRED = 5  #: it has left the team, as it was told
    TURNED_AWAY = 6  #: it was let into the team, and could not be in it


class IfKilled(IntEnum):
    """What becomes of a worker's runs if it is killed. Of several runs the worst of these counts."""

    UNKNOWN = 0  #: there is no run yet
    REPLACED = 1  #: the others go on, and another process can come to its place
    DONE_WITHOUT = 2  #: the others go on
    BEGUN_AGAIN = 3  #: the others do not; another team can go on from the last checkpoint
    ENDED = 4  #: the others do not

    @property
    def goes_on(self) -> bool:
        """Whether the others do."""
        return self in (IfKilled.REPLACED, IfKilled.DONE_WITHOUT)


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
    def wait_for_message(self, key: str, what: str = DISTRIBUTE, timeout: float | None = None) -> str:
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
    def address(self) -> str:
        """Return this machine's address as the other hosts reach it.

        Raises: TeamError when it has none.
        """

    @abstractmethod
    def report(self, progress: Progress) -> None:
        """Tell the launcher how far this worker got, where there is one that looks."""

    def report_if_killed(self, follows: IfKilled) -> None:  # noqa: B027  # other launchers do not look
        """Tell the launcher what becomes of a run that was joined if this worker is killed."""

    def show_memory(self, fd: int, disk_fd: int | None, capacity: int) -> None:  # noqa: B027  # ... and nobody joins later
        """Tell newcomers under which descriptors this process has the memory of its run, and its file on disk."""

    def memories(self) -> list[tuple[str, str]]:
        """Return where workers have it: a path of memory, and of the file on disk, empty where there is none."""
        return []

    def is_ending(self) -> bool:
        """Return whether SIGTERM ends the whole team, and not one worker's part in it."""
        return True


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

    def wait_for_message(self, key: str, what: str = DISTRIBUTE, timeout: float | None = None) -> str:
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

    def address(self) -> str:
        """Return the address of the interface that was named, or that from which the store is reached."""
        if self._interface is not None:
            return _address_of(self._interface)
        reason = ""
        for family, kind, protocol, _, place in socket.getaddrinfo(
            self._store.host, self._store.port, type=socket.SOCK_DGRAM
        ):
            try:
                with socket.socket(family, kind, protocol) as probe:
                    probe.connect(place)  # sends nothing, and chooses a route
                    return str(probe.getsockname()[0])
            except OSError as error:
                reason = error.strerror or str(error)
        raise TeamError(
            f"this machine has no way to {self._store.host} ({reason}). Name the network that the hosts share: "
            "GLOO_SOCKET_IFNAME=eth0, say."
        )

    def report(self, progress: Progress) -> None:
        """Do nothing: these launchers look at exit statuses only."""


def _address_of(interface: str) -> str:
    """Return the address of a network interface of this machine, one of version 4 if it has any."""
    found = psutil.net_if_addrs()
    of_versions = [
        [one.address for one in found.get(interface, ()) if one.family is family]
        for family in (socket.AF_INET, socket.AF_INET6)
    ]
    addresses = [address for of_version in of_versions for address in of_version]
    if not addresses:
        raise TeamError(
            f"GLOO_SOCKET_IFNAME={interface} is no network of this machine that has an address. It has "
            f"{', '.join(sorted(found))}."
        )
    return str(addresses[0])


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

    def wait_for_message(self, key: str, what: str = DISTRIBUTE, timeout: float | None = None) -> str:
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
