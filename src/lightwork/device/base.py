"""Where a worker computes: a CPU, whose memory is the host's, or a GPU with a memory of its own.

Work on a GPU is begun here and done later, in *queues* (CUDA's streams): that of computation, which is current in user
code, and those in which tensors come from the host, leave for it, and are exchanged with other workers. A *mark* is a
place in a queue, for which another queue, or the host, can wait.

    cpu         everything is done when the call returns; marks are None
    cuda        as said above
    rehearsal   what the engine does for a GPU (memory in units, staging, queues by name), with a CPU in its place: to
                try a plan where there is no GPU; its bits are the CPU's
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal

import torch

#: The queues beside that of computation.
Queue = Literal["in", "out", "exchange"]

#: A place in a queue; None where everything before it is done.
Mark = torch.cuda.Event | None


#: Applies a function to every tensor of a batch.
Walk = Callable[[Any, Callable[[torch.Tensor], torch.Tensor]], Any]


class Device(ABC):
    """What a worker computes on."""

    #: As torch names it.
    place: torch.device
    #: Whether computation sees a memory other than the host's.
    has_own_memory: bool
    #: Whether work is begun by a call and done later, so that the host would wait where it reads a value.
    is_late: bool

    @abstractmethod
    def queue(self, name: Queue) -> AbstractContextManager[None]:
        """Let what is begun inside run in another queue than computation."""

    @abstractmethod
    def mark(self) -> Mark:
        """Return where the current queue is."""

    @abstractmethod
    def wait_for_mark(self, mark: Mark) -> None:
        """Let what the current queue is given from now on begin when `mark` is reached."""

    @abstractmethod
    def synchronize(self, mark: Mark) -> None:
        """Return when `mark` is reached."""

    @abstractmethod
    def seed(self, value: int) -> None:
        """Seed its random numbers. The host's are `random`'s."""

    @abstractmethod
    def random_state(self) -> torch.Tensor | None:
        """Return the state of its random numbers, if they are not the host's."""

    @abstractmethod
    def set_random_state(self, state: torch.Tensor | None) -> None:
        """Put a state back."""

    @abstractmethod
    def host_buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return host memory that it reads and writes by itself, flat and without values."""

    @abstractmethod
    def lock(self, memory: torch.Tensor, what: str) -> None:
        """Let it read and write host memory by itself, without a copy by the CPU in between.

        Raises: MemoryFull when the host will not keep that much in place.
        """

    @abstractmethod
    def unlock(self, memory: torch.Tensor) -> None:
        """Let go of memory that was locked."""

    @abstractmethod
    def norms_squared(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the squared L2 norm of each, fp32; to be read later."""

    @abstractmethod
    def limit(self, num_bytes: int) -> None:
        """Take no more of its memory than this."""

    def is_here(self, tensor: torch.Tensor) -> bool:
        """Return whether computation can read a tensor."""
        return tensor.device.type == self.place.type

    def bring_batch(self, batch: Any, walk: Walk) -> Any:
        """Return a batch where computation can read it; what is there as it is."""
        return batch

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy of a tensor of the host, made in the current queue."""
        return tensor


class Backlog:
    """What a device has not done yet: bounds how far the host runs ahead of it."""

    def __init__(self, device: Device, limit: int) -> None:
        self._device = device
        self._limit = limit
        self._marks: deque[Mark] = deque()

    def add(self, mark: Mark) -> None:
        """Count one more piece of work, up to `mark`. Blocks: while there are too many."""
        self._marks.append(mark)
        while len(self._marks) > self._limit:
            self._device.synchronize(self._marks.popleft())

    def finish(self) -> None:
        """Wait for all."""
        while self._marks:
            self._device.synchronize(self._marks.popleft())
