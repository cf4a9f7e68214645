"""Buckets of gradients that are needed as soon as they are complete, while backward still runs.

Backward tells when the gradient of a parameter is folded; a bucket is complete when all of its parameters are. A
parameter that gets no gradient completes with the end of backward. The gradient of a single micro-batch is not folded
into a slot: it is put where its buckets are packed, in a few buffers that are used in turn, and what autograd has made
of it can go. There are two that wait for complete buckets:

    Outbox     another thread sends them to other hosts. Backward waits where it is too far ahead of it
    Consumed   a function uses each up within backward (`early`)
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from typing import final

import torch

from lightwork.device.base import Device, Mark
from lightwork.engine.backward.message import Message, message_of
from lightwork.engine.backward.slots import Slots
from lightwork.spec.layout import Layout
from lightwork.state.parameters import flattened


class Pool:
    """Buffers of one size, used in turn by two threads."""

    def __init__(self, num_bytes: int, device: Device) -> None:
        self._num_bytes = num_bytes
        self._device = device
        self._free: list[tuple[torch.Tensor, Mark]] = []

    def take_buffer(self) -> torch.Tensor:
        """Return a buffer, bytes, which the current queue may write."""
        try:
            buffer, mark = self._free.pop()
        except IndexError:
            return torch.empty(self._num_bytes, dtype=torch.uint8, device=self._device.place)
        self._device.wait_for_mark(mark)
        return buffer

    def give_back(self, buffers: Sequence[torch.Tensor]) -> None:
        """Take buffers back that the current queue has used."""
        mark = self._device.mark() if buffers else None
        self._free += [(buffer, mark) for buffer in buffers]


class CompleteBuckets(ABC):
    """Counts the gradients of each bucket, and packs those of a single micro-batch."""

    def __init__(self, layout: Layout, dtypes: Sequence[torch.dtype], messages: Sequence[Message], pool: Pool) -> None:
        """`dtypes` and `messages` are those of the gradients of a single micro-batch; the pool has room for any."""
        self.messages = messages
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
            {block.parameter for block in layout.blocks_of(bucket)} for bucket in range(len(layout.buckets))
        ]
        self._missing = [0] * len(layout.buckets)

    @abstractmethod
    def _completed(self, bucket: int) -> None:
        """Hear that a bucket is complete, within backward."""

    @abstractmethod
    def complete(self) -> None:
        """Say that backward has ended: everything is folded."""

    def expect(self, parameters: Iterable[int]) -> None:
        """Start anew: these are still to be folded."""
        expected = set(parameters)
        self._missing = [len(of_bucket & expected) for of_bucket in self._parameters]

    def abandon(self) -> None:  # noqa: B027  nobody waits for what is used up at once
        """Say that backward has failed."""

    def pack(self, index: int, gradient: torch.Tensor, parameter: torch.Tensor) -> None:
        """Pack the gradient of parameter `index`, rounded to its type on the way, and say that it is folded.

        Bucket by bucket, so that those of a large parameter can leave before all of it is packed.
        Blocks: as `count_folded`.
        """
        flat = flattened(gradient, parameter)
        dtype = self._dtypes[index]
        for bucket, places in reversed(self._places[index].items()):
            if bucket not in self._packed:
                self._packed[bucket] = self.pool.take_buffer()
            for offset, start, end in places:
                place = self._packed[bucket][offset : offset + (end - start) * dtype.itemsize].view(dtype)
                place.copy_(flat[start:end])
            self._count_down(bucket)

    def packed(self, bucket: int) -> torch.Tensor:
        """Return a complete bucket as it travels. The bytes of a parameter without a gradient mean nothing."""
        if bucket not in self._packed:
            self._packed[bucket] = self.pool.take_buffer()
        return self._packed[bucket][: self.messages[bucket].num_bytes]

    def count_folded(self, parameter: int) -> None:
        """Say that the gradient of an expected parameter is folded.

        Blocks: while a thread that takes complete buckets is busy and the backlog too long.
        """
        for bucket in self._places[parameter]:
            self._count_down(bucket)

    def mark_taken(self, bucket: int) -> None:
        """Say that a bucket has left, or is used up."""
        if bucket in self._packed:
            self.pool.give_back([self._packed.pop(bucket)])

    def _count_down(self, bucket: int) -> None:
        self._missing[bucket] -= 1
        if self._missing[bucket] == 0:
            self._completed(bucket)


@final
class Consumed(CompleteBuckets):
    """Complete buckets are used up within backward, by `consume`."""

    consume: Callable[[int], None]

    def _completed(self, bucket: int) -> None:
        self.consume(bucket)

    def complete(self) -> None:
        """Let what is left be used up."""
        for bucket in reversed([bucket for bucket, missing in enumerate(self._missing) if missing > 0]):
            self.consume(bucket)


@final
class Outbox(CompleteBuckets):
    """Filled by backward, and emptied by another thread."""

    def __init__(
        self,
        layout: Layout,
        dtypes: Sequence[torch.dtype],
        messages: Sequence[Message],
        pool: Pool,
        device: Device,
        backlog: int,
    ) -> None:
        """`backlog` is how many buckets backward may complete before they are taken."""
        super().__init__(layout, dtypes, messages, pool)
        self._device = device
        self._backlog = backlog
        self._marks: list[Mark] = [None] * len(messages)  # of backward's queue, when it completed a bucket
        self._changed = threading.Condition()
        self._ahead = 0  # complete buckets that are not taken yet
        self._is_awaited = False  # whether the other thread waits for backward
        self._abandoned = False

    def expect(self, parameters: Iterable[int]) -> None:
        """Start anew."""
        with self._changed:
            self._abandoned, self._ahead = False, 0
            self._marks = [None] * len(self._marks)
            super().expect(parameters)

    def _completed(self, bucket: int) -> None:
        self._marks[bucket] = self._device.mark()
        with self._changed:
            self._ahead += 1
            self._changed.notify_all()
            self._changed.wait_for(self._has_room)

    def mark_taken(self, bucket: int) -> None:
        """Let backward go on."""
        super().mark_taken(bucket)
        with self._changed:
            self._ahead -= 1
            self._changed.notify_all()

    def _has_room(self) -> bool:
        return self._abandoned or self._is_awaited or self._ahead <= self._backlog

    def complete(self) -> None:
        """Wake the other thread."""
        mark = self._device.mark()
        with self._changed:
            for bucket, missing in enumerate(self._missing):
                if missing > 0:
                    self._marks[bucket], self._missing[bucket] = mark, 0
            self._changed.notify_all()

    def abandon(self) -> None:
        """Let who waits get an error."""
        with self._changed:
            self._abandoned = True
            self._changed.notify_all()

    def wait_for_bucket(self, bucket: int) -> None:
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
        self._device.wait_for_mark(self._marks[bucket])


def messages_of_leaves(slots: Slots) -> list[Message]:
    """Return how each bucket of a single micro-batch's gradients travels."""
    layout = slots.layout
    return [message_of(layout, slots.leaf_dtypes, slots.wire, bucket) for bucket in range(len(layout.buckets))]


def pool_for(device: Device, *messages: Sequence[Message]) -> Pool:
    """Return buffers with room for any of these messages."""
    return Pool(max((message.num_bytes for of_kind in messages for message in of_kind), default=0), device)
