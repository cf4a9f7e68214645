"""A CPU, whose memory is the host's: everything is done when a call returns. And the rehearsal of a GPU on it."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import Any, final

import torch

from lightwork.device.base import Device, Mark, Queue, Walk


class Cpu(Device):
    """The host itself."""

    place = torch.device("cpu")
    has_own_memory = False
    is_late = False

    def queue(self, name: Queue) -> AbstractContextManager[None]:
        """Change nothing: calls are done when they return."""
        return contextlib.nullcontext()

    def mark(self) -> Mark:
        """Return None."""
        return None

    def wait_for_mark(self, mark: Mark) -> None:
        """Return."""

    def synchronize(self, mark: Mark) -> None:
        """Return."""

    def seed(self, value: int) -> None:
        """Do nothing: its random numbers are the host's."""

    def random_state(self) -> torch.Tensor | None:
        """Return None."""
        return None

    def set_random_state(self, state: torch.Tensor | None) -> None:
        """Do nothing."""

    def host_buffer(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Return memory."""
        return torch.empty(numel, dtype=dtype)

    def lock(self, memory: torch.Tensor, what: str) -> None:
        """Do nothing."""

    def unlock(self, memory: torch.Tensor) -> None:
        """Do nothing."""

    def norms_squared(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return dot products: the fastest on a CPU (see the lab log)."""
        return [torch.dot(tensor, tensor) for tensor in tensors]

    def limit(self, num_bytes: int) -> None:
        """Do nothing."""


@final
class Rehearsal(Cpu):
    """A CPU in a GPU's place."""

    #: The CPU, under a name by which tests tell what lies in which memory.
    place = torch.device("cpu", 0)
    has_own_memory = True
    is_late = True  #: as a GPU, so that the engine takes the same ways

    def bring_batch(self, batch: Any, walk: Walk) -> Any:
        """Copy it, as if there were two memories."""
        return walk(batch, self.copied)

    def copied(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy."""
        return tensor.clone()
