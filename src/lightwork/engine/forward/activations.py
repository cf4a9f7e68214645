"""Activations: what forward of a module leaves for backward is kept, made again, or kept in 8 bits.

    keep       as autograd does
    recompute  the module's inputs alone are kept, and its forward is run again when backward first asks; the random
               state, the buffers and autocast are as they were, so the bits are those of `keep`
    offload    moved to host memory until backward asks; for modules on a device
    int8       rounded to 8 bits, with one scale for each 256 elements: an eighth to a quarter of the memory, and other
               bits, so that it is a part of the spec

A module is wrapped from outside: its `forward` runs under hooks on the tensors that autograd saves. Weights (whatever
lies in the shared memory) and small tensors are left alone.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import _pytree as pytree

from lightwork.device.base import Device, Mark
from lightwork.device.cpu import Cpu
from lightwork.engine.forward.fetching import SavedWeights
from lightwork.errors import SpecError, UsageError
from lightwork.random import RandomState
from lightwork.spec.spec import Activation

#: Elements with one scale in 8-bit blocks: the relative error of an element stays below its block's range / 254.
INT8_BLOCK = 256

#: Tensors of fewer elements stay as they are.
SMALL = INT8_BLOCK

#: Elements above which a buffer is taken for a mask, and not copied.
LARGE_BUFFER = 64 * 1024

Forward = Callable[..., Any]


def layers_of(model: nn.Module) -> list[str]:
    """Return the names of a model's layers: the items of the ModuleList or Sequential with the most parameters in them.

    Of lists within each other the outermost counts. Without any, the model's children.
    """
    best: tuple[int, list[str]] = (0, [])
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) > 1:
            size = sum(parameter.numel() for parameter in module.parameters())
            if size > best[0]:
                best = (size, [f"{name}.{child}" if name else child for child, _ in module.named_children()])
    if best[1]:
        return best[1]
    return [name for name, child in model.named_children() if any(True for _ in child.parameters())]


def resolve(model: nn.Module, activations: str | Mapping[str, str], *, has_device: bool = False) -> dict[str, str]:
    """Return what is done with the activations of which module; `keep` is left out.

    Args:
        activations: one value for all layers (`layers_of`), or a value for each module by name.
        has_device: whether the model is trained on a device with a memory of its own.

    Raises: SpecError for an unknown value or module, modules within each other, and a value that can not be carried
    out here.
    """
    if not isinstance(activations, (str, Mapping)) or activations == "":
        raise SpecError(
            f"activations={activations!r} is neither a value nor a choice by module. The values are "
            f"{', '.join(get_args(Activation))}."
        )
    chosen = activations if isinstance(activations, Mapping) else dict.fromkeys(layers_of(model) or [""], activations)
    modules = dict(model.named_modules())
    for name, value in chosen.items():
        if value not in get_args(Activation):
            raise SpecError(f"activations={value!r} is not known. Choose one of {', '.join(get_args(Activation))}.")
        if name not in modules:
            near = ", ".join(list(modules)[1:6])
            raise SpecError(f"activations names {name!r}, which the model does not have. It has {near}, ...")
        if value == "offload" and not has_device:
            raise SpecError(
                f"activations='offload' moves what {name} saves from a device to host memory, and it is on a CPU "
                "already. Choose recompute, or int8."
            )
    for outer, value in chosen.items():
        inner = next((name for name in chosen if name != outer and (not outer or name.startswith(f"{outer}."))), None)
        if value != "keep" and inner is not None:
            raise SpecError(
                f"activations names {outer or 'the model'!r} and {inner!r}, which is inside it. Name one of them, or "
                f"the modules beside {inner!r} one by one."
            )
    return {name: value for name, value in chosen.items() if value != "keep"}


class Activations:
    """The wrapped modules of one worker's model.

    Owns: the `forward` attribute of these modules, until `close`.
    """

    def __init__(
        self, model: nn.Module, chosen: Mapping[str, str], weights: SavedWeights, device: Device | None = None
    ) -> None:
        self._wrapped: list[nn.Module] = []
        for name, value in chosen.items():
            module = model.get_submodule(name)
            module.__dict__["forward"] = _WRAPPERS[value](name, module, weights, device or Cpu())
            self._wrapped.append(module)

    def close(self) -> None:
        """Give the modules their own `forward` back."""
        for module in self._wrapped:
            module.__dict__.pop("forward", None)
        self._wrapped.clear()


# --- recompute -------------------------------------------------------------------------------------------------------


class _Enough(Exception):
    """Raised in a second forward once all that backward needs is there."""


@dataclass
class _Call:
    """One forward of a module that is to be run again."""

    name: str
    weights: SavedWeights
    forward: Forward
    inputs: list[Any]  #: tensors detached from the graph that made them
    needed_grad: list[bool]
    versions: list[int]  #: PyTorch's counts of writes to the inputs
    tree: Any
    device: Device
    random_state: RandomState
    buffers: list[tuple[nn.Module, str, torch.Tensor]]
    autocast: tuple[bool, torch.dtype]
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
        now = RandomState.capture(self.device)
        values = [(module, key, module._buffers[key]) for module, key, _ in self.buffers]
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

        if self.versions != _versions(self.inputs):
            raise UsageError(
                f"an input of module {self.name} was written in place after the module had read it, so that the module "
                f"can not be run again for backward. Leave it out of activations='recompute': keep {self.name}, or "
                "write x = x + y instead of x += y."
            )
        # Copies: not leaves, so that the module may write into them. One for each object, as the module may compare.
        with torch.enable_grad():
            copies = {
                id(value): value.detach().requires_grad_(needed).clone()
                for value, needed in zip(self.inputs, self.needed_grad, strict=True)
                if isinstance(value, torch.Tensor)
            }
        inputs = [copies.get(id(value), value) for value in self.inputs]
        args, kwargs = pytree.tree_unflatten(inputs, self.tree)
        try:
            self.random_state.restore(self.device)
            for module, key, start in self.buffers:
                module._buffers[key] = start.clone()
            enabled, dtype = self.autocast
            with (
                torch.enable_grad(),
                torch.autocast(self.device.place.type, dtype, enabled=enabled),
                saved_tensors_hooks(keep, lambda tensor: tensor),
            ):
                self.forward(*args, **kwargs)
        except _Enough:
            pass
        finally:
            now.restore(self.device)
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


def _recompute(name: str, module: nn.Module, weights: SavedWeights, device: Device) -> Forward:
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
            inputs=inputs,
            needed_grad=[isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves],
            versions=_versions(inputs),
            tree=tree,
            device=device,
            random_state=RandomState.capture(device),
            buffers=[(owner, key, buffer.clone()) for owner, key, buffer in _written_buffers(module)],
            autocast=(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)),
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


# --- 8 bits ----------------------------------------------------------------------------------------------------------


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


def _in_int8(name: str, module: nn.Module, weights: SavedWeights, device: Device) -> Forward:
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


# --- to the host -----------------------------------------------------------------------------------------------------

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
            self._device.wait(mark)
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
        self._device.wait(packed.came)
        if packed.here is None:
            raise ValueError("a tensor that was asked for did not come")
        if packed.here.is_cuda:
            packed.here.record_stream(torch.cuda.current_stream(packed.here.device))
        return packed.here

    def _begin(self, away: _Away) -> None:
        with self._device.queue("in"):
            self._device.wait(away.left)
            away.here = torch.empty_strided(
                away.like.shape, away.like.stride(), dtype=away.like.dtype, device=self._device.place
            )
            away.here.copy_(away.host, non_blocking=True)
            away.came = self._device.mark()


def _offload(name: str, module: nn.Module, weights: SavedWeights, device: Device) -> Forward:
    forward = module.forward

    def run(*args: Any, **kwargs: Any) -> Any:
        saved = _HostActivations(device, weights)
        with saved_tensors_hooks(saved.pack, saved.unpack):
            return forward(*args, **kwargs)

    return run


_WRAPPERS: dict[str, Callable[[str, nn.Module, SavedWeights, Device], Forward]] = {
    "recompute": _recompute,
    "int8": _in_int8,
    "offload": _offload,
}
