"""Adding partial sums in the fixed tree: the one place where gradients of different micro-batches meet."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lightwork.spec.tree import Node, Sum


class Adder:
    """Adds tensors of one size, in memory that it keeps; every sum is rounded to the wire format, fp32 unless given."""

    def __init__(self, wire: torch.dtype = torch.float32, device: torch.device | None = None) -> None:
        self._wire = wire
        self._device = device
        self._temporaries: list[torch.Tensor] = []  # by depth, made when a tree needs them

    def add_up(self, tree: Sum, operand: Callable[[Node], torch.Tensor], out: torch.Tensor) -> torch.Tensor:
        """Return the sum of `tree`: in `out`, or where it lies already if the tree is a single node.

        Shapes: of the operands and `out`, flat and of one size; operands of the wire format or (single micro-batches)
        bf16, `out` of the wire format.
        """
        return self._sum(tree, operand, out, 0)

    def _sum(self, tree: Sum, operand: Callable[[Node], torch.Tensor], out: torch.Tensor, depth: int) -> torch.Tensor:
        if isinstance(tree, Node):
            return operand(tree)
        left = self._sum(tree[0], operand, out, depth)
        right = self._sum(tree[1], operand, self._temporary(depth, out.numel()), depth + 1)
        if left.dtype is self._wire and right.dtype is self._wire:
            return torch.add(left, right, out=out)
        # `add` with `out` would round the sum of two bf16 leaves to bf16.
        if left.data_ptr() != out.data_ptr():
            out.copy_(left)
        return out.add_(right)

    def _temporary(self, depth: int, size: int) -> torch.Tensor:
        while depth >= len(self._temporaries):
            self._temporaries.append(torch.empty(0, dtype=self._wire, device=self._device))
        if self._temporaries[depth].numel() < size:
            self._temporaries[depth] = torch.empty(size, dtype=self._wire, device=self._device)
        return self._temporaries[depth][:size]
