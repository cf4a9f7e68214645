"""Values as bytes, for other workers: JSON, and behind it the bytes of the tensors that were in it. Never pickle.

8 bytes     the length of the JSON, little-endian
JSON        the value with its tensors taken out (`values`), and of each tensor name, type and shape, in order
data        of one tensor after the other
"""

from __future__ import annotations

import json
import math
from typing import Any

import torch

from lightwork.checkpoint.values import put_together, take_apart

_DTYPES = {str(dtype): dtype for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
_LENGTH_BYTES = 8


def pack(value: Any) -> bytes:
    """Return a value of containers, numbers, strings, None, arrays and tensors as bytes.

    Raises: CheckpointError for anything else.
    """
    tensors: dict[str, torch.Tensor] = {}
    taken = take_apart(value, tensors, "value")
    listed = [[name, str(tensor.dtype), list(tensor.shape)] for name, tensor in tensors.items()]
    text = json.dumps([taken, listed]).encode()
    data = [tensor.reshape(-1).view(torch.uint8).numpy().tobytes() for tensor in tensors.values()]
    return b"".join((len(text).to_bytes(_LENGTH_BYTES, "little"), text, *data))


def unpack(packed: bytes) -> Any:
    """Return what `pack` was given.

    Raises: ValueError for bytes that it did not make.
    """
    try:
        return _unpacked(packed)
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(f"{len(packed)} bytes are no packed value ({error})") from error


def _unpacked(packed: bytes) -> Any:
    at = _LENGTH_BYTES + int.from_bytes(packed[:_LENGTH_BYTES], "little")
    if not _LENGTH_BYTES < at <= len(packed):
        raise ValueError(f"a text of {at - _LENGTH_BYTES}")
    taken, listed = json.loads(packed[_LENGTH_BYTES:at])
    tensors = {}
    for name, dtype, shape in listed:
        numel = math.prod(shape)
        end = at + numel * _DTYPES[dtype].itemsize
        if not at <= end <= len(packed):
            raise ValueError(f"{name} would end at {end}")
        room = bytearray(packed[at:end])
        flat = torch.frombuffer(room, dtype=_DTYPES[dtype]) if room else torch.empty(0, dtype=_DTYPES[dtype])
        tensors[name] = flat.reshape(shape)
        at = end
    return put_together(taken, tensors)
