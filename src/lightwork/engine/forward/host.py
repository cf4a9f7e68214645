"""Activations on the host: what forward of a module saves on a device is taken there, and back before backward asks."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from lightwork.device.base import Device, Mark
from lightwork.engine.forward.fetching import SavedWeights
from lightwork.engine.forward.int8 import SMALL
from lightwork.state.layers import Forward

#: Tensors that come back before backward asks for them.
AHEAD = 2


@dataclass
class _Away:
    """A tensor that autograd has saved, on the host."""

    host: torch.Tensor
    like: torch.Tensor  #: without memory: type, shape and strides
    left: Mark  #: when it had left
    place: int  #: among those of its forward
    here: torch.Tensor | None = None  #: once it is on its way back
    came: Mark = None


class _HostActivations:
    """What one module's forward saves: taken to the host beside computation, and back in the reverse order."""

    def __init__(self, device: Device, weights: SavedWeights) -> None:
        self._device = device
        self._weights = weights
        self._away: list[weakref.ref[_Away]] = []

    def pack(self, tensor: torch.Tensor) -> torch.Tensor | _Away:
        """Take a tensor to the host, unless it is small, a weight, or there."""
        if tensor.numel() < SMALL or not self._device.is_here(tensor) or tensor.layout is not torch.strided:
            return tensor
        if self._weights.is_weight(tensor):
            return tensor
        like = torch.empty_like(tensor, device="meta")
        tensor = tensor.detach() if like.stride() == tensor.stride() else tensor.contiguous().detach()
        like = torch.empty_like(tensor, device="meta")
        mark = self._device.mark()
        with self._device.queue("out"):
            self._device.wait_for_mark(mark)
            host = self._device.host_buffer(tensor.numel(), tensor.dtype).as_strided(tensor.shape, tensor.stride())
            host.copy_(tensor, non_blocking=True)
            if tensor.is_cuda:
                tensor.record_stream(torch.cuda.current_stream(tensor.device))
            away = _Away(host, like, self._device.mark(), len(self._away))
        self._away.append(weakref.ref(away))
        return away

    def unpack(self, packed: torch.Tensor | _Away) -> torch.Tensor:
        """Return a tensor of the host to the device, and those before it while backward is busy with it."""
        if isinstance(packed, torch.Tensor):
            return self._weights.bring_saved(packed)
        for place in range(packed.place, max(-1, packed.place - 1 - AHEAD), -1):
            away = self._away[place]()
            if away is not None and away.here is None:
                self._begin(away)
        self._device.wait_for_mark(packed.came)
        if packed.here is None:
            raise ValueError("a tensor that was asked for did not come")
        if packed.here.is_cuda:
            packed.here.record_stream(torch.cuda.current_stream(packed.here.device))
        return packed.here

    def _begin(self, away: _Away) -> None:
        with self._device.queue("in"):
            self._device.wait_for_mark(away.left)
            away.here = torch.empty_strided(
                away.like.shape, away.like.stride(), dtype=away.like.dtype, device=self._device.place
            )
            away.here.copy_(away.host, non_blocking=True)
            away.came = self._device.mark()


def on_host(module: nn.Module, weights: SavedWeights, device: Device) -> Forward:
    """Return a forward of `module` whose activations are taken to the host."""
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        saved = _HostActivations(device, weights)
        with saved_tensors_hooks(saved.pack, saved.unpack):
            return forward(*args, **kwargs)

    return run
