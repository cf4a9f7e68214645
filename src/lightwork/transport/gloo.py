"""Tensors between hosts by torch.distributed's point-to-point calls over Gloo: TCP, and no memory in common.

Point-to-point, because only our own code may add, and because Gloo's all-to-all is three times slower than the same
exchange made of sends and receives (67 MB between two processes: 173 against 51 ms, 2026-11).
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, final

import torch

from lightwork.errors import RankLost
from lightwork.transport.base import Carrier, Pending
from lightwork.transport.late import Lateness

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store, Work

#: How long a host may be silent. One that has died is noticed at once, by its closed connection.
SILENCE = timedelta(minutes=30)

#: How long one may be silent whose requests are awaited.
PATIENCE = timedelta(days=365)

#: Called with the rank that is waited for, and the seconds so far.
Late = Callable[[int, float], None]


class _Watcher:
    """Names the ranks that a thread of this process waits for, ten seconds after it began and then once a minute."""

    def __init__(self, late: Late) -> None:
        self._late = late
        self._waits: dict[int, tuple[int, float]] = {}  # by thread: for which rank, since when
        self._is_closed = threading.Event()
        threading.Thread(target=self._run, name="lightwork watcher", daemon=True).start()

    def begin(self, rank: int) -> None:
        self._waits[threading.get_ident()] = rank, time.monotonic()

    def end(self) -> None:
        self._waits.pop(threading.get_ident(), None)

    def close(self) -> None:
        self._is_closed.set()

    def _run(self) -> None:
        lateness = Lateness()
        while not self._is_closed.wait(1.0):
            now = time.monotonic()
            for rank, start in list(self._waits.values()):
                if lateness.is_due(rank, start, now):
                    self._late(rank, now - start)


@final
class _Work(Pending):
    def __init__(self, work: Work, tensor: torch.Tensor, rank: int, other: int, watcher: _Watcher | None) -> None:
        self._work = work
        self._tensor = tensor  # kept alive: the network reads or writes it
        self._rank = rank
        self._other = other
        self._watcher = watcher

    def wait(self) -> None:
        """Wait in the kernel, without holding Python's lock."""
        if self._watcher is not None:
            self._watcher.begin(self._other)
        try:
            self._work.wait()
        except RuntimeError as error:
            raise _lost(self._rank, self._other, error) from error
        finally:
            if self._watcher is not None:
                self._watcher.end()


@final
class GlooCarrier(Carrier):
    """Point-to-point messages of a process group of the hosts' leaders.

    Owns: the process group, which is no other code's default group.
    """

    def __init__(
        self,
        store: Store,
        host: int,
        leaders: list[int],
        address: str | None = None,
        silence: timedelta = SILENCE,
        late: Late | None = None,
    ) -> None:
        """`address` is this machine's, as the others reach it; None leaves it to Gloo (GLOO_SOCKET_IFNAME).

        `silence` is how long a host may be silent; `late` is told of those that are waited for before that.
        """
        # torch's type stubs leave out most of this class.
        from torch.distributed import ProcessGroupGloo as Gloo

        make: Any = Gloo
        super().__init__(host, leaders)
        options = make._Options()
        options._timeout = silence
        device = make.create_device(hostname=address) if address is not None else make.create_default_device()
        options._devices = [device]
        self._watcher = _Watcher(late) if late is not None else None
        self._group: Any = make(store, host, len(leaders), options)

    def send(self, host: int, tensor: torch.Tensor, tag: int) -> Pending:
        """Begin to send."""
        return self._begin("send", tensor, host, tag)

    def receive(self, host: int, tensor: torch.Tensor, tag: int) -> Pending:
        """Begin to receive."""
        return self._begin("recv", tensor, host, tag)

    def receive_from_any(self, tensor: torch.Tensor, tag: int) -> int:
        """Receive from whoever sends first."""
        work = self._open().recv_anysource([tensor], tag)
        try:
            work.wait()
        except RuntimeError as error:
            raise RankLost(
                f"rank {self.leaders[self.host]} lost its connections ({_reason(error)}). See the logs of the others."
            ) from error
        return int(work._source_rank())

    def close(self) -> None:
        """Close the connections: the others notice."""
        if self._watcher is not None:
            self._watcher.close()
        self._group = None

    def _open(self) -> Any:
        if self._group is None:
            raise RankLost(f"rank {self.leaders[self.host]} has closed its connections: its run was ended.")
        return self._group

    def _begin(self, call: str, tensor: torch.Tensor, host: int, tag: int) -> Pending:
        group = self._open()
        begin = group.send if call == "send" else group.recv
        try:
            work = begin([tensor], host, tag)
        except RuntimeError as error:
            raise _lost(self.leaders[self.host], self.leaders[host], error) from error
        return _Work(work, tensor, self.leaders[self.host], self.leaders[host], self._watcher)


def _lost(rank: int, other: int, error: RuntimeError) -> RankLost:
    return RankLost(
        f"rank {rank} lost its connection to rank {other} ({_reason(error)}). Its process ended, or the network "
        "between them did; see its log."
    )


def _reason(error: RuntimeError) -> str:
    """Return Gloo's reason, without its place in Gloo's source."""
    return re.sub(r"^\[\S*\] ", "", str(error)).partition(". ")[0]
