"""Workers with memories of their own, joined by a network: what each of them holds."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest
import torch

import lightwork
from lightwork.checkpoint.tensors import TensorWriter
from lightwork.state import items
from lightwork.store.regions import PAGE_BYTES
from tests.training import new_folder, run_team

GROUP = {"transport": "group"}


ZERO1, ZERO2, ZERO3 = ({"transport": "group", "placement": placement} for placement in ("zero1", "zero2", "zero3"))


def resident(run: Any) -> dict[str, int]:
    """Return the bytes of this worker's shared memory that are there, by region."""
    memory = run._engine.state.buffers._memory
    pages = torch.empty(memory._map.num_bytes // PAGE_BYTES, dtype=torch.uint8)
    start, length = ctypes.c_void_p(memory._bytes.data_ptr()), ctypes.c_size_t(len(memory._bytes))
    assert ctypes.CDLL(None).mincore(start, length, ctypes.c_void_p(pages.data_ptr())) == 0
    there = {}
    for name, offset in memory._map.offsets.items():
        first = offset // PAGE_BYTES
        there[name] = (
            int((pages[first : first + -(-memory._map.regions[name].num_bytes // PAGE_BYTES)] & 1).sum()) * PAGE_BYTES
        )
    return there


def sharded_memory() -> dict[str, int]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters())
    run = lightwork.distribute(
        model, optimizer, global_batch=4, micro_batch=1, precision="bf16", run_dir=str(new_folder())
    )
    data = torch.utils.data.TensorDataset(torch.randn(8, 1024))
    for step in run.steps(data, epochs=1):
        for (x,) in step:
            step.backward(model(x).square().mean())
    run.digest()
    return resident(run)


@pytest.mark.parametrize("settings", [ZERO1, ZERO2, ZERO3], ids=str)
def test_each_host_holds_its_share_and_all_of_what_is_not_shared_out(settings: dict[str, Any]) -> None:
    whole = 4 * 1024 * 1025
    (full, _), (half, other) = (run_team(2, sharded_memory, settings=settings) for settings in (GROUP, settings))
    for name in ("masters", "state exp_avg", "state exp_avg_sq"):
        assert full[name] == pytest.approx(whole * 4, rel=0.01)
        assert half[name] + other[name] == pytest.approx(whole * 4, rel=0.01)
        assert half[name] < whole * 4 * 0.7
    shared_out = settings == ZERO3
    assert half["working"] + other["working"] == pytest.approx(whole * (2 if shared_out else 4), rel=0.02)
    assert full["working"] == pytest.approx(whole * 2, rel=0.01)


def memory_while_saving() -> tuple[int, int]:
    """Save; return the bytes of masters and state that this host has while a piece is written, and afterwards."""
    items.PIECE, items.WINDOW = 128 * 1024, 1024 * 1024
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024) for _ in range(4)))
    optimizer = torch.optim.AdamW(model.parameters())
    run = lightwork.distribute(
        model, optimizer, global_batch=4, micro_batch=1, precision="bf16", run_dir=str(new_folder())
    )
    data = torch.utils.data.TensorDataset(torch.randn(4, 1024))
    for step in run.steps(data, epochs=1):
        for (x,) in step:
            step.backward(model(x).square().mean())
    write, seen = TensorWriter.write, [0]

    def there() -> int:
        return sum(size for name, size in resident(run).items() if name == "masters" or name.startswith("state exp"))

    def watched(writer: TensorWriter, values: torch.Tensor) -> None:
        write(writer, values)
        seen.append(there())

    TensorWriter.write = watched  # type: ignore[method-assign]
    run.save()
    return max(seen), there()


def test_saving_brings_a_little_of_what_other_hosts_own_at_a_time() -> None:
    whole = 4 * 1024 * 1025 * 12
    for highest, after in run_team(2, memory_while_saving, settings=ZERO3):
        assert whole * 0.4 < after < whole * 0.6
        assert highest < after + 4 * 1024 * 1024
