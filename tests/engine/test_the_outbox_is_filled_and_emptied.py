"""Buckets that leave beside backward: complete when all of theirs is folded, packed as they travel, few at a time."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from lightwork.device.cpu import Cpu
from lightwork.engine.backward.message import message_of
from lightwork.engine.backward.outbox import Outbox, Pool
from lightwork.spec.layout import Layout, ParameterSpec, lay_out

TYPES = (torch.bfloat16, torch.float32)


def layout_of(sizes: list[int]) -> Layout:
    return lay_out([ParameterSpec(name=str(i), shape=(n,), dtype="float32", group=0) for i, n in enumerate(sizes)])


def make(sizes: list[int], dtype: torch.dtype = torch.float32, backlog: int = 8) -> tuple[Outbox, Layout]:
    layout = layout_of(sizes)
    dtypes = [dtype] * len(sizes)
    messages = [message_of(layout, dtypes, torch.float32, bucket) for bucket in range(len(layout.buckets))]
    pool = Pool(max(m.num_bytes for m in messages), Cpu())
    return Outbox(layout, dtypes, messages, pool, Cpu(), backlog), layout


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_what_is_put_is_what_the_message_says(dtype: torch.dtype) -> None:
    sizes = [3_000_000, 5, 700_000]
    outbox, layout = make(sizes, dtype)
    outbox.expect(range(3))
    gradients = [torch.randn(size, dtype=dtype) for size in sizes]
    for index, gradient in enumerate(gradients):
        outbox.pack(index, gradient, gradient)
    for bucket, message in enumerate(outbox.messages):
        for (span, _, _), view in zip(message.blocks, message.views(outbox.packed(bucket)), strict=True):
            block = span.blocks[0]
            assert torch.equal(view, gradients[block.parameter][block.start : block.end])
    assert len(layout.buckets) == 4


def test_a_gradient_travels_in_the_order_in_which_its_parameter_lies_in_memory() -> None:
    outbox, _ = make([24])
    parameter = torch.randn(2, 3, 2, 2).to(memory_format=torch.channels_last)
    gradient = torch.randn(2, 3, 2, 2)
    outbox.expect(range(1))
    outbox.pack(0, gradient, parameter)
    (view,) = outbox.messages[0].views(outbox.packed(0))
    assert torch.equal(view.as_strided(parameter.shape, parameter.stride()), gradient)


def test_a_bucket_is_awaited_until_all_of_it_is_folded_or_backward_ends_or_fails() -> None:
    outbox, _ = make([600_000, 600_000, 400_000])  # two buckets, the second of two parameters
    seen: list[object] = []

    def empty() -> None:
        try:
            for bucket in (1, 0, 1):
                outbox.wait_for_bucket(bucket)
                seen.append(bucket)
        except InterruptedError as error:
            seen.append(str(error))

    outbox.expect(range(3))
    thread = threading.Thread(target=empty)
    thread.start()
    outbox.count_folded(2)
    time.sleep(0.05)
    assert seen == []
    outbox.count_folded(1)
    time.sleep(0.05)
    assert seen == [1]
    outbox.complete()
    thread.join(5)
    assert seen == [1, 0, 1]
    outbox.expect(range(3))
    thread = threading.Thread(target=empty)
    thread.start()
    outbox.abandon()
    thread.join(5)
    assert seen[3:] == ["backward has failed"]


def test_backward_waits_when_it_is_too_far_ahead() -> None:
    outbox, layout = make([1024 * 1024] * 5, backlog=2)
    assert len(layout.buckets) == 5
    outbox.expect(range(5))
    folded: list[int] = []

    def fill() -> None:
        for index in reversed(range(5)):
            outbox.count_folded(index)
            folded.append(index)

    thread = threading.Thread(target=fill)
    thread.start()
    time.sleep(0.1)
    assert folded == [4, 3]  # the third is complete, and is waited with
    outbox.mark_taken(4)
    time.sleep(0.1)
    assert folded == [4, 3, 2]
    for bucket in (3, 2, 1, 0):
        outbox.mark_taken(bucket)
    thread.join(5)
    assert not thread.is_alive()
