"""The contract of a store: a fixed number of zeroed bytes at one address, and a way for others to open the same."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

BufferT = TypeVar("BufferT")


class Store(ABC, Generic[BufferT]):
    """A flat range of bytes, zero at first, that takes up room only where it was written.

    Owns: its bytes, until the last view of `buffer` is gone. There is no `close`: tensors outlive a run, and memory
    that a tensor still sees can not be unmapped. Nothing is left behind when every process that has it open is dead.
    """

    #: The bytes, as an object with Python's buffer protocol; the same object for the life of the store.
    buffer: BufferT

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """The size, fixed when the store was made."""

    @abstractmethod
    def address(self) -> str:
        """Return what another process passes to `open_store` to see the same bytes."""

    @abstractmethod
    def fileno(self) -> int | None:
        """Return the descriptor behind the store, for POSIX record locks; None where there is none."""

    @abstractmethod
    def published(self) -> None:
        """Say that every worker has it open: a store that needed a name until now gives it up."""
