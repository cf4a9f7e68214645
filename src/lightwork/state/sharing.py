"""Tensors of a model that share memory without being one object: what was tied by `.data`, and views of weights.

A run moves weights into the memory of the team. A tie by object survives that; one by memory would be lost in silence.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import nn

from lightwork.errors import SpecError


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Return whether elements of a tensor share their memory, as `expand` makes them."""
    return any(size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def refuse_shared_memory(model: nn.Module, trained: Collection[nn.Parameter]) -> None:
    """Raise SpecError when another tensor of the model lies in the memory of a trained parameter."""
    by_storage: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for name, tensor in _tensors_of(model):
        if tensor.layout is torch.strided and not tensor.is_meta and tensor.numel():
            by_storage.setdefault(tensor.untyped_storage().data_ptr(), []).append((name, tensor))
    for tensors in by_storage.values():
        for at, (name, tensor) in enumerate(tensors):
            for other, second in tensors[at + 1 :]:
                if (tensor in trained or second in trained) and _overlap(tensor, second):
                    raise SpecError(
                        f"{name} and {other} lie in the same memory (shapes {tuple(tensor.shape)} and "
                        f"{tuple(second.shape)}) and are two objects: tied by .data, or views of one another. The run "
                        "moves weights, which would untie them. Tie the objects (decoder.weight = encoder.weight), "
                        "make the view in forward, or give each a copy: tensor.clone()."
                    )


def _tensors_of(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters, buffers and tensors that are attributes of modules, each object once."""
    seen: set[int] = set()
    for module_name, module in model.named_modules():
        # What torch's old spectral_norm and the like make anew before each forward.
        hooks = [hook for hook in module._forward_pre_hooks.values() if type(hook).__module__.startswith("torch.nn.")]
        made = {vars(hook).get("name") for hook in hooks}
        others = {key: value for key, value in vars(module).items() if key not in made}
        for key, value in (*module._parameters.items(), *module._buffers.items(), *others.items()):
            for tensor in value if isinstance(value, (list, tuple)) else (value,):
                if isinstance(tensor, torch.Tensor) and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{module_name}.{key}" if module_name else key, tensor


def _overlap(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Return whether two tensors of one storage have an element in common."""
    (first, end), (begin, stop) = _range(one), _range(other)
    if end <= begin or stop <= first:
        return False
    if one.dtype != other.dtype:
        return True
    touched = torch.zeros(max(end, stop) // one.itemsize, dtype=torch.bool)
    touched.as_strided(one.shape, one.stride(), one.storage_offset())[...] = True
    return bool(touched.as_strided(other.shape, other.stride(), other.storage_offset()).any())


def _range(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the first byte and the end of a tensor in its storage."""
    last = sum((int(size) - 1) * int(stride) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = int(tensor.storage_offset())
    return first * tensor.itemsize, (first + last + 1) * tensor.itemsize
