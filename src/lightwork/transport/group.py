"""Tensors between hosts by torch.distributed's point-to-point calls over Gloo: TCP, and no memory in common.

Point-to-point, because only our own code may add, and because Gloo's all-to-all is three times slower than the same
exchange made of sends and receives (67 MB between two processes: 173 against 51 ms, 2026-11).
"""

from __future__ import annotations

import re
from datetime import timedelta
from typing import TYPE_CHECKING, Any, final

import torch

from lightwork.errors import RankLost
from lightwork.transport.base import Carrier, Pending

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store, Work

#: How long a host may be silent. One that has died is noticed at once, by its closed connection.
SILENCE = timedelta(minutes=30)

#: ... that answers requests, which may be rare.
PATIENCE = timedelta(days=365)


@final
class _Work(Pending):
    def __init__(self, work: Work, tensor: torch.Tensor, rank: int, other: int) -> None:
        self._work = work
        self._tensor = tensor  # kept alive: the network reads or writes it
        self._rank = rank
        self._other = other

    def wait(self) -> None:
        """Wait in the kernel, without holding Python's lock."""
        try:
            self._work.wait()
        except RuntimeError as error:
            raise RankLost(
                f"rank {self._rank} lost its connection to rank {self._other} ({_reason(error)}). Its process ended, "
                "or the network between them did; see its log."
            ) from error


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
    ) -> None:
        """`address` is this machine's, as the others reach it; None leaves it to Gloo (GLOO_SOCKET_IFNAME).

        `silence` is how long a host may be silent.
        """
        # torch's type stubs leave out most of this class.
        from torch.distributed import ProcessGroupGloo as Gloo

        make: Any = Gloo
        super().__init__(host, leaders)
        options = make._Options()
        options._timeout = silence
        device = make.create_device(hostname=address) if address is not None else make.create_default_device()
        options._devices = [device]
        self._group: Any = make(store, host, len(leaders), options)

    def send(self, host: int, tensor: torch.Tensor, tag: int) -> Pending:
        """Begin to send."""
        return self._pending(self._open().send([tensor], host, tag), tensor, host)

    def receive(self, host: int, tensor: torch.Tensor, tag: int) -> Pending:
        """Begin to receive."""
        return self._pending(self._open().recv([tensor], host, tag), tensor, host)

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
        self._group = None

    def _open(self) -> Any:
        if self._group is None:
            raise RankLost(f"rank {self.leaders[self.host]} has closed its connections: its run was ended.")
        return self._group

    def _pending(self, work: Work, tensor: torch.Tensor, host: int) -> Pending:
        return _Work(work, tensor, self.leaders[self.host], self.leaders[host])


def _reason(error: RuntimeError) -> str:
    """Return Gloo's reason, without its place in Gloo's source."""
    return re.sub(r"^\[\S*\] ", "", str(error)).partition(". ")[0]
