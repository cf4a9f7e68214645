"""Slots: the memory in which the workers of a host keep partial sums.

A slot has 4 bytes for each element of the layout. The gradient of a single micro-batch lies there in the type of the
working weight, a sum of two or more in fp32, a parameter always at the same place. With wire format bf16 everything
is rounded to it as it is made, and a slot has 2 bytes for each element. On a device a slot takes room bucket by bucket,
for leaf gradients and for sums apart; where the host keeps partial sums for a device, all have the wire format.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import EllipsisType
from typing import NamedTuple

import torch

from lightwork.spec.holdings import SUMS, Holdings, Home
from lightwork.spec.layout import Layout, Span, span_of, spans_of
from lightwork.spec.tree import Node
from lightwork.state.parameters import DTYPES
from lightwork.store.elements import Elements
from lightwork.store.regions import Regions

DTYPES_OF_WIRE = {"fp32": torch.float32, "bf16": torch.bfloat16}

#: Stands for any single micro-batch.
LEAF = Node(0, 1)


def is_leaf(node: Node) -> bool:
    """Return whether a node is a single micro-batch."""
    return node.end - node.first == 1


class _Slot(NamedTuple):
    leaves: Elements
    sums: Elements


class Slots:
    """The partial sums of all workers of the host, as flat tensors.

    [Note: lifetime of a partial sum]
    A slot is filled by a fold and read by the update, or by the exchange between hosts, of any worker of the host. What
    went into a sum keeps its slot until the board has the sum: a worker killed in the middle of a fold has lost one
    micro-batch, not its earlier ones. After the step every slot is free; its pages stay, for the next.
    """

    def __init__(self, holdings: Holdings, memory: Regions) -> None:
        self.layout: Layout = holdings.layout
        self.device = memory.device
        self.wire = DTYPES_OF_WIRE[holdings.spec.wire]
        self._num_slots = holdings.num_places
        self._depths = holdings.depths
        homes = [row.parts[SUMS].home for row in holdings.rows]
        self._homes = homes
        self._on_disk = [home is Home.DISK for home in homes]
        self._elsewhere = [row.parts[SUMS].is_elsewhere for row in holdings.rows]
        self._kept_wide = [home is Home.HOST for home in homes]  # by bucket: sums alone
        self._bucket_of = [(self.layout.buckets_of(index) or (-1,))[0] for index in range(len(self.layout.parameters))]
        self._in_units = memory.in_units(SUMS)
        self.leaf_dtypes = [self._leaf_dtype(index) for index in range(len(self.layout.parameters))]
        self._slots = [self._make(memory, copy) for copy in range(holdings.capacity * self._num_slots)]
        self._views: dict[tuple[int, int, bool, int], torch.Tensor] = {}

    def _leaf_dtype(self, parameter: int) -> torch.dtype:
        bucket = self._bucket_of[parameter]
        is_wide = self.wire is not torch.float32 or (bucket >= 0 and self._kept_wide[bucket])
        return self.wire if is_wide else DTYPES[self.layout.parameters[parameter].dtype]

    def _make(self, memory: Regions, copy: int) -> _Slot:
        flat = None
        if memory.is_mapped(SUMS):
            flat = memory.flat(SUMS, self.wire, copy * self.layout.numel, self.layout.numel)
            if not self._in_units:
                return _Slot(flat, flat)
        sums = memory.new_home(SUMS, [self.wire] * len(self.layout.parameters), flat)
        if all(self._kept_wide):
            return _Slot(sums, sums)
        return _Slot(memory.new_home(SUMS, self.leaf_dtypes, flat), sums)

    def dtype(self, node: Node, parameter: int) -> torch.dtype:
        """Return the type of a parameter in the partial sum `node`."""
        return self.leaf_dtypes[parameter] if is_leaf(node) else self.wire

    def take_room(self, slot: int, node: Node) -> None:
        """Take room in a slot for the partial sum `node`. On a device, room for the other kind (leaf or sum) goes."""
        if not self._in_units:
            return  # pages come as they are written
        leaves, sums = self._slots[slot]
        wanted, other = (leaves, sums) if is_leaf(node) else (sums, leaves)
        for bucket in range(len(self.layout.buckets)):  # one unit each; frozen parameters have none
            if self._on_disk[bucket]:
                continue
            span = span_of(self.layout, self.layout.blocks_of(bucket)[0])
            if other is not wanted:
                other.release_room(span.start, span.end)
            wanted.take_room(span.start, span.end)

    def parameter_view(
        self, rank: int, slot: int, node: Node, parameter: int, start: int = 0, end: int | None = None
    ) -> torch.Tensor:
        """Return elements `start` to `end` (all, unless given) of a parameter in the partial sum `node`, flat.

        `rank` is the worker's place on this host.
        """
        offset, numel = self.layout.offsets[parameter], self.layout.parameters[parameter].numel
        end = numel if end is None else end
        elements, dtype = self._elements(rank, slot, node), self.dtype(node, parameter)
        bucket = self._bucket_of[parameter]
        if dtype is self.wire or (self._in_units and not self._on_disk[bucket]):
            return elements.view(offset + start, offset + end)
        return elements.view(offset, offset + numel).view(dtype)[start:end]

    def range_view(self, rank: int, slot: int, node: Node, start: int, end: int) -> torch.Tensor:
        """Return elements `start` to `end` of the layout in a partial sum, which are all in the wire format there."""
        return self._elements(rank, slot, node).view(start, end)

    def span_view(self, rank: int, slot: int, node: Node, span: Span) -> torch.Tensor:
        """Return a span of a partial sum as one flat tensor. A span of several blocks has the wire format throughout.

        The views are kept in a host's memory: making one costs as much as a sum.
        """
        first = span.blocks[0]
        key = (rank, slot, is_leaf(node), span.start)
        view = self._views.get(key)
        if view is None or view.numel() != span.numel:
            if len(span.blocks) == 1:
                view = self.parameter_view(rank, slot, node, first.parameter, first.start, first.end)
            else:
                view = self.range_view(rank, slot, node, span.start, span.end)
            if not self._in_units:
                self._views[key] = view
        return view

    def operand(self, rank: int, slot: int, node: Node, span: Span) -> torch.Tensor:
        """Return a span of a partial sum where computation sees it: of one that the host keeps for a device, a copy."""
        view = self.span_view(rank, slot, node, span)
        return self.device.copied(view) if self.is_elsewhere(span.blocks[0].parameter) else view

    @property
    def any_elsewhere(self) -> bool:
        """Whether the host keeps any partial sums for a device."""
        return any(self._elsewhere)

    def is_elsewhere(self, parameter: int) -> bool:
        """Return whether computation sees other memory than that in which a parameter's partial sums are kept."""
        bucket = self._bucket_of[parameter]
        return bucket >= 0 and self._elsewhere[bucket]

    def pieces(self, parameter: int, gradient: torch.Tensor) -> Sequence[slice | EllipsisType]:
        """Return the rows in which a gradient is to be folded, so that little of a sum on disk is mapped at once."""
        is_on_disk = any(self._on_disk[bucket] for bucket in self.layout.buckets_of(parameter))
        if not is_on_disk or gradient.numel() <= self._depths.piece or not gradient.is_contiguous():
            return [...]
        rows = max(1, self._depths.piece // (gradient.numel() // len(gradient)))
        return [slice(first, first + rows) for first in range(0, len(gradient), rows)]

    @property
    def any_on_disk(self) -> bool:
        """Whether any partial sums are kept on disk."""
        return any(self._on_disk)

    def drop_rows(self, parameter: int, rows: slice | EllipsisType = ...) -> None:
        """Unmap what a fold has used on disk: some rows of a parameter, or all of it."""
        start, end = self.layout.range_of(parameter)
        if isinstance(rows, slice):
            row = (end - start) // self.layout.parameters[parameter].shape[0]
            start, end = start + rows.start * row, min(end, start + rows.stop * row)
        self._drop(start, end)

    def drop_bucket(self, bucket: int) -> None:
        """Unmap a bucket's partial sums on disk, which were added up."""
        if self._on_disk[bucket]:
            for span in spans_of(self.layout, self.layout.buckets[bucket]):
                self._drop(span.start, span.end)

    def drop_all(self) -> None:
        """Unmap all that lies on disk."""
        if self.any_on_disk:
            self._drop(0, self.layout.numel)

    def release_bucket(self, rank: int, slot: int, bucket: int) -> None:
        """Give back the memory of a bucket in a partial sum that is needed no more, where computation sees it."""
        if self._homes[bucket] is not Home.HERE:
            return
        of_slot = self._slots[rank * self._num_slots + slot]
        for span in spans_of(self.layout, self.layout.buckets[bucket]):
            for elements in dict.fromkeys(of_slot):
                elements.release_room(span.start, span.end)

    def _drop(self, start: int, end: int) -> None:
        for of_slot in self._slots:
            of_slot.sums.unmap(start, end)

    def _elements(self, rank: int, slot: int, node: Node) -> Elements:
        of_slot = self._slots[rank * self._num_slots + slot]
        return of_slot.leaves if is_leaf(node) else of_slot.sums


def present_nodes(touched: Sequence[memoryview], parameter: int) -> Callable[[Node], bool]:
    """Return whether a node holds a sum for `parameter`: whether any of its micro-batches touched it."""
    return lambda node: any(touched[leaf][parameter] for leaf in range(node.first, node.end))
