"""Activations that are made again: a module's inputs alone are kept, and its forward is run again when backward first
asks for one. The random state, the buffers and autocast are as they were, so the bits are those of keeping them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from lightwork.device.base import Device
from lightwork.engine.forward.fetching import SavedWeights
from lightwork.errors import UsageError
from lightwork.random import RandomState
from lightwork.state.layers import Forward

#: Elements above which a buffer is taken for a mask, and not copied.
LARGE_BUFFER = 64 * 1024


class _Enough(Exception):
    """Raised in a second forward once all that backward needs is there."""


@dataclass(frozen=True)
class _Inputs:
    """The arguments of a forward, flat."""

    values: list[Any]  #: tensors detached from the graph that made them
    needed_grad: list[bool]
    versions: list[int]  #: PyTorch's counts of writes to them
    tree: Any


@dataclass(frozen=True)
class _Surroundings:
    """What else a forward depends on, as it was."""

    device: Device
    random_state: RandomState
    buffers: list[tuple[nn.Module, str, torch.Tensor]]
    autocast: tuple[bool, torch.dtype]


@dataclass
class _Call:
    """One forward of a module that is to be run again."""

    name: str
    weights: SavedWeights
    forward: Forward
    inputs: _Inputs
    before: _Surroundings
    saved: list[torch.Size] = field(default_factory=list)  #: shapes, in the order in which autograd saved them
    again: dict[int, torch.Tensor] = field(default_factory=dict)

    def pack(self, tensor: torch.Tensor) -> Any:
        """Let a saved tensor go, and remember which it was."""
        if self.weights.is_weight(tensor):
            return tensor
        self.saved.append(tensor.shape)
        return len(self.saved) - 1

    def unpack(self, place: Any) -> torch.Tensor:
        """Return the tensor that was the `place`th to be saved."""
        if isinstance(place, torch.Tensor):
            return self.weights.bring_saved(place)
        if place not in self.again:
            self._run_again()
        return self.again.pop(place)

    def _run_again(self) -> None:
        now = RandomState.capture(self.before.device)
        values = [(module, key, module._buffers[key]) for module, key, _ in self.before.buffers]
        seen = 0

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal seen
            if self.weights.is_weight(tensor):
                return tensor
            if seen >= len(self.saved) or tensor.shape != self.saved[seen]:
                raise UsageError(self._differs())
            self.again[seen] = tensor.detach()
            seen += 1
            if seen == len(self.saved):
                raise _Enough
            return tensor

        if self.inputs.versions != _versions(self.inputs.values):
            raise UsageError(
                f"an input of module {self.name} was written in place after the module had read it, so that the module "
                f"can not be run again for backward. Leave it out of activations='recompute': keep {self.name}, or "
                "write x = x + y instead of x += y."
            )
        # Copies: not leaves, so that the module may write into them. One for each object, as the module may compare.
        with torch.enable_grad():
            copies = {
                id(value): value.detach().requires_grad_(needed).clone()
                for value, needed in zip(self.inputs.values, self.inputs.needed_grad, strict=True)
                if isinstance(value, torch.Tensor)
            }
        inputs = [copies.get(id(value), value) for value in self.inputs.values]
        args, kwargs = pytree.tree_unflatten(inputs, self.inputs.tree)
        try:
            self.before.random_state.restore(self.before.device)
            for module, key, start in self.before.buffers:
                module._buffers[key] = start.clone()
            enabled, dtype = self.before.autocast
            with (
                torch.enable_grad(),
                torch.autocast(self.before.device.place.type, dtype, enabled=enabled),
                saved_tensors_hooks(keep, lambda tensor: tensor),
            ):
                self.forward(*args, **kwargs)
        except _Enough:
            pass
        finally:
            now.restore(self.before.device)
            for module, key, value in values:
                module._buffers[key] = value
        if seen < len(self.saved):
            raise UsageError(self._differs())

    def _differs(self) -> str:
        return (
            f"module {self.name} did not do the same when it was run again for backward: it saved other tensors. "
            f"Something outside it changed in between, or it keeps state in Python. Leave it out: "
            f"activations={{{self.name!r}: 'keep'}}."
        )


def recomputed(name: str, module: nn.Module, weights: SavedWeights, device: Device) -> Forward:
    """Return a forward of `module` after which backward makes its activations again."""
    forward, kind = module.forward, device.place.type
    # Such a layer overwrites what it was given.
    writes_inputs = any(vars(inner).get("inplace") is True for inner in module.modules())

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        leaves, tree = pytree.tree_flatten((args, kwargs))
        kept = {
            id(leaf): leaf.detach().clone() if writes_inputs else leaf.detach()
            for leaf in leaves
            if isinstance(leaf, torch.Tensor)
        }
        inputs = [kept.get(id(leaf), leaf) for leaf in leaves]
        large = _large_buffers(module)
        before = _versions(large)
        call = _Call(
            name=name,
            weights=weights,
            forward=forward,
            inputs=_Inputs(
                values=inputs,
                needed_grad=[isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves],
                versions=_versions(inputs),
                tree=tree,
            ),
            before=_Surroundings(
                device=device,
                random_state=RandomState.capture(device),
                buffers=[(owner, key, buffer.clone()) for owner, key, buffer in _written_buffers(module)],
                autocast=(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
            ),
        )
        with saved_tensors_hooks(call.pack, call.unpack):
            result = forward(*args, **kwargs)
        if _versions(large) != before:
            raise UsageError(
                f"module {name} writes a buffer of more than {LARGE_BUFFER} elements, which is not kept to run it "
                f"again for backward. Leave it out of activations='recompute': keep {name}."
            )
        return result

    return run


def _versions(values: Sequence[Any]) -> list[int]:
    return [value._version for value in values if isinstance(value, torch.Tensor) and not value.is_inference()]


def _large_buffers(module: nn.Module) -> list[torch.Tensor]:
    return [buffer for buffer in module.buffers() if buffer.numel() > LARGE_BUFFER]


def _written_buffers(module: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Tensor]]:
    """Yield the buffers that forward may write: those of modules in training mode, except large ones (masks)."""
    for owner in module.modules():
        for key, buffer in owner._buffers.items():
            if buffer is not None and owner.training and buffer.numel() <= LARGE_BUFFER:
                yield owner, key, buffer
