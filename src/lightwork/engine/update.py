"""The end of a step: partial sums become gradients, gradients become weights, bucket by bucket.

For each block, while it is in the cache: add the partial sums of all workers in the fixed tree, divide by the total
weight, clip, take the optimizer's step, write the working weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lightwork.device.base import Device
from lightwork.engine.backward.gradients import Slots, present_nodes
from lightwork.engine.exchange.sums import Adder
from lightwork.spec.layout import ALIGNMENT, Span, span_of, spans_of
from lightwork.spec.tree import Node, Sum, sum_of, without_absent
from lightwork.state.optimizer import BlockOptimizer
from lightwork.state.weights import Weights


@dataclass(frozen=True)
class StepMap:
    """Where the partial sums of a step lie, and what they are to be divided by. The same on every worker."""

    num_micro_batches: int
    places: dict[Node, tuple[int, int]]  #: rank and slot
    touched: tuple[memoryview, ...]  #: by micro-batch, a byte for each parameter
    divisor: float  #: total weight over micro-batch size; 0 when the whole batch has no weight
    scale: float  #: of clipping, 1 for none


#: A span, its place in the scratch memory, and those of its blocks.
_Space = tuple[Span, torch.Tensor, list[tuple[Span, torch.Tensor]]]


class Updater:
    """Measures and updates buckets."""

    def __init__(self, weights: Weights, slots: Slots, optimizer: BlockOptimizer, device: Device) -> None:
        self._device = device
        self._weights = weights
        self._layout = weights.layout
        self._slots = slots
        self._optimizer = optimizer
        spans = [spans_of(self._layout, bucket) for bucket in self._layout.buckets]
        largest = max((sum(_aligned(s.numel) for s in of_bucket) for of_bucket in spans), default=0)
        self._scratch = torch.empty(largest, device=device.place)
        self._spaces = [list(self._lay_out(of_bucket)) for of_bucket in spans]
        self._adder = Adder(slots.wire, device.place)
        longest = max((s.numel for of_bucket in spans for s in of_bucket), default=0)
        self._sum = torch.empty(longest, dtype=slots.wire, device=device.place)
        self._map: StepMap | None = None
        self._tree: Sum = Node(0, 1)
        self._everywhere = b""  # by parameter: whether every micro-batch touched it
        self._anywhere = b""  # ... any one
        self._has_leaves = True  # whether a worker holds the gradient of a single micro-batch

    def begin(self, step_map: StepMap) -> None:
        """Use `step_map` from now on."""
        if step_map is self._map:
            return
        self._map = step_map
        self._tree = sum_of(Node(0, step_map.num_micro_batches), step_map.places)
        rows = [bytes(row) for row in step_map.touched]
        self._everywhere = bytes(map(min, *rows)) if len(rows) > 1 else rows[0]
        self._anywhere = bytes(map(max, *rows)) if len(rows) > 1 else rows[0]
        self._has_leaves = any(node.end - node.first == 1 for node in step_map.places)

    def gradients(self, bucket: int) -> list[torch.Tensor | None]:
        """Return the mean gradient of each block of a bucket, flat; None where no micro-batch touched the parameter."""
        step_map = self._current()
        gradients: list[torch.Tensor | None] = []
        for span, space, parts in self._spaces[bucket]:
            if step_map.divisor and self._is_uniform(span):
                self._average(self._tree, span, space)
                gradients += [out for _, out in parts]
            else:
                gradients += [self._gradient(part, out) for part, out in parts]
        return gradients

    def gradients_of_one(
        self, bucket: int, leaves: Sequence[torch.Tensor | None], divisor: float
    ) -> list[torch.Tensor | None]:
        """Return the mean gradient of each block of a bucket, flat, where one micro-batch is the whole step.

        `leaves` are that micro-batch's; None where it did not touch the parameter.
        """
        spaces = [out for _, _, parts in self._spaces[bucket] for _, out in parts]
        return [
            None if leaf is None else _divided(leaf, divisor, out) for leaf, out in zip(leaves, spaces, strict=True)
        ]

    def norms_squared(self, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Return the squared L2 norm of each flat gradient that there is, to be read later."""
        return self._device.norms_squared([gradient for gradient in gradients if gradient is not None])

    def apply(self, bucket: int, gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        """Take the optimizer's step with `gradients` and write the working weights; return their squared norms."""
        squared = self.norms_squared(gradients)
        if self._map is not None and self._map.scale != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(self._map.scale)
        self._optimizer.update(bucket, gradients)
        spec = self._layout.buckets[bucket]
        blocks = self._layout.blocks[spec.first_block : spec.end_block]
        self._weights.updated([b for b, gradient in zip(blocks, gradients, strict=True) if gradient is not None])
        return squared

    def _current(self) -> StepMap:
        if self._map is None:
            raise ValueError("no step map: begin() comes before buckets")
        return self._map

    def _lay_out(self, spans: Sequence[Span]) -> Iterator[_Space]:
        """Give each span of a bucket, and each of its blocks, its place in the scratch memory."""
        at = 0
        for span in spans:
            space = self._scratch[at : at + span.numel]
            at += _aligned(span.numel)
            parts = [span_of(self._layout, block) for block in span.blocks]
            yield span, space, [(part, space[part.start - span.start : part.end - span.start]) for part in parts]

    def _is_uniform(self, span: Span) -> bool:
        """Return whether the span's partial sums can be added as one: there everywhere, in the wire format."""
        leaf, wire = Node(0, 1), self._slots.wire
        if self._has_leaves and any(self._slots.dtype(leaf, b.parameter) is not wire for b in span.blocks):
            return False
        return all(self._everywhere[b.parameter] for b in span.blocks)

    def _gradient(self, span: Span, out: torch.Tensor) -> torch.Tensor | None:
        """Put the mean gradient of a span of one block into `out`; None where there is none."""
        step_map = self._current()
        parameter = span.blocks[0].parameter
        if not self._anywhere[parameter] or step_map.divisor == 0:
            return None
        tree: Sum | None = self._tree
        if not self._everywhere[parameter]:
            tree = without_absent(self._tree, present_nodes(step_map.touched, parameter))
        if tree is None:
            return None
        self._average(tree, span, out)
        return out

    def _average(self, tree: Sum, span: Span, out: torch.Tensor) -> None:
        places = self._current().places
        space = out if self._slots.wire is torch.float32 else self._sum[: span.numel]
        total = self._adder.add_up(tree, lambda node: self._slots.operand(*places[node], node, span), space)
        _divided(total, self._current().divisor, out)


def _aligned(numel: int) -> int:
    """Return the elements that a span takes: the bits of a norm depend on the alignment of what it is taken of."""
    return -(-numel // ALIGNMENT) * ALIGNMENT


def _divided(total: torch.Tensor, divisor: float, out: torch.Tensor) -> torch.Tensor:
    """Put total / divisor into `out`, fp32, which may be `total` itself."""
    if total.dtype is torch.float32 and divisor != 1.0:
        return torch.div(total, divisor, out=out)
    if total.data_ptr() != out.data_ptr():
        out.copy_(total)
    return out if divisor == 1.0 else out.div_(divisor)
