"""What workers tell each other is JSON and the bytes of tensors: it comes back as it was, and nothing else comes in."""

from __future__ import annotations

import math
import pickle
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightwork.checkpoint.packing import pack, unpack
from lightwork.errors import CheckpointError

PLAIN = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
VALUES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner) | st.tuples(inner, inner) | st.dictionaries(st.integers() | st.text(), inner),
    max_leaves=12,
)


@given(VALUES)
def test_plain_values_come_back_as_they_were(value: Any) -> None:
    assert unpack(pack(value)) == value


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(3, 4),
        torch.randn(4, 6)[:, ::2],
        torch.randn(0, 5),
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.tensor([True, False]),
        torch.arange(5, dtype=torch.uint8),
        torch.tensor([float("nan"), -0.0, math.inf]),
        torch.randn(2, dtype=torch.complex64),
    ],
    ids=lambda tensor: f"{tensor.dtype} {tuple(tensor.shape)}",
)
def test_tensors_come_back_with_their_bits(tensor: torch.Tensor) -> None:
    (back,) = unpack(pack([tensor]))
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    assert (
        back.numpy(force=True).tobytes() == tensor.numpy(force=True).tobytes()
        if tensor.dtype != torch.bfloat16
        else True
    )
    assert torch.equal(back.isnan(), tensor.isnan())


def test_arrays_come_back_as_arrays() -> None:
    back = unpack(pack({"a": np.arange(3.0)}))["a"]
    assert isinstance(back, np.ndarray)
    assert back.tolist() == [0.0, 1.0, 2.0]


@pytest.mark.parametrize("value", [object(), b"bytes", print])
def test_anything_else_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError):
        pack([value])


@pytest.mark.parametrize(
    "garbage",
    [b"", pickle.dumps([1]), (2**60).to_bytes(8, "little"), pack([torch.randn(8)])[:-1], b"\x02" + bytes(7) + b"[]"],
    ids=["nothing", "a pickle", "a length without end", "cut off", "other JSON"],
)
def test_what_was_not_packed_is_refused(garbage: bytes) -> None:
    with pytest.raises(ValueError, match="are no packed value"):
        unpack(garbage)
