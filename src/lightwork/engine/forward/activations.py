"""Activations: what forward of a module leaves for backward is kept, made again, or kept in 8 bits.

    keep       as autograd does
    recompute  made again when backward first asks (`recompute`)
    offload    moved to host memory until backward asks; for modules on a device (`host`)
    int8       rounded to 8 bits (`int8`), which gives other bits, so that it is a part of the spec

A module is wrapped from outside: its `forward` runs under hooks on the tensors that autograd saves. Weights (whatever
lies in the shared memory) and small tensors are left alone.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from torch import nn

from lightwork.device.base import Device
from lightwork.engine.forward.fetching import SavedWeights
from lightwork.engine.forward.host import on_host
from lightwork.engine.forward.int8 import in_int8
from lightwork.engine.forward.recompute import recomputed
from lightwork.engine.forward.transforms import is_transformed
from lightwork.state.layers import Forward


class _OfThisRun:
    """A module's `forward` while a run lasts.

    A copy of the module, by `copy.deepcopy` or pickle, is a plain one, with the `forward` that the module had before.
    """

    def __init__(self, module: nn.Module, run: Forward, before: Forward | None) -> None:
        self.module = module
        self.run = run
        self.before = before  #: of the module alone, where its class's was not used
        self._own: Forward = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run it; within a transform of torch.func, which hooks do not go with, as `keep` does."""
        if is_transformed():
            return self._own(*args, **kwargs)
        return self.run(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        """Stand for what was there before."""
        if self.before is not None:
            return copy.copy, (self.before,)
        # While the copy is made it has no attributes yet, and so its class's `forward`.
        return getattr, (self.module, "forward")


class Activations:
    """The wrapped modules of one worker's model.

    Owns: the `forward` attribute of these modules, until `close`.
    """

    def __init__(self, model: nn.Module, chosen: Mapping[str, str], weights: SavedWeights, device: Device) -> None:
        self._wrapped: list[_OfThisRun] = []
        for name, value in chosen.items():
            module = model.get_submodule(name)
            before = vars(module).get("forward")
            wrapped = _OfThisRun(module, _wrapped(value, name, module, weights, device), before)
            module.__dict__["forward"] = wrapped
            self._wrapped.append(wrapped)

    def close(self) -> None:
        """Give the modules their own `forward` back."""
        for wrapped in self._wrapped:
            vars(wrapped.module).pop("forward", None)
            if wrapped.before is not None:
                wrapped.module.__dict__["forward"] = wrapped.before
        self._wrapped.clear()


def _wrapped(value: str, name: str, module: nn.Module, weights: SavedWeights, device: Device) -> Forward:
    match value:
        case "recompute":
            return recomputed(name, module, weights, device)
        case "int8":
            return in_int8(module, weights)
        case _:
            return on_host(module, weights, device)
