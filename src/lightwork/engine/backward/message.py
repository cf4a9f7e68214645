"""How a bucket travels between hosts: its blocks one after the other, each in its type."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightwork.spec.layout import ALIGNMENT, Layout, Span, span_of

#: Bytes between two blocks of a packed message.
_PACKED_ALIGNMENT = 64


@dataclass(frozen=True)
class Message:
    """How a bucket of one partial sum travels: its blocks one after the other, each in its type."""

    blocks: tuple[tuple[Span, torch.dtype, int], ...]  #: with the offset in bytes
    num_bytes: int
    whole: tuple[int, int] | None  #: the elements of the layout that it is, if it need not be packed

    def views(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """Return each block as a tensor in `buffer`, bytes."""
        return [
            buffer[offset : offset + span.numel * dtype.itemsize].view(dtype) for span, dtype, offset in self.blocks
        ]


def message_of(layout: Layout, dtypes: Sequence[torch.dtype], wire: torch.dtype, bucket: int) -> Message:
    """Return how `bucket` travels; `dtypes` are those of the parameters' partial sums."""
    spans = [span_of(layout, block) for block in layout.blocks_of(bucket)]
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
