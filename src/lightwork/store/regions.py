"""The memories of a worker by region: the mapping that the workers of its host share, and its device's.

    board        the claims board
    mailboxes    of the transport
    masters      fp32 weights, once
    working      bf16 or fp16 weights, once (under fp32 the masters are the working weights)
    state        the optimizer's state, once
    buffers      the model's buffers: as the step starts, and what each micro-batch made of them
    partial sums each worker's slots, in which its micro-batches are folded

Which there are, how large, and which ranges of them lie in a file on disk is read from the table of holdings
(`spec/holdings`). The file is mapped over these ranges of the one mapping, so that a region stays one range of
addresses wherever its buckets lie. For a worker on a GPU, whose memory is its own, everything that computation reads
lies on the GPU, unless the plan offloads it; the board, mailboxes and flags stay with the host.

In a host's memory everything is a reservation: a page takes room when it is first written. So a slot that is never
needed, or the second half of a slot that holds a bf16 gradient, costs nothing. (On a GPU a unit takes room, see
`elements`.)
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import final

import torch

from lightwork.device.base import Device
from lightwork.errors import MemoryFull
from lightwork.spec.footprint import Region
from lightwork.spec.holdings import Home
from lightwork.store.elements import PAGE_BYTES, Elements, FlatElements, MixedElements, UnitElements, Units

_MAP_FIXED = 0x10


class Advice(IntEnum):
    """What is about to happen to pages of the mapping; Linux's numbers (madvise)."""

    FETCH = 3  #: they are read soon: begin
    DROP = 4  #: they are not used any more: unmap them here, the file keeps them
    REMOVE = 9  #: give their room back
    MAP_TO_WRITE = 23  #: map them now, all at once rather than one by one as they are touched


@dataclass(frozen=True)
class MemoryMap:
    """Where the regions lie in the mapping, page after page, and which of its ranges lie in a file."""

    regions: Mapping[str, Region]
    offsets: Mapping[str, int]  #: bytes, of the mapped ones
    num_bytes: int  #: of the mapping
    files: tuple[tuple[int, int, int], ...]  #: ranges that lie in the file: first byte, end, and the first in the file

    @property
    def disk_bytes(self) -> int:
        """The size of the file."""
        return sum(end - first for first, end, _ in self.files)


def map_regions(regions: Mapping[str, Region]) -> MemoryMap:
    """Return a map of the regions in their order, each beginning on a page."""
    offsets: dict[str, int] = {}
    files: list[tuple[int, int, int]] = []
    at = in_file = 0
    for name, region in regions.items():
        if not region.is_mapped:
            continue
        offsets[name] = at
        whole_pages = _up(max(region.num_bytes, 1))
        for first, end in region.on_disk:
            # Pages that belong to what stays in memory, too, stay there; none follows the end of the region.
            start, stop = at + _up(first), at + (whole_pages if end == region.num_bytes else end - end % PAGE_BYTES)
            if stop > start:
                files.append((start, stop, in_file))
                in_file += stop - start
        at += whole_pages
    return MemoryMap(dict(regions), offsets, at, tuple(files))


def _up(num_bytes: int) -> int:
    return -(-num_bytes // PAGE_BYTES) * PAGE_BYTES


class Regions:
    """The regions of a worker's memories, as tensors and memoryviews."""

    def __init__(
        self,
        buffer: mmap.mmap,
        memory_map: MemoryMap,
        device: Device,
        *,
        disk: int | None = None,
        units: Units | None = None,
    ) -> None:
        """`disk` is the descriptor of the file; `units` are how regions are cut on a device with a memory of its own.

        Raises: MemoryFull when the file can not be mapped.
        """
        self.device = device
        self.units = units
        self._map = memory_map
        self._buffer = buffer
        for first, end, in_file in memory_map.files:
            if disk is None:
                raise ValueError("there are regions on disk, and there is no file")
            _map_file(buffer, first, end, disk, in_file)
        self._bytes = torch.frombuffer(buffer, dtype=torch.uint8)
        self._on_device: dict[str, torch.Tensor] = {}  # flat ones, made when they are first asked for
        self._homes: dict[str, Elements] = {}
        self._here: dict[str, Elements] = {}

    def offset(self, name: str) -> int:
        """Return the first byte of a region in the mapping."""
        return self._map.offsets[name]

    def region(self, name: str) -> memoryview:
        """Return a region's bytes."""
        start = self._map.offsets[name]
        return memoryview(self._buffer)[start : start + self._map.regions[name].num_bytes]

    def tensor(
        self, name: str, dtype: torch.dtype = torch.uint8, offset: int = 0, numel: int | None = None
    ) -> torch.Tensor:
        """Return `numel` elements of a region from byte `offset` on (all that fit, unless given), flat."""
        region = self._map.regions[name]
        size = region.num_bytes - offset if numel is None else numel * dtype.itemsize
        if region.is_mapped:
            start = self._map.offsets[name] + offset
            return self._bytes[start : start + size].view(dtype)
        if name not in self._on_device:
            self._on_device[name] = torch.zeros(region.num_bytes, dtype=torch.uint8, device=self.device.place)
        return self._on_device[name][offset : offset + size].view(dtype)

    def homes(self, name: str) -> tuple[Home, ...]:
        """Return where a region in units has its homes, by bucket, then that of the rest; none for one all mapped."""
        return self._map.regions[name].homes

    def home(self, name: str, dtype: torch.dtype) -> Elements:
        """Return where a region that is laid out like the weights has its home."""
        if name not in self._homes:
            flat = self.flat(name, dtype) if self.is_mapped(name) else None
            self._homes[name] = self.new_home(name, self._of_all(dtype), flat) if self.in_units(name) else _there(flat)
        return self._homes[name]

    def here(self, name: str, dtype: torch.dtype) -> Elements:
        """Return where computation sees a region: at home or, offloaded from a device, in units that come and go."""
        if all(home is Home.HERE for home in self.homes(name)):
            return self.home(name, dtype)
        if name not in self._here:
            home, units = self.home(name, dtype), self.new_units(self._of_all(dtype))
            self._here[name] = self._mixed([home if h is Home.HERE else units for h in self.homes(name)])
        return self._here[name]

    def here_of_types(self, name: str, dtypes: Sequence[torch.dtype]) -> Elements:
        """Return the same in memory of its own, for parameters of these types; at home where there are no units."""
        return self._homes[name] if self.units is None else self.new_units(dtypes)

    def new_units(self, dtypes: Sequence[torch.dtype]) -> UnitElements:
        """Return new units of the device's memory, for parameters of these types."""
        return UnitElements(self._units(), dtypes, self.device.place)

    def new_home(self, name: str, dtypes: Sequence[torch.dtype], flat: FlatElements | None = None) -> Elements:
        """Return new memory in which a region in units has its home, for parameters of these types.

        `flat` is for what of it is mapped.
        """
        made: dict[Home, Elements] = {}
        for home in dict.fromkeys(self.homes(name)):
            if home is Home.DISK and flat is not None:
                made[home] = flat
            elif home is Home.HOST:
                made[home] = UnitElements(self._units(), dtypes, torch.device("cpu"), _Locker(self.device, name))
            else:
                made[home] = self.new_units(dtypes)
        return self._mixed([made[home] for home in self.homes(name)])

    def in_units(self, name: str) -> bool:
        """Return whether any bucket of a region is an allocation of its own, on a device or beside it."""
        return self._map.regions[name].in_units

    def is_mapped(self, name: str) -> bool:
        """Return whether a region, or a part of it, lies in the mapping."""
        return self._map.regions[name].is_mapped

    def flat(self, name: str, dtype: torch.dtype, first: int = 0, numel: int | None = None) -> FlatElements:
        """Return elements of a mapped region, `numel` from `first` on (all, unless given)."""
        offset = first * dtype.itemsize
        pages = Pages(self._buffer, self._map, name, offset)
        return FlatElements(self.tensor(name, dtype, offset, numel), pages)

    def _of_all(self, dtype: torch.dtype) -> list[torch.dtype]:
        return [dtype] * (len(self.units.layout.parameters) if self.units is not None else 0)

    def _mixed(self, by_bucket: Sequence[Elements]) -> Elements:
        first = by_bucket[0]
        return first if all(e is first for e in by_bucket) else MixedElements(self._units(), by_bucket)

    def _units(self) -> Units:
        if self.units is None:
            raise ValueError("a device's memory has units")
        return self.units


@final
class Pages:
    """The pages of a mapped region, by bytes from its start. Nothing happens where the system can not."""

    def __init__(self, buffer: mmap.mmap, memory_map: MemoryMap, name: str, offset: int) -> None:
        """Bytes count from `offset` in the region."""
        self._buffer = buffer
        start = memory_map.offsets[name]
        end = start + _up(memory_map.regions[name].num_bytes)
        self._files = [(first, stop) for first, stop, _ in memory_map.files if start <= first < end]
        self._start = start + offset

    def read_ahead(self, start: int, end: int) -> None:
        """Begin to read what of these bytes lies on disk."""
        for first, stop in self._on_disk(start, end):
            self._advise(first, stop, Advice.FETCH)

    def map_to_write(self, start: int, end: int) -> None:
        """Map these bytes, all at once rather than page by page."""
        self._advise(self._start + start, self._start + end, Advice.MAP_TO_WRITE)

    def unmap(self, start: int, end: int) -> None:
        """Unmap what of these bytes lies on disk, which keeps it."""
        for first, stop in self._on_disk(start, end):
            self._advise(first, stop, Advice.DROP)

    def release_room(self, start: int, end: int) -> None:
        """Give the room of these bytes back: in memory they read as zeros again, on disk they are unmapped."""
        at = self._start + start
        for first, stop in self._on_disk(start, end):
            self._advise(at, first, Advice.REMOVE)
            self._advise(first, stop, Advice.DROP)  # the file keeps its room: a full disk would be a bus error later
            at = stop
        self._advise(at, self._start + end, Advice.REMOVE)

    def _on_disk(self, start: int, end: int) -> Iterator[tuple[int, int]]:
        start, end = self._start + start, self._start + end
        for first, stop in self._files:
            if first < end and start < stop:
                yield max(first, start), min(stop, end)

    def _advise(self, start: int, end: int, advice: Advice) -> None:
        first, last = _up(start), end // PAGE_BYTES * PAGE_BYTES
        if last > first:
            with contextlib.suppress(OSError):  # not every system knows every advice
                self._buffer.madvise(advice, first, last - first)


def _there(flat: FlatElements | None) -> FlatElements:
    if flat is None:
        raise ValueError("a region is neither mapped nor in units")
    return flat


def _map_file(buffer: mmap.mmap, first: int, end: int, file: int, in_file: int) -> None:
    """Map a range of a file over a range of a mapping. (Python's mmap can not say where.)"""
    library = ctypes.CDLL(None, use_errno=True)
    library.mmap.restype = ctypes.c_void_p
    library.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, *3 * (ctypes.c_int,), ctypes.c_longlong)
    address = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) + first
    access = mmap.PROT_READ | mmap.PROT_WRITE
    found = library.mmap(address, end - first, access, mmap.MAP_SHARED | _MAP_FIXED, file, in_file)
    if found != address:
        raise MemoryFull(
            f"{end - first} bytes of a file on disk could not be mapped (error {ctypes.get_errno()}). Raise the limits "
            "on address space and mappings (`ulimit -v`, vm.max_map_count), or offload less."
        )


class _Locker:
    """Page-locks units of a region on the host for a device."""

    def __init__(self, device: Device, what: str) -> None:
        self._device = device
        self._what = what

    def taken(self, unit: torch.Tensor) -> None:
        self._device.lock(unit, self._what)

    def released(self, unit: torch.Tensor) -> None:
        self._device.unlock(unit)
