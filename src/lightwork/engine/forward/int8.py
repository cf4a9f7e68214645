"""Activations in 8 bits, with one scale for each 256 elements: an eighth to a quarter of the memory, and other bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lightwork.engine.forward.fetching import SavedWeights
from lightwork.state.layers import Forward

#: Elements with one scale in 8-bit blocks: the relative error of an element stays below its block's range / 254.
INT8_BLOCK = 256

#: Tensors of fewer elements stay as they are.
SMALL = INT8_BLOCK


@dataclass(frozen=True)
class Int8:
    """A tensor in 8-bit blocks."""

    values: torch.Tensor  #: int8, (blocks, INT8_BLOCK)
    scales: torch.Tensor  #: fp32, (blocks, 1)
    shape: torch.Size
    dtype: torch.dtype


def to_int8(tensor: torch.Tensor) -> Int8:
    """Round each block of `INT8_BLOCK` elements to multiples of 1/127 of its largest magnitude."""
    flat = tensor.detach().reshape(-1)
    missing = -flat.numel() % INT8_BLOCK
    blocks = torch.nn.functional.pad(flat, (0, missing)).view(-1, INT8_BLOCK).float()
    scales = blocks.abs().amax(dim=1, keepdim=True).div_(127.0)
    values = blocks.div_(scales.clamp_min(torch.finfo(torch.float32).tiny)).round_().to(torch.int8)
    return Int8(values, scales, tensor.shape, tensor.dtype)


def from_int8(packed: Int8) -> torch.Tensor:
    """Return the rounded tensor, in its type and shape."""
    flat = (packed.values.float() * packed.scales).view(-1)[: packed.shape.numel()]
    return flat.view(packed.shape).to(packed.dtype)


def in_int8(module: nn.Module, weights: SavedWeights) -> Forward:
    """Return a forward of `module` whose activations are kept in 8 bits."""
    forward = module.forward

    def pack(tensor: torch.Tensor) -> torch.Tensor | Int8:
        is_large = tensor.is_floating_point() and tensor.numel() >= SMALL
        return to_int8(tensor) if is_large and not weights.is_weight(tensor) else tensor

    def unpack(packed: torch.Tensor | Int8) -> torch.Tensor:
        return from_int8(packed) if isinstance(packed, Int8) else weights.bring_saved(packed)

    def run(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(pack, unpack):
            return forward(*args, **kwargs)

    return run
