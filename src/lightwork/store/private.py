"""A store of one process: the fake beside the real ones, for workers that are threads."""

from __future__ import annotations

import mmap
from typing import final

from lightwork.store.base import Store


@final
class PrivateStore(Store[mmap.mmap]):
    """Anonymous private memory. Other processes can not open it."""

    def __init__(self, num_bytes: int) -> None:
        self.buffer = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

    @property
    def num_bytes(self) -> int:
        """The size."""
        return len(self.buffer)

    def address(self) -> str:
        """Return an address that says why it can not be opened."""
        return "private:"

    def fileno(self) -> int | None:
        """Return None: threads lock with a mutex."""
        return None

    def published(self) -> None:
        """Do nothing: it has no name."""
