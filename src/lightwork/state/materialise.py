"""A model built on `torch.device("meta")`, which has shapes and no values, given values where its weights lie.

One module after the other, so that no more than one is in memory beside the shared one: from a safetensors file, or by
each module's own `reset_parameters`, in the order of `model.modules()`, from the random state of the moment. That is
the order in which most models are built, and then their weights are those of the model built in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from lightwork.errors import SpecError
from lightwork.state.sharing import overlaps_itself
from lightwork.state.weights import Weights


@runtime_checkable
class _Resettable(Protocol):
    def reset_parameters(self) -> None: ...


def give_buffers_memory(model: nn.Module, device: torch.device) -> bool:
    """Bring buffers to the device, and parameters that are not floating.

    Those on the meta device come without values; returns whether there were buffers among them.
    """
    found = False
    moved: dict[int, torch.Tensor] = {}  # a buffer may have two names
    for module in model.modules():
        for key, buffer in module._buffers.items():
            if buffer is None:
                continue
            if id(buffer) not in moved:
                moved[id(buffer)] = torch.zeros_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
                if overlaps_itself(buffer) or buffer.is_inference():  # which could not be written
                    moved[id(buffer)] = moved[id(buffer)].clone(memory_format=torch.contiguous_format)
            found = found or buffer.is_meta
            module._buffers[key] = moved[id(buffer)]
    for parameter in model.parameters():
        if not parameter.is_floating_point() and not parameter.is_meta:  # quantised: no part of the team's memory
            parameter.data = parameter.data.to(device)
    return found


def check_can_reset(model: nn.Module) -> None:
    """Raise SpecError when a module with values on the meta device can not make them itself."""
    for name, module in model.named_modules():
        own = [*module._parameters.items(), *module._buffers.items()]
        lost = [key for key, tensor in own if tensor is not None and tensor.is_meta]
        if lost and not isinstance(module, _Resettable):
            raise SpecError(
                f"module {name or type(model).__name__} ({type(module).__name__}) has {', '.join(lost)} on the meta "
                "device and no reset_parameters() to give them values. Add that method, or pass weights=, a "
                "safetensors file."
            )


def reset(model: nn.Module, weights: Weights, indices: Sequence[int], done: Callable[[int], None]) -> None:
    """Let each module give values to its own parameters, of those in `indices`; `done` is called after each."""
    index_of = {id(weights.parameters[index]): index for index in indices}
    for module in model.modules():
        own = {index_of[id(p)]: p for p in module.parameters(recurse=False) if id(p) in index_of}
        if not isinstance(module, _Resettable) or not (own or module._buffers):
            continue
        # On the host, also for weights on a device: its random numbers would be others.
        shared = {p: p.data for p in module.parameters(recurse=False) if id(p) not in index_of}
        # Parameters that have values already (tied to another module's, or built in memory) keep them: what
        # `reset_parameters` writes goes into memory that is thrown away.
        for parameter, value in shared.items():
            parameter.data = torch.empty_like(value, device="cpu")
        for index, parameter in own.items():
            on_host = weights.home_on_host(index)
            parameter.data = torch.empty(parameter.shape, dtype=parameter.dtype) if on_host is None else on_host
        module.reset_parameters()
        with torch.no_grad():
            for parameter, value in shared.items():
                parameter.data = value
            for index, parameter in own.items():
                value, parameter.data = parameter.data, weights.own_view(index)
                weights.write_value(index, value)
                del index_of[id(parameter)]
                done(index)


def load(model: nn.Module, weights: Weights, path: Path, done: Callable[[int], None]) -> None:
    """Give parameters and buffers the values of a safetensors file, one at a time.

    Raises: SpecError when the file can not be read, or a tensor is missing or of another shape.
    """
    index_of = {id(parameter): index for index, parameter in enumerate(weights.parameters)}
    try:
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name, value in model.state_dict(keep_vars=True).items():
                if not isinstance(value, torch.Tensor):
                    continue
                if name not in names:
                    if id(value) in index_of or value.numel():
                        _check_alias(model, name, names, path)
                    continue
                _copy(file.get_tensor(name), value, weights, index_of.get(id(value)), name, path)
                if id(value) in index_of:
                    done(index_of[id(value)])
    except (OSError, SafetensorError) as error:
        raise SpecError(f"weights={str(path)!r} can not be read ({error}). Pass a safetensors file.") from error


def _copy(new: torch.Tensor, value: torch.Tensor, weights: Weights, index: int | None, name: str, path: Path) -> None:
    if new.shape != value.shape:
        raise SpecError(f"{name} is {tuple(value.shape)} in the model and {tuple(new.shape)} in {path}.")
    with torch.no_grad():
        if index is None:
            value.data.copy_(new)
            return
        weights.write_value(index, new)


def _check_alias(model: nn.Module, name: str, names: set[str], path: Path) -> None:
    """Raise SpecError unless the tensor is in the file by another of its names."""
    state: dict[str, Any] = model.state_dict(keep_vars=True)
    if not any(other in names and state[other] is state[name] for other in state):
        raise SpecError(f"{path} has no {name}, which the model has. It has {', '.join(sorted(names)[:5])}, ...")
