"""Regions that are laid out like the weights, element by element: where a tensor over some of them comes from.

In a host's memory a region is one flat mapping, whose pages take room when they are first written. A device's memory
has no such pages. There a region is made of *units*, each an allocation of its own: those of a bucket, which on a
device holds whole parameters, or of one frozen parameter. A unit takes room from when it is first asked for until it is
released; tensors that lie in it stay valid, and see the new memory when it comes back.
"""

from __future__ import annotations

import bisect
import mmap
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Protocol, final

import torch

from lightwork.spec.layout import ALIGNMENT, Layout

PAGE_BYTES = mmap.PAGESIZE


class Elements(ABC):
    """The elements of a layout in one region."""

    @abstractmethod
    def view(self, start: int, end: int) -> torch.Tensor:
        """Return elements `start` to `end`, flat: of one parameter, or of neighbours of one bucket and type."""

    def alone(self, start: int, end: int) -> torch.Tensor:
        """Return the same for as long as it stays there, in a storage that ends where it ends, if the memory can."""
        return self.view(start, end)

    @abstractmethod
    def element_of(self, tensor: torch.Tensor) -> int | None:
        """Return the element at which a tensor begins, or None if it lies elsewhere."""

    @abstractmethod
    def take_room(self, start: int, end: int) -> None:
        """Take room for these elements, which are about to be written."""

    @abstractmethod
    def release_room(self, start: int, end: int) -> None:
        """Give the room of these elements back; their values are lost."""

    @abstractmethod
    def read_ahead(self, start: int, end: int) -> None:
        """Begin to read those of these elements that lie on disk."""

    @abstractmethod
    def unmap(self, start: int, end: int) -> None:
        """Let go of the memory of these elements where a file keeps their values."""


class Pages(Protocol):
    """The pages behind a mapped region, by bytes from its start."""

    def read_ahead(self, start: int, end: int) -> None:
        """Begin to read what lies on disk."""

    def map_to_write(self, start: int, end: int) -> None:
        """Map them, all at once."""

    def unmap(self, start: int, end: int) -> None:
        """Unmap what lies on disk."""

    def release_room(self, start: int, end: int) -> None:
        """Give their room back."""


@final
class FlatElements(Elements):
    """All in one mapping, which has room for all: pages take room when they are written."""

    def __init__(self, flat: torch.Tensor, pages: Pages) -> None:
        self._flat = flat
        self._size = flat.itemsize
        self._pages = pages
        self._start = flat.data_ptr()
        self._end = self._start + flat.numel() * flat.itemsize

    def view(self, start: int, end: int) -> torch.Tensor:
        """Return a slice."""
        return self._flat[start:end]

    def alone(self, start: int, end: int) -> torch.Tensor:
        """Return a slice as if it were all: who saves or copies its storage would take the whole mapping else."""
        if start == end:
            return self._flat[start:end].clone()
        array = self._flat[start:end].view(torch.uint8).numpy()
        return torch.from_numpy(array).view(self._flat.dtype)

    def element_of(self, tensor: torch.Tensor) -> int | None:
        """Compare addresses."""
        if tensor.device.type != "cpu":
            return None
        address = tensor.data_ptr()
        return (address - self._start) // self._size if self._start <= address < self._end else None

    def take_room(self, start: int, end: int) -> None:
        """Map them at once rather than page by page."""
        self._pages.map_to_write(start * self._size, end * self._size)

    def release_room(self, start: int, end: int) -> None:
        """Give whole pages back."""
        self._pages.release_room(start * self._size, end * self._size)

    def read_ahead(self, start: int, end: int) -> None:
        """Let the system read ahead."""
        self._pages.read_ahead(start * self._size, end * self._size)

    def unmap(self, start: int, end: int) -> None:
        """Unmap whole pages."""
        self._pages.unmap(start * self._size, end * self._size)


class Units:
    """How a layout is cut into units: the unit of each parameter, and its first element there."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.of_parameter: list[int] = [-1] * len(layout.parameters)
        for unit in range(len(layout.buckets)):
            for block in layout.blocks_of(unit):
                if self.of_parameter[block.parameter] not in (-1, unit):
                    raise ValueError(f"{layout.parameters[block.parameter].name} lies in more than one bucket")
                self.of_parameter[block.parameter] = unit
        self.count = len(layout.buckets)
        for parameter, unit in enumerate(self.of_parameter):
            if unit < 0:
                self.of_parameter[parameter] = self.count
                self.count += 1
        self.members: list[list[int]] = [[] for _ in range(self.count)]
        for parameter, unit in enumerate(self.of_parameter):
            self.members[unit].append(parameter)

    def of_elements(self, start: int, end: int) -> set[int]:
        """Return the units in which elements `start` to `end` lie."""
        first, last = self.layout.parameter_at(start), self.layout.parameter_at(end - 1)
        return set(self.of_parameter[first : last + 1])

    def unit_at(self, element: int) -> int:
        """Return the unit in which an element lies."""
        return self.of_parameter[self.layout.parameter_at(element)]


class Keeper(Protocol):
    """Is told of the memory of units."""

    def taken(self, unit: torch.Tensor) -> None:
        """The unit has room, as yet without values."""

    def released(self, unit: torch.Tensor) -> None:
        """The unit's room is about to be given back."""


@final
class UnitElements(Elements):
    """A region in units.

    Owns: a storage for each unit.
    """

    def __init__(
        self, units: Units, dtypes: Sequence[torch.dtype], device: torch.device, keeper: Keeper | None = None
    ) -> None:
        """`dtypes` are those of the parameters in this region; with a `keeper`, units have pages of their own."""
        self.place = device
        self._keeper = keeper
        self._shifts = [0] * len(units.members)  # bytes before the first whole page of each, with a keeper
        self._units = units
        self._dtypes = dtypes
        self._offsets = [0] * len(dtypes)  # of each parameter, in bytes from the start of its unit
        self._sizes: list[int] = []
        for members in units.members:
            at = 0
            for parameter in members:
                self._offsets[parameter] = at
                numel = -(-units.layout.parameters[parameter].numel // ALIGNMENT) * ALIGNMENT
                at += numel * dtypes[parameter].itemsize
            self._sizes.append(at)
        self._flat = [torch.empty(0, dtype=torch.uint8, device=device) for _ in units.members]
        self._unit_of = {flat.untyped_storage()._cdata: unit for unit, flat in enumerate(self._flat)}

    def view(self, start: int, end: int) -> torch.Tensor:
        """Return a part of a unit, which takes room if it has none."""
        parameter = self._units.layout.parameter_at(start)
        unit, dtype = self._units.of_parameter[parameter], self._dtypes[parameter]
        self._take(unit)
        inside = (start - self._units.layout.offsets[parameter]) * dtype.itemsize
        first = self._shifts[unit] + self._offsets[parameter] + inside
        return torch.empty(0, dtype=dtype, device=self._flat[unit].device).set_(
            self._flat[unit].untyped_storage(), first // dtype.itemsize, (end - start,), (1,)
        )

    def element_of(self, tensor: torch.Tensor) -> int | None:
        """Look for the tensor's storage."""
        unit = self._unit_of.get(tensor.untyped_storage()._cdata)
        if unit is None:
            return None
        at = tensor.storage_offset() * tensor.itemsize - self._shifts[unit]
        members = self._units.members[unit]
        parameter = members[bisect.bisect_right([self._offsets[p] for p in members], at) - 1]
        inside = (at - self._offsets[parameter]) // self._dtypes[parameter].itemsize
        return self._units.layout.offsets[parameter] + inside

    def take_room(self, start: int, end: int) -> None:
        """Take room for these units."""
        for unit in self._units.of_elements(start, end):
            self._take(unit)

    def release_room(self, start: int, end: int) -> None:
        """Free these units, once what was begun with them is done."""
        for unit in self._units.of_elements(start, end):
            storage = self._flat[unit].untyped_storage()
            if storage.nbytes():
                whole = self._whole(unit)
                if self._keeper is not None:
                    self._keeper.released(whole)
                if whole.is_cuda:
                    whole.record_stream(torch.cuda.current_stream(whole.device))
                storage.resize_(0)

    def read_ahead(self, start: int, end: int) -> None:
        """Do nothing: none lies on disk."""

    def unmap(self, start: int, end: int) -> None:
        """Do nothing: no file keeps them."""

    @property
    def num_bytes(self) -> int:
        """The room that is taken."""
        return sum(flat.untyped_storage().nbytes() for flat in self._flat)

    def _take(self, unit: int) -> None:
        storage = self._flat[unit].untyped_storage()
        if storage.nbytes() or not self._sizes[unit]:
            return
        if self._keeper is None:
            storage.resize_(self._sizes[unit])
        else:
            storage.resize_(self._sizes[unit] + 2 * PAGE_BYTES)
            self._shifts[unit] = -storage.data_ptr() % PAGE_BYTES
            self._keeper.taken(self._whole(unit))

    def _whole(self, unit: int) -> torch.Tensor:
        flat, size = self._flat[unit], self._sizes[unit]
        if self._keeper is not None:
            size = -(-size // PAGE_BYTES) * PAGE_BYTES
        return torch.empty(0, dtype=torch.uint8, device=flat.device).set_(
            flat.untyped_storage(), self._shifts[unit], (size,), (1,)
        )


@final
class MixedElements(Elements):
    """A region whose buckets lie in different kinds of memory."""

    def __init__(self, units: Units, by_bucket: Sequence[Elements]) -> None:
        """`by_bucket` is where each bucket lies and, last, what is in none."""
        self._units = units
        self._of_unit = [by_bucket[min(unit, len(by_bucket) - 1)] for unit in range(units.count)]

    def view(self, start: int, end: int) -> torch.Tensor:
        """Look where they lie."""
        return self._at(start).view(start, end)

    def alone(self, start: int, end: int) -> torch.Tensor:
        """Look where they lie."""
        return self._at(start).alone(start, end)

    def element_of(self, tensor: torch.Tensor) -> int | None:
        """Ask all."""
        found = (elements.element_of(tensor) for elements in dict.fromkeys(self._of_unit))
        return next((element for element in found if element is not None), None)

    def take_room(self, start: int, end: int) -> None:
        """Take room where they lie."""
        self._at(start).take_room(start, end)

    def release_room(self, start: int, end: int) -> None:
        """Give room back where they lie."""
        self._at(start).release_room(start, end)

    def read_ahead(self, start: int, end: int) -> None:
        """Begin there."""
        self._at(start).read_ahead(start, end)

    def unmap(self, start: int, end: int) -> None:
        """Drop it there."""
        self._at(start).unmap(start, end)

    def _at(self, element: int) -> Elements:
        return self._of_unit[self._units.unit_at(element)]
