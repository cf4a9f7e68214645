"""What leaves for other hosts while backward of the last micro-batch still runs: buckets, as they become complete.

Backward tells when the gradient of a parameter is folded; who sends the buckets waits until all of theirs are. A
parameter that gets no gradient completes with the end of backward. The gradient of a single micro-batch is not folded
into a slot: it is put where its buckets are packed for their way, in a few buffers that are used in turn, and what
autograd has made of it can go. Backward waits where it is further ahead than these buffers should be many.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from lightwork.device.base import Device, Mark
from lightwork.device.cpu import Cpu
from lightwork.spec.layout import ALIGNMENT, Layout, Span, span_of
from lightwork.state.weights import like

#: Buckets that backward may complete before they are taken.
MAX_BACKLOG = 8

#: Bytes between two blocks of a packed message.
_PACKED_ALIGNMENT = 64


@dataclass(frozen=True)
class Message:
    """How a bucket of one partial sum travels: its blocks one after the other, each in its type."""

    blocks: tuple[tuple[Span, torch.dtype, int], ...]  #: with the offset in bytes
    num_bytes: int
    stretch: tuple[int, int] | None  #: the elements of the layout that it is, if it need not be packed

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Return each block as a tensor in `buffer`, bytes."""
        return [
            buffer[offset : offset + span.numel * dtype.itemsize].view(dtype) for span, dtype, offset in self.blocks
        ]


def message_of(layout: Layout, dtypes: Sequence[torch.dtype], wire: torch.dtype, bucket: int) -> Message:
    """Return how `bucket` travels; `dtypes` are those of the parameters' partial sums."""
    spec = layout.buckets[bucket]
    spans = [span_of(layout, block) for block in layout.blocks[spec.first_block : spec.end_block]]
    of_blocks = [dtypes[span.blocks[0].parameter] for span in spans]
    neighbours = all(0 <= after.start - before.end < ALIGNMENT for before, after in itertools.pairwise(spans))
    first, end = spans[0].start, spans[-1].end
    if neighbours and all(dtype is wire for dtype in of_blocks):
        blocks = tuple((span, wire, (span.start - first) * wire.itemsize) for span in spans)
        return Message(blocks, (end - first) * wire.itemsize, (first, end))
    placed = []
    at = 0
    for span, dtype in zip(spans, of_blocks, strict=True):
        placed.append((span, dtype, at))
        at += -(-span.numel * dtype.itemsize // _PACKED_ALIGNMENT) * _PACKED_ALIGNMENT
    return Message(tuple(placed), at, None)


class Pool:
    """Buffers of one size, used in turn by two threads."""

    def __init__(self, num_bytes: int, device: Device) -> None:
        self._num_bytes = num_bytes
        self._device = device
        self._free: list[tuple[torch.Tensor, Mark]] = []

    def take(self) -> torch.Tensor:
        """Return a buffer, bytes, which the current queue may write."""
        try:
            buffer, mark = self._free.pop()
        except IndexError:
            return torch.empty(self._num_bytes, dtype=torch.uint8, device=self._device.place)
        self._device.wait(mark)
        return buffer

    def give_back(self, buffers: Sequence[torch.Tensor]) -> None:
        """Take buffers back that the current queue has used."""
        mark = self._device.mark() if buffers else None
        self._free += [(buffer, mark) for buffer in buffers]


class Outbox:
    """Filled by backward, and emptied by another thread or by `on_complete`."""

    def __init__(
        self,
        layout: Layout,
        dtypes: Sequence[torch.dtype],
        pool: Pool,
        messages: Sequence[Message],
        device: Device,
    ) -> None:
        """`dtypes` and `messages` are those of the gradients of a single micro-batch; the pool has room for any."""
        self.messages = messages
        self._device = device
        self._marks: list[Mark] = [None] * len(messages)  # of backward's queue, when it completed a bucket
        self.on_complete: Callable[[int], None] | None = None  #: called within backward, in place of a thread
        self.pool = pool
        self._dtypes = dtypes
        # Of each parameter, by bucket: offset in the message, and the elements from start to end.
        self._places: list[dict[int, list[tuple[int, int, int]]]] = [{} for _ in layout.parameters]
        for bucket, message in enumerate(self.messages):
            for span, _, offset in message.blocks:
                block = span.blocks[0]
                of_bucket = self._places[block.parameter].setdefault(bucket, [])
                of_bucket.append((offset, block.start, block.end))
        self._packed: dict[int, torch.Tensor] = {}
        self._parameters = [
            {block.parameter for block in layout.blocks[bucket.first_block : bucket.end_block]}
            for bucket in layout.buckets
        ]
        self._missing = [0] * len(layout.buckets)
        self._changed = threading.Condition()
        self._ahead = 0  # complete buckets that are not taken yet
        self._is_awaited = False  # whether the other thread waits for backward
        self._abandoned = False

    def begin(self, expected: Iterable[int]) -> None:
        """Start anew: these parameters are still to be folded."""
        expected = set(expected)
        with self._changed:
            self._abandoned, self._ahead = False, 0
            self._marks = [None] * len(self._marks)
            self._missing = [len(parameters & expected) for parameters in self._parameters]

    def put(self, index: int, gradient: torch.Tensor, parameter: torch.Tensor) -> None:
        """Pack the gradient of parameter `index`, rounded to its type on the way, and say that it is folded.

        Bucket by bucket, so that those of a large parameter can leave before all of it is packed.
        Blocks: as `folded`.
        """
        if gradient.is_contiguous() and parameter.is_contiguous():
            flat = gradient.view(-1)
        else:  # in the order in which the parameter's elements lie in memory
            flat = torch.empty(gradient.numel(), dtype=gradient.dtype, device=gradient.device)
            like(flat, parameter).copy_(gradient)
        dtype = self._dtypes[index]
        for bucket, places in reversed(self._places[index].items()):
            if bucket not in self._packed:
                self._packed[bucket] = self.pool.take()
            for offset, start, end in places:
                place = self._packed[bucket][offset : offset + (end - start) * dtype.itemsize].view(dtype)
                place.copy_(flat[start:end])
            self._count_down(bucket)

    def packed(self, bucket: int) -> torch.Tensor:
        """Return a complete bucket as it travels. Nobody reads what of it was not put."""
        if bucket not in self._packed:
            self._packed[bucket] = self.pool.take()
        return self._packed[bucket][: self.messages[bucket].num_bytes]

    def folded(self, parameter: int) -> None:
        """Say that the gradient of an expected parameter is folded.

        Blocks: while the other thread is busy and the backlog too long.
        """
        for bucket in self._places[parameter]:
            self._count_down(bucket)

    def _count_down(self, bucket: int) -> None:
        self._missing[bucket] -= 1
        if self._missing[bucket] == 0 and self.on_complete is not None:
            self.on_complete(bucket)
        elif self._missing[bucket] == 0:
            self._marks[bucket] = self._device.mark()
            with self._changed:
                self._ahead += 1
                self._changed.notify_all()
                self._changed.wait_for(self._has_room)

    def taken(self, bucket: int) -> None:
        """Say that a bucket has left, or is added up."""
        if bucket in self._packed:
            self.pool.give_back([self._packed.pop(bucket)])
        with self._changed:
            self._ahead -= 1
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return self._abandoned or self._is_awaited or self._ahead <= MAX_BACKLOG

    def complete(self) -> None:
        """Say that backward has ended: everything is folded."""
        if self.on_complete is not None:
            for bucket in reversed([bucket for bucket, missing in enumerate(self._missing) if missing > 0]):
                self.on_complete(bucket)
        mark = self._device.mark()
        with self._changed:
            for bucket, missing in enumerate(self._missing):
                if missing > 0:
                    self._marks[bucket], self._missing[bucket] = mark, 0
            self._changed.notify_all()

    def abandon(self) -> None:
        """Say that backward has failed: who waits gets an error."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def wait(self, bucket: int) -> None:
        """Return when the bucket is complete.

        Raises: InterruptedError when backward has failed.
        """
        with self._changed:
            self._is_awaited = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._abandoned or self._missing[bucket] == 0)
            self._is_awaited = False
            if self._abandoned:
                raise InterruptedError("backward has failed")
        self._device.wait(self._marks[bucket])


def make_outbox(
    layout: Layout, dtypes: Sequence[torch.dtype], wire: torch.dtype, *, room: int = 0, device: Device | None = None
) -> Outbox:
    """Return an outbox for gradients of these types; its pool has room for any, and for messages of `room` bytes."""
    device = device or Cpu()
    messages = [message_of(layout, dtypes, wire, bucket) for bucket in range(len(layout.buckets))]
    pool = Pool(max((room, *(message.num_bytes for message in messages))), device)
    return Outbox(layout, dtypes, pool, messages, device)
