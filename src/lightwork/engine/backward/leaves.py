"""The squared norm of a part of each micro-batch's gradient, seen as it comes, for the noise scale (`spec/noise`).

In each step another eighth of the buckets: a look at all of every gradient would cost several parts in a hundred.
"""

from __future__ import annotations

import math
from typing import final

import torch

from lightwork.device.base import Device
from lightwork.spec.layout import Layout
from lightwork.spec.noise import PARTS
from lightwork.state.parameters import flattened


@final
class LeafNorms:
    """Of this worker's micro-batches."""

    def __init__(self, layout: Layout, device: Device) -> None:
        self._device = device
        self.num_parts = min(PARTS, len(layout.buckets))  #: those that hold anything: the first ones
        # By part: of each parameter the elements in it, in the order in which they lie in memory.
        self._ranges: list[dict[int, list[tuple[int, int]]]] = [{} for _ in range(PARTS)]
        for bucket in range(len(layout.buckets)):
            for block in layout.blocks_of(bucket):
                of_parameter = self._ranges[bucket % PARTS].setdefault(block.parameter, [])
                if of_parameter and of_parameter[-1][1] == block.start:
                    of_parameter[-1] = of_parameter[-1][0], block.end
                else:
                    of_parameter.append((block.start, block.end))
        self._now: dict[int, list[tuple[int, int]]] = {}
        self._squares: list[torch.Tensor] = []

    def begin_step(self, part: int) -> None:
        """Look at a part of the gradients of this step."""
        self._now = self._ranges[part]

    def begin(self) -> None:
        """Begin with another micro-batch."""
        self._squares = []

    def take(self, index: int, gradient: torch.Tensor, parameter: torch.Tensor) -> None:
        """Look at the gradient of parameter `index`."""
        ranges = self._now.get(index)
        if ranges is None:
            return
        flat = flattened(gradient, parameter)
        self._squares += self._device.norms_squared([flat[start:end].float() for start, end in ranges])

    def square(self) -> float:
        """Return the squared norm of what was looked at in this micro-batch. Blocks: until a device has it."""
        return math.fsum(map(float, self._squares))
