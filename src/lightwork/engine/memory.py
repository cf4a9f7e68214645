"""The map of the memory that the workers of a host share: what lies where.

    board        the claims board
    mailboxes    of the transport
    masters      fp32 weights, once
    working      bf16 weights, once (precision bf16; under fp32 the masters are the working weights)
    state        the optimizer's state, once
    buffers      the model's buffers: as the step starts, and what each micro-batch made of them
    partial sums each worker's slots, in which its micro-batches are folded

Everything is a reservation: a page takes room when it is first written. So a slot that is never needed, or the second
half of a slot that holds a bf16 gradient, costs nothing.
"""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field

import torch

PAGE_BYTES = mmap.PAGESIZE


@dataclass
class MemoryMap:
    """Offsets of the regions in bytes, page after page; filled in before the memory is made."""

    num_bytes: int = 0
    offsets: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def reserve(self, name: str, num_bytes: int) -> None:
        """Reserve a region that starts on a page."""
        self.offsets[name] = self.num_bytes
        self.sizes[name] = num_bytes
        self.num_bytes += -(-max(num_bytes, 1) // PAGE_BYTES) * PAGE_BYTES


class SharedMemory:
    """The regions of a mapped store as tensors and memoryviews."""

    def __init__(self, buffer: mmap.mmap, memory_map: MemoryMap) -> None:
        self._bytes = torch.frombuffer(buffer, dtype=torch.uint8)
        self._view = memoryview(buffer)
        self._map = memory_map

    def region(self, name: str) -> memoryview:
        """Return a region's bytes."""
        start = self._map.offsets[name]
        return self._view[start : start + self._map.sizes[name]]

    def tensor(
        self, name: str, dtype: torch.dtype = torch.uint8, offset: int = 0, numel: int | None = None
    ) -> torch.Tensor:
        """Return `numel` elements of a region from byte `offset` on (all that fit, unless given), flat."""
        start = self._map.offsets[name] + offset
        size = self._map.sizes[name] - offset if numel is None else numel * dtype.itemsize
        return self._bytes[start : start + size].view(dtype)
