"""What a batch is made of: finding its tensors, copying them to aligned memory, counting its tokens.

A batch is a nest of dicts (any mapping), lists, tuples, named tuples and dataclasses with tensors at its
leaves. Objects of other kinds are passed through as they are, tensors in them included.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from operator import attrgetter
from typing import Any

import torch

#: Any nest of containers and tensors, as a collate function returns it.
Batch = Any

#: Bytes. See [Note: bits and addresses] in `spec/layout`.
ALIGNMENT = 64

_TOKEN_TYPES = (torch.int64, torch.int32)


def tensors(batch: Batch) -> Iterator[torch.Tensor]:
    """Yield the tensors of a batch, in order."""
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from tensors(value)
    elif isinstance(batch, list | tuple):
        for value in batch:
            yield from tensors(value)
    elif _is_record(batch):
        for value in _values_of(batch).values():
            yield from tensors(value)


def aligned(batch: Batch) -> Batch:
    """Return `batch` with its CPU tensors at multiples of 64 bytes and without gaps.

    Tensors that are so already, and containers of nothing else, are returned as they are, not copied.
    """
    return map_tensors(batch, _aligned_tensor)


def map_tensors(batch: Batch, function: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
    """Return `batch` with `function` applied to each tensor; containers without a change are not copied."""
    if isinstance(batch, torch.Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        changed = _changed(batch, function)
        if not changed:
            return batch
        if isinstance(batch, MutableMapping):
            mapping = copy.copy(batch)
            for key, value in changed.items():
                mapping[key] = value
            return mapping
        return {**batch, **changed}
    if isinstance(batch, list | tuple):
        values = [map_tensors(value, function) for value in batch]
        if all(new is old for new, old in zip(values, batch, strict=True)):
            return batch
        if isinstance(batch, list):
            sequence = copy.copy(batch)
            sequence[:] = values
            return sequence
        # A named tuple's own constructor takes its fields one by one, others' take what they like.
        return tuple.__new__(type(batch), values)
    if _is_record(batch):
        changed = _changed(_values_of(batch), function)
        if not changed:
            return batch
        record = copy.copy(batch)
        for name, value in changed.items():
            object.__setattr__(record, name, value)  # frozen ones too
        return record
    return batch


def count_tokens(batch: Batch) -> int:
    """Return how many tokens a batch holds: the elements of its first tensor of token ids; 0 without one.

    Token ids are int64 or int32, in two or more dimensions.
    """
    for tensor in tensors(batch):
        if tensor.dtype in _TOKEN_TYPES and tensor.ndim >= 2:
            return tensor.numel()
    return 0


def _aligned_tensor(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_nested:
        return tensor
    dense = tensor.is_contiguous() or (tensor.ndim == 4 and tensor.is_contiguous(memory_format=torch.channels_last))
    if dense and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor.clone()  # torch allocates at multiples of 64 bytes; dense strides are kept, others become contiguous


def _is_record(value: object) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _values_of(record: Any) -> dict[str, Any]:
    return {f.name: attrgetter(f.name)(record) for f in fields(record)}


def _changed(values: Mapping[Any, Any], function: Callable[[torch.Tensor], torch.Tensor]) -> dict[Any, Any]:
    mapped = {key: map_tensors(value, function) for key, value in values.items()}
    return {key: value for key, value in mapped.items() if value is not values[key]}
