"""The trained state as items: a weight, an entry of the optimizer's state, a buffer, each with a name, in pieces.

An item is read and written piece by piece, so that nobody needs room for all of a large one. A piece is a range of its
elements in the order of its shape; those of what is trained begin and end where blocks do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, final

import torch

from lightwork.spec.layout import Layout
from lightwork.state.moments import Moments
from lightwork.state.parameters import like
from lightwork.state.state_layout import StateEntry
from lightwork.state.weights import Weights

#: Elements of a piece, or those of one block if it is larger.
PIECE = 1024 * 1024

#: Bytes that are brought, mapped and let go together.
WINDOW = 16 * 1024 * 1024

#: Between a parameter's name and the state entry's, in the name of an item.
SEPARATOR = "|"


class Owned(NamedTuple):
    """A part of a piece, where it lies: flat, contiguous, and of one bucket, whose owner may be another host."""

    bucket: int
    tensor: torch.Tensor


class Item(ABC):
    """A named tensor of the trained state."""

    def __init__(self, name: str, dtype: torch.dtype, shape: Sequence[int]) -> None:
        self.name = name
        self.dtype = dtype  #: as it is read
        self.shape = tuple(shape)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return torch.Size(self.shape).numel()

    @abstractmethod
    def ranges(self) -> list[tuple[int, int]]:
        """Return the first element of each piece, and its end; at least one."""

    @abstractmethod
    def read(self, start: int, end: int) -> torch.Tensor:
        """Return the elements of a piece: flat, of `dtype`, on the host; a view where that is possible."""

    @abstractmethod
    def write(self, start: int, end: int, values: torch.Tensor) -> None:
        """Write the elements of a piece, wherever they have a place."""

    def owned(self, start: int, end: int) -> Iterator[Owned]:
        """Yield the parts of a piece that, where state is shared out, lie with the owner of their bucket alone."""
        return iter(())

    def buckets(self, start: int, end: int) -> list[int]:
        """Return the buckets in which these parts of a piece lie."""
        return []


class Piece(NamedTuple):
    """A part of an item that can be read while the walk is at it."""

    item: Item
    start: int
    end: int

    def read(self) -> torch.Tensor:
        """Return its elements, flat, on the host; perhaps a view."""
        return self.item.read(self.start, self.end)


@final
class Plain(Item):
    """A tensor of the model beside its weights: a buffer, or a parameter that is not floating, which is not shared."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        super().__init__(name, tensor.dtype, tensor.shape)
        self.is_shared = not isinstance(tensor, torch.nn.Parameter)
        self._tensor = tensor

    def ranges(self) -> list[tuple[int, int]]:
        """Cut a contiguous one evenly."""
        return _even(self.numel) if self._tensor.is_contiguous() else [(0, self.numel)]

    def read(self, start: int, end: int) -> torch.Tensor:
        """Return a slice."""
        return _on_host(self._tensor.detach().contiguous().view(-1)[start:end])

    def write(self, start: int, end: int, values: torch.Tensor) -> None:
        """Write a slice."""
        if self._tensor.is_contiguous():
            self._tensor.detach().view(-1)[start:end].copy_(values)
        else:
            self._tensor.detach().copy_(values.view(self.shape))


class _Place:
    """Where a parameter lies, and its blocks."""

    def __init__(self, weights: Weights, blocks: Sequence[int], index: int) -> None:
        self.index = index
        self.layout: Layout = weights.layout
        self.parameter = weights.parameters[index]
        self.numel = self.layout.parameters[index].numel
        self.blocks = range(blocks[0], blocks[-1] + 1) if blocks else range(0)
        # In another order in memory than its shape says, such as channels-last.
        self.is_strided = not like(torch.empty(self.numel, device="meta"), self.parameter).is_contiguous()

    def ranges(self) -> list[tuple[int, int]]:
        """Return the pieces of what has the parameter's shape."""
        if self.is_strided:
            return [(0, self.numel)]
        if not self.blocks:
            return _even(self.numel)
        found: list[tuple[int, int]] = []
        for index in self.blocks:
            block = self.layout.blocks[index]
            if found and block.end - found[-1][0] <= PIECE:
                found[-1] = found[-1][0], block.end
            else:
                found.append((block.start, block.end))
        return found

    def blocks_in(self, start: int, end: int) -> range:
        """Return the blocks that a piece is made of."""
        if not self.blocks:
            return range(0)
        size = self.layout.blocks[self.blocks[0]].end  # all but the last are of one size
        return self.blocks[start // size : -(-end // size)]

    def by_bucket(self, start: int, end: int) -> Iterator[tuple[int, range]]:
        """Yield the blocks of a piece, those of one bucket together."""
        wanted = self.blocks_in(start, end)
        for bucket in self.layout.buckets_of(self.index):
            own = self.layout.block_indices(bucket)
            inside = range(max(own.start, wanted.start), min(own.stop, wanted.stop))
            if inside:
                yield bucket, inside

    def in_shape(self, flat: torch.Tensor) -> torch.Tensor:
        """Return a parameter's elements in the order of its shape, flat."""
        return like(flat, self.parameter).contiguous().view(-1) if self.is_strided else flat

    def in_memory(self, values: torch.Tensor) -> torch.Tensor:
        """Return them in the order in which the parameter lies in memory, flat."""
        if not self.is_strided:
            return values
        flat = torch.empty_like(values)
        like(flat, self.parameter).copy_(values.view(self.parameter.shape))
        return flat


@final
class Weight(Item):
    """A parameter's fp32 value: its master or, of a frozen narrow one, the working weight."""

    def __init__(self, name: str, weights: Weights, moments: Moments, index: int) -> None:
        shape = weights.layout.parameters[index].shape
        super().__init__(name, torch.float32, shape)
        self._place = _Place(weights, moments.blocks_of(index), index)
        self._weights = weights

    def ranges(self) -> list[tuple[int, int]]:
        """Cut it at blocks."""
        return self._place.ranges()

    def read(self, start: int, end: int) -> torch.Tensor:
        """Return a slice of where it is kept."""
        if start == end:
            return torch.empty(0, dtype=torch.float32)
        return _on_host(self._place.in_shape(next(self._weights.parts(self._place.index, start, end)).float()))

    def write(self, start: int, end: int, values: torch.Tensor) -> None:
        """Write a slice, into master and working weight."""
        if start < end:
            values = self._place.in_memory(values)
            for part in self._weights.parts(self._place.index, start, end):
                part.copy_(values)

    def owned(self, start: int, end: int) -> Iterator[Owned]:
        """Yield slices of the master."""
        for bucket, blocks in self._place.by_bucket(start, end):
            first, last = self._place.layout.blocks[blocks[0]], self._place.layout.blocks[blocks[-1]]
            yield Owned(bucket, next(self._weights.parts(self._place.index, first.start, last.end)))

    def buckets(self, start: int, end: int) -> list[int]:
        """Return the buckets of the piece's blocks."""
        return [bucket for bucket, _ in self._place.by_bucket(start, end)]


@final
class Moment(Item):
    """An entry of the optimizer's state of a parameter: of an entry in 8 bits, the fp32 values that it stands for."""

    def __init__(self, parameter: str, weights: Weights, moments: Moments, index: int, entry: StateEntry) -> None:
        shape = weights.layout.parameters[index].shape if entry.shape is None else entry.shape
        super().__init__(f"{parameter}{SEPARATOR}{entry.name}", entry.dtype, shape)
        self._place = _Place(weights, moments.blocks_of(index), index)
        self.of = parameter  #: its name
        self.parameter = weights.parameters[index]
        self.entry = entry
        self._moments = moments

    def ranges(self) -> list[tuple[int, int]]:
        """Cut it at blocks, if it has the parameter's shape."""
        return self._place.ranges() if self.entry.shape is None else [(0, self.numel)]

    def read(self, start: int, end: int) -> torch.Tensor:
        """Return a slice of where it is kept."""
        flat = self._moments.read(self.entry, self._blocks(start, end))
        return _on_host(self._place.in_shape(flat) if self.entry.shape is None else flat)

    def write(self, start: int, end: int, values: torch.Tensor) -> None:
        """Write a slice."""
        values = self._place.in_memory(values) if self.entry.shape is None else values
        self._moments.write(self.entry, self._blocks(start, end), values)

    def owned(self, start: int, end: int) -> Iterator[Owned]:
        """Yield slices of each region in which it lies."""
        for bucket, blocks in self._by_bucket(start, end):
            for tensor in self._moments.stored(self.entry, blocks):
                yield Owned(bucket, tensor)

    def buckets(self, start: int, end: int) -> list[int]:
        """Return the buckets of the piece's blocks."""
        return [bucket for bucket, _ in self._by_bucket(start, end)]

    def in_python(self, value: torch.Tensor) -> Any:
        """Return a value as the optimizer keeps it: some are numbers."""
        return value if self.entry.number is None else self.entry.number(value.item())

    def _by_bucket(self, start: int, end: int) -> Iterable[tuple[int, range]]:
        if self.entry.shape is None:
            return self._place.by_bucket(start, end)
        return [(self._place.layout.buckets_of(self._place.index)[0], self._place.blocks[:1])]

    def _blocks(self, start: int, end: int) -> range:
        return self._place.blocks_in(start, end) if self.entry.shape is None else self._place.blocks


def windows(items: Iterable[Item]) -> Iterator[list[Piece]]:
    """Yield the pieces of items, in order, as many at once as a window holds, but at least one."""
    window: list[Piece] = []
    num_bytes = 0
    for item in items:
        for start, end in item.ranges():
            size = (end - start) * item.dtype.itemsize
            if window and num_bytes + size > WINDOW:
                yield window
                window, num_bytes = [], 0
            window.append(Piece(item, start, end))
            num_bytes += size
    if window:
        yield window


def _even(numel: int) -> list[tuple[int, int]]:
    return [(start, min(numel, start + PIECE)) for start in range(0, max(numel, 1), PIECE)]


def _on_host(flat: torch.Tensor) -> torch.Tensor:
    on_host = flat.cpu()
    # A unit of memory that comes and goes could not go any more, once something outside torch has seen its address.
    return on_host.clone() if on_host.untyped_storage().resizable() else on_host
