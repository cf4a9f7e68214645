"""The map of the memory that the workers of a host share: what lies where.

    board        the claims board
    mailboxes    of the transport
    masters      fp32 weights, once
    working      bf16 weights, once (precision bf16; under fp32 the masters are the working weights)
    state        the optimizer's state, once
    buffers      the model's buffers: as the step starts, and what each micro-batch made of them
    partial sums each worker's slots, in which its micro-batches are folded

Masters, working weights, state and partial sums may lie in a file on disk instead, as the plan says.

Everything is a reservation: a page takes room when it is first written. So a slot that is never needed, or the second
half of a slot that holds a bf16 gradient, costs nothing.
"""

from __future__ import annotations

import contextlib
import mmap
from dataclasses import dataclass, field
from enum import IntEnum

import torch

PAGE_BYTES = mmap.PAGESIZE


class Advice(IntEnum):
    """What is about to happen to pages of a file; Linux's numbers (madvise)."""

    FETCH = 3  #: they are read soon: begin
    DROP = 4  #: they are not used any more: unmap them here, the file keeps them
    MAP_TO_WRITE = 23  #: map them now, all at once rather than one by one as they are touched


@dataclass
class MemoryMap:
    """Offsets of the regions in bytes, page after page; filled in before the memory is made.

    There are two memories: that of the host, and a file on disk, for the regions named in `on_disk`.
    """

    on_disk: frozenset[str] = frozenset()
    num_bytes: int = 0  #: of the host's memory
    disk_bytes: int = 0
    offsets: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def reserve(self, name: str, num_bytes: int) -> None:
        """Reserve a region that starts on a page."""
        whole_pages = -(-max(num_bytes, 1) // PAGE_BYTES) * PAGE_BYTES
        self.sizes[name] = num_bytes
        if name in self.on_disk:
            self.offsets[name] = self.disk_bytes
            self.disk_bytes += whole_pages
        else:
            self.offsets[name] = self.num_bytes
            self.num_bytes += whole_pages


class SharedMemory:
    """The regions of mapped stores as tensors and memoryviews."""

    def __init__(self, buffer: mmap.mmap, memory_map: MemoryMap, disk: mmap.mmap | None = None) -> None:
        self._map = memory_map
        self._buffers = (buffer, disk)
        self._bytes = [torch.frombuffer(b, dtype=torch.uint8) if b is not None else None for b in self._buffers]

    def is_on_disk(self, name: str) -> bool:
        """Return whether a region lies in the file on disk."""
        return name in self._map.on_disk

    def region(self, name: str) -> memoryview:
        """Return a region's bytes."""
        start = self._map.offsets[name]
        return memoryview(self._buffer(name))[start : start + self._map.sizes[name]]

    def release(self, name: str, start: int, end: int) -> None:
        """Give back the pages that lie within bytes `start` to `end` of a region: they read as zeros again."""
        with contextlib.suppress(AttributeError, OSError):  # not every system or file system can
            self._madvise(name, start, end, mmap.MADV_REMOVE)

    def advise(self, name: str, start: int, end: int, advice: Advice) -> None:
        """Tell the system what becomes of the pages within bytes `start` to `end` of a region on disk."""
        with contextlib.suppress(OSError):  # not every system knows every advice
            self._madvise(name, start, end, advice)

    def tensor(
        self, name: str, dtype: torch.dtype = torch.uint8, offset: int = 0, numel: int | None = None
    ) -> torch.Tensor:
        """Return `numel` elements of a region from byte `offset` on (all that fit, unless given), flat."""
        start = self._map.offsets[name] + offset
        size = self._map.sizes[name] - offset if numel is None else numel * dtype.itemsize
        flat = self._bytes[self.is_on_disk(name)]
        if flat is None:
            raise ValueError(f"region {name} lies on disk, and there is no file")
        return flat[start : start + size].view(dtype)

    def _buffer(self, name: str) -> mmap.mmap:
        buffer = self._buffers[self.is_on_disk(name)]
        if buffer is None:
            raise ValueError(f"region {name} lies on disk, and there is no file")
        return buffer

    def _madvise(self, name: str, start: int, end: int, advice: int) -> None:
        first = -(-(self._map.offsets[name] + start) // PAGE_BYTES) * PAGE_BYTES
        last = (self._map.offsets[name] + end) // PAGE_BYTES * PAGE_BYTES
        if last > first:
            self._buffer(name).madvise(advice, first, last - first)
