"""Tensors between GPUs by NCCL's sends and receives, of GPUs that no two workers share.

NCCL knows no tags: of one sender and receiver, the n-th send meets the n-th receive. And a call may wait on the GPU
until the other side is there, so that what two workers give each other has to be begun as a group (`together`). The
engine's exchange does both: every host goes through the same turns.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, final

import torch

from lightwork.transport.base import Pending, PointToPoint

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store

#: After which NCCL's watchdog ends a process whose peer is silent. (One that has died is noticed by the Gloo carrier.)
SILENCE = timedelta(minutes=10)


@final
class _Work(Pending):
    """One call, or the group that it belongs to, which is begun later."""

    def __init__(self, work: Any = None) -> None:
        self.work = work

    def wait(self) -> None:
        """Let the current stream wait; the host goes on."""
        if self.work is None:
            raise ValueError("wait() comes after the group of calls is begun")
        self.work.wait()


@final
class NcclMessages(PointToPoint):
    """Tensors from GPU to GPU; tags are left out of account.

    Owns: the process group, which is no other code's default group.
    """

    def __init__(self, group: Any) -> None:
        """`group` is a ProcessGroupNCCL, or what behaves like one."""
        self._group: Any = group
        self._collected: list[tuple[str, torch.Tensor, int, _Work]] | None = None

    def send(self, host: int, tensor: torch.Tensor, tag: int) -> Pending:
        """Begin to send, after what the current stream was given before."""
        return self._begin("send", tensor, host)

    def receive(self, host: int, tensor: torch.Tensor, tag: int) -> Pending:
        """Begin to receive."""
        return self._begin("recv", tensor, host)

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Begin everything as one group when the block ends."""
        collected: list[tuple[str, torch.Tensor, int, _Work]] = []
        self._collected = collected
        try:
            yield
        finally:
            self._collected = None
        if collected:
            self._group._start_coalescing()
            for call, tensor, host, _ in collected:
                self._call(call, tensor, host)
            work = self._group._end_coalescing()
            for _, _, _, pending in collected:
                pending.work = work

    def close(self) -> None:
        """Let go of the group."""
        if self._group is not None:
            self._group.abort()
        self._group = None

    def _begin(self, call: str, tensor: torch.Tensor, host: int) -> Pending:
        if self._collected is not None:
            pending = _Work()
            self._collected.append((call, tensor, host, pending))
            return pending
        return _Work(self._call(call, tensor, host))

    def _call(self, call: str, tensor: torch.Tensor, host: int) -> Any:
        begin = self._group.send if call == "send" else self._group.recv
        return begin([tensor], host, 0)


def connect(store: Store, host: int, num_hosts: int, device: torch.device) -> NcclMessages:
    """Return the way to all others, who call this, too."""
    # Only in builds for GPUs.
    from torch.distributed import ProcessGroupNCCL

    options = ProcessGroupNCCL.Options()
    options._timeout = SILENCE
    group = ProcessGroupNCCL(store, host, num_hosts, options)
    group.eager_connect_single_device(device)
    return NcclMessages(group)
