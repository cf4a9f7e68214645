"""Activations: what forward of a module leaves for backward is kept, made again, or kept in 8 bits.

    keep       as autograd does
    recompute  made again when backward first asks (`recompute`)
    offload    moved to host memory until backward asks; for modules on a device (`host`)
    int8       rounded to 8 bits (`int8`), which gives other bits, so that it is a part of the spec

A module is wrapped from outside: its `forward` runs under hooks on the tensors that autograd saves. Weights (whatever
lies in the shared memory) and small tensors are left alone.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from lightwork.device.base import Device
from lightwork.engine.forward.fetching import SavedWeights
from lightwork.engine.forward.host import on_host
from lightwork.engine.forward.int8 import in_int8
from lightwork.engine.forward.recompute import recomputed
from lightwork.state.layers import Forward


class Activations:
    """The wrapped modules of one worker's model.

    Owns: the `forward` attribute of these modules, until `close`.
    """

    def __init__(self, model: nn.Module, chosen: Mapping[str, str], weights: SavedWeights, device: Device) -> None:
        self._wrapped: list[nn.Module] = []
        for name, value in chosen.items():
            module = model.get_submodule(name)
            module.__dict__["forward"] = _wrapped(value, name, module, weights, device)
            self._wrapped.append(module)

    def close(self) -> None:
        """Give the modules their own `forward` back."""
        for module in self._wrapped:
            module.__dict__.pop("forward", None)
        self._wrapped.clear()


def _wrapped(value: str, name: str, module: nn.Module, weights: SavedWeights, device: Device) -> Forward:
    match value:
        case "recompute":
            return recomputed(name, module, weights, device)
        case "int8":
            return in_int8(module, weights)
        case _:
            return on_host(module, weights, device)
