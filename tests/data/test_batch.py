"""Batches: their tensors are found in every container, aligned, and nothing else is touched."""

from collections import OrderedDict, UserDict, namedtuple
from dataclasses import dataclass, field
from types import MappingProxyType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import pack_sequence

from lightwork.data.batch import aligned, count_tokens, tensors

Pair = namedtuple("Pair", ["first", "second"])


@dataclass
class Record:
    inputs: torch.Tensor
    label: str = "a"
    num_seen: int = field(init=False, default=0)


@dataclass(frozen=True, slots=True)
class FrozenRecord:
    inputs: torch.Tensor


def misaligned(*shape: int) -> torch.Tensor:
    storage = torch.randn(torch.Size(shape).numel() + 1)
    return storage[1:].view(shape)


def is_aligned(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % 64 == 0


CONTAINERS = [
    lambda t: t,
    lambda t: [t, 1],
    lambda t: (t, "x"),
    lambda t: {"a": t, "b": None},
    lambda t: OrderedDict(a=t),
    lambda t: UserDict(a=t),
    lambda t: MappingProxyType({"a": t}),
    lambda t: Pair(t, 2.0),
    lambda t: Record(t),
    lambda t: FrozenRecord(t),
    lambda t: pack_sequence([t.flatten()]),
    lambda t: {"a": [Pair((Record(t), t), t)]},
]


@pytest.mark.parametrize("wrap", CONTAINERS)
def test_tensors_in_every_container_are_aligned_with_the_same_values(wrap):
    original = misaligned(3, 4)
    batch = wrap(original)
    found = list(tensors(batch))
    result = aligned(batch)
    if type(batch) is not MappingProxyType:
        assert type(result) is type(batch)
    assert len(list(tensors(result))) == len(found) > 0
    for new, old in zip(tensors(result), found, strict=True):
        assert is_aligned(new)
        assert torch.equal(new, old)
    assert not is_aligned(original), "the caller's batch is not written to"
    assert [id(t) for t in tensors(batch)] == [id(t) for t in found] or isinstance(batch, tuple)


@pytest.mark.parametrize("wrap", CONTAINERS)
def test_what_is_aligned_already_is_returned_as_it_is(wrap):
    batch = wrap(torch.randn(12))
    assert aligned(batch) is batch


@given(offset=st.integers(0, 70), rows=st.integers(1, 5), columns=st.integers(1, 5))
def test_any_offset_into_a_storage_ends_up_aligned(offset, rows, columns):
    view = torch.arange(200.0)[offset : offset + rows * columns].view(rows, columns)
    result = aligned(view)
    assert is_aligned(result)
    assert torch.equal(result, view)
    assert (result is view) == (view.data_ptr() % 64 == 0)


def test_gaps_and_overlaps_are_removed():
    for view in (torch.randn(8, 32)[:, :16], torch.randn(8, 1).expand(8, 4), torch.randn(64)[::2]):
        result = aligned(view)
        assert result.is_contiguous()
        assert torch.equal(result, view)


def test_channels_last_images_stay_channels_last():
    images = torch.randn(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert aligned(images) is images
    shifted = torch.randn(2 * 3 * 64 + 1)[1:].view(2, 8, 8, 3).permute(0, 3, 1, 2)
    assert aligned(shifted).is_contiguous(memory_format=torch.channels_last)
    assert is_aligned(aligned(shifted))


def test_other_layouts_and_objects_pass_through():
    sparse = torch.eye(3).to_sparse()
    thing = object()
    batch = [sparse, thing, "text", torch.empty(0), torch.Size([2]), Record]
    assert aligned(batch) is batch


def test_the_tokens_of_a_batch_are_those_of_its_first_tensor_of_ids():
    ids = torch.zeros(4, 16, dtype=torch.int64)
    assert count_tokens((ids, ids)) == 64
    assert count_tokens({"mask": torch.ones(4, 8, dtype=torch.bool), "input_ids": ids.int()}) == 64
    assert count_tokens((torch.randn(4, 3), torch.zeros(4, dtype=torch.int64))) == 0
    assert count_tokens(None) == 0
