"""The end of a step: partial sums become gradients, gradients become weights, bucket by bucket.

For each block, while it is in the cache: add the partial sums of all workers in the fixed tree, divide by the total
weight, clip, take the optimizer's step, write the working weights.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightwork.engine.gradients import Slots, present_nodes
from lightwork.engine.optimizer import BlockOptimizer, bucket_elements
from lightwork.engine.weights import Weights
from lightwork.spec.layout import Block
from lightwork.spec.tree import Node, Sum, sum_of, without_absent


@dataclass(frozen=True)
class StepMap:
    """Where the partial sums of a step lie, and what they are to be divided by. The same on every worker."""

    num_micro_batches: int
    places: dict[Node, tuple[int, int]]  #: rank and slot
    touched: tuple[memoryview, ...]  #: by micro-batch, a byte for each parameter
    divisor: float  #: total weight over micro-batch size; 0 when the whole batch has no weight
    scale: float  #: of clipping, 1 for none


class Updater:
    """Measures and updates buckets."""

    def __init__(self, weights: Weights, slots: Slots, optimizer: BlockOptimizer) -> None:
        self._weights = weights
        self._layout = weights.layout
        self._slots = slots
        self._optimizer = optimizer
        largest = max((bucket_elements(self._layout, bucket) for bucket in self._layout.buckets), default=0)
        depth = 8  # temporaries of a sum, made when a tree needs them
        self._scratch = torch.empty(largest)
        self._temporaries: list[torch.Tensor | None] = [None] * depth
        self._largest_block = max((b.end - b.start for b in self._layout.blocks), default=0)
        self._map: StepMap | None = None
        self._tree: Sum = Node(0, 1)
        self._everywhere = b""  # by parameter: whether every micro-batch touched it
        self._anywhere = b""  # ... any one

    def begin(self, step_map: StepMap) -> None:
        """Use `step_map` from now on."""
        if step_map is self._map:
            return
        self._map = step_map
        self._tree = sum_of(step_map.num_micro_batches, step_map.places)
        rows = [bytes(row) for row in step_map.touched]
        self._everywhere = bytes(map(min, *rows)) if len(rows) > 1 else rows[0]
        self._anywhere = bytes(map(max, *rows)) if len(rows) > 1 else rows[0]

    def gradients(self, bucket: int) -> list[torch.Tensor | None]:
        """Return the mean gradient of each block of a bucket, flat; None where no micro-batch touched the parameter."""
        gradients: list[torch.Tensor | None] = []
        at = 0
        for block in self._blocks(bucket):
            size = block.end - block.start
            gradients.append(self._gradient(block, self._scratch[at : at + size]))
            at += size
        return gradients

    def apply(self, bucket: int, gradients: Sequence[torch.Tensor | None]) -> float:
        """Take the optimizer's step with `gradients` and write the working weights; return their squared norm."""
        step_map = self._current()
        squared = norm_squared(gradients)
        if step_map.scale != 1.0:
            for gradient in gradients:
                if gradient is not None:
                    gradient.mul_(step_map.scale)
        self._optimizer.update(bucket, gradients)
        for block, gradient in zip(self._blocks(bucket), gradients, strict=True):
            if gradient is not None:
                self._weights.publish(block.parameter, block.start, block.end)
        return squared

    def _current(self) -> StepMap:
        if self._map is None:
            raise ValueError("no step map: begin() comes before buckets")
        return self._map

    def _blocks(self, bucket: int) -> Sequence[Block]:
        spec = self._layout.buckets[bucket]
        return self._layout.blocks[spec.first_block : spec.end_block]

    def _gradient(self, block: Block, out: torch.Tensor) -> torch.Tensor | None:
        """Return the mean gradient of a block: in `out`, or in the slot where it lies already."""
        step_map = self._current()
        if not self._anywhere[block.parameter] or step_map.divisor == 0:
            return None
        tree: Sum | None = self._tree
        if not self._everywhere[block.parameter]:
            tree = without_absent(self._tree, present_nodes(step_map.touched, block.parameter))
        if tree is None:
            return None
        total = self._sum(tree, block, out, 0)
        if total.dtype is not torch.float32:
            total = out.copy_(total)
        if step_map.divisor != 1.0:
            total = torch.div(total, step_map.divisor, out=out)
        elif step_map.scale != 1.0 and total.data_ptr() != out.data_ptr():
            total = out.copy_(total)  # clipping scales in place, and must not do so in the slot
        return total

    def _sum(self, tree: Sum, block: Block, out: torch.Tensor, depth: int) -> torch.Tensor:
        if isinstance(tree, Node):
            rank, slot = self._current().places[tree]
            return self._slots.block(rank, slot, tree, block)
        left = self._sum(tree[0], block, out, depth)
        right = self._sum(tree[1], block, self._temporary(depth, out.numel()), depth + 1)
        if left.dtype is torch.float32 and right.dtype is torch.float32:
            return torch.add(left, right, out=out)
        # `add` with `out` would round the sum of two bf16 leaves to bf16.
        if left.data_ptr() != out.data_ptr():
            out.copy_(left)
        return out.add_(right)

    def _temporary(self, depth: int, size: int) -> torch.Tensor:
        while depth >= len(self._temporaries):
            self._temporaries.append(None)
        kept = self._temporaries[depth]
        if kept is None:
            kept = self._temporaries[depth] = torch.empty(self._largest_block)
        return kept[:size]


def norm_squared(gradients: Sequence[torch.Tensor | None]) -> float:
    """Return the squared L2 norm of flat gradients."""
    return math.fsum(float(torch.dot(g, g)) for g in gradients if g is not None)
