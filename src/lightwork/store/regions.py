"""The map of the memory that the workers of a host share: what lies where.

    board        the claims board
    mailboxes    of the transport
    masters      fp32 weights, once
    working      bf16 weights, once (precision bf16; under fp32 the masters are the working weights)
    state        the optimizer's state, once
    buffers      the model's buffers: as the step starts, and what each micro-batch made of them
    partial sums each worker's slots, in which its micro-batches are folded

Masters, working weights, state and partial sums may lie in a file on disk instead, as the plan says. For a worker on a
GPU, whose memory is its own, everything that computation reads lies on the GPU, unless the plan offloads it to the host
or to disk; the board, mailboxes and flags stay with the host.

In a host's memory everything is a reservation: a page takes room when it is first written. So a slot that is never
needed, or the second half of a slot that holds a bf16 gradient, costs nothing. (On a GPU a unit takes room, see
`elements`.)
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import torch

from lightwork.device.base import Device
from lightwork.device.cpu import Cpu
from lightwork.spec.layout import Layout
from lightwork.store.elements import PAGE_BYTES, Elements, FlatElements, UnitElements, Units


class Advice(IntEnum):
    """What is about to happen to pages of a file; Linux's numbers (madvise)."""

    FETCH = 3  #: they are read soon: begin
    DROP = 4  #: they are not used any more: unmap them here, the file keeps them
    MAP_TO_WRITE = 23  #: map them now, all at once rather than one by one as they are touched


@dataclass
class MemoryMap:
    """Offsets of the regions in bytes, page after page; filled in before the memory is made.

    There are two memories: that of the host, and a file on disk, for the regions named in `on_disk`. For a worker with
    a device, those named in `on_device`, and in `beside_device` (in its own, page-locked memory of the host), take no
    room in either.
    """

    on_disk: frozenset[str] = frozenset()
    on_device: frozenset[str] = frozenset()
    beside_device: frozenset[str] = frozenset()
    num_bytes: int = 0  #: of the host's memory
    disk_bytes: int = 0
    offsets: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)

    def reserve(self, name: str, num_bytes: int) -> None:
        """Reserve a region that starts on a page."""
        whole_pages = -(-max(num_bytes, 1) // PAGE_BYTES) * PAGE_BYTES
        self.sizes[name] = num_bytes
        if name in self.on_device or name in self.beside_device:
            return
        if name in self.on_disk:
            self.offsets[name] = self.disk_bytes
            self.disk_bytes += whole_pages
        else:
            self.offsets[name] = self.num_bytes
            self.num_bytes += whole_pages


class SharedMemory:
    """The regions of a worker's memories, as tensors and memoryviews: mapped stores, and its device's memory."""

    def __init__(
        self,
        buffer: mmap.mmap,
        memory_map: MemoryMap,
        disk: mmap.mmap | None = None,
        device: Device | None = None,
        units: Units | None = None,
    ) -> None:
        """`units` are how regions are cut on a device with a memory of its own."""
        self.device = device or Cpu()
        self._map = memory_map
        self._buffers = (buffer, disk)
        self._bytes = [torch.frombuffer(b, dtype=torch.uint8) if b is not None else None for b in self._buffers]
        self.units = units
        self._on_device: dict[str, torch.Tensor] = {}  # flat ones, made when they are first asked for
        self._homes: dict[str, Elements] = {}
        self._here: dict[str, UnitElements] = {}

    def is_on_disk(self, name: str) -> bool:
        """Return whether a region lies in the file on disk."""
        return name in self._map.on_disk

    def is_on_device(self, name: str) -> bool:
        """Return whether a region lies in the device's own memory."""
        return name in self._map.on_device

    def in_units(self, name: str) -> bool:
        """Return whether a region takes room unit by unit, on a device or beside it."""
        return name in self._map.on_device or name in self._map.beside_device

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
        size = self._map.sizes[name] - offset if numel is None else numel * dtype.itemsize
        if name in self._map.on_device:
            if name not in self._on_device:
                self._on_device[name] = torch.zeros(self._map.sizes[name], dtype=torch.uint8, device=self.device.place)
            return self._on_device[name][offset : offset + size].view(dtype)
        start = self._map.offsets[name] + offset
        flat = self._bytes[self.is_on_disk(name)]
        if flat is None:
            raise ValueError(f"region {name} lies on disk, and there is no file")
        return flat[start : start + size].view(dtype)

    def home(self, name: str, dtype: torch.dtype) -> Elements:
        """Return where a region that is laid out like the weights lies."""
        if name not in self._homes:
            if self.in_units(name):
                self._homes[name] = self.units_of(name)([dtype] * len(self._layout_of_units().parameters))
            else:
                self._homes[name] = FlatElements(self.tensor(name, dtype))
        return self._homes[name]

    def here(self, name: str, dtype: torch.dtype) -> Elements:
        """Return where computation sees a region: at home or, offloaded from a device, in units that come and go."""
        if not self.device.has_own_memory or self.is_on_device(name):
            return self.home(name, dtype)
        if name not in self._here:
            self._here[name] = self.new_units([dtype] * len(self._layout_of_units().parameters))
        return self._here[name]

    def new_units(self, dtypes: Sequence[torch.dtype]) -> UnitElements:
        """Return new units of the device's memory, for parameters of these types."""
        return UnitElements(self._units(), dtypes, self.device.place)

    def units_of(self, name: str) -> Callable[[Sequence[torch.dtype]], UnitElements]:
        """Return what makes units of a region, for parameters of given types: on the device, or beside it."""
        if self.is_on_device(name):
            return self.new_units
        locker = _Locker(self.device, name)
        return lambda dtypes: UnitElements(self._units(), dtypes, torch.device("cpu"), locker)

    def _units(self) -> Units:
        if self.units is None:
            raise ValueError("a device's memory has units")
        return self.units

    def _layout_of_units(self) -> Layout:
        return self._units().layout

    def release_elements(self, name: str, start: int, end: int, itemsize: int) -> None:
        """Give back the room of elements `start` to `end` of a region that is laid out like the weights."""
        if self.in_units(name):
            self._homes[name].release(start, end)
        else:
            self.release(name, start * itemsize, end * itemsize)

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


class _Locker:
    """Page-locks units of a region on the host for a device."""

    def __init__(self, device: Device, what: str) -> None:
        self._device = device
        self._what = what

    def taken(self, unit: torch.Tensor) -> None:
        self._device.lock(unit, self._what)

    def released(self, unit: torch.Tensor) -> None:
        self._device.unlock(unit)
