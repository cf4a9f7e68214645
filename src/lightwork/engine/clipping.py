"""Clipping that needs no norm of the whole gradient: by value, and adaptively. Of the global batch's mean gradient.

(Clipping by the norm multiplies all by one number, which `norms` knows.)
"""

from __future__ import annotations

from typing import final

import torch

from lightwork.spec.layout import Block
from lightwork.spec.spec import Spec
from lightwork.state.parameters import like
from lightwork.state.weights import Weights

#: As in the paper and in timm: a weight counts as at least so long, and a gradient too, where one divides by it.
WEIGHT_EPSILON = 1e-3
GRADIENT_EPSILON = 1e-6


class Clipping:
    """Leaves every gradient as it is."""

    def clip(self, block: Block, gradient: torch.Tensor) -> None:
        """Clip the gradient of a block, flat, in place. The block's master is here."""


@final
class ByValue(Clipping):
    """Brings every element between -limit and limit, as torch.nn.utils.clip_grad_value_ does."""

    def __init__(self, limit: float) -> None:
        self._limit = limit

    def clip(self, block: Block, gradient: torch.Tensor) -> None:
        """Clamp each element."""
        gradient.clamp_(-self._limit, self._limit)


@final
class Adaptive(Clipping):
    """Keeps the gradient of each output unit from being long beside the unit's weights.

    Adaptive gradient clipping of Brock et al., "High-Performance Large-Scale Image Recognition Without Normalization"
    (2021), equation 3: for a unit with weights w and gradient g, where |g| > factor max(|w|, epsilon), g becomes
    factor max(|w|, epsilon) g / |g|. Of a matrix or a convolution's weights a unit is an index of the first dimension,
    a vector is one unit. (Blocks are whole parameters then.)
    """

    def __init__(self, factor: float, weights: Weights) -> None:
        self._factor = factor
        self._weights = weights

    def clip(self, block: Block, gradient: torch.Tensor) -> None:
        """Scale each unit."""
        layout = self._weights.layout
        parameter = self._weights.parameters[block.parameter]
        weight = like(self._weights.masters_here.view(*layout.range_of(block.parameter)), parameter)
        shaped = like(gradient, parameter)
        longest = _unit_norms(weight).clamp_(min=WEIGHT_EPSILON).mul_(self._factor)
        length = _unit_norms(shaped)
        scaled = shaped * (longest / length.clamp(min=GRADIENT_EPSILON))
        shaped.copy_(torch.where(length < longest, shaped, scaled))


def clipping_of(spec: Spec, weights: Weights) -> Clipping:
    """Return what a spec asks for."""
    if spec.clip_grad_value is not None:
        return ByValue(spec.clip_grad_value)
    if spec.clip_grad_adaptive is not None:
        return Adaptive(spec.clip_grad_adaptive, weights)
    return Clipping()


def _unit_norms(tensor: torch.Tensor) -> torch.Tensor:
    """Return the L2 norm of each unit, fp32, in a shape that the tensor can be divided by."""
    dims = tuple(range(1, tensor.ndim))
    norms: torch.Tensor = torch.linalg.vector_norm(tensor, dim=dims or None, keepdim=bool(dims))
    return norms
